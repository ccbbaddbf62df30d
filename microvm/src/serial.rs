//! A 16550 UART, as much of it as an early console and Linux's driver look at.

use std::collections::VecDeque;

/// Ports of the first serial port.
pub const COM1: u16 = 0x3f8;
/// How many it has.
pub const COM1_LEN: u16 = 8;
/// Bytes that wait for the guest, at most; more are dropped as on a wire.
const INPUT_MAX: usize = 4096;

const IER_RECEIVED: u8 = 1;
const IER_EMPTY: u8 = 1 << 1;
const LCR_DLAB: u8 = 1 << 7;
const MCR_LOOP: u8 = 1 << 4;
const LSR_DATA: u8 = 1;
const LSR_IDLE: u8 = 0x60;
/// Carrier, data set ready, clear to send: someone is at the other end.
const MSR_READY: u8 = 0xb0;

/// The registers of a UART, and the bytes under way.
#[derive(Debug, Default)]
pub struct Serial {
    input: VecDeque<u8>,
    /// What the guest wrote and nobody has taken yet.
    pub output: Vec<u8>,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: [u8; 2],
    empty_pending: bool,
}

impl Serial {
    /// A byte from the terminal.
    pub fn push_input(&mut self, byte: u8) {
        if self.input.len() < INPUT_MAX {
            self.input.push_back(byte);
        }
    }

    /// Whether the UART asserts its interrupt.
    pub fn interrupt_line(&self) -> bool {
        self.cause() != 1
    }

    /// The guest reads register `offset`.
    pub fn read(&mut self, offset: u16) -> u8 {
        match (offset, self.lcr & LCR_DLAB != 0) {
            (0, true) => self.divisor[0],
            (1, true) => self.divisor[1],
            (0, false) => self.input.pop_front().unwrap_or(0),
            (1, false) => self.ier,
            (2, _) => {
                let cause = self.cause();
                if cause == 2 {
                    self.empty_pending = false;
                }
                // With FIFOs on, the top bits say so.
                cause | if self.fcr & 1 != 0 { 0xc0 } else { 0 }
            }
            (3, _) => self.lcr,
            (4, _) => self.mcr,
            (5, _) => LSR_IDLE | if self.input.is_empty() { 0 } else { LSR_DATA },
            // In loopback the modem outputs come back as inputs.
            (6, _) if self.mcr & MCR_LOOP != 0 => {
                (self.mcr & 0xc) << 4 | (self.mcr & 2) << 3 | (self.mcr & 1) << 5
            }
            (6, _) => MSR_READY,
            (7, _) => self.scratch,
            _ => 0xff,
        }
    }

    /// The guest writes register `offset`.
    pub fn write(&mut self, offset: u16, value: u8) {
        match (offset, self.lcr & LCR_DLAB != 0) {
            (0, true) => self.divisor[0] = value,
            (1, true) => self.divisor[1] = value,
            (0, false) => {
                if self.mcr & MCR_LOOP != 0 {
                    self.push_input(value);
                } else {
                    self.output.push(value);
                }
                self.empty_pending = true;
            }
            (1, false) => {
                // Asking for it while the transmitter is empty sets it off at once.
                self.empty_pending |= value & IER_EMPTY != 0 && self.ier & IER_EMPTY == 0;
                self.ier = value & 0xf;
            }
            (2, _) => {
                self.fcr = value;
                if value & 2 != 0 {
                    self.input.clear();
                }
            }
            (3, _) => self.lcr = value,
            (4, _) => self.mcr = value & 0x1f,
            (7, _) => self.scratch = value,
            _ => {}
        }
    }

    /// The interrupt identification: 4 data received, 2 transmitter empty, 1 none.
    fn cause(&self) -> u8 {
        if self.ier & IER_RECEIVED != 0 && !self.input.is_empty() {
            4
        } else if self.ier & IER_EMPTY != 0 && self.empty_pending {
            2
        } else {
            1
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_out_and_come_in() {
        let mut uart = Serial::default();
        b"hi".iter().for_each(|b| uart.write(0, *b));
        assert_eq!(uart.output, b"hi");
        assert_eq!(uart.read(5), LSR_IDLE);
        uart.push_input(b'x');
        assert_eq!(uart.read(5), LSR_IDLE | LSR_DATA);
        assert_eq!((uart.read(0), uart.read(0)), (b'x', 0));
    }

    #[test]
    fn interrupts_follow_what_is_enabled() {
        let mut uart = Serial::default();
        uart.push_input(b'x');
        assert!(!uart.interrupt_line());
        uart.write(1, IER_RECEIVED | IER_EMPTY);
        assert_eq!(uart.read(2), 4);
        uart.read(0);
        assert_eq!((uart.read(2), uart.read(2)), (2, 1));
        assert!(!uart.interrupt_line());
    }

    #[test]
    fn divisor_and_loopback_do_not_reach_the_wire() {
        let mut uart = Serial::default();
        uart.write(3, LCR_DLAB);
        uart.write(0, 1);
        assert_eq!(uart.read(0), 1);
        uart.write(3, 3);
        uart.write(4, MCR_LOOP | 0xa);
        assert_eq!(uart.read(6), 0x90);
        uart.write(0, b'z');
        assert_eq!((uart.read(0), uart.output.len()), (b'z', 0));
    }

    #[test]
    fn input_is_bounded() {
        let mut uart = Serial::default();
        (0..2 * INPUT_MAX).for_each(|_| uart.push_input(0));
        assert_eq!(uart.input.len(), INPUT_MAX);
    }
}
