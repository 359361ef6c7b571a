//! What breaks a run, and what brings it back: faults, machines that go and return, stops, recovery in place.
//!
//! A fault is one moment, its being seen another; in between the gang burns time. What the engine has a rung for is told to it and decided
//! there; only recovery in place is decided beside it (`ladder`).

use super::super::driven::Failure;
use super::super::kinds::{Kind, Seen};
use super::super::ladder::{Facts, Rung, plan_recovery};
use super::{Break, Happening, Phase, World};

/// A planned stop that comes while the gang does not run is tried again after this.
const POSTPONE_MS: u64 = 10 * 60_000;
/// Ranks that are killed at once are gone after this, at most.
const KILL_MS: u64 = 1_000;

impl World<'_> {
    pub(super) fn on_fault(&mut self, index: usize) {
        let kind = self.kind(index);
        if kind.seen == Seen::Announced {
            return self.on_planned(index);
        }
        self.counts.failures += 1;
        match self.phase {
            Phase::Running | Phase::Copying | Phase::Starting | Phase::InPlace => self.break_gang(index, kind),
            Phase::Broken => self.break_again(index, kind),
            Phase::Stopping | Phase::Backoff | Phase::Waiting if kind.takes.needs_a_node() => self.lose_node(index),
            Phase::Stopping | Phase::Backoff | Phase::Waiting | Phase::Over => self.counts.hit_nothing += 1,
        }
    }

    fn break_gang(&mut self, index: usize, kind: &Kind) {
        let again = self.phase == Phase::InPlace;
        let was_running = self.phase != Phase::Starting;
        self.turn(Phase::Broken);
        self.end_run();
        if kind.takes.needs_a_node() || kind.seen == Seen::Corruption {
            self.snapshot = None;
        }
        if was_running && self.base > self.from.0.unwrap_or(0) {
            let orders = self.driven.steps(self.base);
            self.obey(orders);
        }
        self.broken = Some(Break { fault: index, facts: Facts { was_running, again, spares: 0 }, at: self.now });
        let costs = &self.scenario.costs;
        let seen_ms = match kind.seen {
            Seen::Hang => costs.seen_hang_ms + self.seen_later_ms,
            Seen::Corruption => costs.seen_corruption_ms,
            Seen::Exit | Seen::Announced => costs.seen_exit_ms,
        };
        self.at(self.now + seen_ms, Happening::Seen);
    }

    /// Steps, and what is written behind them, end.
    fn end_run(&mut self) {
        self.life += 1;
        (self.writing, self.waiting) = (None, None);
    }

    /// A second fault before the first was seen.
    fn break_again(&mut self, index: usize, kind: &Kind) {
        if let Some(broken) = &mut self.broken {
            broken.facts.again = true;
        }
        if kind.takes.needs_a_node() {
            self.lose_node(index);
        }
    }

    /// A machine goes to repair with all that it held; a spare takes its place, or the gang will have to wait.
    fn lose_node(&mut self, index: usize) {
        self.snapshot = None;
        let back_ms = (self.faults[index].repair * self.scenario.costs.repair_ms as f64).round() as u64;
        self.at(self.now + back_ms, Happening::NodeBack);
        if self.spares > 0 {
            self.spares -= 1;
            self.swapped = true;
        } else {
            self.missing += 1;
            if self.missing == 1 {
                let orders = self.driven.missing(true);
                self.obey(orders);
            }
        }
    }

    pub(super) fn on_node_back(&mut self) {
        if self.missing == 0 {
            self.spares += 1;
            return;
        }
        self.missing -= 1;
        self.swapped = true;
        if self.missing == 0 {
            let orders = self.driven.missing(false);
            self.obey(orders);
        }
    }

    pub(super) fn on_seen(&mut self) {
        let Some(mut broken) = self.broken.take() else { return };
        let kind = self.kind(broken.fault);
        broken.facts.spares = self.spares;
        let (rung, _reason) = plan_recovery(&self.scenario.policy, kind, broken.facts);
        if kind.takes.needs_a_node() {
            self.lose_node(broken.fault);
        }
        match rung {
            Rung::Gang => self.fail(broken),
            Rung::InPlace => {
                // The spare joins while the survivors regroup.
                self.swapped = false;
                self.turn(Phase::InPlace);
                self.life += 1;
                self.broken = Some(broken);
                self.at(self.now + self.stop_order_ms + self.scenario.costs.in_place_ms, Happening::InPlaceDone);
            }
        }
    }

    pub(super) fn on_in_place_done(&mut self) {
        let Some(broken) = self.broken.take() else { return };
        if self.faults[broken.fault].luck < self.scenario.costs.in_place_success {
            self.counts.in_place += 1;
            self.go_on();
        } else {
            self.counts.in_place_failed += 1;
            self.swapped = self.kind(broken.fault).takes.needs_a_node();
            self.fail(broken);
        }
    }

    /// The engine is told and decides.
    fn fail(&mut self, broken: Break) {
        let kind = self.kind(broken.fault);
        self.last_failure = Some(self.now);
        let place = u64::from(self.faults[broken.fault].node) * u64::from(self.ranks) / u64::from(self.scenario.nodes);
        let failure = Failure { rank: place as u32, takes: kind.takes, seen: kind.seen, at: broken.at };
        let orders = self.driven.fail(failure);
        self.obey(orders);
    }

    fn on_planned(&mut self, index: usize) {
        match self.phase {
            Phase::Running => {
                self.counts.planned += 1;
                let costs = &self.scenario.costs;
                self.planned = Some(costs.save_stall_ms + costs.save_ms <= self.scenario.policy.stop_grace.0);
                let orders = self.driven.restart();
                self.obey(orders);
            }
            Phase::Over => {}
            _ => self.at(self.now + POSTPONE_MS, Happening::Fault(index)),
        }
    }

    /// A save that does not fit into the grace is cut off by it.
    pub(super) fn on_stop(&mut self, kill: bool) {
        self.turn(Phase::Stopping);
        self.end_run();
        let costs = &self.scenario.costs;
        let stop_ms = match self.planned {
            Some(true) => costs.save_stall_ms + costs.save_ms + costs.stop_ms,
            Some(false) => self.scenario.policy.stop_grace.0.max(costs.stop_ms),
            None if kill => costs.stop_ms.min(KILL_MS),
            None => costs.stop_ms,
        };
        self.at(self.now + self.stop_order_ms + stop_ms, Happening::Stopped);
    }

    pub(super) fn on_stopped(&mut self) {
        if self.planned == Some(true) {
            self.snapshot = self.snapshot.max(Some(self.base));
            self.checkpoint = self.checkpoint.max(Some(self.base));
            self.counts.checkpoints += 1;
        }
        let orders = self.driven.ended();
        self.obey(orders);
    }
}
