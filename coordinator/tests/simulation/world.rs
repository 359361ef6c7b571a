//! Virtual time: what happens when, and who hears of it. Everything is decided by the seed; nothing here takes real time.
//!
//! The engines of the coordinator and of the agents are the real ones. Simulated are disks, networks, processes, users and clocks.

use std::collections::{BTreeMap, BTreeSet};

use everlit_api::agent::copies::CopyOrder;
use everlit_api::agent::{FromAgent, GangSpec, Resumed, ToAgent};
use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_worker::agent::engine::Event as AgentEvent;

use crate::check::{Checkers, Seen};
use crate::coordinator::Coordinator;
use crate::faults::{Fault, Faults};
use crate::jobs::Script;
use crate::lies::Lies;
use crate::link::Links;
use crate::node::SimNode;
use crate::random::Random;
use crate::slow::SLOW_EVERY_MS;

/// Faults come for so long.
pub const SAFETY_MS: u64 = 10 * 60 * 1_000;
/// After the healing every job must be final within this: five minutes for a straggler, and generous time for the work itself.
pub const LIVENESS_MS: u64 = 4 * 3_600 * 1_000;

/// Events that a long run must have seen.
pub const TOLD: [&str; 16] = [
    "rank_replaced",
    "rank_failed",
    "rank_restarted",
    "gang_shrunk",
    "places_added",
    "recovered_in_place",
    "gang_grown",
    "log_policy_matched",
    "nodes_readmitted",
    "node_blamed",
    "blame_withdrawn",
    "rank_slow",
    "rank_slow_over",
    "gpu_error",
    "preempting",
    "job_preempted",
];

/// What is to happen.
#[derive(Debug, Clone)]
pub enum Happening {
    Submit,
    Fault,
    /// A rank gets slow.
    Slow,
    Heal,
    CoordinatorStart,
    CoordinatorWake {
        life: u64,
    },
    Commit {
        life: u64,
    },
    AgentStart {
        node: usize,
    },
    AgentWake {
        node: usize,
        life: u64,
    },
    /// A fact that reaches a living agent.
    AgentFact {
        node: usize,
        life: u64,
        event: Box<AgentEvent>,
    },
    Dial {
        node: usize,
        life: u64,
    },
    ToCoordinator {
        session: u64,
        frame: Box<FromAgent>,
    },
    ToAgent {
        session: u64,
        frame: Box<ToAgent>,
    },
    /// One end of a session sees that it is over.
    Notice {
        session: u64,
        agent_side: bool,
    },
    /// A node fetches a checkpoint from another.
    Copy {
        node: usize,
        life: u64,
        order: CopyOrder,
    },
    Prepare {
        node: usize,
        life: u64,
        spec: Box<GangSpec>,
    },
    RankUp {
        node: usize,
        life: u64,
        boot: u64,
        incarnation: Incarnation,
    },
    Beat {
        node: usize,
        boot: u64,
        incarnation: Incarnation,
    },
    GangStep {
        node: usize,
        boot: u64,
        job: JobId,
        attempt: u32,
        generation: u32,
    },
    /// An agent brings a membership about.
    Regroup {
        node: usize,
        life: u64,
        spec: Box<GangSpec>,
        resumed: Box<Resumed>,
        fresh: Vec<u32>,
    },
    /// A rank has waited for another membership for too long.
    LoneEnd {
        node: usize,
        boot: u64,
        incarnation: Incarnation,
    },
    GiveUp {
        node: usize,
        boot: u64,
        incarnation: Incarnation,
        generation: u32,
    },
    /// A process ends by itself or by a signal; `lost`: nobody saw how.
    RankEnd {
        node: usize,
        boot: u64,
        incarnation: Incarnation,
        code: Option<i32>,
        signal: Option<i32>,
        lost: bool,
    },
    Mend {
        node: usize,
    },
    /// A user looks after the healed cluster.
    Care,
}

impl Happening {
    /// What a reader of one run wants to see.
    fn is_loud(&self) -> bool {
        !matches!(
            self,
            Self::Beat { .. }
                | Self::AgentFact { .. }
                | Self::AgentWake { .. }
                | Self::CoordinatorWake { .. }
                | Self::ToCoordinator { .. }
                | Self::ToAgent { .. }
                | Self::Dial { .. }
                | Self::Prepare { .. }
        )
    }
}

pub struct World {
    pub now: u64,
    agenda: BTreeMap<(u64, u64), Happening>,
    sequence: u64,
    pub random: Random,
    /// Who gets slow, when, for how long: from a source of its own, so that all else is as it would be without.
    pub slow_random: Random,
    /// In which start an agent dies, likewise.
    pub start_random: Random,
    pub coordinator: Coordinator,
    pub nodes: Vec<SimNode>,
    pub links: Links,
    pub scripts: BTreeMap<JobId, Script>,
    pub faults: Faults,
    favourites: Vec<Fault>,
    pub healed: bool,
    pub checkers: Checkers,
    pub violation: Option<String>,
    /// A hash over all that happened: the same seed gives the same.
    pub trace: u64,
    /// How often each of [`TOLD`] came.
    pub told: BTreeMap<&'static str, u64>,
    /// Happenings so far.
    pub count: u64,
    pub next_pid: u32,
    /// Tell what happens.
    pub loud: bool,
    /// Disks that lie, in some worlds.
    pub lies: Option<Lies>,
    /// Attempts that something was done to: a signal to their ranks has a reason.
    pub disturbed: BTreeSet<(JobId, u32)>,
}

/// In every third world nodes reach each other, so that gangs go over several, and jobs have priorities. No draw, so that seeds stay the runs
/// that they were.
fn is_wide(seed: u64) -> bool {
    seed % 3 == 1
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let favourites = (0..3).filter_map(|_| Fault::favourite(&mut random)).collect();
        let mut nodes = (0..random.between(1, 3)).map(|number| SimNode::new(number as usize, &mut random)).collect::<Vec<_>>();
        if is_wide(seed) {
            nodes.iter_mut().for_each(|node| node.address = Some(node.id.0.clone()));
        }
        let mut world = Self {
            now: 0,
            agenda: BTreeMap::new(),
            sequence: 0,
            random,
            slow_random: Random::new(!seed),
            start_random: Random::new(seed.rotate_left(32)),
            coordinator: Coordinator::default(),
            nodes,
            links: Links::default(),
            scripts: BTreeMap::new(),
            faults: Faults::default(),
            favourites,
            healed: false,
            checkers: Checkers::default(),
            violation: None,
            trace: 0xCBF2_9CE4_8422_2325,
            told: TOLD.iter().map(|name| (*name, 0)).collect(),
            count: 0,
            next_pid: 100,
            loud: false,
            lies: Lies::of(seed),
            disturbed: BTreeSet::new(),
        };
        world.at(0, Happening::CoordinatorStart);
        for node in 0..world.nodes.len() {
            world.at(10, Happening::AgentStart { node });
        }
        let jobs = world.random.between(2, 6);
        for _ in 0..jobs {
            let at = world.random.below(SAFETY_MS / 2);
            world.at(at, Happening::Submit);
        }
        let first = world.random.between(1_000, 20_000);
        world.at(first, Happening::Fault);
        world.at(SLOW_EVERY_MS, Happening::Slow);
        world.at(SAFETY_MS, Happening::Heal);
        world
    }

    pub fn at(&mut self, time: u64, happening: Happening) {
        self.sequence += 1;
        self.agenda.insert((time.max(self.now), self.sequence), happening);
    }

    pub fn after(&mut self, wait: u64, happening: Happening) {
        self.at(self.now + wait, happening);
    }

    /// After a wait of chance.
    pub fn soon(&mut self, least: u64, most: u64, happening: Happening) {
        let wait = self.random.between(least, most);
        self.after(wait, happening);
    }

    pub fn note(&mut self, tag: u64, a: u64, b: u64) {
        for word in [self.now, tag, a, b] {
            self.trace = (self.trace ^ word).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(7);
        }
    }

    pub fn saw(&mut self, seen: &Seen<'_>) {
        if self.loud {
            println!("{:>9}     {}", self.now, seen.text());
        }
        if let Seen::Written(record) = seen {
            for event in &record.events {
                if let Some(name) = TOLD.iter().find(|name| event.event == **name) {
                    *self.told.entry(name).or_default() += 1;
                }
            }
        }
        let mut checkers = std::mem::take(&mut self.checkers);
        let result = checkers.saw(self, seen);
        self.checkers = checkers;
        if let Err(why) = result {
            self.violation.get_or_insert(why);
        }
    }

    pub fn violated(&mut self, why: String) {
        self.violation.get_or_insert(why);
    }

    pub fn disturb(&mut self, job: JobId, attempt: u32) {
        self.disturbed.insert((job, attempt));
    }

    /// Runs to the end; why not, when something that must hold did not.
    pub fn run(&mut self) -> Result<(), String> {
        while let Some(((time, _), happening)) = self.agenda.pop_first() {
            self.now = time;
            self.count += 1;
            if self.loud && happening.is_loud() {
                println!("{time:>9} {happening:?}");
            }
            self.happen(happening);
            if let Some(why) = self.violation.take() {
                return Err(format!("at {} ms: {why}", self.now));
            }
            if self.healed && self.is_settled() {
                return self.checkers.at_the_end(self).map_err(|why| format!("at the end: {why}"));
            }
            if self.now > SAFETY_MS + LIVENESS_MS {
                return Err(format!("liveness: {}", self.what_is_left()));
            }
        }
        Err(format!("nothing happens any more: {}", self.what_is_left()))
    }

    fn is_settled(&self) -> bool {
        self.coordinator.store.active.is_empty()
            && self.coordinator.is_idle()
            && (0..self.nodes.len()).all(|node| self.nodes[node].living().next().is_none() && self.reached_since(node).is_some())
            && self.coordinator.store.removals.values().all(BTreeSet::is_empty)
    }

    fn what_is_left(&self) -> String {
        let jobs: Vec<String> = self
            .coordinator
            .store
            .active
            .keys()
            .map(|id| {
                let job = self.coordinator.store.read(*id).expect("active");
                format!("job {} is {}: {}", id.as_u128(), job.state, job.reason)
            })
            .collect();
        let living: Vec<String> = self.nodes.iter().flat_map(|node| node.living().map(|i| format!("{}@{}", i, node.id))).collect();
        let away: Vec<&str> =
            (0..self.nodes.len()).filter(|node| self.reached_since(*node).is_none()).map(|node| self.nodes[node].id.0.as_str()).collect();
        let removals: Vec<String> = self.coordinator.store.removals.iter().map(|(node, jobs)| format!("{node}: {}", jobs.len())).collect();
        format!(
            "{} jobs not final ({}); living: {}; not linked: {}; files to remove: {}; idle: {}",
            jobs.len(),
            jobs.join("; "),
            living.join(", "),
            away.join(", "),
            removals.join(", "),
            self.coordinator.is_idle()
        )
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Submit => self.submit(),
            Happening::Fault => self.on_fault(),
            Happening::Heal => self.heal(),
            Happening::CoordinatorStart => self.start_coordinator(),
            Happening::CoordinatorWake { life } => self.wake_coordinator(life),
            Happening::Commit { life } => self.on_committed(life),
            Happening::AgentStart { node } => self.start_agent(node),
            Happening::AgentWake { node, life } => self.wake_agent(node, life),
            Happening::AgentFact { node, life, event } => {
                if self.nodes[node].life == life {
                    self.tell_agent(node, *event);
                }
            }
            Happening::Dial { node, life } => self.dial(node, life),
            Happening::ToCoordinator { session, frame } => self.deliver_to_coordinator(session, *frame),
            Happening::ToAgent { session, frame } => self.deliver_to_agent(session, *frame),
            Happening::Notice { session, agent_side } => self.notice(session, agent_side),
            Happening::Copy { node, life, order } => self.copy(node, life, &order),
            Happening::Prepare { node, life, spec } => self.prepare(node, life, *spec),
            Happening::RankUp { node, life, boot, incarnation } => self.rank_up(node, life, boot, incarnation),
            Happening::Beat { node, boot, incarnation } => self.beat(node, boot, incarnation),
            Happening::GangStep { node, boot, job, attempt, generation } => self.gang_step(node, boot, job, attempt, generation),
            Happening::Regroup { node, life, spec, resumed, fresh } => self.regroup(node, life, *spec, *resumed, &fresh),
            Happening::LoneEnd { node, boot, incarnation } => self.lone_end(node, boot, incarnation),
            Happening::GiveUp { node, boot, incarnation, generation } => self.give_up(node, boot, incarnation, generation),
            Happening::RankEnd { node, boot, incarnation, code, signal, lost } => {
                self.rank_end(node, boot, incarnation, code, signal, lost);
            }
            Happening::Slow => self.on_slow(),
            Happening::Mend { node } => self.nodes[node].disk_full = false,
            Happening::Care => {
                self.uncordon_all();
                self.restart_what_is_kept_from_every_node();
                self.after(30_000, Happening::Care);
            }
        }
    }

    /// From here on nothing breaks any more, and what is broken is mended.
    fn heal(&mut self) {
        self.healed = true;
        for node in 0..self.nodes.len() {
            self.nodes[node].partitioned = false;
            self.nodes[node].disk_full = false;
        }
        if self.coordinator.engine.is_none() {
            self.after(0, Happening::CoordinatorStart);
        }
        for node in 0..self.nodes.len() {
            if self.nodes[node].agent.is_none() {
                self.after(0, Happening::AgentStart { node });
            }
        }
        self.after(0, Happening::Care);
    }

    fn uncordon_all(&mut self) {
        let ids: Vec<NodeId> = self.nodes.iter().map(|node| node.id.clone()).collect();
        for id in ids {
            self.wish(everlit_coordinator::engine::Event::CordonRequested { node: id, cordoned: false });
        }
    }

    /// A job that waits with excluded nodes may wait for ever: a user sees it, and says that they are well.
    fn restart_what_is_kept_from_every_node(&mut self) {
        let waits =
            |job: &everlit_coordinator::engine::state::Job| job.state == everlit_api::status::JobState::Queued && !job.excluded.is_empty();
        let jobs: Vec<JobId> =
            self.coordinator.engine.iter().flat_map(|engine| engine.jobs().filter(|job| waits(job)).map(|job| job.id)).collect();
        for job in jobs {
            self.wish(everlit_coordinator::engine::Event::RestartRequested { job });
        }
    }

    fn on_fault(&mut self) {
        if self.healed {
            return;
        }
        let fault = Fault::any(&mut self.random, &self.favourites);
        let fired = self.inject(fault);
        if self.loud {
            println!("{:>9} fault {fault:?}{}", self.now, if fired { "" } else { " (nothing there)" });
        }
        if fired {
            self.faults.fired(fault);
        }
        self.soon(200, 20_000, Happening::Fault);
    }
}
