//! Figures of the agent alone, without a coordinator behind the link. Run one with
//! `cargo test --release -p everlit-worker --test agent_measure -- --ignored --nocapture --test-threads 1`.

#![allow(clippy::unwrap_used, reason = "a test")]

mod agent_support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use agent_support::{Bench, PATIENCE, rank, read};
use everlit_api::agent::log::LogStart;
use everlit_api::agent::{FromAgent, Program, ToAgent};
use everlit_api::ids::JobId;

fn kib(pid: i32, field: &str) -> u64 {
    let status = read(format!("/proc/{pid}/status").as_ref());
    status.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB")?.trim().parse().ok()).unwrap_or(0)
}

fn cpu_ticks(pid: i32) -> u64 {
    let stat = read(format!("/proc/{pid}/stat").as_ref());
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

fn percentile(times: &mut [Duration], part: f64) -> Duration {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * part) as usize]
}

#[test]
#[ignore = "a figure, not a check"]
fn gangs_per_second() {
    let mut bench = Bench::new();
    let count = 1500;
    let under_way = 32;
    let mut specs = BTreeMap::new();
    let begin = Instant::now();
    let (mut ordered, mut ended) = (0, 0);
    let mut latency = Vec::new();
    let mut asked: BTreeMap<JobId, Instant> = BTreeMap::new();
    while ended < count {
        let mut frames = Vec::new();
        while ordered < count && ordered - ended < under_way {
            let mut spec = bench.gang(1, "");
            spec.program = Program::Command { argv: vec!["true".into()] };
            frames.push(ToAgent::StartGang(Box::new(spec.clone())));
            asked.insert(spec.job, Instant::now());
            specs.insert(spec.job, spec);
            ordered += 1;
        }
        bench.send_all(frames);
        let done = bench.wait_for("an exit", |frame| match frame {
            FromAgent::Exited(exited) => Some(exited.clone()),
            _ => None,
        });
        assert_eq!(done.exit.code, Some(0), "{done:?}");
        latency.push(asked[&done.incarnation.job].elapsed());
        ended += 1;
        let job = done.incarnation.job;
        bench.send_all(vec![ToAgent::Forget { incarnations: vec![done.incarnation] }, ToAgent::JobEnded { job }]);
        bench.take_others();
    }
    let seconds = begin.elapsed().as_secs_f64();
    let agent = bench.agent_pid();
    println!(
        "gangs/s {:.0} (agent cpu {:.0}%, rss {} KiB, order to exit p50 {:?} p99 {:?})",
        f64::from(count) / seconds,
        cpu_ticks(agent) as f64 / seconds,
        kib(agent, "VmRSS:"),
        percentile(&mut latency, 0.5),
        percentile(&mut latency, 0.99)
    );
}

#[test]
#[ignore = "a figure, not a check"]
fn latencies_and_sizes() {
    let mut bench = Bench::new();
    let (mut starts, mut ends) = (Vec::new(), Vec::new());
    for _ in 0..50 {
        let spec = bench.gang(1, "");
        let spec = everlit_api::agent::GangSpec { program: Program::Command { argv: vec!["sleep".into(), "600".into()] }, ..spec };
        let begin = Instant::now();
        bench.order(&spec);
        let started = bench.started(rank(&spec, 0));
        starts.push(begin.elapsed());
        let begin = Instant::now();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(started.pid as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
        bench.exited(rank(&spec, 0));
        ends.push(begin.elapsed());
    }
    println!("order to started p50 {:?} p99 {:?}", percentile(&mut starts, 0.5), percentile(&mut starts, 0.99));
    println!("kill to exited p50 {:?} p99 {:?}", percentile(&mut ends, 0.5), percentile(&mut ends, 0.99));
    let spec = bench.gang(8, "echo hello; exec sleep 600");
    bench.order(&spec);
    let pids: Vec<u32> = (0..8).map(|number| bench.started(rank(&spec, number)).pid).collect();
    let shim = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pids[0] as i32))).unwrap().as_raw();
    let agent = bench.agent_pid();
    let (agent_before, shim_before, begin) = (cpu_ticks(agent), cpu_ticks(shim), Instant::now());
    while begin.elapsed() < Duration::from_secs(10) {
        bench.read(Duration::from_millis(500));
    }
    println!(
        "8 quiet ranks, 10 s: agent {} ms CPU, a shim {} ms CPU",
        (cpu_ticks(agent) - agent_before) * 10,
        (cpu_ticks(shim) - shim_before) * 10
    );
    println!(
        "rss: agent {} KiB (anon {}), shim {} KiB (anon {})",
        kib(agent, "VmRSS:"),
        kib(agent, "RssAnon:"),
        kib(shim, "VmRSS:"),
        kib(shim, "RssAnon:")
    );
}

#[test]
#[ignore = "a figure, not a check"]
fn log_lines_per_second() {
    let mut bench = Bench::new();
    let lines = 1_000_000_u64;
    // 60 bytes a line, as fast as a rank can.
    let spec = bench.gang(1, &format!("yes 'step=100 loss=2.5 tokens_per_second=123456 lr=0.0003 ok' | head -n {lines}"));
    let begin = Instant::now();
    bench.order(&spec);
    bench.send(ToAgent::OpenLog { stream: 1, job: spec.job, from: LogStart::Beginning, follow: true });
    let (mut seen, mut bytes) = (0_u64, 0_u64);
    while seen < lines {
        assert!(bench.read(PATIENCE));
        while let Some((_, data)) = bench.logs.pop_front() {
            bench.send(ToAgent::LogCredit { stream: 1, bytes: data.len() as u64 });
            bytes += data.len() as u64;
            let records = everlit_api::agent::log::Records::new(&data, true);
            seen += records.map(|record| record.data.iter().filter(|byte| **byte == b'\n').count() as u64).sum::<u64>();
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    println!("{seen} lines in {seconds:.2} s: {:.0} lines/s, {:.0} MB/s", seen as f64 / seconds, bytes as f64 / seconds / 1e6);
}
