//! Files named by the SHA-256 of their content: model parts, manifests, data sets. Pictures of
//! samples are not files of their own; they stay in the commit log.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use flywheel_shared::ids::Digest;

use super::StoreError;
use super::disk::{Disk, write_whole};

/// A folder of immutable files, in 256 folders by the first byte of the digest.
pub struct Blobs {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    /// Held while writing: two writers of one blob would share its temporary file.
    writing: Mutex<()>,
}

impl Blobs {
    pub(super) fn open(disk: Arc<dyn Disk>, dir: &Path) -> Result<Self, StoreError> {
        fs::create_dir_all(dir).map_err(|error| StoreError::io(dir, &error))?;
        Ok(Self {
            dir: dir.to_owned(),
            disk,
            writing: Mutex::new(()),
        })
    }

    /// Stores bytes and returns their name, once they are on the medium. Storing what is there
    /// already does nothing.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        // An existing file is whole, because it got its name after its bytes were synced; only
        // damage since could make it differ, and then it is written anew.
        if matches!(self.get(&digest), Ok(Some(_))) {
            return Ok(digest);
        }
        let path = self.path(&digest);
        let dir = path.parent().unwrap_or(&self.dir);
        if !dir.is_dir() {
            fs::create_dir_all(dir)
                .and_then(|()| self.disk.sync_dir(&self.dir))
                .map_err(|error| StoreError::io(dir, &error))?;
        }
        write_whole(&*self.disk, &path, bytes)?;
        Ok(digest)
    }

    /// The bytes of a blob, checked against its name; `None` if it is not stored.
    pub fn get(&self, digest: &Digest) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.path(digest);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io(&path, &error)),
        };
        if Digest::of(&bytes) != *digest {
            return Err(StoreError::Corrupt {
                path,
                why: "its content no longer has the digest that names it".to_owned(),
            });
        }
        Ok(Some(bytes))
    }

    /// Length in bytes; `None` if it is not stored.
    pub fn len(&self, digest: &Digest) -> Result<Option<u64>, StoreError> {
        let path = self.path(digest);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::io(&path, &error)),
        }
    }

    /// Up to `len` bytes from `offset`, fewer at the end; `None` if the blob is not stored or ends
    /// at or before `offset`. The digest is not checked: who fetches the whole checks it.
    pub fn read_at(
        &self,
        digest: &Digest,
        offset: u64,
        len: usize,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.path(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io(&path, &error)),
        };
        let read = (|| {
            let rest = file.metadata()?.len().saturating_sub(offset);
            let len = len.min(usize::try_from(rest).unwrap_or(usize::MAX));
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, offset)?;
            Ok(bytes)
        })();
        let bytes = read.map_err(|error| StoreError::io(&path, &error))?;
        Ok((!bytes.is_empty()).then_some(bytes))
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.dir.join(&name[..2]).join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk::RealDisk;
    use super::super::disk::faulty::{Faults, FaultyDisk};
    use super::*;
    use std::sync::atomic::Ordering::SeqCst;

    #[test]
    fn pieces_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(Arc::new(RealDisk), dir.path()).unwrap();
        let digest = blobs.put(b"hello world").unwrap();
        assert_eq!(blobs.put(b"hello world").unwrap(), digest);
        assert_eq!(blobs.len(&digest).unwrap(), Some(11));
        assert_eq!(blobs.get(&digest).unwrap().unwrap(), b"hello world");
        assert_eq!(blobs.read_at(&digest, 6, 100).unwrap().unwrap(), b"world");
        assert_eq!(blobs.read_at(&digest, 0, 5).unwrap().unwrap(), b"hello");
        assert_eq!(blobs.read_at(&digest, 11, 5).unwrap(), None);
        assert_eq!(blobs.read_at(&digest, u64::MAX, 5).unwrap(), None);
        assert_eq!(blobs.get(&Digest::of(b"other")).unwrap(), None);
    }

    #[test]
    fn a_damaged_blob_is_named_and_can_be_put_again() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(Arc::new(RealDisk), dir.path()).unwrap();
        let digest = blobs.put(b"hello").unwrap();
        fs::write(blobs.path(&digest), b"jello").unwrap();
        let error = blobs.get(&digest).unwrap_err().to_string();
        assert!(error.contains(&digest.to_string()), "{error}");
        blobs.put(b"hello").unwrap();
        assert_eq!(blobs.get(&digest).unwrap().unwrap(), b"hello");
    }

    #[test]
    fn a_full_disk_leaves_no_half_blob() {
        let faults = Faults::none();
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(Arc::new(FaultyDisk(faults.clone())), dir.path()).unwrap();
        faults.space.store(3, SeqCst);
        assert!(matches!(blobs.put(b"hello"), Err(StoreError::Full { .. })));
        assert_eq!(blobs.get(&Digest::of(b"hello")).unwrap(), None);
        faults.space.store(u64::MAX, SeqCst);
        let digest = blobs.put(b"hello").unwrap();
        assert_eq!(blobs.get(&digest).unwrap().unwrap(), b"hello");
    }
}
