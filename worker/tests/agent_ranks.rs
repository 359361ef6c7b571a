//! Ranks from start to end: what they are given, how they end, and what is left of them.

#![allow(clippy::unwrap_used, reason = "a test")]

mod agent_support;

use agent_support::{Bench, is_alive, rank, read};
use everlit_api::agent::{FromAgent, Program, Resumed, ToAgent};
use everlit_api::job::{LogAction, LogPolicy};
use everlit_api::rank::LogMatch;
use everlit_api::time::Millis;

fn resumed(bench: &mut Bench) -> Resumed {
    bench.wait_for("where it starts from", |frame| if let FromAgent::Resumed(resumed) = frame { Some(resumed.clone()) } else { None })
}

#[test]
fn a_gang_runs_from_order_to_forgotten() {
    let mut bench = Bench::new();
    let mut spec = bench.gang(2, "");
    spec.program = Program::Command { argv: vec!["true".into()] };
    bench.order(&spec);
    assert_eq!(resumed(&mut bench).step, None);
    for own in [rank(&spec, 0), rank(&spec, 1)] {
        assert!(bench.started(own).pid > 0);
        let exited = bench.exited(own);
        assert_eq!((exited.exit.code, exited.exit.signal, exited.lost), (Some(0), None, false));
    }
    assert!(bench.run_folder(rank(&spec, 0)).exists());
    bench.send(ToAgent::Forget { incarnations: vec![rank(&spec, 0), rank(&spec, 1)] });
    let runs = bench.job_folder(spec.job).join("runs");
    bench.until("the run folders to go", || !runs.exists());
    bench.send(ToAgent::RemoveJob { job: spec.job });
    bench.wait_for("the job's removal", |frame| matches!(frame, FromAgent::Removed { job } if *job == spec.job).then_some(()));
    assert!(!bench.job_folder(spec.job).exists());
}

#[test]
fn a_rank_is_given_torchruns_environment_and_nothing_of_ours() {
    let mut bench = Bench::new();
    let mut spec =
        bench.gang(1, "env | sort > env.txt; cat $EVERLIT_DATA_SHARDS > shards.txt; pwd > pwd.txt; ls -d $EVERLIT_CHECKPOINT_DIR");
    spec.env.insert("GREETING".into(), "hello world".into());
    spec.shards = vec!["/a".into(), "/b".into()];
    bench.order(&spec);
    let exited = bench.exited(rank(&spec, 0));
    assert_eq!(exited.exit.code, Some(0), "{:?}", exited.exit);
    let text = read(&bench.dir.path().join("env.txt"));
    let names: Vec<&str> = text.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
    // What the shell adds itself, and what depends on the machine.
    let optional = ["PWD", "OLDPWD", "SHLVL", "_", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "HOME"];
    let names: Vec<&str> = names.into_iter().filter(|name| !optional.contains(name)).collect();
    expect_test::expect![[r#"
        EVERLIT_ATTEMPT EVERLIT_CHECKPOINT_DIR EVERLIT_DATA_SHARDS EVERLIT_GENERATION EVERLIT_HEARTBEAT_FILE EVERLIT_JOB_ID EVERLIT_RENDEZVOUS EVERLIT_RESUME_FROM GREETING GROUP_RANK GROUP_WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT PATH PYTHONUNBUFFERED RANK ROLE_NAME ROLE_RANK ROLE_WORLD_SIZE TORCHELASTIC_ERROR_FILE TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RESTART_COUNT TORCHELASTIC_RUN_ID TORCH_NCCL_ASYNC_ERROR_HANDLING WORLD_SIZE
    "#]]
    .assert_eq(&format!("{}\n", names.join(" ")));
    assert_eq!(read(&bench.dir.path().join("shards.txt")), "/a\n/b\n");
    assert_eq!(read(&bench.dir.path().join("pwd.txt")).trim(), bench.dir.path().display().to_string());
}

#[test]
fn a_rank_starts_with_clean_signals_descriptors_and_its_own_group() {
    let mut bench = Bench::new();
    let (spec, started) =
        bench.start("grep -E '^Sig(Blk|Ign)' /proc/self/status > sig.txt; ls -l /proc/$$/fd > fds.txt; ulimit -n > n.txt; sleep 60");
    let path = bench.dir.path().join("n.txt");
    bench.until("the script", || !read(&path).is_empty());
    let signals = read(&bench.dir.path().join("sig.txt"));
    for line in signals.lines() {
        // 32 and 33 belong to the C library, which lets nobody touch them.
        let set = u64::from_str_radix(line.split('\t').nth(1).unwrap(), 16).unwrap() & !0x1_8000_0000;
        assert_eq!(set, 0, "{signals}");
    }
    let open = read(&bench.dir.path().join("fds.txt"));
    let targets: Vec<&str> = open.lines().filter_map(|line| Some(line.split_once(" -> ")?.1)).collect();
    // A shell keeps a copy of its output while it redirects.
    assert!(targets.iter().all(|to| to.starts_with("pipe:") || *to == "/dev/null" || to.ends_with("fds.txt")), "{open}");
    let pid = nix::unistd::Pid::from_raw(started.pid as i32);
    let session = nix::unistd::getsid(Some(pid)).unwrap();
    assert_eq!(nix::unistd::getpgid(Some(pid)).unwrap(), pid);
    assert!(session != pid && session != nix::unistd::getsid(None).unwrap());
    let arguments = read(format!("/proc/{session}/cmdline").as_ref());
    assert_eq!(arguments.split('\0').nth(1).unwrap(), bench.run_folder(rank(&spec, 0)).display().to_string());
    assert_eq!(std::fs::read(format!("/proc/{session}/environ")).unwrap(), b"");
}

#[test]
fn what_can_not_be_started_says_why() {
    let mut bench = Bench::new();
    let file = bench.dir.path().join("plain.txt");
    std::fs::write(&file, "not a program").unwrap();
    let mut check = |argv: &[&str], workdir: Option<&str>, code: i32, text: &str| {
        let mut spec = bench.gang(1, "");
        spec.program = Program::Command { argv: argv.iter().map(|arg| (*arg).to_string()).collect() };
        spec.workdir = workdir.map(String::from);
        bench.order(&spec);
        let exited = bench.exited(rank(&spec, 0));
        assert_eq!((exited.exit.code, exited.lost), (Some(code), false), "{exited:?}");
        assert!(exited.exit.error.as_deref().is_some_and(|error| error.contains(text)), "{exited:?}");
    };
    check(&["no-such-program"], None, 127, "could not find the program `no-such-program`");
    check(&["/no/such/program"], None, 127, "could not find the program");
    check(&[file.to_str().unwrap()], None, 126, "could not run the program");
    check(&["true"], Some("/no/such/folder"), 127, "could not enter the folder `/no/such/folder`");
}

#[test]
fn exits_are_told_as_they_were() {
    let mut bench = Bench::new();
    for (script, code, signal) in
        [("exit 3", Some(3), None), ("kill -9 $$", None, Some(9)), ("kill -34 $$", None, Some(34)), ("kill -11 $$", None, Some(11))]
    {
        let spec = bench.gang(1, &format!("echo one; echo two >&2; {script}"));
        bench.order(&spec);
        let exited = bench.exited(rank(&spec, 0));
        assert_eq!((exited.exit.code, exited.exit.signal, exited.lost), (code, signal, false), "{script}");
        let mut tail = exited.exit.tail.clone();
        tail.sort();
        assert_eq!(tail, ["one", "two"], "{script}");
    }
    // What was wrong is far above the last lines that are told.
    let mut spec = bench.gang(1, "echo uncorrectable ECC >&2; for n in $(seq 150); do echo frame $n >&2; done; exit 1");
    let policy = |pattern: &str| LogPolicy { name: None, pattern: pattern.into(), action: LogAction::ExcludeNode };
    spec.log_policies = vec![policy("not there"), policy("ECC")];
    bench.order(&spec);
    let exited = bench.exited(rank(&spec, 0));
    assert_eq!(exited.exit.matched, Some(LogMatch { policy: 1, line: "uncorrectable ECC".into() }));
    assert_eq!((exited.exit.tail.len(), exited.exit.tail[0].as_str()), (20, "frame 131"));
    let spec = bench.gang(1, r#"echo '{"message": {"message": "CUDA out of memory"}}' > $TORCHELASTIC_ERROR_FILE; exit 1"#);
    bench.order(&spec);
    assert_eq!(bench.exited(rank(&spec, 0)).exit.message.as_deref(), Some("CUDA out of memory"));
}

#[test]
fn a_stop_is_sigterm_and_after_the_grace_sigkill() {
    let mut bench = Bench::new();
    let (kind, _) = bench.start("trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done");
    let (deaf, _) = bench.start("trap '' TERM; echo ready; while :; do sleep 0.05; done");
    for spec in [&kind, &deaf] {
        let state = bench.run_folder(rank(spec, 0)).join("state");
        bench.until("its trap", || read(&state).contains("output"));
    }
    bench.stop(&kind, Millis(30_000));
    assert_eq!(bench.exited(rank(&kind, 0)).exit.code, Some(7));
    bench.stop(&deaf, Millis(30_000));
    bench.stop(&deaf, Millis(100));
    assert_eq!(bench.exited(rank(&deaf, 0)).exit.signal, Some(9));
}

#[test]
fn nothing_of_a_rank_outlives_it() {
    let mut bench = Bench::new();
    let script =
        "setsid sleep 600 & (setsid sh -c 'sleep 600 & sleep 600' &) ; (trap '' TERM HUP; sleep 600 &); exec >&- 2>&-; sleep 0.05; exit 4";
    let spec = bench.gang(1, script);
    bench.order(&spec);
    assert_eq!(bench.exited(rank(&spec, 0)).exit.code, Some(4));
    bench.until("everything to end", || bench.processes().is_empty());
}

#[test]
fn a_killed_shim_costs_its_rank_and_nothing_is_left() {
    let mut bench = Bench::new();
    let (spec, started) = bench.start("setsid sleep 600 & sleep 600 & sleep 600");
    let shim = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(started.pid as i32))).unwrap();
    nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGKILL).unwrap();
    let exited = bench.exited(rank(&spec, 0));
    assert_eq!((exited.lost, exited.exit.error.as_deref()), (true, Some("its shim was killed")));
    bench.until("everything to end", || bench.processes().is_empty());
}

#[test]
fn an_order_is_carried_out_once_and_an_older_one_never() {
    let mut bench = Bench::new();
    let mut spec = bench.gang(1, "echo x >> count.txt; sleep 600");
    spec.attempt = 2;
    bench.order(&spec);
    bench.started(rank(&spec, 0));
    bench.order(&spec);
    let mut older = spec.clone();
    older.attempt = 1;
    bench.order(&older);
    let mut newer = spec.clone();
    newer.attempt = 3;
    bench.order(&newer);
    // The older attempt still ran: never two at once.
    assert_eq!(bench.exited(rank(&spec, 0)).exit.signal, Some(9));
    bench.started(rank(&newer, 0));
    let path = bench.dir.path().join("count.txt");
    bench.until("both scripts", || read(&path) == "x\nx\n");
    assert!(!bench.not_taken().any(|frame| matches!(frame, FromAgent::Started(_))));
}

#[test]
fn a_gang_that_can_not_start_is_refused_with_the_reason() {
    let mut bench = Bench::new();
    let mut spec = bench.gang(1, "true");
    spec.resume_from = Some(everlit_api::agent::ResumeFrom::Path("/no/such/checkpoint".into()));
    bench.order(&spec);
    let refused = |frame: &FromAgent| match frame {
        FromAgent::StartFailed { reason, permanent, .. } => Some((reason.clone(), *permanent)),
        _ => None,
    };
    let (reason, permanent) = bench.wait_for("a refusal", refused);
    assert!(permanent && reason.contains("can not resume from `/no/such/checkpoint`"), "{reason}");
    bench.drop_link();
    assert_eq!(bench.accept().ranks, []);
    bench.wait_for("the same refusal again", refused);
}

#[test]
fn a_rank_that_ends_at_once_is_seen_alive_never_after() {
    let mut bench = Bench::new();
    let spec = bench.gang(8, "exit 0");
    bench.order(&spec);
    for number in 0..8 {
        let pid = bench.started(rank(&spec, number)).pid;
        assert_eq!(bench.exited(rank(&spec, number)).exit.code, Some(0));
        assert!(!is_alive(pid));
    }
}
