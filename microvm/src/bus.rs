//! What a guest reaches outside its memory: I/O ports and MMIO registers, with a count of every
//! access.

use std::io::Write;

use vm_memory::GuestMemoryAtomic;

use crate::block::Block;
use crate::iommu::DeviceMemory;
use crate::plug::{Plug, PLUG_MMIO, PLUG_MMIO_LEN};
use crate::serial::{Serial, COM1, COM1_LEN};
use crate::virtio_mmio::VirtioMmio;

/// Where the registers of the block device lie, in the 32-bit hole.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// How many bytes they take.
pub const VIRTIO_MMIO_LEN: u64 = 0x1000;
/// A byte written here ends the run; it is the guest's exit code.
pub const DEBUG_EXIT: u16 = 0xf4;
/// The keyboard controller's command port, through which a kernel resets the machine.
const KEYBOARD: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
/// The chipset's reset register.
const RESET: u16 = 0xcf9;
const RESET_NOW: u8 = 1 << 2;
/// Data of the real-time clock: zero, since all ones would mean that it is being set forever.
const CMOS_DATA: u16 = 0x71;

/// Accesses by kind: exits of a vCPU, or calls of the driver thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exits {
    /// Bytes written to the serial port.
    pub serial_out: u64,
    /// Reads of the serial port.
    pub serial_in: u64,
    /// Other ports, either way.
    pub other_ports: u64,
    /// Reads of the block device's registers.
    pub mmio_read: u64,
    /// Writes to the block device's registers, notifications included.
    pub mmio_write: u64,
    /// Registers of the device that memory comes by, either way.
    pub plug: u64,
    /// MMIO where nothing is.
    pub mmio_nowhere: u64,
    /// Writes to the debug-exit port.
    pub debug_exit: u64,
    /// HLT.
    pub halt: u64,
    /// Anything else that ended or interrupted the vCPU.
    pub other: u64,
}

impl Exits {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.rows().iter().map(|row| row.1).sum()
    }

    /// Name and count of every kind.
    pub fn rows(&self) -> [(&'static str, u64); 10] {
        [
            ("serial port, byte out", self.serial_out),
            ("serial port, in", self.serial_in),
            ("virtio-mmio, write", self.mmio_write),
            ("virtio-mmio, read", self.mmio_read),
            ("memory device", self.plug),
            ("other I/O ports", self.other_ports),
            ("MMIO where nothing is", self.mmio_nowhere),
            ("debug exit", self.debug_exit),
            ("halt", self.halt),
            ("others", self.other),
        ]
    }
}

/// What the terminal shows of the guest's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Console {
    /// Each line behind a margin, for the built-in guest.
    Margin,
    /// The bytes as they come, for a kernel.
    Raw,
}

/// The devices of a machine.
#[derive(Debug)]
pub struct Bus<M: DeviceMemory> {
    /// The first serial port.
    pub serial: Serial,
    /// The block device; a kernel that was given no disk has none.
    pub block: Option<VirtioMmio<M>>,
    /// The device that memory comes by, with `--plug`.
    pub plug: Option<Plug>,
    /// Accesses so far.
    pub exits: Exits,
    /// The exit code of a guest that has ended the run; 0 for a reset.
    pub ended: Option<u8>,
    console: Console,
}

impl<M: DeviceMemory + 'static> Bus<M> {
    /// Devices over guest memory `mem`.
    ///
    /// # Errors
    ///
    /// That of [`VirtioMmio::new`].
    pub fn new(
        mem: GuestMemoryAtomic<M>,
        block: Option<Block>,
        console: Console,
    ) -> Result<Self, virtio_queue::Error> {
        let block = block.map(|block| VirtioMmio::new(mem, block)).transpose()?;
        let (serial, exits) = (Serial::default(), Exits::default());
        Ok(Self {
            serial,
            block,
            plug: None,
            exits,
            ended: None,
            console,
        })
    }

    /// The guest writes `data`, one or more single bytes, to a port.
    pub fn port_out(&mut self, port: u16, data: &[u8]) {
        for &byte in data {
            match (port, byte) {
                (COM1.., _) if port - COM1 < COM1_LEN => {
                    self.exits.serial_out += 1;
                    self.serial.write(port - COM1, byte);
                    self.drain_console(false);
                }
                (DEBUG_EXIT, code) => {
                    self.exits.debug_exit += 1;
                    self.ended = Some(code);
                }
                (KEYBOARD, KEYBOARD_RESET) => self.reset(),
                (RESET, byte) if byte & RESET_NOW != 0 => self.reset(),
                _ => self.exits.other_ports += 1,
            }
        }
    }

    /// The guest reads from a port. What is not there reads as all ones.
    pub fn port_in(&mut self, port: u16, data: &mut [u8]) {
        for byte in data {
            *byte = if (COM1..COM1 + COM1_LEN).contains(&port) {
                self.exits.serial_in += 1;
                self.serial.read(port - COM1)
            } else {
                self.exits.other_ports += 1;
                if port == CMOS_DATA {
                    0
                } else {
                    0xff
                }
            };
        }
    }

    /// The guest reads at a guest physical address that is not memory.
    pub fn mmio_read(&mut self, addr: u64, data: &mut [u8]) {
        match (
            virtio_offset(addr),
            &self.block,
            plug_offset(addr),
            &self.plug,
        ) {
            (Some(offset), Some(block), ..) => {
                self.exits.mmio_read += 1;
                block.read(offset, data);
            }
            (_, _, Some(offset), Some(plug)) => {
                self.exits.plug += 1;
                plug.read(offset, data);
            }
            _ => {
                self.exits.mmio_nowhere += 1;
                data.fill(0xff);
            }
        }
    }

    /// The guest writes at a guest physical address that is not memory.
    pub fn mmio_write(&mut self, addr: u64, data: &[u8]) {
        match (
            virtio_offset(addr),
            &mut self.block,
            plug_offset(addr),
            &mut self.plug,
        ) {
            (Some(offset), Some(block), ..) => {
                self.exits.mmio_write += 1;
                block.write(offset, data);
            }
            (_, _, Some(offset), Some(plug)) => {
                self.exits.plug += 1;
                plug.write(offset, data);
            }
            _ => self.exits.mmio_nowhere += 1,
        }
    }

    /// Shows what the guest has written: whole lines, or with `all` the rest too.
    pub fn drain_console(&mut self, all: bool) {
        let output = &mut self.serial.output;
        let mut shown = Vec::new();
        match self.console {
            Console::Raw => shown.append(output),
            Console::Margin => {
                if all && !output.is_empty() {
                    output.push(b'\n');
                }
                while let Some(end) = output.iter().position(|b| *b == b'\n') {
                    shown.extend_from_slice(b"  | ");
                    shown.extend(output.drain(..=end));
                }
            }
        }
        if !shown.is_empty() {
            // A terminal that is gone does not stop the guest.
            let mut out = std::io::stdout().lock();
            let _ = out.write_all(&shown).and_then(|()| out.flush());
        }
    }

    fn reset(&mut self) {
        self.exits.other_ports += 1;
        self.ended = Some(0);
    }
}

fn virtio_offset(addr: u64) -> Option<u64> {
    addr.checked_sub(VIRTIO_MMIO)
        .filter(|offset| *offset < VIRTIO_MMIO_LEN)
}

fn plug_offset(addr: u64) -> Option<u64> {
    addr.checked_sub(PLUG_MMIO)
        .filter(|offset| *offset < PLUG_MMIO_LEN)
}
