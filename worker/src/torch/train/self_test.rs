//! Whether this build and machine can do what going on in place leans on: a blocked collective that is aborted from another thread, a new
//! group in the same process after it, and the same bits from that.
//!
//! Two members in one process, beside training and with a rendezvous of their own. What fails here costs a rank nothing but the cheapest
//! rung of recovery.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tch::Tensor;

use super::super::TrainError;
use super::super::c10d::{Backend, CollectiveError, Group};
use super::super::environment::Environment;
use super::super::heartbeat::PulseHandle;
use super::super::rendezvous::Rendezvous;

const SETUP: Duration = Duration::from_secs(20);
/// An aborted collective must answer within this; it takes milliseconds.
const ABORTED_WITHIN: Duration = Duration::from_secs(10);
/// Long enough for a collective to be waiting for its peer.
const BLOCKED_AFTER: Duration = Duration::from_millis(10);

/// Tries it beside the ranks' own rendezvous, and says in the heartbeat whether it holds.
pub(super) fn tell(environment: &Environment, pulse: &PulseHandle) {
    let Some(folder) = environment.rendezvous.as_deref().and_then(|address| address.strip_prefix("dir:")) else { return };
    let tried = run(&Path::new(folder).join(format!("self-test-{}", environment.seat)), &environment.gloo_host);
    if let Err(why) = &tried {
        eprintln!("rank {}: can not go on in place of lost ranks: {why}", environment.rank);
    }
    pulse.in_place(tried.is_ok());
}

/// Tries it in a new folder, which is removed again.
fn run(folder: &Path, host: &str) -> Result<(), TrainError> {
    let tried = try_all(folder, host);
    let _ = std::fs::remove_dir_all(folder);
    tried
}

fn try_all(folder: &Path, host: &str) -> Result<(), TrainError> {
    let first = connect(folder, 0, host)?;
    aborted(&first)?;
    drop(first);
    let second = connect(folder, 1, host)?;
    let numbers = [1.0_f32, 0.1, -3.5e-7, 16_777_216.0];
    let sums = both(&second, |group, rank| {
        let tensor = Tensor::from_slice(&numbers) * f64::from(rank + 1);
        group.all_reduce(&tensor)?;
        Ok(Vec::<f32>::try_from(&tensor).unwrap_or_default())
    })?;
    let expected: Vec<f32> = numbers.iter().map(|number| number + number * 2.0).collect();
    if sums.iter().any(|sum| *sum != expected) {
        return Err(TrainError::Failed(format!("a renewed group sums {numbers:?} to {sums:?}")));
    }
    Ok(())
}

fn connect(folder: &Path, generation: u32, host: &str) -> Result<Vec<Group>, TrainError> {
    let address = format!("dir:{}", folder.display());
    let one = |rank| -> Result<Group, TrainError> {
        let store = Arc::new(Rendezvous::open(&address, generation, rank, 2)?);
        Ok(Group::connect(store, host, Backend::Gloo, SETUP, SETUP)?)
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| one(1));
        let own = one(0)?;
        let other = other.join().map_err(|_| TrainError::Failed("connecting panicked".into()))??;
        Ok(vec![own, other])
    })
}

/// A collective that waits for its peer ends when it is aborted.
fn aborted(groups: &[Group]) -> Result<(), TrainError> {
    let group = &groups[0];
    std::thread::scope(|scope| {
        let blocked = scope.spawn(|| group.all_reduce(&Tensor::from_slice(&[1.0_f32])));
        std::thread::sleep(BLOCKED_AFTER);
        let begun = Instant::now();
        group.abort()?;
        match blocked.join() {
            Ok(Err(_)) if begun.elapsed() < ABORTED_WITHIN => Ok(()),
            Ok(Err(_)) => Err(TrainError::Failed(format!("an aborted collective took {:?} to end", begun.elapsed()))),
            Ok(Ok(())) => Err(TrainError::Failed("a collective without its peer ended well".into())),
            Err(_) => Err(TrainError::Failed("an aborted collective panicked".into())),
        }
    })
}

fn both<T: Send>(groups: &[Group], work: impl Fn(&Group, u32) -> Result<T, CollectiveError> + Sync) -> Result<Vec<T>, TrainError> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = groups.iter().zip(0..).map(|(group, rank)| scope.spawn(move || work(group, rank))).collect();
        let joined = threads.into_iter().map(|thread| thread.join().map_err(|_| TrainError::Failed("a collective panicked".into())));
        joined.map(|answer| Ok(answer??)).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the groups of one process share in libtorch must bear that: it did not, and one training in hundreds died of its own test.
    #[test]
    fn many_groups_begin_at_once_in_one_process() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let dir = dir.path();
                scope.spawn(move || {
                    for round in 0..20 {
                        run(&dir.join(format!("{thread}-{round}")), "127.0.0.1").unwrap();
                    }
                });
            }
        });
    }
}
