//! What the outside asks of a running rank: SIGTERM and Ctrl-C (save, then end), SIGUSR1 (save, then go on).
//!
//! The handlers only set flags; the training loop carries them into its reduction, so that all ranks act at one step.

use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static TERMINATE: AtomicBool = AtomicBool::new(false);
static SAVE: AtomicBool = AtomicBool::new(false);

extern "C" fn on_terminate(_signal: nix::libc::c_int) {
    TERMINATE.store(true, Ordering::SeqCst);
}

extern "C" fn on_save(_signal: nix::libc::c_int) {
    SAVE.store(true, Ordering::SeqCst);
}

/// Installs the handlers. A second Ctrl-C ends the process at once.
pub fn install() -> nix::Result<()> {
    let action = |handler, flags| SigAction::new(SigHandler::Handler(handler), SaFlags::SA_RESTART | flags, SigSet::empty());
    // SAFETY: the handlers do nothing but store to an atomic.
    unsafe {
        sigaction(Signal::SIGTERM, &action(on_terminate, SaFlags::empty()))?;
        sigaction(Signal::SIGINT, &action(on_terminate, SaFlags::SA_RESETHAND))?;
        sigaction(Signal::SIGUSR1, &action(on_save, SaFlags::empty()))?;
    }
    Ok(())
}

/// Whether this rank was told to end.
pub fn terminate_requested() -> bool {
    TERMINATE.load(Ordering::Relaxed)
}

/// Whether this rank was told to save; stays so until [`save_done`].
pub fn save_requested() -> bool {
    SAVE.load(Ordering::Relaxed)
}

/// The save was made, by this rank's or another one's request.
pub fn save_done() {
    SAVE.store(false, Ordering::SeqCst);
}
