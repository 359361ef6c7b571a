//! The agent's loop: everything that happens becomes an event of the engine, and its wishes are carried out ([`effects`]).
//!
//! One `select!`, one `match`. What an earlier agent left is adopted before the first connection, so that the first hello is complete.

use std::fs::File;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use everlit_api::agent::{CheckpointNews, FromAgent, Hello, PROTOCOL, ToAgent};
use everlit_api::gpu::GpuError;
use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_api::ports::PortRange;
use everlit_api::service;
use everlit_api::time::{Millis, Timestamp};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal as signals};
use tokio::sync::{Notify, mpsc};
use tokio::time::{MissedTickBehavior, interval, sleep_until};

use super::checkpoints::Checked;
use super::cli::RunArgs;
use super::effects::{Done, Effects};
use super::engine::{Action, Engine, Event};
use super::environment::Reach;
use super::heartbeat::Heard;
use super::identity::Identity;
use super::limits::{GPU_ERRORS_MAX, LAST_COPIES_LOOK, LAST_SAVES_LOOK, LAST_SAVES_MAX, LOOK_EVERY};
use super::link::{self, Coordinator, LinkEvent};
use super::packages::Packages;
use super::policies::{Policies, shorten};
use super::ranks::ShimNews;
use super::shim::{Settled, Told};
use super::start::Node;
use super::uploads::Pace;
use super::watch::{Noticed, Watched, Watcher};
use super::{adopt, gpu, join, load, shim, status};
use crate::checkpoint::Quarantined;

/// Events that may wait for the loop.
const QUEUE: usize = 1024;
/// Longest wait for adopted shims to say who their ranks are.
const ADOPTION_MAX: Duration = Duration::from_secs(2);
/// Longest time in which the last frames leave.
pub(super) const FLUSH_MAX: Duration = Duration::from_millis(500);

/// So long this machine's own agent stays with neither a coordinator nor living ranks; a node that joined stays for ever.
const LINGER: Millis = Millis::secs(60);
const FOR_EVER: Millis = Millis(u64::MAX / 4);

/// How it ended.
pub(super) struct End {
    /// Why, for its log.
    pub reason: &'static str,
    /// Its node is wanted no more.
    pub expelled: bool,
}

/// The agent's loop and everything that it holds.
pub(super) struct Driver {
    started: Instant,
    engine: Engine,
    effects: Effects,
    policies: Policies,
    hello: Hello,
    coordinator: Coordinator,
    address: Option<IpAddr>,
    copy_ports: PortRange,
    data_dir: PathBuf,
    expelled: bool,
    health: UnixListener,
    link_events: mpsc::Receiver<LinkEvent>,
    link_events_tx: mpsc::Sender<LinkEvent>,
    shims: mpsc::Receiver<(Incarnation, ShimNews)>,
    done: mpsc::Receiver<Done>,
    gpu_errors: mpsc::Receiver<GpuError>,
    file_changed: Arc<Notify>,
    _lock: File,
}

impl Driver {
    /// Everything in place, nothing done yet.
    pub(super) fn new(args: &RunArgs, identity: Option<Identity>, node: Node, gpus: gpu::Gpus, lock: File) -> anyhow::Result<Self> {
        let name = match (&identity, &args.node) {
            (Some(own), _) => own.node.clone(),
            (None, Some(name)) => NodeId(name.clone()),
            (None, None) => join::host_name(),
        };
        let hello = Hello {
            protocol: PROTOCOL,
            node: name,
            boot_id: node.boot_id.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            capacity: load::capacity(&gpus, args.slots),
            ranks: Vec::new(),
            checkpoints: Vec::new(),
            draining: false,
            address: None,
            copies: None,
            labels: args.labels.iter().cloned().collect(),
            taints: args.taints.clone(),
        };
        let health = status::listen(node.folders.root()).context("could not open the health socket")?;
        let data_dir = node.folders.root().to_path_buf();
        let (coordinator, coordinator_file, linger) = match (identity, &args.coordinator_file) {
            (Some(own), _) => {
                (Coordinator::Joined(Arc::new(RwLock::new(own))), data_dir.join("node.json"), args.linger.unwrap_or(FOR_EVER))
            }
            (None, Some(file)) => {
                let file = std::path::absolute(file)?;
                (Coordinator::Local(file.clone()), file, args.linger.unwrap_or(LINGER))
            }
            (None, None) => bail!("`{}` is the folder of no node: `everlit-agent join` makes it one", data_dir.display()),
        };
        let packages = Packages::new(node.folders.clone(), coordinator.clone());
        let watcher = Watcher::new(&coordinator_file).context("could not use inotify")?;
        let (link_events_tx, link_events) = mpsc::channel(QUEUE);
        let (shims_tx, shims) = mpsc::channel(QUEUE);
        let (done_tx, done) = mpsc::channel(QUEUE);
        let (gpu_errors_tx, gpu_errors) = mpsc::channel(GPU_ERRORS_MAX);
        gpus.watch(gpu_errors_tx);
        Ok(Self {
            started: Instant::now(),
            engine: Engine::new(0, linger.0),
            effects: Effects::new(node, gpus, packages, watcher, Pace::new(args.upload_rate), shims_tx, done_tx),
            policies: Policies::default(),
            hello,
            coordinator,
            address: args.address,
            copy_ports: args.copy_ports,
            data_dir,
            expelled: false,
            health,
            link_events,
            link_events_tx,
            shims,
            done,
            gpu_errors,
            file_changed: Arc::default(),
            _lock: lock,
        })
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Hands an event to the engine and carries out what it wants; answers why to end, when it wants that.
    fn handle(&mut self, event: Event) -> Option<&'static str> {
        let now = self.now();
        let mut end = None;
        for action in self.engine.handle(now, event) {
            tracing::debug!(?action);
            if let Action::Exit(reason) = action {
                end.get_or_insert(reason);
            } else {
                self.effects.carry_out(action);
            }
        }
        end
    }

    /// Turns until the agent ends; answers why it does.
    pub(super) async fn run(mut self) -> anyhow::Result<End> {
        self.adopt().await;
        self.effects.empty_trash();
        self.effects.sweep_packages();
        self.effects.free_unwanted_memory();
        let link = tokio::spawn(link::run(self.coordinator.clone(), self.file_changed.clone(), self.link_events_tx.clone()));
        if let Coordinator::Joined(own) = &self.coordinator {
            tokio::spawn(join::keep(own.clone(), self.data_dir.clone()));
        }
        let mut terminate = signals(SignalKind::terminate())?;
        let mut interrupt = signals(SignalKind::interrupt())?;
        let mut leave = signals(SignalKind::user_defined1())?;
        let mut pulse = service::Pulse::asked();
        let mut leaves = false;
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tracing::info!(node = %self.hello.node, pid = self.hello.pid, "ready");
        let mut leaving: Option<(&'static str, Instant)> = None;
        service::ready();
        let reason = loop {
            let deadline = self.engine.next_deadline().map(|at| self.started + Duration::from_millis(at));
            let far = Instant::now() + Duration::from_secs(3600);
            let (deadline, report_at) = (deadline.unwrap_or(far), self.effects.report_at());
            let end = tokio::select! {
                Some(event) = self.link_events.recv() => self.on_link(event),
                Some((incarnation, news)) = self.shims.recv() => self.on_shim(incarnation, news),
                Some(done) = self.done.recv() => self.on_done(done),
                Some(error) = self.gpu_errors.recv() => self.handle(Event::GpuFailed(error)),
                noticed = self.effects.watcher.next() => self.on_noticed(noticed),
                () = sleep_until(deadline.into()) => self.handle(Event::DeadlinePassed),
                _ = look.tick(), if self.effects.has_ranks() => self.look_everywhere(),
                () = sleep_until(report_at.unwrap_or(far.into())), if report_at.is_some() => { self.effects.report(); None }
                Ok((stream, _)) = self.health.accept() => { self.answer(&stream); None }
                () = tokio::time::sleep(LAST_COPIES_LOOK), if leaving.is_some() => None,
                _ = terminate.recv() => self.end_asked("saving jobs and ending"),
                _ = interrupt.recv() => self.end_asked("saving jobs and ending"),
                // For who starts another at once, as in an upgrade.
                _ = leave.recv() => { leaves = true; Some("asked to leave its ranks running") }
                () = pulse.due() => { pulse.tell(&self.in_short()); None }
            };
            if let Some(reason) = end {
                leaving.get_or_insert((reason, Instant::now()));
            }
            if let Some((reason, since)) = leaving
                && (leaves || self.expelled || !self.must_stay(since.elapsed()))
            {
                break reason;
            }
        };
        service::ending(reason);
        self.effects.unlink();
        drop(self.link_events);
        // What only shared memory holds of jobs that have just ended: what is not saved now waits there for the next agent.
        let until = Instant::now() + LAST_SAVES_MAX;
        while !leaves && self.effects.node.memory.is_busy() && Instant::now() < until {
            tokio::time::sleep(LAST_SAVES_LOOK).await;
        }
        // The last frames; the coordinator learns the rest from the state files.
        let _ = tokio::time::timeout(FLUSH_MAX, link).await;
        Ok(End { reason, expelled: self.expelled })
    }

    /// Others may still need what is here.
    fn must_stay(&self, done_since: Duration) -> bool {
        self.effects.must_archive(done_since) || (self.engine.has_checkpoints() && self.effects.must_stay(done_since))
    }

    /// Its end begins, and may take as long as its ranks have to save.
    fn end_asked(&mut self, why: &str) -> Option<&'static str> {
        service::ending(why);
        self.handle(Event::EndAsked)
    }

    /// What it does, in a line.
    fn in_short(&self) -> String {
        let linked = if self.effects.is_linked() { "linked" } else { "without its coordinator" };
        format!("{linked}, {} ranks", self.engine.living().count())
    }

    /// Takes over what an earlier agent left.
    async fn adopt(&mut self) {
        let left = adopt::look(&self.effects.node);
        let mut waiting = 0;
        for news in left.checkpoints {
            self.handle(Event::CheckpointSeen(Box::new(news)));
        }
        for gang in left.gangs {
            let (job, ranks) = (gang.file.spec.job, gang.ranks.iter().map(|(incarnation, _)| incarnation.rank).collect());
            let (unstarted, settled): (Vec<_>, Vec<_>) =
                gang.ranks.into_iter().partition(|(_, settled)| matches!(settled, Settled::NeverStarted));
            let unstarted: Vec<u32> = unstarted.into_iter().map(|(incarnation, _)| incarnation.rank).collect();
            tracing::info!(%job, attempt = gang.file.spec.attempt, ?ranks, ?unstarted, "adopting a gang");
            self.effects.watch_job(job);
            self.handle(Event::GangFound { spec: Box::new(gang.file.spec), resumed: Some(gang.file.resumed), ranks, unstarted });
            for (incarnation, settled) in settled {
                waiting += usize::from(matches!(settled, Settled::Alive(_)));
                self.on_settled(incarnation, settled);
            }
        }
        let until = tokio::time::Instant::now() + ADOPTION_MAX;
        while waiting > 0 {
            let Ok(Some((incarnation, news))) = tokio::time::timeout_at(until, self.shims.recv()).await else { return };
            waiting -= usize::from(matches!(news, ShimNews::Told(Told::Started { .. }) | ShimNews::Settled(_)));
            self.on_shim(incarnation, news);
        }
    }

    fn on_link(&mut self, event: LinkEvent) -> Option<&'static str> {
        match event {
            LinkEvent::Up(link) => {
                let (ranks, checkpoints, draining) = self.engine.hello(self.now());
                tracing::info!(ranks = ranks.len(), "linked");
                let reach = self.address.or(link.address).map(|address| Reach { address, interface: load::interface_of(address) });
                let address = reach.as_ref().map(|reach| reach.address.to_string());
                let copies = reach.as_ref().and_then(|reach| self.effects.open_copies(reach.address, self.copy_ports));
                *self.effects.node.reach.lock().unwrap_or_else(PoisonError::into_inner) = reach;
                let hello = Hello { ranks, checkpoints, draining, address, copies, ..self.hello.clone() };
                self.effects.link(link, hello);
                self.handle(Event::Linked)
            }
            LinkEvent::Down(id) if self.effects.is_linked_as(id) => {
                self.effects.unlink();
                self.handle(Event::Unlinked)
            }
            LinkEvent::Expelled(reason) if !self.expelled => {
                self.expelled = true;
                tracing::error!(reason, "nothing that runs here is wanted any more: ranks are stopped, and this agent ends");
                self.end_asked("this node was expelled: its ranks are stopped")
            }
            LinkEvent::Expelled(_) => None,
            LinkEvent::Frame(id, frame) if self.effects.is_linked_as(id) => self.on_frame(*frame),
            LinkEvent::Down(_) | LinkEvent::Frame(..) => None,
        }
    }

    fn on_frame(&mut self, frame: ToAgent) -> Option<&'static str> {
        match frame {
            ToAgent::Welcome { protocol, report_interval, .. } => {
                if protocol != PROTOCOL {
                    tracing::warn!(protocol, own = PROTOCOL, "the coordinator speaks another version");
                }
                self.effects.set_report_interval(report_interval.as_duration());
                None
            }
            ToAgent::StartGang(spec) => {
                self.effects.feed(&spec);
                self.handle(Event::GangOrdered(spec))
            }
            ToAgent::StopGang { job, attempt, grace } => {
                self.effects.stop_preparing(job, attempt);
                self.handle(Event::StopOrdered { job, attempt, grace })
            }
            ToAgent::CopyCheckpoint(order) => {
                self.effects.copy_checkpoint(order);
                None
            }
            ToAgent::Upload(order) => {
                self.effects.upload(order);
                None
            }
            ToAgent::ArchiveLogs(order) => {
                let is_still = !self.engine.living().any(|(incarnation, _)| incarnation.job == order.job);
                self.effects.archive_logs(order, &self.hello.node, is_still);
                None
            }
            ToAgent::PutAside { job, attempt, beyond } => {
                self.effects.put_aside(job, attempt, beyond);
                None
            }
            ToAgent::SaveNow { job, attempt } => self.handle(Event::SaveOrdered { job, attempt }),
            ToAgent::Forget { incarnations } => self.handle(Event::ForgetOrdered(incarnations)),
            ToAgent::RemoveJob { job } => self.handle(Event::RemoveOrdered(job)),
            ToAgent::JobEnded { job } => self.handle(Event::JobEnded(job)),
            // The link has said it already.
            ToAgent::Refused { .. } => None,
            ToAgent::Shutdown => self.handle(Event::ShutdownOrdered),
            ToAgent::OpenLog { stream, job, from, follow } => self.effects.open_log(stream, job, from, follow),
            ToAgent::LogCredit { stream, bytes } => self.effects.credit_log(stream, bytes),
            ToAgent::CloseLog { stream } => self.effects.close_log(stream),
        }
    }

    fn on_shim(&mut self, incarnation: Incarnation, news: ShimNews) -> Option<&'static str> {
        match news {
            ShimNews::Told(Told::Started { shim, pid, at_ms }) => {
                self.effects.ranks.set_processes(incarnation, shim, pid);
                self.handle(Event::RankStarted { incarnation, pid, at: Timestamp(at_ms) })
            }
            ShimNews::Told(Told::Output {}) => {
                if let Some(spec) = self.engine.spec(incarnation.job, incarnation.attempt) {
                    self.effects.on_output(incarnation, spec);
                }
                self.handle(Event::RankOutput(incarnation))
            }
            ShimNews::Told(told @ Told::Exit { .. }) => {
                let folder = self.effects.node.folders.run(incarnation);
                let (exit, lost) = shim::rank_exit(told, &folder)?;
                self.on_ended(incarnation, exit, lost)
            }
            ShimNews::Settled(settled) => self.on_settled(incarnation, *settled),
        }
    }

    fn on_settled(&mut self, incarnation: Incarnation, settled: Settled) -> Option<&'static str> {
        match settled {
            Settled::Alive(stream) => {
                self.effects.connect(incarnation, stream);
                None
            }
            Settled::NeverStarted => self.on_ended(incarnation, shim::never_started(), true),
            Settled::Ended { started, exit, lost } => {
                if let Some(Told::Started { pid, at_ms, .. }) = started {
                    self.handle(Event::RankStarted { incarnation, pid, at: Timestamp(at_ms) });
                }
                self.on_ended(incarnation, *exit, lost)
            }
        }
    }

    /// Everything that the rank did before its end comes before its end.
    fn on_ended(&mut self, incarnation: Incarnation, mut exit: everlit_api::rank::RankExit, lost: bool) -> Option<&'static str> {
        self.look_at(incarnation);
        while let Ok(error) = self.gpu_errors.try_recv() {
            self.handle(Event::GpuFailed(error));
        }
        if let Some(beat) = self.effects.progress_in_tail(incarnation, &exit.tail) {
            self.handle(Event::ProgressRead { incarnation, beat });
        }
        if let Some(news) = self.effects.new_checkpoint(incarnation.job) {
            self.handle(Event::CheckpointSeen(news));
        }
        self.effects.on_ended(incarnation);
        exit.matched = self.engine.spec(incarnation.job, incarnation.attempt).and_then(|spec| self.policies.find(spec, &exit));
        shorten(&mut exit.tail);
        exit.out_of_memory = self.effects.memory_was_short(&exit);
        tracing::info!(%incarnation, exit = exit.describe(), lost, "a rank ended");
        self.handle(Event::RankEnded { incarnation, exit, lost })
    }

    fn look_at(&mut self, incarnation: Incarnation) -> Option<&'static str> {
        let Heard { seq, beat, save_error } = self.effects.ranks.look(incarnation)?;
        self.handle(Event::HeartbeatRead { incarnation, seq, beat, save_error })
    }

    fn look_everywhere(&mut self) -> Option<&'static str> {
        self.effects.ranks.all().into_iter().fold(None, |end, incarnation| self.look_at(incarnation).or(end))
    }

    fn on_noticed(&mut self, noticed: Noticed) -> Option<&'static str> {
        match noticed {
            Noticed::In(Watched::Run(incarnation)) => self.look_at(incarnation),
            Noticed::In(Watched::Checkpoints(job)) => {
                let keep = self.engine.newest_spec(job).map_or(u32::MAX, |spec| spec.checkpoint.keep);
                let news = self.effects.new_checkpoint(job);
                let end = news.and_then(|news| self.handle(Event::CheckpointSeen(news)));
                self.effects.check_checkpoint(job, keep);
                end
            }
            Noticed::In(Watched::Coordinator) => {
                self.file_changed.notify_one();
                None
            }
            Noticed::Overflow => self.look_everywhere(),
        }
    }

    fn on_done(&mut self, done: Done) -> Option<&'static str> {
        match done {
            Done::Prepared { job, attempt, held, outcome } => match outcome {
                Ok(prepared) => {
                    if !held.is_empty() {
                        self.effects.say(&FromAgent::GpuHeld { job, attempt, holders: held });
                    }
                    let resumed = prepared.resumed.clone();
                    resumed
                        .quarantined
                        .iter()
                        .for_each(|(step, why)| tracing::warn!(%job, step, why, "a damaged checkpoint was put aside"));
                    self.effects.keep_prepared(prepared);
                    let end = self.handle(Event::GangPrepared { resumed, at: Timestamp::now() });
                    self.effects.drop_prepared(job, attempt);
                    end
                }
                Err(refused) => {
                    tracing::warn!(%job, attempt, reason = refused.reason, "a gang can not be started");
                    self.handle(Event::GangRefused { job, attempt, reason: refused.reason, permanent: refused.permanent })
                }
            },
            Done::Spawned(ranks) => ranks.into_iter().fold(None, |end, (incarnation, outcome)| match outcome {
                Ok(stream) => {
                    self.effects.connect(incarnation, stream);
                    end
                }
                Err(error) => {
                    let exit = super::engine::no_exit(&format!("its shim could not be started: {error}"), Timestamp::now());
                    self.handle(Event::RankEnded { incarnation, exit, lost: true }).or(end)
                }
            }),
            Done::Checked { job, outcome } => {
                let keep = self.engine.newest_spec(job).map_or(u32::MAX, |spec| spec.checkpoint.keep);
                let (news, quarantined) = self.effects.on_checked(job, keep, outcome);
                self.tell_of_checkpoints(job, news, quarantined)
            }
            Done::Copied { job, step, outcome } => {
                self.effects.on_copied(job);
                match outcome {
                    Ok(Checked { news, quarantined }) => self.tell_of_checkpoints(job, news.map(Box::new), quarantined),
                    Err(reason) => {
                        tracing::warn!(%job, step, reason, "a checkpoint could not be copied");
                        self.effects.say(&FromAgent::CopyFailed { job, step, reason });
                        None
                    }
                }
            }
            Done::Uploaded(done) => {
                tracing::info!(job = %done.job, step = done.step, bytes = done.bytes, took_ms = done.took_ms, "a checkpoint is in its store");
                self.effects.say(&FromAgent::Uploaded(done));
                None
            }
            Done::Archived(done) => {
                tracing::info!(job = %done.job, attempt = done.attempt, bytes = done.bytes, took_ms = done.took_ms, "a log is in its store");
                self.effects.say(&FromAgent::LogsArchived(done));
                None
            }
            Done::StoreFault(fault) => {
                tracing::warn!(job = %fault.job, step = fault.step, reason = fault.reason, "a store failed");
                self.effects.say(&FromAgent::StoreFault(fault));
                None
            }
            Done::DataListed(listed) => {
                tracing::info!(job = %listed.job, shards = listed.shards.len(), "its data is listed");
                self.effects.say(&FromAgent::DataListed(listed));
                None
            }
            Done::DataTurned(turn) => {
                tracing::info!(job = %turn.job, local = turn.local, reason = turn.reason, "shards are read elsewhere now");
                self.effects.say(&FromAgent::DataTurned(turn));
                None
            }
            Done::DataAwaited { job, attempt, waiting } => self.handle(Event::DataAwaited { job, attempt, waiting }),
            Done::PutAside { job, outcome: Ok(Checked { news, quarantined }) } => {
                self.handle(Event::CheckpointsGone(job));
                self.tell_of_checkpoints(job, news.map(Box::new), quarantined)
            }
            Done::PutAside { job, outcome: Err(error) } => {
                tracing::warn!(%job, %error, "checkpoints that came too late could not be put aside");
                None
            }
            Done::Scanned { job, scanner, progress } => {
                self.effects.keep_scanner(job, scanner);
                let news = |((attempt, rank), beat)| (Incarnation { job, attempt, rank }, Box::new(beat));
                let progress: Vec<_> = progress.into_iter().map(news).collect();
                progress.into_iter().fold(None, |end, (incarnation, beat)| self.handle(Event::ProgressRead { incarnation, beat }).or(end))
            }
            Done::CpuRead { incarnation, cpu_ms } => self.handle(Event::CpuRead { incarnation, cpu_ms }),
            Done::Probed(took_ms) => {
                // What the disk held back until now is there by now.
                let end = self.look_everywhere();
                self.handle(Event::Probed { took_ms }).or(end)
            }
            Done::Loaded { meter, load } => {
                self.effects.keep_meter(meter);
                self.effects.say(&FromAgent::Report(load));
                None
            }
            Done::JobRemoved { job, outcome: Ok(()) } => {
                self.effects.empty_trash();
                self.handle(Event::JobRemoved(job))
            }
            Done::JobRemoved { job, outcome: Err(error) } => {
                tracing::warn!(%job, %error, "could not remove a job's files");
                None
            }
        }
    }

    fn tell_of_checkpoints(
        &mut self,
        job: JobId,
        news: Option<Box<CheckpointNews>>,
        quarantined: Vec<Quarantined>,
    ) -> Option<&'static str> {
        let told = quarantined.into_iter().map(|Quarantined { step, reason, .. }| Event::CheckpointQuarantined { job, step, reason });
        let events: Vec<Event> = told.chain(news.map(Event::CheckpointSeen)).collect();
        events.into_iter().fold(None, |end, event| self.handle(event).or(end))
    }

    fn answer(&self, stream: &tokio::net::UnixStream) {
        let (_, _, draining) = self.engine.hello(self.now());
        let ranks = self.engine.living().count();
        let own = status::Status { pid: self.hello.pid, linked: self.effects.is_linked(), draining, ranks };
        // Written in one piece or not at all; who asked sees a broken answer then.
        if let (Ok(text), Ok(fd)) = (serde_json::to_string(&own), std::os::fd::AsFd::as_fd(stream).try_clone_to_owned()) {
            let _ = std::io::Write::write_all(&mut std::os::unix::net::UnixStream::from(fd), text.as_bytes());
        }
    }
}
