// SPDX-License-Identifier: GPL-2.0

//! Machines that are saved in the middle of anything, and go on elsewhere: in another process, in another
//! VM, on the other device.
//!
//! A guest computes, and uses everything that can be half done: ports, device memory, strings on both,
//! exceptions, single steps, interrupts of timers, of another vCPU and of devices. It hops from process to
//! process at random moments until it is done. What it has read, written, counted and computed is known
//! beforehand, so that anything that is lost or comes twice shows; a lost wake-up stops it.

use kvm_bindings as kb;
use selftests::dirty::{clear_log, get_log, Bitmap, Protect};
use selftests::guest::{at, sel, set_gate, usize_of, PORT_EXCEPTION};
use selftests::host::{gettid, interrupting_handler, kick, Rng};
use selftests::machine::{cr, decode, set_special_pages, start_vcpu, Exit, Mode};
use selftests::mem::{Mapping, PAGE};
use selftests::ring::{self, Ring};
use selftests::snapshot::{self, Chips, Order, Snapshot};
use selftests::vm::{Cpuid, Kvm, Vcpu, Vm};
use selftests::{ensure, ensure_eq, fail, guest, guest_code, skip, sys, tests};
use selftests::{Env, Outcome, Verdict};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

/// Where things are in the guest.
mod place {
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
mod data {
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
mod flag {
    pub const APIC: u64 = 1;
    pub const SMP: u64 = 2;
    pub const LINE: u64 = 4;
    pub const AVX: u64 = 8;
    pub const IOAPIC: u64 = 16;
    pub const X2APIC: u64 = 32;
}

const PORT: u16 = 0x80;
const STRING_PORT: u16 = 0x82;
const REQUEST_PORT: u16 = 0x84;
const ACK_PORT: u16 = 0x86;
const DONE_PORT: u16 = 0x88;

const TICK: u8 = 0x40;
const DEADLINE: u8 = 0x41;
const PING: u8 = 0x50;
const PONG: u8 = 0x51;
const LINE: u8 = 0x61;
const PIT: u8 = 0x62;
const GSI: u32 = 10;

const FACTOR: u64 = 6_364_136_223_846_793_005;
const ADDEND: u64 = 1_442_695_040_888_963_407;

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

/// What a device answers to the `n`th access of a kind.
fn answer(kind: u64, n: u64) -> u64 {
    let mut rng = Rng::new(kind << 48 | n);
    rng.number();
    rng.number()
}

fn bytes(kind: u64, from: u64, count: u64) -> Vec<u8> {
    (from..from + count)
        .map(|n| answer(kind, n).to_le_bytes()[3])
        .collect()
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    for (to, from) in word.iter_mut().zip(bytes) {
        *to = *from;
    }
    u64::from_le_bytes(word)
}

/// The devices of the VMM: how often each was accessed.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Devices {
    outs: u64,
    ins: u64,
    writes: u64,
    reads: u64,
    stores: u64,
    loaded: u64,
    string_outs: u64,
    string_ins: u64,
    requests: u64,
    acks: u64,
    halts: u64,
    /// An interrupt is to be queued.
    wanted: bool,
    done: bool,
}

impl Devices {
    /// Does what the vCPU has left for.
    fn handle(&mut self, vm: &Vm, vcpu: &Vcpu, chips: Chips) -> Outcome {
        match decode(vcpu) {
            Exit::Out {
                port: PORT, data, ..
            } => {
                // Twice each turn.
                let turn = self.outs / 2;
                let second = self.outs % 2 == 1;
                ensure!(
                    second || word(&data) == turn,
                    "OUT {data:x?} in turn {turn:#x}"
                );
                self.outs += 1;
            }
            Exit::Out {
                port: STRING_PORT,
                data,
                ..
            } => {
                for byte in data {
                    let n = self.string_outs;
                    let want = bytes(3, n / 8 * 9 + n % 8, 1)[0];
                    ensure_eq!(byte, want, "byte {n} of OUTSB");
                    self.string_outs += 1;
                }
            }
            Exit::Out {
                port: REQUEST_PORT, ..
            } => {
                self.requests += 1;
                if chips == Chips::Full {
                    line(vm, 1)?;
                } else {
                    self.wanted = true;
                }
            }
            Exit::Out { port: ACK_PORT, .. } => {
                self.acks += 1;
                if chips == Chips::Full {
                    line(vm, 0)?;
                }
            }
            Exit::Out {
                port: DONE_PORT, ..
            } => self.done = true,
            Exit::In { port: PORT, .. } => {
                vcpu.set_io_data(&answer(1, self.ins).to_le_bytes()[..4]);
                self.ins += 1;
            }
            Exit::In {
                port: STRING_PORT,
                count,
                ..
            } => {
                vcpu.set_io_data(&bytes(4, self.string_ins, count.into()));
                self.string_ins += u64::from(count);
            }
            Exit::MmioWrite {
                addr: at::MMIO,
                data,
            } => {
                ensure_eq!(word(&data), self.writes, "a write");
                self.writes += 1;
            }
            Exit::MmioWrite { addr, data } => {
                let (turn, n) = (self.stores / 5, self.stores % 5);
                ensure_eq!(
                    (addr - at::MMIO, word(&data)),
                    (0x100 + 4 * n, turn),
                    "store {n} of turn {turn:#x}"
                );
                self.stores += 1;
            }
            Exit::MmioRead { addr, len } if addr == at::MMIO + 8 => {
                ensure_eq!(len, 8, "bytes of a read");
                reply(vcpu, &answer(2, self.reads).to_le_bytes());
                self.reads += 1;
            }
            Exit::MmioRead { addr, len } => {
                let n = self.loaded % 9;
                ensure_eq!(addr - at::MMIO, 0x200 + n, "address of MOVSB");
                reply(vcpu, &bytes(3, self.loaded, len.into()));
                self.loaded += u64::from(len);
            }
            Exit::Hlt => self.halts += 1,
            // Whoever watches harvests it.
            Exit::Other(kb::KVM_EXIT_DIRTY_RING_FULL) => {
                std::thread::sleep(Duration::from_micros(100));
            }
            Exit::IrqWindow => {
                vcpu.interrupt(LINE.into())?;
                self.wanted = false;
            }
            Exit::Out { port, .. } if port == PORT_EXCEPTION => {
                fail!("an exception that none expects\n{:x?}", vcpu.regs()?)
            }
            exit => fail!("exit {exit:x?}\n{:x?}", vcpu.regs()?),
        }
        Ok(())
    }
}

fn reply(vcpu: &Vcpu, data: &[u8]) {
    // SAFETY: The last exit was a read of device memory, so `mmio` is the valid member.
    let mmio = unsafe { &mut vcpu.kvm_run_mut().__bindgen_anon_1.mmio };
    mmio.data[..data.len()].copy_from_slice(data);
}

fn line(vm: &Vm, level: u32) -> Result<(), sys::Error> {
    let mut irq = kb::kvm_irq_level {
        level,
        ..Default::default()
    };
    irq.__bindgen_anon_1.irq = GSI;
    vm.fd.ioctl_ref(sys::KVM_IRQ_LINE, &irq)?;
    Ok(())
}

/// A guest on its way.
struct Journey {
    chips: Chips,
    vcpus: usize,
    flags: u64,
    turns: u64,
    /// The guest's memory, then [`Luggage`]: shared with the processes that run it.
    memory: Mapping,
    cpuid: Box<Cpuid>,
}

/// What else goes from process to process.
#[repr(C)]
#[derive(Clone, Copy)]
struct Luggage {
    snapshot: Snapshot,
    devices: Devices,
    message: [u8; 1024],
}

/// When a process stops.
#[derive(Debug, Clone, Copy)]
enum Stop {
    /// After so many microseconds.
    After(u64),
    /// When the first vCPU has left so often.
    Exits(u64),
    /// When it is done, or somebody else says so.
    Never,
}

impl Journey {
    fn new(
        chips: Chips,
        vcpus: usize,
        flags: u64,
        turns: u64,
        cpuid: Box<Cpuid>,
    ) -> Result<Self, Verdict> {
        let memory = Mapping::new(
            at::SIZE + size_of::<Luggage>().next_multiple_of(0x1000),
            true,
        )?;
        let flags = flags
            | match chips {
                Chips::None => flag::LINE,
                Chips::Split => flag::APIC,
                Chips::Full => flag::APIC | flag::LINE | flag::IOAPIC,
            }
            | if vcpus > 1 { flag::SMP } else { 0 };
        Ok(Journey {
            chips,
            vcpus,
            flags,
            turns,
            memory,
            cpuid,
        })
    }

    fn luggage(&self) -> &mut Luggage {
        // SAFETY: The mapping has room for it, any bytes make one, and one process at a time has it.
        unsafe { &mut *((self.memory.addr() + at::SIZE) as *mut Luggage) }
    }

    fn machine(&self, kvm: &Kvm) -> Result<(Vm, Vec<Vcpu>), Verdict> {
        self.machine_with(kvm, |_| Ok(()))
    }

    /// A machine whose VM is prepared by `prepare`.
    fn machine_with(
        &self,
        kvm: &Kvm,
        prepare: impl FnOnce(&Vm) -> Outcome,
    ) -> Result<(Vm, Vec<Vcpu>), Verdict> {
        let vm = kvm.create_vm()?;
        set_special_pages(&vm)?;
        prepare(&vm)?;
        snapshot::create_chips(&vm, self.chips)?;
        vm.set_memory(0, 0, 0, at::SIZE as u64, self.memory.addr() as u64)?;
        let vcpus = snapshot::create_vcpus(&vm, &self.cpuid, self.vcpus)?;
        Ok((vm, vcpus))
    }

    fn put(&self, offset: usize, value: u64) {
        self.memory.write(usize_of(place::DATA) + offset, value);
    }

    fn get(&self, offset: usize) -> u64 {
        self.memory.read(usize_of(place::DATA) + offset)
    }

    /// Code, tables and registers for the beginning; the first snapshot.
    fn begin(&self, kvm: &Kvm) -> Outcome {
        let mem = &self.memory;
        for (place, code) in [
            (place::MAIN, main_code()),
            (place::OTHER, other_code()),
            (place::WRITE_REGISTER, write_register()),
            (place::INTERRUPT, interrupt()),
            (place::UNDEFINED, undefined()),
            (place::FAULT, fault()),
            (place::STEP, stepped()),
        ] {
            mem.write_bytes(usize_of(place), code);
        }
        ensure!(main_code().len() < 0x1000, "the code is too long");
        guest::write_gdt(mem);
        guest::write_idt(mem, true);
        guest::write_page_tables(mem);
        for (vector, handler) in [(1, place::STEP), (6, place::UNDEFINED), (14, place::FAULT)] {
            set_gate(mem, vector, handler, sel::CODE64, true);
        }
        for (n, (vector, counter)) in (0u64..).zip([
            (TICK, data::TICKS),
            (DEADLINE, data::DEADLINES),
            (PING, data::PINGS),
            (PONG, data::PONGS),
            (LINE, data::LINES),
            (PIT, data::PIT),
        ]) {
            let stub = place::STUBS + 16 * n;
            let mut code = vec![0x68];
            code.extend_from_slice(&u32::try_from(counter).unwrap_or(0).to_le_bytes());
            code.push(0xe9);
            let distance = place::INTERRUPT - (stub + 10);
            code.extend_from_slice(&u32::try_from(distance).unwrap_or(0).to_le_bytes());
            mem.write_bytes(usize_of(stub), &code);
            set_gate(mem, vector, stub, sel::CODE64, true);
        }
        let table = guest::pte::P | guest::pte::W;
        mem.write(usize_of(at::PML4) + 16, place::PDPT | table);
        mem.write(usize_of(place::PDPT), place::PD | table);
        mem.write(usize_of(place::PD), place::PT | table);
        mem.write(usize_of(place::PAGES), answer(5, 0));
        mem.write(usize_of(place::PAGES) + 0x1000, answer(5, 1));

        let (vm, vcpus) = self.machine(kvm)?;
        let khz = u64::try_from(vcpus[0].fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?).unwrap_or(0);
        self.put(data::TURNS, self.turns);
        self.put(data::FLAGS, self.flags);
        self.put(data::PERIOD, 400_000);
        self.put(data::LATER, khz * 300 / 1000);
        self.put(data::WRITE_REGISTER, place::WRITE_REGISTER);
        for n in 0..4 {
            self.put(data::ONES + 8 * n, 1f64.to_bits());
            self.put(data::ONES + 32 + 8 * n, 1 + n as u64);
        }
        for (vcpu, (rip, rsp)) in vcpus
            .iter()
            .zip([(place::MAIN, at::STACK), (place::OTHER, place::OTHER_STACK)])
        {
            start_vcpu(vcpu, Mode::Long, rip)?;
            let mut regs = vcpu.regs()?;
            (regs.r8, regs.r9, regs.r10, regs.r11) = (1, FACTOR, ADDEND, 0);
            (regs.r12, regs.r13, regs.rbp, regs.rsp) =
                (place::NOWHERE, at::MMIO, place::ALIAS, rsp);
            vcpu.set_regs(&regs)?;
            if self.flags & flag::AVX != 0 {
                let mut sregs = vcpu.sregs()?;
                sregs.cr4 |= cr::OSXSAVE;
                vcpu.set_sregs(&sregs)?;
                let mut xcrs = vcpu.xcrs()?;
                xcrs.xcrs[0].value = 7;
                vcpu.set_xcrs(&xcrs)?;
            }
            for (index, value) in UNUSED_MSRS {
                ensure!(vcpu.set_msr(index, value)?, "write of MSR {index:#x}");
            }
            vcpu.set_debugregs(&kb::kvm_debugregs {
                db: UNUSED_DR,
                dr6: 0xffff_0ff0,
                dr7: 0x400,
                ..Default::default()
            })?;
            if self.chips != Chips::None {
                vcpu.set_mp_state(&kb::kvm_mp_state { mp_state: 0 })?;
            }
        }
        let luggage = self.luggage();
        luggage.devices = Devices::default();
        luggage.snapshot.take(kvm, &vm, &vcpus, self.chips)?;
        Ok(())
    }

    /// Lets the guest run in a new machine for a while; everything is in the luggage before and after.
    fn hop(&self, device: &str, stop: Stop, order: Order) -> Outcome {
        let kvm = Kvm::open(device)?;
        let (vm, vcpus) = self.machine(&kvm)?;
        let luggage = self.luggage();
        luggage.snapshot.put(&kvm, &vm, &vcpus, self.chips, order)?;
        self.stay(&vm, &vcpus, stop, || Ok(false))?;
        luggage.snapshot.take(&kvm, &vm, &vcpus, self.chips)?;
        Ok(())
    }

    /// Runs a machine until it is to stop, or `during`, which is called all the time, says so. Nothing
    /// is left to be completed then.
    fn stay(
        &self,
        vm: &Vm,
        vcpus: &[Vcpu],
        stop: Stop,
        mut during: impl FnMut() -> Result<bool, Verdict>,
    ) -> Outcome {
        interrupting_handler(libc::SIGUSR1)?;
        let stopping = &AtomicBool::new(false);
        let tids: &Vec<AtomicI32> = &vcpus.iter().map(|_| AtomicI32::new(0)).collect();
        let mut devices = self.luggage().devices;
        let mut watched = Ok(());
        let devices = std::thread::scope(|scope| {
            let first = scope.spawn(move || {
                tids[0].store(gettid(), Ordering::SeqCst);
                let result = self.run_first(vm, &vcpus[0], &mut devices, stop, stopping);
                stopping.store(true, Ordering::SeqCst);
                result.map(|()| devices)
            });
            for (vcpu, tid) in vcpus.iter().zip(tids).skip(1) {
                scope.spawn(move || {
                    tid.store(gettid(), Ordering::SeqCst);
                    // Nothing makes it leave but a signal, and a full ring.
                    while !stopping.load(Ordering::SeqCst) {
                        let _ = vcpu.run();
                    }
                });
            }
            let begin = Instant::now();
            loop {
                let over = first.is_finished();
                if !stopping.load(Ordering::SeqCst) {
                    let time = match stop {
                        Stop::After(us) => begin.elapsed() >= Duration::from_micros(us),
                        Stop::Exits(_) | Stop::Never => false,
                    };
                    let enough = during().unwrap_or_else(|verdict| {
                        watched = Err(verdict);
                        true
                    });
                    stopping.fetch_or(time || enough, Ordering::SeqCst);
                }
                if stopping.load(Ordering::SeqCst) {
                    for (vcpu, tid) in vcpus.iter().zip(tids) {
                        vcpu.set_immediate_exit(1);
                        kick(tid.load(Ordering::SeqCst), libc::SIGUSR1);
                    }
                }
                if over {
                    break;
                }
                std::thread::sleep(Duration::from_micros(100));
            }
            first
                .join()
                .unwrap_or_else(|_| Err(Verdict::Fail("a thread panicked".to_string())))
        })?;
        watched?;
        // A kick may have met a vCPU on its way out.
        for vcpu in vcpus {
            vcpu.set_immediate_exit(1);
            match vcpu.run() {
                Err(_) | Ok(kb::KVM_EXIT_DIRTY_RING_FULL) => {}
                Ok(reason) => fail!("exit {reason} with immediate_exit"),
            }
        }
        self.luggage().devices = devices;
        Ok(())
    }

    fn run_first(
        &self,
        vm: &Vm,
        vcpu: &Vcpu,
        devices: &mut Devices,
        stop: Stop,
        stopping: &AtomicBool,
    ) -> Outcome {
        let mut left = match stop {
            Stop::After(_) | Stop::Never => u64::MAX,
            Stop::Exits(n) => n,
        };
        loop {
            if left == 0 || devices.done {
                stopping.store(true, Ordering::SeqCst);
            }
            if stopping.load(Ordering::SeqCst) {
                vcpu.set_immediate_exit(1);
            }
            vcpu.kvm_run_mut().request_interrupt_window = u8::from(devices.wanted);
            match vcpu.run() {
                // What was asked for is completed, with immediate_exit.
                Err(e) if e.errno == libc::EINTR => {
                    if stopping.load(Ordering::SeqCst) {
                        return Ok(());
                    }
                }
                Err(e) => return Err(e.into()),
                Ok(_) => {
                    devices.handle(vm, vcpu, self.chips)?;
                    left = left.saturating_sub(1);
                }
            }
        }
    }

    /// The same in a process of its own.
    fn hop_away(&self, device: &str, stop: Stop, order: Order) -> Outcome {
        // SAFETY: This process has one thread.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let code = match self.hop(device, stop, order) {
                Ok(()) => 0,
                Err(Verdict::Fail(text) | Verdict::Skip(text)) => {
                    let message = &mut self.luggage().message;
                    message.fill(0);
                    for (to, from) in message.iter_mut().zip(text.bytes()) {
                        *to = from;
                    }
                    1
                }
            };
            // SAFETY: Ends the child at once.
            unsafe { libc::_exit(code) };
        }
        let luggage = self.luggage();
        let over = snapshot::wait_for(pid, 20_000);
        if !matches!(over, Ok(true)) {
            let text = luggage.message;
            let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
            fail!(
                "on {device}, {stop:?}, {order:?}: {over:?} {}; {:?}; turn {:x}, ticks {}, pings {}, \
                 pongs {}, deadlines {}, lines {}, pit {}",
                String::from_utf8_lossy(&text[..end]),
                luggage.devices,
                luggage.snapshot.vcpus[0].regs.r14,
                self.get(data::TICKS),
                self.get(data::PINGS),
                self.get(data::PONGS),
                self.get(data::DEADLINES),
                self.get(data::LINES),
                self.get(data::PIT)
            );
        }
        Ok(())
    }

    /// What must have come of it.
    fn check(&self) -> Outcome {
        let (mut state, mut sum) = (1u64, 0u64);
        for turn in 0..self.turns {
            state = state.wrapping_mul(FACTOR).wrapping_add(ADDEND);
            for read in [
                answer(1, turn) & 0xffff_ffff,
                answer(2, turn),
                word(&bytes(3, 9 * turn, 8)),
                word(&bytes(4, 8 * turn, 8)),
                answer(5, turn & 1),
            ] {
                sum = sum.rotate_left(7).wrapping_add(read);
            }
        }
        let n = self.turns;
        ensure_eq!(self.get(data::STATE), state, "what was computed");
        ensure_eq!(self.get(data::SUM), sum, "what was read");
        ensure_eq!(self.get(data::X87), n, "x87");
        ensure_eq!(
            [self.get(data::SSE), self.get(data::SSE + 8)],
            [n, 2 * n],
            "SSE"
        );
        if self.flags & flag::AVX != 0 {
            for part in 0..4 {
                let got = f64::from_bits(self.get(data::AVX + 8 * part));
                ensure!((got - n as f64).abs() < 0.5, "AVX, part {part}: {got}");
            }
        }
        ensure_eq!(self.get(data::UNDEFINED), n, "#UD");
        ensure_eq!(self.get(data::FAULTS), n, "page faults");
        ensure_eq!(
            self.get(data::ADDRESSES),
            place::NOWHERE.wrapping_mul(n),
            "their addresses"
        );
        ensure_eq!(self.get(data::STEPS), n, "single steps");
        ensure_eq!(self.get(data::BACK), 0, "a counter that went back");
        if self.flags & flag::APIC != 0 {
            ensure_eq!(self.get(data::PINGS), n, "IPIs");
        }
        if self.flags & flag::SMP != 0 {
            ensure_eq!(self.get(data::PONGS), n, "IPIs back");
        }
        let luggage = self.luggage();
        if self.flags & flag::LINE != 0 {
            let devices = luggage.devices;
            ensure_eq!(
                (self.get(data::LINES), devices.requests, devices.acks),
                (n, n, n),
                "interrupts of the device"
            );
        }
        for state in &luggage.snapshot.vcpus[..self.vcpus] {
            for (index, value) in UNUSED_MSRS {
                ensure_eq!(state.msr(index), Some(value), "MSR {index:#x}");
            }
        }
        Ok(())
    }

    /// From process to process until the guest is done, on the devices in turns.
    fn travel(&self, devices: &[&str], rng: &mut Rng) -> Outcome {
        self.begin(&Kvm::open(devices[0])?)?;
        let mut hops = 0;
        while !self.luggage().devices.done {
            let stop = if rng.below(2) == 0 {
                Stop::After(rng.below(4000))
            } else {
                Stop::Exits(1 + rng.below(40))
            };
            let order = if rng.below(2) == 0 {
                Order::Vmm
            } else {
                Order::Tests
            };
            let device = devices[hops % devices.len()];
            self.hop_away(device, stop, order)
                .map_err(|verdict| match verdict {
                    Verdict::Fail(text) => Verdict::Fail(format!("hop {hops}: {text}")),
                    skip => skip,
                })?;
            hops += 1;
        }
        println!("# {hops} hops");
        self.check()
    }
}

/// How a move finds what was written meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Log {
    Bitmap(Protect),
    Rings,
}

/// Bytes of a ring.
const RING: usize = 16 << 10;

/// Copies a guest's memory while it runs, then what it has written since, until little is left; stops it,
/// and lets it go on from the copy. Nothing is taken along but what the log says.
fn relocate(env: &Env, log: Log, both: bool) -> Outcome {
    let devices = devices(env, both)?;
    let (kvm, target) = (env.open()?, Kvm::open(devices[devices.len() - 1])?);
    let cpuid = snapshot::common_cpuid(&kvm, &target)?;
    let here = Journey::new(Chips::Split, 2, flag::X2APIC, 1 << 40, cpuid.clone())?;
    here.begin(&kvm)?;
    let (vm, vcpus) = here.machine_with(&kvm, |vm| match log {
        Log::Bitmap(protect) => protect.enable(&kvm, vm),
        Log::Rings => ring::enable(&kvm, vm, RING),
    })?;
    let mut rings = Vec::new();
    if log == Log::Rings {
        for vcpu in &vcpus {
            rings.push(Ring::new(vcpu, RING)?);
        }
    }
    let pages = at::SIZE / PAGE;
    let address = here.memory.addr() as u64;
    vm.set_memory(0, kb::KVM_MEM_LOG_DIRTY_PAGES, 0, at::SIZE as u64, address)?;
    let luggage = here.luggage();
    luggage
        .snapshot
        .put(&kvm, &vm, &vcpus, here.chips, Order::Vmm)?;

    let mut there = Journey::new(Chips::Split, 2, flag::X2APIC, 0, cpuid)?;
    let (from, to) = (&here.memory, &there.memory);
    let copy = |set: &Bitmap| {
        for page in set.pages() {
            let bytes = from.read_bytes(page * PAGE, PAGE);
            to.write_bytes(page * PAGE, &bytes);
        }
    };
    let harvest = |rings: &mut Vec<Ring>| -> Result<Bitmap, Verdict> {
        let Log::Bitmap(protect) = log else {
            let mut set = Bitmap::new(pages);
            for ring in rings {
                while let Some(entry) = ring.take() {
                    ensure!(entry.slot == 0 && entry.offset < pages as u64, "{entry:x?}");
                    set.set(usize_of(entry.offset));
                }
            }
            ring::reset(&vm)?;
            return Ok(set);
        };
        let set = get_log(&vm, 0, pages)?;
        if protect != Protect::Get {
            clear_log(&vm, 0, pages, &set)?;
        }
        Ok(set)
    };
    copy(&Bitmap::full(pages));
    let (mut rounds, mut copied) = (0, 0);
    here.stay(&vm, &vcpus, Stop::Never, || {
        let set = harvest(&mut rings)?;
        copied += set.pages().count();
        copy(&set);
        rounds += 1;
        Ok(rounds >= 6)
    })?;
    let last = harvest(&mut rings)?;
    copy(&last);
    println!(
        "# {rounds} rounds, {copied} pages, {} at last",
        last.pages().count()
    );
    ensure!(
        copied > rounds,
        "hardly anything was written: {copied} pages"
    );
    for page in 0..pages {
        let (was, is) = (
            here.memory.read_bytes(page * PAGE, PAGE),
            there.memory.read_bytes(page * PAGE, PAGE),
        );
        ensure!(was == is, "page {page:#x} was written and not logged");
    }
    luggage.snapshot.take(&kvm, &vm, &vcpus, here.chips)?;
    drop((rings, vcpus, vm));
    *there.luggage() = *luggage;
    // It has done as much as there was time for; there it does a little more.
    there.turns = luggage.snapshot.vcpus[0].regs.r14 + 50;
    there.put(data::TURNS, there.turns);
    there.hop(devices[devices.len() - 1], Stop::Never, Order::Vmm)?;
    there.check()
}

fn relocate_by_bitmap(env: &Env) -> Outcome {
    relocate(env, Log::Bitmap(Protect::Get), false)
}

fn relocate_by_clearing(env: &Env) -> Outcome {
    relocate(env, Log::Bitmap(Protect::InitiallySet), false)
}

fn relocate_by_rings(env: &Env) -> Outcome {
    relocate(env, Log::Rings, false)
}

fn relocate_across(env: &Env) -> Outcome {
    relocate(env, Log::Bitmap(Protect::Clear), true)
}

/// Registers that the guest leaves alone.
const UNUSED_MSRS: [(u32, u64); 5] = [
    (0xc000_0102, 0x1234_5678_9abc),
    (0xc000_0082, 0xffff_8000_1234_5678),
    (0x174, 0x4321),
    (0x175, 0x1_2345_6789),
    (0x277, 0x0706_0504_0100_0606),
];
const UNUSED_DR: [u64; 4] = [0x1111, 0x2222_2222_2222, 0x3333, 0x4444];

/// Both devices, this one first; or this one only.
fn devices<'a>(env: &'a Env, both: bool) -> Result<Vec<&'a str>, Verdict> {
    let mut devices = vec![env.device.as_str()];
    if both {
        let other = if env.device == "/dev/kvm" {
            "/dev/rkvm"
        } else {
            "/dev/kvm"
        };
        if Kvm::open(other).is_err() {
            skip!("there is no other device");
        }
        devices.push(other);
    }
    Ok(devices)
}

fn travel(env: &Env, chips: Chips, vcpus: usize, flags: u64, both: bool) -> Outcome {
    let devices = devices(env, both)?;
    let kvm = env.open()?;
    let cpuid = snapshot::common_cpuid(&kvm, &Kvm::open(devices[devices.len() - 1])?)?;
    let has_avx = cpuid.find(1, 0).is_some_and(|e| e.ecx & 1 << 28 != 0)
        && cpuid.find(0xd, 0).is_some_and(|e| e.eax & 7 == 7);
    let flags = flags | if has_avx { flag::AVX } else { 0 };
    let turns = env.fewer(20);
    let journey = Journey::new(chips, vcpus, flags, turns, cpuid)?;
    let mut rng = Rng::new(env.seed ^ flags ^ (vcpus as u64) << 8);
    journey.travel(&devices, &mut rng)
}

fn no_chips(env: &Env) -> Outcome {
    travel(env, Chips::None, 1, 0, false)
}

fn split_chips(env: &Env) -> Outcome {
    travel(env, Chips::Split, 1, flag::X2APIC, false)
}

fn split_chips_smp(env: &Env) -> Outcome {
    travel(env, Chips::Split, 2, 0, false)
}

fn all_chips(env: &Env) -> Outcome {
    travel(env, Chips::Full, 1, 0, false)
}

fn all_chips_smp(env: &Env) -> Outcome {
    travel(env, Chips::Full, 2, flag::X2APIC, false)
}

fn across_no_chips(env: &Env) -> Outcome {
    travel(env, Chips::None, 1, 0, true)
}

fn across_split(env: &Env) -> Outcome {
    travel(env, Chips::Split, 2, flag::X2APIC, true)
}

fn across_all(env: &Env) -> Outcome {
    travel(env, Chips::Full, 2, 0, true)
}

fn main() -> ExitCode {
    selftests::tap::main(
        "migrate",
        tests![
            no_chips,
            split_chips,
            split_chips_smp,
            all_chips,
            all_chips_smp,
            across_no_chips,
            across_split,
            across_all,
            relocate_by_bitmap,
            relocate_by_clearing,
            relocate_by_rings,
            relocate_across,
        ],
    )
}
