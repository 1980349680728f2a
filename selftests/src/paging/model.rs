// SPDX-License-Identifier: GPL-2.0

//! The model: what an operation does, and what it must see.

mod control;

use super::code::{self, Insn, Record, DONE, INTERRUPT};
use super::layout::{self as at, pool_index, ROOTS};
use super::memory::{Memory, Walk};
use super::op::{Avoid, Features, Format, Op, Regs, Setup};
use super::tlb::{Tlb, Trace};
use crate::machine::cr;
use rkvm_x86::paging::{PageAccess, Paging, Translation, WalkError};
use rkvm_x86::regs::{Cr0, Cr3, Cr4, Efer, Rflags};
use rkvm_x86::segment::AccessKind;

/// CR4.PGE.
pub const PGE: u64 = 1 << 7;
/// CR4.PCIDE.
pub const PCIDE: u64 = 1 << 17;
/// CR4.SMEP.
pub const SMEP: u64 = 1 << 20;
/// CR4.SMAP.
pub const SMAP: u64 = 1 << 21;
/// CR4.PKE.
pub const PKE: u64 = 1 << 22;
/// In a value for CR3: nothing is to be invalidated.
pub const NOFLUSH: u64 = 1 << 63;
const ZF: u64 = 0x40;
const RSVD: u32 = 8;

/// Why an operation is not for a program here.
pub type Reject = &'static str;

/// How an access ended otherwise than by being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    Fault { error: u32, cr2: u64 },
    Reject(Reject),
}

impl From<Reject> for Stop {
    fn from(r: Reject) -> Self {
        Stop::Reject(r)
    }
}

/// The bytes of an access in guest-physical memory: on one page or two.
type Pieces = Vec<(u64, usize)>;

/// What an operation must see. Fields that are `None` are not looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Expect {
    /// The vector.
    pub vector: u8,
    /// The error code.
    pub error: u64,
    /// The saved instruction pointer.
    pub rip: Option<u64>,
    /// CR2.
    pub cr2: u64,
    /// RAX, and the bits of it that count.
    pub a: Option<(u64, u64)>,
    /// RCX.
    pub c: Option<u64>,
    /// RDX.
    pub d: Option<u64>,
    /// RFLAGS.ZF.
    pub zf: Option<bool>,
}

impl Expect {
    /// Whether `r` is as it must be.
    #[must_use]
    pub fn matches(&self, r: &Record) -> bool {
        r.vector == u32::from(self.vector)
            && r.error == self.error
            && self.rip.is_none_or(|v| r.rip == v)
            && r.cr2 == self.cr2
            && self.a.is_none_or(|(v, mask)| r.a & mask == v)
            && self.c.is_none_or(|v| r.c == v)
            && self.d.is_none_or(|v| r.d == v)
            && self.zf.is_none_or(|v| (r.flags & ZF != 0) == v)
    }
}

/// The guest, as the architecture has it.
#[derive(Debug, Clone)]
pub struct Model {
    /// Its memory.
    pub memory: Memory,
    /// The format of its tables.
    pub format: Format,
    /// What its processor has.
    pub features: Features,
    /// What is not to be done.
    pub avoid: Avoid,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// PKRU.
    pub pkru: u32,
    /// The linear pages that programs use.
    pub pages: Vec<u64>,
    ldt: u64,
    pdptes: [u64; 4],
    /// The pages of the pool that have been tables.
    tables: [bool; at::POOL_LEN],
    tlb: Tlb,
    /// A processor that keeps all that it may.
    #[cfg(test)]
    pub(super) stubborn: Option<super::stubborn::Stubborn>,
}

impl Model {
    /// The model of a guest that is about to begin.
    #[must_use]
    pub fn new(s: &Setup) -> Self {
        let pages = at::linear_pages(s.format);
        let mut m = Model {
            memory: Memory::new(&s.pool),
            format: s.format,
            features: s.features,
            avoid: s.avoid,
            cr0: s.cr0,
            cr3: s.cr3,
            cr4: s.cr4,
            efer: s.efer,
            pkru: 0,
            tlb: Tlb::new(pages.len()),
            pages,
            ldt: s.ldt,
            pdptes: [0; 4],
            tables: [false; at::POOL_LEN],
            #[cfg(test)]
            stubborn: None,
        };
        if m.paging_on() {
            if let Some(p) = m.read_pdptes(m.cr3) {
                m.pdptes = p;
            }
        }
        m.refresh();
        m
    }

    /// Whether paging is on.
    #[must_use]
    pub fn paging_on(&self) -> bool {
        self.cr0 & cr::PG != 0
    }

    fn long(&self) -> bool {
        self.format.is_long()
    }

    /// The linear page at which the LDT is.
    #[must_use]
    pub fn ldt(&self) -> u64 {
        self.ldt
    }

    pub(super) fn context(&self) -> u16 {
        if self.cr4 & PCIDE != 0 {
            (self.cr3 & 0xfff) as u16
        } else {
            0
        }
    }

    fn paging(&self, ac: bool) -> Paging {
        Paging {
            cr0: Cr0::new(self.cr0),
            cr3: Cr3::new(self.cr3),
            cr4: Cr4::new(self.cr4),
            efer: Efer::new(self.efer),
            rflags: Rflags::new(code::flags(ac)),
            pkru: self.pkru,
            maxphyaddr: self.features.maxphyaddr,
            gbpages: self.features.gbpages,
            pdptes: None,
        }
    }

    fn registers_of_pae(&self) -> Option<[u64; 4]> {
        (self.format == Format::Pae).then_some(self.pdptes)
    }

    /// The table of four that a value of CR3 names, unless it may not be loaded.
    fn read_pdptes(&self, cr3: u64) -> Option<[u64; 4]> {
        if self.format != Format::Pae {
            return Some([0; 4]);
        }
        let reserved = (u64::MAX << self.features.maxphyaddr) | 0x1e6;
        let mut p = [0; 4];
        for (i, e) in p.iter_mut().enumerate() {
            *e = self.memory.number((cr3 & 0xffff_ffe0) + 8 * i as u64, 8)?;
            if *e & 1 != 0 && *e & reserved != 0 {
                return None;
            }
        }
        Some(p)
    }

    /// Whether the table of four in memory is another by now. Then only those writes to CR0 and CR4 are for programs
    /// that load it: emulators load it at all.
    fn pdptes_changed(&self) -> bool {
        self.paging_on() && self.read_pdptes(self.cr3) != Some(self.pdptes)
    }

    /// Where an address leads now, without effects: the walk and what it came to.
    #[must_use]
    pub fn probe(&mut self, linear: u64) -> (Trace, Option<Translation>) {
        let paging = self.paging(false);
        let four = self.format == Format::Pae;
        let mut walk = Walk::new(&mut self.memory, four.then_some(self.pdptes));
        let t = paging.translate(&mut walk, linear, PageAccess::PROBE).ok();
        let trace = Trace {
            path: walk.path,
            depth: walk.depth,
            maps: t.is_some(),
            shift: t.map_or(12, |t| t.page_shift),
            four,
        };
        (trace, t)
    }

    /// Tells the cache what the walks are now.
    fn refresh(&mut self) {
        if !self.paging_on() {
            return;
        }
        let traces: Vec<Trace> = (0..self.pages.len())
            .map(|i| self.probe(self.pages[i]).0)
            .collect();
        for (gpa, _) in traces.iter().flat_map(|t| &t.path[..t.depth]) {
            if let Some(i) = pool_index(*gpa) {
                self.tables[i] = true;
            }
        }
        self.tlb
            .update(self.context(), &traces, self.cr4 & PGE != 0);
    }

    /// The number of the page of a linear address, among those that programs use.
    #[must_use]
    pub fn tracked(&self, linear: u64) -> Option<usize> {
        self.pages.iter().position(|p| *p == linear & !0xfff)
    }

    /// Whether what may be cached forbids an access now.
    #[must_use]
    pub fn stale(&self, linear: u64) -> bool {
        self.paging_on()
            && self
                .tracked(linear)
                .is_some_and(|i| self.tlb.harms(self.context(), i))
    }

    /// Whether an access takes no spurious fault.
    fn certain(&self, linear: u64) -> bool {
        self.tracked(linear)
            .is_none_or(|i| self.tlb.clean(self.context(), i))
    }

    fn own_limit(&self) -> u64 {
        if self.format == Format::Bits32 {
            0x40_0000
        } else {
            0x20_0000
        }
    }

    fn translate(&mut self, linear: u64, access: PageAccess, ac: bool) -> Result<u64, Stop> {
        if self.paging_on() {
            if self.tracked(linear).is_none() && linear >= self.own_limit() {
                return Err("no page of programs".into());
            }
            if self.stale(linear) {
                return Err("stale".into());
            }
            if self.keyed_supervisor(linear, access) {
                return Err("a key and a supervisor".into());
            }
        }
        #[cfg(test)]
        if let Some(gpa) = self.kept(linear, access, ac) {
            return Ok(gpa);
        }
        let paging = self.paging(ac);
        let pdptes = self.registers_of_pae();
        let mut walk = Walk::new(&mut self.memory, pdptes);
        let t = paging.translate(&mut walk, linear, access);
        let (wrote, outside) = (walk.wrote, walk.outside);
        if outside {
            return Err("a table outside of memory".into());
        }
        if wrote {
            self.refresh();
        }
        match t {
            Ok(t) if self.memory.bytes(t.gpa, 1).is_none() => {
                Err("outside of the model's memory".into())
            }
            Ok(t) => {
                #[cfg(test)]
                self.keep(linear);
                Ok(t.gpa)
            }
            Err(WalkError::Fault(e)) => {
                if e.bits() & RSVD != 0 && self.avoid.reserved {
                    return Err("reserved bits".into());
                }
                Err(Stop::Fault {
                    error: e.bits(),
                    cr2: linear,
                })
            }
            Err(_) => Err("contended".into()),
        }
    }

    /// Whether PKRU denies something. Then programs use no stack: emulators do not look at keys there.
    fn keys_count(&self) -> bool {
        self.long() && self.cr4 & PKE != 0 && self.pkru != 0
    }

    /// Whether an access is by a supervisor, or to a supervisor page, with a key to which PKRU denies something:
    /// emulators differ there.
    fn keyed_supervisor(&mut self, linear: u64, access: PageAccess) -> bool {
        if !self.keys_count() || access.kind == AccessKind::Fetch {
            return false;
        }
        let (trace, Some(t)) = self.probe(linear) else {
            return false;
        };
        let key = (trace.path[trace.depth - 1].1 >> 59) & 15;
        !(t.user && access.user) && (self.pkru >> (2 * key)) & 3 != 0
    }

    #[cfg(test)]
    fn kept(&mut self, linear: u64, access: PageAccess, ac: bool) -> Option<u64> {
        let mut s = self.stubborn.take()?;
        let used = self.paging_on() && self.tracked(linear).is_some();
        let gpa = used
            .then(|| s.find(self, self.context(), linear, access, ac))
            .flatten();
        self.stubborn = Some(s);
        gpa
    }

    #[cfg(test)]
    fn keep(&mut self, linear: u64) {
        if let Some(mut s) = self.stubborn.take() {
            if self.paging_on() && self.tracked(linear).is_some() {
                let context = self.context();
                s.keep(self, context, linear);
            }
            self.stubborn = Some(s);
        }
    }

    fn pieces(
        &mut self,
        linear: u64,
        len: u64,
        access: PageAccess,
        ac: bool,
    ) -> Result<Pieces, Stop> {
        let first = len.min(0x1000 - (linear & 0xfff));
        let mut pieces = vec![(self.translate(linear, access, ac)?, first as usize)];
        if first < len {
            let next = linear.wrapping_add(first);
            if next & 0xffff_ffff == 0 {
                return Err("the end of memory".into());
            }
            match self.translate(next, access, ac) {
                Ok(gpa) => pieces.push((gpa, (len - first) as usize)),
                Err(Stop::Fault { .. })
                    if self.avoid.torn_writes && access.kind == AccessKind::Write =>
                {
                    return Err("half a write".into());
                }
                Err(stop) => return Err(stop),
            }
        }
        Ok(pieces)
    }

    fn load(&self, pieces: &Pieces) -> Result<u64, Stop> {
        let mut raw = [0; 8];
        let mut n = 0;
        for (gpa, len) in pieces {
            let bytes = self.memory.bytes(*gpa, *len).ok_or("outside")?;
            raw[n..n + len].copy_from_slice(bytes);
            n += len;
        }
        Ok(u64::from_le_bytes(raw))
    }

    fn store(&mut self, pieces: &Pieces, data: &[u8]) -> Result<(), Stop> {
        let mut n = 0;
        let entry = self.format.entry();
        for (gpa, len) in pieces {
            let root = pool_index(*gpa).is_some_and(|i| i < ROOTS);
            if root && gpa & 0xfff < entry {
                return Err("the dispatcher's entry".into());
            }
            if !self.memory.write(*gpa, &data[n..n + len]) {
                return Err("outside of the pool".into());
            }
            n += len;
        }
        self.refresh();
        Ok(())
    }

    /// Does one operation; says what it must see.
    ///
    /// # Errors
    ///
    /// Why programs must not do it here. The model is in no defined state then.
    pub fn step(&mut self, op: &Op) -> Result<Expect, Reject> {
        #[cfg(test)]
        let before = self.stubborn.is_some().then(|| self.clone());
        let r = match *op {
            Op::Mem {
                insn,
                addr,
                regs,
                user,
                ac,
            } => self.memory_op(insn, addr, regs, user, ac),
            Op::Fetch { addr, user } => self.fetch(addr, user),
            Op::Lar { offset, user } => self.lar(offset, user),
            Op::Interrupt { stack, user, flags } => self.interrupt(stack, user, flags),
            Op::Invlpg(addr) => {
                self.tlb.invlpg(self.context(), &self.pages, addr);
                self.done(Insn::Invlpg, false)
            }
            Op::Invpcid { kind, pcid, addr } => self.invpcid(kind, pcid, addr),
            Op::Cr0(v) => self.set_cr0(v),
            Op::Cr3(v) => self.set_cr3(v),
            Op::Cr4(v) => self.set_cr4(v),
            Op::Efer(v) => {
                if v & cr::NXE != 0 && !self.features.nx {
                    return Err("no NX");
                }
                self.efer = v;
                self.done(Insn::Wrmsr, false)
            }
            Op::Leave => self.done(Insn::End, false),
            Op::Pkru(v) => {
                // Key 0 is the dispatcher's.
                if self.cr4 & PKE == 0 || v & 3 != 0 {
                    return Err("no PKE");
                }
                self.pkru = v;
                self.done(Insn::Wrpkru, false)
            }
        };
        self.refresh();
        #[cfg(test)]
        if let (Some(before), Some(s), Ok(Expect { vector: DONE, .. })) =
            (before, &mut self.stubborn, &r)
        {
            s.invalidate(&before, op);
        }
        match r {
            Ok(e) => Ok(e),
            Err(Stop::Reject(why)) => Err(why),
            Err(Stop::Fault { error, cr2 }) => Ok(Expect {
                vector: 14,
                error: error.into(),
                cr2,
                rip: Some(match *op {
                    Op::Mem { insn, user, .. } => insn.address(user),
                    Op::Fetch { addr, .. } => addr,
                    Op::Lar { user, .. } => Insn::Lar.address(user),
                    Op::Interrupt { user, .. } => Insn::Interrupt.address(user),
                    _ => 0,
                }),
                ..Expect::default()
            }),
        }
    }

    fn done(&self, insn: Insn, user: bool) -> Result<Expect, Stop> {
        Ok(Expect {
            vector: DONE,
            rip: Some(insn.end(user, self.long())),
            ..Expect::default()
        })
    }

    fn invpcid(&mut self, kind: u64, pcid: u64, addr: u64) -> Result<Expect, Stop> {
        let pcids = self.cr4 & PCIDE != 0;
        if !self.features.invpcid || pcid > 0xfff || (pcid != 0 && !pcids) {
            return Err("no INVPCID".into());
        }
        let context = pcid as u16;
        match kind {
            0 => self.tlb.invalidate_one(context, &self.pages, addr),
            1 => self.tlb.flush_context(context),
            2 => self.tlb.flush_all(),
            3 => self.tlb.flush_contexts(),
            _ => return Err("no such type".into()),
        }
        self.done(Insn::Invpcid, false)
    }

    fn gp(&self, insn: Insn) -> Result<Expect, Stop> {
        Ok(Expect {
            vector: 13,
            rip: Some(insn.address(false)),
            ..Expect::default()
        })
    }

    fn memory_op(
        &mut self,
        insn: Insn,
        addr: u64,
        regs: Regs,
        user: bool,
        ac: bool,
    ) -> Result<Expect, Stop> {
        if !self.long() && !insn.in_32_bits() {
            return Err("not in 32 bits".into());
        }
        if insn == Insn::Push8 && self.keys_count() {
            return Err("keys on the stack".into());
        }
        let mut r = regs;
        let ended = match insn {
            Insn::Stos4 | Insn::Stos8 | Insn::Movs4 | Insn::Movs8 => {
                self.strings(insn, addr, &mut r, user, ac)
            }
            _ => self.single(insn, addr, &mut r, user, ac).map(Some),
        };
        let (fault, zf) = match ended {
            Ok(zf) => (None, zf.flatten()),
            Err(Stop::Fault { error, cr2 }) => (Some((error, cr2)), None),
            Err(stop) => return Err(stop),
        };
        let mask = if self.long() { u64::MAX } else { 0xffff_ffff };
        let seen = Expect {
            a: Some((r.a & mask, mask)),
            c: Some(r.c & mask),
            d: Some(r.d & mask),
            zf,
            ..self.done(insn, user)?
        };
        Ok(match fault {
            None => seen,
            Some((error, cr2)) => Expect {
                vector: 14,
                error: error.into(),
                cr2,
                rip: Some(insn.address(user)),
                ..seen
            },
        })
    }

    fn strings(
        &mut self,
        insn: Insn,
        addr: u64,
        r: &mut Regs,
        user: bool,
        ac: bool,
    ) -> Result<Option<Option<bool>>, Stop> {
        let size = insn.size();
        let copies = matches!(insn, Insn::Movs4 | Insn::Movs8);
        let mut di = addr;
        let cpl = if user { 3 } else { 0 };
        while r.c != 0 {
            let mut value = r.a;
            let mut source = Vec::new();
            if copies {
                let read = PageAccess::explicit(AccessKind::Read, cpl);
                source = self.pieces(r.si, size, read, ac)?;
                value = self.load(&source)?;
            }
            let write = PageAccess::explicit(AccessKind::Write, cpl);
            let pieces = self.pieces(di, size, write, ac)?;
            if self.avoid.marks_first && copies && self.load(&source)? != value {
                return Err("a copy of what the copying marks".into());
            }
            self.store(&pieces, &value.to_le_bytes()[..size as usize])?;
            r.c -= 1;
            di = di.wrapping_add(size);
            if copies {
                r.si = r.si.wrapping_add(size);
            }
        }
        Ok(None)
    }

    fn single(
        &mut self,
        insn: Insn,
        addr: u64,
        r: &mut Regs,
        user: bool,
        ac: bool,
    ) -> Result<Option<bool>, Stop> {
        let size = insn.size();
        if size == 0 {
            return Err("no instruction on memory".into());
        }
        let kind = if insn.reads_only() {
            AccessKind::Read
        } else {
            AccessKind::Write
        };
        let access = PageAccess::explicit(kind, if user { 3 } else { 0 });
        let pieces = self.pieces(addr, size, access, ac)?;
        let old = self.load(&pieces)?;
        let low = r.a & 0xffff_ffff;
        let (new, a, zf) = match insn {
            Insn::Read1 => (None, (r.a & !0xff) | old, None),
            Insn::Read2 => (None, (r.a & !0xffff) | old, None),
            Insn::Read4 | Insn::Read8 => (None, old, None),
            Insn::Xchg4 | Insn::Xchg8 => (Some(r.a), old, None),
            Insn::And4 | Insn::And8 | Insn::Clear4 => (Some(old & r.a), r.a, None),
            Insn::Or1 | Insn::Or4 => (Some(old | r.a), r.a, None),
            Insn::Xadd4 => (Some(old.wrapping_add(r.a)), old, None),
            Insn::CmpXchg4 if old == low => (Some(r.d), r.a, Some(true)),
            Insn::CmpXchg4 => (Some(old), old, Some(false)),
            Insn::CmpXchg8b => {
                if old == (low | (r.d << 32)) {
                    let new = (r.b & 0xffff_ffff) | (r.c << 32);
                    (Some(new), r.a, Some(true))
                } else {
                    r.d = old >> 32;
                    (Some(old), old & 0xffff_ffff, Some(false))
                }
            }
            _ => (Some(r.a), r.a, None),
        };
        r.a = a;
        if let Some(new) = new {
            self.store(&pieces, &new.to_le_bytes()[..size as usize])?;
        }
        Ok(zf)
    }

    /// A linear address at which a place of the pool always is.
    #[must_use]
    pub fn lasting(&self, gpa: u64) -> Option<u64> {
        if self.paging_on() {
            let shown = self.format != Format::Bits32 || gpa < at::HIGH;
            pool_index(gpa)
                .filter(|_| shown)
                .map(|i| at::alias(i) | (gpa & 0xfff))
        } else {
            Some(gpa)
        }
    }

    /// The code at an address: MOV AL with a number, and INT 0x80.
    fn fetch(&mut self, addr: u64, user: bool) -> Result<Expect, Stop> {
        let access = PageAccess::explicit(AccessKind::Fetch, if user { 3 } else { 0 });
        let offset = addr & 0xfff;
        let first = match offset {
            0xfff => 1,
            0xffd.. => return Err("across pages".into()),
            _ => 4,
        };
        let gpa = self.translate(addr, access, false)?;
        let mut bytes = self.memory.bytes(gpa, first).ok_or("outside")?.to_vec();
        if first == 1 {
            if bytes[0] != 0xb0 {
                return Err("no code there".into());
            }
            let next = self.translate(addr.wrapping_add(1), access, false)?;
            bytes.extend_from_slice(self.memory.bytes(next, 3).ok_or("outside")?);
        }
        if bytes[0] != 0xb0 || bytes[2..] != [0xcd, DONE] {
            return Err("no code there".into());
        }
        Ok(Expect {
            vector: DONE,
            rip: Some(addr.wrapping_add(4)),
            a: Some((bytes[1].into(), u64::MAX)),
            ..Expect::default()
        })
    }

    fn lar(&mut self, offset: u16, user: bool) -> Result<Expect, Stop> {
        let offset = u64::from(offset & 0xff8);
        let access = PageAccess::implicit(AccessKind::Read);
        let gpa = self.translate(self.ldt + offset, access, false)?;
        let d = self.memory.number(gpa, 8).ok_or("outside")?;
        if d & (1 << 44) == 0 {
            return Err("a system descriptor".into());
        }
        let conforming = (d >> 42) & 3 == 3;
        let visible = !user || conforming || (d >> 45) & 3 == 3;
        Ok(Expect {
            a: Some(if visible {
                ((d >> 32) & 0x00f0_ff00, 0x00f0_ff00)
            } else {
                (0, u64::MAX)
            }),
            zf: Some(visible),
            ..self.done(Insn::Lar, user)?
        })
    }

    fn interrupt(&mut self, stack: u64, user: bool, flags: u64) -> Result<Expect, Stop> {
        let long = self.long();
        let (unit, top) = if long {
            (8, stack & !15)
        } else {
            (4, stack & !3)
        };
        let frame = [
            code::ss(user),
            code::sp(user),
            code::flags(false),
            code::cs(user),
            // Behind the first of the two INTs.
            Insn::Interrupt.address(user) + 2,
        ];
        let bottom = top.wrapping_sub(unit * 5);
        if self.keys_count() {
            return Err("keys on the stack".into());
        }
        if top != stack || bottom & !0xfff != top.wrapping_sub(1) & !0xfff || !(long || user) {
            return Err("no such stack".into());
        }
        let access = PageAccess::implicit(AccessKind::Write);
        let highest = top - unit;
        let certain = self.certain(highest);
        let gpa = match self.translate(highest, access, false) {
            Ok(gpa) if long || certain => gpa,
            Err(Stop::Fault { .. }) if !long => return Err("a double fault".into()),
            Ok(_) => return Err("perhaps a double fault".into()),
            Err(stop) => return Err(stop),
        };
        if self.avoid.frames_on_tables && pool_index(gpa).is_some_and(|i| self.tables[i]) {
            return Err("a frame on a table".into());
        }
        if self.lasting(gpa - unit * 2) != Some(flags) {
            return Err("flags elsewhere".into());
        }
        for (i, value) in (0u64..).zip(frame) {
            if self.stale(highest) {
                return Err("stale".into());
            }
            let piece = vec![(gpa - unit * i, unit as usize)];
            self.store(&piece, &value.to_le_bytes()[..unit as usize])?;
        }
        Ok(Expect {
            vector: INTERRUPT,
            ..Expect::default()
        })
    }
}
