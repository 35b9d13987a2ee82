//! A sample as the cloud keeps it: everything of the wire's `Sample` but the picture, which is
//! found by digest. The conversion from the wire stands here and nowhere else.

use std::fmt;
use std::str::FromStr;

use flywheel_shared::ids::{DeviceId, Digest};
use flywheel_shared::message::{Codec, Lane, Sample, Scores};
use serde::{Deserialize, Serialize};

/// Names one flagged sample in the whole fleet; written `device-epoch-seq`, as in `cam1-3-17`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SampleId {
    /// The device that flagged it.
    pub device: DeviceId,
    /// Its boot epoch.
    pub epoch: u32,
    /// Its number in that epoch, from 1.
    pub seq: u32,
}

impl fmt::Display for SampleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.device, self.epoch, self.seq)
    }
}

/// A text that is not a sample id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a sample id; they look like cam1-3-17 (device, epoch, number)")]
pub struct SampleIdError(String);

impl FromStr for SampleId {
    type Err = SampleIdError;

    fn from_str(text: &str) -> Result<Self, SampleIdError> {
        let parse = || {
            let mut parts = text.split('-');
            let id = Self {
                device: parts.next()?.parse().ok()?,
                epoch: parts.next()?.parse().ok()?,
                seq: parts.next()?.parse().ok()?,
            };
            parts.next().is_none().then_some(id)
        };
        parse().ok_or_else(|| SampleIdError(text.chars().take(80).collect()))
    }
}

impl Serialize for SampleId {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SampleId {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// What the cloud knows about one ingested sample.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleMeta {
    /// The device that flagged it.
    pub device: DeviceId,
    /// Its boot epoch.
    pub epoch: u32,
    /// Its number in that epoch, from 1.
    pub seq: u32,
    /// Index of the frame in the device's source.
    pub frame: u64,
    /// Capture time by the device's clock, Unix milliseconds.
    pub captured_ms: u64,
    /// The encounter that the device's tracker put the frame in.
    pub track: u64,
    /// When the cloud took it, Unix milliseconds.
    pub received_ms: u64,
    /// First 8 bytes of the digest of the manifest whose model scored it; zero for none.
    pub model: [u8; 8],
    /// Why it was kept.
    pub lane: Lane,
    /// Probability of having been kept by the uniform lane; 0 in other lanes.
    pub inclusion: f32,
    /// What the model said.
    pub scores: Scores,
    /// Scale of `embedding`: value = `scale × i8`.
    pub embedding_scale: f32,
    /// The quantised embedding.
    pub embedding: Vec<i8>,
    /// Columns in pixels.
    pub width: u16,
    /// Rows in pixels.
    pub height: u16,
    /// How the picture is encoded.
    pub codec: Codec,
    /// Digest of the picture.
    pub blob: Digest,
}

impl SampleMeta {
    /// Its name.
    pub fn id(&self) -> SampleId {
        SampleId {
            device: self.device.clone(),
            epoch: self.epoch,
            seq: self.seq,
        }
    }

    /// The embedding in its own units.
    pub fn vector(&self) -> Vec<f32> {
        let scale = self.embedding_scale;
        self.embedding
            .iter()
            .map(|v| f32::from(*v) * scale)
            .collect()
    }

    /// From the wire. Values that are not finite, which only a faulty device sends, become 0, so
    /// that one of them does not spoil every ranking it takes part in.
    pub(super) fn from_wire(
        device: &DeviceId,
        epoch: u32,
        received_ms: u64,
        sample: &Sample<'_>,
    ) -> Self {
        let finite = |value: f32| if value.is_finite() { value } else { 0.0 };
        let scores = sample.scores;
        Self {
            device: device.clone(),
            epoch,
            seq: sample.seq,
            frame: sample.frame,
            captured_ms: sample.captured_ms,
            track: sample.track,
            received_ms,
            model: sample.model,
            lane: sample.lane,
            inclusion: finite(sample.inclusion),
            scores: Scores {
                confidence: finite(scores.confidence),
                margin: finite(scores.margin),
                entropy: finite(scores.entropy),
                energy: finite(scores.energy),
                novelty: finite(scores.novelty),
                u_unsure: finite(scores.u_unsure),
                u_novel: finite(scores.u_novel),
                rarity: finite(scores.rarity),
                ..scores
            },
            embedding_scale: finite(sample.embedding_scale),
            embedding: sample.embedding.iter().map(|b| b.cast_signed()).collect(),
            width: sample.width,
            height: sample.height,
            codec: sample.codec,
            blob: Digest::of(sample.payload),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_bad_ones_are_refused() {
        let id: SampleId = "cam1-3-17".parse().unwrap();
        assert_eq!((id.epoch, id.seq), (3, 17));
        assert_eq!(id.to_string(), "cam1-3-17");
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(serde_json::from_str::<SampleId>(&json).unwrap(), id);
        for bad in [
            "",
            "cam1",
            "cam1-3",
            "cam1-3-17-1",
            "Cam-3-17",
            "cam1--17",
            "cam1-3-x",
        ] {
            assert!(bad.parse::<SampleId>().is_err(), "{bad}");
        }
    }
}
