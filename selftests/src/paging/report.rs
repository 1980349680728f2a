// SPDX-License-Identifier: GPL-2.0

//! What went wrong in a program, for people.

use super::code::Record;
use super::exec::Ran;
use super::generate::Outcome;
use super::layout::{alias, POOL};
use super::memory::PAGE;
use super::model::{Expect, Model};
use super::op::{Op, Program};
use crate::machine::Exit;
use std::fmt::Write;

/// The first thing in which a program came out otherwise than it must.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// It did not come to its end.
    Exit,
    /// An operation saw something else.
    Record(usize),
    /// A byte of the pool is another: page and offset.
    Memory(usize, usize),
    /// The dispatcher's tables changed: the page.
    Own(u64),
    /// The host complained of something.
    Host,
}

/// Compares what came of a program with what must.
#[must_use]
pub fn compare(want: &Outcome, got: &Ran) -> Option<Difference> {
    let first = want
        .seen
        .iter()
        .zip(&got.records)
        .position(|(e, r)| !e.matches(r));
    let ended = got.exit == Some(Exit::Hlt) && got.begun == want.seen.len() + 1;
    match first {
        Some(i) if ended || i + 1 < got.begun => return Some(Difference::Record(i)),
        _ if !ended => return Some(Difference::Exit),
        _ => {}
    }
    for (i, page) in got.pool.iter().enumerate() {
        let right = want.last.memory.page(i);
        if let Some(offset) = (0..PAGE).find(|o| page[*o] != right[*o]) {
            return Some(Difference::Memory(i, offset));
        }
    }
    if got.complaint.is_some() {
        return Some(Difference::Host);
    }
    got.broken.map(Difference::Own)
}

fn expected(e: &Expect) -> String {
    let mut s = match e.vector {
        14 => format!("#PF error {:#x} cr2 {:#x}", e.error, e.cr2),
        13 => format!("#GP error {:#x}", e.error),
        _ => "done".into(),
    };
    for (name, value) in [
        ("rip", e.rip),
        ("a", e.a.map(|a| a.0)),
        ("c", e.c),
        ("d", e.d),
    ] {
        if let Some(v) = value {
            let _ = write!(s, " {name}={v:#x}");
        }
    }
    if let Some(zf) = e.zf {
        let _ = write!(s, " zf={}", u8::from(zf));
    }
    s
}

fn seen(r: &Record) -> String {
    let what = match r.vector {
        0 => "nothing".into(),
        14 => format!("#PF error {:#x} cr2 {:#x}", r.error, r.cr2),
        0x80 | 0x81 => "done".into(),
        v => format!("vector {v} error {:#x}", r.error),
    };
    format!(
        "{what} rip={:#x} cs={:#x} a={:#x} c={:#x} d={:#x} flags={:#x}",
        r.rip, r.cs, r.a, r.c, r.d, r.flags
    )
}

/// The linear addresses that an operation accesses.
fn addresses(op: &Op, m: &Model) -> Vec<u64> {
    match *op {
        Op::Mem { addr, regs, .. } if regs.si != 0 => vec![addr, regs.si],
        Op::Mem { addr, .. } | Op::Fetch { addr, .. } => vec![addr],
        Op::Lar { offset, .. } => vec![m.ldt() + u64::from(offset)],
        Op::Interrupt { stack, .. } => vec![stack - 8],
        _ => vec![],
    }
}

/// A name for a guest-physical address.
fn named(gpa: u64) -> String {
    match super::layout::pool_index(gpa) {
        Some(i) => format!("{gpa:#x} (page {i})"),
        None => format!("{gpa:#x}"),
    }
}

/// The walk of an address, as the model has it.
fn walk(m: &mut Model, linear: u64) -> String {
    if !m.paging_on() {
        return format!("{linear:#x}: paging is off");
    }
    let (trace, t) = m.probe(linear);
    let mut s = format!("{linear:#x}:");
    for (gpa, value) in &trace.path[..trace.depth] {
        let _ = write!(s, " [{}] = {value:#x},", named(*gpa));
    }
    match t {
        Some(t) => {
            let _ = write!(s, " leads to {} by 2^{} bytes", named(t.gpa), t.page_shift);
        }
        None => s.push_str(" leads nowhere"),
    }
    s
}

/// The whole story of a program that came out wrong.
#[must_use]
pub fn explain(program: &Program, want: &Outcome, got: &Ran, difference: &Difference) -> String {
    let setup = &program.setup;
    let mut s = format!(
        "seed {} {:?}: cr0 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} ldt {:#x}\n{:?}\n",
        program.seed,
        setup.format,
        setup.cr0,
        setup.cr3,
        setup.cr4,
        setup.efer,
        setup.ldt,
        setup.features
    );
    let mut last = match difference {
        Difference::Record(i) => *i,
        Difference::Exit => got.begun.saturating_sub(1),
        _ => program.ops.len(),
    };
    last = last.min(program.ops.len().saturating_sub(1));
    let mut model = Model::new(setup);
    for (i, op) in program.ops.iter().enumerate().take(last + 1) {
        let _ = writeln!(s, "{i:3}: {op}");
        for addr in addresses(op, &model) {
            if i == last || model.tracked(addr).is_some() {
                let _ = writeln!(s, "       {}", walk(&mut model, addr));
            }
        }
        let _ = writeln!(
            s,
            "       must be: {}",
            want.seen.get(i).map_or(String::new(), expected)
        );
        if want
            .seen
            .get(i)
            .zip(got.records.get(i))
            .is_some_and(|(e, r)| !e.matches(r))
        {
            let _ = writeln!(s, "       but is:  {}", seen(&got.records[i]));
        }
        let _ = model.step(op);
    }
    for (i, gpa) in POOL.iter().enumerate().filter(|(i, _)| {
        setup.pool[*i] != want.last.memory.page(*i) || got.pool[*i] != want.last.memory.page(*i)
    }) {
        let _ = writeln!(s, "page {i} is at {gpa:#x}, shown at {:#x}", alias(i));
    }
    match difference {
        Difference::Exit => {
            let _ = writeln!(
                s,
                "the guest left with {:x?} in operation {} of {}\n{}",
                got.exit,
                got.begun.wrapping_sub(1),
                program.ops.len(),
                got.registers
            );
        }
        Difference::Record(i) => {
            let _ = writeln!(s, "operation {i} differs");
        }
        Difference::Host => {
            let _ = writeln!(s, "{}", got.complaint.as_deref().unwrap_or(""));
        }
        Difference::Memory(..) => memory(&mut s, program, want, got),
        Difference::Own(gpa) => {
            let _ = writeln!(s, "the dispatcher's table at {gpa:#x} was changed");
        }
    }
    s
}

fn memory(s: &mut String, program: &Program, want: &Outcome, got: &Ran) {
    let size = program.setup.format.entry() as usize;
    let mut left = 12;
    for (i, page) in got.pool.iter().enumerate() {
        let right = want.last.memory.page(i);
        for o in (0..PAGE).step_by(size) {
            if page[o..o + size] != right[o..o + size] && left > 0 {
                left -= 1;
                let number = |b: &[u8]| {
                    b[o..o + size]
                        .iter()
                        .rev()
                        .fold(0, |n, b| (n << 8) | u64::from(*b))
                };
                let _ = writeln!(
                    s,
                    "in the end {:#x} (page {i} offset {o:#x}, entry {:#x}) is {:#x}, must be {:#x}; it began as {:#x}",
                    POOL[i] + o as u64,
                    o / size,
                    number(page),
                    number(right),
                    number(&program.setup.pool[i])
                );
            }
        }
    }
}
