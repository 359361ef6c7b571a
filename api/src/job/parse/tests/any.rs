//! Jobs and bodies that nobody thought of.

use proptest::prelude::*;
use serde_json::json;

use super::super::*;
use crate::job::{
    Backoff, BatchSize, Device, EvaluationSpec, FailureAction, HeartbeatPolicy, LogAction, LogMetric, LogPolicy, MODEL_PRESETS, ModelSpec,
    OnNan, Precision, Resources, RestartPolicy, RestartScope, WorkerSpec,
};
use crate::model::LlamaSizes;
use crate::rank::Cause;

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(|n| serde_json::Number::from_f64(n).map_or(Value::Null, Value::Number)),
        ".{0,12}".prop_map(Value::from),
        Just(json!("10s")),
        Just(json!("auto")),
    ];
    let key = prop_oneof![
        ".{0,8}",
        proptest::sample::select(vec![
            "world_size",
            "min_world_size",
            "command",
            "worker",
            "env",
            "secrets",
            "labels",
            "restart",
            "backoff",
            "initial",
            "max",
            "heartbeat",
            "timeout",
            "checkpoint",
            "data",
            "shards",
            "stream",
            "fallback",
            "resources",
            "memory",
            "gpus",
            "cpus",
            "log_metrics",
            "log_policies",
            "action",
            "pattern",
            "field",
            "resume_from",
            "batch_size",
            "model",
            "dim",
            "evaluation",
            "every",
            "steps",
            "kind",
            "name",
            "stop_grace",
        ])
        .prop_map(String::from),
    ];
    leaf.prop_recursive(4, 64, 8, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            proptest::collection::btree_map(key.clone(), inner, 0..8).prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

prop_compose! {
    fn program(world: u32)(
        built_in in any::<bool>(), command in proptest::collection::vec("[a-z /=]{1,9}", 1..4),
        model in proptest::sample::select(MODEL_PRESETS.to_vec()), data in proptest::option::of("/[a-z]{1,9}"), steps in 1..=STEPS_MAX,
        batch in u64::from(world)..=BATCH_MAX, auto in any::<bool>(), sequence_length in 8u32..=8192, learning_rate in 1e-9f64..10.0,
        seed in any::<u64>(), device in proptest::sample::select(vec![Device::Auto, Device::Cpu, Device::Cuda]), deterministic in any::<bool>(),
        schedule in proptest::option::of(0.0f64..=1.0), weight_decay in 0.0f64..=10.0, max_grad_norm in 0.0f64..=1e6, dropout in 0.0f64..0.95,
        heads in proptest::option::of(1u64..64), switches in any::<[bool; 3]>(), every_steps in 0..=STEPS_MAX, samples in 0..=BATCH_MAX,
        evaluated in proptest::option::of("/[a-z]{1,9}"),
    ) -> (Option<WorkerSpec>, Vec<String>) {
        let sizes = |heads| LlamaSizes { dim: 2 * heads, layers: heads, heads, kv_heads: 1, hidden: heads };
        let worker = WorkerSpec {
            model: heads.map_or(ModelSpec::Preset(model.into()), |heads| ModelSpec::Sizes(sizes(heads))),
            data,
            steps,
            batch_size: if auto { BatchSize::Auto(Auto::Auto) } else { BatchSize::Samples(batch) },
            micro_batch_size: schedule.map(|part| 1 + (part * (batch - 1) as f64) as u64),
            sequence_length,
            learning_rate,
            warmup_steps: schedule.map(|part| (part * steps as f64) as u64),
            min_learning_rate: schedule.map(|part| part * learning_rate),
            weight_decay,
            max_grad_norm,
            dropout,
            precision: if switches[0] { Precision::Bfloat16 } else { Precision::Float32 },
            activation_checkpointing: switches[1],
            on_nan: if switches[2] { OnNan::Skip } else { OnNan::Stop },
            evaluation: EvaluationSpec { every_steps, samples, data: evaluated },
            seed,
            device,
            deterministic,
        };
        if built_in { (Some(worker), vec![]) } else { (None, command) }
    }
}

prop_compose! {
    fn policies()(
        max_restarts in 0u32..1000, max_start_failures in 1u32..1000, initial in 0u64..86_400_000, more in 0u64..1000, factor in 1.0f64..100.0,
        jitter in 0.0f64..1.0, scope in proptest::sample::select(vec![RestartScope::Auto, RestartScope::Gang]), spares in 0u32..64, on in proptest::collection::btree_map(
            proptest::sample::select(vec![Cause::Stuck, Cause::Silent, Cause::Idle, Cause::NoStart]),
            proptest::sample::select(vec![FailureAction::Restart, FailureAction::Fail, FailureAction::Alert]), 0..4), heal in 1_000u64..2_000_000_000,
        codes in proptest::collection::vec(0i32..256, 0..5), timeout in 1_000u64..86_400_000,
        idle in proptest::option::of(1_000u64..2_000_000_000), required in any::<bool>(),
    ) -> (RestartPolicy, HeartbeatPolicy) {
        let max = (initial + more).min(86_400_000);
        let backoff = Backoff { initial: Millis(initial), factor, max: Millis(max), jitter };
        let restart = RestartPolicy { max_restarts, max_start_failures, backoff, scope, spares, heal_after: Millis(heal), no_retry_exit_codes: codes, on };
        let (idle_timeout, progress_timeout) = (idle.map(Millis), idle.map(|ms| Millis(ms + 1)));
        (restart, HeartbeatPolicy { timeout: Millis(timeout), startup_timeout: Millis(timeout), idle_timeout, progress_timeout, required })
    }
}

prop_compose! {
    fn texts()(
        name in proptest::option::of("[a-z0-9][a-zA-Z0-9 ._-]{0,20}"), labels in proptest::collection::btree_map("[a-z./-]{1,9}", "[ -~]{0,9}", 0..4),
        env in proptest::collection::btree_map("[A-Z_]{1,3}", "[^\0]{0,9}", 0..4), secrets in proptest::collection::btree_map("[a-z]{1,9}", "[a-z]{0,9}", 0..4),
        workdir in proptest::option::of("/[a-z/]{0,9}"), resume_from in proptest::option::of("/[a-z/]{0,9}"), metric in proptest::option::of("[a-z]{1,9}"),
        shards in proptest::collection::vec("/[a-z.]{1}[a-z/]{0,9}", 0..4), logs in proptest::option::of("s3://[a-z]{3,9}/[a-z]{1,5}"),
        priority in proptest::sample::select(vec![Priority::Low, Priority::Normal, Priority::High, Priority::Critical]),
    ) -> JobSpec {
        let policy = |name: &String| LogPolicy { name: Some(name.clone()), pattern: name.clone(), action: LogAction::ExcludeNode };
        let log_policies = metric.iter().map(policy).collect();
        let log_metrics = metric.map(|name| LogMetric { pattern: format!("{name}=(\\d+)"), field: name }).into_iter().collect();
        let logs = LogArchive { to: logs.map(|to| to.parse().expect("a place")) };
        JobSpec { name, labels, env, secrets, workdir, resume_from, log_metrics, log_policies, logs, data: DataSpec { shards, ..DataSpec::default() }, priority, ..JobSpec::default_for(1) }
    }
}

prop_compose! {
    fn spec()(world in 1u32..=WORLD_SIZE_MAX)(
        world in Just(world), (worker, command) in program(world), (mut restart, heartbeat) in policies(), texts in texts(),
        cpus in 0.0f64..100.0, memory in 0u64..1 << 50, gpus in 0u32..=1024, every_steps in 1..=STEPS_MAX, keep in 1u32..=1000,
        every in proptest::option::of(proptest::option::of(1_000u64..=86_400_000)), measures in any::<bool>(), package in proptest::option::of("[0-9a-f]{64}"),
        grace in 0u64..86_400_000, limit in proptest::option::of(1_000u64..3_153_600_000_000),
    ) -> JobSpec {
        let every = every.map(|time| time.map_or(CheckpointInterval::Auto(Auto::Auto), |ms| CheckpointInterval::Time(Millis(ms))));
        let worker_is_none = worker.is_none();
        let measurable = measures && worker.is_some() && texts.resume_from.is_some();
        if measurable || worker.is_none() || world < 2 {
            restart.spares = 0;
        }
        JobSpec {
            kind: if measurable { JobKind::Evaluate } else { JobKind::Train },
            world_size: world, worker, command, restart, heartbeat, resources: Resources { cpus, memory, gpus, gpu_memory: memory / 2 },
            package: if worker_is_none && texts.workdir.is_none() { package } else { None },
            checkpoint: CheckpointPolicy { every_steps: if every.is_some() && every_steps % 2 == 0 { 0 } else { every_steps }, every, keep, copies: keep % 5, keep_stored: 3, to: None }, stop_grace: Millis(grace), time_limit: limit.map(Millis), ..texts
        }
    }
}

proptest! {
    #[test]
    fn parse_never_panics_and_points_at_what_is_there(body in json_value()) {
        if let Err(faults) = parse(&body) {
            prop_assert!(!faults.is_empty());
            for fault in &faults {
                prop_assert!(fault.pointer.is_empty() || fault.pointer.starts_with('/'), "{fault:?}");
                prop_assert!(!fault.detail.is_empty());
            }
        }
    }

    #[test]
    fn what_was_accepted_is_accepted_again(spec in spec()) {
        let body = serde_json::to_value(&spec).expect("serializes");
        prop_assert_eq!(parse(&body), Ok(spec.clone()));
        let text = serde_json::to_string(&spec).expect("serializes");
        prop_assert_eq!(parse(&serde_json::from_str(&text).expect("JSON")).map(|s| s.world_size), Ok(spec.world_size));
    }
}
