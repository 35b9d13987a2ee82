//! `idx:DIR`: sets in the MNIST format (LeCun's idx, plain or gzipped) as an endless stream.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;

use super::draw::{Draw, Portion, Split, Wish, content_hash};
use super::query::Query;
use super::{Captured, FrameBuf, Read, START_MS, Source, SourceError, captured_ms};

/// Most bytes that an idx file may unpack to: it is held in memory.
const MAX_BYTES: u64 = 1 << 31;

/// A stream over one idx set.
pub(super) struct IdxSource {
    id: String,
    rows: u32,
    columns: u32,
    /// The pictures of this reader's portion, one after the other.
    pixels: Vec<u8>,
    /// For each of them, its number in the file.
    numbers: Vec<u64>,
    classes: Vec<String>,
    draw: Draw,
    start_ms: u64,
}

impl IdxSource {
    pub(super) fn open(uri: &str, folder: &Path, mut query: Query) -> Result<Self, SourceError> {
        let split = query.choice("split", [("train", Split::Train), ("test", Split::Test)])?;
        let portion = Portion::take(&mut query)?;
        let wish = Wish::take(&mut query)?;
        let start_ms = query.value("start_ms", START_MS, "Unix milliseconds")?;
        let prefix = if split == Split::Test {
            "t10k"
        } else {
            "train"
        };
        let (images_path, images) = load(folder, prefix, "images", 3)?;
        let (labels_path, labels) = load(folder, prefix, "labels", 1)?;
        let [count, rows, columns] = images.dims[..] else {
            return Err(malformed(&images_path, "not three dimensions".to_owned()));
        };
        if labels.data.len() != count as usize {
            let what = format!(
                "{} labels for the {count} pictures of {}",
                labels.data.len(),
                images_path.display()
            );
            return Err(malformed(&labels_path, what));
        }
        let size = rows as usize * columns as usize;
        if size == 0 {
            return Err(malformed(
                &images_path,
                format!("pictures of {rows} × {columns} pixels"),
            ));
        }

        let top = labels
            .data
            .iter()
            .max()
            .map_or(0, |&label| usize::from(label));
        let classes: Vec<String> = (0..=top).map(|label| label.to_string()).collect();
        let mut pools = vec![Vec::new(); classes.len()];
        let (mut pixels, mut numbers) = (Vec::new(), Vec::new());
        for (number, (picture, &label)) in
            images.data.chunks_exact(size).zip(&labels.data).enumerate()
        {
            if portion.is_all() || portion.holds(content_hash(picture)) {
                pools[usize::from(label)].push(numbers.len());
                numbers.push(number as u64);
                pixels.extend_from_slice(picture);
            }
        }
        let draw = wish.fit(&query, &classes, pools)?;
        query.finish()?;
        Ok(Self {
            id: uri.to_owned(),
            rows,
            columns,
            pixels,
            numbers,
            classes,
            draw,
            start_ms,
        })
    }
}

impl Source for IdxSource {
    fn id(&self) -> &str {
        &self.id
    }

    fn read(&mut self, index: u64, into: &mut FrameBuf) -> Result<Read, SourceError> {
        let (_, item) = self.draw.at(index);
        let size = self.rows as usize * self.columns as usize;
        into.pixels.clear();
        into.pixels
            .extend_from_slice(&self.pixels[item * size..(item + 1) * size]);
        into.encoded.clear();
        into.meta = Captured {
            width: self.columns,
            height: self.rows,
            channels: 1,
            // Below MAX_BYTES.
            seen_bytes: size as u32,
            encoded: None,
            captured_ms: captured_ms(self.start_ms, index),
            track: self.numbers[item],
        };
        Ok(Read::Frame)
    }

    fn truth(&self, index: u64) -> Option<String> {
        Some(self.classes[self.draw.at(index).0].clone())
    }

    fn len(&self) -> Option<u64> {
        None
    }

    fn classes(&self) -> Vec<String> {
        self.classes.clone()
    }
}

struct Idx {
    dims: Vec<u32>,
    data: Vec<u8>,
}

/// Finds and reads `PREFIX-KIND-idxN-ubyte`, also with a dot before `idx` and with `.gz`.
fn load(
    folder: &Path,
    prefix: &str,
    kind: &str,
    rank: usize,
) -> Result<(PathBuf, Idx), SourceError> {
    let names: Vec<String> = ["-", "."]
        .iter()
        .flat_map(|dot| ["", ".gz"].map(|gz| format!("{prefix}-{kind}{dot}idx{rank}-ubyte{gz}")))
        .collect();
    let found = names
        .iter()
        .map(|name| folder.join(name))
        .find(|path| path.is_file());
    let Some(path) = found else {
        return Err(SourceError::Missing {
            folder: folder.to_owned(),
            names,
        });
    };
    let bytes = read(&path).map_err(|source| SourceError::Io {
        path: path.clone(),
        source,
    })?;
    let idx = parse(&bytes, rank).map_err(|what| malformed(&path, what))?;
    Ok((path, idx))
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut bytes = Vec::new();
    if path.extension().is_some_and(|e| e == "gz") {
        GzDecoder::new(file)
            .take(MAX_BYTES)
            .read_to_end(&mut bytes)?;
    } else {
        file.take(MAX_BYTES).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

fn malformed(path: &Path, what: String) -> SourceError {
    SourceError::Malformed {
        path: path.to_owned(),
        what,
    }
}

/// Parses an idx file of bytes: two zeros, type 8, the rank, the dimensions (big-endian), the data.
fn parse(bytes: &[u8], rank: usize) -> Result<Idx, String> {
    let header = 4 + 4 * rank;
    let Some((head, data)) = bytes.split_at_checked(header) else {
        return Err(format!(
            "{} bytes are too short for an idx header of {header}",
            bytes.len()
        ));
    };
    if head[..3] != [0, 0, 8] || usize::from(head[3]) != rank {
        return Err(format!(
            "starts with {:02x?}, an idx file of bytes in {rank} dimensions with {:02x?}",
            &head[..4],
            [0, 0, 8, rank as u8]
        ));
    }
    let dims: Vec<u32> = head[4..]
        .chunks_exact(4)
        .map(|d| d.iter().fold(0, |n, &byte| (n << 8) | u32::from(byte)))
        .collect();
    let needed = dims
        .iter()
        .try_fold(1_u64, |n, &d| n.checked_mul(u64::from(d)));
    if needed != Some(data.len() as u64) {
        return Err(format!(
            "dimensions {dims:?} don't fit its {} bytes of data: cut short or damaged",
            data.len()
        ));
    }
    Ok(Idx {
        dims,
        data: data.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_names_what_is_wrong() {
        let check = |bytes: &[u8], rank: usize, expected: &str| {
            let what = parse(bytes, rank).map(|_| ()).expect_err("refused");
            assert!(what.contains(expected), "{what}");
        };
        check(&[0, 0, 8], 1, "too short");
        check(&[0, 0, 9, 1, 0, 0, 0, 0], 1, "starts with");
        check(&[0, 0, 8, 1, 0, 0, 0, 3, 1, 2], 1, "cut short");
        check(&[0, 0, 8, 1, 0, 0, 0, 1, 1, 2], 1, "damaged");
        check(
            &[0, 0, 8, 2, 255, 255, 255, 255, 255, 255, 255, 255, 1],
            2,
            "don't fit",
        );
    }
}
