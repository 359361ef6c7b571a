//! Errors of GPUs: told once, and tied to the ranks that have the GPU.

use everlit_api::gpu::GpuError;

use super::*;
use crate::agent::limits::{GPU_ERROR_AFTER_MS, GPU_ERROR_BEFORE_MS, GPU_ERRORS_MAX};

fn failed(gpu: u32, xid: u32) -> Event {
    Event::GpuFailed(GpuError { gpu, uuid: format!("GPU-{gpu}"), xid, at: Timestamp(7) })
}

/// Two ranks, each with two GPUs.
fn on_gpus() -> Scene {
    let mut s = scene(2);
    s.spec.gpus = vec![4, 5, 6, 7];
    s.running();
    s
}

#[test]
fn an_error_is_told_at_once_and_tied_to_the_rank_that_has_the_gpu() {
    let mut s = on_gpus();
    s.at(
        1_000,
        failed(6, 79),
        expect![[r#"
        say gpu 6 xid 79
    "#]],
    );
    s.at(1_500, failed(6, 79), expect![[r#""#]]);
    s.at(
        2_000,
        s.ended(0, 1),
        expect![[r#"
        say exited r0 exit code 1 lost false
    "#]],
    );
    // It hangs, and is killed seconds later.
    s.at(
        1_000 + GPU_ERROR_BEFORE_MS - 1,
        s.ended(1, 1),
        expect![[r#"
        say exited r1 exit code 1 lost false gpu 6 xid 79
    "#]],
    );
}

#[test]
fn what_was_long_ago_and_what_ended_well_is_tied_to_nothing() {
    let mut s = on_gpus();
    s.engine.handle(1_000, failed(6, 79));
    s.at(
        1_500,
        s.ended(1, 0),
        expect![[r#"
        say exited r1 exit code 0 lost false
    "#]],
    );
    s.engine.handle(2_000, failed(4, 94));
    s.at(
        2_000 + GPU_ERROR_BEFORE_MS,
        s.ended(0, 1),
        expect![[r#"
        say exited r0 exit code 1 lost false
    "#]],
    );
}

#[test]
fn of_several_errors_the_cause_is_tied() {
    let mut s = on_gpus();
    s.engine.handle(1_000, failed(5, 45));
    s.engine.handle(1_001, failed(4, 31));
    s.engine.handle(1_002, failed(5, 48));
    s.at(
        1_003,
        s.ended(0, 1),
        expect![[r#"
        say exited r0 exit code 1 lost false gpu 5 xid 48
    "#]],
    );
}

#[test]
fn an_error_just_after_the_end_is_told_with_the_end_again() {
    let mut s = on_gpus();
    s.engine.handle(1_000, s.ended(0, 1));
    s.engine.handle(1_000, s.ended(1, 1));
    s.at(
        1_000 + GPU_ERROR_AFTER_MS - 1,
        failed(7, 48),
        expect![[r#"
        say gpu 7 xid 48
        say exited r1 exit code 1 lost false gpu 7 xid 48
    "#]],
    );
    // What is known already stays.
    s.at(
        1_000 + GPU_ERROR_AFTER_MS - 1,
        failed(7, 79),
        expect![[r#"
        say gpu 7 xid 79
    "#]],
    );
    s.at(
        1_000 + GPU_ERROR_AFTER_MS,
        failed(4, 48),
        expect![[r#"
        say gpu 4 xid 48
    "#]],
    );
}

#[test]
fn an_error_of_the_attempt_before_is_no_other_s_unless_it_stays() {
    let mut s = on_gpus();
    s.engine.handle(1_000, failed(4, 31));
    s.engine.handle(1_000, failed(6, 79));
    s.engine.handle(1_001, s.ended(0, 1));
    s.engine.handle(1_001, s.ended(1, 1));
    s.spec.attempt = 2;
    s.now = 3_000;
    s.running();
    s.at(
        4_000,
        s.ended(0, 1),
        expect![[r#"
        say exited r0 exit code 1 lost false
    "#]],
    );
    s.at(
        4_000,
        s.ended(1, 1),
        expect![[r#"
        say exited r1 exit code 1 lost false gpu 6 xid 79
    "#]],
    );
}

#[test]
fn ranks_that_share_a_gpu_and_spares_are_known() {
    let mut s = scene(2);
    s.spec.gpus = vec![3];
    s.spec.spares = vec![2];
    s.running();
    s.engine.handle(1_000, Event::RankStarted { incarnation: s.own(2), pid: 102, at: Timestamp(1) });
    s.engine.handle(1_000, failed(3, 79));
    s.at(
        1_001,
        s.ended(0, 1),
        expect![[r#"
        say exited r0 exit code 1 lost false gpu 3 xid 79
    "#]],
    );
    s.at(
        1_001,
        s.ended(1, 1),
        expect![[r#"
        say exited r1 exit code 1 lost false gpu 3 xid 79
    "#]],
    );
    s.at(
        1_001,
        s.ended(2, 1),
        expect![[r#"
        say exited r2 exit code 1 lost false
    "#]],
    );
}

#[test]
fn without_a_coordinator_errors_are_kept_for_the_next_one_and_bounded() {
    let mut s = on_gpus();
    s.engine.handle(1_000, Event::Unlinked);
    for gpu in 0..GPU_ERRORS_MAX as u32 + 8 {
        s.at(1_000, failed(100 + gpu, 48), expect![""]);
    }
    let said = |s: &mut Scene| s.engine.handle(2_000, Event::Linked).iter().filter(|action| show(action).starts_with("say gpu")).count();
    assert_eq!((said(&mut s), said(&mut s)), (GPU_ERRORS_MAX, 0));
}

#[test]
fn an_error_of_another_gpu_does_not_push_one_out_before_its_time() {
    let mut s = on_gpus();
    s.engine.handle(1_000, failed(6, 79));
    s.engine.handle(1_100, failed(4, 94));
    s.at(
        1_200,
        s.ended(1, 1),
        expect![[r#"
        say exited r1 exit code 1 lost false gpu 6 xid 79
    "#]],
    );
}
