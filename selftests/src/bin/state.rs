// SPDX-License-Identifier: GPL-2.0

//! A vCPU's state out and in: what newer VMMs ask for, and what must be refused.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::guest::{at, pte, usize_of, PORT};
use selftests::host::{interrupting_handler, interval_alarm, Rng};
use selftests::machine::{Exit, Machine, Mode, MODES};
use selftests::{ensure, ensure_eq, fail, guest_code, skip, sys, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

const TF: u64 = 0x100;
const BS: u64 = 1 << 14;

guest_code!(halt32, ".code32", "2: inc ebx", "hlt", "jmp 2b");
guest_code!(halt64, ".code64", "2: inc rbx", "hlt", "jmp 2b");

fn need(m: &Machine, cap: u32, name: &str) -> Outcome {
    if m.kvm.capability(cap) <= 0 {
        skip!("no {name}");
    }
    Ok(())
}

fn sregs2(m: &Machine) -> Result<kb::kvm_sregs2, sys::Error> {
    let mut sregs = kb::kvm_sregs2::default();
    m.vcpu.fd.ioctl_mut(sys::KVM_GET_SREGS2, &mut sregs)?;
    Ok(sregs)
}

fn set_sregs2(m: &Machine, sregs: &kb::kvm_sregs2) -> Result<i32, sys::Error> {
    m.vcpu.fd.ioctl_ref(sys::KVM_SET_SREGS2, sregs)
}

/// The registers of KVM_GET_SREGS, and the entries of PAE paging where that is on.
fn system_registers(env: &Env) -> Outcome {
    for mode in MODES {
        let m = Machine::new(env, mode, halt32())?;
        need(&m, kb::KVM_CAP_SREGS2, "KVM_CAP_SREGS2")?;
        let (old, new) = (m.vcpu.sregs()?, sregs2(&m)?);
        ensure_eq!(
            (new.cs, new.tr, new.gdt, new.idt),
            (old.cs, old.tr, old.gdt, old.idt),
            "segments and tables, {mode:?}"
        );
        ensure_eq!(
            (new.cr0, new.cr2, new.cr3, new.cr4, new.cr8, new.efer),
            (old.cr0, old.cr2, old.cr3, old.cr4, old.cr8, old.efer),
            "registers, {mode:?}"
        );
        ensure_eq!(new.apic_base, old.apic_base, "IA32_APIC_BASE, {mode:?}");
        let pae = mode == Mode::Pae;
        ensure_eq!(new.flags, u64::from(pae), "flags, {mode:?}");
        let want = if pae {
            [0, 1, 2, 3].map(|n| (at::PD + 0x1000 * n) | pte::P)
        } else {
            [0; 4]
        };
        ensure_eq!(new.pdptrs, want, "the four entries, {mode:?}");
        set_sregs2(&m, &new)?;
        ensure_eq!(sregs2(&m)?, new, "what was set, {mode:?}");
        for flags in [2, 3, 1 << 63] {
            let bad = kb::kvm_sregs2 { flags, ..new };
            expect_errno(set_sregs2(&m, &bad), libc::EINVAL, "unknown flags")?;
        }
        if !pae {
            let bad = kb::kvm_sregs2 { flags: 1, ..new };
            expect_errno(set_sregs2(&m, &bad), libc::EINVAL, "entries without PAE")?;
        }
        let bad = kb::kvm_sregs2 {
            cr4: 1 << 63,
            cr3: new.cr3 ^ 0x1000,
            ..new
        };
        expect_errno(set_sregs2(&m, &bad), libc::EINVAL, "a bit of CR4")?;
        ensure_eq!(sregs2(&m)?, new, "after what was refused, {mode:?}");
    }
    Ok(())
}

/// The entries of PAE paging are the processor's: they stay what they were when memory has others.
fn pae_entries(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Pae, halt32())?;
    need(&m, kb::KVM_CAP_SREGS2, "KVM_CAP_SREGS2")?;
    m.expect_hlt()?;
    let saved = sregs2(&m)?;
    for n in 0..4 {
        m.mem.write(usize_of(at::PDPT_PAE) + 8 * n, 0u64);
    }
    set_sregs2(&m, &saved)?;
    m.expect_hlt()?;
    ensure_eq!(sregs2(&m)?.pdptrs, saved.pdptrs, "the entries");
    // Without them, memory is asked.
    m.mem.write(usize_of(at::PDPT_PAE), at::PD | pte::P);
    let asks = kb::kvm_sregs2 { flags: 0, ..saved };
    set_sregs2(&m, &asks)?;
    m.expect_hlt()?;
    ensure_eq!(
        sregs2(&m)?.pdptrs,
        [at::PD | pte::P, 0, 0, 0],
        "the entries"
    );
    ensure_eq!(m.vcpu.regs()?.rbx, 3, "RBX");
    Ok(())
}

fn translate(m: &Machine, linear: u64) -> Result<Option<u64>, Verdict> {
    let mut t = kb::kvm_translation {
        linear_address: linear,
        ..Default::default()
    };
    m.vcpu.fd.ioctl_mut(sys::KVM_TRANSLATE, &mut t)?;
    ensure_eq!(t.linear_address, linear, "the address that was asked for");
    if t.valid == 0 {
        ensure_eq!(t.physical_address, u64::MAX, "where {linear:#x} leads");
        return Ok(None);
    }
    Ok(Some(t.physical_address))
}

/// KVM_TRANSLATE walks the guest's tables.
fn translation(env: &Env) -> Outcome {
    for mode in MODES {
        let m = Machine::new(env, mode, halt32())?;
        for linear in [0, at::CODE + 0x123, at::MMIO + 4] {
            ensure_eq!(translate(&m, linear)?, Some(linear), "{mode:?}");
        }
    }
    let m = Machine::new(env, Mode::Long, halt64())?;
    let (table, linear) = (pte::P | pte::W, 3u64 << 39);
    ensure_eq!(translate(&m, linear)?, None, "what nothing maps");
    m.mem.write(usize_of(at::PML4) + 24, at::FREE | table);
    m.mem.write(usize_of(at::FREE), (at::FREE + 0x1000) | table);
    m.mem
        .write(usize_of(at::FREE) + 0x1000, (at::FREE + 0x2000) | table);
    m.mem
        .write(usize_of(at::FREE) + 0x2000, 0xab_c000 | pte::P | pte::NX);
    ensure_eq!(translate(&m, linear + 0x321)?, Some(0xab_c321), "a page");
    ensure_eq!(translate(&m, linear + 0x1000)?, None, "its neighbour");
    Ok(())
}

guest_code!(loops, ".code64", "2: nop", "jmp 2b");

/// An exception that waits with what it leaves in CR2 or DR6.
fn exception_payload(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, loops())?;
    need(
        &m,
        kb::KVM_CAP_EXCEPTION_PAYLOAD,
        "KVM_CAP_EXCEPTION_PAYLOAD",
    )?;
    let mut events = m.vcpu.events()?;
    events.exception.pending = 1;
    events.exception.nr = 14;
    events.exception.has_error_code = 1;
    events.exception.error_code = 2;
    events.exception_has_payload = 1;
    events.exception_payload = 0x1234_5678;
    events.flags = kb::KVM_VCPUEVENT_VALID_PAYLOAD;
    expect_errno(m.vcpu.set_events(&events), libc::EINVAL, "not enabled")?;
    m.vm.enable_cap(kb::KVM_CAP_EXCEPTION_PAYLOAD, 1)?;
    ensure!(
        m.vcpu.events()?.flags & kb::KVM_VCPUEVENT_VALID_PAYLOAD != 0,
        "the flag"
    );
    m.vcpu.set_events(&events)?;
    let got = m.vcpu.events()?;
    ensure_eq!(
        (
            got.exception,
            got.exception_has_payload,
            got.exception_payload
        ),
        (events.exception, 1, 0x1234_5678),
        "what waits"
    );
    ensure_eq!(m.vcpu.sregs()?.cr2, 0, "CR2 before");
    let record = m.expect_exception(14)?;
    ensure_eq!((record.cr2, record.error), (0x1234_5678, 2), "CR2, error");

    events.exception.nr = 1;
    events.exception.has_error_code = 0;
    events.exception.error_code = 0;
    events.exception_payload = BS;
    m.vcpu.set_events(&events)?;
    ensure_eq!(m.vcpu.debugregs()?.dr6, 0xffff_0ff0, "DR6 before");
    m.expect_exception(1)?;
    ensure_eq!(m.vcpu.debugregs()?.dr6, 0xffff_0ff0 | BS, "DR6");

    for vector in [2, 32, 255] {
        events.exception.nr = vector;
        let r = m.vcpu.set_events(&events);
        expect_errno(r, libc::EINVAL, "no exception")?;
    }
    Ok(())
}

/// A triple fault that waits.
fn triple_fault(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, loops())?;
    let cap = kb::KVM_CAP_X86_TRIPLE_FAULT_EVENT;
    need(&m, cap, "KVM_CAP_X86_TRIPLE_FAULT_EVENT")?;
    let mut events = m.vcpu.events()?;
    events.triple_fault.pending = 1;
    events.flags = kb::KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    expect_errno(m.vcpu.set_events(&events), libc::EINVAL, "not enabled")?;
    m.vm.enable_cap(cap, 1)?;
    m.vcpu.set_events(&events)?;
    let got = m.vcpu.events()?;
    ensure!(
        got.flags & kb::KVM_VCPUEVENT_VALID_TRIPLE_FAULT != 0 && got.triple_fault.pending == 1,
        "it does not show: {got:x?}"
    );
    m.expect(&Exit::Shutdown)
}

guest_code!(stepping, ".code64",
    "pushfq",
    "or qword ptr [rsp], 0x100",
    "popfq",
    "out {P}, al",
    "nop",
    "hlt";
    P = PORT,
);

/// A guest that steps itself is saved behind an instruction that the VMM has completed: the step waits.
fn step_that_waits(env: &Env) -> Outcome {
    for payload in [false, true] {
        let m = Machine::new(env, Mode::Long, stepping())?;
        need(
            &m,
            kb::KVM_CAP_EXCEPTION_PAYLOAD,
            "KVM_CAP_EXCEPTION_PAYLOAD",
        )?;
        if payload {
            m.vm.enable_cap(kb::KVM_CAP_EXCEPTION_PAYLOAD, 1)?;
        }
        m.expect_out(PORT)?;
        m.vcpu.set_immediate_exit(1);
        expect_errno(m.vcpu.run(), libc::EINTR, "immediate_exit")?;
        m.vcpu.set_immediate_exit(0);
        let (regs, sregs, events, debug) = (
            m.vcpu.regs()?,
            m.vcpu.sregs()?,
            m.vcpu.events()?,
            m.vcpu.debugregs()?,
        );
        let want = m.vcpu.regs()?.rip;
        ensure!(regs.rflags & TF != 0, "TF is gone");
        ensure_eq!(
            (events.exception.nr, events.exception.pending),
            (1, 1),
            "the step, payload {payload}"
        );
        ensure_eq!(events.exception.injected, u8::from(!payload), "injected");
        // The VMM finds it in CR2 or DR6 once it has read the events.
        let dr6 = m.vcpu.debugregs()?.dr6;
        ensure_eq!(dr6 & BS != 0, !payload, "BS in DR6, payload {payload}");

        let other = Machine::bare(env, at::SIZE)?;
        other.mem.write_bytes(0, &m.mem.read_bytes(0, at::SIZE));
        other.vcpu.set_cpuid(&*other.kvm.supported_cpuid()?)?;
        other
            .vm
            .enable_cap(kb::KVM_CAP_EXCEPTION_PAYLOAD, payload.into())?;
        other.vcpu.set_sregs(&sregs)?;
        other
            .vcpu
            .set_debugregs(&kb::kvm_debugregs { dr6, ..debug })?;
        other.vcpu.set_regs(&regs)?;
        other.vcpu.set_events(&events)?;
        let record = other.expect_exception(1)?;
        ensure_eq!(record.rip, want, "where the step came");
        let dr6 = other.vcpu.debugregs()?.dr6;
        ensure!(dr6 & BS != 0, "DR6 {dr6:#x}");
    }
    Ok(())
}

/// What the device says of components of the FPU state.
fn attributes(env: &Env) -> Outcome {
    let kvm = env.open()?;
    if kvm.capability(kb::KVM_CAP_SYS_ATTRIBUTES) <= 0 {
        skip!("no KVM_CAP_SYS_ATTRIBUTES");
    }
    let value = AtomicU64::new(0);
    let attr = kb::kvm_device_attr {
        group: 0,
        attr: kb::KVM_X86_XCOMP_GUEST_SUPP.into(),
        addr: value.as_ptr().addr() as u64,
        ..Default::default()
    };
    kvm.fd.ioctl_ref(sys::KVM_HAS_DEVICE_ATTR, &attr)?;
    kvm.fd.ioctl_ref(sys::KVM_GET_DEVICE_ATTR, &attr)?;
    let leaf = kvm.supported_cpuid()?;
    let Some(leaf) = leaf.find(0xd, 0) else {
        skip!("no XSAVE");
    };
    let announced = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
    ensure_eq!(
        announced & !value.load(Ordering::Relaxed),
        0,
        "components that CPUID announces and the attribute has not"
    );
    for (group, number) in [(1, 0), (0, 99)] {
        let other = kb::kvm_device_attr {
            group,
            attr: number,
            ..attr
        };
        for ioctl in [sys::KVM_HAS_DEVICE_ATTR, sys::KVM_GET_DEVICE_ATTR] {
            let r = kvm.fd.ioctl_ref(ioctl, &other);
            expect_errno(r, libc::ENXIO, "an attribute that is none")?;
        }
    }
    let nowhere = kb::kvm_device_attr {
        addr: 1 << 62,
        ..attr
    };
    let r = kvm.fd.ioctl_ref(sys::KVM_GET_DEVICE_ATTR, &nowhere);
    expect_errno(r, libc::EFAULT, "no memory")
}

/// Headers of XSAVE that are none are refused, and change nothing.
fn xsave_headers(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, halt64())?;
    need(&m, kb::KVM_CAP_XSAVE, "KVM_CAP_XSAVE")?;
    let mut good = m.vcpu.xsave()?;
    good.region[40] = 0x1357_9bdf;
    good.region[128] |= 3;
    m.vcpu.set_xsave(&good)?;
    let before = m.vcpu.xsave()?.region;
    ensure_eq!(before[40], 0x1357_9bdf, "XMM0");
    // By word of the area: XSTATE_BV, XCOMP_BV, what is reserved behind, MXCSR.
    for (word, value) in [
        (129, 1 << 30),
        (128, 1 << 31),
        (131, 1 << 31),
        (130, 1),
        (132, 1),
        (143, 1 << 20),
        (6, 1 << 31),
    ] {
        let mut bad = m.vcpu.xsave()?;
        bad.region[40] = 0;
        bad.region[word] |= value;
        let r = m.vcpu.set_xsave(&bad);
        expect_errno(r, libc::EINVAL, &format!("{value:#x} in word {word}"))?;
        let now = m.vcpu.xsave()?.region;
        ensure!(now == before, "word {word} has changed something");
    }
    Ok(())
}

/// Random state by all that sets it: taken or refused, and KVM_RUN says how it went.
fn random_state(env: &Env) -> Outcome {
    println!("seed {}", env.seed);
    interrupting_handler(libc::SIGALRM)?;
    let mut rng = Rng::new(env.seed ^ 0x57a7e);
    let mut taken = [0; 4];
    for round in 0..env.fewer(100) as usize {
        let m = Machine::new(env, MODES[round % MODES.len()], halt32())?;
        for cap in [
            kb::KVM_CAP_EXCEPTION_PAYLOAD,
            kb::KVM_CAP_X86_TRIPLE_FAULT_EVENT,
        ] {
            if m.kvm.capability(cap) > 0 {
                m.vm.enable_cap(cap, 1)?;
            }
        }
        for _ in 0..4 {
            let kind = rng.below(4) as usize;
            let r = match kind {
                0 => {
                    let mut s = sregs2(&m)?;
                    for _ in 0..1 + rng.below(3) {
                        let bit = 1 << rng.below(64);
                        match rng.below(8) {
                            0 => s.cr0 ^= bit,
                            1 => s.cr3 ^= bit,
                            2 => s.cr4 ^= bit,
                            3 => s.efer ^= bit,
                            4 => s.pdptrs[rng.below(4) as usize] ^= bit,
                            5 => s.ss.limit ^= bit as u32,
                            6 => s.cs.type_ ^= bit as u8,
                            _ => s.tr.base ^= bit,
                        }
                    }
                    set_sregs2(&m, &s).map(drop)
                }
                1 => {
                    let mut e = m.vcpu.events()?;
                    e.exception.injected = rng.below(2) as u8;
                    e.exception.pending = rng.below(2) as u8;
                    e.exception.nr = rng.below(34) as u8;
                    e.exception.has_error_code = rng.below(2) as u8;
                    e.exception_has_payload = rng.below(2) as u8;
                    e.exception_payload = rng.number();
                    e.interrupt.injected = rng.below(2) as u8;
                    e.interrupt.soft = rng.below(2) as u8;
                    e.interrupt.nr = rng.below(256) as u8;
                    e.interrupt.shadow = rng.below(4) as u8;
                    e.nmi.masked = rng.below(2) as u8;
                    e.nmi.injected = rng.below(2) as u8;
                    e.triple_fault.pending = u8::from(rng.below(8) == 0);
                    e.flags = rng.below(64) as u32 & !kb::KVM_VCPUEVENT_VALID_SMM;
                    m.vcpu.set_events(&e)
                }
                2 => {
                    let mut d = kb::kvm_guest_debug {
                        control: rng.number() as u32,
                        ..Default::default()
                    };
                    for r in &mut d.arch.debugreg {
                        *r = rng.number();
                    }
                    m.vcpu.fd.ioctl_ref(sys::KVM_SET_GUEST_DEBUG, &d).map(drop)
                }
                _ => {
                    let mut r = m.vcpu.regs()?;
                    r.rflags = rng.number() & 0x3f_7fd7 | 2;
                    if rng.below(3) == 0 {
                        r.rip = rng.number();
                    }
                    m.vcpu.set_regs(&r)
                }
            };
            match r {
                Ok(()) => taken[kind] += 1,
                Err(e) if matches!(e.errno, libc::EINVAL | libc::EBUSY) => {}
                Err(e) => fail!("{e}"),
            }
        }
        interval_alarm(20);
        for _ in 0..10 {
            match m.vcpu.run() {
                Ok(_) => {}
                Err(e) if matches!(e.errno, libc::EINTR | libc::EFAULT) => break,
                Err(e) => fail!("KVM_RUN: {e}"),
            }
        }
        interval_alarm(0);
    }
    println!("taken of each: {taken:?}");
    ensure!(taken.iter().all(|n| *n > 5), "hardly any was taken");
    let m = Machine::new(env, Mode::Long, halt64())?;
    m.expect_hlt()
}

fn main() -> ExitCode {
    selftests::tap::main(
        "state",
        tests![
            system_registers,
            pae_entries,
            translation,
            exception_payload,
            triple_fault,
            step_that_waits,
            attributes,
            xsave_headers,
            random_state,
        ],
    )
}
