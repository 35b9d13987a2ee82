//! ONNX files as protobuf: canonical names for what we export, and [`edit`] for what others made.
//!
//! burn-onnx names values after a counter that is global to the process (`tensor_57`), so that two
//! exports of one model differ in their bytes and therefore in their digest. This rewrites the
//! names in the protobuf: the declared inputs and outputs get the names asked for, every other
//! value is numbered by its first use. Only the fields that carry value names are touched.

use std::collections::BTreeMap;

use crate::ModelError;

pub mod edit;

/// The ONNX messages that carry value names, directly or below them.
#[derive(Clone, Copy)]
enum Message {
    Model,
    Graph,
    Node,
    Tensor,
    ValueInfo,
}

/// What a length-delimited field holds.
enum Field {
    Name,
    Nested(Message),
    Other,
}

impl Message {
    /// Field numbers of onnx.proto (onnx 1.13, IR version 8).
    fn field(self, number: u64) -> Field {
        match (self, number) {
            (Self::Model, 7) => Field::Nested(Self::Graph),
            (Self::Graph, 1) => Field::Nested(Self::Node),
            (Self::Graph, 5) => Field::Nested(Self::Tensor),
            (Self::Graph, 11..=13) => Field::Nested(Self::ValueInfo),
            (Self::Node, 1 | 2) | (Self::Tensor, 8) | (Self::ValueInfo, 1) => Field::Name,
            _ => Field::Other,
        }
    }
}

/// Renames every value of `model`: its inputs to `inputs` and its outputs to `outputs`, in order.
///
/// # Errors
/// [`ModelError::Export`] if the protobuf is malformed or has other numbers of inputs or outputs.
pub fn canonical(model: &[u8], inputs: &[&str], outputs: &[&str]) -> Result<Vec<u8>, ModelError> {
    let mut names = BTreeMap::new();
    for (field, kind, wanted) in [(11, "inputs", inputs), (12, "outputs", outputs)] {
        let found = boundary(model, field)?;
        if found.len() != wanted.len() {
            return Err(ModelError::Export(format!(
                "{} {kind} instead of {}",
                found.len(),
                wanted.len()
            )));
        }
        names.extend(
            found
                .into_iter()
                .zip(wanted.iter().map(|s| (*s).to_owned())),
        );
    }
    let mut values = 0;
    rewrite(model, Message::Model, &mut |name| {
        // Parameters carry their module path and shape operands their node's index, both stable.
        if !name.starts_with("tensor_") {
            return name.to_owned();
        }
        names
            .entry(name.to_owned())
            .or_insert_with(|| {
                values += 1;
                format!("value_{values}")
            })
            .clone()
    })
}

/// Names of the graph's inputs (field 11) or outputs (field 12).
fn boundary(model: &[u8], wanted: u64) -> Result<Vec<String>, ModelError> {
    let mut found = Vec::new();
    each(model, |number, graph, _| {
        if number != 7 {
            return Ok(());
        }
        each(graph, |number, info, _| {
            if number != wanted {
                return Ok(());
            }
            each(info, |number, name, _| {
                if number == 1 {
                    found.push(text(name)?.to_owned());
                }
                Ok(())
            })
        })
    })?;
    Ok(found)
}

/// Copies a message, renaming as it goes; depth is bounded by [`Message`].
fn rewrite(
    bytes: &[u8],
    message: Message,
    rename: &mut dyn FnMut(&str) -> String,
) -> Result<Vec<u8>, ModelError> {
    let mut out = Vec::with_capacity(bytes.len());
    each(bytes, |number, payload, raw| {
        let changed = match message.field(number) {
            Field::Name => rename(text(payload)?).into_bytes(),
            Field::Nested(inner) => rewrite(payload, inner, rename)?,
            Field::Other => {
                out.extend_from_slice(raw);
                return Ok(());
            }
        };
        field(&mut out, number, &changed);
        Ok(())
    })?;
    Ok(out)
}

/// Calls `visit(field number, payload, whole field)` for each field; the payload is empty unless
/// the field is length-delimited.
fn each(
    mut bytes: &[u8],
    mut visit: impl FnMut(u64, &[u8], &[u8]) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    while !bytes.is_empty() {
        let mut rest = bytes;
        let tag = read_varint(&mut rest)?;
        let payload = match tag & 7 {
            0 => {
                read_varint(&mut rest)?;
                &[]
            }
            1 => {
                take(&mut rest, 8)?;
                &[]
            }
            2 => {
                let len = read_varint(&mut rest)?;
                take(&mut rest, len)?
            }
            5 => {
                take(&mut rest, 4)?;
                &[]
            }
            other => return Err(malformed(&format!("wire type {other}"))),
        };
        visit(tag >> 3, payload, &bytes[..bytes.len() - rest.len()])?;
        bytes = rest;
    }
    Ok(())
}

fn read_varint(bytes: &mut &[u8]) -> Result<u64, ModelError> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(malformed("varint"))
}

fn write_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Writes a length-delimited field.
fn field(out: &mut Vec<u8>, number: u64, payload: &[u8]) {
    write_varint(out, number << 3 | 2);
    write_varint(out, payload.len() as u64);
    out.extend_from_slice(payload);
}

fn varint_field(out: &mut Vec<u8>, number: u64, value: u64) {
    write_varint(out, number << 3);
    write_varint(out, value);
}

fn take<'a>(bytes: &mut &'a [u8], len: u64) -> Result<&'a [u8], ModelError> {
    let split = usize::try_from(len)
        .ok()
        .and_then(|len| bytes.split_at_checked(len));
    let (head, tail) = split.ok_or_else(|| malformed("it ends early"))?;
    *bytes = tail;
    Ok(head)
}

fn text(bytes: &[u8]) -> Result<&str, ModelError> {
    std::str::from_utf8(bytes).map_err(|_| malformed("a name is not UTF-8"))
}

fn malformed(what: &str) -> ModelError {
    ModelError::Export(format!("the protobuf is malformed: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(number: u64, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        super::field(&mut out, number, payload);
        out
    }

    fn model(input: &str, middle: &str, output: &str) -> Vec<u8> {
        let node = |from: &str, to: &str| {
            field(
                1,
                &[field(1, from.as_bytes()), field(2, to.as_bytes())].concat(),
            )
        };
        let graph = [
            node(input, middle),
            node(middle, output),
            field(11, &field(1, input.as_bytes())),
            field(12, &field(1, output.as_bytes())),
        ]
        .concat();
        [vec![0x08, 0x08], field(7, &graph)].concat()
    }

    #[test]
    fn names_no_longer_depend_on_the_counter() {
        let a = canonical(&model("tensor_8", "tensor_9", "tensor_10"), &["x"], &["y"]).unwrap();
        let b = canonical(
            &model("tensor_98", "tensor_99", "tensor_100"),
            &["x"],
            &["y"],
        )
        .unwrap();
        assert_eq!(a, b);
        assert_eq!(a, model("x", "value_1", "y"));
    }

    #[test]
    fn malformed_bytes_and_other_boundaries_are_refused() {
        let good = model("tensor_1", "tensor_2", "tensor_3");
        for cut in 1..good.len() {
            let cut = &good[..cut];
            assert!(canonical(cut, &["x"], &["y"]).is_err());
        }
        assert!(canonical(&good, &["x"], &["y", "z"]).is_err());
    }
}
