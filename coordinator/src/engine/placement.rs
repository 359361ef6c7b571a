//! Where a gang goes: whole, on one node or over several, or not at all (INV-9), with the reason returned beside the decision.
//!
//! Pure choice over what nodes report and what the ledger of reservations says is taken. One node is better than several: its ranks recover in
//! place and share memory. Over several, as few as possible, each with ranks in a row, the largest share first. Suspected nodes come last.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use everlit_api::ids::NodeId;
use everlit_api::job::{Device, JobKind, JobSpec, Resources, Toleration};
use everlit_api::model::{MemoryEstimate, ModelSizes};
use everlit_api::status::{Capacity, NodeLoad, PlacedRanks, Taint};
use everlit_api::time::{Millis, Timestamp};

use super::blame::Blame;
use super::gpu::GpuBlame;
use super::room::Held;
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
    /// Where ranks of other nodes reach it.
    pub address: Option<String>,
    /// Its agent has a door for copies of checkpoints.
    pub copies: bool,
    /// What kind of node it is.
    pub labels: BTreeMap<String, String>,
    /// What a job must tolerate to have ranks here.
    pub taints: Vec<Taint>,
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
    /// When its agent last reported on this link; null before the first time.
    pub reported_at: Option<Timestamp>,
    /// What gangs hold there.
    pub taken: Taken,
    /// What those who preempted others will have of it, beyond what the others leave.
    pub promised: Taken,
    /// What the first that waits will have of it, beyond what others leave until then.
    pub reserved: Taken,
    /// Failures of late that may be its own, oldest first.
    pub blames: Vec<Blame>,
    /// Hardware errors of its GPUs of late, oldest first.
    pub gpu_blames: Vec<GpuBlame>,
}

/// A GPU that one rank has alone, as bytes of it that are taken.
pub const WHOLE: u64 = u64::MAX;

/// What gangs hold on a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Taken {
    /// Ranks.
    pub ranks: u32,
    /// Thousandths of a CPU.
    pub cpu_milli: u64,
    /// Bytes.
    pub memory: u64,
    /// Bytes of GPUs that ranks share, or [`WHOLE`], by index.
    pub gpus: BTreeMap<u32, u64>,
}

/// Nothing is taken.
pub(super) static NOTHING: Taken = Taken { ranks: 0, cpu_milli: 0, memory: 0, gpus: BTreeMap::new() };

impl Taken {
    /// Both.
    pub fn add(&mut self, other: &Self) {
        self.ranks += other.ranks;
        self.cpu_milli += other.cpu_milli;
        self.memory += other.memory;
        for (gpu, bytes) in &other.gpus {
            let own = self.gpus.entry(*gpu).or_default();
            *own = own.saturating_add(*bytes);
        }
    }

    /// Without what is part of it.
    pub fn remove(&mut self, other: &Self) {
        self.ranks -= other.ranks;
        self.cpu_milli -= other.cpu_milli;
        self.memory -= other.memory;
        for (gpu, bytes) in &other.gpus {
            let left = self.gpus.get(gpu).map_or(0, |own| own - bytes);
            if left == 0 {
                self.gpus.remove(gpu);
            } else {
                self.gpus.insert(*gpu, left);
            }
        }
    }

    /// What is left of it when the other is used up first. A GPU that is asked for whole is never left by halves.
    pub fn beyond(&self, other: &Self) -> Self {
        let left =
            |gpu: &u32, bytes: u64| if bytes == WHOLE { WHOLE } else { bytes.saturating_sub(other.gpus.get(gpu).copied().unwrap_or(0)) };
        Self {
            ranks: self.ranks.saturating_sub(other.ranks),
            cpu_milli: self.cpu_milli.saturating_sub(other.cpu_milli),
            memory: self.memory.saturating_sub(other.memory),
            gpus: self.gpus.iter().map(|(gpu, bytes)| (*gpu, left(gpu, *bytes))).filter(|(_, bytes)| *bytes > 0).collect(),
        }
    }
}

/// What a gang needs; jobs of the same need share a line in the queue.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
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
    /// Bytes of GPU memory per rank: without `gpus` a part of one, with it what each must have.
    pub gpu_memory: u64,
    /// What a rank of the built-in program will take, when the job does not say. Not reserved: it only tells what can never run.
    pub estimate: Estimate,
    /// Labels that its nodes must have.
    pub selector: BTreeMap<String, String>,
    /// Taints that do not keep it off.
    pub tolerations: Vec<Toleration>,
    /// Nodes that it must not go to.
    pub excluded: BTreeSet<NodeId>,
    /// It has ended so long after its start, grace included: it may go before others that it can not delay.
    pub ends_within: Option<Millis>,
}

fn milli(cpus: f64) -> u64 {
    (cpus * 1_000.0).ceil() as u64
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
        let shares = spec.resources.gpu_memory > 0;
        let (gpus, gpus_optional) = match (spec.resources.gpus, device) {
            (0, _) if shares => (0, false),
            (0, Some(Device::Auto)) => (1, true),
            (0, Some(Device::Cuda)) => (1, false),
            (asked, _) => (asked, false),
        };
        let estimate = memory_estimate(spec).filter(|_| spec.resources.memory == 0);
        let on_device = |e: MemoryEstimate| if shares { 0 } else { e.total(1) - e.snapshot_bytes };
        Self {
            ranks: spec.world_size,
            least: spec.least_world_size(),
            spares: spec.restart.spares,
            cpu_milli: milli(spec.resources.cpus),
            memory: spec.resources.memory,
            gpus,
            gpus_optional,
            gpu_memory: spec.resources.gpu_memory,
            estimate: estimate.map(|e| Estimate { device: on_device(e), snapshots: e.snapshot_bytes }).unwrap_or_default(),
            selector: spec.node_selector.clone(),
            tolerations: spec.tolerations.clone(),
            excluded: BTreeSet::new(),
            ends_within: spec.time_limit.map(|limit| Millis(limit.0.saturating_add(spec.stop_grace.0))),
        }
    }

    /// Its ranks have parts of GPUs.
    pub fn shares_gpus(&self) -> bool {
        self.gpus == 0 && self.gpu_memory > 0
    }

    /// What `count` ranks of it and its spares hold, with these GPUs.
    pub fn taken(&self, count: u32, gpus: &[u32]) -> Taken {
        self.each().taken(count, self.spares, gpus)
    }

    /// What a gang holds where it is placed.
    pub fn held<'a>(&self, placement: &'a [PlacedRanks]) -> impl Iterator<Item = (&'a NodeId, Taken)> + use<'a> {
        self.each().held(placement, self.spares)
    }

    fn each(&self) -> Each {
        let gpu = if self.shares_gpus() { self.gpu_memory } else { WHOLE };
        Each { cpu_milli: self.cpu_milli, memory: self.memory, gpu }
    }

    /// With GPUs, without, in the order that is tried.
    pub(super) fn modes(&self) -> &'static [bool] {
        match (self.gpus > 0 || self.shares_gpus(), self.gpus_optional) {
            (_, true) => &[true, false],
            (true, false) => &[true],
            (false, false) => &[false],
        }
    }
}

/// What one rank holds.
#[derive(Debug, Clone, Copy)]
struct Each {
    cpu_milli: u64,
    memory: u64,
    /// Bytes of each GPU that it has.
    gpu: u64,
}

impl Each {
    fn taken(self, count: u32, spares: u32, gpus: &[u32]) -> Taken {
        let count = count.saturating_add(spares);
        let mut by_gpu: BTreeMap<u32, u64> = BTreeMap::new();
        for gpu in gpus {
            let bytes = by_gpu.entry(*gpu).or_default();
            *bytes = bytes.saturating_add(self.gpu);
        }
        let (cpu_milli, memory) = (self.cpu_milli.saturating_mul(count.into()), self.memory.saturating_mul(count.into()));
        Taken { ranks: count, cpu_milli, memory, gpus: by_gpu }
    }

    /// Spares are only with a gang on one node: over several nothing recovers in place.
    fn held(self, placement: &[PlacedRanks], spares: u32) -> impl Iterator<Item = (&NodeId, Taken)> {
        let spares = if placement.len() == 1 { spares } else { 0 };
        placement.iter().map(move |share| (&share.node, self.taken(share.count, spares, &share.gpus)))
    }
}

impl Job {
    /// What its gang holds, by node.
    pub(super) fn held(&self) -> impl Iterator<Item = (&NodeId, Taken)> {
        let Resources { cpus, memory, gpus, gpu_memory } = self.spec.resources;
        let gpu = if gpus == 0 && gpu_memory > 0 { gpu_memory } else { WHOLE };
        let each = Each { cpu_milli: milli(cpus), memory, gpu };
        self.gang.iter().flat_map(move |gang| each.held(&gang.placement, self.spec.restart.spares))
    }

    /// What its gang needs now.
    pub fn need(&self) -> Need {
        Need { excluded: self.excluded.iter().cloned().collect(), ..Need::of(&self.spec) }
    }

    /// Where its newest checkpoint is that is on a connected node, or the one that it begins from: among places that are equal it goes back there.
    pub(super) fn home(&self, nodes: &BTreeMap<NodeId, Node>) -> Option<NodeId> {
        let views = if self.checkpoints.is_empty() { &self.origin } else { &self.checkpoints };
        let linked = |id: &&NodeId| nodes.get(*id).is_some_and(|node| node.linked);
        let reached = views.iter().find_map(|view| view.nodes().find(linked));
        reached.or(views.first().and_then(|newest| newest.node.as_ref())).cloned()
    }

    /// No other node that is connected has any of its checkpoints.
    pub(super) fn is_only_on(&self, node: &NodeId, nodes: &BTreeMap<NodeId, Node>) -> bool {
        let has = |other: &NodeId| other != node && nodes.get(other).is_some_and(|other| other.linked);
        !self.checkpoints.is_empty() && !self.checkpoints.iter().any(|view| view.stored.is_some() || view.nodes().any(has))
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
        self.taken.add(taken);
    }

    /// Gives back.
    pub fn give_back(&mut self, taken: &Taken) {
        self.taken.remove(taken);
    }
}

/// The nodes at some time: now, or once some of what is taken has been left.
#[derive(Debug)]
pub(super) struct Board<'a> {
    nodes: &'a BTreeMap<NodeId, Node>,
    /// What is taken there instead of now, promises included.
    later: BTreeMap<NodeId, Taken>,
    /// What is reserved for the first that waits counts as free.
    before_head: bool,
    /// Nodes that take no ranks now count, too.
    closed_too: bool,
}

impl<'a> Board<'a> {
    pub(super) fn now(nodes: &'a BTreeMap<NodeId, Node>) -> Self {
        Self { nodes, later: BTreeMap::new(), before_head: false, closed_too: false }
    }

    /// For who has gone again before the first that waits can go.
    pub(super) fn before_head(nodes: &'a BTreeMap<NodeId, Node>) -> Self {
        Self { before_head: true, ..Self::now(nodes) }
    }

    /// With something else taken on some nodes.
    pub(super) fn later(nodes: &'a BTreeMap<NodeId, Node>, later: BTreeMap<NodeId, Taken>) -> Self {
        Self { later, before_head: true, ..Self::now(nodes) }
    }

    /// The same, with what is reserved for the first that waits.
    pub(super) fn behind_head(self) -> Self {
        Self { before_head: false, ..self }
    }

    /// The same, as if every node took ranks.
    pub(super) fn closed_too(self) -> Self {
        Self { closed_too: true, ..self }
    }

    fn held<'b>(&'b self, id: &NodeId, node: &'b Node) -> Held<'b> {
        match self.later.get(id) {
            Some(taken) => Held { taken, promised: &NOTHING, reserved: &NOTHING },
            None => {
                let reserved = if self.before_head { &NOTHING } else { &node.reserved };
                Held { taken: &node.taken, promised: &node.promised, reserved }
            }
        }
    }

    fn usable(&self, need: &'a Need) -> impl Iterator<Item = (&'a NodeId, &'a Node)> {
        let open = |node: &Node| node.is_open() || (self.closed_too && !node.lost);
        self.nodes.iter().filter(move |(id, node)| open(node) && node.admits(id, need).is_ok())
    }

    /// Where the gang goes, if it can: on one node, over several, and for an elastic one the most that one node can hold.
    pub(super) fn choose(&self, need: &'a Need, home: Option<&NodeId>) -> Option<Vec<PlacedRanks>> {
        let ways = need.modes().iter();
        let whole = ways.into_iter().find_map(|on_gpu| self.one_node(need, *on_gpu, home).or_else(|| self.several(need, *on_gpu, home)));
        whole.or_else(|| self.fewer_ranks(need, home))
    }

    /// Fullest first: best fit leaves large places whole.
    fn key<'b>(&self, id: &'b NodeId, node: &Node, home: Option<&NodeId>) -> (usize, bool, u32, &'b NodeId) {
        (node.avoided(), home.is_some_and(|home| home != id), node.capacity.slots.saturating_sub(self.held(id, node).taken.ranks), id)
    }

    fn one_node(&self, need: &'a Need, on_gpu: bool, home: Option<&NodeId>) -> Option<Vec<PlacedRanks>> {
        let fitting = self.usable(need).filter(|(id, node)| node.room(need, &self.held(id, node), on_gpu, need.spares) >= need.ranks);
        let bad_gpus = |id: &NodeId, node: &Node| {
            if node.gpu_blames.is_empty() || !on_gpu {
                return 0;
            }
            node.avoided_among(&node.grant(need, need.ranks, &self.held(id, node)))
        };
        let (id, node) = fitting.min_by_key(|(id, node)| (bad_gpus(id, node), self.key(id, node, home)))?;
        Some(vec![self.share(need, id, node, 0, need.ranks, on_gpu)])
    }

    fn share(&self, need: &Need, id: &NodeId, node: &Node, first_rank: u32, count: u32, on_gpu: bool) -> PlacedRanks {
        let gpus = if on_gpu { node.grant(need, count, &self.held(id, node)) } else { Vec::new() };
        PlacedRanks { node: id.clone(), first_rank, count, gpus }
    }

    /// As few nodes as hold it, those that are not suspected first; of the last as little as will do.
    fn several(&self, need: &'a Need, on_gpu: bool, home: Option<&NodeId>) -> Option<Vec<PlacedRanks>> {
        let with_address = || self.usable(need).filter(|(_, node)| node.address.is_some());
        let part = |(id, node): (&NodeId, &Node)| u64::from(node.part(need, &self.held(id, node), on_gpu));
        if need.ranks < 2 || with_address().map(part).sum::<u64>() < u64::from(need.ranks) {
            return None;
        }
        let mut rooms: Vec<(usize, Reverse<u32>, bool, &NodeId, &Node)> = with_address()
            .map(|(id, node)| {
                let room = node.part(need, &self.held(id, node), on_gpu);
                let bad = node.avoided() + if on_gpu && !node.gpu_blames.is_empty() { node.avoided_gpus().len() } else { 0 };
                (bad, Reverse(room), home.is_some_and(|home| home != id), id, node)
            })
            .filter(|(_, Reverse(room), ..)| *room > 0)
            .collect();
        rooms.sort_unstable_by_key(|(bad, room, away, id, _)| (*bad, *room, *away, *id));
        let (mut left, mut chosen) = (need.ranks, Vec::new());
        for (at, (bad, Reverse(room), _, id, node)) in rooms.iter().enumerate() {
            if *room >= left {
                // The smallest of the same kind that holds the rest: larger ones stay whole.
                let same = rooms[at..].iter().take_while(|(other, Reverse(room), ..)| other == bad && *room >= left);
                let (.., id, node) = same.last().unwrap_or(&rooms[at]);
                chosen.push((left, *id, *node));
                break;
            }
            chosen.push((*room, *id, *node));
            left -= room;
        }
        chosen.sort_by_key(|(count, ..)| Reverse(*count));
        let mut first = 0;
        let shares = chosen.into_iter().map(|(count, id, node)| {
            first += count;
            self.share(need, id, node, first - count, count, on_gpu)
        });
        Some(shares.collect())
    }

    fn fewer_ranks(&self, need: &'a Need, home: Option<&NodeId>) -> Option<Vec<PlacedRanks>> {
        if need.least >= need.ranks {
            return None;
        }
        let most = self.usable(need).filter_map(|(id, node)| {
            let rooms = need.modes().iter().map(|on_gpu| (node.room(need, &self.held(id, node), *on_gpu, need.spares), *on_gpu));
            let (room, on_gpu) = rooms.max_by_key(|(room, on_gpu)| (*room, *on_gpu))?;
            (room >= need.least).then_some((id, node, room, on_gpu))
        });
        let (id, node, room, on_gpu) = most.min_by_key(|(id, node, room, on_gpu)| (Reverse(*room), !*on_gpu, self.key(id, node, home)))?;
        Some(vec![self.share(need, id, node, 0, room, on_gpu)])
    }
}

/// Where a gang goes now, or why not.
pub fn plan_gang(nodes: &BTreeMap<NodeId, Node>, need: &Need) -> Placement {
    plan_near(nodes, need, None)
}

/// The same, and among equal places where its checkpoint is.
pub(super) fn plan_near(nodes: &BTreeMap<NodeId, Node>, need: &Need, home: Option<&NodeId>) -> Placement {
    Board::now(nodes).choose(need, home).map_or_else(|| why_not(nodes, need, false), Placement::Now)
}

/// The same for one whom what is reserved is for.
pub(super) fn plan_first(nodes: &BTreeMap<NodeId, Node>, need: &Need) -> Placement {
    Board::before_head(nodes).choose(need, None).map_or_else(|| why_not(nodes, need, true), Placement::Now)
}

/// What the nodes that reach each other could hold, if nothing else ran there.
fn room_of_all(nodes: &BTreeMap<NodeId, Node>, need: &Need, on_gpu: bool) -> (usize, u64) {
    let part = nodes.iter().filter(|(id, node)| node.address.is_some() && !node.lost && node.admits(id, need).is_ok());
    let rooms = part.map(|(_, node)| node.part(need, &Held::NONE, on_gpu));
    rooms.fold((0, 0), |(count, sum), room| (count + 1, sum + u64::from(room)))
}

fn why_not(nodes: &BTreeMap<NodeId, Node>, whole: &Need, own: bool) -> Placement {
    if nodes.is_empty() {
        return Placement::Later("no node has joined yet".into());
    }
    let on_gpu = whole.modes() == [true];
    let (reached, together) = if whole.ranks > 1 { room_of_all(nodes, whole, on_gpu) } else { (0, 0) };
    // What keeps it from beginning is want of room for the fewest.
    let need = &Need { ranks: whole.least, ..whole.clone() };
    let allowed = |id: &NodeId, node: &Node| node.admits(id, need).is_ok();
    let spread = nodes.len() > 1;
    let mut ever = nodes.iter().filter(|(id, n)| !n.lost && allowed(id, n) && n.fit(need, true).is_ok());
    if let Some((id, node)) = ever.next() {
        return Placement::Later(format!("{id} {}", node.explain(id, need, spread, own)));
    }
    if together >= u64::from(whole.ranks) {
        let open = nodes.iter().filter(|(id, node)| node.is_open() && node.address.is_some() && allowed(id, node));
        let free: u64 = open.map(|(_, node)| u64::from(node.part(whole, &node.held_now(), on_gpu))).sum();
        let ranks = whole.ranks;
        return Placement::Later(format!(
            "it needs several nodes: {reached} could hold it, and have room for {free} of its {ranks} ranks now"
        ));
    }
    let reasons: Vec<_> = nodes.iter().take(4).map(|(id, n)| format!("{id} {}", n.explain(id, need, spread, own))).collect();
    let never = "no node can ever hold it";
    let mut able = nodes.iter().filter(|(_, n)| n.fit(need, true).is_ok()).peekable();
    let which = if able.peek().is_some() {
        match able.any(|(id, n)| allowed(id, n)) {
            true => "no connected node can hold it",
            false if need.excluded.is_empty() => never,
            false => "no other node can hold it",
        }
    } else {
        never
    };
    let more = match nodes.len() {
        0..=4 => String::new(),
        count => format!("; and {} nodes more", count - 4),
    };
    let all =
        if reached > 1 { format!("; together {reached} nodes could hold {together} of its {} ranks", whole.ranks) } else { String::new() };
    Placement::Never(format!("{which}: {}{more}{all}", reasons.join("; ")))
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
        Need { least: ranks, ranks, ..Need::default() }
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
            node.explain(&name, need, false, false)
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
