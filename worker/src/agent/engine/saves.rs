//! What the agent's engine does about saves: told to have one made, one that failed, one that was found damaged, snapshots that are old.
//!
//! A failed save and a damaged checkpoint are said once, and kept while there is no coordinator to hear it.

use everlit_api::agent::{Beat, CheckpointNews, FromAgent};
use everlit_api::ids::{Incarnation, JobId};
use everlit_api::manifest::SaveError;

use super::{Action, Engine};
use crate::agent::limits::QUARANTINED_MAX;

const SIGUSR1: i32 = 10;

impl Engine {
    /// Only ranks that say so now: to any other program this signal is the end.
    pub(super) fn on_save_ordered(&mut self, job: JobId, attempt: u32, out: &mut Vec<Action>) {
        let Some(gang) = self.gangs.get(&(job, attempt)).filter(|gang| gang.kill_at.is_none()) else { return };
        let able = gang.ranks.iter().filter(|(_, own)| own.is_alive() && own.saves_on_signal());
        out.extend(able.map(|(rank, _)| Action::Notify { incarnation: gang.incarnation(*rank), signal: SIGUSR1 }));
    }

    pub(super) fn on_heartbeat(
        &mut self,
        now: u64,
        own: Incarnation,
        seq: u64,
        beat: Beat,
        failed: Option<SaveError>,
        out: &mut Vec<Action>,
    ) {
        let Some(gang) = self.gangs.get_mut(&(own.job, own.attempt)) else { return };
        let Some(rank) = gang.ranks.get_mut(&own.rank) else { return };
        if !rank.on_heartbeat(now, seq, beat, self.paces.entry(own.job).or_default()) {
            return;
        }
        if let Some(error) = failed {
            rank.note_save_error(error);
        }
        self.on_news(now, own);
        self.look_soon(now, own);
        self.say_saves(out);
    }

    pub(super) fn on_checkpoint_quarantined(&mut self, job: JobId, step: u64, reason: String, out: &mut Vec<Action>) {
        if self.quarantined.len() < QUARANTINED_MAX {
            self.quarantined.push((job, step, reason));
        }
        self.say_saves(out);
    }

    /// A checkpoint that was read back and is whole makes the snapshot superfluous that its attempt began from.
    pub(super) fn on_checkpoint_seen(&mut self, news: CheckpointNews, out: &mut Vec<Action>) {
        let job = news.job;
        out.push(Action::Say(FromAgent::Checkpoint(news.clone())));
        let newest = self.gangs.range_mut((job, 0)..=(job, u32::MAX)).next_back();
        if let Some((_, gang)) = newest.filter(|_| news.verified)
            && let Some(resumed) = gang.resumed.as_ref().filter(|resumed| resumed.from_memory)
            && resumed.step.is_none_or(|step| news.step >= step)
            && !std::mem::replace(&mut gang.snapshot_freed, true)
        {
            out.push(Action::FreeSnapshots { job, committed: news.step, attempt: gang.spec.attempt });
        }
        self.checkpoints.insert(job, news);
    }

    /// Says what was not said yet, if somebody hears it.
    pub(super) fn say_saves(&mut self, out: &mut Vec<Action>) {
        if !self.linked {
            return;
        }
        for (job, step, reason) in std::mem::take(&mut self.quarantined) {
            out.push(Action::Say(FromAgent::Quarantined { job, step, reason }));
        }
        for gang in self.gangs.values_mut() {
            let (job, attempt) = (gang.spec.job, gang.spec.attempt);
            for (rank, own) in &mut gang.ranks {
                if let Some(error) = own.take_save_error() {
                    out.push(Action::Say(FromAgent::SaveFailed { incarnation: Incarnation { job, attempt, rank: *rank }, error }));
                }
            }
        }
    }
}
