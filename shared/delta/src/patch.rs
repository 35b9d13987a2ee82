//! Copies from the old part and the bytes between them: finds what only moved.
//!
//! Bytes: length of the packed table `u32` little endian; the table under Deflate, which holds for
//! each copy, all base 128: new bytes before it, its length, and how far its place in the old part is
//! from the end of the copy before (zigzag); the new bytes under Deflate. New bytes after the last copy
//! need no entry.

use std::collections::HashMap;

use super::onnx::varint;
use super::{DeltaError, join, pack, put, split, unpack};

/// Shortest copy; a shorter one costs more than it spares.
const LEAST: usize = 16;
/// The old part is indexed at every so many bytes, so that copies of twice that are always found.
const STEP: usize = 8;
/// Most bytes of a table's entry.
const ENTRY: usize = 30;

pub(crate) fn encode(base: &[u8], target: &[u8]) -> Result<Vec<u8>, DeltaError> {
    let mut places: HashMap<&[u8], usize> = HashMap::new();
    for (at, window) in base.windows(LEAST).enumerate().step_by(STEP) {
        places.entry(window).or_insert(at);
    }
    let (mut table, mut new) = (Vec::new(), Vec::new());
    // End of the last copy in the new part, and in the old one.
    let (mut done, mut last) = (0, 0);
    let mut at = 0;
    while at + LEAST <= target.len() {
        // Most often the old part goes on behind the last copy.
        let ahead = last + (at - done);
        let same = base.get(ahead..ahead + LEAST) == target.get(at..at + LEAST);
        let found = if same {
            Some(ahead)
        } else {
            places.get(&target[at..at + LEAST]).copied()
        };
        let Some(mut from) = found else {
            at += 1;
            continue;
        };
        while at > done && from > 0 && base[from - 1] == target[at - 1] {
            (at, from) = (at - 1, from - 1);
        }
        let equal = base[from..].iter().zip(&target[at..]);
        let len = equal.take_while(|(old, new)| old == new).count();
        new.extend_from_slice(&target[done..at]);
        put(&mut table, at - done);
        put(&mut table, len);
        put(&mut table, zigzag(from as i64 - last as i64));
        (done, last) = (at + len, from + len);
        at = done;
    }
    new.extend_from_slice(&target[done..]);
    Ok(join(&pack(&table)?, &pack(&new)?))
}

pub(crate) fn apply(base: &[u8], delta: &[u8], len: usize) -> Result<Vec<u8>, DeltaError> {
    let (table, new) = split(delta)?;
    // The shortest copy bounds the number of entries.
    let table = unpack(table, (len / LEAST + 1).saturating_mul(ENTRY))?;
    let new = unpack(new, len)?;
    let mut new = new.as_slice();
    let mut out = Vec::new();
    let (mut at, mut last) = (0, 0i64);
    while at < table.len() {
        let mut number = || varint(&table, &mut at).ok_or(DeltaError::Misfit);
        let (fresh, copied, jump) = (number()?, number()?, number()?);
        let (piece, rest) = usize::try_from(fresh)
            .ok()
            .and_then(|fresh| new.split_at_checked(fresh))
            .ok_or(DeltaError::Misfit)?;
        let from = last.checked_add(unzigzag(jump)).ok_or(DeltaError::Misfit)?;
        let end = i64::try_from(copied)
            .ok()
            .and_then(|copied| from.checked_add(copied))
            .ok_or(DeltaError::Misfit)?;
        let copy = usize::try_from(from)
            .ok()
            .zip(usize::try_from(end).ok())
            .and_then(|(from, end)| base.get(from..end))
            .ok_or(DeltaError::Misfit)?;
        if piece.len() + copy.len() > len - out.len() {
            return Err(DeltaError::Length(len));
        }
        out.extend_from_slice(piece);
        out.extend_from_slice(copy);
        (new, last) = (rest, end);
    }
    if new.len() > len - out.len() {
        return Err(DeltaError::Length(len));
    }
    out.extend_from_slice(new);
    Ok(out)
}

fn zigzag(number: i64) -> usize {
    ((number << 1) ^ (number >> 63)) as usize
}

fn unzigzag(coded: u64) -> i64 {
    (coded >> 1).cast_signed() ^ -(coded & 1).cast_signed()
}
