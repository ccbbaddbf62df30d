//! The bus: dispatches I/O ports and MMIO addresses to the devices, counts the accesses, and
//! defines the interrupt lines.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::serial::{SerialPort, COM1};

/// A byte written to this port ends the run. It is the guest's exit code.
pub const DEBUG_EXIT: u16 = 0xf4;
/// The command port of the keyboard controller, and its command to reset the machine.
const KEYBOARD_RESET: (u16, u8) = (0x64, 0xfe);
/// The reset register of the chipset, and the value that resets the machine.
const CHIPSET_RESET: (u16, u8) = (0xcf9, 0x06);
/// The data port of the real-time clock. All ones would mean an update that never ends.
const CMOS_DATA: u16 = 0x71;

/// A device with memory-mapped registers.
pub trait MmioDevice: Send {
    /// Reads `data.len()` bytes at `offset` from the start of the device's range.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` from the start of the device's range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device that the bus shares with its owner.
pub type SharedDevice = Arc<Mutex<dyn MmioDevice>>;

/// The number of accesses that left the guest, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Exits {
    /// Bytes to or from the serial port.
    pub serial: u64,
    /// Reads of device registers.
    pub mmio_read: u64,
    /// Writes to device registers.
    pub mmio_write: u64,
    /// Accesses without a device.
    pub unassigned: u64,
}

/// An interrupt line. KVM injects the interrupt if the event is registered as an irqfd.
#[derive(Debug)]
pub struct Interrupt(pub EventFd);

impl Interrupt {
    /// Creates an interrupt line.
    ///
    /// # Errors
    ///
    /// Returns an error if the process has no free descriptor.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK).map(Self)
    }
}

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The devices of a machine.
pub struct Bus {
    serial: Arc<Mutex<SerialPort>>,
    mmio: Vec<(Range<u64>, SharedDevice)>,
    /// The number of accesses so far.
    pub exits: Exits,
    /// The exit code of a guest that has ended the run. A reset is 0.
    pub ended: Option<u8>,
}

impl Bus {
    /// Creates a bus that has only a serial port.
    pub fn new(serial: Arc<Mutex<SerialPort>>) -> Self {
        Self {
            serial,
            mmio: Vec::new(),
            exits: Exits::default(),
            ended: None,
        }
    }

    /// Maps `device` at a range of guest addresses.
    pub fn map(&mut self, range: Range<u64>, device: SharedDevice) {
        self.mmio.push((range, device));
    }

    /// Handles an `out` instruction: one byte, or several of a string instruction.
    pub fn port_out(&mut self, port: u16, data: &[u8]) {
        for &byte in data {
            match port {
                COM1.. if port - COM1 < 8 => {
                    self.exits.serial += 1;
                    // The only failure is an event that cannot be signalled.
                    let _ = lock(&self.serial).write((port - COM1) as u8, byte);
                }
                DEBUG_EXIT => self.ended = Some(byte),
                _ if [KEYBOARD_RESET, CHIPSET_RESET].contains(&(port, byte)) => {
                    self.ended = Some(0);
                }
                _ => self.exits.unassigned += 1,
            }
        }
    }

    /// Handles an `in` instruction. A port without a device reads as ones.
    pub fn port_in(&mut self, port: u16, data: &mut [u8]) {
        for byte in data {
            if (COM1..COM1 + 8).contains(&port) {
                self.exits.serial += 1;
                *byte = lock(&self.serial).read((port - COM1) as u8);
            } else {
                self.exits.unassigned += 1;
                *byte = if port == CMOS_DATA { 0 } else { 0xff };
            }
        }
    }

    /// Handles a read of an address that is not RAM. An address without a device reads as ones.
    pub fn mmio_read(&mut self, addr: u64, data: &mut [u8]) {
        match self.device(addr) {
            Some((offset, device)) => {
                lock(device).read(offset, data);
                self.exits.mmio_read += 1;
            }
            None => {
                data.fill(0xff);
                self.exits.unassigned += 1;
            }
        }
    }

    /// Handles a write to an address that is not RAM.
    pub fn mmio_write(&mut self, addr: u64, data: &[u8]) {
        match self.device(addr) {
            Some((offset, device)) => {
                lock(device).write(offset, data);
                self.exits.mmio_write += 1;
            }
            None => self.exits.unassigned += 1,
        }
    }

    fn device(&self, addr: u64) -> Option<(u64, &Mutex<dyn MmioDevice>)> {
        let (range, device) = self.mmio.iter().find(|(range, _)| range.contains(&addr))?;
        Some((addr - range.start, &**device))
    }
}

/// Locks a device. Ignores poisoning: a device stays usable after a thread panics.
pub fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serial;

    #[test]
    fn bus_without_device_reads_ones_and_counts() {
        let serial = Arc::new(Mutex::new(serial::new(false).unwrap()));
        let mut bus = Bus::new(Arc::clone(&serial));
        let mut data = [0; 4];
        bus.mmio_read(0xd000_0000, &mut data);
        bus.mmio_write(0xd000_0000, &data);
        bus.port_in(0x80, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.port_in(CMOS_DATA, &mut data[..1]);
        assert_eq!(data[0], 0);
        bus.port_out(COM1, b"hi\n");
        assert_eq!(lock(&serial).writer().text, b"hi\n");
        let exits = Exits {
            serial: 3,
            unassigned: 7,
            ..Exits::default()
        };
        assert_eq!(bus.exits, exits);
    }

    #[test]
    fn port_out_to_reset_or_exit_port_ends_the_run() {
        for (port, byte, code) in [(0x64, 0xfe, 0), (0xcf9, 0x06, 0), (DEBUG_EXIT, 3, 3)] {
            let serial = serial::new(false).unwrap();
            let mut bus = Bus::new(Arc::new(Mutex::new(serial)));
            bus.port_out(port, &[0x01]);
            assert_eq!(bus.ended.is_some(), port == DEBUG_EXIT);
            bus.port_out(port, &[byte]);
            assert_eq!(bus.ended, Some(code));
        }
    }
}
