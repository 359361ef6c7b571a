//! Who runs where: each scenario is a table, on the left what happens and on the right every job after it.
//!
//! `node NAME PLACES [gpus=N] [gib=N] [cpus=N] [label=K:V] [taint=K:V] [alone]` · `job N PRIORITY RANKS [gpus=N] [part=GIB] [cpus=N] [least=N] [spares=N]
//! [on=K:V] [tolerates=K[:V]] [limit=S] [grace=S]` · `ends N` (its ranks end, told to or not) · `after S` · `cordon|uncordon|drain|lose|back NAME` ·
//! `why N`. On the right: `2 a:0+8` has ranks 0 to 7 on a (`/0,1` its GPUs), `!` it saves and stops, `2 -` it waits.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use everlit_api::job::{Priority, Toleration};
use everlit_api::rank::Cause;
use everlit_api::status::{GpuInfo, JobState, Taint};
use everlit_api::time::Millis;
use expect_test::{Expect, expect};

use super::super::blame::Blame;
use super::*;

struct Table {
    scene: Scene,
    ms: u64,
    jobs: Vec<u128>,
    /// Capacity as each node said it, to say it again.
    hellos: BTreeMap<String, Hello>,
    /// Commands that were given in all.
    told: String,
}

fn number(words: &BTreeMap<&str, &str>, key: &str) -> Option<u64> {
    words.get(key).map(|text| text.parse().expect("a number"))
}

fn pair(text: &str) -> (String, String) {
    let (key, value) = text.split_once(':').unwrap_or((text, ""));
    (key.into(), value.into())
}

impl Table {
    fn new() -> Self {
        Self { scene: Scene::new(), ms: 0, jobs: Vec::new(), hellos: BTreeMap::new(), told: String::new() }
    }

    fn at(&mut self, event: Event) {
        self.scene.at(self.ms, event);
        self.settle();
    }

    /// What was placed starts at once.
    fn settle(&mut self) {
        for n in self.jobs.clone() {
            let fresh = |own: &&super::super::state::Job| own.state == JobState::Starting && own.gang.is_some();
            let Some((attempt, world)) =
                self.scene.engine.job(job(n)).filter(fresh).map(|own| (own.attempt, own.ranks.list().len() as u32))
            else {
                continue;
            };
            for r in 0..world {
                let started = Started { incarnation: rank(n, attempt, r), pid: 1_000 + r, at: Timestamp(self.ms) };
                self.scene.at(self.ms, Event::RankStarted(started));
            }
        }
        self.told.push_str(&self.scene.take());
    }

    fn node(&mut self, name: &str, slots: u64, words: &BTreeMap<&str, &str>, alone: bool) {
        let memory = number(words, "gib").unwrap_or(80) << 30;
        let gpu = |index| GpuInfo { index, name: "GPU".into(), uuid: format!("{name}-{index}"), memory };
        let gpus = (0..number(words, "gpus").unwrap_or(0) as u32).map(gpu).collect();
        let cpus = number(words, "cpus").unwrap_or(8) as f64;
        let Event::NodeLinked { hello } = hello(name, vec![]) else { unreachable!("a hello") };
        let taint = words.get("taint").map(|text| pair(text)).map(|(key, value)| Taint { key, value });
        let hello = Hello {
            capacity: Capacity { cpus, memory: 64 << 30, gpus, slots: slots as u32 },
            address: (!alone).then(|| format!("10.0.0.{name}")),
            labels: words.get("label").map(|text| pair(text)).into_iter().collect(),
            taints: taint.into_iter().collect(),
            ..*hello
        };
        self.hellos.insert(name.into(), hello.clone());
        self.at(Event::NodeLinked { hello: Box::new(hello) });
    }

    fn job(&mut self, n: u128, priority: &str, world: u64, words: &BTreeMap<&str, &str>) {
        let mut spec = command(world as u32);
        spec.priority = serde_json::from_value::<Priority>(priority.into()).expect("a priority");
        spec.resources.gpus = number(words, "gpus").unwrap_or(0) as u32;
        spec.resources.gpu_memory = number(words, "part").unwrap_or(0) << 30;
        spec.resources.cpus = number(words, "cpus").unwrap_or(0) as f64;
        spec.restart.spares = number(words, "spares").unwrap_or(0) as u32;
        spec.min_world_size = number(words, "least").map(|least| least as u32);
        spec.node_selector = words.get("on").map(|text| pair(text)).into_iter().collect();
        let tolerated = words.get("tolerates").map(|text| pair(text));
        spec.tolerations =
            tolerated.map(|(key, value)| Toleration { key, value: Some(value).filter(|v| !v.is_empty()) }).into_iter().collect();
        spec.time_limit = number(words, "limit").map(|s| Millis(s * 1_000));
        spec.stop_grace = Millis(number(words, "grace").unwrap_or(5) * 1_000);
        self.jobs.push(n);
        let plan = self.scene.engine.plan(&spec, Timestamp(self.ms));
        self.scene.submit(self.ms, n, spec);
        let gang = self.scene.engine.job(job(n)).and_then(|own| own.gang.as_ref());
        let placed = gang.map(|gang| gang.placement.clone());
        assert_eq!(plan.fits_now.then_some(plan.placement), placed, "a dry run of job {n} tells what comes: {}", plan.reason);
        self.settle();
    }

    fn ends(&mut self, n: u128) {
        let own = self.scene.engine.job(job(n)).expect("active");
        let (attempt, world) = (own.attempt, own.ranks.list().len() as u32);
        let code = if own.gang.as_ref().is_some_and(|gang| gang.ending.is_some()) { 143 } else { 0 };
        for r in 0..world {
            let exit = exit(code, self.ms);
            self.scene.at(self.ms, Event::RankExited(Exited { incarnation: rank(n, attempt, r), exit, lost: false }));
        }
        self.settle();
    }

    /// One line of a table; `Some` is what it is answered beside the jobs.
    fn line(&mut self, line: &str) -> Option<String> {
        let all: Vec<&str> = line.split_whitespace().collect();
        let words: BTreeMap<&str, &str> = all.iter().filter_map(|word| word.split_once('=')).collect();
        let plain: Vec<&str> = all.iter().copied().filter(|word| !word.contains('=')).collect();
        match plain.as_slice() {
            ["node", name, slots, rest @ ..] => self.node(name, slots.parse().expect("places"), &words, rest.contains(&"alone")),
            ["job", n, priority, world] => self.job(n.parse().expect("a number"), priority, world.parse().expect("ranks"), &words),
            ["ends", n] => self.ends(n.parse().expect("a number")),
            ["after", seconds] => {
                self.ms += seconds.parse::<u64>().expect("seconds") * 1_000;
                self.at(Event::Woke);
            }
            ["cordon", name] => self.at(Event::CordonRequested { node: node(name), cordoned: true }),
            ["uncordon", name] => self.at(Event::CordonRequested { node: node(name), cordoned: false }),
            ["drain", name] => {
                let deadline = number(&words, "within").map(|s| Millis(s * 1_000));
                self.at(Event::NodeDraining { node: node(name), cordon: true, deadline });
            }
            ["lose", name] => {
                self.at(Event::NodeUnlinked { node: node(name) });
                self.ms += 10_000;
                self.at(Event::Woke);
            }
            ["back", name] => self.at(Event::NodeLinked { hello: Box::new(self.hellos[*name].clone()) }),
            ["blame", name] => {
                let blame = Blame { at: Timestamp(self.ms), job: job(99), cause: Cause::Stuck };
                self.scene.engine.nodes.get_mut(&node(name)).expect("known").blames = vec![blame, blame];
            }
            ["why", n] => return Some(self.why(n.parse().expect("a number"))),
            _ => panic!("not a line of a table: {line}"),
        }
        None
    }

    fn why(&self, n: u128) -> String {
        let told = self.scene.engine.explain(job(n)).expect("active");
        let nodes: Vec<String> = told.nodes.iter().map(|(name, why)| format!("\n      {name} {why}")).collect();
        format!("{}{}", told.reason, nodes.concat())
    }

    fn places(&self) -> String {
        let one = |n: &u128| {
            let own = self.scene.engine.job(job(*n))?;
            let Some(gang) = &own.gang else { return Some(format!("{n} -")) };
            let share = |share: &everlit_api::status::PlacedRanks| {
                let gpus: Vec<String> = share.gpus.iter().map(ToString::to_string).collect();
                let gpus = if gpus.is_empty() { String::new() } else { format!("/{}", gpus.join(",")) };
                format!("{}:{}+{}{gpus}", share.node, share.first_rank, share.count)
            };
            let shares: Vec<String> = gang.placement.iter().map(share).collect();
            Some(format!("{n} {}{}", shares.join(" "), if gang.ending.is_some() { "!" } else { "" }))
        };
        self.jobs.iter().filter_map(one).collect::<Vec<_>>().join("  ")
    }

    fn run(&mut self, script: &str) -> String {
        let mut told = String::new();
        for line in script.lines().map(|line| line.split('|').next().unwrap_or_default().trim()).filter(|line| !line.is_empty()) {
            match self.line(line) {
                Some(answer) => writeln!(told, "{line}\n      {answer}").unwrap(),
                None if line.starts_with("node") => writeln!(told, "{line}").unwrap(),
                None => writeln!(told, "{line:<46}| {}", self.places()).unwrap(),
            }
        }
        told
    }
}

fn check(script: &str, expected: Expect) -> Table {
    let mut table = Table::new();
    expected.assert_eq(&table.run(script));
    table
}

#[test]
fn a_gang_goes_over_as_few_nodes_as_hold_it_and_the_largest_share_is_first() {
    check(
        "node a 8
         node b 4
         node c 6
         node d 8 alone
         job 1 normal 8
         job 2 normal 8
         job 3 normal 9
         job 4 normal 9
         ends 3
         job 5 normal 30
         why 5",
        expect![[r#"
            node a 8
            node b 4
            node c 6
            node d 8 alone
            job 1 normal 8                                | 1 a:0+8
            job 2 normal 8                                | 1 a:0+8  2 d:0+8
            job 3 normal 9                                | 1 a:0+8  2 d:0+8  3 c:0+6 b:6+3
            job 4 normal 9                                | 1 a:0+8  2 d:0+8  3 c:0+6 b:6+3  4 -
            ends 3                                        | 1 a:0+8  2 d:0+8  4 c:0+6 b:6+3
            job 5 normal 30                               | 1 a:0+8  2 d:0+8  4 c:0+6 b:6+3  5 -
            why 5
                  queued: no node can ever hold it: a has room for 0 of its 30 ranks, of which it could hold 8; b has room for 1 of its 30 ranks, of which it could hold 4; c has room for 0 of its 30 ranks, of which it could hold 6; d can never hold it: needs 30 ranks, has places for 8; and it has no address at which other nodes could reach a part of it; together 3 nodes could hold 18 of its 30 ranks
                  a has room for 0 of its 30 ranks, of which it could hold 8
                  b has room for 1 of its 30 ranks, of which it could hold 4
                  c has room for 0 of its 30 ranks, of which it could hold 6
                  d can never hold it: needs 30 ranks, has places for 8; and it has no address at which other nodes could reach a part of it
        "#]],
    );
}

#[test]
fn suspected_nodes_come_last_and_closed_ones_not_at_all() {
    check(
        "node a 8
         node b 4
         node c 4
         blame a
         job 1 normal 4
         job 2 normal 8
         ends 2
         cordon c
         job 3 normal 9
         ends 1
         job 4 normal 12
         why 4
         uncordon c",
        expect![[r#"
            node a 8
            node b 4
            node c 4
            blame a                                       | 
            job 1 normal 4                                | 1 b:0+4
            job 2 normal 8                                | 1 b:0+4  2 a:0+8
            ends 2                                        | 1 b:0+4
            cordon c                                      | 1 b:0+4
            job 3 normal 9                                | 1 b:0+4  3 -
            ends 1                                        | 3 a:0+5 b:5+4
            job 4 normal 12                               | 3 a:0+5 b:5+4  4 -
            why 4
                  queued: it needs several nodes: 3 could hold it, and have room for 0 of its 12 ranks now
                  a is kept for it: has room for 3 of its 12 ranks, of which it could hold 8
                  b is kept for it: has room for 0 of its 12 ranks, of which it could hold 4
                  c is cordoned
            uncordon c                                    | 3 a:0+5 b:5+4  4 -
        "#]],
    );
}

#[test]
fn a_higher_priority_has_the_fewest_lower_ones_saved_and_stopped() {
    let table = check(
        "node a 8
         node b 8
         job 1 low 4
         job 2 low 4
         job 3 normal 6
         job 4 low 2
         job 5 high 6
         why 5
         ends 2
         ends 1
         ends 5
         ends 3",
        expect![[r#"
            node a 8
            node b 8
            job 1 low 4                                   | 1 a:0+4
            job 2 low 4                                   | 1 a:0+4  2 a:0+4
            job 3 normal 6                                | 1 a:0+4  2 a:0+4  3 b:0+6
            job 4 low 2                                   | 1 a:0+4  2 a:0+4  3 b:0+6  4 b:0+2
            job 5 high 6                                  | 1 a:0+4!  2 a:0+4!  3 b:0+6  4 b:0+2  5 -
            why 5
                  queued: jobs of lower priority save and stop for it on a
                  a is kept for it: needs 6 ranks, has free places for 0
                  b needs 6 ranks, has free places for 0
            ends 2                                        | 1 a:0+4!  2 -  3 b:0+6  4 b:0+2  5 -
            ends 1                                        | 1 -  2 -  3 b:0+6  4 b:0+2  5 a:0+6
            ends 5                                        | 1 a:0+4  2 a:0+4  3 b:0+6  4 b:0+2
            ends 3                                        | 1 a:0+4  2 a:0+4  4 b:0+2
        "#]],
    );
    let told: Vec<&str> = table.told.lines().filter(|line| line.contains("preempt") || line.contains("stop job")).collect();
    expect![[r#"
        0 job 5: preempting: 2 jobs of lower priority save and stop, and leave it their places: 00000000000000000000000002, 00000000000000000000000001
        0 job 2: job_preempted: job 00000000000000000000000005 of priority high takes its places
        0 job 1: job_preempted: job 00000000000000000000000005 of priority high takes its places
        0   a <- stop job 2 attempt 1 grace 5s
        0   a <- stop job 1 attempt 1 grace 5s
    "#]].assert_eq(&(told.join("\n") + "\n"));
}

#[test]
fn nobody_is_preempted_in_vain_by_an_equal_or_twice_by_one_that_has_not_run() {
    check(
        "node a 8
         job 1 low 4
         job 2 high 4
         job 3 high 6
         job 4 normal 4
         ends 2
         ends 1
         ends 3",
        expect![[r#"
            node a 8
            job 1 low 4                                   | 1 a:0+4
            job 2 high 4                                  | 1 a:0+4  2 a:0+4
            job 3 high 6                                  | 1 a:0+4  2 a:0+4  3 -
            job 4 normal 4                                | 1 a:0+4  2 a:0+4  3 -  4 -
            ends 2                                        | 1 a:0+4!  3 -  4 -
            ends 1                                        | 1 -  3 a:0+6  4 -
            ends 3                                        | 1 a:0+4  4 a:0+4
        "#]],
    );
    check(
        "node a 8
         node b 8
         job 1 low 8
         job 2 high 16
         lose b
         ends 1
         back b
         ends 1
         job 3 critical 16
         ends 2
         job 4 low 1
         ends 3",
        expect![[r#"
            node a 8
            node b 8
            job 1 low 8                                   | 1 a:0+8
            job 2 high 16                                 | 1 a:0+8!  2 -
            lose b                                        | 1 a:0+8!  2 -
            ends 1                                        | 1 a:0+8  2 -
            back b                                        | 1 a:0+8  2 -
            ends 1                                        | 2 a:0+8 b:8+8
            job 3 critical 16                             | 2 a:0+8 b:8+8!  3 -
            ends 2                                        | 2 -  3 a:0+8 b:8+8
            job 4 low 1                                   | 2 -  3 a:0+8 b:8+8  4 -
            ends 3                                        | 2 a:0+8 b:8+8  4 -
        "#]],
    );
}

#[test]
fn what_victims_leave_is_promised_also_before_a_higher_priority_that_comes_later() {
    check(
        "node a 8
         node b 8
         job 1 low 8
         job 2 normal 8
         job 3 high 8
         job 4 critical 8
         job 5 normal 1
         ends 1
         ends 2",
        expect![[r#"
            node a 8
            node b 8
            job 1 low 8                                   | 1 a:0+8
            job 2 normal 8                                | 1 a:0+8  2 b:0+8
            job 3 high 8                                  | 1 a:0+8!  2 b:0+8  3 -
            job 4 critical 8                              | 1 a:0+8!  2 b:0+8!  3 -  4 -
            job 5 normal 1                                | 1 a:0+8!  2 b:0+8!  3 -  4 -  5 -
            ends 1                                        | 1 -  2 b:0+8!  3 a:0+8  4 -  5 -
            ends 2                                        | 1 -  2 -  3 a:0+8  4 b:0+8  5 -
        "#]],
    );
}

#[test]
fn a_later_job_goes_first_only_where_the_first_is_not_delayed() {
    check(
        "node a 8
         node b 8
         job 1 normal 6
         job 2 normal 6
         job 3 normal 9
         job 4 normal 2
         job 5 normal 3
         job 6 normal 1
         ends 1
         ends 2
         ends 3",
        expect![[r#"
            node a 8
            node b 8
            job 1 normal 6                                | 1 a:0+6
            job 2 normal 6                                | 1 a:0+6  2 b:0+6
            job 3 normal 9                                | 1 a:0+6  2 b:0+6  3 -
            job 4 normal 2                                | 1 a:0+6  2 b:0+6  3 -  4 -
            job 5 normal 3                                | 1 a:0+6  2 b:0+6  3 -  4 -  5 -
            job 6 normal 1                                | 1 a:0+6  2 b:0+6  3 -  4 -  5 -  6 b:0+1
            ends 1                                        | 2 b:0+6  3 a:0+8 b:8+1  4 -  5 -  6 b:0+1
            ends 2                                        | 3 a:0+8 b:8+1  4 b:0+2  5 b:0+3  6 b:0+1
            ends 3                                        | 4 b:0+2  5 b:0+3  6 b:0+1
        "#]],
    );
}

#[test]
fn one_that_has_ended_in_time_may_use_what_is_reserved() {
    check(
        "node a 8
         job 1 normal 6 limit=100
         job 2 normal 8
         job 3 normal 2 limit=99
         job 4 normal 2 limit=200
         job 5 normal 1 limit=10 grace=0
         ends 3
         after 50
         ends 5
         job 6 normal 2 limit=51
         job 7 normal 2 limit=50
         ends 1",
        expect![[r#"
            node a 8
            job 1 normal 6 limit=100                      | 1 a:0+6
            job 2 normal 8                                | 1 a:0+6  2 -
            job 3 normal 2 limit=99                       | 1 a:0+6  2 -  3 a:0+2
            job 4 normal 2 limit=200                      | 1 a:0+6  2 -  3 a:0+2  4 -
            job 5 normal 1 limit=10 grace=0               | 1 a:0+6  2 -  3 a:0+2  4 -  5 -
            ends 3                                        | 1 a:0+6  2 -  4 -  5 a:0+1
            after 50                                      | 1 a:0+6  2 -  4 -  5 a:0+1!
            ends 5                                        | 1 a:0+6  2 -  4 -
            job 6 normal 2 limit=51                       | 1 a:0+6  2 -  4 -  6 -
            job 7 normal 2 limit=50                       | 1 a:0+6  2 -  4 -  6 -  7 a:0+2
            ends 1                                        | 2 -  4 -  6 -  7 a:0+2
        "#]],
    );
}

#[test]
fn small_jobs_without_end_never_delay_a_big_one_beyond_what_ran_before() {
    let mut table = Table::new();
    table.run("node a 8\n node b 8\n node c 8\n node d 4\n job 1 normal 8\n job 2 normal 2\n job 3 normal 2\n job 4 normal 20");
    // A small one comes and another ends all the time; of those that ran before, one after the other.
    let placed = |table: &Table, n: u128| table.scene.engine.job(job(n)).is_some_and(|own| own.gang.is_some());
    let (mut running, mut ended): (Vec<u128>, u32) = (Vec::new(), 0);
    for round in 0..60u128 {
        table.run(&format!("job {} normal {}\n after 1", 100 + round, 1 + round % 3));
        running.extend((100..=100 + round).filter(|n| placed(&table, *n) && !running.contains(n)).collect::<Vec<_>>());
        if round % 2 == 1
            && let Some(first) = running.first().copied()
        {
            running.remove(0);
            ended += 1;
            table.run(&format!("ends {first}"));
        }
        match round {
            20 => drop(table.run("ends 2")),
            30 => drop(table.run("ends 3")),
            40 => {
                assert!(!placed(&table, 4), "it needs what job 1 has");
                table.run("ends 1");
                assert!(placed(&table, 4), "all that ran before it have ended: {}", table.places());
            }
            _ => {}
        }
    }
    assert!(ended > 10, "small ones went all the same: {ended}, {}", table.places());
}

#[test]
fn ranks_share_gpus_by_memory_and_whole_ones_are_for_one_alone() {
    check(
        "node a 16 gpus=2 gib=80
         job 1 normal 3 part=30
         job 2 normal 1 gpus=1
         job 3 normal 2 part=20
         job 4 normal 1 part=20
         why 4
         job 5 normal 1 part=81
         why 5
         ends 3
         ends 1
         job 6 normal 1 gpus=1 part=100
         why 6",
        expect![[r#"
            node a 16 gpus=2 gib=80
            job 1 normal 3 part=30                        | 1 a:0+3/0,0,1
            job 2 normal 1 gpus=1                         | 1 a:0+3/0,0,1  2 -
            job 3 normal 2 part=20                        | 1 a:0+3/0,0,1  2 -  3 a:0+2/1,1
            job 4 normal 1 part=20                        | 1 a:0+3/0,0,1  2 -  3 a:0+2/1,1  4 -
            why 4
                  queued behind 1 jobs: a keeps room for jobs before it (needs 20.0 GiB of GPU memory for each of 1 ranks, has free that for 0)
                  a keeps room for jobs before it (needs 20.0 GiB of GPU memory for each of 1 ranks, has free that for 0)
            job 5 normal 1 part=81                        | 1 a:0+3/0,0,1  2 -  3 a:0+2/1,1  4 -  5 -
            why 5
                  queued: no node can ever hold it: a can never hold it: needs 81.0 GiB of GPU memory for each of 1 ranks, has that for 0
                  a can never hold it: needs 81.0 GiB of GPU memory for each of 1 ranks, has that for 0
            ends 3                                        | 1 a:0+3/0,0,1  2 -  4 a:0+1/1  5 -
            ends 1                                        | 2 a:0+1/0  4 a:0+1/1  5 -
            job 6 normal 1 gpus=1 part=100                | 2 a:0+1/0  4 a:0+1/1  5 -  6 -
            why 6
                  queued: no node can ever hold it: a can never hold it: needs 100.0 GiB of GPU memory for each rank, GPU 0 has 80.0 GiB
                  a can never hold it: needs 100.0 GiB of GPU memory for each rank, GPU 0 has 80.0 GiB
        "#]],
    );
}

#[test]
fn labels_and_taints_choose_the_nodes_and_what_none_ever_has_is_said_at_once() {
    check(
        "node a 8 label=zone:x
         node b 8 label=zone:y taint=team:vision
         node c 8 taint=old
         job 1 normal 2 on=zone:y
         why 1
         job 2 normal 2 on=zone:y tolerates=team:vision
         job 3 normal 2 on=zone:y tolerates=team:speech
         job 4 normal 2 on=zone:z
         why 4
         job 5 normal 7
         job 6 normal 12 tolerates=old
         job 7 normal 1
         ends 5",
        expect![[r#"
            node a 8 label=zone:x
            node b 8 label=zone:y taint=team:vision
            node c 8 taint=old
            job 1 normal 2 on=zone:y                      | 1 -
            why 1
                  queued: no node can ever hold it: a has the label zone=x, not zone=y (node_selector); b has the taint team=vision, which the job does not tolerate; c has no label zone=y (node_selector)
                  a has the label zone=x, not zone=y (node_selector)
                  b has the taint team=vision, which the job does not tolerate
                  c has no label zone=y (node_selector)
            job 2 normal 2 on=zone:y tolerates=team:vision| 1 -  2 b:0+2
            job 3 normal 2 on=zone:y tolerates=team:speech| 1 -  2 b:0+2  3 -
            job 4 normal 2 on=zone:z                      | 1 -  2 b:0+2  3 -  4 -
            why 4
                  queued: no node can ever hold it: a has the label zone=x, not zone=z (node_selector); b has the label zone=y, not zone=z (node_selector); c has no label zone=z (node_selector)
                  a has the label zone=x, not zone=z (node_selector)
                  b has the label zone=y, not zone=z (node_selector)
                  c has no label zone=z (node_selector)
            job 5 normal 7                                | 1 -  2 b:0+2  3 -  4 -  5 a:0+7
            job 6 normal 12 tolerates=old                 | 1 -  2 b:0+2  3 -  4 -  5 a:0+7  6 -
            job 7 normal 1                                | 1 -  2 b:0+2  3 -  4 -  5 a:0+7  6 -  7 -
            ends 5                                        | 1 -  2 b:0+2  3 -  4 -  6 a:0+8 c:8+4  7 -
        "#]],
    );
}

#[test]
fn a_dry_run_tells_why_a_job_would_go_before_others() {
    let mut table = Table::new();
    table.run(
        "node a 8
         job 1 normal 6 limit=100
         job 2 normal 8",
    );
    let plan = |world, limit: Option<u64>| {
        let spec = JobSpec { time_limit: limit.map(Millis::secs), stop_grace: Millis::secs(5), ..command(world) };
        let plan = table.scene.engine.plan(&spec, Timestamp(table.ms));
        format!("{} {}\n", plan.fits_now, plan.reason)
    };
    expect![[r#"
        false a keeps room for jobs before it (needs 2 ranks, has free places for 0)
        true it would start at once: its time_limit ends before those have that the first in the queue waits for
        false a keeps room for jobs before it (needs 2 ranks, has free places for 0)
        false a needs 3 ranks, has free places for 0
    "#]]
    .assert_eq(&(plan(2, None) + &plan(2, Some(100)) + &plan(2, Some(101)) + &plan(3, Some(1))));
}

#[test]
fn a_drain_with_a_deadline_leaves_no_grace_beyond_it() {
    let table = check(
        "node a 8
         node b 8
         job 1 normal 6 grace=60
         job 2 normal 10 grace=3
         drain a within=10
         ends 2
         ends 1
         uncordon a
         drain a within=10
         drain a within=1",
        expect![[r#"
            node a 8
            node b 8
            job 1 normal 6 grace=60                       | 1 a:0+6
            job 2 normal 10 grace=3                       | 1 a:0+6  2 b:0+8 a:8+2
            drain a within=10                             | 1 a:0+6!  2 b:0+8 a:8+2!
            ends 2                                        | 1 a:0+6!  2 -
            ends 1                                        | 1 b:0+6  2 -
            uncordon a                                    | 1 b:0+6  2 a:0+8 b:8+2
            drain a within=10                             | 1 b:0+6  2 a:0+8 b:8+2!
            drain a within=1                              | 1 b:0+6  2 a:0+8 b:8+2!
        "#]],
    );
    let told: Vec<&str> = table.told.lines().filter(|line| line.contains("stop job")).collect();
    expect![[r#"
        0   a <- stop job 1 attempt 1 grace 10s
        0   b <- stop job 2 attempt 1 grace 3s
        0   a <- stop job 2 attempt 1 grace 3s
        0   a <- stop job 2 attempt 2 grace 3s
        0   b <- stop job 2 attempt 2 grace 3s
        0   a <- stop job 2 attempt 2 grace 1s
        0   b <- stop job 2 attempt 2 grace 1s
    "#]]
    .assert_eq(&(told.join("\n") + "\n"));
}

#[test]
fn a_gang_of_several_nodes_that_loses_one_is_stopped_on_the_others_before_it_is_placed_again() {
    let table = check(
        "node a 8
         node b 8
         node c 8
         job 1 normal 16
         lose c
         ends 1
         lose b
         node d 8
         after 10
         ends 1
         back b",
        expect![[r#"
            node a 8
            node b 8
            node c 8
            job 1 normal 16                               | 1 a:0+8 c:8+8
            lose c                                        | 1 a:0+8 c:8+8!
            ends 1                                        | 1 a:0+8 b:8+8
            lose b                                        | 1 a:0+8 b:8+8
            node d 8
            after 10                                      | 1 a:0+8 b:8+8!
            ends 1                                        | 1 a:0+8 d:8+8
            back b                                        | 1 a:0+8 d:8+8
        "#]],
    );
    expect![[r#"
        0 node_ready: a joined
        0 node_ready: b joined
        0 node_ready: c joined
        0 job 1: job_submitted: accepted
        0 job 1: attempt_placed: attempt 1 is starting on a, c
        0   a <- start job 1 attempt 1 ranks 0+8 port 29500
        0   c <- start job 1 attempt 1 ranks 8+8 port 29500
        0 job 1: job_running: all 16 ranks of attempt 1 run
        10000 node_lost: c was not heard of for 10 s
        10000 job 1: gang_failed: c was lost
        10000   a <- stop job 1 attempt 1 grace 5s
        10000   c <- stop job 1 attempt 1 grace 5s
        10000 job 1: job_queued: waiting for a place: c was lost
        10000 job 1: attempt_placed: attempt 2 is starting on a, b
        10000   a <- forget 1.1.0 1.1.1 1.1.2 1.1.3 1.1.4 1.1.5 1.1.6 1.1.7
        10000   c <- forget 1.1.8 1.1.9 1.1.10 1.1.11 1.1.12 1.1.13 1.1.14 1.1.15
        10000   a <- start job 1 attempt 2 ranks 0+8 port 29501
        10000   b <- start job 1 attempt 2 ranks 8+8 port 29501
        10000 job 1: job_running: all 16 ranks of attempt 2 run
        10000 node_lost: b was not heard of for 10 s
        20000 node_ready: d joined
        30000 job 1: gang_failed: b was lost
        30000   a <- stop job 1 attempt 2 grace 5s
        30000   b <- stop job 1 attempt 2 grace 5s
        30000 job 1: job_queued: waiting for a place: b was lost
        30000 job 1: attempt_placed: attempt 3 is starting on a, d
        30000   a <- forget 1.2.0 1.2.1 1.2.2 1.2.3 1.2.4 1.2.5 1.2.6 1.2.7
        30000   b <- forget 1.2.8 1.2.9 1.2.10 1.2.11 1.2.12 1.2.13 1.2.14 1.2.15
        30000   a <- start job 1 attempt 3 ranks 0+8 port 29502
        30000   d <- start job 1 attempt 3 ranks 8+8 port 29502
        30000 job 1: job_running: all 16 ranks of attempt 3 run
        30000 node_ready: b is back
    "#]]
    .assert_eq(&table.told);
}

#[test]
fn whom_a_job_does_without_runs_on() {
    check(
        "node a 8
         job 1 low 4
         job 2 low 3
         job 3 low 1
         job 4 normal 7
         ends 2
         ends 1",
        expect![[r#"
            node a 8
            job 1 low 4                                   | 1 a:0+4
            job 2 low 3                                   | 1 a:0+4  2 a:0+3
            job 3 low 1                                   | 1 a:0+4  2 a:0+3  3 a:0+1
            job 4 normal 7                                | 1 a:0+4!  2 a:0+3!  3 a:0+1  4 -
            ends 2                                        | 1 a:0+4!  2 -  3 a:0+1  4 -
            ends 1                                        | 1 -  2 -  3 a:0+1  4 a:0+7
        "#]],
    );
}

#[test]
fn spares_are_only_with_a_gang_on_one_node_and_an_elastic_one_takes_the_most_of_one() {
    check(
        "node a 8
         node b 3
         job 1 normal 7 spares=2
         ends 1
         job 2 normal 6 spares=2
         job 3 normal 3
         node c 5
         job 4 normal 12 least=2",
        expect![[r#"
            node a 8
            node b 3
            job 1 normal 7 spares=2                       | 1 a:0+6 b:6+1
            ends 1                                        | 
            job 2 normal 6 spares=2                       | 2 a:0+6
            job 3 normal 3                                | 2 a:0+6  3 b:0+3
            node c 5
            job 4 normal 12 least=2                       | 2 a:0+6  3 b:0+3  4 c:0+5
        "#]],
    );
}

#[test]
fn each_node_of_a_gang_is_told_its_part_and_where_rank_0_is() {
    let mut table = Table::new();
    table.run("node 1 8\n node 2 4\n job 1 normal 10\n node 3 16\n job 2 normal 16");
    let frames = |n| table.scene.engine.job(job(n)).expect("active").start_frames(0).into_iter();
    let part = |(node, frame): (NodeId, ToAgent)| {
        let ToAgent::StartGang(gang) = frame else { panic!("a start") };
        let (own, of) = (gang.group_rank, gang.group_world_size);
        format!(
            "{node}: ranks {}+{} of {}, node {own} of {of}, rank 0 at {}\n",
            gang.first_rank, gang.count, gang.world_size, gang.master_addr
        )
    };
    expect![[r#"
        1: ranks 0+8 of 10, node 0 of 2, rank 0 at 10.0.0.1
        2: ranks 8+2 of 10, node 1 of 2, rank 0 at 10.0.0.1
        3: ranks 0+16 of 16, node 0 of 1, rank 0 at 127.0.0.1
    "#]]
    .assert_eq(&frames(1).chain(frames(2)).map(part).collect::<String>());
}

#[test]
fn where_one_node_can_not_start_its_part_the_others_are_stopped_and_awaited() {
    let mut table = Table::new();
    table.run("node a 8\n node b 4\n job 1 normal 10");
    let refused = |permanent| Event::StartFailed { node: node("b"), job: job(1), attempt: 1, reason: "the disk is full".into(), permanent };
    table.told.clear();
    table.at(refused(false));
    assert_eq!(table.places(), "1 a:0+8 b:8+2!");
    for r in 0..8 {
        table.at(Event::RankExited(Exited { incarnation: rank(1, 1, r), exit: exit(143, 0), lost: false }));
    }
    table.line("after 1");
    expect![[r#"
        0 job 1: gang_failed: b: the disk is full
        0   a <- stop job 1 attempt 1 grace 5s
        0   b <- stop job 1 attempt 1 grace 5s
        0 job 1: restart_scheduled: attempt 2 in 500 ms: restart without cost to the budget
        0   a <- forget 1.1.0 1.1.1 1.1.2 1.1.3 1.1.4 1.1.5 1.1.6 1.1.7
        0   b <- forget 1.1.8 1.1.9
        1000 job 1: attempt_placed: attempt 2 is starting on a, b
        1000   a <- start job 1 attempt 2 ranks 0+8 port 29501
        1000   b <- start job 1 attempt 2 ranks 8+2 port 29501
    "#]]
    .assert_eq(&table.told);
}
