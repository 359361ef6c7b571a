#!/usr/bin/env bash
# The program for GPUs where none is: it builds, links and starts, computes the same bytes as the program for processors, and says in words
# that there is no GPU. What needs one is proved by scripts/gpu-check.sh. Fetches PyTorch for CUDA once per machine (about 4 GB).
. "$(dirname "$0")/common.sh"
need cargo c++ python3
temp=$(mktemp -d)
finish() {
  rm -rf "$temp"
  # target/release holds the program for processors again, as whoever comes next expects.
  scripts/build.sh >/dev/null || die "the program for processors could not be built again"
}
trap finish EXIT
scripts/build.sh >/dev/null || exit 1
cp "$BIN/everlit-worker" "$temp/cpu"
scripts/build.sh --cuda >/dev/null || exit 1
cp "$BIN/everlit-worker" "$temp/cuda"
export CUDA_VISIBLE_DEVICES=

train() { "$temp/$1" train --data "$BIN/sample-text" --batch-size 6 --micro-batch-size 4 --dropout 0.1 --steps 20 "${@:2}"; }
for precision in float32 bfloat16; do
  for program in cpu cuda; do
    train $program --precision $precision --checkpoint-dir "$temp/$program-$precision" >"$temp/log" 2>&1 || die "$program, $precision: $(tail -n 3 "$temp/log")"
    "$temp/$program" checksum "$temp/$program-$precision/step-000000000020" >"$temp/$program.sum" || die "$program: no checksum"
  done
  cmp -s "$temp/cpu.sum" "$temp/cuda.sum" || die "$precision: other bytes: $(cat "$temp/cpu.sum" "$temp/cuda.sum")"
  echo "ok   both programs end with the same bytes in $precision: $(cat "$temp/cpu.sum")"
done
refused() {
  local wanted=$1 words=$2 code=0
  "${@:3}" >"$temp/log" 2>&1 || code=$?
  if [ "$code" != "$wanted" ] || ! grep -q "$words" "$temp/log"; then die "$* ended with $code: $(tail -n 3 "$temp/log")"; fi
  echo "ok   exit $code: $(tail -n 1 "$temp/log")"
}
refused 1 "no GPU can be used here" train cuda --device cuda
refused 78 "has no CUDA" train cpu --device cuda
refused 77 "SKIPPED: no GPU can be used here" "$temp/cuda" gpu-check "$temp/check"
echo "e2e-cuda: 5 checks passed"
