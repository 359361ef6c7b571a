//! Names of the variables that everlit gives each rank (CONTRACT section 2): the one list of what a job's `env` can not set.
//!
//! The door refuses them and the agent overwrites them, so that no rank ever believes a wrong rank, port or folder.

/// Set for each rank by everlit.
pub const RESERVED: [&str; 34] = [
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_NAME",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_ERROR_FILE",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "CUDA_VISIBLE_DEVICES",
    "EVERLIT_JOB_ID",
    "EVERLIT_ATTEMPT",
    "EVERLIT_GENERATION",
    "EVERLIT_HEARTBEAT_FILE",
    "EVERLIT_CHECKPOINT_DIR",
    "EVERLIT_RESUME_FROM",
    "EVERLIT_DATA_SHARDS",
    "EVERLIT_SHARD_FEED",
    "EVERLIT_OUTPUT_DIR",
    "EVERLIT_RENDEZVOUS",
    SERVER,
    SERVER_SECRET,
    GLOO_HOST,
    SNAPSHOT_DIR,
    SEAT,
    SPARE,
    ELASTIC,
];

/// The process's number within its attempt ([`crate::ids::Incarnation::rank`]).
pub const SEAT: &str = "EVERLIT_SEAT";
/// `host:port` where ranks of several nodes leave word for each other; missing where all are on one.
pub const SERVER: &str = "EVERLIT_RENDEZVOUS_SERVER";
/// What opens it.
pub const SERVER_SECRET: &str = "EVERLIT_RENDEZVOUS_SECRET";
/// The address that the built-in program's connections use on this node.
pub const GLOO_HOST: &str = "EVERLIT_GLOO_HOST";
/// `1`: the rank is a spare, and waits until it is given a rank.
pub const SPARE: &str = "EVERLIT_SPARE";
/// `1`: other ranks may join a rank that began alone.
pub const ELASTIC: &str = "EVERLIT_ELASTIC";
/// Folder in shared memory for snapshots of the training state; missing where there is no shared memory.
pub const SNAPSHOT_DIR: &str = "EVERLIT_SNAPSHOT_DIR";
