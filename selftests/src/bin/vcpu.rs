// SPDX-License-Identifier: GPL-2.0

//! The vCPU file: each state ioctl's success, and each of its errors.

use kvm_bindings as kb;
use selftests::check::{difference, expect_errno};
use selftests::guest::{at, PORT};
use selftests::machine::{cr, Exit, Machine, Mode, MODES};
use selftests::sys::{self, Ioctl};
use selftests::vm::{Cpuid, Msrs};
use selftests::{ensure, ensure_eq, fail, guest_code, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

guest_code!(halt, ".code32", "2: hlt", "jmp 2b");

fn machine(env: &Env, mode: Mode) -> Result<Machine, Verdict> {
    Ok(Machine::new(env, mode, halt())?)
}

/// A vCPU comes out of its creation as a processor does out of RESET (SDM volume 3, table 11-1).
fn reset_state(env: &Env) -> Outcome {
    let vm = env.open()?.create_vm()?;
    let vcpu = vm.create_vcpu(0)?;
    let (r, s) = (vcpu.regs()?, vcpu.sregs()?);
    ensure_eq!(r.rip, 0xfff0, "RIP");
    ensure_eq!(r.rflags, 2, "RFLAGS");
    ensure_eq!(
        (r.rax, r.rbx, r.rcx, r.rsp, r.r15),
        (0, 0, 0, 0, 0),
        "general registers"
    );
    ensure_eq!((s.cs.selector, s.cs.base), (0xf000, 0xffff_0000), "CS");
    ensure_eq!(
        (s.cs.limit, s.cs.type_ & 0xb, s.cs.present),
        (0xffff, 0xb, 1),
        "CS attributes"
    );
    for (name, seg) in [
        ("DS", s.ds),
        ("ES", s.es),
        ("FS", s.fs),
        ("GS", s.gs),
        ("SS", s.ss),
    ] {
        let got = (seg.selector, seg.base, seg.limit, seg.present, seg.type_);
        ensure_eq!(got, (0, 0, 0xffff, 1, 3), "{name}");
    }
    ensure_eq!(s.cr0, 0x6000_0010, "CR0");
    ensure_eq!(
        (s.cr2, s.cr3, s.cr4, s.cr8, s.efer),
        (0, 0, 0, 0, 0),
        "CR2, CR3, CR4, CR8, EFER"
    );
    ensure_eq!(
        (s.gdt.base, s.gdt.limit, s.idt.base, s.idt.limit),
        (0, 0xffff, 0, 0xffff),
        "tables"
    );
    ensure_eq!(s.apic_base, 0xfee0_0900, "APIC base of the first processor");
    ensure_eq!(s.interrupt_bitmap, [0; 4], "pending interrupts");
    let d = vcpu.debugregs()?;
    ensure_eq!(
        (d.db, d.dr6, d.dr7, d.flags),
        ([0; 4], 0xffff_0ff0, 0x400, 0),
        "debug registers"
    );
    let f = vcpu.fpu()?;
    ensure_eq!((f.fcw, f.fsw, f.ftwx), (0x37f, 0, 0), "x87 words");
    ensure_eq!(vcpu.xsave()?.region[6], 0x1f80, "MXCSR");
    let x = vcpu.xcrs()?;
    ensure_eq!(
        (x.nr_xcrs, x.xcrs[0].xcr, x.xcrs[0].value),
        (1, 0, 1),
        "XCR0"
    );
    ensure_eq!(
        vcpu.mp_state()?.mp_state,
        kb::KVM_MP_STATE_RUNNABLE,
        "MP state"
    );
    let second = vm.create_vcpu(1)?;
    ensure_eq!(
        second.sregs()?.apic_base,
        0xfee0_0800,
        "APIC base of the second processor"
    );
    ensure_eq!(
        second.mp_state()?.mp_state,
        kb::KVM_MP_STATE_RUNNABLE,
        "MP state of the second"
    );
    Ok(())
}

/// The ioctls that take an address say EFAULT to one where nothing is.
fn bad_addresses(env: &Env) -> Outcome {
    let m = machine(env, Mode::Long)?;
    let calls: [Ioctl; 22] = [
        sys::KVM_GET_REGS,
        sys::KVM_SET_REGS,
        sys::KVM_GET_SREGS,
        sys::KVM_SET_SREGS,
        sys::KVM_GET_FPU,
        sys::KVM_SET_FPU,
        sys::KVM_GET_XSAVE,
        sys::KVM_SET_XSAVE,
        sys::KVM_GET_XCRS,
        sys::KVM_SET_XCRS,
        sys::KVM_GET_MSRS,
        sys::KVM_SET_MSRS,
        sys::KVM_GET_CPUID2,
        sys::KVM_SET_CPUID2,
        sys::KVM_GET_MP_STATE,
        sys::KVM_SET_MP_STATE,
        sys::KVM_GET_VCPU_EVENTS,
        sys::KVM_SET_VCPU_EVENTS,
        sys::KVM_GET_DEBUGREGS,
        sys::KVM_SET_DEBUGREGS,
        sys::KVM_INTERRUPT,
        sys::KVM_SET_MSRS,
    ];
    let mut wrong = String::new();
    for call in calls {
        for address in [0usize, 8, 0x7fff_ffff_f000, usize::MAX - 0xfff] {
            match m.vcpu.fd.ioctl(call, address) {
                Err(e) if e.errno == libc::EFAULT => {}
                r => wrong += &format!("\n{} at {address:#x}: {r:?}", call.name),
            }
        }
    }
    ensure!(wrong.is_empty(), "not EFAULT:{wrong}");
    m.expect_hlt()?;
    Ok(())
}

fn regs(env: &Env) -> Outcome {
    let m = machine(env, Mode::Long)?;
    let want = kb::kvm_regs {
        rax: 0x0101_0101_0101_0101,
        rbx: 0x0202_0202_0202_0202,
        rcx: 0x0303_0303_0303_0303,
        rdx: 0x0404_0404_0404_0404,
        rsi: 0x0505_0505_0505_0505,
        rdi: 0x0606_0606_0606_0606,
        rsp: 0x0707_0707_0707_0700,
        rbp: 0x0808_0808_0808_0808,
        r8: 0x8888,
        r9: u64::MAX,
        r10: 10,
        r11: 11,
        r12: 12,
        r13: 13,
        r14: 14,
        r15: 0x8000_0000_0000_0000,
        rip: 0xffff_8000_0000_1000,
        rflags: 0x2 | 0x8d5 | 0x400,
    };
    m.vcpu.set_regs(&want)?;
    ensure_eq!(m.vcpu.regs()?, want, "registers");
    // Bit 1 of RFLAGS is always set.
    m.vcpu.set_regs(&kb::kvm_regs { rflags: 0, ..want })?;
    ensure_eq!(m.vcpu.regs()?.rflags, 2, "RFLAGS after 0 was set");
    Ok(())
}

/// What is set is what the guest has, and what the guest has is what is read.
fn regs_in_guest(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "add rax, 1",
        "add rbx, 2",
        "add rcx, 3",
        "add rdx, 4",
        "add rsi, 5",
        "add rdi, 6",
        "add rbp, 7",
        "add r8, 8",
        "add r9, 9",
        "add r10, 10",
        "add r11, 11",
        "add r12, 12",
        "add r13, 13",
        "add r14, 14",
        "add r15, 15",
        "sub rsp, 16",
        "stc",
        "std",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let base = 0x1111_2222_3333_0000u64;
    m.vcpu.set_regs(&kb::kvm_regs {
        rax: base,
        rbx: base,
        rcx: base,
        rdx: base,
        rsi: base,
        rdi: base,
        rbp: base,
        rsp: base,
        r8: base,
        r9: base,
        r10: base,
        r11: base,
        r12: base,
        r13: base,
        r14: base,
        r15: base,
        rip: at::CODE,
        rflags: 2,
    })?;
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    let got = [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ];
    for (i, v) in got.iter().enumerate() {
        ensure_eq!(*v, base + 1 + i as u64, "register {i}");
    }
    ensure_eq!(r.rsp, base - 16, "RSP");
    ensure_eq!(r.rip, at::CODE + code().len() as u64, "RIP");
    ensure_eq!(r.rflags & 0x401, 0x401, "CF and DF");
    Ok(())
}

fn sregs(env: &Env) -> Outcome {
    for mode in MODES {
        let m = machine(env, mode)?;
        let want = m.vcpu.sregs()?;
        m.vcpu.set_sregs(&want)?;
        let d = difference(&m.vcpu.sregs()?, &want);
        ensure!(d.is_empty(), "special registers in mode {mode:?}: {d}");
        m.expect_hlt()?;
        let mut got = m.vcpu.sregs()?;
        if mode == Mode::Real {
            // Whether CS is a code segment or a data segment means nothing there, and processors
            // differ in what they save at an exit.
            got.cs.type_ |= 8;
        }
        let d = difference(&got, &want);
        ensure!(
            d.is_empty(),
            "special registers in mode {mode:?} after HLT: {d}"
        );
    }
    Ok(())
}

fn sregs_values(env: &Env) -> Outcome {
    let m = machine(env, Mode::Long)?;
    let mut s = m.vcpu.sregs()?;
    s.fs.base = 0x7fff_1234_5678;
    s.gs.base = 0xffff_8880_0000_1000;
    s.cr2 = 0xdead_beef_cafe;
    s.cr8 = 5;
    s.idt.base = 0xffff_ffff_8000_0000;
    s.ldt.selector = 0x58;
    s.ldt.base = 0x4000;
    s.ldt.limit = 0x27;
    s.ldt.present = 1;
    s.ldt.type_ = 2;
    s.ldt.unusable = 0;
    m.vcpu.set_sregs(&s)?;
    ensure_eq!(m.vcpu.sregs()?, s, "special registers");
    ensure_eq!(m.vcpu.msr(0xc000_0100)?, Some(s.fs.base), "MSR FS_BASE");
    ensure_eq!(m.vcpu.msr(0xc000_0101)?, Some(s.gs.base), "MSR GS_BASE");
    ensure_eq!(m.vcpu.msr(0xc000_0080)?, Some(s.efer), "MSR EFER");
    Ok(())
}

fn sregs_invalid(env: &Env) -> Outcome {
    let m = machine(env, Mode::Long)?;
    let good = m.vcpu.sregs()?;
    type Change = fn(&mut kb::kvm_sregs);
    let table: [(&str, Change); 12] = [
        ("CR0.PG without PE", |s| s.cr0 &= !cr::PE),
        ("CR0.NW without CD", |s| s.cr0 |= 1 << 29),
        ("CR0 bits above 31", |s| s.cr0 |= 1 << 40),
        ("CR4 bit 63", |s| s.cr4 |= 1 << 63),
        ("CR4 bit 15", |s| s.cr4 |= 1 << 15),
        ("long mode without PAE", |s| s.cr4 &= !cr::PAE),
        ("LME and paging without LMA", |s| s.efer &= !cr::LMA),
        ("LMA without LME", |s| s.efer &= !cr::LME),
        ("EFER bit 63", |s| s.efer |= 1 << 63),
        ("CR3 beyond physical addresses", |s| s.cr3 |= 1 << 60),
        ("64-bit code segment without long mode", |s| {
            s.efer = 0;
            s.cr0 &= !cr::PG;
        }),
        ("APIC base with a reserved bit", |s| s.apic_base |= 1),
    ];
    for (name, change) in table {
        let mut s = good;
        change(&mut s);
        expect_errno(m.vcpu.set_sregs(&s), libc::EINVAL, name)?;
        ensure_eq!(
            m.vcpu.sregs()?,
            good,
            "special registers after the refusal of {name}"
        );
    }
    m.expect_hlt()?;
    Ok(())
}

/// `SYSENTER_*`, `STAR`, `LSTAR`, `CSTAR`, `FMASK`, `KERNEL_GS_BASE`, `TSC_AUX`, `PAT`.
const PLAIN_MSRS: [(u32, u64); 9] = [
    (0x174, 0x10),
    (0x175, 0xffff_8000_1234_5000),
    (0x176, 0xffff_8000_1234_6000),
    (0xc000_0081, 0x0023_0010_0000_0000),
    (0xc000_0082, 0xffff_ffff_8100_0000),
    (0xc000_0083, 0xffff_ffff_8200_0000),
    (0xc000_0084, 0x4_7700),
    (0xc000_0102, 0xffff_8880_1234_0000),
    (0x277, 0x0605_0400_0107_0406),
];

fn msrs(env: &Env) -> Outcome {
    let m = machine(env, Mode::Long)?;
    let want = Msrs::new(&PLAIN_MSRS);
    let n = m.vcpu.fd.ioctl_ref(sys::KVM_SET_MSRS, &*want)?;
    ensure_eq!(n as usize, PLAIN_MSRS.len(), "MSRs that KVM_SET_MSRS set");
    m.expect_hlt()?;
    let zeroed: Vec<(u32, u64)> = PLAIN_MSRS.iter().map(|(i, _)| (*i, 0)).collect();
    let mut got = Msrs::new(&zeroed);
    let n = m.vcpu.fd.ioctl_mut(sys::KVM_GET_MSRS, &mut *got)?;
    ensure_eq!(n as usize, PLAIN_MSRS.len(), "MSRs that KVM_GET_MSRS read");
    for (i, (index, value)) in PLAIN_MSRS.iter().enumerate() {
        ensure_eq!(got.entries[i].data, *value, "MSR {index:#x}");
    }
    Ok(())
}

fn msrs_invalid(env: &Env) -> Outcome {
    let m = machine(env, Mode::Long)?;
    for (index, value, what) in [
        (0x1234_5678, 1, "MSR that does not exist"),
        (0xc000_0080, 1 << 63, "EFER with a reserved bit"),
        (
            0xc000_0082,
            0x8000_0000_0000_0000,
            "LSTAR that is not canonical",
        ),
        (
            0xc000_0083,
            0x0000_8000_0000_0000,
            "CSTAR that is not canonical",
        ),
        (
            0xc000_0102,
            0xff00_0000_0000_0000,
            "KERNEL_GS_BASE that is not canonical",
        ),
        (
            0xc000_0100,
            0x1000_0000_0000_0000,
            "FS_BASE that is not canonical",
        ),
        (0x277, 0x0000_0000_0000_0002, "PAT with type 2"),
        (0x1b, 0xfee0_0901, "APIC_BASE with a reserved bit"),
    ] {
        ensure!(!m.vcpu.set_msr(index, value)?, "{what} was accepted");
    }
    ensure_eq!(
        m.vcpu.msr(0x1234_5678)?,
        None,
        "read of an MSR that does not exist"
    );
    Ok(())
}

/// The calls stop at the first MSR that is refused and say how far they came.
fn msrs_partial(env: &Env) -> Outcome {
    let m = machine(env, Mode::Long)?;
    ensure!(m.vcpu.set_msr(0x176, 0x1111)?, "SYSENTER_EIP");
    let list = Msrs::new(&[(0x175, 0x5000), (0x1234_5678, 1), (0x176, 0x6000)]);
    let n = m.vcpu.fd.ioctl_ref(sys::KVM_SET_MSRS, &*list)?;
    ensure_eq!(n, 1, "KVM_SET_MSRS with a bad second entry");
    ensure_eq!(
        m.vcpu.msr(0x175)?,
        Some(0x5000),
        "the entry before the bad one"
    );
    ensure_eq!(
        m.vcpu.msr(0x176)?,
        Some(0x1111),
        "the entry after the bad one"
    );
    let mut list = Msrs::new(&[(0x175, 0), (0x1234_5678, 0), (0x176, 0)]);
    let n = m.vcpu.fd.ioctl_mut(sys::KVM_GET_MSRS, &mut *list)?;
    ensure_eq!(n, 1, "KVM_GET_MSRS with a bad second entry");
    let mut none = Msrs::new(&[]);
    ensure_eq!(
        m.vcpu.fd.ioctl_mut(sys::KVM_GET_MSRS, &mut *none)?,
        0,
        "no entries"
    );
    let mut many = Msrs::new(&[]);
    many.nmsrs = 256;
    let r = m.vcpu.fd.ioctl_mut(sys::KVM_GET_MSRS, &mut *many);
    expect_errno(r, libc::E2BIG, "256 entries to read")?;
    let r = m.vcpu.fd.ioctl_ref(sys::KVM_SET_MSRS, &*many);
    expect_errno(r, libc::E2BIG, "256 entries to write")?;
    many.nmsrs = u32::MAX;
    let r = m.vcpu.fd.ioctl_ref(sys::KVM_SET_MSRS, &*many);
    expect_errno(r, libc::E2BIG, "2^32 - 1 entries to write")
}

fn cpuid(env: &Env) -> Outcome {
    let m = Machine::bare(env, at::SIZE)?;
    let mut want = m.kvm.supported_cpuid()?;
    want.push(kb::kvm_cpuid_entry2 {
        function: 0x4000_0000,
        eax: 0x4000_0001,
        ebx: 0x1111_1111,
        ecx: 0x2222_2222,
        edx: 0x3333_3333,
        ..Default::default()
    });
    m.vcpu.set_cpuid(&want)?;
    let got = m.vcpu.cpuid()?;
    ensure_eq!(got.nent, want.nent, "entries");
    for (g, w) in got.list().iter().zip(want.list()) {
        ensure_eq!(
            (g.function, g.index),
            (w.function, w.index),
            "order of the entries"
        );
        // Leaf 1 and leaf 7 mirror CR4 bits, leaf 0xd sizes follow XCR0.
        if !matches!(g.function, 1 | 7 | 0xd) {
            ensure_eq!(
                (g.eax, g.ebx, g.ecx, g.edx),
                (w.eax, w.ebx, w.ecx, w.edx),
                "{:#x}",
                g.function
            );
        }
    }
    let mut small = Cpuid::empty(want.nent as usize - 1);
    let r = m.vcpu.fd.ioctl_mut(sys::KVM_GET_CPUID2, &mut *small);
    expect_errno(r, libc::E2BIG, "KVM_GET_CPUID2 with too little room")?;
    let mut big = Cpuid::empty(0);
    big.nent = 257;
    let r = m.vcpu.fd.ioctl_ref(sys::KVM_SET_CPUID2, &*big);
    expect_errno(r, libc::E2BIG, "257 entries")?;
    big.nent = u32::MAX;
    let r = m.vcpu.fd.ioctl_ref(sys::KVM_SET_CPUID2, &*big);
    expect_errno(r, libc::E2BIG, "2^32 - 1 entries")?;
    ensure_eq!(m.vcpu.cpuid()?.nent, want.nent, "entries after refusals");
    Ok(())
}

fn cpuid_bad_width(env: &Env) -> Outcome {
    let m = Machine::bare(env, at::SIZE)?;
    let mut c = m.kvm.supported_cpuid()?;
    let Some(e) = c.list_mut().iter_mut().find(|e| e.function == 0x8000_0008) else {
        fail!("no leaf 0x80000008")
    };
    e.eax = (e.eax & !0xff00) | (47 << 8);
    expect_errno(
        m.vcpu.set_cpuid(&c),
        libc::EINVAL,
        "47 bits of linear addresses",
    )
}

/// Once the vCPU has run, its CPUID can be set to what it is and to nothing else.
fn cpuid_after_run(env: &Env) -> Outcome {
    let m = machine(env, Mode::Long)?;
    m.expect_hlt()?;
    let mut c = m.vcpu.cpuid()?;
    m.vcpu.set_cpuid(&c)?;
    c.list_mut()[0].ebx ^= 1;
    expect_errno(
        m.vcpu.set_cpuid(&c),
        libc::EINVAL,
        "another CPUID after KVM_RUN",
    )
}

fn mp_state(env: &Env) -> Outcome {
    let m = machine(env, Mode::Protected)?;
    let set = |mp_state| m.vcpu.set_mp_state(&kb::kvm_mp_state { mp_state });
    set(kb::KVM_MP_STATE_RUNNABLE)?;
    // Without a local APIC in the kernel there is nothing else to be.
    for s in [
        kb::KVM_MP_STATE_UNINITIALIZED,
        kb::KVM_MP_STATE_INIT_RECEIVED,
        kb::KVM_MP_STATE_HALTED,
        kb::KVM_MP_STATE_SIPI_RECEIVED,
        77,
        u32::MAX,
    ] {
        expect_errno(set(s), libc::EINVAL, &format!("MP state {s}"))?;
    }
    ensure_eq!(
        m.vcpu.mp_state()?.mp_state,
        kb::KVM_MP_STATE_RUNNABLE,
        "MP state"
    );
    Ok(())
}

fn events(env: &Env) -> Outcome {
    let m = machine(env, Mode::Protected)?;
    let quiet = m.vcpu.events()?;
    ensure_eq!(
        (
            quiet.exception.injected,
            quiet.interrupt.injected,
            quiet.nmi.injected,
            quiet.nmi.pending
        ),
        (0, 0, 0, 0),
        "events of a new vCPU"
    );
    let mut e = quiet;
    e.exception.injected = 1;
    e.exception.nr = 14;
    e.exception.has_error_code = 1;
    e.exception.error_code = 6;
    m.vcpu.set_events(&e)?;
    let got = m.vcpu.events()?.exception;
    ensure_eq!(
        (got.injected, got.nr, got.has_error_code, got.error_code),
        (1, 14, 1, 6),
        "exception"
    );
    let mut e = quiet;
    e.interrupt.injected = 1;
    e.interrupt.nr = 0x31;
    m.vcpu.set_events(&e)?;
    let got = m.vcpu.events()?;
    ensure_eq!(
        (got.interrupt.injected, got.interrupt.nr),
        (1, 0x31),
        "interrupt"
    );
    ensure_eq!(
        got.exception.injected,
        0,
        "exception after it was taken back"
    );
    let mut e = quiet;
    e.flags = kb::KVM_VCPUEVENT_VALID_NMI_PENDING;
    e.nmi.pending = 1;
    e.nmi.masked = 1;
    m.vcpu.set_events(&e)?;
    let got = m.vcpu.events()?.nmi;
    ensure_eq!((got.injected, got.pending, got.masked), (0, 1, 1), "NMI");
    for shadow in [1u8, 2, 0] {
        let mut e = quiet;
        e.flags = kb::KVM_VCPUEVENT_VALID_SHADOW;
        e.interrupt.shadow = shadow;
        m.vcpu.set_events(&e)?;
        ensure_eq!(
            m.vcpu.events()?.interrupt.shadow,
            shadow,
            "interrupt shadow"
        );
    }
    Ok(())
}

fn events_invalid(env: &Env) -> Outcome {
    let m = machine(env, Mode::Protected)?;
    let quiet = m.vcpu.events()?;
    for flag in [1 << 8, 1 << 31] {
        let e = kb::kvm_vcpu_events {
            flags: flag,
            ..quiet
        };
        expect_errno(
            m.vcpu.set_events(&e),
            libc::EINVAL,
            &format!("flag {flag:#x}"),
        )?;
    }
    for nr in [2u8, 32, 255] {
        let mut e = quiet;
        e.exception.injected = 1;
        e.exception.nr = nr;
        expect_errno(
            m.vcpu.set_events(&e),
            libc::EINVAL,
            &format!("exception {nr}"),
        )?;
    }
    m.expect_hlt()?;
    Ok(())
}

fn debugregs(env: &Env) -> Outcome {
    let m = machine(env, Mode::Protected)?;
    let want = kb::kvm_debugregs {
        db: [0x1000, 0x2000, 0xffff_8000_0000_3000, 0x4000],
        dr6: 0xffff_0ff1,
        dr7: 0x400,
        ..Default::default()
    };
    m.vcpu.set_debugregs(&want)?;
    ensure_eq!(m.vcpu.debugregs()?, want, "debug registers");
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.debugregs()?, want, "debug registers after a run");
    let bad = kb::kvm_debugregs { flags: 1, ..want };
    expect_errno(m.vcpu.set_debugregs(&bad), libc::EINVAL, "flags")?;
    let bad = kb::kvm_debugregs {
        dr6: 1 << 32,
        ..want
    };
    expect_errno(
        m.vcpu.set_debugregs(&bad),
        libc::EINVAL,
        "DR6 above 32 bits",
    )?;
    let bad = kb::kvm_debugregs {
        dr7: 1 << 40,
        ..want
    };
    expect_errno(
        m.vcpu.set_debugregs(&bad),
        libc::EINVAL,
        "DR7 above 32 bits",
    )?;
    ensure_eq!(m.vcpu.debugregs()?, want, "debug registers after refusals");
    Ok(())
}

fn interrupt_invalid(env: &Env) -> Outcome {
    let m = machine(env, Mode::Protected)?;
    for irq in [256, 0x1000, u32::MAX] {
        expect_errno(
            m.vcpu.interrupt(irq),
            libc::EINVAL,
            &format!("interrupt {irq}"),
        )?;
    }
    m.vcpu.interrupt(0x42)?;
    let bitmap = m.vcpu.sregs()?.interrupt_bitmap;
    ensure_eq!(
        bitmap,
        [0, 1 << 2, 0, 0],
        "bitmap with interrupt 0x42 pending"
    );
    ensure_eq!(m.vcpu.events()?.interrupt.nr, 0x42, "the same as an event");
    Ok(())
}

fn run_argument(env: &Env) -> Outcome {
    let m = machine(env, Mode::Protected)?;
    expect_errno(
        m.vcpu.fd.ioctl(sys::KVM_RUN, 1),
        libc::EINVAL,
        "KVM_RUN with an argument",
    )?;
    m.expect_hlt()?;
    Ok(())
}

/// Without a local APIC in the kernel, CR8 goes both ways through `kvm_run`.
fn cr8_in_run(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov rbx, cr8",
        "mov eax, 9",
        "mov cr8, rax",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.vcpu.kvm_run_mut().cr8 = 6;
    loop {
        match m.run()? {
            Exit::Hlt => break,
            // A write may leave, so that userspace learns of it (KVM_EXIT_SET_TPR).
            Exit::Other(kb::KVM_EXIT_SET_TPR) => {}
            other => fail!("exit {other:?}\n{}", m.describe()),
        }
    }
    ensure_eq!(m.vcpu.regs()?.rbx, 6, "CR8 that the guest read");
    ensure_eq!(
        m.vcpu.kvm_run().cr8,
        9,
        "CR8 in kvm_run after the guest wrote it"
    );
    ensure_eq!(m.vcpu.sregs()?.cr8, 9, "CR8 in KVM_GET_SREGS");
    m.vcpu.kvm_run_mut().cr8 = 16;
    expect_errno(m.vcpu.run(), libc::EINVAL, "KVM_RUN with CR8 16 in kvm_run")
}

/// `if_flag` and `ready_for_interrupt_injection` follow the guest.
fn run_flags(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "sti", "nop", "out {P}, al", "cli", "out {P}, al", "hlt";
        P = PORT);
    let m = Machine::new(env, Mode::Protected, code())?;
    m.expect(&Exit::Out {
        port: PORT,
        size: 1,
        data: vec![0],
    })?;
    let run = m.vcpu.kvm_run();
    ensure_eq!(
        (run.if_flag, run.ready_for_interrupt_injection),
        (1, 1),
        "flags with IF set"
    );
    m.expect(&Exit::Out {
        port: PORT,
        size: 1,
        data: vec![0],
    })?;
    let run = m.vcpu.kvm_run();
    ensure_eq!(
        (run.if_flag, run.ready_for_interrupt_injection),
        (0, 0),
        "flags with IF clear"
    );
    ensure_eq!(run.apic_base, 0xfee0_0900, "apic_base");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "vcpu",
        tests![
            reset_state,
            bad_addresses,
            regs,
            regs_in_guest,
            sregs,
            sregs_values,
            sregs_invalid,
            msrs,
            msrs_invalid,
            msrs_partial,
            cpuid,
            cpuid_bad_width,
            cpuid_after_run,
            mp_state,
            events,
            events_invalid,
            debugregs,
            interrupt_invalid,
            run_argument,
            cr8_in_run,
            run_flags,
        ],
    )
}
