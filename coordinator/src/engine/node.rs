//! Nodes come, report, go silent and come back; after each `Hello` what is wanted there is held against what is there.
//!
//! Reconciliation rules: what runs and is wanted is adopted; what runs and is not wanted is stopped; what is wanted and was never started is
//! started, also when its agent died in the middle of that; what is wanted, was started and is not there is lost. Silence alone ends nothing
//! unless the gang can live elsewhere.

use everlit_api::agent::{CheckpointNews, Exited, Hello, RankReport, Started, ToAgent};
use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_api::job::RestartScope;
use everlit_api::rank::{Cause, RankExit};
use everlit_api::status::{NodeLoad, PlacedRanks};
use everlit_api::time::{Millis, Timestamp};

use super::gang::Broken;
use super::placement::{Board, Node};
use super::state::{Change, Ending, Facts, Then};
use super::timers::Timer;
use super::{Engine, Turn};

impl Engine {
    pub(super) fn on_node_linked(&mut self, turn: &mut Turn, hello: Hello) {
        let id = hello.node.clone();
        let fresh = !self.nodes.contains_key(&id);
        let node = self.nodes.entry(id.clone()).or_default();
        let back = node.lost;
        let heard = node.seen_at;
        node.capacity = hello.capacity.clone();
        node.version = hello.version.clone();
        node.boot_id = hello.boot_id.clone();
        node.address = hello.address.clone();
        node.copies = hello.copies.is_some();
        node.labels = hello.labels.clone();
        node.taints = hello.taints.clone();
        node.linked = true;
        node.reported_at = None;
        node.lost = false;
        node.expelled = false;
        node.draining = hello.draining;
        node.seen_at = Some(turn.now);
        self.timers.clear(&Timer::NodeLost(id.clone()));
        if fresh || back {
            let why = if fresh { "joined" } else { "is back" };
            turn.event(None, "node_ready", format!("{id} {why}"), Facts::from([("node", id.0.clone().into())]));
        }
        self.reconcile(turn, &id, hello, heard);
        self.look_at_copies(turn.now);
        self.look_at_uploads(turn, &id);
        self.feeds_again(turn, &id);
        self.look_at_archives(turn, &id);
        self.queue.unpark();
        self.schedule(turn);
    }

    /// `heard`: when it was last heard of; never, in this process: that may have lost what the node then tells of.
    fn reconcile(&mut self, turn: &mut Turn, node: &NodeId, hello: Hello, heard: Option<Timestamp>) {
        let first = heard.is_none();
        let mut unwanted: std::collections::BTreeSet<(JobId, u32)> = std::collections::BTreeSet::new();
        let mut forget = Vec::new();
        let mut seen: std::collections::BTreeSet<Incarnation> = std::collections::BTreeSet::new();
        let mut unstarted: std::collections::BTreeSet<JobId> = std::collections::BTreeSet::new();
        let mut foreign = 0;
        let (mut twice, mut forgotten) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
        let mut beats = Vec::new();
        let mut ended = Vec::new();
        for mut report in hello.ranks {
            let Incarnation { job, attempt, .. } = report.incarnation;
            if first {
                self.note_attempt(turn, node, job, attempt);
            }
            let current = self.jobs.get(&job).filter(|j| j.retry_at.is_none() && j.gang.as_ref().is_some_and(|g| g.attempt == attempt));
            let here = current.is_some_and(|job| holds(job, node));
            let wanted = here && self.is_of(node, report.incarnation);
            if current.is_some() && !wanted {
                if first {
                    twice.insert(job);
                } else {
                    foreign += 1;
                }
            }
            if wanted && current.and_then(|job| job.gang.as_ref()).is_some_and(|gang| gang.generation < report.generation) {
                forgotten.insert(job);
            }
            if wanted {
                seen.insert(report.incarnation);
                if report.pid.is_none() && report.exit.is_none() && !report.lost {
                    unstarted.insert(job);
                }
                beats.extend(report.beat.take());
                ended.extend(self.adopt(turn, report, heard));
            } else if !here {
                // Where its own gang has places there is no telling it to stop only this.
                if report.exit.is_some() || report.lost {
                    forget.push(report.incarnation);
                } else {
                    unwanted.insert((job, attempt));
                }
            }
        }
        self.pass_over(foreign);
        let lost = "the coordinator's disk has lost what it said was durable";
        // What one attempt says can not be told from what its twin does, nor a rank's seat from one that it had: all go, and another attempt comes.
        let all = twice.into_iter().map(|job| (job, format!("its attempt runs on {node}, too: {lost}")));
        for (job, reason) in all.chain(forgotten.into_iter().map(|job| (job, format!("who is in it is not on record: {lost}")))) {
            if self.jobs.get(&job).and_then(|job| job.gang.as_ref()).is_some_and(|gang| gang.ending.is_none()) {
                self.fail_gang(turn, job, None, Broken::new(Cause::Infrastructure, reason, 0, true), Some(lost.into()));
            }
        }
        for (job, attempt) in unwanted {
            // Its job went on without it or is final: nothing that it could save would ever be used.
            turn.tell(node, ToAgent::StopGang { job, attempt, grace: Millis(0) });
        }
        // Before the ends: the attempt that follows one may be placed at once, and what is told after that would be too late.
        for news in hello.checkpoints {
            if !self.jobs.contains_key(&news.job) {
                turn.tell(node, ToAgent::JobEnded { job: news.job });
            }
            if self.may_tell_of(turn, node, &news, first) {
                self.on_checkpoint_seen(turn, node, news);
            }
        }
        self.on_ranks_beat(turn, beats);
        for exited in ended {
            self.on_rank_exited(turn, exited);
        }
        if !forget.is_empty() {
            turn.tell(node, ToAgent::Forget { incarnations: forget });
        }
        self.look_for_missing(turn, node, &seen, &unstarted);
    }

    /// Whether a checkpoint that a `Hello` names is the node's to tell of; what the store may have lost is believed of the `first`.
    fn may_tell_of(&mut self, turn: &mut Turn, node: &NodeId, news: &CheckpointNews, first: bool) -> bool {
        if first {
            self.note_attempt(turn, node, news.job, news.attempt);
            if let Some(job) = self.jobs.get_mut(&news.job).filter(|job| !job.nodes.contains(node)) {
                job.nodes.push(node.clone());
                turn.touched.insert(news.job);
            }
        }
        let own = self.keeps_files(node, news.job) && self.is_known(news.job, news.attempt);
        self.pass_over(u64::from(!own));
        own
    }

    /// A number that was used is never used again, also when the store has forgotten that it was.
    fn note_attempt(&mut self, turn: &mut Turn, node: &NodeId, id: JobId, attempt: u32) {
        if self.is_known(id, attempt) {
            return;
        }
        if self.is_absurd(id, attempt) {
            return self.pass_over(1);
        }
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.known_attempt = attempt;
        let reason = format!(
            "{node} knows of attempt {attempt}, and nothing is on record of it: the coordinator's disk has lost what it said was durable"
        );
        turn.event(Some(id), "attempt_unknown", reason, Facts::from([("attempt", attempt.into())]));
        turn.touched.insert(id);
    }

    /// What lives is taken over; how it ended, when it has, is for after all beats.
    fn adopt(&mut self, turn: &mut Turn, report: RankReport, heard: Option<Timestamp>) -> Option<Exited> {
        let incarnation = report.incarnation;
        if let Some(pid) = report.pid {
            self.on_rank_started(turn, &Started { incarnation, pid, at: report.started_at.unwrap_or(turn.now) });
        }
        if report.exit.is_none() && !report.lost {
            return None;
        }
        let exit = report.exit.unwrap_or_else(|| lost_exit(turn.now, "it was lost with its shim"));
        let mut exited = Exited { incarnation, exit, lost: report.lost };
        self.set_exit_right(turn, &mut exited, heard);
        Some(exited)
    }

    /// An agent that knows nothing of an attempt would start every rank of it, and of ranks that are restarted alone some may be done.
    fn end_what_is_unknown(&mut self, turn: &mut Turn, id: JobId, seen: &std::collections::BTreeSet<Incarnation>) {
        let Some(job) = self.jobs.get(&id).filter(|job| job.spec.restart.scope == RestartScope::Rank) else { return };
        let Some(gang) = job.gang.as_ref().filter(|gang| gang.ending.is_none() && gang.running_at.is_some()) else { return };
        let of_it = |incarnation: &&Incarnation| incarnation.job == id && incarnation.attempt == gang.attempt;
        if seen.iter().chain(&turn.ordered).find(of_it).is_none() {
            let broken = Broken::new(Cause::Infrastructure, "its node does not know it any more".into(), 0, false);
            self.fail_gang(turn, id, None, broken, Some("the node has lost all of its ranks".into()));
        }
    }

    /// Gangs that hold places on this node and whose ranks the agent did not name. Jobs in `unstarted` have ranks that it named and that never
    /// began: their order is said again.
    fn look_for_missing(
        &mut self,
        turn: &mut Turn,
        node: &NodeId,
        seen: &std::collections::BTreeSet<Incarnation>,
        unstarted: &std::collections::BTreeSet<JobId>,
    ) {
        let held: Vec<JobId> = self.jobs.values().filter(|j| holds(j, node) && j.retry_at.is_none()).map(|j| j.id).collect();
        for id in held {
            self.end_what_is_unknown(turn, id, seen);
            let Some(job) = self.jobs.get(&id) else { continue };
            let Some(gang) = &job.gang else { continue };
            let shares = gang.placement.iter().filter(|p| p.node == *node);
            let ranks = shares.flat_map(|p| p.first_rank..p.first_rank + gang.count_in(p));
            let joining = gang.regroup.as_ref().filter(|regroup| regroup.change != Change::Shrunk).map(|regroup| regroup.rank);
            let awaited = |rank: u32| {
                joining == Some(rank) || (gang.restarts.contains_key(&rank) && job.ranks.get(rank).is_some_and(|own| own.pid.is_none()))
            };
            let incarnation = |seat| Incarnation { job: id, attempt: gang.attempt, rank: seat };
            let missing: Vec<_> = ranks
                .filter(|rank| job.ranks.get(*rank).is_some_and(|r| r.exit.is_none()))
                .map(|rank| (rank, incarnation(gang.seat(rank))))
                .filter(|(_, i)| !seen.contains(i) && !turn.ordered.contains(i))
                .collect();
            let (started, ending) = (gang.running_at.is_some(), gang.ending.is_some());
            // The agent may not have heard of the newest membership: it hears again, and starts what it never started.
            let news = !ending && (unstarted.contains(&id) || (started && (gang.generation > 0 || !gang.spares.is_empty())));
            // Who is to start yet is missing only with a gang that is gone, and then its spares are, too.
            let gone = ending || (started && missing.iter().any(|(rank, _)| !awaited(*rank)));
            // Only a gang on one node has spares.
            let lost_spares: Vec<_> = gang.spares.iter().map(|s| incarnation(s.seat)).filter(|i| !seen.contains(i)).collect();
            if gone {
                let why = if started { "its node does not know it any more" } else { "it was stopped before it was started" };
                // Spares first: one that is gone must not be given a place.
                let gone: Vec<_> = lost_spares.into_iter().chain(missing.into_iter().map(|(_, i)| i)).collect();
                for incarnation in gone {
                    self.on_rank_exited(turn, Exited { incarnation, exit: lost_exit(turn.now, why), lost: true });
                }
            } else if !missing.is_empty() || news {
                self.tell_gang(turn, id, Some(node));
            }
            let grace = self.jobs.get(&id).map(|j| j.spec.stop_grace).unwrap_or_default();
            if ending && self.jobs.get(&id).is_some_and(|j| j.retry_at.is_none() && j.gang.as_ref().is_some_and(|g| g.ending.is_some())) {
                self.stop_ranks(turn, id, grace);
            }
        }
    }

    pub(super) fn on_node_unlinked(&mut self, turn: &mut Turn, id: &NodeId) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        node.linked = false;
        // The lease runs from when it was last heard of, whenever it was found out that it can not be any more.
        let heard_at = node.seen_at.unwrap_or(turn.now);
        let until = Timestamp((heard_at.0 + self.config.node_timeout_ms).max(turn.now.0));
        self.timers.set(Timer::NodeLost(id.clone()), until);
        self.stop_copies_on(id, turn.now);
        self.look_at_uploads(turn, id);
    }

    pub(super) fn on_node_reported(&mut self, turn: &mut Turn, id: &NodeId, load: NodeLoad) {
        if let Some(node) = self.nodes.get_mut(id) {
            node.load = load;
            (node.seen_at, node.reported_at) = (Some(turn.now), Some(turn.now));
        }
    }

    /// Not heard of for the node timeout: gangs move if they can, and wait for it if they can not. Looked at again while any waits.
    pub(super) fn on_node_lost(&mut self, turn: &mut Turn, id: &NodeId) {
        if self.nodes.get(id).is_none_or(|node| node.linked) {
            return;
        }
        let timeout_ms = self.config.node_timeout_ms;
        let seconds = timeout_ms as f64 / 1_000.0;
        if !self.hears_others(turn.now, id) {
            // Nobody is heard of: that is our own machine's or network's fault, and ends nothing.
            self.timers.set(Timer::NodeLost(id.clone()), Timestamp(turn.now.0 + (timeout_ms / 4).max(1)));
            return;
        }
        let Some(node) = self.nodes.get_mut(id) else { return };
        if !node.lost {
            node.lost = true;
            turn.event(None, "node_lost", format!("{id} was not heard of for {seconds} s"), Facts::from([("node", id.0.clone().into())]));
        }
        let held: Vec<JobId> = self.jobs.values().filter(|j| holds(j, id) && j.retry_at.is_none()).map(|j| j.id).collect();
        let mut waiting = false;
        for job_id in held {
            let keeps = self.jobs.get(&job_id).is_some_and(|job| job.is_only_on(id, &self.nodes));
            let room = !keeps && self.has_room_without(job_id, id);
            let Some(job) = self.jobs.get_mut(&job_id) else { continue };
            if job.ranks.all_ended() {
                // Only the ends of its spares were awaited, and nobody can tell of those now.
                self.lose_ranks(turn, job_id);
                continue;
            }
            let decided = job.gang.as_ref().and_then(|g| g.ending.as_ref()).is_some_and(|e| e.then != Then::Judge);
            if decided {
                // It was to end anyway: what may still run there is stopped when the node is back.
                self.lose_ranks(turn, job_id);
            } else if room {
                self.move_from(turn, job_id, format!("{id} was lost"), timeout_ms);
            } else {
                waiting = true;
                let why = if keeps { "the job's checkpoints are there alone" } else { "no other node has room" };
                let reason = format!("{id} was not heard of for {seconds} s; its ranks may run on, and {why}");
                if job.reason != reason {
                    job.reason = reason;
                    turn.touched.insert(job_id);
                }
            }
        }
        if waiting {
            self.timers.set(Timer::NodeLost(id.clone()), Timestamp(turn.now.0 + timeout_ms));
        }
        self.queue.unpark();
        self.schedule(turn);
    }

    /// A user has it forgotten. What its agent says after this is not let in.
    pub(super) fn on_node_expelled(&mut self, turn: &mut Turn, id: &NodeId, force: bool) {
        if !force && !self.node_is_empty(id) {
            return;
        }
        let Some(node) = self.nodes.get_mut(id) else { return };
        (node.linked, node.lost, node.expelled) = (false, true, true);
        self.timers.clear(&Timer::NodeLost(id.clone()));
        self.timers.clear(&Timer::Blames(id.clone()));
        turn.step.record.forgotten.push(id.clone());
        turn.event(None, "node_expelled", format!("{id} was expelled: a user asked for it"), Facts::from([("node", id.0.clone().into())]));
        let held: Vec<JobId> = self.jobs.values().filter(|job| holds(job, id)).map(|job| job.id).collect();
        for job_id in held {
            let Some(job) = self.jobs.get_mut(&job_id) else { continue };
            let reason = format!("{id} was expelled");
            if job.retry_at.is_some() {
                self.requeue(turn, job_id, &reason);
                continue;
            }
            if job.gang.as_ref().and_then(|gang| gang.ending.as_ref()).is_some_and(|ending| ending.then >= Then::Requeue) {
                self.lose_ranks(turn, job_id);
            } else {
                self.move_from(turn, job_id, reason, 0);
            }
        }
        self.forget_expelled();
    }

    /// Expelled nodes go when nothing holds places there.
    pub(super) fn forget_expelled(&mut self) {
        self.nodes.retain(|_, node| !node.expelled || node.taken.ranks > 0);
    }

    /// Whether any other node was heard of while this one was not; of one node alone nothing can be said, and nothing follows from it.
    fn hears_others(&self, now: Timestamp, id: &NodeId) -> bool {
        // A link that is cut in silence still looks like one for a while.
        let lately = |node: &Node| node.reported_at.is_none_or(|at| now.since_ms(at) <= self.config.node_timeout_ms / 2);
        let others = || self.nodes.iter().filter(|(other, node)| *other != id && !node.expelled && !node.lost);
        others().next().is_none() || others().any(|(_, node)| node.linked && lately(node))
    }

    /// Whether a gang that has lost a node could go elsewhere now, with what it has on other nodes itself.
    fn has_room_without(&self, id: JobId, lost: &NodeId) -> bool {
        let Some(job) = self.jobs.get(&id) else { return false };
        let Some(gang) = &job.gang else { return false };
        let need = job.need();
        let own = need.held(&gang.placement).filter(|(name, _)| *name != lost);
        let given_back = own.filter_map(|(name, taken)| {
            let node = self.nodes.get(name)?;
            let mut left = node.taken.clone();
            left.remove(&taken);
            [&node.promised, &node.reserved].into_iter().for_each(|held| left.add(held));
            Some((name.clone(), left))
        });
        Board::later(&self.nodes, given_back.collect()).behind_head().choose(&need, None).is_some()
    }

    /// A gang that has lost a node is placed again, once those of its ranks that live elsewhere have ended.
    fn move_from(&mut self, turn: &mut Turn, id: JobId, reason: String, unseen_ms: u64) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(gang) = job.gang.as_mut() else { return };
        let spread = gang.is_spread();
        let ending =
            Ending { then: Then::Requeue, at: turn.now, rank: None, cause: Some(Cause::NodeLost), reason: reason.clone(), deadline: None };
        job.budget.restarts += 1;
        job.book.reclaim_undetected(turn.now, unseen_ms);
        turn.event(Some(id), "gang_failed", reason, Facts::from([("cause", serde_json::json!(Cause::NodeLost))]));
        if spread {
            // The built-in program can not save without the others, and what it had is in shared memory.
            let grace = if job.spec.worker.is_some() { Millis(0) } else { job.spec.stop_grace };
            self.end_gang(turn, id, ending, grace);
        } else {
            // Its new place is taken before the next one is looked at.
            gang.ending = Some(ending);
        }
        self.lose_ranks(turn, id);
    }

    /// Nobody can tell any more how ranks on lost nodes end: they count as lost. Those of the gang on other nodes tell themselves.
    pub(super) fn lose_ranks(&mut self, turn: &mut Turn, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(gang) = job.gang.as_mut() else { return };
        let is_lost = |node: &NodeId| self.nodes.get(node).is_none_or(|node| node.lost);
        let gone: Vec<&PlacedRanks> = gang.placement.iter().filter(|share| is_lost(&share.node)).collect();
        if gone.is_empty() {
            return;
        }
        let ranks = gone.iter().flat_map(|share| share.first_rank..share.first_rank + gang.count_in(share));
        let seats: Vec<u32> = ranks.map(|rank| gang.seat(rank)).collect();
        // What may still run there is stopped when the node is back.
        gang.spares.clear();
        let attempt = gang.attempt;
        for seat in seats {
            let incarnation = Incarnation { job: id, attempt, rank: seat };
            self.on_rank_exited(turn, Exited { incarnation, exit: lost_exit(turn.now, "its node was lost"), lost: true });
        }
        // When all of them had ended before, nobody else says so.
        self.end_attempt_when_over(turn, id);
    }

    pub(super) fn on_cordon_requested(&mut self, turn: &mut Turn, id: &NodeId, cordoned: bool) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        if node.cordoned != cordoned {
            node.cordoned = cordoned;
            turn.step.record.cordons.push((id.clone(), cordoned));
            let (event, what) = if cordoned { ("node_cordoned", "takes no new ranks") } else { ("node_uncordoned", "takes ranks again") };
            turn.event(None, event, format!("{id} {what}: a user asked for it"), Facts::from([("node", id.0.clone().into())]));
        }
        if !cordoned {
            node.draining = false;
            // Who takes it back into use says that it is well.
            self.change_held(turn, id, |blames, gpus| {
                blames.clear();
                gpus.clear();
            });
            self.queue.unpark();
            self.schedule(turn);
        }
    }

    /// Its gangs save and stop, within the deadline if there is one, and go back in the queue.
    pub(super) fn on_node_draining(&mut self, turn: &mut Turn, id: &NodeId, cordon: bool, deadline: Option<Millis>) {
        if cordon {
            self.on_cordon_requested(turn, id, true);
        } else if let Some(node) = self.nodes.get_mut(id) {
            node.draining = true;
        }
        self.copy_from_leaving(turn, id);
        // By the coordinator's clock, and on record: a node that is told of it later has only what is left.
        let deadline = deadline.map(|within| Timestamp(turn.now.0.saturating_add(within.0)));
        let held: Vec<JobId> = self.jobs.values().filter(|j| holds(j, id)).map(|j| j.id).collect();
        for job_id in held {
            let Some(job) = self.jobs.get_mut(&job_id) else { continue };
            let reason = format!("{id} is draining");
            if job.retry_at.is_some() {
                self.requeue(turn, job_id, &reason);
                continue;
            }
            let grace = job.spec.stop_grace;
            if let Some(gang) = job.gang.as_mut().filter(|gang| gang.is_leaving()) {
                // Told before, and now it may have less time.
                if let (Some(at), Some(ending)) = (deadline, &mut gang.ending) {
                    ending.limit(at);
                    turn.touched.insert(job_id);
                    self.stop_ranks(turn, job_id, grace);
                }
                continue;
            }
            let ending = Ending { then: Then::Requeue, at: turn.now, rank: None, cause: Some(Cause::Drain), reason, deadline };
            self.end_gang(turn, job_id, ending, grace);
        }
    }

    /// Whether any gang holds places on a node.
    pub fn node_is_empty(&self, id: &NodeId) -> bool {
        self.nodes.get(id).is_none_or(|n| n.taken.ranks == 0)
    }
}

fn holds(job: &super::state::Job, node: &NodeId) -> bool {
    job.gang.as_ref().is_some_and(|g| g.placement.iter().any(|p| p.node == *node))
}

fn lost_exit(at: Timestamp, why: &str) -> RankExit {
    RankExit {
        code: None,
        signal: None,
        error: Some(why.into()),
        at,
        tail: Vec::new(),
        message: None,
        matched: None,
        out_of_memory: false,
        gpu_error: None,
    }
}
