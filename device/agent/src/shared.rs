//! What the frame loop and the link share: the spool, the models, signals one way and a status the
//! other.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use device_core::slot::Held;
use device_engine::EngineKind;
use tokio::sync::Notify;

use crate::metrics::Metrics;
use crate::models::{Models, Runner};
use crate::spool::Spool;
use crate::state::{Progress, State};

/// What the frame loop is told.
#[derive(Default)]
pub struct Signals {
    /// A replayed source halts before this frame.
    pub run_until: u64,
    /// End after the current frame.
    pub stop: bool,
    /// A proved model that is to run in shadow.
    pub candidate: Option<Runner>,
}

/// What the frame loop tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// How far it came.
    pub progress: Progress,
    /// No frame may be taken.
    pub held: bool,
    /// The model that runs.
    pub live: Option<Held>,
    /// What runs it.
    pub engine: Option<EngineKind>,
}

/// The meeting point of the two threads.
pub struct Shared {
    /// The database.
    pub state: Arc<State>,
    /// The queue of samples.
    pub spool: Mutex<Spool>,
    /// The slot.
    pub models: Mutex<Models>,
    /// Wakes the link: there is something to send or to tell.
    pub news: Notify,
    /// What is counted and timed.
    pub metrics: Metrics,
    signals: Mutex<Signals>,
    changed: Condvar,
    status: Mutex<Status>,
    bytes_up: AtomicU64,
    beat: AtomicU64,
}

impl Shared {
    /// Puts the parts together.
    pub fn new(
        state: Arc<State>,
        spool: Spool,
        models: Models,
        status: Status,
        bytes_up: u64,
    ) -> Self {
        Self {
            state,
            spool: Mutex::new(spool),
            models: Mutex::new(models),
            news: Notify::new(),
            metrics: Metrics::default(),
            signals: Mutex::new(Signals::default()),
            changed: Condvar::new(),
            status: Mutex::new(status),
            bytes_up: AtomicU64::new(bytes_up),
            beat: AtomicU64::new(0),
        }
    }

    /// Changes the signals and wakes the frame loop.
    pub fn signal(&self, change: impl FnOnce(&mut Signals)) {
        change(&mut lock(&self.signals));
        self.changed.notify_all();
    }

    /// The signals, and what a change of them wakes.
    pub fn signals(&self) -> (MutexGuard<'_, Signals>, &Condvar) {
        (lock(&self.signals), &self.changed)
    }

    /// What the frame loop told last.
    pub fn status(&self) -> Status {
        *lock(&self.status)
    }

    /// Tells the link. It is woken if something other than progress changed.
    pub fn tell(&self, status: Status) {
        let mut shared = lock(&self.status);
        let news = (shared.held, shared.live) != (status.held, status.live);
        *shared = status;
        drop(shared);
        if news {
            self.news.notify_one();
        }
    }

    /// The frame loop got on: it is done with a frame, or the source says that it has none.
    pub fn beat(&self) {
        self.beat.fetch_add(1, Ordering::Relaxed);
    }

    /// How often [`Shared::beat`] was called.
    pub fn beats(&self) -> u64 {
        self.beat.load(Ordering::Relaxed)
    }

    /// Bytes of all messages sent since enrolment.
    pub fn bytes_up(&self) -> u64 {
        self.bytes_up.load(Ordering::Relaxed)
    }

    /// Counts a message.
    pub fn count_up(&self, bytes: usize) {
        self.bytes_up.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Locks, also after another thread has panicked: every value guarded here is consistent between
/// any two of its own methods, and the agent ends with an error when a thread panics.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
