//! Where this checkout and its target folder are, and how cargo is called.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use cargo_metadata::MetadataCommand;

/// This checkout.
#[derive(Debug)]
pub struct Workspace {
    /// The folder of the workspace and of the package `vm-memory`.
    pub root: PathBuf,
    /// Where cargo puts what it builds: `CARGO_TARGET_DIR`, or `target`.
    pub target: PathBuf,
}

impl Workspace {
    /// The checkout that this program was built from.
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
            root: metadata.workspace_root.into_std_path_buf(),
            target: metadata.target_directory.into_std_path_buf(),
        })
    }

    /// The manifest of the package `vm-memory`.
    pub fn manifest(&self) -> PathBuf {
        self.root.join("Cargo.toml")
    }
}

/// The cargo that runs this program, so that the toolchain stays the same.
pub fn cargo_path() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

/// That cargo, to be run in `folder`.
pub fn cargo(folder: &Path) -> Command {
    let mut command = Command::new(cargo_path());
    command.current_dir(folder);
    command
}
