//! The logs and post-mortems of one job in a store.
//!
//! ```text
//! <place>/<job>/logs/<node>/<segment>-<from>-<to>-<before>   bytes of a segment of that node's log, whole records, as they stood there
//! <place>/<job>/logs/<node>/attempt-<attempt>-<bytes>        put last: all that the node had at that attempt's end is there
//! <place>/<job>/postmortems/attempt-<attempt>.json           why it ended
//! ```
//!
//! A position in a log is the same on its node and here, so a reader goes on from one to the other. A name says how many bytes of the log
//! come before, so whatever is missing shows, to the byte. Who is cut off begins again: the same bytes get the same name, and pieces that
//! overlap are harmless, since each begins at a record. The trap: a name is all that a listing tells, so it must hold all that a reader needs.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::door::Store;
use super::fault::Fault;
use super::trouble::Trouble;
use crate::ids::NodeId;

/// Bytes of one piece at most.
pub const PIECE_BYTES: u64 = 4 * 1024 * 1024;

/// Logs and post-mortems of one job.
#[derive(Debug, Clone)]
pub struct Archive {
    store: Store,
}

/// A piece of a node's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Piece {
    /// The segment that it is from.
    pub segment: u64,
    /// Offset of its first byte, where a record begins.
    pub from: u64,
    /// Offset after its last.
    pub to: u64,
    /// Bytes of the node's log before it, those that are gone too.
    pub before: u64,
}

/// What is there of a node's log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    /// In the order of the log; some may overlap.
    pub pieces: Vec<Piece>,
    /// Attempts at whose end all was there, and how much that was.
    pub ends: BTreeMap<u32, u64>,
}

impl Piece {
    fn name(&self) -> String {
        format!("{:020}-{:010}-{:010}-{:020}", self.segment, self.from, self.to, self.before)
    }

    fn parse(name: &str) -> Option<Self> {
        let numbers: Vec<u64> = name.split('-').map(str::parse).collect::<Result<_, _>>().ok()?;
        let &[segment, from, to, before] = numbers.as_slice() else { return None };
        let piece = Self { segment, from, to, before };
        (from < to && piece.name() == name).then_some(piece)
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.to - self.from
    }

    /// Bytes of the log up to its end.
    pub fn after(&self) -> u64 {
        self.before.saturating_add(self.bytes())
    }
}

fn end_name(attempt: u32, bytes: u64) -> String {
    format!("attempt-{attempt:010}-{bytes:020}")
}

fn parse_end(name: &str) -> Option<(u32, u64)> {
    let (attempt, bytes) = name.strip_prefix("attempt-")?.split_once('-')?;
    let (attempt, bytes) = (attempt.parse().ok()?, bytes.parse().ok()?);
    (end_name(attempt, bytes) == name).then_some((attempt, bytes))
}

impl Listed {
    /// The end of what is there: segment and offset, and the bytes up to it.
    pub fn end(&self) -> Option<(u64, u64, u64)> {
        self.pieces.iter().map(|piece| (piece.segment, piece.to, piece.after())).max()
    }
}

impl Archive {
    /// Of the job whose folder in the store this is.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// Where it is.
    pub fn place(&self) -> String {
        self.store.place().to_string()
    }

    /// What is there of a node's log. Names that nobody of ours has written are passed over.
    pub async fn list(&self, node: &NodeId) -> Result<Listed, Fault> {
        let folder = format!("logs/{node}");
        let mut found = Listed::default();
        for (name, bytes) in self.store.list(&folder).await? {
            let Some(name) = name.strip_prefix(&folder).and_then(|name| name.strip_prefix('/')) else { continue };
            // A piece with another length was put there by something else: what it should hold is missing.
            found.pieces.extend(Piece::parse(name).filter(|piece| piece.bytes() == bytes && bytes <= PIECE_BYTES));
            found.ends.extend(parse_end(name));
        }
        found.pieces.sort_unstable();
        Ok(found)
    }

    /// Puts a piece; the same one again changes nothing.
    pub async fn put(&self, node: &NodeId, piece: &Piece, bytes: Bytes) -> Result<(), Fault> {
        self.store.put(&format!("logs/{node}/{}", piece.name()), bytes).await
    }

    /// All that the node had at the attempt's end is there.
    pub async fn end(&self, node: &NodeId, attempt: u32, bytes: u64) -> Result<(), Fault> {
        self.store.put(&format!("logs/{node}/{}", end_name(attempt, bytes)), Bytes::from_static(b"\n")).await
    }

    /// Reads a piece. `NotFound`: it is gone. `Damaged`: it has another length than its name says.
    pub async fn read(&self, node: &NodeId, piece: &Piece) -> Result<Bytes, Fault> {
        let name = format!("logs/{node}/{}", piece.name());
        let fault = |trouble, why: &str| Fault::new(trouble, format!("get {}/{name}", self.place()), why);
        let found = self.store.get(&name, PIECE_BYTES).await?;
        let (bytes, _) = found.ok_or_else(|| fault(Trouble::NotFound, "it is gone"))?;
        if bytes.len() as u64 == piece.bytes() {
            Ok(bytes)
        } else {
            Err(fault(Trouble::Damaged, "it has not the length that its name says"))
        }
    }

    /// Puts a post-mortem, in the place of one that is there.
    pub async fn put_postmortem(&self, attempt: u32, text: Bytes) -> Result<(), Fault> {
        self.store.put(&format!("postmortems/attempt-{attempt:010}.json"), text).await
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;
    use crate::store::{Lineage, Shelf};

    fn piece(segment: u64, from: u64, to: u64, before: u64) -> Piece {
        Piece { segment, from, to, before }
    }

    #[test]
    fn names_have_one_spelling_and_sort_as_the_log_does() {
        let pieces = [piece(1, 0, 9, 0), piece(1, 9, 30, 9), piece(2, 0, 5, 30), piece(2 << 32, 0, 5, 35)];
        let names: Vec<String> = pieces.iter().map(Piece::name).collect();
        assert!(names.is_sorted());
        assert_eq!(names.iter().map(|name| Piece::parse(name)).collect::<Vec<_>>(), pieces.map(Some));
        assert_eq!(parse_end(&end_name(7, 30)), Some((7, 30)));
        for odd in ["", "1-0-9-0", "00000000000000000001-0000000009-0000000009-00000000000000000000", "MANIFEST.json", "attempt-7-30"] {
            assert_eq!((Piece::parse(odd), parse_end(odd)), (None, None), "{odd}");
        }
    }

    #[tokio::test]
    async fn what_is_put_is_listed_by_node_and_nothing_else_is() {
        let store = Store::in_memory(InMemory::new()).at("j");
        let archive = Archive::new(store.clone());
        let (one, other) = (NodeId("n1".into()), NodeId("n1-b".into()));
        assert_eq!(archive.list(&one).await, Ok(Listed::default()));
        archive.put(&one, &piece(1, 0, 3, 0), Bytes::from_static(b"abc")).await.unwrap();
        archive.put(&one, &piece(1, 3, 5, 3), Bytes::from_static(b"de")).await.unwrap();
        archive.put(&one, &piece(1, 3, 5, 3), Bytes::from_static(b"de")).await.unwrap();
        archive.end(&one, 1, 5).await.unwrap();
        archive.put(&other, &piece(1, 0, 1, 0), Bytes::from_static(b"x")).await.unwrap();
        archive.put_postmortem(1, Bytes::from_static(b"{}")).await.unwrap();
        store.put("logs/n1/README", Bytes::new()).await.unwrap();
        // Somebody cut it.
        store.put(&format!("logs/n1/{}", piece(1, 5, 9, 5).name()), Bytes::from_static(b"x")).await.unwrap();
        let listed = archive.list(&one).await.unwrap();
        assert_eq!(listed, Listed { pieces: vec![piece(1, 0, 3, 0), piece(1, 3, 5, 3)], ends: [(1, 5)].into() });
        assert_eq!(listed.end(), Some((1, 5, 5)));
        assert_eq!(archive.read(&one, &piece(1, 3, 5, 3)).await.unwrap(), "de");
        assert_eq!(archive.read(&one, &piece(1, 5, 9, 5)).await.unwrap_err().trouble, Trouble::Damaged);
        assert_eq!(archive.read(&one, &piece(9, 0, 9, 5)).await.unwrap_err().trouble, Trouble::NotFound);
        // Checkpoints beside them know nothing of it.
        let shelf = Shelf::new(store.clone());
        assert_eq!((shelf.steps().await, shelf.all().await), (Ok(vec![]), Ok(vec![])));
        shelf.prune(1, 9, &Lineage::default()).await.unwrap();
        assert_eq!(archive.list(&one).await, Ok(listed));
    }
}
