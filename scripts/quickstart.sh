#!/usr/bin/env bash
# From nothing to a training job that survives a kill: builds, starts the coordinator, submits a real job by curl, kills one of its ranks
# with -9 on the way, and prints the summary. Safe to run again; the second run starts within seconds.
. "$(dirname "$0")/common.sh"
need cargo c++ python3 curl git

STEPS=${STEPS:-300}
EVERLIT=$(scripts/build.sh | tail -n 1) || exit 1
PORT=8000
if curl -s -o /dev/null "http://127.0.0.1:$PORT/"; then PORT=$(free_port); fi
URL=http://127.0.0.1:$PORT
DATA=$TARGET/quickstart
say "starting: everlit up --listen 127.0.0.1:$PORT --data-dir $DATA"
mkdir -p "$DATA"
"$EVERLIT" up --listen "127.0.0.1:$PORT" --data-dir "$DATA" >"$DATA/up.log" 2>&1 &
UP=$!
finish() {
  kill -INT "$UP" 2>/dev/null || true
  wait "$UP" 2>/dev/null || true
}
trap finish EXIT
wait_for 20 curl -sf "$URL/readyz" -o /dev/null || die "the coordinator did not get ready; $DATA/up.log says why"

BODY='{"name": "quickstart", "world_size": 2, "worker": {"steps": '$STEPS'}}'
say "submitting: curl -s -X POST $URL/jobs -H 'Content-Type: application/json' -d '$BODY'"
JOB_ID=$(curl -s -X POST "$URL/jobs" -H "Content-Type: application/json" -d "$BODY" | json job_id)
[ -n "$JOB_ID" ] || die "the job was not accepted; $DATA/up.log says why"
summary() { curl -s "$URL/jobs/$JOB_ID/summary"; }
field() { summary | json "$1"; }
step_is_past() {
  case $(field state) in failed | stopped) die "the job ended: $(field reason)" ;; esac
  [ "$(field step | sed 's/^$/0/')" -ge "$1" ]
}
is_final() { case $(field state) in succeeded | failed | stopped) true ;; *) false ;; esac; }

wait_for 300 step_is_past 5 || die "no step within 5 minutes: $(field reason)"
FIRST_LOSS=$(field loss)
wait_for 600 step_is_past 120 || die "step 120 was not reached: $(field reason)"
PID=$(field ranks.1.pid)
say "step $(field step), loss $(field loss): kill -9 of rank 1 (process $PID)"
kill -9 "$PID"
wait_for 1800 is_final || die "the job did not end: $(field reason)"

echo "the end of its log:"
curl -s "$URL/jobs/$JOB_ID/logs?tail=4"
echo "its summary (curl $URL/jobs/$JOB_ID/summary):"
summary | python3 -m json.tool
STATE=$(field state) RESTARTS=$(field restarts) LOST=$(field lost_steps) LOSS=$(field loss)
[ "$STATE" = succeeded ] || die "the job ended as $STATE: $(field reason)"
[ "$RESTARTS" = 1 ] || die "restarts is $RESTARTS, not 1"
python3 -c "import sys; sys.exit(not float('$LOSS') < float('$FIRST_LOSS'))" || die "the loss did not fall: $FIRST_LOSS to $LOSS"
echo "quickstart: succeeded: loss $FIRST_LOSS -> $LOSS over $STEPS steps, restarts: $RESTARTS, steps repeated: $LOST"
