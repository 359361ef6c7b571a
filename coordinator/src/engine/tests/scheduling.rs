//! Who runs where: each scenario is a table, on the left what happens and on the right every job after it.
//!
//! `node NAME PLACES [gpus=N] [gib=N] [cpus=N] [label=K:V] [taint=K:V] [alone]` · `job N PRIORITY RANKS [gpus=N] [part=GIB] [cpus=N] [least=N]
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
        spec.min_world_size = number(words, "least").map(|least| least as u32);
        spec.node_selector = words.get("on").map(|text| pair(text)).into_iter().collect();
        let tolerated = words.get("tolerates").map(|text| pair(text));
        spec.tolerations = tolerated.map(|(key, value)| Toleration { key, value: Some(value).filter(|v| !v.is_empty()) }).into_iter().collect();
        spec.time_limit = number(words, "limit").map(|s| Millis(s * 1_000));
        spec.stop_grace = Millis(number(words, "grace").unwrap_or(5) * 1_000);
        self.jobs.push(n);
        self.scene.submit(self.ms, n, spec);
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
                None => writeln!(told, "{line:<34}| {}", self.places()).unwrap(),
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
            job 1 normal 8                    | 1 a:0+8
            job 2 normal 8                    | 1 a:0+8  2 d:0+8
            job 3 normal 9                    | 1 a:0+8  2 d:0+8  3 c:0+6 b:6+3
            job 4 normal 9                    | 1 a:0+8  2 d:0+8  3 c:0+6 b:6+3  4 -
            ends 3                            | 1 a:0+8  2 d:0+8  4 c:0+6 b:6+3
            job 5 normal 30                   | 1 a:0+8  2 d:0+8  4 c:0+6 b:6+3  5 -
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
            blame a                           | 
            job 1 normal 4                    | 1 b:0+4
            job 2 normal 8                    | 1 b:0+4  2 a:0+8
            ends 2                            | 1 b:0+4
            cordon c                          | 1 b:0+4
            job 3 normal 9                    | 1 b:0+4  3 -
            ends 1                            | 3 a:0+5 b:5+4
            job 4 normal 12                   | 3 a:0+5 b:5+4  4 -
            why 4
                  queued: it needs several nodes: 3 could hold it, and have room for 0 of its 12 ranks now
                  a is kept for it: has room for 3 of its 12 ranks, of which it could hold 8
                  b is kept for it: has room for 0 of its 12 ranks, of which it could hold 4
                  c is cordoned
            uncordon c                        | 3 a:0+5 b:5+4  4 -
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
            job 1 low 4                       | 1 a:0+4
            job 2 low 4                       | 1 a:0+4  2 a:0+4
            job 3 normal 6                    | 1 a:0+4  2 a:0+4  3 b:0+6
            job 4 low 2                       | 1 a:0+4  2 a:0+4  3 b:0+6  4 b:0+2
            job 5 high 6                      | 1 a:0+4!  2 a:0+4!  3 b:0+6  4 b:0+2  5 -
            why 5
                  queued: jobs of lower priority save and stop for it on a
                  a is kept for it: needs 6 ranks, has free places for 0
                  b needs 6 ranks, has free places for 0
            ends 2                            | 1 a:0+4!  2 -  3 b:0+6  4 b:0+2  5 -
            ends 1                            | 1 -  2 -  3 b:0+6  4 b:0+2  5 a:0+6
            ends 5                            | 1 a:0+4  2 a:0+4  3 b:0+6  4 b:0+2
            ends 3                            | 1 a:0+4  2 a:0+4  4 b:0+2
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
