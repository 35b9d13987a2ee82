//! Names that cross the wire: devices, content digests and sample numbers.

use core::fmt;
use core::str::FromStr;

use heapless::String;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Longest device id in bytes.
pub const DEVICE_ID_MAX: usize = 24;

/// A device's name: 1 to 24 lower-case ASCII letters and digits.
///
/// The alphabet is that narrow because the id is also an MQTT topic level, the organisation of
/// the device's certificate (which brokers read as the tenant) and a folder name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct DeviceId(String<DEVICE_ID_MAX>);

impl DeviceId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

/// Why a text is not an identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdError {
    /// A device id must have 1 to 24 characters.
    Length,
    /// A device id consists of lower-case ASCII letters and digits only.
    Alphabet,
    /// A digest is 64 hexadecimal digits.
    Hex,
}

impl fmt::Display for IdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Length => "a device id has 1 to 24 characters",
            Self::Alphabet => "a device id consists of lower-case letters a-z and digits only",
            Self::Hex => "a digest is 64 hexadecimal digits",
        })
    }
}

impl core::error::Error for IdError {}

impl FromStr for DeviceId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        if text.is_empty() {
            return Err(IdError::Length);
        }
        if !text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        {
            return Err(IdError::Alphabet);
        }
        String::try_from(text)
            .map(Self)
            .map_err(|_| IdError::Length)
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

// Decoding validates, so that no message can smuggle in an id that is also a path or a topic.
impl<'de> Deserialize<'de> for DeviceId {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::<DEVICE_ID_MAX>::deserialize(from)?;
        text.parse()
            .map_err(|_| serde::de::Error::custom("device id"))
    }
}

/// SHA-256 of some bytes; the name of everything that is stored by content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Digest(#[serde(with = "byte_array")] pub [u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digest of several pieces, as if they stood one after the other.
    pub fn of_parts(parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update(part);
        }
        Self(hash.finalize().into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let text = text.as_bytes();
        if text.len() != 64 {
            return Err(IdError::Hex);
        }
        let nibble = |b: u8| (b as char).to_digit(16).ok_or(IdError::Hex);
        let mut out = [0u8; 32];
        for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
            *byte = ((nibble(pair[0])? << 4) | nibble(pair[1])?) as u8;
        }
        Ok(Self(out))
    }
}

/// A fixed number of bytes, read and written as serde does it, but in a loop: serde's own code for
/// `[u8; 32]` is unrolled, 1 KB of flash on a microcontroller.
pub(crate) mod byte_array {
    use core::fmt;

    use serde::de::{Error, SeqAccess, Visitor};
    use serde::ser::SerializeTuple as _;
    use serde::{Deserializer, Serializer};

    pub fn serialize<S: Serializer, const N: usize>(
        bytes: &[u8; N],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        let mut tuple = to.serialize_tuple(N)?;
        for byte in bytes {
            tuple.serialize_element(byte)?;
        }
        tuple.end()
    }

    pub fn deserialize<'de, D: Deserializer<'de>, const N: usize>(
        from: D,
    ) -> Result<[u8; N], D::Error> {
        from.deserialize_tuple(N, Bytes)
    }

    struct Bytes<const N: usize>;

    impl<'de, const N: usize> Visitor<'de> for Bytes<N> {
        type Value = [u8; N];

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{N} bytes")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut bytes: A) -> Result<[u8; N], A::Error> {
            let mut out = [0; N];
            for (index, place) in out.iter_mut().enumerate() {
                *place = bytes
                    .next_element()?
                    .ok_or_else(|| A::Error::invalid_length(index, &self))?;
            }
            Ok(out)
        }
    }
}

/// A list of what [`byte_array`] reads and writes.
pub(crate) mod byte_arrays {
    use heapless::Vec;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Bytes<const N: usize>(#[serde(with = "super::byte_array")] [u8; N]);

    pub fn serialize<S: Serializer, const N: usize, const M: usize>(
        list: &Vec<[u8; N], M>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_seq(list.iter().map(|bytes| Bytes(*bytes)))
    }

    pub fn deserialize<'de, D: Deserializer<'de>, const N: usize, const M: usize>(
        from: D,
    ) -> Result<Vec<[u8; N], M>, D::Error> {
        let list = Vec::<Bytes<N>, M>::deserialize(from)?;
        Ok(list.into_iter().map(|bytes| bytes.0).collect())
    }
}

/// The number of a flagged sample on its device. Numbers start at 1 in each boot epoch and are
/// gapless, which is what lets the cloud prove that none is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SampleKey {
    /// Which start of the agent flagged it; rises by one at every start.
    pub epoch: u32,
    /// Position within the epoch, from 1.
    pub seq: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_ids_are_narrow() {
        assert!("cam7".parse::<DeviceId>().is_ok());
        for (bad, why) in [
            ("", IdError::Length),
            ("a/b", IdError::Alphabet),
            ("Cam", IdError::Alphabet),
            ("..", IdError::Alphabet),
            ("aaaaaaaaaaaaaaaaaaaaaaaaa", IdError::Length),
        ] {
            assert_eq!(bad.parse::<DeviceId>(), Err(why), "{bad}");
        }
    }

    #[test]
    fn decoding_a_device_id_validates_it() {
        let mut buffer = [0u8; 16];
        let bytes = postcard::to_slice("../etc", &mut buffer).unwrap();
        assert!(postcard::from_bytes::<DeviceId>(bytes).is_err());
    }

    #[test]
    fn a_digest_is_its_bytes_on_the_wire() {
        let digest = Digest::of(b"abc");
        let mut buffer = [0u8; 40];
        assert_eq!(*postcard::to_slice(&digest, &mut buffer).unwrap(), digest.0);
        assert_eq!(postcard::from_bytes(&digest.0), Ok(digest));
        assert!(postcard::from_bytes::<Digest>(&digest.0[1..]).is_err());
        // As serde itself does it.
        assert_eq!(postcard::from_bytes(&digest.0), Ok(digest.0));
    }

    #[test]
    fn digest_text_round_trip() {
        let digest = Digest::of(b"abc");
        let mut text = String::<64>::new();
        core::fmt::write(&mut text, format_args!("{digest}")).unwrap();
        assert!(text.starts_with("ba7816bf8f01cfea"));
        assert_eq!(text.parse::<Digest>(), Ok(digest));
        assert_eq!(Digest::of_parts(&[b"a", b"bc"]), digest);
        assert_eq!("zz".parse::<Digest>(), Err(IdError::Hex));
    }
}
