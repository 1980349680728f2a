// SPDX-License-Identifier: GPL-2.0

//! The instruction emulator: carries out one guest instruction, be it that its memory belongs to a device, or that the processor cannot
//! be entered in the guest's state ([`vmentry`](super::vmentry)).
//!
//! One [`Emulator`] belongs to each vCPU. [`Emulator::step`] decodes the instruction at RIP and either completes it or
//! says what it needs first. The instruction keeps no partial state: values that devices returned are remembered, the
//! instruction is run again from its start with them, and registers and memory change only in the run that needs nothing
//! more. So a vCPU can leave for userspace between any two steps, and an instruction that faults has changed nothing.
//!
//! What a step asks for:
//! - [`Outcome::MmioRead`]: read the device, call [`Emulator::complete_read`], step again. Registers still are those
//!   before the instruction.
//! - [`Outcome::MmioWrite`]: write the device, step again. The instruction has completed, RIP is past it.
//!
//! While [`Emulator::in_progress`] says so, no event may be injected and the guest may not be entered.
//!
//! A repeated string instruction is carried out an iteration at a time. It returns [`Outcome::Done`] with RIP still at
//! the instruction after one iteration that met a device, or after many that did not: the registers say how far it came,
//! the guest can be entered or interrupted, and the processor or the emulator goes on from there.

mod access;
mod alu;
mod arith;
mod exec;
mod fpu;
mod integer;
mod list;
mod stack;
mod string;
mod system;
mod vector;

use self::access::Changes;
use self::access::Run;
use self::access::Stop;
pub use self::fpu::Fpu;
use self::list::List;
pub use self::system::interrupt::Event;
pub use self::system::task::Cause;
pub use self::system::task::TaskSwitch;
use self::system::System;
use super::event::Shadow;
use super::exception::Fault;
use super::insn::Insn;
use super::insn::Op;
use super::insn::Rep;
use super::insn::Size;
use super::insn::MAX_INSN_LEN;
use super::io::StringIo;
use super::msr::Msr;
use super::paging::GuestMemory;
use super::paging::Paging;
use super::paging::PAGE_OFFSET;
use super::regs::Cr0;
use super::regs::Cr3;
use super::regs::Cr4;
use super::regs::Efer;
use super::regs::Gpr;
use super::regs::Rflags;
use super::segment::CpuMode;
use super::segment::SegReg;
use super::segment::Segment;

/// A descriptor-table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableReg {
    /// Linear address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// The state of the processor whose instruction is emulated.
///
/// All methods take `&mut self`: a backend reads its control structure when first asked.
pub trait Cpu: Fpu {
    /// The value of a general register.
    fn gpr(&mut self, r: Gpr) -> u64;
    /// Sets a general register.
    fn set_gpr(&mut self, r: Gpr, value: u64);
    /// The instruction pointer.
    fn rip(&mut self) -> u64;
    /// Sets the instruction pointer.
    fn set_rip(&mut self, value: u64);
    /// RFLAGS.
    fn rflags(&mut self) -> Rflags;
    /// Sets RFLAGS.
    fn set_rflags(&mut self, value: Rflags);
    /// A segment register.
    fn segment(&mut self, reg: SegReg) -> Segment;
    /// CR0 as the guest sees it.
    fn cr0(&mut self) -> Cr0;
    /// CR3.
    fn cr3(&mut self) -> Cr3;
    /// CR4 as the guest sees it.
    fn cr4(&mut self) -> Cr4;
    /// EFER.
    fn efer(&mut self) -> Efer;
    /// The current privilege level. VMX: the DPL of SS (SDM vol. 3, 26.4.1), but 0 in real and 3 in virtual-8086 mode.
    fn cpl(&mut self) -> u8;
    /// Sets a segment register. SS brings the privilege level.
    fn set_segment(&mut self, reg: SegReg, value: &Segment);
    /// Sets CR3; whoever asked for a task switch sees to the rest of it.
    fn set_cr3(&mut self, value: Cr3);
    /// A switch of tasks sets CR0.TS.
    fn task_switched(&mut self);
    /// GDTR.
    fn gdtr(&mut self) -> TableReg;
    /// Sets GDTR.
    fn set_gdtr(&mut self, value: TableReg);
    /// IDTR.
    fn idtr(&mut self) -> TableReg;
    /// Sets IDTR.
    fn set_idtr(&mut self, value: TableReg);
    /// An MSR that system calls or SWAPGS use. None if it cannot be had.
    fn msr(&mut self, msr: Msr) -> Option<u64>;
    /// Sets one of them, which could be read.
    fn set_msr(&mut self, msr: Msr, value: u64);
    /// NMIs are taken again.
    fn unblock_nmi(&mut self);
    /// The width of physical addresses that the guest's CPUID reports.
    fn maxphyaddr(&mut self) -> u8;
    /// Whether the guest's CPUID reports 1 GiB pages.
    fn gbpages(&mut self) -> bool;

    /// PKRU; asked only with CR4.PKE.
    fn pkru(&mut self) -> u32 {
        0
    }

    /// The mode.
    fn mode(&mut self) -> CpuMode {
        let cs = self.segment(SegReg::Cs).attr;
        CpuMode::of(self.cr0(), self.rflags(), self.efer(), cs)
    }

    /// The state that decides how addresses are translated.
    fn paging(&mut self) -> Paging {
        let cr4 = self.cr4();
        Paging {
            cr0: self.cr0(),
            cr3: self.cr3(),
            cr4,
            efer: self.efer(),
            rflags: self.rflags(),
            pkru: if cr4.has(Cr4::PKE) { self.pkru() } else { 0 },
            maxphyaddr: self.maxphyaddr(),
            gbpages: self.gbpages(),
            pdptes: None,
        }
    }
}

/// How an instruction, or an iteration of one, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Whether RIP is past the instruction. If not, a repeated string instruction has iterations left, or another
    /// processor kept changing what a locked instruction was to change: the guest tries again.
    pub retired: bool,
    /// A single-step #DB is due: RFLAGS.TF was set, and the instruction has not lost the trap.
    pub single_step: bool,
    /// What holds events back after the instruction; what did before has ended.
    pub shadow: Shadow,
}

/// What an instruction does that is neither memory nor a register of the emulator's. Whether the program may was checked as far as the
/// processor checks before it exits by the instruction; values were not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// MOV to a control register.
    WriteControl {
        /// Its number.
        number: u8,
        /// The source.
        from: Gpr,
    },
    /// MOV from a control register.
    ReadControl {
        /// Its number.
        number: u8,
        /// The destination.
        to: Gpr,
    },
    /// CLTS.
    ClearTaskSwitched,
    /// LMSW with its operand.
    LoadMsw(u16),
    /// MOV to a debug register.
    WriteDebug {
        /// Its number.
        number: u8,
        /// The source.
        from: Gpr,
    },
    /// MOV from a debug register.
    ReadDebug {
        /// Its number.
        number: u8,
        /// The destination.
        to: Gpr,
    },
    /// INVLPG at a linear address.
    InvalidatePage(u64),
    /// INVPCID. Neither the type nor the descriptor was checked, nor that CPUID reports the instruction.
    InvalidatePcid {
        /// What is to be invalidated.
        kind: u64,
        /// The 16 bytes of the descriptor: the identifier with reserved bits, and the linear address.
        descriptor: [u64; 2],
    },
    /// HLT.
    Halt,
    /// INVD.
    InvalidateCaches,
    /// WBINVD.
    WriteBackCaches,
    /// RDMSR.
    ReadMsr,
    /// WRMSR.
    WriteMsr,
    /// RDTSC.
    ReadTsc,
    /// RDTSCP. Whether CPUID reports it was not checked.
    ReadTscAux,
    /// RDPMC.
    ReadCounter,
    /// CPUID.
    Identify,
    /// XSETBV.
    WriteXcr,
    /// XGETBV of something else than XCR0.
    ReadXcr,
    /// VMCALL. At any privilege level.
    Hypercall,
    /// IN or OUT, with the accumulator.
    Port {
        /// Which port.
        port: u16,
        /// One, two or four bytes.
        size: Size,
        /// IN.
        input: bool,
    },
    /// INS or OUTS.
    PortString {
        /// Which port.
        port: u16,
        /// The rest of it.
        io: StringIo,
    },
}

/// What came of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<E> {
    /// The registers hold a state from which the guest can go on.
    Done(Completion),
    /// `len` bytes, 1 to 8, are wanted from the device at `gpa`. They do not cross a page.
    MmioRead {
        /// Where.
        gpa: u64,
        /// How many bytes.
        len: u8,
    },
    /// The first `len` bytes of `data`, 1 to 8, go to the device at `gpa`. They do not cross a page.
    MmioWrite {
        /// Where.
        gpa: u64,
        /// What.
        data: [u8; 8],
        /// How many bytes.
        len: u8,
    },
    /// The instruction faults: inject this. No register has changed, but for a task switch, whose new task it is that faults if TR has
    /// changed.
    Fault(Fault),
    /// The instruction is for the caller to carry out, as it would after an exit of the processor by that instruction. Nothing has
    /// changed, RIP is still at it.
    Service {
        /// What is to be done.
        service: Service,
        /// How long the instruction is.
        len: u8,
    },
    /// The instruction is not one that is emulated; [`Emulator::insn_bytes`] tells which it was.
    Unhandled,
    /// The host could not reach guest memory. What devices have answered is kept, if anything: the instruction is in
    /// progress then, and a further step tries the rest again.
    Host(E),
}

/// What the processor reported of the access that made it exit, to save walking the guest's tables for it again.
///
/// Only for exits whose report is of the final address of a translated access (VMX: bits 7 and 8 of the exit qualification of
/// an EPT violation both set).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// The linear address.
    pub linear: u64,
    /// The guest-physical address.
    pub gpa: u64,
    /// Whether the access was a write.
    pub write: bool,
    /// Whether it went to a page table whose writes are watched, and need not be. A repeated string instruction does not
    /// change single entries: it is [`Outcome::Unhandled`] then, as whoever watches does better to stop.
    pub table: bool,
}

/// One access to a device: at most eight bytes in one page.
#[derive(Clone, Copy, Debug)]
struct Mmio {
    gpa: u64,
    len: u8,
    data: u64,
}

/// The most device accesses of one kind in an instruction: PUSHA has eight, one of which can cross into another page.
const MAX_MMIO: usize = 9;

#[derive(Clone, Copy, Debug)]
enum State {
    /// Nothing is in progress.
    Idle,
    /// A device read was asked for.
    Reading { gpa: u64, len: u8 },
    /// The read has come; the instruction is to be run again.
    Ready,
    /// The instruction has completed; writes from this one on are still to be handed out.
    Draining { next: usize, done: Completion },
}

/// The emulator of one vCPU.
#[derive(Clone, Debug)]
pub struct Emulator {
    state: State,
    bytes: [u8; MAX_INSN_LEN],
    bytes_len: usize,
    /// The instruction that `bytes` begin with, and the mode in which they mean that.
    decoded: Option<(CpuMode, Insn)>,
    /// It is the one in progress. If not, it is the last one.
    fetched: bool,
    hint: Option<Hint>,
    reads: List<Mmio, MAX_MMIO>,
    writes: List<Mmio, MAX_MMIO>,
    /// What a run has put down. Each begins with nothing; the lists are here for the room alone.
    changes: Changes,
}

impl Default for Emulator {
    fn default() -> Self {
        Self::new()
    }
}

/// How many iterations of a string instruction a step does at most, and how often a contended locked one is tried.
const MAX_ITERATIONS: u32 = 1024;

impl Emulator {
    /// An emulator with nothing in progress.
    #[must_use]
    pub const fn new() -> Self {
        const NONE: Mmio = Mmio {
            gpa: 0,
            len: 0,
            data: 0,
        };
        Self {
            state: State::Idle,
            bytes: [0; MAX_INSN_LEN],
            bytes_len: 0,
            decoded: None,
            fetched: false,
            hint: None,
            reads: List::new(NONE),
            writes: List::new(NONE),
            changes: Changes::new(),
        }
    }

    /// Whether an instruction is half done: [`Emulator::step`] has to be called before the guest runs or anything is
    /// injected.
    #[inline]
    #[must_use]
    pub const fn in_progress(&self) -> bool {
        !matches!(self.state, State::Idle)
    }

    /// Forgets whatever is in progress.
    pub fn abort(&mut self) {
        self.state = State::Idle;
        self.fetched = false;
        self.hint = None;
        self.reads.clear();
        self.writes.clear();
    }

    /// Tells what the processor reported of the access, before the first step of an instruction.
    pub fn set_hint(&mut self, hint: Hint) {
        if !self.in_progress() {
            self.hint = Some(hint);
        }
    }

    /// The bytes fetched for the last instruction: it, and perhaps some that follow; fewer if it could not be fetched.
    #[must_use]
    pub fn insn_bytes(&self) -> &[u8] {
        self.bytes.get(..self.bytes_len).unwrap_or(&[])
    }

    /// Hands in what the device returned for the last [`Outcome::MmioRead`]: its first `len` bytes count. Without such a
    /// request pending, nothing happens.
    pub fn complete_read(&mut self, data: [u8; 8]) {
        let State::Reading { gpa, len } = self.state else {
            return;
        };
        let bits = u32::from(len.min(8)).wrapping_mul(8);
        let mask = u64::MAX.checked_shr(64u32.wrapping_sub(bits)).unwrap_or(0);
        let data = u64::from_le_bytes(data) & mask;
        if !self.reads.push(Mmio { gpa, len, data }) {
            // No instruction reads so often: begin it anew rather than ask for ever.
            self.reads.clear();
        }
        self.state = State::Ready;
    }

    /// Goes on with the instruction in progress, or begins with the one at RIP.
    pub fn step<C: Cpu, M: GuestMemory>(
        &mut self,
        cpu: &mut C,
        memory: &mut M,
    ) -> Outcome<M::Error> {
        match self.state {
            State::Reading { gpa, len } => return Outcome::MmioRead { gpa, len },
            State::Draining { .. } => return self.drain(),
            State::Idle => {
                self.fetched = false;
                self.bytes_len = 0;
                self.reads.clear();
                self.writes.clear();
            }
            State::Ready => {}
        }
        match self.run(cpu, memory) {
            Ok(done) => {
                self.state = State::Draining { next: 0, done };
                self.drain()
            }
            Err(Stop::Mmio { gpa, len }) => {
                self.state = State::Reading { gpa, len };
                Outcome::MmioRead { gpa, len }
            }
            Err(Stop::Host(e)) if !self.reads.is_empty() => {
                self.writes.clear();
                self.state = State::Ready;
                Outcome::Host(e)
            }
            Err(stop) => {
                self.abort();
                match stop {
                    Stop::Fault(fault) => Outcome::Fault(fault),
                    Stop::Host(e) => Outcome::Host(e),
                    Stop::Service { service, len } => Outcome::Service { service, len },
                    Stop::Retry => Outcome::Done(Completion {
                        retired: false,
                        single_step: false,
                        shadow: Shadow::None,
                    }),
                    // The second was handled above.
                    Stop::Unhandled | Stop::Mmio { .. } => Outcome::Unhandled,
                }
            }
        }
    }

    /// Switches tasks, as an exit asks for. The outcome is as that of a step: [`Outcome::Done`] in the new task, or
    /// [`Outcome::Fault`] in the old one, or in the new one if TR has changed. The rest is for the caller:
    /// with PAE paging, the four entries that CR3 leads to, and the local breakpoints of DR7, which are the old task's.
    pub fn switch_task<C: Cpu, M: GuestMemory>(
        &mut self,
        cpu: &mut C,
        memory: &mut M,
        switch: &TaskSwitch,
    ) -> Outcome<M::Error> {
        self.outside(cpu, memory, |system| system.exited_switch(switch))
    }

    /// Delivers an event as the processor would between two instructions: through the IDT or the table of real mode. RIP is what is
    /// returned to.
    pub fn deliver<C: Cpu, M: GuestMemory>(
        &mut self,
        cpu: &mut C,
        memory: &mut M,
        event: Event,
    ) -> Outcome<M::Error> {
        self.outside(cpu, memory, |system| system.deliver_event(event))
    }

    /// Does what no instruction asks for. It reads and writes no devices.
    fn outside<C: Cpu, M: GuestMemory>(
        &mut self,
        cpu: &mut C,
        memory: &mut M,
        act: impl Fn(&mut System<'_, '_, C, M>) -> Result<(), Stop<M::Error>>,
    ) -> Outcome<M::Error> {
        self.abort();
        let mut left = MAX_ITERATIONS;
        let result = loop {
            let mut run = Run::new(cpu, memory, self);
            match act(&mut System::new(&mut run)) {
                Err(Stop::Retry) if left > 0 => left = left.saturating_sub(1),
                other => break other,
            }
        };
        let met_device = !self.writes.is_empty();
        self.abort();
        match result {
            Ok(()) if met_device => Outcome::Unhandled,
            Ok(()) => Outcome::Done(Completion {
                retired: true,
                single_step: false,
                shadow: Shadow::None,
            }),
            Err(Stop::Fault(fault)) => Outcome::Fault(fault),
            Err(Stop::Host(e)) => Outcome::Host(e),
            Err(Stop::Retry) => Outcome::Done(Completion {
                retired: false,
                single_step: false,
                shadow: Shadow::None,
            }),
            Err(Stop::Unhandled | Stop::Mmio { .. } | Stop::Service { .. }) => Outcome::Unhandled,
        }
    }

    /// Whether `bytes`, of which there are `have`, begin with the last instruction again: who waits for a device asks it often.
    fn is_last(&self, bytes: &[u8; MAX_INSN_LEN], have: usize, mode: CpuMode) -> bool {
        let Some((last_mode, insn)) = &self.decoded else {
            return false;
        };
        // As numbers: the first bytes are the lowest.
        let differences = number(bytes) ^ number(&self.bytes);
        let same = differences.trailing_zeros() >> 3 >= u32::from(insn.len);
        *last_mode == mode && usize::from(insn.len) <= have && same
    }

    fn drain<E>(&mut self) -> Outcome<E> {
        let State::Draining { next, done } = self.state else {
            return Outcome::Unhandled;
        };
        if let Some(write) = self.writes.get(next) {
            self.state = State::Draining {
                next: next.wrapping_add(1),
                done,
            };
            return Outcome::MmioWrite {
                gpa: write.gpa,
                data: write.data.to_le_bytes(),
                len: write.len,
            };
        }
        self.abort();
        Outcome::Done(done)
    }

    fn run<C: Cpu, M: GuestMemory>(
        &mut self,
        cpu: &mut C,
        memory: &mut M,
    ) -> Result<Completion, Stop<M::Error>> {
        let mut run = Run::new(cpu, memory, self);
        run.fetch()?;
        let Some((_, insn)) = run.emulator.decoded else {
            return Err(Stop::Unhandled);
        };
        let table = run.emulator.hint.is_some_and(|hint| hint.table);
        if table && insn.rep != Rep::None && matches!(insn.op, Op::String(_)) {
            return Err(Stop::Unhandled);
        }
        let single_step = run.flags().has(Rflags::TF);
        let mut left = MAX_ITERATIONS;
        loop {
            let retired = match run.execute(&insn) {
                Ok(retired) => retired,
                // Somebody else changed the operand of a locked instruction, or a page table.
                Err(Stop::Retry) if left > 0 => {
                    left = left.saturating_sub(1);
                    run.rewind();
                    continue;
                }
                Err(stop) => return Err(stop),
            };
            left = left.saturating_sub(1);
            if retired || single_step || left == 0 || run.met_device() {
                // INT n, if it went through, has cleared TF and dropped the trap (SDM vol. 3, 19.3.1.4). A load of SS holds
                // debug exceptions back, and this one for good.
                let dropped = system::is_interrupt(insn.op) && !run.flags().has(Rflags::TF)
                    || run.shadow == Shadow::MovSs;
                return Ok(Completion {
                    retired,
                    single_step: single_step && !dropped,
                    shadow: run.shadow,
                });
            }
            run.rewind();
        }
    }
}

/// Bytes as a number, the first ones lowest.
fn number(bytes: &[u8; MAX_INSN_LEN]) -> u128 {
    let mut wide = [0; MAX_INSN_LEN + 1];
    if let Some(part) = wide.first_chunk_mut() {
        *part = *bytes;
    }
    u128::from_le_bytes(wide)
}

/// The bits of an address that say which page it is in.
const PAGE_MASK: u64 = !PAGE_OFFSET;
