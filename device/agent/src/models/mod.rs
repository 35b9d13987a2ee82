//! The models of a device: packages on disk, the slot that decides about them, and the loading of
//! what is to run.
//!
//! The slot itself is [`device_core::slot`]; [`Models`] performs those of its actions that concern
//! storage and hands the rest to its caller: [`crate::link`] fetches and proves, and
//! [`crate::pipeline`] runs and swaps.

mod choice;
mod disk;
mod fetching;
mod package;
mod runner;
mod slot_file;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use device_core::slot::{Action, Event, Held, Report, Slot, SlotError, SlotRecord};
use flywheel_shared::ids::{DeviceId, Digest};
use flywheel_shared::message::{OfferMessage, SlotState};
use flywheel_shared::trust::{
    Accepted, Floor, Judge, KeyId, Manifest, Signed, SignedRoot, TrialBounds, TrustError, TrustRoot,
};
use thiserror::Error;

pub use choice::{EngineChoice, Trial, UnknownChoice, fastest};
pub(crate) use disk::replace;
pub use disk::{Disk, Files};
pub use fetching::Fetching;
pub use package::{Package, PackageError, Packages};
pub use runner::{Runner, RunnerError};
pub use slot_file::{SlotFileError, Stored};

use crate::clock::Moment;
use crate::state::{State, StateError};
use crate::trust::{Trust, UpdateError};
use slot_file::{Found, SlotFile};

/// The slot record's file in a data folder.
const SLOT: &str = "slot";
/// The packages' folder in a data folder.
const MODELS: &str = "models";

/// Why the models cannot be opened.
#[derive(Debug, Error)]
pub enum ModelsError {
    /// The packages' folder.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The slot record.
    #[error(transparent)]
    Slot(#[from] SlotFileError),
    /// The slot record that an older agent left.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Why a package does not run.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Its bytes are not there or not those that were signed.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The engine or the golden inputs refuse it.
    #[error(transparent)]
    Runner(#[from] RunnerError),
    /// A package outside the agent's own folder that is not named by its digest.
    #[error(
        "{0}: the folder of a package must be named by the digest of its manifest, as those under models/ of a data folder are; copy it with its name"
    )]
    Unnamed(PathBuf),
    /// The proof panicked, outside of the engine.
    #[error("model {0}: the proof panicked; this is a bug in the agent")]
    Panicked(Digest),
}

impl LoadError {
    /// Whether the release key that is believed now did not sign it.
    pub fn is_unsigned(&self) -> bool {
        matches!(self, Self::Package(error) if error.trust() == Some(TrustError::BadSignature))
    }

    /// What the slot is told.
    pub fn slot_error(&self) -> SlotError {
        match self {
            Self::Runner(RunnerError::Golden { .. }) => SlotError::Golden,
            Self::Runner(RunnerError::Panicked(_)) | Self::Panicked(_) => SlotError::Crash,
            Self::Package(PackageError::Io { .. }) => SlotError::Storage,
            Self::Package(PackageError::Trust { .. }) | Self::Runner(_) | Self::Unnamed(_) => {
                SlotError::Load
            }
        }
    }
}

/// Makes a running model of a checked package.
pub trait Assemble: Send + Sync {
    /// Loads it.
    ///
    /// # Errors
    /// Why it does not run.
    fn assemble(&self, package: &Package) -> Result<Runner, RunnerError>;
}

impl Assemble for EngineChoice {
    fn assemble(&self, package: &Package) -> Result<Runner, RunnerError> {
        self.load(package)
    }
}

/// Loads packages; cheap to clone, so that loading needs no lock.
#[derive(Clone)]
pub struct Loader {
    packages: Packages,
    trust: TrustRoot,
    engine: Arc<dyn Assemble>,
}

impl Loader {
    /// What loads the packages in `models` of a data folder; nothing there is made or changed.
    pub fn of(data: &Path, trust: TrustRoot, engine: EngineChoice) -> Self {
        Self {
            packages: Packages::borrow(&data.join(MODELS)),
            trust,
            engine: Arc::new(engine),
        }
    }

    /// Reads a package, checks every byte of it, and loads it with the engine.
    pub fn load(&self, digest: &Digest) -> Result<(Runner, Package), LoadError> {
        let package = self.packages.read(digest)?;
        let runner = self.engine.assemble(&package)?;
        Ok((runner, package))
    }

    /// Reads a package in any folder, checks its signature besides, and proves it.
    pub fn prove_at(&self, folder: &Path) -> Result<Runner, LoadError> {
        let digest = folder
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok())
            .ok_or_else(|| LoadError::Unnamed(folder.to_owned()))?;
        let there = Self {
            packages: Packages::borrow(folder.parent().unwrap_or(Path::new(""))),
            ..self.clone()
        };
        there.packages.signed(&self.trust, &digest)?;
        there.prove(&digest)
    }

    /// As [`Loader::load`], and runs the golden inputs.
    pub fn prove(&self, digest: &Digest) -> Result<Runner, LoadError> {
        let (mut runner, package) = self.load(digest)?;
        runner.prove(&package)?;
        Ok(runner)
    }

    /// Goes on with the fetching of an admitted package.
    pub fn fetch(&self, digest: &Digest) -> Result<Fetching, PackageError> {
        self.packages.fetch(digest)
    }
}

/// What identifies a device to those who offer it models.
#[derive(Clone, Debug)]
pub struct Device {
    /// Its name.
    pub id: DeviceId,
    /// Its hardware class.
    pub hardware: String,
    /// The keys it believes.
    pub trust: TrustRoot,
}

/// The live model of a data folder whose agent does not run; nothing there is made or changed.
///
/// # Errors
/// If the slot record can't be read.
pub fn live(data: &Path, state: &State) -> Result<Option<Held>, ModelsError> {
    let path = data.join(SLOT);
    let stored = if path.exists() {
        match SlotFile::open(Arc::new(Files), &path)?.1 {
            Found::Stored(stored) => Some(stored.record),
            Found::Nothing | Found::Damaged => None,
        }
    } else {
        None
    };
    match stored {
        Some(record) => Ok(record.live),
        None => Ok(state.old_slot()?.and_then(|record| record.live)),
    }
}

/// The slot with its storage.
pub struct Models {
    slot: Slot,
    file: SlotFile,
    device: Device,
    trust: Trust,
    loader: Loader,
}

impl Models {
    /// Opens the models of a data folder and loads the live one. If that fails, the device goes
    /// on without a model, and the cloud may offer the same one again; older ones stay refused.
    /// The slot still awaits [`Event::Boot`].
    ///
    /// # Errors
    /// If the disk fails.
    pub fn open(
        data: &Path,
        state: &State,
        device: Device,
        engine: EngineChoice,
    ) -> Result<(Self, Option<Runner>), ModelsError> {
        let old = state.old_slot()?;
        let opened = Self::on(Arc::new(Files), data, device, Arc::new(engine), old)?;
        if old.is_some() {
            state.forget_old_slot()?;
        }
        Ok(opened)
    }

    /// As [`Models::open`], on any disk and with anything that loads models; `before` holds if
    /// nothing was saved yet.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn on(
        disk: Arc<dyn Disk>,
        data: &Path,
        device: Device,
        engine: Arc<dyn Assemble>,
        before: Option<SlotRecord>,
    ) -> Result<(Self, Option<Runner>), ModelsError> {
        let packages = Packages::on(Arc::clone(&disk), &data.join(MODELS))?;
        let files = Arc::clone(&disk);
        let (mut file, found) = SlotFile::open(disk, &data.join(SLOT))?;
        let loader = Loader {
            packages,
            trust: device.trust.clone(),
            engine,
        };
        let mut stored = match (found, before) {
            (Found::Stored(stored), _) => stored,
            (Found::Nothing, None) => Stored::default(),
            (Found::Nothing | Found::Damaged, Some(record)) => {
                let stored = Stored {
                    record,
                    ..Stored::default()
                };
                file.save(&stored)?;
                stored
            }
            (Found::Damaged, None) => {
                tracing::error!(
                    "the slot record is damaged; running without a model until one is offered"
                );
                // Whatever was live has a package here, so nothing older than the oldest is taken.
                let oldest = loader.packages.oldest().unwrap_or(0);
                let mut stored = Stored::default();
                stored.record.floor = Floor {
                    key: device.trust.release_id(),
                    at: oldest.saturating_sub(1),
                };
                file.save(&stored)?;
                stored
            }
        };
        let mut runner = None;
        if let Some(live) = stored.record.live {
            match loader.load(&live.digest) {
                Ok((loaded, _)) => runner = Some(loaded),
                Err(error) => {
                    tracing::error!(%error, model = %live.digest, "the live model does not load; running without a model until one is offered");
                    // Under the key that set it: the same release may come again, no older one.
                    let floor = &mut stored.record.floor;
                    floor.at = floor.at.min(live.sequence.saturating_sub(1));
                    stored.record.live = None;
                    file.save(&stored)?;
                    if matches!(error, LoadError::Package(_)) {
                        loader.packages.remove(&live.digest)?;
                    }
                }
            }
        }
        let trust = Trust::open(files, data, device.trust.clone(), stored.time);
        let models = Self {
            slot: Slot::new(stored.record),
            file,
            device,
            trust,
            loader,
        };
        Ok((models, runner))
    }

    /// What loads this device's packages.
    pub fn loader(&self) -> Loader {
        self.loader.clone()
    }

    /// The record, as last persisted.
    pub fn record(&self) -> &SlotRecord {
        self.slot.record()
    }

    /// Sequence that an offer must exceed.
    pub fn floor(&self) -> u64 {
        let trust = self.trust.root();
        let floor = self.slot.record().floor;
        floor.under(trust.release_id(), trust.min_sequence)
    }

    /// What the cloud has not confirmed to know.
    pub fn report(&self) -> Option<Report> {
        self.slot.report()
    }

    /// Whether a model is on trial or about to be.
    pub fn trial_pending(&self) -> bool {
        self.slot
            .record()
            .candidate
            .is_some_and(|c| matches!(c.state, SlotState::Staged | SlotState::Trial))
    }

    /// Takes an event, persists what must be, and returns the actions left for the caller, in
    /// order. [`Action::Discard`] is among them, since the caller may run the candidate; its
    /// packages are gone already.
    ///
    /// # Errors
    /// The record could not be stored. Then the event has not happened; try it again later.
    pub fn step(&mut self, event: Event) -> Result<Vec<Action>, SlotFileError> {
        let before = self.slot.clone();
        let mut left = Vec::new();
        for action in self.slot.step(event) {
            match action {
                Action::Persist(record) => {
                    let time = self.trust.time_floor();
                    if let Err(error) = self.file.save(&Stored { record, time }) {
                        self.slot = before;
                        return Err(error);
                    }
                }
                Action::Discard => {
                    self.tidy();
                    left.push(action);
                }
                other => left.push(other),
            }
        }
        Ok(left)
    }

    /// What the device believes, to ask and to be answered.
    pub fn trust(&mut self) -> &mut Trust {
        &mut self.trust
    }

    /// Takes a newer trust root, durably. A candidate that only the old keys vouched for is given
    /// up; the live model stays.
    ///
    /// # Errors
    /// [`UpdateError`]; the root in hand holds then.
    pub fn update_root(&mut self, signed: SignedRoot<'_>) -> Result<(), UpdateError> {
        self.trust.update(signed)
    }

    /// Takes the cloud's answer to what time it is, durably.
    ///
    /// # Errors
    /// [`UpdateError`]; no time was learnt then.
    pub fn answer_time(&mut self, signed: Signed<'_>, now: Moment) -> Result<(), UpdateError> {
        let record = *self.slot.record();
        let file = &mut self.file;
        let keep = |time| file.save(&Stored { record, time });
        self.trust.answer(&self.device.id, signed, now, keep)
    }

    /// What the slot is told at every start and after every newer root.
    pub fn trusted(&self) -> Event {
        Event::Trusted {
            key: self.trust.root().release_id(),
        }
    }

    /// Judges an offer and takes it to the slot. If time or keys are in its way, the device asks the
    /// cloud for them first, and says no only to the next one.
    ///
    /// # Errors
    /// As [`Models::step`].
    pub fn offer(
        &mut self,
        message: &OfferMessage<'_>,
        now: Moment,
    ) -> Result<Vec<Action>, SlotFileError> {
        let digest = Digest::of(message.manifest.body);
        let record = self.slot.record();
        let known = record
            .live
            .into_iter()
            .chain(record.candidate.map(|candidate| candidate.model))
            .find(|model| model.digest == digest);
        if let Some(model) = known {
            // It was judged when it came first, and nothing follows from this but a report.
            let bounds = TrialBounds {
                frames: 0,
                max_latency_us: 0,
                min_confidence: 0.0,
            };
            return self.step(Event::Offer {
                model,
                bounds,
                key: KeyId::default(),
            });
        }
        let judge = Judge {
            trust: self.trust.root(),
            device: &self.device.id,
            hardware: &self.device.hardware,
            floor: self.floor(),
            now_ms: self.trust.now(now),
        };
        let refused = |sequence, code| Event::Refused {
            model: Held { digest, sequence },
            code,
        };
        let event = match judge.offer(message.offer, message.manifest) {
            Err(error)
                if (error.is_curable() || error == TrustError::BadSignature)
                    && self.trust.want(now.mono_ms) =>
            {
                tracing::info!(%error, model = %digest, "asking for newer keys and the time first");
                return Ok(Vec::new());
            }
            Err(error) => {
                tracing::warn!(%error, model = %digest, "an offered model is refused");
                // Not believed, only said back: the cloud knows its rollout by it.
                let claimed = Manifest::recall(&digest, message.manifest.body);
                let sequence = claimed.map_or(0, |manifest| manifest.sequence);
                refused(sequence, error.code())
            }
            Ok(Accepted {
                manifest,
                issued_ms,
            }) => {
                let record = *self.slot.record();
                let file = &mut self.file;
                self.trust
                    .heard(issued_ms, |time| file.save(&Stored { record, time }))?;
                match self.loader.packages.admit(message.manifest) {
                    Ok(_) => Event::Offer {
                        model: Held {
                            digest,
                            sequence: manifest.sequence,
                        },
                        bounds: manifest.trial,
                        key: self.trust.root().release_id(),
                    },
                    Err(error) => {
                        tracing::error!(%error, model = %digest, "an offered model cannot be stored");
                        refused(manifest.sequence, SlotError::Storage.code())
                    }
                }
            }
        };
        self.step(event)
    }

    /// Deletes every package that the record does not name.
    fn tidy(&self) {
        let record = self.slot.record();
        let wanted: Vec<Digest> = record
            .live
            .into_iter()
            .chain(record.candidate.map(|candidate| candidate.model))
            .map(|model| model.digest)
            .collect();
        if let Err(error) = self.loader.packages.keep_only(&wanted) {
            // Only space is lost, and the next call tries again.
            tracing::warn!(%error, "old model packages stay");
        }
    }
}
