//! From weights to the ONNX file that devices run.
//!
//! The folded network is exported, freshly built from its record: burn's exporter moves running
//! statistics it finds onto its capture device, which would break the original, and engines have
//! half the nodes to run.

use burn::tensor::{Device, Tensor};
use burn_onnx::export::OnnxExporter;

use crate::net::Frozen;
use crate::{ModelError, NetConfig, Weights, onnx};

/// Name of the input, f32 `[1, channels, height, width]`, preprocessed.
pub const INPUT: &str = "input";
/// Name of the first output, f32 `[1, classes]`: unnormalised class scores.
pub const LOGITS: &str = "logits";
/// Name of the second output, f32 `[1, embedding]`: the penultimate layer after its ReLU.
pub const EMBEDDING: &str = "embedding";

/// The ONNX file (opset 18) of the network in `record`; equal records give equal bytes.
///
/// # Errors
/// [`ModelError`] of the record, or [`ModelError::Export`].
pub fn to_onnx(config: &NetConfig, record: &[u8]) -> Result<Vec<u8>, ModelError> {
    let device = Device::flex();
    let net = Weights::from_record(config, record)?.frozen(&device);
    let sample = Tensor::<4>::zeros([1, config.channels, config.height, config.width], &device);
    let model = OnnxExporter::new()
        .export(&net, sample, Frozen::forward)
        .map_err(|error| ModelError::Export(error.to_string()))?;
    onnx::canonical(model.as_bytes(), &[INPUT], &[LOGITS, EMBEDDING])
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: NetConfig = NetConfig {
        channels: 3,
        width: 32,
        height: 32,
        classes: 4,
        embedding: 64,
    };

    #[test]
    fn equal_records_give_equal_files() {
        let record = Weights::init(&CONFIG, 1).unwrap().to_record().unwrap();
        let first = to_onnx(&CONFIG, &record).unwrap();
        // Enough exports for the exporter's counter to gain a digit, which changes its sorting.
        for _ in 0..12 {
            assert_eq!(to_onnx(&CONFIG, &record).unwrap(), first);
        }
        let other = Weights::init(&CONFIG, 2).unwrap().to_record().unwrap();
        assert_ne!(to_onnx(&CONFIG, &other).unwrap(), first);
    }

    #[test]
    fn large_images_export_too() {
        let config = NetConfig {
            width: 64,
            height: 96,
            ..CONFIG
        };
        let record = Weights::init(&config, 1).unwrap().to_record().unwrap();
        assert!(to_onnx(&config, &record).is_ok());
    }
}
