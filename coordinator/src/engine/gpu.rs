//! Errors of GPUs: which job they hit, what is held against a GPU, and other GPUs for a gang that is started again.
//!
//! A hardware error is held against the GPU, never against its node, and blames no program. A GPU that needs a reset or replacement is avoided at
//! once, another after as many errors as a node; like a node it is never forbidden. GPUs are known by their unique id: after a restart of
//! the machine without one of them, its index is another one's.

use std::collections::BTreeSet;

use everlit_api::agent::GpuHolder;
use everlit_api::gpu::GpuError;
use everlit_api::ids::{JobId, NodeId};
use everlit_api::rank::Cause;
use everlit_api::status::{GpuBlameView, PlacedRanks};
use everlit_api::time::Timestamp;
use serde::{Deserialize, Serialize};

use super::gang::plain_sentence;
use super::limits::{BLAME_MS, BLAMES_MIN, GPU_BLAMES_MAX, GPU_ERROR_AFTER_MS, GPU_ERROR_SPACING_MS};
use super::placement::{Need, Node};
use super::state::{Facts, Job};
use super::{Engine, Turn};

/// A hardware error that is held against a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuBlame {
    /// When it was heard of here.
    pub at: Timestamp,
    /// What.
    pub error: GpuError,
    /// Whose ranks had the GPU, if any had.
    pub job: Option<JobId>,
}

impl GpuBlame {
    /// For `GET /nodes`.
    pub(super) fn view(&self, node: &NodeId) -> GpuBlameView {
        let error = &self.error;
        let reason = error.describe(Some(&node.0));
        GpuBlameView { time: self.at, gpu: error.gpu, uuid: error.uuid.clone(), xid: error.xid, reason, job_id: self.job }
    }
}

impl Node {
    /// Whether new ranks get a GPU last.
    fn is_gpu_avoided(&self, uuid: &str) -> bool {
        let own = || self.gpu_blames.iter().filter(|blame| blame.error.uuid == uuid);
        own().any(|blame| blame.error.about().needs_reset) || own().count() >= BLAMES_MIN
    }

    fn is_gpu_held(&self, gpu: u32) -> bool {
        [&self.taken, &self.promised, &self.reserved].iter().any(|held| held.gpus.contains_key(&gpu))
    }

    /// Indexes of the GPUs that new ranks get last.
    pub fn avoided_gpus(&self) -> BTreeSet<u32> {
        if self.gpu_blames.is_empty() {
            return BTreeSet::new();
        }
        self.capacity.gpus.iter().filter(|gpu| self.is_gpu_avoided(&gpu.uuid)).map(|gpu| gpu.index).collect()
    }

    /// How many of these are avoided.
    pub(super) fn avoided_among(&self, gpus: &[u32]) -> usize {
        let avoided = self.avoided_gpus();
        gpus.iter().filter(|gpu| avoided.contains(gpu)).count()
    }

    /// The same share with other GPUs for those that are avoided, as far as others are free and large enough.
    fn better_gpus(&self, share: &PlacedRanks, need: &Need) -> Vec<u32> {
        let avoided = self.avoided_gpus();
        if need.shares_gpus() {
            return share.gpus.clone();
        }
        let fits = |memory: u64| memory == 0 || memory >= need.estimate.device.max(need.gpu_memory);
        let mut others = self.capacity.gpus.iter().filter(|gpu| !avoided.contains(&gpu.index) && fits(gpu.memory)).map(|gpu| gpu.index);
        let mut others = others.by_ref().filter(|gpu| !self.is_gpu_held(*gpu));
        let mut gpus: Vec<u32> =
            share.gpus.iter().map(|gpu| if avoided.contains(gpu) { others.next().unwrap_or(*gpu) } else { *gpu }).collect();
        gpus.sort_unstable();
        gpus
    }
}

/// The rank that has a GPU of a share: each takes those of its number there, as `CUDA_VISIBLE_DEVICES` and `LOCAL_RANK` say.
pub(super) fn rank_with(share: &PlacedRanks, gpu: u32) -> Option<u32> {
    let place = share.gpus.iter().position(|own| *own == gpu)?;
    let each = (share.gpus.len() / share.count.max(1) as usize).max(1);
    Some(share.first_rank + (place / each) as u32)
}

impl Engine {
    /// A GPU had an error, which its agent heard of, or which a rank's end carries: it is told and counted once.
    pub(super) fn on_gpu_failed(&mut self, turn: &mut Turn, name: &NodeId, error: GpuError) {
        let Some(node) = self.nodes.get(name).filter(|_| error.is_hardware()) else { return };
        let same = |known: &GpuError| (known.xid, &known.uuid) == (error.xid, &error.uuid);
        // One incident may be reported many times.
        if node.gpu_blames.iter().any(|blame| same(&blame.error) && blame.error.at.0.abs_diff(error.at.0) < GPU_ERROR_SPACING_MS) {
            return;
        }
        let held = |job: &Job| {
            let gang = job.gang.as_ref().filter(|_| job.retry_at.is_none())?;
            let rank = gang.placement.iter().filter(|share| share.node == *name).find_map(|share| rank_with(share, error.gpu))?;
            Some((job.id, gang.attempt, rank))
        };
        let holder = self.jobs.values().find_map(held);
        let blame = GpuBlame { at: turn.now, error: error.clone(), job: holder.map(|(job, ..)| job) };
        self.change_held(turn, name, |_, gpus| {
            if gpus.len() >= GPU_BLAMES_MAX {
                // What is known for certain stays the longest.
                gpus.remove(gpus.iter().position(|old| !old.error.about().needs_reset).unwrap_or(0));
            }
            gpus.push(blame);
        });
        let avoided = self.nodes.get(name).is_some_and(|node| node.is_gpu_avoided(&error.uuid));
        let hours = BLAME_MS / 3_600_000;
        let what = if avoided { format!("it is avoided for {hours} h where another GPU is free") } else { "one may be chance".into() };
        let whose = holder.map(|(.., rank)| format!("rank {rank}: ")).unwrap_or_default();
        let mut facts = Facts::from([
            ("node", name.0.clone().into()),
            ("gpu", error.gpu.into()),
            ("uuid", error.uuid.clone().into()),
            ("xid", error.xid.into()),
            ("class", serde_json::json!(error.about().class)),
            ("avoided", avoided.into()),
        ]);
        if let Some((_, attempt, rank)) = holder {
            facts.extend([("attempt", attempt.into()), ("rank", rank.into())]);
        }
        let reason = format!("{whose}{}; {what}", error.describe(Some(&name.0)));
        turn.event(holder.map(|(job, ..)| job), "gpu_error", reason, facts);
    }

    /// A gang was started although somebody holds memory of its GPUs.
    pub(super) fn on_gpu_held(&mut self, turn: &mut Turn, id: JobId, attempt: u32, holders: &[GpuHolder]) {
        if self.current(id, attempt).is_none() {
            return;
        }
        let one = |held: &GpuHolder| {
            let name = if held.name.is_empty() { String::new() } else { format!(" ({})", held.name) };
            format!("process {}{name} holds memory of GPU {}", held.pid, held.gpu)
        };
        let told = holders.iter().map(one).collect::<Vec<_>>().join(", ");
        let reason = format!("{told}: attempt {attempt} is started all the same, and may lack it");
        turn.event(
            Some(id),
            "gpu_memory_held",
            reason,
            Facts::from([("attempt", attempt.into()), ("holders", serde_json::json!(holders))]),
        );
    }

    /// The places of a gang with other GPUs for those that are avoided; `None` when nothing can be better.
    pub(super) fn better_gpus(&self, job: &Job) -> Option<Vec<PlacedRanks>> {
        let gang = job.gang.as_ref()?;
        let need = job.need();
        let other = |share: &PlacedRanks| {
            let gpus = self.nodes.get(&share.node).map_or_else(|| share.gpus.clone(), |node| node.better_gpus(share, &need));
            PlacedRanks { gpus, ..share.clone() }
        };
        let better: Vec<PlacedRanks> = gang.placement.iter().map(other).collect();
        (better != gang.placement).then_some(better)
    }
}

impl Job {
    /// A failed attempt of which a rank's GPU broke: that is the cause, whatever was seen first. Others may have ended before its own rank,
    /// which often hangs.
    pub(super) fn name_broken_gpu(&mut self) {
        let Some(first) = self.ranks.first_failure().map(|(_, exit)| exit.at) else { return };
        let exits = self.ranks.list().iter().enumerate().filter_map(|(rank, own)| Some((rank as u32, own.exit.as_ref()?)));
        let errors = exits.filter_map(|(rank, exit)| Some((rank, exit, exit.gpu_error.as_ref().filter(|error| error.is_hardware())?)));
        let before = errors.filter(|(.., error)| error.at.0 <= first.0.saturating_add(GPU_ERROR_AFTER_MS));
        let Some((rank, exit, error)) = before.min_by_key(|(rank, _, error)| (error.causes_first(), *rank)) else { return };
        let node = self.node_of(rank).map(|node| node.0.clone());
        let (error, plain) = (error.describe(node.as_deref()), plain_sentence(rank, exit));
        let Some(ending) = self.gang.as_mut().and_then(|gang| gang.ending.as_mut()) else { return };
        let by_exit = matches!(ending.cause, Some(Cause::Exit | Cause::Signal | Cause::OutOfMemory | Cause::Gpu));
        let seen = if by_exit { plain } else { std::mem::take(&mut ending.reason) };
        ending.reason = format!("rank {rank}: {error}; {seen}");
        (ending.rank, ending.cause) = (Some(rank), Some(Cause::Gpu));
    }
}
