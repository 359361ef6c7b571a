//! Signs of life: heartbeat files, however broken, output, verdicts, and checkpoints.

#![allow(clippy::unwrap_used, reason = "a test")]

mod agent_support;

use agent_support::{Bench, rank, read};
use everlit_api::agent::{Beat, CheckpointNews, FromAgent, GangSpec, ResumeFrom, Resumed, ToAgent};
use everlit_api::rank::Verdict;
use everlit_api::time::Millis;

fn beat(bench: &mut Bench, spec: &GangSpec, number: u32, mut enough: impl FnMut(&Beat) -> bool) -> Beat {
    let own = rank(spec, number);
    bench.wait_for("a beat", |frame| match frame {
        FromAgent::Beats { beats } => beats.iter().find(|beat| beat.incarnation == Some(own) && enough(beat)).cloned(),
        _ => None,
    })
}

fn judged(bench: &mut Bench, spec: &GangSpec) -> (Verdict, u64) {
    bench.wait_for("a verdict", |frame| match frame {
        FromAgent::Judged { incarnation, verdict, age_ms, .. } if *incarnation == rank(spec, 0) => Some((*verdict, *age_ms)),
        _ => None,
    })
}

const WRITE: &str =
    r#"beat() { printf '%s' "$1" > $EVERLIT_HEARTBEAT_FILE.tmp && mv $EVERLIT_HEARTBEAT_FILE.tmp $EVERLIT_HEARTBEAT_FILE; }; "#;

#[test]
fn heartbeats_are_passed_on_with_what_they_say() {
    let mut bench = Bench::new();
    let (spec, _) = bench.start(&format!(
        "{WRITE} beat '{{\"seq\":1,\"rank\":0,\"attempt\":1,\"phase\":\"train\",\"step\":3,\"loss\":2.5,\"metrics\":{{\"lr\":0.1}}}}'; sleep 600"
    ));
    let news = beat(&mut bench, &spec, 0, |_| true);
    assert_eq!((news.heartbeat, news.step, news.loss, news.metrics["lr"]), (true, Some(3), Some(2.5), 0.1));
    bench.drop_link();
    let hello = bench.accept();
    assert_eq!(hello.ranks[0].beat.as_ref().and_then(|beat| beat.step), Some(3));
}

#[test]
fn hostile_heartbeat_files_do_no_harm() {
    let mut bench = Bench::new();
    let breaks = [
        "mkfifo $F",
        "ln -s /dev/zero $F",
        "mkdir $F",
        "truncate -s 1G $F",
        r#"echo '{"seq":5,"rank":3,"step":1}' > $F"#,
        r#"echo '{"seq":-5,"step":1}' > $F"#,
        r#"echo '{"seq":1,"st' > $F"#,
        r#"head -c 100000 /dev/urandom > $F"#,
        r#"echo '[[[[[[[[' > $F"#,
    ];
    for broken in breaks {
        let (spec, _) = bench.start(&format!(
            "{WRITE} F=$EVERLIT_HEARTBEAT_FILE; {broken}; echo broken; sleep 0.1; rm -rf $F; beat '{{\"seq\":1,\"step\":42}}'; sleep 600"
        ));
        assert_eq!(beat(&mut bench, &spec, 0, |_| true).step, Some(42), "{broken}");
        bench.stop(&spec, Millis(0));
        bench.exited(rank(&spec, 0));
    }
}

#[test]
fn the_last_step_before_the_end_is_told_before_the_end() {
    let mut bench = Bench::new();
    for _ in 0..20 {
        let spec = bench.gang(1, &format!("{WRITE} for n in 1 2 3; do beat \"{{\\\"seq\\\":$n,\\\"step\\\":$n}}\"; done; exit 0"));
        bench.order(&spec);
        let mut step = None;
        bench.wait_for("the end", |frame| match frame {
            FromAgent::Beats { beats } => {
                step = beats.last().and_then(|beat| beat.step);
                None
            }
            FromAgent::Exited(_) => Some(()),
            _ => None,
        });
        assert_eq!(step, Some(3));
        bench.take_others();
    }
}

#[test]
fn silent_idle_and_never_started_ranks_are_judged() {
    let mut bench = Bench::new();
    let mut silent = bench.gang(1, &format!("{WRITE} beat '{{\"seq\":1}}'; while :; do echo still here; sleep 0.05; done"));
    silent.heartbeat.timeout = Millis(300);
    bench.order(&silent);
    let (verdict, age) = judged(&mut bench, &silent);
    assert!(verdict == Verdict::Silent && age >= 300, "{verdict:?} {age}");
    let mut mute = bench.gang(1, "sleep 600");
    mute.heartbeat.startup_timeout = Millis(200);
    bench.order(&mute);
    assert_eq!(judged(&mut bench, &mute).0, Verdict::NoStart);
    let mut idle = bench.gang(1, "echo hello; sleep 600");
    idle.heartbeat.idle_timeout = Some(Millis(300));
    bench.order(&idle);
    assert_eq!(judged(&mut bench, &idle).0, Verdict::Idle);
}

#[test]
fn a_rank_that_computes_is_not_idle() {
    let mut bench = Bench::new();
    let mut busy = bench.gang(1, "echo hello; (while :; do :; done) & wait");
    busy.heartbeat.idle_timeout = Some(Millis(500));
    bench.order(&busy);
    let mut idle = bench.gang(1, "echo hello; sleep 600");
    idle.heartbeat.idle_timeout = Some(Millis(1_500));
    bench.order(&idle);
    // Three times the busy one's timeout pass.
    assert_eq!(judged(&mut bench, &idle).0, Verdict::Idle);
    assert!(!bench.not_taken().any(|frame| matches!(frame, FromAgent::Judged { .. })));
}

#[test]
fn progress_is_read_from_output() {
    let mut bench = Bench::new();
    let (spec, _) = bench.start("for n in 1 2 3; do echo \"step $n/10 loss=0.$n\"; done; sleep 600");
    let news = beat(&mut bench, &spec, 0, |beat| beat.step == Some(3));
    assert_eq!((news.heartbeat, news.total_steps, news.loss), (false, Some(10), Some(0.3)));
    let ends = bench.gang(1, "echo step=7; exit 1");
    bench.order(&ends);
    assert_eq!(beat(&mut bench, &ends, 0, |_| true).step, Some(7));
}

fn checkpoint(bench: &mut Bench, mut enough: impl FnMut(&CheckpointNews) -> bool) -> CheckpointNews {
    bench.wait_for("a checkpoint", |frame| match frame {
        FromAgent::Checkpoint(news) if enough(news) => Some(news.clone()),
        _ => None,
    })
}

fn resumed(bench: &mut Bench) -> Resumed {
    bench.wait_for("where it starts from", |frame| if let FromAgent::Resumed(resumed) = frame { Some(resumed.clone()) } else { None })
}

fn saving(steps: &str) -> String {
    let agent = env!("CARGO_BIN_EXE_everlit-agent");
    format!(
        "cd $EVERLIT_CHECKPOINT_DIR; for n in {steps}; do mkdir tmp-$n; head -c 100000 /dev/urandom > tmp-$n/weights.bin; \
         {agent} checkpoint commit tmp-$n || exit 1; sleep 0.1; done; echo from: $EVERLIT_RESUME_FROM; exit 1"
    )
}

#[test]
fn checkpoints_of_a_foreign_program_are_told_read_back_pruned_and_resumed_from() {
    let mut bench = Bench::new();
    let mut spec = bench.gang(1, &saving("10 20 30 40 50"));
    bench.order(&spec);
    assert_eq!(resumed(&mut bench).step, None);
    assert_eq!(checkpoint(&mut bench, |news| news.step == 10).attempt, 1);
    let exited = bench.exited(rank(&spec, 0));
    assert_eq!(exited.exit.code, Some(1), "{exited:?}");
    let news = checkpoint(&mut bench, |news| news.step == 50 && news.verified);
    assert_eq!(news.bytes, 100_000);
    let dir = bench.job_folder(spec.job).join("checkpoints");
    bench.until("pruning", || {
        std::fs::read_dir(&dir).unwrap().flatten().filter(|e| e.file_name().to_string_lossy().starts_with("step-")).count() == 3
    });
    // The newest is damaged behind everybody's back: the next older one is taken.
    std::fs::write(dir.join("step-000000000050/weights.bin"), vec![0; 100_000]).unwrap();
    spec.attempt = 2;
    bench.order(&spec);
    let from = resumed(&mut bench);
    assert_eq!((from.step, from.quarantined.len(), from.quarantined[0].0), (Some(40), 1, 50));
    let exited = bench.exited(rank(&spec, 0));
    assert!(exited.exit.tail.iter().any(|line| line.ends_with("checkpoints/step-000000000040")), "{exited:?}");
    // Another job starts from this one's.
    let mut other = bench.gang(1, "true");
    other.resume_from = Some(ResumeFrom::Job(spec.job));
    bench.order(&other);
    assert_eq!(resumed(&mut bench).step, Some(50));
    let mut third = bench.gang(1, "true");
    third.resume_from = Some(ResumeFrom::Path(dir.join("step-000000000030").display().to_string()));
    bench.order(&third);
    assert_eq!(resumed(&mut bench).step, Some(30));
}

#[test]
fn an_older_attempt_can_not_commit() {
    let mut bench = Bench::new();
    let (mut spec, started) = bench.start("trap '' TERM; sleep 600");
    spec.attempt = 2;
    bench.order(&spec);
    bench.started(rank(&spec, 0));
    let dir = bench.job_folder(spec.job).join("checkpoints");
    std::fs::create_dir(dir.join("tmp-5")).unwrap();
    std::fs::write(dir.join("tmp-5/x"), "x").unwrap();
    let commit = |attempt: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_everlit-agent"));
        command.args(["checkpoint", "commit"]).arg(dir.join("tmp-5")).env("EVERLIT_ATTEMPT", attempt).output().unwrap()
    };
    let refused = commit("1");
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("fenced"), "{refused:?}");
    let done = commit("2");
    assert!(done.status.success(), "{done:?}");
    assert_eq!(checkpoint(&mut bench, |news| news.verified).step, 5);
    assert!(started.pid > 0);
}

#[test]
fn a_job_that_has_ended_keeps_its_files_until_it_is_removed() {
    let mut bench = Bench::new();
    let (spec, _) = bench.start("echo kept; exit 0");
    bench.exited(rank(&spec, 0));
    bench.send_all(vec![ToAgent::Forget { incarnations: vec![rank(&spec, 0)] }, ToAgent::JobEnded { job: spec.job }]);
    let folder = bench.job_folder(spec.job);
    bench.until("the mark", || folder.join("ended").exists() && !folder.join("runs").exists());
    assert!(folder.join("logs").exists() && folder.join("checkpoints").exists());
    assert!(read(&folder.join("attempts/a1/gang.json")).contains("master_port"));
}

#[test]
fn a_save_on_demand_reaches_the_rank_and_nothing_that_it_started() {
    let mut bench = Bench::new();
    // The child would die of the signal; the rank tells whether it lives.
    let (spec, _) = bench.start(&format!(
        "{WRITE} sleep 600 & child=$!; trap 'kill -0 $child && beat \"{{\\\"seq\\\":2,\\\"step\\\":99}}\"' USR1; \
         beat '{{\"seq\":1,\"step\":1,\"saves_on_signal\":true}}'; while :; do wait; done"
    ));
    assert!(beat(&mut bench, &spec, 0, |beat| beat.step == Some(1)).saves_on_signal);
    bench.send(ToAgent::SaveNow { job: spec.job, attempt: 2 });
    bench.send(ToAgent::SaveNow { job: spec.job, attempt: 1 });
    assert_eq!(beat(&mut bench, &spec, 0, |beat| beat.step == Some(99)).step, Some(99));
}

#[test]
fn a_failed_save_is_told() {
    let mut bench = Bench::new();
    let (spec, _) = bench
        .start(&format!("{WRITE} beat '{{\"seq\":1,\"step\":60,\"save_error\":{{\"step\":50,\"reason\":\"no space left\"}}}}'; sleep 600"));
    let told = bench.wait_for("the failed save", |frame| match frame {
        FromAgent::SaveFailed { incarnation, error } => Some((*incarnation, error.step, error.reason.clone())),
        _ => None,
    });
    assert_eq!(told, (rank(&spec, 0), 50, "no space left".into()));
}

#[test]
fn a_checkpoint_that_is_damaged_when_it_is_read_back_is_told_with_the_reason() {
    let mut bench = Bench::new();
    let (spec, _) = bench.start("sleep 600");
    let dir = bench.job_folder(spec.job).join("checkpoints");
    let draft = dir.join("tmp-30");
    std::fs::create_dir(&draft).unwrap();
    std::fs::write(draft.join("MANIFEST.json"), "not a manifest").unwrap();
    std::fs::rename(&draft, dir.join("step-000000000030")).unwrap();
    let told = bench.wait_for("the damage", |frame| match frame {
        FromAgent::Quarantined { job, step, reason } => Some((*job, *step, reason.clone())),
        _ => None,
    });
    assert_eq!((told.0, told.1), (spec.job, 30));
    assert!(told.2.contains("MANIFEST.json"), "{}", told.2);
    assert!(dir.join("quarantine/step-000000000030").exists());
}
