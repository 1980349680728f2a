// SPDX-License-Identifier: GPL-2.0

//! The 16550 serial port, on vm-superio's `Serial`, and its output.
//!
//! vm-superio writes and flushes byte by byte. A system call a byte is dear where the guest's console
//! is all there is to see, so [`Console`] collects bytes until a newline, until it holds
//! [`Console::CAPACITY`] of them, or until someone calls [`Uart::flush`]: the board does, a few
//! milliseconds after the first of them and whenever the guest goes idle.

use std::cell::Cell;
use std::convert::Infallible;
use std::io;
use std::io::Write;

use vm_superio::serial::NoEvents;
use vm_superio::Serial;
use vm_superio::Trigger;

/// The interrupt wire: remembers that the UART pulled it.
#[derive(Debug, Default)]
struct IrqLine(Cell<bool>);

impl Trigger for IrqLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        Ok(())
    }
}

/// Output of the UART, collected.
struct Console<W: Write> {
    sink: W,
    pending: Vec<u8>,
}

impl<W: Write> Console<W> {
    const CAPACITY: usize = 1024;

    fn write_out(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let done = self
            .sink
            .write_all(&self.pending)
            .and_then(|()| self.sink.flush());
        // Whatever could not be written is lost: a console does not keep the guest waiting.
        self.pending.clear();
        done
    }
}

impl<W: Write> Write for Console<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.extend_from_slice(bytes);
        if bytes.contains(&b'\n') || self.pending.len() >= Self::CAPACITY {
            self.write_out()?;
        }
        Ok(bytes.len())
    }

    /// Called by vm-superio after each byte; see the head of the file.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The serial port.
pub struct Uart<W: Write> {
    serial: Serial<IrqLine, NoEvents, Console<W>>,
    sink_failed: bool,
}

impl<W: Write> Uart<W> {
    /// Returns a UART that sends to `sink`.
    pub fn new(sink: W) -> Self {
        Self {
            serial: Serial::new(
                IrqLine::default(),
                Console {
                    sink,
                    pending: Vec::with_capacity(Console::<W>::CAPACITY),
                },
            ),
            sink_failed: false,
        }
    }

    /// Reads the register at `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        self.serial.read(offset)
    }

    /// Writes the register at `offset` (0 to 7).
    pub fn write(&mut self, offset: u8, value: u8) {
        if let Err(err) = self.serial.write(offset, value) {
            self.report(&err.to_string());
        }
    }

    /// Gives the guest as much of `input` as its FIFO takes; returns how much that is.
    pub fn receive(&mut self, input: &[u8]) -> usize {
        let room = self.room().min(input.len());
        self.serial.enqueue_raw_bytes(&input[..room]).unwrap_or(0)
    }

    /// Returns how many bytes [`Uart::receive`] would take now.
    pub fn room(&self) -> usize {
        self.serial.fifo_capacity()
    }

    /// Tells whether the UART pulled its interrupt line since the last call.
    pub fn take_irq(&mut self) -> bool {
        self.serial.interrupt_evt().0.take()
    }

    /// Tells whether output waits for [`Uart::flush`].
    pub fn unflushed(&self) -> bool {
        !self.serial.writer().pending.is_empty()
    }

    /// Writes out what was collected.
    pub fn flush(&mut self) {
        if let Err(err) = self.serial.writer_mut().write_out() {
            self.report(&err.to_string());
        }
    }

    /// Says once that the guest's output goes nowhere, and lets the guest go on.
    fn report(&mut self, err: &str) {
        if !std::mem::replace(&mut self.sink_failed, true) {
            eprintln!("rkvm-vmm: cannot write the guest's serial output: {err}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u8 = 0;
    const IER: u8 = 1;
    const IIR: u8 = 2;
    const LSR: u8 = 5;

    fn uart() -> Uart<Vec<u8>> {
        Uart::new(Vec::new())
    }

    fn sent(uart: &Uart<Vec<u8>>) -> &[u8] {
        &uart.serial.writer().sink
    }

    #[test]
    fn output_goes_out_by_lines() {
        let mut uart = uart();
        for byte in *b"ab" {
            uart.write(DATA, byte);
        }
        assert_eq!(sent(&uart), b"");
        assert!(uart.unflushed());
        uart.write(DATA, b'\n');
        assert_eq!(sent(&uart), b"ab\n");
        assert!(!uart.unflushed());
        uart.write(DATA, b'$');
        uart.flush();
        assert_eq!(sent(&uart), b"ab\n$");
    }

    #[test]
    fn endless_line_is_bounded() {
        let mut uart = uart();
        for _ in 0..Console::<Vec<u8>>::CAPACITY {
            uart.write(DATA, b'.');
        }
        assert_eq!(sent(&uart).len(), Console::<Vec<u8>>::CAPACITY);
    }

    #[test]
    fn input_interrupts_when_enabled() {
        let mut uart = uart();
        assert_eq!(uart.receive(b"x"), 1);
        assert!(!uart.take_irq());
        assert_eq!(uart.read(DATA), b'x');
        uart.write(IER, 0x01);
        uart.receive(b"yz");
        assert!(uart.take_irq());
        assert!(!uart.take_irq());
        assert_eq!(uart.read(IIR) & 0x0f, 0x04);
        assert_eq!(uart.read(LSR) & 0x01, 0x01);
        assert_eq!((uart.read(DATA), uart.read(DATA)), (b'y', b'z'));
        assert_eq!(uart.read(LSR) & 0x01, 0x00);
    }

    #[test]
    fn transmitter_empty_interrupts_when_enabled() {
        let mut uart = uart();
        uart.write(DATA, b'a');
        assert!(!uart.take_irq());
        uart.write(IER, 0x02);
        assert!(uart.take_irq(), "it is empty already");
        assert_eq!(uart.read(IIR) & 0x0f, 0x02);
        uart.write(DATA, b'b');
        assert!(uart.take_irq());
    }

    #[test]
    fn overlong_input_is_taken_in_part() {
        let mut uart = uart();
        let room = uart.room();
        let input = vec![b'i'; room + 5];
        assert_eq!(uart.receive(&input), room);
        assert_eq!(uart.receive(b"j"), 0);
        uart.read(DATA);
        assert_eq!(uart.receive(b"j"), 1);
    }
}
