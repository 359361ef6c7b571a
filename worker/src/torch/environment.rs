//! What a rank is told by its environment: torchrun's variables and ours (CONTRACT section 2).
//!
//! Read once, at the start. A program that runs alone has none of them and is rank 0 of 1.

use std::path::PathBuf;

use everlit_api::environment::{ELASTIC, GLOO_HOST, SEAT, SERVER, SERVER_SECRET, SNAPSHOT_DIR, SPARE};

use super::TrainError;
use super::rendezvous::Server;

/// A rank's place in its gang.
#[derive(Debug, Clone)]
pub struct Environment {
    /// From 0.
    pub rank: u32,
    /// Ranks in all.
    pub world: u32,
    /// Ranks on this node.
    pub local_world: u32,
    /// From 0, among them.
    pub local_rank: u32,
    /// Empty when running alone.
    pub job_id: String,
    /// From 1; `None` when running alone.
    pub attempt: Option<u32>,
    /// Membership of the process group that this process was started for; 0: all begin together.
    pub generation: u32,
    /// This process's number within its attempt.
    pub seat: u32,
    /// An agent started it, and says who follows a lost rank.
    pub supervised: bool,
    /// It waits until it is given a rank.
    pub spare: bool,
    /// Where the agent looks for signs of life.
    pub heartbeat_file: Option<PathBuf>,
    /// Where checkpoints are committed.
    pub checkpoint_dir: Option<PathBuf>,
    /// Shared memory of the job, where snapshots outlive this process.
    pub snapshot_dir: Option<PathBuf>,
    /// The agent's choice; `Some(None)` is its word that there is nothing to resume from.
    pub resume_from: Option<Option<PathBuf>>,
    /// `dir:<path>`; needed with more than one rank.
    pub rendezvous: Option<String>,
    /// Where ranks of several nodes meet; `None`: all are on this one.
    pub server: Option<Server>,
    /// The address that this rank's connections use.
    pub gloo_host: String,
    /// Other ranks may join one that began alone.
    pub elastic: bool,
    /// Threads of libtorch's kernels.
    pub threads: i32,
}

impl Environment {
    /// From a look-up of variables; empty ones count as unset, but for `EVERLIT_RESUME_FROM`.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, TrainError> {
        let text = |name: &str| variable(name).filter(|value| !value.is_empty());
        let number = |name: &str| match text(name) {
            None => Ok(None),
            Some(value) => match value.trim().parse::<u32>() {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(TrainError::Config(format!("{name} is `{value}`, not a number"))),
            },
        };
        let rank = number("RANK")?.unwrap_or(0);
        let world = number("WORLD_SIZE")?.unwrap_or(1);
        let spare = text(SPARE).is_some();
        if rank >= world && !spare {
            return Err(TrainError::Config(format!("RANK is {rank}, but WORLD_SIZE is {world}")));
        }
        let rendezvous = text("EVERLIT_RENDEZVOUS");
        if world > 1 && rendezvous.is_none() {
            return Err(TrainError::Config(format!("WORLD_SIZE is {world}, but EVERLIT_RENDEZVOUS (dir:<path>) is not set")));
        }
        let local_world = number("LOCAL_WORLD_SIZE")?.unwrap_or(world).max(1);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let shared = u32::try_from(cores).unwrap_or(1) / local_world;
        let threads = number("OMP_NUM_THREADS")?.unwrap_or(shared).clamp(1, 1024);
        Ok(Self {
            rank,
            world,
            local_world,
            local_rank: number("LOCAL_RANK")?.unwrap_or(rank % local_world),
            job_id: text("EVERLIT_JOB_ID").unwrap_or_default(),
            attempt: number("EVERLIT_ATTEMPT")?,
            generation: number("EVERLIT_GENERATION")?.unwrap_or(0),
            seat: number(SEAT)?.unwrap_or(rank),
            supervised: text(SEAT).is_some(),
            spare,
            heartbeat_file: text("EVERLIT_HEARTBEAT_FILE").map(PathBuf::from),
            checkpoint_dir: text("EVERLIT_CHECKPOINT_DIR").map(PathBuf::from),
            snapshot_dir: text(SNAPSHOT_DIR).map(PathBuf::from),
            resume_from: variable("EVERLIT_RESUME_FROM").map(|path| (!path.is_empty()).then(|| PathBuf::from(path))),
            rendezvous,
            server: text(SERVER).map(|address| Server { address, secret: text(SERVER_SECRET).unwrap_or_default() }),
            gloo_host: text(GLOO_HOST).unwrap_or_else(|| "127.0.0.1".into()),
            elastic: text(ELASTIC).is_some(),
            threads: i32::try_from(threads).unwrap_or(1),
        })
    }
}

impl Environment {
    /// This rank among those that save together, and how many those are: all that see the same disk. Each node saves the whole state.
    pub fn savers(&self) -> (u32, u32) {
        if self.server.is_some() { (self.local_rank, self.local_world) } else { (self.rank, self.world) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Environment, TrainError> {
        Environment::read(|name| variables.iter().find(|(own, _)| *own == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn without_variables_the_program_is_alone() {
        let alone = read(&[]).unwrap();
        assert_eq!((alone.rank, alone.world, alone.attempt, alone.resume_from), (0, 1, None, None));
        assert!(alone.threads >= 1);
    }

    #[test]
    fn an_empty_resume_path_means_start_anew() {
        assert_eq!(read(&[("EVERLIT_RESUME_FROM", "")]).unwrap().resume_from, Some(None));
        assert_eq!(read(&[("EVERLIT_RESUME_FROM", "/x")]).unwrap().resume_from, Some(Some("/x".into())));
    }

    #[test]
    fn contradictions_are_configuration_errors() {
        for bad in [
            &[("RANK", "x")][..],
            &[("RANK", "2"), ("WORLD_SIZE", "2"), ("EVERLIT_RENDEZVOUS", "dir:/x")],
            &[("RANK", "0"), ("WORLD_SIZE", "2")],
        ] {
            assert_eq!(read(bad).unwrap_err().exit_code(), 78, "{bad:?}");
        }
    }
}
