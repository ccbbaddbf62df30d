//! `cargo xtask layers`: modules import only from the layers that their crate allows.
//!
//! A crate lists its top-level modules at the head of its root file, in documentation or in an
//! ordinary comment:
//!
//! ```text
//! //! # Layers
//! //!
//! //! ```text
//! //! sys                  system calls
//! //! region, error        a description of each layer, after two spaces
//! //! builder
//! //! ```
//! ```
//!
//! The table of layers in `docs/architecture.md` of a crate, if it has one, must be the same list.
//!
//! A module imports from its own line and from the lines above it. Tests and links in documentation
//! do not count, and the root file may name everything. In a crate without a list, no module may
//! import from another.

mod imports;
mod list;

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};

use crate::source::modules;
use crate::workspace::{Package, Workspace};
use imports::{imports, reexports};
use list::Layers;

/// The options of `cargo xtask layers`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Check this crate only
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
}

/// An import that is allowed although it is against the order of the layers.
struct Exception {
    package: &'static str,
    /// The module that imports.
    from: &'static str,
    /// The name that it imports, without `crate::`.
    name: &'static str,
    /// The reason, which the report shows.
    reason: &'static str,
}

/// The file of a crate that may have its list of layers as a table.
const DESCRIPTION: &str = "docs/architecture.md";

const EXCEPTIONS: &[Exception] = &[
    Exception {
        package: "vm-memory",
        from: "guest_memory",
        name: "iommu::Error",
        reason: "0.18.0 has the variant `guest_memory::Error::IommuError`",
    },
    Exception {
        package: "vm-memory",
        from: "bitmap",
        name: "region::GuestMemoryRegion",
        reason: "0.18.0 has the alias `bitmap::MS`",
    },
    Exception {
        package: "vm-memory",
        from: "bitmap",
        name: "guest_memory::GuestMemoryBackend",
        reason: "0.18.0 has the alias `bitmap::MS`",
    },
];

/// Checks the crates of the workspace, and prints each import that the lists do not allow.
///
/// # Errors
///
/// Returns an error if a source file cannot be read or parsed.
pub fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let mut passed = true;
    for package in workspace.packages()? {
        if args.only.as_ref().is_some_and(|only| *only != package.name) {
            continue;
        }
        let findings = check(&package, EXCEPTIONS)
            .with_context(|| format!("cannot check the layers of {}", package.name))?;
        for finding in &findings {
            let finding = finding.replace(&format!("{}/", workspace.root.display()), "");
            println!("{finding}");
        }
        let verdict = if findings.is_empty() { "ok" } else { "FAILED" };
        println!("{}: {verdict}", package.name);
        passed &= findings.is_empty();
    }
    Ok(passed)
}

fn check(package: &Package, exceptions: &[Exception]) -> Result<Vec<String>> {
    let exceptions: Vec<_> = exceptions
        .iter()
        .filter(|exception| exception.package == package.name)
        .collect();
    let mut findings = Vec::new();
    let mut used = BTreeSet::new();
    for root in &package.roots {
        check_root(package, root, &exceptions, &mut used, &mut findings)?;
    }
    for (number, exception) in exceptions.iter().enumerate() {
        if !used.contains(&number) {
            findings.push(format!(
                "{}: the exception for {} in {} is no longer needed ({})",
                package.name, exception.name, exception.from, exception.reason
            ));
        }
    }
    Ok(findings)
}

fn check_root(
    package: &Package,
    root: &Path,
    exceptions: &[&Exception],
    used: &mut BTreeSet<usize>,
    findings: &mut Vec<String>,
) -> Result<()> {
    let modules = modules(root)?;
    let names: BTreeSet<_> = modules
        .iter()
        .filter_map(|module| module.path.first().cloned())
        .collect();
    let head = modules
        .iter()
        .find(|module| module.path.is_empty())
        .context("the root file is a test")?;
    let layers = Layers::parse(&head.text);
    let differences = layers.iter().flat_map(|layers| layers.differences(&names));
    findings.extend(differences.map(|difference| format!("{}: {difference}", root.display())));
    let described = std::fs::read_to_string(package.folder.join(DESCRIPTION)).ok();
    let described = described.as_deref().and_then(Layers::parse_table);
    if described.is_some() && described != layers {
        findings.push(format!(
            "{}: the list of layers differs from the table in {DESCRIPTION}",
            root.display()
        ));
    }
    let reexports = reexports(&head.tree, &names);
    for module in modules.iter().filter(|module| !module.path.is_empty()) {
        let Some(from) = module.path.first() else {
            continue;
        };
        for import in imports(module, &reexports) {
            let Some(to) = import.path.first() else {
                continue;
            };
            if to == from || !names.contains(to) {
                continue;
            }
            let Some(layers) = &layers else {
                findings.push(format!(
                    "{}: modules import from each other; add a section `# Layers` to the head",
                    root.display()
                ));
                return Ok(());
            };
            if layers.allow(from, to) {
                continue;
            }
            let name = import.path.join("::");
            let exception = exceptions.iter().position(|exception| {
                exception.from == from
                    && (name == exception.name
                        || name.starts_with(&format!("{}::", exception.name)))
            });
            if let Some(number) = exception {
                used.insert(number);
            } else {
                findings.push(format!(
                    "{}:{}: `{from}` imports `{name}`, which is below it in the list of layers",
                    module.file.display(),
                    import.line
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
