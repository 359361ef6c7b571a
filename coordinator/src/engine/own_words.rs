//! A node speaks only for itself: what its agent says about ranks and files that are not its own is counted and passed over.
//!
//! Which ranks are a node's, the placement of the current attempt says; news of another attempt are nobody's, and dropped by the one fence
//! there is for them (`Engine::current`). Which files, the list of nodes that ever had some. What a coordinator could only know if its disk
//! had not lost it is believed of a node once, in its first `Hello` to this process: after that everything that any node knows is known.
//! The trap: spares, and processes whose seat was given away, have no rank; only gangs on one node have spares, and of the others any node of the
//! gang may tell, for nothing follows from it.

use everlit_api::agent::stored::{Archived, StoreFault, Uploaded};
use everlit_api::data::Listed;
use everlit_api::ids::{Incarnation, JobId, NodeId};

use super::event::Event;
use super::limits::ATTEMPTS_LOST_MAX;
use super::state::{Gang, Role};
use super::{Engine, Turn};

impl Engine {
    pub(super) fn on_said(&mut self, turn: &mut Turn, node: &NodeId, event: Event) {
        let Some(mut event) = self.own_words(node, event) else { return };
        if let Event::RankExited(exited) = &mut event {
            let heard = self.nodes.get(node).and_then(|node| node.seen_at);
            self.set_exit_right(turn, exited, heard);
        }
        self.dispatch(turn, event);
    }

    /// What was said, as far as it is the node's to say.
    fn own_words(&mut self, node: &NodeId, mut event: Event) -> Option<Event> {
        let mut passed_over = 0;
        let own = match &mut event {
            Event::RankStarted(started) => self.is_of(node, started.incarnation),
            Event::RankExited(exited) => self.is_of(node, exited.incarnation),
            Event::RanksBeat(beats) => {
                let told = beats.len();
                beats.retain(|beat| beat.incarnation.is_none_or(|incarnation| self.is_of(node, incarnation)));
                passed_over = told - beats.len();
                true
            }
            Event::RankJudged { incarnation, .. } | Event::SaveFailed { incarnation, .. } => self.is_of(node, *incarnation),
            Event::AttemptResumed { resumed, .. } => self.takes_part(node, resumed.job, resumed.attempt),
            Event::DataListed { listed: Listed { job, attempt, .. }, .. } => self.takes_part(node, *job, *attempt),
            Event::DataTurned { news, .. } => self.keeps_files(node, news.job),
            Event::StartFailed { job, attempt, .. } | Event::GpuHeld { job, attempt, .. } => self.takes_part(node, *job, *attempt),
            Event::CheckpointSeen { news, .. } => self.keeps_files(node, news.job) && self.is_known(news.job, news.attempt),
            Event::CheckpointQuarantined { job, .. } | Event::CopyFailed { job, .. } => self.keeps_files(node, *job),
            Event::Uploaded { done: Uploaded { job, .. }, .. }
            | Event::LogsArchived { done: Archived { job, .. }, .. }
            | Event::StoreFault { fault: StoreFault { job, .. }, .. } => self.keeps_files(node, *job),
            // Of itself alone, by the name that its certificate has.
            Event::NodeLinked { .. }
            | Event::NodeUnlinked { .. }
            | Event::NodeReported { .. }
            | Event::NodeDraining { .. }
            | Event::GpuFailed { .. } => true,
            // No agent's words.
            Event::JobSubmitted { .. }
            | Event::StopRequested { .. }
            | Event::RestartRequested { .. }
            | Event::SaveRequested { .. }
            | Event::CordonRequested { .. }
            | Event::NodeExpelled { .. }
            | Event::PostmortemKept { .. }
            | Event::Said { .. }
            | Event::Woke => false,
        };
        self.pass_over(if own { passed_over as u64 } else { 1 });
        own.then_some(event)
    }

    /// A process of a current attempt that may be this node's; true for what is of no current attempt.
    pub(super) fn is_of(&self, node: &NodeId, incarnation: Incarnation) -> bool {
        let Some(job) = self.jobs.get(&incarnation.job) else { return true };
        let Some(gang) = job.gang.as_ref().filter(|gang| gang.attempt == incarnation.attempt) else { return true };
        match gang.role(incarnation.rank) {
            Role::Rank(rank) => job.node_of(rank) == Some(node),
            Role::Spare | Role::Former => gang.has_places_on(node),
        }
    }

    /// A current attempt has ranks on this node; true for any other attempt.
    fn takes_part(&self, node: &NodeId, job: JobId, attempt: u32) -> bool {
        let gang = self.jobs.get(&job).and_then(|job| job.gang.as_ref());
        gang.is_none_or(|gang| gang.attempt != attempt || gang.has_places_on(node))
    }

    /// It ever had files of the job; true for a job that is not active.
    pub(super) fn keeps_files(&self, node: &NodeId, job: JobId) -> bool {
        self.jobs.get(&job).is_none_or(|job| job.nodes.contains(node) || job.copies_on.contains(node))
    }

    /// An attempt that the job has had; true for a job that is not active.
    pub(super) fn is_known(&self, job: JobId, attempt: u32) -> bool {
        self.jobs.get(&job).is_none_or(|job| attempt <= job.attempt.max(job.known_attempt))
    }

    /// A number that no loss of a disk explains: the next attempts would run out of numbers.
    pub(super) fn is_absurd(&self, job: JobId, attempt: u32) -> bool {
        self.jobs.get(&job).is_some_and(|job| attempt > job.attempt.max(job.known_attempt).saturating_add(ATTEMPTS_LOST_MAX))
    }

    /// So many things that a node said and that are not its to say.
    pub(super) fn pass_over(&mut self, count: u64) {
        self.foreign += count;
    }

    /// What nodes said of ranks and files that are not theirs, since the start.
    pub fn foreign_news(&self) -> u64 {
        self.foreign
    }
}

impl Gang {
    fn has_places_on(&self, node: &NodeId) -> bool {
        self.placement.iter().any(|share| share.node == *node)
    }
}
