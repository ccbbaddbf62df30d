//! The processor on which the driver runs: a thread, or a vCPU that it controls.

use std::sync::mpsc::{sync_channel, Receiver, SyncSender};

use microvm::bus::Bus;
use microvm::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

use crate::Error;

/// The accesses of a driver that the tests observe: to device registers, and to the words of its
/// pattern.
pub trait Cpu: Send {
    /// Reads words of guest memory. Stores the word at each address in the second field of its
    /// pair.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no memory.
    fn load(&mut self, words: &mut [(u64, u64)]) -> Result<(), Error>;

    /// Writes words of guest memory: pairs of address and word.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no memory.
    fn store(&mut self, words: &[(u64, u64)]) -> Result<(), Error>;

    /// Reads a device register.
    ///
    /// # Errors
    ///
    /// Returns an error if the processor has stopped.
    fn read_register(&mut self, addr: u64) -> Result<u32, Error>;

    /// Writes a device register.
    ///
    /// # Errors
    ///
    /// Returns an error if the processor has stopped.
    fn write_register(&mut self, addr: u64, value: u32) -> Result<(), Error>;
}

/// The number of register writes in flight, as posted writes on a bus.
const POSTED: usize = 16;

enum Access {
    Write(u64, u32),
    Read(u64),
}

/// A thread with a mapping of guest memory. Another thread ([`Devices`]) handles its accesses to
/// registers. The processor does not wait for writes: it polls the used ring while the device
/// works.
pub struct ThreadCpu {
    view: GuestMemoryAtomic<GuestRam>,
    accesses: SyncSender<Access>,
    values: Receiver<u32>,
}

/// The other end of a [`ThreadCpu`].
pub struct Devices {
    accesses: Receiver<Access>,
    values: SyncSender<u32>,
}

/// Creates a processor that accesses memory through `view`.
pub fn thread(view: GuestMemoryAtomic<GuestRam>) -> (ThreadCpu, Devices) {
    let (to_devices, accesses) = sync_channel(POSTED);
    let (to_cpu, values) = sync_channel(1);
    let cpu = ThreadCpu {
        view,
        accesses: to_devices,
        values,
    };
    (
        cpu,
        Devices {
            accesses,
            values: to_cpu,
        },
    )
}

impl Devices {
    /// Handles the accesses until the processor is dropped.
    pub fn run(self, bus: &mut Bus) {
        for access in self.accesses {
            match access {
                Access::Write(addr, value) => bus.mmio_write(addr, &value.to_le_bytes()),
                Access::Read(addr) => {
                    let mut data = [0; 4];
                    bus.mmio_read(addr, &mut data);
                    // The processor waits for the value, so the receiver exists.
                    let _ = self.values.send(u32::from_le_bytes(data));
                }
            }
        }
    }
}

impl Cpu for ThreadCpu {
    fn load(&mut self, words: &mut [(u64, u64)]) -> Result<(), Error> {
        let memory = self.view.memory();
        for (addr, word) in words {
            *word = memory.read_obj(GuestAddress(*addr)).map_err(Error::other)?;
        }
        Ok(())
    }

    fn store(&mut self, words: &[(u64, u64)]) -> Result<(), Error> {
        let memory = self.view.memory();
        let mut words = words.iter();
        words
            .try_for_each(|&(addr, word)| memory.write_obj(word, GuestAddress(addr)))
            .map_err(Error::other)
    }

    fn read_register(&mut self, addr: u64) -> Result<u32, Error> {
        self.accesses
            .send(Access::Read(addr))
            .map_err(Error::other)?;
        self.values.recv().map_err(Error::other)
    }

    fn write_register(&mut self, addr: u64, value: u32) -> Result<(), Error> {
        self.accesses
            .send(Access::Write(addr, value))
            .map_err(Error::other)
    }
}
