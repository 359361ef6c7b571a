#!/usr/bin/env bash
# Sets up what the tests need and runs all of them: the gate (scripts/check.sh) and the end-to-end scripts.
. "$(dirname "$0")/common.sh"
need cargo c++ python3 curl git
started=$(date +%s)
skipped=0
passed=0
scripts/check.sh || die "scripts/check.sh failed"
for script in scripts/e2e-*.sh; do
  say "$script"
  code=0
  "$script" || code=$?
  case $code in
    0) passed=$((passed + 1)) ;;
    77) skipped=$((skipped + 1)) ;;
    *) die "$script failed with $code" ;;
  esac
done
say "took $(($(date +%s) - started)) s"
echo "$((passed + 1)) passed, 0 failed, $skipped skipped"
