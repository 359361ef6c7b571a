//! What breaks, and what users do meanwhile. Each kind is counted when it really happened: a fault that found nothing to break did not fire.

use std::collections::BTreeMap;

use everlit_api::ids::{Incarnation, JobId};
use everlit_coordinator::engine::Event;

use crate::coordinator::CrashAt;
use crate::random::Random;
use crate::world::{Happening, World};

macro_rules! faults {
    ($($name:ident),* $(,)?) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Fault { $($name),* }
        impl Fault {
            pub const ALL: &[Self] = &[$(Self::$name),*];
        }
    };
}

faults! {
    RankKilled, RankFailed, RankHung, ShimKilled, AgentKilled, AgentAndRankKilled, AgentTermed, NodeRebooted, LinkCut, Partitioned,
    FrameTwice, CoordinatorKilled, CoordinatorAndRankKilled, CrashBeforeWrite, CrashAfterWrite, SlowWrite, ClockAhead, ClockBack, DiskFull,
    CheckpointDamaged, UserStops, UserForces, UserDeletes, UserRestarts, UserSaves, UserCordons, UserUncordons, UserDrains,
    RankSlow, StoreWritesLost, CheckpointLost, CheckpointTorn, OrderLost, GpuFailed, AgentKilledInStart, CheckpointCopied, CheckpointFetched, CheckpointLate,
}

/// Of so many starts of a rank that others of its gang come after, one is the last thing that the agent does.
const DIES_IN_START: u64 = 60;
/// Where users' doings begin in [`Fault::ALL`], and where what is drawn ends: ranks get slow and agents die in a start at times of their own,
/// what disks that lie lose is lost with other faults, and what becomes of
/// checkpoints between nodes follows from others.
const USERS: usize = 20;
const DRAWN: usize = 28;

#[derive(Debug, Default, Clone)]
pub struct Faults {
    pub counts: BTreeMap<Fault, u64>,
}

impl Faults {
    pub fn fired(&mut self, fault: Fault) {
        *self.counts.entry(fault).or_default() += 1;
    }
}

impl Fault {
    /// A kind that comes again and again in a run.
    pub fn favourite(random: &mut Random) -> Option<Self> {
        random.pick(&Self::ALL[..DRAWN])
    }

    /// Every run has a few kinds that come again and again: what needs the same fault many times is found too.
    pub fn any(random: &mut Random, favourites: &[Self]) -> Self {
        if random.percent(40)
            && let Some(favourite) = random.pick(favourites)
        {
            return favourite;
        }
        // What ranks, agents and coordinators do is commoner than what users do.
        let list = if random.percent(75) { &Self::ALL[..USERS] } else { &Self::ALL[USERS..DRAWN] };
        random.pick(list).expect("neither part is empty")
    }
}

impl World {
    fn any_living(&mut self) -> Option<(usize, Incarnation)> {
        let all: Vec<(usize, Incarnation)> =
            self.nodes.iter().enumerate().flat_map(|(number, node)| node.living().map(move |own| (number, own))).collect();
        self.random.pick(&all)
    }

    fn any_job(&mut self) -> Option<JobId> {
        let jobs: Vec<JobId> = self.coordinator.engine.as_ref()?.jobs().map(|job| job.id).collect();
        self.random.pick(&jobs)
    }

    fn end_one(&mut self, code: Option<i32>, signal: Option<i32>, lost: bool) -> bool {
        let Some((node, incarnation)) = self.any_living() else { return false };
        let boot = self.nodes[node].boot;
        self.after(0, Happening::RankEnd { node, boot, incarnation, code, signal, lost });
        true
    }

    /// Whether there was something to break.
    pub fn inject(&mut self, fault: Fault) -> bool {
        let node = self.random.below(self.nodes.len() as u64) as usize;
        self.note(30, fault as u64, node as u64);
        match fault {
            Fault::RankKilled => self.end_one(None, Some(9), false),
            Fault::RankFailed => self.end_one(Some(1), None, false),
            Fault::ShimKilled => self.end_one(None, None, true),
            Fault::RankHung => {
                let Some((node, incarnation)) = self.any_living() else { return false };
                self.disturb(incarnation.job, incarnation.attempt);
                self.nodes[node].runs.get_mut(&incarnation).map(|run| run.hung = true).is_some()
            }
            Fault::AgentKilled => self.lose_agent(node),
            Fault::AgentAndRankKilled => {
                let rank = self.end_one(None, Some(9), false);
                self.lose_agent(node) && rank
            }
            Fault::AgentTermed => {
                let alive = self.nodes[node].agent.is_some();
                self.disturb_node(node);
                self.tell_agent(node, everlit_worker::agent::engine::Event::EndAsked);
                alive
            }
            Fault::NodeRebooted => {
                self.reboot(node);
                true
            }
            Fault::LinkCut => {
                let linked = self.session_of(node).is_some();
                self.cut_where(|link| link.node == node, 1, 3_000);
                linked
            }
            Fault::Partitioned => {
                let linked = self.session_of(node).is_some();
                self.nodes[node].partitioned = !self.nodes[node].partitioned;
                self.cut_where(|link| link.node == node, 1_000, 20_000);
                linked
            }
            Fault::FrameTwice => {
                self.links.duplicate = true;
                true
            }
            Fault::CoordinatorKilled => self.lose_coordinator(),
            Fault::CoordinatorAndRankKilled => {
                let rank = self.end_one(None, Some(9), false);
                self.lose_coordinator() && rank
            }
            Fault::CrashBeforeWrite => self.crash_at(CrashAt::BeforeWrite),
            Fault::CrashAfterWrite => self.crash_at(CrashAt::AfterWrite),
            Fault::SlowWrite => {
                self.coordinator.slow_commit_ms = self.random.between(100, 20_000);
                true
            }
            Fault::ClockAhead => {
                self.coordinator.clock_jump_ms = self.random.between(1_000, 3_600_000) as i64;
                self.lose_coordinator()
            }
            Fault::ClockBack => {
                self.coordinator.clock_jump_ms = -(self.random.between(1_000, 3_600_000) as i64);
                self.lose_coordinator()
            }
            Fault::DiskFull => {
                self.nodes[node].disk_full = true;
                self.soon(1_000, 40_000, Happening::Mend { node });
                true
            }
            Fault::CheckpointDamaged => {
                let kept = self.nodes[node].checkpoints.values_mut().filter_map(|kept| kept.steps.values_mut().next_back()).next();
                kept.map(|newest| newest.1 = true).is_some()
            }
            Fault::RankSlow => self.slow_one_down(),
            Fault::GpuFailed => false,
            _ => self.user(fault, node),
        }
    }

    fn user(&mut self, fault: Fault, node: usize) -> bool {
        let id = self.nodes[node].id.clone();
        let Some(job) = self.any_job() else { return false };
        let event = match fault {
            Fault::UserStops => Event::StopRequested { job, force: false, delete: false },
            Fault::UserForces => Event::StopRequested { job, force: true, delete: false },
            Fault::UserDeletes => {
                self.checkers.retention.asked.insert(job);
                Event::StopRequested { job, force: false, delete: true }
            }
            Fault::UserRestarts => Event::RestartRequested { job },
            Fault::UserSaves => Event::SaveRequested { job },
            Fault::UserCordons => Event::CordonRequested { node: id, cordoned: true },
            Fault::UserUncordons => Event::CordonRequested { node: id, cordoned: false },
            _ => {
                self.disturb_node(node);
                Event::NodeDraining { node: id, cordon: true, deadline: None }
            }
        };
        self.wish(event);
        true
    }

    /// Everything that runs there may be signalled.
    pub fn disturb_node(&mut self, node: usize) {
        let all: Vec<(JobId, u32)> = self.nodes[node].runs.keys().map(|own| (own.job, own.attempt)).collect();
        self.disturbed.extend(all);
        self.checkers.signals.drained(&self.nodes[node].id);
    }

    /// The agent may die between the starts of two ranks of a gang. Nobody may notice: so nothing is disturbed.
    pub fn lose_agent_in_start(&mut self, node: usize, started: Incarnation) {
        let same = |own: &Incarnation| (own.job, own.attempt) == (started.job, started.attempt);
        let waits = self.nodes[node].runs.iter().any(|(own, run)| same(own) && run.pid.is_none() && run.exit.is_none());
        if waits && !self.healed && self.start_random.below(DIES_IN_START) == 0 {
            self.lose_agent(node);
            self.faults.fired(Fault::AgentKilledInStart);
        }
    }

    fn lose_agent(&mut self, node: usize) -> bool {
        let alive = self.nodes[node].agent.is_some();
        self.kill_agent(node);
        self.soon(50, 20_000, Happening::AgentStart { node });
        alive
    }

    fn lose_coordinator(&mut self) -> bool {
        let alive = self.coordinator.engine.is_some();
        let written = self.random.percent(50);
        self.kill_coordinator(written);
        self.soon(20, 30_000, Happening::CoordinatorStart);
        alive
    }

    fn crash_at(&mut self, at: CrashAt) -> bool {
        let alive = self.coordinator.engine.is_some();
        if alive {
            self.coordinator.crash_at = Some(at);
        }
        alive
    }
}
