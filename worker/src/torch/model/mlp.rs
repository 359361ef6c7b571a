//! A small classifier: the next byte from the previous eight.
//!
//! Its steps are so cheap that everything around a step shows: it is the model for measuring the coordinator. The
//! job's `sequence_length`, `precision` and `activation_checkpointing` do not change it.

use everlit_api::model::{MlpSizes, VOCABULARY};
use tch::Tensor;

use super::{Init, Parameter, Pass};

pub(super) struct Mlp {
    context: i64,
    embedding: i64,
    hidden: i64,
    dropout: f64,
}

impl Mlp {
    pub(super) fn new(sizes: &MlpSizes, dropout: f64) -> Self {
        let signed = |size: u64| i64::try_from(size).unwrap_or(i64::MAX);
        Self { context: signed(sizes.context), embedding: signed(sizes.embedding), hidden: signed(sizes.hidden), dropout }
    }

    pub(super) fn parameters(&self) -> Vec<Parameter> {
        let vocabulary = VOCABULARY as i64;
        let input = self.context * self.embedding;
        let spread = |inputs: i64| Init::Normal((1.0 / inputs as f32).sqrt());
        vec![
            Parameter::new("embedding.weight", &[vocabulary, self.embedding], Init::Normal(1.0)),
            Parameter::new("hidden.weight", &[self.hidden, input], spread(input)),
            Parameter::new("hidden.bias", &[self.hidden], Init::Constant(0.0)),
            Parameter::new("output.weight", &[vocabulary, self.hidden], Init::Normal(0.02)),
            Parameter::new("output.bias", &[vocabulary], Init::Constant(0.0)),
        ]
    }

    pub(super) fn forward(&self, parameters: &[Parameter], samples: &Tensor, pass: Pass) -> (Tensor, Tensor) {
        let [embedding, hidden, hidden_bias, output, output_bias] = parameters else {
            unreachable!("the parameters are those of `Mlp::parameters`")
        };
        let inputs = samples.narrow(1, 0, self.context);
        let targets = samples.select(1, self.context);
        let embedded = Tensor::embedding(&embedding.tensor, &inputs, -1, false, false).view([-1, self.context * self.embedding]);
        let mut active = embedded.linear(&hidden.tensor, Some(&hidden_bias.tensor)).silu();
        if self.dropout > 0.0 && pass.is_training() {
            pass.seed_layer(0);
            active = active.dropout(self.dropout, true);
        }
        (active.linear(&output.tensor, Some(&output_bias.tensor)), targets)
    }
}
