//! What must hold on a GPU before a job is trusted to it, tried in one process: NCCL, the reducer, the same bits twice, an aborted group
//! and a new one, and reading state out beside the step.
//!
//! One line each, PASS or FAIL with a figure. With one rank there is no peer: what two ranks do is tried by `scripts/gpu-check.sh`.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use everlit_api::job::{Device as Asked, ModelSpec, Precision, WorkerSpec};
use tch::{Device, Kind, Tensor};

use super::c10d::{self, Backend, Group, Reducer};
use super::device::{self, Pinned, Reader, finish};
use super::environment::Environment;
use super::model::{Model, Pass};
use super::random::Stream;
use super::rendezvous::Rendezvous;
use super::state::State;
use super::tensors::{bytes, on_cpu};
use super::{TrainError, memory, sharing};

const TIMEOUT: Duration = Duration::from_secs(60);
const REDUCED_BYTES: i64 = 64 << 20;
const READ_BYTES: i64 = 512 << 20;
const STEPS: u64 = 20;
const SAMPLES: i64 = 16;

/// Tries everything; `folder` is empty, for the rendezvous. Whether all passed.
pub fn gpu(environment: &Environment, folder: &Path) -> Result<bool, TrainError> {
    let device = device::choose(Asked::Cuda, true, environment)?;
    let about = device::memory()?;
    println!("GPU: {}, {:.1} of {:.1} GiB free", device::name()?, memory::gib(about.free), memory::gib(about.total));
    let connect = |generation: u32| -> Result<Arc<Group>, TrainError> {
        let store = Rendezvous::open(&format!("dir:{}", folder.display()), generation, 0, 1)?;
        Ok(Arc::new(Group::connect(store.into(), "127.0.0.1", Backend::Nccl, TIMEOUT, TIMEOUT)?))
    };
    let mut report = Report { passed: true };
    let first = connect(0)?;
    report.line("NCCL all-reduce, 1 rank", all_reduce(&first, device));
    let plain = train(None, device, Precision::Float32)?;
    let reduced = train(Some(&first), device, Precision::Float32)?;
    let again = train(Some(&first), device, Precision::Float32)?;
    report.line("DDP over NCCL equals the plain loop", same(&plain, &reduced));
    report.line("a repeat has the same bits", same(&reduced, &again));
    let rounded = [train(Some(&first), device, Precision::Bfloat16)?, train(Some(&first), device, Precision::Bfloat16)?];
    report.line("the same in bfloat16", same(&rounded[0], &rounded[1]));
    report.line("an aborted group refuses", abort(&first, device));
    drop(first);
    let begun = Instant::now();
    let second = connect(1)?;
    let renewed = all_reduce(&second, device).map(|_| format!("{:.0} ms to its first sum", begun.elapsed().as_secs_f64() * 1e3));
    report.line("a new generation in the same process", renewed);
    report.line("it trains to the same bits", same(&reduced, &train(Some(&second), device, Precision::Float32)?));
    report.line("state is read out beside the step", read(device));
    Ok(report.passed)
}

struct Report {
    passed: bool,
}

impl Report {
    fn line(&mut self, what: &str, result: Result<String, String>) {
        self.passed &= result.is_ok();
        match result {
            Ok(figure) => println!("PASS {what}: {figure}"),
            Err(why) => println!("FAIL {what}: {why}"),
        }
    }
}

fn all_reduce(group: &Group, device: Device) -> Result<String, String> {
    let tensor = Tensor::ones(REDUCED_BYTES / 4, (Kind::Float, device));
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let begun = Instant::now();
        group.all_reduce(&tensor).map_err(|error| error.to_string())?;
        finish(device);
        group.check().map_err(|error| error.to_string())?;
        best = best.min(begun.elapsed().as_secs_f64());
    }
    let sum = tensor.sum(Kind::Double).double_value(&[]);
    if sum != (REDUCED_BYTES / 4) as f64 {
        return Err(format!("the sum over one rank is {sum}"));
    }
    Ok(format!("{} MiB in {:.2} ms", REDUCED_BYTES >> 20, best * 1e3))
}

/// What a short training run ends with.
struct Run {
    fingerprint: u64,
    loss: f64,
    step: Duration,
}

fn train(group: Option<&Arc<Group>>, device: Device, precision: Precision) -> Result<Run, TrainError> {
    let worker = WorkerSpec { model: ModelSpec::Preset("llama-10m".into()), precision, dropout: 0.1, ..WorkerSpec::for_world(1) };
    let model = Model::new(&worker, device)?;
    model.initialize(1);
    let state = State::new(model, worker.weight_decay)?;
    let sizes: Vec<u64> = state.model.parameters().iter().map(|parameter| parameter.bytes()).collect();
    let reducer = group.map(|group| Reducer::new(group.clone(), &state.trained(), &sharing::buckets(&sizes))).transpose()?;
    let stream = Stream::new(7, "check");
    let (mut loss, mut begun) = (0.0, Instant::now());
    for step in 0..STEPS {
        let own = stream.child(step);
        let text: Vec<i64> = (0..SAMPLES as u64 * state.model.window()).map(|position| (own.bits(position) % 64) as i64).collect();
        if step == STEPS / 2 {
            begun = Instant::now();
        }
        if let Some(reducer) = &reducer {
            reducer.prepare()?;
        }
        let value = state.model.loss(&Tensor::from_slice(&text).view([SAMPLES, -1]), Pass::Train(own));
        value.f_backward()?;
        let norm = c10d::gradient_norm(&state.trained())?;
        group.map_or(Ok(()), |group| group.check())?;
        state.update(step + 1, 1e-3, norm.max(1.0))?;
        loss = value.f_double_value(&[])?;
    }
    finish(device);
    Ok(Run { step: begun.elapsed() / u32::try_from(STEPS / 2).unwrap_or(1), fingerprint: state.fingerprint(), loss })
}

fn same(a: &Run, b: &Run) -> Result<String, String> {
    let text = format!("{:016x} and {:016x}, loss {:.6} and {:.6}", a.fingerprint, b.fingerprint, a.loss, b.loss);
    match a.fingerprint == b.fingerprint && a.loss.is_finite() {
        true => Ok(format!("{text}, {:.1} ms and {:.1} ms a step", a.step.as_secs_f64() * 1e3, b.step.as_secs_f64() * 1e3)),
        false => Err(text),
    }
}

fn abort(group: &Group, device: Device) -> Result<String, String> {
    let begun = Instant::now();
    group.abort().map_err(|error| error.to_string())?;
    let took = begun.elapsed();
    let tensor = Tensor::ones(1024, (Kind::Float, device));
    let refused = group.all_reduce(&tensor).and_then(|()| group.check());
    let why = refused.err().ok_or("a sum over it was not refused")?;
    Ok(format!("after {:.0} ms: {why}", took.as_secs_f64() * 1e3))
}

/// A copy on a stream of its own while the GPU multiplies: the right bytes, and how fast.
fn read(device: Device) -> Result<String, String> {
    let failed = |error: c10d::CollectiveError| error.to_string();
    let source = Tensor::arange(READ_BYTES / 4, (Kind::Float, device));
    let reader = Reader::of(&source).map_err(failed)?.ok_or("not on a GPU")?;
    let mut target = vec![0_u8; READ_BYTES as usize];
    // SAFETY: the buffer outlives it: it is dropped first.
    let pinned = unsafe { Pinned::new(&mut target) };
    let busy = Tensor::ones([4096, 4096], (Kind::Float, device));
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        reader.mark().map_err(failed)?;
        let product = busy.matmul(&busy);
        let begun = Instant::now();
        // SAFETY: the source lives and nothing writes to it.
        unsafe { reader.read(std::iter::once((source.data_ptr() as usize, &mut target[..]))) }.map_err(failed)?;
        best = best.min(begun.elapsed().as_secs_f64());
        drop(product);
    }
    let how = if pinned.is_some() { "pinned" } else { "not pinned" };
    drop(pinned);
    if target != bytes(&on_cpu(&source)) {
        return Err("other bytes than the GPU's".into());
    }
    Ok(format!("{:.1} GB/s, {how}", READ_BYTES as f64 / best / 1e9))
}
