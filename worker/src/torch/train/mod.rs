//! A training run of one rank: everything before the first step. The steps themselves are in `run`.
//!
//! Whatever can be refused is refused here, and all ranks begin with the same bits or not at all.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use everlit_api::job::{BatchSize, WorkerSpec};
use everlit_api::manifest::{Manifest, ModelDescription, Phase};
use tch::{Device, Tensor};

use super::c10d::{self, Backend, Group};
use super::data::{Corpus, Source};
use super::environment::Environment;
use super::heartbeat::Pulse;
use super::loader::{Loader, Plan};
use super::memory::{self, Room};
use super::model::{self, Model, Pass};
use super::random::Stream;
use super::ranks::Ranks;
use super::rendezvous::{Meeting, Rendezvous};
use super::save::{Saver, Settings};
use super::state::State;
use super::{TrainError, device, kernels, load, sharing, signals};
use evaluate::Evaluation;
use everlit_worker::checkpoint;
use everlit_worker::train_config::TrainConfig;
use figures::Figures;
use interval::Clock;
use run::{CONTROL, Data, Trainer};
use schedule::Schedule;

mod evaluate;
mod figures;
mod interval;
mod membership;
mod run;
mod schedule;
mod self_test;

/// All ranks of a gang are started together; one that is not here after this never comes.
const HELLO_TIMEOUT: Duration = Duration::from_secs(60);
/// Loading a large checkpoint may take this long on the slowest rank.
const READY_TIMEOUT: Duration = Duration::from_secs(600);
/// The last resort: whoever watches the ranks is much faster.
const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(1800);
const SEQUENCE_LENGTH_MAX: u32 = 65_536;
/// Samples of one forward pass of an evaluation, unless the job says how many a training pass has.
const EVALUATION_MICRO: u64 = 16;

/// Where the run stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Position {
    step: u64,
    samples: u64,
}

/// Trains as `config` says. Answers when the last step is done and saved. `gradient_out`: where rank 0 writes the first reduced gradient.
pub fn train(config: &TrainConfig, environment: &Environment, gradient_out: Option<&Path>) -> Result<(), TrainError> {
    guard(prepare(config, environment.clone(), gradient_out).and_then(|trainer| trainer.map_or(Ok(()), Trainer::train)))
}

/// The group was aborted for SIGTERM, or fell apart while all ranks were ending: no failure of this rank.
fn guard(result: Result<(), TrainError>) -> Result<(), TrainError> {
    result.map_err(|error| match error {
        TrainError::PeerLost(why) if signals::terminate_requested() => {
            TrainError::Terminated(format!("told to end while a peer was lost ({why}): not saved"))
        }
        other => other,
    })
}

/// Measures a checkpoint on held-out text.
pub fn evaluate(config: &TrainConfig, environment: &Environment) -> Result<(), TrainError> {
    guard(run_evaluation(config, environment))
}

/// What every run begins with.
struct Start {
    /// `None` for a single rank.
    rendezvous: Option<Arc<Rendezvous>>,
    /// On its device.
    model: Model,
    room: Room,
}

/// Refuses what can not work, and makes device and model ready.
fn start(worker: &WorkerSpec, environment: &Environment, pulse: &Pulse) -> Result<Start, TrainError> {
    check(worker, environment)?;
    kernels::keep_memory();
    c10d::set_threads(environment.threads)?;
    let rendezvous = rendezvous(environment)?;
    pulse.phase(Phase::Load);
    let device = device::choose(worker.device, worker.deterministic, environment)?;
    let room = Room::of(&model::sizes(worker)?, worker, environment, device)?;
    room.check()?;
    Ok(Start { rendezvous, model: Model::new(worker, device)?, room })
}

fn run_evaluation(config: &TrainConfig, environment: &Environment) -> Result<(), TrainError> {
    let worker = &config.worker;
    let pulse = Pulse::start(environment, worker.steps);
    let Start { rendezvous, model, .. } = start(worker, environment, &pulse)?;
    let state = State::new(model, 0.0)?;
    let (path, manifest) = chosen(environment)?
        .ok_or_else(|| TrainError::Config("nothing to evaluate: give the checkpoint (resume_from, or --checkpoint-dir)".into()))?;
    fits(&path, &manifest, &state.model, None)?;
    load::load(&path, &manifest, &state)?;
    let micro = worker.micro_batch_size.unwrap_or(EVALUATION_MICRO);
    let source = Source::of(config)?;
    let mut evaluation = Evaluation::open(worker, state.model.window(), &source, micro)?;
    let group =
        rendezvous.map(|rendezvous| meet(rendezvous, environment, state.model.device(), &format!("step {}", manifest.step))).transpose()?;
    let ranks = Ranks { group };
    let loss = evaluation.run(&state.model, environment, &ranks, &pulse)?;
    pulse.metric("evaluation_loss", loss);
    pulse.step(manifest.step, manifest.samples, Some(loss), 0.0);
    if environment.rank == 0 {
        say(&format!("step={} evaluation_loss={loss:.4} samples={}", manifest.step, evaluation.samples()));
    }
    Ok(())
}

/// Says what the run needs and what would fit here, without training.
pub fn dry_run(config: &TrainConfig, environment: &Environment) -> Result<(), TrainError> {
    let worker = &config.worker;
    check(worker, environment)?;
    let sizes = model::sizes(worker)?;
    let device = device::choose(worker.device, worker.deterministic, environment)?;
    let room = Room::of(&sizes, worker, environment, device)?;
    let Room { estimate, .. } = &room;
    let place = if device.is_cuda() { "GPU" } else { "machine" };
    say(&format!("parameters: {}", sizes.parameters()));
    say(&format!("state per rank: {:.2} GiB", memory::gib(estimate.state_bytes)));
    say(&format!("snapshots per rank: {:.2} GiB of shared memory", memory::gib(estimate.snapshot_bytes)));
    say(&format!("one sample of a forward pass: {:.4} GiB", memory::gib(estimate.sample_bytes)));
    if let BatchSize::Samples(batch) = worker.batch_size {
        let own = batch.div_ceil(environment.world.into());
        let once = worker.micro_batch_size.unwrap_or(own).min(own);
        say(&format!("a rank with {once} samples at once: {:.2} GiB", memory::gib(estimate.total(once))));
    }
    if let (Some(fit), Some(memory)) = (room.samples(), room.memory) {
        say(&format!(
            "largest batch that fits: {} samples ({fit} per rank and forward pass, {} ranks, {:.1} GiB free on this {place})",
            fit * u64::from(environment.world),
            environment.world,
            memory::gib(memory.free)
        ));
    }
    say(&format!("arithmetic per sample: {:.3e} operations", sizes.flops_per_sample(worker.sequence_length)));
    room.check()
}

fn rendezvous(environment: &Environment) -> Result<Option<Arc<Rendezvous>>, TrainError> {
    match &environment.rendezvous {
        Some(address) if environment.world > 1 => {
            let (generation, rank, world) = (environment.generation, environment.rank, environment.world);
            Ok(Some(Arc::new(match &environment.server {
                Some(server) => Rendezvous::at(server, "train", address, generation, rank, world)?,
                None => Rendezvous::open(address, generation, rank, world)?,
            })))
        }
        _ => Ok(None),
    }
}

/// Everything up to the first step. `None`: the last step was done before.
fn prepare<'a>(
    config: &'a TrainConfig,
    mut environment: Environment,
    gradient_out: Option<&'a Path>,
) -> Result<Option<Trainer<'a>>, TrainError> {
    let worker = &config.worker;
    let pulse = Pulse::start(&environment, worker.steps);
    let Start { rendezvous, model, room } = start(worker, &environment, &pulse)?;
    let source = Source::of(config)?;
    let corpus = source.open(model.window(), worker.seed, evaluate::held_out(worker, false))?;
    let attempt = own_attempt(&environment)?;
    let state = State::new(model, worker.weight_decay)?;
    let data = Data::of(&corpus);
    let control = Tensor::zeros(CONTROL, (tch::Kind::Float, state.model.device())).set_requires_grad(true);
    if environment.spare {
        warm_up(worker, &environment, &state)?;
        if backend(state.model.device(), &environment) == Backend::Gloo {
            self_test::tell(&environment, &pulse.handle());
        }
        membership::wait_for_place(&mut environment)?;
        pulse.join(&environment, environment.generation);
    }
    let Beginning { group, position, batch, saved } = if environment.generation > 0 {
        join_running(worker, &environment, &state, &data)?
    } else {
        begin(worker, &environment, &state, &corpus, &room, rendezvous)?
    };
    if position.step >= worker.steps && environment.generation == 0 {
        pulse.step(position.step, position.samples, None, 0.0);
        say(&format!("rank {}: step {} of {} was done before", environment.rank, position.step, worker.steps));
        return Ok(None);
    }
    let world = environment.world;
    let micro = worker.micro_batch_size.unwrap_or(batch).min(batch);
    let evaluation = match worker.evaluation.every_steps {
        0 => None,
        _ => Some(Evaluation::open(worker, state.model.window(), &source, micro.min(EVALUATION_MICRO))?),
    };
    let loader = Loader::start(corpus, plan(worker, &environment, position, batch))?;
    let saver = start_saver(config, &environment, attempt, &state)?;
    let meeting = environment.rendezvous.as_deref().filter(|_| environment.supervised).map(Meeting::at).transpose()?;
    let mut trainer = Trainer {
        saver,
        reducer: None,
        control,
        figures: Figures::new(&state.model, worker, world),
        clock: Clock::new(config.checkpoint.every, config.mean_seconds_between_failures),
        schedule: Schedule::of(worker),
        ranks: Ranks { group: None },
        config,
        generation: environment.generation,
        can_rejoin: meeting.is_some(),
        meeting,
        environment,
        pulse,
        attempt,
        batch,
        data,
        loader,
        held: None,
        dealt: true,
        evaluation,
        position,
        entered: false,
        gradient_out,
        saves: 0,
        skipped: 0,
        state,
    };
    if let Some(group) = group {
        trainer.enter(group)?;
    }
    // What all ranks have and no disk has, is saved at once.
    trainer.entered = !saved && trainer.environment.checkpoint_dir.is_some();
    Ok(Some(trainer))
}

/// Where a rank begins.
struct Beginning {
    /// `None` for a single rank.
    group: Option<Arc<Group>>,
    position: Position,
    /// Samples of one update.
    batch: u64,
    /// Its state is on the disk, or comes from the seed.
    saved: bool,
}

/// All ranks begin together: from a checkpoint, a snapshot or the seed.
fn begin(
    worker: &WorkerSpec,
    environment: &Environment,
    state: &State,
    corpus: &Corpus,
    room: &Room,
    rendezvous: Option<Arc<Rendezvous>>,
) -> Result<Beginning, TrainError> {
    let resumed = resume(worker, environment, corpus, state)?;
    let mut position = resumed.as_ref().map_or(Position::default(), |(_, old)| Position { step: old.step, samples: old.samples });
    let mut old_batch = resumed.as_ref().map(|(_, old)| old.global_batch);
    let mut levelled = false;
    if environment.server.is_some() && environment.world > 1 {
        // Each node has checkpoints of its own, or none.
        (position, old_batch, levelled) = membership::level(environment, state, &Data::of(corpus), position, old_batch)?;
    }
    let batch = batch_size(worker, environment, room, old_batch, rendezvous.as_deref())?;
    let from = match &resumed {
        _ if levelled => format!("resuming at step {} with the state of the node that was ahead", position.step),
        Some((path, _)) => format!("resuming at step {} from {}", position.step, path.display()),
        None => "starting from the seed".into(),
    };
    announce(worker, environment, state, batch, &from);
    let from_memory = environment.snapshot_dir.as_deref().zip(resumed.as_ref()).is_some_and(|(dir, (path, _))| path.starts_with(dir));
    let group = match rendezvous.filter(|_| position.step < worker.steps) {
        Some(rendezvous) => {
            let listing = corpus.listing_sha256();
            let own = format!("step {}, data {listing}, batch {batch}, weights {:016x}", position.step, state.fingerprint());
            Some(meet(rendezvous, environment, state.model.device(), &own)?)
        }
        None => None,
    };
    Ok(Beginning { group, position, batch, saved: !from_memory && !levelled })
}

/// The first pass of a process takes several times as long as the next: one on no data, whose gradient is dropped.
fn warm_up(worker: &WorkerSpec, environment: &Environment, state: &State) -> Result<(), TrainError> {
    let own = match worker.batch_size {
        BatchSize::Samples(batch) => batch.div_ceil(environment.world.into()),
        BatchSize::Auto(_) => 1,
    };
    let samples = worker.micro_batch_size.map_or(own, |micro| micro.min(own)).max(1);
    let nothing = Tensor::zeros([samples as i64, state.model.window() as i64], (tch::Kind::Int64, Device::Cpu));
    state.model.loss(&nothing, Pass::Train(Stream::new(0, "warm-up"))).f_backward()?;
    Ok(c10d::drop_gradients(&state.trained())?)
}

/// The others are under way: this rank takes its state from them.
fn join_running(worker: &WorkerSpec, environment: &Environment, state: &State, data: &Data) -> Result<Beginning, TrainError> {
    let met = membership::meet_again(environment, environment.generation, state, data, None)?;
    announce(worker, environment, state, met.batch, &format!("taking over at step {}", met.position.step));
    Ok(Beginning { group: Some(met.group), position: met.position, batch: met.batch, saved: false })
}

/// This rank's part of each batch from here on.
fn plan(worker: &WorkerSpec, environment: &Environment, from: Position, batch: u64) -> Plan {
    let micro = worker.micro_batch_size.unwrap_or(batch).min(batch);
    let (rank, world) = (environment.rank, environment.world);
    Plan { from: from.samples, batch, micro, rank, world, steps: worker.steps - from.step }
}

fn start_saver(config: &TrainConfig, environment: &Environment, attempt: u32, state: &State) -> Result<Option<Saver>, TrainError> {
    let dir = environment.checkpoint_dir.as_deref();
    dir.map(|dir| Saver::start(saver_settings(config, environment, dir, attempt), state)).transpose()
}

fn saver_settings(config: &TrainConfig, environment: &Environment, dir: &Path, attempt: u32) -> Settings {
    let (rank, world) = environment.savers();
    Settings {
        dir: dir.into(),
        snapshots: environment.snapshot_dir.clone(),
        rank,
        world,
        attempt,
        // Under an agent, the agent prunes.
        prune: environment.heartbeat_file.is_none().then_some(config.checkpoint.keep),
    }
}

/// Everything that can be refused before any work.
fn check(worker: &WorkerSpec, environment: &Environment) -> Result<(), TrainError> {
    let refuse = |why: String| Err(TrainError::Config(why));
    if let BatchSize::Samples(batch) = worker.batch_size
        && (batch < u64::from(environment.world) || batch > 1 << 24)
    {
        return refuse(format!("batch_size is {batch}: it must be from the world size ({}) to {}", environment.world, 1 << 24));
    }
    if worker.micro_batch_size == Some(0) {
        return refuse("micro_batch_size is 0: it must be at least 1".into());
    }
    if worker.sequence_length == 0 || worker.sequence_length > SEQUENCE_LENGTH_MAX {
        return refuse(format!("sequence_length is {}: it must be from 1 to {SEQUENCE_LENGTH_MAX}", worker.sequence_length));
    }
    let from_zero = [
        ("learning_rate", worker.learning_rate),
        ("min_learning_rate", worker.min_learning_rate.unwrap_or(0.0)),
        ("weight_decay", worker.weight_decay),
        ("max_grad_norm", worker.max_grad_norm),
    ];
    if let Some((name, value)) = from_zero.into_iter().find(|(_, value)| !(value.is_finite() && *value >= 0.0)) {
        return refuse(format!("{name} is {value}: it must be a number from 0"));
    }
    if !(0.0..1.0).contains(&worker.dropout) {
        return refuse(format!("dropout is {}: it must be from 0 to below 1", worker.dropout));
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

type Found = (PathBuf, Manifest);

/// The checkpoint that was given or, alone, the newest good one.
fn chosen(environment: &Environment) -> Result<Option<Found>, TrainError> {
    match (&environment.resume_from, &environment.checkpoint_dir) {
        (Some(Some(path)), _) => {
            let manifest = checkpoint::read_manifest(path);
            let manifest = manifest.map_err(|damage| TrainError::Failed(format!("checkpoint `{}`: {damage}", path.display())))?;
            Ok(Some((path.clone(), manifest)))
        }
        (None, Some(dir)) if environment.world == 1 => Ok(checkpoint::newest_verified(dir).map_err(TrainError::failed)?.checkpoint),
        _ => Ok(None),
    }
}

/// Fills the state from a checkpoint, or from the seed.
fn resume(worker: &WorkerSpec, environment: &Environment, corpus: &Corpus, state: &State) -> Result<Option<Found>, TrainError> {
    let Some((path, manifest)) = chosen(environment)? else {
        state.model.initialize(worker.seed);
        return Ok(None);
    };
    fits(&path, &manifest, &state.model, Some((corpus, worker.seed)))?;
    load::load(&path, &manifest, state)?;
    Ok(Some((path, manifest)))
}

/// Refuses a checkpoint of another model or, to go on training, of other data or another seed.
fn fits(path: &Path, manifest: &Manifest, model: &Model, training: Option<(&Corpus, u64)>) -> Result<(), TrainError> {
    let refuse = |why: String| Err(TrainError::Config(format!("checkpoint `{}` does not fit: {why}", path.display())));
    let own = describe(model);
    if manifest.model.as_ref() != Some(&own) {
        return refuse(match &manifest.model {
            Some(other) => {
                format!("it is of model {} with {}, not of model {} with {}", other.family, other.config, own.family, own.config)
            }
            None => format!("it is not of model {} with {}", own.family, own.config),
        });
    }
    let Some((corpus, seed)) = training else { return Ok(()) };
    if manifest.data.listing_sha256 != corpus.listing_sha256() {
        return refuse("the data's files are not those it was trained on (names, lengths, and what is held out)".into());
    }
    if manifest.seed != seed {
        return refuse(format!("it was trained with seed {}", manifest.seed));
    }
    Ok(())
}

fn describe(model: &Model) -> ModelDescription {
    ModelDescription { family: model.family().into(), config: model.config() }
}

/// Samples of one update. Chosen by everlit, it stays what it was when the job began.
fn batch_size(
    worker: &WorkerSpec,
    environment: &Environment,
    room: &Room,
    old: Option<u64>,
    rendezvous: Option<&Rendezvous>,
) -> Result<u64, TrainError> {
    match worker.batch_size {
        BatchSize::Samples(batch) => return Ok(batch),
        BatchSize::Auto(_) => {}
    }
    if let Some(old) = old.filter(|old| *old >= u64::from(environment.world)) {
        return Ok(old);
    }
    let own = room.samples().unwrap_or(1).clamp(1, 4096);
    let Some(rendezvous) = rendezvous else { return Ok(own) };
    let all = rendezvous.gather("batch", &own.to_string(), READY_TIMEOUT)?;
    let least = all.iter().filter_map(|text| text.parse::<u64>().ok()).min().unwrap_or(1);
    Ok(least * u64::from(environment.world))
}

fn name(worker: &WorkerSpec) -> String {
    match &worker.model {
        everlit_api::job::ModelSpec::Preset(name) => name.clone(),
        everlit_api::job::ModelSpec::Sizes(_) => "of sizes in full".into(),
    }
}

fn announce(worker: &WorkerSpec, environment: &Environment, state: &State, batch: u64, from: &str) {
    say(&format!(
        "rank {} of {}: model {} with {} parameters, {} steps of {batch} samples, {} threads, {from}",
        environment.rank,
        environment.world,
        name(worker),
        state.model.sizes().parameters(),
        worker.steps,
        environment.threads,
    ));
}

/// What is reduced together, fixed for good: the trained tensors, then `control`.
fn buckets(state: &State, control: &Tensor) -> Vec<Vec<usize>> {
    let mut sizes: Vec<u64> = state.model.parameters().iter().map(|parameter| parameter.bytes()).collect();
    sizes.push(control.numel() as u64 * 4);
    sharing::buckets(&sizes)
}

/// Waits for all ranks to say the same, and connects.
fn meet(rendezvous: Arc<Rendezvous>, environment: &Environment, device: Device, own: &str) -> Result<Arc<Group>, TrainError> {
    let backend = backend(device, environment);
    let own = &format!("{own}, {} over {backend:?}", if device.is_cuda() { "cuda" } else { "cpu" });
    rendezvous.gather("hello", "", HELLO_TIMEOUT)?;
    let all = rendezvous.gather("ready", own, READY_TIMEOUT)?;
    if let Some((rank, other)) = all.iter().enumerate().find(|(_, other)| *other != own) {
        return Err(TrainError::Failed(format!(
            "the ranks do not begin alike: rank {} has {own}, rank {rank} has {other}",
            environment.rank
        )));
    }
    Ok(Arc::new(Group::connect(rendezvous, &environment.gloo_host, backend, HELLO_TIMEOUT, COLLECTIVE_TIMEOUT)?))
}

/// NCCL where each rank has a GPU of its own: it takes no two of them on one.
fn backend(device: Device, environment: &Environment) -> Backend {
    if device.is_cuda() && environment.local_world <= device::count() { Backend::Nccl } else { Backend::Gloo }
}

/// A line on stdout. Whoever reads it may be gone: training goes on.
fn say(line: &str) {
    use std::io::Write;
    // Written at once: a line that waits in a buffer dies with the rank.
    let _ = writeln!(std::io::stdout(), "{line}");
}
