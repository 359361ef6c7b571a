//! How long a job's steps and phases take, learned from the job itself, and so how long is too long.
//!
//! Steps of a gang that trains together stop together, so a rank past its deadline says that the gang is stuck, not who is to blame: that
//! is whose heartbeats stopped first, or who is furthest behind ([`Engine::decide_stuck`](super::Engine)). What the built-in program says
//! of itself is exact, so its deadlines are short; a script's silence may be an evaluation that it does not announce. Rejected: a
//! multiple of the mean, which one slow save would trip.

use std::collections::{BTreeMap, VecDeque};

use everlit_api::job::HeartbeatPolicy;
use everlit_api::manifest::Phase;

use crate::agent::limits::{
    PACE_GAPS_MAX, PACE_GAPS_MIN, STUCK_EARLY_FACTOR, STUCK_EARLY_FLOOR_MS, STUCK_FACTOR, STUCK_FIRST_FACTOR, STUCK_FIRST_FLOOR_MS,
    STUCK_FLOOR_MS, STUCK_PHASE_FACTOR, STUCK_PHASE_FLOOR_MS, STUCK_SCRIPT_FACTOR, STUCK_SCRIPT_FLOOR_MS, STUCK_UNKNOWN_MS,
};

/// What is known of a job's pace on this node, over all of its attempts here.
#[derive(Debug, Clone, Default)]
pub(super) struct Pace {
    /// Newest times between two steps of a rank.
    gaps: VecDeque<u64>,
    /// The longest of the first steps of a rank that had just started.
    first: Option<u64>,
    /// The longest that each other phase took, or that passed within it without news.
    longest: BTreeMap<Phase, u64>,
}

impl Pace {
    /// A rank did a step `gap` milliseconds after the one before.
    pub(super) fn note_step(&mut self, gap: u64) {
        if self.gaps.len() == PACE_GAPS_MAX {
            self.gaps.pop_front();
        }
        self.gaps.push_back(gap);
    }

    /// A rank did one of its first steps in so many milliseconds.
    pub(super) fn note_first_step(&mut self, took: u64) {
        self.first = self.first.max(Some(took));
    }

    /// A rank came out of a phase after so many milliseconds.
    pub(super) fn note_phase(&mut self, phase: Phase, took: u64) {
        let longest = self.longest.entry(phase).or_default();
        *longest = took.max(*longest);
    }

    /// Longest time without a new step of the built-in program when one of its ranks gives no sign of life and others do; `None` while the
    /// pace is not known, or given.
    pub(super) fn early_deadline_ms(&self, policy: &HeartbeatPolicy) -> Option<u64> {
        let known = self.gaps.len() >= PACE_GAPS_MIN && policy.progress_timeout.is_none();
        let gap = self.gaps.iter().copied().max().filter(|_| known)?;
        Some(STUCK_EARLY_FLOOR_MS + gap.saturating_mul(STUCK_EARLY_FACTOR))
    }

    /// Longest time without a new step or phase; `settled`: the rank has done steps since it started; `ours`: the built-in program.
    pub(super) fn deadline_ms(&self, policy: &HeartbeatPolicy, phase: Option<Phase>, settled: bool, ours: bool) -> u64 {
        if let Some(given) = policy.progress_timeout {
            return given.0;
        }
        let known = self.gaps.len() >= PACE_GAPS_MIN && settled;
        let gap = self.gaps.iter().copied().max().unwrap_or(0);
        match phase {
            _ if !ours && known => STUCK_SCRIPT_FLOOR_MS.max(gap.saturating_mul(STUCK_SCRIPT_FACTOR)),
            Some(Phase::Train) if known => STUCK_FLOOR_MS + gap.saturating_mul(STUCK_FACTOR),
            Some(Phase::Train) if ours && !settled => {
                self.first.map_or(STUCK_UNKNOWN_MS, |longest| STUCK_FIRST_FLOOR_MS + longest.saturating_mul(STUCK_FIRST_FACTOR))
            }
            Some(other) if ours => {
                let seen = self.longest.get(&other).filter(|_| other != Phase::Train);
                seen.map_or(STUCK_UNKNOWN_MS, |longest| STUCK_PHASE_FLOOR_MS + longest.saturating_mul(STUCK_PHASE_FACTOR))
            }
            _ => STUCK_UNKNOWN_MS,
        }
    }
}

#[cfg(test)]
mod tests {
    use everlit_api::time::Millis;

    use super::*;

    #[test]
    fn deadlines_are_armed_from_the_start_and_shorten_with_what_is_learned() {
        let policy = HeartbeatPolicy::default();
        let mut pace = Pace::default();
        let ours = |pace: &Pace, phase, settled| pace.deadline_ms(&policy, Some(phase), settled, true);
        assert_eq!(ours(&pace, Phase::Train, true), STUCK_UNKNOWN_MS);
        (0..PACE_GAPS_MIN).for_each(|_| pace.note_step(100));
        assert_eq!(ours(&pace, Phase::Train, true), 2_000 + 600);
        assert_eq!(ours(&pace, Phase::Train, false), STUCK_UNKNOWN_MS, "a first step may be slow");
        pace.note_first_step(7_000);
        pace.note_first_step(4_000);
        assert_eq!(ours(&pace, Phase::Train, false), 190_000, "but how slow is learned, too");
        assert_eq!(pace.deadline_ms(&policy, Some(Phase::Train), false, false), STUCK_UNKNOWN_MS, "of the built-in program");
        assert_eq!(pace.deadline_ms(&policy, None, true, false), STUCK_SCRIPT_FLOOR_MS, "a script may evaluate without a word");
        pace.note_step(1_000);
        assert_eq!(ours(&pace, Phase::Train, true), 8_000, "the slowest counts");
        (0..PACE_GAPS_MAX).for_each(|_| pace.note_step(200));
        assert_eq!(ours(&pace, Phase::Train, true), 3_200, "what is long ago does not");
        assert_eq!(ours(&pace, Phase::Checkpoint, true), STUCK_UNKNOWN_MS);
        pace.note_phase(Phase::Checkpoint, 4_000);
        assert_eq!(ours(&pace, Phase::Checkpoint, true), 100_000);
        let given = HeartbeatPolicy { progress_timeout: Some(Millis(7)), ..policy };
        assert_eq!(pace.deadline_ms(&given, Some(Phase::Train), false, false), 7);
    }

    #[test]
    fn a_rank_without_a_sign_of_life_is_doubted_early_only_at_a_known_pace_that_nobody_gave() {
        let policy = HeartbeatPolicy::default();
        let given = HeartbeatPolicy { progress_timeout: Some(Millis(7)), ..policy };
        let mut pace = Pace::default();
        (0..PACE_GAPS_MIN - 1).for_each(|_| pace.note_step(100));
        assert_eq!(pace.early_deadline_ms(&policy), None);
        pace.note_step(50);
        assert_eq!(pace.early_deadline_ms(&policy), Some(STUCK_EARLY_FLOOR_MS + 100 * STUCK_EARLY_FACTOR));
        assert_eq!(pace.early_deadline_ms(&given), None);
    }

    #[test]
    fn phases_of_other_programs_say_nothing() {
        let policy = HeartbeatPolicy::default();
        let mut pace = Pace::default();
        pace.note_phase(Phase::Checkpoint, 1_000);
        assert_eq!(pace.deadline_ms(&policy, Some(Phase::Checkpoint), false, false), STUCK_UNKNOWN_MS);
        assert_ne!(pace.deadline_ms(&policy, Some(Phase::Checkpoint), false, true), STUCK_UNKNOWN_MS);
    }
}
