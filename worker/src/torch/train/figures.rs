//! What a run tells of itself besides step and loss: rates, norms, waits. Over all ranks where that means something.

use std::time::{Duration, Instant};

use everlit_api::job::{Precision, WorkerSpec};
use tch::{Device, Kind, Tensor};

use super::super::device::finish;
use super::super::heartbeat::Pulse;
use super::super::model::Model;

/// Rates are over at least this long.
const WINDOW: Duration = Duration::from_millis(500);
/// The speed of this machine is measured after so many steps, when everything is warm.
const PEAK_AFTER_STEPS: u64 = 3;

/// Counts since the last window, and the newest rates.
pub struct Figures {
    tokens_per_sample: f64,
    flops_per_sample: f64,
    precision: Precision,
    device: Device,
    world: f64,
    since: Instant,
    samples: u64,
    steps: u64,
    data_wait: f64,
    steps_in_all: u64,
    peak: Option<f64>,
    samples_per_second: f64,
}

impl Figures {
    /// For the job's model.
    pub fn new(model: &Model, worker: &WorkerSpec, world: u32) -> Self {
        let sizes = model.sizes();
        Self {
            tokens_per_sample: sizes.tokens(worker.sequence_length) as f64,
            flops_per_sample: sizes.flops_per_sample(worker.sequence_length),
            precision: worker.precision,
            device: model.device(),
            world: world.into(),
            since: Instant::now(),
            samples: 0,
            steps: 0,
            data_wait: 0.0,
            steps_in_all: 0,
            peak: None,
            samples_per_second: 0.0,
        }
    }

    /// One update of `samples` is done; the ranks waited `data_wait` seconds for data on average.
    pub fn on_step(&mut self, samples: u64, data_wait: f64, pulse: &Pulse) {
        self.steps_in_all += 1;
        self.steps += 1;
        self.samples += samples;
        self.data_wait += data_wait;
        if self.steps_in_all == PEAK_AFTER_STEPS {
            self.peak = Some(measure_peak(self.precision, self.device));
            return self.restart();
        }
        let seconds = self.since.elapsed();
        if seconds < WINDOW {
            return;
        }
        let seconds = seconds.as_secs_f64();
        self.samples_per_second = self.samples as f64 / seconds;
        pulse.metric("samples_per_second", self.samples_per_second);
        pulse.metric("tokens_per_second", self.samples_per_second * self.tokens_per_sample);
        pulse.metric("data_wait", self.data_wait / seconds);
        if let Some(peak) = self.peak {
            pulse.metric("flop_utilization", self.samples_per_second * self.flops_per_sample / (self.world * peak));
        }
        self.restart();
    }

    /// Samples per second in the newest window, or so far in the first.
    pub fn samples_per_second(&self) -> f64 {
        if self.samples_per_second > 0.0 {
            self.samples_per_second
        } else {
            self.samples as f64 / self.since.elapsed().as_secs_f64().max(1e-9)
        }
    }

    /// Time that was no training (an evaluation, say) is in no rate.
    pub fn restart(&mut self) {
        (self.since, self.samples, self.steps, self.data_wait) = (Instant::now(), 0, 0, 0.0);
    }
}

/// Floating-point operations per second of this rank's threads in a product of matrices that fit in a cache, or of its GPU in one that
/// fills it: the best of a few, since whatever disturbs makes it slower.
fn measure_peak(precision: Precision, device: Device) -> f64 {
    let size = if device.is_cuda() { 4096 } else { 384 };
    let kind = if precision == Precision::Bfloat16 { Kind::BFloat16 } else { Kind::Float };
    tch::no_grad(|| {
        let (a, b) = (Tensor::ones([size, size], (kind, device)), Tensor::ones([size, size], (kind, device)));
        let once = || {
            finish(device);
            let begun = Instant::now();
            let product = a.matmul(&b);
            finish(device);
            let seconds = begun.elapsed().as_secs_f64();
            drop(product);
            seconds
        };
        let best = (0..4).map(|_| once()).fold(f64::INFINITY, f64::min);
        2.0 * (size as f64).powi(3) / best.max(1e-9)
    })
}
