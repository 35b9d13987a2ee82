//! A disk that loses power: what was written and not synced is kept in any part and any order.
//!
//! A file's bytes become durable when the file is synced, its name when its folder is. A power cut
//! keeps of the rest any set of names made, changed and deleted, and of each write any set of its
//! sectors, each as written, as before, or as zeros.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use flywheel_agent::models::Disk;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

const SECTOR: u64 = 512;

/// What is on a medium.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Image {
    /// The number of the file that has a name; `None` for a folder.
    names: BTreeMap<PathBuf, Option<u64>>,
    files: BTreeMap<u64, Vec<u8>>,
}

#[derive(Clone, Debug)]
enum Pending {
    Write {
        file: u64,
        offset: u64,
        bytes: Vec<u8>,
    },
    Name(Name),
}

#[derive(Clone, Debug)]
enum Name {
    Made {
        path: PathBuf,
        file: Option<u64>,
    },
    Moved {
        from: PathBuf,
        to: PathBuf,
        file: u64,
    },
    Gone {
        path: PathBuf,
    },
}

impl Name {
    fn folder(&self) -> Option<&Path> {
        match self {
            Self::Made { path, .. } | Self::Gone { path } => path.parent(),
            Self::Moved { to, .. } => to.parent(),
        }
    }
}

impl Image {
    fn write(&mut self, file: u64, offset: u64, bytes: &[u8]) {
        let content = self.files.entry(file).or_default();
        let end = offset as usize + bytes.len();
        if content.len() < end {
            content.resize(end, 0);
        }
        content[offset as usize..end].copy_from_slice(bytes);
    }

    fn name(&mut self, change: &Name) {
        match change {
            Name::Made { path, file } => {
                self.names.insert(path.clone(), *file);
            }
            Name::Moved { from, to, file } => {
                self.names.remove(from);
                self.names.insert(to.clone(), Some(*file));
            }
            Name::Gone { path } => {
                self.names.remove(path);
            }
        }
    }

    /// Forgets what no folder leads to.
    fn prune(&mut self) {
        let folders: Vec<PathBuf> = self.names.keys().cloned().collect();
        let reachable = |path: &Path| {
            path.ancestors()
                .skip(1)
                .filter(|above| *above != Path::new("/") && *above != Path::new(""))
                .all(|above| folders.iter().any(|folder| folder == above))
        };
        self.names.retain(|path, _| reachable(path));
        let named: Vec<u64> = self.names.values().flatten().copied().collect();
        self.files.retain(|file, _| named.contains(file));
        for file in named {
            self.files.entry(file).or_default();
        }
    }
}

/// A disk at one moment: durable, as programs see it, and what lies between.
#[derive(Clone, Debug, Default)]
pub struct Medium {
    durable: Image,
    now: Image,
    pending: Vec<Pending>,
    files: u64,
}

/// How much of what was not synced a power cut keeps.
#[derive(Clone, Copy, Debug)]
pub enum Cut {
    /// Nothing.
    None,
    /// Everything.
    All,
    /// What came first, so many operations.
    First(usize),
    /// What came last, so many operations.
    Last(usize),
    /// Each piece with this chance in 256.
    Chance(u8),
}

impl Medium {
    /// Operations that a power cut may undo.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// The disk after a power cut.
    pub fn cut(&self, cut: Cut, rng: &mut ChaCha8Rng) -> Self {
        let mut image = self.durable.clone();
        let count = self.pending.len();
        for (at, pending) in self.pending.iter().enumerate() {
            let keeps = |rng: &mut ChaCha8Rng| match cut {
                Cut::None => false,
                Cut::All => true,
                Cut::First(some) => at < some,
                Cut::Last(some) => at + some >= count,
                Cut::Chance(chance) => rng.next_u32() as u8 <= chance,
            };
            match pending {
                Pending::Name(change) => {
                    if keeps(rng) {
                        image.name(change);
                    }
                }
                Pending::Write {
                    file,
                    offset,
                    bytes,
                } => {
                    let mut start = *offset;
                    let end = offset + bytes.len() as u64;
                    while start < end {
                        let stop = end.min((start / SECTOR + 1) * SECTOR);
                        let piece = &bytes[(start - offset) as usize..(stop - offset) as usize];
                        let kept = keeps(rng);
                        let torn =
                            matches!(cut, Cut::Chance(_)) && rng.next_u32().is_multiple_of(16);
                        if torn {
                            image.write(*file, start, &vec![0; piece.len()]);
                        } else if kept {
                            image.write(*file, start, piece);
                        }
                        start = stop;
                    }
                }
            }
        }
        image.prune();
        Self {
            now: image.clone(),
            durable: image,
            pending: Vec::new(),
            files: self.files,
        }
    }

    /// A number that differs for different contents.
    pub fn print(&self) -> u64 {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        // By name, since numbers of files mean nothing.
        for (path, file) in &self.now.names {
            path.hash(&mut hasher);
            file.map(|file| &self.now.files[&file]).hash(&mut hasher);
        }
        hasher.finish()
    }
}

/// The disk; `N` is what is noted with every moment on the tape.
#[derive(Debug)]
pub struct SimDisk<N> {
    medium: Mutex<Medium>,
    /// The disk before each operation that changes it, and the note of that time.
    tape: Mutex<Option<Vec<(Medium, N)>>>,
    note: Mutex<N>,
}

impl<N: Clone> SimDisk<N> {
    pub fn new(medium: Medium, note: N) -> Self {
        Self {
            medium: Mutex::new(medium),
            tape: Mutex::new(None),
            note: Mutex::new(note),
        }
    }

    /// Begins to record.
    pub fn record(&self) {
        *self.tape.lock().unwrap() = Some(Vec::new());
    }

    /// Everything recorded, and the present moment.
    pub fn tape(&self) -> Vec<(Medium, N)> {
        let mut tape = self.tape.lock().unwrap().take().unwrap_or_default();
        tape.push((self.medium(), self.note()));
        tape
    }

    pub fn medium(&self) -> Medium {
        self.medium.lock().unwrap().clone()
    }

    pub fn note(&self) -> N {
        self.note.lock().unwrap().clone()
    }

    pub fn annotate(&self, change: impl FnOnce(&mut N)) {
        change(&mut self.note.lock().unwrap());
    }

    /// One operation that changes something.
    fn change<T>(&self, act: impl FnOnce(&mut Medium) -> io::Result<T>) -> io::Result<T> {
        if let Some(tape) = &mut *self.tape.lock().unwrap() {
            tape.push((self.medium(), self.note()));
        }
        act(&mut self.medium.lock().unwrap())
    }
}

impl Medium {
    fn file(&self, path: &Path) -> io::Result<u64> {
        match self.now.names.get(path) {
            Some(Some(file)) => Ok(*file),
            Some(None) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn folder(&self, path: &Path) -> io::Result<()> {
        match self.now.names.get(path) {
            Some(None) => Ok(()),
            Some(Some(_)) => Err(io::ErrorKind::NotADirectory.into()),
            None if path == Path::new("/") => Ok(()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn name(&mut self, change: Name) {
        self.now.name(&change);
        self.pending.push(Pending::Name(change));
    }
}

impl<N: Clone + Send + std::fmt::Debug> Disk for SimDisk<N> {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let medium = self.medium.lock().unwrap();
        let file = medium.file(path)?;
        Ok(medium.now.files.get(&file).cloned().unwrap_or_default())
    }

    fn len(&self, path: &Path) -> io::Result<Option<u64>> {
        match self.read(path) {
            Ok(bytes) => Ok(Some(bytes.len() as u64)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        let medium = self.medium.lock().unwrap();
        medium.folder(folder)?;
        let inside = |path: &&PathBuf| path.parent() == Some(folder);
        Ok(medium.now.names.keys().filter(inside).cloned().collect())
    }

    fn make_folder(&self, folder: &Path) -> io::Result<()> {
        self.change(|medium| {
            if let Some(above) = folder.parent() {
                medium.folder(above)?;
            }
            match medium.now.names.get(folder) {
                Some(None) => Ok(()),
                Some(Some(_)) => Err(io::ErrorKind::AlreadyExists.into()),
                None => {
                    medium.name(Name::Made {
                        path: folder.to_owned(),
                        file: None,
                    });
                    Ok(())
                }
            }
        })
    }

    fn write_at(&self, path: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.change(|medium| {
            medium.folder(path.parent().unwrap_or(Path::new("/")))?;
            let file = match medium.now.names.get(path) {
                Some(Some(file)) => *file,
                Some(None) => return Err(io::ErrorKind::IsADirectory.into()),
                None => {
                    medium.files += 1;
                    let file = medium.files;
                    medium.name(Name::Made {
                        path: path.to_owned(),
                        file: Some(file),
                    });
                    file
                }
            };
            medium.now.write(file, offset, bytes);
            medium.pending.push(Pending::Write {
                file,
                offset,
                bytes: bytes.to_vec(),
            });
            Ok(())
        })
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        self.change(|medium| {
            let synced = medium.file(path)?;
            let durable = &mut medium.durable;
            medium.pending.retain(|pending| match pending {
                Pending::Write {
                    file,
                    offset,
                    bytes,
                } if *file == synced => {
                    durable.write(*file, *offset, bytes);
                    false
                }
                _ => true,
            });
            Ok(())
        })
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        self.change(|medium| {
            medium.folder(folder)?;
            let durable = &mut medium.durable;
            medium.pending.retain(|pending| match pending {
                Pending::Name(change) if change.folder() == Some(folder) => {
                    durable.name(change);
                    false
                }
                _ => true,
            });
            Ok(())
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(|medium| {
            let file = medium.file(from)?;
            medium.name(Name::Moved {
                from: from.to_owned(),
                to: to.to_owned(),
                file,
            });
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.change(|medium| {
            medium.file(path)?;
            medium.name(Name::Gone {
                path: path.to_owned(),
            });
            Ok(())
        })
    }

    fn remove_folder(&self, folder: &Path) -> io::Result<()> {
        self.change(|medium| {
            medium.folder(folder)?;
            if medium
                .now
                .names
                .keys()
                .any(|path| path.parent() == Some(folder))
            {
                return Err(io::ErrorKind::DirectoryNotEmpty.into());
            }
            medium.name(Name::Gone {
                path: folder.to_owned(),
            });
            Ok(())
        })
    }
}
