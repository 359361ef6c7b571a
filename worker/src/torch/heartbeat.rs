//! The heartbeat file, and the watch over a rank that was told to end.
//!
//! The training loop only changes numbers under a mutex; a thread of its own writes the file, at most ten times a second
//! and at least four times, so that a slow disk never slows a step. The same thread looks at SIGTERM: before training
//! there is nothing to save and the process ends at once; in a step that does not return (a peer is gone or stuck) it
//! aborts the process group, which gives the training loop its error. So it does when another membership holds.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use everlit_api::manifest::{Heartbeat, Phase, SaveError};
use everlit_api::time::Timestamp;

use super::c10d::Group;
use super::parts::{Parts, StepTimes};
use super::rendezvous::Meeting;
use super::{EXIT_TERMINATED, environment::Environment, signals};

const WRITE_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// Between two looks for SIGTERM and another membership.
const LOOK_INTERVAL: Duration = Duration::from_millis(25);
/// The agent knows by it that a rank runs (`QUIET_MS` there).
const WRITE_INTERVAL_MAX: Duration = Duration::from_millis(250);
/// A step that takes this long after SIGTERM, and three times the longest so far, is blocked.
const BLOCKED_AFTER: Duration = Duration::from_secs(3);
/// A save has more time: its disk may be slow.
const SAVE_BLOCKED_AFTER: Duration = Duration::from_secs(10);
/// What a save may take before one was measured.
const SAVE_UNKNOWN: Duration = Duration::from_secs(40);

struct State {
    beat: Heartbeat,
    /// Of the steps that no heartbeat has told yet.
    parts: Parts,
    changed: bool,
    ended: bool,
    /// When the step or phase that runs now began.
    since: Instant,
    longest_step: Duration,
    longest_save: Option<Duration>,
    group: Option<Arc<Group>>,
    /// Whether `group` was aborted.
    aborted: bool,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    path: Option<PathBuf>,
    /// Where later memberships are said.
    meeting: Option<Meeting>,
}

/// The sign of life of this process. Dropping it writes the last state.
pub struct Pulse {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    /// Writes the first heartbeat and starts the thread.
    pub fn start(environment: &Environment, total_steps: u64) -> Self {
        let beat = Heartbeat {
            seq: 0,
            pid: std::process::id(),
            rank: environment.rank,
            seat: (environment.seat != environment.rank).then_some(environment.seat),
            attempt: environment.attempt.unwrap_or(0),
            generation: environment.generation,
            phase: Some(Phase::Init),
            step: None,
            total_steps: Some(total_steps),
            samples: None,
            loss: None,
            metrics: Default::default(),
            saves_on_signal: environment.checkpoint_dir.is_some() && !environment.spare,
            in_place: None,
            save_error: None,
            time: None,
        };
        let (since, longest_step) = (Instant::now(), Duration::ZERO);
        let parts = Parts::default();
        let state =
            State { beat, parts, changed: false, ended: false, since, longest_step, longest_save: None, group: None, aborted: false };
        let path = environment.heartbeat_file.clone();
        let meeting = environment.rendezvous.as_deref().and_then(|address| Meeting::at(address).ok());
        let shared = Arc::new(Shared { state: Mutex::new(state), wake: Condvar::new(), path, meeting });
        shared.write();
        let own = shared.clone();
        let thread = std::thread::Builder::new().name("heartbeat".into()).spawn(move || own.run()).ok();
        Self { shared, thread }
    }

    /// Enters a phase.
    pub fn phase(&self, phase: Phase) {
        let mut state = self.shared.lock();
        state.beat.phase = Some(phase);
        state.changed = true;
        state.since = Instant::now();
    }

    /// A figure of the run; one that is not a finite number is left out.
    pub fn metric(&self, name: &str, value: f64) {
        let mut state = self.shared.lock();
        if !value.is_finite() {
            state.beat.metrics.remove(name);
        } else if let Some(known) = state.beat.metrics.get_mut(name) {
            *known = value;
        } else {
            state.beat.metrics.insert(name.into(), value);
        }
    }

    /// Work goes on inside a phase.
    pub fn alive(&self) {
        self.shared.lock().since = Instant::now();
    }

    /// A save took so long.
    pub fn saved(&self, time: Duration) {
        let mut state = self.shared.lock();
        state.longest_save = state.longest_save.max(Some(time));
        state.beat.save_error = None;
        state.changed = true;
    }

    /// A save failed and training goes on.
    pub fn save_failed(&self, step: u64, reason: &str) {
        let mut state = self.shared.lock();
        state.beat.save_error = Some(SaveError { step, reason: reason.chars().take(512).collect() });
        state.changed = true;
    }

    /// Where the time of a step went; before [`Pulse::step`] says that it is done.
    pub fn spent(&self, times: StepTimes) {
        self.shared.lock().parts.add(times);
    }

    /// Updates are done up to `step`.
    pub fn step(&self, step: u64, samples: u64, loss: Option<f64>, rate: f64) {
        let now = Instant::now();
        let mut state = self.shared.lock();
        state.beat.step = Some(step);
        state.beat.samples = Some(samples);
        state.beat.loss = loss;
        match state.beat.metrics.get_mut("lr") {
            Some(known) => *known = rate,
            None => drop(state.beat.metrics.insert("lr".into(), rate)),
        }
        state.longest_step = state.longest_step.max(now - state.since);
        state.since = now;
        state.changed = true;
    }

    /// The group to abort when a step is blocked after SIGTERM, or another membership holds.
    pub fn watch(&self, group: Arc<Group>) {
        let mut state = self.shared.lock();
        (state.group, state.aborted) = (Some(group), false);
    }

    /// The group is gone; nothing is done until the next membership.
    pub fn leave(&self) {
        let mut state = self.shared.lock();
        state.group = None;
        state.beat.phase = Some(Phase::Load);
        state.changed = true;
        state.since = Instant::now();
    }

    /// Another membership: what was done in the one before says nothing about this one.
    pub fn join(&self, environment: &Environment, generation: u32) {
        let mut state = self.shared.lock();
        state.beat.rank = environment.rank;
        state.beat.seat = (environment.seat != environment.rank).then_some(environment.seat);
        state.beat.generation = generation;
        state.beat.step = None;
        state.parts = Parts::default();
        state.beat.saves_on_signal = environment.checkpoint_dir.is_some();
        state.changed = true;
    }

    /// For a thread that tells one thing later.
    pub fn handle(&self) -> PulseHandle {
        PulseHandle { shared: self.shared.clone() }
    }
}

/// What another thread may tell.
pub struct PulseHandle {
    shared: Arc<Shared>,
}

impl PulseHandle {
    /// Whether this rank can go on with others in place of lost ones.
    pub fn in_place(&self, can: bool) {
        let mut state = self.shared.lock();
        state.beat.in_place = Some(can);
        state.changed = true;
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic there was printed; the last word is written below in any case.
            let _ = thread.join();
        }
        self.shared.write();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut written = Instant::now();
        let mut terminating: Option<Instant> = None;
        loop {
            let state = self.lock();
            if state.ended {
                return;
            }
            let (mut state, _) = self.wake.wait_timeout(state, LOOK_INTERVAL).unwrap_or_else(PoisonError::into_inner);
            if signals::terminate_requested() {
                let told = *terminating.get_or_insert_with(Instant::now);
                on_terminating(&mut state, told);
            }
            let generation = state.beat.generation;
            if state.group.is_some() && self.meeting.as_ref().is_some_and(|meeting| meeting.after(generation).is_some()) {
                abort(&mut state);
            }
            let age = written.elapsed();
            let due = (state.changed && age >= WRITE_INTERVAL_MIN) || age >= WRITE_INTERVAL_MAX;
            drop(state);
            if due {
                self.write();
                written = Instant::now();
            }
        }
    }

    fn write(&self) {
        let text = {
            let mut guard = self.lock();
            let state = &mut *guard;
            state.parts.tell(&mut state.beat.metrics);
            state.beat.seq += 1;
            state.changed = false;
            state.beat.time = Some(Timestamp::now().to_string());
            serde_json::to_vec(&state.beat)
        };
        let (Some(path), Ok(text)) = (&self.path, text) else { return };
        let draft = path.with_extension("tmp");
        // A heartbeat that can't be written shows as silence, which is the truth about this node's disk.
        let _ = fs::write(&draft, text).and_then(|()| fs::rename(&draft, path));
    }
}

fn on_terminating(state: &mut State, told: Instant) {
    let patience = match (state.beat.phase, state.longest_save) {
        (Some(Phase::Init | Phase::Load), _) => end_now("told to end before the first step, or between two memberships: not saved"),
        (Some(Phase::Checkpoint), longest) => SAVE_BLOCKED_AFTER.max(3 * longest.unwrap_or(SAVE_UNKNOWN)),
        (Some(Phase::Train), _) => BLOCKED_AFTER.max(3 * state.longest_step),
        _ => return,
    };
    let blocked = state.since.max(told).elapsed();
    if state.group.is_none() || blocked < patience {
        return;
    }
    if !state.aborted {
        abort(state);
    } else if blocked >= patience + BLOCKED_AFTER {
        end_now("told to end while a peer was stuck: not saved");
    }
}

/// Gives a step that does not return its error.
fn abort(state: &mut State) {
    if let Some(group) = state.group.as_ref().filter(|_| !state.aborted) {
        if let Err(error) = group.abort() {
            eprintln!("could not abort the process group: {error}");
        }
        state.aborted = true;
    }
}

/// Ends the process without unwinding threads that may be blocked in libtorch.
fn end_now(why: &str) -> ! {
    eprintln!("{why}");
    // SAFETY: ends the process; nothing of it is used again.
    unsafe { nix::libc::_exit(EXIT_TERMINATED) }
}
