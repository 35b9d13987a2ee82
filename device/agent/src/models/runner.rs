//! A model in memory: engine, score parameters and every buffer that a frame needs, allocated once.

use device_core::params::{Params, ParamsError, Shape};
use device_core::score::{ScoreError, quantise, score};
use device_core::sketch::signature;
use device_engine::{
    EngineError, EngineKind, Frame, InputError, InputSpec, ModelBytes, ModelSpec, Output, Plan,
    load, preprocess,
};
use flywheel_shared::ids::Digest;
use flywheel_shared::message::Scores;
use flywheel_shared::spec::Golden;
use flywheel_shared::trust::PartKind;
use thiserror::Error;

use super::package::Package;

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
    /// An answer on a golden input is off.
    #[error(
        "model {model}: golden input {index}: logit {logit} is {found}, signed is {expected} ± {tolerance}"
    )]
    Golden {
        /// The manifest's digest.
        model: Digest,
        /// Which input.
        index: usize,
        /// Which logit.
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
    plan: Box<dyn Plan>,
    shape: Shape,
    params: Vec<f32>,
    input: Vec<f32>,
    logits: Vec<f32>,
    embedding: Vec<f32>,
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
        let plan = load(kind, &bytes).map_err(|source| RunnerError::Engine { model, source })?;
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
        if usize::from(shape.classes) != plan.classes()
            || usize::from(shape.dim) != plan.embedding_dim()
        {
            return Err(part(
                "scores part",
                format!(
                    "is for {} classes and {} embedding values, the model has {} and {}",
                    shape.classes,
                    shape.dim,
                    plan.classes(),
                    plan.embedding_dim()
                ),
            ));
        }
        let (classes, dim) = (plan.classes(), plan.embedding_dim());
        Ok(Self {
            digest: model,
            sequence,
            labels: spec.labels().map(str::to_owned).collect(),
            spec: spec.input,
            input: vec![0.0; plan.input_len()],
            plan,
            shape,
            params,
            logits: vec![0.0; classes],
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

    /// Runs one frame and scores the answer.
    pub fn infer(&mut self, frame: &Frame<'_>) -> Result<Scores, RunnerError> {
        self.run(frame)?;
        let model = self.digest;
        let params = Params::view(self.shape, &self.params).map_err(|error| RunnerError::Part {
            model,
            part: "scores part",
            problem: format!("is not usable: {error}"),
        })?;
        score(&self.logits, &self.embedding, &params, &mut self.scratch)
            .map_err(|source| RunnerError::Score { model, source })
    }

    fn run(&mut self, frame: &Frame<'_>) -> Result<(), RunnerError> {
        preprocess(frame, &self.spec, &mut self.input)?;
        self.plan
            .run(
                &self.input,
                &mut Output {
                    logits: &mut self.logits,
                    embedding: &mut self.embedding,
                },
            )
            .map_err(|source| RunnerError::Engine {
                model: self.digest,
                source,
            })
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
        let classes = self.logits.len();
        let count = golden.frames.len().checked_div(golden.frame_len());
        let Some(count) = count.filter(|count| *count > 0) else {
            return Err(wrong("holds no frame".to_owned()));
        };
        if golden.frames.len() != count * golden.frame_len()
            || golden.logits.len() != count * classes * 4
        {
            return Err(wrong(format!(
                "holds {} bytes of frames and {} of logits, which does not fit {classes} classes",
                golden.frames.len(),
                golden.logits.len()
            )));
        }
        let answers = golden.logits.chunks_exact(classes * 4);
        for (index, (pixels, answer)) in golden
            .frames
            .chunks_exact(golden.frame_len())
            .zip(answers)
            .enumerate()
        {
            self.run(&Frame {
                pixels,
                width: u32::from(golden.width),
                height: u32::from(golden.height),
                channels: golden.channels,
            })?;
            for (logit, (found, bytes)) in
                self.logits.iter().zip(answer.chunks_exact(4)).enumerate()
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
