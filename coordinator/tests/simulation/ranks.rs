//! What simulated ranks do: they start, meet, step, save, beat and end.

use std::collections::BTreeSet;

use everlit_api::agent::{Beat, CheckpointNews, GangSpec, Resumed};
use everlit_api::ids::{Incarnation, JobId};
use everlit_api::rank::RankExit;
use everlit_worker::agent::engine::{Event, drained, no_exit};

use crate::check::Seen;
use crate::faults::Fault;
use crate::jobs::Kind;
use crate::node::{Run, SimNode};
use crate::slow::parts;
use crate::world::{Happening, World};

impl World {
    /// Its process runs.
    pub fn rank_up(&mut self, node: usize, life: u64, boot: u64, incarnation: Incarnation) {
        let own = &self.nodes[node];
        if own.life != life || own.boot != boot || own.runs.get(&incarnation).is_none_or(|run| run.pid.is_some() || run.exit.is_some()) {
            return;
        }
        self.next_pid += 1;
        let (pid, at) = (self.next_pid, self.wall(node));
        self.saw(&Seen::RankUp { incarnation });
        if let Some(run) = self.nodes[node].runs.get_mut(&incarnation) {
            run.pid = Some(pid);
        }
        self.tell_agent(node, Event::RankStarted { incarnation, pid, at });
        self.lose_agent_in_start(node, incarnation);
        let (job, attempt) = (incarnation.job, incarnation.attempt);
        let script = self.scripts[&job].clone();
        let end = |code| Happening::RankEnd { node, boot, incarnation, code: Some(code), signal: None, lost: false };
        match script.kind {
            Kind::Missing => return self.soon(1, 5, end(127)),
            Kind::CrashLoop => return self.soon(50, 3_000, end(1)),
            Kind::Trains | Kind::Mute => {}
        }
        self.soon(100, 1_500, Happening::Beat { node, boot, incarnation });
        if script.alone {
            let work_ms = script.steps * script.step_ms;
            return self.soon(work_ms / 2, work_ms * 2, Happening::LoneEnd { node, boot, incarnation });
        }
        self.meet(node, job, attempt);
    }

    /// A rank that needs nobody is done.
    pub fn lone_end(&mut self, node: usize, boot: u64, incarnation: Incarnation) {
        if self.nodes[node].runs.get(&incarnation).is_some_and(|run| !run.hung && !run.ending) {
            self.rank_end(node, boot, incarnation, Some(0), None, false);
        }
    }

    /// The ranks of an attempt with their nodes; that of rank 0 comes first.
    fn everybody(&self, job: JobId, attempt: u32) -> Vec<(usize, Incarnation)> {
        let first = |node: &SimNode| node.gangs.get(&(job, attempt)).map(|(spec, _)| spec.first_rank);
        let mut nodes: Vec<(u32, usize)> =
            self.nodes.iter().enumerate().filter_map(|(number, node)| Some((first(node)?, number))).collect();
        nodes.sort_unstable();
        let members = |(_, node): (u32, usize)| self.nodes[node].members(job, attempt).into_iter().map(move |own| (node, own));
        nodes.into_iter().flat_map(members).collect()
    }

    /// Every rank of the membership lives and takes part.
    fn all_take_part(&self, everybody: &[(usize, Incarnation)], node: usize, job: JobId, attempt: u32) -> bool {
        let world = self.nodes[node].gangs.get(&(job, attempt)).map_or(0, |(spec, _)| spec.world_size as usize);
        let takes_part = |(node, own): &(usize, Incarnation)| {
            self.nodes[*node].runs.get(own).is_some_and(|run| run.is_alive() && !run.hung && !run.ending)
        };
        world > 0 && everybody.len() == world && everybody.iter().all(takes_part)
    }

    /// Ranks that all live begin to step, once for each membership.
    fn meet(&mut self, node: usize, job: JobId, attempt: u32) {
        let everybody = self.everybody(job, attempt);
        let Some(lead) = everybody.first().map(|(lead, _)| *lead) else { return };
        let spread = everybody.iter().any(|(other, _)| *other != lead);
        let all = everybody.iter().all(|(node, own)| self.nodes[*node].runs.get(own).is_some_and(|run| run.is_alive() && !run.hung));
        if !all || (spread && !self.all_take_part(&everybody, node, job, attempt)) {
            return;
        }
        let boot = self.nodes[lead].boot;
        let Some(generation) = self.nodes[lead].gangs.get(&(job, attempt)).map(|(spec, _)| spec.generation) else { return };
        if self.nodes[lead].met.insert((job, attempt), generation) != Some(generation) {
            self.soon(200, 2_000, Happening::GangStep { node: lead, boot, job, attempt, generation });
        }
    }

    /// On a thread of the agent: the ranks that live are told who is with them now.
    pub fn regroup(&mut self, node: usize, life: u64, spec: GangSpec, resumed: Resumed, fresh: &[u32]) {
        if self.nodes[node].life != life {
            return;
        }
        let (job, attempt, boot) = (spec.job, spec.attempt, self.nodes[node].boot);
        let incarnation = |seat: &u32| Incarnation { job, attempt, rank: *seat };
        if self.nodes[node].disk_full {
            for own in fresh.iter().map(incarnation) {
                let exit = no_exit("no space left on device", self.wall(node));
                self.disturb(job, attempt);
                self.tell_agent(node, Event::RankEnded { incarnation: own, exit, lost: true });
            }
            return;
        }
        // Threads may bring two memberships about in any order; the later one stays.
        if self.nodes[node].gangs.get(&(job, attempt)).is_none_or(|(known, _)| known.generation <= spec.generation) {
            self.nodes[node].gangs.insert((job, attempt), (spec, resumed));
        }
        for seat in fresh.iter().map(incarnation) {
            self.nodes[node].runs.insert(seat, Run::default());
            self.soon(2, 300, Happening::RankUp { node, life, boot, incarnation: seat });
        }
        if !self.scripts[&job].alone {
            self.meet(node, job, attempt);
        }
    }

    /// Nobody said who follows a dead rank.
    pub fn give_up(&mut self, node: usize, boot: u64, incarnation: Incarnation, generation: u32) {
        let waits = self.nodes[node].spec(incarnation).is_some_and(|spec| spec.generation == generation);
        let everybody = self.everybody(incarnation.job, incarnation.attempt);
        if waits && everybody.iter().any(|(node, member)| self.nodes[*node].has_ended(member)) {
            self.after(0, Happening::RankEnd { node, boot, incarnation, code: Some(1), signal: None, lost: false });
        }
    }

    /// A sign of life, once a second.
    pub fn beat(&mut self, node: usize, boot: u64, incarnation: Incarnation) {
        let own = &mut self.nodes[node];
        let key = (incarnation.job, incarnation.attempt);
        let stepped = own.stepped.get(&key).copied();
        let (generation, member) =
            own.spec(incarnation).map_or((0, true), |spec| (spec.generation, spec.rank_of(incarnation.rank).is_some()));
        // In a later membership a rank tells of steps once it has done one there.
        let tells = member && (generation == 0 || stepped == Some(generation));
        let step = own.trainers.get(&key).copied().filter(|_| tells);
        let Some(run) = own.runs.get_mut(&incarnation).filter(|run| run.is_alive() && !run.hung && own.boot == boot) else { return };
        run.seq += 1;
        let seq = run.seq;
        let script = &self.scripts[&incarnation.job];
        let metrics = parts(run, incarnation, script, self.now);
        let event = if script.kind == Kind::Mute {
            Event::RankOutput(incarnation)
        } else {
            let beat = Beat {
                incarnation: Some(incarnation),
                heartbeat: true,
                step,
                total_steps: Some(script.steps),
                generation,
                saves_on_signal: member,
                metrics,
                in_place: (script.in_place && stepped.is_some()).then_some(true),
                ..Beat::default()
            };
            Event::HeartbeatRead { incarnation, seq, beat: Box::new(beat), save_error: None }
        };
        self.tell_agent(node, event);
        self.after(1_000, Happening::Beat { node, boot, incarnation });
    }

    /// One update of a gang of which every rank takes part; a rank that is dead or stopped blocks the others.
    pub fn gang_step(&mut self, node: usize, boot: u64, job: JobId, attempt: u32, generation: u32) {
        let everybody = self.everybody(job, attempt);
        let own = &mut self.nodes[node];
        let current = own.gangs.get(&(job, attempt)).is_some_and(|(spec, _)| spec.generation == generation);
        if own.boot != boot || !current || !self.all_take_part(&everybody, node, job, attempt) {
            return;
        }
        let script = self.scripts[&job].clone();
        let Some(step) = self.nodes[node].trainers.get(&(job, attempt)).map(|step| (step + 1).min(script.steps)) else { return };
        let nodes: BTreeSet<usize> = everybody.iter().map(|(node, _)| *node).collect();
        let done = step >= script.steps;
        for node in nodes {
            self.nodes[node].trainers.insert((job, attempt), step);
            self.nodes[node].stepped.insert((job, attempt), generation);
            if script.kind == Kind::Trains && (done || step.is_multiple_of(script.save_every)) {
                self.save(node, job, attempt);
            }
        }
        if done {
            for (node, incarnation) in everybody {
                let boot = self.nodes[node].boot;
                self.soon(1, 100, Happening::RankEnd { node, boot, incarnation, code: Some(0), signal: None, lost: false });
            }
        } else {
            self.soon(script.step_ms / 2 + 1, script.step_ms * 2, Happening::GangStep { node, boot, job, attempt, generation });
        }
    }

    /// A commit, if the fence lets it.
    pub fn save(&mut self, node: usize, job: JobId, attempt: u32) {
        let Some(step) = self.nodes[node].trainers.get(&(job, attempt)).copied() else { return };
        let fence = self.nodes[node].checkpoints.entry(job).or_default().fence;
        if self.nodes[node].disk_full || fence > attempt || self.nodes[node].ended.contains(&job) {
            return;
        }
        self.saw(&Seen::Committed { node, job, attempt, step });
        let keep = 3;
        if let Some(kept) = self.nodes[node].checkpoints.get_mut(&job) {
            kept.steps.insert(step, (attempt, false));
            while kept.steps.len() > keep {
                kept.steps.pop_first();
            }
        }
        for verified in [false, true] {
            if let Some(news) = self.news_of(node, job, verified) {
                let life = self.nodes[node].life;
                let wait = if verified { 30 } else { 1 };
                self.after(wait, Happening::AgentFact { node, life, event: Box::new(Event::CheckpointSeen(Box::new(news))) });
            }
        }
    }

    pub fn news_of(&self, node: usize, job: JobId, verified: bool) -> Option<CheckpointNews> {
        let kept = self.nodes[node].checkpoints.get(&job)?;
        let (step, (attempt, _)) = kept.steps.last_key_value()?;
        let steps = kept.steps.keys().rev().copied().collect();
        let created_at = self.wall(node);
        Some(CheckpointNews {
            job,
            attempt: *attempt,
            step: *step,
            bytes: 1,
            created_at,
            verified,
            path: format!("/c/{step}"),
            kept: steps,
        })
    }

    /// Its process ends, and the agent hears of it.
    pub fn rank_end(&mut self, node: usize, boot: u64, incarnation: Incarnation, code: Option<i32>, signal: Option<i32>, lost: bool) {
        let at = self.wall(node);
        if let Some(error) = self.nodes[node].gpu_error(incarnation, code, boot, at) {
            self.faults.fired(Fault::GpuFailed);
            self.tell_agent(node, Event::GpuFailed(error));
        }
        let own = &mut self.nodes[node];
        let matched = own.words(incarnation, code);
        let Some(run) = own.runs.get_mut(&incarnation).filter(|run| run.is_alive() && own.boot == boot) else { return };
        let exit = match lost {
            true => no_exit("its shim died", at),
            false => {
                RankExit { code, signal, error: None, at, tail: Vec::new(), message: None, matched, out_of_memory: false, gpu_error: None }
            }
        };
        let (exit, lost) = if run.drained { (drained(exit), true) } else { (exit, lost) };
        run.exit = Some((exit.clone(), lost));
        self.note(23, incarnation.rank.into(), code.unwrap_or(-1) as u64);
        if code != Some(0) {
            self.disturb(incarnation.job, incarnation.attempt);
            self.peers_of_a_dead_rank(node, incarnation);
        }
        self.tell_agent(node, Event::RankEnded { incarnation, exit, lost });
    }

    fn peers_of_a_dead_rank(&mut self, node: usize, dead: Incarnation) {
        let script = &self.scripts[&dead.job];
        let (notice, in_place) = (script.peers_notice, script.in_place);
        let own = &self.nodes[node];
        let generation = own.spec(dead).map_or(0, |spec| spec.generation);
        if script.alone || !(notice || in_place) || own.spec(dead).is_some_and(|spec| spec.rank_of(dead.rank).is_none()) {
            return;
        }
        for (node, incarnation) in self.everybody(dead.job, dead.attempt) {
            let boot = self.nodes[node].boot;
            if in_place {
                self.after(15_000, Happening::GiveUp { node, boot, incarnation, generation });
            } else if self.nodes[node].runs.get(&incarnation).is_some_and(|run| run.is_alive() && !run.hung) {
                self.soon(5, 400, Happening::RankEnd { node, boot, incarnation, code: Some(1), signal: None, lost: false });
            }
        }
    }
}
