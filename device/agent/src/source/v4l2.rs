//! `v4l2:/dev/videoN?width=640&height=480&fps=30&format=auto|mjpeg|yuyv`: a camera of the Linux
//! kernel, through memory-mapped buffers. Built only with the feature `v4l2`.

use std::io;
use std::path::Path;

use linuxvideo::format::{PixFormat, PixelFormat};
use linuxvideo::stream::ReadStream;
use linuxvideo::{BufType, Device, Fract};

use super::SourceError;
use super::camera::{Capture, Encoding, Geometry};
use super::query::Query;

/// Encodings in the order in which `auto` prefers them: JPEG leaves more of the USB bus, and an
/// upload carries it as it is.
const PREFERRED: [(PixelFormat, Encoding); 2] = [
    (PixelFormat::MJPG, Encoding::Mjpeg),
    (PixelFormat::YUYV, Encoding::Yuyv),
];

/// An open camera that streams.
pub(super) struct Camera {
    stream: ReadStream,
    geometry: Geometry,
}

impl Camera {
    /// Opens a device and sets it as near to the wishes as its driver can.
    pub(super) fn open(device: &Path, mut query: Query) -> Result<Self, SourceError> {
        let width = query.value("width", 640, "pixels")?;
        let height = query.value("height", 480, "pixels")?;
        let fps: u32 = query.value("fps", 30, "whole frames a second")?;
        let wanted = query.choice(
            "format",
            [
                ("auto", None),
                ("mjpeg", Some(Encoding::Mjpeg)),
                ("yuyv", Some(Encoding::Yuyv)),
            ],
        )?;
        query.finish()?;
        let failed = |source| SourceError::Io {
            path: device.to_owned(),
            source,
        };
        let open = Device::open(device).map_err(failed)?;
        let mut offered = Vec::new();
        for format in open.formats(BufType::VIDEO_CAPTURE) {
            offered.push(format.map_err(failed)?.pixel_format());
        }
        let chosen = PREFERRED.into_iter().find(|(format, encoding)| {
            offered.contains(format) && wanted.is_none_or(|wanted| wanted == *encoding)
        });
        let Some((format, encoding)) = chosen else {
            let names: Vec<String> = offered.iter().map(ToString::to_string).collect();
            return Err(SourceError::Malformed {
                path: device.to_owned(),
                what: format!(
                    "the camera gives {}; MJPG or YUYV is needed",
                    if names.is_empty() {
                        "nothing (is it a capture device?)".to_owned()
                    } else {
                        names.join(", ")
                    }
                ),
            });
        };
        let capture = open
            .video_capture(PixFormat::new(width, height, format))
            .map_err(failed)?;
        let set = capture.format();
        if set.pixel_format() != format {
            return Err(SourceError::Malformed {
                path: device.to_owned(),
                what: format!(
                    "the camera was asked for {format} and gives {}",
                    set.pixel_format()
                ),
            });
        }
        // Not every camera can set its rate; the agent's pace holds in any case.
        if let Err(error) = capture.set_frame_interval(Fract::new(1, fps.max(1))) {
            tracing::warn!(device = %device.display(), %error, fps, "the camera keeps its own rate");
        }
        let geometry = Geometry {
            width: set.width(),
            height: set.height(),
            stride: set.bytes_per_line(),
            encoding,
        };
        if (geometry.width, geometry.height) != (width, height) {
            tracing::warn!(
                device = %device.display(),
                "asked for {width} × {height}, the camera gives {} × {}",
                geometry.width,
                geometry.height
            );
        }
        Ok(Self {
            stream: capture.into_stream().map_err(failed)?,
            geometry,
        })
    }
}

impl Capture for Camera {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn next(&mut self, into: &mut Vec<u8>) -> io::Result<bool> {
        self.stream.dequeue(|buffer| {
            into.clear();
            into.extend_from_slice(&buffer);
            Ok(!buffer.is_error())
        })
    }
}
