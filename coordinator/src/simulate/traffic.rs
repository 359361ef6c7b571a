//! Who decides, and what that costs in messages and reaction time: a model in closed form, with the sizes of the real frames.
//!
//! `central`: every heartbeat goes to the coordinator, which judges. `mixed` is what everlit does: agents judge their own ranks, the coordinator
//! orders. `local`: agents judge, tell each other along a tree and stop by themselves; the coordinator hears once per node. The coordinator is one
//! server with a fixed time per message; when more heartbeats come than nine tenths of it can take, it hears each rank less often.

use everlit_api::agent::{Beat, Exited, FromAgent, Started, ToAgent};
use everlit_api::ids::{Incarnation, JobId};
use everlit_api::manifest::Phase;
use everlit_api::rank::RankExit;
use everlit_api::status::NodeLoad;
use everlit_api::time::{Millis, Timestamp};
use serde::Serialize;

/// Making a decision durable.
const COMMIT_MS: f64 = 5.0;
/// Load that is left for everything but heartbeats.
const BUSY_MAX: f64 = 0.9;
/// An agent sees a heartbeat within this.
const AGENT_LOOK_MS: f64 = 50.0;
/// Between two reports of a node.
const REPORT_MS: f64 = 1_000.0;

/// Who decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Decisions {
    /// The coordinator judges and orders.
    Central,
    /// Agents judge, the coordinator orders.
    Mixed,
    /// Agents judge and stop, the coordinator orders the start.
    Local,
}

impl Decisions {
    /// All.
    pub const ALL: [Self; 3] = [Self::Central, Self::Mixed, Self::Local];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Central => "central",
            Self::Mixed => "mixed",
            Self::Local => "local",
        }
    }
}

/// Who decides, over which wires.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Control {
    /// Who decides.
    pub decisions: Decisions,
    /// One way between two machines.
    pub latency_ms: u64,
    /// The coordinator's work for one message, in microseconds.
    pub message_us: f64,
    /// Between two heartbeats of a rank.
    pub heartbeat_ms: u64,
}

impl Default for Control {
    fn default() -> Self {
        Self { decisions: Decisions::Mixed, latency_ms: 1, message_us: 20.0, heartbeat_ms: 2_000 }
    }
}

impl Control {
    /// What is wrong with it.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.heartbeat_ms == 0 {
            return Err("the time between heartbeats must not be 0".into());
        }
        if !self.message_us.is_finite() || !(0.0..=1e6).contains(&self.message_us) {
            return Err("the work for one message must be 0 to 1000000 microseconds".into());
        }
        Ok(())
    }

    /// What it costs for so many machines and ranks.
    pub fn load(&self, nodes: u32, workers: u32) -> Load {
        let (nodes, workers, sizes) = (f64::from(nodes), f64::from(workers), Sizes::measure());
        let work_ms = self.message_us / 1_000.0;
        let latency = self.latency_ms as f64;
        let per_node = workers / nodes;
        let central = self.decisions == Decisions::Central;
        let beats_per_ms = if central { workers } else { nodes } / self.heartbeat_ms as f64;
        let reports_per_ms = nodes / REPORT_MS;
        let room = (BUSY_MAX - reports_per_ms * work_ms).max(0.01);
        let stretch = (beats_per_ms * work_ms / room).max(1.0);
        let beats_per_ms = beats_per_ms / stretch;
        let busy = ((beats_per_ms + reports_per_ms) * work_ms).min(0.99);
        // Waiting for one server with a fixed time per message and messages at random (M/D/1).
        let wait = busy * work_ms / (2.0 * (1.0 - busy));
        let beat_bytes = if central { sizes.beat } else { sizes.beats_frame + per_node * sizes.beat_entry };
        let tree = (nodes + 1.0).log2().ceil() * latency;
        let order = COMMIT_MS + nodes * work_ms + latency;
        let stop = if self.decisions == Decisions::Local { tree } else { latency + wait + order };
        // Every end must be known before the next attempt may begin.
        let ends = if self.decisions == Decisions::Local { nodes } else { workers };
        let start = latency + wait + ends * work_ms + order;
        let hang = if central { self.heartbeat_ms as f64 * stretch / 2.0 + latency + wait } else { AGENT_LOOK_MS };
        let told = if self.decisions == Decisions::Local { 0.0 } else { nodes };
        Load {
            messages_per_second: (beats_per_ms + reports_per_ms) * 1_000.0,
            bytes_per_second: (beats_per_ms * beat_bytes + reports_per_ms * sizes.report) * 1_000.0,
            coordinator_busy: busy,
            heartbeat_ms: self.heartbeat_ms as f64 * stretch,
            messages_per_restart: 2.0 * ends + told + 2.0 * nodes,
            bytes_per_restart: ends * (sizes.exited + sizes.started) + told * sizes.stop + nodes * sizes.forget_entry * per_node,
            seen_later_ms: hang,
            stop_ms: stop,
            start_ms: start,
        }
    }
}

/// What a way to decide costs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Load {
    /// To the coordinator, while nothing fails.
    pub messages_per_second: f64,
    /// The same in bytes of JSON.
    pub bytes_per_second: f64,
    /// Share of one core's time.
    pub coordinator_busy: f64,
    /// Between two heartbeats of a rank that whoever judges it sees.
    pub heartbeat_ms: f64,
    /// Both ways, for one restart of the gang.
    pub messages_per_restart: f64,
    /// The same in bytes, without what is to be run.
    pub bytes_per_restart: f64,
    /// A standstill is seen so much later than by somebody who sees every heartbeat at once.
    pub seen_later_ms: f64,
    /// From an agent's or the coordinator's verdict until every node stops.
    pub stop_ms: f64,
    /// From the last rank's end until every node is told to start.
    pub start_ms: f64,
}

/// Bytes of frames as they are sent.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    beat: f64,
    beats_frame: f64,
    beat_entry: f64,
    report: f64,
    started: f64,
    exited: f64,
    stop: f64,
    forget_entry: f64,
}

impl Sizes {
    fn measure() -> Self {
        let bytes = |frame: &FromAgent| serde_json::to_vec(frame).map_or(0.0, |text| text.len() as f64);
        let job = JobId::from_parts(1_767_225_600_000, 1);
        let incarnation = Incarnation { job, attempt: 100, rank: 10_000 };
        let at = Timestamp(1_767_225_600_000);
        let beat = Beat {
            incarnation: Some(incarnation),
            heartbeat: true,
            phase: Some(Phase::Train),
            step: Some(100_000),
            total_steps: Some(1_000_000),
            samples: Some(100_000_000),
            loss: Some(2.345_678),
            ..Beat::default()
        };
        let (none, one) = (bytes(&FromAgent::Beats { beats: Vec::new() }), bytes(&FromAgent::Beats { beats: vec![beat] }));
        let exit = RankExit {
            code: None,
            signal: Some(15),
            error: None,
            at,
            tail: Vec::new(),
            message: None,
            matched: None,
            out_of_memory: false,
            gpu_error: None,
        };
        let stop = ToAgent::StopGang { job, attempt: 100, grace: Millis(30_000) };
        Self {
            beat: one,
            beats_frame: none,
            beat_entry: one - none + 1.0,
            report: bytes(&FromAgent::Report(NodeLoad::default())),
            started: bytes(&FromAgent::Started(Started { incarnation, pid: 100_000, at })),
            exited: bytes(&FromAgent::Exited(Exited { incarnation, exit, lost: false })),
            stop: serde_json::to_vec(&stop).map_or(0.0, |text| text.len() as f64),
            forget_entry: incarnation.to_string().len() as f64 + 3.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deciding_nearer_costs_fewer_messages_and_less_time() {
        let load = |decisions| Control { decisions, ..Control::default() }.load(2_048, 16_384);
        let [central, mixed, local] = Decisions::ALL.map(load);
        assert!(central.messages_per_second > 2.0 * mixed.messages_per_second);
        assert_eq!(mixed.messages_per_second, local.messages_per_second);
        assert!(central.seen_later_ms > mixed.seen_later_ms);
        assert!(local.stop_ms < mixed.stop_ms && local.start_ms < mixed.start_ms);
        assert!(local.messages_per_restart < mixed.messages_per_restart);
    }

    #[test]
    fn a_coordinator_that_can_not_keep_up_hears_less_often() {
        let load = |message_us| Control { decisions: Decisions::Central, message_us, ..Control::default() }.load(2_048, 16_384);
        let (light, heavy) = (load(20.0), load(400.0));
        assert_eq!(light.heartbeat_ms, 2_000.0);
        assert!(heavy.heartbeat_ms > 4_000.0 && heavy.coordinator_busy < 0.95, "{heavy:?}");
        assert!(heavy.seen_later_ms > light.seen_later_ms);
    }
}
