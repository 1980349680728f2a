// SPDX-License-Identifier: GPL-2.0

//! Exits of guests whose page tables are shadowed (see [`crate::mmu::shadow`]): page faults, and what
//! tells the processor that translations have changed.

use super::memory::Unbacked;
use super::Next;
use super::Run;
use crate::arch::Arch;
use crate::backend::Loaded;
use crate::linux::mm::cond_resched;
use crate::linux::mm::send_hwpoison;
use crate::linux::task;
use crate::mem::fault::Fault as MemFault;
use crate::mem::shadow::ShadowFault;
use crate::mem::shadow::WalkMemory;
use crate::mmu::ept::Access;
use crate::mmu::shadow::ShadowWant;
use crate::mmu::shadow::TableWrite;
use crate::x86::emulate::Hint;
use crate::x86::event::Injection;
use crate::x86::exception::Fault;
use crate::x86::exception::PfError;
use crate::x86::paging::PageAccess;
use crate::x86::paging::Paging;
use crate::x86::paging::Walk;
use crate::x86::paging::WalkError;
use crate::x86::segment::AccessKind;
use kernel::prelude::*;

/// Levels of a guest's tables.
const LEVELS: u8 = 5;

/// The guest has all that its processor knows of translations go.
pub(crate) fn flush_guest(hw: &mut impl Loaded, arch: &mut Arch) {
    hw.flush_guest_tlb();
    if let Some(shadow) = &mut arch.shadow {
        shadow.flush_all();
    }
}

impl<L: Loaded> Run<'_, L> {
    /// The state that decides how the guest's addresses are translated.
    fn guest_paging(&mut self) -> Paging {
        let mut paging = super::memory::paging(&mut self.hw, self.arch);
        paging.pdptes = Some(self.hw.pdptes());
        paging
    }

    /// Checks all tables, if it is time.
    fn audit(&mut self) {
        let interval = crate::parameters::mmu_audit();
        if interval == 0 {
            return;
        }
        if let Some(shadow) = &mut self.arch.shadow {
            shadow.faults = shadow.faults.wrapping_add(1);
            if shadow.faults % interval == 0 {
                self.memory.audit_shadow();
            }
        }
    }

    /// Before an entry: the tables for what the guest has in its registers. Sleeps.
    #[inline(never)]
    pub(super) fn prepare_shadow(&mut self) -> Result {
        let changed = self.hw.take_paging_change();
        match &self.arch.shadow {
            Some(shadow) if changed || shadow.wants_load() => self.load_shadow(),
            _ => Ok(()),
        }
    }

    #[inline(never)]
    fn load_shadow(&mut self) -> Result {
        let paging = self.guest_paging();
        if let Some(shadow) = &mut self.arch.shadow {
            let cr3 = self.memory.load_shadow(shadow, &paging)?;
            self.hw.set_shadow_root(cr3);
            self.hw.flush_guest_tlb();
        }
        self.audit();
        Ok(())
    }

    /// A page fault: the guest's own, or one of the shadow tables, which are filled then.
    #[inline(never)]
    pub(super) fn guest_page_fault(&mut self, linear: u64, error: PfError) -> Result<Next> {
        self.shared.stats.pf_taken.bump();
        self.note_progress();
        let write = error.has(PfError::W);
        let kind = match (error.has(PfError::I), write) {
            (true, _) => AccessKind::Fetch,
            (_, true) => AccessKind::Write,
            _ => AccessKind::Read,
        };
        let user = error.has(PfError::U);
        let page_access = PageAccess {
            kind,
            user,
            // Code of user mode does not access as the supervisor itself.
            implicit: !user && crate::arch::cpl(&mut self.hw) == 3,
            probe: false,
        };
        let access = Access {
            read: kind == AccessKind::Read,
            write,
            exec: kind == AccessKind::Fetch,
        };
        let paging = self.guest_paging();
        loop {
            let walked = {
                let mut memory = WalkMemory::new(self.memory, self.shared);
                paging.walk(&mut memory, linear, page_access)
            };
            let walk = match walked {
                Ok(walk) => walk,
                Err(WalkError::Fault(error)) => {
                    self.shared.stats.pf_guest.bump();
                    match self.arch.events.begun() {
                        None => {}
                        // It makes a double fault of a fault, which has no CR2 of its own.
                        Some(Injection::Exception(_)) => self.hw.set_cr2(linear),
                        // It comes in the place of what was to be delivered: an instruction that asked for that is
                        // executed again, an interrupt has been acknowledged and is lost.
                        Some(_) => self.arch.events.redeliver(None),
                    }
                    return self.raise(Fault::page(linear, error));
                }
                Err(WalkError::Contended) => return Ok(Next::Guest),
                Err(WalkError::Host(gpa)) => return Err(self.unbacked(Unbacked(gpa))),
            };
            let gpa = walk.translation.gpa;
            if self.arch.devices.contain(self.memory, gpa) {
                return self.emulate_access(gpa, linear, write);
            }
            let want = ShadowWant {
                linear,
                walk: &walk,
                write,
                user,
            };
            let Some(shadow) = &self.arch.shadow else {
                return Ok(Next::Guest);
            };
            match self.memory.map_shadow(shadow, &want, access, self.shared)? {
                ShadowFault::Fault(MemFault::Mapped(_)) => {
                    self.shared.stats.pf_fixed.bump();
                    self.audit();
                    return Ok(Next::Guest);
                }
                ShadowFault::Fault(MemFault::Mmio) => {
                    self.arch.devices.note(self.memory, gpa);
                    return self.emulate_access(gpa, linear, write);
                }
                // The loop finds the signal.
                ShadowFault::Fault(MemFault::Interrupted) => return Ok(Next::Guest),
                ShadowFault::Fault(MemFault::HwPoison(hva)) => {
                    send_hwpoison(hva);
                    return Ok(Next::Guest);
                }
                ShadowFault::Fault(MemFault::BadHva(_)) => {
                    return Err(self.unbacked(Unbacked(gpa)));
                }
                ShadowFault::Table => return self.write_table(&walk, linear),
                ShadowFault::Emulate => return self.emulate_shadowed(gpa, linear, write),
                ShadowFault::Stale => {
                    if task::signal_pending() {
                        return Ok(Next::Guest);
                    }
                    cond_resched();
                    // The root may be what has gone.
                    if let Some(shadow) = &mut self.arch.shadow {
                        shadow.keep_translations();
                    }
                    self.load_shadow()?;
                }
            }
        }
    }

    /// Another instruction faults than the one that a table was let go for, so that one is done.
    fn note_progress(&mut self) {
        if let Some(shadow) = &mut self.arch.shadow {
            if shadow.let_go.is_some_and(|(_, rip)| rip != self.hw.rip()) {
                shadow.let_go = None;
            }
        }
    }

    /// Emulates the instruction that accesses a page.
    fn emulate_access(&mut self, gpa: u64, linear: u64, write: bool) -> Result<Next> {
        self.shared.stats.pf_emulate.bump();
        let shadow = self.arch.shadow.as_ref();
        let hint = Hint {
            linear,
            gpa,
            write,
            table: shadow.is_some_and(|shadow| shadow.table.is_some()),
        };
        self.emulate(gpa, Some(hint))
    }

    /// The guest writes to one of its tables. The instruction is emulated, which tells the shadow what it
    /// changes. What cannot be is executed after all, on a frame that is no table for as long; so is what
    /// writes to all of it, as a kernel does that clears or copies a page.
    fn write_table(&mut self, walk: &Walk, linear: u64) -> Result<Next> {
        let gpa = walk.translation.gpa;
        let used = (1..=LEVELS)
            .filter_map(|level| walk.step(level))
            .any(|step| step.gpa >> 12 == gpa >> 12);
        let gfn = gpa >> 12;
        let write = TableWrite { gfn, linear };
        let rip = self.hw.rip();
        if let Some(shadow) = &mut self.arch.shadow {
            // The way to the table leads through itself, or that to another operand or to the instruction has been seen
            // to: it would be one again before it is written.
            let needed = used || shadow.let_go.take() == Some((write, rip));
            shadow.table = (!needed).then_some(write);
        }
        let next = self.emulate_shadowed(gpa, linear, true);
        if let Some(shadow) = &mut self.arch.shadow {
            shadow.table = None;
        }
        next
    }

    /// Emulates an access to memory, by an instruction or by the delivery of an event.
    fn emulate_shadowed(&mut self, gpa: u64, linear: u64, write: bool) -> Result<Next> {
        match self.arch.events.begun() {
            Some(injection) => self.deliver_by_software(&injection),
            None => self.emulate_access(gpa, linear, write),
        }
    }

    /// Lets the guest write to the table that it is writing to, if it can be let.
    pub(super) fn unprotect_table(&mut self) -> Option<Next> {
        let rip = self.hw.rip();
        let shadow = self.arch.shadow.as_mut()?;
        let write = shadow.table.take()?;
        shadow.let_go = Some((write, rip));
        self.memory.unprotect_shadow(write.gfn);
        Some(Next::Guest)
    }

    /// INVPCID, whose descriptor has been checked. Roots are kept whatever their identifier, so that what is wanted for
    /// one is done for all.
    pub(super) fn invalidate_pcid(&mut self, kind: u64, _identifier: u64, linear: u64) {
        if kind == 0 {
            self.invalidate_page(linear);
        } else {
            flush_guest(&mut self.hw, self.arch);
        }
    }

    /// INVLPG, or INVPCID of one address.
    pub(super) fn invalidate_page(&mut self, linear: u64) {
        self.shared.stats.invlpg.bump();
        if let Some(shadow) = &self.arch.shadow {
            self.memory.invalidate_shadow(shadow, linear);
        }
        self.hw.flush_guest_tlb();
    }

    /// The guest has loaded CR3; `keep`: and keeps what it knows of the translations there.
    pub(super) fn loaded_cr3(&mut self, keep: bool) {
        if let Some(shadow) = &mut self.arch.shadow {
            shadow.loads_cr3(keep);
        }
    }
}
