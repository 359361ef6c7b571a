"""cargo-mutants over both engines, in a copy of the tree that holds the engines and what they are made of, and nothing else.

An engine does no I/O, so a copy without the shells around it builds in seconds. What is changed is the very source; the simulation runs it, too.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
#: What the simulation runs on each change that the unit tests did not notice.
SEEDS = 150
JOBS = len(os.sched_getaffinity(0))
#: Why a change that no test notices is none that a test should notice: a pattern of its line, and the reason.
EXCUSED = ROOT / "scripts" / "mutants.txt"
#: Package: what it keeps of its sources, the text of its lib.rs, its dependencies and those of its tests.
PACKAGES = {
    "coordinator": (
        ["src/engine", "tests/simulation"],
        {"src/lib.rs": "pub mod engine;\n"},
        ["serde", "serde_json", "sha2", "ulid"],
        ["expect-test", "proptest", "everlit-worker"],
    ),
    "worker": (
        ["src/agent/engine", "src/agent/environment.rs", "src/agent/limits.rs"],
        {
            "src/lib.rs": "pub mod agent;\n",
            "src/agent/mod.rs": "pub mod engine;\n#[cfg(test)]\nmod environment;\n#[allow(dead_code)]\nmod limits;\n",
        },
        ["serde", "serde_json"],
        ["expect-test", "proptest"],
    ),
}


def table(manifest, name):
    """The lines of a table of a manifest."""
    found = re.search(rf"^\[{re.escape(name)}\]\n(.*?)(?=^\[|\Z)", manifest, re.M | re.S)
    if not found:
        sys.exit(f"FAILED: Cargo.toml has no [{name}]")
    return f"[{name}]\n{found.group(1)}"


def copy(tree):
    """The engines as packages of their own."""
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT / "api", tree / "api")
    shutil.copy(ROOT / "Cargo.lock", tree)
    root = (ROOT / "Cargo.toml").read_text()
    members = '[workspace]\nresolver = "3"\nmembers = ["api", "coordinator", "worker"]\n'
    profile = "[profile.dev]\ndebug = false\nincremental = true\n"
    (tree / "Cargo.toml").write_text("\n".join([members, *(table(root, f"workspace.{name}") for name in ("package", "dependencies")), profile]))
    api = (tree / "api" / "Cargo.toml").read_text()
    (tree / "api" / "Cargo.toml").write_text(api.replace("[lints]\nworkspace = true\n", "").split("[dev-dependencies]")[0])
    for name, (kept, written, dependencies, in_tests) in PACKAGES.items():
        place = tree / name
        for path in kept:
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / name / path).is_dir() else shutil.copy)(ROOT / name / path, place / path)
        for path, text in written.items():
            (place / path).write_text(text)
        package = tomllib.loads((ROOT / name / "Cargo.toml").read_text())["package"]["name"]
        lines = [f'[package]\nname = "{package}"\nversion = "0.0.0"\nedition.workspace = true\n']
        lines.append("[dependencies]\neverlit-api.workspace = true\n" + "".join(f"{d}.workspace = true\n" for d in dependencies))
        lines.append("[dev-dependencies]\n" + "".join(f"{d}.workspace = true\n" for d in in_tests))
        if (place / "tests").is_dir():
            lines.append('[[test]]\nname = "simulation"\npath = "tests/simulation/main.rs"\nharness = false\n')
        (place / "Cargo.toml").write_text("\n".join(lines))
    simulation = tree / "coordinator" / "tests" / "simulation" / "main.rs"
    text, fewer = simulation.read_text(), f"((0, {SEEDS}), false)"
    if "((0, 2_000), false)" not in text:
        sys.exit("FAILED: tests/simulation/main.rs does not say how many seeds it runs where scripts/mutants.py looks for it")
    simulation.write_text(text.replace("((0, 2_000), false)", fewer))


def command(tree):
    """cargo-mutants over the engines."""
    yield from ("cargo", "mutants", "--dir", str(tree), "--colors=never", "--gitignore=false")
    yield from ("--file=coordinator/src/engine/**", "--file=worker/src/agent/engine/**", "--exclude=**/tests/**", "--exclude=**/tests.rs")


def mutants(tree, out, *arguments, **environment):
    """One pass. What it found is in files; only a tree whose own tests fail is an error."""
    options = ["--output", str(out), f"--jobs={JOBS}", "--no-times"]
    code = subprocess.run([*command(tree), *options, *arguments], env=os.environ | environment, check=False).returncode
    if code not in (0, 2, 3):
        sys.exit(f"FAILED: cargo mutants ended with {code}")


def lines(out, name):
    """The changes that ended so."""
    path = out / "mutants.out" / name
    return path.read_text().splitlines() if path.exists() else []


class Found:
    """The changes that ended in one way, over all passes: in a file, so that another run can go on."""

    def __init__(self, path):
        self.path = path
        self.lines = set(path.read_text().splitlines()) if path.exists() else set()

    def add(self, more):
        self.lines |= set(more)
        self.path.write_text("".join(f"{line}\n" for line in sorted(self.lines)))


def settle(out, noticed, unviable):
    """Keeps what a pass found, and has the next one leave it out: cargo-mutants would try again what ran into a time-out."""
    unviable.add(lines(out, "unviable.txt"))
    late = lines(out, "timeout.txt")
    noticed.add(set(lines(out, "caught.txt")) | set(late))
    with (out / "mutants.out" / "caught.txt").open("a") as caught:
        caught.writelines(f"{line}\n" for line in late)


def report(unit, simulated, missed):
    """What was caught where, and what was not, with the reason where there is one."""
    excuses = [line.split("  ", 1) for line in EXCUSED.read_text().splitlines() if line and not line.startswith("#")]
    excused = 0
    for line in missed:
        why = next((reason for pattern, reason in excuses if pattern in line), None)
        excused += why is not None
        print(f"  {line}: {why}" if why else f"  NOT NOTICED {line}")
    caught = len(unit | simulated)
    total = caught + len(missed)
    print(f"{total} changes: {len(unit)} caught by unit tests, {len(simulated - unit)} by the simulation ({SEEDS} seeds and the kept ones), "
          f"{len(missed)} not noticed ({excused} with a reason): {100 * caught / max(1, total):.1f} % caught")


def main():
    out, shard = pathlib.Path(sys.argv[1]), sys.argv[2]
    tree, again = out / "tree", os.environ.get("EVERLIT_MUTANTS_AGAIN") == "1"
    if not again:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    copy(tree)
    unit, simulated, unviable = Found(out / "unit"), Found(out / "simulated"), Found(out / "unviable")
    if (out / "mutants.out").exists():
        # Of a run that was ended.
        settle(out, simulated if (out / "simulating").exists() else unit, unviable)
    (out / "simulating").unlink(missing_ok=True)
    mutants(tree, out, f"--shard={shard}", *(["--iterate"] if again else []), "--", "--lib")
    settle(out, unit, unviable)
    (out / "simulating").touch()
    simulation = ["--iterate", "--test-package=everlit-coordinator", "--", "--test", "simulation"]
    mutants(tree, out, f"--shard={shard}", *simulation, CARGO_PROFILE_DEV_OPT_LEVEL="1")
    missed = lines(out, "missed.txt")
    settle(out, simulated, unviable)
    # Those of an earlier run may be of lines that are others by now.
    all_of_them = set(subprocess.run([*command(tree), "--list", f"--shard={shard}"], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines())
    report(unit.lines & all_of_them, simulated.lines & all_of_them, missed)

main()
