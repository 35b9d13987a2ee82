//! The format of a segment file: envelopes one after the other, each with a sample number, a value
//! and a record, so that a file explains itself when nothing else is left.
//!
//! Payload of an envelope, little endian: `epoch: u32`, `seq: u32`, `value: f32`, then the
//! postcard bytes of a [`flywheel_shared::message::Record`]. A later entry of the same number
//! replaces an earlier one.

use flywheel_shared::MAX_MESSAGE;
use flywheel_shared::envelope::{self, EnvelopeError, HEADER};
use flywheel_shared::ids::SampleKey;

/// Bytes in front of the record in a payload.
const PREFIX: usize = 12;

/// Bytes that an entry needs beyond its record.
pub const OVERHEAD: usize = HEADER + PREFIX;

/// One record in a segment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry<'a> {
    /// Its number.
    pub key: SampleKey,
    /// What eviction goes by, 0 to 1.
    pub value: f32,
    /// postcard bytes of the record.
    pub record: &'a [u8],
}

/// What stands at one place of a segment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Piece<'a> {
    /// A whole entry that starts at `offset`.
    Whole {
        /// First byte of its envelope.
        offset: u64,
        /// The entry.
        entry: Entry<'a>,
    },
    /// Bytes that fail their checksum in the middle of a file: the medium lost them. The number
    /// is read from the damaged bytes and may be wrong.
    Damaged(SampleKey),
    /// The file ends, from `offset` on, in bytes that are no entry: a write was cut short. The
    /// number is there if the write got that far.
    Torn {
        /// First byte that is not part of an entry.
        offset: u64,
        /// The number that was being written.
        key: Option<SampleKey>,
    },
}

/// The file name of segment `number` begun in `epoch`.
pub fn file_name(epoch: u32, number: u32) -> String {
    format!("{epoch:010}-{number:010}.seg")
}

/// Epoch and number of a segment's file name; `None` for other files.
pub fn parse_name(name: &str) -> Option<(u32, u32)> {
    let (epoch, number) = name.strip_suffix(".seg")?.split_once('-')?;
    Some((epoch.parse().ok()?, number.parse().ok()?))
}

/// Appends an entry to `out`.
pub fn encode(entry: &Entry<'_>, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER]);
    out.extend_from_slice(&entry.key.epoch.to_le_bytes());
    out.extend_from_slice(&entry.key.seq.to_le_bytes());
    out.extend_from_slice(&entry.value.to_le_bytes());
    out.extend_from_slice(entry.record);
    let header = envelope::header(&out[start + HEADER..]);
    out[start..start + HEADER].copy_from_slice(&header);
}

/// Reads the entry that `bytes` consist of; `None` if they are damaged.
pub fn decode(bytes: &[u8]) -> Option<Entry<'_>> {
    let (payload, rest) = envelope::split(bytes, MAX_MESSAGE).ok()?;
    if rest.is_empty() {
        parse(payload)
    } else {
        None
    }
}

/// Reads a whole file, as far as it can be read.
pub fn scan(bytes: &[u8]) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let offset = (bytes.len() - rest.len()) as u64;
        match envelope::split(rest, MAX_MESSAGE) {
            Ok((payload, after)) => {
                let Some(entry) = parse(payload) else {
                    // Zeros that a power cut left behind are valid envelopes of no payload.
                    pieces.push(Piece::Torn { offset, key: None });
                    break;
                };
                pieces.push(Piece::Whole { offset, entry });
                rest = after;
            }
            Err(EnvelopeError::Checksum) => {
                let len = u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
                let after = &rest[HEADER + len..];
                let key = peek(rest);
                match key {
                    // The length still leads to the next entry, so only this one is lost.
                    Some(key) if envelope::split(after, MAX_MESSAGE).is_ok() => {
                        pieces.push(Piece::Damaged(key));
                        rest = after;
                    }
                    _ => {
                        pieces.push(Piece::Torn { offset, key });
                        break;
                    }
                }
            }
            Err(EnvelopeError::Incomplete(_) | EnvelopeError::TooLong) => {
                pieces.push(Piece::Torn {
                    offset,
                    key: peek(rest),
                });
                break;
            }
        }
    }
    pieces
}

fn parse(payload: &[u8]) -> Option<Entry<'_>> {
    let (epoch, rest) = payload.split_first_chunk()?;
    let (seq, rest) = rest.split_first_chunk()?;
    let (value, record) = rest.split_first_chunk()?;
    Some(Entry {
        key: SampleKey {
            epoch: u32::from_le_bytes(*epoch),
            seq: u32::from_le_bytes(*seq),
        },
        value: f32::from_le_bytes(*value),
        record,
    })
}

/// The number in an envelope that need not be whole.
fn peek(envelope: &[u8]) -> Option<SampleKey> {
    parse(envelope.get(HEADER..)?).map(|entry| entry.key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(seq: u32, record: &[u8]) -> Entry<'_> {
        Entry {
            key: SampleKey { epoch: 7, seq },
            value: 0.5,
            record,
        }
    }

    fn three() -> (Vec<u8>, Vec<usize>) {
        let mut bytes = Vec::new();
        let mut ends = Vec::new();
        for seq in 1..=3 {
            encode(&entry(seq, &[seq as u8; 20]), &mut bytes);
            ends.push(bytes.len());
        }
        (bytes, ends)
    }

    #[test]
    fn names_round_trip_and_sort_by_number() {
        assert_eq!(parse_name(&file_name(3, 12)), Some((3, 12)));
        assert!(file_name(9, 1) < file_name(10, 0));
        assert_eq!(parse_name("notes.txt"), None);
        assert_eq!(parse_name("x-1.seg"), None);
    }

    #[test]
    fn every_cut_keeps_the_whole_entries_and_shows_the_torn_one() {
        let (bytes, ends) = three();
        for cut in 0..=bytes.len() {
            let pieces = scan(&bytes[..cut]);
            let whole = ends.iter().filter(|end| **end <= cut).count();
            let torn = !(cut == 0 || ends.contains(&cut));
            assert_eq!(pieces.len(), whole + usize::from(torn), "cut at {cut}");
            if torn {
                let start = if whole == 0 { 0 } else { ends[whole - 1] };
                let Some(Piece::Torn { offset, key }) = pieces.last() else {
                    panic!("cut at {cut}: {pieces:?}");
                };
                assert_eq!(*offset, start as u64);
                let readable = cut - start >= OVERHEAD;
                assert_eq!(key.map(|k| k.seq), readable.then_some(whole as u32 + 1));
            }
        }
    }

    #[test]
    fn damage_in_the_middle_costs_one_entry() {
        let (mut bytes, ends) = three();
        bytes[ends[0] + OVERHEAD + 3] ^= 0x10;
        let pieces = scan(&bytes);
        assert_eq!(pieces.len(), 3);
        assert_eq!(pieces[1], Piece::Damaged(SampleKey { epoch: 7, seq: 2 }));
        assert!(matches!(pieces[2], Piece::Whole { entry, .. } if entry.key.seq == 3));
    }

    #[test]
    fn zeros_after_a_power_cut_are_torn() {
        let (mut bytes, ends) = three();
        bytes.resize(bytes.len() + 64, 0);
        let pieces = scan(&bytes);
        assert_eq!(
            pieces.last(),
            Some(&Piece::Torn {
                offset: ends[2] as u64,
                key: None
            })
        );
    }
}
