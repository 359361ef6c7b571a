//! Whether a failed gang comes back, and after how long: budgets by cause, exponential backoff with jitter from the job's own seed.
//!
//! The decision is pure and comes with its reason. Free causes (a lost shim, node, drain) cost no budget but do wait, so that nothing spins.
//! A failure after a new step begins the exponent again; a program that never reports steps is judged by how long it ran.

use everlit_api::job::{FailureAction, RestartPolicy};
use everlit_api::rank::Cause;
use everlit_api::time::{Millis, Timestamp};

use super::limits::{BACKOFF_EXPONENT_MAX, FAILURE_PRIOR_MS};
use super::state::Budget;

/// What is known about a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// What made it end.
    pub cause: Cause,
    /// Exit code of the rank that failed first.
    pub code: Option<i32>,
    /// A step that no attempt had done before.
    pub new_step: bool,
    /// When it was seen.
    pub at: Timestamp,
}

/// What follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// A new attempt, not before so many milliseconds after the failure.
    Again {
        /// Milliseconds.
        delay_ms: u64,
        /// In one sentence.
        reason: String,
    },
    /// The job fails.
    GiveUp {
        /// In one sentence.
        reason: String,
    },
}

/// Decides, and books what the decision costs.
pub fn decide_restart(policy: &RestartPolicy, budget: &mut Budget, seed: u64, failure: Failure) -> Decision {
    budget.last_failure_at = Some(failure.at);
    if failure.new_step {
        budget.failures_in_a_row = 0;
        budget.start_failures = 0;
    } else {
        budget.failures_in_a_row = budget.failures_in_a_row.saturating_add(1);
        budget.start_failures += u32::from(failure.cause.is_start_failure());
    }
    if failure.cause == Cause::CannotStart {
        return Decision::GiveUp { reason: "it can not be started, and trying again would not help".into() };
    }
    if policy.on.get(&failure.cause) == Some(&FailureAction::Fail) {
        return Decision::GiveUp { reason: "restart.on says that this fails the job".into() };
    }
    if let Some(code) = failure.code.filter(|code| policy.no_retry_exit_codes.contains(code)) {
        return Decision::GiveUp { reason: format!("exit code {code} is in restart.no_retry_exit_codes") };
    }
    if failure.cause.is_start_failure() && budget.start_failures >= policy.max_start_failures.max(1) {
        let times = budget.start_failures;
        return Decision::GiveUp { reason: format!("it failed {times} times in a row without a new step (restart.max_start_failures)") };
    }
    if !failure.cause.is_free() {
        if budget.counted >= policy.max_restarts {
            return Decision::GiveUp { reason: format!("all {} restarts are used (restart.max_restarts)", policy.max_restarts) };
        }
        budget.counted += 1;
    }
    budget.restarts += 1;
    let delay_ms = delay_ms(policy, budget.failures_in_a_row.saturating_sub(1), seed, budget.restarts);
    let used = format!("restart {} of {}", budget.counted, policy.max_restarts);
    let reason = if failure.cause.is_free() { "restart without cost to the budget".into() } else { used };
    Decision::Again { delay_ms, reason }
}

/// `initial · factor^exponent` at most `max`, spread by the jitter, never below `initial`.
fn delay_ms(policy: &RestartPolicy, exponent: u32, seed: u64, count: u32) -> u64 {
    let backoff = &policy.backoff;
    let initial = backoff.initial.0 as f64;
    let grown = initial * backoff.factor.powi(exponent.min(BACKOFF_EXPONENT_MAX) as i32);
    let capped = grown.min(backoff.max.0 as f64).max(initial);
    let unit = (splitmix(seed ^ u64::from(count).wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 11) as f64 / (1u64 << 53) as f64;
    let spread = 1.0 + backoff.jitter * (2.0 * unit - 1.0);
    (capped * spread).max(initial).round() as u64
}

/// How long the job runs between two failures, as far as is known: so long in all with so many failures, and a prior that fades with time.
pub fn mean_time_between_failures(running_ms: u64, failures: u32) -> Millis {
    Millis(running_ms.saturating_add(FAILURE_PRIOR_MS) / (u64::from(failures) + 1))
}

/// Committed progress forgives counted restarts: `heal_after` without a failure.
pub fn heal(policy: &RestartPolicy, budget: &mut Budget, committed_at: Timestamp) -> bool {
    let calm = budget.last_failure_at.is_some_and(|at| committed_at.since_ms(at) >= policy.heal_after.0);
    if calm && budget.counted > 0 {
        budget.counted = 0;
        return true;
    }
    false
}

/// Sebastiano Vigna's SplitMix64: one well-mixed number per input (public domain reference, prng.di.unimi.it).
fn splitmix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(cause: Cause, new_step: bool) -> Failure {
        Failure { cause, code: Some(1), new_step, at: Timestamp(1_000) }
    }

    fn delays(policy: &RestartPolicy, seed: u64, count: u32) -> Vec<u64> {
        let mut budget = Budget::default();
        let mut delays = Vec::new();
        for _ in 0..count {
            match decide_restart(policy, &mut budget, seed, failure(Cause::Exit, false)) {
                Decision::Again { delay_ms, .. } => delays.push(delay_ms),
                Decision::GiveUp { .. } => break,
            }
        }
        delays
    }

    #[test]
    fn a_crash_loop_waits_longer_each_time_and_then_fails() {
        let mut policy = RestartPolicy { max_start_failures: 8, ..RestartPolicy::default() };
        policy.backoff.jitter = 0.0;
        assert_eq!(delays(&policy, 7, 20), [500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000]);
    }

    #[test]
    fn the_jitter_comes_from_the_seed_and_stays_in_its_bounds() {
        let policy = RestartPolicy { max_start_failures: 100, ..RestartPolicy::default() };
        let some = delays(&policy, 7, 30);
        assert_eq!(some, delays(&policy, 7, 30));
        assert_ne!(some, delays(&policy, 8, 30));
        for (n, delay) in some.iter().enumerate() {
            let plain = (500.0 * 2f64.powi(n as i32)).min(30_000.0);
            assert!(*delay as f64 >= (plain * 0.8).max(500.0).floor() && *delay as f64 <= plain * 1.2 + 1.0, "{n}: {delay}");
        }
    }

    #[test]
    fn delays_are_the_same_in_every_build() {
        // The generator's first two numbers from the seed 1234567, as its author's program gives them.
        let seed = 1_234_567_u64;
        assert_eq!([seed, seed.wrapping_add(0x9e37_79b9_7f4a_7c15)].map(splitmix), [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
        let policy = RestartPolicy { max_start_failures: 100, ..RestartPolicy::default() };
        assert_eq!(delays(&policy, 7, 8), [585, 1045, 1728, 4329, 7618, 13118, 30277, 25611]);
    }

    #[test]
    fn a_new_step_begins_again_and_the_global_budget_still_ends() {
        let policy = RestartPolicy { max_restarts: 3, ..RestartPolicy::default() };
        let mut budget = Budget::default();
        for _ in 0..3 {
            assert!(matches!(
                decide_restart(&policy, &mut budget, 1, failure(Cause::Signal, true)),
                Decision::Again { delay_ms: 500..=600, .. }
            ));
        }
        assert!(matches!(decide_restart(&policy, &mut budget, 1, failure(Cause::Signal, true)), Decision::GiveUp { .. }));
        assert_eq!(budget.restarts, 3);
    }

    #[test]
    fn free_causes_cost_nothing_but_wait() {
        let policy = RestartPolicy { max_restarts: 0, max_start_failures: 1, ..RestartPolicy::default() };
        let mut budget = Budget::default();
        for n in 0..100u32 {
            let Decision::Again { delay_ms, .. } = decide_restart(&policy, &mut budget, 1, failure(Cause::Infrastructure, false)) else {
                panic!("free")
            };
            assert!(n < 8 || delay_ms > 20_000, "it does not spin");
        }
        assert_eq!((budget.counted, budget.start_failures, budget.restarts), (0, 0, 100));
    }

    #[test]
    fn what_can_not_start_and_what_says_so_is_not_tried_again() {
        let policy = RestartPolicy::default();
        let mut budget = Budget::default();
        assert!(matches!(decide_restart(&policy, &mut budget, 1, failure(Cause::CannotStart, false)), Decision::GiveUp { .. }));
        let told = Failure { code: Some(78), ..failure(Cause::Exit, true) };
        assert!(matches!(decide_restart(&policy, &mut budget, 1, told), Decision::GiveUp { reason } if reason.contains("78")));
    }

    #[test]
    fn failures_shorten_the_mean_time_between_them_and_calm_lengthens_it() {
        let hours = |running: u64, failures| mean_time_between_failures(running * 3_600_000, failures).0 as f64 / 3_600_000.0;
        assert_eq!([hours(0, 0), hours(0, 1), hours(4, 3), hours(96, 0), hours(96, 9)], [4.0, 2.0, 2.0, 100.0, 10.0]);
        assert_eq!(mean_time_between_failures(u64::MAX, 0).0, u64::MAX);
    }

    #[test]
    fn committed_progress_over_time_forgives() {
        let policy = RestartPolicy::default();
        let mut budget = Budget { counted: 4, last_failure_at: Some(Timestamp(0)), ..Budget::default() };
        assert!(!heal(&policy, &mut Budget { counted: 0, ..budget.clone() }, Timestamp(600_000)), "there is nothing to forgive");
        assert!(!heal(&policy, &mut budget, Timestamp(599_999)));
        assert!(heal(&policy, &mut budget, Timestamp(600_000)));
        assert_eq!(budget.counted, 0);
    }
}
