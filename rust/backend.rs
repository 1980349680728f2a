// SPDX-License-Identifier: GPL-2.0

//! The seam between the core and a processor's virtualisation: what a backend gives, and the words
//! that both sides speak.
//!
//! A backend is chosen once, when the module loads, and everything above is instantiated for it: no
//! function pointer is called on an exit.

use crate::apics::ApicPages;
use crate::linux::irq::IrqsOff;
use crate::linux::irq::PreemptOff;
use crate::linux::preempt::Followed;
use crate::linux::preempt::FollowsThread;
use crate::linux::preempt::NotifiersOn;
use crate::mmu::caps::PagingCaps;
use crate::mmu::ept::Access;
use crate::system::Machine;
use crate::x86::apic::base::ApicMode;
use crate::x86::clock::tsc::GuestTsc;
use crate::x86::emulate::Cause;
pub(crate) use crate::x86::emulate::TableReg;
use crate::x86::event::Exception;
use crate::x86::event::Injection;
use crate::x86::event::Shadow;
use crate::x86::event::Vectoring;
use crate::x86::exception::PfError;
use crate::x86::msr::filter::Access as MsrAccess;
use crate::x86::msr::Msr;
use crate::x86::regs::Cr0;
use crate::x86::regs::Cr4;
use crate::x86::regs::Dr7;
use crate::x86::regs::Efer;
use crate::x86::regs::Gpr;
use crate::x86::regs::Rflags;
use crate::x86::segment::SegAttr;
use crate::x86::segment::SegReg;
use crate::x86::segment::Segment;
use kernel::prelude::*;
use kernel::sync::Arc;

/// A port access, as an exit describes it.
#[derive(Clone, Copy)]
pub(crate) struct PortAccess {
    pub(crate) port: u16,
    /// Bytes: 1, 2 or 4.
    pub(crate) size: u8,
    /// IN or INS.
    pub(crate) input: bool,
    /// INS or OUTS.
    pub(crate) string: bool,
    /// With a REP prefix.
    pub(crate) rep: bool,
}

/// An access to a control register.
#[derive(Clone, Copy)]
pub(crate) enum CrAccess {
    /// MOV to CRn.
    Write { cr: u8, gpr: Gpr },
    /// MOV from CRn.
    Read { cr: u8, gpr: Gpr },
    /// CLTS.
    Clts,
    /// LMSW with its operand.
    Lmsw(u16),
}

/// Why the guest stopped running.
pub(crate) enum Exit {
    /// An interrupt of the host, by its vector; it waits for [`Loaded::host_interrupt`].
    Interrupt,
    /// An NMI of the host, already handled.
    Nmi,
    /// Whatever it was, it is dealt with.
    Handled,
    /// A machine check of the host.
    MachineCheck,
    /// An exception that is intercepted, to be raised for the guest.
    Exception(Exception),
    TripleFault,
    InterruptWindow,
    NmiWindow,
    /// The task priority sank below what [`Loaded::set_priority_threshold`] set.
    PriorityBelowThreshold,
    /// The processor ended an interrupt of the virtual APIC, of this vector, which somebody wants to know.
    InterruptEnd(u8),
    /// The guest has written to the virtual APIC's page, at this offset.
    ApicWrite(u16),
    /// The guest accesses the APIC's page, at an offset that it cannot have without help, and where `linear`
    /// translates to.
    ApicAccess {
        offset: u16,
        linear: Option<u64>,
        write: bool,
    },
    /// It is time: [`Loaded::set_timer`].
    Timer,
    Cpuid,
    Hlt,
    Pause,
    Invd,
    Wbinvd,
    Rdpmc,
    Vmcall,
    Monitor,
    Mwait,
    Rdmsr,
    Wrmsr,
    Xsetbv,
    Cr(CrAccess),
    Dr {
        dr: u8,
        gpr: Gpr,
        write: bool,
    },
    Port(PortAccess),
    /// A guest-physical access that the page tables below do not allow.
    PageFault {
        gpa: u64,
        access: Access,
        /// The linear address that was accessed, if `gpa` is what it translates to.
        linear: Option<u64>,
    },
    /// A page fault of the guest's, where its tables are shadowed: what is behind it is in ours or in its own.
    GuestPageFault {
        linear: u64,
        error: PfError,
    },
    /// INVLPG, with the linear address.
    InvalidatePage(u64),
    Invpcid,
    /// An instruction that the guest does not have: #UD.
    Undefined,
    /// A hardware task switch, to the task with this selector. What a task gate has to push is not told.
    TaskSwitch {
        selector: u16,
        cause: Cause,
    },
    /// The processor refused the guest's state, with the exit reason (bit 31 is set), or the entry
    /// altogether, with the number of the VM-instruction error.
    EntryFailed(u64),
    /// Anything else: [`Loaded::raw_exit`] has the hardware's reason.
    Unknown,
}

/// Instructions that work in a guest only if the hardware offers to let them.
#[derive(Clone, Copy)]
pub(crate) struct Features {
    /// RDTSCP and RDPID.
    pub(crate) rdtscp: bool,
    /// INVPCID.
    pub(crate) invpcid: bool,
    /// XSAVES and XRSTORS.
    pub(crate) xsaves: bool,
    /// RDTSC at a rate that is not the host's.
    pub(crate) tsc_scaling: bool,
}

/// Instructions that give up the processor, and do not exit if the VMM says so (KVM API,
/// KVM_CAP_X86_DISABLE_EXITS).
#[derive(Clone, Copy)]
pub(crate) struct FreeInstructions {
    /// HLT.
    pub(crate) hlt: bool,
    /// MONITOR and MWAIT.
    pub(crate) mwait: bool,
    /// PAUSE, in loops too.
    pub(crate) pause: bool,
}

/// Pages of a guest's memory that the processor needs for itself: [`SpecialPages`](crate::vm::special::SpecialPages).
#[derive(Clone, Copy)]
pub(crate) struct PrivatePages {
    /// A task-state segment for guests in real mode.
    pub(crate) tss: bool,
    /// A page directory for guests without paging.
    pub(crate) identity_map: bool,
}

/// A way to run guests.
pub(crate) trait Backend: Send + Sync + Sized + 'static {
    /// A vCPU's hardware state.
    type Vcpu: Send;
    /// The part of it that follows its thread.
    type Follows: FollowsThread + Send + Sync;
    /// A vCPU whose hardware state is on this CPU.
    type Loaded<'a>: Loaded;

    /// The machine that the module drives, unless it is coming or going.
    fn machine() -> Option<Arc<Machine<Self>>>;
    /// Sets what [`Self::machine`] answers.
    fn install(machine: Option<Arc<Machine<Self>>>);

    /// How the guest's addresses are translated, and what the tables for it may use.
    fn paging(&self) -> PagingCaps;
    /// What the processor needs of a guest's memory.
    fn private_pages(&self) -> PrivatePages;
    /// Bits of CR4 that the hardware can hold for a running guest.
    fn cr4_allowed(&self) -> u64;
    /// Instructions that a guest can only have with the hardware's help.
    fn features(&self) -> Features;

    /// Whether the processor delivers the interrupts of APICs in the kernel, and takes posted ones.
    fn virtualises_apics(&self) -> bool;

    /// Makes the state of a vCPU, and the part of it that follows the thread. `apic` has its local APIC's
    /// registers, if that is in the kernel; `free` says which instructions are the guest's own affair. `eptp` is there with
    /// EPT, and not with shadow tables.
    fn new_vcpu(
        &self,
        eptp: Option<u64>,
        apic: Option<ApicPages>,
        free: FreeInstructions,
    ) -> Result<(Self::Vcpu, Self::Follows)>;

    /// Loads a vCPU on this CPU until the result is dropped.
    fn load<'a>(
        &'a self,
        vcpu: &'a mut Self::Vcpu,
        follows: &'a Followed<Self::Follows>,
        on: &NotifiersOn,
    ) -> Self::Loaded<'a>;
}

/// A vCPU that is loaded: its registers are at hand, and it can be entered.
pub(crate) trait Loaded {
    fn gpr(&mut self, r: Gpr) -> u64;
    fn set_gpr(&mut self, r: Gpr, value: u64);
    fn rip(&mut self) -> u64;
    fn set_rip(&mut self, rip: u64);
    fn rflags(&mut self) -> Rflags;
    fn set_rflags(&mut self, rflags: Rflags);
    fn cr0(&mut self) -> Cr0;
    fn set_cr0(&mut self, cr0: Cr0);
    fn cr2(&mut self) -> u64;
    fn set_cr2(&mut self, cr2: u64);
    fn cr3(&mut self) -> u64;
    fn set_cr3(&mut self, cr3: u64);
    fn cr4(&mut self) -> Cr4;
    fn set_cr4(&mut self, cr4: Cr4);
    /// CR4.PKE, for every entry to ask.
    fn has_pke(&mut self) -> bool;
    fn efer(&mut self) -> Efer;
    fn set_efer(&mut self, efer: Efer);
    fn dr7(&mut self) -> Dr7;
    fn set_dr7(&mut self, dr7: Dr7);
    fn segment(&mut self, seg: SegReg) -> Segment;
    /// The attributes alone.
    fn segment_attr(&mut self, seg: SegReg) -> SegAttr;
    fn set_segment(&mut self, seg: SegReg, value: &Segment);
    fn gdtr(&mut self) -> TableReg;
    fn set_gdtr(&mut self, value: TableReg);
    fn idtr(&mut self) -> TableReg;
    fn set_idtr(&mut self, value: TableReg);
    /// What the processor translates the guest's addresses with, where its own tables are shadowed: the value for CR3. Goes into
    /// the hardware if it is another one.
    fn set_shadow_root(&mut self, cr3: u64);
    /// Whether CR0, CR3, CR4, EFER or the entries of PAE paging have been set to something else since this was last asked.
    /// Where the guest's tables are shadowed; else false.
    fn take_paging_change(&mut self) -> bool;
    /// The four entries of PAE paging, which the processor loads with CR3.
    fn pdptes(&mut self) -> [u64; 4];
    fn set_pdptes(&mut self, pdptes: &[u64; 4]);

    /// Whether there are states of a guest that the hardware cannot run, or cannot deliver events in. Never changes.
    fn is_restricted(&self) -> bool;
    /// Whether the guest's state is one that the hardware cannot run: it has to be emulated until it can.
    fn needs_emulation(&mut self) -> bool;
    /// Whether the hardware cannot deliver events in the guest's state, because it is in real mode or needs to be emulated.
    fn needs_delivery(&mut self) -> bool;
    /// Whether the guest is in real mode and the hardware is not: exceptions of all kinds exit.
    fn imitates_real_mode(&self) -> bool;
    /// Where the pages of [`Backend::private_pages`] are. Before KVM_RUN.
    fn set_private_pages(&mut self, tss: Option<u64>, identity_map: u64);

    /// MSRs that the hardware holds.
    fn read_msr(&mut self, msr: Msr) -> Option<u64>;
    /// Whether the MSR is one of those. The value has been checked.
    fn write_msr(&mut self, msr: Msr, value: u64) -> bool;
    /// Gives the processor a command by an MSR that holds no value, with its one bit.
    fn command(&mut self, msr: Msr);
    /// The guest's time-stamp counter.
    fn tsc(&mut self) -> GuestTsc;
    /// Sets it. Its scale is the host's own, unless [`Features::tsc_scaling`].
    fn set_tsc(&mut self, tsc: GuestTsc);
    /// What the host's counter said when the guest last left a CPU. None the first time, from which on it is
    /// noted.
    fn left_at(&mut self) -> Option<u64>;
    /// Lets the guest access the MSRs that the hardware can hold for it without an exit, those that are allowed.
    fn pass_msrs(&mut self, allowed: impl Fn(Msr, MsrAccess) -> bool);

    /// Whether interrupts are held off for one instruction.
    fn shadow(&mut self) -> Shadow;
    fn set_shadow(&mut self, shadow: Shadow);
    fn nmi_blocked(&mut self) -> bool;
    fn set_nmi_blocked(&mut self, blocked: bool);
    /// Asks for an exit as soon as an interrupt could be taken.
    fn set_interrupt_window(&mut self, open: bool);
    /// Asks for an exit as soon as an NMI could be taken.
    fn set_nmi_window(&mut self, open: bool);
    /// The guest is not halted any more, should it have halted without an exit.
    fn end_halt(&mut self);
    /// Delivers an event with the next entry.
    fn inject(&mut self, injection: &Injection);
    /// There is no next entry for now: it is to be told anew what to deliver.
    fn cancel_injection(&mut self);
    /// The event whose delivery the last exit broke off, if it is one that can.
    fn vectoring(&mut self) -> Option<Vectoring>;
    /// A single step is due after an instruction that was completed for the guest.
    fn set_pending_step(&mut self);
    /// Takes that back: returns if one was due.
    fn take_pending_step(&mut self) -> bool;
    /// Has the guest exit at INT3, or not.
    fn intercept_int3(&mut self, on: bool);

    /// The base of the code segment.
    fn cs_base(&mut self) -> u64;
    /// Whether the last entry failed, so that nothing of the guest has changed.
    fn entry_failed(&mut self) -> bool;
    /// Length of the instruction that exited, in bytes, if the exit was by an instruction.
    fn instruction_len(&mut self) -> u8;
    /// The segment and the address size of INS or OUTS, if the hardware tells.
    fn string_io_info(&mut self) -> Option<(SegReg, u8)>;

    /// The guest's #UD does not exit any more.
    fn leave_undefined_to_guest(&mut self);

    /// Drops what the TLB holds of the guest's own translations.
    fn flush_guest_tlb(&mut self);
    /// Drops what the TLB holds of guest-physical translations.
    fn flush_memory(&mut self);

    /// Has the processor log the pages whose dirty flag it sets, if it can.
    fn set_write_logging(&mut self, on: bool);
    /// Returns if it has logged any.
    fn has_logged_writes(&mut self) -> bool;
    /// Takes them out of its log, by guest-physical address.
    fn take_logged_writes(&mut self, f: impl FnMut(u64));

    /// Has the guest exit when the class of its task priority sinks below this one; 0 for never. Where
    /// the processor cannot, every write of CR8 exits.
    fn set_priority_threshold(&mut self, class: u8);
    /// How the guest accesses its APIC, and for xAPIC mode, if by the page at the default address.
    fn set_apic_mode(&mut self, mode: ApicMode, at_default: bool);
    /// The highest vectors of the virtual APIC's in service and requested registers; 0 for none.
    fn set_interrupt_status(&mut self, in_service: u8, requested: u8);
    /// A vector has been requested beside those that the processor knows of.
    fn raise_requested(&mut self, requested: u8);
    /// Has the processor leave the virtual APIC alone for a while: it neither delivers interrupts nor
    /// answers accesses, should it do so otherwise.
    fn inhibit_virtual_apic(&mut self, inhibited: bool);
    /// The vectors whose end is to exit.
    fn set_eoi_exits(&mut self, vectors: &[u64; 4]);
    /// Whether [`set_timer`](Self::set_timer) does anything.
    fn has_timer(&mut self) -> bool;
    /// Has the guest exit at this value of the host's time-stamp counter, or not.
    fn set_timer(&mut self, deadline: Option<u64>);

    /// Puts into the hardware what an entry needs and only leaves with the thread. Before the first
    /// [`Self::enter`] since interrupts were last on.
    fn prepare(&mut self, preempt: &PreemptOff);
    /// Runs the guest until an exit, and says why it ended.
    fn enter(&mut self, irqs: &IrqsOff) -> Exit;
    /// Handles the interrupt that ended the guest's run.
    fn host_interrupt(&mut self, irqs: &IrqsOff);
    /// What the hardware says of the last exit.
    fn raw_exit(&mut self) -> RawExit;
}

/// The last exit in the hardware's words, for a VMM's log.
pub(crate) struct RawExit {
    /// Why.
    pub(crate) reason: u64,
    /// More of why.
    pub(crate) qualification: u64,
    /// The event whose delivery it interrupted.
    pub(crate) vectoring: u64,
    /// The event that it was.
    pub(crate) interruption: u64,
}
