use std::sync::atomic::{AtomicBool, Ordering};

/// Sets a flag when it is dropped, so that the flag is also set after a panic.
///
/// A scope joins its threads before it continues a panic. Threads that run until a flag is set
/// would otherwise turn a failed assertion into a test that never ends.
///
/// # Examples
///
/// ```
/// use std::sync::atomic::{AtomicBool, Ordering};
/// use test_support::SetOnDrop;
///
/// let done = AtomicBool::new(false);
/// std::thread::scope(|scope| {
///     scope.spawn(|| {
///         while !done.load(Ordering::Acquire) {
///             std::thread::yield_now();
///         }
///     });
///     let _done = SetOnDrop(&done);
///     assert_eq!(1 + 1, 2);
/// });
/// ```
#[derive(Debug)]
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        // Release: a thread that loads the flag with acquire sees the earlier writes of this one.
        self.0.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_on_drop_sets_the_flag_after_a_panic() {
        let done = AtomicBool::new(false);
        let panicking = || {
            let _done = SetOnDrop(&done);
            panic!("expected by the test");
        };
        std::panic::catch_unwind(panicking).unwrap_err();
        assert!(done.into_inner());
    }
}
