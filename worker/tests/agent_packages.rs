//! Folders that come with a job: got once, unpacked once, shared by the ranks of all attempts, and refused when they are no good.

#![allow(clippy::unwrap_used, reason = "a test")]

mod agent_support;

use agent_support::{Bench, rank, read};
use everlit_api::agent::{FromAgent, GangSpec, ToAgent};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// A package with one entry, and its name.
fn packed(path: &str, kind: EntryType, text: &str) -> (String, Vec<u8>) {
    let mut tar = Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_size(text.len() as u64);
    header.set_cksum();
    tar.append(&header, text.as_bytes()).unwrap();
    let bytes = tar.into_inner().unwrap().finish().unwrap();
    (Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect(), bytes)
}

fn with(mut spec: GangSpec, package: &str, workdir: Option<&str>) -> GangSpec {
    spec.package = Some(package.into());
    spec.workdir = workdir.map(Into::into);
    spec
}

fn succeeds(bench: &mut Bench, spec: &GangSpec) {
    for number in 0..spec.world_size {
        let exited = bench.exited(rank(spec, number));
        assert_eq!(exited.exit.code, Some(0), "{:?}", exited.exit);
    }
}

#[test]
fn a_package_is_got_once_and_unpacked_once_for_a_job() {
    let mut bench = Bench::new();
    let (name, bytes) = packed("sub/train.txt", EntryType::Regular, "hello");
    let script = "cat train.txt >> seen-$RANK && test ! -e other && touch other-$RANK";
    let one = with(bench.gang(2, script), &name, Some("sub"));
    let two = with(bench.gang(1, "test ! -e sub/other-0 && cat sub/train.txt"), &name, None);
    // Both at once: only one request comes.
    bench.order(&one);
    bench.order(&two);
    let head = bench.answer("200 OK", &bytes, usize::MAX).to_lowercase();
    assert!(head.starts_with(&format!("get /agent/packages/{name} http/1.1")) && head.contains("authorization: bearer secret"), "{head}");
    succeeds(&mut bench, &one);
    succeeds(&mut bench, &two);
    let folder = bench.job_folder(one.job);
    assert_eq!(read(&folder.join("workdir/sub/seen-1")), "hello");
    assert_eq!(read(&bench.job_folder(two.job).join("workdir/sub/train.txt")), "hello");
    // A later attempt finds what the one before has left.
    bench.send(ToAgent::Forget { incarnations: vec![rank(&one, 0), rank(&one, 1)] });
    let again = GangSpec { attempt: 2, ..one.clone() };
    bench.order(&again);
    succeeds(&mut bench, &again);
    assert_eq!(read(&folder.join("workdir/sub/seen-0")), "hellohello");
    let left: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("unpacking")), "{left:?}");
    assert!(bench.data().join("packages").join(&name).exists());
    bench.send(ToAgent::Forget { incarnations: vec![rank(&again, 0), rank(&again, 1)] });
    bench.send(ToAgent::RemoveJob { job: one.job });
    bench.wait_for("the job's removal", |frame| matches!(frame, FromAgent::Removed { .. }).then_some(()));
    assert!(!folder.exists());
}

#[test]
fn what_can_not_be_got_may_be_tried_again_and_what_is_no_good_may_not() {
    let mut bench = Bench::new();
    let (good, bytes) = packed("a", EntryType::Regular, "x");
    let mut refused = |package: &str, status: &str, body: &[u8], cut: usize| {
        let spec = with(bench.gang(1, "true"), package, None);
        bench.order(&spec);
        bench.answer(status, body, cut);
        bench.end_answers();
        let told = bench.start_failed(&spec);
        let folder = bench.job_folder(spec.job);
        assert!(!folder.join("workdir").exists() && !folder.join("unpacking-a1").exists());
        told
    };
    let mut told = String::new();
    let mut tell = |(reason, permanent): (String, bool)| told.push_str(&format!("{permanent}: {reason}\n"));
    let problem = br#"{"type":"about:blank","title":"t","status":404,"detail":"there is no package","code":"not_found"}"#;
    tell(refused(&good, "404 Not Found", problem, usize::MAX));
    tell(refused(&good, "500 Internal Server Error", b"oh", usize::MAX));
    tell(refused(&good, "200 OK", b"another", usize::MAX));
    tell(refused(&good, "200 OK", &bytes, bytes.len() / 2));
    for (path, kind) in [("../a", EntryType::Regular), ("/a", EntryType::Regular), ("a", EntryType::Symlink), ("a", EntryType::Fifo)] {
        let (name, bytes) = packed(path, kind, "");
        let (reason, permanent) = refused(&name, "200 OK", &bytes, usize::MAX);
        tell((reason.replace(&name, "HASH"), permanent));
    }
    expect_test::expect![[r#"
        false: the job's package could not be got from the coordinator: there is no package
        false: the job's package could not be got from the coordinator: it answered 500 Internal Server Error
        false: the job's package could not be got from the coordinator: its bytes have the sha256 ae448ac86c4e8e4dec645729708ef41873ae79c6dff84eff73360989487f08e5, and not GOOD
        false: the job's package could not be got from the coordinator: the connection broke: error reading a body from connection: end of file before message length reached
        true: the job's package HASH is not taken: `../a` in it has `..` in its path: only what lies in the folder may be in it
        true: the job's package HASH is not taken: `/a` in it is an absolute path: only what lies in the folder may be in it
        true: the job's package HASH is not taken: `a` in it is a link: put what it points to in its place (`tar --dereference --hard-dereference`)
        true: the job's package HASH is not taken: `a` in it is a device or a pipe: only files and folders are taken
    "#]]
    .assert_eq(&told.replace(&good, "GOOD"));
    let wild = with(bench.gang(1, "true"), "../../x", None);
    bench.order(&wild);
    assert_eq!(bench.start_failed(&wild), ("the coordinator names a package by what is no sha256".into(), true));
    assert!(!bench.dir.path().join("a").exists());
}

#[test]
fn a_gang_that_waits_for_its_package_is_stopped_at_once() {
    let mut bench = Bench::new();
    let (name, bytes) = packed("a", EntryType::Regular, "x");
    let spec = with(bench.gang(1, "true"), &name, None);
    bench.order(&spec);
    bench.answer("200 OK", &bytes, 1);
    bench.stop(&spec, everlit_api::time::Millis(60_000));
    assert_eq!(bench.start_failed(&spec), ("it was stopped before its package or its data was here".into(), false));
    // The next one is not held up by it.
    let next = with(bench.gang(1, "cat a"), &name, None);
    bench.order(&next);
    bench.answer("200 OK", &bytes, usize::MAX);
    succeeds(&mut bench, &next);
}

#[test]
fn an_agent_that_dies_in_the_middle_leaves_nothing_half() {
    let mut bench = Bench::new();
    let (name, bytes) = packed("a", EntryType::Regular, &"text ".repeat(10_000));
    let spec = with(bench.gang(1, "test $(wc -c < a) -eq 50000"), &name, None);
    bench.order(&spec);
    bench.answer("200 OK", &bytes, bytes.len() / 2);
    let draft = bench.data().join("packages").join(format!("{name}.part"));
    bench.until("a part of it", || draft.exists());
    bench.kill_agent();
    bench.end_answers();
    // Neither does one that dies while it unpacks.
    let unpacking = bench.job_folder(spec.job).join("unpacking-a1");
    std::fs::create_dir_all(&unpacking).unwrap();
    std::fs::write(unpacking.join("a"), "half").unwrap();
    bench.start_agent();
    bench.accept();
    assert!(!draft.exists());
    bench.order(&spec);
    bench.answer("200 OK", &bytes, usize::MAX);
    succeeds(&mut bench, &spec);
    assert!(!unpacking.exists());
}
