// SPDX-License-Identifier: GPL-2.0

//! Loads of control registers.

use super::super::code::Insn;
use super::super::layout::{pool_index, ROOTS};
use super::{Expect, Model, Stop, NOFLUSH, PCIDE, PGE, PKE, SMAP, SMEP};
use crate::machine::cr;

impl Model {
    pub(super) fn set_cr0(&mut self, v: u64) -> Result<Expect, Stop> {
        let changed = self.cr0 ^ v;
        if changed & !(cr::WP | cr::PG) != 0 || (self.long() && changed & cr::PG != 0) {
            return Err("other bits of CR0".into());
        }
        if self.avoid.smap_without_wp && self.cr4 & SMAP != 0 && v & cr::WP == 0 {
            return Err("SMAP without WP".into());
        }
        let smep = self.cr4 & (SMEP | SMAP) != 0;
        if self.avoid.smep_across_paging && smep && changed & cr::PG != 0 {
            return Err("SMEP without paging".into());
        }
        if changed & cr::PG != 0 {
            if v & cr::PG != 0 {
                match self.read_pdptes(self.cr3) {
                    Some(p) => self.pdptes = p,
                    None => return self.gp(Insn::SetCr0),
                }
            }
            self.tlb.flush_all();
        }
        if changed & cr::PG == 0 && self.pdptes_changed() {
            return Err("other PDPTEs in memory".into());
        }
        self.cr0 = v;
        self.done(Insn::SetCr0, false)
    }

    pub(super) fn set_cr3(&mut self, v: u64) -> Result<Expect, Stop> {
        let pcids = self.cr4 & PCIDE != 0;
        let root = v & !NOFLUSH & !0xfff;
        if pool_index(root).is_none_or(|i| i >= ROOTS) || (!pcids && v & (NOFLUSH | 0xfff) != 0) {
            return Err("no root".into());
        }
        if self.paging_on() {
            match self.read_pdptes(v) {
                Some(p) => self.pdptes = p,
                None => return self.gp(Insn::SetCr3),
            }
        }
        self.cr3 = v & !NOFLUSH;
        if v & NOFLUSH == 0 {
            self.tlb.flush_context(self.context());
        }
        self.done(Insn::SetCr3, false)
    }

    pub(super) fn set_cr4(&mut self, v: u64) -> Result<Expect, Stop> {
        let changed = self.cr4 ^ v;
        let f = self.features;
        for (bit, there) in [
            (SMEP, f.smep),
            (SMAP, f.smap),
            (PKE, f.pku),
            (cr::PSE, f.pse36),
        ] {
            if v & bit != 0 && !there {
                return Err("no such feature".into());
            }
        }
        if changed & !(PGE | SMEP | SMAP | PKE | cr::PSE) != 0 {
            return Err("other bits of CR4".into());
        }
        let off = !self.paging_on();
        if self.avoid.smep_across_paging && off && changed & (SMEP | SMAP) != 0 {
            return Err("SMEP without paging".into());
        }
        if self.avoid.smap_without_wp && v & SMAP != 0 && self.cr0 & cr::WP == 0 {
            return Err("SMAP without WP".into());
        }
        if self.paging_on() && changed & (PGE | cr::PSE | SMEP) != 0 {
            match self.read_pdptes(self.cr3) {
                Some(p) => self.pdptes = p,
                None => return self.gp(Insn::SetCr4),
            }
        } else if self.pdptes_changed() {
            return Err("other PDPTEs in memory".into());
        }
        self.cr4 = v;
        if changed & PGE != 0 {
            self.tlb.flush_all();
        } else if changed & v & SMEP != 0 {
            self.tlb.flush_context(self.context());
        }
        self.done(Insn::SetCr4, false)
    }
}
