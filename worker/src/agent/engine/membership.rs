//! A running gang gets other members: who is not one any more is killed, and once nobody of those lives the others are told.
//!
//! That order is the point: a process that hangs must be gone before another has its rank, or two could write as one (INV-1). A membership
//! replaces the one before it, whether or not that ever held; one that this agent heard of already is nothing new, unless some of it was never
//! started.

use everlit_api::agent::{GangSpec, Resumed};
use everlit_api::ids::Incarnation;

use super::rank::Rank;
use super::{Action, Engine, Gang, ORDER_PATIENCE_MS, SIGKILL, Stage};

impl Engine {
    /// The coordinator says who is in a gang that is known here.
    pub(super) fn on_membership_ordered(&mut self, now: u64, spec: GangSpec) {
        let Some(gang) = self.gangs.get_mut(&(spec.job, spec.attempt)) else { return };
        let stopping = gang.kill_at.is_some() || self.ending.is_some();
        if stopping || gang.stage != Stage::Running || !is_news(gang, &spec) {
            return;
        }
        let seats = spec.own_seats().map(|(_, seat)| seat).chain(spec.spares.iter().copied());
        for seat in seats {
            let own = gang.ranks.entry(seat).or_default();
            // Who was a spare is judged anew as a rank.
            if gang.spec.rank_of(seat) != spec.rank_of(seat) {
                own.judged = None;
            }
        }
        let mut kept = spec.clone();
        kept.env.clear();
        gang.spec = kept;
        gang.membership = Some(Box::new(spec));
        self.wake(now);
    }

    /// A membership may have waited for news of this process.
    pub(super) fn look_at_membership(&mut self, now: u64, own: Incarnation) {
        if self.gangs.get(&(own.job, own.attempt)).is_some_and(|gang| gang.membership.is_some()) {
            self.wake(now);
        }
    }

    /// Ends what an agent before this one did not come to start and nobody ordered again.
    pub(super) fn end_unstarted(&mut self, now: u64, out: &mut Vec<Action>) {
        let mut next = None;
        for gang in self.gangs.values_mut().filter(|gang| gang.membership.is_none()) {
            let Some(due) = gang.found_at.map(|at| at + ORDER_PATIENCE_MS) else { continue };
            if now >= due {
                gang.found_at = None;
                gang.leave_out(|_| true, out);
            } else {
                next = Some(next.map_or(due, |before: u64| before.min(due)));
            }
        }
        next.into_iter().for_each(|at| self.wake(at));
    }

    /// Kills who is out, and goes on with those that wait for nobody any more.
    pub(super) fn settle_memberships(&mut self, out: &mut Vec<Action>) {
        for gang in self.gangs.values_mut() {
            let Some(spec) = gang.membership.take_if(|_| gang.kill_at.is_none()) else { continue };
            let mut waits = false;
            let (job, attempt) = (spec.job, spec.attempt);
            for (seat, own) in gang.ranks.iter_mut().filter(|(seat, own)| own.end.is_none() && own.spawned && !spec.wants(**seat)) {
                waits = true;
                if own.is_alive() && !own.killed {
                    own.killed = true;
                    let incarnation = Incarnation { job, attempt, rank: *seat };
                    out.push(Action::Signal { incarnation, signal: SIGKILL });
                }
            }
            if waits {
                gang.membership = Some(spec);
                continue;
            }
            gang.leave_out(|seat| !spec.wants(seat), out);
            let mut fresh = Vec::new();
            for (seat, own) in gang.ranks.iter_mut().filter(|(_, own)| own.is_unstarted()) {
                own.spawned = true;
                fresh.push(*seat);
            }
            let resumed = gang.resumed.clone().unwrap_or_else(|| nowhere(&spec));
            out.push(Action::Regroup { spec, resumed, fresh });
        }
    }
}

impl Gang {
    /// Who was to start and has not never will.
    pub(super) fn leave_out(&mut self, which: impl Fn(u32) -> bool, out: &mut Vec<Action>) {
        let (job, attempt) = (self.spec.job, self.spec.attempt);
        for (seat, own) in self.ranks.iter_mut().filter(|(seat, own)| own.is_unstarted() && which(**seat)) {
            (own.spawned, own.killed) = (true, true);
            out.push(Action::LeaveOut(Incarnation { job, attempt, rank: *seat }));
        }
    }
}

fn is_news(gang: &Gang, spec: &GangSpec) -> bool {
    let later = spec.generation > gang.spec.generation;
    // What an agent before this one did not come to start waits for the order, which has its environment.
    let waiting = gang.membership.is_none() && gang.ranks.values().any(Rank::is_unstarted);
    let unknown = || spec.spares.iter().any(|seat| !gang.ranks.contains_key(seat));
    later || (spec.generation == gang.spec.generation && (waiting || unknown()))
}

fn nowhere(spec: &GangSpec) -> Resumed {
    Resumed::from_nothing(spec.job, spec.attempt)
}
