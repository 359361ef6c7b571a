//! What ranks say of their progress, and what that means for the job: its step, its speed, its series, where its time goes, who is slow.

use everlit_api::agent::Beat;
use everlit_api::ids::Incarnation;
use everlit_api::job::JobKind;
use everlit_api::manifest::Phase;
use everlit_api::status::MetricPoint;
use everlit_api::time::Timestamp;

use super::ledger::Activity;
use super::state::{Facts, Job, Role};
use super::{Engine, Turn};

impl Engine {
    pub(super) fn on_ranks_beat(&mut self, turn: &mut Turn, beats: Vec<Beat>) {
        let mut jobs = std::collections::BTreeSet::new();
        for mut beat in beats {
            let Some(incarnation) = beat.incarnation else { continue };
            let role = self.role(incarnation);
            let Incarnation { job: id, rank: seat, .. } = incarnation;
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            let seen_at = job.seen_at(turn.now, &mut beat);
            match role {
                Some(Role::Rank(rank)) => {
                    let off = beat.in_place == Some(false) && job.ranks.get(rank).is_some_and(|own| own.in_place != Some(false));
                    job.note_work(rank, &beat);
                    job.note_beat(rank, seen_at, beat);
                    if off {
                        let facts = Facts::from([("attempt", incarnation.attempt.into()), ("rank", rank.into())]);
                        let reason = format!("rank {rank} can not renew its process group (its log says why): failures restart the gang");
                        turn.event(Some(id), "in_place_off", reason, facts);
                    }
                }
                Some(Role::Spare) => job.note_spare(seat, seen_at, &beat),
                Some(Role::Former) | None => continue,
            }
            jobs.insert(id);
        }
        for id in jobs {
            if let Some(job) = self.jobs.get_mut(&id)
                && (job.advance(turn.now) || job.series_is_due(turn.now))
            {
                turn.touched.insert(id);
            }
            self.settle_regroup(turn, id);
            self.grow(turn, id);
            self.tell_slow(turn, id);
        }
    }
}

impl Job {
    fn note_beat(&mut self, rank: u32, seen_at: Timestamp, beat: Beat) {
        let Some(own) = self.ranks.get_mut(rank).filter(|r| r.exit.is_none()) else { return };
        if beat.heartbeat {
            own.beat_at = Some(seen_at);
        }
        own.phase = beat.phase.or(own.phase);
        own.saves_on_signal = beat.saves_on_signal;
        own.in_place = beat.in_place;
        if beat.step.is_some() {
            own.stepped_in = Some(beat.generation);
        }
        let resumed = self.gang.as_ref().and_then(|g| g.resumed_step).unwrap_or(0);
        // A heartbeat before the first update of this incarnation tells the step that it loaded; an evaluation never gets beyond that.
        let fresh = beat.step.filter(|step| *step > resumed || !beat.heartbeat || self.spec.kind == JobKind::Evaluate);
        let moved = fresh.is_some() && fresh != own.step;
        own.step = fresh.or(own.step);
        let step = own.step;
        if self.is_preprocessing() {
            return;
        }
        self.progress.total_steps = beat.total_steps.or(self.progress.total_steps);
        let leads = self.ranks.list().iter().take(rank as usize).all(|r| r.step.is_none());
        if !leads {
            return;
        }
        let Some(step) = step else {
            if self.is_evaluation() {
                self.progress.note(&beat);
            }
            return;
        };
        self.progress.note(&beat);
        if moved {
            self.rates.note(seen_at, step, beat.samples);
        }
        let Beat { samples, loss, metrics, .. } = beat;
        self.series.note(MetricPoint { time: seen_at, attempt: self.attempt, step, samples, loss, metrics });
    }

    fn note_spare(&mut self, seat: u32, seen_at: Timestamp, beat: &Beat) {
        let spares = self.gang.iter_mut().flat_map(|gang| &mut gang.spares);
        for own in spares.filter(|own| own.seat == seat) {
            own.beat_at = Some(seen_at);
            own.phase = beat.phase.or(own.phase);
            own.is_ready = beat.in_place == Some(true);
        }
    }

    /// It measures and does no steps.
    pub(super) fn is_evaluation(&self) -> bool {
        self.spec.kind == JobKind::Evaluate
    }

    /// Its ranks are independent, and a step is a shard whose output is in the store.
    fn is_preprocessing(&self) -> bool {
        self.spec.kind == JobKind::Preprocess
    }

    /// What the ranks' steps mean for the job. True when the record should know: a first step, the end of repeating.
    pub(super) fn advance(&mut self, now: Timestamp) -> bool {
        let Some(gang) = self.gang.as_ref().filter(|g| g.ending.is_none() && g.regroup.is_none()) else { return false };
        // Before its node has said what it resumed from, nobody knows which steps are repeated.
        let Some(from) = gang.resumed_step else { return false };
        let before = self.book.activity;
        let reporting = self.ranks.list().iter().filter_map(|r| r.step);
        let all = self.spec.worker.is_none() || self.ranks.list().iter().all(|r| r.step.is_some());
        if self.is_preprocessing() {
            // Each rank tells its own outputs, which stay: a rank that begins again has them all.
            self.progress.advance(now, reporting.sum(), from, 0);
            self.progress.total_steps = self.listing.as_ref().map(|listing| listing.shards.len() as u64);
        } else if let Some(slowest) = reporting.min().filter(|_| all) {
            self.progress.advance(now, slowest, from, gang.floor);
        }
        let saving = self.ranks.get(0).is_some_and(|r| r.phase == Some(Phase::Checkpoint));
        let next = match self.progress.step {
            None => before,
            Some(_) if saving => Activity::Checkpointing,
            Some(step) if step <= gang.floor && gang.floor > 0 && gang.attempt > 1 && self.spec.kind == JobKind::Train => {
                Activity::Repeated
            }
            Some(_) => Activity::Training,
        };
        self.book.turn(now, next);
        let settled = |activity| matches!(activity, Activity::Training | Activity::Checkpointing);
        before != next && !(settled(before) && settled(next))
    }
}
