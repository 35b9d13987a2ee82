//! Frame sources. A source is random access: frame `i` is the same whenever it is read, so that an
//! agent killed at frame `i` resumes at `i`, and virtual time is a function of the index. Live
//! sources ([`Source::is_live`]), cameras and watched folders, can't be: they number what comes.
//!
//! A source is named by a URI:
//!
//! - `sim:roads?seed=7&size=32&rare=0.008&late=0.015&late_from=5000&conditions=all|clear-day&mix=stream|balanced`
//! - `idx:DIR?seed=1&split=train|test&shard=0/4&pool=0..1&rare=8:0.005,3:0.01&late=9@5000&mix=stream|balanced`
//! - `dir:PATH` lists the pictures under PATH once, sorted; `dir:PATH?stream=1&…` draws from them
//!   endlessly with the parameters of `idx`; `dir:PATH?watch=1&poll_ms=200&deadline_ms=2000` takes
//!   each picture that is put there, once.
//! - `v4l2:/dev/video0?width=640&height=480&fps=30&format=auto|mjpeg|yuyv`, in builds with the
//!   feature `v4l2`.
//!
//! Those that are not live take `start_ms`, the capture time of frame 0. The path ends at the
//! first `?`.

#[cfg(any(test, feature = "v4l2"))]
mod camera;
mod dir;
mod draw;
mod error;
mod idx;
mod query;
mod roads;
#[cfg(feature = "v4l2")]
mod v4l2;
mod watch;

pub(crate) use draw::content_hash;
pub use error::SourceError;

use flywheel_shared::message::Codec;
use query::Query;

/// Milliseconds between two frames of a source: 30 frames a second.
pub const FRAME_MS: u64 = 33;

/// Capture time of frame 0 where the URI names none, in Unix milliseconds.
pub const START_MS: u64 = 1_750_000_000_000;

/// What is known of a frame besides its pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Captured {
    /// Columns in pixels.
    pub width: u32,
    /// Rows in pixels.
    pub height: u32,
    /// Bytes a pixel: 1 (grey) or 3 (red, green, blue).
    pub channels: u8,
    /// What uploading this frame would cost: the encoded length where the source has an encoding,
    /// else the raw length.
    pub seen_bytes: u32,
    /// How `encoded` is encoded; None where the source has pixels only.
    pub encoded: Option<Codec>,
    /// Capture time in Unix milliseconds.
    pub captured_ms: u64,
    /// What the frame shows again: frames of one track show the same thing (an encounter of the
    /// simulator, a drawn picture of a data set) and never belong in two splits.
    pub track: u64,
}

/// A reusable frame buffer that [`Source::read`] fills.
#[derive(Clone, Debug)]
pub struct FrameBuf {
    /// Rows from the top, pixels interleaved (HWC), 8 bits a channel.
    pub pixels: Vec<u8>,
    /// The picture file as it came; empty unless `meta.encoded` names its codec.
    pub encoded: Vec<u8>,
    /// Where a watched source would go on after this frame; empty for other sources.
    pub mark: String,
    /// Shape, cost and time.
    pub meta: Captured,
}

impl FrameBuf {
    /// An empty buffer.
    pub fn new() -> Self {
        let meta = Captured {
            width: 0,
            height: 0,
            channels: 1,
            seen_bytes: 0,
            encoded: None,
            captured_ms: 0,
            track: 0,
        };
        Self {
            pixels: Vec::new(),
            encoded: Vec::new(),
            mark: String::new(),
            meta,
        }
    }

    /// What an upload of this frame carries: the original file where there is one, else the pixels.
    pub fn payload(&self) -> (Codec, &[u8]) {
        match self.meta.encoded {
            Some(codec) => (codec, &self.encoded),
            None if self.meta.channels == 1 => (Codec::Gray8, &self.pixels),
            None => (Codec::Rgb8, &self.pixels),
        }
    }
}

impl Default for FrameBuf {
    fn default() -> Self {
        Self::new()
    }
}

/// What came of reading one index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// The buffer holds the frame.
    Frame,
    /// There is no frame at this index, though there should be; the next index may have one.
    Skipped {
        /// The file.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// There is no frame at this index yet; ask again.
    NotYet,
    /// The source has no frame at this index or any later one.
    End,
}

/// A stream of frames, by index.
pub trait Source: Send {
    /// The URI that the source was opened with.
    fn id(&self) -> &str;

    /// Reads frame `index` into the buffer, whose former content is lost.
    ///
    /// # Errors
    /// The source itself fails; a single bad file is [`Read::Skipped`] instead.
    fn read(&mut self, index: u64, into: &mut FrameBuf) -> Result<Read, SourceError>;

    /// Whether frames come when they come, each once, whatever index is asked for: a camera, or a
    /// folder that is watched.
    fn is_live(&self) -> bool {
        false
    }

    /// Goes on after the frame with this [`FrameBuf::mark`]; before the first read.
    fn resume(&mut self, _mark: &str) {}

    /// The class of frame `index`, where the source knows it.
    fn truth(&self, index: u64) -> Option<String>;

    /// How many indices there are; None for an endless stream.
    fn len(&self) -> Option<u64>;

    /// Whether the source holds no frame at all.
    fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// The class names that [`Self::truth`] may give, in label order; the same for every split,
    /// shard and seed of one data set.
    fn classes(&self) -> Vec<String>;
}

/// Opens the source that a URI names.
///
/// # Errors
/// An unknown scheme, parameter or value; a folder or file that is missing or malformed.
pub fn open(uri: &str) -> Result<Box<dyn Source>, SourceError> {
    let (scheme, rest) = uri.split_once(':').unwrap_or(("", uri));
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    match (scheme, path) {
        ("sim", "roads") => Ok(Box::new(roads::RoadsSource::open(
            uri,
            Query::parse(uri, query)?,
        )?)),
        ("idx", folder) if !folder.is_empty() => Ok(Box::new(idx::IdxSource::open(
            uri,
            folder.as_ref(),
            Query::parse(uri, query)?,
        )?)),
        ("dir", folder) if !folder.is_empty() => {
            let mut query = Query::parse(uri, query)?;
            let folder = folder.as_ref();
            if query.choice("watch", [("0", false), ("1", true)])? {
                Ok(Box::new(watch::WatchSource::open(uri, folder, query)?))
            } else {
                Ok(Box::new(dir::DirSource::open(uri, folder, query)?))
            }
        }
        #[cfg(feature = "v4l2")]
        ("v4l2", device) if !device.is_empty() => {
            let camera = v4l2::Camera::open(device.as_ref(), Query::parse(uri, query)?)?;
            Ok(Box::new(camera::CameraSource::new(uri, Box::new(camera))))
        }
        #[cfg(not(feature = "v4l2"))]
        ("v4l2", _) => Err(SourceError::NotBuilt {
            uri: uri.to_owned(),
            feature: "v4l2",
        }),
        _ => Err(SourceError::Scheme {
            uri: uri.to_owned(),
        }),
    }
}

/// Capture time of a frame.
fn captured_ms(start_ms: u64, index: u64) -> u64 {
    start_ms.saturating_add(index.saturating_mul(FRAME_MS))
}

#[cfg(test)]
mod tests;
