//! Panics of other crates, as errors.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// Whether this thread is within [`contain`].
    static CONTAINING: Cell<bool> = const { Cell::new(false) };
}

/// What `f` returns, or the message of its panic, which is not printed.
pub fn contain<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    silence_contained_panics();
    let outer = CONTAINING.replace(true);
    // What `f` left half done is the crate's that panicked; its caches recover by themselves or are not looked at again.
    let result = panic::catch_unwind(AssertUnwindSafe(f));
    CONTAINING.set(outer);
    result.map_err(|payload| message(&*payload))
}

/// Puts a hook before the program's own that is silent within [`contain`], once.
fn silence_contained_panics() {
    static ONCE: Once = Once::new();
    // A hook cannot be set while a panic unwinds.
    if std::thread::panicking() {
        return;
    }
    ONCE.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !CONTAINING.get() {
                previous(info);
            }
        }));
    });
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_their_messages() {
        assert_eq!(contain(|| 3), Ok(3));
        assert_eq!(contain(|| panic!("at {}", 7)), Err::<(), _>("at 7".to_owned()));
        assert_eq!(contain(|| contain(|| panic!("inner")).unwrap_err()), Ok("inner".to_owned()));
        assert_eq!(contain(|| panic::panic_any(5)), Err::<(), _>("no message".to_owned()));
        assert!(!CONTAINING.get());
    }
}
