//! The coordinator: one engine decides, the shell around it does I/O, agents do the rest. The command line is a client of its doors.

pub mod cli;
pub mod config;
pub mod engine;
pub mod shell;
pub mod simulate;
