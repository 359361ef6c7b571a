//! Where everything is in the agent's data folder. Names only: nothing here touches a disk.
//!
//! `jobs/<job>/` holds `runs/a<attempt>-r<seat>/` (one incarnation), `attempts/a<n>/`, `checkpoints/`, `origin/`, `logs/`, with a
//! package `workdir/` and with data in a store `data/`; `ended` marks a final job. `packages/` holds packed folders, `shards/` the cache of data.

use std::path::{Path, PathBuf};

use everlit_api::ids::{Incarnation, JobId};

/// The heartbeat file's name.
pub(super) const HEARTBEAT_NAME: &str = "HEARTBEAT";
/// torchrun's error file.
pub(super) const ERROR_NAME: &str = "error.json";
/// This rank's shards, one path a line.
pub(super) const SHARDS_NAME: &str = "shards.txt";
/// The attempt's order and decided start, without environment; its presence says that all run folders were made.
pub(super) const GANG_NAME: &str = "gang.json";
/// The built-in program's settings.
pub(super) const WORKER_NAME: &str = "worker.json";
/// In a run folder: the rank was stopped because its agent was told to end.
pub(super) const DRAINED_NAME: &str = "drained";

/// The agent's data folder.
#[derive(Debug, Clone)]
pub(super) struct Folders {
    root: PathBuf,
}

impl Folders {
    /// `root` must be absolute: ranks use paths below it from other folders.
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The folder itself.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Held by the living agent.
    pub(super) fn lock(&self) -> PathBuf {
        self.root.join("agent.lock")
    }

    /// All jobs.
    pub(super) fn jobs(&self) -> PathBuf {
        self.root.join("jobs")
    }

    /// What is being removed.
    pub(super) fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// Packed folders that came with jobs.
    pub(super) fn packages(&self) -> PathBuf {
        self.root.join("packages")
    }

    /// One of them.
    pub(super) fn package(&self, package: &str) -> PathBuf {
        self.packages().join(package)
    }

    /// What was unpacked for a job.
    pub(super) fn workdir(&self, job: JobId) -> PathBuf {
        self.job(job).join("workdir")
    }

    /// One job.
    pub(super) fn job(&self, job: JobId) -> PathBuf {
        self.jobs().join(job.to_string())
    }

    /// Marks a final job.
    pub(super) fn ended(&self, job: JobId) -> PathBuf {
        self.job(job).join("ended")
    }

    /// What is held of a job's checkpoints while it is uploaded.
    pub(super) fn uploads(&self, job: JobId) -> PathBuf {
        self.job(job).join("uploads")
    }

    /// Run folders of a job.
    pub(super) fn runs(&self, job: JobId) -> PathBuf {
        self.job(job).join("runs")
    }

    /// The run folder of one incarnation.
    pub(super) fn run(&self, incarnation: Incarnation) -> PathBuf {
        self.runs(incarnation.job).join(format!("a{}-r{}", incarnation.attempt, incarnation.rank))
    }

    /// Attempts of a job.
    pub(super) fn attempts(&self, job: JobId) -> PathBuf {
        self.job(job).join("attempts")
    }

    /// One attempt.
    pub(super) fn attempt(&self, job: JobId, attempt: u32) -> PathBuf {
        self.attempts(job).join(format!("a{attempt}"))
    }

    /// Files through which ranks of an attempt on one node find each other.
    pub(super) fn rendezvous(&self, job: JobId, attempt: u32) -> PathBuf {
        self.attempt(job, attempt).join("rendezvous/g0")
    }

    /// Checkpoints of a job.
    pub(super) fn checkpoints(&self, job: JobId) -> PathBuf {
        self.job(job).join("checkpoints")
    }

    /// What a job begins from, when that is another job's and came from another node.
    pub(super) fn origin(&self, job: JobId) -> PathBuf {
        self.job(job).join("origin")
    }

    /// Where a job's ranks ask for shards of a store, and have them.
    pub(super) fn data(&self, job: JobId) -> PathBuf {
        self.job(job).join("data")
    }

    /// Shards of stores, for all jobs.
    pub(super) fn shards(&self) -> PathBuf {
        self.root.join("shards")
    }

    /// Log segments of a job.
    pub(super) fn logs(&self, job: JobId) -> PathBuf {
        self.job(job).join("logs")
    }
}

/// Attempt and rank of a run folder's name.
pub(super) fn parse_run(name: &str) -> Option<(u32, u32)> {
    let (attempt, rank) = name.strip_prefix('a')?.split_once("-r")?;
    let (attempt, rank) = (attempt.parse().ok()?, rank.parse().ok()?);
    (format!("a{attempt}-r{rank}") == name).then_some((attempt, rank))
}

/// Number of an attempt folder's name.
pub(super) fn parse_attempt(name: &str) -> Option<u32> {
    let attempt: u32 = name.strip_prefix('a')?.parse().ok()?;
    (format!("a{attempt}") == name).then_some(attempt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_in_one_spelling() {
        assert_eq!((parse_run("a3-r17"), parse_attempt("a3")), (Some((3, 17)), Some(3)));
        for name in ["a03-r1", "a3-r", "a3", "r1-a3", "a3-r1.tmp", "a-1-r2"] {
            assert_eq!(parse_run(name), None, "{name}");
        }
        assert_eq!(parse_attempt("a+3"), None);
    }
}
