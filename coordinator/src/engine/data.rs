//! A job's data in a store: listed once, by the first node of its first gang, and kept with the job from then on.
//!
//! Until it is, the gang's nodes have their order and wait; it is said to them again with the listing, once that is durable. Every later
//! gang is told what was listed, so a bucket that changes can not change what a running job trains on.

use std::sync::Arc;

use everlit_api::agent::ToAgent;
use everlit_api::data::{DataTurn, GangData, Listed, listing_sha256};
use everlit_api::ids::NodeId;

use super::state::{Facts, Job, Listing};
use super::{Engine, Turn};

impl Engine {
    pub(super) fn on_data_listed(&mut self, turn: &mut Turn, node: &NodeId, listed: Listed) {
        let Some(job) = self.jobs.get_mut(&listed.job).filter(|job| job.spec.data.is_stored()) else { return };
        if !job.gang.as_ref().is_some_and(|gang| gang.attempt == listed.attempt && gang.ending.is_none()) {
            return;
        }
        let id = listed.job;
        if job.listing.is_some() {
            // It had not heard yet that this is known.
            self.tell_gang(turn, id, Some(node));
            return;
        }
        let (count, bytes) = (listed.shards.len(), listed.shards.iter().map(|shard| shard.bytes).sum::<u64>());
        let sha256 = listing_sha256(&listed.shards);
        job.listing = Some(Listing { shards: Arc::new(listed.shards), is_new: true });
        turn.touched.insert(id);
        let facts = Facts::from([
            ("node", node.0.clone().into()),
            ("shards", count.into()),
            ("bytes", bytes.into()),
            ("listing_sha256", sha256.into()),
        ]);
        let reason = format!("the job's data is {count} shards with {bytes} bytes: what was listed is what is read from now on");
        turn.event(Some(id), "data_listed", reason, facts);
        self.tell_gang(turn, id, None);
    }

    pub(super) fn on_data_turned(&self, turn: &mut Turn, node: &NodeId, news: &DataTurn) {
        if !self.jobs.contains_key(&news.job) {
            return;
        }
        let (event, what) = if news.local {
            ("data_from_copy", "reads its shards from the local copy")
        } else {
            ("data_from_store", "reads its shards from the store again")
        };
        let facts = Facts::from([("node", node.0.clone().into())]);
        turn.event(Some(news.job), event, format!("{node} {what}: {}", news.reason), facts);
    }

    /// A node's link is new: of a job with data in a store the agent needs the order again, for what opens the store.
    pub(super) fn feeds_again(&self, turn: &mut Turn, node: &NodeId) {
        let fed = self.jobs.values().filter(|job| job.spec.data.is_stored() && job.retry_at.is_none());
        for job in fed {
            let is_here =
                job.gang.as_ref().is_some_and(|gang| gang.ending.is_none() && gang.placement.iter().any(|share| share.node == *node));
            let is_told = turn.step.commands.iter().any(|command| is_order(command, node, job));
            if is_here && !is_told {
                self.tell_gang(turn, job.id, Some(node));
            }
        }
    }
}

fn is_order(command: &super::Command, node: &NodeId, job: &Job) -> bool {
    matches!(command, super::Command::Tell { node: to, frame: ToAgent::StartGang(spec) } if to == node && spec.job == job.id)
}

impl Job {
    /// What a gang is told of its data in a store.
    pub(super) fn gang_data(&self) -> Option<GangData> {
        let data = &self.spec.data;
        let shards = self.listing.as_ref().map(|listing| listing.shards.to_vec());
        let to = data.to.as_ref().map(|to| to.join(&self.id.to_string()));
        Some(GangData { sources: data.sources()?, shards, stream: data.stream, fallback: data.fallback.clone(), to })
    }
}
