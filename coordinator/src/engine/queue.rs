//! Jobs that wait for a place: by priority, then by age. Jobs of the same need share a line, so that a long queue costs nothing to look at.
//!
//! Only the order is kept here; who may go before whom is `schedule`'s. What no node could ever hold is parked and holds back nobody; it is
//! looked at again when the nodes change.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use everlit_api::ids::JobId;
use everlit_api::job::Priority;

use super::placement::Need;

type Line = BTreeSet<JobId>;

/// Jobs before one in its own line are counted up to this: a question must not cost a walk over the whole queue.
const POSITION_MAX: usize = 1_000;

/// Jobs that wait for a place.
#[derive(Debug, Default)]
pub struct Queue {
    lines: BTreeMap<(Reverse<Priority>, Need), Line>,
    parked: BTreeMap<(Reverse<Priority>, Need), Line>,
    len: usize,
}

impl Queue {
    /// Waiting jobs.
    pub fn depth(&self) -> usize {
        self.len
    }

    /// A job waits.
    pub fn push(&mut self, job: JobId, priority: Priority, need: Need) {
        let key = (Reverse(priority), need);
        let line = if self.parked.contains_key(&key) { self.parked.entry(key) } else { self.lines.entry(key) };
        self.len += usize::from(line.or_default().insert(job));
    }

    /// A job waits no more.
    pub fn remove(&mut self, job: JobId, priority: Priority, need: Need) {
        let key = (Reverse(priority), need);
        for lines in [&mut self.lines, &mut self.parked] {
            if let Some(line) = lines.get_mut(&key) {
                self.len -= usize::from(line.remove(&job));
                if line.is_empty() {
                    lines.remove(&key);
                }
            }
        }
    }

    /// Whether it waits.
    pub fn contains(&self, job: JobId, priority: Priority, need: &Need) -> bool {
        let key = (Reverse(priority), need.clone());
        [&self.lines, &self.parked].iter().any(|lines| lines.get(&key).is_some_and(|line| line.contains(&job)))
    }

    /// The first in order, oldest first within the highest priority.
    pub fn head(&self) -> Option<(JobId, &Need)> {
        let (Reverse(top), _) = self.lines.keys().next()?;
        let top_lines = self.lines.iter().take_while(|((Reverse(priority), _), _)| priority == top);
        top_lines.filter_map(|((_, need), line)| Some((*line.first()?, need))).min_by_key(|(job, _)| *job)
    }

    /// The first of each line, in order.
    pub fn firsts(&self) -> BTreeSet<(Reverse<Priority>, JobId, Need)> {
        let first = |((priority, need), line): (&(Reverse<Priority>, Need), &Line)| Some((*priority, *line.first()?, need.clone()));
        self.lines.iter().filter_map(first).collect()
    }

    /// The next of a line after one that was looked at.
    pub fn next_in_line(&self, after: JobId, priority: Reverse<Priority>, need: &Need) -> Option<JobId> {
        let line = self.lines.get(&(priority, need.clone()))?;
        line.range((Bound::Excluded(after), Bound::Unbounded)).next().copied()
    }

    /// Another that waits for the same with the same priority, and that `counts`.
    pub fn has_like(&self, job: JobId, priority: Priority, need: &Need, counts: impl Fn(&JobId) -> bool) -> bool {
        let key = (Reverse(priority), need.clone());
        let lines = [&self.lines, &self.parked];
        lines.iter().filter_map(|lines| lines.get(&key)).flatten().any(|other| *other != job && counts(other))
    }

    /// No node could ever hold jobs of this need.
    pub fn park(&mut self, need: &Need) {
        let keys: Vec<_> = self.lines.keys().filter(|(_, n)| n == need).cloned().collect();
        for key in keys {
            if let Some(line) = self.lines.remove(&key) {
                self.parked.entry(key).or_default().extend(line);
            }
        }
    }

    /// The nodes changed: look at everything again.
    pub fn unpark(&mut self) {
        for (key, line) in std::mem::take(&mut self.parked) {
            self.lines.entry(key).or_default().extend(line);
        }
    }

    /// Jobs that come before this one, parked ones not counted; a thousand stands for more of the same need.
    pub fn position(&self, job: JobId, priority: Priority) -> u64 {
        let before = self.lines.iter().take_while(|((Reverse(p), _), _)| *p >= priority);
        before
            .map(|((Reverse(p), _), line)| if *p > priority { line.len() } else { line.range(..job).take(POSITION_MAX).count() } as u64)
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(ranks: u32) -> Need {
        Need { least: ranks, ranks, ..Need::default() }
    }

    fn id(n: u128) -> JobId {
        JobId::from_u128(n)
    }

    #[test]
    fn priority_first_then_age_over_all_needs() {
        let mut queue = Queue::default();
        queue.push(id(2), Priority::Normal, need(1));
        queue.push(id(1), Priority::Normal, need(9));
        queue.push(id(3), Priority::High, need(4));
        queue.push(id(4), Priority::Low, need(1));
        let mut order = Vec::new();
        while let Some((job, need)) = queue.head().map(|(job, need)| (job, need.clone())) {
            order.push(job.as_u128());
            for priority in [Priority::Low, Priority::Normal, Priority::High] {
                queue.remove(job, priority, need.clone());
            }
        }
        assert_eq!(order, [3, 1, 2, 4]);
        assert_eq!(queue.depth(), 0);
    }

    #[test]
    fn a_parked_need_holds_back_nobody_and_comes_back() {
        let mut queue = Queue::default();
        queue.push(id(1), Priority::Normal, need(1_000));
        queue.push(id(2), Priority::Normal, need(1));
        queue.park(&need(1_000));
        queue.push(id(3), Priority::Normal, need(1_000));
        assert_eq!(queue.head(), Some((id(2), &need(1))));
        assert_eq!((queue.depth(), queue.position(id(2), Priority::Normal)), (3, 0));
        queue.unpark();
        assert_eq!(queue.head(), Some((id(1), &need(1_000))));
        assert_eq!(queue.position(id(3), Priority::Normal), 2);
        assert!(queue.contains(id(3), Priority::Normal, &need(1_000)));
    }

    #[test]
    fn all_of_a_higher_priority_come_before_and_of_the_same_the_older() {
        let mut queue = Queue::default();
        [5, 6].into_iter().for_each(|n| queue.push(id(n), Priority::High, need(1)));
        [1, 2, 3].into_iter().for_each(|n| queue.push(id(n), Priority::Normal, need(1)));
        assert_eq!([5, 6].map(|n| queue.position(id(n), Priority::High)), [0, 1]);
        assert_eq!([1, 2, 3].map(|n| queue.position(id(n), Priority::Normal)), [2, 3, 4]);
    }
}
