//! Verbs against a small stand-in for a coordinator: what they ask for, and what they make of the answers.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use clap::Parser;
use everlit_api::client::Client;
use everlit_api::ids::JobId;
use everlit_api::job::{JobKind, JobSpec, Priority};
use everlit_api::problem::{Code, Problem};
use everlit_api::status::{JobState, JobView, Page};
use everlit_api::time::Timestamp;
use serde_json::Value;

use super::{Cli, find, run, stop_all_jobs};

#[derive(Default)]
struct Jobs {
    jobs: Vec<JobView>,
    stops: Vec<JobId>,
    submitted: Vec<Value>,
}

type Shared = Arc<Mutex<Jobs>>;

fn view(number: u128, name: &str, state: JobState) -> JobView {
    JobView {
        job_id: JobId::from_parts(1_767_225_600_000 + number as u64, number << 70 | number),
        name: (!name.is_empty()).then(|| name.into()),
        kind: JobKind::Train,
        state,
        user: None,
        priority: Priority::Normal,
        labels: BTreeMap::new(),
        world_size: 1,
        attempt: 1,
        restarts: 0,
        submitted_at: Timestamp::now(),
        started_at: None,
        finished_at: None,
        reason: None,
        spec: Some(JobSpec::default_for(1)),
    }
}

async fn list(State(shared): State<Shared>, Query(query): Query<HashMap<String, String>>) -> Json<Page<JobView>> {
    let mut jobs = shared.lock().expect("lock");
    let states = query.get("state").cloned().unwrap_or_default();
    let fits = |job: &&JobView| {
        (states.is_empty() || states.split(',').any(|state| state == job.state.as_str()))
            && query.get("name").is_none_or(|name| job.name.as_ref() == Some(name))
            && query.get("after").is_none_or(|after| job.job_id.to_string() < *after)
    };
    let all: Vec<JobView> = jobs.jobs.iter().filter(fits).cloned().collect();
    // Pages of two, whatever was asked for, so that every caller must go on.
    let data: Vec<JobView> = all.iter().take(2).cloned().collect();
    let page = Page { first_id: None, last_id: data.last().map(|job| job.job_id.to_string()), has_more: all.len() > 2, data };
    for job in jobs.jobs.iter_mut().filter(|job| job.state == JobState::Stopping) {
        job.state = JobState::Stopped;
    }
    Json(page)
}

async fn stop(State(shared): State<Shared>, Path(id): Path<String>) -> Response {
    let mut jobs = shared.lock().expect("lock");
    let id: JobId = id.parse().expect("an id");
    jobs.stops.push(id);
    let job = jobs.jobs.iter_mut().find(|job| job.job_id == id).expect("known");
    if job.state.is_final() {
        return (StatusCode::CONFLICT, Json(Problem::new(Code::Conflict, "final"))).into_response();
    }
    job.state = JobState::Stopping;
    Json(job.clone()).into_response()
}

async fn one(State(shared): State<Shared>, Path(id): Path<String>) -> Json<JobView> {
    let mut jobs = shared.lock().expect("lock");
    let job = jobs.jobs.iter_mut().find(|job| job.job_id.to_string() == id).expect("known");
    if job.state == JobState::Stopping {
        job.state = JobState::Stopped;
    }
    Json(job.clone())
}

async fn submit(State(shared): State<Shared>, Json(body): Json<Value>) -> impl IntoResponse {
    let mut jobs = shared.lock().expect("lock");
    jobs.submitted.push(body);
    (StatusCode::CREATED, Json(view(99, "new", JobState::Queued)))
}

/// Newest first: 5 to 1.
async fn house() -> (Shared, Client) {
    let states = [JobState::Running, JobState::Queued, JobState::Failed, JobState::Running, JobState::Recovering];
    let names = ["a", "b", "twice", "twice", ""];
    let jobs = (1..=5).rev().map(|n: u128| view(n, names[n as usize - 1], states[n as usize - 1])).collect();
    let shared = Arc::new(Mutex::new(Jobs { jobs, ..Jobs::default() }));
    let routes = Router::new().route("/jobs", get(list).post(submit)).route("/jobs/{id}", get(one)).route("/jobs/{id}/stop", post(stop));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    tokio::spawn(axum::serve(listener, routes.with_state(shared.clone())).into_future());
    (shared, Client::new(&url, None, None).expect("a client"))
}

#[tokio::test]
async fn a_job_is_found_by_what_people_call_it() {
    let (shared, client) = house().await;
    let ids: Vec<JobId> = shared.lock().expect("lock").jobs.iter().map(|job| job.job_id).collect();
    let oldest = ids[4].to_string();
    assert_eq!(find::job(&client, &oldest).await.expect("by id"), ids[4]);
    assert_eq!(find::job(&client, "last").await.expect("the newest"), ids[0]);
    assert_eq!(find::job(&client, "a").await.expect("by name"), ids[4]);
    // The oldest is on the last page.
    assert_eq!(find::job(&client, &oldest[oldest.len() - 5..]).await.expect("by its end"), ids[4]);
    assert_eq!(find::job(&client, &oldest[..12].to_uppercase()).await.expect("by its beginning"), ids[4]);
    let twice = find::job(&client, "twice").await.expect_err("two jobs").to_string();
    assert!(twice.contains("more than one") && twice.contains(&ids[1].to_string()) && twice.contains(&ids[2].to_string()), "{twice}");
    let both = find::job(&client, &oldest[..5]).await.expect_err("all jobs").to_string();
    assert!(both.contains("more than one"), "{both}");
    for none in ["zzzzzz", "no", "../x"] {
        assert!(find::job(&client, none).await.expect_err("no job").to_string().contains("everlit ls"), "{none}");
    }
}

#[tokio::test]
async fn all_jobs_are_stopped_once_and_waited_for() {
    let (shared, client) = house().await;
    assert_eq!(stop_all_jobs(&client).await.expect("stopped"), 4);
    let jobs = shared.lock().expect("lock");
    assert_eq!(jobs.stops.len(), 4);
    assert!(jobs.jobs.iter().all(|job| job.state.is_final()));
}

#[tokio::test]
async fn verbs_do_what_they_say() {
    let (shared, client) = house().await;
    let verb =
        async |line: &str| run(Cli::try_parse_from(format!("everlit --url {} {line}", client.url()).split(' ')).expect("sound")).await;
    verb("submit -n 3 --set worker.steps=9").await.expect("submitted");
    verb("resume b --name again").await.expect("submitted");
    verb("stop --wait a").await.expect("stopped");
    verb("ls --all").await.expect("listed");
    verb("-o json ls").await.expect("listed");
    assert_eq!(
        verb("purge --older-than 1d --state running").await.expect_err("not final").to_string(),
        "--state running: only final jobs can be removed (succeeded, failed, stopped)"
    );
    assert!(verb("get nobody").await.is_err());
    let jobs = shared.lock().expect("lock");
    assert_eq!(jobs.submitted[0].to_string(), r#"{"worker":{"steps":9},"world_size":3}"#);
    let resumed = &jobs.submitted[1];
    assert_eq!((&resumed["name"], &resumed["resume_from"]), (&"again".into(), &jobs.jobs[3].job_id.to_string().into()));
}
