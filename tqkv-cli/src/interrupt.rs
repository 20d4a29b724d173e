//! Ctrl-C, and being told to terminate: what runs ends at the next token, so that it can still be saved.

use anyhow::{Context, Result};
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);
/// Whether nothing runs that would have to end first.
static IDLE: AtomicBool = AtomicBool::new(false);

/// From here on the first interruption is a request. The second ends the program, as does the first while it is idle.
pub fn watch() -> Result<()> {
    ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        if IDLE.load(Ordering::SeqCst) {
            std::process::exit(0);
        }
    })
    .context("cannot watch for interruptions")
}

/// Whether there was one.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}

/// Waits for something that an interruption need not wait for.
pub fn idle<T>(wait: impl FnOnce() -> T) -> T {
    IDLE.store(true, Ordering::SeqCst);
    if requested() {
        std::process::exit(0);
    }
    let result = wait();
    IDLE.store(false, Ordering::SeqCst);
    result
}
