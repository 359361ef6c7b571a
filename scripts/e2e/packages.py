"""Folders that go with jobs, from the outside: packed here, run on nodes that share nothing, and refused when they are no good (scripts/e2e-nodes.sh)."""

import contextlib
import gzip
import hashlib
import http.client
import io
import os
import pathlib
import subprocess
import tarfile
import tempfile
import time

from doors import told
from joining import Cluster
from lib import BIN, Everlit, run, until


def package_of(*entries):
    """A gzipped tar of (name, type, bytes, changes of the header)."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, data, *changes in entries:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data)
            for change in changes:
                for key, value in change.items():
                    setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data) if data else None)
    return gzip.compress(raw.getvalue(), 1, mtime=0)


def put(everlit, packed, name=None, **more):
    name = name or hashlib.sha256(packed).hexdigest()
    return everlit.request("PUT", f"/packages/{name}", packed, headers={"Content-Type": "application/gzip"}, **more)


def kept(everlit):
    return sorted(f.name for f in (everlit.data / "packages").iterdir())


@contextlib.contextmanager
def project():
    with tempfile.TemporaryDirectory(prefix="everlit-e2e-project-") as folder:
        root = pathlib.Path(folder)
        (root / "lib").mkdir()
        (root / "lib/word.txt").write_text("hello from a packed folder\n")
        (root / "run.sh").write_text("#!/bin/sh\ncat lib/word.txt\ntest -e left-by-$RANK || { touch left-by-$RANK; exit 3; }\necho again in $PWD\n")
        (root / "run.sh").chmod(0o755)
        (root / ".gitignore").write_text("*.pt\n")
        (root / "model.pt").write_text("large")
        (root / ".git").mkdir()
        (root / ".git/HEAD").write_text("x")
        (root / "to-word").symlink_to("lib/word.txt")
        yield root


def cli(everlit, *words, cwd=None, token=None, code=0):
    env = {k: v for k, v in os.environ.items() if not k.startswith("EVERLIT_")}
    env["EVERLIT_URL"] = everlit.url
    if everlit.tls:
        env |= {"EVERLIT_CA_FILE": str(everlit.data / "ca/ca.pem"), "EVERLIT_TOKEN": token or everlit.token}
    done = subprocess.run([BIN / "everlit", *words], env=env, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, (words, done)
    return done


def a_packed_folder_runs_on_nodes_that_share_nothing():
    with Cluster() as everlit, project() as root:
        agents = [everlit.join(name, "--slots", "1") for name in ["one", "two"]]
        alice = everlit.made("alice", "user")
        done = cli(everlit, "submit", "--workdir", ".", "-n", "2", "--", "./run.sh", cwd=root, token=alice)
        job = done.stdout.strip()
        assert "packed 4 files" in done.stderr, done.stderr
        print(f"     {done.stderr.strip()}")
        summary = everlit.final(job)
        assert summary["state"] == "succeeded" and summary["restarts"] >= 1, summary
        assert {r["node"] for r in summary["ranks"]} == {"one", "two"}, summary["ranks"]
        log = everlit.get(f"/jobs/{job}/logs", raw=True).decode()
        assert log.count("hello from a packed folder") >= 3, log
        for rank, agent in enumerate(agents):
            folder = agent.data / f"jobs/{job}/workdir"
            assert f"again in {folder}" in log, log
            assert sorted(f.name for f in folder.iterdir() if not f.name.startswith("left-by")) == [".gitignore", "lib", "run.sh", "to-word"]
            assert not (folder / "to-word").is_symlink(), "no link travels"
        package = everlit.get(f"/jobs/{job}")["spec"]["package"]
        assert kept(everlit) == [package] and [f.name for f in (agents[0].data / "packages").iterdir()] == [package]
        # The same files are the same package: nothing is uploaded again. A job of its own has a folder of its own.
        (root / "lib/word.txt").touch()
        second = cli(everlit, "submit", "--workdir", root, "--", "sh", "-c", "ls; test ! -e left-by-0", token=alice).stdout.strip()
        assert everlit.final(second)["state"] == "succeeded", everlit.get(f"/jobs/{second}/logs", raw=True)
        puts = [a for a in everlit.get("/audit?limit=100")["data"] if a["operation"] == "put_package"]
        assert len(puts) == 1 and puts[0]["user"] == "alice" and puts[0]["allowed"], puts
        # A folder of it; and a node that comes later gets it, too, after a restart of the coordinator.
        everlit.kill()
        everlit.up()
        everlit.join("three", "--label", "late=yes")
        words = ["--workdir", root, "--set", "workdir=lib", "--set", "node_selector.late=yes", "--", "cat", "word.txt"]
        third = cli(everlit, "submit", *words).stdout.strip()
        assert everlit.final(third)["state"] == "succeeded" and everlit.summary(third)["ranks"][0]["node"] == "three"
        # It goes with its job.
        folder = agents[0].data / f"jobs/{job}"
        assert folder.exists()
        everlit.request("DELETE", f"/jobs/{job}")
        until("the job's files are gone", lambda: not folder.exists(), 20)


def who_may_not_and_what_is_not_there_is_told():
    with Cluster() as everlit:
        everlit.join("one")
        good = package_of(("a", tarfile.REGTYPE, b"x"))
        name = hashlib.sha256(good).hexdigest()
        for role, allowed in [("viewer", False), ("user", True)]:
            with everlit.as_(everlit.made(role, role)):
                if allowed:
                    assert put(everlit, good) == {"package": name, "bytes": len(good)} == everlit.get(f"/packages/{name}")
                else:
                    told(everlit.refused("PUT", f"/packages/{name}", good), 403, "forbidden")
                    told(everlit.refused("GET", f"/packages/{name}"), 403, "forbidden")
                told(everlit.refused("GET", f"/agent/packages/{name}"), 403, "forbidden", "certificate")
        other = "0" * 64
        told(everlit.refused("GET", f"/packages/{other}"), 404, "not_found", "upload it")
        told(everlit.refused("GET", "/packages/..%2Fadmin.token"), 404, "not_found", "64 lower-case")
        for query in ["", "?dry_run=true"]:
            told(everlit.refused("POST", f"/jobs{query}", {"command": ["true"], "package": other}), 422, "invalid", "/package is not here", "everlit submit --workdir")
        for bad in [{"package": other}, {"command": ["x"], "package": "../x"}, {"command": ["x"], "package": name, "workdir": "/etc"}, {"command": ["x"], "package": name, "workdir": "../.."}]:
            told(everlit.refused("POST", "/jobs", bad), 422, "invalid")
        # A folder that is not in it is told as any that is not there.
        job = everlit.final(everlit.submit(command=["true"], package=name, workdir="none"))
        assert job["state"] == "failed" and "could not enter the folder" in job["reason"], job
        print(f"     {job['reason']}")


def what_is_no_good_never_reaches_an_agent():
    with Everlit() as everlit:
        reg = tarfile.REGTYPE
        refused = lambda packed, *parts: told(everlit.refused("PUT", f"/packages/{hashlib.sha256(packed).hexdigest()}", packed), 422, "invalid", *parts)
        refused(package_of(("../x", reg, b"x")), "`../x` in it has `..`")
        refused(package_of(("a/../../x", reg, b"x")), "has `..`")
        refused(package_of(("/etc/x", reg, b"x")), "is an absolute path")
        refused(package_of(("out", tarfile.SYMTYPE, b"", {"linkname": "/etc"}), ("out/x", reg, b"x")), "`out` in it is a link")
        refused(package_of(("in", tarfile.SYMTYPE, b"", {"linkname": "a"})), "is a link")
        refused(package_of(("hard", tarfile.LNKTYPE, b"", {"linkname": "/etc/passwd"})), "is a link")
        for kind in [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]:
            refused(package_of(("null", kind, b"")), "is a device or a pipe")
        refused(package_of(("a", reg, b"1"), ("./a", reg, b"2")), "is there twice")
        refused(package_of(("a" * 90 + "/" + "b" * 300, reg, b"")), "more than 255 bytes")
        # Bombs: a size that is claimed, and names without end.
        claimed = tarfile.TarInfo("zeros")
        claimed.size = 5 << 30
        refused(gzip.compress(claimed.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20), 1), "unpacks to more than a job may bring")
        begun = time.monotonic()
        many = b"".join(tarfile.TarInfo(f"d/{n}").tobuf(tarfile.GNU_FORMAT) for n in range(100_001))
        bomb = gzip.compress(many + bytes(1024), 6)
        assert len(bomb) < 8 << 20, len(bomb)
        refused(bomb, "more than 100000 files and folders")
        print(f"     a bomb of {len(bomb) >> 10} KiB ({len(many) >> 20} MiB of names) in {time.monotonic() - begun:.1f} s")
        refused(b"no package", "no gzipped tar")
        good = package_of(("a", reg, bytes(range(256)) * 4000))
        refused(good[:-20], "cut off or damaged")
        wrong = everlit.refused("PUT", f"/packages/{'0' * 64}", good)
        told(wrong, 422, "invalid", "its bytes have the sha256 " + hashlib.sha256(good).hexdigest())
        # Too long: told before it is sent.
        door = http.client.HTTPConnection("127.0.0.1", everlit.port, timeout=20)
        door.putrequest("PUT", f"/packages/{'0' * 64}")
        door.putheader("Content-Length", str((512 << 20) + 1))
        door.endheaders()
        assert door.getresponse().status == 413
        # One that is cut off by the death of the coordinator leaves nothing.
        door = http.client.HTTPConnection("127.0.0.1", everlit.port, timeout=20)
        door.putrequest("PUT", f"/packages/{hashlib.sha256(good).hexdigest()}")
        door.putheader("Content-Length", str(len(good)))
        door.endheaders(good[: len(good) // 2])
        until("a part of it", lambda: kept(everlit), 20)
        assert all(name.endswith(".part") for name in kept(everlit)), kept(everlit)
        everlit.kill()
        Everlit.up(everlit)
        assert kept(everlit) == [], kept(everlit)
        put(everlit, good)
        assert kept(everlit) == [hashlib.sha256(good).hexdigest()]
        everlit.submit(command=["true"], package=hashlib.sha256(good).hexdigest())


def the_command_line_says_what_can_not_be_packed():
    with Everlit() as everlit, project() as root:
        here = cli(everlit, "submit", "--", "sh", "-c", "pwd; touch written-here", cwd=root).stdout.strip()
        assert everlit.final(here)["state"] == "succeeded" and (root / "written-here").exists(), "without --workdir it runs in place"
        copy = cli(everlit, "submit", "--workdir", ".", "--follow", "--", "sh", "-c", "touch in-the-copy; cat to-word", cwd=root)
        assert not (root / "in-the-copy").exists() and "left out" not in copy.stderr, copy.stderr
        plan = cli(everlit, "submit", "--workdir", "lib", "--dry-run", "--", "true", cwd=root)
        assert "fits now" in plan.stdout and "it would be uploaded" in plan.stderr and len(kept(everlit)) == 1, plan
        (root / "dangling").symlink_to("nowhere")
        assert "left out: dangling: a link to what is not there" in cli(everlit, "submit", "--workdir", ".", "--", "true", cwd=root).stderr
        (root / "out").symlink_to("/etc/passwd")
        for words, part, code in [
            (["--workdir", "."], "`out` is a link that leads out of the folder", 1),
            (["--workdir", "run.sh"], "is no folder", 1),
            (["--workdir", "/no/such/folder"], "named with --set workdir=/PATH", 2),
        ]:
            done = cli(everlit, "submit", *words, "--", "true", cwd=root, code=code)
            assert part in done.stderr, done.stderr
            print(f"     {done.stderr.strip()[:170]}")
        (root / "out").unlink()
        with open(root / "big.bin", "wb") as big:
            big.truncate((4 << 30) + 1)
        done = cli(everlit, "submit", "--workdir", ".", "--", "true", cwd=root, code=1)
        assert "Largest: big.bin (4.0 GiB)" in done.stderr, done.stderr
        print(f"     {done.stderr.strip()[:170]}")
        (root / ".everlitignore").write_text("big.bin\n")
        # With tar and curl alone.
        script = (
            f"tar czf ../packed.tgz --exclude=.git --exclude=big.bin --dereference --hard-dereference -C . . 2>/dev/null; sum=$(sha256sum ../packed.tgz | cut -d' ' -f1) && "
            f"curl -sf -T ../packed.tgz {everlit.url}/packages/$sum >&2 && echo $sum; rm -f ../packed.tgz"
        )
        (root / "dangling").unlink()
        with tempfile.TemporaryDirectory() as above:
            inner = pathlib.Path(above) / "project"
            root.rename(inner)
            try:
                done = subprocess.run(["sh", "-c", script], cwd=inner, capture_output=True, text=True, timeout=60)
            finally:
                inner.rename(root)
        package = done.stdout.strip()
        assert len(package) == 64, done
        job = everlit.submit(command=["cat", "word.txt"], package=package, workdir="lib")
        assert everlit.final(job)["state"] == "succeeded", everlit.summary(job)


CHECKS = [
    a_packed_folder_runs_on_nodes_that_share_nothing,
    who_may_not_and_what_is_not_there_is_told,
    what_is_no_good_never_reaches_an_agent,
    the_command_line_says_what_can_not_be_packed,
]

if __name__ == "__main__":
    run(CHECKS, "packages")
