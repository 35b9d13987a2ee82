//! Where the values of an ONNX file lie. Only as much of the format is read as that takes: a file
//! that is none, or that does not end where it says, has no tensors.

/// The values of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tensor<'a> {
    pub(crate) name: &'a [u8],
    /// Bytes of a value.
    pub(crate) width: usize,
    /// First byte in the file.
    pub(crate) start: usize,
    /// Length in bytes.
    pub(crate) len: usize,
}

// Field numbers of onnx.proto3.
const MODEL_GRAPH: u64 = 7;
const GRAPH_INITIALIZER: u64 = 5;
const TENSOR_DATA_TYPE: u64 = 2;
const TENSOR_FLOAT_DATA: u64 = 4;
const TENSOR_NAME: u64 = 8;
const TENSOR_RAW_DATA: u64 = 9;

/// The initializers of the graph that hold values, in the order of the file.
pub(crate) fn tensors(file: &[u8]) -> Vec<Tensor<'_>> {
    read(file).unwrap_or_default()
}

fn read(file: &[u8]) -> Option<Vec<Tensor<'_>>> {
    let mut found = Vec::new();
    for (number, graph) in fields(file, 0)? {
        let Value::Bytes { start, bytes } = graph else {
            continue;
        };
        if number != MODEL_GRAPH {
            continue;
        }
        for (number, tensor) in fields(bytes, start)? {
            if let (GRAPH_INITIALIZER, Value::Bytes { start, bytes }) = (number, tensor) {
                found.extend(initializer(bytes, start)?);
            }
        }
    }
    Some(found)
}

fn initializer(bytes: &[u8], start: usize) -> Option<Option<Tensor<'_>>> {
    let (mut name, mut data_type, mut raw, mut floats) = (&[][..], 0, None, None);
    for (number, value) in fields(bytes, start)? {
        match (number, value) {
            (TENSOR_NAME, Value::Bytes { bytes, .. }) => name = bytes,
            (TENSOR_DATA_TYPE, Value::Number(kind)) => data_type = kind,
            (TENSOR_RAW_DATA, Value::Bytes { start, bytes }) => raw = Some((start, bytes.len())),
            (TENSOR_FLOAT_DATA, Value::Bytes { start, bytes }) => {
                floats = Some((start, bytes.len()));
            }
            _ => {}
        }
    }
    let width = match data_type {
        1 | 6 | 12 => 4,
        2 | 3 | 9 => 1,
        4 | 5 | 10 | 16 => 2,
        7 | 11 | 13 => 8,
        _ => return Some(None),
    };
    let place = raw
        .map(|place| (width, place))
        .or(floats.map(|place| (4, place)));
    Some(
        place
            .filter(|(width, (_, len))| *len > 0 && len.is_multiple_of(*width))
            .map(|(width, (start, len))| Tensor {
                name,
                width,
                start,
                len,
            }),
    )
}

enum Value<'a> {
    Number(u64),
    Bytes { start: usize, bytes: &'a [u8] },
    Fixed,
}

/// The fields of a protobuf message that begins at `offset` of the file.
fn fields(message: &[u8], offset: usize) -> Option<Vec<(u64, Value<'_>)>> {
    let mut at = 0;
    let mut found = Vec::new();
    while at < message.len() {
        let tag = varint(message, &mut at)?;
        let value = match tag & 7 {
            0 => Value::Number(varint(message, &mut at)?),
            2 => {
                let len = usize::try_from(varint(message, &mut at)?).ok()?;
                let bytes = message.get(at..at.checked_add(len)?)?;
                let start = offset + at;
                at += len;
                Value::Bytes { start, bytes }
            }
            kind @ (1 | 5) => {
                let len = if kind == 1 { 8 } else { 4 };
                message.get(at..at + len)?;
                at += len;
                Value::Fixed
            }
            _ => return None,
        };
        found.push((tag >> 3, value));
    }
    Some(found)
}

/// A number in base 128, least significant digits first.
pub(crate) fn varint(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
    }

    #[test]
    fn initializers_are_found_where_they_lie() {
        let values = [1u8, 2, 3, 4, 5, 6, 7, 8];
        let tensor = [
            vec![2 << 3, 1],
            field(8, b"w"),
            vec![1 << 3 | 5, 0, 0, 0, 0],
            field(9, &values),
        ]
        .concat();
        let text = [vec![2 << 3, 8], field(8, b"names")].concat();
        let graph = [field(1, b"node"), field(5, &text), field(5, &tensor)].concat();
        let file = [vec![1 << 3, 8], field(7, &graph)].concat();
        let found = tensors(&file);
        assert_eq!(found.len(), 1);
        let tensor = &found[0];
        assert_eq!((tensor.name, tensor.width), (&b"w"[..], 4));
        assert_eq!(file[tensor.start..tensor.start + tensor.len], values);
        // Cut anywhere, it is no file.
        for end in 1..file.len() {
            let _ = tensors(&file[..end]);
        }
        assert!(tensors(&file[..file.len() - 1]).is_empty());
        assert!(tensors(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff").is_empty());
    }
}
