//! A decoder transformer over bytes: RMS norms, rotary positions, grouped-query attention, SwiGLU.
//!
//! Query, key and value share one matrix, and so do the two inner matrices of the feed-forward part: fewer, larger
//! products, which is what a small model on a CPU is short of.

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::{Init, Parameter, VOCABULARY};

const EPSILON: f64 = 1e-5;
const ROPE_BASE: f64 = 10_000.0;
/// Parameters of one layer: attention norm, qkv, attention output, feed-forward norm, gate and up, down.
const PER_LAYER: usize = 6;

#[derive(Debug, Clone, Serialize)]
pub(super) struct Config {
    dim: i64,
    layers: i64,
    heads: i64,
    kv_heads: i64,
    hidden: i64,
    vocabulary: i64,
    /// Bytes of text per sample, without the last target.
    pub(super) sequence_length: u32,
}

impl Config {
    pub(super) fn preset(name: &str, sequence_length: u32) -> Option<Self> {
        let (dim, layers, heads, kv_heads, hidden) = match name {
            "llama-1m" => (128, 4, 4, 2, 448),
            "llama-10m" => (384, 6, 6, 2, 1024),
            "llama-30m" => (512, 10, 8, 4, 1408),
            "llama-124m" => (768, 19, 12, 6, 2048),
            _ => return None,
        };
        Some(Self { dim, layers, heads, kv_heads, hidden, vocabulary: VOCABULARY, sequence_length })
    }

    /// What [`Config::forward`] needs besides the parameters.
    pub(super) fn positions(&self) -> Rotation {
        Rotation::new(i64::from(self.sequence_length), self.head())
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
        let mut list = vec![Parameter::new("embedding.weight", &[self.vocabulary, self.dim], normal)];
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
        list.push(Parameter::new("output.weight", &[self.vocabulary, self.dim], normal));
        list
    }

    pub(super) fn forward(&self, positions: &Rotation, parameters: &[Parameter], samples: &Tensor) -> (Tensor, Tensor) {
        let length = i64::from(self.sequence_length);
        let inputs = samples.narrow(1, 0, length);
        let targets = samples.narrow(1, 1, length).reshape([-1]);
        let (first, rest) = parameters.split_first().expect("the embedding");
        let (layers, last) = rest.split_at(PER_LAYER * self.layers as usize);
        let mut x = Tensor::embedding(&first.tensor, &inputs, -1, false, false);
        for layer in layers.chunks_exact(PER_LAYER) {
            let [attention_norm, qkv, attention_output, feed_norm, gate_up, down] = layer else { unreachable!("chunks of {PER_LAYER}") };
            let mixed = self.attention(&self.norm(&x, attention_norm), qkv, positions);
            x = mixed.linear::<Tensor>(&attention_output.tensor, None) + x;
            let both = self.norm(&x, feed_norm).linear::<Tensor>(&gate_up.tensor, None);
            let (gate, up) = (both.narrow(-1, 0, self.hidden), both.narrow(-1, self.hidden, self.hidden));
            x = (gate.silu() * up).linear::<Tensor>(&down.tensor, None) + x;
        }
        let [norm, output] = last else { unreachable!("norm and output close the list") };
        let logits = self.norm(&x, norm).linear::<Tensor>(&output.tensor, None);
        (logits.view([-1, self.vocabulary]), targets)
    }

    fn norm(&self, x: &Tensor, weight: &Parameter) -> Tensor {
        x.rms_norm(self.dim, Some(&weight.tensor), EPSILON)
    }

    fn attention(&self, x: &Tensor, qkv: &Parameter, positions: &Rotation) -> Tensor {
        let (samples, length, _) = x.size3().expect("samples, positions, features");
        let joined = x.linear::<Tensor>(&qkv.tensor, None);
        let heads = |from: i64, count: i64| {
            joined.narrow(-1, from, count * self.head()).view([samples, length, count, self.head()]).transpose(1, 2)
        };
        let q = positions.turn(&heads(0, self.heads));
        let k = positions.turn(&heads(self.dim, self.kv_heads));
        let v = heads(self.dim + self.kv_dim(), self.kv_heads);
        let mixed = Tensor::scaled_dot_product_attention::<Tensor>(&q, &k, &v, None, 0.0, true, None, self.kv_heads != self.heads);
        mixed.transpose(1, 2).reshape([samples, length, self.dim])
    }
}

/// Rotary position embedding: each pair (i, i + half) of a head's features turned by an angle that grows with the position.
pub(super) struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rotation {
    fn new(length: i64, head: i64) -> Self {
        let half = head / 2;
        let rates = (Tensor::arange(half, (Kind::Double, Device::Cpu)) * (-2.0 * ROPE_BASE.ln() / head as f64)).exp();
        let angles = Tensor::arange(length, (Kind::Double, Device::Cpu)).unsqueeze(1) * rates.unsqueeze(0);
        let twice = Tensor::cat(&[&angles, &angles], 1);
        // The lower half takes minus the upper one's sine.
        let sign = Tensor::cat(&[-Tensor::ones(half, (Kind::Double, Device::Cpu)), Tensor::ones(half, (Kind::Double, Device::Cpu))], 0);
        Self { cos: twice.cos().to_kind(Kind::Float), sin: (twice.sin() * sign).to_kind(Kind::Float) }
    }

    fn turn(&self, heads: &Tensor) -> Tensor {
        let half = heads.size().last().map_or(0, |head| head / 2);
        heads * &self.cos + heads.roll(half, -1) * &self.sin
    }
}
