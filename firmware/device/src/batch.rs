//! What stands around the records of a batch on the wire. The records themselves go from the flash
//! to the link piece by piece, so no buffer of a message's length is needed.

use heapless::Vec;

/// Most bytes in front of the records: the variant, and three numbers of up to 5, 3 and 5 bytes.
pub const HEAD_MAX: usize = 1 + 5 + 3 + 5;
/// Bytes behind them: a length and the signature.
pub const TAIL: usize = 1 + 64;

/// What stands in front of `len` bytes of `count` records in an
/// [`Up::Batch`](flywheel_shared::message::Up::Batch).
pub fn head(epoch: u32, count: u16, len: u32) -> Vec<u8, HEAD_MAX> {
    let mut head = [0; HEAD_MAX];
    // Variant 1 of `Up`, then the fields of `Batch` in their order; they fit, as the constant says.
    let len = postcard::to_slice(&(1u8, epoch, count, len), &mut head).map_or(0, |head| head.len());
    let mut head = Vec::from_array(head);
    head.truncate(len);
    head
}

/// What stands behind them.
pub fn tail(signature: &[u8; 64]) -> [u8; TAIL] {
    let mut tail = [signature.len() as u8; TAIL];
    tail[1..].copy_from_slice(signature);
    tail
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use flywheel_shared::message::{Batch, Up};
    use std::vec::Vec;

    #[test]
    fn it_is_what_the_wire_format_says() {
        let signature = core::array::from_fn(|at| at as u8);
        for (epoch, count, len) in [(1, 1, 7), (300, 130, 127), (u32::MAX, u16::MAX, 900)] {
            let records: Vec<u8> = (0..len).map(|at| at as u8).collect();
            let parts = [&*head(epoch, count, len), &records, &tail(&signature)].concat();
            let up = Up::Batch(Batch {
                epoch,
                count,
                records: &records,
                signature: &signature,
            });
            let mut plain = [0; 1000];
            assert_eq!(parts, *postcard::to_slice(&up, &mut plain).unwrap());
        }
    }
}
