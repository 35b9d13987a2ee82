//! What image and host both do, and how their outputs are compared.

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::{self, Write};

use flywheel_models::{ModelError, NetConfig, Role, Weights};
use flywheel_shared::envelope;

use crate::plan::{FlexPlan, Output, PlanError};

/// The network: one channel, 16 × 16 pixels, 185,000 values.
pub const CONFIG: NetConfig = NetConfig {
    channels: 1,
    width: 16,
    height: 16,
    classes: 8,
    embedding: 16,
};
/// Pictures that are answered.
pub const PICTURES: u32 = 4;
/// By how much a value may differ between host and device.
pub const TOLERANCE: f32 = 1e-5;
/// Longest record in bytes that a model slot holds.
pub const SLOT: usize = 1 << 20;

/// Why a run ended early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The output could not be written.
    Output,
    /// The model slot holds no record, or a damaged one.
    Slot,
    /// The model cannot be loaded or run.
    Plan(PlanError),
    /// A damaged record is loaded.
    Believed,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Output => f.write_str("the output could not be written"),
            Self::Slot => f.write_str("the model slot holds no whole record"),
            Self::Plan(error) => error.fmt(f),
            Self::Believed => f.write_str("a damaged record is loaded"),
        }
    }
}

impl core::error::Error for Failure {}

impl From<fmt::Error> for Failure {
    fn from(_: fmt::Error) -> Self {
        Self::Output
    }
}

impl From<PlanError> for Failure {
    fn from(error: PlanError) -> Self {
        Self::Plan(error)
    }
}

/// What a model slot in flash holds: an envelope around the burnpack record of a network with
/// seeded values, He-uniform (σ² = 2 / inputs). Only integer and exactly rounded arithmetic, so
/// every host makes the same bytes.
///
/// # Errors
/// [`ModelError`], which would be a bug.
pub fn slot_bytes() -> Result<Vec<u8>, ModelError> {
    let mut weights = Weights::zeros(&CONFIG)?;
    let mut lcg = Lcg(0x5EED);
    for slot in weights.slots().to_vec() {
        let fan_in: usize = match slot.shape.as_slice() {
            [_, rest @ ..] if slot.shape.len() == 4 => rest.iter().product(),
            [inputs, ..] => *inputs,
            [] => 1,
        };
        // A uniform value in ±a has the variance a²/3.
        let bound = libm::sqrtf(6.0 / fan_in as f32);
        for value in &mut weights.values_mut()[slot.range] {
            *value = match slot.role {
                Role::Matrix => bound * lcg.signed(),
                Role::Offset | Role::RunningMean => 0.1 * lcg.signed(),
                Role::Scale | Role::RunningVar => 1.0 + 0.1 * lcg.signed(),
            };
        }
    }
    let record = weights.to_record()?;
    let mut bytes = envelope::header(&record).to_vec();
    bytes.extend_from_slice(&record);
    Ok(bytes)
}

/// Loads the record in `slot`, refuses damaged copies of it, and prints the answers to all
/// pictures, one a line. `loaded` is called once the network is built.
///
/// # Errors
/// [`Failure`].
pub fn run(out: &mut impl Write, slot: &[u8], loaded: impl FnOnce()) -> Result<(), Failure> {
    let (record, _) = envelope::split(slot, SLOT).map_err(|_| Failure::Slot)?;
    // Blank flash of zeros is an envelope of nothing.
    let Some((_, cut)) = record.split_last() else {
        return Err(Failure::Slot);
    };
    writeln!(out, "infer: record of {} bytes", record.len())?;
    if FlexPlan::load(CONFIG, cut).is_ok() {
        return Err(Failure::Believed);
    }
    let mut plan = FlexPlan::load(CONFIG, record)?;
    loaded();
    let mut logits = vec![0.0; plan.classes()];
    let mut embedding = vec![0.0; plan.embedding_dim()];
    let mut lcg = Lcg(0xF00D);
    for picture in 0..PICTURES {
        let input: Vec<f32> = (0..plan.input_len()).map(|_| lcg.signed()).collect();
        plan.run(
            &input,
            &mut Output {
                logits: &mut logits,
                embedding: &mut embedding,
            },
        )?;
        for (name, values) in [("logits", &logits), ("embedding", &embedding)] {
            write!(out, "infer: picture {picture} {name}")?;
            values
                .iter()
                .try_for_each(|value| write!(out, " {value:.8}"))?;
            writeln!(out)?;
        }
    }
    let short = &mut logits[1..];
    let refused = plan.run(
        &vec![0.0; plan.input_len()],
        &mut Output {
            logits: short,
            embedding: &mut embedding,
        },
    );
    if let Err(error @ PlanError::Buffer { .. }) = refused {
        writeln!(out, "infer: refused: {error}")?;
        Ok(())
    } else {
        Err(Failure::Believed)
    }
}

/// The largest difference between the numbers with a decimal point in two outputs; an error in
/// words if anything else differs.
///
/// # Errors
/// The first word that differs.
pub fn difference(host: &str, device: &str) -> Result<f32, String> {
    let (host, device): (Vec<&str>, Vec<&str>) = (
        host.split_whitespace().collect(),
        device.split_whitespace().collect(),
    );
    if host.len() != device.len() {
        return Err(alloc::format!(
            "the host prints {} words, the device {}",
            host.len(),
            device.len()
        ));
    }
    let mut largest = 0.0f32;
    for (a, b) in host.iter().zip(&device) {
        match (number(a), number(b)) {
            (Some(x), Some(y)) => largest = largest.max((x - y).abs()),
            _ if a == b => {}
            _ => return Err(alloc::format!("the host prints {a:?}, the device {b:?}")),
        }
    }
    Ok(largest)
}

fn number(word: &str) -> Option<f32> {
    word.contains('.').then(|| word.parse().ok()).flatten()
}

/// Knuth's MMIX generator; the upper half of the state is the output.
struct Lcg(u64);

impl Lcg {
    /// Uniform in [−1, 1), a multiple of 2⁻²³.
    fn signed(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outputs_of_two_runs_are_equal_and_damage_is_refused() {
        let mut slot = slot_bytes().unwrap();
        let [first, second] = [(); 2].map(|()| {
            let mut text = String::new();
            run(&mut text, &slot, || {}).unwrap();
            text
        });
        assert_eq!(difference(&first, &second), Ok(0.0));
        let at = slot.len() / 2;
        slot[at] ^= 1;
        assert_eq!(run(&mut String::new(), &slot, || {}), Err(Failure::Slot));
        assert_eq!(run(&mut String::new(), &[0; 64], || {}), Err(Failure::Slot));
    }

    #[test]
    fn differences_are_found() {
        assert_eq!(difference("a 0.5 -1.0", "a 0.25 -1.0"), Ok(0.25));
        assert!(difference("a 0.5", "b 0.5").is_err());
        assert!(difference("a 0.5", "a").is_err());
        assert!(difference("a 5", "a 6").is_err());
        assert!(difference("0.5", "NaN").is_err());
    }
}
