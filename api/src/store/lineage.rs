//! Which attempts of a job wrote checkpoints that count.
//!
//! Attempt 3 that went on from step 120 has left behind whatever attempts 1 and 2 did beyond step 120. That is told to the store before
//! anything of attempt 3 is kept there, so what an older attempt still puts there counts for nobody, however late it comes.

use serde::{Deserialize, Serialize};

/// Entries of a lineage; the oldest are merged.
const LINEAGE_MAX: usize = 256;

/// From which step on each attempt is its own; attempts and steps both rise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lineage(Vec<(u32, u64)>);

impl Lineage {
    /// Attempt `attempt` goes on from `step` (0: from nothing).
    pub fn begin(&mut self, attempt: u32, step: u64) {
        if self.newest().is_some_and(|newest| newest >= attempt) {
            return;
        }
        // What later ones than these left behind is more.
        self.0.retain(|(_, from)| *from < step);
        self.0.push((attempt, step));
        if self.0.len() > LINEAGE_MAX {
            self.0.remove(0);
        }
    }

    /// The newest attempt that it knows.
    pub fn newest(&self) -> Option<u32> {
        self.0.last().map(|(attempt, _)| *attempt)
    }

    /// Whether a checkpoint of `attempt` at `step` counts.
    pub fn counts(&self, attempt: u32, step: u64) -> bool {
        // The first later attempt left the most behind.
        self.0.iter().find(|(later, _)| *later > attempt).is_none_or(|(_, from)| step <= *from)
    }

    /// Whether it can be one: attempts and steps rise.
    pub fn is_sound(&self) -> bool {
        self.0.len() <= LINEAGE_MAX && self.0.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 < pair[1].1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_an_older_attempt_did_beyond_the_next_one_s_start_does_not_count() {
        let mut lineage = Lineage::default();
        assert!(lineage.counts(1, 500));
        lineage.begin(1, 0);
        assert!(lineage.counts(1, 500));
        lineage.begin(3, 120);
        assert!(lineage.counts(1, 120) && !lineage.counts(1, 121) && !lineage.counts(2, 150));
        assert!(lineage.counts(3, 150));
        lineage.begin(4, 140);
        assert!(!lineage.counts(1, 130) && lineage.counts(3, 140) && !lineage.counts(3, 150));
        lineage.begin(5, 100);
        assert!(lineage.counts(1, 100) && !lineage.counts(3, 110) && lineage.counts(5, 110));
        assert_eq!(lineage.newest(), Some(5));
        lineage.begin(5, 7);
        assert!(lineage.counts(5, 110), "an attempt begins once");
        lineage.begin(6, 0);
        assert!(!lineage.counts(5, 1) && lineage.counts(6, 1));
    }

    proptest! {
        #[test]
        fn it_says_what_all_beginnings_say(starts in proptest::collection::vec(0_u64..50, 1..40), attempt in 1_u32..45, step in 0_u64..60) {
            let mut lineage = Lineage::default();
            for (index, from) in starts.iter().enumerate() {
                lineage.begin(index as u32 + 1, *from);
                prop_assert!(lineage.is_sound());
            }
            let left_behind = starts.iter().enumerate().any(|(index, from)| index as u32 + 1 > attempt && step > *from);
            prop_assert_eq!(lineage.counts(attempt, step), !left_behind);
        }
    }
}
