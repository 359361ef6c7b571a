mod any;

use std::collections::BTreeMap;

use expect_test::{Expect, expect};
use serde_json::json;

use super::reader::SECTIONS;
use super::*;
use crate::environment::RESERVED;
use crate::job::{BatchSize, EvaluationSpec, FailureAction, LogAction, LogPolicy, ModelSpec, OnNan, Precision, RestartScope, WorkerSpec};
use crate::model::LlamaSizes;
use crate::rank::Cause;

fn faults(body: Value) -> String {
    let faults = parse(&body).expect_err("must be refused");
    let line = |f: &Fault| format!("{} {} {}\n", if f.kind == FaultKind::Invalid { "x" } else { "-" }, f.pointer, f.detail);
    faults.iter().map(line).collect()
}

fn check(body: Value, expected: Expect) {
    expected.assert_eq(&faults(body));
}

#[test]
fn nothing_and_a_world_size_are_jobs() {
    assert_eq!(parse(&json!({})), Ok(JobSpec::default_for(1)));
    assert_eq!(parse(&json!({"world_size": 4})), Ok(JobSpec::default_for(4)));
    assert_eq!(parse(&json!({"world_size": 65_536})), Ok(JobSpec::default_for(65_536)));
}

#[test]
fn null_and_values_that_ask_for_nothing_pass() {
    let body = json!({
        "world_size": 2, "min_world_size": 2, "name": null, "worker": null, "command": null, "image": null, "replicas": null,
        "log_policies": [], "restart": {"spares": 0, "on": {}, "backoff": null}, "resources": {"gpu_memory": 0}, "kind": "train",
    });
    assert_eq!(parse(&body), Ok(JobSpec::default_for(2)));
}

#[test]
fn all_faults_are_named_at_once() {
    check(
        json!({"world_size": 0, "name": " ", "priority": "urgent", "restart": {"backoff": {"factor": 0.5, "jitter": 2}}, "stop_grace": 5}),
        expect![[r#"
            x /world_size must be a whole number from 1 to 65536
            x /name must be 1 to 128 letters, digits, `.`, `_`, `-` and spaces, and not blank
            x /priority must be one of "low", "normal", "high", "critical"
            x /restart/backoff/factor must be at least 1 and at most 100
            x /restart/backoff/jitter must be at least 0 and at most 1
            x /stop_grace must be a duration with its unit in quotes: did you mean "5s" or "5ms"?
        "#]],
    );
}

#[test]
fn unknown_fields_are_named_with_the_nearest_known_one() {
    check(
        json!({"worldSize": 4, "comand": [], "zzz": 1, "max_restarts": 3, "a/b~c": 1, "restart": {"max_restart": 1, "backoff": {"inital": "1s"}}}),
        expect![[r#"
            x /restart/backoff/inital is not a known field: did you mean `initial`?
            x /restart/max_restart is not a known field: did you mean `max_restarts`?
            x /a~1b~0c is not a known field
            x /comand is not a known field: did you mean `command`?
            x /max_restarts is not a known field: did you mean `restart.max_restarts`?
            x /worldSize is not a known field: did you mean `world_size`?
            x /zzz is not a known field
        "#]],
    );
}

#[test]
fn what_is_not_built_is_refused_as_such() {
    check(
        json!({
            "world_size": 4, "min_world_size": 2, "kind": "serve", "image": "x", "replicas": 1, "engine": "vllm", "model": "m", "port": 1,
            "health": {}, "autoscale": {},
            "resources": {"gpus": 0.5},
        }),
        expect![[r#"
            - /kind kind serve is not built: only "train", "evaluate" and "preprocess" are
            - /resources/gpus fractions of a GPU are not built: give gpu_memory, the part of a GPU's memory that a rank takes
            - /image containers are not built: give a command that is installed on the nodes
            - /replicas belongs to kind serve, which is not built
            - /engine belongs to kind serve, which is not built
            - /model belongs to kind serve, which is not built
            - /port belongs to kind serve, which is not built
            - /health belongs to kind serve, which is not built
            - /autoscale belongs to kind serve, which is not built
        "#]],
    );
}

#[test]
fn places_in_stores_are_checked() {
    check(
        json!({"checkpoint": {"to": "s3://key:secret@bucket", "keep_stored": 0}, "resume_from": "http://bucket/x"}),
        expect![[r#"
            x /resume_from must be s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder or an absolute path
            x /checkpoint/to must not hold credentials: give them in the job's `secrets`
            x /checkpoint/keep_stored must be a whole number from 1 to 1000
        "#]],
    );
    check(
        json!({"checkpoint": {"keep_stored": 2}, "resume_from": "s3://bucket/../x"}),
        expect![[r#"
        x /resume_from must have no empty part, `.` or `..` in it
        x /checkpoint/keep_stored is for checkpoint.to: give that too, or leave this out
    "#]],
    );
    check(
        json!({"logs": {"to": "bucket", "from": 1}}),
        expect![[r#"
            x /logs/to must be s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder or an absolute path
            x /logs/from is not a known field
        "#]],
    );
    let archive = |body: Value| parse(&body).expect("fine").archive(JobId::from_u128(1)).map(|place| place.to_string());
    let own = JobId::from_u128(1);
    assert_eq!(archive(json!({"checkpoint": {"to": "s3://runs"}})), Some(format!("s3://runs/{own}")));
    assert_eq!(archive(json!({"checkpoint": {"to": "s3://runs"}, "logs": {"to": "/mnt/logs"}})), Some(format!("/mnt/logs/{own}")));
    assert_eq!(archive(json!({})), None);
    let job = parse(&json!({"checkpoint": {"to": "s3://bucket/runs/"}, "resume_from": "gs://bucket/runs/a/"})).expect("fine");
    assert_eq!(job.checkpoint.to.map(|to| to.to_string()).as_deref(), Some("s3://bucket/runs"));
    assert_eq!((job.checkpoint.keep_stored, job.resume_from.as_deref()), (3, Some("gs://bucket/runs/a")));
}

#[test]
fn commands_and_their_environment_are_checked() {
    check(
        json!({"command": "python train.py"}),
        expect![[r#"
            x /command must be a list like ["python", "train.py"]; for a shell's line write ["sh", "-c", "..."]
        "#]],
    );
    check(
        json!({"command": [], "worker": {"steps": 1}}),
        expect![[r#"
            x /command is empty: name a program, or leave it out to run the built-in one
            x /worker command and worker exclude each other: give the one that shall run
        "#]],
    );
    check(
        json!({"command": ["", 1, "a\u{0}b", ""], "workdir": "here", "env": {"A=B": "", "RANK": "0", "N": 1, "T": true, "BOTH": "x"},
               "secrets": {"WORLD_SIZE": "2", "BOTH": "y", "H": "***", "L": []}}),
        expect![[r#"
            x /command/1 must be a text in quotes, not a number
            x /command/2 must not contain a NUL character
            x /command/0 must name a program
            x /env/A=B a variable's name must be 1 to 256 printable ASCII characters without `=` and spaces
            x /env/N must be a text: write "1" in quotes
            x /env/RANK is set by everlit for each rank: leave it out
            x /env/T must be a text: write "true" in quotes
            x /secrets/H is `***`, which answers show in place of a secret: give the secret itself
            x /secrets/L must be a text in quotes, not a list
            x /secrets/WORLD_SIZE is set by everlit for each rank: leave it out
            x /secrets/BOTH is in env too: give it once
            x /workdir must be an absolute path, one that starts with `/`
        "#]],
    );
    for name in RESERVED {
        assert!(parse(&json!({"env": {name: "x"}})).is_err() && parse(&json!({"secrets": {name: "x"}})).is_err(), "{name}");
    }
    for name in ["PATH", "HOME", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "PYTHONUNBUFFERED", "NCCL_DEBUG"] {
        assert!(parse(&json!({"env": {name: "x"}})).is_ok(), "{name}");
    }
    check(
        json!({"command": ["x"], "package": "ABC", "workdir": "/home/me"}),
        expect![[r#"
            x /package must be the sha256 of an uploaded package, 64 lower-case hexadecimal digits: `everlit submit --workdir FOLDER` makes one
            x /workdir must be a path in the package, without `/` at its beginning and without `..`
        "#]],
    );
    check(
        json!({"package": "ab".repeat(32), "workdir": "a/../../b"}),
        expect![[r#"
            x /package goes with a command: the built-in program has no use for a folder
            x /workdir must be a path in the package, without `/` at its beginning and without `..`
        "#]],
    );
    let within = parse(&json!({"command": ["x"], "package": "ab".repeat(32), "workdir": "sub/folder"})).expect("both");
    assert_eq!((within.package, within.workdir.as_deref()), (Some("ab".repeat(32)), Some("sub/folder")));
    let empty_argument = parse(&json!({"command": ["prog", "--flag", ""]})).expect("an argument may be empty");
    assert_eq!((empty_argument.worker, empty_argument.command.len()), (None, 3));
}

#[test]
fn worker_settings_are_checked() {
    check(
        json!({"world_size": 4, "worker": {"model": "gpt-5", "data": "a/../b", "steps": 0, "batch_size": 3, "sequence_length": 4,
               "learning_rate": 0, "seed": -1, "device": "tpu", "deterministic": "yes", "micro_batch_size": 0, "warmup_steps": 3000,
               "min_learning_rate": 1, "weight_decay": -1, "max_grad_norm": "x", "dropout": 0.96, "precision": "fp8", "on_nan": "ignore",
               "activation_checkpointing": 1, "evaluation": {"every_steps": -1, "samples": 1.5, "data": "here", "every": 1}}}),
        expect![[r#"
            x /worker/steps must be a whole number from 1 to 1000000000000
            x /worker/batch_size is over all ranks, so it must be at least world_size (4)
            x /worker/learning_rate must be greater than 0 and at most 1000000
            x /worker/model must be one of "llama-1m", "llama-10m", "llama-30m", "llama-124m", "llama-350m", "llama-1b", "mlp-10k", "mlp-500k", or sizes like {"dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "hidden": 448}
            x /worker/data must be an absolute path, one that starts with `/`
            x /worker/micro_batch_size must be a whole number from 1 to 32
            x /worker/sequence_length must be a whole number from 8 to 8192
            x /worker/warmup_steps must be a whole number from 0 to 2000
            x /worker/min_learning_rate must be at least 0 and at most 0.003
            x /worker/weight_decay must be at least 0 and at most 10
            x /worker/max_grad_norm must be a number, not a text
            x /worker/dropout must be at least 0 and at most 0.95
            x /worker/precision must be one of "float32", "bfloat16"
            x /worker/activation_checkpointing must be true or false, not a number
            x /worker/on_nan must be one of "stop", "skip"
            x /worker/evaluation/every_steps must be a whole number from 0 to 1000000000000
            x /worker/evaluation/samples must be a whole number from 0 to 1000000000
            x /worker/evaluation/data must be an absolute path, one that starts with `/`
            x /worker/evaluation/every is not a known field: did you mean `checkpoint.every`?
            x /worker/seed must be a whole number at least 0
            x /worker/device must be one of "auto", "cpu", "cuda"
            x /worker/deterministic must be true or false, not a text
        "#]],
    );
}

#[test]
fn worker_settings_that_depend_on_each_other_are_held_against_each_other() {
    check(
        json!({"world_size": 2, "worker": {"steps": 10, "batch_size": 8, "micro_batch_size": 9, "warmup_steps": 11, "learning_rate": 0.1,
               "min_learning_rate": 0.2}}),
        expect![[r#"
            x /worker/micro_batch_size must be a whole number from 1 to 8
            x /worker/warmup_steps must be a whole number from 0 to 10
            x /worker/min_learning_rate must be at least 0 and at most 0.1
        "#]],
    );
    check(
        json!({"worker": {"batch_size": "lots", "model": {"dim": 130, "layers": 0, "heads": 4, "kv_heads": 3, "width": 1}}}),
        expect![[r#"
            x /worker/batch_size must be a whole number from 1 to 1000000000, or "auto"
            x /worker/model/layers must be a whole number from 1 to 1024
            x /worker/model/hidden must be given, from 1 to 1048576
            x /worker/model/width is not a known field
        "#]],
    );
    check(
        json!({"worker": {"model": {"dim": 130, "layers": 1, "heads": 4, "kv_heads": 3, "hidden": 8}}}),
        expect![[r#"
            x /worker/model/heads must divide dim (130) into heads of an even number of features
            x /worker/model/kv_heads must divide heads (4)
        "#]],
    );
}

#[test]
fn worker_settings_are_read_in_full() {
    let sizes = json!({"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 128});
    let body = json!({"world_size": 2, "worker": {"model": sizes, "steps": 10, "batch_size": "auto", "micro_batch_size": 4, "warmup_steps": 10,
        "learning_rate": 0.1, "min_learning_rate": 0.1, "weight_decay": 0, "max_grad_norm": 0, "dropout": 0.5, "precision": "bfloat16",
        "activation_checkpointing": true, "on_nan": "skip", "evaluation": {"every_steps": 5, "samples": 7, "data": "/e"}}});
    let expected = WorkerSpec {
        model: ModelSpec::Sizes(LlamaSizes { dim: 64, layers: 2, heads: 4, kv_heads: 2, hidden: 128 }),
        steps: 10,
        batch_size: BatchSize::Auto(Auto::Auto),
        micro_batch_size: Some(4),
        warmup_steps: Some(10),
        learning_rate: 0.1,
        min_learning_rate: Some(0.1),
        weight_decay: 0.0,
        max_grad_norm: 0.0,
        dropout: 0.5,
        precision: Precision::Bfloat16,
        activation_checkpointing: true,
        on_nan: OnNan::Skip,
        evaluation: EvaluationSpec { every_steps: 5, samples: 7, data: Some("/e".into()) },
        ..WorkerSpec::for_world(2)
    };
    assert_eq!(parse(&body).map(|spec| spec.worker), Ok(Some(expected)));
}

#[test]
fn checkpoints_by_time_switch_those_by_steps_off_unless_both_are_asked_for() {
    let policy = |checkpoint: Value| parse(&json!({ "checkpoint": checkpoint })).map(|spec| spec.checkpoint);
    let every = |every, every_steps| Ok(CheckpointPolicy { every_steps, every: Some(every), ..CheckpointPolicy::default() });
    let minute = CheckpointInterval::Time(Millis::secs(60));
    assert_eq!(policy(json!({"every": "1m"})), every(minute, 0));
    assert_eq!(policy(json!({"every": "1m", "every_steps": 10})), every(minute, 10));
    assert_eq!(policy(json!({"every": "auto", "every_steps": 0})), every(CheckpointInterval::Auto(Auto::Auto), 0));
    assert_eq!(policy(json!({"every": null})), Ok(CheckpointPolicy::default()));
    check(
        json!({"checkpoint": {"every": "500ms"}}),
        expect![[r#"
            x /checkpoint/every must be from 1s to 1d, or "auto"
        "#]],
    );
    check(
        json!({"checkpoint": {"every": 5, "every_steps": 0}}),
        expect![[r#"
            x /checkpoint/every must be a duration with its unit in quotes: did you mean "5s" or "5ms"?, or "auto"
        "#]],
    );
}

#[test]
fn an_evaluation_names_what_it_measures_and_runs_the_built_in_program() {
    let id = JobId::from_parts(1, 2).to_string();
    let spec = parse(&json!({"kind": "evaluate", "resume_from": id})).expect("an evaluation");
    assert_eq!((spec.kind, spec.worker), (JobKind::Evaluate, Some(WorkerSpec::for_world(1))));
    check(
        json!({"kind": "evaluate", "command": ["x"]}),
        expect![[r#"
            x /command kind evaluate runs the built-in program: leave command out, or make it kind train
            x /resume_from kind evaluate needs it: the id of the job, or the path of the checkpoint, that is to be measured
        "#]],
    );
    check(
        json!({"kind": "judge"}),
        expect![[r#"
            x /kind must be "train", "evaluate" or "preprocess"
        "#]],
    );
}

#[test]
fn resources_read_sizes_and_refuse_nonsense() {
    for (size, bytes) in [
        (json!(1024), 1024),
        (json!("2Gi"), 2 << 30),
        (json!("500Mi"), 500 << 20),
        (json!("2G"), 2_000_000_000),
        (json!("1.5GiB"), 3 << 29),
        (json!("0"), 0),
    ] {
        let spec = parse(&json!({"resources": {"memory": size}})).expect("a size");
        assert_eq!(spec.resources.memory, bytes);
    }
    for size in
        [json!("2gi"), json!(""), json!("Gi"), json!("-1"), json!(1.5), json!("1e9"), json!("9999999Ti"), json!(true), json!(u64::MAX)]
    {
        assert!(parse(&json!({"resources": {"memory": size}})).is_err(), "{size}");
    }
    check(
        json!({"resources": {"cpus": -1, "gpus": -1, "memory": "lots"}}),
        expect![[r#"
            x /resources/cpus must be at least 0 and at most 65536
            x /resources/memory must be a number of bytes up to 1125899906842624 or a size like "2Gi", "500Mi" or "2G"
            x /resources/gpus must be a whole number from 0 to 1024
        "#]],
    );
}

#[test]
fn only_what_can_recover_in_place_has_spares() {
    check(
        json!({"command": ["true"], "world_size": 2, "restart": {"scope": "in_place", "spares": 1}}),
        expect![[r#"
            x /restart/spares needs the built-in training program with a world_size of at least 2: leave it out or set it to 0
            x /restart/scope in_place needs the built-in training program with a world_size of at least 2: use "auto" or "gang"
        "#]],
    );
    check(
        json!({"world_size": 2, "min_world_size": 3}),
        expect![[r#"
        x /min_world_size is more than world_size (2)
    "#]],
    );
    check(
        json!({"world_size": 2, "min_world_size": 1, "command": ["true"]}),
        expect![[r#"
        x /min_world_size below world_size (2) needs the built-in training program, which goes on without a lost rank, and a restart.scope other than "gang"
    "#]],
    );
    check(
        json!({"world_size": 2, "min_world_size": 1, "restart": {"scope": "gang"}}),
        expect![[r#"
        x /min_world_size below world_size (2) needs the built-in training program, which goes on without a lost rank, and a restart.scope other than "gang"
    "#]],
    );
    let least = |body: Value| parse(&body).unwrap().least_world_size();
    assert_eq!(least(json!({"world_size": 4, "min_world_size": 2})), 2);
    assert_eq!((least(json!({"world_size": 4, "min_world_size": 4, "command": ["true"]})), least(json!({"world_size": 4}))), (4, 4));
    check(
        json!({"world_size": 2, "restart": {"scope": "rank"}}),
        expect![[r#"
        x /restart/scope rank needs a command whose ranks do not need each other; those of the built-in program do: use "auto" or "gang"
    "#]],
    );
    let restart = parse(&json!({"world_size": 2, "command": ["true"], "restart": {"scope": "rank"}})).unwrap().restart;
    assert_eq!(restart.scope, RestartScope::Rank);
    let restart = parse(&json!({"world_size": 2, "restart": {"scope": "in_place", "spares": 1}})).unwrap().restart;
    assert_eq!((restart.scope, restart.spares), (RestartScope::InPlace, 1));
}

#[test]
fn actions_by_cause_are_those_that_can_be_taken() {
    check(
        json!({"restart": {"on": {"exit": "alert", "stuck": "ignore", "drain": "fail", "silent": "alert"}}}),
        expect![[r#"
        x /restart/on/exit must be one of "restart", "fail"
        x /restart/on/stuck must be one of "restart", "fail", "alert"
        x /restart/on/drain is not a known field
    "#]],
    );
    let on = parse(&json!({"restart": {"on": {"exit": "fail", "stuck": "alert"}}})).unwrap().restart.on;
    assert_eq!(on, BTreeMap::from([(Cause::Exit, FailureAction::Fail), (Cause::Stuck, FailureAction::Alert)]));
}

#[test]
fn policies_are_checked() {
    check(
        json!({"restart": {"max_restarts": -1, "max_start_failures": 0, "no_retry_exit_codes": [1, 256, "x"], "backoff": {"initial": "1m"}, "scope": "all"},
               "heartbeat": {"timeout": "10ms", "progress_timeout": "0s", "required": 1}, "checkpoint": {"every_steps": 0, "keep": 0}, "time_limit": "0s", "data": {"shards": ["x", "/y"]}}),
        expect![[r#"
            x /restart/max_restarts must be a whole number from 0 to 1000000
            x /restart/max_start_failures must be a whole number from 1 to 1000000
            x /restart/backoff/initial is longer than restart.backoff.max (30s)
            x /restart/scope must be one of "auto", "gang", "rank", "in_place"
            x /restart/no_retry_exit_codes/1 must be a whole number from 0 to 255
            x /restart/no_retry_exit_codes/2 must be a whole number from 0 to 255, not a text
            x /heartbeat/timeout must be from 1s to 1d
            x /heartbeat/progress_timeout must be from 1s to 30d
            x /heartbeat/required must be true or false, not a number
            x /checkpoint/every_steps 0 means by time only: give checkpoint.every too, or a number of steps
            x /checkpoint/keep must be a whole number from 1 to 1000
            x /data/shards/0 must be an absolute path, one that starts with `/`, or be in a store, like "s3://bucket/text/" or "s3://bucket/text/*.txt"
            x /time_limit must be from 1s to 36500d
        "#]],
    );
}

#[test]
fn log_metrics_must_compile_and_hold_a_number() {
    check(
        json!({"log_metrics": [{"pattern": "loss=(", "field": "loss"}, {"pattern": "loss", "field": "a b"}, {"field": "x"}, 3,
               {"pattern": "(((a{1000}){1000}){1000})", "field": "x", "extra": 1}, {"pattern": "s=(\\d+)", "field": "step"}]}),
        expect![[r#"
            x /log_metrics/0/pattern is not a regular expression: unclosed group
            x /log_metrics/1/pattern must have a group that holds the number, like `loss=([0-9.]+)`
            x /log_metrics/1/field must be 1 to 64 ASCII letters, digits, `.`, `_`, `-` and `/`
            x /log_metrics/2/pattern must be given
            x /log_metrics/3 must be an object, not a number
            x /log_metrics/4/pattern is not a regular expression: Compiled regex exceeds size limit of 1048576 bytes.
            x /log_metrics/4/extra is not a known field
        "#]],
    );
}

#[test]
fn log_policies_are_read_and_their_faults_named() {
    let body = json!({"log_policies": [{"name": "ecc", "pattern": "(?i)uncorrectable ECC", "action": "exclude_node"},
                                       {"name": null, "pattern": "assert", "action": "cancel_retries"}]});
    let policy = |name: Option<&str>, pattern: &str, action| LogPolicy { name: name.map(Into::into), pattern: pattern.into(), action };
    assert_eq!(
        parse(&body).expect("well formed").log_policies,
        [policy(Some("ecc"), "(?i)uncorrectable ECC", LogAction::ExcludeNode), policy(None, "assert", LogAction::CancelRetries)]
    );
    check(
        json!({"log_policies": [{"pattern": "a(", "action": "restart"}, {"pattern": "x*"}, {"action": "exclude_node", "name": "a/b"}, "ECC",
               {"pattern": "((a{500}){500})", "action": "exclude_node", "actions": 1}, {"pattern": "", "action": 3}]}),
        expect![[r#"
            x /log_policies/0/pattern is not a regular expression: unclosed group
            x /log_policies/0/action must be one of "exclude_node", "cancel_retries"
            x /log_policies/1/action must be given
            x /log_policies/1/pattern matches an empty line, so it would match any output: write what the line must hold
            x /log_policies/2/pattern must be given
            x /log_policies/2/name must be 1 to 128 letters, digits, `.`, `_`, `-` and spaces, and not blank
            x /log_policies/3 must be an object, not a text
            x /log_policies/4/pattern is not a regular expression: Compiled regex exceeds size limit of 262144 bytes.
            x /log_policies/4/actions is not a known field: did you mean `action`?
            x /log_policies/5/pattern matches an empty line, so it would match any output: write what the line must hold
            x /log_policies/5/action must be one of "exclude_node", "cancel_retries"
        "#]],
    );
    let many: Vec<Value> = (0..17).map(|_| json!({"pattern": "x", "action": "exclude_node"})).collect();
    check(
        json!({"log_policies": many}),
        expect![[r#"
            x /log_policies has 17 entries: at most 16 are allowed
        "#]],
    );
    check(
        json!({"log_policies": {"pattern": "x"}, "log_policy": [], "restart": {"log_policies": []}}),
        expect![[r#"
            x /log_policies must be a list, not an object
            x /restart/log_policies is not a known field
            x /log_policy is not a known field
        "#]],
    );
}

#[test]
fn labels_and_resume_from_are_checked() {
    let labels: serde_json::Map<String, Value> = (0..65).map(|i| (format!("k{i}"), json!("v"))).collect();
    check(
        json!({"labels": labels, "resume_from": "../x"}),
        expect![[r#"
            x /labels has 65 entries: at most 64 are allowed
            x /resume_from must be a job id (26 lower-case characters), an absolute path without `..`, or a place in a store
        "#]],
    );
    check(
        json!({"labels": {"": "x", "team": 3, "a/b": "fine", "c": "x\n"}, "resume_from": "/a/../b"}),
        expect![[r#"
            x /labels/ a label's name must be 1 to 63 letters, digits, `.`, `_`, `-` and `/`
            x /labels/c a label's value must be at most 256 characters without control characters
            x /labels/team must be a text in quotes, not a number
            x /resume_from must be a job id (26 lower-case characters), an absolute path without `..`, or a place in a store
        "#]],
    );
    let id = JobId::from_parts(1, 2).to_string();
    assert_eq!(parse(&json!({"resume_from": id})).expect("an id").resume_from, Some(id));
}

#[test]
fn a_body_that_is_not_an_object_is_told_so() {
    check(
        json!([]),
        expect![[r#"
            x  must be an object like {"world_size": 4}, not a list
        "#]],
    );
}

#[test]
fn faults_are_bounded() {
    let body: serde_json::Map<String, Value> = (0..10_000).map(|i| (format!("unknown{i}"), json!(1))).collect();
    let faults = parse(&Value::Object(body)).expect_err("unknown fields");
    assert_eq!(faults.len(), FAULTS_MAX + 1);
}

#[test]
fn the_hint_table_names_fields_that_exist() {
    for (section, fields) in SECTIONS {
        for field in fields {
            let body = json!({section: {*field: {"no": "value"}}});
            let text = faults(body);
            assert!(!text.contains(&format!("/{section}/{field} is not a known field")), "{text}");
        }
    }
}

#[test]
fn which_nodes_a_job_may_go_to_is_read_and_its_faults_named() {
    let body = json!({"node_selector": {"zone": "x"}, "resources": {"gpu_memory": "8Gi"},
        "tolerations": [{"key": "team", "value": "vision"}, {"key": "old"}, {"key": "old"}]});
    let spec = parse(&body).expect("well formed");
    assert_eq!((spec.node_selector["zone"].as_str(), spec.resources.gpu_memory), ("x", 8 << 30));
    let toleration = |key: &str, value: Option<&str>| crate::job::Toleration { key: key.into(), value: value.map(Into::into) };
    assert_eq!(spec.tolerations, [toleration("old", None), toleration("team", Some("vision"))]);
    check(
        json!({"node_selector": {"a b": "x", "zone": 5}, "tolerations": [{"value": "x"}, {"key": "", "value": 1}, "old"],
            "resources": {"gpu_memory": "lots"}}),
        expect![[r#"
            x /resources/gpu_memory must be a number of bytes up to 1125899906842624 or a size like "2Gi", "500Mi" or "2G"
            x /node_selector/a b a label's name must be 1 to 63 letters, digits, `.`, `_`, `-` and `/`
            x /node_selector/zone must be a text in quotes, not a number
            x /tolerations/0/key is missing: the taint's key, like "reserved-for"
            x /tolerations/1/value must be a text in quotes, not a number
            x /tolerations/1/key a taint's name must be 1 to 63 letters, digits, `.`, `_`, `-` and `/`
            x /tolerations/2 must be an object, not a text
        "#]],
    );
}

#[test]
fn shards_of_a_store_are_read_and_their_faults_named() {
    let read = |data: Value| parse(&json!({"command": ["x"], "data": data})).map(|job| job.data).expect("good");
    let stored = read(json!({"shards": ["s3://b", "file:///mnt/text/*.txt"], "fallback": "/mnt/copy"}));
    assert_eq!((stored.shards.clone(), stored.stream), (vec!["s3://b/".to_string(), "file:///mnt/text/*.txt".into()], false));
    assert_eq!(stored.sources().map(|all| all.len()), Some(2));
    assert!(read(json!({"shards": ["s3://b/x/"], "stream": true})).stream);
    assert!(parse(&json!({"data": {"shards": ["s3://b/x/"]}})).expect("good").data.stream, "the built-in program asks as it goes");
    assert_eq!(read(json!({"shards": ["/a", "/b"]})).sources(), None);
    check(
        json!({"command": ["x"], "data": {"shards": ["s3://b/x/", "/a", "s3://k:s@b/x", "s3://b//x"]}}),
        expect![[r#"
            x /data/shards/2 must not hold credentials: give them in the job's `secrets`
            x /data/shards/3 must have no empty part, `.` or `..` in it
            x /data/shards must be all files of the nodes, or all in stores (file:///folder/ reads a shared folder as one)
        "#]],
    );
    check(
        json!({"command": ["x"], "data": {"shards": ["s3://b/x/", "/a"]}}),
        expect![[r#"
            x /data/shards must be all files of the nodes, or all in stores (file:///folder/ reads a shared folder as one)
        "#]],
    );
    check(
        json!({"command": ["x"], "data": {"shards": ["/a"], "stream": true, "fallback": "/b"}}),
        expect![[r#"
            x /data/stream is for shards in a store: files of the nodes are there already
            x /data/fallback is for shards in a store: leave it out, or give data.shards like "s3://bucket/text/"
        "#]],
    );
    check(
        json!({"data": {"shards": ["s3://b/x/"], "stream": false}}),
        expect![[r#"
            x /data/stream the built-in program always asks for shards as it goes: leave it out
        "#]],
    );
}

#[test]
fn preprocessing_says_what_runs_from_where_and_to_where() {
    let command = json!(["cp", "{input}", "{output}"]);
    let data = json!({"shards": ["s3://b/x/"], "to": "s3://b/y"});
    let read = parse(&json!({"kind": "preprocess", "command": command, "data": data})).expect("good");
    assert_eq!((read.kind, read.restart.scope, read.data.stream), (JobKind::Preprocess, RestartScope::Rank, true));
    let own = parse(&json!({"kind": "preprocess", "command": ["x"], "data": data, "restart": {"scope": "gang"}})).expect("good");
    assert_eq!((own.restart.scope, own.data.stream), (RestartScope::Gang, false));
    check(
        json!({"kind": "preprocess", "resume_from": "s3://b/z", "data": {"to": "s3://k:s@b/y"}}),
        expect![[r#"
            x /command kind preprocess needs it: a program for each shard, with {input} and {output}, or one that goes through EVERLIT_DATA_SHARDS
            x /resume_from kind preprocess has no checkpoints, and never does again what is in data.to: leave it out
            x /data/shards kind preprocess needs it: what is to be read, in a store, like ["s3://bucket/text/"]
            x /data/to must not hold credentials: give them in the job's `secrets`
        "#]],
    );
    check(
        json!({"kind": "preprocess", "command": ["x", "{output}"], "data": {"shards": ["/a"]}}),
        expect![[r#"
        x /command has {output} and no {input}: a program that runs for each shard needs both
        x /data/to kind preprocess needs it: where outputs go, like "s3://bucket/tokens"
        x /data/shards kind preprocess reads from stores, which may be a shared folder like "file:///mnt/text/"
    "#]],
    );
    check(
        json!({"kind": "preprocess", "command": command, "data": {"shards": ["s3://b/x/"], "to": "s3://b/y", "stream": false}}),
        expect![[r#"
            x /data/stream a command with {input} has its shards one by one: leave it out
        "#]],
    );
    check(
        json!({"command": ["x"], "data": {"to": "s3://b/y"}}),
        expect![[r#"
        x /data/to is for kind preprocess: leave it out
    "#]],
    );
}
