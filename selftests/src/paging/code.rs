// SPDX-License-Identifier: GPL-2.0

//! The guest's code: a dispatcher, a handler for everything, and a few instructions for each operation.
//!
//! The dispatcher takes the next operation's record, loads registers from it and goes by IRET to the
//! operation's code, in supervisor or user mode. That ends with INT 0x80, or in an exception. Both come to the
//! same handler, which writes down what it sees and goes back to the dispatcher.
//!
//! A page fault is tried again once at each address, as it may be a spurious one: the processor may still
//! have rights that were extended since. So only the second counts.

use super::layout::{self as at, sel};
use super::op::{Format, Op};
use crate::guest::usize_of;
use crate::guest_code;
use crate::mem::Mapping;
use kvm_bindings as kb;

/// Offsets of the dispatcher's variables.
const CUR: u64 = at::STATE;
const LOGP: u64 = at::STATE + 8;
const LAST: u64 = at::STATE + 16;
const RETRIES: u64 = at::STATE + 24;
/// An address at which no operation faults.
const NOWHERE: u64 = 0x5a5;
/// Where the handler lies.
const COMMON: u64 = at::CODE + 0x200;
/// Where the end of operation [`Op::Interrupt`] lies.
const INTERRUPTED: u64 = at::CODE + 0x400;
/// Where the first instruction's code lies in [`at::CODE`]; 16 bytes for each.
const INSNS: u64 = 0x800;
/// The vector with which operations end.
pub const DONE: u8 = 0x80;
/// The vector of [`Op::Interrupt`].
pub const INTERRUPT: u8 = 0x81;

guest_code!(dispatch64, ".code64",
    "mov rbx, [{CUR}]",
    "add rbx, {OP}",
    "mov [{CUR}], rbx",
    "mov rax, [{LOGP}]",
    "add rax, {LOG}",
    "mov [{LOGP}], rax",
    "mov eax, {NOWHERE}",
    "mov [{LAST}], rax",
    "mov dword ptr [{RETRIES}], 8",
    "mov rax, [rbx + 88]",
    "mov [{IST2}], rax",
    "mov esp, {STACK}",
    "push qword ptr [rbx + 32]",
    "push qword ptr [rbx + 24]",
    "push qword ptr [rbx + 16]",
    "push qword ptr [rbx + 8]",
    "push qword ptr [rbx]",
    "mov rdi, [rbx + 40]",
    "mov rax, [rbx + 48]",
    "mov rdx, [rbx + 56]",
    "mov rcx, [rbx + 64]",
    "mov rsi, [rbx + 72]",
    "mov rbx, [rbx + 80]",
    "iretq";
    CUR = CUR, LOGP = LOGP, LAST = LAST, RETRIES = RETRIES, OP = at::OP_SIZE, LOG = at::LOG_SIZE,
    NOWHERE = NOWHERE, IST2 = at::TSS + 0x2c, STACK = at::STACK,
);

guest_code!(common64, ".code64",
    "push rax",
    "push rbx",
    "mov rbx, [{LOGP}]",
    "xor eax, eax",
    "cmp dword ptr [rsp + 16], 14",
    "jne 3f",
    "mov rax, cr2",
    "cmp rax, [{LAST}]",
    "je 3f",
    "mov [{LAST}], rax",
    "dec dword ptr [{RETRIES}]",
    "js 3f",
    "pop rbx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    "3: mov [rbx + 24], rax",
    "mov rax, [rsp + 8]",
    "mov [rbx + 32], rax",
    "mov [rbx + 40], rcx",
    "mov [rbx + 48], rdx",
    "mov eax, [rsp + 16]",
    "mov [rbx], eax",
    "mov eax, [rsp + 40]",
    "mov [rbx + 4], eax",
    "mov rax, [rsp + 24]",
    "mov [rbx + 8], rax",
    "mov rax, [rsp + 32]",
    "mov [rbx + 16], rax",
    "mov rax, [rsp + 48]",
    "mov [rbx + 56], rax",
    "mov eax, {NEXT}",
    "jmp rax";
    LOGP = LOGP, LAST = LAST, RETRIES = RETRIES, NEXT = at::CODE,
);

// The frame is on the stack of the test; here is one like those of the stubs.
guest_code!(interrupted64, ".code64",
    "and dword ptr [rsi], -0x10001",
    "mov esp, {STACK}",
    "push 0",
    "push 0",
    "push 0",
    "push 0",
    "push 0",
    "push 0",
    "push {V}",
    "mov eax, {COMMON}",
    "jmp rax";
    STACK = at::STACK, V = INTERRUPT as i32, COMMON = COMMON,
);

guest_code!(dispatch32, ".code32",
    "mov ebx, [{CUR}]",
    "add ebx, {OP}",
    "mov [{CUR}], ebx",
    "mov eax, [{LOGP}]",
    "add eax, {LOG}",
    "mov [{LOGP}], eax",
    "mov eax, {NOWHERE}",
    "mov [{LAST}], eax",
    "mov dword ptr [{RETRIES}], 8",
    "mov eax, [ebx + 88]",
    "mov [{ESP0}], eax",
    "mov esp, {STACK}",
    "push dword ptr [ebx + 32]",
    "push dword ptr [ebx + 24]",
    "push dword ptr [ebx + 16]",
    "push dword ptr [ebx + 8]",
    "push dword ptr [ebx]",
    "mov edi, [ebx + 40]",
    "mov eax, [ebx + 48]",
    "mov edx, [ebx + 56]",
    "mov ecx, [ebx + 64]",
    "mov esi, [ebx + 72]",
    "mov ebx, [ebx + 80]",
    "iretd";
    CUR = CUR, LOGP = LOGP, LAST = LAST, RETRIES = RETRIES, OP = at::OP_SIZE, LOG = at::LOG_SIZE,
    NOWHERE = NOWHERE, ESP0 = at::TSS + 4, STACK = at::STACK,
);

guest_code!(common32, ".code32",
    "push eax",
    "push ebx",
    "mov ebx, [{LOGP}]",
    "xor eax, eax",
    "cmp dword ptr [esp + 8], 14",
    "jne 3f",
    "mov eax, cr2",
    "cmp eax, [{LAST}]",
    "je 3f",
    "mov [{LAST}], eax",
    "dec dword ptr [{RETRIES}]",
    "js 3f",
    "pop ebx",
    "pop eax",
    "add esp, 8",
    "iretd",
    "3: mov [ebx + 24], eax",
    "mov eax, [esp + 4]",
    "mov [ebx + 32], eax",
    "mov [ebx + 40], ecx",
    "mov [ebx + 48], edx",
    "mov eax, [esp + 8]",
    "mov [ebx], eax",
    "mov eax, [esp + 20]",
    "mov [ebx + 4], eax",
    "mov eax, [esp + 12]",
    "mov [ebx + 8], eax",
    "mov eax, [esp + 16]",
    "mov [ebx + 16], eax",
    "mov eax, [esp + 24]",
    "mov [ebx + 56], eax",
    "mov eax, {NEXT}",
    "jmp eax";
    LOGP = LOGP, LAST = LAST, RETRIES = RETRIES, NEXT = at::CODE,
);

guest_code!(interrupted32, ".code32",
    "and dword ptr [esi], -0x10001",
    "mov esp, {STACK}",
    "push 0",
    "push 0",
    "push 0",
    "push 0",
    "push {V}",
    "mov eax, {COMMON}",
    "jmp eax";
    STACK = at::STACK, V = INTERRUPT as i32, COMMON = COMMON,
);

macro_rules! insns {
    ($($(#[$doc:meta])* $name:ident, $f64:ident: $($l64:literal),+; $f32:ident: $($l32:literal),+;)*) => {
        /// The instructions of operations.
        ///
        /// DI is the address, the other registers are the operands; A, C and D are written down after it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Insn { $($(#[$doc])* $name),* }
        /// All of them, in the order of their numbers.
        pub const INSNS_ALL: &[Insn] = &[$(Insn::$name),*];
        $(guest_code!($f64, ".code64", $($l64,)+ "int 0x80");)*
        $(guest_code!($f32, ".code32", $($l32,)+ "int 0x80");)*
        const CODE64: &[fn() -> &'static [u8]] = &[$($f64),*];
        const CODE32: &[fn() -> &'static [u8]] = &[$($f32),*];
    };
}

insns! {
    /// Reads 8 bits to A.
    Read1, r1: "mov al, [rdi]"; r1b: "mov al, [edi]";
    /// Reads 16 bits to A.
    Read2, r2: "mov ax, [rdi]"; r2b: "mov ax, [edi]";
    /// Reads 32 bits to A.
    Read4, r4: "mov eax, [rdi]"; r4b: "mov eax, [edi]";
    /// Reads 64 bits to A; only in 64-bit mode.
    Read8, r8: "mov rax, [rdi]"; r8b: "ud2";
    /// Writes 8 bits of A.
    Write1, w1: "mov [rdi], al"; w1b: "mov [edi], al";
    /// Writes 16 bits of A.
    Write2, w2: "mov [rdi], ax"; w2b: "mov [edi], ax";
    /// Writes 32 bits of A.
    Write4, w4: "mov [rdi], eax"; w4b: "mov [edi], eax";
    /// Writes 64 bits of A; only in 64-bit mode.
    Write8, w8: "mov [rdi], rax"; w8b: "ud2";
    /// Exchanges 32 bits with A.
    Xchg4, x4: "xchg [rdi], eax"; x4b: "xchg [edi], eax";
    /// Exchanges 64 bits with A; only in 64-bit mode.
    Xchg8, x8: "xchg [rdi], rax"; x8b: "ud2";
    /// Locked AND of 32 bits with A.
    And4, a4: "lock and [rdi], eax"; a4b: "lock and [edi], eax";
    /// Locked AND of 64 bits with A; only in 64-bit mode.
    And8, a8: "lock and [rdi], rax"; a8b: "ud2";
    /// Locked OR of 8 bits with A.
    Or1, o1: "lock or [rdi], al"; o1b: "lock or [edi], al";
    /// Locked OR of 32 bits with A.
    Or4, o4: "lock or [rdi], eax"; o4b: "lock or [edi], eax";
    /// Adds 32 bits to A, exchanged; locked.
    Xadd4, xa4: "lock xadd [rdi], eax"; xa4b: "lock xadd [edi], eax";
    /// AND of 32 bits with A, not locked.
    Clear4, c4: "and [rdi], eax"; c4b: "and [edi], eax";
    /// Compares 32 bits with A, exchanges with D.
    CmpXchg4, cx4: "lock cmpxchg [rdi], edx"; cx4b: "lock cmpxchg [edi], edx";
    /// Compares 64 bits with D:A, exchanges with C:B.
    CmpXchg8b, cx8: "lock cmpxchg8b [rdi]"; cx8b: "lock cmpxchg8b [edi]";
    /// Fills C units of 32 bits with A.
    Stos4, s4: "rep stosd"; s4b: "rep stosd";
    /// Fills C units of 64 bits with A; only in 64-bit mode.
    Stos8, s8: "rep stosq"; s8b: "ud2";
    /// Copies C units of 32 bits from SI.
    Movs4, m4: "rep movsd"; m4b: "rep movsd";
    /// Copies C units of 64 bits from SI; only in 64-bit mode.
    Movs8, m8: "rep movsq"; m8b: "ud2";
    /// Pushes A below the address; only in 64-bit mode.
    Push8, p8: "push rax"; p8b: "ud2";
    /// Reads access rights by selector D.
    Lar, la: "lar eax, edx"; lab: "lar eax, edx";
    /// Interrupts itself.
    Interrupt, it: "int 0x81"; itb: "int 0x81";
    /// INVLPG.
    Invlpg, il: "invlpg [rdi]"; ilb: "invlpg [edi]";
    /// INVPCID of type A with the operand at SI.
    Invpcid, ip: "invpcid rax, [rsi]"; ipb: "invpcid eax, [esi]";
    /// Loads CR0 from A.
    SetCr0, c0: "mov cr0, rax"; c0b: "mov cr0, eax";
    /// Loads CR3 from A.
    SetCr3, c3: "mov cr3, rax"; c3b: "mov cr3, eax";
    /// Loads CR4 from A.
    SetCr4, cr4: "mov cr4, rax"; cr4b: "mov cr4, eax";
    /// Writes D:A to MSR C.
    Wrmsr, wm: "wrmsr"; wmb: "wrmsr";
    /// Loads PKRU from A.
    Wrpkru, wp: "wrpkru"; wpb: "ud2";
    /// Leaves the guest: the end of a program.
    End, en: "hlt"; enb: "hlt";
}

impl Insn {
    /// Bytes that it accesses at a time; 0 if it is none on memory.
    #[must_use]
    pub fn size(self) -> u64 {
        use Insn::*;
        match self {
            Read1 | Write1 | Or1 => 1,
            Read2 | Write2 => 2,
            Read4 | Write4 | Xchg4 | And4 | Or4 | Xadd4 | Clear4 | CmpXchg4 | Stos4 | Movs4 => 4,
            Read8 | Write8 | Xchg8 | And8 | CmpXchg8b | Stos8 | Movs8 | Push8 => 8,
            _ => 0,
        }
    }

    /// Whether it only reads.
    #[must_use]
    pub fn reads_only(self) -> bool {
        use Insn::*;
        matches!(self, Read1 | Read2 | Read4 | Read8)
    }

    /// Whether 32-bit code has it.
    #[must_use]
    pub fn in_32_bits(self) -> bool {
        use Insn::*;
        !matches!(
            self,
            Read8 | Write8 | Xchg8 | And8 | Stos8 | Movs8 | Push8 | Wrpkru
        )
    }

    fn code(self, long: bool) -> &'static [u8] {
        (if long { CODE64 } else { CODE32 })[self as usize]()
    }

    /// Where its code lies.
    #[must_use]
    pub fn address(self, user: bool) -> u64 {
        let base = if user { at::CODE_USER } else { at::CODE };
        base + INSNS + 16 * self as u64
    }

    /// Where it has ended: behind the INT.
    #[must_use]
    pub fn end(self, user: bool, long: bool) -> u64 {
        self.address(user) + self.code(long).len() as u64
    }
}

/// What an operation saw, as the guest wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Record {
    /// The vector by which it ended.
    pub vector: u32,
    /// The code segment that was saved.
    pub cs: u32,
    /// The error code.
    pub error: u64,
    /// The instruction pointer that was saved.
    pub rip: u64,
    /// CR2, if it was a page fault.
    pub cr2: u64,
    /// RAX.
    pub a: u64,
    /// RCX.
    pub c: u64,
    /// RDX.
    pub d: u64,
    /// RFLAGS.
    pub flags: u64,
}

/// The registers with which an operation begins, in the layout that the dispatcher reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
struct Start {
    rip: u64,
    cs: u64,
    flags: u64,
    sp: u64,
    ss: u64,
    di: u64,
    a: u64,
    d: u64,
    c: u64,
    si: u64,
    b: u64,
    stack: u64,
    unused: [u64; 4],
}

/// RFLAGS.AC.
pub const AC: u64 = 1 << 18;

/// The flags with which an operation begins.
#[must_use]
pub fn flags(ac: bool) -> u64 {
    2 | if ac { AC } else { 0 }
}

/// The code segment of operations.
#[must_use]
pub fn cs(user: bool) -> u64 {
    u64::from(if user { sel::USER_CODE } else { sel::CODE })
}

/// The stack segment of operations.
#[must_use]
pub fn ss(user: bool) -> u64 {
    u64::from(if user { sel::USER_DATA } else { sel::DATA })
}

/// The stack pointer of operations that have no stack of their own.
#[must_use]
pub fn sp(user: bool) -> u64 {
    if user {
        0
    } else {
        at::STACK
    }
}

fn start(insn: Insn, user: bool, ac: bool) -> Start {
    Start {
        rip: insn.address(user),
        cs: cs(user),
        flags: flags(ac),
        sp: sp(user),
        ss: ss(user),
        stack: at::STACK,
        ..Start::default()
    }
}

fn compile_one(op: &Op, index: usize, mem: &Mapping) -> Start {
    let control = |insn, a| Start {
        a,
        ..start(insn, false, false)
    };
    match *op {
        Op::Mem {
            insn,
            addr,
            regs,
            user,
            ac,
        } => Start {
            di: addr,
            sp: if insn == Insn::Push8 {
                addr + 8
            } else {
                sp(user)
            },
            a: regs.a,
            b: regs.b,
            c: regs.c,
            d: regs.d,
            si: regs.si,
            ..start(insn, user, ac)
        },
        Op::Fetch { addr, user } => Start {
            rip: addr,
            ..start(Insn::End, user, false)
        },
        Op::Lar { offset, user } => Start {
            d: u64::from(offset & !7) | 4 | if user { 3 } else { 0 },
            ..start(Insn::Lar, user, false)
        },
        Op::Interrupt { stack, user, flags } => Start {
            stack,
            si: flags,
            ..start(Insn::Interrupt, user, false)
        },
        Op::Invlpg(addr) => Start {
            di: addr,
            ..start(Insn::Invlpg, false, false)
        },
        Op::Invpcid { kind, pcid, addr } => {
            let operand = at::OPERANDS + 16 * index as u64;
            mem.write(usize_of(operand), pcid);
            mem.write(usize_of(operand) + 8, addr);
            Start {
                si: operand,
                ..control(Insn::Invpcid, kind)
            }
        }
        Op::Cr0(v) => control(Insn::SetCr0, v),
        Op::Cr3(v) => control(Insn::SetCr3, v),
        Op::Cr4(v) => control(Insn::SetCr4, v),
        Op::Efer(v) => Start {
            c: 0xc000_0080,
            ..control(Insn::Wrmsr, v)
        },
        Op::Pkru(v) => control(Insn::Wrpkru, v.into()),
        Op::Leave => start(Insn::End, false, false),
    }
}

/// Writes the operations, and clears what they will have seen.
pub fn compile(mem: &Mapping, ops: &[Op]) {
    assert!(
        ops.len() < at::MAX_OPS,
        "a program of {} operations",
        ops.len()
    );
    let record = |i: usize| usize_of(at::OPS) + i * usize_of(at::OP_SIZE);
    for (i, op) in ops.iter().enumerate() {
        mem.write(record(i), compile_one(op, i, mem));
    }
    mem.write(record(ops.len()), start(Insn::End, false, false));
    mem.fill(
        usize_of(at::LOG),
        (ops.len() + 1) * usize_of(at::LOG_SIZE),
        0,
    );
    mem.write(usize_of(CUR), at::OPS - at::OP_SIZE);
    mem.write(usize_of(LOGP), at::LOG - at::LOG_SIZE);
}

/// What operation `i` saw.
#[must_use]
pub fn record(mem: &Mapping, i: usize) -> Record {
    mem.read(usize_of(at::LOG) + i * usize_of(at::LOG_SIZE))
}

/// How many operations began.
#[must_use]
pub fn begun(mem: &Mapping) -> usize {
    let cur: u64 = mem.read(usize_of(CUR));
    usize_of((cur.wrapping_sub(at::OPS - at::OP_SIZE)) / at::OP_SIZE)
}

fn descriptor(ty: u64, dpl: u64, long: bool, code: bool) -> u64 {
    let base = 0x0000_9000_0000_0000 | 0x000f_0000_0000_ffff | (1 << 55);
    let size = if long && code { 1 << 53 } else { 1 << 54 };
    base | (ty << 40) | (dpl << 45) | size
}

/// Writes code, descriptors and the dispatcher's own page tables.
pub fn install(mem: &Mapping, format: Format) {
    let long = format.is_long();
    let put = |gpa: u64, code: &[u8], room: u64| {
        assert!(code.len() as u64 <= room, "code of {} bytes", code.len());
        mem.write_bytes(usize_of(gpa), code);
    };
    put(
        at::CODE,
        if long { dispatch64() } else { dispatch32() },
        0x200,
    );
    put(COMMON, if long { common64() } else { common32() }, 0x200);
    let end = if long {
        interrupted64()
    } else {
        interrupted32()
    };
    put(INTERRUPTED, end, 0x200);
    for insn in INSNS_ALL {
        for user in [false, true] {
            put(insn.address(user), insn.code(long), 16);
        }
    }
    let gdt = [
        0,
        descriptor(11, 0, long, true),
        descriptor(3, 0, long, false),
        descriptor(11, 3, long, true),
        descriptor(3, 3, long, false),
    ];
    for (i, d) in gdt.iter().enumerate() {
        mem.write(usize_of(at::GDT) + i * 8, *d);
    }
    write_idt(mem, long);
    mem.fill(usize_of(at::TSS), 0x68, 0);
    if long {
        mem.write(usize_of(at::TSS) + 0x24, at::STACK);
    } else {
        mem.write(usize_of(at::TSS) + 8, u32::from(sel::DATA));
    }
    mem.write(usize_of(at::TSS) + 102, 0x68u16);
    write_tables(mem);
}

fn write_idt(mem: &Mapping, long: bool) {
    mem.fill(usize_of(at::IDT), 0x1000, 0);
    for (i, v) in (0..32).chain([DONE, INTERRUPT]).enumerate() {
        let stub = at::STUBS + 16 * i as u64;
        let mut code = Vec::new();
        if !crate::guest::has_error_code(v) {
            code.extend_from_slice(&[0x6a, 0]); // push 0
        }
        code.push(0x68); // push imm32
        code.extend_from_slice(&u32::from(v).to_le_bytes());
        code.push(0xe9); // jmp rel32
        let from = stub + code.len() as u64 + 4;
        code.extend_from_slice(&(COMMON.wrapping_sub(from) as u32).to_le_bytes());
        mem.write_bytes(usize_of(stub), &code);
        let (target, ist) = if v == INTERRUPT {
            (INTERRUPTED, 2)
        } else {
            (stub, 1)
        };
        let gate = (target & 0xffff)
            | (u64::from(sel::CODE) << 16)
            | if long { ist << 32 } else { 0 }
            | (0xee00 << 32)
            | ((target >> 16) << 48);
        if long {
            mem.write(usize_of(at::IDT) + usize::from(v) * 16, gate);
        } else {
            mem.write(usize_of(at::IDT) + usize::from(v) * 8, gate);
        }
    }
}

/// Present, writable, for user mode, accessed, dirty.
pub const OWN_ENTRY: u64 = 0x67;

/// The dispatcher's page tables: their pages and what is in those.
#[must_use]
pub fn own_tables() -> Vec<(u64, Vec<u8>)> {
    let mut leaves = vec![0u64; 512];
    let mut map = |linear: u64, gpa: u64, flags: u64| leaves[usize_of(linear >> 12)] = gpa | flags;
    for page in (at::CODE..at::OWN_END).step_by(0x1000) {
        let user = (at::CODE_USER..at::GDT).contains(&page);
        map(page, page, if user { 0x67 } else { 0x63 });
    }
    for (i, gpa) in at::POOL.iter().enumerate() {
        map(at::alias(i), *gpa, 0x63);
    }
    let one = |entry: u64| {
        let mut page = vec![0u8; 0x1000];
        page[..8].copy_from_slice(&entry.to_le_bytes());
        page
    };
    let long = leaves.iter().flat_map(|e| e.to_le_bytes()).collect();
    let mut short: Vec<u8> = leaves
        .iter()
        .flat_map(|e| u32::try_from(*e).unwrap_or(0).to_le_bytes())
        .collect();
    short.resize(0x1000, 0);
    vec![
        (at::OWN_PDPT, one(at::OWN_PD | OWN_ENTRY)),
        (at::OWN_PD, one(at::OWN_PT | OWN_ENTRY)),
        (at::OWN_PT, long),
        (at::OWN_PT32, short),
    ]
}

/// The first entry of each root.
#[must_use]
pub fn root_entry(format: Format) -> u64 {
    match format {
        Format::Bits32 => at::OWN_PT32 | OWN_ENTRY,
        Format::Pae => at::OWN_PD | 1,
        Format::Long => at::OWN_PDPT | OWN_ENTRY,
    }
}

fn write_tables(mem: &Mapping) {
    for (gpa, bytes) in own_tables() {
        mem.write_bytes(usize_of(gpa), &bytes);
    }
}

/// Sets the segments and tables of a vCPU.
pub fn set_segments(s: &mut kb::kvm_sregs, long: bool, ldt: u64) {
    let seg = |selector: u16, ty: u8, dpl: u8| {
        let code = ty >= 8;
        crate::guest::segment(
            selector,
            ty,
            u8::from(!(long && code)),
            u8::from(long && code),
            dpl,
            true,
        )
    };
    s.cs = seg(sel::CODE, 11, 0);
    s.ss = seg(sel::DATA, 3, 0);
    let data = seg(sel::USER_DATA, 3, 3);
    (s.ds, s.es, s.fs, s.gs) = (data, data, data, data);
    s.tr = kb::kvm_segment {
        base: at::TSS,
        limit: 0x67,
        selector: sel::TSS,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    s.ldt = kb::kvm_segment {
        base: ldt,
        limit: 0xfff,
        selector: sel::LDT,
        type_: 2,
        present: 1,
        ..Default::default()
    };
    s.gdt = kb::kvm_dtable {
        base: at::GDT,
        limit: 0x3f,
        ..Default::default()
    };
    s.idt = kb::kvm_dtable {
        base: at::IDT,
        limit: 0xfff,
        ..Default::default()
    };
}
