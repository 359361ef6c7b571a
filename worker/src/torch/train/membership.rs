//! Going on in place: other ranks in place of lost ones, without a new process and without a checkpoint.
//!
//! A rank whose group broke drops it, waits for the agent to say who is in the next membership, and meets those. All say which step their
//! state is of; who is behind, or has nothing yet, takes it from the most advanced. A rank with a state of its own takes the new one into a
//! second buffer, so that a source that dies on the way tears nobody: what is in hand stays whole until all of the new one is. A step that
//! did not get its update is done again with the same samples, so the bits are those of a run that nothing happened to. A membership may have
//! fewer ranks or more than the one before it: then the samples are dealt anew, and the batch stays what it was.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use everlit_api::manifest::Phase;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::super::c10d::{self, Backend, Group, Reducer, Transfer};
use super::super::data::Source;
use super::super::environment::Environment;
use super::super::loader::Loader;
use super::super::rendezvous::{Meeting, Rendezvous};
use super::super::state::{State, fingerprint};
use super::super::tensors::{assign, beside, on_cpu};
use super::super::{TrainError, signals};
use super::figures::Figures;
use super::run::{Data, Trainer};
use super::{COLLECTIVE_TIMEOUT, HELLO_TIMEOUT, Position, READY_TIMEOUT, backend, buckets, evaluate, plan, say, start_saver};

/// A coordinator that lives says what follows within milliseconds. One that is away restarts the gang when it is back.
const NEWS_TIMEOUT: Duration = Duration::from_secs(15);
const NEWS_POLL: Duration = Duration::from_millis(2);
/// Tensors that are on their way to a rank at once.
const UNDER_WAY: usize = 4;

/// What each rank says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Standing {
    /// Updates done, and samples used for them; `None`: it has no state yet.
    position: Option<(u64, u64)>,
    /// Samples of one update, where that is known.
    batch: Option<u64>,
    data: String,
    device: String,
}

/// A membership that all are in, at the same step with the same state.
pub(super) struct Met {
    pub(super) group: Arc<Group>,
    pub(super) position: Position,
    pub(super) batch: u64,
}

/// Waits for a place among the ranks, and takes it.
pub(super) fn wait_for_place(environment: &mut Environment) -> Result<(), TrainError> {
    let meeting = Meeting::at(environment.rendezvous.as_deref().unwrap_or_default())?;
    loop {
        if let Some(members) = meeting.after(0)
            && let Some(rank) = members.seats.iter().position(|seat| *seat == environment.seat)
        {
            environment.generation = members.generation;
            environment.rank = rank as u32;
            environment.local_rank = environment.rank;
            environment.world = members.seats.len() as u32;
            environment.spare = false;
            return Ok(());
        }
        std::thread::sleep(NEWS_POLL);
    }
}

/// Meets the ranks of a membership and makes this rank's state that of the most advanced. `own`: position and batch, if it has a state.
pub(super) fn meet_again(
    environment: &Environment,
    generation: u32,
    state: &State,
    data: &Data,
    own: Option<(Position, u64)>,
) -> Result<Met, TrainError> {
    let address = environment.rendezvous.as_deref().unwrap_or_default();
    let rendezvous = Arc::new(Rendezvous::open(address, generation, environment.rank, environment.world)?);
    let device = state.model.device();
    let standing = Standing {
        position: own.map(|(position, _)| (position.step, position.samples)),
        batch: own.map(|(_, batch)| batch),
        data: data.listing_sha256.clone(),
        device: format!("{device:?}"),
    };
    let text = serde_json::to_string(&standing).map_err(TrainError::failed)?;
    let all: Result<Vec<Standing>, _> =
        rendezvous.gather("standing", &text, HELLO_TIMEOUT)?.iter().map(|text| serde_json::from_str(text)).collect();
    let all = all.map_err(TrainError::failed)?;
    let (source, newest) = decide_source(&all).map_err(TrainError::Failed)?;
    let group = Arc::new(Group::connect(rendezvous.clone(), &environment.gloo_host, Backend::Gloo, HELLO_TIMEOUT, COLLECTIVE_TIMEOUT)?);
    let behind: Vec<u32> = (0..environment.world).filter(|rank| all[*rank as usize].position != all[source as usize].position).collect();
    if !behind.is_empty() {
        hand_over(environment.rank, source, &behind, state, &group, &rendezvous, own.is_some())?;
    }
    let batch = all[source as usize].batch.unwrap_or_default();
    Ok(Met { group, position: newest, batch })
}

/// Ranks of several nodes begin: those whose node has no checkpoint, or an older one, take the state from the most advanced. Answers where
/// all are now, what one update was there, and whether anybody was behind.
pub(super) fn level(
    environment: &Environment,
    state: &State,
    data: &Data,
    own: Position,
    batch: Option<u64>,
) -> Result<(Position, Option<u64>, bool), TrainError> {
    let Some(server) = &environment.server else { return Ok((own, batch, false)) };
    let address = environment.rendezvous.as_deref().unwrap_or_default();
    let (generation, rank, world) = (environment.generation, environment.rank, environment.world);
    let rendezvous = Arc::new(Rendezvous::at(server, "level", address, generation, rank, world)?);
    let standing = Standing {
        position: Some((own.step, own.samples)),
        // What a node that is behind had does not count.
        batch: None,
        data: data.listing_sha256.clone(),
        device: if state.model.device().is_cuda() { "cuda".into() } else { "cpu".into() },
    };
    let text = serde_json::to_string(&(standing, batch)).map_err(TrainError::failed)?;
    let told = rendezvous.gather("standing", &text, READY_TIMEOUT)?;
    let told: Result<Vec<(Standing, Option<u64>)>, _> = told.iter().map(|text| serde_json::from_str(text)).collect();
    let (all, batches): (Vec<Standing>, Vec<Option<u64>>) = told.map_err(TrainError::failed)?.into_iter().unzip();
    let (source, newest) = decide_source(&all).map_err(TrainError::Failed)?;
    let behind: Vec<u32> = (0..world).filter(|rank| all[*rank as usize].position != all[source as usize].position).collect();
    if !behind.is_empty() {
        let group = Group::connect(rendezvous.clone(), &environment.gloo_host, Backend::Gloo, HELLO_TIMEOUT, COLLECTIVE_TIMEOUT)?;
        hand_over(rank, source, &behind, state, &group, &rendezvous, false)?;
        // Nobody leaves while another still takes.
        rendezvous.gather("level", "", READY_TIMEOUT)?;
    }
    Ok((newest, batches[source as usize], !behind.is_empty()))
}

/// Whose state all go on with: the most advanced, the lowest rank among equals.
fn decide_source(all: &[Standing]) -> Result<(u32, Position), String> {
    let with_state = all.iter().enumerate().filter_map(|(rank, standing)| Some((rank as u32, standing.position?)));
    let most = with_state.min_by_key(|(rank, (step, _))| (std::cmp::Reverse(*step), *rank));
    let Some((source, (step, samples))) = most else { return Err("no rank of this membership has the state".into()) };
    let own = &all[source as usize];
    let differs = |other: &&Standing| {
        (&other.data, &other.device) != (&own.data, &own.device) || other.batch.is_some_and(|batch| Some(batch) != own.batch)
    };
    if let Some(other) = all.iter().find(differs) {
        return Err(format!("the ranks do not train alike: {other:?} beside {own:?}"));
    }
    Ok((source, Position { step, samples }))
}

/// The source's state goes to those who are behind; `keeps`: this rank has one of its own until the new one is whole.
fn hand_over(
    rank: u32,
    source: u32,
    behind: &[u32],
    state: &State,
    group: &Group,
    rendezvous: &Rendezvous,
    keeps: bool,
) -> Result<(), TrainError> {
    let named = state.named();
    if rank == source {
        let sum = send(&named, behind, group)?;
        return rendezvous.set("state", format!("{sum:016x}").as_bytes()).map_err(TrainError::failed);
    }
    if !behind.contains(&rank) {
        return Ok(());
    }
    let (second, own) = receive(&named, source, group, keeps)?;
    let sum = rendezvous.get("state", HELLO_TIMEOUT).map_err(|error| TrainError::PeerLost(format!("rendezvous: {error}")))?;
    if sum != format!("{own:016x}").as_bytes() {
        return Err(TrainError::Failed(format!("the state taken from rank {source} is not what that rank has")));
    }
    for ((_, tensor), new) in named.iter().zip(&second) {
        if new.data_ptr() != tensor.data_ptr() {
            assign(tensor, new);
        }
    }
    Ok(())
}

/// Sends tensors, each to all who are behind, and answers their fingerprint, which is made while they are under way.
fn send(named: &[(String, &Tensor)], behind: &[u32], group: &Group) -> Result<u64, TrainError> {
    let (mut sum, mut under_way) = (0_u64, VecDeque::new());
    for (tag, (name, tensor)) in named.iter().enumerate() {
        let tensor = on_cpu(tensor);
        for to in behind {
            under_way.push_back(group.send(tensor.shallow_clone(), *to, tag)?);
        }
        sum = sum.wrapping_add(fingerprint(name, &tensor));
        while under_way.len() > UNDER_WAY * behind.len()
            && let Some(transfer) = under_way.pop_front()
        {
            transfer.wait()?;
        }
    }
    under_way.into_iter().try_for_each(Transfer::wait)?;
    Ok(sum)
}

/// Takes tensors, and answers them with their fingerprint. They are beside a rank's own where it `keeps` those until all are here.
fn receive(named: &[(String, &Tensor)], source: u32, group: &Group, keeps: bool) -> Result<(Vec<Tensor>, u64), TrainError> {
    let place = |tensor: &Tensor| if keeps { Tensor::empty(tensor.size(), (tensor.kind(), Device::Cpu)) } else { beside(tensor) };
    let second: Vec<Tensor> = named.iter().map(|(_, tensor)| place(tensor)).collect();
    let (mut sum, mut under_way) = (0_u64, VecDeque::new());
    let mut next = second.iter().enumerate();
    for ((name, _), tensor) in named.iter().zip(&second) {
        while under_way.len() < UNDER_WAY
            && let Some((tag, tensor)) = next.next()
        {
            under_way.push_back(group.receive(tensor.shallow_clone(), source, tag)?);
        }
        under_way.pop_front().map_or(Ok(()), Transfer::wait)?;
        sum = sum.wrapping_add(fingerprint(name, tensor));
    }
    Ok((second, sum))
}

impl Trainer<'_> {
    /// The group broke. Comes back in a later membership, or with why there is none.
    pub(super) fn rejoin(&mut self, error: TrainError) -> Result<(), TrainError> {
        let group = self.ranks.group.take();
        let is_gang = group.is_some() || self.environment.elastic;
        if !is_gang
            || !self.can_rejoin
            || backend(self.state.model.device(), &self.environment) != Backend::Gloo
            || signals::terminate_requested()
        {
            return Err(error);
        }
        let begun = Instant::now();
        self.pulse.leave();
        self.reducer = None;
        // A rank that began alone has none.
        if let Some(group) = group {
            group.abort()?;
        }
        let mut reducible = self.state.trained();
        reducible.push(&self.control);
        c10d::drop_gradients(&reducible)?;
        if let Some(saver) = &mut self.saver {
            saver.abandon();
        }
        let mut why = error;
        loop {
            let place = (self.environment.rank, self.environment.world);
            self.generation = self.next_membership(&why)?;
            if place != (self.environment.rank, self.environment.world) {
                // Its part of the batch and of a checkpoint are others now. Whoever has its former part must find nobody writing it.
                self.held = None;
                self.dealt = false;
                if let Some(saver) = self.saver.take() {
                    saver.retire();
                }
            }
            self.pulse.join(&self.environment, self.generation);
            match self.meet() {
                Ok(()) => break,
                // Another one of them was lost before all had met.
                Err(lost @ TrainError::PeerLost(_)) => why = lost,
                Err(other) => return Err(other),
            }
        }
        say(&format!(
            "rank {}: goes on in place after step {} in membership {}, {:.3} s after {why}",
            self.environment.rank,
            self.position.step,
            self.generation,
            begun.elapsed().as_secs_f64(),
        ));
        Ok(())
    }

    /// The next membership that this rank is in, and its place there.
    fn next_membership(&mut self, why: &TrainError) -> Result<u32, TrainError> {
        let meeting = Meeting::at(self.environment.rendezvous.as_deref().unwrap_or_default())?;
        let deadline = Instant::now() + NEWS_TIMEOUT;
        loop {
            if let Some(members) = meeting.after(self.generation) {
                let Some(rank) = members.seats.iter().position(|seat| *seat == self.environment.seat) else {
                    return Err(TrainError::Failed(format!("another process is rank {} by now ({why})", self.environment.rank)));
                };
                self.environment.rank = rank as u32;
                self.environment.world = members.seats.len() as u32;
                return Ok(members.generation);
            }
            if signals::terminate_requested() || Instant::now() >= deadline {
                return Err(why.clone());
            }
            std::thread::sleep(NEWS_POLL);
        }
    }

    fn meet(&mut self) -> Result<(), TrainError> {
        let own = Some((self.position, self.batch));
        let met = meet_again(&self.environment, self.generation, &self.state, &self.data, own)?;
        let ahead = met.position.step - self.position.step;
        if self.dealt {
            self.skip_data(ahead)?;
        }
        self.position = met.position;
        self.enter(met.group)?;
        if self.dealt { Ok(()) } else { self.deal() }
    }

    /// Samples and saves of this rank's place, which is a new one.
    fn deal(&mut self) -> Result<(), TrainError> {
        let worker = &self.config.worker;
        let source = Source::of(self.config)?;
        let corpus = source.open(self.state.model.window(), worker.seed, evaluate::held_out(worker, false))?;
        if corpus.listing_sha256() != self.data.listing_sha256 {
            return Err(TrainError::Config("the data's files are not those that this run began with".into()));
        }
        self.loader = Loader::start(corpus, plan(worker, &self.environment, self.position, self.batch))?;
        self.saver = start_saver(self.config, &self.environment, self.attempt, &self.state)?;
        self.figures = Figures::new(&self.state.model, worker, self.environment.world);
        self.saves = 0;
        self.dealt = true;
        Ok(())
    }

    /// Another membership holds by now, though this one works: a rank is to join.
    pub(super) fn is_called(&self) -> bool {
        self.meeting.as_ref().is_some_and(|meeting| meeting.after(self.generation).is_some())
    }

    /// Takes up training with a group whose ranks all have this state.
    pub(super) fn enter(&mut self, group: Arc<Group>) -> Result<(), TrainError> {
        let mut tensors = self.state.trained();
        tensors.push(&self.control);
        self.reducer = Some(Reducer::new(group.clone(), &tensors, &buckets(&self.state, &self.control))?);
        self.pulse.watch(group.clone());
        self.pulse.phase(Phase::Train);
        self.ranks.group = Some(group);
        self.entered = true;
        Ok(())
    }

    /// Leaves out the samples of updates that this rank did not do itself.
    fn skip_data(&mut self, updates: u64) -> Result<(), TrainError> {
        for _ in 0..updates {
            if self.held.take().is_none() {
                self.loader.next()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(position: Option<(u64, u64)>, batch: Option<u64>) -> Standing {
        Standing { position, batch, data: "d".into(), device: "Cpu".into() }
    }

    #[test]
    fn all_go_on_with_the_most_advanced_and_the_lowest_rank_among_equals() {
        let at = |step: u64| standing(Some((step, step * 8)), Some(8));
        let fresh = standing(None, None);
        let position = |step| Position { step, samples: step * 8 };
        assert_eq!(decide_source(&[fresh.clone(), at(4), at(5), at(5)]), Ok((2, position(5))));
        assert_eq!(decide_source(&[at(4), fresh.clone()]), Ok((0, position(4))));
        assert!(decide_source(&[fresh.clone(), fresh.clone()]).is_err());
        let other = Standing { data: "e".into(), ..fresh };
        assert!(decide_source(&[at(4), other]).unwrap_err().contains("do not train alike"));
    }
}
