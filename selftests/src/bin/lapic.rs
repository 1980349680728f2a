// SPDX-License-Identifier: GPL-2.0

//! The local APIC in the kernel: its registers by memory, by MSR and by ioctl, its modes, priorities.

use kvm_bindings as kb;
use selftests::apic::{
    self, block, icr, msr, reg, Answer, Chip, Guest, Op, State, BASE, DEADLINE, ENABLED, GP,
    MASKED, PERIODIC,
};
use selftests::check::expect_errno;
use selftests::guest::PORT;
use selftests::machine::{Exit, Machine, Mode};
use selftests::{ensure, ensure_eq, fail, guest_code, sys, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

/// The local vector table without the entry for corrected machine checks.
const LVT: [u32; 6] = [
    reg::LVT_TIMER,
    reg::LVT_THERMAL,
    reg::LVT_PMC,
    reg::LVT_LINT0,
    reg::LVT_LINT1,
    reg::LVT_ERROR,
];

/// The calls that need a local APIC say EINVAL where there is none.
fn without(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "hlt");
    apic::need(&env.open()?, Chip::Split)?;
    let m = Machine::new(env, Mode::Long, code())?;
    expect_errno(
        State::get(&m.vcpu).map(|_| ()),
        libc::EINVAL,
        "KVM_GET_LAPIC",
    )?;
    expect_errno(
        m.vcpu.fd.ioctl(sys::KVM_GET_LAPIC, 0),
        libc::EINVAL,
        "KVM_GET_LAPIC of a bad address",
    )?;
    let empty = State(kb::kvm_lapic_state::default());
    expect_errno(empty.set(&m.vcpu), libc::EINVAL, "KVM_SET_LAPIC")?;
    let address = kb::kvm_vapic_addr { vapic_addr: 0x1000 };
    expect_errno(
        m.vcpu.fd.ioctl_ref(sys::KVM_SET_VAPIC_ADDR, &address),
        libc::EINVAL,
        "KVM_SET_VAPIC_ADDR",
    )?;
    // Without a local APIC there is no x2APIC either, as the MSRs have it.
    ensure_eq!(m.vcpu.msr(msr::X2APIC + 3)?, None, "MSR 0x803");
    ensure!(
        !m.vcpu.set_msr(msr::X2APIC + 8, 0)?,
        "MSR 0x808 was written"
    );
    Ok(())
}

/// Bad addresses.
fn bad_addresses(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let fd = &g.vcpus[0].fd;
    for call in [
        sys::KVM_GET_LAPIC,
        sys::KVM_SET_LAPIC,
        sys::KVM_TPR_ACCESS_REPORTING,
        sys::KVM_SET_VAPIC_ADDR,
    ] {
        expect_errno(fd.ioctl(call, 0x8), libc::EFAULT, call.name)?;
    }
    // What failed did not change anything.
    ensure_eq!(g.cpu(0).read(reg::SVR)?, 0xff, "SVR");
    Ok(())
}

/// The state after creation, by ioctl, and as the guest reads it.
fn after_reset(env: &Env) -> Outcome {
    for chip in [Chip::Split, Chip::Full] {
        let g = Guest::new(env, chip, 2)?;
        for id in 0..2u32 {
            let c = g.cpu(id as usize);
            let s = State::get(c.vcpu())?;
            let version = s.reg(reg::VERSION);
            ensure_eq!(version & 0xff, 0x14, "version");
            ensure!(
                (5..=6).contains(&((version >> 16) & 0xff)),
                "highest LVT entry of {version:#x}"
            );
            for offset in (0..0x400u32).step_by(16) {
                let want = match offset {
                    reg::ID => id << 24,
                    reg::VERSION => version,
                    reg::DFR => 0xffff_ffff,
                    reg::SVR => 0xff,
                    // The boot processor's LINT0 takes the PIC's interrupts: a quirk that is on by default.
                    reg::LVT_LINT0 if id == 0 => 0x700,
                    reg::CMCI if (version >> 16) & 0xff < 6 => 0,
                    reg::CMCI | reg::LVT_TIMER..=reg::LVT_ERROR => MASKED,
                    _ => 0,
                };
                ensure_eq!(
                    s.reg(offset),
                    want,
                    "{chip:?}, vCPU {id}, KVM_GET_LAPIC at {offset:#x}"
                );
                let readable = !matches!(offset, 0..=0x10 | 0x40..=0x70 | 0xb0 | 0xc0 | 0x290..=0x2f0
                    | 0x3a0..=0x3d0 | 0x3f0..);
                if readable {
                    ensure_eq!(
                        c.read(offset)?,
                        want,
                        "{chip:?}, vCPU {id}, guest's read at {offset:#x}"
                    );
                }
            }
            let base = BASE | msr::EN | if id == 0 { msr::BSP } else { 0 };
            ensure_eq!(
                c.rdmsr(msr::APIC_BASE)?,
                base,
                "IA32_APIC_BASE of vCPU {id}"
            );
            ensure_eq!(c.vcpu().sregs()?.apic_base, base, "KVM_GET_SREGS");
            ensure_eq!(c.vcpu().kvm_run().apic_base, base, "kvm_run.apic_base");
        }
    }
    Ok(())
}

/// KVM_SET_LAPIC of what KVM_GET_LAPIC gave, with each register changed, in xAPIC mode.
fn round_trip_xapic(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.start()?;
    let mut s = State::get(c.vcpu())?;
    let version = s.reg(reg::VERSION);
    let values = [
        (reg::ID, 0x0700_0000),
        (reg::TPR, 0x35),
        (reg::LDR, 0x4200_0000),
        (reg::DFR, 0x0fff_ffff),
        (reg::SVR, ENABLED | 0x3f),
        (reg::ICR, 0x000c_0831),
        (reg::ICR2, 0x0300_0000),
        (reg::LVT_TIMER, PERIODIC | MASKED | 0x41),
        (reg::LVT_THERMAL, MASKED | 0x42),
        (reg::LVT_PMC, MASKED | 0x443),
        (reg::LVT_LINT0, 0x1_8744),
        (reg::LVT_LINT1, MASKED | 0x400),
        (reg::LVT_ERROR, 0x46),
        (reg::DIVIDE, 0xb),
    ];
    for (r, v) in values {
        s.put(r, v);
    }
    s.put(reg::VERSION, 0x1234_5678); // not settable
    for v in [0x31u8, 0x52, 0xef] {
        s.put_vector(reg::TMR, v);
    }
    s.put_vector(reg::ISR, 0x63);
    s.put_vector(reg::IRR, 0x52);
    s.set(c.vcpu())?;
    let got = State::get(c.vcpu())?;
    for (r, v) in values {
        ensure_eq!(got.reg(r), v, "KVM_GET_LAPIC at {r:#x}");
        ensure_eq!(c.read(r)?, v, "the guest's read at {r:#x}");
    }
    ensure_eq!(got.reg(reg::VERSION), version, "version");
    // KVM_GET_LAPIC may show the PPR of before: kvm-intel computes it too early.
    ensure_eq!(c.read(reg::PPR)?, 0x60, "PPR, from TPR and ISR");
    for v in 0..=255u8 {
        let want = (v == 0x63, matches!(v, 0x31 | 0x52 | 0xef), v == 0x52);
        let bits = (
            got.vector(reg::ISR, v),
            got.vector(reg::TMR, v),
            got.vector(reg::IRR, v),
        );
        ensure_eq!(bits, want, "ISR, TMR and IRR of vector {v:#x}");
    }
    // Once more, unchanged.
    got.set(c.vcpu())?;
    let again = State::get(c.vcpu())?;
    for offset in (0..0x400u32).step_by(16).filter(|o| *o != reg::PPR) {
        ensure_eq!(
            again.reg(offset),
            got.reg(offset),
            "the second time at {offset:#x}"
        );
    }
    Ok(())
}

/// The formats of the APIC ID in x2APIC mode.
fn round_trip_x2apic(env: &Env) -> Outcome {
    for wide in [false, true] {
        let g = Guest::prepared(env, Chip::Split, 3, |vm| {
            if wide {
                vm.enable_cap(
                    kb::KVM_CAP_X2APIC_API,
                    kb::KVM_X2APIC_API_USE_32BIT_IDS.into(),
                )?;
            }
            Ok(())
        })?;
        let c = g.cpu(2);
        c.enable_x2apic()?;
        c.xwrite(reg::TPR, 0x20)?;
        c.xwrite(reg::LVT_ERROR, 0x77)?;
        c.xipi(icr::LOGICAL | 0x99, 0xabcd_0000)?;
        let s = State::get(c.vcpu())?;
        let id = if wide { 2 } else { 2 << 24 };
        ensure_eq!(s.reg(reg::ID), id, "ID with 32-bit IDs {wide}");
        ensure_eq!(s.reg(reg::LDR), 4, "LDR");
        ensure_eq!(s.reg(reg::TPR), 0x20, "TPR");
        ensure_eq!(s.reg(reg::LVT_ERROR), 0x77, "LVT error entry");
        ensure_eq!(
            (s.reg(reg::ICR), s.reg(reg::ICR2)),
            (icr::LOGICAL | 0x99, 0xabcd_0000),
            "ICR, in two halves"
        );
        s.set(c.vcpu())?;
        ensure_eq!(
            c.xread(reg::ICR)?,
            0xabcd_0000_0000_0899,
            "ICR after KVM_SET_LAPIC"
        );
        // The ID belongs to the vCPU: another is refused, or in the old format not looked at. LDR follows.
        let mut t = s;
        t.put(reg::ID, if wide { 1 } else { 1 << 24 });
        t.put(reg::LDR, 0x55);
        t.put(reg::TPR, 0x30);
        if wide {
            expect_errno(t.set(c.vcpu()), libc::EINVAL, "another ID")?;
            ensure_eq!(c.xread(reg::TPR)?, 0x20, "TPR after the refusal");
            t.put(reg::ID, 2 << 24);
            expect_errno(t.set(c.vcpu()), libc::EINVAL, "an ID in the old format")?;
        } else {
            t.set(c.vcpu())?;
            ensure_eq!(c.xread(reg::TPR)?, 0x30, "TPR");
        }
        ensure_eq!(
            (c.xread(reg::ID)?, c.xread(reg::LDR)?),
            (2, 4),
            "ID and LDR"
        );
    }
    Ok(())
}

/// KVM_CAP_X2APIC_API: flags that are none, and those that exclude each other.
fn x2apic_api(env: &Env) -> Outcome {
    let kvm = env.open()?;
    apic::need(&kvm, Chip::Split)?;
    let known = kvm.capability(kb::KVM_CAP_X2APIC_API);
    ensure!(known & 3 == 3, "KVM_CAP_X2APIC_API is {known:#x}");
    let vm = kvm.create_vm()?;
    let set = |flags: u64| vm.enable_cap(kb::KVM_CAP_X2APIC_API, flags);
    for bad in [1u64 << 4, 1 << 31, 1 << 32, 1 << 63, u64::MAX] {
        expect_errno(set(bad), libc::EINVAL, &format!("flags {bad:#x}"))?;
    }
    if known & 0xc == 0xc {
        expect_errno(
            set(0xc),
            libc::EINVAL,
            "EOI broadcasts can be suppressed, and cannot",
        )?;
        expect_errno(
            set(4),
            libc::EINVAL,
            "suppressed EOI broadcasts without a split irqchip",
        )?;
        set(8)?;
    }
    // It is no error before, between and after.
    set(0)?;
    apic::create(&vm, Chip::Split)?;
    set(1)?;
    let _vcpu = vm.create_vcpu(0)?;
    set(3)?;
    Ok(())
}

/// Accesses that are not 32 bits wide and aligned to 16 bytes.
fn mmio_sizes(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.enable()?;
    let at = |r: u32| BASE + u64::from(r);
    c.write(reg::LVT_ERROR, 0x1_0061)?;
    // Parts of a register can be read.
    for (op, offset, want) in [
        (Op::Read8, 0, 0x61),
        (Op::Read8, 2, 1),
        (Op::Read16, 0, 0x61),
        (Op::Read16, 2, 1),
    ] {
        ensure_eq!(
            c.done(op, at(reg::LVT_ERROR) + offset, 0)?,
            want,
            "{op:?} at {offset}"
        );
    }
    // Writes of parts do nothing, or are done where the processor virtualizes the APIC; writes beside the
    // register do nothing.
    for (op, offset, part) in [
        (Op::Write8, 0u64, 0x1_0055),
        (Op::Write16, 0, 0x1_0055),
        (Op::Write32, 4, 0x1_0061),
        (Op::Write32, 8, 0x1_0061),
        (Op::Write32, 12, 0x1_0061),
    ] {
        c.write(reg::LVT_ERROR, 0x1_0061)?;
        c.done(op, at(reg::LVT_ERROR) + offset, 0x55)?;
        let got = c.read(reg::LVT_ERROR)?;
        ensure!(
            got == 0x1_0061 || got == part,
            "{got:#x} after {op:?} at {offset}"
        );
    }
    Ok(())
}

/// Registers that cannot be written, and reserved places, by memory.
fn mmio_read_only(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.enable()?;
    for r in [
        reg::VERSION,
        reg::APR,
        reg::PPR,
        reg::CURRENT,
        reg::ISR,
        reg::TMR + 0x70,
        reg::IRR + 0x20,
    ] {
        let before = c.read(r)?;
        c.write(r, 0xffff_ffff)?;
        ensure_eq!(c.read(r)?, before, "register {r:#x} after a write");
    }
    ensure_eq!(c.read(reg::ESR)?, 0, "ESR");
    c.write(reg::ESR, 0)?;
    for r in [0u32, 0x10, 0x40, 0x70, 0xc0, 0x2a0, 0x3a0, 0x3d0] {
        c.write(r, 0xffff_ffff)?;
    }
    // SELF IPI is a register of x2APIC mode only.
    c.write(reg::SELF_IPI, 0x55)?;
    c.done(Op::Sti, 0, 0)?;
    ensure_eq!(g.total(0), 0, "interrupts");
    // What is written and reads back masked.
    for (r, v, want) in [
        (reg::ID, 0x5612_3456, 0x5600_0000u32),
        (reg::LDR, 0x1234_5678, 0x1200_0000),
        (reg::DFR, 0, 0x0fff_ffff),
        (reg::TPR, 0xffff_ff12, 0x12),
        (reg::ICR2, 0x89ab_cdef, 0x8900_0000),
        (reg::DIVIDE, 0xffff_ffff, 0xb),
        (reg::SVR, 0xffff_e17f, 0x17f),
    ] {
        c.write(r, v)?;
        ensure_eq!(c.read(r)?, want, "register {r:#x} after a write of {v:#x}");
    }
    Ok(())
}

/// The local vector table: which bits there are, and the mask while the APIC is disabled by software.
fn lvt(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.enable()?;
    for r in LVT {
        c.write(r, 0xffff_ffff)?;
        let got = c.read(r)?;
        let want = match r {
            reg::LVT_TIMER => MASKED | PERIODIC | DEADLINE | 0xff,
            reg::LVT_ERROR => MASKED | 0xff,
            reg::LVT_LINT0 | reg::LVT_LINT1 => MASKED | 0xa7ff,
            _ => MASKED | 0x7ff,
        };
        // Bit 12, delivery status, and bit 14, remote IRR, cannot be written; KVM keeps bit 12 anyhow. The
        // modes of the timer depend on CPUID.
        let loose = 0x5000
            | if r == reg::LVT_TIMER {
                PERIODIC | DEADLINE
            } else {
                0
            };
        ensure_eq!(
            got & !loose,
            want & !loose,
            "LVT {r:#x} after a write of all ones"
        );
        c.write(r, 0x40)?;
        ensure_eq!(c.read(r)?, 0x40, "LVT {r:#x}");
    }
    // Disabling masks them all, and they stay so while it is disabled, and after.
    c.write(reg::SVR, 0xff)?;
    for r in LVT {
        ensure_eq!(c.read(r)?, MASKED | 0x40, "LVT {r:#x} when disabled");
        c.write(r, 0x41)?;
        ensure_eq!(
            c.read(r)?,
            MASKED | 0x41,
            "LVT {r:#x} written while disabled"
        );
    }
    c.write(reg::SVR, ENABLED | 0xff)?;
    for r in LVT {
        ensure_eq!(c.read(r)?, MASKED | 0x41, "LVT {r:#x} when enabled again");
        c.write(r, 0x42)?;
        ensure_eq!(c.read(r)?, 0x42, "LVT {r:#x} written when enabled again");
    }
    Ok(())
}

/// Registers by MSR: those that only read, only write, do not exist; reserved bits.
fn x2apic_msrs(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 2)?;
    let c = g.cpu(1);
    let m = |r: u32| u64::from(msr::X2APIC + (r >> 4));
    // Not there in xAPIC mode.
    ensure_eq!(
        c.call(Op::Rdmsr, m(reg::VERSION), 0)?,
        GP,
        "RDMSR in xAPIC mode"
    );
    ensure_eq!(
        c.call(Op::Wrmsr, m(reg::TPR), 0)?,
        GP,
        "WRMSR in xAPIC mode"
    );
    ensure_eq!(
        c.vcpu().msr(msr::X2APIC + 3)?,
        None,
        "KVM_GET_MSRS in xAPIC mode"
    );
    c.enable_x2apic()?;
    ensure_eq!(c.xread(reg::ID)?, 1, "ID");
    ensure_eq!(c.xread(reg::LDR)?, 2, "LDR");
    ensure_eq!(c.xread(reg::VERSION)? & 0xff, 0x14, "version");
    for r in [
        reg::ID,
        reg::VERSION,
        reg::PPR,
        reg::LDR,
        reg::ISR,
        reg::TMR,
        reg::IRR + 0x70,
        reg::CURRENT,
    ] {
        ensure_eq!(
            c.call(Op::Wrmsr, m(r), 0)?,
            GP,
            "WRMSR of the read-only {r:#x}"
        );
    }
    for r in [reg::EOI, reg::SELF_IPI] {
        ensure_eq!(
            c.call(Op::Rdmsr, m(r), 0)?,
            GP,
            "RDMSR of the write-only {r:#x}"
        );
    }
    for r in [
        0u32,
        0x10,
        0x40,
        0x70,
        reg::APR,
        0xc0,
        reg::DFR,
        0x290,
        reg::ICR2,
        0x3a0,
        0x3d0,
    ] {
        ensure_eq!(
            c.call(Op::Rdmsr, m(r), 0)?,
            GP,
            "RDMSR of {r:#x}, which is not there"
        );
        ensure_eq!(
            c.call(Op::Wrmsr, m(r), 0)?,
            GP,
            "WRMSR of {r:#x}, which is not there"
        );
    }
    for msr in [0x840u64, 0x8ff] {
        ensure_eq!(c.call(Op::Rdmsr, msr, 0)?, GP, "RDMSR of {msr:#x}");
        ensure_eq!(c.call(Op::Wrmsr, msr, 0)?, GP, "WRMSR of {msr:#x}");
    }
    // Bits 63:32 are reserved but in ICR.
    for r in [
        reg::TPR,
        reg::EOI,
        reg::SVR,
        reg::ESR,
        reg::LVT_TIMER,
        reg::LVT_ERROR,
        reg::INITIAL,
        reg::DIVIDE,
        reg::SELF_IPI,
    ] {
        ensure_eq!(
            c.call(Op::Wrmsr, m(r), 1 << 32)?,
            GP,
            "WRMSR of {r:#x} with bit 32"
        );
    }
    ensure_eq!(
        c.call(Op::Wrmsr, m(reg::ESR), 1)?,
        GP,
        "WRMSR of ESR with a bit"
    );
    c.xwrite(reg::ESR, 0)?;
    ensure_eq!(c.xread(reg::ESR)?, 0, "ESR");
    ensure_eq!(
        c.call(Op::Wrmsr, m(reg::SELF_IPI), 0x155)?,
        GP,
        "WRMSR of SELF IPI with bit 8"
    );
    for bit in [13u64, 16, 17, 20, 31] {
        let value = (1 << bit) | u64::from(icr::SELF) | 0x99;
        ensure_eq!(
            c.call(Op::Wrmsr, m(reg::ICR), value)?,
            GP,
            "WRMSR of ICR with bit {bit}"
        );
    }
    // What was refused did nothing.
    c.done(Op::Sti, 0, 0)?;
    ensure_eq!(g.total(1), 0, "interrupts");
    // ICR is one register, and its bit 12 never reads 1.
    c.xipi(icr::LOGICAL | 0x99, 0x1234_0000)?;
    ensure_eq!(c.xread(reg::ICR)?, 0x1234_0000_0000_0899, "ICR");
    for (r, v) in [
        (reg::TPR, 0x35u64),
        (reg::SVR, 0x1aa),
        (reg::LVT_THERMAL, 0x1_0041),
        (reg::LVT_PMC, 0x1_0442),
        (reg::LVT_LINT0, 0x1_0043),
        (reg::LVT_LINT1, 0x1_0400),
        (reg::LVT_ERROR, 0x45),
        (reg::DIVIDE, 0xa),
    ] {
        c.xwrite(r, v)?;
        ensure_eq!(c.xread(r)?, v, "register {r:#x} by MSR");
        // The host sees the same MSRs.
        ensure_eq!(
            c.vcpu().msr(msr::X2APIC + (r >> 4))?,
            Some(v),
            "KVM_GET_MSRS of {r:#x}"
        );
        ensure!(
            c.vcpu().set_msr(msr::X2APIC + (r >> 4), v)?,
            "KVM_SET_MSRS of {r:#x}"
        );
    }
    ensure!(
        !c.vcpu().set_msr(msr::X2APIC + 2, 1)?,
        "KVM_SET_MSRS of the ID"
    );
    ensure_eq!(
        c.vcpu().msr(msr::X2APIC + 0xe)?,
        None,
        "KVM_GET_MSRS of DFR"
    );
    Ok(())
}

/// The page of registers in x2APIC mode and in a disabled APIC: all ones, and writes go nowhere. It is
/// ordinary memory without the quirk.
fn mmio_hole(env: &Env) -> Outcome {
    for quirk in [true, false] {
        let g = Guest::prepared(env, Chip::Split, 1, |vm| {
            if !quirk {
                vm.enable_cap(
                    kb::KVM_CAP_DISABLE_QUIRKS2,
                    kb::KVM_X86_QUIRK_LAPIC_MMIO_HOLE.into(),
                )?;
            }
            Ok(())
        })?;
        let c = g.cpu(0);
        c.enable()?;
        c.write(reg::TPR, 0x20)?;
        let page = BASE + u64::from(reg::TPR);
        for mode in [msr::EN | msr::EXTD, 0] {
            c.wrmsr(msr::APIC_BASE, BASE | msr::BSP | mode)?;
            c.load(Op::Write32, page, 0x70)?;
            c.vcpu().run()?;
            let memory = match selftests::machine::decode(c.vcpu()) {
                Exit::MmioWrite { addr, data } if !quirk => {
                    ensure_eq!(
                        (addr, data),
                        (page, vec![0x70, 0, 0, 0]),
                        "exit in mode {mode:#x}"
                    );
                    ensure_eq!(c.finish()?, Answer::Done(0x70), "after it");
                    false
                }
                Exit::Out { port: PORT, .. } => !quirk || c.read(reg::TPR)? != 0xffff_ffff,
                other => fail!("exit {other:x?} in mode {mode:#x} with the quirk {quirk}"),
            };
            // kvm-intel with APICv has a page of memory there, for the processor's sake, which shows
            // in the modes in which the processor does not watch it.
            if memory {
                ensure_eq!(c.read(reg::TPR)?, 0x70, "the page in mode {mode:#x}");
            }
            ensure_eq!(
                State::get(c.vcpu())?.reg(reg::TPR),
                0x20,
                "TPR in mode {mode:#x}"
            );
        }
    }
    Ok(())
}

/// The modes, and which changes the guest may make: SDM volume 3, figure 12-27.
fn modes(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    let base = BASE | msr::BSP;
    let (off, xapic, x2apic) = (base, base | msr::EN, base | msr::EN | msr::EXTD);
    let cases = [
        (xapic, base | msr::EXTD, false),
        (xapic, xapic | 1, false),
        (xapic, xapic | (1 << 9), false),
        (xapic, xapic | (1 << 63), false),
        (xapic, xapic, true),
        (xapic, x2apic, true),
        (x2apic, xapic, false),
        (x2apic, base | msr::EXTD, false),
        (x2apic, x2apic, true),
        (x2apic, off, true),
        (off, x2apic, false),
        (off, base | msr::EXTD, false),
        (off, off, true),
        (off, xapic, true),
        (xapic, off, true),
        (off, xapic, true),
    ];
    for (from, to, allowed) in cases {
        ensure_eq!(c.rdmsr(msr::APIC_BASE)?, from, "before {to:#x}");
        let answer = c.call(Op::Wrmsr, msr::APIC_BASE.into(), to)?;
        ensure_eq!(answer != GP, allowed, "{from:#x} to {to:#x} is allowed");
        let now = if allowed { to } else { from };
        ensure_eq!(c.rdmsr(msr::APIC_BASE)?, now, "after {to:#x}");
        ensure_eq!(
            c.vcpu().kvm_run().apic_base,
            now,
            "kvm_run.apic_base after {to:#x}"
        );
        ensure_eq!(
            c.vcpu().sregs()?.apic_base,
            now,
            "KVM_GET_SREGS after {to:#x}"
        );
    }
    // CPUID shows whether there is an APIC as long as there is one.
    let edx = |c: &apic::Cpu<'_>| -> Result<bool, Verdict> {
        c.done(Op::Cpuid, 1, 0)?;
        let reply = selftests::guest::usize_of(g.block(0) + block::REPLY) + 4;
        Ok(g.mem.read::<u32>(reply) & (1 << 9) != 0)
    };
    ensure!(edx(&c)?, "CPUID.1:EDX.APIC while enabled");
    c.wrmsr(msr::APIC_BASE, off)?;
    ensure!(!edx(&c)?, "CPUID.1:EDX.APIC while disabled");
    c.wrmsr(msr::APIC_BASE, xapic)?;
    ensure!(edx(&c)?, "CPUID.1:EDX.APIC when enabled again");
    // The host may make any change but those to what cannot be.
    let host = |v: u64| c.vcpu().set_msr(msr::APIC_BASE, v);
    ensure!(host(x2apic)?, "xAPIC to x2APIC");
    ensure!(host(xapic)?, "x2APIC to xAPIC");
    ensure!(host(off)?, "xAPIC to disabled");
    ensure!(host(x2apic)?, "disabled to x2APIC");
    ensure!(!host(base | msr::EXTD)?, "EXTD without EN");
    ensure!(!host(xapic | 2)?, "a reserved bit");
    let mut s = c.vcpu().sregs()?;
    s.apic_base = base | msr::EXTD;
    expect_errno(
        c.vcpu().set_sregs(&s),
        libc::EINVAL,
        "KVM_SET_SREGS with EXTD without EN",
    )?;
    ensure_eq!(c.vcpu().msr(msr::APIC_BASE)?, Some(x2apic), "after that");
    s.apic_base = xapic;
    c.vcpu().set_sregs(&s)?;
    ensure_eq!(
        c.vcpu().msr(msr::APIC_BASE)?,
        Some(xapic),
        "after KVM_SET_SREGS"
    );
    Ok(())
}

/// Without the feature in CPUID there is no x2APIC mode.
fn no_x2apic(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let mut cpuid = g.kvm.supported_cpuid()?;
    for e in cpuid.list_mut() {
        if e.function == 1 {
            e.ecx &= !((1 << 21) | (1 << 24));
        }
    }
    g.vcpus[0].set_cpuid(&cpuid)?;
    let c = g.cpu(0);
    let x2apic = BASE | msr::BSP | msr::EN | msr::EXTD;
    ensure_eq!(
        c.call(Op::Wrmsr, msr::APIC_BASE.into(), x2apic)?,
        GP,
        "WRMSR"
    );
    ensure!(!c.vcpu().set_msr(msr::APIC_BASE, x2apic)?, "KVM_SET_MSRS");
    // Without the TSC deadline the timer has two modes.
    c.enable()?;
    c.write(reg::LVT_TIMER, 0x7_0040)?;
    ensure_eq!(c.read(reg::LVT_TIMER)?, 0x3_0040, "LVT timer entry");
    // The MSR is not there; KVM lets it read 0.
    let read = c.call(Op::Rdmsr, msr::TSC_DEADLINE.into(), 0)?;
    ensure!(
        read == GP || read == Answer::Done(0),
        "RDMSR of IA32_TSC_DEADLINE: {read:x?}"
    );
    Ok(())
}

/// The registers move with their base; at the old place is what the slots have there.
fn base_moves(env: &Env) -> Outcome {
    let g = Guest::new(env, Chip::Split, 1)?;
    let c = g.cpu(0);
    c.enable()?;
    c.write(reg::TPR, 0x40)?;
    let moved = 0xd000_0000u64;
    c.wrmsr(msr::APIC_BASE, moved | msr::BSP | msr::EN)?;
    let offset = u64::from(reg::TPR);
    ensure_eq!(
        c.done(Op::Read32, moved + offset, 0)?,
        0x40,
        "TPR at the new place"
    );
    c.done(Op::Write32, moved + offset, 0x50)?;
    ensure_eq!(c.done(Op::ReadCr8, 0, 0)?, 5, "CR8");
    // SVR did not change, so interrupts come as before.
    g.acknowledge(0, block::NONE);
    c.done(
        Op::Write32,
        moved + u64::from(reg::ICR),
        (icr::SELF | 0x77).into(),
    )?;
    c.done(Op::Sti, 0, 0)?;
    ensure_eq!(g.log(0), vec![0x77u8], "interrupts");
    c.done(Op::Write32, moved + u64::from(reg::EOI), 0)?;
    ensure!(
        !State::get(c.vcpu())?.vector(reg::ISR, 0x77),
        "in service after EOI"
    );
    // And back.
    c.wrmsr(msr::APIC_BASE, BASE | msr::BSP | msr::EN)?;
    ensure_eq!(c.read(reg::TPR)?, 0x50, "TPR at the old place again");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "lapic",
        tests![
            without,
            bad_addresses,
            after_reset,
            round_trip_xapic,
            round_trip_x2apic,
            x2apic_api,
            mmio_sizes,
            mmio_read_only,
            lvt,
            x2apic_msrs,
            mmio_hole,
            modes,
            no_x2apic,
            base_moves,
        ],
    )
}
