// SPDX-License-Identifier: GPL-2.0

//! Routes from GSIs to pins and messages, and messages that userspace sends.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::guest::usize_of;
use selftests::host::Rng;
use selftests::irq::{
    self, how, line, line_status, msi, pic, route, route_raw, set_entry, to_msi, to_pin, vm_with,
    wait_for, Chips, Guest, APIC,
};
use selftests::sys;
use selftests::vm::Vm;
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const MASTER: u32 = kb::KVM_IRQCHIP_PIC_MASTER;
const SLAVE: u32 = kb::KVM_IRQCHIP_PIC_SLAVE;
const IOAPIC: u32 = kb::KVM_IRQCHIP_IOAPIC;

/// GSIs that there can be.
const MAX: u32 = 4096;

/// Bits of an MSI's address: the redirection hint, and that the destination is logical.
const HINT: u64 = 8;
const LOGICAL: u64 = 4;
/// Bits of an MSI's data.
const LEVEL: u32 = 1 << 15;
const LOWEST: u32 = 1 << 8;
const SMI_UNUSED: u32 = 3 << 8;
const NMI: u32 = 4 << 8;
const EXTINT: u32 = 7 << 8;

/// The address of an MSI to one APIC.
fn to(id: u64) -> u64 {
    APIC | (id << 12)
}

type Entry = kb::kvm_irq_routing_entry;

fn with_flags(mut e: Entry, flags: u32) -> Entry {
    e.flags = flags;
    e
}

fn of_type(gsi: u32, type_: u32) -> Entry {
    Entry {
        gsi,
        type_,
        ..Default::default()
    }
}

/// What the call refuses, and that it changes nothing then.
fn arguments(env: &Env) -> Outcome {
    let (kvm, vm, _mem) = vm_with(env, Chips::Full)?;
    route(&vm, &[to_pin(30, IOAPIC, 20)])?;
    let m = to_msi(5, APIC, 0x50);
    let cases: &[(&str, &[Entry])] = &[
        ("GSI 4096", &[to_msi(MAX, APIC, 0x50)]),
        ("GSI 2^32 - 1", &[to_msi(u32::MAX, APIC, 0x50)]),
        ("the second GSI", &[m, to_msi(MAX, APIC, 0x50)]),
        ("type 0", &[of_type(5, 0)]),
        (
            "an adapter's type",
            &[of_type(5, kb::KVM_IRQ_ROUTING_S390_ADAPTER)],
        ),
        ("an unknown type", &[of_type(5, 77)]),
        ("the largest type", &[m, of_type(6, u32::MAX)]),
        ("flags of a pin", &[with_flags(to_pin(5, IOAPIC, 5), 1)]),
        ("flags 2 of an MSI", &[with_flags(m, 2)]),
        ("all flags of an MSI", &[with_flags(m, u32::MAX)]),
        ("pin 8 of a PIC", &[to_pin(5, MASTER, 8)]),
        ("pin 8 of the other", &[to_pin(5, SLAVE, 8)]),
        ("a pin that wraps", &[to_pin(5, SLAVE, u32::MAX - 7)]),
        ("pin 2^32 - 1", &[to_pin(5, MASTER, u32::MAX)]),
        ("pin 24", &[to_pin(5, IOAPIC, 24)]),
        ("pin 2^31", &[to_pin(5, IOAPIC, 1 << 31)]),
        ("chip 3", &[to_pin(5, 3, 0)]),
        ("chip 2^32 - 1", &[to_pin(5, u32::MAX, 0)]),
        (
            "one pin twice",
            &[to_pin(5, IOAPIC, 5), to_pin(5, IOAPIC, 5)],
        ),
        (
            "one chip twice",
            &[to_pin(5, IOAPIC, 5), to_pin(5, IOAPIC, 6)],
        ),
        ("a pin and an MSI", &[to_pin(5, IOAPIC, 5), m]),
        ("an MSI and a pin", &[m, to_pin(5, IOAPIC, 5)]),
        ("two MSIs", &[m, to_msi(5, APIC, 0x51)]),
    ];
    for (what, entries) in cases {
        expect_errno(route(&vm, entries), libc::EINVAL, what)?;
        ensure_eq!(
            line_status(&vm, 30, 0)?,
            1,
            "{what}: the route that was there"
        );
        ensure_eq!(line_status(&vm, 5, 0)?, -1, "{what}: a route that was not");
    }
    let many = vec![m; MAX as usize + 1];
    expect_errno(route(&vm, &many), libc::EINVAL, "4097 routes")?;
    for (nr, flags) in [
        (1, 1),
        (0, 1),
        (1, u32::MAX),
        (MAX + 1, 0),
        (u32::MAX, 0),
        (1 << 31, 0),
    ] {
        let what = format!("nr {nr:#x}, flags {flags:#x}");
        expect_errno(route_raw(&vm, nr, flags, &[m]), libc::EINVAL, &what)?;
    }
    expect_errno(
        vm.fd.ioctl(sys::KVM_SET_GSI_ROUTING, 8),
        libc::EFAULT,
        "no header",
    )?;
    ensure_eq!(
        line_status(&vm, 30, 0)?,
        1,
        "the route that was there at first"
    );
    // The header is there, and entries are not.
    let page = selftests::mem::Mapping::new(0x2000, false)?;
    page.protect(0x1000, 0x1000, libc::PROT_NONE)?;
    page.write(0xff8, 1u64);
    let r = vm.fd.ioctl(sys::KVM_SET_GSI_ROUTING, page.addr() + 0xff8);
    expect_errno(r, libc::EFAULT, "no entries")?;
    page.write(0xff8, 0u64);
    vm.fd.ioctl(sys::KVM_SET_GSI_ROUTING, page.addr() + 0xff8)?;
    ensure_eq!(
        line_status(&vm, 30, 0)?,
        -1,
        "a route behind an empty table"
    );

    // Without controllers, and with those of userspace.
    let none = kvm.create_vm()?;
    expect_errno(route(&none, &[m]), libc::EINVAL, "no irqchip")?;
    expect_errno(route(&none, &[]), libc::EINVAL, "no irqchip, no routes")?;
    let split = kvm.create_vm()?;
    irq::create(&split, Chips::Split(24))?;
    for chip in [MASTER, SLAVE, IOAPIC] {
        let r = route(&split, &[to_pin(5, chip, 5)]);
        expect_errno(r, libc::EINVAL, "a pin, split")?;
    }
    route(&split, &[m, with_flags(to_msi(6, APIC, 0x51), 1)])?;
    Ok(())
}

/// The largest table, and the last GSI.
fn limits(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    ensure_eq!(
        g.kvm.capability(kb::KVM_CAP_IRQ_ROUTING),
        4096,
        "KVM_CAP_IRQ_ROUTING"
    );
    let vector = |gsi: u32| 0x40 + gsi % 0xb0;
    let all: Vec<_> = (0..MAX)
        .rev()
        .map(|gsi| to_msi(gsi, APIC, vector(gsi)))
        .collect();
    for _ in 0..env.fewer(5) {
        route(&g.vm, &all)?;
    }
    for gsi in [0, 1, 23, 24, 2047, 4094, 4095] {
        ensure_eq!(line_status(&g.vm, gsi, 1)?, 1, "GSI {gsi}: status");
        g.forget(0);
        g.window(0)?;
        ensure_eq!(g.log(0), [vector(gsi) as u8], "GSI {gsi}: vectors");
    }
    ensure_eq!(line_status(&g.vm, MAX, 1)?, -1, "GSI 4096");
    route(&g.vm, &[])?;
    for gsi in [0, 5, 4095] {
        ensure_eq!(
            line_status(&g.vm, gsi, 1)?,
            -1,
            "GSI {gsi} of an empty table"
        );
    }
    Ok(())
}

/// The routes that a new irqchip has.
fn by_default(env: &Env) -> Outcome {
    let (_kvm, vm, _mem) = vm_with(env, Chips::Full)?;
    for gsi in 0..24u32 {
        // The I/O APIC takes note of each line; GSI 2 is pin 2 of the I/O APIC, and the PIC's cascade.
        line(&vm, gsi, 1)?;
        ensure_eq!(
            irq::ioapic(&vm)?.irr,
            1 << gsi,
            "GSI {gsi}: lines of the I/O APIC"
        );
        let (m, s) = (pic(&vm, 0)?.last_irr, pic(&vm, 1)?.last_irr);
        let want = if gsi < 16 { 1u16 << gsi } else { 0 };
        // When the slave asks, it's by a pulse on line 2 of the master.
        ensure_eq!(
            (m, s),
            (want as u8, (want >> 8) as u8),
            "GSI {gsi}: lines of the PICs"
        );
        line(&vm, gsi, 0)?;
    }
    ensure_eq!(line_status(&vm, 24, 1)?, -1, "GSI 24");
    Ok(())
}

/// One GSI to several chips, several GSIs to a pin.
fn fan_out(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    route(
        &g.vm,
        &[
            to_pin(40, IOAPIC, 20),
            to_pin(40, MASTER, 5),
            to_pin(40, SLAVE, 1),
            to_pin(41, IOAPIC, 20),
            with_flags(to_msi(42, APIC, 0x55), 1),
        ],
    )?;
    set_entry(&g.vm, 20, 0x61)?;
    // One of each chip; to lower a line is taken by all.
    ensure_eq!(line_status(&g.vm, 40, 1)?, 3, "GSI 40: status");
    let lines = (pic(&g.vm, 0)?.last_irr, pic(&g.vm, 1)?.last_irr);
    ensure_eq!(lines, (1 << 5, 1 << 1), "lines of the PICs");
    // The same pin: it is one line then.
    ensure_eq!(line_status(&g.vm, 41, 1)?, 0, "GSI 41: status");
    ensure_eq!(
        line_status(&g.vm, 40, 0)?,
        3,
        "GSI 40: status when it falls"
    );
    ensure_eq!(line_status(&g.vm, 41, 1)?, 1, "GSI 41: status, alone");
    line(&g.vm, 41, 0)?;
    ensure_eq!(line_status(&g.vm, 42, 1)?, 1, "GSI 42: status");
    ensure_eq!(line_status(&g.vm, 42, 0)?, -1, "an MSI does not fall");
    for gsi in [0, 5, 20, 39, 43] {
        ensure_eq!(line_status(&g.vm, gsi, 1)?, -1, "GSI {gsi}: no route");
    }
    Ok(())
}

/// A line that is up when its route goes stays up, until one that leads to its pin lowers it; what a
/// table says holds from then on.
fn replaced(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    set_entry(&g.vm, 20, 0x61 | u64::from(LEVEL))?;
    set_entry(&g.vm, 21, 0x62)?;
    line(&g.vm, 20, 1)?;
    route(&g.vm, &[to_pin(20, IOAPIC, 21), to_msi(22, APIC, 0x73)])?;
    ensure_eq!(irq::ioapic(&g.vm)?.irr, 1 << 20, "lines");
    line(&g.vm, 20, 0)?;
    ensure_eq!(irq::ioapic(&g.vm)?.irr, 1 << 20, "lines: another one fell");
    line(&g.vm, 20, 1)?;
    line(&g.vm, 22, 1)?;
    g.set_how(0, how::APIC | how::REPORT);
    let mut levels = 0;
    g.window_with(0, &mut |vector| {
        levels += u32::from(vector == 0x61);
        // An EOI finds its pin without a route.
        if levels == 2 {
            route(&g.vm, &[to_pin(4000, IOAPIC, 20)])?;
            line(&g.vm, 4000, 0)?;
        }
        Ok(())
    })?;
    ensure_eq!(g.log(0), [0x73, 0x62, 0x61, 0x61], "vectors");
    Ok(())
}

fn send(vm: &Vm, address: u64, data: u32) -> Result<i32, Verdict> {
    Ok(msi(vm, address, data)?)
}

/// What KVM_SIGNAL_MSI refuses.
fn msi_arguments(env: &Env) -> Outcome {
    let (kvm, vm, _mem) = vm_with(env, Chips::Full)?;
    ensure_eq!(
        kvm.capability(kb::KVM_CAP_SIGNAL_MSI),
        1,
        "KVM_CAP_SIGNAL_MSI"
    );
    let _vcpu = vm.create_vcpu(0)?;
    for flags in [2, 3, 1 << 31, u32::MAX] {
        let m = kb::kvm_msi {
            address_lo: APIC as u32,
            data: 0x50,
            flags,
            ..Default::default()
        };
        let r = vm.fd.ioctl_ref(sys::KVM_SIGNAL_MSI, &m);
        expect_errno(r, libc::EINVAL, &format!("flags {flags:#x}"))?;
    }
    // With the number of a device, which nobody looks at here; and the padding is free.
    let mut m = kb::kvm_msi {
        address_lo: APIC as u32,
        data: 0x50,
        flags: 1,
        devid: 0x1234,
        ..Default::default()
    };
    m.pad = [0xff; 12];
    vm.fd.ioctl_ref(sys::KVM_SIGNAL_MSI, &m)?;
    expect_errno(
        vm.fd.ioctl(sys::KVM_SIGNAL_MSI, 8),
        libc::EFAULT,
        "no address",
    )?;
    let none = kvm.create_vm()?;
    expect_errno(msi(&none, APIC, 0x50), libc::EINVAL, "no irqchip")?;
    Ok(())
}

/// What each address and each delivery mode come to, with two vCPUs.
fn msi_delivery(env: &Env) -> Outcome {
    for chips in [Chips::Full, Chips::Split(24)] {
        let g = Guest::new(env, chips, 2)?;
        for id in 0..2 {
            g.write(id, APIC + 0xd0, 1 << (24 + id))?;
        }
        for (what, address, data, took, want) in [
            ("vCPU 0", to(0), 0x70, 1, (1, 0)),
            ("vCPU 1", to(1), 0x70, 1, (0, 1)),
            ("all", to(0xff), 0x70, 2, (1, 1)),
            ("a level", to(0), 0x70 | LEVEL, 1, (1, 0)),
            ("set 1", to(1) | LOGICAL, 0x70, 1, (1, 0)),
            ("set 2", to(2) | LOGICAL, 0x70, 1, (0, 1)),
            ("set 3", to(3) | LOGICAL, 0x70, 2, (1, 1)),
            (
                "lowest priority, set 2",
                to(2) | LOGICAL | HINT,
                0x70 | LOWEST,
                1,
                (0, 1),
            ),
            (
                "lowest priority, one APIC",
                to(1) | HINT,
                0x70 | LOWEST,
                1,
                (0, 1),
            ),
            // Nobody checks that it is the APICs' part of the address space.
            ("another address", 0x1_2000, 0x70, 0, (0, 0)),
            ("address 0", 0, 0x70, 1, (1, 0)),
            // What is above is not part of the destination.
            (
                "a high address",
                to(1) | 0x1234_5678_0000_0000,
                0x70,
                1,
                (0, 1),
            ),
            ("unused bits of the data", to(0), 0xffff_0070, 1, (1, 0)),
        ] {
            let r = msi(&g.vm, address, data);
            match took {
                // There is no APIC 0x12. KVM's "nobody" is its -1, which comes out as EPERM.
                0 => ensure!(
                    r.as_ref()
                        .map_or_else(|e| e.errno == libc::EPERM, |n| *n == 0),
                    "{what}: {r:?}"
                ),
                n => ensure_eq!(r?, n, "{what}: vCPUs"),
            }
            for id in 0..2 {
                g.exec(id, &[0xfb, 0x90, 0x90, 0xfa, 0xc3], |_| {})
                    .or_else(|e| {
                        // The end of a level is an exit for those who have an I/O APIC themselves, if it
                        // is one of its pins; a message of userspace's is none.
                        fail!("{what}: {e:?}")
                    })?;
            }
            let got = (g.count(0, 0x70), g.count(1, 0x70));
            ensure_eq!(got, want, "{what}: interrupts of vCPU 0 and 1");
            (0..2).for_each(|id| g.forget(id));
        }
        // Of a set of two, one takes it.
        for round in 1..=4 {
            let r = send(&g.vm, to(3) | LOGICAL | HINT, 0x71 | LOWEST)?;
            ensure_eq!(r, 1, "lowest priority of two: vCPUs");
            (0..2).try_for_each(|id| g.window(id))?;
            let sum = g.count(0, 0x71) + g.count(1, 0x71);
            ensure_eq!(sum, round, "lowest priority of two: interrupts");
        }
        (0..2).for_each(|id| g.forget(id));
        ensure_eq!(send(&g.vm, to(1), NMI)?, 1, "NMI: vCPUs");
        (0..2).try_for_each(|id| g.exec(id, &[0x90, 0xc3], |_| {}).map(|_| ()))?;
        ensure_eq!((g.log(0), g.log(1)), (vec![], vec![2]), "NMI: vectors");
        g.forget(1);
        // Modes that are none for a message.
        for data in [0x70 | EXTINT, 0x70 | SMI_UNUSED] {
            let _ = msi(&g.vm, to(0), data);
            g.window(0)?;
            let pending = g.vcpus[0].events()?.interrupt.injected;
            ensure_eq!((g.seen(0), pending), (0, 0), "data {data:#x}: interrupts");
        }
        // An APIC that is disabled takes nothing, and is there.
        g.write(1, APIC + 0xf0, 0xff)?;
        ensure_eq!(send(&g.vm, to(1), 0x70)?, 0, "a disabled APIC: vCPUs");
        ensure_eq!(
            send(&g.vm, to(0xff), 0x70)?,
            1,
            "all, one of them disabled: vCPUs"
        );
        g.write(1, APIC + 0xf0, 0x1ff)?;
        (0..2).try_for_each(|id| g.window(id))?;
        ensure_eq!((g.log(0), g.log(1)), (vec![0x70], vec![]), "vectors");
    }
    Ok(())
}

/// Several at once come in the order of their vectors, and one vector once.
fn msi_order(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    for vector in [0x31, 0xf2, 0x80, 0x31, 0x7f, 0x80] {
        ensure_eq!(send(&g.vm, APIC, vector)?, 1, "vCPUs");
    }
    g.window(0)?;
    ensure_eq!(g.log(0), [0xf2, 0x80, 0x7f, 0x31], "vectors");
    // The priority of the task keeps the lower ones away.
    g.forget(0);
    g.write(0, APIC + 0x80, 0x80)?;
    for vector in [0x31, 0xf2, 0x90, 0x8f] {
        send(&g.vm, APIC, vector)?;
    }
    g.window(0)?;
    ensure_eq!(g.log(0), [0xf2, 0x90], "vectors above the task's priority");
    g.write(0, APIC + 0x80, 0)?;
    g.window(0)?;
    ensure_eq!(
        g.log(0),
        [0xf2, 0x90, 0x8f, 0x31],
        "vectors once it is lower"
    );
    Ok(())
}

/// With KVM_CAP_X2APIC_API, the upper half of the address has the upper bits of the destination.
fn wide_destinations(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 2)?;
    if g.kvm.capability(kb::KVM_CAP_X2APIC_API) <= 0 {
        skip!("no KVM_CAP_X2APIC_API");
    }
    for flags in [1 << 4, 1 << 31, 1 << 32, u64::MAX] {
        let r = g.vm.enable_cap(kb::KVM_CAP_X2APIC_API, flags);
        expect_errno(r, libc::EINVAL, &format!("flags {flags:#x}"))?;
    }
    let high = |bits: u64| bits << 32;
    // Before, that is nothing.
    ensure_eq!(
        send(&g.vm, to(1) | high(0x1ff), 0x70)?,
        1,
        "not enabled: vCPUs"
    );
    g.vm.enable_cap(
        kb::KVM_CAP_X2APIC_API,
        kb::KVM_X2APIC_API_USE_32BIT_IDS.into(),
    )?;
    // Enabled, its lowest byte has to be 0, as the remapping of interrupts would have it.
    for bits in [1, 0xff, 0x101] {
        let what = format!("high half {bits:#x}");
        expect_errno(msi(&g.vm, to(1) | high(bits), 0x70), libc::EINVAL, &what)?;
        let r = route(&g.vm, &[to_msi(5, to(1) | high(bits), 0x70)]);
        expect_errno(r, libc::EINVAL, &what)?;
    }
    ensure_eq!(send(&g.vm, to(1), 0x70)?, 1, "APIC 1: vCPUs");
    let r = msi(&g.vm, to(1) | high(0x100), 0x70);
    ensure!(
        r.as_ref()
            .map_or_else(|e| e.errno == libc::EPERM, |n| *n == 0),
        "APIC 0x101: {r:?}"
    );
    route(
        &g.vm,
        &[to_msi(5, to(1) | high(0x100), 0x70), to_msi(6, to(1), 0x71)],
    )?;
    let s = line_status(&g.vm, 5, 1)?;
    ensure!(s <= 0, "APIC 0x101 by a route: status {s}");
    ensure_eq!(line_status(&g.vm, 6, 1)?, 1, "APIC 1 by a route: status");
    (0..2).try_for_each(|id| g.window(id))?;
    ensure_eq!((g.log(0), g.log(1)), (vec![], vec![0x71, 0x70]), "vectors");
    Ok(())
}

/// An APIC whose number has more than 8 bits: only wide destinations reach it.
fn wide_apic(env: &Env) -> Outcome {
    const ID: u64 = 300;
    let mut g = Guest::new(env, Chips::Full, 1)?;
    if g.kvm.capability(kb::KVM_CAP_X2APIC_API) <= 0 {
        skip!("no KVM_CAP_X2APIC_API");
    }
    if g.kvm.capability(kb::KVM_CAP_MAX_VCPU_ID) <= ID as i32 {
        skip!("no vCPU has the number {ID}");
    }
    guest_code!(wrmsr, ".code64", "wrmsr", "ret");
    g.add_vcpu(usize_of(ID))?;
    let mut s = g.vcpus[1].sregs()?;
    s.apic_base |= 1 << 10;
    g.vcpus[1].set_sregs(&s)?;
    g.exec(1, wrmsr(), |r| (r.rcx, r.rax, r.rdx) = (0x80f, 0x1ff, 0))?;
    g.set_how(1, how::X2APIC);
    let wide = to(ID & 0xff) | (ID >> 8 << 40);
    let nobody = |address: u64, what: &str| -> Outcome {
        let r = msi(&g.vm, address, 0x70);
        ensure!(
            r.as_ref()
                .map_or_else(|e| e.errno == libc::EPERM, |n| *n == 0),
            "{what}: {r:?}"
        );
        Ok(())
    };
    nobody(wide, "not enabled")?;
    nobody(to(ID & 0xff), "its low 8 bits")?;
    let all = kb::KVM_X2APIC_API_USE_32BIT_IDS | kb::KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    g.vm.enable_cap(
        kb::KVM_CAP_X2APIC_API,
        kb::KVM_X2APIC_API_USE_32BIT_IDS.into(),
    )?;
    nobody(to(ID & 0xff), "its low 8 bits, enabled")?;
    ensure_eq!(send(&g.vm, wide, 0x70)?, 1, "vCPUs");
    route(&g.vm, &[to_msi(30, wide, 0x71)])?;
    ensure_eq!(line_status(&g.vm, 30, 1)?, 1, "status of a route");
    g.window(1)?;
    ensure_eq!(g.log(1), [0x71, 0x70], "vectors");
    // All, as an xAPIC has it, is an x2APIC's too, unless that is disabled.
    ensure_eq!(send(&g.vm, to(0xff), 0x72)?, 2, "all");
    g.vm.enable_cap(kb::KVM_CAP_X2APIC_API, all.into())?;
    // KVM finds an xAPIC then only if that has a logical number.
    let xapics = send(&g.vm, to(0xff), 0x73)?;
    (0..2).try_for_each(|id| g.window(id))?;
    let want: &[u8] = if xapics == 1 { &[0x73, 0x72] } else { &[0x72] };
    ensure_eq!(g.log(0), want, "vectors of the xAPIC");
    ensure_eq!(g.log(1), [0x71, 0x70, 0x72], "vectors of the x2APIC");
    Ok(())
}

/// Interrupts while the table is replaced time and again, by one that has the same route and others:
/// none is lost.
fn replaced_in_flight(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 1)?;
    let table = |n: u32| -> Vec<Entry> {
        let others = (100..100 + n).map(|gsi| to_msi(gsi, APIC, 0x99));
        others
            .chain([to_msi(24, APIC, 0x66), to_pin(20, IOAPIC, 20)])
            .collect()
    };
    route(&g.vm, &table(0))?;
    set_entry(&g.vm, 20, 0x77)?;
    let done = AtomicBool::new(false);
    let tables = AtomicU64::new(0);
    let rounds = g.running(irq::spin(), |_| {
        std::thread::scope(|scope| {
            let other = scope.spawn(|| -> Outcome {
                let mut rng = Rng::new(env.seed);
                while !done.load(Ordering::SeqCst) {
                    route(&g.vm, &table(rng.below(60) as u32))?;
                    tables.fetch_add(1, Ordering::SeqCst);
                }
                Ok(())
            });
            let pulses = || -> Result<u64, Verdict> {
                let mut round = 0;
                while round < env.fewer(100) || tables.load(Ordering::SeqCst) < env.fewer(20) {
                    round += 1;
                    ensure_eq!(line_status(&g.vm, 24, 1)?, 1, "status of the message");
                    ensure_eq!(line_status(&g.vm, 20, 1)?, 1, "status of the pin");
                    line(&g.vm, 20, 0)?;
                    wait_for("both", || {
                        g.count(0, 0x66) == round && g.count(0, 0x77) == round
                    })?;
                }
                Ok(round)
            };
            let r = pulses();
            done.store(true, Ordering::SeqCst);
            other.join().unwrap_or_else(|_| fail!("panic"))?;
            r
        })
    })?;
    println!("{rounds} rounds, {} tables", tables.load(Ordering::SeqCst));
    ensure_eq!(g.count(0, 0x99), 0, "interrupts of other routes");
    Ok(())
}

/// A GSI whose route is changed: from the call's return on, nothing goes the old way.
fn no_stale_route(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 2)?;
    route(&g.vm, &[to_msi(30, to(0), 0x60)])?;
    g.running(irq::spin(), |_| {
        for round in 0..env.fewer(200) {
            let id = usize_of(round % 2);
            route(&g.vm, &[to_msi(30, to(id as u64), 0x60 + id as u32)])?;
            let vector = 0x60 + id as u8;
            let before = (g.count(id, vector), g.seen(1 - id));
            line(&g.vm, 30, 1)?;
            wait_for("the interrupt", || g.count(id, vector) == before.0 + 1)?;
            ensure_eq!(
                g.seen(1 - id),
                before.1,
                "interrupts of the other, round {round}"
            );
        }
        Ok(())
    })
}

/// Two threads send to each of two vCPUs, all at once: a vector for each pair, none lost.
fn crossing(env: &Env) -> Outcome {
    let g = Guest::new(env, Chips::Full, 2)?;
    (0..2).for_each(|id| g.set_how(id, how::APIC));
    let n = env.fewer(150);
    g.running(irq::idle(), |_| {
        std::thread::scope(|scope| -> Outcome {
            let senders: Vec<_> = (0..4u32)
                .map(|k| {
                    let g = &g;
                    scope.spawn(move || -> Outcome {
                        let (id, vector) = ((k % 2) as usize, 0x50 + 0x11 * k);
                        for round in 1..=n {
                            let took = msi(&g.vm, to(id as u64), vector)?;
                            ensure_eq!(took, 1, "vCPUs");
                            let what = format!("{round} of vector {vector:#x}");
                            wait_for(&what, || g.count(id, vector as u8) == round)?;
                        }
                        Ok(())
                    })
                })
                .collect();
            let results: Vec<_> = senders.into_iter().map(|s| s.join()).collect();
            results
                .into_iter()
                .try_for_each(|r| r.unwrap_or_else(|_| fail!("panic")))
        })
    })
}

fn main() -> ExitCode {
    selftests::tap::main(
        "routing",
        tests![
            arguments,
            limits,
            by_default,
            fan_out,
            replaced,
            msi_arguments,
            msi_delivery,
            msi_order,
            wide_destinations,
            wide_apic,
            replaced_in_flight,
            no_stale_route,
            crossing,
        ],
    )
}
