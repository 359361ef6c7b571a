#!/usr/bin/env bash
# Measures what README states, on the built programs and loopback: a table, and the same as JSON in target/bench/results.json.
# `scripts/bench.sh [AREA…]` with areas: control, engine, logs, train, recovery, large, idle, agents, store, steps, checkpoint (all by default).
# large needs about 16 GB of memory; steps and recovery run PyTorch beside us, which is fetched once (scripts/fetch-python-torch.sh, about 4 GB).
. "$(dirname "$0")/common.sh"
need python3
scripts/build.sh >/dev/null || exit 1
program() {
  local built
  built=$(cargo build --release --locked -p everlit-coordinator --bench "$1" --message-format=json 2>/dev/null |
    python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message.get("target", {}).get("name") == sys.argv[1]:
        print(message["executable"])' "$1") || die "the bench program $1 could not be built"
  [ -n "$built" ] || die "the bench program $1 could not be built"
  printf '%s\n' "$built"
}
LOAD=$(program load)
ENGINE=$(program engine)
EVERLIT_WEED=
case " ${*:-store} " in
  *" store "*) EVERLIT_WEED=$(scripts/fetch-s3-server.sh | tail -n 1) || die "the S3 server could not be fetched" ;;
esac
export EVERLIT_WEED
PYTHON_TORCH=
case " ${*:-steps} " in
  *" steps "* | *" recovery "*) PYTHON_TORCH=$(scripts/fetch-python-torch.sh | tail -n 1) || die "PyTorch could not be fetched" ;;
esac
mkdir -p "$TARGET/bench"
EVERLIT_PYTHON=$PYTHON_TORCH EVERLIT_BIN=$BIN EVERLIT_LOAD=$LOAD EVERLIT_ENGINE=$ENGINE EVERLIT_RESULTS=$TARGET/bench/results.json PYTHONPATH=scripts/e2e python3 scripts/bench/main.py "$@"
