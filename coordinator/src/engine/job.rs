//! A job's life outside its processes: accepted, waiting, placed, told to stop or restart, final.

use std::sync::Arc;

use everlit_api::agent::{GangSpec, Program, ResumeFrom, ToAgent};
use everlit_api::ids::JobId;
use everlit_api::job::JobSpec;
use everlit_api::rank::Cause;
use everlit_api::status::{AttemptView, CheckpointView, JobState, PlacedRanks};
use everlit_api::store::Place;
use everlit_api::time::{Millis, Timestamp};

use super::ledger::{Activity, Book};
use super::placement::Need;
use super::restart::mean_time_between_failures;
use super::state::{Ending, Facts, Gang, Job, ROW_VERSION, Ranks, Then};
use super::timers::Timer;
use super::{Engine, Turn};

impl Engine {
    pub(super) fn on_job_submitted(
        &mut self,
        turn: &mut Turn,
        id: JobId,
        spec: Arc<JobSpec>,
        (seed, user): (u64, Option<String>),
        origin: Vec<CheckpointView>,
    ) {
        let job = Job {
            version: ROW_VERSION,
            id,
            seed,
            state: JobState::Queued,
            reason: "waiting for a place".into(),
            submitted_at: turn.now,
            book: Book::open(turn.now),
            series_kept_at: turn.now,
            spec,
            user,
            origin,
            ..Job::default()
        };
        let mut facts = Facts::from([("world_size", job.spec.world_size.into()), ("priority", serde_json::json!(job.spec.priority))]);
        facts.extend(job.user.clone().map(|user| ("user", user.into())));
        turn.event(Some(id), "job_submitted", "accepted", facts);
        let (need, priority) = (job.need(), job.spec.priority);
        // What holds the other back holds this one back: a long queue costs nothing to join.
        let waits = self.queue.has_like(id, priority, &need, |other| !self.is_promised(*other));
        self.queue.push(id, priority, need);
        let before = self.jobs.insert(id, job);
        assert!(before.is_none(), "job ids are fresh");
        turn.touched.insert(id);
        if !waits {
            self.schedule(turn);
        }
    }

    fn lease_port(&mut self) -> u16 {
        let (first, last) = self.config.ports;
        let count = u32::from(last - first) + 1;
        for _ in 0..count {
            let port = self.next_port;
            self.next_port = if port == last { first } else { port + 1 };
            if self.ports.insert(port) {
                return port;
            }
        }
        // More gangs than ports: share rather than wait; most gangs of one rank never use theirs.
        let port = self.next_port;
        self.next_port = if port == last { first } else { port + 1 };
        port
    }

    /// Reserves, counts the attempt, and tells the nodes once that is durable.
    pub(super) fn start_gang(&mut self, turn: &mut Turn, id: JobId, placement: Vec<PlacedRanks>) {
        let port = self.lease_port();
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let need = Need::of(&job.spec);
        for (name, taken) in need.held(&placement) {
            if let Some(node) = self.nodes.get_mut(name) {
                node.take(&taken);
            }
            // Ids of log lines count by this order: nobody ever changes his place.
            if !job.nodes.contains(name) {
                job.nodes.push(name.clone());
            }
        }
        let first = placement.first().filter(|_| placement.len() > 1);
        let master_addr = first.and_then(|share| self.nodes.get(&share.node)).and_then(|node| node.address.clone());
        job.attempt = job.next_attempt();
        job.retry_at = None;
        job.ranks = Ranks::pending(placement.iter().map(|share| share.count).sum());
        job.rates.clear();
        job.progress.step = None;
        let placed = placement.iter().map(|share| share.count).sum::<u32>();
        let whole = job.spec.world_size;
        if placed < whole {
            self.short.insert(id);
        }
        let place = placement.iter().map(|p| p.node.to_string()).collect::<Vec<_>>().join(", ");
        self.placed.insert(id);
        job.gang = Some(Gang {
            attempt: job.attempt,
            generation: 0,
            placement,
            port,
            master_addr,
            placed_at: turn.now,
            running_at: None,
            resumed_step: None,
            from_memory: false,
            resumes: Default::default(),
            floor: job.progress.reached,
            ending: None,
            seats: Vec::new(),
            spares: Vec::new(),
            next_seat: job.spec.world_size,
            regroup: None,
            restarts: std::collections::BTreeMap::new(),
        });
        if job.state == JobState::Queued {
            job.state = JobState::Starting;
        }
        job.book.turn(turn.now, if job.attempt == 1 { Activity::Starting } else { Activity::Restoring });
        let fewer = if placed < whole { format!(" with {placed} of {whole} ranks: there is no room for more") } else { String::new() };
        job.reason = format!("attempt {} is starting on {place}{fewer}", job.attempt);
        if let Some(limit) = job.spec.time_limit
            && !self.timers.is_set(&Timer::TimeLimit(id))
        {
            self.timers.set(Timer::TimeLimit(id), Timestamp(turn.now.0 + limit.0));
        }
        let facts = Facts::from([("attempt", job.attempt.into()), ("nodes", place.into()), ("master_port", port.into())]);
        turn.event(Some(id), "attempt_placed", job.reason.clone(), facts);
        turn.step.record.attempts.push((id, job.attempt_view(None)));
        turn.touched.insert(id);
        self.fill_spares(turn, id);
        if let Some((job, gang)) = self.jobs.get(&id).and_then(|job| Some((job, job.gang.as_ref()?))) {
            self.tell_what_is_out_of_reach(turn, job, &gang.placement);
        }
        self.tell_gang(turn, id, None);
    }

    /// Tells the nodes of a gang, or one of them, who is in it; saying it again starts nothing again.
    pub(super) fn tell_gang(&self, turn: &mut Turn, id: JobId, only: Option<&everlit_api::ids::NodeId>) {
        let Some(job) = self.jobs.get(&id) else { return };
        let Some(gang) = &job.gang else { return };
        for (node, mut frame) in job.start_frames(self.config.log_bytes_max) {
            if only.is_some_and(|only| *only != node) {
                continue;
            }
            if let ToAgent::StartGang(spec) = &mut frame
                && gang.resumed_step.is_none()
            {
                spec.fetch = self.fetch_for(job, &gang.placement, &node);
                spec.stored = self.stored_for(job, &gang.placement);
            }
            turn.tell(&node, frame);
        }
    }

    pub(super) fn on_stop_requested(&mut self, turn: &mut Turn, id: JobId, force: bool, delete: bool) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.delete_when_final |= delete;
        turn.touched.insert(id);
        if job.gang.as_ref().and_then(|g| g.ending.as_ref()).is_some_and(|e| e.then == Then::Stop) {
            if force {
                self.stop_ranks(turn, id, Millis(0));
            }
            return;
        }
        turn.event(Some(id), "stop_requested", "a user asked for it", Facts::from([("force", force.into())]));
        self.stop_for_good(turn, id, Then::Stop, None, "stopped by a user".into(), force);
    }

    /// Ends a job now when nothing of it runs, else once its ranks have ended.
    fn stop_for_good(&mut self, turn: &mut Turn, id: JobId, then: Then, cause: Option<Cause>, reason: String, force: bool) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let running = job.gang.is_some() && job.retry_at.is_none();
        if running {
            let grace = if force { Millis(0) } else { job.spec.stop_grace };
            self.end_gang(turn, id, Ending { then, at: turn.now, rank: None, cause, reason, deadline: None }, grace);
            self.lose_ranks(turn, id);
        } else {
            let state = if then == Then::Fail { JobState::Failed } else { JobState::Stopped };
            self.release(id);
            self.finish_job(turn, id, state, reason);
            self.schedule(turn);
        }
    }

    pub(super) fn on_restart_requested(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        turn.event(Some(id), "restart_requested", "a user asked for it", Facts::new());
        turn.touched.insert(id);
        match (&job.gang, job.retry_at) {
            // Between two attempts: the wait is over now.
            (_, Some(_)) => self.on_retry_due(turn, id),
            (Some(gang), None) if gang.ending.is_none() => {
                let reason = "a user asked for a restart".to_string();
                let grace = job.spec.stop_grace;
                self.end_gang(
                    turn,
                    id,
                    Ending { then: Then::Again, at: turn.now, rank: None, cause: Some(Cause::User), reason, deadline: None },
                    grace,
                );
            }
            (None, None) => self.readmit_nodes(turn, id),
            // Ending: it comes back or stops anyway.
            _ => {}
        }
    }

    /// Queued: nothing runs that could be restarted, but nodes that it was kept from may be what it waits for.
    fn readmit_nodes(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| !job.excluded.is_empty()) else { return };
        self.queue.remove(id, job.spec.priority, job.need());
        let nodes = std::mem::take(&mut job.excluded);
        self.queue.push(id, job.spec.priority, job.need());
        let names = nodes.iter().map(|node| node.0.as_str()).collect::<Vec<_>>().join(", ");
        let facts = Facts::from([("nodes", serde_json::json!(nodes))]);
        turn.event(Some(id), "nodes_readmitted", format!("{names} may be used again: a user restarted the job"), facts);
        self.schedule(turn);
    }

    pub(super) fn on_time_limit_due(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let limit = job.spec.time_limit.unwrap_or_default();
        turn.event(Some(id), "time_limit_reached", format!("ran for {limit} (time_limit)"), Facts::new());
        turn.touched.insert(id);
        self.stop_for_good(turn, id, Then::Fail, None, format!("its time limit of {limit} was reached"), false);
    }

    /// The wait before the next attempt is over: same places when they still stand, else the queue.
    pub(super) fn on_retry_due(&mut self, turn: &mut Turn, id: JobId) {
        self.timers.clear(&Timer::Retry(id));
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if job.retry_at.take().is_none() {
            return;
        }
        turn.touched.insert(id);
        let Some(gang) = &job.gang else { return };
        let placement = gang.placement.clone();
        let open = placement.iter().all(|p| self.nodes.get(&p.node).is_some_and(super::placement::Node::is_open));
        let excluded = placement.iter().find(|p| job.excluded.contains(&p.node)).map(|p| p.node.clone());
        let better = if open && excluded.is_none() { self.better_place(id) } else { None };
        self.release(id);
        let Some(job) = self.jobs.get(&id) else { return };
        let placement = self.places_again(job, placement);
        if let Some(node) = excluded {
            self.requeue(turn, id, &format!("{node} is excluded for it by its log_policies"));
        } else if let Some(better) = better {
            self.start_gang(turn, id, better);
            // What it gave back may be what another waits for.
            self.schedule(turn);
        } else if open {
            self.start_gang(turn, id, placement);
        } else {
            self.requeue(turn, id, "its node takes no ranks now");
        }
    }

    /// Gives back what the gang held. The gang's record goes with it.
    pub(super) fn release(&mut self, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let need = job.need();
        if job.state == JobState::Queued {
            self.queue.remove(id, job.spec.priority, need.clone());
        }
        self.timers.clear(&Timer::Retry(id));
        self.timers.clear(&Timer::Straggler(id));
        self.timers.clear(&Timer::Regroup(id));
        self.timers.clear(&Timer::Grow(id));
        job.retry_at = None;
        self.short.remove(&id);
        self.placed.remove(&id);
        self.pass.forget(id);
        let Some(gang) = job.gang.take() else { return };
        self.ports.remove(&gang.port);
        for (name, taken) in need.held(&gang.placement) {
            if let Some(node) = self.nodes.get_mut(name) {
                node.give_back(&taken);
                if node.expelled && node.taken.ranks == 0 {
                    let name = name.clone();
                    self.nodes.remove(&name);
                }
            }
        }
        job.ran_on = gang.placement;
    }

    pub(super) fn requeue(&mut self, turn: &mut Turn, id: JobId, why: &str) {
        self.release(id);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.state = JobState::Queued;
        job.reason = format!("waiting for a place: {why}");
        job.book.turn(turn.now, Activity::Queued);
        turn.event(Some(id), "job_queued", job.reason.clone(), Facts::new());
        turn.touched.insert(id);
        self.queue.push(id, job.spec.priority, job.need());
        self.schedule(turn);
    }

    pub(super) fn finish_job(&mut self, turn: &mut Turn, id: JobId, state: JobState, reason: String) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        assert!(!job.state.is_final(), "a final state never changes");
        job.state = state;
        job.reason = reason;
        job.finished_at = Some(turn.now);
        job.book.settle(turn.now);
        let facts = Facts::from([("state", state.as_str().into()), ("restarts", job.budget.restarts.into())]);
        turn.event(Some(id), "job_final", job.reason.clone(), facts);
        turn.touched.insert(id);
        self.copy_last(turn, id);
        self.upload_last(turn, id);
        self.hand_on(id);
        for node in self.jobs.get(&id).map(Job::keepers).unwrap_or_default() {
            turn.tell(&node, ToAgent::JobEnded { job: id });
        }
    }
}

impl Job {
    /// What each node of the gang is told; saying it twice starts nothing twice.
    pub(super) fn start_frames(&self, log_bytes_max: u64) -> Vec<(everlit_api::ids::NodeId, ToAgent)> {
        let Some(gang) = &self.gang else { return Vec::new() };
        let spec = &self.spec;
        let mut env = spec.env.clone();
        env.extend(spec.secrets.clone());
        let program = match &spec.worker {
            Some(worker) => Program::Worker { worker: Box::new(worker.clone()), evaluate: self.is_evaluation() },
            None => Program::Command { argv: spec.command.clone() },
        };
        let resume_from = spec.resume_from.as_ref().map(|from| match self.begins_from() {
            Some(job) => ResumeFrom::Job(job),
            None => match from.parse() {
                Ok(place) if Place::is_url(from) => ResumeFrom::Store(place),
                _ => ResumeFrom::Path(from.clone()),
            },
        });
        let nodes = gang.placement.len() as u32;
        let data = self.gang_data();
        let frame = |(group_rank, share): (usize, &PlacedRanks)| {
            let gang_spec = GangSpec {
                job: self.id,
                attempt: gang.attempt,
                generation: gang.generation,
                seats: gang.seats.clone(),
                spares: if group_rank == 0 { gang.spares.iter().map(|spare| spare.seat).collect() } else { Vec::new() },
                elastic: spec.least_world_size() < spec.world_size,
                world_size: gang.size(),
                first_rank: share.first_rank,
                count: gang.count_in(share),
                group_rank: group_rank as u32,
                group_world_size: nodes,
                master_addr: gang.master_addr.clone().unwrap_or_else(|| "127.0.0.1".into()),
                master_port: gang.port,
                rendezvous_secret: String::new(),
                restarts: self.budget.restarts,
                max_restarts: spec.restart.max_restarts,
                mean_time_between_failures: Some(mean_time_between_failures(self.book.running_ms(), self.budget.restarts)),
                gpus: share.gpus.clone(),
                shares_gpus: Need::of(spec).shares_gpus(),
                program: program.clone(),
                env: env.clone(),
                workdir: spec.workdir.clone(),
                package: spec.package.clone(),
                shards: if data.is_some() { Vec::new() } else { spec.data.shards.clone() },
                data: data.clone(),
                resume_from: resume_from.clone(),
                fetch: None,
                stored: None,
                rejected_step: self.rejected_step(),
                skip_memory: self.failed_resumes.is_some_and(|failed| failed.from_memory),
                checkpoint: spec.checkpoint.clone(),
                heartbeat: spec.heartbeat,
                log_metrics: spec.log_metrics.clone(),
                log_policies: spec.log_policies.clone(),
                log_bytes_max,
                stop_grace: spec.stop_grace,
            };
            (share.node.clone(), ToAgent::StartGang(Box::new(gang_spec)))
        };
        gang.placement.iter().enumerate().map(frame).collect()
    }

    /// The current attempt for the history.
    pub(super) fn attempt_view(&self, ended_at: Option<Timestamp>) -> AttemptView {
        let gang = self.gang.as_ref();
        let ending = gang.and_then(|g| g.ending.as_ref());
        AttemptView {
            attempt: self.attempt,
            started_at: gang.map_or(self.submitted_at, |g| g.placed_at),
            ended_at,
            resumed_from_step: gang.and_then(|g| g.resumed_step),
            reached_step: self.progress.step,
            cause: ending.and_then(|e| e.cause),
            first_failed_rank: ending.and_then(|e| e.rank),
            reason: ending.map(|e| e.reason.clone()),
            backoff_ms: None,
        }
    }
}
