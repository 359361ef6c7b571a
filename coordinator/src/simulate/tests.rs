//! Runs of small clusters, held against what must be so.

use everlit_api::job::RestartPolicy;
use everlit_api::time::Millis;

use super::kinds::{Seen, Takes, llama3, none, scale_to};
use super::scenario::{Costs, Every, Policy, Recovery, Scenario, daly_ms};
use super::study::{Question, study};
use super::traffic::{Control, Decisions};
use super::world::World;
use super::{DAY_MS, HOUR_MS, Outcome, chart, run, svg};

/// 16 nodes of 8 GPUs, two weeks, a failure each 4 hours.
pub(super) fn scenario() -> Scenario {
    let mut kinds = llama3();
    scale_to(&mut kinds, 16, 4 * HOUR_MS);
    Scenario {
        nodes: 16,
        gpus_per_node: 8,
        workers: 128,
        duration_ms: 14 * DAY_MS,
        kinds,
        costs: Costs::default(),
        policy: Policy {
            recovery: Recovery::Snapshot,
            every: Every::Ms(300_000),
            spares: 8,
            restart: RestartPolicy::default(),
            stop_grace: Millis::secs(30),
        },
        control: Control::default(),
    }
}

/// Only this kind, each `hours`.
fn only(name: &str, hours: u64) -> Scenario {
    let mut scenario = scenario();
    for kind in &mut scenario.kinds {
        kind.per_thousand_node_days = if kind.name == name { 24.0 / hours as f64 / 16.0 * 1_000.0 } else { 0.0 };
    }
    scenario
}

fn mean(scenario: &Scenario) -> f64 {
    (0..10).map(|seed| run(scenario, seed, 4).ledger_ms.goodput()).sum::<f64>() / 10.0
}

fn with(recovery: Recovery) -> Scenario {
    let mut scenario = scenario();
    scenario.policy.recovery = recovery;
    scenario
}

#[test]
fn the_same_seed_is_the_same_run() {
    for recovery in Recovery::ALL {
        let scenario = with(recovery);
        assert_eq!(run(&scenario, 3, 8), run(&scenario, 3, 8));
        assert_ne!(run(&scenario, 3, 8).ledger_ms, run(&scenario, 4, 8).ledger_ms);
    }
}

#[test]
fn the_ledger_sums_to_the_duration_to_the_millisecond() {
    for recovery in Recovery::ALL {
        for (spares, every, max_restarts) in [(0, Every::Auto, 50), (1, Every::Ms(7_001), 0), (8, Every::Ms(HOUR_MS), 3)] {
            for duration_ms in [1, 123_456, 5 * HOUR_MS + 17, 9 * DAY_MS + 1] {
                let mut scenario = with(recovery);
                scenario.duration_ms = duration_ms;
                scenario.policy.spares = spares;
                scenario.policy.every = every;
                scenario.policy.restart.max_restarts = max_restarts;
                for seed in 0..5 {
                    assert_eq!(run(&scenario, seed, 2).ledger_ms.total(), duration_ms, "{recovery:?} {spares} {every:?} seed {seed}");
                }
            }
        }
    }
}

#[test]
fn without_failures_only_the_start_and_the_saves_cost_anything() {
    let mut scenario = scenario();
    scenario.kinds = none();
    let outcome = run(&scenario, 1, 8);
    let ledger = outcome.ledger_ms;
    // A save blocks steps for 1 s of each 301 s or so: it is due after 300 s and waits for the step's end.
    let share = ledger.checkpointing as f64 / (ledger.training + ledger.checkpointing) as f64;
    assert!((share - 1.0 / 301.0).abs() < 1e-5, "{share}");
    assert_eq!(ledger.training + ledger.checkpointing + ledger.starting, scenario.duration_ms);
    assert!((ledger.starting as f64 - 120_000.0).abs() < 100.0, "{ledger:?}");
    assert_eq!((outcome.counts.failures, outcome.gave_up), (0, None));
}

#[test]
fn few_ranks_stand_for_many() {
    for recovery in Recovery::ALL {
        let mut scenario = with(recovery);
        scenario.policy.restart.max_restarts = 6;
        scenario.policy.restart.heal_after = Millis::secs(3_600);
        let without_engine = |outcome: Outcome| Outcome { engine_events: 0, engine_ledger: None, ..outcome };
        let all = run(&scenario, 5, 128);
        assert!(all.engine_events > 1_000);
        assert_eq!(without_engine(run(&scenario, 5, 2)), without_engine(all.clone()), "{recovery:?}");
        assert_eq!(without_engine(run(&scenario, 5, 8)), without_engine(all), "{recovery:?}");
    }
}

#[test]
fn the_engine_s_own_book_says_the_same() {
    let mut scenario = scenario();
    scenario.duration_ms = 3 * DAY_MS;
    scenario.policy.spares = 1;
    for seed in 0..4 {
        let outcome = World::new(&scenario, seed, 3, true).run();
        let restarts = outcome.counts.failures + outcome.counts.planned;
        assert!(restarts > 5, "{restarts}");
        let book = outcome.engine_ledger.expect("the job is active");
        let own = outcome.ledger_ms;
        // The engine counts the first step after a restart as restoring, and the one in flight at a fault as training.
        let slack = (2 * restarts * scenario.costs.step_ms) as f64 / 1_000.0 + 10.0;
        for (name, book, own) in [
            ("training", book.training, own.training),
            ("repeated", book.repeated, own.repeated),
            ("checkpointing", book.checkpointing, own.checkpointing),
            ("undetected", book.undetected, own.undetected),
            ("restoring", book.restoring, own.restoring),
            ("backoff", book.backoff, own.backoff),
            ("queued", book.queued, own.queued),
        ] {
            assert!((book - own as f64 / 1_000.0).abs() <= slack, "seed {seed}: {name}: {book} and {own} ms, slack {slack}");
        }
        let all = book.queued + book.starting + book.restoring + book.training + book.repeated;
        let all = all + book.checkpointing + book.undetected + book.backoff + book.stopping;
        assert!((all - own.total() as f64 / 1_000.0).abs() < 0.01, "{all}");
    }
}

#[test]
fn each_rung_of_the_ladder_is_worth_something() {
    let [checkpoint, snapshot, in_place] = Recovery::ALL.map(|recovery| mean(&with(recovery)));
    assert!(checkpoint < snapshot && snapshot < in_place, "{checkpoint} {snapshot} {in_place}");
    let outcome = run(&with(Recovery::InPlace), 1, 4);
    assert!(outcome.counts.in_place > 0 && outcome.counts.in_place_failed > 0 && outcome.counts.from_checkpoint > 0);
    let mut never = with(Recovery::InPlace);
    never.costs.in_place_success = 0.0;
    assert!(mean(&never) < snapshot, "trying in vain costs time");
}

#[test]
fn a_snapshot_outlives_processes_and_no_machine() {
    let of = |kind: &str, recovery| {
        let mut scenario = only(kind, 6);
        // A slow disk: the newest copy is newer than the newest checkpoint most of the time.
        scenario.costs.save_ms = 280_000;
        scenario.policy.recovery = recovery;
        run(&scenario, 2, 4)
    };
    let snapshot = of("software_bug", Recovery::Snapshot);
    assert!(snapshot.counts.from_snapshot > 4 * snapshot.counts.from_checkpoint, "{:?}", snapshot.counts);
    assert!(snapshot.ledger_ms.repeated < of("software_bug", Recovery::Checkpoint).ledger_ms.repeated * 2 / 3);
    assert_eq!(of("power_supply", Recovery::Snapshot).counts.from_snapshot, 0);
}

#[test]
fn a_slow_disk_skips_copies_and_queues_none() {
    let mut scenario = scenario();
    scenario.kinds = none();
    scenario.costs.save_ms = 1_000_000;
    let outcome = run(&scenario, 1, 4);
    let writes = scenario.duration_ms / 1_000_000;
    assert!(outcome.counts.checkpoints.abs_diff(writes) < 3, "{} of {writes}", outcome.counts.checkpoints);
    assert!((outcome.ledger_ms.checkpointing / 1_000).abs_diff(writes) < 5, "one copy for each write");
}

#[test]
fn spares_save_the_wait_for_a_repair() {
    let of = |spares| {
        let mut scenario = scenario();
        scenario.policy.spares = spares;
        (mean(&scenario), run(&scenario, 1, 4))
    };
    let ((none, without), (enough, with_spares)) = (of(0), of(30));
    assert!(none < enough - 0.3, "{none} {enough}");
    assert!(without.counts.waits > 0 && without.ledger_ms.queued > DAY_MS);
    assert_eq!((with_spares.counts.waits, with_spares.ledger_ms.queued), (0, 0));
    let enough = scenario().enough_spares();
    assert!((5..20).contains(&enough), "{enough} for {} in repair", scenario().mean_in_repair());
}

#[test]
fn the_engine_s_budget_ends_a_job_and_machines_are_free() {
    let mut counted = only("software_bug", 6);
    counted.policy.restart.max_restarts = 3;
    counted.policy.restart.heal_after = Millis(60 * DAY_MS);
    let outcome = run(&counted, 1, 4);
    let gave_up = outcome.gave_up.clone().expect("the fourth failure is one too many");
    assert!(gave_up.reason.contains("restart.max_restarts"), "{}", gave_up.reason);
    assert_eq!((outcome.ledger_ms.given_up, outcome.counts.from_checkpoint), (counted.duration_ms - gave_up.at_ms, 3));
    // Committed progress forgives, and a lost machine costs no budget.
    counted.policy.restart.heal_after = Millis::secs(600);
    assert_eq!(run(&counted, 1, 4).gave_up, None);
    let mut free = only("power_supply", 6);
    free.policy.restart = RestartPolicy { max_restarts: 0, heal_after: Millis(60 * DAY_MS), ..RestartPolicy::default() };
    assert_eq!(run(&free, 1, 4).gave_up, None);
}

#[test]
fn the_engine_s_backoff_is_waited_for() {
    let mut scenario = only("software_bug", 6);
    let quick = run(&scenario, 1, 4).ledger_ms;
    scenario.policy.restart.backoff.initial = Millis::secs(300);
    scenario.policy.restart.backoff.max = Millis::secs(600);
    let slow = run(&scenario, 1, 4).ledger_ms;
    assert!(slow.backoff > quick.backoff + HOUR_MS, "{} {}", slow.backoff, quick.backoff);
}

#[test]
fn a_planned_stop_loses_no_step_if_the_grace_is_long_enough() {
    let mut scenario = only("planned", 12);
    let kept = run(&scenario, 1, 4);
    assert!(kept.counts.planned > 10);
    assert_eq!(kept.ledger_ms.repeated, 0);
    scenario.policy.stop_grace = Millis::secs(10);
    scenario.policy.recovery = Recovery::Checkpoint;
    assert!(run(&scenario, 1, 4).ledger_ms.repeated > 0);
}

#[test]
fn wrong_numbers_cost_what_was_computed_since() {
    let of = |minutes: u64| {
        let mut scenario = only("silent_data_corruption", 24);
        scenario.costs.seen_corruption_ms = minutes * 60_000;
        run(&scenario, 1, 4).ledger_ms.undetected
    };
    assert!(of(60) > 3 * of(10));
}

#[test]
fn the_best_interval_is_near_young_and_daly_s() {
    // Their model: nothing but saves and lost work.
    let mut scenario = only("software_bug", 3);
    scenario.duration_ms = 60 * DAY_MS;
    scenario.policy.recovery = Recovery::Checkpoint;
    scenario.costs = Costs { save_stall_ms: 30_000, save_ms: 0, seen_exit_ms: 0, step_ms: 1_000, ..Costs::default() };
    let question = Question { scenario: scenario.clone(), compare: Vec::new(), runs: 6, seed: 1 };
    let intervals = study(&question).intervals.expect("something fails");
    let theory = daly_ms(30_000, scenario.mean_between_failures_ms().expect("something fails"));
    assert_eq!(intervals.young_daly_ms, theory);
    let off = intervals.best_ms as f64 / theory as f64;
    assert!((0.5..=2.0).contains(&off), "{} ms found, {theory} ms by the formula", intervals.best_ms);
    let worst = intervals.points.iter().map(|point| point.goodput).fold(1.0, f64::min);
    let best = intervals.points.iter().map(|point| point.goodput).fold(0.0, f64::max);
    assert!(best - worst > 0.05, "{best} {worst}");
}

#[test]
fn who_decides_shows_in_the_ledger() {
    let of = |decisions| {
        let mut scenario = scenario();
        scenario.control = Control { decisions, latency_ms: 20, message_us: 20_000.0, heartbeat_ms: 2_000 };
        run(&scenario, 1, 4).ledger_ms
    };
    let [central, mixed, local] = Decisions::ALL.map(of);
    assert!(central.undetected > mixed.undetected);
    assert!(mixed.restoring > local.restoring);
}

#[test]
fn a_question_that_makes_no_sense_is_refused() {
    let wrong = |change: fn(&mut Scenario)| {
        let mut scenario = scenario();
        change(&mut scenario);
        scenario.check().expect_err("refused")
    };
    assert_eq!(scenario().check(), Ok(()));
    assert!(wrong(|s| s.nodes = 0).contains("nodes"));
    assert!(wrong(|s| s.workers = 100).contains("multiple of the 16 nodes"));
    assert!(wrong(|s| s.duration_ms = 0).contains("duration"));
    assert!(wrong(|s| s.costs.step_ms = 0).contains("step"));
    assert!(wrong(|s| s.costs.in_place_success = 1.5).contains("0 to 1"));
    assert!(wrong(|s| s.policy.every = Every::Ms(0)).contains("checkpoints"));
    assert!(wrong(|s| s.kinds[0].per_thousand_node_days = f64::NAN).contains("faulty_gpu"));
    assert!(wrong(|s| s.kinds[0].per_thousand_node_days = 1e9).contains("failures"));
    assert!(wrong(|s| s.control.heartbeat_ms = 0).contains("heartbeats"));
}

#[test]
fn what_a_kind_does_is_told_by_its_fields() {
    for kind in llama3() {
        assert_eq!(kind.takes == Takes::Nothing, kind.seen == Seen::Announced, "{}", kind.name);
    }
}

#[test]
fn the_charts_show_every_policy_and_the_best_interval() {
    let mut small = scenario();
    small.duration_ms = 2 * DAY_MS;
    let compare = vec![("in place & more".to_string(), with(Recovery::InPlace))];
    let report = study(&Question { scenario: small, compare, runs: 2, seed: 1 });
    let text = chart(&report);
    assert!(text.contains("in place & more") && text.contains("  best"), "{text}");
    let picture = svg(&report);
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
    assert!(picture.contains("in place &amp; more") && picture.contains("worth having"));
    assert_eq!(picture.matches("<text").count(), picture.matches("</text>").count());
    assert!(!picture.contains("NaN") && !picture.contains("inf\""));
}
