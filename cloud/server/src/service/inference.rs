//! A registered model, loaded and run through the device's engine with the device's
//! preprocessing and scores, so that cloud and edge agree on every picture.

use device_core::params::Params;
use device_core::score::{ScoreError, score, softmax};
use device_engine::{EngineKind, ModelBytes, Output, Plan, preprocess};
use flywheel_shared::message::Scores;
use flywheel_shared::spec::InputSpec;
use flywheel_shared::trust::PartKind;

use super::registry::ModelRecord;
use super::{Fault, blob};
use crate::picture::Picture;
use crate::store::Store;

/// A loaded model with its buffers.
pub struct Inference {
    plan: Box<dyn Plan>,
    input_spec: InputSpec,
    input: Vec<f32>,
    /// Logits of the last picture.
    pub logits: Vec<f32>,
    /// Embedding of the last picture.
    pub embedding: Vec<f32>,
}

impl Inference {
    /// Loads the ONNX form of a model into tract.
    ///
    /// # Errors
    /// If a part is missing or the engine refuses it.
    pub fn load(store: &Store, model: &ModelRecord) -> Result<Self, Fault> {
        let onnx = blob(store, &model.part(PartKind::Onnx)?.digest)?;
        Self::from_onnx(&onnx, model)
    }

    /// Loads an ONNX file that is not a part yet.
    ///
    /// # Errors
    /// If the engine refuses it.
    pub fn from_onnx(onnx: &[u8], model: &ModelRecord) -> Result<Self, Fault> {
        let labels = model.labels();
        let spec = model.spec(&labels);
        let plan = device_engine::load(
            EngineKind::Tract,
            &ModelBytes {
                onnx,
                record: &[],
                spec: &spec,
            },
        )
        .map_err(|error| Fault::Internal(format!("model {}: {error}", model.id)))?;
        Ok(Self {
            input_spec: model.input,
            input: vec![0.0; plan.input_len()],
            logits: vec![0.0; plan.classes()],
            embedding: vec![0.0; plan.embedding_dim()],
            plan,
        })
    }

    /// Runs one picture; the answer is in [`Self::logits`] and [`Self::embedding`]. Returns how
    /// long the engine took, in microseconds.
    ///
    /// # Errors
    /// If the picture does not fit or the engine fails on it.
    pub fn run(&mut self, picture: &Picture) -> Result<u32, Fault> {
        preprocess(&picture.frame(), &self.input_spec, &mut self.input)
            .map_err(|error| Fault::Internal(format!("preprocessing: {error}")))?;
        let started = std::time::Instant::now();
        self.plan
            .run(
                &self.input,
                &mut Output {
                    logits: &mut self.logits,
                    embedding: &mut self.embedding,
                    heads: &mut [],
                },
            )
            .map_err(|error| Fault::Internal(error.to_string()))?;
        Ok(u32::try_from(started.elapsed().as_micros()).unwrap_or(u32::MAX))
    }
}

/// Score parameters in memory.
pub struct Scorer {
    shape: device_core::params::Shape,
    values: Vec<f32>,
    scratch: Vec<f32>,
}

impl Scorer {
    /// Reads the score parameters of a model.
    ///
    /// # Errors
    /// If the part is missing or damaged.
    pub fn load(store: &Store, model: &ModelRecord) -> Result<Self, Fault> {
        Self::parse(&blob(store, &model.part(PartKind::Scores)?.digest)?)
            .map_err(|fault| Fault::Internal(format!("model {}: {fault}", model.id)))
    }

    /// Reads score parameters from their byte form.
    ///
    /// # Errors
    /// If they are damaged.
    pub fn parse(bytes: &[u8]) -> Result<Self, Fault> {
        let bad = |error| Fault::Internal(format!("score parameters: {error}"));
        let shape = Params::shape_of(bytes).map_err(bad)?;
        let mut values = vec![0.0; shape.values()];
        Params::parse(bytes, &mut values).map_err(bad)?;
        Ok(Self {
            shape,
            values,
            scratch: vec![0.0; shape.scratch()],
        })
    }

    /// The device's scores for one answer.
    ///
    /// # Errors
    /// If the answer does not fit the parameters.
    pub fn score(&mut self, logits: &[f32], embedding: &[f32]) -> Result<Scores, Fault> {
        let params = Params::view(self.shape, &self.values)
            .map_err(|error| Fault::Internal(format!("score parameters: {error}")))?;
        // Without statistics of the embedding, scores fall back to the logits.
        let embedding = &embedding[..usize::from(self.shape.dim).min(embedding.len())];
        score(logits, embedding, &params, &mut self.scratch)
            .map_err(|error: ScoreError| Fault::Internal(format!("score: {error}")))
    }

    /// Softmax of logits at the model's fitted temperature.
    ///
    /// # Errors
    /// If the parameters are damaged.
    pub fn probabilities(&self, logits: &[f32]) -> Result<Vec<f32>, Fault> {
        let params = Params::view(self.shape, &self.values)
            .map_err(|error| Fault::Internal(format!("score parameters: {error}")))?;
        let mut out = vec![0.0; logits.len()];
        softmax(logits, params.temperature(), &mut out);
        Ok(out)
    }
}
