// SPDX-License-Identifier: GPL-2.0

//! Whole programs, executed by the emulator alone: what boot loaders and kernels do on their way from real mode on.
//!
//! They are assembled with the test, for the address that a BIOS loads a boot sector to.
#![cfg(target_arch = "x86_64")]

mod common;

use common::board::Board;
use common::board::End;
use common::board::Ports;
use rkvm_x86::exception::Fault;
use rkvm_x86::insn::Size;
use rkvm_x86::regs::Gpr;
use rkvm_x86::segment::CpuMode;
use rkvm_x86::segment::SegReg;
use std::arch::global_asm;

/// Where programs are loaded to.
const LOAD: u64 = 0x7c00;
const RAM: usize = 4 << 20;

/// A program is a routine of this test binary that nobody calls.
macro_rules! program {
    ($name:ident, $($code:literal),* $(,)?) => {
        global_asm!(
            ".pushsection .rodata",
            ".code16",
            concat!(".globl ", stringify!($name), "_begin, ", stringify!($name), "_end"),
            concat!(stringify!($name), "_begin:"),
            // What is to be taken from a label for the address that it will have.
            concat!(".set ", stringify!($name), "_org, ", stringify!($name), "_begin - 0x7c00"),
            $($code,)*
            concat!(stringify!($name), "_end:"),
            ".code64",
            ".popsection",
            options(att_syntax),
        );
        fn $name() -> &'static [u8] {
            let (begin, end): (*const u8, *const u8);
            // SAFETY: The two labels are there; their addresses are taken.
            unsafe {
                std::arch::asm!(
                    concat!("lea {0}, [rip + ", stringify!($name), "_begin]"),
                    concat!("lea {1}, [rip + ", stringify!($name), "_end]"),
                    out(reg) begin,
                    out(reg) end,
                );
                std::slice::from_raw_parts(begin, end as usize - begin as usize)
            }
        }
    };
}

/// A printer at port E9, a counter at port 40, and a timer that interrupts every so many steps.
#[derive(Default)]
struct Console {
    text: String,
    numbers: Vec<u32>,
    period: u64,
    ends: u32,
}

impl Ports for Console {
    fn input(&mut self, port: u16, size: Size) -> u32 {
        match port {
            0x64 => 0,
            0x50 => 0x1234_5678,
            _ => size.mask() as u32,
        }
    }
    fn output(&mut self, port: u16, size: Size, value: u32) {
        match (port, size) {
            (0xe9, _) => self.text.push(value as u8 as char),
            (0x20, _) => self.ends += 1,
            (0x50, _) => self.numbers.push(value),
            _ => {}
        }
    }
    fn interrupt(&mut self, steps: u64) -> Option<u8> {
        (self.period > 0 && steps % self.period == 0).then_some(8)
    }
}

fn load(program: &[u8]) -> Board<Console> {
    let mut board = Board::new(RAM, Console::default());
    board.memory.put(LOAD, program);
    board.cpu.rip = LOAD;
    board.cpu.gprs.set(Gpr::Rsp, LOAD);
    board
}

/// Runs a program to its end, which is HLT.
fn run(board: &mut Board<Console>, steps: u64) {
    let end = board.run(steps);
    assert_eq!(end, End::Halted, "{}\n{}", board.ports.text, board.place());
}

// A boot sector: a service of its own through the interrupt table, the A20 gate, protected mode, and back with the limits of
// protected mode in DS and ES; there it uses memory above 1 MiB.
program!(
    unreal,
    "   ljmp $0, $(1f - unreal_org)",
    "1: cli",
    "   xorw %ax, %ax",
    "   movw %ax, %ds",
    "   movw %ax, %es",
    "   movw %ax, %ss",
    "   movw $0x7c00, %sp",
    "   sti",
    "   cld",
    // INT 60 prints the text at SI.
    "   movw $(print - unreal_org), 0x60 * 4",
    "   movw %cs, 0x60 * 4 + 2",
    "   movw $(hello - unreal_org), %si",
    "   int $0x60",
    "   inb $0x92, %al",
    "   orb $2, %al",
    "   outb %al, $0x92",
    "   cli",
    "   lgdtw (gdt_place - unreal_org)",
    "   movl %cr0, %eax",
    "   orb $1, %al",
    "   movl %eax, %cr0",
    "   jmp 2f",
    "2: movw $8, %bx",
    "   movw %bx, %ds",
    "   movw %bx, %es",
    "   andb $0xfe, %al",
    "   movl %eax, %cr0",
    "   xorw %ax, %ax",
    "   movw %ax, %ds",
    "   movw %ax, %es",
    "   sti",
    "   movw $(big - unreal_org), %si",
    "   int $0x60",
    // Copies the sector to 2 MiB, in 32-bit strings with 32-bit addresses, and compares backwards.
    "   movl $0x7c00, %esi",
    "   movl $0x200000, %edi",
    "   movl $128, %ecx",
    "   .byte 0x67",
    "   rep movsl",
    "   movl $0xbabecafe, %eax",
    "   movl %eax, (%edi)",
    "   std",
    "   movl $0x7dfc, %esi",
    "   movl $0x2001fc, %edi",
    "   movl $128, %ecx",
    "   .byte 0x67",
    "   repe cmpsl",
    "   cld",
    "   jne fail",
    "   testl %ecx, %ecx",
    "   jnz fail",
    // FS and GS still end at 64 KiB: INT 0D, whose handler goes to `refused`.
    "   movw $(protection - unreal_org), 13 * 4",
    "   movw %cs, 13 * 4 + 2",
    "   movl $0x200000, %ebx",
    "   movb %fs:(%ebx), %al",
    "fail:",
    "   movw $(bad - unreal_org), %si",
    "   int $0x60",
    "   cli",
    "   hlt",
    "refused:",
    "   movw $(good - unreal_org), %si",
    "   int $0x60",
    "   cli",
    "   hlt",
    "protection:",
    "   movw %sp, %bp",
    "   movw $(refused - unreal_org), (%bp)",
    "   iretw",
    "print:",
    "   pushaw",
    "3: lodsb",
    "   testb %al, %al",
    "   jz 4f",
    "   outb %al, $0xe9",
    "   jmp 3b",
    "4: popaw",
    "   iretw",
    "hello: .asciz \"real \"",
    "big: .asciz \"unreal \"",
    "bad: .asciz \"bad\"",
    "good: .asciz \"good\"",
    "   .balign 8",
    "gdt: .quad 0, 0x00cf93000000ffff",
    "gdt_place: .word 15",
    "   .long gdt - unreal_org",
);

#[test]
fn a_boot_sector_makes_big_real_mode() {
    let mut board = load(unreal());
    run(&mut board, 10_000);
    assert_eq!(board.ports.text, "real unreal good");
    assert_eq!(board.memory.get32(0x20_0200), 0xbabe_cafe);
    assert_eq!(board.memory.get(0x20_0000, 512), board.memory.get(LOAD, 512));
    assert_eq!(board.faults.len(), 1);
    assert_eq!(board.faults[0], Fault::gp(0));
    // The limits of protected mode are there still.
    assert_eq!(board.cpu.seg(SegReg::Ds).limit, u32::MAX);
    assert_eq!(board.cpu.seg(SegReg::Fs).limit, 0xffff);
    // Without unrestricted guest, the processor can do what comes before, and nothing after.
    let [plain, emulated] = board.modes["Real"];
    assert!(plain > 40 && emulated > 80, "{:?}", board.modes);
}

// The primes below 2000 by a sieve of bytes, written to 2000:0 as words; then they are sorted downwards.
program!(
    sieve,
    "   cli",
    "   movw $0, 0",
    "   movw $(tick - sieve_org), 8 * 4",
    "   movw %cs, 8 * 4 + 2",
    "   sti",
    "   movw $0x1000, %ax",
    "   movw %ax, %es",
    "   xorw %di, %di",
    "   movw $2000, %cx",
    "   movb $1, %al",
    "   rep stosb",
    "   movw $2, %bx",
    "1: cmpb $0, %es:(%bx)",
    "   je 3f",
    "   movw %bx, %ax",
    "   mulw %bx",
    "   testw %dx, %dx",
    "   jnz 3f",
    "   cmpw $2000, %ax",
    "   jae 3f",
    "   movw %ax, %si",
    "2: movb $0, %es:(%si)",
    "   addw %bx, %si",
    "   cmpw $2000, %si",
    "   jb 2b",
    "3: incw %bx",
    "   cmpw $2000, %bx",
    "   jb 1b",
    // Collect them.
    "   movw $0x2000, %ax",
    "   pushw %ax",
    "   popw %ds",
    "   xorw %di, %di",
    "   movw $2, %si",
    "4: lodsb %es:(%si), %al",
    "   decb %al",
    "   jnz 5f",
    "   leaw -1(%si), %ax",
    "   movw %ax, (%di)",
    "   scasw",
    "5: cmpw $2000, %si",
    "   jne 4b",
    "   movw %di, %ss:0x6fe",
    // Bubbles.
    "6: xorw %dx, %dx",
    "   xorw %si, %si",
    "   movw %ss:0x6fe, %cx",
    "   shrw $1, %cx",
    "   decw %cx",
    "7: lodsw",
    "   cmpw (%si), %ax",
    "   jae 8f",
    "   xchgw %ax, (%si)",
    "   movw %ax, -2(%si)",
    "   incw %dx",
    "8: loop 7b",
    "   testw %dx, %dx",
    "   jnz 6b",
    "   cli",
    "   hlt",
    "tick:",
    "   pushw %ax",
    "   incl %cs:0x6f0",
    "   movb $0x20, %al",
    "   outb %al, $0x20",
    "   popw %ax",
    "   iretw",
);

fn primes() -> Vec<u16> {
    (2..2000u16)
        .filter(|n| (2..*n).all(|d| n % d != 0))
        .collect()
}

#[test]
fn a_sieve_and_a_sort_in_real_mode() {
    // Undisturbed, and with an interrupt between any two instructions.
    for period in [0, 7, 100] {
        let mut board = load(sieve());
        board.ports.period = period;
        run(&mut board, 20_000_000);
        let mut expected = primes();
        expected.reverse();
        let found: Vec<u16> = (0..expected.len() as u64)
            .map(|i| board.memory.get16(0x2_0000 + 2 * i))
            .collect();
        assert_eq!(found, expected, "every {period} steps");
        assert_eq!(board.memory.get16(0x6fe) as usize, 2 * expected.len());
        let ticks = board.memory.get32(0x6f0);
        assert_eq!(ticks, board.ports.ends);
        assert_eq!(ticks > 1000, period > 0);
        // All of it is what virtual-8086 mode can do.
        assert_eq!(board.modes["Real"][1], 0);
        assert!(board.faults.is_empty());
    }
}

// As Linux does: 16-bit real mode, 32-bit protected mode, paging and long mode, a 64-bit IDT and TSS; and the way back down.
program!(
    modes,
    "   cli",
    "   xorw %ax, %ax",
    "   movw %ax, %ds",
    "   movw %ax, %ss",
    "   movb $'1', %al",
    "   outb %al, $0xe9",
    "   lidtl (no_idt - modes_org)",
    "   lgdtl (modes_gdt_place - modes_org)",
    "   movw $1, %ax",
    "   lmsw %ax",
    "   ljmpl $0x10, $(flat32 - modes_org)",
    "   .code32",
    "flat32:",
    "   movl $0x18, %ecx",
    "   movl %ecx, %ds",
    "   movl %ecx, %es",
    "   movl %ecx, %fs",
    "   movl %ecx, %gs",
    "   movl %ecx, %ss",
    "   movl $0x90000, %esp",
    "   movb $'2', %al",
    "   outb %al, $0xe9",
    // A far call and return, ENTER and LEAVE, and recursion: 10! in EAX.
    "   pushl $10",
    "   lcall $0x10, $(factorial_far - modes_org)",
    "   popl %ecx",
    "   movl $0x50, %edx",
    "   outl %eax, %dx",
    // CPUID reports long mode.
    "   movl $0x80000001, %eax",
    "   cpuid",
    "   btl $29, %edx",
    "   jnc stop",
    // One table of each level; 1 GiB by pages of 2 MiB.
    "   movl $0x100000, %edi",
    "   xorl %eax, %eax",
    "   movl $0xc00, %ecx",
    "   rep stosl",
    "   movl $0x101007, 0x100000",
    "   movl $0x102007, 0x101000",
    "   movl $0x102000, %edi",
    "   movl $0x87, %eax",
    "   movl $512, %ecx",
    "1: movl %eax, (%edi)",
    "   addl $0x200000, %eax",
    "   addl $8, %edi",
    "   loop 1b",
    "   movl %cr4, %eax",
    "   btsl $5, %eax",
    "   movl %eax, %cr4",
    "   movl $0x100000, %eax",
    "   movl %eax, %cr3",
    "   movl $0xc0000080, %ecx",
    "   rdmsr",
    "   btsl $8, %eax",
    "   wrmsr",
    "   movl %cr0, %eax",
    "   btsl $31, %eax",
    "   movl %eax, %cr0",
    "   movb $'3', %al",
    "   outb %al, $0xe9",
    "   pushl $0x20",
    "   pushl $(wide - modes_org)",
    "   lretl",
    "   .code64",
    "wide:",
    "   xorl %eax, %eax",
    "   movl %eax, %ds",
    "   movl %eax, %es",
    "   movl %eax, %ss",
    "   movabsq $0x123456789abcdef0, %r15",
    "   movb $'4', %al",
    "   outb %al, $0xe9",
    // Gates for 20 (an interrupt) and 6 (an invalid opcode).
    "   leaq trap(%rip), %rax",
    "   movl $0x110000, %edi",
    "   leaq 0x60(%rdi), %rsi",
    "   movq %rsi, %rdi",
    "   call gate64",
    "   movl $0x110200, %edi",
    "   leaq service(%rip), %rax",
    "   call gate64",
    "   lidtq idt64(%rip)",
    "   movl $0x28, %eax",
    "   ltrw %ax",
    "   movl $7, %ebx",
    "   int $0x20",
    "   ud2",
    "   movl %ebx, %eax",
    "   movl $0x50, %edx",
    "   outl %eax, %dx",
    "   shrq $32, %r15",
    "   movl %r15d, %eax",
    "   outl %eax, %dx",
    // Back down: compatibility mode, paging off, protected mode of 16 bits, real mode.
    "   movl $0x18, %eax",
    "   movl %eax, %ss",
    "   movl %eax, %ds",
    "   movl $0x90000, %esp",
    "   pushq $0x10",
    "   leaq down32(%rip), %rax",
    "   pushq %rax",
    "   lretq",
    "gate64:",
    "   movw %ax, (%rdi)",
    "   movw $0x20, 2(%rdi)",
    "   movw $0x8e00, 4(%rdi)",
    "   shrq $16, %rax",
    "   movw %ax, 6(%rdi)",
    "   shrq $16, %rax",
    "   movq %rax, 8(%rdi)",
    "   ret",
    "trap:",
    "   addq $2, (%rsp)",
    "   shll $8, %ebx",
    "   iretq",
    "service:",
    "   pushq %rax",
    "   movb $'i', %al",
    "   outb %al, $0xe9",
    "   popq %rax",
    "   addl $0x100, %ebx",
    "   iretq",
    "   .code32",
    "down32:",
    "   movl %cr0, %eax",
    "   btrl $31, %eax",
    "   movl %eax, %cr0",
    "   movb $'5', %al",
    "   outb %al, $0xe9",
    "   ljmpl $0x38, $(down16 - modes_org)",
    "factorial_far:",
    "   pushl 8(%esp)",
    "   call factorial",
    "   addl $4, %esp",
    "   lretl",
    "factorial:",
    "   enter $4, $0",
    "   movl 8(%ebp), %eax",
    "   movl %eax, -4(%ebp)",
    "   cmpl $1, %eax",
    "   jbe 1f",
    "   decl %eax",
    "   pushl %eax",
    "   call factorial",
    "   imull -4(%ebp), %eax",
    "1: leave",
    "   ret $0",
    "   .code16",
    "down16:",
    "   movw $0x40, %ax",
    "   movw %ax, %ds",
    "   movw %ax, %es",
    "   movw %ax, %fs",
    "   movw %ax, %gs",
    "   movw %ax, %ss",
    "   movl %cr0, %eax",
    "   andb $0xfe, %al",
    "   movl %eax, %cr0",
    "   ljmpw $0x7c0, $(real - modes_begin)",
    "real:",
    "   xorw %ax, %ax",
    "   movw %ax, %ds",
    "   movw %ax, %es",
    "   movw %ax, %ss",
    "   movw $0x7c00, %sp",
    "   lidtw (real_idt - modes_org)",
    "   movb $'6', %al",
    "   outb %al, $0xe9",
    "stop:",
    "   cli",
    "   hlt",
    "   .balign 8",
    "modes_gdt: .quad 0, 0",
    "   .quad 0x00cf9b000000ffff",
    "   .quad 0x00cf93000000ffff",
    "   .quad 0x00af9b000000ffff",
    "   .quad 0x0000890b00000067, 0",
    // 16 bits, base 0, and 64 KiB.
    "   .quad 0x00009b000000ffff",
    "   .quad 0x000093000000ffff",
    "modes_gdt_place: .word 0x47",
    "   .long modes_gdt - modes_org",
    "no_idt: .word 0",
    "   .long 0",
    "real_idt: .word 0x3ff",
    "   .long 0",
    "idt64: .word 0xfff",
    "   .quad 0x110000",
);

#[test]
fn from_real_mode_to_long_mode_and_back() {
    let mut board = load(modes());
    run(&mut board, 100_000);
    assert_eq!(board.ports.text, "1234i56");
    // 10!, and what the two handlers made of 7.
    assert_eq!(board.ports.numbers, [3_628_800, 0x107 << 8, 0x1234_5678]);
    assert_eq!(board.faults, [Fault::UD]);
    assert_eq!(board.mode(), CpuMode::Real);
    for (mode, count) in [
        ("Real", 10),
        ("Protected16", 1),
        ("Protected32", 100),
        ("Compat32", 3),
        ("Long64", 50),
    ] {
        let [plain, emulated] = board.modes[mode];
        assert!(plain + emulated >= count, "{:?}", board.modes);
    }
}

// A monitor in protected mode and its program in virtual-8086 mode, at 1000:0. The monitor gets #GP for what the program must not
// do: it skips CLI and STI, takes INT n to the program's own table, does IRET for it, and ends at HLT.
program!(
    monitor,
    "   cli",
    "   xorw %ax, %ax",
    "   movw %ax, %ds",
    // The program, and its interrupt 21.
    "   movw $0x1000, %ax",
    "   movw %ax, %es",
    "   movw $(task - monitor_org), %si",
    "   xorw %di, %di",
    "   movw $(task_end - task), %cx",
    "   cld",
    "   rep movsb",
    "   movw $(task_int - task), 0x21 * 4",
    "   movw $0x1000, 0x21 * 4 + 2",
    "   lgdtl (monitor_gdt_place - monitor_org)",
    "   lidtl (monitor_idt_place - monitor_org)",
    "   movl %cr0, %eax",
    "   incw %ax",
    "   movl %eax, %cr0",
    "   ljmpl $8, $(monitor32 - monitor_org)",
    "   .code32",
    "monitor32:",
    "   movw $0x10, %ax",
    "   movw %ax, %ds",
    "   movw %ax, %es",
    "   movw %ax, %ss",
    "   movl $0x70000, %esp",
    // The TSS: a stack for level 0, and no ports.
    "   movl $0x68000, 0x60004",
    "   movl $0x10, 0x60008",
    "   movw $0x68, 0x60066",
    "   movw $0x18, %ax",
    "   ltr %ax",
    "   xorl %ebx, %ebx",
    // GS, FS, DS, ES, SS, ESP, EFLAGS with VM, CS, EIP.
    "   pushl $0x1234",
    "   pushl $0",
    "   pushl $0x1000",
    "   pushl $0x2000",
    "   pushl $0x3000",
    "   pushl $0xfffe",
    "   pushl $0x20202",
    "   pushl $0x1000",
    "   pushl $0",
    "   iretl",
    // The frame above the error code: EIP, CS, EFLAGS, ESP, SS.
    "refuse:",
    "   pushal",
    "   movl $0x10, %eax",
    "   movl %eax, %ds",
    "   incl 0x6e0",
    "   movzwl 40(%esp), %esi",
    "   shll $4, %esi",
    "   addl 36(%esp), %esi",
    "   movzwl 52(%esp), %edi",
    "   shll $4, %edi",
    "   addl 48(%esp), %edi",
    "   lodsb",
    "   cmpb $0xfa, %al",
    "   je skip1",
    "   cmpb $0xfb, %al",
    "   je skip1",
    "   cmpb $0xcd, %al",
    "   je reflect",
    "   cmpb $0xcf, %al",
    "   je leave_int",
    "   cmpb $0xe6, %al",
    "   je print_al",
    "   cmpb $0xf4, %al",
    "   jne die",
    "   movzwl 52(%esp), %eax",
    "   movl $0x50, %edx",
    "   outl %eax, %dx",
    "   hlt",
    "die: movb $'!', %al",
    "   outb %al, $0xe9",
    "   hlt",
    "print_al:",
    "   movb 28(%esp), %al",
    "   outb %al, $0xe9",
    "   incl 36(%esp)",
    "skip1:",
    "   incl 36(%esp)",
    "resume:",
    "   popal",
    "   addl $4, %esp",
    "   iretl",
    "reflect:",
    "   movzbl (%esi), %ecx",
    "   subl $6, %edi",
    "   subl $6, 48(%esp)",
    "   movl 36(%esp), %eax",
    "   addl $2, %eax",
    "   movw %ax, (%edi)",
    "   movw 40(%esp), %ax",
    "   movw %ax, 2(%edi)",
    "   movw 44(%esp), %ax",
    "   movw %ax, 4(%edi)",
    "   movzwl (,%ecx,4), %eax",
    "   movl %eax, 36(%esp)",
    "   movzwl 2(,%ecx,4), %eax",
    "   movl %eax, 40(%esp)",
    "   jmp resume",
    "leave_int:",
    "   movzwl (%edi), %eax",
    "   movl %eax, 36(%esp)",
    "   movzwl 2(%edi), %eax",
    "   movl %eax, 40(%esp)",
    "   addl $6, 48(%esp)",
    "   jmp resume",
    "   .code16",
    "task:",
    "   cli",
    "   movb $'v', %al",
    "   outb %al, $0xe9",
    "   movw $5, %cx",
    "1: int $0x21",
    "   loop 1b",
    // Segments of the 8086, and a far call.
    "   movw %gs, %ax",
    "   movw %ax, (0x100)",
    "   movw $0x3001, %ax",
    "   movw %ax, %ds",
    "   movw $0xabcd, (0x10)",
    "   lcall $0x1000, $(task_far - task)",
    "   sti",
    "   hlt",
    "task_far:",
    "   movb $'f', %al",
    "   outb %al, $0xe9",
    "   lretw",
    "task_int:",
    "   movb $'0', %al",
    "   addb %cl, %al",
    "   outb %al, $0xe9",
    "   iretw",
    "task_end:",
    "   .balign 8",
    "monitor_gdt: .quad 0",
    "   .quad 0x00cf9b000000ffff",
    "   .quad 0x00cf93000000ffff",
    "   .quad 0x0000890600000067",
    "monitor_gdt_place: .word 31",
    "   .long monitor_gdt - monitor_org",
    "monitor_idt_place: .word 14 * 8 - 1",
    "   .long gates - monitor_org",
    "gates: .fill 13, 8, 0",
    "   .word refuse - monitor_org, 8, 0x8e00, 0",
);

#[test]
fn a_monitor_and_its_program_in_virtual_8086_mode() {
    let mut board = load(monitor());
    run(&mut board, 10_000);
    assert_eq!(board.ports.text, "v54321f");
    assert_eq!(board.ports.numbers, [0x3000]);
    // CLI, STI, HLT, five of INT and IRET, seven of OUT.
    let count = 3 + 2 * 5 + 7;
    assert_eq!(board.memory.get32(0x6e0), count);
    assert_eq!(board.faults, vec![Fault::gp(0); count as usize]);
    assert_eq!(board.memory.get16(0x1_0100), 0x1234);
    assert_eq!(board.memory.get16(0x3_0020), 0xabcd);
    assert_eq!(board.modes["Vm86"][1], 0, "{:?}", board.modes);
}
