#!/usr/bin/env bash
# Plants a bug in each of six places, one at a time, in a copy of the tree, and shows that the simulation finds each within 1,000 seeds.
# Takes some minutes: every bug is compiled. `scripts/sim-bugs.sh NAME…` plants single ones of scripts/sim_bugs.py.
. "$(dirname "$0")/common.sh"
need cargo python3 git
exec python3 scripts/sim_bugs.py "$TARGET/sim-bugs" "$@"
