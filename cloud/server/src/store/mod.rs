//! What the cloud remembers, on one machine: a commit log of signed batches, records and events, an
//! index derived from it, and content-addressed blobs.
//!
//! Layout of the data folder: `LOCK`, `log/`, `index/` (sled), `blobs/`. The promise is the same
//! for all of it: what a call has answered `Ok` for survives a kill or a power cut at any moment,
//! and nothing is stored twice. Calls block until then, so async code makes them from
//! `spawn_blocking`; ingest uses [`Store::commit`], which does not block.

mod batch;
mod blobs;
mod committer;
pub(crate) mod disk;
mod index;
mod log;
mod sample;

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use cloud_core::audit::Ledger;
use flywheel_shared::ids::{DeviceId, Digest};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use batch::Batch;
pub use blobs::Blobs;
pub use committer::{BatchError, Commit};
pub use sample::{SampleId, SampleIdError, SampleMeta};

use committer::{Committer, Job, Pending};
use disk::{Disk, RealDisk};
use index::Index;
use log::{Log, Segments};

/// A position in the order in which samples were committed. Later samples have greater ones.
pub type Cursor = u64;

/// Why the store did not do what was asked. Cloneable, because one failed write may answer many.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Another server has the folder.
    #[error(
        "the data folder {} is in use by another server (process {pid}); stop that one, or give \
         this one a folder of its own with --data", .dir.display()
    )]
    Locked {
        /// The data folder.
        dir: PathBuf,
        /// Process id of the holder, or `unknown`.
        pid: String,
    },
    /// The disk is full.
    #[error("no space is left on the disk of {}; nothing was stored, free some space", .path.display())]
    Full {
        /// What was being written.
        path: PathBuf,
    },
    /// A file operation failed.
    #[error("{}: {why}", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        why: String,
    },
    /// sled failed; it is opened again at the next write.
    #[error("the index failed: {why}")]
    Index {
        /// What sled said.
        why: String,
    },
    /// Stored bytes are not what they were.
    #[error("{} is damaged: {why}", .path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A record can't be written or read.
    #[error("a record of {tree:?} can't be read or written: {why}")]
    Record {
        /// Its tree or stream.
        tree: String,
        /// What is wrong with it.
        why: String,
    },
    /// The store is being closed.
    #[error("the store is closing")]
    Closed,
}

impl StoreError {
    pub(crate) fn io(path: &Path, error: &std::io::Error) -> Self {
        let path = path.to_owned();
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Self::Full { path }
            }
            _ => Self::Io {
                path,
                why: error.to_string(),
            },
        }
    }

    fn record(tree: &str, why: &dyn std::fmt::Display) -> Self {
        Self::Record {
            tree: tree.to_owned(),
            why: why.to_string(),
        }
    }
}

/// What came from one device since it was enrolled. Kept in memory for a moment, so a crash may
/// lose the last few messages from the count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Bytes of all its messages, envelopes included.
    pub bytes_up: u64,
    /// Its messages.
    pub messages: u64,
    /// Batches among them that were accepted, repetitions included.
    pub batches: u64,
    /// Messages that were refused.
    pub refused: u64,
}

impl Traffic {
    fn add(&mut self, more: &Self) {
        self.bytes_up += more.bytes_up;
        self.messages += more.messages;
        self.batches += more.batches;
        self.refused += more.refused;
    }
}

/// The store; cheap to share.
pub struct Store {
    index: Arc<Index>,
    segments: Segments,
    blobs: Blobs,
    pending: Arc<Pending>,
    jobs: Mutex<Option<Sender<Job>>>,
    committer: Option<JoinHandle<()>>,
    _lock: File,
}

impl Store {
    /// Opens the store in `dir`, making it if it is not there, and brings the index up to date
    /// with the log.
    pub fn open(dir: &Path) -> Result<Arc<Self>, StoreError> {
        Self::open_on(Arc::new(RealDisk), dir)
    }

    /// [`Store::open`] with file operations of the caller's.
    pub fn open_on(disk: Arc<dyn Disk>, dir: &Path) -> Result<Arc<Self>, StoreError> {
        fs::create_dir_all(dir).map_err(|error| StoreError::io(dir, &error))?;
        let lock = lock(dir)?;
        let log = Log::open(disk.clone(), &dir.join("log"))?;
        let index = Arc::new(Index::open(&dir.join("index"), &log)?);
        let blobs = Blobs::open(disk, &dir.join("blobs"))?;
        let segments = log.segments();
        let pending = Arc::new(Pending::default());
        let committer = Committer {
            index: index.clone(),
            log,
            pending: pending.clone(),
        };
        let (jobs, received) = mpsc::channel();
        let committer = thread::Builder::new()
            .name("committer".to_owned())
            .spawn(move || committer.run(&received))
            .map_err(|error| StoreError::io(dir, &error))?;
        Ok(Arc::new(Self {
            index,
            segments,
            blobs,
            pending,
            jobs: Mutex::new(Some(jobs)),
            committer: Some(committer),
            _lock: lock,
        }))
    }

    /// Writes a record as JSON, replacing what stands under the key.
    pub fn put<T: Serialize + ?Sized>(
        &self,
        tree: &str,
        key: &[u8],
        value: &T,
    ) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        batch.put(tree, key, value)?;
        self.write(batch).map(drop)
    }

    /// Reads a record.
    pub fn get<T: DeserializeOwned>(
        &self,
        tree: &str,
        key: &[u8],
    ) -> Result<Option<T>, StoreError> {
        let found = self.index.record(tree, key)?;
        found.map(|bytes| from_json(tree, &bytes)).transpose()
    }

    /// Removes a record; removing one that is not there is no error.
    pub fn delete(&self, tree: &str, key: &[u8]) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        batch.delete(tree, key)?;
        self.write(batch).map(drop)
    }

    /// The records of a tree whose keys begin with `prefix`, in key order.
    pub fn scan<T: DeserializeOwned>(
        &self,
        tree: &str,
        prefix: &[u8],
    ) -> Result<Vec<(Vec<u8>, T)>, StoreError> {
        let found = self.index.records(tree, prefix)?.into_iter();
        found
            .map(|(key, bytes)| Ok((key, from_json(tree, &bytes)?)))
            .collect()
    }

    /// Makes several changes, all or nothing; returns the numbers of the events among them.
    pub fn write(&self, batch: Batch) -> Result<Vec<u64>, StoreError> {
        batch.fits()?;
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        self.ask(|reply| Job::Write(batch, reply))
    }

    /// Puts records in the index alone: for what comes again by itself, such as a device's health,
    /// and would only grow the log. Lost if the index has to be made anew.
    pub fn note(&self, batch: Batch) -> Result<(), StoreError> {
        if batch.is_empty() {
            return Ok(());
        }
        self.ask(|reply| Job::Note(batch, reply))
    }

    /// Returns once everything before it, notes and counters as well, is on the medium.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.ask(|reply| Job::Note(Batch::new(), reply))
    }

    /// Gives the committer a job and waits for its answer.
    fn ask<T: Send + 'static>(
        &self,
        job: impl FnOnce(committer::Reply<T>) -> Job,
    ) -> Result<T, StoreError> {
        let (done, outcome) = mpsc::sync_channel(1);
        self.submit(job(Box::new(move |result| {
            // The caller waits below, so it is there.
            let _ = done.send(result);
        })));
        outcome.recv().unwrap_or(Err(StoreError::Closed))
    }

    /// Appends an event to a stream; returns its number, from 0.
    pub fn append_event<T: Serialize + ?Sized>(
        &self,
        stream: &str,
        event: &T,
    ) -> Result<u64, StoreError> {
        let mut batch = Batch::new();
        batch.event(stream, event)?;
        let numbers = self.write(batch)?;
        numbers.first().copied().ok_or(StoreError::Closed)
    }

    /// Appends events to a stream, all or nothing; returns the number of the first, or of the next
    /// event to come if there are none.
    pub fn append_events<T: Serialize>(
        &self,
        stream: &str,
        events: &[T],
    ) -> Result<u64, StoreError> {
        let mut batch = Batch::new();
        for event in events {
            batch.event(stream, event)?;
        }
        match self.write(batch)?.first() {
            Some(first) => Ok(*first),
            None => {
                let all = self.index.events(stream, 0)?;
                Ok(all.last().map_or(0, |(number, _)| number + 1))
            }
        }
    }

    /// The events of a stream from a number on, in order.
    pub fn events<T: DeserializeOwned>(
        &self,
        stream: &str,
        from: u64,
    ) -> Result<Vec<(u64, T)>, StoreError> {
        let found = self.index.events(stream, from)?.into_iter();
        found
            .map(|(number, bytes)| Ok((number, from_json(stream, &bytes)?)))
            .collect()
    }

    /// Ingests a batch; `reply` is called once, from another thread, when it is durable or
    /// refused. Records that are known already are not stored again, and are a success.
    pub fn commit(
        &self,
        commit: Commit,
        reply: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) {
        self.submit(Job::Commit(commit, Box::new(reply)));
    }

    /// [`Store::commit`] for code that may block.
    pub fn commit_blocking(&self, commit: Commit) -> Result<(), StoreError> {
        self.ask(|reply| Job::Commit(commit, reply))
    }

    /// Up to `limit` samples in the order in which they were committed, after a cursor; 0 is
    /// before all.
    pub fn samples(
        &self,
        after: Cursor,
        limit: usize,
    ) -> Result<Vec<(Cursor, SampleMeta)>, StoreError> {
        self.index.samples(after, limit)
    }

    /// The cursor of the newest sample; 0 if there is none.
    pub fn last_sample(&self) -> Result<Cursor, StoreError> {
        self.index.last_sample()
    }

    /// One sample.
    pub fn sample(&self, id: &SampleId) -> Result<Option<SampleMeta>, StoreError> {
        self.index.sample(id)
    }

    /// The bytes of a sample's picture, or of a blob, checked against the digest.
    pub fn picture(&self, digest: &Digest) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(place) = self.index.place(digest)? else {
            return self.blobs.get(digest);
        };
        let bytes = self.segments.read(place.position, place.len as usize)?;
        if Digest::of(&bytes) != *digest {
            return Err(StoreError::Corrupt {
                path: PathBuf::from("log"),
                why: format!("the picture {digest} no longer has its digest"),
            });
        }
        Ok(Some(bytes))
    }

    /// What was ingested and lost of one epoch of one device; the books of the device are not in
    /// it.
    pub fn ledger(&self, device: &DeviceId, epoch: u32) -> Result<Ledger, StoreError> {
        self.index.ledger(device, epoch)
    }

    /// All ledgers, by device and epoch.
    pub fn ledgers(&self) -> Result<Vec<Ledger>, StoreError> {
        self.index.ledgers()
    }

    /// What came from a device.
    pub fn traffic(&self, device: &DeviceId) -> Result<Traffic, StoreError> {
        // Held over the read: the committer moves counters from here to the index.
        let pending = self.lock_pending();
        let mut traffic = self.index.traffic(device)?;
        if let Some(more) = pending.get(device) {
            traffic.add(more);
        }
        Ok(traffic)
    }

    /// Counts what came from a device; written with the next change.
    pub fn count(&self, device: &DeviceId, more: &Traffic) {
        self.lock_pending()
            .entry(device.clone())
            .or_default()
            .add(more);
    }

    /// The content-addressed files.
    pub fn blobs(&self) -> &Blobs {
        &self.blobs
    }

    fn submit(&self, job: Job) {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = match &*jobs {
            Some(jobs) => jobs.send(job).err().map(|error| error.0),
            None => Some(job),
        };
        drop(jobs);
        match refused {
            None => {}
            Some(Job::Commit(_, reply) | Job::Note(_, reply)) => reply(Err(StoreError::Closed)),
            Some(Job::Write(_, reply)) => reply(Err(StoreError::Closed)),
        }
    }

    fn lock_pending(&self) -> std::sync::MutexGuard<'_, BTreeMap<DeviceId, Traffic>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // Ends the committer once it has answered everything that waits.
        *self.jobs.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if let Some(committer) = self.committer.take()
            && committer.join().is_err()
        {
            tracing::error!("the committer panicked");
        }
    }
}

fn from_json<T: DeserializeOwned>(tree: &str, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::record(tree, &error))
}

/// Takes the folder's lock, which the system frees when the process ends, however it ends.
fn lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join("LOCK");
    let failed = |error: &std::io::Error| StoreError::io(&path, error);
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|error| failed(&error))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let read = file.read_to_string(&mut pid);
            let known = read.is_ok() && !pid.trim().is_empty();
            return Err(StoreError::Locked {
                dir: dir.to_owned(),
                pid: if known { pid.trim() } else { "unknown" }.to_owned(),
            });
        }
        Err(TryLockError::Error(error)) => return Err(failed(&error)),
    }
    // The pid only helps whoever finds the folder locked; a full disk must not keep a server from
    // starting.
    if let Err(error) = file
        .set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()))
    {
        tracing::warn!(%error, path = %path.display(), "the process id could not be noted");
    }
    Ok(file)
}
