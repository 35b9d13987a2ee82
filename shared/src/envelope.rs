//! The envelope around every message on a byte stream and every record in a log:
//! length, CRC-32 and payload.
//!
//! Layout, little endian: `len: u32`, `crc: u32` (CRC-32/ISCSI of the payload), `payload`.
//! On MQTT, which delimits by itself, the same envelope is used, so that one decoder and one
//! check serve all transports and the spool on disk.

use crc::{CRC_32_ISCSI, Crc};
use serde::Serialize;

// 16 KiB of tables where memory is plenty, none where it is flash.
#[cfg(not(target_os = "none"))]
type Tables = crc::Table<16>;
#[cfg(target_os = "none")]
type Tables = crc::NoTable;

const CRC32: Crc<u32, Tables> = Crc::<u32, Tables>::new(&CRC_32_ISCSI);

/// Bytes in front of the payload.
pub const HEADER: usize = 8;

/// Why bytes are not an envelope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnvelopeError {
    /// More bytes are needed; the number is how many at least are missing.
    Incomplete(usize),
    /// The length field exceeds the limit of the caller.
    TooLong,
    /// The checksum does not match: damaged in transit or torn on disk.
    Checksum,
}

impl core::fmt::Display for EnvelopeError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Incomplete(n) => write!(f, "{n} bytes are missing"),
            Self::TooLong => f.write_str("length exceeds the limit"),
            Self::Checksum => f.write_str("checksum does not match"),
        }
    }
}

impl core::error::Error for EnvelopeError {}

/// The header for `payload`.
pub fn header(payload: &[u8]) -> [u8; HEADER] {
    let mut pieces = Pieces::new();
    pieces.update(payload);
    pieces.header()
}

/// Sums up a payload that is never in memory as a whole.
pub struct Pieces {
    digest: crc::Digest<'static, u32, Tables>,
    len: u32,
}

impl Pieces {
    /// Of nothing yet.
    #[allow(clippy::new_without_default)] // Nothing is generic over it.
    pub fn new() -> Self {
        Self {
            digest: CRC32.digest(),
            len: 0,
        }
    }

    /// Takes the next piece.
    pub fn update(&mut self, piece: &[u8]) {
        self.digest.update(piece);
        self.len += piece.len() as u32;
    }

    /// The header for all of them.
    pub fn header(self) -> [u8; HEADER] {
        let mut out = [0u8; HEADER];
        out[..4].copy_from_slice(&self.len.to_le_bytes());
        out[4..].copy_from_slice(&self.digest.finalize().to_le_bytes());
        out
    }
}

/// Writes `message` with its header to the front of `buffer` and returns both; `None` if they do
/// not fit.
pub fn seal<'b>(message: &impl Serialize, buffer: &'b mut [u8]) -> Option<&'b [u8]> {
    let (head, payload) = buffer.split_first_chunk_mut::<HEADER>()?;
    let len = postcard::to_slice(message, payload).ok()?.len();
    *head = header(&payload[..len]);
    Some(&buffer[..HEADER + len])
}

/// Splits the first envelope off `bytes`: its payload and the rest.
///
/// `limit` bounds the payload's length in bytes, so that a damaged length never makes the caller
/// wait for, or allocate, gigabytes.
pub fn split(bytes: &[u8], limit: usize) -> Result<(&[u8], &[u8]), EnvelopeError> {
    let Some((head, rest)) = bytes.split_first_chunk::<HEADER>() else {
        return Err(EnvelopeError::Incomplete(HEADER - bytes.len()));
    };
    let [l0, l1, l2, l3, c0, c1, c2, c3] = *head;
    let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if len > limit {
        return Err(EnvelopeError::TooLong);
    }
    if rest.len() < len {
        return Err(EnvelopeError::Incomplete(len - rest.len()));
    }
    let (payload, rest) = rest.split_at(len);
    if CRC32.checksum(payload) != u32::from_le_bytes([c0, c1, c2, c3]) {
        return Err(EnvelopeError::Checksum);
    }
    Ok((payload, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    extern crate std;
    use std::vec::Vec;

    proptest! {
        #[test]
        fn round_trip_and_truncation(payload in proptest::collection::vec(any::<u8>(), 0..200), tail in 0usize..20) {
            let mut bytes = Vec::from(header(&payload));
            bytes.extend_from_slice(&payload);
            let whole = bytes.len();
            bytes.resize(whole + tail, 0xAA);
            let (got, rest) = split(&bytes, 1000).unwrap();
            prop_assert_eq!(got, &payload[..]);
            prop_assert_eq!(rest.len(), tail);
            for cut in 0..whole {
                prop_assert!(matches!(split(&bytes[..cut], 1000), Err(EnvelopeError::Incomplete(_))));
            }
        }

        #[test]
        fn a_flipped_bit_is_noticed(payload in proptest::collection::vec(any::<u8>(), 1..100), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = Vec::from(header(&payload));
            bytes.extend_from_slice(&payload);
            let at = HEADER + at.index(payload.len());
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(split(&bytes, 1000), Err(EnvelopeError::Checksum));
        }
    }

    proptest! {
        #[test]
        fn pieces_are_sealed_like_the_whole(payload in proptest::collection::vec(any::<u8>(), 0..200), at in any::<prop::sample::Index>()) {
            let (first, second) = payload.split_at(at.index(payload.len() + 1));
            let mut pieces = Pieces::new();
            pieces.update(first);
            pieces.update(second);
            prop_assert_eq!(pieces.header(), header(&payload));
        }
    }

    #[test]
    fn a_sealed_message_is_header_and_postcard() {
        let mut buffer = [0; 12];
        let sealed = seal(&(300u16, true), &mut buffer).unwrap();
        assert_eq!(split(sealed, 10), Ok((&[0xAC, 0x02, 1][..], &[][..])));
        assert_eq!(seal(&[0u8; 5], &mut buffer), None);
        assert_eq!(seal(&(), &mut [0; 7]), None);
    }

    #[test]
    fn a_huge_length_is_refused_at_once() {
        let bytes = [0xFF; HEADER];
        assert_eq!(split(&bytes, 1 << 20), Err(EnvelopeError::TooLong));
    }
}
