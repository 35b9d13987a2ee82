//! ONNX Runtime: runs the ONNX file as it is, by the shared library that the user names.
//!
//! It uses TensorRT, else CUDA, where the library was built with them, and the processor for the
//! rest; there one thread, as the other engines do, so that the camera keeps a core of its own.

use std::any::Any;
use std::env;
use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use flywheel_shared::spec::{ClassOutput, ModelSpec, Task};
use half::f16;
use ort::LoadDynamicError;
use ort::environment::Environment;
use ort::ep::{CUDA, ExecutionProvider, ExecutionProviderDispatch, TensorRT};
use ort::logging::LogLevel;
use ort::session::{Session, SessionInputValue};
use ort::value::{DynValue, TensorElementType, TensorRef};

use crate::engine::{
    EngineError, EngineKind, Output, Plan, check_output, copy_finite, each_output, panic_text,
    probabilities_to_logits, wanted_outputs,
};
use crate::onnx_runtime::VARIABLE;

/// The library of this process.
static OPENED: Mutex<Option<Opened>> = Mutex::new(None);

struct Opened {
    library: PathBuf,
    environment: Environment,
}

/// What sessions are made in; see [`crate::onnx_runtime::open`].
pub fn environment(library: Option<&Path>) -> Result<Environment, EngineError> {
    let missing = |why: String| EngineError::Missing {
        engine: EngineKind::Ort.name(),
        why,
    };
    // A panic leaves it empty or whole.
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(opened) = &*opened {
        return match library {
            Some(other) if other != opened.library => Err(missing(format!(
                "{} is loaded already, and a process has only one; start anew to use {}",
                opened.library.display(),
                other.display()
            ))),
            _ => Ok(opened.environment.clone()),
        };
    }
    let named = library.map(Path::to_owned);
    let Some(library) = named.or_else(|| env::var_os(VARIABLE).map(PathBuf::from)) else {
        return Err(missing(format!("no shared library is named; {NAME_IT}")));
    };
    let wrong = |why: &dyn std::fmt::Display| {
        missing(format!(
            "cannot use {}: {why}; {NAME_IT}",
            library.display()
        ))
    };
    // A bare name is looked up by the system's loader, a path is relative to where we are and not
    // to the program.
    let path = match library.components().count() {
        1 => library.clone(),
        _ => std::path::absolute(&library).map_err(|error| wrong(&error))?,
    };
    let environment = catch_unwind(AssertUnwindSafe(|| {
        let builder = ort::init_from(&path).map_err(|error| said(&error))?;
        builder
            .with_name("flywheel")
            .with_telemetry(false)
            .build()
            .map_err(|error| error.to_string())
    }))
    .unwrap_or_else(|panic: Box<dyn Any + Send>| Err(panic_text(&*panic).to_owned()))
    .map_err(|why| wrong(&why))?;
    *opened = Some(Opened {
        library,
        environment: environment.clone(),
    });
    Ok(environment)
}

/// What the system's loader says, which ort's message leaves out.
fn said(error: &LoadDynamicError) -> String {
    match error {
        LoadDynamicError::Dlopen { error, .. } => error
            .source()
            .map_or_else(|| error.to_string(), ToString::to_string),
        other => other.to_string(),
    }
}

/// The mend of every missing library.
const NAME_IT: &str = "name libonnxruntime.so of ONNX Runtime 1.17 or later with ort_library in the \
agent's configuration, with --ort-library, or in the environment as FLYWHEEL_ORT_LIBRARY";

/// A session with the buffers of one run.
pub struct OrtPlan {
    session: Session,
    shape: [usize; 4],
    input: Vec<f32>,
    given: Given,
    classes: usize,
    heads: Vec<usize>,
    embedding: usize,
    probabilities: bool,
}

/// The input in the type that the model takes.
enum Given {
    F32,
    F16(Vec<f16>),
    U8(Vec<u8>),
}

impl OrtPlan {
    /// Makes a session of `onnx`, checks it against `spec`, and runs it once, which is what tells
    /// the shapes of outputs that the file leaves open and makes an accelerator compile.
    pub fn load(onnx: &[u8], spec: &ModelSpec<'_>) -> Result<Self, String> {
        let environment = environment(None).map_err(|error| error.to_string())?;
        let session = session(&environment, onnx).map_err(|error| error.to_string())?;
        let shape = spec.input.shape();
        let wanted = wanted_outputs(spec);
        let (inputs, outputs) = (session.inputs(), session.outputs().len());
        let ([input], true) = (inputs, outputs >= wanted.len()) else {
            return Err(format!(
                "the ONNX file has {} inputs and {outputs} outputs, the spec wants 1 and {}",
                inputs.len(),
                wanted.len()
            ));
        };
        let declared = input.dtype().tensor_shape().map(|shape| shape.to_vec());
        let fits = declared.as_deref().is_some_and(|declared| {
            let mut sides = declared.iter().zip(&shape);
            // A side that is left open is negative.
            declared.len() == shape.len() && sides.all(|(a, b)| *a < 0 || *a == *b as i64)
        });
        if !fits {
            return Err(format!(
                "the ONNX file takes {declared:?}, the spec says {shape:?}"
            ));
        }
        let given = match input.dtype().tensor_type() {
            Some(TensorElementType::Float32) => Given::F32,
            Some(TensorElementType::Float16) => Given::F16(vec![f16::ZERO; spec.input.len()]),
            Some(TensorElementType::Uint8) => Given::U8(vec![0; spec.input.len()]),
            other => {
                return Err(format!(
                    "the ONNX file takes values of {other:?}; f32, f16 and u8 can be given"
                ));
            }
        };
        let mut plan = Self {
            session,
            shape,
            input: vec![0.0; spec.input.len()],
            given,
            classes: spec.logits(),
            heads: spec.head_lens().to_vec(),
            embedding: usize::from(spec.embedding),
            probabilities: spec.task == Task::Classify(ClassOutput::Probabilities),
        };
        let mut answers = vec![0.0; plan.classes + plan.heads_len() + plan.embedding];
        let (logits, rest) = answers.split_at_mut(plan.classes);
        let (heads, embedding) = rest.split_at_mut(plan.heads.iter().sum());
        plan.answer(&mut Output {
            logits,
            heads,
            embedding,
        })
        .map_err(|why| format!("it does not run on zeros: {why}"))?;
        Ok(plan)
    }

    fn answer(&mut self, output: &mut Output<'_>) -> Result<(), String> {
        let say = |error: ort::Error| error.to_string();
        let shape = self.shape;
        let input: SessionInputValue<'_> = match &mut self.given {
            Given::F32 => TensorRef::from_array_view((shape, &self.input[..]))
                .map_err(say)?
                .into(),
            Given::F16(values) => {
                for (to, from) in values.iter_mut().zip(&self.input) {
                    *to = f16::from_f32(*from);
                }
                TensorRef::from_array_view((shape, &values[..]))
                    .map_err(say)?
                    .into()
            }
            Given::U8(values) => {
                for (to, from) in values.iter_mut().zip(&self.input) {
                    *to = *from as u8;
                }
                TensorRef::from_array_view((shape, &values[..]))
                    .map_err(say)?
                    .into()
            }
        };
        let answers = self.session.run([input]).map_err(say)?;
        each_output(output, &self.heads, |index, slot, what| {
            copy(&answers[index], slot, what)
        })?;
        if self.probabilities {
            probabilities_to_logits(output.logits);
        }
        Ok(())
    }
}

/// The session of a model, on the best that the library has.
fn session(environment: &Environment, onnx: &[u8]) -> ort::Result<Session> {
    let mut providers: Vec<ExecutionProviderDispatch> = Vec::new();
    if TensorRT::is_available()? {
        providers.push(TensorRT::default().build());
    }
    if CUDA::is_available()? {
        providers.push(CUDA::default().build());
    }
    Session::builder(environment)?
        .with_execution_providers(providers)?
        .with_intra_threads(1)?
        .with_inter_threads(1)?
        .with_log_level(LogLevel::Warning)?
        .commit_from_memory(onnx)
}

/// One output as f32.
fn copy(answer: &DynValue, slot: &mut [f32], what: &str) -> Result<(), String> {
    if let Ok((_, values)) = answer.try_extract_tensor::<f32>() {
        return copy_finite(values, slot, what);
    }
    let (_, values) = answer
        .try_extract_tensor::<f16>()
        .map_err(|_| format!("{what} is {:?}, not f32 or f16", answer.dtype()))?;
    let values: Vec<f32> = values.iter().map(|value| value.to_f32()).collect();
    copy_finite(&values, slot, what)
}

impl Plan for OrtPlan {
    fn kind(&self) -> EngineKind {
        EngineKind::Ort
    }

    fn input_len(&self) -> usize {
        self.input.len()
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn heads_len(&self) -> usize {
        self.heads.iter().sum()
    }

    fn embedding_dim(&self) -> usize {
        self.embedding
    }

    fn input_mut(&mut self) -> &mut [f32] {
        &mut self.input
    }

    fn run_in_place(&mut self, output: &mut Output<'_>) -> Result<(), EngineError> {
        check_output(self, output)?;
        self.answer(output).map_err(|why| EngineError::Run {
            engine: self.kind().name(),
            why,
        })
    }
}
