//! A batch message built in the buffer that the spool filled, so that its records are in RAM once.

use flywheel_shared::envelope::{self, HEADER};
use flywheel_shared::ids::DeviceId;
use flywheel_shared::trust::batch_digest;

/// Bytes in front of the records: the envelope, the variant, and three numbers of up to 5, 3 and
/// 5 bytes.
pub const HEAD_MAX: usize = HEADER + 1 + 5 + 3 + 5;
/// Bytes behind them: a length and the signature.
pub const SIGNATURE_MAX: usize = 65;

/// Why a batch cannot be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchError {
    /// The buffer is shorter than head, records and signature.
    Buffer,
}

/// Turns `len` bytes of `count` records, which stand in `buffer` from [`HEAD_MAX`] on, into an
/// enveloped `Up::Batch`; `sign` signs its digest. Returns the message.
///
/// # Errors
/// [`BatchError::Buffer`].
pub fn batch<'b>(
    buffer: &'b mut [u8],
    device: &DeviceId,
    (epoch, count, len): (u32, u16, usize),
    sign: impl FnOnce(&flywheel_shared::ids::Digest) -> [u8; 64],
) -> Result<&'b [u8], BatchError> {
    let end = HEAD_MAX + len;
    let records = buffer.get(HEAD_MAX..end).ok_or(BatchError::Buffer)?;
    let signature = sign(&batch_digest(device, epoch, count, records));
    // Variant 1 of `Up`, then the fields of `Batch` in their order.
    let mut head = [0; HEAD_MAX];
    let head_len = postcard::to_slice(&(1u8, epoch, count, len), &mut head)
        .map_err(|_| BatchError::Buffer)?
        .len();
    let tail = buffer
        .get_mut(end..end + SIGNATURE_MAX)
        .ok_or(BatchError::Buffer)?;
    tail[0] = signature.len() as u8;
    tail[1..].copy_from_slice(&signature);
    let start = HEAD_MAX - head_len;
    buffer[start..HEAD_MAX].copy_from_slice(&head[..head_len]);
    let message = start - HEADER..end + SIGNATURE_MAX;
    let header = envelope::header(&buffer[start..message.end]);
    buffer[start - HEADER..start].copy_from_slice(&header);
    Ok(&buffer[message])
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use flywheel_shared::ids::Digest;
    use flywheel_shared::message::{Batch, Up};
    use std::vec::Vec;

    #[test]
    fn it_is_what_the_wire_format_says() {
        let device: DeviceId = "cam1".parse().unwrap();
        let sign = |digest: &Digest| {
            let mut signature = [3; 64];
            signature[..32].copy_from_slice(&digest.0);
            signature
        };
        for (epoch, count, len) in [(1, 1, 7), (300, 130, 127), (u32::MAX, u16::MAX, 900)] {
            let records: Vec<u8> = (0..len).map(|at| at as u8).collect();
            let mut buffer = [0; 1000];
            buffer[HEAD_MAX..HEAD_MAX + len].copy_from_slice(&records);
            let message = batch(&mut buffer, &device, (epoch, count, len), sign).unwrap();
            let signature = sign(&batch_digest(&device, epoch, count, &records));
            let up = Up::Batch(Batch {
                epoch,
                count,
                records: &records,
                signature: &signature,
            });
            let mut plain = [0; 1000];
            let plain = postcard::to_slice(&up, &mut plain).unwrap();
            let (payload, rest) = envelope::split(message, 1000).unwrap();
            assert_eq!((payload, rest.len()), (&*plain, 0));
        }
        let mut short = [0; HEAD_MAX + 10];
        assert_eq!(
            batch(&mut short, &device, (1, 1, 7), sign),
            Err(BatchError::Buffer)
        );
    }
}
