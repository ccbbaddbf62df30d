//! A vCPU that the driver controls.
//!
//! The guest is a short program that performs accesses for the driver. The driver writes them to a
//! mailbox in guest memory, and waits until the vCPU has performed them. Register accesses cause VM
//! exits, which the devices handle. Writes to memory appear in KVM's dirty log, like those of any
//! guest.
//!
//! ```text
//!   mailbox  +0x0000  number of the batch, written by the driver
//!            +0x0008  number of the last batch that the vCPU has performed
//!            +0x0010  operation
//!            +0x0018  number of accesses
//!            +0x1000  accesses: address and value of each
//! ```

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm::bus::DEBUG_EXIT;
use microvm::dirty::SlotLog;
use microvm::kvm::{Entry, Slots};
use microvm::memory::{pages, GuestRam};
use vm_memory::dirty::DirtyMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::plug::Processor;
use crate::processor::Cpu;
use crate::Error;

/// The guest address of the program.
pub const PROGRAM: u64 = 0x10_0000;
const MAILBOX: u64 = 0x14_0000;
const ACCESSES: u64 = MAILBOX + 0x1000;
/// The number of accesses that the mailbox can hold.
const BATCH: usize = 256;
/// The time within which the vCPU must perform a batch.
const BATCH_TIMEOUT: Duration = Duration::from_secs(60);

const LOAD: u64 = 0;
const STORE: u64 = 1;
const READ_REGISTER: u64 = 2;
const WRITE_REGISTER: u64 = 3;
const EXIT: u64 = 4;

microvm::guest_program!(
    "e2e_guest_start",
    "e2e_guest_end",
    [
        "    mov rbx, rdi",
        "    xor ecx, ecx",
        ".Le2e_wait:",
        "    pause",
        "    mov rax, [rbx]",
        "    cmp rax, rcx",
        "    je .Le2e_wait",
        "    mov rcx, rax",
        "    mov rsi, [rbx + 0x10]",
        "    mov r8, [rbx + 0x18]",
        "    lea rdi, [rbx + 0x1000]",
        ".Le2e_access:",
        "    mov rdx, [rdi]",
        "    mov rax, [rdi + 8]",
        "    cmp esi, {store}",
        "    je .Le2e_store",
        "    ja .Le2e_register",
        "    mov rax, [rdx]",
        "    mov [rdi + 8], rax",
        "    jmp .Le2e_next",
        ".Le2e_store:",
        "    mov [rdx], rax",
        "    jmp .Le2e_next",
        ".Le2e_register:",
        "    cmp esi, {write}",
        "    je .Le2e_write",
        "    ja .Le2e_exit",
        "    mov eax, [rdx]",
        "    mov [rdi + 8], rax",
        "    jmp .Le2e_next",
        ".Le2e_write:",
        "    mov [rdx], eax",
        ".Le2e_next:",
        "    add rdi, 16",
        "    dec r8",
        "    jnz .Le2e_access",
        "    mov [rbx + 8], rcx",
        "    jmp .Le2e_wait",
        ".Le2e_exit:",
        "    mov edx, {exit_port}",
        "    xor eax, eax",
        "    out dx, al",
        "    hlt",
    ],
    store = const STORE,
    write = const WRITE_REGISTER,
    exit_port = const DEBUG_EXIT,
);

/// A vCPU that performs the accesses in its mailbox.
pub struct Vcpu {
    /// A mapping of the guest's memory, without memory that is plugged later.
    memory: GuestRam,
    batch: u64,
}

impl Vcpu {
    /// Loads the program. `memory` is a mapping of the guest's memory.
    ///
    /// # Errors
    ///
    /// Returns an error if guest memory is too small.
    pub fn load(memory: GuestRam) -> Result<(Self, Entry), Error> {
        memory
            .write_slice(program(), GuestAddress(PROGRAM))
            .map_err(Error::other)?;
        memory
            .write_slice(&[0; 0x20], GuestAddress(MAILBOX))
            .map_err(Error::other)?;
        let entry = Entry::Long {
            rip: PROGRAM,
            rsp: 0,
            arguments: [MAILBOX, 0],
        };
        Ok((Self { memory, batch: 0 }, entry))
    }

    /// Makes the vCPU perform accesses, and stores the loaded values in `accesses`.
    fn perform(&mut self, operation: u64, accesses: &mut [(u64, u64)]) -> Result<(), Error> {
        for batch in accesses.chunks_mut(BATCH) {
            self.perform_batch(operation, batch)?;
        }
        Ok(())
    }

    fn perform_batch(&mut self, operation: u64, batch: &mut [(u64, u64)]) -> Result<(), Error> {
        let memory = &self.memory;
        let write = |at: u64, word: u64| memory.write_obj(word, GuestAddress(at));
        let slots = |n: usize| [ACCESSES + 16 * n as u64, ACCESSES + 16 * n as u64 + 8];
        for (n, &(addr, value)) in batch.iter().enumerate() {
            let [addr_at, value_at] = slots(n);
            write(addr_at, addr)
                .and(write(value_at, value))
                .map_err(Error::other)?;
        }
        write(MAILBOX + 0x10, operation).map_err(Error::other)?;
        write(MAILBOX + 0x18, batch.len() as u64).map_err(Error::other)?;
        self.batch += 1;
        let number = memory.store(self.batch, GuestAddress(MAILBOX), Ordering::Release);
        number.map_err(Error::other)?;
        if operation == EXIT {
            return Ok(());
        }
        let start = Instant::now();
        let done = GuestAddress(MAILBOX + 8);
        while memory
            .load::<u64>(done, Ordering::Acquire)
            .map_err(Error::other)?
            != self.batch
        {
            if start.elapsed() > BATCH_TIMEOUT {
                return Err(Error::other("the vCPU does not perform the accesses"));
            }
            std::thread::yield_now();
        }
        for (n, (_, value)) in batch.iter_mut().enumerate() {
            let [_, value_at] = slots(n);
            *value = memory
                .read_obj(GuestAddress(value_at))
                .map_err(Error::other)?;
        }
        Ok(())
    }
}

impl Cpu for Vcpu {
    fn load(&mut self, words: &mut [(u64, u64)]) -> Result<(), Error> {
        self.perform(LOAD, words)
    }

    fn store(&mut self, words: &[(u64, u64)]) -> Result<(), Error> {
        self.perform(STORE, &mut words.to_vec())
    }

    fn read_register(&mut self, addr: u64) -> Result<u32, Error> {
        let mut access = [(addr, 0)];
        self.perform(READ_REGISTER, &mut access)?;
        Ok(access[0].1 as u32)
    }

    fn write_register(&mut self, addr: u64, value: u32) -> Result<(), Error> {
        self.perform(WRITE_REGISTER, &mut [(addr, value.into())])
    }
}

/// Makes the guest program exit.
impl Drop for Vcpu {
    fn drop(&mut self) {
        let _ = self.perform(EXIT, &mut [(0, 0)]);
    }
}

/// The memory slot of a region that is plugged.
pub struct PluggedSlot {
    slots: Arc<Slots>,
    one: Option<Arc<GuestRam>>,
}

impl PluggedSlot {
    /// Creates a slot without a region, for a guest that has `slots`.
    pub fn new(slots: Arc<Slots>) -> Self {
        Self { slots, one: None }
    }
}

impl Processor for PluggedSlot {
    fn add(&mut self, one: &GuestRam) -> Result<(), Error> {
        let one = Arc::new(one.clone());
        self.slots.add(&one)?;
        self.one = Some(one);
        Ok(())
    }

    fn set_blocks(&mut self, _: u64, _: u64, _: bool, _: &mut BTreeSet<u64>) -> Result<(), Error> {
        // The slot contains the whole region. An unplugged block reads as zeroes.
        Ok(())
    }

    fn remove(&mut self, dirty: &mut BTreeSet<u64>) -> Result<(), Error> {
        let one = self.one.take().ok_or_else(|| Error::other("no region"))?;
        dirty.extend(logged(&one, &self.slots.remove(&one)?));
        Ok(())
    }
}

/// Returns the pages in KVM's log of some slots of `ram`.
pub fn logged(ram: &GuestRam, logs: &[SlotLog]) -> BTreeSet<u64> {
    let mut dirty = DirtyMemory::new();
    for log in logs {
        dirty.add_log(ram, &log.words());
    }
    pages(&dirty)
}
