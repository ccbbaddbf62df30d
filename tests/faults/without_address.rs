//! A fault without an address returns an error, and the bytes before it are counted by repetition.
//! SIGILL of other code has its former effect.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

use super::previous::set_action;
use super::processes::{run_to_end, DONE};
use super::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::fault::{self, Direction};
use vm_memory::Bytes;

type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

/// The handler of the crate, and the signal and code that it receives in place of SIGSEGV.
static OURS: AtomicUsize = AtomicUsize::new(0);
static SIGNAL: AtomicI32 = AtomicI32::new(0);
static CODE: AtomicI32 = AtomicI32::new(0);

/// Calls the handler of the crate as for a fault of another signal, without an address.
///
/// A page without access stands for memory that another party protects.
extern "C" fn without_address(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let signal = SIGNAL.load(Ordering::Relaxed);
    // SAFETY: the kernel passes the information of the signal, which belongs to this handler.
    let fields = unsafe { &mut *info.cast::<[i32; 6]>() };
    *fields = [signal, 0, CODE.load(Ordering::Relaxed), 0, 0, 0];
    #[cfg(target_arch = "x86_64")]
    if fields[2] == 0x80 {
        // SAFETY: the kernel passes the context, which belongs to this handler.
        let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
        let exception = if signal == libc::SIGBUS { 12 } else { 13 };
        context.uc_mcontext.gregs[libc::REG_TRAPNO as usize] = exception;
    }
    // SAFETY: the handler of the crate has SA_SIGINFO, so it has this type.
    let ours = unsafe { std::mem::transmute::<usize, Handler>(OURS.load(Ordering::Relaxed)) };
    ours(signal, info, context);
}

/// Makes accesses across an edge whose faults have no address.
pub(super) fn protected_memory(arguments: &[&str]) {
    let (signal, code) = match arguments {
        // SI_KERNEL, after an exception of this processor that has no address.
        #[cfg(target_arch = "x86_64")]
        ["segv"] => (libc::SIGSEGV, 0x80),
        #[cfg(target_arch = "x86_64")]
        ["bus"] => (libc::SIGBUS, 0x80),
        // BUS_OBJERR
        ["object"] => (libc::SIGBUS, 3),
        // ILL_ILLOPN
        _ => (libc::SIGILL, 2),
    };
    fault::install().unwrap();
    let replaced = set_action(signal, libc::SIG_DFL, 0);
    OURS.store(replaced.sa_sigaction, Ordering::Relaxed);
    SIGNAL.store(signal, Ordering::Relaxed);
    CODE.store(code, Ordering::Relaxed);
    let handler: Handler = without_address;
    set_action(libc::SIGSEGV, handler as usize, libc::SA_SIGINFO);

    let (memory, _file) = shared(40);
    let bytes: Vec<u8> = (0..40 * PAGE).map(|i| (i % 251) as u8 + 1).collect();
    memory.write_slice(&bytes, BASE).unwrap();
    protect(&memory, 20, libc::PROT_NONE);
    check_counts(&memory, &bytes);
    check_single_accesses(&memory);
    check_copies_within(&memory);
    std::process::exit(DONE);
}

fn check_counts(memory: &Memory, bytes: &[u8]) {
    let edge = GuestAddress(BASE.0 + 20 * PAGE as u64);
    let host_edge = memory.get_host_address(edge).unwrap() as usize;
    for len in [1, 5, 16, 64, 100, 300, 5000, 70_000] {
        for inside in [0, 1, 2, 7, len / 3, len / 2, len - 1].map(|n| n.min(len - 1)) {
            let start = GuestAddress(edge.0 - inside as u64);
            let mut buf = vec![0; len];
            let check = |direction| {
                let last = fault::last().unwrap();
                assert_eq!(last.completed, inside, "{len}");
                assert_eq!(last.host_address, host_edge, "{len} {inside}");
                assert_eq!(
                    (last.guest_address, last.direction),
                    (Some(edge), direction)
                );
            };
            match memory.read(&mut buf, start) {
                Ok(count) => assert_eq!(count, inside),
                Err(error) => assert!(inside == 0 && is_efault(&error)),
            }
            check(Direction::Read);
            assert_eq!(buf[..inside], bytes[20 * PAGE - inside..20 * PAGE]);
            memory.find_region(BASE).unwrap().bitmap().reset();
            match memory.write(&bytes[20 * PAGE - inside..][..len], start) {
                Ok(count) => assert_eq!(count, inside),
                Err(error) => assert!(inside == 0 && is_efault(&error)),
            }
            check(Direction::Write);
            let first = 20 * PAGE - inside;
            for page in first / PAGE..=(first + len - 1) / PAGE {
                assert!(memory
                    .find_region(BASE)
                    .unwrap()
                    .bitmap()
                    .dirty_at(page * PAGE));
            }
            assert!(is_efault(&memory.read_slice(&mut buf, start).unwrap_err()));
            check(Direction::Read);
            // Each whole element before the edge counts.
            let (slice, elements) = (memory.get_slice(start, len).unwrap(), len / 4);
            let is_aligned = slice.ptr_guard().as_ptr().addr().is_multiple_of(4);
            if is_aligned && inside < elements * 4 {
                slice.copy_to(&mut vec![0u32; elements]);
                assert_eq!(fault::last().unwrap().completed, inside / 4 * 4);
            }
        }
    }
    // The bytes after the page are accessible.
    let after = GuestAddress(edge.0 + PAGE as u64);
    assert_eq!(memory.read_obj::<u8>(after).unwrap(), bytes[21 * PAGE]);
}

fn check_single_accesses(memory: &Memory) {
    let edge = GuestAddress(BASE.0 + 20 * PAGE as u64);
    let inside = GuestAddress(edge.0 + 8);
    let at_operand = |direction| {
        let last = fault::last().unwrap();
        assert_eq!(
            (last.guest_address, last.direction),
            (Some(inside), direction)
        );
        assert_eq!(last.completed, 0);
    };
    assert!(is_efault(
        &memory.load::<u32>(inside, Ordering::Acquire).unwrap_err()
    ));
    at_operand(Direction::Read);
    assert!(is_efault(
        &memory.store(1u64, inside, Ordering::SeqCst).unwrap_err()
    ));
    at_operand(Direction::Write);
    assert!(is_efault(&memory.write_obj(1u16, inside).unwrap_err()));
    at_operand(Direction::Write);
    let across = GuestAddress(edge.0 - 6);
    assert!(is_efault(&memory.read_obj::<[u8; 40]>(across).unwrap_err()));
    let last = fault::last().unwrap();
    assert_eq!((last.guest_address, last.completed), (Some(edge), 6));
}

fn check_copies_within(memory: &Memory) {
    let slice = |page: u64, len| memory.get_slice(GuestAddress(BASE.0 + page * PAGE as u64), len);
    // To the page, from the page, and overlapping.
    for (from, to, completed) in [(2, 19, PAGE), (19, 2, PAGE), (18, 19, 0)] {
        slice(from, 3 * PAGE)
            .unwrap()
            .copy_to_volatile_slice(slice(to, 3 * PAGE).unwrap());
        let last = fault::last().unwrap();
        assert_eq!(
            (last.completed, last.direction),
            (completed, Direction::Write)
        );
    }
}

#[test]
fn access_to_protected_memory_without_address_counts_bytes_before_it() {
    let of_processor: &[_] = if cfg!(target_arch = "x86_64") {
        &["segv", "bus"]
    } else {
        &[]
    };
    for signal in of_processor.iter().chain(&["object", "ill"]) {
        run_to_end(&format!("protected_memory {signal}"));
    }
}

/// The processor raises a general protection fault.
#[cfg(target_arch = "x86_64")]
#[test]
fn access_to_address_that_is_not_canonical_returns_efault() {
    use vm_memory::{VolatileMemory, VolatileMemoryError, VolatileSlice};

    fault::install().unwrap();
    let start = 1usize << 63;
    for len in [1, 2, 4, 8, 16, 40, 64, 100, 300, 5000, 100_000] {
        let host = std::ptr::without_provenance_mut(start);
        // SAFETY: the slice is not memory. But no access to it has another effect than the fault.
        let slice = unsafe { VolatileSlice::new(host, len) };
        let check = |result: Result<(), VolatileMemoryError>, direction| {
            let VolatileMemoryError::IOError(error) = result.unwrap_err() else {
                panic!("another error");
            };
            assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
            let last = fault::last().unwrap();
            assert_eq!((last.host_address, last.completed), (start, 0));
            assert_eq!(last.direction, direction);
        };
        let mut buf = vec![0; len];
        check(slice.read_slice(&mut buf, 0), Direction::Read);
        check(slice.read(&mut buf, 0).map(drop), Direction::Read);
        check(slice.write_slice(&buf, 0), Direction::Write);
        check(slice.fill_with_byte(1), Direction::Write);
        check(slice.read_obj::<u8>(0).map(drop), Direction::Read);
        check(slice.write_obj(1u8, 0), Direction::Write);
        if len >= 64 {
            check(slice.read_obj::<[u64; 8]>(0).map(drop), Direction::Read);
            check(slice.write_obj([1u32; 16], 0), Direction::Write);
            check(
                slice.load::<u64>(0, Ordering::SeqCst).map(drop),
                Direction::Read,
            );
            let copied = slice.get_array_ref::<u32>(0, 16).unwrap();
            copied.copy_to(&mut [0; 16]);
            assert_eq!(fault::last().unwrap().completed, 0);
        }
    }
}

/// The first two bytes of this page are an illegal instruction, and the next one returns.
static INSTRUCTION: AtomicUsize = AtomicUsize::new(0);
static CALLS: AtomicUsize = AtomicUsize::new(0);
static IS_ON_ALTERNATE_STACK: AtomicBool = AtomicBool::new(false);

const UD2: [u8; 2] = [0x0f, 0x0b];
const NOP: [u8; 2] = [0x66, 0x90];

fn put_instruction(bytes: [u8; 2]) {
    let page = INSTRUCTION.load(Ordering::Relaxed) as *mut [u8; 2];
    // SAFETY: the page is writable, and only this thread uses it.
    unsafe { page.write_volatile(bytes) };
}

/// Replaces the illegal instruction.
extern "C" fn replace_instruction(_: i32) {
    CALLS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: zeroes are a valid `stack_t`.
    let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
    // SAFETY: `stack` is valid for writes.
    unsafe { libc::sigaltstack(std::ptr::null(), &mut stack) };
    IS_ON_ALTERNATE_STACK.store(stack.ss_flags & libc::SS_ONSTACK != 0, Ordering::Relaxed);
    put_instruction(NOP);
}

extern "C" fn replace_with_info(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes the information of the signal.
    let info = unsafe { &*info };
    // SAFETY: SIGILL has the address of the instruction. It is 0 or another number if it was sent.
    let address = unsafe { info.si_addr() } as usize;
    let page = INSTRUCTION.load(Ordering::Relaxed);
    if signal == libc::SIGILL && (info.si_code <= 0 || address == page) {
        replace_instruction(signal);
    }
}

/// Executes an illegal instruction outside of the access routines. The argument names the action of
/// SIGILL before [`fault::install`].
pub(super) fn illegal_instruction(arguments: &[&str]) {
    let plain: extern "C" fn(i32) = replace_instruction;
    let with_info: Handler = replace_with_info;
    let (handler, flags) = match arguments {
        ["default"] => (libc::SIG_DFL, 0),
        ["ignored"] => (libc::SIG_IGN, 0),
        ["plain"] => (plain as usize, 0),
        ["once"] => (plain as usize, libc::SA_RESETHAND),
        ["onstack"] => (with_info as usize, libc::SA_SIGINFO | libc::SA_ONSTACK),
        _ => (with_info as usize, libc::SA_SIGINFO),
    };
    set_action(libc::SIGILL, handler, flags);
    fault::install().unwrap();
    // SAFETY: makes a new mapping, at an address that the system chooses.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(page, libc::MAP_FAILED);
    INSTRUCTION.store(page as usize, Ordering::Relaxed);
    // SAFETY: the page is new. The third byte is `ret`.
    unsafe { page.cast::<u8>().wrapping_add(2).write(0xc3) };
    // SAFETY: the page contains a function without arguments that returns.
    let function = unsafe { std::mem::transmute::<*mut libc::c_void, extern "C" fn()>(page) };
    if arguments == ["ignored"] {
        // SAFETY: sends a signal to this thread.
        unsafe { libc::raise(libc::SIGILL) };
    }
    let (memory, file) = shared(1);
    file.set_len(0).unwrap();
    for call in 1..=if arguments == ["once"] { 1 } else { 3 } {
        assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
        put_instruction(UD2);
        println!("before the instruction");
        function();
        assert_eq!(CALLS.load(Ordering::Relaxed), call);
        let is_on_alternate_stack = IS_ON_ALTERNATE_STACK.load(Ordering::Relaxed);
        assert_eq!(is_on_alternate_stack, flags & libc::SA_ONSTACK != 0);
    }
    if arguments == ["once"] {
        put_instruction(UD2);
        function();
    }
    // SAFETY: sends a signal to this thread.
    unsafe { libc::raise(libc::SIGILL) };
    assert_eq!(CALLS.load(Ordering::Relaxed), 4);
    std::process::exit(DONE);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn illegal_instruction_in_other_code_has_former_effect() {
    use super::processes::run;
    use std::os::unix::process::ExitStatusExt;

    for action in ["plain", "info", "onstack"] {
        run_to_end(&format!("illegal_instruction {action}"));
    }
    for action in ["default", "ignored", "once"] {
        let output = run(&format!("illegal_instruction {action}"));
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(printed.contains("before the instruction"), "{output:?}");
        assert_eq!(output.status.signal(), Some(libc::SIGILL), "{output:?}");
    }
}
