//! Which rung of the recovery ladder a failure gets: in place, or the gang. Pure, and the reason comes with the choice.
//!
//! In place the survivors keep process, model and data, and another process takes the lost rank's place, or nobody for now in an elastic
//! gang; at most the step in flight is lost. It is chosen only where it can be expected to hold: every survivor lives, has done a step and has shown in a test of its own that
//! it can; and it gets one try between two new steps. Everything else falls to the rung above, which needs none of this.

use everlit_api::job::{JobKind, RestartScope};
use everlit_api::rank::Cause;

use super::state::{Change, Gang, Job};

/// What is done about a failed rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Rung {
    /// Another process takes its place.
    InPlace,
    /// It alone is started again, after its backoff.
    Rank,
    /// All ranks are started again, for this reason.
    Gang(String),
}

/// The rung for `rank` of the current attempt, which `cause` took.
pub(super) fn decide_rung(job: &Job, rank: u32, cause: Cause) -> Rung {
    if job.gang.as_ref().is_some_and(Gang::is_spread) {
        return Rung::Gang("its ranks are on several nodes".into());
    }
    if job.spec.restart.scope == RestartScope::Rank {
        return refuse_alone(job, rank, cause).map_or(Rung::Rank, |why| Rung::Gang(why.into()));
    }
    refuse_in_place(job, rank, cause).map_or(Rung::InPlace, Rung::Gang)
}

fn refuse_alone(job: &Job, rank: u32, cause: Cause) -> Option<&'static str> {
    if is_matched(job, rank) {
        return Some("its output matches one of log_policies");
    }
    if job.spec.world_size < 2 {
        return Some("there is no other rank");
    }
    if !may_end_one(cause) && !matches!(cause, Cause::NoStart | Cause::Idle) {
        return Some("what ended it would end its successor");
    }
    job.gang.as_ref().is_some_and(|gang| gang.running_at.is_none()).then_some("not every rank had started")
}

fn is_matched(job: &Job, rank: u32) -> bool {
    job.ranks.get(rank).and_then(|own| own.exit.as_ref()).is_some_and(|exit| exit.matched.is_some())
}

/// It may end one rank and spare its successor.
fn may_end_one(cause: Cause) -> bool {
    matches!(cause, Cause::Exit | Cause::Signal | Cause::OutOfMemory | Cause::Silent | Cause::Stuck | Cause::Infrastructure)
}

fn refuse_in_place(job: &Job, rank: u32, cause: Cause) -> Option<String> {
    let gang = job.gang.as_ref()?;
    if job.spec.worker.is_none() || job.spec.kind != JobKind::Train {
        return Some("only the built-in training program recovers in place".into());
    }
    if is_matched(job, rank) {
        return Some("its output matches one of log_policies".into());
    }
    if job.spec.restart.scope == RestartScope::Gang {
        return Some("restart.scope is gang".into());
    }
    if job.spec.world_size < 2 {
        return Some("no other rank holds its state".into());
    }
    if !may_end_one(cause) {
        return Some("what ended it would end its successor".into());
    }
    if gang.regroup.as_ref().is_some_and(|under_way| under_way.change != Change::Grown || under_way.rank != rank) {
        return Some("a recovery in place was under way".into());
    }
    if gang.running_at.is_none() || job.progress.step.is_none() {
        return Some("not every rank had done a step".into());
    }
    if job.progress.reached <= gang.floor {
        return Some("no new step since the last start".into());
    }
    let mut others = job.ranks.list().iter().enumerate().filter(|(other, _)| *other as u32 != rank);
    others.find_map(|(other, own)| {
        if own.pid.is_none() || own.exit.is_some() {
            Some(format!("rank {other} is gone too"))
        } else if own.in_place != Some(true) {
            Some(format!("rank {other} has not shown that it can go on in place"))
        } else {
            None
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use everlit_api::ids::NodeId;
    use everlit_api::job::JobSpec;
    use everlit_api::rank::{LogMatch, RankExit};
    use everlit_api::status::PlacedRanks;
    use everlit_api::time::Timestamp;
    use expect_test::expect;

    use super::super::state::{Ranks, Regroup};
    use super::*;

    fn job(change: impl FnOnce(&mut Job, &mut JobSpec)) -> Job {
        let mut spec = JobSpec::default_for(3);
        let mut job = Job { ranks: Ranks::pending(3), ..Job::default() };
        for rank in 0..3 {
            job.ranks.start(rank, 100 + rank);
            job.ranks.get_mut(rank).expect("three").in_place = Some(true);
        }
        job.progress.step = Some(7);
        job.progress.reached = 7;
        job.gang = Some(Gang {
            attempt: 1,
            generation: 0,
            placement: Vec::new(),
            port: 1,
            master_addr: None,
            placed_at: Timestamp(0),
            running_at: Some(Timestamp(1)),
            resumed_step: Some(0),
            from_memory: false,
            resumes: Default::default(),
            floor: 6,
            ending: None,
            seats: Vec::new(),
            spares: Vec::new(),
            next_seat: 3,
            regroup: None,
            restarts: std::collections::BTreeMap::new(),
        });
        change(&mut job, &mut spec);
        job.spec = Arc::new(spec);
        job
    }

    #[test]
    fn in_place_is_chosen_where_it_can_hold_and_the_reason_is_told_where_not() {
        assert_eq!(decide_rung(&job(|_, _| ()), 1, Cause::Signal), Rung::InPlace);
        type Change = fn(&mut Job, &mut JobSpec);
        let cases: [(&str, Change); 10] = [
            ("program", |_, spec| spec.worker = None),
            ("line", |job, _| {
                let matched = Some(LogMatch { policy: 0, line: "ECC".into() });
                let exit = RankExit { matched, ..serde_json::from_str(r#"{"code": 1, "at": "2026-01-01T00:00:00Z"}"#).expect("an exit") };
                job.ranks.end(1, exit, false);
            }),
            ("scope", |_, spec| spec.restart.scope = RestartScope::Gang),
            ("alone", |_, spec| spec.world_size = 1),
            ("again", |job, _| {
                job.gang.as_mut().expect("some").regroup =
                    Some(Regroup { rank: 0, since: Timestamp(2), cause: Cause::Exit, change: super::super::state::Change::Replaced });
            }),
            ("start", |job, _| job.progress.step = None),
            ("repeat", |job, _| job.gang.as_mut().expect("some").floor = 7),
            ("untested", |job, _| job.ranks.get_mut(2).expect("three").in_place = None),
            ("two", |job, _| job.ranks.replace(0, None)),
            ("spread", |job, _| {
                let share = |node: &str, first_rank, count| PlacedRanks { node: NodeId(node.into()), first_rank, count, gpus: vec![] };
                job.gang.as_mut().expect("some").placement = vec![share("a", 0, 2), share("b", 2, 1)];
            }),
        ];
        let told = cases.map(|(name, change)| format!("{name}: {:?}\n", decide_rung(&job(change), 1, Cause::Signal)));
        expect![[r#"
            program: Gang("only the built-in training program recovers in place")
            line: Gang("its output matches one of log_policies")
            scope: Gang("restart.scope is gang")
            alone: Gang("no other rank holds its state")
            again: Gang("a recovery in place was under way")
            start: Gang("not every rank had done a step")
            repeat: Gang("no new step since the last start")
            untested: Gang("rank 2 has not shown that it can go on in place")
            two: Gang("rank 0 is gone too")
            spread: Gang("its ranks are on several nodes")
        "#]]
        .assert_eq(&told.concat());
        let causes = [Cause::CannotStart, Cause::NoStart, Cause::Idle, Cause::Straggler];
        assert!(causes.iter().all(|cause| decide_rung(&job(|_, _| ()), 1, *cause) != Rung::InPlace));
    }

    #[test]
    fn while_ranks_come_together_only_the_one_that_joins_may_fail_in_place() {
        let under_way = |change, rank| {
            let regroup = Some(Regroup { rank, since: Timestamp(2), cause: Cause::NoStart, change });
            decide_rung(&job(|job, _| job.gang.as_mut().expect("some").regroup = regroup), 1, Cause::Signal)
        };
        assert_eq!(under_way(Change::Grown, 1), Rung::InPlace);
        for (change, rank) in [(Change::Grown, 0), (Change::Replaced, 1), (Change::Shrunk, 1)] {
            assert_eq!(under_way(change, rank), Rung::Gang("a recovery in place was under way".into()), "{change:?} {rank}");
        }
    }
}
