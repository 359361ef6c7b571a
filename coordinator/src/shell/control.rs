//! The answers behind the doors: active jobs from the engine (through the driver), final ones from the store, logs from the nodes.
//!
//! A question to the engine is answered when everything that it shows is durable, so the store that is read after it is never behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use everlit_api::auth::{AuditEntry, AuditView, BadToken, Caller, MadeToken, NewToken, TokenView};
use everlit_api::control::{
    Accepted, Agent, AgentLink, Answer, Control, EventItem, EventQuery, ListQuery, LogItem, LogQuery, PackageBytes, PurgeQuery, Submission,
    Upload,
};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::job::JobSpec;
use everlit_api::join::{BadCertificate, BadJoin, JoinRequest, MadeNodeToken, NewNodeToken, NodeCertificate, NodeTokenView};
use everlit_api::package::PackageView;
use everlit_api::problem::{Code, Problem};
use everlit_api::status::{
    AttemptView, CheckpointView, EventView, Explanation, JobState, JobView, MetricPoint, NodeCounts, NodeView, Page, PlacementPlan,
    ServingCounts, StatusView, Summary,
};
use everlit_api::time::{Millis, Timestamp};
use tokio::sync::{mpsc, oneshot};

use super::agents::Agents;
use super::cannot_save::cannot_save;
use super::clock::Clock;
use super::driver::{Handle, Input};
use super::logs::{ITEMS_MAX, Reader, Whereabouts};
use super::members::{Joining, Members};
use super::metrics::{Metrics, engine_now, gpu_counts};
use super::packages::Packages;
use super::store::{JobFilter, Store, StoreError};
use super::tokens::Tokens;
use crate::engine::state::Job;
use crate::engine::{CannotSave, Engine, Event, StoredJob, read_job};

/// Jobs that one purge removes at most; the rest goes with the next.
const PURGE_MAX: u32 = 5_000;

/// Everything that an answer may need.
#[derive(Clone)]
pub struct Coordinator {
    /// To the driver, and what it tells.
    pub handle: Handle,
    /// What is durable.
    pub store: Arc<Store>,
    /// Links.
    pub agents: Arc<Agents>,
    /// Numbers.
    pub metrics: Arc<Metrics>,
    /// The engine's clock.
    pub clock: Clock,
    /// What an agent must say at the door.
    pub agent_token: Arc<str>,
    /// Who shows which token.
    pub tokens: Arc<Tokens>,
    /// Nodes that joined, and what servers join with.
    pub members: Arc<Members>,
    /// What signs for them; `None` where agents of other machines can not come in.
    pub joining: Option<Arc<Joining>>,
    /// The node timeout, for links.
    pub agent_silence_max: std::time::Duration,
    /// How callers are known, in a word or two.
    pub auth: Arc<str>,
    /// Folders that go with jobs.
    pub packages: Arc<Packages>,
    /// Recovery is done and no end is near.
    pub ready: Arc<AtomicBool>,
}

impl std::fmt::Debug for Coordinator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coordinator").field("auth", &self.auth).finish_non_exhaustive()
    }
}

pub(super) fn gone() -> Problem {
    Problem::new(Code::NotReady, "the coordinator is ending: ask again in a moment").retry_after(2)
}

fn no_job(id: JobId) -> Problem {
    Problem::new(Code::NotFound, format!("there is no job {id}; GET /jobs lists them"))
}

pub(super) fn no_node(id: &NodeId) -> Problem {
    Problem::new(Code::NotFound, format!("there is no node {id}; GET /nodes lists them"))
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        tracing::error!("the store can not be read: {error}");
        Self::new(Code::StoreUnavailable, "the store can not be read; the coordinator's log says why").retry_after(5)
    }
}

fn read_row(row: &StoredJob) -> Result<Job, Problem> {
    read_job(row).map_err(|e| Problem::new(Code::Internal, e))
}

impl Coordinator {
    pub(super) async fn send(&self, input: Input) -> Result<(), Problem> {
        self.handle.inputs.send(input).await.map_err(|_| gone())
    }

    /// Asks the engine; the answer comes when what it shows is durable.
    pub async fn look<T: Send + 'static>(&self, look: impl FnOnce(&Engine, Timestamp) -> T + Send + 'static) -> Result<T, Problem> {
        let (reply, answer) = oneshot::channel();
        let look = move |engine: &Engine, now| {
            let answer = look(engine, now);
            Box::new(move || drop(reply.send(answer))) as super::driver::After
        };
        self.send(Input::Look(Box::new(look))).await?;
        answer.await.map_err(|_| gone())
    }

    async fn stored(&self, id: JobId) -> Result<Job, Problem> {
        let row = self.store.job(id).await?.ok_or_else(|| no_job(id))?;
        read_row(&row)
    }

    /// From the engine when active, else from the store.
    pub(super) async fn of_job<T: Send + 'static>(
        &self,
        id: JobId,
        make: impl Fn(&Job, Timestamp, String) -> T + Send + Clone + 'static,
    ) -> Result<T, Problem> {
        let active = make.clone();
        let found = self.look(move |engine, now| engine.job(id).map(|job| active(job, now, engine.reason(job)))).await?;
        match found {
            Some(answer) => Ok(answer),
            None => {
                let job = self.stored(id).await?;
                let reason = job.reason.clone();
                Ok(make(&job, self.clock.now(), reason))
            }
        }
    }

    async fn view(&self, id: JobId) -> Result<JobView, Problem> {
        self.of_job(id, |job, _, reason| job.view(reason, true)).await
    }

    async fn is_active(&self, id: JobId) -> Result<bool, Problem> {
        self.look(move |engine, _| engine.job(id).is_some()).await
    }

    /// A page of rows with what the engine knows better laid over it.
    async fn page<T: Send + 'static>(
        &self,
        query: ListQuery,
        id_of: impl Fn(&T) -> JobId + Send,
        make: impl Fn(&Job, Timestamp, String) -> T + Send + Clone + 'static,
    ) -> Result<Page<T>, Problem> {
        let before = query.after.as_deref().map(str::parse::<JobId>).transpose();
        let before = before.map_err(|_| Problem::new(Code::BadRequest, "`after` must be the `last_id` of a page before"))?;
        let filter =
            JobFilter { before, states: query.states, name: query.name, labels: query.labels, finished_before: None, user: query.user };
        // Everything that was answered before is durable after this.
        self.look(|_, _| ()).await?;
        let mut rows = self.store.jobs(&filter, query.limit + 1).await?;
        let has_more = rows.len() > query.limit as usize;
        rows.truncate(query.limit as usize);
        let ids: Vec<JobId> = rows.iter().map(|row| row.id).collect();
        let active = make.clone();
        let mut live = self
            .look(move |engine, now| {
                let found = ids.iter().filter_map(|id| engine.job(*id).map(|job| (*id, active(job, now, engine.reason(job)))));
                found.collect::<std::collections::BTreeMap<_, _>>()
            })
            .await?;
        let mut data = Vec::with_capacity(rows.len());
        for row in &rows {
            data.push(match live.remove(&row.id) {
                Some(entry) => entry,
                None => {
                    let job = read_row(row)?;
                    make(&job, self.clock.now(), job.reason.clone())
                }
            });
        }
        let first_id = data.first().map(|entry| id_of(entry).to_string());
        let last_id = data.last().map(|entry| id_of(entry).to_string());
        Ok(Page { data, first_id, last_id, has_more })
    }

    fn final_conflict(&self, job: &JobView) -> Problem {
        let remedy = "submit a new job, or POST /jobs with {\"resume_from\": …} to go on from its checkpoint";
        Problem::new(Code::Conflict, format!("job {} is {} and final: {remedy}", job.job_id, job.state))
    }

    async fn act(&self, id: JobId, event: Event) -> Result<JobView, Problem> {
        if !self.is_active(id).await? {
            return Err(self.final_conflict(&self.view(id).await?));
        }
        self.send(Input::Wish(event)).await?;
        self.view(id).await
    }

    async fn remove(&self, jobs: Vec<(JobId, Vec<NodeId>)>) -> Result<(), Problem> {
        let (reply, done) = oneshot::channel();
        self.send(Input::Remove { jobs, reply }).await?;
        done.await.map_err(|_| gone())
    }

    async fn node_view(&self, id: NodeId) -> Result<NodeView, Problem> {
        let name = id.clone();
        let found = self.look(move |engine, now| engine.nodes().get(&name).map(|node| node.view(&name, now))).await?;
        let mut all = Vec::from_iter(found);
        self.members.complete(&mut all);
        all.into_iter().find(|view| view.node == id).ok_or_else(|| no_node(&id))
    }

    /// Removes final jobs that ended before a time; answers what went (or would go).
    pub async fn purge_before(&self, time: Timestamp, states: Vec<JobState>, dry_run: bool) -> Result<Vec<JobId>, Problem> {
        let filter = JobFilter { states, finished_before: Some(time), ..JobFilter::default() };
        let mut found = Vec::new();
        for row in self.store.jobs(&filter, PURGE_MAX).await? {
            let job = read_row(&row)?;
            found.push((job.id, job.state, job.keepers()));
        }
        let ids = found.iter().map(|(id, ..)| *id).collect();
        if !dry_run && !found.is_empty() {
            self.metrics.jobs_removed(found.iter().map(|(_, state, _)| *state));
            self.remove(found.into_iter().map(|(id, _, nodes)| (id, nodes)).collect()).await?;
        }
        Ok(ids)
    }
}

impl Control for Coordinator {
    fn submit(&self, submission: Submission) -> Answer<'_, Accepted> {
        Box::pin(async move {
            // Each user's keys are its own: another's must not answer with this one's job.
            let own = |key: String| submission.user.as_ref().map_or(key.clone(), |user| format!("{user} {key}"));
            let idempotency = submission.idempotency.map(|(key, hash)| (own(key), hash));
            if let Some((key, hash)) = &idempotency
                && let Some((used, id)) = self.store.idempotency(key).await?
            {
                if used != hash {
                    return Err(Problem::new(
                        Code::IdempotencyMismatch,
                        format!("this key made job {id} from another body: use a new key"),
                    ));
                }
                return Ok(Accepted { job: self.view(id).await?, replayed: true });
            }
            self.packages.needed_by(&submission.spec)?;
            // What can not be looked up now its node may have all the same.
            let origin = match submission.spec.resume_from.as_ref().and_then(|from| from.parse().ok()) {
                Some(from) => self.of_job(from, |job, _, _| job.checkpoints.clone()).await.unwrap_or_default(),
                None => Vec::new(),
            };
            let (reply, answer) = oneshot::channel();
            let shown = submission.spec.redacted();
            let user = submission.user.clone();
            self.send(Input::Submit { spec: Box::new(submission.spec), origin, idempotency, user, reply }).await?;
            let id = answer.await.map_err(|_| gone())??;
            let job = JobView {
                job_id: id,
                name: shown.name.clone(),
                kind: shown.kind,
                state: JobState::Queued,
                user: submission.user,
                priority: shown.priority,
                labels: shown.labels.clone(),
                world_size: shown.world_size,
                attempt: 0,
                restarts: 0,
                submitted_at: self.clock.now(),
                started_at: None,
                finished_at: None,
                reason: Some("accepted".into()),
                spec: Some(shown),
            };
            Ok(Accepted { job, replayed: false })
        })
    }

    fn plan(&self, spec: JobSpec) -> Answer<'_, PlacementPlan> {
        Box::pin(async move {
            self.packages.needed_by(&spec)?;
            self.look(move |engine, now| engine.plan(&spec, now)).await
        })
    }

    fn jobs(&self, query: ListQuery) -> Answer<'_, Page<JobView>> {
        Box::pin(self.page(query, |view: &JobView| view.job_id, |job, _, reason| job.view(reason, false)))
    }

    fn job(&self, id: JobId) -> Answer<'_, JobView> {
        Box::pin(self.view(id))
    }

    fn summary(&self, id: JobId) -> Answer<'_, Summary> {
        Box::pin(self.of_job(id, |job, now, reason| job.summary(now, reason)))
    }

    fn summaries(&self, query: ListQuery) -> Answer<'_, Page<Summary>> {
        Box::pin(self.page(query, |summary: &Summary| summary.job_id, |job, now, reason| job.summary(now, reason)))
    }

    fn stop(&self, id: JobId, force: bool) -> Answer<'_, JobView> {
        Box::pin(self.act(id, Event::StopRequested { job: id, force, delete: false }))
    }

    fn restart(&self, id: JobId) -> Answer<'_, JobView> {
        Box::pin(self.act(id, Event::RestartRequested { job: id }))
    }

    fn save(&self, id: JobId) -> Answer<'_, JobView> {
        Box::pin(async move {
            match self.look(move |engine, _| engine.can_save(id)).await? {
                Ok(()) => self.act(id, Event::SaveRequested { job: id }).await,
                Err(CannotSave::NotActive) => Err(self.final_conflict(&self.view(id).await?)),
                Err(why) => Err(cannot_save(id, &why)),
            }
        })
    }

    fn delete(&self, id: JobId, stop_first: bool, force: bool) -> Answer<'_, JobView> {
        Box::pin(async move {
            let view = self.view(id).await?;
            if self.is_active(id).await? {
                if !stop_first {
                    let remedy = "stop it first, or DELETE it with ?stop_first=true";
                    return Err(Problem::new(Code::Conflict, format!("job {id} is {}: {remedy}", view.state)));
                }
                self.send(Input::Wish(Event::StopRequested { job: id, force, delete: true })).await?;
                // A queued job is gone at once; one that runs is shown stopping.
                return self.view(id).await.or(Ok(JobView { state: JobState::Stopped, ..view }));
            }
            let job = self.stored(id).await?;
            self.metrics.jobs_removed([job.state]);
            self.remove(vec![(id, job.keepers())]).await?;
            Ok(view)
        })
    }

    fn purge(&self, query: PurgeQuery) -> Answer<'_, Vec<JobId>> {
        Box::pin(async move {
            let before = Timestamp(self.clock.now().0.saturating_sub(query.older_than.0).saturating_add(1));
            let states = query.states.into_iter().filter(|s| s.is_final()).collect();
            self.purge_before(before, states, query.dry_run).await
        })
    }

    fn logs(&self, id: JobId, query: LogQuery) -> Answer<'_, mpsc::Receiver<LogItem>> {
        Box::pin(async move {
            let news = self.handle.news.subscribe();
            let at = self.of_job(id, |job, _, _| Whereabouts::of(job)).await?;
            let (items, receiver) = mpsc::channel(ITEMS_MAX);
            let own = self.clone();
            let look = move || {
                let own = own.clone();
                let found = async move { own.of_job(id, |job, _, _| Whereabouts::of(job)).await.ok() };
                Box::pin(found) as futures_util::future::BoxFuture<'static, _>
            };
            let ended = at.state.is_final().then_some(at.state);
            let reader = Reader { agents: self.agents.clone(), job: id, at, query, ended, news, look: Box::new(look), items };
            tokio::spawn(reader.run());
            Ok(receiver)
        })
    }

    fn events(&self, query: EventQuery, limit: u32) -> Answer<'_, Page<EventView>> {
        Box::pin(async move {
            if let Some(job) = query.job {
                self.of_job(job, |_, _, _| ()).await?;
            }
            let mut found = self.store.events(query.job, query.after.unwrap_or(0), limit + 1).await?;
            let has_more = found.len() > limit as usize;
            found.truncate(limit as usize);
            let data: Vec<EventView> = found.into_iter().map(|e| e.view).collect();
            let (first_id, last_id) = (data.first().map(|e| e.id.clone()), data.last().map(|e| e.id.clone()));
            Ok(Page { data, first_id, last_id, has_more })
        })
    }

    fn follow_events(&self, query: EventQuery) -> Answer<'_, mpsc::Receiver<EventItem>> {
        Box::pin(async move {
            if let Some(job) = query.job {
                self.of_job(job, |_, _, _| ()).await?;
            }
            let (items, receiver) = mpsc::channel(64);
            let own = self.clone();
            tokio::spawn(async move {
                if let Err(problem) = own.follow(query, items).await {
                    tracing::warn!("a stream of events ended: {problem}");
                }
            });
            Ok(receiver)
        })
    }

    fn attempts(&self, id: JobId) -> Answer<'_, Vec<AttemptView>> {
        Box::pin(async move {
            self.of_job(id, |_, _, _| ()).await?;
            Ok(self.store.attempts(id).await?)
        })
    }

    fn checkpoints(&self, id: JobId) -> Answer<'_, Vec<CheckpointView>> {
        Box::pin(self.of_job(id, |job, _, _| job.checkpoints.clone()))
    }

    fn metrics(&self, id: JobId) -> Answer<'_, Vec<MetricPoint>> {
        Box::pin(async move {
            let live = self.look(move |engine, _| engine.job(id).map(|job| job.series.points().to_vec())).await?;
            match live {
                Some(points) => Ok(points),
                None => {
                    self.stored(id).await?;
                    Ok(self.store.series(id).await?)
                }
            }
        })
    }

    fn explain(&self, id: JobId) -> Answer<'_, Explanation> {
        Box::pin(async move {
            if let Some(explanation) = self.look(move |engine, _| engine.explain(id)).await? {
                return Ok(explanation);
            }
            let job = self.stored(id).await?;
            Ok(Explanation { state: job.state, reason: job.reason, ..Explanation::default() })
        })
    }

    fn nodes(&self) -> Answer<'_, Vec<NodeView>> {
        Box::pin(async move {
            let mut all = self.look(|engine, now| engine.nodes().iter().map(|(id, node)| node.view(id, now)).collect()).await?;
            self.members.complete(&mut all);
            Ok(all)
        })
    }

    fn node(&self, id: NodeId) -> Answer<'_, NodeView> {
        Box::pin(self.node_view(id))
    }

    fn cordon(&self, id: NodeId, cordoned: bool) -> Answer<'_, NodeView> {
        Box::pin(async move {
            self.node_view(id.clone()).await?;
            self.send(Input::Wish(Event::CordonRequested { node: id.clone(), cordoned })).await?;
            self.node_view(id).await
        })
    }

    fn drain(&self, id: NodeId, deadline: Option<Millis>) -> Answer<'_, NodeView> {
        Box::pin(async move {
            self.node_view(id.clone()).await?;
            self.send(Input::Wish(Event::NodeDraining { node: id.clone(), cordon: true, deadline })).await?;
            self.node_view(id).await
        })
    }

    fn status(&self) -> Answer<'_, StatusView> {
        Box::pin(async move {
            let (now, gpus) = self.look(|engine, _| (engine_now(engine), gpu_counts(engine))).await?;
            let jobs = self.metrics.job_counts(&now.jobs).into_iter().map(|(state, count)| (state.to_string(), count)).collect();
            Ok(StatusView {
                version: env!("CARGO_PKG_VERSION").into(),
                uptime_seconds: self.clock.uptime().as_secs_f64(),
                leader: true,
                nodes: NodeCounts { ready: now.nodes.0, lost: now.nodes.1 },
                jobs,
                ranks: now.ranks,
                gpus,
                queue_depth: now.queue,
                serving: ServingCounts::default(),
                auth: self.auth.to_string(),
            })
        })
    }

    fn prometheus(&self) -> Answer<'_, String> {
        Box::pin(async move {
            let mut now = self.look(|engine, _| engine_now(engine)).await?;
            now.uptime = self.clock.uptime();
            Ok(self.metrics.text(&now))
        })
    }

    fn ready(&self) -> Result<(), String> {
        if !self.ready.load(Ordering::Relaxed) {
            return Err("the coordinator is starting or ending".into());
        }
        if self.store.is_low() {
            return Err("the disk of the data folder is full".into());
        }
        Ok(())
    }

    fn caller(&self, token: &str) -> Result<Caller, BadToken> {
        self.tokens.caller(token, self.clock.now())
    }

    fn job_user(&self, id: JobId) -> Answer<'_, Option<String>> {
        Box::pin(self.of_job(id, |job, _, _| job.user.clone()))
    }

    fn audit(&self, entry: AuditEntry) -> Answer<'_, ()> {
        Box::pin(self.send(Input::Audit(entry)))
    }

    fn audit_log(&self, before: Option<u64>, user: Option<String>, limit: u32) -> Answer<'_, Page<AuditView>> {
        Box::pin(self.audit_page(before, user, limit))
    }

    fn create_token(&self, wanted: NewToken, by: Option<String>) -> Answer<'_, MadeToken> {
        Box::pin(self.make_token(wanted, by))
    }

    fn tokens(&self) -> Vec<TokenView> {
        self.tokens.list()
    }

    fn revoke_token(&self, id: String) -> Answer<'_, TokenView> {
        Box::pin(self.end_token(id))
    }

    fn keep_package(&self, upload: Upload) -> Answer<'_, (PackageView, bool)> {
        Box::pin(self.take_package(upload))
    }

    fn package(&self, package: String) -> Answer<'_, PackageView> {
        Box::pin(async move { self.packages.take_up(&package) })
    }

    fn read_package(&self, package: String) -> Answer<'_, (u64, PackageBytes)> {
        Box::pin(async move { self.packages.read(&package).await })
    }

    fn agent_token_is(&self, token: &str) -> bool {
        // Same time whatever the first difference is.
        let (given, own) = (token.as_bytes(), self.agent_token.as_bytes());
        given.len() == own.len() && given.iter().zip(own).fold(0, |differences, (a, b)| differences | (a ^ b)) == 0
    }

    fn agent_linked(&self, agent: Agent, link: AgentLink) -> Answer<'_, ()> {
        Box::pin(async move {
            if let Agent::Node { node, certificate } = &agent {
                self.note_member_linked(node, certificate);
            }
            self.agents.serve(&agent, link, &self.members, &self.handle.inputs).await;
            Ok(())
        })
    }

    fn agent_silence_max(&self) -> std::time::Duration {
        self.agent_silence_max
    }

    fn node_of(&self, certificate: &[u8; 32]) -> Result<NodeId, BadCertificate> {
        self.members.node_of(certificate)
    }

    fn join_token(&self, shown: &str) -> Result<String, BadJoin> {
        self.members.token(shown, self.clock.now())
    }

    fn create_join_token(&self, wanted: NewNodeToken, by: Option<String>) -> Answer<'_, MadeNodeToken> {
        Box::pin(self.make_join_token(wanted, by))
    }

    fn join_tokens(&self) -> Vec<NodeTokenView> {
        self.members.tokens()
    }

    fn revoke_join_token(&self, id: String) -> Answer<'_, NodeTokenView> {
        Box::pin(self.end_join_token(id))
    }

    fn join(&self, request: JoinRequest, shown: String) -> Answer<'_, NodeCertificate> {
        Box::pin(self.admit(request, shown))
    }

    fn renew(&self, node: NodeId, certificate: [u8; 32], request: String) -> Answer<'_, NodeCertificate> {
        Box::pin(self.renew_certificate(node, certificate, request))
    }

    fn expel(&self, node: NodeId, force: bool) -> Answer<'_, NodeView> {
        Box::pin(self.expel_node(node, force))
    }
}
