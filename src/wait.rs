//! Waiting for what does not tell when it happens.

use std::time::{Duration, Instant};

/// How long a wait sleeps between two looks at most.
const LONGEST_SLEEP: Duration = Duration::from_millis(1);

/// Looks until `left` is 0, but no longer than until `deadline`: what was left then is the error.
///
/// It looks once before it knows what time it is, and sleeps twice as long each time.
pub(crate) fn until_none(deadline: Instant, left: impl Fn() -> usize) -> Result<(), usize> {
    let mut sleep = Duration::from_micros(1);
    loop {
        let count = left();
        if count == 0 {
            return Ok(());
        }
        let time = deadline.saturating_duration_since(Instant::now());
        if time.is_zero() {
            return Err(count);
        }
        std::thread::sleep(sleep.min(time));
        sleep = sleep.saturating_mul(2).min(LONGEST_SLEEP);
    }
}
