//! Commits, fences, and what a crash leaves.
#![allow(clippy::unwrap_used)]

mod checkpoint_support;

use std::fs;

use checkpoint_support::{FILES, checkpoint, content, describe, draft, flip, names};
use everlit_worker::checkpoint::{
    CheckpointError, begin, commit, fence, list, newest_verified, raise_fence, step_folder, sweep_drafts, verify,
};

#[test]
fn a_committed_checkpoint_verifies_and_nothing_else_is_left() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("job/checkpoints");
    let (draft, manifest) = draft(&dir, 100, 1);
    assert!(list(&dir).unwrap().is_empty(), "a draft is no checkpoint");
    let place = commit(&dir, &draft, &manifest).unwrap();
    assert_eq!(place, dir.join("step-000000000100"));
    assert_eq!(verify(&place).unwrap(), manifest);
    assert_eq!(manifest.files[0].sha256.len(), 3);
    assert_eq!(names(&dir), [".lock", "FENCE", "LATEST", "step-000000000100"]);
    assert_eq!(fs::read_to_string(dir.join("LATEST")).unwrap(), "step-000000000100\n");
}

#[test]
fn a_crash_before_the_rename_leaves_the_older_checkpoint_as_the_newest() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    checkpoint(dir, 50, 1);
    // Dead at each point before the commit: an empty draft, some files, all files, a torn manifest, a whole one.
    for point in 0..5 {
        let attempt = 1 + point;
        let (folder, manifest) = draft(dir, 100, attempt);
        let text = serde_json::to_vec(&manifest).unwrap();
        match point {
            0 => FILES.iter().for_each(|(name, _)| fs::remove_file(folder.join(name)).unwrap()),
            1 => fs::remove_file(folder.join("a.safetensors")).unwrap(),
            2 => {}
            3 => fs::write(folder.join("MANIFEST.json"), &text[..text.len() / 2]).unwrap(),
            _ => fs::write(folder.join("MANIFEST.json"), &text).unwrap(),
        }
        let chosen = newest_verified(dir).unwrap();
        assert_eq!(chosen.checkpoint.unwrap().1.step, 50, "point {point}");
        assert!(chosen.quarantined.is_empty());
    }
    assert_eq!(sweep_drafts(dir, 5).unwrap(), 4, "the newest attempt's own draft stays");
    assert_eq!(sweep_drafts(dir, 6).unwrap(), 1);
    assert_eq!(names(dir), [".lock", "FENCE", "LATEST", "step-000000000050"]);
}

#[test]
fn begin_empties_what_the_same_attempt_left() {
    let temp = tempfile::tempdir().unwrap();
    let (first, _) = draft(temp.path(), 100, 2);
    let second = begin(temp.path(), 100, 2, 0).unwrap();
    assert_eq!(first, second);
    assert!(names(&second).is_empty());
}

#[test]
fn a_fenced_attempt_neither_begins_nor_commits() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let (draft, manifest) = draft(dir, 100, 1);
    raise_fence(dir, 2).unwrap();
    let fenced = |error| matches!(error, CheckpointError::Fenced { attempt: 1, fence: 2 });
    assert!(fenced(begin(dir, 150, 1, 0).unwrap_err()));
    assert!(fenced(commit(dir, &draft, &manifest).unwrap_err()));
    assert!(list(dir).unwrap().is_empty());
    assert!(!dir.join(step_folder(100)).exists());
}

#[test]
fn a_commit_fences_off_the_attempts_before_it() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let (old, old_manifest) = draft(dir, 100, 1);
    checkpoint(dir, 50, 2);
    assert_eq!(fence(dir).unwrap(), 2);
    assert!(matches!(commit(dir, &old, &old_manifest), Err(CheckpointError::Fenced { .. })));
}

#[test]
fn a_step_executed_again_replaces_the_old_checkpoint() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let place = checkpoint(dir, 100, 1);
    flip(&place.join("a.safetensors"), 5_000_000);
    assert!(verify(&place).is_err());
    assert_eq!(checkpoint(dir, 100, 3), place);
    assert_eq!(verify(&place).unwrap().attempt, 3);
    assert_eq!(names(dir), [".lock", "FENCE", "LATEST", "step-000000000100"], "the old one is gone");
}

#[test]
fn committing_again_after_a_lost_answer_is_no_error() {
    let temp = tempfile::tempdir().unwrap();
    let (draft, manifest) = draft(temp.path(), 100, 1);
    let place = commit(temp.path(), &draft, &manifest).unwrap();
    assert_eq!(commit(temp.path(), &draft, &manifest).unwrap(), place);
    verify(&place).unwrap();
}

#[test]
fn files_under_the_final_name_become_a_checkpoint_in_place() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let place = dir.join(step_folder(100));
    fs::create_dir(&place).unwrap();
    for (name, bytes) in FILES {
        fs::write(place.join(name), content(100, name, bytes)).unwrap();
    }
    assert!(list(dir).unwrap().is_empty());
    let manifest = describe(&place, 100, 1);
    assert_eq!(commit(dir, &place, &manifest).unwrap(), place);
    assert_eq!(verify(&place).unwrap(), manifest);
}

#[test]
fn a_manifest_that_contradicts_the_draft_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let (folder, good) = draft(dir, 100, 1);
    let refused = |manifest: &_| match commit(dir, &folder, manifest) {
        Err(CheckpointError::Refused(why)) => why,
        other => panic!("{other:?}"),
    };
    let mut bad = good.clone();
    bad.files[1].name = "../b.safetensors".into();
    assert!(refused(&bad).contains("plain file name"));
    let mut bad = good.clone();
    bad.files.swap(0, 1);
    assert!(refused(&bad).contains("name order"));
    let mut bad = good.clone();
    bad.files.clear();
    assert!(refused(&bad).contains("no file"));
    let mut bad = good.clone();
    bad.files[2].sha256.clear();
    assert!(refused(&bad).contains("chunks"));
    let mut bad = good.clone();
    bad.format = 2;
    assert!(refused(&bad).contains("format 2"));
    fs::write(folder.join("b.safetensors"), "short").unwrap();
    assert!(refused(&good).contains("b.safetensors has 5 bytes"));
    fs::remove_file(folder.join("b.safetensors")).unwrap();
    assert!(refused(&good).contains("b.safetensors is missing"));
    assert!(list(dir).unwrap().is_empty());
}

#[test]
fn commits_of_two_attempts_at_once_leave_one_whole_checkpoint() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let drafts: Vec<_> = (1..=4).map(|attempt| draft(dir, 100, attempt)).collect();
    let threads: Vec<_> = drafts
        .into_iter()
        .map(|(draft, manifest)| {
            let dir = dir.to_path_buf();
            std::thread::spawn(move || commit(&dir, &draft, &manifest).map(|_| manifest.attempt))
        })
        .collect();
    let won: Vec<u32> = threads.into_iter().filter_map(|thread| thread.join().unwrap().ok()).collect();
    assert!(won.contains(&4), "the newest attempt is never refused: {won:?}");
    assert_eq!(verify(&dir.join(step_folder(100))).unwrap().attempt, 4);
}

#[test]
fn a_membership_has_a_draft_of_its_own_and_clears_those_before_it() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let first = begin(dir, 100, 2, 0).unwrap();
    std::fs::write(first.join("part"), "of one that was lost").unwrap();
    let second = begin(dir, 100, 2, 1).unwrap();
    assert!(first != second && !first.exists() && second.exists());
    let other = begin(dir, 150, 3, 0).unwrap();
    begin(dir, 160, 2, 2).unwrap();
    assert!(other.exists() && !second.exists(), "another attempt's draft is not this one's to clear");
}
