//! A control that notes what it is asked and answers from a script.

use std::collections::BTreeMap;
use std::sync::Mutex;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::agent::log::{Header, LogPosition, Stream};
use crate::auth::*;
use crate::control::*;
use crate::ids::{JobId, NodeId};
use crate::job::{JobKind, JobSpec, Priority};
use crate::join::*;
use crate::package::PackageView;
use crate::problem::{Code, Problem};
use crate::status::*;
use crate::time::{Millis, Timestamp};

/// The one job that there is.
pub(super) fn id() -> JobId {
    JobId::from_parts(1_767_225_600_000, 7)
}

pub(super) const TOKEN: &str = "agent-secret";

/// Ids of tokens, and the secret of all.
pub(super) const VIEWER: &str = "000000000001";
pub(super) const ALICE: &str = "000000000002";
pub(super) const BOB: &str = "000000000003";
pub(super) const OPERATOR: &str = "000000000004";
pub(super) const ADMIN: &str = "000000000005";
pub(super) const EXPIRED: &str = "000000000006";
pub(super) const REVOKED: &str = "000000000007";
const SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// A token as it is sent.
pub(super) fn full(id: &str) -> String {
    format!("everlit_{id}_{SECRET}")
}

fn token() -> TokenView {
    TokenView {
        id: ADMIN.into(),
        user: "ada".into(),
        role: Role::Admin,
        created_at: Timestamp(1_767_225_600_000),
        created_by: None,
        expires_at: Timestamp(1_767_225_700_000),
        revoked_at: None,
    }
}

#[derive(Default)]
pub(super) struct Fake {
    pub(super) asked: Mutex<Vec<String>>,
    pub(super) audited: Mutex<Vec<AuditEntry>>,
    pub(super) log: Mutex<Vec<LogItem>>,
    /// The log stays open after the script.
    pub(super) log_stays_open: Mutex<Vec<mpsc::Sender<LogItem>>>,
    pub(super) keep_log_open: bool,
    pub(super) happenings: Mutex<Vec<EventItem>>,
    pub(super) frames: Mutex<Vec<AgentFrame>>,
}

pub(super) fn view() -> JobView {
    JobView {
        job_id: id(),
        name: Some("one".into()),
        kind: JobKind::Train,
        state: JobState::Running,
        user: Some("alice".into()),
        priority: Priority::Normal,
        labels: BTreeMap::new(),
        world_size: 2,
        attempt: 1,
        restarts: 0,
        submitted_at: Timestamp(1_767_225_600_000),
        started_at: None,
        finished_at: None,
        reason: None,
        spec: None,
    }
}

fn summary() -> Summary {
    let view = view();
    Summary {
        job_id: view.job_id,
        name: view.name,
        kind: view.kind,
        state: view.state,
        world_size: 2,
        step: Some(3),
        total_steps: Some(10),
        progress: Some(0.3),
        steps_per_second: None,
        samples_per_second: None,
        loss: None,
        evaluation_loss: None,
        metrics: BTreeMap::new(),
        eta_seconds: None,
        attempt: 1,
        generation: 0,
        restarts: 0,
        lost_steps: 0,
        goodput: None,
        ledger: Ledger::default(),
        last_checkpoint: None,
        ranks: Vec::new(),
        spares: Vec::new(),
        submitted_at: view.submitted_at,
        started_at: None,
        finished_at: None,
        reason: None,
    }
}

fn node(name: &str) -> NodeView {
    NodeView {
        node: NodeId(name.into()),
        state: NodeState::Ready,
        cordoned: false,
        joined: None,
        capacity: Capacity::default(),
        load: NodeLoad::default(),
        ranks: 0,
        cpus_reserved: 0.0,
        memory_reserved: 0,
        gpus_granted: Vec::new(),
        gpu_memory_reserved: Default::default(),
        address: None,
        labels: Default::default(),
        taints: vec![],
        agent_version: "0.1.0".into(),
        report_age_seconds: None,
        avoided: false,
        blames: Vec::new(),
        gpus_avoided: Vec::new(),
        gpu_blames: Vec::new(),
    }
}

fn join_token() -> NodeTokenView {
    NodeTokenView {
        id: ADMIN.into(),
        created_at: Timestamp(1_767_225_600_000),
        created_by: None,
        expires_at: Timestamp(1_767_225_700_000),
        uses: 1,
        used: 0,
        node: None,
        revoked_at: None,
    }
}

fn certificate(node: NodeId) -> NodeCertificate {
    NodeCertificate { node, certificate: "PEM".into(), lives: Millis::secs(60) }
}

/// A join token as it is shown.
pub(super) fn join_token_of(id: &str) -> String {
    format!("{id}:{SECRET}")
}

pub(super) fn happening(id: u64) -> EventItem {
    EventItem::Event(Box::new(EventView {
        id: id.to_string(),
        job_id: Some(self::id()),
        time: Timestamp(1_767_225_600_000),
        event: "rank_exited".into(),
        reason: "rank 1 ended: signal 9 (SIGKILL)".into(),
        data: serde_json::json!({"rank": 1}),
    }))
}

pub(super) fn record(data: &[u8], offset: u64, flags: u8, stream: Stream, rank: u32) -> LogItem {
    let header = Header { len: data.len() as u32, rank, attempt: 1, stream, flags, time_us: 1_767_225_600_123_456 };
    let next = LogPosition { segment: 0, offset: offset + 36 + data.len() as u64, line: 0 };
    LogItem::Record { source: 0, header, data: Bytes::copy_from_slice(data), at: LogPosition { segment: 0, offset, line: 0 }, next }
}

fn one_page<T>(data: Vec<T>) -> Page<T> {
    Page { data, first_id: None, last_id: None, has_more: false }
}

fn known(id: JobId) -> Result<(), Problem> {
    if id == self::id() { Ok(()) } else { Err(Problem::new(Code::NotFound, "there is no such job: GET /jobs lists all")) }
}

impl Fake {
    fn note(&self, what: String) {
        self.asked.lock().expect("lock").push(what);
    }

    fn answer<T: Send + 'static>(&self, what: String, answer: Result<T, Problem>) -> Answer<'_, T> {
        self.note(what);
        Box::pin(async move { answer })
    }
}

impl Control for Fake {
    fn submit(&self, submission: Submission) -> Answer<'_, Accepted> {
        let key = submission.idempotency.as_ref().map(|(key, hash)| format!(" key {key} hash {:02x}{:02x}", hash[0], hash[1]));
        let replayed = key.is_some();
        let seed = submission.spec.worker.as_ref().filter(|w| w.seed != 0).map(|w| format!(" seed {}", w.seed)).unwrap_or_default();
        let spec = submission.spec.redacted();
        let refused = spec.name.as_deref() == Some("full");
        let full = Problem::new(Code::QueueFull, "the queue is full").retry_after(7);
        assert_ne!(spec.name.as_deref(), Some("panic"), "as asked");
        let job = JobView { spec: Some(spec), ..view() };
        let answer = if refused { Err(full) } else { Ok(Accepted { job, replayed }) };
        let user = submission.user.map(|user| format!(" of {user}")).unwrap_or_default();
        self.answer(format!("submit world {}{seed}{}{user}", submission.spec.world_size, key.unwrap_or_default()), answer)
    }

    fn plan(&self, spec: JobSpec) -> Answer<'_, PlacementPlan> {
        let plan =
            PlacementPlan { fits_now: true, fits_ever: true, reason: "fits".into(), placement: Vec::new(), memory_estimate: None, spec };
        self.answer("plan".into(), Ok(plan))
    }

    fn jobs(&self, query: ListQuery) -> Answer<'_, Page<JobView>> {
        self.answer(format!("{query:?}"), Ok(one_page(vec![view()])))
    }

    fn job(&self, id: JobId) -> Answer<'_, JobView> {
        let mut spec = JobSpec::default_for(2);
        spec.worker.as_mut().expect("the built-in program").seed = 9;
        self.answer("job".into(), known(id).map(|()| JobView { spec: Some(spec), ..view() }))
    }

    fn summary(&self, id: JobId) -> Answer<'_, Summary> {
        self.answer("summary".into(), known(id).map(|()| summary()))
    }

    fn summaries(&self, query: ListQuery) -> Answer<'_, Page<Summary>> {
        self.answer(format!("summaries {query:?}"), Ok(one_page(vec![summary()])))
    }

    fn stop(&self, id: JobId, force: bool) -> Answer<'_, JobView> {
        self.answer(format!("stop force {force}"), known(id).map(|()| view()))
    }

    fn restart(&self, id: JobId) -> Answer<'_, JobView> {
        let conflict = Problem::new(Code::Conflict, "the job is final: submit a new one with resume_from");
        self.answer("restart".into(), known(id).and(Err(conflict)))
    }

    fn save(&self, id: JobId) -> Answer<'_, JobView> {
        self.answer("save".into(), known(id).map(|()| view()))
    }

    fn delete(&self, id: JobId, stop_first: bool, force: bool) -> Answer<'_, JobView> {
        self.answer(format!("delete stop_first {stop_first} force {force}"), known(id).map(|()| view()))
    }

    fn purge(&self, query: PurgeQuery) -> Answer<'_, Vec<JobId>> {
        self.answer(format!("{query:?}"), Ok(vec![id()]))
    }

    fn logs(&self, id: JobId, query: LogQuery) -> Answer<'_, mpsc::Receiver<LogItem>> {
        let items = self.log.lock().expect("lock").clone();
        let (to, from) = mpsc::channel(items.len() + 1);
        for item in items {
            to.try_send(item).expect("room");
        }
        if self.keep_log_open {
            self.log_stays_open.lock().expect("lock").push(to);
        }
        self.answer(format!("{query:?}"), known(id).map(|()| from))
    }

    fn events(&self, query: EventQuery, limit: u32) -> Answer<'_, Page<EventView>> {
        let EventItem::Event(event) = happening(4) else { unreachable!("an event") };
        self.answer(format!("{query:?} limit {limit}"), Ok(one_page(vec![*event])))
    }

    fn follow_events(&self, query: EventQuery) -> Answer<'_, mpsc::Receiver<EventItem>> {
        let items = self.happenings.lock().expect("lock").clone();
        let (to, from) = mpsc::channel(items.len() + 1);
        for item in items {
            to.try_send(item).expect("room");
        }
        self.answer(format!("follow {query:?}"), Ok(from))
    }

    fn attempts(&self, id: JobId) -> Answer<'_, Vec<AttemptView>> {
        let attempt = |attempt| AttemptView {
            attempt,
            started_at: Timestamp(0),
            ended_at: None,
            resumed_from_step: None,
            reached_step: None,
            cause: None,
            first_failed_rank: None,
            reason: None,
            backoff_ms: None,
        };
        self.answer("attempts".into(), known(id).map(|()| (1..=5).map(attempt).collect()))
    }

    fn checkpoints(&self, id: JobId) -> Answer<'_, Vec<CheckpointView>> {
        self.answer("checkpoints".into(), known(id).map(|()| Vec::new()))
    }

    fn metrics(&self, id: JobId) -> Answer<'_, Vec<MetricPoint>> {
        let point =
            |step| MetricPoint { time: Timestamp(step), attempt: 1, step, samples: None, loss: Some(1.0), metrics: BTreeMap::new() };
        self.answer("metrics".into(), known(id).map(|()| (0..1000).map(point).collect()))
    }

    fn explain(&self, id: JobId) -> Answer<'_, Explanation> {
        let explanation = Explanation { state: JobState::Queued, reason: "no node".into(), position: Some(0), ..Explanation::default() };
        self.answer("explain".into(), known(id).map(|()| explanation))
    }

    fn nodes(&self) -> Answer<'_, Vec<NodeView>> {
        self.answer("nodes".into(), Ok(vec![node("a"), node("b"), node("c")]))
    }

    fn node(&self, id: NodeId) -> Answer<'_, NodeView> {
        let missing = || Problem::new(Code::NotFound, "there is no such node");
        self.answer("node".into(), if id.0 == "a" { Ok(node("a")) } else { Err(missing()) })
    }

    fn cordon(&self, id: NodeId, cordoned: bool) -> Answer<'_, NodeView> {
        self.answer(format!("cordon {id} {cordoned}"), Ok(node("a")))
    }

    fn drain(&self, id: NodeId, deadline: Option<crate::time::Millis>) -> Answer<'_, NodeView> {
        let within = deadline.map(|deadline| format!(" within {deadline}")).unwrap_or_default();
        self.answer(format!("drain {id}{within}"), Ok(node("a")))
    }

    fn status(&self) -> Answer<'_, StatusView> {
        let status = StatusView {
            version: "0.1.0".into(),
            uptime_seconds: 1.0,
            leader: true,
            nodes: NodeCounts::default(),
            jobs: BTreeMap::new(),
            ranks: 0,
            gpus: GpuCounts::default(),
            queue_depth: 0,
            serving: ServingCounts::default(),
            auth: "loopback".into(),
        };
        self.answer("status".into(), Ok(status))
    }

    fn prometheus(&self) -> Answer<'_, String> {
        self.answer("prometheus".into(), Ok("# TYPE x gauge\nx 1\n# EOF\n".into()))
    }

    fn ready(&self) -> Result<(), String> {
        if self.keep_log_open { Err("the store is being read".into()) } else { Ok(()) }
    }

    fn caller(&self, token: &str) -> Result<Caller, BadToken> {
        let (id, secret) = split_token(token).ok_or(BadToken::Malformed)?;
        let user = |user: &str, role| Caller { user: Some(user.into()), token: Some(id.into()), ..Caller::anonymous(role) };
        if secret != SECRET {
            return Err(BadToken::Unknown);
        }
        match id {
            VIEWER => Ok(user("vera", Role::Viewer)),
            ALICE => Ok(user("alice", Role::User)),
            BOB => Ok(user("bob", Role::User)),
            OPERATOR => Ok(user("otto", Role::Operator)),
            ADMIN => Ok(user("ada", Role::Admin)),
            EXPIRED => Err(BadToken::Expired),
            REVOKED => Err(BadToken::Revoked),
            _ => Err(BadToken::Unknown),
        }
    }

    fn job_user(&self, id: JobId) -> Answer<'_, Option<String>> {
        Box::pin(async move { known(id).map(|()| Some("alice".into())) })
    }

    fn audit(&self, entry: AuditEntry) -> Answer<'_, ()> {
        self.audited.lock().expect("lock").push(entry);
        Box::pin(async { Ok(()) })
    }

    fn audit_log(&self, before: Option<u64>, user: Option<String>, limit: u32) -> Answer<'_, Page<AuditView>> {
        self.answer(format!("audit before {before:?} of {user:?} limit {limit}"), Ok(one_page(Vec::new())))
    }

    fn create_token(&self, wanted: NewToken, by: Option<String>) -> Answer<'_, MadeToken> {
        let about = TokenView { user: wanted.user.clone(), role: wanted.role, created_by: by, ..token() };
        self.answer(format!("{wanted:?}"), Ok(MadeToken { token: full(ADMIN), about }))
    }

    fn tokens(&self) -> Vec<TokenView> {
        vec![token()]
    }

    fn revoke_token(&self, id: String) -> Answer<'_, TokenView> {
        let answer = if id == ADMIN || id == self::id().to_string() {
            Ok(token())
        } else {
            Err(Problem::new(Code::NotFound, "there is no such token: GET /tokens lists all"))
        };
        self.answer(format!("revoke {id}"), answer)
    }

    fn keep_package(&self, mut upload: Upload) -> Answer<'_, (PackageView, bool)> {
        Box::pin(async move {
            let mut bytes = 0;
            while let Some(chunk) = futures_util::StreamExt::next(&mut upload.bytes).await {
                bytes += chunk.map_err(|_| Problem::new(Code::BadRequest, "it ended early"))?.len() as u64;
            }
            self.note(format!("keep package of {bytes} bytes"));
            Ok((PackageView { package: upload.package, bytes }, bytes > 0))
        })
    }

    fn package(&self, package: String) -> Answer<'_, PackageView> {
        let missing = Problem::new(Code::NotFound, "there is no such package: upload it");
        let known = package.starts_with("aa");
        self.answer("package".into(), if known { Ok(PackageView { package, bytes: 3 }) } else { Err(missing) })
    }

    fn read_package(&self, _: String) -> Answer<'_, (u64, PackageBytes)> {
        let bytes = futures_util::stream::iter([Ok(Bytes::from_static(b"pa")), Ok(Bytes::from_static(b"ck"))]);
        self.answer("read package".into(), Ok((4, Box::pin(bytes) as PackageBytes)))
    }

    fn agent_token_is(&self, token: &str) -> bool {
        token == TOKEN
    }

    fn agent_linked(&self, _: Agent, mut link: AgentLink) -> Answer<'_, ()> {
        Box::pin(async move {
            link.to.send("welcome".into()).await.expect("open");
            while let Some(frame) = link.from.recv().await {
                let done = matches!(&frame, AgentFrame::Text(text) if text == "bye");
                if matches!(&frame, AgentFrame::Text(text) if text == "say much") {
                    link.to.send("much ".repeat(1_000)).await.expect("open");
                }
                self.frames.lock().expect("lock").push(frame);
                if done {
                    break;
                }
            }
            Ok(())
        })
    }

    fn agent_silence_max(&self) -> std::time::Duration {
        std::time::Duration::from_secs(20)
    }

    fn node_of(&self, certificate: &[u8; 32]) -> Result<NodeId, BadCertificate> {
        match certificate[0] {
            1 => Ok(NodeId("a".into())),
            2 => Err(BadCertificate::Expelled),
            _ => Err(BadCertificate::Unknown),
        }
    }

    fn join_token(&self, shown: &str) -> Result<String, BadJoin> {
        let (id, _) = crate::join::split_shown(shown).ok_or(BadJoin::Malformed)?;
        if id == ADMIN { Ok(id.into()) } else { Err(BadJoin::Unknown) }
    }

    fn create_join_token(&self, wanted: NewNodeToken, by: Option<String>) -> Answer<'_, MadeNodeToken> {
        let made = MadeNodeToken { token: "K1…".into(), about: NodeTokenView { created_by: by, ..join_token() } };
        self.answer(format!("{wanted:?}"), Ok(made))
    }

    fn join_tokens(&self) -> Vec<NodeTokenView> {
        vec![join_token()]
    }

    fn revoke_join_token(&self, id: String) -> Answer<'_, NodeTokenView> {
        self.answer(format!("revoke join token {id}"), Ok(join_token()))
    }

    fn join(&self, request: JoinRequest, shown: String) -> Answer<'_, NodeCertificate> {
        let id = shown.split(':').next().unwrap_or_default().to_string();
        self.answer(format!("join {} with {id}", request.node), Ok(certificate(request.node)))
    }

    fn renew(&self, node: NodeId, _: [u8; 32], _: String) -> Answer<'_, NodeCertificate> {
        self.answer(format!("renew {node}"), Ok(certificate(node)))
    }

    fn expel(&self, node: NodeId, force: bool) -> Answer<'_, NodeView> {
        self.answer(format!("expel {node} force {force}"), Ok(self::node(&node.0)))
    }
}
