//! tract: runs the ONNX file after optimising its graph for one input shape.

use flywheel_shared::spec::ModelSpec;
use tract_onnx::prelude::*;

use crate::engine::{EngineError, EngineKind, Output, Plan, check_buffers, copy_finite};

/// An optimised graph with its running state.
pub struct TractPlan {
    state: TypedSimpleState,
    shape: [usize; 4],
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
            shape,
            classes: spec.classes(),
            embedding,
        })
    }

    fn answer(&mut self, input: &[f32], output: &mut Output<'_>) -> Result<(), String> {
        let say = |error: TractError| format!("{error:#}");
        let tensor = Tensor::from_shape(&self.shape, input).map_err(say)?;
        let answers = self.state.run(tvec!(tensor.into_tvalue())).map_err(say)?;
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

impl Plan for TractPlan {
    fn kind(&self) -> EngineKind {
        EngineKind::Tract
    }

    fn input_len(&self) -> usize {
        self.shape.iter().product()
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn embedding_dim(&self) -> usize {
        self.embedding
    }

    fn run(&mut self, input: &[f32], output: &mut Output<'_>) -> Result<(), EngineError> {
        check_buffers(self, input, output)?;
        self.answer(input, output).map_err(|why| EngineError::Run {
            engine: self.kind().name(),
            why,
        })
    }
}
