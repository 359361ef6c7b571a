//! Post-mortems on their way into jobs' stores, apart from the loop that decides: a few at a time, each tried a few times.
//!
//! What is put there is what `GET /jobs/{id}/attempts/{n}/postmortem` answers. It is made a moment after the attempt's end, and again while lines are
//! missing: a node that is gone may be back, and its log may be on its way into the store. The last try keeps it without them. A coordinator that ends
//! meanwhile forgets it; who asks is answered as ever.

use std::sync::Arc;
use std::time::Duration;

use everlit_api::ids::JobId;
use everlit_api::server;
use everlit_api::store::Trouble;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::control::Coordinator;
use super::driver::Input;
use super::logs::archive;
use crate::engine::Event;

/// That may wait to be taken up, and that wait for their next try.
pub const WAITING_MAX: usize = 1_000;
/// That are made or sent at a time.
const AT_ONCE: usize = 4;
/// Before each try; the first one gives the logs a moment to come in.
const PAUSES: [Duration; 5] =
    [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(20), Duration::from_secs(60), Duration::from_secs(120)];
/// A put, with its retries.
const PUT_MAX: Duration = Duration::from_secs(60);

/// Puts post-mortems in stores until nobody orders one any more.
pub async fn run(coordinator: Coordinator, mut orders: mpsc::Receiver<(JobId, u32)>) {
    let busy = Arc::new(Semaphore::new(AT_ONCE));
    // They end with this: what they hold keeps the driver.
    let mut all = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = all.join_next() => {}
            order = orders.recv(), if all.len() < WAITING_MAX => {
                let Some((job, attempt)) = order else { return };
                let (coordinator, busy) = (coordinator.clone(), busy.clone());
                all.spawn(async move { keep(&coordinator, &busy, job, attempt).await });
            }
        }
    }
}

async fn keep(coordinator: &Coordinator, busy: &Semaphore, job: JobId, attempt: u32) {
    let mut outcome = None;
    for (index, pause) in PAUSES.into_iter().enumerate() {
        sleep(pause).await;
        let Ok(_permit) = busy.acquire().await else { return };
        match once(coordinator, job, attempt, index + 1 == PAUSES.len()).await {
            // The job was removed meanwhile.
            Try::Gone => return,
            Try::Later => {}
            Try::Done(done) => {
                let is_kept = done.is_ok();
                outcome = Some(done);
                if is_kept {
                    break;
                }
            }
        }
    }
    if let Some(outcome) = outcome {
        // No engine is there only when this process ends.
        let _ = coordinator.handle.inputs.send(Input::Wish(Event::PostmortemKept { job, attempt, outcome })).await;
    }
}

enum Try {
    Done(Result<String, (Trouble, String)>),
    /// Lines are missing that may still come.
    Later,
    Gone,
}

async fn once(coordinator: &Coordinator, job: JobId, attempt: u32, is_last: bool) -> Try {
    let Ok(spec) = coordinator.of_job(job, |job, _, _| job.spec.clone()).await else { return Try::Gone };
    let shared: server::Shared = Arc::new(coordinator.clone());
    let Ok(found) = server::postmortem(&shared, job, attempt).await else { return Try::Gone };
    if found.lines_missing.is_some() && !is_last {
        return Try::Later;
    }
    let Ok(text) = serde_json::to_vec(&found) else { return Try::Gone };
    let put = async {
        let archive = archive::open(&spec, job)?;
        archive.put_postmortem(attempt, text.into()).await.map(|()| archive.place())
    };
    Try::Done(match timeout(PUT_MAX, put).await {
        Ok(done) => done.map_err(|fault| (fault.trouble, fault.to_string())),
        Err(_) => Err((Trouble::TimedOut, format!("the store did not answer within {} s", PUT_MAX.as_secs()))),
    })
}
