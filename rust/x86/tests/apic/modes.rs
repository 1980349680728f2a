// SPDX-License-Identifier: GPL-2.0

//! IA32_APIC_BASE: every way from mode to mode; reset and INIT.

use crate::board::*;
use rkvm_x86::apic::base::*;
use rkvm_x86::apic::page::ApicPage;
use rkvm_x86::apic::*;
use rkvm_x86::cpuid::features::Features;
use rkvm_x86::msr::MsrError;

const OFF: u64 = DEFAULT_ADDRESS;
const XAPIC: u64 = OFF | 0x800;
const X2APIC: u64 = OFF | 0xc00;
const NO_MODE: u64 = OFF | 0x400;

#[test]
fn ways_between_modes() {
    let f = features();
    for (from, to, guest) in [
        (OFF, OFF, true),
        (OFF, XAPIC, true),
        (OFF, X2APIC, false),
        (XAPIC, OFF, true),
        (XAPIC, XAPIC, true),
        (XAPIC, X2APIC, true),
        (X2APIC, OFF, true),
        (X2APIC, XAPIC, false),
        (X2APIC, X2APIC, true),
        (OFF, NO_MODE, false),
        (XAPIC, NO_MODE, false),
        (X2APIC, NO_MODE, false),
    ] {
        let base = ApicBase::new(from);
        let by = |host| base.check_write(to, &f, host);
        assert_eq!(by(false).is_ok(), guest, "{from:#x} {to:#x}");
        assert_eq!(by(true).is_ok(), to != NO_MODE, "{from:#x} {to:#x}");
    }
}

#[test]
fn bits_of_the_base() {
    let base = ApicBase::reset(Role::Bootstrap);
    assert_eq!(base.bits(), 0xfee0_0900);
    assert_eq!(ApicBase::reset(Role::Application).bits(), 0xfee0_0800);
    for bit in 0..64 {
        let free = matches!(bit, 8 | 10 | 11) || (12..40).contains(&bit);
        let value = XAPIC | (1 << bit);
        for host in [false, true] {
            let written = base.check_write(value, &features(), host);
            assert_eq!(written.is_ok(), free, "bit {bit}");
        }
    }
    let mut none = features();
    none.flags = Features::empty();
    // Not a VMM's either, as in KVM.
    for host in [false, true] {
        assert_eq!(
            base.check_write(X2APIC, &none, host),
            Err(MsrError::Refused)
        );
    }
    assert_eq!(ApicBase::new(0x12_3456_7fff).address(), 0x12_3456_7000);
}

#[test]
fn changing_the_mode_changes_the_registers() {
    let page = Page::default();
    let mut apic = xapic(&page, 0x123);
    let set = |apic: &mut TestApic<'_>, value, host| apic.set_base(value, &features(), host);
    let _ = write(&mut apic, 0xd0, 0x0400_0000);
    let _ = write(&mut apic, 0x310, 0x0900_0000);
    // The page moves, and the BSP bit goes: nothing else changes.
    assert_eq!(set(&mut apic, 0x1_0000_0800, false), Ok(Effect::Identity));
    assert_eq!(apic.base().address(), 0x1_0000_0000);
    assert_eq!(read(&mut apic, 0x20), 0x2300_0000);

    assert_eq!(set(&mut apic, X2APIC, false), Ok(Effect::Identity));
    assert_eq!(apic.read_msr(msr(0x20), &T0), Ok(0x123));
    assert_eq!(apic.read_msr(msr(0xd0), &T0), Ok(0x0012_0008));
    assert_eq!(apic.read_msr(msr(0x300), &T0), Ok(0));
    assert_eq!(apic.mmio_read(0x20, 4, &T0), None);
    assert_eq!(apic.mmio_write(0x80, 4, 0, &T0), None);

    // Refused: nothing changes.
    assert!(set(&mut apic, XAPIC, false).is_err());
    assert_eq!(apic.mode(), ApicMode::X2apic);

    assert_eq!(set(&mut apic, OFF, false), Ok(Effect::Identity));
    assert_eq!(apic.read_msr(msr(0x20), &T0), Err(MsrError::Unknown));
    assert_eq!(apic.mmio_read(0x20, 4, &T0), None);
    assert!(apic.accepts_extint());

    assert_eq!(set(&mut apic, XAPIC, false), Ok(Effect::Identity));
    assert_eq!(read(&mut apic, 0x20), 0x2300_0000);
    assert_eq!(read(&mut apic, 0xd0), 0);
    assert_eq!(
        apic.read_msr(msr(0x20), &T0),
        Err(MsrError::Unknown),
        "only in x2APIC mode"
    );
    // A VMM may go from anywhere.
    assert!(set(&mut apic, OFF, false).is_ok());
    assert_eq!(set(&mut apic, X2APIC, true), Ok(Effect::Identity));
    assert_eq!(set(&mut apic, XAPIC, true), Ok(Effect::Identity));
}

#[test]
fn after_reset() {
    let page = Page::default();
    for word in (0..0x400).step_by(4) {
        page.write(word, 0xdead_beef);
    }
    let mut apic = Apic::new(&page, full(7));
    for offset in (0..0x400).step_by(0x10) {
        let expected = match offset {
            0x20 => 0x0700_0000,
            0x30 => 0x0106_0014,
            0xe0 => u32::MAX,
            0xf0 => 0xff,
            0x2f0 | 0x320..=0x370 => 0x1_0000,
            _ => 0,
        };
        assert_eq!(read(&mut apic, offset), expected, "{offset:#x}");
    }
    let bare = Config::new(7, Role::Application);
    assert_eq!(bare.version(), 0x0005_0014);
    assert!(!apic.accepts_extint());
    let lint0 = Config {
        lint0: Lint0Reset::ExtInt,
        ..full(0)
    };
    let mut apic = Apic::new(&page, lint0);
    assert_eq!(read(&mut apic, 0x350), 0x700);
    assert!(apic.accepts_extint());
    let application = Config {
        role: Role::Application,
        ..lint0
    };
    assert_eq!(read(&mut Apic::new(&page, application), 0x350), 0x1_0000);
}

#[test]
fn init_keeps_mode_and_id() {
    let page = Page::default();
    let mut apic = xapic(&page, 7);
    let _ = write(&mut apic, 0x20, 0x5500_0000);
    let _ = write(&mut apic, 0xd0, 0x0400_0000);
    let _ = write(&mut apic, 0x80, 0x30);
    let _ = apic.view().deliver(&edge(0x40));
    apic.acknowledge();
    let _ = write(&mut apic, 0x320, 0x30);
    let _ = write(&mut apic, 0x380, 100);
    apic.reset(Reset::Init);
    assert_eq!(read(&mut apic, 0x20), 0x5500_0000);
    assert_eq!((read(&mut apic, 0xd0), read(&mut apic, 0x80)), (0, 0));
    assert_eq!((read(&mut apic, 0xa0), read(&mut apic, 0xf0)), (0, 0xff));
    assert_eq!((vectors(&page, ISR), vectors(&page, IRR)), (vec![], vec![]));
    assert_eq!(apic.timer().next_expiry(), None);
    enter_x2apic(&mut apic);
    apic.reset(Reset::Init);
    assert_eq!(apic.mode(), ApicMode::X2apic);
    assert_eq!(apic.read_msr(msr(0xd0), &T0), Ok(0x80));
    apic.reset(Reset::PowerUp);
    assert_eq!(apic.base().bits(), 0xfee0_0900);
    assert_eq!(read(&mut apic, 0x20), 0x0700_0000);
}
