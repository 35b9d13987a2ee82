//! burn: rebuilds the network from its record and runs it on one of burn's CPU backends.

use burn::tensor::{Device, Tensor, TensorData};
use flywheel_models::{ARCH, Frozen, NetConfig, Weights};
use flywheel_shared::spec::{ClassOutput, Layout, ModelSpec, Task};

use crate::engine::{EngineError, EngineKind, Output, Plan, check_output, copy_finite};

/// burn's CPU backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Pure Rust with SIMD; burn's future.
    Flex,
    /// On the ndarray crate; deprecated by burn.
    Ndarray,
}

impl Backend {
    // burn deprecates ndarray in favour of flex; it stays here as the independent reference of the
    // parity test, for as long as burn has it.
    #[allow(deprecated)]
    fn device(self) -> Device {
        match self {
            Self::Flex => Device::flex(),
            Self::Ndarray => Device::ndarray(),
        }
    }
}

/// The folded network on a device.
pub struct BurnPlan {
    backend: Backend,
    device: Device,
    net: Frozen,
    config: NetConfig,
    input: Vec<f32>,
}

impl BurnPlan {
    /// Reads `record` as the architecture and shape that `spec` names.
    pub fn load(backend: Backend, record: &[u8], spec: &ModelSpec<'_>) -> Result<Self, String> {
        if spec.arch != ARCH {
            return Err(format!(
                "the record is of architecture {:?}; this build knows {ARCH:?}",
                spec.arch
            ));
        }
        if spec.task != Task::Classify(ClassOutput::Logits) || spec.input.layout != Layout::Nchw {
            return Err(format!(
                "a record of {ARCH:?} classifies NCHW images to logits; the spec says otherwise"
            ));
        }
        let config = NetConfig {
            channels: usize::from(spec.input.channels),
            width: usize::from(spec.input.width),
            height: usize::from(spec.input.height),
            classes: spec.classes(),
            embedding: usize::from(spec.embedding),
        };
        let device = backend.device();
        let net = Weights::from_record(&config, record)
            .map_err(|error| error.to_string())?
            .frozen(&device);
        Ok(Self {
            backend,
            device,
            net,
            input: vec![0.0; config.input_len()],
            config,
        })
    }

    fn answer(&self, output: &mut Output<'_>) -> Result<(), String> {
        let shape = [
            1,
            self.config.channels,
            self.config.height,
            self.config.width,
        ];
        let data = TensorData::new(self.input.clone(), shape);
        let (logits, embedding) = self.net.forward(Tensor::<4>::from_data(data, &self.device));
        for (what, tensor, slot) in [
            ("logits", logits, &mut *output.logits),
            ("embedding", embedding, &mut *output.embedding),
        ] {
            let data = tensor.try_into_data().map_err(|e| format!("{e:?}"))?;
            let values = data.as_slice::<f32>().map_err(|e| format!("{e:?}"))?;
            copy_finite(values, slot, what)?;
        }
        Ok(())
    }
}

impl Plan for BurnPlan {
    fn kind(&self) -> EngineKind {
        match self.backend {
            Backend::Flex => EngineKind::BurnFlex,
            Backend::Ndarray => EngineKind::BurnNdarray,
        }
    }

    fn input_len(&self) -> usize {
        self.config.input_len()
    }

    fn classes(&self) -> usize {
        self.config.classes
    }

    fn embedding_dim(&self) -> usize {
        self.config.embedding
    }

    fn input_mut(&mut self) -> &mut [f32] {
        &mut self.input
    }

    fn run_in_place(&mut self, output: &mut Output<'_>) -> Result<(), EngineError> {
        check_output(self, output)?;
        self.answer(output).map_err(|why| EngineError::Run {
            engine: self.kind().name(),
            why,
        })
    }
}
