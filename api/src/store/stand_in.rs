//! A store in memory that fails as it is told: parts that do not come through once, and listings that are older than what is there.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartId, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result,
};

use super::door::Store;
use super::parts::Begun;
use super::send::{PART_BYTES, Sending, Source, Window};
use super::shelf::{NotKept, Shelf, digest};
use super::tests::{Given, NAME, checkpoint, keep, lineage};
use super::trouble::Trouble;
use crate::manifest::ManifestFile;

#[derive(Debug, Clone, Default)]
struct StandIn(Arc<Told>);

#[derive(Debug, Default)]
struct Told {
    inner: InMemory,
    /// The part that fails, once.
    fails: Mutex<Option<usize>>,
    /// The parts that came through.
    parts: Mutex<Vec<usize>>,
    aborted: AtomicUsize,
    /// What no listing names yet, by a piece of its name.
    hidden: Mutex<Vec<&'static str>>,
    /// What each listing still names though it is gone.
    ghosts: Mutex<Vec<ObjectMeta>>,
    /// Listings that were not what is there.
    lied: AtomicUsize,
}

impl StandIn {
    fn shelf(&self) -> Shelf {
        Shelf::new(Store::in_memory(self.clone()).at("j"))
    }

    fn hide(&self, pieces: &[&'static str]) {
        *self.0.hidden.lock().expect("no panic") = pieces.to_vec();
    }

    /// From now on listings name what is there now, whatever goes.
    async fn haunt(&self) {
        let all: Vec<_> = self.0.inner.list(None).map(|found| found.expect("lists")).collect().await;
        *self.0.ghosts.lock().expect("no panic") = all;
    }
}

impl fmt::Display for StandIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a stand-in")
    }
}

#[async_trait]
impl ObjectStore for StandIn {
    async fn put_opts(&self, to: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.0.inner.put_opts(to, payload, opts).await
    }

    async fn put_multipart_opts(&self, to: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.0.inner.put_multipart_opts(to, opts).await
    }

    async fn get_opts(&self, from: &Path, opts: GetOptions) -> Result<GetResult> {
        self.0.inner.get_opts(from, opts).await
    }

    fn delete_stream(&self, all: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.0.inner.delete_stream(all)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let told = self.0.clone();
        let prefix = prefix.cloned().unwrap_or_default();
        let there = self.0.inner.list(Some(&prefix));
        let listed = async move {
            let mut all: Vec<ObjectMeta> = there.map(|found| found.expect("lists")).collect().await;
            let before = all.len();
            let hidden = told.hidden.lock().expect("no panic").clone();
            all.retain(|found| !hidden.iter().any(|piece| found.location.as_ref().contains(piece)));
            let known: BTreeSet<Path> = all.iter().map(|found| found.location.clone()).collect();
            let hidden = before - all.len();
            let gone = told.ghosts.lock().expect("no panic").clone();
            let gone: Vec<_> =
                gone.into_iter().filter(|own| own.location.prefix_matches(&prefix) && !known.contains(&own.location)).collect();
            told.lied.fetch_add(usize::from(hidden + gone.len() > 0), Ordering::Relaxed);
            all.extend(gone);
            futures_util::stream::iter(all.into_iter().map(Ok))
        };
        futures_util::stream::once(listed).flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.0.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, opts: CopyOptions) -> Result<()> {
        self.0.inner.copy_opts(from, to, opts).await
    }
}

#[async_trait]
impl MultipartStore for StandIn {
    async fn create_multipart(&self, to: &Path) -> Result<MultipartId> {
        self.0.inner.create_multipart(to).await
    }

    async fn put_part(&self, to: &Path, id: &MultipartId, index: usize, data: PutPayload) -> Result<PartId> {
        if self.0.fails.lock().expect("no panic").take_if(|own| *own == index).is_some() {
            return Err(Error::Generic { store: "stand-in", source: "connection reset by peer".into() });
        }
        let part = self.0.inner.put_part(to, id, index, data).await?;
        self.0.parts.lock().expect("no panic").push(index);
        Ok(part)
    }

    async fn complete_multipart(&self, to: &Path, id: &MultipartId, parts: Vec<PartId>) -> Result<PutResult> {
        self.0.inner.complete_multipart(to, id, parts).await
    }

    async fn abort_multipart(&self, to: &Path, id: &MultipartId) -> Result<()> {
        self.0.aborted.fetch_add(1, Ordering::Relaxed);
        self.0.inner.abort_multipart(to, id).await
    }
}

/// One try with what earlier ones have left.
async fn try_again(shelf: &Shelf, content: &[u8], begun: &Begun) -> Result<(), NotKept> {
    let (manifest, text) = checkpoint(1, 50, content);
    let open = |_: &ManifestFile| Ok(Box::new(Given(content.to_vec())) as Box<dyn Source>);
    let how = Sending { open: &open, window: &Window::default(), begun };
    shelf.put_files(50, &digest(&text), &shelf.lacking(&manifest, &text).await?, &how).await?;
    shelf.commit(&manifest, &text).await
}

// One thread: what is under way when a part fails is not a matter of chance.
#[tokio::test]
async fn parts_that_came_through_before_a_fault_are_not_sent_again() {
    let (store, begun) = (StandIn::default(), Begun::default());
    let content: Vec<u8> = (0..PART_BYTES * 20 + 5).map(|at| (at >> 16) as u8).collect();
    *store.0.fails.lock().expect("no panic") = Some(15);
    let error = try_again(&store.shelf(), &content, &begun).await.expect_err("a part fails");
    assert!(matches!(&error, NotKept::Fault(fault) if fault.trouble == Trouble::Unreachable), "{error}");
    assert!(store.0.fails.lock().expect("no panic").is_none(), "the fault has fired");
    let came = store.0.parts.lock().expect("no panic").len();
    assert!(came >= 8, "{came} parts came before it");
    try_again(&store.shelf(), &content, &begun).await.expect("the next try brings the rest");
    let mut parts = store.0.parts.lock().expect("no panic").clone();
    parts.sort_unstable();
    assert_eq!(parts, (0..21).collect::<Vec<_>>(), "each came through once");
    let found = store.shelf().read(50).await.expect("readable").expect("there");
    store.shelf().verify(&found).await.expect("whole");
    begun.abandon().await;
    assert_eq!(store.0.aborted.load(Ordering::Relaxed), 0, "nothing is left of it");
}

#[tokio::test]
async fn a_part_that_is_another_than_it_was_is_sent_again_and_what_is_given_up_is_taken_back() {
    let (store, begun) = (StandIn::default(), Begun::default());
    let mut content = vec![7; PART_BYTES as usize * 12];
    for expected in [1, 2] {
        *store.0.fails.lock().expect("no panic") = Some(11);
        let (manifest, text) = checkpoint(1, 50, &vec![7; PART_BYTES as usize * 12]);
        let open = |_: &ManifestFile| Ok(Box::new(Given(content.clone())) as Box<dyn Source>);
        let how = Sending { open: &open, window: &Window::default(), begun: &begun };
        let files: Vec<&ManifestFile> = manifest.files.iter().collect();
        let failed = store.shelf().put_files(50, &digest(&text), &files, &how).await;
        assert!(failed.is_err() && store.0.fails.lock().expect("no panic").is_none());
        let first = store.0.parts.lock().expect("no panic").iter().filter(|index| **index == 0).count();
        assert_eq!(first, expected);
        content[0] ^= 1;
    }
    begun.abandon().await;
    assert_eq!(store.0.aborted.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_listing_that_lacks_what_was_just_put_costs_no_checkpoint() {
    let store = StandIn::default();
    let shelf = store.shelf();
    let first = lineage(&[(1, 0)]);
    shelf.begin(&first).await.expect("begins");
    for step in [50, 100, 150] {
        keep(&shelf, 1, step, b"content").await.expect("kept");
    }
    // Its files are not listed yet: it is the newest all the same, and stays.
    store.hide(&["step-000000000150/"]);
    assert_eq!(shelf.prune(1, 150, &first).await.expect("prunes"), [150]);
    store.hide(&[NAME]);
    assert_eq!(shelf.newest(None).await.expect("readable").0.expect("one").manifest.step, 150);
    store.hide(&[]);
    assert_eq!(shelf.steps().await.expect("lists"), [150]);
    // Where its manifest is not listed yet, the one before it is taken.
    keep(&shelf, 1, 200, b"content").await.expect("kept");
    store.hide(&["step-000000000200/"]);
    let newest = shelf.newest(None).await.expect("readable").0.expect("one");
    assert_eq!(newest.manifest.step, 150);
    shelf.verify(&newest).await.expect("whole");
    keep(&shelf, 1, 200, b"content").await.expect("put again, it is what it was");
    assert!(store.0.lied.load(Ordering::Relaxed) >= 4);
}

#[tokio::test]
async fn a_listing_that_lacks_the_newest_attempt_removes_nothing_of_it() {
    let store = StandIn::default();
    let shelf = store.shelf();
    shelf.begin(&lineage(&[(1, 0)])).await.expect("begins");
    for step in [100, 150, 200] {
        keep(&shelf, 1, step, b"content").await.expect("kept");
    }
    store.hide(&["attempts/0000000002"]);
    let counts = shelf.begin(&lineage(&[(1, 0), (2, 100)])).await.expect("begins");
    assert_eq!(counts.newest(), Some(2), "what it said itself it knows");
    keep(&shelf, 2, 120, b"mine").await.expect("kept");
    assert_eq!(shelf.prune(2, 120, &counts).await.expect("prunes"), [120, 100]);
    assert!(store.0.lied.load(Ordering::Relaxed) > 0);
    store.hide(&[]);
    assert_eq!(shelf.newest(None).await.expect("readable").0.expect("one").manifest.step, 120);
    assert_eq!(shelf.steps().await.expect("lists"), [120, 100]);
}

#[tokio::test]
async fn a_listing_that_names_what_is_gone_leads_to_no_checkpoint_without_its_files() {
    let store = StandIn::default();
    let shelf = store.shelf();
    for step in [50, 100] {
        keep(&shelf, 1, step, b"content").await.expect("kept");
    }
    store.haunt().await;
    shelf.remove(100).await.expect("removes");
    assert_eq!(shelf.newest(None).await.expect("readable").0.expect("one").manifest.step, 50);
    // What is put again is put whole, though the listing has it already.
    keep(&shelf, 1, 100, b"content").await.expect("kept");
    let found = shelf.read(100).await.expect("readable").expect("there");
    shelf.verify(&found).await.expect("whole");
    shelf.remove(50).await.expect("removes");
    assert_eq!(shelf.prune(1, 100, &lineage(&[])).await.expect("prunes"), [100]);
    assert!(store.0.lied.load(Ordering::Relaxed) > 0);
    shelf.verify(&found).await.expect("and stays so");
}

#[test]
fn a_body_is_signed_where_no_tls_protects_it() {
    let of = |endpoint: Option<&str>| {
        let env = endpoint.map(|url| ("AWS_ENDPOINT_URL".to_string(), url.to_string()));
        let keys = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")].map(|(name, value)| (name.to_string(), value.to_string()));
        let settings = super::settings::Settings::default().with_job(&keys.into_iter().chain(env).collect());
        let store = Store::open(&"s3://runs".parse().expect("a place"), &settings).expect("opens");
        format!("{store:?}").contains("sign_payload: true")
    };
    assert!(of(Some("http://127.0.0.1:1")) && !of(Some("https://127.0.0.1:1")) && !of(None));
}

#[tokio::test]
async fn what_is_there_says_its_length() {
    let store = Store::in_memory(InMemory::new());
    store.put("a", Bytes::from("four")).await.expect("put");
    assert_eq!((store.size("a").await.expect("looks"), store.size("b").await.expect("looks")), (Some(4), None));
}
