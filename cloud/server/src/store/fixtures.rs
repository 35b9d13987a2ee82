//! Batches as devices make them, for tests.

use ed25519_dalek::SigningKey;
use flywheel_shared::ids::DeviceId;
use flywheel_shared::message::{Batch, Codec, Lane, Loss, LossReason, Record, Sample, Scores};
use flywheel_shared::trust::{self, Role};

/// A sample whose picture is `picture`.
pub(crate) fn sample(seq: u32, picture: &[u8]) -> Record<'_> {
    Record::Sample(Sample {
        seq,
        frame: u64::from(seq) * 10,
        captured_ms: 1_000 + u64::from(seq),
        track: u64::from(seq),
        model: [7; 8],
        lane: Lane::Unsure,
        inclusion: 0.0,
        scores: Scores {
            top1: 3,
            confidence: 0.75,
            ..Scores::default()
        },
        embedding_scale: 0.5,
        embedding: &[2, 254],
        width: 2,
        height: 1,
        codec: Codec::Gray8,
        payload: picture,
    })
}

/// A lost sample.
pub(crate) fn loss(seq: u32) -> Record<'static> {
    Record::Loss(Loss {
        seq,
        reason: LossReason::Evicted,
    })
}

/// Records one after the other.
pub(crate) fn join(records: &[Record<'_>]) -> Vec<u8> {
    records.iter().fold(Vec::new(), |bytes, record| {
        postcard::to_extend(record, bytes).unwrap()
    })
}

/// A batch with a signature of nobody's, postcard.
pub(crate) fn unsigned(epoch: u32, records: &[Record<'_>]) -> Vec<u8> {
    let joined = join(records);
    let batch = Batch {
        epoch,
        count: records.len() as u16,
        records: &joined,
        signature: &[0; 64],
    };
    postcard::to_extend(&batch, Vec::new()).unwrap()
}

/// Calls `use_it` with a signed batch.
pub(crate) fn signed<R>(
    device: &DeviceId,
    key: &SigningKey,
    epoch: u32,
    records: &[Record<'_>],
    use_it: impl FnOnce(Batch<'_>) -> R,
) -> R {
    let joined = join(records);
    let count = records.len() as u16;
    let digest = trust::batch_digest(device, epoch, count, &joined);
    use_it(Batch {
        epoch,
        count,
        records: &joined,
        signature: &trust::sign_digest(Role::Device, key, &digest),
    })
}
