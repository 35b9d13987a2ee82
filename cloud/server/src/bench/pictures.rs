//! The pictures of a benchmark: each once, from the agent's own sources, so that what a frame
//! costs is what it costs a device.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};
use flywheel_agent::source::{self, FrameBuf, Read};
use flywheel_shared::message::Codec;

use crate::picture::Picture;

/// Largest side that is kept in memory, in pixels: models of the benchmark see no more.
const MAX_SIDE: u32 = 128;

/// A labelled picture with what its upload would carry.
pub struct Item {
    /// Its pixels, shrunk to at most [`MAX_SIDE`].
    pub picture: Picture,
    /// Index into [`Source::classes`].
    pub class: usize,
    /// Width and height as captured.
    pub size: (u32, u32),
    /// Encoding of the payload.
    pub codec: Codec,
    /// Length of the payload in bytes.
    pub payload: usize,
    /// What uploading this frame counts as, in bytes.
    pub seen: u32,
}

/// A labelled data set on disk.
pub struct Source {
    /// `idx:DIR?` or `dir:DIR?`, ready for parameters.
    base: String,
    idx: bool,
    /// Class names in label order.
    pub classes: Vec<String>,
}

impl Source {
    /// Opens a folder: files of the MNIST format, or one folder of pictures for each class.
    ///
    /// # Errors
    /// If the folder holds neither, or fewer than three classes.
    pub fn open(folder: &Path) -> Result<Self> {
        let listed = std::fs::read_dir(folder)
            .with_context(|| format!("--data {}: cannot read the folder", folder.display()))?;
        let idx = listed
            .filter_map(Result::ok)
            .any(|entry| entry.file_name().to_string_lossy().contains("-ubyte"));
        let scheme = if idx { "idx" } else { "dir" };
        let base = format!("{scheme}:{}?", folder.display());
        let classes = source::open(&format!("{base}split=train"))
            .with_context(|| format!("--data {}", folder.display()))?
            .classes();
        if classes.len() < 3 {
            bail!(
                "--data {} has {} classes; holding one out needs at least 3",
                folder.display(),
                classes.len()
            );
        }
        Ok(Self { base, idx, classes })
    }

    /// Whether the data set itself says what to test on.
    pub fn has_test_set(&self) -> bool {
        self.idx
    }

    /// Up to `count` different pictures of `split` (`train`, `test`, or of a folder `all`) whose content falls into
    /// `pool`; `count` bounds a set of the MNIST format only, a folder gives all it has.
    ///
    /// # Errors
    /// If the source fails or gives nothing.
    pub fn read(&self, split: &str, pool: &str, seed: u64, count: usize) -> Result<Vec<Item>> {
        // A set of the MNIST format is a stream; one of balanced draws meets every class.
        let draws = if self.idx {
            format!("&mix=balanced&seed={seed}")
        } else {
            String::new()
        };
        let uri = format!("{}split={split}&pool={pool}{draws}", self.base);
        let mut source = source::open(&uri)?;
        let mut frame = FrameBuf::new();
        let (mut items, mut met) = (Vec::new(), BTreeSet::new());
        // Drawing with replacement repeats; a set that is nearly exhausted is not drawn out.
        let last = source.len().unwrap_or(8 * count as u64);
        for index in 0..last {
            if self.idx && items.len() == count {
                break;
            }
            match source.read(index, &mut frame)? {
                Read::End => break,
                Read::Skipped { name, why } => {
                    eprintln!("{name} is left out: {why}");
                    continue;
                }
                Read::NotYet => continue,
                Read::Frame => {}
            }
            let class = source
                .truth(index)
                .and_then(|name| self.classes.iter().position(|class| *class == name));
            let Some(class) = class.filter(|_| met.insert(frame.meta.track)) else {
                continue;
            };
            let (codec, payload) = frame.payload();
            items.push(Item {
                picture: shrunk(&frame)?,
                class,
                size: (frame.meta.width, frame.meta.height),
                codec,
                payload: payload.len(),
                seen: frame.meta.seen_bytes,
            });
        }
        if items.is_empty() {
            bail!("{uri} gives no labelled picture");
        }
        Ok(items)
    }
}

fn shrunk(frame: &FrameBuf) -> Result<Picture> {
    Picture {
        width: frame.meta.width,
        height: frame.meta.height,
        channels: frame.meta.channels,
        pixels: frame.pixels.clone(),
    }
    .at_most(MAX_SIDE)
}
