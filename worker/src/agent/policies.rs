//! Which of a job's `log_policies` the last output of a rank matches, and how much of that output is told.
//!
//! Searched is what the shim wrote down with the exit, and the program's error file: both are on the disk, so an agent that comes later finds
//! the same. Nothing is decided here: the coordinator's engine is told which policy and which line.

use everlit_api::agent::GangSpec;
use everlit_api::ids::JobId;
use everlit_api::job::LogPolicy;
use everlit_api::rank::{LogMatch, RankExit};
use regex::Regex;

use super::limits::{MATCHED_BYTES_MAX, TAIL_BYTES_MAX, TAIL_LINES_MAX};

/// The compiled patterns of the job that was looked at last: when a gang ends, its ranks end together.
#[derive(Debug, Default)]
pub(super) struct Policies {
    job: Option<JobId>,
    patterns: Vec<Option<Regex>>,
}

impl Policies {
    /// The first policy that a line of a failed rank's last output matches, and the first such line.
    pub(super) fn find(&mut self, spec: &GangSpec, exit: &RankExit) -> Option<LogMatch> {
        if spec.log_policies.is_empty() || exit.is_success() {
            return None;
        }
        if self.job != Some(spec.job) {
            let compile = |policy: &LogPolicy| {
                let regex = LogPolicy::compile(&policy.pattern);
                regex.inspect_err(|error| tracing::warn!(job = %spec.job, %error, "a log policy is left out")).ok()
            };
            self.patterns = spec.log_policies.iter().map(compile).collect();
            self.job = Some(spec.job);
        }
        let mut patterns = self.patterns.iter().enumerate().filter_map(|(index, regex)| Some((index as u32, regex.as_ref()?)));
        patterns.find_map(|(policy, regex)| {
            let mut lines = exit.tail.iter().map(String::as_str).chain(exit.message.iter().flat_map(|message| message.lines()));
            lines.find_map(|line| regex.find(line).map(|found| LogMatch { policy, line: around(line, found.start()) }))
        })
    }
}

/// The line, or what of it is near the match.
fn around(line: &str, start: usize) -> String {
    let from = if line.len() <= MATCHED_BYTES_MAX { 0 } else { start.saturating_sub(MATCHED_BYTES_MAX / 4) };
    let from = line.ceil_char_boundary(from);
    let to = line.floor_char_boundary(from.saturating_add(MATCHED_BYTES_MAX));
    line[from..to].trim().to_string()
}

/// Leaves the last lines that are told.
pub(super) fn shorten(tail: &mut Vec<String>) {
    let mut room = TAIL_BYTES_MAX;
    let mut kept = 0;
    for line in tail.iter_mut().rev().take(TAIL_LINES_MAX) {
        if line.len() >= room {
            if kept > 0 {
                break;
            }
            // One line longer than all that is told: its end.
            line.drain(..line.ceil_char_boundary(line.len() - room));
        }
        room = room.saturating_sub(line.len() + 1);
        kept += 1;
    }
    tail.drain(..tail.len() - kept);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::engine::no_exit;
    use crate::agent::environment::tests::spec;
    use everlit_api::job::LogAction;
    use everlit_api::time::Timestamp;

    fn gang(patterns: &[&str]) -> GangSpec {
        let policy = |pattern: &&str| LogPolicy { name: None, pattern: (*pattern).into(), action: LogAction::ExcludeNode };
        GangSpec { log_policies: patterns.iter().map(policy).collect(), ..spec(1) }
    }

    fn ended(code: i32, tail: &[&str], message: Option<&str>) -> RankExit {
        let tail = tail.iter().map(|line| (*line).to_string()).collect();
        RankExit { code: Some(code), error: None, tail, message: message.map(Into::into), ..no_exit("", Timestamp(1)) }
    }

    #[test]
    fn the_first_policy_and_its_first_line_are_found() {
        let mut policies = Policies::default();
        let gang = gang(&["(", "fallen off", r"(?i)ecc\b", "CUDA error"]);
        let found = |policies: &mut Policies, exit| policies.find(&gang, &exit).map(|found| (found.policy, found.line));
        let tail = ["fine", "CUDA error: uncorrectable ECC", "ecc again"];
        assert_eq!(found(&mut policies, ended(1, &tail, None)), Some((2, "CUDA error: uncorrectable ECC".into())));
        assert_eq!(
            found(&mut policies, ended(1, &["x"], Some("boom\nGPU has fallen off the bus"))),
            Some((1, "GPU has fallen off the bus".into()))
        );
        assert_eq!(found(&mut policies, ended(1, &["eccentric"], None)), None);
        assert_eq!(found(&mut policies, ended(0, &tail, None)), None, "what succeeded did not fail for it");
        // Another job has other patterns.
        let other = GangSpec { job: JobId::from_parts(3, 4), log_policies: vec![], ..spec(1) };
        assert_eq!(policies.find(&other, &ended(1, &tail, None)), None);
    }

    #[test]
    fn of_a_long_line_the_part_with_the_match_is_told() {
        let line = format!("{}needle{}", "ä".repeat(5_000), "ö".repeat(5_000));
        let found = Policies::default().find(&gang(&["needle"]), &ended(1, &[&line], None)).unwrap();
        assert!(found.line.len() <= MATCHED_BYTES_MAX && found.line.contains("needle"), "{}", found.line);
    }

    #[test]
    fn what_is_told_is_bounded_by_lines_and_bytes() {
        let mut tail: Vec<String> = (0..200).map(|n| format!("line {n}")).collect();
        shorten(&mut tail);
        assert_eq!((tail.len(), tail[0].as_str()), (TAIL_LINES_MAX, "line 180"));
        let mut tail = vec!["x".repeat(3_000), "y".repeat(3_000), "end".into()];
        shorten(&mut tail);
        assert_eq!(tail.iter().map(String::len).collect::<Vec<_>>(), [3_000, 3]);
        let mut tail = vec!["before".into(), "ä".repeat(3_000)];
        shorten(&mut tail);
        assert_eq!(tail.iter().map(String::len).collect::<Vec<_>>(), [TAIL_BYTES_MAX]);
        let mut none = Vec::new();
        shorten(&mut none);
        assert!(none.is_empty());
    }
}
