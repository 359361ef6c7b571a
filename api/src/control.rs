//! What the HTTP doors ask of whoever is in control: one object-safe trait, so that the router can be tested with a fake.
//!
//! Every answer is about durable facts. The doors have checked syntax, sizes and callers before they ask.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::agent::log::{Header, LogPlace, LogPosition};
use crate::auth::{AuditEntry, AuditView, BadToken, Caller, MadeToken, NewToken, TokenView};
use crate::ids::{JobId, NodeId};
use crate::job::JobSpec;
use crate::join::{BadCertificate, BadJoin, JoinRequest, MadeNodeToken, NewNodeToken, NodeCertificate, NodeTokenView};
use crate::package::PackageView;
use crate::problem::Problem;
use crate::status::{
    AttemptView, CheckpointView, EventView, Explanation, JobState, JobView, MetricPoint, NodeView, Page, PlacementPlan, StatusView, Summary,
};
use crate::time::Millis;

/// Bytes of a package as they come; an error ends them.
pub type PackageBytes = Pin<Box<dyn futures_util::Stream<Item = std::io::Result<Bytes>> + Send>>;

/// An answer to come.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, Problem>> + Send + 'a>>;

/// A job to accept.
#[derive(Debug, Clone)]
pub struct Submission {
    /// Checked and complete.
    pub spec: JobSpec,
    /// The `Idempotency-Key` and a hash of the body.
    pub idempotency: Option<(String, [u8; 32])>,
    /// Whose it is.
    pub user: Option<String>,
}

/// Which part of a list.
#[derive(Debug, Clone, Default)]
pub struct ListQuery {
    /// Entries per page, 1 to 500.
    pub limit: u32,
    /// Go on after this cursor.
    pub after: Option<String>,
    /// Only these states; empty means all.
    pub states: Vec<JobState>,
    /// Only jobs of this name.
    pub name: Option<String>,
    /// Only jobs with all these labels.
    pub labels: Vec<(String, String)>,
    /// Only jobs of this user.
    pub user: Option<String>,
}

/// Final jobs to remove.
#[derive(Debug, Clone)]
pub struct PurgeQuery {
    /// Finished at least this long ago.
    pub older_than: Millis,
    /// Only these final states; empty means all three.
    pub states: Vec<JobState>,
    /// Tell, but remove nothing.
    pub dry_run: bool,
}

/// Which lines.
#[derive(Debug, Clone, Default)]
pub struct LogQuery {
    /// Of this rank only.
    pub rank: Option<u32>,
    /// Of this attempt only.
    pub attempt: Option<u32>,
    /// Only the last so many lines that are there now (then go on, when following).
    pub tail: Option<u64>,
    /// Go on after this place.
    pub after: Option<LogPlace>,
    /// Go on until the job is final; else end with what is there.
    pub follow: bool,
}

/// What a log stream gives out, in order. The receiver is bounded; a slow reader holds up only itself. A source is one of the job's nodes,
/// by its number in the order in which they came to the job.
#[derive(Debug, Clone)]
pub enum LogItem {
    /// A record: whole lines of one stream of one rank (a part of a line when flagged so).
    Record {
        /// Whose log it stands in.
        source: usize,
        /// Who, when, which stream.
        header: Header,
        /// Its bytes.
        data: Bytes,
        /// Where the record stands; `line` is how many of its first lines `data` is without (a tail begins inside a record).
        at: LogPosition,
        /// Where the next one begins.
        next: LogPosition,
    },
    /// So many bytes of older log are gone.
    Gap {
        /// Of whose log.
        source: usize,
        /// Bytes.
        bytes: u64,
        /// Where what follows begins.
        next: LogPosition,
    },
    /// Nothing that is wanted stands before this place of a source, or not after what was given out of it.
    Passed {
        /// Of whose log.
        source: usize,
        /// Where what follows begins.
        next: LogPosition,
    },
    /// The part of this node can not be had now, and the others' is given without it. A reader that comes back gets it.
    Missing {
        /// Whose part.
        node: NodeId,
        /// Why.
        reason: String,
    },
    /// The job is final (or was, at the time of asking) and everything was given out.
    End(JobState),
    /// Not following: everything that there was at the time of asking was given out; the job is not final.
    CaughtUp,
    /// The log can not be read further now; the reader may come back with its last position.
    Failed(Problem),
}

/// Which events.
#[derive(Debug, Clone, Default)]
pub struct EventQuery {
    /// Of this job only.
    pub job: Option<JobId>,
    /// Go on after this id.
    pub after: Option<u64>,
    /// Of this user's jobs only.
    pub user: Option<String>,
}

/// What an event stream gives out.
#[derive(Debug, Clone)]
pub enum EventItem {
    /// An event.
    Event(Box<EventView>),
    /// The job is final and everything was given out.
    End(JobState),
}

/// Both ends of an agent's link, already authenticated: text and binary frames.
#[derive(Debug)]
pub struct AgentLink {
    /// Frames from the agent; closed when the connection ends.
    pub from: mpsc::Receiver<AgentFrame>,
    /// Frames to the agent; closing it ends the connection.
    pub to: mpsc::Sender<String>,
}

/// Which agent calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Agent {
    /// This machine's own; it has yet to show its secret.
    Local,
    /// A node that joined.
    Node {
        /// Its name.
        node: NodeId,
        /// By which certificate.
        certificate: [u8; 32],
    },
}

/// A frame from an agent.
#[derive(Debug, Clone)]
pub enum AgentFrame {
    /// JSON of [`crate::agent::FromAgent`].
    Text(String),
    /// A [`crate::agent::LogFrame`] and its records.
    Binary(Bytes),
}

/// Whether a job was made now or answered from an idempotency key.
#[derive(Debug, Clone)]
pub struct Accepted {
    /// The job.
    pub job: JobView,
    /// The key had been used with the same body: nothing new was made.
    pub replayed: bool,
}

/// A package that somebody uploads.
pub struct Upload {
    /// How it is named: the sha256 that its bytes must have.
    pub package: String,
    /// Its bytes; no more than [`crate::package::PACKED_BYTES_MAX`] of them are read.
    pub bytes: PackageBytes,
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upload").field("package", &self.package).finish_non_exhaustive()
    }
}

/// Whoever is in control.
pub trait Control: Send + Sync + 'static {
    /// Accepts a job; durable when answered.
    fn submit(&self, submission: Submission) -> Answer<'_, Accepted>;
    /// What would happen to it now.
    fn plan(&self, spec: JobSpec) -> Answer<'_, PlacementPlan>;
    /// Newest first.
    fn jobs(&self, query: ListQuery) -> Answer<'_, Page<JobView>>;
    /// One, with its spec.
    fn job(&self, id: JobId) -> Answer<'_, JobView>;
    /// One.
    fn summary(&self, id: JobId) -> Answer<'_, Summary>;
    /// Newest first.
    fn summaries(&self, query: ListQuery) -> Answer<'_, Page<Summary>>;
    /// Stops an active job; no error when it is stopping already, 409 when it is final. `force` skips the grace.
    fn stop(&self, id: JobId, force: bool) -> Answer<'_, JobView>;
    /// Restarts the gang of an active job; 409 when it is final.
    fn restart(&self, id: JobId) -> Answer<'_, JobView>;
    /// Tells the ranks of a running job to save now and go on; 409 when it does not run, or can not.
    fn save(&self, id: JobId) -> Answer<'_, JobView>;
    /// Removes a final job with all its files; stops an active one first when `stop_first`, else 409.
    fn delete(&self, id: JobId, stop_first: bool, force: bool) -> Answer<'_, JobView>;
    /// Removes final jobs; answers the ids, newest first.
    fn purge(&self, query: PurgeQuery) -> Answer<'_, Vec<JobId>>;
    /// A job's log. 404 for an unknown job.
    fn logs(&self, id: JobId, query: LogQuery) -> Answer<'_, mpsc::Receiver<LogItem>>;
    /// A page of events, oldest first.
    fn events(&self, query: EventQuery, limit: u32) -> Answer<'_, Page<EventView>>;
    /// Events as they come, after what there is.
    fn follow_events(&self, query: EventQuery) -> Answer<'_, mpsc::Receiver<EventItem>>;
    /// Oldest first.
    fn attempts(&self, id: JobId) -> Answer<'_, Vec<AttemptView>>;
    /// Newest first.
    fn checkpoints(&self, id: JobId) -> Answer<'_, Vec<CheckpointView>>;
    /// Oldest first; thinned out to at most a thousand points.
    fn metrics(&self, id: JobId) -> Answer<'_, Vec<MetricPoint>>;
    /// Why it is not running.
    fn explain(&self, id: JobId) -> Answer<'_, Explanation>;
    /// In name order.
    fn nodes(&self) -> Answer<'_, Vec<NodeView>>;
    /// One.
    fn node(&self, id: NodeId) -> Answer<'_, NodeView>;
    /// No new ranks there (or again).
    fn cordon(&self, id: NodeId, cordoned: bool) -> Answer<'_, NodeView>;
    /// Cordons it, stops its ranks with their grace, which ends at the deadline, and puts their jobs back in the queue.
    fn drain(&self, id: NodeId, deadline: Option<Millis>) -> Answer<'_, NodeView>;
    /// What `GET /status` tells.
    fn status(&self) -> Answer<'_, StatusView>;
    /// The Prometheus text.
    fn prometheus(&self) -> Answer<'_, String>;
    /// The store answers and recovery is done; else why not.
    fn ready(&self) -> Result<(), String>;
    /// Who shows this token.
    fn caller(&self, token: &str) -> Result<Caller, BadToken>;
    /// Whose a job is; 404 for an unknown one.
    fn job_user(&self, id: JobId) -> Answer<'_, Option<String>>;
    /// Writes into the audit log. Durable no later than whatever is asked for after this.
    fn audit(&self, entry: AuditEntry) -> Answer<'_, ()>;
    /// Newest first, before that line, of that user.
    fn audit_log(&self, before: Option<u64>, user: Option<String>, limit: u32) -> Answer<'_, Page<AuditView>>;
    /// Makes a token in the name of who asks; durable when answered.
    fn create_token(&self, wanted: NewToken, by: Option<String>) -> Answer<'_, MadeToken>;
    /// Newest first.
    fn tokens(&self) -> Vec<TokenView>;
    /// Opens nothing from now on; durable when answered. 404 for an unknown one.
    fn revoke_token(&self, id: String) -> Answer<'_, TokenView>;
    /// Keeps a package once it was read to its end, its bytes have its hash and it was found good; true when it was not there before.
    fn keep_package(&self, upload: Upload) -> Answer<'_, (PackageView, bool)>;
    /// A package that is kept; 404 for another.
    fn package(&self, package: String) -> Answer<'_, PackageView>;
    /// Its length and its bytes; 404 when it is not kept.
    fn read_package(&self, package: String) -> Answer<'_, (u64, PackageBytes)>;
    /// Whether this is the token of an agent.
    fn agent_token_is(&self, token: &str) -> bool;
    /// Takes an agent's link over; ends when the link does.
    fn agent_linked(&self, agent: Agent, link: AgentLink) -> Answer<'_, ()>;
    /// An agent's link that is silent for so long is over: its node counts as lost then.
    fn agent_silence_max(&self) -> Duration;
    /// Whose certificate this is, by its sha256.
    fn node_of(&self, certificate: &[u8; 32]) -> Result<NodeId, BadCertificate>;
    /// The id of a join token that opens something, by its `id:secret`. Whether it is used up, [`Control::join`] says.
    fn join_token(&self, shown: &str) -> Result<String, BadJoin>;
    /// Makes a join token in the name of who asks; durable when answered. 409 where agents can not come in.
    fn create_join_token(&self, wanted: NewNodeToken, by: Option<String>) -> Answer<'_, MadeNodeToken>;
    /// Newest first.
    fn join_tokens(&self) -> Vec<NodeTokenView>;
    /// Nobody joins with it from now on; durable when answered. 404 for an unknown one.
    fn revoke_join_token(&self, id: String) -> Answer<'_, NodeTokenView>;
    /// Makes a node of who shows this join token; durable when answered.
    fn join(&self, request: JoinRequest, shown: String) -> Answer<'_, NodeCertificate>;
    /// Another certificate for a node, which showed this one; durable when answered.
    fn renew(&self, node: NodeId, certificate: [u8; 32], request: String) -> Answer<'_, NodeCertificate>;
    /// Forgets a node: its certificate opens nothing from now on. 409 while ranks are placed there and it is not forced.
    fn expel(&self, node: NodeId, force: bool) -> Answer<'_, NodeView>;
}
