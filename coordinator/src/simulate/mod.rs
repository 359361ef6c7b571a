//! What-if: the production engine in virtual time over a modelled cluster, so that a policy can be judged before it costs GPU hours.
//!
//! `world` is the run (machines, faults, costs), `driven` the engine in it, `ladder` the one rung that the engine does not have yet, `traffic`
//! a model of who decides. `study` asks many runs for the figures that people want. Nothing here reads a clock, a network or a file; a scenario
//! and a seed are a run. What is modelled and what is not: docs/simulate.md.

mod account;
mod chart;
mod driven;
mod faults;
pub mod kinds;
mod ladder;
mod outcome;
mod random;
pub mod scenario;
pub mod study;
mod svg;
#[cfg(test)]
mod tests;
pub mod traffic;
mod world;

pub use account::Account;
pub use chart::chart;
pub use outcome::{Counts, GaveUp, Outcome};
pub use svg::svg;
pub use world::run;

/// Milliseconds of an hour.
pub const HOUR_MS: u64 = 3_600_000;
/// Milliseconds of a day.
pub const DAY_MS: u64 = 24 * HOUR_MS;
