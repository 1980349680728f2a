// SPDX-License-Identifier: GPL-2.0

//! Descriptors: found in the GDT or the LDT, taken apart, marked as accessed (SDM vol. 3, 3.4.5 and 3.5).

use super::super::super::exception::Fault;
use super::super::super::paging::GuestMemory;
use super::super::super::segment::SegAttr;
use super::super::super::segment::SegReg;
use super::super::super::segment::Segment;
use super::super::Cpu;
use super::Res;
use super::System;

/// The types of system descriptors. Long mode has but four of them, and those of 32 bits mean 64 there.
pub(super) mod kind {
    pub(crate) const TSS16_AVAILABLE: u8 = 1;
    pub(crate) const LDT: u8 = 2;
    pub(crate) const TSS16_BUSY: u8 = 3;
    pub(crate) const CALL_GATE16: u8 = 4;
    pub(crate) const TASK_GATE: u8 = 5;
    pub(crate) const INTERRUPT_GATE16: u8 = 6;
    pub(crate) const TRAP_GATE16: u8 = 7;
    pub(crate) const TSS_AVAILABLE: u8 = 9;
    pub(crate) const TSS_BUSY: u8 = 11;
    pub(crate) const CALL_GATE: u8 = 12;
    pub(crate) const INTERRUPT_GATE: u8 = 14;
    pub(crate) const TRAP_GATE: u8 = 15;
}

/// The byte of a descriptor that has its type.
const TYPE_BYTE: u64 = 5;

/// A descriptor, as it is in memory.
#[derive(Clone, Copy)]
pub(super) struct Descriptor {
    /// Its linear address.
    pub(super) linear: u64,
    /// The eight bytes that all have.
    pub(super) low: u64,
    /// The eight more of a system descriptor in long mode; zero else.
    pub(super) high: u64,
}

impl Descriptor {
    pub(super) const fn attr(&self) -> SegAttr {
        SegAttr::from_descriptor_high((self.low >> 32) as u32)
    }

    /// The base, 64 bits of it if there are so many.
    pub(super) const fn base(&self) -> u64 {
        (self.low >> 16) & 0xff_ffff | (self.low >> 32) & 0xff00_0000 | (self.high << 32)
    }

    /// The limit in bytes.
    pub(super) const fn limit(&self) -> u32 {
        let raw = (self.low & 0xffff | (self.low >> 32) & 0xf_0000) as u32;
        if self.attr().g() {
            (raw << 12) | 0xfff
        } else {
            raw
        }
    }

    /// What a segment register holds after it was loaded with this.
    pub(super) const fn segment(&self, selector: u16) -> Segment {
        Segment {
            selector,
            base: self.base(),
            limit: self.limit(),
            attr: self.attr(),
        }
    }

    /// Whether it is a system descriptor of this type.
    pub(super) fn is_system(&self, kind: u8) -> bool {
        !self.attr().s() && self.attr().type_() == kind
    }

    /// Whether it is a data segment that can be written.
    pub(super) fn is_writable(&self) -> bool {
        self.attr().s() && self.attr().type_() & 0xa == 2
    }

    /// Whether code can be read or it is data.
    pub(super) fn is_readable(&self) -> bool {
        self.attr().s() && self.attr().type_() & 0xa != 8
    }

    /// Whether it is code that runs with the privilege of who calls it.
    pub(super) fn is_conforming(&self) -> bool {
        self.attr().s() && self.attr().type_() & 0xc == 0xc
    }

    /// The selector in a gate.
    pub(super) const fn gate_selector(&self) -> u16 {
        (self.low >> 16) as u16
    }

    /// The offset in a gate, all 64 bits of it if there are so many.
    pub(super) const fn gate_offset(&self) -> u64 {
        self.low & 0xffff | (self.low >> 32) & 0xffff_0000 | (self.high << 32)
    }

    /// How many parameters a call gate copies.
    pub(super) const fn gate_parameters(&self) -> u8 {
        (self.low >> 32) as u8 & 0x1f
    }

    /// The number of the stack that an interrupt gate of long mode has in the TSS; zero for none.
    pub(super) const fn gate_stack(&self) -> u8 {
        (self.low >> 32) as u8 & 7
    }
}

impl<C: Cpu, M: GuestMemory> System<'_, '_, C, M> {
    /// #GP that names a selector.
    pub(super) fn gp(&self, selector: u16) -> Fault {
        Fault::gp(super::selector_error(selector) | self.ext)
    }

    /// #NP that names a selector.
    pub(super) fn np(&self, selector: u16) -> Fault {
        Fault::np(super::selector_error(selector) | self.ext)
    }

    /// #TS that names a selector.
    pub(super) fn ts(&self, selector: u16) -> Fault {
        Fault::ts(super::selector_error(selector) | self.ext)
    }

    /// #SS that names a selector.
    pub(super) fn ss(&self, selector: u16) -> Fault {
        Fault::ss(super::selector_error(selector) | self.ext)
    }

    /// The descriptor that a selector selects, or none if it is beyond its table. It has eight bytes.
    pub(super) fn descriptor(&mut self, selector: u16) -> Res<Option<Descriptor>, M> {
        let offset = u64::from(selector & 0xfff8);
        let (base, limit) = if selector & 4 != 0 {
            let ldt = self.segment(SegReg::Ldtr);
            if ldt.attr.unusable() {
                return Ok(None);
            }
            (ldt.base, ldt.limit)
        } else {
            let gdt = self.run.cpu.gdtr();
            (gdt.base, gdt.limit.into())
        };
        if offset.saturating_add(7) > u64::from(limit) {
            return Ok(None);
        }
        let linear = base.wrapping_add(offset);
        let low = self.read_system(linear, 8)?;
        Ok(Some(Descriptor {
            linear,
            low,
            high: 0,
        }))
    }

    /// The same descriptor with the eight bytes that follow, if it is a system descriptor and these have more in long mode. None if
    /// they are beyond the table.
    pub(super) fn widened(
        &mut self,
        selector: u16,
        descriptor: Descriptor,
    ) -> Res<Option<Descriptor>, M> {
        if !self.mode.is_long() || descriptor.attr().s() {
            return Ok(Some(descriptor));
        }
        let Some(next) = (selector & 0xfff8).checked_add(8) else {
            return Ok(None);
        };
        let Some(upper) = self.descriptor(next | selector & 4)? else {
            return Ok(None);
        };
        // Where the type of another descriptor would be, there has to be none.
        if (upper.low >> 40) & 0x1f != 0 {
            return Ok(None);
        }
        Ok(Some(Descriptor {
            high: upper.low,
            ..descriptor
        }))
    }

    /// Puts down that the descriptor is marked as accessed, and returns it so. A locked access, as the processor's.
    pub(super) fn accessed(&mut self, descriptor: Descriptor) -> Res<Descriptor, M> {
        self.retype(descriptor, descriptor.attr().type_() | 1)
    }

    /// Puts down that the descriptor has this type, and returns it so.
    pub(super) fn retype(&mut self, descriptor: Descriptor, type_: u8) -> Res<Descriptor, M> {
        let old = (descriptor.low >> 40) as u8;
        let new = old & 0xf0 | type_ & 15;
        if new != old {
            let linear = descriptor.linear.wrapping_add(TYPE_BYTE);
            self.mark(linear, old, new)?;
        }
        Ok(Descriptor {
            low: descriptor.low & !(0xff << 40) | (u64::from(new) << 40),
            ..descriptor
        })
    }
}
