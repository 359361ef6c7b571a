//! Elastic gangs: they go on with fewer ranks, begin with fewer, and grow when there is room.

use everlit_api::status::JobState;
use expect_test::expect;

use super::super::limits::REGROUP_MAX_MS;
use super::in_place::{starts, steps, trains};
use super::*;

/// Three ranks that did seven steps and may go on as one or two.
fn elastic() -> Scene {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, JobSpec { min_world_size: Some(1), ..trains(3, 0) });
    scene.start_all(10, 1, 1, 3);
    steps(&mut scene, 900, 0, &[0, 1, 2], 7);
    scene.take();
    scene
}

/// A process that waits says that it can take a place.
fn is_ready(scene: &mut Scene, ms: u64, seat: u32) {
    scene.at(ms, Event::RanksBeat(vec![Beat { in_place: Some(true), step: None, ..beat(rank(1, 1, seat), 0) }]));
}

#[test]
fn an_elastic_gang_goes_on_with_fewer_at_once_and_grows_back_when_another_is_ready() {
    let mut scene = elastic();
    scene.exits(1_000, rank(1, 1, 0), killed(999));
    // The last rank took the lost one's number.
    assert_eq!(scene.summary(1).ranks.iter().map(|own| own.pid).collect::<Vec<_>>(), [Some(102), Some(101)]);
    starts(&mut scene, 1_100, 3);
    is_ready(&mut scene, 1_200, 3);
    assert_eq!(scene.summary(1).state, JobState::Recovering, "nobody joins before those who are left step");
    steps(&mut scene, 1_300, 1, &[2, 1], 8);
    assert_eq!((scene.summary(1).state, scene.summary(1).ranks.len(), scene.summary(1).spares.len()), (JobState::Running, 3, 0));
    steps(&mut scene, 1_600, 2, &[2, 1, 3], 12);
    let summary = scene.summary(1);
    assert_eq!((summary.state, summary.attempt, summary.restarts, summary.lost_steps), (JobState::Running, 1, 1, 0));
    scene.expect(expect![[r#"
        1000 job 1: gang_shrunk: rank 0 ended with signal 9 (SIGKILL); going on with 2 ranks until another can join
        1000   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [2, 1] spares [3]
        1000   n1 <- forget 1.1.0
        1300 job 1: recovered_in_place: 2 ranks go on without one; all ranks step again after 300 ms
        1300 job 1: gang_growing: a process that was ready joins as rank 2
        1300   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [2, 1] spares [3]
        1300   n1 <- start job 1 attempt 1 ranks 0+3 port 29500 membership 2 [2, 1, 3]
        1600 job 1: gang_grown: rank 2 has joined; all ranks step again after 300 ms
    "#]]);
}

#[test]
fn who_joins_a_smaller_gang_and_dies_costs_nothing_and_is_tried_again_later() {
    let mut scene = elastic();
    scene.exits(1_000, rank(1, 1, 2), killed(999));
    steps(&mut scene, 1_300, 1, &[0, 1], 8);
    starts(&mut scene, 1_400, 3);
    scene.take();
    // While it waits.
    scene.exits(1_500, rank(1, 1, 3), killed(1_499));
    scene.at(31_499, Event::Woke).at(31_500, Event::Woke);
    starts(&mut scene, 31_600, 4);
    is_ready(&mut scene, 31_700, 4);
    // While the others come to meet it.
    scene.exits(31_800, rank(1, 1, 4), killed(31_799));
    steps(&mut scene, 32_000, 3, &[0, 1], 300);
    assert_eq!((scene.summary(1).state, scene.summary(1).restarts, scene.summary(1).ranks.len()), (JobState::Running, 1, 2));
    scene.at(61_800, Event::Woke);
    scene.expect(expect![[r#"
        1500 job 1: spare_lost: a spare ended with signal 9 (SIGKILL); another one starts later
        1500   n1 <- forget 1.1.3
        31500   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [0, 1] spares [4]
        31700 job 1: gang_growing: a process that was ready joins as rank 2
        31700   n1 <- start job 1 attempt 1 ranks 0+3 port 29500 membership 2 [0, 1, 4]
        31800 job 1: gang_shrunk: rank 2 ended with signal 9 (SIGKILL); going on with 2 ranks until another can join
        31800   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 3 [0, 1]
        31800   n1 <- forget 1.1.4
        32000 job 1: recovered_in_place: 2 ranks go on without one; all ranks step again after 200 ms
        32000   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 3 [0, 1]
        61800   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 3 [0, 1] spares [5]
    "#]]);
}

#[test]
fn a_coordinator_that_dies_with_a_smaller_gang_has_it_grow_back() {
    let mut scene = elastic();
    scene.exits(1_000, rank(1, 1, 1), killed(999));
    steps(&mut scene, 1_300, 1, &[0, 2], 8);
    starts(&mut scene, 1_400, 3);
    scene.exits(1_500, rank(1, 1, 3), killed(1_499));
    scene.take();
    scene.restart_coordinator(1_600);
    scene.at(1_700, hello("n1", vec![alive(rank(1, 1, 0), 100), alive(rank(1, 1, 2), 102)]));
    assert_eq!(scene.summary(1).ranks.len(), 2);
    scene.expect(expect![[r#"
        1700   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [0, 2]
        1700   n1 <- start job 1 attempt 1 ranks 0+2 port 29500 membership 1 [0, 2] spares [4]
    "#]]);
}

/// A node with two free places, and a gang of two to four ranks.
fn begins_small() -> Scene {
    let mut scene = Scene::with_node();
    scene.submit(0, 2, command(6));
    scene.start_all(1, 2, 1, 6);
    scene.submit(5, 1, JobSpec { min_world_size: Some(2), ..trains(4, 0) });
    scene
}

fn others_end(scene: &mut Scene, ms: u64) {
    for seat in 0..6 {
        scene.exits(ms, rank(2, 1, seat), exit(0, ms));
    }
}

#[test]
fn a_gang_begins_with_fewer_ranks_where_there_is_no_room_for_all_and_takes_what_becomes_free() {
    let mut scene = begins_small();
    scene.start_all(10, 1, 1, 2);
    steps(&mut scene, 900, 0, &[0, 1], 7);
    others_end(&mut scene, 1_000);
    scene.take_from("1000 job 1");
    starts(&mut scene, 1_100, 4);
    is_ready(&mut scene, 1_200, 4);
    starts(&mut scene, 1_210, 5);
    is_ready(&mut scene, 1_220, 5);
    steps(&mut scene, 1_300, 1, &[0, 1, 4], 8);
    steps(&mut scene, 1_400, 2, &[0, 1, 4, 5], 9);
    assert_eq!((scene.summary(1).state, scene.summary(1).restarts, scene.summary(1).ranks.len()), (JobState::Running, 0, 4));
    scene.expect(expect![[r#"
        1000 job 1: places_added: there is room for 4 of 4 ranks now
        1000   n1 <- forget 2.1.0 2.1.1 2.1.2 2.1.3 2.1.4 2.1.5
        1000   n1 <- job 2 ended
        1000   n1 <- start job 1 attempt 1 ranks 0+2 port 29501 spares [4, 5]
        1000   final job 2 succeeded
        1200 job 1: gang_growing: a process that was ready joins as rank 2
        1200   n1 <- start job 1 attempt 1 ranks 0+3 port 29501 membership 1 [0, 1, 4] spares [5]
        1300 job 1: gang_grown: rank 2 has joined; all ranks step again after 100 ms
        1300 job 1: gang_growing: a process that was ready joins as rank 3
        1300   n1 <- start job 1 attempt 1 ranks 0+3 port 29501 membership 1 [0, 1, 4] spares [5]
        1300   n1 <- start job 1 attempt 1 ranks 0+4 port 29501 membership 2 [0, 1, 4, 5]
        1400 job 1: gang_grown: rank 3 has joined; all ranks step again after 100 ms
    "#]]);
}

#[test]
fn what_is_free_goes_to_a_job_that_waits_for_it_and_not_to_a_gang_that_could_grow() {
    let mut scene = begins_small();
    scene.start_all(10, 1, 1, 2);
    steps(&mut scene, 900, 0, &[0, 1], 7);
    scene.submit(950, 3, command(5));
    scene.take();
    others_end(&mut scene, 1_000);
    let told = scene.take();
    assert!(told.contains("1000 job 3: attempt_placed") && told.contains("there is room for 3 of 4 ranks now"), "{told}");
}

#[test]
fn that_it_begins_with_fewer_is_said() {
    let mut scene = begins_small();
    assert!(scene.take().contains("attempt 1 is starting on n1 with 2 of 4 ranks: there is no room for more"));
}

#[test]
fn with_less_room_than_for_the_fewest_it_waits() {
    let mut scene = Scene::with_node();
    scene.submit(0, 2, command(7));
    scene.submit(5, 1, JobSpec { min_world_size: Some(2), ..trains(4, 0) });
    assert_eq!(scene.summary(1).reason.as_deref(), Some("queued: n1 needs 2 ranks, has free places for 1"));
    scene.take();
}

#[test]
fn the_next_attempt_and_the_next_coordinator_know_of_the_places_that_are_missing() {
    let mut scene = begins_small();
    scene.start_all(10, 1, 1, 2);
    scene.restart_coordinator(100);
    let of_both = (0..2).map(|r| alive(rank(1, 1, r), 100 + r)).chain((0..6).map(|r| alive(rank(2, 1, r), 200 + r)));
    scene.at(200, hello("n1", of_both.collect()));
    scene.take();
    // Before a first step nothing is taken in place: the next attempt has all of them.
    scene.exits(300, rank(1, 1, 0), killed(299)).exits(310, rank(1, 1, 1), killed(309));
    others_end(&mut scene, 400);
    scene.at(900, Event::Woke);
    scene.expect(expect![[r#"
        300 job 1: gang_failed: rank 0 ended with signal 9 (SIGKILL)
        300   n1 <- stop job 1 attempt 1 grace 30s
        310 job 1: restart_scheduled: attempt 2 in 500 ms: restart 1 of 50
        310   n1 <- forget 1.1.0 1.1.1
        400 job 2: job_final: every rank exited 0
        400   n1 <- forget 2.1.0 2.1.1 2.1.2 2.1.3 2.1.4 2.1.5
        400   n1 <- job 2 ended
        400   final job 2 succeeded
        900 job 1: attempt_placed: attempt 2 is starting on n1
        900   n1 <- start job 1 attempt 2 ranks 0+4 port 29502
    "#]]);
}

#[test]
fn a_whole_gang_keeps_its_spares() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, JobSpec { min_world_size: Some(1), ..trains(3, 1) });
    scene.start_all(10, 1, 1, 3);
    starts(&mut scene, 20, 3);
    is_ready(&mut scene, 30, 3);
    steps(&mut scene, 900, 0, &[0, 1, 2], 7);
    assert_eq!((scene.summary(1).ranks.len(), scene.summary(1).spares.len()), (3, 1));
    scene.take_from("10 job 1");
    assert!(!scene.take().contains("gang_growing"));
}

#[test]
fn nobody_joins_before_it_is_ready_and_all_others_have_stepped_and_can_go_on_with_it() {
    let mut scene = begins_small();
    scene.start_all(10, 1, 1, 2);
    others_end(&mut scene, 100);
    starts(&mut scene, 200, 4);
    scene.take();
    let tells = |scene: &mut Scene, ms: u64, seat: u32, in_place: Option<bool>, step: Option<u64>| {
        scene.at(ms, Event::RanksBeat(vec![Beat { in_place, step, ..beat(rank(1, 1, seat), 0) }]));
    };
    // The others step, but it has not said that it is ready.
    steps(&mut scene, 300, 0, &[0, 1], 1);
    assert_eq!(scene.take(), "");

    let mut scene = begins_small();
    scene.start_all(10, 1, 1, 2);
    others_end(&mut scene, 100);
    starts(&mut scene, 200, 4);
    is_ready(&mut scene, 210, 4);
    scene.take();
    steps(&mut scene, 300, 0, &[0], 1);
    // The other one can, but has not stepped; then it has stepped, and has not said that it can.
    tells(&mut scene, 310, 1, Some(true), None);
    tells(&mut scene, 320, 1, None, Some(1));
    assert_eq!(scene.take(), "");
    steps(&mut scene, 400, 0, &[1], 2);
    let told = scene.take();
    assert!(told.contains("400 job 1: gang_growing"), "{told}");
}

#[test]
fn a_growth_that_does_not_end_is_given_up_in_time() {
    let mut scene = begins_small();
    scene.start_all(10, 1, 1, 2);
    steps(&mut scene, 900, 0, &[0, 1], 7);
    others_end(&mut scene, 1_000);
    starts(&mut scene, 1_100, 4);
    is_ready(&mut scene, 1_200, 4);
    scene.take();
    scene.at(1_200 + REGROUP_MAX_MS - 1, Event::Woke);
    assert_eq!(scene.take(), "");
    scene.at(1_200 + REGROUP_MAX_MS, Event::Woke);
    let told = scene.take();
    assert!(told.contains("gang_failed"), "{told}");
}

#[test]
fn another_process_is_not_started_while_ranks_come_together_and_not_for_a_gang_that_ends_or_is_whole() {
    let lost = || {
        let mut scene = elastic();
        scene.exits(1_000, rank(1, 1, 2), killed(999));
        steps(&mut scene, 1_300, 1, &[0, 1], 8);
        starts(&mut scene, 1_400, 3);
        // Another one is to come at 31,500.
        scene.exits(1_500, rank(1, 1, 3), killed(1_499));
        scene.take();
        scene
    };
    let mut scene = lost();
    scene.exits(31_400, rank(1, 1, 1), killed(31_399));
    scene.take();
    scene.at(31_500, Event::Woke);
    assert_eq!(scene.take(), "", "a membership is under way");

    // A gang that is begun again has all its places.
    let mut scene = lost();
    scene.exits(1_600, rank(1, 1, 0), exit(1, 1_599)).exits(1_600, rank(1, 1, 1), exit(1, 1_599));
    scene.at(3_000, Event::Woke).start_all(3_100, 1, 2, 3);
    assert_eq!((scene.summary(1).attempt, scene.summary(1).ranks.len()), (2, 3));
    scene.take();
    scene.at(31_500, Event::Woke);
    assert_eq!(scene.take(), "", "it is whole");

    let mut scene = lost();
    scene.at(31_400, Event::StopRequested { job: job(1), delete: false, force: false });
    scene.take();
    scene.at(31_500, Event::Woke);
    assert_eq!(scene.take(), "", "it ends");
}

#[test]
fn a_gang_takes_all_that_is_free_beside_it_and_leaves_room_for_its_spare() {
    let mut scene = Scene::with_node();
    scene.submit(0, 2, command(5));
    scene.start_all(1, 2, 1, 5);
    scene.submit(5, 1, JobSpec { min_world_size: Some(2), ..trains(6, 1) });
    scene.start_all(10, 1, 1, 2);
    steps(&mut scene, 900, 0, &[0, 1], 7);
    for seat in 0..5 {
        scene.exits(1_000, rank(2, 1, seat), exit(0, 1_000));
    }
    assert!(scene.take().contains("there is room for 6 of 6 ranks now"));
    assert_eq!(scene.engine.jobs[&job(1)].gang.as_ref().unwrap().placed(), 6);
}

/// A gang of two to six ranks that has two, beside two jobs of three.
fn between_two(spec: JobSpec) -> Scene {
    let mut scene = Scene::with_node();
    for n in [2, 4] {
        scene.submit(1, n, command(3));
        scene.start_all(1, n, 1, 3);
    }
    scene.submit(5, 1, JobSpec { min_world_size: Some(2), ..spec });
    scene.start_all(10, 1, 1, 2);
    scene
}

fn ends(scene: &mut Scene, ms: u64, n: u128) {
    for seat in 0..3 {
        scene.exits(ms, rank(n, 1, seat), exit(0, ms));
    }
}

#[test]
fn the_next_attempt_takes_what_is_free_unless_a_job_waits_for_it() {
    for (waits, ranks) in [(true, "0+2"), (false, "0+5")] {
        // In place it would take them before.
        let mut scene = between_two(command(6));
        scene.exits(300, rank(1, 1, 0), killed(299)).exits(310, rank(1, 1, 1), killed(309));
        if waits {
            scene.submit(320, 3, command(8));
        }
        ends(&mut scene, 400, 2);
        scene.take();
        scene.at(900, Event::Woke);
        let told = scene.take();
        assert!(told.contains(&format!("start job 1 attempt 2 ranks {ranks}")), "{told}");
    }
}

#[test]
fn while_a_process_joins_no_places_are_added() {
    let mut scene = between_two(trains(6, 0));
    steps(&mut scene, 900, 0, &[0, 1], 7);
    ends(&mut scene, 1_000, 2);
    starts(&mut scene, 1_100, 6);
    is_ready(&mut scene, 1_200, 6);
    let told = scene.take();
    assert!(told.contains("there is room for 5 of 6 ranks now") && told.contains("gang_growing"), "{told}");
    ends(&mut scene, 1_300, 4);
    assert!(!scene.take().contains("places_added"));
    steps(&mut scene, 1_400, 1, &[0, 1, 6], 8);
    assert!(scene.take().contains("there is room for 6 of 6 ranks now"));
}

#[test]
fn places_become_a_gang_s_own_only_while_it_runs_and_nothing_is_under_way() {
    let free = |happens: fn(&mut Scene)| {
        let mut scene = begins_small();
        scene.start_all(10, 1, 1, 2);
        steps(&mut scene, 900, 0, &[0, 1], 7);
        happens(&mut scene);
        scene.take();
        others_end(&mut scene, 1_000);
        scene.take().contains("places_added")
    };
    assert!(free(|_| {}));
    assert!(
        !free(|scene| {
            _ = scene.exits(950, rank(1, 1, 1), killed(949));
        }),
        "its ranks come together"
    );
    assert!(
        !free(|scene| {
            _ = scene.at(950, Event::StopRequested { job: job(1), delete: false, force: false });
        }),
        "it ends"
    );
    assert!(
        !free(|scene| {
            _ = scene.exits(950, rank(1, 1, 1), exit(0, 950));
        }),
        "a rank is done"
    );
    assert!(
        !free(|scene| {
            _ = scene.exits(950, rank(1, 1, 0), exit(1, 949)).exits(950, rank(1, 1, 1), exit(1, 949));
        }),
        "it is to begin again"
    );
}
