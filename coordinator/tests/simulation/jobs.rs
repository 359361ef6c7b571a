//! What users submit: jobs that would end well by themselves, and some that never would.

use everlit_api::job::{Device, JobSpec, LogAction, LogPolicy, Priority, Resources, RestartScope};
use everlit_api::time::Millis;

use crate::node::SimNode;
use crate::random::Random;

/// How the program of a job behaves.
#[derive(Debug, Clone)]
pub struct Script {
    pub kind: Kind,
    pub steps: u64,
    pub step_ms: u64,
    pub save_every: u64,
    /// Ranks of a broken gang end by themselves (Gloo), or block until they are killed (NCCL).
    pub peers_notice: bool,
    /// The built-in program: ranks of a broken gang wait for another membership.
    pub in_place: bool,
    /// Ranks that need each other in nothing, and are restarted one by one.
    pub alone: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Heartbeats, steps, checkpoints.
    Trains,
    /// Output only, no checkpoints.
    Mute,
    /// Every attempt fails at once.
    CrashLoop,
    /// The program does not exist.
    Missing,
}

impl Script {
    pub fn any(random: &mut Random, nodes: &[SimNode]) -> (JobSpec, Self) {
        let kind = match random.below(20) {
            0 => Kind::Missing,
            1 => Kind::CrashLoop,
            2..=4 => Kind::Mute,
            _ => Kind::Trains,
        };
        let mut world = random.between(1, 4) as u32;
        let wide = nodes.iter().all(|node| node.address.is_some());
        if wide {
            // More than one node holds, and never more than all of them.
            let all: u32 = nodes.iter().map(|node| node.capacity.slots).sum();
            world = (world * world).min(all);
        }
        let mut spec = JobSpec { worker: None, command: vec!["work".into()], ..JobSpec::default_for(world) };
        let gpus = nodes.iter().map(|node| node.capacity.gpus.len()).max().unwrap_or(0) as u64;
        if gpus >= u64::from(world) && random.percent(60) {
            spec.resources = Resources { gpus: 1, ..spec.resources };
        }
        spec.stop_grace = Millis(random.between(0, 5_000));
        let most = if random.percent(50) { 3 } else { 60 };
        spec.restart.max_restarts = random.between(0, most) as u32;
        spec.restart.max_start_failures = random.between(2, 8) as u32;
        spec.restart.backoff.max = Millis(random.between(500, 30_000));
        // Long runs without forgiveness, so that what is counted can be counted again from outside.
        spec.restart.heal_after = Millis(100 * 3_600 * 1_000);
        if random.percent(5) {
            spec.time_limit = Some(Millis(random.between(20_000, 600_000)));
        }
        if kind == Kind::Mute {
            // A lone rank without heartbeats may else be idle for ever.
            spec.heartbeat.idle_timeout = Some(Millis(random.between(20_000, 120_000)));
        }
        let in_place = kind == Kind::Trains && world > 1 && random.percent(50);
        if in_place {
            let mut worker = JobSpec::default_for(world).worker;
            worker.iter_mut().for_each(|worker| worker.device = Device::Cpu);
            (spec.worker, spec.command) = (worker, Vec::new());
            spec.resources.gpus = 0;
            // What no node could ever hold would wait for ever.
            let slots = nodes.iter().map(|node| node.capacity.slots).max().unwrap_or(0);
            spec.restart.spares = (random.below(3) as u32).min(slots.saturating_sub(world));
        }
        let steps = random.between(5, 150);
        // No draw of its own, so that seeds of before stay the runs that they were.
        if in_place && steps.is_multiple_of(3) {
            spec.min_world_size = Some(1 + (steps / 3) as u32 % world).filter(|least| *least < world);
        }
        if steps.is_multiple_of(4) {
            let policy = |action| LogPolicy { name: None, pattern: "x".into(), action };
            spec.log_policies = vec![policy(LogAction::ExcludeNode), policy(LogAction::CancelRetries)];
        }
        if wide {
            spec.priority = [Priority::Low, Priority::Normal, Priority::High, Priority::Low][steps as usize % 4];
            if spec.resources.gpus > 0 && steps.is_multiple_of(3) {
                spec.resources = Resources { gpus: 0, gpu_memory: (10 + steps % 30) << 30, ..spec.resources };
            }
        }
        let (step_ms, save_every, peers_notice) = (random.between(50, 3_000), random.between(1, 20), random.percent(70));
        let alone = kind == Kind::Mute && world > 1 && steps.is_multiple_of(2);
        if alone {
            spec.restart.scope = RestartScope::Rank;
        }
        (spec, Self { kind, steps, step_ms, save_every, peers_notice, in_place, alone })
    }
}
