//! The production engine, driven in virtual time: facts of the simulated gang go in, its orders come out. All that the simulator knows of
//! the engine is in this file.
//!
//! The engine places a gang on one node today, so the whole cluster is one node to it and a lost machine is the loss of the ranks there; when
//! machines are missing, that node takes no ranks, and the job waits in the engine's own queue. Only what a decision needs is told: no
//! periodic heartbeats. Ranks may stand for many (`ranks` below the job's): the engine ends and restarts a gang as a whole.

use std::sync::Arc;

use everlit_api::agent::{Beat, CheckpointNews, Exited, Hello, PROTOCOL, Resumed, Started, ToAgent};
use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_api::job::{JobSpec, RestartPolicy, RestartScope};
use everlit_api::manifest::Phase;
use everlit_api::rank::{RankExit, Verdict};
use everlit_api::status::{Capacity, JobState, Ledger};
use everlit_api::time::Timestamp;

use super::kinds::{Seen, Takes};
use super::scenario::Policy;
use crate::engine::{Command, Config, Engine, Event, Step};

/// Wall clocks of the simulation begin here.
const EPOCH_MS: u64 = 1_800_000_000_000;

/// What the engine wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Order {
    /// Start the gang; the number of the attempt.
    Start(u32),
    /// Stop every rank, at once or with grace.
    Stop {
        /// At once.
        kill: bool,
    },
    /// The job has failed.
    GivenUp(String),
}

/// What the job waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// Nothing.
    None,
    /// The time before the next attempt.
    Backoff,
    /// A place.
    Place,
    /// It is over.
    Over,
}

/// A failure as the agent tells of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Failure {
    /// Whose rank.
    pub rank: u32,
    /// What went with it.
    pub takes: Takes,
    /// How it was seen.
    pub seen: Seen,
    /// When it came.
    pub at: u64,
}

/// The engine with one job.
#[derive(Debug)]
pub(super) struct Driven {
    engine: Engine,
    job: JobId,
    node: NodeId,
    ranks: u32,
    attempt: u32,
    started: bool,
    /// Events that it was given.
    pub events: u64,
    now: u64,
}

impl Driven {
    /// A cluster as one node, and a job on it.
    pub(super) fn new(policy: &Policy, ranks: u32, seed: u64) -> (Self, Vec<Order>) {
        let node = NodeId("cluster".into());
        let job = JobId::from_parts(EPOCH_MS, u128::from(seed));
        let engine = Engine::new(Config::default());
        let mut own = Self { engine, job, node: node.clone(), ranks, attempt: 0, started: false, events: 0, now: 0 };
        let capacity = Capacity { cpus: 1e9, memory: 1 << 60, gpus: Vec::new(), slots: ranks };
        let hello = Hello {
            protocol: PROTOCOL,
            node,
            boot_id: "simulated".into(),
            version: "simulated".into(),
            pid: 1,
            capacity,
            ranks: Vec::new(),
            checkpoints: Vec::new(),
            draining: false,
            address: None,
            copies: None,
            labels: Default::default(),
            taints: Vec::new(),
        };
        let mut orders = own.feed(Event::NodeLinked { hello: Box::new(hello) });
        let mut spec = JobSpec::default_for(ranks);
        // Recovery in place is decided beside the engine (`ladder`): here it only ever restarts the gang.
        spec.restart = RestartPolicy { scope: RestartScope::Gang, ..policy.restart.clone() };
        spec.stop_grace = policy.stop_grace;
        orders.extend(own.feed(Event::JobSubmitted { id: job, spec: Arc::new(spec), seed, user: None, origin: Vec::new() }));
        (own, orders)
    }

    /// Time goes on.
    pub(super) fn set_now(&mut self, now: u64) {
        self.now = now;
    }

    /// When the engine wants to be woken.
    pub(super) fn wakes_at(&self) -> Option<u64> {
        self.engine.next_deadline().map(|at| at.0.saturating_sub(EPOCH_MS))
    }

    fn at(&self, ms: u64) -> Timestamp {
        Timestamp(EPOCH_MS + ms)
    }

    fn feed(&mut self, event: Event) -> Vec<Order> {
        self.events += 1;
        let step = self.engine.handle(self.at(self.now), event);
        self.read(step)
    }

    fn read(&mut self, step: Step) -> Vec<Order> {
        let mut orders = Vec::new();
        for command in step.commands {
            match command {
                Command::Tell { frame: ToAgent::StartGang(gang), .. } => {
                    self.attempt = gang.attempt;
                    self.started = false;
                    orders.push(Order::Start(gang.attempt));
                }
                Command::Tell { frame: ToAgent::StopGang { grace, .. }, .. } => orders.push(Order::Stop { kill: grace.0 == 0 }),
                Command::Tell { .. } | Command::KeepPostmortem { .. } => {}
                Command::Final { .. } => {
                    let why = step.record.events.iter().find(|event| event.event == "job_final");
                    orders.push(Order::GivenUp(why.map(|event| event.reason.clone()).unwrap_or_default()));
                }
            }
        }
        orders
    }

    fn incarnation(&self, rank: u32) -> Incarnation {
        Incarnation { job: self.job, attempt: self.attempt, rank }
    }

    /// Every rank's process lives, and they start from this step; `None` from nothing.
    pub(super) fn group(&mut self, step: Option<u64>, from_memory: bool) -> Vec<Order> {
        let mut orders = Vec::new();
        self.started = true;
        for rank in 0..self.ranks {
            let started = Started { incarnation: self.incarnation(rank), pid: rank + 1, at: self.at(self.now) };
            orders.extend(self.feed(Event::RankStarted(started)));
        }
        let (job, attempt) = (self.job, self.attempt);
        let resumed = Resumed { step, path: step.map(|_| "simulated".into()), from_memory, ..Resumed::from_nothing(job, attempt) };
        orders.extend(self.feed(Event::AttemptResumed { node: NodeId("cluster".into()), resumed }));
        orders
    }

    /// Every rank has done this step.
    pub(super) fn steps(&mut self, step: u64) -> Vec<Order> {
        let beat = |rank| self.beat(rank, Phase::Train, step);
        let beats = (0..self.ranks).map(beat).collect();
        self.feed(Event::RanksBeat(beats))
    }

    /// Steps are blocked by a save, or no longer; rank 0 tells.
    pub(super) fn saving(&mut self, on: bool, step: u64) -> Vec<Order> {
        let beat = self.beat(0, if on { Phase::Checkpoint } else { Phase::Train }, step);
        self.feed(Event::RanksBeat(vec![beat]))
    }

    fn beat(&self, rank: u32, phase: Phase, step: u64) -> Beat {
        let incarnation = Some(self.incarnation(rank));
        Beat { incarnation, heartbeat: true, phase: Some(phase), step: Some(step), ..Beat::default() }
    }

    /// A checkpoint is committed.
    pub(super) fn committed(&mut self, step: u64) -> Vec<Order> {
        let news = CheckpointNews {
            job: self.job,
            attempt: self.attempt,
            step,
            bytes: 1,
            created_at: self.at(self.now),
            verified: false,
            path: "simulated".into(),
            kept: vec![step],
        };
        self.feed(Event::CheckpointSeen { node: self.node.clone(), news })
    }

    /// A rank failed.
    pub(super) fn fail(&mut self, failure: Failure) -> Vec<Order> {
        let incarnation = self.incarnation(failure.rank);
        if failure.seen == Seen::Hang && self.started {
            let age_ms = self.now.saturating_sub(failure.at);
            return self.feed(Event::RankJudged { incarnation, verdict: Verdict::Stuck, age_ms, stacks: Vec::new() });
        }
        let lost = failure.takes == Takes::Machine;
        self.feed(Event::RankExited(Exited { incarnation, exit: self.exit((!lost).then_some(1), None, failure.at), lost }))
    }

    fn exit(&self, code: Option<i32>, signal: Option<i32>, at: u64) -> RankExit {
        let error = (code.is_none() && signal.is_none()).then(|| "its machine is gone".into());
        RankExit {
            code,
            signal,
            error,
            at: self.at(at),
            tail: Vec::new(),
            message: None,
            matched: None,
            out_of_memory: false,
            gpu_error: None,
        }
    }

    /// Every rank has ended.
    pub(super) fn ended(&mut self) -> Vec<Order> {
        let mut orders = Vec::new();
        let attempt = self.attempt;
        for rank in 0..self.ranks {
            let incarnation = Incarnation { job: self.job, attempt, rank };
            let exit = self.exit(None, Some(15), self.now);
            orders.extend(self.feed(Event::RankExited(Exited { incarnation, exit, lost: false })));
        }
        orders
    }

    /// A planned stop: the gang is to be restarted.
    pub(super) fn restart(&mut self) -> Vec<Order> {
        self.feed(Event::RestartRequested { job: self.job })
    }

    /// Machines are missing, or no longer.
    pub(super) fn missing(&mut self, missing: bool) -> Vec<Order> {
        self.feed(Event::CordonRequested { node: self.node.clone(), cordoned: missing })
    }

    /// Time has passed.
    pub(super) fn wake(&mut self) -> Vec<Order> {
        self.feed(Event::Woke)
    }

    /// What the job waits for.
    pub(super) fn waits_for(&self) -> Wait {
        match self.engine.job(self.job) {
            None => Wait::Over,
            Some(job) if job.state == JobState::Queued => Wait::Place,
            Some(job) if job.retry_at.is_some() => Wait::Backoff,
            Some(_) => Wait::None,
        }
    }

    /// The engine's own book, while the job is active.
    pub(super) fn ledger(&self) -> Option<Ledger> {
        self.engine.job(self.job).map(|job| job.book.totals(self.at(self.now)))
    }
}
