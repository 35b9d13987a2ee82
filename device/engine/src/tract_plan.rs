//! tract: runs the ONNX file after optimising its graph for one input shape.

use std::sync::Arc;
use std::time::Instant;

use flywheel_shared::spec::{ClassOutput, ModelSpec, Task};
use tract_onnx::prelude::*;
use tract_onnx::tract_core::floats::FloatPrecisionTranslator;
use tract_onnx::tract_core::internal::{EvalContext, OpState};
use tract_onnx::tract_core::plan::eval;
use tract_onnx::tract_core::transform::ModelTransform;
use tract_onnx::tract_hir::infer::Factoid;

use crate::engine::{
    EngineError, EngineKind, OperatorCost, Output, Plan, check_output, copy_finite, each_output,
    probabilities_to_logits, wanted_outputs,
};

/// An optimised graph with its running state.
pub struct TractPlan {
    state: TypedSimpleState,
    /// Values of f32, written in place and lent to the state while it runs.
    input: Arc<Tensor>,
    input_type: DatumType,
    classes: usize,
    heads: Vec<usize>,
    embedding: usize,
    probabilities: bool,
}

impl TractPlan {
    /// Parses and optimises `onnx`, and checks it against `spec`.
    pub fn load(onnx: &[u8], spec: &ModelSpec<'_>) -> Result<Self, String> {
        let shape = spec.input.shape();
        let wanted = wanted_outputs(spec);
        let model = tract_onnx::onnx()
            .model_for_read(&mut std::io::Cursor::new(onnx))
            .map_err(|error| format!("the ONNX file is damaged: {error:#}"))?;
        let count = |outlets: TractResult<&[OutletId]>| outlets.map_or(0, <[OutletId]>::len);
        let (inputs, outputs) = (count(model.input_outlets()), count(model.output_outlets()));
        if inputs != 1 || outputs < wanted.len() {
            return Err(format!(
                "the ONNX file has {inputs} inputs and {outputs} outputs, the spec wants 1 and {}",
                wanted.len()
            ));
        }
        let input_type = input_type(&model, &shape)?;
        let plan = optimised(model, input_type, &shape)
            .and_then(IntoRunnable::into_runnable)
            .map_err(|error| format!("the ONNX graph does not fit its spec: {error:#}"))?;
        let input_type = plan
            .model()
            .input_fact(0)
            .map_err(|error| format!("{error:#}"))?
            .datum_type;
        for (index, (what, want)) in wanted.iter().enumerate() {
            let fact = plan
                .model()
                .output_fact(index)
                .map_err(|error| format!("{error:#}"))?;
            let len = fact
                .shape
                .as_concrete()
                .map(|shape| shape.iter().product::<usize>());
            let float = [f32::datum_type(), f16::datum_type()].contains(&fact.datum_type);
            if len != Some(*want) || !float {
                return Err(format!(
                    "output {index} ({what}) is {:?} {:?}, the spec wants {want} values of f32 or f16",
                    fact.datum_type, fact.shape
                ));
            }
        }
        Ok(Self {
            state: plan.spawn().map_err(|error| format!("{error:#}"))?,
            input: Tensor::zero::<f32>(&shape)
                .map_err(|error| format!("{error:#}"))?
                .into_arc_tensor(),
            input_type,
            classes: spec.logits(),
            heads: spec.head_lens().to_vec(),
            embedding: usize::from(spec.embedding),
            probabilities: spec.task == Task::Classify(ClassOutput::Probabilities),
        })
    }

    /// The input as the graph takes it.
    fn tensor(&self) -> TractResult<TValue> {
        if self.input_type == f32::datum_type() {
            return Ok(Arc::clone(&self.input).into_tvalue());
        }
        let cast = self.input.cast_to_dt(self.input_type)?;
        Ok(cast.into_owned().into_tvalue())
    }

    fn answer(&mut self, output: &mut Output<'_>) -> Result<(), String> {
        let say = |error: TractError| format!("{error:#}");
        let input = self.tensor().map_err(say)?;
        let answers = self
            .state
            .run_plan_with_eval(tvec!(input), step)
            .map_err(say);
        if answers.is_err() {
            // A run that failed half way holds values, the input among them.
            self.state.reset_turn().map_err(say)?;
        }
        let answers = answers?;
        each_output(output, &self.heads, |index, slot, what| {
            let answer = answers
                .get(index)
                .ok_or_else(|| format!("there is no {what}"))?;
            let answer = answer.cast_to::<f32>().map_err(say)?;
            let view = answer.try_as_plain_ram().map_err(say)?;
            copy_finite(view.as_slice::<f32>().map_err(say)?, slot, what)
        })?;
        if self.probabilities {
            probabilities_to_logits(output.logits);
        }
        Ok(())
    }
}

/// Evaluates one node.
fn step(
    context: &EvalContext<'_>,
    state: Option<&mut (dyn OpState + 'static)>,
    node: &TypedNode,
    inputs: TVec<TValue>,
) -> TractResult<TVec<TValue>> {
    let answer = eval(context, state, node, inputs);
    clean_vector_registers();
    answer
}

/// tract's AVX kernels return with the upper halves of the vector registers in use. As long as they
/// are, every SSE instruction must merge with them, and whatever the compiler made for plain
/// x86_64 runs at a fraction of its speed: on an EPYC, preprocessing took 24 µs instead of 5.
fn clean_vector_registers() {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx")]
        fn clean() {
            std::arch::x86_64::_mm256_zeroupper();
        }
        if std::arch::is_x86_feature_detected!("avx") {
            // SAFETY: the processor has AVX.
            unsafe { clean() }
        }
    }
}

/// The type of the input, after a look at its declared shape.
fn input_type(model: &InferenceModel, shape: &[usize; 4]) -> Result<DatumType, String> {
    let fact = model.input_fact(0).map_err(|error| format!("{error:#}"))?;
    let declared = fact
        .shape
        .as_concrete_finite()
        .map_err(|error| format!("{error:#}"))?;
    if let Some(declared) = declared
        && declared.as_slice() != shape
    {
        return Err(format!(
            "the ONNX file takes {declared:?}, the spec says {shape:?}"
        ));
    }
    match fact.datum_type.concretize() {
        None => Ok(f32::datum_type()),
        Some(kind) if [f32::datum_type(), f16::datum_type(), u8::datum_type()].contains(&kind) => {
            Ok(kind)
        }
        Some(other) => Err(format!(
            "the ONNX file takes values of {other:?}; f32, f16 and u8 can be given"
        )),
    }
}

/// The graph for one input shape.
fn optimised(model: InferenceModel, kind: DatumType, shape: &[usize]) -> TractResult<TypedModel> {
    let typed = model
        .with_input_fact(0, InferenceFact::dt_shape(kind, shape))?
        .into_typed()?;
    in_single_precision(typed)?.into_optimized()
}

/// A graph in half precision, input included, in f32 instead: processors without half arithmetic
/// emulate it slowly, and the result is nearer to the exact one. Outputs keep their type.
pub(crate) fn in_single_precision(mut typed: TypedModel) -> TractResult<TypedModel> {
    let half = |node: &TypedNode| {
        node.outputs
            .iter()
            .any(|output| output.fact.datum_type == f16::datum_type())
    };
    if typed.nodes().iter().any(half) {
        FloatPrecisionTranslator::new(f16::datum_type(), f32::datum_type())
            .transform(&mut typed)?;
    }
    Ok(typed)
}

impl Plan for TractPlan {
    fn kind(&self) -> EngineKind {
        EngineKind::Tract
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
        // Nobody else holds it between two runs, so nothing is copied here.
        Arc::make_mut(&mut self.input)
            .to_plain_array_view_mut::<f32>()
            .ok()
            .and_then(|view| view.into_slice())
            .unwrap_or_default()
    }

    fn run_in_place(&mut self, output: &mut Output<'_>) -> Result<(), EngineError> {
        check_output(self, output)?;
        self.answer(output).map_err(|why| EngineError::Run {
            engine: self.kind().name(),
            why,
        })
    }

    fn profile(&mut self, runs: u32) -> Result<Vec<OperatorCost>, EngineError> {
        let failed = |error: TractError| EngineError::Run {
            engine: EngineKind::Tract.name(),
            why: format!("{error:#}"),
        };
        self.input_mut().fill(0.0);
        let mut spent = vec![Vec::new(); self.state.model().nodes().len()];
        for run in 0..2 * runs {
            let input = self.tensor().map_err(failed)?;
            self.state
                .run_plan_with_eval(tvec!(input), |context, state, node, inputs| {
                    let start = Instant::now();
                    let answer = step(context, state, node, inputs);
                    if run >= runs {
                        spent[node.id].push(start.elapsed().as_nanos() as u64);
                    }
                    answer
                })
                .map_err(failed)?;
        }
        let mut costs: Vec<OperatorCost> = self
            .state
            .model()
            .nodes()
            .iter()
            .zip(spent)
            .filter(|(_, spent)| !spent.is_empty())
            .map(|(node, mut spent)| OperatorCost {
                node: node.name.clone(),
                operator: node.op.name().into_owned(),
                shape: node
                    .outputs
                    .first()
                    .and_then(|output| output.fact.shape.as_concrete())
                    .map(<[usize]>::to_vec)
                    .unwrap_or_default(),
                nanos: {
                    // The median, since whoever else uses the machine adds to the mean.
                    let middle = spent.len() / 2;
                    *spent.select_nth_unstable(middle).1
                },
            })
            .collect();
        costs.sort_by_key(|cost| std::cmp::Reverse(cost.nanos));
        Ok(costs)
    }
}
