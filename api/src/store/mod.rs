//! Where things are kept beyond a node: buckets (`s3://`, `gs://`, `az://`) and folders that several machines share (`file://`, a path).
//!
//! A [`Place`] is the words; behind feature `store` stand the one door to it ([`Store`]), the credentials that open it ([`Settings`]), and
//! the rules by which checkpoints ([`Shelf`]) and logs ([`Archive`]) are kept there. Nothing here knows a job's state or decides when something
//! is kept.

mod lineage;
mod place;
mod trouble;

#[cfg(feature = "store")]
mod archive;
#[cfg(feature = "store")]
mod door;
#[cfg(feature = "store")]
mod fault;
#[cfg(feature = "store")]
mod file;
#[cfg(feature = "store")]
mod parts;
#[cfg(feature = "store")]
mod send;
#[cfg(feature = "store")]
mod settings;
#[cfg(feature = "store")]
mod shelf;
#[cfg(all(test, feature = "store"))]
mod stand_in;
#[cfg(all(test, feature = "store"))]
mod tests;

pub use lineage::Lineage;
pub use place::{Place, Scheme};
pub use trouble::Trouble;

#[cfg(feature = "store")]
pub use archive::{Archive, Listed, PIECE_BYTES, Piece};
#[cfg(feature = "store")]
pub use door::{About, Store};
#[cfg(feature = "store")]
pub use fault::Fault;
#[cfg(feature = "store")]
pub use file::CheckedFile;
#[cfg(feature = "store")]
pub use parts::Begun;
#[cfg(feature = "store")]
pub use send::{Open, PART_BYTES, Sending, Source, Window};
#[cfg(feature = "store")]
pub use settings::Settings;
#[cfg(feature = "store")]
pub use shelf::{Committed, Kept, NotKept, Shelf, digest};
