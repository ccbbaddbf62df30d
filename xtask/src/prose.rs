//! `cargo xtask prose`: finds unsuitable phrases in comments, documentation, messages and Markdown.
//!
//! | check | applies to |
//! |---|---|
//! | phrases of `prose/phrases.tsv` | comments, string literals, Markdown, scripts |
//! | paragraphs that open with "What", "How", "Where", "Why" or "Who", and are not questions | comments, Markdown |
//! | sections `# Safety` that refer to another one by "As for" | documentation |
//! | sentences of more than 25 words, except in code, headings and tables | comments, Markdown |
//! | lines of more than 100 columns, except tables and lines with a link | comments, Markdown |
//!
//! The files are those that git tracks. Inline code (between backticks) is not prose.

mod sentences;
mod text;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{ensure, Context, Result};
use regex::{Regex, RegexBuilder};

use crate::workspace::Workspace;
use sentences::sentences;
use text::{long_lines, paragraphs, Paragraph};

/// The maximum number of columns of a line of prose.
const COLUMNS: usize = 100;

/// The maximum number of words of a sentence.
const WORDS: usize = 25;

/// Files that contain the phrases as examples, generated files, and files by other authors.
const EXCLUDED: [&str; 4] = [
    "Cargo.lock",
    "LICENSE",
    "xtask/src/prose/",
    "verify/fuzz/corpus/",
];

/// The options of `cargo xtask prose`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Check the files whose paths start with PATH only
    #[arg(value_name = "PATH")]
    paths: Vec<String>,

    /// Print the number of findings in each folder instead of the findings
    #[arg(long)]
    counts: bool,
}

/// A place in a file, and the words to use instead.
#[derive(Debug)]
struct Finding {
    line: usize,
    text: String,
    advice: String,
}

/// Checks the tracked files, and prints the findings.
///
/// # Errors
///
/// Returns an error if git does not list the files, or if a file of Rust source has no tokens.
pub fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let phrases = Phrase::read_all()?;
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for file in tracked(&workspace.root)? {
        let chosen = args.paths.is_empty() || args.paths.iter().any(|path| file.starts_with(path));
        if !chosen || EXCLUDED.iter().any(|part| file.contains(part)) {
            continue;
        }
        let Ok(text) = std::fs::read_to_string(workspace.root.join(&file)) else {
            continue;
        };
        let findings = check(&file, &text, &phrases).with_context(|| file.clone())?;
        for finding in findings {
            if !args.counts {
                println!(
                    "{file}:{}: {}: {}",
                    finding.line, finding.text, finding.advice
                );
            }
            let folder = file.rsplit_once('/').map_or(".", |(folder, _)| folder);
            let count = counts.entry(folder.to_owned()).or_default();
            *count = count.saturating_add(1);
        }
    }
    if args.counts {
        for (folder, count) in &counts {
            println!("{count:>6}  {folder}");
        }
    }
    let total: usize = counts.values().sum();
    println!("{total} findings");
    Ok(total == 0)
}

/// Returns the files that git tracks.
fn tracked(root: &Path) -> Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root)
        .output()
        .context("cannot start git")?;
    ensure!(
        output.status.success(),
        "git ls-files ended with {}",
        output.status
    );
    let names = String::from_utf8(output.stdout).context("a file's name is not UTF-8")?;
    Ok(names
        .split('\0')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}

fn check(file: &str, text: &str, phrases: &[Phrase]) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let mut heading = false;
    for paragraph in paragraphs(file, text)? {
        for phrase in phrases {
            findings.extend(phrase.find(&paragraph));
        }
        findings.extend(noun_clause(&paragraph));
        findings.extend(long_sentences(&paragraph));
        if heading {
            findings.extend(safety_elsewhere(&paragraph));
        }
        heading = paragraph.text == "# Safety";
    }
    findings.extend(
        long_lines(file, text, COLUMNS)
            .into_iter()
            .map(|(line, columns)| Finding {
                line,
                text: format!("{columns} columns"),
                advice: format!("wrap at {COLUMNS}"),
            }),
    );
    findings.sort_by_key(|finding| finding.line);
    Ok(findings)
}

/// Finds the sentences that have too many words.
fn long_sentences(paragraph: &Paragraph) -> Vec<Finding> {
    if !paragraph.sentences {
        return Vec::new();
    }
    sentences(&paragraph.text)
        .into_iter()
        .filter(|(_, words)| *words > WORDS)
        .map(|(start, words)| Finding {
            line: paragraph.line_of(start),
            text: format!("a sentence of {words} words"),
            advice: format!("split it: at most {WORDS}"),
        })
        .collect()
}

/// Finds a paragraph that opens with a clause where a noun phrase belongs.
fn noun_clause(paragraph: &Paragraph) -> Option<Finding> {
    let text = paragraph
        .text
        .trim_start_matches(['*', '_', '-', ' ', '"', '('])
        .trim_start();
    let word = text.split(|c: char| !c.is_alphabetic()).next()?;
    let clause = match word {
        "What" | "How" | "Why" | "Who" | "Whose" | "Whatever" => true,
        // "Where there is no KVM, …" is an adverbial clause, with a main clause after the comma.
        "Where" | "Wherever" => !first_sentence(text).contains(','),
        _ => false,
    };
    let question = first_sentence(text).ends_with('?');
    (paragraph.sentences && clause && !question).then(|| Finding {
        line: paragraph.line_of(0),
        text: format!("opens with \"{word}\""),
        advice: "name the thing with a noun phrase".to_owned(),
    })
}

/// Finds the first paragraph of a section `# Safety` that refers to the conditions of another item.
fn safety_elsewhere(paragraph: &Paragraph) -> Option<Finding> {
    paragraph.text.starts_with("As for [").then(|| Finding {
        line: paragraph.line_of(0),
        text: "\"As for\" in a section `# Safety`".to_owned(),
        advice: "repeat the conditions".to_owned(),
    })
}

fn first_sentence(text: &str) -> &str {
    let end = text
        .char_indices()
        .zip(text.chars().skip(1).chain([' ']))
        .find(|((_, c), next)| matches!(c, '.' | '?' | '!') && next.is_whitespace());
    match end {
        Some(((at, _), _)) => text.get(..=at).unwrap_or(text),
        None => text,
    }
}

/// A phrase to avoid.
struct Phrase {
    pattern: Regex,
    advice: String,
    /// Matches that are allowed.
    unless: Option<Regex>,
}

impl Phrase {
    fn read_all() -> Result<Vec<Self>> {
        include_str!("prose/phrases.tsv")
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| Self::read(line).with_context(|| format!("phrases.tsv: {line}")))
            .collect()
    }

    fn read(line: &str) -> Result<Self> {
        let regex = |pattern: &str| RegexBuilder::new(pattern).case_insensitive(true).build();
        let mut fields = line.split('\t');
        let pattern = fields.next().context("no pattern")?;
        let advice = fields.next().context("no words to use instead")?;
        Ok(Self {
            pattern: regex(pattern)?,
            advice: format!("use: {advice}"),
            unless: fields.next().map(regex).transpose()?,
        })
    }

    fn find(&self, paragraph: &Paragraph) -> Vec<Finding> {
        self.pattern
            .find_iter(&paragraph.text)
            .filter(|found| {
                let right = self.unless.as_ref();
                !right.is_some_and(|unless| unless.is_match(found.as_str()))
            })
            .map(|found| Finding {
                line: paragraph.line_of(found.start()),
                text: format!("\"{}\"", found.as_str()),
                advice: self.advice.clone(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
