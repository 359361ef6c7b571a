//! The engine's time: wall time at start plus monotonic time since, so that it never goes back, not over a restart either.

use std::time::{Duration, Instant};

use everlit_api::time::Timestamp;

/// A clock that only goes forward.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    started: Instant,
    at_start: Timestamp,
}

impl Clock {
    /// Goes on after `last`, the newest time that was recorded.
    pub fn after(last: Timestamp) -> Self {
        Self { started: Instant::now(), at_start: Timestamp::now().max(last) }
    }

    /// Now.
    pub fn now(&self) -> Timestamp {
        Timestamp(self.at_start.0 + self.started.elapsed().as_millis() as u64)
    }

    /// When a deadline is, for the runtime.
    pub fn instant(&self, at: Timestamp) -> tokio::time::Instant {
        tokio::time::Instant::from_std(self.started + Duration::from_millis(at.since_ms(self.at_start)))
    }

    /// Since the start.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }
}
