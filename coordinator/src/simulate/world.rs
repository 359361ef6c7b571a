//! One run in virtual time: a gang of machines that makes steps, saves, breaks, waits and comes back, from one happening to the next.
//!
//! The gang is one thing here, as it is for the engine: it runs whole or not at all. Between two happenings nothing is computed step by step,
//! so 54 days cost as much as what happens in them. The trap: whatever ends a run of steps must raise `life`, or a happening of the old run
//! (a save, a commit) is taken for one of the new.

use std::collections::BTreeMap;

use super::account::Account;
use super::driven::{Driven, Order, Wait};
use super::faults::{Fault, draw};
use super::kinds::Kind;
use super::ladder::Facts;
use super::outcome::{Counts, GaveUp, Outcome};
use super::scenario::{Recovery, Scenario};
use crate::engine::ledger::Activity;
use crate::engine::restart::mean_time_between_failures;

mod breaks;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    Backoff,
    Starting,
    Running,
    Copying,
    Broken,
    InPlace,
    Stopping,
    Over,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Happening {
    Fault(usize),
    NodeBack,
    Wake,
    Seen,
    Stopped,
    Grouped,
    Loaded,
    Step,
    SaveDue,
    SaveCopied,
    Committed(u64),
    InPlaceDone,
}

#[derive(Debug, Clone, Copy)]
struct Break {
    fault: usize,
    facts: Facts,
    at: u64,
}

/// A run.
#[derive(Debug)]
pub(super) struct World<'a> {
    scenario: &'a Scenario,
    faults: Vec<Fault>,
    driven: Driven,
    ranks: u32,
    /// Every step is told to the engine, for tests of its book.
    tell_all: bool,
    now: u64,
    queue: BTreeMap<(u64, u64), (u64, Happening)>,
    order: u64,
    life: u64,
    wake: Option<u64>,
    phase: Phase,
    since: u64,
    attempt: u32,
    /// Steps done at `since`.
    base: u64,
    /// Highest step ever done.
    floor: u64,
    checkpoint: Option<u64>,
    snapshot: Option<u64>,
    /// What the attempt that starts begins from.
    from: (Option<u64>, bool),
    saved_at: u64,
    /// What the writer persists now and when it is done, and what waits for it.
    writing: Option<(u64, u64)>,
    waiting: Option<u64>,
    broken: Option<Break>,
    /// A planned stop is under way; whether its save fits into the grace.
    planned: Option<bool>,
    last_failure: Option<u64>,
    spares: u32,
    missing: u32,
    swapped: bool,
    stop_order_ms: u64,
    start_order_ms: u64,
    seen_later_ms: u64,
    account: Account,
    counts: Counts,
    gave_up: Option<GaveUp>,
}

/// Runs a scenario with one seed. The engine sees `ranks` ranks, which stand for all workers.
pub fn run(scenario: &Scenario, seed: u64, ranks: u32) -> Outcome {
    World::new(scenario, seed, ranks, false).run()
}

impl<'a> World<'a> {
    pub(super) fn new(scenario: &'a Scenario, seed: u64, ranks: u32, tell_all: bool) -> Self {
        let faults = draw(&scenario.kinds, scenario.nodes, scenario.duration_ms, seed);
        let (driven, orders) = Driven::new(&scenario.policy, ranks, seed);
        let load = scenario.control.load(scenario.nodes, scenario.workers);
        let mut own = Self {
            scenario,
            driven,
            ranks,
            tell_all,
            now: 0,
            queue: BTreeMap::new(),
            order: 0,
            life: 0,
            wake: None,
            phase: Phase::Waiting,
            since: 0,
            attempt: 0,
            base: 0,
            floor: 0,
            checkpoint: None,
            snapshot: None,
            from: (None, false),
            saved_at: 0,
            writing: None,
            waiting: None,
            broken: None,
            planned: None,
            last_failure: None,
            spares: scenario.policy.spares,
            missing: 0,
            swapped: false,
            stop_order_ms: load.stop_ms.round() as u64,
            start_order_ms: load.start_ms.round() as u64,
            seen_later_ms: load.seen_later_ms.round() as u64,
            account: Account::default(),
            counts: Counts::default(),
            gave_up: None,
            faults,
        };
        for index in 0..own.faults.len() {
            own.at(own.faults[index].at, Happening::Fault(index));
        }
        own.obey(orders);
        own
    }

    /// To the end of the scenario.
    pub(super) fn run(mut self) -> Outcome {
        while let Some(((at, _), (life, happening))) = self.queue.pop_first() {
            if at >= self.scenario.duration_ms {
                break;
            }
            self.now = at;
            self.driven.set_now(at);
            let lasting = matches!(happening, Happening::Fault(_) | Happening::NodeBack | Happening::Wake | Happening::Committed(_));
            if lasting || life == self.life {
                self.take(happening);
            }
        }
        self.now = self.scenario.duration_ms;
        self.driven.set_now(self.now);
        self.turn(self.phase);
        Outcome {
            ledger_ms: self.account,
            steps: self.base,
            counts: self.counts,
            gave_up: self.gave_up,
            engine_events: self.driven.events,
            engine_ledger: if self.tell_all { self.driven.ledger() } else { None },
        }
    }

    fn take(&mut self, happening: Happening) {
        match happening {
            Happening::Fault(index) => self.on_fault(index),
            Happening::NodeBack => self.on_node_back(),
            Happening::Wake => self.on_wake(),
            Happening::Seen => self.on_seen(),
            Happening::Stopped => self.on_stopped(),
            Happening::Grouped => self.on_grouped(),
            Happening::Loaded => self.on_loaded(),
            Happening::Step => self.on_step(),
            Happening::SaveDue => self.on_save_due(),
            Happening::SaveCopied => self.on_save_copied(),
            Happening::Committed(step) => self.on_committed(step),
            Happening::InPlaceDone => self.on_in_place_done(),
        }
    }

    fn at(&mut self, at: u64, happening: Happening) {
        self.order += 1;
        self.queue.insert((at, self.order), (self.life, happening));
    }

    fn kind(&self, fault: usize) -> &'a Kind {
        &self.scenario.kinds[self.faults[fault].kind]
    }

    /// Books the time of the phase that ends, and begins the next.
    fn turn(&mut self, next: Phase) {
        let span = self.now - self.since;
        match self.phase {
            Phase::Running => self.book_steps(span, next),
            Phase::Copying => self.account.spend(Activity::Checkpointing, span),
            Phase::Broken => self.account.spend(Activity::Undetected, span),
            Phase::Starting if self.attempt == 1 => self.account.spend(Activity::Starting, span),
            Phase::Starting | Phase::InPlace | Phase::Stopping => self.account.spend(Activity::Restoring, span),
            Phase::Backoff => self.account.spend(Activity::Backoff, span),
            Phase::Waiting => self.account.spend(Activity::Queued, span),
            Phase::Over => self.account.given_up += span,
        }
        self.counts.waits += u64::from(next == Phase::Waiting && self.phase != Phase::Waiting && self.now > 0);
        self.phase = next;
        self.since = self.now;
    }

    /// Whole steps are training, or repeated up to what was reached before; the step in flight belongs to what broke it.
    fn book_steps(&mut self, span: u64, next: Phase) {
        let step_ms = self.scenario.costs.step_ms;
        let (done, rest) = (span / step_ms, span % step_ms);
        let again = self.floor.saturating_sub(self.base).min(done);
        self.account.spend(Activity::Repeated, again * step_ms);
        self.account.spend(Activity::Training, (done - again) * step_ms);
        let of_rest = match next {
            Phase::Broken => Activity::Undetected,
            Phase::Stopping => Activity::Restoring,
            _ => Activity::Training,
        };
        self.account.spend(of_rest, rest);
        self.base += done;
        self.floor = self.floor.max(self.base);
    }

    fn obey(&mut self, orders: Vec<Order>) {
        for order in orders {
            match order {
                Order::Start(attempt) => self.on_start(attempt),
                Order::Stop { kill } => self.on_stop(kill),
                Order::GivenUp(reason) => {
                    self.turn(Phase::Over);
                    self.life += 1;
                    self.gave_up = Some(GaveUp { at_ms: self.now, reason });
                }
            }
        }
        let waits = match self.driven.waits_for() {
            Wait::None => None,
            Wait::Backoff => Some(Phase::Backoff),
            Wait::Place => Some(Phase::Waiting),
            Wait::Over => Some(Phase::Over),
        };
        if let Some(phase) = waits.filter(|phase| *phase != self.phase) {
            self.turn(phase);
        }
        let wakes_at = self.driven.wakes_at().filter(|at| self.wake.is_none_or(|set| *at < set || set <= self.now));
        if let Some(at) = wakes_at {
            self.wake = Some(at);
            self.at(at.max(self.now), Happening::Wake);
        }
    }

    fn on_wake(&mut self) {
        if self.wake.is_some_and(|at| at <= self.now) {
            self.wake = None;
        }
        let orders = self.driven.wake();
        self.obey(orders);
    }

    fn on_start(&mut self, attempt: u32) {
        self.turn(Phase::Starting);
        self.life += 1;
        self.attempt = attempt;
        let costs = &self.scenario.costs;
        let snapshot = self.snapshot.filter(|step| self.scenario.policy.recovery >= Recovery::Snapshot && Some(*step) > self.checkpoint);
        self.from = if snapshot.is_some() { (snapshot, true) } else { (self.checkpoint, false) };
        let spare_ms = if std::mem::take(&mut self.swapped) { costs.spare_ms } else { 0 };
        let planned_ms = if self.planned.take().is_some() { costs.planned_ms } else { 0 };
        self.at(self.now + self.start_order_ms + spare_ms + planned_ms + costs.start_ms, Happening::Grouped);
    }

    fn on_grouped(&mut self) {
        let (step, from_memory) = self.from;
        let orders = self.driven.group(step, from_memory);
        self.obey(orders);
        let costs = &self.scenario.costs;
        let load_ms = match self.from {
            (Some(_), true) => costs.load_snapshot_ms,
            (Some(_), false) => costs.load_ms,
            (None, _) => 0,
        };
        self.at(self.now + load_ms, Happening::Loaded);
    }

    fn on_loaded(&mut self) {
        if self.attempt > 1 {
            match self.from {
                (Some(_), true) => self.counts.from_snapshot += 1,
                (Some(_), false) => self.counts.from_checkpoint += 1,
                (None, _) => self.counts.from_nothing += 1,
            }
        }
        self.base = self.from.0.unwrap_or(0);
        self.saved_at = self.now;
        self.go_on();
    }

    /// Steps are made from now on.
    fn go_on(&mut self) {
        self.turn(Phase::Running);
        let scenario = self.scenario;
        let restarts = self.attempt.saturating_sub(1) + u32::try_from(self.counts.in_place).unwrap_or(u32::MAX);
        let mean = mean_time_between_failures(self.account.running_ms(), restarts).0 as f64;
        let every = scenario.policy.every.ms(scenario.costs.save_stall_ms, mean);
        let due = (self.saved_at + every).saturating_sub(self.now);
        let steps = due.div_ceil(scenario.costs.step_ms).max(1);
        self.at(self.now + steps * scenario.costs.step_ms, Happening::SaveDue);
        if self.tell_all {
            self.at(self.now + scenario.costs.step_ms, Happening::Step);
        }
    }

    fn on_step(&mut self) {
        if self.phase == Phase::Running {
            let step = self.base + (self.now - self.since) / self.scenario.costs.step_ms;
            let orders = self.driven.steps(step);
            self.obey(orders);
            self.at(self.now + self.scenario.costs.step_ms, Happening::Step);
        }
    }

    fn on_save_due(&mut self) {
        self.life += 1;
        self.saved_at = self.now;
        if self.waiting.is_some() {
            // Both buffers are taken: the disk is slower than this, and the copy is skipped.
            return self.go_on();
        }
        self.turn(Phase::Copying);
        if self.tell_all {
            let mut orders = self.driven.steps(self.base);
            orders.extend(self.driven.saving(true, self.base));
            self.obey(orders);
        }
        self.at(self.now + self.scenario.costs.save_stall_ms, Happening::SaveCopied);
    }

    fn on_save_copied(&mut self) {
        self.snapshot = Some(self.base);
        if self.writing.is_some() {
            self.waiting = Some(self.base);
        } else {
            self.write(self.base);
        }
        if self.tell_all {
            let orders = self.driven.saving(false, self.base);
            self.obey(orders);
        }
        self.go_on();
    }

    /// The writer works behind the steps.
    fn write(&mut self, step: u64) {
        let done_at = self.now + self.scenario.costs.save_ms;
        self.writing = Some((step, done_at));
        self.at(done_at, Happening::Committed(step));
    }

    fn on_committed(&mut self, step: u64) {
        // A writer that died with its ranks commits nothing.
        if self.writing != Some((step, self.now)) {
            return;
        }
        self.writing = None;
        if let Some(next) = self.waiting.take() {
            self.write(next);
        }
        self.checkpoint = self.checkpoint.max(Some(step));
        self.counts.checkpoints += 1;
        let heals = self.last_failure.is_some_and(|at| self.now >= at + self.scenario.policy.restart.heal_after.0);
        if heals || self.tell_all {
            self.last_failure = self.last_failure.filter(|_| !heals);
            let orders = self.driven.committed(step);
            self.obey(orders);
        }
    }
}
