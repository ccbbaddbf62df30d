//! Every public name of the library by glob, like the prelude of a VMM.

#[expect(
    ambiguous_glob_reexports,
    reason = "several modules of the library have an Error and a Result"
)]
pub use {
    vm_memory::address::*, vm_memory::atomic::*, vm_memory::bitmap::*, vm_memory::bytes::*,
    vm_memory::endian::*, vm_memory::guest_memory::*, vm_memory::io::*, vm_memory::iommu::*,
    vm_memory::mmap::*, vm_memory::region::*, vm_memory::volatile_memory::*, vm_memory::*,
};

pub use crate::extensions::*;
// In scope in most code with files, with methods named `read`, `write`, `by_ref`, `flush`, `seek`.
pub use std::io::{BufRead, Read, Seek, Write};
