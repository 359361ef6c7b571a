//! Why a job does not save right now, in words that say what to do.

use everlit_api::ids::JobId;
use everlit_api::problem::{Code, Problem};
use everlit_api::status::JobState;

use crate::engine::CannotSave;

/// The answer to who asked for it.
pub(super) fn cannot_save(id: JobId, why: &CannotSave) -> Problem {
    match why {
        CannotSave::NotRunning(JobState::Stopping) => {
            Problem::new(Code::Conflict, format!("job {id} is stopping: the built-in program saves at a stop anyway"))
        }
        CannotSave::NotRunning(state) => {
            let remedy = "only what runs has something to save; ask again when its state is running";
            Problem::new(Code::Conflict, format!("job {id} is {state}: {remedy}")).retry_after(1)
        }
        CannotSave::NotActive | CannotSave::NotHeard => {
            Problem::new(Code::Conflict, format!("job {id} has only just started: ask again when its summary shows a step")).retry_after(1)
        }
        CannotSave::NotSupported => {
            let remedy = "a program that saves when it gets SIGUSR1 and goes on may write \"saves_on_signal\": true in its heartbeat file; \
                          others save when they are stopped (POST /jobs/{id}/stop) or by themselves";
            Problem::new(Code::Conflict, format!("job {id} does not save on demand: {remedy}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn a_save_that_can_not_be_is_a_conflict_with_its_remedy() {
        let told = [
            CannotSave::NotRunning(JobState::Queued),
            CannotSave::NotRunning(JobState::Stopping),
            CannotSave::NotHeard,
            CannotSave::NotSupported,
        ]
        .map(|why| {
            let problem = cannot_save(JobId::from_parts(0, 1), &why);
            assert_eq!(problem.status, 409);
            format!("{} retry {:?}\n", problem.detail, problem.retry_after)
        });
        expect![[r#"
            job 00000000000000000000000001 is queued: only what runs has something to save; ask again when its state is running retry Some(1)
            job 00000000000000000000000001 is stopping: the built-in program saves at a stop anyway retry None
            job 00000000000000000000000001 has only just started: ask again when its summary shows a step retry Some(1)
            job 00000000000000000000000001 does not save on demand: a program that saves when it gets SIGUSR1 and goes on may write "saves_on_signal": true in its heartbeat file; others save when they are stopped (POST /jobs/{id}/stop) or by themselves retry None
        "#]].assert_eq(&told.concat());
    }
}
