//! The file operations that durability depends on, behind a trait, so that a full disk or a power
//! cut after any byte is a test case.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use super::StoreError;

/// Makes files and makes them durable.
pub trait Disk: Send + Sync {
    /// Opens a file for appending; makes it if it does not exist.
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// Makes the names in a folder durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    /// Gives a file another name, replacing what has it.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }
}

/// One file that grows at its end.
pub trait DiskFile: Send {
    /// Writes all of `bytes` at the end; on an error any part of them may have been written.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Cuts the file to `len` bytes.
    fn truncate(&mut self, len: u64) -> io::Result<()>;
    /// Returns once everything written is on the medium.
    fn sync(&mut self) -> io::Result<()>;
}

/// The real file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(path)?;
        Ok(Box::new(RealFile(file)))
    }
}

struct RealFile(File);

impl DiskFile for RealFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }
}

/// Writes `bytes` under `path` so that after a crash there is all of it or nothing: a temporary
/// file beside it, synced, renamed, and the folder synced.
pub(crate) fn write_whole(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let temporary = path.with_extension("tmp");
    let written = (|| {
        let mut file = disk.open(&temporary)?;
        // A leftover of a crash may be there.
        file.truncate(0)?;
        file.append(bytes)?;
        file.sync()?;
        disk.rename(&temporary, path)?;
        disk.sync_dir(dir)
    })();
    written.map_err(|error| {
        // Frees the space of what could not be finished; a failure here is not worth reporting.
        let _ = fs::remove_file(&temporary);
        StoreError::io(path, &error)
    })
}

#[cfg(test)]
pub(crate) mod faulty {
    //! A disk that runs full and whose syncs fail on command.

    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

    /// What the disk does next; shared with the test.
    #[derive(Default)]
    pub struct Faults {
        /// Bytes that still fit.
        pub space: AtomicU64,
        /// Whether a sync fails.
        pub sync_fails: AtomicBool,
        /// Whether cutting a file fails.
        pub truncate_fails: AtomicBool,
    }

    impl Faults {
        pub fn none() -> Arc<Self> {
            let faults = Self::default();
            faults.space.store(u64::MAX, SeqCst);
            Arc::new(faults)
        }
    }

    pub struct FaultyDisk(pub Arc<Faults>);

    impl Disk for FaultyDisk {
        fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
            let real = RealDisk.open(path)?;
            Ok(Box::new(FaultyFile {
                real,
                faults: self.0.clone(),
            }))
        }
    }

    struct FaultyFile {
        real: Box<dyn DiskFile>,
        faults: Arc<Faults>,
    }

    impl DiskFile for FaultyFile {
        fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
            let space = self.faults.space.load(SeqCst);
            let fits = bytes
                .len()
                .min(usize::try_from(space).unwrap_or(usize::MAX));
            if space != u64::MAX {
                self.faults.space.store(space - fits as u64, SeqCst);
            }
            self.real.append(&bytes[..fits])?;
            if fits < bytes.len() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            Ok(())
        }

        fn truncate(&mut self, len: u64) -> io::Result<()> {
            if self.faults.truncate_fails.load(SeqCst) {
                return Err(io::Error::other("injected"));
            }
            self.real.truncate(len)
        }

        fn sync(&mut self) -> io::Result<()> {
            if self.faults.sync_fails.load(SeqCst) {
                return Err(io::Error::other("injected"));
            }
            self.real.sync()
        }
    }
}
