//! Every limit and interval of the agent, in one place.
//!
//! Times are in milliseconds of the agent's monotonic clock unless the type says otherwise.

use std::time::Duration;

/// An agent that ends waits so long for the last snapshots of jobs that have just ended to be saved, and looks so often.
pub(super) const LAST_SAVES_MAX: Duration = Duration::from_secs(30);
pub(super) const LAST_SAVES_LOOK: Duration = Duration::from_millis(20);
/// Ranks of a gang whose threads are looked at when one is judged.
pub(super) const STACKS_MAX: usize = 8;
/// Errors of GPUs that are remembered, for ranks that end a little later, and that may wait for the loop or for a coordinator.
pub(super) const GPU_ERRORS_MAX: usize = 64;
/// The same error of the same GPU within this is told once.
pub(super) const GPU_ERROR_SPACING_MS: u64 = 1_000;
/// A rank that ends so long after an error of its GPU may have ended of it: one that hangs on it is found within ten seconds.
pub(super) const GPU_ERROR_BEFORE_MS: u64 = 15_000;
/// The same, when the error is heard of after the end: the two come on different ways.
pub(super) const GPU_ERROR_AFTER_MS: u64 = 2_000;
/// Longest call of the driver that waits for an error of a GPU.
pub(super) const GPU_WAIT_MS: u32 = 5_000;
/// Looks at who holds memory of GPUs before a gang is started on them all the same, and the time between two.
pub(super) const GPU_MEMORY_LOOKS: usize = 100;
pub(super) const GPU_MEMORY_PAUSE: Duration = Duration::from_millis(100);
/// News of ranks are sent together, at most this often.
pub(super) const BEATS_EVERY_MS: u64 = 50;
/// Without an event from the kernel, heartbeat files are looked at this often.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Named numbers of one rank at most, and characters of a name.
pub(super) const METRICS_MAX: usize = 32;
/// Characters of a metric's name at most.
pub(super) const METRIC_NAME_MAX: usize = 64;
/// Idle time of a rank of a gang when the job does not say; a lone rank may be idle for ever.
pub(super) const GANG_IDLE_MS: u64 = 5 * 60 * 1000;
/// CPU use is read this many times per idle timeout.
pub(super) const IDLE_LOOKS: u64 = 5;
/// A rank that uses less than this part of a CPU uses none: helper threads tick a little in a rank that hangs.
pub(super) const IDLE_CPU_PART: f64 = 0.01;
/// Times between steps that are remembered of a job.
pub(super) const PACE_GAPS_MAX: usize = 256;
/// So many must be known before they mean anything.
pub(super) const PACE_GAPS_MIN: usize = 20;
/// Longest time without progress of which nothing is known yet.
pub(super) const STUCK_UNKNOWN_MS: u64 = 30 * 60 * 1000;
/// The built-in program: a step may take so much, and so many times the longest of the newest ones.
pub(super) const STUCK_FLOOR_MS: u64 = 2_000;
pub(super) const STUCK_FACTOR: u64 = 6;
/// Ranks that wait may wait for one on another node, whose agent knows better: they are judged late, when all leases are long over.
pub(super) const STUCK_SPREAD_FLOOR_MS: u64 = 60_000;
/// The same when one rank gives no sign of life at all while others do: nothing else than that rank can be the cause.
pub(super) const STUCK_EARLY_FLOOR_MS: u64 = 500;
pub(super) const STUCK_EARLY_FACTOR: u64 = 4;
/// The built-in program writes a heartbeat four times a second at least: without one for so long it does not run, with one so young it does.
pub(super) const QUIET_MS: u64 = 750;
pub(super) const FRESH_MS: u64 = 500;
/// Between two looks at a gang that may be stuck early.
pub(super) const EARLY_LOOK_MS: u64 = 50;
/// The same for its other phases.
pub(super) const STUCK_PHASE_FLOOR_MS: u64 = 60_000;
pub(super) const STUCK_PHASE_FACTOR: u64 = 10;
/// A script that writes heartbeats: at least so long, or so many times its longest step.
pub(super) const STUCK_SCRIPT_FLOOR_MS: u64 = 10 * 60 * 1000;
pub(super) const STUCK_SCRIPT_FACTOR: u64 = 20;
/// A first step of the built-in program, once one is known: caches, allocators and GPUs warm up in it, and a busy machine shows most.
pub(super) const STUCK_FIRST_FLOOR_MS: u64 = 2 * 60 * 1000;
pub(super) const STUCK_FIRST_FACTOR: u64 = 10;
/// Steps after which a started rank is judged by what was learned.
pub(super) const SETTLED_STEPS: u32 = 3;
/// A living program writes a heartbeat every two seconds at least: one whose heartbeats stopped for longer is to blame.
pub(super) const BEAT_EVERY_MS: u64 = 2_000;
/// When the agent itself came so much too late, nobody was late.
pub(super) const LATE_MS: u64 = 250;
/// With ranks alive the engine is woken at least this often: so it knows when it did not run.
pub(super) const WAKE_MAX_MS: u64 = 1_000;
/// A disk that takes a small file more slowly than this keeps heartbeats from being seen.
pub(super) const PROBE_SLOW_MS: u64 = 250;
/// So long a disk that was found well counts as well.
pub(super) const PROBE_FRESH_MS: u64 = 500;
/// Probes that are no further apart say of the time between them, too, that the disk was well.
pub(super) const PROBE_RUN_MS: u64 = 2_000;
/// A disk that stood still must have been well for so long again before who is silent is blamed: whoever waited for it may not have run yet.
pub(super) const WELL_BEFORE_STUCK_MS: u64 = 250;
/// The same, before heartbeats that did not come are held against a rank by themselves.
pub(super) const WELL_BEFORE_SILENT_MS: u64 = 1_000;
/// The disk is asked after when heartbeats of a program that is not ours are so late.
pub(super) const SUSPECT_MS: u64 = BEAT_EVERY_MS + 500;
/// A draining agent stops its ranks itself when its coordinator has not done so by then.
pub(super) const DRAIN_PATIENCE_MS: u64 = 3_000;
/// Ranks that an agent before this one did not come to start are ended when their order has not come again by then.
pub(super) const ORDER_PATIENCE_MS: u64 = 60_000;
/// After its last rank's end an ending agent waits so long for the coordinator to have it on record.
pub(super) const FORGET_PATIENCE_MS: u64 = 1_000;
/// First wait before another try to reach the coordinator.
pub(super) const RECONNECT_MIN: Duration = Duration::from_millis(50);
/// Longest wait before another try to reach the coordinator.
pub(super) const RECONNECT_MAX: Duration = Duration::from_millis(600);
/// The same when the coordinator was there and would not have it: nothing but a person changes that.
pub(super) const REFUSED_WAIT: Duration = Duration::from_secs(10);
/// Longest wait for an answer to a join or a renewal.
pub(super) const ASK_MAX: Duration = Duration::from_secs(20);
/// Longest sleep before the certificate's age is looked at again, and the wait after a renewal that failed.
pub(super) const RENEW_LOOK_MAX: Duration = Duration::from_secs(60);
pub(super) const RENEW_RETRY: Duration = Duration::from_secs(5);
/// Longest time for one try to connect.
pub(super) const CONNECT_MAX: Duration = Duration::from_secs(5);
/// The link is probed this often when nothing else was heard.
pub(super) const PING_EVERY: Duration = Duration::from_secs(5);
/// A link that is silent for so long is given up.
pub(super) const LINK_SILENCE_MAX: Duration = Duration::from_secs(20);
/// Frames that may wait for the link; one that does not keep up is given up, since everything is said again after a connect.
pub(super) const LINK_FRAMES_MAX: usize = 16 * 1024;
/// Log frames that may wait for the link.
pub(super) const LINK_LOG_FRAMES_MAX: usize = 8;
/// Report interval until the coordinator has said one.
pub(super) const REPORT_EVERY: Duration = Duration::from_secs(1);
/// Bytes of new output that are searched for progress per job and interval.
pub(super) const METRICS_BYTES_MAX: u64 = 256 * 1024;
/// Bytes of a compiled pattern at most.
pub(super) const PATTERN_BYTES_MAX: usize = 256 * 1024;
/// Lines and bytes of a rank's last output that are told with its end; what its shim kept is searched before it is cut.
pub(super) const TAIL_LINES_MAX: usize = 20;
pub(super) const TAIL_BYTES_MAX: usize = 4096;
/// Bytes of a line that a policy matched that are told.
pub(super) const MATCHED_BYTES_MAX: usize = 300;
/// Bytes of a program's error file that are read.
pub(super) const ERROR_FILE_BYTES_MAX: u64 = 64 * 1024;
/// Characters of a program's error message that are told.
pub(super) const ERROR_CHARS_MAX: usize = 4096;
/// Characters of a reason for a failed save that are told.
pub(super) const SAVE_ERROR_CHARS_MAX: usize = 512;
/// Damaged checkpoints that are remembered until there is a coordinator to tell.
pub(super) const QUARANTINED_MAX: usize = 256;
/// Bytes of packages that are kept packed for further jobs of the same folder, and how long one stays without use.
pub(super) const PACKAGES_BYTES_MAX: u64 = 4 << 30;
pub(super) const PACKAGES_UNUSED_MAX: Duration = Duration::from_secs(86_400);
/// Ranks per CPU that a node takes when nothing is reserved.
pub(super) const SLOTS_PER_CPU: u32 = 16;
/// Ranks that every node takes.
pub(super) const SLOTS_MIN: u32 = 64;
/// Threads for blocking work: preparing gangs, reading checkpoints, removing folders.
pub(super) const BLOCKING_THREADS: usize = 8;
/// Of them so many may read checkpoints, so that gangs can always be started.
pub(super) const VERIFY_AT_ONCE: usize = 2;
/// A log stream sends at most one small frame per this time.
pub(super) const LOG_SPACING: Duration = Duration::from_millis(2);

/// Connections of nodes that fetch checkpoints here.
pub(super) const COPY_CONNECTIONS_MAX: usize = 64;
/// A file goes to who fetches it in pieces of so many bytes, of which so many wait for each.
pub(super) const COPY_PIECE_BYTES: usize = 256 * 1024;
pub(super) const COPY_PIECES_MAX: usize = 4;
/// Time to reach a node that gives a checkpoint, and the longest silence of one, or of one that takes.
pub(super) const COPY_CONNECT_MAX: Duration = Duration::from_secs(10);
pub(super) const COPY_SILENCE_MAX: Duration = Duration::from_secs(20);
/// An agent that was told to end and has checkpoints stays so long after its last rank, and after others have fetched some; but no longer than.
pub(super) const LAST_COPIES_WAIT: Duration = Duration::from_secs(3);
pub(super) const LAST_COPIES_MAX: Duration = Duration::from_secs(600);
/// An agent that ends waits so long for uploads; what is not in its store then stays on this node's disk.
pub(super) const LAST_UPLOADS_WAIT: Duration = Duration::from_secs(30);
pub(super) const LAST_COPIES_LOOK: Duration = Duration::from_millis(100);
/// A copy, or what is fetched from a store, leaves so much of the disk free.
pub(super) const COPY_SPARE_BYTES: u64 = 256 * 1024 * 1024;
/// Checkpoints that are fetched at once.
pub(super) const COPIES_AT_ONCE: usize = 2;

/// Checkpoints that are uploaded at once.
pub(super) const UPLOADS_AT_ONCE: usize = 2;
/// Between two tries of an upload that fails: at first, doubled with each that fails in a row, and at most.
pub(super) const UPLOAD_WAIT_MIN: Duration = Duration::from_secs(1);
pub(super) const UPLOAD_WAIT_MAX: Duration = Duration::from_secs(60);
/// Data shards of a job that are fetched at once.
pub(super) const SHARDS_AT_ONCE: usize = 4;
/// Between two tries to read data that fail: at first, doubled with each that fails in a row, and at most.
pub(super) const DATA_WAIT_MIN: Duration = Duration::from_millis(500);
pub(super) const DATA_WAIT_MAX: Duration = Duration::from_secs(15);
/// Parts of files that nobody goes on with are taken back within this, or left to the bucket's own rules.
pub(super) const ABANDON_MAX: Duration = Duration::from_secs(10);
/// Files of a checkpoint that are fetched from a store at once.
pub(super) const STORE_FILES_AT_ONCE: usize = 4;

const _: () = assert!(VERIFY_AT_ONCE + COPIES_AT_ONCE < BLOCKING_THREADS);
