//! One error for everything that can be wrong with a model's description or its bytes.

use alloc::string::String;
use alloc::vec::Vec;

use thiserror::Error;

/// Why a network could not be described, loaded, stored or exported.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ModelError {
    /// A field of [`NetConfig`](crate::NetConfig) is outside what the architecture supports.
    #[error("net config: {field} is {found}; use {want}")]
    Config {
        /// The field's name.
        field: &'static str,
        /// The value found.
        found: usize,
        /// What would be accepted.
        want: &'static str,
    },
    /// The bytes are not a burnpack record, or are cut short.
    #[error("model record is damaged ({0}); fetch it again or retrain")]
    Damaged(String),
    /// The record lacks a tensor that the described network has.
    #[error("model record has no tensor {0:?}; it was made by another architecture")]
    Missing(String),
    /// The record holds a tensor that the described network does not have.
    #[error("model record has an unknown tensor {0:?}; it was made by another architecture")]
    Unknown(String),
    /// A tensor's shape differs from the one the config describes.
    #[error("model record: tensor {name:?} has shape {found:?}, the config wants {want:?}")]
    Shape {
        /// The tensor's name.
        name: String,
        /// The shape found in the record.
        found: Vec<usize>,
        /// The shape the config describes.
        want: Vec<usize>,
    },
    /// A tensor holds NaN or infinity.
    #[error("model record: tensor {0:?} holds a value that is not finite")]
    NotFinite(String),
    /// Two networks differ in more than the number of classes.
    #[error("cannot grow the champion: {0}")]
    Grow(String),
    /// The ONNX exporter refused, or the file is malformed.
    #[error("ONNX file: {0}")]
    Export(String),
}
