// SPDX-License-Identifier: GPL-2.0

//! What the emulator's system instructions need of the vCPU: task switches, and what it asks for.

use super::cr;
use super::debug;
use super::memory::EmuCpu;
use super::memory::EmuMemory;
use super::Next;
use super::Run;
use crate::backend::CrAccess;
use crate::backend::Loaded;
use crate::backend::PortAccess;
use crate::linux::msr as host_msr;
use crate::x86::cpuid::features::Features;
use crate::x86::cpuid::words::LeafDs1Eax;
use crate::x86::cr as checks;
use crate::x86::emulate::Cause;
use crate::x86::emulate::Outcome;
use crate::x86::emulate::Service;
use crate::x86::emulate::TaskSwitch;
use crate::x86::event::Shadow;
use crate::x86::event::Vectoring;
use crate::x86::exception::Fault;
use crate::x86::msr::Msr;
use crate::x86::regs::Cr0;
use crate::x86::regs::Cr4;
use crate::x86::regs::Dr7;
use crate::x86::regs::Efer;
use crate::x86::regs::Gpr;
use crate::x86::regs::Rflags;
use crate::x86::segment::SegReg;
use kernel::prelude::*;

impl<L: Loaded> Run<'_, L> {
    /// The guest switches tasks. The processor has done no more than look at the selector and a gate.
    pub(super) fn task_switch(&mut self, selector: u16, cause: Cause) -> Result<Next> {
        let event = match cause {
            Cause::Gate(_) => self.hw.vectoring(),
            _ => None,
        };
        let insn_len = self.hw.instruction_len();
        let mut switch = TaskSwitch {
            cause,
            selector,
            external: false,
            program_vector: None,
            insn_len,
        };
        if let Cause::Gate(_) = cause {
            let (error, insn_len) = match event {
                Some(Vectoring::Exception(e)) => (e.error, e.insn_len),
                Some(Vectoring::Interrupt(i)) => (None, i.insn_len),
                Some(Vectoring::Nmi) | None => (None, 0),
            };
            switch.cause = Cause::Gate(error);
            switch.insn_len = insn_len;
            switch.external = insn_len == 0;
            switch.program_vector = match event {
                Some(Vectoring::Interrupt(i)) if i.is_soft() => Some(i.vector),
                Some(Vectoring::Exception(e)) if insn_len != 0 => Some(e.vector.0),
                _ => None,
            };
        }

        let old = self.hw.segment(SegReg::Tr);
        let mut cpu = EmuCpu::new(&mut self.hw, &self.fpu, self.arch);
        let arch = &mut *self.arch;
        let mut memory = EmuMemory::new(self.memory, self.shared, &arch.devices);
        match arch.emulator.switch_task(&mut cpu, &mut memory, &switch) {
            Outcome::Done(done) => {
                if done.retired {
                    self.arrive(event);
                }
                Ok(Next::Guest)
            }
            Outcome::Fault(fault) => {
                if old != self.hw.segment(SegReg::Tr) {
                    // It is the new task's. An exception that it was switched to for is on its way all the same,
                    // and may make a double fault of it; anything else has arrived.
                    match event {
                        Some(Vectoring::Exception(_)) => self.arrive(None),
                        event => self.arrive(event),
                    }
                }
                self.raise(fault)
            }
            Outcome::Host(at) => Err(self.unbacked(at)),
            _ => {
                let raw = self.hw.raw_exit();
                self.page.set_emulation_error(&[], &raw);
                Ok(Next::User)
            }
        }
    }

    /// The new task is there, and with it the event that brought it.
    pub(super) fn arrive(&mut self, event: Option<Vectoring>) {
        if event.is_some() {
            self.arch.events.redeliver(None);
        }
        if let Some(Vectoring::Nmi) = event {
            self.hw.set_nmi_blocked(true);
        }
        self.hw.set_shadow(Shadow::None);
        // The local breakpoints were the old task's.
        let mut breakpoints = debug::breakpoints(&mut self.hw, self.arch);
        breakpoints.control = breakpoints.control.without(Dr7::LOCAL);
        debug::set_breakpoints(&mut self.hw, self.arch, &breakpoints);
        if self.arch.debugger.steps() {
            let flags = self.hw.rflags();
            self.hw.set_rflags(flags.with(Rflags::TF));
        }
        let pae = self.hw.cr0().has(Cr0::PG)
            && self.hw.cr4().has(Cr4::PAE)
            && !self.hw.efer().has(Efer::LMA);
        if pae {
            let cr3 = self.hw.cr3();
            if let Err(fault) = cr::load_pdptes(&mut self.hw, self.memory, cr3, &self.arch.features)
            {
                self.arch.events.raise(fault.into());
            }
        }
    }

    /// What an emulated instruction of `len` bytes asks for.
    #[inline(never)]
    pub(super) fn serve(&mut self, service: Service, len: u8) -> Result<Next> {
        match service {
            Service::WriteControl { number, from } => {
                let access = CrAccess::Write {
                    cr: number,
                    gpr: from,
                };
                self.cr_access(access, len)
            }
            Service::ReadControl { number, to } => {
                let access = CrAccess::Read {
                    cr: number,
                    gpr: to,
                };
                self.cr_access(access, len)
            }
            Service::ClearTaskSwitched => self.cr_access(CrAccess::Clts, len),
            Service::LoadMsw(source) => self.cr_access(CrAccess::Lmsw(source), len),
            Service::WriteDebug { number, from } => self.dr_access(number, from, true, len),
            Service::ReadDebug { number, to } => self.dr_access(number, to, false, len),
            Service::InvalidatePage(linear) => {
                self.invalidate_page(linear);
                self.complete(len)
            }
            Service::InvalidatePcid { kind, descriptor } => {
                let [identifier, linear] = descriptor;
                if !self.arch.features.has(Features::INVPCID) {
                    return self.raise(Fault::UD);
                }
                let cr4 = self.hw.cr4();
                if !checks::invpcid_is_valid(kind, identifier, linear, cr4) {
                    return self.raise(Fault::gp(0));
                }
                self.invalidate_pcid(kind, identifier, linear);
                self.complete(len)
            }
            Service::Halt => self.halt(len),
            // As at exits by them.
            Service::InvalidateCaches | Service::WriteBackCaches => self.complete(len),
            Service::ReadMsr => self.rdmsr(len),
            Service::WriteMsr => self.wrmsr(len),
            Service::ReadTsc => {
                self.read_tsc();
                self.complete(len)
            }
            Service::ReadTscAux => {
                if !self.arch.features.has(Features::RDTSCP) {
                    return self.raise(Fault::UD);
                }
                let aux = self.hw.read_msr(Msr::TSC_AUX).unwrap_or(0);
                self.hw.set_gpr(Gpr::Rcx, aux & 0xffff_ffff);
                self.read_tsc();
                self.complete(len)
            }
            Service::ReadCounter => self.raise(Fault::gp(0)),
            Service::Identify => self.identify(len),
            Service::WriteXcr => self.xsetbv(len),
            Service::ReadXcr => {
                // Which components are in use: a processor may say so of one that is not.
                const IN_USE: u64 = 1;
                let xsave = LeafDs1Eax::new(self.arch.cpuid.lookup(0xd, 1).eax);
                if self.hw.gpr(Gpr::Rcx) & 0xffff_ffff != IN_USE || !xsave.has(LeafDs1Eax::XGETBV1)
                {
                    return self.raise(Fault::gp(0));
                }
                let xcr0 = self.arch.xcr0;
                self.hw.set_gpr(Gpr::Rax, xcr0 & 0xffff_ffff);
                self.hw.set_gpr(Gpr::Rdx, xcr0 >> 32);
                self.complete(len)
            }
            Service::Hypercall => self.vmcall(len),
            Service::Port { port, size, input } => {
                let access = PortAccess {
                    port,
                    size: size.bytes(),
                    input,
                    string: false,
                    rep: false,
                };
                self.port_access(access, len, None)
            }
            Service::PortString { port, io } => {
                let access = PortAccess {
                    port,
                    size: io.size.bytes(),
                    input: io.input,
                    string: true,
                    rep: io.rep,
                };
                self.port_access(access, len, Some(io))
            }
        }
    }

    /// Reads the time-stamp counter as RDTSC does.
    fn read_tsc(&mut self) {
        let now = self.hw.tsc().at(host_msr::rdtsc());
        self.hw.set_gpr(Gpr::Rax, now & 0xffff_ffff);
        self.hw.set_gpr(Gpr::Rdx, now >> 32);
    }

    /// Goes past an instruction of `len` bytes.
    fn complete(&mut self, len: u8) -> Result<Next> {
        super::skip(&mut self.hw, len);
        Ok(Next::Guest)
    }
}
