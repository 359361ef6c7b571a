//! Two nodes on one machine: real TLS, real files.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use everlit_api::agent::copies::Source;
use everlit_api::ids::{JobId, NodeId};
use everlit_api::manifest::{MANIFEST_FORMAT, Manifest, ManifestFile};
use everlit_api::ports::PortRange;
use everlit_api::time::Timestamp;

use super::door::Door;
use super::*;
use crate::checkpoint::{self, step_folder};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const PORTS: PortRange = PortRange { first: 21_400, last: 21_899 };

pub(in crate::agent) struct Node {
    _dir: tempfile::TempDir,
    pub(in crate::agent) folders: Folders,
}

pub(in crate::agent) fn job() -> JobId {
    JobId::from_u128(9)
}

pub(in crate::agent) fn node() -> Node {
    let dir = tempfile::tempdir().unwrap();
    let folders = Folders::new(dir.path().to_path_buf());
    Node { folders, _dir: dir }
}

fn door(node: &Node) -> Door {
    Door::open(node.folders.clone(), HERE, PORTS).unwrap()
}

fn source(door: &Door) -> Source {
    source_of(door.told())
}

fn source_of(told: CopyDoor) -> Source {
    let ticket = told.ticket(job());
    Source { node: NodeId("n1".into()), address: HERE.to_string(), port: told.port, certificate: told.certificate, ticket }
}

impl Node {
    pub(in crate::agent) fn checkpoints(&self) -> PathBuf {
        self.folders.checkpoints(job())
    }

    /// Three files, one of them of more than a chunk, one of nothing.
    pub(in crate::agent) fn commit(&self, step: u64, attempt: u32) -> PathBuf {
        let dir = self.checkpoints();
        fs::create_dir_all(&dir).unwrap();
        let draft = checkpoint::begin(&dir, step, attempt, 0).unwrap();
        let large: Vec<u8> = (0..everlit_api::manifest::CHUNK_BYTES + 70_000).map(|at| (at % 251) as u8 ^ step as u8).collect();
        for (name, bytes) in [("a.bin", b"a".as_slice()), ("empty", b""), ("large ü", &large)] {
            fs::write(draft.join(name), bytes).unwrap();
        }
        let files = ["a.bin", "empty", "large ü"].map(|name| checkpoint::describe_file(&draft.join(name)).unwrap()).into();
        let files: Vec<ManifestFile> = files;
        let manifest =
            serde_json::json!({"format": MANIFEST_FORMAT, "attempt": attempt, "step": step, "created_at": Timestamp(1), "files": files});
        let manifest: Manifest = serde_json::from_value(manifest).unwrap();
        checkpoint::commit(&dir, &draft, &manifest).unwrap()
    }

    fn fetch(&self, step: u64, attempt: u32, sources: &[Source]) -> Result<NodeId, String> {
        fetch(&self.checkpoints(), Wanted { job: job(), step, bytes: u64::MAX, attempt, sources }, &|| true)
    }

    fn drafts(&self) -> usize {
        let names = fs::read_dir(self.checkpoints()).into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.filter(|name| name.to_string_lossy().starts_with(".draft")).count()
    }
}

/// Passes bytes on both ways, and cuts each connection when so many have come from the other side.
fn cutting(to: u16, after: usize) -> (u16, std::sync::Arc<AtomicUsize>) {
    let listener = TcpListener::bind((HERE, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let cuts = std::sync::Arc::new(AtomicUsize::new(0));
    let counted = cuts.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut near, mut far) = (stream.unwrap(), TcpStream::connect((HERE, to)).unwrap());
            let (mut near2, mut far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut near2, &mut far2));
            let mut left = after;
            let mut buffer = [0; 16 * 1024];
            while let Ok(read @ 1..) = far.read(&mut buffer) {
                if read > left {
                    counted.fetch_add(1, Ordering::SeqCst);
                    break;
                }
                left -= read;
                if near.write_all(&buffer[..read]).is_err() {
                    break;
                }
            }
            let _ = (near.shutdown(std::net::Shutdown::Both), far.shutdown(std::net::Shutdown::Both));
        }
    });
    (port, cuts)
}

#[test]
fn a_checkpoint_is_copied_whole_with_the_manifest_of_who_wrote_it() {
    let (from, to) = (node(), node());
    let place = from.commit(50, 2);
    let open = door(&from);
    assert_eq!(to.fetch(50, 3, &[source(&open)]), Ok(NodeId("n1".into())));
    let copy = to.checkpoints().join(step_folder(50));
    assert_eq!(checkpoint::verify(&copy).unwrap(), checkpoint::verify(&place).unwrap());
    for name in ["MANIFEST.json", "a.bin", "empty", "large ü"] {
        assert_eq!(fs::read(copy.join(name)).unwrap(), fs::read(place.join(name)).unwrap(), "{name}");
    }
    assert_eq!(to.drafts(), 0);
    assert_eq!(checkpoint::fence(&to.checkpoints()).unwrap(), 0, "a copy is nobody's attempt");
    // Again is no error.
    assert!(to.fetch(50, 3, &[source(&open)]).is_ok());
}

#[test]
fn a_door_opens_for_a_ticket_of_that_job_and_only_whom_the_coordinator_named_is_believed() {
    let (from, to) = (node(), node());
    from.commit(50, 1);
    let open = door(&from);
    let told = |source: Source| to.fetch(50, 1, &[source]).unwrap_err();
    let wrong = Source { ticket: open.told().ticket(JobId::from_u128(8)), ..source(&open) };
    assert!(told(wrong).contains("the ticket is not for this job"));
    assert!(told(Source { ticket: String::new(), ..source(&open) }).contains("the ticket is not for this job"));
    let impostor = door(&from);
    assert!(told(Source { port: impostor.told().port, ..source(&open) }).contains("it is another, or its agent was started again"));
    let other = to.fetch(60, 1, &[source(&open)]).unwrap_err();
    assert!(other.contains("step 60") && other.contains("is not here"), "{other}");
    let port = open.told().port;
    drop(open);
    // Its thread closes the socket a moment after it was told to.
    while TcpStream::connect((HERE, port)).is_ok() {
        std::thread::yield_now();
    }
    assert!(told(source_of(CopyDoor { port, ..impostor.told() })).contains("could not reach"));
    assert_eq!(to.fetch(50, 1, &[]).unwrap_err(), "no node that has it can be reached");
    assert!(checkpoint::list(&to.checkpoints()).unwrap().is_empty());
}

#[test]
fn what_does_not_verify_is_not_taken_and_the_next_source_is_asked() {
    let (damaged, whole, to) = (node(), node(), node());
    let place = damaged.commit(50, 1);
    whole.commit(50, 1);
    let mut bytes = fs::read(place.join("large ü")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(place.join("large ü"), bytes).unwrap();
    let (bad, good) = (door(&damaged), door(&whole));
    let why = to.fetch(50, 1, &[source(&bad)]).unwrap_err();
    assert!(why.contains("large ü: chunk 1") && why.contains("has another sha256 than committed"), "{why}");
    assert!(checkpoint::list(&to.checkpoints()).unwrap().is_empty(), "half a copy is none");
    assert!(to.fetch(50, 1, &[source(&bad), Source { node: NodeId("n2".into()), ..source(&good) }]) == Ok(NodeId("n2".into())));
    assert!(checkpoint::verify(&to.checkpoints().join(step_folder(50))).is_ok());
}

#[test]
fn a_transfer_that_breaks_off_goes_on_from_there() {
    let (from, to) = (node(), node());
    from.commit(50, 1);
    let open = door(&from);
    let (port, cuts) = cutting(open.told().port, 200_000);
    let cut = Source { port, ..source(&open) };
    let why = to.fetch(50, 1, &[cut]).unwrap_err();
    assert_eq!(cuts.load(Ordering::SeqCst), 1, "{why}");
    assert_eq!((to.drafts(), checkpoint::list(&to.checkpoints()).unwrap().len()), (1, 0));
    // The small ones are there: they are not asked for again, and may be gone.
    let place = from.checkpoints().join(step_folder(50));
    fs::write(place.join("a.bin"), "b").unwrap();
    assert!(to.fetch(50, 1, &[source(&open)]).is_ok());
    assert!(checkpoint::verify(&to.checkpoints().join(step_folder(50))).is_ok());
    assert_eq!(to.drafts(), 0);
}

#[test]
fn a_folder_in_which_a_later_attempt_has_begun_takes_no_copy() {
    let (from, to) = (node(), node());
    from.commit(50, 1);
    let open = door(&from);
    checkpoint::raise_fence(&to.checkpoints(), 4).unwrap();
    let why = to.fetch(50, 3, &[source(&open)]).unwrap_err();
    assert!(why.contains("attempt 3 is fenced off"), "{why}");
    assert!(to.fetch(50, 4, &[source(&open)]).is_ok(), "what an older one has written is for that later one, too");
    // What a later attempt has committed for the step stays.
    let own = to.commit(60, 5);
    from.commit(60, 1);
    let why = to.fetch(60, 5, &[source(&open)]).unwrap_err();
    assert!(why.contains("attempt 1 is fenced off"), "{why}");
    assert_eq!(checkpoint::read_manifest(&own).unwrap().attempt, 5);
    let newer = from.commit(70, 9);
    assert!(to.fetch(70, 5, &[source(&open)]).unwrap_err().contains("it is of step 70 and attempt 9"), "{newer:?}");
}

#[test]
fn what_is_not_wanted_any_more_ends_and_the_newest_order_follows() {
    let (from, to) = (node(), node());
    from.commit(50, 1);
    let open = door(&from);
    let why = fetch(
        &to.checkpoints(),
        Wanted { job: job(), step: 50, bytes: u64::MAX, attempt: 1, sources: &[source(&open), source(&open)] },
        &|| false,
    )
    .unwrap_err();
    assert_eq!(why, "n1: it is not wanted any more");
    let order = |step| CopyOrder { job: job(), step, bytes: 1 << 30, attempt: 1, keep: 3, sources: vec![] };
    let mut copies = Copies::default();
    let (first, unwanted, _) = copies.begin(order(1)).expect("nothing is under way");
    assert_eq!(first.step, 1);
    assert!(copies.begin(order(2)).is_none() && copies.begin(order(3)).is_none());
    assert_eq!(copies.end(job()).map(|next| next.step), Some(3));
    assert!(copies.begin(order(4)).is_some());
    assert!(!unwanted.load(Ordering::Relaxed));
    assert!(copies.begin(order(5)).is_none());
    let unwanted = copies.under_way[&job()].unwanted.clone();
    copies.drop_job(job());
    assert!(unwanted.load(Ordering::Relaxed) && copies.end(job()).is_none());
}

#[test]
fn a_copy_is_read_back_and_what_is_beyond_keep_goes() {
    let (from, to) = (node(), node());
    let open = door(&from);
    for step in [10, 20, 30] {
        from.commit(step, 1);
        let order = CopyOrder { job: job(), step, bytes: 1 << 30, attempt: 1, keep: 2, sources: vec![source(&open)] };
        let checked = keep(&to.folders, &order, &AtomicBool::new(false)).unwrap();
        let news = checked.news.unwrap();
        assert_eq!((news.step, news.verified), (step, true));
    }
    let kept: Vec<u64> = checkpoint::list(&to.checkpoints()).unwrap().iter().map(|found| found.step).collect();
    assert_eq!(kept, [30, 20]);
}

#[test]
fn what_says_that_it_is_larger_than_was_told_and_what_there_is_no_room_for_is_not_taken() {
    let (from, to) = (node(), node());
    from.commit(50, 1);
    let open = door(&from);
    let sources = [source(&open)];
    let wanted = Wanted { job: job(), step: 50, bytes: 1_000, attempt: 1, sources: &sources };
    let why = fetch(&to.checkpoints(), wanted, &|| true).unwrap_err();
    assert!(why.contains("and its node had told of 1000"), "{why}");
    assert_eq!(to.drafts(), 0);
    let order = CopyOrder { job: job(), step: 50, bytes: u64::MAX / 2, attempt: 1, keep: 2, sources: sources.into() };
    let why = keep(&to.folders, &order, &AtomicBool::new(false)).unwrap_err();
    assert!(why.starts_with("there is no room for"), "{why}");
}

#[test]
fn what_came_too_late_is_put_aside_once_and_the_rest_stays() {
    let here = node();
    for (step, attempt) in [(10, 1), (20, 1), (30, 1), (40, 2)] {
        here.commit(step, attempt);
    }
    let late = super::super::late::Late::default();
    assert!(late.put_aside(&here.folders, job()).unwrap().is_empty());
    late.note(job(), 1, Some(10));
    let gone: Vec<u64> = late.put_aside(&here.folders, job()).unwrap().iter().map(|own| own.step).collect();
    assert_eq!(gone, [30, 20]);
    assert!(late.put_aside(&here.folders, job()).unwrap().is_empty());
    let left: Vec<u64> = checkpoint::list(&here.checkpoints()).unwrap().iter().map(|found| found.step).collect();
    assert_eq!(left, [40, 10]);
}
