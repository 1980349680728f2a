// SPDX-License-Identifier: GPL-2.0

//! System instructions whose memory is a device's: tables, selectors, far pointers, stacks.
//!
//! Which of them a module emulates is not part of the API. The in-tree KVM leaves some to the VMM (KVM_INTERNAL_ERROR_EMULATION),
//! which skips the test.

use selftests::guest::{at, sel, usize_of};
use selftests::machine::{cr, Exit, Machine, Mode};
use selftests::{ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

const M: u64 = at::MMIO;
const D: u64 = at::DATA;

/// The in-tree KVM repeats these instructions for ever, or a part of one with each read of the device.
fn only_elsewhere(env: &Env) -> Outcome {
    if env.device == "/dev/kvm" {
        skip!("KVM does not get through it");
    }
    Ok(())
}

/// A device that is memory: a page of it, and the next.
struct Device(Vec<u8>);

impl Device {
    fn new() -> Self {
        Device(vec![0; 0x2000])
    }

    fn put(mut self, at: usize, data: &[u8]) -> Self {
        self.0[at..at + data.len()].copy_from_slice(data);
        self
    }

    fn number(&self, at: usize, n: usize) -> u64 {
        let bytes = &self.0[at..at + n];
        bytes.iter().rev().fold(0, |v, b| (v << 8) | u64::from(*b))
    }

    /// Serves the guest up to its HLT.
    fn serve(&mut self, env: &Env, m: &Machine) -> Outcome {
        for _ in 0..100 {
            match m.run()? {
                Exit::MmioRead { addr, len } => {
                    let at = usize_of(addr - M);
                    m.mmio_reply(&self.0[at..at + len as usize]);
                }
                Exit::MmioWrite { addr, data } => {
                    let at = usize_of(addr - M);
                    self.0[at..at + data.len()].copy_from_slice(&data);
                }
                Exit::Hlt => return Ok(()),
                Exit::Internal { suberror: 1, .. } if env.device == "/dev/kvm" => {
                    skip!("not emulated: {}", m.describe());
                }
                other => fail!("exit {other:x?}\n{}", m.describe()),
            }
        }
        fail!("100 exits and no end\n{}", m.describe())
    }
}

fn machine(env: &Env, mode: Mode, code: &[u8]) -> Result<Machine, Verdict> {
    let m = Machine::new(env, mode, code)?;
    m.patch_regs(|r| r.rbx = M)?;
    Ok(m)
}

/// SGDT and SIDT: the limit and the base, of as many bytes as the mode has.
fn store_tables(env: &Env) -> Outcome {
    only_elsewhere(env)?;
    guest_code!(code64, ".code64", "sgdt [rbx]", "sidt [rbx + 0x20]", "hlt");
    guest_code!(code32, ".code32", "sgdt [ebx]", "sidt [ebx + 0x20]", "hlt");
    for (mode, code, base, idt_limit) in [
        (Mode::Long, code64(), 8, 0xfff),
        (Mode::Protected, code32(), 4, 0x7ff),
    ] {
        let m = machine(env, mode, code)?;
        let mut d = Device::new().put(0, &[0xee; 0x40]);
        d.serve(env, &m)?;
        ensure_eq!(d.number(0, 2), 10 * 8 - 1, "limit of the GDT, {mode:?}");
        ensure_eq!(d.number(2, base), at::GDT, "base of the GDT, {mode:?}");
        ensure_eq!(d.number(0x20, 2), idt_limit, "limit of the IDT, {mode:?}");
        ensure_eq!(d.number(0x22, base), at::IDT, "base of the IDT, {mode:?}");
        ensure_eq!(d.0[2 + base], 0xee, "byte after, {mode:?}");
    }
    Ok(())
}

/// LGDT and LIDT.
fn load_tables(env: &Env) -> Outcome {
    only_elsewhere(env)?;
    guest_code!(code64, ".code64", "lgdt [rbx]", "lidt [rbx + 0x20]", "hlt");
    guest_code!(code32, ".code32", "lgdt [ebx]", "lidt [ebx + 0x20]", "hlt");
    guest_code!(
        code16,
        ".code32",
        "data16 lgdt [ebx]",
        "data16 lidt [ebx + 0x20]",
        "hlt"
    );
    const BASE: u64 = 0x0000_7a11_2233_4400;
    for (mode, code, mask) in [
        (Mode::Long, code64(), u64::MAX),
        (Mode::Protected, code32(), 0xffff_ffff),
        (Mode::Protected, code16(), 0xff_ffff),
    ] {
        let m = machine(env, mode, code)?;
        let base = BASE.to_le_bytes();
        let mut d = Device::new()
            .put(0, &[0x57, 0])
            .put(2, &base)
            .put(0x20, &[0xff, 3])
            .put(0x22, &base);
        d.serve(env, &m)?;
        let s = m.vcpu.sregs()?;
        ensure_eq!((s.gdt.limit, s.gdt.base), (0x57, BASE & mask), "GDTR");
        ensure_eq!((s.idt.limit, s.idt.base), (0x3ff, BASE & mask), "IDTR");
    }
    Ok(())
}

/// MOV to segment registers, and the fault of one.
fn selectors(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov es, [rbx]",
        "mov fs, [rbx + 2]",
        "mov ss, [rbx + 4]",
        "mov [rbx + 8], es",
        "hlt",
    );
    let m = machine(env, Mode::Long, code())?;
    let mut d = Device::new().put(0, &[sel::DATA16 as u8, 0, 0, 0, sel::DATA as u8, 0]);
    d.serve(env, &m)?;
    let s = m.vcpu.sregs()?;
    ensure_eq!((s.es.selector, s.es.limit), (sel::DATA16, 0xffff), "ES");
    ensure_eq!((s.fs.selector, s.fs.unusable), (0, 1), "FS");
    ensure_eq!(s.ss.selector, sel::DATA, "SS");
    ensure_eq!(d.number(8, 2), sel::DATA16.into(), "ES in the device");

    let m = machine(env, Mode::Long, code())?;
    let mut d = Device::new().put(0, &[0xf9, 0x0f]);
    let Err(Verdict::Fail(_)) = d.serve(env, &m) else {
        fail!("no exception of a selector beyond the table");
    };
    ensure_eq!(
        (m.record().vector, m.record().error),
        (13, 0xff8),
        "exception"
    );
    Ok(())
}

/// A table on a device: what loads a segment reads the descriptor there.
fn table_on_device(env: &Env) -> Outcome {
    only_elsewhere(env)?;
    guest_code!(code, ".code32", "mov eax, 0x10", "mov es, eax", "hlt");
    let m = machine(env, Mode::Protected, code())?;
    let gdt: [u8; 80] = m.mem.read(usize_of(at::GDT));
    m.patch_sregs(|s| s.gdt.base = M)?;
    // With a base of its own, and not accessed.
    let mut d = Device::new().put(0, &gdt).put(0x12, &[0, 0x50, 0, 0x92]);
    d.serve(env, &m)?;
    let s = m.vcpu.sregs()?;
    ensure_eq!((s.es.selector, s.es.base), (0x10, 0x5000), "ES");
    ensure_eq!(d.0[0x15], 0x93, "accessed bit on the device");
    Ok(())
}

/// LMSW and SMSW.
fn machine_status(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "smsw [ebx + 4]",
        "lmsw [ebx]",
        "smsw [ebx + 8]",
        "hlt"
    );
    let m = machine(env, Mode::Protected, code())?;
    // PE cannot be cleared.
    let mut d = Device::new().put(0, &[0xa, 0xff]).put(4, &[0; 8]);
    d.serve(env, &m)?;
    let s = m.vcpu.sregs()?;
    ensure_eq!(s.cr0 & 0xf, cr::TS | cr::MP | cr::PE, "CR0");
    ensure_eq!(d.number(4, 4) & 0xf, cr::MP | cr::PE, "SMSW before");
    ensure_eq!(d.number(8, 4) & 0xf, cr::TS | cr::MP | cr::PE, "SMSW after");
    ensure_eq!(d.number(6, 2), 0, "SMSW writes 16 bits");
    Ok(())
}

/// SLDT and STR.
fn system_selectors(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "sldt [rbx]", "str [rbx + 8]", "hlt");
    let m = machine(env, Mode::Long, code())?;
    let mut d = Device::new().put(0, &[0xee; 16]);
    d.serve(env, &m)?;
    ensure_eq!(d.number(0, 4), 0xeeee_0000, "LDTR");
    ensure_eq!(d.number(8, 4), 0xeeee_0000 | u64::from(sel::TSS), "TR");
    Ok(())
}

/// JMP and CALL by a far pointer, and RET.
fn far_pointers(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "call fword ptr [ebx]",
        "jmp fword ptr [ebx + 8]",
        "hlt",
    );
    guest_code!(called, ".code32", "mov [{D}], esp", "mov ecx, [esp + 4]", "retf"; D = D);
    guest_code!(ended, ".code32", "mov edx, 0x77", "hlt");
    let m = machine(env, Mode::Protected, code())?;
    m.mem.write_bytes(0x2000, called());
    m.mem.write_bytes(0x2800, ended());
    let cs = sel::CODE32 as u8;
    let mut d = Device::new()
        .put(0, &[0, 0x20, 0, 0, cs, 0])
        .put(8, &[0, 0x28, 0, 0, cs, 0]);
    d.serve(env, &m)?;
    let r = m.vcpu.regs()?;
    ensure_eq!(
        u64::from(m.mem.read::<u32>(usize_of(D))),
        at::STACK - 8,
        "ESP in the callee"
    );
    ensure_eq!(r.rcx, sel::CODE32.into(), "CS on the stack");
    ensure_eq!((r.rdx, r.rsp), (0x77, at::STACK), "after JMP");
    Ok(())
}

/// From 64-bit code to compatibility mode and back.
fn far_between_modes(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "jmp fword ptr [rbx]", "hlt");
    guest_code!(
        narrow,
        ".code32",
        "mov eax, 0xffffffff",
        "inc eax",
        "jmp fword ptr [ebx + 8]",
    );
    guest_code!(wide, ".code64", "mov rdx, 0x123456789", "hlt");
    let m = machine(env, Mode::Long, code())?;
    m.mem.write_bytes(0x2000, narrow());
    m.mem.write_bytes(0x2800, wide());
    let mut d = Device::new()
        .put(0, &[0, 0x20, 0, 0, sel::CODE32 as u8, 0])
        .put(8, &[0, 0x28, 0, 0, sel::CODE64 as u8, 0]);
    d.serve(env, &m)?;
    let r = m.vcpu.regs()?;
    ensure_eq!((r.rax, r.rdx), (0, 0x1_2345_6789), "registers");
    ensure_eq!(m.vcpu.sregs()?.cs.selector, sel::CODE64, "CS");
    Ok(())
}

/// LES and LSS.
fn load_far(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "les ecx, [ebx]",
        "lfs edx, [ebx + 8]",
        "lss esp, [ebx + 16]",
        "hlt",
    );
    let m = machine(env, Mode::Protected, code())?;
    let mut d = Device::new()
        .put(0, &[1, 2, 3, 4, sel::DATA16 as u8, 0])
        .put(8, &[5, 6, 7, 8, 0, 0])
        .put(16, &[0, 0xf0, 0, 0, sel::DATA as u8, 0]);
    d.serve(env, &m)?;
    let (r, s) = (m.vcpu.regs()?, m.vcpu.sregs()?);
    ensure_eq!(
        (r.rcx, r.rdx, r.rsp),
        (0x0403_0201, 0x0807_0605, 0xf000),
        "offsets"
    );
    ensure_eq!(
        (s.es.selector, s.fs.selector),
        (sel::DATA16, 0),
        "selectors"
    );
    Ok(())
}

/// VERR, VERW, LAR, LSL.
fn questions(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "verr word ptr [rbx]",
        "setz al",
        "verw word ptr [rbx]",
        "setz ah",
        "lar ecx, word ptr [rbx]",
        "lsl edx, word ptr [rbx + 2]",
        "hlt",
    );
    let m = machine(env, Mode::Long, code())?;
    let mut d = Device::new().put(0, &[sel::CODE32 as u8, 0, sel::DATA16 as u8, 0]);
    d.serve(env, &m)?;
    let r = m.vcpu.regs()?;
    ensure_eq!(r.rax & 0xffff, 1, "code can be read and not written");
    ensure_eq!((r.rcx, r.rdx), (0x00cf_9b00, 0xffff), "LAR and LSL");
    Ok(())
}

/// A stack on a device: PUSH, POP and IRET of real mode.
fn real_stack(env: &Env) -> Outcome {
    only_elsewhere(env)?;
    guest_code!(
        code,
        ".code16",
        "mov sp, 0x100",
        "pushf",
        "push cs",
        "push 0x2000",
        "iret",
    );
    guest_code!(end, ".code16", "mov cx, sp", "push ds", "pop es", "hlt");
    let m = Machine::new(env, Mode::Real, code())?;
    m.mem.write_bytes(0x2000, end());
    m.patch_sregs(|s| {
        s.ss.base = M;
        s.es.selector = 0x55;
        s.es.base = 0x550;
    })?;
    let mut d = Device::new();
    d.serve(env, &m)?;
    let (r, s) = (m.vcpu.regs()?, m.vcpu.sregs()?);
    ensure_eq!((r.rcx & 0xffff, r.rsp & 0xffff), (0x100, 0x100), "SP");
    ensure_eq!(d.number(0xfa, 2), 0x2000, "IP on the stack");
    ensure_eq!((s.es.selector, s.es.base), (0, 0), "ES");
    Ok(())
}

/// IRET and far RET of protected mode from a stack on a device.
fn protected_stack(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "mov esp, ebx", "iretd", "hlt");
    guest_code!(middle, ".code32", "retf 4");
    guest_code!(end, ".code32", "pushfd", "mov ecx, esp", "hlt");
    let m = machine(env, Mode::Protected, code())?;
    m.mem.write_bytes(0x2000, middle());
    m.mem.write_bytes(0x2800, end());
    let cs = sel::CODE32 as u8;
    let mut d = Device::new()
        .put(0, &[0, 0x20, 0, 0, cs, 0, 0, 0, 0x47, 4, 0, 0])
        .put(12, &[0, 0x28, 0, 0, cs, 0, 0, 0]);
    d.serve(env, &m)?;
    ensure_eq!(m.vcpu.regs()?.rcx, M + 20, "ESP");
    ensure_eq!(d.number(20, 4), 0x447, "flags");
    Ok(())
}

/// IRET of 64-bit mode to itself, with all five of its words on a device.
fn long_stack(env: &Env) -> Outcome {
    guest_code!(code, ".code64", "mov rsp, rbx", "iretq", "hlt");
    guest_code!(end, ".code64", "mov rcx, rsp", "hlt");
    let m = machine(env, Mode::Long, code())?;
    m.mem.write_bytes(0x2000, end());
    let words = [
        0x2000,
        u64::from(sel::CODE64),
        0x46,
        0x1f000,
        sel::DATA.into(),
    ];
    let mut d = Device::new();
    for (i, word) in words.iter().enumerate() {
        d = d.put(i * 8, &word.to_le_bytes());
    }
    d.serve(env, &m)?;
    let r = m.vcpu.regs()?;
    ensure_eq!((r.rcx, r.rflags & 0xff), (0x1f000, 0x46), "RSP and flags");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "mmio_system",
        tests![
            store_tables,
            load_tables,
            selectors,
            table_on_device,
            machine_status,
            system_selectors,
            far_pointers,
            far_between_modes,
            load_far,
            questions,
            real_stack,
            protected_stack,
            long_stack,
        ],
    )
}
