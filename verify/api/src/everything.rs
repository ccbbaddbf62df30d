//! Every public name of the library in one place, by glob, as a prelude of a VMM would have it.

#[expect(
    ambiguous_glob_reexports,
    reason = "modules of the library have an Error and a Result each"
)]
pub use {
    vm_memory::address::*, vm_memory::atomic::*, vm_memory::bitmap::*, vm_memory::bytes::*,
    vm_memory::endian::*, vm_memory::guest_memory::*, vm_memory::io::*, vm_memory::iommu::*,
    vm_memory::mmap::*, vm_memory::region::*, vm_memory::volatile_memory::*, vm_memory::*,
};

pub use crate::extensions::*;
// In scope wherever files are handled, with methods named `read`, `write`, `by_ref`, `flush`, `seek`.
pub use std::io::{BufRead, Read, Seek, Write};
