//! The models that the program knows by name, as lists of named parameters and a loss.
//!
//! A model is data: parameters in one fixed order (the order of use, so that gradients come in reverse), each filled as
//! a pure function of the seed and its name. Nobody here knows ranks, optimizers or files.

use everlit_api::job::MODEL_PRESETS;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::TrainError;
use super::random::Stream;
use super::tensors::floats_mut;

mod llama;
mod mlp;

/// Byte values.
pub const VOCABULARY: i64 = 256;

/// One trained tensor.
#[derive(Debug)]
pub struct Parameter {
    /// Unique in the model; names the tensor in checkpoints.
    pub name: String,
    /// Float32, on the CPU, with gradient.
    pub tensor: Tensor,
    init: Init,
}

/// How a parameter begins.
#[derive(Debug, Clone, Copy)]
enum Init {
    /// Normal numbers with this standard deviation.
    Normal(f32),
    /// All the same.
    Constant(f32),
}

impl Parameter {
    fn new(name: impl Into<String>, shape: &[i64], init: Init) -> Self {
        let tensor = Tensor::zeros(shape, (Kind::Float, Device::Cpu)).set_requires_grad(true);
        Self { name: name.into(), tensor, init }
    }

    /// Bytes of its numbers.
    pub fn bytes(&self) -> u64 {
        self.tensor.numel() as u64 * 4
    }

    fn initialize(&self, seed: u64) {
        const BLOCK: usize = 1 << 16;
        let stream = Stream::new(seed, &self.name);
        let numbers = floats_mut(&self.tensor);
        match self.init {
            Init::Constant(value) => numbers.fill(value),
            Init::Normal(deviation) => numbers.par_chunks_mut(BLOCK).enumerate().for_each(|(block, part)| {
                for (offset, number) in part.iter_mut().enumerate() {
                    *number = stream.normal((block * BLOCK + offset) as u64) * deviation;
                }
            }),
        }
    }
}

/// A model with its parameters.
pub struct Model {
    parameters: Vec<Parameter>,
    family: Family,
}

enum Family {
    Llama(llama::Config, llama::Rotation),
    Mlp(mlp::Config),
}

impl Model {
    /// A preset for samples of `sequence_length` bytes; its parameters are zero.
    pub fn new(preset: &str, sequence_length: u32) -> Result<Self, TrainError> {
        if let Some(config) = llama::Config::preset(preset, sequence_length) {
            return Ok(Self { parameters: config.parameters(), family: Family::Llama(config.clone(), config.positions()) });
        }
        if let Some(config) = mlp::Config::preset(preset) {
            return Ok(Self { parameters: config.parameters(), family: Family::Mlp(config) });
        }
        Err(TrainError::Config(format!("model `{preset}` is not known; there are {}", MODEL_PRESETS.join(", "))))
    }

    /// Fills every parameter from the seed.
    pub fn initialize(&self, seed: u64) {
        for parameter in &self.parameters {
            parameter.initialize(seed);
        }
    }

    /// All parameters, in the order of use.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// `llama` or `mlp`.
    pub fn family(&self) -> &'static str {
        match self.family {
            Family::Llama(..) => "llama",
            Family::Mlp(_) => "mlp",
        }
    }

    /// All sizes, as the manifest keeps them.
    pub fn config(&self) -> serde_json::Value {
        let config = match &self.family {
            Family::Llama(config, _) => serde_json::to_value(config),
            Family::Mlp(config) => serde_json::to_value(config),
        };
        config.expect("a struct of numbers is JSON")
    }

    /// Bytes of text in one sample, the last target included.
    pub fn window(&self) -> u64 {
        match &self.family {
            Family::Llama(config, _) => u64::from(config.sequence_length) + 1,
            Family::Mlp(config) => config.context as u64 + 1,
        }
    }

    /// Mean cross entropy, in nats per predicted byte, of `[samples, window]` bytes.
    pub fn loss(&self, samples: &Tensor) -> Tensor {
        let (logits, targets) = match &self.family {
            Family::Llama(config, positions) => config.forward(positions, &self.parameters, samples),
            Family::Mlp(config) => config.forward(&self.parameters, samples),
        };
        logits.cross_entropy_loss::<Tensor>(&targets, None, tch::Reduction::Mean, -100, 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_has_about_the_size_of_its_name_and_a_finite_first_loss() {
        for (preset, least, most) in [
            ("llama-1m", 0.9e6, 1.1e6),
            ("llama-10m", 9e6, 11e6),
            ("llama-30m", 28e6, 32e6),
            ("llama-124m", 120e6, 128e6),
            ("mlp-10k", 9.5e3, 10.5e3),
            ("mlp-500k", 480e3, 520e3),
        ] {
            assert!(MODEL_PRESETS.contains(&preset));
            let model = Model::new(preset, 16).unwrap();
            let size: f64 = model.parameters().iter().map(|parameter| parameter.tensor.numel() as f64).sum();
            assert!((least..=most).contains(&size), "{preset} has {size}");
            if size < 2e6 {
                model.initialize(1);
                let samples = Tensor::arange(2 * model.window() as i64, (Kind::Int64, Device::Cpu)).view([2, -1]);
                let loss = model.loss(&samples).double_value(&[]);
                assert!((loss - 256_f64.ln()).abs() < 0.5, "{preset} begins at {loss}");
            }
        }
        assert_eq!(Model::new("gpt-9", 16).err().unwrap().exit_code(), 78);
    }

    #[test]
    fn initial_weights_are_a_function_of_the_seed() {
        let weights = |seed| {
            let model = Model::new("mlp-10k", 16).unwrap();
            model.initialize(seed);
            model.parameters().iter().flat_map(|p| floats_mut(&p.tensor).to_vec()).collect::<Vec<f32>>()
        };
        assert_eq!(weights(5), weights(5));
        assert_ne!(weights(5), weights(6));
    }
}
