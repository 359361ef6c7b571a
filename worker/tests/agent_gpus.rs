//! The agent with GPUs, of which there are none here: `fake_nvml.c` stands where NVIDIA's library is loaded from, so that everything on this
//! side of it is the real thing.

#![allow(clippy::unwrap_used, reason = "a test")]

mod agent_support;

use std::path::PathBuf;
use std::process::Command;

use agent_support::{Bench, is_alive, rank, read};
use everlit_api::agent::{FromAgent, GpuHolder};
use everlit_api::gpu::GpuError;
use everlit_api::time::Millis;

struct Gpus {
    bench: Bench,
    folder: PathBuf,
}

impl Gpus {
    fn new() -> Self {
        let mut bench = Bench::unstarted();
        let folder = bench.dir.path().join("nvml");
        std::fs::create_dir(&folder).unwrap();
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_nvml.c");
        let built = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(folder.join("libnvidia-ml.so.1")).arg(source).status();
        assert!(built.unwrap().success(), "the fake library is not built");
        let mut command = bench.agent_command();
        command.env("LD_LIBRARY_PATH", &folder).env("EVERLIT_FAKE_NVML", &folder);
        bench.agent = Some(command.spawn().unwrap());
        let hello = bench.accept();
        let gpus: Vec<_> = hello.capacity.gpus.iter().map(|gpu| (gpu.index, gpu.uuid.as_str())).collect();
        assert_eq!(gpus, [(0, "GPU-fake-0"), (1, "GPU-fake-1")]);
        Self { bench, folder }
    }

    /// The file is there whole or not at all.
    fn write(&self, name: &str, text: &str) {
        let draft = self.folder.join("draft");
        std::fs::write(&draft, text).unwrap();
        std::fs::rename(draft, self.folder.join(name)).unwrap();
    }

    fn error(&mut self) -> GpuError {
        self.bench
            .wait_for("an error of a GPU", |frame| if let FromAgent::GpuFailed { error } = frame { Some(error.clone()) } else { None })
    }

    fn pid_in(&self, name: &str) -> u32 {
        let path = self.bench.dir.path().join(name);
        self.bench.until("a process id", || read(&path).ends_with('\n'));
        read(&path).trim().parse().unwrap()
    }
}

#[test]
fn an_error_of_a_gpu_is_told_at_once_and_with_the_end_of_its_rank() {
    let mut gpus = Gpus::new();
    let mut spec = gpus.bench.gang(2, "sleep 600");
    spec.gpus = vec![0, 1];
    gpus.bench.order(&spec);
    let pids = [0, 1].map(|number| gpus.bench.started(rank(&spec, number)).pid);
    gpus.write("xid", "1 79");
    let error = gpus.error();
    assert_eq!((error.gpu, error.uuid.as_str(), error.xid), (1, "GPU-fake-1", 79));
    assert!(pids.iter().all(|pid| is_alive(*pid)), "an agent ends no rank for it");
    gpus.bench.stop(&spec, Millis(0));
    let ends = [0, 1].map(|number| gpus.bench.exited(rank(&spec, number)).exit);
    assert_eq!((ends[0].signal, ends[0].gpu_error.clone()), (Some(9), None), "its GPU is well");
    assert_eq!((ends[1].signal, ends[1].gpu_error.clone()), (Some(9), Some(error)));
}

#[test]
fn an_error_without_a_coordinator_is_told_to_the_next_one() {
    let mut gpus = Gpus::new();
    gpus.bench.drop_link();
    gpus.write("xid", "0 48");
    let xid = gpus.folder.join("xid");
    gpus.bench.until("the error to be taken", || !xid.exists());
    gpus.bench.accept();
    assert_eq!(gpus.error().xid, 48);
}

#[test]
fn a_gpu_that_the_driver_lost_is_told_as_fallen_off_the_bus_and_the_others_are_watched_on() {
    let mut gpus = Gpus::new();
    gpus.write("lost", "0");
    let error = gpus.error();
    assert_eq!((error.gpu, error.xid), (0, 79));
    gpus.write("xid", "1 94");
    let error = gpus.error();
    assert_eq!((error.gpu, error.xid), (1, 94));
}

#[test]
fn a_leftover_that_holds_gpu_memory_is_ended_before_the_next_attempt_starts() {
    let mut gpus = Gpus::new();
    let mut spec = gpus.bench.gang(1, "echo $$ > first.txt; exec sleep 600");
    spec.gpus = vec![0];
    gpus.bench.order(&spec);
    gpus.bench.started(rank(&spec, 0));
    let first = gpus.pid_in("first.txt");
    // As if it had got away from everything that the shim and the agent look at: only its environment tells whose it is.
    let folder = gpus.bench.run_folder(rank(&spec, 0));
    let mark = format!("EVERLIT_HEARTBEAT_FILE={}", folder.join("HEARTBEAT").display());
    let mut escaped = Command::new("setsid").args(["env", "-i", &mark, "PATH=/usr/bin:/bin", "sleep", "600"]).spawn().unwrap();
    let pid = escaped.id();
    gpus.bench.until("its environment", || read(format!("/proc/{pid}/environ").as_ref()).starts_with("EVERLIT_"));
    gpus.bench.stop(&spec, Millis(0));
    gpus.bench.exited(rank(&spec, 0));
    assert!(!is_alive(first) && is_alive(pid));
    gpus.write("holders-0", &format!("{pid}\n"));
    let mut next = spec.clone();
    next.attempt = 2;
    gpus.bench.order(&next);
    gpus.bench.started(rank(&next, 0));
    assert!(!is_alive(pid), "it still lives when the next attempt has started");
    assert!(!gpus.bench.not_taken().any(|frame| matches!(frame, FromAgent::GpuHeld { .. })), "nobody holds anything");
    escaped.wait().unwrap();
}

#[test]
fn a_foreign_process_that_holds_gpu_memory_is_told_and_left_alone() {
    let mut gpus = Gpus::new();
    // Without any environment, as one that is ending looks.
    let mut foreign = Command::new("env").args(["-i", "sleep", "600"]).spawn().unwrap();
    let pid = foreign.id();
    gpus.bench.until("its program", || read(format!("/proc/{pid}/comm").as_ref()).trim() == "sleep");
    gpus.write("holders-1", &format!("{pid}\n"));
    let mut spec = gpus.bench.gang(2, "sleep 600");
    spec.gpus = vec![0, 1];
    gpus.bench.order(&spec);
    let held = gpus.bench.wait_for("who holds memory", |frame| match frame {
        FromAgent::GpuHeld { job, attempt: 1, holders } if *job == spec.job => Some(holders.clone()),
        _ => None,
    });
    assert_eq!(held, [GpuHolder { gpu: 1, pid, name: "sleep".into() }]);
    gpus.bench.started(rank(&spec, 0));
    assert!(is_alive(pid));
    foreign.kill().unwrap();
    foreign.wait().unwrap();
}
