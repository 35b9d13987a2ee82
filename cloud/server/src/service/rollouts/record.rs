//! Rollouts as they are stored: one record for each, and one for each of its devices, so that a
//! report writes a line and not a fleet.

use std::collections::BTreeMap;
use std::sync::Arc;

use cloud_core::rollout::{Head, Member, Rollout};
use serde::{Deserialize, Serialize};

use super::offers::Package;
use crate::store::{Batch, Cursor, Store, StoreError};

const ROLLOUTS: &str = "rollout";
const MEMBERS: &str = "rollout devices";

/// What a store must do for the controller: all changes of a batch, or none.
pub trait Shelf: Send + Sync {
    /// Writes; durable on return.
    ///
    /// # Errors
    /// If the store fails; then nothing was written, or all of it and nobody was told.
    fn write(&self, batch: Batch) -> Result<(), StoreError>;
}

impl Shelf for Store {
    fn write(&self, batch: Batch) -> Result<(), StoreError> {
        Self::write(self, batch).map(drop)
    }
}

/// All about a rollout but its devices.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) number: u64,
    /// Id of the model.
    pub(super) model: String,
    /// Id of the model before.
    pub(super) previous: Option<String>,
    pub(super) head: Head,
    pub(super) started_ms: u64,
    pub(super) ended_ms: Option<u64>,
    /// Samples up to here were committed before it started.
    pub(super) samples_after: Cursor,
    /// The model as it is offered.
    pub(super) package: Package,
    /// The model before as it is offered again.
    pub(super) back: Option<Package>,
}

/// A rollout in memory.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) number: u64,
    pub(super) model: String,
    pub(super) previous: Option<String>,
    pub(super) started_ms: u64,
    pub(super) ended_ms: Option<u64>,
    pub(super) samples_after: Cursor,
    pub(super) rollout: Rollout,
    /// The model as it is offered.
    pub(super) package: Arc<Package>,
    /// The model before as it is offered again.
    pub(super) back: Option<Arc<Package>>,
    /// What it waited for when it was last looked at; not stored.
    pub(super) waits_for: Option<String>,
}

impl Entry {
    pub(super) fn record(&self) -> Record {
        Record {
            number: self.number,
            model: self.model.clone(),
            previous: self.previous.clone(),
            head: self.rollout.head.clone(),
            started_ms: self.started_ms,
            ended_ms: self.ended_ms,
            samples_after: self.samples_after,
            package: Package::clone(&self.package),
            back: self.back.as_deref().cloned(),
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.rollout.head.end.is_none()
    }
}

impl Record {
    pub(super) fn put(&self, batch: &mut Batch) -> Result<(), StoreError> {
        batch.put(ROLLOUTS, &self.number.to_be_bytes(), self)?;
        Ok(())
    }
}

pub(super) fn put_member(
    batch: &mut Batch,
    number: u64,
    device: &str,
    member: &Member,
) -> Result<(), StoreError> {
    let key = [&number.to_be_bytes(), device.as_bytes()].concat();
    batch.put(MEMBERS, &key, member)?;
    Ok(())
}

/// Every rollout of a store, by number.
pub(super) fn load(store: &Store) -> Result<BTreeMap<u64, Entry>, StoreError> {
    let records = store.scan::<Record>(ROLLOUTS, &[])?;
    let mut entries = BTreeMap::new();
    for (_, record) in records {
        let members = store.scan::<Member>(MEMBERS, &record.number.to_be_bytes())?;
        let members = members
            .into_iter()
            .map(|(key, member)| (String::from_utf8_lossy(&key[8..]).into_owned(), member))
            .collect();
        entries.insert(
            record.number,
            Entry {
                number: record.number,
                model: record.model,
                previous: record.previous,
                started_ms: record.started_ms,
                ended_ms: record.ended_ms,
                samples_after: record.samples_after,
                rollout: Rollout {
                    head: record.head,
                    members,
                },
                package: Arc::new(record.package),
                back: record.back.map(Arc::new),
                waits_for: None,
            },
        );
    }
    Ok(entries)
}
