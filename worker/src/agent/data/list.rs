//! What a job's data is: its sources listed in their order, names in theirs.

use everlit_api::data::{LISTING_BYTES_MAX, ListedShard, SHARDS_MAX, ShardSource};
use everlit_api::store::{Fault, Settings, Store, Trouble};

/// Lists all sources. Objects without a byte are left out: tools make such for folders.
pub(super) async fn list(sources: &[ShardSource], settings: &Settings) -> Result<Vec<ListedShard>, Fault> {
    let mut shards = Vec::new();
    let mut text = 0;
    for (number, source) in sources.iter().enumerate() {
        let store = Store::open(&source.base(), settings)?;
        let before = shards.len();
        let found = match source.object() {
            Some(name) => vec![store.head(name).await?],
            None => store.list_all("").await?,
        };
        for about in found.into_iter().filter(|about| about.bytes > 0 && source.takes(&about.name)) {
            text += about.name.len() + about.etag.as_ref().map_or(0, String::len);
            shards.push(ListedShard { source: number as u32, name: about.name, bytes: about.bytes, etag: about.etag });
            if shards.len() > SHARDS_MAX || text > LISTING_BYTES_MAX {
                let why =
                    format!("a job has at most {SHARDS_MAX} shards, with {LISTING_BYTES_MAX} bytes of names: make fewer and larger ones");
                return Err(fault(Trouble::Settings, source, &why));
            }
        }
        if shards.len() == before {
            return Err(fault(Trouble::NotFound, source, "there is nothing to read"));
        }
    }
    Ok(shards)
}

fn fault(trouble: Trouble, source: &ShardSource, why: &str) -> Fault {
    Fault { trouble, asked: format!("list {source}"), why: why.into() }
}
