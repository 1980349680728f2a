// SPDX-License-Identifier: GPL-2.0

//! Registers: where they exist, what they hold, what writing them leaves to do.

use crate::board::*;
use rkvm_x86::apic::base::ApicMode;
use rkvm_x86::apic::events::ApicEvent;
use rkvm_x86::apic::message::*;
use rkvm_x86::apic::page::ApicPage;
use rkvm_x86::apic::regs::*;
use rkvm_x86::apic::timer::TimerMode;
use rkvm_x86::apic::view::Delivered;
use rkvm_x86::apic::*;
use rkvm_x86::msr::Msr;
use rkvm_x86::msr::MsrError;

#[test]
fn each_register_is_where_it_says() {
    for offset in (0..0x400).step_by(16) {
        if let Some(reg) = Reg::at(offset) {
            assert_eq!(reg.offset(), offset);
        }
    }
    for offset in [0, 0x10, 0x40, 0xc0, 0x290, 0x2e0, 0x3a0, 0x400, 0xff0] {
        assert_eq!(Reg::at(offset), None, "{offset:#x}");
    }
}

/// Offset, what a write of all ones leaves in xAPIC mode, and in x2APIC mode the bits that do not fault. None: not writable there.
const WRITABLE: &[(u16, Option<u32>, Option<u32>)] = &[
    (0x20, Some(0xff00_0000), None),
    (0x30, None, None),
    (0x80, Some(0xff), Some(0xff)),
    (0x90, None, None),
    (0xa0, None, None),
    (0xd0, Some(0xff00_0000), None),
    (0xe0, Some(0xffff_ffff), None),
    (0xf0, Some(0x13ff), Some(0x13ff)),
    (0x2f0, Some(0x1_07ff), Some(0x1_17ff)),
    (0x310, Some(0xff00_0000), None),
    (0x320, Some(0x7_00ff), Some(0x7_10ff)),
    (0x330, Some(0x1_07ff), Some(0x1_17ff)),
    (0x340, Some(0x1_07ff), Some(0x1_17ff)),
    (0x350, Some(0x1_a7ff), Some(0x1_f7ff)),
    (0x360, Some(0x1_a7ff), Some(0x1_f7ff)),
    (0x370, Some(0x1_00ff), Some(0x1_10ff)),
    (0x380, Some(0xffff_ffff), Some(0xffff_ffff)),
    (0x390, None, None),
    (0x3e0, Some(0xb), Some(0xb)),
    (0x280, Some(0), Some(0)),
];

#[test]
fn bits_in_xapic_mode() {
    for &(offset, written, _) in WRITABLE {
        let page = Page::default();
        let mut apic = xapic(&page, 3);
        let before = read(&mut apic, offset);
        let _ = write(&mut apic, offset, u32::MAX);
        let expected = written.unwrap_or(before);
        assert_eq!(read(&mut apic, offset), expected, "{offset:#x}");
        let _ = write(&mut apic, offset, 0);
        let zero = match (offset, written) {
            (0xe0, _) => 0x0fff_ffff,
            (_, None) => before,
            _ => 0,
        };
        assert_eq!(read(&mut apic, offset), zero, "{offset:#x}");
    }
}

#[test]
fn bits_in_x2apic_mode() {
    for &(offset, _, accepted) in WRITABLE {
        for bit in 0..64 {
            let page = Page::default();
            let mut apic = x2apic(&page, 3);
            let before = apic.read_msr(msr(offset), &T0);
            let value = 1u64 << bit;
            let result = apic.write_msr(msr(offset), value, &T0);
            let ok = accepted.is_some_and(|mask| value & !u64::from(mask) == 0);
            assert_eq!(result.is_ok(), ok, "{offset:#x} {bit}");
            if !ok {
                assert_eq!(apic.read_msr(msr(offset), &T0), before, "{offset:#x} {bit}");
            }
        }
    }
}

#[test]
fn registers_of_x2apic_mode() {
    let page = Page::default();
    let mut apic = x2apic(&page, 3);
    let read_write = [
        0x808, 0x80f, 0x828, 0x82f, 0x830, 0x832, 0x833, 0x834, 0x835, 0x836, 0x837, 0x838, 0x83e,
    ];
    for n in 0x7f0..0x910 {
        let read_only = matches!(n, 0x802 | 0x803 | 0x80a | 0x80d | 0x810..=0x827 | 0x839);
        let write_only = matches!(n, 0x80b | 0x83f);
        let read = apic.read_msr(Msr(n), &T0);
        // Valid for all of them.
        let value = if n == 0x83f { 0x20 } else { 0 };
        let write = apic.write_msr(Msr(n), value, &T0);
        if read_write.contains(&n) {
            assert!(read.is_ok(), "{n:#x}");
            assert!(write.is_ok() || n == 0x830, "{n:#x}");
        } else if read_only {
            assert!(read.is_ok(), "{n:#x}");
            assert_eq!(write, Err(MsrError::Refused), "{n:#x}");
        } else if write_only {
            assert_eq!(read, Err(MsrError::Refused), "{n:#x}");
            assert!(write.is_ok(), "{n:#x}");
        } else {
            assert_eq!(read, Err(MsrError::Unknown), "{n:#x}");
            assert_eq!(write, Err(MsrError::Unknown), "{n:#x}");
        }
    }
    assert_eq!(
        apic.write_msr(msr(0xb0), 1, &T0),
        Err(MsrError::Refused),
        "EOI takes 0"
    );
    assert_eq!(
        apic.write_msr(msr(0x3f0), 0x120, &T0),
        Err(MsrError::Refused)
    );
}

#[test]
fn what_is_optional() {
    let page = Page::default();
    let mut apic = Apic::new(&page, Config::new(0, base::Role::Bootstrap));
    let _ = write(&mut apic, 0xf0, u32::MAX);
    assert_eq!(read(&mut apic, 0xf0), 0x3ff, "no EOI suppression");
    let _ = write(&mut apic, 0x2f0, 0xff);
    assert_eq!(read(&mut apic, 0x2f0), 0, "no CMCI");
    assert_eq!(apic.deliver_local(LvtEntry::Cmci), Delivered::Dropped);
    let _ = write(&mut apic, 0x320, 0x6_0030);
    assert_eq!(read(&mut apic, 0x320), 0x2_0030, "no TSC deadline");
    assert_eq!(apic.timer().mode(), TimerMode::Periodic);
    enter_x2apic(&mut apic);
    assert_eq!(apic.read_msr(msr(0x2f0), &T0), Err(MsrError::Unknown));
    assert_eq!(
        apic.write_msr(msr(0x320), 0x4_0030, &T0),
        Err(MsrError::Refused)
    );
    assert_eq!(
        apic.write_msr(msr(0xf0), 0x11ff, &T0),
        Err(MsrError::Refused)
    );
}

#[test]
fn a_vmm_changes_what_is_optional() {
    let page = Page::default();
    let mut apic = xapic(&page, 3);
    let bare = Config::new(9, base::Role::Application);
    for (offset, value) in [(0xf0, 0x11ff), (0x2f0, 0x44), (0x350, 0x55)] {
        let _ = write(&mut apic, offset, value);
    }
    let _ = write(&mut apic, 0x320, 0x4_0066);
    let _ = apic.set_tsc_deadline(99);
    assert_eq!(apic.reconfigure(&bare), Effect::Timer);
    for (offset, value) in [
        (0x30, 0x0005_0014),
        (0xf0, 0x1ff),
        (0x2f0, 0),
        (0x320, 0x66),
        (0x350, 0x55),
    ] {
        assert_eq!(read(&mut apic, offset), value, "{offset:#x}");
    }
    assert_eq!((apic.timer().next_expiry(), apic.tsc_deadline()), (None, 0));
    assert_eq!((apic.config().id, apic.base().bits()), (3, 0xfee0_0900));
    assert_eq!(apic.reconfigure(&full(9)), Effect::Timer);
    assert_eq!(read(&mut apic, 0x2f0), 0x1_0000);
    assert_eq!(apic.config(), &full(3));
}

#[test]
fn sizes_and_alignment_in_the_page() {
    let page = Page::default();
    let mut apic = xapic(&page, 0);
    let _ = write(&mut apic, 0x380, 0x8765_4321);
    for (offset, len, value) in [
        (0x380, 4, 0x8765_4321),
        (0x380, 2, 0x4321),
        (0x382, 2, 0x8765),
        (0x383, 1, 0x87),
        (0x381, 1, 0x43),
        (0x381, 2, 0x6543),
        (0x383, 2, 0),
        (0x381, 4, 0),
        (0x384, 1, 0),
        (0x384, 4, 0),
        (0x380, 3, 0),
        (0x380, 8, 0),
        (0x380, 0, 0),
    ] {
        assert_eq!(
            apic.mmio_read(offset, len, &T0),
            Some(value),
            "{offset:#x} {len}"
        );
        if (offset, len) != (0x380, 4) {
            assert_eq!(apic.mmio_write(offset, len, 1, &T0), Some(Effect::None));
        }
    }
    assert_eq!(read(&mut apic, 0x380), 0x8765_4321);
}

#[test]
fn errors_are_latched_by_a_write() {
    let page = Page::default();
    let mut apic = xapic(&page, 0);
    let _ = write(&mut apic, 0x370, 0xe0);
    // A reserved register, read and written: one interrupt.
    assert_eq!(read(&mut apic, 0x40), 0);
    assert_eq!(vectors(&page, IRR), [0xe0]);
    assert_eq!(apic.acknowledge(), Some(0xe0));
    let _ = write(&mut apic, 0xb0, 0);
    assert_eq!(write(&mut apic, 0x40, 0), Effect::None);
    assert_eq!(vectors(&page, IRR), []);
    assert_eq!(read(&mut apic, 0x280), 0, "not yet");
    assert_eq!(write(&mut apic, 0x280, 0), Effect::None);
    assert_eq!(read(&mut apic, 0x280), 0x80);
    let _ = write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280), 0);

    // An illegal vector sent, and one received.
    assert_eq!(write(&mut apic, 0x300, 0x4_000f), Effect::Recheck);
    assert_eq!(vectors(&page, IRR), [0xe0]);
    let illegal = Delivered::Event(ApicEvent::IllegalVector);
    assert_eq!(apic.view().deliver(&edge(15)), illegal);
    apic.log_error(Esr::RECEIVE_ILLEGAL_VECTOR);
    let _ = write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280), 0x60);
    assert_eq!(write(&mut apic, 0x40, 0), Effect::Recheck);

    // The error's own vector is illegal: that is an error too, and the end of it.
    let _ = write(&mut apic, 0x280, 0);
    let _ = write(&mut apic, 0x370, 0x0f);
    let _ = write(&mut apic, 0x40, 0);
    let _ = write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280), 0xc0);
    assert_eq!(vectors(&page, IRR), [0xe0]);

    enter_x2apic(&mut apic);
    assert_eq!(apic.write_msr(msr(0x280), 1, &T0), Err(MsrError::Refused));
    assert_eq!(apic.write_msr(msr(0x3f0), 9, &T0), Ok(Effect::Recheck));
    assert_eq!(apic.write_msr(msr(0x280), 0, &T0), Ok(Effect::None));
    assert_eq!(apic.read_msr(msr(0x280), &T0), Ok(0x60));
}

#[test]
fn software_disable_masks_the_local_vectors() {
    let page = Page::default();
    let mut apic = xapic(&page, 0);
    let lvts = [0x2f0, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370];
    for offset in lvts {
        let _ = write(&mut apic, offset, 0x41);
        assert_eq!(read(&mut apic, offset), 0x41);
    }
    assert_eq!(write(&mut apic, 0xf0, 0xff), Effect::Identity);
    for offset in lvts {
        assert_eq!(read(&mut apic, offset), 0x1_0041);
        let _ = write(&mut apic, offset, 0x42);
        assert_eq!(read(&mut apic, offset), 0x1_0042, "not opened");
    }
    assert_eq!(apic.view().deliver(&edge(0x50)), Delivered::Dropped);
    let nmi = message(DeliveryMode::Nmi, 0);
    assert_eq!(apic.view().deliver(&nmi), Delivered::Event(ApicEvent::Nmi));
    let _ = write(&mut apic, 0xf0, 0x1ff);
    assert_eq!(read(&mut apic, 0x320), 0x1_0042, "still masked");
    assert_eq!(apic.view().deliver(&edge(0x50)), Delivered::Queued);
}

#[test]
fn local_vectors_are_delivered() {
    let page = Page::default();
    let mut apic = xapic(&page, 0);
    for (offset, entry) in [
        (0x2f0, LvtEntry::Cmci),
        (0x330, LvtEntry::Thermal),
        (0x340, LvtEntry::Perfmon),
        (0x350, LvtEntry::Lint0),
        (0x360, LvtEntry::Lint1),
    ] {
        for (mode, delivered) in [
            (0, Delivered::Queued),
            (1, Delivered::Dropped),
            (2, Delivered::Event(ApicEvent::Smi)),
            (3, Delivered::Dropped),
            (4, Delivered::Event(ApicEvent::Nmi)),
            (5, Delivered::Event(ApicEvent::Init)),
            (6, Delivered::Dropped),
            (7, Delivered::Event(ApicEvent::ExtInt)),
        ] {
            let vector = u32::from(offset >> 4);
            let _ = write(&mut apic, offset, (mode << 8) | vector);
            assert_eq!(apic.deliver_local(entry), delivered, "{entry:?} {mode}");
            let masks = entry == LvtEntry::Perfmon && delivered != Delivered::Dropped;
            let masked = read(&mut apic, offset) & 0x1_0000 != 0;
            assert_eq!(masked, masks, "{entry:?} {mode}");
            let _ = write(&mut apic, offset, 0x1_0000 | (mode << 8) | vector);
            assert_eq!(apic.deliver_local(entry), Delivered::Dropped);
        }
    }
    assert_eq!(vectors(&page, IRR), [0x2f, 0x33, 0x34, 0x35, 0x36]);
    // A pin with a level.
    let _ = write(&mut apic, 0x350, 0x8077);
    assert_eq!(apic.deliver_local(LvtEntry::Lint0), Delivered::Queued);
    assert_eq!(vectors(&page, TMR), [0x77]);
    let _ = write(&mut apic, 0x360, 0x5);
    assert_eq!(apic.deliver_local(LvtEntry::Lint1), Delivered::Dropped);
    let _ = write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280), 0x40);
}

#[test]
fn writes_say_what_is_left_to_do() {
    let page = Page::default();
    let mut apic = xapic(&page, 0);
    for (offset, effect) in [
        (0x20, Effect::Identity),
        (0x30, Effect::None),
        (0x80, Effect::Recheck),
        (0xb0, Effect::Eoi(Eoi::None)),
        (0xd0, Effect::Identity),
        (0xe0, Effect::Identity),
        (0x310, Effect::None),
        (0x320, Effect::Timer),
        (0x330, Effect::None),
        (0x380, Effect::Timer),
        (0x3e0, Effect::Timer),
        (0xf0, Effect::Identity),
    ] {
        assert_eq!(write(&mut apic, offset, 0), effect, "{offset:#x}");
    }
}

#[test]
fn commands_are_kept_and_sent() {
    let page = Page::default();
    let mut apic = xapic(&page, 0);
    let _ = write(&mut apic, 0x310, 0x12ff_ffff);
    let sent = Message::fixed(0x40, Target::Physical(0x12));
    let sent = Message {
        level: Level::Assert,
        ..sent
    };
    assert_eq!(write(&mut apic, 0x300, 0x5040), Effect::Send(sent));
    assert_eq!(read(&mut apic, 0x300), 0x4040, "delivered");
    assert_eq!(read(&mut apic, 0x310), 0x1200_0000);

    enter_x2apic(&mut apic);
    let icr = 0x1234_5678_0000_4840u64;
    let sent = Message {
        target: Target::Logical(0x1234_5678),
        ..sent
    };
    assert_eq!(
        apic.write_msr(msr(0x300), icr | 0x1000, &T0),
        Ok(Effect::Send(sent))
    );
    assert_eq!(apic.read_msr(msr(0x300), &T0), Ok(icr));
    assert_eq!((page.read(0x300), page.read(0x304)), (0x4840, 0x1234_5678));
    for bit in (20..32).chain([13, 16, 17]) {
        let bad = apic.write_msr(msr(0x300), icr | (1 << bit), &T0);
        assert_eq!(bad, Err(MsrError::Refused), "{bit}");
    }
    assert_eq!(apic.read_msr(msr(0x300), &T0), Ok(icr));
    let own = Effect::Send(Message::fixed(0x99, Target::Itself));
    assert_eq!(apic.write_msr(msr(0x3f0), 0x99, &T0), Ok(own));
}

#[test]
fn what_the_processor_has_written() {
    let page = Page::default();
    let mut apic = xapic(&page, 0);
    page.write(0x80, 0x1_0035);
    assert_eq!(apic.written(0x80, &T0), Effect::Recheck);
    assert_eq!((read(&mut apic, 0x80), read(&mut apic, 0xa0)), (0x35, 0x35));
    page.write(0x310, 0x0300_0000);
    page.write(0x300, 0xc_4500);
    let effect = apic.written(0x300, &T0);
    let Effect::Send(message) = effect else {
        panic!("{effect:?}");
    };
    assert_eq!(
        (message.mode, message.target),
        (DeliveryMode::Init, Target::Others)
    );
    assert_eq!(apic.written(0x40, &T0), Effect::None);
    assert_eq!(apic.written(0x3f0, &T0), Effect::None, "not in this mode");
    enter_x2apic(&mut apic);
    page.write(0x3f0, 0x66);
    let own = Effect::Send(Message::fixed(0x66, Target::Itself));
    assert_eq!(apic.written(0x3f0, &T0), own);
    page.write(0x300, 0x4066);
    page.write(0x304, 0x100);
    let sent = Effect::Send(Message::fixed(0x66, Target::Physical(0x100)));
    assert_eq!(apic.written(0x300, &T0), sent);
    assert_eq!(apic.mode(), ApicMode::X2apic);
}
