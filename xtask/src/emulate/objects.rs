//! Compares the machine code of the access routines in two object files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use object::{Object, ObjectSection, ObjectSymbol};

/// The folder of the routines, in the mangled name of a function in it.
const FOLDER: &str = "8routines";
/// The beginning of the hash in a mangled name, which differs between targets.
const HASH: &str = "17h";
/// The size of the field that a relocation fills.
const FIELD: usize = 4;

/// Checks that each routine of an ELF file has the same machine code in another file.
///
/// Fields that the linker fills are left out. Returns the number of routines.
pub(super) fn compare_routines(elf: &Path, other: &Path) -> Result<usize> {
    let (elf, other) = (routines(elf)?, routines(other)?);
    for (name, code) in &elf {
        let other = other
            .get(name)
            .with_context(|| format!("{name} is missing"))?;
        // Only ELF has the sizes of functions.
        let same = other.get(..code.len()).context("a function is too short")?;
        ensure!(!code.is_empty() && same == code, "{name} differs");
    }
    Ok(elf.len())
}

/// Returns the code of each routine by its name, up to its end or that of the section.
///
/// A byte is `None` if the linker fills it.
fn routines(file: &Path) -> Result<BTreeMap<String, Vec<Option<u8>>>> {
    let data = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let file = object::File::parse(&*data)?;
    let mut routines = BTreeMap::new();
    for symbol in file.symbols() {
        let Some(name) = routine(symbol.name().unwrap_or_default()) else {
            continue;
        };
        let Some(index) = symbol.section_index() else {
            continue;
        };
        let section = file.section_by_index(index)?;
        let mut code: Vec<_> = section.data()?.iter().copied().map(Some).collect();
        for (offset, _) in section.relocations() {
            let at = usize::try_from(offset)?;
            if let Some(field) = code.get_mut(at..at.saturating_add(FIELD)) {
                field.fill(None);
            }
        }
        let start = usize::try_from(symbol.address().saturating_sub(section.address()))?;
        code.drain(..start.min(code.len()));
        if let size @ 1.. = usize::try_from(symbol.size())? {
            code.truncate(size);
        }
        routines.insert(name, code);
    }
    Ok(routines)
}

/// Returns the part of a mangled name that is the same for each target, if it names a routine.
fn routine(symbol: &str) -> Option<String> {
    let name = symbol.get(symbol.find(FOLDER)?..)?;
    Some(name.split(HASH).next().unwrap_or(name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routine_of_either_mangling_has_no_hash() {
        let legacy = "__ZN9vm_memory6access4arch8routines5pairs17h0123456789abcdefE";
        let v0 = "_RNvNtNtNtCs1_9vm_memory6access4arch8routines5pairs";
        for symbol in [legacy, v0] {
            assert_eq!(routine(symbol).unwrap(), "8routines5pairs");
        }
        assert_eq!(
            routine("__ZN9vm_memory6access4copy17h0123456789abcdefE"),
            None
        );
    }
}
