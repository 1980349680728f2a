// SPDX-License-Identifier: GPL-2.0

//! The guest's code, and where it keeps what.

use selftests::guest::at;
use selftests::guest_code;

/// Where things are in the guest.
pub(crate) mod place {
    use super::at;
    pub const MAIN: u64 = at::CODE;
    pub const OTHER: u64 = at::CODE + 0x1000;
    pub const WRITE_REGISTER: u64 = at::CODE + 0x2000;
    pub const STUBS: u64 = at::CODE + 0x2400;
    pub const INTERRUPT: u64 = at::CODE + 0x2800;
    pub const UNDEFINED: u64 = at::CODE + 0x2c00;
    pub const FAULT: u64 = at::CODE + 0x2d00;
    pub const STEP: u64 = at::CODE + 0x2e00;
    pub const DATA: u64 = at::DATA;
    pub const PAGES: u64 = at::DATA + 0x1000;
    pub const PT: u64 = at::DATA + 0x3000;
    pub const PD: u64 = at::DATA + 0x4000;
    pub const PDPT: u64 = at::DATA + 0x5000;
    pub const OTHER_STACK: u64 = 0x3_0000;
    /// 1 MiB that the guest writes to.
    pub const WASTE: u64 = 0x8_0000;
    /// Linear addresses: one that nothing maps, and one whose page changes.
    pub const NOWHERE: u64 = 1 << 39;
    pub const ALIAS: u64 = 2 << 39;
}

/// Offsets in the data.
pub(crate) mod data {
    pub const TURNS: usize = 0;
    pub const TICKS: usize = 8;
    pub const UNDEFINED: usize = 16;
    pub const FAULTS: usize = 24;
    pub const PONGS: usize = 32;
    pub const PINGS: usize = 40;
    pub const DEADLINES: usize = 48;
    pub const LINES: usize = 56;
    pub const FLAGS: usize = 64;
    pub const PIT: usize = 72;
    pub const ADDRESSES: usize = 80;
    pub const PERIOD: usize = 88;
    pub const STEPS: usize = 96;
    pub const WRITE_REGISTER: usize = 104;
    pub const LATER: usize = 112;
    pub const SUM: usize = 120;
    pub const STATE: usize = 128;
    pub const BACK: usize = 136;
    pub const AVX: usize = 0x100;
    pub const SSE: usize = 0x120;
    pub const X87: usize = 0x130;
    pub const ONES: usize = 0x140;
    pub const STRING: usize = 0x200;
}

/// What the guest has, and uses.
pub(crate) mod flag {
    pub const APIC: u64 = 1;
    pub const SMP: u64 = 2;
    pub const LINE: u64 = 4;
    pub const AVX: u64 = 8;
    pub const IOAPIC: u64 = 16;
    pub const X2APIC: u64 = 32;
}

pub(crate) const PORT: u16 = 0x80;
pub(crate) const STRING_PORT: u16 = 0x82;
pub(crate) const REQUEST_PORT: u16 = 0x84;
pub(crate) const ACK_PORT: u16 = 0x86;
pub(crate) const DONE_PORT: u16 = 0x88;

pub(crate) const TICK: u8 = 0x40;
pub(crate) const DEADLINE: u8 = 0x41;
pub(crate) const PING: u8 = 0x50;
pub(crate) const PONG: u8 = 0x51;
pub(crate) const LINE: u8 = 0x61;
pub(crate) const PIT: u8 = 0x62;
pub(crate) const GSI: u32 = 10;

pub(crate) const FACTOR: u64 = 6_364_136_223_846_793_005;
pub(crate) const ADDEND: u64 = 1_442_695_040_888_963_407;

// EDI: a register of the local APIC, EAX: its value; EDX: the upper half, of the command register.
guest_code!(write_register, ".code64",
    "push rcx",
    "test dword ptr [{D} + {FLAGS}], {X2}",
    "jz 2f",
    "mov ecx, edi",
    "shr ecx, 4",
    "add ecx, 0x800",
    "wrmsr",
    "pop rcx",
    "ret",
    "2: mov ecx, 0xfee00000",
    "cmp edi, 0x300",
    "jne 3f",
    "shl edx, 24",
    "mov [rcx + 0x310], edx",
    "3: mov [rcx + rdi], eax",
    "pop rcx",
    "ret";
    D = place::DATA, FLAGS = data::FLAGS, X2 = flag::X2APIC,
);

guest_code!(main_code, ".code64",
    "mov r15d, {D}",
    "xor r14d, r14d",
    "fninit",
    "fldz",
    "pxor xmm2, xmm2",
    "movdqu xmm3, [r15 + {ONES} + 32]",
    "test dword ptr [r15 + {FLAGS}], {AVX}",
    "jz 2f",
    "vxorpd ymm0, ymm0, ymm0",
    "vmovupd ymm1, [r15 + {ONES}]",
    "2: test dword ptr [r15 + {FLAGS}], {APIC}",
    "jz 4f",
    "test dword ptr [r15 + {FLAGS}], {X2}",
    "jz 3f",
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0x400",
    "wrmsr",
    // Software enable; a periodic timer.
    "3: xor edx, edx",
    "mov edi, 0xf0",
    "mov eax, 0x1ff",
    "call qword ptr [r15 + {WRITE}]",
    "mov edi, 0x3e0",
    "mov eax, 0xb",
    "call qword ptr [r15 + {WRITE}]",
    "mov edi, 0x320",
    "mov eax, 0x20000 + {TICK}",
    "call qword ptr [r15 + {WRITE}]",
    "mov edi, 0x380",
    "mov eax, [r15 + {PERIOD}]",
    "call qword ptr [r15 + {WRITE}]",
    "test dword ptr [r15 + {FLAGS}], {IOAPIC}",
    "jz 4f",
    // No PIC. A level-triggered line, and the PIT at 1 kHz.
    "mov al, 0xff",
    "out 0x21, al",
    "out 0xa1, al",
    "mov ecx, 0xfec00000",
    "mov dword ptr [rcx], 0x10 + 2 * {GSI}",
    "mov dword ptr [rcx + 16], 0x8000 + {LINE}",
    "mov dword ptr [rcx], 0x10",
    "mov dword ptr [rcx + 16], {PIT}",
    "mov al, 0x34",
    "out 0x43, al",
    "mov al, 0xa9",
    "out 0x40, al",
    "mov al, 0x04",
    "out 0x40, al",
    "4: sti",
    // What is computed.
    "20: imul r8, r9",
    "add r8, r10",
    "fld1",
    "faddp st(1), st",
    "paddq xmm2, xmm3",
    "test dword ptr [r15 + {FLAGS}], {AVX}",
    "jz 2f",
    "vaddpd ymm0, ymm0, ymm1",
    // Devices.
    "2: mov eax, r14d",
    "out {P}, eax",
    "in eax, {P}",
    "rol r11, 7",
    "add r11, rax",
    "mov [r13], r14",
    "mov rax, [r13 + 8]",
    "rol r11, 7",
    "add r11, rax",
    "lea rdi, [r13 + 0x100]",
    "mov eax, r14d",
    "mov ecx, 5",
    "rep stosd",
    "lea rsi, [r13 + 0x200]",
    "lea rdi, [r15 + {STRING}]",
    "mov ecx, 9",
    "rep movsb",
    "rol r11, 7",
    "add r11, [r15 + {STRING}]",
    "lea rsi, [r15 + {STRING}]",
    "mov ecx, 8",
    "mov edx, {SP}",
    "rep outsb",
    "lea rdi, [r15 + {STRING} + 16]",
    "mov ecx, 8",
    "rep insb",
    "rol r11, 7",
    "add r11, [r15 + {STRING} + 16]",
    // Memory, all over.
    "mov ecx, 16",
    "imul eax, r14d, 0x7310",
    "2: add eax, 0x9008",
    "and eax, 0xffff8",
    "add [rax + {WASTE}], r14",
    "dec ecx",
    "jnz 2b",
    // Exceptions; a step over an instruction that exits.
    "ud2",
    "mov al, [r12]",
    "pushfq",
    "or qword ptr [rsp], 0x100",
    "popfq",
    "out {P}, eax",
    // A page that changes.
    "mov eax, r14d",
    "and eax, 1",
    "shl eax, 12",
    "add eax, {PAGES} + 3",
    "mov [{PT}], rax",
    "invlpg [rbp]",
    "rol r11, 7",
    "add r11, [rbp]",
    // The counter does not go back.
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "cmp rax, rbx",
    "jae 2f",
    "mov qword ptr [r15 + {BACK}], rax",
    "2: mov rbx, rax",
    "test dword ptr [r15 + {FLAGS}], {APIC}",
    "jz 6f",
    // An IPI, to the other vCPU or to this one.
    "mov edi, 0x300",
    "mov eax, 0x4000 + {PING}",
    "xor edx, edx",
    "test dword ptr [r15 + {FLAGS}], {SMP}",
    "jz 2f",
    "inc edx",
    "2: call qword ptr [r15 + {WRITE}]",
    "test dword ptr [r15 + {FLAGS}], {SMP}",
    "jz 6f",
    "test r14d, 1",
    "jnz 3f",
    "2: pause",
    "cmp [r15 + {PONGS}], r14",
    "jbe 2b",
    "jmp 6f",
    "3: cli",
    "cmp [r15 + {PONGS}], r14",
    "ja 4f",
    "sti",
    "hlt",
    "jmp 3b",
    "4: sti",
    // An interrupt of a device.
    "6: test dword ptr [r15 + {FLAGS}], {LINED}",
    "jz 7f",
    "out {RQ}, al",
    "2: pause",
    "cmp [r15 + {LINES}], r14",
    "jbe 2b",
    // The timers go on.
    "7: test r14d, 7",
    "jnz 9f",
    "test dword ptr [r15 + {FLAGS}], {APIC}",
    "jnz 2f",
    "hlt",
    "jmp 9f",
    "2: mov rax, [r15 + {TICKS}]",
    "2: cli",
    "cmp [r15 + {TICKS}], rax",
    "jne 3f",
    "sti",
    "hlt",
    "jmp 2b",
    "3: sti",
    "test dword ptr [r15 + {FLAGS}], {SMP}",
    "jz 4f",
    "mov rax, [r15 + {DEADLINES}]",
    "2: pause",
    "cmp [r15 + {DEADLINES}], rax",
    "je 2b",
    "4: test dword ptr [r15 + {FLAGS}], {IOAPIC}",
    "jz 9f",
    "mov rax, [r15 + {PITS}]",
    "2: pause",
    "cmp [r15 + {PITS}], rax",
    "je 2b",
    "9: inc r14",
    "cmp r14, [r15 + {TURNS}]",
    "jb 20b",
    "cli",
    "mov [r15 + {SUM}], r11",
    "mov [r15 + {STATE}], r8",
    "movdqu [r15 + {SSE}], xmm2",
    "fistp qword ptr [r15 + {X87}]",
    "test dword ptr [r15 + {FLAGS}], {AVX}",
    "jz 2f",
    "vmovupd [r15 + {AVXS}], ymm0",
    "2: out {DONE}, al",
    "jmp 2b";
    D = place::DATA, ONES = data::ONES, FLAGS = data::FLAGS, AVX = flag::AVX, APIC = flag::APIC,
    X2 = flag::X2APIC, WRITE = data::WRITE_REGISTER, TICK = TICK, PERIOD = data::PERIOD,
    IOAPIC = flag::IOAPIC, GSI = GSI, LINE = LINE, PIT = PIT, P = PORT, STRING = data::STRING,
    SP = STRING_PORT, PAGES = place::PAGES, PT = place::PT, BACK = data::BACK, PING = PING,
    SMP = flag::SMP, PONGS = data::PONGS, LINED = flag::LINE, RQ = REQUEST_PORT,
    LINES = data::LINES, TICKS = data::TICKS, DEADLINES = data::DEADLINES, PITS = data::PIT,
    TURNS = data::TURNS, SUM = data::SUM, STATE = data::STATE, SSE = data::SSE, X87 = data::X87,
    AVXS = data::AVX, DONE = DONE_PORT, WASTE = place::WASTE,
);

guest_code!(other_code, ".code64",
    "mov r15d, {D}",
    "test dword ptr [r15 + {FLAGS}], {X2}",
    "jz 3f",
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0x400",
    "wrmsr",
    "3: xor edx, edx",
    "mov edi, 0xf0",
    "mov eax, 0x1ff",
    "call qword ptr [r15 + {WRITE}]",
    "mov edi, 0x320",
    "mov eax, 0x40000 + {DEADLINE}",
    "call qword ptr [r15 + {WRITE}]",
    "mfence",
    "rdtsc",
    "add eax, [r15 + {LATER}]",
    "adc edx, 0",
    "mov ecx, 0x6e0",
    "wrmsr",
    "2: sti",
    "hlt",
    "jmp 2b";
    D = place::DATA, FLAGS = data::FLAGS, X2 = flag::X2APIC, WRITE = data::WRITE_REGISTER,
    DEADLINE = DEADLINE, LATER = data::LATER,
);

// The stubs have pushed the offset of the counter.
guest_code!(interrupt, ".code64",
    "push rax",
    "push rcx",
    "push rdx",
    "push rdi",
    "push r15",
    "mov r15d, {D}",
    "mov rax, [rsp + 40]",
    "inc qword ptr [r15 + rax]",
    "cmp eax, {LINES}",
    "jne 2f",
    "out {ACK}, al",
    "2: cmp eax, {DEADLINES}",
    "jne 2f",
    "rdtsc",
    "add eax, [r15 + {LATER}]",
    "adc edx, 0",
    "mov ecx, 0x6e0",
    "wrmsr",
    "jmp 3f",
    "2: cmp eax, {PINGS}",
    "jne 3f",
    "test dword ptr [r15 + {FLAGS}], {SMP}",
    "jz 3f",
    "mov edi, 0x300",
    "mov eax, 0x4000 + {PONG}",
    "xor edx, edx",
    "call qword ptr [r15 + {WRITE}]",
    "3: test dword ptr [r15 + {FLAGS}], {APIC}",
    "jz 4f",
    "mov edi, 0xb0",
    "xor eax, eax",
    "xor edx, edx",
    "call qword ptr [r15 + {WRITE}]",
    "4: pop r15",
    "pop rdi",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 8",
    "iretq";
    D = place::DATA, LINES = data::LINES, ACK = ACK_PORT, DEADLINES = data::DEADLINES,
    LATER = data::LATER, PINGS = data::PINGS, FLAGS = data::FLAGS, SMP = flag::SMP, PONG = PONG,
    WRITE = data::WRITE_REGISTER, APIC = flag::APIC,
);

guest_code!(undefined, ".code64",
    "inc qword ptr [{D} + {N}]",
    "add qword ptr [rsp], 2",
    "iretq";
    D = place::DATA, N = data::UNDEFINED,
);

guest_code!(fault, ".code64",
    "push rax",
    "mov rax, cr2",
    "add [{D} + {A}], rax",
    "inc qword ptr [{D} + {N}]",
    "pop rax",
    "add rsp, 8",
    "add qword ptr [rsp], 4",
    "iretq";
    D = place::DATA, A = data::ADDRESSES, N = data::FAULTS,
);

guest_code!(stepped, ".code64",
    "inc qword ptr [{D} + {N}]",
    "and qword ptr [rsp + 16], ~0x100",
    "iretq";
    D = place::DATA, N = data::STEPS,
);

/// Registers that the guest leaves alone.
pub(crate) const UNUSED_MSRS: [(u32, u64); 5] = [
    (0xc000_0102, 0x1234_5678_9abc),
    (0xc000_0082, 0xffff_8000_1234_5678),
    (0x174, 0x4321),
    (0x175, 0x1_2345_6789),
    (0x277, 0x0706_0504_0100_0606),
];
pub(crate) const UNUSED_DR: [u64; 4] = [0x1111, 0x2222_2222_2222, 0x3333, 0x4444];

/// What lies where in the guest.
pub(crate) fn image() -> [(u64, &'static [u8]); 7] {
    [
        (place::MAIN, main_code()),
        (place::OTHER, other_code()),
        (place::WRITE_REGISTER, write_register()),
        (place::INTERRUPT, interrupt()),
        (place::UNDEFINED, undefined()),
        (place::FAULT, fault()),
        (place::STEP, stepped()),
    ]
}
