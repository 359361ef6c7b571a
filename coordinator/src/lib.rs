//! The everlit coordinator and its command line.

pub mod cli;
pub mod config;
