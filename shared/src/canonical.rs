//! Decoding that accepts one spelling only.
//!
//! postcard itself takes trailing bytes and over-long varints, so two different byte strings
//! could carry one meaning under one signature. Here the value is encoded again and compared
//! with what was read, byte by byte and without a buffer.

use postcard::ser_flavors::Flavor;
use serde::{Deserialize, Serialize};

/// Why bytes were not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CanonicalError {
    /// They do not decode, or some are left over.
    Malformed,
    /// They decode, but to a value that is spelled otherwise.
    NotCanonical,
}

struct Compare<'a> {
    expected: &'a [u8],
}

impl Flavor for Compare<'_> {
    type Output = bool;

    fn try_push(&mut self, data: u8) -> postcard::Result<()> {
        self.try_extend(&[data])
    }

    fn try_extend(&mut self, data: &[u8]) -> postcard::Result<()> {
        match self.expected.strip_prefix(data) {
            Some(rest) => {
                self.expected = rest;
                Ok(())
            }
            None => Err(postcard::Error::SerializeBufferFull),
        }
    }

    fn finalize(self) -> postcard::Result<bool> {
        Ok(self.expected.is_empty())
    }
}

/// Decodes `bytes` into a value whose only encoding is exactly `bytes`.
pub(crate) fn decode<'a, T>(bytes: &'a [u8]) -> Result<T, CanonicalError>
where
    T: Deserialize<'a> + Serialize,
{
    let (value, rest) =
        postcard::take_from_bytes::<T>(bytes).map_err(|_| CanonicalError::Malformed)?;
    if !rest.is_empty() {
        return Err(CanonicalError::Malformed);
    }
    match postcard::serialize_with_flavor(&value, Compare { expected: bytes }) {
        Ok(true) => Ok(value),
        _ => Err(CanonicalError::NotCanonical),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_spelling_only() {
        assert_eq!(decode::<u32>(&[0x05]), Ok(5));
        assert_eq!(
            decode::<u32>(&[0x85, 0x00]),
            Err(CanonicalError::NotCanonical)
        );
        assert_eq!(decode::<u32>(&[0x05, 0x00]), Err(CanonicalError::Malformed));
        assert_eq!(decode::<u32>(&[0x85]), Err(CanonicalError::Malformed));
    }
}
