//! Agents that die, end, and come back: what ranks notice, and what the next agent knows.

#![allow(clippy::unwrap_used, reason = "a test")]

mod agent_support;

use std::process::Command;

use agent_support::{Bench, PATIENCE, is_alive, rank, read};
use everlit_api::agent::{FromAgent, ToAgent};
use everlit_api::job::{LogAction, LogPolicy};
use everlit_api::rank::LogMatch;
use everlit_api::time::Millis;

#[test]
fn ranks_live_through_the_agents_death_and_are_adopted() {
    let mut bench = Bench::new();
    let mut spec = bench.gang(2, "echo begun; while [ ! -e stop.$RANK ]; do sleep 0.02; done; echo over; exit $((5 + RANK))");
    spec.log_policies = vec![LogPolicy { name: None, pattern: "^over$".into(), action: LogAction::CancelRetries }];
    bench.order(&spec);
    let pids = [bench.started(rank(&spec, 0)).pid, bench.started(rank(&spec, 1)).pid];
    bench.kill_agent();
    assert!(pids.iter().all(|pid| is_alive(*pid)));
    // Rank 1 ends while nobody looks.
    std::fs::write(bench.dir.path().join("stop.1"), "").unwrap();
    let state = bench.run_folder(rank(&spec, 1)).join("state");
    bench.until("its exit record", || read(&state).contains("exit"));
    bench.start_agent();
    let hello = bench.accept();
    let reports: Vec<_> = hello.ranks.iter().map(|r| (r.incarnation.rank, r.pid, r.lost, r.exit.as_ref().and_then(|e| e.code))).collect();
    assert_eq!(reports, [(0, Some(pids[0]), false, None), (1, Some(pids[1]), false, Some(6))]);
    let exit = hello.ranks[1].exit.as_ref().unwrap();
    assert_eq!(
        (exit.tail.clone(), exit.matched.clone()),
        (vec!["begun".into(), "over".into()], Some(LogMatch { policy: 0, line: "over".into() }))
    );
    // The adopted one is the new agent's in every way.
    std::fs::write(bench.dir.path().join("stop.0"), "").unwrap();
    assert_eq!(bench.exited(rank(&spec, 0)).exit.code, Some(5));
    bench.send(ToAgent::Forget { incarnations: vec![rank(&spec, 0), rank(&spec, 1)] });
    let runs = bench.job_folder(spec.job).join("runs");
    bench.until("the run folders to go", || !runs.exists());
}

#[test]
fn an_adopted_rank_can_be_stopped_and_its_order_is_known() {
    let mut bench = Bench::new();
    let (spec, started) = bench.start("trap '' TERM; echo ready; while :; do sleep 0.05; done");
    bench.kill_agent();
    bench.start_agent();
    assert_eq!(bench.accept().ranks[0].pid, Some(started.pid));
    bench.wait_for("what was decided then", |frame| matches!(frame, FromAgent::Resumed(_)).then_some(()));
    bench.order(&spec);
    bench.stop(&spec, Millis(100));
    assert_eq!(bench.exited(rank(&spec, 0)).exit.signal, Some(9));
    assert!(!bench.not_taken().any(|frame| matches!(frame, FromAgent::Started(_))));
}

#[test]
fn a_rank_whose_shim_died_unseen_is_lost_and_leaves_nothing() {
    let mut bench = Bench::new();
    let (spec, started) = bench.start("setsid sleep 600 & sleep 600 & wait");
    let shim = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(started.pid as i32))).unwrap();
    bench.kill_agent();
    nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGKILL).unwrap();
    bench.until("the rank's death", || !is_alive(started.pid));
    bench.start_agent();
    let hello = bench.accept();
    assert!(hello.ranks[0].lost && hello.ranks[0].exit.as_ref().unwrap().error.as_deref() == Some("its shim was killed"), "{hello:?}");
    assert_eq!(hello.ranks[0].incarnation, rank(&spec, 0));
    bench.until("everything to end", || bench.processes().is_empty());
}

#[test]
fn an_agent_killed_in_the_middle_of_a_start_leaves_no_rank_unknown() {
    let mut bench = Bench::new();
    for round in 0..12_u64 {
        let spec = bench.gang(12, "sleep 600");
        bench.order(&spec);
        // Somewhere between the order and the last start.
        let state = bench.run_folder(rank(&spec, (round % 12) as u32)).join("state");
        bench.until("a part of the start", || state.exists());
        bench.kill_agent();
        bench.start_agent();
        let hello = bench.accept();
        assert_eq!(hello.ranks.len(), 12, "{:?}", hello.ranks);
        for report in &hello.ranks {
            // Killed in the moment before a shim's start, nobody can tell whether that ran: it counts as lost.
            let unknown = report.pid.is_none() && report.lost;
            assert!(unknown || (report.pid.is_none_or(is_alive) && report.exit.is_none()), "{report:?}");
        }
        if round % 2 == 0 {
            bench.order(&spec);
            for report in hello.ranks.iter().filter(|report| report.pid.is_none() && !report.lost) {
                bench.started(report.incarnation);
            }
        }
        bench.stop(&spec, Millis(0));
        for report in hello.ranks.iter().filter(|report| !report.lost) {
            bench.exited(report.incarnation);
        }
        bench.until("every rank's end", || bench.processes().is_empty());
        bench.send(ToAgent::Forget { incarnations: (0..12).map(|number| rank(&spec, number)).collect() });
        let runs = bench.job_folder(spec.job).join("runs");
        bench.until("the run folders to go", || !runs.exists());
    }
}

#[test]
fn what_an_agent_did_not_come_to_start_starts_with_its_order_and_the_others_hear_nothing() {
    let mut bench = Bench::new();
    let mut spec = bench.gang(2, "[ \"$WORD\" = said ] && sleep 600");
    spec.env.insert("WORD".into(), "said".into());
    bench.order(&spec);
    let pids = [bench.started(rank(&spec, 0)).pid, bench.started(rank(&spec, 1)).pid];
    bench.kill_agent();
    // As it would be had the agent died before it came to rank 1.
    let shim = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pids[1] as i32))).unwrap();
    nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGKILL).unwrap();
    bench.until("the rank's death", || !is_alive(pids[1]));
    for name in ["state", "shim.sock"] {
        std::fs::remove_file(bench.run_folder(rank(&spec, 1)).join(name)).unwrap();
    }
    bench.start_agent();
    let hello = bench.accept();
    let reports: Vec<_> = hello.ranks.iter().map(|report| (report.pid, report.exit.is_some())).collect();
    assert_eq!(reports, [(Some(pids[0]), false), (None, false)]);
    bench.order(&spec);
    let started = bench.started(rank(&spec, 1)).pid;
    assert!(is_alive(started) && is_alive(pids[0]) && started != pids[1]);
    // Said again, it is nothing new.
    bench.order(&spec);
    bench.stop(&spec, Millis(0));
    assert_eq!([0, 1].map(|number| bench.exited(rank(&spec, number)).exit.signal), [Some(9), Some(9)]);
    assert!(!bench.not_taken().any(|frame| matches!(frame, FromAgent::Started(_))));
}

#[test]
fn ends_are_repeated_until_they_are_forgotten() {
    let mut bench = Bench::new();
    let (spec, _) = bench.start("exit 3");
    bench.exited(rank(&spec, 0));
    bench.drop_link();
    assert_eq!(bench.accept().ranks[0].exit.as_ref().unwrap().code, Some(3));
    bench.kill_agent();
    bench.start_agent();
    assert_eq!(bench.accept().ranks[0].exit.as_ref().unwrap().code, Some(3));
    bench.send(ToAgent::Forget { incarnations: vec![rank(&spec, 0)] });
    let runs = bench.job_folder(spec.job).join("runs");
    bench.until("the run folders to go", || !runs.exists());
    bench.drop_link();
    assert_eq!(bench.accept().ranks, []);
}

#[test]
fn a_second_agent_is_refused_and_health_tells() {
    let mut bench = Bench::new();
    let second = bench.agent_command().status().unwrap();
    assert!(!second.success());
    assert!(read(&bench.dir.path().join("agent.log")).contains("another agent holds"));
    let data = bench.data();
    let health = || Command::new(env!("CARGO_BIN_EXE_everlit-agent")).args(["health", "--data-dir"]).arg(&data).output().unwrap();
    assert!(health().status.success());
    bench.drop_link();
    bench.until("the link's end", || !health().status.success());
    bench.kill_agent();
    assert!(String::from_utf8_lossy(&health().stderr).contains("no agent answers"));
}

#[test]
fn told_to_end_it_drains_with_its_coordinator() {
    let mut bench = Bench::new();
    let (spec, _) = bench.start("trap 'echo saved; exit 0' TERM; echo ready; while :; do sleep 0.02; done");
    let state = bench.run_folder(rank(&spec, 0)).join("state");
    bench.until("its trap", || read(&state).contains("output"));
    bench.signal_agent("-TERM");
    bench.wait_for("draining", |frame| matches!(frame, FromAgent::Draining).then_some(()));
    bench.stop(&spec, Millis(30_000));
    let exited = bench.exited(rank(&spec, 0));
    assert_eq!((exited.exit.code, exited.lost), (Some(0), false));
    bench.send(ToAgent::Forget { incarnations: vec![rank(&spec, 0)] });
    assert!(bench.agent_ended());
}

#[test]
fn told_to_end_without_a_coordinator_it_stops_its_ranks_for_free() {
    let mut bench = Bench::new();
    let (spec, _) = bench.start("trap 'exit 0' TERM; echo ready; while :; do sleep 0.02; done");
    let state = bench.run_folder(rank(&spec, 0)).join("state");
    bench.until("its trap", || read(&state).contains("output"));
    // No coordinator any more, and none to come back to.
    std::fs::remove_file(bench.dir.path().join("coordinator.json")).unwrap();
    bench.drop_link();
    let health = |bench: &Bench| {
        Command::new(env!("CARGO_BIN_EXE_everlit-agent")).args(["health", "--data-dir"]).arg(bench.data()).output().unwrap()
    };
    bench.until("the link's end", || !health(&bench).status.success());
    bench.signal_agent("-INT");
    assert!(bench.agent_ended());
    assert!(bench.processes().is_empty());
    let mut next = bench;
    next.rewrite_coordinator_file();
    next.start_agent();
    let hello = next.accept();
    assert!(hello.ranks[0].lost && hello.ranks[0].exit.as_ref().unwrap().code == Some(0), "{hello:?}");
}

#[test]
fn asked_twice_it_leaves_its_ranks() {
    let mut bench = Bench::new();
    let (_, started) = bench.start("trap '' TERM; echo x; while :; do sleep 0.05; done");
    bench.signal_agent("-TERM");
    bench.wait_for("draining", |frame| matches!(frame, FromAgent::Draining).then_some(()));
    bench.signal_agent("-TERM");
    assert!(bench.agent_ended());
    assert!(is_alive(started.pid));
}

#[test]
fn it_ends_by_itself_when_there_is_nothing_to_do() {
    let mut bench = Bench::unstarted();
    bench.linger = "300ms";
    bench.start_agent();
    bench.accept();
    let (spec, started) = bench.start("sleep 600");
    std::fs::remove_file(bench.dir.path().join("coordinator.json")).unwrap();
    bench.drop_link();
    let until = std::time::Instant::now() + std::time::Duration::from_millis(700);
    bench.until("more than its linger", || std::time::Instant::now() > until);
    assert!(bench.agent.as_mut().unwrap().try_wait().unwrap().is_none(), "a living rank keeps it");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(started.pid as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert!(bench.agent_ended());
    assert!(bench.run_folder(rank(&spec, 0)).exists(), "the end waits for the next agent");
}

#[test]
fn a_new_coordinator_file_is_dialled_at_once() {
    let mut bench = Bench::unstarted();
    std::fs::remove_file(bench.dir.path().join("coordinator.json")).unwrap();
    bench.start_agent();
    let log = bench.dir.path().join("agent.log");
    bench.until("a failed try", || read(&log).contains("no coordinator"));
    bench.rewrite_coordinator_file();
    let begin = std::time::Instant::now();
    bench.accept();
    assert!(begin.elapsed() < PATIENCE / 4);
}
