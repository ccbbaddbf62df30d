use std::fs;

use super::*;

const LIST: &str =
    "//! # Layers\n//!\n//! ```text\n//! low  the base\n//! middle, other\n//! high\n//! ```\n\
                    mod low;\nmod middle;\nmod other;\nmod high;\npub use high::{High, Other as Renamed};\n";

/// Returns the findings about a crate whose module `module` contains `text`.
fn findings(module: &str, text: &str, exceptions: &[Exception]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    findings_in(folder.path(), module, text, exceptions)
}

fn findings_in(folder: &Path, module: &str, text: &str, exceptions: &[Exception]) -> Vec<String> {
    let root = folder.join("lib.rs");
    fs::write(&root, LIST).unwrap();
    for name in ["low", "middle", "other", "high"] {
        let text = if name == module { text } else { "" };
        fs::write(folder.join(format!("{name}.rs")), text).unwrap();
    }
    let package = Package {
        name: "example".to_owned(),
        folder: folder.to_owned(),
        roots: vec![root],
    };
    check(&package, exceptions).unwrap()
}

#[test]
fn check_with_imports_that_point_up_reports_each() {
    for text in [
        "use crate::high::High;",
        "use crate::{low::Low, high::High};",
        "use crate::High;",
        "use crate::Renamed;",
        "use super::high;",
        "fn call() { crate::high::call() }",
        "fn call() { println!(\"{}\", crate::high::call()) }",
        "mod inner { use super::super::high::High; }",
        "macro_rules! call { () => { $crate::high::call() } }",
        "impl crate::high::High for u8 {}",
    ] {
        let found = findings("middle", text, &[]);
        assert_eq!(found.len(), 1, "{text}: {found:?}");
        let finding = found.first().unwrap();
        assert!(
            finding.contains("middle.rs:1: `middle` imports `high"),
            "{text}: {finding}"
        );
    }
}

#[test]
fn check_with_table_in_documentation_compares_it_with_list() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("docs")).unwrap();
    let table = |high: &str| {
        let rows =
            "| layer | modules |\n|---|---|\n| base | `low` |\n| rest | `middle`, `other` |\n";
        let text = format!("# A\n\n## Layers of `src/`\n\nText.\n\n{rows}{high}\n| no |\n");
        fs::write(folder.path().join(DESCRIPTION), text).unwrap();
        findings_in(folder.path(), "low", "", &[])
    };
    assert_eq!(table("| top | `high` | text |\n"), [""; 0]);
    for high in [
        "",
        "| top | `high`, `xen` |\n",
        "| top | `xen` |\n| more | `high` |\n",
    ] {
        let found = table(high);
        assert!(
            found.len() == 1 && found.first().unwrap().contains("differs from the table"),
            "{high}: {found:?}"
        );
    }
}

#[test]
fn check_with_imports_from_same_or_lower_layers_reports_nothing() {
    for text in [
        "use crate::low::Low;\nuse crate::other::Other;\nuse std::io;",
        "use self::inner::Inner;\nmod inner { use super::Own; }",
        "/// See [`crate::high::High`].\nfn documented() {}",
        "pub(in crate::middle) fn visible() {}",
    ] {
        assert_eq!(findings("middle", text, &[]), [""; 0], "{text}");
    }
}

#[test]
fn check_with_upward_imports_in_tests_reports_nothing() {
    for text in [
        "#[cfg(test)]\nmod tests { use crate::high::High; }",
        "#[cfg(test)]\nuse crate::high::High;",
        "fn counted() { #[cfg(test)]\n crate::high::count(); }",
    ] {
        assert_eq!(findings("low", text, &[]), [""; 0], "{text}");
    }
}

#[test]
fn check_with_exception_allows_that_name_only() {
    let exception = || Exception {
        package: "example",
        from: "low",
        name: "high::High",
        reason: "published",
    };
    assert_eq!(findings("low", "use crate::High;", &[exception()]), [""; 0]);
    let other = findings("low", "use crate::high::{High, Low};", &[exception()]);
    assert_eq!(other.len(), 1, "{other:?}");
    let unused = findings("low", "", &[exception()]);
    assert!(
        unused.first().unwrap().contains("is no longer needed"),
        "{unused:?}"
    );
}

#[test]
fn differences_of_list_and_modules_reports_both_ways() {
    let layers = Layers::parse("//! # Layers\n//! ```text\n//! one\n//! two\n//! ```\n").unwrap();
    let modules = ["two", "three"].map(str::to_owned).into();
    assert_eq!(
        layers.differences(&modules),
        [
            "the module `three` is not in the list of layers",
            "the list of layers has `one`, which is not a module"
        ]
    );
}
