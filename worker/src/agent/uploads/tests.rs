//! Uploads into a folder: what comes there and back, what is given up and what is tried again.

use everlit_api::store::{Lineage, Place};

use super::*;
use crate::agent::copies::tests::{Node, job, node};
use crate::agent::fetch_stored::{self, NotFetched, Wanted};
use crate::agent::limits::COPY_SPARE_BYTES;

/// A node that uploads into a folder.
struct Scene {
    uploads: Uploads,
    node: Node,
    shared: tempfile::TempDir,
    to: mpsc::Sender<Done>,
    done: mpsc::Receiver<Done>,
}

impl Scene {
    fn new() -> Self {
        let (to, done) = mpsc::channel(8);
        Self { uploads: Uploads::new(Pace::new(None)), node: node(), shared: tempfile::tempdir().unwrap(), to, done }
    }

    fn place(&self) -> Place {
        self.shared.path().join(job().to_string()).to_str().unwrap().parse().unwrap()
    }

    fn shelf(&self) -> PathBuf {
        self.shared.path().join(job().to_string())
    }

    fn order(&mut self, step: u64, attempt: u32, from: u64) -> Done {
        let mut lineage = Lineage::default();
        lineage.begin(attempt, from);
        let order = UploadOrder { job: job(), step, to: self.place(), env: BTreeMap::new(), lineage, keep: 2 };
        self.uploads.order(order, &self.node.folders, &self.to);
        self.done.blocking_recv().unwrap()
    }

    fn fetch(&self, into: &Node, above: Option<u64>) -> Result<Option<u64>, NotFetched> {
        let (place, env) = (self.place(), BTreeMap::new());
        let wanted = Wanted { place: &place, env: &env, max: None, above, attempt: 9 };
        fetch_stored::fetch(&into.checkpoints(), wanted, &|| true)
    }

    fn files(&self, step: u64) -> Vec<PathBuf> {
        let folder = self.shelf().join(checkpoint::step_folder(step));
        let inner = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).find(|path| path.is_dir()).unwrap();
        let mut files: Vec<PathBuf> = fs::read_dir(inner).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }
}

fn kept(done: Done) -> Vec<u64> {
    match done {
        Done::Uploaded(done) => done.kept,
        other => panic!("{other:?}"),
    }
}

fn fault(done: Done) -> StoreFault {
    match done {
        Done::StoreFault(fault) => fault,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_uploaded_comes_back_byte_for_byte_on_a_node_without_anything() {
    let mut scene = Scene::new();
    let path = scene.node.commit(50, 1);
    assert_eq!(kept(scene.order(50, 1, 0)), [50]);
    assert!(!scene.node.folders.uploads(job()).exists(), "nothing is held any more");
    let other = node();
    assert_eq!(scene.fetch(&other, None).unwrap(), Some(50));
    let fetched = other.checkpoints().join(checkpoint::step_folder(50));
    assert_eq!(fs::read(path.join("large ü")).unwrap(), fs::read(fetched.join("large ü")).unwrap());
    assert_eq!(checkpoint::verify(&path).unwrap(), checkpoint::verify(&fetched).unwrap());
    assert_eq!(scene.fetch(&other, Some(50)).unwrap(), None, "nothing newer is there");
    scene.node.commit(60, 1);
    scene.node.commit(70, 1);
    assert_eq!(kept(scene.order(60, 1, 0)), [60, 50]);
    assert_eq!(kept(scene.order(70, 1, 0)), [70, 60], "and what is beyond `keep` goes");
}

#[test]
fn what_has_rotted_here_is_not_spread() {
    let mut scene = Scene::new();
    let path = scene.node.commit(50, 1).join("large ü");
    let mut content = fs::read(&path).unwrap();
    content[5_000] ^= 1;
    fs::write(&path, content).unwrap();
    let told = fault(scene.order(50, 1, 0));
    assert_eq!(told.trouble, Trouble::Damaged);
    assert!(told.reason.contains("chunk 0 has another sha256 than committed"), "{}", told.reason);
    assert!(!scene.shelf().join(checkpoint::step_folder(50)).join(checkpoint::MANIFEST_NAME).exists());
    // The next one is not held up by it.
    scene.node.commit(60, 1);
    assert_eq!(kept(scene.order(60, 1, 0)), [60]);
}

#[test]
fn one_that_was_removed_here_while_it_waits_is_uploaded_all_the_same_and_one_that_never_was_is_told() {
    let mut scene = Scene::new();
    let path = scene.node.commit(50, 1);
    let orders =
        watch::channel(UploadOrder { job: job(), step: 50, to: scene.place(), env: BTreeMap::new(), lineage: Lineage::default(), keep: 1 });
    let tended = Tended {
        job: job(),
        orders: orders.1,
        folders: scene.node.folders.clone(),
        lane: Uploads::new(Pace::new(None)).lane(),
        begun: Begun::default(),
        busy: Arc::default(),
        done: scene.to.clone(),
    };
    let held = tended.hold(50).unwrap();
    fs::remove_dir_all(&path).unwrap();
    assert!(checkpoint::verify(&held).is_ok());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let order = tended.orders.borrow().clone();
    let done = runtime.block_on(async { tokio::spawn(async move { tended.upload(&order).await }).await });
    assert_eq!(done.unwrap().unwrap().step, 50);
    assert_eq!(fault(scene.order(90, 1, 0)).trouble, Trouble::Damaged);
}

#[test]
fn an_attempt_that_was_left_behind_is_told_so_and_leaves_nothing() {
    let mut scene = Scene::new();
    scene.node.commit(50, 1);
    assert_eq!(kept(scene.order(50, 1, 0)), [50]);
    let mut other = Scene { shared: scene.shared, ..Scene::new() };
    other.node.commit(60, 2);
    assert_eq!(kept(other.order(60, 2, 50)), [60, 50]);
    scene.shared = other.shared;
    scene.node.commit(70, 1);
    let told = fault(scene.order(70, 1, 0));
    assert_eq!(told.trouble, Trouble::Conflict);
    assert!(told.reason.contains("attempt 2 has begun before that step"), "{}", told.reason);
    assert!(!scene.shelf().join(checkpoint::step_folder(70)).exists());
}

#[test]
fn a_damaged_one_in_the_store_is_passed_over_and_a_transfer_that_broke_off_goes_on() {
    let mut scene = Scene::new();
    scene.node.commit(50, 1);
    scene.node.commit(60, 1);
    assert_eq!(kept(scene.order(50, 1, 0)), [50]);
    assert_eq!(kept(scene.order(60, 1, 0)), [60, 50]);
    let large = scene.files(60).pop().unwrap();
    let mut content = fs::read(&large).unwrap();
    content[7] ^= 1;
    fs::write(&large, &content).unwrap();
    let other = node();
    assert_eq!(scene.fetch(&other, None).unwrap(), Some(50));
    // It is right again: what had come of it is not fetched twice.
    content[7] ^= 1;
    fs::write(&large, &content).unwrap();
    let small = scene.files(60).remove(0);
    let third = node();
    let draft = third.checkpoints().join(checkpoint::draft_folder(60, 9, u32::MAX));
    fs::create_dir_all(&draft).unwrap();
    fs::copy(scene.shelf().join(checkpoint::step_folder(60)).join(checkpoint::MANIFEST_NAME), draft.join(checkpoint::MANIFEST_NAME))
        .unwrap();
    fs::copy(&small, draft.join(small.file_name().unwrap())).unwrap();
    let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    let before = inode(&draft.join(small.file_name().unwrap()));
    assert_eq!(scene.fetch(&third, None).unwrap(), Some(60));
    let place = third.checkpoints().join(checkpoint::step_folder(60));
    assert_eq!(inode(&place.join(small.file_name().unwrap())), before);
    assert!(checkpoint::verify(&place).is_ok());
}

#[test]
fn all_uploads_together_keep_to_the_pace() {
    let pace = Pace::new(Some(1_000_000));
    let begun = Instant::now();
    let turns: Vec<Duration> = (0..4).map(|_| pace.turn(500_000).saturating_duration_since(begun)).collect();
    for (index, turn) in turns.iter().enumerate() {
        assert!(*turn >= Duration::from_millis(500 * index as u64), "{turns:?}");
    }
    assert!(Pace::new(None).turn(usize::MAX) <= Instant::now());
}

#[test]
fn what_this_disk_can_not_give_now_is_asked_for_again_and_what_is_not_there_is_given_up() {
    let unreadable = |kind: io::ErrorKind| Damage::Unreadable { file: "large".into(), source: kind.into() };
    let of = |damage: Damage| damaged(Path::new("/x"), &damage).trouble;
    assert_eq!(of(unreadable(io::ErrorKind::Other)), Trouble::Other);
    assert_eq!(of(unreadable(io::ErrorKind::NotFound)), Trouble::Damaged);
    assert_eq!(of(Damage::Missing("large".into())), Trouble::Damaged);
    assert!(is_tried_again(Trouble::Other) && is_tried_again(Trouble::NotFound) && !is_tried_again(Trouble::Damaged));
    // A folder can be opened and not be read.
    let folder = tempfile::tempdir().unwrap();
    let about = ManifestFile { name: "large".into(), bytes: 5, chunk_bytes: 5, sha256: vec![String::new()] };
    let fault = CheckedFile::new(fs::File::open(folder.path()).unwrap(), folder.path(), &about).read(5).unwrap_err();
    assert_eq!(fault.trouble, Trouble::Other, "{fault}");
    fs::write(folder.path().join("short"), "abc").unwrap();
    let short = fs::File::open(folder.path().join("short")).unwrap();
    assert_eq!(CheckedFile::new(short, folder.path(), &about).read(5).unwrap_err().trouble, Trouble::Damaged);
}

#[test]
fn nothing_is_fetched_where_it_has_no_room() {
    let mut scene = Scene::new();
    scene.node.commit(50, 1);
    assert_eq!(kept(scene.order(50, 1, 0)), [50]);
    let (other, place, env) = (node(), scene.place(), BTreeMap::new());
    let wanted = Wanted { place: &place, env: &env, max: None, above: None, attempt: 9 };
    let refused = fetch_stored::fetch_with(&other.checkpoints(), wanted, &|| true, |_| Some(COPY_SPARE_BYTES)).unwrap_err();
    assert!(matches!(&refused, NotFetched::Here(why) if why.contains("there is no room for")), "{refused:?}");
    assert!(fs::read_dir(other.checkpoints()).unwrap().flatten().all(|entry| !entry.path().is_dir()), "nothing is left of it");
    let fetched = fetch_stored::fetch_with(&other.checkpoints(), wanted, &|| true, |_| Some(COPY_SPARE_BYTES + (1 << 30)));
    assert_eq!(fetched.unwrap(), Some(50));
}
