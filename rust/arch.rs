// SPDX-License-Identifier: GPL-2.0

//! The part of a vCPU's architectural state that no backend holds.

use crate::backend::Loaded;
use crate::bindings::KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT;
use crate::lapic::LocalApic;
use crate::linux::task::SignalMask;
use crate::mem::devices::DeviceFrames;
use crate::mem::shadow::VcpuTables;
use crate::msr_filter::MsrFilter;
use crate::options::VmOptions;
use crate::pv::PvState;
use crate::run::debug;
use crate::run::debug::Breakpoints;
use crate::run::debug::Debugger;
use crate::run::halt::Poll;
use crate::run::Pending;
use crate::system::Host;
use crate::time::VcpuClock;
use crate::x86::apic::base::ApicMode;
use crate::x86::cpuid::features::GuestFeatures;
use crate::x86::cpuid::table::CpuidTable;
use crate::x86::cpuid::CpuidEntry;
use crate::x86::emulate::Emulator;
use crate::x86::event::PendingEvents;
use crate::x86::event::Shadow;
use crate::x86::mce::MachineChecks;
use crate::x86::msr::state::MsrState;
use crate::x86::regs::Cr0;
use crate::x86::regs::Cr4;
use crate::x86::regs::Dr6;
use crate::x86::regs::Dr7;
use crate::x86::regs::Efer;
use crate::x86::regs::Gpr;
use crate::x86::regs::Rflags;
use crate::x86::segment::CpuMode;
use crate::x86::segment::SegReg;
use crate::x86::segment::Segment;
use kernel::prelude::*;
use kernel::sync::Arc;

/// A vCPU's CPUID table.
pub(crate) type Cpuid = CpuidTable<KVVec<CpuidEntry>>;

/// Registers, events and whatever is half done.
pub(crate) struct Arch {
    pub(crate) events: PendingEvents,
    /// KVM_MP_STATE_*: always RUNNABLE without a local APIC in the kernel.
    pub(crate) mp_state: u32,
    /// Where a SIPI that KVM_SET_MP_STATE brings begins.
    pub(crate) sipi_vector: u8,
    /// How long HLT polls.
    pub(crate) poll: Poll,
    /// The local APIC, if it is in the kernel.
    pub(crate) apic: Option<KBox<LocalApic>>,
    /// The task priority, if the VMM's local APIC has it and tells in `kvm_run`.
    vmm_cr8: u64,
    /// DR0 to DR3 as the hardware is to have them: the guest's ([`debug::breakpoints`]) or a debugger's.
    pub(crate) dr: [u64; 4],
    pub(crate) dr6: u64,
    pub(crate) debugger: Debugger,
    /// DR7 enables a breakpoint, so the addresses must be loaded for the guest.
    pub(crate) breakpoints_armed: bool,
    pub(crate) xcr0: u64,
    /// PKRU, when the guest does not run.
    pub(crate) pkru: u32,
    pub(crate) cpuid: KBox<Cpuid>,
    pub(crate) features: GuestFeatures,
    pub(crate) msrs: MsrState,
    /// What a guest that knows KVM has asked for.
    pub(crate) pv: PvState,
    /// Its time.
    pub(crate) clock: VcpuClock,
    pub(crate) mce: KBox<MachineChecks>,
    /// Which MSRs the guest may access, if not all.
    pub(crate) msr_filter: Option<Arc<MsrFilter>>,
    /// IA32_TSC_ADJUST.
    pub(crate) tsc_adjust: u64,
    /// Boxed, as it is large and most exits have no use for it.
    pub(crate) emulator: KBox<Emulator>,
    /// Where devices are known to be.
    pub(crate) devices: DeviceFrames,
    /// The tables that it runs on, where the guest's are shadowed.
    pub(crate) shadow: Option<VcpuTables>,
    /// What the next KVM_RUN completes.
    pub(crate) pending: Pending,
    /// The thread that ran the vCPU last.
    pub(crate) thread: usize,
    /// Signals blocked during KVM_RUN, if not those that the thread blocks anyway.
    pub(crate) signal_mask: Option<SignalMask>,
    /// The guest has run: its CPUID is not to change under it any more.
    pub(crate) has_run: bool,
}

impl Arch {
    /// The state after power-up. vCPU 0 is the bootstrap processor.
    pub(crate) fn new(bootstrap: bool, clock: VcpuClock) -> Result<Self> {
        let cpuid = Cpuid::new(KVVec::new()).map_err(|_| EINVAL)?;
        Ok(Self {
            events: PendingEvents::new(),
            mp_state: crate::bindings::KVM_MP_STATE_RUNNABLE,
            sipi_vector: 0,
            poll: Poll::default(),
            apic: None,
            vmm_cr8: 0,
            dr: [0; 4],
            dr6: Dr6::RESET.bits(),
            debugger: Debugger::default(),
            breakpoints_armed: false,
            xcr0: 1,
            pkru: 0,
            cpuid: KBox::new(cpuid, GFP_KERNEL_ACCOUNT)?,
            features: GuestFeatures::default(),
            msrs: MsrState::new(bootstrap),
            pv: PvState::new(),
            clock,
            mce: KBox::new(MachineChecks::new(), GFP_KERNEL_ACCOUNT)?,
            msr_filter: None,
            tsc_adjust: 0,
            emulator: KBox::new(Emulator::new(), GFP_KERNEL_ACCOUNT)?,
            devices: DeviceFrames::new(),
            shadow: None,
            pending: Pending::Nothing,
            thread: 0,
            signal_mask: None,
            has_run: false,
        })
    }

    /// CR8: the class of the task priority.
    #[inline]
    pub(crate) fn cr8(&self) -> u64 {
        match &self.apic {
            Some(apic) => apic.model.cr8().into(),
            None => self.vmm_cr8,
        }
    }

    /// Sets the task priority that a local APIC of the VMM's has.
    pub(crate) fn set_vmm_cr8(&mut self, cr8: u64) {
        self.vmm_cr8 = cr8;
    }

    /// IA32_APIC_BASE.
    pub(crate) fn apic_base(&self) -> u64 {
        match &self.apic {
            Some(apic) => apic.model.base().bits(),
            None => self.msrs.apic_base(),
        }
    }

    /// Brings CPUID up to date with the registers that show in it.
    pub(crate) fn refresh_cpuid(&mut self, host: &Host, options: &VmOptions, cr4: Cr4) {
        let mwait_enabled = if options.has_quirk(KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT) {
            None
        } else {
            Some(self.msrs.has_mwait())
        };
        self.cpuid.update(
            &crate::x86::cpuid::table::RuntimeState {
                cr4,
                xcr0: crate::x86::regs::Xcr0::new(self.xcr0),
                xss: 0,
                apic_enabled: self
                    .apic
                    .as_ref()
                    .map(|apic| apic.model.mode() != ApicMode::Disabled),
                mwait_enabled,
            },
            &host.xsave,
        );
    }
}

/// Puts the registers that a backend holds into the state after power-up (SDM vol. 3, table 10-1).
pub(crate) fn reset(hw: &mut impl Loaded) {
    reset_registers(hw, Cr0::CD | Cr0::NW);
    hw.set_dr7(Dr7::RESET);
}

/// INIT: the state after power-up, but for what that table keeps: the time-stamp counter, the FPU, MSRs,
/// and whether caches are on.
pub(crate) fn init(hw: &mut impl Loaded, arch: &mut Arch) {
    let caches = hw.cr0().and(Cr0::CD | Cr0::NW);
    reset_registers(hw, caches);
    // Here the signature does show.
    let signature = arch.cpuid.lookup(1, 0).eax;
    if signature != 0 {
        hw.set_gpr(Gpr::Rdx, signature.into());
    }
    hw.set_shadow(Shadow::None);
    hw.set_nmi_blocked(false);
    hw.end_halt();
    crate::run::shadow::flush_guest(hw, arch);
    arch.events = PendingEvents::new();
    arch.events
        .hold_interrupts(arch.debugger.blocks_interrupts());
    debug::set_breakpoints(hw, arch, &Breakpoints::RESET);
    arch.dr6 = Dr6::RESET.bits();
    arch.emulator.abort();
    arch.pending = Pending::Nothing;
    arch.pv.reset();
    arch.clock.reset();
}

fn reset_registers(hw: &mut impl Loaded, caches: Cr0) {
    for r in Gpr::ALL {
        hw.set_gpr(r, 0);
    }
    // Family 6; what the VMM says later of its processor does not show here, as in KVM.
    hw.set_gpr(Gpr::Rdx, 0x600);
    hw.set_rip(0xfff0);
    hw.set_rflags(Rflags::FIXED);
    for seg in SegReg::ALL {
        hw.set_segment(seg, &Segment::reset(seg));
    }
    let table = crate::backend::TableReg {
        base: 0,
        limit: 0xffff,
    };
    hw.set_gdtr(table);
    hw.set_idtr(table);
    hw.set_cr2(0);
    hw.set_cr3(0);
    hw.set_cr4(Cr4::empty());
    hw.set_efer(Efer::empty());
    hw.set_cr0(caches.with(Cr0::ET));
}

/// The mode that the vCPU is in.
pub(crate) fn mode(hw: &mut impl Loaded) -> CpuMode {
    let cs = hw.segment_attr(SegReg::Cs);
    CpuMode::of(hw.cr0(), hw.rflags(), hw.efer(), cs)
}

/// Whether the guest executes 64-bit code.
pub(crate) fn in_64bit_mode(hw: &mut impl Loaded) -> bool {
    hw.efer().has(Efer::LMA) && hw.segment_attr(SegReg::Cs).l()
}

/// The privilege level: that of SS, but for modes in which segments have none.
pub(crate) fn cpl(hw: &mut impl Loaded) -> u8 {
    if !hw.cr0().has(Cr0::PE) {
        0
    } else if hw.rflags().has(Rflags::VM) {
        3
    } else {
        hw.segment_attr(SegReg::Ss).dpl()
    }
}
