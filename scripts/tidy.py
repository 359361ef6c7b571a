#!/usr/bin/env python3
"""House rules as a test: what a compiler does not check. Prints each breach with its file and ends with 1 if there is one."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = [ROOT / name for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split("\n") if name]
CODE_LINES_MAX = 600
# Of this machine: the checkout itself and the home folder.
OWN_PATHS = [f"{ROOT}/", f"{pathlib.Path.home()}/"]
faults = []


def fault(path, what):
    faults.append(f"{path.relative_to(ROOT)}: {what}")


def without_tests(text):
    """The part before the file's own test module."""
    return re.split(r"\n#\[cfg\(test\)\]\nmod \w+ \{", text)[0]


def manifest_dependencies(crate):
    text = (ROOT / crate / "Cargo.toml").read_text()
    section, names = "", {}
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif match := re.match(r"([A-Za-z0-9_-]+)(?:\.workspace)?\s*=", line):
            names.setdefault(section, set()).add(match[1])
    return names


for path in FILES:
    if path.suffix != ".rs" or not path.exists():
        continue
    text = path.read_text()
    name = str(path.relative_to(ROOT))
    body = without_tests(text)
    is_test = "/tests/" in name or name.endswith("tests.rs")
    if body.count("\n") > CODE_LINES_MAX and not is_test:
        fault(path, f"{body.count(chr(10))} lines without tests, at most {CODE_LINES_MAX}: would two files be clearer?")
    if "/src/" in name and not text.startswith("//!") and not is_test:
        fault(path, "no module header")
    if not is_test:
        for number, line in enumerate(body.splitlines(), 1):
            if re.search(r"\b(TODO|FIXME|XXX)\b", line):
                fault(path, f"line {number}: unfinished work")
    if "coordinator/src/engine/" in name or re.search(r"worker/src/agent/engine", name):
        for number, line in enumerate(body.splitlines(), 1):
            code = line.split("//")[0]
            if re.search(r"tokio|std::fs|std::net|SystemTime|Instant::now|HashMap|HashSet|std::env|rand::|crate::shell", code):
                fault(path, f"line {number}: the engine names I/O, a clock, randomness, unordered maps or the shell")

for crate, banned in {"coordinator": "everlit-worker", "worker": "everlit-coordinator", "api": "everlit-worker"}.items():
    if banned in manifest_dependencies(crate).get("dependencies", set()):
        fault(ROOT / crate / "Cargo.toml", f"depends on {banned}")

for path in FILES:
    if not path.exists() or path.suffix in {".lock", ".png"}:
        continue
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        continue
    for number, line in enumerate(text.splitlines(), 1):
        if any(own in line for own in OWN_PATHS):
            fault(path, f"line {number}: a path of one machine")

for line in faults:
    print(line)
print(f"tidy: {len(faults)} faults in {len(FILES)} files")
sys.exit(1 if faults else 0)
