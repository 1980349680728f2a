// SPDX-License-Identifier: GPL-2.0

//! What a processor may still have cached, by the rules of the SDM (volume 3, 5.10), and so what a program may
//! not access before it invalidates.
//!
//! For each linear page that programs use, and for each context (PCID), there are the walks whose results the
//! processor could have cached since that was last invalidated: whole translations, and the entries of upper
//! tables. A processor caches nothing of an entry that is not present, has a reserved bit set, or has its
//! accessed bit clear. Rights that were only extended do no harm: an access that they forbid faults, and that
//! invalidates.

use std::collections::BTreeMap;

const W: u64 = 2;
const A: u64 = 0x20;
const D: u64 = 0x40;
const G: u64 = 0x100;
const NX: u64 = 1 << 63;
/// Bits that programs may change at will: those that software has, and the memory type, but for bit 7.
const IGNORED: u64 = 0xe00 | (0x7f << 52) | 0x18;

/// What a walk came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trace {
    /// The entries: address and value.
    pub path: [(u64, u64); 4],
    /// How many.
    pub depth: usize,
    /// Whether the last maps a page; if not, it is not present or has reserved bits set.
    pub maps: bool,
    /// The base-two logarithm of the page's size.
    pub shift: u8,
    /// Whether the first is the entry of a table of four, which has no accessed bit.
    pub four: bool,
}

impl Trace {
    fn cacheable(&self, i: usize) -> bool {
        let valid = i + 1 < self.depth || self.maps;
        valid && (self.path[i].1 & A != 0 || (self.four && i == 0))
    }

    fn accessed(&self) -> bool {
        self.maps && (0..self.depth).all(|i| self.cacheable(i))
    }

    fn global(&self) -> bool {
        self.accessed() && self.path[self.depth - 1].1 & G != 0
    }

    fn leaf(&self, i: usize) -> bool {
        self.maps && i + 1 == self.depth
    }

    /// Whether what was cached by `self` can change what an access does whose walk is now `now`.
    fn harms(&self, now: &Trace) -> bool {
        for i in 0..self.depth {
            if !self.cacheable(i) {
                return false;
            }
            let ((at, old), (now_at, new)) = (self.path[i], now.path[i]);
            let valid = i < now.depth && (i + 1 < now.depth || now.maps);
            if at != now_at || !valid || self.leaf(i) != now.leaf(i) {
                return true;
            }
            if !extends(old, new, self.leaf(i)) {
                return true;
            }
        }
        false
    }

    /// Whether this global translation can change what an access does whose walk, perhaps from another root, is now
    /// `now`.
    fn harms_as_global(&self, now: &Trace) -> bool {
        if !now.accessed() || self.shift != now.shift {
            return true;
        }
        let (mine, its) = (self.path[self.depth - 1], now.path[now.depth - 1]);
        mine.0 != its.0 || !extends(mine.1, its.1, true) || self.rights() != now.rights()
    }

    fn rights(&self) -> (u64, u64) {
        let entries = &self.path[usize::from(self.four)..self.depth];
        entries
            .iter()
            .fold((6, 0), |(all, any), e| (all & e.1, any | (e.1 & NX)))
    }

    /// Whether `self` differs from `old` by accessed and dirty bits that were set, if at all.
    fn includes(&self, old: &Trace) -> bool {
        self.depth == old.depth
            && self.maps == old.maps
            && self.shift == old.shift
            && (0..self.depth).all(|i| {
                let ((a, new), (b, old)) = (self.path[i], old.path[i]);
                a == b && (new ^ old) & !(A | D) == 0 && old & (A | D) & !new == 0
            })
    }
}

/// Whether an entry that was `old` and is `new` gives the same translation, with more rights if not the same ones.
fn extends(old: u64, new: u64, leaf: bool) -> bool {
    let diff = (old ^ new) & !(IGNORED | G);
    let gone = if leaf { A | D } else { A };
    diff & !(A | D | W | NX) == 0
        && old & gone & !new == 0
        && old & W & !new == 0
        && new & NX & !old == 0
}

/// What may be cached for one page.
#[derive(Debug, Clone, Default)]
struct Cached {
    now: Option<Trace>,
    old: Vec<Trace>,
}

/// What may be cached.
#[derive(Debug, Clone, Default)]
pub struct Tlb {
    contexts: BTreeMap<u16, Vec<Cached>>,
    global: Vec<Vec<Trace>>,
}

impl Tlb {
    /// Nothing cached, for so many pages.
    #[must_use]
    pub fn new(pages: usize) -> Self {
        Tlb {
            contexts: BTreeMap::new(),
            global: vec![Vec::new(); pages],
        }
    }

    /// The walks of all pages are now these, in this context.
    pub fn update(&mut self, context: u16, traces: &[Trace], globals: bool) {
        let known = self.contexts.entry(context).or_default();
        known.resize(traces.len(), Cached::default());
        for (i, (c, t)) in known.iter_mut().zip(traces).enumerate() {
            if let Some(now) = c.now.filter(|now| now != t) {
                if !t.includes(&now) && now.cacheable(0) && !c.old.contains(&now) {
                    c.old.push(now);
                }
            }
            c.now = Some(*t);
            if globals && t.global() {
                let g = &mut self.global[i];
                g.retain(|old| !t.includes(old));
                g.push(*t);
            }
        }
    }

    /// Whether something cached can change an access to page `i`.
    #[must_use]
    pub fn harms(&self, context: u16, i: usize) -> bool {
        let Some((c, now)) = self.page(context, i) else {
            return false;
        };
        c.old.iter().any(|t| t.harms(&now))
            || self.global[i].iter().any(|t| t.harms_as_global(&now))
    }

    /// Whether nothing but the present walk is cached for page `i`: an access takes no spurious fault.
    #[must_use]
    pub fn clean(&self, context: u16, i: usize) -> bool {
        let Some((c, now)) = self.page(context, i) else {
            return false;
        };
        c.old.is_empty() && self.global[i].iter().all(|g| now.includes(g))
    }

    fn page(&self, context: u16, i: usize) -> Option<(&Cached, Trace)> {
        let c = self.contexts.get(&context)?.get(i)?;
        Some((c, c.now?))
    }

    /// Everything is invalidated.
    pub fn flush_all(&mut self) {
        self.contexts.clear();
        self.global.iter_mut().for_each(Vec::clear);
    }

    /// Everything but global translations, in all contexts.
    pub fn flush_contexts(&mut self) {
        self.contexts.clear();
    }

    /// Everything but global translations, in one context.
    pub fn flush_context(&mut self, context: u16) {
        self.contexts.remove(&context);
    }

    /// INVLPG of `addr` in the present context: global translations too, and all upper entries.
    pub fn invlpg(&mut self, context: u16, pages: &[u64], addr: u64) {
        let Some(known) = self.contexts.get_mut(&context) else {
            return;
        };
        for (i, c) in known.iter_mut().enumerate() {
            let sizes = c.old.iter().chain(&self.global[i]).chain(&c.now);
            let shift = sizes.filter(|t| t.maps).map(|t| t.shift).min();
            let within = shift.is_some_and(|s| addr >> s == pages[i] >> s);
            if within || addr >> 12 == pages[i] >> 12 {
                c.old.clear();
                self.global[i].clear();
            } else {
                c.old.retain(|t| t.maps);
            }
        }
    }

    /// INVPCID of one address: no global translation.
    pub fn invalidate_one(&mut self, context: u16, pages: &[u64], addr: u64) {
        let Some(known) = self.contexts.get_mut(&context) else {
            return;
        };
        for (c, page) in known.iter_mut().zip(pages) {
            if addr >> 12 == page >> 12 {
                *c = Cached::default();
            }
        }
    }
}
