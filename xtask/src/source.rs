//! Rust source as a tree of modules.
//!
//! [`modules`] follows the `mod` items of a crate from its root file. Code that only tests compile
//! is left out: [`is_test`] recognises it by its attributes.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::visit::Visit;
use syn::{Attribute, Item, Meta, Token};

/// One file of a crate.
#[derive(Debug)]
pub struct Module {
    /// The file.
    pub file: PathBuf,
    /// The module's path in the crate; empty for the root.
    pub path: Vec<String>,
    /// The text of the file.
    pub text: String,
    /// The syntax tree of the text.
    pub tree: syn::File,
}

/// Returns the files of the crate with the root file `root`, without those that only tests compile.
///
/// # Errors
///
/// Returns an error if a file cannot be read or parsed, or if no file exists for a module.
pub fn modules(root: &Path) -> Result<Vec<Module>> {
    let mut found = Vec::new();
    let mut pending = vec![(root.to_owned(), Vec::new())];
    while let Some((file, path)) = pending.pop() {
        let text = fs::read_to_string(&file)
            .with_context(|| format!("cannot read the module {}", file.display()))?;
        let tree =
            syn::parse_file(&text).with_context(|| format!("cannot parse {}", file.display()))?;
        if is_test(&tree.attrs) {
            continue;
        }
        children(&file, &path, &tree.items, &mut pending)?;
        found.push(Module {
            file,
            path,
            text,
            tree,
        });
    }
    found.sort_by(|one, other| one.file.cmp(&other.file));
    found.dedup_by(|one, other| one.file == other.file);
    Ok(found)
}

/// Adds the files of the `mod` items of a file, including those in inline modules.
fn children(
    file: &Path,
    path: &[String],
    items: &[Item],
    pending: &mut Vec<(PathBuf, Vec<String>)>,
) -> Result<()> {
    let parent = file.parent().context("a module's file has no folder")?;
    let stem = file.file_stem().unwrap_or_default();
    let folder = match stem.to_str() {
        Some("mod") => parent.to_owned(),
        // A root file, of any name.
        _ if path.is_empty() => parent.to_owned(),
        _ => parent.join(stem),
    };
    for item in items {
        let Item::Mod(module) = item else { continue };
        if is_test(&module.attrs) {
            continue;
        }
        let name = module.ident.to_string();
        let path = [path, std::slice::from_ref(&name)].concat();
        if let Some((_, items)) = &module.content {
            children(&folder.join(&name).join("mod.rs"), &path, items, pending)?;
            continue;
        }
        let named: Vec<_> = path_attributes(&module.attrs)
            .into_iter()
            .map(|relative| parent.join(relative))
            .collect();
        let usual = [
            folder.join(format!("{name}.rs")),
            folder.join(&name).join("mod.rs"),
        ];
        let files: Vec<_> = named
            .into_iter()
            .chain(usual)
            .filter(|file| file.exists())
            .collect();
        anyhow::ensure!(
            !files.is_empty(),
            "{}: the module `{name}` has no file",
            file.display()
        );
        pending.extend(files.into_iter().map(|file| (file, path.clone())));
    }
    Ok(())
}

/// Returns the values of `#[path = "…"]`, including conditional ones.
fn path_attributes(attributes: &[Attribute]) -> Vec<String> {
    let mut found = Vec::new();
    for attribute in attributes {
        let metas = if attribute.path().is_ident("cfg_attr") {
            nested(attribute)
        } else {
            vec![attribute.meta.clone()]
        };
        for meta in metas {
            if let Meta::NameValue(pair) = meta {
                if let (true, syn::Expr::Lit(value)) = (pair.path.is_ident("path"), pair.value) {
                    if let syn::Lit::Str(value) = value.lit {
                        found.push(value.value());
                    }
                }
            }
        }
    }
    found
}

/// Returns the list in the parentheses of an attribute.
fn nested(attribute: &Attribute) -> Vec<Meta> {
    attribute
        .parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated)
        .map(|list| list.into_iter().collect())
        .unwrap_or_default()
}

/// Returns whether the attributes of an item hide it from builds that are not tests.
pub fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("test")
            || attribute.path().is_ident("cfg")
                && nested(attribute)
                    .first()
                    .is_some_and(|condition| without_test(condition) == Some(false))
    })
}

/// Returns the value of a condition without `test`, or `None` if it depends on something else.
fn without_test(condition: &Meta) -> Option<bool> {
    if condition.path().is_ident("test") {
        return Some(false);
    }
    let Meta::List(list) = condition else {
        return None;
    };
    let parts = list
        .parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated)
        .ok()?;
    let mut values = parts.iter().map(without_test);
    if list.path.is_ident("not") {
        return values.next()?.map(|value| !value);
    }
    let values: Vec<_> = values.collect();
    // One value decides `all` and `any`, regardless of the others.
    let decisive = if list.path.is_ident("all") {
        Some(false)
    } else if list.path.is_ident("any") {
        Some(true)
    } else {
        return None;
    };
    if values.contains(&decisive) {
        decisive
    } else if values.contains(&None) {
        None
    } else {
        decisive.map(|value| !value)
    }
}

/// Returns the lines of a file that only tests compile, counted from 1.
pub fn test_lines(tree: &syn::File) -> BTreeSet<usize> {
    let mut lines = TestLines(BTreeSet::new());
    lines.visit_file(tree);
    lines.0
}

struct TestLines(BTreeSet<usize>);

impl TestLines {
    /// Adds the lines of a node if its attributes hide it, and returns whether they do.
    fn add(&mut self, attributes: &[Attribute], node: &impl Spanned) -> bool {
        let hidden = is_test(attributes);
        if hidden {
            let first = attributes
                .iter()
                .map(|attribute| attribute.span().start().line)
                .min();
            let span = node.span();
            self.0
                .extend(first.unwrap_or(span.start().line)..=span.end().line);
        }
        hidden
    }
}

impl<'tree> Visit<'tree> for TestLines {
    fn visit_item(&mut self, item: &'tree Item) {
        if !self.add(item_attributes(item), item) {
            syn::visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'tree syn::ImplItem) {
        if !self.add(impl_item_attributes(item), item) {
            syn::visit::visit_impl_item(self, item);
        }
    }

    fn visit_stmt(&mut self, statement: &'tree syn::Stmt) {
        if !self.add(statement_attributes(statement), statement) {
            syn::visit::visit_stmt(self, statement);
        }
    }

    fn visit_field(&mut self, field: &'tree syn::Field) {
        self.add(&field.attrs, field);
    }
}

/// Returns the attributes of an item of a kind that may exist only in tests.
pub fn item_attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Returns the attributes of an item of an `impl` block.
pub fn impl_item_attributes(item: &syn::ImplItem) -> &[Attribute] {
    match item {
        syn::ImplItem::Const(item) => &item.attrs,
        syn::ImplItem::Fn(item) => &item.attrs,
        syn::ImplItem::Type(item) => &item.attrs,
        _ => &[],
    }
}

/// Returns the attributes of a statement.
pub fn statement_attributes(statement: &syn::Stmt) -> &[Attribute] {
    match statement {
        syn::Stmt::Local(local) => &local.attrs,
        syn::Stmt::Item(item) => item_attributes(item),
        syn::Stmt::Macro(call) => &call.attrs,
        syn::Stmt::Expr(expression, _) => match expression {
            syn::Expr::Block(block) => &block.attrs,
            syn::Expr::Call(call) => &call.attrs,
            syn::Expr::If(condition) => &condition.attrs,
            syn::Expr::MethodCall(call) => &call.attrs,
            _ => &[],
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hides(attribute: &str) -> bool {
        let item: Item = syn::parse_str(&format!("{attribute} fn item() {{}}")).unwrap();
        is_test(item_attributes(&item))
    }

    #[test]
    fn is_test_of_conditions_that_need_test_is_true() {
        for attribute in [
            "#[test]",
            "#[cfg(test)]",
            "#[cfg(all(unix, test))]",
            "#[cfg(not(any(unix, not(test))))]",
        ] {
            assert!(hides(attribute), "{attribute}");
        }
    }

    #[test]
    fn is_test_of_conditions_that_hold_without_test_is_false() {
        for attribute in [
            "#[inline]",
            "#[cfg(unix)]",
            "#[cfg(not(test))]",
            "#[cfg(any(test, unix))]",
        ] {
            assert!(!hides(attribute), "{attribute}");
        }
    }

    #[test]
    fn test_lines_covers_attributes_and_bodies() {
        let text =
            "fn code() {\n    #[cfg(test)]\n    count();\n}\n\n#[cfg(test)]\nmod tests {\n}\n";
        let lines = test_lines(&syn::parse_file(text).unwrap());
        assert_eq!(lines.into_iter().collect::<Vec<_>>(), [2, 3, 6, 7, 8]);
    }

    #[test]
    fn modules_follows_files_and_leaves_tests_out() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let file = folder.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        write(
            "lib.rs",
            "mod plain;\nmod folder;\n#[cfg(test)]\nmod tests;\n",
        );
        write("plain.rs", "mod child;");
        write("plain/child.rs", "");
        write("folder/mod.rs", "#[path = \"elsewhere.rs\"]\nmod named;");
        write("folder/elsewhere.rs", "");
        write("tests.rs", "not Rust");
        write("example.rs", "mod plain;");
        let found = modules(&folder.path().join("lib.rs")).unwrap();
        let mut paths: Vec<_> = found.iter().map(|module| module.path.join("::")).collect();
        paths.sort();
        assert_eq!(
            paths,
            ["", "folder", "folder::named", "plain", "plain::child"]
        );
        let example = modules(&folder.path().join("example.rs")).unwrap();
        assert_eq!(example.len(), 3);
    }
}
