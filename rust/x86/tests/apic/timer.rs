// SPDX-License-Identifier: GPL-2.0

//! The timer: arithmetic, modes, extremes.

use crate::board::*;
use rkvm_x86::apic::regs::Lvt;
use rkvm_x86::apic::regs::TimerModes;
use rkvm_x86::apic::timer::*;
use rkvm_x86::apic::view::Delivered;
use rkvm_x86::apic::Effect;

fn timer(bus: u64, mode: TimerMode) -> Timer {
    let mut timer = Timer::new(BusPeriod::new(bus).unwrap());
    timer.set_mode(mode);
    timer
}

const fn at(ns: u64) -> Now {
    Now { ns, tsc: 0 }
}

const fn tsc(tsc: u64) -> Now {
    Now { ns: 0, tsc }
}

const fn fired(next: u64) -> Expiry {
    Expiry::Fired {
        next: Some(Deadline::Ns(next)),
    }
}

const DONE: Expiry = Expiry::Fired { next: None };
const MAX_BUS: u64 = u64::MAX / (128 * u32::MAX as u64);

#[test]
fn divisors() {
    for (bits, divisor) in [
        (0, 2),
        (1, 4),
        (2, 8),
        (3, 16),
        (8, 32),
        (9, 64),
        (10, 128),
        (11, 1),
    ] {
        assert_eq!(Divide::new(bits).divisor(), divisor);
        assert_eq!(Divide::new(bits | !Divide::MASK), Divide::new(bits));
    }
    assert_eq!(Divide::default().divisor(), 2);
}

#[test]
fn modes_of_the_entry() {
    use TimerMode::*;
    for (bits, full, basic) in [
        (0, OneShot, OneShot),
        (1, Periodic, Periodic),
        (2, TscDeadline, OneShot),
        (3, Reserved, Periodic),
    ] {
        let lvt = Lvt::new((bits << 17) | 0x1_00ff);
        assert_eq!(TimerMode::new(lvt, TimerModes::WithTscDeadline), full);
        assert_eq!(TimerMode::new(lvt, TimerModes::Counters), basic);
    }
}

#[test]
fn periods_of_the_bus() {
    assert_eq!(BusPeriod::new(0), None);
    assert_eq!(BusPeriod::new(MAX_BUS + 1), None);
    assert_eq!(BusPeriod::new(u64::MAX), None);
    assert!(BusPeriod::new(MAX_BUS).is_some());
    assert_eq!(BusPeriod::new(1), Some(BusPeriod::DEFAULT));
}

#[test]
fn one_shot() {
    let mut t = timer(10, TimerMode::OneShot);
    assert_eq!((t.next_expiry(), t.expire(&at(5))), (None, Expiry::Stopped));
    t.start(100, 1000);
    let end = Deadline::Ns(3000);
    assert_eq!(t.next_expiry(), Some(end));
    for (now, count) in [
        (0, 100),
        (1000, 100),
        (1001, 100),
        (1020, 99),
        (2980, 1),
        (2999, 1),
        (3000, 0),
        (u64::MAX, 0),
    ] {
        assert_eq!(t.current_count(now), count, "{now}");
    }
    assert_eq!(t.expire(&at(2999)), Expiry::Pending(end));
    assert_eq!(t.expire(&at(3000)), DONE);
    assert_eq!(t.expire(&at(3000)), Expiry::Stopped);
    assert_eq!((t.current_count(3000), t.initial()), (0, 100));
    // 0 stops it.
    t.start(100, 1000);
    t.start(0, 1500);
    assert_eq!((t.next_expiry(), t.current_count(1500)), (None, 0));
}

#[test]
fn periodic() {
    let mut t = timer(1, TimerMode::Periodic);
    t.set_divide(Divide::new(0xb), 0);
    t.start(100, 1000);
    assert_eq!(t.current_count(1099), 1);
    assert_eq!(t.current_count(1100), 100, "it begins again, seen or not");
    assert_eq!(t.current_count(1350), 50);
    assert_eq!(t.expire(&at(1100)), fired(1200));
    // Late: once, and in step.
    assert_eq!(t.expire(&at(1250)), fired(1300));
    assert_eq!(t.expire(&at(1900)), fired(2000));
    assert_eq!(t.expire(&at(1950)), Expiry::Pending(Deadline::Ns(2000)));
    // To one-shot and back: it runs on.
    t.set_mode(TimerMode::OneShot);
    assert_eq!(t.current_count(1950), 50);
    assert_eq!(t.expire(&at(2001)), DONE);
    t.set_mode(TimerMode::Periodic);
    assert_eq!((t.current_count(2001), t.next_expiry()), (0, None));
    t.start(100, 3000);
    t.set_mode(TimerMode::Reserved);
    assert_eq!(t.next_expiry(), None);
    t.start(100, 3000);
    assert_eq!((t.next_expiry(), t.initial()), (None, 100));
}

#[test]
fn tsc_deadline() {
    let mut t = timer(1, TimerMode::OneShot);
    t.set_deadline(500);
    assert_eq!((t.deadline(), t.next_expiry()), (0, None), "another mode");
    t.start(50, 0);
    t.set_mode(TimerMode::TscDeadline);
    assert_eq!((t.next_expiry(), t.initial()), (None, 0), "disarmed");
    t.start(50, 0);
    assert_eq!((t.initial(), t.current_count(0)), (0, 0), "ignored");
    t.set_deadline(500);
    assert_eq!(t.next_expiry(), Some(Deadline::Tsc(500)));
    assert_eq!(t.expire(&tsc(499)), Expiry::Pending(Deadline::Tsc(500)));
    assert_eq!(t.expire(&tsc(500)), DONE);
    assert_eq!((t.deadline(), t.expire(&tsc(501))), (0, Expiry::Stopped));
    t.set_deadline(u64::MAX);
    assert_eq!(t.expire(&tsc(u64::MAX)), DONE);
    t.set_deadline(5);
    t.set_deadline(0);
    assert_eq!(t.next_expiry(), None);
    t.set_deadline(5);
    t.set_mode(TimerMode::TscDeadline);
    assert_eq!(t.deadline(), 5, "no change");
    t.set_mode(TimerMode::Periodic);
    assert_eq!((t.deadline(), t.next_expiry()), (0, None));
}

#[test]
fn the_divisor_changes_on_the_way() {
    let mut t = timer(1, TimerMode::Periodic);
    t.start(1000, 0);
    assert_eq!(t.current_count(500), 750);
    for bits in [0xb, 0xa, 3, 0] {
        t.set_divide(Divide::new(bits), 500);
        assert_eq!(t.current_count(500), 750, "{bits:#x}");
    }
    t.set_divide(Divide::new(0xb), 500);
    assert_eq!(t.expire(&at(1250)), fired(2250));
    t.start(0, 0);
    t.set_divide(Divide::new(0), 10);
    assert_eq!(t.next_expiry(), None);
}

#[test]
fn extremes() {
    let mut t = timer(MAX_BUS, TimerMode::Periodic);
    t.set_divide(Divide::new(0xa), 0);
    t.start(u32::MAX, 0);
    assert_eq!(t.current_count(0), u32::MAX);
    assert_eq!(
        t.next_expiry(),
        Some(Deadline::Ns(MAX_BUS * 128 * u64::from(u32::MAX)))
    );
    for now in [0, 1, u64::MAX / 2, u64::MAX - 1, u64::MAX] {
        t.start(u32::MAX, now);
        assert_eq!(t.current_count(now) > 0, now < u64::MAX);
        for bits in 0..16 {
            t.set_divide(Divide::new(bits), now);
            t.set_divide(Divide::new(bits), 0);
            t.set_divide(Divide::new(bits), u64::MAX);
            let _ = (t.current_count(u64::MAX), t.expire(&at(u64::MAX)));
        }
    }
    // The shortest period.
    let mut t = timer(1, TimerMode::Periodic);
    t.set_divide(Divide::new(0xb), 0);
    t.start(1, 10);
    assert_eq!(t.expire(&at(11)), fired(12));
    assert_eq!(t.expire(&at(1 << 60)), fired((1 << 60) + 1));
    // A clock that goes backwards is no catastrophe.
    assert_eq!(t.current_count(0), 1);
    assert_eq!(
        t.expire(&at(0)),
        Expiry::Pending(Deadline::Ns((1 << 60) + 1))
    );
}

#[test]
fn a_restored_count() {
    let restored = |mode, initial, current| {
        let mut t = timer(1, mode);
        t.set_divide(Divide::new(0xb), 0);
        t.restore(initial, current, 1000);
        t.next_expiry()
    };
    let ns = |ns| Some(Deadline::Ns(ns));
    assert_eq!(restored(TimerMode::OneShot, 100, 30), ns(1030));
    assert_eq!(restored(TimerMode::OneShot, 100, 0), ns(1000));
    assert_eq!(restored(TimerMode::Periodic, 100, 0), ns(1100));
    assert_eq!(restored(TimerMode::Periodic, 100, 500), ns(1100));
    assert_eq!(restored(TimerMode::Periodic, 0, 500), None);
    assert_eq!(restored(TimerMode::TscDeadline, 100, 50), None);
    assert_eq!(restored(TimerMode::Reserved, 100, 50), None);
}

#[test]
fn the_registers_of_the_timer() {
    let page = Page::default();
    let mut apic = xapic(&page, 0);
    let _ = write(&mut apic, 0x3e0, 0xb);
    let _ = write(&mut apic, 0x320, 0x2_0066);
    assert_eq!(write(&mut apic, 0x380, 1000), Effect::Timer);
    assert_eq!(
        apic.timer().next_expiry(),
        Some(Deadline::Ns(after(1000).ns))
    );
    assert_eq!(apic.mmio_read(0x390, 4, &after(250)), Some(750));
    let early = (
        Expiry::Pending(Deadline::Ns(after(1000).ns)),
        Delivered::Dropped,
    );
    assert_eq!(apic.run_timer(&after(999)), early);
    let now = (fired(after(2000).ns), Delivered::Queued);
    assert_eq!(apic.run_timer(&after(1000)), now);
    assert_eq!(vectors(&page, IRR), [0x66]);
    // Masked, it counts all the same.
    let _ = write(&mut apic, 0x320, 0x3_0066);
    let now = (fired(after(3000).ns), Delivered::Dropped);
    assert_eq!(apic.run_timer(&after(2000)), now);

    assert_eq!(apic.set_tsc_deadline(7), Effect::None);
    let _ = write(&mut apic, 0x320, 0x4_0067);
    assert_eq!((read(&mut apic, 0x380), read(&mut apic, 0x390)), (0, 0));
    let _ = write(&mut apic, 0x380, 5);
    assert_eq!(read(&mut apic, 0x380), 0);
    assert_eq!(apic.set_tsc_deadline(T0.tsc), Effect::Timer);
    assert_eq!(apic.tsc_deadline(), T0.tsc);
    assert_eq!(apic.run_timer(&T0), (DONE, Delivered::Queued));
    assert_eq!(apic.tsc_deadline(), 0);
    assert_eq!(vectors(&page, IRR), [0x66, 0x67]);

    let _ = apic.set_tsc_deadline(9);
    let _ = apic.set_base(0xfee0_0000, &features(), false).unwrap();
    assert_eq!(apic.tsc_deadline(), 0);
    assert_eq!(apic.set_tsc_deadline(8), Effect::None);
}
