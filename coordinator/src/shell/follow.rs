//! Events as they come: what there is from the store, then what the driver tells, without a gap or a repeat between.
//!
//! Who is kept to a user's jobs hears of those alone. News that were missed are read from the store again.

use std::collections::BTreeMap;

use everlit_api::control::{Control, EventItem, EventQuery};
use everlit_api::ids::JobId;
use everlit_api::problem::Problem;
use everlit_api::status::EventView;
use tokio::sync::{broadcast, mpsc};

use super::control::Coordinator;
use super::driver::News;

/// Jobs of which a follower remembers whose they are.
const SEEN_MAX: usize = 10_000;
/// Events read at once for a follower.
const FOLLOW_PAGE: u32 = 500;

impl Coordinator {
    /// Whether an event is for who follows: of the jobs of its user, where it is kept to those.
    async fn concerns(&self, event: &EventView, user: Option<&str>, seen: &mut BTreeMap<JobId, bool>) -> bool {
        let Some(user) = user else { return true };
        let Some(job) = event.job_id else { return false };
        if let Some(known) = seen.get(&job) {
            return *known;
        }
        if seen.len() >= SEEN_MAX {
            seen.clear();
        }
        // One that is gone is nobody's.
        let own = self.job_user(job).await.is_ok_and(|whose| whose.as_deref() == Some(user));
        seen.insert(job, own);
        own
    }

    pub(super) async fn follow(self, query: EventQuery, items: mpsc::Sender<EventItem>) -> Result<(), Problem> {
        let mut news = self.handle.news.subscribe();
        let (user, mut seen) = (query.user.as_deref(), BTreeMap::new());
        let mut after = match query.after {
            Some(after) => after,
            // Without a place to go on from: a job's events from the first, everybody's from now.
            None if query.job.is_some() => 0,
            None => self.store.last().await?.0,
        };
        loop {
            // What there is, then what comes; after missed news once more from the store.
            let mut ended = None;
            if let Some(job) = query.job {
                let state = self.of_job(job, |job, _, _| job.state).await?;
                ended = state.is_final().then_some(state);
            }
            loop {
                let page = self.store.events(query.job, after, FOLLOW_PAGE).await?;
                let done = page.len() < FOLLOW_PAGE as usize;
                for event in page {
                    after = event.seq;
                    if self.concerns(&event.view, user, &mut seen).await
                        && items.send(EventItem::Event(Box::new(event.view))).await.is_err()
                    {
                        return Ok(());
                    }
                }
                if done {
                    break;
                }
            }
            if let Some(state) = ended {
                let _ = items.send(EventItem::End(state)).await;
                return Ok(());
            }
            loop {
                let heard = tokio::select! {
                    () = items.closed() => return Ok(()),
                    heard = news.recv() => heard,
                };
                match heard {
                    Ok(News::Event(event)) => {
                        let ours = event.seq > after && query.job.is_none_or(|job| event.view.job_id == Some(job));
                        if ours {
                            after = event.seq;
                            if self.concerns(&event.view, user, &mut seen).await
                                && items.send(EventItem::Event(Box::new(event.view.clone()))).await.is_err()
                            {
                                return Ok(());
                            }
                        }
                    }
                    Ok(News::Final(job, _)) if query.job == Some(job) => break,
                    Ok(News::Final(..)) => {}
                    Err(broadcast::error::RecvError::Lagged(_)) => break,
                    Err(broadcast::error::RecvError::Closed) => return Ok(()),
                }
            }
        }
    }
}
