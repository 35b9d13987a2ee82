//! The engine interface: a model's bytes become a plan; a plan fills caller-owned buffers.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;

use flywheel_shared::spec::ModelSpec;
use thiserror::Error;

use crate::burn_plan::{Backend, BurnPlan};
use crate::onnx_runtime;
use crate::tract_plan::TractPlan;

/// The engines that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// tract, from the ONNX file: the default, and the fastest.
    #[default]
    Tract,
    /// burn's flex backend, from the record.
    BurnFlex,
    /// burn's ndarray backend, from the record: slow, kept as an independent reference.
    BurnNdarray,
    /// ONNX Runtime, from the ONNX file, through a shared library ([`crate::onnx_runtime`]); in
    /// builds with the feature `ort`.
    Ort,
}

impl EngineKind {
    /// Every engine that this build has, for tests, benchmarks and the choice of the fastest.
    pub const ALL: &'static [Self] = &[
        Self::Tract,
        Self::BurnFlex,
        Self::BurnNdarray,
        #[cfg(feature = "ort")]
        Self::Ort,
    ];

    /// The name that `--engine` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tract => "tract",
            Self::BurnFlex => "burn-flex",
            Self::BurnNdarray => "burn-ndarray",
            Self::Ort => "ort",
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name of no engine that can be had.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum UnknownEngine {
    /// There is none of that name.
    #[error("unknown engine {0:?}; use tract, burn (the same as burn-flex), burn-ndarray or ort")]
    Name(String),
    /// There is one, but it was left out of this build.
    #[error("this build is without engine {0}; build it with --features {0}, or use tract or burn")]
    NotBuilt(EngineName),
}

impl FromStr for EngineKind {
    type Err = UnknownEngine;

    fn from_str(name: &str) -> Result<Self, UnknownEngine> {
        match name {
            "tract" => Ok(Self::Tract),
            "burn" | "burn-flex" => Ok(Self::BurnFlex),
            "burn-ndarray" => Ok(Self::BurnNdarray),
            "ort" if onnx_runtime::BUILT => Ok(Self::Ort),
            "ort" => Err(UnknownEngine::NotBuilt(Self::Ort.name())),
            other => Err(UnknownEngine::Name(other.to_owned())),
        }
    }
}

/// A model in all the forms its package holds; an engine reads the one it can run.
#[derive(Debug, Clone, Copy)]
pub struct ModelBytes<'a> {
    /// ONNX file; its outputs are those of the task in the spec's order, then the embedding. Empty
    /// if the package has none.
    pub onnx: &'a [u8],
    /// burnpack record. Empty if the package has none.
    pub record: &'a [u8],
    /// What the model takes and gives.
    pub spec: &'a ModelSpec<'a>,
}

/// Where an engine writes its answer. The lengths must be the plan's.
#[derive(Debug)]
pub struct Output<'a> {
    /// Unnormalised class scores, one per class; empty for a task without them.
    pub logits: &'a mut [f32],
    /// A detector's raw tensors one after the other, an anomaly score or a reconstruction; empty
    /// for every other task. `device_core::detect` makes boxes of the first.
    pub heads: &'a mut [f32],
    /// The embedding; empty if the model has none.
    pub embedding: &'a mut [f32],
}

/// Why a model cannot be loaded or run.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EngineError {
    /// The package lacks the form that the engine runs.
    #[error("engine {engine}: the model package has no {form}; choose another engine")]
    NoForm {
        /// The engine.
        engine: EngineName,
        /// `ONNX file` or `record`.
        form: &'static str,
    },
    /// The engine itself cannot be had.
    #[error("engine {engine}: {why}")]
    Missing {
        /// The engine.
        engine: EngineName,
        /// What is wrong, and the mend.
        why: String,
    },
    /// The bytes are damaged, or the model does not do what its spec says.
    #[error("engine {engine}: cannot load the model: {why}")]
    Load {
        /// The engine.
        engine: EngineName,
        /// What is wrong.
        why: String,
    },
    /// A buffer of the caller has the wrong length.
    #[error("{what} buffer has {found} values, the model wants {want}")]
    Buffer {
        /// `input`, `logits`, `heads` or `embedding`.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The plan's.
        want: usize,
    },
    /// The engine failed on this input.
    #[error("engine {engine}: inference failed: {why}")]
    Run {
        /// The engine.
        engine: EngineName,
        /// What it said.
        why: String,
    },
}

/// An engine's name in an error.
pub type EngineName = &'static str;

/// A loaded model, ready to run. It keeps scratch state, hence `&mut`; make one per thread.
pub trait Plan: Send {
    /// Which engine this is.
    fn kind(&self) -> EngineKind;

    /// Values of one input tensor.
    fn input_len(&self) -> usize;

    /// Length of [`Output::logits`]: the number of classes of a classifier, 0 for other tasks.
    fn classes(&self) -> usize;

    /// Length of [`Output::heads`]; 0 for a classifier.
    fn heads_len(&self) -> usize {
        0
    }

    /// Length of [`Output::embedding`]; 0 if the model has none.
    fn embedding_dim(&self) -> usize;

    /// Runs one preprocessed image.
    ///
    /// # Errors
    /// [`EngineError::Buffer`] for a wrong length, [`EngineError::Run`] if the engine fails or
    /// answers with a value that is not finite.
    fn run(&mut self, input: &[f32], output: &mut Output<'_>) -> Result<(), EngineError> {
        let (found, want) = (input.len(), self.input_len());
        if found != want {
            let what = "input";
            return Err(EngineError::Buffer { what, found, want });
        }
        self.input_mut().copy_from_slice(input);
        self.run_in_place(output)
    }

    /// The plan's own input tensor, [`Plan::input_len`] values, for [`crate::preprocess()`] to
    /// write to. It holds what was written last, also after a run.
    fn input_mut(&mut self) -> &mut [f32];

    /// Runs what was written to [`Plan::input_mut`] since the last run.
    ///
    /// # Errors
    /// As [`Plan::run`].
    fn run_in_place(&mut self, output: &mut Output<'_>) -> Result<(), EngineError>;

    /// What each operator costs, the dearest first, over `runs` runs of an input of zeros after as
    /// many to warm up; empty if the engine cannot tell.
    ///
    /// # Errors
    /// [`EngineError::Run`].
    fn profile(&mut self, runs: u32) -> Result<Vec<OperatorCost>, EngineError> {
        let _ = runs;
        Ok(Vec::new())
    }
}

/// What one operator of a plan costs.
#[derive(Debug, Clone, PartialEq)]
pub struct OperatorCost {
    /// The node's name in the engine's graph.
    pub node: String,
    /// Its operator.
    pub operator: String,
    /// Shape of its first output.
    pub shape: Vec<usize>,
    /// Median time of a run, in nanoseconds.
    pub nanos: u64,
}

/// Loads a model with an engine.
///
/// # Errors
/// [`EngineError::NoForm`], [`EngineError::Missing`] or [`EngineError::Load`]. A panic inside an
/// engine's loader, which damaged bytes can cause, is caught and reported as the latter.
pub fn load(kind: EngineKind, model: &ModelBytes<'_>) -> Result<Box<dyn Plan>, EngineError> {
    let (bytes, form) = match kind {
        EngineKind::Tract | EngineKind::Ort => (model.onnx, "ONNX file"),
        EngineKind::BurnFlex | EngineKind::BurnNdarray => (model.record, "record"),
    };
    if bytes.is_empty() {
        return Err(EngineError::NoForm {
            engine: kind.name(),
            form,
        });
    }
    let spec = model.spec;
    if spec.logits() + spec.head_lens().iter().sum::<usize>() + usize::from(spec.embedding) == 0 {
        return Err(EngineError::Load {
            engine: kind.name(),
            why: "the spec names no output: it has neither classes nor an embedding".to_owned(),
        });
    }
    if kind == EngineKind::Ort {
        onnx_runtime::open(None)?;
    }
    // The loaders only build new values from borrowed bytes, so a panic leaves nothing half done.
    let loaded = catch_unwind(AssertUnwindSafe(|| -> Result<Box<dyn Plan>, String> {
        Ok(match kind {
            EngineKind::Tract => Box::new(TractPlan::load(bytes, model.spec)?),
            EngineKind::BurnFlex => Box::new(BurnPlan::load(Backend::Flex, bytes, model.spec)?),
            EngineKind::BurnNdarray => {
                Box::new(BurnPlan::load(Backend::Ndarray, bytes, model.spec)?)
            }
            #[cfg(feature = "ort")]
            EngineKind::Ort => Box::new(crate::ort_plan::OrtPlan::load(bytes, model.spec)?),
            #[cfg(not(feature = "ort"))]
            EngineKind::Ort => return Err("it is not in this build".to_owned()),
        })
    }));
    loaded
        .unwrap_or_else(|panic| Err(format!("the loader panicked: {}", panic_text(&*panic))))
        .map_err(|why| EngineError::Load {
            engine: kind.name(),
            why,
        })
}

/// Checks the lengths of a caller's output buffers.
pub(crate) fn check_output(plan: &dyn Plan, output: &Output<'_>) -> Result<(), EngineError> {
    for (what, found, want) in [
        ("logits", output.logits.len(), plan.classes()),
        ("heads", output.heads.len(), plan.heads_len()),
        ("embedding", output.embedding.len(), plan.embedding_dim()),
    ] {
        if found != want {
            return Err(EngineError::Buffer { what, found, want });
        }
    }
    Ok(())
}

/// The name and the number of values of each output that a spec asks for, in order.
pub(crate) fn wanted_outputs(spec: &ModelSpec<'_>) -> Vec<(&'static str, usize)> {
    let heads = spec.head_lens();
    let logits = [("logits", spec.logits())];
    let embedding = [("embedding", usize::from(spec.embedding))];
    let heads = heads.iter().map(|len| ("heads", *len));
    let all = logits.into_iter().chain(heads).chain(embedding);
    all.filter(|(_, len)| *len > 0).collect()
}

/// Hands the caller's buffers to `next` in the order of [`wanted_outputs`], each with the place of
/// the model's output that belongs into it and its name; `heads` are the lengths of a detector's.
pub(crate) fn each_output(
    output: &mut Output<'_>,
    heads: &[usize],
    mut next: impl FnMut(usize, &mut [f32], &'static str) -> Result<(), String>,
) -> Result<(), String> {
    let mut index = 0;
    let mut give = |slot: &mut [f32], what| {
        if slot.is_empty() {
            return Ok(());
        }
        index += 1;
        next(index - 1, slot, what)
    };
    give(output.logits, "logits")?;
    let mut rest = &mut *output.heads;
    for len in heads {
        let (head, tail) = rest.split_at_mut(*len);
        give(head, "heads")?;
        rest = tail;
    }
    give(output.embedding, "embedding")
}

/// Copies an engine's output to the caller's buffer, refusing what scores cannot be made of.
pub(crate) fn copy_finite(from: &[f32], to: &mut [f32], what: &str) -> Result<(), String> {
    if from.len() != to.len() {
        return Err(format!(
            "{what} has {} values, not {}",
            from.len(),
            to.len()
        ));
    }
    if !from.iter().all(|value| value.is_finite()) {
        return Err(format!("{what} holds a value that is not finite"));
    }
    to.copy_from_slice(from);
    Ok(())
}

/// The natural logarithm of each probability, so that their softmax is the probabilities again;
/// what is below 1e-7 counts as that.
pub(crate) fn probabilities_to_logits(values: &mut [f32]) {
    for value in values {
        *value = value.max(1e-7).ln();
    }
}

pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
