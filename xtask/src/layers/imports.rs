//! The paths that a module names in its own crate.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{Spacing, TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Item, UseTree, Visibility};

use crate::source::Module;

/// A path that starts at the root of the crate.
#[derive(Debug)]
pub struct Import {
    /// The line that names it.
    pub line: usize,
    /// Its segments, without `crate`; the first one is a top-level module.
    pub path: Vec<String>,
}

/// Returns the names that `use` items of the root file introduce, each with its path.
pub fn reexports(root: &syn::File, modules: &BTreeSet<String>) -> BTreeMap<String, Vec<String>> {
    let mut names = BTreeMap::new();
    for item in &root.items {
        if let Item::Use(item) = item {
            for leaf in leaves(&item.tree) {
                if leaf
                    .path
                    .first()
                    .is_some_and(|first| modules.contains(first))
                {
                    names.insert(leaf.name, leaf.path);
                }
            }
        }
    }
    names
}

/// Returns the paths into its own crate that a module names in production code.
///
/// A name that the root file exports counts as an import from the module that defines it.
pub fn imports(module: &Module, reexports: &BTreeMap<String, Vec<String>>) -> Vec<Import> {
    let mut visitor = Imports {
        module: module.path.clone(),
        reexports,
        found: Vec::new(),
    };
    visitor.visit_file(&module.tree);
    visitor.found
}

/// A path of a `use`.
struct Leaf {
    line: usize,
    path: Vec<String>,
    /// The name that it gets: the last segment, or the name after `as`.
    name: String,
}

impl Leaf {
    fn new(ident: &syn::Ident, name: &syn::Ident) -> Self {
        Self {
            line: ident.span().start().line,
            path: vec![ident.to_string()],
            name: name.to_string(),
        }
    }
}

/// Returns the paths of a `use`.
fn leaves(tree: &UseTree) -> Vec<Leaf> {
    match tree {
        UseTree::Path(path) => {
            let mut leaves = leaves(&path.tree);
            for leaf in &mut leaves {
                leaf.path.insert(0, path.ident.to_string());
            }
            leaves
        }
        UseTree::Name(name) => vec![Leaf::new(&name.ident, &name.ident)],
        UseTree::Rename(name) => vec![Leaf::new(&name.ident, &name.rename)],
        UseTree::Glob(glob) => vec![Leaf {
            line: glob
                .star_token
                .spans
                .first()
                .map_or(0, |span| span.start().line),
            path: vec!["*".to_owned()],
            name: "*".to_owned(),
        }],
        UseTree::Group(group) => group.items.iter().flat_map(leaves).collect(),
    }
}

struct Imports<'a> {
    /// The path of the module that is visited.
    module: Vec<String>,
    reexports: &'a BTreeMap<String, Vec<String>>,
    found: Vec<Import>,
}

impl Imports<'_> {
    /// Adds a path if it starts with `crate`, `super` or `self`.
    fn add(&mut self, line: usize, path: &[String]) {
        let mut base = match path.first().map(String::as_str) {
            Some("crate") => Vec::new(),
            Some("super" | "self") => self.module.clone(),
            _ => return,
        };
        let mut rest = path.iter();
        for segment in rest.by_ref() {
            match segment.as_str() {
                "super" => drop(base.pop()),
                "crate" | "self" => {}
                name => {
                    base.push(name.to_owned());
                    break;
                }
            }
        }
        base.extend(rest.cloned());
        let path = match base.split_first() {
            Some((first, rest)) => match self.reexports.get(first) {
                Some(defined) => [defined, rest].concat(),
                None => base,
            },
            None => return,
        };
        self.found.push(Import { line, path });
    }

    /// Adds the paths in the tokens of a macro.
    fn add_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let (mut line, mut colons) = (0, 0);
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    let name = ident.to_string();
                    if path.is_empty() || colons != 2 {
                        self.add(line, &path);
                        path.clear();
                        line = ident.span().start().line;
                    }
                    path.push(name);
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => {
                    colons = match punct.spacing() {
                        Spacing::Joint => 1,
                        Spacing::Alone if colons == 1 => 2,
                        Spacing::Alone => 0,
                    };
                }
                other => {
                    self.add(line, &path);
                    path.clear();
                    colons = 0;
                    if let TokenTree::Group(group) = other {
                        self.add_tokens(group.stream());
                    }
                }
            }
        }
        self.add(line, &path);
    }
}

impl<'tree> Visit<'tree> for Imports<'_> {
    fn visit_item_mod(&mut self, item: &'tree syn::ItemMod) {
        self.module.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.module.pop();
    }

    fn visit_item_use(&mut self, item: &'tree syn::ItemUse) {
        for Leaf { line, path, .. } in leaves(&item.tree) {
            self.add(line, &path);
        }
    }

    fn visit_path(&mut self, path: &'tree syn::Path) {
        let segments: Vec<_> = path
            .segments
            .iter()
            .map(|segment| segment.ident.to_string())
            .collect();
        if segments.len() > 1 {
            let first = path.segments.first();
            let line = first.map_or(0, |segment| segment.ident.span().start().line);
            self.add(line, &segments);
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'tree syn::Macro) {
        self.add_tokens(call.tokens.clone());
    }

    // Visibilities (`pub(in crate::…)`) and attributes do not name items.
    fn visit_visibility(&mut self, _: &'tree Visibility) {}
    fn visit_attribute(&mut self, _: &'tree syn::Attribute) {}
}
