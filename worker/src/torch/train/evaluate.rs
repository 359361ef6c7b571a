//! The loss on text that was not trained on: a pass of all ranks over the held-out samples.

use everlit_api::job::WorkerSpec;
use everlit_api::manifest::Phase;
use tch::Tensor;

use super::super::data::{self, Corpus, Source};
use super::super::environment::Environment;
use super::super::heartbeat::Pulse;
use super::super::model::{Model, Pass};
use super::super::ranks::Ranks;
use super::super::{TrainError, signals};

/// Samples of a pass when the job does not say.
const SAMPLES: u64 = 256;

/// Windows to hold out of the training text: none without evaluation, or when it has a text of its own.
pub fn held_out(worker: &WorkerSpec, always: bool) -> u64 {
    let wanted = worker.evaluation.every_steps > 0 || always;
    if wanted && worker.evaluation.data.is_none() { samples(worker) } else { 0 }
}

fn samples(worker: &WorkerSpec) -> u64 {
    if worker.evaluation.samples == 0 { SAMPLES } else { worker.evaluation.samples }
}

/// The text that a pass is over.
pub struct Evaluation {
    corpus: Corpus,
    windows: std::ops::Range<u64>,
    micro: u64,
}

impl Evaluation {
    /// The job's own evaluation text, or the held-out end of `training`.
    pub fn open(worker: &WorkerSpec, window: u64, training: &Source, micro: u64) -> Result<Self, TrainError> {
        let corpus = match &worker.evaluation.data {
            Some(path) => Corpus::open(&data::locate(&[], Some(path))?, window, worker.seed, 0)?,
            None => training.open(window, worker.seed, samples(worker))?,
        };
        let all = corpus.held_out();
        let windows = all.start..all.end.min(all.start + samples(worker));
        Ok(Self { corpus, windows, micro })
    }

    /// Samples of a pass.
    pub fn samples(&self) -> u64 {
        self.windows.end - self.windows.start
    }

    /// The mean loss over all samples. Every rank must ask.
    pub fn run(&mut self, model: &Model, environment: &Environment, ranks: &Ranks, pulse: &Pulse) -> Result<f64, TrainError> {
        pulse.phase(Phase::Evaluate);
        let own: Vec<u64> = self.windows.clone().skip(environment.rank as usize).step_by(environment.world as usize).collect();
        let (mut sum, mut scratch) = (0.0, Vec::new());
        for windows in own.chunks(usize::try_from(self.micro.max(1)).unwrap_or(usize::MAX)) {
            let mut bytes = Vec::new();
            for window in windows {
                self.corpus.read_window(*window, &mut scratch, &mut bytes)?;
            }
            let samples = Tensor::f_from_slice(&bytes)?.f_view([windows.len() as i64, -1])?;
            let loss = tch::no_grad(|| model.loss(&samples, Pass::Evaluate));
            sum += loss.f_double_value(&[])? * windows.len() as f64;
            pulse.alive();
            if ranks.group.is_none() && signals::terminate_requested() {
                return Err(TrainError::Terminated("told to end in an evaluation".into()));
            }
        }
        Ok(ranks.sum(&[sum])?[0] / self.samples().max(1) as f64)
    }
}
