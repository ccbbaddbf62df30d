//! Calls of listeners: marks the thread, and turns panics into errors.

use core::cell::Cell;

use super::ListenerError;

thread_local! {
    /// Whether this thread is in a call of a listener.
    static IN_LISTENER: Cell<bool> = const { Cell::new(false) };
}

/// Returns an error if this thread is in a call of a listener.
pub(crate) fn refuse_in_listener() -> Result<(), ListenerError> {
    if IN_LISTENER.get() {
        return Err(ListenerError::InListener);
    }
    Ok(())
}

/// Calls a function of a listener. A panic is an error.
#[cfg(feature = "backend-atomic")]
pub(crate) fn call(
    function: impl FnOnce() -> Result<(), super::BoxError>,
) -> Result<(), super::BoxError> {
    use std::panic::{catch_unwind, AssertUnwindSafe};

    // Calls can be nested: a listener may own the `RegionChanges` of another region.
    let before = IN_LISTENER.replace(true);
    let result = catch_unwind(AssertUnwindSafe(function));
    IN_LISTENER.set(before);
    result.unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<&str>()
            .map(|message| (*message).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned());
        Err(format!("panicked: {}", message.as_deref().unwrap_or("no message")).into())
    })
}
