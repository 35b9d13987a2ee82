//! What the cloud is told about the device: health messages and slot reports, at intervals and
//! whenever something changed.

use std::time::{Duration, Instant};

use device_core::slot::Report;
use device_engine::EngineKind;
use flywheel_shared::WIRE_VERSION;
use flywheel_shared::ids::Digest;
use flywheel_shared::message::{Health, HealthTail, SlotReport, Up};

use crate::config::Config;
use crate::shared::{Shared, lock};
use crate::spool::SpoolError;
use crate::wire;

/// How long a slot report waits for its acknowledgement before it is sent again.
const REPEAT: Duration = Duration::from_secs(2);

/// What makes a health message worth sending before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Summary {
    idle: bool,
    live: Option<Digest>,
    candidate: Option<Digest>,
}

/// Composes messages and remembers what was told.
pub struct Reporter {
    hardware: String,
    source: String,
    engine: &'static str,
    epoch: u32,
    interval: Duration,
    next_health: Instant,
    last_at_ms: u64,
    /// What the cloud understands.
    cloud: u16,
    told: Option<Summary>,
    reported: Option<(Report, Instant)>,
}

impl Reporter {
    /// A reporter that has told nothing yet.
    pub fn new(config: &Config, epoch: u32, now: Instant) -> Self {
        Self {
            hardware: config.hardware.clone(),
            source: config.source.clone(),
            engine: config.engine.name(),
            epoch,
            interval: Duration::from_millis(config.health_interval_ms),
            next_health: now,
            last_at_ms: 0,
            cloud: WIRE_VERSION,
            told: None,
            reported: None,
        }
    }

    /// The cloud has welcomed the device and said what it understands. What was told on the last
    /// connection may not have arrived.
    pub fn welcomed(&mut self, wire_version: u16) {
        self.cloud = wire_version;
        self.told = None;
        self.reported = None;
    }

    /// When something is due next. Reports are repeated only while there is a connection.
    pub(super) fn due(&self, online: bool) -> Instant {
        match self.reported {
            Some((_, at)) if online => self.next_health.min(at + REPEAT),
            _ => self.next_health,
        }
    }

    /// Whether a health message is due; the next one is after the interval.
    pub(super) fn health_due(&mut self, now: Instant) -> bool {
        let due = now >= self.next_health;
        if due {
            self.next_health = now + self.interval;
        }
        due
    }

    /// Whether the device has nothing left to do until the cloud says so: no frame may be taken,
    /// no trial is under way, and everything flagged is acknowledged.
    pub(super) fn idle(&self, shared: &Shared) -> bool {
        // In this order: a frame flagged before `held` was seen is in the spool that is looked
        // at after it.
        shared.status().held
            && !lock(&shared.models).trial_pending()
            && lock(&shared.spool).is_empty()
    }

    /// Whether something changed since the last health message that the cloud waits for.
    pub(super) fn has_news(&self, shared: &Shared) -> bool {
        self.told != Some(self.summary(shared))
    }

    fn summary(&self, shared: &Shared) -> Summary {
        let idle = self.idle(shared);
        let candidate = lock(&shared.models).record().candidate;
        Summary {
            idle,
            live: shared.status().live.map(|live| live.digest),
            candidate: candidate.map(|candidate| candidate.model.digest),
        }
    }

    /// A health message. Its time is later than that of the one before, whatever the clock does.
    pub fn health(&mut self, shared: &Shared, now_ms: u64) -> Result<Vec<u8>, SpoolError> {
        let at_ms = now_ms.max(self.last_at_ms + 1);
        let summary = self.summary(shared);
        let status = shared.status();
        let sequence = lock(&shared.models).floor();
        let books = lock(&shared.spool).books(at_ms)?;
        self.last_at_ms = at_ms;
        self.told = Some(summary);
        let health = Up::Health(Health {
            at_ms,
            agent: env!("CARGO_PKG_VERSION"),
            hardware: &self.hardware,
            source: &self.source,
            engine: status.engine.map_or(self.engine, EngineKind::name),
            epoch: self.epoch,
            frame: status.progress.frame,
            bytes_seen: status.progress.bytes_seen,
            bytes_up: shared.bytes_up(),
            skipped: status.progress.skipped,
            idle: summary.idle,
            live: summary.live,
            sequence,
            candidate: summary.candidate,
            books,
        });
        let tail = HealthTail {
            dropped: status.progress.dropped,
        };
        Ok(match self.cloud {
            0..=1 => wire::envelope(&health),
            _ => wire::envelope(&(health, tail)),
        })
    }

    /// The slot report that is due, if one is.
    pub(super) fn report(&mut self, shared: &Shared, now: Instant) -> Option<Vec<u8>> {
        let Some(report) = lock(&shared.models).report() else {
            self.reported = None;
            return None;
        };
        let same = |told: &Report| (told.model, told.state) == (report.model, report.state);
        if let Some((told, at)) = &self.reported
            && same(told)
            && now < *at + REPEAT
        {
            return None;
        }
        self.reported = Some((report, now));
        let detail = report.reason().to_string();
        Some(wire::envelope(&Up::Slot(SlotReport {
            manifest: report.model.digest,
            sequence: report.model.sequence,
            state: report.state,
            code: report.code,
            detail: &detail,
            trial_frames: report.trial_frames,
            max_latency_us: report.max_latency_us,
        })))
    }
}
