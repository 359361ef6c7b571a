//! Other machines' clocks may be hours off: no time that a node tells is believed beyond what it can be.
//!
//! What a linked node tells happened after it was last heard of, or it would have been told then; an agent that did not run for a while is given
//! the node timeout. A time outside of that, or in the future, is the clock's fault, and counts as now. Leases never see another clock.

use everlit_api::agent::{Beat, Exited};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::time::Timestamp;

use super::limits::METRICS_MAX;
use super::state::Job;
use super::{Engine, Turn};

impl Engine {
    /// Since when something that a node tells now, and did not tell before it was last `heard` of, can have happened.
    fn since(&self, job: JobId, heard: Option<Timestamp>) -> Timestamp {
        let placed = self.jobs.get(&job).map_or(Timestamp(0), |job| job.gang.as_ref().map_or(job.submitted_at, |gang| gang.placed_at));
        let heard = heard.map_or(0, |at| at.0.saturating_sub(self.config.node_timeout_ms));
        placed.max(Timestamp(heard))
    }

    /// An end whose time can not be right ended now. What its GPU had is moved with it: the two are compared.
    pub(super) fn set_exit_right(&self, turn: &Turn, exited: &mut Exited, heard: Option<Timestamp>) {
        let exit = &mut exited.exit;
        if (self.since(exited.incarnation.job, heard)..=turn.now).contains(&exit.at) {
            return;
        }
        let told = std::mem::replace(&mut exit.at, turn.now);
        if let Some(error) = &mut exit.gpu_error {
            let behind = i128::from(error.at.0) - i128::from(told.0);
            error.at = Timestamp(u64::try_from(i128::from(turn.now.0) + behind).unwrap_or(turn.now.0));
        }
    }

    /// When a checkpoint of which a node tells can have been committed.
    pub(super) fn committed_at(&self, turn: &Turn, node: &NodeId, job: JobId, told: Timestamp) -> Timestamp {
        // Of a node that links now nothing was heard at this time: it may be an old one.
        let heard = self.nodes.get(node).and_then(|node| node.reported_at);
        let earliest = if heard.is_some() { self.since(job, heard) } else { self.jobs.get(&job).map_or(told, |job| job.submitted_at) };
        if (earliest..=turn.now).contains(&told) { told } else { turn.now }
    }
}

impl Job {
    /// When a beat was seen, and the beat within its bounds.
    pub(super) fn seen_at(&self, now: Timestamp, beat: &mut Beat) -> Timestamp {
        while beat.metrics.len() > METRICS_MAX {
            beat.metrics.pop_last();
        }
        let placed = self.gang.as_ref().map_or(self.submitted_at, |gang| gang.placed_at);
        Timestamp(now.0.saturating_sub(beat.age_ms)).max(placed).min(now)
    }
}
