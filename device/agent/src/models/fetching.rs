//! A package on its way: which bytes to ask for next, and what becomes of those that come. What was
//! written is gone on with after a restart, and a part of which the device has an older one may come
//! as the difference.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use flywheel_delta::Way;
use flywheel_shared::MAX_CHUNK;
use flywheel_shared::ids::Digest;
use flywheel_shared::message::{Chunk, Fetch};
use flywheel_shared::trust::{Part, PartKind, TrustError, check_part};

use super::disk::{self, Disk};
use super::package::{PackageError, at, file_name, untrusted};

/// Chunks that are asked for at a time.
const OUTSTANDING: u64 = 4;
/// Nothing smaller is asked for, but for the end of a part.
const LEAST: u64 = 1024;

/// A part that is not complete.
#[derive(Clone, Debug)]
pub(super) struct Want {
    pub(super) part: Part,
    /// How to make it of what is here already.
    pub(super) shortcut: Option<Shortcut>,
}

/// A difference to a part of another package on this disk.
#[derive(Clone, Debug)]
pub(super) struct Shortcut {
    pub(super) way: Way,
    pub(super) digest: Digest,
    pub(super) len: u32,
    /// File of the older part, and its digest.
    pub(super) base: PathBuf,
    pub(super) base_digest: Digest,
}

impl Want {
    /// Length and digest of the bytes to ask for.
    fn bytes(&self) -> (u64, Digest) {
        match &self.shortcut {
            Some(delta) => (u64::from(delta.len), delta.digest),
            None => (u64::from(self.part.len), self.part.digest),
        }
    }

    /// The file that they are collected in.
    fn file(&self, folder: &Path) -> PathBuf {
        match self.shortcut {
            Some(_) => folder.join(format!("{}.delta", file_name(self.part.kind))),
            None => partial(folder, self.part.kind),
        }
    }
}

/// A package on its way.
#[derive(Debug)]
pub struct Fetching {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    /// Parts that are not complete, the next one last.
    missing: Vec<Want>,
    /// Bytes of the current part on disk.
    have: u64,
    /// Bytes of the current part that were asked for.
    asked: u64,
    /// Requests on this connection that were not answered.
    unanswered: u32,
    /// Answers to come that concern what is no longer wanted.
    stale: u32,
    /// Whether the current part was fetched from the start because its digest was wrong.
    again: bool,
}

impl Fetching {
    pub(super) fn start(
        disk: Arc<dyn Disk>,
        folder: PathBuf,
        missing: Vec<Want>,
    ) -> Result<Self, PackageError> {
        let mut fetching = Self {
            disk,
            folder,
            missing,
            have: 0,
            asked: 0,
            unanswered: 0,
            stale: 0,
            again: false,
        };
        fetching.resume()?;
        Ok(fetching)
    }

    /// Whether every part is there and checked.
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty()
    }

    /// Whether an answer is awaited.
    pub fn waits(&self) -> bool {
        self.asked > self.have
    }

    /// Forgets what was asked for: the connection broke, or answers are missing.
    pub fn ask_again(&mut self) {
        self.asked = self.have;
        self.unanswered = 0;
        self.stale = 0;
    }

    /// The chunks to ask for now, of at most `allowance` bytes together.
    pub fn requests(&mut self, mut allowance: u64) -> Vec<Fetch> {
        let mut requests = Vec::new();
        let Some(want) = self.missing.last() else {
            return requests;
        };
        let (len, digest) = want.bytes();
        let chunk = MAX_CHUNK as u64;
        while self.asked < len && self.asked < self.have + OUTSTANDING * chunk {
            let left = len - self.asked;
            let piece = chunk.min(left).min(allowance);
            if piece < LEAST.min(left) {
                break;
            }
            requests.push(Fetch {
                digest,
                offset: self.asked,
                len: piece as u32,
            });
            self.asked += piece;
            self.unanswered += 1;
            allowance -= piece;
        }
        requests
    }

    /// Takes a chunk. One that is not the next is ignored. Returns whether it was taken.
    ///
    /// # Errors
    /// If the disk fails, more bytes come than were signed, or a complete part twice has the wrong
    /// digest.
    pub fn chunk(&mut self, chunk: &Chunk<'_>) -> Result<bool, PackageError> {
        let Some(want) = self.missing.last() else {
            return Ok(false);
        };
        let (len, digest) = want.bytes();
        if self.stale > 0 && chunk.digest != digest {
            self.stale -= 1;
            return Ok(false);
        }
        self.unanswered = self.unanswered.saturating_sub(1);
        let next = chunk.digest == digest && chunk.offset == self.have && !chunk.bytes.is_empty();
        if !next {
            return Ok(false);
        }
        let end = self.have + chunk.bytes.len() as u64;
        if end > len {
            // No honest sender has more than was signed.
            let path = want.file(&self.folder);
            return Err(untrusted(&path)(TrustError::TooLong));
        }
        let path = want.file(&self.folder);
        self.disk
            .write_at(&path, self.have, chunk.bytes)
            .map_err(at(&path))?;
        self.have = end;
        self.asked = self.asked.max(end);
        if self.have == len {
            self.finish()?;
            self.resume()?;
        }
        Ok(true)
    }

    /// The cloud does not have what was asked for. False if it can't be done without.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn not_found(&mut self) -> Result<bool, PackageError> {
        if self.stale > 0 {
            self.stale -= 1;
            return Ok(true);
        }
        self.unanswered = self.unanswered.saturating_sub(1);
        let shortcut = self.missing.last().is_some_and(|w| w.shortcut.is_some());
        if shortcut {
            self.leave_shortcut()?;
            self.resume()?;
        }
        Ok(shortcut)
    }

    /// Sets the position in the current part by what is on disk, and finishes parts whose bytes
    /// are all there.
    fn resume(&mut self) -> Result<(), PackageError> {
        while let Some(want) = self.missing.last() {
            let path = want.file(&self.folder);
            let (len, _) = want.bytes();
            self.have = self.disk.len(&path).map_err(at(&path))?.unwrap_or(0);
            if self.have > len {
                disk::forget(&*self.disk, &path).map_err(at(&path))?;
                self.have = 0;
            }
            self.asked = self.have;
            if self.have < len {
                return Ok(());
            }
            if len == 0 {
                self.disk.write_at(&path, 0, &[]).map_err(at(&path))?;
            }
            self.finish()?;
        }
        Ok(())
    }

    /// Checks a part whose bytes are all there. Wrong ones are fetched again once, since a power
    /// cut may have left rubbish in the file.
    fn finish(&mut self) -> Result<(), PackageError> {
        let Some(want) = self.missing.last().cloned() else {
            return Ok(());
        };
        let path = want.file(&self.folder);
        let bytes = self.disk.read(&path).map_err(at(&path))?;
        let (len, digest) = want.bytes();
        if bytes.len() as u64 != len || Digest::of(&bytes) != digest {
            disk::forget(&*self.disk, &path).map_err(at(&path))?;
            (self.have, self.asked) = (0, 0);
            let again = std::mem::replace(&mut self.again, true);
            return match want.shortcut {
                _ if !again => Ok(()),
                Some(_) => self.leave_shortcut(),
                None => Err(untrusted(&path)(TrustError::WrongDigest)),
            };
        }
        let Some(shortcut) = &want.shortcut else {
            rename(&*self.disk, &self.folder, want.part.kind)?;
            self.pop();
            return Ok(());
        };
        match self.rebuild(&want.part, shortcut, &bytes) {
            Ok(whole) => {
                install(&*self.disk, &self.folder, want.part.kind, &whole)?;
                self.pop();
                disk::forget(&*self.disk, &path).map_err(at(&path))
            }
            Err(why) => {
                tracing::warn!(
                    part = file_name(want.part.kind),
                    why,
                    "the difference to an older part is of no use; the whole part is fetched"
                );
                self.leave_shortcut()
            }
        }
    }

    /// The part that a difference makes, checked at both ends.
    fn rebuild(&self, part: &Part, shortcut: &Shortcut, delta: &[u8]) -> Result<Vec<u8>, String> {
        let base = self
            .disk
            .read(&shortcut.base)
            .map_err(|error| format!("{}: {error}", shortcut.base.display()))?;
        if Digest::of(&base) != shortcut.base_digest {
            return Err(format!(
                "{}: {}",
                shortcut.base.display(),
                TrustError::WrongBase
            ));
        }
        let whole = flywheel_delta::apply(shortcut.way, &base, delta, part.len as usize)
            .map_err(|error| error.to_string())?;
        check_part(part, &whole).map_err(|error| error.to_string())?;
        Ok(whole)
    }

    /// Goes on with the next part.
    fn pop(&mut self) {
        self.missing.pop();
        self.again = false;
        (self.have, self.asked) = (0, 0);
    }

    /// Goes on with the whole part. Answers about the difference that are under way still come.
    fn leave_shortcut(&mut self) -> Result<(), PackageError> {
        let Some(want) = self.missing.last().cloned() else {
            return Ok(());
        };
        let path = want.file(&self.folder);
        disk::forget(&*self.disk, &path).map_err(at(&path))?;
        if let Some(want) = self.missing.last_mut() {
            want.shortcut = None;
        }
        self.stale = std::mem::take(&mut self.unanswered);
        self.again = false;
        (self.have, self.asked) = (0, 0);
        Ok(())
    }
}

/// Stores a checked part, durably.
pub(super) fn install(
    disk: &dyn Disk,
    folder: &Path,
    kind: PartKind,
    bytes: &[u8],
) -> Result<(), PackageError> {
    let partial = partial(folder, kind);
    disk::forget(disk, &partial)
        .and_then(|()| disk.write_at(&partial, 0, bytes))
        .map_err(at(&partial))?;
    rename(disk, folder, kind)
}

/// Gives a part that was collected and checked its name, durably.
fn rename(disk: &dyn Disk, folder: &Path, kind: PartKind) -> Result<(), PackageError> {
    let partial = partial(folder, kind);
    let whole = folder.join(file_name(kind));
    disk.sync(&partial)
        .and_then(|()| disk.rename(&partial, &whole))
        .and_then(|()| disk.sync_folder(folder))
        .map_err(at(&whole))
}

fn partial(folder: &Path, kind: PartKind) -> PathBuf {
    folder.join(format!("{}.partial", file_name(kind)))
}
