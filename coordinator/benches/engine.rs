//! How many events the coordinator's engine decides in a second, on one core: 1,000 jobs of ten ranks on a hundred nodes.
//!
//! `beats` is what a busy cluster says all the time, one rank's heartbeat an event; `mixed` has a checkpoint in twenty events and a rank that is
//! killed in a hundred, with the restart of its gang. Rows are made, as they would be written; writing them is not in it.
//!
//! `placement/pass` is one look at the queue: a gang of 8,000 ranks has ended, and 1,000 gangs that wait, no two of the same need and every
//! tenth larger than a node, are placed on its 1,000 nodes of eight GPUs. `placement/blocked` is one that places nobody: a job is submitted
//! while all of them wait.
//!
//! `link` is what packing a frame costs, and what it comes to: news of 8 and of 64 ranks, and 256 KiB of a log.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use everlit_api::agent::{Beat, CheckpointNews, Exited, FromAgent, Hello, Resumed, Started, pack};
use everlit_api::ids::{Incarnation, JobId, NodeId};
use everlit_api::job::JobSpec;
use everlit_api::rank::RankExit;
use everlit_api::status::{Capacity, GpuInfo};
use everlit_api::time::Timestamp;
use everlit_coordinator::engine::{Config, Engine, Event};

const JOBS: u32 = 1_000;
const RANKS: u32 = 10;
const NODES: u32 = 100;
/// Events of one round.
const EVENTS: u64 = 100_000;

struct Cluster {
    engine: Engine,
    now: u64,
    step: u64,
}

fn id(job: u32) -> JobId {
    JobId::from_u128(u128::from(job) + 1)
}

fn hello(node: u32) -> Event {
    Event::NodeLinked {
        hello: Box::new(Hello {
            protocol: 1,
            node: NodeId(format!("node-{node}")),
            boot_id: "boot".into(),
            version: "0".into(),
            pid: 1,
            capacity: Capacity { cpus: 64.0, memory: 1 << 40, gpus: Vec::new(), slots: JOBS * RANKS / NODES },
            ranks: Vec::new(),
            checkpoints: Vec::new(),
            draining: false,
            address: None,
            copies: None,
            labels: Default::default(),
            taints: Vec::new(),
        }),
    }
}

impl Cluster {
    /// All ranks run and have done a step.
    fn running() -> Self {
        let mut own = Self { engine: Engine::new(Config::default()), now: 1_000, step: 1 };
        (0..NODES).for_each(|node| own.say(hello(node)));
        for job in 0..JOBS {
            let mut spec = JobSpec { worker: None, command: vec!["train".into()], ..JobSpec::default_for(RANKS) };
            (spec.restart.max_restarts, spec.restart.max_start_failures) = (1_000_000, 1_000_000);
            own.say(Event::JobSubmitted { id: id(job), spec: Arc::new(spec), seed: job.into(), user: None, origin: Vec::new() });
            own.start(job);
        }
        assert_eq!(own.engine.queue_depth(), 0, "every gang has its places");
        own
    }

    fn say(&mut self, event: Event) {
        let step = self.engine.handle(Timestamp(self.now), event);
        black_box(step);
    }

    fn incarnation(&self, job: u32, rank: u32) -> Option<Incarnation> {
        let gang = self.engine.job(id(job))?.gang.as_ref()?;
        Some(Incarnation { job: id(job), attempt: gang.attempt, rank: gang.seat(rank) })
    }

    fn start(&mut self, job: u32) -> u64 {
        let Some(Incarnation { attempt, .. }) = self.incarnation(job, 0) else { return 0 };
        let resumed = Resumed::from_nothing(id(job), attempt);
        self.say(Event::AttemptResumed { node: NodeId("n1".into()), resumed });
        for rank in 0..RANKS {
            let incarnation = Incarnation { job: id(job), attempt, rank };
            self.say(Event::RankStarted(Started { incarnation, pid: rank + 1, at: Timestamp(self.now) }));
        }
        u64::from(RANKS) + 1
    }

    fn beat(&mut self, job: u32, rank: u32) {
        let incarnation = self.incarnation(job, rank);
        let beat = Beat { incarnation, heartbeat: true, step: Some(self.step), loss: Some(2.0), ..Beat::default() };
        self.say(Event::RanksBeat(vec![beat]));
    }

    fn save(&mut self, job: u32) {
        let Some(Incarnation { attempt, .. }) = self.incarnation(job, 0) else { return };
        let (step, path) = (self.step, format!("/checkpoints/step-{:012}", self.step));
        let kept = vec![step];
        let news = CheckpointNews { job: id(job), attempt, step, bytes: 1, created_at: Timestamp(self.now), verified: false, path, kept };
        self.say(Event::CheckpointSeen { node: NodeId("node-0".into()), news });
    }

    /// One rank is killed, the others are stopped, and the gang is back after its backoff.
    fn kill(&mut self, job: u32) -> u64 {
        let attempt = self.incarnation(job, 0).expect("its gang is always brought back").attempt;
        for rank in 0..RANKS {
            let exit: RankExit = RankExit { at: Timestamp(self.now), ..killed() };
            self.say(Event::RankExited(Exited { incarnation: Incarnation { job: id(job), attempt, rank }, exit, lost: false }));
        }
        self.now += 31_000;
        self.say(Event::Woke);
        u64::from(RANKS) + 1 + self.start(job)
    }

    fn beats(&mut self) {
        for event in 0..EVENTS {
            self.turn(event);
            self.beat((event % u64::from(JOBS)) as u32, (event / u64::from(JOBS)) as u32 % RANKS);
        }
    }

    fn mixed(&mut self) {
        let mut event = 0;
        while event < EVENTS {
            self.turn(event);
            let job = (event.wrapping_mul(2_654_435_761) % u64::from(JOBS)) as u32;
            event += match event % 100 {
                0 => self.kill(job),
                n if n % 20 == 5 => {
                    self.save(job);
                    1
                }
                n => {
                    self.beat(job, n as u32 % RANKS);
                    1
                }
            };
        }
    }

    /// Time goes on, and so do the steps.
    fn turn(&mut self, event: u64) {
        self.now += u64::from(event.is_multiple_of(100));
        self.step += u64::from(event.is_multiple_of(u64::from(JOBS * RANKS)));
    }
}

/// Gangs that wait, and nodes.
const WAITING: u32 = 1_000;
const GPUS: u32 = 8;

/// Every node is held by one gang, of which one rank still lives.
struct Waiting {
    engine: Engine,
}

impl Waiting {
    fn new() -> Self {
        let mut own = Self { engine: Engine::new(Config::default()) };
        for node in 0..WAITING {
            let Event::NodeLinked { mut hello } = hello(node) else { unreachable!("a hello") };
            let gpu = |index| GpuInfo { index, name: "GPU".into(), uuid: format!("{node}-{index}"), memory: 80 << 30 };
            hello.capacity = Capacity { cpus: 64.0, memory: 1 << 40, gpus: (0..GPUS).map(gpu).collect(), slots: 64 };
            hello.address = Some(format!("10.0.{}.{}", node / 250, node % 250));
            own.say(Event::NodeLinked { hello });
        }
        own.submit(0, WAITING * GPUS);
        // One that needs more than a node, and nine that do not: 72 of each ten nodes' 80 GPUs.
        (1..=WAITING).for_each(|job| own.submit(job, if job.is_multiple_of(10) { 18 } else { 6 }));
        assert_eq!(own.engine.queue_depth(), WAITING as usize);
        (1..WAITING * GPUS).for_each(|rank| own.end(rank));
        own
    }

    fn say(&mut self, event: Event) {
        drop(black_box(self.engine.handle(Timestamp(1_000), event)));
    }

    fn submit(&mut self, job: u32, ranks: u32) {
        let mut spec = JobSpec { worker: None, command: vec!["train".into()], ..JobSpec::default_for(ranks) };
        // Bytes of memory, so that no two jobs are of the same need.
        (spec.resources.gpus, spec.resources.memory) = (1, 1 + u64::from(job));
        self.say(Event::JobSubmitted { id: id(job), spec: Arc::new(spec), seed: job.into(), user: None, origin: Vec::new() });
    }

    fn end(&mut self, rank: u32) {
        let exit = RankExit { at: Timestamp(1_000), code: Some(0), signal: None, ..killed() };
        self.say(Event::RankExited(Exited { incarnation: Incarnation { job: id(0), attempt: 1, rank }, exit, lost: false }));
    }

    fn pass(&mut self) {
        self.end(0);
        assert_eq!(self.engine.queue_depth(), 0, "all are placed");
    }

    fn blocked(&mut self) {
        self.submit(WAITING + 1, 7);
    }
}

fn placement(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("placement");
    group.sample_size(10);
    group.bench_function("pass", |bench| bench.iter_batched_ref(Waiting::new, Waiting::pass, BatchSize::PerIteration));
    group.bench_function("blocked", |bench| bench.iter_batched_ref(Waiting::new, Waiting::blocked, BatchSize::PerIteration));
    group.finish();
}

fn killed() -> RankExit {
    serde_json::from_str(r#"{"code": null, "signal": 9, "at": "2026-01-01T00:00:00Z"}"#).expect("an exit")
}

fn engine(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("engine");
    group.throughput(Throughput::Elements(EVENTS)).sample_size(10);
    group.bench_function("beats", |bench| bench.iter_batched_ref(Cluster::running, Cluster::beats, BatchSize::PerIteration));
    group.bench_function("mixed", |bench| bench.iter_batched_ref(Cluster::running, Cluster::mixed, BatchSize::PerIteration));
    group.finish();
}

/// What a rank says of itself a few times a second.
fn news(rank: u32) -> Beat {
    let metrics =
        [("lr", 0.000_3), ("tokens_per_second", 10_431.5 + f64::from(rank))].map(|(name, value)| (name.to_string(), value)).into();
    let incarnation = Some(Incarnation { job: id(1), attempt: 1, rank });
    let (step, samples, loss) = (Some(12_345), Some(790_080), Some(2.312_345 + f64::from(rank) / 1e4));
    Beat { incarnation, heartbeat: true, step, total_steps: Some(20_000), samples, loss, metrics, age_ms: 12, ..Beat::default() }
}

fn link(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("link");
    let beats = |ranks| serde_json::to_string(&FromAgent::Beats { beats: (0..ranks).map(news).collect() }).expect("plain data");
    let line = |n: u32| format!("2026-01-01 00:00:00 step={n} loss={:.4} tokens/s=10{}\n", 2.0 + f64::from(n % 977) / 1e3, n % 431);
    let log = (0..5_000).map(line).collect::<String>().chars().take(256 * 1024).collect();
    for (name, text) in [("8_ranks", beats(8)), ("64_ranks", beats(64)), ("log", log)] {
        let packed = pack::pack_text(&text).expect("it pays");
        println!("link/{name}: {} bytes, packed {}", text.len(), packed.len());
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function(format!("pack/{name}"), |bench| bench.iter(|| pack::pack_text(black_box(&text))));
        group.bench_function(format!("unpack/{name}"), |bench| bench.iter(|| pack::unpack(black_box(&packed))));
    }
    group.finish();
}

criterion_group!(benches, engine, placement, link);
criterion_main!(benches);
