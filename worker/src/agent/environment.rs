//! The environment of a rank: CONTRACT section 2, and nothing else of the agent's own. Pure.
//!
//! A job's `env` may set anything but the names in [`RESERVED`]: those say where the rank is in its gang, and a job that lies about them
//! would only break itself. What torch programs usually want (`OMP_NUM_THREADS`, …) is set unless the job sets it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use everlit_api::agent::{GangSpec, Program};
use everlit_api::data::file_name;
use everlit_api::environment::{ELASTIC, GLOO_HOST, RESERVED, SEAT, SERVER, SERVER_SECRET, SNAPSHOT_DIR, SPARE};

use super::data::HAVE_NAME;

/// What is passed on from the agent's own environment.
pub(super) const PASSED: [&str; 4] = ["PATH", "HOME", "LANG", "LD_LIBRARY_PATH"];

/// Paths that a rank is told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Paths<'a> {
    /// Its heartbeat file.
    pub heartbeat: &'a Path,
    /// Its error file.
    pub error: &'a Path,
    /// The list of its shards.
    pub shards: &'a Path,
    /// Where it asks for shards of a store.
    pub feed: Option<&'a Path>,
    /// The job's checkpoints.
    pub checkpoints: &'a Path,
    /// Where ranks of this attempt meet.
    pub rendezvous: &'a Path,
    /// Where snapshots are kept in shared memory.
    pub snapshots: Option<&'a Path>,
}

/// How this node is reached by others of a gang.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reach {
    /// Its address.
    pub address: IpAddr,
    /// The interface that has it; `None` when none has, as behind a translation of addresses.
    pub interface: Option<String>,
}

/// The environment of the process on a seat of this node: a rank, or a spare, whose rank is its seat until it gets one. `own`: the agent's
/// variables named in [`PASSED`]. `node_has_gpus`: then a job sees only the GPUs granted to it, which may be none.
pub(super) fn environment(
    spec: &GangSpec,
    seat: u32,
    paths: Paths<'_>,
    resume_from: Option<&str>,
    own: &BTreeMap<String, String>,
    node_has_gpus: bool,
    reach: Option<&Reach>,
) -> BTreeMap<String, String> {
    let place = spec.rank_of(seat);
    let rank = place.unwrap_or(seat);
    let local = rank.saturating_sub(spec.first_rank);
    let mut env = own.clone();
    env.insert("PYTHONUNBUFFERED".into(), "1".into());
    if spec.count > 1 {
        env.insert("OMP_NUM_THREADS".into(), "1".into());
    }
    if node_has_gpus {
        // The order that the driver counts in; CUDA's own default puts the fastest first.
        env.insert("CUDA_DEVICE_ORDER".into(), "PCI_BUS_ID".into());
    }
    if spec.group_world_size > 1
        && let Some(interface) = reach.and_then(|reach| reach.interface.as_ref())
    {
        for library in ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"] {
            env.insert(library.into(), interface.clone());
        }
    }
    if matches!(spec.program, Program::Command { .. }) {
        env.insert("TORCH_NCCL_ASYNC_ERROR_HANDLING".into(), "1".into());
    }
    env.extend(spec.env.iter().filter(|(name, _)| !RESERVED.contains(&name.as_str())).map(|(name, value)| (name.clone(), value.clone())));
    let path = |path: &Path| path.display().to_string();
    let mut set = |name: &str, value: String| {
        env.insert(name.into(), value);
    };
    set("RANK", rank.to_string());
    set("LOCAL_RANK", local.to_string());
    set("GROUP_RANK", spec.group_rank.to_string());
    set("ROLE_RANK", rank.to_string());
    set("ROLE_NAME", "default".into());
    set("WORLD_SIZE", spec.world_size.to_string());
    set("LOCAL_WORLD_SIZE", spec.count.to_string());
    set("GROUP_WORLD_SIZE", spec.group_world_size.to_string());
    set("ROLE_WORLD_SIZE", spec.world_size.to_string());
    set("MASTER_ADDR", spec.master_addr.clone());
    set("MASTER_PORT", spec.master_port.to_string());
    set("TORCHELASTIC_RUN_ID", spec.job.to_string());
    set("TORCHELASTIC_RESTART_COUNT", spec.restarts.to_string());
    set("TORCHELASTIC_MAX_RESTARTS", spec.max_restarts.to_string());
    set("TORCHELASTIC_ERROR_FILE", path(paths.error));
    set("EVERLIT_JOB_ID", spec.job.to_string());
    set("EVERLIT_ATTEMPT", spec.attempt.to_string());
    set("EVERLIT_GENERATION", spec.generation.to_string());
    set("EVERLIT_HEARTBEAT_FILE", path(paths.heartbeat));
    set("EVERLIT_CHECKPOINT_DIR", path(paths.checkpoints));
    set("EVERLIT_RESUME_FROM", resume_from.unwrap_or_default().into());
    set("EVERLIT_DATA_SHARDS", path(paths.shards));
    if let Some(feed) = paths.feed {
        set("EVERLIT_SHARD_FEED", path(feed));
    }
    set("EVERLIT_RENDEZVOUS", format!("dir:{}", paths.rendezvous.display()));
    if matches!(spec.program, Program::Worker { .. }) {
        set(SEAT, seat.to_string());
    }
    if spec.group_world_size > 1
        && let (Program::Worker { .. }, Some(reach)) = (&spec.program, reach)
    {
        set(SERVER, server_address(spec));
        set(SERVER_SECRET, spec.rendezvous_secret.clone());
        set(GLOO_HOST, reach.address.to_string());
    }
    if place.is_none() {
        set(SPARE, "1".into());
    }
    if spec.elastic {
        set(ELASTIC, "1".into());
    }
    if let Some(snapshots) = paths.snapshots {
        set(SNAPSHOT_DIR, path(snapshots));
    }
    if node_has_gpus {
        // Ranks that share GPUs see only their own: one that is there twice in the list would hide what comes after it.
        let own = local as usize..local as usize + 1;
        let seen = if spec.shares_gpus { spec.gpus.get(own).unwrap_or_default() } else { spec.gpus.as_slice() };
        let gpus: Vec<String> = seen.iter().map(ToString::to_string).collect();
        set("CUDA_VISIBLE_DEVICES", gpus.join(","));
    }
    env
}

/// Where ranks of several nodes meet: with the first of them.
pub(super) fn server_address(spec: &GangSpec) -> String {
    let host = &spec.master_addr;
    if host.contains(':') { format!("[{host}]:{}", spec.master_port) } else { format!("{host}:{}", spec.master_port) }
}

/// The shards of one rank of the whole gang: round-robin, so that each shard has one reader.
/// `feed`: where those of a store are.
pub(super) fn shards_of(spec: &GangSpec, rank: u32, feed: &Path) -> String {
    let (first, step) = (rank as usize, spec.world_size.max(1) as usize);
    if let Some(shards) = spec.data.as_ref().and_then(|data| data.shards.as_ref()) {
        let have = feed.join(HAVE_NAME);
        let own = shards.iter().enumerate().skip(first).step_by(step);
        return own.map(|(index, shard)| format!("{}\n", have.join(file_name(index, &shard.name)).display())).collect();
    }
    spec.shards.iter().skip(first).step_by(step).map(|shard| format!("{shard}\n")).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use everlit_api::data::{GangData, ListedShard};
    use everlit_api::ids::JobId;
    use everlit_api::job::{CheckpointPolicy, HeartbeatPolicy, default_stop_grace};
    use expect_test::expect;

    pub(crate) fn spec(world_size: u32) -> GangSpec {
        GangSpec {
            job: JobId::from_parts(1, 2),
            attempt: 1,
            generation: 0,
            seats: Vec::new(),
            spares: Vec::new(),
            elastic: false,
            world_size,
            first_rank: 0,
            count: world_size,
            group_rank: 0,
            group_world_size: 1,
            master_addr: "127.0.0.1".into(),
            master_port: 29_500,
            rendezvous_secret: String::new(),
            restarts: 0,
            max_restarts: 50,
            mean_time_between_failures: None,
            gpus: Vec::new(),
            shares_gpus: false,
            program: Program::Command { argv: vec!["true".into()] },
            env: BTreeMap::new(),
            workdir: None,
            package: None,
            shards: Vec::new(),
            data: None,
            resume_from: None,
            fetch: None,
            stored: None,
            rejected_step: None,
            skip_memory: false,
            checkpoint: CheckpointPolicy::default(),
            heartbeat: HeartbeatPolicy::default(),
            log_metrics: Vec::new(),
            log_policies: Vec::new(),
            log_bytes_max: 1 << 30,
            stop_grace: default_stop_grace(),
        }
    }

    fn text(spec: &GangSpec, seat: u32, node_has_gpus: bool) -> String {
        let at = |path| Path::new(path);
        let paths = Paths {
            heartbeat: at("/r/HEARTBEAT"),
            error: at("/r/e"),
            shards: at("/r/s"),
            feed: None,
            checkpoints: at("/c"),
            rendezvous: at("/m"),
            snapshots: Some(at("/dev/shm/s")),
        };
        let own = BTreeMap::from([("PATH".to_string(), "/bin".to_string())]);
        let env = environment(spec, seat, paths, Some("/c/step-000000000100"), &own, node_has_gpus, None);
        env.iter().map(|(name, value)| format!("{name}={value}\n")).collect()
    }

    #[test]
    fn a_rank_is_told_what_torchrun_tells_and_what_is_ours() {
        let mut spec = spec(4);
        spec.first_rank = 2;
        spec.count = 2;
        spec.gpus = vec![1, 0];
        spec.env = [("RANK", "7"), ("LANG", "C"), ("SEED", "3"), ("EVERLIT_ATTEMPT", "9")].map(|(n, v)| (n.into(), v.into())).into();
        expect![[r#"
            CUDA_DEVICE_ORDER=PCI_BUS_ID
            CUDA_VISIBLE_DEVICES=1,0
            EVERLIT_ATTEMPT=1
            EVERLIT_CHECKPOINT_DIR=/c
            EVERLIT_DATA_SHARDS=/r/s
            EVERLIT_GENERATION=0
            EVERLIT_HEARTBEAT_FILE=/r/HEARTBEAT
            EVERLIT_JOB_ID=00000000010000000000000002
            EVERLIT_RENDEZVOUS=dir:/m
            EVERLIT_RESUME_FROM=/c/step-000000000100
            EVERLIT_SNAPSHOT_DIR=/dev/shm/s
            GROUP_RANK=0
            GROUP_WORLD_SIZE=1
            LANG=C
            LOCAL_RANK=1
            LOCAL_WORLD_SIZE=2
            MASTER_ADDR=127.0.0.1
            MASTER_PORT=29500
            OMP_NUM_THREADS=1
            PATH=/bin
            PYTHONUNBUFFERED=1
            RANK=3
            ROLE_NAME=default
            ROLE_RANK=3
            ROLE_WORLD_SIZE=4
            SEED=3
            TORCHELASTIC_ERROR_FILE=/r/e
            TORCHELASTIC_MAX_RESTARTS=50
            TORCHELASTIC_RESTART_COUNT=0
            TORCHELASTIC_RUN_ID=00000000010000000000000002
            TORCH_NCCL_ASYNC_ERROR_HANDLING=1
            WORLD_SIZE=4
        "#]]
        .assert_eq(&text(&spec, 3, true));
    }

    #[test]
    fn one_rank_alone_keeps_its_threads_and_a_job_may_choose() {
        let mut spec = spec(1);
        let alone = text(&spec, 0, true);
        assert!(!alone.contains("OMP_NUM_THREADS") && alone.contains("CUDA_VISIBLE_DEVICES=\n"));
        assert!(!text(&spec, 0, false).contains("CUDA_VISIBLE_DEVICES"));
        spec.count = 2;
        spec.env = [("OMP_NUM_THREADS", "4"), ("PYTHONUNBUFFERED", "")].map(|(n, v)| (n.into(), v.into())).into();
        let chosen = text(&spec, 0, false);
        assert!(chosen.contains("OMP_NUM_THREADS=4\n") && chosen.contains("PYTHONUNBUFFERED=\n"));
    }

    #[test]
    fn every_shard_has_one_reader() {
        let mut spec = spec(2);
        let feed = Path::new("/j/data");
        spec.shards = ["a", "b", "c"].map(String::from).into();
        assert_eq!((shards_of(&spec, 0, feed), shards_of(&spec, 1, feed)), ("a\nc\n".into(), "b\n".into()));
        spec.shards.clear();
        assert_eq!(shards_of(&spec, 1, feed), "");
        let shard = |name: &str| ListedShard { source: 0, name: name.into(), bytes: 1, etag: None };
        let shards = Some(["x/a", "x/b c", "x/d"].map(shard).into());
        spec.data = Some(GangData { sources: Vec::new(), shards, stream: false, fallback: None, to: None });
        assert_eq!(shards_of(&spec, 0, feed), "/j/data/have/000000-a\n/j/data/have/000002-d\n");
        assert_eq!(shards_of(&spec, 1, feed), "/j/data/have/000001-b c\n");
    }
}
