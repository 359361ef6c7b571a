//! The models that the program knows by name, as lists of named parameters and a loss.
//!
//! A model is data: parameters in one fixed order (the order of use, so that gradients come in reverse), each filled as
//! a pure function of the seed and its name. Nobody here knows ranks, optimizers or files.

use std::sync::Arc;

use everlit_api::job::{MODEL_PRESETS, ModelSpec, WorkerSpec};
use everlit_api::model::ModelSizes;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::TrainError;
use super::random::Stream;
use super::tensors::{assign, beside, floats_mut};

mod llama;
mod mlp;

/// What a pass is for. Random numbers are a function of the stream: seed, step, rank and micro-batch.
#[derive(Debug, Clone, Copy)]
pub enum Pass {
    /// Training: activations are dropped as the job says, chosen by this stream.
    Train(Stream),
    /// Measuring: nothing is dropped.
    Evaluate,
}

/// Whether a pass has a use any more.
type Stands<'a> = &'a dyn Fn() -> Result<(), TrainError>;

impl Pass {
    fn is_training(self) -> bool {
        matches!(self, Self::Train(_))
    }

    /// Sets libtorch's generator to where it stands at the beginning of a layer, each time that layer runs.
    fn seed_layer(self, layer: i64) {
        if let Self::Train(stream) = self {
            tch::manual_seed(stream.bits(layer as u64) as i64);
        }
    }
}

/// One trained tensor.
#[derive(Debug)]
pub struct Parameter {
    /// Unique in the model; names the tensor in checkpoints.
    pub name: String,
    /// Float32, with gradient.
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
        let host = beside(&self.tensor);
        let numbers = floats_mut(&host);
        match self.init {
            Init::Constant(value) => numbers.fill(value),
            Init::Normal(deviation) => numbers.par_chunks_mut(BLOCK).enumerate().for_each(|(block, part)| {
                for (offset, number) in part.iter_mut().enumerate() {
                    *number = stream.normal((block * BLOCK + offset) as u64) * deviation;
                }
            }),
        }
        if self.tensor.device() != Device::Cpu {
            assign(&self.tensor, &host);
        }
    }

    fn on(self, device: Device) -> Self {
        Self { tensor: self.tensor.detach().to_device(device).set_requires_grad(true), ..self }
    }
}

/// A model with its parameters.
pub struct Model {
    device: Device,
    parameters: Vec<Parameter>,
    family: Family,
    sizes: ModelSizes,
    sequence_length: u32,
}

enum Family {
    Llama(Arc<llama::Llama>),
    Mlp(mlp::Mlp),
}

/// The sizes that a job asks for.
pub fn sizes(worker: &WorkerSpec) -> Result<ModelSizes, TrainError> {
    if let ModelSpec::Sizes(sizes) = &worker.model
        && let Some((field, why)) = sizes.faults().first()
    {
        return Err(TrainError::Config(format!("model.{field} {why}")));
    }
    ModelSizes::of(&worker.model).ok_or_else(|| {
        let name = if let ModelSpec::Preset(name) = &worker.model { name } else { "" };
        TrainError::Config(format!("model `{name}` is not known; there are {}", MODEL_PRESETS.join(", ")))
    })
}

impl Model {
    /// As the job says, on a device; its parameters are zero.
    pub fn new(worker: &WorkerSpec, device: Device) -> Result<Self, TrainError> {
        let sizes = sizes(worker)?;
        let (family, parameters) = match &sizes {
            ModelSizes::Llama(own) => {
                let llama = llama::Llama::new(own, worker, device);
                let parameters = llama.parameters();
                (Family::Llama(llama.into()), parameters)
            }
            ModelSizes::Mlp(own) => {
                let mlp = mlp::Mlp::new(own, worker.dropout);
                let parameters = mlp.parameters();
                (Family::Mlp(mlp), parameters)
            }
        };
        let parameters = parameters.into_iter().map(|parameter| parameter.on(device)).collect();
        Ok(Self { device, parameters, family, sizes, sequence_length: worker.sequence_length })
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

    /// Where its parameters are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Its sizes.
    pub fn sizes(&self) -> &ModelSizes {
        &self.sizes
    }

    /// `llama` or `mlp`.
    pub fn family(&self) -> &'static str {
        match self.family {
            Family::Llama(_) => "llama",
            Family::Mlp(_) => "mlp",
        }
    }

    /// All sizes, as the manifest keeps them.
    pub fn config(&self) -> serde_json::Value {
        let vocabulary = everlit_api::model::VOCABULARY;
        match &self.sizes {
            ModelSizes::Llama(own) => serde_json::json!({
                "dim": own.dim, "layers": own.layers, "heads": own.heads, "kv_heads": own.kv_heads, "hidden": own.hidden,
                "vocabulary": vocabulary, "sequence_length": self.sequence_length,
            }),
            ModelSizes::Mlp(own) => serde_json::json!({
                "context": own.context, "embedding": own.embedding, "hidden": own.hidden, "vocabulary": vocabulary,
            }),
        }
    }

    /// Bytes of text in one sample, the last target included.
    pub fn window(&self) -> u64 {
        match &self.sizes {
            ModelSizes::Llama(_) => u64::from(self.sequence_length) + 1,
            ModelSizes::Mlp(own) => own.context + 1,
        }
    }

    /// Mean cross entropy, in nats per predicted byte, of `[samples, window]` bytes.
    pub fn loss(&self, samples: &Tensor, pass: Pass) -> Tensor {
        self.loss_while(samples, pass, &|| Ok(())).expect("nothing ends the pass")
    }

    /// The same, of a pass that ends early with the error of `stands`, which is asked between layers.
    pub fn loss_while(&self, samples: &Tensor, pass: Pass, stands: Stands<'_>) -> Result<Tensor, TrainError> {
        let samples = &samples.to_device(self.device);
        let (logits, targets) = match &self.family {
            Family::Llama(llama) => llama.forward(&self.parameters, samples, pass, stands)?,
            Family::Mlp(mlp) => mlp.forward(&self.parameters, samples, pass),
        };
        Ok(logits.cross_entropy_loss::<Tensor>(&targets, None, tch::Reduction::Mean, -100, 0.0))
    }
}

#[cfg(test)]
mod tests {
    use everlit_api::job::Precision;

    use super::*;

    fn worker(model: &str) -> WorkerSpec {
        WorkerSpec { model: ModelSpec::Preset(model.into()), sequence_length: 16, ..WorkerSpec::for_world(1) }
    }

    fn samples(model: &Model) -> Tensor {
        Tensor::arange(2 * model.window() as i64, (Kind::Int64, Device::Cpu)).view([2, -1])
    }

    fn gradients(model: &Model, pass: Pass) -> (f64, Vec<f32>) {
        let loss = model.loss(&samples(model), pass);
        loss.backward();
        let of = |parameter: &Parameter| Vec::<f32>::try_from(parameter.tensor.grad().flatten(0, -1)).unwrap();
        let all = model.parameters().iter().flat_map(of).collect();
        let tensors: Vec<&Tensor> = model.parameters().iter().map(|parameter| &parameter.tensor).collect();
        crate::torch::c10d::drop_gradients(&tensors).unwrap();
        (loss.double_value(&[]), all)
    }

    #[test]
    fn models_have_the_parameters_that_their_sizes_say_and_a_finite_first_loss() {
        for preset in ["llama-1m", "mlp-10k", "mlp-500k"] {
            let model = Model::new(&worker(preset), Device::Cpu).unwrap();
            let numbers: usize = model.parameters().iter().map(|parameter| parameter.tensor.numel()).sum();
            assert_eq!(numbers as u64, model.sizes().parameters(), "{preset}");
            model.initialize(1);
            let loss = model.loss(&samples(&model), Pass::Evaluate).double_value(&[]);
            assert!((loss - 256_f64.ln()).abs() < 0.5, "{preset} begins at {loss}");
        }
        assert_eq!(Model::new(&worker("gpt-9"), Device::Cpu).err().unwrap().exit_code(), 78);
    }

    #[test]
    fn a_pass_ends_between_two_layers_when_it_has_no_use_any_more() {
        let model = Model::new(&worker("llama-1m"), Device::Cpu).unwrap();
        let asked = std::cell::Cell::new(0);
        let stands = || {
            asked.set(asked.get() + 1);
            if asked.get() == 2 { Err(TrainError::PeerLost("the group was aborted".into())) } else { Ok(()) }
        };
        assert!(matches!(model.loss_while(&samples(&model), Pass::Evaluate, &stands), Err(TrainError::PeerLost(_))));
        assert_eq!(asked.get(), 2);
    }

    #[test]
    fn initial_weights_are_a_function_of_the_seed() {
        let weights = |seed| {
            let model = Model::new(&worker("mlp-10k"), Device::Cpu).unwrap();
            model.initialize(seed);
            model.parameters().iter().flat_map(|p| floats_mut(&p.tensor).to_vec()).collect::<Vec<f32>>()
        };
        assert_eq!(weights(5), weights(5));
        assert_ne!(weights(5), weights(6));
    }

    #[test]
    fn layers_that_are_run_again_give_the_same_bits_dropout_included() {
        let train = Pass::Train(Stream::new(3, "dropout"));
        let run = |activation_checkpointing, dropout, pass| {
            let model = Model::new(&WorkerSpec { activation_checkpointing, dropout, ..worker("llama-1m") }, Device::Cpu).unwrap();
            model.initialize(1);
            gradients(&model, pass)
        };
        let plain = run(false, 0.2, train);
        assert_eq!(plain, run(false, 0.2, train), "a function of the stream");
        assert_eq!(plain, run(true, 0.2, train));
        assert_ne!(plain.0, run(false, 0.2, Pass::Train(Stream::new(4, "dropout"))).0);
        assert_eq!(run(false, 0.2, Pass::Evaluate), run(false, 0.0, train), "nothing is dropped in an evaluation");
    }

    #[test]
    fn bfloat16_is_near_float32_and_its_gradients_are_float32() {
        let run = |precision| {
            let model = Model::new(&WorkerSpec { precision, ..worker("llama-1m") }, Device::Cpu).unwrap();
            model.initialize(1);
            gradients(&model, Pass::Evaluate)
        };
        let (exact, rounded) = (run(Precision::Float32), run(Precision::Bfloat16));
        assert!((exact.0 - rounded.0).abs() < 0.01 && exact.0 != rounded.0, "{} {}", exact.0, rounded.0);
        let norm = |list: &[f32]| list.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let difference: Vec<f32> = exact.1.iter().zip(&rounded.1).map(|(a, b)| a - b).collect();
        assert!(norm(&difference) < 0.03 * norm(&exact.1), "{} of {}", norm(&difference), norm(&exact.1));
    }
}
