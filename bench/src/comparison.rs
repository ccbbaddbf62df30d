//! The measurement of one row: batches, rounds, medians.

use std::hint::black_box;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::time::{clock_gettime, ClockId};

/// A function that runs an operation a number of times, and returns the time taken.
pub type Run = Box<dyn FnMut(u64) -> Result<Duration>>;

/// One side of a row.
pub struct Batch {
    pub run: Run,
    /// The number of operations in one run of the loop body.
    pub per_iteration: u32,
}

/// The sides of a row.
pub struct Comparison {
    pub reference: Batch,
    pub ours: Batch,
    pub limit: Option<Batch>,
}

/// The length of a measurement.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    pub rounds: usize,
    /// The target duration of a batch.
    pub batch: Duration,
}

/// Medians over the rounds, in nanoseconds per operation.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    pub reference: f64,
    pub ours: f64,
    pub limit: Option<f64>,
    /// The median of reference ÷ ours over the rounds.
    pub ratio: f64,
    /// The median of limit ÷ ours over the rounds.
    pub of_limit: Option<f64>,
}

/// Nanoseconds per operation in one round.
struct Round {
    reference: f64,
    ours: f64,
    limit: Option<f64>,
}

/// The result of an operation. It must succeed every time.
pub trait Succeeds {
    /// Keeps the compiler from removing the result.
    fn consume(self);
}

#[cold]
#[inline(never)]
fn failed(what: &str) -> ! {
    panic!("an operation that must succeed {what}");
}

impl<T, E: core::fmt::Debug> Succeeds for Result<T, E> {
    #[inline(always)]
    fn consume(self) {
        match self {
            Ok(value) => {
                black_box(value);
            }
            Err(_) => failed("returned an error"),
        }
    }
}

impl<T> Succeeds for Option<T> {
    #[inline(always)]
    fn consume(self) {
        match self {
            Some(value) => {
                black_box(value);
            }
            None => failed("returned nothing"),
        }
    }
}

impl Succeeds for bool {
    #[inline(always)]
    fn consume(self) {
        if !self {
            failed("returned false");
        }
    }
}

impl Succeeds for () {
    #[inline(always)]
    fn consume(self) {}
}

/// Returns the processor time of this thread, which does not advance while the thread is not
/// running.
fn used() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    // `tv_sec` and `tv_nsec` are not negative, and `tv_nsec` is below 2^32.
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

/// Runs the timed loop. Returns the time that it took.
#[inline(always)]
pub fn timed<R: Succeeds>(iterations: u64, mut operation: impl FnMut(u64) -> R) -> Duration {
    let start = used();
    for number in 0..iterations {
        operation(number).consume();
    }
    used().saturating_sub(start)
}

impl Batch {
    /// Creates a side whose loop body is one operation, without set-up.
    ///
    /// Each batch continues with the number after the last one, so that it covers a large table.
    pub fn of<R: Succeeds>(mut operation: impl FnMut(u64) -> R + 'static) -> Self {
        let mut first = 0u64;
        Self::around(move |iterations| {
            let took = timed(iterations, |number| operation(first + number));
            first += iterations;
            Ok(took)
        })
    }

    /// Creates a side that sets up before its loop.
    pub fn around(run: impl FnMut(u64) -> Result<Duration> + 'static) -> Self {
        Self {
            run: Box::new(run),
            per_iteration: 1,
        }
    }

    /// Sets the number of operations in one run of the loop body.
    pub fn per(mut self, operations: u32) -> Self {
        self.per_iteration = operations;
        self
    }

    /// Warms up, and returns the number of iterations that take `target`.
    fn calibrate(&mut self, target: Duration) -> Result<u64> {
        let cold = self.find_iterations(target)?;
        // The first access to each page faults, and takes far longer than the others.
        let mut took = Duration::ZERO;
        while took < target * 10 {
            took += (self.run)(cold)?;
        }
        self.find_iterations(target)
    }

    fn find_iterations(&mut self, target: Duration) -> Result<u64> {
        let mut iterations = 1u64;
        loop {
            let took = (self.run)(iterations)?;
            if took * 8 >= target {
                let factor = target.as_secs_f64() / took.as_secs_f64();
                return Ok(((iterations as f64) * factor).ceil().max(1.0) as u64);
            }
            iterations = iterations
                .checked_mul(4)
                .context("the operation takes less time than the clock resolves")?;
        }
    }

    /// Returns the nanoseconds per operation over one batch.
    fn measure(&mut self, iterations: u64) -> Result<f64> {
        let took = (self.run)(iterations)?;
        Ok(took.as_secs_f64() * 1e9 / (iterations as f64) / f64::from(self.per_iteration))
    }
}

impl Comparison {
    /// Runs the sides in turn, round by round.
    pub fn run(mut self, effort: Effort) -> Result<Outcome> {
        let reference_iterations = self.reference.calibrate(effort.batch)?;
        let ours_iterations = self.ours.calibrate(effort.batch)?;
        let limit_iterations = match &mut self.limit {
            Some(limit) => limit.calibrate(effort.batch)?,
            None => 0,
        };
        let mut rounds = Vec::with_capacity(effort.rounds);
        for number in 0..effort.rounds {
            // The order alternates, because each side changes the state of the caches.
            let mut limit = None;
            let (reference, ours);
            if number % 2 == 0 {
                reference = self.reference.measure(reference_iterations)?;
                ours = self.ours.measure(ours_iterations)?;
                if let Some(batch) = &mut self.limit {
                    limit = Some(batch.measure(limit_iterations)?);
                }
            } else {
                if let Some(batch) = &mut self.limit {
                    limit = Some(batch.measure(limit_iterations)?);
                }
                ours = self.ours.measure(ours_iterations)?;
                reference = self.reference.measure(reference_iterations)?;
            }
            rounds.push(Round {
                reference,
                ours,
                limit,
            });
        }
        let of = |pick: fn(&Round) -> Option<f64>| median(rounds.iter().filter_map(pick).collect());
        Ok(Outcome {
            reference: of(|round| Some(round.reference)).context("no round")?,
            ours: of(|round| Some(round.ours)).context("no round")?,
            limit: of(|round| round.limit),
            ratio: of(|round| Some(round.reference / round.ours)).context("no round")?,
            of_limit: of(|round| round.limit.map(|limit| limit / round.ours)),
        })
    }
}

/// Returns the median of `values`.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get((values.len() - 1) / 2)?;
    Some((lower + upper) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::{median, Batch, Comparison, Effort};
    use std::time::Duration;

    #[test]
    fn median_of_odd_and_even_counts_is_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0]), Some(3.0));
        assert_eq!(median(vec![9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 9.0, 2.0]), Some(3.0));
    }

    /// Returns a side that reports `nanoseconds` for each iteration.
    fn batch_of(nanoseconds: u64) -> Batch {
        Batch::around(move |iterations| Ok(Duration::from_nanos(nanoseconds * iterations)))
    }

    #[test]
    fn run_returns_ratio_of_reference_to_ours() {
        let comparison = Comparison {
            reference: batch_of(300),
            ours: batch_of(100).per(2),
            limit: Some(batch_of(25)),
        };
        let effort = Effort {
            rounds: 3,
            batch: Duration::from_micros(10),
        };
        let outcome = comparison.run(effort).expect("an outcome");
        assert!((outcome.reference - 300.0).abs() < 1e-6);
        assert!((outcome.ours - 50.0).abs() < 1e-6);
        assert!((outcome.ratio - 6.0).abs() < 1e-6);
        assert!((outcome.of_limit.expect("a limit") - 0.5).abs() < 1e-6);
    }

    #[test]
    #[should_panic(expected = "must succeed")]
    fn batch_of_failing_operation_panics() {
        let mut batch = Batch::of(|number| if number < 3 { Ok(()) } else { Err("no") });
        let _ = (batch.run)(10);
    }
}
