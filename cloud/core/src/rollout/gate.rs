//! Whether the next wave may open, whether the rollout must halt, and if neither, what is waited
//! for: all of it from recorded progress and measurements.

use super::policy::DriftGate;
use super::{Device, Member, Progress, Rollout};
use crate::drift::{self, Ks};
use serde::{Deserialize, Serialize};

/// Confidences of the uniform lane under the model and under the one before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Confidence {
    /// Samples under the one before.
    pub reference: u32,
    /// Samples under the model.
    pub recent: u32,
    /// Mean under the one before.
    pub reference_mean: f64,
    /// Mean under the model.
    pub recent_mean: f64,
    /// The test, when there are enough of both.
    pub ks: Option<Ks>,
}

impl Confidence {
    /// Compares two samples of confidences.
    #[must_use]
    pub fn compare(reference: &[f32], recent: &[f32]) -> Self {
        let mean =
            |of: &[f32]| of.iter().map(|c| f64::from(*c)).sum::<f64>() / of.len().max(1) as f64;
        let count = |of: &[f32]| u32::try_from(of.len()).unwrap_or(u32::MAX);
        Self {
            reference: count(reference),
            recent: count(recent),
            reference_mean: mean(reference),
            recent_mean: mean(recent),
            ks: drift::ks(reference, recent),
        }
    }
}

/// What a gate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The next wave may open, for this reason.
    Pass(String),
    /// Not yet, for this reason.
    Wait(String),
    /// Never: the rollout halts.
    Halt(String),
}

/// A device of a rollout with what the server knows of it; `None` when it is no longer enrolled.
pub(super) type Known<'a> = (&'a str, &'a Member, Option<&'a Device>);

/// Limits that waiting does not cure.
pub(super) fn exceeded(
    rollout: &Rollout,
    members: &[Known<'_>],
    confidence: Option<&Confidence>,
) -> Option<String> {
    let policy = &rollout.head.policy;
    let gate = &policy.gate;
    let failures = || {
        members
            .iter()
            .filter_map(|(id, member, _)| Some((*id, member.wave, member.progress.failure()?)))
    };
    let canaries = failures().filter(|(_, wave, _)| *wave == 0).count();
    if canaries > policy.canary_max_failed as usize {
        let (id, _, reason) = failures().find(|(_, wave, _)| *wave == 0)?;
        return Some(match canaries {
            1 => format!("canary {id} gave the model up: {reason}"),
            n => format!(
                "{n} canaries gave the model up, at most {} may; for example {id}: {reason}",
                policy.canary_max_failed
            ),
        });
    }
    let others = failures().count() - canaries;
    let example = || {
        failures()
            .find(|(_, wave, _)| *wave > 0)
            .or_else(|| failures().next())
    };
    if let Some(limit) = policy.failures_allowed()
        && others > limit as usize
    {
        let (id, _, reason) = example()?;
        return Some(format!(
            "{others} devices gave the model up, at most {limit} may; for example {id}: {reason}"
        ));
    }
    if let Some(limit) = gate.max_failed_share {
        let answers = members
            .iter()
            .filter(|(_, m, _)| has_answered(&m.progress))
            .count();
        let failed = canaries + others;
        let share = failed as f64 / answers.max(1) as f64;
        if failed > 0 && answers >= gate.min_answers as usize && share > limit {
            let (id, _, reason) = example()?;
            return Some(format!(
                "{failed} of {answers} devices gave the model up, at most {:.1} % may; for example {id}: {reason}",
                limit * 100.0
            ));
        }
    }
    if let Some(limit) = gate.max_latency_p99_ms {
        let mut slowest: Vec<u32> = members
            .iter()
            .map(|(_, member, _)| member.latency_us)
            .filter(|us| *us > 0)
            .collect();
        slowest.sort_unstable();
        // Nearest rank: with fewer than 100 devices the slowest of them.
        let rank = (slowest.len() * 99).div_ceil(100).max(1) - 1;
        let ms = slowest.get(rank).map_or(0.0, |us| f64::from(*us) / 1000.0);
        if ms > limit {
            return Some(format!(
                "the slowest inference on trial is {ms:.1} ms at the 99th percentile of {} devices, at most {limit:.1} ms may be",
                slowest.len()
            ));
        }
    }
    if let Some(limit) = gate.max_restarts {
        let restarts: u64 = members
            .iter()
            .filter_map(|(_, member, device)| {
                Some(u64::from((*device)?.restarts.saturating_sub(member.boots?)))
            })
            .sum();
        if restarts > u64::from(limit) {
            return Some(format!(
                "devices restarted {restarts} times since they were offered the model, at most {limit} times may be"
            ));
        }
    }
    let drift = gate.drift.as_ref()?;
    confidence.and_then(|confidence| drifted(drift, confidence))
}

fn drifted(gate: &DriftGate, found: &Confidence) -> Option<String> {
    let ks = found.ks?;
    let enough = found.recent.min(found.reference) >= gate.min_samples;
    let fell = found.recent_mean < found.reference_mean;
    let far = ks.statistic > gate.max_distance && ks.p < gate.alpha;
    (enough && fell && far).then(|| {
        format!(
            "confidence on the uniform lane fell from {:.2} to {:.2} (KS {:.2}, p {:.1e}; at most {:.2} may be)",
            found.reference_mean, found.recent_mean, ks.statistic, ks.p, gate.max_distance
        )
    })
}

/// Whether the wave has done what the next one waits for.
pub(super) fn of_wave(
    rollout: &Rollout,
    wave: u32,
    members: &[Known<'_>],
    confidence: Option<&Confidence>,
    now_ms: u64,
) -> Verdict {
    if rollout.head.forced_wave == Some(wave) {
        return Verdict::Pass("the operator forced it".to_owned());
    }
    let gate = &rollout.head.policy.gate;
    let of_wave = || members.iter().filter(|(_, member, _)| member.wave == wave);
    // A later wave waits for the devices it can wait for; one that is away does not hold up the
    // rest and is offered the model when it comes back. Canaries are always waited for.
    let counts = |member: &Member, device: Option<&Device>| match (&member.progress, device) {
        (Progress::Excluded { .. }, _) => false,
        (progress, _) if progress.is_settled() => true,
        (_, None) => false,
        (progress, Some(device)) => {
            wave == 0
                || progress.is_under_way()
                || device.online && rollout.head.selector.matches(device)
        }
    };
    let all = of_wave()
        .filter(|(_, member, device)| counts(member, *device))
        .count();
    let open = of_wave()
        .filter(|(_, member, device)| counts(member, *device) && !member.progress.is_settled())
        .count();
    let mut confirmed: Vec<u64> = of_wave()
        .filter_map(|(_, member, _)| match member.progress {
            Progress::Confirmed { at_ms } => Some(at_ms),
            _ => None,
        })
        .collect();
    confirmed.sort_unstable();
    let wanted = match gate.min_confirmed {
        // What rounding adds must not ask for one device more.
        Some(share) => (share * all as f64 - 1e-9).ceil() as usize,
        None => confirmed.len(),
    };
    if confirmed.len() < wanted {
        return if confirmed.len() + open < wanted {
            Verdict::Halt(format!(
                "{} of {all} devices of wave {wave} confirmed and {open} can still; {wanted} must",
                confirmed.len()
            ))
        } else {
            Verdict::Wait(format!(
                "{} of {all} devices of wave {wave} confirmed; {wanted} must",
                confirmed.len()
            ))
        };
    }
    if gate.min_confirmed.is_none() && open > 0 {
        return Verdict::Wait(format!(
            "{open} of {all} devices of wave {wave} have not answered"
        ));
    }
    if let Some(drift) = &gate.drift {
        let (recent, reference) = confidence.map_or((0, 0), |c| (c.recent, c.reference));
        if recent.min(reference) < drift.min_samples {
            return Verdict::Wait(format!(
                "{recent} uniform samples under the model and {reference} under the one before; {} of each are needed",
                drift.min_samples
            ));
        }
    }
    let enough_ms = match wanted {
        0 => rollout.head.opened_ms,
        n => confirmed[n - 1].max(rollout.head.opened_ms),
    };
    let soaked_ms = now_ms.saturating_sub(enough_ms);
    let soak_ms = gate.soak_s.saturating_mul(1000);
    if soaked_ms < soak_ms {
        return Verdict::Wait(format!(
            "soaking: {} of {} s",
            soaked_ms / 1000,
            gate.soak_s
        ));
    }
    Verdict::Pass(format!(
        "{} of {all} devices of wave {wave} confirmed",
        confirmed.len()
    ))
}

const fn has_answered(progress: &Progress) -> bool {
    progress.is_settled() && !matches!(progress, Progress::Excluded { .. })
}
