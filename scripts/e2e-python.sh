#!/usr/bin/env bash
# The Python package from the outside: a PyTorch DDP script under the coordinator that is killed and goes on, and
# checkpoints that Rust and Python open from each other. `scripts/e2e-python.sh NAME…` runs single checks of scripts/e2e/python.py.
# Without PyTorch for `python3` (or $PYTHON) an environment is made, see scripts/fetch-python-torch.sh.
# EVERLIT_BIN: where built programs are, instead of building them.
. "$(dirname "$0")/common.sh"
need python3
python=${PYTHON:-python3}
if ! "$python" -c 'import numpy, torch.distributed' 2>/dev/null; then
  if ! python=$(scripts/fetch-python-torch.sh | tail -n 1); then
    echo "SKIPPED: PyTorch is not there and could not be fetched"
    exit 77
  fi
fi
if [ -z "${EVERLIT_BIN:-}" ]; then
  scripts/build.sh >/dev/null || exit 1
  export EVERLIT_BIN=$BIN
fi
if [ $# = 0 ]; then
  say "tests of the package, with PyTorch"
  "$python" -m unittest discover -s worker/python/tests || die "a test of the Python package failed"
fi
PYTHONPATH=worker/python "$python" scripts/e2e/python.py "$@"
