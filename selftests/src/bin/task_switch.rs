// SPDX-License-Identifier: GPL-2.0

//! Hardware task switches: JMP, CALL, IRET and the gates of the IDT, with 32-bit and 16-bit task state segments.

use selftests::guest::{at, descriptor, pte, segment, sel, usize_of};
use selftests::machine::{cr, Machine, Mode};
use selftests::{ensure, ensure_eq, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

/// The selectors of the tasks, after those that every guest has.
const TASK_A: u16 = 0x50;
const TASK_B: u16 = 0x58;
const GATE: u16 = 0x60;
const TASK_16: u16 = 0x68;
const GDT_LIMIT: u16 = 0x6f;

const TSS_A: u64 = 0xa000;
const TSS_B: u64 = 0xa100;
const TSS_16: u64 = 0xa200;
/// Where a task's code and stack are.
const CODE_A: u64 = 0x3000;
const CODE_B: u64 = 0x3800;
const STACK_A: u64 = 0xf000;
const STACK_B: u64 = 0xf800;
/// What guests leave for the test.
const R: u64 = 0xb000;

const NT: u32 = 1 << 14;

/// Fields of a 32-bit TSS.
mod tss {
    pub(crate) const LINK: u64 = 0;
    pub(crate) const CR3: u64 = 0x1c;
    pub(crate) const EIP: u64 = 0x20;
    pub(crate) const EFLAGS: u64 = 0x24;
    pub(crate) const EAX: u64 = 0x28;
    pub(crate) const EBX: u64 = 0x34;
    pub(crate) const ESP: u64 = 0x38;
    pub(crate) const ESI: u64 = 0x40;
    pub(crate) const ES: u64 = 0x48;
    pub(crate) const CS: u64 = 0x4c;
    pub(crate) const GS: u64 = 0x5c;
    pub(crate) const MAP: u64 = 0x66;
}

fn tss_descriptor(base: u64, kind: u8, limit: u32) -> u64 {
    let mut s = segment(0, kind, 0, 0, 0, false);
    (s.base, s.limit, s.s) = (base, limit, 0);
    descriptor(&s)
}

fn write_tss(m: &Machine, base: u64, eip: u64, esp: u64, cr3: u64) {
    let put = |at: u64, value: u32| m.mem.write(usize_of(base + at), value);
    for offset in (0..0x68).step_by(4) {
        put(offset, 0);
    }
    put(tss::CR3, cr3 as u32);
    put(tss::EIP, eip as u32);
    put(tss::EFLAGS, 2);
    put(tss::ESP, esp as u32);
    for i in 0..6 {
        put(tss::ES + i * 4, sel::DATA.into());
    }
    put(tss::CS, sel::CODE32.into());
    m.mem.write(usize_of(base + tss::MAP), 0x68u16);
}

fn gdt_entry(m: &Machine, selector: u16, value: u64) {
    m.mem
        .write(usize_of(at::GDT) + usize::from(selector & !7), value);
}

/// The type of the TSS of a selector: 11 is busy, 9 is available.
fn kind(m: &Machine, selector: u16) -> u8 {
    let entry: u64 = m.mem.read(usize_of(at::GDT) + usize::from(selector & !7));
    (entry >> 40) as u8 & 15
}

fn get(m: &Machine, at: u64) -> u32 {
    m.mem.read(usize_of(at))
}

/// A guest in the task of every guest (`sel::TSS`), with two more tasks and a gate to the first.
fn machine(env: &Env, mode: Mode, code: &[u8], a: &[u8], b: &[u8]) -> Result<Machine, Verdict> {
    let m = Machine::new(env, mode, code)?;
    m.mem.write_bytes(usize_of(CODE_A), a);
    m.mem.write_bytes(usize_of(CODE_B), b);
    let cr3 = m.vcpu.sregs()?.cr3;
    write_tss(&m, TSS_A, CODE_A, STACK_A, cr3);
    write_tss(&m, TSS_B, CODE_B, STACK_B, cr3);
    write_tss(&m, at::TSS, 0, 0, cr3);
    gdt_entry(&m, TASK_A, tss_descriptor(TSS_A, 9, 0x67));
    gdt_entry(&m, TASK_B, tss_descriptor(TSS_B, 9, 0x67));
    gdt_entry(&m, TASK_16, tss_descriptor(TSS_16, 1, 0x2b));
    gdt_entry(&m, GATE, task_gate(TASK_A));
    m.patch_sregs(|s| s.gdt.limit = GDT_LIMIT)?;
    Ok(m)
}

fn task_gate(selector: u16) -> u64 {
    (u64::from(selector) << 16) | (0x8500 << 32)
}

fn idt_task_gate(m: &Machine, vector: u64, selector: u16) {
    m.mem
        .write(usize_of(at::IDT + vector * 8), task_gate(selector));
}

guest_code!(halt, ".code32", "hlt");

/// JMP ends the old task: its state is in its TSS, which is free for another time.
fn jump(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov eax, 0x11111111",
        "mov ebx, 0x22222222",
        "mov esi, 0x33333333",
        "stc",
        ".byte 0xea, 0, 0, 0, 0, 0x50, 0",
        "hlt",
    );
    let m = machine(env, Mode::Protected, code(), halt(), halt())?;
    m.mem.write(usize_of(TSS_A + tss::EAX), 0xaaaa_aaaau32);
    m.mem.write(usize_of(TSS_A + tss::ESI), 0xcccc_ccccu32);
    m.mem.write(usize_of(TSS_A + tss::EFLAGS), 0x46u32);
    m.expect_hlt()?;
    let (r, s) = (m.vcpu.regs()?, m.vcpu.sregs()?);
    ensure_eq!(r.rip, CODE_A + 1, "EIP of the new task");
    ensure_eq!((r.rax, r.rsi), (0xaaaa_aaaa, 0xcccc_cccc), "its registers");
    ensure_eq!(r.rsp, STACK_A, "its stack");
    ensure_eq!(r.rflags, 0x46, "its flags");
    ensure_eq!((s.tr.selector, s.tr.base), (TASK_A, TSS_A), "TR");
    ensure_eq!(s.cr0 & cr::TS, cr::TS, "CR0.TS");
    ensure_eq!(s.cs.selector, sel::CODE32, "CS");
    let old = code().len() as u64 - 1;
    ensure_eq!(
        u64::from(get(&m, at::TSS + tss::EIP)),
        at::CODE + old,
        "EIP in the old TSS"
    );
    ensure_eq!(get(&m, at::TSS + tss::EAX), 0x1111_1111, "EAX there");
    ensure_eq!(get(&m, at::TSS + tss::EBX), 0x2222_2222, "EBX there");
    ensure_eq!(get(&m, at::TSS + tss::ESI), 0x3333_3333, "ESI there");
    ensure_eq!(get(&m, at::TSS + tss::EFLAGS) & 0xff, 3, "flags there");
    ensure_eq!(
        get(&m, at::TSS + tss::CS) & 0xffff,
        sel::CODE32.into(),
        "CS there"
    );
    ensure_eq!((kind(&m, sel::TSS), kind(&m, TASK_A)), (9, 11), "busy bits");
    Ok(())
}

guest_code!(nested, ".code32",
    "2:",
    "pushfd",
    "pop dword ptr [{R}]",
    "inc dword ptr [{R} + 4]",
    "mov word ptr [{R} + 8], 0",
    "str word ptr [{R} + 8]",
    "iretd",
    "jmp 2b";
    R = R,
);

fn expect_nested(m: &Machine, calls: u32) -> Outcome {
    ensure_eq!(get(m, R) & NT, NT, "NT in the nested task");
    ensure_eq!(get(m, R + 4), calls, "runs of the nested task");
    ensure_eq!(get(m, R + 8) & 0xffff, TASK_A.into(), "STR in it");
    ensure_eq!(get(m, TSS_A + tss::LINK) & 0xffff, sel::TSS.into(), "link");
    ensure_eq!(
        get(m, TSS_A + tss::EFLAGS) & NT,
        0,
        "NT in its TSS after IRET"
    );
    ensure_eq!((kind(m, sel::TSS), kind(m, TASK_A)), (11, 9), "busy bits");
    let (r, s) = (m.vcpu.regs()?, m.vcpu.sregs()?);
    ensure_eq!(s.tr.selector, sel::TSS, "TR");
    ensure_eq!(r.rbx, 0x1234_5678, "register of the caller");
    ensure_eq!(r.rflags & u64::from(NT), 0, "NT of the caller");
    ensure_eq!(r.rsp, at::STACK, "stack of the caller");
    Ok(())
}

/// CALL nests a task, IRET ends it; another CALL finds it after its IRET.
fn call(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov ebx, 0x12345678",
        ".byte 0x9a, 0, 0, 0, 0, 0x50, 0",
        ".byte 0x9a, 0, 0, 0, 0, 0x50, 0",
        "hlt",
    );
    let m = machine(env, Mode::Protected, code(), nested(), halt())?;
    m.expect_hlt()?;
    expect_nested(&m, 2)
}

/// The same through a gate in the GDT, and by a pointer in memory.
fn call_gate(env: &Env) -> Outcome {
    guest_code!(code, ".code32",
        "mov ebx, 0x12345678",
        ".byte 0x9a, 0, 0, 0, 0, 0x60, 0",
        "mov dword ptr [{R} + 0x40], 0",
        "mov word ptr [{R} + 0x44], 0x60",
        "call fword ptr [{R} + 0x40]",
        "hlt";
        R = R,
    );
    let m = machine(env, Mode::Protected, code(), nested(), halt())?;
    m.expect_hlt()?;
    expect_nested(&m, 2)
}

/// INT n through a task gate: the old task goes on after it, and nothing is pushed.
fn interrupt_gate(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov ebx, 0x12345678",
        "int 0x40",
        "int 0x40",
        "hlt"
    );
    let m = machine(env, Mode::Protected, code(), nested(), halt())?;
    idt_task_gate(&m, 0x40, TASK_A);
    m.expect_hlt()?;
    expect_nested(&m, 2)?;
    ensure_eq!(
        get(&m, TSS_A + tss::ESP),
        STACK_A as u32,
        "stack of the handler"
    );
    Ok(())
}

/// An exception through a task gate: its error code is on the new task's stack, and the old task is at the instruction.
fn exception_gate(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov ebx, 0x12345678",
        "mov eax, 0x1fff",
        "mov ds, eax",
        "ud2",
        "hlt",
    );
    guest_code!(handler, ".code32",
        "2:",
        "pop dword ptr [{R} + 0x10]",
        "mov [{R} + 0x14], esp",
        "inc dword ptr [{R} + 4]",
        "mov eax, [{T} + 0x20]",
        "mov [{R} + 0x18], eax",
        "add dword ptr [{T} + 0x20], 2",
        "iretd",
        "jmp 2b";
        R = R, T = at::TSS,
    );
    // #UD has no error code.
    guest_code!(undefined, ".code32",
        "mov [{R} + 0x24], esp",
        "inc dword ptr [{R} + 0x20]",
        "add dword ptr [{T} + 0x20], 2",
        "iretd";
        R = R, T = at::TSS,
    );
    let m = machine(env, Mode::Protected, code(), handler(), undefined())?;
    idt_task_gate(&m, 13, TASK_A);
    idt_task_gate(&m, 6, TASK_B);
    m.expect_hlt()?;
    ensure_eq!(get(&m, R + 4), 1, "runs of the handler");
    ensure_eq!(get(&m, R + 0x10), 0x1ffc, "error code");
    ensure_eq!(u64::from(get(&m, R + 0x14)), STACK_A, "stack after it");
    ensure_eq!(
        u64::from(get(&m, R + 0x18)),
        at::CODE + 10,
        "EIP in the old TSS"
    );
    ensure_eq!(get(&m, R + 0x20), 1, "runs of the handler of #UD");
    ensure_eq!(u64::from(get(&m, R + 0x24)), STACK_B, "its stack");
    let s = m.vcpu.sregs()?;
    ensure_eq!(
        (s.tr.selector, s.ds.selector),
        (sel::TSS, sel::DATA),
        "TR and DS"
    );
    Ok(())
}

/// An interrupt that the VMM queues finds its handler through a task gate, out of HLT.
fn external_interrupt(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov ebx, 0x12345678",
        "sti",
        "hlt",
        "cli",
        "hlt"
    );
    let m = machine(env, Mode::Protected, code(), nested(), halt())?;
    idt_task_gate(&m, 0x41, TASK_A);
    m.expect_hlt()?;
    m.vcpu.interrupt(0x41)?;
    m.expect_hlt()?;
    expect_nested(&m, 1)
}

fn write_tss16(m: &Machine, base: u64, ip: u64, sp: u64) {
    let put = |at: u64, value: u16| m.mem.write(usize_of(base + at), value);
    for offset in (0..0x2c).step_by(2) {
        put(offset, 0);
    }
    put(0x0e, ip as u16);
    put(0x10, 2);
    put(0x12, 0x4321);
    put(0x1a, sp as u16);
    for at in [0x22, 0x26, 0x28] {
        put(at, sel::DATA);
    }
    put(0x24, sel::CODE32);
}

guest_code!(
    call16,
    ".code32",
    "mov ebx, 0x12345678",
    "mov esi, 0x8765",
    ".byte 0x9a, 0, 0, 0, 0, 0x68, 0",
    "hlt",
);
guest_code!(task16, ".code32",
    "mov [{R}], eax",
    "mov [{R} + 4], esp",
    "iretd";
    R = R,
);

/// Tasks with a TSS of 16 bits: there and back.
fn sixteen_bits(env: &Env) -> Outcome {
    let m = machine(env, Mode::Protected, call16(), task16(), halt())?;
    write_tss16(&m, TSS_16, CODE_A, STACK_A);
    write_tss16(&m, at::TSS, 0, 0);
    gdt_entry(&m, sel::TSS, tss_descriptor(at::TSS, 3, 0x2b));
    m.patch_sregs(|s| (s.tr.type_, s.tr.limit) = (3, 0x2b))?;
    // A stack that 16 bits reach.
    m.patch_regs(|r| r.rsp = 0xe000)?;
    m.expect_hlt()?;
    ensure_eq!(get(&m, R) & 0xffff, 0x4321, "AX of the task");
    ensure_eq!(u64::from(get(&m, R + 4) & 0xffff), STACK_A, "its SP");
    let (r, s) = (m.vcpu.regs()?, m.vcpu.sregs()?);
    ensure_eq!(
        (r.rbx & 0xffff, r.rsi & 0xffff),
        (0x5678, 0x8765),
        "BX and SI"
    );
    ensure_eq!(r.rsp & 0xffff, 0xe000, "SP");
    ensure_eq!(s.tr.selector, sel::TSS, "TR");
    ensure_eq!((kind(&m, sel::TSS), kind(&m, TASK_16)), (3, 1), "busy bits");
    let link: u16 = m.mem.read(usize_of(TSS_16));
    ensure_eq!(link, sel::TSS, "link");
    Ok(())
}

/// From a task of 32 bits to one of 16, and back.
fn mixed_widths(env: &Env) -> Outcome {
    if env.device == "/dev/kvm" {
        skip!("KVM saves the old task in the format of the new one");
    }
    let m = machine(env, Mode::Protected, call16(), task16(), halt())?;
    write_tss16(&m, TSS_16, CODE_A, STACK_A);
    m.expect_hlt()?;
    ensure_eq!(get(&m, R) & 0xffff, 0x4321, "AX of the 16-bit task");
    let (r, s) = (m.vcpu.regs()?, m.vcpu.sregs()?);
    ensure_eq!((r.rbx, r.rsp), (0x1234_5678, at::STACK), "EBX and ESP");
    ensure_eq!(s.tr.selector, sel::TSS, "TR");
    ensure_eq!(
        (kind(&m, sel::TSS), kind(&m, TASK_16)),
        (11, 1),
        "busy bits"
    );
    Ok(())
}

/// A task brings its page tables.
fn address_spaces(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov ebx, 0x12345678",
        "mov eax, [0x40000000]",
        ".byte 0x9a, 0, 0, 0, 0, 0x50, 0",
        "mov ecx, [0x40000000]",
        "hlt",
    );
    guest_code!(task, ".code32",
        "mov eax, [0x40000000]",
        "mov [{R}], eax",
        "mov eax, cr3",
        "mov [{R} + 4], eax",
        "iretd";
        R = R,
    );
    for mode in [Mode::Paging32, Mode::Pae] {
        let m = machine(env, mode, code(), task(), halt())?;
        // The tables differ in where they lead to at 1 GiB.
        let other = 0x30000u64;
        match mode {
            Mode::Paging32 => {
                let table: [u8; 4096] = m.mem.read(usize_of(at::PD32));
                m.mem.write_bytes(usize_of(other), &table);
                m.mem.write(usize_of(at::PD32) + 0x100 * 4, 0x31003u32);
                m.mem.write(usize_of(other) + 0x100 * 4, 0x32003u32);
                m.mem.write(0x31000, 0x50003u32);
                m.mem.write(0x32000, 0x51003u32);
            }
            _ => {
                let table: [u8; 32] = m.mem.read(usize_of(at::PDPT_PAE));
                m.mem.write_bytes(usize_of(other), &table);
                m.mem.write(usize_of(at::PDPT_PAE) + 8, 0x31000 | pte::P);
                m.mem.write(usize_of(other) + 8, 0x32000 | pte::P);
                m.mem.write(0x31000, 0x33000 | pte::P | pte::W);
                m.mem.write(0x32000, 0x34000 | pte::P | pte::W);
                m.mem.write(0x33000, 0x50000 | pte::P | pte::W);
                m.mem.write(0x34000, 0x51000 | pte::P | pte::W);
                // The entries are the processor's copies: it is to load them anew.
                m.patch_sregs(|_| ())?;
            }
        }
        m.mem.write(0x50000, 0x1111u32);
        m.mem.write(0x51000, 0x2222u32);
        m.mem.write(usize_of(TSS_A + tss::CR3), other as u32);
        m.expect_hlt()?;
        let (r, s) = (m.vcpu.regs()?, m.vcpu.sregs()?);
        ensure_eq!(u64::from(get(&m, R + 4)), other, "CR3 in the task");
        ensure_eq!(get(&m, R), 0x2222, "what the task sees, {mode:?}");
        ensure_eq!(
            (r.rax, r.rcx),
            (0x1111, 0x1111),
            "what the caller sees, {mode:?}"
        );
        ensure!(s.cr3 != other, "CR3 of the caller");
    }
    Ok(())
}

/// What is wrong with a task is found before anything has changed.
fn refusals(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov ebx, 0x12345678",
        ".byte 0xea, 0, 0, 0, 0, 0x50, 0",
        "hlt",
    );
    // What the descriptor is, and the exception.
    let cases = [
        (tss_descriptor(TSS_A, 11, 0x67), 13, "a busy TSS"),
        (tss_descriptor(TSS_A, 2, 0x67), 13, "an LDT"),
        (tss_descriptor(TSS_A, 9, 0x66), 10, "a TSS too small"),
    ];
    for (entry, vector, what) in cases {
        let m = machine(env, Mode::Protected, code(), halt(), halt())?;
        gdt_entry(&m, TASK_A, entry);
        let record = m.expect_exception(vector)?;
        ensure_eq!(record.error, TASK_A.into(), "error code for {what}");
        ensure_eq!(record.rip, at::CODE + 5, "EIP for {what}");
        let s = m.vcpu.sregs()?;
        ensure_eq!(s.tr.selector, sel::TSS, "TR for {what}");
        ensure_eq!(get(&m, at::TSS + tss::EBX), 0, "old TSS for {what}");
    }
    Ok(())
}

/// A segment that the new task cannot have: #TS that names it, in the new task.
fn bad_segment(env: &Env) -> Outcome {
    if env.device == "/dev/kvm" {
        skip!("KVM goes on with the old task");
    }
    guest_code!(
        code,
        ".code32",
        "mov ebx, 0x12345678",
        ".byte 0xea, 0, 0, 0, 0, 0x50, 0",
        "hlt",
    );
    let m = machine(env, Mode::Protected, code(), halt(), halt())?;
    // The last to be loaded: the handler needs the others.
    m.mem.write(usize_of(TSS_A + tss::GS), u32::from(sel::TSS));
    let record = m.expect_exception(10)?;
    ensure_eq!(record.error, sel::TSS.into(), "error code");
    ensure_eq!(record.rip, CODE_A, "EIP");
    let s = m.vcpu.sregs()?;
    ensure_eq!(s.tr.selector, TASK_A, "TR");
    ensure_eq!(
        u64::from(get(&m, at::TSS + tss::EIP)),
        at::CODE + 12,
        "EIP of the old task"
    );
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "task_switch",
        tests![
            jump,
            call,
            call_gate,
            interrupt_gate,
            exception_gate,
            external_interrupt,
            sixteen_bits,
            mixed_widths,
            address_spaces,
            refusals,
            bad_segment,
        ],
    )
}
