//! A job and a node as the REST API shows them, made from the engine's own state (active jobs) or from a row read back (final ones).

use everlit_api::ids::NodeId;
use everlit_api::rank::RankState;
use everlit_api::status::{BlameView, JobView, LastCheckpoint, NodeState, NodeView, RankView, Summary};
use everlit_api::time::Timestamp;

use super::placement::{Node, WHOLE};
use super::progress::EVALUATION_LOSS;
use super::state::Job;

impl Job {
    /// `GET /jobs/{id}`; `reason` is the engine's sentence of now.
    pub fn view(&self, reason: String, with_spec: bool) -> JobView {
        JobView {
            job_id: self.id,
            name: self.spec.name.clone(),
            kind: self.spec.kind,
            state: self.state,
            user: self.user.clone(),
            priority: self.spec.priority,
            labels: self.spec.labels.clone(),
            world_size: self.spec.world_size,
            attempt: self.attempt,
            restarts: self.budget.restarts,
            submitted_at: self.submitted_at,
            started_at: self.started_at,
            finished_at: self.finished_at,
            reason: Some(reason),
            spec: with_spec.then(|| self.spec.redacted()),
        }
    }

    /// `GET /jobs/{id}/summary`.
    pub fn summary(&self, now: Timestamp, reason: String) -> Summary {
        let now = self.finished_at.unwrap_or(now);
        let progress = &self.progress;
        let (steps_per_second, samples_per_second) = if self.state.is_final() { (None, None) } else { self.rates.per_second(now) };
        let step = progress.step.or((progress.reached > 0 && self.state.is_final()).then_some(progress.reached));
        let left = progress.total_steps.zip(step).map(|(total, step)| total.saturating_sub(step));
        let eta = left.zip(steps_per_second).filter(|(_, rate)| *rate > 0.0).map(|(left, rate)| left as f64 / rate);
        Summary {
            job_id: self.id,
            name: self.spec.name.clone(),
            kind: self.spec.kind,
            state: self.state,
            world_size: self.spec.world_size,
            step,
            total_steps: progress.total_steps,
            progress: step.zip(progress.total_steps.filter(|t| *t > 0)).map(|(s, t)| (s as f64 / t as f64).min(1.0)),
            steps_per_second,
            samples_per_second,
            loss: progress.loss,
            evaluation_loss: progress.metrics.get(EVALUATION_LOSS).copied(),
            metrics: progress.metrics.clone(),
            eta_seconds: eta,
            attempt: self.attempt,
            generation: self.gang.as_ref().map_or(0, |g| g.generation),
            restarts: self.budget.restarts,
            lost_steps: progress.lost_steps,
            goodput: self.book.goodput(now),
            ledger: self.book.totals(now),
            last_checkpoint: self.checkpoints.first().map(|c| LastCheckpoint {
                step: c.step,
                age_seconds: now.since_ms(c.created_at) as f64 / 1_000.0,
                verified: c.verified,
                location: c.node.as_ref().map_or_else(|| c.path.clone(), |node| format!("{node}:{}", c.path)),
            }),
            ranks: self.rank_views(now),
            spares: self.spare_views(now),
            submitted_at: self.submitted_at,
            started_at: self.started_at,
            finished_at: self.finished_at,
            reason: Some(reason),
        }
    }

    fn rank_views(&self, now: Timestamp) -> Vec<RankView> {
        let never = super::state::Rank::default();
        // An elastic gang may have fewer for now.
        let known = self.ranks.list().len() as u32;
        let ranks = 0..if known == 0 { self.spec.world_size } else { known };
        ranks
            .map(|rank| {
                let own = self.ranks.get(rank).unwrap_or(&never);
                let asked = self.gang.is_some() && self.retry_at.is_none() && own.state == RankState::Pending;
                RankView {
                    rank,
                    node: if own.exit.is_some() { self.node_or_last_of(rank) } else { self.node_of(rank) }.cloned(),
                    pid: own.pid,
                    state: if asked { RankState::Starting } else { own.state },
                    phase: own.phase,
                    step: own.step,
                    slow: self.slow_part(rank).filter(|_| own.pid.is_some()),
                    heartbeat_age_seconds: own.beat_at.filter(|_| own.pid.is_some()).map(|at| now.since_ms(at) as f64 / 1_000.0),
                    exit: own.exit.clone(),
                }
            })
            .collect()
    }
}

impl Job {
    fn spare_views(&self, now: Timestamp) -> Vec<RankView> {
        let Some(gang) = &self.gang else { return Vec::new() };
        let spare = |own: &super::state::Spare| RankView {
            rank: own.seat,
            node: gang.placement.first().map(|share| share.node.clone()),
            pid: own.pid,
            state: if own.pid.is_some() { RankState::Running } else { RankState::Starting },
            phase: own.phase,
            step: None,
            slow: None,
            heartbeat_age_seconds: own.beat_at.map(|at| now.since_ms(at) as f64 / 1_000.0),
            exit: None,
        };
        gang.spares.iter().map(spare).collect()
    }
}

impl Node {
    /// `GET /nodes`.
    pub fn view(&self, id: &NodeId, now: Timestamp) -> NodeView {
        let state = match (self.linked, self.draining) {
            (false, _) => NodeState::Lost,
            (true, true) => NodeState::Draining,
            (true, false) => NodeState::Ready,
        };
        NodeView {
            node: id.clone(),
            state,
            cordoned: self.cordoned,
            joined: None,
            capacity: self.capacity.clone(),
            load: self.load.clone(),
            ranks: self.taken.ranks,
            cpus_reserved: self.taken.cpu_milli as f64 / 1_000.0,
            memory_reserved: self.taken.memory,
            gpus_granted: self.taken.gpus.keys().copied().collect(),
            gpu_memory_reserved: self.taken.gpus.iter().filter(|(_, bytes)| **bytes != WHOLE).map(|(gpu, bytes)| (*gpu, *bytes)).collect(),
            address: self.address.clone(),
            labels: self.labels.clone(),
            taints: self.taints.clone(),
            agent_version: self.version.clone(),
            avoided: self.avoided() > 0,
            blames: self.blames.iter().map(|b| BlameView { time: b.at, job_id: b.job, cause: b.cause }).collect(),
            gpus_avoided: self.avoided_gpus().into_iter().collect(),
            gpu_blames: self.gpu_blames.iter().map(|blame| blame.view(id)).collect(),
            report_age_seconds: self.seen_at.map(|at| now.since_ms(at) as f64 / 1_000.0),
        }
    }
}
