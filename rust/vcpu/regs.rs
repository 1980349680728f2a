// SPDX-License-Identifier: GPL-2.0

//! KVM_GET/SET_REGS, SREGS, SREGS2, and KVM_TRANSLATE.

use super::Locked;
use crate::abi::kvm_dtable;
use crate::abi::kvm_regs;
use crate::abi::kvm_segment;
use crate::abi::kvm_sregs;
use crate::abi::kvm_sregs2;
use crate::abi::kvm_translation;
use crate::backend::Loaded;
use crate::backend::TableReg;
use crate::bindings as b;
use crate::run::cr::load_pdptes;
use crate::run::debug;
use crate::run::memory;
use crate::x86::cr;
use crate::x86::regs::Cr0;
use crate::x86::regs::Cr4;
use crate::x86::regs::Efer;
use crate::x86::regs::Gpr;
use crate::x86::regs::Rflags;
use crate::x86::segment::SegAttr;
use crate::x86::segment::SegReg;
use crate::x86::segment::Segment;
use kernel::prelude::*;

fn segment_to_abi(seg: &Segment) -> kvm_segment {
    let attr = seg.attr;
    kvm_segment {
        base: seg.base,
        limit: seg.limit,
        selector: seg.selector,
        type_: attr.type_(),
        // What cannot be used is not there, whatever the processor left in the bit.
        present: u8::from(!attr.unusable()),
        dpl: attr.dpl(),
        db: u8::from(attr.db()),
        s: u8::from(attr.s()),
        l: u8::from(attr.l()),
        g: u8::from(attr.g()),
        avl: u8::from(attr.avl()),
        unusable: u8::from(attr.unusable()),
        padding: 0,
    }
}

fn segment_from_abi(reg: SegReg, seg: &kvm_segment) -> Segment {
    // A segment that is in use has been accessed; VMMs that make one up forget the bit, and an entry
    // would be refused without it. LDTR's type has no such bit.
    let accessed = u8::from(reg != SegReg::Ldtr);
    Segment {
        selector: seg.selector,
        base: seg.base,
        limit: seg.limit,
        attr: SegAttr::from_vmx(0)
            .with_type(seg.type_ & 15 | accessed)
            .with_s(seg.s & 1 != 0)
            .with_dpl(seg.dpl & 3)
            .with_p(seg.present & 1 != 0)
            .with_avl(seg.avl & 1 != 0)
            .with_l(seg.l & 1 != 0)
            .with_db(seg.db & 1 != 0)
            .with_g(seg.g & 1 != 0)
            .with_unusable(seg.unusable != 0 || seg.present == 0),
    }
}

fn table_to_abi(table: TableReg) -> kvm_dtable {
    kvm_dtable {
        base: table.base,
        limit: table.limit,
        padding: [0; 3],
    }
}

fn table_from_abi(table: &kvm_dtable) -> TableReg {
    TableReg {
        base: table.base,
        limit: table.limit,
    }
}

impl<L: Loaded> Locked<'_, L> {
    /// KVM_GET_REGS.
    pub(super) fn get_regs(&mut self) -> kvm_regs {
        let hw = &mut *self.hw;
        kvm_regs {
            rax: hw.gpr(Gpr::Rax),
            rbx: hw.gpr(Gpr::Rbx),
            rcx: hw.gpr(Gpr::Rcx),
            rdx: hw.gpr(Gpr::Rdx),
            rsi: hw.gpr(Gpr::Rsi),
            rdi: hw.gpr(Gpr::Rdi),
            rsp: hw.gpr(Gpr::Rsp),
            rbp: hw.gpr(Gpr::Rbp),
            r8: hw.gpr(Gpr::R8),
            r9: hw.gpr(Gpr::R9),
            r10: hw.gpr(Gpr::R10),
            r11: hw.gpr(Gpr::R11),
            r12: hw.gpr(Gpr::R12),
            r13: hw.gpr(Gpr::R13),
            r14: hw.gpr(Gpr::R14),
            r15: hw.gpr(Gpr::R15),
            rip: hw.rip(),
            rflags: debug::shown_rflags(hw, self.arch).bits(),
        }
    }

    /// KVM_SET_REGS. An exception that waits was one of the state that is replaced.
    pub(super) fn set_regs(&mut self, regs: &kvm_regs) {
        let hw = &mut *self.hw;
        for (r, value) in [
            (Gpr::Rax, regs.rax),
            (Gpr::Rbx, regs.rbx),
            (Gpr::Rcx, regs.rcx),
            (Gpr::Rdx, regs.rdx),
            (Gpr::Rsi, regs.rsi),
            (Gpr::Rdi, regs.rdi),
            (Gpr::Rsp, regs.rsp),
            (Gpr::Rbp, regs.rbp),
            (Gpr::R8, regs.r8),
            (Gpr::R9, regs.r9),
            (Gpr::R10, regs.r10),
            (Gpr::R11, regs.r11),
            (Gpr::R12, regs.r12),
            (Gpr::R13, regs.r13),
            (Gpr::R14, regs.r14),
            (Gpr::R15, regs.r15),
        ] {
            hw.set_gpr(r, value);
        }
        hw.set_rip(regs.rip);
        let flags = Rflags::new(regs.rflags) | Rflags::FIXED;
        let step = flags.has(Rflags::TF) || self.arch.debugger.steps();
        hw.set_rflags(flags.with_if(Rflags::TF, step));
        debug::settle_step(hw, self.arch);
        self.arch.events.drop_pending_exception();
    }

    /// KVM_GET_SREGS.
    pub(super) fn get_sregs(&mut self) -> kvm_sregs {
        let now = self.system_registers();
        let mut interrupt_bitmap = [0; 4];
        if let Some(vector) = self.arch.events.interrupt_in_bitmap() {
            if let Some(word) = interrupt_bitmap.get_mut(usize::from(vector / 64)) {
                *word |= 1 << (vector % 64);
            }
        }
        kvm_sregs {
            cs: now.cs,
            ds: now.ds,
            es: now.es,
            fs: now.fs,
            gs: now.gs,
            ss: now.ss,
            tr: now.tr,
            ldt: now.ldt,
            gdt: now.gdt,
            idt: now.idt,
            cr0: now.cr0,
            cr2: now.cr2,
            cr3: now.cr3,
            cr4: now.cr4,
            cr8: now.cr8,
            efer: now.efer,
            apic_base: now.apic_base,
            interrupt_bitmap,
        }
    }

    /// KVM_GET_SREGS2: with the four entries of PAE paging, if that is on.
    pub(super) fn get_sregs2(&mut self) -> kvm_sregs2 {
        let mut sregs = self.system_registers();
        if uses_pdptes(
            Cr0::new(sregs.cr0),
            Cr4::new(sregs.cr4),
            Efer::new(sregs.efer),
        ) {
            sregs.pdptrs = self.hw.pdptes();
            sregs.flags = b::KVM_SREGS2_FLAGS_PDPTRS_VALID.into();
        }
        sregs
    }

    /// What both have.
    fn system_registers(&mut self) -> kvm_sregs2 {
        let hw = &mut *self.hw;
        let mut seg = |reg| segment_to_abi(&hw.segment(reg));
        kvm_sregs2 {
            cs: seg(SegReg::Cs),
            ds: seg(SegReg::Ds),
            es: seg(SegReg::Es),
            fs: seg(SegReg::Fs),
            gs: seg(SegReg::Gs),
            ss: seg(SegReg::Ss),
            tr: seg(SegReg::Tr),
            ldt: seg(SegReg::Ldtr),
            gdt: table_to_abi(hw.gdtr()),
            idt: table_to_abi(hw.idtr()),
            cr0: hw.cr0().bits(),
            cr2: hw.cr2(),
            cr3: hw.cr3(),
            cr4: hw.cr4().bits(),
            cr8: self.arch.cr8(),
            efer: hw.efer().bits(),
            apic_base: self.arch.apic_base(),
            flags: 0,
            pdptrs: [0; 4],
        }
    }

    /// KVM_SET_SREGS: EINVAL for a state that a processor of the vCPU's CPUID cannot be in.
    pub(super) fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result {
        self.set_system_registers(&kvm_sregs2 {
            cs: sregs.cs,
            ds: sregs.ds,
            es: sregs.es,
            fs: sregs.fs,
            gs: sregs.gs,
            ss: sregs.ss,
            tr: sregs.tr,
            ldt: sregs.ldt,
            gdt: sregs.gdt,
            idt: sregs.idt,
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            cr8: sregs.cr8,
            efer: sregs.efer,
            apic_base: sregs.apic_base,
            flags: 0,
            pdptrs: [0; 4],
        })?;
        if let Some((n, word)) = (0u8..)
            .zip(sregs.interrupt_bitmap)
            .find(|(_, word)| *word != 0)
        {
            let vector = n * 64 + word.trailing_zeros() as u8;
            self.arch.events.queue_interrupt(vector);
        }
        Ok(())
    }

    /// KVM_SET_SREGS2: the same, and EINVAL for flags that are none and for entries of PAE paging without
    /// it. With them, memory is not asked.
    pub(super) fn set_sregs2(&mut self, sregs: &kvm_sregs2) -> Result {
        let valid = u64::from(b::KVM_SREGS2_FLAGS_PDPTRS_VALID);
        let (cr0, cr4) = (Cr0::new(sregs.cr0), Cr4::new(sregs.cr4));
        let given = sregs.flags & valid != 0;
        if sregs.flags & !valid != 0 || (given && !uses_pdptes(cr0, cr4, Efer::new(sregs.efer))) {
            return Err(EINVAL);
        }
        self.set_system_registers(sregs)
    }

    fn set_system_registers(&mut self, sregs: &kvm_sregs2) -> Result {
        let cs = segment_from_abi(SegReg::Cs, &sregs.cs);
        let (cr0, cr4) = (Cr0::new(sregs.cr0), Cr4::new(sregs.cr4));
        let efer = Efer::new(sregs.efer);
        let own = self.arch.features;
        if !cr::sregs_are_valid(cr0, sregs.cr3, cr4, efer, cs.attr, &own) {
            return Err(EINVAL);
        }
        self.set_apic_base(sregs.apic_base)?;

        let hw = &mut *self.hw;
        hw.set_idtr(table_from_abi(&sregs.idt));
        hw.set_gdtr(table_from_abi(&sregs.gdt));
        hw.set_cr2(sregs.cr2);
        hw.set_cr3(sregs.cr3);
        hw.set_cr4(cr4);
        hw.set_efer(efer);
        hw.set_cr0(cr0);
        if sregs.flags & u64::from(b::KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0 {
            hw.set_pdptes(&sregs.pdptrs);
        } else if uses_pdptes(cr0, cr4, efer) {
            // As in KVM, entries that no processor would load leave the old ones: the entry fails.
            let _ = load_pdptes(hw, self.vm, sregs.cr3, &own);
        }
        for (reg, seg) in [
            (SegReg::Ds, &sregs.ds),
            (SegReg::Es, &sregs.es),
            (SegReg::Fs, &sregs.fs),
            (SegReg::Gs, &sregs.gs),
            (SegReg::Ss, &sregs.ss),
            (SegReg::Tr, &sregs.tr),
            (SegReg::Ldtr, &sregs.ldt),
        ] {
            hw.set_segment(reg, &segment_from_abi(reg, seg));
        }
        hw.set_segment(SegReg::Cs, &cs);
        crate::run::shadow::flush_guest(hw, self.arch);
        // The VMM may have written to the guest's tables as well, as when it restores all of a machine.
        self.vm.forget_shadow();

        // Only the low four bits are a priority; KVM drops the value then.
        if sregs.cr8 <= 15 {
            self.set_cr8(sregs.cr8);
        }
        self.arch.refresh_cpuid(self.host, self.around.options, cr4);
        Ok(())
    }

    /// KVM_TRANSLATE: where a linear address leads, whatever the rights, which are not told: as in KVM,
    /// `writeable` is set and `usermode` is not. Nothing is marked accessed.
    pub(super) fn translate(&mut self, translation: &mut kvm_translation) {
        let gpa = memory::probe(
            self.hw,
            self.arch,
            self.vm,
            self.around.shared,
            translation.linear_address,
        );
        translation.physical_address = gpa.unwrap_or(u64::MAX);
        translation.valid = u8::from(gpa.is_some());
        translation.writeable = 1;
        translation.usermode = 0;
    }
}

/// Whether PAE paging is on, which has four entries in the processor.
fn uses_pdptes(cr0: Cr0, cr4: Cr4, efer: Efer) -> bool {
    cr0.has(Cr0::PG) && cr4.has(Cr4::PAE) && !efer.has(Efer::LMA)
}
