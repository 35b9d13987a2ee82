//! What an ONNX file that somebody else made takes and gives, before anything is run: its
//! declared inputs and outputs, the operators tract lacks, and where its class scores come from.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use flywheel_models::onnx::edit::Node;
use tract_onnx::pb::{self, tensor_shape_proto::dimension, type_proto};
use tract_onnx::prelude::*;

use crate::engine::panic_text;

/// A declared input or output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// `TensorProto.DataType`: 1 for f32, 2 for u8, 10 for f16.
    pub kind: i32,
    /// Its sides; `None` for one that is left open. Absent if the file does not say.
    pub shape: Option<Vec<Option<usize>>>,
}

/// Type and shape of a value for a fixed input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fact {
    /// `TensorProto.DataType` of the floats that can be read: 1 or 10; 0 for every other type.
    pub kind: i32,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Fact {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where class scores come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The value before a final softmax, or the output itself.
    pub logits: String,
    /// What the last layer with weights reads: the embedding.
    pub embedding: Option<Feature>,
}

/// A value that can serve as embedding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feature {
    /// Its name.
    pub name: String,
    /// A node that makes floats of it, if it is quantised: its output is the feature.
    pub dequantise: Option<Node>,
}

/// A parsed ONNX file.
pub struct Graph {
    proto: pb::ModelProto,
}

impl Graph {
    /// Parses the bytes.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub fn parse(onnx: &[u8]) -> Result<Self, String> {
        let proto = tract_onnx::onnx()
            .proto_model_for_read(&mut std::io::Cursor::new(onnx))
            .map_err(|error| format!("it is no ONNX file, or damaged: {error:#}"))?;
        if proto.graph.is_none() {
            return Err("it is no ONNX file, or damaged: it has no graph".to_owned());
        }
        let graph = Self { proto };
        if let Some(outside) = graph
            .graph()
            .initializer
            .iter()
            .find(|tensor| !tensor.external_data.is_empty())
        {
            return Err(format!(
                "the weights {:?} are in another file; save the model with its weights in one file",
                outside.name
            ));
        }
        Ok(graph)
    }

    fn graph(&self) -> &pb::GraphProto {
        // `parse` has seen that there is one.
        static EMPTY: std::sync::OnceLock<pb::GraphProto> = std::sync::OnceLock::new();
        self.proto
            .graph
            .as_ref()
            .unwrap_or_else(|| EMPTY.get_or_init(pb::GraphProto::default))
    }

    /// Inputs that are not weights.
    pub fn inputs(&self) -> Vec<Port> {
        let weights: BTreeSet<&str> = self.weights();
        self.graph()
            .input
            .iter()
            .filter(|input| !weights.contains(input.name.as_str()))
            .map(port)
            .collect()
    }

    /// Outputs in the file's order.
    pub fn outputs(&self) -> Vec<Port> {
        self.graph().output.iter().map(port).collect()
    }

    /// A value of the file's metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.proto
            .metadata_props
            .iter()
            .find(|entry| entry.key == key)
            .map(|entry| entry.value.as_str())
    }

    /// Whether the graph has a value of this name.
    pub fn has_value(&self, name: &str) -> bool {
        let graph = self.graph();
        graph.input.iter().any(|input| input.name == name)
            || graph
                .node
                .iter()
                .any(|node| node.output.iter().any(|output| output == name))
    }

    /// Operators that tract does not have, sorted, each once.
    pub fn unknown_operators(&self) -> Vec<String> {
        let known = tract_onnx::onnx().op_register.0;
        let mut unknown = BTreeSet::new();
        let mut graphs = vec![self.graph()];
        while let Some(graph) = graphs.pop() {
            for node in &graph.node {
                if !known.contains_key(&node.op_type) {
                    unknown.insert(node.op_type.clone());
                }
                for attribute in &node.attribute {
                    graphs.extend(&attribute.g);
                    graphs.extend(&attribute.graphs);
                }
            }
        }
        unknown.into_iter().collect()
    }

    /// Follows class scores back to the last layer with weights.
    pub fn origin(&self, output: &str) -> Origin {
        let producers = self.producers();
        let mut logits = output.to_owned();
        let mut at = output;
        // Names are unique, so a path through the graph is no longer than it has nodes.
        for _ in 0..producers.len() {
            let Some(node) = producers.get(at) else {
                break;
            };
            let Some(input) = self.flowing_input(node, &producers) else {
                break;
            };
            match node.op_type.as_str() {
                "Softmax" | "LogSoftmax" => logits = input.to_owned(),
                "Gemm" | "MatMul" | "Conv" | "FusedConv" | "MatMulInteger" => {
                    return Origin {
                        logits,
                        embedding: Some(Feature {
                            name: input.to_owned(),
                            dequantise: None,
                        }),
                    };
                }
                "QLinearMatMul" | "QLinearConv" | "QGemm" => {
                    return Origin {
                        logits,
                        embedding: Some(quantised(node, input, &producers)),
                    };
                }
                // Whatever has no weights of its own.
                "Identity"
                | "Dropout"
                | "Reshape"
                | "Flatten"
                | "Squeeze"
                | "Unsqueeze"
                | "Cast"
                | "Transpose"
                | "Add"
                | "Sub"
                | "Mul"
                | "Div"
                | "Relu"
                | "Clip"
                | "GlobalAveragePool"
                | "AveragePool"
                | "ReduceMean"
                | "QuantizeLinear"
                | "DequantizeLinear"
                | "BatchNormalization"
                | "QLinearAdd"
                | "QLinearGlobalAveragePool" => {}
                _ => break,
            }
            at = input;
        }
        Origin {
            logits,
            embedding: None,
        }
    }

    fn weights(&self) -> BTreeSet<&str> {
        let tensors = self.graph().initializer.iter();
        tensors.map(|tensor| tensor.name.as_str()).collect()
    }

    fn producers(&self) -> BTreeMap<&str, &pb::NodeProto> {
        self.graph()
            .node
            .iter()
            .flat_map(|node| {
                node.output
                    .iter()
                    .map(move |output| (output.as_str(), node))
            })
            .collect()
    }

    /// The first input of a node that depends on the graph's input.
    fn flowing_input<'a>(
        &'a self,
        node: &'a pb::NodeProto,
        producers: &BTreeMap<&str, &'a pb::NodeProto>,
    ) -> Option<&'a str> {
        let inputs: BTreeSet<String> = self.inputs().into_iter().map(|port| port.name).collect();
        let depends = |start: &str| {
            let (mut seen, mut open) = (BTreeSet::new(), vec![start.to_owned()]);
            while let Some(name) = open.pop() {
                if inputs.contains(&name) {
                    return true;
                }
                if !seen.insert(name.clone()) {
                    continue;
                }
                if let Some(node) = producers.get(name.as_str()) {
                    open.extend(node.input.iter().cloned());
                }
            }
            false
        };
        node.input
            .iter()
            .map(String::as_str)
            .find(|name| depends(name))
    }
}

/// A model for one input shape, run to see what it answers.
pub struct Probe {
    /// Types and shapes of the outputs.
    pub facts: Vec<Fact>,
    model: TypedModel,
    kind: DatumType,
    shape: Vec<usize>,
}

impl Probe {
    /// Fixes the shape of the input; `kind` is its `TensorProto.DataType`.
    ///
    /// # Errors
    /// What tract says, with the operator's name.
    pub fn new(onnx: &[u8], kind: i32, shape: &[usize]) -> Result<Self, String> {
        let kind = match kind {
            2 => u8::datum_type(),
            10 => f16::datum_type(),
            _ => f32::datum_type(),
        };
        // Damaged files make the loader panic; it only builds new values from borrowed bytes.
        let model = catch_unwind(AssertUnwindSafe(|| {
            tract_onnx::onnx()
                .model_for_read(&mut std::io::Cursor::new(onnx))?
                .with_input_fact(0, InferenceFact::dt_shape(kind, shape))?
                .into_typed()
        }))
        .map_err(|panic| panic_text(&*panic).to_owned())?
        .map_err(|error| format!("{error:#}"))?;
        let facts = model
            .outputs
            .iter()
            .map(|outlet| {
                let fact = model
                    .outlet_fact(*outlet)
                    .map_err(|error| format!("{error:#}"))?;
                let kind = match fact.datum_type {
                    DatumType::F32 => 1,
                    DatumType::F16 => 10,
                    _ => 0,
                };
                let shape = fact.shape.as_concrete().ok_or_else(|| {
                    format!(
                        "an output's shape {:?} is not fixed by the input's",
                        fact.shape
                    )
                })?;
                Ok(Fact {
                    kind,
                    shape: shape.to_vec(),
                })
            })
            .collect::<Result<_, String>>()?;
        Ok(Self {
            facts,
            model,
            kind,
            shape: shape.to_vec(),
        })
    }

    /// The values of every output for each of several inputs.
    ///
    /// # Errors
    /// What tract says.
    pub fn run(&self, inputs: &[Vec<f32>]) -> Result<Vec<Vec<Vec<f32>>>, String> {
        let answer = || -> TractResult<Vec<Vec<Vec<f32>>>> {
            let mut state = self
                .model
                .clone()
                .into_optimized()?
                .into_runnable()?
                .spawn()?;
            let mut all = Vec::new();
            for input in inputs {
                let tensor = Tensor::from_shape(&self.shape, input)?;
                let tensor = tensor.cast_to_dt(self.kind)?.into_owned();
                let answers = state.run(tvec!(tensor.into_tvalue()))?;
                let floats = answers.iter().map(|answer| {
                    let answer = answer.cast_to::<f32>()?;
                    Ok(answer.try_as_plain_ram()?.as_slice::<f32>()?.to_vec())
                });
                all.push(floats.collect::<TractResult<_>>()?);
            }
            Ok(all)
        };
        catch_unwind(AssertUnwindSafe(answer))
            .map_err(|panic| panic_text(&*panic).to_owned())?
            .map_err(|error| format!("{error:#}"))
    }
}

/// The float value behind a quantised one, or a node that makes it.
fn quantised(
    node: &pb::NodeProto,
    input: &str,
    producers: &BTreeMap<&str, &pb::NodeProto>,
) -> Feature {
    if let Some(quantise) = producers.get(input)
        && quantise.op_type == "QuantizeLinear"
        && let Some(float) = quantise.input.first()
    {
        return Feature {
            name: float.clone(),
            dequantise: None,
        };
    }
    let name = format!("{input}_dequantised");
    Feature {
        name: name.clone(),
        dequantise: Some(Node {
            op: "DequantizeLinear",
            // A quantised layer reads value, scale, zero point.
            inputs: node.input.iter().take(3).cloned().collect(),
            output: name,
        }),
    }
}

fn port(info: &pb::ValueInfoProto) -> Port {
    let tensor = match info.r#type.as_ref().and_then(|kind| kind.value.as_ref()) {
        Some(type_proto::Value::TensorType(tensor)) => Some(tensor),
        None => None,
    };
    let side = |dimension: &pb::tensor_shape_proto::Dimension| match &dimension.value {
        Some(dimension::Value::DimValue(side)) => usize::try_from(*side).ok().filter(|s| *s > 0),
        _ => None,
    };
    Port {
        name: info.name.clone(),
        kind: tensor.map_or(0, |tensor| tensor.elem_type),
        shape: tensor
            .and_then(|tensor| tensor.shape.as_ref())
            .map(|shape| shape.dim.iter().map(side).collect()),
    }
}
