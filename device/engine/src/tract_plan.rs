//! tract: runs the ONNX file after optimising its graph for one input shape.

use std::sync::Arc;
use std::time::Instant;

use flywheel_shared::spec::ModelSpec;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::{EvalContext, OpState};
use tract_onnx::tract_core::plan::eval;

use crate::engine::{
    EngineError, EngineKind, OperatorCost, Output, Plan, check_output, copy_finite,
};

/// An optimised graph with its running state.
pub struct TractPlan {
    state: TypedSimpleState,
    /// Written in place, and lent to the state while it runs.
    input: Arc<Tensor>,
    classes: usize,
    embedding: usize,
}

impl TractPlan {
    /// Parses and optimises `onnx`, and checks it against `spec`.
    pub fn load(onnx: &[u8], spec: &ModelSpec<'_>) -> Result<Self, String> {
        let input = &spec.input;
        let shape = [
            1,
            usize::from(input.channels),
            usize::from(input.height),
            usize::from(input.width),
        ];
        let embedding = usize::from(spec.embedding);
        let model = tract_onnx::onnx()
            .model_for_read(&mut std::io::Cursor::new(onnx))
            .map_err(|error| format!("the ONNX file is damaged: {error:#}"))?;
        let count = |outlets: TractResult<&[OutletId]>| outlets.map_or(0, <[OutletId]>::len);
        let (inputs, outputs) = (count(model.input_outlets()), count(model.output_outlets()));
        let wanted = 1 + usize::from(embedding > 0);
        if inputs != 1 || outputs < wanted {
            return Err(format!(
                "the ONNX file has {inputs} inputs and {outputs} outputs, the spec wants 1 and {wanted}"
            ));
        }
        let declared = model
            .input_fact(0)
            .and_then(|fact| fact.shape.as_concrete_finite())
            .map_err(|error| format!("{error:#}"))?;
        if let Some(declared) = declared
            && declared.as_slice() != shape
        {
            return Err(format!(
                "the ONNX file takes {declared:?}, the spec says {shape:?}"
            ));
        }
        let plan = model
            .with_input_fact(0, InferenceFact::dt_shape(f32::datum_type(), shape))
            .and_then(InferenceModelExt::into_optimized)
            .and_then(IntoRunnable::into_runnable)
            .map_err(|error| format!("the ONNX graph does not fit its spec: {error:#}"))?;
        let outputs = [("logits", spec.classes()), ("embedding", embedding)];
        for (index, (what, want)) in outputs.into_iter().enumerate().take(wanted) {
            let fact = plan
                .model()
                .output_fact(index)
                .map_err(|error| format!("{error:#}"))?;
            let len = fact
                .shape
                .as_concrete()
                .map(|shape| shape.iter().product::<usize>());
            if len != Some(want) || fact.datum_type != f32::datum_type() {
                return Err(format!(
                    "output {index} ({what}) is {:?} {:?}, the spec wants {want} values of f32",
                    fact.datum_type, fact.shape
                ));
            }
        }
        Ok(Self {
            state: plan.spawn().map_err(|error| format!("{error:#}"))?,
            input: Tensor::zero::<f32>(&shape)
                .map_err(|error| format!("{error:#}"))?
                .into_arc_tensor(),
            classes: spec.classes(),
            embedding,
        })
    }

    fn answer(&mut self, output: &mut Output<'_>) -> Result<(), String> {
        let say = |error: TractError| format!("{error:#}");
        let input = Arc::clone(&self.input).into_tvalue();
        let answers = self
            .state
            .run_plan_with_eval(tvec!(input), step)
            .map_err(say);
        if answers.is_err() {
            // A run that failed half way holds values, the input among them.
            self.state.reset_turn().map_err(say)?;
        }
        let answers = answers?;
        let slots = [
            ("logits", &mut *output.logits),
            ("embedding", &mut *output.embedding),
        ];
        for ((what, slot), answer) in slots.into_iter().zip(&answers) {
            if slot.is_empty() {
                continue;
            }
            let view = answer.try_as_plain_ram().map_err(say)?;
            copy_finite(view.as_slice::<f32>().map_err(say)?, slot, what)?;
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
            let input = Arc::clone(&self.input).into_tvalue();
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
        costs.sort_by(|a, b| b.nanos.cmp(&a.nanos));
        Ok(costs)
    }
}
