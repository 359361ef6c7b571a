//! A job as the engine holds it. What is serialized is what a restart needs; what ranks do right now is told again by their agents.
//!
//! The trap: `Job::ranks` is not in the row of an active job. After a restart every rank is `Pending` until its node's `Hello`.

use std::collections::BTreeMap;
use std::sync::Arc;

use everlit_api::data::ListedShard;
use everlit_api::gpu::GpuError;
use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_api::job::JobSpec;
use everlit_api::manifest::Phase;
use everlit_api::rank::{Cause, RankExit, RankState};
use everlit_api::status::{CheckpointView, JobState, PlacedRanks};
use everlit_api::store::Lineage;
use everlit_api::time::Timestamp;
use serde::{Deserialize, Serialize};

use super::copies::Copying;
use super::ledger::Book;
use super::progress::{Progress, Rates, Series};
use super::rank_restart::RankRestart;
use super::slow::Slowness;
use super::uploads::Uploading;

/// Version of a job's row. A row of a later version is refused at start.
pub const ROW_VERSION: u32 = 1;

/// A job.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Job {
    /// [`ROW_VERSION`].
    pub version: u32,
    /// Which.
    #[serde(skip)]
    pub id: JobId,
    /// What was submitted.
    #[serde(skip)]
    pub spec: Arc<JobSpec>,
    /// What its ranks do; empty before the first attempt.
    #[serde(skip)]
    pub ranks: Ranks,
    /// Recent speed.
    #[serde(skip)]
    pub rates: Rates,
    /// Who holds the others up.
    #[serde(skip)]
    pub slowness: Slowness,
    /// Loss over steps, thinned out; in a column of its own, written at most once a minute.
    #[serde(skip)]
    pub series: Series,
    /// What its data in a store is, once that was listed; in a column of its own, written once.
    #[serde(skip)]
    pub listing: Option<Listing>,
    /// When the series was last written.
    #[serde(skip)]
    pub series_kept_at: Timestamp,
    /// Whose token it was submitted with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// For everything random about this job.
    pub seed: u64,
    /// Where it is.
    pub state: JobState,
    /// Why, in one sentence.
    pub reason: String,
    /// When it was accepted.
    pub submitted_at: Timestamp,
    /// When its ranks first ran.
    pub started_at: Option<Timestamp>,
    /// When it became final.
    pub finished_at: Option<Timestamp>,
    /// Number of the last attempt, 0 before the first.
    pub attempt: u32,
    /// The highest attempt that a node told of: above `attempt` only where the store has lost what it said was durable.
    #[serde(default)]
    pub known_attempt: u32,
    /// The attempt that holds places and maybe processes.
    pub gang: Option<Gang>,
    /// A failed gang is brought back then; its places stay reserved.
    pub retry_at: Option<Timestamp>,
    /// To be removed once final.
    pub delete_when_final: bool,
    /// What it may still spend on restarts.
    pub budget: Budget,
    /// How far it got.
    pub progress: Progress,
    /// Attempts in a row that began from one place and ended without a step.
    #[serde(default)]
    pub failed_resumes: Option<FailedResumes>,
    /// Where its time went.
    pub book: Book,
    /// Newest first.
    pub checkpoints: Vec<CheckpointView>,
    /// Checkpoints of the job that it begins from, newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub origin: Vec<CheckpointView>,
    /// Every node that ever had files of it, in the order in which they came: it only grows at its end.
    pub nodes: Vec<NodeId>,
    /// Nodes that were told to keep copies of its checkpoints.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copies_on: Vec<NodeId>,
    /// What is being copied.
    #[serde(skip)]
    pub copying: Copying,
    /// What its attempts have left behind, for what is kept in its store.
    #[serde(default)]
    pub lineage: Lineage,
    /// Which node puts which step in its store.
    #[serde(skip)]
    pub uploading: Uploading,
    /// Nodes whose log is not in its store yet, as far as they have said, with the attempt up to whose end it is wanted.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub archiving: BTreeMap<NodeId, u32>,
    /// Where the ranks of the attempt before this one ran, or of the last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ran_on: Vec<PlacedRanks>,
    /// Nodes that it is kept from, by its `log_policies`; oldest first.
    #[serde(default)]
    pub excluded: Vec<NodeId>,
    /// Who took its places for a job of higher priority, and how many attempts that one had had; oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preempted: Vec<(JobId, u32)>,
    /// Its failures followed it to another node: they are held against none.
    #[serde(default)]
    pub fails_anywhere: bool,
}

/// What a job's data in a store was when it was listed.
#[derive(Debug, Clone)]
pub struct Listing {
    /// In order.
    pub shards: Arc<Vec<ListedShard>>,
    /// It is to be written.
    pub is_new: bool,
}

/// Attempts in a row that began from one place and ended without a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedResumes {
    /// The step that they began from.
    pub step: u64,
    /// From the snapshot in shared memory, not from a checkpoint.
    pub from_memory: bool,
    /// How many.
    pub count: u32,
}

/// The processes of one attempt.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Gang {
    /// From 1.
    pub attempt: u32,
    /// Membership of the process group, from 0.
    pub generation: u32,
    /// Where its ranks are.
    pub placement: Vec<PlacedRanks>,
    /// Leased for this attempt.
    pub port: u16,
    /// Where rank 0 is reached from other nodes; null with all ranks on one node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub master_addr: Option<String>,
    /// When it was placed.
    pub placed_at: Timestamp,
    /// When every rank ran; a node that lacks ranks after this has lost them.
    pub running_at: Option<Timestamp>,
    /// Step that it resumed from; null before its node has said so.
    pub resumed_step: Option<u64>,
    /// It resumed from a snapshot in shared memory.
    #[serde(default)]
    pub from_memory: bool,
    /// What each node of a gang on several resumes from, until all have said so.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub resumes: BTreeMap<NodeId, Option<u64>>,
    /// Highest step of the job when this attempt began: steps up to it are repeated.
    pub floor: u64,
    /// Why it is ending.
    pub ending: Option<Ending>,
    /// Seat of each rank, in rank order; empty while each rank has that of its own number.
    #[serde(default)]
    pub seats: Vec<u32>,
    /// Started ranks that wait.
    #[serde(default)]
    pub spares: Vec<Spare>,
    /// What the next process gets as its seat.
    #[serde(default)]
    pub next_seat: u32,
    /// The recovery in place that is under way.
    #[serde(default)]
    pub regroup: Option<Regroup>,
    /// Ranks that were restarted alone, or wait for it.
    #[serde(default)]
    pub restarts: BTreeMap<u32, RankRestart>,
}

/// A started rank that waits. What its process does is told again by its agent after a restart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spare {
    /// Its seat.
    pub seat: u32,
    /// Its own process id.
    #[serde(skip)]
    pub pid: Option<u32>,
    /// What it says it does.
    #[serde(skip)]
    pub phase: Option<Phase>,
    /// When its last heartbeat was seen.
    #[serde(skip)]
    pub beat_at: Option<Timestamp>,
    /// It says that it can take a rank's place right now.
    #[serde(skip)]
    pub is_ready: bool,
}

/// A recovery in place that is under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Regroup {
    /// The rank that left or joined.
    pub rank: u32,
    /// When.
    pub since: Timestamp,
    /// What had happened to it.
    pub cause: Cause,
    /// What the gang became.
    #[serde(default)]
    pub change: Change,
}

/// What a membership is to the one before it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Another process has a lost rank's place.
    #[default]
    Replaced,
    /// The others go on without it; the last rank took its number.
    Shrunk,
    /// A process joined as the last rank.
    Grown,
}

/// What a process of the current attempt is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A member.
    Rank(u32),
    /// It waits.
    Spare,
    /// It was a member, and another has its place.
    Former,
}

impl Gang {
    /// Ranks that places are held for.
    pub fn placed(&self) -> u32 {
        self.placement.iter().map(|share| share.count).sum()
    }

    /// Ranks in the current membership.
    pub fn size(&self) -> u32 {
        if self.seats.is_empty() { self.placed() } else { self.seats.len() as u32 }
    }

    /// Ranks of the current membership in a share. Only a gang on one node ever has fewer than it has places.
    pub fn count_in(&self, share: &PlacedRanks) -> u32 {
        if self.placement.len() == 1 { self.size() } else { share.count }
    }

    /// Its ranks are on more than one node.
    pub fn is_spread(&self) -> bool {
        self.placement.len() > 1
    }

    /// It is ending, and gives its places back when it has.
    pub fn is_leaving(&self) -> bool {
        self.ending.as_ref().is_some_and(|ending| matches!(ending.then, Then::Requeue | Then::Fail | Then::Stop))
    }

    /// The seat of a rank.
    pub fn seat(&self, rank: u32) -> u32 {
        self.seats.get(rank as usize).copied().unwrap_or(rank)
    }

    /// What the process on a seat is now.
    pub fn role(&self, seat: u32) -> Role {
        if self.spares.iter().any(|spare| spare.seat == seat) {
            return Role::Spare;
        }
        let began = self.seats.is_empty() && seat < self.placed();
        if began || self.seats.get(seat as usize) == Some(&seat) {
            return Role::Rank(seat);
        }
        // Few ranks ever change their seat, and only those are looked for.
        self.seats.iter().position(|own| *own == seat).map_or(Role::Former, |rank| Role::Rank(rank as u32))
    }

    /// Incarnations of all ranks in a share.
    pub fn incarnations<'a>(&'a self, job: JobId, share: &'a PlacedRanks) -> impl Iterator<Item = Incarnation> + 'a {
        let ranks = share.first_rank..share.first_rank + self.count_in(share);
        ranks.map(move |rank| Incarnation { job, attempt: self.attempt, rank: self.seat(rank) })
    }
}

/// Why an attempt is ending, decided once; a user's stop overrides a failure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ending {
    /// What follows.
    pub then: Then,
    /// When it was decided.
    pub at: Timestamp,
    /// The rank that failed first.
    pub rank: Option<u32>,
    /// For the budget.
    pub cause: Option<Cause>,
    /// In one sentence.
    pub reason: String,
    /// What lives then is killed, however often and late its nodes are told; null: each time they are told its job's whole grace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
}

impl Ending {
    /// Nobody has longer than until then.
    pub fn limit(&mut self, at: Timestamp) {
        self.deadline = Some(self.deadline.map_or(at, |before| before.min(at)));
    }
}

/// What follows an attempt that ends before its time, the weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Then {
    /// Budget and backoff decide.
    Judge,
    /// A new attempt at once.
    Again,
    /// Back in the queue.
    Requeue,
    /// Final: failed.
    Fail,
    /// Final: stopped.
    Stop,
}

/// What a job has spent on restarts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// Restarts after failures, counted or free; never goes down.
    pub restarts: u32,
    /// Counted against `max_restarts`; forgiven after `heal_after` of committed progress.
    pub counted: u32,
    /// Counted failures in a row without a new step.
    pub start_failures: u32,
    /// Failures of any cause in a row without a new step: the backoff's exponent.
    pub failures_in_a_row: u32,
    /// When the last failure was.
    pub last_failure_at: Option<Timestamp>,
}

/// The ranks of the current or last attempt, with counters kept beside them.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Ranks {
    list: Vec<Rank>,
    alive: u32,
    ended: u32,
    succeeded: u32,
}

/// One rank.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rank {
    /// Where it is in its life.
    pub state: RankState,
    /// Its own process id.
    pub pid: Option<u32>,
    /// How it ended.
    pub exit: Option<RankExit>,
    /// What it says it does.
    pub phase: Option<Phase>,
    /// Updates done by this incarnation's count.
    pub step: Option<u64>,
    /// When its last heartbeat was seen.
    pub beat_at: Option<Timestamp>,
    /// It saves when told to.
    #[serde(default)]
    pub saves_on_signal: bool,
    /// Step of the last save that it said has failed, and when that was recorded.
    #[serde(default)]
    pub save_failed: Option<(u64, Timestamp)>,
    /// Whether it can go on with others in place of lost ranks; null before it has tried.
    #[serde(default)]
    pub in_place: Option<bool>,
    /// The membership in which it has done a step.
    #[serde(default)]
    pub stepped_in: Option<u32>,
}

impl Default for Rank {
    fn default() -> Self {
        let state = RankState::Pending;
        Self {
            state,
            pid: None,
            exit: None,
            phase: None,
            step: None,
            beat_at: None,
            saves_on_signal: false,
            save_failed: None,
            in_place: None,
            stepped_in: None,
        }
    }
}

impl Ranks {
    /// A fresh gang.
    pub fn pending(world_size: u32) -> Self {
        Self { list: vec![Rank::default(); world_size as usize], ..Self::default() }
    }

    /// All, in rank order.
    pub fn list(&self) -> &[Rank] {
        &self.list
    }

    /// One.
    pub fn get(&self, rank: u32) -> Option<&Rank> {
        self.list.get(rank as usize)
    }

    /// One, for news that does not change its state.
    pub fn get_mut(&mut self, rank: u32) -> Option<&mut Rank> {
        self.list.get_mut(rank as usize)
    }

    /// Its process lives; false when that was known, or it has ended already.
    pub fn start(&mut self, rank: u32, pid: u32) -> bool {
        let Some(own) = self.list.get_mut(rank as usize) else { return false };
        if own.pid.is_some() || own.exit.is_some() {
            return false;
        }
        own.state = RankState::Running;
        own.pid = Some(pid);
        self.alive += 1;
        true
    }

    /// It ended; false when that was known.
    pub fn end(&mut self, rank: u32, exit: RankExit, lost: bool) -> bool {
        let Some(own) = self.list.get_mut(rank as usize) else { return false };
        if own.exit.is_some() {
            return false;
        }
        if own.pid.take().is_some() {
            self.alive -= 1;
        }
        self.ended += 1;
        self.succeeded += u32::from(exit.is_success() && !lost);
        own.state = if lost { RankState::Lost } else { RankState::Exited };
        own.exit = Some(exit);
        true
    }

    /// A rank that ended: what its GPU had was heard of only after it.
    pub fn note_gpu_error(&mut self, rank: u32, error: Option<GpuError>) {
        if let Some(exit) = self.list.get_mut(rank as usize).and_then(|own| own.exit.as_mut())
            && exit.gpu_error.is_none()
        {
            exit.gpu_error = error;
        }
    }

    /// Another process takes a rank's place; `pid`: it lives already.
    pub fn replace(&mut self, rank: u32, pid: Option<u32>) {
        let Some(own) = self.list.get_mut(rank as usize) else { return };
        let old = std::mem::take(own);
        self.alive -= u32::from(old.pid.is_some());
        self.ended -= u32::from(old.exit.is_some());
        self.succeeded -= u32::from(old.state != RankState::Lost && old.exit.as_ref().is_some_and(RankExit::is_success));
        if let Some(pid) = pid {
            self.start(rank, pid);
        }
    }

    /// A rank leaves, and the last one takes its number.
    pub fn remove(&mut self, rank: u32) {
        self.replace(rank, None);
        if (rank as usize) < self.list.len() {
            self.list.swap_remove(rank as usize);
        }
    }

    /// A process that lives joins as the last rank.
    pub fn join(&mut self, pid: Option<u32>) {
        self.list.push(Rank::default());
        if let Some(pid) = pid {
            self.start(self.list.len() as u32 - 1, pid);
        }
    }

    /// Every rank that lives is being stopped.
    pub fn mark_stopping(&mut self) {
        for own in self.list.iter_mut().filter(|r| r.state == RankState::Running) {
            own.state = RankState::Stopping;
        }
    }

    /// After a restart in mid-wait: the record says that every rank had ended, not how.
    pub fn mark_all_ended(&mut self, at: Timestamp) {
        let exit = RankExit {
            code: None,
            signal: None,
            error: Some("ended before the coordinator's restart".into()),
            at,
            tail: Vec::new(),
            message: None,
            matched: None,
            out_of_memory: false,
            gpu_error: None,
        };
        for rank in 0..self.list.len() as u32 {
            self.end(rank, exit.clone(), false);
        }
    }

    /// Ranks with a living process.
    pub fn alive(&self) -> u32 {
        self.alive
    }

    /// Every rank's process lives, or has lived.
    pub fn all_started(&self) -> bool {
        (self.alive + self.ended) as usize == self.list.len()
    }

    /// Every rank ended.
    pub fn all_ended(&self) -> bool {
        self.ended as usize == self.list.len()
    }

    /// Some rank exited 0.
    pub fn some_succeeded(&self) -> bool {
        self.succeeded > 0
    }

    /// The first that did not exit 0, in the kernel's order.
    pub fn first_failure(&self) -> Option<(u32, &RankExit)> {
        let failed = self.list.iter().enumerate().filter_map(|(n, r)| Some((n as u32, r.exit.as_ref()?)));
        failed.filter(|(rank, exit)| !exit.is_success() || self.is_lost(*rank)).min_by_key(|(rank, exit)| (exit.at, *rank))
    }

    fn is_lost(&self, rank: u32) -> bool {
        self.get(rank).is_some_and(|r| r.state == RankState::Lost)
    }

    /// The counters say what the list says.
    pub fn is_consistent(&self) -> bool {
        let count = |f: fn(&Rank) -> bool| self.list.iter().filter(|r| f(r)).count() as u32;
        self.alive == count(|r| r.pid.is_some())
            && self.ended == count(|r| r.exit.is_some())
            && self.succeeded == count(|r| r.state != RankState::Lost && r.exit.as_ref().is_some_and(RankExit::is_success))
            && count(|r| r.pid.is_some() && r.exit.is_some()) == 0
    }
}

impl Job {
    /// The node that holds a rank of the current attempt.
    pub fn node_of(&self, rank: u32) -> Option<&NodeId> {
        node_in(&self.gang.as_ref()?.placement, rank)
    }

    /// The node that holds a rank, or did when it ended.
    pub fn node_or_last_of(&self, rank: u32) -> Option<&NodeId> {
        node_in(self.gang.as_ref().map_or(&self.ran_on, |gang| &gang.placement), rank)
    }

    /// Its next attempt's number, which no attempt ever had.
    pub fn next_attempt(&self) -> u32 {
        self.attempt.max(self.known_attempt) + 1
    }
}

fn node_in(placement: &[PlacedRanks], rank: u32) -> Option<&NodeId> {
    // Shares are in rank order (INV-9).
    let at = placement.partition_point(|share| share.first_rank + share.count <= rank);
    placement.get(at).filter(|share| share.first_rank <= rank).map(|share| &share.node)
}

/// Facts of an event, by name.
pub type Facts = BTreeMap<&'static str, serde_json::Value>;

#[cfg(test)]
mod tests {
    use super::*;

    fn done(code: i32) -> RankExit {
        RankExit {
            code: Some(code),
            signal: None,
            error: None,
            at: Timestamp(5),
            tail: Vec::new(),
            message: None,
            matched: None,
            out_of_memory: false,
            gpu_error: None,
        }
    }

    #[test]
    fn ranks_are_counted_however_they_come_and_go() {
        let mut ranks = Ranks::pending(3);
        assert!(ranks.is_consistent() && !ranks.all_started());
        ranks.start(0, 10);
        ranks.start(1, 11);
        assert!(!ranks.all_started());
        ranks.start(2, 12);
        assert!(ranks.all_started() && ranks.end(1, done(0), false) && ranks.end(2, done(0), true));
        assert!(ranks.all_started() && ranks.is_consistent() && ranks.some_succeeded());
        assert_eq!((ranks.alive(), ranks.ended, ranks.succeeded), (1, 2, 1), "one was lost");
        assert_eq!(ranks.first_failure().map(|(rank, _)| rank), Some(2), "a lost one has failed");
        // One that succeeded, one that was lost, one that lives: each gives its place.
        ranks.replace(1, None);
        assert_eq!((ranks.alive(), ranks.ended, ranks.succeeded), (1, 1, 0));
        ranks.replace(2, Some(13));
        assert_eq!((ranks.alive(), ranks.ended, ranks.succeeded), (2, 0, 0));
        ranks.remove(0);
        assert_eq!((ranks.list().len(), ranks.get(0).and_then(|own| own.pid), ranks.alive()), (2, Some(13), 1));
        ranks.remove(2);
        assert_eq!(ranks.list().len(), 2, "there is no such rank");
        ranks.join(Some(14));
        ranks.join(None);
        assert_eq!((ranks.list().len(), ranks.alive()), (4, 2));
        assert!(ranks.is_consistent());
    }

    #[test]
    fn a_counter_that_is_off_is_seen() {
        let mut ranks = Ranks::pending(2);
        ranks.start(0, 10);
        ranks.end(0, done(0), false);
        for spoil in [|own: &mut Ranks| own.alive += 1, |own: &mut Ranks| own.ended += 1, |own: &mut Ranks| own.succeeded += 1] {
            let mut other = ranks.clone();
            spoil(&mut other);
            assert!(!other.is_consistent());
        }
        let mut both = ranks;
        both.list[0].pid = Some(10);
        both.alive = 1;
        assert!(!both.is_consistent(), "it lives and has ended");
    }
}
