//! `sim:roads`: the scene simulator as a camera.

use flywheel_models::sim::{CLASSES, Conditions, Mix, Roads, RoadsConfig, RoadsError};

use super::query::Query;
use super::{Captured, FrameBuf, Read, START_MS, Source, SourceError, captured_ms};

/// A simulated drive.
pub(super) struct RoadsSource {
    id: String,
    roads: Roads,
    start_ms: u64,
}

impl RoadsSource {
    pub(super) fn open(uri: &str, mut query: Query) -> Result<Self, SourceError> {
        let default = RoadsConfig::default();
        let config = RoadsConfig {
            seed: query.value("seed", default.seed, "a whole number")?,
            size: query.value("size", default.size, "pixels, 16 to 256")?,
            rare_share: query.value("rare", default.rare_share, "a share such as 0.008")?,
            late_share: query.value("late", default.late_share, "a share such as 0.015")?,
            late_from: query.value("late_from", default.late_from, "a frame number")?,
            conditions: query.choice(
                "conditions",
                [
                    ("all", Conditions::All),
                    ("clear-day", Conditions::ClearDay),
                ],
            )?,
            mix: query.choice(
                "mix",
                [("stream", Mix::Stream), ("balanced", Mix::Balanced)],
            )?,
        };
        let start_ms = query.value("start_ms", START_MS, "Unix milliseconds")?;
        query.finish()?;
        let roads = Roads::new(config).map_err(|source| refused(uri, source))?;
        Ok(Self {
            id: uri.to_owned(),
            roads,
            start_ms,
        })
    }
}

fn refused(uri: &str, source: RoadsError) -> SourceError {
    SourceError::Roads {
        uri: uri.to_owned(),
        source,
    }
}

impl Source for RoadsSource {
    fn id(&self) -> &str {
        &self.id
    }

    fn read(&mut self, index: u64, into: &mut FrameBuf) -> Result<Read, SourceError> {
        let size = self.roads.config().size;
        let len = self.roads.frame_len();
        into.pixels.resize(len, 0);
        into.encoded.clear();
        let scene = self
            .roads
            .render(index, &mut into.pixels)
            .map_err(|source| refused(&self.id, source))?;
        into.meta = Captured {
            width: size,
            height: size,
            channels: 3,
            // At most 256 × 256 × 3.
            seen_bytes: len as u32,
            encoded: None,
            captured_ms: captured_ms(self.start_ms, index),
            track: scene.encounter,
        };
        Ok(Read::Frame)
    }

    fn truth(&self, index: u64) -> Option<String> {
        Some(self.roads.scene(index).name().to_owned())
    }

    fn len(&self) -> Option<u64> {
        None
    }

    fn classes(&self) -> Vec<String> {
        CLASSES.map(str::to_owned).to_vec()
    }
}
