// SPDX-License-Identifier: GPL-2.0

//! The processor that the guest sees: MSRs, control and debug registers, XCR0, and the instructions that a
//! hypervisor has to intercept.

use kvm_bindings as kb;
use selftests::guest::{at, pte, sel, set_gate, usize_of, PORT};
use selftests::machine::{cr, Exit, Machine, Mode};
use selftests::vm::Vcpu;
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

const D: usize = at::DATA as usize;

guest_code!(
    do_rdmsr,
    ".code64",
    "rdmsr",
    "shl rdx, 32",
    "or rax, rdx",
    "hlt"
);
guest_code!(
    do_wrmsr,
    ".code64",
    "mov rdx, rax",
    "shr rdx, 32",
    "wrmsr",
    "hlt"
);

/// Values that tell one MSR from another and that any of these accepts.
const MSRS: [(u32, u64); 10] = [
    (0x174, 0x0000_0000_0000_0010),       // SYSENTER_CS
    (0x175, 0xffff_8000_1234_5000),       // SYSENTER_ESP
    (0x176, 0xffff_8000_1234_6000),       // SYSENTER_EIP
    (0x277, 0x0605_0400_0107_0406),       // PAT
    (0xc000_0081, 0x0023_0010_0000_0000), // STAR
    (0xc000_0082, 0xffff_ffff_8100_0000), // LSTAR
    (0xc000_0083, 0xffff_ffff_8200_0000), // CSTAR
    (0xc000_0084, 0x0000_0000_0004_7700), // FMASK
    (0xc000_0100, 0x0000_7fff_1234_5678), // FS_BASE
    (0xc000_0102, 0xffff_8880_1234_0000), // KERNEL_GS_BASE
];

fn msr_host_to_guest(env: &Env) -> Outcome {
    for (index, value) in MSRS {
        let m = Machine::new(env, Mode::Long, do_rdmsr())?;
        ensure!(m.vcpu.set_msr(index, value)?, "MSR {index:#x} is refused");
        m.patch_regs(|r| r.rcx = index.into())?;
        m.expect_hlt()?;
        ensure_eq!(m.vcpu.regs()?.rax, value, "RDMSR {index:#x}");
    }
    Ok(())
}

fn msr_guest_to_host(env: &Env) -> Outcome {
    for (index, value) in MSRS {
        let m = Machine::new(env, Mode::Long, do_wrmsr())?;
        m.patch_regs(|r| {
            r.rcx = index.into();
            r.rax = value;
        })?;
        m.expect_hlt()?;
        ensure_eq!(
            m.vcpu.msr(index)?,
            Some(value),
            "MSR {index:#x} after WRMSR"
        );
    }
    Ok(())
}

fn msr_faults(env: &Env) -> Outcome {
    let bad: [(u32, u64, &str); 6] = [
        (0x1234_5678, 0, "unknown MSR"),
        (0xc000_0082, 1 << 63, "LSTAR that is not canonical"),
        (0xc000_0100, 1 << 55, "FS_BASE that is not canonical"),
        (0xc000_0080, 1 << 62, "EFER with a reserved bit"),
        (0xc000_0080, 0xc01, "EFER.LME cleared while paging"),
        (0x277, 2, "PAT with type 2"),
    ];
    for (index, value, what) in bad {
        let m = Machine::new(env, Mode::Long, do_wrmsr())?;
        m.patch_regs(|r| {
            r.rcx = index.into();
            r.rax = value;
        })?;
        let r = m.expect_exception(13)?;
        // MOV RDX, RAX is 3 bytes, SHR RDX, 32 is 4.
        ensure_eq!(
            (r.error, r.rip),
            (0, at::CODE + 7),
            "WRMSR, {what}: error code and RIP"
        );
    }
    let m = Machine::new(env, Mode::Long, do_rdmsr())?;
    m.patch_regs(|r| r.rcx = 0x1234_5678)?;
    let r = m.expect_exception(13)?;
    ensure_eq!(
        (r.error, r.rip),
        (0, at::CODE),
        "RDMSR of an unknown MSR: error code and RIP"
    );
    Ok(())
}

/// SYSCALL, SWAPGS and SYSRET use the MSRs that the guest wrote.
fn syscall(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        // At level 3.
        "mov r15, rsp",
        "syscall",
        "mov r14, 0x77",
        "2: jmp 2b",
    );
    guest_code!(entry, ".code64",
        "swapgs",
        "mov rax, gs:[0]",
        "swapgs",
        "mov r13, cs",
        "out {P}, al",
        "mov r12, rcx",
        "hlt";
        P = PORT,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.mem.write_bytes(0xb000, entry());
    m.mem.write(D, 0xabcd_ef01u64);
    // SYSCALL loads CS with 0x08 and SS with 0x10.
    for (index, value) in [
        (0xc000_0081, 8u64 << 32),
        (0xc000_0082, 0xb000),
        (0xc000_0084, 0x200),
        (0xc000_0102, at::DATA),
    ] {
        ensure!(m.vcpu.set_msr(index, value)?, "MSR {index:#x}");
    }
    m.patch_sregs(|s| {
        s.cs = selftests::guest::segment(sel::USER_CODE64, 11, 0, 1, 3, true);
        s.ss = selftests::guest::segment(sel::USER_DATA, 3, 1, 0, 3, true);
    })?;
    m.patch_regs(|r| r.rflags = 0x202)?;
    m.expect_out(PORT)?;
    let r = m.vcpu.regs()?;
    ensure_eq!(r.rax, 0xabcd_ef01, "load through GS after SWAPGS");
    ensure_eq!(r.r13 & 0xffff, 8, "CS after SYSCALL");
    ensure_eq!(r.rcx, at::CODE + 5, "RCX after SYSCALL: the return address");
    ensure_eq!(r.r11 & 0x202, 0x202, "R11 after SYSCALL: the old flags");
    ensure_eq!(r.rflags & 0x200, 0, "IF, which FMASK clears");
    m.expect_hlt()
}

fn cr0_bits(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov rax, cr0",
        "mov r8, rax",
        "or eax, 0x8",
        "mov cr0, rax",
        "mov r9, cr0",
        "clts",
        "mov r10, cr0",
        "mov eax, 0xb", // LMSW can set PE, MP, EM, TS
        "lmsw ax",
        "smsw r11",
        "mov rax, cr0",
        "or eax, 0x60000000", // CD and NW
        "mov cr0, rax",
        "mov r12, cr0",
        "and eax, 0x9fffffff",
        "mov cr0, rax",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    let base = cr::PE | cr::MP | cr::ET | cr::NE | cr::WP | cr::PG;
    ensure_eq!(r.r8, base, "CR0 at the start");
    ensure_eq!(r.r9, base | cr::TS, "CR0 with TS");
    ensure_eq!(r.r10, base, "CR0 after CLTS");
    ensure_eq!(r.r11 & 0xf, 0xb, "machine status word after LMSW");
    ensure_eq!(r.r12, base | cr::TS | 0x6000_0000, "CR0 with CD and NW");
    ensure_eq!(m.vcpu.sregs()?.cr0, base | cr::TS, "CR0 for the host");
    Ok(())
}

fn control_faults(env: &Env) -> Outcome {
    guest_code!(set_cr0, ".code64", "mov cr0, rax", "hlt");
    guest_code!(set_cr3, ".code64", "mov cr3, rax", "hlt");
    guest_code!(set_cr4, ".code64", "mov cr4, rax", "hlt");
    guest_code!(set_cr8, ".code64", "mov cr8, rax", "hlt");
    let base = 0x8001_0033u64;
    let table: [(&str, &[u8], u64); 9] = [
        ("CR0.PG without PE", set_cr0(), base & !1),
        ("CR0.NW without CD", set_cr0(), base | (1 << 29)),
        ("CR0 bit 32", set_cr0(), base | (1 << 32)),
        (
            "CR0.PG cleared in 64-bit mode",
            set_cr0(),
            base & !(1 << 31),
        ),
        ("CR3 beyond physical addresses", set_cr3(), 1 << 55),
        ("CR4 bit 15", set_cr4(), 0x620 | (1 << 15)),
        ("CR4 bit 63", set_cr4(), 0x620 | (1 << 63)),
        ("CR4.PAE cleared in long mode", set_cr4(), 0x600),
        ("CR8 of 16", set_cr8(), 16),
    ];
    for (name, code, value) in table {
        let m = Machine::new(env, Mode::Long, code)?;
        m.patch_regs(|r| r.rax = value)?;
        let before = m.vcpu.sregs()?;
        let r = m
            .expect_exception(13)
            .map_err(|e| Verdict::Fail(format!("{name}: {e:?}")))?;
        ensure_eq!(
            (r.error, r.rip),
            (0, at::CODE),
            "{name}: error code and RIP"
        );
        let s = m.vcpu.sregs()?;
        let (got, want) = ((s.cr0, s.cr3, s.cr4), (before.cr0, before.cr3, before.cr4));
        ensure_eq!(got, want, "{name}: control registers after the fault");
    }
    Ok(())
}

/// A load of CR3 forgets what the TLB held; so does INVLPG for its page.
fn tlb_flush(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov ebx, 0x400000",
        "mov edi, 0x30000",
        "mov r8d, [rbx]",
        "mov qword ptr [rdi], 0x41003",
        "mov rax, cr3",
        "mov cr3, rax",
        "mov r9d, [rbx]",
        "mov qword ptr [rdi], 0x42003",
        "invlpg [rbx]",
        "mov r10d, [rbx]",
        "mov qword ptr [rdi], 0x40003",
        "mov rax, cr4",
        "mov rcx, rax",
        "xor eax, 0x80", // PGE
        "mov cr4, rax",
        "mov r11d, [rbx]",
        "mov cr4, rcx",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.mem
        .write(usize_of(at::PD) + 2 * 8, 0x30000 | pte::P | pte::W);
    m.mem.write(0x30000, 0x40003u64);
    for (i, page) in [0x40000, 0x41000, 0x42000].into_iter().enumerate() {
        m.mem.write(page, 0x100 + i as u32);
    }
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    ensure_eq!(
        [r.r8, r.r9, r.r10, r.r11],
        [0x100, 0x101, 0x102, 0x100],
        "loads at first, after MOV CR3, after INVLPG, after CR4.PGE"
    );
    Ok(())
}

/// KVM_SET_SREGS with another CR3 takes effect at once.
fn cr3_from_host(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "2: mov eax, [0x400000]", "hlt", "jmp 2b");
    let m = Machine::new(env, Mode::Long, code())?;
    m.mem.write(0x40_0000 - 0x30_0000, 0u32);
    // A second set of tables at 0x50000, alike but for what 4 MiB leads to.
    for (from, to) in [
        (at::PML4, 0x50000u64),
        (at::PDPT, 0x51000),
        (at::PD, 0x52000),
    ] {
        let copy = m.mem.read_bytes(usize_of(from), 0x1000);
        m.mem.write_bytes(usize_of(to), &copy);
    }
    m.mem.write(0x50000, 0x51007u64);
    m.mem.write(0x51000, 0x52007u64);
    m.mem.write(0x52000 + 16, 0x53007u64);
    m.mem.write(0x53000, 0x60007u64);
    m.mem.write(0x60000, 0x2222u32);
    m.mem.write(usize_of(at::PD) + 16, 0x54007u64);
    m.mem.write(0x54000, 0x61007u64);
    m.mem.write(0x61000, 0x1111u32);
    for round in 0..4 {
        let (cr3, want) = if round % 2 == 0 {
            (at::PML4, 0x1111)
        } else {
            (0x50000, 0x2222)
        };
        m.patch_sregs(|s| s.cr3 = cr3)?;
        m.expect_hlt()?;
        ensure_eq!(m.vcpu.regs()?.rax, want, "load with CR3 {cr3:#x}");
    }
    Ok(())
}

fn debug_registers(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov rax, 0x1111222233334444",
        "mov dr0, rax",
        "inc rax",
        "mov dr1, rax",
        "inc rax",
        "mov dr2, rax",
        "inc rax",
        "mov dr3, rax",
        "xor eax, eax",
        "mov dr6, rax",
        "mov r8, dr0",
        "mov r9, dr3",
        "mov r10, dr6",
        "mov r11, dr7",
        "hlt",
        "mov r8, dr1",
        "mov r9, dr2",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.expect_hlt()?;
    let base = 0x1111_2222_3333_4444u64;
    let r = m.vcpu.regs()?;
    ensure_eq!((r.r8, r.r9), (base, base + 3), "DR0 and DR3 in the guest");
    ensure_eq!(
        (r.r10, r.r11),
        (0xffff_0ff0, 0x400),
        "DR6 and DR7 in the guest"
    );
    let d = m.vcpu.debugregs()?;
    ensure_eq!(
        d.db,
        [base, base + 1, base + 2, base + 3],
        "DR0 to DR3 for the host"
    );
    m.vcpu.set_debugregs(&kb::kvm_debugregs {
        db: [1, 2, 3, 4],
        ..d
    })?;
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    ensure_eq!((r.r8, r.r9), (2, 3), "DR1 and DR2 after the host set them");
    Ok(())
}

fn debug_register_faults(env: &Env) -> Outcome {
    guest_code!(set_dr7, ".code64", "mov dr7, rax", "hlt");
    guest_code!(set_dr6, ".code64", "mov dr6, rax", "hlt");
    for (name, code) in [("DR7", set_dr7()), ("DR6", set_dr6())] {
        let m = Machine::new(env, Mode::Long, code)?;
        m.patch_regs(|r| r.rax = 1 << 32)?;
        let r = m.expect_exception(13)?;
        ensure_eq!(
            (r.error, r.rip),
            (0, at::CODE),
            "{name} above 32 bits: error code and RIP"
        );
    }
    // DR4 is DR6's alias, and undefined with CR4.DE.
    guest_code!(get_dr4, ".code64", ".byte 0x0f, 0x21, 0xe0", "hlt");
    let m = Machine::new(env, Mode::Long, get_dr4())?;
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rax, 0xffff_0ff0, "DR4 without CR4.DE");
    let m = Machine::new(env, Mode::Long, get_dr4())?;
    m.patch_sregs(|s| s.cr4 |= 8)?;
    m.expect_exception(6)?;
    Ok(())
}

/// DR7.GD turns the next access to a debug register into #DB.
fn general_detect(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov eax, 0x2400",
        "mov dr7, rax",
        "mov rbx, dr0", // offset 8
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let r = m.expect_exception(1)?;
    ensure_eq!(r.rip, at::CODE + 8, "RIP");
    let d = m.vcpu.debugregs()?;
    ensure_eq!(d.dr6 & 0x2000, 0x2000, "DR6.BD");
    ensure_eq!(d.dr7 & 0x2000, 0, "DR7.GD after the exception");
    Ok(())
}

fn xsetbv(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "xsetbv", "xor ecx, ecx", "xgetbv", "hlt");
    let set = |low: u64, ecx: u64, osxsave: bool| -> Result<Machine, Verdict> {
        let m = Machine::new(env, Mode::Long, code())?;
        m.patch_sregs(|s| s.cr4 |= if osxsave { cr::OSXSAVE } else { 0 })?;
        m.patch_regs(|r| {
            r.rax = low & 0xffff_ffff;
            r.rdx = low >> 32;
            r.rcx = ecx;
        })?;
        Ok(m)
    };
    let m = set(3, 0, true)?;
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rax, 3, "XGETBV");
    ensure_eq!(m.vcpu.xcrs()?.xcrs[0].value, 3, "XCR0 for the host");
    for (value, ecx, what) in [
        (0, 0, "no x87"),
        (5, 0, "AVX without SSE"),
        ((1 << 63) | 3, 0, "bit 63"),
        (3, 1, "XCR1"),
    ] {
        let m = set(value, ecx, true)?;
        let r = m.expect_exception(13)?;
        ensure_eq!(
            (r.error, r.rip),
            (0, at::CODE),
            "XSETBV, {what}: error code and RIP"
        );
        ensure_eq!(
            m.vcpu.xcrs()?.xcrs[0].value,
            1,
            "XCR0 after the refusal of {what}"
        );
    }
    set(3, 0, false)?.expect_exception(6)?;
    let m = set(3, 0, true)?;
    m.patch_sregs(|s| {
        s.cs = selftests::guest::segment(sel::USER_CODE64, 11, 0, 1, 3, true);
        s.ss = selftests::guest::segment(sel::USER_DATA, 3, 1, 0, 3, true);
    })?;
    m.expect_exception(13)?;
    Ok(())
}

/// Instructions that may exit and do nothing that the guest can see.
fn quiet_instructions(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "mov ecx, 100",
        "2: pause",
        "loop 2b",
        "wbinvd",
        "invd",
        "mov ebx, {D}",
        "prefetcht0 [rbx]",
        "clflush [rbx]",
        "mfence",
        "rdtsc",
        "mov esi, eax",
        "sgdt [{D}]",
        "sidt [{D} + 16]",
        "str di",
        "hlt";
        D = at::DATA,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.expect_hlt()?;
    let d = (m.mem.read::<u16>(D), m.mem.read::<u64>(D + 2));
    ensure_eq!(d, (79, at::GDT), "SGDT");
    let d = (m.mem.read::<u16>(D + 16), m.mem.read::<u64>(D + 18));
    ensure_eq!(d, (0xfff, at::IDT), "SIDT");
    ensure_eq!(m.vcpu.regs()?.rdi & 0xffff, u64::from(sel::TSS), "STR");
    Ok(())
}

/// A hypercall that no one knows is answered with -KVM_ENOSYS, and at level 3 with -KVM_EPERM.
fn hypercall(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "vmcall", "hlt");
    let m = Machine::new(env, Mode::Long, code())?;
    m.patch_regs(|r| r.rax = 0x7777)?;
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rax as i64, -1000, "RAX");
    guest_code!(user, ".code64", "vmcall", "int 0x55");
    let m = Machine::new(env, Mode::Long, user())?;
    set_gate(&m.mem, 0x55, at::STUBS + 0x550, sel::CODE64, true);
    let gate = usize_of(at::IDT) + 0x550;
    m.mem.write(gate, m.mem.read::<u64>(gate) | (3 << 45));
    m.patch_sregs(|s| {
        s.cs = selftests::guest::segment(sel::USER_CODE64, 11, 0, 1, 3, true);
        s.ss = selftests::guest::segment(sel::USER_DATA, 3, 1, 0, 3, true);
    })?;
    m.patch_regs(|r| r.rax = 0x7777)?;
    m.expect_exception(0x55)?;
    // The handler saved RAX first, on the stack that the processor switched to: below the five
    // words of the frame, the vector and the error code.
    let rax: u64 = m.mem.read(usize_of(at::STACK - 0x1000) - 8 * 8);
    ensure_eq!(rax as i64, -1, "RAX at level 3");
    Ok(())
}

/// The TSC of the guest goes on, also across exits, and never back.
fn tsc_monotonic(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "xor r8d, r8d",
        "mov ecx, 200",
        "2: rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "cmp rax, r8",
        "jbe 3f",
        "mov r8, rax",
        "out {P}, al",
        "loop 2b",
        "mov ebx, 1",
        "3: hlt";
        P = PORT,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    loop {
        match m.run()? {
            Exit::Out { .. } => {}
            Exit::Hlt => break,
            other => fail!("exit {other:x?}\n{}", m.describe()),
        }
    }
    let r = m.vcpu.regs()?;
    ensure_eq!(
        r.rbx,
        1,
        "the end was reached: {:#x} came after {:#x}",
        r.rax,
        r.r8
    );
    Ok(())
}

/// A task switch is what the guest may ask for and hardware does not do: it is done or it is told.
fn task_switch(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov ax, 0x30",
        "ltr ax",
        ".byte 0xea", // jmp 0x38:0
        ".long 0",
        ".word 0x38",
        "hlt",
    );
    guest_code!(task, ".code32", "mov ebx, 0x7a5c", "hlt");
    let m = Machine::new(env, Mode::Protected, code())?;
    let mut tss = selftests::guest::tss_segment();
    tss.type_ = 9;
    m.mem
        .write(usize_of(at::GDT) + 0x30, selftests::guest::descriptor(&tss));
    tss.base = 0x40000;
    m.mem
        .write(usize_of(at::GDT) + 0x38, selftests::guest::descriptor(&tss));
    m.mem.write_bytes(0xb000, task());
    let at32 = |offset: usize, value: u32| m.mem.write(0x40000 + offset, value);
    at32(0x20, 0xb000); // EIP
    at32(0x24, 2); // EFLAGS
    at32(0x38, 0x1f000); // ESP
    for (i, selector) in [
        sel::DATA,
        sel::CODE32,
        sel::DATA,
        sel::DATA,
        sel::DATA,
        sel::DATA,
    ]
    .into_iter()
    .enumerate()
    {
        at32(0x48 + i * 4, selector.into());
    }
    match m.run()? {
        Exit::Hlt => {}
        Exit::Internal { .. } => skip!("not done: the exit says so (KVM_EXIT_INTERNAL_ERROR)"),
        other => fail!("exit {other:x?}\n{}", m.describe()),
    }
    let (r, s) = (m.vcpu.regs()?, m.vcpu.sregs()?);
    ensure_eq!(
        (r.rbx, r.rsp),
        (0x7a5c, 0x1f000),
        "EBX and ESP of the new task"
    );
    ensure_eq!((s.tr.selector, s.tr.base), (0x38, 0x40000), "TR");
    ensure!(s.cr0 & cr::TS != 0, "CR0.TS is clear");
    Ok(())
}

/// What one vCPU writes is not what another reads.
fn vcpus_apart(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, do_wrmsr())?;
    let other: Vcpu = m.vm.create_vcpu(1)?;
    other.set_cpuid(&*m.kvm.supported_cpuid()?)?;
    m.patch_regs(|r| {
        r.rcx = 0xc000_0082;
        r.rax = 0x1234_5678;
    })?;
    m.expect_hlt()?;
    ensure_eq!(
        m.vcpu.msr(0xc000_0082)?,
        Some(0x1234_5678),
        "LSTAR of the one that wrote"
    );
    ensure_eq!(other.msr(0xc000_0082)?, Some(0), "LSTAR of the other");
    Ok(())
}

/// MONITOR and MWAIT do nothing, unless the VMM wants them to fault where CPUID has not got them; CPUID follows
/// IA32_MISC_ENABLE in it, if the VMM wants that.
fn mwait(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        // MISC_ENABLE.MWAIT gets the value of R8.
        "mov ecx, 0x1a0",
        "rdmsr",
        "btr eax, 18",
        "or eax, r8d",
        "wrmsr",
        "mov eax, 1",
        "xor ecx, ecx",
        "cpuid",
        "mov r9d, ecx",
        "mov eax, {D}",
        "xor ecx, ecx",
        "xor edx, edx",
        "monitor",
        "mwait",
        "hlt";
        D = D,
    );
    const NEVER_UD: u32 = kb::KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS;
    const NO_UPDATE: u32 = kb::KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT;
    for (disabled, in_cpuid, in_msr) in [
        (0, false, false),
        (NEVER_UD, false, true),
        (NEVER_UD, true, false),
        (NO_UPDATE, true, false),
        (NO_UPDATE | NEVER_UD, true, false),
        (NO_UPDATE | NEVER_UD, false, true),
    ] {
        let case =
            format!("quirks {disabled:#x} disabled, {in_cpuid} in CPUID, {in_msr} in the MSR");
        let m = Machine::bare(env, at::SIZE)?;
        let quirks = m.kvm.capability(kb::KVM_CAP_DISABLE_QUIRKS2);
        if quirks & (NEVER_UD | NO_UPDATE) as i32 != (NEVER_UD | NO_UPDATE) as i32 {
            skip!("no such quirks");
        }
        m.vm.enable_cap(kb::KVM_CAP_DISABLE_QUIRKS2, disabled.into())?;
        let mut c = m.kvm.supported_cpuid()?;
        for e in c.list_mut() {
            if e.function == 1 {
                e.ecx = (e.ecx & !(1 << 3)) | (u32::from(in_cpuid) << 3);
            }
        }
        m.vcpu.set_cpuid(&c)?;
        m.start(Mode::Long, code())?;
        m.patch_regs(|r| r.r8 = u64::from(in_msr) << 18)?;
        let told = if disabled & NO_UPDATE != 0 {
            in_msr
        } else {
            in_cpuid
        };
        if disabled & NEVER_UD != 0 && !told {
            m.expect_exception(6)?;
        } else {
            m.expect_hlt()?;
        }
        let seen = m.vcpu.regs()?.r9 & (1 << 3) != 0;
        ensure_eq!(seen, told, "{case}: MONITOR in CPUID");
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "cpu",
        tests![
            msr_host_to_guest,
            msr_guest_to_host,
            msr_faults,
            syscall,
            cr0_bits,
            control_faults,
            tlb_flush,
            cr3_from_host,
            debug_registers,
            debug_register_faults,
            general_detect,
            xsetbv,
            mwait,
            quiet_instructions,
            hypercall,
            tsc_monotonic,
            task_switch,
            vcpus_apart,
        ],
    )
}
