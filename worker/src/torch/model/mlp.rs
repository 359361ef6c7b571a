//! A small classifier: the next byte from the previous eight.
//!
//! Its steps are so cheap that everything around a step shows: it is the model for measuring the coordinator. The
//! job's `sequence_length` does not change it.

use serde::Serialize;
use tch::Tensor;

use super::{Init, Parameter, VOCABULARY};

#[derive(Debug, Clone, Serialize)]
pub(super) struct Config {
    /// Bytes that it looks back.
    pub(super) context: i64,
    embedding: i64,
    hidden: i64,
    vocabulary: i64,
}

impl Config {
    pub(super) fn preset(name: &str) -> Option<Self> {
        let (embedding, hidden) = match name {
            "mlp-10k" => (8, 24),
            "mlp-500k" => (32, 960),
            _ => return None,
        };
        Some(Self { context: 8, embedding, hidden, vocabulary: VOCABULARY })
    }

    pub(super) fn parameters(&self) -> Vec<Parameter> {
        let input = self.context * self.embedding;
        let spread = |inputs: i64| Init::Normal((1.0 / inputs as f32).sqrt());
        vec![
            Parameter::new("embedding.weight", &[self.vocabulary, self.embedding], Init::Normal(1.0)),
            Parameter::new("hidden.weight", &[self.hidden, input], spread(input)),
            Parameter::new("hidden.bias", &[self.hidden], Init::Constant(0.0)),
            Parameter::new("output.weight", &[self.vocabulary, self.hidden], Init::Normal(0.02)),
            Parameter::new("output.bias", &[self.vocabulary], Init::Constant(0.0)),
        ]
    }

    pub(super) fn forward(&self, parameters: &[Parameter], samples: &Tensor) -> (Tensor, Tensor) {
        let [embedding, hidden, hidden_bias, output, output_bias] = parameters else {
            unreachable!("the parameters are those of `Config::parameters`")
        };
        let inputs = samples.narrow(1, 0, self.context);
        let targets = samples.select(1, self.context);
        let embedded = Tensor::embedding(&embedding.tensor, &inputs, -1, false, false).view([-1, self.context * self.embedding]);
        let active = embedded.linear(&hidden.tensor, Some(&hidden_bias.tensor)).silu();
        (active.linear(&output.tensor, Some(&output_bias.tensor)), targets)
    }
}
