//! Facts that hold after every event. What an event touched is checked after it, whole tables at start and each minute (in tests after
//! every event). A contradiction stops the coordinator before its record leaves: training goes on, and no bad state is kept.

use std::collections::BTreeMap;

use everlit_api::ids::{JobId, NodeId};
use everlit_api::status::JobState;

use super::Engine;
use super::placement::{Taken, WHOLE};
use super::state::Change;
use super::timers::Timer;

impl Engine {
    /// What an event touched.
    pub(super) fn check_job(&self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        let state = job.state;
        assert!(job.ranks.is_consistent(), "{id}: rank counters disagree with the ranks");
        assert!(job.book.is_balanced(), "{id}: INV-11: the ledger's parts do not sum to wall time");
        assert!(
            job.budget.counted <= job.spec.restart.max_restarts,
            "{id}: INV-7: {} counted restarts exceed the budget of {}",
            job.budget.counted,
            job.spec.restart.max_restarts
        );
        let need = job.need();
        let waits = self.queue.contains(id, job.spec.priority, &need);
        assert_eq!(waits, state == JobState::Queued, "{id}: {state} and in the queue: {waits}");
        match state {
            JobState::Queued => assert!(job.gang.is_none(), "{id}: queued with places"),
            JobState::Starting | JobState::Running | JobState::Recovering | JobState::Stopping => {
                let gang = job.gang.as_ref().unwrap_or_else(|| panic!("{id}: {state} without places"));
                let ranks: u32 = gang.placement.iter().map(|p| p.count).sum();
                let (least, whole) = (job.spec.least_world_size(), job.spec.world_size);
                assert!((least..=whole).contains(&ranks), "{id}: INV-9: places for {ranks} ranks of a gang of {least} to {whole}");
                assert_eq!(ranks < whole, self.short.contains(&id), "{id}: places for {ranks} of {whole} ranks, and not known as such");
                let kept_from = gang.placement.iter().find(|share| job.excluded.contains(&share.node));
                assert!(job.retry_at.is_some() || kept_from.is_none(), "{id}: placed on a node that it is kept from: {kept_from:?}");
                assert_eq!(gang.attempt, job.attempt, "{id}: INV-1: one attempt at a time");
                let mut first = 0;
                for share in &gang.placement {
                    assert!(share.first_rank == first && share.count > 0, "{id}: INV-9: ranks on {} are not in a row", share.node);
                    first += share.count;
                }
                let waits = job.retry_at.is_some();
                assert_eq!(waits, self.timers.is_set(&Timer::Retry(id)), "{id}: a wait without its timer, or the reverse");
                assert!(
                    waits || !job.ranks.all_ended() || !gang.spares.is_empty() || gang.awaits_rank(),
                    "{id}: nothing runs and nothing is awaited"
                );
                let mut seats: Vec<u32> = gang.seats.iter().copied().chain(gang.spares.iter().map(|spare| spare.seat)).collect();
                seats.sort_unstable();
                assert!(seats.windows(2).all(|two| two[0] < two[1]), "{id}: INV-1: two ranks on one seat");
                for (rank, own) in &gang.restarts {
                    let waits = own.retry_at.is_some() && gang.ending.is_none();
                    assert_eq!(
                        waits,
                        self.timers.is_set(&Timer::RankRetry(id, *rank)),
                        "{id}: rank {rank} waits without its timer, or the reverse"
                    );
                }
                let regroups = gang.regroup.is_some();
                assert_eq!(
                    regroups,
                    self.timers.is_set(&Timer::Regroup(id)),
                    "{id}: a recovery in place without its timer, or the reverse"
                );
                let grows = gang.regroup.as_ref().is_some_and(|regroup| regroup.change == Change::Grown);
                assert!(!regroups || grows || state == JobState::Recovering, "{id}: {state} in a recovery in place");
                assert!(
                    (job.spec.least_world_size()..=ranks).contains(&gang.size()),
                    "{id}: INV-9: {} ranks of a gang of {} to {ranks}",
                    gang.size(),
                    job.spec.least_world_size()
                );
                assert_eq!(job.ranks.list().len(), gang.size() as usize, "{id}: ranks that are known are those of the membership");
                assert!(!waits || job.ranks.all_ended(), "{id}: waiting for a restart while ranks live");
            }
            JobState::Succeeded | JobState::Failed | JobState::Stopped => {
                assert!(job.finished_at.is_some(), "{id}: final without a time");
                assert_eq!(job.ranks.alive(), 0, "{id}: INV-8: final with living ranks");
                assert!(job.gang.is_none(), "{id}: final with places");
            }
        }
    }

    /// Every table against every other.
    pub(super) fn check_all(&self) {
        let mut taken: BTreeMap<&NodeId, Taken> = BTreeMap::new();
        let mut queued = 0;
        for (id, job) in &self.jobs {
            self.check_job(*id);
            queued += usize::from(job.state == JobState::Queued);
            for (node, held) in job.held() {
                let sum = taken.entry(node).or_default();
                for (gpu, bytes) in &held.gpus {
                    let alone = !sum.gpus.contains_key(gpu) || (*bytes != WHOLE && sum.gpus.get(gpu) != Some(&WHOLE));
                    assert!(alone, "INV-9: GPU {gpu} of {} is granted twice", node);
                }
                sum.add(&held);
            }
        }
        let placed = self.jobs.values().filter(|job| job.gang.is_some()).map(|job| job.id);
        assert!(placed.eq(self.placed.iter().copied()), "the jobs that hold places are known");
        assert_eq!(queued, self.queue.depth(), "the queue holds the queued jobs");
        for (id, node) in &self.nodes {
            assert_eq!(node.taken, taken.remove(id).unwrap_or_default(), "INV-9: what is taken on {id} is what gangs hold there");
            for gpu in &node.capacity.gpus {
                let shared = node.taken.gpus.get(&gpu.index).copied().filter(|bytes| *bytes != WHOLE).unwrap_or(0);
                assert!(shared <= gpu.memory, "INV-9: more of GPU {} of {id} is granted than it has", gpu.index);
            }
        }
        assert!(taken.is_empty(), "places on unknown nodes");
        self.check_promises();
    }

    /// What is promised is there once those who leave have left, and for nobody else.
    fn check_promises(&self) {
        let leaving = self.held_by(self.leaving());
        for (id, shares) in &self.pass.promises {
            let waits = self.jobs.get(id).is_some_and(|job| job.state == JobState::Queued);
            assert!(waits && !shares.is_empty(), "{id}: promised places, and does not wait for them");
        }
        for (name, promised) in &self.pass.promised {
            let Some(node) = self.nodes.get(name).filter(|node| node.is_open()) else { continue };
            let mut later = node.taken.clone();
            leaving.get(name).into_iter().for_each(|gone| later.remove(gone));
            let twice = promised.gpus.iter().find(|(gpu, bytes)| later.gpus.contains_key(gpu) && **bytes == WHOLE);
            assert!(twice.is_none(), "INV-9: a GPU of {name} is promised that somebody keeps: {twice:?}");
            later.add(promised);
            let fits = later.ranks <= node.capacity.slots && later.memory <= node.capacity.memory;
            assert!(fits, "INV-9: more of {name} is promised than there is");
        }
    }
}
