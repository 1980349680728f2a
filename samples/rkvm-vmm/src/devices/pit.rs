// SPDX-License-Identifier: GPL-2.0

//! The 8254 interval timer (Intel 8254 data sheet, order number 231164) and port 0x61, which gates
//! its channel 2 and shows that channel's output.
//!
//! A channel does not count: it remembers when its count was loaded and computes what the chip would
//! hold at the time asked for. Simplified against the chip: a new count starts at once (the chip
//! ends the running cycle of modes 2 and 3 first), and mode 3 with an odd count has halves of equal
//! length.

use crate::time::Nanos;
use crate::time::SECOND;

/// The chip's clock: 14.31818 MHz / 12.
pub const FREQUENCY: u64 = 1_193_182;

/// Converts a duration to clock ticks, rounding down.
fn ticks(duration: Nanos) -> u64 {
    (u128::from(duration) * u128::from(FREQUENCY) / u128::from(SECOND)) as u64
}

/// Converts clock ticks to a duration that has fully seen them.
fn nanos(ticks: u64) -> Nanos {
    (u128::from(ticks) * u128::from(SECOND)).div_ceil(u128::from(FREQUENCY)) as u64
}

/// Operating modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// 0: output rises when the count is over.
    TerminalCount,
    /// 1: output is low for the count, from each rising edge of the gate.
    OneShot,
    /// 2: output is low for one tick in each period.
    RateGenerator,
    /// 3: output is high for half of each period.
    SquareWave,
    /// 4: output is low for one tick when the count is over.
    SoftwareStrobe,
    /// 5: as 4, from each rising edge of the gate.
    HardwareStrobe,
}

impl Mode {
    fn from_control(value: u8) -> Self {
        match (value >> 1) & 7 {
            0 => Mode::TerminalCount,
            1 => Mode::OneShot,
            2 | 6 => Mode::RateGenerator,
            3 | 7 => Mode::SquareWave,
            4 => Mode::SoftwareStrobe,
            _ => Mode::HardwareStrobe,
        }
    }

    fn periodic(self) -> bool {
        matches!(self, Mode::RateGenerator | Mode::SquareWave)
    }

    /// Modes that the gate's rising edge starts.
    fn triggered(self) -> bool {
        matches!(self, Mode::OneShot | Mode::HardwareStrobe)
    }
}

/// Which bytes of the count a guest reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low,
    High,
    LowThenHigh,
}

/// When a channel counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counting {
    /// No count was loaded since the control word, or no trigger came since.
    No,
    /// Since this time.
    Since(Nanos),
    /// The gate stopped it after so many ticks.
    Held(u64),
}

/// One of the three counters.
#[derive(Debug)]
struct Channel {
    mode: Mode,
    access: Access,
    bcd: bool,
    /// Loaded count, 1 to 65536 (10000 in BCD).
    count: u32,
    /// No count since the control word: the status byte's NULL COUNT.
    null_count: bool,
    counting: Counting,
    gate: bool,
    /// The next byte written or read is the high one.
    write_high: bool,
    read_high: bool,
    written_low: u8,
    /// Latched count, its bytes as they will be read; the first goes out first.
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    /// Ticks since the start up to which output edges were reported.
    seen: u64,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            mode: Mode::TerminalCount,
            access: Access::LowThenHigh,
            bcd: false,
            count: 0x10000,
            null_count: true,
            counting: Counting::No,
            gate,
            write_high: false,
            read_high: false,
            written_low: 0,
            latched_count: None,
            latched_status: None,
            seen: 0,
        }
    }

    /// Returns ticks since the start, if there was one.
    fn elapsed(&self, now: Nanos) -> Option<u64> {
        match self.counting {
            Counting::No => None,
            Counting::Since(start) => Some(ticks(now.saturating_sub(start))),
            Counting::Held(ticks) => Some(ticks),
        }
    }

    /// Returns the level of the output pin.
    fn output(&self, now: Nanos) -> bool {
        let count = u64::from(self.count);
        let Some(t) = self.elapsed(now) else {
            return self.mode != Mode::TerminalCount;
        };
        match self.mode {
            Mode::TerminalCount | Mode::OneShot => t >= count,
            // A low gate forces the periodic modes' output high.
            Mode::RateGenerator => !self.gate || t % count != count - 1,
            Mode::SquareWave => !self.gate || t % count < count.div_ceil(2),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => t != count,
        }
    }

    /// Returns the counting element as a guest reads it.
    fn value(&self, now: Nanos) -> u16 {
        let count = u64::from(self.count);
        let modulus: u64 = if self.bcd { 10_000 } else { 0x10000 };
        let t = self.elapsed(now).unwrap_or(0);
        let value = match self.mode {
            Mode::RateGenerator => count - t % count,
            // Counts down by two, twice in a period.
            Mode::SquareWave => (count - (2 * (t % count)) % count) & !1,
            // These wrap and go on when the count is over.
            _ => (count % modulus + modulus - t % modulus) % modulus,
        } % modulus;
        if self.bcd {
            to_bcd(value as u16)
        } else {
            value as u16
        }
    }

    fn control(&mut self, value: u8, now: Nanos) {
        match (value >> 4) & 3 {
            0 => {
                // Counter latch; a second one before the first is read has no effect.
                if self.latched_count.is_none() {
                    self.latched_count = Some(self.value(now));
                }
                return;
            }
            1 => self.access = Access::Low,
            2 => self.access = Access::High,
            _ => self.access = Access::LowThenHigh,
        }
        self.mode = Mode::from_control(value);
        self.bcd = value & 1 != 0;
        self.null_count = true;
        self.counting = Counting::No;
        self.write_high = false;
        self.read_high = false;
        self.latched_count = None;
        self.latched_status = None;
    }

    fn status(&self, now: Nanos) -> u8 {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::LowThenHigh => 3,
        };
        let mode = match self.mode {
            Mode::TerminalCount => 0,
            Mode::OneShot => 1,
            Mode::RateGenerator => 2,
            Mode::SquareWave => 3,
            Mode::SoftwareStrobe => 4,
            Mode::HardwareStrobe => 5,
        };
        (u8::from(self.output(now)) << 7)
            | (u8::from(self.null_count) << 6)
            | (access << 4)
            | (mode << 1)
            | u8::from(self.bcd)
    }

    fn write(&mut self, value: u8, now: Nanos) {
        match (self.access, self.write_high) {
            (Access::Low, _) => self.load(u16::from(value), now),
            (Access::High, _) => self.load(u16::from(value) << 8, now),
            (Access::LowThenHigh, false) => {
                self.written_low = value;
                self.write_high = true;
                if self.mode == Mode::TerminalCount {
                    // The first byte stops the count in this mode.
                    self.counting = Counting::No;
                }
            }
            (Access::LowThenHigh, true) => {
                self.write_high = false;
                self.load(u16::from_le_bytes([self.written_low, value]), now);
            }
        }
    }

    fn load(&mut self, count: u16, now: Nanos) {
        let count = if self.bcd { from_bcd(count) } else { count };
        self.count = match (u32::from(count), self.bcd) {
            (0, false) => 0x10000,
            (0, true) => 10_000,
            // The periodic modes cannot divide by one.
            (1, _) if self.mode.periodic() => 2,
            (count, _) => count,
        };
        self.null_count = false;
        if !self.mode.triggered() {
            self.start(now);
        }
    }

    fn start(&mut self, now: Nanos) {
        self.seen = 0;
        self.counting = if self.gate || self.mode.triggered() {
            Counting::Since(now)
        } else {
            Counting::Held(0)
        };
    }

    fn read(&mut self, now: Nanos) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self
            .latched_count
            .unwrap_or_else(|| self.value(now))
            .to_le_bytes();
        let (byte, last) = match (self.access, self.read_high) {
            (Access::Low, _) => (low, true),
            (Access::High, _) => (high, true),
            (Access::LowThenHigh, false) => (low, false),
            (Access::LowThenHigh, true) => (high, true),
        };
        self.read_high = !last;
        if last {
            self.latched_count = None;
        }
        byte
    }

    fn set_gate(&mut self, gate: bool, now: Nanos) {
        let (rising, falling) = (gate && !self.gate, !gate && self.gate);
        self.gate = gate;
        match self.mode {
            Mode::OneShot | Mode::HardwareStrobe => {
                if rising && !self.null_count {
                    self.start(now);
                }
            }
            Mode::RateGenerator | Mode::SquareWave => {
                if rising && !self.null_count {
                    self.start(now);
                } else if falling && self.counting != Counting::No {
                    self.counting = Counting::Held(0);
                }
            }
            Mode::TerminalCount | Mode::SoftwareStrobe => match self.counting {
                Counting::Since(_) if falling => {
                    self.counting = Counting::Held(self.elapsed(now).unwrap_or(0));
                }
                Counting::Held(ticks) if rising => {
                    self.counting = Counting::Since(now.saturating_sub(nanos(ticks)));
                }
                _ => {}
            },
        }
    }

    /// Returns the tick of the first rising edge of the output after tick `t`.
    fn next_edge(&self, t: u64) -> Option<u64> {
        let count = u64::from(self.count);
        match self.mode {
            Mode::TerminalCount | Mode::OneShot => (t < count).then_some(count),
            Mode::RateGenerator | Mode::SquareWave => Some((t / count + 1) * count),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => (t <= count).then_some(count + 1),
        }
    }

    /// Tells whether the output rose since the last call.
    fn take_edge(&mut self, now: Nanos) -> bool {
        let Counting::Since(start) = self.counting else {
            return false;
        };
        let t = ticks(now.saturating_sub(start));
        let rose = self.next_edge(self.seen).is_some_and(|edge| edge <= t);
        self.seen = self.seen.max(t);
        rose
    }

    /// Returns when the output will rise next.
    fn deadline(&self) -> Option<Nanos> {
        match self.counting {
            Counting::Since(start) => Some(start + nanos(self.next_edge(self.seen)?)),
            _ => None,
        }
    }
}

fn from_bcd(value: u16) -> u16 {
    (0..4).rev().fold(0, |sum, digit| {
        sum * 10 + ((value >> (4 * digit)) & 0xf).min(9)
    })
}

fn to_bcd(value: u16) -> u16 {
    let mut rest = value;
    (0..4).fold(0, |bcd, digit| {
        let nibble = rest % 10;
        rest /= 10;
        bcd | (nibble << (4 * digit))
    })
}

/// The timer: channel 0 drives IRQ 0, channel 2 the speaker.
#[derive(Debug)]
pub struct Pit {
    channels: [Channel; 3],
    /// Port 0x61's bits that can be written: 0 gates channel 2, 1 the speaker, 2 and 3 mask NMIs.
    port_b: u8,
}

impl Pit {
    /// Returns the timer as after power-on: nothing counts.
    pub fn new() -> Self {
        Self {
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            port_b: 0,
        }
    }

    /// Reads the register at `offset` (0 to 3) from port 0x40.
    pub fn read(&mut self, offset: u8, now: Nanos) -> u8 {
        match self.channels.get_mut(usize::from(offset)) {
            Some(channel) => channel.read(now),
            // The control word cannot be read.
            None => 0xff,
        }
    }

    /// Writes the register at `offset` (0 to 3) from port 0x40.
    pub fn write(&mut self, offset: u8, value: u8, now: Nanos) {
        if let Some(channel) = self.channels.get_mut(usize::from(offset)) {
            channel.write(value, now);
        } else if value >> 6 < 3 {
            self.channels[usize::from(value >> 6)].control(value, now);
        } else {
            self.read_back(value, now);
        }
    }

    fn read_back(&mut self, command: u8, now: Nanos) {
        for (i, channel) in self.channels.iter_mut().enumerate() {
            if command & (2 << i) == 0 {
                continue;
            }
            if command & 0x20 == 0 && channel.latched_count.is_none() {
                channel.latched_count = Some(channel.value(now));
            }
            if command & 0x10 == 0 && channel.latched_status.is_none() {
                channel.latched_status = Some(channel.status(now));
            }
        }
    }

    /// Reads port 0x61.
    pub fn read_port_b(&self, now: Nanos) -> u8 {
        // Bit 4 toggles with each memory refresh, every 15 microseconds; guests time by it.
        let refresh = (now / 15_085) & 1;
        self.port_b | ((refresh as u8) << 4) | (u8::from(self.channels[2].output(now)) << 5)
    }

    /// Writes port 0x61.
    pub fn write_port_b(&mut self, value: u8, now: Nanos) {
        self.port_b = value & 0x0f;
        self.channels[2].set_gate(value & 1 != 0, now);
    }

    /// Tells whether channel 0's output rose since the last call. Several edges are told as one: a
    /// tick that nobody took before the next one is lost, as on the real wire.
    pub fn take_edge(&mut self, now: Nanos) -> bool {
        self.channels[0].take_edge(now)
    }

    /// Returns when [`Pit::take_edge`] will be true next.
    pub fn deadline(&self) -> Option<Nanos> {
        self.channels[0].deadline()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Nanos = 5 * SECOND;

    /// The time at which `t` ticks have passed since START.
    fn at(t: u64) -> Nanos {
        START + nanos(t)
    }

    fn program(pit: &mut Pit, channel: u8, control: u8, count: u16) {
        pit.write(3, (channel << 6) | control, START);
        let [low, high] = count.to_le_bytes();
        pit.write(channel, low, START);
        pit.write(channel, high, START);
    }

    fn read16(pit: &mut Pit, channel: u8, now: Nanos) -> u16 {
        u16::from_le_bytes([pit.read(channel, now), pit.read(channel, now)])
    }

    #[test]
    fn tick_conversion_is_consistent() {
        for t in [0, 1, 2, 1193, 65536, 1_193_182, 123_456_789] {
            assert_eq!(ticks(nanos(t)), t);
            assert!(t == 0 || ticks(nanos(t) - 1) == t - 1);
        }
    }

    #[test]
    fn rate_generator_ticks_each_period() {
        let mut pit = Pit::new();
        assert_eq!(pit.deadline(), None);
        program(&mut pit, 0, 0x34, 1000);
        assert_eq!(pit.deadline(), Some(at(1000)));
        assert!(!pit.take_edge(at(999)));
        assert!(pit.take_edge(at(1000)));
        assert!(!pit.take_edge(at(1001)));
        assert_eq!(pit.deadline(), Some(at(2000)));
        assert!(pit.take_edge(at(5500)), "missed ticks are one edge");
        assert!(!pit.take_edge(at(5999)));
        assert_eq!(pit.deadline(), Some(at(6000)));
    }

    #[test]
    fn one_shots_tick_once() {
        for (control, edge) in [(0x30, 500), (0x38, 501)] {
            let mut pit = Pit::new();
            program(&mut pit, 0, control, 500);
            assert_eq!(pit.deadline(), Some(at(edge)));
            assert!(!pit.take_edge(at(edge - 1)));
            assert!(pit.take_edge(at(edge)));
            assert_eq!(pit.deadline(), None);
            assert!(!pit.take_edge(at(200_000)));
        }
    }

    #[test]
    fn control_word_stops_the_channel() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0x34, 1000);
        pit.write(3, 0x38, at(10));
        assert_eq!(pit.deadline(), None);
        assert!(!pit.take_edge(at(5000)));
    }

    #[test]
    fn zero_means_65536() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0x34, 0);
        assert_eq!(pit.deadline(), Some(at(65536)));
        assert_eq!(read16(&mut pit, 0, at(1)), 65535);
    }

    #[test]
    fn latch_freezes_the_count() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0x34, 10_000);
        pit.write(3, 0x00, at(100));
        pit.write(3, 0x00, at(200));
        assert_eq!(pit.read(0, at(300)), 9900u16.to_le_bytes()[0]);
        assert_eq!(pit.read(0, at(400)), 9900u16.to_le_bytes()[1]);
        assert_eq!(read16(&mut pit, 0, at(500)), 9500);
    }

    #[test]
    fn read_back_latches_status_and_count() {
        let mut pit = Pit::new();
        pit.write(3, 0x34, START);
        pit.write(3, 0xe2, START);
        assert_eq!(pit.read(0, START), 0x80 | 0x40 | 0x34, "null count");
        program(&mut pit, 0, 0x34, 100);
        pit.write(3, 0xc2, at(99));
        assert_eq!(pit.read(0, at(150)), 0x34, "low in the last tick");
        assert_eq!(read16(&mut pit, 0, at(150)), 1);
    }

    #[test]
    fn single_byte_access() {
        let mut pit = Pit::new();
        pit.write(3, 0x14, START);
        pit.write(0, 100, START);
        assert_eq!(pit.deadline(), Some(at(100)));
        assert_eq!(pit.read(0, at(1)), 99);
        assert_eq!(pit.read(0, at(2)), 98);
        pit.write(3, 0x24, START);
        pit.write(0, 2, START);
        assert_eq!(pit.deadline(), Some(at(512)));
    }

    #[test]
    fn terminal_count_wraps_when_over() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0x30, 10);
        assert_eq!(read16(&mut pit, 0, at(10)), 0);
        assert_eq!(read16(&mut pit, 0, at(11)), 0xffff);
    }

    #[test]
    fn channel_2_as_linux_calibrates_with_it() {
        let mut pit = Pit::new();
        pit.write_port_b(0x01, START);
        program(&mut pit, 2, 0x30, 0xffff);
        assert_eq!(pit.read_port_b(at(0xfffe)) & 0x21, 0x01);
        assert_eq!(pit.read_port_b(at(0xffff)) & 0x21, 0x21);
        assert_eq!(pit.deadline(), None, "channel 2 interrupts nobody");
    }

    #[test]
    fn gate_holds_and_resumes() {
        let mut pit = Pit::new();
        program(&mut pit, 2, 0x30, 100);
        assert_eq!(pit.read_port_b(at(1000)) & 0x20, 0, "gate is low");
        pit.write_port_b(0x01, START);
        pit.write_port_b(0x00, at(40));
        assert_eq!(read16(&mut pit, 2, at(2000)), 60);
        pit.write_port_b(0x01, at(2000));
        assert_eq!(pit.read_port_b(at(2059)) & 0x20, 0);
        assert_eq!(pit.read_port_b(at(2061)) & 0x20, 0x20);
    }

    #[test]
    fn gate_triggers_the_one_shot() {
        let mut pit = Pit::new();
        program(&mut pit, 2, 0x32, 50);
        assert_eq!(pit.read_port_b(at(100)) & 0x20, 0x20);
        pit.write_port_b(0x01, at(100));
        assert_eq!(pit.read_port_b(at(110)) & 0x20, 0);
        assert_eq!(pit.read_port_b(at(151)) & 0x20, 0x20);
    }

    #[test]
    fn square_wave_halves() {
        let mut pit = Pit::new();
        pit.write_port_b(0x01, START);
        program(&mut pit, 2, 0x36, 100);
        assert_eq!(pit.read_port_b(at(49)) & 0x20, 0x20);
        assert_eq!(pit.read_port_b(at(50)) & 0x20, 0);
        assert_eq!(pit.read_port_b(at(100)) & 0x20, 0x20);
        assert_eq!(read16(&mut pit, 2, at(10)), 80);
        assert_eq!(read16(&mut pit, 2, at(60)), 80);
    }

    #[test]
    fn bcd_counts_in_decimal() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0x35, 0x1000);
        assert_eq!(pit.deadline(), Some(at(1000)));
        assert_eq!(read16(&mut pit, 0, at(1)), 0x0999);
        program(&mut pit, 0, 0x35, 0);
        assert_eq!(pit.deadline(), Some(at(10_000)));
    }

    #[test]
    fn shortest_counts_do_not_divide_by_zero() {
        let mut pit = Pit::new();
        for control in [0x30, 0x32, 0x34, 0x36, 0x38, 0x3a] {
            for count in [0, 1, 2] {
                program(&mut pit, 0, control, count);
                for t in 0..5 {
                    read16(&mut pit, 0, at(t));
                    pit.take_edge(at(t));
                }
            }
        }
    }
}
