//! The checkout, its packages, and the cargo that runs this program.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use cargo_metadata::{Metadata, MetadataCommand, TargetKind};

/// The checkout that this program was built from.
#[derive(Debug)]
pub struct Workspace {
    /// The folder of the workspace, and of the package `vm-memory`.
    pub root: PathBuf,
    /// The folder of build output: `CARGO_TARGET_DIR`, or `target`.
    pub target: PathBuf,
    metadata: Metadata,
}

/// A package of the workspace.
#[derive(Debug)]
pub struct Package {
    /// The name in its manifest.
    pub name: String,
    /// The folder of its manifest.
    pub folder: PathBuf,
    /// The root files of its library, programs and examples, without tests and benchmarks.
    pub roots: Vec<PathBuf>,
}

impl Workspace {
    /// Finds the checkout that this program was built from.
    ///
    /// # Errors
    ///
    /// Returns an error if cargo cannot read the workspace.
    pub fn find() -> Result<Self> {
        let own = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = own.parent().context("the folder of xtask has no parent")?;
        let metadata = MetadataCommand::new()
            .cargo_path(cargo_path())
            .manifest_path(root.join("Cargo.toml"))
            .no_deps()
            .exec()
            .with_context(|| format!("cannot read the workspace in {}", root.display()))?;
        Ok(Self {
            root: metadata.workspace_root.clone().into_std_path_buf(),
            target: metadata.target_directory.clone().into_std_path_buf(),
            metadata,
        })
    }

    /// Returns the manifest of the package `vm-memory`.
    pub fn manifest(&self) -> PathBuf {
        self.root.join("Cargo.toml")
    }

    /// Returns the features of vm-memory that docs.rs builds, separated by commas. These are all
    /// implemented features.
    ///
    /// # Errors
    ///
    /// Returns an error if the manifest has no `features` in `[package.metadata.docs.rs]`.
    pub fn features(&self) -> Result<String> {
        let library = self
            .metadata
            .root_package()
            .context("the workspace has no package at its root")?;
        let features = library
            .metadata
            .pointer("/docs/rs/features")
            .and_then(|features| features.as_array())
            .context("Cargo.toml has no `features` in [package.metadata.docs.rs]")?;
        let names: Vec<_> = features.iter().filter_map(|name| name.as_str()).collect();
        Ok(names.join(","))
    }

    /// Returns the packages of the workspace, sorted by name.
    ///
    /// # Errors
    ///
    /// Returns an error if a manifest has no folder.
    pub fn packages(&self) -> Result<Vec<Package>> {
        let mut packages = Vec::new();
        for package in self.metadata.workspace_packages() {
            let folder = package
                .manifest_path
                .parent()
                .context("a manifest has no folder")?;
            let roots = package.targets.iter().filter(|target| {
                let kinds = [
                    TargetKind::Lib,
                    TargetKind::Bin,
                    TargetKind::Example,
                    TargetKind::ProcMacro,
                ];
                target.kind.iter().any(|kind| kinds.contains(kind))
            });
            packages.push(Package {
                name: package.name.to_string(),
                folder: folder.as_std_path().to_owned(),
                roots: roots
                    .map(|target| target.src_path.clone().into_std_path_buf())
                    .collect(),
            });
        }
        packages.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(packages)
    }
}

/// Returns the cargo that runs this program, so that the toolchain stays the same.
pub fn cargo_path() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

/// Returns a command that runs this cargo in `folder`.
pub fn cargo(folder: &Path) -> Command {
    let mut command = Command::new(cargo_path());
    command.current_dir(folder);
    command
}

#[cfg(test)]
mod tests {
    use super::Workspace;

    #[test]
    fn features_of_this_checkout_are_those_of_the_manifest() {
        let features = Workspace::find().unwrap().features().unwrap();
        assert_eq!(
            features,
            "rawfd,backend-mmap,backend-bitmap,backend-atomic,iommu,derive,zerocopy,serde,log"
        );
    }
}
