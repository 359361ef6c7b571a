//! Errors of GPUs: what they do to a job, what is held against the GPU, and where gangs go then.

use everlit_api::agent::GpuHolder;
use everlit_api::gpu::GpuError;
use everlit_api::job::{Device, FailureAction, JobSpec};
use everlit_api::rank::{Cause, Verdict};
use everlit_api::status::{GpuInfo, JobState};
use expect_test::expect;

use super::super::limits::GPU_BLAMES_MAX;
use super::*;

const DAY_MS: u64 = 24 * 3_600 * 1_000;

fn with_gpus(name: &str, count: u32, ranks: Vec<RankReport>) -> Event {
    let Event::NodeLinked { mut hello } = hello(name, ranks) else { unreachable!("a hello") };
    let gpu = |index| GpuInfo { index, name: "H100".into(), uuid: format!("{name}-{index}"), memory: 80 << 30 };
    hello.capacity.gpus = (0..count).map(gpu).collect();
    Event::NodeLinked { hello }
}

/// Nodes by name and number of GPUs.
fn scene(nodes: &[(&str, u32)]) -> Scene {
    let mut scene = Scene::new();
    for (name, count) in nodes {
        scene.at(0, with_gpus(name, *count, vec![]));
    }
    scene.take();
    scene
}

/// Ranks with a GPU each.
fn on_gpus(world: u32) -> JobSpec {
    let mut spec = command(world);
    spec.resources.gpus = 1;
    spec
}

fn error(name: &str, gpu: u32, xid: u32, at: u64) -> GpuError {
    GpuError { gpu, uuid: format!("{name}-{gpu}"), xid, at: Timestamp(at) }
}

fn failed(name: &str, gpu: u32, xid: u32, at: u64) -> Event {
    Event::GpuFailed { node: node(name), error: error(name, gpu, xid, at) }
}

fn with_error(exit: RankExit, error: GpuError) -> RankExit {
    RankExit { gpu_error: Some(error), ..exit }
}

fn place(scene: &Scene, n: u128) -> Option<(String, Vec<u32>)> {
    let share = &scene.engine.job(job(n))?.gang.as_ref()?.placement[0];
    Some((share.node.0.clone(), share.gpus.clone()))
}

fn avoided(scene: &Scene, name: &str) -> Vec<u32> {
    scene.engine.nodes()[&node(name)].avoided_gpus().into_iter().collect()
}

#[test]
fn a_gpu_that_falls_off_the_bus_is_the_cause_costs_nothing_and_is_left_for_another() {
    let mut scene = scene(&[("n1", 3)]);
    scene.submit(0, 1, on_gpus(2));
    scene.start_all(10, 1, 1, 2);
    // With a step and maybe a checkpoint behind it the gang stays on its node.
    scene.at(20, Event::RanksBeat(vec![beat(rank(1, 1, 0), 5), beat(rank(1, 1, 1), 5)]));
    scene.take();
    assert_eq!(place(&scene, 1), Some(("n1".into(), vec![0, 1])));
    scene.at(1_000, failed("n1", 1, 79, 999));
    // The other rank notices first; the rank of the GPU hangs until it is killed.
    scene.exits(1_100, rank(1, 1, 0), exit(1, 1_100));
    scene.exits(31_100, rank(1, 1, 1), with_error(killed(31_100), error("n1", 1, 79, 999)));
    scene.at(32_000, Event::Woke);
    scene.expect(expect![[r#"
        1000 job 1: gpu_error: rank 1: GPU 1 of n1 fell off the bus (Xid 79): the hardware, not the program; it is avoided for 24 h where another GPU is free
        1100 job 1: gang_failed: rank 0 ended with exit code 1: last words 1
        1100   n1 <- stop job 1 attempt 1 grace 30s
        31100 job 1: restart_scheduled: attempt 2 in 500 ms: restart without cost to the budget
        31100 job 1: attempt_placed: attempt 2 is starting on n1
        31100   n1 <- forget 1.1.0 1.1.1
        31100   n1 <- start job 1 attempt 2 ranks 0+2 port 29501
    "#]]);
    let summary = scene.summary(1);
    let budget = &scene.engine.job(job(1)).expect("active").budget;
    assert_eq!((summary.restarts, budget.counted, budget.start_failures), (1, 0, 0));
    assert_eq!(place(&scene, 1), Some(("n1".into(), vec![0, 2])));
    assert!(scene.engine.nodes()[&node("n1")].blames.is_empty(), "the node is well");
}

#[test]
fn a_rank_that_hangs_on_a_broken_gpu_blames_the_gpu_and_not_its_node() {
    let mut scene = scene(&[("n1", 2), ("n2", 1)]);
    scene.submit(0, 1, on_gpus(1));
    assert_eq!(place(&scene, 1), Some(("n1".into(), vec![0])));
    scene.start_all(10, 1, 1, 1);
    scene.take();
    // The agent was not linked when its GPU broke: the end carries it.
    scene.at(1_000, Event::RankJudged { incarnation: rank(1, 1, 0), verdict: Verdict::Stuck, age_ms: 100, stacks: Vec::new() });
    scene.exits(1_010, rank(1, 1, 0), with_error(killed(1_010), error("n1", 0, 119, 900)));
    scene.expect(expect![[r#"
        1000 job 1: gang_failed: rank 0 is stuck before its first step: neither a step nor a new phase for 100 ms (heartbeat.progress_timeout)
        1000   n1 <- stop job 1 attempt 1 grace 0s
        1010 job 1: gpu_error: rank 0: GPU 0 of n1 got no answer from its system processor (GSP) (Xid 119): the hardware, not the program; it is avoided for 24 h where another GPU is free
        1010 job 1: restart_scheduled: attempt 2 in 500 ms: restart without cost to the budget
        1010   n1 <- forget 1.1.0
    "#]]);
}

#[test]
fn an_error_that_is_heard_of_after_the_end_is_the_cause_all_the_same() {
    let mut scene = scene(&[("n1", 2)]);
    scene.submit(0, 1, on_gpus(2));
    scene.start_all(10, 1, 1, 2);
    scene.exits(1_000, rank(1, 1, 0), exit(1, 1_000));
    scene.take();
    scene.exits(1_005, rank(1, 1, 0), with_error(exit(1, 1_000), error("n1", 0, 48, 1_004)));
    scene.exits(1_200, rank(1, 1, 1), killed(1_200));
    scene.expect(expect![[r#"
        1005 job 1: gpu_error: rank 0: GPU 0 of n1 had a double-bit memory error (ECC) (Xid 48): the hardware, not the program; it is avoided for 24 h where another GPU is free
        1200 job 1: restart_scheduled: attempt 2 in 500 ms: restart without cost to the budget
        1200   n1 <- forget 1.1.0 1.1.1
    "#]]);
    // One that comes much later is no cause of it.
    scene.at(5_000, Event::Woke);
    scene.start_all(5_010, 1, 2, 2);
    scene.exits(6_000, rank(1, 2, 0), exit(1, 6_000));
    scene.exits(30_000, rank(1, 2, 1), with_error(killed(30_000), error("n1", 1, 48, 29_000)));
    let told = scene.take();
    assert!(told.contains("attempt 3 in 1000 ms: restart 1 of 50"), "{told}");
}

#[test]
fn what_may_be_chance_avoids_a_gpu_from_the_second_on_for_a_day() {
    let mut scene = scene(&[("n1", 2)]);
    // A storm of the same is one incident.
    scene.at(1_000, failed("n1", 0, 94, 1_000)).at(1_500, failed("n1", 0, 94, 1_500)).at(1_600, failed("n1", 0, 94, 59_999));
    assert_eq!(avoided(&scene, "n1"), [] as [u32; 0]);
    scene.at(70_000, failed("n1", 1, 94, 70_000));
    assert_eq!(avoided(&scene, "n1"), [] as [u32; 0], "another GPU's is another's");
    scene.submit(80_000, 1, on_gpus(1));
    assert_eq!(place(&scene, 1), Some(("n1".into(), vec![0])));
    scene.at(90_000, failed("n1", 0, 94, 90_000));
    assert_eq!(avoided(&scene, "n1"), [0]);
    scene.expect(expect![[r#"
        1000 gpu_error: GPU 0 of n1 had a contained memory error (Xid 94): the hardware, not the program; one may be chance
        70000 gpu_error: GPU 1 of n1 had a contained memory error (Xid 94): the hardware, not the program; one may be chance
        80000 job 1: job_submitted: accepted
        80000 job 1: attempt_placed: attempt 1 is starting on n1
        80000   n1 <- start job 1 attempt 1 ranks 0+1 port 29500
        90000 job 1: gpu_error: rank 0: GPU 0 of n1 had a contained memory error (Xid 94): the hardware, not the program; it is avoided for 24 h where another GPU is free
    "#]]);
    let seen = scene.engine.nodes()[&node("n1")].view(&node("n1"), Timestamp(90_000));
    let told: Vec<_> = seen.gpu_blames.iter().map(|blame| (blame.reason.as_str(), blame.xid, blame.job_id)).collect();
    assert_eq!((seen.gpus_avoided.as_slice(), seen.avoided, told.len()), ([0].as_slice(), false, 3));
    assert_eq!(told[2], ("GPU 0 of n1 had a contained memory error (Xid 94): the hardware, not the program", 94, Some(job(1))));
    // It is the same for the next coordinator, and forgotten one by one.
    scene.restart_coordinator(100_000);
    scene.at(100_000, with_gpus("n1", 2, vec![alive(rank(1, 1, 0), 100)]));
    assert_eq!(avoided(&scene, "n1"), [0]);
    scene.at(1_000 + DAY_MS, Event::Woke);
    assert_eq!((avoided(&scene, "n1"), scene.engine.nodes()[&node("n1")].gpu_blames.len()), (vec![], 2));
    scene.at(90_000 + DAY_MS, Event::Woke);
    assert!(scene.engine.nodes()[&node("n1")].gpu_blames.is_empty());
    scene.take();
}

#[test]
fn a_user_who_uncordons_the_node_says_that_its_gpus_are_well() {
    let mut scene = scene(&[("n1", 2)]);
    scene.at(1_000, failed("n1", 0, 95, 1_000));
    assert_eq!(avoided(&scene, "n1"), [0]);
    scene.at(2_000, Event::CordonRequested { node: node("n1"), cordoned: false });
    assert_eq!(avoided(&scene, "n1"), [] as [u32; 0]);
    scene.take();
    scene.restart_coordinator(3_000);
    scene.at(3_000, with_gpus("n1", 2, vec![]));
    assert_eq!(avoided(&scene, "n1"), [] as [u32; 0]);
    scene.take();
}

#[test]
fn a_gpu_is_known_by_its_id_and_not_by_its_place() {
    let mut scene = scene(&[("n1", 2)]);
    scene.at(1_000, failed("n1", 0, 79, 1_000));
    let Event::NodeLinked { mut hello } = with_gpus("n1", 2, vec![]) else { unreachable!("a hello") };
    // After a restart of the machine without it.
    hello.capacity.gpus.remove(0);
    hello.capacity.gpus[0].index = 0;
    scene.at(2_000, Event::NodeLinked { hello });
    assert_eq!(avoided(&scene, "n1"), [] as [u32; 0]);
    scene.take();
}

#[test]
fn new_gangs_get_suspected_gpus_last_and_are_never_refused_for_them() {
    let mut scene = scene(&[("n1", 2), ("n2", 2)]);
    scene.at(1_000, failed("n1", 0, 48, 1_000));
    scene.submit(2_000, 1, on_gpus(1));
    assert_eq!(place(&scene, 1), Some(("n1".into(), vec![1])), "the other of the same node is well");
    scene.submit(2_000, 2, on_gpus(1));
    assert_eq!(place(&scene, 2), Some(("n2".into(), vec![0])));
    scene.submit(2_000, 3, on_gpus(1)).submit(2_000, 4, on_gpus(1));
    assert_eq!([place(&scene, 3), place(&scene, 4)], [Some(("n2".into(), vec![1])), Some(("n1".into(), vec![0]))]);
    scene.take();
    let told = scene.engine.plan(&on_gpus(2), scene.now).reason;
    assert_eq!(told, "n1 needs 2 GPUs, has free 0");
    // One that waits behind another learns what it would get.
    let mut lone = Scene::new();
    lone.at(0, with_gpus("n1", 1, vec![])).at(1_000, failed("n1", 0, 48, 1_000));
    lone.take();
    let need = crate::engine::placement::Need::of(&on_gpus(1));
    let explained = lone.engine.nodes()[&node("n1")].explain(&node("n1"), &need, false, false);
    assert_eq!(explained, "has room, and 1 of the GPUs are avoided: they had hardware errors");
}

#[test]
fn a_gang_without_a_step_goes_to_another_node_for_a_well_gpu() {
    let mut scene = scene(&[("n1", 1), ("n2", 1)]);
    scene.submit(0, 1, on_gpus(1));
    scene.start_all(10, 1, 1, 1);
    scene.exits(1_000, rank(1, 1, 0), with_error(exit(1, 1_000), error("n1", 0, 79, 990)));
    scene.at(2_000, Event::Woke);
    assert_eq!(place(&scene, 1), Some(("n2".into(), vec![0])));
    scene.take();
}

#[test]
fn with_no_other_gpu_a_job_is_not_tried_for_ever_and_says_why() {
    let mut scene = scene(&[("n1", 1)]);
    let mut spec = on_gpus(1);
    spec.restart.max_start_failures = 2;
    spec.restart.max_restarts = 0;
    scene.submit(0, 1, spec);
    for attempt in 1..=2 {
        let ms = u64::from(attempt) * 100_000;
        scene.start_all(ms, 1, attempt, 1);
        scene.exits(ms + 10, rank(1, attempt, 0), with_error(exit(1, ms + 10), error("n1", 0, 79, ms)));
        scene.at(ms + 50_000, Event::Woke);
    }
    let told = scene.take();
    let told: Vec<&str> = told.lines().filter(|line| line.contains("restart_scheduled") || line.contains("job_final")).collect();
    expect![[r#"
        100010 job 1: restart_scheduled: attempt 2 in 500 ms: restart without cost to the budget
        200010 job 1: job_final: rank 0: GPU 0 of n1 fell off the bus (Xid 79): the hardware, not the program; rank 0 ended with exit code 1: last words 1; it failed 2 times in a row without a new step (restart.max_start_failures)
    "#]].assert_eq(&(told.join("\n") + "\n"));
}

#[test]
fn a_job_may_want_to_end_with_its_gpu() {
    let mut scene = scene(&[("n1", 2)]);
    let mut spec = on_gpus(1);
    spec.restart.on.insert(Cause::Gpu, FailureAction::Fail);
    scene.submit(0, 1, spec);
    scene.start_all(10, 1, 1, 1);
    scene.exits(1_000, rank(1, 1, 0), with_error(exit(1, 1_000), error("n1", 0, 79, 990)));
    let told = scene.take();
    assert!(told.contains("final job 1 failed") && told.contains("restart.on says that this fails the job"), "{told}");
}

#[test]
fn the_cause_is_known_from_the_first_end_on() {
    let mut scene = scene(&[("n1", 2)]);
    scene.submit(0, 1, on_gpus(2));
    scene.start_all(10, 1, 1, 2);
    scene.exits(1_000, rank(1, 1, 0), with_error(exit(1, 1_000), error("n1", 0, 79, 990)));
    scene.take();
    let ending = scene.engine.job(job(1)).and_then(|job| job.gang.as_ref()?.ending.clone()).expect("it ends");
    assert_eq!((ending.cause, ending.rank), (Some(Cause::Gpu), Some(0)));
}

#[test]
fn what_the_program_did_is_its_own_and_counted() {
    let mut scene = scene(&[("n1", 1)]);
    scene.submit(0, 1, on_gpus(1));
    scene.start_all(10, 1, 1, 1);
    scene.take();
    scene.at(900, failed("n1", 0, 31, 900));
    scene.exits(1_000, rank(1, 1, 0), with_error(exit(1, 1_000), error("n1", 0, 31, 900)));
    scene.expect(expect![[r#"
        1000 job 1: gang_failed: rank 0 ended with exit code 1: last words 1; GPU 0 had a page fault on memory that is not the program's (Xid 31): the program, not the hardware
        1000 job 1: restart_scheduled: attempt 2 in 500 ms: restart 1 of 50
        1000   n1 <- forget 1.1.0
    "#]]);
    assert!(scene.engine.nodes()[&node("n1")].gpu_blames.is_empty());
    assert_eq!(scene.summary(1).state, JobState::Recovering);
}

#[test]
fn memory_that_others_hold_is_told_with_who_holds_it() {
    let mut scene = scene(&[("n1", 2)]);
    scene.submit(0, 1, on_gpus(2));
    scene.take();
    let holders = vec![GpuHolder { gpu: 0, pid: 77, name: "python".into() }, GpuHolder { gpu: 1, pid: 78, name: String::new() }];
    scene.at(5, Event::GpuHeld { job: job(1), attempt: 1, holders: holders.clone() });
    scene.at(6, Event::GpuHeld { job: job(1), attempt: 7, holders });
    scene.expect(expect![[r#"
        5 job 1: gpu_memory_held: process 77 (python) holds memory of GPU 0, process 78 holds memory of GPU 1: attempt 1 is started all the same, and may lack it
    "#]]);
}

#[test]
fn the_rank_of_a_gpu_is_the_one_that_was_given_it() {
    let share = everlit_api::status::PlacedRanks { node: node("n1"), first_rank: 2, count: 2, gpus: vec![4, 5, 6, 7] };
    let rank_of = |gpu| super::super::gpu::rank_with(&share, gpu);
    assert_eq!([4, 5, 6, 7, 3].map(rank_of), [Some(2), Some(2), Some(3), Some(3), None]);
}

#[test]
fn one_incident_is_counted_once_within_a_minute_and_what_needs_a_reset_is_remembered_the_longest() {
    let mut scene = scene(&[("n1", 2)]);
    let blames = |scene: &Scene| scene.engine.nodes()[&node("n1")].gpu_blames.len();
    scene.at(1_000, failed("n1", 0, 48, 1_000)).at(60_999, failed("n1", 0, 48, 60_999));
    assert_eq!(blames(&scene), 1);
    scene.at(61_000, failed("n1", 0, 48, 61_000));
    assert_eq!(blames(&scene), 2);
    let mut ms = 200_000;
    scene.at(ms, failed("n1", 1, 79, ms));
    for _ in 0..GPU_BLAMES_MAX + 4 {
        ms += 60_000;
        scene.at(ms, failed("n1", 0, 92, ms));
    }
    let kept = &scene.engine.nodes()[&node("n1")].gpu_blames;
    assert_eq!(kept.len(), GPU_BLAMES_MAX);
    assert!(kept.iter().any(|blame| blame.error.xid == 79));
    scene.take();
}

#[test]
fn a_smaller_gang_on_gpus_takes_no_more_of_them_while_it_runs() {
    let mut scene = scene(&[("n1", 4)]);
    scene.submit(0, 2, on_gpus(2));
    scene.start_all(1, 2, 1, 2);
    scene.submit(5, 1, JobSpec { min_world_size: Some(2), ..on_gpus(4) });
    scene.start_all(10, 1, 1, 2);
    assert!(!scene.take().contains("places_added"), "there are places, and no GPUs");
    scene.exits(1_000, rank(2, 1, 0), exit(0, 1_000)).exits(1_000, rank(2, 1, 1), exit(0, 1_000));
    assert!(!scene.take().contains("places_added"));
    assert_eq!(place(&scene, 1).map(|(_, gpus)| gpus.len()), Some(2));
}

#[test]
fn an_avoided_gpu_is_left_for_one_that_is_free_well_and_large_enough() {
    let mut scene = scene(&[("n1", 4)]);
    scene.submit(0, 1, on_gpus(1));
    scene.start_all(10, 1, 1, 1);
    scene.at(20, Event::RanksBeat(vec![beat(rank(1, 1, 0), 5)]));
    // GPU 1 is suspected too, GPU 2 is another job's.
    scene.submit(30, 2, on_gpus(1)).submit(30, 3, on_gpus(1));
    assert_eq!([place(&scene, 2), place(&scene, 3)].map(|place| place.map(|(_, gpus)| gpus)), [Some(vec![1]), Some(vec![2])]);
    scene.at(40, Event::StopRequested { job: job(2), force: true, delete: false });
    scene.at(50, failed("n1", 1, 79, 50));
    scene.exits(60, rank(1, 1, 0), with_error(exit(1, 60), error("n1", 0, 79, 55)));
    scene.at(2_000, Event::Woke);
    assert_eq!(place(&scene, 1).map(|(_, gpus)| gpus), Some(vec![3]));
    scene.take();
}

/// The built-in program on a device, one rank.
fn trains_on(device: Device) -> JobSpec {
    let mut spec = JobSpec::default_for(1);
    spec.worker.as_mut().expect("built in").device = device;
    spec.restart.backoff.jitter = 0.0;
    spec
}

/// The GPU of a gang of one rank on `n1` breaks; where its next attempt is.
fn after_its_gpu_broke(scene: &mut Scene) -> Option<(String, Vec<u32>)> {
    scene.exits(1_000, rank(1, 1, 0), with_error(exit(1, 1_000), error("n1", 0, 79, 990)));
    scene.at(2_000, Event::Woke);
    scene.take();
    place(scene, 1)
}

#[test]
fn a_gang_does_not_go_from_one_broken_gpu_to_another_nor_to_fewer_gpus() {
    let mut broken = scene(&[("n1", 1), ("n2", 1)]);
    broken.at(5, failed("n2", 0, 79, 5));
    broken.submit(6, 1, on_gpus(1)).start_all(10, 1, 1, 1);
    assert_eq!(after_its_gpu_broke(&mut broken), Some(("n1".into(), vec![0])));

    let mut without = scene(&[("n1", 1), ("n2", 0)]);
    without.submit(6, 1, trains_on(Device::Auto)).start_all(10, 1, 1, 1);
    assert_eq!(after_its_gpu_broke(&mut without), Some(("n1".into(), vec![0])));
}

#[test]
fn a_gpu_that_is_suspected_or_too_small_replaces_none() {
    let Event::NodeLinked { mut hello } = with_gpus("n1", 4, vec![]) else { unreachable!("a hello") };
    hello.capacity.gpus[2].memory = 1;
    let mut scene = Scene::new();
    scene.at(0, Event::NodeLinked { hello }).at(5, failed("n1", 1, 79, 5));
    scene.submit(6, 1, trains_on(Device::Cuda)).start_all(10, 1, 1, 1);
    scene.at(20, Event::RanksBeat(vec![beat(rank(1, 1, 0), 5)]));
    assert_eq!(after_its_gpu_broke(&mut scene), Some(("n1".into(), vec![3])));
}

#[test]
fn a_gang_on_gpus_has_no_spares_and_says_so() {
    let mut scene = scene(&[("n1", 2)]);
    let mut spec = trains_on(Device::Cuda);
    spec.restart.spares = 1;
    scene.submit(6, 1, spec);
    assert!(scene.take().contains("spares_off: spares are left out"));
    assert!(scene.engine.jobs[&job(1)].gang.as_ref().unwrap().spares.is_empty());
}

#[test]
fn a_well_gpu_of_a_node_that_takes_no_ranks_is_not_taken() {
    let mut scene = scene(&[("n1", 2)]);
    scene.submit(6, 1, on_gpus(1)).start_all(10, 1, 1, 1);
    scene.exits(1_000, rank(1, 1, 0), with_error(exit(1, 1_000), error("n1", 0, 79, 990)));
    scene.at(1_100, Event::CordonRequested { node: node("n1"), cordoned: true }).at(2_000, Event::Woke);
    assert_eq!((scene.summary(1).state, place(&scene, 1)), (JobState::Queued, None));
    scene.take();
}
