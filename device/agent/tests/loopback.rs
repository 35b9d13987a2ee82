//! Whole agents against a small cloud over real QUIC on the loopback interface.

#[allow(dead_code, reason = "each test uses its part")]
mod fake;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use fake::package::{FRAME_BYTES, release};
use fake::{Cloud, Release, release_key};
use flywheel_agent::agent::{self, AgentError, Mode};
use flywheel_agent::config::Config;
use flywheel_agent::models::Packages;
use flywheel_agent::wire;
use flywheel_shared::ids::Digest;
use flywheel_shared::message::{Chunk, SlotState};
use flywheel_shared::trust::{ANY_HARDWARE, Manifest, PartKind, Role, Signed, sign};
use tokio::sync::oneshot;

fn config(data: &Path) -> Config {
    let text = format!(
        "data = {data:?}\nsource = \"sim:roads?seed=5&size=32\"\ntransport = [\"quic\"]\nhealth_interval_ms = 100\n[budget]\nratio = 0.5\n"
    );
    Config::parse(Path::new("agent.toml"), &text).unwrap()
}

/// An agent on a thread of its own.
struct Running {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<Result<(), AgentError>>,
}

fn start(data: &Path) -> Running {
    let config = config(data);
    let (stop, stopped) = oneshot::channel();
    let thread = thread::spawn(move || {
        agent::run_until(&config, Mode::Forever, async {
            let _ = stopped.await;
            Ok(())
        })
    });
    Running { stop, thread }
}

impl Running {
    fn stop(self) {
        self.stop.send(()).unwrap();
        self.thread.join().unwrap().unwrap();
    }
}

fn once(data: &Path, frames: u64) {
    agent::run_until(&config(data), Mode::Once { frames }, std::future::pending()).unwrap();
}

#[test]
fn everything_flagged_arrives_and_the_next_start_goes_on() {
    let data = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(data.path());
    once(data.path(), 300);
    let first = cloud.with(|memory| {
        let told = memory.health.clone().unwrap();
        assert_eq!(told.frame, 300);
        assert_eq!(told.bytes_seen, 300 * FRAME_BYTES);
        assert!(told.idle && told.live.is_none());
        let numbers: Vec<u32> = memory.records.keys().map(|key| key.seq).collect();
        let count = numbers.len() as u32;
        assert!(count > 10, "only {count} samples");
        assert_eq!(numbers, (1..=count).collect::<Vec<_>>());
        assert!(memory.records.values().all(|record| record.loss.is_none()));
        assert_eq!(told.books.len(), 1);
        assert_eq!((told.books[0].flagged, told.books[0].acked), (count, count));
        // All bytes of the samples, and little else.
        assert!(told.bytes_up > u64::from(count) * FRAME_BYTES);
        assert!(told.bytes_up < u64::from(count) * (FRAME_BYTES + 200) + 20_000);
        memory.records.clone()
    });
    once(data.path(), 100);
    cloud.with(|memory| {
        let told = memory.health.clone().unwrap();
        assert_eq!(told.frame, 400);
        assert_eq!(told.bytes_seen, 400 * FRAME_BYTES);
        let new: Vec<_> = memory
            .records
            .iter()
            .filter(|(key, _)| !first.contains_key(key))
            .collect();
        assert!(!new.is_empty());
        for (key, record) in new {
            assert_eq!(key.epoch, 2);
            assert!((300..400).contains(&record.frame));
        }
    });
}

#[test]
fn the_same_seed_flags_the_same_frames() {
    let frames: Vec<Vec<u64>> = (0..2)
        .map(|_| {
            let data = tempfile::tempdir().unwrap();
            let cloud = Cloud::start(data.path());
            once(data.path(), 200);
            cloud.with(|memory| memory.records.values().map(|r| r.frame).collect())
        })
        .collect();
    assert_eq!(frames[0], frames[1]);
}

#[test]
fn a_second_agent_on_the_same_folder_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(data.path());
    let running = start(data.path());
    cloud.wait("a health message", |memory| memory.health.is_some());
    let error = agent::run(&config(data.path()), Mode::Once { frames: 1 }).unwrap_err();
    assert!(error.to_string().contains("another agent"), "{error}");
    running.stop();
}

fn has_ended(cloud: &Arc<Cloud>, state: SlotState) -> bool {
    cloud.with(|memory| memory.reports.iter().any(|(seen, _)| *seen == state))
}

#[test]
fn an_offered_model_goes_on_trial_and_live_and_a_damaged_one_is_fetched_again() {
    let data = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(data.path());
    let offered = release(4);
    let digest = Digest::of(&offered.manifest);
    let size: usize = offered.parts.values().map(Vec::len).sum();
    cloud.with(|memory| memory.run_until = 50);
    let running = start(data.path());
    let idle_at = |frame| {
        move |memory: &fake::Memory| {
            memory
                .health
                .as_ref()
                .is_some_and(|told| told.idle && told.frame == frame)
        }
    };
    cloud.wait("the first halt", idle_at(50));
    assert!(cloud.with(|memory| memory.records.values().all(|r| r.model == [0; 8])));
    cloud.with(|memory| memory.release = Some(offered));
    // The trial goes on beyond the halt, frame by frame, and halts again when it is over.
    cloud.wait("the model to be live", |memory| {
        let live = memory.health.as_ref().and_then(|told| told.live);
        live == Some(digest) && memory.reports.iter().any(|r| r.0 == SlotState::Confirmed)
    });
    cloud.wait("the halt after the trial", idle_at(70));
    assert!(!has_ended(&cloud, SlotState::Reverted));
    assert_eq!(cloud.with(|memory| memory.fetched), size);
    cloud.with(|memory| memory.run_until = 300);
    cloud.wait("the second halt", idle_at(300));
    running.stop();
    cloud.with(|memory| {
        let id: [u8; 8] = digest.0[..8].try_into().unwrap();
        let scored = |r: &&fake::Arrived| r.model == id && r.frame >= 70;
        assert!(memory.records.values().filter(scored).count() > 0);
        memory.reports.clear();
        memory.health = None;
    });

    // A byte flips on the device's disk: it starts without a model, and gets the same one again.
    let path = data
        .path()
        .join("models")
        .join(digest.to_string())
        .join("model.onnx");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let running = start(data.path());
    cloud.wait("the model to be live again", |memory| {
        let live = memory.health.as_ref().and_then(|told| told.live);
        live == Some(digest) && memory.reports.iter().any(|r| r.0 == SlotState::Confirmed)
    });
    running.stop();
}

#[test]
fn a_model_that_answers_otherwise_than_signed_is_reverted() {
    let data = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(data.path());
    let good = release(1);
    let mut bad = release(2);
    // Signed with the golden answers of another network.
    let theirs = |release: &Release| -> Manifest<'static> {
        let manifest: Manifest<'_> = postcard::from_bytes(&release.manifest).unwrap();
        Manifest {
            name: "roads",
            hardware: ANY_HARDWARE,
            ..manifest.clone()
        }
    };
    let golden = *theirs(&good).part(PartKind::Golden).unwrap();
    let mut manifest = theirs(&bad);
    for part in &mut manifest.parts {
        if part.kind == PartKind::Golden {
            *part = golden;
        }
    }
    bad.parts.extend(good.parts);
    bad.manifest = wire::bytes(&manifest);
    bad.signature = sign(Role::Release, &release_key(), &bad.manifest);
    cloud.with(|memory| memory.release = Some(bad));
    let running = start(data.path());
    cloud.wait("the model to be given up", |memory| {
        memory.reports.iter().any(|r| r.0 == SlotState::Reverted)
    });
    cloud.with(|memory| {
        let codes: Vec<u16> = memory
            .reports
            .iter()
            .filter(|r| r.0 == SlotState::Reverted)
            .map(|r| r.1)
            .collect();
        assert!(codes.iter().all(|code| *code == 100), "{codes:?}");
        assert!(!memory.reports.iter().any(|r| r.0 == SlotState::Trial));
    });
    running.stop();
}

#[test]
fn a_shadow_model_has_a_say_in_what_disagrees() {
    use flywheel_shared::message::Lane;
    let disagreed = |shadow: bool| {
        let data = tempfile::tempdir().unwrap();
        let cloud = Cloud::start(data.path());
        cloud.with(|memory| {
            memory.run_until = 10;
            memory.release = Some(release(4));
        });
        let running = start(data.path());
        cloud.wait("the model to be live", |memory| {
            memory
                .health
                .as_ref()
                .is_some_and(|told| told.live.is_some())
        });
        running.stop();
        let mut config = config(data.path());
        let second = release(9);
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join(Digest::of(&second.manifest).to_string());
        if shadow {
            let packages = Packages::open(home.path()).unwrap();
            let digest = packages
                .admit(Signed {
                    body: &second.manifest,
                    signature: &second.signature,
                })
                .unwrap();
            let mut fetching = packages.fetch(&digest).unwrap();
            while !fetching.is_complete() {
                for fetch in fetching.requests(u64::MAX) {
                    let start = fetch.offset as usize;
                    let chunk = Chunk {
                        digest: fetch.digest,
                        offset: fetch.offset,
                        bytes: &second.parts[&fetch.digest][start..start + fetch.len as usize],
                    };
                    assert!(fetching.chunk(&chunk).unwrap());
                }
            }
            config.shadow_model = Some(folder);
        }
        cloud.with(|memory| memory.records.clear());
        let frames = Mode::Once { frames: 300 };
        agent::run_until(&config, frames, std::future::pending()).unwrap();
        cloud.with(|memory| {
            let lane = |r: &&fake::Arrived| r.lane == Some(Lane::Disagree);
            memory.records.values().filter(lane).count()
        })
    };
    let (without, with) = (disagreed(false), disagreed(true));
    // Without one only the live model's own flicker is in the lane. One that disagrees on nearly
    // every frame leaves it nothing that stands out.
    assert!(without > 0);
    assert_ne!(with, without, "the shadow model is not asked");
}

#[test]
fn a_shadow_model_that_nobody_signed_is_refused_at_the_start() {
    let data = tempfile::tempdir().unwrap();
    let _cloud = Cloud::start(data.path());
    let mut config = config(data.path());
    config.shadow_model = Some(data.path().join("second"));
    let error = agent::run(&config, Mode::Once { frames: 1 }).unwrap_err();
    assert!(error.to_string().contains("shadow_model"), "{error}");
}
