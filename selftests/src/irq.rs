// SPDX-License-Identifier: GPL-2.0

//! Guests that take interrupts of controllers in the kernel, and count them.
//!
//! Each vCPU has an area of memory where its handler counts by vector, notes the order, and reads how
//! it is to end an interrupt. Besides that a vCPU does what it is told: [`Guest::exec`] has it call a
//! few instructions with interrupts disabled and stop behind them, [`Guest::running`] lets all vCPUs
//! run in threads of their own. `calls` has the ioctls of the controllers, typed.

use crate::guest::{self, at::CODE, at::SIZE, usize_of, PORT};
use crate::host::{gettid, interrupting_handler, kick, patient, sleep_ms};
use crate::machine::{decode, set_special_pages, start_vcpu, Exit, Mode};
use crate::mem::Mapping;
use crate::sys::{self, Error};
use crate::vm::{Kvm, Vcpu, Vm};
use crate::{ensure, fail, guest_code, skip, Env, Outcome, Verdict};
use kvm_bindings as kb;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

mod calls;

pub use calls::*;

/// Where things of this module are in the guest.
pub mod at {
    /// The area of vCPU 0; those of the others follow, a page each.
    pub const AREA: u64 = 0x4_0000;
    /// What the handler of each vector starts with, 16 bytes each.
    pub const STUBS: u64 = 0x5_0000;
    /// The rest of the handler.
    pub const HANDLER: u64 = 0x5_1000;
    /// What [`super::Guest::exec`] has executed.
    pub const CALLED: u64 = super::CODE + 0x800;
    /// Above the stack of vCPU 0; those of the others follow.
    pub const STACK: u64 = 0x6_2000;
    /// The bytes between two stacks.
    pub const STACK_STEP: u64 = 0x2000;
}

/// The local APIC's registers.
pub const APIC: u64 = 0xfee0_0000;
/// The I/O APIC's registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The port on which the handler reports, if told to: AL is the vector.
pub const PORT_ACK: u16 = 0xef;

/// The most vCPUs of a guest.
const MAX_VCPUS: usize = 8;

// Offsets in an area. The counters come first, 8 bytes for each vector.
const HOW: usize = 0x800;
const TURNS: usize = 0x808;
const SEEN: usize = 0x810;
const STOP: usize = 0x818;
const LOG: usize = 0x900;
/// Vectors that the log holds.
const LOG_SIZE: usize = 0x400;

/// How the handler ends an interrupt: bits.
pub mod how {
    /// It writes to the local APIC's EOI register.
    pub const APIC: u64 = 1;
    /// It sends a non-specific EOI to the first PIC.
    pub const MASTER: u64 = 2;
    /// It sends one to the second PIC, before.
    pub const SLAVE: u64 = 4;
    /// It writes the vector to [`super::PORT_ACK`], before all that.
    pub const REPORT: u64 = 8;
    /// It writes to the local APIC's EOI register as an MSR: in x2APIC mode.
    pub const X2APIC: u64 = 16;
}

guest_code!(main_loop, ".code64",
    "2: cli",
    "out {P}, al",
    "call r8",
    "jmp 2b";
    P = PORT,
);

guest_code!(handler, ".code64",
    "push rax",
    "push rbx",
    "mov rbx, gs:[{SEEN}]",
    "inc qword ptr gs:[{SEEN}]",
    "mov eax, [rsp + 16]",
    "and ebx, {LAST}",
    "mov gs:[{LOG} + rbx], al",
    "inc qword ptr gs:[rax * 8]",
    "cmp eax, 2",
    "je 6f",
    "mov ebx, gs:[{HOW}]",
    "test bl, {REPORT}",
    "jz 3f",
    "out {ACK}, al",
    "3: mov al, 0x20",
    "test bl, {SLAVE}",
    "jz 4f",
    "out 0xa0, al",
    "4: test bl, {MASTER}",
    "jz 5f",
    "out 0x20, al",
    "5: test bl, {X2APIC}",
    "jz 7f",
    "push rcx",
    "push rdx",
    "mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "pop rdx",
    "pop rcx",
    "7: test bl, {APIC}",
    "jz 6f",
    "mov ebx, {EOI}",
    "mov dword ptr [rbx], 0",
    "6: pop rbx",
    "pop rax",
    "add rsp, 8",
    "iretq";
    SEEN = SEEN, LOG = LOG, LAST = LOG_SIZE - 1, HOW = HOW, REPORT = how::REPORT, ACK = PORT_ACK,
    SLAVE = how::SLAVE, MASTER = how::MASTER, X2APIC = how::X2APIC, APIC = how::APIC, EOI = APIC + 0xb0,
);

guest_code!(window, ".code64", "sti", "nop", "nop", "cli", "ret");
guest_code!(wait, ".code64", "sti", "hlt", "cli", "ret");
// For Guest::running: both count their turns, and return once they are told to.
guest_code!(pub spin, ".code64",
    "sti",
    "2: inc qword ptr gs:[{T}]",
    "cmp dword ptr gs:[{STOP}], 0",
    "je 2b",
    "cli",
    "ret";
    T = TURNS, STOP = STOP,
);
guest_code!(pub idle, ".code64",
    "2: sti",
    "hlt",
    "inc qword ptr gs:[{T}]",
    "cmp dword ptr gs:[{STOP}], 0",
    "je 2b",
    "cli",
    "ret";
    T = TURNS, STOP = STOP,
);

guest_code!(out8, ".code64", "out dx, al", "ret");
guest_code!(in8, ".code64", "xor eax, eax", "in al, dx", "ret");
guest_code!(write32, ".code64", "mov [rdi], eax", "ret");
guest_code!(read32, ".code64", "mov eax, [rdi]", "ret");

const RUNNABLE: kb::kvm_mp_state = kb::kvm_mp_state {
    mp_state: kb::KVM_MP_STATE_RUNNABLE,
};

/// Which controllers a VM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chips {
    /// None: userspace has them all.
    None,
    /// The local APICs, the I/O APIC and the PICs.
    Full,
    /// The local APICs; userspace's I/O APIC has so many pins.
    Split(u64),
}

/// Gives a new VM its controllers.
///
/// # Errors
///
/// What the kernel answered.
pub fn create(vm: &Vm, chips: Chips) -> Result<(), Error> {
    match chips {
        Chips::None => {}
        Chips::Full => {
            vm.fd.ioctl(sys::KVM_CREATE_IRQCHIP, 0)?;
        }
        Chips::Split(pins) => vm.enable_cap(kb::KVM_CAP_SPLIT_IRQCHIP, pins)?,
    }
    Ok(())
}

/// A VM whose vCPUs are about to do what they are told.
///
/// The order of the fields is the order in which they are dropped.
#[derive(Debug)]
pub struct Guest {
    /// Its vCPUs; the number of each is also its APIC's, if [`Guest::new`] made it.
    pub vcpus: Vec<Vcpu>,
    /// The VM.
    pub vm: Vm,
    /// The device.
    pub kvm: Kvm,
    /// Guest-physical 0 onwards.
    pub mem: Mapping,
}

/// A new VM, with memory and controllers, and no vCPU.
///
/// # Errors
///
/// A skip if the device has no such controllers, or what the kernel answered.
pub fn vm_with(env: &Env, chips: Chips) -> Result<(Kvm, Vm, Mapping), Verdict> {
    let kvm = env.open()?;
    match chips {
        Chips::Split(_) if kvm.capability(kb::KVM_CAP_SPLIT_IRQCHIP) <= 0 => {
            skip!("no KVM_CAP_SPLIT_IRQCHIP")
        }
        Chips::Full if kvm.capability(kb::KVM_CAP_IRQCHIP) <= 0 => skip!("no KVM_CAP_IRQCHIP"),
        _ => {}
    }
    let mem = Mapping::new(SIZE, false)?;
    let vm = kvm.create_vm()?;
    set_special_pages(&vm)?;
    vm.set_memory(0, 0, 0, mem.len() as u64, mem.addr() as u64)?;
    create(&vm, chips)?;
    Ok((kvm, vm, mem))
}

impl Guest {
    /// A guest with `n` vCPUs, their local APICs enabled (if they are in the kernel), that stopped with interrupts disabled. Its
    /// handlers end interrupts at the local APIC.
    ///
    /// # Errors
    ///
    /// A skip if the device has no such controllers, or a failure.
    pub fn new(env: &Env, chips: Chips, n: usize) -> Result<Self, Verdict> {
        let (kvm, vm, mem) = vm_with(env, chips)?;
        guest::write_gdt(&mem);
        guest::write_idt(&mem, true);
        guest::write_page_tables(&mem);
        mem.write_bytes(usize_of(CODE), main_loop());
        mem.write_bytes(usize_of(at::HANDLER), handler());
        for v in std::iter::once(2).chain(32..=255u8) {
            let stub = at::STUBS + u64::from(v) * 16;
            let mut code = vec![0x68]; // push imm32
            code.extend_from_slice(&u32::from(v).to_le_bytes());
            code.push(0xe9); // jmp rel32
            let from = stub + code.len() as u64 + 4;
            let distance = u32::try_from(at::HANDLER - from).unwrap_or(0);
            code.extend_from_slice(&distance.to_le_bytes());
            mem.write_bytes(usize_of(stub), &code);
            guest::set_gate(&mem, v, stub, guest::sel::CODE64, true);
        }
        let mut guest = Guest {
            vcpus: vec![],
            vm,
            kvm,
            mem,
        };
        for id in 0..n {
            guest.add_vcpu(id)?;
            if chips != Chips::None {
                guest.set_how(id, how::APIC);
                guest.write(id, APIC + 0xf0, 0x1ff)?;
            }
        }
        Ok(guest)
    }

    /// Adds a vCPU, whose APIC has the number `apic`, as it is: for the other calls, its number is that of
    /// those before it. Its handlers do no EOI.
    ///
    /// # Errors
    ///
    /// A failure.
    pub fn add_vcpu(&mut self, apic: usize) -> Outcome {
        let id = self.vcpus.len();
        ensure!(id < MAX_VCPUS, "{id} vCPUs are enough");
        let v = self.vm.create_vcpu(apic)?;
        v.set_cpuid(&*self.kvm.supported_cpuid()?)?;
        self.vcpus.push(v);
        self.restart(id)
    }

    /// Brings a vCPU back to where it waits to be told.
    ///
    /// # Errors
    ///
    /// A failure.
    pub fn restart(&self, id: usize) -> Outcome {
        let v = &self.vcpus[id];
        // It may be halted, or have been waiting for another to start it.
        v.set_mp_state(&RUNNABLE)?;
        start_vcpu(v, Mode::Long, CODE)?;
        let mut s = v.sregs()?;
        s.gs.base = at::AREA + id as u64 * 0x1000;
        v.set_sregs(&s)?;
        let mut r = v.regs()?;
        r.rsp = at::STACK + id as u64 * at::STACK_STEP;
        v.set_regs(&r)?;
        self.finish(id, &mut |v| {
            Err(Verdict::Fail(format!("interrupt {v:#x} at the start")))
        })
    }

    /// Has vCPU `id` call `code`, which ends with RET, with interrupts disabled, once `f` has set the
    /// registers (not RIP, RSP and R8). The registers behind it.
    ///
    /// # Errors
    ///
    /// A failure, also for any exit on the way.
    pub fn exec(
        &self,
        id: usize,
        code: &[u8],
        f: impl FnOnce(&mut kb::kvm_regs),
    ) -> Result<kb::kvm_regs, Verdict> {
        self.exec_with(id, code, f, &mut |v| {
            Err(Verdict::Fail(format!("the handler reports {v:#x}")))
        })
    }

    /// As [`Guest::exec`]; `ack` is called with each vector that the handler reports.
    ///
    /// # Errors
    ///
    /// As [`Guest::exec`], and what `ack` fails with.
    pub fn exec_with(
        &self,
        id: usize,
        code: &[u8],
        f: impl FnOnce(&mut kb::kvm_regs),
        ack: &mut dyn FnMut(u8) -> Outcome,
    ) -> Result<kb::kvm_regs, Verdict> {
        self.begin(id, code, f)?;
        self.finish(id, ack)?;
        Ok(self.vcpus[id].regs()?)
    }

    /// Only the preparation for [`Guest::exec`]: the caller runs the vCPU, and meets the exits.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn begin(
        &self,
        id: usize,
        code: &[u8],
        f: impl FnOnce(&mut kb::kvm_regs),
    ) -> Result<(), Error> {
        let place = at::CALLED + id as u64 * 0x100;
        self.mem.write_bytes(usize_of(place), code);
        let mut r = self.vcpus[id].regs()?;
        f(&mut r);
        r.r8 = place;
        self.vcpus[id].set_regs(&r)
    }

    /// Runs to where a vCPU waits to be told.
    ///
    /// # Errors
    ///
    /// A failure for any other exit, and what `ack` fails with.
    pub fn finish(&self, id: usize, ack: &mut dyn FnMut(u8) -> Outcome) -> Outcome {
        loop {
            match self.run(id)? {
                Exit::Out { port: PORT, .. } => return Ok(()),
                Exit::Out {
                    port: PORT_ACK,
                    data,
                    ..
                } => ack(data[0])?,
                other => fail!("vCPU {id}: exit {other:x?}\n{}", self.describe(id)),
            }
        }
    }

    /// Runs a vCPU to the next exit.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn run(&self, id: usize) -> Result<Exit, Error> {
        self.vcpus[id].run()?;
        Ok(decode(&self.vcpus[id]))
    }

    fn describe(&self, id: usize) -> String {
        let v = &self.vcpus[id];
        let (Ok(r), Ok(s)) = (v.regs(), v.sregs()) else {
            return "the registers cannot be read".into();
        };
        format!(
            "rip {:x} rsp {:x} rflags {:x} rax {:x} rdx {:x} rdi {:x} cr2 {:x}, log {:x?}",
            r.rip,
            r.rsp,
            r.rflags,
            r.rax,
            r.rdx,
            r.rdi,
            s.cr2,
            self.log(id)
        )
    }

    /// Lets a vCPU take the interrupts that are pending, all that it can.
    ///
    /// # Errors
    ///
    /// A failure.
    pub fn window(&self, id: usize) -> Outcome {
        self.exec(id, window(), |_| {})?;
        Ok(())
    }

    /// As [`Guest::window`], with a function for what the handler reports.
    ///
    /// # Errors
    ///
    /// A failure.
    pub fn window_with(&self, id: usize, ack: &mut dyn FnMut(u8) -> Outcome) -> Outcome {
        self.exec_with(id, window(), |_| {}, ack)?;
        Ok(())
    }

    /// Halts a vCPU until it has taken an interrupt.
    ///
    /// # Errors
    ///
    /// A failure.
    pub fn halt(&self, id: usize) -> Outcome {
        self.exec(id, wait(), |_| {})?;
        Ok(())
    }

    /// Has a vCPU write 32 bits to memory, which no exit to userspace shows.
    ///
    /// # Errors
    ///
    /// A failure.
    pub fn write(&self, id: usize, address: u64, value: u32) -> Outcome {
        self.exec(id, write32(), |r| {
            r.rdi = address;
            r.rax = value.into();
        })?;
        Ok(())
    }

    /// Has a vCPU read 32 bits of memory, which no exit to userspace shows.
    ///
    /// # Errors
    ///
    /// A failure.
    pub fn read(&self, id: usize, address: u64) -> Result<u32, Verdict> {
        let r = self.exec(id, read32(), |r| {
            r.rdi = address;
            r.rax = 0;
        })?;
        Ok(r.rax as u32)
    }

    /// Has vCPU 0 write a byte to a port, which no exit to userspace shows.
    ///
    /// # Errors
    ///
    /// A failure.
    pub fn out8(&self, port: u16, value: u8) -> Outcome {
        self.exec(0, out8(), |r| {
            r.rdx = port.into();
            r.rax = value.into();
        })?;
        Ok(())
    }

    /// Has vCPU 0 read a byte from a port, which no exit to userspace shows.
    ///
    /// # Errors
    ///
    /// A failure.
    pub fn in8(&self, port: u16) -> Result<u8, Verdict> {
        let r = self.exec(0, in8(), |r| r.rdx = port.into())?;
        Ok(r.rax as u8)
    }

    fn area(&self, id: usize) -> usize {
        usize_of(at::AREA) + id * 0x1000
    }

    /// How often a vCPU took the interrupt `vector`.
    #[must_use]
    pub fn count(&self, id: usize, vector: u8) -> u64 {
        self.mem.read(self.area(id) + usize::from(vector) * 8)
    }

    /// How many interrupts a vCPU took in all.
    #[must_use]
    pub fn seen(&self, id: usize) -> u64 {
        self.mem.read(self.area(id) + SEEN)
    }

    /// How often a vCPU went through the loop that [`Guest::running`] gave it.
    #[must_use]
    pub fn turns(&self, id: usize) -> u64 {
        self.mem.read(self.area(id) + TURNS)
    }

    /// The vectors that a vCPU took, in their order; the first of them once they are very many.
    #[must_use]
    pub fn log(&self, id: usize) -> Vec<u8> {
        let n = usize_of(self.seen(id)).min(LOG_SIZE);
        self.mem.read_bytes(self.area(id) + LOG, n)
    }

    /// Forgets what was counted.
    pub fn forget(&self, id: usize) {
        self.mem.fill(self.area(id), HOW, 0);
        self.mem.write(self.area(id) + SEEN, 0u64);
    }

    /// Sets how the handler of a vCPU ends interrupts: bits of [`how`].
    pub fn set_how(&self, id: usize, bits: u64) {
        self.mem.write(self.area(id) + HOW, bits);
    }

    /// Lets each vCPU run `code` ([`spin`] or [`idle`]) in a thread of its own, while this thread is in
    /// `body`. A vCPU stops where its handler is through with all that it began.
    ///
    /// # Errors
    ///
    /// A failure of `body`, or an exit that a vCPU had meanwhile.
    pub fn running<R>(
        &self,
        code: &[u8],
        body: impl FnOnce(&[Thread]) -> Result<R, Verdict>,
    ) -> Result<R, Verdict> {
        interrupting_handler(libc::SIGUSR1)?;
        let threads: Vec<Thread> = self.vcpus.iter().map(|_| Thread::default()).collect();
        for id in 0..self.vcpus.len() {
            self.mem.write(self.area(id) + STOP, 0u32);
            self.begin(id, code, |_| {})?;
        }
        std::thread::scope(|scope| {
            let handles: Vec<_> = (self.vcpus.iter().zip(&threads))
                .map(|(v, t)| scope.spawn(|| t.run(v)))
                .collect();
            let mut result = wait_for("the vCPUs' threads", || {
                threads.iter().all(|t| t.tid() != 0)
            })
            .and_then(|()| body(&threads));
            for (id, (t, h)) in threads.iter().zip(handles).enumerate() {
                self.mem.write(self.area(id) + STOP, 1u32);
                t.stop.store(true, Ordering::SeqCst);
                while !h.is_finished() {
                    kick(t.tid(), libc::SIGUSR1);
                    sleep_ms(1);
                }
                // What a vCPU met explains what the caller missed.
                if let Err(e) = h.join().unwrap_or(Err(Verdict::Fail("panic".into()))) {
                    result = Err(e);
                }
            }
            result
        })
    }
}

/// A thread that runs a vCPU.
#[derive(Debug, Default)]
pub struct Thread {
    stop: AtomicBool,
    tid: AtomicI32,
    signals: AtomicU64,
}

impl Thread {
    /// Its number; 0 until it is there.
    #[must_use]
    pub fn tid(&self) -> i32 {
        self.tid.load(Ordering::SeqCst)
    }

    /// How often KVM_RUN ended for a signal.
    #[must_use]
    pub fn signals(&self) -> u64 {
        self.signals.load(Ordering::SeqCst)
    }

    fn run(&self, v: &Vcpu) -> Outcome {
        self.tid.store(gettid(), Ordering::SeqCst);
        loop {
            match v.run() {
                Err(e) if e.errno == libc::EINTR => {
                    self.signals.fetch_add(1, Ordering::SeqCst);
                    // From HLT to where it sees that it is to stop.
                    if self.stop.load(Ordering::SeqCst) {
                        v.set_mp_state(&RUNNABLE)?;
                    }
                }
                Err(e) => return Err(e.into()),
                Ok(_) => match decode(v) {
                    Exit::Out { port: PORT, .. } if self.stop.load(Ordering::SeqCst) => {
                        return Ok(());
                    }
                    other => fail!("a vCPU's exit {other:x?}"),
                },
            }
        }
    }
}

/// Waits until `f` is true, for a while.
///
/// # Errors
///
/// A failure that names `what`.
pub fn wait_for(what: &str, mut f: impl FnMut() -> bool) -> Outcome {
    let end = Instant::now() + Duration::from_millis(patient(3000));
    while !f() {
        ensure!(Instant::now() < end, "waited in vain for {what}");
        // A busy host thread would take the processor from the guest.
        std::thread::yield_now();
        if !f() {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    Ok(())
}
