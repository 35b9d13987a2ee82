//! A device in virtual time: the agent's own capturer, backlog, pacer, frame loop, trigger, spool,
//! slot and reporter, around a network that takes no time and a camera that costs nothing.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use device_core::pace::Pace;
use device_core::params::{Params, Shape};
use device_core::slot::{Action, Event, Held};
use device_engine::{
    ClassOutput, EngineError, EngineKind, InputSpec, ModelSpec, Output, Plan, Task,
};
use flywheel_agent::capture::{Capturer, Then};
use flywheel_agent::clock::Clock;
use flywheel_agent::config::Config;
use flywheel_agent::link::health::Reporter;
use flywheel_agent::models::{Device as Who, Models, Runner};
use flywheel_agent::pipeline::{Feed, Pipeline, Turn};
use flywheel_agent::shared::{Shared, Status, lock};
use flywheel_agent::source::{Captured, FrameBuf, Read, Source, SourceError};
use flywheel_agent::spool::{Account, Disk, Ledger, LedgerError, Spool};
use flywheel_agent::state::State;
use flywheel_shared::ids::Digest;
use flywheel_shared::spec::{Colour, Layout, Scale};
use flywheel_shared::trust::{KeyId, TrialBounds, TrustRoot};

/// Frames a second.
pub const FPS: f32 = 30.0;
const SIDE: u16 = 8;
const SPEC: ModelSpec<'static> = ModelSpec {
    arch: "fake",
    labels: "a\nb\nc",
    input: InputSpec {
        width: SIDE,
        height: SIDE,
        channels: 3,
        mean: [0.5; 3],
        std: [0.25; 3],
        layout: Layout::Nchw,
        colour: Colour::Rgb,
        scale: Scale::Unit,
    },
    embedding: 0,
    task: Task::Classify(ClassOutput::Logits),
};

/// The clocks of the device, and what was counted beside it.
#[derive(Default)]
pub struct World {
    /// The monotonic clock in µs.
    pub now_us: AtomicU64,
    pub cpu_us: AtomicU64,
    /// The wall clock, Unix milliseconds, as of the last frame; it may be set back.
    pub wall_ms: AtomicU64,
    /// Frames and bad files that the camera gave.
    pub given: AtomicU64,
    pub bad: AtomicU64,
    /// Frames that each model looked at, by sequence modulo 16.
    pub looked: [AtomicU64; 16],
}

impl World {
    fn add(counter: &AtomicU64, n: u64) -> u64 {
        counter.fetch_add(n, Ordering::Relaxed)
    }

    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}

struct Clocks(Arc<World>);

impl Clock for Clocks {
    fn now_ns(&self) -> u64 {
        1000 * World::get(&self.0.now_us)
    }

    fn cpu_us(&self) -> u64 {
        World::get(&self.0.cpu_us)
    }
}

/// SplitMix64 of an index: what the camera sees.
fn hash(x: u64) -> u64 {
    let mut z = x.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A camera of a fixed number of frames, some of which are bad.
struct Camera {
    world: Arc<World>,
    frames: u64,
    bad_every: u64,
}

impl Source for Camera {
    fn id(&self) -> &str {
        "camera"
    }

    fn read(&mut self, index: u64, into: &mut FrameBuf) -> Result<Read, SourceError> {
        if index >= self.frames {
            return Ok(Read::End);
        }
        let wall_ms = World::add(&self.world.wall_ms, 33) + 33;
        if self.bad_every > 0 && (index + 1).is_multiple_of(self.bad_every) {
            World::add(&self.world.bad, 1);
            return Ok(Read::Skipped {
                name: format!("frame {index}"),
                why: "torn".to_owned(),
            });
        }
        World::add(&self.world.given, 1);
        into.pixels
            .resize(3 * usize::from(SIDE) * usize::from(SIDE), 0);
        let seen = hash(index / 15) ^ (hash(index) & 0x0f0f_0f0f);
        for (pixel, byte) in into
            .pixels
            .iter_mut()
            .zip(seen.to_le_bytes().iter().cycle())
        {
            *pixel = *byte;
        }
        into.meta = Captured {
            width: u32::from(SIDE),
            height: u32::from(SIDE),
            channels: 3,
            seen_bytes: into.pixels.len() as u32,
            encoded: None,
            captured_ms: wall_ms,
            track: index / 15,
        };
        Ok(Read::Frame)
    }

    fn truth(&self, _: u64) -> Option<String> {
        None
    }

    fn len(&self) -> Option<u64> {
        Some(self.frames)
    }

    fn classes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// What a model costs and how it fails.
#[derive(Clone, Copy)]
pub struct Cost {
    /// Virtual time of one frame in µs.
    pub us: u64,
    /// Every so many frames a stall; 0 for none.
    pub stall_every: u64,
    pub stall_us: u64,
    /// The run that fails, if one does.
    pub fails_at: Option<u64>,
}

/// A network that takes virtual time only.
struct Net {
    world: Arc<World>,
    sequence: u64,
    cost: Cost,
    runs: u64,
    input: Vec<f32>,
}

impl Plan for Net {
    fn kind(&self) -> EngineKind {
        EngineKind::Tract
    }

    fn input_len(&self) -> usize {
        SPEC.input.len()
    }

    fn classes(&self) -> usize {
        3
    }

    fn embedding_dim(&self) -> usize {
        0
    }

    fn input_mut(&mut self) -> &mut [f32] {
        &mut self.input
    }

    fn run_in_place(&mut self, output: &mut Output<'_>) -> Result<(), EngineError> {
        self.runs += 1;
        let stalls = self.cost.stall_every > 0 && self.runs.is_multiple_of(self.cost.stall_every);
        let us = self.cost.us + if stalls { self.cost.stall_us } else { 0 };
        World::add(&self.world.now_us, us);
        World::add(&self.world.cpu_us, us);
        World::add(&self.world.looked[self.sequence as usize % 16], 1);
        if self.cost.fails_at == Some(self.runs) {
            return Err(EngineError::Run {
                engine: "fake",
                why: "as told".to_owned(),
            });
        }
        // Models of different sequences disagree here and there.
        let lean = (self.sequence % 5) as f32 * 0.1;
        for (at, logit) in output.logits.iter_mut().enumerate() {
            *logit = 3.0 * self.input[at] + lean * self.input[at + 3];
        }
        Ok(())
    }
}

/// Score parameters without an embedding: every margin is as likely as any other.
fn scores() -> Vec<u8> {
    let shape = Shape::plain(3, 0, 9);
    let layout = shape.layout();
    let mut values = vec![0.0; shape.values()];
    values[layout.temperature] = 1.0;
    values[layout.calibrated] = 1000.0;
    values[layout.counts].fill(1.0);
    for (at, knot) in values[layout.unsure].iter_mut().enumerate() {
        *knot = at as f32 / 8.0 - 1.0;
    }
    let mut out = vec![0; shape.encoded_len()];
    let params = Params::checked(shape, &values).unwrap();
    params.encode(&mut out).unwrap();
    out
}

/// Files in memory.
#[derive(Default)]
struct Memory(BTreeMap<String, Vec<u8>>);

impl Memory {
    fn file(&mut self, name: &str) -> io::Result<&mut Vec<u8>> {
        self.0.get_mut(name).ok_or(io::ErrorKind::NotFound.into())
    }
}

impl Disk for Memory {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.keys().cloned().collect())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        self.0
            .get(name)
            .cloned()
            .ok_or(io::ErrorKind::NotFound.into())
    }

    fn read_at(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let bytes = self.0.get(name).ok_or(io::ErrorKind::NotFound)?;
        let end = offset as usize + len;
        let found = bytes.get(offset as usize..end).map(<[u8]>::to_vec);
        found.ok_or(io::ErrorKind::UnexpectedEof.into())
    }

    fn create(&mut self, name: &str) -> io::Result<()> {
        self.0.insert(name.to_owned(), Vec::new());
        Ok(())
    }

    fn write_at(&mut self, name: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let file = self.file(name)?;
        file.truncate(offset as usize);
        file.extend_from_slice(bytes);
        Ok(())
    }

    fn truncate(&mut self, name: &str, len: u64) -> io::Result<()> {
        self.file(name)?.truncate(len as usize);
        Ok(())
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        self.file(name).map(|_| ())
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.0.remove(name);
        Ok(())
    }
}

/// Acknowledgements in memory.
#[derive(Default)]
struct Accounts(BTreeMap<u32, Account>);

impl Ledger for Accounts {
    fn load(&self) -> Result<Vec<(u32, Account)>, LedgerError> {
        Ok(self
            .0
            .iter()
            .map(|(epoch, account)| (*epoch, account.clone()))
            .collect())
    }

    fn put(&mut self, epoch: u32, account: &Account) -> Result<(), LedgerError> {
        self.0.insert(epoch, account.clone());
        Ok(())
    }

    fn remove(&mut self, epoch: u32) -> Result<(), LedgerError> {
        self.0.remove(&epoch);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), LedgerError> {
        Ok(())
    }
}

/// What a device is made of.
pub struct Setup {
    pub frames: u64,
    pub bad_every: u64,
    pub waiting: usize,
    pub quota: u64,
    pub live: Cost,
    /// More configuration, TOML.
    pub extra: &'static str,
}

/// A device.
pub struct Device {
    pub world: Arc<World>,
    pub shared: Arc<Shared>,
    pub reporter: Reporter,
    capturer: Capturer,
    pipeline: Pipeline,
    camera_at_ms: u64,
    camera_ended: bool,
    _data: tempfile::TempDir,
}

impl Device {
    pub fn new(setup: &Setup) -> Self {
        let data = tempfile::tempdir().unwrap();
        let text = format!(
            "data = \"d\"\nsource = \"camera\"\npace = {FPS:?}\n{}",
            setup.extra
        );
        let config = Config::parse(Path::new("agent.toml"), &text).unwrap();
        let world = Arc::new(World::default());
        world.wall_ms.store(1_750_000_000_000, Ordering::Relaxed);
        let state = Arc::new(State::open(data.path()).unwrap());
        let epoch = state.next_epoch(0).unwrap();
        let (spool, _) = Spool::open(
            Box::new(Memory::default()),
            Box::new(Accounts::default()),
            epoch,
            setup.quota,
        )
        .unwrap();
        let who = Who {
            id: "cam".parse().unwrap(),
            hardware: "any".to_owned(),
            trust: TrustRoot::default(),
        };
        let (mut models, live) =
            Models::open(data.path(), Arc::clone(&state), who, config.engine).unwrap();
        assert!(live.is_none());
        models.step(Event::Boot).unwrap();
        let shared = Arc::new(Shared::new(state, spool, models, Status::default(), 0));
        let source = Camera {
            world: Arc::clone(&world),
            frames: setup.frames,
            bad_every: setup.bad_every,
        };
        let capturer = Capturer::new(Box::new(source), FPS, 0, setup.waiting);
        let live = net(&world, 0, setup.live);
        let feed = Feed::Shelf(capturer.shelf());
        let pipeline = Pipeline::new(
            &config,
            Pace::Fps(FPS),
            feed,
            Some(live),
            Arc::clone(&shared),
        )
        .unwrap()
        .with_clock(&config, Arc::new(Clocks(Arc::clone(&world))));
        Self {
            reporter: Reporter::new(&config, epoch, Instant::now()),
            world,
            shared,
            capturer,
            pipeline,
            camera_at_ms: 0,
            camera_ended: false,
            _data: data,
        }
    }

    /// Goes on to the next thing that happens: the camera catches up with the time, and the frame
    /// loop looks at one frame, which takes time, or time passes. False once all frames are over.
    pub fn turn(&mut self) -> bool {
        let now_ms = World::get(&self.world.now_us) / 1000;
        while !self.camera_ended && self.camera_at_ms <= now_ms {
            match self.capturer.step(self.camera_at_ms) {
                Then::Again => {}
                Then::At(at_ms) => self.camera_at_ms = at_ms,
                Then::Ended => self.camera_ended = true,
            }
        }
        let next_us = match self.pipeline.poll().unwrap() {
            Turn::Frame => return true,
            Turn::Hold | Turn::Stop => return false,
            Turn::WaitUntil(at_us) if self.camera_ended => at_us,
            Turn::WaitUntil(at_us) => at_us.min(self.camera_at_ms * 1000),
            Turn::Await { .. } => self.camera_at_ms * 1000,
        };
        assert!(
            next_us > World::get(&self.world.now_us),
            "time stands still"
        );
        self.world.now_us.store(next_us, Ordering::Relaxed);
        true
    }

    /// Index of the next frame.
    pub fn frame(&self) -> u64 {
        self.shared.status().progress.frame
    }

    /// Sets the monotonic clock back, which no kernel should do.
    pub fn set_back(&mut self, us: u64) {
        let now = World::get(&self.world.now_us).saturating_sub(us);
        self.world.now_us.store(now, Ordering::Relaxed);
        self.camera_at_ms = now / 1000;
    }

    /// Offers a model: it is fetched and proved at once and goes on trial.
    pub fn offer(&mut self, sequence: u64, trial: u32, cost: Cost) {
        let model = Held {
            digest: Digest::of(&sequence.to_le_bytes()),
            sequence,
        };
        let bounds = TrialBounds {
            frames: trial,
            max_latency_us: 0,
            min_confidence: 0.0,
        };
        let mut models = lock(&self.shared.models);
        let mut actions = models
            .step(Event::Offer {
                model,
                bounds,
                key: KeyId::default(),
            })
            .unwrap();
        while let Some(action) = actions.pop() {
            let digest = model.digest;
            match action {
                Action::Fetch(_) => actions = models.step(Event::Fetched { digest }).unwrap(),
                Action::RunGolden(_) => {
                    actions = models.step(Event::GoldenPassed { digest }).unwrap();
                }
                Action::BeginShadow(_) => {
                    let candidate = net(&self.world, sequence, cost);
                    self.shared
                        .signal(|signals| signals.candidate = Some(candidate));
                    return;
                }
                _ => {}
            }
        }
        panic!("model {sequence} did not go on trial");
    }

    /// The cloud hears of how the last model ended.
    pub fn settle_reports(&self) {
        let mut models = lock(&self.shared.models);
        while let Some(report) = models.report() {
            let seen = Event::ReportSeen {
                digest: report.model.digest,
                state: report.state,
            };
            models.step(seen).unwrap();
        }
    }
}

fn net(world: &Arc<World>, sequence: u64, cost: Cost) -> Runner {
    let plan = Net {
        world: Arc::clone(world),
        sequence,
        cost,
        runs: 0,
        input: vec![0.0; SPEC.input.len()],
    };
    let digest = Digest::of(&sequence.to_le_bytes());
    Runner::assemble(digest, sequence, &SPEC, Box::new(plan), &scores()).unwrap()
}
