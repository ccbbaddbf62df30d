//! The first file system of domain 0: one program, and modules of the kernel.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

/// Writes the archive: `program` as `/init`, and the modules in `/modules`, named by their order.
///
/// # Errors
///
/// Returns an error if a file cannot be read or the archive cannot be written.
pub fn write(image: &Path, program: &Path, modules: &[PathBuf]) -> Result<()> {
    let mut archive = Archive::default();
    archive.add("init", PROGRAM, &read(program)?)?;
    archive.add("modules", FOLDER, &[])?;
    for (number, module) in modules.iter().enumerate() {
        archive.add(&format!("modules/{number}.ko"), FILE, &read(module)?)?;
    }
    fs::write(image, archive.finish()?).with_context(|| format!("cannot write {}", image.display()))
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// An archive in the format "newc" of cpio, which the kernel unpacks.
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entries = self.entries.wrapping_add(1);
        let size = u32::try_from(content.len()).context("a file is too large")?;
        let name_size = u32::try_from(name.len()).context("a name is too long")?;
        // Number, mode, user, group, links, time, size, four numbers of devices, length of the
        // name with the zero after it, checksum.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            0,
            0,
            name_size.wrapping_add(1),
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(content);
        self.align();
        Ok(())
    }

    /// Pads the archive to a multiple of four bytes, as the format requires after each name and
    /// content.
    fn align(&mut self) {
        let len = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(len, 0);
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        self.add("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads the names, modes and contents of an archive, by the description of the format.
    fn entries(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut at = 0;
        let mut found = Vec::new();
        while at < bytes.len() {
            let field = |number: usize| {
                let from = at + 6 + 8 * number;
                u32::from_str_radix(std::str::from_utf8(&bytes[from..from + 8]).unwrap(), 16)
                    .unwrap()
            };
            assert_eq!(&bytes[at..at + 6], b"070701");
            assert_eq!(at % 4, 0);
            let (size, name_size) = (field(6) as usize, field(11) as usize);
            let name = &bytes[at + 110..at + 110 + name_size];
            assert_eq!(name.last(), Some(&0));
            let content = (at + 110 + name_size).next_multiple_of(4);
            found.push((
                String::from_utf8(name[..name_size - 1].to_vec()).unwrap(),
                field(1),
                bytes[content..content + size].to_vec(),
            ));
            at = (content + size).next_multiple_of(4);
        }
        found
    }

    #[test]
    fn add_of_any_length_keeps_name_and_content() {
        for len in 0..9 {
            let name = "n".repeat(len + 1);
            let content = vec![7; len];
            let mut archive = Archive::default();
            archive.add(&name, FILE, &content).unwrap();
            let bytes = archive.finish().unwrap();
            let expected = [
                (name, FILE, content),
                ("TRAILER!!!".to_owned(), 0, Vec::new()),
            ];
            assert_eq!(entries(&bytes), expected);
        }
    }

    #[test]
    fn write_with_modules_keeps_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = folder.path().join(name);
            fs::write(&path, name).unwrap();
            path
        };
        let image = folder.path().join("image");
        write(&image, &file("program"), &[file("z.ko"), file("a.ko")]).unwrap();
        let names: Vec<_> = entries(&fs::read(&image).unwrap())
            .into_iter()
            .map(|(name, _, content)| (name, String::from_utf8(content).unwrap()))
            .collect();
        let expected = [
            ("init", "program"),
            ("modules", ""),
            ("modules/0.ko", "z.ko"),
            ("modules/1.ko", "a.ko"),
            ("TRAILER!!!", ""),
        ];
        assert_eq!(names, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }
}
