//! Reads ahead, so that a step never waits for data: a thread that makes the next updates' batches while this one is computed.
//!
//! Which samples come when is a function of the position alone; the thread only runs ahead of it, by a few batches.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tch::Tensor;

use super::TrainError;
use super::data::{Corpus, own_samples};

/// Batches made ahead.
const AHEAD: usize = 2;

/// What decides a rank's batches.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// The job's first sample to read.
    pub from: u64,
    /// Samples of one update, over all ranks.
    pub batch: u64,
    /// Samples of one forward pass at most.
    pub micro: u64,
    /// This rank.
    pub rank: u32,
    /// All of them.
    pub world: u32,
    /// Updates to read for.
    pub steps: u64,
}

/// This rank's samples of one update, in pieces of `[samples, window]`.
pub type Batch = Vec<Tensor>;

/// The reading thread's other end.
pub struct Loader {
    batches: Receiver<Result<Batch, TrainError>>,
}

impl Loader {
    /// Begins to read. The thread ends with the loader.
    pub fn start(mut corpus: Corpus, plan: Plan) -> Result<Self, TrainError> {
        let (sender, batches) = sync_channel(AHEAD);
        let thread = std::thread::Builder::new().name("loader".into()).spawn(move || run(&mut corpus, plan, &sender));
        thread.map_err(|error| TrainError::Failed(format!("no thread for reading data: {error}")))?;
        Ok(Self { batches })
    }

    /// The next update's samples, and how long they were waited for.
    pub fn next(&self) -> Result<(Batch, Duration), TrainError> {
        let begun = Instant::now();
        let batch = self.batches.recv().map_err(|_| TrainError::Failed("the thread that reads data ended".into()))??;
        Ok((batch, begun.elapsed()))
    }
}

fn run(corpus: &mut Corpus, plan: Plan, sender: &SyncSender<Result<Batch, TrainError>>) {
    let mut scratch = Vec::new();
    for step in 0..plan.steps {
        let batch = read(corpus, plan, plan.from + step * plan.batch, &mut scratch);
        let failed = batch.is_err();
        if sender.send(batch).is_err() || failed {
            return;
        }
    }
}

fn read(corpus: &mut Corpus, plan: Plan, from: u64, scratch: &mut Vec<u8>) -> Result<Batch, TrainError> {
    let own: Vec<u64> = own_samples(from, plan.batch, plan.rank, plan.world).collect();
    let micro = usize::try_from(plan.micro.max(1)).unwrap_or(usize::MAX);
    own.chunks(micro)
        .map(|numbers| {
            let mut bytes = Vec::new();
            for number in numbers {
                corpus.read(*number, scratch, &mut bytes)?;
            }
            Ok(Tensor::f_from_slice(&bytes)?.f_view([numbers.len() as i64, -1])?)
        })
        .collect()
}
