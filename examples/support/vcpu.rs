//! The vCPU of a guest, and its program.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::{Memory, Result};

const CODE: u64 = 0x1000;
const PORT: u16 = 0x10;

/// 16-bit code at [`CODE`]: increments a byte in each of eight pages, again and again.
const PROGRAM: [u8; 19] = [
    0xbb, 0x00, 0x40, //       start: mov bx, 0x4000
    0xfe, 0x07, //             next:  inc byte [bx]
    0x81, 0xc3, 0x00, 0x10, //        add bx, 0x1000
    0x81, 0xfb, 0x00, 0xc0, //        cmp bx, 0xc000
    0x72, 0xf4, //                    jb next
    0xe6, 0x10, //                    out 0x10, al
    0xeb, 0xed, //                    jmp start
];

/// Writes the program to guest memory, and sets the registers to its start.
#[cfg(target_arch = "x86_64")]
pub(crate) fn load(vcpu: &VcpuFd, memory: &Memory) -> Result<()> {
    memory.write_slice(&PROGRAM, GuestAddress(CODE))?;

    let mut special = vcpu.get_sregs()?;
    (special.cs.base, special.cs.selector) = (0, 0);
    vcpu.set_sregs(&special)?;

    let mut registers = vcpu.get_regs()?;
    (registers.rip, registers.rflags) = (CODE, 2);
    vcpu.set_regs(&registers)?;
    Ok(())
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn load(_: &VcpuFd, _: &Memory) -> Result<()> {
    Err("the program is x86_64 code".into())
}

/// Runs the vCPU until `stop` is set. Returns the number of passes over its pages.
///
/// The memory of its slots outlives the vCPU: arguments are dropped from the last to the first.
pub(crate) fn run(_memory: Arc<Memory>, mut vcpu: VcpuFd, stop: &AtomicBool) -> u64 {
    let mut passes = 0;
    loop {
        match vcpu.run() {
            // The program writes to the port after each pass.
            Ok(VcpuExit::IoOut(PORT, _)) => passes += 1,
            end => panic!("the vCPU ended: {end:?}"),
        }
        if stop.load(Ordering::Acquire) {
            return passes;
        }
    }
}
