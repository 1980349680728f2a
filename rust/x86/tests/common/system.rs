// SPDX-License-Identifier: GPL-2.0

//! A protected-mode machine for the tests of system instructions: tables in memory, descriptors by name.

use super::exec;
use super::TestCpu;
use super::TestMemory;
use super::CODE;
use super::DONE;
use rkvm_x86::emulate::Outcome;
use rkvm_x86::emulate::TableReg;
use rkvm_x86::exception::Fault;
use rkvm_x86::exception::Vector;
use rkvm_x86::regs::Gpr;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::SegAttr;
use rkvm_x86::segment::SegReg;
use rkvm_x86::segment::Segment;

pub const GDT: u64 = 0x2000;
pub const IDT: u64 = 0x3000;
pub const TSS: u64 = 0x4000;
pub const LDT: u64 = 0x5000;
pub const STACK: u64 = 0x8000;
/// The inner stack that the TSS has.
pub const STACK0: u64 = 0x9000;

/// Selectors of the table that [`Machine::new`] makes.
pub const CODE0: u16 = 0x08;
pub const DATA0: u16 = 0x10;
pub const CODE3: u16 = 0x18 | 3;
pub const DATA3: u16 = 0x20 | 3;
pub const TR: u16 = 0x28;
pub const WIDE0: u16 = 0x38;
pub const WIDE3: u16 = 0x40 | 3;
/// Free for a test: two slots.
pub const SLOT: u16 = 0x50;
pub const OTHER: u16 = 0x60;

/// A descriptor's fields: type with S, privilege level, and so on.
pub fn descriptor(base: u32, limit: u32, access: u8, flags: u8) -> u64 {
    let (base, limit) = (u64::from(base), u64::from(limit));
    limit & 0xffff
        | ((base & 0xff_ffff) << 16)
        | (u64::from(access) << 40)
        | (((limit >> 16) & 15) << 48)
        | (u64::from(flags) << 52)
        | ((base >> 24) << 56)
}

/// A gate's fields.
pub fn gate(selector: u16, offset: u32, access: u8, count: u8) -> u64 {
    u64::from(offset) & 0xffff
        | (u64::from(selector) << 16)
        | (u64::from(count) << 32)
        | (u64::from(access) << 40)
        | ((u64::from(offset) >> 16) << 48)
}

pub const fn flat(access: u8, flags: u8) -> u64 {
    0x000f_0000_0000_ffff | ((access as u64) << 40) | ((flags as u64) << 52)
}

#[derive(Clone)]
pub struct Machine {
    pub cpu: TestCpu,
    pub memory: TestMemory,
}

/// The hidden part that a descriptor brings.
pub fn loaded(selector: u16, low: u64) -> Segment {
    let attr = SegAttr::from_descriptor_high((low >> 32) as u32);
    let limit = (low & 0xffff | (low >> 32) & 0xf_0000) as u32;
    Segment {
        selector,
        base: (low >> 16) & 0xff_ffff | (low >> 32) & 0xff00_0000,
        limit: if attr.g() {
            (limit << 12) | 0xfff
        } else {
            limit
        },
        attr,
    }
}

impl Machine {
    /// 32-bit code at a privilege level.
    pub fn new(cpl: u8) -> Self {
        let mut m = Self {
            cpu: TestCpu::protected(),
            memory: TestMemory::default(),
        };
        m.tables();
        m.at_level(cpl, false);
        m
    }

    /// 64-bit code.
    pub fn long(cpl: u8) -> Self {
        let mut m = Self {
            cpu: TestCpu::long(),
            memory: TestMemory::default(),
        };
        m.tables();
        m.at_level(cpl, true);
        m
    }

    fn tables(&mut self) {
        for (selector, entry) in [
            (CODE0, flat(0x9b, 0xc)),
            (DATA0, flat(0x93, 0xc)),
            (CODE3, flat(0xfb, 0xc)),
            (DATA3, flat(0xf3, 0xc)),
            (TR, descriptor(TSS as u32, 0x67, 0x8b, 0)),
            (WIDE0, flat(0x9b, 0xa)),
            (WIDE3, flat(0xfb, 0xa)),
        ] {
            self.gdt(selector, entry);
        }
        self.cpu.gdtr = TableReg {
            base: GDT,
            limit: 0x7f,
        };
        self.cpu.idtr = TableReg {
            base: IDT,
            limit: 0xfff,
        };
        *self.cpu.seg(SegReg::Tr) = loaded(TR, descriptor(TSS as u32, 0x67, 0x8b, 0));
        *self.cpu.seg(SegReg::Ldtr) = Segment::NULL;
        self.memory.put32(TSS + 4, STACK0 as u32);
        self.memory.put32(TSS + 8, DATA0.into());
        self.memory.put(TSS + 0x66, &[0x68, 0]);
    }

    fn at_level(&mut self, cpl: u8, wide: bool) {
        let (code, data) = match (cpl, wide) {
            (0, false) => (CODE0, DATA0),
            (0, true) => (WIDE0, DATA0),
            (_, false) => (CODE3, DATA3),
            (_, true) => (WIDE3, DATA3),
        };
        *self.cpu.seg(SegReg::Cs) = loaded(code, self.entry(code));
        for reg in [SegReg::Ss, SegReg::Ds, SegReg::Es, SegReg::Fs, SegReg::Gs] {
            *self.cpu.seg(reg) = loaded(data, self.entry(data));
        }
        self.cpu.cpl = cpl;
        self.cpu.gprs.set(Gpr::Rsp, STACK);
    }

    pub fn gdt(&mut self, selector: u16, entry: u64) {
        self.memory.put64(GDT + u64::from(selector & 0xfff8), entry);
    }

    pub fn entry(&self, selector: u16) -> u64 {
        self.memory.get64(GDT + u64::from(selector & 0xfff8))
    }

    pub fn idt(&mut self, vector: u64, entry: u64) {
        self.memory.put64(IDT + vector * 8, entry);
    }

    pub fn with(mut self, r: Gpr, value: u64) -> Self {
        self.cpu.gprs.set(r, value);
        self
    }

    pub fn with_flags(mut self, flags: Rflags) -> Self {
        self.cpu.rflags |= flags;
        self
    }

    /// Executes one instruction, which has to complete.
    pub fn done(&mut self, code: &str) {
        let outcome = self.run(code);
        assert!(
            matches!(outcome, Outcome::Done(c) if c.retired),
            "{code}: {outcome:?}"
        );
    }

    pub fn run(&mut self, code: &str) -> Outcome<super::Lost> {
        let (outcome, bus) = exec(&mut self.cpu, &mut self.memory, code, &[]);
        assert!(bus.is_empty());
        outcome
    }

    /// Executes one instruction, which has to fault, with nothing changed.
    pub fn faults(&self, code: &str, fault: Fault) {
        let mut m = self.clone();
        let outcome = m.run(code);
        assert_eq!(outcome, Outcome::Fault(fault), "{code}");
        let mut before = self.clone();
        before.cpu.rip = CODE;
        before.memory.put(CODE, &super::hex(code));
        assert_eq!(m.cpu, before.cpu, "{code}");
        assert!(m.memory.ram == before.memory.ram, "{code}: memory");
    }

    pub fn sel(&mut self, reg: SegReg) -> u16 {
        self.cpu.seg(reg).selector
    }

    /// The word of 32 bits at an offset from the stack pointer.
    pub fn stack32(&self, n: u64) -> u32 {
        self.memory.get32(self.cpu.get(Gpr::Rsp) + 4 * n)
    }

    pub fn stack64(&self, n: u64) -> u64 {
        self.memory.get64(self.cpu.get(Gpr::Rsp) + 8 * n)
    }
}

/// A fault with an error code.
pub fn error(vector: Vector, code: u16) -> Fault {
    Fault {
        vector,
        error: Some(code.into()),
        cr2: None,
    }
}

pub fn gp(code: u16) -> Fault {
    error(Vector::GP, code)
}
pub fn np(code: u16) -> Fault {
    error(Vector::NP, code)
}
pub fn ss(code: u16) -> Fault {
    error(Vector::SS, code)
}
pub fn ts(code: u16) -> Fault {
    error(Vector::TS, code)
}

pub const RETIRED: Outcome<super::Lost> = DONE;
