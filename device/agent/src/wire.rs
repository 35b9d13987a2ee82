//! Encoding of messages: postcard in an envelope, into growing buffers.

use flywheel_shared::envelope::{self, HEADER};
use postcard::ser_flavors::{Flavor, Size};
use serde::Serialize;

struct Grow<'a>(&'a mut Vec<u8>);

impl Flavor for Grow<'_> {
    type Output = ();

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

/// Appends the postcard bytes of `value` to `out`.
pub fn append<T: Serialize>(value: &T, out: &mut Vec<u8>) {
    // postcard fails for values that need lengths it cannot know (iterators) or a full buffer.
    // Wire types have neither, and a `Vec` grows; the assertion is for tests.
    let done = postcard::serialize_with_flavor(value, Grow(out));
    debug_assert!(done.is_ok());
}

/// The postcard bytes of `value`.
pub fn bytes<T: Serialize>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    append(value, &mut out);
    out
}

/// Length in bytes of `value` in postcard, without encoding it.
pub fn len<T: Serialize>(value: &T) -> usize {
    postcard::serialize_with_flavor(value, Size::default()).unwrap_or(usize::MAX)
}

/// A message ([`Up`](flywheel_shared::message::Up), or one and its tail) in its envelope, as every
/// transport carries it.
pub fn envelope(message: &impl Serialize) -> Vec<u8> {
    let mut out = vec![0; HEADER];
    append(message, &mut out);
    let header = envelope::header(&out[HEADER..]);
    out[..HEADER].copy_from_slice(&header);
    out
}

#[cfg(test)]
mod tests {
    use flywheel_shared::MAX_MESSAGE;
    use flywheel_shared::ids::Digest;
    use flywheel_shared::message::{Fetch, Up};

    use super::*;

    #[test]
    fn an_envelope_holds_the_message() {
        let message = Up::Fetch(Fetch {
            digest: Digest::of(b"x"),
            offset: 7,
            len: 300,
        });
        let bytes = envelope(&message);
        let (payload, rest) = envelope::split(&bytes, MAX_MESSAGE).unwrap();
        assert!(rest.is_empty());
        assert_eq!(payload.len(), len(&message));
        assert_eq!(postcard::from_bytes::<Up<'_>>(payload).unwrap(), message);
    }
}
