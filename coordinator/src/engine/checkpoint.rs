//! Checkpoints of a job as its node tells of them: resumed from, committed, read back, put aside, failed, and asked for by a user.
//!
//! What is here never decides whether a job lives: a save that fails costs steps at the next failure, not the job.

use everlit_api::agent::{CheckpointNews, Resumed, ToAgent};
use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_api::manifest::SaveError;
use everlit_api::status::{CheckpointView, JobState};

use super::limits::{CHECKPOINTS_MAX, FAILED_RESUMES_MAX, SAVE_FAILED_EVERY_MS};
use super::restart::heal;
use super::state::{Facts, FailedResumes, Gang, Job, Role};
use super::{Engine, Turn};

/// Why a job can not be told to save.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CannotSave {
    /// It is not active.
    NotActive,
    /// No attempt of it runs now.
    NotRunning(JobState),
    /// Its ranks have not written a heartbeat yet.
    NotHeard,
    /// None of its ranks says that it saves on a signal.
    NotSupported,
}

impl Engine {
    pub(super) fn on_attempt_resumed(&mut self, turn: &mut Turn, node: &NodeId, resumed: Resumed) {
        let Some(job) = self.current(resumed.job, resumed.attempt) else { return };
        if job.gang.as_ref().is_none_or(|g| g.resumed_step.is_some()) {
            return;
        }
        let id = resumed.job;
        for (step, reason) in &resumed.quarantined {
            job.put_aside(turn, node, *step, reason);
        }
        let Some(gang) = &mut job.gang else { return };
        let Some(resumed) = gang.note_resumed(node, resumed) else { return };
        gang.resumed_step = Some(resumed.step.unwrap_or(0));
        gang.from_memory = resumed.from_memory;
        job.lineage.begin(resumed.attempt, resumed.step.unwrap_or(0));
        for view in &mut job.checkpoints {
            view.stored = view.stored.take().filter(|_| job.lineage.counts(view.attempt, view.step));
        }
        job.checkpoints.retain(CheckpointView::is_somewhere);
        if let Some(step) = resumed.step {
            // A fresh job that begins from another's checkpoint repeats nothing of its own.
            if gang.attempt == 1 {
                gang.floor = step;
                job.progress.reached = step;
            }
            let path = resumed.path.clone().unwrap_or_default();
            let facts = Facts::from([("step", step.into()), ("path", path.into()), ("from_memory", resumed.from_memory.into())]);
            let source = if resumed.from_memory {
                format!("resumed from step {step} from the snapshot in shared memory")
            } else {
                format!(
                    "resumes from the checkpoint of step {step}{}",
                    match (&resumed.fetched_from, &resumed.fetched_from_store) {
                        (Some(from), _) => format!(", fetched from {from}"),
                        (None, Some(from)) => format!(", fetched from {from}"),
                        (None, None) => String::new(),
                    }
                )
            };
            turn.event(Some(id), "attempt_resumed", format!("attempt {} {source}", resumed.attempt), facts);
        } else if gang.attempt > 1 {
            turn.event(
                Some(id),
                "attempt_resumed",
                format!("attempt {} begins anew: there is no checkpoint", resumed.attempt),
                Facts::new(),
            );
        }
        job.advance(turn.now);
        turn.touched.insert(id);
    }

    pub(super) fn on_checkpoint_seen(&mut self, turn: &mut Turn, node: &NodeId, news: CheckpointNews) {
        if self.is_late(turn, node, &news) {
            return;
        }
        self.note_view(turn, node, &news);
        self.note_copied(turn, node, &news);
        self.upload_newest(turn, news.job);
    }

    fn note_view(&mut self, turn: &mut Turn, node: &NodeId, news: &CheckpointNews) {
        let id = news.job;
        let created_at = self.committed_at(turn, node, id, news.created_at);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let was = job.checkpoints.iter().find(|c| c.step == news.step && c.attempt == news.attempt).map(|c| c.verified);
        let known = was.is_some_and(|verified| verified || !news.verified);
        job.lose_copies(node, |c| c.step != news.step && !news.kept.contains(&c.step));
        match job.checkpoints.iter_mut().find(|c| c.step == news.step && c.attempt == news.attempt) {
            Some(view) => {
                view.verified |= news.verified;
                if view.node.is_none() {
                    (view.node, view.path) = (Some(node.clone()), news.path.clone());
                    turn.touched.insert(id);
                } else if !view.nodes().any(|other| other == node) {
                    view.also_on.push(node.clone());
                    turn.touched.insert(id);
                }
            }
            None => {
                job.checkpoints.retain(|c| c.step != news.step);
                job.checkpoints.push(CheckpointView {
                    step: news.step,
                    attempt: news.attempt,
                    bytes: news.bytes,
                    created_at,
                    verified: news.verified,
                    node: Some(node.clone()),
                    path: news.path.clone(),
                    stored: None,
                    also_on: Vec::new(),
                });
            }
        }
        job.checkpoints.sort_by_key(|c| std::cmp::Reverse(c.step));
        job.checkpoints.truncate(CHECKPOINTS_MAX);
        if known {
            return;
        }
        turn.touched.insert(id);
        if news.verified {
            return;
        }
        let facts = Facts::from([("step", news.step.into()), ("bytes", news.bytes.into()), ("attempt", news.attempt.into())]);
        turn.event(Some(id), "checkpoint_committed", format!("step {} is saved", news.step), facts);
        if heal(&job.spec.restart, &mut job.budget, turn.now) {
            turn.event(Some(id), "budget_healed", "committed progress forgave the counted restarts", Facts::new());
        }
    }

    pub(super) fn on_checkpoint_quarantined(&mut self, turn: &mut Turn, node: &NodeId, id: JobId, step: u64, reason: &str) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.put_aside(turn, node, step, reason);
        turn.touched.insert(id);
    }

    /// Whether a wish to save would reach anybody.
    pub fn can_save(&self, id: JobId) -> Result<(), CannotSave> {
        let job = self.jobs.get(&id).ok_or(CannotSave::NotActive)?;
        let runs = job.state == JobState::Running && job.gang.as_ref().is_some_and(|g| g.ending.is_none());
        if !runs {
            return Err(CannotSave::NotRunning(job.state));
        }
        let ranks = || job.ranks.list().iter().filter(|rank| rank.pid.is_some());
        if ranks().any(|rank| rank.saves_on_signal) {
            Ok(())
        } else if ranks().any(|rank| rank.beat_at.is_some()) || job.spec.worker.is_none() {
            Err(CannotSave::NotSupported)
        } else {
            Err(CannotSave::NotHeard)
        }
    }

    pub(super) fn on_save_requested(&mut self, turn: &mut Turn, id: JobId) {
        // Asked a moment ago; what changed since then needs no save.
        if self.can_save(id).is_err() {
            return;
        }
        let Some(job) = self.jobs.get(&id) else { return };
        let Some(gang) = &job.gang else { return };
        let facts = Facts::from([("attempt", gang.attempt.into()), ("step", job.progress.step.into())]);
        turn.event(Some(id), "checkpoint_requested", "a user asked for it", facts);
        for share in &gang.placement {
            turn.tell(&share.node, ToAgent::SaveNow { job: id, attempt: gang.attempt });
        }
    }

    pub(super) fn on_save_failed(&mut self, turn: &mut Turn, incarnation: Incarnation, error: SaveError) {
        let id = incarnation.job;
        let Some(Role::Rank(rank)) = self.role(incarnation) else { return };
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(own) = job.ranks.get_mut(rank) else { return };
        // A disk that stays full fails each save: the record must not fill it further.
        let told = own.save_failed.is_some_and(|(step, at)| step == error.step || turn.now.since_ms(at) < SAVE_FAILED_EVERY_MS);
        if told {
            return;
        }
        own.save_failed = Some((error.step, turn.now));
        let facts = Facts::from([("step", error.step.into()), ("rank", rank.into()), ("reason", error.reason.clone().into())]);
        let sentence = format!("rank {rank} could not save step {} and trains on: {}", error.step, error.reason);
        turn.event(Some(id), "checkpoint_failed", sentence, facts);
    }
}

impl Job {
    /// An attempt failed: one that did no step from where it began says that the place is no good, whoever's fault that is.
    pub(super) fn note_failed_resume(&mut self) {
        let began = self.gang.as_ref().and_then(|gang| Some((gang.resumed_step.filter(|step| *step > 0)?, gang.from_memory)));
        self.failed_resumes = began.filter(|_| self.progress.step.is_none()).map(|(step, from_memory)| {
            let before = self.failed_resumes.filter(|failed| (failed.step, failed.from_memory) == (step, from_memory));
            FailedResumes { step, from_memory, count: before.map_or(0, |failed| failed.count) + 1 }
        });
    }

    /// The checkpoint that the next attempt is not to begin from.
    pub(super) fn rejected_step(&self) -> Option<u64> {
        self.failed_resumes.filter(|failed| !failed.from_memory && failed.count >= FAILED_RESUMES_MAX).map(|failed| failed.step)
    }

    /// A checkpoint did not verify: its node has moved it away.
    fn put_aside(&mut self, turn: &mut Turn, node: &NodeId, step: u64, reason: &str) {
        self.lose_copies(node, |c| c.step == step);
        let facts = Facts::from([("step", step.into())]);
        turn.event(Some(self.id), "checkpoint_quarantined", format!("checkpoint of step {step} was put aside: {reason}"), facts);
    }

    /// A node has some checkpoints no more; what no node has is gone.
    fn lose_copies(&mut self, node: &NodeId, gone: impl Fn(&CheckpointView) -> bool) {
        self.checkpoints.retain_mut(|own| {
            if !gone(own) {
                return true;
            }
            own.also_on.retain(|other| other != node);
            if own.node.as_ref() != Some(node) {
                return own.is_somewhere();
            }
            own.node = (!own.also_on.is_empty()).then(|| own.also_on.remove(0));
            own.is_somewhere()
        });
    }
}

impl Gang {
    /// What the attempt starts from, once all of its nodes have said what they have: those that have less get the state of those that have more.
    fn note_resumed(&mut self, node: &NodeId, resumed: Resumed) -> Option<Resumed> {
        if !self.is_spread() {
            return Some(resumed);
        }
        self.resumes.insert(node.clone(), resumed.step);
        if self.placement.iter().any(|share| !self.resumes.contains_key(&share.node)) {
            return None;
        }
        let step = std::mem::take(&mut self.resumes).into_values().max().flatten();
        Some(Resumed { path: resumed.path.filter(|_| step == resumed.step), step, ..resumed })
    }
}
