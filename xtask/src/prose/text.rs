//! The prose of a file: comments and strings of source, and text of Markdown.

use anyhow::Result;

use crate::lexer::{lex, Kind};

/// Lines that belong together.
#[derive(Debug, Default)]
pub struct Paragraph {
    /// The lines, joined by spaces, with inline code replaced by underscores.
    pub text: String,
    /// Whether it consists of sentences, and is not a heading, a row of a table, code or a message.
    pub sentences: bool,
    /// The offset in `text` at which each line begins, and its number.
    lines: Vec<(usize, usize)>,
}

impl Paragraph {
    /// Returns the number of the line that contains an offset in the text.
    pub fn line_of(&self, offset: usize) -> usize {
        let before = self.lines.iter().rev().find(|(start, _)| *start <= offset);
        before.map_or(0, |(_, line)| *line)
    }

    fn push(&mut self, line: usize, text: &str) {
        if !self.text.is_empty() {
            self.text.push(' ');
        }
        self.lines.push((self.text.len(), line));
        self.text.push_str(text);
    }

    /// Adds the paragraph to `found` unless it is empty, and begins a new one.
    fn finish(&mut self, found: &mut Vec<Self>) {
        if !self.text.is_empty() {
            self.text = without_code(&self.text);
            found.push(std::mem::take(self));
        }
    }
}

/// Returns the paragraphs of a file, by the extension of its name.
///
/// # Errors
///
/// Returns an error if a file of Rust source has text that is not a token.
pub fn paragraphs(file: &str, text: &str) -> Result<Vec<Paragraph>> {
    Ok(
        match file.rsplit_once('.').map(|(_, extension)| extension) {
            Some("rs") => rust(text)?,
            Some("md") => split((1..).zip(text.lines())),
            Some("toml" | "yml" | "yaml" | "s") => marked_comments(text),
            _ if text.starts_with("#!") => script(text),
            _ if file.rsplit('/').next() == Some("CODEOWNERS") => script(text),
            _ => Vec::new(),
        },
    )
}

/// Returns the lines of prose that have more than `most` columns, with their columns.
pub fn long_lines(file: &str, text: &str, most: usize) -> Vec<(usize, usize)> {
    let markdown = file.ends_with(".md");
    let comment = |line: &str| match file.rsplit_once('.').map(|(_, extension)| extension) {
        Some("rs") => line.starts_with("//"),
        Some("toml" | "yml" | "yaml" | "s") => line.starts_with(['#', '/']),
        _ => line.starts_with('#') && text.starts_with("#!"),
    };
    (1..)
        .zip(text.lines())
        .map(|(number, line)| (number, line, line.chars().count()))
        .filter(|(_, line, columns)| {
            let text = line.trim_start();
            let table = text.trim_start_matches(['/', '!', ' ']).starts_with('|');
            *columns > most && !table && !text.contains("://") && (markdown || comment(text))
        })
        .map(|(number, _, columns)| (number, columns))
        .collect()
}

/// Comments and string literals of Rust source.
fn rust(text: &str) -> Result<Vec<Paragraph>> {
    let mut found = Vec::new();
    let mut block: Vec<(usize, &str)> = Vec::new();
    for token in lex(text)? {
        let follows = block
            .last()
            .is_some_and(|(line, _)| line.saturating_add(1) >= token.line);
        if token.kind != Kind::Comment || !follows {
            found.extend(split(block.drain(..)));
        }
        match token.kind {
            Kind::Comment => {
                block.extend(token.lines().map(|(line, text)| (line, uncomment(text))))
            }
            Kind::Text => {
                let mut message = Paragraph::default();
                for (line, text) in token.lines() {
                    message.push(line, text.trim().trim_end_matches('\\').trim_end());
                }
                message.finish(&mut found);
            }
            Kind::Code => {}
        }
    }
    found.extend(split(block.drain(..)));
    Ok(found)
}

/// Returns a line of a comment without its delimiters.
fn uncomment(line: &str) -> &str {
    let line = line.trim();
    let line = line
        .strip_prefix("//")
        .or_else(|| line.strip_prefix("/*"))
        .unwrap_or(line);
    line.trim_end_matches("*/")
        .trim_start_matches(['/', '!', '*'])
        .trim()
}

/// Comments that fill lines of their own, after `#` or `//`.
fn marked_comments(text: &str) -> Vec<Paragraph> {
    let mut found = Vec::new();
    let mut block = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.starts_with(['#', '/']) && !line.starts_with("#!") {
            block.push((number, line.trim_start_matches(['#', '/']).trim()));
        } else {
            found.extend(split(block.drain(..)));
        }
    }
    found.extend(split(block.drain(..)));
    found
}

/// The comments of a script, and each of its other lines.
fn script(text: &str) -> Vec<Paragraph> {
    let mut found = marked_comments(text);
    for (number, line) in (1..).zip(text.lines()) {
        if !line.trim().starts_with('#') {
            let mut paragraph = Paragraph::default();
            paragraph.push(number, line);
            paragraph.finish(&mut found);
        }
    }
    found
}

/// Splits lines of Markdown at blank lines, headings, list items, rows of tables, targets of links,
/// and code.
fn split<'text>(lines: impl IntoIterator<Item = (usize, &'text str)>) -> Vec<Paragraph> {
    let mut found = Vec::new();
    let mut open = Paragraph::default();
    let mut code = false;
    for (number, line) in lines {
        let indented = open.text.is_empty() && line.starts_with("    ");
        let line = line.trim();
        let fence = line.starts_with("```");
        let item = ["- ", "* ", "+ "]
            .iter()
            .find_map(|marker| line.strip_prefix(marker));
        let definition = line.starts_with('[') && line.contains("]: ");
        let alone = code || indented || definition || line.starts_with(['#', '|']);
        if fence || alone || item.is_some() || line.is_empty() {
            open.finish(&mut found);
        }
        code ^= fence;
        if !fence && !line.is_empty() {
            open.push(number, item.unwrap_or(line));
            open.sentences = !alone;
        }
        if alone {
            open.finish(&mut found);
        }
    }
    open.finish(&mut found);
    found
}

/// Returns the text with inline code replaced by as many underscores.
fn without_code(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    for (number, part) in text.split('`').enumerate() {
        if number > 0 {
            kept.push('_');
        }
        if number % 2 == 0 {
            kept.push_str(part);
        } else {
            kept.extend(part.bytes().map(|_| '_'));
        }
    }
    kept
}
