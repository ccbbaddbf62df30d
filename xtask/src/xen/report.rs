//! The report that the program of domain 0 writes on the console, a line for each event:
//!
//! ```text
//! xen: BEGIN
//! xen: RUN name
//! xen: PASSED name
//! xen: SKIPPED name: reason
//! xen: FAILED name: reason
//! xen: NOTE text
//! xen: END
//! ```
//!
//! `PASSED`, `SKIPPED` or `FAILED` follows each `RUN`, unless the program died.

use std::collections::BTreeSet;

/// The start of each line of the report. The console may show something else before it.
const MARK: &str = "xen: ";
/// Lines in which the kernel or the hypervisor reports a fault of its own.
const FAULTS: [&str; 5] = [
    "Oops",
    "kernel BUG",
    "Call trace",
    "Call Trace",
    "Panic on CPU",
];

/// The result of a run of the scenarios.
#[derive(Debug, Default)]
pub struct Report {
    /// Whether the program has started.
    pub begun: bool,
    /// The skipped scenarios, with the reasons.
    pub skipped: Vec<String>,
    /// Measurements.
    pub notes: Vec<String>,
    ended: bool,
    running: BTreeSet<String>,
    passed: usize,
    failed: Vec<String>,
    /// Reports of the kernel or the hypervisor about a fault of its own.
    oopses: Vec<String>,
    /// The name of each scenario, and how it ended.
    outcomes: Vec<(String, String)>,
}

impl Report {
    /// Reads a console.
    pub fn read(console: &str) -> Self {
        let mut report = Self::default();
        for line in console.lines() {
            if FAULTS.iter().any(|fault| line.contains(fault)) {
                report.oopses.push(line.trim().to_owned());
            }
            if let Some((_, event)) = line.split_once(MARK) {
                report.event(event.trim_end());
            }
        }
        report
    }

    fn event(&mut self, event: &str) {
        let (kind, text) = event.split_once(' ').unwrap_or((event, ""));
        let (name, reason) = text.split_once(": ").unwrap_or((text, ""));
        if matches!(kind, "PASSED" | "SKIPPED" | "FAILED") {
            let outcome = format!("{} {reason}", kind.to_lowercase());
            self.outcomes
                .push((name.to_owned(), outcome.trim_end().to_owned()));
        }
        match kind {
            "BEGIN" => self.begun = true,
            "RUN" => {
                self.running.insert(name.to_owned());
            }
            "PASSED" if self.running.remove(name) => self.passed = self.passed.wrapping_add(1),
            "SKIPPED" if self.running.remove(name) => self.skipped.push(format!("SKIPPED: {text}")),
            "FAILED" => {
                self.running.remove(name);
                self.failed.push(text.to_owned());
            }
            "NOTE" => self.notes.push(text.to_owned()),
            "END" => self.ended = true,
            _ => self.failed.push(format!("unexpected line: {event}")),
        }
    }

    /// Prints how each scenario ended, as the rows of a table.
    pub fn print_outcomes(&self) {
        for (name, outcome) in &self.outcomes {
            println!("| `{name}` | {outcome} |");
        }
    }

    /// Returns the reasons why the run failed.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = self.failed.clone();
        faults.extend(self.interruptions());
        faults
    }

    /// Returns why some scenarios have not been run, or not on a sound machine.
    pub fn interruptions(&self) -> Vec<String> {
        let mut faults = self.oopses.clone();
        let died = self.running.iter();
        faults.extend(died.map(|name| format!("{name}: the program died")));
        if !self.begun {
            faults.push("domain 0 did not start".to_owned());
        } else if !self.ended {
            faults.push("the program did not finish".to_owned());
        } else if self.passed == 0 {
            faults.push("no scenario passed".to_owned());
        }
        faults
    }

    /// Returns the counts.
    pub fn summary(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed.len(),
            self.skipped.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::Report;

    fn faults(console: &str) -> Vec<String> {
        Report::read(console).faults()
    }

    #[test]
    fn report_of_scenarios_that_pass_has_no_faults() {
        let report = Report::read(
            "(XEN) Freed 348kB init memory.\r\nxen: BEGIN\r\n[ 1.0] noise xen: RUN a\r\n\
             xen: PASSED a\r\nxen: RUN b\r\nxen: SKIPPED b: no such frames\r\n\
             xen: NOTE read 4 bytes: 7 us\r\nxen: END\r\n",
        );
        assert_eq!(report.faults(), [""; 0]);
        assert_eq!(report.summary(), "1 passed, 0 failed, 1 skipped");
        assert_eq!(report.skipped, ["SKIPPED: b: no such frames"]);
        assert_eq!(report.notes, ["read 4 bytes: 7 us"]);
    }

    #[test]
    fn report_of_failed_scenario_has_its_reason() {
        let console = "xen: BEGIN\nxen: RUN a\nxen: FAILED a: still mapped: 16\nxen: RUN b\n\
                       xen: PASSED b\nxen: END\n";
        assert_eq!(faults(console), ["a: still mapped: 16"]);
    }

    #[test]
    fn report_without_end_names_running_scenario() {
        let console = "xen: BEGIN\nxen: RUN a\nxen: PASSED a\nxen: RUN b\n[    1.2] Kernel panic";
        let expected = ["b: the program died", "the program did not finish"];
        assert_eq!(faults(console), expected);
    }

    #[test]
    fn report_without_passed_scenario_is_a_failure() {
        let skipped = "xen: BEGIN\nxen: RUN a\nxen: SKIPPED a: why\nxen: END\n";
        assert_eq!(faults(skipped), ["no scenario passed"]);
        assert_eq!(faults("(XEN) Booting"), ["domain 0 did not start"]);
    }

    #[test]
    fn report_with_oops_of_the_kernel_is_a_failure() {
        let console = "xen: BEGIN\nxen: RUN a\n[ 2.0] Internal error: Oops: 96000007\n\
                       xen: PASSED a\nxen: END\n";
        assert_eq!(faults(console), ["[ 2.0] Internal error: Oops: 96000007"]);
    }

    #[test]
    fn passed_line_without_run_is_a_failure() {
        let console = "xen: BEGIN\nxen: RUN a\nxen: PASSED a\nxen: PASSED b\nxen: END\n";
        assert_eq!(faults(console), ["unexpected line: PASSED b"]);
    }
}
