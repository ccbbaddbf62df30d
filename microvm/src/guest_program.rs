//! The built-in guest: a 64-bit program in assembly, assembled by rustc and carried as bytes.
//!
//! It is position independent, uses plain integer instructions only (a nested KVM may emulate it),
//! and does step by step what [`crate::driver`] does in Rust: [`crate::plan`] says what. On entry RDI
//! holds the address of the parameters, and RSP the top of the stack.
//!
//! Its text is `guest_program.s`.

use std::arch::global_asm;

use virtio_bindings::virtio_blk::VIRTIO_BLK_S_IOERR;
use virtio_bindings::virtio_mmio as reg;

use crate::bus::DEBUG_EXIT;
use crate::plan::{
    op, param, pass, result, step, BAD_TYPE, CHUNK_SECTORS, HALF, PATTERN_STEP, PLUG_WORD,
    QUEUE_SIZE, RESULTS, SECTOR, SLOTS,
};
use crate::plug::{command, reg as plug_reg, status, MAGIC as PLUG_MAGIC};
use crate::serial::COM1;
use crate::virtio_mmio::{MAGIC, VERSION};

global_asm!(
    include_str!("guest_program.s"),
    p_seed = const param::SEED * 8,
    p_mix = const param::MIX * 8,
    p_mmio = const param::MMIO * 8,
    p_areas = const param::AREAS * 8,
    p_desc = const param::DESC * 8,
    p_avail = const param::AVAIL * 8,
    p_used = const param::USED * 8,
    p_requests = const param::REQUESTS * 8,
    p_capacity = const param::CAPACITY * 8,
    p_sum = const param::SUM * 8,
    p_stamp_from = const param::STAMP_FROM * 8,
    p_hole = const param::HOLE * 8,
    p_pass_count = const param::PASS_COUNT * 8,
    p_passes = const param::PASSES * 8,
    p_plug = const param::PLUG * 8,
    p_plug_pass = const param::PLUG_PASS * 8,
    pass_len = const pass::WORDS * 8,
    pass_words = const pass::WORDS,
    w_type = const pass::TYPE * 8,
    w_sector = const pass::SECTOR * 8,
    w_chunks = const pass::CHUNKS * 8,
    w_low = const pass::LOW * 8,
    w_low_stride = const pass::LOW_STRIDE * 8,
    w_high = const pass::HIGH * 8,
    w_high_stride = const pass::HIGH_STRIDE * 8,
    w_before = const pass::BEFORE * 8,
    w_after = const pass::AFTER * 8,
    w_may_fail = const pass::MAY_FAIL * 8,
    op_none = const op::NONE,
    op_wipe = const op::WIPE,
    op_compare = const op::COMPARE,
    op_sum = const op::SUM,
    results = const RESULTS,
    r_step = const result::STEP * 8,
    r_where = const result::WHERE * 8,
    r_want = const result::WANT * 8,
    r_got = const result::GOT * 8,
    r_pages = const result::PAGES * 8,
    r_requests = const result::REQUESTS * 8,
    r_failed = const result::FAILED * 8,
    r_plugged = const result::PLUGGED * 8,
    s_done = const step::DONE,
    s_memory = const step::MEMORY,
    s_virtio = const step::VIRTIO,
    s_queue = const step::QUEUE,
    s_status = const step::STATUS,
    s_read = const step::READ,
    s_write = const step::WRITE,
    s_plug = const step::PLUG,
    plug_magic = const PLUG_MAGIC,
    plug_word = const PLUG_WORD,
    plug_magic_reg = const plug_reg::MAGIC,
    plug_status = const plug_reg::STATUS,
    plug_command = const plug_reg::COMMAND,
    plug_blocks = const plug_reg::BLOCKS,
    plug_address = const plug_reg::ADDRESS,
    plug_size = const plug_reg::SIZE,
    plug_block_size = const plug_reg::BLOCK_SIZE,
    plug_come = const command::PLUG,
    plug_go = const command::UNPLUG,
    plug_there = const status::PLUGGED,
    plug_none = const status::NONE,
    pattern_step = const PATTERN_STEP,
    queue_size = const QUEUE_SIZE,
    slots = const SLOTS,
    chunk = const 2 * HALF,
    chunk_sectors = const CHUNK_SECTORS,
    chunk_shift = const CHUNK_SECTORS.trailing_zeros(),
    sector_words = const SECTOR / 8,
    half = const HALF,
    half_words = const HALF / 8,
    bad_type = const BAD_TYPE,
    io_error = const VIRTIO_BLK_S_IOERR,
    magic = const MAGIC,
    version = const VERSION,
    com1 = const COM1,
    debug_exit = const DEBUG_EXIT,
    magic_value = const reg::VIRTIO_MMIO_MAGIC_VALUE,
    version_reg = const reg::VIRTIO_MMIO_VERSION,
    device_id = const reg::VIRTIO_MMIO_DEVICE_ID,
    device_features = const reg::VIRTIO_MMIO_DEVICE_FEATURES,
    device_features_sel = const reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    driver_features = const reg::VIRTIO_MMIO_DRIVER_FEATURES,
    driver_features_sel = const reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    queue_sel = const reg::VIRTIO_MMIO_QUEUE_SEL,
    queue_num = const reg::VIRTIO_MMIO_QUEUE_NUM,
    queue_ready = const reg::VIRTIO_MMIO_QUEUE_READY,
    queue_notify = const reg::VIRTIO_MMIO_QUEUE_NOTIFY,
    interrupt_status = const reg::VIRTIO_MMIO_INTERRUPT_STATUS,
    interrupt_ack = const reg::VIRTIO_MMIO_INTERRUPT_ACK,
    status = const reg::VIRTIO_MMIO_STATUS,
    queue_desc = const reg::VIRTIO_MMIO_QUEUE_DESC_LOW,
    queue_avail = const reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    queue_used = const reg::VIRTIO_MMIO_QUEUE_USED_LOW,
    config = const reg::VIRTIO_MMIO_CONFIG,
);

extern "C" {
    #[link_name = "microvm_guest_start"]
    static START: u8;
    #[link_name = "microvm_guest_end"]
    static END: u8;
}

/// The program's bytes, to be copied to any address.
pub fn bytes() -> &'static [u8] {
    let (start, end) = (&raw const START, &raw const END);
    let len = end.addr() - start.addr();
    #[expect(
        clippy::disallowed_methods,
        reason = "read-only data of this binary, not guest memory"
    )]
    // SAFETY: 1. `start` and `end` are labels of one section of this binary, in this order, with
    //    nothing between them but what the block above puts there: `len` bytes from `start` on are
    //    in one allocation, initialized, and far fewer than `isize::MAX`.
    // 2. The section is read-only data, so nobody writes to it, and it lives as long as the process.
    // 3. `u8` has no alignment and no invalid value.
    unsafe {
        std::slice::from_raw_parts(start, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{PROGRAM, STACK_TOP};

    #[test]
    fn the_program_fits_below_its_stack() {
        let program = bytes();
        assert!(program.len() > 500);
        assert!(PROGRAM + (program.len() as u64) < STACK_TOP - 4096);
        // mov rbx, rdi
        assert_eq!(program[..3], [0x48, 0x89, 0xfb]);
        assert!(program.ends_with(b"still as written\n\0"));
    }
}
