//! The list of layers at the head of a crate.

use std::collections::{BTreeMap, BTreeSet};

/// The layers of a crate.
#[derive(Debug, Eq, PartialEq)]
pub struct Layers {
    /// The line of the list that each module is on.
    lines: BTreeMap<String, usize>,
}

impl Layers {
    /// Reads the first block of code under the heading `# Layers` in the comments of a file.
    pub fn parse(text: &str) -> Option<Self> {
        let mut comments = text.lines().filter_map(|line| {
            let comment = line.strip_prefix("//")?;
            Some(comment.strip_prefix('!').unwrap_or(comment).trim_start())
        });
        comments.find(|line| *line == "# Layers")?;
        comments.find(|line| line.starts_with("```"))?;
        let block = comments.take_while(|line| !line.starts_with("```"));
        let mut lines = BTreeMap::new();
        for (number, line) in block.enumerate() {
            let modules = line.split("  ").next().unwrap_or_default();
            for module in modules.split(',') {
                lines.insert(module.trim().to_owned(), number);
            }
        }
        Some(Self { lines })
    }

    /// Reads the first table under a heading that begins with `## Layers`, in a Markdown file.
    ///
    /// The modules are in the second column.
    pub fn parse_table(text: &str) -> Option<Self> {
        let section = text.split("\n## Layers").nth(1)?;
        let rows = section.lines().skip_while(|line| !line.starts_with('|'));
        let rows = rows.take_while(|line| line.starts_with('|')).skip(2);
        let mut lines = BTreeMap::new();
        for (number, row) in rows.enumerate() {
            for module in row.split('|').nth(2)?.split(',') {
                lines.insert(module.trim().trim_matches('`').to_owned(), number);
            }
        }
        Some(Self { lines })
    }

    /// Returns the ways in which the list differs from the modules of the crate.
    pub fn differences(&self, modules: &BTreeSet<String>) -> Vec<String> {
        let unlisted = modules
            .iter()
            .filter(|module| !self.lines.contains_key(*module))
            .map(|module| format!("the module `{module}` is not in the list of layers"));
        let unknown = self
            .lines
            .keys()
            .filter(|module| !modules.contains(*module))
            .map(|module| format!("the list of layers has `{module}`, which is not a module"));
        unlisted.chain(unknown).collect()
    }

    /// Returns whether the module `from` may import from the module `to`.
    ///
    /// `to` must be on the same line of the list or on a line above. [`Self::differences`] reports
    /// unlisted modules.
    pub fn allow(&self, from: &str, to: &str) -> bool {
        match (self.lines.get(from), self.lines.get(to)) {
            (Some(from), Some(to)) => to <= from,
            _ => true,
        }
    }
}
