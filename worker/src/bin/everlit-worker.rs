//! `everlit-worker`: the built-in training program. One process is one rank; it runs alone too.
//!
//! Exit codes: 0 done, 1 failed (start again), 2 usage, 77 nothing to check, 78 bad configuration or data (do not), 143 ended by SIGTERM.

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use everlit_api::job::{Auto, BatchSize, CheckpointPolicy, Device, MODEL_PRESETS, ModelSpec, Precision, WorkerSpec};
use everlit_worker::train_config::TrainConfig;
use torch::environment::Environment;
use torch::{EXIT_CONFIG, TrainError, check, device, disk, load, signals, train};

// Not in the library: agent and shim link the library, and would then load libtorch with it.
#[allow(unreachable_pub)]
#[path = "../torch/mod.rs"]
mod torch;

/// The built-in libtorch program of everlit.
#[derive(Parser)]
#[command(name = "everlit-worker", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Train a model; under an agent as one rank of a job, otherwise alone.
    Train(Box<TrainFlags>),
    /// Measure a checkpoint on held-out text; under an agent as one rank of a job, otherwise alone.
    Evaluate(Box<TrainFlags>),
    /// Verify a checkpoint and print the sha256 of its tensors: the same for the same state, however many ranks wrote it.
    Checksum {
        /// A folder step-…
        checkpoint: PathBuf,
    },
    /// Try everything that a GPU is needed for, in one process; one line each. Exit code 77 when there is no GPU to try it on.
    GpuCheck {
        /// A new folder for the rendezvous.
        folder: PathBuf,
    },
    /// Measure how fast a disk takes and gives checkpoints; prints one line of JSON, in megabytes per second.
    Disk {
        /// A folder on that disk.
        folder: PathBuf,
        /// How much to write.
        #[arg(long, default_value_t = 500_000_000, value_parser = clap::value_parser!(u64).range(1..))]
        bytes: u64,
    },
}

#[derive(Args)]
struct TrainFlags {
    /// JSON file with `worker`, `checkpoint` and `shards`; the other flags override it.
    #[arg(long)]
    config: Option<PathBuf>,
    /// A preset (llama-1m without it), or sizes like '{"dim":256,"layers":6,"heads":8,"kv_heads":4,"hidden":704}'.
    #[arg(long, value_parser = model)]
    model: Option<ModelSpec>,
    /// Updates in all.
    #[arg(long)]
    steps: Option<u64>,
    /// Samples per update, over all ranks; or `auto`: as many as fit.
    #[arg(long, value_parser = batch_size)]
    batch_size: Option<BatchSize>,
    /// Samples per forward pass of a rank; more of them are accumulated.
    #[arg(long)]
    micro_batch_size: Option<u64>,
    /// Bytes of text per sample.
    #[arg(long)]
    sequence_length: Option<u32>,
    /// Peak learning rate of AdamW.
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Share of activations dropped in training.
    #[arg(long)]
    dropout: Option<f64>,
    /// What matrices are multiplied in: float32 or bfloat16.
    #[arg(long, value_parser = precision)]
    precision: Option<Precision>,
    /// Where tensors live: auto (a GPU when this build and the machine have one), cpu or cuda.
    #[arg(long, value_parser = device_name)]
    device: Option<Device>,
    /// The same bits on every run; always so on a processor.
    #[arg(long)]
    deterministic: bool,
    /// Compute each layer again in the backward pass: less memory, more time.
    #[arg(long)]
    activation_checkpointing: bool,
    /// Updates between evaluations; 0 for none.
    #[arg(long)]
    evaluation_every: Option<u64>,
    /// Seed of every random number.
    #[arg(long)]
    seed: Option<u64>,
    /// A text file or a folder of *.txt; the sample text without it.
    #[arg(long)]
    data: Option<String>,
    /// Where checkpoints go, and where the newest good one is taken from.
    #[arg(long)]
    checkpoint_dir: Option<PathBuf>,
    /// Updates between checkpoints.
    #[arg(long)]
    every_steps: Option<u64>,
    /// Checkpoints kept.
    #[arg(long)]
    keep: Option<u32>,
    /// Print parameters, memory and the largest batch that fits, and end.
    #[arg(long)]
    dry_run: bool,
    /// Rank 0 writes the first reduced gradient here, as safetensors.
    #[arg(long)]
    gradient_out: Option<PathBuf>,
}

fn model(text: &str) -> Result<ModelSpec, String> {
    if text.starts_with('{') {
        return serde_json::from_str(text).map(ModelSpec::Sizes).map_err(|error| error.to_string());
    }
    match MODEL_PRESETS.contains(&text) {
        true => Ok(ModelSpec::Preset(text.into())),
        false => Err(format!("there are {}", MODEL_PRESETS.join(", "))),
    }
}

fn batch_size(text: &str) -> Result<BatchSize, String> {
    match text {
        "auto" => Ok(BatchSize::Auto(Auto::Auto)),
        _ => text.parse().map(BatchSize::Samples).map_err(|_| "neither a number nor `auto`".into()),
    }
}

fn precision(text: &str) -> Result<Precision, String> {
    match text {
        "float32" => Ok(Precision::Float32),
        "bfloat16" => Ok(Precision::Bfloat16),
        _ => Err("there are float32 and bfloat16".into()),
    }
}

fn device_name(text: &str) -> Result<Device, String> {
    match text {
        "auto" => Ok(Device::Auto),
        "cpu" => Ok(Device::Cpu),
        "cuda" => Ok(Device::Cuda),
        _ => Err("there are auto, cpu and cuda".into()),
    }
}

fn main() {
    let cli = Cli::parse();
    let code = match cli.verb {
        Verb::Train(flags) => run(|| train(&flags, false)),
        Verb::Evaluate(flags) => run(|| train(&flags, true)),
        Verb::Checksum { checkpoint } => print(load::checksum(&checkpoint)),
        Verb::GpuCheck { folder } => gpu_check(&folder),
        Verb::Disk { folder, bytes } => {
            let rates = disk::measure(&folder, usize::try_from(bytes).unwrap_or(usize::MAX));
            print(rates.and_then(|rates| serde_json::to_string(&rates).map_err(|error| TrainError::Failed(error.to_string()))))
        }
    };
    // Not `exit`: libtorch's threads and destructors have nothing left to do, and waiting for them costs time.
    // SAFETY: ends the process; stdout and stderr were flushed by line.
    unsafe { nix::libc::_exit(code) }
}

/// Prints an answer, or why there is none; the exit code.
fn print(answer: Result<String, TrainError>) -> i32 {
    match answer {
        Ok(text) => {
            println!("{text}");
            0
        }
        Err(error) => {
            eprintln!("everlit-worker: {error}");
            error.exit_code()
        }
    }
}

fn run(work: impl FnOnce() -> Result<(), TrainError>) -> i32 {
    let error_file = std::env::var_os("TORCHELASTIC_ERROR_FILE").filter(|path| !path.is_empty()).map(PathBuf::from);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(TrainError::Failed(format!("panicked: {}", text.unwrap_or("no message"))))
    });
    let Err(error) = result else { return 0 };
    eprintln!("everlit-worker: {error}");
    if let (Some(path), false) = (&error_file, matches!(error, TrainError::Terminated(_))) {
        write_error_file(path, &error.to_string());
    }
    error.exit_code()
}

fn gpu_check(folder: &Path) -> i32 {
    device::prepare_environment(true);
    if device::count() == 0 {
        println!(
            "SKIPPED: {}",
            if device::HAS_CUDA { "no GPU can be used here" } else { "this build has no CUDA: scripts/build.sh --cuda" }
        );
        return EXIT_SKIPPED;
    }
    let mut passed = false;
    let code = run(|| {
        let environment = Environment::read(|_| None)?;
        passed = check::gpu(&environment, folder)?;
        Ok(())
    });
    if code == 0 && !passed { 1 } else { code }
}

fn train(flags: &TrainFlags, evaluate: bool) -> Result<(), TrainError> {
    signals::install().map_err(|error| TrainError::Failed(format!("could not install signal handlers: {error}")))?;
    let mut environment = Environment::read(|name| std::env::var(name).ok())?;
    if flags.checkpoint_dir.is_some() {
        environment.checkpoint_dir.clone_from(&flags.checkpoint_dir);
    }
    let config = configuration(flags, environment.world)?;
    device::prepare_environment(config.worker.deterministic);
    match (flags.dry_run, evaluate) {
        (true, _) => train::dry_run(&config, &environment),
        (false, true) => train::evaluate(&config, &environment),
        (false, false) => train::train(&config, &environment, flags.gradient_out.as_deref()),
    }
}

fn configuration(flags: &TrainFlags, world: u32) -> Result<TrainConfig, TrainError> {
    let mut config = match &flags.config {
        None => TrainConfig {
            worker: WorkerSpec::for_world(world),
            checkpoint: CheckpointPolicy::default(),
            shards: Vec::new(),
            stored: None,
            mean_seconds_between_failures: None,
        },
        Some(path) => {
            let bad = |why: String| TrainError::Config(format!("configuration `{}`: {why}", path.display()));
            let text = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
            serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?
        }
    };
    fn put<T: Clone>(flag: &Option<T>, field: &mut T) {
        if let Some(value) = flag {
            field.clone_from(value);
        }
    }
    let worker = &mut config.worker;
    put(&flags.model, &mut worker.model);
    put(&flags.steps, &mut worker.steps);
    put(&flags.batch_size, &mut worker.batch_size);
    put(&flags.sequence_length, &mut worker.sequence_length);
    put(&flags.learning_rate, &mut worker.learning_rate);
    put(&flags.dropout, &mut worker.dropout);
    put(&flags.precision, &mut worker.precision);
    put(&flags.device, &mut worker.device);
    worker.deterministic |= flags.deterministic;
    put(&flags.evaluation_every, &mut worker.evaluation.every_steps);
    worker.activation_checkpointing |= flags.activation_checkpointing;
    worker.micro_batch_size = flags.micro_batch_size.or(worker.micro_batch_size);
    put(&flags.seed, &mut worker.seed);
    if flags.data.is_some() {
        worker.data.clone_from(&flags.data);
    }
    put(&flags.every_steps, &mut config.checkpoint.every_steps);
    put(&flags.keep, &mut config.checkpoint.keep);
    Ok(config)
}

/// torchrun's form of an error record.
fn write_error_file(path: &Path, message: &str) {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |age| age.as_secs());
    let record = serde_json::json!({"message": {"message": message, "extraInfo": {"timestamp": seconds.to_string()}}});
    if let Err(error) = std::fs::write(path, record.to_string()) {
        eprintln!("everlit-worker: could not write `{}`: {error}", path.display());
    }
}

/// A script's word for: not tried.
const EXIT_SKIPPED: i32 = 77;

const _: () = assert!(EXIT_CONFIG == 78);
