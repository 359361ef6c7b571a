//! Ranks that are killed, stopped, told to end, or given bad checkpoints: nothing is lost, repeated or changed.
#![cfg(feature = "torch")]
#![allow(clippy::unwrap_used)]

mod torch_support;

use std::fs;
use std::time::{Duration, Instant};

use everlit_api::job::ModelSpec;
use everlit_worker::checkpoint::{self, newest_verified};
use nix::sys::signal::Signal;
use torch_support::{Gang, Job};

/// Kills one rank and waits for the others, which must notice by themselves.
fn kill_one(gang: &mut Gang, rank: usize) {
    gang.signal(rank, Signal::SIGKILL);
    let codes = gang.wait();
    for (other, code) in codes.iter().enumerate() {
        assert_eq!(*code, if other == rank { None } else { Some(1) }, "{}", gang.output());
    }
    let survivor = usize::from(rank == 0);
    assert!(gang.file(survivor, "out").contains("peer lost: "), "{}", gang.output());
    assert!(gang.file(survivor, "error.json").contains("peer lost: "));
}

#[test]
fn three_ranks_killed_and_resumed_end_with_the_bits_of_an_undisturbed_run() {
    for (model, steps) in [("llama-1m", 60), ("mlp-10k", 400)] {
        let undisturbed = Job::new(model, 3, steps).finish(1, 3, None);
        let job = Job::new(model, 3, steps);
        let mut attempt = 1;
        let mut from = None;
        for (rank, step) in [(1, 13), (0, 25), (2, 33)] {
            let mut gang = job.start(attempt, 3, from.as_deref());
            gang.wait_step(step);
            gang.wait_committed(&job, step / 10 * 10);
            kill_one(&mut gang, rank);
            from = Some(job.newest());
            attempt += 1;
        }
        assert!(checkpoint::verify(from.as_ref().unwrap()).unwrap().step >= 30);
        assert_eq!(job.finish(attempt, 3, from.as_deref()), undisturbed, "{model}");
    }
}

#[test]
fn a_kill_in_the_middle_of_a_checkpoint_leaves_the_one_before() {
    let mut job = Job::new("llama-1m", 2, 1000);
    job.config.checkpoint.every_steps = 2;
    let mut caught = 0;
    let mut from = None;
    for attempt in 1..=6 {
        let mut gang = job.start(attempt, 2, from.as_deref());
        let draft = job.checkpoints().join(".draft-step-");
        let drafting = |attempt: u32| {
            let entries = fs::read_dir(job.checkpoints()).into_iter().flatten().flatten();
            let names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
            names.iter().any(|name| name.starts_with(".draft-step-") && name.ends_with(&format!("-a{attempt}")))
        };
        assert!(!draft.exists());
        // A first one must be there, so that there is a "before".
        gang.wait_until(|_| attempt > 1 || !checkpoint::list(&job.checkpoints()).unwrap().is_empty());
        gang.wait_until(|_| drafting(attempt));
        gang.signal(attempt as usize % 2, Signal::SIGKILL);
        gang.wait();
        caught += u32::from(drafting(attempt));
        let chosen = newest_verified(&job.checkpoints()).unwrap();
        assert!(chosen.quarantined.is_empty(), "{:?}", chosen.quarantined);
        from = Some(chosen.checkpoint.expect("the one before").0);
        checkpoint::sweep_drafts(&job.checkpoints(), attempt + 1).unwrap();
    }
    assert!(caught > 0, "no kill fell into a checkpoint");
}

#[test]
fn sigterm_to_one_rank_saves_at_one_step_and_the_resumed_run_has_the_same_bits() {
    let undisturbed = Job::new("llama-1m", 3, 24).finish(1, 3, None);
    let mut job = Job::new("llama-1m", 3, 24);
    job.config.checkpoint.every_steps = 1_000_000;
    let mut gang = job.start(1, 3, None);
    gang.wait_step(5);
    gang.signal(2, Signal::SIGTERM);
    assert_eq!(gang.wait(), [Some(143); 3], "{}", gang.output());
    let found = checkpoint::list(&job.checkpoints()).unwrap();
    assert_eq!(found.len(), 1);
    assert!((5..24).contains(&found[0].step));
    for rank in 0..3 {
        assert_eq!(gang.heartbeat(rank).unwrap().step, Some(found[0].step));
        assert!(gang.file(rank, "out").contains(&format!("stopped after step {}, saved", found[0].step)));
        assert!(gang.file(rank, "error.json").is_empty(), "being told to end is no error");
    }
    assert_eq!(job.finish(2, 3, Some(&found[0].path)), undisturbed);
}

#[test]
fn another_world_size_continues_with_the_next_sample() {
    // Many more steps than the kill needs to come in time.
    let job = Job::new("mlp-10k", 2, 400);
    let mut gang = job.start(1, 2, None);
    gang.wait_step(12);
    gang.wait_committed(&job, 10);
    kill_one(&mut gang, 0);
    let from = job.newest();
    let before = checkpoint::verify(&from).unwrap();
    job.finish(2, 3, Some(&from));
    let after = checkpoint::verify(&job.newest()).unwrap();
    assert_eq!((before.world_size, after.world_size), (2, 3));
    assert_eq!((before.samples, after.samples), (7 * before.step, 7 * 400));
    assert_eq!((after.epoch, after.data.cursor), (0, 2_800), "no sample skipped, none seen twice");
    assert_eq!(before.data.listing_sha256, after.data.listing_sha256);
}

#[test]
fn bad_checkpoints_are_refused_before_a_step_is_done() {
    let mut job = Job::new("mlp-10k", 1, 20);
    job.finish(1, 1, None);
    let good = job.newest();
    let refused = |job: &Job, attempt, code, says: &str| {
        let mut gang = job.start(attempt, 1, Some(&good));
        assert_eq!(gang.wait(), [Some(code)], "{}", gang.output());
        assert!(gang.output().contains(says), "{}", gang.output());
        assert!(!gang.output().contains("step="));
    };
    job.config.worker.steps = 40;
    job.config.worker.seed = 12;
    refused(&job, 2, 78, "trained with seed 11");
    job.config.worker.seed = 11;
    job.config.worker.model = ModelSpec::Preset("mlp-500k".into());
    refused(&job, 3, 78, "not of model mlp");
    job.config.worker.model = ModelSpec::Preset("mlp-10k".into());
    let shard = job.dir.path().join("text/1.txt");
    let text = fs::read(&shard).unwrap();
    fs::write(&shard, &text[1..]).unwrap();
    refused(&job, 4, 78, "the data's files are not those");
    fs::write(&shard, &text).unwrap();

    let part = good.join("part-00000-of-00001.safetensors");
    let bytes = fs::read(&part).unwrap();
    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(&part, flipped).unwrap();
    refused(&job, 5, 1, "another sha256 than committed");
    fs::write(&part, &bytes[..100]).unwrap();
    refused(&job, 6, 1, "has 100 bytes instead of");
    fs::remove_file(&part).unwrap();
    refused(&job, 7, 1, "is missing");
    fs::write(&part, &bytes).unwrap();
    job.finish(8, 1, Some(&good));
}

#[test]
fn ranks_that_begin_with_different_bits_do_not_train() {
    let job = Job::new("mlp-10k", 1, 20);
    job.finish(1, 1, None);
    let from = job.newest();
    let other = Job::new("mlp-10k", 2, 40);
    // One rank of the gang is told to resume, the other is not.
    let mut one = other.start(2, 2, None);
    one.signal(1, Signal::SIGKILL);
    let mut command = std::process::Command::new(torch_support::PROGRAM);
    command.args(["train", "--config"]).arg(one.run.join("train.json")).env_clear();
    command.envs([("RANK", "1"), ("WORLD_SIZE", "2"), ("EVERLIT_ATTEMPT", "2")]).env("EVERLIT_RESUME_FROM", &from);
    command.env("EVERLIT_RENDEZVOUS", format!("dir:{}", one.run.join("rendezvous").display()));
    let out = command.output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    assert!(String::from_utf8_lossy(&out.stderr).contains("do not begin alike"), "{out:?}");
    assert_eq!(one.wait()[0], Some(1), "{}", one.output());
}

#[test]
fn a_fenced_attempt_ends_at_its_next_checkpoint() {
    let job = Job::new("mlp-10k", 2, 100_000);
    let mut gang = job.start(1, 2, None);
    gang.wait_step(11);
    checkpoint::raise_fence(&job.checkpoints(), 2).unwrap();
    let codes = gang.wait();
    assert_eq!(codes, [Some(1), Some(1)]);
    assert!(gang.file(0, "out").contains("attempt 1 is fenced off"), "{}", gang.output());
    assert!(checkpoint::list(&job.checkpoints()).unwrap().iter().all(|found| checkpoint::verify(&found.path).is_ok()));
}

#[test]
fn told_to_end_with_a_stuck_peer_a_rank_gives_up_by_itself() {
    // Stuck in a step; then, saving after each step, most likely in a save.
    for every_steps in [1_000_000, 1] {
        let mut job = Job::new("mlp-10k", 2, 100_000);
        job.config.checkpoint.every_steps = every_steps;
        let mut gang = job.start(1, 2, None);
        gang.wait_step(11);
        gang.signal(1, Signal::SIGSTOP);
        gang.signal(0, Signal::SIGTERM);
        let told = Instant::now();
        let status = loop {
            if let Some(status) = gang.children[0].try_wait().unwrap() {
                break status;
            }
            assert!(told.elapsed() < torch_support::PATIENCE, "{}", gang.output());
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(status.code(), Some(143), "{}", gang.output());
        assert!(gang.file(0, "out").contains("not saved"), "{}", gang.output());
        assert!(told.elapsed() >= Duration::from_secs(2), "it waited for its peer first");
    }
}
