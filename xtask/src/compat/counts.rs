//! The results that a test run reports.

use anyhow::{Context, Result};

/// The sums of the `test result:` lines of one run: unit, integration and documentation tests.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// Test programs that reported a result.
    pub programs: u64,
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed.
    pub failed: u64,
    /// Tests that their crate ignores.
    pub ignored: u64,
    /// Tests left out by `--skip`.
    pub left_out: u64,
}

impl Counts {
    /// Adds up every `test result:` line of `output`.
    ///
    /// # Errors
    ///
    /// Returns an error if a result line cannot be read.
    pub fn from_output(output: &str) -> Result<Self> {
        output.lines().try_fold(Self::default(), |sum, line| {
            // The output of a test may precede the result on its line.
            match line.split_once("test result: ") {
                Some((_, fields)) => sum
                    .with_line(fields)
                    .with_context(|| format!("cannot read the result line {line:?}")),
                None => Ok(sum),
            }
        })
    }

    fn with_line(self, fields: &str) -> Result<Self> {
        let field = |name: &str| -> Result<u64> {
            fields
                .split([';', '.'])
                .find_map(|part| part.trim().strip_suffix(name)?.trim().parse().ok())
                .with_context(|| format!("the line has no number of tests {name}"))
        };
        let add =
            |sum: u64, number: u64| sum.checked_add(number).context("too many tests to count");
        Ok(Self {
            programs: add(self.programs, 1)?,
            passed: add(self.passed, field("passed")?)?,
            failed: add(self.failed, field("failed")?)?,
            ignored: add(self.ignored, field("ignored")?)?,
            left_out: add(self.left_out, field("filtered out")?)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Counts;

    #[test]
    fn from_output_sums_all_programs() {
        let output = "\
running 3 tests
test a ... ok
test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.01s

   Doc-tests thing
noise without a newline test result: FAILED. 5 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 12.34s
";
        let counts = Counts::from_output(output).unwrap();
        assert_eq!(
            counts,
            Counts {
                programs: 2,
                passed: 7,
                failed: 1,
                ignored: 1,
                left_out: 4
            }
        );
    }

    #[test]
    fn from_output_without_result_has_no_programs() {
        assert_eq!(
            Counts::from_output("error: could not compile")
                .unwrap()
                .programs,
            0
        );
    }

    #[test]
    fn from_output_with_malformed_line_returns_error() {
        assert!(Counts::from_output("test result: ok. many passed; 0 failed").is_err());
    }
}
