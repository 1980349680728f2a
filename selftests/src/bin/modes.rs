// SPDX-License-Identifier: GPL-2.0

//! The processor's modes: each by itself, and one guest that goes through all of them.

use selftests::guest::{at, pte, sel, usize_of, PORT};
use selftests::machine::{cr, Exit, Machine, Mode, MODES};
use selftests::{ensure, ensure_eq, guest_code, tests, Env, Outcome};
use std::process::ExitCode;

const D: usize = at::DATA as usize;

fn real(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code16",
        "mov ax, 0x1000",
        "mov ds, ax",
        "mov es, ax",
        "mov ss, ax",
        "mov sp, 0x100",
        "mov bx, 0x1234",
        "mov [0x10], bx",
        "push bx",
        "pop dx",
        "mov si, 0x10",
        "mov di, 0x20",
        "movsw",
        "mov ax, cs",
        "smsw cx",
        "hlt",
    );
    let m = Machine::new(env, Mode::Real, code())?;
    m.expect_hlt()?;
    let (r, s) = (m.vcpu.regs()?, m.vcpu.sregs()?);
    ensure_eq!(m.mem.read::<u16>(0x10010), 0x1234, "store through DS");
    ensure_eq!(m.mem.read::<u16>(0x10020), 0x1234, "MOVSW through ES");
    ensure_eq!(m.mem.read::<u16>(0x100fe), 0x1234, "PUSH through SS");
    ensure_eq!((r.rdx & 0xffff, r.rsp & 0xffff), (0x1234, 0x100), "POP");
    ensure_eq!((s.ds.base, s.ds.selector), (0x10000, 0x1000), "DS");
    ensure_eq!(r.rcx & 1, 0, "PE in the machine status word");
    Ok(())
}

/// INT goes through the vector table at 0, IRET comes back.
fn real_interrupt(env: &Env) -> Outcome {
    guest_code!(code, ".code16", "mov bx, 1", "int 0x21", "or bx, 4", "hlt");
    guest_code!(handler, ".code16", "or bx, 2", "iret");
    let m = Machine::new(env, Mode::Real, code())?;
    m.mem.write(0x21 * 4, 0x0010u16);
    m.mem.write(0x21 * 4 + 2, 0x0a00u16);
    m.mem.write_bytes(0xa010, handler());
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    ensure_eq!(
        r.rbx & 0xffff,
        7,
        "marks of the code before, in and after the handler"
    );
    Ok(())
}

/// Real mode with a data segment of 4 GiB, as boot loaders use it.
fn real_big_segment(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code16",
        "mov edx, 0x180000",
        "mov dword ptr [edx], 0x89abcdef",
        "mov eax, [edx]",
        "hlt",
    );
    let m = Machine::new(env, Mode::Real, code())?;
    m.patch_sregs(|s| {
        s.ds.limit = 0xffff_ffff;
        s.ds.g = 1;
    })?;
    m.expect_hlt()?;
    ensure_eq!(
        m.mem.read::<u32>(0x18_0000),
        0x89ab_cdef,
        "store above 1 MiB"
    );
    ensure_eq!(m.vcpu.regs()?.rax, 0x89ab_cdef, "load above 1 MiB");
    Ok(())
}

guest_code!(work32, ".code32",
    "mov ecx, 100",
    "xor eax, eax",
    "2: add eax, ecx",
    "loop 2b",
    "push eax",
    "call 3f",
    "jmp 4f",
    "3: mov ebx, [esp + 4]",
    "ret",
    "4: mov [{D}], ebx",
    "mov dx, cs",
    "mov edi, cr0",
    "hlt";
    D = at::DATA,
);

fn work(env: &Env, mode: Mode, cr0: u64) -> Outcome {
    let m = Machine::new(env, mode, work32())?;
    m.expect_hlt()?;
    ensure_eq!(m.mem.read::<u32>(D), 5050, "result in memory");
    let r = m.vcpu.regs()?;
    ensure_eq!(r.rdx & 0xffff, u64::from(sel::CODE32), "CS");
    ensure_eq!(r.rdi & (cr::PE | cr::PG), cr0, "PE and PG");
    Ok(())
}

fn protected(env: &Env) -> Outcome {
    work(env, Mode::Protected, cr::PE)
}

fn paging32(env: &Env) -> Outcome {
    work(env, Mode::Paging32, cr::PE | cr::PG)
}

fn pae(env: &Env) -> Outcome {
    work(env, Mode::Pae, cr::PE | cr::PG)
}

fn long(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "mov r8, 0x123456789abcdef0",
        "mov [{D}], r8",
        "lea r9, [rip]",
        "2:",
        "push r8",
        "call 3f",
        "hlt",
        "3: mov r10, [rsp + 8]",
        "ret";
        D = at::DATA,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    ensure_eq!(m.mem.read::<u64>(D), 0x1234_5678_9abc_def0, "64-bit store");
    ensure_eq!(r.r10, 0x1234_5678_9abc_def0, "64-bit argument on the stack");
    ensure!(
        r.r9 > at::CODE && r.r9 < at::CODE + 0x100,
        "RIP-relative address {:#x}",
        r.r9
    );
    Ok(())
}

/// Paging is used, not only switched on: a high linear address leads to another physical one.
fn long_high_half(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov rbx, 0xffff800000000000",
        "mov rax, [rbx + 0x123008]",
        "mov qword ptr [rbx + 0x123010], 0x77",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    // 0xffff8000_00123000 -> 0x40000, by tables of 4 KiB pages at 0x30000.
    let table = pte::P | pte::W;
    m.mem.write(usize_of(at::PML4) + 256 * 8, 0x30000 | table);
    m.mem.write(0x30000, 0x31000 | table);
    m.mem.write(0x31000, 0x32000 | table);
    m.mem.write(0x32000 + 0x123 * 8, 0x40000 | table);
    m.mem.write(0x40008, 0x5566_7788_1122_3344u64);
    m.expect_hlt()?;
    ensure_eq!(
        m.vcpu.regs()?.rax,
        0x5566_7788_1122_3344,
        "load by the high address"
    );
    ensure_eq!(
        m.mem.read::<u64>(0x40010),
        0x77,
        "store by the high address"
    );
    let leaf: u64 = m.mem.read(0x32000 + 0x123 * 8);
    ensure_eq!(leaf & 0x60, 0x60, "accessed and dirty in the guest's entry");
    let upper: u64 = m.mem.read(0x31000);
    ensure_eq!(upper & 0x20, 0x20, "accessed in the directory's entry");
    Ok(())
}

/// 4 KiB pages of 32-bit paging, one of them mapped elsewhere.
fn paging32_small_pages(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov eax, [0x40005000]",
        "mov dword ptr [0x40005004], 0x99",
        "hlt",
    );
    let m = Machine::new(env, Mode::Paging32, code())?;
    m.mem.write(usize_of(at::PD32) + 0x100 * 4, 0x30003u32);
    m.mem.write(0x30000 + 5 * 4, 0x41003u32);
    m.mem.write(0x41000, 0xfeed_f00du32);
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rax, 0xfeed_f00d, "load");
    ensure_eq!(m.mem.read::<u32>(0x41004), 0x99, "store");
    ensure_eq!(
        m.mem.read::<u32>(0x30000 + 5 * 4) & 0x60,
        0x60,
        "accessed and dirty"
    );
    Ok(())
}

// One guest through all modes. Each stage lies at an address of its own and reports with an output,
// at which the host looks at the control registers.

guest_code!(stage_real, ".code16",
    "lgdt [{D}]",
    "mov al, 1",
    "out {P}, al",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    ".byte 0x66, 0xea",
    ".long 0x1400",
    ".word 0x18";
    D = at::DATA + 0x100, P = PORT,
);

guest_code!(stage_protected, ".code32",
    "mov ax, 0x10",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov esp, {S}",
    "mov al, 2",
    "out {P}, al",
    // PAE paging, and off again.
    "mov eax, cr4",
    "or eax, 0x20",
    "mov cr4, eax",
    "mov eax, {PAE}",
    "mov cr3, eax",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "mov al, 3",
    "out {P}, al",
    "mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    // Long mode.
    "mov eax, {PML4}",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    ".byte 0xea",
    ".long 0x1800",
    ".word 0x8";
    S = at::STACK, P = PORT, PAE = at::PDPT_PAE, PML4 = at::PML4,
);

guest_code!(stage_long, ".code64",
    "mov r15, 0x1122334455667788",
    "mov [{D}], r15",
    "mov al, 4",
    "out {P}, al",
    // Compatibility mode.
    "push 0x18",
    "push 0x1c00",
    ".byte 0x48",
    "retf";
    D = at::DATA, P = PORT,
);

guest_code!(stage_compatibility, ".code32",
    "mov al, 5",
    "out {P}, al",
    "mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "and eax, 0xfffffeff",
    "wrmsr",
    "mov al, 6",
    "out {P}, al",
    ".byte 0xea",
    ".long 0x2000",
    ".word 0x20";
    P = PORT,
);

guest_code!(stage_protected16, ".code16",
    "mov ax, 0x28",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov al, 7",
    "out {P}, al",
    "mov eax, cr0",
    "and al, 0xfe",
    "mov cr0, eax",
    ".byte 0xea",
    ".word 0x2400",
    ".word 0";
    P = PORT,
);

guest_code!(stage_real_again, ".code16",
    "xor ax, ax",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov al, 8",
    "out {P}, al",
    "mov word ptr [{D} + 8], 0x600d",
    "hlt";
    P = PORT, D = at::DATA,
);

fn transitions(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Real, stage_real())?;
    selftests::guest::write_gdt(&m.mem);
    selftests::guest::write_page_tables(&m.mem);
    for (address, code) in [
        (0x1400, stage_protected()),
        (0x1800, stage_long()),
        (0x1c00, stage_compatibility()),
        (0x2000, stage_protected16()),
        (0x2400, stage_real_again()),
    ] {
        m.mem.write_bytes(address, code);
    }
    m.mem.write(D + 0x100, 79u16);
    m.mem.write(D + 0x102, at::GDT as u32);
    let lm = cr::LME | cr::LMA;
    // Stage, PE and PG, EFER's LME and LMA, CS.
    let stages: [(u8, u64, u64, u16); 8] = [
        (1, 0, 0, 0),
        (2, cr::PE, 0, 0x18),
        (3, cr::PE | cr::PG, 0, 0x18),
        (4, cr::PE | cr::PG, lm, 0x8),
        (5, cr::PE | cr::PG, lm, 0x18),
        (6, cr::PE, 0, 0x18),
        (7, cr::PE, 0, 0x20),
        (8, 0, 0, 0),
    ];
    for (stage, cr0, efer, cs) in stages {
        m.expect(&Exit::Out {
            port: PORT,
            size: 1,
            data: vec![stage],
        })?;
        let s = m.vcpu.sregs()?;
        ensure_eq!(s.cr0 & (cr::PE | cr::PG), cr0, "CR0 in stage {stage}");
        ensure_eq!(s.efer & lm, efer, "EFER in stage {stage}");
        ensure_eq!(s.cs.selector, cs, "CS in stage {stage}");
        ensure_eq!(s.cs.l, u8::from(stage == 4), "CS.L in stage {stage}");
    }
    m.expect_hlt()?;
    ensure_eq!(
        m.mem.read::<u64>(D),
        0x1122_3344_5566_7788,
        "what long mode stored"
    );
    ensure_eq!(
        m.mem.read::<u16>(D + 8),
        0x600d,
        "what real mode stored at the end"
    );
    Ok(())
}

/// Ten rounds, so that what a switch leaves behind would show in the next one.
fn transitions_repeated(env: &Env) -> Outcome {
    guest_code!(enable, ".code32",
        "mov ebp, 50",
        "2:",
        "mov eax, {PAE}",
        "mov cr3, eax",
        "mov eax, cr4",
        "or eax, 0x20",
        "mov cr4, eax",
        "mov eax, cr0",
        "or eax, 0x80000000",
        "mov cr0, eax",
        "mov ebx, [0x1ff000]",
        "add ebx, 1",
        "mov [0x1ff000], ebx",
        "mov eax, cr0",
        "and eax, 0x7fffffff",
        "mov cr0, eax",
        "mov eax, cr4",
        "and eax, 0xffffffdf",
        "or eax, 0x10",
        "mov cr4, eax",
        "mov eax, {PD32}",
        "mov cr3, eax",
        "mov eax, cr0",
        "or eax, 0x80000000",
        "mov cr0, eax",
        "add dword ptr [0x1ff000], 1",
        "mov eax, cr0",
        "and eax, 0x7fffffff",
        "mov cr0, eax",
        "add dword ptr [0x1ff000], 1",
        "dec ebp",
        "jnz 2b",
        "hlt";
        PAE = at::PDPT_PAE, PD32 = at::PD32,
    );
    let m = Machine::new(env, Mode::Protected, enable())?;
    m.expect_hlt()?;
    ensure_eq!(
        m.mem.read::<u32>(0x1f_f000),
        150,
        "increments in the three modes"
    );
    Ok(())
}

/// Userspace itself puts one vCPU from each mode into each other.
fn set_by_host(env: &Env) -> Outcome {
    guest_code!(code16, ".code16", "inc word ptr [{D}]", "hlt"; D = at::DATA);
    guest_code!(code32, ".code32", "inc dword ptr [{D}]", "hlt"; D = at::DATA);
    guest_code!(code64, ".code64", "inc qword ptr [{D}]", "hlt"; D = at::DATA);
    let m = Machine::new(env, Mode::Real, code16())?;
    let mut count = 0u64;
    let fresh = m.vcpu.sregs()?;
    for from in MODES {
        for to in MODES {
            for mode in [from, to] {
                let code = match mode {
                    Mode::Real => code16(),
                    Mode::Long => code64(),
                    _ => code32(),
                };
                if mode == Mode::Real {
                    m.vcpu.set_sregs(&fresh)?;
                }
                m.start(mode, code)?;
                m.expect_hlt()?;
                count += 1;
                ensure_eq!(
                    m.mem.read::<u64>(D),
                    count,
                    "count after {from:?} to {to:?}"
                );
            }
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "modes",
        tests![
            real,
            real_interrupt,
            real_big_segment,
            protected,
            paging32,
            pae,
            long,
            long_high_half,
            paging32_small_pages,
            transitions,
            transitions_repeated,
            set_by_host,
        ],
    )
}
