//! Streams that go on over broken connections and restarts of the coordinator, without a gap or a repeat: `Last-Event-ID` does it.
//!
//! A refusal (4xx) ends a stream; anything else is tried again until nothing has answered for [`GIVE_UP_AFTER`].

use std::collections::VecDeque;
use std::time::Duration;

use reqwest::Response;
use serde::Deserialize;
use tokio::time::{Instant, sleep, timeout};

use super::calls::LogRequest;
use super::sse::{Parser, RawEvent};
use super::{Client, Error};
use crate::ids::JobId;
use crate::problem::Problem;
use crate::request::LogLine;
use crate::status::{EventView, JobState};

/// A stream that can not be had back for this long is given up.
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);
/// The coordinator pings at least every 15 s: after this the connection is dead.
const SILENCE_MAX: Duration = Duration::from_secs(45);
/// A connection without an event counts as working after this.
const SETTLED_AFTER: Duration = Duration::from_secs(5);
/// First wait before a reconnect; it doubles up to what the server asks for.
const RETRY_FIRST: Duration = Duration::from_millis(100);

/// What a log stream brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogNews {
    /// A line.
    Line(LogLine),
    /// So many bytes are gone.
    Gap(u64),
    /// The part of this node can not be had now.
    Missing {
        /// Whose part.
        node: String,
        /// Why.
        reason: String,
    },
    /// The job is final and everything was given out.
    End(JobState),
}

/// What an event stream brings.
#[derive(Debug, Clone, PartialEq)]
pub enum EventNews {
    /// An event.
    Event(Box<EventView>),
    /// The job is final and everything was given out.
    End(JobState),
}

/// A followed log.
#[derive(Debug)]
pub struct LogStream(Follower);

/// Followed events.
#[derive(Debug)]
pub struct EventStream(Follower);

impl Client {
    /// Follows a job's log until the job is final.
    pub fn follow_logs(&self, id: JobId, log: &LogRequest) -> LogStream {
        LogStream(Follower::new(self.clone(), format!("/jobs/{id}/logs/stream"), log.query()))
    }

    /// Follows what happens to a job, or to everything.
    pub fn follow_events(&self, id: Option<JobId>, after: Option<String>) -> EventStream {
        let path = id.map_or("/events/stream".into(), |id| format!("/jobs/{id}/events/stream"));
        let mut follower = Follower::new(self.clone(), path, Vec::new());
        follower.last_id = after;
        EventStream(follower)
    }
}

#[derive(Deserialize)]
struct Gap {
    bytes: u64,
    node: Option<String>,
    #[serde(default)]
    reason: String,
}

impl Gap {
    fn news(self) -> LogNews {
        match self.node {
            Some(node) => LogNews::Missing { node, reason: self.reason },
            None => LogNews::Gap(self.bytes),
        }
    }
}

#[derive(Deserialize)]
struct State {
    state: JobState,
}

impl LogStream {
    /// The next news; `None` after the end.
    pub async fn next(&mut self) -> Result<Option<LogNews>, Error> {
        while let Some(event) = self.0.next().await? {
            let news = match event.name.as_str() {
                "log" => read(&event.data).map(LogNews::Line),
                "gap" => read(&event.data).map(Gap::news),
                "end" => read::<State>(&event.data).map(|end| LogNews::End(end.state)),
                _ => continue,
            }?;
            self.0.took(&event, matches!(news, LogNews::End(_)));
            return Ok(Some(news));
        }
        Ok(None)
    }
}

impl EventStream {
    /// The next news; `None` after the end.
    pub async fn next(&mut self) -> Result<Option<EventNews>, Error> {
        let Some(event) = self.0.next().await? else { return Ok(None) };
        let news = match event.name.as_str() {
            "end" => read::<State>(&event.data).map(|end| EventNews::End(end.state)),
            _ => read(&event.data).map(|event| EventNews::Event(Box::new(event))),
        }?;
        self.0.took(&event, matches!(news, EventNews::End(_)));
        Ok(Some(news))
    }
}

fn read<T: serde::de::DeserializeOwned>(data: &str) -> Result<T, Error> {
    serde_json::from_str(data).map_err(|bad| Error::Broken(format!("the stream brought what this client can not read: {bad}")))
}

/// A connection that comes back.
#[derive(Debug)]
struct Follower {
    client: Client,
    path: String,
    query: Vec<(&'static str, String)>,
    last_id: Option<String>,
    connection: Option<Response>,
    connected_at: Instant,
    parser: Parser,
    waiting: VecDeque<RawEvent>,
    ended: bool,
    failing_since: Option<Instant>,
    wait: Duration,
}

impl Follower {
    fn new(client: Client, path: String, query: Vec<(&'static str, String)>) -> Self {
        Self {
            client,
            path,
            query,
            last_id: None,
            connection: None,
            connected_at: Instant::now(),
            parser: Parser::default(),
            waiting: VecDeque::new(),
            ended: false,
            failing_since: None,
            wait: RETRY_FIRST,
        }
    }

    /// The caller has this event: a reconnect goes on after it.
    fn took(&mut self, event: &RawEvent, ended: bool) {
        if event.id.is_some() {
            self.last_id.clone_from(&event.id);
        }
        self.ended |= ended;
        self.settled();
    }

    /// It works again: the next failure is a first one.
    fn settled(&mut self) {
        self.failing_since = None;
        self.wait = RETRY_FIRST;
    }

    async fn next(&mut self) -> Result<Option<RawEvent>, Error> {
        loop {
            if self.ended {
                return Ok(None);
            }
            match self.waiting.pop_front() {
                Some(event) if event.name == "error" => {
                    let problem: Problem = read(&event.data)?;
                    self.lost(Error::Problem(Box::new(problem))).await?;
                }
                Some(event) => return Ok(Some(event)),
                None => {
                    if let Err(error) = self.more().await {
                        self.lost(error).await?;
                    }
                }
            }
        }
    }

    /// Connects when there is no connection, and waits for bytes.
    async fn more(&mut self) -> Result<(), Error> {
        if self.connection.is_none() {
            let mut request = self.client.get(&self.path).query(&self.query);
            if let Some(id) = &self.last_id {
                request = request.header("last-event-id", id);
            }
            self.connection = Some(self.client.send(request).await?);
            self.connected_at = Instant::now();
        }
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let silent = || Error::Broken(format!("the stream was silent for {} s", SILENCE_MAX.as_secs()));
        let chunk = timeout(SILENCE_MAX, connection.chunk()).await.map_err(|_| silent())?;
        match chunk.map_err(|error| self.client.broken(&error))? {
            None => Err(Error::Broken("the stream closed before its end".into())),
            Some(bytes) => {
                let large = |_| Error::Broken("the stream brought an event that is too large".into());
                self.parser.feed(&bytes, &mut self.waiting).map_err(large)?;
                if self.connected_at.elapsed() > SETTLED_AFTER {
                    self.settled();
                }
                Ok(())
            }
        }
    }

    /// Drops the connection and waits a while, or gives up.
    async fn lost(&mut self, error: Error) -> Result<(), Error> {
        self.connection = None;
        self.waiting.clear();
        let most = Duration::from_millis(self.parser.retry_ms.unwrap_or(3000).min(30_000));
        self.parser.forget();
        if error.problem().is_some_and(|problem| problem.status < 500) {
            return Err(error);
        }
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        if since.elapsed() > GIVE_UP_AFTER {
            return Err(error);
        }
        sleep(self.wait).await;
        self.wait = (self.wait * 2).min(most);
        Ok(())
    }
}
