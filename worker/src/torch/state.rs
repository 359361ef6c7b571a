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

    /// A number that tells whether ranks begin with the same bits: the sum of its tensors' own. Not for security.
    pub fn fingerprint(&self) -> u64 {
        self.named().into_iter().map(|(name, tensor)| fingerprint(&name, tensor)).fold(0, u64::wrapping_add)
    }
}

/// A tensor's part of [`State::fingerprint`].
pub fn fingerprint(name: &str, tensor: &Tensor) -> u64 {
    let keys = Stream::new(0, name);
    let step = |sum: u64, word: u64| (sum.rotate_left(5) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let block = |(number, block): (usize, &[u8])| {
        let (words, rest) = block.as_chunks::<8>();
        let (fours, last) = words.as_chunks::<4>();
        // Four sums beside each other: none waits for another one's product.
        let mut sums = [number as u64; 4];
        for four in fours {
            for (sum, word) in sums.iter_mut().zip(four) {
                *sum = step(*sum, u64::from_be_bytes(*word));
            }
        }
        let rest = (!rest.is_empty()).then(|| rest.iter().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte)));
        let last = last.iter().map(|word| u64::from_be_bytes(*word)).chain(rest);
        keys.bits(sums.into_iter().chain(last).fold(0, step))
    };
    bytes(&on_cpu(tensor)).par_chunks(1 << 18).enumerate().map(block).reduce(|| 0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_tells_names_and_numbers_and_their_order_apart() {
        let numbers: Vec<f32> = (0..100_003).map(|n| n as f32).collect();
        let of = |name: &str, numbers: &[f32]| fingerprint(name, &Tensor::from_slice(numbers));
        let plain = of("a", &numbers);
        assert_eq!(plain, of("a", &numbers));
        assert_ne!(plain, of("b", &numbers));
        assert_ne!(plain, of("a", &numbers[..100_002]));
        for (one, other) in [(0, 1), (0, 8), (3, 65_536 + 3), (99_999, 100_002), (100_001, 100_002)] {
            let mut changed = numbers.clone();
            changed.swap(one, other);
            assert_ne!(plain, of("a", &changed), "{one} and {other} swapped");
        }
        let mut changed = numbers;
        changed[100_002] = f32::from_bits(changed[100_002].to_bits() ^ 1);
        assert_ne!(plain, of("a", &changed));
    }
}
