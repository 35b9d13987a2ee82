//! Capturing on a thread of its own, for paces that have a rate: the source is read at its rate
//! whatever inference does, into buffers that are allocated once.
//!
//! Which frames wait and which give way is [`device_core::backlog`]'s to say. Buffers are swapped,
//! never copied: one is being filled, one is looked at, and the rest wait on the [`Shelf`].

use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use device_core::backlog::{Backlog, Taken, Totals};
use device_core::pace::{Next, Pace, Pacer};

use crate::clock::{Clock, SystemClock};
use crate::shared::{Shared, lock};
use crate::source::{FrameBuf, Read, Source, SourceError};

/// Frames in a row that may fail before the source is given up.
pub const MAX_FAILURES: u32 = 100;
/// How soon a source that has nothing yet is asked again, in milliseconds.
pub const ASK_AGAIN_MS: u64 = 20;

/// Where captured frames wait.
pub struct Shelf(Mutex<Inner>);

struct Inner {
    backlog: Backlog,
    frames: Vec<FrameBuf>,
    ended: bool,
    failed: Option<SourceError>,
    /// No frame is due yet, or the source answered last that it has nothing: no fault of it.
    quiet: bool,
}

/// What the shelf holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stock {
    /// A frame at least.
    Frames,
    /// Nothing now. `quiet` if that is as it should be.
    Empty {
        /// Whether no frame is due yet, or the source answers that it has none.
        quiet: bool,
    },
    /// Nothing any more: the source has ended or was given up.
    Ended,
}

impl Shelf {
    fn new(frames: usize, first: u64) -> Self {
        Self(Mutex::new(Inner {
            backlog: Backlog::new(frames, first),
            frames: vec![FrameBuf::new(); frames],
            ended: false,
            failed: None,
            quiet: false,
        }))
    }

    /// Whether there is a frame to take.
    pub fn stock(&self) -> Stock {
        let inner = lock(&self.0);
        if !inner.backlog.is_empty() {
            Stock::Frames
        } else if inner.ended {
            Stock::Ended
        } else {
            Stock::Empty { quiet: inner.quiet }
        }
    }

    /// Takes the oldest frame in exchange for a used buffer.
    pub fn take(&self, buffer: &mut FrameBuf) -> Option<Taken> {
        let mut inner = lock(&self.0);
        let taken = inner.backlog.take()?;
        std::mem::swap(inner.frames.get_mut(taken.slot)?, buffer);
        Some(taken)
    }

    /// Why the source was given up, once.
    pub fn failure(&self) -> Option<SourceError> {
        lock(&self.0).failed.take()
    }

    /// How far the source came.
    pub fn totals(&self) -> Totals {
        lock(&self.0).backlog.totals()
    }
}

/// What to do after a step of a [`Capturer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Step again at this time in milliseconds.
    At(u64),
    /// Step again now; the shelf has changed.
    Again,
    /// The source has ended or was given up.
    Ended,
}

/// The capturing side.
pub struct Capturer {
    source: Box<dyn Source>,
    pacer: Pacer,
    frame: FrameBuf,
    shelf: Arc<Shelf>,
    index: u64,
    failures: u32,
}

impl Capturer {
    /// A capturer that reads `source` from frame `first` on at `fps` frames a second, with
    /// `waiting` buffers for frames that wait.
    pub fn new(source: Box<dyn Source>, fps: f32, first: u64, waiting: usize) -> Self {
        Self {
            source,
            pacer: Pacer::new(Pace::Fps(fps)),
            frame: FrameBuf::new(),
            shelf: Arc::new(Shelf::new(waiting, first)),
            index: first,
            failures: 0,
        }
    }

    /// Where it puts frames.
    pub fn shelf(&self) -> Arc<Shelf> {
        Arc::clone(&self.shelf)
    }

    /// Captures the frame that is due at `now_ms`, if one is.
    pub fn step(&mut self, now_ms: u64) -> Then {
        let missed = match self.pacer.next(now_ms, self.index, u64::MAX, false) {
            Next::Take { dropped } => dropped,
            Next::WaitUntil(at_ms) => {
                // Seconds may lie between two frames, or hours.
                lock(&self.shelf.0).quiet = true;
                return Then::At(at_ms);
            }
            Next::Hold => return Then::At(now_ms + ASK_AGAIN_MS),
        };
        // A replayed source plays a camera, whose frames do not wait. A live one has given what it
        // had: that it was asked late loses nothing.
        if missed > 0 && !self.source.is_live() {
            self.index = self.index.saturating_add(missed);
            lock(&self.shelf.0).backlog.miss(missed);
        }
        // Before the read, which may hang.
        lock(&self.shelf.0).quiet = false;
        let read = self.source.read(self.index, &mut self.frame);
        let mut inner = lock(&self.shelf.0);
        match read {
            Ok(Read::Frame) => {
                self.failures = 0;
                self.index += 1;
                let put = inner.backlog.put();
                if let Some(slot) = inner.frames.get_mut(put.slot) {
                    std::mem::swap(slot, &mut self.frame);
                }
            }
            Ok(Read::NotYet) => {
                inner.quiet = true;
                return Then::At(now_ms + ASK_AGAIN_MS);
            }
            Ok(Read::Skipped { name, why }) => {
                tracing::warn!(frame = self.index, file = name, why, "frame skipped");
                self.index += 1;
                inner.backlog.skip();
                inner.quiet = true;
            }
            Ok(Read::End) => {
                tracing::info!(frames = self.index, "the source has ended");
                inner.ended = true;
                return Then::Ended;
            }
            Err(error) => {
                tracing::error!(frame = self.index, %error, "the source failed; the frame is skipped");
                self.failures += 1;
                self.index += 1;
                inner.backlog.skip();
                if self.failures >= MAX_FAILURES {
                    inner.failed = Some(error);
                    inner.ended = true;
                    return Then::Ended;
                }
            }
        }
        Then::Again
    }

    /// Captures on a thread of its own until told to stop ([`crate::shared::Signals::stop`]) or
    /// the source ends. The thread is not waited for: a camera may hang.
    pub fn spawn(mut self, shared: Arc<Shared>) -> std::io::Result<JoinHandle<()>> {
        let clock = SystemClock::new();
        thread::Builder::new()
            .name("flywheel-camera".to_owned())
            .spawn(move || {
                loop {
                    if shared.signals().0.stop {
                        return;
                    }
                    let now_ms = clock.now_us() / 1000;
                    match self.step(now_ms) {
                        Then::Again => shared.signal(|_| {}),
                        Then::Ended => {
                            shared.signal(|_| {});
                            return;
                        }
                        Then::At(at_ms) => {
                            let wait = Duration::from_millis(at_ms.saturating_sub(now_ms));
                            thread::sleep(wait.min(Duration::from_millis(500)));
                        }
                    }
                }
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source;

    /// A source that fails from one frame on.
    struct Failing(Box<dyn Source>, u64);

    impl Source for Failing {
        fn id(&self) -> &str {
            self.0.id()
        }
        fn read(&mut self, index: u64, into: &mut FrameBuf) -> Result<Read, SourceError> {
            if index >= self.1 {
                return Err(SourceError::Scheme {
                    uri: "gone".to_owned(),
                });
            }
            self.0.read(index, into)
        }
        fn truth(&self, _: u64) -> Option<String> {
            None
        }
        fn len(&self) -> Option<u64> {
            None
        }
        fn classes(&self) -> Vec<String> {
            Vec::new()
        }
    }

    fn roads() -> Box<dyn Source> {
        source::open("sim:roads?seed=1&size=16").unwrap()
    }

    /// Steps the capturer at every time it asks for, up to `until_ms`.
    fn play(capturer: &mut Capturer, from_ms: u64, until_ms: u64) -> Then {
        let mut now = from_ms;
        loop {
            match capturer.step(now) {
                Then::At(at) if at > until_ms => return Then::At(at),
                Then::At(at) => now = at,
                Then::Again => {}
                Then::Ended => return Then::Ended,
            }
        }
    }

    #[test]
    fn frames_come_at_the_rate_and_the_oldest_give_way() {
        let mut capturer = Capturer::new(roads(), 10.0, 100, 3);
        let shelf = capturer.shelf();
        assert_eq!(shelf.stock(), Stock::Empty { quiet: false });
        play(&mut capturer, 0, 950);
        assert_eq!(
            shelf.totals(),
            Totals {
                next: 110,
                dropped: 7,
                skipped: 0
            }
        );
        let mut frame = FrameBuf::new();
        let mut expected = FrameBuf::new();
        for index in 107..110 {
            let taken = shelf.take(&mut frame).unwrap();
            assert_eq!((taken.index, taken.dropped), (index, 7));
            roads().read(index, &mut expected).unwrap();
            assert_eq!(frame.pixels, expected.pixels);
            assert_eq!(frame.meta, expected.meta);
        }
        assert_eq!(shelf.take(&mut frame), None);
    }

    #[test]
    fn what_the_capturer_itself_came_too_late_for_is_dropped_too() {
        let mut capturer = Capturer::new(roads(), 10.0, 0, 4);
        let shelf = capturer.shelf();
        assert_eq!(capturer.step(0), Then::Again);
        assert_eq!(capturer.step(1_000), Then::Again);
        let mut frame = FrameBuf::new();
        assert_eq!(shelf.take(&mut frame).unwrap().index, 0);
        let taken = shelf.take(&mut frame).unwrap();
        assert_eq!((taken.index, taken.dropped), (10, 9));
    }

    #[test]
    fn buffers_are_allocated_once() {
        let mut capturer = Capturer::new(roads(), 30.0, 0, 2);
        let shelf = capturer.shelf();
        let mut frame = FrameBuf::new();
        let mut places = std::collections::BTreeSet::new();
        for step in 0..200 {
            let now = step * 34;
            play(&mut capturer, now, now);
            if shelf.take(&mut frame).is_some() && step > 10 {
                places.insert(frame.pixels.as_ptr());
            }
        }
        // Two that wait, one that is filled, one that is looked at.
        assert!(places.len() <= 4, "{}", places.len());
    }

    /// What the shelf looked like.
    #[derive(Default)]
    struct Seen {
        shelf: Option<Arc<Shelf>>,
        stocks: Vec<Stock>,
    }

    /// A source that looks at the shelf while it reads, as the frame loop does meanwhile.
    struct Watched(Box<dyn Source>, Arc<Mutex<Seen>>);

    impl Source for Watched {
        fn id(&self) -> &str {
            self.0.id()
        }
        fn read(&mut self, index: u64, into: &mut FrameBuf) -> Result<Read, SourceError> {
            let seen = &mut *lock(&self.1);
            seen.stocks
                .extend(seen.shelf.as_ref().map(|shelf| shelf.stock()));
            self.0.read(index, into)
        }
        fn truth(&self, _: u64) -> Option<String> {
            None
        }
        fn len(&self) -> Option<u64> {
            None
        }
        fn classes(&self) -> Vec<String> {
            Vec::new()
        }
    }

    #[test]
    fn to_wait_for_the_next_frame_is_no_fault_and_to_read_long_is() {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let source = Box::new(Watched(roads(), Arc::clone(&seen)));
        let mut capturer = Capturer::new(source, 0.031_25, 0, 2);
        let shelf = capturer.shelf();
        lock(&seen).shelf = Some(Arc::clone(&shelf));
        let mut frame = FrameBuf::new();
        for at_ms in [0, 32_000, 64_000] {
            assert_eq!(capturer.step(at_ms), Then::Again);
            assert!(shelf.take(&mut frame).is_some());
            assert_eq!(capturer.step(at_ms + 1), Then::At(at_ms + 32_000));
            assert_eq!(shelf.stock(), Stock::Empty { quiet: true });
        }
        assert_eq!(lock(&seen).stocks, [Stock::Empty { quiet: false }; 3]);
    }

    #[test]
    fn a_source_that_only_fails_is_given_up_with_its_error() {
        let mut capturer = Capturer::new(Box::new(Failing(roads(), 5)), 10.0, 0, 8);
        let shelf = capturer.shelf();
        assert_eq!(play(&mut capturer, 0, 1 << 30), Then::Ended);
        let mut frame = FrameBuf::new();
        let mut seen = 0;
        while shelf.take(&mut frame).is_some() {
            seen += 1;
        }
        assert_eq!(seen, 5);
        assert_eq!(shelf.stock(), Stock::Ended);
        let totals = shelf.totals();
        assert_eq!((totals.next, totals.skipped), (105, 100));
        assert!(shelf.failure().unwrap().to_string().contains("gone"));
    }
}
