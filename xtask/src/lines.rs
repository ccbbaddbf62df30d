//! `cargo xtask lines`: the code lines of each crate and file.
//!
//! A code line contains more than blanks and comments, and is not part of a test.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{bail, Context, Result};

use crate::lexer::{lex, Kind};
use crate::source::{modules, Module};
use crate::workspace::{Package, Workspace};

/// The options of `cargo xtask lines`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Fail if the crate NAME has more than COUNT lines
    #[arg(long, value_name = "NAME=COUNT", value_parser = parse_limit)]
    max: Vec<(String, usize)>,

    /// List each file
    #[arg(long)]
    files: bool,
}

fn parse_limit(text: &str) -> Result<(String, usize)> {
    let (name, count) = text
        .split_once('=')
        .context("a limit has the form NAME=COUNT")?;
    Ok((name.to_owned(), count.parse()?))
}

/// Prints the counts, and fails if a crate exceeds its limit.
///
/// # Errors
///
/// Returns an error if a source file cannot be read or parsed, or if a limit names an unknown
/// crate.
pub fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    let mut totals = BTreeMap::new();
    for package in workspace.packages()? {
        let counts = count(&package)?;
        let total: usize = counts.iter().map(|(_, lines)| lines).sum();
        println!("{total:>6}  {}", package.name);
        if args.files {
            for (file, lines) in &counts {
                let file = file.strip_prefix(&workspace.root).unwrap_or(file);
                println!("{lines:>6}    {}", file.display());
            }
        }
        totals.insert(package.name, total);
    }
    let mut exceeded = false;
    for (name, limit) in &args.max {
        let Some(total) = totals.get(name) else {
            bail!("the workspace has no package `{name}`");
        };
        if total > limit {
            eprintln!("{name} has {total} code lines, but at most {limit} are allowed");
            exceeded = true;
        }
    }
    Ok(if exceeded {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Returns the code lines of each file of a package.
fn count(package: &Package) -> Result<Vec<(PathBuf, usize)>> {
    let mut counts = BTreeMap::new();
    for root in &package.roots {
        for module in modules(root)? {
            let lines = code_lines(&module)?;
            counts.insert(module.file, lines);
        }
    }
    let source = package.folder.join("src");
    let assembly = if source.is_dir() {
        assembly(&source)?
    } else {
        Vec::new()
    };
    for file in assembly {
        let text = std::fs::read_to_string(&file)?;
        counts.insert(file, assembly_lines(&text));
    }
    Ok(counts.into_iter().collect())
}

fn code_lines(module: &Module) -> Result<usize> {
    let lines: BTreeSet<_> = lex(&module.text)?
        .into_iter()
        .filter(|token| token.kind != Kind::Comment)
        .flat_map(|token| token.lines())
        .filter(|(_, text)| !text.trim().is_empty())
        .map(|(line, _)| line)
        .collect();
    Ok(lines.difference(&module.test_lines).count())
}

/// Returns the assembly files in a folder and the folders in it.
fn assembly(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(assembly(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "s") {
            found.push(path);
        }
    }
    Ok(found)
}

fn assembly_lines(text: &str) -> usize {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with(['#', '/']))
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_lines_leaves_out_blanks_comments_and_tests() {
        let text = "//! Docs.\n\n/// More.\nfn one() {\n    // Why.\n    two(); // here\n}\n\
                    const TEXT: &str = \"a\n\nb\";\n\n#[cfg(test)]\nmod tests {\n    fn three() {}\n}\n";
        let module = Module::parse(PathBuf::new(), Vec::new(), text.to_owned());
        // Three lines of the function, and two of the constant.
        assert_eq!(code_lines(&module.unwrap().unwrap()).unwrap(), 5);
    }

    #[test]
    fn assembly_lines_leaves_out_blanks_and_comments() {
        assert_eq!(assembly_lines("# Start.\nmov eax, 1\n\n// Stop.\nhlt\n"), 2);
    }

    #[test]
    fn parse_limit_without_count_returns_error() {
        assert!(parse_limit("microvm").is_err());
        assert_eq!(
            parse_limit("microvm=2000").unwrap(),
            ("microvm".to_owned(), 2000)
        );
    }
}
