//! Rust source as a tree of modules.
//!
//! [`modules`] follows the `mod` items of a crate from its root file. Code that only tests compile
//! is left out. It is recognised by its attributes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use proc_macro2::TokenStream;
use quote::ToTokens;
use syn::parse::{ParseStream, Parser};
use syn::punctuated::Punctuated;
use syn::visit_mut::{self, VisitMut};
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
    /// The syntax tree of the text, without the code that only tests compile.
    pub tree: syn::File,
}

impl Module {
    /// Parses the text of a file, or returns `None` if only tests compile the whole file.
    ///
    /// # Errors
    ///
    /// Returns an error if the text is not Rust.
    pub fn parse(file: PathBuf, path: Vec<String>, text: String) -> Result<Option<Self>> {
        let mut tree =
            syn::parse_file(&text).with_context(|| format!("cannot parse {}", file.display()))?;
        if is_test(&tree.attrs) {
            return Ok(None);
        }
        WithoutTests.visit_file_mut(&mut tree);
        Ok(Some(Self {
            file,
            path,
            text,
            tree,
        }))
    }
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
        if let Some(module) = Module::parse(file, path, text)? {
            children(&module.file, &module.path, &module.tree.items, &mut pending)?;
            found.push(module);
        }
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
fn is_test(attributes: &[Attribute]) -> bool {
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

/// Removes the nodes of a tree that only tests compile.
struct WithoutTests;

impl VisitMut for WithoutTests {
    fn visit_file_mut(&mut self, file: &mut syn::File) {
        file.items.retain(is_kept);
        visit_mut::visit_file_mut(self, file);
    }

    fn visit_item_mod_mut(&mut self, module: &mut syn::ItemMod) {
        if let Some((_, items)) = &mut module.content {
            items.retain(is_kept);
        }
        visit_mut::visit_item_mod_mut(self, module);
    }

    fn visit_item_impl_mut(&mut self, block: &mut syn::ItemImpl) {
        block.items.retain(is_kept);
        visit_mut::visit_item_impl_mut(self, block);
    }

    fn visit_block_mut(&mut self, block: &mut syn::Block) {
        block.stmts.retain(is_kept);
        visit_mut::visit_block_mut(self, block);
    }

    fn visit_fields_named_mut(&mut self, fields: &mut syn::FieldsNamed) {
        let named = std::mem::take(&mut fields.named).into_pairs();
        fields.named = named.filter(|field| is_kept(field.value())).collect();
    }
}

/// Returns whether builds that are not tests compile a node.
fn is_kept(node: &impl ToTokens) -> bool {
    !is_test(&attributes(node))
}

/// Returns the attributes before an item, a field or a statement.
fn attributes(node: &impl ToTokens) -> Vec<Attribute> {
    let parser = |input: ParseStream<'_>| {
        let attributes = input.call(Attribute::parse_outer)?;
        input.parse::<TokenStream>()?;
        Ok(attributes)
    };
    parser.parse2(node.to_token_stream()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hides(attribute: &str) -> bool {
        let item: Item = syn::parse_str(&format!("{attribute} fn item() {{}}")).unwrap();
        is_test(&attributes(&item))
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
    fn parse_of_code_and_tests_removes_the_tests() {
        let text =
            "fn code() {\n    #[cfg(test)]\n    count();\n}\n\n#[cfg(test)]\nmod tests {\n}\n";
        let module = Module::parse(PathBuf::new(), Vec::new(), text.to_owned());
        let module = module.unwrap().unwrap();
        let code = module.tree.to_token_stream().to_string();
        assert_eq!(code, "fn code () { }");
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
