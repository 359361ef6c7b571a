//! What a job's `log_policies` say about an attempt that failed: which of its ranks wrote a line that one of them looks for.
//!
//! The agents have looked (each exit says what it matched); here is chosen which match counts, once every rank has ended and the kernel's
//! order is known. The rank that is named for the failure comes first: what others wrote after it may be only its consequence.

use everlit_api::ids::{JobId, NodeId};
use everlit_api::job::LogAction;
use everlit_api::rank::{Cause, RankExit};
use everlit_api::status::AttemptView;

use super::blame::may_be_the_machine;
use super::limits::EXCLUDED_MAX;
use super::state::{Ending, Facts, Job};
use super::{Engine, Turn};

/// Signals by which ranks of a broken gang are ended by us: what those wrote tells nothing of the failure.
const OURS: [i32; 2] = [9, 15];

/// The match that counts.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Matched {
    /// Who wrote the line.
    pub(super) rank: u32,
    /// Where.
    pub(super) node: Option<NodeId>,
    /// What follows.
    pub(super) action: LogAction,
    /// In one sentence.
    pub(super) reason: String,
    /// For the event.
    pub(super) facts: Facts,
}

/// The policy that decides about the failed attempt, if any does; `first`: the rank that is named for the failure.
pub(super) fn decide_policy(job: &Job, first: Option<u32>) -> Option<Matched> {
    let exits = job.ranks.list().iter().enumerate().filter_map(|(rank, own)| Some((rank as u32, own.exit.as_ref()?)));
    let able = exits.filter(|(rank, exit)| exit.matched.is_some() && (Some(*rank) == first || failed_by_itself(exit)));
    let (rank, exit) = able.min_by_key(|(rank, exit)| (Some(*rank) != first, exit.at, *rank))?;
    let found = exit.matched.as_ref()?;
    let policy = job.spec.log_policies.get(found.policy as usize)?;
    let node = job.node_of(rank).cloned();
    let (title, action) = (policy.title(), policy.action.as_str());
    let facts = Facts::from([
        ("attempt", job.attempt.into()),
        ("rank", rank.into()),
        ("node", serde_json::json!(node)),
        ("policy", found.policy.into()),
        ("pattern", policy.pattern.clone().into()),
        ("action", action.into()),
        ("line", found.line.clone().into()),
    ]);
    let what = match (policy.action, &node) {
        (LogAction::ExcludeNode, Some(node)) => format!("{action}: the job is not placed on {node} again"),
        (LogAction::ExcludeNode, None) => action.to_string(),
        (LogAction::CancelRetries, _) => format!("{action}: it is not tried again"),
    };
    let reason = format!("rank {rank} wrote \"{}\" (log policy {title}, {what})", found.line);
    Some(Matched { rank, node, action: policy.action, reason, facts })
}

fn failed_by_itself(exit: &RankExit) -> bool {
    exit.code.is_some_and(|code| code != 0) || exit.signal.is_some_and(|signal| !OURS.contains(&signal))
}

impl Job {
    /// From now on it is kept from a node.
    pub(super) fn exclude(&mut self, node: NodeId) {
        if self.excluded.contains(&node) {
            return;
        }
        if self.excluded.len() >= EXCLUDED_MAX {
            self.excluded.remove(0);
        }
        self.excluded.push(node);
    }
}

impl Engine {
    /// What the output of the failed ranks says, by the job's own policies; and what is held against the node.
    pub(super) fn heed_policies(&mut self, turn: &mut Turn, id: JobId, view: &mut AttemptView, ending: &mut Ending) -> Option<LogAction> {
        let job = self.jobs.get_mut(&id)?;
        let matched = decide_policy(job, ending.rank);
        let cause = ending.cause.unwrap_or(Cause::Exit);
        let first = ending.rank.and_then(|rank| job.ranks.get(rank)).and_then(|own| own.exit.as_ref());
        let mut suspect = ending.rank.filter(|_| may_be_the_machine(cause, first));
        if let Some(matched) = &matched {
            ending.reason = format!("{}; {}", ending.reason, matched.reason);
            job.reason.clone_from(&ending.reason);
            view.reason = Some(ending.reason.clone());
            turn.event(Some(id), "log_policy_matched", matched.reason.clone(), matched.facts.clone());
            if let (LogAction::ExcludeNode, Some(node)) = (matched.action, &matched.node) {
                job.exclude(node.clone());
                suspect = Some(matched.rank);
            }
        }
        if let Some(rank) = suspect {
            self.blame(turn, id, rank, cause);
        }
        matched.map(|matched| matched.action)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use everlit_api::job::{JobSpec, LogPolicy};
    use everlit_api::rank::LogMatch;
    use everlit_api::time::Timestamp;
    use expect_test::expect;

    use super::super::state::Ranks;
    use super::*;

    fn told(first: Option<u32>, exits: [(i32, u64, Option<u32>); 3]) -> String {
        let policy = |name: Option<&str>, action| LogPolicy { name: name.map(Into::into), pattern: "x".repeat(90), action };
        let log_policies = vec![policy(Some("ecc"), LogAction::ExcludeNode), policy(None, LogAction::CancelRetries)];
        let spec = JobSpec { log_policies, ..JobSpec::default_for(3) };
        let mut job = Job { spec: Arc::new(spec), ranks: Ranks::pending(3), ..Job::default() };
        for (rank, (code, at, policy)) in exits.into_iter().enumerate() {
            let (code, signal) = if code < 0 { (None, Some(-code)) } else { (Some(code), None) };
            let matched = policy.map(|policy| LogMatch { policy, line: format!("line of {rank}") });
            let at = Timestamp(at);
            let exit =
                RankExit { code, signal, error: None, at, tail: vec![], message: None, matched, out_of_memory: false, gpu_error: None };
            job.ranks.end(rank as u32, exit, false);
        }
        decide_policy(&job, first).map_or_else(|| "none".into(), |matched| matched.reason)
    }

    #[test]
    fn who_is_named_for_the_failure_comes_first_then_the_kernel_s_order() {
        let cases = [
            told(Some(1), [(1, 5, Some(0)), (1, 9, Some(1)), (1, 1, None)]),
            told(Some(2), [(1, 5, Some(0)), (1, 4, Some(1)), (1, 1, None)]),
            // Ended by us, or well: what they wrote decides nothing, unless it was the one that hung.
            told(Some(2), [(-15, 5, Some(0)), (0, 4, Some(1)), (1, 1, None)]),
            told(Some(0), [(-9, 5, Some(0)), (0, 4, Some(1)), (1, 6, None)]),
            told(None, [(-11, 5, Some(0)), (1, 4, None), (1, 1, Some(7))]),
        ];
        expect![[r#"
            rank 1 wrote "line of 1" (log policy `xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…`, cancel_retries: it is not tried again)
            rank 1 wrote "line of 1" (log policy `xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…`, cancel_retries: it is not tried again)
            none
            rank 0 wrote "line of 0" (log policy "ecc" `xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…`, exclude_node)
            none
        "#]]
        .assert_eq(&(cases.join("\n") + "\n"));
    }

    #[test]
    fn excluded_nodes_are_bounded_and_named_once() {
        let mut job = Job::default();
        for n in 0..EXCLUDED_MAX + 2 {
            job.exclude(NodeId(format!("n{n}")));
            job.exclude(NodeId(format!("n{n}")));
        }
        assert_eq!((job.excluded.len(), job.excluded[0].0.as_str()), (EXCLUDED_MAX, "n2"));
    }
}
