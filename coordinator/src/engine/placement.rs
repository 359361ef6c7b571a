//! Where a gang goes: whole, on one node, or not at all (INV-9), with the reason returned beside the decision.
//!
//! Pure choice over what nodes report and what the ledger of reservations says is taken. Gangs across nodes need doors between hosts, which
//! are not built; a gang that no single node can hold stays queued and is told so.

use std::collections::{BTreeMap, BTreeSet};

use everlit_api::ids::NodeId;
use everlit_api::job::{Device, JobKind, JobSpec};
use everlit_api::model::{MemoryEstimate, ModelSizes};
use everlit_api::status::{Capacity, NodeLoad, PlacedRanks};
use everlit_api::time::Timestamp;

use super::blame::Blame;
use super::gpu::GpuBlame;
use super::limits::BLAME_MS;
use super::state::Job;

/// A node as the engine holds it.
#[derive(Debug, Clone, Default)]
pub struct Node {
    /// What it has; empty until its agent has said so.
    pub capacity: Capacity,
    /// What it does right now.
    pub load: NodeLoad,
    /// Version of its agent.
    pub version: String,
    /// The kernel's boot.
    pub boot_id: String,
    /// Its agent is connected.
    pub linked: bool,
    /// It has not been heard of for the node timeout.
    pub lost: bool,
    /// A user's wish: no new ranks.
    pub cordoned: bool,
    /// Its agent ends: no new ranks.
    pub draining: bool,
    /// To be forgotten once nothing holds places there.
    pub expelled: bool,
    /// When it was last heard of.
    pub seen_at: Option<Timestamp>,
    /// What gangs hold there.
    pub taken: Taken,
    /// Failures of late that may be its own, oldest first.
    pub blames: Vec<Blame>,
    /// Hardware errors of its GPUs of late, oldest first.
    pub gpu_blames: Vec<GpuBlame>,
}

/// What gangs hold on a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Taken {
    /// Ranks.
    pub ranks: u32,
    /// Thousandths of a CPU.
    pub cpu_milli: u64,
    /// Bytes.
    pub memory: u64,
    /// GPUs by index.
    pub gpus: BTreeSet<u32>,
}

/// What a gang needs; jobs of the same need share a line in the queue.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Need {
    /// Ranks.
    pub ranks: u32,
    /// Ranks that it begins with at least.
    pub least: u32,
    /// Spares beside them, which hold as much but no GPU.
    pub spares: u32,
    /// Thousandths of a CPU per rank.
    pub cpu_milli: u64,
    /// Bytes per rank.
    pub memory: u64,
    /// GPUs per rank.
    pub gpus: u32,
    /// Without one GPU per rank it runs on the CPU instead.
    pub gpus_optional: bool,
    /// What a rank of the built-in program will take, when the job does not say. Not reserved: it only tells what can never run.
    pub estimate: Estimate,
    /// Nodes that it must not go to.
    pub excluded: BTreeSet<NodeId>,
}

/// Bytes of one rank at least: with one sample in a forward pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Estimate {
    /// Where it computes: weights, gradients, optimizer, activations.
    pub device: u64,
    /// In shared memory of the machine: snapshots.
    pub snapshots: u64,
}

/// What one rank of the built-in program needs in training; `None` for other programs.
pub fn memory_estimate(spec: &JobSpec) -> Option<MemoryEstimate> {
    let worker = spec.worker.as_ref().filter(|_| spec.kind == JobKind::Train)?;
    Some(MemoryEstimate::of(&ModelSizes::of(&worker.model)?, worker, spec.world_size))
}

impl Need {
    /// Of a job: the built-in program on `auto` takes a GPU each if every rank can have one.
    pub fn of(spec: &JobSpec) -> Self {
        let device = spec.worker.as_ref().map(|w| w.device);
        let (gpus, gpus_optional) = match (spec.resources.gpus, device) {
            (0, Some(Device::Auto)) => (1, true),
            (0, Some(Device::Cuda)) => (1, false),
            (asked, _) => (asked, false),
        };
        let estimate = memory_estimate(spec).filter(|_| spec.resources.memory == 0);
        Self {
            ranks: spec.world_size,
            least: spec.least_world_size(),
            spares: spec.restart.spares,
            cpu_milli: (spec.resources.cpus * 1_000.0).ceil() as u64,
            memory: spec.resources.memory,
            gpus,
            gpus_optional,
            estimate: estimate.map(|e| Estimate { device: e.total(1) - e.snapshot_bytes, snapshots: e.snapshot_bytes }).unwrap_or_default(),
            excluded: BTreeSet::new(),
        }
    }

    /// What `count` ranks of it and its spares hold, with these GPUs.
    pub fn taken(&self, count: u32, gpus: &[u32]) -> Taken {
        let count = count.saturating_add(self.spares);
        let count_wide = u64::from(count);
        Taken {
            ranks: count,
            cpu_milli: self.cpu_milli.saturating_mul(count_wide),
            memory: self.memory.saturating_mul(count_wide),
            gpus: gpus.iter().copied().collect(),
        }
    }
}

impl Job {
    /// What its gang needs now.
    pub fn need(&self) -> Need {
        Need { excluded: self.excluded.iter().cloned().collect(), ..Need::of(&self.spec) }
    }
}

/// Whether and where a gang goes.
#[derive(Debug, Clone, PartialEq)]
pub enum Placement {
    /// There.
    Now(Vec<PlacedRanks>),
    /// Some node could hold it when others have gone.
    Later(String),
    /// No known node could ever hold it.
    Never(String),
}

impl Node {
    /// It may take new ranks.
    pub fn is_open(&self) -> bool {
        self.linked && !self.cordoned && !self.draining && !self.expelled
    }

    /// Reserves.
    pub fn take(&mut self, taken: &Taken) {
        self.taken.ranks += taken.ranks;
        self.taken.cpu_milli += taken.cpu_milli;
        self.taken.memory += taken.memory;
        self.taken.gpus.extend(&taken.gpus);
    }

    /// Gives back.
    pub fn give_back(&mut self, taken: &Taken) {
        self.taken.ranks -= taken.ranks;
        self.taken.cpu_milli -= taken.cpu_milli;
        self.taken.memory -= taken.memory;
        for gpu in &taken.gpus {
            self.taken.gpus.remove(gpu);
        }
    }

    /// GPUs for every rank, `None` when there are not enough (an empty list when none are needed).
    fn gpus_for(&self, need: &Need, free_only: bool) -> Option<Vec<u32>> {
        let wanted = (need.gpus as usize).checked_mul(need.ranks as usize)?;
        let usable = self.capacity.gpus.iter().map(|g| g.index).filter(|g| !free_only || !self.taken.gpus.contains(g));
        let avoided = self.avoided_gpus();
        let (bad, good): (Vec<u32>, Vec<u32>) = usable.partition(|gpu| avoided.contains(gpu));
        let mut found: Vec<u32> = good.into_iter().chain(bad).take(wanted).collect();
        found.sort_unstable();
        if found.len() == wanted {
            Some(found)
        } else if need.gpus_optional {
            Some(Vec::new())
        } else {
            None
        }
    }

    /// The GPUs that it would grant, or why it can not hold the gang. `empty`: as if nothing else ran there.
    fn fit(&self, need: &Need, empty: bool) -> Result<Vec<u32>, String> {
        let nothing = Taken::default();
        let taken = if empty { &nothing } else { &self.taken };
        let asked = need.taken(need.ranks, &[]);
        let cpus = (self.capacity.cpus * 1_000.0) as u64;
        let adverb = if empty { "has" } else { "has free" };
        let slots = self.capacity.slots.saturating_sub(taken.ranks);
        if asked.ranks > slots {
            return Err(format!("needs {} ranks, {adverb} places for {slots}", asked.ranks));
        }
        let free = cpus.saturating_sub(taken.cpu_milli);
        if asked.cpu_milli > free {
            return Err(format!("needs {} CPUs, {adverb} {}", milli(asked.cpu_milli), milli(free)));
        }
        let free = self.capacity.memory.saturating_sub(taken.memory);
        if asked.memory > free {
            return Err(format!("needs {} of memory, {adverb} {}", gib(asked.memory), gib(free)));
        }
        let gpus = self.gpus_for(need, !empty).ok_or_else(|| {
            let free = self.capacity.gpus.iter().filter(|g| empty || !self.taken.gpus.contains(&g.index)).count();
            format!("needs {} GPUs, {adverb} {free}", u64::from(need.gpus) * u64::from(need.ranks))
        })?;
        self.holds(need, &gpus).map(|()| gpus)
    }

    /// Whether the whole machine, and each GPU, could hold what the ranks will take.
    fn holds(&self, need: &Need, gpus: &[u32]) -> Result<(), String> {
        let Estimate { device, snapshots } = need.estimate;
        let granted = self.capacity.gpus.iter().filter(|gpu| gpus.contains(&gpu.index));
        let hint = "estimated from the model; resources.memory says otherwise";
        if let Some(gpu) = granted.filter(|gpu| gpu.memory > 0 && gpu.memory < device).min_by_key(|gpu| gpu.memory) {
            return Err(format!("needs {} of GPU memory for each rank ({hint}), GPU {} has {}", gib(device), gpu.index, gib(gpu.memory)));
        }
        let each = if gpus.is_empty() { device.saturating_add(snapshots) } else { snapshots };
        let memory = self.capacity.memory;
        if each.saturating_mul(u64::from(need.ranks) + u64::from(need.spares)) > memory {
            return Err(format!("needs {} for each of {} ranks ({hint}), has {} of memory", gib(each), need.ranks, gib(memory)));
        }
        Ok(())
    }

    /// As many ranks as it can hold now, if those are enough to begin with.
    pub(super) fn most(&self, need: &Need) -> Option<(u32, Vec<u32>)> {
        (need.least..=need.ranks).rev().find_map(|ranks| Some((ranks, self.fit(&Need { ranks, ..need.clone() }, false).ok()?)))
    }

    /// So many ranks more of a gang that has some here, on no GPU.
    pub(super) fn has_room_beside(&self, held: u32, more: u32, need: &Need) -> bool {
        let on_cpu = Need { gpus: 0, ..need.clone() };
        let fits = self.fit(&Need { ranks: more, spares: 0, ..on_cpu.clone() }, false).is_ok();
        fits && self.holds(&Need { ranks: held + more, ..on_cpu }, &[]).is_ok()
    }

    /// A sentence on why this gang is not here.
    pub fn explain(&self, id: &NodeId, need: &Need) -> String {
        if need.excluded.contains(id) {
            return "is excluded for this job by its log_policies, until a user restarts it".into();
        }
        match (self.fit(need, true), self.fit(need, false)) {
            (Err(never), _) => format!("can never hold it: {never}"),
            _ if self.lost || !self.linked => "its agent is not connected".into(),
            _ if self.draining => "is draining".into(),
            _ if self.cordoned => "is cordoned".into(),
            (_, Err(later)) => later,
            _ if self.avoided() > 0 => {
                let hours = BLAME_MS / 3_600_000;
                format!("has room, and is avoided: {} failures in {hours} h that may be the machine's", self.avoided())
            }
            (_, Ok(gpus)) if self.avoided_among(&gpus) > 0 => {
                format!("has room, and {} of the GPUs are avoided: they had hardware errors", self.avoided_among(&gpus))
            }
            _ => "has room".into(),
        }
    }
}

fn milli(value: u64) -> String {
    format!("{}", value as f64 / 1_000.0)
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

/// Chooses the node that is left with the fewest free places (best fit), by name among equals; suspected ones, and those with only suspected GPUs, last.
pub fn plan_gang(nodes: &BTreeMap<NodeId, Node>, need: &Need) -> Placement {
    let allowed = |id: &NodeId| !need.excluded.contains(id);
    let fitting =
        nodes.iter().filter(|(id, n)| n.is_open() && allowed(id)).filter_map(|(id, n)| n.fit(need, false).ok().map(|gpus| (id, n, gpus)));
    let with_gpus = |gpus: &[u32]| need.gpus_optional && gpus.is_empty();
    let key = |id: &NodeId, n: &Node, gpus: &[u32]| {
        (with_gpus(gpus), n.avoided_among(gpus), n.avoided(), n.capacity.slots.saturating_sub(n.taken.ranks), id.clone())
    };
    let best = fitting.min_by_key(|(id, n, gpus)| key(id, n, gpus));
    if let Some((id, _, gpus)) = best {
        return Placement::Now(vec![PlacedRanks { node: id.clone(), first_rank: 0, count: need.ranks, gpus }]);
    }
    let open = nodes.iter().filter(|(id, n)| need.least < need.ranks && n.is_open() && allowed(id));
    let most = open.filter_map(|(id, n)| n.most(need).map(|(count, gpus)| (id, n, count, gpus)));
    if let Some((id, _, count, gpus)) = most.min_by_key(|(id, n, count, gpus)| (std::cmp::Reverse(*count), key(id, n, gpus))) {
        return Placement::Now(vec![PlacedRanks { node: id.clone(), first_rank: 0, count, gpus }]);
    }
    // What keeps it from beginning is want of room for the fewest.
    let need = &Need { ranks: need.least, ..need.clone() };
    if nodes.is_empty() {
        return Placement::Later("no node has joined yet".into());
    }
    let ever: Vec<_> = nodes.iter().filter(|(id, n)| !n.lost && allowed(id) && n.fit(need, true).is_ok()).collect();
    match ever.first() {
        Some((id, node)) => Placement::Later(format!("{id} {}", node.explain(id, need))),
        None => {
            let reasons: Vec<_> = nodes.iter().take(4).map(|(id, n)| format!("{id} {}", n.explain(id, need))).collect();
            let mut able = nodes.iter().filter(|(_, n)| n.fit(need, true).is_ok()).peekable();
            let which = if able.peek().is_some() {
                if able.any(|(id, _)| allowed(id)) { "no connected node can hold it" } else { "no other node can hold it" }
            } else {
                "no node can ever hold it"
            };
            Placement::Never(format!("{which}: {}", reasons.join("; ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use everlit_api::ids::JobId;
    use everlit_api::job::ModelSpec;
    use everlit_api::rank::Cause;
    use everlit_api::status::GpuInfo;
    use everlit_api::time::Timestamp;
    use expect_test::expect;

    use super::super::blame::Blame;
    use super::*;

    fn node(cpus: f64, gpus: u32, slots: u32) -> Node {
        let gpus = (0..gpus).map(|index| GpuInfo { index, name: "H100".into(), uuid: index.to_string(), memory: 80 << 30 }).collect();
        Node { capacity: Capacity { cpus, memory: 8 << 30, gpus, slots }, linked: true, ..Node::default() }
    }

    fn need(ranks: u32) -> Need {
        Need {
            least: ranks,
            ranks,
            spares: 0,
            cpu_milli: 0,
            memory: 0,
            gpus: 0,
            gpus_optional: false,
            estimate: Estimate::default(),
            excluded: BTreeSet::new(),
        }
    }

    #[test]
    fn a_gang_goes_whole_to_the_fullest_node_that_holds_it() {
        let mut nodes = BTreeMap::from([(NodeId("a".into()), node(4.0, 0, 64)), (NodeId("b".into()), node(4.0, 0, 64))]);
        nodes.get_mut(&NodeId("b".into())).expect("b").take(&need(10).taken(10, &[]));
        let Placement::Now(placed) = plan_gang(&nodes, &need(20)) else { panic!("fits") };
        assert_eq!(placed, vec![PlacedRanks { node: NodeId("b".into()), first_rank: 0, count: 20, gpus: vec![] }]);
        let Placement::Now(placed) = plan_gang(&nodes, &need(60)) else { panic!("fits") };
        assert_eq!(placed[0].node, NodeId("a".into()));
    }

    #[test]
    fn what_no_node_can_ever_hold_is_told_apart_from_what_must_wait() {
        let mut nodes = BTreeMap::from([(NodeId("a".into()), node(4.0, 2, 64))]);
        assert!(matches!(plan_gang(&nodes, &need(65)), Placement::Never(why) if why.contains("needs 65 ranks, has places for 64")));
        let cpus = Need { cpu_milli: 2_500, ..need(2) };
        assert!(matches!(plan_gang(&nodes, &cpus), Placement::Never(why) if why.contains("needs 5 CPUs, has 4")));
        nodes.get_mut(&NodeId("a".into())).expect("a").take(&need(60).taken(60, &[]));
        assert!(matches!(plan_gang(&nodes, &need(5)), Placement::Later(why) if why.contains("has free places for 4")));
        assert!(matches!(plan_gang(&BTreeMap::new(), &need(5)), Placement::Later(_)));
    }

    #[test]
    fn gpus_are_granted_once_and_optional_ones_do_not_block() {
        let mut nodes = BTreeMap::from([(NodeId("a".into()), node(4.0, 2, 64))]);
        let auto = Need { gpus: 1, gpus_optional: true, ..need(2) };
        let Placement::Now(placed) = plan_gang(&nodes, &auto) else { panic!("fits") };
        assert_eq!(placed[0].gpus, vec![0, 1]);
        nodes.get_mut(&NodeId("a".into())).expect("a").take(&auto.taken(2, &[0, 1]));
        let Placement::Now(placed) = plan_gang(&nodes, &auto) else { panic!("fits on the CPU") };
        assert!(placed[0].gpus.is_empty());
        let hard = Need { gpus: 1, ..need(1) };
        assert!(matches!(plan_gang(&nodes, &hard), Placement::Later(why) if why.contains("needs 1 GPUs, has free 0")));
        assert!(matches!(plan_gang(&nodes, &Need { gpus: 3, ..need(1) }), Placement::Never(_)));
    }

    #[test]
    fn a_model_that_no_memory_holds_is_told_with_numbers_and_a_users_figure_wins() {
        let nodes = BTreeMap::from([(NodeId("a".into()), node(4.0, 0, 64))]);
        let mut spec = JobSpec::default_for(2);
        assert!(matches!(plan_gang(&nodes, &Need::of(&spec)), Placement::Now(_)));
        spec.worker.as_mut().expect("built in").model = ModelSpec::Preset("llama-1b".into());
        let Placement::Never(why) = plan_gang(&nodes, &Need::of(&spec)) else { panic!("1B does not fit in 8 GiB") };
        expect!["no node can ever hold it: a can never hold it: needs 26.3 GiB for each of 2 ranks (estimated from the model; resources.memory says otherwise), has 8.0 GiB of memory"].assert_eq(&why);
        spec.resources.memory = 4 << 30;
        assert!(matches!(plan_gang(&nodes, &Need::of(&spec)), Placement::Now(_)));
        assert_eq!(memory_estimate(&JobSpec { worker: None, ..spec }), None);
    }

    #[test]
    fn on_gpus_the_model_must_fit_there_and_only_snapshots_in_the_machine() {
        let mut one = node(4.0, 2, 64);
        one.capacity.memory = 32 << 30;
        let mut spec = JobSpec::default_for(2);
        spec.worker.as_mut().expect("built in").model = ModelSpec::Preset("llama-1b".into());
        assert_eq!(one.fit(&Need::of(&spec), true), Ok(vec![0, 1]));
        one.capacity.gpus[1].memory = 8 << 30;
        let why = one.fit(&Need::of(&spec), true).expect_err("one GPU is too small");
        expect![
            "needs 15.2 GiB of GPU memory for each rank (estimated from the model; resources.memory says otherwise), GPU 1 has 8.0 GiB"
        ]
        .assert_eq(&why);
    }

    #[test]
    fn what_was_taken_can_be_given_back() {
        let mut one = node(4.0, 2, 64);
        let held = Need { cpu_milli: 500, memory: 10, gpus: 1, ..need(2) }.taken(2, &[0, 1]);
        one.take(&held);
        one.give_back(&held);
        assert_eq!(one.taken, Taken::default());
    }

    #[test]
    fn why_a_gang_is_not_on_a_node_is_said_in_one_sentence() {
        let name = NodeId("a".into());
        let told = |change: fn(&mut Node), need: &Need| {
            let mut node = node(4.0, 1, 8);
            change(&mut node);
            node.explain(&name, need)
        };
        let small = need(2);
        assert_eq!(told(|_| {}, &small), "has room");
        assert_eq!(
            told(|_| {}, &Need { excluded: BTreeSet::from([name.clone()]), ..need(2) }),
            "is excluded for this job by its log_policies, until a user restarts it"
        );
        assert_eq!(told(|node| node.lost = true, &small), "its agent is not connected");
        assert_eq!(told(|node| node.linked = false, &small), "its agent is not connected");
        assert_eq!(told(|node| node.draining = true, &small), "is draining");
        assert_eq!(told(|node| node.cordoned = true, &small), "is cordoned");
        assert_eq!(told(|node| node.lost = true, &need(9)), "can never hold it: needs 9 ranks, has places for 8");
        let fails = |node: &mut Node| {
            let blame = |job| Blame { at: Timestamp(1), job: JobId::from_u128(job), cause: Cause::Stuck };
            node.blames = [1, 2].map(blame).into();
        };
        assert_eq!(told(fails, &small), "has room, and is avoided: 2 failures in 24 h that may be the machine's");
        assert_eq!(told(|node| node.take(&need(7).taken(7, &[])), &small), "needs 2 ranks, has free places for 1");
    }

    #[test]
    fn what_ranks_will_take_is_held_against_the_whole_machine_to_the_byte() {
        let each = |bytes: u64| Need { estimate: Estimate { device: bytes, snapshots: 0 }, spares: 1, ..need(3) };
        let own = node(4.0, 0, 64);
        // 8 GiB for three ranks and a spare.
        assert!(own.fit(&each(2 << 30), false).is_ok());
        assert!(own.fit(&each((2 << 30) + 1), false).unwrap_err().contains("for each of 3 ranks"));
        let on_gpu = |bytes: u64| Need { gpus: 1, estimate: Estimate { device: bytes, snapshots: 0 }, ..need(1) };
        let mut own = node(4.0, 1, 64);
        assert!(own.fit(&on_gpu(80 << 30), false).is_ok());
        assert!(own.fit(&on_gpu((80 << 30) + 1), false).is_err());
        // A GPU that does not say how much it has.
        own.capacity.gpus[0].memory = 0;
        assert!(own.fit(&on_gpu((80 << 30) + 1), false).is_ok());
    }

    #[test]
    fn ranks_beside_others_need_places_of_their_own_and_memory_for_all() {
        let mut own = node(4.0, 0, 8);
        own.take(&need(5).taken(5, &[]));
        let asks = Need { spares: 1, least: 2, ..need(8) };
        // Its spare has a place already.
        assert!(own.has_room_beside(2, 3, &asks) && !own.has_room_beside(2, 4, &asks));
        let each = |bytes: u64| Need { estimate: Estimate { device: bytes, snapshots: 0 }, ..need(8) };
        assert!(own.has_room_beside(2, 2, &each(2 << 30)) && !own.has_room_beside(2, 3, &each(2 << 30)));
        // For those beside it on GPUs nothing is counted on the CPU's side that is not there.
        assert!(own.has_room_beside(2, 2, &Need { gpus: 1, ..each(2 << 30) }));
    }

    #[test]
    fn a_smaller_gang_begins_on_an_open_node_that_is_allowed_where_most_of_it_fits() {
        let [a, b] = ["a", "b"].map(|name| NodeId(name.into()));
        let nodes = |change: fn(&mut Node)| {
            let mut large = node(4.0, 0, 6);
            change(&mut large);
            BTreeMap::from([(a.clone(), large), (b.clone(), node(4.0, 0, 5))])
        };
        let place = |nodes: &BTreeMap<NodeId, Node>, need: &Need| match plan_gang(nodes, need) {
            Placement::Now(shares) => Some((shares[0].node.0.clone(), shares[0].count)),
            _ => None,
        };
        let small = Need { least: 2, ..need(8) };
        assert_eq!(place(&nodes(|_| {}), &small), Some(("a".into(), 6)));
        assert_eq!(place(&nodes(|node| node.cordoned = true), &small), Some(("b".into(), 5)));
        assert_eq!(place(&nodes(|_| {}), &Need { excluded: BTreeSet::from([a.clone()]), ..small }), Some(("b".into(), 5)));
        assert_eq!(place(&nodes(|_| {}), &need(8)), None, "it wants all of them");
    }

    #[test]
    fn how_many_gpus_there_are_and_how_many_of_them_are_free_is_told() {
        let mut own = node(4.0, 4, 64);
        own.take(&need(3).taken(3, &[0, 1, 2]));
        let asks = |ranks| Need { gpus: 1, ..need(ranks) };
        assert_eq!(own.fit(&asks(2), false), Err("needs 2 GPUs, has free 1".into()));
        assert_eq!(own.fit(&asks(5), true), Err("needs 5 GPUs, has 4".into()));
    }

    #[test]
    fn who_would_like_a_gpu_gets_one_on_an_emptier_node_rather_than_none() {
        let nodes = BTreeMap::from([(NodeId("a".into()), node(4.0, 0, 8)), (NodeId("b".into()), node(4.0, 1, 64))]);
        let auto = Need { gpus: 1, gpus_optional: true, ..need(1) };
        let Placement::Now(placed) = plan_gang(&nodes, &auto) else { panic!("fits") };
        assert_eq!((placed[0].node.0.as_str(), placed[0].gpus.as_slice()), ("b", [0].as_slice()));
    }
}
