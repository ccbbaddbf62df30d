//! [`SystemFiles`]: files of /sys and /proc, each read at most once.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Files of /sys and /proc. Each is read at most once, when it is first needed.
#[derive(Clone, Debug)]
pub(super) struct SystemFiles {
    sys: PathBuf,
    proc: PathBuf,
    known: Arc<Mutex<Known>>,
}

/// The texts and directories that were read. `None`: the file or directory cannot be read.
#[derive(Debug, Default)]
struct Known {
    texts: BTreeMap<PathBuf, Option<Arc<str>>>,
    directories: BTreeMap<PathBuf, Option<Vec<PathBuf>>>,
    /// Whether files that were not read count as missing.
    is_closed: bool,
}

impl SystemFiles {
    pub(super) fn new(sys: impl Into<PathBuf>, proc: impl Into<PathBuf>) -> Self {
        Self {
            sys: sys.into(),
            proc: proc.into(),
            known: Arc::default(),
        }
    }

    /// Returns the same files, of which none was read.
    pub(super) fn again(&self) -> Self {
        Self::new(self.sys.clone(), self.proc.clone())
    }

    pub(super) fn sys(&self) -> &Path {
        &self.sys
    }

    pub(super) fn proc(&self) -> &Path {
        &self.proc
    }

    /// Stops reading files. Files that were not read before this call count as missing.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
    }

    /// Returns the text of a file, or `None` if it cannot be read.
    ///
    /// Names in the text need not be UTF-8. Other bytes are replaced.
    pub(super) fn text(&self, path: &Path) -> Option<Arc<str>> {
        let mut known = self.lock();
        if let Some(text) = known.texts.get(path) {
            return text.clone();
        }
        if known.is_closed {
            return None;
        }
        let content = fs::read(path).inspect_err(|error| {
            log_debug!(
                "{}: cannot be read, and its limit is not checked: {error}",
                path.display()
            );
        });
        let content = content.ok();
        let text = content.map(|content| Arc::from(String::from_utf8_lossy(&content)));
        known.texts.insert(path.to_owned(), text.clone());
        text
    }

    /// Returns the number that a file contains.
    pub(super) fn number(&self, path: &Path) -> Option<u64> {
        self.text(path)?.trim().parse().ok()
    }

    /// Returns the paths in a directory, or `None` if it cannot be read.
    pub(super) fn list(&self, path: &Path) -> Option<Vec<PathBuf>> {
        let mut known = self.lock();
        if let Some(paths) = known.directories.get(path) {
            return paths.clone();
        }
        if known.is_closed {
            return None;
        }
        let entries = fs::read_dir(path).ok();
        let paths: Option<Vec<_>> = entries.map(|entries| {
            entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .collect()
        });
        known.directories.insert(path.to_owned(), paths.clone());
        paths
    }

    /// Poisoning is ignored: no code panics while it holds this lock.
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads a file that contains one number.
pub(super) fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_once_and_not_after_close() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("a"), directory.path().join("b"));
        fs::write(&path, "1\n").unwrap();
        fs::write(&other, [b'x', 0xff]).unwrap();
        let files = SystemFiles::new(directory.path(), "/proc");
        assert_eq!(files.number(&path), Some(1));
        assert_eq!(
            files.list(directory.path()).map(|paths| paths.len()),
            Some(2)
        );
        fs::write(&path, "2\n").unwrap();
        let clone = files.clone();
        clone.close();
        for files in [&files, &clone] {
            assert_eq!(files.number(&path), Some(1));
            assert_eq!(files.text(&other), None);
            assert_eq!(files.list(Path::new("/")), None);
            assert_eq!(
                files.list(directory.path()).map(|paths| paths.len()),
                Some(2)
            );
        }
        let again = files.again();
        assert_eq!(again.number(&path), Some(2));
        assert_eq!(again.text(&other).as_deref(), Some("x\u{fffd}"));
        assert_eq!(again.text(&directory.path().join("c")), None);
        assert_eq!(again.list(&path), None);
    }
}
