//! `everlit simulate` as a user types it: the program itself, its answers, its exit codes.

use std::process::{Command, Output};

use serde_json::Value;

fn everlit(line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_everlit"));
    // A coordinator that is not there: nothing but --from-job may ask it.
    command.env_remove("EVERLIT_TOKEN").env("EVERLIT_URL", "http://127.0.0.1:9").args(line.split_whitespace());
    command.output().expect("the program runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(line: &str) -> Value {
    let output = everlit(line);
    assert!(output.status.success(), "{line}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON document")
}

const SMALL: &str = "simulate --nodes 16 --duration 3d --mtbf 4h --runs 2";

#[test]
fn the_answer_is_whole_and_the_same_again() {
    let first = json(&format!("{SMALL} --json --policy recovery=in-place,every=2m"));
    assert_eq!(first, json(&format!("{SMALL} -o json --policy recovery=in-place,every=2m")), "a seed is an answer");
    assert_ne!(first["runs"], json(&format!("{SMALL} --json --seed 9"))["runs"]);
    for run in first["runs"].as_array().expect("runs") {
        let parts = run["ledger_ms"].as_object().expect("a ledger");
        assert_eq!(parts.values().filter_map(Value::as_u64).sum::<u64>(), 3 * 86_400_000);
        let goodput = run["goodput"].as_f64().expect("a share");
        assert!((0.5..1.0).contains(&goodput), "{goodput}");
    }
    assert_eq!(first["engine"]["ranks"], 128);
    assert_eq!(first["policies"].as_array().expect("rows").len(), 3);
    assert_eq!(first["decisions"].as_array().expect("rows").len(), 3);
    for found in ["/intervals/best_ms", "/intervals/young_daly_ms", "/spares/worth", "/mean_between_failures_ms"] {
        assert!(first.pointer(found).is_some_and(Value::is_u64), "{found}");
    }
}

#[test]
fn people_get_tables_and_a_picture() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("chart.svg");
    let output = everlit(&format!("{SMALL} --svg {}", file.display()));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let answer = text(&output.stdout);
    for part in ["goodput", "training", "restoring", "worth having", "Young/Daly", "MESSAGES/S", "in-place", "best"] {
        assert!(answer.contains(part), "{part} is not in\n{answer}");
    }
    let picture = std::fs::read_to_string(&file).expect("the picture");
    assert!(picture.starts_with("<svg ") && picture.trim_end().ends_with("</svg>"));
}

#[test]
fn every_flag_that_costs_something_shows() {
    let pairs = [
        ("", "--start-time 10m"),
        ("", "--stop-time 2m"),
        ("", "--load-time 10m"),
        ("", "--save-stall 20s"),
        ("", "--save-time 20m"),
        ("", "--seen-exit 5m"),
        ("", "--seen-hang 2h"),
        ("", "--seen-corruption 20h"),
        ("", "--spares 0"),
        ("--spares 1", "--repair-time 30d"),
        ("", "--spare-time 20m"),
        ("--failure planned=40", "--planned-time 2h"),
        ("--failure planned=90 --recovery checkpoint", "--stop-grace 1s"),
        ("", "--checkpoint-every 1h"),
        ("", "--mtbf 2h"),
        ("", "--failure planned=400"),
        ("--backoff-max 10m", "--backoff-initial 10m"),
        ("--backoff-initial 10m --recovery checkpoint --checkpoint-every 2h", "--backoff-max 2h"),
        ("--max-restarts 1", "--heal-after 30d"),
        ("--heal-after 30d", "--max-restarts 1"),
        ("", "--max-start-failures 1"),
        ("--message-cost 20000", "--decisions central"),
        ("--decisions central", "--message-cost 20000"),
        ("--decisions central", "--latency 30s"),
        ("--decisions central", "--heartbeat-every 10m"),
        ("--recovery in-place", "--in-place-success 0"),
        ("--recovery in-place", "--in-place-time 10m"),
        ("--save-time 1h --failure software_bug=90", "--load-snapshot-time 10m"),
        ("--save-time 1h --failure software_bug=90", "--recovery checkpoint"),
    ];
    let slow = "--decisions central --message-cost 20000";
    let more = ["--recovery in-place", "--step-time 47s", slow, "--decisions central --message-cost 20000 --workers 16"];
    let both = pairs.iter().flat_map(|(with, worse)| [(*with).to_string(), format!("{with} {worse}")]);
    let asked: std::collections::BTreeSet<String> = both.chain(more.map(String::from)).map(|flags| flags.trim().into()).collect();
    let asked: Vec<String> = asked.into_iter().collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let known: std::collections::BTreeMap<String, f64> = std::thread::scope(|scope| {
        let parts: Vec<_> = asked.chunks(asked.len().div_ceil(cores)).collect();
        let threads: Vec<_> = parts
            .into_iter()
            .map(|part| scope.spawn(|| part.iter().map(|flags| (flags.clone(), ask(flags))).collect::<Vec<_>>()))
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("answers")).collect()
    });
    let goodput = |flags: &str| known[flags.trim()];
    for (with, worse) in pairs {
        assert!(goodput(&format!("{with} {worse}")) < goodput(with), "{with}: {worse} costs nothing");
    }
    assert!(goodput("--recovery in-place") > goodput(""));
    assert!(json("simulate --nodes 16 --duration 40d --failures none --json")["expected"]["goodput"].as_f64().expect("a share") > 0.99);
    assert!(goodput(&format!("{slow} --workers 16")) > goodput(slow));
    assert_ne!(goodput("--step-time 47s"), goodput(""));
    assert_eq!(json(&format!("{SMALL} --json --gpus-per-node 4"))["engine"]["ranks"], 64);
}

/// Long enough that every kind of failure comes.
fn ask(flags: &str) -> f64 {
    let mtbf = if flags.contains("--mtbf") { "" } else { "--mtbf 4h" };
    let answer = json(&format!("simulate --nodes 16 --duration 40d {mtbf} --runs 2 --json {flags}"));
    answer["expected"]["goodput"].as_f64().expect("a share")
}

#[test]
fn a_slip_of_the_pen_is_told_and_ends_with_2() {
    for (line, word) in [
        ("simulate --nodes 0", "nodes must be"),
        ("simulate --nodes 3 --workers 7", "multiple of the 3 nodes"),
        ("simulate --duration 0s", "duration"),
        ("simulate --duration soon", "--duration"),
        ("simulate --failure gremlins=1", "known kinds are faulty_gpu"),
        ("simulate --failure nic=-1", "from 0 on"),
        ("simulate --failures none --mtbf 1h", "nothing fails"),
        ("simulate --step-time 0s", "step"),
        ("simulate --in-place-success 1.5", "0 to 1"),
        ("simulate --checkpoint-every 0s", "checkpoints"),
        ("simulate --policy recovery=prayer", "in-place"),
        ("simulate --policy colour=red", "known are recovery"),
        ("simulate --mtbf 1s", "failures"),
        ("simulate --nodes 4294967295 --gpus-per-node 8", "GPUs"),
        ("simulate --runs 0", "--runs"),
    ] {
        let output = everlit(line);
        assert_eq!(output.status.code(), Some(2), "{line}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(word), "{line}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty(), "{line}");
    }
    // What can not be asked or written is no slip.
    assert_eq!(everlit("simulate --from-job last").status.code(), Some(1));
    assert_eq!(everlit(&format!("{SMALL} --svg /nowhere/at/all.svg")).status.code(), Some(1));
}
