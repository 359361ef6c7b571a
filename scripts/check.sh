#!/usr/bin/env bash
# The one gate: format, lints with warnings denied, tests, docs, dependencies, scripts. CI runs it through scripts/test.sh.
. "$(dirname "$0")/common.sh"
need cargo python3
LIBTORCH=$(scripts/fetch-libtorch.sh | tail -n 1) || die "libtorch could not be fetched"
export LIBTORCH
FEATURES=everlit-worker/torch

say "format"
cargo fmt --all -- --check || die "run: cargo fmt --all"
say "lints"
cargo clippy --release --locked --workspace --all-targets --features $FEATURES -- -D warnings || die "clippy has something to say"
say "house rules"
python3 scripts/tidy.py || die "a house rule is broken"
say "tests"
scripts/build.sh >/dev/null || exit 1
cargo test --release --locked --workspace --features $FEATURES || die "a test failed"
say "tests of the Python package"
EVERLIT_BIN=$BIN python3 -m unittest discover -s worker/python/tests || die "a test of the Python package failed"
say "docs"
RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --workspace --no-deps --features $FEATURES || die "the docs have faults"
say "dependencies"
if command -v cargo-deny >/dev/null; then
  # Advisories need the public database; without a way to it the rest is still checked.
  cargo deny --locked check bans licenses sources || die "cargo deny refuses a dependency"
  cargo deny --locked check advisories 2>/dev/null || say "SKIPPED: advisories: the advisory database could not be read, or has something to say: run cargo deny check advisories"
else
  say "SKIPPED: cargo deny is not installed (cargo install --locked cargo-deny)"
fi
if command -v shellcheck >/dev/null; then
  say "scripts"
  shellcheck -x -P scripts scripts/*.sh .ci/run || die "shellcheck has something to say"
else
  say "SKIPPED: shellcheck is not installed (Debian package shellcheck)"
fi
echo "check: ok"
