// SPDX-License-Identifier: GPL-2.0

//! A vCPU's registers in the VMCS and beside it.
//!
//! The fields that exits look at (RIP, RSP, RFLAGS, the control registers) are read when they are
//! wanted and once an exit; what is written is kept until the next entry. Segments and tables, which
//! only ioctls and the emulator ask for, are read and written where they are.

use super::apic::VmcsApic;
use super::fields as f;
use super::fields::EntryControls;
use super::fields::Interruptibility;
use super::fields::PinControls;
use super::fields::PrimaryControls;
use super::fields::SecondaryControls;
use super::fields::SegmentFields;
use super::load::Loadable;
use super::msr_bitmap::MsrBitmap;
use super::restricted::Restricted;
use super::spec_ctrl::SpecCtrl;
use super::vmcs::vmread;
use super::vmcs::vmwrite;
use super::write_log::WriteLog;
use super::Vmx;
use crate::apics::ApicPages;
use crate::backend::FreeInstructions;
use crate::backend::TableReg;
use crate::bindings;
use crate::linux::msr as host_msr;
use crate::linux::preempt::Following;
use crate::x86::clock::tsc::GuestTsc;
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

/// IA32_PAT after reset (SDM vol. 3, table 12-12).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// CR0 bits that the guest changes without an exit.
const CR0_GUEST_OWNED: u64 =
    Cr0::MP.bits() | Cr0::EM.bits() | Cr0::TS.bits() | Cr0::WP.bits() | Cr0::AM.bits();

/// CR4 bits that the guest changes without an exit: those that change neither paging nor CPUID and
/// that every processor with VMX has.
const CR4_GUEST_OWNED: u64 = Cr4::PVI.bits()
    | Cr4::TSD.bits()
    | Cr4::DE.bits()
    | Cr4::PCE.bits()
    | Cr4::OSFXSR.bits()
    | Cr4::OSXMMEXCPT.bits()
    | Cr4::PGE.bits();

/// Exceptions that exit. Machine checks are the host's. #DB and #AC could otherwise keep the processor
/// delivering exceptions within exceptions for ever, with no interrupt window between. #UD may be another
/// processor's instruction.
const EXCEPTIONS: u32 = 1 << 18 | 1 << 17 | UNDEFINED | 1 << 1;

/// #PF, in the bitmap of exceptions.
const PAGE_FAULT: u32 = 1 << 14;

/// INT3, in the bitmap of exceptions.
const BREAKPOINT: u32 = 1 << 3;

/// How many ticks lie between two executions of PAUSE in one loop, at most, and how many a loop may take.
const PLE_GAP: u32 = 128;
const PLE_WINDOW: u32 = 4096;

/// Which cached registers agree with the VMCS.
#[derive(Clone, Copy, Default)]
struct Cached(u8);

impl Cached {
    const RIP: u8 = 1 << 0;
    const RSP: u8 = 1 << 1;
    const RFLAGS: u8 = 1 << 2;
    const CR0: u8 = 1 << 3;
    const CR3: u8 = 1 << 4;
    const CR4: u8 = 1 << 5;
}

/// A vCPU's state besides the VMCS.
pub(crate) struct VmxVcpu {
    /// What crosses the world switch.
    pub(super) entry: bindings::rkvm_vmx_entry,
    valid: Cached,
    dirty: Cached,
    rip: u64,
    rsp: u64,
    rflags: u64,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: Efer,
    /// The bits of CR0 and CR4 that the guest changes without an exit.
    cr0_owned: u64,
    cr4_owned: u64,
    /// The exceptions that exit, in any mode.
    exits: u32,
    /// The guest is in real mode, and the hardware in virtual-8086 mode.
    pub(super) real: bool,
    pub(super) restricted: Restricted,
    /// CR4.PKE, which the guest cannot change without an exit.
    pub(super) pke: bool,
    /// The guest may be halted without an exit.
    halts: bool,
    pub(super) pin: PinControls,
    pub(super) primary: PrimaryControls,
    pub(super) secondary: SecondaryControls,
    entry_controls: EntryControls,
    tsc: GuestTsc,
    pat: u64,
    /// IA32_CSTAR, which Intel's processors keep and never use.
    cstar: u64,
    pub(super) host_cr3: u64,
    pub(super) host_cr4: u64,
    /// Where the extended page tables are, if there are any.
    pub(super) eptp: Option<u64>,
    pub(super) vpid: super::Vpid,
    /// The TLB is flushed before the next entry.
    pub(super) flush_memory: bool,
    pub(super) flush_guest: bool,
    /// The guest's IA32_SPEC_CTRL.
    pub(super) spec_ctrl: SpecCtrl,
    /// Which MSRs the guest accesses without an exit.
    pub(super) msr_bitmap: MsrBitmap,
    /// The APIC, if it is in the kernel.
    pub(super) apic: Option<VmcsApic>,
    /// When the guest is to exit, in ticks of the host's time-stamp counter.
    pub(super) deadline: Option<u64>,
    /// Where the processor logs writes, if it can.
    pub(super) write_log: Option<WriteLog>,
    /// The fields of the VMCS that never change have been written.
    initialised: bool,
}

/// A vCPU whose VMCS is current.
///
/// # Invariants
///
/// The VMCS of `follow` is current whenever this thread runs.
pub(crate) struct LoadedVcpu<'a> {
    pub(super) vmx: &'a Vmx,
    pub(super) v: &'a mut VmxVcpu,
    pub(super) follow: Following<'a, Loadable>,
}

impl VmxVcpu {
    /// The state after power-up, but for what the VMCS holds.
    pub(super) fn new(
        vmx: &Vmx,
        eptp: Option<u64>,
        vpid: super::Vpid,
        apic: Option<ApicPages>,
        free: FreeInstructions,
    ) -> Result<Self> {
        let write_log = match vmx.caps.pml {
            true => Some(WriteLog::new()?),
            false => None,
        };
        Ok(Self {
            entry: bindings::rkvm_vmx_entry::default(),
            valid: Cached::default(),
            dirty: Cached::default(),
            rip: 0,
            rsp: 0,
            rflags: 0,
            cr0: 0,
            cr3: 0,
            cr4: 0,
            efer: Efer::empty(),
            cr0_owned: match vmx.caps.ept {
                true => CR0_GUEST_OWNED,
                false => CR0_GUEST_OWNED & !Cr0::WP.bits(),
            },
            cr4_owned: match vmx.caps.ept {
                true => CR4_GUEST_OWNED,
                false => CR4_GUEST_OWNED & !Cr4::PGE.bits(),
            },
            exits: match vmx.caps.ept {
                true => EXCEPTIONS,
                false => EXCEPTIONS | PAGE_FAULT,
            },
            real: false,
            restricted: Restricted::new(vmx),
            pke: false,
            pin: vmx.caps.pin,
            primary: vmx
                .caps
                .primary
                .with_if(PrimaryControls::HLT, !free.hlt)
                .with_if(
                    PrimaryControls::MWAIT | PrimaryControls::MONITOR,
                    !free.mwait,
                ),
            secondary: vmx.caps.secondary.with_if(
                SecondaryControls::PAUSE_LOOP,
                vmx.caps.pause_loop && !free.pause,
            ),
            halts: free.hlt,
            entry_controls: vmx.caps.entry,
            tsc: GuestTsc::host(host_msr::tsc_khz()),
            pat: PAT_RESET,
            cstar: 0,
            host_cr3: 0,
            host_cr4: 0,
            eptp,
            vpid,
            flush_memory: true,
            flush_guest: true,
            spec_ctrl: SpecCtrl::new(),
            msr_bitmap: MsrBitmap::new()?,
            apic: apic.map(|pages| VmcsApic::new(pages, vmx.caps.apicv)),
            deadline: None,
            write_log,
            initialised: false,
        })
    }
}

/// #UD, in the exception bitmap.
const UNDEFINED: u32 = 1 << 6;

impl<'a> LoadedVcpu<'a> {
    /// Loads the vCPU, and writes what never changes if this is the first time.
    pub(super) fn new(vmx: &'a Vmx, v: &'a mut VmxVcpu, follow: Following<'a, Loadable>) -> Self {
        // INVARIANT: `follow` keeps the VMCS current.
        let mut this = Self { vmx, v, follow };
        if !this.v.initialised {
            this.initialise();
            this.v.initialised = true;
        }
        this
    }

    #[inline]
    pub(super) fn read<T: f::Width>(&self, field: f::Field<T>) -> T {
        // SAFETY: By the invariant the VMCS is current. Fields that may not exist are asked for
        // only where their control is on.
        unsafe { vmread(field) }
    }

    #[inline]
    pub(super) fn write<T: f::Width>(&mut self, field: f::Field<T>, value: T) {
        // SAFETY: As in `read`. Host-state fields and controls are written in `initialise`, from
        // the host's own registers and the capabilities, and by `load`.
        unsafe { vmwrite(field, value) };
    }

    fn initialise(&mut self) {
        let caps = &self.vmx.caps;

        self.write(f::VMCS_LINK_POINTER, u64::MAX);
        self.write(f::PIN_CONTROLS, self.v.pin.bits());
        self.write(f::PRIMARY_CONTROLS, self.v.primary.bits());
        if self.v.primary.has(PrimaryControls::SECONDARY) {
            self.write(f::SECONDARY_CONTROLS, self.v.secondary.bits());
        }
        self.write(f::EXIT_CONTROLS, caps.exit.bits());
        self.write(f::ENTRY_CONTROLS, self.v.entry_controls.bits());
        self.write_exceptions();
        self.write(f::PAGE_FAULT_ERROR_MASK, 0);
        self.write(f::PAGE_FAULT_ERROR_MATCH, 0);
        self.write(f::CR3_TARGET_COUNT, 0);
        self.write(f::EXIT_MSR_STORE_COUNT, 0);
        self.write(f::EXIT_MSR_LOAD_COUNT, 0);
        self.write(f::ENTRY_MSR_LOAD_COUNT, 0);
        self.write(f::ENTRY_INTR_INFO, 0);
        self.write(f::MSR_BITMAP, self.v.msr_bitmap.phys());
        if let Some(eptp) = self.v.eptp {
            self.write(f::EPT_POINTER, eptp);
        }
        if self.v.secondary.has(SecondaryControls::VPID) {
            self.write(f::VPID, self.v.vpid.id());
        }
        if self.v.secondary.has(SecondaryControls::XSAVES) {
            self.write(f::XSS_EXITING_BITMAP, 0);
        }
        if self.v.secondary.has(SecondaryControls::ENCLS) {
            self.write(f::ENCLS_EXITING_BITMAP, u64::MAX);
        }
        if self.v.secondary.has(SecondaryControls::PAUSE_LOOP) {
            self.write(f::PLE_GAP, PLE_GAP);
            self.write(f::PLE_WINDOW, PLE_WINDOW);
        }
        self.initialise_write_log();
        self.initialise_apic();
        self.write(f::CR0_MASK, !self.v.cr0_owned);
        self.write(f::CR4_MASK, !self.v.cr4_owned);
        self.write(f::CR0_SHADOW, 0);
        self.write(f::CR4_SHADOW, 0);
        self.write(f::GUEST_CR0, 0);
        self.write(f::GUEST_CR3, 0);
        self.write(f::GUEST_CR4, 0);
        self.write(f::GUEST_DEBUGCTL, 0);
        self.load_pat();
        self.write(f::GUEST_PENDING_DEBUG, 0);
        self.write(f::GUEST_INTERRUPTIBILITY, 0);
        self.write(f::GUEST_ACTIVITY, 0);
        self.write(f::GUEST_SYSENTER_CS, 0);
        self.write(f::GUEST_SYSENTER_ESP, 0);
        self.write(f::GUEST_SYSENTER_EIP, 0);

        let host = &self.vmx.host;
        self.write(f::HOST_CR0, host.cr0);
        self.write(f::HOST_CS, host.cs);
        self.write(f::HOST_SS, host.ss);
        // Null, and put back by hand should user space use another: an exit takes none of user
        // privilege.
        self.write(f::HOST_DS, 0);
        self.write(f::HOST_ES, 0);
        self.write(f::HOST_FS, 0);
        self.write(f::HOST_GS, 0);
        self.write(f::HOST_FS_BASE, 0);
        self.write(f::HOST_GS_BASE, 0);
        self.write(f::HOST_TR, host.tr);
        self.write(f::HOST_SYSENTER_CS, host.sysenter_cs);
        self.write(f::HOST_SYSENTER_EIP, host.sysenter_eip);
        let (pat, efer) = (host.pat, host.efer);
        if self.vmx.caps.loads_pat {
            self.write(f::HOST_PAT, pat);
        }
        if self.vmx.caps.loads_efer {
            self.write(f::HOST_EFER, efer);
        }
        self.write(
            f::HOST_RIP,
            (&raw const bindings::rkvm_vmx_exit_point) as u64,
        );
    }

    /// Forgets what was cached: the guest has run.
    #[inline]
    pub(super) fn invalidate(&mut self) {
        self.v.valid = Cached::default();
    }

    /// Writes to the VMCS what was set since the last exit.
    #[inline]
    pub(super) fn flush(&mut self) {
        let dirty = self.v.dirty.0;
        if dirty == 0 {
            return;
        }
        self.v.dirty = Cached::default();
        if dirty & Cached::RIP != 0 {
            self.write(f::GUEST_RIP, self.v.rip);
        }
        if dirty & Cached::RSP != 0 {
            self.write(f::GUEST_RSP, self.v.rsp);
        }
        if dirty & Cached::RFLAGS != 0 {
            let mut flags = Rflags::new(self.v.rflags);
            if self.v.real {
                flags = self.v.restricted.imitate_flags(flags);
            }
            self.write(f::GUEST_RFLAGS, flags.bits());
        }
    }

    /// Reads a register that the VMCS holds, unless it is cached.
    #[inline]
    fn cached(
        &mut self,
        bit: u8,
        field: f::Field<u64>,
        place: fn(&mut VmxVcpu) -> &mut u64,
    ) -> u64 {
        if self.v.valid.0 & bit == 0 {
            self.v.valid.0 |= bit;
            let value = self.read(field);
            *place(self.v) = value;
            return value;
        }
        *place(self.v)
    }

    #[inline]
    pub(super) fn gpr(&mut self, r: Gpr) -> u64 {
        if matches!(r, Gpr::Rsp) {
            return self.cached(Cached::RSP, f::GUEST_RSP, |v| &mut v.rsp);
        }
        self.v.entry.gpr[r as usize & 15]
    }

    #[inline]
    pub(super) fn set_gpr(&mut self, r: Gpr, value: u64) {
        if matches!(r, Gpr::Rsp) {
            self.v.rsp = value;
            self.v.valid.0 |= Cached::RSP;
            self.v.dirty.0 |= Cached::RSP;
            return;
        }
        self.v.entry.gpr[r as usize & 15] = value;
    }

    #[inline]
    pub(super) fn rip(&mut self) -> u64 {
        self.cached(Cached::RIP, f::GUEST_RIP, |v| &mut v.rip)
    }

    #[inline]
    pub(super) fn set_rip(&mut self, rip: u64) {
        self.v.rip = rip;
        self.v.valid.0 |= Cached::RIP;
        self.v.dirty.0 |= Cached::RIP;
    }

    #[inline]
    pub(super) fn rflags(&mut self) -> Rflags {
        if self.v.valid.0 & Cached::RFLAGS == 0 {
            self.v.valid.0 |= Cached::RFLAGS;
            let mut flags = Rflags::new(self.read(f::GUEST_RFLAGS));
            if self.v.real {
                flags = self.v.restricted.real_flags(flags);
            }
            self.v.rflags = flags.bits();
        }
        Rflags::new(self.v.rflags)
    }

    /// What RFLAGS has been set to since the guest ran.
    pub(super) fn set_flags(&self) -> Option<Rflags> {
        (self.v.dirty.0 & Cached::RFLAGS != 0).then(|| Rflags::new(self.v.rflags))
    }

    #[inline]
    pub(super) fn set_rflags(&mut self, rflags: Rflags) {
        self.v.rflags = rflags.bits();
        self.v.valid.0 |= Cached::RFLAGS;
        self.v.dirty.0 |= Cached::RFLAGS;
    }

    pub(super) fn cr0(&mut self) -> Cr0 {
        let hardware = self.cached(Cached::CR0, f::GUEST_CR0, |v| &mut v.cr0);
        let shadow = self.read(f::CR0_SHADOW);
        let owned = self.v.cr0_owned;
        Cr0::new(hardware & owned | shadow & !owned)
    }

    /// Sets CR0 and, with it, whether long mode is active.
    pub(super) fn set_cr0(&mut self, cr0: Cr0) {
        if self.v.restricted.on {
            self.leave_cr0(cr0);
        }
        // Caching is the host's affair (memory types come from EPT), so CD and NW stay out of the
        // hardware, and NE is set there because VMX demands it, and what else it does.
        let hardware = cr0.without(Cr0::CD | Cr0::NW).bits() | self.vmx.caps.cr0_required;
        self.write(f::GUEST_CR0, hardware);
        self.write(f::CR0_SHADOW, cr0.bits());
        self.v.cr0 = hardware;
        self.v.valid.0 |= Cached::CR0;
        self.v.flush_guest = true;
        if self.v.restricted.on {
            self.settle_cr0(cr0);
        }
        let active = cr0.has(Cr0::PG) && self.v.efer.has(Efer::LME);
        if active != self.v.efer.has(Efer::LMA) {
            self.set_efer(self.v.efer.with_if(Efer::LMA, active));
        }
    }

    pub(super) fn cr3(&mut self) -> u64 {
        if let Some(cr3) = self.v.restricted.cr3() {
            return cr3;
        }
        self.cached(Cached::CR3, f::GUEST_CR3, |v| &mut v.cr3)
    }

    pub(super) fn set_cr3(&mut self, cr3: u64) {
        self.v.flush_guest = true;
        if self.keep_cr3(cr3) {
            return;
        }
        self.write(f::GUEST_CR3, cr3);
        self.v.cr3 = cr3;
        self.v.valid.0 |= Cached::CR3;
    }

    pub(super) fn cr4(&mut self) -> Cr4 {
        let hardware = self.cached(Cached::CR4, f::GUEST_CR4, |v| &mut v.cr4);
        let shadow = self.read(f::CR4_SHADOW);
        let owned = self.v.cr4_owned;
        Cr4::new(hardware & owned | shadow & !owned)
    }

    pub(super) fn set_cr4(&mut self, cr4: Cr4) {
        let hardware = if self.v.restricted.on {
            let old = self.cr4();
            self.v.restricted.note_paging(old, cr4);
            self.hardware_cr4(cr4).bits()
        } else {
            cr4.with(Cr4::VMXE).bits()
        };
        self.write(f::GUEST_CR4, hardware);
        self.write(f::CR4_SHADOW, cr4.bits());
        self.v.cr4 = hardware;
        self.v.pke = cr4.has(Cr4::PKE);
        self.v.valid.0 |= Cached::CR4;
        self.v.flush_guest = true;
    }

    #[inline]
    pub(super) fn efer(&self) -> Efer {
        self.v.efer
    }

    pub(super) fn set_efer(&mut self, efer: Efer) {
        let old = core::mem::replace(&mut self.v.efer, efer);
        let mut hardware = efer;
        if self.v.restricted.on {
            self.v.restricted.note_paging(old, efer);
            self.v.restricted.uncheck();
            hardware = self.hardware_efer(efer);
        }
        if self.vmx.caps.loads_efer {
            self.write(f::GUEST_EFER, hardware.bits());
        }
        let controls = self
            .v
            .entry_controls
            .with_if(EntryControls::IA32E, efer.has(Efer::LMA));
        if controls != self.v.entry_controls {
            self.v.entry_controls = controls;
            self.write(f::ENTRY_CONTROLS, controls.bits());
        }
        self.v.flush_guest = true;
    }

    pub(super) fn dr7(&mut self) -> Dr7 {
        Dr7::new(self.read(f::GUEST_DR7))
    }

    pub(super) fn set_dr7(&mut self, dr7: Dr7) {
        self.write(f::GUEST_DR7, dr7.bits());
    }

    pub(super) fn segment(&mut self, seg: SegReg) -> Segment {
        if self.v.real {
            return self.real_segment(seg);
        }
        let fields = SegmentFields::of(seg);
        Segment {
            selector: self.read(fields.selector),
            base: self.read(fields.base),
            limit: self.read(fields.limit),
            attr: self.segment_attr(seg),
        }
    }

    pub(super) fn segment_attr(&mut self, seg: SegReg) -> SegAttr {
        if self.v.real {
            return self.real_segment_attr(seg);
        }
        SegAttr::from_vmx(self.read(SegmentFields::of(seg).attr))
    }

    pub(super) fn set_segment(&mut self, seg: SegReg, value: &Segment) {
        self.v.restricted.uncheck();
        if self.v.real {
            self.set_real_segment(seg, value);
            return;
        }
        let fields = SegmentFields::of(seg);
        self.write(fields.selector, value.selector);
        self.write(fields.base, value.base);
        self.write(fields.limit, value.limit);
        self.write(fields.attr, value.attr.to_vmx());
    }

    pub(super) fn gdtr(&mut self) -> TableReg {
        TableReg {
            base: self.read(f::GUEST_GDTR_BASE),
            limit: self.read(f::GUEST_GDTR_LIMIT) as u16,
        }
    }

    pub(super) fn set_gdtr(&mut self, value: TableReg) {
        self.write(f::GUEST_GDTR_BASE, value.base);
        self.write(f::GUEST_GDTR_LIMIT, u32::from(value.limit));
    }

    pub(super) fn idtr(&mut self) -> TableReg {
        TableReg {
            base: self.read(f::GUEST_IDTR_BASE),
            limit: self.read(f::GUEST_IDTR_LIMIT) as u16,
        }
    }

    pub(super) fn set_idtr(&mut self, value: TableReg) {
        self.write(f::GUEST_IDTR_BASE, value.base);
        self.write(f::GUEST_IDTR_LIMIT, u32::from(value.limit));
    }

    pub(super) fn pdptes(&self) -> [u64; 4] {
        if self.v.restricted.shadowed {
            return *self.v.restricted.pdptes();
        }
        [
            self.read(f::GUEST_PDPTE0),
            self.read(f::GUEST_PDPTE1),
            self.read(f::GUEST_PDPTE2),
            self.read(f::GUEST_PDPTE3),
        ]
    }

    pub(super) fn set_pdptes(&mut self, pdptes: &[u64; 4]) {
        if self.v.restricted.shadowed {
            self.v.restricted.set_pdptes(pdptes);
            return;
        }
        self.write(f::GUEST_PDPTE0, pdptes[0]);
        self.write(f::GUEST_PDPTE1, pdptes[1]);
        self.write(f::GUEST_PDPTE2, pdptes[2]);
        self.write(f::GUEST_PDPTE3, pdptes[3]);
    }

    pub(super) fn read_msr(&mut self, msr: Msr) -> Option<u64> {
        Some(match msr {
            Msr::FS_BASE => self.read(SegmentFields::of(SegReg::Fs).base),
            Msr::GS_BASE => self.read(SegmentFields::of(SegReg::Gs).base),
            Msr::SYSENTER_CS => u64::from(self.read(f::GUEST_SYSENTER_CS)),
            Msr::SYSENTER_ESP => self.read(f::GUEST_SYSENTER_ESP),
            Msr::SYSENTER_EIP => self.read(f::GUEST_SYSENTER_EIP),
            Msr::KERNEL_GS_BASE => self.follow.get().guest_msrs().kernel_gs_base,
            Msr::STAR => self.follow.get().guest_msrs().star,
            Msr::LSTAR => self.follow.get().guest_msrs().lstar,
            Msr::SYSCALL_MASK => self.follow.get().guest_msrs().fmask,
            Msr::TSC_AUX => self.follow.get().guest_msrs().tsc_aux,
            Msr::SPEC_CTRL => self.v.spec_ctrl.value(),
            Msr::PAT => self.v.pat,
            Msr::CSTAR => self.v.cstar,
            Msr::DEBUGCTL => self.read(f::GUEST_DEBUGCTL),
            Msr::TSC => self.v.tsc.at(host_msr::rdtsc()),
            _ => return None,
        })
    }

    /// Whether the MSR was one of these. The value has been checked.
    pub(super) fn write_msr(&mut self, msr: Msr, value: u64) -> bool {
        // The bases are parts of segments.
        self.v.restricted.uncheck();
        match msr {
            Msr::FS_BASE => self.write(SegmentFields::of(SegReg::Fs).base, value),
            Msr::GS_BASE => self.write(SegmentFields::of(SegReg::Gs).base, value),
            Msr::SYSENTER_CS => self.write(f::GUEST_SYSENTER_CS, value as u32),
            Msr::SYSENTER_ESP => self.write(f::GUEST_SYSENTER_ESP, value),
            Msr::SYSENTER_EIP => self.write(f::GUEST_SYSENTER_EIP, value),
            Msr::KERNEL_GS_BASE => self.change_msrs(|m| m.kernel_gs_base = value),
            Msr::STAR => self.change_msrs(|m| m.star = value),
            Msr::LSTAR => self.change_msrs(|m| m.lstar = value),
            Msr::SYSCALL_MASK => self.change_msrs(|m| m.fmask = value),
            Msr::TSC_AUX => self.change_msrs(|m| m.tsc_aux = value),
            Msr::SPEC_CTRL => return self.set_spec_ctrl(value).is_ok(),
            Msr::PAT => {
                self.v.pat = value;
                self.load_pat();
            }
            Msr::CSTAR => self.v.cstar = value,
            Msr::DEBUGCTL => self.write(f::GUEST_DEBUGCTL, value),
            _ => return false,
        }
        true
    }

    /// IA32_PRED_CMD: no branch that the guest runs from here on is predicted by what ran before. IA32_FLUSH_CMD: nothing stays in
    /// the L1 data cache.
    pub(super) fn command(msr: Msr) {
        if matches!(msr, Msr::PRED_CMD | Msr::FLUSH_CMD) {
            // SAFETY: The caller has looked if this host has the MSR, whose bit 0 is a command without any effect that can be
            // seen.
            unsafe { host_msr::write(msr.0, 1) };
        }
    }

    fn change_msrs(&mut self, change: impl FnOnce(&mut super::load::SwitchedMsrs)) {
        self.follow.get().set_guest_msrs(change);
    }

    #[inline]
    pub(super) fn tsc(&self) -> GuestTsc {
        self.v.tsc
    }

    /// Sets the counter, whose scale is not another than the host's unless it can be.
    pub(super) fn set_tsc(&mut self, tsc: GuestTsc) {
        let scales = !tsc.scale.is_unity() && self.vmx.caps.tsc_scaling;
        let secondary = self
            .v
            .secondary
            .with_if(SecondaryControls::TSC_SCALING, scales);
        if secondary != self.v.secondary {
            self.v.secondary = secondary;
            self.write(f::SECONDARY_CONTROLS, secondary.bits());
        }
        if scales {
            self.write(f::TSC_MULTIPLIER, tsc.scale.multiplier());
        }
        self.write(f::TSC_OFFSET, tsc.offset);
        self.v.tsc = tsc;
    }

    #[inline]
    pub(super) fn interruptibility(&self) -> Interruptibility {
        Interruptibility::new(self.read(f::GUEST_INTERRUPTIBILITY))
    }

    #[inline]
    pub(super) fn set_interruptibility(&mut self, old: Interruptibility, new: Interruptibility) {
        if old != new {
            self.write(f::GUEST_INTERRUPTIBILITY, new.bits());
        }
    }

    /// The guest is not halted any more, if it was: it is about to get something to do.
    pub(super) fn end_halt(&mut self) {
        if self.v.halts {
            self.write(f::GUEST_ACTIVITY, 0);
        }
    }

    /// Has the guest exit at INT3, or not.
    pub(super) fn intercept_int3(&mut self, on: bool) {
        self.v.exits = self.v.exits & !BREAKPOINT | if on { BREAKPOINT } else { 0 };
        self.write_exceptions();
    }

    /// The guest's #UD does not exit any more.
    pub(super) fn leave_undefined_to_guest(&mut self) {
        self.v.exits &= !UNDEFINED;
        self.write_exceptions();
    }

    /// Tells the processor which exceptions exit: in an imitated real mode it could deliver none.
    pub(super) fn write_exceptions(&mut self) {
        let exits = if self.v.real { u32::MAX } else { self.v.exits };
        self.write(f::EXCEPTION_BITMAP, exits);
    }

    /// The guest's PAT, unless it has to do with the host's.
    fn load_pat(&mut self) {
        if self.vmx.caps.loads_pat {
            self.write(f::GUEST_PAT, self.v.pat);
        }
    }

    /// Turns a primary control on or off.
    pub(super) fn set_primary(&mut self, control: PrimaryControls, on: bool) {
        let controls = self.v.primary.with_if(control, on);
        if controls != self.v.primary {
            self.v.primary = controls;
            self.write(f::PRIMARY_CONTROLS, controls.bits());
        }
    }
}
