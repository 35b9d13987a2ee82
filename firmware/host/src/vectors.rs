//! The maker of the test vectors: what a cloud would send to the device of the scenario.
//!
//! The vectors are committed, not made during the build, so that the image also proves that it
//! reads bytes of an earlier day. The keys are public test keys and sign nothing else.

use device_core::params::{Params, Shape};
use device_core::score::{knot_level, normalise, score};
use ed25519_dalek::SigningKey;
use firmware_scenario::living::rollout_key;
use firmware_scenario::stream::{CLASSES, DIM, GAIN, Scene, Stream, World};
use firmware_scenario::vectors::{DEVICE, HARDWARE, MADE_MS, NONCE, SEQUENCE, SIGNED_MS, UNTIL_MS};
use flywheel_shared::ids::Digest;
use flywheel_shared::spec::Golden;
use flywheel_shared::trust::{
    Keys, MAX_BODY, Manifest, Offer, Part, PartKind, RUNTIME_ABI, Role, Signed, SignedRoot,
    TimeStamp, TrialBounds, TrustRoot, sign,
};
use serde::Serialize;

/// Knots of each conformal table.
const TABLE: usize = 32;
/// Items behind the means, and as many behind the tables.
const ITEMS: usize = 1000;
/// Golden frames.
const GOLDEN: usize = 4;

/// An embedding while parameters are computed.
type Row = [f64; DIM];
/// A matrix by rows.
type Square = [[f64; DIM]; DIM];

/// File names and contents.
pub fn make() -> Result<Vec<(&'static str, Vec<u8>)>, String> {
    let [release, rollout] = [2u8, 3].map(|seed| SigningKey::from_bytes(&[seed; 32]));
    let roots = [1u8, 6, 7].map(|seed| SigningKey::from_bytes(&[seed; 32]));
    let first = TrustRoot {
        version: 1,
        issued_ms: SIGNED_MS,
        expires_ms: 2 * UNTIL_MS,
        root: Keys {
            threshold: 2,
            keys: roots.iter().map(public).collect(),
        },
        release: public(&release),
        rollout: public(&rollout),
        min_sequence: 0,
    };
    let rollout = rollout_key();
    let second = TrustRoot {
        version: 2,
        rollout: public(&rollout),
        ..first.clone()
    };
    let scores = scores()?;
    let golden = golden()?;
    let mut manifest = Manifest {
        name: "signs",
        sequence: SEQUENCE,
        hardware: HARDWARE,
        abi: RUNTIME_ABI,
        created_ms: MADE_MS,
        expires_ms: UNTIL_MS,
        trial: TrialBounds {
            frames: 32,
            max_latency_us: 5_000,
            min_confidence: 0.5,
        },
        parts: Default::default(),
        deltas: Default::default(),
    };
    for (kind, bytes) in [(PartKind::Scores, &scores), (PartKind::Golden, &golden)] {
        let part = Part {
            kind,
            len: u32::try_from(bytes.len()).map_err(|error| error.to_string())?,
            digest: Digest::of(bytes),
        };
        manifest
            .parts
            .push(part)
            .map_err(|_| "too many parts for a manifest")?;
    }
    let body = encode(&manifest)?;
    let offer = Offer {
        device: DEVICE
            .parse()
            .map_err(|error| format!("{DEVICE}: {error}"))?,
        manifest: Digest::of(&body),
        sequence: SEQUENCE,
        issued_ms: SIGNED_MS,
        expires_ms: UNTIL_MS,
        nonce: 1,
    };
    let time = TimeStamp {
        device: offer.device.clone(),
        nonce: NONCE,
        now_ms: MADE_MS,
    };
    Ok(vec![
        ("root.bin", seal_root(&first, &roots[..2])?),
        ("root2.bin", seal_root(&second, &roots[1..])?),
        ("manifest.bin", seal(Role::Release, &release, &body)?),
        (
            "offer.bin",
            seal(Role::Rollout, &rollout, &encode(&offer)?)?,
        ),
        ("time.bin", seal(Role::Time, &rollout, &encode(&time)?)?),
        ("scores.bin", scores),
        ("golden.bin", golden),
    ])
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, String> {
    let mut buffer = [0u8; 2 * MAX_BODY];
    let bytes = postcard::to_slice(value, &mut buffer).map_err(|error| error.to_string())?;
    Ok(bytes.to_vec())
}

fn seal(role: Role, key: &SigningKey, body: &[u8]) -> Result<Vec<u8>, String> {
    let signature = sign(role, key, body);
    encode(&Signed {
        body,
        signature: &signature,
    })
}

fn public(key: &SigningKey) -> [u8; 32] {
    key.verifying_key().to_bytes()
}

fn seal_root(root: &TrustRoot, keys: &[SigningKey]) -> Result<Vec<u8>, String> {
    let body = encode(root)?;
    let pair = |key| [&public(key)[..], &sign(Role::Root, key, &body)].concat();
    let signatures: Vec<u8> = keys.iter().flat_map(pair).collect();
    encode(&SignedRoot {
        body: &body,
        signatures: &signatures,
    })
}

/// Golden frames of one pixel per embedding value, with the answers of the stream's model.
fn golden() -> Result<Vec<u8>, String> {
    let world = World::new();
    let mut frames = Vec::new();
    let mut logits = Vec::new();
    for frame in 0..GOLDEN {
        let pixels: [u8; DIM] = std::array::from_fn(|i| (64 + (frame * 53 + i * 29) % 128) as u8);
        for logit in world.logits(&World::embedding_of(&pixels)) {
            logits.extend_from_slice(&logit.to_le_bytes());
        }
        frames.extend_from_slice(&pixels);
    }
    encode(&Golden {
        width: DIM as u16,
        height: 1,
        channels: 1,
        frames: &frames,
        logits: &logits,
        tolerance: 1e-4,
    })
}

/// Score parameters of the stream's daylight: means and covariances of unit-length embeddings, and
/// tables from items that these have not seen, scored by the device's own code.
fn scores() -> Result<Vec<u8>, String> {
    let shape = Shape::plain(CLASSES as u16, DIM as u16, TABLE as u16);
    let layout = shape.layout();
    let mut stream = Stream::new(11);
    let mut item = || stream.fresh(Scene::DAY);

    let training: Vec<(usize, Row)> = (0..ITEMS)
        .map(|_| {
            let frame = item();
            let mut unit = [0.0; DIM];
            normalise(&frame.embedding, &mut unit);
            (frame.class, unit.map(f64::from))
        })
        .collect();
    let mut counts = [0.0f64; CLASSES];
    let mut means = [[0.0; DIM]; CLASSES];
    for (class, x) in &training {
        counts[*class] += 1.0;
        for (sum, x) in means[*class].iter_mut().zip(x) {
            *sum += x;
        }
    }
    if counts.contains(&0.0) {
        return Err("a class has no training item".to_owned());
    }
    for (mean, count) in means.iter_mut().zip(counts) {
        *mean = mean.map(|sum| sum / count);
    }
    let centre: Row =
        std::array::from_fn(|i| means.iter().map(|mean| mean[i]).sum::<f64>() / CLASSES as f64);
    let within = whitening(training.iter().map(|(class, x)| less(x, &means[*class])));
    let background = whitening(training.iter().map(|(_, x)| less(x, &centre)));

    let mut values = vec![0.0f32; shape.values()];
    values[layout.temperature] = GAIN;
    values[layout.calibrated] = ITEMS as f32;
    let white = means
        .iter()
        .flat_map(|mean| times(&within, &less(mean, &centre)));
    fill(&mut values[layout.counts.clone()], counts);
    fill(&mut values[layout.centre.clone()], centre);
    fill(&mut values[layout.within.clone()], lower(&within));
    fill(&mut values[layout.background.clone()], lower(&background));
    fill(&mut values[layout.means.clone()], white);

    let (mut unsure, mut novel) = (Vec::new(), Vec::new());
    let params = Params::checked(shape, &values).map_err(|error| error.to_string())?;
    let mut scratch = vec![0.0; shape.scratch()];
    for _ in 0..ITEMS {
        let frame = item();
        let scores = score(&frame.logits, &frame.embedding, &params, &mut scratch)
            .map_err(|error| error.to_string())?;
        unsure.push(-scores.margin);
        novel.push(scores.novelty);
    }
    for (range, mut found) in [(layout.unsure, unsure), (layout.novel, novel)] {
        found.sort_unstable_by(f32::total_cmp);
        for (i, knot) in values[range].iter_mut().enumerate() {
            let rank = knot_level(i, TABLE) * (ITEMS - 1) as f32;
            *knot = found[rank as usize];
        }
    }
    let params = Params::checked(shape, &values).map_err(|error| error.to_string())?;
    let mut bytes = vec![0u8; shape.encoded_len()];
    params
        .encode(&mut bytes)
        .map_err(|error| error.to_string())?;
    Ok(bytes)
}

fn fill(place: &mut [f32], values: impl IntoIterator<Item = f64>) {
    for (place, value) in place.iter_mut().zip(values) {
        *place = value as f32;
    }
}

fn less(a: &Row, b: &Row) -> Row {
    std::array::from_fn(|i| a[i] - b[i])
}

/// L·x with L lower triangular.
fn times(matrix: &Square, x: &Row) -> Row {
    std::array::from_fn(|i| (0..=i).map(|j| matrix[i][j] * x[j]).sum())
}

/// The lower triangle by rows.
fn lower(matrix: &Square) -> impl Iterator<Item = f64> {
    (0..DIM).flat_map(move |i| (0..=i).map(move |j| matrix[i][j]))
}

/// The inverse of the Cholesky factor of the covariance of `rows`, whose mean is 0.
fn whitening(rows: impl Iterator<Item = Row>) -> Square {
    let mut covariance = [[0.0; DIM]; DIM];
    for (i, row) in covariance.iter_mut().enumerate() {
        // Unit length takes one dimension away at most; this keeps the factor defined.
        row[i] = 1e-6 * ITEMS as f64;
    }
    for x in rows {
        for i in 0..DIM {
            for j in 0..DIM {
                covariance[i][j] += x[i] * x[j];
            }
        }
    }
    let mut factor = [[0.0; DIM]; DIM];
    for i in 0..DIM {
        for j in 0..=i {
            let done: f64 = (0..j).map(|k| factor[i][k] * factor[j][k]).sum();
            let rest = covariance[i][j] / ITEMS as f64 - done;
            factor[i][j] = if i == j {
                rest.sqrt()
            } else {
                rest / factor[j][j]
            };
        }
    }
    let columns: Square = std::array::from_fn(|j| {
        solve(
            &factor,
            &std::array::from_fn(|i| f64::from(u8::from(i == j))),
        )
    });
    std::array::from_fn(|i| std::array::from_fn(|j| columns[j][i]))
}

/// x with L·x = b, L lower triangular.
fn solve(matrix: &Square, b: &Row) -> Row {
    let mut x = [0.0; DIM];
    for i in 0..DIM {
        let known: f64 = (0..i).map(|k| matrix[i][k] * x[k]).sum();
        x[i] = (b[i] - known) / matrix[i][i];
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use firmware_scenario::vectors;

    /// Fails where a change of the wire types, the verifier's domains or the scores would leave
    /// devices in the field unable to read what the cloud sends.
    #[test]
    fn what_is_made_today_is_what_was_committed() {
        let made = make().unwrap();
        let committed = [
            ("root.bin", vectors::ROOT),
            ("root2.bin", vectors::ROOT2),
            ("manifest.bin", vectors::MANIFEST),
            ("offer.bin", vectors::OFFER),
            ("time.bin", vectors::TIME),
            ("scores.bin", vectors::SCORES),
            ("golden.bin", vectors::GOLDEN),
        ];
        assert_eq!(made.len(), committed.len());
        for ((name, bytes), (expected_name, expected)) in made.iter().zip(committed) {
            assert_eq!(*name, expected_name);
            assert!(
                bytes == expected,
                "{name} differs; if that is meant, run: cargo run -p firmware-host vectors \
                 scenario/vectors"
            );
        }
    }

    #[test]
    fn the_scenario_holds_and_repeats() {
        let [first, second] = [(); 2].map(|()| {
            let mut text = String::new();
            firmware_scenario::run(&mut text, &mut crate::flash()).unwrap();
            text
        });
        assert_eq!(first, second);
    }

    #[test]
    fn lost_output_is_an_error() {
        struct Full(usize);
        impl std::fmt::Write for Full {
            fn write_str(&mut self, text: &str) -> std::fmt::Result {
                self.0 = self.0.checked_sub(text.len()).ok_or(std::fmt::Error)?;
                Ok(())
            }
        }
        let failure = firmware_scenario::run(&mut Full(2000), &mut crate::flash()).unwrap_err();
        assert_eq!(failure, firmware_scenario::Failure::Output);
    }

    #[test]
    fn whitened_noise_is_white() {
        let mut stream = Stream::new(5);
        let mut rows: Vec<Row> = (0..ITEMS)
            .map(|_| stream.fresh(Scene::DAY).embedding.map(f64::from))
            .collect();
        let mean: Row =
            std::array::from_fn(|i| rows.iter().map(|x| x[i]).sum::<f64>() / ITEMS as f64);
        for row in &mut rows {
            *row = less(row, &mean);
        }
        let matrix = whitening(rows.iter().copied());
        let white: Vec<Row> = rows.iter().map(|x| times(&matrix, x)).collect();
        for i in 0..DIM {
            for j in 0..DIM {
                let covariance = white.iter().map(|x| x[i] * x[j]).sum::<f64>() / ITEMS as f64;
                let expected = f64::from(u8::from(i == j));
                assert!((covariance - expected).abs() < 1e-3, "{i} {j} {covariance}");
            }
        }
    }
}
