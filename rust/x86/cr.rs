// SPDX-License-Identifier: GPL-2.0

//! What may be loaded into control registers, EFER, XCR0 and debug registers, and what a load brings with it.
//!
//! The checks are those of the instructions (SDM vol. 3, 2.5, 4.1, 5.10, 19.2; vol. 2, MOV to CR). The privilege level was
//! checked before an instruction exits. A VMM that sets registers through KVM_SET_SREGS can go where no instruction
//! could; for it there is [`sregs_are_valid`].

use super::cpuid::features::Features;
use super::cpuid::features::GuestFeatures;
use super::exception::Fault;
use super::regs::Cr0;
use super::regs::Cr3;
use super::regs::Cr4;
use super::regs::Dr6;
use super::regs::Dr7;
use super::regs::Efer;
use super::regs::Xcr0;
use super::segment::is_canonical;
use super::segment::SegAttr;

const GP: Fault = Fault::gp(0);

/// What goes with a change of a control register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Consequences {
    /// The guest expects its TLB entries to be gone, global ones too.
    pub flush_tlb: bool,
    /// The four entries of PAE paging are to be loaded from memory; #GP(0) and no change if one has a reserved bit.
    pub load_pdptes: bool,
    /// CPUID changes (OSXSAVE, OSPKE).
    pub update_cpuid: bool,
}

/// A change of CR0 that is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cr0Change {
    /// The new value, with bits fixed as the processor does.
    pub cr0: Cr0,
    /// EFER with LMA as it becomes.
    pub efer: Efer,
    /// What goes with it.
    pub consequences: Consequences,
}

/// Checks MOV to CR0 (and what LMSW and CLTS make of it). `cs` is the code segment.
///
/// # Errors
///
/// #GP(0).
pub fn check_cr0(
    old: Cr0,
    new: Cr0,
    cr4: Cr4,
    efer: Efer,
    cs: SegAttr,
) -> Result<Cr0Change, Fault> {
    if new.bits() >> 32 != 0 {
        return Err(GP);
    }
    // The reserved bits of the low half are ignored.
    let new = new.and(Cr0::NAMED).with(Cr0::ET);
    if new.has(Cr0::NW) && !new.has(Cr0::CD) {
        return Err(GP);
    }
    if new.has(Cr0::PG) && !new.has(Cr0::PE) {
        return Err(GP);
    }
    if cr4.has(Cr4::CET) && !new.has(Cr0::WP) {
        return Err(GP);
    }
    let changed = old.diff(new);
    let mut efer = efer;
    if changed.has(Cr0::PG) {
        if new.has(Cr0::PG) {
            if efer.has(Efer::LME) {
                if !cr4.has(Cr4::PAE) || cs.l() {
                    return Err(GP);
                }
                efer = efer.with(Efer::LMA);
            }
        } else {
            let in_64bit = efer.has(Efer::LMA) && cs.l();
            if in_64bit || cr4.has(Cr4::PCIDE) {
                return Err(GP);
            }
            efer = efer.without(Efer::LMA);
        }
    }
    let pae = new.has(Cr0::PG) && cr4.has(Cr4::PAE) && !efer.has(Efer::LMA);
    Ok(Cr0Change {
        cr0: new,
        efer,
        consequences: Consequences {
            flush_tlb: changed.has_any(Cr0::PG | Cr0::WP),
            load_pdptes: pae && changed.has_any(Cr0::PG | Cr0::CD | Cr0::NW),
            update_cpuid: false,
        },
    })
}

/// CR0 after LMSW: the low four bits are loaded, but PE cannot be cleared. To be passed to [`check_cr0`].
#[must_use]
pub const fn lmsw(cr0: Cr0, source: u16) -> Cr0 {
    let loaded = (source & 0xf) as u64;
    Cr0::new(cr0.bits() & !0xe | loaded)
}

/// CR0 after CLTS. It needs no check.
#[must_use]
pub const fn clts(cr0: Cr0) -> Cr0 {
    cr0.without(Cr0::TS)
}

/// Checks MOV to CR3. Returns the value to load and whether the TLB entries of its context go.
///
/// # Errors
///
/// #GP(0).
pub fn check_cr3(
    value: u64,
    cr4: Cr4,
    efer: Efer,
    features: &GuestFeatures,
) -> Result<(Cr3, bool), Fault> {
    let mut value = value;
    let mut flush = true;
    if cr4.has(Cr4::PCIDE) {
        flush = value & Cr3::NOFLUSH == 0;
        value &= !Cr3::NOFLUSH;
    }
    // Outside long mode the instruction has 32 bits to load.
    if efer.has(Efer::LMA) && value & features.reserved_gpa_bits() != 0 {
        return Err(GP);
    }
    Ok((Cr3::new(value), flush))
}

/// Whether the four entries that PAE paging loads with CR3 are valid (SDM vol. 3, 5.4.1).
#[must_use]
pub fn pdptes_are_valid(entries: &[u64; 4], features: &GuestFeatures) -> bool {
    let reserved = features.reserved_gpa_bits() | 0x1e6;
    entries
        .iter()
        .all(|entry| entry & 1 == 0 || entry & reserved == 0)
}

/// Checks MOV to CR4.
///
/// # Errors
///
/// #GP(0).
pub fn check_cr4(
    old: Cr4,
    new: Cr4,
    cr0: Cr0,
    cr3: Cr3,
    efer: Efer,
    features: &GuestFeatures,
) -> Result<Consequences, Fault> {
    if !new.without(features.cr4_allowed()).is_empty() {
        return Err(GP);
    }
    let changed = old.diff(new);
    let long = efer.has(Efer::LMA);
    if long && (!new.has(Cr4::PAE) || changed.has(Cr4::LA57)) {
        return Err(GP);
    }
    if changed.has(Cr4::PCIDE) && new.has(Cr4::PCIDE) && !(long && cr3.pcid() == 0) {
        return Err(GP);
    }
    if new.has(Cr4::CET) && !cr0.has(Cr0::WP) {
        return Err(GP);
    }
    let paging = cr0.has(Cr0::PG);
    let formats = Cr4::PGE | Cr4::PSE | Cr4::PAE | Cr4::SMEP;
    let flush = changed.has_any(formats)
        || changed.has(Cr4::LA57)
        || (changed.has(Cr4::PCIDE) && old.has(Cr4::PCIDE));
    Ok(Consequences {
        flush_tlb: flush,
        load_pdptes: paging && new.has(Cr4::PAE) && !long && changed.has_any(formats),
        update_cpuid: changed.has_any(Cr4::OSXSAVE | Cr4::PKE),
    })
}

/// Checks MOV to CR8: a task priority is four bits. Returns it.
///
/// # Errors
///
/// #GP(0).
pub fn check_cr8(value: u64) -> Result<u8, Fault> {
    if value > 15 {
        return Err(GP);
    }
    Ok(value as u8)
}

/// Checks WRMSR to EFER. Returns the value to load: LMA is not for software to change, and keeps its state.
///
/// # Errors
///
/// #GP(0).
pub fn check_efer_write(
    old: Efer,
    new: Efer,
    cr0: Cr0,
    features: &GuestFeatures,
) -> Result<Efer, Fault> {
    if !new.without(features.efer_allowed()).is_empty() {
        return Err(GP);
    }
    if cr0.has(Cr0::PG) && old.diff(new).has(Efer::LME) {
        return Err(GP);
    }
    Ok(new.without(Efer::LMA).with(old.and(Efer::LMA)))
}

/// Checks XSETBV. Returns the new XCR0.
///
/// # Errors
///
/// #GP(0) for a register that does not exist or a set of components that do not go together (SDM vol. 1, 13.3).
pub fn check_xsetbv(index: u32, value: u64, features: &GuestFeatures) -> Result<Xcr0, Fault> {
    let xcr0 = Xcr0::new(value);
    if index != 0 || !xcr0_is_valid(xcr0, features) {
        return Err(GP);
    }
    Ok(xcr0)
}

/// Whether XCR0 may have this value, for XSETBV and KVM_SET_XCRS.
#[must_use]
pub fn xcr0_is_valid(xcr0: Xcr0, features: &GuestFeatures) -> bool {
    let together = |set: Xcr0| !xcr0.has_any(set) || xcr0.has(set);
    // x87 is always supported, whatever CPUID a VMM has made up.
    xcr0.without(features.xcr0 | Xcr0::X87).is_empty()
        && xcr0.has(Xcr0::X87)
        && (!xcr0.has(Xcr0::AVX) || xcr0.has(Xcr0::SSE))
        && together(Xcr0::MPX)
        && together(Xcr0::AVX512)
        && (!xcr0.has_any(Xcr0::AVX512) || xcr0.has(Xcr0::AVX))
        && together(Xcr0::AMX)
}

/// The debug registers that an instruction can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugReg {
    /// DR0 to DR3, an address; the number is below four.
    Address(u8),
    /// DR6.
    Status,
    /// DR7.
    Control,
}

/// Which register a number in MOV to or from DR means: 4 and 5 are 6 and 7, or nothing with CR4.DE.
///
/// # Errors
///
/// #UD.
pub fn debug_register(number: u8, cr4: Cr4) -> Result<DebugReg, Fault> {
    match number {
        0..=3 => Ok(DebugReg::Address(number)),
        4 | 5 if cr4.has(Cr4::DE) => Err(Fault::UD),
        4 | 6 => Ok(DebugReg::Status),
        5 | 7 => Ok(DebugReg::Control),
        _ => Err(Fault::UD),
    }
}

/// Checks a value for a debug register and returns what the register keeps.
///
/// # Errors
///
/// #GP(0) if the upper half of DR6 or DR7 is not zero.
pub fn check_debug_write(register: DebugReg, value: u64) -> Result<u64, Fault> {
    match register {
        DebugReg::Address(_) => Ok(value),
        DebugReg::Status | DebugReg::Control if value >> 32 != 0 => Err(GP),
        DebugReg::Status => Ok(Dr6::new(value).sanitized().bits()),
        DebugReg::Control => Ok(Dr7::new(value).sanitized().bits()),
    }
}

/// Whether a VMM may set these registers together (KVM_SET_SREGS): a state that a processor can be in.
#[must_use]
pub fn sregs_are_valid(
    cr0: Cr0,
    cr3: u64,
    cr4: Cr4,
    efer: Efer,
    cs: SegAttr,
    features: &GuestFeatures,
) -> bool {
    if cr0.bits() >> 32 != 0
        || (cr0.has(Cr0::NW) && !cr0.has(Cr0::CD))
        || (cr0.has(Cr0::PG) && !cr0.has(Cr0::PE))
        || !cr4.without(features.cr4_allowed()).is_empty()
        || !efer.without(features.efer_allowed()).is_empty()
        || (cr4.has(Cr4::CET) && !cr0.has(Cr0::WP))
    {
        return false;
    }
    let long = cr0.has(Cr0::PG) && efer.has(Efer::LME);
    if long {
        // The mode that the bits ask for has to be the one that LMA states.
        cr4.has(Cr4::PAE) && efer.has(Efer::LMA) && cr3 & features.reserved_gpa_bits() == 0
    } else {
        // A 64-bit code segment without long mode is none, and a context identifier has nothing to identify.
        !efer.has(Efer::LMA) && !cs.l() && !cr4.has(Cr4::PCIDE)
    }
}

/// Whether INVPCID takes a type and a descriptor, which it answers with #GP(0) otherwise (SDM vol. 2, INVPCID).
#[must_use]
pub const fn invpcid_is_valid(kind: u64, identifier: u64, linear: u64, cr4: Cr4) -> bool {
    if identifier >> 12 != 0 {
        return false;
    }
    let known = identifier == 0 || cr4.has(Cr4::PCIDE);
    match kind {
        0 => known && is_canonical(linear, cr4.has(Cr4::LA57)),
        1 => known,
        2 | 3 => true,
        _ => false,
    }
}

/// The bits of CR4 that the guest may own, so that its writes to them need no exit: those whose change has no consequence here.
/// `supported` is what the guest has of CPUID; bits it lacks must fault, so they are not owned.
#[must_use]
pub const fn cr4_guest_owned(supported: &GuestFeatures) -> Cr4 {
    Cr4::PVI
        .with(Cr4::TSD)
        .with(Cr4::DE)
        .with(Cr4::PCE)
        .with(Cr4::OSFXSR)
        .with(Cr4::OSXMMEXCPT)
        .with(Cr4::PGE)
        .with_if(Cr4::FSGSBASE, supported.has(Features::FSGSBASE))
}
