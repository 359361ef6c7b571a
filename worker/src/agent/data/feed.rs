//! A job's shards on this node: one task that has them listed if nobody has, makes them ready, and brings what ranks ask for.
//!
//! Asking is a line with a file's name, written to the pipe `want`; with `!` before it, a rank stands still until it has it. The answer is
//! the file in `have`, or one beside it with `.error` at its end. With `>` before it, a file of `out` is to go to the store ([`Outputs`]).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use everlit_api::agent::GangSpec;
use everlit_api::agent::stored::StoreFault;
use everlit_api::data::{DataTurn, GangData, Listed, ListedShard, file_name, shard_number};
use everlit_api::ids::JobId;
use everlit_api::store::{Fault, Place, Settings, Store, Trouble};
use nix::sys::stat::Mode;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::runtime::Runtime;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinSet;

use super::cache::Cache;
use super::fetch::{Doubt, NotHere, fetch};
use super::outputs::{self, Outputs, is_made};
use super::{HAVE_NAME, WANT_NAME, list};
use crate::agent::effects::{Done, not_found_is_fine};
use crate::agent::folders::Folders;
use crate::agent::limits::{DATA_WAIT_MAX, DATA_WAIT_MIN, SHARDS_AT_ONCE};
use crate::agent::start::Refused;
use crate::agent::uploads::Lane;

/// Bytes of one line that asks.
const LINE_BYTES_MAX: usize = 1024;

/// The jobs of this node that have their data in a store.
pub(in crate::agent) struct Feeds {
    runtime: Option<Runtime>,
    cache: Arc<Cache>,
    /// Shards that are on their way: two jobs wait for one of the same content.
    under_way: Arc<Keys>,
    jobs: BTreeMap<JobId, Feed>,
    folders: Folders,
    lane: Lane,
    done: mpsc::Sender<Done>,
}

type Keys = std::sync::Mutex<BTreeMap<String, Arc<Mutex<()>>>>;

struct Feed {
    attempt: u32,
    orders: watch::Sender<Order>,
    ready: watch::Receiver<Ready>,
    health: Arc<Health>,
}

/// How a job's store was found, over all of its attempts here.
#[derive(Default)]
struct Health {
    /// Shards are read from the local copy.
    local: AtomicBool,
    /// Until then the store is not asked where there is a local copy, and how long that is the next time.
    failed: Mutex<Option<(Instant, Duration)>>,
}

/// What a gang was told.
#[derive(Clone)]
pub(super) struct Order {
    data: GangData,
    pub env: BTreeMap<String, String>,
    /// It is the one that lists.
    lists: bool,
    /// This node's ranks, and all of them: whose shards are to be here when the program does not ask.
    ranks: std::ops::Range<u32>,
    world_size: u32,
}

/// How far it is.
#[derive(Debug, Clone)]
enum Ready {
    Waits,
    /// The program may start.
    Yes(Arc<Vec<ListedShard>>),
    /// It never will be.
    No(String),
}

impl Feeds {
    /// None yet.
    pub(in crate::agent) fn new(cache: Cache, folders: Folders, lane: Lane, done: mpsc::Sender<Done>) -> Self {
        Self { runtime: None, cache: Arc::new(cache), under_way: Arc::default(), jobs: BTreeMap::new(), folders, lane, done }
    }

    /// A gang is told, perhaps again.
    pub(in crate::agent) fn order(&mut self, spec: &GangSpec) {
        let Some(data) = &spec.data else { return };
        let order = Order {
            data: data.clone(),
            env: spec.env.clone(),
            lists: spec.group_rank == 0,
            ranks: spec.first_rank..spec.first_rank.saturating_add(spec.count),
            world_size: spec.world_size,
        };
        if let Some(own) = self.jobs.get(&spec.job) {
            if own.attempt > spec.attempt {
                return;
            }
            if own.attempt == spec.attempt && !own.orders.is_closed() {
                own.orders.send_replace(order);
                return;
            }
        }
        if self.runtime.is_none() {
            // Not the agent's own thread, which looks after heartbeats.
            let built = tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("data").enable_all().build();
            match built {
                Ok(runtime) => self.runtime = Some(runtime),
                Err(error) => return tracing::error!(%error, "no data can be fetched"),
            }
        }
        let Some(runtime) = &self.runtime else { return };
        let (orders, told) = watch::channel(order);
        let (ready_to, ready) = watch::channel(Ready::Waits);
        let health = self.jobs.get(&spec.job).map(|own| own.health.clone()).unwrap_or_default();
        let task = Task {
            job: spec.job,
            attempt: spec.attempt,
            folder: self.folders.data(spec.job),
            orders: told,
            ready: ready_to,
            health: health.clone(),
            cache: self.cache.clone(),
            under_way: self.under_way.clone(),
            lane: self.lane.clone(),
            done: self.done.clone(),
        };
        runtime.spawn(task.run());
        self.jobs.insert(spec.job, Feed { attempt: spec.attempt, orders, ready, health });
    }

    /// Waits until a gang's data is ready; answers what it is. `None`: it has none in a store.
    pub(in crate::agent) fn ready(
        &self,
        job: JobId,
        attempt: u32,
    ) -> Option<impl Future<Output = Result<Arc<Vec<ListedShard>>, Refused>> + Send + use<>> {
        let mut ready = self.jobs.get(&job).filter(|own| own.attempt == attempt)?.ready.clone();
        Some(async move {
            let gone = || Refused::now("it was stopped before its data was here");
            let ready = ready.wait_for(|ready| !matches!(ready, Ready::Waits)).await.map_err(|_| gone())?;
            match &*ready {
                Ready::Yes(shards) => Ok(shards.clone()),
                Ready::No(why) => Err(Refused::forever(why.clone())),
                Ready::Waits => Err(gone()),
            }
        })
    }

    /// The job is over here: its links are to go, and what was fetched may.
    pub(in crate::agent) fn drop_job(&mut self, job: JobId) {
        self.jobs.remove(&job);
        let folder = self.folders.data(job);
        drop(tokio::task::spawn_blocking(move || {
            if let Err(error) = fs::remove_dir_all(&folder).or_else(not_found_is_fine) {
                tracing::warn!(path = %folder.display(), %error, "could not remove");
            }
        }));
    }
}

impl Drop for Feeds {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// One job's feed.
struct Task {
    job: JobId,
    attempt: u32,
    folder: PathBuf,
    orders: watch::Receiver<Order>,
    ready: watch::Sender<Ready>,
    health: Arc<Health>,
    cache: Arc<Cache>,
    under_way: Arc<Keys>,
    lane: Lane,
    done: mpsc::Sender<Done>,
}

impl Task {
    async fn run(mut self) {
        let Some(shards) = self.listing().await else { return };
        let to = self.orders.borrow().data.to.clone();
        let outputs = match to {
            None => None,
            Some(to) => match self.outputs(to, &shards).await {
                Some(outputs) => Some(outputs),
                None => return,
            },
        };
        let (pipe, bringer) = match self.open(shards.clone()) {
            Ok(opened) => opened,
            Err(error) => return drop(self.ready.send_replace(Ready::No(format!("`{}` can not be made: {error}", self.folder.display())))),
        };
        let order = self.orders.borrow().clone();
        if !order.data.stream {
            let is_own = |index: &usize| order.ranks.contains(&((*index as u64 % u64::from(order.world_size.max(1))) as u32));
            let is_left = |index: &usize| outputs.is_none() || !is_made(&self.folder, *index);
            let own = (0..shards.len()).filter(|index| is_own(index) && is_left(index));
            if let Err(why) = self.bring_all(&bringer, own.collect()).await {
                return drop(self.ready.send_replace(Ready::No(why)));
            }
        }
        self.ready.send_replace(Ready::Yes(shards));
        self.serve(pipe, bringer, outputs).await;
    }

    /// What the job's data is: told with the order, or listed here. `None`: it is not wanted any more, or can not be.
    async fn listing(&mut self) -> Option<Arc<Vec<ListedShard>>> {
        let mut wait = DATA_WAIT_MIN;
        let mut listed: Option<Vec<ListedShard>> = None;
        loop {
            let order = self.orders.borrow_and_update().clone();
            if let Some(shards) = order.data.shards {
                return Some(Arc::new(shards));
            }
            if order.lists && listed.is_none() {
                match list::list(&order.data.sources, &Settings::of_process().with_job(&order.env)).await {
                    Ok(shards) => listed = Some(shards),
                    Err(fault) => {
                        self.tell_fault(&fault).await;
                        if !fault.trouble.is_transient() {
                            self.ready.send_replace(Ready::No(fault.to_string()));
                            return None;
                        }
                        tokio::select! {
                            () = tokio::time::sleep(wait) => {}
                            changed = self.orders.changed() => changed.ok()?,
                        }
                        wait = (wait * 2).min(DATA_WAIT_MAX);
                        continue;
                    }
                }
            }
            if let Some(shards) = listed.clone() {
                self.tell(Done::DataListed(Listed { job: self.job, attempt: self.attempt, shards })).await;
            }
            // It comes again with the listing, or without it when that was not heard.
            self.orders.changed().await.ok()?;
        }
    }

    /// What the store has of the job's outputs is known when this answers. `None`: it never will be, or nobody wants it.
    async fn outputs(&mut self, to: Place, shards: &[ListedShard]) -> Option<Outputs> {
        let (job, folder, orders) = (self.job, self.folder.clone(), self.orders.clone());
        let outputs = Outputs { job, to, folder, orders, lane: self.lane.clone(), done: self.done.clone() };
        let mut wait = DATA_WAIT_MIN;
        while let Err(fault) = outputs.look(shards).await {
            self.tell_fault(&fault).await;
            if !fault.trouble.is_transient() {
                self.ready.send_replace(Ready::No(fault.to_string()));
                return None;
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                changed = self.orders.changed() => changed.ok()?,
            }
            wait = (wait * 2).min(DATA_WAIT_MAX);
        }
        Some(outputs)
    }

    fn open(&self, shards: Arc<Vec<ListedShard>>) -> io::Result<(pipe::Receiver, Arc<Bringer>)> {
        let have = self.folder.join(HAVE_NAME);
        fs::create_dir_all(&have)?;
        // What could not be had in an attempt before this one is tried again.
        for entry in fs::read_dir(&have)? {
            let path = entry?.path();
            if path.extension().is_some_and(|end| end == "error" || end == "tmp") {
                fs::remove_file(path)?;
            }
        }
        let want = self.folder.join(WANT_NAME);
        match nix::unistd::mkfifo(&want, Mode::S_IRUSR | Mode::S_IWUSR) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        // Open at both ends: it does not end when no rank has it open.
        let pipe = pipe::OpenOptions::new().read_write(true).open_receiver(&want)?;
        let bringer = Bringer {
            job: self.job,
            have,
            shards,
            orders: self.orders.clone(),
            cache: self.cache.clone(),
            under_way: self.under_way.clone(),
            done: self.done.clone(),
            health: self.health.clone(),
        };
        Ok((pipe, Arc::new(bringer)))
    }

    async fn bring_all(&mut self, bringer: &Arc<Bringer>, mut own: VecDeque<usize>) -> Result<(), String> {
        let mut bringing: JoinSet<Result<(), String>> = JoinSet::new();
        loop {
            while bringing.len() < SHARDS_AT_ONCE
                && let Some(index) = own.pop_front()
            {
                let bringer = bringer.clone();
                bringing.spawn(async move { bringer.bring(index).await });
            }
            let Some(brought) = bringing.join_next().await else { return Ok(()) };
            brought.map_err(|error| error.to_string())??;
            if self.orders.has_changed().is_err() {
                return Err("the job is gone".into());
            }
        }
    }

    async fn serve(&mut self, mut pipe: pipe::Receiver, bringer: Arc<Bringer>, outputs: Option<Outputs>) {
        let world_size = self.orders.borrow().world_size;
        let (mut leaving, mut storing) = (BTreeSet::new(), JoinSet::<String>::new());
        let mut asked = Asked::default();
        let mut bringing: JoinSet<usize> = JoinSet::new();
        let (mut text, mut piece) = (Vec::new(), vec![0; 4096]);
        loop {
            while bringing.len() < SHARDS_AT_ONCE
                && let Some(index) = asked.next()
            {
                let bringer = bringer.clone();
                bringing.spawn(async move {
                    if let Err(why) = bringer.bring(index).await {
                        bringer.refuse(index, &why);
                    }
                    index
                });
            }
            tokio::select! {
                read = pipe.read(&mut piece) => match read {
                    Ok(bytes) => {
                        text.extend_from_slice(&piece[..bytes]);
                        for line in lines(&mut text) {
                            if let Some((index, is_urgent)) = question(&line, &bringer.shards) {
                                asked.add(index, is_urgent);
                            } else if let Some(outputs) = &outputs
                                && let Some((name, mark)) = outputs::named(&line, &bringer.shards, world_size)
                                && leaving.insert(name.clone())
                            {
                                let outputs = outputs.clone();
                                storing.spawn(async move {
                                    outputs.bring(&name, &mark).await;
                                    name
                                });
                            }
                        }
                    }
                    Err(error) => return tracing::error!(job = %self.job, %error, "ranks can not ask for shards any more"),
                },
                Some(brought) = bringing.join_next() => {
                    if let Ok(index) = brought {
                        asked.done(index);
                    }
                }
                Some(stored) = storing.join_next() => drop(stored.map(|name| leaving.remove(&name))),
                changed = self.orders.changed() => if changed.is_err() { return },
            }
            if let Some(waiting) = asked.turned() {
                self.tell(Done::DataAwaited { job: self.job, attempt: self.attempt, waiting }).await;
            }
        }
    }

    async fn tell(&self, done: Done) {
        // The driver is gone only when the agent ends.
        let _ = self.done.send(done).await;
    }

    async fn tell_fault(&self, fault: &Fault) {
        let (trouble, reason) = (fault.trouble, fault.to_string());
        self.tell(Done::StoreFault(StoreFault { job: self.job, step: None, trouble, reason })).await;
    }
}

/// Whole lines of what was read.
fn lines(text: &mut Vec<u8>) -> Vec<String> {
    let mut found = Vec::new();
    while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
        let line: Vec<u8> = text.drain(..=end).collect();
        found.extend(std::str::from_utf8(&line[..end]).map(String::from));
    }
    if text.len() > LINE_BYTES_MAX {
        text.clear();
    }
    found
}

/// The shard that a line asks for, and whether somebody stands still for it. What names none is no question.
fn question(line: &str, shards: &[ListedShard]) -> Option<(usize, bool)> {
    let (name, is_urgent) = line.strip_prefix('!').map_or((line, false), |name| (name, true));
    let index = shard_number(name)?;
    (file_name(index, &shards.get(index)?.name) == name).then_some((index, is_urgent))
}

/// What ranks have asked for: who stands still comes first.
#[derive(Debug, Default)]
struct Asked {
    queue: VecDeque<usize>,
    queued: BTreeSet<usize>,
    running: BTreeSet<usize>,
    awaited: BTreeSet<usize>,
    told: bool,
}

impl Asked {
    fn add(&mut self, index: usize, is_urgent: bool) {
        if is_urgent {
            self.awaited.insert(index);
        }
        if self.running.contains(&index) {
            return;
        }
        if self.queued.insert(index) {
            if is_urgent { self.queue.push_front(index) } else { self.queue.push_back(index) }
        } else if is_urgent && self.queue.front() != Some(&index) {
            self.queue.retain(|other| *other != index);
            self.queue.push_front(index);
        }
    }

    fn next(&mut self) -> Option<usize> {
        let index = self.queue.pop_front()?;
        self.queued.remove(&index);
        self.running.insert(index);
        Some(index)
    }

    fn done(&mut self, index: usize) {
        self.running.remove(&index);
        self.awaited.remove(&index);
    }

    /// Whether a rank stands still, when that is news.
    fn turned(&mut self) -> Option<bool> {
        let waits = !self.awaited.is_empty();
        (std::mem::replace(&mut self.told, waits) != waits).then_some(waits)
    }
}

/// Brings shards of one job.
struct Bringer {
    job: JobId,
    have: PathBuf,
    shards: Arc<Vec<ListedShard>>,
    orders: watch::Receiver<Order>,
    cache: Arc<Cache>,
    under_way: Arc<Keys>,
    done: mpsc::Sender<Done>,
    health: Arc<Health>,
}

impl Bringer {
    /// Until it is there. An error is for good.
    async fn bring(&self, index: usize) -> Result<(), String> {
        let Some(shard) = self.shards.get(index) else { return Err(format!("there is no shard {index}")) };
        let order = self.orders.borrow().clone();
        let Some(source) = order.data.sources.get(shard.source as usize) else { return Err("its source is not known".into()) };
        let base = source.base();
        let key = Cache::key(&base, shard);
        let place = self.have.join(file_name(index, &shard.name));
        let (mut wait, mut doubt) = (DATA_WAIT_MIN, Doubt::default());
        loop {
            // Another job may be fetching the same.
            let one = self.under_way.lock().map(|mut all| all.entry(key.clone()).or_default().clone()).unwrap_or_default();
            let held = one.lock().await;
            if let Some(path) = self.cache.find(&key, shard.bytes) {
                return link(&path, &place, !order.data.stream).map_err(|error| format!("{}: {error}", place.display()));
            }
            if self.orders.has_changed().is_err() {
                return Err("the job is gone".into());
            }
            let copy = order.data.fallback.as_ref().map(|folder| Path::new(folder).join(&shard.name)).filter(|path| is_whole(path, shard));
            let skip = copy.is_some() && self.health.failed.lock().await.is_some_and(|(until, _)| Instant::now() < until);
            let fetched = if skip { None } else { Some(self.fetch(&order, &base, shard, &key, &mut doubt).await) };
            drop(held);
            self.tidy(&key);
            let why = match fetched {
                Some(Ok(())) => {
                    self.store_works().await;
                    continue;
                }
                Some(Err(why)) => Some(why),
                None => None,
            };
            if let Some(why) = &why {
                self.store_failed(why).await;
            }
            if let Some(copy) = copy {
                let reason = why.as_ref().map_or_else(String::new, |why| told(why).1);
                self.turn(true, reason).await;
                return link(&copy, &place, false).map_err(|error| format!("{}: {error}", place.display()));
            }
            if let Some(NotHere::Never(fault)) = why {
                return Err(fault.to_string());
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(DATA_WAIT_MAX);
        }
    }

    async fn fetch(
        &self,
        order: &Order,
        base: &everlit_api::store::Place,
        shard: &ListedShard,
        key: &str,
        doubt: &mut Doubt,
    ) -> Result<(), NotHere> {
        let settings = Settings::of_process().with_job(&order.env);
        let store = Store::open(base, &settings)
            .map_err(|fault| if fault.trouble.is_transient() { NotHere::Later(fault) } else { NotHere::Never(fault) })?;
        fetch(&store, shard, &self.cache, key, doubt).await
    }

    /// Nobody else waits for it.
    fn tidy(&self, key: &str) {
        if let Ok(mut all) = self.under_way.lock()
            && all.get(key).is_some_and(|own| Arc::strong_count(own) <= 2)
        {
            all.remove(key);
        }
    }

    async fn store_failed(&self, why: &NotHere) {
        let (trouble, reason) = told(why);
        tracing::warn!(job = %self.job, reason, "a shard could not be fetched");
        let fault = StoreFault { job: self.job, step: None, trouble, reason };
        // The driver is gone only when the agent ends.
        let _ = self.done.send(Done::StoreFault(fault)).await;
        let mut failed = self.health.failed.lock().await;
        let next = failed.map_or(DATA_WAIT_MIN, |(_, wait)| (wait * 2).min(DATA_WAIT_MAX));
        *failed = Some((Instant::now() + next, next));
    }

    async fn store_works(&self) {
        if self.health.failed.lock().await.take().is_some() {
            self.turn(false, "the store gives shards again".into()).await;
        }
    }

    async fn turn(&self, local: bool, reason: String) {
        if self.health.local.swap(local, Ordering::Relaxed) != local || !local {
            let _ = self.done.send(Done::DataTurned(DataTurn { job: self.job, local, reason })).await;
        }
    }

    /// Says that it can not be had to whoever waits for it.
    fn refuse(&self, index: usize, why: &str) {
        let Some(shard) = self.shards.get(index) else { return };
        let name = file_name(index, &shard.name);
        let (draft, place) = (self.have.join(format!("{name}.tmp")), self.have.join(format!("{name}.error")));
        if let Err(error) = fs::write(&draft, why).and_then(|()| fs::rename(&draft, &place)) {
            tracing::warn!(job = %self.job, %error, "could not say that a shard can not be had");
        }
    }
}

fn told(why: &NotHere) -> (Trouble, String) {
    match why {
        NotHere::Later(fault) | NotHere::Never(fault) => (fault.trouble, fault.to_string()),
        NotHere::Here(why) => (Trouble::Full, why.clone()),
    }
}

fn is_whole(path: &Path, shard: &ListedShard) -> bool {
    fs::metadata(path).is_ok_and(|about| about.is_file() && about.len() == shard.bytes)
}

/// Makes `place` the file at `path`: for good, or until the cache needs its room.
fn link(path: &Path, place: &Path, for_good: bool) -> io::Result<()> {
    let draft = place.with_extension("tmp");
    fs::remove_file(&draft).or_else(not_found_is_fine)?;
    if for_good {
        fs::hard_link(path, &draft)?
    } else {
        std::os::unix::fs::symlink(path, &draft)?
    }
    fs::rename(&draft, place)?;
    // Two names of one file: the rename did nothing, and the draft is left.
    fs::remove_file(&draft).or_else(not_found_is_fine)
}
