//! Nodes that are suspected (their GPUs: `gpu`): failures that may be the machine's are held against the node of the rank that failed first, for a day.
//!
//! A suspected node is avoided, never forbidden: where no other has room, everything goes on there. What a program does to itself must not be
//! held against a machine: plain exit codes count only with words of drivers and kernels, and a job whose failures follow it to another node
//! takes back what it had brought against any. A user who uncordons a node says that it is well.

use everlit_api::ids::{JobId, NodeId};
use everlit_api::rank::{Cause, RankExit};
use everlit_api::status::PlacedRanks;
use everlit_api::time::Timestamp;
use serde::{Deserialize, Serialize};

use super::gpu::GpuBlame;
use super::limits::{BLAME_MS, BLAMES_MAX, BLAMES_MIN};
use super::placement::{Need, Node, Placement, plan_gang};
use super::state::{Facts, Job};
use super::timers::Timer;
use super::{Engine, Turn};

/// A failure that is held against a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blame {
    /// When it was judged.
    pub at: Timestamp,
    /// Whose.
    pub job: JobId,
    /// What kind.
    pub cause: Cause,
}

/// Everything that is held against a node and its GPUs, as it is kept. A row without errors of GPUs is written as it was before there were any.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "HeldRow", into = "HeldRow")]
pub struct Held {
    /// Failures that may be the machine's, oldest first.
    pub node: Vec<Blame>,
    /// Hardware errors of its GPUs, oldest first.
    pub gpus: Vec<GpuBlame>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum HeldRow {
    Node(Vec<Blame>),
    Both { node: Vec<Blame>, gpus: Vec<GpuBlame> },
}

impl From<HeldRow> for Held {
    fn from(row: HeldRow) -> Self {
        match row {
            HeldRow::Node(node) => Self { node, gpus: Vec::new() },
            HeldRow::Both { node, gpus } => Self { node, gpus },
        }
    }
}

impl From<Held> for HeldRow {
    fn from(Held { node, gpus }: Held) -> Self {
        if gpus.is_empty() { Self::Node(node) } else { Self::Both { node, gpus } }
    }
}

impl Held {
    /// Nothing.
    pub fn is_empty(&self) -> bool {
        self.node.is_empty() && self.gpus.is_empty()
    }

    /// What still counts.
    pub(super) fn fresh(mut self, now: Timestamp) -> Self {
        self.node.retain(|blame| is_fresh(blame.at, now));
        self.gpus.retain(|blame| is_fresh(blame.at, now));
        self
    }
}

/// Signals by which broken memory, disks and processors show: SIGILL, SIGBUS, SIGSEGV.
const MACHINE_SIGNALS: [i32; 3] = [4, 7, 11];
/// What CUDA, NCCL and the kernel say when a device is at fault, in the last words of a rank.
const MACHINE_WORDS: [&str; 9] = [
    "uncorrectable ECC",
    "uncorrectable NVLink",
    "fallen off the bus",
    "no CUDA-capable device is detected",
    "CUDA-capable device(s) is/are busy or unavailable",
    "unhandled system error",
    "Input/output error",
    "Read-only file system",
    "No space left on device",
];

/// Whether the machine may be the cause of a rank's failure.
pub(super) fn may_be_the_machine(cause: Cause, exit: Option<&RankExit>) -> bool {
    let says = |line: &String| MACHINE_WORDS.iter().any(|words| line.contains(words));
    match cause {
        Cause::Silent | Cause::Stuck => true,
        Cause::Exit | Cause::Signal => exit.is_some_and(|exit| {
            exit.signal.is_some_and(|signal| MACHINE_SIGNALS.contains(&signal))
                || exit.tail.iter().chain(&exit.message).chain(exit.matched.as_ref().map(|found| &found.line)).any(says)
        }),
        // Memory is mostly asked for by the program; the rest are wishes, or tell of no machine's part.
        Cause::OutOfMemory
        | Cause::NoStart
        | Cause::Idle
        | Cause::Straggler
        | Cause::CannotStart
        | Cause::Infrastructure
        | Cause::NodeLost
        | Cause::Drain
        | Cause::User
        | Cause::Preempted
        // The GPU's own, and held against it.
        | Cause::Gpu => false,
    }
}

impl Node {
    /// How much it is avoided: 0 while what is held against it may be chance.
    pub fn avoided(&self) -> usize {
        if self.blames.len() >= BLAMES_MIN { self.blames.len() } else { 0 }
    }

    /// Everything that is held against it and its GPUs.
    pub fn held(&self) -> Held {
        Held { node: self.blames.clone(), gpus: self.gpu_blames.clone() }
    }
}

impl Engine {
    /// Holds a failure of a rank against its node, or takes back what the job brought against others.
    pub(super) fn blame(&mut self, turn: &mut Turn, id: JobId, rank: u32, cause: Cause) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| !job.fails_anywhere) else { return };
        let Some(name) = job.node_of(rank).cloned() else { return };
        let elsewhere = |(other, node): &(&NodeId, &Node)| **other != name && node.blames.iter().any(|blame| blame.job == id);
        if let Some(other) = self.nodes.iter().find(elsewhere).map(|(other, _)| other.clone()) {
            job.fails_anywhere = true;
            turn.touched.insert(id);
            let reason = format!("its failures followed it from {other} to {name}: they are held against no node");
            turn.event(Some(id), "blame_withdrawn", reason, Facts::from([("nodes", serde_json::json!([other, name]))]));
            let accused: Vec<NodeId> = self.nodes.keys().cloned().collect();
            accused.iter().for_each(|node| self.change_blames(turn, node, |blames| blames.retain(|blame| blame.job != id)));
            return;
        }
        let at = turn.now;
        self.change_blames(turn, &name, |blames| {
            if blames.len() >= BLAMES_MAX {
                blames.remove(0);
            }
            blames.push(Blame { at, job: id, cause });
        });
        let count = self.nodes.get(&name).map_or(0, |node| node.blames.len());
        let what = if count >= BLAMES_MIN { "it is avoided where another node has room" } else { "one may be chance" };
        let reason = format!("the failure of rank {rank} may be the machine's: {count} on {name} in {} h, {what}", BLAME_MS / 3_600_000);
        let facts =
            Facts::from([("node", name.0.into()), ("rank", rank.into()), ("cause", serde_json::json!(cause)), ("count", count.into())]);
        turn.event(Some(id), "node_blamed", reason, facts);
    }

    fn change_blames(&mut self, turn: &mut Turn, name: &NodeId, change: impl FnOnce(&mut Vec<Blame>)) {
        self.change_held(turn, name, |node, _| change(node));
    }

    /// Changes what is held against a node and its GPUs, makes it durable, and sets the time at which the oldest is forgotten.
    pub(super) fn change_held(&mut self, turn: &mut Turn, name: &NodeId, change: impl FnOnce(&mut Vec<Blame>, &mut Vec<GpuBlame>)) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let before = node.held();
        change(&mut node.blames, &mut node.gpu_blames);
        let held = node.held();
        if held != before {
            turn.step.record.blames.push((name.clone(), held));
            self.await_blames(name);
        }
    }

    /// The oldest is forgotten in time.
    pub(super) fn await_blames(&mut self, name: &NodeId) {
        let timer = Timer::Blames(name.clone());
        let firsts =
            |node: &Node| node.blames.first().map(|blame| blame.at).into_iter().chain(node.gpu_blames.first().map(|blame| blame.at)).min();
        match self.nodes.get(name).and_then(firsts) {
            Some(oldest) => self.timers.set(timer, Timestamp(oldest.0.saturating_add(BLAME_MS))),
            None => self.timers.clear(&timer),
        }
    }

    pub(super) fn on_blames_due(&mut self, turn: &mut Turn, name: &NodeId) {
        let now = turn.now;
        self.change_held(turn, name, |blames, gpus| {
            blames.retain(|blame| is_fresh(blame.at, now));
            gpus.retain(|blame| is_fresh(blame.at, now));
        });
    }

    /// Where a failed gang goes instead: to other GPUs of its node for those that are suspected; where that is not enough, to another node, but
    /// only one that leaves no step behind, and only to as many GPUs.
    pub(super) fn better_place(&self, id: JobId) -> Option<Vec<PlacedRanks>> {
        let job = self.jobs.get(&id)?;
        let gang = job.gang.as_ref()?;
        let other_gpus = self.better_gpus(job);
        let is_suspect = |share: &&PlacedRanks| {
            self.nodes.get(&share.node).is_some_and(|node| node.avoided() > 0 || node.avoided_among(&share.gpus) > 0)
        };
        let stays = other_gpus.as_ref().unwrap_or(&gang.placement);
        let suspects: Vec<NodeId> = stays.iter().filter(is_suspect).map(|share| share.node.clone()).collect();
        if suspects.is_empty() || job.fails_anywhere || !has_nothing_to_leave(job) {
            return other_gpus;
        }
        let mut need: Need = job.need();
        need.excluded.extend(suspects);
        need.least = gang.placed();
        let Placement::Now(place) = plan_gang(&self.nodes, &need) else { return other_gpus };
        let gpus = |shares: &[PlacedRanks]| shares.iter().map(|share| share.gpus.len()).sum::<usize>();
        let is_better = !place.iter().any(|share| is_suspect(&share)) && gpus(&place) == gpus(&gang.placement);
        if is_better { Some(place) } else { other_gpus }
    }
}

/// Checkpoints and snapshots are on the node: a gang that has some stays with them.
fn has_nothing_to_leave(job: &Job) -> bool {
    job.checkpoints.is_empty() && job.progress.reached == 0 && job.spec.resume_from.is_none()
}

/// It still counts.
fn is_fresh(at: Timestamp, now: Timestamp) -> bool {
    now.since_ms(at) < BLAME_MS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_before_gpus_were_blamed_is_read_and_one_without_them_is_written_as_it_was() {
        let blame = Blame { at: Timestamp(5), job: JobId::from_u128(1), cause: Cause::Stuck };
        let old = serde_json::to_string(&[blame]).expect("plain data");
        let held: Held = serde_json::from_str(&old).expect("an old row");
        assert_eq!(held, Held { node: vec![blame], gpus: Vec::new() });
        assert!(Held::default().is_empty() && !held.is_empty());
        assert_eq!(serde_json::to_string(&held).expect("plain data"), old);
        let error = everlit_api::gpu::GpuError { gpu: 0, uuid: "GPU-0".into(), xid: 79, at: Timestamp(6) };
        let both = Held { gpus: vec![GpuBlame { at: Timestamp(7), error, job: None }], ..held };
        let row = serde_json::to_string(&both).expect("plain data");
        assert_eq!(serde_json::from_str::<Held>(&row).expect("a new row"), both);
    }

    #[test]
    fn only_what_may_be_the_machine_s_is_held_against_it() {
        let exit = |code, signal, words: &str| RankExit {
            code,
            signal,
            error: None,
            at: Timestamp(1),
            tail: vec!["before".into(), words.into()],
            message: None,
            matched: None,
            out_of_memory: false,
            gpu_error: None,
        };
        let may = |cause, code, signal, words| may_be_the_machine(cause, Some(&exit(code, signal, words)));
        assert!(may(Cause::Signal, None, Some(7), ""));
        assert!(may(Cause::Exit, Some(1), None, "RuntimeError: CUDA error: uncorrectable ECC error encountered"));
        assert!(may(Cause::Signal, None, Some(6), "what():  NCCL error: unhandled system error (run with NCCL_DEBUG=INFO)"));
        assert!(may_be_the_machine(Cause::Stuck, None) && may_be_the_machine(Cause::Silent, None));
        for (cause, code, signal) in [(Cause::Exit, Some(1), None), (Cause::Signal, None, Some(9)), (Cause::Signal, None, Some(6))] {
            assert!(!may(cause, code, signal, "ValueError: bad shape"), "{cause:?} {code:?} {signal:?}");
        }
        assert!(!may(Cause::OutOfMemory, None, Some(9), "Input/output error"), "memory is asked for by the program");
    }
}
