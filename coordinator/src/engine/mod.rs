//! The engine decides: what happened goes in with the time, what to record and what to do comes out. Nothing else happens here.
//!
//! Architecture invariant: no I/O, no clock, no threads, no unordered iteration, no randomness but each job's seed. `clippy.toml` names
//! what is banned and the attributes below deny it. Handlers are named for what happened, choices (`plan_*`, `decide_*`) are pure and
//! return their reason. News about an attempt that is not the current one is dropped in one place, `Engine::current`.
#![deny(clippy::disallowed_types, clippy::disallowed_methods)]

use std::collections::{BTreeMap, BTreeSet};

use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_api::store::Trouble;
use everlit_api::time::Timestamp;

mod archives;
mod beats;
mod blame;
mod checkpoint;
mod clocks;
pub mod command;
mod copies;
mod data;
mod elastic;
pub mod event;
mod explain;
mod gang;
mod gpu;
mod in_place;
mod invariants;
mod job;
mod ladder;
pub mod ledger;
pub mod limits;
mod node;
mod own_words;
pub mod placement;
mod policy;
mod preempt;
pub mod progress;
pub mod queue;
pub mod rank_restart;
pub mod restart;
mod room;
mod schedule;
pub mod slow;
mod snapshot;
pub mod state;
#[cfg(test)]
mod tests;
pub mod timers;
pub mod uploads;
mod view;

pub use blame::{Blame, Held};
pub use checkpoint::CannotSave;
pub use command::{Command, EventRow, JobRow, Record, Step};
pub use event::Event;
pub use gpu::GpuBlame;
pub use snapshot::{StoredJob, StoredNode, read_job};

use limits::CHECK_ALL_MS;
use placement::Node;
use queue::Queue;
use state::{Facts, Job};
use timers::{Timer, Timers};

/// What a user may set.
#[derive(Debug, Clone)]
pub struct Config {
    /// Silence after which a node counts as lost.
    pub node_timeout_ms: u64,
    /// First and last port for `MASTER_PORT`.
    pub ports: (u16, u16),
    /// Bytes of log kept for a job on one node.
    pub log_bytes_max: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { node_timeout_ms: 10_000, ports: (29_500, 29_999), log_bytes_max: limits::LOG_BYTES_MAX }
    }
}

/// Everything that is active.
#[derive(Debug)]
pub struct Engine {
    config: Config,
    jobs: BTreeMap<JobId, Job>,
    nodes: BTreeMap<NodeId, Node>,
    queue: Queue,
    timers: Timers,
    ports: BTreeSet<u16>,
    next_port: u16,
    /// Jobs whose gang has places for fewer ranks than were asked for.
    short: BTreeSet<JobId>,
    /// Jobs that hold places.
    placed: BTreeSet<JobId>,
    /// What the last look at the queue left behind.
    pass: schedule::Pass,
    /// News of a past incarnation that was dropped.
    stale: u64,
    /// What nodes said of ranks and files that are not theirs.
    foreign: u64,
    last_uploads: uploads::LastUploads,
    last_archives: archives::LastArchives,
    /// Logs that were put in stores since the start, and their bytes.
    archives: u64,
    archive_bytes: u64,
    /// Checkpoints that were put in stores since the start, their bytes, and faults by kind.
    uploads: u64,
    upload_bytes: u64,
    store_faults: BTreeMap<Trouble, u64>,
}

/// The event under way: when, and what comes of it.
struct Turn {
    now: Timestamp,
    step: Step,
    touched: BTreeSet<JobId>,
    /// Processes whose start this turn has ordered: no agent can name them yet.
    ordered: BTreeSet<Incarnation>,
}

impl Turn {
    fn event(&mut self, job: Option<JobId>, event: &'static str, reason: impl Into<String>, facts: Facts) {
        let data = serde_json::to_value(facts).unwrap_or_default();
        self.step.record.events.push(EventRow { job, time: self.now, event, reason: reason.into(), data });
    }

    fn tell(&mut self, node: &NodeId, frame: everlit_api::agent::ToAgent) {
        self.step.commands.push(Command::Tell { node: node.clone(), frame });
    }
}

impl Engine {
    /// Nothing yet.
    pub fn new(config: Config) -> Self {
        let next_port = config.ports.0;
        Self {
            config,
            jobs: BTreeMap::new(),
            nodes: BTreeMap::new(),
            queue: Queue::default(),
            timers: Timers::default(),
            ports: BTreeSet::new(),
            next_port,
            short: BTreeSet::new(),
            placed: BTreeSet::new(),
            pass: schedule::Pass::default(),
            stale: 0,
            foreign: 0,
            last_uploads: BTreeMap::new(),
            last_archives: BTreeMap::new(),
            archives: 0,
            archive_bytes: 0,
            uploads: 0,
            upload_bytes: 0,
            store_faults: BTreeMap::new(),
        }
    }

    /// One event, at one time.
    pub fn handle(&mut self, now: Timestamp, event: Event) -> Step {
        let mut turn = Turn { now, step: Step::default(), touched: BTreeSet::new(), ordered: BTreeSet::new() };
        self.dispatch(&mut turn, event);
        self.run_timers(&mut turn);
        self.finish(turn)
    }

    fn dispatch(&mut self, turn: &mut Turn, event: Event) {
        match event {
            Event::JobSubmitted { id, spec, seed, user, origin } => self.on_job_submitted(turn, id, spec, (seed, user), origin),
            Event::StopRequested { job, force, delete } => self.on_stop_requested(turn, job, force, delete),
            Event::RestartRequested { job } => self.on_restart_requested(turn, job),
            Event::SaveRequested { job } => self.on_save_requested(turn, job),
            Event::NodeLinked { hello } => self.on_node_linked(turn, *hello),
            Event::NodeUnlinked { node } => self.on_node_unlinked(turn, &node),
            Event::NodeReported { node, load } => self.on_node_reported(turn, &node, load),
            Event::CordonRequested { node, cordoned } => self.on_cordon_requested(turn, &node, cordoned),
            Event::NodeDraining { node, cordon, deadline } => self.on_node_draining(turn, &node, cordon, deadline),
            Event::NodeExpelled { node, force } => self.on_node_expelled(turn, &node, force),
            Event::RankStarted(started) => self.on_rank_started(turn, &started),
            Event::RankExited(exited) => self.on_rank_exited(turn, exited),
            Event::RanksBeat(beats) => self.on_ranks_beat(turn, beats),
            Event::RankJudged { incarnation, verdict, age_ms, stacks } => self.on_rank_judged(turn, incarnation, verdict, age_ms, stacks),
            Event::AttemptResumed { node, resumed } => self.on_attempt_resumed(turn, &node, resumed),
            Event::CheckpointSeen { node, news } => self.on_checkpoint_seen(turn, &node, news),
            Event::CheckpointQuarantined { node, job, step, reason } => self.on_checkpoint_quarantined(turn, &node, job, step, &reason),
            Event::CopyFailed { node, job, step, reason } => self.on_copy_failed(turn, &node, job, step, &reason),
            Event::Uploaded { node, done } => self.on_uploaded(turn, &node, &done),
            Event::LogsArchived { node, done } => self.on_logs_archived(turn, &node, &done),
            Event::PostmortemKept { job, attempt, outcome } => self.on_postmortem_kept(turn, job, attempt, outcome),
            Event::StoreFault { node, fault } => self.on_store_fault(turn, &node, &fault),
            Event::DataListed { node, listed } => self.on_data_listed(turn, &node, listed),
            Event::DataTurned { node, news } => self.on_data_turned(turn, &node, &news),
            Event::SaveFailed { incarnation, error } => self.on_save_failed(turn, incarnation, error),
            Event::StartFailed { node, job, attempt, reason, permanent } => {
                self.on_start_failed(turn, &node, (job, attempt), reason, permanent);
            }
            Event::GpuFailed { node, error } => self.on_gpu_failed(turn, &node, error),
            Event::GpuHeld { job, attempt, holders } => self.on_gpu_held(turn, job, attempt, &holders),
            Event::Said { node, event } => self.on_said(turn, &node, *event),
            Event::Woke => {}
        }
    }

    fn run_timers(&mut self, turn: &mut Turn) {
        while let Some(timer) = self.timers.pop_due(turn.now) {
            match timer {
                Timer::Retry(job) => self.on_retry_due(turn, job),
                Timer::RankRetry(job, rank) => self.on_rank_retry_due(turn, job, rank),
                Timer::Regroup(job) => self.on_regroup_due(turn, job),
                Timer::Grow(job) => self.on_grow_due(turn, job),
                Timer::Copies(job) => self.copy_newest(turn, job),
                Timer::Straggler(job) => self.on_straggler_due(turn, job),
                Timer::TimeLimit(job) => self.on_time_limit_due(turn, job),
                Timer::NodeLost(node) => self.on_node_lost(turn, &node),
                Timer::Blames(node) => self.on_blames_due(turn, &node),
                Timer::CheckAll => {
                    self.check_all();
                    self.timers.set(Timer::CheckAll, Timestamp(turn.now.0 + CHECK_ALL_MS));
                }
            }
        }
    }

    /// Rows of what was touched, after it was checked; final jobs leave.
    fn finish(&mut self, mut turn: Turn) -> Step {
        for id in std::mem::take(&mut turn.touched) {
            self.check_job(id);
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            let fresh =
                job.submitted_at == turn.now && turn.step.record.events.iter().any(|e| e.job == Some(id) && e.event == "job_submitted");
            turn.step.record.jobs.push(job.make_row(turn.now, fresh));
            if job.state.is_final() {
                let (state, delete, nodes) = (job.state, job.delete_when_final, job.keepers());
                turn.step.commands.push(Command::Final { job: id, state, nodes, delete });
                self.timers.clear_job(id);
                if let Some(job) = self.jobs.remove(&id) {
                    self.await_last_archives(&job);
                }
            }
        }
        turn.step
    }

    /// When it wants to be woken.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        self.timers.next()
    }

    /// An active job.
    pub fn job(&self, id: JobId) -> Option<&Job> {
        self.jobs.get(&id)
    }

    /// Every active job, oldest first.
    pub fn jobs(&self) -> impl DoubleEndedIterator<Item = &Job> {
        self.jobs.values()
    }

    /// Every node, in name order.
    pub fn nodes(&self) -> &BTreeMap<NodeId, Node> {
        &self.nodes
    }

    /// Jobs that wait for a place.
    pub fn queue_depth(&self) -> usize {
        self.queue.depth()
    }

    /// News of past incarnations that were dropped since the start.
    pub fn stale_news(&self) -> u64 {
        self.stale
    }
}
