//! Feeds of a node, from a folder as the store.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use everlit_api::agent::GangSpec;
use everlit_api::data::{GangData, ListedShard};
use tokio::sync::mpsc;

use super::*;
use crate::agent::copies::tests::{Node, job, node};
use crate::agent::effects::Done;
use crate::agent::environment::tests::spec;
use crate::agent::start::Refused;
use crate::agent::uploads::{Pace, Uploads};

struct Scene {
    node: Node,
    store: tempfile::TempDir,
    feeds: Feeds,
    done: mpsc::Receiver<Done>,
    runtime: tokio::runtime::Runtime,
}

impl Scene {
    fn new(cache_bytes: u64) -> Self {
        let node = node();
        fs::create_dir_all(node.folders.job(job())).unwrap();
        let store = tempfile::tempdir().unwrap();
        for (name, content) in [("a.txt", "first"), ("b.txt", "second"), ("sub/c.txt", "third"), ("empty", "")] {
            let path = store.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let (to, done) = mpsc::channel(64);
        let feeds =
            Feeds::new(Cache::new(node.folders.shards(), cache_bytes), node.folders.clone(), Uploads::new(Pace::new(None)).lane(), to);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        Self { node, store, feeds, done, runtime }
    }

    fn spec(&self, shards: Option<Vec<ListedShard>>, stream: bool, fallback: Option<&Path>) -> GangSpec {
        let mut spec = spec(2);
        spec.job = job();
        let sources = vec![format!("file://{}/", self.store.path().display()).parse().unwrap()];
        let fallback = fallback.map(|path| path.display().to_string());
        spec.data = Some(GangData { sources, shards, stream, fallback, to: None });
        spec
    }

    /// What the task says first.
    fn said(&mut self) -> Done {
        self.done.blocking_recv().unwrap()
    }

    fn listing(&mut self) -> Vec<ListedShard> {
        let order = self.spec(None, true, None);
        self.feeds.order(&order);
        match self.said() {
            Done::DataListed(listed) => listed.shards,
            other => panic!("{other:?}"),
        }
    }

    fn ready(&self, spec: &GangSpec) -> Result<usize, Refused> {
        let ready = self.feeds.ready(spec.job, spec.attempt).expect("it has data in a store");
        self.runtime.block_on(ready).map(|shards| shards.len())
    }

    fn have(&self, name: &str) -> PathBuf {
        self.node.folders.data(job()).join(HAVE_NAME).join(name)
    }

    fn ask(&self, line: &str) {
        let want = self.node.folders.data(job()).join(WANT_NAME);
        fs::OpenOptions::new().write(true).open(want).unwrap().write_all(line.as_bytes()).unwrap();
    }
}

/// Waits until a file is there; the test's own time limit ends it else.
fn read_when_there(path: &Path) -> String {
    loop {
        match fs::read_to_string(path) {
            Ok(text) => return text,
            Err(_) => std::thread::yield_now(),
        }
    }
}

#[test]
fn the_first_node_lists_and_all_wait_for_the_order_with_the_listing() {
    let mut scene = Scene::new(1000);
    let listed = scene.listing();
    let told: Vec<_> = listed.iter().map(|shard| (shard.name.as_str(), shard.bytes, shard.etag.is_some())).collect();
    assert_eq!(told, [("a.txt", 5, true), ("b.txt", 6, true), ("sub/c.txt", 5, true)], "in the order of names, without what is empty");
    // Not heard: said again.
    let order = scene.spec(None, true, None);
    scene.feeds.order(&order);
    assert!(matches!(scene.said(), Done::DataListed(again) if again.shards == listed));
    let order = scene.spec(Some(listed), true, None);
    scene.feeds.order(&order);
    assert_eq!(scene.ready(&order), Ok(3));
    assert!(fs::read_dir(scene.node.folders.shards()).is_err(), "nobody has asked for a shard");
}

#[test]
fn a_program_that_does_not_ask_has_its_shards_before_it_starts() {
    let mut scene = Scene::new(1000);
    let listed = scene.listing();
    let mut order = scene.spec(Some(listed), false, None);
    (order.attempt, order.first_rank, order.count) = (2, 1, 1);
    scene.feeds.order(&order);
    assert_eq!(scene.ready(&order), Ok(3));
    assert_eq!(fs::read_to_string(scene.have("000001-b.txt")).unwrap(), "second");
    assert!(!scene.have("000000-a.txt").exists(), "of another node's rank");
    assert!(!fs::symlink_metadata(scene.have("000001-b.txt")).unwrap().is_symlink(), "it stays whatever becomes of the cache");
}

#[test]
fn what_ranks_ask_for_comes_and_comes_again_when_the_cache_let_go_of_it() {
    let mut scene = Scene::new(11);
    let listed = scene.listing();
    let order = scene.spec(Some(listed), true, None);
    scene.feeds.order(&order);
    scene.ready(&order).unwrap();
    scene.ask("nonsense\n999999-x\n000000-b.txt\n!000001-b.txt\n");
    assert_eq!(read_when_there(&scene.have("000001-b.txt")), "second");
    assert!(matches!(scene.said(), Done::DataAwaited { waiting: true, .. }));
    assert!(matches!(scene.said(), Done::DataAwaited { waiting: false, .. }));
    scene.ask("000000-a.txt\n");
    assert_eq!(read_when_there(&scene.have("000000-a.txt")), "first");
    scene.ask("000002-c.txt\n");
    assert_eq!(read_when_there(&scene.have("000002-c.txt")), "third");
    assert!(!scene.have("000001-b.txt").exists(), "a link to what had to go");
    scene.ask("!000001-b.txt\n");
    assert_eq!(read_when_there(&scene.have("000001-b.txt")), "second");
}

#[test]
fn another_object_under_the_same_name_is_never_taken() {
    let mut scene = Scene::new(1000);
    let listed = scene.listing();
    let order = scene.spec(Some(listed), true, None);
    scene.feeds.order(&order);
    scene.ready(&order).unwrap();
    fs::write(scene.store.path().join("b.txt"), "SECOND").unwrap();
    fs::remove_file(scene.store.path().join("a.txt")).unwrap();
    scene.ask("000001-b.txt\n000000-a.txt\n");
    for name in ["000001-b.txt", "000000-a.txt"] {
        let why = read_when_there(&scene.have(&format!("{name}.error")));
        assert!(why.contains("changed since the job began") && !scene.have(name).exists(), "{why}");
    }
    // The next attempt tries again.
    let order = GangSpec { attempt: 3, ..order };
    fs::write(scene.store.path().join("a.txt"), "first").unwrap();
    scene.feeds.order(&order);
    scene.ready(&order).unwrap();
    assert!(!scene.have("000001-b.txt.error").exists());
}

#[test]
fn a_local_copy_of_the_same_length_stands_in() {
    let mut scene = Scene::new(1000);
    let listed = scene.listing();
    let copy = tempfile::tempdir().unwrap();
    fs::create_dir(copy.path().join("sub")).unwrap();
    fs::write(copy.path().join("sub/c.txt"), "third").unwrap();
    fs::write(copy.path().join("b.txt"), "of another length").unwrap();
    let order = scene.spec(Some(listed), true, Some(copy.path()));
    scene.feeds.order(&order);
    scene.ready(&order).unwrap();
    fs::remove_dir_all(scene.store.path()).unwrap();
    scene.ask("000002-c.txt\n");
    assert_eq!(read_when_there(&scene.have("000002-c.txt")), "third");
    assert!(matches!(scene.said(), Done::StoreFault(_)));
    assert!(matches!(scene.said(), Done::DataTurned(turn) if turn.local));
    scene.ask("000001-b.txt\n");
    let why = read_when_there(&scene.have("000001-b.txt.error"));
    assert!(why.contains("mount it"), "{why}");
}

#[test]
fn what_can_not_be_listed_is_told_with_the_reason() {
    let mut scene = Scene::new(1000);
    let mut order = scene.spec(None, true, None);
    order.data.as_mut().unwrap().sources = vec![format!("file://{}/*.parquet", scene.store.path().display()).parse().unwrap()];
    scene.feeds.order(&order);
    let refused = scene.ready(&order).unwrap_err();
    assert!(refused.permanent && refused.reason.contains("there is nothing to read"), "{refused:?}");
    assert!(matches!(scene.said(), Done::StoreFault(_)));
}

#[test]
fn a_job_that_is_over_leaves_nothing_but_the_cache() {
    let mut scene = Scene::new(1000);
    let listed = scene.listing();
    let order = scene.spec(Some(listed), false, None);
    scene.feeds.order(&order);
    scene.ready(&order).unwrap();
    let folder = scene.node.folders.data(job());
    assert!(folder.exists());
    scene.runtime.block_on(async { scene.feeds.drop_job(job()) });
    // Work on other threads ends with the runtime.
    drop(scene.runtime);
    assert!(!folder.exists());
    assert_eq!(fs::read_dir(scene.node.folders.shards()).unwrap().count(), 3);
}
