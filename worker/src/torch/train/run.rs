//! The steps of a training run, from the first to the last save.
//!
//! What all ranks must decide or know together (the loss shown, whether to stop or to save, whose writer is busy or failed, who saw a
//! number that is none) rides in the gradient reduction: a parameter of zeros whose gradient *is* those numbers. So a step has no
//! collective besides the gradients' own, and all ranks see the same answer at the same step.

use std::path::Path;
use std::time::{Duration, Instant};

use everlit_api::job::OnNan;
use everlit_api::manifest::{DataPosition, MANIFEST_FORMAT, Manifest, Phase};
use everlit_api::time::Timestamp;
use everlit_worker::train_config::TrainConfig;
use tch::{Kind, Tensor};

use super::super::c10d::{self, Backend, Reducer};
use super::super::data::Corpus;
use super::super::environment::Environment;
use super::super::heartbeat::Pulse;
use super::super::loader::{Batch, Loader};
use super::super::model::Pass;
use super::super::parts::StepTimes;
use super::super::random::Stream;
use super::super::ranks::Ranks;
use super::super::rendezvous::Meeting;
use super::super::save::{Saver, write};
use super::super::state::State;
use super::super::tensors::{bytes, on_cpu};
use super::super::{TrainError, signals};
use super::evaluate::Evaluation;
use super::figures::Figures;
use super::interval::Clock;
use super::schedule::Schedule;
use super::{Position, backend, describe, say, self_test};

/// Numbers that ride in the reduction.
pub(super) const CONTROL: i64 = 10;
const PRINT_INTERVAL: Duration = Duration::from_millis(500);
/// Between two looks at whether all ranks have written.
const SETTLE_POLL: Duration = Duration::from_millis(2);

/// What is trained on, as manifests say it.
pub(super) struct Data {
    /// Names, lengths, and what is held out.
    pub listing_sha256: String,
    windows: u64,
}

impl Data {
    pub(super) fn of(corpus: &Corpus) -> Self {
        Self { listing_sha256: corpus.listing_sha256().into(), windows: corpus.windows() }
    }
}

/// What every rank knows after the backward pass.
#[derive(Debug, Clone, Copy)]
struct Heard {
    /// Mean over the batch.
    loss: f64,
    stop: bool,
    save: bool,
    /// Some rank's writer is at work.
    busy: bool,
    /// Some rank could not save.
    failed: bool,
    /// Ranks whose own loss is not finite, and the sum of their numbers.
    bad: (u32, u32),
    /// Seconds that ranks waited for data, on average.
    data_wait: f64,
    /// Seconds that the last snapshot held ranks up, on average.
    stall: f64,
    /// Some rank knows of the next membership.
    called: bool,
}

/// One rank's training. Fields drop in this order: the saver reads the state until it is gone.
pub(super) struct Trainer<'a> {
    pub(super) saver: Option<Saver>,
    pub(super) reducer: Option<Reducer>,
    /// Zeros; its gradient carries [`Heard`].
    pub(super) control: Tensor,
    pub(super) figures: Figures,
    pub(super) clock: Clock,
    pub(super) schedule: Schedule,
    pub(super) ranks: Ranks,
    pub(super) config: &'a TrainConfig,
    pub(super) environment: Environment,
    /// The membership that it is in.
    pub(super) generation: u32,
    /// Somebody says who is in the next membership when this one breaks.
    pub(super) can_rejoin: bool,
    /// Where that is said.
    pub(super) meeting: Option<Meeting>,
    pub(super) pulse: Pulse,
    pub(super) attempt: u32,
    /// Samples of one update over all ranks.
    pub(super) batch: u64,
    pub(super) data: Data,
    pub(super) loader: Loader,
    /// The samples of an update that is not done yet.
    pub(super) held: Option<Batch>,
    /// Loader and saver are those of this rank's place.
    pub(super) dealt: bool,
    pub(super) evaluation: Option<Evaluation>,
    pub(super) position: Position,
    /// All ranks have just come together with a state that is on no disk.
    pub(super) entered: bool,
    pub(super) gradient_out: Option<&'a Path>,
    /// Saves of this rank that were seen to have worked.
    pub(super) saves: u64,
    /// Updates left out because a number was not finite.
    pub(super) skipped: u64,
    pub(super) state: State,
}

impl Trainer<'_> {
    pub(super) fn train(mut self) -> Result<(), TrainError> {
        self.pulse.phase(Phase::Train);
        let mut tested = !self.can_rejoin || (self.ranks.group.is_none() && !self.environment.elastic);
        loop {
            match self.run(&mut tested) {
                Err(error @ TrainError::PeerLost(_)) => self.rejoin(error)?,
                Ok(()) => break,
                other => return other,
            }
        }
        let (rank, step) = (self.environment.rank, self.position.step);
        say(&format!("rank {rank}: done after step {step} and {} samples", self.position.samples));
        Ok(())
    }

    /// What follows an update, for one after which the ranks have come together anew: some of it may have been done before.
    fn catch_up(&mut self) -> Result<(), TrainError> {
        let last = self.position.step == self.config.worker.steps;
        let busy = self.saver.as_ref().is_some_and(Saver::is_busy);
        self.copy_state(busy)?;
        if last {
            self.settle()?;
            self.pulse.step(self.position.step, self.position.samples, None, 0.0);
        }
        if self.position.step > 0 { self.evaluate(last) } else { Ok(()) }
    }

    /// Steps until the last one is saved. `tested`: whether this process was tried for going on in place.
    fn run(&mut self, tested: &mut bool) -> Result<(), TrainError> {
        let total = self.config.worker.steps;
        let mut stall = Duration::ZERO;
        let mut printed = Instant::now();
        if std::mem::take(&mut self.entered) {
            self.catch_up()?;
        }
        while self.position.step < total {
            let rate = self.schedule.rate(self.position.step);
            let heard = self.step(rate, &mut stall)?;
            self.position.step += 1;
            self.position.samples += self.batch;
            let last = self.position.step == total;
            self.tell(&heard, rate);
            if !std::mem::replace(tested, true) {
                self.try_in_place();
            }
            if self.environment.rank == 0 && (last || heard.stop || printed.elapsed() >= PRINT_INTERVAL) {
                let speed = self.figures.samples_per_second();
                say(&format!("step={} loss={:.4} samples/s={speed:.0} lr={rate:.3e}", self.position.step, heard.loss));
                printed = Instant::now();
            }
            self.save(&heard, last)?;
            if heard.stop && !last {
                let kept = if self.saver.is_some() { "saved" } else { "not saved: no checkpoint folder" };
                return Err(TrainError::Terminated(format!("told to end: stopped after step {}, {kept}", self.position.step)));
            }
            self.evaluate(last)?;
            if heard.called && !last {
                return Err(TrainError::PeerLost("the ranks of this job become others".into()));
            }
        }
        Ok(())
    }

    /// Finds out, beside training, whether this process can go on with others in place of lost ranks.
    fn try_in_place(&self) {
        if backend(self.state.model.device(), &self.environment) != Backend::Gloo {
            return;
        }
        let (environment, pulse) = (self.environment.clone(), self.pulse.handle());
        let test = move || self_test::tell(&environment, &pulse);
        if let Err(error) = std::thread::Builder::new().name("self-test".into()).spawn(test) {
            eprintln!("rank {}: no thread for a test of going on in place: {error}", self.environment.rank);
        }
    }

    /// One update of this rank's weights with the gradient of the whole batch.
    fn step(&mut self, rate: f64, stall: &mut Duration) -> Result<Heard, TrainError> {
        let (batch, wait) = match self.held.take() {
            Some(batch) => (batch, Duration::ZERO),
            None => self.loader.next()?,
        };
        let told = self.flags(wait, *stall);
        let mut times = StepTimes { data: wait, ..StepTimes::default() };
        let (heard, norm) = match self.reduce(&batch, told, &mut times) {
            Ok(reduced) => reduced,
            Err(error) => {
                // Should the ranks go on with others, these samples come again: their update was not made.
                self.held = Some(batch);
                return Err(error);
            }
        };
        if self.gradient_out.is_some() {
            self.write_gradient()?;
        }
        // From here on the state changes.
        if let Some(saver) = &mut self.saver {
            *stall = saver.wait_copied();
        }
        let begun = Instant::now();
        if heard.loss.is_finite() && norm.is_finite() {
            let most = self.config.worker.max_grad_norm;
            let scale = if most > 0.0 && norm > most { norm / most } else { 1.0 };
            self.state.update(self.position.step + 1, rate, scale)?;
        } else {
            self.on_nan(&heard, norm)?;
        }
        times.update += begun.elapsed();
        self.pulse.spent(times);
        self.pulse.metric("grad_norm", norm);
        Ok(heard)
    }

    /// Everything before the state changes: the gradient of the whole batch, its norm, and what was heard.
    fn reduce(&self, batch: &Batch, told: [f32; 7], times: &mut StepTimes) -> Result<(Heard, f64), TrainError> {
        let begun = Instant::now();
        let heard = self.backward(batch, told)?;
        let passes = begun.elapsed();
        let begun = Instant::now();
        let norm = c10d::gradient_norm(&self.state.trained())?;
        self.ranks.check()?;
        times.update = begun.elapsed();
        times.exchange = self.reducer.as_ref().map_or(Ok(Duration::ZERO), |reducer| reducer.waited(passes))?;
        times.compute = passes - times.exchange;
        Ok((heard, norm))
    }

    /// What this rank says to all.
    fn flags(&self, wait: Duration, stall: Duration) -> [f32; 7] {
        let rank_zero = self.environment.rank == 0;
        let yes = |truth: bool| f32::from(u8::from(truth));
        let saver = self.saver.as_ref();
        [
            yes(signals::terminate_requested()),
            yes(signals::save_requested() || (rank_zero && self.clock.is_due())),
            yes(saver.is_some_and(Saver::is_busy)),
            yes(saver.is_some_and(Saver::has_failed)),
            wait.as_secs_f32(),
            stall.as_secs_f32(),
            yes(self.is_called()),
        ]
    }

    /// Forward and backward over this rank's samples; the gradients are then the mean over the whole batch, on every rank.
    fn backward(&self, batch: &Batch, told: [f32; 7]) -> Result<Heard, TrainError> {
        let (rank, world) = (self.environment.rank, f64::from(self.environment.world));
        let stream = Stream::new(self.config.worker.seed, "dropout").child(self.position.step).child(rank.into());
        let mut sum = Tensor::zeros(1, (Kind::Float, self.state.model.device()));
        for (index, samples) in batch.iter().enumerate() {
            let last = index + 1 == batch.len();
            if last && let Some(reducer) = &self.reducer {
                reducer.prepare()?;
            }
            // Without the others this step can not end: nothing more is computed for it.
            let stands = || self.ranks.check();
            let loss = self.state.model.loss_while(samples, Pass::Train(stream.child(index as u64)), &stands)?;
            // The reduction takes the mean over ranks: weighted so, it is the mean over samples, however they are dealt.
            let weighted = loss * (samples.size()[0] as f64 * world / self.batch as f64);
            sum += weighted.detach();
            if last && self.reducer.is_some() {
                (weighted + (&self.control * self.news(&sum, told)?).f_sum(Kind::Float)?).f_backward()?;
            } else {
                weighted.f_backward()?;
            }
        }
        let mut heard = [0.0_f32; CONTROL as usize];
        if self.reducer.is_some() {
            self.control.grad().f_copy_data(&mut heard, CONTROL as usize)?;
            c10d::drop_gradients(&[&self.control])?;
        } else {
            self.news(&sum, told)?.f_copy_data(&mut heard, CONTROL as usize)?;
        }
        Ok(Heard::new(&heard, world))
    }

    /// All that this rank says, as one tensor beside the loss: that is not waited for.
    fn news(&self, loss: &Tensor, told: [f32; 7]) -> Result<Tensor, TrainError> {
        let bad = loss.isfinite().logical_not().to_kind(Kind::Float);
        let told = Tensor::f_from_slice(&told)?.to_device(loss.device());
        Ok(Tensor::f_cat(&[loss, &bad, &(&bad * f64::from(self.environment.rank)), &told], 0)?)
    }

    /// A number is not finite: the update is left out, or the job ends. All ranks come here together.
    fn on_nan(&mut self, heard: &Heard, norm: f64) -> Result<(), TrainError> {
        let what = if heard.loss.is_finite() { format!("the gradient's norm is {norm}") } else { format!("the loss is {}", heard.loss) };
        let place = match heard.bad {
            (1, rank) => format!(" on rank {rank}"),
            (0, _) => String::new(),
            (many, _) => format!(" on {many} ranks"),
        };
        let step = self.position.step + 1;
        if self.config.worker.on_nan == OnNan::Stop {
            return Err(TrainError::Config(format!(
                "{what} at step {step}{place}: lower learning_rate, look at the data, or set on_nan to \"skip\""
            )));
        }
        c10d::drop_gradients(&self.state.trained())?;
        self.skipped += 1;
        self.pulse.metric("skipped_steps", self.skipped as f64);
        if self.environment.rank == 0 {
            say(&format!("{what} at step {step}{place}: this update is left out ({} so far)", self.skipped));
        }
        Ok(())
    }

    fn tell(&mut self, heard: &Heard, rate: f64) {
        let (step, samples) = (self.position.step, self.position.samples);
        self.pulse.step(step, samples, heard.loss.is_finite().then_some(heard.loss), rate);
        if heard.stall > 0.0 {
            self.pulse.metric("save_stall_seconds", heard.stall);
        }
        if let Some(interval) = self.clock.interval() {
            self.pulse.metric("checkpoint_interval_seconds", interval.as_secs_f64());
        }
        self.figures.on_step(self.batch, heard.data_wait, &self.pulse);
    }

    /// Begins a save when one is due, and follows those under way.
    fn save(&mut self, heard: &Heard, last: bool) -> Result<(), TrainError> {
        let every = self.config.checkpoint.every_steps;
        let step = self.position.step;
        let due = (every > 0 && step.is_multiple_of(every)) || last || heard.stop || heard.save;
        if due {
            signals::save_done();
        }
        let Some(saver) = &mut self.saver else { return Ok(()) };
        if heard.failed {
            give_up(saver, &self.pulse, self.environment.rank)?;
        }
        let costs = saver.costs();
        if costs.saves > self.saves {
            self.saves = costs.saves;
            self.pulse.metric("save_write_seconds", costs.write.as_secs_f64());
            self.clock.learn(costs.processor + Duration::from_secs_f64(heard.stall.max(0.0)));
            self.pulse.saved(costs.write);
        }
        if due {
            self.begin_save(heard.busy)?;
        } else if !heard.busy
            && let Some(saver) = &mut self.saver
        {
            saver.persist_newest();
        }
        if last || heard.stop { self.settle() } else { Ok(()) }
    }

    fn begin_save(&mut self, any_busy: bool) -> Result<(), TrainError> {
        self.copy_state(any_busy)?;
        if let Some(saver) = self.saver.as_mut().filter(|_| !any_busy) {
            saver.persist_newest();
        }
        self.clock.restart();
        Ok(())
    }

    /// Begins to copy the state as it is, unless that was done.
    fn copy_state(&mut self, any_busy: bool) -> Result<(), TrainError> {
        let manifest = self.manifest();
        let Some(saver) = &mut self.saver else { return Ok(()) };
        if saver.newest_step() != Some(manifest.step) {
            saver.snapshot(manifest, any_busy)?;
        }
        Ok(())
    }

    /// Waits until the newest snapshot of every rank is committed. Here a failure counts: nothing can make up for it later.
    fn settle(&mut self) -> Result<(), TrainError> {
        self.pulse.phase(Phase::Checkpoint);
        let step = self.position.step;
        let Some(saver) = &mut self.saver else { return Ok(()) };
        let mut told = false;
        loop {
            let yes = |truth: bool| f64::from(u8::from(truth));
            let sums = self.ranks.sum(&[yes(saver.is_busy()), yes(saver.has_failed())])?;
            if sums[1] > 0.0 {
                let own = saver.give_up();
                let why = own.as_ref().map_or("another rank could not".to_string(), |failure| failure.reason.clone());
                // An older save may fail: this one is still to come.
                if told || own.is_some_and(|failure| failure.fenced) {
                    return Err(TrainError::Failed(format!("checkpoint of step {step}: {why}")));
                }
                eprintln!("rank {}: an older checkpoint was not saved: {why}", self.environment.rank);
            } else if sums[0] == 0.0 {
                if told {
                    return Ok(());
                }
                saver.persist_newest();
                told = true;
            }
            std::thread::sleep(SETTLE_POLL);
        }
    }

    fn evaluate(&mut self, last: bool) -> Result<(), TrainError> {
        let every = self.config.worker.evaluation.every_steps;
        let Some(evaluation) = &mut self.evaluation else { return Ok(()) };
        if !(last || self.position.step.is_multiple_of(every)) {
            return Ok(());
        }
        let loss = evaluation.run(&self.state.model, &self.environment, &self.ranks, &self.pulse)?;
        self.pulse.metric("evaluation_loss", loss);
        self.pulse.phase(Phase::Train);
        self.figures.restart();
        if self.environment.rank == 0 {
            say(&format!("step={} evaluation_loss={loss:.4}", self.position.step));
        }
        Ok(())
    }

    fn manifest(&self) -> Manifest {
        let samples = self.position.samples;
        Manifest {
            format: MANIFEST_FORMAT,
            job_id: self.environment.job_id.clone(),
            attempt: self.attempt,
            generation: self.generation,
            step: self.position.step,
            epoch: samples / self.data.windows,
            world_size: self.environment.world,
            global_batch: self.batch,
            samples,
            seed: self.config.worker.seed,
            data: DataPosition { listing_sha256: self.data.listing_sha256.clone(), cursor: samples % self.data.windows },
            model: Some(describe(&self.state.model)),
            created_at: Timestamp::now(),
            files: Vec::new(),
            manifest_sha256: None,
        }
    }

    /// The first reduced gradient as safetensors: what two runs are compared by.
    fn write_gradient(&mut self) -> Result<(), TrainError> {
        let Some(path) = self.gradient_out.take().filter(|_| self.environment.rank == 0) else { return Ok(()) };
        let mut header = serde_json::Map::new();
        let mut content = Vec::new();
        for parameter in self.state.model.parameters() {
            let gradient = on_cpu(&parameter.tensor.grad());
            let from = content.len();
            content.extend_from_slice(bytes(&gradient));
            let place = serde_json::json!({"dtype": "F32", "shape": gradient.size(), "data_offsets": [from, content.len()]});
            header.insert(parameter.name.clone(), place);
        }
        let mut text = serde_json::to_vec(&header).map_err(TrainError::failed)?;
        text.resize(text.len().next_multiple_of(8), b' ');
        let file = [&(text.len() as u64).to_le_bytes()[..], &text, &content].concat();
        let failed = |error: std::io::Error| TrainError::Failed(format!("could not write `{}`: {error}", path.display()));
        write::write_durably(path, &file).map(drop).map_err(failed)
    }
}

impl Heard {
    /// From means over `world` ranks, in the order of `Trainer::news`.
    fn new(means: &[f32; CONTROL as usize], world: f64) -> Self {
        let [loss, bad, bad_ranks, stop, save, busy, failed, data_wait, stall, called] = *means;
        let count = |mean: f32| (f64::from(mean) * world).round() as u32;
        Self {
            loss: loss.into(),
            stop: stop > 0.0,
            save: save > 0.0,
            busy: busy > 0.0,
            failed: failed > 0.0,
            bad: (count(bad), count(bad_ranks)),
            data_wait: data_wait.into(),
            stall: stall.into(),
            called: called > 0.0,
        }
    }
}

/// Some rank could not save, and all know: the save is given up and training goes on. A fenced rank ends: nothing that it does counts.
fn give_up(saver: &Saver, pulse: &Pulse, rank: u32) -> Result<(), TrainError> {
    let Some(failure) = saver.give_up() else { return Ok(()) };
    let text = format!("checkpoint of step {}: {}", failure.step, failure.reason);
    if failure.fenced {
        return Err(TrainError::Failed(text));
    }
    eprintln!("rank {rank}: {text}; going on");
    pulse.save_failed(failure.step, &failure.reason);
    Ok(())
}
