//! `cargo sim --seeds A..B [--trace]`: the real engines of coordinator and agents in virtual time, under faults that a seed decides.
//!
//! Each seed is one run: ten minutes in which anything may break, while every checker of `check/` looks on, then a healed cluster in which
//! every job must become final within a bound. A run is a function of its seed. As a test it takes the seeds that once failed and 2,000 more.
#![allow(unreachable_pub, missing_docs)]

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

mod check;
mod coordinator;
mod copies;
mod faults;
mod jobs;
mod lies;
mod link;
mod node;
mod random;
mod ranks;
mod slow;
mod store;
mod world;

use faults::Fault;
use world::World;

/// Seeds that failed once, each with what was wrong.
const KEPT: &str = include_str!("seeds.txt");
/// Of so many seeds one is run twice, to see that it is the same run.
const TWICE_EVERY: u64 = 50;
/// With so many seeds every fault must have fired.
const ALL_FIRE_FROM: u64 = 500;

struct Outcome {
    result: Result<(), String>,
    trace: u64,
    happenings: u64,
    jobs: usize,
    faults: BTreeMap<Fault, u64>,
    told: BTreeMap<&'static str, u64>,
}

fn run(seed: u64, loud: bool) -> Outcome {
    let mut world = World::new(seed);
    world.loud = loud;
    // An assertion of an engine is a violation like any other.
    let result = catch_unwind(AssertUnwindSafe(|| world.run())).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        Err(format!("at {} ms: {}", world.now, text.unwrap_or_default()))
    });
    let (trace, happenings, jobs) = (world.trace, world.count, world.checkers.jobs());
    Outcome { result, trace, happenings, jobs, faults: world.faults.counts.clone(), told: world.told }
}

/// `A..B`, the end excluded.
fn range(text: &str) -> Option<(u64, u64)> {
    let (from, to) = text.split_once("..")?;
    let (from, to) = (from.parse().ok()?, to.parse().ok()?);
    (from < to && to <= 1 << 63).then_some((from, to))
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (mut seeds, mut loud) = ((0, 2_000), false);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--seeds" => match arguments.next().as_deref().and_then(range) {
                Some(own) => seeds = own,
                None => {
                    eprintln!("--seeds takes A..B, with A below B and B at most 2^63");
                    return ExitCode::from(2);
                }
            },
            "--trace" => loud = true,
            "--list" => return ExitCode::SUCCESS,
            // A test runner's filter that is not for this one.
            other if !other.starts_with('-') && !"simulation".contains(other) => return ExitCode::SUCCESS,
            _ => {}
        }
    }
    std::panic::set_hook(Box::new(|_| {}));
    // A reader of one run wants no other in between.
    let kept: Vec<u64> = if loud { "" } else { KEPT }.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect();
    let begun = std::time::Instant::now();
    let sum = Sum::default();
    let threads = if loud { 1 } else { std::thread::available_parallelism().map_or(1, usize::from) };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = sum.next.fetch_add(1, Ordering::Relaxed);
                    let seed = match kept.get(number as usize) {
                        Some(seed) => *seed,
                        None => seeds.0 + (number - kept.len() as u64),
                    };
                    if (number >= kept.len() as u64 && seed >= seeds.1) || sum.failed.load(Ordering::Relaxed) {
                        return;
                    }
                    sum.take(seed, &run(seed, loud));
                }
            });
        }
    });
    sum.report(seeds, kept.len(), begun.elapsed())
}

#[derive(Default)]
struct Sum {
    next: AtomicU64,
    failed: AtomicBool,
    done: Mutex<(u64, u64, usize, BTreeMap<Fault, u64>)>,
    told: Mutex<BTreeMap<&'static str, u64>>,
}

impl Sum {
    fn take(&self, seed: u64, outcome: &Outcome) {
        let again = seed.is_multiple_of(TWICE_EVERY).then(|| run(seed, false).trace);
        let why = match (&outcome.result, again) {
            (Err(why), _) => Some(why.clone()),
            (Ok(()), Some(trace)) if trace != outcome.trace => Some("the same seed ran differently the second time".into()),
            _ => None,
        };
        if let Some(why) = why
            && !self.failed.swap(true, Ordering::Relaxed)
        {
            println!("seed {seed}: {why}\n  again: cargo sim --seeds {seed}..{}", seed + 1);
        }
        let mut done = self.done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        done.0 += 1;
        done.1 += outcome.happenings;
        done.2 += outcome.jobs;
        let mut told = self.told.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        outcome.told.iter().for_each(|(name, count)| *told.entry(name).or_default() += count);
        drop(told);
        for (fault, count) in &outcome.faults {
            *done.3.entry(*fault).or_default() += count;
        }
    }

    fn report(&self, seeds: (u64, u64), kept: usize, took: std::time::Duration) -> ExitCode {
        if self.failed.load(Ordering::Relaxed) {
            return ExitCode::FAILURE;
        }
        let done = self.done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let fired: Vec<String> = Fault::ALL.iter().map(|fault| format!("{fault:?} {}", done.3.get(fault).unwrap_or(&0))).collect();
        println!("faults fired: {}", fired.join(", "));
        let told = self.told.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let counts: Vec<String> = told.iter().map(|(name, count)| format!("{name} {count}")).collect();
        println!("events: {}", counts.join(", "));
        println!(
            "simulation: {} seeds ({}..{} and {kept} kept), {} jobs, {} happenings, no violation, {:.1} s",
            done.0,
            seeds.0,
            seeds.1,
            done.2,
            done.1,
            took.as_secs_f64()
        );
        let silent: Vec<&Fault> = Fault::ALL.iter().filter(|fault| !done.3.contains_key(fault)).collect();
        if seeds.1 - seeds.0 >= ALL_FIRE_FROM && (!silent.is_empty() || told.values().any(|count| *count == 0)) {
            println!("never fired: {silent:?}, or one of the events did not come");
            return ExitCode::FAILURE;
        }
        ExitCode::SUCCESS
    }
}
