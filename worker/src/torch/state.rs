//! Everything that a checkpoint of the built-in program holds: parameters and both moments of AdamW, by name.
//!
//! The optimizer's step is the manifest's step, and random numbers need no state: there is nothing else to save.

use rayon::prelude::*;
use tch::Tensor;

use super::TrainError;
use super::c10d::AdamW;
use super::model::Model;
use super::random::Stream;
use super::tensors::{bytes, on_cpu};

/// A model in training.
pub struct State {
    /// The trained model.
    pub model: Model,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
    optimizers: Vec<AdamW>,
}

impl State {
    /// With moments of zero; parameters as they are. Matrices decay by `decay`; vectors (norms, biases) do not.
    pub fn new(model: Model, decay: f64) -> Result<Self, TrainError> {
        let zeros = || -> Vec<Tensor> {
            let like = |parameter: &super::model::Parameter| parameter.tensor.zeros_like();
            model.parameters().iter().map(like).collect()
        };
        let (first, second) = (zeros(), zeros());
        let mut optimizers = Vec::new();
        for decayed in [true, false] {
            let chosen: Vec<usize> = (0..first.len()).filter(|&index| (model.parameters()[index].tensor.dim() > 1) == decayed).collect();
            let own: Vec<&Tensor> = chosen.iter().map(|&index| &model.parameters()[index].tensor).collect();
            let m: Vec<&Tensor> = chosen.iter().map(|&index| &first[index]).collect();
            let v: Vec<&Tensor> = chosen.iter().map(|&index| &second[index]).collect();
            optimizers.push(AdamW::new(&own, &m, &v, if decayed { decay } else { 0.0 })?);
        }
        Ok(Self { model, first, second, optimizers })
    }

    /// One update, number `step` from 1, with the gradients at hand divided by `scale`; they are dropped.
    pub fn update(&self, step: u64, rate: f64, scale: f64) -> Result<(), TrainError> {
        for optimizer in &self.optimizers {
            optimizer.step(step, rate, scale)?;
        }
        Ok(())
    }

    /// The trained tensors.
    pub fn trained(&self) -> Vec<&Tensor> {
        self.model.parameters().iter().map(|parameter| &parameter.tensor).collect()
    }

    /// Every tensor of a checkpoint under its name there, in one order.
    pub fn named(&self) -> Vec<(String, &Tensor)> {
        let mut named = Vec::with_capacity(3 * self.first.len());
        for (index, parameter) in self.model.parameters().iter().enumerate() {
            named.push((format!("model.{}", parameter.name), &parameter.tensor));
            named.push((format!("adamw.m.{}", parameter.name), &self.first[index]));
            named.push((format!("adamw.v.{}", parameter.name), &self.second[index]));
        }
        named.sort_by(|a, b| a.0.cmp(&b.0));
        named
    }

    /// A number that tells whether ranks begin with the same bits; not for security.
    pub fn fingerprint(&self) -> u64 {
        let of = |(name, tensor): (String, &Tensor)| {
            let keys = Stream::new(0, &name);
            let block = |(number, block): (usize, &[u8])| {
                let (words, rest) = block.as_chunks::<8>();
                let rest = (!rest.is_empty()).then(|| rest.iter().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte)));
                let words = words.iter().map(|word| u64::from_be_bytes(*word)).chain(rest);
                keys.bits(words.fold(number as u64, |sum, word| (sum.rotate_left(5) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15)))
            };
            bytes(&on_cpu(tensor)).par_chunks(1 << 18).enumerate().map(block).reduce(|| 0, u64::wrapping_add)
        };
        self.named().into_iter().map(of).fold(0, u64::wrapping_add)
    }
}
