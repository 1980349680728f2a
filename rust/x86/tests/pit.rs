// SPDX-License-Identifier: GPL-2.0

//! The interval timer: modes, accesses, latches, the gate and the speaker, expiries, ticks that come late, the state.

use proptest::prelude::*;
use rkvm_x86::line::Signal;
use rkvm_x86::pit::clock::*;
use rkvm_x86::pit::reinject::*;
use rkvm_x86::pit::*;
use std::mem::offset_of;
use std::mem::size_of;

const HIGH: Signal = Signal::High;
const LOW: Signal = Signal::Low;

/// Some time after the clock began.
const T: u64 = 123_456_789_012;

fn out(pit: &mut Pit, port: u16, value: u8, now: u64) -> Timer {
    pit.write(Port::new(port).unwrap(), value, now)
}

fn inb(pit: &mut Pit, port: u16, now: u64) -> u8 {
    pit.read(Port::new(port).unwrap(), now)
}

/// Reads a counter that is set to words.
fn word(pit: &mut Pit, counter: u8, now: u64) -> u16 {
    let port = 0x40 + u16::from(counter);
    u16::from_le_bytes([inb(pit, port, now), inb(pit, port, now)])
}

/// Programs a counter with a word.
fn program(pit: &mut Pit, counter: u8, mode: u8, count: u16, now: u64) {
    let port = 0x40 + u16::from(counter);
    let [low, high] = count.to_le_bytes();
    let _ = out(pit, 0x43, (counter << 6) | 0x30 | (mode << 1), now);
    let _ = out(pit, port, low, now);
    let _ = out(pit, port, high, now);
}

/// A timer whose gate 2 is high.
fn gated() -> Pit {
    let mut pit = Pit::new();
    pit.write_speaker(1, T);
    pit
}

/// The nanosecond in which so many ticks have passed since T.
fn at(ticks: u64) -> u64 {
    T + nanoseconds(ticks)
}

/// What OUT 2 carries in the middle of each tick, `l` for low and `h` for high.
fn wave(pit: &Pit, ticks: std::ops::Range<u64>) -> String {
    ticks
        .map(|t| match pit.out(Counter::Speaker, at(t) + 400) {
            LOW => 'l',
            HIGH => 'h',
        })
        .collect()
}

fn status(pit: &mut Pit, counter: u8, now: u64) -> u8 {
    let _ = out(pit, 0x43, 0xe0 | (2 << counter), now);
    inb(pit, 0x40 + u16::from(counter), now)
}

#[test]
fn ports() {
    let known: Vec<u16> = (0..=0xffff).filter(|&p| Port::new(p).is_some()).collect();
    assert_eq!(known, [0x40, 0x41, 0x42, 0x43]);
    let mut pit = Pit::new();
    assert_eq!(inb(&mut pit, 0x43, T), 0);
}

#[test]
fn time() {
    assert_eq!((ticks(0), nanoseconds(0)), (0, 0));
    assert_eq!(ticks(1_000_000_000), FREQUENCY);
    assert_eq!(nanoseconds(FREQUENCY), 1_000_000_000);
    assert_eq!((ticks(838), ticks(839), nanoseconds(1)), (0, 1, 839));
    // Linux's 1193 ticks a millisecond.
    assert_eq!(nanoseconds(1193), 999_848);
    // No end of the clock is too far.
    let most = ticks(u64::MAX);
    assert_eq!(most, 22_010_322_987_356_910);
    assert!(u64::MAX - nanoseconds(most) < 839);
    assert_eq!(nanoseconds(most + 1), u64::MAX);
    assert_eq!(nanoseconds(u64::MAX), u64::MAX);
}

#[test]
fn a_new_timer() {
    let mut pit = Pit::new();
    assert_eq!(pit.next_expiry(T), None);
    assert_eq!(pit.flags(), Flags::empty());
    let state = pit.state();
    for (i, c) in state.channels.iter().enumerate() {
        let expected = PitChannelState {
            count: 0x1_0000,
            mode: 0xff,
            gate: u8::from(i != 2),
            ..PitChannelState::default()
        };
        assert_eq!(*c, expected);
    }
    for counter in Counter::ALL {
        assert_eq!(pit.out(counter, T), LOW);
    }
    // Without a control word there are bytes to read and write, but nothing counts.
    assert_eq!(inb(&mut pit, 0x40, T), 0);
    assert_eq!(out(&mut pit, 0x40, 7, T), Timer::Changed);
    assert_eq!(pit.next_expiry(T), None);
    assert_eq!(inb(&mut pit, 0x40, at(3)), 0);
}

#[test]
fn mode_0() {
    let mut pit = gated();
    assert_eq!(out(&mut pit, 0x43, 0xb0, T), Timer::Unchanged);
    assert_eq!(wave(&pit, 0..3), "lll", "the control word lowers OUT");
    program(&mut pit, 2, 0, 5, T);
    assert_eq!(wave(&pit, 0..9), "lllllhhhh");
    let shown: Vec<u16> = (0..8).map(|t| word(&mut pit, 2, at(t))).collect();
    assert_eq!(shown, [5, 4, 3, 2, 1, 0, 0xffff, 0xfffe]);
    // The first byte of a new count stops it, the second begins.
    let _ = out(&mut pit, 0x42, 9, at(6));
    assert_eq!(wave(&pit, 6..9), "lll");
    let _ = out(&mut pit, 0x42, 0, at(8));
    assert_eq!(wave(&pit, 8..19), "lllllllllhh");
    // The gate holds it.
    program(&mut pit, 2, 0, 5, T);
    pit.write_speaker(0, at(3));
    assert_eq!(word(&mut pit, 2, at(100)), 2);
    assert_eq!(wave(&pit, 100..102), "ll");
    pit.write_speaker(1, at(100));
    assert_eq!(wave(&pit, 100..104), "llhh");
    // A gate that was low at first.
    pit.write_speaker(0, T);
    program(&mut pit, 2, 0, 5, T);
    assert_eq!(word(&mut pit, 2, at(50)), 5);
    pit.write_speaker(1, at(50));
    assert_eq!(wave(&pit, 50..57), "lllllhh");
}

#[test]
fn mode_1() {
    let mut pit = gated();
    program(&mut pit, 2, 1, 4, T);
    assert_eq!(wave(&pit, 0..8), "hhhhhhhh", "no trigger");
    assert_eq!(status(&mut pit, 2, T), 0x80 | 0x40 | 0x32);
    pit.write_speaker(0, T);
    pit.write_speaker(1, T);
    assert_eq!(wave(&pit, 0..8), "llllhhhh");
    assert_eq!(status(&mut pit, 2, T), 0x32);
    // A gate that falls is nothing; one that rises begins again.
    pit.write_speaker(0, at(2));
    assert_eq!(word(&mut pit, 2, at(3)), 1);
    pit.write_speaker(1, at(3));
    assert_eq!(wave(&pit, 3..9), "llllhh");
    // Nor is one that was high.
    pit.write_speaker(1, at(6));
    assert_eq!(wave(&pit, 6..9), "lhh");
    // A new count waits for the next trigger.
    let _ = out(&mut pit, 0x42, 2, at(5));
    let _ = out(&mut pit, 0x42, 0, at(5));
    assert_eq!(wave(&pit, 5..9), "llhh");
    assert_eq!(status(&mut pit, 2, at(5)) & 0x40, 0x40);
    pit.write_speaker(0, at(10));
    pit.write_speaker(1, at(10));
    assert_eq!(wave(&pit, 10..14), "llhh");
    // A trigger without a count is none.
    let _ = out(&mut pit, 0x43, 0xb2, T);
    pit.write_speaker(0, T);
    pit.write_speaker(1, T);
    assert_eq!(wave(&pit, 0..3), "hhh");
}

#[test]
fn mode_2() {
    for encoding in [2, 6] {
        let mut pit = gated();
        let _ = out(&mut pit, 0x43, 0xb4, T);
        assert_eq!(wave(&pit, 0..3), "hhh");
        program(&mut pit, 2, encoding, 4, T);
        assert_eq!(wave(&pit, 0..12), "hhhlhhhlhhhl");
        let shown: Vec<u16> = (0..6).map(|t| word(&mut pit, 2, at(t))).collect();
        assert_eq!(shown, [4, 3, 2, 1, 4, 3]);
        // A gate that falls raises OUT and stops; one that rises begins anew.
        pit.write_speaker(0, at(7));
        assert_eq!(wave(&pit, 7..9), "hh");
        assert_eq!(word(&mut pit, 2, at(20)), 1);
        pit.write_speaker(1, at(20));
        assert_eq!(wave(&pit, 20..25), "hhhlh");
        assert_eq!(word(&mut pit, 2, at(20)), 4);
        assert_eq!(status(&mut pit, 2, at(20)), 0x80 | 0x34);
    }
}

#[test]
fn mode_3() {
    for encoding in [3, 7] {
        let mut pit = gated();
        program(&mut pit, 2, encoding, 6, T);
        assert_eq!(wave(&pit, 0..12), "hhhlllhhhlll");
        let shown: Vec<u16> = (0..7).map(|t| word(&mut pit, 2, at(t))).collect();
        assert_eq!(shown, [6, 4, 2, 6, 4, 2, 6]);
        // An odd count is high for one more.
        program(&mut pit, 2, encoding, 5, T);
        assert_eq!(wave(&pit, 0..10), "hhhllhhhll");
        let shown: Vec<u16> = (0..6).map(|t| word(&mut pit, 2, at(t))).collect();
        assert_eq!(shown, [4, 2, 0, 4, 2, 4]);
        pit.write_speaker(0, at(4));
        assert_eq!(wave(&pit, 4..6), "hh");
        pit.write_speaker(1, at(6));
        assert_eq!(wave(&pit, 6..11), "hhhll");
        assert_eq!(status(&mut pit, 2, at(6)), 0x80 | 0x36);
    }
}

#[test]
fn mode_4() {
    let mut pit = gated();
    program(&mut pit, 2, 4, 3, T);
    assert_eq!(wave(&pit, 0..8), "hhhlhhhh");
    assert_eq!(word(&mut pit, 2, at(4)), 0xffff);
    pit.write_speaker(0, at(2));
    pit.write_speaker(1, at(10));
    assert_eq!(wave(&pit, 10..14), "hlhh");
}

#[test]
fn mode_5() {
    let mut pit = gated();
    program(&mut pit, 2, 5, 3, T);
    assert_eq!(wave(&pit, 0..8), "hhhhhhhh");
    pit.write_speaker(0, T);
    pit.write_speaker(1, T);
    assert_eq!(wave(&pit, 0..8), "hhhlhhhh");
    pit.write_speaker(0, at(2));
    pit.write_speaker(1, at(2));
    assert_eq!(wave(&pit, 2..8), "hhhlhh");
}

#[test]
fn zero_is_the_greatest_count() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 0, T);
    assert_eq!(pit.state().channels[0].count, 0x1_0000);
    assert_eq!(word(&mut pit, 0, T), 0);
    assert_eq!(word(&mut pit, 0, at(1)), 0xffff);
    let expiry = pit.next_expiry(T).unwrap();
    assert_eq!(expiry.at, at(0x1_0000));
    assert_eq!(expiry.period, Some(nanoseconds(0x1_0000)));
}

#[test]
fn decimal() {
    let mut pit = gated();
    let _ = out(&mut pit, 0x43, 0xb1, T);
    for byte in [0x34, 0x12] {
        let _ = out(&mut pit, 0x42, byte, T);
    }
    assert_eq!(word(&mut pit, 2, T), 0x1234);
    assert_eq!(word(&mut pit, 2, at(35)), 0x1199);
    assert_eq!(word(&mut pit, 2, at(1234)), 0);
    assert_eq!(word(&mut pit, 2, at(1235)), 0x9999);
    assert_eq!(word(&mut pit, 2, at(1234 + 20_000)), 0);
    assert_eq!(
        (
            pit.out(Counter::Speaker, at(1233)),
            pit.out(Counter::Speaker, at(1234))
        ),
        (LOW, HIGH)
    );
    assert_eq!(status(&mut pit, 2, at(1234)), 0x80 | 0x31);
    // Zero is ten thousand.
    let _ = out(&mut pit, 0x43, 0x35, T);
    for byte in [0, 0] {
        let _ = out(&mut pit, 0x40, byte, T);
    }
    assert_eq!(pit.next_expiry(T).unwrap().at, at(10_000));
    assert_eq!(word(&mut pit, 0, T), 0);
    assert_eq!(word(&mut pit, 0, at(1)), 0x9999);
    assert_eq!(pit.state().channels[0].bcd, 1);
}

#[test]
fn bytes() {
    let mut pit = gated();
    // The low byte only: the high one is zero.
    let _ = out(&mut pit, 0x43, 0x94, T);
    let _ = out(&mut pit, 0x42, 0x80, T);
    assert_eq!(pit.state().channels[2].count, 0x80);
    assert_eq!(inb(&mut pit, 0x42, T), 0x80);
    assert_eq!(inb(&mut pit, 0x42, at(1)), 0x7f);
    // The high byte only.
    let _ = out(&mut pit, 0x43, 0xa4, T);
    let _ = out(&mut pit, 0x42, 0x80, T);
    assert_eq!(pit.state().channels[2].count, 0x8000);
    assert_eq!(inb(&mut pit, 0x42, T), 0x80);
    assert_eq!(inb(&mut pit, 0x42, at(1)), 0x7f);
    // Both, in turn. A control word begins with the low one.
    program(&mut pit, 2, 2, 0x1234, T);
    assert_eq!(inb(&mut pit, 0x42, T), 0x34);
    program(&mut pit, 2, 2, 0x5678, T);
    assert_eq!(inb(&mut pit, 0x42, T), 0x78);
    assert_eq!(inb(&mut pit, 0x42, T), 0x56);
    // Half a count is none, but in mode 0.
    let _ = out(&mut pit, 0x42, 0xff, T);
    assert_eq!(word(&mut pit, 2, T), 0x5678);
    let state = pit.state().channels[2];
    assert_eq!((state.write_state, state.write_latch), (4, 0xff));
    assert_eq!((state.read_state, state.rw_mode, state.mode), (3, 3, 2));
    // A control word stops the counter until it gets a count.
    assert_eq!(out(&mut pit, 0x43, 0x34, T), Timer::Changed);
    assert_eq!(pit.next_expiry(T), None);
    assert_eq!(out(&mut pit, 0x40, 1, T), Timer::Unchanged);
    assert_eq!(out(&mut pit, 0x40, 1, T), Timer::Changed);
    assert!(pit.next_expiry(T).is_some());
}

#[test]
fn counts_are_latched() {
    let mut pit = gated();
    program(&mut pit, 2, 2, 0x1000, T);
    let _ = out(&mut pit, 0x43, 0x80, at(1));
    // The second is ignored until the first is read.
    let _ = out(&mut pit, 0x43, 0x80, at(500));
    let state = pit.state().channels[2];
    assert_eq!((state.latched_count, state.count_latched), (0xfff, 3));
    assert_eq!(inb(&mut pit, 0x42, at(501)), 0xff);
    assert_eq!(pit.state().channels[2].count_latched, 2);
    let _ = out(&mut pit, 0x43, 0x80, at(502));
    assert_eq!(inb(&mut pit, 0x42, at(503)), 0x0f);
    assert_eq!(pit.state().channels[2].count_latched, 0);
    assert_eq!(word(&mut pit, 2, at(3)), 0xffd);
    // One byte of it, if that is what was chosen.
    for (control, byte) in [(0x94, 0x34), (0xa4, 0x12)] {
        program(&mut pit, 2, 2, 0, T);
        let _ = out(&mut pit, 0x43, control, T);
        let _ = out(&mut pit, 0x42, byte, T);
        let _ = out(&mut pit, 0x43, 0x80, T);
        assert_eq!(inb(&mut pit, 0x42, at(1)), byte);
        assert_eq!(inb(&mut pit, 0x42, at(1)), byte - 1);
    }
    // Until the counter is programmed.
    program(&mut pit, 2, 2, 0x1000, T);
    let _ = out(&mut pit, 0x43, 0x80, at(1));
    program(&mut pit, 2, 2, 0x2000, T);
    assert_eq!(word(&mut pit, 2, at(2)), 0x1ffe);
    // There is nothing to latch before the first control word.
    let _ = out(&mut pit, 0x43, 0x00, T);
    assert_eq!(pit.state().channels[0].count_latched, 0);
}

#[test]
fn read_back() {
    let mut pit = gated();
    for counter in 0..3 {
        program(&mut pit, counter, 3, 0x100 << counter, T);
    }
    // Counts and statuses of 0 and 2.
    assert_eq!(out(&mut pit, 0x43, 0xca, at(0x90)), Timer::Unchanged);
    let state = pit.state().channels;
    let latched = |c: &PitChannelState| (c.status_latched, c.count_latched);
    assert_eq!(state.each_ref().map(latched), [(1, 3), (0, 0), (1, 3)]);
    assert_eq!((state[0].status, state[2].status), (0x36, 0xb6));
    // The status comes first.
    assert_eq!(inb(&mut pit, 0x40, T), 0x36);
    assert_eq!(word(&mut pit, 0, T), 0x100 - 2 * (0x90 - 0x80));
    assert_eq!(inb(&mut pit, 0x42, T), 0xb6);
    assert_eq!(word(&mut pit, 2, T), 0x400 - 2 * 0x90);
    // A count only, of 1; a status only, which is kept.
    let _ = out(&mut pit, 0x43, 0xd4, at(1));
    let _ = out(&mut pit, 0x43, 0xe8, at(1));
    let _ = out(&mut pit, 0x43, 0xe8, at(0x300));
    let state = pit.state().channels;
    assert_eq!(state.each_ref().map(latched), [(0, 0), (0, 3), (1, 0)]);
    assert_eq!(inb(&mut pit, 0x42, at(0x300)), 0xb6);
    // Neither.
    let before = pit.clone();
    let _ = out(&mut pit, 0x43, 0xfe, T);
    let _ = out(&mut pit, 0x43, 0xc0, T);
    assert_eq!(pit, before);
    // The null count, until there is one.
    let _ = out(&mut pit, 0x43, 0x30, T);
    assert_eq!(status(&mut pit, 0, T), 0x70);
    let _ = out(&mut pit, 0x40, 1, T);
    assert_eq!(status(&mut pit, 0, T), 0x70);
    let _ = out(&mut pit, 0x40, 1, T);
    assert_eq!(status(&mut pit, 0, T), 0x30);
}

#[test]
fn the_speaker() {
    let mut pit = Pit::new();
    let refresh = |now: u64| ((now >> 14) & 1) as u8 * 0x10;
    assert_eq!(pit.read_speaker(0), 0);
    assert_eq!(pit.read_speaker(1 << 14), 0x10, "memory is refreshed");
    assert_eq!(pit.read_speaker(2 << 14), 0);
    pit.write_speaker(0xff, T);
    assert_eq!(pit.read_speaker(T), 3 | refresh(T));
    assert_eq!(pit.flags(), Flags::SPEAKER_DATA_ON);
    assert_eq!(pit.state().flags, 2);
    assert_eq!(pit.state().channels[2].gate, 1);
    pit.write_speaker(2, T);
    assert_eq!(pit.read_speaker(T), 2 | refresh(T));
    pit.write_speaker(1, T);
    assert_eq!(pit.read_speaker(T), 1 | refresh(T));
    // As Linux calibrates its clock: mode 0, and wait for OUT.
    program(&mut pit, 2, 0, 1000, T);
    assert_eq!(pit.read_speaker(at(999)) & 0x20, 0);
    assert_eq!(pit.read_speaker(at(1000)) & 0x20, 0x20);
}

#[test]
fn expiries() {
    let mut pit = Pit::new();
    // Once.
    program(&mut pit, 0, 0, 100, T);
    let once = Expiry {
        at: at(100),
        period: None,
    };
    assert_eq!(pit.next_expiry(T), Some(once));
    assert_eq!(pit.next_expiry(at(100) - 1), Some(once));
    assert_eq!(pit.next_expiry(at(100)), None);
    assert_eq!(pit.expiries(T, at(100) - 1), 0);
    assert_eq!(pit.expiries(T, at(1_000_000)), 1);
    assert_eq!(pit.expiries(at(100), at(1_000_000)), 0);
    program(&mut pit, 0, 4, 100, T);
    let once = Expiry {
        at: at(101),
        period: None,
    };
    assert_eq!(pit.next_expiry(T), Some(once));
    assert_eq!(pit.expiries(T, at(500)), 1);
    // Again and again, without drifting.
    for mode in [2, 3] {
        program(&mut pit, 0, mode, 11_932, T);
        let mut now = T;
        for n in 1..1000 {
            let expiry = pit.next_expiry(now).unwrap();
            assert_eq!(expiry.at, at(n * 11_932));
            assert_eq!(expiry.period, Some(nanoseconds(11_932)));
            now = expiry.at;
        }
        assert_eq!(pit.expiries(T, now), 999);
        assert_eq!(pit.expiries(at(11_932), now), 998);
        assert_eq!(pit.expiries(now, T), 0);
    }
    // A trigger that never comes.
    for mode in [1, 5] {
        program(&mut pit, 0, mode, 100, T);
        assert_eq!((pit.next_expiry(T), pit.expiries(T, at(1000))), (None, 0));
    }
    // Linux stops it with a count that nobody waits for; a control word stops it too.
    program(&mut pit, 0, 2, 100, T);
    assert_eq!(out(&mut pit, 0x43, 0x30, T), Timer::Changed);
    assert_eq!(pit.next_expiry(T), None);
    // Other counters are nobody's timer.
    for (port, value) in [(0x43, 0x74), (0x41, 1), (0x41, 1), (0x43, 0xb4), (0x42, 1)] {
        assert_eq!(out(&mut pit, port, value, T), Timer::Unchanged);
    }
    // A clock before the start.
    program(&mut pit, 0, 2, 100, T);
    assert_eq!(pit.next_expiry(0).unwrap().at, at(100));
    // A clock at its end.
    program(&mut pit, 0, 2, 100, u64::MAX);
    assert_eq!(pit.next_expiry(u64::MAX).unwrap().at, u64::MAX);
}

#[test]
fn the_hpet_takes_its_place() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 100, T);
    let mut state = pit.state();
    state.flags = Flags::HPET_LEGACY.bits();
    assert_eq!(pit.set_state(&state, T), Timer::Changed);
    assert_eq!((pit.next_expiry(T), pit.expiries(T, at(1000))), (None, 0));
    assert_eq!(pit.state().flags, 1);
    // It counts all the same, and may be programmed.
    assert_eq!(word(&mut pit, 0, at(1)), 99);
    program(&mut pit, 0, 2, 200, T);
    assert_eq!(pit.next_expiry(T), None);
    // KVM_SET_PIT leaves the flags.
    let _ = pit.set_channels(&pit.state().channels, T);
    assert_eq!(pit.flags(), Flags::HPET_LEGACY);
    state = pit.state();
    state.flags = 0;
    let _ = pit.set_state(&state, T);
    assert_eq!(pit.next_expiry(T).unwrap().at, at(200));
}

#[test]
fn ticks_are_sent_one_at_a_time() {
    let mut ticks = Reinject::new();
    assert_eq!((ticks.policy(), ticks.pending()), (Policy::Reinject, 0));
    assert_eq!(ticks.expired(0), Tick::Hold);
    assert_eq!(ticks.expired(1), Tick::Pulse);
    assert_eq!(ticks.acknowledged(), Tick::Hold);
    assert_eq!(ticks.pending(), 0);
    // The guest is late.
    assert_eq!(ticks.expired(1), Tick::Pulse);
    assert_eq!(ticks.expired(1), Tick::Hold);
    assert_eq!(ticks.expired(3), Tick::Hold);
    assert_eq!(ticks.pending(), 5);
    for _ in 0..4 {
        assert_eq!(ticks.acknowledged(), Tick::Pulse);
    }
    assert_eq!((ticks.acknowledged(), ticks.pending()), (Tick::Hold, 0));
    // One that nobody expected, as for the interrupt of another on the same input.
    assert_eq!((ticks.acknowledged(), ticks.pending()), (Tick::Hold, 0));
    assert_eq!(ticks.expired(1), Tick::Pulse);
    ticks.reset();
    assert_eq!(ticks, Reinject::default());
    assert_eq!(ticks.expired(1), Tick::Pulse);
    assert_eq!(ticks.expired(u64::MAX), Tick::Hold);
    assert_eq!(ticks.expired(u64::MAX), Tick::Hold);
    assert_eq!(ticks.pending(), u32::MAX);
}

#[test]
fn or_they_are_lost() {
    let mut ticks = Reinject::new();
    let _ = ticks.expired(3);
    ticks.set_policy(Policy::Reinject);
    assert_eq!(ticks.pending(), 3, "no change");
    ticks.set_policy(Policy::Discard);
    assert_eq!((ticks.policy(), ticks.pending()), (Policy::Discard, 0));
    for _ in 0..3 {
        assert_eq!(ticks.expired(2), Tick::Pulse);
    }
    assert_eq!((ticks.acknowledged(), ticks.pending()), (Tick::Hold, 0));
    assert_eq!(ticks.expired(0), Tick::Hold);
    ticks.set_policy(Policy::Reinject);
    assert_eq!(ticks, Reinject::new());
}

#[test]
fn the_layout_is_that_of_the_abi() {
    assert_eq!(size_of::<PitChannelState>(), 24);
    assert_eq!(size_of::<PitState2>(), 112);
    assert_eq!(offset_of!(PitChannelState, latched_count), 4);
    let bytes = [
        offset_of!(PitChannelState, count_latched),
        offset_of!(PitChannelState, status_latched),
        offset_of!(PitChannelState, status),
        offset_of!(PitChannelState, read_state),
        offset_of!(PitChannelState, write_state),
        offset_of!(PitChannelState, write_latch),
        offset_of!(PitChannelState, rw_mode),
        offset_of!(PitChannelState, mode),
        offset_of!(PitChannelState, bcd),
        offset_of!(PitChannelState, gate),
    ];
    assert!(bytes.into_iter().eq(6..16));
    assert_eq!(offset_of!(PitChannelState, count_load_time), 16);
    assert_eq!(offset_of!(PitState2, flags), 72);
}

#[test]
fn state_goes_out_and_in() {
    let mut pit = gated();
    program(&mut pit, 0, 2, 11_932, T);
    program(&mut pit, 1, 0, 18, T);
    program(&mut pit, 2, 3, 0x533, T);
    let _ = out(&mut pit, 0x43, 0xc8, at(5));
    let _ = inb(&mut pit, 0x40, at(5));
    let _ = out(&mut pit, 0x41, 0x77, at(5));
    pit.write_speaker(3, at(5));
    let state = pit.state();
    assert_eq!(state.channels[0].count_load_time, T as i64);
    assert_eq!(state.channels[0].read_state, 4);
    assert_eq!(state.channels[1].write_latch, 0x77);
    assert_eq!(state.flags, 2);

    let later = at(1_000_000);
    let mut copy = Pit::new();
    assert_eq!(copy.set_state(&state, later), Timer::Changed);
    let expiry = copy.next_expiry(later).unwrap();
    assert_eq!(expiry.at, later + nanoseconds(11_932), "it begins anew");
    let mut expected = state;
    for channel in &mut expected.channels {
        channel.count_load_time = later as i64;
    }
    assert_eq!(copy.state(), expected);
    assert_eq!(inb(&mut copy, 0x42, later), 0xb6, "the latched status");
    assert_eq!(word(&mut copy, 2, later), 0x532 - 10, "the latched count");
    // The gates of the others are not to be moved.
    let mut low = state;
    for channel in &mut low.channels {
        channel.gate = 0;
    }
    let _ = copy.set_state(&low, later);
    assert_eq!(copy.state().channels.map(|c| c.gate), [1, 1, 0]);
    assert!(copy.next_expiry(later).is_some());
}

#[test]
fn a_state_may_be_anything() {
    let worst = PitChannelState {
        count: u32::MAX,
        latched_count: 0xabcd,
        count_latched: 0xff,
        status_latched: 0xff,
        status: 0xff,
        read_state: 0xff,
        write_state: 0xff,
        write_latch: 0xff,
        rw_mode: 0xff,
        mode: 6,
        bcd: 0xff,
        gate: 0xff,
        count_load_time: i64::MIN,
    };
    let mut pit = Pit::new();
    let state = PitState2 {
        channels: [worst; 3],
        flags: u32::MAX,
        reserved: [u32::MAX; 9],
    };
    assert_eq!(pit.set_state(&state, T), Timer::Changed);
    let state = pit.state();
    let channel = PitChannelState {
        count: 0xffff,
        latched_count: 0xabcd,
        count_latched: 1,
        status_latched: 1,
        status: 0xff,
        read_state: 0,
        write_state: 0,
        write_latch: 0xff,
        rw_mode: 3,
        mode: 0xff,
        bcd: 1,
        gate: 1,
        count_load_time: 0,
    };
    assert_eq!(state.channels, [channel; 3]);
    assert_eq!((state.flags, state.reserved), (u32::MAX, [0; 9]));
    assert_eq!(inb(&mut pit, 0x41, T), 0xff);
    assert_eq!(inb(&mut pit, 0x41, T), 0xcd);
}

#[derive(Clone, Debug)]
enum Action {
    Write(u16, u8),
    Read(u16),
    Speaker(u8),
    Pass(u64),
    Migrate,
}

fn action() -> impl Strategy<Value = Action> {
    let value = prop_oneof![Just(0), 0u8..8, any::<u8>()];
    let time = prop_oneof![0u64..3000, 0u64..100_000_000, any::<u64>()];
    prop_oneof![
        6 => (0x40u16..0x44, value).prop_map(|(port, value)| Action::Write(port, value)),
        2 => (0x40u16..0x44).prop_map(Action::Read),
        1 => any::<u8>().prop_map(Action::Speaker),
        2 => time.prop_map(Action::Pass),
        1 => Just(Action::Migrate),
    ]
}

proptest! {
    #[test]
    fn ticks_and_nanoseconds_agree(count in 0..22_010_322_987_356_910u64, ns: u64) {
        prop_assert_eq!(ticks(nanoseconds(count)), count);
        prop_assert!(count == 0 || ticks(nanoseconds(count) - 1) == count - 1);
        let exact = u128::from(ns) * u128::from(FREQUENCY) / 1_000_000_000;
        prop_assert_eq!(u128::from(ticks(ns)), exact);
        prop_assert!(nanoseconds(ticks(ns)) <= ns);
    }

    /// OUT rises at an expiry, and is high from it. The model against itself, tick by tick.
    #[test]
    fn expiries_are_where_out_rises(
        mode in prop::sample::select(&[0u8, 2, 3, 4][..]), count in 2u16..300, from in 0u64..2000, start in 0..T,
    ) {
        let mut pit = Pit::new();
        program(&mut pit, 0, mode, count, start);
        let now = start + nanoseconds(from);
        let rises: Vec<u64> = (from + 1..from + 700)
            .map(|t| start + nanoseconds(t))
            .filter(|&t| {
                let (before, after) = (pit.out(Counter::Irq, t - 1), pit.out(Counter::Irq, t));
                (before, after) == (LOW, HIGH)
            })
            .collect();
        let expiry = pit.next_expiry(now);
        prop_assert_eq!(expiry.map(|e| e.at), rises.first().copied());
        let end = start + nanoseconds(from + 699);
        prop_assert_eq!(pit.expiries(now, end), rises.len() as u64);
        prop_assert!(mode == 2 || mode == 3 || expiry.is_none_or(|e| e.period.is_none()));
    }

    /// Each counter shows what a counter would that counts.
    #[test]
    fn counting_down(
        mode in prop::sample::select(&[0u8, 2, 4][..]), decimal: bool, count in 1u16..200, start in 0..T,
    ) {
        let mut pit = gated();
        let digits = |n: u64|
            (n % 10) | ((n / 10 % 10) << 4) | ((n / 100 % 10) << 8) | ((n / 1000) << 12);
        let shown = |n: u64| if decimal { digits(n) } else { n };
        let _ = out(&mut pit, 0x43, 0xb0 | (mode << 1) | u8::from(decimal), start);
        for byte in (shown(count.into()) as u16).to_le_bytes() {
            let _ = out(&mut pit, 0x42, byte, start);
        }
        let mut left = u64::from(count);
        for t in 0..500 {
            let now = start + nanoseconds(t);
            prop_assert_eq!(u64::from(word(&mut pit, 2, now)), shown(left));
            left = match left {
                1 if mode == 2 => count.into(),
                0 if decimal => 9999,
                0 => 0xffff,
                left => left - 1,
            };
        }
    }

    #[test]
    fn invariants(actions in prop::collection::vec(action(), 0..200)) {
        let mut pit = Pit::new();
        let mut now = T;
        for action in actions {
            let before = pit.next_expiry(now);
            match action {
                Action::Write(port, value) => {
                    if out(&mut pit, port, value, now) == Timer::Unchanged {
                        prop_assert_eq!(pit.next_expiry(now), before);
                    }
                }
                Action::Read(port) => {
                    let _ = inb(&mut pit, port, now);
                    prop_assert_eq!(pit.next_expiry(now), before);
                }
                Action::Speaker(value) => {
                    pit.write_speaker(value, now);
                    prop_assert_eq!(pit.read_speaker(now) & 0xc3, value & 3);
                    prop_assert_eq!(pit.next_expiry(now), before);
                }
                Action::Pass(ns) => now = now.saturating_add(ns),
                Action::Migrate => {
                    let state = pit.state();
                    let mut copy = Pit::new();
                    let _ = copy.set_state(&state, now);
                    let timeless = |mut s: PitState2| {
                        s.channels.iter_mut().for_each(|c| c.count_load_time = 0);
                        s
                    };
                    prop_assert_eq!(timeless(copy.state()), timeless(state));
                }
            }
            if let Some(expiry) = pit.next_expiry(now) {
                prop_assert!(expiry.at > now || expiry.at == u64::MAX);
                prop_assert!(expiry.at == u64::MAX || pit.expiries(now, expiry.at) == 1);
                prop_assert_eq!(pit.expiries(now, expiry.at - 1), 0);
                prop_assert!(expiry.period.is_none_or(|p| p >= nanoseconds(1)));
            }
            for c in pit.state().channels {
                prop_assert!((1..=0x1_0000).contains(&c.count));
                prop_assert!(c.mode < 6 || c.mode == 0xff);
                prop_assert!(c.rw_mode < 4 && c.read_state < 5 && c.write_state < 5 && c.count_latched < 4);
            }
        }
    }

    #[test]
    fn ticks_are_neither_lost_nor_made(events in prop::collection::vec(prop::option::of(0u64..4), 0..200)) {
        let mut ticks = Reinject::new();
        let (mut expired, mut sent, mut in_flight) = (0, 0u64, false);
        for event in events {
            let tick = match event {
                Some(times) => {
                    expired += times;
                    ticks.expired(times)
                }
                None if !in_flight => continue,
                None => {
                    in_flight = false;
                    ticks.acknowledged()
                }
            };
            if tick == Tick::Pulse {
                prop_assert!(!in_flight);
                in_flight = true;
                sent += 1;
            }
            let unsent = u64::from(ticks.pending()) - u64::from(in_flight);
            prop_assert_eq!(sent + unsent, expired);
            prop_assert!(in_flight || unsent == 0, "none waits for nothing");
        }
    }
}
