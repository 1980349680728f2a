// SPDX-License-Identifier: GPL-2.0

//! A processor that keeps every translation until it must let it go: the rules of [`tlb`](super::tlb) are right if
//! programs see the same with it as with one that keeps none.

use super::model::{Model, NOFLUSH, PCIDE, PGE, PKE, SMAP, SMEP};
use super::op::Op;
use crate::machine::cr;
use rkvm_x86::paging::PageAccess;
use rkvm_x86::segment::AccessKind;

/// A translation.
#[derive(Debug, Clone, Copy)]
struct Line {
    context: u16,
    global: bool,
    linear: u64,
    gpa: u64,
    shift: u8,
    user: bool,
    writable: bool,
    nx: bool,
    key: u32,
    dirty: bool,
}

impl Line {
    fn holds(&self, linear: u64) -> bool {
        linear >> self.shift == self.linear >> self.shift
    }
}

/// What the processor kept.
#[derive(Debug, Clone, Default)]
pub(super) struct Stubborn {
    lines: Vec<Line>,
    /// How often a translation was used that was kept.
    pub(super) hits: usize,
}

impl Stubborn {
    /// The translation for an access, if there is one that serves.
    pub(super) fn find(
        &mut self,
        m: &Model,
        context: u16,
        linear: u64,
        a: PageAccess,
        ac: bool,
    ) -> Option<u64> {
        let i = self
            .lines
            .iter()
            .position(|l| (l.global || l.context == context) && l.holds(linear))?;
        let l = self.lines[i];
        let write = a.kind == AccessKind::Write;
        let fetch = a.kind == AccessKind::Fetch;
        let supervisor_on_user = !a.user && l.user;
        let guarded = a.user || m.cr0 & cr::WP != 0;
        let rights = m.pkru >> (2 * l.key);
        let keyed = !fetch && l.user && m.cr4 & PKE != 0 && m.format.is_long();
        let forbidden = (a.user && !l.user)
            || (fetch && l.nx)
            || (fetch && supervisor_on_user && m.cr4 & SMEP != 0)
            || (!fetch && supervisor_on_user && m.cr4 & SMAP != 0 && (a.implicit || !ac))
            || (write && guarded && !l.writable)
            || (keyed && (rights & 1 != 0 || (write && rights & 2 != 0 && guarded)));
        if forbidden {
            // The fault invalidates, and the second one counts.
            self.lines.retain(|l| !l.holds(linear));
            return None;
        }
        if write && !l.dirty {
            self.lines.remove(i);
            return None;
        }
        self.hits += 1;
        Some(l.gpa | (linear & ((1 << l.shift) - 1)))
    }

    /// Keeps the translation of an address as it is now.
    pub(super) fn keep(&mut self, m: &mut Model, context: u16, linear: u64) {
        let (trace, Some(t)) = m.probe(linear) else {
            return;
        };
        let leaf = trace.path[trace.depth - 1].1;
        let offset = (1 << t.page_shift) - 1;
        self.lines.push(Line {
            context,
            global: m.cr4 & PGE != 0 && leaf & 0x100 != 0,
            linear: linear & !offset,
            gpa: t.gpa & !offset,
            shift: t.page_shift,
            user: t.user,
            writable: t.writable,
            nx: trace.path[..trace.depth].iter().any(|e| e.1 >> 63 != 0),
            key: (leaf >> 59) as u32 & 15,
            dirty: leaf & 0x40 != 0,
        });
    }

    /// Lets go what an operation that was done invalidates.
    pub(super) fn invalidate(&mut self, before: &Model, op: &Op) {
        let context = before.context();
        match *op {
            Op::Invlpg(addr) => self
                .lines
                .retain(|l| !(l.holds(addr) && (l.global || l.context == context))),
            Op::Invpcid { kind, pcid, addr } => {
                let pcid = pcid as u16;
                self.lines.retain(|l| match kind {
                    0 => l.global || l.context != pcid || !l.holds(addr),
                    1 => l.global || l.context != pcid,
                    2 => false,
                    _ => l.global,
                });
            }
            Op::Cr3(v) if v & NOFLUSH == 0 => {
                let to = if before.cr4 & PCIDE != 0 {
                    v as u16 & 0xfff
                } else {
                    0
                };
                self.lines.retain(|l| l.global || l.context != to);
            }
            Op::Cr0(v) if (v ^ before.cr0) & cr::PG != 0 => self.lines.clear(),
            Op::Cr4(v) if (v ^ before.cr4) & PGE != 0 => self.lines.clear(),
            Op::Cr4(v) if v & !before.cr4 & SMEP != 0 => {
                self.lines.retain(|l| l.global || l.context != context);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::generate::{generate, simulate, tests::ALL};
    use super::super::layout::POOL_LEN;
    use super::super::op::{Avoid, Format};
    use super::*;

    #[test]
    fn programs_do_not_notice() {
        for format in [Format::Bits32, Format::Pae, Format::Long] {
            let mut hits = 0;
            for seed in 0..400 {
                let p = generate(seed, format, ALL, Avoid::default(), 80);
                let want = simulate(&p).unwrap();
                let mut m = Model::new(&p.setup);
                m.stubborn = Some(Stubborn::default());
                for (i, op) in p.ops.iter().enumerate() {
                    let e = m.step(op);
                    assert_eq!(
                        e,
                        Ok(want.seen[i]),
                        "{format:?} seed {seed} operation {i}: {op}"
                    );
                }
                for page in 0..POOL_LEN {
                    assert!(
                        m.memory.page(page) == want.last.memory.page(page),
                        "{format:?} seed {seed} page {page}"
                    );
                }
                hits += m.stubborn.map_or(0, |s| s.hits);
            }
            println!("{format:?}: {hits} hits");
            assert!(hits > 400);
        }
    }
}
