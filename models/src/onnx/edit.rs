//! Changes to an ONNX file that somebody else made: which values are its outputs, and nodes that
//! are added at its end. Every byte that is not concerned stays as it was.

use super::{each, field, malformed, text, varint_field};
use crate::ModelError;

/// A value to declare as an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    /// Its name in the graph.
    pub name: String,
    /// `TensorProto.DataType`: 1 for f32, 10 for f16; 0 leaves type and shape undeclared.
    pub kind: i32,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// A node to add behind all others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Operator of the standard domain.
    pub op: &'static str,
    /// Names of its inputs.
    pub inputs: Vec<String>,
    /// Name of its output.
    pub output: String,
}

/// The model with `nodes` behind its own and exactly `outputs`, in this order. What no output
/// needs stays in the file; engines leave it out.
///
/// # Errors
/// [`ModelError::Export`] if the protobuf is malformed or has no graph.
pub fn with_outputs(
    model: &[u8],
    nodes: &[Node],
    outputs: &[Value],
) -> Result<Vec<u8>, ModelError> {
    let mut out = Vec::with_capacity(model.len() + 1024);
    let mut graphs = 0;
    each(model, |number, payload, raw| {
        if number != 7 {
            out.extend_from_slice(raw);
            return Ok(());
        }
        graphs += 1;
        field(&mut out, 7, &graph(payload, nodes, outputs)?);
        Ok(())
    })?;
    if graphs == 1 {
        Ok(out)
    } else {
        Err(malformed("it has no graph"))
    }
}

fn graph(bytes: &[u8], nodes: &[Node], outputs: &[Value]) -> Result<Vec<u8>, ModelError> {
    let mut out = Vec::with_capacity(bytes.len() + 1024);
    let declared = |info: &[u8]| -> Result<bool, ModelError> {
        let mut found = false;
        each(info, |number, name, _| {
            if number == 1 {
                let name = text(name)?;
                found |= outputs.iter().any(|value| value.name == name);
            }
            Ok(())
        })?;
        Ok(found)
    };
    each(bytes, |number, payload, raw| {
        // 12: outputs; 13: facts about inner values, which an output declares anew.
        if number == 12 || number == 13 && declared(payload)? {
            return Ok(());
        }
        out.extend_from_slice(raw);
        Ok(())
    })?;
    for node in nodes {
        let mut inner = Vec::new();
        for input in &node.inputs {
            field(&mut inner, 1, input.as_bytes());
        }
        field(&mut inner, 2, node.output.as_bytes());
        field(&mut inner, 3, node.output.as_bytes());
        field(&mut inner, 4, node.op.as_bytes());
        field(&mut out, 1, &inner);
    }
    for value in outputs {
        let mut info = Vec::new();
        field(&mut info, 1, value.name.as_bytes());
        if value.kind != 0 {
            field(&mut info, 2, &tensor_type(value));
        }
        field(&mut out, 12, &info);
    }
    Ok(out)
}

/// A `TypeProto` of a tensor.
fn tensor_type(value: &Value) -> Vec<u8> {
    let mut shape = Vec::new();
    for side in &value.shape {
        let mut dimension = Vec::new();
        varint_field(&mut dimension, 1, *side as u64);
        field(&mut shape, 1, &dimension);
    }
    let mut tensor = Vec::new();
    varint_field(&mut tensor, 1, u64::from(value.kind.unsigned_abs()));
    field(&mut tensor, 2, &shape);
    let mut kind = Vec::new();
    field(&mut kind, 1, &tensor);
    kind
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{NetConfig, Weights, export};

    #[test]
    fn outputs_are_replaced_and_everything_else_stays() {
        let config = NetConfig {
            channels: 1,
            width: 28,
            height: 28,
            classes: 3,
            embedding: 16,
        };
        let record = Weights::init(&config, 1).unwrap().to_record().unwrap();
        let model = export::to_onnx(&config, &record).unwrap();
        let value = |name: &str, len: usize| Value {
            name: name.to_owned(),
            kind: 1,
            shape: vec![1, len],
        };
        let node = Node {
            op: "Relu",
            inputs: vec![export::LOGITS.to_owned()],
            output: "positive".to_owned(),
        };
        let changed = with_outputs(&model, &[node], &[value("positive", 3)]).unwrap();
        assert_eq!(super::super::boundary(&changed, 12).unwrap(), ["positive"]);
        assert_eq!(
            super::super::boundary(&changed, 11).unwrap(),
            [export::INPUT]
        );
        // What was taken away can be put back.
        let names = [value(export::LOGITS, 3), value(export::EMBEDDING, 16)];
        let again = with_outputs(&changed, &[], &names).unwrap();
        assert_eq!(
            super::super::boundary(&again, 12).unwrap(),
            [export::LOGITS, export::EMBEDDING]
        );
        for cut in [1, model.len() / 3, model.len() - 1] {
            assert!(with_outputs(&model[..cut], &[], &names).is_err());
        }
        assert!(with_outputs(&[], &[], &names).is_err());
    }
}
