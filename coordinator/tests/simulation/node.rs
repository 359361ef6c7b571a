//! A node: the agent's real engine, and below it a disk and processes that are simulated. What is on the disk, and what runs, outlives the
//! agent; a reboot leaves the disk alone.

use std::collections::{BTreeMap, BTreeSet};

use everlit_api::agent::{GangSpec, Resumed};
use everlit_api::gpu::GpuError;
use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_api::rank::{LogMatch, RankExit};
use everlit_api::status::{Capacity, GpuInfo};
use everlit_api::time::Timestamp;
use everlit_worker::agent::engine::{Action, Engine, Event, no_exit};

use crate::check::Seen;
use crate::coordinator::EPOCH_MS;
use crate::random::Random;
use crate::world::{Happening, World};

const SIGTERM: i32 = 15;
/// How long an agent stays with neither coordinator nor ranks.
const LINGER_MS: u64 = 60_000;

pub struct SimNode {
    pub id: NodeId,
    pub capacity: Capacity,
    /// Where other nodes reach it: in some worlds, so that gangs go over several nodes there.
    pub address: Option<String>,
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
    pub met: BTreeMap<(JobId, u32), u32>,
    pub stepped: BTreeMap<(JobId, u32), u32>,
    pub checkpoints: BTreeMap<JobId, Checkpoints>,
    pub ended: BTreeSet<JobId>,
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
    pub drained: bool,
    pub ending: bool,
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
            address: None,
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
    pub fn words(&self, own: Incarnation, code: Option<i32>) -> Option<LogMatch> {
        self.spec(own).filter(|spec| code == Some(1) && !spec.log_policies.is_empty())?;
        let policy = match (own.job.as_u128() * 5 + u128::from(own.attempt * 3 + own.rank)) % 11 {
            0 => 1,
            1..=4 => 0,
            _ => return None,
        };
        Some(LogMatch { policy, line: "what was looked for".into() })
    }

    /// What the GPU of one that failed had, if it had anything: decided by who it is, so that it takes no draw.
    pub fn gpu_error(&self, own: Incarnation, code: Option<i32>, boot: u64, at: Timestamp) -> Option<GpuError> {
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
    pub fn wall(&self, node: usize) -> Timestamp {
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
            // Ranks of the gang on other nodes are stopped for it.
            let reason = if own.disk_full { "no space left on device" } else { "a later attempt was started here" }.to_string();
            self.disturb(job, attempt);
            return self.tell_agent(node, Event::GangRefused { job, attempt, reason, permanent: false });
        }
        // A coordinator that says so has forgotten that it was final.
        own.ended.remove(&job);
        let kept = own.checkpoints.entry(job).or_default();
        kept.fence = kept.fence.max(attempt);
        let damaged: Vec<u64> = kept.steps.iter().filter(|(_, (_, damaged))| *damaged).map(|(step, _)| *step).collect();
        kept.steps.retain(|step, _| !damaged.contains(step));
        if let Some(why) = self.fetch(node, &spec) {
            self.disturb(job, attempt);
            return self.tell_agent(node, Event::GangRefused { job, attempt, reason: why, permanent: false });
        }
        let own = &mut self.nodes[node];
        let kept = own.checkpoints.entry(job).or_default();
        let from = kept.steps.last_key_value().map(|(step, (by, _))| (*step, *by));
        let step = kept.steps.last_key_value().map(|(step, _)| *step);
        let quarantined = damaged.into_iter().map(|step| (step, "a flipped bit".to_string())).collect();
        let resumed = Resumed { step, path: step.map(|step| format!("/c/{step}")), quarantined, ..Resumed::from_nothing(job, attempt) };
        for seat in spec.own_seats().map(|(_, seat)| seat).chain(spec.spares.iter().copied()) {
            own.runs.insert(Incarnation { job, attempt, rank: seat }, Run::default());
        }
        own.gangs.retain(|(other, older), _| {
            *other != job || *older >= attempt || own.runs.keys().any(|run| run.job == job && run.attempt == *older)
        });
        own.gangs.insert((job, attempt), (spec, resumed.clone()));
        let own = &mut self.nodes[node];
        own.trainers.insert((job, attempt), step.unwrap_or(0));
        own.met.remove(&(job, attempt));
        own.stepped.remove(&(job, attempt));
        self.saw(&Seen::Resumed { node, job, attempt, from });
        let at = self.wall(node);
        self.tell_agent(node, Event::GangPrepared { resumed, at });
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
