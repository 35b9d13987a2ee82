//! Power cuts at every file operation of a device's life with models: offered, fetched, proved,
//! confirmed, given up, superseded, made of a difference. Whatever is left of the disk, the device
//! starts with the last model that was confirmed, and every byte of it is as signed.

mod power;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex};

use device_core::params::{Params, Shape};
use device_core::slot::{Action, Event, Held, SlotError};
use device_engine::{
    ClassOutput, EngineError, EngineKind, InputSpec, ModelSpec, Output, Plan, Task,
};
use ed25519_dalek::SigningKey;
use flywheel_agent::clock::Moment;
use flywheel_agent::models::{
    Assemble, Device as Who, Fetching, Models, Package, Runner, RunnerError,
};
use flywheel_agent::wire;
use flywheel_shared::ids::Digest;
use flywheel_shared::message::{Chunk, OfferMessage, SlotState};
use flywheel_shared::trust::{
    ANY_HARDWARE, Delta, Keys, Manifest, Offer, Part, PartKind, RUNTIME_ABI, Role, Signed,
    TrialBounds, TrustRoot, sign,
};
use power::{Cut, Medium, SimDisk};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

const BOUNDS: TrialBounds = TrialBounds {
    frames: 3,
    max_latency_us: 1000,
    min_confidence: 0.0,
};
/// Bytes of an answer of the cloud, so that a part comes in several.
const PIECE: usize = 1000;
/// Chunks of release 4 that come before release 5 is offered.
const OVERTAKEN_AFTER: usize = 2;

/// What a release is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Good,
    Slow,
    /// A newer one is offered while it is fetched.
    Overtaken,
}

struct Release {
    model: Held,
    kind: Kind,
    body: Vec<u8>,
    signature: [u8; 64],
}

struct Cloud {
    who: Who,
    rollout: SigningKey,
    releases: Vec<Release>,
    blobs: BTreeMap<Digest, Vec<u8>>,
    /// The digests that each release lists.
    signed: BTreeMap<Digest, BTreeSet<Digest>>,
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

impl Cloud {
    fn new() -> Self {
        let [root, release, rollout] = [1, 2, 3].map(|n| SigningKey::from_bytes(&[n; 32]));
        let public = |key: &SigningKey| key.verifying_key().to_bytes();
        let mut cloud = Self {
            who: Who {
                id: "cam1".parse().unwrap(),
                hardware: "any-linux".to_owned(),
                trust: TrustRoot {
                    version: 1,
                    issued_ms: 0,
                    expires_ms: u64::MAX,
                    root: Keys::one(public(&root)),
                    release: public(&release),
                    rollout: public(&rollout),
                    min_sequence: 0,
                },
            },
            rollout,
            releases: Vec::new(),
            blobs: BTreeMap::new(),
            signed: BTreeMap::new(),
        };
        let weights = bytes(1, 5_000);
        let tuned = |at: usize| {
            let mut tuned = weights.clone();
            tuned[at..at + 900].fill(at as u8);
            tuned
        };
        cloud.release(&release, Kind::Good, &weights, None);
        cloud.release(&release, Kind::Slow, &bytes(2, 3_000), None);
        cloud.release(&release, Kind::Good, &tuned(40), Some(&weights));
        cloud.release(&release, Kind::Overtaken, &bytes(4, 5_000), None);
        cloud.release(&release, Kind::Good, &tuned(4_000), Some(&tuned(40)));
        cloud
    }

    fn release(&mut self, key: &SigningKey, kind: Kind, weights: &[u8], base: Option<&[u8]>) {
        let sequence = self.releases.len() as u64 + 1;
        let parts = [
            (PartKind::Onnx, weights.to_vec()),
            (PartKind::Spec, b"spec".to_vec()),
            (PartKind::Scores, Vec::new()),
            (PartKind::Golden, bytes(100 + sequence, 1_100)),
        ];
        let mut deltas = heapless::Vec::new();
        if let Some(base) = base {
            let (way, delta) = flywheel_delta::encode(base, weights).unwrap().unwrap();
            let added = deltas.push(Delta {
                part: PartKind::Onnx,
                base: Digest::of(base),
                codec: way.code(),
                len: delta.len() as u32,
                digest: Digest::of(&delta),
            });
            added.unwrap();
            self.blobs.insert(Digest::of(&delta), delta);
        }
        let listed: heapless::Vec<Part, 8> = parts
            .iter()
            .map(|(kind, bytes)| Part {
                kind: *kind,
                len: bytes.len() as u32,
                digest: Digest::of(bytes),
            })
            .collect();
        let body = wire::bytes(&Manifest {
            name: "test",
            sequence,
            hardware: ANY_HARDWARE,
            abi: RUNTIME_ABI,
            created_ms: 0,
            expires_ms: u64::MAX,
            trial: BOUNDS,
            parts: listed.clone(),
            deltas,
        });
        let digest = Digest::of(&body);
        let digests = listed.iter().map(|part| part.digest).collect();
        self.signed.insert(digest, digests);
        self.blobs
            .extend(parts.map(|(_, bytes)| (Digest::of(&bytes), bytes)));
        self.releases.push(Release {
            model: Held { digest, sequence },
            kind,
            signature: sign(Role::Release, key, &body),
            body,
        });
    }

    fn kind(&self, model: Held) -> Kind {
        self.releases[model.sequence as usize - 1].kind
    }
}

/// What somebody outside of the device knows, and power does not take from him.
#[derive(Clone, Debug, Default)]
struct Outside {
    /// Models that have passed all frames of a trial.
    passed: Vec<Held>,
    /// The last model whose confirmation was stored, as the device believes.
    committed: Option<Held>,
    /// How each release ended, as the cloud has heard it.
    heard: BTreeMap<u64, (SlotState, u16)>,
}

/// A network that does nothing.
struct Nothing(Vec<f32>);

const SPEC: ModelSpec<'static> = ModelSpec {
    arch: "nothing",
    labels: "a\nb",
    input: InputSpec::new(1, 1, 1),
    embedding: 0,
    task: Task::Classify(ClassOutput::Logits),
};

impl Plan for Nothing {
    fn kind(&self) -> EngineKind {
        EngineKind::Tract
    }

    fn input_len(&self) -> usize {
        1
    }

    fn classes(&self) -> usize {
        2
    }

    fn embedding_dim(&self) -> usize {
        0
    }

    fn input_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }

    fn run_in_place(&mut self, _: &mut Output<'_>) -> Result<(), EngineError> {
        Ok(())
    }
}

/// Loads anything, and looks at every byte of it.
struct Checker {
    cloud: Arc<Cloud>,
    scores: Vec<u8>,
}

impl Checker {
    fn new(cloud: &Arc<Cloud>) -> Self {
        let shape = Shape::plain(2, 0, 2);
        let layout = shape.layout();
        let mut values = vec![0.0; shape.values()];
        values[layout.temperature] = 1.0;
        values[layout.calibrated] = 100.0;
        values[layout.counts].fill(1.0);
        let mut scores = vec![0; shape.encoded_len()];
        let params = Params::checked(shape, &values).unwrap();
        params.encode(&mut scores).unwrap();
        Self {
            cloud: Arc::clone(cloud),
            scores,
        }
    }
}

impl Assemble for Checker {
    fn assemble(&self, package: &Package) -> Result<Runner, RunnerError> {
        let signed = &self.cloud.signed[&package.digest];
        let kinds = [
            PartKind::Onnx,
            PartKind::Spec,
            PartKind::Scores,
            PartKind::Golden,
        ];
        for kind in kinds {
            let loaded = Digest::of(package.part(kind));
            assert!(signed.contains(&loaded), "unsigned bytes as {kind:?}");
        }
        let plan = Box::new(Nothing(vec![0.0]));
        Runner::assemble(package.digest, package.sequence, &SPEC, plan, &self.scores)
    }
}

type Disk = SimDisk<Outside>;

/// A device while it has power.
struct Device {
    cloud: Arc<Cloud>,
    disk: Arc<Disk>,
    models: Models,
    live: Option<Digest>,
    fetching: Option<(Held, Fetching)>,
    chunks: usize,
    shadow: Option<(Held, u32)>,
}

impl Device {
    /// Starts on what is left of a disk, and holds the rules that must hold at every start.
    fn start(cloud: &Arc<Cloud>, checker: &Arc<Checker>, disk: &Arc<Disk>) -> Self {
        let (models, runner) = Models::on(
            Arc::clone(disk) as Arc<dyn flywheel_agent::models::Disk>,
            Path::new("/"),
            cloud.who.clone(),
            Arc::clone(checker) as Arc<dyn Assemble>,
            None,
        )
        .unwrap();
        let outside = disk.note();
        let live = models.record().live;
        assert_eq!(
            live.map(|live| live.digest),
            runner.map(|runner| runner.digest()),
            "the live model does not run"
        );
        match (live, outside.committed) {
            (Some(live), committed) => {
                assert!(outside.passed.contains(&live), "{live:?} was never proved");
                let least = committed.map_or(0, |model| model.sequence);
                assert!(
                    live.sequence >= least,
                    "{committed:?} is lost, {live:?} is live"
                );
            }
            (None, committed) => assert_eq!(committed, None, "a confirmed model is lost"),
        }
        assert!(models.floor() >= outside.committed.map_or(0, |model| model.sequence));
        let mut device = Self {
            cloud: Arc::clone(cloud),
            disk: Arc::clone(disk),
            models,
            live: live.map(|live| live.digest),
            fetching: None,
            chunks: 0,
            shadow: None,
        };
        device.step(Event::Boot);
        device
    }

    fn step(&mut self, event: Event) {
        let actions = self.models.step(event).unwrap();
        self.perform(actions);
    }

    fn perform(&mut self, actions: Vec<Action>) {
        let mut queue = VecDeque::from(actions);
        while let Some(action) = queue.pop_front() {
            let event = match action {
                Action::Fetch(model) => {
                    let fetching = self.models.loader().fetch(&model.digest).unwrap();
                    self.chunks = 0;
                    if fetching.is_complete() {
                        Some(Event::Fetched {
                            digest: model.digest,
                        })
                    } else {
                        self.fetching = Some((model, fetching));
                        None
                    }
                }
                Action::RunGolden(model) => {
                    let loaded = self.models.loader().load(&model.digest);
                    assert_eq!(loaded.unwrap().0.digest(), model.digest);
                    Some(Event::GoldenPassed {
                        digest: model.digest,
                    })
                }
                Action::BeginShadow(model) => {
                    self.shadow = Some((model, 0));
                    None
                }
                Action::Swap(model) => {
                    self.live = Some(model.digest);
                    self.disk
                        .annotate(|outside| outside.committed = Some(model));
                    None
                }
                Action::Discard => {
                    self.shadow = None;
                    let wanted = self.models.record().candidate.map(|c| c.model);
                    self.fetching.take_if(|(model, _)| Some(*model) != wanted);
                    None
                }
                Action::Persist(_) | Action::Report(_) => None,
            };
            if let Some(event) = event {
                queue.extend(self.models.step(event).unwrap());
            }
        }
    }

    fn offer(&mut self, at: usize) {
        let cloud = Arc::clone(&self.cloud);
        let release = &cloud.releases[at];
        let offer = wire::bytes(&Offer {
            device: cloud.who.id.clone(),
            manifest: release.model.digest,
            sequence: release.model.sequence,
            issued_ms: 1_000,
            expires_ms: u64::MAX,
            nonce: 1,
        });
        let signature = sign(Role::Rollout, &cloud.rollout, &offer);
        let message = OfferMessage {
            offer: Signed {
                body: &offer,
                signature: &signature,
            },
            manifest: Signed {
                body: &release.body,
                signature: &release.signature,
            },
        };
        let now = Moment {
            wall_ms: Some(2_000),
            mono_ms: 0,
        };
        let actions = self.models.offer(&message, now).unwrap();
        self.perform(actions);
    }

    /// The cloud hears what the device has to say.
    fn report(&mut self) -> bool {
        let Some(report) = self.models.report() else {
            return false;
        };
        let ended = matches!(
            report.state,
            SlotState::Confirmed | SlotState::Reverted | SlotState::Refused
        );
        if ended {
            self.disk.annotate(|outside| {
                let heard = (report.state, report.code);
                outside.heard.entry(report.model.sequence).or_insert(heard);
            });
        }
        self.step(Event::ReportSeen {
            digest: report.model.digest,
            state: report.state,
        });
        true
    }

    /// A few requests are answered.
    fn fetch(&mut self) {
        let Some((model, fetching)) = &mut self.fetching else {
            return;
        };
        let model = *model;
        let requests = fetching.requests(u64::MAX);
        assert!(!requests.is_empty(), "nothing is asked for");
        for request in requests {
            let blob = &self.cloud.blobs[&request.digest];
            let end = request.offset as usize + request.len as usize;
            let mut start = request.offset as usize;
            while start < end {
                let stop = end.min(start + PIECE);
                let chunk = Chunk {
                    digest: request.digest,
                    offset: start as u64,
                    bytes: &blob[start..stop],
                };
                let Some((_, fetching)) = &mut self.fetching else {
                    return;
                };
                assert!(fetching.chunk(&chunk).unwrap());
                start = stop;
                self.chunks += 1;
                if self.cloud.kind(model) == Kind::Overtaken && self.chunks == OVERTAKEN_AFTER {
                    self.offer(model.sequence as usize);
                    return;
                }
            }
        }
        if self.fetching.as_ref().is_some_and(|(_, f)| f.is_complete()) {
            self.fetching = None;
            self.step(Event::Fetched {
                digest: model.digest,
            });
        }
    }

    /// Lives on until the cloud has heard how every release ended.
    fn live_on(&mut self) {
        for _ in 0..10_000 {
            if self.report() {
            } else if self.fetching.is_some() {
                self.fetch();
            } else if let Some((model, frames)) = self.shadow {
                self.shadow = Some((model, frames + 1));
                let slow = self.cloud.kind(model) == Kind::Slow;
                if frames + 1 == BOUNDS.frames && !slow {
                    self.disk.annotate(|outside| outside.passed.push(model));
                }
                self.step(Event::Frame {
                    latency_us: if slow { 5_000 } else { 100 },
                    confidence: 0.9,
                    live_confidence: None,
                });
            } else {
                let heard = self.disk.note().heard;
                let next =
                    (1..=self.cloud.releases.len()).find(|n| !heard.contains_key(&(*n as u64)));
                match next {
                    Some(next) => self.offer(next - 1),
                    None => return,
                }
            }
        }
        panic!("does not come to rest: {:?}", self.models.record());
    }

    /// How it must have ended, whatever happened between.
    fn check_end(&self) {
        let last = self.cloud.releases.last().unwrap().model;
        assert_eq!(self.models.record().live, Some(last));
        assert_eq!(self.live, Some(last.digest));
        let heard = self.disk.note().heard;
        for release in &self.cloud.releases {
            let (state, code) = heard[&release.model.sequence];
            match release.kind {
                Kind::Good => assert_eq!(state, SlotState::Confirmed, "{:?}", release.model),
                Kind::Slow => assert_eq!(
                    (state, code),
                    (SlotState::Reverted, SlotError::Latency.code())
                ),
                // Given up for the newer one, or refused as older than that if the power went
                // before that was said.
                Kind::Overtaken => assert_ne!(state, SlotState::Confirmed),
            }
        }
        let models = flywheel_agent::models::Disk::list(&*self.disk, Path::new("/models"));
        assert_eq!(models.unwrap().len(), 1, "old packages stay");
    }
}

/// One cut of each kind, and many by chance.
fn cuts(medium: &Medium, by_chance: usize, rng: &mut ChaCha8Rng) -> Vec<Cut> {
    let pending = medium.pending();
    let mut cuts = vec![Cut::None];
    if pending > 0 {
        cuts.push(Cut::All);
        cuts.extend((1..pending).flat_map(|n| [Cut::First(n), Cut::Last(n)]));
        cuts.extend((0..by_chance).map(|_| Cut::Chance(rng.next_u32() as u8)));
    }
    cuts
}

struct Lab {
    cloud: Arc<Cloud>,
    checker: Arc<Checker>,
    rng: ChaCha8Rng,
    /// Different disks, by the operation at which the power went.
    states: BTreeSet<(u64, u64)>,
    starts: usize,
}

impl Lab {
    fn start(&self, medium: Medium, outside: Outside) -> (Arc<Disk>, Device) {
        let disk = Arc::new(SimDisk::new(medium, outside));
        let device = Device::start(&self.cloud, &self.checker, &disk);
        (disk, device)
    }

    /// Cuts at every operation on the tape of a life; returns disks to live on from, one in
    /// `every`.
    fn cut(
        &mut self,
        life: u64,
        tape: &[(Medium, Outside)],
        by_chance: usize,
        every: usize,
    ) -> Vec<(Medium, Outside)> {
        let mut samples = Vec::new();
        for (at, (medium, outside)) in tape.iter().enumerate() {
            for cut in cuts(medium, by_chance, &mut self.rng) {
                let left = medium.cut(cut, &mut self.rng);
                if !self.states.insert((life << 32 | at as u64, left.print())) {
                    continue;
                }
                self.start(left.clone(), outside.clone());
                self.starts += 1;
                if self.starts.is_multiple_of(every) {
                    samples.push((left, outside.clone()));
                }
            }
        }
        samples
    }
}

#[test]
fn power_cut_at_every_operation_in_50_000_states() {
    let cloud = Arc::new(Cloud::new());
    let mut lab = Lab {
        checker: Arc::new(Checker::new(&cloud)),
        cloud,
        rng: ChaCha8Rng::seed_from_u64(1),
        states: BTreeSet::new(),
        starts: 0,
    };
    let (disk, mut device) = lab.start(Medium::default(), Outside::default());
    disk.record();
    device.live_on();
    device.check_end();
    let tape = disk.tape();
    let operations = tape.len() - 1;

    let samples = lab.cut(0, &tape, 300, 30);
    let first = lab.states.len();

    // From some of them the device lives on, and the power goes again; or the process alone was
    // killed, which leaves unsynced what it had not synced.
    let mut lives = 0;
    for (medium, outside) in samples.iter().chain(tape.iter().step_by(5)) {
        lives += 1;
        let (disk, mut device) = lab.start(medium.clone(), outside.clone());
        disk.record();
        device.live_on();
        device.check_end();
        let tape = disk.tape();
        lab.cut(lives, &tape, 8, usize::MAX);
    }
    let states = lab.states.len();
    println!(
        "{states} states after a power cut: {first} at {operations} operations of one life, {} in {lives} lives that had been cut or killed before",
        states - first
    );
    assert!(states >= 50_000, "only {states}");
    assert!(lives >= 100, "only {lives}");
}

#[test]
fn a_disk_without_syncs_would_lose_the_model() {
    // That the simulation bites: the same life on a disk whose syncs do nothing.
    #[derive(Debug)]
    struct Lying(Arc<Disk>);
    use flywheel_agent::models::Disk as Operations;
    use std::io;
    use std::path::PathBuf;
    impl Operations for Lying {
        fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
            self.0.read(path)
        }
        fn len(&self, path: &Path) -> io::Result<Option<u64>> {
            self.0.len(path)
        }
        fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
            self.0.list(folder)
        }
        fn make_folder(&self, folder: &Path) -> io::Result<()> {
            self.0.make_folder(folder)
        }
        fn write_at(&self, path: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
            self.0.write_at(path, offset, bytes)
        }
        fn sync(&self, _: &Path) -> io::Result<()> {
            Ok(())
        }
        fn sync_folder(&self, _: &Path) -> io::Result<()> {
            Ok(())
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.0.rename(from, to)
        }
        fn remove(&self, path: &Path) -> io::Result<()> {
            self.0.remove(path)
        }
        fn remove_folder(&self, folder: &Path) -> io::Result<()> {
            self.0.remove_folder(folder)
        }
    }
    let cloud = Arc::new(Cloud::new());
    let checker = Arc::new(Checker::new(&cloud));
    let disk = Arc::new(SimDisk::new(Medium::default(), Outside::default()));
    let (models, _) = Models::on(
        Arc::new(Lying(Arc::clone(&disk))),
        Path::new("/"),
        cloud.who.clone(),
        Arc::clone(&checker) as Arc<dyn Assemble>,
        None,
    )
    .unwrap();
    let mut device = Device {
        cloud: Arc::clone(&cloud),
        disk: Arc::clone(&disk),
        models,
        live: None,
        fetching: None,
        chunks: 0,
        shadow: None,
    };
    device.step(Event::Boot);
    device.live_on();
    device.check_end();
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let left = disk.medium().cut(Cut::None, &mut rng);
    let kept = Mutex::new(None);
    let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let disk = Arc::new(SimDisk::new(left, disk.note()));
        *kept.lock().unwrap() = Some(Device::start(&cloud, &checker, &disk));
    }));
    assert!(failed.is_err(), "a lost model was not noticed");
}
