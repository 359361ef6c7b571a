//! What runs on a node: the agent that supervises ranks, the shim beside each rank, and the built-in libtorch program.

pub mod agent;
pub mod checkpoint;
pub mod shim;
#[cfg(feature = "torch")]
pub mod torch;
pub mod train_config;
