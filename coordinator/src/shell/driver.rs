//! The loop: what happens goes to the engine; what it records is made durable, many steps per transaction; only then its commands run and
//! callers get their answers. One `select!`, one `match`. While a transaction is under way the next batch gathers.
//!
//! Reads are answered from the engine, but not before what they show is durable. The trap: never run a command from anywhere else.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use everlit_api::agent::{FromAgent, Hello, ToAgent};
use everlit_api::auth::AuditEntry;
use everlit_api::ids::{JobId, NodeId};
use everlit_api::job::JobSpec;
use everlit_api::join::to_hex;
use everlit_api::problem::{Code, Problem};
use everlit_api::service::Pulse;
use everlit_api::status::{CheckpointView, EventView, JobState};
use everlit_api::time::Timestamp;
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::agents::Agents;
use super::clock::Clock;
use super::metrics::Metrics;
use super::store::{Batch, Idempotency, JoinTokenRow, MemberRow, Store, StoreError, StoredEvent, TokenRow};
use crate::engine::limits::{LAST_ARCHIVES_MAX, QUEUED_JOBS_MAX};
use crate::engine::{Command, Engine, Event, EventRow, Step};

/// Inputs that may wait.
pub const INPUTS_MAX: usize = 8_192;
/// Steps per transaction at most.
const BATCH_STEPS_MAX: usize = 1_024;
/// Between two tries of a transaction that failed.
const RETRY: Duration = Duration::from_millis(500);
/// Jobs whose files a node is asked to remove at once; the next go when it has answered.
const REMOVALS_ASKED: usize = 256;
/// A used key is remembered here so long after its job is durable, while who asked before may still come.
const KEY_MEMORY_MS: u64 = 30_000;
/// Between two warnings that a node speaks of what is not its own.
const WARN_EVERY_MS: u64 = 60_000;
/// Events that a slow follower may lag behind before it reads the store again.
const FOLLOW_EVENTS: usize = 1_024;
/// Jobs that ended so long ago are asked after their logs no more at a start.
const ARCHIVED_WITHIN_MS: u64 = 7 * 24 * 3_600_000;

/// What runs once everything before it is durable: an answer to a caller.
pub type After = Box<dyn FnOnce() + Send>;
/// Looks at the engine now and gives back what to do once that is durable.
pub type Look = Box<dyn FnOnce(&Engine, Timestamp) -> After + Send>;

/// What comes in.
pub enum Input {
    /// A job to accept.
    Submit {
        /// Checked.
        spec: Box<JobSpec>,
        /// Checkpoints of the job that it begins from.
        origin: Vec<CheckpointView>,
        /// The key and the body's hash.
        idempotency: Option<(String, [u8; 32])>,
        /// Whose it is.
        user: Option<String>,
        /// The answer, once durable.
        reply: oneshot::Sender<Result<JobId, Problem>>,
    },
    /// A wish that the engine understands; the sender has checked that it makes sense.
    Wish(Event),
    /// A question.
    Look(Look),
    /// Final jobs go, with all that is known of them.
    Remove {
        /// Each with the nodes that have its files.
        jobs: Vec<(JobId, Vec<NodeId>)>,
        /// Once durable.
        reply: oneshot::Sender<()>,
    },
    /// Somebody asks for something; durable no later than what comes of it.
    Audit(AuditEntry),
    /// A token as it is from now on.
    Token {
        /// New, or with its end.
        row: TokenRow,
        /// Once durable.
        reply: oneshot::Sender<()>,
    },
    /// A join token and a node that joined, as they are from now on.
    Members {
        /// New, used once more, or with its end.
        token: Option<Box<JoinTokenRow>>,
        /// New, with another certificate, or expelled.
        member: Option<Box<MemberRow>>,
        /// Once durable.
        reply: oneshot::Sender<()>,
    },
    /// An agent said hello on a new link, of this session.
    Linked(u64, Box<Hello>),
    /// An agent's frame, with its share of the room that its link has here.
    Agent(NodeId, FromAgent, OwnedSemaphorePermit),
    /// The link of that session ended.
    Unlinked(u64, NodeId),
}

/// What the driver tells everybody, after it is durable.
#[derive(Debug, Clone)]
pub enum News {
    /// An event.
    Event(Arc<StoredEvent>),
    /// A job is final.
    Final(JobId, JobState),
}

/// Both ends that others hold.
#[derive(Debug, Clone)]
pub struct Handle {
    /// Where inputs go.
    pub inputs: mpsc::Sender<Input>,
    /// What happened.
    pub news: broadcast::Sender<News>,
}

/// A batch and what follows it.
#[derive(Default)]
struct Pending {
    batch: Batch,
    commands: Vec<Command>,
    after: Vec<After>,
    steps: usize,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.steps == 0 && self.batch.is_empty() && self.commands.is_empty() && self.after.is_empty()
    }
}

/// Owns the engine.
pub struct Driver {
    engine: Engine,
    store: Arc<Store>,
    agents: Arc<Agents>,
    metrics: Arc<Metrics>,
    clock: Clock,
    news: broadcast::Sender<News>,
    pending: Pending,
    event_seq: u64,
    last_job: u128,
    seeds: u64,
    /// Keys whose jobs are not durable yet, or only just.
    keys: BTreeMap<String, ([u8; 32], JobId)>,
    recent_keys: VecDeque<(Timestamp, String)>,
    /// The session of each node's newest link: the end of an older one is no news.
    sessions: BTreeMap<NodeId, u64>,
    /// What nobody outside this data folder knows.
    secret: Arc<str>,
    removals: BTreeMap<NodeId, BTreeSet<JobId>>,
    removals_asked: BTreeMap<NodeId, usize>,
    /// When it was last warned of a node that speaks of what is not its own.
    warned: BTreeMap<NodeId, Timestamp>,
    /// Post-mortems that are to be kept.
    postmortems: Option<mpsc::Sender<(JobId, u32)>>,
}

impl Driver {
    /// Loads what is stored and gets ready to run.
    pub async fn load(
        config: crate::engine::Config,
        store: Arc<Store>,
        agents: Arc<Agents>,
        metrics: Arc<Metrics>,
        secret: Arc<str>,
    ) -> Result<(Self, Clock, broadcast::Sender<News>), StoreError> {
        let (event_seq, last_time, last_job) = store.last().await?;
        let clock = Clock::after(last_time);
        let mut engine =
            Engine::load(config, clock.now(), &store.active_jobs().await?, &store.nodes().await?).map_err(StoreError::Refused)?;
        for row in store.jobs_to_archive(Timestamp(clock.now().0.saturating_sub(ARCHIVED_WITHIN_MS)), LAST_ARCHIVES_MAX as u32).await? {
            // What can not be read keeps no coordinator from its start: it is over.
            if let Ok(job) = crate::engine::read_job(&row) {
                engine.await_archives(&job);
            }
        }
        let mut removals: BTreeMap<NodeId, BTreeSet<JobId>> = BTreeMap::new();
        for (job, node) in store.removals().await? {
            removals.entry(node).or_default().insert(job);
        }
        for (state, count) in store.count_states().await? {
            metrics.jobs_loaded(state, count);
        }
        let (news, _) = broadcast::channel(FOLLOW_EVENTS);
        let last_job = last_job.map_or(0, JobId::as_u128);
        let seeds = fresh_seed();
        let pending = Pending::default();
        let keys = BTreeMap::new();
        let driver = Self {
            engine,
            store,
            agents,
            metrics,
            clock,
            news: news.clone(),
            pending,
            event_seq,
            last_job,
            seeds,
            keys,
            recent_keys: VecDeque::new(),
            sessions: BTreeMap::new(),
            secret,
            removals,
            removals_asked: BTreeMap::new(),
            warned: BTreeMap::new(),
            postmortems: None,
        };
        Ok((driver, clock, news))
    }

    /// Who puts post-mortems in stores.
    pub fn keeps_postmortems(&mut self, queue: mpsc::Sender<(JobId, u32)>) {
        self.postmortems = Some(queue);
    }

    /// Runs until every sender of inputs is gone.
    pub async fn run(mut self, mut inputs: mpsc::Receiver<Input>) {
        let mut commit: Option<JoinHandle<Pending>> = None;
        let mut pulse = Pulse::asked();
        loop {
            if commit.is_none() && !self.pending.is_empty() {
                commit = self.begin_commit();
                continue;
            }
            let wake = self.engine.next_deadline().map(|at| self.clock.instant(at));
            tokio::select! {
                biased;
                done = async { commit.as_mut().expect("guarded").await }, if commit.is_some() => {
                    commit = None;
                    match done {
                        Ok(done) => self.run_after(done),
                        Err(e) => panic!("the commit task ended: {e}"),
                    }
                }
                () = pulse.due() => pulse.tell(&self.in_short()),
                input = inputs.recv(), if self.pending.steps < BATCH_STEPS_MAX => {
                    let Some(input) = input else { break };
                    self.take(input);
                    while self.pending.steps < BATCH_STEPS_MAX && let Ok(input) = inputs.try_recv() {
                        self.take(input);
                    }
                }
                () = async { tokio::time::sleep_until(wake.expect("guarded")).await }, if wake.is_some() => self.feed(Event::Woke),
            }
        }
        if let Some(done) = commit
            && let Ok(done) = done.await
        {
            self.run_after(done);
        }
    }

    /// What goes on, in a line.
    fn in_short(&self) -> String {
        let linked = self.engine.nodes().values().filter(|node| node.linked).count();
        let waiting = self.engine.queue_depth();
        format!("{linked} nodes, {} jobs, {waiting} more in the queue", self.engine.jobs().count() - waiting)
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Submit { spec, origin, idempotency, user, reply } => self.submit((*spec, origin), idempotency, user, reply),
            Input::Wish(event) => self.feed(event),
            Input::Look(look) => {
                let after = look(&self.engine, self.clock.now());
                self.pending.after.push(after);
                self.pending.steps += 1;
            }
            Input::Remove { jobs, reply } => self.remove(jobs, reply),
            Input::Audit(entry) => {
                self.pending.batch.audit.push((self.clock.now(), entry));
                self.pending.steps += 1;
            }
            Input::Token { row, reply } => {
                self.tell_of_token(&row);
                self.pending.batch.tokens.push(row);
                self.pending.after.push(Box::new(move || {
                    let _ = reply.send(());
                }));
                self.pending.steps += 1;
            }
            Input::Members { token, member, reply } => {
                self.tell_of_members(token.as_deref(), member.as_deref());
                self.pending.batch.join_tokens.extend(token.map(|row| *row));
                self.pending.batch.members.extend(member.map(|row| *row));
                self.pending.after.push(Box::new(move || {
                    let _ = reply.send(());
                }));
                self.pending.steps += 1;
            }
            Input::Linked(session, hello) => {
                let node = hello.node.clone();
                self.sessions.insert(node.clone(), session);
                self.hear(node.clone(), Event::NodeLinked { hello });
                self.removals_asked.remove(&node);
                self.ask_removals(&node);
            }
            Input::Agent(node, frame, room) => {
                drop(room);
                self.agent_said(node, frame);
            }
            Input::Unlinked(session, node) => {
                if self.sessions.get(&node) == Some(&session) {
                    self.feed(Event::NodeUnlinked { node });
                }
            }
        }
    }

    fn agent_said(&mut self, node: NodeId, frame: FromAgent) {
        if let FromAgent::Removed { job } = frame {
            if let Some(jobs) = self.removals.get_mut(&node) {
                jobs.remove(&job);
            }
            self.pending.batch.cleared.push((job, node.clone()));
            let left = self.removals_asked.get(&node).copied().unwrap_or(0).saturating_sub(1);
            self.removals_asked.insert(node.clone(), left);
            if left == 0 {
                self.ask_removals(&node);
            }
            return;
        }
        if let Some(event) = Event::of_frame(node.clone(), frame) {
            self.hear(node, event);
        }
    }

    /// What a node's agent says. That some of it was passed over is told, once a minute for each node.
    fn hear(&mut self, node: NodeId, event: Event) {
        let before = self.engine.foreign_news();
        self.feed(event);
        let foreign = self.engine.foreign_news() - before;
        let now = self.clock.now();
        if foreign > 0 && self.warned.get(&node).is_none_or(|at| now.since_ms(*at) >= WARN_EVERY_MS) {
            tracing::warn!(%node, "its agent speaks of ranks or files of other nodes, which is passed over: see docs/security.md");
            self.warned.insert(node, now);
        }
    }

    /// One event through the engine into the batch.
    fn feed(&mut self, event: Event) {
        let now = self.clock.now();
        let Step { record, commands } = self.engine.handle(now, event);
        self.metrics.note_record(&record);
        let mut seq = self.event_seq;

        self.pending.batch.add(now, record, || {
            seq += 1;
            seq
        });
        self.event_seq = seq;
        let gone = |command: &Command| match command {
            Command::Final { job, nodes, delete: true, .. } => Some((*job, nodes.clone())),
            _ => None,
        };
        let gone: Vec<_> = commands.iter().filter_map(gone).collect();
        self.pending.commands.extend(commands);
        for (job, nodes) in gone {
            self.note_removal(job, nodes);
        }
        self.pending.steps += 1;
    }

    fn submit(
        &mut self,
        (spec, origin): (JobSpec, Vec<CheckpointView>),
        idempotency: Option<(String, [u8; 32])>,
        user: Option<String>,
        reply: oneshot::Sender<Result<JobId, Problem>>,
    ) {
        if let Some((key, hash)) = &idempotency
            && let Some((used_hash, job)) = self.keys.get(key)
        {
            let answer = if used_hash == hash {
                Err(Problem::new(Code::IdempotencyInProgress, format!("job {job} is being made with this key: ask again")).retry_after(1))
            } else {
                Err(Problem::new(Code::IdempotencyMismatch, "use a new Idempotency-Key for another body"))
            };
            let _ = reply.send(answer);
            return;
        }
        if self.store.is_low() {
            let why = "the disk of the coordinator's data folder is full: free space, or purge final jobs";
            let _ = reply.send(Err(Problem::new(Code::StoreUnavailable, why).retry_after(10)));
            return;
        }
        if self.engine.queue_depth() >= QUEUED_JOBS_MAX {
            let why = format!("{QUEUED_JOBS_MAX} jobs wait already: try again when some have run");
            let _ = reply.send(Err(Problem::new(Code::QueueFull, why).retry_after(30)));
            return;
        }
        let id = self.fresh_job_id();
        self.seeds = self.seeds.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.feed(Event::JobSubmitted { id, spec: Arc::new(spec), seed: self.seeds, user, origin });
        if let Some((key, body_hash)) = idempotency {
            self.keys.insert(key.clone(), (body_hash, id));
            self.pending.batch.idempotency.push(Idempotency { key, body_hash, job: id, at: self.clock.now() });
        }
        self.pending.after.push(Box::new(move || {
            let _ = reply.send(Ok(id));
        }));
    }

    /// A ULID that is larger than every one before.
    fn fresh_job_id(&mut self) -> JobId {
        let ms = self.clock.now().0;
        let random = (u128::from(self.seeds) << 16) & ((1 << 80) - 1);
        let fresh = JobId::from_parts(ms, random).as_u128();
        self.last_job = fresh.max(self.last_job + 1);
        JobId::from_u128(self.last_job)
    }

    fn remove(&mut self, jobs: Vec<(JobId, Vec<NodeId>)>, reply: oneshot::Sender<()>) {
        for (job, nodes) in jobs {
            self.note_removal(job, nodes);
        }
        self.pending.after.push(Box::new(move || {
            let _ = reply.send(());
        }));
    }

    fn tell_of_token(&mut self, TokenRow { view, .. }: &TokenRow) {
        self.event_seq += 1;
        let (event, done) = if view.revoked_at.is_some() { ("token_revoked", "was revoked") } else { ("token_created", "was made") };
        let by = view.created_by.as_deref().filter(|_| view.revoked_at.is_none()).map(|by| format!(" by {by}")).unwrap_or_default();
        let reason = format!("token {} of {}, {}, {done}{by}", view.id, view.user, view.role);
        let data = serde_json::json!({ "token": view.id, "user": view.user, "role": view.role, "expires_at": view.expires_at });
        self.pending.batch.events.push((self.event_seq, EventRow { job: None, time: self.clock.now(), event, reason, data }));
    }

    fn tell_of_members(&mut self, token: Option<&JoinTokenRow>, member: Option<&MemberRow>) {
        let now = self.clock.now();
        let told = match (token.map(|row| &row.view), member) {
            (Some(view), None) => {
                let (event, done) =
                    if view.revoked_at.is_some() { ("join_token_revoked", "was revoked") } else { ("join_token_created", "was made") };
                let data = serde_json::json!({ "token": view.id, "uses": view.uses, "node": view.node, "expires_at": view.expires_at });
                Some((event, format!("join token {} {done}", view.id), data))
            }
            (Some(view), Some(row)) => {
                let data = serde_json::json!({ "node": row.node, "token": view.id, "certificate_expires_at": row.expires_at });
                Some(("node_joined", format!("{} joined with token {}", row.node, view.id), data))
            }
            // That it was expelled is the engine's to say; a renewal is in the audit log.
            (None, _) => None,
        };
        if let Some((event, reason, data)) = told {
            self.event_seq += 1;
            self.pending.batch.events.push((self.event_seq, EventRow { job: None, time: now, event, reason, data }));
        }
    }

    fn note_removal(&mut self, job: JobId, nodes: Vec<NodeId>) {
        self.event_seq += 1;
        let data = serde_json::json!({ "job_id": job });
        let row = EventRow { job: None, time: self.clock.now(), event: "job_deleted", reason: format!("job {job} was removed"), data };
        self.pending.batch.events.push((self.event_seq, row));
        self.pending.batch.remove(job, nodes.clone());
        self.engine.forget_archives(job);
        self.pending.steps += 1;
        for node in nodes {
            self.removals.entry(node.clone()).or_default().insert(job);
            if self.removals_asked.get(&node).is_none_or(|asked| *asked == 0) {
                self.ask_removals(&node);
            }
        }
    }

    /// Asks a node to remove what is left of removed jobs, some at a time: its line is bounded.
    fn ask_removals(&mut self, node: &NodeId) {
        let asked: Vec<JobId> = self.removals.get(node).into_iter().flatten().copied().take(REMOVALS_ASKED).collect();
        self.removals_asked.insert(node.clone(), asked.len());
        let frames = asked.into_iter().map(|job| Command::Tell { node: node.clone(), frame: ToAgent::RemoveJob { job } });
        self.pending.commands.extend(frames);
    }

    /// A batch without anything to record follows at once; else a task makes it durable, however long that takes.
    fn begin_commit(&mut self) -> Option<JoinHandle<Pending>> {
        let pending = std::mem::take(&mut self.pending);
        if pending.batch.is_empty() {
            self.run_after(pending);
            return None;
        }
        let (store, metrics) = (self.store.clone(), self.metrics.clone());
        Some(tokio::spawn(async move {
            let started = std::time::Instant::now();
            while let Err(e) = store.commit(&pending.batch).await {
                metrics.commit_failed();
                tracing::error!("a transaction failed and is tried again: {e}");
                tokio::time::sleep(RETRY).await;
                store.restore_ballast();
            }
            metrics.committed(started.elapsed(), pending.steps);
            pending
        }))
    }

    fn run_after(&mut self, done: Pending) {
        let now = self.clock.now();
        self.recent_keys.extend(done.batch.idempotency.iter().map(|used| (now, used.key.clone())));
        while self.recent_keys.front().is_some_and(|(at, _)| now.since_ms(*at) > KEY_MEMORY_MS) {
            if let Some((_, key)) = self.recent_keys.pop_front() {
                self.keys.remove(&key);
            }
        }
        for (seq, row) in done.batch.events {
            let view = EventView {
                id: seq.to_string(),
                job_id: row.job,
                time: row.time,
                event: row.event.to_string(),
                reason: row.reason,
                data: row.data,
            };
            // Nobody listening is no error.
            let _ = self.news.send(News::Event(Arc::new(StoredEvent { seq, view })));
        }
        for command in done.commands {
            match command {
                Command::Tell { node, mut frame } => {
                    self.add_secrets(&mut frame);
                    self.agents.tell(&node, &frame);
                }
                Command::KeepPostmortem { job, attempt } => {
                    // Full, so many failed at once that nobody reads all of it; who asks later is told as ever.
                    if self.postmortems.as_ref().is_some_and(|queue| queue.try_send((job, attempt)).is_err()) {
                        tracing::warn!(%job, attempt, "a post-mortem is not put in its store: too many wait");
                    }
                }
                Command::Final { job, state, .. } => drop(self.news.send(News::Final(job, state))),
            }
        }
        for after in done.after {
            after();
        }
    }
}

impl Driver {
    /// What the engine does not know of: how nodes of a gang meet, and what opens their doors for checkpoints.
    fn add_secrets(&self, frame: &mut ToAgent) {
        match frame {
            ToAgent::StartGang(spec) => {
                if spec.group_world_size > 1 {
                    spec.rendezvous_secret = self.meeting_secret(spec.job, spec.attempt);
                }
                if let Some(fetch) = &mut spec.fetch {
                    self.agents.reach(fetch.of.unwrap_or(spec.job), &mut fetch.sources);
                }
            }
            ToAgent::CopyCheckpoint(order) => self.agents.reach(order.job, &mut order.sources),
            _ => {}
        }
    }

    /// The same for all nodes of an attempt, however often it is said, and for nobody else.
    fn meeting_secret(&self, job: JobId, attempt: u32) -> String {
        let mut hash = Sha256::new();
        for part in [self.secret.as_bytes(), job.to_string().as_bytes(), &attempt.to_le_bytes()] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        to_hex(&hash.finalize())
    }
}

/// Different in every process; jobs' own seeds are made from it and recorded.
fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
    hasher.write_u128(Timestamp::now().0.into());
    hasher.finish()
}
