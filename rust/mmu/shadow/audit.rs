// SPDX-License-Identifier: GPL-2.0

//! The oracle: every entry of every shadow page against the guest's tables, against the host's, and
//! against the lists. With the module's parameter `mmu_audit`; it takes time that nobody wants to give
//! otherwise.

use super::super::ept::Level;
use super::page::Handle;
use super::page::ShadowPage;
use super::page::ENTRIES;
use super::role::Modes;
use super::sync::Tracked;
use super::Around;
use super::Shadow;
use super::ShadowMmu;
use core::sync::atomic::Ordering;
use kernel::prelude::*;

const PRESENT_ACCESSED: u64 = 1 << 0 | 1 << 5;
const LARGE: u64 = 1 << 7;

/// What an entry is at fault for.
type Verdict = Result<(), &'static str>;

impl ShadowMmu {
    /// Looks at everything; returns if all is as it should be, and says what is not. `host` is the page frame that a
    /// guest frame has now, if that can be said.
    pub(crate) fn audit(&self, around: &Around<'_>, host: &dyn Fn(u64) -> Option<u64>) -> bool {
        // What has been written was in the tables before the lock was taken, or is not yet: then its writer is still
        // counted after the guest's entry has been read.
        let told = || self.writing.load(Ordering::SeqCst) == 0;
        self.with(around, |state| {
            let mut right = true;
            for number in 1..state.pages.end() {
                right &= state.audit_page(around, number, host, &told);
            }
            right
        })
    }
}

impl Shadow {
    fn audit_page(
        &self,
        around: &Around<'_>,
        number: u32,
        host: &dyn Fn(u64) -> Option<u64>,
        told: &dyn Fn() -> bool,
    ) -> bool {
        let Some(page) = self.pages.get(number) else {
            return true;
        };
        let mut right = true;
        let found = self.any_page(page.gfn, |n, _| n == number);
        if found != page.valid {
            pr_err!("audit: page {}: in the list: {}\n", number, found);
            right = false;
        }
        if page.valid && !page.is_direct() && self.frames.tables_near(page.gfn) == 0 {
            pr_err!("audit: page {}: a table that is not counted\n", number);
            right = false;
        }
        let mut present = 0u16;
        for index in 0..ENTRIES {
            let spte = page.entry(index);
            if !spte.is_present() {
                continue;
            }
            present = present.wrapping_add(1);
            let handle = Handle::new(number, index);
            let verdict = self
                .audit_lists(page, handle)
                .and_then(|()| self.audit_rights(page, handle))
                .and_then(|()| {
                    self.audit_guest(around, page, handle).or_else(|what| {
                        if told() {
                            Err(what)
                        } else {
                            Ok(())
                        }
                    })
                })
                .and_then(|()| audit_host(page, index, host));
            if let Err(what) = verdict {
                let level = page.role.level.number();
                let (gfn, key) = (page.gfn, page.link(index).key);
                pr_err!(
                    "audit: {}: level {} of {:#x}, entry {}: {:#x} for {:#x}\n",
                    what,
                    level,
                    gfn,
                    index,
                    spte.bits(),
                    key
                );
                right = false;
            }
        }
        if present != page.present {
            pr_err!(
                "audit: page {}: {} entries, not {}\n",
                number,
                present,
                page.present
            );
            right = false;
        }
        right
    }

    /// It is in the list that it belongs to.
    fn audit_lists(&self, page: &ShadowPage, handle: Handle) -> Verdict {
        let link = page.link(handle.index());
        let prev = Handle::from_raw(link.prev);
        let before = match self.pages.entry(prev) {
            Some((page, index)) => page.link(index).next,
            None if page.entry(handle.index()).is_leaf(page.role.level) => {
                self.frames.get(link.key).mapped_by
            }
            None => match self.pages.get(link.key as u32) {
                Some(child) => child.parents.raw(),
                None => return Err("its page is not there"),
            },
        };
        if before != handle.raw() {
            return Err("not in its list");
        }
        Ok(())
    }

    /// Nobody writes to a table unnoticed.
    fn audit_rights(&self, page: &ShadowPage, handle: Handle) -> Verdict {
        let spte = page.entry(handle.index());
        let level = page.role.level;
        if !spte.is_leaf(level) || !spte.is_written() {
            return Ok(());
        }
        let gfn = page.link(handle.index()).key;
        let tracked = match level {
            Level::Page4K => self.tracked(gfn) != Tracked::No,
            _ => self.any_tracked(gfn),
        };
        if tracked {
            return Err("a table can be written");
        }
        Ok(())
    }

    /// It is what the guest's entry says, if that counts.
    fn audit_guest(&self, around: &Around<'_>, page: &ShadowPage, handle: Handle) -> Verdict {
        let (role, index) = (page.role, handle.index());
        if role.is_direct() || page.unsync || !page.valid {
            return Ok(());
        }
        let mut raw = [0; 8];
        let size = role.entry_size() as usize;
        let gpa = (page.gfn << 12).wrapping_add(role.guest_offset(index));
        let read = raw.get_mut(..size).map(|buf| (around.peek)(gpa, buf));
        if read != Some(true) {
            return Ok(());
        }
        let entry = u64::from_le_bytes(raw);
        let spte = page.entry(index);
        let key = page.link(index).key;
        if entry & PRESENT_ACCESSED != PRESENT_ACCESSED {
            return Err("the guest's entry is not present, or not accessed");
        }
        if role.level > Level::Page4K {
            let rights = role.rights.below(entry, role.modes);
            let frame = (entry & 0x000f_ffff_ffff_f000) >> 12;
            let Some(child) = self.child(handle).and_then(|child| self.pages.get(child)) else {
                if entry & LARGE == 0 {
                    return Err("a large leaf for a table");
                }
                if spte.is_written() && !rights.write && role.modes.has(Modes::WP) {
                    return Err("a large leaf allows too much");
                }
                return Ok(());
            };
            if !child.is_direct() && (child.gfn != frame || child.role.rights != rights) {
                return Err("another table than the guest's");
            }
            return Ok(());
        }
        let Some(leaf) = role.leaf(entry) else {
            return Err("the guest's entry is none");
        };
        if leaf.gfn != key {
            return Err("another frame than the guest's");
        }
        // What the supervisor writes to without CR0.WP is not the user's for as long.
        let lent = !role.modes.has(Modes::WP) && spte.is_writable() && !spte.is_user();
        if spte.is_writable() && !leaf.rights.write && !lent {
            return Err("a leaf allows writes");
        }
        if spte.is_user() != leaf.rights.user && !lent {
            return Err("a leaf is another mode's");
        }
        if spte.is_exec() && !leaf.rights.exec {
            return Err("a leaf allows fetches");
        }
        if spte.is_user() && spte.key() != leaf.key {
            return Err("a leaf has another key");
        }
        Ok(())
    }
}

/// It maps what the host has there.
fn audit_host(page: &ShadowPage, index: usize, host: &dyn Fn(u64) -> Option<u64>) -> Verdict {
    let spte = page.entry(index);
    if !spte.is_leaf(page.role.level) {
        return Ok(());
    }
    match host(page.link(index).key) {
        Some(pfn) if pfn != spte.phys() >> 12 => Err("another page than the host's"),
        _ => Ok(()),
    }
}
