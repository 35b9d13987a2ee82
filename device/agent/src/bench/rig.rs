//! The frame loop of production on a data folder of its own that is deleted afterwards: same
//! source, spool, state and trigger, only no link to a cloud.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use device_core::pace::Pace;
use flywheel_shared::trust::TrustRoot;

use crate::agent;
use crate::capture::Capturer;
use crate::config::Config;
use crate::models::{Device, Runner};
use crate::pipeline::{Feed, Pipeline};
use crate::shared::Shared;
use crate::source::{self, FrameBuf, Read, Source, SourceError};
use crate::state::State;

/// A frame loop to be measured.
pub struct Rig {
    /// The loop.
    pub pipeline: Pipeline,
    /// What it shares with the link, which is absent here.
    pub shared: Arc<Shared>,
    /// Frames of the source; `None` if it is endless.
    pub frames: Option<u64>,
    _folder: Scratch,
}

impl Rig {
    /// Puts a loop together that takes frames of `source` as fast as it can, or `fps` a second
    /// from a capture thread, for which a listing of pictures starts over at its end.
    ///
    /// # Errors
    /// If the source or the folder of temporary files cannot be used.
    pub fn new(runner: Runner, source: &str, fps: Option<f32>) -> Result<Self> {
        let folder = Scratch::new()?;
        let text = toml::to_string(&toml::Table::from_iter([
            ("data".to_owned(), folder.0.display().to_string().into()),
            ("source".to_owned(), source.into()),
        ]))?;
        let config = Config::parse(Path::new("bench"), &text)?;
        let source = source::open(source)?;
        let frames = source.len();
        let state = Arc::new(State::open(&folder.0)?);
        let device = Device {
            id: "bench".parse()?,
            hardware: config.hardware.clone(),
            // Nothing is verified here.
            trust: TrustRoot::default(),
        };
        let (shared, _, _) = agent::open(&config, device, &state)?;
        let (pace, feed) = match fps {
            None => (Pace::Max, Feed::Direct(source)),
            Some(fps) => {
                let capturer = Capturer::new(Box::new(Over(source)), fps, 0, config.capture_frames);
                let shelf = capturer.shelf();
                // It ends when told to stop; nothing waits for it.
                drop(capturer.spawn(Arc::clone(&shared))?);
                (Pace::Fps(fps), Feed::Shelf(shelf))
            }
        };
        Ok(Self {
            frames,
            pipeline: Pipeline::new(&config, pace, feed, Some(runner), Arc::clone(&shared))?,
            shared,
            _folder: folder,
        })
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.shared.signal(|signals| signals.stop = true);
    }
}

/// A source that starts over where it ends.
struct Over(Box<dyn Source>);

impl Source for Over {
    fn id(&self) -> &str {
        self.0.id()
    }

    fn read(&mut self, index: u64, into: &mut FrameBuf) -> Result<Read, SourceError> {
        let frames = self.0.len().unwrap_or(u64::MAX);
        self.0.read(index.checked_rem(frames).unwrap_or(0), into)
    }

    fn is_live(&self) -> bool {
        self.0.is_live()
    }

    fn truth(&self, index: u64) -> Option<String> {
        self.0.truth(index)
    }

    fn len(&self) -> Option<u64> {
        self.0.len()
    }

    fn classes(&self) -> Vec<String> {
        self.0.classes()
    }
}

/// A folder that goes when it is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("flywheel-bench-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).with_context(|| format!("{}: cannot make it", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays lies among other temporary files.
        let _ = fs::remove_dir_all(&self.0);
    }
}
