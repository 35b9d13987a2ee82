//! The attack matrix against a whole agent: real QUIC, real engine, real disk, and a cloud that lies.
//! What the verifier itself refuses is tried in all its variants in `flywheel-shared`; here it is
//! that the agent asks it, says so with the error's number, and goes on with the model it had.

#[allow(dead_code, reason = "each test uses its part")]
mod fake;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ed25519_dalek::SigningKey;
use fake::package::{parts, release, sealed};
use fake::{Cloud, Crafted, Memory, Mirror, PATIENCE, Release, release_key, signed_root};
use flywheel_agent::agent::{self, AgentError, Mode};
use flywheel_agent::config::Config;
use flywheel_agent::wire;
use flywheel_delta::Way;
use flywheel_shared::ids::Digest;
use flywheel_shared::message::SlotState;
use flywheel_shared::trust::{
    Delta, Keys, Manifest, PartKind, Role, SignedRoot, TimeStamp, TrustError, TrustRoot, sign,
};
use tokio::sync::oneshot;

const SOURCE: &str = "sim:roads?seed=5&size=32";

/// A device and its cloud.
struct Scene {
    cloud: Arc<Cloud>,
    data: tempfile::TempDir,
    running: Option<Running>,
    extra: &'static str,
}

struct Running {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<Result<(), AgentError>>,
}

impl Scene {
    fn new(extra: &'static str) -> Self {
        let data = tempfile::tempdir().unwrap();
        let cloud = Cloud::start(data.path());
        // Enough frames for every trial; the source then waits.
        cloud.with(|memory| memory.run_until = 10);
        let mut scene = Self {
            cloud,
            data,
            running: None,
            extra,
        };
        scene.start();
        scene
    }

    /// With a model that was taken in good order.
    fn with_model(extra: &'static str, sequence: u64) -> Self {
        let scene = Self::new(extra);
        scene.take(release(sequence));
        scene
    }

    fn config(&self) -> Config {
        let text = format!(
            "data = {:?}\nsource = {SOURCE:?}\ntransport = [\"quic\"]\nhealth_interval_ms = 100\n{}\n[budget]\nratio = 0.5\n",
            self.data.path(),
            self.extra
        );
        Config::parse(Path::new("agent.toml"), &text).unwrap()
    }

    fn start(&mut self) {
        let config = self.config();
        let (stop, stopped) = oneshot::channel();
        let thread = thread::spawn(move || {
            agent::run_until(&config, Mode::Forever, async {
                let _ = stopped.await;
                Ok(())
            })
        });
        self.running = Some(Running { stop, thread });
    }

    fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop.send(()).unwrap();
            running.thread.join().unwrap().unwrap();
        }
    }

    fn restart(&mut self) {
        self.stop();
        self.cloud.with(|memory| memory.health = None);
        self.start();
    }

    /// Has an honest release confirmed.
    fn take(&self, offered: Release) -> Digest {
        let digest = Digest::of(&offered.manifest);
        self.cloud.with(|memory| {
            memory.crafted = None;
            memory.reports.clear();
            memory.release = Some(offered);
        });
        self.confirmed(digest);
        digest
    }

    fn confirmed(&self, digest: Digest) {
        self.cloud.wait("the model to be confirmed", |memory| {
            is_live(memory, digest) && memory.reports.iter().any(|r| r.0 == SlotState::Confirmed)
        });
    }

    fn live(&self) -> Option<Digest> {
        self.cloud
            .with(|memory| memory.health.as_ref().and_then(|told| told.live))
    }

    /// The device says no to an offer, with this number, and stays with what it had.
    fn refuses(&self, crafted: Crafted, error: TrustError) {
        let live = self.live();
        let expected = (
            Digest::of(&crafted.manifest.0),
            SlotState::Refused,
            error.code(),
        );
        self.cloud.with(|memory| {
            memory.answers.clear();
            memory.crafted = Some(crafted);
        });
        let what = format!("the refusal: {error} (error {})", error.code());
        self.cloud
            .wait(&what, |memory| memory.answers.contains(&expected));
        self.cloud.with(|memory| memory.crafted = None);
        assert_eq!(self.live(), live);
    }

    /// The device gives a model up that it took on, with this number, and stays with what it had.
    fn gives_up(&self, offered: Release, error: TrustError) {
        let live = self.live();
        let digest = Digest::of(&offered.manifest);
        let expected = (digest, SlotState::Reverted, error.code());
        self.cloud.with(|memory| {
            memory.answers.clear();
            memory.release = Some(offered);
        });
        let what = format!("the end of a model: {error} (error {})", error.code());
        self.cloud
            .wait(&what, |memory| memory.answers.contains(&expected));
        self.cloud.with(|memory| {
            memory.release = None;
            let went_live = |(of, state, _): &(Digest, SlotState, u16)| {
                *of == digest && matches!(state, SlotState::Trial | SlotState::Confirmed)
            };
            assert!(!memory.answers.iter().any(went_live));
        });
        assert_eq!(self.live(), live);
    }

    fn package(&self, manifest: &Digest) -> PathBuf {
        self.data.path().join("models").join(manifest.to_string())
    }

    /// What the stored trust root says.
    fn root_version(&self) -> u32 {
        let bytes = fs::read(self.data.path().join("identity/trust.bin")).unwrap();
        let signed = SignedRoot::from_bytes(&bytes).unwrap();
        TrustRoot::pin(signed).unwrap().version
    }

    /// A root that follows the first one.
    fn next_root(&self, change: impl FnOnce(&mut TrustRoot)) -> TrustRoot {
        let mut root = self.cloud.trust.clone();
        root.version += 1;
        change(&mut root);
        root
    }

    /// Roots are there to be had, the device connects anew and asks, and then holds this version.
    fn publish(&mut self, roots: &[(u32, Vec<u8>)], version: u32) {
        self.cloud.with(|memory| {
            memory.roots = roots.iter().cloned().collect();
            memory.attested = 0;
        });
        self.restart();
        self.cloud.wait("the question for roots", |memory| {
            memory.attested > 0 && memory.health.is_some()
        });
        let deadline = Instant::now() + PATIENCE;
        while self.root_version() != version {
            assert!(
                Instant::now() < deadline,
                "trust root {version} is not taken"
            );
            thread::park_timeout(Duration::from_millis(20));
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            let _ = running.stop.send(());
            let _ = running.thread.join();
        }
    }
}

fn is_live(memory: &Memory, digest: Digest) -> bool {
    memory.health.as_ref().and_then(|told| told.live) == Some(digest)
}

fn stranger() -> SigningKey {
    SigningKey::from_bytes(&[77; 32])
}

fn public(key: &SigningKey) -> [u8; 32] {
    key.verifying_key().to_bytes()
}

#[test]
fn attack_arbitrary_software() {
    let scene = Scene::with_model("", 3);
    // Signed by somebody else, and with a bit flipped in either signature or body.
    let foreign = sealed(4, parts(4), &stranger(), |_| {});
    scene.refuses(
        scene.cloud.craft(&foreign, |_| {}),
        TrustError::BadSignature,
    );
    let honest = scene.cloud.craft(&release(4), |_| {});
    let flips: [fn(&mut Crafted); 4] = [
        |c| c.offer.0[3] ^= 1,
        |c| c.offer.1[9] ^= 1,
        |c| c.manifest.0[3] ^= 1,
        |c| c.manifest.1[9] ^= 1,
    ];
    for flip in flips {
        let mut crafted = honest.clone();
        flip(&mut crafted);
        scene.refuses(crafted, TrustError::BadSignature);
    }
    // And nothing of it was stored.
    assert!(!scene.package(&Digest::of(&foreign.manifest)).exists());
}

#[test]
fn attack_cross_role_replay() {
    let scene = Scene::with_model("", 3);
    let offered = release(4);
    let honest = scene.cloud.craft(&offered, |_| {});
    // The right key and the right body, signed as something else.
    let mut crafted = honest.clone();
    crafted.manifest.1 = sign(Role::Rollout, &release_key(), &offered.manifest);
    scene.refuses(crafted, TrustError::BadSignature);
    let mut crafted = honest.clone();
    crafted.offer.1 = sign(Role::Time, &scene.cloud.rollout, &honest.offer.0);
    scene.refuses(crafted, TrustError::BadSignature);
    // A time stamp that the rollout key did sign, in place of an offer.
    let stamp = wire::bytes(&TimeStamp {
        device: scene.cloud.device.clone(),
        nonce: 1,
        now_ms: 1,
    });
    let mut crafted = honest;
    crafted.offer = (
        stamp.clone(),
        sign(Role::Time, &scene.cloud.rollout, &stamp),
    );
    scene.refuses(crafted, TrustError::BadSignature);
}

#[test]
fn attack_wrong_software_or_device() {
    let scene = Scene::with_model("", 3);
    let good = release(4);
    let crafted = scene
        .cloud
        .craft(&good, |offer| offer.device = "cam2".parse().unwrap());
    scene.refuses(crafted, TrustError::WrongDevice);
    let crafted = scene
        .cloud
        .craft(&good, |offer| offer.manifest = Digest::of(b"other"));
    scene.refuses(crafted, TrustError::WrongManifest);
    let other = sealed(4, parts(4), &release_key(), |m| m.hardware = "orin");
    scene.refuses(scene.cloud.craft(&other, |_| {}), TrustError::WrongHardware);
    let newer = sealed(4, parts(4), &release_key(), |m| m.abi += 1);
    scene.refuses(scene.cloud.craft(&newer, |_| {}), TrustError::WrongAbi);
}

#[test]
fn attack_rollback() {
    let mut scene = Scene::with_model("", 5);
    for sequence in [4, 5] {
        let older = sealed(sequence, parts(40), &release_key(), |_| {});
        scene.refuses(scene.cloud.craft(&older, |_| {}), TrustError::Rollback);
    }
    // Across a restart, and after a newer one that was given up.
    scene.restart();
    scene
        .cloud
        .wait("a health message", |memory| memory.health.is_some());
    let older = sealed(4, parts(40), &release_key(), |_| {});
    scene.refuses(scene.cloud.craft(&older, |_| {}), TrustError::Rollback);
    scene.cloud.with(|memory| memory.mirror = Mirror::Flips);
    scene.gives_up(release(9), TrustError::WrongDigest);
    scene.cloud.with(|memory| memory.mirror = Mirror::Honest);
    scene.refuses(scene.cloud.craft(&older, |_| {}), TrustError::Rollback);
    // The floor rose with what was confirmed, not with what was offered.
    scene.take(release(6));
}

#[test]
fn attack_fast_forward() {
    let mut scene = Scene::new("");
    let last = sealed(u64::MAX, parts(8), &release_key(), |_| {});
    let stolen = scene.take(last);
    let higher = sealed(7, parts(9), &release_key(), |_| {});
    scene.refuses(scene.cloud.craft(&higher, |_| {}), TrustError::Rollback);
    // The release key is rotated: its floor was the old key's.
    let key = SigningKey::from_bytes(&[12; 32]);
    let root = scene.next_root(|root| {
        root.release = public(&key);
        root.min_sequence = 6;
    });
    let root = signed_root(&root, &[&scene.cloud.root]);
    scene.publish(&[(2, root)], 2);
    scene
        .cloud
        .wait("the old model to live on", |memory| is_live(memory, stolen));
    let below = sealed(6, parts(9), &key, |_| {});
    scene.refuses(scene.cloud.craft(&below, |_| {}), TrustError::Rollback);
    scene.take(sealed(7, parts(9), &key, |_| {}));
    let old_key = sealed(10, parts(10), &release_key(), |_| {});
    scene.refuses(
        scene.cloud.craft(&old_key, |_| {}),
        TrustError::BadSignature,
    );
}

#[test]
fn attack_freeze() {
    let scene = Scene::with_model("", 3);
    let good = release(4);
    // The device asks what time it is before it says no.
    let asked = scene.cloud.with(|memory| memory.attested);
    assert!(asked > 0);
    let crafted = scene
        .cloud
        .craft(&good, |offer| offer.expires_ms = 1_000_000);
    scene.refuses(crafted, TrustError::Expired);
    let old = sealed(4, parts(4), &release_key(), |m| m.expires_ms = 1_000_000);
    scene.refuses(scene.cloud.craft(&old, |_| {}), TrustError::Expired);
}

#[test]
fn attack_expired_stored_metadata() {
    let mut scene = Scene::with_model("", 3);
    let (root_key, expired) = (
        scene.cloud.root.clone(),
        scene.next_root(|root| root.expires_ms = 1_000),
    );
    let second = signed_root(&expired, &[&root_key]);
    scene.publish(&[(2, second.clone())], 2);
    scene.refuses(
        scene.cloud.craft(&release(4), |_| {}),
        TrustError::RootExpired,
    );
    // A newer one is still taken by a device that holds an expired one.
    let third = scene.next_root(|root| root.version = 3);
    scene.publish(&[(2, second), (3, signed_root(&third, &[&root_key]))], 3);
    scene.take(release(4));
}

#[test]
fn attack_mix_and_match() {
    let scene = Scene::with_model("", 3);
    // The bytes of another release in place of each part.
    let (good, other) = (parts(4), parts(5));
    for at in [0, 4] {
        let mut offered = sealed(4, good.clone(), &release_key(), |_| {});
        let mut swapped = other[at].1.clone();
        swapped.resize(good[at].1.len(), 0);
        offered.parts.insert(Digest::of(&good[at].1), swapped);
        scene.gives_up(offered, TrustError::WrongDigest);
    }
    // A signed manifest that names a part twice.
    let twice = sealed(4, good, &release_key(), |manifest| {
        let part = manifest.parts[0];
        manifest.parts.push(part).unwrap();
    });
    scene.refuses(scene.cloud.craft(&twice, |_| {}), TrustError::Inconsistent);
}

#[test]
fn attack_partial_bundle() {
    let mut scene = Scene::with_model("", 3);
    let old = scene.live();
    let offered = release(4);
    let digest = Digest::of(&offered.manifest);
    let fetched = scene.cloud.with(|memory| memory.fetched);
    let size: usize = offered.parts.values().map(Vec::len).sum();
    scene.cloud.with(|memory| {
        memory.mirror = Mirror::Until(fetched + size / 2);
        memory.reports.clear();
        memory.release = Some(offered);
    });
    scene.cloud.wait("the transfer to stop", |memory| {
        memory.fetched > fetched + size / 2
    });
    // Half of it is there: the device restarts with the old one, and goes on where it was.
    scene.restart();
    scene
        .cloud
        .wait("the old model", |memory| memory.health.is_some());
    assert_eq!(scene.live(), old);
    assert!(scene.package(&digest).join("manifest.bin").exists());
    scene.cloud.with(|memory| memory.mirror = Mirror::Honest);
    scene.restart();
    scene.confirmed(digest);
    // A part that the cloud does not have ends it.
    scene.cloud.with(|memory| memory.mirror = Mirror::Missing);
    scene.gives_up(release(6), TrustError::Incomplete);
}

#[test]
fn attack_endless_data() {
    let scene = Scene::with_model("", 3);
    scene.cloud.with(|memory| memory.mirror = Mirror::Endless);
    scene.gives_up(release(4), TrustError::TooLong);
    // A manifest beyond its cap is refused unread.
    let mut crafted = scene.cloud.craft(&release(4), |_| {});
    crafted.manifest.0.resize(5_000, 0);
    scene.refuses(crafted, TrustError::TooLarge);
}

#[test]
fn attack_slow_retrieval() {
    let scene = Scene::with_model("[download]\nleast = 1000000\npatience_s = 5\n", 3);
    scene.cloud.with(|memory| memory.mirror = Mirror::Silent);
    scene.gives_up(release(4), TrustError::TooSlow);
    scene.cloud.with(|memory| memory.mirror = Mirror::Honest);
    scene.take(release(5));
}

#[test]
fn attack_drop_requests() {
    let mut scene = Scene::with_model("", 3);
    let live = scene.live();
    scene.stop();
    // Nothing is answered any more: the device goes on with the model and the frames that it has.
    let at = scene.cloud.with(|memory| {
        memory.mute = true;
        memory.release = Some(release(4));
        memory.health.take().unwrap().frame
    });
    let config = scene.config();
    let thread = thread::spawn(move || {
        agent::run_until(&config, Mode::Once { frames: 60 }, std::future::pending())
    });
    // It tries again, and is not told to go away.
    scene.cloud.wait("a second try", |memory| memory.muted >= 2);
    scene.cloud.with(|memory| {
        memory.mute = false;
        memory.release = None;
    });
    thread.join().unwrap().unwrap();
    let told = scene.cloud.with(|memory| memory.health.clone().unwrap());
    assert_eq!((told.frame, told.live), (at + 60, live));
    for book in &told.books {
        assert_eq!(book.flagged, book.acked, "a sample is lost");
    }
}

#[test]
fn attack_key_compromise() {
    let mut scene = Scene::with_model("", 3);
    let root_key = scene.cloud.root.clone();
    // Two of two root keys from now on.
    let second_key = SigningKey::from_bytes(&[13; 32]);
    let both = |root: &mut TrustRoot| {
        let mut keys = Keys::one(public(&root_key));
        keys.keys.push(public(&second_key)).unwrap();
        keys.threshold = 2;
        root.root = keys;
    };
    let second = scene.next_root(both);
    let second = signed_root(&second, &[&root_key, &second_key]);
    scene.publish(&[(2, second.clone())], 2);
    // A thief of one of them, who would have his own release key believed.
    let thief = stranger();
    let third = scene.next_root(|root| {
        both(root);
        root.version = 3;
        root.release = public(&thief);
    });
    let fourth = TrustRoot {
        version: 4,
        ..third.clone()
    };
    for attempt in [
        (3, signed_root(&third, &[&root_key])),
        (3, signed_root(&third, &[&root_key, &root_key])),
        (3, signed_root(&third, &[&root_key, &thief])),
        // Versions must not be left out, whoever signs.
        (4, signed_root(&fourth, &[&root_key, &second_key])),
    ] {
        scene.publish(&[(2, second.clone()), attempt], 2);
        let theirs = sealed(4, parts(4), &thief, |_| {});
        scene.refuses(scene.cloud.craft(&theirs, |_| {}), TrustError::BadSignature);
        assert_eq!(scene.root_version(), 2);
    }
    scene.take(release(4));
}

#[test]
fn attack_malicious_mirror_and_extra_files() {
    let mut scene = Scene::with_model("", 3);
    scene.cloud.with(|memory| memory.mirror = Mirror::Flips);
    scene.gives_up(release(4), TrustError::WrongDigest);
    scene.cloud.with(|memory| memory.mirror = Mirror::Honest);
    let live = scene.take(release(5));
    // What the manifest does not list is never loaded, whatever its name.
    scene.stop();
    let folder = scene.package(&live);
    for name in ["model.bin", "extra.onnx", "model.onnx.delta", "labels.txt"] {
        fs::write(folder.join(name), b"rm -rf").unwrap();
    }
    scene.start();
    scene
        .cloud
        .wait("the model to be live", |memory| is_live(memory, live));
    // Not even a kind that the manifest might have listed.
    let few = parts(7)
        .into_iter()
        .filter(|(kind, _)| *kind != PartKind::BurnRecord);
    let live = scene.take(sealed(7, few.collect(), &release_key(), |_| {}));
    scene.stop();
    fs::write(scene.package(&live).join("model.bpk"), b"not listed").unwrap();
    scene.start();
    scene
        .cloud
        .wait("the model to be live", |memory| is_live(memory, live));
}

#[test]
fn attack_wrong_delta_base() {
    let scene = Scene::with_model("", 3);
    let (old, new) = (parts(3), parts(4));
    let (base, target) = (&old[0].1, &new[0].1);
    // The right base, but the difference makes something else; a base that the device does not
    // have; and all as it should be.
    let mut other = target.clone();
    other[99] ^= 1;
    let mut sequence = 100;
    for (base_of, makes, whole) in [
        (base, &other, true),
        (&other, target, true),
        (base, target, false),
    ] {
        let delta = flywheel_delta::encode_as(Way::Patch, base_of, makes).unwrap();
        let digest = Digest::of(&delta);
        sequence += 2;
        let mut offered = sealed(sequence, new.clone(), &release_key(), |manifest| {
            let entry = Delta {
                part: PartKind::Onnx,
                base: Digest::of(base_of),
                codec: Way::Patch.code(),
                len: delta.len() as u32,
                digest,
            };
            manifest.deltas.push(entry).unwrap();
        });
        offered.parts.insert(digest, delta);
        scene.cloud.with(|memory| memory.asked.clear());
        scene.take(offered);
        scene.cloud.with(|memory| {
            let asked = |digest: &Digest| memory.asked.contains(digest);
            assert_eq!(asked(&Digest::of(target)), whole);
            assert_eq!(asked(&digest), Digest::of(base_of) == Digest::of(base));
        });
        // Back to the base for the next.
        scene.take(sealed(sequence + 1, old.clone(), &release_key(), |_| {}));
    }
}

#[test]
fn attack_swap_after_check() {
    let mut scene = Scene::with_model("", 3);
    let live = scene.live().unwrap();
    // Another network's file, well-formed and of the same length, in place of the checked one.
    let path = scene.package(&live).join("model.onnx");
    let good = fs::read(&path).unwrap();
    let mut other = parts(4)[0].1.clone();
    other.resize(good.len(), 0);
    fs::write(&path, &other).unwrap();
    // What runs was read before. At the next start it is noticed, and the model fetched again.
    scene.cloud.with(|memory| {
        memory.release = Some(release(3));
        memory.reports.clear();
    });
    scene.restart();
    scene.confirmed(live);
    assert_eq!(fs::read(&path).unwrap(), good);
    // A file swapped between its check and its use in one start has no chance: bytes that were
    // hashed are those that are loaded, and a fetched part is hashed again when it is.
}

#[test]
fn attack_parser_abuse() {
    let scene = Scene::with_model("", 3);
    let offered = release(4);
    let key = release_key();
    let resigned = |body: Vec<u8>| {
        let mut crafted = scene
            .cloud
            .craft(&offered, |offer| offer.manifest = Digest::of(&body));
        crafted.manifest = (body.clone(), sign(Role::Release, &key, &body));
        crafted
    };
    let mut longer = offered.manifest.clone();
    longer.push(0);
    scene.refuses(resigned(longer), TrustError::Malformed);
    let short = offered.manifest[..offered.manifest.len() - 1].to_vec();
    scene.refuses(resigned(short), TrustError::Malformed);
    // The length of the name, 5, in two bytes.
    assert_eq!(offered.manifest[..6], *b"\x05roads");
    let spelled = [&[0x85, 0x00][..], &offered.manifest[1..]].concat();
    assert!(postcard::from_bytes::<Manifest<'_>>(&spelled).is_ok());
    scene.refuses(resigned(spelled), TrustError::NotCanonical);
}

#[test]
fn attack_server_overload() {
    use device_core::uplink::{Action, Event, Uplink, UplinkConfig};
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};
    // A server that falls over under 10,000 devices: each tries again by itself, later each time,
    // and not with the others.
    let mut tries = vec![0u32; 600];
    for device in 0..10_000u64 {
        let mut rng = ChaCha8Rng::seed_from_u64(device);
        let mut uplink = Uplink::new(UplinkConfig::default());
        let mut now_ms = 0;
        let mut event = Event::Tick;
        while now_ms < 600_000 {
            let mut wake = None;
            let mut connects = false;
            for action in uplink.step(now_ms, event, rng.next_u32()) {
                match action {
                    Action::Connect(_) => connects = true,
                    Action::Sleep { until_ms } => wake = Some(until_ms),
                    _ => {}
                }
            }
            if connects {
                tries[now_ms as usize / 1000] += 1;
                event = Event::Closed;
            } else {
                event = Event::Tick;
                now_ms = wake.map_or(now_ms + 1000, |at| at.max(now_ms + 1));
            }
        }
    }
    // Everybody at once only when the power came back.
    let worst = tries[2..].iter().max().copied().unwrap();
    let late: u32 = tries[300..].iter().sum();
    println!(
        "tries a second: {} at once, at most {worst} after 2 s, {} on average after 300 s",
        tries[0],
        late / 300
    );
    assert!(worst < 10_000, "{worst}");
    assert!(late / 300 < 2_000, "{}", late / 300);
}
