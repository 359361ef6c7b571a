//! A job that resumes another goes on with what that one trained: the same model, data, global batch and schedule.
//!
//! Works on JSON, before [`super::parse`], because only there can "not given" be told from "given as the default". What the new body gives
//! wins. Where tensors live and how a rank cuts its share of the batch are no part of what is trained, so these are not taken over.

use serde_json::{Map, Value};

use super::JobSpec;
use crate::ids::JobId;

/// Fields of `worker` that stay with the old job.
const OWN: [&str; 2] = ["device", "micro_batch_size"];

/// The job that a body resumes from, if it names one and runs the built-in program.
pub fn resumes(body: &Value) -> Option<JobId> {
    let is_given = |name: &str| body.get(name).is_some_and(|value| !value.is_null());
    if is_given("command") {
        return None;
    }
    body.get("resume_from")?.as_str()?.parse().ok()
}

/// The body with what it does not give taken from the job that it resumes.
pub fn inherit(mut body: Value, old: &JobSpec) -> Value {
    let (Some(map), Some(worker)) = (body.as_object_mut(), &old.worker) else { return body };
    let Ok(Value::Object(mut known)) = serde_json::to_value(worker) else { return body };
    known.retain(|name, _| !OWN.contains(&name.as_str()));
    if let Some(given) = section(map, "worker") {
        // A limit that was right for the old value need not be for a new one.
        for (limit, of) in [("warmup_steps", "steps"), ("min_learning_rate", "learning_rate")] {
            let new = given.get(of).and_then(Value::as_f64);
            let old = known.get(limit).and_then(Value::as_f64);
            if new.zip(old).is_some_and(|(new, old)| new < old) {
                known.remove(limit);
            }
        }
        fill(given, known);
    }
    if !old.data.shards.is_empty()
        && let Some(given) = section(map, "data")
    {
        if given.get("shards").is_none_or(Value::is_null)
            && let Some(fallback) = &old.data.fallback
        {
            fill(given, Map::from_iter([("fallback".to_string(), Value::from(fallback.clone()))]));
        }
        fill(given, Map::from_iter([("shards".to_string(), Value::from(old.data.shards.clone()))]));
    }
    body
}

/// An object of the body, made when it is not given; `None` when it is something else.
fn section<'b>(body: &'b mut Map<String, Value>, name: &str) -> Option<&'b mut Map<String, Value>> {
    let value = body.entry(name).or_insert(Value::Null);
    if value.is_null() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut()
}

fn fill(given: &mut Map<String, Value>, known: Map<String, Value>) {
    for (name, value) in known {
        let own = given.entry(name).or_insert(Value::Null);
        if own.is_null() {
            *own = value;
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use serde_json::json;

    use super::*;
    use crate::job::{BatchSize, parse};

    fn old() -> JobSpec {
        let body = json!({"world_size": 4, "data": {"shards": ["/s/1", "/s/2"]}, "worker": {"model": "llama-10m", "data": "/t", "steps": 500,
            "batch_size": 64, "micro_batch_size": 2, "sequence_length": 64, "learning_rate": 0.01, "warmup_steps": 50, "min_learning_rate": 0.001,
            "weight_decay": 0.5, "max_grad_norm": 2, "seed": 9, "dropout": 0.1, "precision": "bfloat16", "device": "cpu"}});
        parse(&body).unwrap()
    }

    #[test]
    fn what_is_not_given_goes_on_as_it_was() {
        let merged = inherit(json!({"world_size": 2, "resume_from": "x"}), &old());
        expect![[r#"
            {
              "data": {
                "shards": [
                  "/s/1",
                  "/s/2"
                ]
              },
              "resume_from": "x",
              "worker": {
                "activation_checkpointing": false,
                "batch_size": 64,
                "data": "/t",
                "deterministic": false,
                "dropout": 0.1,
                "evaluation": {
                  "every_steps": 0,
                  "samples": 0
                },
                "learning_rate": 0.01,
                "max_grad_norm": 2.0,
                "min_learning_rate": 0.001,
                "model": "llama-10m",
                "on_nan": "stop",
                "precision": "bfloat16",
                "seed": 9,
                "sequence_length": 64,
                "steps": 500,
                "warmup_steps": 50,
                "weight_decay": 0.5
              },
              "world_size": 2
            }
        "#]]
        .assert_eq(&format!("{merged:#}\n"));
    }

    #[test]
    fn what_is_given_wins_and_limits_that_it_breaks_are_not_taken_over() {
        let body =
            json!({"world_size": 8, "worker": {"seed": null, "steps": 40, "learning_rate": 1e-4, "batch_size": 8}, "data": {"shards": []}});
        let spec = parse(&inherit(body, &old())).unwrap();
        let worker = spec.worker.unwrap();
        assert_eq!((worker.seed, worker.steps, worker.learning_rate, worker.batch_size), (9, 40, 1e-4, BatchSize::Samples(8)));
        assert_eq!((worker.warmup_steps, worker.min_learning_rate, worker.micro_batch_size), (None, None, None));
        assert!(spec.data.shards.is_empty());
    }

    #[test]
    fn only_the_built_in_program_goes_on_with_settings() {
        let id = JobId::from_parts(1, 2);
        assert_eq!(resumes(&json!({"resume_from": id, "command": null})), Some(id));
        for other in [json!({"resume_from": id, "command": ["x"]}), json!({"resume_from": "/c"}), json!({}), json!([])] {
            assert_eq!(resumes(&other), None, "{other}");
        }
        let foreign = JobSpec { worker: None, command: vec!["x".into()], ..JobSpec::default_for(2) };
        assert_eq!(inherit(json!({}), &foreign), json!({}));
        // What is wrong stays wrong, for the reader to name.
        assert_eq!(inherit(json!({"worker": 3}), &JobSpec::default_for(2)), json!({"worker": 3}));
    }
}
