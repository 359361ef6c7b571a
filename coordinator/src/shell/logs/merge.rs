//! The merge of several sources into one log: which item comes next. It knows no clock, no link and no bytes.
//!
//! Each source's own order is kept. Between sources the oldest head comes first, by the records' time, once every source that is waited for has
//! one; a source that is not waited for (it is live, ended, or silent for too long) takes part with what it has. A wall clock may be set
//! back, so a source's times need not grow: only heads are compared, and nothing is ever reordered within a source.

use std::collections::VecDeque;

/// Items that a source holds here; the rest of what came stays as bytes, which the reader's credit bounds.
pub(super) const HELD_MAX: usize = 128;

#[derive(Debug)]
struct Lane<T> {
    held: VecDeque<(u64, T)>,
    waited_for: bool,
    newest_us: u64,
}

/// Heads of all sources.
#[derive(Debug)]
pub(super) struct Merge<T> {
    lanes: Vec<Lane<T>>,
}

impl<T> Default for Merge<T> {
    fn default() -> Self {
        Self { lanes: Vec::new() }
    }
}

impl<T> Merge<T> {
    /// One more source, with nothing yet.
    pub(super) fn add(&mut self, waited_for: bool) {
        self.lanes.push(Lane { held: VecDeque::new(), waited_for, newest_us: 0 });
    }

    /// Whether the others wait for a source that has nothing.
    pub(super) fn wait_for(&mut self, source: usize, waited_for: bool) {
        self.lanes[source].waited_for = waited_for;
    }

    /// Whether they do so now.
    pub(super) fn misses(&self, source: usize) -> bool {
        self.lanes[source].waited_for && self.lanes[source].held.is_empty()
    }

    /// The next item of a source; without a time it stands beside the one before it.
    pub(super) fn push(&mut self, source: usize, time_us: Option<u64>, item: T) {
        let lane = &mut self.lanes[source];
        lane.newest_us = time_us.unwrap_or(lane.newest_us);
        lane.held.push_back((lane.newest_us, item));
    }

    /// Whether a source has nothing here.
    pub(super) fn is_out_of(&self, source: usize) -> bool {
        self.lanes[source].held.is_empty()
    }

    /// How many more a source may hold.
    pub(super) fn room(&self, source: usize) -> usize {
        HELD_MAX.saturating_sub(self.lanes[source].held.len())
    }

    /// The next item and its source; `None` while there is none, or a source is missed that may have an older one.
    pub(super) fn pop(&mut self) -> Option<(usize, T)> {
        let mut oldest: Option<(u64, usize)> = None;
        for (source, lane) in self.lanes.iter().enumerate() {
            match lane.held.front() {
                // Of two of the same time the first source's: any two readers agree.
                Some((time, _)) if oldest.is_none_or(|(least, _)| *time < least) => oldest = Some((*time, source)),
                None if lane.waited_for => return None,
                _ => {}
            }
        }
        let (_, source) = oldest?;
        self.lanes[source].held.pop_front().map(|(_, item)| (source, item))
    }

    /// Nothing is held, and nobody is waited for.
    pub(super) fn is_level(&self) -> bool {
        self.lanes.iter().all(|lane| lane.held.is_empty() && !lane.waited_for)
    }
}

#[cfg(test)]
mod tests {
    use everlit_api::agent::log::{LogPlace, LogPosition};
    use proptest::prelude::*;

    use super::*;

    fn all(merge: &mut Merge<&'static str>) -> Vec<&'static str> {
        std::iter::from_fn(|| merge.pop()).map(|(_, item)| item).collect()
    }

    #[test]
    fn the_oldest_head_comes_first_and_a_missed_source_holds_the_others_up() {
        let mut merge = Merge::default();
        (0..3).for_each(|_| merge.add(true));
        [(0, 5, "a5"), (0, 7, "a7"), (1, 6, "b6")].into_iter().for_each(|(source, time, item)| merge.push(source, Some(time), item));
        assert_eq!(merge.pop(), None, "the third may have an older one");
        assert!(merge.misses(2) && !merge.misses(0));
        merge.push(2, Some(5), "c5");
        assert_eq!(all(&mut merge), ["a5", "c5"], "then the third is missed again");
        merge.wait_for(2, false);
        assert_eq!(all(&mut merge), ["b6"]);
        merge.wait_for(1, false);
        assert_eq!(all(&mut merge), ["a7"]);
        assert!(!merge.is_level());
        merge.wait_for(0, false);
        assert!(merge.is_level());
    }

    #[test]
    fn a_clock_that_is_set_back_reorders_nothing_within_a_source() {
        let mut merge = Merge::default();
        (0..2).for_each(|_| merge.add(false));
        [(0, Some(9), "a9"), (0, Some(2), "a2"), (0, None, "a-"), (1, Some(3), "b3")].into_iter().for_each(|(s, t, i)| merge.push(s, t, i));
        assert_eq!(all(&mut merge), ["b3", "a9", "a2", "a-"]);
    }

    /// What a reader does with one item after another, in any interleaving: arrivals, silence, a break with a resume by id.
    #[derive(Debug, Clone)]
    enum Happening {
        Arrives(usize),
        Silent(usize),
        Takes,
        Cut,
    }

    fn happening(sources: usize) -> impl Strategy<Value = Happening> {
        prop_oneof![
            4 => (0..sources).prop_map(Happening::Arrives),
            1 => (0..sources).prop_map(Happening::Silent),
            4 => Just(Happening::Takes),
            1 => Just(Happening::Cut),
        ]
    }

    const SOURCES: usize = 3;

    fn fresh() -> Merge<u64> {
        let mut merge = Merge::default();
        (0..SOURCES).for_each(|_| merge.add(true));
        merge
    }

    /// Takes one item out and writes it down, as an encoder does.
    fn take(merge: &mut Merge<u64>, place: &mut LogPlace, seen: &mut [Vec<u64>]) -> Option<usize> {
        let (source, number) = merge.pop()?;
        seen[source].push(number);
        place.set(source, LogPosition { segment: 1, offset: number + 1, line: 0 });
        Some(source)
    }

    proptest! {
        #[test]
        fn each_source_s_order_is_kept_and_nothing_is_lost_or_repeated(
            times in prop::collection::vec(prop::collection::vec(0_u64..20, 0..20), SOURCES),
            happenings in prop::collection::vec(happening(SOURCES), 0..120),
        ) {
            let (mut merge, mut place) = (fresh(), LogPlace::default());
            let mut sent = [0_usize; SOURCES];
            let mut seen = vec![Vec::new(); SOURCES];
            for happening in happenings {
                match happening {
                    Happening::Arrives(source) => {
                        if let Some(time) = times[source].get(sent[source]) {
                            merge.push(source, Some(*time), sent[source] as u64);
                            merge.wait_for(source, true);
                            sent[source] += 1;
                        }
                    }
                    Happening::Silent(source) => merge.wait_for(source, false),
                    Happening::Takes => drop(take(&mut merge, &mut place, &mut seen)),
                    Happening::Cut => {
                        // All that is left of the reader is the id of what it saw last.
                        place = place.to_string().parse().expect("an id");
                        merge = fresh();
                        (0..SOURCES).for_each(|source| sent[source] = place.of(source).offset as usize);
                    }
                }
            }
            for source in 0..SOURCES {
                for (number, time) in times[source].iter().enumerate().skip(sent[source]) {
                    merge.push(source, Some(*time), number as u64);
                }
                merge.wait_for(source, false);
            }
            while take(&mut merge, &mut place, &mut seen).is_some() {}
            prop_assert!(merge.is_level());
            for source in 0..SOURCES {
                prop_assert_eq!(&seen[source], &(0..times[source].len() as u64).collect::<Vec<_>>());
            }
        }

        #[test]
        fn history_is_in_the_order_of_time_however_it_arrives(
            mut times in prop::collection::vec(prop::collection::vec(0_u64..50, 0..20), SOURCES),
            arrivals in prop::collection::vec(0..SOURCES, 0..60),
        ) {
            times.iter_mut().for_each(|own| own.sort_unstable());
            let mut expected: Vec<(u64, usize)> =
                times.iter().enumerate().flat_map(|(source, own)| own.iter().map(move |time| (*time, source))).collect();
            expected.sort_unstable();
            let mut merge = Merge::default();
            (0..SOURCES).for_each(|_| merge.add(true));
            let mut sent = [0; SOURCES];
            let mut seen = Vec::new();
            for source in arrivals.into_iter().chain((0..SOURCES).flat_map(|source| std::iter::repeat_n(source, 21))) {
                match times[source].get(sent[source]) {
                    Some(time) => merge.push(source, Some(*time), *time),
                    None => merge.wait_for(source, false),
                }
                sent[source] += 1;
                seen.extend(std::iter::from_fn(|| merge.pop()).map(|(source, time)| (time, source)));
            }
            prop_assert_eq!(seen, expected);
        }
    }
}
