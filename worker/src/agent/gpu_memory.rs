//! Memory of GPUs is seen free before a gang is started on them. Blocks, for a bounded time.
//!
//! A killed process may hold its memory for seconds, and one that got away from its dead shim holds it for ever. What is certainly a leftover
//! of ours is killed and waited for: it carries the path of a run folder of this agent in its environment, and that run is of an older
//! attempt of the same job, or has no shim any more. Nothing else is ever killed. Whoever else holds memory is told, and the gang is started.

use std::io;
use std::path::{Path, PathBuf};

use everlit_api::agent::{GangSpec, GpuHolder};
use everlit_api::ids::JobId;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::folders::{Folders, HEARTBEAT_NAME, parse_run};
use super::gpu::Gpus;
use super::limits::{GPU_MEMORY_LOOKS, GPU_MEMORY_PAUSE};
use super::shim;

/// Whose a process is that holds memory of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// Of a run of ours that is over.
    Leftover,
    /// It is ending, not visible here, or of a run of ours that may be about to end.
    Unsettled,
    /// Somebody else's.
    Foreign,
}

/// What is asked and done here; a test has its own.
trait Machine {
    fn holders(&mut self, gpu: u32) -> Vec<u32>;
    fn whose(&mut self, pid: u32) -> Whose;
    fn kill(&mut self, pid: u32);
    fn pause(&mut self);
}

/// Waits until nobody holds memory of a gang's GPUs who will let it go; answers who still does.
pub(super) fn wait(gpus: &Gpus, folders: &Folders, spec: &GangSpec) -> Vec<GpuHolder> {
    let mut held = wait_on(&mut Real { gpus, folders, spec }, &spec.gpus);
    if spec.shares_gpus {
        // Others may have memory of them: that is what sharing is.
        held.clear();
    }
    let name = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_string();
    let held: Vec<_> = held.into_iter().map(|(gpu, pid)| GpuHolder { gpu, pid, name: name(pid) }).collect();
    for GpuHolder { gpu, pid, name } in &held {
        tracing::warn!(job = %spec.job, attempt = spec.attempt, gpu, pid, name, "memory of a GPU is held, and the gang is started all the same");
    }
    held
}

fn wait_on(machine: &mut impl Machine, gpus: &[u32]) -> Vec<(u32, u32)> {
    let mut held = Vec::new();
    for look in 0..GPU_MEMORY_LOOKS {
        if look > 0 {
            machine.pause();
        }
        held = gpus.iter().flat_map(|gpu| machine.holders(*gpu).into_iter().map(|pid| (*gpu, pid))).collect();
        let mut waits = false;
        for (gpu, pid) in &held {
            let whose = machine.whose(*pid);
            waits |= whose != Whose::Foreign;
            if whose == Whose::Leftover {
                tracing::info!(gpu, pid, "a leftover of a dead gang holds memory of a GPU: it is killed");
                machine.kill(*pid);
            }
        }
        if !waits {
            break;
        }
    }
    held
}

struct Real<'a> {
    gpus: &'a Gpus,
    folders: &'a Folders,
    spec: &'a GangSpec,
}

impl Machine for Real<'_> {
    fn holders(&mut self, gpu: u32) -> Vec<u32> {
        self.gpus.holders(gpu)
    }

    fn whose(&mut self, pid: u32) -> Whose {
        let whose = match std::fs::read(format!("/proc/{pid}/environ")) {
            // Its own memory is gone already, its program too, and the driver still cleans up.
            Ok(environ) if environ.is_empty() && std::fs::read_link(format!("/proc/{pid}/exe")).is_err() => Whose::Unsettled,
            Ok(environ) => whose_run(self.folders, self.spec, &environ),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Whose::Foreign,
            Err(_) => Whose::Unsettled,
        };
        if self.spec.shares_gpus && whose == Whose::Unsettled { Whose::Foreign } else { whose }
    }

    fn kill(&mut self, pid: u32) {
        if let Ok(pid) = i32::try_from(pid) {
            // Gone by now is as well.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    fn pause(&mut self) {
        std::thread::sleep(GPU_MEMORY_PAUSE);
    }
}

/// Whose the process with this environment is.
fn whose_run(folders: &Folders, spec: &GangSpec, environ: &[u8]) -> Whose {
    let mut entries = environ.split(|byte| *byte == 0).filter_map(|entry| std::str::from_utf8(entry).ok());
    let Some(path) = entries.find_map(|entry| entry.strip_prefix("EVERLIT_HEARTBEAT_FILE=")) else { return Whose::Foreign };
    let Some((job, attempt, folder)) = parse_heartbeat_path(folders, Path::new(path)) else { return Whose::Foreign };
    if (job == spec.job && attempt < spec.attempt) || !shim::may_live(&folder) { Whose::Leftover } else { Whose::Unsettled }
}

/// The run whose heartbeat file this is, if it is one of this agent.
fn parse_heartbeat_path(folders: &Folders, path: &Path) -> Option<(JobId, u32, PathBuf)> {
    let folder = path.parent().filter(|_| path.file_name().is_some_and(|name| name == HEARTBEAT_NAME))?;
    let (attempt, _) = parse_run(folder.file_name()?.to_str()?)?;
    let job: JobId = folder.parent()?.parent()?.file_name()?.to_str()?.parse().ok()?;
    (folder.parent()? == folders.runs(job)).then(|| (job, attempt, folder.to_path_buf()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::environment::tests::spec;
    use super::*;
    use crate::shim::STATE_NAME;

    /// Holders by GPU; each is gone so many pauses after it was killed, or after the beginning.
    #[derive(Default)]
    struct Fake {
        holders: BTreeMap<u32, Vec<u32>>,
        whose: BTreeMap<u32, Whose>,
        dies_after: BTreeMap<u32, usize>,
        killed: BTreeMap<u32, usize>,
        pauses: usize,
    }

    impl Machine for Fake {
        fn holders(&mut self, gpu: u32) -> Vec<u32> {
            let gone = |pid: &u32| {
                let since = if self.whose[pid] == Whose::Leftover { self.killed.get(pid).copied() } else { Some(0) };
                since.zip(self.dies_after.get(pid)).is_some_and(|(since, after)| self.pauses >= since + after)
            };
            self.holders.get(&gpu).into_iter().flatten().copied().filter(|pid| !gone(pid)).collect()
        }

        fn whose(&mut self, pid: u32) -> Whose {
            self.whose[&pid]
        }

        fn kill(&mut self, pid: u32) {
            let now = self.pauses;
            self.killed.entry(pid).or_insert(now);
        }

        fn pause(&mut self) {
            self.pauses += 1;
        }
    }

    fn fake(holders: &[(u32, u32, Whose, Option<usize>)]) -> Fake {
        let mut fake = Fake::default();
        for (gpu, pid, whose, after) in holders {
            fake.holders.entry(*gpu).or_default().push(*pid);
            fake.whose.insert(*pid, *whose);
            fake.dies_after.extend(after.map(|after| (*pid, after)));
        }
        fake
    }

    #[test]
    fn a_free_gpu_is_waited_for_by_nobody() {
        let mut machine = fake(&[(7, 1, Whose::Leftover, None)]);
        assert_eq!((wait_on(&mut machine, &[0, 1]), machine.pauses, machine.killed.len()), (vec![], 0, 0));
        assert_eq!((wait_on(&mut machine, &[]), machine.pauses), (vec![], 0));
    }

    #[test]
    fn leftovers_are_killed_and_their_memory_is_waited_for() {
        let mut machine = fake(&[(0, 1, Whose::Leftover, Some(3)), (1, 2, Whose::Unsettled, Some(5))]);
        assert_eq!(wait_on(&mut machine, &[0, 1]), vec![]);
        assert_eq!((machine.pauses, machine.killed.keys().copied().collect::<Vec<_>>()), (5, vec![1]));
    }

    #[test]
    fn a_foreign_process_is_told_at_once_and_never_killed() {
        let mut machine = fake(&[(0, 1, Whose::Foreign, None), (1, 2, Whose::Leftover, Some(2))]);
        assert_eq!(wait_on(&mut machine, &[0, 1]), vec![(0, 1)]);
        assert_eq!((machine.pauses, machine.killed.contains_key(&1)), (2, false));
    }

    #[test]
    fn what_does_not_let_go_is_waited_for_no_longer_than_the_bound() {
        let mut machine = fake(&[(0, 1, Whose::Unsettled, None)]);
        assert_eq!(wait_on(&mut machine, &[0]), vec![(0, 1)]);
        assert_eq!((machine.pauses, machine.killed.len()), (GPU_MEMORY_LOOKS - 1, 0));
    }

    #[test]
    fn only_runs_of_this_agent_that_are_over_are_leftovers() {
        let dir = tempfile::tempdir().unwrap();
        let folders = Folders::new(dir.path().to_path_buf());
        let mut own = spec(2);
        own.attempt = 3;
        let whose = |job: JobId, name: &str| {
            let path = folders.runs(job).join(name).join(HEARTBEAT_NAME);
            whose_run(&folders, &own, format!("A=b\0EVERLIT_HEARTBEAT_FILE={}\0", path.display()).as_bytes())
        };
        let other = JobId::from_parts(9, 9);
        assert_eq!(whose(own.job, "a2-r0"), Whose::Leftover);
        assert_eq!(whose(other, "a7-r1"), Whose::Leftover, "its folder is gone, so it was forgotten");
        // A shim that has not written anything yet may be just beginning.
        let folder = folders.runs(other).join("a7-r1");
        std::fs::create_dir_all(&folder).unwrap();
        assert_eq!(whose(other, "a7-r1"), Whose::Unsettled);
        let begun = |shim: u32| format!("{{\"started\":{{\"shim\":{shim},\"pid\":1,\"at_ms\":1}}}}\n");
        std::fs::write(folder.join(STATE_NAME), begun(std::process::id())).unwrap();
        assert_eq!(whose(other, "a7-r1"), Whose::Leftover, "that process is another one now");
        for environ in
            ["", "PATH=/bin\0HOME=/", "EVERLIT_HEARTBEAT_FILE=/else/jobs/x/runs/a1-r0/HEARTBEAT", "EVERLIT_HEARTBEAT_FILE=HEARTBEAT"]
        {
            assert_eq!(whose_run(&folders, &own, environ.as_bytes()), Whose::Foreign, "{environ}");
        }
    }
}
