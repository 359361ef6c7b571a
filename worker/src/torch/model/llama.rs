//! A decoder transformer over bytes: RMS norms, rotary positions, grouped-query attention, SwiGLU.
//!
//! Query, key and value share one matrix, and so do the two inner matrices of the feed-forward part: fewer, larger
//! products, which is what a small model on a CPU is short of. The residual stream stays float32; with bfloat16 only the
//! products and what lies between them are rounded.

use std::sync::Arc;

use everlit_api::job::Precision;
use everlit_api::model::{LlamaSizes, VOCABULARY};
use tch::{Device, Kind, Tensor};

use super::{Init, Parameter, Pass, Stands};
use crate::torch::TrainError;
use crate::torch::c10d::{self, Layers};
use crate::torch::kernels;

const EPSILON: f64 = 1e-5;
const ROPE_BASE: f64 = 10_000.0;
/// Parameters of one layer: attention norm, qkv, attention output, feed-forward norm, gate and up, down.
const PER_LAYER: usize = 6;

/// Sizes, and everything else that decides the numbers of a pass but the weights.
pub(super) struct Llama {
    dim: i64,
    layers: i64,
    heads: i64,
    kv_heads: i64,
    hidden: i64,
    /// Bytes of text per sample, without the last target.
    length: i64,
    precision: Precision,
    /// Our own kernels are for the processor.
    on_cpu: bool,
    recompute: bool,
    dropout: f64,
    rotation: Rotation,
}

// SAFETY: only read after it was made, and libtorch counts references atomically.
unsafe impl Sync for Llama {}

impl Llama {
    pub(super) fn new(sizes: &LlamaSizes, worker: &everlit_api::job::WorkerSpec, device: Device) -> Self {
        let signed = |size: u64| i64::try_from(size).unwrap_or(i64::MAX);
        let length = i64::from(worker.sequence_length);
        let kind = if worker.precision == Precision::Bfloat16 { Kind::BFloat16 } else { Kind::Float };
        Self {
            dim: signed(sizes.dim),
            layers: signed(sizes.layers),
            heads: signed(sizes.heads),
            kv_heads: signed(sizes.kv_heads),
            hidden: signed(sizes.hidden),
            length,
            precision: worker.precision,
            on_cpu: device == Device::Cpu,
            recompute: worker.activation_checkpointing,
            dropout: worker.dropout,
            rotation: Rotation::new(length, signed(sizes.head()), kind, device),
        }
    }

    fn head(&self) -> i64 {
        self.dim / self.heads
    }

    fn kv_dim(&self) -> i64 {
        self.kv_heads * self.head()
    }

    pub(super) fn parameters(&self) -> Vec<Parameter> {
        let ones = Init::Constant(1.0);
        let normal = Init::Normal(0.02);
        // What is added to the residual stream, twice a layer, starts smaller.
        let residual = Init::Normal(0.02 / (2.0 * self.layers as f32).sqrt());
        let mut list = vec![Parameter::new("embedding.weight", &[VOCABULARY as i64, self.dim], normal)];
        for layer in 0..self.layers {
            let name = |part: &str| format!("layers.{layer}.{part}.weight");
            list.push(Parameter::new(name("attention_norm"), &[self.dim], ones));
            list.push(Parameter::new(name("qkv"), &[self.dim + 2 * self.kv_dim(), self.dim], normal));
            list.push(Parameter::new(name("attention_output"), &[self.dim, self.dim], residual));
            list.push(Parameter::new(name("feed_norm"), &[self.dim], ones));
            list.push(Parameter::new(name("gate_up"), &[2 * self.hidden, self.dim], normal));
            list.push(Parameter::new(name("down"), &[self.dim, self.hidden], residual));
        }
        list.push(Parameter::new("norm.weight", &[self.dim], ones));
        list.push(Parameter::new("output.weight", &[VOCABULARY as i64, self.dim], normal));
        list
    }

    pub(super) fn forward(
        self: &Arc<Self>,
        parameters: &[Parameter],
        samples: &Tensor,
        pass: Pass,
        stands: Stands<'_>,
    ) -> Result<(Tensor, Tensor), TrainError> {
        let inputs = samples.narrow(1, 0, self.length);
        let targets = samples.narrow(1, 1, self.length).reshape([-1]);
        let (first, rest) = parameters.split_first().expect("the embedding");
        let (layers, last) = rest.split_at(PER_LAYER * self.layers as usize);
        let own = layers.iter().map(|parameter| parameter.tensor.shallow_clone()).collect();
        let layers = Arc::new(Stack { llama: self.clone(), parameters: own, pass });
        let mut x = Tensor::embedding(&first.tensor, &inputs, -1, false, false);
        for layer in 0..self.layers {
            stands()?;
            x = match self.recompute && pass.is_training() {
                true => sound(c10d::recompute(&layers, layer, &x)),
                false => layers.run(layer, &x),
            };
        }
        let [norm, output] = last else { unreachable!("norm and output close the list") };
        let logits = self.product(&self.norm(&x, &norm.tensor), &output.tensor);
        Ok((logits.view([-1, VOCABULARY as i64]).to_kind(Kind::Float), targets))
    }

    fn norm(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        let normed = match self.on_cpu {
            true => sound(kernels::rms_norm(x, weight, EPSILON)),
            false => x.rms_norm(self.dim, Some(weight), EPSILON),
        };
        if self.precision == Precision::Bfloat16 { normed.to_kind(Kind::BFloat16) } else { normed }
    }

    /// `x` times a matrix, in the precision asked for; `x` has it already.
    fn product(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        match self.precision {
            Precision::Float32 => x.linear(weight, None::<&Tensor>),
            Precision::Bfloat16 => x.linear(&weight.to_kind(Kind::BFloat16), None::<&Tensor>),
        }
    }

    /// What is added to the residual stream, thinned out in training. The generator is seeded before each layer.
    fn thinned(&self, x: Tensor, pass: Pass) -> Tensor {
        if self.dropout > 0.0 && pass.is_training() { x.dropout(self.dropout, true) } else { x }
    }

    fn attention(&self, x: &Tensor, qkv: &Tensor) -> Tensor {
        let (samples, length, _) = x.size3().expect("samples, positions, features");
        let joined = self.product(x, qkv);
        let Rotation { cos, sin } = &self.rotation;
        let [q, k, v] = match self.precision {
            _ if !self.on_cpu => self.split(&joined, samples, length),
            Precision::Float32 if self.head() % 32 == 0 => {
                return sound(kernels::attention(&joined, cos, sin, self.heads, self.kv_heads));
            }
            Precision::Float32 => sound(kernels::heads(&joined, cos, sin, self.heads, self.kv_heads)),
            Precision::Bfloat16 => self.split(&joined, samples, length),
        };
        let mixed = Tensor::scaled_dot_product_attention::<Tensor>(&q, &k, &v, None, 0.0, true, None, self.kv_heads != self.heads);
        mixed.transpose(1, 2).reshape([samples, length, self.dim])
    }

    fn split(&self, joined: &Tensor, samples: i64, length: i64) -> [Tensor; 3] {
        let heads = |from: i64, count: i64| {
            joined.narrow(-1, from, count * self.head()).view([samples, length, count, self.head()]).transpose(1, 2)
        };
        let q = self.rotation.turn(&heads(0, self.heads));
        let k = self.rotation.turn(&heads(self.dim, self.kv_heads));
        [q, k, heads(self.dim + self.kv_dim(), self.kv_heads)]
    }

    fn gated(&self, both: &Tensor) -> Tensor {
        match self.precision {
            Precision::Float32 if self.on_cpu => sound(kernels::swiglu(both)),
            _ => both.narrow(-1, 0, self.hidden).silu() * both.narrow(-1, self.hidden, self.hidden),
        }
    }
}

/// tch's own operations panic on an error, which is caught where a run ends; so do these.
fn sound<T>(result: Result<T, c10d::CollectiveError>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}

/// The layers of one pass; the graph may hold it until its backward pass.
struct Stack {
    llama: Arc<Llama>,
    parameters: Vec<Tensor>,
    pass: Pass,
}

// SAFETY: as for `Llama`. When libtorch runs a layer again on a thread of its own, this one waits for it.
unsafe impl Sync for Stack {}

impl Layers for Stack {
    fn run(&self, layer: i64, x: &Tensor) -> Tensor {
        let own = &self.parameters[PER_LAYER * layer as usize..][..PER_LAYER];
        let [attention_norm, qkv, attention_output, feed_norm, gate_up, down] = own else { unreachable!("a slice of {PER_LAYER}") };
        let llama = &self.llama;
        if llama.dropout > 0.0 {
            self.pass.seed_layer(layer);
        }
        let mixed = llama.attention(&llama.norm(x, attention_norm), qkv);
        let x = llama.thinned(llama.product(&mixed, attention_output), self.pass) + x;
        let both = llama.product(&llama.norm(&x, feed_norm), gate_up);
        llama.thinned(llama.product(&llama.gated(&both), down), self.pass) + x
    }
}

/// Rotary position embedding: each pair (i, i + half) of a head's features turned by an angle that grows with the position.
struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rotation {
    fn new(length: i64, head: i64, kind: Kind, device: Device) -> Self {
        let half = head / 2;
        let rates = (Tensor::arange(half, (Kind::Double, Device::Cpu)) * (-2.0 * ROPE_BASE.ln() / head as f64)).exp();
        let angles = Tensor::arange(length, (Kind::Double, Device::Cpu)).unsqueeze(1) * rates.unsqueeze(0);
        let twice = Tensor::cat(&[&angles, &angles], 1);
        // The lower half takes minus the upper one's sine.
        let sign = Tensor::cat(&[-Tensor::ones(half, (Kind::Double, Device::Cpu)), Tensor::ones(half, (Kind::Double, Device::Cpu))], 0);
        let put = |table: Tensor| table.to_kind(kind).to_device(device);
        Self { cos: put(twice.cos()), sin: put(twice.sin() * sign) }
    }

    fn turn(&self, heads: &Tensor) -> Tensor {
        let half = heads.size().last().map_or(0, |head| head / 2);
        heads * &self.cos + heads.roll(half, -1) * &self.sin
    }
}
