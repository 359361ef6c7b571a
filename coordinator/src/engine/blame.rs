//! Nodes that are suspected: failures that may be the machine's are held against the node of the rank that failed first, for a day.
//!
//! A suspected node is avoided, never forbidden: where no other has room, everything goes on there. What a program does to itself must not be
//! held against a machine: plain exit codes count only with words of drivers and kernels, and a job whose failures follow it to another node
//! takes back what it had brought against any. A user who uncordons a node says that it is well.

use everlit_api::ids::{JobId, NodeId};
use everlit_api::rank::{Cause, RankExit};
use everlit_api::status::PlacedRanks;
use everlit_api::time::Timestamp;
use serde::{Deserialize, Serialize};

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
        | Cause::User => false,
    }
}

impl Node {
    /// How much it is avoided: 0 while what is held against it may be chance.
    pub fn avoided(&self) -> usize {
        if self.blames.len() >= BLAMES_MIN { self.blames.len() } else { 0 }
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

    /// Changes what is held against a node, makes it durable, and sets the time at which the oldest is forgotten.
    pub(super) fn change_blames(&mut self, turn: &mut Turn, name: &NodeId, change: impl FnOnce(&mut Vec<Blame>)) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let before = node.blames.clone();
        change(&mut node.blames);
        if node.blames != before {
            turn.step.record.blames.push((name.clone(), node.blames.clone()));
            self.await_blames(name);
        }
    }

    /// The oldest is forgotten in time.
    pub(super) fn await_blames(&mut self, name: &NodeId) {
        let timer = Timer::Blames(name.clone());
        match self.nodes.get(name).and_then(|node| node.blames.first()) {
            Some(oldest) => self.timers.set(timer, Timestamp(oldest.at.0.saturating_add(BLAME_MS))),
            None => self.timers.clear(&timer),
        }
    }

    pub(super) fn on_blames_due(&mut self, turn: &mut Turn, name: &NodeId) {
        let now = turn.now;
        self.change_blames(turn, name, |blames| blames.retain(|blame| is_fresh(blame, now)));
    }

    /// Where a failed gang goes instead of a suspected node: only one that leaves no step behind there, and only to as many GPUs.
    pub(super) fn better_place(&self, id: JobId) -> Option<Vec<PlacedRanks>> {
        let job = self.jobs.get(&id).filter(|job| !job.fails_anywhere && has_nothing_to_leave(job))?;
        let gang = job.gang.as_ref()?;
        let is_avoided = |share: &&PlacedRanks| self.nodes.get(&share.node).is_some_and(|node| node.avoided() > 0);
        let suspects: Vec<NodeId> = gang.placement.iter().filter(is_avoided).map(|share| share.node.clone()).collect();
        if suspects.is_empty() {
            return None;
        }
        let mut need: Need = job.need();
        need.excluded.extend(suspects);
        let Placement::Now(place) = plan_gang(&self.nodes, &need) else { return None };
        let gpus = |shares: &[PlacedRanks]| shares.iter().map(|share| share.gpus.len()).sum::<usize>();
        (!place.iter().any(|share| is_avoided(&share)) && gpus(&place) == gpus(&gang.placement)).then_some(place)
    }
}

/// Checkpoints and snapshots are on the node: a gang that has some stays with them.
fn has_nothing_to_leave(job: &Job) -> bool {
    job.checkpoints.is_empty() && job.progress.reached == 0 && job.spec.resume_from.is_none()
}

/// It still counts.
pub(super) fn is_fresh(blame: &Blame, now: Timestamp) -> bool {
    now.since_ms(blame.at) < BLAME_MS
}

#[cfg(test)]
mod tests {
    use super::*;

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
