//! [`Vm`]: the calls of a real virtual machine.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_userspace_memory_region,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
};
use kvm_ioctls::VmFd;
use vm_memory::arithmetic::to_usize;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_val};

use super::{Calls, SlotRange};

/// `_IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)`, of Linux's include/uapi/linux/kvm.h, on the
/// architectures of kvm-ioctls: direction 3, the size 24, type 0xae.
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = 0xc018_aec0;
const _: () = assert!(size_of::<kvm_clear_dirty_log>() == 0x18);
/// `_IO(KVMIO, 0xc7)`.
const KVM_RESET_DIRTY_RINGS: libc::c_ulong = 0xaec7;

/// A virtual machine of KVM.
#[derive(Debug)]
pub(crate) struct Vm(Arc<VmFd>);

impl Vm {
    /// Wraps a virtual machine.
    ///
    /// # Safety
    ///
    /// 1. The host memory of each range that is passed to [`Calls::set_slot`] is mapped, and the
    ///    protection permits reads, and writes unless the slot is read-only. This holds from the
    ///    call until [`Calls::delete_slot`] has succeeded for the number, or until no vCPU of the
    ///    machine runs any more.
    /// 2. No Rust reference to bytes of these ranges exists meanwhile. All accesses to them permit
    ///    the guest to write the bytes at the same time.
    pub(crate) unsafe fn new(fd: Arc<VmFd>) -> Self {
        Self(fd)
    }

    fn set(&self, number: u32, range: &SlotRange, len: u64, flags: u32) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: number,
            flags,
            guest_phys_addr: range.start,
            memory_size: len,
            userspace_addr: range.host,
        };
        // SAFETY: the call lets the guest access `len` bytes at `range.host`. Clauses 1 and 2 of
        // `new` permit this for each `range` of `set_slot`, and `delete_slot` passes 0 bytes.
        let set = unsafe { self.0.set_user_memory_region(region) };
        set.map_err(Into::into)
    }
}

impl Calls for Vm {
    fn set_slot(&self, number: u32, range: &SlotRange, is_tracked: bool) -> io::Result<()> {
        let flag = |is_set, flag| if is_set { flag } else { 0 };
        let flags = flag(is_tracked, KVM_MEM_LOG_DIRTY_PAGES);
        let flags = flags | flag(range.is_read_only, KVM_MEM_READONLY);
        self.set(number, range, range.len, flags)
    }

    fn delete_slot(&self, number: u32, range: &SlotRange) -> io::Result<()> {
        self.set(number, range, 0, 0)
    }

    fn read_log(&self, number: u32, range: &SlotRange) -> io::Result<Vec<u64>> {
        let words = self.0.get_dirty_log(number, to_usize(range.len));
        words.map_err(Into::into)
    }

    fn clear_log(
        &self,
        number: u32,
        first_page: u64,
        pages: u32,
        words: &mut [u64],
    ) -> io::Result<()> {
        // KVM reads one bit for each page.
        if to_usize(u64::from(pages)).div_ceil(64) > words.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut log = kvm_clear_dirty_log {
            slot: number,
            num_pages: pages,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words.as_mut_ptr().cast(),
            },
        };
        // SAFETY: 1. The descriptor is that of a virtual machine, which has this request. Its
        //    argument is a `kvm_clear_dirty_log`, and `log` is one.
        // 2. The kernel only reads the bitmap. It reads a bit for each of the `pages` pages, in
        //    whole words, and `words` has them: this is checked above.
        let result = unsafe { ioctl_with_mut_ref(&*self.0, KVM_CLEAR_DIRTY_LOG, &mut log) };
        done(result)
    }

    fn reset_rings(&self) -> io::Result<()> {
        // SAFETY: the descriptor is that of a virtual machine, which has this request. It has no
        // argument. The kernel writes only the flags of entries, which `Entry` has as atomics.
        let result = unsafe { ioctl_with_val(&*self.0, KVM_RESET_DIRTY_RINGS, 0) };
        done(result)
    }
}

/// Converts the result of an ioctl. A positive number is a success.
fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
