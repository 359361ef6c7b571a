//! A node: the agent's real engine, and below it a disk and processes that are simulated. What is on the disk, and what runs, outlives the
//! agent; a reboot leaves the disk alone.

use std::collections::{BTreeMap, BTreeSet};

use everlit_api::agent::{Beat, CheckpointNews, GangSpec, Resumed};
use everlit_api::gpu::GpuError;
use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_api::rank::{LogMatch, RankExit};
use everlit_api::status::{Capacity, GpuInfo};
use everlit_api::time::Timestamp;
use everlit_worker::agent::engine::{Action, Engine, Event, drained, no_exit};

use crate::check::Seen;
use crate::coordinator::EPOCH_MS;
use crate::faults::Fault;
use crate::jobs::Kind;
use crate::random::Random;
use crate::slow::parts;
use crate::world::{Happening, World};

const SIGTERM: i32 = 15;
/// How long an agent stays with neither coordinator nor ranks.
const LINGER_MS: u64 = 60_000;

pub struct SimNode {
    pub id: NodeId,
    pub capacity: Capacity,
    pub boot: u64,
    pub agent: Option<Engine>,
    /// Counts the agent's lives: news for an earlier one reach nobody.
    pub life: u64,
    /// The agent's clock began then.
    pub base: u64,
    wake: Option<u64>,
    pub partitioned: bool,
    pub disk_full: bool,
    /// Its wall clock is off by so much.
    skew_ms: i64,
    /// `runs/`: every rank that is not forgotten.
    pub runs: BTreeMap<Incarnation, Run>,
    /// `gang.json` by attempt.
    pub gangs: BTreeMap<(JobId, u32), (GangSpec, Resumed)>,
    pub trainers: BTreeMap<(JobId, u32), u64>,
    /// The membership whose ranks have met, and the one that has done a step.
    met: BTreeMap<(JobId, u32), u32>,
    stepped: BTreeMap<(JobId, u32), u32>,
    pub checkpoints: BTreeMap<JobId, Checkpoints>,
    ended: BTreeSet<JobId>,
}

/// A run folder and, maybe, its process.
#[derive(Debug, Clone, Default)]
pub struct Run {
    pub pid: Option<u32>,
    pub exit: Option<(RankExit, bool)>,
    /// Stopped: it neither beats nor heeds SIGTERM.
    pub hung: bool,
    /// Its own part of a step takes longer until then.
    pub slow_until: u64,
    pub seq: u64,
    drained: bool,
    ending: bool,
}

impl Run {
    pub fn is_alive(&self) -> bool {
        self.pid.is_some() && self.exit.is_none()
    }
}

/// A job's checkpoints on this node.
#[derive(Debug, Clone, Default)]
pub struct Checkpoints {
    pub fence: u32,
    /// Step, and by which attempt; `true` for a damaged one.
    pub steps: BTreeMap<u64, (u32, bool)>,
}

impl SimNode {
    pub fn new(number: usize, random: &mut Random) -> Self {
        let gpus = if random.percent(50) { random.between(1, 4) } else { 0 };
        let gpu = |index| GpuInfo { index: index as u32, name: "GPU".into(), uuid: format!("GPU-{number}-{index}"), memory: 80 << 30 };
        let capacity = Capacity { cpus: 8.0, memory: 64 << 30, gpus: (0..gpus).map(gpu).collect(), slots: random.between(4, 10) as u32 };
        Self {
            id: NodeId(format!("node-{number}")),
            capacity,
            boot: 1,
            agent: None,
            life: 0,
            base: 0,
            wake: None,
            partitioned: false,
            disk_full: false,
            skew_ms: random.between(0, 4_000) as i64 - 2_000,
            runs: BTreeMap::new(),
            gangs: BTreeMap::new(),
            trainers: BTreeMap::new(),
            met: BTreeMap::new(),
            stepped: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            ended: BTreeSet::new(),
        }
    }

    pub fn living(&self) -> impl Iterator<Item = Incarnation> {
        self.runs.iter().filter(|(_, run)| run.is_alive()).map(|(incarnation, _)| *incarnation)
    }

    /// The gang that a process belongs to, as its agent was told last.
    pub fn spec(&self, own: Incarnation) -> Option<&GangSpec> {
        self.gangs.get(&(own.job, own.attempt)).map(|(spec, _)| spec)
    }

    /// The processes that are ranks now.
    pub fn members(&self, job: JobId, attempt: u32) -> Vec<Incarnation> {
        let seats = self.gangs.get(&(job, attempt)).into_iter().flat_map(|(spec, _)| spec.own_seats());
        seats.map(|(_, seat)| Incarnation { job, attempt, rank: seat }).collect()
    }

    pub fn has_ended(&self, own: &Incarnation) -> bool {
        self.runs.get(own).is_none_or(|run| run.exit.is_some())
    }

    /// What one that failed wrote, if its job looks for that: decided by who it is.
    fn words(&self, own: Incarnation, code: Option<i32>) -> Option<LogMatch> {
        self.spec(own).filter(|spec| code == Some(1) && !spec.log_policies.is_empty())?;
        let policy = match (own.job.as_u128() * 5 + u128::from(own.attempt * 3 + own.rank)) % 11 {
            0 => 1,
            1..=4 => 0,
            _ => return None,
        };
        Some(LogMatch { policy, line: "what was looked for".into() })
    }

    /// What the GPU of one that failed had, if it had anything: decided by who it is, so that it takes no draw.
    fn gpu_error(&self, own: Incarnation, code: Option<i32>, boot: u64, at: Timestamp) -> Option<GpuError> {
        let lives = self.boot == boot && self.runs.get(&own).is_some_and(Run::is_alive);
        let index = *self.spec(own).filter(|_| lives && code == Some(1))?.gpus.get(own.rank as usize)?;
        let xid = match (own.job.as_u128() * 7 + u128::from(own.attempt * 5 + own.rank * 3)) % 9 {
            0 => 79,
            1 | 2 => 94,
            3 => 31,
            _ => return None,
        };
        let uuid = self.capacity.gpus.iter().find(|gpu| gpu.index == index)?.uuid.clone();
        Some(GpuError { gpu: index, uuid, xid, at })
    }

    fn gang_ranks(&self, job: JobId, attempt: u32) -> Vec<Incarnation> {
        self.runs.keys().filter(|own| own.job == job && own.attempt == attempt).copied().collect()
    }
}

impl World {
    fn wall(&self, node: usize) -> Timestamp {
        Timestamp((EPOCH_MS + self.now).saturating_add_signed(self.nodes[node].skew_ms))
    }

    /// Hands a fact to the agent's engine and carries out what it wants.
    pub fn tell_agent(&mut self, node: usize, event: Event) {
        let now = self.now;
        let unlinked = matches!(event, Event::Unlinked);
        let own = &mut self.nodes[node];
        let base = own.base;
        let Some(engine) = own.agent.as_mut() else { return };
        let actions = engine.handle(now - base, event);
        let deadline = engine.next_deadline();
        let draining = engine.hello(now - base).2;
        if unlinked && !draining && actions.iter().any(|action| matches!(action, Action::Signal { .. })) {
            self.violated("INV-4: an agent signals ranks because its coordinator is gone".into());
        }
        for action in actions {
            self.carry_out(node, action);
        }
        let own = &mut self.nodes[node];
        if let Some(at) = deadline.map(|at| base + at)
            && own.agent.is_some()
            && own.wake.is_none_or(|before| at < before || before < now)
        {
            own.wake = Some(at);
            let life = own.life;
            self.at(at, Happening::AgentWake { node, life });
        }
    }

    pub fn wake_agent(&mut self, node: usize, life: u64) {
        if self.nodes[node].life != life {
            return;
        }
        self.nodes[node].wake = None;
        self.tell_agent(node, Event::DeadlinePassed);
    }

    pub fn start_agent(&mut self, node: usize) {
        if self.nodes[node].agent.is_some() {
            return;
        }
        let now = self.now;
        let own = &mut self.nodes[node];
        own.life += 1;
        own.base = now;
        own.wake = None;
        own.agent = Some(Engine::new(0, LINGER_MS));
        let life = own.life;
        self.note(20, node as u64, life);
        self.adopt(node);
        self.soon(5, 100, Happening::Dial { node, life });
    }

    /// What an agent does before its first connection.
    fn adopt(&mut self, node: usize) {
        let own = &self.nodes[node];
        let jobs: Vec<JobId> = own.checkpoints.keys().filter(|job| !own.ended.contains(job)).copied().collect();
        for job in jobs {
            if let Some(news) = self.news_of(node, job, true) {
                self.tell_agent(node, Event::CheckpointSeen(Box::new(news)));
            }
        }
        let own = &self.nodes[node];
        let gangs: Vec<(GangSpec, Resumed)> = own.gangs.values().filter(|(spec, _)| !own.ended.contains(&spec.job)).cloned().collect();
        for (spec, resumed) in gangs {
            let ranks = self.nodes[node].gang_ranks(spec.job, spec.attempt);
            if ranks.is_empty() {
                continue;
            }
            // The agent died between two starts.
            let never = |own: &&Incarnation| self.nodes[node].runs.get(own).is_some_and(|run| run.pid.is_none() && run.exit.is_none());
            let unstarted: Vec<u32> = ranks.iter().filter(never).map(|own| own.rank).collect();
            let numbers = ranks.iter().map(|own| own.rank).collect();
            self.tell_agent(node, Event::GangFound { spec: Box::new(spec), resumed: Some(resumed), ranks: numbers, unstarted });
            for incarnation in ranks {
                let at = self.wall(node);
                let Some(run) = self.nodes[node].runs.get(&incarnation) else { continue };
                let (pid, exit) = (run.pid, run.exit.clone());
                if let Some(pid) = pid {
                    self.tell_agent(node, Event::RankStarted { incarnation, pid, at });
                }
                if let Some((exit, lost)) = exit {
                    self.tell_agent(node, Event::RankEnded { incarnation, exit, lost });
                }
            }
        }
    }

    /// Kill -9 of the agent: ranks live on.
    pub fn kill_agent(&mut self, node: usize) {
        if self.nodes[node].agent.take().is_none() {
            return;
        }
        self.note(21, node as u64, self.nodes[node].life);
        self.nodes[node].life += 1;
        self.cut_where(|link| link.node == node, 1, 50);
    }

    fn carry_out(&mut self, node: usize, action: Action) {
        let life = self.nodes[node].life;
        match action {
            Action::Say(frame) => self.send_to_coordinator(node, frame),
            Action::Prepare(spec) => self.soon(2, 60, Happening::Prepare { node, life, spec }),
            Action::Spawn { job, attempt } => {
                let boot = self.nodes[node].boot;
                for incarnation in self.nodes[node].gang_ranks(job, attempt) {
                    self.soon(2, 300, Happening::RankUp { node, life, boot, incarnation });
                }
            }
            Action::Regroup { spec, resumed, fresh } => {
                self.soon(2, 60, Happening::Regroup { node, life, spec, resumed: Box::new(resumed), fresh });
            }
            Action::LeaveOut(incarnation) => {
                let exit = no_exit("stopped before it was started", self.wall(node));
                let event = Box::new(Event::RankEnded { incarnation, exit, lost: true });
                self.soon(1, 5, Happening::AgentFact { node, life, event });
            }
            Action::Signal { incarnation, signal } => self.signal(node, incarnation, signal),
            Action::Notify { incarnation, .. } => self.save(node, incarnation.job, incarnation.attempt),
            Action::MarkDrained(incarnation) => {
                if let Some(run) = self.nodes[node].runs.get_mut(&incarnation) {
                    run.drained = true;
                }
            }
            Action::ReadCpu(incarnation) => {
                // A mute program that is not stopped works all the time.
                let busy = self.nodes[node].runs.get(&incarnation).is_some_and(|run| !run.hung);
                let cpu_ms = if busy { self.now } else { 0 };
                self.soon(1, 5, Happening::AgentFact { node, life, event: Box::new(Event::CpuRead { incarnation, cpu_ms }) });
            }
            Action::Probe(_) => {
                let took_ms = (!self.nodes[node].disk_full).then_some(1);
                self.soon(1, 5, Happening::AgentFact { node, life, event: Box::new(Event::Probed { took_ms }) });
            }
            Action::RemoveRuns(incarnations) => {
                for incarnation in &incarnations {
                    if self.nodes[node].runs.remove(incarnation).is_some_and(|run| run.is_alive()) {
                        self.violated(format!("{incarnation} is forgotten and lives"));
                    }
                }
            }
            Action::RetireJob(job) => {
                self.saw(&Seen::Retired { job });
                self.nodes[node].ended.insert(job);
            }
            Action::RemoveJob(job) => {
                self.saw(&Seen::Removed { node, job });
                let own = &mut self.nodes[node];
                own.runs.retain(|incarnation, _| incarnation.job != job);
                own.gangs.retain(|(other, _), _| *other != job);
                own.checkpoints.remove(&job);
                own.trainers.retain(|(other, _), _| *other != job);
                own.met.retain(|(other, _), _| *other != job);
                own.stepped.retain(|(other, _), _| *other != job);
                own.ended.remove(&job);
                self.soon(1, 50, Happening::AgentFact { node, life, event: Box::new(Event::JobRemoved(job)) });
            }
            Action::FreeSnapshots { .. } => {}
            Action::Exit(_) => {
                self.kill_agent(node);
                self.soon(500, 5_000, Happening::AgentStart { node });
            }
        }
    }

    fn signal(&mut self, node: usize, incarnation: Incarnation, signal: i32) {
        self.note(22, incarnation.rank.into(), signal as u64);
        self.saw(&Seen::Signal { node, incarnation, signal });
        let boot = self.nodes[node].boot;
        let Some(run) = self.nodes[node].runs.get_mut(&incarnation).filter(|run| run.is_alive()) else { return };
        if signal == SIGTERM {
            if !run.hung && !std::mem::replace(&mut run.ending, true) {
                let end = Happening::RankEnd { node, boot, incarnation, code: Some(143), signal: None, lost: false };
                self.soon(10, 800, end);
            }
        } else {
            self.soon(1, 10, Happening::RankEnd { node, boot, incarnation, code: None, signal: Some(signal), lost: false });
        }
    }

    /// On a thread of the agent: nothing of it stays when the agent dies before its end.
    pub fn prepare(&mut self, node: usize, life: u64, spec: GangSpec) {
        if self.nodes[node].life != life {
            return;
        }
        let (job, attempt) = (spec.job, spec.attempt);
        let own = &mut self.nodes[node];
        let newest = own.gangs.range((job, 0)..=(job, u32::MAX)).next_back().map(|((_, attempt), _)| *attempt);
        if own.disk_full || newest.is_some_and(|newest| newest > attempt) {
            let reason = if own.disk_full { "no space left on device" } else { "a later attempt was started here" }.to_string();
            return self.tell_agent(node, Event::GangRefused { job, attempt, reason, permanent: false });
        }
        // A coordinator that says so has forgotten that it was final.
        own.ended.remove(&job);
        let kept = own.checkpoints.entry(job).or_default();
        kept.fence = kept.fence.max(attempt);
        let damaged: Vec<u64> = kept.steps.iter().filter(|(_, (_, damaged))| *damaged).map(|(step, _)| *step).collect();
        kept.steps.retain(|step, _| !damaged.contains(step));
        let step = kept.steps.last_key_value().map(|(step, _)| *step);
        let quarantined = damaged.into_iter().map(|step| (step, "a flipped bit".to_string())).collect();
        let resumed = Resumed { job, attempt, step, path: step.map(|step| format!("/c/{step}")), from_memory: false, quarantined };
        for seat in spec.own_seats().map(|(_, seat)| seat).chain(spec.spares.iter().copied()) {
            own.runs.insert(Incarnation { job, attempt, rank: seat }, Run::default());
        }
        own.gangs.retain(|(other, older), _| {
            *other != job || *older >= attempt || own.runs.keys().any(|run| run.job == job && run.attempt == *older)
        });
        own.gangs.insert((job, attempt), (spec, resumed.clone()));
        own.trainers.insert((job, attempt), step.unwrap_or(0));
        own.met.remove(&(job, attempt));
        own.stepped.remove(&(job, attempt));
        let at = self.wall(node);
        self.tell_agent(node, Event::GangPrepared { resumed, at });
    }

    pub fn rank_up(&mut self, node: usize, life: u64, boot: u64, incarnation: Incarnation) {
        let own = &self.nodes[node];
        if own.life != life || own.boot != boot || own.runs.get(&incarnation).is_none_or(|run| run.pid.is_some() || run.exit.is_some()) {
            return;
        }
        self.next_pid += 1;
        let (pid, at) = (self.next_pid, self.wall(node));
        self.saw(&Seen::RankUp { incarnation });
        if let Some(run) = self.nodes[node].runs.get_mut(&incarnation) {
            run.pid = Some(pid);
        }
        self.tell_agent(node, Event::RankStarted { incarnation, pid, at });
        self.lose_agent_in_start(node, incarnation);
        let (job, attempt) = (incarnation.job, incarnation.attempt);
        let script = self.scripts[&job].clone();
        let end = |code| Happening::RankEnd { node, boot, incarnation, code: Some(code), signal: None, lost: false };
        match script.kind {
            Kind::Missing => return self.soon(1, 5, end(127)),
            Kind::CrashLoop => return self.soon(50, 3_000, end(1)),
            Kind::Trains | Kind::Mute => {}
        }
        self.soon(100, 1_500, Happening::Beat { node, boot, incarnation });
        if script.alone {
            let work_ms = script.steps * script.step_ms;
            return self.soon(work_ms / 2, work_ms * 2, Happening::LoneEnd { node, boot, incarnation });
        }
        self.meet(node, boot, job, attempt);
    }

    /// A rank that needs nobody is done.
    pub fn lone_end(&mut self, node: usize, boot: u64, incarnation: Incarnation) {
        if self.nodes[node].runs.get(&incarnation).is_some_and(|run| !run.hung && !run.ending) {
            self.rank_end(node, boot, incarnation, Some(0), None, false);
        }
    }

    /// Ranks that all live begin to step, once for each membership.
    fn meet(&mut self, node: usize, boot: u64, job: JobId, attempt: u32) {
        let own = &mut self.nodes[node];
        let members = own.members(job, attempt);
        let all = members.iter().all(|member| own.runs.get(member).is_some_and(|run| run.is_alive() && !run.hung));
        let Some(generation) = own.gangs.get(&(job, attempt)).map(|(spec, _)| spec.generation).filter(|_| all) else { return };
        if own.met.insert((job, attempt), generation) != Some(generation) {
            self.soon(200, 2_000, Happening::GangStep { node, boot, job, attempt, generation });
        }
    }

    /// On a thread of the agent: the ranks that live are told who is with them now.
    pub fn regroup(&mut self, node: usize, life: u64, spec: GangSpec, resumed: Resumed, fresh: &[u32]) {
        if self.nodes[node].life != life {
            return;
        }
        let (job, attempt, boot) = (spec.job, spec.attempt, self.nodes[node].boot);
        let incarnation = |seat: &u32| Incarnation { job, attempt, rank: *seat };
        if self.nodes[node].disk_full {
            for own in fresh.iter().map(incarnation) {
                let exit = no_exit("no space left on device", self.wall(node));
                self.disturb(job, attempt);
                self.tell_agent(node, Event::RankEnded { incarnation: own, exit, lost: true });
            }
            return;
        }
        // Threads may bring two memberships about in any order; the later one stays.
        if self.nodes[node].gangs.get(&(job, attempt)).is_none_or(|(known, _)| known.generation <= spec.generation) {
            self.nodes[node].gangs.insert((job, attempt), (spec, resumed));
        }
        for seat in fresh.iter().map(incarnation) {
            self.nodes[node].runs.insert(seat, Run::default());
            self.soon(2, 300, Happening::RankUp { node, life, boot, incarnation: seat });
        }
        if !self.scripts[&job].alone {
            self.meet(node, boot, job, attempt);
        }
    }

    /// Nobody said who follows a dead rank.
    pub fn give_up(&mut self, node: usize, boot: u64, incarnation: Incarnation, generation: u32) {
        let own = &self.nodes[node];
        let waits = own.spec(incarnation).is_some_and(|spec| spec.generation == generation);
        if waits && own.members(incarnation.job, incarnation.attempt).iter().any(|member| own.has_ended(member)) {
            self.after(0, Happening::RankEnd { node, boot, incarnation, code: Some(1), signal: None, lost: false });
        }
    }

    /// A sign of life, once a second.
    pub fn beat(&mut self, node: usize, boot: u64, incarnation: Incarnation) {
        let own = &mut self.nodes[node];
        let key = (incarnation.job, incarnation.attempt);
        let stepped = own.stepped.get(&key).copied();
        let (generation, member) =
            own.spec(incarnation).map_or((0, true), |spec| (spec.generation, spec.rank_of(incarnation.rank).is_some()));
        // In a later membership a rank tells of steps once it has done one there.
        let tells = member && (generation == 0 || stepped == Some(generation));
        let step = own.trainers.get(&key).copied().filter(|_| tells);
        let Some(run) = own.runs.get_mut(&incarnation).filter(|run| run.is_alive() && !run.hung && own.boot == boot) else { return };
        run.seq += 1;
        let seq = run.seq;
        let script = &self.scripts[&incarnation.job];
        let metrics = parts(run, incarnation, script, self.now);
        let event = if script.kind == Kind::Mute {
            Event::RankOutput(incarnation)
        } else {
            let beat = Beat {
                incarnation: Some(incarnation),
                heartbeat: true,
                step,
                total_steps: Some(script.steps),
                generation,
                saves_on_signal: member,
                metrics,
                in_place: (script.in_place && stepped.is_some()).then_some(true),
                ..Beat::default()
            };
            Event::HeartbeatRead { incarnation, seq, beat: Box::new(beat), save_error: None }
        };
        self.tell_agent(node, event);
        self.after(1_000, Happening::Beat { node, boot, incarnation });
    }

    /// One update of a gang of which every rank takes part; a rank that is dead or stopped blocks the others.
    pub fn gang_step(&mut self, node: usize, boot: u64, job: JobId, attempt: u32, generation: u32) {
        let ranks = self.nodes[node].members(job, attempt);
        let own = &mut self.nodes[node];
        let spec = own.gangs.get(&(job, attempt)).filter(|(spec, _)| spec.generation == generation);
        let world = spec.map_or(0, |(spec, _)| spec.world_size as usize);
        let takes_part = |own: &Incarnation, runs: &BTreeMap<Incarnation, Run>| {
            runs.get(own).is_some_and(|run| run.is_alive() && !run.hung && !run.ending)
        };
        if own.boot != boot || world == 0 || ranks.len() != world || !ranks.iter().all(|rank| takes_part(rank, &own.runs)) {
            return;
        }
        let script = self.scripts[&job].clone();
        let Some(step) = own.trainers.get_mut(&(job, attempt)) else { return };
        *step = (*step + 1).min(script.steps);
        let step = *step;
        self.nodes[node].stepped.insert((job, attempt), generation);
        let done = step >= script.steps;
        if script.kind == Kind::Trains && (done || step.is_multiple_of(script.save_every)) {
            self.save(node, job, attempt);
        }
        if done {
            for incarnation in ranks {
                self.soon(1, 100, Happening::RankEnd { node, boot, incarnation, code: Some(0), signal: None, lost: false });
            }
        } else {
            self.soon(script.step_ms / 2 + 1, script.step_ms * 2, Happening::GangStep { node, boot, job, attempt, generation });
        }
    }

    /// A commit, if the fence lets it.
    pub fn save(&mut self, node: usize, job: JobId, attempt: u32) {
        let Some(step) = self.nodes[node].trainers.get(&(job, attempt)).copied() else { return };
        let fence = self.nodes[node].checkpoints.entry(job).or_default().fence;
        if self.nodes[node].disk_full || fence > attempt || self.nodes[node].ended.contains(&job) {
            return;
        }
        self.saw(&Seen::Committed { node, job, attempt });
        let keep = 3;
        if let Some(kept) = self.nodes[node].checkpoints.get_mut(&job) {
            kept.steps.insert(step, (attempt, false));
            while kept.steps.len() > keep {
                kept.steps.pop_first();
            }
        }
        for verified in [false, true] {
            if let Some(news) = self.news_of(node, job, verified) {
                let life = self.nodes[node].life;
                let wait = if verified { 30 } else { 1 };
                self.after(wait, Happening::AgentFact { node, life, event: Box::new(Event::CheckpointSeen(Box::new(news))) });
            }
        }
    }

    fn news_of(&self, node: usize, job: JobId, verified: bool) -> Option<CheckpointNews> {
        let kept = self.nodes[node].checkpoints.get(&job)?;
        let (step, (attempt, _)) = kept.steps.last_key_value()?;
        let steps = kept.steps.keys().rev().copied().collect();
        let created_at = self.wall(node);
        Some(CheckpointNews {
            job,
            attempt: *attempt,
            step: *step,
            bytes: 1,
            created_at,
            verified,
            path: format!("/c/{step}"),
            kept: steps,
        })
    }

    pub fn rank_end(&mut self, node: usize, boot: u64, incarnation: Incarnation, code: Option<i32>, signal: Option<i32>, lost: bool) {
        let at = self.wall(node);
        if let Some(error) = self.nodes[node].gpu_error(incarnation, code, boot, at) {
            self.faults.fired(Fault::GpuFailed);
            self.tell_agent(node, Event::GpuFailed(error));
        }
        let own = &mut self.nodes[node];
        let matched = own.words(incarnation, code);
        let Some(run) = own.runs.get_mut(&incarnation).filter(|run| run.is_alive() && own.boot == boot) else { return };
        let exit = match lost {
            true => no_exit("its shim died", at),
            false => {
                RankExit { code, signal, error: None, at, tail: Vec::new(), message: None, matched, out_of_memory: false, gpu_error: None }
            }
        };
        let (exit, lost) = if run.drained { (drained(exit), true) } else { (exit, lost) };
        run.exit = Some((exit.clone(), lost));
        self.note(23, incarnation.rank.into(), code.unwrap_or(-1) as u64);
        if code != Some(0) {
            self.disturb(incarnation.job, incarnation.attempt);
            self.peers_of_a_dead_rank(node, boot, incarnation);
        }
        self.tell_agent(node, Event::RankEnded { incarnation, exit, lost });
    }

    fn peers_of_a_dead_rank(&mut self, node: usize, boot: u64, dead: Incarnation) {
        let script = &self.scripts[&dead.job];
        let (notice, in_place) = (script.peers_notice, script.in_place);
        let own = &self.nodes[node];
        let generation = own.spec(dead).map_or(0, |spec| spec.generation);
        if script.alone || !(notice || in_place) || own.spec(dead).is_some_and(|spec| spec.rank_of(dead.rank).is_none()) {
            return;
        }
        for incarnation in self.nodes[node].members(dead.job, dead.attempt) {
            if in_place {
                self.after(15_000, Happening::GiveUp { node, boot, incarnation, generation });
            } else if self.nodes[node].runs.get(&incarnation).is_some_and(|run| run.is_alive() && !run.hung) {
                self.soon(5, 400, Happening::RankEnd { node, boot, incarnation, code: Some(1), signal: None, lost: false });
            }
        }
    }

    /// Power off and on: nothing lives, and only the disk remembers.
    pub fn reboot(&mut self, node: usize) {
        self.kill_agent(node);
        let at = self.wall(node);
        let own = &mut self.nodes[node];
        own.boot += 1;
        let mut ended = Vec::new();
        for (incarnation, run) in &mut own.runs {
            // Who was still to be started is not, either: the others are gone.
            if run.exit.is_none() {
                run.exit = Some((no_exit("its shim died", at), true));
                ended.push((incarnation.job, incarnation.attempt));
            }
        }
        for (job, attempt) in ended {
            self.disturb(job, attempt);
        }
        self.lose_node_writes(node);
        self.soon(1_000, 40_000, Happening::AgentStart { node });
    }
}
