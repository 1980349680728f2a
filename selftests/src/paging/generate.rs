// SPDX-License-Identifier: GPL-2.0

//! Programs from seeds. Each operation is tried on the model first: what the model refuses is not in the program.

use super::begin::{
    all_indices, below, chance, entry, level_of, nameable, pick, setup, tables_of, A, D, NX, P, PS,
    U, W,
};
use super::code::Insn;
use super::layout::{self as at, alias, indices, POOL, POOL_LOW, ROOTS, TABLES};
use super::model::{Expect, Model, Reject, NOFLUSH, PCIDE, PGE, PKE, SMAP, SMEP};
use super::op::{Avoid, Features, Format, Op, Program, Regs};
use crate::host::Rng;
use crate::machine::cr;

/// What must come of a program: of each operation, and in the end.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What each operation sees.
    pub seen: Vec<Expect>,
    /// The guest afterwards.
    pub last: Model,
}

/// Does a program on the model.
///
/// # Errors
///
/// The number of an operation that programs must not do, and why.
pub fn simulate(program: &Program) -> Result<Outcome, (usize, Reject)> {
    let mut last = Model::new(&program.setup);
    let mut seen = Vec::new();
    for (i, op) in program.ops.iter().enumerate() {
        seen.push(last.step(op).map_err(|why| (i, why))?);
    }
    Ok(Outcome { seen, last })
}

/// Makes the program of a seed, of about `len` operations.
#[must_use]
pub fn generate(
    seed: u64,
    format: Format,
    features: Features,
    avoid: Avoid,
    len: usize,
) -> Program {
    let mut rng = Rng::new(seed ^ ((format as u64) << 56));
    for _ in 0..4 {
        rng.number();
    }
    let setup = setup(&mut rng, format, features, avoid);
    let pages = at::linear_pages(format);
    let mut g = Generator {
        model: Model::new(&setup),
        hot: (0..4).map(|_| pick(&mut rng, &pages)).collect(),
        rng,
        ops: Vec::new(),
    };
    let mut tries = 0;
    while g.ops.len() < len && tries < 20 * len {
        g.one();
        tries += 1;
    }
    Program {
        seed,
        setup,
        ops: g.ops,
    }
}

/// The program with some more operations, in which the guest leaves to the host.
#[must_use]
pub fn with_leaves(mut program: Program, count: usize) -> Program {
    let mut rng = Rng::new(program.seed ^ 0x1eaf);
    for _ in 0..count {
        let at = below(&mut rng, program.ops.len() + 1);
        program.ops.insert(at, Op::Leave);
    }
    program
}

struct Generator {
    rng: Rng,
    model: Model,
    /// The pages that the program uses most.
    hot: Vec<u64>,
    ops: Vec<Op>,
}

impl Generator {
    fn format(&self) -> Format {
        self.model.format
    }

    fn chance(&mut self, percent: u64) -> bool {
        chance(&mut self.rng, percent)
    }

    fn below(&mut self, n: usize) -> usize {
        below(&mut self.rng, n)
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        pick(&mut self.rng, from)
    }

    fn number(&mut self) -> u64 {
        self.rng.number()
    }

    /// Adds an operation, if the model lets it be done.
    fn push(&mut self, op: Op) -> bool {
        let mut after = self.model.clone();
        if after.step(&op).is_err() {
            return false;
        }
        self.model = after;
        self.ops.push(op);
        true
    }

    fn one(&mut self) {
        if !self.model.paging_on() && self.chance(25) {
            let v = self.model.cr0 | cr::PG;
            self.push(Op::Cr0(v));
            return;
        }
        match self.below(100) {
            0..=35 => self.access(),
            36..=41 => self.repair(),
            42..=58 => self.change_entry(),
            59..=65 => self.change_flags(),
            66..=69 => self.copy_entries(),
            70..=77 => self.fetch(),
            78..=81 => self.lar(),
            82..=85 => self.interrupt(),
            86..=88 => {
                let page = self.any_page();
                self.invalidate(page);
            }
            89..=93 => self.switch(),
            _ => self.control(),
        }
    }

    /// A linear address at the start of a page that the program may access.
    fn any_page(&mut self) -> u64 {
        if self.model.paging_on() {
            if self.chance(65) {
                return self.hot[below(&mut self.rng, self.hot.len())];
            }
            let i = self.below(self.model.pages.len());
            self.model.pages[i]
        } else {
            POOL[self.below(POOL_LOW)]
        }
    }

    /// Invalidates what may be cached for an address, in one of the ways.
    fn invalidate(&mut self, addr: u64) {
        let m = &self.model;
        let (cr3, cr4) = (m.cr3, m.cr4);
        let pcid = if cr4 & PCIDE != 0 { cr3 & 0xfff } else { 0 };
        match self.below(10) {
            0..=4 => {
                self.push(Op::Invlpg(addr));
            }
            5 => {
                let within = addr | (self.number() & 0xfff);
                self.push(Op::Invlpg(within));
            }
            6 | 7 => {
                self.push(Op::Cr3(cr3));
            }
            8 => {
                self.push(Op::Cr4(cr4 ^ PGE));
                if self.chance(70) {
                    self.push(Op::Cr4(cr4));
                }
            }
            _ => {
                let kind = (self.number() >> 9) & 3;
                self.push(Op::Invpcid { kind, pcid, addr });
            }
        }
    }

    /// Sees to it that an address may be accessed.
    fn prepare(&mut self, addr: u64, len: u64) {
        for addr in [addr, addr.wrapping_add(len - 1)] {
            if self.model.stale(addr) {
                self.invalidate(addr & !0xfff);
            }
            if self.model.stale(addr) {
                self.push(Op::Invlpg(addr));
            }
        }
    }

    fn access(&mut self) {
        use Insn::*;
        const SHORT: &[Insn] = &[
            Read1, Read2, Read4, Read4, Write1, Write2, Write4, Write4, Xchg4, And4, Or1, Or4,
            Xadd4, CmpXchg4, CmpXchg8b, Stos4, Movs4,
        ];
        const LONG: &[Insn] = &[
            Read1, Read4, Read8, Read8, Write1, Write4, Write8, Write8, Xchg8, And8, Or4, Xadd4,
            CmpXchg8b, Stos8, Movs8, Push8,
        ];
        let long = self.format().is_long();
        let insn = self.pick(if long { LONG } else { SHORT });
        let offset = match self.below(10) {
            0..=5 => (self.number() >> 8) & 0xff8,
            6 | 7 => (self.number() >> 8) & 0xfff,
            8 => 0x1000 - 1 - (self.number() >> 8) % 8,
            _ => self.pick(all_indices(self.format())) * self.format().entry(),
        };
        let addr = self.any_page() | (offset & 0xfff);
        let strings = matches!(insn, Stos4 | Stos8 | Movs4 | Movs8);
        let count = if strings { 1 + self.below(4) as u64 } else { 1 };
        let mut regs = Regs {
            a: self.value(),
            ..Regs::default()
        };
        if strings {
            regs.c = count;
        }
        if matches!(insn, Movs4 | Movs8) {
            regs.si = self.any_page() | ((self.number() >> 8) & 0xff8);
            self.prepare(regs.si, insn.size() * count);
        }
        if matches!(insn, CmpXchg4 | CmpXchg8b) {
            self.operands(insn, addr, &mut regs);
        }
        self.prepare(addr, insn.size() * count);
        let user = self.chance(45);
        let ac = self.chance(25);
        self.push(Op::Mem {
            insn,
            addr,
            regs,
            user,
            ac,
        });
    }

    /// Operands of CMPXCHG that find what is in memory, or not.
    fn operands(&mut self, insn: Insn, addr: u64, regs: &mut Regs) {
        let now = if self.model.paging_on() {
            self.model.probe(addr).1.map(|t| t.gpa)
        } else {
            Some(addr)
        };
        let there = addr & 0xfff <= 0xff8 && self.chance(70);
        let old = now
            .filter(|_| there)
            .and_then(|gpa| self.model.memory.number(gpa, 8))
            .unwrap_or(0x77);
        let new = self.value();
        self.exchange(insn, old, new, regs);
    }

    fn exchange(&mut self, insn: Insn, old: u64, new: u64, regs: &mut Regs) {
        regs.a = old & 0xffff_ffff;
        if insn == Insn::CmpXchg4 {
            regs.d = new & 0xffff_ffff;
        } else {
            regs.d = old >> 32;
            regs.b = new & 0xffff_ffff;
            regs.c = new >> 32;
        }
    }

    /// A value to write, which makes a good entry of a table often enough.
    fn value(&mut self) -> u64 {
        let v = if self.chance(60) {
            let level = 1 + self.below(2);
            self.new_entry(level)
        } else {
            self.number() & 0x3f3e
        };
        if self.format().is_long() {
            v
        } else {
            v & 0xffff_ffff
        }
    }

    fn new_entry(&mut self, level: usize) -> u64 {
        let m = &self.model;
        let (format, f, nxe) = (m.format, m.features, m.efer & cr::NXE != 0);
        entry(&mut self.rng, format, level, f, nxe)
    }

    /// An entry of a table: its page, its guest-physical address, and its value.
    fn slot(&mut self) -> (usize, u64, u64) {
        let format = self.format();
        if self.model.paging_on() && self.chance(60) {
            // One on the way to a page.
            let page = self.any_page();
            let trace = self.model.probe(page).0;
            let (gpa, value) = trace.path[self.below(trace.depth)];
            if let Some(page) = at::pool_index(gpa) {
                return (page, gpa, value);
            }
        }
        let page = if self.chance(94) {
            self.below(TABLES)
        } else {
            self.below(nameable(format))
        };
        let index = match level_of(format, page) {
            0 => self.pick(all_indices(format)),
            level if self.chance(90) => self.pick(indices(format)[level - 1]),
            _ => self.pick(all_indices(format)),
        };
        let gpa = POOL[page] + index * format.entry();
        let size = format.entry() as usize;
        (page, gpa, self.model.memory.number(gpa, size).unwrap_or(0))
    }

    /// A linear address that leads to this place in the pool: the dispatcher's, or a page of the program's.
    fn linear(&mut self, page: usize, gpa: u64) -> u64 {
        if !self.model.paging_on() {
            return gpa;
        }
        if self.chance(15) {
            for addr in self.model.pages.clone() {
                let to = self.model.probe(addr).1;
                if to.is_some_and(|t| t.gpa == gpa & !0xfff) && self.chance(50) {
                    let addr = addr | (gpa & 0xfff);
                    self.prepare(addr, 8);
                    return addr;
                }
            }
        }
        alias(page) | (gpa & 0xfff)
    }

    fn mem(&mut self, insn: Insn, addr: u64, regs: Regs) -> bool {
        self.push(Op::Mem {
            insn,
            addr,
            regs,
            user: false,
            ac: false,
        })
    }

    /// Replaces an entry by another.
    fn change_entry(&mut self) {
        use Insn::*;
        let (page, gpa, old) = self.slot();
        let level = match level_of(self.format(), page) {
            0 => 1 + self.below(2),
            level => level,
        };
        let mut new = self.new_entry(level);
        match self.below(10) {
            // Another frame only, other rights only, absent, or back.
            0 => new = (old & 0xfff) | (new & !0xfff),
            1 | 2 => new = (old & !0xe7) | (new & 0x67) | (old & PS),
            3 => new &= !P,
            4 => new = old | P | W | U,
            _ => {}
        }
        if self.format() == Format::Bits32 {
            new &= 0xffff_ffff;
        }
        let addr = self.linear(page, gpa);
        let mut regs = Regs {
            a: new,
            ..Regs::default()
        };
        let done = match self.format() {
            Format::Bits32 => match self.below(6) {
                0 | 1 => self.mem(Write4, addr, regs),
                2 => self.mem(Xchg4, addr, regs),
                3 => {
                    self.exchange(CmpXchg4, old, new, &mut regs);
                    self.mem(CmpXchg4, addr, regs)
                }
                4 => {
                    regs.c = 1;
                    self.mem(Stos4, addr, regs)
                }
                _ => {
                    self.mem(Write2, addr, regs);
                    regs.a = new >> 16;
                    self.mem(Write2, addr + 2, regs)
                }
            },
            Format::Pae => self.change_by_halves(addr, old, new),
            Format::Long => match self.below(7) {
                0 | 1 => self.mem(Write8, addr, regs),
                2 => self.mem(Xchg8, addr, regs),
                3 => self.mem(Push8, addr, regs),
                4 => {
                    regs.c = 1;
                    self.mem(Stos8, addr, regs)
                }
                _ => self.change_by_halves(addr, old, new),
            },
        };
        if done && self.chance(35) {
            let page = self.any_page();
            self.invalidate(page);
        }
    }

    /// Has the entries on the way to a page permit everything, from the top to the first that needs it.
    fn repair(&mut self) {
        if !self.model.paging_on() {
            return;
        }
        let target = self.any_page();
        let trace = self.model.probe(target).0;
        let levels = self.format().levels();
        for (i, (gpa, old)) in trace.path.iter().copied().enumerate().take(trace.depth) {
            let Some(page) = at::pool_index(gpa) else {
                return;
            };
            let level = levels - i;
            let four = self.format() == Format::Pae && level == 3;
            let last = i + 1 == trace.depth;
            let good = if four { P } else { P | W | U };
            if old & good == good && old & NX == 0 && (!last || trace.maps) {
                continue;
            }
            let addr = self.linear(page, gpa);
            let mut new = old | good;
            if last && !trace.maps {
                let table = if level == 1 {
                    TABLES + self.below(4)
                } else {
                    self.pick(&tables_of(self.format(), level - 1))
                };
                new = POOL[table] | good;
            }
            new &= !NX;
            match self.format() {
                Format::Bits32 => self.mem(
                    Insn::Write4,
                    addr,
                    Regs {
                        a: new,
                        ..Regs::default()
                    },
                ),
                _ => self.change_by_halves(addr, old, new),
            };
            if self.chance(60) {
                return;
            }
        }
    }

    /// Replaces 8 bytes without an instruction of 64-bit mode.
    fn change_by_halves(&mut self, addr: u64, old: u64, new: u64) -> bool {
        use Insn::{CmpXchg8b, Write2, Write4};
        let mut regs = Regs::default();
        let half = |g: &mut Self, insn, at: u64, value: u64| {
            g.mem(
                insn,
                addr + at,
                Regs {
                    a: value & 0xffff_ffff,
                    ..Regs::default()
                },
            )
        };
        match self.below(4) {
            0 | 1 => {
                self.exchange(CmpXchg8b, old, new, &mut regs);
                self.mem(CmpXchg8b, addr, regs)
            }
            2 => {
                half(self, Write4, 0, new & !P)
                    && half(self, Write4, 4, new >> 32)
                    && half(self, Write4, 0, new)
            }
            // Not aligned: the middle of the entry first.
            _ => {
                half(self, Write4, 2, new >> 16)
                    && half(self, Write2, 0, new & 0xffff)
                    && half(self, Write2, 6, new >> 48)
            }
        }
    }

    /// Sets or clears bits of an entry.
    fn change_flags(&mut self) {
        use Insn::*;
        let (page, gpa, old) = self.slot();
        let addr = self.linear(page, gpa);
        let bit = self.pick(&[P, W, U, A, D, A | D, W | U, A, D]);
        let regs = |a: u64| Regs {
            a,
            ..Regs::default()
        };
        match self.below(6) {
            0 | 1 => self.mem(Clear4, addr, regs(!bit & 0xffff_ffff)),
            2 => self.mem(And4, addr, regs(!bit & 0xffff_ffff)),
            3 => self.mem(Or1, addr, regs(bit)),
            4 => self.mem(Write1, addr, regs((old ^ bit) & 0xff)),
            _ => self.mem(Write2, addr, regs((old ^ bit) & 0xffff)),
        };
    }

    /// Copies entries from a table to another.
    fn copy_entries(&mut self) {
        let (from, from_gpa, _) = self.slot();
        let (to, to_gpa, _) = self.slot();
        let (insn, units) = match self.format() {
            Format::Long => (Insn::Movs8, 1),
            Format::Pae => (Insn::Movs4, 2),
            Format::Bits32 => (Insn::Movs4, 1),
        };
        let last = from_gpa.max(to_gpa) & 0xfff;
        let room = (0x1000 - last) / self.format().entry();
        let n = (1 + self.below(2) as u64).min(room);
        let regs = Regs {
            c: n * units,
            si: self.linear(from, from_gpa),
            ..Regs::default()
        };
        let addr = self.linear(to, to_gpa);
        self.mem(insn, addr, regs);
    }

    fn fetch(&mut self) {
        let addr = self.any_page() | if self.chance(80) { 0xff0 } else { 0xfff };
        self.prepare(addr, 4);
        let user = self.chance(50);
        self.push(Op::Fetch { addr, user });
    }

    fn lar(&mut self) {
        let offset = 0x100 + 8 * self.below(16) as u16;
        let ldt = self.model.ldt();
        self.prepare(ldt, 8);
        let user = self.chance(50);
        self.push(Op::Lar { offset, user });
    }

    fn interrupt(&mut self) {
        let stack = self.any_page() + (0x40 + ((self.number() >> 8) & 0xfb0));
        self.prepare(stack - 8, 1);
        let user = !self.format().is_long() || self.chance(60);
        let long = self.format().is_long();
        let at = stack - if long { 24 } else { 12 };
        let gpa = if self.model.paging_on() {
            self.model.probe(at).1.map_or(0, |t| t.gpa)
        } else {
            at
        };
        let flags = self.model.lasting(gpa).unwrap_or(0);
        self.push(Op::Interrupt { stack, user, flags });
    }

    /// Goes to another root, or another context.
    fn switch(&mut self) {
        let mut v = POOL[self.below(ROOTS)];
        if self.model.cr4 & PCIDE != 0 {
            v |= self.below(3) as u64;
            if self.chance(60) {
                v |= NOFLUSH;
            }
        }
        self.push(Op::Cr3(v));
    }

    fn control(&mut self) {
        let m = &self.model;
        let (cr0, cr4, efer) = (m.cr0, m.cr4, m.efer);
        match self.below(12) {
            0 | 1 => self.push(Op::Cr0(cr0 ^ cr::WP)),
            2 if !self.format().is_long() => self.push(Op::Cr0(cr0 ^ cr::PG)),
            3 if self.format() != Format::Bits32 => self.push(Op::Efer(efer ^ cr::NXE)),
            4 => self.push(Op::Cr4(cr4 ^ PGE)),
            5 => self.push(Op::Cr4(cr4 ^ SMEP)),
            6 => self.push(Op::Cr4(cr4 ^ SMAP)),
            7 if self.format().is_long() => self.push(Op::Cr4(cr4 ^ PKE)),
            8 if !self.format().is_long() => self.push(Op::Cr4(cr4 ^ cr::PSE)),
            9 | 10 if self.format().is_long() => {
                let v = (self.number() & self.number()) >> 5;
                self.push(Op::Pkru(v as u32 & !3))
            }
            _ => {
                let addr = self.any_page();
                let kind = (self.number() >> 9) & 3;
                let pcid = if cr4 & PCIDE != 0 {
                    self.below(3) as u64
                } else {
                    0
                };
                self.push(Op::Invpcid { kind, pcid, addr })
            }
        };
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A processor with everything.
    pub(in crate::paging) const ALL: Features = Features {
        maxphyaddr: 39,
        nx: true,
        gbpages: true,
        smep: true,
        smap: true,
        pku: true,
        pcid: true,
        invpcid: true,
        pse36: true,
    };

    /// The programs have what they are to have, and the model does the same again.
    #[test]
    fn programs() {
        for format in [Format::Bits32, Format::Pae, Format::Long] {
            let (mut ops, mut faults, mut fetches, mut frames, mut accesses) = (0, 0, 0, 0, 0);
            for seed in 0..300 {
                let p = generate(seed, format, ALL, Avoid::default(), 60);
                let o = simulate(&p).unwrap();
                assert_eq!(p, generate(seed, format, ALL, Avoid::default(), 60));
                ops += p.ops.len();
                for (op, e) in p.ops.iter().zip(&o.seen) {
                    faults += usize::from(e.vector == 14);
                    match op {
                        Op::Fetch { .. } if e.vector != 14 => fetches += 1,
                        Op::Interrupt { .. } if e.vector != 14 => frames += 1,
                        Op::Mem { addr, .. } if *addr > 0x40_0000 => {
                            accesses += usize::from(e.vector != 14);
                        }
                        _ => {}
                    }
                }
            }
            println!("{format:?}: {ops} operations, {faults} faults, {accesses} accesses, {fetches} fetches, {frames} frames");
            assert!(ops > 300 * 50);
            assert!(faults > ops / 20 && faults < ops / 2);
            assert!(accesses > ops / 20 && fetches > 200 && frames > 100);
        }
    }
}
