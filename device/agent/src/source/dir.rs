//! `dir:PATH`: folders of photographs, class = name of the folder that holds the file. Listed once
//! in order, or drawn from endlessly; either way a bad file costs its own frame and no more.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flywheel_shared::message::Codec;
use image::{ImageFormat, ImageReader, Limits};

use super::draw::{Draw, Portion, Split, Wish, content_hash, held_out};
use super::query::Query;
use super::{Captured, FrameBuf, Read, START_MS, Source, SourceError, captured_ms};

const EXTENSIONS: [&str; 6] = ["jpg", "jpeg", "png", "bmp", "ppm", "pgm"];

/// Largest width or height that is decoded.
const MAX_SIDE: u32 = 16_384;

/// Decoded pictures kept in memory, in bytes: a stream draws the same files again and again.
const CACHE_BYTES: usize = 256 << 20;

/// A folder as a source.
pub(super) struct DirSource {
    id: String,
    root: PathBuf,
    files: Vec<Item>,
    classes: Vec<String>,
    /// None lists the files once.
    draw: Option<Draw>,
    cache: BTreeMap<usize, Arc<Picture>>,
    cached_bytes: usize,
    start_ms: u64,
}

struct Item {
    path: PathBuf,
    /// Index into the classes; None for files directly under the root.
    class: Option<usize>,
}

pub(super) struct Picture {
    width: u32,
    height: u32,
    /// RGB.
    pixels: Vec<u8>,
    codec: Option<Codec>,
    /// The file, where `codec` can name its encoding; else empty.
    encoded: Vec<u8>,
}

impl Picture {
    /// Puts the picture into a frame; time and track are left to the source.
    pub(super) fn fill(&self, into: &mut FrameBuf) {
        into.pixels.clone_from(&self.pixels);
        into.encoded.clone_from(&self.encoded);
        let cost = if self.codec.is_some() {
            self.encoded.len()
        } else {
            self.pixels.len()
        };
        into.meta = Captured {
            width: self.width,
            height: self.height,
            channels: 3,
            seen_bytes: u32::try_from(cost).unwrap_or(u32::MAX),
            encoded: self.codec,
            captured_ms: 0,
            track: 0,
        };
    }
}

impl DirSource {
    pub(super) fn open(uri: &str, root: &Path, mut query: Query) -> Result<Self, SourceError> {
        let stream = query.choice("stream", [("0", false), ("1", true)])?;
        let splits = [
            ("all", Split::All),
            ("train", Split::Train),
            ("test", Split::Test),
        ];
        let split = query.choice("split", splits)?;
        let portion = Portion::take(&mut query)?;
        let start_ms = query.value("start_ms", START_MS, "Unix milliseconds")?;
        let wish = if stream {
            Some(Wish::take(&mut query)?)
        } else {
            None
        };

        let mut paths = Vec::new();
        walk(root, &mut paths)?;
        paths.sort();
        let names: BTreeSet<String> = paths
            .iter()
            .filter_map(|path| class_of(root, path))
            .collect();
        let classes: Vec<String> = names.into_iter().collect();
        let belongs = |path: &PathBuf| {
            if split == Split::All && portion.is_all() {
                return true;
            }
            // A file that can't be read is sorted by name; reading it will name it again.
            let content = fs::read(path).map_or_else(
                |_| content_hash(path.as_os_str().as_encoded_bytes()),
                |bytes| content_hash(&bytes),
            );
            let in_split = match split {
                Split::All => true,
                Split::Train => !held_out(content),
                Split::Test => held_out(content),
            };
            in_split && portion.holds(content)
        };
        let files: Vec<Item> = paths
            .into_iter()
            .filter(belongs)
            .map(|path| {
                let class =
                    class_of(root, &path).and_then(|name| classes.binary_search(&name).ok());
                Item { path, class }
            })
            .collect();
        if files.is_empty() {
            return Err(SourceError::Empty {
                uri: uri.to_owned(),
                which: format!(" ({})", EXTENSIONS.join(", ")),
            });
        }
        let draw = match wish {
            None => None,
            Some(wish) => {
                let mut pools = vec![Vec::new(); classes.len()];
                for (i, item) in files.iter().enumerate() {
                    if let Some(class) = item.class {
                        pools[class].push(i);
                    }
                }
                if classes.is_empty() {
                    // A flat folder: one nameless class.
                    pools.push((0..files.len()).collect());
                }
                Some(wish.fit(&query, &classes, pools)?)
            }
        };
        query.finish()?;
        Ok(Self {
            id: uri.to_owned(),
            root: root.to_owned(),
            files,
            classes,
            draw,
            cache: BTreeMap::new(),
            cached_bytes: 0,
            start_ms,
        })
    }

    /// The file at an index; None past the end of a listing.
    fn file_at(&self, index: u64) -> Option<usize> {
        match &self.draw {
            Some(draw) => Some(draw.at(index).1),
            None => usize::try_from(index)
                .ok()
                .filter(|&i| i < self.files.len()),
        }
    }

    fn picture(&mut self, file: usize) -> Result<Arc<Picture>, String> {
        if let Some(picture) = self.cache.get(&file) {
            return Ok(Arc::clone(picture));
        }
        let bytes = fs::read(&self.files[file].path).map_err(|e| e.to_string())?;
        let picture = Arc::new(decode(bytes)?);
        let size = picture.pixels.len() + picture.encoded.len();
        // Filled until full and never emptied: what a frame costs then depends on nothing else.
        if self.draw.is_some() && self.cached_bytes + size <= CACHE_BYTES {
            self.cached_bytes += size;
            self.cache.insert(file, Arc::clone(&picture));
        }
        Ok(picture)
    }
}

impl Source for DirSource {
    fn id(&self) -> &str {
        &self.id
    }

    fn read(&mut self, index: u64, into: &mut FrameBuf) -> Result<Read, SourceError> {
        let Some(file) = self.file_at(index) else {
            return Ok(Read::End);
        };
        let picture = match self.picture(file) {
            Ok(picture) => picture,
            Err(why) => {
                let path = &self.files[file].path;
                let name = path
                    .strip_prefix(&self.root)
                    .unwrap_or(path)
                    .display()
                    .to_string();
                return Ok(Read::Skipped { name, why });
            }
        };
        picture.fill(into);
        into.meta.captured_ms = captured_ms(self.start_ms, index);
        into.meta.track = file as u64;
        Ok(Read::Frame)
    }

    fn truth(&self, index: u64) -> Option<String> {
        let class = self.files[self.file_at(index)?].class?;
        Some(self.classes[class].clone())
    }

    fn len(&self) -> Option<u64> {
        self.draw.is_none().then_some(self.files.len() as u64)
    }

    fn classes(&self) -> Vec<String> {
        self.classes.clone()
    }
}

/// Collects the picture files under a folder. Links to folders are not followed: they may loop.
pub(super) fn walk(folder: &Path, into: &mut Vec<PathBuf>) -> Result<(), SourceError> {
    let failed = |source| SourceError::Io {
        path: folder.to_owned(),
        source,
    };
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_dir() {
            walk(&path, into)?;
        } else if is_picture(&path) && (kind.is_file() || path.is_file()) {
            into.push(path);
        }
    }
    Ok(())
}

fn is_picture(path: &Path) -> bool {
    path.extension()
        .and_then(|extension| extension.to_str())
        .is_some_and(|extension| {
            EXTENSIONS
                .iter()
                .any(|known| extension.eq_ignore_ascii_case(known))
        })
}

/// The name of the folder that holds the file, unless that is the root itself.
fn class_of(root: &Path, path: &Path) -> Option<String> {
    let parent = path.parent().filter(|parent| *parent != root)?;
    Some(parent.file_name()?.to_string_lossy().into_owned())
}

/// Decodes a file by what it holds, not by what its name says.
pub(super) fn decode(bytes: Vec<u8>) -> Result<Picture, String> {
    if bytes.is_empty() {
        return Err("the file is empty".to_owned());
    }
    let format = image::guess_format(&bytes)
        .map_err(|_| "not a jpeg, png, bmp or ppm picture".to_owned())?;
    // The decoder fills up what is missing with grey, which nobody should learn from.
    if format == ImageFormat::Jpeg && !jpeg_is_whole(&bytes) {
        return Err("the file ends early".to_owned());
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    let mut reader = ImageReader::with_format(Cursor::new(&bytes), format);
    reader.limits(limits);
    let decoded = reader.decode().map_err(|e| e.to_string())?.into_rgb8();
    let (width, height) = decoded.dimensions();
    if width == 0 || height == 0 {
        return Err(format!("a picture of {width} × {height} pixels"));
    }
    let codec = match format {
        ImageFormat::Jpeg => Some(Codec::Jpeg),
        ImageFormat::Png => Some(Codec::Png),
        _ => None,
    };
    let encoded = if codec.is_some() { bytes } else { Vec::new() };
    Ok(Picture {
        width,
        height,
        pixels: decoded.into_raw(),
        codec,
        encoded,
    })
}

/// Whether the picture data of a JPEG file ends in its end marker. Segments in front of the data
/// are passed by their length, since one may hold a preview with an end of its own (ITU-T T.81,
/// annex B).
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    let mut rest = bytes.get(2..).unwrap_or_default();
    while let [0xFF, marker, after @ ..] = rest {
        match (*marker, after) {
            // A fill byte.
            (0xFF, _) => rest = &rest[1..],
            // Start of scan: in the data an 0xFF is followed by 0 or a restart marker.
            (0xDA, _) => return after.windows(2).any(|pair| pair == [0xFF, 0xD9]),
            (_, [high, low, ..]) => {
                let len = usize::from(u16::from_be_bytes([*high, *low]));
                rest = after.get(len..).unwrap_or_default();
            }
            _ => return false,
        }
    }
    false
}
