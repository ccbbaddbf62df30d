//! The first serial port: the UART of `vm-superio`, and the console that shows its output.

use std::io::{self, Write};

use vm_superio::serial::NoEvents;
use vm_superio::Serial;

use crate::bus::Interrupt;

/// The first of the eight I/O ports of the UART.
pub const COM1: u16 = 0x3f8;
/// The interrupt line of the UART.
pub const SERIAL_IRQ: u32 = 4;

/// The serial port of a microvm.
pub type SerialPort = Serial<Interrupt, NoEvents, Console>;

/// The guest's output.
#[derive(Debug)]
pub struct Console {
    /// Whether standard output shows it.
    shown: bool,
    /// Everything that the guest has written.
    pub text: Vec<u8>,
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.shown {
            // A closed standard output must not stop the guest.
            let _ = io::stdout().write_all(bytes);
        }
        self.text.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = io::stdout().flush();
        Ok(())
    }
}

/// Creates a serial port. Standard output shows the guest's output if `shown`.
///
/// # Errors
///
/// Returns an error if the process has no free descriptor.
pub fn new(shown: bool) -> io::Result<SerialPort> {
    let text = Vec::new();
    Ok(Serial::new(Interrupt::new()?, Console { shown, text }))
}
