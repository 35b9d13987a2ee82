//! The model of a benchmark: trained as production trains, on every class but one, and asked
//! through the device's engine.

use std::ops::ControlFlow;
use std::sync::Arc;

use anyhow::{Context, Result};
use cloud_trainer::{Example, TrainConfig};
use device_engine::{EngineKind, ModelBytes, Output, Plan, preprocess};
use flywheel_models::Weights;
use flywheel_shared::spec::{ClassOutput, InputSpec, ModelSpec, Task};

use super::pictures::Item;
use crate::service::training::fresh_net;

/// A trained model, loaded.
pub struct Subject {
    plan: Box<dyn Plan>,
    spec: InputSpec,
    input: Vec<f32>,
    /// K × d weights of the classification head.
    pub head: Vec<f32>,
}

/// What a model said about a list of pictures, row by row.
#[derive(Default)]
pub struct Answers {
    /// n × K.
    pub logits: Vec<f32>,
    /// n × d.
    pub embeddings: Vec<f32>,
}

impl Answers {
    /// Logits and embedding of each picture, for a model of `classes` classes.
    pub fn rows(&self, classes: usize) -> impl Iterator<Item = (&[f32], &[f32])> {
        let rows = self.logits.len() / classes;
        let dim = self.embeddings.len().checked_div(rows).unwrap_or(1).max(1);
        let logits = self.logits.chunks_exact(classes);
        logits.zip(self.embeddings.chunks_exact(dim))
    }
}

impl Subject {
    /// Trains on `items`, whose class `labels` maps to an index of a logit.
    ///
    /// # Errors
    /// If training or the engine fails.
    pub fn train(
        items: &[&Item],
        labels: &[u32],
        classes: usize,
        seed: u64,
        steps: usize,
        progress: &mut dyn FnMut(),
    ) -> Result<Self> {
        let pictures = items.iter().map(|item| &item.picture);
        let (net, spec) = fresh_net(pictures, classes).map_err(anyhow::Error::from)?;
        let mut config = TrainConfig::new(net, spec, seed);
        config.steps = steps;
        let examples = items
            .iter()
            .zip(labels)
            .map(|(item, &label)| {
                let small = item.picture.resized(
                    u32::from(spec.width),
                    u32::from(spec.height),
                    spec.channels,
                )?;
                Ok(Example {
                    pixels: Arc::from(small.pixels),
                    label,
                    weight: 1.0,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let trained = cloud_trainer::train(&config, &examples, None, &mut |_| {
            progress();
            ControlFlow::Continue(())
        })?;
        let weights = Weights::from_record(&net, &trained.record)?;
        let names = vec!["x"; classes].join("\n");
        let plan = device_engine::load(
            EngineKind::Tract,
            &ModelBytes {
                onnx: &trained.onnx,
                record: &trained.record,
                spec: &ModelSpec {
                    arch: "",
                    labels: &names,
                    input: spec,
                    embedding: net.embedding as u16,
                    task: Task::Classify(ClassOutput::Logits),
                },
            },
        )?;
        Ok(Self {
            input: vec![0.0; plan.input_len()],
            plan,
            spec,
            head: head_rows(&weights, classes)?,
        })
    }

    /// d.
    pub fn embedding_dim(&self) -> usize {
        self.plan.embedding_dim()
    }

    /// Answers on pictures.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn answer<'a>(&mut self, items: impl Iterator<Item = &'a Item>) -> Result<Answers> {
        let mut answers = Answers::default();
        let mut logits = vec![0.0; self.plan.classes()];
        let mut embedding = vec![0.0; self.plan.embedding_dim()];
        for item in items {
            preprocess(&item.picture.frame(), &self.spec, &mut self.input)?;
            self.plan.run(
                &self.input,
                &mut Output {
                    logits: &mut logits,
                    heads: &mut [],
                    embedding: &mut embedding,
                },
            )?;
            answers.logits.extend_from_slice(&logits);
            answers.embeddings.extend_from_slice(&embedding);
        }
        Ok(answers)
    }
}

/// The head's weights, one row a class; burn keeps one column a class.
fn head_rows(weights: &Weights, classes: usize) -> Result<Vec<f32>> {
    let columns = weights
        .tensor("head.weight")
        .context("the network has no head")?;
    let dim = columns.len() / classes;
    Ok((0..classes * dim)
        .map(|at| columns[at % dim * classes + at / dim])
        .collect())
}
