//! Who goes next: by priority, then by age, and a later one first only where that delays nobody.
//!
//! The first job that can not go now holds back what is behind it. For it the gangs that run are thought away in the order in which they will
//! have ended (by their `time_limit`, those without one last and the oldest first) until it fits: where it fits then is reserved. One behind it
//! goes now only on what the reservation leaves, or anywhere if its own `time_limit` ends before all of those have ended. So the job goes at
//! the latest when those that ran before it waited have ended, whatever comes after it: who went before it leaves the reservation whole, and
//! the next look finds one that is no later. Nothing of this is kept: each look derives it again.
//!
//! A job that does not fit may have gangs of lower priority stopped (`preempt`); what those leave is promised to it, also before jobs of
//! higher priority that come meanwhile. Rejected: strict order (a small job waits for days beside idle nodes), reservations for all that wait
//! (each delays the others' guesses), going by how long jobs ran before (a guess that is wrong delays the first).

use std::collections::{BTreeMap, BTreeSet};

use everlit_api::ids::{JobId, NodeId};
use everlit_api::status::PlacedRanks;
use everlit_api::time::Timestamp;

use super::limits::{BACKFILL_LINES_MAX, PASSES_MAX};
use super::placement::{Board, NOTHING, Need, Node, Placement, Taken, plan_near};
use super::timers::Timer;
use super::{Engine, Turn};

/// What the last look at the queue left behind.
#[derive(Debug, Default)]
pub(super) struct Pass {
    under_way: bool,
    again: bool,
    /// Jobs that others were preempted for, and where they will go; who was promised first comes first.
    pub(super) promises: Vec<(JobId, Vec<PlacedRanks>)>,
    /// The first that waits.
    pub(super) head: Option<Head>,
    /// What is promised on each node in all.
    pub(super) promised: BTreeMap<NodeId, Taken>,
    /// Nodes of the reservation.
    reserved: Vec<NodeId>,
}

/// The first that waits, and what it waits for.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) job: JobId,
    /// Where it will go if nothing comes in between; nowhere when that can not be told, and then nobody goes before it.
    pub(super) shares: Vec<PlacedRanks>,
    /// By then all that it waits for has ended.
    pub(super) at: Option<Timestamp>,
}

impl Head {
    /// A job behind it has ended by the time that it can go.
    pub(super) fn is_after(&self, need: &Need, now: Timestamp) -> bool {
        need.ends_within.zip(self.at).is_some_and(|(within, at)| now.0.saturating_add(within.0) <= at.0)
    }

    /// What a job behind it may go on now; `None`: nobody goes before it.
    pub(super) fn beside<'a>(&self, nodes: &'a BTreeMap<NodeId, Node>, need: &Need, now: Timestamp) -> Option<Board<'a>> {
        let board = if self.is_after(need, now) { Board::before_head(nodes) } else { Board::now(nodes) };
        (!self.shares.is_empty()).then_some(board)
    }
}

impl Pass {
    pub(super) fn forget(&mut self, id: JobId) {
        self.promises.retain(|(job, _)| *job != id);
    }

    /// Where a job will go that others were preempted for.
    pub(super) fn promised_to(&self, id: JobId) -> Option<&Vec<PlacedRanks>> {
        self.promises.iter().find(|(job, _)| *job == id).map(|(_, shares)| shares)
    }
}

/// What became of a job that was looked at.
enum Looked {
    Gone,
    Promised,
    Never,
    Waits,
}

impl Engine {
    /// Whether others were preempted for it.
    pub(super) fn is_promised(&self, id: JobId) -> bool {
        self.pass.promised_to(id).is_some()
    }

    /// Places what may go.
    pub(super) fn schedule(&mut self, turn: &mut Turn) {
        if std::mem::replace(&mut self.pass.under_way, true) {
            self.pass.again = true;
            return;
        }
        for _ in 0..PASSES_MAX {
            self.pass.again = false;
            self.look_at_queue(turn);
            if !self.pass.again {
                break;
            }
        }
        self.pass.under_way = false;
        self.take_free_places(turn);
    }

    fn look_at_queue(&mut self, turn: &mut Turn) {
        self.begin_pass();
        for (id, _) in std::mem::take(&mut self.pass.promises) {
            self.keep_promise(turn, id);
        }
        let mut lines = self.queue.firsts();
        let mut behind = 0;
        while let Some((priority, id, need)) = lines.pop_first() {
            if self.pass.head.is_some() {
                behind += 1;
                if behind > BACKFILL_LINES_MAX {
                    break;
                }
            }
            let looked = if self.is_promised(id) { Looked::Promised } else { self.look_at(turn, id, &need) };
            match looked {
                Looked::Gone | Looked::Promised => {
                    lines.extend(self.queue.next_in_line(id, priority, &need).map(|next| (priority, next, need)));
                }
                Looked::Never => {
                    self.queue.park(&need);
                    lines.retain(|(.., other)| *other != need);
                }
                Looked::Waits => {}
            }
        }
    }

    fn look_at(&mut self, turn: &mut Turn, id: JobId, need: &Need) -> Looked {
        let Some(job) = self.jobs.get(&id) else { unreachable!("the queue holds active jobs") };
        let home = job.home(&self.nodes);
        if let Some(head) = &self.pass.head {
            let place = head.beside(&self.nodes, need, turn.now).and_then(|board| board.choose(need, home.as_ref()));
            return place.map_or(Looked::Waits, |place| self.send(turn, id, need, place));
        }
        match plan_near(&self.nodes, need, home.as_ref()) {
            Placement::Now(place) => self.send(turn, id, need, place),
            Placement::Never(_) => Looked::Never,
            Placement::Later(_) if self.preempt(turn, id, need) => Looked::Promised,
            Placement::Later(_) => {
                self.reserve(id, need);
                Looked::Waits
            }
        }
    }

    fn send(&mut self, turn: &mut Turn, id: JobId, need: &Need, place: Vec<PlacedRanks>) -> Looked {
        let Some(job) = self.jobs.get(&id) else { unreachable!("the queue holds active jobs") };
        self.queue.remove(id, job.spec.priority, need.clone());
        self.start_gang(turn, id, place);
        Looked::Gone
    }

    fn begin_pass(&mut self) {
        let promised = std::mem::take(&mut self.pass.promised).into_keys();
        for name in promised.chain(std::mem::take(&mut self.pass.reserved)) {
            if let Some(node) = self.nodes.get_mut(&name) {
                (node.promised, node.reserved) = (Taken::default(), Taken::default());
            }
        }
        self.pass.head = None;
    }

    /// Those who others were preempted for go first, or wait on for what the others still hold.
    fn keep_promise(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        let (need, home) = (job.need(), job.home(&self.nodes));
        if let Some(place) = Board::now(&self.nodes).choose(&need, home.as_ref()) {
            self.send(turn, id, &need, place);
            return;
        }
        let leaving = self.held_by(self.leaving());
        // Else a node has gone, or who was to leave did not: it waits like any other.
        if let Some(place) = self.board_without(&leaving).choose(&need, home.as_ref()) {
            self.promise(id, &need, place, &leaving);
        }
    }

    /// Keeps a place for a job, of which others leave a part. `leaving`: what they leave by node.
    pub(super) fn promise(&mut self, id: JobId, need: &Need, place: Vec<PlacedRanks>, leaving: &BTreeMap<NodeId, Taken>) {
        for (name, taken) in need.held(&place) {
            let sum = self.pass.promised.entry(name.clone()).or_default();
            sum.add(&taken);
            if let Some(node) = self.nodes.get_mut(name) {
                node.promised = sum.beyond(leaving.get(name).unwrap_or(&NOTHING));
            }
        }
        self.pass.promises.push((id, place));
    }

    /// Gangs that end and then give their places back.
    pub(super) fn leaving(&self) -> impl Iterator<Item = JobId> {
        self.placed.iter().copied().filter(|id| self.jobs.get(id).and_then(|job| job.gang.as_ref()).is_some_and(|gang| gang.is_leaving()))
    }

    /// What gangs hold, by node.
    pub(super) fn held_by(&self, jobs: impl Iterator<Item = JobId>) -> BTreeMap<NodeId, Taken> {
        let mut sum: BTreeMap<NodeId, Taken> = BTreeMap::new();
        for job in jobs.filter_map(|id| self.jobs.get(&id)) {
            for (name, taken) in job.held() {
                sum.entry(name.clone()).or_default().add(&taken);
            }
        }
        sum
    }

    /// The nodes once that is given back, and what is promised is taken.
    pub(super) fn board_without(&self, gone: &BTreeMap<NodeId, Taken>) -> Board<'_> {
        let names: BTreeSet<&NodeId> = gone.keys().chain(self.pass.promised.keys()).collect();
        let later = names.into_iter().filter_map(|name| {
            let mut taken = self.nodes.get(name)?.taken.clone();
            gone.get(name).into_iter().for_each(|gone| taken.remove(gone));
            self.pass.promised.get(name).into_iter().for_each(|promised| taken.add(promised));
            Some((name.clone(), taken))
        });
        Board::later(&self.nodes, later.collect())
    }

    /// Gangs in the order in which they are expected to have ended, with when if that is known.
    fn by_end(&self) -> Vec<(bool, Timestamp, JobId)> {
        let end = |id: JobId| {
            let job = self.jobs.get(&id)?;
            let gang = job.gang.as_ref()?;
            let grace = job.spec.stop_grace.0;
            let stops_at = match gang.ending.as_ref().filter(|_| gang.is_leaving()) {
                Some(ending) => Some(ending.at),
                None => self.timers.due_at(&Timer::TimeLimit(id)),
            };
            Some(match stops_at {
                Some(at) => (false, Timestamp(at.0.saturating_add(grace)), id),
                None => (true, gang.placed_at, id),
            })
        };
        let mut ends: Vec<_> = self.placed.iter().filter_map(|id| end(*id)).collect();
        ends.sort_unstable();
        ends
    }

    /// The first that waits: where it will go, and when at the latest.
    fn reserve(&mut self, id: JobId, need: &Need) {
        let ends = self.by_end();
        let gone = |count: usize| self.held_by(ends.iter().take(count).map(|(.., id)| *id));
        let fits = |count: usize| self.board_without(&gone(count)).choose(need, None);
        let (mut few, mut enough) = (0, ends.len());
        let mut place = fits(enough);
        while place.is_some() && few < enough {
            let middle = usize::midpoint(few, enough);
            match fits(middle) {
                Some(found) => (enough, place) = (middle, Some(found)),
                None => few = middle + 1,
            }
        }
        let awaited = gone(enough);
        // With nodes that take no ranks now it waits for more than ends.
        let at = ends
            .iter()
            .take(enough)
            .map(|(unknown, at, _)| (!unknown).then_some(*at))
            .try_fold(Timestamp(0), |last, at| Some(last.max(at?)));
        let at = at.filter(|_| place.is_some() && enough > 0);
        let place = place.or_else(|| self.board_without(&awaited).closed_too().choose(need, None)).unwrap_or_default();
        for (name, taken) in need.held(&place) {
            let mut whole = taken;
            self.pass.promised.get(name).into_iter().for_each(|promised| whole.add(promised));
            if let Some(node) = self.nodes.get_mut(name) {
                node.reserved = whole.beyond(awaited.get(name).unwrap_or(&NOTHING)).beyond(&node.promised);
                self.pass.reserved.push(name.clone());
            }
        }
        self.pass.head = Some(Head { job: id, shares: place, at });
    }
}
