//! Recovery in place across nodes, which the engine decides only within one: a small policy of its own. When gangs span nodes, this file goes.
//!
//! The trap: a failure that is mended here is never told to the engine, so it costs no budget and no backoff, and the engine's own count of
//! restarts leaves it out.

use super::kinds::{Kind, Seen};
use super::scenario::{Policy, Recovery};

/// What is done about a fault that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rung {
    /// Survivors stay; the lost rank is replaced.
    InPlace,
    /// The engine decides: budget, backoff, a new attempt of the gang.
    Gang,
}

/// What is known when it must be decided.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    /// Every rank had done a step.
    pub was_running: bool,
    /// A second fault came before this one was mended.
    pub again: bool,
    /// Spare nodes that wait.
    pub spares: u32,
}

/// Which rung, and why.
pub(super) fn plan_recovery(policy: &Policy, kind: &Kind, facts: Facts) -> (Rung, &'static str) {
    if policy.recovery != Recovery::InPlace {
        (Rung::Gang, "recovery in place is off")
    } else if !facts.was_running {
        (Rung::Gang, "the gang was not running yet")
    } else if facts.again {
        (Rung::Gang, "a second failure came before the first was mended")
    } else if kind.seen == Seen::Corruption {
        (Rung::Gang, "the survivors' state is not trusted")
    } else if kind.takes.needs_a_node() && facts.spares == 0 {
        (Rung::Gang, "no spare node waits")
    } else {
        (Rung::InPlace, "survivors have the state")
    }
}

#[cfg(test)]
mod tests {
    use super::super::kinds::llama3;
    use super::super::tests::scenario;
    use super::*;

    #[test]
    fn in_place_needs_survivors_that_are_sound_and_a_place() {
        let mut policy = scenario().policy;
        policy.recovery = Recovery::InPlace;
        let kinds = llama3();
        let kind = |name: &str| kinds.iter().find(|kind| kind.name == name).expect("in the preset");
        let facts = Facts { was_running: true, again: false, spares: 0 };
        let rung = |name: &str, facts: Facts| plan_recovery(&policy, kind(name), facts).0;
        assert_eq!(rung("software_bug", facts), Rung::InPlace);
        assert_eq!(rung("faulty_gpu", facts), Rung::Gang);
        assert_eq!(rung("faulty_gpu", Facts { spares: 1, ..facts }), Rung::InPlace);
        assert_eq!(rung("silent_data_corruption", Facts { spares: 1, ..facts }), Rung::Gang);
        assert_eq!(rung("software_bug", Facts { again: true, ..facts }), Rung::Gang);
        assert_eq!(rung("software_bug", Facts { was_running: false, ..facts }), Rung::Gang);
        policy.recovery = Recovery::Snapshot;
        assert_eq!(plan_recovery(&policy, kind("software_bug"), facts).0, Rung::Gang);
    }
}
