//! Scenarios through one harness: at a time, an event, the whole list of what comes of it. Every table is checked after every event, and a
//! scenario that leaves outcomes unread fails.

mod archives;
mod checkpoints;
mod clocks;
mod copies;
mod data;
mod elastic;
mod faults;
mod gpus;
mod in_place;
mod lives;
mod nodes;
mod own_words;
mod policies;
mod scheduling;
mod single;
mod slow;
mod told;
mod uploads;
mod views;

use std::fmt::Write as _;
use std::sync::Arc;

use everlit_api::agent::copies::CopyDoor;
use everlit_api::agent::{Beat, CheckpointNews, Exited, Hello, RankReport, Resumed, Started, ToAgent};
use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_api::job::JobSpec;
use everlit_api::rank::RankExit;
use everlit_api::status::Capacity;
use everlit_api::time::Timestamp;

use super::{Command, Config, Engine, Event, Step, StoredJob, StoredNode};

/// One engine in one scenario.
pub(super) struct Scene {
    pub(super) engine: Engine,
    now: Timestamp,
    told: String,
    rows: std::collections::BTreeMap<JobId, StoredJob>,
    blames: std::collections::BTreeMap<NodeId, String>,
}

pub(super) fn job(n: u128) -> JobId {
    JobId::from_u128(n)
}

pub(super) fn node(name: &str) -> NodeId {
    NodeId(name.into())
}

pub(super) fn rank(job_n: u128, attempt: u32, rank: u32) -> Incarnation {
    Incarnation { job: job(job_n), attempt, rank }
}

pub(super) fn command(world_size: u32) -> JobSpec {
    let mut spec = JobSpec { worker: None, command: vec!["work".into()], ..JobSpec::default_for(world_size) };
    spec.restart.backoff.jitter = 0.0;
    spec
}

pub(super) fn exit(code: i32, at: u64) -> RankExit {
    RankExit {
        code: Some(code),
        signal: None,
        error: None,
        at: Timestamp(at),
        tail: vec![format!("last words {code}")],
        message: None,
        matched: None,
        out_of_memory: false,
        gpu_error: None,
    }
}

pub(super) fn killed(at: u64) -> RankExit {
    RankExit {
        code: None,
        signal: Some(9),
        error: None,
        at: Timestamp(at),
        tail: vec![],
        message: None,
        matched: None,
        out_of_memory: false,
        gpu_error: None,
    }
}

pub(super) fn hello(name: &str, ranks: Vec<RankReport>) -> Event {
    Event::NodeLinked {
        hello: Box::new(Hello {
            protocol: 1,
            node: node(name),
            boot_id: "boot".into(),
            version: "0".into(),
            pid: 1,
            capacity: Capacity { cpus: 2.0, memory: 1 << 30, gpus: vec![], slots: 8 },
            ranks,
            checkpoints: vec![],
            draining: false,
            address: None,
            copies: None,
            labels: Default::default(),
            taints: Vec::new(),
        }),
    }
}

/// A node that others reach, and that gives and takes copies of checkpoints.
pub(super) fn reachable(name: &str, ranks: Vec<RankReport>) -> Event {
    let Event::NodeLinked { mut hello } = hello(name, ranks) else { unreachable!("it is a hello") };
    hello.address = Some("10.0.0.1".into());
    hello.copies = Some(CopyDoor { port: 1, certificate: String::new(), secret: String::new() });
    Event::NodeLinked { hello }
}

pub(super) fn alive(incarnation: Incarnation, pid: u32) -> RankReport {
    RankReport { incarnation, pid: Some(pid), started_at: None, generation: 0, exit: None, lost: false, beat: None }
}

pub(super) fn beat(incarnation: Incarnation, step: u64) -> Beat {
    Beat { incarnation: Some(incarnation), heartbeat: true, step: Some(step), total_steps: Some(100), ..Beat::default() }
}

pub(super) fn saved(job_n: u128, attempt: u32, step: u64) -> CheckpointNews {
    let kept = vec![step];
    let path = format!("/c/{step}");
    CheckpointNews { job: job(job_n), attempt, step, bytes: 10, created_at: Timestamp(1), verified: false, path, kept }
}

impl Scene {
    pub(super) fn new() -> Self {
        let engine = Engine::new(Config::default());
        Self { engine, now: Timestamp(0), told: String::new(), rows: Default::default(), blames: Default::default() }
    }

    /// With one node that has room for 8 ranks.
    pub(super) fn with_node() -> Self {
        let mut scene = Self::new();
        scene.at(0, hello("n1", vec![]));
        scene.take();
        scene
    }

    pub(super) fn at(&mut self, ms: u64, event: Event) -> &mut Self {
        assert!(ms >= self.now.0, "time goes forward");
        self.now = Timestamp(ms);
        let step = self.engine.handle(self.now, event);
        self.engine.check_all();
        self.note(step);
        self
    }

    pub(super) fn submit(&mut self, ms: u64, n: u128, spec: JobSpec) -> &mut Self {
        self.at(ms, Event::JobSubmitted { id: job(n), spec: Arc::new(spec), seed: 1, user: None, origin: Vec::new() })
    }

    pub(super) fn start_all(&mut self, ms: u64, n: u128, attempt: u32, world: u32) -> &mut Self {
        self.at(ms, Event::AttemptResumed { node: node("n1"), resumed: Resumed::from_nothing(job(n), attempt) });
        for r in 0..world {
            let started = Started { incarnation: rank(n, attempt, r), pid: 100 * attempt + r, at: Timestamp(ms) };
            self.at(ms, Event::RankStarted(started));
        }
        self
    }

    pub(super) fn exits(&mut self, ms: u64, incarnation: Incarnation, exit: RankExit) -> &mut Self {
        self.at(ms, Event::RankExited(Exited { incarnation, exit, lost: false }))
    }

    fn note(&mut self, step: Step) {
        let at = self.now.0;
        for row in step.record.jobs {
            let spec = row.spec.map(|s| serde_json::to_string(&*s).unwrap());
            let before = self.rows.remove(&row.id);
            let series = row.series.or(before.as_ref().and_then(|b| b.series.clone()));
            let listing = row.listing.or(before.as_ref().and_then(|b| b.listing.clone()));
            let spec = spec.or(before.map(|b| b.spec)).expect("the first row has the spec");
            if row.finished_at.is_none() {
                self.rows.insert(row.id, StoredJob { id: row.id, spec, body: row.body, ranks: row.ranks, series, listing });
            }
        }
        for (node, blames) in step.record.blames {
            self.blames.insert(node, serde_json::to_string(&blames).unwrap());
        }
        for event in step.record.events {
            let of = event.job.map(|j| format!("job {}: ", j.as_u128())).unwrap_or_default();
            writeln!(self.told, "{at} {of}{}: {}", event.event, event.reason).unwrap();
        }
        for command in step.commands {
            let said = match command {
                Command::Final { job, state, delete, .. } => {
                    format!("final job {} {state}{}", job.as_u128(), if delete { ", delete" } else { "" })
                }
                Command::KeepPostmortem { job, attempt } => format!("keep the post-mortem of job {} attempt {attempt}", job.as_u128()),
                Command::Tell { node, frame } => format!("{node} <- {}", frame_text(frame)),
            };
            writeln!(self.told, "{at}   {said}").unwrap();
        }
    }

    /// Everything that came of the events since the last call.
    pub(super) fn take(&mut self) -> String {
        std::mem::take(&mut self.told)
    }

    /// What came before a line that begins so is left out.
    pub(super) fn take_from(&mut self, start: &str) {
        let at = self.told.find(start).unwrap_or_else(|| panic!("nothing begins with {start}: {}", self.told));
        self.told.drain(..at);
    }

    pub(super) fn expect(&mut self, expected: expect_test::Expect) {
        expected.assert_eq(&self.take());
    }

    pub(super) fn summary(&self, n: u128) -> everlit_api::status::Summary {
        let job = self.engine.job(job(n)).expect("active");
        job.summary(self.now, self.engine.reason(job))
    }

    /// The coordinator dies and comes back with what was durable.
    pub(super) fn restart_coordinator(&mut self, ms: u64) {
        self.now = Timestamp(ms);
        let rows: Vec<StoredJob> = self.rows.values().cloned().collect();
        let row = |(id, blames): (&NodeId, &String)| StoredNode { id: id.clone(), cordoned: false, blames: Some(blames.clone()) };
        let nodes: Vec<StoredNode> = self.blames.iter().map(row).collect();
        self.engine = Engine::load(Config::default(), self.now, &rows, &nodes).expect("its own rows");
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.told, "", "outcomes that the scenario did not look at");
        }
    }
}

fn frame_text(frame: ToAgent) -> String {
    match frame {
        ToAgent::StartGang(gang) => {
            let resume = gang.resume_from.map(|r| format!(" resume_from {r:?}")).unwrap_or_default();
            let members = if gang.generation > 0 { format!(" membership {} {:?}", gang.generation, gang.seats) } else { String::new() };
            let spares = if gang.spares.is_empty() { String::new() } else { format!(" spares {:?}", gang.spares) };
            let fetch = gang.fetch.map(|f| {
                let from: Vec<_> = f.sources.iter().map(|source| source.node.0.as_str()).collect();
                format!(" fetch {} from {}{}", f.step, from.join(", "), if f.required { "" } else { " if it can" })
            });
            let fetch = fetch.unwrap_or_default();
            let stored = gang.stored.map(|s| format!(" or {} from {}{}", s.step, s.place, if s.required { "" } else { " if it must" }));
            let stored = stored.unwrap_or_default();
            format!(
                "start job {} attempt {} ranks {}+{} port {}{members}{spares}{resume}{fetch}{stored}",
                gang.job.as_u128(),
                gang.attempt,
                gang.first_rank,
                gang.count,
                gang.master_port
            )
        }
        ToAgent::StopGang { job, attempt, grace } => format!("stop job {} attempt {attempt} grace {grace}", job.as_u128()),
        ToAgent::Forget { incarnations } => {
            let names: Vec<_> = incarnations.iter().map(|i| format!("{}.{}.{}", i.job.as_u128(), i.attempt, i.rank)).collect();
            format!("forget {}", names.join(" "))
        }
        ToAgent::CopyCheckpoint(order) => {
            let from: Vec<_> = order.sources.iter().map(|source| source.node.0.as_str()).collect();
            format!("copy step {} of job {} from {}", order.step, order.job.as_u128(), from.join(", "))
        }
        ToAgent::PutAside { job, attempt, beyond } => format!("put aside attempt {attempt} of job {} beyond {beyond:?}", job.as_u128()),
        ToAgent::JobEnded { job } => format!("job {} ended", job.as_u128()),
        other => format!("{other:?}"),
    }
}
