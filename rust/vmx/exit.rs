// SPDX-License-Identifier: GPL-2.0

//! Entering a guest, and making sense of why it came back (SDM vol. 3, chapters 28 to 30 and
//! appendix C).

use super::fields as f;
use super::fields::Interruptibility;
use super::fields::IntrInfo;
use super::fields::IntrKind;
use super::fields::PrimaryControls;
use super::fields::SecondaryControls;
use super::qualification::CrQualification;
use super::qualification::IoQualification;
use super::qualification::TaskSwitchQualification;
use super::reason;
use super::vcpu::LoadedVcpu;
use super::vmcs;
use crate::backend::Exit;
use crate::backend::Loaded;
use crate::backend::RawExit;
use crate::backend::TableReg;
use crate::bindings;
use crate::linux::irq::IrqsOff;
use crate::linux::irq::PreemptOff;
use crate::mmu::ept::Access;
use crate::x86::apic::base::ApicMode;
use crate::x86::clock::tsc::GuestTsc;
use crate::x86::event::Exception;
use crate::x86::event::Injection;
use crate::x86::event::Interrupt;
use crate::x86::event::Shadow;
use crate::x86::event::Vectoring;
use crate::x86::exception::PfError;
use crate::x86::exception::Vector;
use crate::x86::msr::filter::Access as MsrAccess;
use crate::x86::msr::Msr;
use crate::x86::regs::Cr0;
use crate::x86::regs::Cr4;
use crate::x86::regs::Dr6;
use crate::x86::regs::Dr7;
use crate::x86::regs::Efer;
use crate::x86::regs::Gpr;
use crate::x86::regs::Rflags;
use crate::x86::segment::SegAttr;
use crate::x86::segment::SegReg;
use crate::x86::segment::Segment;

impl LoadedVcpu<'_> {
    /// Exits in the delivery of an event, and exits by an exception, may have to set NMI blocking
    /// again: an IRET that faulted had already lifted it.
    fn restore_nmi_blocking(&mut self, unblocked: bool) {
        if unblocked && !IntrInfo::new(self.read(f::IDT_VECTORING_INFO)).is_valid() {
            let old = self.interruptibility();
            self.set_interruptibility(old, old | Interruptibility::NMI);
        }
    }

    fn decode_exception(&mut self) -> Exit {
        let info = IntrInfo::new(self.v.entry.intr_info);
        match info.kind() {
            IntrKind::Nmi => return Exit::Nmi,
            IntrKind::HardException
            | IntrKind::SoftException
            | IntrKind::PrivilegedSoftException => {}
            _ => return Exit::Unknown,
        }
        let vector = Vector(info.vector());
        if vector == Vector::MC {
            return Exit::MachineCheck;
        }
        if vector != Vector::DF {
            self.restore_nmi_blocking(info.nmi_unblocked());
        }
        let error = info.has_error_code().then(|| self.read(f::EXIT_ERROR_CODE));
        if vector == Vector::PF {
            return Exit::GuestPageFault {
                linear: self.read(f::EXIT_QUALIFICATION),
                error: PfError::new(error.unwrap_or(0)),
            };
        }
        if vector == Vector::DB {
            self.keep_step_over_shadow();
        }
        Exit::Exception(Exception {
            vector,
            error,
            payload: (vector == Vector::DB).then(|| self.read(f::EXIT_QUALIFICATION)),
            insn_len: self.soft_len(info.kind(), f::EXIT_INSTRUCTION_LENGTH),
        })
    }

    /// An entry that injects #DB for a single step over STI or a load of SS is refused unless a step is
    /// pending as well (SDM vol. 3, 27.3.1.5).
    fn keep_step_over_shadow(&mut self) {
        let shadow = Interruptibility::STI | Interruptibility::MOV_SS;
        if self.interruptibility().has_any(shadow) && LoadedVcpu::rflags(self).has(Rflags::TF) {
            self.set_pending_step();
        }
    }

    /// The length of the instruction that asked for a software event; zero for the others.
    fn soft_len(&self, kind: IntrKind, field: f::Field<u32>) -> u8 {
        match kind {
            IntrKind::SoftInterrupt
            | IntrKind::SoftException
            | IntrKind::PrivilegedSoftException => self.read(field) as u8,
            _ => 0,
        }
    }

    fn decode_ept_violation(&mut self) -> Exit {
        let qualification = self.read(f::EXIT_QUALIFICATION);
        self.restore_nmi_blocking(qualification & 1 << 12 != 0);
        let gpa = self.read(f::GUEST_PHYSICAL_ADDRESS);
        // Bits 7 and 8: the linear address is valid, and `gpa` is what it translates to, rather than
        // the address of a table that the walk needed.
        let linear = (qualification & 0x180 == 0x180).then(|| self.read(f::GUEST_LINEAR_ADDRESS));
        Exit::PageFault {
            gpa,
            access: Access {
                read: qualification & 1 != 0,
                write: qualification & 2 != 0,
                exec: qualification & 4 != 0,
            },
            linear,
        }
    }

    fn decode_apic_access(&mut self) -> Exit {
        let qualification = self.read(f::EXIT_QUALIFICATION);
        let kind = (qualification >> 12) & 15;
        Exit::ApicAccess {
            offset: (qualification & 0xfff) as u16,
            // Reads and writes of instructions; there are fetches, deliveries of events and physical
            // accesses as well.
            linear: (kind <= 1).then(|| self.read(f::GUEST_LINEAR_ADDRESS)),
            write: kind == 1,
        }
    }

    #[inline]
    fn decode(&mut self) -> Exit {
        let full = self.v.entry.exit_reason;
        match full {
            reason::EXCEPTION_NMI => self.decode_exception(),
            reason::EXTERNAL_INTERRUPT => Exit::Interrupt,
            reason::TRIPLE_FAULT => Exit::TripleFault,
            reason::INTERRUPT_WINDOW => Exit::InterruptWindow,
            reason::NMI_WINDOW => Exit::NmiWindow,
            reason::TASK_SWITCH => {
                TaskSwitchQualification(self.read(f::EXIT_QUALIFICATION)).decode()
            }
            reason::CPUID => Exit::Cpuid,
            reason::HLT => Exit::Hlt,
            reason::INVD => Exit::Invd,
            reason::INVLPG => Exit::InvalidatePage(self.read(f::EXIT_QUALIFICATION)),
            reason::INVPCID => Exit::Invpcid,
            reason::RDPMC => Exit::Rdpmc,
            reason::VMCALL => Exit::Vmcall,
            reason::CR_ACCESS => {
                Exit::Cr(CrQualification(self.read(f::EXIT_QUALIFICATION)).decode())
            }
            reason::DR_ACCESS => {
                let q = self.read(f::EXIT_QUALIFICATION);
                Exit::Dr {
                    dr: (q & 7) as u8,
                    gpr: Gpr::from_number((q >> 8) as u8),
                    write: q & 1 << 4 == 0,
                }
            }
            reason::IO => Exit::Port(IoQualification(self.read(f::EXIT_QUALIFICATION)).decode()),
            reason::RDMSR => Exit::Rdmsr,
            reason::WRMSR => Exit::Wrmsr,
            reason::MWAIT => Exit::Mwait,
            reason::MONITOR => Exit::Monitor,
            reason::PAUSE => Exit::Pause,
            reason::EPT_VIOLATION => self.decode_ept_violation(),
            reason::PML_FULL => {
                // Every exit empties the log.
                let qualification = self.read(f::EXIT_QUALIFICATION);
                self.restore_nmi_blocking(qualification & 1 << 12 != 0);
                Exit::Handled
            }
            reason::TPR_BELOW_THRESHOLD => Exit::PriorityBelowThreshold,
            reason::VIRTUALISED_EOI => Exit::InterruptEnd(self.read(f::EXIT_QUALIFICATION) as u8),
            reason::APIC_ACCESS => self.decode_apic_access(),
            reason::APIC_WRITE => {
                Exit::ApicWrite((self.read(f::EXIT_QUALIFICATION) & 0xfff) as u16)
            }
            reason::PREEMPTION_TIMER => Exit::Timer,
            reason::WBINVD => Exit::Wbinvd,
            reason::XSETBV => Exit::Xsetbv,
            // The guest has neither VMX nor SMX.
            reason::VMXON..28 | 19..=26 | reason::INVEPT | reason::INVVPID | reason::GETSEC => {
                Exit::Undefined
            }
            reason::RSM | reason::ENCLS => Exit::Undefined,
            _ if full & reason::FAILED != 0 => {
                if full & 0xffff == reason::MACHINE_CHECK_AT_ENTRY {
                    Exit::MachineCheck
                } else {
                    Exit::EntryFailed(u64::from(full))
                }
            }
            _ => Exit::Unknown,
        }
    }

    #[cold]
    fn flush_tlb(&mut self) {
        let caps = &self.vmx.caps;
        if core::mem::take(&mut self.v.flush_memory) {
            match self.v.eptp {
                Some(eptp) => {
                    let kind = if caps.invept_single { 1 } else { 2 };
                    // SAFETY: VMX is on, and the type was found among the capabilities.
                    unsafe { vmcs::invept(kind, eptp) };
                }
                // There are no others than linear ones.
                None => self.v.flush_guest = true,
            }
        }
        if core::mem::take(&mut self.v.flush_guest) && caps.secondary.has(SecondaryControls::VPID) {
            let kind = if caps.invvpid_single { 1 } else { 2 };
            // SAFETY: VMX is on, and the type was found among the capabilities.
            unsafe { vmcs::invvpid(kind, self.v.vpid.id()) };
        }
    }

    /// The host's CR3 and CR4 are whatever they are now: an exit loads them back.
    #[inline]
    fn refresh_host_state(&mut self) {
        // SAFETY: Interrupts are off in the caller, which both functions want.
        let (cr3, cr4) = unsafe {
            (
                bindings::__get_current_cr3_fast() as u64,
                bindings::cr4_read_shadow() as u64,
            )
        };
        if cr3 != self.v.host_cr3 {
            self.v.host_cr3 = cr3;
            self.write(f::HOST_CR3, cr3);
        }
        if cr4 != self.v.host_cr4 {
            self.v.host_cr4 = cr4;
            self.write(f::HOST_CR4, cr4);
        }
    }
}

impl Loaded for LoadedVcpu<'_> {
    #[inline]
    fn gpr(&mut self, r: Gpr) -> u64 {
        LoadedVcpu::gpr(self, r)
    }

    #[inline]
    fn set_gpr(&mut self, r: Gpr, value: u64) {
        LoadedVcpu::set_gpr(self, r, value);
    }

    #[inline]
    fn rip(&mut self) -> u64 {
        LoadedVcpu::rip(self)
    }

    #[inline]
    fn set_rip(&mut self, rip: u64) {
        LoadedVcpu::set_rip(self, rip);
    }

    #[inline]
    fn rflags(&mut self) -> Rflags {
        LoadedVcpu::rflags(self)
    }

    #[inline]
    fn set_rflags(&mut self, rflags: Rflags) {
        LoadedVcpu::set_rflags(self, rflags);
    }

    fn cr0(&mut self) -> Cr0 {
        LoadedVcpu::cr0(self)
    }

    fn set_cr0(&mut self, cr0: Cr0) {
        LoadedVcpu::set_cr0(self, cr0);
    }

    fn cr2(&mut self) -> u64 {
        self.v.entry.cr2
    }

    fn set_cr2(&mut self, cr2: u64) {
        self.v.entry.cr2 = cr2;
    }

    fn cr3(&mut self) -> u64 {
        LoadedVcpu::cr3(self)
    }

    fn set_cr3(&mut self, cr3: u64) {
        LoadedVcpu::set_cr3(self, cr3);
    }

    fn cr4(&mut self) -> Cr4 {
        LoadedVcpu::cr4(self)
    }

    fn set_cr4(&mut self, cr4: Cr4) {
        LoadedVcpu::set_cr4(self, cr4);
    }

    #[inline]
    fn has_pke(&mut self) -> bool {
        self.v.pke
    }

    fn efer(&mut self) -> Efer {
        LoadedVcpu::efer(self)
    }

    fn set_efer(&mut self, efer: Efer) {
        LoadedVcpu::set_efer(self, efer);
    }

    fn dr7(&mut self) -> Dr7 {
        LoadedVcpu::dr7(self)
    }

    fn set_dr7(&mut self, dr7: Dr7) {
        LoadedVcpu::set_dr7(self, dr7);
    }

    fn segment(&mut self, seg: SegReg) -> Segment {
        LoadedVcpu::segment(self, seg)
    }

    fn segment_attr(&mut self, seg: SegReg) -> SegAttr {
        LoadedVcpu::segment_attr(self, seg)
    }

    fn set_segment(&mut self, seg: SegReg, value: &Segment) {
        LoadedVcpu::set_segment(self, seg, value);
    }

    fn gdtr(&mut self) -> TableReg {
        LoadedVcpu::gdtr(self)
    }

    fn set_gdtr(&mut self, value: TableReg) {
        LoadedVcpu::set_gdtr(self, value);
    }

    fn idtr(&mut self) -> TableReg {
        LoadedVcpu::idtr(self)
    }

    fn set_idtr(&mut self, value: TableReg) {
        LoadedVcpu::set_idtr(self, value);
    }

    fn set_shadow_root(&mut self, cr3: u64) {
        LoadedVcpu::set_shadow_root(self, cr3);
    }

    fn take_paging_change(&mut self) -> bool {
        self.v.restricted.take_paging_change()
    }

    fn pdptes(&mut self) -> [u64; 4] {
        LoadedVcpu::pdptes(self)
    }

    fn set_pdptes(&mut self, pdptes: &[u64; 4]) {
        LoadedVcpu::set_pdptes(self, pdptes);
    }

    #[inline]
    fn is_restricted(&self) -> bool {
        self.v.restricted.on
    }

    #[inline]
    fn needs_emulation(&mut self) -> bool {
        LoadedVcpu::needs_emulation(self)
    }

    #[inline]
    fn needs_delivery(&mut self) -> bool {
        self.v.real || LoadedVcpu::needs_emulation(self)
    }

    #[inline]
    fn imitates_real_mode(&self) -> bool {
        self.v.real
    }

    fn set_private_pages(&mut self, tss: Option<u64>, identity_map: u64) {
        LoadedVcpu::set_private_pages(self, tss, identity_map);
    }

    fn read_msr(&mut self, msr: Msr) -> Option<u64> {
        LoadedVcpu::read_msr(self, msr)
    }

    fn write_msr(&mut self, msr: Msr, value: u64) -> bool {
        LoadedVcpu::write_msr(self, msr, value)
    }

    #[inline]
    fn tsc(&mut self) -> GuestTsc {
        LoadedVcpu::tsc(self)
    }

    fn pass_msrs(&mut self, allowed: impl Fn(Msr, MsrAccess) -> bool) {
        let switched = self.v.spec_ctrl.is_switched();
        self.v.msr_bitmap.pass_allowed(allowed, switched);
    }

    fn command(&mut self, msr: Msr) {
        LoadedVcpu::command(msr);
    }

    fn set_tsc(&mut self, tsc: GuestTsc) {
        LoadedVcpu::set_tsc(self, tsc);
    }

    fn left_at(&mut self) -> Option<u64> {
        self.follow.get().left_at()
    }

    #[inline]
    fn shadow(&mut self) -> Shadow {
        let state = self.interruptibility();
        if state.has(Interruptibility::MOV_SS) {
            Shadow::MovSs
        } else if state.has(Interruptibility::STI) {
            Shadow::Sti
        } else {
            Shadow::None
        }
    }

    #[inline]
    fn set_shadow(&mut self, shadow: Shadow) {
        let old = self.interruptibility();
        let new = old
            .with_if(Interruptibility::STI, shadow == Shadow::Sti)
            .with_if(Interruptibility::MOV_SS, shadow == Shadow::MovSs);
        self.set_interruptibility(old, new);
    }

    fn nmi_blocked(&mut self) -> bool {
        self.interruptibility().has(Interruptibility::NMI)
    }

    fn set_nmi_blocked(&mut self, blocked: bool) {
        let old = self.interruptibility();
        self.set_interruptibility(old, old.with_if(Interruptibility::NMI, blocked));
    }

    #[inline]
    fn set_interrupt_window(&mut self, open: bool) {
        self.set_primary(PrimaryControls::INTERRUPT_WINDOW, open);
    }

    #[inline]
    fn set_nmi_window(&mut self, open: bool) {
        self.set_primary(PrimaryControls::NMI_WINDOW, open);
    }

    fn end_halt(&mut self) {
        LoadedVcpu::end_halt(self);
    }

    fn inject(&mut self, injection: &Injection) {
        LoadedVcpu::end_halt(self);
        let (kind, vector, error, len) = match injection {
            Injection::Exception(e) => {
                let kind = match e.vector {
                    _ if e.insn_len == 0 => IntrKind::HardException,
                    Vector::DB => IntrKind::PrivilegedSoftException,
                    _ => IntrKind::SoftException,
                };
                (kind, e.vector.0, e.error, e.insn_len)
            }
            Injection::Nmi => {
                // The entry blocks NMIs, and refuses to if they are blocked.
                self.set_nmi_blocked(false);
                (IntrKind::Nmi, Vector::NMI.0, None, 0)
            }
            Injection::Interrupt(i) if i.is_soft() => {
                (IntrKind::SoftInterrupt, i.vector, None, i.insn_len)
            }
            Injection::Interrupt(i) => (IntrKind::External, i.vector, None, 0),
        };
        // Real mode pushes no error codes, and the entry would be refused with one.
        let error = error.filter(|_| self.cr0().has(Cr0::PE));
        if let Some(code) = error {
            // The upper half is pushed as zero by every processor, and must be so here.
            self.write(f::ENTRY_ERROR_CODE, code & 0xffff);
        }
        self.write(f::ENTRY_INSTRUCTION_LENGTH, u32::from(len));
        self.write(
            f::ENTRY_INTR_INFO,
            IntrInfo::event(kind, vector, error.is_some()).bits(),
        );
    }

    fn cancel_injection(&mut self) {
        self.write(f::ENTRY_INTR_INFO, 0);
    }

    fn vectoring(&mut self) -> Option<Vectoring> {
        // Of the exits that are taken here, these alone happen in the middle of a delivery. An entry
        // that failed has not touched the event.
        match self.v.entry.exit_reason {
            reason::EXCEPTION_NMI
            | reason::APIC_ACCESS
            | reason::EPT_VIOLATION
            | reason::EPT_MISCONFIG
            | reason::TASK_SWITCH => {}
            _ => return None,
        }
        let info = IntrInfo::new(self.read(f::IDT_VECTORING_INFO));
        if !info.is_valid() {
            return None;
        }
        let insn_len = self.soft_len(info.kind(), f::EXIT_INSTRUCTION_LENGTH);
        Some(match info.kind() {
            IntrKind::Nmi => Vectoring::Nmi,
            IntrKind::External | IntrKind::SoftInterrupt => Vectoring::Interrupt(Interrupt {
                vector: info.vector(),
                insn_len,
            }),
            IntrKind::HardException
            | IntrKind::SoftException
            | IntrKind::PrivilegedSoftException => Vectoring::Exception(Exception {
                vector: Vector(info.vector()),
                error: info
                    .has_error_code()
                    .then(|| self.read(f::IDT_VECTORING_ERROR_CODE)),
                payload: None,
                insn_len,
            }),
            IntrKind::Other => return None,
        })
    }

    fn set_pending_step(&mut self) {
        let pending = self.read(f::GUEST_PENDING_DEBUG);
        self.write(f::GUEST_PENDING_DEBUG, pending | Dr6::BS.bits());
    }

    fn take_pending_step(&mut self) -> bool {
        let pending = self.read(f::GUEST_PENDING_DEBUG);
        if pending & Dr6::BS.bits() == 0 {
            return false;
        }
        self.write(f::GUEST_PENDING_DEBUG, pending & !Dr6::BS.bits());
        true
    }

    fn intercept_int3(&mut self, on: bool) {
        LoadedVcpu::intercept_int3(self, on);
    }

    fn cs_base(&mut self) -> u64 {
        self.read(f::SegmentFields::of(SegReg::Cs).base)
    }

    #[inline]
    fn entry_failed(&mut self) -> bool {
        self.v.entry.exit_reason & reason::FAILED != 0
    }

    #[inline]
    fn instruction_len(&mut self) -> u8 {
        self.read(f::EXIT_INSTRUCTION_LENGTH) as u8
    }

    fn string_io_info(&mut self) -> Option<(SegReg, u8)> {
        if !self.vmx.caps.io_info {
            return None;
        }
        let info = self.read(f::EXIT_INSTRUCTION_INFO);
        let size = 2 << ((info >> 7) & 3).min(2);
        let seg = *SegReg::ALL.get(((info >> 15) & 7) as usize)?;
        Some((seg, size))
    }

    fn leave_undefined_to_guest(&mut self) {
        LoadedVcpu::leave_undefined_to_guest(self);
    }

    fn flush_guest_tlb(&mut self) {
        self.v.flush_guest = true;
    }

    fn flush_memory(&mut self) {
        self.v.flush_memory = true;
    }

    fn set_write_logging(&mut self, on: bool) {
        LoadedVcpu::set_write_logging(self, on);
    }

    #[inline]
    fn has_logged_writes(&mut self) -> bool {
        LoadedVcpu::has_logged_writes(self)
    }

    fn take_logged_writes(&mut self, f: impl FnMut(u64)) {
        LoadedVcpu::take_logged_writes(self, f);
    }

    #[inline]
    fn set_priority_threshold(&mut self, class: u8) {
        self.set_tpr_threshold(class);
    }

    fn set_apic_mode(&mut self, mode: ApicMode, at_default: bool) {
        LoadedVcpu::set_apic_mode(self, mode, at_default);
    }

    fn set_interrupt_status(&mut self, in_service: u8, requested: u8) {
        LoadedVcpu::set_interrupt_status(self, in_service, requested);
    }

    fn raise_requested(&mut self, requested: u8) {
        LoadedVcpu::raise_requested(self, requested);
    }

    fn inhibit_virtual_apic(&mut self, inhibited: bool) {
        LoadedVcpu::inhibit_virtual_apic(self, inhibited);
    }

    fn set_eoi_exits(&mut self, vectors: &[u64; 4]) {
        LoadedVcpu::set_eoi_exits(self, vectors);
    }

    fn has_timer(&mut self) -> bool {
        self.vmx.caps.timer_shift.is_some()
    }

    #[inline]
    fn set_timer(&mut self, deadline: Option<u64>) {
        LoadedVcpu::set_timer(self, deadline);
    }

    #[inline]
    fn prepare(&mut self, preempt: &PreemptOff) {
        self.follow.get().prepare(preempt);
        self.refresh_spec_ctrl(preempt);
    }

    #[inline]
    fn enter(&mut self, _irqs: &IrqsOff) -> Exit {
        if self.v.flush_memory || self.v.flush_guest {
            self.flush_tlb();
        }
        self.flush();
        self.start_timer();
        self.refresh_host_state();

        let launched = self.follow.get().vmcs().launched();
        let flags = if launched {
            bindings::RKVM_ENTER_RESUME
        } else {
            0
        };
        // SAFETY: The VMCS is current, its host state is complete and this CPU's, interrupts are
        // off, and `prepare` was called since they were last on.
        let fail = unsafe { bindings::rkvm_vmx_enter(&mut self.v.entry, flags) };
        self.invalidate();
        if fail != 0 {
            self.v.entry.exit_reason = reason::FAILED;
            let error = self.read(f::INSTRUCTION_ERROR);
            return Exit::EntryFailed(u64::from(error));
        }
        if !launched {
            self.follow.get().vmcs().set_launched();
        }
        self.decode()
    }

    fn host_interrupt(&mut self, _irqs: &IrqsOff) {
        let info = IntrInfo::new(self.v.entry.intr_info);
        if info.is_valid() && info.kind() == IntrKind::External {
            // SAFETY: Interrupts are off; the exit acknowledged this vector, so somebody has to
            // handle it.
            unsafe { bindings::rkvm_handle_interrupt(u32::from(info.vector())) };
        }
    }

    fn raw_exit(&mut self) -> RawExit {
        RawExit {
            reason: u64::from(self.v.entry.exit_reason),
            qualification: self.read(f::EXIT_QUALIFICATION),
            vectoring: u64::from(self.read(f::IDT_VECTORING_INFO)),
            interruption: u64::from(self.read(f::EXIT_INTR_INFO)),
        }
    }
}
