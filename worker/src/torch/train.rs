//! The training loop of one rank, from its configuration to its last checkpoint.
//!
//! What all ranks must decide together (the loss shown, whether to stop or to save) rides in the gradient reduction: a
//! parameter of zeros whose gradient *is* those numbers. So a step has no collective besides the gradients' own, and
//! all ranks see the same answer at the same step.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use everlit_api::job::Device;
use everlit_api::manifest::{DataPosition, MANIFEST_FORMAT, Manifest, ModelDescription, Phase};
use everlit_api::time::Timestamp;
use tch::Tensor;

use super::c10d::{self, Group, Reducer};
use super::data::{self, Corpus};
use super::environment::Environment;
use super::heartbeat::Pulse;
use super::model::Model;
use super::rendezvous::Rendezvous;
use super::save::{self, Ranks};
use super::state::State;
use super::{TrainError, sharing, signals};
use everlit_worker::checkpoint;
use everlit_worker::train_config::TrainConfig;

/// All ranks of a gang are started together; one that is not here after this never comes.
const HELLO_TIMEOUT: Duration = Duration::from_secs(60);
/// Loading a large checkpoint may take this long on the slowest rank.
const READY_TIMEOUT: Duration = Duration::from_secs(600);
/// The last resort: whoever watches the ranks is much faster.
const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(1800);
const PRINT_INTERVAL: Duration = Duration::from_millis(500);
const SEQUENCE_LENGTH_MAX: u32 = 65_536;

/// Where the run stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Position {
    step: u64,
    samples: u64,
}

/// What every rank knows after a step.
struct Outcome {
    loss: f64,
    stop: bool,
    save: bool,
}

struct Trainer<'a> {
    config: &'a TrainConfig,
    environment: &'a Environment,
    pulse: &'a Pulse,
    attempt: u32,
    corpus: Corpus,
    state: State,
    ranks: Ranks,
    reducer: Option<Reducer>,
    /// Zeros; its gradient carries weighted loss, stop and save.
    control: Tensor,
    scratch: Vec<u8>,
    batch: Vec<i64>,
}

/// Trains as `config` says. Answers when the last step is done and saved.
pub fn run(config: &TrainConfig, environment: &Environment) -> Result<(), TrainError> {
    prepare_and_train(config, environment).map_err(|error| match error {
        // The group was aborted for it, or fell apart while all ranks were ending.
        TrainError::PeerLost(why) if signals::terminate_requested() => {
            TrainError::Terminated(format!("told to end while a peer was lost ({why}): not saved"))
        }
        other => other,
    })
}

fn prepare_and_train(config: &TrainConfig, environment: &Environment) -> Result<(), TrainError> {
    let worker = &config.worker;
    let pulse = Pulse::start(environment, worker.steps);
    check(config, environment)?;
    c10d::set_threads(environment.threads)?;
    let rendezvous = match &environment.rendezvous {
        Some(address) if environment.world > 1 => {
            Some(Arc::new(Rendezvous::open(address, environment.generation, environment.rank, environment.world)?))
        }
        _ => None,
    };
    pulse.phase(Phase::Load);
    let model = Model::new(&worker.model, worker.sequence_length)?;
    let paths = data::locate(&config.shards, worker.data.as_deref())?;
    let corpus = Corpus::open(&paths, model.window(), worker.seed)?;
    let attempt = own_attempt(environment)?;
    let state = State::new(model)?;
    let (position, resumed) = load_or_initialize(config, environment, &corpus, &state)?;
    announce(config, environment, &state, resumed.as_ref(), position);
    if position.step >= worker.steps {
        pulse.step(position.step, position.samples, None, 0.0);
        say(&format!("rank {}: step {} of {} was done before", environment.rank, position.step, worker.steps));
        return Ok(());
    }
    let mut control = Tensor::zeros(3, tch::kind::FLOAT_CPU);
    control = control.set_requires_grad(true);
    let (group, reducer) = match rendezvous {
        Some(rendezvous) => join(rendezvous, environment, &state, &control, &corpus, position)?,
        None => (None, None),
    };
    if let Some(group) = &group {
        pulse.watch(group.clone());
    }
    let ranks = Ranks { group, rank: environment.rank, world: environment.world };
    let (scratch, batch) = (Vec::new(), Vec::new());
    Trainer { config, environment, pulse: &pulse, attempt, corpus, state, ranks, reducer, control, scratch, batch }.train(position)
}

/// Everything that can be refused before any work.
fn check(config: &TrainConfig, environment: &Environment) -> Result<(), TrainError> {
    let worker = &config.worker;
    let refuse = |why: String| Err(TrainError::Config(why));
    if worker.device == Device::Cuda {
        return refuse("device is cuda, but this build of everlit-worker has no CUDA: use cpu or auto".into());
    }
    if worker.batch_size < u64::from(environment.world) || worker.batch_size > 1 << 24 {
        return refuse(format!(
            "batch_size is {}: it must be from the world size ({}) to {}",
            worker.batch_size,
            environment.world,
            1 << 24
        ));
    }
    if worker.sequence_length == 0 || worker.sequence_length > SEQUENCE_LENGTH_MAX {
        return refuse(format!("sequence_length is {}: it must be from 1 to {SEQUENCE_LENGTH_MAX}", worker.sequence_length));
    }
    if !(worker.learning_rate.is_finite() && worker.learning_rate >= 0.0) {
        return refuse(format!("learning_rate is {}: it must be a number from 0", worker.learning_rate));
    }
    if worker.steps == 0 {
        return refuse("steps is 0: it must be at least 1".into());
    }
    Ok(())
}

/// The fencing token: given by the agent; alone, one more than any before.
fn own_attempt(environment: &Environment) -> Result<u32, TrainError> {
    match (environment.attempt, &environment.checkpoint_dir) {
        (Some(attempt), _) => Ok(attempt),
        (None, None) => Ok(1),
        (None, Some(dir)) => {
            let attempt = checkpoint::fence(dir).map_err(TrainError::failed)?.saturating_add(1);
            checkpoint::raise_fence(dir, attempt).map_err(TrainError::failed)?;
            checkpoint::sweep_drafts(dir, attempt).map_err(TrainError::failed)?;
            Ok(attempt)
        }
    }
}

/// Fills the state from the checkpoint that was given or, alone, the newest good one; else from the seed.
fn load_or_initialize(
    config: &TrainConfig,
    environment: &Environment,
    corpus: &Corpus,
    state: &State,
) -> Result<(Position, Option<PathBuf>), TrainError> {
    let chosen = match (&environment.resume_from, &environment.checkpoint_dir) {
        (Some(Some(path)), _) => {
            let manifest = checkpoint::read_manifest(path);
            let manifest = manifest.map_err(|damage| TrainError::Failed(format!("checkpoint `{}`: {damage}", path.display())))?;
            Some((path.clone(), manifest))
        }
        (None, Some(dir)) if environment.world == 1 => checkpoint::newest_verified(dir).map_err(TrainError::failed)?.checkpoint,
        _ => None,
    };
    let Some((path, manifest)) = chosen else {
        state.model.initialize(config.worker.seed);
        return Ok((Position::default(), None));
    };
    let refuse = |why: &str| Err(TrainError::Config(format!("checkpoint `{}` does not fit: {why}", path.display())));
    let own = describe(&state.model);
    if manifest.model.as_ref() != Some(&own) {
        return refuse(&format!("it is not of model {} with {}", own.family, own.config));
    }
    if manifest.data.listing_sha256 != corpus.listing_sha256() {
        return refuse("the data's files are not those it was trained on (names and lengths)");
    }
    if manifest.seed != config.worker.seed {
        return refuse(&format!("it was trained with seed {}", manifest.seed));
    }
    save::load(&path, &manifest, state)?;
    Ok((Position { step: manifest.step, samples: manifest.samples }, Some(path)))
}

fn describe(model: &Model) -> ModelDescription {
    ModelDescription { family: model.family().into(), config: model.config() }
}

fn announce(config: &TrainConfig, environment: &Environment, state: &State, resumed: Option<&PathBuf>, position: Position) {
    let numbers: usize = state.model.parameters().iter().map(|parameter| parameter.tensor.numel()).sum();
    let from = match resumed {
        Some(path) => format!("resuming at step {} from {}", position.step, path.display()),
        None => "starting from the seed".into(),
    };
    say(&format!(
        "rank {} of {}: {} with {numbers} parameters, {} steps of {} samples, {} threads, {from}",
        environment.rank, environment.world, config.worker.model, config.worker.steps, config.worker.batch_size, environment.threads,
    ));
}

type Joined = (Option<Arc<Group>>, Option<Reducer>);

/// Meets the other ranks, makes sure that all begin with the same bits, and connects.
fn join(
    rendezvous: Arc<Rendezvous>,
    environment: &Environment,
    state: &State,
    control: &Tensor,
    corpus: &Corpus,
    position: Position,
) -> Result<Joined, TrainError> {
    rendezvous.gather("hello", "", HELLO_TIMEOUT)?;
    let own = format!("step {}, data {}, weights {:016x}", position.step, corpus.listing_sha256(), state.fingerprint());
    let all = rendezvous.gather("ready", &own, READY_TIMEOUT)?;
    if let Some((rank, other)) = all.iter().enumerate().find(|(_, other)| **other != own) {
        return Err(TrainError::Failed(format!(
            "the ranks do not begin alike: rank {} has {own}, rank {rank} has {other}",
            environment.rank
        )));
    }
    let group = Arc::new(Group::connect(rendezvous, &environment.gloo_host, HELLO_TIMEOUT, COLLECTIVE_TIMEOUT)?);
    let mut tensors: Vec<&Tensor> = state.model.parameters().iter().map(|parameter| &parameter.tensor).collect();
    let mut sizes: Vec<u64> = state.model.parameters().iter().map(|parameter| parameter.bytes()).collect();
    tensors.push(control);
    sizes.push(control.numel() as u64 * 4);
    let reducer = Reducer::new(group.clone(), &tensors, &sharing::buckets(&sizes))?;
    Ok((Some(group), Some(reducer)))
}

impl Trainer<'_> {
    fn train(mut self, mut position: Position) -> Result<(), TrainError> {
        let total = self.config.worker.steps;
        let every = self.config.checkpoint.every_steps;
        self.pulse.phase(Phase::Train);
        let mut printed = (Instant::now(), position);
        while position.step < total {
            let rate = learning_rate(position.step, total, self.config.worker.learning_rate);
            let outcome = self.step(position, rate)?;
            position.step += 1;
            position.samples += self.config.worker.batch_size;
            let shown = outcome.loss.is_finite().then_some(outcome.loss);
            self.pulse.step(position.step, position.samples, shown, rate);
            let last = position.step == total;
            if self.environment.rank == 0 && (last || outcome.stop || printed.0.elapsed() >= PRINT_INTERVAL) {
                let seconds = printed.0.elapsed().as_secs_f64().max(1e-9);
                let speed = (position.samples - printed.1.samples) as f64 / seconds;
                say(&format!("step={} loss={:.4} samples/s={speed:.0} lr={rate:.3e}", position.step, outcome.loss));
                printed = (Instant::now(), position);
            }
            let due = every > 0 && position.step.is_multiple_of(every);
            if due || last || outcome.stop || outcome.save {
                self.checkpoint(position, last || outcome.stop)?;
            }
            if outcome.stop && !last {
                let kept = if self.environment.checkpoint_dir.is_some() { "saved" } else { "not saved: no checkpoint folder" };
                return Err(TrainError::Terminated(format!("told to end: stopped after step {}, {kept}", position.step)));
            }
        }
        say(&format!("rank {}: done after step {} and {} samples", self.environment.rank, position.step, position.samples));
        Ok(())
    }

    /// One update of this rank's weights with the gradient of the whole batch.
    fn step(&mut self, position: Position, rate: f64) -> Result<Outcome, TrainError> {
        let batch_size = self.config.worker.batch_size;
        let (rank, world) = (self.environment.rank, self.environment.world);
        self.batch.clear();
        let mut own = 0;
        for number in data::own_samples(position.samples, batch_size, rank, world) {
            self.corpus.read(number, &mut self.scratch, &mut self.batch)?;
            own += 1;
        }
        let samples = Tensor::f_from_slice(&self.batch)?.f_view([own, -1])?;
        let flags = [signals::terminate_requested(), signals::save_requested()].map(|flag| f32::from(u8::from(flag)));
        if let Some(reducer) = &self.reducer {
            reducer.prepare()?;
        }
        let loss = self.state.model.loss(&samples);
        let outcome = if self.reducer.is_some() {
            // The reduction takes the mean over ranks: weighted so, it is the mean over samples, however they are dealt.
            let weighted = &loss * (own as f64 * f64::from(world) / batch_size as f64);
            let news = Tensor::f_cat(&[weighted.detach().f_view([1])?, Tensor::f_from_slice(&flags)?], 0)?;
            (weighted + (&self.control * news).f_sum(tch::Kind::Float)?).f_backward()?;
            let mut heard = [0.0_f32; 3];
            self.control.grad().f_copy_data(&mut heard, 3)?;
            c10d::drop_gradients(&[&self.control])?;
            Outcome { loss: heard[0].into(), stop: heard[1] > 0.0, save: heard[2] > 0.0 }
        } else {
            loss.f_backward()?;
            Outcome { loss: loss.f_double_value(&[])?, stop: flags[0] > 0.0, save: flags[1] > 0.0 }
        };
        self.state.update(position.step + 1, rate)?;
        Ok(outcome)
    }

    /// Saves; a failure is fatal only when nothing can make up for it later.
    fn checkpoint(&self, position: Position, must: bool) -> Result<(), TrainError> {
        signals::save_done();
        let Some(dir) = &self.environment.checkpoint_dir else { return Ok(()) };
        self.pulse.phase(Phase::Checkpoint);
        let saved = save::save(dir, &self.state, self.manifest(position), &self.ranks);
        self.pulse.phase(Phase::Train);
        match saved {
            Ok(_) => {}
            Err(TrainError::Failed(why)) if !must && !why.contains("fenced") => {
                eprintln!("rank {}: {why}; going on", self.environment.rank)
            }
            Err(error) => return Err(error),
        }
        // Under an agent, the agent prunes.
        if self.environment.heartbeat_file.is_none()
            && self.environment.rank == 0
            && let Err(error) = checkpoint::prune(dir, self.config.checkpoint.keep)
        {
            eprintln!("could not remove old checkpoints: {error}");
        }
        Ok(())
    }

    fn manifest(&self, position: Position) -> Manifest {
        let (epoch, cursor) = self.corpus.position(position.samples);
        Manifest {
            format: MANIFEST_FORMAT,
            job_id: self.environment.job_id.clone(),
            attempt: self.attempt,
            generation: self.environment.generation,
            step: position.step,
            epoch,
            world_size: self.environment.world,
            global_batch: self.config.worker.batch_size,
            samples: position.samples,
            seed: self.config.worker.seed,
            data: DataPosition { listing_sha256: self.corpus.listing_sha256().into(), cursor },
            model: Some(describe(&self.state.model)),
            created_at: Timestamp::now(),
            files: Vec::new(),
        }
    }
}

/// The rate of update `step` (from 0): a linear rise over the first tenth, at most 100 updates, then half a cosine down
/// to a tenth of the peak.
pub fn learning_rate(step: u64, total: u64, peak: f64) -> f64 {
    let rise = (total / 10).clamp(1, 100);
    if step < rise {
        return peak * (step + 1) as f64 / rise as f64;
    }
    let part = (step - rise) as f64 / (total - rise).max(1) as f64;
    peak * (0.1 + 0.9 * 0.5 * (1.0 + (std::f64::consts::PI * part).cos()))
}

/// A line on stdout. Whoever reads it may be gone: training goes on.
fn say(line: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_then_falls_and_depends_on_the_step_alone() {
        let rates: Vec<f64> = (0..2000).map(|step| learning_rate(step, 2000, 1.0)).collect();
        assert!(rates[0] > 0.0 && rates[99] == 1.0);
        assert!(rates[..100].is_sorted() && rates[100..].is_sorted_by(|a, b| a >= b));
        assert!((rates[1999] - 0.1).abs() < 0.01);
        assert_eq!(learning_rate(0, 1, 0.5), 0.5);
    }
}
