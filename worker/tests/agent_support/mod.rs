//! A small coordinator for tests: it drives the real agent, with real shims and ranks, over a real link.
//!
//! Waits are for frames or conditions, with a deadline; never for time to pass. What a test leaves running is killed when it ends, found by
//! the test's own folder in the shims' arguments.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::result_large_err,
    reason = "a part of tests, of which each test file uses some"
)]

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use everlit_api::agent::{Exited, FromAgent, GangSpec, Hello, LogFrame, PROTOCOL, Program, Started, ToAgent};
use everlit_api::ids::{Incarnation, JobId};
use everlit_api::job::{CheckpointPolicy, HeartbeatPolicy};
use everlit_api::time::Millis;
use futures_util::{SinkExt, StreamExt};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// An agent and its coordinator.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub agent: Option<Child>,
    runtime: Runtime,
    listener: TcpListener,
    link: Option<WebSocketStream<TcpStream>>,
    held: Vec<TcpStream>,
    frames: VecDeque<FromAgent>,
    pub logs: VecDeque<(LogFrame, Vec<u8>)>,
    pub report: Option<everlit_api::status::NodeLoad>,
    next_job: u64,
    pub linger: &'static str,
}

impl Bench {
    /// With a running agent that has said hello.
    pub fn new() -> Self {
        let mut bench = Self::unstarted();
        bench.start_agent();
        let hello = bench.accept();
        assert_eq!((hello.protocol, hello.ranks.len()), (PROTOCOL, 0));
        bench
    }

    pub fn unstarted() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let (frames, logs) = (VecDeque::new(), VecDeque::new());
        let bench = Self {
            dir,
            agent: None,
            runtime,
            listener,
            link: None,
            held: Vec::new(),
            frames,
            logs,
            report: None,
            next_job: 1,
            linger: "60s",
        };
        bench.rewrite_coordinator_file();
        bench
    }

    pub fn rewrite_coordinator_file(&self) {
        let url = format!("http://{}", self.listener.local_addr().unwrap());
        let draft = self.dir.path().join("coordinator.tmp");
        std::fs::write(&draft, format!(r#"{{"url":"{url}","token":"secret","pid":1}}"#)).unwrap();
        std::fs::rename(draft, self.dir.path().join("coordinator.json")).unwrap();
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("agent")
    }

    pub fn job_folder(&self, job: JobId) -> PathBuf {
        self.data().join("jobs").join(job.to_string())
    }

    pub fn run_folder(&self, incarnation: Incarnation) -> PathBuf {
        self.job_folder(incarnation.job).join("runs").join(format!("a{}-r{}", incarnation.attempt, incarnation.rank))
    }

    pub fn agent_command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_everlit-agent"));
        command.arg("run").arg("--data-dir").arg(self.data()).arg("--coordinator-file").arg(self.dir.path().join("coordinator.json"));
        command.args(["--node", "here", "--linger", self.linger]).stdin(Stdio::null());
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("agent.log")).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        command
    }

    pub fn start_agent(&mut self) {
        self.agent = Some(self.agent_command().env("EVERLIT_TEST_SECRET", "never seen by a rank").spawn().unwrap());
    }

    /// An agent whose files, and those of what it starts, can not grow beyond this.
    pub fn start_agent_limited(&mut self, bytes: u64) {
        use std::os::unix::process::CommandExt;
        let mut command = self.agent_command();
        let limit = move || {
            let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE)?;
            Ok(setrlimit(Resource::RLIMIT_FSIZE, bytes, hard)?)
        };
        // SAFETY: only system calls between fork and exec.
        self.agent = Some(unsafe { command.pre_exec(limit) }.spawn().unwrap());
    }

    pub fn agent_pid(&self) -> i32 {
        self.agent.as_ref().unwrap().id() as i32
    }

    /// Kills the agent and nothing else.
    pub fn kill_agent(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
        self.link = None;
        self.frames.clear();
    }

    pub fn signal_agent(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.agent_pid().to_string()]).status().unwrap().success());
    }

    /// Waits until the agent has ended by itself; answers whether with success.
    pub fn agent_ended(&mut self) -> bool {
        let mut agent = self.agent.take().unwrap();
        let mut status = None;
        self.until("the agent's end", || {
            status = agent.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap().success()
    }

    /// Takes a connection, its hello, and welcomes it.
    pub fn accept(&mut self) -> Hello {
        let log = self.dir.path().join("agent.log");
        let link = self.runtime.block_on(async {
            let (stream, _) = match tokio::time::timeout(PATIENCE, self.listener.accept()).await {
                Ok(accepted) => accepted.unwrap(),
                Err(_) => panic!("no connection\nagent: {}", read(&log)),
            };
            let token = |request: &tokio_tungstenite::tungstenite::handshake::server::Request, response| {
                assert_eq!(request.uri().path(), "/agent/link");
                assert_eq!(request.headers()["authorization"], "Bearer secret");
                Ok(response)
            };
            tokio_tungstenite::accept_hdr_async(stream, token).await.unwrap()
        });
        self.link = Some(link);
        let hello = self.wait_for("a hello", |frame| if let FromAgent::Hello(hello) = frame { Some(hello.clone()) } else { None });
        self.send(ToAgent::Welcome { protocol: PROTOCOL, report_interval: Millis(200), silence_max: None });
        hello
    }

    /// Takes a request that is none for a link, and gives it an answer, cut off after so many bytes of its body; answers its head.
    pub fn answer(&mut self, status: &str, body: &[u8], cut: usize) -> String {
        self.runtime.block_on(async {
            let accepted = tokio::time::timeout(PATIENCE, self.listener.accept()).await;
            let (mut stream, _) = accepted.expect("no request came").unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let own = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all(own.as_bytes()).await.unwrap();
            stream.write_all(&body[..cut.min(body.len())]).await.unwrap();
            if cut < body.len() {
                self.held.push(stream);
            }
            String::from_utf8(head).unwrap()
        })
    }

    /// Ends the answers that were cut off.
    pub fn end_answers(&mut self) {
        self.held.clear();
    }

    pub fn start_failed(&mut self, spec: &GangSpec) -> (String, bool) {
        self.wait_for("a failed start", |frame| match frame {
            FromAgent::StartFailed { job, attempt, reason, permanent } if (*job, *attempt) == (spec.job, spec.attempt) => {
                Some((reason.clone(), *permanent))
            }
            _ => None,
        })
    }

    pub fn drop_link(&mut self) {
        self.link = None;
        self.frames.clear();
        self.logs.clear();
    }

    pub fn send(&mut self, frame: ToAgent) {
        let text = serde_json::to_string(&frame).unwrap();
        self.runtime.block_on(self.link.as_mut().unwrap().send(Message::text(text))).unwrap();
    }

    pub fn send_all(&mut self, frames: Vec<ToAgent>) {
        let link = self.link.as_mut().unwrap();
        self.runtime.block_on(async {
            for frame in frames {
                link.feed(Message::text(serde_json::to_string(&frame).unwrap())).await.unwrap();
            }
            link.flush().await.unwrap();
        });
    }

    /// Reads one more frame into its queue; `false` when none came in time.
    pub fn read(&mut self, patience: Duration) -> bool {
        let link = self.link.as_mut().expect("linked");
        let next = self.runtime.block_on(async { tokio::time::timeout(patience, link.next()).await });
        match next {
            Err(_) => false,
            Ok(None | Some(Err(_)) | Some(Ok(Message::Close(_)))) => {
                self.link = None;
                false
            }
            Ok(Some(Ok(Message::Text(text)))) => {
                match serde_json::from_str(&text).unwrap() {
                    FromAgent::Report(load) => self.report = Some(load),
                    frame => self.frames.push_back(frame),
                }
                true
            }
            Ok(Some(Ok(Message::Binary(bytes)))) => {
                let header = LogFrame::decode(&bytes).unwrap();
                self.logs.push_back((header, bytes[LogFrame::BYTES..].to_vec()));
                true
            }
            Ok(Some(Ok(_))) => true,
        }
    }

    /// The first frame (not taken yet) that `pick` takes.
    pub fn wait_for<T>(&mut self, what: &str, mut pick: impl FnMut(&FromAgent) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        let mut looked = 0;
        loop {
            while looked < self.frames.len() {
                if let Some(found) = pick(&self.frames[looked]) {
                    self.frames.remove(looked);
                    return found;
                }
                looked += 1;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.link.is_none() || !self.read(left) {
                let log = std::fs::read_to_string(self.dir.path().join("agent.log")).unwrap_or_default();
                panic!("waited for {what} in vain; not taken: {:#?}\nagent: {log}", self.frames);
            }
        }
    }

    /// Frames that came and were not taken.
    pub fn not_taken(&self) -> impl Iterator<Item = &FromAgent> {
        self.frames.iter()
    }

    /// Forgets frames that nobody asked for.
    pub fn take_others(&mut self) {
        self.frames.retain(|frame| matches!(frame, FromAgent::Exited(_)));
    }

    /// Waits for the connection to end.
    pub fn wait_for_close(&mut self) {
        let until = Instant::now() + PATIENCE;
        while self.link.is_some() {
            assert!(Instant::now() < until, "the link stays open");
            self.read(Duration::from_millis(100));
        }
    }

    pub fn started(&mut self, incarnation: Incarnation) -> Started {
        self.wait_for(&format!("the start of {incarnation}"), |frame| match frame {
            FromAgent::Started(started) if started.incarnation == incarnation => Some(started.clone()),
            _ => None,
        })
    }

    pub fn exited(&mut self, incarnation: Incarnation) -> Exited {
        self.wait_for(&format!("the end of {incarnation}"), |frame| match frame {
            FromAgent::Exited(exited) if exited.incarnation == incarnation => Some(exited.clone()),
            _ => None,
        })
    }

    /// A gang of shell scripts that is not started yet.
    pub fn gang(&mut self, world_size: u32, script: &str) -> GangSpec {
        self.next_job += 1;
        GangSpec {
            job: JobId::from_parts(1_700_000_000_000 + self.next_job, u128::from(self.next_job)),
            attempt: 1,
            generation: 0,
            seats: Vec::new(),
            spares: Vec::new(),
            elastic: false,
            world_size,
            first_rank: 0,
            count: world_size,
            group_rank: 0,
            group_world_size: 1,
            master_addr: "127.0.0.1".into(),
            master_port: 29_500,
            rendezvous_secret: String::new(),
            restarts: 0,
            max_restarts: 50,
            mean_time_between_failures: None,
            gpus: Vec::new(),
            shares_gpus: false,
            program: Program::Command { argv: vec!["sh".into(), "-c".into(), script.into()] },
            env: BTreeMap::new(),
            workdir: Some(self.dir.path().display().to_string()),
            package: None,
            shards: Vec::new(),
            data: None,
            resume_from: None,
            fetch: None,
            stored: None,
            rejected_step: None,
            skip_memory: false,
            checkpoint: CheckpointPolicy::default(),
            heartbeat: HeartbeatPolicy::default(),
            log_metrics: Vec::new(),
            log_policies: Vec::new(),
            log_bytes_max: 1 << 30,
            stop_grace: Millis(30_000),
        }
    }

    pub fn order(&mut self, spec: &GangSpec) {
        self.send(ToAgent::StartGang(Box::new(spec.clone())));
    }

    /// Starts a gang of one and waits until it runs.
    pub fn start(&mut self, script: &str) -> (GangSpec, Started) {
        let spec = self.gang(1, script);
        self.order(&spec);
        let started = self.started(rank(&spec, 0));
        (spec, started)
    }

    pub fn stop(&mut self, spec: &GangSpec, grace: Millis) {
        self.send(ToAgent::StopGang { job: spec.job, attempt: spec.attempt, grace });
    }

    pub fn until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !condition() {
            if Instant::now() > until {
                let log = std::fs::read_to_string(self.dir.path().join("agent.log")).unwrap_or_default();
                panic!("waited for {what} in vain\nagent: {log}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Processes whose arguments or environment name this test's folder, other than the agent.
    pub fn processes(&self) -> Vec<i32> {
        let own = self.dir.path().display().to_string();
        let agent = self.agent.as_ref().map(|agent| agent.id() as i32);
        let pids = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| Some(*pid) != agent && *pid != std::process::id() as i32)
            .filter(|pid| {
                let read = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
                let text = [read("cmdline"), read("environ")].concat();
                String::from_utf8_lossy(&text).contains(&own)
            })
            .collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        for _ in 0..50 {
            let left = self.processes();
            if left.is_empty() {
                return;
            }
            for pid in left {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

pub fn rank(spec: &GangSpec, rank: u32) -> Incarnation {
    Incarnation { job: spec.job, attempt: spec.attempt, rank }
}

pub fn lift_file_size_limit(pid: i32) {
    let all = nix::libc::rlimit { rlim_cur: nix::libc::RLIM_INFINITY, rlim_max: nix::libc::RLIM_INFINITY };
    // SAFETY: a system call with a valid pointer.
    let done = unsafe { nix::libc::prlimit(pid, nix::libc::RLIMIT_FSIZE, &raw const all, std::ptr::null_mut()) };
    assert_eq!(done, 0);
}

pub fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

pub fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
