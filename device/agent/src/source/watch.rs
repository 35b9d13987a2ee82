//! `dir:PATH?watch=1`: a folder that pictures are put into. Each new picture is a frame, once, in
//! the order of the names; one that is written anew (`latest.jpg`) is a new frame.
//!
//! Whoever writes a picture may be slow, so a file counts only when it has not changed from one
//! look to the next, and one that does not decode then is tried again until a deadline after its
//! last change.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Instant, UNIX_EPOCH};

use super::dir::{decode, walk};
use super::query::Query;
use super::{Captured, FrameBuf, Read, Source, SourceError};

/// How a file looks from outside; if it changes, the file was written to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stamp {
    len: u64,
    /// Time of the last write, Unix milliseconds.
    modified_ms: u64,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    stamp: Stamp,
    changed_ms: u64,
    /// It did not change from one look to the next.
    settled: bool,
    /// It was a frame, or was given up.
    done: bool,
}

/// Decides which file is the next frame. Times are milliseconds from any origin.
#[derive(Debug, Default)]
struct Watcher {
    files: BTreeMap<PathBuf, Known>,
    deadline_ms: u64,
    /// Files up to this one were frames before a restart. It counts only for the first look.
    mark: Option<PathBuf>,
}

impl Watcher {
    /// Takes a look at the folder. What is gone is forgotten.
    fn look(&mut self, now_ms: u64, listing: Vec<(PathBuf, Stamp)>) {
        let mark = self.mark.take();
        let mut before = std::mem::take(&mut self.files);
        for (path, stamp) in listing {
            let known = match before.remove(&path) {
                Some(known) if known.stamp == stamp => Known {
                    settled: true,
                    ..known
                },
                Some(_) => Known {
                    stamp,
                    changed_ms: now_ms,
                    settled: false,
                    done: false,
                },
                None => Known {
                    stamp,
                    changed_ms: now_ms,
                    settled: false,
                    done: mark.as_ref().is_some_and(|mark| path <= *mark),
                },
            };
            self.files.insert(path, known);
        }
    }

    /// The file that is to be read next.
    fn next(&self) -> Option<(&Path, Stamp)> {
        self.files
            .iter()
            .find(|(_, known)| known.settled && !known.done)
            .map(|(path, known)| (path.as_path(), known.stamp))
    }

    /// The file was a frame.
    fn taken(&mut self, path: &Path) {
        if let Some(known) = self.files.get_mut(path) {
            known.done = true;
        }
    }

    /// The file does not decode. True if it is given up now; else it is to be tried again.
    fn refused(&mut self, now_ms: u64, path: &Path) -> bool {
        let Some(known) = self.files.get_mut(path) else {
            return true;
        };
        known.done = now_ms.saturating_sub(known.changed_ms) >= self.deadline_ms;
        known.done
    }
}

/// A watched folder as a source.
pub(super) struct WatchSource {
    id: String,
    root: PathBuf,
    watcher: Watcher,
    poll_ms: u64,
    next_look_ms: u64,
    /// Milliseconds from any origin.
    clock: Box<dyn Fn() -> u64 + Send>,
}

impl WatchSource {
    /// Opens a folder, which may be empty yet.
    pub(super) fn open(uri: &str, root: &Path, query: Query) -> Result<Self, SourceError> {
        let started = Instant::now();
        let clock = move || started.elapsed().as_millis() as u64;
        Self::with_clock(uri, root, query, Box::new(clock))
    }

    pub(super) fn with_clock(
        uri: &str,
        root: &Path,
        mut query: Query,
        clock: Box<dyn Fn() -> u64 + Send>,
    ) -> Result<Self, SourceError> {
        let poll_ms = query.value("poll_ms", 200, "milliseconds between two looks")?;
        let deadline_ms = query.value("deadline_ms", 2000, "milliseconds")?;
        query.finish()?;
        // A folder that is not there is a mistake now and an accident later.
        let mut found = Vec::new();
        walk(root, &mut found)?;
        Ok(Self {
            id: uri.to_owned(),
            root: root.to_owned(),
            watcher: Watcher {
                deadline_ms,
                ..Watcher::default()
            },
            poll_ms,
            next_look_ms: 0,
            clock,
        })
    }

    fn look(&mut self, now_ms: u64) -> Result<(), SourceError> {
        let mut paths = Vec::new();
        walk(&self.root, &mut paths)?;
        let stamp = |path: PathBuf| {
            // It may be gone already.
            let meta = fs::metadata(&path).ok()?;
            let modified_ms = meta
                .modified()
                .ok()
                .and_then(|at| at.duration_since(UNIX_EPOCH).ok())
                .map_or(0, |since| since.as_millis() as u64);
            let len = meta.len();
            Some((path, Stamp { len, modified_ms }))
        };
        let listing = paths.into_iter().filter_map(stamp).collect();
        self.watcher.look(now_ms, listing);
        Ok(())
    }

    fn name(&self, path: &Path) -> String {
        path.strip_prefix(&self.root)
            .unwrap_or(path)
            .display()
            .to_string()
    }
}

impl Source for WatchSource {
    fn id(&self) -> &str {
        &self.id
    }

    fn read(&mut self, index: u64, into: &mut FrameBuf) -> Result<Read, SourceError> {
        let now_ms = (self.clock)();
        if now_ms >= self.next_look_ms {
            self.next_look_ms = now_ms + self.poll_ms;
            self.look(now_ms)?;
        }
        let Some((path, stamp)) = self.watcher.next() else {
            return Ok(Read::NotYet);
        };
        let path = path.to_owned();
        let decoded = fs::read(&path)
            .map_err(|error| error.to_string())
            .and_then(decode);
        let name = self.name(&path);
        let picture = match decoded {
            Ok(picture) => picture,
            Err(why) if self.watcher.refused(now_ms, &path) => {
                into.mark = name.clone();
                return Ok(Read::Skipped { name, why });
            }
            Err(_) => return Ok(Read::NotYet),
        };
        self.watcher.taken(&path);
        into.mark = name;
        picture.fill(into);
        into.meta = Captured {
            captured_ms: stamp.modified_ms,
            track: index,
            ..into.meta
        };
        Ok(Read::Frame)
    }

    fn is_live(&self) -> bool {
        true
    }

    fn resume(&mut self, mark: &str) {
        if !mark.is_empty() {
            self.watcher.mark = Some(self.root.join(mark));
        }
    }

    /// Unknown: what a folder will hold nobody knows.
    fn truth(&self, _index: u64) -> Option<String> {
        None
    }

    fn len(&self) -> Option<u64> {
        None
    }

    fn classes(&self) -> Vec<String> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    struct Folder {
        dir: tempfile::TempDir,
        now: Arc<AtomicU64>,
        source: WatchSource,
        index: u64,
    }

    fn open(dir: tempfile::TempDir, mark: &str) -> Folder {
        let now = Arc::new(AtomicU64::new(0));
        let clock = Arc::clone(&now);
        let query = Query::parse("dir:x", "poll_ms=10&deadline_ms=100").unwrap();
        let mut source = WatchSource::with_clock(
            "dir:x?watch=1",
            dir.path(),
            query,
            Box::new(move || clock.load(Ordering::Relaxed)),
        )
        .unwrap();
        source.resume(mark);
        Folder {
            dir,
            now,
            source,
            index: 0,
        }
    }

    impl Folder {
        fn write(&self, name: &str, bytes: &[u8]) {
            fs::write(self.dir.path().join(name), bytes).unwrap();
        }

        /// Reads until there is nothing now; names of frames, and of skipped files with a `!`.
        fn read(&mut self) -> Vec<String> {
            let mut frame = FrameBuf::new();
            let mut names = Vec::new();
            loop {
                match self.source.read(self.index, &mut frame).unwrap() {
                    Read::Frame => names.push(frame.mark.clone()),
                    Read::Skipped { name, .. } => names.push(format!("!{name}")),
                    Read::NotYet => return names,
                    Read::End => panic!("a watched folder never ends"),
                }
                self.index += 1;
            }
        }

        fn pass(&self, ms: u64) {
            self.now.fetch_add(ms, Ordering::Relaxed);
        }

        /// Two looks, so that what was written is known to be whole.
        fn settle(&mut self) -> Vec<String> {
            self.pass(10);
            let mut names = self.read();
            self.pass(10);
            names.extend(self.read());
            names
        }
    }

    fn picture(format: image::ImageFormat, side: u32) -> Vec<u8> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        image::RgbImage::from_fn(side, side, |x, y| {
            image::Rgb([(x * 7) as u8, (y * 5) as u8, (x * y) as u8])
        })
        .write_to(&mut bytes, format)
        .unwrap();
        bytes.into_inner()
    }

    #[test]
    fn new_files_become_frames_in_the_order_of_their_names() {
        use image::ImageFormat::{Bmp, Jpeg, Png, Pnm};
        let mut folder = open(tempfile::tempdir().unwrap(), "");
        assert!(folder.settle().is_empty());
        folder.write("b.png", &picture(Png, 8));
        folder.write("a.jpg", &picture(Jpeg, 16));
        folder.write("notes.txt", b"not a picture");
        assert_eq!(folder.settle(), ["a.jpg", "b.png"]);
        assert!(folder.settle().is_empty());
        folder.write("d.ppm", &picture(Pnm, 9));
        folder.write("c.bmp", &picture(Bmp, 5));
        assert_eq!(folder.settle(), ["c.bmp", "d.ppm"]);
        // Written anew, and so a new frame.
        folder.write("a.jpg", &picture(Jpeg, 24));
        assert_eq!(folder.settle(), ["a.jpg"]);
    }

    #[test]
    fn a_file_that_is_being_written_is_waited_for() {
        let whole = picture(image::ImageFormat::Jpeg, 64);
        let mut folder = open(tempfile::tempdir().unwrap(), "");
        for cut in [0, 1, 10, whole.len() / 2, whole.len() - 1] {
            folder.write("a.jpg", &whole[..cut]);
            assert!(folder.settle().is_empty(), "cut at {cut}");
            // Still no change at the next looks, but within the deadline.
            folder.pass(30);
            assert!(folder.settle().is_empty(), "cut at {cut}");
        }
        folder.write("a.jpg", &whole);
        assert_eq!(folder.settle(), ["a.jpg"]);
    }

    #[test]
    fn what_never_becomes_a_picture_is_skipped_by_name_and_holds_up_nobody_for_long() {
        let good = picture(image::ImageFormat::Png, 8);
        let mut folder = open(tempfile::tempdir().unwrap(), "");
        folder.write("a.png", &good[..20]);
        folder.write("b.jpg", b"");
        folder.write("c.png", &good);
        assert!(folder.settle().is_empty());
        folder.pass(100);
        assert_eq!(folder.read(), ["!a.png", "!b.jpg", "c.png"]);
        assert_eq!(folder.index, 3);
        folder.pass(1000);
        assert!(folder.settle().is_empty());
    }

    #[test]
    fn a_restart_goes_on_after_the_last_frame() {
        let good = picture(image::ImageFormat::Png, 8);
        let mut folder = open(tempfile::tempdir().unwrap(), "");
        for name in ["1.png", "2.png", "3.png"] {
            folder.write(name, &good);
        }
        assert_eq!(folder.settle().len(), 3);
        folder.write("4.png", &good);
        // What is deleted meanwhile changes nothing.
        fs::remove_file(folder.dir.path().join("1.png")).unwrap();
        let mut folder = open(folder.dir, "3.png");
        assert_eq!(folder.settle(), ["4.png"]);
        folder.write("0.png", &good);
        assert_eq!(folder.settle(), ["0.png"]);
    }
}
