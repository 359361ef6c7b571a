//! What a run does when nothing disturbs it, and what it refuses.
#![cfg(feature = "torch")]
#![allow(clippy::unwrap_used)]

mod torch_support;

use std::fs;
use std::process::Command;

use everlit_worker::checkpoint;
use nix::sys::signal::Signal;
use torch_support::{Job, PROGRAM};

#[test]
fn the_loss_falls_and_old_checkpoints_go_when_running_alone() {
    let job = Job::new("mlp-10k", 1, 400);
    let text = job.config.worker.data.clone().unwrap();
    let dir = job.checkpoints();
    let run = |steps: &str| {
        let out = Command::new(PROGRAM)
            .args(["train", "--model", "mlp-10k", "--batch-size", "16", "--every-steps", "100", "--keep", "2", "--steps", steps])
            .args(["--data", &text, "--seed", "3"])
            .arg("--checkpoint-dir")
            .arg(&dir)
            .env_clear()
            .output()
            .unwrap();
        assert!(out.status.success(), "{out:?}");
        String::from_utf8(out.stdout).unwrap()
    };
    let text = run("400");
    let last = text.lines().rfind(|line| line.starts_with("step=400 ")).unwrap();
    let loss: f64 = last.split("loss=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(loss < 3.0, "it began at 5.5 and is {loss}");
    let steps = |dir| checkpoint::list(dir).unwrap().iter().map(|found| found.step).collect::<Vec<_>>();
    assert_eq!(steps(&dir), [400, 300]);
    assert!(run("450").contains("resuming at step 400"), "alone it goes on from its newest checkpoint");
    assert_eq!(steps(&dir), [450, 400]);
    assert!(run("450").contains("was done before"));
}

#[test]
fn two_runs_of_three_ranks_have_the_same_bits_and_one_rank_sees_the_same_loss() {
    let loss = |gang: &torch_support::Gang| gang.heartbeat(0).unwrap().loss.unwrap();
    let sums: Vec<String> = (0..2).map(|_| Job::new("llama-1m", 3, 6).finish(1, 3, None)).collect();
    assert_eq!(sums[0], sums[1]);
    let losses: Vec<f64> = [1, 3]
        .map(|world| {
            let job = Job::new("llama-1m", world, 1);
            let mut gang = job.start(1, world, None);
            assert!(gang.wait().iter().all(|code| *code == Some(0)), "{}", gang.output());
            loss(&gang)
        })
        .into();
    assert!((losses[0] - losses[1]).abs() < 1e-5, "seven samples dealt to three ranks have the loss of seven: {losses:?}");
}

#[test]
fn bfloat16_trains_to_about_the_same_loss_and_to_the_same_bits_each_time() {
    use everlit_api::job::Precision;
    let run = |precision| {
        let mut job = Job::new("llama-1m", 2, 6);
        job.config.worker.precision = precision;
        let mut gang = job.start(1, 2, None);
        assert!(gang.wait().iter().all(|code| *code == Some(0)), "{}", gang.output());
        (gang.heartbeat(0).unwrap().loss.unwrap(), job.checksum())
    };
    let (exact, rounded, again) = (run(Precision::Float32), run(Precision::Bfloat16), run(Precision::Bfloat16));
    assert!((exact.0 - rounded.0).abs() < 0.02 && exact.1 != rounded.1, "{} {}", exact.0, rounded.0);
    assert_eq!(rounded.1, again.1);
}

#[test]
fn a_checkpoint_is_shared_out_and_says_where_the_data_stands() {
    let job = Job::new("mlp-10k", 3, 25);
    job.finish(4, 3, None);
    let steps: Vec<u64> = checkpoint::list(&job.checkpoints()).unwrap().iter().map(|found| found.step).collect();
    assert_eq!(steps.first(), Some(&25), "the last step always");
    assert!(
        steps.len() > 1 && steps[1..].iter().all(|step| [10, 20].contains(step)),
        "every ten steps, if the disk is that fast: {steps:?}"
    );
    let manifest = checkpoint::verify(&job.newest()).unwrap();
    assert_eq!((manifest.attempt, manifest.step, manifest.samples, manifest.world_size), (4, 25, 175, 3));
    assert_eq!((manifest.seed, manifest.global_batch, manifest.data.cursor, manifest.epoch), (11, 7, 175, 0));
    assert_eq!(manifest.model.unwrap().family, "mlp");
    let names: Vec<&str> = manifest.files.iter().map(|file| file.name.as_str()).collect();
    let expected = ["part-00000-of-00003.safetensors", "part-00001-of-00003.safetensors", "part-00002-of-00003.safetensors"];
    assert_eq!(names, expected);
    let inside = fs::read_dir(job.newest()).unwrap().count();
    assert_eq!(inside, 4, "the parts and the manifest");
}

#[test]
fn heartbeats_say_how_far_it_is() {
    let job = Job::new("mlp-10k", 2, 30);
    let mut gang = job.start(7, 2, None);
    gang.wait_until(|gang| gang.heartbeat(1).is_some());
    assert_eq!(gang.wait(), [Some(0), Some(0)]);
    let beat = gang.heartbeat(1).unwrap();
    assert_eq!((beat.rank, beat.attempt, beat.step, beat.total_steps, beat.samples), (1, 7, Some(30), Some(30), Some(210)));
    assert!(beat.seq > 1 && beat.loss.is_some() && beat.metrics.contains_key("lr"));
    assert_eq!(beat.pid, gang.children[1].id());
}

#[test]
fn a_save_on_demand_happens_at_one_step_and_training_goes_on() {
    let mut job = Job::new("mlp-10k", 3, 3000);
    job.config.checkpoint.every_steps = 1_000_000;
    let mut gang = job.start(1, 3, None);
    gang.wait_step(20);
    gang.signal(1, Signal::SIGUSR1);
    gang.wait_until(|_| !checkpoint::list(&job.checkpoints()).unwrap().is_empty());
    let step = checkpoint::verify(&job.newest()).unwrap().step;
    assert!((20..3000).contains(&step));
    gang.wait_step(step + 20);
    assert_eq!(checkpoint::list(&job.checkpoints()).unwrap().len(), 1, "one request, one checkpoint");
}

#[test]
fn what_can_never_work_ends_with_78_and_says_why() {
    type Case = (&'static str, &'static [&'static str], &'static [(&'static str, &'static str)], &'static str);
    let cases: [Case; 10] = [
        ("data", &["--data", "/nowhere"], &[], "/nowhere"),
        ("small data", &["--data", "/etc/hostname", "--sequence-length", "60000"], &[], "not even one sample"),
        ("config", &["--config", "/nowhere.json"], &[], "/nowhere.json"),
        ("batch", &["--batch-size", "0"], &[], "batch_size is 0"),
        ("steps", &["--steps", "0"], &[], "steps is 0"),
        ("rate", &["--learning-rate", "nan"], &[], "learning_rate"),
        ("length", &["--sequence-length", "0"], &[], "sequence_length is 0"),
        ("rank", &[], &[("RANK", "3"), ("WORLD_SIZE", "2")], "RANK is 3"),
        ("rendezvous", &[], &[("RANK", "0"), ("WORLD_SIZE", "2")], "EVERLIT_RENDEZVOUS"),
        ("address", &[], &[("RANK", "0"), ("WORLD_SIZE", "2"), ("EVERLIT_RENDEZVOUS", "tcp://x")], "dir:<path>"),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (what, arguments, environment, says) in cases {
        let record = dir.path().join(what);
        let mut command = Command::new(PROGRAM);
        command.arg("train").args(arguments).env_clear().envs(environment.iter().copied()).env("TORCHELASTIC_ERROR_FILE", &record);
        let out = command.output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(78), "{what}: {text}");
        assert!(text.contains(says), "{what}: {text}");
        let record: serde_json::Value = serde_json::from_slice(&fs::read(record).unwrap()).unwrap();
        assert!(record["message"]["message"].as_str().unwrap().contains(says));
        assert!(record["message"]["extraInfo"]["timestamp"].is_string());
    }
    let mut job = Job::new("mlp-10k", 1, 5);
    job.config.worker.device = everlit_api::job::Device::Cuda;
    let mut gang = job.start(1, 1, None);
    // With CUDA in the program, another machine may have the GPU that this one lacks.
    let (code, says) = if cfg!(feature = "nccl") { (1, "no GPU can be used here") } else { (78, "no CUDA") };
    assert_eq!(gang.wait(), [Some(code)]);
    assert!(gang.output().contains(says));
}

#[test]
fn the_memory_estimate_is_near_what_a_run_takes() {
    use everlit_api::job::{BatchSize, WorkerSpec};
    use everlit_api::model::{MemoryEstimate, ModelSizes};
    let mut job = Job::new("llama-10m", 1, 1_000);
    job.config.worker = WorkerSpec { batch_size: BatchSize::Samples(8), sequence_length: 128, ..job.config.worker.clone() };
    let mut gang = job.start(1, 1, None);
    gang.wait_step(12);
    let status = fs::read_to_string(format!("/proc/{}/smaps_rollup", gang.children[0].id())).unwrap();
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
    };
    let own = (kib("Private_Dirty:") + kib("Shared_Dirty:")) as f64;
    let sizes = ModelSizes::of(&job.config.worker.model).unwrap();
    let estimate = MemoryEstimate::of(&sizes, &job.config.worker, 1).total(8) as f64;
    assert!((0.9..2.0).contains(&(estimate / own)), "estimated {estimate}, taken {own}");
}

#[test]
fn only_the_training_program_loads_libtorch() {
    let names_it = |program: &str| fs::read(program).unwrap().windows(11).any(|bytes| bytes == b"libtorch_cp");
    assert!(names_it(PROGRAM));
    assert!(!names_it(env!("CARGO_BIN_EXE_everlit-agent")));
    assert!(!names_it(env!("CARGO_BIN_EXE_everlit-shim")));
}
