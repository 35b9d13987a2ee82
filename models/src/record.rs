//! Weights as bytes: burnpack, the format burn itself stores modules in.
//!
//! Two departures from `BurnpackStore`: parameter identities (random per process) are left out, so
//! that equal weights give equal bytes and therefore equal digests; and everything about a record
//! is checked before a module sees it, since burn aborts on some damaged input.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use burn::store::bridge;
use burn::store::burn_pack::{Bytes, Reader, Tensor as PackTensor, Writer};
use burn::tensor::{DType, TensorData};

use crate::{ModelError, NetConfig, Weights};

/// The record of `weights`.
///
/// # Errors
/// [`ModelError::Damaged`] if the writer fails.
pub fn encode(weights: &Weights) -> Result<Vec<u8>, ModelError> {
    let tensors: Vec<PackTensor> = weights
        .slots()
        .iter()
        .map(|slot| {
            let values = weights.values()[slot.range.clone()].to_vec();
            let data = TensorData::new(values, slot.shape.clone());
            bridge::from_data(data, slot.name.clone(), None)
        })
        .collect();
    let bytes = Writer::new(tensors)
        .with_metadata("producer", "flywheel")
        .into_bytes()
        .map_err(damaged)?;
    Ok(bytes.to_vec())
}

/// The weights in a record of the network that `config` describes.
///
/// # Errors
/// [`ModelError`] naming the tensor, for bytes that are damaged, cut short or of another network.
pub fn decode(config: &NetConfig, bytes: &[u8]) -> Result<Weights, ModelError> {
    let mut weights = Weights::zeros(config)?;
    let mut found: BTreeMap<String, PackTensor> =
        Reader::from_bytes(Bytes::from_bytes_vec(bytes.to_vec()))
            .and_then(Reader::into_tensors)
            .map_err(damaged)?
            .into_iter()
            .map(|tensor| (tensor.name.clone(), tensor))
            .collect();
    for slot in weights.slots().to_vec() {
        let tensor = found
            .remove(&slot.name)
            .ok_or_else(|| ModelError::Missing(slot.name.clone()))?;
        if tensor.dtype != DType::F32 {
            return Err(ModelError::Damaged(format!(
                "tensor {:?} is {:?}, not F32",
                slot.name, tensor.dtype
            )));
        }
        let shape: Vec<usize> = tensor.shape.iter().copied().collect();
        if shape != slot.shape {
            return Err(ModelError::Shape {
                name: slot.name,
                found: shape,
                want: slot.shape,
            });
        }
        let raw = tensor.into_bytes().map_err(damaged)?;
        let target = &mut weights.values_mut()[slot.range];
        if raw.len() != 4 * target.len() {
            return Err(ModelError::Damaged(format!(
                "tensor {:?} has {} bytes, not {}",
                slot.name,
                raw.len(),
                4 * target.len()
            )));
        }
        // Value by value, since the view into the record need not be aligned for f32.
        for (value, bytes) in target.iter_mut().zip(raw.chunks_exact(4)) {
            *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            if !value.is_finite() {
                return Err(ModelError::NotFinite(slot.name));
            }
        }
    }
    match found.into_keys().next() {
        Some(name) => Err(ModelError::Unknown(name)),
        None => Ok(weights),
    }
}

fn damaged(error: burn::store::burn_pack::Error) -> ModelError {
    ModelError::Damaged(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: NetConfig = NetConfig {
        channels: 1,
        width: 16,
        height: 16,
        classes: 3,
        embedding: 16,
    };

    #[test]
    fn a_record_returns_the_same_weights_and_the_same_bytes() {
        let weights = Weights::init(&CONFIG, 5).unwrap();
        let bytes = encode(&weights).unwrap();
        assert_eq!(decode(&CONFIG, &bytes).unwrap(), weights);
        assert_eq!(encode(&Weights::init(&CONFIG, 5).unwrap()).unwrap(), bytes);
    }

    #[test]
    fn damaged_records_are_refused() {
        let bytes = encode(&Weights::init(&CONFIG, 5).unwrap()).unwrap();
        for cut in [0, 1, 9, 100, bytes.len() / 2, bytes.len() - 1] {
            assert!(decode(&CONFIG, &bytes[..cut]).is_err(), "cut at {cut}");
        }
        assert!(decode(&CONFIG, b"not a record at all, only text").is_err());
        let mut flipped = bytes.clone();
        flipped[20..60].fill(0xff);
        assert!(decode(&CONFIG, &flipped).is_err());
    }

    #[test]
    fn a_record_of_another_net_names_the_tensor() {
        let bytes = encode(&Weights::init(&CONFIG, 5).unwrap()).unwrap();
        let config = NetConfig {
            classes: 4,
            ..CONFIG
        };
        let error = decode(&config, &bytes).unwrap_err();
        assert!(matches!(error, ModelError::Shape { ref name, .. } if name == "head.weight"));
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        let mut weights = Weights::init(&CONFIG, 5).unwrap();
        weights.values_mut()[0] = f32::NAN;
        let bytes = encode(&weights).unwrap();
        assert_eq!(
            decode(&CONFIG, &bytes),
            Err(ModelError::NotFinite("blocks.0.conv.weight".into()))
        );
    }
}
