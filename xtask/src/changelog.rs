//! `cargo xtask changelog`: `CHANGELOG.md` names each public item that 0.18.0 does not have.
//!
//! rustdoc lists the items. `verify/api/names-0.18.0.txt` has the names of 0.18.0: items, and
//! members of types and traits after `::`. The members of a new item need no line of their own.
//! The names without the mark ` ~` must exist on Windows, too (`cargo xtask emulate windows`).
//! Those with the mark are not in the documentation of 0.18.0 for Windows, or are members of
//! implementations of traits.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{ensure, Context, Result};
use serde_json::{Map, Value};

use crate::workspace::{cargo, Workspace};

/// The file with the names of 0.18.0.
pub(crate) const NAMES: &str = "verify/api/names-0.18.0.txt";

/// The end of the line of a name that is not looked for on Windows.
pub(crate) const MARK: &str = " ~";

/// Prints each item that is missing.
///
/// # Errors
///
/// Returns an error if rustdoc fails, or if a file cannot be read.
pub fn run(workspace: &Workspace) -> Result<bool> {
    let read = |file: &str| {
        fs::read_to_string(workspace.root.join(file)).with_context(|| format!("cannot read {file}"))
    };
    let (known, changelog) = (read(NAMES)?, read("CHANGELOG.md")?);
    let features = workspace.features()?;
    let names_with = |features: &str| {
        let mut command = cargo(&workspace.root);
        command.args(["rustdoc", "--quiet", "--package", "vm-memory", "--features"]);
        command.arg(features);
        let status = describe_in_json(&mut command, &workspace.root).status();
        let status = status.context("cannot start cargo")?;
        ensure!(status.success(), "cargo rustdoc ended with {status}");
        public_names(&workspace.target.join("doc/vm_memory.json"))
    };
    let mut names = names_with(&features)?;
    names.extend(names_with(&format!("{features},xen"))?);
    let missing = missing(&names, &known, &changelog);
    for name in &missing {
        println!("CHANGELOG.md does not name `{name}`, which 0.18.0 does not have");
    }
    println!("{} public names, {} missing", names.len(), missing.len());
    Ok(missing.is_empty())
}

/// Returns the names that are neither known nor in the changelog. A member of a new item counts as
/// named.
fn missing<'names>(
    names: &'names BTreeSet<String>,
    known: &str,
    changelog: &str,
) -> Vec<&'names str> {
    let known: BTreeSet<_> = known
        .lines()
        .map(|line| line.trim_end_matches(MARK))
        .collect();
    let words: BTreeSet<_> = changelog
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .collect();
    let is_missing = |name: &&str| match name.split_once("::") {
        Some((item, member)) => known.contains(item) && !words.contains(member),
        None => !words.contains(name),
    };
    names
        .iter()
        .map(String::as_str)
        .filter(|name| !known.contains(name))
        .filter(is_missing)
        .collect()
}

/// Makes `cargo rustdoc` write a description of the library.
///
/// The format is not stable yet: `.ci/rustdoc` accepts it. `cargo semver-checks` uses it, too.
pub(crate) fn describe_in_json<'command>(
    command: &'command mut Command,
    root: &Path,
) -> &'command mut Command {
    command
        .args([
            "--lib",
            "--",
            "-Z",
            "unstable-options",
            "--output-format",
            "json",
        ])
        .env("RUSTDOC", root.join(".ci/rustdoc"))
}

/// Returns the names of the public items in such a description, and of their public members after
/// `::`.
pub(crate) fn public_names(file: &Path) -> Result<BTreeSet<String>> {
    let text =
        fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    Documentation::read(&text)?.names()
}

/// The documentation of vm-memory in rustdoc's format JSON.
struct Documentation {
    root: Value,
    items: Map<String, Value>,
}

impl Documentation {
    fn read(text: &str) -> Result<Self> {
        let mut all: Value = serde_json::from_str(text)?;
        let mut take = |key| all.get_mut(key).map(Value::take);
        let (root, index) = (take("root"), take("index"));
        let (Some(root), Some(Value::Object(items))) = (root, index) else {
            anyhow::bail!("the output of rustdoc has no `root` and `index`");
        };
        Ok(Self { root, items })
    }

    /// Returns the names of public items, and of their public members after `::`.
    fn names(&self) -> Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        let mut visited = BTreeSet::new();
        let mut pending = vec![&self.root];
        while let Some(module) = pending.pop() {
            if !visited.insert(module.to_string()) {
                continue;
            }
            let children = self
                .item(module)
                .map(|item| list(item, "/inner/module/items"));
            for id in children.unwrap_or_default() {
                let item = self.item(id).context("rustdoc did not describe an item")?;
                let import = item.pointer("/inner/use");
                // The target of a `use` may be in another crate.
                let (target, name) = match import {
                    Some(import) => (import.get("id"), import.get("name")),
                    None => (Some(id), item.get("name")),
                };
                let found = target.and_then(|target| self.item(target));
                let glob = import.and_then(|import| import.get("is_glob"));
                if found.is_some_and(|item| item.pointer("/inner/module").is_some()) {
                    pending.extend(target);
                }
                if let (Some(name), false) = (
                    name.and_then(Value::as_str),
                    glob.and_then(Value::as_bool).unwrap_or(false),
                ) {
                    names.insert(name.to_owned());
                    let members = found.map(|item| self.members(item)).unwrap_or_default();
                    names.extend(members.iter().map(|member| format!("{name}::{member}")));
                }
            }
        }
        Ok(names)
    }

    fn item(&self, id: &Value) -> Option<&Value> {
        self.items.get(&id.to_string())
    }

    /// Returns the public fields, variants, methods and associated items of a type or a trait.
    fn members(&self, item: &Value) -> Vec<&str> {
        let paths = [
            "/inner/trait/items",
            "/inner/enum/variants",
            "/inner/struct/kind/plain/fields",
        ];
        let own = paths.into_iter().flat_map(|path| list(item, path));
        let kinds = ["/inner/enum/impls", "/inner/struct/impls"];
        let blocks = kinds.into_iter().flat_map(|path| list(item, path));
        let inherent = blocks
            .filter_map(|id| self.item(id)?.pointer("/inner/impl"))
            .filter(|block| block.get("trait").is_some_and(Value::is_null))
            .flat_map(|block| list(block, "/items"));
        own.chain(inherent)
            .filter_map(|id| self.item(id))
            .filter(|member| {
                let visibility = member.get("visibility").and_then(Value::as_str);
                matches!(visibility, Some("public" | "default"))
            })
            .filter_map(|member| member.get("name")?.as_str())
            .collect()
    }
}

/// Returns the array at a path of a value, or nothing.
fn list<'value>(value: &'value Value, path: &str) -> Vec<&'value Value> {
    let array = value.pointer(path).and_then(Value::as_array);
    array
        .map(|array| array.iter().collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = r#"{"root": 0, "index": {
        "0": {"name": "vm_memory", "inner": {"module": {"items": [1, 2, 3, 9]}}},
        "1": {"name": "module", "inner": {"module": {"items": [4, 5]}}},
        "2": {"name": null, "inner": {"use": {"name": "Renamed", "id": 4, "is_glob": false}}},
        "3": {"name": null, "inner": {"use": {"name": "module", "id": 1, "is_glob": true}}},
        "4": {"name": "Type", "inner": {"struct": {"kind": {"plain": {"fields": [10]}}, "impls": [6, 7]}}},
        "5": {"name": "Trait", "inner": {"trait": {"items": [8]}}},
        "6": {"name": null, "inner": {"impl": {"trait": null, "items": [11, 12]}}},
        "7": {"name": null, "inner": {"impl": {"trait": {"path": "Clone"}, "items": [13]}}},
        "8": {"name": "required", "visibility": "default", "inner": {}},
        "9": {"name": null, "inner": {"use": {"name": "External", "id": 99, "is_glob": false}}},
        "10": {"name": "field", "visibility": "public", "inner": {}},
        "11": {"name": "method", "visibility": "public", "inner": {}},
        "12": {"name": "private", "visibility": {"restricted": {}}, "inner": {}},
        "13": {"name": "clone", "visibility": "default", "inner": {}}
    }}"#;

    #[test]
    fn names_of_documentation_are_public_items_and_members() {
        let names = Documentation::read(JSON).unwrap().names().unwrap();
        let expected = [
            "External",
            "Renamed",
            "Renamed::field",
            "Renamed::method",
            "Trait",
            "Trait::required",
            "Type",
            "Type::field",
            "Type::method",
            "module",
        ];
        assert_eq!(Vec::from_iter(names), expected);
    }

    #[test]
    fn missing_with_new_items_and_members_returns_those_not_named() {
        let names = [
            "Old",
            "Old::known",
            "Old::new",
            "Old::named",
            "New",
            "New::member",
            "Named",
        ];
        let names = names.map(str::to_owned).into();
        let changelog = "- `Old::named`, `Named`. A renewed Newer thing.";
        let missing = missing(&names, "Old\nOld::known ~\n", changelog);
        assert_eq!(missing, ["New", "Old::new"]);
    }

    #[test]
    fn read_of_other_text_returns_error() {
        assert!(Documentation::read("{}").is_err());
        assert!(Documentation::read("").is_err());
    }
}
