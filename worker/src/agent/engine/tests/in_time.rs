//! Whatever happens, the engine asks to be woken no later than something is due: nothing is, a millisecond before it does.

use everlit_api::job::WorkerSpec;
use everlit_api::manifest::Phase;
use proptest::prelude::*;

use super::*;

/// What happens next, with the milliseconds until then.
#[derive(Debug, Clone)]
enum Next {
    Step(u32),
    Beat(u32),
    Saves(u32),
    Output(u32),
    Disk(Option<u64>),
    Ends(u32),
    Stop(u64),
    Unlinked,
    Linked,
    EndAsked,
    Joins,
}

fn next() -> impl Strategy<Value = (u64, Next)> {
    let rank = 0..2_u32;
    let what = prop_oneof![
        12 => rank.clone().prop_map(Next::Step),
        12 => rank.clone().prop_map(Next::Beat),
        2 => rank.clone().prop_map(Next::Saves),
        4 => rank.clone().prop_map(Next::Output),
        4 => prop_oneof![Just(None), Just(Some(1)), Just(Some(1)), Just(Some(900))].prop_map(Next::Disk),
        1 => rank.prop_map(Next::Ends),
        1 => (0..3_000_u64).prop_map(Next::Stop),
        1 => Just(Next::Unlinked),
        1 => Just(Next::Linked),
        1 => Just(Next::EndAsked),
        1 => Just(Next::Joins),
    ];
    (prop_oneof![0..5_u64, 0..300_u64, 0..4_000_u64, 0..40_000_u64], what)
}

struct World {
    s: Scene,
    seq: u64,
    steps: [u64; 3],
    /// How the disk answers.
    disk: Option<u64>,
    /// It asked for its end.
    over: bool,
}

impl World {
    fn new(found: bool, ours: bool, heartbeats: bool, timeout: u64, progress: Option<u64>, idle: Option<u64>) -> Self {
        let mut s = scene(2);
        if ours {
            s.spec.program = everlit_api::agent::Program::Worker { worker: Box::new(WorkerSpec::for_world(2)), evaluate: false };
        }
        s.spec.heartbeat.timeout = Millis(timeout);
        s.spec.heartbeat.progress_timeout = progress.map(Millis);
        s.spec.heartbeat.idle_timeout = idle.map(Millis);
        if found {
            // By an agent after the one that did not come to start them, some time after its own start.
            s.now = 7;
            let Event::GangPrepared { resumed, .. } = s.prepared() else { unreachable!() };
            let spec = Box::new(s.spec.clone());
            s.engine.handle(s.now, Event::GangFound { spec, resumed: Some(resumed), ranks: vec![0, 1], unstarted: vec![0, 1] });
        } else {
            s.running();
        }
        let mut world = Self { s, seq: 0, steps: [0; 3], disk: Some(1), over: false };
        // Its pace is learned.
        for _ in 0..if heartbeats && !found { 40 } else { 0 } {
            world.until(world.s.now + 100);
            (0..2).for_each(|rank| world.happens(&Next::Step(rank)));
        }
        world
    }

    fn handle(&mut self, event: Event) {
        let mut actions: std::collections::VecDeque<_> = self.s.engine.handle(self.s.now, event).into();
        while let Some(action) = actions.pop_front() {
            match action {
                Action::ReadCpu(incarnation) => actions.extend(self.s.engine.handle(self.s.now, Event::CpuRead { incarnation, cpu_ms: 7 })),
                Action::Probe(_) => actions.extend(self.s.engine.handle(self.s.now, Event::Probed { took_ms: self.disk })),
                Action::LeaveOut(incarnation) => {
                    let exit = no_exit("was not started", Timestamp(9));
                    actions.extend(self.s.engine.handle(self.s.now, Event::RankEnded { incarnation, exit, lost: true }));
                }
                Action::Exit(_) => self.over = true,
                _ => {}
            }
        }
    }

    /// Nothing was due before now: who looks unasked, and after the disk as well, finds nothing to do.
    fn not_late(&self, now: u64) {
        let mut other = self.s.engine.clone();
        other.wake_at = Some(now);
        let mut done = other.handle(now, Event::DeadlinePassed);
        if done.iter().any(|action| matches!(action, Action::Probe(_))) {
            done.extend(other.handle(now, Event::Probed { took_ms: self.disk }));
        }
        done.retain(|action| !matches!(action, Action::Probe(_)));
        assert!(done.is_empty(), "due by {now} and asked to be woken at {:?}: {done:?}", self.s.engine.wake_at);
    }

    /// Lets time pass and wakes the engine when it asks for it.
    fn until(&mut self, until: u64) {
        for _ in 0..10_000 {
            let at = self.s.engine.next_deadline().unwrap_or(u64::MAX).max(self.s.now);
            let next = at.min(until);
            if next > self.s.now + 1 && !self.over {
                self.not_late(next - 1);
            }
            self.s.now = next;
            if at > until || self.over {
                return;
            }
            self.handle(Event::DeadlinePassed);
        }
        panic!("woken ten thousand times in vain");
    }

    fn beat(&mut self, rank: u32, phase: Phase) {
        self.seq += 1;
        let incarnation = self.s.own(rank);
        let step = self.steps[rank as usize];
        let beat = Beat {
            incarnation: Some(incarnation),
            heartbeat: true,
            phase: Some(phase),
            step: Some(step),
            in_place: Some(true),
            ..Beat::default()
        };
        self.handle(Event::HeartbeatRead { incarnation, seq: self.seq, beat: Box::new(beat), save_error: None });
    }

    fn happens(&mut self, what: &Next) {
        match what {
            Next::Step(rank) => {
                self.steps[*rank as usize] += 1;
                self.beat(*rank, Phase::Train);
            }
            Next::Beat(rank) => self.beat(*rank, Phase::Train),
            Next::Saves(rank) => self.beat(*rank, Phase::Checkpoint),
            Next::Output(rank) => self.handle(Event::RankOutput(self.s.own(*rank))),
            Next::Disk(took) => self.disk = *took,
            Next::Ends(rank) => self.handle(self.s.ended(*rank, 1)),
            Next::Stop(grace) => self.handle(self.s.stop(*grace)),
            Next::Unlinked => self.handle(Event::Unlinked),
            Next::Linked => self.handle(Event::Linked),
            Next::EndAsked => self.handle(Event::EndAsked),
            Next::Joins => {
                let generation = self.s.spec.generation + 1;
                self.s.spec = GangSpec { generation, seats: vec![0, 2], ..self.s.spec.clone() };
                self.handle(Event::GangOrdered(Box::new(self.s.spec.clone())));
                self.handle(Event::RankStarted { incarnation: self.s.own(2), pid: 102, at: Timestamp(9) });
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_due_before_it_asks_to_be_woken(
        found in prop::bool::weighted(0.2),
        ours in any::<bool>(),
        heartbeats in prop::bool::weighted(0.8),
        timeout in prop_oneof![Just(1_000), Just(10_000), 1_000..30_000_u64],
        progress in prop_oneof![3 => Just(None), 1 => (1_000..20_000_u64).prop_map(Some)],
        idle in prop_oneof![Just(None), (1_000..20_000_u64).prop_map(Some)],
        story in prop::collection::vec(next(), 1..60),
    ) {
        let mut world = World::new(found, ours, heartbeats, timeout, progress, idle);
        for (after, what) in &story {
            let at = world.s.now + after;
            world.until(at);
            if world.over {
                return Ok(());
            }
            if (found || !heartbeats) && matches!(what, Next::Step(_) | Next::Beat(_) | Next::Saves(_)) {
                continue;
            }
            world.happens(what);
        }
        world.until(world.s.now + 60_000);
    }
}
