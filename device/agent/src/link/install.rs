//! How an offered model comes onto the device: fetched, proved on a thread of its own, handed to
//! the frame loop.

use std::time::{Duration, Instant};

use device_core::slot::{Action, Event, Held, SlotError};
use flywheel_shared::ids::Digest;
use flywheel_shared::message::{Chunk, Fetch, OfferMessage};
use flywheel_shared::trust::TrustError;
use tokio::task::JoinHandle;

use crate::clock::Moment;
use crate::models::{Fetching, LoadError, Loader, PackageError, Runner};
use crate::shared::{Shared, lock};

/// Without an answer for this long, chunks are asked for again.
const STALLED: Duration = Duration::from_secs(5);
/// Time until an event whose record could not be stored is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// A loaded and proved model, or why it is none.
pub(super) type Proved = (Digest, Result<Runner, LoadError>);

/// Fetches and proves one model at a time.
pub(super) struct Installer {
    loader: Loader,
    fetching: Option<(Digest, Fetching)>,
    /// When the last chunk came or was asked for.
    heard: Instant,
    proving: Option<(Digest, JoinHandle<Result<Runner, LoadError>>)>,
    /// A proved model whose trial has not begun.
    proved: Option<Runner>,
    /// Events whose record could not be stored.
    deferred: Vec<Event>,
    retry_at: Instant,
}

impl Installer {
    pub(super) fn new(loader: Loader) -> Self {
        let now = Instant::now();
        Self {
            loader,
            fetching: None,
            heard: now,
            proving: None,
            proved: None,
            deferred: Vec::new(),
            retry_at: now,
        }
    }

    /// When [`Installer::tick`] should be called, at `now` or later.
    pub(super) fn due(&self, now: Instant) -> Instant {
        let mut due = now + Duration::from_secs(3600);
        if self.fetching.is_some() {
            due = due.min(self.heard + STALLED);
        }
        if !self.deferred.is_empty() {
            due = due.min(self.retry_at);
        }
        due
    }

    /// Asks again for what did not come, and tries again what could not be stored.
    pub(super) fn tick(&mut self, shared: &Shared, now: Instant) -> Vec<Action> {
        if now >= self.heard + STALLED {
            self.new_connection();
        }
        let mut actions = Vec::new();
        if !self.deferred.is_empty() && now >= self.retry_at {
            for event in std::mem::take(&mut self.deferred) {
                actions.extend(self.step(shared, event));
            }
        }
        actions
    }

    /// Answers to what was asked for on the last connection will not come.
    pub(super) fn new_connection(&mut self) {
        if let Some((_, fetching)) = &mut self.fetching {
            fetching.ask_again();
        }
        self.heard = Instant::now();
    }

    /// Gives an event to the slot; returns what is to be done.
    pub(super) fn step(&mut self, shared: &Shared, event: Event) -> Vec<Action> {
        let result = lock(&shared.models).step(event);
        match result {
            Ok(actions) => actions,
            Err(error) => {
                tracing::error!(%error, "the slot record cannot be stored; trying again");
                self.deferred.push(event);
                self.retry_at = Instant::now() + RETRY;
                Vec::new()
            }
        }
    }

    /// Takes an offer.
    pub(super) fn offer(
        &mut self,
        shared: &Shared,
        offer: &OfferMessage<'_>,
        now: Moment,
    ) -> Vec<Action> {
        let result = lock(&shared.models).offer(offer, now);
        result.unwrap_or_else(|error| {
            // The cloud repeats the offer.
            tracing::error!(%error, "the slot record cannot be stored; the offer is not taken");
            Vec::new()
        })
    }

    /// Does one thing that the slot wants. Reports are sent by the link.
    pub(super) fn perform(&mut self, shared: &Shared, action: Action) {
        match action {
            Action::Fetch(model) => {
                let event = self.begin(model);
                self.follow(shared, event);
            }
            Action::RunGolden(model) => {
                let loader = self.loader.clone();
                let digest = model.digest;
                let task = tokio::task::spawn_blocking(move || loader.prove(&digest));
                self.proving = Some((digest, task));
            }
            Action::BeginShadow(model) => {
                if let Some(runner) = self
                    .proved
                    .take_if(|runner| runner.digest() == model.digest)
                {
                    shared.signal(|signals| signals.candidate = Some(runner));
                }
            }
            Action::Discard => {
                let candidate = lock(&shared.models).record().candidate;
                let wanted = candidate.map(|candidate| candidate.model.digest);
                self.fetching.take_if(|(digest, _)| Some(*digest) != wanted);
                self.proved
                    .take_if(|runner| Some(runner.digest()) != wanted);
            }
            Action::Persist(_) | Action::Swap(_) | Action::Report(_) => {}
        }
    }

    /// Gives an event that follows from an action to the slot and does what it says.
    fn follow(&mut self, shared: &Shared, event: Option<Event>) {
        if let Some(event) = event {
            for action in self.step(shared, event) {
                self.perform(shared, action);
            }
        }
    }

    fn begin(&mut self, model: Held) -> Option<Event> {
        let digest = model.digest;
        tracing::info!(model = %digest, sequence = model.sequence, "fetching a model");
        self.heard = Instant::now();
        match self.loader.fetch(&digest) {
            Ok(fetching) if fetching.is_complete() => Some(Event::Fetched { digest }),
            Ok(fetching) => {
                self.fetching = Some((digest, fetching));
                None
            }
            Err(error) => Some(failed(digest, &error)),
        }
    }

    /// The chunks to ask for now.
    pub(super) fn requests(&mut self, now: Instant) -> Vec<Fetch> {
        let requests = self
            .fetching
            .as_mut()
            .map(|(_, fetching)| fetching.requests())
            .unwrap_or_default();
        if !requests.is_empty() {
            self.heard = now;
        }
        requests
    }

    /// Takes a chunk.
    pub(super) fn chunk(&mut self, shared: &Shared, chunk: &Chunk<'_>) -> Vec<Action> {
        let Some((digest, fetching)) = &mut self.fetching else {
            return Vec::new();
        };
        let digest = *digest;
        let event = match fetching.chunk(chunk) {
            Ok(taken) => {
                if taken {
                    self.heard = Instant::now();
                }
                if !fetching.is_complete() {
                    return Vec::new();
                }
                Event::Fetched { digest }
            }
            Err(error) => failed(digest, &error),
        };
        self.fetching = None;
        self.step(shared, event)
    }

    /// The cloud no longer has what was asked for.
    pub(super) fn not_found(&mut self, shared: &Shared) -> Vec<Action> {
        let Some((digest, _)) = self.fetching.take() else {
            return Vec::new();
        };
        tracing::error!(model = %digest, "the cloud does not have a part of the model it offered");
        let code = TrustError::WrongDigest.code();
        self.step(shared, Event::FetchFailed { digest, code })
    }

    /// Waits for the proof under way; forever if there is none. Cancel-safe.
    pub(super) async fn proving(&mut self) -> Proved {
        let Some((digest, task)) = &mut self.proving else {
            return std::future::pending().await;
        };
        let digest = *digest;
        let result = match task.await {
            Ok(result) => Some(result),
            Err(panic) => {
                tracing::error!(%panic, model = %digest, "the proof of a model panicked");
                None
            }
        };
        self.proving = None;
        match result {
            Some(result) => (digest, result),
            None => (digest, Err(LoadError::Panicked(digest))),
        }
    }

    /// Takes the result of a proof.
    pub(super) fn proved(&mut self, shared: &Shared, proved: Proved) -> Vec<Action> {
        let (digest, result) = proved;
        let event = match result {
            Ok(runner) => {
                tracing::info!(model = %digest, "golden inputs passed");
                self.proved = Some(runner);
                Event::GoldenPassed { digest }
            }
            Err(error) => {
                tracing::error!(%error, model = %digest, "the model does not go on trial");
                Event::GoldenFailed {
                    digest,
                    error: error.slot_error(),
                }
            }
        };
        self.step(shared, event)
    }
}

fn failed(digest: Digest, error: &PackageError) -> Event {
    tracing::error!(%error, model = %digest, "the model cannot be fetched");
    Event::FetchFailed {
        digest,
        code: error
            .trust()
            .map_or(SlotError::Storage.code(), TrustError::code),
    }
}
