//! When what fails: a list that depends on rates, duration and seed alone, never on what anybody does about it. So two policies are compared
//! over the very same faults.

use super::DAY_MS;
use super::kinds::Kind;
use super::random::Random;

/// One thing that goes wrong.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fault {
    /// Milliseconds from the start.
    pub at: u64,
    /// Index of its kind.
    pub kind: usize,
    /// The place in the gang whose machine it hits.
    pub node: u32,
    /// Chance that decides whether recovery in place works, 0 to 1.
    pub luck: f64,
    /// Time to repair the machine, in means.
    pub repair: f64,
}

/// All faults up to `duration_ms`, in order. Each kind is a Poisson process with a stream of its own.
pub(super) fn draw(kinds: &[Kind], nodes: u32, duration_ms: u64, seed: u64) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (index, kind) in kinds.iter().enumerate() {
        let per_ms = kind.per_thousand_node_days * f64::from(nodes) / 1_000.0 / DAY_MS as f64;
        if per_ms <= 0.0 {
            continue;
        }
        let mut random = Random::new(seed, &kind.name);
        let mut at = random.exponential() / per_ms;
        while at < duration_ms as f64 {
            let (node, luck, repair) = (random.below(nodes), random.unit(), random.exponential());
            faults.push(Fault { at: at as u64, kind: index, node, luck, repair });
            at += random.exponential() / per_ms;
        }
    }
    faults.sort_by_key(|fault| (fault.at, fault.kind));
    faults
}

#[cfg(test)]
mod tests {
    use super::super::kinds::llama3;
    use super::*;

    #[test]
    fn faults_come_as_often_as_the_rates_say() {
        let counts: Vec<usize> = (0..40).map(|seed| draw(&llama3(), 2_048, 54 * DAY_MS, seed).len()).collect();
        let mean = counts.iter().sum::<usize>() as f64 / 40.0;
        // 466 expected; the mean of 40 runs has a standard deviation of 3.4.
        assert!((mean - 466.0).abs() < 14.0, "{mean}");
        assert!(counts.iter().any(|count| *count != counts[0]));
    }

    #[test]
    fn one_kind_more_often_leaves_the_others_where_they_were() {
        let mut kinds = llama3();
        let before = draw(&kinds, 100, 200 * DAY_MS, 7);
        kinds[0].per_thousand_node_days *= 3.0;
        let after = draw(&kinds, 100, 200 * DAY_MS, 7);
        let others = |faults: &[Fault]| faults.iter().filter(|fault| fault.kind != 0).cloned().collect::<Vec<_>>();
        assert_eq!(others(&before), others(&after));
        assert!(after.len() > before.len());
    }
}
