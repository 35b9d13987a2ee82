//! When to connect, send, wait, resend and change transport: the uplink without its sockets.
//!
//! The shell performs the [`Action`]s in order and reports what happens as [`Event`]s; it calls
//! [`Uplink::step`] with [`Event::Tick`] no later than the last `Sleep` says. Nothing frees the
//! spool but an acknowledgement from the cloud, so whatever goes wrong here costs time and bytes,
//! never a sample.
//!
//! - Failures back off exponentially with jitter (full jitter after Brooker, "Exponential Backoff
//!   And Jitter", AWS 2015, over the upper half of the range, so that no draw makes a busy loop).
//! - After [`UplinkConfig::failures_to_switch`] failures in a row the other transport is tried. On
//!   a transport that is not the preferred one, the preferred is probed again after
//!   [`UplinkConfig::probe_ms`], which doubles with each vain probe.
//! - At most [`UplinkConfig::window`] batches are unacknowledged. If the oldest of them waits
//!   longer than [`UplinkConfig::ack_timeout_ms`], all are sent again; a second time in a row
//!   counts as a dead connection.

use flywheel_shared::message::RefusedCode;
use heapless::{Deque, Vec};

mod config;

pub use config::{MAX_WINDOW, Transport, UplinkConfig};

/// Most actions of one step.
pub const MAX_ACTIONS: usize = 6;
/// Longest wait before the preferred transport is probed again, in milliseconds.
const MAX_PROBE_MS: u64 = 960_000;
/// A connection that lived this long, or got an acknowledgement, ends the back-off.
const SETTLED_MS: u64 = 10_000;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time passed.
    Tick,
    /// The transport is up.
    Connected,
    /// The transport is down, or did not come up.
    Closed,
    /// The cloud knows us.
    Welcomed,
    /// What the spool holds that is not in flight: say so whenever it changes, and after `Rewind`.
    Pending {
        /// Records.
        records: u32,
        /// Their bytes.
        bytes: u64,
    },
    /// The answer to [`Action::Send`]: a batch went out, or nothing did.
    Sent {
        /// Records in the batch; 0 if there was nothing to send.
        records: u32,
    },
    /// The cloud acknowledged records that were in flight.
    Acked {
        /// How many of them were freed by it.
        records: u32,
    },
    /// The cloud did not take a message.
    Refused {
        /// Why.
        code: RefusedCode,
        /// Wait at least this long, in milliseconds.
        retry_after_ms: u32,
    },
    /// A health message is due.
    HealthDue,
}

/// What the shell is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Open this transport; answer with [`Event::Connected`] or [`Event::Closed`].
    Connect(Transport),
    /// Close the transport. Its [`Event::Closed`] need not be reported, and does no harm if it is.
    Disconnect,
    /// Send the hello.
    SendHello,
    /// Count every unacknowledged record as not sent.
    Rewind,
    /// Send the next batch within these limits; answer with [`Event::Sent`].
    Send {
        /// Most records.
        max_records: u32,
        /// Most bytes.
        max_bytes: u32,
    },
    /// Send a health message.
    SendHealth,
    /// Nothing more to do before this time unless something happens; always the last action.
    Sleep {
        /// When to tick; `u64::MAX` for never.
        until_ms: u64,
    },
}

/// Actions in the order in which to perform them.
pub type Actions = Vec<Action, MAX_ACTIONS>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting { until_ms: u64 },
    Connecting { deadline_ms: u64 },
    Online { since_ms: u64 },
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    records: u32,
    sent_ms: u64,
}

/// The state machine of one device's link.
#[derive(Clone, Debug)]
pub struct Uplink {
    config: UplinkConfig,
    state: State,
    on_second: bool,
    /// Failures in a row on the current transport.
    failures: u32,
    /// Exponent of the back-off.
    attempts: u32,
    /// When to leave the second transport for the first, while on the second.
    probe_at_ms: u64,
    probe_wait_ms: u64,
    probing: bool,
    /// No batch before this.
    paused_until_ms: u64,
    refusals: u32,
    flight: Deque<InFlight, MAX_WINDOW>,
    timeouts: u32,
    sending: bool,
    pending: (u32, u64),
    pending_since_ms: u64,
    health_due: bool,
}

impl Uplink {
    /// A link that connects at its first step.
    pub fn new(config: UplinkConfig) -> Self {
        let config = config.legal();
        Self {
            config,
            state: State::Waiting { until_ms: 0 },
            on_second: false,
            failures: 0,
            attempts: 0,
            probe_at_ms: 0,
            probe_wait_ms: config.probe_ms,
            probing: false,
            paused_until_ms: 0,
            refusals: 0,
            flight: Deque::new(),
            timeouts: 0,
            sending: false,
            pending: (0, 0),
            pending_since_ms: 0,
            health_due: false,
        }
    }

    /// Whether the cloud has welcomed this connection, so that anything may be sent.
    pub fn is_online(&self) -> bool {
        matches!(self.state, State::Online { .. })
    }

    /// The transport in use or tried next.
    pub fn transport(&self) -> Transport {
        match self.config.second {
            Some(second) if self.on_second => second,
            _ => self.config.first,
        }
    }

    /// Records sent and not acknowledged.
    pub fn in_flight(&self) -> u32 {
        self.flight.iter().map(|batch| batch.records).sum()
    }

    /// Takes an event at `now_ms` (any clock that does not run backwards); `draw` is 32 random
    /// bits for the jitter.
    pub fn step(&mut self, now_ms: u64, event: Event, draw: u32) -> Actions {
        let mut out = Actions::new();
        match event {
            Event::Tick => {}
            Event::Connected => {
                if matches!(self.state, State::Connecting { .. }) {
                    push(&mut out, Action::SendHello);
                }
            }
            Event::Closed => {
                if !matches!(self.state, State::Waiting { .. }) {
                    self.fail(now_ms, draw);
                }
            }
            Event::Welcomed => self.welcomed(now_ms, &mut out),
            Event::Pending { records, bytes } => {
                if self.pending.0 == 0 && records > 0 {
                    self.pending_since_ms = now_ms;
                }
                self.pending = (records, bytes);
            }
            Event::Sent { records } => self.sent(now_ms, records),
            Event::Acked { records } => self.acked(records),
            Event::Refused {
                code,
                retry_after_ms,
            } => self.refused(now_ms, code, retry_after_ms, draw, &mut out),
            Event::HealthDue => self.health_due = true,
        }
        self.settle(now_ms, draw, &mut out);
        push(
            &mut out,
            Action::Sleep {
                until_ms: self.next_ms(now_ms),
            },
        );
        out
    }

    fn welcomed(&mut self, now_ms: u64, out: &mut Actions) {
        if !matches!(self.state, State::Connecting { .. }) {
            return;
        }
        self.state = State::Online { since_ms: now_ms };
        self.failures = 0;
        if self.on_second {
            self.probe_at_ms = now_ms.saturating_add(self.probe_wait_ms);
        } else {
            self.probe_wait_ms = self.config.probe_ms;
        }
        self.probing = false;
        // What the last connection had in flight may never have arrived.
        push(out, Action::Rewind);
    }

    fn sent(&mut self, now_ms: u64, records: u32) {
        // A late answer, after the connection is gone: those records were rewound with it.
        if !self.sending || !self.is_online() {
            return;
        }
        self.sending = false;
        if records == 0 {
            self.pending = (0, 0);
            return;
        }
        let batch = InFlight {
            records,
            sent_ms: now_ms,
        };
        // There is room: a batch is asked for only below the window.
        let _ = self.flight.push_back(batch);
        self.pending.0 = self.pending.0.saturating_sub(records);
        self.pending_since_ms = now_ms;
    }

    fn acked(&mut self, mut records: u32) {
        if records > 0 {
            self.timeouts = 0;
            self.refusals = 0;
            self.attempts = 0;
        }
        // The cloud answers batch by batch; should an answer be lost, counting from the oldest
        // keeps the window honest, and the spool itself knows the numbers.
        while let Some(oldest) = self.flight.front_mut() {
            if oldest.records > records {
                oldest.records -= records;
                break;
            }
            records -= oldest.records;
            self.flight.pop_front();
        }
    }

    fn refused(
        &mut self,
        now_ms: u64,
        code: RefusedCode,
        retry_after_ms: u32,
        draw: u32,
        out: &mut Actions,
    ) {
        let wait = u64::from(retry_after_ms);
        match code {
            // An answer to a fetch; the uplink has no part in it.
            RefusedCode::NotFound => {}
            // Nothing on this connection will do; come back rarely, in case the operator helps.
            RefusedCode::Identity | RefusedCode::WireVersion => {
                if !matches!(self.state, State::Waiting { .. }) {
                    push(out, Action::Disconnect);
                    let long = jitter(self.config.cap_ms, draw);
                    self.wait_until(now_ms.saturating_add(wait.max(long)));
                }
            }
            RefusedCode::Signature | RefusedCode::Malformed | RefusedCode::Storage => {
                if self.is_online() {
                    let ceiling = self.ceiling(self.refusals);
                    self.refusals = self.refusals.saturating_add(1);
                    let wait = wait.max(jitter(ceiling, draw));
                    self.paused_until_ms = now_ms.saturating_add(wait);
                    self.rewind(out);
                }
            }
        }
    }

    /// Does what time or the new state asks for.
    fn settle(&mut self, now_ms: u64, draw: u32, out: &mut Actions) {
        match self.state {
            State::Connecting { deadline_ms } if now_ms >= deadline_ms => {
                push(out, Action::Disconnect);
                self.fail(now_ms, draw);
            }
            State::Online { since_ms } => {
                if now_ms.saturating_sub(since_ms) >= SETTLED_MS {
                    self.attempts = 0;
                }
                if self.overdue_ms().is_some_and(|at| now_ms >= at) {
                    self.timeouts += 1;
                    if self.timeouts >= 2 {
                        push(out, Action::Disconnect);
                        self.fail(now_ms, draw);
                        return;
                    }
                    self.rewind(out);
                }
                if self.on_second && self.flight.is_empty() && now_ms >= self.probe_at_ms {
                    push(out, Action::Disconnect);
                    self.probe(now_ms);
                    self.connect(now_ms, out);
                    return;
                }
                if self.health_due {
                    self.health_due = false;
                    push(out, Action::SendHealth);
                }
                if self.send_at_ms().is_some_and(|at| now_ms >= at) {
                    self.sending = true;
                    push(
                        out,
                        Action::Send {
                            max_records: self.config.batch_records,
                            max_bytes: self.config.batch_bytes,
                        },
                    );
                }
            }
            State::Waiting { until_ms } if now_ms >= until_ms => self.connect(now_ms, out),
            State::Waiting { .. } | State::Connecting { .. } => {}
        }
    }

    fn connect(&mut self, now_ms: u64, out: &mut Actions) {
        self.state = State::Connecting {
            deadline_ms: now_ms.saturating_add(self.config.connect_timeout_ms),
        };
        push(out, Action::Connect(self.transport()));
    }

    /// Leaves the second transport to try the first once.
    fn probe(&mut self, now_ms: u64) {
        self.wait_until(now_ms);
        self.on_second = false;
        self.probing = true;
        self.failures = 0;
        self.probe_wait_ms = (self.probe_wait_ms * 2).min(MAX_PROBE_MS);
    }

    /// The connection is lost or was never made.
    fn fail(&mut self, now_ms: u64, draw: u32) {
        self.failures = self.failures.saturating_add(1);
        let tired = self.probing || self.failures >= self.config.failures_to_switch;
        if tired && self.config.second.is_some() {
            self.on_second = !self.on_second;
            self.failures = 0;
        }
        self.probing = false;
        let wait = jitter(self.ceiling(self.attempts), draw);
        self.attempts = self.attempts.saturating_add(1);
        self.wait_until(now_ms.saturating_add(wait));
    }

    fn wait_until(&mut self, until_ms: u64) {
        self.state = State::Waiting { until_ms };
        self.flight.clear();
        self.sending = false;
        self.timeouts = 0;
    }

    /// Sends everything unacknowledged again, on the same connection. The shell answers with
    /// [`Event::Pending`].
    fn rewind(&mut self, out: &mut Actions) {
        self.flight.clear();
        self.sending = false;
        push(out, Action::Rewind);
    }

    /// base × 2^exponent, at most the cap.
    fn ceiling(&self, exponent: u32) -> u64 {
        let factor = 1u64.checked_shl(exponent.min(40)).unwrap_or(u64::MAX);
        self.config
            .base_ms
            .saturating_mul(factor)
            .min(self.config.cap_ms)
    }

    /// When the oldest batch in flight is overdue.
    fn overdue_ms(&self) -> Option<u64> {
        let oldest = self.flight.front()?;
        Some(oldest.sent_ms.saturating_add(self.config.ack_timeout_ms))
    }

    /// When the next batch may go, if one may at all.
    fn send_at_ms(&self) -> Option<u64> {
        let (records, bytes) = self.pending;
        if self.sending || records == 0 || self.flight.len() >= self.config.window {
            return None;
        }
        let full =
            records >= self.config.batch_records || bytes >= u64::from(self.config.batch_bytes);
        let ready = if full {
            0
        } else {
            self.pending_since_ms.saturating_add(self.config.linger_ms)
        };
        Some(ready.max(self.paused_until_ms))
    }

    /// The next time at which something is due; later than `now_ms`.
    fn next_ms(&self, now_ms: u64) -> u64 {
        let due = match self.state {
            State::Waiting { until_ms } => until_ms,
            State::Connecting { deadline_ms } => deadline_ms,
            State::Online { .. } => {
                let probe = self.on_second.then_some(self.probe_at_ms);
                // With batches in flight the probe waits for them, not for the clock.
                let probe = probe.filter(|_| self.flight.is_empty());
                [self.overdue_ms(), self.send_at_ms(), probe]
                    .into_iter()
                    .flatten()
                    .min()
                    .unwrap_or(u64::MAX)
            }
        };
        due.max(now_ms.saturating_add(1))
    }
}

/// A wait between half of `ceiling` and all of it.
fn jitter(ceiling: u64, draw: u32) -> u64 {
    let half = ceiling / 2;
    let part = (u128::from(ceiling - half) * u128::from(draw)) >> 32;
    (half + part as u64).max(1)
}

/// No step makes more than [`MAX_ACTIONS`]: a rewind and a refusal's disconnect exclude each
/// other, so the longest is rewind, health, send, sleep.
fn push(out: &mut Actions, action: Action) {
    let fits = out.push(action).is_ok();
    debug_assert!(fits, "a step made too many actions");
}

#[cfg(test)]
mod tests;
