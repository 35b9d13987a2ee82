//! Judging a model: the exported artefact, through the device's engine, on the golden set, next
//! to the champion.

use std::collections::BTreeSet;

use cloud_core::evaluate::{self, Outcome, Report};
use cloud_core::gate;
use flywheel_shared::ids::Digest;

use super::Fault;
use super::inference::{Inference, Scorer};
use super::registry::ModelRecord;
use super::training::Stations;
use crate::api::types::{GateView, Split};

/// What one model said about the golden set.
struct Answers {
    probabilities: Vec<Vec<f32>>,
    latency_us: Vec<u32>,
}

impl Stations<'_> {
    /// Evaluates a model on the golden set, asks the gate, and stores both with the model.
    ///
    /// # Errors
    /// If there is no golden set, or an engine fails.
    pub fn evaluate(
        &self,
        id: &str,
        rare: &[String],
        progress: &mut dyn FnMut(u64, u64, String),
    ) -> Result<ModelRecord, Fault> {
        let model = self.registry.find(id)?;
        if !model.classifies() {
            return Err(Fault::Conflict(format!(
                "model {} is no classifier, and the golden set holds classes; promote it with --force REASON",
                model.id
            )));
        }
        let golden = self.catalog.imports(Split::Golden)?;
        if golden.is_empty() {
            return Err(Fault::Conflict(
                "there is no golden set to judge by; import one with `flywheel dataset import DIR --split golden`"
                    .to_owned(),
            ));
        }
        let truth_classes: Vec<String> = golden
            .iter()
            .map(|import| import.class.clone())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        let truths: Vec<u32> = golden
            .iter()
            .map(|import| {
                truth_classes
                    .binary_search(&import.class)
                    .map(|at| at as u32)
                    .map_err(|_| Fault::Internal("a golden class is not listed".to_owned()))
            })
            .collect::<Result<_, _>>()?;
        let digests: Vec<Digest> = golden.iter().map(|import| import.digest).collect();
        let champion = self
            .registry
            .champion()?
            .filter(|champion| champion.id != model.id);
        let rival = champion.as_ref().filter(|champion| champion.classifies());
        if !model
            .classes
            .iter()
            .any(|class| truth_classes.contains(class))
        {
            return Err(Fault::Conflict(format!(
                "model {} knows {:?} and the golden set holds {truth_classes:?}: there is nothing to judge by; import the model with --labels, or other pictures",
                model.id, model.classes
            )));
        }
        let steps = digests.len() as u64 * if rival.is_some() { 2 } else { 1 };
        let mut done = 0;
        let mut judge = |model: &ModelRecord, who: &str| {
            self.answers(model, &digests, &mut || {
                done += 1;
                if done % 50 == 0 || done == steps {
                    progress(done, steps, who.to_owned());
                }
            })
        };
        let candidate_answers = judge(&model, "candidate")?;
        let rival_answers = match rival {
            Some(rival) => Some(judge(rival, "champion")?),
            None => None,
        };
        let candidate_outcomes = outcomes(&truths, &candidate_answers);
        let report = report(&truth_classes, &model, rare, &candidate_outcomes)?;
        // Weights are inherited, and with them what the models before were trained on.
        let mut training = BTreeSet::new();
        let mut line = Some(model.clone());
        while let Some(at) = line {
            // What others trained on is theirs to know.
            if at.origin.is_none() {
                let dataset = self.catalog.find(&at.dataset)?.1;
                training.extend(dataset.items.iter().map(|item| item.digest));
            }
            line = match at.parent.as_deref() {
                Some(parent) => Some(self.registry.find(parent)?),
                None => None,
            };
        }
        let right = |model: &ModelRecord, answers: &Answers, at: usize| {
            evaluate::argmax(&answers.probabilities[at])
                .and_then(|top| model.classes.get(top))
                .is_some_and(|class| *class == golden[at].class)
        };
        let cases: Vec<gate::Case> = digests
            .iter()
            .zip(&truths)
            .enumerate()
            .map(|(at, (digest, class))| gate::Case {
                digest: *digest,
                class: *class,
                champion: rival
                    .zip(rival_answers.as_ref())
                    .is_some_and(|(rival, answers)| right(rival, answers, at)),
                candidate: right(&model, &candidate_answers, at),
            })
            .collect();
        let verdict = gate::judge(
            &gate::GatePolicy::default(),
            &gate::Comparison {
                classes: &truth_classes,
                cases: &cases,
                slices: &[],
                has_champion: rival.is_some(),
                // Not measured here: on a server that does other things at the same time it
                // would make the verdict a matter of luck. Devices bound it on trial.
                latency_us: (0, 0),
                training: &training,
            },
        )
        .map_err(|error| Fault::Internal(format!("the gate: {error}")))?;
        self.registry.judged(
            &model.id,
            report,
            GateView {
                passed: verdict.passed,
                champion: champion.map(|champion| champion.id),
                reasons: verdict.reasons,
            },
        )
    }

    fn answers(
        &self,
        model: &ModelRecord,
        digests: &[Digest],
        tick: &mut dyn FnMut(),
    ) -> Result<Answers, Fault> {
        let mut inference = Inference::load(self.store, model)?;
        let scorer = Scorer::load(self.store, model)?;
        let mut answers = Answers {
            probabilities: Vec::with_capacity(digests.len()),
            latency_us: Vec::with_capacity(digests.len()),
        };
        for digest in digests {
            answers
                .latency_us
                .push(inference.run(&self.picture(digest)?)?);
            answers
                .probabilities
                .push(scorer.probabilities(&inference.logits)?);
            tick();
        }
        Ok(answers)
    }
}

fn outcomes<'a>(truths: &[u32], answers: &'a Answers) -> Vec<Outcome<'a>> {
    truths
        .iter()
        .zip(&answers.probabilities)
        .zip(&answers.latency_us)
        .map(|((truth, probs), latency_us)| Outcome {
            truth: *truth,
            probs,
            latency_us: *latency_us,
        })
        .collect()
}

fn report(
    truth_classes: &[String],
    model: &ModelRecord,
    rare: &[String],
    outcomes: &[Outcome<'_>],
) -> Result<Report, Fault> {
    evaluate::evaluate(truth_classes, &model.classes, rare, outcomes)
        .map_err(|error| Fault::Invalid(error.to_string()))
}
