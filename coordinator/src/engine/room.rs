//! How much of a gang one node holds, on which GPUs, and a sentence on why not.
//!
//! Numbers first: thousands of nodes are asked for each gang that waits, so nothing is written down before somebody wants to read it. Whole GPUs
//! are for one rank; of others ranks take parts by memory. What others are promised or have reserved counts as taken.

use everlit_api::ids::NodeId;
use everlit_api::job::Toleration;
use everlit_api::status::{GpuInfo, Taint};

use super::limits::BLAME_MS;
use super::placement::{Estimate, NOTHING, Need, Node, Taken, WHOLE};

/// What is not free.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held<'a> {
    pub(super) taken: &'a Taken,
    pub(super) promised: &'a Taken,
    pub(super) reserved: &'a Taken,
}

impl<'a> Held<'a> {
    pub(super) const NONE: Held<'static> = Held { taken: &NOTHING, promised: &NOTHING, reserved: &NOTHING };

    fn each(&self) -> [&'a Taken; 3] {
        [self.taken, self.promised, self.reserved]
    }

    /// Bytes of a GPU that are left; `None` of one that somebody has alone.
    fn left_of(&self, gpu: &GpuInfo) -> Option<u64> {
        let taken = self.each().into_iter().filter_map(|held| held.gpus.get(&gpu.index));
        let sum = taken.fold(0u64, |sum, bytes| sum.saturating_add(*bytes));
        (sum != WHOLE).then(|| gpu.memory.saturating_sub(sum))
    }

    fn is_untouched(&self, gpu: &GpuInfo) -> bool {
        self.each().iter().all(|held| !held.gpus.contains_key(&gpu.index))
    }
}

/// The taint does not keep a job off.
fn is_tolerated(taint: &Taint, tolerations: &[Toleration]) -> bool {
    tolerations.iter().any(|own| own.key == taint.key && own.value.as_ref().is_none_or(|value| *value == taint.value))
}

impl Node {
    pub(super) fn held_now(&self) -> Held<'_> {
        Held { taken: &self.taken, promised: &self.promised, reserved: &self.reserved }
    }

    /// Whether a job may have ranks here at all, or why not.
    pub(super) fn admits(&self, id: &NodeId, need: &Need) -> Result<(), Refused<'_>> {
        if !need.excluded.is_empty() && need.excluded.contains(id) {
            return Err(Refused::Excluded);
        }
        if !need.selector.is_empty()
            && let Some((key, value)) = need.selector.iter().find(|(key, value)| self.labels.get(*key) != Some(*value))
        {
            return Err(Refused::Label(key.clone(), value.clone(), self.labels.get(key)));
        }
        match self.taints.iter().find(|taint| !is_tolerated(taint, &need.tolerations)) {
            Some(taint) => Err(Refused::Taint(taint)),
            None => Ok(()),
        }
    }

    /// GPUs of it that a rank could compute on.
    fn is_large_enough(gpu: &GpuInfo, need: &Need) -> bool {
        let least = if need.shares_gpus() { 0 } else { need.estimate.device.max(need.gpu_memory) };
        gpu.memory == 0 || gpu.memory >= least
    }

    /// Ranks of a gang that fit beside what is held, up to all of them; `spares` of its own, which take no GPU, beside them.
    pub(super) fn room(&self, need: &Need, held: &Held<'_>, on_gpu: bool, spares: u32) -> u32 {
        let sum = |of: fn(&Taken) -> u64| held.each().iter().fold(0u64, |sum, held| sum.saturating_add(of(held)));
        let fit = |has: u64, taken: u64, each: u64| has.saturating_sub(taken).checked_div(each).unwrap_or(u64::MAX);
        let beside = |room: u64| room.saturating_sub(u64::from(spares));
        let slots = fit(self.capacity.slots.into(), sum(|held| held.ranks.into()), 1);
        let cpus = fit((self.capacity.cpus * 1_000.0) as u64, sum(|held| held.cpu_milli), need.cpu_milli);
        let memory = fit(self.capacity.memory, sum(|held| held.memory), need.memory);
        let Estimate { device, snapshots } = need.estimate;
        let each = if on_gpu { snapshots } else { device.saturating_add(snapshots) };
        let machine = fit(self.capacity.memory, 0, each);
        let room = beside(slots.min(cpus).min(memory).min(machine));
        let gpus = if on_gpu { self.gpu_room(need, held) } else { u64::MAX };
        room.min(gpus).min(need.ranks.into()) as u32
    }

    /// The same of a gang that has ranks elsewhere, too: then it has no spares.
    pub(super) fn part(&self, need: &Need, held: &Held<'_>, on_gpu: bool) -> u32 {
        self.room(need, held, on_gpu, 0).min(need.ranks.saturating_sub(1))
    }

    fn gpu_room(&self, need: &Need, held: &Held<'_>) -> u64 {
        let gpus = self.capacity.gpus.iter();
        if need.shares_gpus() {
            return gpus.filter_map(|gpu| held.left_of(gpu)).map(|left| left / need.gpu_memory).sum();
        }
        let whole = if need.estimate.device.max(need.gpu_memory) == 0 && held.promised.gpus.is_empty() && held.reserved.gpus.is_empty() {
            // Asked for every node and every gang that waits.
            gpus.len().saturating_sub(held.taken.gpus.len())
        } else {
            gpus.filter(|gpu| Self::is_large_enough(gpu, need) && held.is_untouched(gpu)).count()
        };
        whole as u64 / u64::from(need.gpus.max(1))
    }

    /// The GPUs of so many ranks, for which there is room: suspected ones last, and parts of those that have the least left.
    pub(super) fn grant(&self, need: &Need, count: u32, held: &Held<'_>) -> Vec<u32> {
        let avoided = self.avoided_gpus();
        if need.shares_gpus() {
            let parts = self.capacity.gpus.iter().filter_map(|gpu| Some((avoided.contains(&gpu.index), held.left_of(gpu)?, gpu.index)));
            let mut parts: Vec<_> = parts.collect();
            parts.sort_unstable();
            let ranks = parts.into_iter().flat_map(|(_, left, gpu)| (0..left / need.gpu_memory).map(move |_| gpu));
            let mut granted: Vec<u32> = ranks.take(count as usize).collect();
            granted.sort_unstable();
            return granted;
        }
        let usable = self.capacity.gpus.iter().filter(|gpu| Self::is_large_enough(gpu, need) && held.is_untouched(gpu));
        let (bad, good): (Vec<u32>, Vec<u32>) = usable.map(|gpu| gpu.index).partition(|gpu| avoided.contains(gpu));
        let wanted = need.gpus as usize * count as usize;
        let mut granted: Vec<u32> = good.into_iter().chain(bad).take(wanted).collect();
        granted.sort_unstable();
        granted
    }

    /// The GPUs that it would grant to the whole gang, or why it can not hold it. `empty`: as if nothing else ran there.
    pub(super) fn fit(&self, need: &Need, empty: bool) -> Result<Vec<u32>, String> {
        if empty { self.fit_beside(need, &Held::NONE, "has") } else { self.fit_beside(need, &self.held_now(), "has free") }
    }

    fn fit_beside(&self, need: &Need, held: &Held<'_>, adverb: &str) -> Result<Vec<u32>, String> {
        for on_gpu in need.modes() {
            if self.room(need, held, *on_gpu, need.spares) >= need.ranks {
                return Ok(if *on_gpu { self.grant(need, need.ranks, held) } else { Vec::new() });
            }
        }
        Err(self.why_not(need, held, adverb))
    }

    fn why_not(&self, need: &Need, held: &Held<'_>, adverb: &str) -> String {
        let sum = |of: fn(&Taken) -> u64| held.each().iter().fold(0u64, |sum, held| sum.saturating_add(of(held)));
        let asked = need.taken(need.ranks, &[]);
        let slots = u64::from(self.capacity.slots).saturating_sub(sum(|held| held.ranks.into()));
        if u64::from(asked.ranks) > slots {
            return format!("needs {} ranks, {adverb} places for {slots}", asked.ranks);
        }
        let free = ((self.capacity.cpus * 1_000.0) as u64).saturating_sub(sum(|held| held.cpu_milli));
        if asked.cpu_milli > free {
            return format!("needs {} CPUs, {adverb} {}", milli(asked.cpu_milli), milli(free));
        }
        let free = self.capacity.memory.saturating_sub(sum(|held| held.memory));
        if asked.memory > free {
            return format!("needs {} of memory, {adverb} {}", gib(asked.memory), gib(free));
        }
        self.why_no_gpus(need, held, adverb).unwrap_or_else(|| self.why_too_small(need))
    }

    fn why_no_gpus(&self, need: &Need, held: &Held<'_>, adverb: &str) -> Option<String> {
        let ranks = need.ranks;
        if need.shares_gpus() {
            let room = self.gpu_room(need, held);
            let told = || format!("needs {} of GPU memory for each of {ranks} ranks, {adverb} that for {room}", gib(need.gpu_memory));
            return (room < u64::from(ranks)).then(told);
        }
        let wanted = u64::from(need.gpus) * u64::from(ranks);
        let untouched = self.capacity.gpus.iter().filter(|gpu| held.is_untouched(gpu));
        let free = untouched.clone().count() as u64;
        if free < wanted {
            return (!need.gpus_optional).then(|| format!("needs {wanted} GPUs, {adverb} {free}"));
        }
        let small = untouched.filter(|gpu| !Self::is_large_enough(gpu, need)).min_by_key(|gpu| gpu.memory)?;
        let (asked, hint) = if need.estimate.device > need.gpu_memory {
            (need.estimate.device, " (estimated from the model; resources.memory says otherwise)")
        } else {
            (need.gpu_memory, "")
        };
        Some(format!("needs {} of GPU memory for each rank{hint}, GPU {} has {}", gib(asked), small.index, gib(small.memory)))
    }

    fn why_too_small(&self, need: &Need) -> String {
        let Estimate { device, snapshots } = need.estimate;
        let each = if need.modes().contains(&false) { device.saturating_add(snapshots) } else { snapshots };
        let hint = "estimated from the model; resources.memory says otherwise";
        format!("needs {} for each of {} ranks ({hint}), has {} of memory", gib(each), need.ranks, gib(self.capacity.memory))
    }

    /// As many ranks as it can hold now, if those are enough to begin with.
    pub(super) fn most(&self, need: &Need) -> Option<(u32, Vec<u32>)> {
        let held = self.held_now();
        let rooms = need.modes().iter().map(|on_gpu| (self.room(need, &held, *on_gpu, need.spares), *on_gpu));
        let (room, on_gpu) = rooms.max_by_key(|(room, on_gpu)| (*room, *on_gpu)).filter(|(room, _)| *room >= need.least && *room > 0)?;
        Some((room, if on_gpu { self.grant(need, room, &held) } else { Vec::new() }))
    }

    /// So many ranks more of a gang that has some here, on no GPU.
    pub(super) fn has_room_beside(&self, held: u32, more: u32, need: &Need) -> bool {
        let on_cpu = Need { gpus: 0, gpus_optional: false, gpu_memory: 0, ..need.clone() };
        let (now, spares) = (self.held_now(), need.spares);
        let fits = self.room(&Need { ranks: more, ..on_cpu.clone() }, &now, false, 0) >= more;
        fits && self.room(&Need { ranks: held + more, cpu_milli: 0, memory: 0, ..on_cpu }, &Held::NONE, false, spares) >= held + more
    }

    /// A sentence on why this gang is not here. `several`: a gang may have ranks on other nodes, too. `own`: what is reserved is for it.
    pub(super) fn explain(&self, id: &NodeId, need: &Need, several: bool, own: bool) -> String {
        if let Err(refused) = self.admits(id, need) {
            return refused.to_string();
        }
        let on_gpu = need.modes() == [true];
        let taken = Held { taken: &self.taken, ..Held::NONE };
        let held = if own { taken } else { self.held_now() };
        let (part_ever, part_now) = (self.part(need, &Held::NONE, on_gpu), self.part(need, &held, on_gpu));
        let in_parts = several && need.ranks > 1 && part_ever > 0;
        let ranks = need.ranks;
        let share = match (self.fit(need, true), self.fit_beside(need, &held, "has free")) {
            (Err(why), _) if !in_parts => return format!("can never hold it: {why}"),
            (Err(why), _) if self.address.is_none() => {
                return format!("can never hold it: {why}; and it has no address at which other nodes could reach a part of it");
            }
            (Err(_), _) => Err(format!("has room for {part_now} of its {ranks} ranks, of which it could hold {part_ever}")),
            (Ok(_), fit) => fit,
        };
        match share {
            _ if self.lost || !self.linked => "its agent is not connected".into(),
            _ if self.draining => "is draining".into(),
            _ if self.cordoned => "is cordoned".into(),
            Err(later) if !own && self.has_room(need, &taken) => format!("keeps room for jobs before it ({later})"),
            Err(later) => later,
            Ok(_) if self.avoided() > 0 => {
                let hours = BLAME_MS / 3_600_000;
                format!("has room, and is avoided: {} failures in {hours} h that may be the machine's", self.avoided())
            }
            Ok(gpus) if self.avoided_among(&gpus) > 0 => {
                format!("has room, and {} of the GPUs are avoided: they had hardware errors", self.avoided_among(&gpus))
            }
            Ok(_) => "has room".into(),
        }
    }

    /// The whole gang fits beside what is held.
    pub(super) fn has_room(&self, need: &Need, held: &Held<'_>) -> bool {
        need.modes().iter().any(|on_gpu| self.room(need, held, *on_gpu, need.spares) >= need.ranks)
    }
}

/// Why a job may have no ranks on a node, whatever is free there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refused<'a> {
    /// By its `log_policies`.
    Excluded,
    /// The label that it asks for, and what the node has.
    Label(String, String, Option<&'a String>),
    /// The first that it does not tolerate.
    Taint(&'a Taint),
}

impl std::fmt::Display for Refused<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Excluded => write!(f, "is excluded for this job by its log_policies, until a user restarts it"),
            Self::Label(key, value, None) => write!(f, "has no label {key}={value} (node_selector)"),
            Self::Label(key, value, Some(own)) => write!(f, "has the label {key}={own}, not {key}={value} (node_selector)"),
            Self::Taint(Taint { key, value }) if value.is_empty() => write!(f, "has the taint {key}, which the job does not tolerate"),
            Self::Taint(Taint { key, value }) => write!(f, "has the taint {key}={value}, which the job does not tolerate"),
        }
    }
}

fn milli(value: u64) -> String {
    format!("{}", value as f64 / 1_000.0)
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}
