//! Real ranks of the real program, on a small text, with a rendezvous folder and heartbeats as an agent gives them.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use everlit_api::job::{BatchSize, CheckpointPolicy, ModelSpec, WorkerSpec};
use everlit_api::manifest::Heartbeat;
use everlit_worker::checkpoint;
use everlit_worker::train_config::TrainConfig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_everlit-worker");
/// For everything that should take a second or two, on a machine that is busy with other things.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A job's folder with its text.
pub struct Job {
    pub dir: tempfile::TempDir,
    pub config: TrainConfig,
}

impl Job {
    /// About 40 KiB of text with some order in it.
    pub fn new(model: &str, world: u32, steps: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("text");
        fs::create_dir(&text).unwrap();
        for shard in 0..3 {
            let words: String = (0..2500 + shard * 37).map(|n| ["light ", "keeps ", "on ", "burning "][(n * n + shard) % 4]).collect();
            fs::write(text.join(format!("{shard}.txt")), words).unwrap();
        }
        let mut worker = WorkerSpec::for_world(world);
        worker.model = ModelSpec::Preset(model.into());
        worker.steps = steps;
        worker.batch_size = BatchSize::Samples(7);
        worker.sequence_length = 24;
        worker.data = Some(text.to_string_lossy().into());
        worker.seed = 11;
        let checkpoint = CheckpointPolicy { every_steps: 10, keep: 100, ..CheckpointPolicy::default() };
        let config = TrainConfig { worker, checkpoint, shards: Vec::new(), stored: None, mean_seconds_between_failures: None };
        Self { dir, config }
    }

    pub fn checkpoints(&self) -> PathBuf {
        self.dir.path().join("checkpoints")
    }

    pub fn newest(&self) -> PathBuf {
        checkpoint::newest_verified(&self.checkpoints()).unwrap().checkpoint.expect("a checkpoint").0
    }

    /// Starts all ranks of one attempt, resuming from `from`.
    pub fn start(&self, attempt: u32, world: u32, from: Option<&Path>) -> Gang {
        let run = self.dir.path().join(format!("run-{attempt}"));
        fs::create_dir_all(run.join("rendezvous")).unwrap();
        let config = run.join("train.json");
        fs::write(&config, serde_json::to_vec(&self.config).unwrap()).unwrap();
        let start = |rank: u32| {
            let own = run.join(rank.to_string());
            fs::create_dir(&own).unwrap();
            let out = File::create(own.join("out")).unwrap();
            Command::new(PROGRAM)
                .args(["train", "--config"])
                .arg(&config)
                .env_clear()
                .envs([("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", world), ("OMP_NUM_THREADS", 1)].map(text))
                .env("EVERLIT_JOB_ID", "test")
                .env("EVERLIT_ATTEMPT", attempt.to_string())
                .env("EVERLIT_HEARTBEAT_FILE", own.join("HEARTBEAT"))
                .env("EVERLIT_CHECKPOINT_DIR", self.checkpoints())
                .env("EVERLIT_RESUME_FROM", from.unwrap_or(Path::new("")))
                .env("EVERLIT_RENDEZVOUS", format!("dir:{}", run.join("rendezvous").display()))
                .env("TORCHELASTIC_ERROR_FILE", own.join("error.json"))
                .stdin(Stdio::null())
                .stdout(out.try_clone().unwrap())
                .stderr(out)
                .spawn()
                .unwrap()
        };
        Gang { children: (0..world).map(start).collect(), run }
    }

    /// Runs to the end and answers the checksum of the last checkpoint.
    pub fn finish(&self, attempt: u32, world: u32, from: Option<&Path>) -> String {
        let mut gang = self.start(attempt, world, from);
        let codes = gang.wait();
        assert!(codes.iter().all(|code| *code == Some(0)), "{codes:?}\n{}", gang.output());
        self.checksum()
    }

    pub fn checksum(&self) -> String {
        let newest = self.newest();
        assert_eq!(checkpoint::verify(&newest).unwrap().step, self.config.worker.steps);
        let answer = Command::new(PROGRAM).arg("checksum").arg(&newest).output().unwrap();
        assert!(answer.status.success(), "{answer:?}");
        String::from_utf8(answer.stdout).unwrap()
    }
}

fn text((name, value): (&str, u32)) -> (&str, String) {
    (name, value.to_string())
}

/// The ranks of one attempt; killed when dropped.
pub struct Gang {
    pub children: Vec<Child>,
    pub run: PathBuf,
}

impl Gang {
    pub fn signal(&self, rank: usize, signal: Signal) {
        kill(Pid::from_raw(self.children[rank].id() as i32), signal).unwrap();
    }

    pub fn heartbeat(&self, rank: usize) -> Option<Heartbeat> {
        serde_json::from_slice(&fs::read(self.run.join(rank.to_string()).join("HEARTBEAT")).ok()?).ok()
    }

    pub fn file(&self, rank: usize, name: &str) -> String {
        fs::read_to_string(self.run.join(rank.to_string()).join(name)).unwrap_or_default()
    }

    pub fn output(&self) -> String {
        (0..self.children.len()).map(|rank| format!("--- rank {rank}\n{}", self.file(rank, "out"))).collect()
    }

    /// Waits until rank 0 has done `step` updates.
    pub fn wait_step(&mut self, step: u64) {
        let reached = |gang: &Self| gang.heartbeat(0).and_then(|beat| beat.step) >= Some(step);
        self.wait_until(reached);
    }

    /// Waits until a checkpoint of `step` or a later one is committed: saving goes on beside the steps, so that the
    /// step after it says nothing.
    pub fn wait_committed(&mut self, job: &Job, step: u64) {
        let checkpoints = job.checkpoints();
        self.wait_until(|_| checkpoint::list(&checkpoints).unwrap().iter().any(|found| found.step >= step));
    }

    pub fn wait_until(&mut self, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < deadline, "not reached\n{}", self.output());
            let ended = self.children.iter_mut().any(|child| child.try_wait().unwrap().is_some());
            assert!(!ended || done(self), "a rank ended\n{}", self.output());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for all ranks; exit codes in rank order, `None` for a signal.
    pub fn wait(&mut self) -> Vec<Option<i32>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let codes: Vec<_> = self.children.iter_mut().map(|child| child.try_wait().unwrap()).collect();
            if codes.iter().all(Option::is_some) {
                return codes.into_iter().map(|status| status.unwrap().code()).collect();
            }
            assert!(Instant::now() < deadline, "ranks still run: {codes:?}\n{}", self.output());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Gang {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
