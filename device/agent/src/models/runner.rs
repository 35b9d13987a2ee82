//! A model in memory: engine, score parameters and every buffer that a frame needs, allocated once. The
//! input tensor is the engine's own, so that preprocessing is the only pass over the pixels.

use device_core::anomaly;
use device_core::detect::{self, CANDIDATES, DetectError, Detection};
use device_core::params::{Params, ParamsError, Shape};
use device_core::score::{ScoreError, quantise, score};
use device_core::sketch::signature;
use device_engine::{
    EngineError, EngineKind, Frame, InputError, InputSpec, ModelBytes, ModelSpec, OperatorCost,
    Output, Plan, load, preprocess,
};
use flywheel_shared::ids::Digest;
use flywheel_shared::message::Scores;
use flywheel_shared::spec::{AnomalyOutput, Golden, Task};
use flywheel_shared::trust::PartKind;
use std::panic::{AssertUnwindSafe, catch_unwind};

use thiserror::Error;

use super::package::Package;
use crate::meter::{Meter, Stage};

/// Why a model cannot be loaded or does not answer.
#[derive(Debug, Error)]
pub enum RunnerError {
    /// A part is missing or does not decode.
    #[error("model {model}: its {part} {problem}")]
    Part {
        /// The manifest's digest.
        model: Digest,
        /// Which part.
        part: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// The engine refuses it.
    #[error("model {model}: {source}")]
    Engine {
        /// The manifest's digest.
        model: Digest,
        /// Why.
        source: EngineError,
    },
    /// The engine panicked, which is a bug in it that this model or frame brings out.
    #[error("model {0}: the engine crashed on it")]
    Panicked(Digest),
    /// The frame does not fit.
    #[error("frame: {0}")]
    Input(#[from] InputError),
    /// The answer cannot be scored.
    #[error("model {model}: {source}")]
    Score {
        /// The manifest's digest.
        model: Digest,
        /// Why.
        source: ScoreError,
    },
    /// A detector's tensors make no boxes.
    #[error("model {model}: {source}")]
    Detect {
        /// The manifest's digest.
        model: Digest,
        /// Why.
        source: DetectError,
    },
    /// An answer on a golden input is off.
    #[error(
        "model {model}: golden input {index}: value {logit} is {found}, signed is {expected} ± {tolerance}"
    )]
    Golden {
        /// The manifest's digest.
        model: Digest,
        /// Which input.
        index: usize,
        /// Which value of the answer.
        logit: usize,
        /// What the engine gave.
        found: f32,
        /// What it must be.
        expected: f32,
        /// How far it may be off.
        tolerance: f32,
    },
}

/// A loaded model.
pub struct Runner {
    digest: Digest,
    sequence: u64,
    labels: Vec<String>,
    spec: InputSpec,
    task: Task,
    plan: Box<dyn Plan>,
    shape: Shape,
    params: Vec<f32>,
    logits: Vec<f32>,
    heads: Vec<f32>,
    embedding: Vec<f32>,
    /// Room for the detections of a frame and its near misses.
    candidates: Vec<Detection>,
    /// Class scores that stand for a frame's detections, or for no class at all.
    class_scores: Vec<f32>,
    scratch: Vec<f32>,
    codes: Vec<i8>,
    quantised: Vec<u8>,
}

impl Runner {
    /// Loads a checked package with an engine.
    pub fn load(kind: EngineKind, package: &Package) -> Result<Self, RunnerError> {
        let model = package.digest;
        let part = |part, problem: String| RunnerError::Part {
            model,
            part,
            problem,
        };
        let spec: ModelSpec<'_> = postcard::from_bytes(package.part(PartKind::Spec))
            .map_err(|error| part("spec", format!("does not decode: {error}")))?;
        let bytes = ModelBytes {
            onnx: package.part(PartKind::Onnx),
            record: package.part(PartKind::BurnRecord),
            spec: &spec,
        };
        let plan = contained(model, || load(kind, &bytes))?;
        let scores = package.part(PartKind::Scores);
        Self::assemble(model, package.sequence, &spec, plan, scores)
    }

    /// Puts a model together from a plan that is loaded already, and its score parameters.
    pub fn assemble(
        model: Digest,
        sequence: u64,
        spec: &ModelSpec<'_>,
        plan: Box<dyn Plan>,
        scores: &[u8],
    ) -> Result<Self, RunnerError> {
        let part = |part, problem: String| RunnerError::Part {
            model,
            part,
            problem,
        };
        let unusable = |error: ParamsError| part("scores part", format!("is not usable: {error}"));
        let mut params = vec![0.0; Params::len_f32(scores).map_err(unusable)?];
        let shape = Params::parse(scores, &mut params)
            .map_err(unusable)?
            .shape();
        // A task without classes is scored as one class; without statistics of the embedding
        // (dim 0) scores fall back to the logits.
        let classes = spec.classes().max(1);
        let dim = plan.embedding_dim();
        if usize::from(shape.classes) != classes || ![0, dim].contains(&usize::from(shape.dim)) {
            return Err(part(
                "scores part",
                format!(
                    "is for {} classes and {} embedding values, the model has {} and {}",
                    shape.classes, shape.dim, classes, dim
                ),
            ));
        }
        let mut candidates = Vec::new();
        if let Task::Detect(detector) = &spec.task {
            detect::check(detector, &spec.input, classes)
                .map_err(|source| RunnerError::Detect { model, source })?;
            candidates = vec![Detection::default(); CANDIDATES];
        }
        Ok(Self {
            digest: model,
            sequence,
            labels: spec.labels().map(str::to_owned).collect(),
            spec: spec.input,
            task: spec.task,
            logits: vec![0.0; plan.classes()],
            heads: vec![0.0; plan.heads_len()],
            class_scores: vec![0.0; classes],
            candidates,
            plan,
            shape,
            params,
            embedding: vec![0.0; dim],
            scratch: vec![0.0; shape.scratch()],
            codes: vec![0; dim],
            quantised: vec![0; dim],
        })
    }

    /// Digest of the manifest.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Sequence of the manifest.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The name of a class; empty if there is none of this index.
    pub fn label(&self, class: u16) -> &str {
        self.labels
            .get(usize::from(class))
            .map_or("", String::as_str)
    }

    /// The engine that runs it.
    pub fn engine(&self) -> EngineKind {
        self.plan.kind()
    }

    /// Classes, and values of the embedding.
    pub fn sizes(&self) -> (usize, usize) {
        (self.logits.len(), self.embedding.len())
    }

    /// What each operator costs; see [`Plan::profile`].
    pub fn profile(&mut self, runs: u32) -> Result<Vec<OperatorCost>, RunnerError> {
        self.plan
            .profile(runs)
            .map_err(|source| RunnerError::Engine {
                model: self.digest,
                source,
            })
    }

    /// Runs one frame and scores the answer; `meter` is told what each stage takes.
    pub fn infer(&mut self, frame: &Frame<'_>, meter: &mut Meter) -> Result<Scores, RunnerError> {
        self.run(frame, meter)?;
        let scores = self.score((frame.width, frame.height));
        meter.end(Stage::Score);
        scores
    }

    /// `sides` are the frame's, columns and rows.
    fn score(&mut self, sides: (u32, u32)) -> Result<Scores, RunnerError> {
        let model = self.digest;
        let scored = |source| RunnerError::Score { model, source };
        let params = Params::view(self.shape, &self.params).map_err(|error| RunnerError::Part {
            model,
            part: "scores part",
            problem: format!("is not usable: {error}"),
        })?;
        let embedding = &self.embedding[..usize::from(self.shape.dim)];
        match &self.task {
            Task::Classify(_) => score(&self.logits, embedding, &params, &mut self.scratch),
            Task::Detect(detector) => {
                let found = detect::decode(
                    detector,
                    &self.spec,
                    self.class_scores.len(),
                    &self.heads,
                    sides,
                    &mut self.candidates,
                )
                .map_err(|source| RunnerError::Detect { model, source })?;
                detect::score(
                    &self.candidates[..found.candidates],
                    detector.threshold,
                    embedding,
                    &params,
                    &mut self.class_scores,
                    &mut self.scratch,
                )
            }
            Task::Anomaly(AnomalyOutput::Score) => anomaly::score(self.heads[0], &params),
            Task::Anomaly(AnomalyOutput::Reconstruction) => anomaly::score(
                anomaly::reconstruction_error(self.plan.input_mut(), &self.heads),
                &params,
            ),
            Task::Embed => score(&self.class_scores, embedding, &params, &mut self.scratch),
        }
        .map_err(scored)
    }

    fn run(&mut self, frame: &Frame<'_>, meter: &mut Meter) -> Result<(), RunnerError> {
        // Straight into the engine's tensor.
        preprocess(frame, &self.spec, self.plan.input_mut())?;
        meter.end(Stage::Preprocess);
        contained(self.digest, || {
            self.plan.run_in_place(&mut Output {
                logits: &mut self.logits,
                heads: &mut self.heads,
                embedding: &mut self.embedding,
            })
        })?;
        meter.end(Stage::Infer);
        Ok(())
    }

    /// What the embedding of the last frame looks like, roughly; `None` without an embedding.
    pub fn signature(&self) -> Option<u64> {
        let centre = Params::view(self.shape, &self.params)
            .map(|params| params.centre())
            .unwrap_or_default();
        signature(&self.embedding, centre)
    }

    /// The embedding of the last frame as i8 in two's complement, and its scale.
    pub fn quantised(&mut self) -> (&[u8], f32) {
        let scale = quantise(&self.embedding, &mut self.codes);
        for (byte, code) in self.quantised.iter_mut().zip(&self.codes) {
            *byte = code.cast_unsigned();
        }
        (&self.quantised, scale)
    }

    /// What golden inputs are compared by: class scores, else a head's values, else the embedding.
    fn answer(&self) -> &[f32] {
        [&self.logits, &self.heads, &self.embedding]
            .into_iter()
            .find(|values| !values.is_empty())
            .map_or(&[], Vec::as_slice)
    }

    /// Runs the golden inputs of the package and compares the answers with those signed.
    pub fn prove(&mut self, package: &Package) -> Result<(), RunnerError> {
        let model = self.digest;
        let wrong = |problem: String| RunnerError::Part {
            model,
            part: "golden part",
            problem,
        };
        let golden: Golden<'_> = postcard::from_bytes(package.part(PartKind::Golden))
            .map_err(|error| wrong(format!("does not decode: {error}")))?;
        let answered = self.answer().len();
        if answered == 0 {
            return Err(wrong("belongs to a model without outputs".to_owned()));
        }
        let mut meter = Meter::default();
        let count = golden.frames.len().checked_div(golden.frame_len());
        let Some(count) = count.filter(|count| *count > 0) else {
            return Err(wrong("holds no frame".to_owned()));
        };
        if golden.frames.len() != count * golden.frame_len()
            || golden.logits.len() != count * answered * 4
        {
            return Err(wrong(format!(
                "holds {} bytes of frames and {} of answers, which does not fit {answered} values a frame",
                golden.frames.len(),
                golden.logits.len()
            )));
        }
        let answers = golden.logits.chunks_exact(answered * 4);
        for (index, (pixels, answer)) in golden
            .frames
            .chunks_exact(golden.frame_len())
            .zip(answers)
            .enumerate()
        {
            let frame = Frame {
                pixels,
                width: u32::from(golden.width),
                height: u32::from(golden.height),
                channels: golden.channels,
            };
            self.run(&frame, &mut meter)?;
            for (logit, (found, bytes)) in
                self.answer().iter().zip(answer.chunks_exact(4)).enumerate()
            {
                let expected = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                // Written so that NaN fails.
                let close = (found - expected).abs() <= golden.tolerance;
                if !close {
                    return Err(RunnerError::Golden {
                        model,
                        index,
                        logit,
                        found: *found,
                        expected,
                        tolerance: golden.tolerance,
                    });
                }
            }
        }
        Ok(())
    }
}

/// Lets an engine work without taking the frame loop with it if it panics. Nothing but the engine's
/// own plan is left half done then, and every run writes its buffers anew.
fn contained<T>(
    model: Digest,
    work: impl FnOnce() -> Result<T, EngineError>,
) -> Result<T, RunnerError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|source| RunnerError::Engine { model, source }),
        Err(_) => Err(RunnerError::Panicked(model)),
    }
}
