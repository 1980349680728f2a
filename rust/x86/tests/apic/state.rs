// SPDX-License-Identifier: GPL-2.0

//! KVM_GET_LAPIC and KVM_SET_LAPIC.

use crate::board::*;
use rkvm_x86::apic::message::IdFormat;
use rkvm_x86::apic::page::ApicPage;
use rkvm_x86::apic::state::*;
use rkvm_x86::apic::timer::Deadline;
use rkvm_x86::apic::*;

const EMPTY: Image = [0; IMAGE_LEN];

fn get(image: &Image, offset: usize) -> u32 {
    u32::from_le_bytes(image[offset..offset + 4].try_into().unwrap())
}

fn set(image: &mut Image, offset: usize, value: u32) {
    image[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

fn save(apic: &TestApic<'_>) -> Image {
    let mut image = [0xa5; IMAGE_LEN];
    apic.save(&mut image, &T0);
    image
}

/// Gives it something of everything.
fn furnish(apic: &mut TestApic<'_>) {
    for vector in [0x31, 0x62, 0x93, 0xff] {
        let _ = apic.view().deliver(&edge(vector));
        let _ = apic.view().deliver(&level(vector - 1));
    }
    apic.acknowledge();
    let _ = apic.set_cr8(2);
}

#[test]
fn to_another_apic_and_back() {
    let (page, other) = (Page::default(), Page::default());
    let mut apic = xapic(&page, 0x21);
    furnish(&mut apic);
    for (offset, value) in [
        (0xd0, 0x4200_0000),
        (0xe0, 0x0fff_ffff),
        (0x310, 0x0300_0000),
        (0x300, 0xc_4050),
        (0x2f0, 0x1_0044),
        (0x320, 0x2_0055),
        (0x350, 0xa755),
        (0x3e0, 0xa),
        (0x380, 9999),
    ] {
        let _ = write(&mut apic, offset, value);
    }
    let image = save(&apic);
    assert_eq!(get(&image, 0x20), 0x2100_0000);
    assert_eq!(get(&image, 0xa0), 0xf0);
    assert_eq!(get(&image, 0x390), 9999);
    assert_eq!(get(&image, 0x24), 0);
    let mut copy = Apic::new(&other, full(0x21));
    assert_eq!(copy.restore(&image, &T0), Ok(Effect::Identity));
    assert_eq!(save(&copy), image);
    assert_eq!(copy.timer(), apic.timer());
    assert_eq!(copy.highest_in_service(), Some(0xff));
    assert_eq!(copy.eoi(), apic.eoi());
    assert_eq!(copy.acknowledge(), apic.acknowledge());
}

#[test]
fn ids_and_commands_in_x2apic_mode() {
    for (ids, id, shown) in [
        (IdFormat::Wide, 0x1234, 0x1234),
        (IdFormat::Narrow, 0x34, 0x3400_0000),
        (IdFormat::Narrow, 0x1234, 0x3400_0000),
    ] {
        let page = Page::default();
        let mut apic = Apic::new(&page, Config { ids, ..full(id) });
        let _ = write(&mut apic, 0xf0, 0x1ff);
        enter_x2apic(&mut apic);
        let icr = 0x0000_5678_000c_4050;
        let _ = apic.write_msr(msr(0x300), icr, &T0).unwrap();
        let image = save(&apic);
        assert_eq!(get(&image, 0x20), shown);
        assert_eq!(get(&image, 0xd0), apic.view().identity().ldr);
        assert_eq!((get(&image, 0x300), get(&image, 0x310)), (0xc_4050, 0x5678));
        assert_eq!(get(&image, 0x304), 0);

        let mut other = image;
        set(&mut other, 0x20, shown ^ 1);
        set(&mut other, 0xd0, 77);
        let before: Vec<u32> = (0..256).map(|i| page.read(i * 4)).collect();
        let result = apic.restore(&other, &T0);
        if ids == IdFormat::Wide {
            assert_eq!(result, Err(Inconsistent));
            let now: Vec<u32> = (0..256).map(|i| page.read(i * 4)).collect();
            assert_eq!(now, before);
        } else {
            // It is not looked at.
            assert_eq!(result, Ok(Effect::Identity));
        }
        assert_eq!(apic.restore(&image, &T0), Ok(Effect::Identity));
        assert_eq!(save(&apic), image);
        assert_eq!(apic.read_msr(msr(0x300), &T0), Ok(icr));
        assert_eq!(apic.read_msr(msr(0x20), &T0), Ok(id.into()));
    }
    // In xAPIC mode the ID is software's, and so a VMM's.
    let page = Page::default();
    let mut apic = xapic(&page, 3);
    let mut image = save(&apic);
    set(&mut image, 0x20, 0x5500_0000);
    assert!(apic.restore(&image, &T0).is_ok());
    assert_eq!(read(&mut apic, 0x20), 0x5500_0000);
}

#[test]
fn noise_is_made_an_apic() {
    let page = Page::default();
    let mut apic = xapic(&page, 3);
    let noise = [0xff; IMAGE_LEN];
    assert!(apic.restore(&noise, &T0).is_ok());
    for (offset, value) in [
        (0x20, 0xff00_0000),
        (0x30, 0x0106_0014),
        (0x80, 0xff),
        (0x90, 0),
        (0xa0, 0xff),
        (0xf0, 0x13ff),
        (0x100, 0xffff_0000),
        (0x170, u32::MAX),
        (0x200, u32::MAX),
        (0x280, 0xe0),
        (0x300, !0x1000),
        (0x310, 0xff00_0000),
        (0x320, 0x7_00ff),
        (0x3e0, 0xb),
    ] {
        assert_eq!(read(&mut apic, offset), value, "{offset:#x}");
    }
    assert!(apic.restore(&EMPTY, &T0).is_ok());
    assert_eq!(read(&mut apic, 0x30), 0x0106_0014);
    assert_eq!(apic.highest_in_service(), None);
}

#[test]
fn the_priority_is_worked_out_anew() {
    let page = Page::default();
    let mut apic = xapic(&page, 3);
    let mut image = save(&apic);
    set(&mut image, 0x80, 0x35);
    set(&mut image, 0xa0, 0);
    set(&mut image, 0x120, 1 << 17);
    set(&mut image, 0x220, 1 << 30);
    assert!(apic.restore(&image, &T0).is_ok());
    assert_eq!((apic.ppr(), page.read(0xa0)), (0x50, 0x50));
    assert_eq!(apic.pending_interrupt(), None);
    assert_eq!(apic.eoi(), Eoi::Edge(0x51));
    assert_eq!(apic.pending_interrupt(), Some(0x5e));
}

#[test]
fn the_timer_goes_on() {
    let page = Page::default();
    let mut apic = xapic(&page, 3);
    let _ = write(&mut apic, 0x3e0, 0xb);
    let _ = write(&mut apic, 0x320, 0x66);
    let _ = write(&mut apic, 0x380, 1000);
    let mut image = EMPTY;
    apic.save(&mut image, &after(400));
    assert_eq!(get(&image, 0x390), 600);
    // An hour later.
    let later = after(3_600_000_000_000);
    assert!(apic.restore(&image, &later).is_ok());
    let end = Deadline::Ns(later.ns + 600);
    assert_eq!(apic.timer().next_expiry(), Some(end));
    // A deadline stays with its mode, and goes with it.
    let _ = write(&mut apic, 0x320, 0x4_0066);
    let _ = apic.set_tsc_deadline(99);
    let deadline = save(&apic);
    assert!(apic.restore(&deadline, &T0).is_ok());
    assert_eq!(apic.tsc_deadline(), 99);
    assert!(apic.restore(&image, &T0).is_ok());
    assert_eq!(apic.tsc_deadline(), 0);
    assert_eq!(read(&mut apic, 0x380), 1000);
}
