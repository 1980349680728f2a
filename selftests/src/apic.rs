// SPDX-License-Identifier: GPL-2.0

//! Guests with a local APIC in the kernel.
//!
//! A vCPU of such a guest executes one small operation at a time, in long mode, as the host asks for
//! it ([`Cpu::call`]): a register access, an MSR, STI, HLT. So a test reads as a list of what is done
//! to the APIC. Interrupts are counted, logged and acknowledged by a handler in the guest, for each
//! vCPU in a page of its own to which GS points ([`block`]).

use crate::check::Outcome;
use crate::guest::{self, at, usize_of, PORT, PORT_EXCEPTION};
use crate::host::{interrupting_handler, patient, sleep_ms};
use crate::machine::{decode, set_special_pages, start_vcpu, Exit, Mode};
use crate::mem::Mapping;
use crate::sys::{self, Error};
use crate::vm::{Kvm, Vcpu, Vm};
use crate::{ensure, fail, guest_code, skip, Env, Verdict};
use kvm_bindings as kb;

/// Where the registers are after a reset.
pub const BASE: u64 = 0xfee0_0000;

/// Registers by their offset in the page (SDM volume 3, table 12-1).
pub mod reg {
    #![allow(missing_docs)]
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const APR: u32 = 0x90;
    pub const PPR: u32 = 0xa0;
    pub const EOI: u32 = 0xb0;
    pub const LDR: u32 = 0xd0;
    pub const DFR: u32 = 0xe0;
    pub const SVR: u32 = 0xf0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const CMCI: u32 = 0x2f0;
    pub const ICR: u32 = 0x300;
    pub const ICR2: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_THERMAL: u32 = 0x330;
    pub const LVT_PMC: u32 = 0x340;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_LINT1: u32 = 0x360;
    pub const LVT_ERROR: u32 = 0x370;
    pub const INITIAL: u32 = 0x380;
    pub const CURRENT: u32 = 0x390;
    pub const DIVIDE: u32 = 0x3e0;
    pub const SELF_IPI: u32 = 0x3f0;
}

/// Fields of the interrupt command register.
pub mod icr {
    #![allow(missing_docs)]
    pub const FIXED: u32 = 0;
    pub const LOWEST: u32 = 1 << 8;
    pub const SMI: u32 = 2 << 8;
    pub const NMI: u32 = 4 << 8;
    pub const INIT: u32 = 5 << 8;
    pub const SIPI: u32 = 6 << 8;
    pub const LOGICAL: u32 = 1 << 11;
    pub const BUSY: u32 = 1 << 12;
    pub const ASSERT: u32 = 1 << 14;
    pub const LEVEL: u32 = 1 << 15;
    pub const SELF: u32 = 1 << 18;
    pub const ALL: u32 = 2 << 18;
    pub const OTHERS: u32 = 3 << 18;
}

/// MSRs.
pub mod msr {
    #![allow(missing_docs)]
    pub const APIC_BASE: u32 = 0x1b;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const X2APIC: u32 = 0x800;
    /// In `APIC_BASE`: the boot processor.
    pub const BSP: u64 = 1 << 8;
    /// In `APIC_BASE`: x2APIC mode.
    pub const EXTD: u64 = 1 << 10;
    /// In `APIC_BASE`: enabled.
    pub const EN: u64 = 1 << 11;
}

/// The mask bit of a local vector table entry.
pub const MASKED: u32 = 1 << 16;
/// In the timer's entry: periodic.
pub const PERIODIC: u32 = 1 << 17;
/// In the timer's entry: TSC deadline.
pub const DEADLINE: u32 = 2 << 17;
/// In the spurious vector register: the APIC is enabled by software.
pub const ENABLED: u32 = 1 << 8;

/// Which interrupt controllers the kernel has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chip {
    /// Local APICs, `KVM_CAP_SPLIT_IRQCHIP`.
    Split,
    /// Local APICs, I/O APIC and PICs, `KVM_CREATE_IRQCHIP`.
    Full,
}

/// A page for each vCPU, to which GS points.
pub mod block {
    /// The first vCPU's.
    pub const FIRST: u64 = crate::guest::at::FREE;
    /// All interrupts so far: u64. They are also the index into `LOG`.
    pub const TOTAL: u64 = 0x10;
    /// How the handler acknowledges: u32, see the constants.
    pub const EOI: u64 = 0x8;
    /// Code that the handler calls before it acknowledges, if not 0: u64. It may use RAX, RCX, RDX and
    /// RBX. The vector is in RAX.
    pub const HOOK: u64 = 0x20;
    /// What an operation likes to tell: 16 bytes.
    pub const REPLY: u64 = 0x40;
    /// For the test's own use: 128 bytes.
    pub const OWN: u64 = 0x80;
    /// The last 256 vectors: bytes.
    pub const LOG: u64 = 0x100;
    /// How often each vector came: 256 of u64.
    pub const COUNT: u64 = 0x400;
    /// `EOI`: not at all.
    pub const NONE: u32 = 0;
    /// `EOI`: by a write to memory.
    pub const MMIO: u32 = 1;
    /// `EOI`: by a write to an MSR.
    pub const MSR: u32 = 2;
}

/// Where a test may put code of its own: 8 KiB.
pub const OWN_CODE: u64 = at::CODE + 0x2000;
/// The top of the first vCPU's stack; 4 KiB each.
pub const STACKS: u64 = 0x8_1000;
/// The most vCPUs for which there are pages.
pub const MAX_CPUS: usize = 64;
const OPS: u64 = at::CODE + 0x1000;

guest_code!(interpreter, ".code64", "out {P}, al", "jmp rsi"; P = PORT);

macro_rules! ops {
    ($($(#[$doc:meta])* $name:ident, $func:ident: $($line:literal),+;)*) => {
        /// What a vCPU can be asked to do; see [`Cpu::call`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Op { $($(#[$doc])* $name),* }
        $(guest_code!($func, ".code64", $($line,)+ "jmp r15");)*
        const CODE: &[fn() -> &'static [u8]] = &[$($func),*];
    };
}

ops! {
    /// Nothing.
    Nop, op_nop: "nop";
    /// Reads 8 bits at `a`.
    Read8, op_read8: "movzx eax, byte ptr [rdi]";
    /// Reads 16 bits at `a`.
    Read16, op_read16: "movzx eax, word ptr [rdi]";
    /// Reads 32 bits at `a`.
    Read32, op_read32: "mov eax, [rdi]";
    /// Reads 64 bits at `a`.
    Read64, op_read64: "mov rax, [rdi]";
    /// Writes 8 bits, `b`, at `a`.
    Write8, op_write8: "mov [rdi], al";
    /// Writes 16 bits.
    Write16, op_write16: "mov [rdi], ax";
    /// Writes 32 bits.
    Write32, op_write32: "mov [rdi], eax";
    /// Writes 64 bits.
    Write64, op_write64: "mov [rdi], rax";
    /// Reads MSR `a`.
    Rdmsr, op_rdmsr: "mov ecx, edi", "rdmsr", "shl rdx, 32", "or rax, rdx";
    /// Writes `b` to MSR `a`.
    Wrmsr, op_wrmsr: "mov ecx, edi", "mov rdx, rax", "shr rdx, 32", "wrmsr";
    /// Reads CR8.
    ReadCr8, op_read_cr8: "mov rax, cr8";
    /// Writes `b` to CR8.
    WriteCr8, op_write_cr8: "mov cr8, rax";
    /// STI, and an instruction.
    Sti, op_sti: "sti", "nop";
    /// CLI.
    Cli, op_cli: "cli";
    /// STI, HLT, CLI: returns when an interrupt has been handled.
    Halt, op_halt: "sti", "hlt", "cli";
    /// HLT as interrupts are.
    HaltOnly, op_halt_only: "hlt";
    /// CPUID of leaf `a`, subleaf `b`: EBX << 32 | EAX; EDX << 32 | ECX goes to [`block::REPLY`].
    Cpuid, op_cpuid: "mov ecx, eax", "mov eax, edi", "cpuid", "mov gs:[0x40], ecx",
        "mov gs:[0x44], edx", "shl rbx, 32", "mov eax, eax", "or rax, rbx";
    /// Spins `b` times.
    Spin, op_spin: "2: pause", "dec rax", "jnz 2b";
    /// Spins until the u64 at `a` is at least `b`.
    Until, op_until: "2: pause", "cmp [rdi], rax", "jb 2b";
    /// Reads the time stamp counter.
    Rdtsc, op_rdtsc: "rdtsc", "shl rdx, 32", "or rax, rdx";
}

// Counts, logs, acknowledges. Exceptions other than NMI are reported to the host as the usual handler
// does it, with the vector, the error code and RIP where `Record` has them.
guest_code!(handler, ".code64",
    "push rax",
    "push rcx",
    "push rdx",
    "push rbx",
    "mov rax, [rsp + 32]",
    "cmp eax, 32",
    "jae 2f",
    "cmp eax, 2",
    "jne 5f",
    "2:",
    "inc qword ptr gs:[rax * 8 + 0x400]",
    "mov rcx, gs:[0x10]",
    "movzx edx, cl",
    "mov gs:[rdx + 0x100], al",
    "inc qword ptr gs:[0x10]",
    "mov rcx, gs:[0x20]",
    "test rcx, rcx",
    "jz 3f",
    "call rcx",
    "3:",
    "cmp dword ptr [rsp + 32], 2",
    "je 4f",
    "cmp dword ptr gs:[8], 1",
    "jb 4f",
    "ja 6f",
    "mov ecx, 0xfee000b0",
    "mov dword ptr [rcx], 0",
    "jmp 4f",
    "6:",
    "mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "4:",
    "pop rbx",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    "5:",
    "mov ebx, {R}",
    "mov [rbx], rax",
    "mov rax, [rsp + 40]",
    "mov [rbx + 8], rax",
    "mov rax, [rsp + 48]",
    "mov [rbx + 16], rax",
    "inc qword ptr [rbx + 48]",
    "out {P}, al",
    "mov [rsp + 48], r15",
    "jmp 4b";
    R = at::RECORD, P = PORT_EXCEPTION,
);

/// Skips the test where the device has no interrupt controllers.
///
/// # Errors
///
/// The skip.
pub fn need(kvm: &Kvm, chip: Chip) -> Outcome {
    let cap = match chip {
        Chip::Split => kb::KVM_CAP_SPLIT_IRQCHIP,
        Chip::Full => kb::KVM_CAP_IRQCHIP,
    };
    if kvm.capability(cap) <= 0 {
        skip!("no interrupt controllers in the kernel ({chip:?})");
    }
    Ok(())
}

/// Creates a VM's interrupt controllers.
///
/// # Errors
///
/// What the kernel answered.
pub fn create(vm: &Vm, chip: Chip) -> Result<(), Error> {
    match chip {
        Chip::Split => vm.enable_cap(kb::KVM_CAP_SPLIT_IRQCHIP, 24),
        Chip::Full => vm.fd.ioctl(sys::KVM_CREATE_IRQCHIP, 0).map(|_| ()),
    }
}

/// What came of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It is done; RAX.
    Done(u64),
    /// It raised an exception.
    Fault {
        /// The vector.
        vector: u64,
        /// The error code.
        error: u64,
    },
}

/// A general protection fault with error code 0.
pub const GP: Answer = Answer::Fault {
    vector: 13,
    error: 0,
};

/// A VM with local APICs in the kernel.
///
/// The order of the fields is the order in which they are dropped.
#[derive(Debug)]
pub struct Guest {
    /// The vCPUs, by number.
    pub vcpus: Vec<Vcpu>,
    /// The VM.
    pub vm: Vm,
    /// The device.
    pub kvm: Kvm,
    /// Guest-physical 0 onwards.
    pub mem: Mapping,
}

impl Guest {
    /// A VM with `n` vCPUs, all of them runnable and ready for operations. The APICs are as after a
    /// reset.
    ///
    /// # Errors
    ///
    /// A skip if the device has no interrupt controllers; what the kernel answered.
    pub fn new(env: &Env, chip: Chip, n: usize) -> Result<Self, Verdict> {
        Self::prepared(env, chip, n, |_| Ok(()))
    }

    /// As [`Guest::new`]; `prepare` sees the VM before it has vCPUs.
    ///
    /// # Errors
    ///
    /// As [`Guest::new`].
    pub fn prepared(
        env: &Env,
        chip: Chip,
        n: usize,
        prepare: impl FnOnce(&Vm) -> Outcome,
    ) -> Result<Self, Verdict> {
        let g = Self::build(env, chip, n, prepare)?;
        for id in 0..n {
            g.reset(id)?;
        }
        Ok(g)
    }

    /// A VM with `n` vCPUs as they are created: the first in real mode, the others not started.
    ///
    /// # Errors
    ///
    /// As [`Guest::new`].
    pub fn created(env: &Env, chip: Chip, n: usize) -> Result<Self, Verdict> {
        Self::build(env, chip, n, |_| Ok(()))
    }

    fn build(
        env: &Env,
        chip: Chip,
        n: usize,
        prepare: impl FnOnce(&Vm) -> Outcome,
    ) -> Result<Self, Verdict> {
        assert!(n <= MAX_CPUS);
        let kvm = env.open()?;
        need(&kvm, chip)?;
        let mem = Mapping::new(at::SIZE, false)?;
        let vm = kvm.create_vm()?;
        set_special_pages(&vm)?;
        vm.set_memory(0, 0, 0, mem.len() as u64, mem.addr() as u64)?;
        create(&vm, chip)?;
        prepare(&vm)?;
        guest::write_gdt(&mem);
        guest::write_idt(&mem, true);
        guest::write_page_tables(&mem);
        mem.write_bytes(usize_of(at::COMMON), handler());
        mem.write_bytes(usize_of(at::CODE), interpreter());
        for (i, code) in CODE.iter().enumerate() {
            assert!(code().len() <= 0x40);
            mem.write_bytes(usize_of(OPS) + i * 0x40, code());
        }
        let mut g = Guest {
            vcpus: vec![],
            vm,
            kvm,
            mem,
        };
        let cpuid = g.kvm.supported_cpuid()?;
        for id in 0..n {
            let vcpu = g.vm.create_vcpu(id)?;
            let mut own = cpuid.clone();
            set_apic_id(&mut own, id);
            vcpu.set_cpuid(&own)?;
            g.vcpus.push(vcpu);
        }
        Ok(g)
    }

    /// Makes vCPU `id` runnable and ready for operations, whatever it was doing.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn reset(&self, id: usize) -> Result<(), Error> {
        let vcpu = &self.vcpus[id];
        vcpu.set_mp_state(&kb::kvm_mp_state {
            mp_state: kb::KVM_MP_STATE_RUNNABLE,
        })?;
        start_vcpu(vcpu, Mode::Long, at::CODE)?;
        let mut s = vcpu.sregs()?;
        s.gs.base = self.block(id);
        vcpu.set_sregs(&s)?;
        let mut r = vcpu.regs()?;
        r.r15 = at::CODE;
        r.rsi = at::CODE;
        r.rsp = STACKS + id as u64 * 0x1000;
        vcpu.set_regs(&r)
    }

    /// The address of the page of vCPU `id`.
    #[must_use]
    pub fn block(&self, id: usize) -> u64 {
        block::FIRST + id as u64 * 0x1000
    }

    /// vCPU `id`, to operate.
    #[must_use]
    pub fn cpu(&self, id: usize) -> Cpu<'_> {
        Cpu { guest: self, id }
    }

    /// How often `vector` came to vCPU `id`.
    #[must_use]
    pub fn count(&self, id: usize, vector: u8) -> u64 {
        let offset = usize_of(self.block(id) + block::COUNT) + usize::from(vector) * 8;
        self.mem.read(offset)
    }

    /// All that came to vCPU `id`.
    #[must_use]
    pub fn total(&self, id: usize) -> u64 {
        self.mem.read(usize_of(self.block(id) + block::TOTAL))
    }

    /// The vectors that came to vCPU `id`, in order; at most the last 256.
    #[must_use]
    pub fn log(&self, id: usize) -> Vec<u8> {
        let n = self.total(id);
        (n.saturating_sub(256)..n)
            .map(|i| {
                self.mem
                    .read(usize_of(self.block(id) + block::LOG + i % 256))
            })
            .collect()
    }

    /// Forgets what came to vCPU `id`.
    pub fn forget(&self, id: usize) {
        self.mem
            .write(usize_of(self.block(id) + block::TOTAL), 0u64);
        self.mem
            .fill(usize_of(self.block(id) + block::COUNT), 0x800, 0);
    }

    /// Has the handler of vCPU `id` acknowledge in this way.
    pub fn acknowledge(&self, id: usize, how: u32) {
        self.mem.write(usize_of(self.block(id) + block::EOI), how);
    }

    /// Puts code that the handlers of vCPU `id` call.
    pub fn hook(&self, id: usize, code: &[u8]) {
        let place = OWN_CODE + 0x1000 + id as u64 % 16 * 0x100;
        assert!(code.len() <= 0x100);
        self.mem.write_bytes(usize_of(place), code);
        self.mem
            .write(usize_of(self.block(id) + block::HOOK), place);
    }

    /// Waits until `done`; fails after a time in which it should be done even where all is slow.
    ///
    /// # Errors
    ///
    /// The failure, which shows `what`.
    pub fn wait(&self, what: &str, done: impl Fn() -> bool) -> Outcome {
        let mut waited = 0;
        while !done() {
            ensure!(waited < patient(5000), "no end of the wait for {what}");
            sleep_ms(1);
            waited += 1;
        }
        Ok(())
    }
}

/// Puts the APIC ID into the CPUID leaves that show it.
pub fn set_apic_id(cpuid: &mut crate::vm::Cpuid, id: usize) {
    let id = u32::try_from(id).unwrap_or(0);
    for e in cpuid.list_mut() {
        match e.function {
            1 => e.ebx = (e.ebx & 0x00ff_ffff) | (id << 24),
            0xb | 0x1f => e.edx = id,
            _ => {}
        }
    }
}

/// A vCPU that executes operations.
#[derive(Debug, Clone, Copy)]
pub struct Cpu<'a> {
    /// Its VM.
    pub guest: &'a Guest,
    /// Its number, which is its APIC ID.
    pub id: usize,
}

impl Cpu<'_> {
    /// The vCPU.
    #[must_use]
    pub fn vcpu(&self) -> &Vcpu {
        &self.guest.vcpus[self.id]
    }

    /// Has the vCPU execute `op` next, without running it.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn load(&self, op: Op, a: u64, b: u64) -> Result<(), Error> {
        self.load_at(OPS + op as u64 * 0x40, a, b)
    }

    /// As [`Cpu::load`], with code that the test wrote to `place` and that ends with `jmp r15`.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn load_at(&self, place: u64, a: u64, b: u64) -> Result<(), Error> {
        let mut r = self.vcpu().regs()?;
        (r.rsi, r.rdi, r.rax) = (place, a, b);
        self.vcpu().set_regs(&r)
    }

    /// Runs until what was loaded is done.
    ///
    /// # Errors
    ///
    /// A failure that shows the exit.
    pub fn finish(&self) -> Result<Answer, Verdict> {
        self.vcpu().run()?;
        match decode(self.vcpu()) {
            Exit::Out { port: PORT, .. } => Ok(Answer::Done(self.vcpu().regs()?.rax)),
            Exit::Out {
                port: PORT_EXCEPTION,
                ..
            } => {
                let r: guest::Record = self.guest.mem.read(usize_of(at::RECORD));
                // The handler goes back to the interpreter, which reports.
                self.vcpu().run()?;
                match decode(self.vcpu()) {
                    Exit::Out { port: PORT, .. } => Ok(Answer::Fault {
                        vector: r.vector,
                        error: r.error,
                    }),
                    other => fail!("exit {other:x?} after {r:x?}"),
                }
            }
            other => fail!("exit {other:x?} of vCPU {}\n{}", self.id, self.describe()),
        }
    }

    /// The registers that matter most, for a failure's text.
    fn describe(&self) -> String {
        self.vcpu().regs().map_or_else(
            |e| e.to_string(),
            |r| {
                format!(
                    "rip {:x} rsp {:x} rflags {:x} rax {:x} rsi {:x} rdi {:x}",
                    r.rip, r.rsp, r.rflags, r.rax, r.rsi, r.rdi
                )
            },
        )
    }

    /// Executes `op`.
    ///
    /// # Errors
    ///
    /// A failure that shows the exit.
    pub fn call(&self, op: Op, a: u64, b: u64) -> Result<Answer, Verdict> {
        self.start()?;
        self.load(op, a, b)?;
        self.finish()
    }

    /// Executes `op`, which must not raise an exception; RAX.
    ///
    /// # Errors
    ///
    /// A failure that shows what came.
    pub fn done(&self, op: Op, a: u64, b: u64) -> Result<u64, Verdict> {
        match self.call(op, a, b)? {
            Answer::Done(v) => Ok(v),
            fault => fail!("{op:?} of {a:#x}, {b:#x} on vCPU {}: {fault:x?}", self.id),
        }
    }

    /// Runs to the interpreter, if the vCPU has just been reset.
    ///
    /// # Errors
    ///
    /// A failure that shows the exit.
    pub fn start(&self) -> Outcome {
        // A jump to the interpreter itself is only there before the first operation.
        if self.vcpu().regs()?.rsi == at::CODE {
            self.vcpu().run()?;
            match decode(self.vcpu()) {
                Exit::Out { port: PORT, .. } => {}
                other => fail!("exit {other:x?} at the start of vCPU {}", self.id),
            }
        }
        Ok(())
    }

    /// Reads a register by memory.
    ///
    /// # Errors
    ///
    /// A failure that shows what came.
    pub fn read(&self, reg: u32) -> Result<u32, Verdict> {
        Ok(self.done(Op::Read32, BASE + u64::from(reg), 0)? as u32)
    }

    /// Writes a register by memory.
    ///
    /// # Errors
    ///
    /// A failure that shows what came.
    pub fn write(&self, reg: u32, value: u32) -> Outcome {
        self.done(Op::Write32, BASE + u64::from(reg), value.into())?;
        Ok(())
    }

    /// Reads an MSR.
    ///
    /// # Errors
    ///
    /// A failure that shows what came.
    pub fn rdmsr(&self, index: u32) -> Result<u64, Verdict> {
        self.done(Op::Rdmsr, index.into(), 0)
    }

    /// Writes an MSR.
    ///
    /// # Errors
    ///
    /// A failure that shows what came.
    pub fn wrmsr(&self, index: u32, value: u64) -> Outcome {
        self.done(Op::Wrmsr, index.into(), value)?;
        Ok(())
    }

    /// Reads a register by MSR.
    ///
    /// # Errors
    ///
    /// A failure that shows what came.
    pub fn xread(&self, reg: u32) -> Result<u64, Verdict> {
        self.rdmsr(msr::X2APIC + (reg >> 4))
    }

    /// Writes a register by MSR.
    ///
    /// # Errors
    ///
    /// A failure that shows what came.
    pub fn xwrite(&self, reg: u32, value: u64) -> Outcome {
        self.wrmsr(msr::X2APIC + (reg >> 4), value)
    }

    /// Enables the APIC by software, in xAPIC mode; the handler acknowledges by memory.
    ///
    /// # Errors
    ///
    /// A failure that shows what came.
    pub fn enable(&self) -> Outcome {
        self.guest.acknowledge(self.id, block::MMIO);
        self.write(reg::SVR, ENABLED | 0xff)
    }

    /// Switches to x2APIC mode and enables; the handler acknowledges by MSR.
    ///
    /// # Errors
    ///
    /// A failure that shows what came.
    pub fn enable_x2apic(&self) -> Outcome {
        let base = self.rdmsr(msr::APIC_BASE)?;
        self.wrmsr(msr::APIC_BASE, base | msr::EXTD)?;
        self.guest.acknowledge(self.id, block::MSR);
        self.xwrite(reg::SVR, u64::from(ENABLED | 0xff))
    }

    /// Sends an interprocessor interrupt by memory.
    ///
    /// # Errors
    ///
    /// A failure that shows what came.
    pub fn ipi(&self, command: u32, destination: u8) -> Outcome {
        self.write(reg::ICR2, u32::from(destination) << 24)?;
        self.write(reg::ICR, command)
    }

    /// Sends an interprocessor interrupt by MSR.
    ///
    /// # Errors
    ///
    /// A failure that shows what came.
    pub fn xipi(&self, command: u32, destination: u32) -> Outcome {
        self.xwrite(
            reg::ICR,
            (u64::from(destination) << 32) | u64::from(command),
        )
    }

    /// Runs a vCPU that does not come back by itself, for some time.
    ///
    /// # Errors
    ///
    /// A failure if it does come back.
    pub fn stays(&self, ms: u64) -> Outcome {
        interrupting_handler(libc::SIGALRM)?;
        crate::host::interval_alarm(patient(ms));
        let r = self.vcpu().run();
        crate::host::interval_alarm(0);
        match r {
            Err(Error {
                errno: libc::EINTR, ..
            }) => Ok(()),
            Err(e) => Err(e.into()),
            Ok(_) => fail!("exit {:x?}, expected none", decode(self.vcpu())),
        }
    }
}

/// `struct kvm_lapic_state`, by registers.
#[derive(Debug, Clone, Copy)]
pub struct State(pub kb::kvm_lapic_state);

impl State {
    /// `KVM_GET_LAPIC`.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn get(vcpu: &Vcpu) -> Result<Self, Error> {
        let mut s = State(kb::kvm_lapic_state::default());
        vcpu.fd.ioctl_mut(sys::KVM_GET_LAPIC, &mut s.0)?;
        Ok(s)
    }

    /// `KVM_SET_LAPIC`.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn set(&self, vcpu: &Vcpu) -> Result<(), Error> {
        vcpu.fd.ioctl_ref(sys::KVM_SET_LAPIC, &self.0)?;
        Ok(())
    }

    /// A register.
    #[must_use]
    pub fn reg(&self, offset: u32) -> u32 {
        let o = offset as usize;
        let mut bytes = [0u8; 4];
        for (b, v) in bytes.iter_mut().zip(&self.0.regs[o..o + 4]) {
            *b = *v as u8;
        }
        u32::from_le_bytes(bytes)
    }

    /// Changes a register.
    pub fn put(&mut self, offset: u32, value: u32) {
        let o = offset as usize;
        for (v, b) in self.0.regs[o..o + 4].iter_mut().zip(value.to_le_bytes()) {
            *v = b as std::os::raw::c_char;
        }
    }

    /// Whether `vector` is set in one of the three registers of 256 bits (ISR, TMR, IRR).
    #[must_use]
    pub fn vector(&self, bitmap: u32, vector: u8) -> bool {
        let v = u32::from(vector);
        self.reg(bitmap + v / 32 * 16) & (1 << (v % 32)) != 0
    }

    /// Sets `vector` in one of the three registers of 256 bits.
    pub fn put_vector(&mut self, bitmap: u32, vector: u8) {
        let v = u32::from(vector);
        let offset = bitmap + v / 32 * 16;
        self.put(offset, self.reg(offset) | (1 << (v % 32)));
    }
}
