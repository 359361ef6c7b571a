//! The rules of a shelf, over a store in memory and over a folder.

use bytes::Bytes;
use object_store::memory::InMemory;

use super::door::Store;
use super::fault::Fault;
use super::lineage::Lineage;
use super::parts::Begun;
use super::send::{PART_BYTES, Sending, Source, Window};
use super::settings::Settings;
use super::shelf::{NotKept, Shelf, digest};
use super::trouble::Trouble;
use crate::manifest::{MANIFEST_FORMAT, Manifest, ManifestFile, hex_sha256};
use crate::time::Timestamp;

/// A file's bytes, from memory.
pub(super) struct Given(pub Vec<u8>);

impl Source for Given {
    fn next(&mut self, bytes: usize) -> Result<Vec<u8>, Fault> {
        let rest = self.0.split_off(bytes);
        Ok(std::mem::replace(&mut self.0, rest))
    }

    fn wait_for_turn(&mut self, _: usize) -> Result<(), Fault> {
        Ok(())
    }
}

/// Odd, and allowed.
pub(super) const NAME: &str = "ü {1} [a]~.safetensors";

/// A checkpoint of one file.
pub(super) fn checkpoint(attempt: u32, step: u64, content: &[u8]) -> (Manifest, Bytes) {
    let chunk_bytes = 1 << 20;
    let sha256 = if content.is_empty() { vec![hex_sha256(b"")] } else { content.chunks(chunk_bytes).map(hex_sha256).collect() };
    let file = ManifestFile { name: NAME.into(), bytes: content.len() as u64, chunk_bytes: chunk_bytes as u64, sha256 };
    let manifest = Manifest {
        format: MANIFEST_FORMAT,
        job_id: String::new(),
        attempt,
        generation: 0,
        step,
        epoch: 0,
        world_size: 1,
        global_batch: 1,
        samples: 0,
        seed: 7,
        data: Default::default(),
        model: None,
        created_at: Timestamp(1),
        files: vec![file],
        manifest_sha256: None,
    };
    let text = serde_json::to_vec(&manifest).expect("json").into();
    (manifest, text)
}

pub(super) async fn keep(shelf: &Shelf, attempt: u32, step: u64, content: &[u8]) -> Result<(), NotKept> {
    let (manifest, text) = checkpoint(attempt, step, content);
    let open = |_: &ManifestFile| Ok(Box::new(Given(content.to_vec())) as Box<dyn Source>);
    let how = Sending { open: &open, window: &Window::default(), begun: &Begun::default() };
    shelf.put_files(step, &digest(&text), &shelf.lacking(&manifest, &text).await?, &how).await?;
    shelf.commit(&manifest, &text).await
}

pub(super) fn lineage(starts: &[(u32, u64)]) -> Lineage {
    let mut lineage = Lineage::default();
    starts.iter().for_each(|(attempt, step)| lineage.begin(*attempt, *step));
    lineage
}

async fn shown(shelf: &Shelf) -> String {
    let all = shelf.all().await.expect("readable");
    let one = |kept: &super::shelf::Kept| format!("{}/a{}{}", kept.step, kept.attempt, if kept.not_used.is_some() { "!" } else { "" });
    all.iter().map(one).collect::<Vec<_>>().join(" ")
}

/// The same over both kinds.
async fn over_both<F: Future<Output = ()>>(rules: impl Fn(Shelf) -> F) {
    rules(Shelf::new(Store::in_memory(InMemory::new()).at("j"))).await;
    let dir = tempfile::tempdir().expect("a folder");
    let place = dir.path().to_str().expect("text").parse().expect("a place");
    rules(Shelf::new(Store::open(&place, &Settings::default()).expect("opens").at("j"))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_committed_is_found_whole_and_the_newest_first() {
    over_both(async |shelf: Shelf| {
        assert_eq!(shelf.newest(None).await.expect("an empty one").0.map(|found| found.manifest.step), None);
        shelf.begin(&lineage(&[(1, 0)])).await.expect("begins");
        let large = vec![3; PART_BYTES as usize * 2 + 5];
        for (step, content) in [(50, b"fifty".as_slice()), (100, large.as_slice()), (150, b"")] {
            keep(&shelf, 1, step, content).await.expect("kept");
            keep(&shelf, 1, step, content).await.expect("again is no fault");
            let found = shelf.read(step).await.expect("readable").expect("there");
            shelf.verify(&found).await.expect("whole");
        }
        assert_eq!(shown(&shelf).await, "150/a1 100/a1 50/a1");
        let newest = async |max| shelf.newest(max).await.expect("readable").0.expect("one").manifest.step;
        assert_eq!((newest(None).await, newest(Some(149)).await), (150, 100));
        assert_eq!(shelf.prune(2, 150, &lineage(&[])).await.expect("prunes"), [150, 100]);
        assert_eq!(shown(&shelf).await, "150/a1 100/a1");
        shelf.remove(100).await.expect("removes");
        assert_eq!(shown(&shelf).await, "150/a1");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_was_left_behind_commits_nothing() {
    over_both(async |shelf: Shelf| {
        shelf.begin(&lineage(&[(1, 0)])).await.expect("begins");
        keep(&shelf, 1, 50, b"a").await.expect("kept");
        shelf.begin(&lineage(&[(1, 0), (2, 50)])).await.expect("begins");
        let fenced = keep(&shelf, 1, 100, b"a").await.expect_err("fenced");
        assert!(matches!(&fenced, NotKept::Fenced { attempt: 1, step: 100, .. }), "{fenced}");
        assert!(fenced.to_string().contains("attempt 2 has begun before that step"), "{fenced}");
        keep(&shelf, 2, 100, b"b").await.expect("kept");
        // Before it was left behind it was in time, and it stays.
        assert_eq!(shown(&shelf).await, "100/a2 50/a1");
        // One that has the newer attempt's leave to be older is refused for what is there.
        let other = keep(&shelf, 2, 50, b"c").await;
        assert!(other.is_ok(), "the later attempt's counts: {other:?}");
        assert!(matches!(keep(&shelf, 1, 50, b"a").await, Err(NotKept::Fenced { .. })));
        // An older attempt that says it begins changes nothing.
        let known = shelf.begin(&lineage(&[(1, 0)])).await.expect("answers");
        assert_eq!(known, lineage(&[(1, 0), (2, 50)]));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_manifest_counts_for_nobody_and_makes_room() {
    over_both(async |shelf: Shelf| {
        keep(&shelf, 1, 50, b"a").await.expect("kept");
        // It had looked before the other began, and its put arrives after.
        keep(&shelf, 1, 100, b"late").await.expect("kept");
        keep(&shelf, 1, 150, b"late").await.expect("kept");
        shelf.begin(&lineage(&[(1, 0), (2, 50)])).await.expect("begins");
        assert_eq!(shown(&shelf).await, "150/a1! 100/a1! 50/a1");
        let (newest, passed) = shelf.newest(None).await.expect("readable");
        assert_eq!((newest.expect("one").manifest.step, passed.len()), (50, 2));
        keep(&shelf, 2, 100, b"mine").await.expect("it makes room");
        assert_eq!(shown(&shelf).await, "150/a1! 100/a2 50/a1");
        assert_eq!(shelf.prune(5, 100, &lineage(&[])).await.expect("prunes"), [100, 50]);
        assert_eq!(shown(&shelf).await, "100/a2 50/a1");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_attempts_that_race_for_a_step_exactly_one_wins() {
    for round in 0..60 {
        let shelf = Shelf::new(Store::in_memory(InMemory::new()).at("j"));
        keep(&shelf, 1, 50, b"before").await.expect("kept");
        let (one, two) = (shelf.clone(), shelf.clone());
        let old = tokio::spawn(async move { keep(&one, 1, 100, b"old").await });
        let new = tokio::spawn(async move {
            two.begin(&lineage(&[(1, 0), (2, 50)])).await?;
            keep(&two, 2, 100, b"new").await
        });
        let _ = old.await.expect("no panic");
        new.await.expect("no panic").expect("the newer one wins");
        let (newest, _) = shelf.newest(None).await.expect("readable");
        let newest = newest.expect("one");
        assert_eq!((newest.manifest.step, newest.manifest.attempt), (100, 2), "round {round}");
        shelf.verify(&newest).await.expect("whole");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_of_the_same_standing_the_first_stays() {
    for _ in 0..60 {
        let shelf = Shelf::new(Store::in_memory(InMemory::new()).at("j"));
        let both = [b"one".as_slice(), b"two"].map(|content| {
            let shelf = shelf.clone();
            tokio::spawn(async move { keep(&shelf, 1, 100, content).await })
        });
        let mut won = 0;
        for one in both {
            won += usize::from(one.await.expect("no panic").is_ok());
        }
        assert_eq!(won, 1);
        shelf.verify(&shelf.read(100).await.expect("readable").expect("there")).await.expect("whole");
    }
}

#[tokio::test]
async fn damage_is_seen_and_passed_over() {
    let store = Store::in_memory(InMemory::new()).at("j");
    let shelf = Shelf::new(store.clone());
    for step in [50, 100, 150, 200] {
        keep(&shelf, 1, step, format!("content of {step}").as_bytes()).await.expect("kept");
    }
    let file = |step| {
        let (_, text) = checkpoint(1, step, format!("content of {step}").as_bytes());
        format!("step-{step:012}/{}/{NAME}", digest(&text))
    };
    store.put(&file(200), Bytes::from("short")).await.expect("put");
    store.remove(&file(150)).await.expect("removed");
    store.put("step-000000000100/MANIFEST.json", Bytes::from("{\"format\":")).await.expect("put");
    let (newest, passed) = shelf.newest(None).await.expect("readable");
    assert_eq!(newest.expect("one").manifest.step, 50);
    let passed: Vec<_> = passed.iter().map(|(step, why)| format!("{step}: {why}")).collect();
    assert_eq!(passed.len(), 3, "{passed:?}");
    assert!(passed[0].contains("another length") && passed[2].contains("is not valid"), "{passed:?}");
    // The same length and other bytes: only reading tells.
    store.put(&file(50), Bytes::from("c0ntent of 50")).await.expect("put");
    let fault = shelf.verify(&shelf.read(50).await.expect("readable").expect("there")).await.expect_err("damaged");
    assert_eq!(fault.trouble, Trouble::Damaged);
    assert!(fault.why.contains("chunk 0 has another sha256"), "{fault}");
    // A build that can not read a manifest leaves it alone.
    keep(&shelf, 1, 250, b"newer").await.expect("kept");
    shelf.prune(1, 250, &lineage(&[])).await.expect("prunes");
    assert_eq!(shelf.steps().await.expect("lists"), [250, 100]);
    store.put("attempts/0000000009", Bytes::from("nonsense")).await.expect("put");
    assert_eq!(shelf.newest(None).await.expect_err("unsound").trouble, Trouble::Damaged);
}

#[test]
fn a_folder_that_is_not_there_is_not_made() {
    let dir = tempfile::tempdir().expect("a folder");
    let place = dir.path().join("not-mounted").to_str().expect("text").parse().expect("a place");
    let fault = Store::open(&place, &Settings::default()).expect_err("refused");
    assert_eq!(fault.trouble, Trouble::NoBucket);
    assert!(fault.why.contains("make it, or mount it"), "{fault}");
    assert!(!dir.path().join("not-mounted").exists());
}
