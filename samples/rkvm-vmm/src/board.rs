// SPDX-License-Identifier: GPL-2.0

//! The machine around the vCPUs: the devices, the wires between them, and what the threads that work
//! on it have to tell each other.
//!
//! There is one [`Board`], behind one mutex in [`Shared`]. A vCPU's thread takes it for each exit, the
//! event thread (see [`crate::events`]) for each timer tick and each key. Nobody holds it while
//! waiting.

use std::io::Stdout;
use std::io::Write;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;

use crate::bus;
use crate::bus::Page;
use crate::bus::Target;
use crate::devices::debug_exit;
use crate::devices::i8042::I8042;
use crate::devices::power::Power;
use crate::devices::reset::ResetControl;
use crate::devices::reset::SystemControlA;
use crate::devices::rtc::Rtc;
use crate::devices::serial::Uart;
use crate::events::Ring;
use crate::events::Timer;
use crate::interrupts::Interrupts;
use crate::outcome::Outcome;
use crate::signals::Kicker;
use crate::time;
use crate::time::Nanos;
use crate::time::MILLISECOND;
use crate::virtio::console::Input;
use crate::virtio::mmio::Mmio;

/// How long output without a newline may wait before it is shown.
const FLUSH_DELAY: Nanos = 20 * MILLISECOND;

/// Least time between two timer wake-ups: a guest that asks for an interrupt each microsecond shall
/// not keep this host's CPU from running it.
const MIN_TIMER_INTERVAL: Nanos = MILLISECOND / 10;

/// What a vCPU's thread is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VcpuState {
    /// Has not looked at the board yet.
    #[default]
    Starting,
    /// In KVM_RUN, or on the way in or out of it; a signal gets it out.
    Running,
    /// As `Running`, and KVM was asked to exit as soon as an interrupt can be taken.
    AwaitingWindow,
    /// Waits on [`Shared::wake`] for an interrupt.
    Halted,
    /// Has left the loop for good.
    Stopped,
}

/// What the other threads know of a vCPU's.
#[derive(Clone, Default)]
pub struct VcpuSlot {
    /// What it is doing.
    pub state: VcpuState,
    /// Gets it out of KVM_RUN; there while its thread is between `Starting` and `Stopped`.
    pub kicker: Option<Kicker>,
    /// Somebody wants to see its registers and statistics.
    pub dump_requested: bool,
}

/// The devices and the state that the threads share. `W` takes the serial port's output.
pub struct Board<W: Write = Stdout> {
    interrupts: Interrupts,
    /// ACPI's registers, if there is ACPI.
    power: Option<Power>,
    rtc: Rtc,
    i8042: I8042,
    uart: Uart<W>,
    virtio: Vec<Mmio>,
    /// Gets the keys, if it is there, and the UART none.
    console: Option<Arc<Input>>,
    port_a: SystemControlA,
    reset_control: ResetControl,
    /// When to flush the UART.
    flush_at: Option<Nanos>,
    /// When `--timeout` runs out.
    timeout_at: Option<Nanos>,
    /// What the timer is set to.
    armed: Option<Nanos>,
    /// When the timer last went off.
    last_wake: Nanos,
    /// How the guest ended, once it has.
    pub outcome: Option<Outcome>,
    /// The vCPUs, by their numbers.
    pub vcpus: Vec<VcpuSlot>,
    /// The event thread has keys that the UART had no room for.
    pub input_blocked: bool,
}

impl<W: Write> Board<W> {
    /// Returns a machine of so many vCPUs with so much RAM below and above 4 GiB, its serial output
    /// going to `sink`.
    pub fn new(
        interrupts: Interrupts,
        vcpus: usize,
        (below_4g, above_4g): (u64, u64),
        sink: W,
        timeout_at: Option<Nanos>,
    ) -> Self {
        let has_acpi = !matches!(interrupts, Interrupts::Pics(_));
        Self {
            interrupts,
            power: has_acpi.then(Power::default),
            rtc: Rtc::new(below_4g, above_4g),
            i8042: I8042::new(),
            uart: Uart::new(sink),
            virtio: Vec::new(),
            console: None,
            port_a: SystemControlA::new(),
            reset_control: ResetControl::default(),
            flush_at: None,
            timeout_at,
            armed: None,
            last_wake: 0,
            outcome: None,
            vcpus: vec![VcpuSlot::default(); vcpus],
            input_blocked: false,
        }
    }

    /// Adds the next virtio device.
    pub fn plug(&mut self, device: Mmio) {
        self.virtio.push(device);
    }

    /// Has the keys go to `console`.
    pub fn set_console(&mut self, console: Arc<Input>) {
        self.console = Some(console);
    }

    /// An IN instruction (or one turn of INS) of `data.len()` bytes.
    pub fn read_port(&mut self, port: u16, data: &mut [u8], now: Nanos) {
        if bus::is_pci_config(port, data.len()) {
            data.fill(0xff);
            return;
        }
        // The bus is one of bytes: a wide access is one to consecutive ports.
        for (port, byte) in (0..).map(|i| port.wrapping_add(i)).zip(data) {
            *byte = self.read_byte(port, now);
        }
    }

    /// An OUT instruction (or one turn of OUTS) of `data.len()` bytes.
    pub fn write_port(&mut self, port: u16, data: &[u8], now: Nanos) {
        if bus::is_pci_config(port, data.len()) {
            return;
        }
        for (port, byte) in (0..).map(|i| port.wrapping_add(i)).zip(data) {
            self.write_byte(port, *byte, now);
        }
    }

    /// A load of `data.len()` bytes from where there is no memory.
    pub fn read_address(&mut self, address: u64, data: &mut [u8]) {
        // Where there is nothing the bus floats high.
        data.fill(0xff);
        match bus::decode_address(address) {
            Page::IoApic(offset) => {
                if let Some(ioapic) = self.interrupts.as_ioapic() {
                    let value = ioapic.read(offset).to_le_bytes();
                    for (to, from) in data.iter_mut().zip(value.into_iter().chain([0; 4])) {
                        *to = from;
                    }
                }
            }
            Page::Virtio(number, offset) => {
                if let Some(device) = self.virtio.get(number) {
                    device.read(offset, data);
                }
            }
            Page::Empty => {}
        }
    }

    /// A store of `data.len()` bytes to where there is no memory.
    pub fn write_address(&mut self, address: u64, data: &[u8]) {
        match bus::decode_address(address) {
            Page::IoApic(offset) => {
                if let Some(ioapic) = self.interrupts.as_ioapic() {
                    let mut value = [0; 4];
                    for (to, from) in value.iter_mut().zip(data) {
                        *to = *from;
                    }
                    ioapic.write(offset, u32::from_le_bytes(value));
                }
            }
            Page::Virtio(number, offset) => {
                if let Some(device) = self.virtio.get_mut(number) {
                    device.write(offset, data);
                    if let Some(level) = device.level() {
                        let gsi = bus::VIRTIO_GSI as u8 + number as u8;
                        self.interrupts.set_level(gsi, level);
                    }
                }
            }
            Page::Empty => {}
        }
    }

    fn read_byte(&mut self, port: u16, now: Nanos) -> u8 {
        match bus::decode(port) {
            Target::Pic(_) | Target::Pit(_) | Target::PortB => match self.interrupts.as_pics() {
                Some(pics) => pics.read(port, now),
                None => 0xff,
            },
            Target::Power(offset) => self.power.as_ref().map_or(0xff, |power| power.read(offset)),
            Target::I8042(command) => self.i8042.read(command),
            Target::RtcData => self.rtc.read(time::time_of_day()),
            Target::PortA => self.port_a.read(),
            Target::Serial(offset) => self.uart.read(offset),
            Target::DebugExit => debug_exit::read(),
            Target::ResetControl => self.reset_control.read(),
            Target::RtcIndex | Target::Post | Target::Mark | Target::Empty => 0xff,
        }
    }

    fn write_byte(&mut self, port: u16, value: u8, now: Nanos) {
        let end = match bus::decode(port) {
            Target::Pic(_) | Target::Pit(_) | Target::PortB => {
                // A tick that is due under the old programming is not to be lost with it.
                self.interrupts.tick(now);
                if let Some(pics) = self.interrupts.as_pics() {
                    pics.write(port, value, now);
                }
                None
            }
            Target::Power(offset) => self
                .power
                .as_mut()
                .and_then(|power| power.write(offset, value)),
            Target::I8042(command) => self.i8042.write(command, value),
            Target::RtcIndex => {
                self.rtc.select(value);
                None
            }
            Target::RtcData => {
                self.rtc.write(value);
                None
            }
            Target::PortA => self.port_a.write(value),
            Target::Serial(offset) => {
                self.uart.write(offset, value);
                self.uart_changed(now);
                None
            }
            Target::DebugExit => Some(debug_exit::write(value)),
            Target::ResetControl => self.reset_control.write(value),
            Target::Post | Target::Mark | Target::Empty => None,
        };
        if let Some(outcome) = end {
            self.finish(outcome);
        }
    }

    /// Gives the guest keys; returns how many it took.
    pub fn receive(&mut self, keys: &[u8], now: Nanos) -> usize {
        if let Some(console) = &self.console {
            return console.push(keys);
        }
        let taken = self.uart.receive(keys);
        self.uart_changed(now);
        taken
    }

    /// Returns how many keys the UART would take.
    pub fn input_room(&self) -> usize {
        self.uart.room()
    }

    fn uart_changed(&mut self, now: Nanos) {
        if self.uart.take_irq() {
            self.interrupts.pulse(bus::IRQ_SERIAL);
        }
        if !self.uart.unflushed() {
            self.flush_at = None;
        } else if self.flush_at.is_none() {
            self.flush_at = Some(now + FLUSH_DELAY);
        }
    }

    /// Does everything that is due at `now`.
    pub fn advance(&mut self, now: Nanos) {
        self.interrupts.tick(now);
        if self.flush_at.is_some_and(|at| at <= now) {
            self.flush();
        }
    }

    /// Shows what the guest has written.
    pub fn flush(&mut self) {
        self.uart.flush();
        self.flush_at = None;
    }

    /// Tells whether `--timeout` has run out.
    pub fn timed_out(&self, now: Nanos) -> bool {
        self.timeout_at.is_some_and(|at| at <= now)
    }

    /// Returns when [`Board::advance`] will have something to do.
    fn deadline(&self) -> Option<Nanos> {
        let pit = self
            .interrupts
            .deadline()
            .map(|at| at.max(self.last_wake + MIN_TIMER_INTERVAL));
        [pit, self.flush_at, self.timeout_at]
            .into_iter()
            .flatten()
            .min()
    }

    /// Notes that the timer went off, and is no longer armed.
    pub fn timer_fired(&mut self, now: Nanos) {
        self.armed = None;
        self.last_wake = now;
    }

    /// Sets the timer if it would be late; too early does no harm.
    pub fn arm(&mut self, timer: &Timer) {
        let Some(deadline) = self.deadline() else {
            return;
        };
        if self.armed.is_none_or(|armed| deadline < armed) {
            timer.set(deadline);
            self.armed = Some(deadline);
        }
    }

    /// Tells whether the processor's interrupts come from here, and not from a local APIC.
    pub fn gives_interrupts(&self) -> bool {
        matches!(self.interrupts, Interrupts::Pics(_))
    }

    /// Tells whether an interrupt waits for the processor, to be given by [`Board::acknowledge`].
    pub fn intr(&self) -> bool {
        self.interrupts.intr()
    }

    /// The processor's interrupt acknowledge: returns the vector, if there are controllers here.
    pub fn acknowledge(&mut self) -> Option<u8> {
        self.interrupts.as_pics().map(|pics| pics.pic.acknowledge())
    }

    /// A local APIC ended an interrupt that a level-triggered pin may have sent.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        if let Some(ioapic) = self.interrupts.as_ioapic() {
            ioapic.end_of_interrupt(vector);
        }
    }

    /// Ends the guest; the first reason given stays.
    pub fn finish(&mut self, outcome: Outcome) {
        self.outcome.get_or_insert(outcome);
    }

    /// Tells whether the thread of vCPU `id`, wherever it is, must look at the board.
    pub fn wants_attention(&self, id: usize) -> bool {
        let vcpu = &self.vcpus[id];
        if self.outcome.is_some() || vcpu.dump_requested {
            return true;
        }
        // A vCPU that waits for its interrupt window comes by itself.
        vcpu.state != VcpuState::AwaitingWindow && self.intr()
    }

    /// Tells whether no vCPU will run any more.
    pub fn stopped(&self) -> bool {
        self.vcpus
            .iter()
            .all(|vcpu| vcpu.state == VcpuState::Stopped)
    }
}

/// The board with what is needed to work on it from several threads.
pub struct Shared {
    board: Mutex<Board>,
    /// The vCPU waits here when halted, unless the kernel has its local APIC.
    pub wake: Condvar,
    /// Goes off when the board's deadline has come; the event thread listens.
    pub timer: Timer,
    /// Makes the event thread look at the board.
    pub ring: Ring,
}

impl Shared {
    /// Puts a board up for sharing.
    pub fn new(board: Board, timer: Timer, ring: Ring) -> Self {
        Self {
            board: Mutex::new(board),
            wake: Condvar::new(),
            timer,
            ring,
        }
    }

    /// Takes the board.
    pub fn lock(&self) -> MutexGuard<'_, Board> {
        // A panic of another thread aborts or is about to be reported; its board is still whole.
        self.board
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::SECOND;

    fn board() -> Board<Vec<u8>> {
        Board::new(Interrupts::pics(), 1, (256 << 20, 0), Vec::new(), None)
    }

    fn out(board: &mut Board<Vec<u8>>, port: u16, value: u8) {
        board.write_port(port, &[value], SECOND);
    }

    /// Initialises the PICs, nothing masked.
    fn init_pics(board: &mut Board<Vec<u8>>) {
        for (command, base, wiring) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
            out(board, command, 0x11);
            for value in [base, wiring, 0x01, 0x00] {
                out(board, command + 1, value);
            }
        }
    }

    #[test]
    fn timer_interrupts_through_the_pic() {
        let mut board = board();
        init_pics(&mut board);
        out(&mut board, 0x43, 0x34);
        out(&mut board, 0x40, 0xa9);
        out(&mut board, 0x40, 0x04);
        assert!(!board.intr());
        let due = board.deadline().unwrap();
        assert!(due > SECOND && due < SECOND + 2 * MILLISECOND);
        board.advance(due);
        assert!(board.wants_attention(0));
        assert_eq!(board.acknowledge(), Some(0x30));
    }

    #[test]
    fn reprogramming_keeps_a_due_tick() {
        let mut board = board();
        init_pics(&mut board);
        out(&mut board, 0x43, 0x30);
        out(&mut board, 0x40, 10);
        out(&mut board, 0x40, 0);
        board.write_port(0x43, &[0x30], 2 * SECOND);
        assert!(board.intr());
    }

    #[test]
    fn key_interrupts_through_the_pic() {
        let mut board = board();
        init_pics(&mut board);
        out(&mut board, 0x3f9, 0x01);
        assert_eq!(board.receive(b"k", SECOND), 1);
        assert_eq!(board.acknowledge(), Some(0x34));
        let mut data = [0];
        board.read_port(0x3f8, &mut data, SECOND);
        assert_eq!(data, *b"k");
    }

    #[test]
    fn unfinished_line_is_shown_in_time() {
        let mut board = board();
        out(&mut board, 0x3f8, b'>');
        assert_eq!(board.deadline(), Some(SECOND + FLUSH_DELAY));
        board.advance(SECOND + FLUSH_DELAY);
        assert_eq!(board.deadline(), None);
    }

    #[test]
    fn wide_and_empty_accesses() {
        let mut board = board();
        let mut data = [0; 4];
        board.read_port(0xcfc, &mut data, 0);
        assert_eq!(data, [0xff; 4]);
        board.read_port(0x2f8, &mut data[..1], 0);
        assert_eq!(data[0], 0xff);
        // Would be a reset if taken for a byte at 0xcf9.
        board.write_port(0xcf8, &[0, 6, 0, 0x80], 0);
        assert_eq!(board.outcome, None);
        // The last port does not run into the first.
        board.write_port(0xffff, &[0, 0], 0);
    }

    #[test]
    fn first_end_counts() {
        let mut board = board();
        out(&mut board, 0xf4, 3);
        out(&mut board, 0x64, 0xfe);
        assert_eq!(board.outcome, Some(Outcome::DebugExit(3)));
        assert!(board.wants_attention(0));
    }
}
