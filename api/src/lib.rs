//! The words of everlit: every type that crosses a boundary (HTTP, the agent link, a file on disk) is written down here, once.
//!
//! Behind feature `server` stand the doors (an axum router over [`control::Control`]), behind `client` the typed client, behind `package` folders
//! that go with jobs, behind `service` what a service manager is told,
//! behind `store` object storage.
//! This crate knows no engine, no database and no process; it never decides anything.

pub mod agent;
pub mod auth;
#[cfg(feature = "server")]
pub mod control;
pub mod data;
pub mod environment;
pub mod gpu;
pub mod ids;
pub mod job;
pub mod join;
pub mod manifest;
pub mod model;
#[cfg(feature = "package")]
pub mod package;
pub mod ports;
pub mod problem;
pub mod rank;
pub mod request;
#[cfg(feature = "service")]
pub mod service;
pub mod status;
pub mod store;
pub mod time;

#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "server")]
pub mod server;
