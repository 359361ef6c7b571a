//! One method per call of the REST API (CONTRACT section 6).

use bytes::Bytes;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE};
use reqwest::{Method, Response};
use serde_json::{Value, json};

use super::{Client, Error, PATIENT_MAX, segment};
use crate::auth::{AuditView, Caller, MadeToken, NewToken, TokenView};
use crate::ids::{JobId, NodeId};
use crate::join::{MadeNodeToken, NewNodeToken, NodeTokenView};
use crate::package::{PackageView, Packed};
use crate::problem::Code;
use crate::request::{DrainRequest, PurgeRequest, Purged, StopRequest};
use crate::status::{
    AttemptView, CheckpointView, EventView, Explanation, JobState, JobView, MetricPoint, NodeView, Page, PlacementPlan, StatusView, Summary,
};
use crate::time::Millis;

/// Which part of a list of jobs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListRequest {
    /// Entries per page; the coordinator's default when null.
    pub limit: Option<u32>,
    /// Go on after this cursor.
    pub after: Option<String>,
    /// Only these states; empty means all.
    pub states: Vec<JobState>,
    /// Only jobs of this name.
    pub name: Option<String>,
    /// Only jobs with all these labels.
    pub labels: Vec<(String, String)>,
}

impl ListRequest {
    fn query(&self) -> Vec<(&'static str, String)> {
        let mut query = Vec::new();
        query.extend(self.limit.map(|limit| ("limit", limit.to_string())));
        query.extend(self.after.clone().map(|after| ("after", after)));
        if !self.states.is_empty() {
            query.push(("state", self.states.iter().map(|state| state.as_str()).collect::<Vec<_>>().join(",")));
        }
        query.extend(self.name.clone().map(|name| ("name", name)));
        query.extend(self.labels.iter().map(|(key, value)| ("label", format!("{key}={value}"))));
        query
    }
}

/// Which part of a log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogRequest {
    /// Of this rank only.
    pub rank: Option<u32>,
    /// Of this attempt only.
    pub attempt: Option<u32>,
    /// Only the last so many lines.
    pub tail: Option<u64>,
}

impl LogRequest {
    pub(super) fn query(&self) -> Vec<(&'static str, String)> {
        let mut query = Vec::new();
        query.extend(self.rank.map(|rank| ("rank", rank.to_string())));
        query.extend(self.attempt.map(|attempt| ("attempt", attempt.to_string())));
        query.extend(self.tail.map(|tail| ("tail", tail.to_string())));
        query
    }
}

/// A log as raw bytes, as they come.
#[derive(Debug)]
pub struct LogText {
    client: Client,
    response: Response,
}

impl LogText {
    /// The next bytes; `None` at the end. A log that could not be read to its end is an error.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        self.response.chunk().await.map_err(|error| self.client.broken(&error))
    }
}

impl Client {
    /// Whether a package is there.
    pub async fn package(&self, package: &str) -> Result<Option<PackageView>, Error> {
        match self.json(self.get(&format!("/packages/{}", segment(package)))).await {
            Ok(kept) => Ok(Some(kept)),
            Err(Error::Problem(problem)) if problem.code == Code::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Uploads a packed folder.
    pub async fn put_package(&self, packed: Packed) -> Result<PackageView, Error> {
        let file = tokio::fs::File::from_std(packed.file);
        let request = self.request(Method::PUT, &format!("/packages/{}", packed.package)).header(CONTENT_TYPE, "application/gzip");
        self.json_within(request.header(CONTENT_LENGTH, packed.bytes).body(file), PATIENT_MAX).await
    }

    /// Submits a job. With a key, a repeated call answers with the job that the first one made.
    pub async fn submit(&self, job: &Value, idempotency_key: Option<&str>) -> Result<JobView, Error> {
        let mut request = self.post("/jobs", job);
        if let Some(key) = idempotency_key {
            request = request.header("idempotency-key", key);
        }
        self.json(request).await
    }

    /// What would happen to a job now.
    pub async fn plan(&self, job: &Value) -> Result<PlacementPlan, Error> {
        self.json(self.post("/jobs", job).query(&[("dry_run", "true")])).await
    }

    /// Jobs, newest first.
    pub async fn jobs(&self, list: &ListRequest) -> Result<Page<JobView>, Error> {
        self.json(self.get("/jobs").query(&list.query())).await
    }

    /// One job with its spec.
    pub async fn job(&self, id: JobId) -> Result<JobView, Error> {
        self.json(self.get(&format!("/jobs/{id}"))).await
    }

    /// One job's progress.
    pub async fn summary(&self, id: JobId) -> Result<Summary, Error> {
        self.json(self.get(&format!("/jobs/{id}/summary"))).await
    }

    /// Summaries, newest first.
    pub async fn summaries(&self, list: &ListRequest) -> Result<Page<Summary>, Error> {
        self.json(self.get("/jobs/summaries").query(&list.query())).await
    }

    /// Stops an active job; `force` skips the grace.
    pub async fn stop(&self, id: JobId, force: bool) -> Result<JobView, Error> {
        self.json(self.post(&format!("/jobs/{id}/stop"), &StopRequest { force })).await
    }

    /// Restarts the gang of an active job.
    pub async fn restart(&self, id: JobId) -> Result<JobView, Error> {
        self.json(self.post(&format!("/jobs/{id}/restart"), &json!({}))).await
    }

    /// Has the ranks of a running job save now.
    pub async fn checkpoint(&self, id: JobId) -> Result<JobView, Error> {
        self.json(self.post(&format!("/jobs/{id}/checkpoint"), &json!({}))).await
    }

    /// Removes a job with all its files.
    pub async fn delete(&self, id: JobId, stop_first: bool, force: bool) -> Result<JobView, Error> {
        let query = [("stop_first", stop_first.to_string()), ("force", force.to_string())];
        self.json_within(self.request(Method::DELETE, &format!("/jobs/{id}")).query(&query), PATIENT_MAX).await
    }

    /// Removes final jobs.
    pub async fn purge(&self, purge: &PurgeRequest) -> Result<Purged, Error> {
        self.json_within(self.post("/jobs/purge", purge), PATIENT_MAX).await
    }

    /// A job's log as raw bytes; with `follow` until the job is final.
    pub async fn logs(&self, id: JobId, log: &LogRequest, follow: bool) -> Result<LogText, Error> {
        let request = self.get(&format!("/jobs/{id}/logs")).query(&log.query()).query(&[("follow", follow)]);
        Ok(LogText { client: self.clone(), response: self.send(request).await? })
    }

    /// A page of a job's events, oldest first.
    pub async fn events(&self, id: JobId, limit: u32, after: Option<&str>) -> Result<Page<EventView>, Error> {
        let query = std::iter::once(("limit", limit.to_string())).chain(after.map(|after| ("after", after.to_string())));
        self.json(self.get(&format!("/jobs/{id}/events")).query(&query.collect::<Vec<_>>())).await
    }

    /// A job's attempts, oldest first.
    pub async fn attempts(&self, id: JobId) -> Result<Page<AttemptView>, Error> {
        self.json(self.get(&format!("/jobs/{id}/attempts")).query(&[("limit", 500)])).await
    }

    /// A job's checkpoints, newest first.
    pub async fn checkpoints(&self, id: JobId) -> Result<Page<CheckpointView>, Error> {
        self.json(self.get(&format!("/jobs/{id}/checkpoints")).query(&[("limit", 500)])).await
    }

    /// A job's time series from a step on, oldest first.
    pub async fn metrics(&self, id: JobId, since_step: u64) -> Result<Page<MetricPoint>, Error> {
        self.json(self.get(&format!("/jobs/{id}/metrics")).query(&[("since_step", since_step)])).await
    }

    /// Why a job is not running.
    pub async fn explain(&self, id: JobId) -> Result<Explanation, Error> {
        self.json(self.get(&format!("/jobs/{id}/explain"))).await
    }

    /// Nodes in name order.
    pub async fn nodes(&self) -> Result<Page<NodeView>, Error> {
        self.json(self.get("/nodes").query(&[("limit", 500)])).await
    }

    /// One node.
    pub async fn node(&self, id: &NodeId) -> Result<NodeView, Error> {
        self.json(self.get(&format!("/nodes/{}", segment(&id.0)))).await
    }

    /// Gives a node no new ranks.
    pub async fn cordon(&self, id: &NodeId) -> Result<NodeView, Error> {
        self.act_on_node(id, "cordon").await
    }

    /// Gives a node new ranks again.
    pub async fn uncordon(&self, id: &NodeId) -> Result<NodeView, Error> {
        self.act_on_node(id, "uncordon").await
    }

    /// Empties a node: its jobs go back in the queue. What lives at the deadline is killed.
    pub async fn drain(&self, id: &NodeId, deadline: Option<Millis>) -> Result<NodeView, Error> {
        let request = self.post(&format!("/nodes/{}/drain", segment(&id.0)), &DrainRequest { deadline });
        self.json_within(request, PATIENT_MAX).await
    }

    async fn act_on_node(&self, id: &NodeId, act: &str) -> Result<NodeView, Error> {
        self.json_within(self.post(&format!("/nodes/{}/{act}", segment(&id.0)), &json!({})), PATIENT_MAX).await
    }

    /// The version of the coordinator, which anybody may know.
    pub async fn version(&self) -> Result<String, Error> {
        let told: Value = self.json(self.get("/status")).await?;
        let version = told["version"].as_str().map(Into::into);
        version.ok_or_else(|| Error::Broken(format!("{} answers, but is no coordinator", self.url())))
    }

    /// What the coordinator does. Doors with locks tell that only to who has a token.
    pub async fn status(&self) -> Result<StatusView, Error> {
        let told: Value = self.json(self.get("/status")).await?;
        if told.get("nodes").is_none() {
            let version = told["version"].as_str().unwrap_or_default();
            let text = format!("the coordinator at {} (everlit {version}) tells more only with a token: set EVERLIT_TOKEN", self.url());
            return Err(Error::Broken(text));
        }
        serde_json::from_value(told).map_err(|bad| Error::Broken(format!("{} answered what this client can not read: {bad}", self.url())))
    }

    /// Whether it lives.
    pub async fn health(&self) -> Result<(), Error> {
        self.text(self.get("/health")).await.map(|_| ())
    }

    /// Whether it is ready.
    pub async fn ready(&self) -> Result<(), Error> {
        self.text(self.get("/readyz")).await.map(|_| ())
    }

    /// Who this client is.
    pub async fn whoami(&self) -> Result<Caller, Error> {
        self.json(self.get("/whoami")).await
    }

    /// Makes a token: the answer has its secret, this once.
    pub async fn create_token(&self, wanted: &NewToken) -> Result<MadeToken, Error> {
        self.json(self.post("/tokens", wanted)).await
    }

    /// Tokens, newest first.
    pub async fn tokens(&self) -> Result<Page<TokenView>, Error> {
        self.json(self.get("/tokens").query(&[("limit", 500)])).await
    }

    /// Has a token open nothing any more.
    pub async fn revoke_token(&self, id: &str) -> Result<TokenView, Error> {
        self.json(self.request(Method::DELETE, &format!("/tokens/{}", segment(id)))).await
    }

    /// Makes a token that servers join with: the answer has its secret, this once.
    pub async fn create_join_token(&self, wanted: &NewNodeToken) -> Result<MadeNodeToken, Error> {
        self.json(self.post("/join-tokens", wanted)).await
    }

    /// Join tokens, newest first.
    pub async fn join_tokens(&self) -> Result<Page<NodeTokenView>, Error> {
        self.json(self.get("/join-tokens").query(&[("limit", 500)])).await
    }

    /// Has nobody join with a token any more.
    pub async fn revoke_join_token(&self, id: &str) -> Result<NodeTokenView, Error> {
        self.json(self.request(Method::DELETE, &format!("/join-tokens/{}", segment(id)))).await
    }

    /// Expels a node; `force`: also while ranks are placed there.
    pub async fn expel(&self, id: &NodeId, force: bool) -> Result<NodeView, Error> {
        self.json(self.request(Method::DELETE, &format!("/nodes/{}", segment(&id.0))).query(&[("force", force)])).await
    }

    /// Who asked for what, newest first.
    pub async fn audit(&self, limit: u32, user: Option<&str>) -> Result<Page<AuditView>, Error> {
        let query = std::iter::once(("limit", limit.to_string())).chain(user.map(|user| ("user", user.to_string())));
        self.json(self.get("/audit").query(&query.collect::<Vec<_>>())).await
    }

    /// Its metrics as Prometheus reads them.
    pub async fn prometheus(&self) -> Result<String, Error> {
        self.text(self.get("/metrics")).await
    }
}
