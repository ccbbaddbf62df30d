//! The end of the log of a failed run.

/// The number of lines that are printed of the end of a log, and of each failed program.
pub const LINES: usize = 60;

/// Returns the last lines of a log.
pub fn tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    let first = lines.len().saturating_sub(LINES);
    lines.get(first..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::tail;

    #[test]
    fn tail_of_long_log_returns_last_lines() {
        let lines: Vec<_> = (0..200).map(|number| number.to_string()).collect();
        let end = tail(&lines.join("\n"));
        assert!(end.starts_with("140\n") && end.ends_with("\n199"), "{end}");
        assert_eq!(tail("one\ntwo\n"), "one\ntwo");
    }
}
