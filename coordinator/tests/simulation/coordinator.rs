//! The coordinator's shell, simulated: batches are made durable before their commands run, and a crash may come at every point of that.

use std::collections::BTreeMap;
use std::sync::Arc;

use everlit_api::agent::{FromAgent, ToAgent};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::time::Timestamp;
use everlit_coordinator::engine::{Command, Config, Engine, Event, Step};

use crate::check::Seen;
use crate::jobs::Script;
use crate::store::Store;
use crate::world::{Happening, World};

/// Wall clocks of the simulation begin here.
pub const EPOCH_MS: u64 = 1_800_000_000_000;

/// Where the next crash comes, when one was ordered for a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrashAt {
    /// The transaction is lost.
    BeforeWrite,
    /// It is on the disk, and none of its commands has run.
    AfterWrite,
}

#[derive(Default)]
pub struct Coordinator {
    pub engine: Option<Engine>,
    pub life: u64,
    pub store: Store,
    /// Its clock is so far ahead of virtual time.
    offset: u64,
    pending: Vec<(Timestamp, Step)>,
    committing: Vec<(Timestamp, Step)>,
    wake: Option<u64>,
    /// The newest session of each node.
    pub sessions: BTreeMap<NodeId, u64>,
    pub crash_at: Option<CrashAt>,
    /// The next commits take so long.
    pub slow_commit_ms: u64,
    /// The wall clock jumps so far at the next start.
    pub clock_jump_ms: i64,
    next_job: u128,
}

impl Coordinator {
    /// Nothing waits to be written.
    pub fn is_idle(&self) -> bool {
        self.engine.is_some() && self.pending.is_empty() && self.committing.is_empty()
    }
}

impl World {
    fn time(&self) -> Timestamp {
        Timestamp(self.now + self.coordinator.offset)
    }

    pub fn start_coordinator(&mut self) {
        if self.coordinator.engine.is_some() {
            return;
        }
        let wall = EPOCH_MS.saturating_add_signed(std::mem::take(&mut self.coordinator.clock_jump_ms)) + self.now;
        let own = &mut self.coordinator;
        own.life += 1;
        own.offset = wall.max(own.store.last_time.0) - self.now;
        own.sessions.clear();
        own.wake = None;
        let now = Timestamp(self.now + own.offset);
        let engine = Engine::load(Config::default(), now, &own.store.jobs(), &own.store.nodes()).expect("rows of this build");
        own.engine = Some(engine);
        self.note(1, self.coordinator.life, 0);
        self.saw(&Seen::CoordinatorStarted);
        self.set_coordinator_wake();
    }

    /// Kill -9. What is being written is on the disk or not; what waits for it is gone.
    pub fn kill_coordinator(&mut self, written: bool) {
        if self.coordinator.engine.take().is_none() {
            return;
        }
        self.note(2, self.coordinator.life, u64::from(written));
        let committing = std::mem::take(&mut self.coordinator.committing);
        self.coordinator.pending.clear();
        if written && !committing.is_empty() {
            self.write(&committing);
        }
        self.lose_store_writes();
        self.coordinator.life += 1;
        self.cut_where(|link| link.coordinator_up || !link.agent_seen_end, 1, 50);
    }

    fn set_coordinator_wake(&mut self) {
        let own = &mut self.coordinator;
        let Some(at) = own.engine.as_ref().and_then(Engine::next_deadline) else { return };
        let at = at.0.saturating_sub(own.offset);
        if own.wake.is_none_or(|before| at < before) {
            own.wake = Some(at);
            let life = own.life;
            self.at(at, Happening::CoordinatorWake { life });
        }
    }

    pub fn wake_coordinator(&mut self, life: u64) {
        if self.coordinator.life != life || self.coordinator.engine.is_none() {
            return;
        }
        if self.coordinator.wake.is_some_and(|at| at <= self.now) {
            self.coordinator.wake = None;
        }
        self.feed(Event::Woke);
    }

    /// A user's wish: nobody hears it while the coordinator is down.
    pub fn wish(&mut self, event: Event) {
        if self.coordinator.engine.is_some() {
            self.feed(event);
        }
    }

    pub fn submit(&mut self) {
        if self.coordinator.engine.is_none() {
            // A user tries again.
            return self.soon(100, 3_000, Happening::Submit);
        }
        self.coordinator.next_job += 1;
        let id = JobId::from_u128(self.coordinator.next_job);
        let (spec, script) = Script::any(&mut self.random, &self.nodes);
        self.scripts.insert(id, script);
        let seed = self.random.next();
        self.feed(Event::JobSubmitted { id, spec: Arc::new(spec), seed, user: None, origin: Vec::new() });
    }

    pub fn feed(&mut self, event: Event) {
        let now = self.time();
        let Some(engine) = self.coordinator.engine.as_mut() else { return };
        let step = engine.handle(now, event);
        for event in &step.record.events {
            let lost = event.event == "gang_failed" && event.data.get("cause").is_some_and(|cause| cause == "node_lost");
            self.on_event(event.job, if lost { "node_lost" } else { event.event });
        }
        self.coordinator.pending.push((now, step));
        self.set_coordinator_wake();
        self.begin_commit();
    }

    /// Why ranks may be signalled from now on. That the engine calls a gang failed is no reason: something must have happened to it.
    fn on_event(&mut self, job: Option<JobId>, event: &str) {
        let attempt = job.and_then(|id| Some((id, self.coordinator.engine.as_ref()?.job(id)?.attempt)));
        if let Some((job, attempt)) = attempt
            && matches!(event, "stop_requested" | "restart_requested" | "time_limit_reached" | "job_preempted" | "node_lost")
        {
            self.saw(&Seen::Reason { job, attempt });
        }
    }

    fn begin_commit(&mut self) {
        if !self.coordinator.committing.is_empty() || self.coordinator.pending.is_empty() {
            return;
        }
        let steps = std::mem::take(&mut self.coordinator.pending);
        if steps.iter().all(|(_, step)| step.record.is_empty()) {
            return self.run_commands(steps);
        }
        self.coordinator.committing = steps;
        match self.coordinator.crash_at.take() {
            Some(at) => {
                self.kill_coordinator(at == CrashAt::AfterWrite);
                self.soon(50, 15_000, Happening::CoordinatorStart);
            }
            None => {
                let slow = std::mem::take(&mut self.coordinator.slow_commit_ms);
                let life = self.coordinator.life;
                self.soon(1 + slow, 8 + slow, Happening::Commit { life });
            }
        }
    }

    pub fn on_committed(&mut self, life: u64) {
        if self.coordinator.life != life {
            return;
        }
        let steps = std::mem::take(&mut self.coordinator.committing);
        self.write(&steps);
        self.run_commands(steps);
        self.begin_commit();
    }

    fn write(&mut self, steps: &[(Timestamp, Step)]) {
        self.remember_store();
        self.coordinator.store.commit(steps);
        for (_, step) in steps {
            for row in &step.record.jobs {
                self.note(3, row.id.as_u128() as u64, row.body.len() as u64);
            }
            self.saw(&Seen::Written(&step.record));
        }
    }

    fn run_commands(&mut self, steps: Vec<(Timestamp, Step)>) {
        for command in steps.into_iter().flat_map(|(_, step)| step.commands) {
            match command {
                Command::Tell { node, frame } => {
                    self.saw(&Seen::Told { node: &node, frame: &frame });
                    self.send_to_agent(&node, frame);
                }
                // No world has a store.
                Command::KeepPostmortem { .. } => {}
                Command::Final { job, state, delete, .. } => {
                    self.note(4, job.as_u128() as u64, state as u64);
                    self.saw(&Seen::Final { job, state });
                    if delete {
                        self.ask_removals();
                    }
                }
            }
        }
    }

    fn ask_removals(&mut self) {
        let asked: Vec<(NodeId, JobId)> =
            self.coordinator.store.removals.iter().flat_map(|(node, jobs)| jobs.iter().map(|job| (node.clone(), *job))).collect();
        for (node, job) in asked {
            self.send_to_agent(&node, ToAgent::RemoveJob { job });
        }
    }

    /// A frame has come over a session that still stands.
    pub fn hear(&mut self, node: NodeId, session: u64, frame: FromAgent) {
        match &frame {
            FromAgent::Hello(_) => drop(self.coordinator.sessions.insert(node.clone(), session)),
            FromAgent::Removed { job } => {
                if let Some(jobs) = self.coordinator.store.removals.get_mut(&node) {
                    jobs.remove(job);
                }
            }
            _ => {}
        }
        let linked = matches!(frame, FromAgent::Hello(_));
        if let Some(event) = Event::of_frame(node, frame) {
            self.feed(event);
        }
        if linked {
            self.ask_removals();
        }
    }
}
