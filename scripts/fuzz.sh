#!/usr/bin/env bash
# Runs every fuzz target for a while: `scripts/fuzz.sh [SECONDS [TARGET…]]`, 60 s each by default; the last line is the verdict.
# Needs the stable toolchain and a C++ compiler (for libFuzzer); neither nightly nor cargo-fuzz. What it finds is kept in target/fuzz/TARGET,
# and the corpus grows there; fuzz/seeds is what it begins with.
. "$(dirname "$0")/common.sh"
SECONDS_EACH=${1:-60}
shift || true
need cargo
[ "$(uname -s)" = Linux ] || { echo "SKIPPED: everlit runs on Linux only"; exit 77; }
command -v c++ >/dev/null || { echo "SKIPPED: no C++ compiler (Debian package g++)"; exit 77; }
TARGETS=("$@")
[ ${#TARGETS[@]} -gt 0 ] || TARGETS=(frames tokens job_specs)

# What cargo-fuzz says, less the address sanitizer: there is no unsafe code in what is tried, and without it stable is enough.
HOST=$(rustc -vV | sed -n 's/^host: //p')
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks"
export CARGO_TARGET_DIR=$TARGET/fuzz-build
say "building"
cargo build --release --locked --manifest-path fuzz/Cargo.toml --target "$HOST" || die "the fuzz targets could not be built"
unset RUSTFLAGS

found=0
for target in "${TARGETS[@]}"; do
  program=$CARGO_TARGET_DIR/$HOST/release/$target
  [ -x "$program" ] || die "there is no fuzz target $target"
  own=$TARGET/fuzz/$target
  mkdir -p "$own/corpus" "$own/found"
  say "$target for $SECONDS_EACH s"
  # A frame may be 16 MiB: what is larger than this is only longer.
  if "$program" "$own/corpus" "fuzz/seeds/$target" -max_total_time="$SECONDS_EACH" -max_len=65536 -timeout=10 -rss_limit_mb=2048 \
    -artifact_prefix="$own/found/" -print_final_stats=1 >"$own/log" 2>&1; then
    say "$target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$own/log") inputs, $(grep -o 'cov: [0-9]*' "$own/log" | tail -n 1) edges"
  else
    found=$((found + 1))
    tail -n 20 "$own/log" >&2
    say "$target: something was found, see $own/found and $own/log"
  fi
done
[ "$found" = 0 ] || die "$found of ${#TARGETS[@]} targets found something"
echo "fuzz: ${#TARGETS[@]} targets for $SECONDS_EACH s each, nothing found"
