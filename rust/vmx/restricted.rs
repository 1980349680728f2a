// SPDX-License-Identifier: GPL-2.0

//! Guests that are not unrestricted: the processor runs them with paging and in protected mode, or not at all.
//!
//! So what a guest has is kept apart from what the hardware has:
//!
//! - A guest in real mode runs in virtual-8086 mode, at privilege level 3, with a task-state segment of ours, which lets it
//!   execute INT n as in real mode. Whatever else is different there is a fault, which exits, as all exceptions do; the
//!   emulator does the instruction. Events are delivered by software.
//! - A guest without paging has a page table that maps each address to itself; with shadow tables, those do.
//! - A guest whose segments fit neither mode is emulated: [`needs_emulation`].
//!
//! What the guest has of a register that it changes without an exit is in the hardware alone: in real mode the selectors and
//! the bases that follow from them, and all of RFLAGS but IOPL and VM.

use super::fields as f;
use super::fields::PrimaryControls;
use super::fields::SegmentFields;
use super::vcpu::LoadedVcpu;
use super::Vmx;
use crate::vm::special::TSS_LIMIT;
use crate::x86::regs::Cr0;
use crate::x86::regs::Cr4;
use crate::x86::regs::Efer;
use crate::x86::regs::Rflags;
use crate::x86::segment::SegAttr;
use crate::x86::segment::SegReg;
use crate::x86::segment::Segment;
use crate::x86::vmentry::needs_emulation;
use crate::x86::vmentry::VM86_ATTR;

/// The flags that virtual-8086 mode needs for itself.
const VM86_FLAGS: Rflags = Rflags::IOPL.with(Rflags::VM);

/// What the hardware cannot hold.
pub(super) struct Restricted {
    /// The guest is not unrestricted. Never changes.
    pub(super) on: bool,
    /// There is no EPT either. Never changes.
    pub(super) shadowed: bool,
    /// The segments of a guest in real mode: of the six, selector and base are the hardware's.
    segments: [Segment; 8],
    /// Its IOPL, and RFLAGS.VM.
    flags: Rflags,
    /// Where the pages for it are.
    tss: Option<u64>,
    identity_map: u64,
    /// CR3, while the hardware has another.
    cr3: Option<u64>,
    /// The entries of PAE paging, without EPT.
    pdptes: [u64; 4],
    /// What the hardware's CR3 is, without EPT.
    root: u64,
    /// Something that decides how addresses are translated has changed.
    paging_changed: bool,
    /// Whether `invalid` still holds, as far as segments and modes go.
    checked: bool,
    /// It was found out with RFLAGS.VM so.
    checked_vm86: bool,
    invalid: bool,
}

impl Restricted {
    pub(super) fn new(vmx: &Vmx) -> Self {
        Self {
            on: !vmx.caps.unrestricted,
            shadowed: !vmx.caps.ept,
            segments: SegReg::ALL.map(Segment::reset),
            flags: Rflags::empty(),
            tss: None,
            identity_map: 0,
            cr3: (!vmx.caps.unrestricted).then_some(0),
            pdptes: [0; 4],
            root: 0,
            paging_changed: true,
            checked: false,
            checked_vm86: false,
            invalid: false,
        }
    }

    /// RFLAGS in virtual-8086 mode, of what they are in real mode.
    pub(super) fn imitate_flags(&mut self, flags: Rflags) -> Rflags {
        self.flags = flags.and(VM86_FLAGS);
        flags | VM86_FLAGS
    }

    /// And the other way round.
    pub(super) fn real_flags(&self, hardware: Rflags) -> Rflags {
        hardware.without(VM86_FLAGS) | self.flags
    }

    /// The guest's CR3, if it is not in the hardware.
    #[inline]
    pub(super) const fn cr3(&self) -> Option<u64> {
        self.cr3
    }

    /// Segments or the mode have changed.
    #[inline]
    pub(super) fn uncheck(&mut self) {
        self.checked = false;
    }

    /// The entries of PAE paging, which the hardware does not hold.
    pub(super) const fn pdptes(&self) -> &[u64; 4] {
        &self.pdptes
    }

    pub(super) fn set_pdptes(&mut self, pdptes: &[u64; 4]) {
        self.paging_changed |= self.pdptes != *pdptes;
        self.pdptes = *pdptes;
    }

    /// Something that decides how addresses are translated becomes `new`.
    pub(super) fn note_paging<T: PartialEq>(&mut self, old: T, new: T) {
        self.paging_changed |= self.shadowed && old != new;
    }

    pub(super) fn take_paging_change(&mut self) -> bool {
        self.shadowed && core::mem::take(&mut self.paging_changed)
    }
}

impl LoadedVcpu<'_> {
    /// CR0 is about to become this.
    pub(super) fn leave_cr0(&mut self, new: Cr0) {
        let old = self.cr0();
        self.v.restricted.note_paging(old, new);
        self.v.restricted.uncheck();
        match (self.v.real, new.has(Cr0::PE)) {
            (true, true) => self.leave_real_mode(),
            (false, false) => self.enter_real_mode(),
            _ => {}
        }
    }

    /// It is that, in the hardware and as the guest sees it.
    pub(super) fn settle_cr0(&mut self, new: Cr0) {
        let paged = new.has(Cr0::PG);
        if !self.v.restricted.shadowed && paged != self.v.restricted.cr3.is_none() {
            if paged {
                if let Some(cr3) = self.v.restricted.cr3.take() {
                    self.set_cr3(cr3);
                }
            } else {
                self.v.restricted.cr3 = Some(self.cr3());
            }
        }
        if !self.v.restricted.shadowed {
            if !paged {
                self.write(f::GUEST_CR3, self.v.restricted.identity_map);
            }
            let accesses = PrimaryControls::CR3_LOAD | PrimaryControls::CR3_STORE;
            self.set_primary(accesses, !paged);
        }
        // Some of it is there with paging only.
        let cr4 = self.cr4();
        self.set_cr4(cr4);
    }

    /// CR4 in the hardware, for what the guest has.
    pub(super) fn hardware_cr4(&self, cr4: Cr4) -> Cr4 {
        let paged = Cr0::new(self.read(f::CR0_SHADOW)).has(Cr0::PG);
        let mut hardware = cr4 | Cr4::VMXE;
        if self.v.restricted.shadowed {
            // Our tables have entries of 64 bits, and are not marked with the guest's identifiers.
            hardware = hardware.with(Cr4::PAE).without(Cr4::PCIDE);
        } else if !paged {
            // For the pages of 4 MiB.
            hardware = hardware.with(Cr4::PSE).without(Cr4::PAE);
        }
        if !paged {
            // Without paging, pages have no rights.
            hardware = hardware.without(Cr4::SMEP | Cr4::SMAP | Cr4::PKE);
        }
        hardware.with_if(Cr4::VME, self.v.real || cr4.has(Cr4::VME))
    }

    /// EFER in the hardware.
    pub(super) fn hardware_efer(&self, efer: Efer) -> Efer {
        // With paging, which the hardware always has, long mode that is enabled is active.
        let hardware = efer.with_if(Efer::LME, efer.has(Efer::LMA));
        if self.v.restricted.shadowed && Efer::new(self.vmx.host.efer).has(Efer::NXE) {
            return hardware.with(Efer::NXE);
        }
        hardware
    }

    /// Sets CR3 beside the hardware: returns if it is there.
    pub(super) fn keep_cr3(&mut self, new: u64) -> bool {
        let Some(cr3) = &mut self.v.restricted.cr3 else {
            return false;
        };
        let old = core::mem::replace(cr3, new);
        self.v.restricted.note_paging(old, new);
        true
    }

    pub(super) fn set_shadow_root(&mut self, root: u64) {
        if core::mem::replace(&mut self.v.restricted.root, root) != root {
            self.write(f::GUEST_CR3, root);
            // What is cached of the other root has the same tag.
            self.v.flush_guest = true;
        }
    }

    pub(super) fn set_private_pages(&mut self, tss: Option<u64>, identity_map: u64) {
        if self.v.restricted.tss != tss {
            self.v.restricted.tss = tss;
            self.v.restricted.uncheck();
            if self.v.real {
                self.load_tss();
            }
        }
        if self.v.restricted.identity_map != identity_map {
            self.v.restricted.identity_map = identity_map;
            if self.v.restricted.cr3.is_some() && !self.v.restricted.shadowed {
                self.write(f::GUEST_CR3, identity_map);
            }
        }
    }

    /// Whether the hardware cannot run the guest as it is.
    #[inline]
    pub(super) fn needs_emulation(&mut self) -> bool {
        self.v.restricted.on && self.is_invalid()
    }

    fn is_invalid(&mut self) -> bool {
        let known = self.v.restricted.checked
            && self
                .set_flags()
                .is_none_or(|flags| flags.has(Rflags::VM) == self.v.restricted.checked_vm86);
        if !known {
            let (cr0, flags, efer) = (self.cr0(), self.rflags(), self.efer());
            let no_tss = self.v.real && self.v.restricted.tss.is_none();
            let invalid = no_tss || needs_emulation(cr0, flags, efer, |reg| self.segment(reg));
            self.v.restricted.checked = true;
            self.v.restricted.checked_vm86 = flags.has(Rflags::VM);
            self.v.restricted.invalid = invalid;
        }
        self.v.restricted.invalid
    }

    /// The guest leaves protected mode: its segments stay, those of virtual-8086 mode take their place.
    #[cold]
    fn enter_real_mode(&mut self) {
        let flags = self.rflags();
        let segments = SegReg::ALL.map(|reg| self.segment(reg));
        self.v.real = true;
        self.set_rflags(flags);
        self.write_exceptions();
        for (reg, segment) in SegReg::ALL.into_iter().zip(segments) {
            self.set_real_segment(reg, &segment);
        }
        let tr = SegmentFields::of(SegReg::Tr);
        self.write(tr.selector, 0);
        self.write(tr.limit, TSS_LIMIT);
        self.write(tr.attr, SegAttr::RESET_TSS.to_vmx());
        self.load_tss();
        let ldtr = SegmentFields::of(SegReg::Ldtr);
        self.write(ldtr.selector, 0);
        self.write(ldtr.attr, SegAttr::NULL.to_vmx());
    }

    #[cold]
    fn leave_real_mode(&mut self) {
        let flags = self.rflags();
        let segments = SegReg::ALL.map(|reg| self.segment(reg));
        self.v.real = false;
        self.set_rflags(flags);
        self.write_exceptions();
        for (reg, segment) in SegReg::ALL.into_iter().zip(segments) {
            self.set_segment(reg, &segment);
        }
    }

    fn load_tss(&mut self) {
        let base = self.v.restricted.tss.unwrap_or(0);
        self.write(SegmentFields::of(SegReg::Tr).base, base);
    }

    /// A segment of a guest in real mode.
    pub(super) fn real_segment(&self, reg: SegReg) -> Segment {
        let kept = self.kept_segment(reg);
        if matches!(reg, SegReg::Tr | SegReg::Ldtr) {
            return kept;
        }
        let fields = SegmentFields::of(reg);
        Segment {
            selector: self.read(fields.selector),
            base: self.read(fields.base),
            ..kept
        }
    }

    /// Its attributes.
    pub(super) fn real_segment_attr(&self, reg: SegReg) -> SegAttr {
        self.kept_segment(reg).attr
    }

    fn kept_segment(&self, reg: SegReg) -> Segment {
        let kept = self.v.restricted.segments.get(reg as usize);
        kept.copied().unwrap_or(Segment::NULL)
    }

    /// Sets it. What is not as in virtual-8086 mode is emulated, so the hardware need not know.
    pub(super) fn set_real_segment(&mut self, reg: SegReg, value: &Segment) {
        if let Some(kept) = self.v.restricted.segments.get_mut(reg as usize) {
            *kept = *value;
        }
        if matches!(reg, SegReg::Tr | SegReg::Ldtr) {
            return;
        }
        let fields = SegmentFields::of(reg);
        self.write(fields.selector, value.selector);
        self.write(fields.base, value.base);
        self.write(fields.limit, 0xffff);
        self.write(fields.attr, VM86_ATTR);
    }
}
