// SPDX-License-Identifier: GPL-2.0

//! The MC146818 real-time clock and its CMOS memory, ports 0x70 and 0x71.
//!
//! The clock is the host's, in UTC; a guest can read it and not set it. It counts in BCD and 24
//! hours unless the guest asks register B for something else. No interrupts: the alarm can be
//! written and read back, but never rings, and register C stays 0. The memory holds what a BIOS
//! leaves there about memory sizes.

use std::time::Duration;

const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
const REG_CENTURY: u8 = 0x32;

/// Register A: an update is in progress or will start within 244 microseconds.
const A_UIP: u8 = 0x80;
/// Register B: 24-hour mode.
const B_24H: u8 = 0x02;
/// Register B: binary mode.
const B_BINARY: u8 = 0x04;
/// Register B: updates are inhibited.
const B_SET: u8 = 0x80;

/// How long [`A_UIP`] is set before a second ends: 244 microseconds of warning and 1984 of update.
const UPDATE_NANOS: u32 = 2_228_000;

/// The clock.
#[derive(Debug)]
pub struct Rtc {
    index: u8,
    memory: [u8; 128],
}

impl Rtc {
    /// Returns a clock for a machine with so many bytes of RAM below and above 4 GiB.
    pub fn new(below_4g: u64, above_4g: u64) -> Self {
        let mut memory = [0; 128];
        let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
        let kib = |bytes: u64| u16::try_from(bytes >> 10).unwrap_or(u16::MAX).to_le_bytes();
        let blocks = |bytes: u64| u16::try_from(bytes >> 16).unwrap_or(u16::MAX).to_le_bytes();
        put(0x0a, &[0x26]);
        put(0x0b, &[B_24H]);
        // Conventional memory, and what lies above 1 MiB (twice), in KiB.
        put(0x15, &kib(640 << 10));
        let extended = kib(below_4g.saturating_sub(1 << 20).min(63 << 20));
        put(0x17, &extended);
        put(0x30, &extended);
        // What lies above 16 MiB, and above 4 GiB, in units of 64 KiB.
        put(0x34, &blocks(below_4g.saturating_sub(16 << 20)));
        put(0x5b, &(above_4g >> 16).min(0xff_ffff).to_le_bytes()[..3]);
        Self { index: 0, memory }
    }

    /// Writes port 0x70: the register's number. Bit 7 masks NMIs, of which there are none.
    pub fn select(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// Reads port 0x71; `now` is the time of day since 1970.
    pub fn read(&self, now: Duration) -> u8 {
        match self.index {
            0x00 | 0x02 | 0x04 | 0x06..=0x09 | REG_CENTURY => self.time_register(now),
            REG_A => {
                let soon = now.subsec_nanos() >= 1_000_000_000 - UPDATE_NANOS;
                let updating = soon && self.memory[usize::from(REG_B)] & B_SET == 0;
                self.memory[usize::from(REG_A)] | if updating { A_UIP } else { 0 }
            }
            REG_C => 0,
            // Valid RAM and time: the battery is good.
            REG_D => 0x80,
            index => self.memory[usize::from(index)],
        }
    }

    /// Writes port 0x71.
    pub fn write(&mut self, value: u8) {
        match self.index {
            REG_A => self.memory[usize::from(REG_A)] = value & !A_UIP,
            // The time is the host's; C and D cannot be written.
            0x00 | 0x02 | 0x04 | 0x06..=0x09 | REG_CENTURY | REG_C | REG_D => {}
            index => self.memory[usize::from(index)] = value,
        }
    }

    fn time_register(&self, now: Duration) -> u8 {
        let date = Date::from_days(now.as_secs() / 86400);
        let second = now.as_secs() % 86400;
        let hour = (second / 3600) as u8;
        match self.index {
            0x00 => self.encode((second % 60) as u8),
            0x02 => self.encode((second / 60 % 60) as u8),
            0x04 if self.memory[usize::from(REG_B)] & B_24H != 0 => self.encode(hour),
            0x04 => {
                let afternoon = if hour >= 12 { 0x80 } else { 0 };
                self.encode((hour + 11) % 12 + 1) | afternoon
            }
            0x06 => self.encode(date.weekday),
            0x07 => self.encode(date.day),
            0x08 => self.encode(date.month),
            0x09 => self.encode((date.year % 100) as u8),
            _ => self.encode((date.year / 100) as u8),
        }
    }

    fn encode(&self, value: u8) -> u8 {
        if self.memory[usize::from(REG_B)] & B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }
}

/// A date of the Gregorian calendar.
#[derive(Debug, PartialEq, Eq)]
struct Date {
    year: u64,
    /// 1 to 12.
    month: u8,
    /// 1 to 31.
    day: u8,
    /// 1 (Sunday) to 7.
    weekday: u8,
}

impl Date {
    /// Returns the date that is `days` days after 1970-01-01.
    fn from_days(days: u64) -> Self {
        // 1970-01-01 was a Thursday.
        let weekday = ((days + 4) % 7 + 1) as u8;
        let mut rest = days;
        let mut year = 1970;
        loop {
            let length = if leap(year) { 366 } else { 365 };
            if rest < length {
                break;
            }
            rest -= length;
            year += 1;
        }
        let mut month = 1;
        loop {
            let length = match month {
                2 if leap(year) => 29,
                2 => 28,
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            if rest < length {
                break;
            }
            rest -= length;
            month += 1;
        }
        Self {
            year,
            month,
            day: rest as u8 + 1,
            weekday,
        }
    }
}

fn leap(year: u64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rtc: &mut Rtc, index: u8, now: Duration) -> u8 {
        rtc.select(index);
        rtc.read(now)
    }

    fn rtc() -> Rtc {
        Rtc::new(256 << 20, 0)
    }

    /// 2000-02-29 13:45:59 UTC, a Tuesday.
    const LEAP_DAY: Duration = Duration::from_secs(951_831_959);

    #[test]
    fn time_in_bcd() {
        let mut rtc = rtc();
        let registers = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32];
        let values = registers.map(|index| read(&mut rtc, index, LEAP_DAY));
        assert_eq!(values, [0x59, 0x45, 0x13, 0x03, 0x29, 0x02, 0x00, 0x20]);
    }

    #[test]
    fn time_in_binary_and_12_hours() {
        let mut rtc = rtc();
        rtc.select(0x0b);
        rtc.write(B_BINARY);
        assert_eq!(read(&mut rtc, 0x00, LEAP_DAY), 59);
        assert_eq!(read(&mut rtc, 0x04, LEAP_DAY), 0x81);
        let midnight = Duration::from_secs(951_782_400);
        assert_eq!(read(&mut rtc, 0x04, midnight), 12);
    }

    #[test]
    fn dates() {
        let date = |days| {
            let date = Date::from_days(days);
            (date.year, date.month, date.day)
        };
        assert_eq!(date(0), (1970, 1, 1));
        assert_eq!(date(58), (1970, 2, 28));
        assert_eq!(date(59), (1970, 3, 1));
        assert_eq!(date(11_016), (2000, 2, 29));
        assert_eq!(date(20_453), (2025, 12, 31));
        assert_eq!(date(20_454), (2026, 1, 1));
    }

    #[test]
    fn update_is_announced() {
        let mut rtc = rtc();
        let early = LEAP_DAY + Duration::from_millis(500);
        let late = LEAP_DAY + Duration::from_micros(999_900);
        assert_eq!(read(&mut rtc, REG_A, early) & A_UIP, 0);
        assert_eq!(read(&mut rtc, REG_A, late) & A_UIP, A_UIP);
        rtc.select(REG_B);
        rtc.write(B_SET | B_24H);
        assert_eq!(read(&mut rtc, REG_A, late) & A_UIP, 0);
    }

    #[test]
    fn memory_sizes() {
        let word = |rtc: &mut Rtc, at: u8| {
            u16::from_le_bytes([0, 1].map(|i| read(rtc, at + i, Duration::ZERO)))
        };
        let mut rtc = Rtc::new(3 << 30, 1 << 30);
        assert_eq!(word(&mut rtc, 0x15), 640);
        assert_eq!(word(&mut rtc, 0x30), 63 << 10);
        assert_eq!(word(&mut rtc, 0x34), ((3 << 14) - 256) as u16);
        assert_eq!(word(&mut rtc, 0x5b), 1 << 14);
        let mut small = Rtc::new(8 << 20, 0);
        assert_eq!(word(&mut small, 0x17), 7 << 10);
        assert_eq!(word(&mut small, 0x34), 0);
    }

    #[test]
    fn memory_keeps_and_time_does_not() {
        let mut rtc = rtc();
        rtc.select(0x40);
        rtc.write(0x5a);
        assert_eq!(read(&mut rtc, 0x40, LEAP_DAY), 0x5a);
        rtc.select(0x00);
        rtc.write(0x11);
        assert_eq!(read(&mut rtc, 0x00, LEAP_DAY), 0x59);
        assert_eq!(read(&mut rtc, REG_D, LEAP_DAY), 0x80);
    }
}
