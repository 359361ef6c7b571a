"""Bugs that the simulation must find: each is a small change to a copy of the tree. A place that is not found any more is an error."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEEDS = 1_000
KEPT = "coordinator/tests/simulation/seeds.txt"
#: Name: file, what stands there, what the bug makes of it, what is wrong then.
BUGS = {
    "budget": ("coordinator/src/engine/restart.rs", "        budget.counted += 1;\n", "", "restarts are not counted"),
    "fencing": (
        "coordinator/src/engine/gang.rs",
        "j.gang.as_ref().is_some_and(|g| g.attempt == attempt) && j.retry_at.is_none()",
        "j.gang.is_some() && attempt > 0 && j.retry_at.is_none()",
        "news of an older attempt are taken for the current one's",
    ),
    "write order": (
        "coordinator/tests/simulation/coordinator.rs",
        "        self.coordinator.committing = steps;\n",
        "        let early = steps.into_iter().map(|(at, mut step)| {\n"
        "            let commands = std::mem::take(&mut step.commands);\n"
        "            self.run_commands(vec![(at, everlit_coordinator::engine::Step { commands, ..Default::default() })]);\n"
        "            (at, step)\n"
        "        });\n"
        "        self.coordinator.committing = early.collect();\n",
        "commands run before their record is durable",
    ),
    "adoption": (
        "coordinator/src/engine/node.rs",
        "                seen.insert(report.incarnation);\n",
        "                seen.extend((report.incarnation.rank > 0).then_some(report.incarnation));\n",
        "rank 0 of a gang that runs is not adopted",
    ),
    "gang": (
        "coordinator/src/engine/state.rs",
        "    pub fn all_ended(&self) -> bool {\n        self.ended as usize == self.list.len()",
        "    pub fn all_ended(&self) -> bool {\n        self.ended as usize * 2 >= self.list.len()",
        "an attempt is over when half of its ranks have ended",
    ),
    "retention": (
        "worker/src/agent/engine/mod.rs",
        "let with_files = self.leaving.remove(&job).unwrap_or(false);",
        "let with_files = self.leaving.remove(&job).is_some();",
        "a job that is over goes with its files",
    ),
}


def copy(place):
    """The tree as it is, without what git ignores."""
    names = subprocess.check_output(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True).splitlines()
    tree = place / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for name in names:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            # With fresh times: what cargo built of the copy before may have been a bug.
            shutil.copyfile(ROOT / name, tree / name)
    # Seeds that found something before are not among the first thousand, which are to find it.
    (tree / KEPT).write_text("")
    return tree


def simulate(tree, place):
    # Not `cargo sim`: the copy lies below the tree, and cargo would join the alias of both.
    command = ["cargo", "test", "--quiet", "--release", "--locked", "--workspace", "--test", "simulation", "--", "--seeds", f"0..{SEEDS}"]
    env = {**os.environ, "CARGO_TARGET_DIR": str(place / "target")}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def main():
    place, wanted = pathlib.Path(sys.argv[1]), sys.argv[2:] or list(BUGS)
    if unknown := [name for name in wanted if name not in BUGS]:
        raise SystemExit(f"FAILED: no such bug: {', '.join(unknown)}; there are {', '.join(BUGS)}")
    tree = copy(place)
    code, out, err = simulate(tree, place)
    if code or "no violation" not in out:
        raise SystemExit(f"FAILED: the tree as it is does not pass:\n{out[-2000:]}{err[-2000:]}")
    for name in wanted:
        file, stands, bug, what = BUGS[name]
        path = tree / file
        text = path.read_text()
        if text.count(stands) != 1:
            raise SystemExit(f"FAILED: {name}: what is to be changed stands {text.count(stands)} times in {file}")
        path.write_text(text.replace(stands, bug))
        begun = time.monotonic()
        code, out, err = simulate(tree, place)
        path.write_text(text)
        found = re.search(r"^seed (\d+): (.*)$", out, re.M)
        if code == 0 or not found:
            raise SystemExit(f"FAILED: {name} ({what}) was not found in {SEEDS} seeds:\n{out[-1000:]}{err[-2000:]}")
        print(f"ok   {name}: {what}: seed {found[1]}: {found[2][:160]} ({time.monotonic() - begun:.0f} s)", flush=True)
    print(f"sim-bugs: {len(wanted)} of {len(wanted)} found within {SEEDS} seeds")


if __name__ == "__main__":
    main()
