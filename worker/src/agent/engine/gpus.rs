//! Errors of GPUs: told once, and tied to the ranks that have the GPU and end at about the same time.
//!
//! The driver's news and a rank's end come on different ways, so either may be first. A rank that hangs on a broken GPU is killed for it
//! seconds later, and an error that only follows from its end is none of its causes: of several the one that tells the cause is taken.

use std::collections::VecDeque;

use everlit_api::agent::{Exited, FromAgent, GangSpec};
use everlit_api::gpu::GpuError;
use everlit_api::ids::Incarnation;

use super::{Action, Engine};
use crate::agent::limits::{GPU_ERROR_AFTER_MS, GPU_ERROR_BEFORE_MS, GPU_ERROR_SPACING_MS, GPU_ERRORS_MAX};

/// What GPUs had of late.
#[derive(Debug, Clone, Default)]
pub(super) struct Errors {
    /// With when each was heard of, oldest first.
    recent: VecDeque<(u64, GpuError)>,
    /// No coordinator was told of these.
    unsaid: Vec<GpuError>,
}

/// The GPUs of a rank: those of its number on this node, as `CUDA_VISIBLE_DEVICES` and `LOCAL_RANK` say. Ranks that share have all.
fn gpus_of(spec: &GangSpec, seat: u32) -> &[u32] {
    let Some(local) = spec.rank_of(seat).and_then(|rank| rank.checked_sub(spec.first_rank)) else { return &[] };
    match spec.gpus.len() / spec.count.max(1) as usize {
        0 => &spec.gpus,
        each => spec.gpus.chunks_exact(each).nth(local as usize).unwrap_or_default(),
    }
}

impl Engine {
    pub(super) fn on_gpu_failed(&mut self, now: u64, error: GpuError, out: &mut Vec<Action>) {
        let same = |known: &GpuError| (known.xid, &known.uuid) == (error.xid, &error.uuid);
        let errors = &mut self.gpu_errors;
        if errors.recent.iter().any(|(at, known)| same(known) && now.saturating_sub(*at) < GPU_ERROR_SPACING_MS) {
            return;
        }
        if errors.recent.len() >= GPU_ERRORS_MAX {
            errors.recent.pop_front();
        }
        errors.recent.push_back((now, error.clone()));
        if errors.unsaid.len() < GPU_ERRORS_MAX {
            errors.unsaid.push(error.clone());
        }
        self.say_gpu_errors(out);
        for gang in self.gangs.values_mut() {
            let (job, attempt) = (gang.spec.job, gang.spec.attempt);
            for (seat, own) in &mut gang.ranks {
                let just_ended = now.saturating_sub(own.ended_at) < GPU_ERROR_AFTER_MS && gpus_of(&gang.spec, *seat).contains(&error.gpu);
                if let Some((exit, lost)) =
                    own.end.as_mut().filter(|(exit, _)| just_ended && !exit.is_success() && exit.gpu_error.is_none())
                {
                    exit.gpu_error = Some(error.clone());
                    let incarnation = Incarnation { job, attempt, rank: *seat };
                    out.push(Action::Say(FromAgent::Exited(Exited { incarnation, exit: exit.clone(), lost: *lost })));
                }
            }
        }
    }

    /// What its GPUs had shortly before now, and in its own time, unless it is something that stays.
    pub(super) fn gpu_error_of(&self, now: u64, own: Incarnation) -> Option<GpuError> {
        let gang = self.gangs.get(&(own.job, own.attempt))?;
        let gpus = gpus_of(&gang.spec, own.rank);
        let begun_at = gang.ranks.get(&own.rank)?.begun_at;
        let in_time = |at: u64, error: &GpuError| at >= begun_at || error.about().needs_reset;
        let recent = self.gpu_errors.recent.iter();
        let recent = recent.filter(|(at, error)| now.saturating_sub(*at) < GPU_ERROR_BEFORE_MS && in_time(*at, error));
        recent.map(|(_, error)| error).filter(|error| gpus.contains(&error.gpu)).min_by_key(|error| error.causes_first()).cloned()
    }

    /// Says what was not said yet, if somebody hears it.
    pub(super) fn say_gpu_errors(&mut self, out: &mut Vec<Action>) {
        if self.linked {
            out.extend(self.gpu_errors.unsaid.drain(..).map(|error| Action::Say(FromAgent::GpuFailed { error })));
        }
    }
}
