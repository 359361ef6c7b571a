//! What Prometheus reads. Names and labels stand here and nowhere else; never a job id, a path or a user as a label.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use everlit_api::status::{GpuCounts, JobState};
use everlit_api::store::Trouble;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::engine::state::Job;
use crate::engine::{Engine, Record};

type Label = Vec<(&'static str, String)>;

/// Every metric of the coordinator.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    events: Family<Label, Counter>,
    jobs: Family<Label, Gauge>,
    ranks: Gauge,
    slow_ranks: Gauge,
    nodes: Family<Label, Gauge>,
    queue: Gauge,
    stale: Gauge,
    foreign: Gauge,
    uploads: Gauge,
    archives: Gauge,
    archive_bytes: Gauge,
    upload_bytes: Gauge,
    store_faults: Family<Label, Gauge>,
    commits: Histogram,
    batch: Histogram,
    commit_failures: Counter,
    uptime: Gauge<f64, AtomicU64>,
    final_jobs: Mutex<BTreeMap<JobState, u64>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("everlit");
        let own = Self {
            registry: Registry::default(),
            events: Family::default(),
            jobs: Family::default(),
            ranks: Gauge::default(),
            slow_ranks: Gauge::default(),
            nodes: Family::default(),
            queue: Gauge::default(),
            stale: Gauge::default(),
            foreign: Gauge::default(),
            uploads: Gauge::default(),
            archives: Gauge::default(),
            archive_bytes: Gauge::default(),
            upload_bytes: Gauge::default(),
            store_faults: Family::default(),
            commits: Histogram::new(exponential_buckets(0.000_25, 2.0, 14)),
            batch: Histogram::new(exponential_buckets(1.0, 2.0, 11)),
            commit_failures: Counter::default(),
            uptime: Gauge::default(),
            final_jobs: Mutex::default(),
        };
        registry.register("events", "Recorded events by name", own.events.clone());
        registry.register("jobs", "Jobs by state, removed ones not counted", own.jobs.clone());
        registry.register("ranks", "Ranks alive", own.ranks.clone());
        registry.register("slow_ranks", "Ranks that are persistently slower than the others of their gang", own.slow_ranks.clone());
        registry.register("nodes", "Nodes by state", own.nodes.clone());
        registry.register("queue_depth", "Jobs that wait for a place", own.queue.clone());
        registry.register("stale_news", "News of past incarnations that were dropped since the start", own.stale.clone());
        registry.register(
            "foreign_news",
            "News of nodes about ranks or files that are not theirs, passed over since the start",
            own.foreign.clone(),
        );
        registry.register("checkpoint_uploads", "Checkpoints put in jobs' stores since the start", own.uploads.clone());
        registry.register("checkpoint_upload_bytes", "Bytes of them that were sent", own.upload_bytes.clone());
        registry.register("log_archives", "Logs put in jobs' stores since the start", own.archives.clone());
        registry.register("log_archive_bytes", "Bytes of logs put in jobs' stores since the start", own.archive_bytes.clone());
        registry.register("checkpoint_store_faults", "Faults of jobs' stores since the start, by kind", own.store_faults.clone());
        registry.register_with_unit("store_commit", "Time of a transaction until it is durable", Unit::Seconds, own.commits.clone());
        registry.register("store_commit_steps", "Engine steps per transaction", own.batch.clone());
        registry.register("store_commit_failures", "Transactions that failed and were tried again", own.commit_failures.clone());
        registry.register_with_unit("uptime", "Since the start", Unit::Seconds, own.uptime.clone());
        Self { registry, ..own }
    }
}

/// What the engine has right now.
#[derive(Debug, Clone, Default)]
pub struct Now {
    /// Active jobs by state.
    pub jobs: BTreeMap<JobState, u64>,
    /// Ranks alive.
    pub ranks: u64,
    /// Ranks that hold their gang up.
    pub slow_ranks: u64,
    /// Connected and lost nodes.
    pub nodes: (u64, u64),
    /// Jobs that wait.
    pub queue: u64,
    /// Dropped news.
    pub stale: u64,
    /// News of nodes about what is not theirs.
    pub foreign: u64,
    /// Checkpoints that were put in stores, and their bytes.
    pub uploads: (u64, u64),
    /// Logs that were put in stores, and their bytes.
    pub archives: (u64, u64),
    /// Faults of stores.
    pub store_faults: BTreeMap<Trouble, u64>,
    /// Since the start.
    pub uptime: Duration,
}

impl Metrics {
    /// Jobs that were there at start.
    pub fn jobs_loaded(&self, state: JobState, count: u64) {
        if state.is_final() {
            self.final_jobs().insert(state, count);
        }
    }

    fn final_jobs(&self) -> std::sync::MutexGuard<'_, BTreeMap<JobState, u64>> {
        self.final_jobs.lock().expect("no panic while holding the lock")
    }

    /// A step's record.
    pub fn note_record(&self, record: &Record) {
        for event in &record.events {
            self.events.get_or_create(&vec![("event", event.event.to_string())]).inc();
        }
        for row in record.jobs.iter().filter(|row| row.state.is_final() && !row.delete) {
            *self.final_jobs().entry(row.state).or_default() += 1;
        }
    }

    /// Final jobs that were removed.
    pub fn jobs_removed(&self, states: impl IntoIterator<Item = JobState>) {
        let mut jobs = self.final_jobs();
        for state in states {
            if let Some(count) = jobs.get_mut(&state) {
                *count = count.saturating_sub(1);
            }
        }
    }

    /// A transaction is durable.
    pub fn committed(&self, took: Duration, steps: usize) {
        self.commits.observe(took.as_secs_f64());
        self.batch.observe(steps as f64);
    }

    /// A transaction failed.
    pub fn commit_failed(&self) {
        self.commit_failures.inc();
    }

    /// Every job by state, with those that the engine has.
    pub fn job_counts(&self, active: &BTreeMap<JobState, u64>) -> BTreeMap<JobState, u64> {
        let finals = self.final_jobs();
        JobState::ALL.into_iter().map(|s| (s, if s.is_final() { finals.get(&s) } else { active.get(&s) }.copied().unwrap_or(0))).collect()
    }

    /// The text that Prometheus reads.
    pub fn text(&self, now: &Now) -> String {
        for (state, count) in self.job_counts(&now.jobs) {
            self.jobs.get_or_create(&vec![("state", state.to_string())]).set(count as i64);
        }
        self.ranks.set(now.ranks as i64);
        self.slow_ranks.set(now.slow_ranks as i64);
        self.queue.set(now.queue as i64);
        self.stale.set(now.stale as i64);
        self.foreign.set(now.foreign as i64);
        self.uploads.set(now.uploads.0 as i64);
        self.archives.set(now.archives.0 as i64);
        self.archive_bytes.set(now.archives.1 as i64);
        self.upload_bytes.set(now.uploads.1 as i64);
        for (trouble, count) in &now.store_faults {
            self.store_faults.get_or_create(&vec![("trouble", trouble.name().to_string())]).set(*count as i64);
        }
        self.nodes.get_or_create(&vec![("state", "ready".to_string())]).set(now.nodes.0 as i64);
        self.nodes.get_or_create(&vec![("state", "lost".to_string())]).set(now.nodes.1 as i64);
        self.uptime.set(now.uptime.as_secs_f64());
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string does not fail");
        text
    }
}

/// What the engine knows of it.
pub(super) fn engine_now(engine: &Engine) -> Now {
    let (uploads, upload_bytes, store_faults) = engine.stores();
    let ready = engine.nodes().values().filter(|n| n.linked).count() as u64;
    Now {
        jobs: engine.counts(),
        ranks: engine.jobs().map(|job| u64::from(job.ranks.alive())).sum(),
        slow_ranks: engine.jobs().map(Job::slow_ranks).sum(),
        nodes: (ready, engine.nodes().len() as u64 - ready),
        queue: engine.queue_depth() as u64,
        stale: engine.stale_news(),
        foreign: engine.foreign_news(),
        uploads: (uploads, upload_bytes),
        archives: engine.archived(),
        store_faults: store_faults.clone(),
        uptime: Duration::ZERO,
    }
}

/// GPUs of the nodes that are linked.
pub(super) fn gpu_counts(engine: &Engine) -> GpuCounts {
    let linked = || engine.nodes().values().filter(|n| n.linked);
    let loads: Vec<f64> = linked().flat_map(|n| n.load.gpus.iter().map(|g| g.utilization)).collect();
    let mean = if loads.is_empty() { 0.0 } else { loads.iter().sum::<f64>() / loads.len() as f64 };
    GpuCounts {
        total: linked().map(|n| n.capacity.gpus.len() as u64).sum(),
        used: linked().map(|n| n.taken.gpus.len() as u64).sum(),
        utilization: mean,
    }
}
