//! Every bound of the engine in one place, with the relations between them asserted.

/// Jobs that wait for a place at most; one more is refused with 429.
pub const QUEUED_JOBS_MAX: usize = 110_000;
/// Lines of the queue behind the first that waits that are looked at for one that can go before it.
pub const BACKFILL_LINES_MAX: usize = 100;
/// Jobs at a time that others are preempted for.
pub const PREEMPTING_MAX: usize = 64;
/// Jobs by which one was preempted that are remembered of it.
pub const PREEMPTED_MAX: usize = 16;
/// Looks at the queue in a row: jobs that are stopped for others at once come back into it.
pub const PASSES_MAX: usize = 16;
/// Nodes that an explanation names; the rest is counted.
pub const EXPLAINED_NODES_MAX: usize = 50;
/// Wait for the other ranks of a gang once one has exited 0.
pub const STRAGGLER_WAIT_MS: u64 = 5 * 60 * 1_000;
/// A recovery in place that is not done by then is given up for the next rung: copying the state is bounded by it, too.
pub const REGROUP_MAX_MS: u64 = 5 * 60 * 1_000;
/// A rank that joins a smaller gang is tried again after so long at least when its process ended before it could.
pub const GROW_RETRY_MIN_MS: u64 = 1_000;
/// A checkpoint is put aside when so many attempts in a row that began from it ended without a step.
pub const FAILED_RESUMES_MAX: u32 = 3;
/// A program that never reports a step counts as progressing when an attempt ran this long (and `heal_after` is not shorter).
pub const MUTE_PROGRESS_MS: u64 = 10 * 60 * 1_000;
/// The exponent of the backoff stops growing here, far beyond every `max`.
pub const BACKOFF_EXPONENT_MAX: u32 = 40;
/// Points of a job's time series at most; when full, every second one goes.
pub const SERIES_POINTS_MAX: usize = 1_000;
/// Between two writes of a job's time series while it is active: what a crash may cost of it.
pub const SERIES_EVERY_MS: u64 = 60_000;
/// What a job is credited with before its first failure: nothing is known yet, and a few hours is what big jobs see.
pub const FAILURE_PRIOR_MS: u64 = 4 * 3_600 * 1_000;
/// Between two records of failed saves of one rank.
pub const SAVE_FAILED_EVERY_MS: u64 = 10_000;
/// Attempts beyond the newest on record that a node may tell of: what a disk could have lost, and far from where numbers end.
pub const ATTEMPTS_LOST_MAX: u32 = 10_000;
/// Named numbers of one rank at most.
pub const METRICS_MAX: usize = 32;
/// Nodes that one job is kept from at most; the one that was excluded first is allowed again.
pub const EXCLUDED_MAX: usize = 64;
/// A failure that may be the machine's is held against its node for so long.
pub const BLAME_MS: u64 = 24 * 3_600 * 1_000;
/// So many make it a node that is avoided: one may be chance.
pub const BLAMES_MIN: usize = 2;
/// Failures remembered of a node at most.
pub const BLAMES_MAX: usize = 16;
/// Hardware errors remembered of a node's GPUs at most.
pub const GPU_BLAMES_MAX: usize = 64;
/// The same error of the same GPU within this is the same incident.
pub const GPU_ERROR_SPACING_MS: u64 = 60_000;
/// An error of a GPU that was heard of so long after the first rank's end may still be its cause: the two come on different ways.
pub const GPU_ERROR_AFTER_MS: u64 = 2_000;
/// Samples that the rates are computed over.
pub const RATE_SAMPLES_MAX: usize = 16;
/// Time that the rates are computed over.
pub const RATE_WINDOW_MS: u64 = 10_000;
/// Shortest time between two samples of the rates.
pub const RATE_SAMPLE_MS: u64 = 700;
/// Between two checks of all tables.
pub const CHECK_ALL_MS: u64 = 60_000;
/// Bytes of log kept for a job on one node.
pub const LOG_BYTES_MAX: u64 = 1024 * 1024 * 1024;
/// Checkpoints remembered per job at most (the agent keeps `checkpoint.keep`).
pub const CHECKPOINTS_MAX: usize = 64;
/// After a copy of a checkpoint the next one of its job begins no sooner than it took, and than this.
pub const COPY_REST_MIN_MS: u64 = 1_000;
/// After one that failed, and when nodes have come or gone; twice as long after each further one that fails in a row.
pub const COPY_LOOK_MS: u64 = 5_000;
/// And at most this long.
pub const COPY_WAIT_MAX_MS: u64 = 10 * 60 * 1000;
/// Starts that fail for want of a checkpoint from another node before an older one is taken.
pub const FETCHES_MAX: u32 = 3;
/// A store's fault of one kind is told of a job at most so often.
pub const STORE_FAULT_EVERY_MS: u64 = 10 * 60 * 1000;
/// Jobs that are over and whose last upload is waited for, for the event.
pub const LAST_UPLOADS_MAX: usize = 1_000;
/// Jobs that are over and whose logs are not all in their stores.
pub const LAST_ARCHIVES_MAX: usize = 1_000;
/// Told steps of a rank whose median is compared with the others'; odd, so that there is one in the middle.
pub const SLOW_WINDOW: usize = 9;
/// A rank whose own part of a step takes more than this many times as long as the others' is slow: ranks that do the same on machines of one
/// kind differ by a tenth or two, and who shares a processor with one other process for a while is not at this factor the whole time.
pub const SLOW_FACTOR: f64 = 1.5;
/// It is slow no longer below this: a rank in between stays what it is.
pub const SLOW_OVER_FACTOR: f64 = 1.2;
/// Without what a slow rank needs longer a step would be at least this part shorter; else nobody would notice.
pub const SLOW_SHARE_MIN: f64 = 0.1;
/// Every look must have found it so for this long: backups, compilers and neighbours that come and go do not last at one rank.
pub const SLOW_FOR_MS: u64 = 30_000;
/// And over so many told steps, where steps are long.
pub const SLOW_STEPS_MIN: u64 = 20;
/// Between two looks at a gang: a look costs a median for each rank.
pub const SLOW_LOOK_MS: u64 = 2_000;
/// Ranks of a gang that are slow at a time at most: where there are more, it is hardly the ranks.
pub const SLOW_RANKS_MAX: usize = 16;
/// Told times of a step beyond this are not believed.
pub const STEP_SECONDS_MAX: f64 = 86_400.0;
/// Shorter times can not be told from none.
pub const STEP_SECONDS_MIN: f64 = 1e-6;

const _: () = assert!(SLOW_WINDOW % 2 == 1 && SLOW_STEPS_MIN >= 2 * SLOW_WINDOW as u64, "most steps of that time were slow");
const _: () = assert!(SLOW_FACTOR > SLOW_OVER_FACTOR && SLOW_OVER_FACTOR > 1.0 && SLOW_FOR_MS >= 10 * SLOW_LOOK_MS);
const _: () = assert!(RATE_SAMPLES_MAX as u64 * RATE_SAMPLE_MS >= RATE_WINDOW_MS);
const _: () = assert!(QUEUED_JOBS_MAX > 100_000, "CONTRACT section 5: at least 100,000 queued jobs");
