// SPDX-License-Identifier: GPL-2.0

//! The guest's registers and the code at RIP, for people.

use std::fmt::Write;

use kvm_bindings::kvm_dtable;
use kvm_bindings::kvm_segment;
use kvm_bindings::kvm_sregs;
use kvm_ioctls::VcpuFd;
use vm_memory::Bytes;
use vm_memory::GuestAddress;

use crate::memory::Memory;

const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const PTE_PRESENT: u64 = 1;
const PTE_LARGE: u64 = 1 << 7;
const PTE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bytes of code to show.
const CODE_BYTES: u64 = 24;

/// Returns the vCPU's state as lines of text.
pub fn registers(vcpu: &VcpuFd, memory: &Memory) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write_registers(&mut text, vcpu, memory);
    text
}

fn write_registers(out: &mut String, vcpu: &VcpuFd, memory: &Memory) -> std::fmt::Result {
    let (regs, sregs) = match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => (regs, sregs),
        (Err(err), _) => return writeln!(out, "no registers: KVM_GET_REGS: {err}"),
        (_, Err(err)) => return writeln!(out, "no registers: KVM_GET_SREGS: {err}"),
    };
    let rows = [
        [
            ("RAX", regs.rax),
            ("RBX", regs.rbx),
            ("RCX", regs.rcx),
            ("RDX", regs.rdx),
        ],
        [
            ("RSI", regs.rsi),
            ("RDI", regs.rdi),
            ("RBP", regs.rbp),
            ("RSP", regs.rsp),
        ],
        [
            ("R8 ", regs.r8),
            ("R9 ", regs.r9),
            ("R10", regs.r10),
            ("R11", regs.r11),
        ],
        [
            ("R12", regs.r12),
            ("R13", regs.r13),
            ("R14", regs.r14),
            ("R15", regs.r15),
        ],
        [
            ("RIP", regs.rip),
            ("RFL", regs.rflags),
            ("CR0", sregs.cr0),
            ("CR2", sregs.cr2),
        ],
        [
            ("CR3", sregs.cr3),
            ("CR4", sregs.cr4),
            ("CR8", sregs.cr8),
            ("EFE", sregs.efer),
        ],
    ];
    for row in rows {
        for (name, value) in row {
            write!(out, "{name} {value:016x}  ")?;
        }
        writeln!(out)?;
    }
    for (name, segment) in [
        ("CS ", &sregs.cs),
        ("DS ", &sregs.ds),
        ("ES ", &sregs.es),
        ("FS ", &sregs.fs),
        ("GS ", &sregs.gs),
        ("SS ", &sregs.ss),
        ("TR ", &sregs.tr),
        ("LDT", &sregs.ldt),
    ] {
        write_segment(out, name, segment)?;
    }
    for (name, table) in [("GDT", &sregs.gdt), ("IDT", &sregs.idt)] {
        write_table(out, name, table)?;
    }
    write_code(out, regs.rip, &sregs, memory)
}

fn write_segment(out: &mut String, name: &str, segment: &kvm_segment) -> std::fmt::Result {
    writeln!(
        out,
        "{name} {:04x} base {:016x} limit {:08x} type {:x} s {} dpl {} p {} l {} db {} g {}{}",
        segment.selector,
        segment.base,
        segment.limit,
        segment.type_,
        segment.s,
        segment.dpl,
        segment.present,
        segment.l,
        segment.db,
        segment.g,
        if segment.unusable != 0 {
            " unusable"
        } else {
            ""
        }
    )
}

fn write_table(out: &mut String, name: &str, table: &kvm_dtable) -> std::fmt::Result {
    writeln!(
        out,
        "{name}      base {:016x} limit {:04x}",
        table.base, table.limit
    )
}

fn write_code(out: &mut String, rip: u64, sregs: &kvm_sregs, memory: &Memory) -> std::fmt::Result {
    let linear = if sregs.efer & EFER_LMA != 0 && sregs.cs.l != 0 {
        rip
    } else {
        sregs.cs.base.wrapping_add(rip) & 0xffff_ffff
    };
    write!(out, "code at {linear:#x}:")?;
    for i in 0..CODE_BYTES {
        let byte = translate(linear.wrapping_add(i), sregs, memory)
            .and_then(|at| memory.read_obj::<u8>(GuestAddress(at)).ok());
        match byte {
            Some(byte) => write!(out, " {byte:02x}")?,
            None => {
                write!(out, " (not mapped, or paging not walked in this mode)")?;
                break;
            }
        }
    }
    writeln!(out)
}

/// Translates a linear address without paging or with that of 64-bit mode; `None` if it does not
/// translate.
fn translate(linear: u64, sregs: &kvm_sregs, memory: &Memory) -> Option<u64> {
    if sregs.cr0 & CR0_PG == 0 {
        return Some(linear);
    }
    if sregs.efer & EFER_LMA == 0 {
        return None;
    }
    let levels = if sregs.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
    let mut table = sregs.cr3 & PTE_ADDRESS;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let index = (linear >> shift) & 0x1ff;
        let entry: u64 = memory.read_obj(GuestAddress(table + 8 * index)).ok()?;
        if entry & PTE_PRESENT == 0 {
            return None;
        }
        let large = level > 0 && level < 3 && entry & PTE_LARGE != 0;
        if level == 0 || large {
            let offset = (1u64 << shift) - 1;
            return Some(entry & PTE_ADDRESS & !offset | linear & offset);
        }
        table = entry & PTE_ADDRESS;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn walks_long_mode_paging() {
        let memory = memory::allocate(1 << 20).unwrap();
        let put = |at: u64, entry: u64| memory.write_obj(entry, GuestAddress(at)).unwrap();
        put(0x1000 + 8 * 511, 0x2003);
        put(0x2000 + 8 * 510, 0x3003);
        put(0x3000, 0x20_0083);
        put(0x3000 + 8, 0x4003);
        put(0x4000 + 8 * 3, 0x8000_0000_0001_2003);
        let sregs = kvm_sregs {
            cr0: CR0_PG,
            cr3: 0x1000,
            efer: EFER_LMA,
            ..Default::default()
        };
        let at = |linear| translate(linear, &sregs, &memory);
        assert_eq!(at(0xffff_ffff_8000_1234), Some(0x20_1234));
        assert_eq!(at(0xffff_ffff_8020_3456), Some(0x1_2456));
        assert_eq!(at(0xffff_ffff_8020_4000), None);
        assert_eq!(at(0), None);
    }

    #[test]
    fn no_paging_is_the_identity() {
        let memory = memory::allocate(1 << 20).unwrap();
        assert_eq!(
            translate(0x1234, &kvm_sregs::default(), &memory),
            Some(0x1234)
        );
    }
}
