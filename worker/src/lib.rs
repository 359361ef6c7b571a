//! What runs on a node: the agent that supervises ranks, the shim beside each rank, and the files they share with the
//! built-in training program, which is a program of its own (`bin/everlit-worker.rs`): libtorch is not in this library.

pub mod agent;
pub mod checkpoint;
pub mod rendezvous;
pub mod shim;
pub mod train_config;
