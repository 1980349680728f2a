// SPDX-License-Identifier: GPL-2.0

//! KVM_RUN: enter the guest, handle its exits, and return when user space has to do something.
//!
//! The path of an exit is this file from [`Run::guest_loop`] down. The inner loop of
//! [`Run::enter_once`] stays with interrupts off and handles what needs nothing else;
//! [`Run::handle`] takes the others, with interrupts on, and decides whether to go back in.

pub(crate) mod apic;
mod clock;
pub(crate) mod cr;
pub(crate) mod debug;
pub(crate) mod halt;
pub(crate) mod hypercall;
pub(crate) mod memory;
pub(crate) mod msr;
mod port;
mod pv;
mod restricted;
pub(crate) mod shadow;
mod spin;
mod system;

use crate::abi;
use crate::apics::Apics;
use crate::arch::Arch;
use crate::backend::Exit;
use crate::backend::Loaded;
use crate::bindings::KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS as MWAIT_NEVER_UD;
use crate::bus::Bus;
use crate::events;
use crate::events::Delivery;
use crate::irq::Irqs;
use crate::irq::Mode;
use crate::linux::debug as host_debug;
use crate::linux::fpu::Swapped;
use crate::linux::irq::IrqsOff;
use crate::linux::irq::PreemptOff;
use crate::linux::msr as host_msr;
use crate::linux::task;
use crate::mem::ring::DirtyRing;
use crate::mem::GuestMemory;
use crate::msr_filter::MsrRules;
use crate::options::VmOptions;
use crate::pv::steal::Watch;
use crate::run_page::RunPages;
use crate::system::Host;
use crate::tlb::Request;
use crate::tlb::VcpuShared;
use crate::x86::cpuid::words::Leaf1Ecx;
use crate::x86::event::Combination;
use crate::x86::event::Exception;
use crate::x86::event::Shadow;
use crate::x86::exception::Fault;
use crate::x86::exception::Vector;
use crate::x86::regs::Cr0;
use crate::x86::regs::Cr4;
use crate::x86::regs::Gpr;
use crate::x86::regs::Rflags;
use crate::x86::regs::Xcr0;
use apic::Controllers;
use kernel::prelude::*;

pub(crate) use hypercall::PendingHypercall;
pub(crate) use memory::PendingMmio;
pub(crate) use msr::PendingMsr;
pub(crate) use port::PendingPort;

/// What a handler wants next.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Back into the guest.
    Guest,
    /// To user space; the exit reason has been written.
    User,
}

/// What waits for the next KVM_RUN to be completed.
#[derive(Default)]
pub(crate) enum Pending {
    /// Nothing.
    #[default]
    Nothing,
    /// A port access that the VMM was asked for.
    Port(PendingPort),
    /// An instruction whose device accesses the VMM was asked for.
    Mmio(PendingMmio),
    /// A hypercall that the VMM was asked to do.
    Hypercall(PendingHypercall),
    /// An access to an MSR that the VMM was asked for.
    Msr(PendingMsr),
}

/// Where the guest was when it left for user space. A VMM that resets the vCPU there, because the
/// port that was written resets the machine, has nothing to be completed when it comes back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct LinearRip(u64);

impl LinearRip {
    fn of(hw: &mut impl Loaded) -> Self {
        Self(hw.cs_base().wrapping_add(hw.rip()))
    }

    fn is_still(self, hw: &mut impl Loaded) -> bool {
        self == Self::of(hw)
    }
}

/// A vCPU in KVM_RUN.
pub(crate) struct Run<'a, L: Loaded> {
    pub(crate) hw: L,
    pub(crate) arch: &'a mut Arch,
    pub(crate) fpu: Swapped<'a>,
    pub(crate) memory: &'a GuestMemory,
    pub(crate) bus: &'a Bus,
    pub(crate) apics: &'a Apics,
    pub(crate) irqs: &'a Irqs,
    pub(crate) msrs: &'a MsrRules,
    pub(crate) options: &'a VmOptions,
    pub(crate) shared: &'a VcpuShared,
    pub(crate) page: &'a RunPages,
    pub(crate) host: &'a Host,
    pub(crate) watch: Watch<'a>,
}

impl<L: Loaded> Run<'_, L> {
    /// KVM_RUN, from the completion of what the last one left to the outputs of this one. `prepared` is
    /// how what comes before went: the outputs come after a failure too.
    pub(crate) fn run(&mut self, prepared: Result) -> Result {
        self.begin_watch();
        let result = prepared.and_then(|()| self.run_inner());
        self.end_watch();
        let ready = self.irqs.mode() == Mode::Kernel || self.ready_for_interrupt();
        let interrupts_on = self.hw.rflags().has(Rflags::IF);
        self.page
            .set_outputs(ready, interrupts_on, self.arch.cr8(), self.arch.apic_base());
        result
    }

    fn run_inner(&mut self) -> Result {
        if halt::is_uninitialised(self.arch.mp_state) {
            return self.wait_for_startup();
        }
        if self.arch.apic.is_none() {
            let cr8 = self.page.cr8();
            if cr8 > 15 {
                return Err(EINVAL);
            }
            self.arch.set_vmm_cr8(cr8);
        }
        if self.complete_pending()? == Next::User {
            return Ok(());
        }
        if self.page.immediate_exit() {
            return Err(EINTR);
        }
        self.guest_loop()
    }

    /// Finishes the instruction for which the last KVM_RUN returned.
    fn complete_pending(&mut self) -> Result<Next> {
        match core::mem::take(&mut self.arch.pending) {
            Pending::Nothing => Ok(Next::Guest),
            Pending::Port(port) => self.complete_port(port),
            Pending::Mmio(mmio) => self.complete_mmio(mmio),
            Pending::Hypercall(call) => Ok(self.complete_hypercall(call)),
            Pending::Msr(msr) => self.complete_msr(&msr),
        }
    }

    fn guest_loop(&mut self) -> Result {
        self.page.set_exit_reason(abi::exit::UNKNOWN);
        loop {
            if self.arch.events.take_triple_fault() {
                self.page.set_exit_reason(abi::exit::SHUTDOWN);
                return Ok(());
            }
            if self.shared.ring().is_some_and(DirtyRing::is_full) {
                self.page.set_exit_reason(abi::exit::DIRTY_RING_FULL);
                return Ok(());
            }
            if self.window_is_open() {
                self.page.set_exit_reason(abi::exit::IRQ_WINDOW_OPEN);
                self.shared.stats.request_irq_exits.bump();
                return Ok(());
            }
            if self.arch.apic.is_some() && !self.attend() {
                if self.step_ends_halted() {
                    return Ok(());
                }
                self.sleep();
            } else if self.hw.is_restricted() && self.needs_software() {
                if self.step_without_hardware()? == Next::User {
                    return Ok(());
                }
            } else {
                if self.arch.shadow.is_some() {
                    self.prepare_shadow()?;
                }
                if let Some(exit) = self.enter_once() {
                    if self.arch.clock.catches_up() {
                        self.shared.request(Request::Clock);
                    }
                    if self.handle(exit)? == Next::User {
                        return Ok(());
                    }
                    if let Some(vector) = self.ended_for_vmm() {
                        self.page.set_ioapic_eoi(vector);
                        return Ok(());
                    }
                } else if self.shared.take(Request::MsrFilter) {
                    self.fetch_msr_filter();
                }
            }
            if task::guest_entry_work_seen() {
                // A signal, before it came or while the rest was done.
                if task::signal_pending() || task::guest_entry_work().is_err() {
                    self.page.set_exit_reason(abi::exit::INTR);
                    self.shared.stats.signal_exits.bump();
                    return Err(EINTR);
                }
            }
        }
    }

    /// Whether the VMM waits for a moment to queue an interrupt, and this is it.
    fn window_is_open(&mut self) -> bool {
        self.vmm_wants_window() && self.ready_for_interrupt()
    }

    /// Whether the VMM waits for a moment to queue an interrupt, and has a way to.
    fn vmm_wants_window(&self) -> bool {
        if !self.page.request_interrupt_window() {
            return false;
        }
        match &self.arch.apic {
            None => true,
            Some(apic) => {
                self.irqs.mode() == Mode::Split
                    && apic.extint.is_none()
                    && apic.model.accepts_extint()
            }
        }
    }

    /// Whether an interrupt that the VMM queued now would be delivered at once.
    fn ready_for_interrupt(&mut self) -> bool {
        let taken = self
            .arch
            .apic
            .as_ref()
            .is_none_or(|apic| apic.extint.is_none() && apic.model.accepts_extint());
        taken && events::ready_for_interrupt(&mut self.hw, &self.arch.events)
    }

    /// The interrupt whose end the VMM's I/O APIC has to be told of.
    fn ended_for_vmm(&mut self) -> Option<u8> {
        self.arch.apic.as_deref_mut()?.ioapic_eoi.take()
    }

    /// Sets up the event that the guest is to have next.
    #[inline]
    fn deliver_event(&mut self) -> Delivery {
        let wanted = self.vmm_wants_window();
        let arch = &mut *self.arch;
        let mut controllers = Controllers {
            apic: arch.apic.as_deref_mut(),
            irqs: self.irqs,
        };
        events::deliver(
            &mut self.hw,
            &mut arch.events,
            &mut arch.dr6,
            &mut arch.debugger,
            wanted,
            &mut controllers,
            &self.shared.stats,
        )
    }

    /// Enters the guest, unless something came up: `None` then, or if the exit is dealt with.
    fn enter_once(&mut self) -> Option<Exit> {
        let delivery = self.deliver_event();
        if delivery.by_software {
            return None;
        }

        let preempt = PreemptOff::new();
        self.hw.prepare(&preempt);
        if self.shared.set_cpu(preempt.cpu()) {
            self.moved();
        }
        let irqs = IrqsOff::new();
        self.shared.enter_guest_mode();
        if self.shared.pending() {
            self.take_requests();
        }
        // What the requests that are left ask for may sleep.
        if self.shared.pending() || task::guest_entry_work_pending(&irqs) {
            self.shared.leave_guest_mode();
            drop(irqs);
            drop(preempt);
            self.hw.cancel_injection();
            self.update_structures();
            return None;
        }

        if self.arch.apic.is_some() {
            self.prepare_apic();
        }
        if delivery.exit_at_once {
            // It waits for interrupts to be on, which is in the guest, after the delivery.
            preempt.interrupt_self();
        }
        self.arch.has_run = true;
        self.fpu.load();
        let switched = self.load_guest_state(&irqs);
        task::guest_time_begins(&irqs);
        let exit = self.inner_loop(&irqs);
        // While others still take the vCPU to be in the guest: who waits for it to leave finds marked
        // what it has written.
        if self.hw.has_logged_writes() {
            let marker = self.memory.marker(self.shared);
            self.hw.take_logged_writes(|gpa| marker.mark(gpa >> 12));
        }
        self.shared.leave_guest_mode();
        self.save_guest_state(&irqs, switched);

        let exit = match exit {
            Exit::Interrupt => {
                self.hw.host_interrupt(&irqs);
                self.shared.stats.irq_exits.bump();
                None
            }
            Exit::Nmi | Exit::Handled => None,
            Exit::MachineCheck => {
                crate::linux::irq::machine_check(&irqs);
                None
            }
            exit => Some(exit),
        };
        task::guest_time_ends(&irqs);
        self.watch.set_between(exit.is_none());
        drop(irqs);
        drop(preempt);

        if self.arch.pv.eoi.offered {
            self.take_back_offer();
        }
        // An entry that failed has not touched the event.
        if !self.hw.entry_failed() {
            events::conclude(&mut self.hw, &mut self.arch.events, &delivery);
        }
        exit
    }

    /// Enters, and enters again as long as the exits need neither interrupts nor user space.
    #[inline]
    fn inner_loop(&mut self, irqs: &IrqsOff) -> Exit {
        loop {
            let exit = self.hw.enter(irqs);
            self.shared.stats.exits.bump();
            match exit {
                Exit::Cpuid if !self.arch.msrs.cpuid_faulting() => {
                    let len = self.hw.instruction_len();
                    self.cpuid(len);
                }
                // Reading changes nothing that an entry prepares; writing may. Nor may an
                // exception be raised here: what was injected before is not concluded yet.
                Exit::Rdmsr if self.rdmsr_at_once() => {}
                Exit::Wrmsr if self.wrmsr_at_once() => {}
                Exit::Timer if self.timer_at_once() => {}
                exit => return exit,
            }
            if self.shared.pending() || task::guest_entry_work_pending(irqs) {
                return Exit::Handled;
            }
        }
    }

    fn take_requests(&mut self) {
        if self.shared.take(Request::TlbFlush) {
            self.hw.flush_memory();
            self.shared.stats.tlb_flush.bump();
        }
        if self.shared.take(Request::WriteLogging) {
            self.hw.set_write_logging(self.memory.is_logging());
        }
        if self.shared.take(Request::DebugStep) {
            self.hw.set_shadow(Shadow::None);
        }
    }

    /// Loads what no VMCS field holds and the host must not keep: XCR0, breakpoint addresses.
    #[inline]
    fn load_guest_state(&mut self, irqs: &IrqsOff) -> Switched {
        let mut switched = Switched {
            xcr0: false,
            pkru: None,
            debugctl: host_debug::host_debugctl(),
        };
        // The guest's own once it has either: by WRPKRU, or by XRSTOR.
        if self.host.has_pku && (self.arch.xcr0 & Xcr0::PKRU.bits() != 0 || self.hw.has_pke()) {
            switched.pkru = Some(host_msr::swap_pkru(irqs, self.arch.pkru));
        }
        if self.host.xcr0 != 0
            && self.arch.xcr0 != self.host.xcr0
            && self.hw.cr4().has(Cr4::OSXSAVE)
        {
            host_msr::load_xcr0(irqs, self.arch.xcr0);
            switched.xcr0 = true;
        }
        if host_debug::host_breakpoints_active() {
            host_debug::disarm();
        }
        if self.arch.breakpoints_armed {
            host_debug::load_guest(&self.arch.dr);
        }
        switched
    }

    /// The exit has disarmed the breakpoints; their addresses are harmless, and MOV DR always exits.
    #[inline]
    fn save_guest_state(&mut self, irqs: &IrqsOff, switched: Switched) {
        if host_debug::host_breakpoints_active() {
            host_debug::restore_host_breakpoints();
        }
        if switched.xcr0 {
            host_msr::load_xcr0(irqs, self.host.xcr0);
        }
        if let Some(pkru) = switched.pkru {
            self.arch.pkru = host_msr::swap_pkru(irqs, pkru);
        }
        if switched.debugctl != 0 {
            host_debug::restore_host_debugctl(switched.debugctl);
        }
    }

    /// Handles an exit, interrupts on.
    fn handle(&mut self, exit: Exit) -> Result<Next> {
        match exit {
            Exit::Interrupt | Exit::Nmi | Exit::MachineCheck | Exit::Handled => Ok(Next::Guest),
            // The loop looks for what is to be injected anyway.
            Exit::InterruptWindow => {
                self.shared.stats.irq_window_exits.bump();
                Ok(Next::Guest)
            }
            Exit::NmiWindow => {
                self.shared.stats.nmi_window_exits.bump();
                Ok(Next::Guest)
            }
            Exit::Cpuid => {
                let len = self.hw.instruction_len();
                self.identify(len)
            }
            Exit::Port(access) => {
                self.shared.stats.io_exits.bump();
                let len = self.hw.instruction_len();
                self.port_access(access, len, None)
            }
            Exit::PageFault {
                gpa,
                access,
                linear,
            } => self.page_fault(gpa, access, linear),
            Exit::Hlt => {
                let len = self.hw.instruction_len();
                self.halt(len)
            }
            // It has been run, and the loop looks for what came of it.
            Exit::Timer => Ok(Next::Guest),
            Exit::PriorityBelowThreshold => {
                self.recheck_interrupts();
                Ok(Next::Guest)
            }
            Exit::InterruptEnd(vector) => {
                self.interrupt_end(vector);
                Ok(Next::Guest)
            }
            Exit::ApicAccess {
                offset,
                linear,
                write,
            } => self.apic_access(offset, linear, write),
            Exit::ApicWrite(offset) => {
                self.register_written(offset);
                Ok(Next::Guest)
            }
            Exit::Rdmsr => {
                let len = self.hw.instruction_len();
                self.rdmsr(len)
            }
            Exit::Wrmsr => {
                let len = self.hw.instruction_len();
                self.wrmsr(len)
            }
            Exit::Cr(access) => {
                let len = self.hw.instruction_len();
                self.cr_access(access, len)
            }
            Exit::Dr { dr, gpr, write } => {
                let len = self.hw.instruction_len();
                self.dr_access(dr, gpr, write, len)
            }
            Exit::Xsetbv => {
                let len = self.hw.instruction_len();
                self.xsetbv(len)
            }
            Exit::Exception(exception) if self.is_for_debugger(exception.vector) => {
                Ok(self.leave_for_debugger(&exception))
            }
            Exit::Exception(exception) if self.hw.imitates_real_mode() => {
                self.real_mode_exception(exception)
            }
            Exit::Exception(exception) if exception.vector == Vector::AC => {
                self.alignment_check(exception)
            }
            Exit::Exception(exception) if exception.vector == Vector::UD => {
                self.undefined(exception)
            }
            Exit::Exception(exception) => {
                events::mark_restart(&mut self.hw, exception.vector);
                self.arch.events.raise(exception);
                Ok(Next::Guest)
            }
            Exit::Vmcall => {
                let len = self.hw.instruction_len();
                self.vmcall(len)
            }
            Exit::Pause => self.pause(),
            Exit::Invd => {
                self.skip();
                Ok(Next::Guest)
            }
            Exit::Wbinvd => {
                // Nothing of a guest bypasses the caches, so there is nothing to write back.
                self.skip();
                Ok(Next::Guest)
            }
            Exit::GuestPageFault { linear, error } => self.guest_page_fault(linear, error),
            Exit::InvalidatePage(linear) => {
                self.invalidate_page(linear);
                self.skip();
                Ok(Next::Guest)
            }
            // Its operands are for the emulator to find.
            Exit::Invpcid => self.emulate_one(),
            Exit::Rdpmc => self.raise(Fault::gp(0)),
            Exit::Monitor | Exit::Mwait => self.monitor(),
            Exit::Undefined => self.raise(Fault::UD),
            Exit::TripleFault => {
                self.page.set_exit_reason(abi::exit::SHUTDOWN);
                Ok(Next::User)
            }
            Exit::TaskSwitch { selector, cause } => self.task_switch(selector, cause),
            Exit::EntryFailed(reason) => {
                self.page.set_entry_failure(reason, self.shared.cpu());
                Ok(Next::User)
            }
            Exit::Unknown => {
                let raw = self.hw.raw_exit();
                let data = [raw.reason, self.shared.cpu() as u64];
                self.page
                    .set_internal_error(abi::internal::UNEXPECTED_EXIT, &data);
                Ok(Next::User)
            }
        }
    }

    /// CPUID, unless the guest has it fault.
    fn identify(&mut self, len: u8) -> Result<Next> {
        let cpl = crate::arch::cpl(&mut self.hw);
        if self.arch.msrs.cpuid_faults(cpl) {
            return self.raise(Fault::gp(0));
        }
        self.cpuid(len);
        Ok(Next::Guest)
    }

    /// CPUID, of `len` bytes, from the table that KVM_SET_CPUID2 made. All zero without one, as in KVM.
    #[inline]
    fn cpuid(&mut self, len: u8) {
        let function = self.hw.gpr(Gpr::Rax) as u32;
        let index = self.hw.gpr(Gpr::Rcx) as u32;
        let regs = self.arch.cpuid.lookup(function, index);
        self.hw.set_gpr(Gpr::Rax, u64::from(regs.eax));
        self.hw.set_gpr(Gpr::Rbx, u64::from(regs.ebx));
        self.hw.set_gpr(Gpr::Rcx, u64::from(regs.ecx));
        self.hw.set_gpr(Gpr::Rdx, u64::from(regs.edx));
        skip(&mut self.hw, len);
    }

    /// MONITOR and MWAIT do nothing, as if what is waited for were there already: a guest must not put the
    /// host's CPU to sleep. #UD if the VMM wants that of a guest whose CPUID has not got them.
    fn monitor(&mut self) -> Result<Next> {
        let leaf = Leaf1Ecx::new(self.arch.cpuid.lookup(1, 0).ecx);
        if !self.options.has_quirk(MWAIT_NEVER_UD) && !leaf.has(Leaf1Ecx::MONITOR) {
            return self.raise(Fault::UD);
        }
        self.skip();
        Ok(Next::Guest)
    }

    /// #AC is the guest's own if it asked for alignment checks; else the host wants to know of locked
    /// accesses that are split between cache lines, and the guest never heard of that.
    fn alignment_check(&mut self, exception: Exception) -> Result<Next> {
        let asked = self.hw.cr0().has(Cr0::AM)
            && self.hw.rflags().has(Rflags::AC)
            && crate::arch::cpl(&mut self.hw) == 3;
        if !asked && task::host_detects_split_locks() {
            let rip = self.hw.rip();
            if task::allow_split_lock(rip) {
                return Ok(Next::Guest);
            }
            let error = exception.error.unwrap_or(0);
            self.page.set_exception(exception.vector.0.into(), error);
            return Ok(Next::User);
        }
        events::mark_restart(&mut self.hw, exception.vector);
        self.arch.events.raise(exception);
        Ok(Next::Guest)
    }

    /// Raises an exception in the place of completing the instruction.
    fn raise(&mut self, fault: Fault) -> Result<Next> {
        events::mark_restart(&mut self.hw, fault.vector);
        let combination = self.arch.events.raise_over(fault.into());
        // The address of a page fault that makes a double fault is known before the double fault is delivered.
        if let (Combination::DoubleFault, Some(linear)) = (combination, fault.cr2) {
            self.hw.set_cr2(linear);
        }
        Ok(Next::Guest)
    }

    /// Completes the instruction that exited: RIP goes past it, the one-instruction shadow ends, and
    /// a single step is due if it was asked for.
    #[inline]
    fn skip(&mut self) {
        let len = self.hw.instruction_len();
        skip(&mut self.hw, len);
    }
}

/// What [`Run::load_guest_state`] changed.
struct Switched {
    xcr0: bool,
    /// The thread's PKRU.
    pkru: Option<u32>,
    debugctl: u64,
}

/// Moves RIP past an instruction of `len` bytes, as its completion would.
#[inline]
pub(crate) fn skip(hw: &mut impl Loaded, len: u8) {
    let old = hw.rip();
    let mut rip = old.wrapping_add(u64::from(len));
    // Out of 64-bit mode RIP wraps at 4 GiB; a carry into bit 32 is the only time it matters.
    if (old ^ rip) >> 31 == 3 && !crate::arch::in_64bit_mode(hw) {
        rip &= 0xffff_ffff;
    }
    hw.set_rip(rip);
    retire(hw);
}

/// What the completion of any instruction does besides moving RIP: the one-instruction shadow ends, RF
/// is cleared, and a single step is due if it was asked for.
#[inline]
fn retire(hw: &mut impl Loaded) {
    let flags = hw.rflags();
    if flags.has(Rflags::RF) {
        hw.set_rflags(flags.without(Rflags::RF));
    }
    retire_emulated(hw, flags.has(Rflags::TF), Shadow::None);
}

/// The same for an instruction that was emulated: the emulator has cleared RF, and may have changed TF.
#[inline]
fn retire_emulated(hw: &mut impl Loaded, step: bool, shadow: Shadow) {
    hw.set_shadow(shadow);
    if step {
        hw.set_pending_step();
    }
}
