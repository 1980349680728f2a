// SPDX-License-Identifier: GPL-2.0

//! Exceptions inside the guest: vectors, error codes, CR2, and what becomes of faults in faults.

use selftests::guest::{at, pte, sel, set_gate, usize_of, Record, PORT, PORT_EXCEPTION};
use selftests::machine::{cr, Exit, Machine, Mode};
use selftests::{ensure, ensure_eq, fail, guest_code, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

/// Page-fault error code: the page was present.
const PF_P: u64 = 1;
/// A write.
const PF_W: u64 = 2;
/// From privilege level 3.
const PF_U: u64 = 4;
/// An instruction fetch.
const PF_I: u64 = 16;

/// Runs `code` to its first exception, checks vector, error code and the offset of the saved RIP.
fn fault(m: &Machine, vector: u8, error: u64, offset: u64) -> Result<Record, Verdict> {
    let r = m.expect_exception(vector)?;
    ensure_eq!(r.error, error, "error code of vector {vector}");
    ensure_eq!(r.rip, at::CODE + offset, "saved RIP of vector {vector}");
    Ok(r)
}

fn divide(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "xor ecx, ecx", "div ecx", "hlt");
    let m = Machine::new(env, Mode::Long, code())?;
    fault(&m, 0, 0, 2)?;
    m.resume_at(at::CODE + 4);
    m.expect_hlt()
}

fn undefined(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "nop", "ud2", "hlt");
    let m = Machine::new(env, Mode::Long, code())?;
    fault(&m, 6, 0, 1)?;
    m.resume_at(at::CODE + 3);
    m.expect_hlt()
}

fn breakpoint(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "nop", "int3", "hlt");
    let m = Machine::new(env, Mode::Long, code())?;
    fault(&m, 3, 0, 2)?; // a trap: RIP is behind the instruction
    m.expect_hlt()
}

fn software_interrupt(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "int 0x80", "hlt");
    let m = Machine::new(env, Mode::Long, code())?;
    fault(&m, 0x80, 0, 2)?;
    m.expect_hlt()
}

fn general_protection(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov rax, 0x8000000000000000",
        "mov bl, [rax]", // offset 10, 2 bytes: not canonical
        "mov ax, 0x73",
        "mov ds, ax", // offset 16: a selector beyond the table
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    fault(&m, 13, 0, 10)?;
    m.resume_at(at::CODE + 12);
    fault(&m, 13, 0x70, 16)?;
    m.resume_at(at::CODE + code().len() as u64 - 1);
    m.expect_hlt()
}

fn stack(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov rbp, 0x8000000000000000",
        "mov al, [rbp]",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    fault(&m, 12, 0, 10)?;
    m.resume_at(at::CODE + 13);
    m.expect_hlt()
}

fn not_present(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "mov ax, 0x48", "mov es, ax", "hlt");
    let m = Machine::new(env, Mode::Protected, code())?;
    let entry = usize_of(at::GDT) + 0x48;
    m.mem.write(entry, m.mem.read::<u64>(entry) & !(1 << 47));
    fault(&m, 11, 0x48, 4)?;
    m.resume_at(at::CODE + code().len() as u64 - 1);
    m.expect_hlt()
}

fn device_not_available(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov rax, cr0",
        "or eax, 8",
        "mov cr0, rax",
        "fld1", // offset 9
        "clts",
        "fld1",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    fault(&m, 7, 0, 9)?;
    m.resume_at(at::CODE + 11);
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.sregs()?.cr0 & cr::TS, 0, "CR0.TS after CLTS");
    Ok(())
}

fn alignment_check(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "mov eax, [{D} + 1]", "jmp 2f", "2: jmp 2b"; D = at::DATA);
    let m = Machine::new(env, Mode::Long, code())?;
    enter_user(&m, at::CODE)?;
    m.patch_regs(|r| r.rflags |= 1 << 18)?;
    m.patch_sregs(|s| s.cr0 |= 1 << 18)?;
    let r = m.expect_exception(17)?;
    ensure_eq!((r.error, r.rip), (0, at::CODE), "error code and RIP");
    Ok(())
}

fn single_step(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "pushfq",
        "or dword ptr [rsp], 0x100",
        "popfq",
        "nop",
        "nop",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let end = code().len() as u64;
    // After POPF sets TF, the next instruction traps when it is done.
    fault(&m, 1, 0, end - 2)?;
    ensure_eq!(m.vcpu.debugregs()?.dr6 & 0x4000, 0x4000, "DR6.BS");
    fault(&m, 1, 0, end - 1)?;
    Ok(())
}

/// Single-stepping over an instruction that exits: the trap must not be lost.
fn single_step_over_exits(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "pushfq",
        "or dword ptr [rsp], 0x100",
        "popfq",
        "cpuid",
        "out {P}, al",
        "nop",
        "hlt";
        P = PORT,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let end = code().len() as u64;
    fault(&m, 1, 0, end - 4)?; // after CPUID
    match m.run()? {
        Exit::Out { port: PORT, .. } => {}
        other => fail!("exit {other:x?}, expected the output\n{}", m.describe()),
    }
    fault(&m, 1, 0, end - 2)?; // after OUT
    fault(&m, 1, 0, end - 1)?; // after NOP
    Ok(())
}

fn hardware_breakpoint(env: &Env) -> Outcome {
    // A write and an exception first, which bring all pages in. An EPT violation in the middle of a delivery
    // saves RFLAGS as the delivery would have pushed them (SDM volume 3, 29.3.3): RF clear for a trap. The
    // emulated machine saves RF set there, and then RF suppresses the second breakpoint.
    guest_code!(code, ".code64",
        "mov dword ptr [{D}], 1",
        "int3",
        "mov rax, {T}",
        "mov dr0, rax",
        "mov eax, {D}",
        "mov dr1, rax",
        "mov eax, 0xd00405", // L0 execute, L1 data write of 4 bytes
        "mov dr7, rax",
        "mov dword ptr [{D}], 5",
        "nop",
        "hlt";
        T = at::CODE + 0x100, D = at::DATA,
    );
    guest_code!(target, ".code64", "nop", "hlt");
    let m = Machine::new(env, Mode::Long, code())?;
    m.mem.write_bytes(usize_of(at::CODE) + 0x100, target());
    m.expect_exception(3)?;
    let r = m.expect_exception(1)?;
    ensure_eq!(
        m.vcpu.debugregs()?.dr6 & 0xf,
        2,
        "DR6 after the watched write"
    );
    ensure_eq!(
        m.mem.read::<u32>(usize_of(at::DATA)),
        5,
        "the write is done when it traps"
    );
    ensure!(r.rip > at::CODE + 20, "RIP {:#x}", r.rip);
    m.resume_at(at::CODE + 0x100);
    let r = m.expect_exception(1)?;
    ensure_eq!(
        r.rip,
        at::CODE + 0x100,
        "RIP of the execution breakpoint, a fault"
    );
    ensure_eq!(
        m.vcpu.debugregs()?.dr6 & 1,
        1,
        "DR6 after the execution breakpoint"
    );
    Ok(())
}

/// Gives the 4 KiB pages at 4 MiB tables of their own; entry `i` is at 0x30000 + 8 * i.
fn small_pages(m: &Machine) {
    m.mem
        .write(usize_of(at::PD) + 2 * 8, 0x30000 | pte::P | pte::W | pte::U);
}

/// Moves the vCPU to privilege level 3.
fn enter_user(m: &Machine, rip: u64) -> Outcome {
    m.patch_sregs(|s| {
        s.cs = selftests::guest::segment(sel::USER_CODE64, 11, 0, 1, 3, true);
        let data = selftests::guest::segment(sel::USER_DATA, 3, 1, 0, 3, true);
        (s.ss, s.ds, s.es) = (data, data, data);
    })?;
    m.patch_regs(|r| {
        r.rip = rip;
        r.rsp = at::STACK - 0x2000;
    })?;
    Ok(())
}

fn page_fault_not_present(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov ebx, 0x402123",
        "mov al, [rbx]",
        "mov [rbx + 0x1000], al",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    small_pages(&m);
    let r = fault(&m, 14, 0, 5)?;
    ensure_eq!(r.cr2, 0x40_2123, "CR2 of the read");
    ensure_eq!(m.vcpu.sregs()?.cr2, 0x40_2123, "CR2 for the host");
    m.mem.write(0x30010, 0x40000 | pte::P);
    m.mem.write(0x40123, 0x5au8);
    let r = fault(&m, 14, PF_W, 7)?;
    ensure_eq!(r.cr2, 0x40_3123, "CR2 of the write");
    m.mem.write(0x30018, 0x41000 | pte::P | pte::W);
    m.expect_hlt()?;
    ensure_eq!(
        m.mem.read::<u8>(0x41123),
        0x5a,
        "the byte that was copied in the end"
    );
    Ok(())
}

fn page_fault_protection(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov ebx, 0x402000",
        "mov al, [rbx]",
        "mov [rbx], al", // offset 7: read-only
        "mov eax, 0x403000",
        "jmp rax", // no-execute
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    small_pages(&m);
    m.mem.write(0x30010, 0x40000 | pte::P);
    m.mem.write(0x30018, 0x41000 | pte::P | pte::W | pte::NX);
    let r = fault(&m, 14, PF_P | PF_W, 7)?;
    ensure_eq!(r.cr2, 0x40_2000, "CR2 of the write");
    m.resume_at(at::CODE + 9);
    let r = m.expect_exception(14)?;
    ensure_eq!(
        (r.error, r.cr2, r.rip),
        (PF_P | PF_I, 0x40_3000, 0x40_3000),
        "fetch of NX"
    );
    m.resume_at(at::CODE + code().len() as u64 - 1);
    m.expect_hlt()
}

/// Without CR0.WP, the supervisor writes to read-only pages.
fn write_protect_off(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov ebx, 0x402000",
        "mov byte ptr [rbx], 7",
        "hlt"
    );
    let m = Machine::new(env, Mode::Long, code())?;
    small_pages(&m);
    m.mem.write(0x30010, 0x40000 | pte::P);
    m.patch_sregs(|s| s.cr0 &= !cr::WP)?;
    m.expect_hlt()?;
    ensure_eq!(m.mem.read::<u8>(0x40000), 7, "the byte");
    Ok(())
}

fn page_fault_user(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov ebx, 0x402000",
        "mov al, [rbx]",          // offset 5: supervisor page
        "mov [rbx + 0x1000], al", // offset 7: read-only user page
        "mov al, [rbx + 0x2000]", // offset 13: absent
        "cli",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    small_pages(&m);
    m.mem.write(0x30010, 0x40000 | pte::P | pte::W);
    m.mem.write(0x30018, 0x41000 | pte::P | pte::U);
    enter_user(&m, at::CODE)?;
    let r = fault(&m, 14, PF_P | PF_U, 5)?;
    ensure_eq!((r.cr2, r.cs & 3), (0x40_2000, 3), "CR2 and privilege");
    m.resume_at(at::CODE + 7);
    fault(&m, 14, PF_P | PF_W | PF_U, 7)?;
    m.resume_at(at::CODE + 13);
    fault(&m, 14, PF_U, 13)?;
    m.resume_at(at::CODE + 19);
    fault(&m, 13, 0, 19)?; // CLI at privilege level 3
    m.resume_at(at::CODE + 20);
    fault(&m, 13, 0, 20)?; // and HLT
    Ok(())
}

/// Privileged instructions at level 3 are #GP in the guest, though the hypervisor intercepts them.
fn privileged_user(env: &Env) -> Outcome {
    let instructions: [(&str, &[u8]); 14] = [
        ("hlt", &[0xf4]),
        ("out", &[0xe6, 0x80]),
        ("in", &[0xe4, 0x80]),
        ("outsb", &[0x6e]),
        ("rdmsr", &[0x0f, 0x32]),
        ("wrmsr", &[0x0f, 0x30]),
        ("mov rax, cr0", &[0x0f, 0x20, 0xc0]),
        ("mov cr3, rax", &[0x0f, 0x22, 0xd8]),
        ("mov cr8, rax", &[0x44, 0x0f, 0x22, 0xc0]),
        ("mov rax, dr7", &[0x0f, 0x21, 0xf8]),
        ("clts", &[0x0f, 0x06]),
        ("invlpg", &[0x0f, 0x01, 0x3b]),
        ("wbinvd", &[0x0f, 0x09]),
        ("lmsw ax", &[0x0f, 0x01, 0xf0]),
    ];
    for (name, bytes) in instructions {
        let m = Machine::new(env, Mode::Long, bytes)?;
        enter_user(&m, at::CODE)?;
        m.expect_out(PORT_EXCEPTION)
            .map_err(|e| Verdict::Fail(format!("{name} at level 3: {e:?}")))?;
        let r = m.record();
        let got = (r.vector, r.error, r.rip, r.cs & 3);
        ensure_eq!(
            got,
            (13, 0, at::CODE, 3),
            "{name} at level 3: vector, error, RIP, CPL"
        );
    }
    Ok(())
}

/// Virtualization instructions are undefined to a guest that has not enabled them.
fn vmx_undefined(env: &Env) -> Outcome {
    let instructions: [(&str, &[u8]); 6] = [
        ("vmxon", &[0xf3, 0x0f, 0xc7, 0x33]),
        ("vmxoff", &[0x0f, 0x01, 0xc4]),
        ("vmlaunch", &[0x0f, 0x01, 0xc2]),
        ("vmread", &[0x0f, 0x78, 0xd8]),
        ("vmclear", &[0x66, 0x0f, 0xc7, 0x33]),
        ("invept", &[0x66, 0x0f, 0x38, 0x80, 0x03]),
    ];
    for (name, bytes) in instructions {
        let m = Machine::new(env, Mode::Long, bytes)?;
        m.patch_regs(|r| r.rbx = at::DATA)?;
        m.expect_out(PORT_EXCEPTION)
            .map_err(|e| Verdict::Fail(format!("{name}: {e:?}")))?;
        let r = m.record();
        ensure_eq!((r.vector, r.rip), (6, at::CODE), "{name}: vector and RIP");
    }
    Ok(())
}

fn protected_mode(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "xor ecx, ecx",
        "div ecx",
        "ud2",
        "int3",
        "mov eax, [0x500000]",
        "hlt",
    );
    for mode in [Mode::Protected, Mode::Paging32, Mode::Pae] {
        let m = Machine::new(env, mode, code())?;
        fault(&m, 0, 0, 2)?;
        m.resume_at(at::CODE + 4);
        fault(&m, 6, 0, 4)?;
        m.resume_at(at::CODE + 6);
        fault(&m, 3, 0, 7)?;
        m.resume_at(0);
        match mode {
            Mode::Paging32 => m.mem.write(usize_of(at::PD32) + 4, 0u32),
            Mode::Pae => m.mem.write(usize_of(at::PD) + 2 * 8, 0u64),
            _ => {
                m.expect(&Exit::MmioRead {
                    addr: 0x50_0000,
                    len: 4,
                })?;
                continue;
            }
        }
        let r = fault(&m, 14, 0, 7)?;
        ensure_eq!(r.cr2, 0x50_0000, "CR2 in {mode:?}");
    }
    Ok(())
}

fn real_mode(env: &Env) -> Outcome {
    guest_code!(code, ".code16", "xor cx, cx", "div cx", "hlt");
    guest_code!(handler, ".code16", "pop bx", "out {P}, al", "hlt"; P = PORT);
    let m = Machine::new(env, Mode::Real, code())?;
    m.mem.write(0, 0xa000u16);
    m.mem.write(2, 0u16);
    m.mem.write_bytes(0xa000, handler());
    m.patch_regs(|r| r.rsp = 0x4000)?;
    m.expect(&Exit::Out {
        port: PORT,
        size: 1,
        data: vec![0],
    })?;
    let r = m.vcpu.regs()?;
    ensure_eq!(
        (r.rbx & 0xffff, r.rsp & 0xffff),
        (at::CODE + 2, 0x3ffc),
        "saved IP, SP"
    );
    Ok(())
}

/// An exception whose delivery faults: double fault, with error code 0.
fn double_fault(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "xor ecx, ecx", "div ecx", "hlt");
    let m = Machine::new(env, Mode::Long, code())?;
    let gate = usize_of(at::IDT);
    m.mem.write(gate, m.mem.read::<u64>(gate) & !(1 << 47)); // vector 0 not present
    let r = m.expect_exception(8)?;
    ensure_eq!((r.error, r.rip), (0, at::CODE + 2), "error code and RIP");
    Ok(())
}

/// A page fault on the way to the handler of a page fault is a double fault too.
fn double_page_fault(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov rsp, 0x402000",
        "mov al, [0x403000]",
        "hlt"
    );
    let m = Machine::new(env, Mode::Long, code())?;
    small_pages(&m);
    // The handler of #DF gets a stack of its own.
    m.mem.write(usize_of(at::TSS) + 36, at::STACK - 0x100);
    set_gate(&m.mem, 8, at::STUBS + 8 * 16, sel::CODE64, true);
    let gate = usize_of(at::IDT) + 8 * 16;
    m.mem.write(gate, m.mem.read::<u64>(gate) | (1 << 32));
    let r = m.expect_exception(8)?;
    ensure_eq!(
        (r.error, r.cr2),
        (0, 0x40_1ff8),
        "error code, and CR2 of the second fault"
    );
    Ok(())
}

fn triple_fault(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "ud2", "hlt");
    let m = Machine::new(env, Mode::Long, code())?;
    m.patch_sregs(|s| s.idt.limit = 0)?;
    m.expect(&Exit::Shutdown)
}

fn triple_fault_modes(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "ud2", "hlt");
    for mode in [Mode::Real, Mode::Protected, Mode::Paging32, Mode::Pae] {
        let m = Machine::new(env, mode, code())?;
        m.patch_sregs(|s| s.idt.limit = 0)?;
        m.expect(&Exit::Shutdown)?;
    }
    Ok(())
}

/// A VM that shut down does no harm to another, and its vCPU can be started again.
fn after_shutdown(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "ud2", "hlt");
    let m = Machine::new(env, Mode::Long, code())?;
    let other = Machine::new(env, Mode::Long, code())?;
    m.patch_sregs(|s| s.idt.limit = 0)?;
    m.expect(&Exit::Shutdown)?;
    fault(&other, 6, 0, 0)?;
    guest_code!(halt, ".code64", "mov eax, 0x77", "hlt");
    m.start(Mode::Long, halt())?;
    m.expect_hlt()?;
    ensure_eq!(
        m.vcpu.regs()?.rax,
        0x77,
        "RAX of the guest after its restart"
    );
    Ok(())
}

/// The host page of the stack, of the table or of the handler is not mapped yet when an exception is
/// delivered: the delivery is repeated, not lost and not doubled.
fn delivery_through_new_pages(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "2: ud2",
        "out {P}, al",
        "int 0x55",
        "out {P}, al",
        "jmp 2b";
        P = PORT,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    for round in 0..8u64 {
        // New host pages for all that the delivery reads and writes: same contents, other pages.
        for page in [
            at::IDT,
            at::STUBS,
            at::COMMON,
            at::RECORD,
            at::GDT,
            at::STACK - 0x1000,
        ] {
            let offset = usize_of(page);
            let copy = m.mem.read_bytes(offset, 0x1000);
            m.mem.advise(offset, 0x1000, libc::MADV_DONTNEED)?;
            m.mem.write_bytes(offset, &copy);
        }
        fault(&m, 6, 0, 0)?;
        ensure_eq!(m.record().count, round * 2 + 1, "exceptions so far");
        m.resume_at(at::CODE + 2);
        m.expect(&Exit::Out {
            port: PORT,
            size: 1,
            data: vec![0],
        })?;
        m.resume_at(0);
        let stack = usize_of(at::STACK - 0x1000);
        let copy = m.mem.read_bytes(stack, 0x1000);
        m.mem.advise(stack, 0x1000, libc::MADV_DONTNEED)?;
        m.mem.write_bytes(stack, &copy);
        fault(&m, 0x55, 0, 6)?;
        ensure_eq!(m.record().count, round * 2 + 2, "exceptions so far");
        m.expect(&Exit::Out {
            port: PORT,
            size: 1,
            data: vec![0],
        })?;
    }
    Ok(())
}

/// Exceptions that the host injects through KVM_SET_VCPU_EVENTS arrive with their error code.
fn injected_by_host(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "hlt");
    for (vector, error) in [(14u8, Some(PF_W)), (13, Some(0x50)), (6, None), (0, None)] {
        let m = Machine::new(env, Mode::Long, code())?;
        m.patch_sregs(|s| s.cr2 = 0x1234_5678)?;
        let mut e = m.vcpu.events()?;
        e.exception.injected = 1;
        e.exception.nr = vector;
        e.exception.has_error_code = u8::from(error.is_some());
        e.exception.error_code = u32::try_from(error.unwrap_or(0)).unwrap_or(0);
        m.vcpu.set_events(&e)?;
        let r = fault(&m, vector, error.unwrap_or(0), 0)?;
        ensure_eq!(r.cr2, 0x1234_5678, "CR2");
        ensure_eq!(
            m.vcpu.events()?.exception.injected,
            0,
            "injected after the delivery"
        );
        m.expect_hlt()?;
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "exceptions",
        tests![
            divide,
            undefined,
            breakpoint,
            software_interrupt,
            general_protection,
            stack,
            not_present,
            device_not_available,
            alignment_check,
            single_step,
            single_step_over_exits,
            hardware_breakpoint,
            page_fault_not_present,
            page_fault_protection,
            write_protect_off,
            page_fault_user,
            privileged_user,
            vmx_undefined,
            protected_mode,
            real_mode,
            double_fault,
            double_page_fault,
            triple_fault,
            triple_fault_modes,
            after_shutdown,
            delivery_through_new_pages,
            injected_by_host,
        ],
    )
}
