//! Every kind of damage is found, named, and moved out of the way; pruning never loses the newest good checkpoint.
#![allow(clippy::unwrap_used)]

mod checkpoint_support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use checkpoint_support::{checkpoint, flip, names};
use everlit_api::manifest::ModelDescription;
use everlit_worker::checkpoint::{
    Damage, commit, list, newest_verified, prune, quarantine, read_manifest, step_folder, sweep_drafts, verify,
};
use serde_json::{Value, json};

fn edit(place: &Path, change: impl FnOnce(&mut Value)) {
    let path = place.join("MANIFEST.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    // Somebody who lies on purpose signs it, or leaves the signature out where that is allowed.
    manifest.as_object_mut().unwrap().remove("manifest_sha256");
    fs::write(path, serde_json::to_vec(&manifest).unwrap()).unwrap();
}

/// What is done to a good checkpoint, and what the damage must say.
type Case = (&'static str, fn(&Path), &'static str);

const CASES: &[Case] = &[
    ("first chunk", |p| flip(&p.join("a.safetensors"), 0), "a.safetensors: chunk 0 (from byte 0)"),
    ("last byte", |p| flip(&p.join("a.safetensors"), 9 * 1024 * 1024 + 4), "a.safetensors: chunk 2 (from byte 8388608)"),
    ("small file", |p| flip(&p.join("b.safetensors"), 50), "b.safetensors: chunk 0"),
    ("truncated", |p| fs::write(p.join("b.safetensors"), "x").unwrap(), "b.safetensors has 1 bytes instead of 100"),
    ("empty file grew", |p| fs::write(p.join("c.bin"), "x").unwrap(), "c.bin has 1 bytes instead of 0"),
    ("file removed", |p| fs::remove_file(p.join("c.bin")).unwrap(), "c.bin is missing"),
    ("manifest cut", |p| fs::write(p.join("MANIFEST.json"), "{\"format\":1").unwrap(), "MANIFEST.json is not valid"),
    ("manifest empty", |p| fs::write(p.join("MANIFEST.json"), "").unwrap(), "MANIFEST.json is not valid"),
    ("manifest not text", |p| fs::write(p.join("MANIFEST.json"), [0xff; 64]).unwrap(), "MANIFEST.json is not valid"),
    ("manifest nested", |p| fs::write(p.join("MANIFEST.json"), "[".repeat(100_000)).unwrap(), "not valid"),
    ("other format", |p| edit(p, |m| m["format"] = json!(2)), "has format 2"),
    ("other step", |p| edit(p, |m| m["step"] = json!(7)), "of step 7"),
    ("other hash", |p| edit(p, |m| m["files"][0]["sha256"][1] = json!("00")), "a.safetensors: chunk 1"),
    ("hash missing", |p| edit(p, |m| m["files"][0]["sha256"] = json!([])), "wrong number of chunks"),
    ("no chunk length", |p| edit(p, |m| m["files"][0]["chunk_bytes"] = json!(0)), "wrong number of chunks"),
    ("no files", |p| edit(p, |m| m["files"] = json!([])), "names no file"),
    ("named twice", |p| edit(p, |m| m["files"][0] = m["files"][1].clone()), "named twice"),
    ("path up", |p| edit(p, |m| m["files"][0]["name"] = json!("../x")), "not a plain file name"),
    ("absolute", |p| edit(p, |m| m["files"][0]["name"] = json!("/etc/passwd")), "not a plain file name"),
    ("hidden", |p| edit(p, |m| m["files"][0]["name"] = json!(".lock")), "not a plain file name"),
    ("itself", |p| edit(p, |m| m["files"][0]["name"] = json!("MANIFEST.json")), "not a plain file name"),
    ("nul", |p| edit(p, |m| m["files"][0]["name"] = json!("a\u{0}b")), "not a plain file name"),
    ("huge length", |p| edit(p, |m| m["files"][0]["bytes"] = json!(u64::MAX)), "wrong number of chunks"),
    (
        "huge manifest",
        |p| fs::OpenOptions::new().write(true).open(p.join("MANIFEST.json")).unwrap().set_len(1 << 40).unwrap(),
        "MANIFEST.json has 1099511627776 bytes",
    ),
    (
        "file is a link",
        |p| {
            fs::rename(p.join("b.safetensors"), p.join("real")).unwrap();
            symlink("real", p.join("b.safetensors")).unwrap();
        },
        "b.safetensors is not a regular file",
    ),
    (
        "manifest is a link",
        |p| {
            fs::rename(p.join("MANIFEST.json"), p.join("real")).unwrap();
            symlink("real", p.join("MANIFEST.json")).unwrap();
        },
        "MANIFEST.json is not a regular file",
    ),
    (
        "file is a folder",
        |p| {
            fs::remove_file(p.join("b.safetensors")).unwrap();
            fs::create_dir(p.join("b.safetensors")).unwrap();
        },
        "b.safetensors is not a regular file",
    ),
    (
        "file is a pipe",
        |p| {
            fs::remove_file(p.join("b.safetensors")).unwrap();
            nix::unistd::mkfifo(&p.join("b.safetensors"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        },
        "b.safetensors is not a regular file",
    ),
    (
        "folder is a link",
        |p| {
            fs::rename(p, p.with_file_name("elsewhere")).unwrap();
            symlink("elsewhere", p).unwrap();
        },
        "the checkpoint's folder is not a regular file",
    ),
];

#[test]
fn no_bit_of_a_manifest_can_change_unseen() {
    let temp = tempfile::tempdir().unwrap();
    let (draft, mut manifest) = checkpoint_support::draft(temp.path(), 10, 1);
    manifest.model = Some(ModelDescription { family: "mlp".into(), config: json!({"hidden": 24}) });
    let place = commit(temp.path(), &draft, &manifest).unwrap();
    let path = place.join("MANIFEST.json");
    let good = fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 7);
        fs::write(&path, &bad).unwrap();
        assert!(
            read_manifest(&place).is_err(),
            "byte {at}: {}",
            String::from_utf8_lossy(&bad[at.saturating_sub(20)..(at + 20).min(bad.len())])
        );
    }
    for length in [0, 1, good.len() / 2, good.len() - 1] {
        fs::write(&path, &good[..length]).unwrap();
        assert!(read_manifest(&place).is_err(), "cut to {length}");
    }
    fs::write(&path, &good).unwrap();
    assert_eq!(verify(&place).unwrap(), manifest);
}

#[test]
fn each_kind_of_damage_is_named_quarantined_and_the_next_older_taken() {
    for (what, damage, says) in CASES {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        checkpoint(dir, 50, 1);
        let place = checkpoint(dir, 100, 1);
        verify(&place).unwrap();
        damage(&place);
        let found = verify(&place).expect_err(what);
        assert!(found.to_string().contains(says), "{what}: {found}");
        assert!(!found.is_transient(), "{what}");

        let chosen = newest_verified(dir).unwrap();
        assert_eq!(chosen.checkpoint.unwrap().1.step, 50, "{what}");
        let moved = &chosen.quarantined[0];
        assert_eq!((moved.step, chosen.quarantined.len()), (100, 1), "{what}");
        assert_eq!(moved.path, dir.join("quarantine/step-000000000100"));
        assert_eq!(moved.reason, found.to_string());
        if moved.path.symlink_metadata().unwrap().is_dir() {
            assert_eq!(fs::read_to_string(moved.path.join("REASON")).unwrap().trim_end(), found.to_string());
        }
        assert_eq!(list(dir).unwrap().len(), 1, "{what}");
        assert!(newest_verified(dir).unwrap().quarantined.is_empty());
    }
}

#[test]
fn extra_files_are_ignored_and_a_folder_without_manifest_is_nobodys() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let place = checkpoint(dir, 50, 1);
    fs::write(place.join("notes.txt"), "mine").unwrap();
    verify(&place).unwrap();
    fs::create_dir(dir.join(step_folder(100))).unwrap();
    let chosen = newest_verified(dir).unwrap();
    assert_eq!(chosen.checkpoint.unwrap().1.step, 50);
    assert!(chosen.quarantined.is_empty());
    assert!(dir.join(step_folder(100)).exists());
}

#[test]
fn what_can_not_be_read_for_now_stays_where_it_is() {
    let transient = Damage::Unreadable { file: "a".into(), source: std::io::Error::from_raw_os_error(nix::libc::EIO) };
    assert!(transient.is_transient());
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    checkpoint(dir, 50, 1);
    checkpoint(dir, 100, 1);
    // Out of descriptors, in a process of its own so that other tests keep theirs.
    if std::env::var_os("EVERLIT_TEST_NO_FILES").is_none() {
        let myself = std::env::current_exe().unwrap();
        let run = std::process::Command::new(myself)
            .args(["--exact", "what_can_not_be_read_for_now_stays_where_it_is", "--test-threads=1"])
            .env("EVERLIT_TEST_NO_FILES", "1")
            .output()
            .unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
        return;
    }
    use nix::sys::resource::{Resource, setrlimit};
    let (soft, hard) = nix::sys::resource::getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let list_needs = fs::File::open("/dev/null").unwrap();
    use std::os::fd::AsRawFd;
    let next = list_needs.as_raw_fd() as u64;
    drop(list_needs);
    let found = list(dir).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, next, hard).unwrap();
    let damage = verify(&found[0].path).unwrap_err();
    let chosen = newest_verified(dir);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    assert!(damage.is_transient(), "{damage}");
    assert!(chosen.unwrap_err().is_transient());
    assert_eq!(list(dir).unwrap().len(), 2);
    assert!(!dir.join("quarantine").exists());
}

#[test]
fn with_nothing_good_left_the_answer_is_none() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    assert!(newest_verified(&dir.join("missing")).unwrap().checkpoint.is_none());
    for step in [50, 100] {
        flip(&checkpoint(dir, step, 1).join("b.safetensors"), 1);
    }
    let chosen = newest_verified(dir).unwrap();
    assert!(chosen.checkpoint.is_none());
    assert_eq!(chosen.quarantined.iter().map(|q| q.step).collect::<Vec<_>>(), [100, 50]);
    // The same step damaged again finds its own place.
    flip(&checkpoint(dir, 100, 2).join("b.safetensors"), 1);
    newest_verified(dir).unwrap();
    assert_eq!(names(&dir.join("quarantine")), ["step-000000000050", "step-000000000100", "step-000000000100-2"]);
}

#[test]
fn a_good_looking_checkpoint_can_be_quarantined_by_name() {
    let temp = tempfile::tempdir().unwrap();
    checkpoint(temp.path(), 50, 1);
    let moved = quarantine(temp.path(), 50, "failed 3 resumes").unwrap().unwrap();
    assert_eq!(fs::read_to_string(moved.path.join("REASON")).unwrap(), "failed 3 resumes\n");
    assert!(list(temp.path()).unwrap().is_empty());
    assert_eq!(quarantine(temp.path(), 50, "again").unwrap(), None);
}

#[test]
fn pruning_keeps_the_newest_ones_and_the_newest_that_verifies() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    for step in [10, 20, 30, 40, 50] {
        checkpoint(dir, step, 1);
    }
    let steps = || list(dir).unwrap().into_iter().map(|found| found.step).collect::<Vec<_>>();
    for step in [40, 50] {
        flip(&dir.join(step_folder(step)).join("b.safetensors"), 1);
    }
    // A removal that somebody died in, and a draft that somebody writes.
    let (grave, draft) = (dir.join(".draft-step-000000000005-a0"), dir.join(".draft-step-000000000060-a1"));
    fs::create_dir_all(grave.join("within")).unwrap();
    fs::create_dir_all(&draft).unwrap();
    assert_eq!(prune(dir, 2).unwrap(), [20, 10]);
    assert!(!grave.exists() && draft.exists());
    assert_eq!(steps(), [50, 40, 30], "30 is the newest good one");
    assert_eq!(prune(dir, 3).unwrap(), Vec::<u64>::new());
    flip(&dir.join(step_folder(30)).join("b.safetensors"), 1);
    assert_eq!(prune(dir, 1).unwrap(), Vec::<u64>::new(), "nothing good: nothing goes");
    checkpoint(dir, 60, 1);
    assert_eq!(prune(dir, 0).unwrap(), [50, 40, 30], "zero keeps one");
    assert_eq!(steps(), [60]);
    assert_eq!(sweep_drafts(dir, u32::MAX).unwrap(), 0);
}

#[test]
fn a_removal_cut_short_looks_like_no_checkpoint_and_is_swept() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let place = checkpoint(dir, 50, 1);
    let grave = dir.join(".draft-step-000000000050-a0");
    fs::rename(&place, &grave).unwrap();
    fs::remove_file(grave.join("b.safetensors")).unwrap();
    assert!(newest_verified(dir).unwrap().checkpoint.is_none());
    assert_eq!(sweep_drafts(dir, 1).unwrap(), 1);
}
