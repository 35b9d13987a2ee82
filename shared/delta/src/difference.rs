//! Differences of values: bits as integers, new minus old, zigzag so that small differences of either
//! sign are small numbers, and the bytes of equal weight side by side.
//!
//! Bytes: length of the first piece `u32` little endian; under Deflate the number of runs, for each run
//! width, length, start in the old part and distance from the run before in the new part, all base 128,
//! and then the planes: for each width in the order 1, 2, 4, 8, least significant byte first, the bytes
//! of all runs of that width; and a [`super::patch`] from the bytes of the old part that no run covers
//! to those of the new part.

use super::onnx::varint;
use super::runs::{self, MAX_RUNS, Run};
use super::{DeltaError, join, pack, patch, put, split, unpack};

const WIDTHS: [usize; 4] = [1, 2, 4, 8];
/// Most bytes of a run in the table.
const RUN_BYTES: usize = 31;

pub(crate) fn encode(base: &[u8], target: &[u8]) -> Result<Vec<u8>, DeltaError> {
    let mut runs = runs::find(base, target);
    runs.sort_unstable_by_key(|run| run.target);
    if !runs::fit(&runs, base.len(), target.len()) {
        runs.clear();
    }
    let mut body = Vec::with_capacity(target.len());
    put(&mut body, runs.len());
    let mut end = 0;
    for run in &runs {
        for number in [run.width, run.len, run.base, run.target - end] {
            put(&mut body, number);
        }
        end = run.target + run.len;
    }
    for width in WIDTHS {
        for plane in 0..width {
            for run in runs.iter().filter(|run| run.width == width) {
                let old = base[run.base..run.base + run.len].chunks_exact(width);
                let new = target[run.target..run.target + run.len].chunks_exact(width);
                body.extend(old.zip(new).map(|(old, new)| {
                    let difference = load(new).wrapping_sub(load(old));
                    (zigzag(difference, width) >> (8 * plane)) as u8
                }));
            }
        }
    }
    let values = pack(&body)?;
    let old = uncovered(base, runs.iter().map(|run| (run.base, run.len)).collect());
    let new = uncovered(
        target,
        runs.iter().map(|run| (run.target, run.len)).collect(),
    );
    Ok(join(&values, &patch::encode(&old, &new)?))
}

pub(crate) fn apply(base: &[u8], delta: &[u8], len: usize) -> Result<Vec<u8>, DeltaError> {
    let (values, rest) = split(delta)?;
    let body = unpack(values, len.saturating_add(MAX_RUNS * RUN_BYTES))?;
    let mut at = 0;
    let (runs, covered) = table(&body, &mut at).ok_or(DeltaError::Misfit)?;
    if !runs::fit(&runs, base.len(), len) || body.len() - at != covered {
        return Err(DeltaError::Misfit);
    }
    let old = uncovered(base, runs.iter().map(|run| (run.base, run.len)).collect());
    let rest = patch::apply(&old, rest, len - covered)?;
    if rest.len() != len - covered {
        return Err(DeltaError::Length(len));
    }
    let mut out = vec![0; len];
    let mut planes = body[at..].iter();
    for width in WIDTHS {
        for plane in 0..width {
            for run in runs.iter().filter(|run| run.width == width) {
                let bytes = out[run.target..run.target + run.len].iter_mut();
                for (byte, coded) in bytes.skip(plane).step_by(width).zip(planes.by_ref()) {
                    *byte = *coded;
                }
            }
        }
    }
    for run in &runs {
        let old = base[run.base..run.base + run.len].chunks_exact(run.width);
        let new = out[run.target..run.target + run.len].chunks_exact_mut(run.width);
        for (old, new) in old.zip(new) {
            let value = load(old).wrapping_add(unzigzag(load(new)));
            new.copy_from_slice(&value.to_le_bytes()[..run.width]);
        }
    }
    let mut rest = rest.as_slice();
    let mut end = 0;
    for (start, stop) in runs
        .iter()
        .map(|run| (run.target, run.target + run.len))
        .chain([(len, len)])
    {
        let (piece, left) = rest.split_at(start - end);
        out[end..start].copy_from_slice(piece);
        (rest, end) = (left, stop);
    }
    Ok(out)
}

/// The runs, and how many bytes they cover.
fn table(body: &[u8], at: &mut usize) -> Option<(Vec<Run>, usize)> {
    let mut number = || usize::try_from(varint(body, at)?).ok();
    let count = number()?;
    if count > MAX_RUNS {
        return None;
    }
    let mut end = 0usize;
    let mut runs = Vec::new();
    let mut covered = 0usize;
    for _ in 0..count {
        let (width, len, base) = (number()?, number()?, number()?);
        let target = end.checked_add(number()?)?;
        end = target.checked_add(len)?;
        covered = covered.checked_add(len)?;
        runs.push(Run {
            width,
            base,
            target,
            len,
        });
    }
    Some((runs, covered))
}

/// The bytes outside of these ranges.
fn uncovered(bytes: &[u8], mut ranges: Vec<(usize, usize)>) -> Vec<u8> {
    ranges.sort_unstable();
    let mut out = Vec::new();
    let mut end = 0;
    for (start, len) in ranges {
        out.extend_from_slice(bytes.get(end..start).unwrap_or_default());
        end = end.max(start + len);
    }
    out.extend_from_slice(bytes.get(end..).unwrap_or_default());
    out
}

/// A little-endian number of at most 8 bytes.
fn load(bytes: &[u8]) -> u64 {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(wide)
}

/// 0, −1, 1, −2, … of `width` bytes become 0, 1, 2, 3, …
fn zigzag(difference: u64, width: usize) -> u64 {
    let unused = 64 - 8 * width as u32;
    let signed = (difference << unused).cast_signed() >> unused;
    ((signed << 1) ^ (signed >> 63)).cast_unsigned()
}

fn unzigzag(coded: u64) -> u64 {
    (coded >> 1) ^ (coded & 1).wrapping_neg()
}
