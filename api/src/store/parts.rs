//! Objects that come in parts, and what is remembered of those that broke off, so that no part is sent twice.
//!
//! A bucket keeps the parts of an unfinished object under an id: who tries again tells it and sends what is lacking. A part counts as sent only
//! as long as its bytes are the same as then. The trap: parts of what nobody goes on with cost money until they are taken back, so whoever
//! gives up says so; what can not be taken back is left to the bucket's own rules for unfinished uploads. A folder begins anew.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{MultipartId, MultipartUpload, PutPayload};

use super::door::Store;
use super::fault::Fault;
use super::trouble::Trouble;

/// A store that remembers parts.
#[derive(Clone)]
pub(super) struct ByParts(pub Arc<dyn MultipartStore>);

impl fmt::Debug for ByParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ByParts")
    }
}

/// Objects that were begun and are not done, for the next try. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Begun(Arc<Mutex<BTreeMap<Path, Unfinished>>>);

#[derive(Debug)]
struct Unfinished {
    at: ByParts,
    id: MultipartId,
    /// What is there: a sum of its bytes, and the store's word for it.
    parts: BTreeMap<usize, (u32, PartId)>,
}

impl Begun {
    fn open(&self) -> MutexGuard<'_, BTreeMap<Path, Unfinished>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody goes on with them: takes back what can be.
    pub async fn abandon(&self) {
        let all = std::mem::take(&mut *self.open());
        for (key, unfinished) in all {
            let _ = unfinished.at.0.abort_multipart(&key, &unfinished.id).await;
        }
    }

    async fn abandon_one(&self, key: &Path) {
        let own = self.open().remove(key);
        if let Some(unfinished) = own {
            let _ = unfinished.at.0.abort_multipart(key, &unfinished.id).await;
        }
    }
}

/// An object that comes in parts; it is there once its `complete` says so.
#[derive(Debug)]
pub(super) struct Parts {
    way: Way,
    store: Store,
    name: String,
    next: usize,
}

#[derive(Debug)]
enum Way {
    Kept { at: ByParts, key: Path, id: MultipartId, begun: Begun },
    Once(Box<dyn MultipartUpload>),
}

impl Parts {
    /// Begins one, or goes on with what `begun` knows of it.
    pub(super) async fn begin(store: &Store, name: &str, begun: &Begun) -> Result<Self, Fault> {
        let (key, failed) = (store.key(name), |error| store.fault("put", name, &error));
        let way = match store.by_parts() {
            None => Way::Once(store.put_multipart(&key).await.map_err(failed)?),
            Some(at) => {
                let known = begun.open().get(&key).map(|own| own.id.clone());
                let id = match known {
                    Some(id) => id,
                    None => {
                        let id = at.0.create_multipart(&key).await.map_err(failed)?;
                        begun.open().insert(key.clone(), Unfinished { at: at.clone(), id: id.clone(), parts: BTreeMap::new() });
                        id
                    }
                };
                Way::Kept { at: at.clone(), key, id, begun: begun.clone() }
            }
        };
        Ok(Self { way, store: store.clone(), name: name.into(), next: 0 })
    }

    /// Sends the next part; all but the last have the same length. Parts may be under way at the same time. `None`: it is there.
    pub(super) fn put(&mut self, bytes: Bytes) -> Option<BoxFuture<'static, Result<(), Fault>>> {
        let (store, name, index) = (self.store.clone(), self.name.clone(), self.next);
        self.next += 1;
        let failed = move |error| store.fault("put a part of", &name, &error);
        match &mut self.way {
            Way::Once(upload) => {
                let part = upload.put_part(PutPayload::from(bytes));
                Some(Box::pin(async move { part.await.map_err(failed) }))
            }
            Way::Kept { at, key, id, begun } => {
                let sum = crc32fast::hash(&bytes);
                if begun.open().get(key).and_then(|own| own.parts.get(&index)).is_some_and(|(sent, _)| *sent == sum) {
                    return None;
                }
                let (at, key, id, begun) = (at.clone(), key.clone(), id.clone(), begun.clone());
                Some(Box::pin(async move {
                    let part = at.0.put_part(&key, &id, index, PutPayload::from(bytes)).await.map_err(failed)?;
                    if let Some(own) = begun.open().get_mut(&key).filter(|own| own.id == id) {
                        own.parts.insert(index, (sum, part));
                    }
                    Ok(())
                }))
            }
        }
    }

    /// All parts are there: it becomes an object.
    pub(super) async fn complete(self) -> Result<(), Fault> {
        let failed = |error| self.store.fault("complete", &self.name, &error);
        match self.way {
            Way::Once(mut upload) => upload.complete().await.map(drop).map_err(failed),
            Way::Kept { at, key, id, begun } => {
                let parts = begun.open().get(&key).map(|own| own.parts.values().map(|(_, part)| part.clone()).collect::<Vec<_>>());
                let done = at.0.complete_multipart(&key, &id, parts.unwrap_or_default()).await.map_err(failed);
                match &done {
                    Ok(_) => {
                        begun.open().remove(&key);
                    }
                    // With these parts it will never be one.
                    Err(fault) if fault.trouble == Trouble::Other || is_over(fault) => begun.abandon_one(&key).await,
                    Err(_) => {}
                }
                done.map(drop)
            }
        }
    }

    /// It broke off: what came is kept for the next try, where that can be.
    pub(super) async fn broke(self, fault: &Fault) {
        match self.way {
            Way::Once(mut upload) => drop(upload.abort().await),
            Way::Kept { key, begun, .. } if is_over(fault) => begun.abandon_one(&key).await,
            Way::Kept { .. } => {}
        }
    }
}

/// The store knows nothing of it any more, or it is not what it was.
fn is_over(fault: &Fault) -> bool {
    matches!(fault.trouble, Trouble::NotFound | Trouble::NoBucket | Trouble::Damaged | Trouble::Conflict | Trouble::Settings)
}
