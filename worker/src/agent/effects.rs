//! Carrying out what the engine wants, and keeping what that needs: connections, watches, prepared gangs, work on other threads.
//!
//! Decides nothing. Work that can block runs on blocking threads and comes back as [`Done`]; per job at most one check of checkpoints and
//! one scan of output is under way. What fails here is logged: the engine learns of it from what then happens, or does not.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use everlit_api::agent::copies::{CopyDoor, CopyOrder};
use everlit_api::agent::log::LogStart;
use everlit_api::agent::stored::{ArchiveOrder, Archived, StoreFault, UploadOrder, Uploaded};
use everlit_api::agent::{Beat, CheckpointNews, FromAgent, GangSpec, GpuHolder, Hello, Resumed};
use everlit_api::data::{DataTurn, Listed};
use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_api::ports::PortRange;
use everlit_api::rank::RankExit;
use everlit_api::status::NodeLoad;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::archives::Archives;
use super::checkpoints::{self, Checked, Tracker};
use super::copies::{self, Copies};
use super::data::{Cache, Feeds};
use super::engine::Action;
use super::folders::DRAINED_NAME;
use super::gpu::Gpus;
use super::gpu_memory;
use super::limits::{LAST_COPIES_MAX, LAST_COPIES_WAIT, LAST_UPLOADS_WAIT, REPORT_EVERY, STACKS_MAX, VERIFY_AT_ONCE};
use super::link::Link;
use super::load::LoadMeter;
use super::logs::Logs;
use super::metrics::{Progress, Scanner};
use super::packages::Packages;
use super::procs;
use super::progress::Outputs;
use super::ranks::{Ranks, ShimNews};
use super::resume::Asked;
use super::stacks;
use super::start::{self, Node, Prepared, Refused};
use super::uploads::{Pace, Uploads};
use super::watch::{Watched, Watcher};
use crate::checkpoint::{CheckpointError, Quarantined};
use crate::rendezvous::Server;

/// Work that was done on another thread.
#[derive(Debug)]
pub(super) enum Done {
    Prepared { job: JobId, attempt: u32, held: Vec<GpuHolder>, outcome: Result<Prepared, Refused> },
    Spawned(Vec<(Incarnation, io::Result<UnixStream>)>),
    Checked { job: JobId, outcome: Result<Checked, CheckpointError> },
    Copied { job: JobId, step: u64, outcome: Result<Checked, String> },
    PutAside { job: JobId, outcome: Result<Checked, CheckpointError> },
    Uploaded(Uploaded),
    Archived(Archived),
    StoreFault(StoreFault),
    DataListed(Listed),
    DataTurned(DataTurn),
    DataAwaited { job: JobId, attempt: u32, waiting: bool },
    Scanned { job: JobId, scanner: Scanner, progress: Progress },
    CpuRead { incarnation: Incarnation, cpu_ms: u64 },
    Probed(Option<u64>),
    Loaded { meter: LoadMeter, load: NodeLoad },
    JobRemoved { job: JobId, outcome: io::Result<()> },
}

pub(super) struct Effects {
    pub(super) node: Arc<Node>,
    pub(super) ranks: Ranks,
    pub(super) watcher: Watcher,
    gpus: Arc<Gpus>,
    packages: Arc<Packages>,
    /// Gangs that wait for a package; one ends with its sender.
    preparing: BTreeMap<(JobId, u32), watch::Sender<()>>,
    done: mpsc::Sender<Done>,
    link: Option<Link>,
    logs: Logs,
    prepared: BTreeMap<(JobId, u32), Prepared>,
    /// Where ranks of several nodes meet, of the newest attempt of a job.
    meetings: BTreeMap<JobId, (u32, Server)>,
    checkpoints: Tracker,
    verifying: Arc<Semaphore>,
    copies: Copies,
    uploads: Uploads,
    feeds: Feeds,
    archives: Archives,
    outputs: Outputs,
    meter: Option<LoadMeter>,
    report_every: Duration,
    report_at: Instant,
    trashed: u64,
    /// Processes that the kernel had killed for want of memory when it was last looked.
    killed_for_memory: u64,
}

impl Effects {
    pub(super) fn new(
        node: Node,
        gpus: Gpus,
        packages: Packages,
        watcher: Watcher,
        pace: Pace,
        shims: mpsc::Sender<(Incarnation, ShimNews)>,
        done: mpsc::Sender<Done>,
    ) -> Self {
        let (folders, data_cache) = (node.folders.clone(), node.data_cache);
        let uploads = Uploads::new(pace);
        let feeds = Feeds::new(Cache::new(folders.shards(), data_cache), folders.clone(), uploads.lane(), done.clone());
        Self {
            node: Arc::new(node),
            ranks: Ranks::new(folders.clone(), shims),
            watcher,
            gpus: Arc::new(gpus),
            packages: Arc::new(packages),
            preparing: BTreeMap::new(),
            done,
            link: None,
            logs: Logs::new(folders.clone()),
            prepared: BTreeMap::new(),
            meetings: BTreeMap::new(),
            checkpoints: Tracker::default(),
            verifying: Arc::new(Semaphore::new(VERIFY_AT_ONCE)),
            copies: Copies::default(),
            uploads,
            feeds,
            archives: Archives::default(),
            outputs: Outputs::new(folders),
            meter: Some(LoadMeter::default()),
            report_every: REPORT_EVERY,
            report_at: Instant::now(),
            trashed: 0,
            killed_for_memory: procs::killed_for_memory(),
        }
    }

    /// Runs work on a blocking thread and brings its result to the driver.
    fn work(&self, work: impl FnOnce() -> Done + Send + 'static) {
        let done = self.done.clone();
        // The driver is gone only when the agent ends.
        drop(spawn_blocking(move || drop(done.blocking_send(work()))));
    }

    pub(super) fn carry_out(&mut self, action: Action) {
        match action {
            Action::Say(frame) => self.say(&self.with_stacks(frame)),
            Action::Prepare(spec) => self.prepare(spec),
            Action::Spawn { job, attempt } => self.spawn(job, attempt),
            Action::Regroup { spec, resumed, fresh } => self.regroup(spec, resumed, fresh),
            Action::LeaveOut(incarnation) => {
                self.work(move || Done::Spawned(vec![(incarnation, Err(io::Error::other("stopped before it was started")))]));
            }
            Action::Signal { incarnation, signal } => self.ranks.signal(incarnation, signal),
            Action::Notify { incarnation, signal } => self.ranks.notify(incarnation, signal),
            Action::FreeSnapshots { job, committed, attempt } => {
                self.in_memory(move |node| node.memory.free_older(job, committed, attempt))
            }
            Action::MarkDrained(incarnation) => {
                if let Err(error) = fs::write(self.node.folders.run(incarnation).join(DRAINED_NAME), "") {
                    tracing::warn!(%incarnation, %error, "could not mark a drained rank");
                }
            }
            Action::ReadCpu(incarnation) => {
                if let Some(shim) = self.ranks.shim(incarnation) {
                    self.work(move || Done::CpuRead { incarnation, cpu_ms: procs::session_cpu_ms(shim) });
                }
            }
            Action::Probe(incarnation) => {
                let folder = self.node.folders.run(incarnation);
                self.work(move || Done::Probed(procs::probe(&folder)));
            }
            Action::RemoveRuns(incarnations) => self.remove_runs(incarnations),
            Action::RetireJob(job) => {
                self.drop_job(job);
                // A job that never had files needs no mark.
                if let Err(error) = fs::write(self.node.folders.ended(job), "").or_else(not_found_is_fine) {
                    tracing::warn!(%job, %error, "could not mark a final job");
                }
                self.in_memory(move |node| node.memory.end(&node.folders, job));
            }
            Action::RemoveJob(job) => self.remove_job(job),
            Action::Exit(_) => {}
        }
    }

    fn prepare(&mut self, mut spec: Box<GangSpec>) {
        let (node, gpus, done) = (self.node.clone(), self.gpus.clone(), self.done.clone());
        let (job, attempt) = (spec.job, spec.attempt);
        let missing = spec.package.clone().filter(|_| !node.folders.workdir(job).exists());
        // Dropped, it says that nobody waits for this any more: an attempt before it is not wanted either.
        let (stop, mut stopped) = watch::channel(());
        self.preparing.retain(|(other, older), stop| !stop.is_closed() && (*other != job || *older > attempt));
        self.preparing.insert((job, attempt), stop);
        let until = stopped.clone();
        let faults = self.done.clone();
        let tell = move |fault| drop(faults.blocking_send(Done::StoreFault(fault)));
        let data = self.feeds.ready(job, attempt);
        let prepare = move |spec: Box<GangSpec>| {
            // First: what follows says that ranks may have been started, and a stop that comes meanwhile finds none.
            let held = gpu_memory::wait(&gpus, &node.folders, &spec);
            Done::Prepared {
                job: spec.job,
                attempt: spec.attempt,
                held,
                outcome: start::prepare(&node, &spec, &Asked { is_wanted: &|| until.has_changed().is_ok(), tell: &tell }),
            }
        };
        if missing.is_none() && data.is_none() {
            return self.work(move || prepare(spec));
        }
        let packages = self.packages.clone();
        tokio::spawn(async move {
            let ready = async {
                if let Some(package) = missing {
                    packages.fetch(&package).await?;
                }
                match data {
                    Some(data) => Ok(Some(data.await?)),
                    None => Ok(None),
                }
            };
            let ready = tokio::select! {
                ready = ready => ready,
                _ = stopped.changed() => Err(Refused::now("it was stopped before its package or its data was here")),
            };
            let prepared = match ready {
                Ok(shards) => {
                    if let Some((data, shards)) = spec.data.as_mut().zip(shards) {
                        data.shards = Some(shards.to_vec());
                    }
                    spawn_blocking(move || prepare(spec)).await
                }
                Err(refused) => Ok(Done::Prepared { job, attempt, held: Vec::new(), outcome: Err(refused) }),
            };
            if let Ok(prepared) = prepared {
                // The driver is gone only when the agent ends.
                let _ = done.send(prepared).await;
            }
        });
    }

    /// A gang is told: what it needs of stores begins, or goes on with what is new.
    pub(super) fn feed(&mut self, spec: &GangSpec) {
        self.feeds.order(spec);
    }

    /// A gang that waits for its package, for its data, or for a checkpoint from elsewhere, is not wanted any more.
    pub(super) fn stop_preparing(&mut self, job: JobId, attempt: u32) {
        self.preparing.remove(&(job, attempt));
    }

    pub(super) fn keep_prepared(&mut self, prepared: Prepared) {
        self.prepared.insert((prepared.resumed.job, prepared.resumed.attempt), prepared);
    }

    pub(super) fn drop_prepared(&mut self, job: JobId, attempt: u32) {
        self.prepared.remove(&(job, attempt));
    }

    fn spawn(&mut self, job: JobId, attempt: u32) {
        let Some(mut prepared) = self.prepared.remove(&(job, attempt)) else { return };
        if let Some(meeting) = prepared.meeting.take() {
            self.meetings.insert(job, (attempt, meeting));
        }
        self.watch_job(job);
        let node = self.node.clone();
        self.work(move || Done::Spawned(start::spawn(&node, prepared)));
    }

    fn regroup(&mut self, spec: Box<GangSpec>, resumed: Resumed, fresh: Vec<u32>) {
        for (rank, seat) in spec.own_seats().filter(|(rank, seat)| rank != seat && !fresh.contains(seat)) {
            self.ranks.rename(Incarnation { job: spec.job, attempt: spec.attempt, rank: seat }, rank);
        }
        let node = self.node.clone();
        self.work(move || {
            let incarnation = |seat: &u32| Incarnation { job: spec.job, attempt: spec.attempt, rank: *seat };
            Done::Spawned(match start::regroup(&node, &spec, resumed, &fresh) {
                Ok(prepared) => start::spawn(&node, prepared),
                Err(refused) => fresh.iter().map(|seat| (incarnation(seat), Err(io::Error::other(refused.reason.clone())))).collect(),
            })
        });
    }

    pub(super) fn watch_job(&mut self, job: JobId) {
        self.watcher.add(Watched::Checkpoints(job), &self.node.folders.checkpoints(job));
    }

    /// The newest checkpoint of a job, when the coordinator was not told yet.
    pub(super) fn new_checkpoint(&mut self, job: JobId) -> Option<Box<CheckpointNews>> {
        self.checkpoints.news(&self.node.folders, job).map(Box::new)
    }

    /// Has the newest checkpoint read back, and older ones removed.
    pub(super) fn check_checkpoint(&mut self, job: JobId, keep: u32) {
        if !self.checkpoints.begin(job) {
            return;
        }
        let (node, verifying, done) = (self.node.clone(), self.verifying.clone(), self.done.clone());
        tokio::spawn(async move {
            let Ok(_permit) = verifying.acquire_owned().await else { return };
            let check = spawn_blocking(move || checkpoints::check(&node.folders, job, keep));
            if let Ok(outcome) = check.await {
                // The driver is gone only when the agent ends.
                let _ = done.send(Done::Checked { job, outcome }).await;
            }
        });
    }

    /// A check is done: what to tell of it.
    pub(super) fn on_checked(
        &mut self,
        job: JobId,
        keep: u32,
        outcome: Result<Checked, CheckpointError>,
    ) -> (Option<Box<CheckpointNews>>, Vec<Quarantined>) {
        let checked = match outcome {
            Ok(checked) => checked,
            Err(error) => {
                tracing::warn!(%job, %error, "a checkpoint could not be read back");
                Checked { news: None, quarantined: Vec::new() }
            }
        };
        for put_aside in &checked.quarantined {
            tracing::warn!(%job, step = put_aside.step, reason = put_aside.reason, "a damaged checkpoint was put aside");
        }
        if self.checkpoints.end(job, checked.news.as_ref()) {
            self.check_checkpoint(job, keep);
        }
        (checked.news.map(Box::new), checked.quarantined)
    }

    /// Opens the door for other nodes' copies where they reach this one; answers what the coordinator is told of it.
    pub(super) fn open_copies(&mut self, at: IpAddr, ports: PortRange) -> Option<CopyDoor> {
        self.copies.open(&self.node.folders, at, ports)
    }

    /// Whether others may still need what is here, now that this agent is done since then: it stays a little while, and as long as it is asked.
    pub(super) fn must_stay(&self, done_since: Duration) -> bool {
        if self.uploads.is_busy() && done_since < LAST_UPLOADS_WAIT {
            return true;
        }
        let begins_soon = done_since < LAST_COPIES_WAIT || self.copies.is_giving(LAST_COPIES_WAIT);
        self.is_linked() && self.copies.is_open() && begins_soon && done_since < LAST_COPIES_MAX
    }

    /// Whether logs are still on their way into stores.
    pub(super) fn must_archive(&self, done_since: Duration) -> bool {
        self.archives.is_busy() && done_since < LAST_UPLOADS_WAIT
    }

    /// Has a job's log put in its store. `is_still`: no rank of it lives here.
    pub(super) fn archive_logs(&mut self, order: ArchiveOrder, node: &NodeId, is_still: bool) {
        self.archives.order(order, node, is_still, &self.node.folders, &mut self.uploads, &self.done);
    }

    /// Has a checkpoint fetched from another node. One at a time of a job; the newest order waits.
    pub(super) fn copy_checkpoint(&mut self, order: CopyOrder) {
        let Some((order, unwanted, room)) = self.copies.begin(order) else { return };
        let (node, done) = (self.node.clone(), self.done.clone());
        tokio::spawn(async move {
            let Ok(_permit) = room.acquire_owned().await else { return };
            let (job, step) = (order.job, order.step);
            if let Ok(outcome) = spawn_blocking(move || copies::keep(&node.folders, &order, &unwanted)).await {
                // The driver is gone only when the agent ends.
                let _ = done.send(Done::Copied { job, step, outcome }).await;
            }
        });
    }

    /// A copy is made, or is not: the order that waited follows.
    pub(super) fn on_copied(&mut self, job: JobId) {
        if let Some(next) = self.copies.end(job) {
            self.copy_checkpoint(next);
        }
    }

    /// Has a checkpoint put in its job's store, behind everything else.
    pub(super) fn upload(&mut self, order: UploadOrder) {
        self.uploads.order(order, &self.node.folders, &self.done);
    }

    /// Has put aside what was committed too late, and looks at what is left.
    pub(super) fn put_aside(&self, job: JobId, attempt: u32, beyond: Option<u64>) {
        self.node.late.note(job, attempt, beyond);
        let node = self.node.clone();
        self.work(move || Done::PutAside { job, outcome: checkpoints::put_aside(&node.late, &node.folders, job) });
    }

    /// A verdict goes with what the judged rank and those beside it are doing: whatever follows from it may kill them.
    fn with_stacks(&self, mut frame: FromAgent) -> FromAgent {
        if let FromAgent::Judged { incarnation, stacks: kept, .. } = &mut frame {
            let beside = self.ranks.beside(*incarnation).into_iter().take(STACKS_MAX);
            *kept = stacks::of(&beside.map(|(own, pid)| (own.rank, pid)).collect::<Vec<_>>());
        }
        frame
    }

    /// Whether the kernel killed for want of memory since the last time, when a rank was killed. It counts for the whole machine.
    pub(super) fn memory_was_short(&mut self, exit: &RankExit) -> bool {
        let before = std::mem::replace(&mut self.killed_for_memory, procs::killed_for_memory());
        exit.signal == Some(nix::libc::SIGKILL) && self.killed_for_memory > before
    }

    /// A rank without heartbeats wrote something.
    pub(super) fn on_output(&mut self, incarnation: Incarnation, spec: &GangSpec) {
        if !self.ranks.beats(incarnation) {
            self.outputs.on_output(spec);
        }
    }

    pub(super) fn progress_in_tail(&self, incarnation: Incarnation, tail: &[String]) -> Option<Box<Beat>> {
        if self.ranks.beats(incarnation) { None } else { self.outputs.in_tail(incarnation, tail) }
    }

    pub(super) fn connect(&mut self, incarnation: Incarnation, stream: UnixStream) {
        self.watcher.add(Watched::Run(incarnation), &self.node.folders.run(incarnation));
        if let Err(error) = self.ranks.connect(incarnation, stream) {
            tracing::error!(%incarnation, %error, "could not talk to a shim");
        }
    }

    pub(super) fn has_ranks(&self) -> bool {
        !self.ranks.is_empty()
    }

    pub(super) fn on_ended(&mut self, incarnation: Incarnation) {
        self.watcher.remove(Watched::Run(incarnation));
        self.ranks.remove(incarnation);
    }

    fn remove_runs(&mut self, incarnations: Vec<Incarnation>) {
        for Incarnation { job, attempt, .. } in &incarnations {
            if self.meetings.get(job).is_some_and(|(of, _)| of == attempt) {
                self.meetings.remove(job);
            }
        }
        let folders = self.node.folders.clone();
        drop(spawn_blocking(move || {
            for incarnation in &incarnations {
                if let Err(error) = fs::remove_dir_all(folders.run(*incarnation)).or_else(not_found_is_fine) {
                    tracing::warn!(%incarnation, %error, "could not remove a run folder");
                }
                // Only when it was the last: a job without it has nothing to adopt.
                let _ = fs::remove_dir(folders.runs(incarnation.job));
            }
        }));
    }

    fn drop_job(&mut self, job: JobId) {
        self.meetings.remove(&job);
        self.watcher.remove(Watched::Checkpoints(job));
        self.checkpoints.drop_job(job);
        self.outputs.drop_job(job);
        self.feeds.drop_job(job);
    }

    fn remove_job(&mut self, job: JobId) {
        self.drop_job(job);
        self.copies.drop_job(job);
        self.uploads.drop_job(job);
        self.archives.drop_job(job);
        self.trashed += 1;
        let node = self.node.clone();
        let grave = node.folders.trash().join(format!("{job}-{}-{}", std::process::id(), self.trashed));
        self.work(move || Done::JobRemoved { job, outcome: node.memory.remove(&node.folders, job, &grave) });
    }

    /// Gives back the shared memory of jobs that ended or were removed while no agent was here.
    pub(super) fn free_unwanted_memory(&self) {
        self.in_memory(|node| node.memory.free_unwanted(&node.folders));
    }

    /// Work on snapshots, of which nobody waits for the end.
    fn in_memory(&self, work: impl FnOnce(&Node) + Send + 'static) {
        let (node, pending) = (self.node.clone(), self.node.memory.pending());
        drop(spawn_blocking(move || {
            work(&node);
            drop(pending);
        }));
    }

    /// Removes packages that an agent before this one left. Before the first link: after it, one may be under way.
    pub(super) fn sweep_packages(&self) {
        self.packages.sweep();
    }

    /// Deletes what was moved away, whenever.
    pub(super) fn empty_trash(&self) {
        let trash = self.node.folders.trash();
        drop(spawn_blocking(move || {
            for entry in fs::read_dir(trash).into_iter().flatten().flatten() {
                if let Err(error) = fs::remove_dir_all(entry.path()).or_else(not_found_is_fine) {
                    tracing::warn!(path = %entry.path().display(), %error, "could not remove");
                }
            }
        }));
    }

    pub(super) fn link(&mut self, link: Link, hello: Hello) {
        self.link = Some(link);
        self.say(&FromAgent::Hello(hello));
        self.report_at = Instant::now();
    }

    pub(super) fn unlink(&mut self) {
        if let Some(link) = self.link.take() {
            self.logs.link_down(link.id);
        }
    }

    pub(super) fn is_linked(&self) -> bool {
        self.link.is_some()
    }

    pub(super) fn is_linked_as(&self, id: u64) -> bool {
        self.link.as_ref().is_some_and(|link| link.id == id)
    }

    /// Tells the coordinator, if there is one. One that takes no frames is given up: the next hello says everything again.
    pub(super) fn say(&mut self, frame: &FromAgent) {
        let Some(link) = &self.link else { return };
        let sent = match serde_json::to_string(frame) {
            Ok(text) => link.frames.try_send(text).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = sent {
            tracing::warn!(error, "the coordinator does not keep up; linking anew");
            self.unlink();
        }
    }

    pub(super) fn set_report_interval(&mut self, every: Duration) {
        self.report_every = every.clamp(Duration::from_millis(50), Duration::from_secs(3600));
    }

    /// When a report is due: never without a coordinator, nor while one is being made.
    pub(super) fn report_at(&self) -> Option<Instant> {
        (self.link.is_some() && self.meter.is_some()).then_some(self.report_at)
    }

    /// Measures, and looks for progress in output.
    pub(super) fn report(&mut self) {
        self.report_at = Instant::now() + self.report_every;
        if let Some(mut meter) = self.meter.take() {
            let (node, gpus) = (self.node.clone(), self.gpus.clone());
            self.work(move || {
                let load = meter.read(node.folders.root(), &gpus);
                Done::Loaded { meter, load }
            });
        }
        for (job, mut scanner) in self.outputs.take_due() {
            self.work(move || {
                let progress = scanner.scan(job);
                Done::Scanned { job, scanner, progress }
            });
        }
    }

    pub(super) fn keep_meter(&mut self, meter: LoadMeter) {
        self.meter = Some(meter);
    }

    pub(super) fn keep_scanner(&mut self, job: JobId, scanner: Scanner) {
        self.outputs.put_back(job, scanner);
    }

    pub(super) fn open_log(&mut self, stream: u64, job: JobId, from: LogStart, follow: bool) -> Option<&'static str> {
        if let Some(link) = &self.link {
            self.logs.open(stream, job, from, follow, link.clone());
        }
        None
    }

    pub(super) fn credit_log(&self, stream: u64, bytes: u64) -> Option<&'static str> {
        if let Some(link) = &self.link {
            self.logs.credit(stream, link.id, bytes);
        }
        None
    }

    pub(super) fn close_log(&self, stream: u64) -> Option<&'static str> {
        if let Some(link) = &self.link {
            self.logs.close(stream, link.id);
        }
        None
    }
}

pub(super) fn not_found_is_fine(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}
