//! A loaded network. The interface is that of `device_engine::Plan` (lengths, then `run` into
//! buffers of the caller), which itself needs `std`; an engine for Linux and one for a
//! microcontroller differ in their errors only.

use alloc::string::{String, ToString};
use core::fmt;

use burn::tensor::{Device, Tensor, TensorData};
use flywheel_models::{Frozen, ModelError, NetConfig, Weights};

/// Where the plan writes its answer. The lengths must be the plan's.
#[derive(Debug)]
pub struct Output<'a> {
    /// Unnormalised class scores, one per class.
    pub logits: &'a mut [f32],
    /// The embedding.
    pub embedding: &'a mut [f32],
}

/// Why a model cannot be loaded or run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlanError {
    /// The record is damaged or of another network.
    Record(ModelError),
    /// A buffer of the caller has the wrong length.
    Buffer {
        /// `input`, `logits` or `embedding`.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The plan's.
        want: usize,
    },
    /// burn failed on this input, or answered with a value that is not finite.
    Run(String),
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Record(error) => error.fmt(f),
            Self::Buffer { what, found, want } => {
                write!(
                    f,
                    "{what} buffer has {found} values, the model wants {want}"
                )
            }
            Self::Run(why) => write!(f, "inference failed: {why}"),
        }
    }
}

impl core::error::Error for PlanError {}

impl From<ModelError> for PlanError {
    fn from(error: ModelError) -> Self {
        Self::Record(error)
    }
}

/// The folded network on burn's flex backend.
pub struct FlexPlan {
    device: Device,
    net: Frozen,
    config: NetConfig,
}

impl FlexPlan {
    /// Builds the network that `config` describes from a burnpack record.
    ///
    /// # Errors
    /// [`PlanError::Record`].
    pub fn load(config: NetConfig, record: &[u8]) -> Result<Self, PlanError> {
        let device = Device::flex();
        let net = Weights::from_record(&config, record)?.frozen(&device);
        Ok(Self {
            device,
            net,
            config,
        })
    }

    /// Values of one input tensor.
    pub fn input_len(&self) -> usize {
        self.config.input_len()
    }

    /// Number of classes, the length of [`Output::logits`].
    pub fn classes(&self) -> usize {
        self.config.classes
    }

    /// Length of [`Output::embedding`].
    pub fn embedding_dim(&self) -> usize {
        self.config.embedding
    }

    /// Runs one preprocessed picture, NCHW with N = 1.
    ///
    /// # Errors
    /// [`PlanError::Buffer`] for a wrong length, [`PlanError::Run`] if burn fails.
    pub fn run(&mut self, input: &[f32], output: &mut Output<'_>) -> Result<(), PlanError> {
        for (what, found, want) in [
            ("input", input.len(), self.input_len()),
            ("logits", output.logits.len(), self.classes()),
            ("embedding", output.embedding.len(), self.embedding_dim()),
        ] {
            if found != want {
                return Err(PlanError::Buffer { what, found, want });
            }
        }
        let NetConfig {
            channels,
            height,
            width,
            ..
        } = self.config;
        let data = TensorData::new(input.to_vec(), [1, channels, height, width]);
        let (logits, embedding) = self.net.forward(Tensor::<4>::from_data(data, &self.device));
        copy(logits, output.logits)?;
        copy(embedding, output.embedding)
    }
}

fn copy(tensor: Tensor<2>, to: &mut [f32]) -> Result<(), PlanError> {
    let data = tensor
        .try_into_data()
        .map_err(|error| PlanError::Run(alloc::format!("{error:?}")))?;
    let values = data
        .as_slice::<f32>()
        .map_err(|error| PlanError::Run(alloc::format!("{error:?}")))?;
    if values.len() != to.len() || !values.iter().all(|value| value.is_finite()) {
        return Err(PlanError::Run(
            "a value is missing or not finite".to_string(),
        ));
    }
    to.copy_from_slice(values);
    Ok(())
}
