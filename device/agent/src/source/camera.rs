//! A camera as a source: what the kernel gives becomes RGB here, whatever gave it. The device
//! itself is behind [`Capture`], so that everything but the system calls is tested without one.

use std::io;

use crate::clock::unix_ms;

use super::dir::decode;
use super::{Captured, FrameBuf, Read, Source, SourceError};

/// Milliseconds of one track: without a tracker, what a camera shows within this time is taken to
/// be the same thing, and never divided between training and evaluation.
const TRACK_MS: u64 = 10_000;

/// How a camera encodes frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    /// Two pixels in four bytes: Y₀ U Y₁ V, 8 bits each, BT.601 limited range.
    Yuyv,
    /// A JPEG file a frame.
    Mjpeg,
}

/// What a camera was set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) width: u32,
    pub(super) height: u32,
    /// Bytes from one row to the next; 0 where rows mean nothing.
    pub(super) stride: u32,
    pub(super) encoding: Encoding,
}

/// A device that gives frames one after the other.
pub(super) trait Capture: Send {
    /// What it was set to.
    fn geometry(&self) -> Geometry;

    /// Waits for the next frame and copies its bytes, as they are, into the buffer. False if the
    /// device says that this frame is damaged.
    fn next(&mut self, into: &mut Vec<u8>) -> io::Result<bool>;
}

/// A camera as a source. Its frames come when they come; an index only numbers them.
pub(super) struct CameraSource {
    id: String,
    capture: Box<dyn Capture>,
    raw: Vec<u8>,
    /// The wall clock, Unix milliseconds.
    clock: Box<dyn Fn() -> u64 + Send>,
}

impl CameraSource {
    pub(super) fn new(uri: &str, capture: Box<dyn Capture>) -> Self {
        Self::with_clock(uri, capture, Box::new(unix_ms))
    }

    fn with_clock(
        uri: &str,
        capture: Box<dyn Capture>,
        clock: Box<dyn Fn() -> u64 + Send>,
    ) -> Self {
        Self {
            id: uri.to_owned(),
            capture,
            raw: Vec::new(),
            clock,
        }
    }
}

impl Source for CameraSource {
    fn id(&self) -> &str {
        &self.id
    }

    fn read(&mut self, index: u64, into: &mut FrameBuf) -> Result<Read, SourceError> {
        let skipped = |why: String| {
            Ok(Read::Skipped {
                name: format!("camera frame {index}"),
                why,
            })
        };
        let whole = self
            .capture
            .next(&mut self.raw)
            .map_err(|source| SourceError::Io {
                path: self.id.clone().into(),
                source,
            })?;
        if !whole {
            return skipped("the camera says that it is damaged".to_owned());
        }
        let captured_ms = (self.clock)();
        let geometry = self.capture.geometry();
        match geometry.encoding {
            Encoding::Yuyv => {
                if let Err(why) = yuyv_to_rgb(&self.raw, &geometry, &mut into.pixels) {
                    return skipped(why);
                }
                into.encoded.clear();
                into.meta = Captured {
                    width: geometry.width,
                    height: geometry.height,
                    channels: 3,
                    seen_bytes: u32::try_from(into.pixels.len()).unwrap_or(u32::MAX),
                    encoded: None,
                    captured_ms,
                    track: captured_ms / TRACK_MS,
                };
            }
            Encoding::Mjpeg => {
                match decode(std::mem::take(&mut self.raw)) {
                    Ok(picture) => picture.fill(into),
                    Err(why) => return skipped(why),
                }
                into.meta.captured_ms = captured_ms;
                into.meta.track = captured_ms / TRACK_MS;
            }
        }
        Ok(Read::Frame)
    }

    fn is_live(&self) -> bool {
        true
    }

    fn truth(&self, _index: u64) -> Option<String> {
        None
    }

    fn len(&self) -> Option<u64> {
        None
    }

    fn classes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// BT.601 limited range to RGB (ITU-R BT.601-7, 8 bits): R = 1.164·(Y − 16) + 1.596·(V − 128),
/// G = 1.164·(Y − 16) − 0.392·(U − 128) − 0.813·(V − 128), B = 1.164·(Y − 16) + 2.017·(U − 128),
/// in 16-bit fixed point, to within 1 of the exact values.
fn yuyv_to_rgb(yuyv: &[u8], geometry: &Geometry, rgb: &mut Vec<u8>) -> Result<(), String> {
    let (width, height) = (geometry.width as usize, geometry.height as usize);
    let stride = (geometry.stride as usize).max(2 * width);
    if width == 0 || height == 0 || !width.is_multiple_of(2) {
        return Err(format!("{width} × {height} pixels, which YUYV cannot hold"));
    }
    // The last row need not be padded.
    let need = stride * (height - 1) + 2 * width;
    if yuyv.len() < need {
        return Err(format!(
            "{} bytes, {need} make a frame of {width} × {height}",
            yuyv.len()
        ));
    }
    rgb.resize(3 * width * height, 0);
    for (row, out) in yuyv.chunks(stride).zip(rgb.chunks_exact_mut(3 * width)) {
        for (pair, out) in row.chunks_exact(4).zip(out.chunks_exact_mut(6)) {
            let (u, v) = (i32::from(pair[1]) - 128, i32::from(pair[3]) - 128);
            let red = 104_597 * v;
            let green = -25_675 * u - 53_279 * v;
            let blue = 132_201 * u;
            for (y, pixel) in [pair[0], pair[2]].into_iter().zip(out.chunks_exact_mut(3)) {
                let y = 76_309 * (i32::from(y) - 16);
                for (value, part) in pixel.iter_mut().zip([red, green, blue]) {
                    *value = ((y + part + (1 << 15)) >> 16).clamp(0, 255) as u8;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use flywheel_shared::message::Codec;

    use super::*;

    /// A camera that gives these frames and then stays silent with an error.
    struct Fake {
        geometry: Geometry,
        frames: Vec<Result<Vec<u8>, ()>>,
    }

    impl Capture for Fake {
        fn geometry(&self) -> Geometry {
            self.geometry
        }

        fn next(&mut self, into: &mut Vec<u8>) -> io::Result<bool> {
            if self.frames.is_empty() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            into.clear();
            match self.frames.remove(0) {
                Ok(bytes) => {
                    into.extend_from_slice(&bytes);
                    Ok(true)
                }
                Err(()) => Ok(false),
            }
        }
    }

    fn yuyv(width: u32, height: u32, stride: u32) -> Geometry {
        Geometry {
            width,
            height,
            stride,
            encoding: Encoding::Yuyv,
        }
    }

    /// The exact formula, in f64.
    fn reference(y: u8, u: u8, v: u8) -> [f64; 3] {
        let (y, u, v) = (
            255.0 / 219.0 * (f64::from(y) - 16.0),
            255.0 / 224.0 * (f64::from(u) - 128.0),
            255.0 / 224.0 * (f64::from(v) - 128.0),
        );
        let (kr, kb) = (0.299, 0.114);
        let kg = 1.0 - kr - kb;
        [
            y + 2.0 * (1.0 - kr) * v,
            y - 2.0 * kb * (1.0 - kb) / kg * u - 2.0 * kr * (1.0 - kr) / kg * v,
            y + 2.0 * (1.0 - kb) * u,
        ]
        .map(|value| value.clamp(0.0, 255.0))
    }

    #[test]
    fn every_colour_is_converted_as_the_standard_says() {
        let mut rgb = Vec::new();
        for u in (0..=255).step_by(5) {
            for v in (0..=255).step_by(3) {
                for y in (0..=255u8).step_by(17) {
                    let raw = [y, u, 255 - y, v];
                    yuyv_to_rgb(&raw, &yuyv(2, 1, 0), &mut rgb).unwrap();
                    let want = [reference(y, u, v), reference(255 - y, u, v)].concat();
                    for (found, want) in rgb.iter().zip(want) {
                        assert!((f64::from(*found) - want).abs() <= 1.0, "{raw:?}: {rgb:?}");
                    }
                }
            }
        }
        yuyv_to_rgb(&[16, 128, 235, 128], &yuyv(2, 1, 0), &mut rgb).unwrap();
        assert_eq!(rgb, [0, 0, 0, 255, 255, 255]);
    }

    #[test]
    fn padded_rows_are_read_and_short_frames_are_refused() {
        let mut rgb = Vec::new();
        let padded = [235, 128, 16, 128, 9, 9, 16, 128, 235, 128];
        yuyv_to_rgb(&padded, &yuyv(2, 2, 6), &mut rgb).unwrap();
        assert_eq!(rgb, [255, 255, 255, 0, 0, 0, 0, 0, 0, 255, 255, 255]);
        let short = yuyv_to_rgb(&padded[..9], &yuyv(2, 2, 6), &mut rgb).unwrap_err();
        assert!(short.contains("9 bytes, 10 make"), "{short}");
        assert!(yuyv_to_rgb(&padded, &yuyv(3, 1, 0), &mut rgb).is_err());
    }

    #[test]
    fn a_camera_gives_frames_with_their_time_and_damaged_ones_are_skipped() {
        let good = vec![81, 90, 81, 240];
        let fake = Fake {
            geometry: yuyv(2, 1, 4),
            frames: vec![Ok(good.clone()), Err(()), Ok(good[..2].to_vec()), Ok(good)],
        };
        let clock = Box::new(|| 1_750_000_012_345);
        let mut source = CameraSource::with_clock("v4l2:/dev/x", Box::new(fake), clock);
        let mut frame = FrameBuf::new();
        assert_eq!(source.read(7, &mut frame).unwrap(), Read::Frame);
        assert!(source.is_live());
        // Red in BT.601, within rounding.
        assert!(frame.pixels[0] >= 253 && frame.pixels[1] <= 2 && frame.pixels[2] <= 2);
        assert_eq!(frame.meta.captured_ms, 1_750_000_012_345);
        assert_eq!((frame.meta.width, frame.meta.height), (2, 1));
        for (index, why) in [(8, "damaged"), (9, "2 bytes")] {
            let Read::Skipped { name, why: said } = source.read(index, &mut frame).unwrap() else {
                panic!("frame {index} is not skipped");
            };
            assert!(
                name.contains(&index.to_string()) && said.contains(why),
                "{name}: {said}"
            );
        }
        assert_eq!(source.read(10, &mut frame).unwrap(), Read::Frame);
        let error = source.read(11, &mut frame).unwrap_err().to_string();
        assert!(error.contains("v4l2:/dev/x"), "{error}");
    }

    #[test]
    fn mjpeg_is_decoded_and_kept_as_it_came() {
        let mut jpeg = io::Cursor::new(Vec::new());
        image::RgbImage::from_pixel(16, 8, image::Rgb([200, 30, 60]))
            .write_to(&mut jpeg, image::ImageFormat::Jpeg)
            .unwrap();
        let jpeg = jpeg.into_inner();
        let geometry = Geometry {
            width: 16,
            height: 8,
            stride: 0,
            encoding: Encoding::Mjpeg,
        };
        let cut = jpeg[..jpeg.len() - 20].to_vec();
        let frames = vec![Ok(jpeg.clone()), Ok(cut), Ok(jpeg.clone())];
        let mut source = CameraSource::new("v4l2:/dev/x", Box::new(Fake { geometry, frames }));
        let mut frame = FrameBuf::new();
        for (index, good) in [true, false, true].into_iter().enumerate() {
            let read = source.read(index as u64, &mut frame).unwrap();
            assert_eq!(read == Read::Frame, good, "{read:?}");
        }
        assert_eq!(frame.payload(), (Codec::Jpeg, &jpeg[..]));
        assert_eq!(frame.meta.seen_bytes as usize, jpeg.len());
        for (found, want) in frame
            .pixels
            .chunks_exact(3)
            .flatten()
            .zip([200, 30, 60].iter().cycle())
        {
            assert!(found.abs_diff(*want) <= 4);
        }
    }
}
