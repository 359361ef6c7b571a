//! The coordinator: one engine decides, the shell around it does I/O, agents do the rest.

pub mod engine;
pub mod shell;
