//! The engine's state as rows, and back. A row carries a version; a later one than this build knows is refused, never guessed at.

use std::sync::Arc;

use everlit_api::ids::{JobId, NodeId};
use everlit_api::job::JobSpec;
use everlit_api::status::JobState;
use everlit_api::time::Timestamp;

use super::blame::Held;
use super::command::JobRow;
use super::limits::{CHECK_ALL_MS, REGROUP_MAX_MS, SERIES_EVERY_MS};
use super::placement::Node;
use super::progress::Series;
use super::state::{Job, Listing, ROW_VERSION, Ranks};
use super::timers::Timer;
use super::{Config, Engine};

/// A job's row as it was read.
#[derive(Debug, Clone)]
pub struct StoredJob {
    /// Which.
    pub id: JobId,
    /// What was submitted, JSON.
    pub spec: String,
    /// The engine's own state, JSON.
    pub body: String,
    /// The ranks' ends, JSON; only of a final job.
    pub ranks: Option<String>,
    /// The time series, JSON; read for active jobs only.
    pub series: Option<String>,
    /// What its data in a store was when it was listed, JSON; read for active jobs only.
    pub listing: Option<String>,
}

/// A node's row as it was read.
#[derive(Debug, Clone)]
pub struct StoredNode {
    /// Which.
    pub id: NodeId,
    /// No new ranks.
    pub cordoned: bool,
    /// What is held against it and its GPUs, JSON.
    pub blames: Option<String>,
}

impl Job {
    /// The series is due to be written: news of it are older than a crash may cost.
    pub(super) fn series_is_due(&self, now: Timestamp) -> bool {
        let newest = self.series.points().last().map(|point| point.time);
        newest.is_some_and(|at| at > self.series_kept_at) && now.since_ms(self.series_kept_at) >= SERIES_EVERY_MS
    }

    /// What is made durable of it; the series goes along when it is due.
    pub(super) fn make_row(&mut self, now: Timestamp, fresh: bool) -> JobRow {
        let text = |value: Result<String, serde_json::Error>| value.expect("the engine's types are plain data with text keys");
        let is_final = self.state.is_final();
        let with_series = self.series_is_due(now) || (is_final && !self.series.points().is_empty());
        if with_series {
            self.series_kept_at = now;
        }
        let listing = self.listing.as_mut().and_then(|listing| std::mem::take(&mut listing.is_new).then_some(&listing.shards));
        let listing = listing.map(|shards| text(serde_json::to_string(&**shards)));
        JobRow {
            id: self.id,
            state: self.state,
            finished_at: self.finished_at,
            spec: fresh.then(|| self.spec.clone()),
            user: self.user.clone().filter(|_| fresh),
            body: text(serde_json::to_string(self)),
            ranks: is_final.then(|| text(serde_json::to_string(&self.ranks))),
            series: with_series.then(|| text(serde_json::to_string(self.series.points()))),
            listing,
            delete: is_final && self.delete_when_final,
        }
    }
}

/// A job from its row.
pub fn read_job(row: &StoredJob) -> Result<Job, String> {
    let refuse = |what: &str, e: serde_json::Error| format!("job {}: {what} can not be read: {e}", row.id);
    let mut job: Job = serde_json::from_str(&row.body).map_err(|e| refuse("its state", e))?;
    if job.version > ROW_VERSION {
        return Err(format!("job {} was written by a later everlit (row version {}, this build knows {ROW_VERSION})", row.id, job.version));
    }
    job.id = row.id;
    let spec: JobSpec = serde_json::from_str(&row.spec).map_err(|e| refuse("its spec", e))?;
    job.ranks = match &row.ranks {
        Some(ranks) => serde_json::from_str(ranks).map_err(|e| refuse("its ranks", e))?,
        None => job.gang.as_ref().map_or_else(Ranks::default, |gang| Ranks::pending(gang.size())),
    };
    // Numbers for a curve: what can not be read of them stops no job.
    let points = row.series.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    job.series = Series::restore(points);
    let listing = row.listing.as_deref().map(serde_json::from_str).transpose().map_err(|e| refuse("its data's listing", e))?;
    job.listing = listing.map(|shards| Listing { shards: Arc::new(shards), is_new: false });
    job.spec = Arc::new(spec);
    Ok(job)
}

impl Engine {
    /// From the rows of every active job and every node, as of `now`. Nodes count as silent from now on until they say `Hello`.
    pub fn load(config: Config, now: Timestamp, jobs: &[StoredJob], nodes: &[StoredNode]) -> Result<Self, String> {
        let mut engine = Self::new(config);
        for node in nodes {
            // What can not be read of them keeps no coordinator from its start: nodes are only avoided by it.
            let held: Held = node.blames.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
            let held = held.fresh(now);
            if !node.cordoned && held.is_empty() {
                // Nothing of it matters any more, and it may have gone for good.
                continue;
            }
            let (blames, gpu_blames) = (held.node, held.gpus);
            engine.nodes.insert(node.id.clone(), Node { cordoned: node.cordoned, blames, gpu_blames, ..Node::default() });
            engine.await_blames(&node.id);
        }
        for row in jobs {
            let job = read_job(row)?;
            engine.load_job(now, job);
        }
        let names: Vec<NodeId> = engine.nodes.keys().cloned().collect();
        for node in names {
            engine.timers.set(Timer::NodeLost(node), Timestamp(now.0 + engine.config.node_timeout_ms));
        }
        if !(engine.config.ports.0..=engine.config.ports.1).contains(&engine.next_port) {
            engine.next_port = engine.config.ports.0;
        }
        engine.timers.set(Timer::CheckAll, Timestamp(now.0 + CHECK_ALL_MS));
        engine.check_all();
        Ok(engine)
    }

    fn load_job(&mut self, now: Timestamp, mut job: Job) {
        let id = job.id;
        job.series_kept_at = now;
        let need = job.need();
        if job.state == JobState::Queued {
            self.queue.push(id, job.spec.priority, need);
        } else if let Some(gang) = &job.gang {
            self.ports.insert(gang.port);
            self.next_port = self.next_port.max(gang.port.saturating_add(1));
            if gang.placed() < job.spec.world_size {
                self.short.insert(id);
            }
            self.placed.insert(id);
            for (name, taken) in job.held() {
                self.nodes.entry(name.clone()).or_default().take(&taken);
            }
        }
        if let Some(regroup) = job.gang.as_ref().and_then(|gang| gang.regroup.as_ref()) {
            // It may be over, and nobody has heard so yet; and the clock may have been set while nobody looked.
            let heard_by = Timestamp(now.0 + 3 * self.config.node_timeout_ms);
            self.timers.set(Timer::Regroup(id), Timestamp(regroup.since.0 + REGROUP_MAX_MS).max(heard_by));
        }
        for gang in job.gang.iter().filter(|gang| gang.ending.is_none()) {
            let waits = gang.restarts.iter().filter_map(|(rank, own)| Some((*rank, own.retry_at?)));
            waits.for_each(|(rank, at)| self.timers.set(Timer::RankRetry(id, rank), at));
        }
        if job.gang.as_ref().is_some_and(|gang| gang.size() < gang.placed()) {
            // Whether one waits to join already, or was to be tried later: trying now asks for nothing twice.
            self.timers.set(Timer::Grow(id), now);
        }
        if let Some(limit) = job.spec.time_limit
            && let Some(since) = job.started_at.or(job.gang.as_ref().map(|g| g.placed_at))
        {
            self.timers.set(Timer::TimeLimit(id), Timestamp(since.0 + limit.0));
        }
        if let Some(at) = job.retry_at {
            // Every rank of the failed attempt had ended when this was recorded.
            job.ranks.mark_all_ended(now);
            self.timers.set(Timer::Retry(id), at);
        }
        self.jobs.insert(id, job);
    }
}
