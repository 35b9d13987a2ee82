//! What an uplink is told once: its transports, times and limits.

/// Most batches in flight, whatever the configuration says.
pub const MAX_WINDOW: usize = 8;

/// How bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A QUIC connection to the cloud.
    Quic,
    /// An MQTT broker that the cloud reads from.
    Mqtt,
}

impl Transport {
    /// The name used in reports and configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Mqtt => "mqtt",
        }
    }
}

/// How an [`Uplink`](super::Uplink) behaves. Times are in milliseconds; those under 1 count as 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UplinkConfig {
    /// The preferred transport.
    pub first: Transport,
    /// What to fall back to, if anything.
    pub second: Option<Transport>,
    /// Ceiling of the first back-off.
    pub base_ms: u64,
    /// Ceiling of every back-off.
    pub cap_ms: u64,
    /// Failures in a row on one transport before the other is tried.
    pub failures_to_switch: u32,
    /// Time on the second transport before the first is probed again.
    pub probe_ms: u64,
    /// Batches in flight, 1 to [`MAX_WINDOW`].
    pub window: usize,
    /// How long the oldest batch in flight may stay unacknowledged.
    pub ack_timeout_ms: u64,
    /// How long connecting and being welcomed may take.
    pub connect_timeout_ms: u64,
    /// How long a batch waits to fill.
    pub linger_ms: u64,
    /// Records in a batch.
    pub batch_records: u32,
    /// Bytes in a batch.
    pub batch_bytes: u32,
}

impl Default for UplinkConfig {
    fn default() -> Self {
        Self {
            first: Transport::Quic,
            second: Some(Transport::Mqtt),
            base_ms: 200,
            cap_ms: 30_000,
            failures_to_switch: 3,
            probe_ms: 60_000,
            window: 4,
            ack_timeout_ms: 10_000,
            connect_timeout_ms: 10_000,
            linger_ms: 50,
            batch_records: 64,
            batch_bytes: 256 * 1024,
        }
    }
}

impl UplinkConfig {
    /// The nearest configuration under which the state machine makes progress.
    pub(super) fn legal(self) -> Self {
        Self {
            base_ms: self.base_ms.max(1),
            cap_ms: self.cap_ms.max(1),
            failures_to_switch: self.failures_to_switch.max(1),
            probe_ms: self.probe_ms.max(1),
            ack_timeout_ms: self.ack_timeout_ms.max(1),
            connect_timeout_ms: self.connect_timeout_ms.max(1),
            window: self.window.clamp(1, MAX_WINDOW),
            batch_records: self.batch_records.max(1),
            batch_bytes: self.batch_bytes.max(1),
            ..self
        }
    }
}
