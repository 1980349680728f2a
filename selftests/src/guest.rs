// SPDX-License-Identifier: GPL-2.0

//! What lies inside a guest: where things are, tables, code that the compiler's assembler made.

use crate::mem::Mapping;
use kvm_bindings as kb;

/// Guest-physical (and, as paging is the identity, linear) addresses of a test guest.
pub mod at {
    /// The test's code; 16 KiB.
    pub const CODE: u64 = 0x1000;
    /// The global descriptor table.
    pub const GDT: u64 = 0x5000;
    /// The interrupt descriptor table.
    pub const IDT: u64 = 0x6000;
    /// One stub of 16 bytes for each vector.
    pub const STUBS: u64 = 0x7000;
    /// What the stubs jump to.
    pub const COMMON: u64 = 0x8000;
    /// What the handler writes: [`super::Record`].
    pub const RECORD: u64 = 0x9000;
    /// Free for the test; 24 KiB.
    pub const DATA: u64 = 0xa000;
    /// Long mode's tables: one page map level 4, one directory pointer table, four directories.
    pub const PML4: u64 = 0x10000;
    /// See [`PML4`].
    pub const PDPT: u64 = 0x11000;
    /// See [`PML4`].
    pub const PD: u64 = 0x12000;
    /// The page directory of 32-bit paging, 4 MiB pages.
    pub const PD32: u64 = 0x16000;
    /// The directory pointer table of PAE paging (it shares [`PD`]).
    pub const PDPT_PAE: u64 = 0x17000;
    /// The task state segment.
    pub const TSS: u64 = 0x18000;
    /// The first address above the stack; 16 KiB.
    pub const STACK: u64 = 0x20000;
    /// Free for the test up to the end of memory.
    pub const FREE: u64 = 0x20000;
    /// The usual amount of memory.
    pub const SIZE: usize = 0x20_0000;
    /// Device memory: no slot is here, all page tables map it.
    pub const MMIO: u64 = 0xd000_0000;
}

/// The port on which the exception handler reports.
pub const PORT_EXCEPTION: u16 = 0xee;
/// A port for a test's own use.
pub const PORT: u16 = 0x80;

/// Selectors of the guest's descriptor table.
pub mod sel {
    /// 64-bit code.
    pub const CODE64: u16 = 0x08;
    /// Flat data, 32 bits.
    pub const DATA: u16 = 0x10;
    /// Flat code, 32 bits.
    pub const CODE32: u16 = 0x18;
    /// Code with 16-bit defaults and a limit of 64 KiB, base 0.
    pub const CODE16: u16 = 0x20;
    /// Data with a limit of 64 KiB, base 0.
    pub const DATA16: u16 = 0x28;
    /// The task state segment; two entries in long mode.
    pub const TSS: u16 = 0x30;
    /// 64-bit code for privilege level 3.
    pub const USER_CODE64: u16 = 0x40 | 3;
    /// Data for privilege level 3.
    pub const USER_DATA: u16 = 0x48 | 3;
}

/// What the exception handler of protected and long mode writes at [`at::RECORD`].
///
/// `resume` is read by it: not 0, it is where the handler returns to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Record {
    /// The vector.
    pub vector: u64,
    /// The error code, 0 if the vector has none.
    pub error: u64,
    /// The saved instruction pointer.
    pub rip: u64,
    /// The saved code segment.
    pub cs: u64,
    /// The saved flags.
    pub rflags: u64,
    /// CR2 at the time.
    pub cr2: u64,
    /// How many exceptions came so far.
    pub count: u64,
    /// Where to return to, if not 0.
    pub resume: u64,
}

/// Defines a function that returns assembled guest code.
///
/// `$mode` is `.code16`, `.code32` or `.code64`. The code must not depend on where it lies, unless
/// it takes constants: `guest_code!(name, ".code16", "mov ax, {A}"; A = 5)`.
#[macro_export]
macro_rules! guest_code {
    ($vis:vis $name:ident, $mode:literal, $($line:expr),+ $(,)? $(; $($k:ident = $v:expr),+ $(,)?)?) => {
        #[doc = concat!("Guest code `", stringify!($name), "`.")]
        #[inline(never)]
        $vis fn $name() -> &'static [u8] {
            let start: usize;
            let end: usize;
            // SAFETY: The guest's instructions go to a section of their own and are only data here;
            // what runs are two instructions that take their addresses.
            unsafe {
                core::arch::asm!(
                    ".pushsection .rodata.guest, \"a\"",
                    ".balign 16",
                    "777770:",
                    $mode,
                    $($line,)+
                    ".code64",
                    "777771:",
                    ".popsection",
                    "lea {start}, [rip + 777770b]",
                    "lea {end}, [rip + 777771b]",
                    start = out(reg) start,
                    end = out(reg) end,
                    $($($k = const $v,)+)?
                );
                core::slice::from_raw_parts(start as *const u8, end - start)
            }
        }
    };
}

guest_code!(handler64, ".code64",
    "push rax",
    "push rbx",
    "mov ebx, {R}",
    "mov rax, [rsp + 16]",
    "mov [rbx], rax",
    "mov rax, [rsp + 24]",
    "mov [rbx + 8], rax",
    "mov rax, [rsp + 32]",
    "mov [rbx + 16], rax",
    "mov rax, [rsp + 40]",
    "mov [rbx + 24], rax",
    "mov rax, [rsp + 48]",
    "mov [rbx + 32], rax",
    "mov rax, cr2",
    "mov [rbx + 40], rax",
    "inc qword ptr [rbx + 48]",
    "out {P}, al",
    "mov rax, [rbx + 56]",
    "test rax, rax",
    "jz 2f",
    "mov [rsp + 32], rax",
    "2:",
    "pop rbx",
    "pop rax",
    "add rsp, 16",
    "iretq";
    R = at::RECORD, P = PORT_EXCEPTION,
);

guest_code!(handler32, ".code32",
    "push eax",
    "push ebx",
    "mov ebx, {R}",
    "mov eax, [esp + 8]",
    "mov [ebx], eax",
    "mov eax, [esp + 12]",
    "mov [ebx + 8], eax",
    "mov eax, [esp + 16]",
    "mov [ebx + 16], eax",
    "mov eax, [esp + 20]",
    "mov [ebx + 24], eax",
    "mov eax, [esp + 24]",
    "mov [ebx + 32], eax",
    "mov eax, cr2",
    "mov [ebx + 40], eax",
    "inc dword ptr [ebx + 48]",
    "out {P}, al",
    "mov eax, [ebx + 56]",
    "test eax, eax",
    "jz 2f",
    "mov [esp + 16], eax",
    "2:",
    "pop ebx",
    "pop eax",
    "add esp, 8",
    "iretd";
    R = at::RECORD, P = PORT_EXCEPTION,
);

/// Whether the processor pushes an error code for `vector`.
#[must_use]
pub fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

/// Writes the interrupt descriptor table, the stubs and the handler.
pub fn write_idt(mem: &Mapping, long: bool) {
    for v in 0..=255u8 {
        let stub = at::STUBS + u64::from(v) * 16;
        let mut code = Vec::new();
        if !has_error_code(v) {
            code.extend_from_slice(&[0x6a, 0]); // push 0
        }
        code.push(0x68); // push imm32
        code.extend_from_slice(&u32::from(v).to_le_bytes());
        code.push(0xe9); // jmp rel32
        let from = stub + code.len() as u64 + 4;
        code.extend_from_slice(&u32::try_from(at::COMMON - from).unwrap_or(0).to_le_bytes());
        mem.write_bytes(usize_of(stub), &code);
        set_gate(
            mem,
            v,
            stub,
            if long { sel::CODE64 } else { sel::CODE32 },
            long,
        );
    }
    mem.write_bytes(
        usize_of(at::COMMON),
        if long { handler64() } else { handler32() },
    );
}

/// Points vector `v` of the guest's IDT at `target`: an interrupt gate.
pub fn set_gate(mem: &Mapping, v: u8, target: u64, selector: u16, long: bool) {
    let low = (target & 0xffff)
        | (u64::from(selector) << 16)
        | (0x8e00 << 32)
        | (((target >> 16) & 0xffff) << 48);
    if long {
        let e = usize_of(at::IDT) + usize::from(v) * 16;
        mem.write(e, low);
        mem.write(e + 8, target >> 32);
    } else {
        mem.write(usize_of(at::IDT) + usize::from(v) * 8, low);
    }
}

/// Converts a guest address to an offset.
#[must_use]
pub fn usize_of(v: u64) -> usize {
    usize::try_from(v).unwrap_or(usize::MAX)
}

/// A segment register that matches an entry of the table that [`write_gdt`] writes.
#[must_use]
pub fn segment(selector: u16, ty: u8, db: u8, l: u8, dpl: u8, g: bool) -> kb::kvm_segment {
    kb::kvm_segment {
        base: 0,
        limit: if g { 0xffff_ffff } else { 0xffff },
        selector,
        type_: ty,
        present: 1,
        dpl,
        db,
        s: 1,
        l,
        g: u8::from(g),
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Encodes a segment as a descriptor.
#[must_use]
pub fn descriptor(s: &kb::kvm_segment) -> u64 {
    let limit = u64::from(if s.g != 0 { s.limit >> 12 } else { s.limit });
    (limit & 0xffff)
        | ((s.base & 0xff_ffff) << 16)
        | (u64::from(s.type_) << 40)
        | (u64::from(s.s) << 44)
        | (u64::from(s.dpl) << 45)
        | (u64::from(s.present) << 47)
        | (((limit >> 16) & 0xf) << 48)
        | (u64::from(s.l) << 53)
        | (u64::from(s.db) << 54)
        | (u64::from(s.g) << 55)
        | (((s.base >> 24) & 0xff) << 56)
}

/// The task register's segment (64-bit or 32-bit, busy).
#[must_use]
pub fn tss_segment() -> kb::kvm_segment {
    kb::kvm_segment {
        base: at::TSS,
        limit: 0x67,
        selector: sel::TSS,
        type_: 11,
        present: 1,
        ..Default::default()
    }
}

/// Writes the global descriptor table.
pub fn write_gdt(mem: &Mapping) {
    let table = [
        0,
        descriptor(&segment(sel::CODE64, 11, 0, 1, 0, true)),
        descriptor(&segment(sel::DATA, 3, 1, 0, 0, true)),
        descriptor(&segment(sel::CODE32, 11, 1, 0, 0, true)),
        descriptor(&segment(sel::CODE16, 11, 0, 0, 0, false)),
        descriptor(&segment(sel::DATA16, 3, 0, 0, 0, false)),
        descriptor(&tss_segment()),
        0,
        descriptor(&segment(sel::USER_CODE64, 11, 0, 1, 3, true)),
        descriptor(&segment(sel::USER_DATA, 3, 1, 0, 3, true)),
    ];
    for (i, d) in table.iter().enumerate() {
        mem.write(usize_of(at::GDT) + i * 8, *d);
    }
    // The stack that an interrupt from privilege level 3 switches to: RSP0, and ESP0 with SS0.
    mem.write(usize_of(at::TSS) + 4, at::STACK - 0x1000);
    mem.write(usize_of(at::TSS) + 102, 0x68u16);
}

/// Page-table bits.
pub mod pte {
    /// Present.
    pub const P: u64 = 1;
    /// Writable.
    pub const W: u64 = 2;
    /// For privilege level 3 too.
    pub const U: u64 = 4;
    /// A large page.
    pub const PS: u64 = 0x80;
    /// No execution.
    pub const NX: u64 = 1 << 63;
}

/// Writes the page tables of all modes: the identity for 4 GiB, by large pages.
pub fn write_page_tables(mem: &Mapping) {
    let table = pte::P | pte::W | pte::U;
    mem.write(usize_of(at::PML4), at::PDPT | table);
    for i in 0..4 {
        let pd = at::PD + i * 0x1000;
        mem.write(usize_of(at::PDPT + i * 8), pd | table);
        mem.write(usize_of(at::PDPT_PAE + i * 8), pd | pte::P);
        for j in 0..512 {
            mem.write(
                usize_of(pd + j * 8),
                ((i * 512 + j) << 21) | table | pte::PS,
            );
        }
    }
    for i in 0..1024u32 {
        mem.write(usize_of(at::PD32) + i as usize * 4, (i << 22) | 0x87);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    guest_code!(sixteen, ".code16", "mov eax, {A}", "hlt"; A = 0x1234_5678);
    guest_code!(thirty_two, ".code32", "mov eax, [{A}]", "hlt"; A = 0x1234_5678);
    guest_code!(sixty_four, ".code64", "mov rax, cr8", "2: jmp 2b");

    #[test]
    fn code_is_assembled_for_its_mode() {
        assert_eq!(sixteen(), [0x66, 0xb8, 0x78, 0x56, 0x34, 0x12, 0xf4]);
        assert_eq!(thirty_two(), [0xa1, 0x78, 0x56, 0x34, 0x12, 0xf4]);
        assert_eq!(sixty_four(), [0x44, 0x0f, 0x20, 0xc0, 0xeb, 0xfe]);
    }

    /// Flat segments as every boot loader has them.
    #[test]
    fn descriptors() {
        let code32 = segment(sel::CODE32, 11, 1, 0, 0, true);
        assert_eq!(descriptor(&code32), 0x00cf_9b00_0000_ffff);
        let code64 = segment(sel::CODE64, 11, 0, 1, 0, true);
        assert_eq!(descriptor(&code64), 0x00af_9b00_0000_ffff);
        let user = segment(sel::USER_DATA, 3, 1, 0, 3, true);
        assert_eq!(descriptor(&user), 0x00cf_f300_0000_ffff);
        assert_eq!(descriptor(&tss_segment()), 0x0000_8b01_8000_0067);
    }
}
