// SPDX-License-Identifier: GPL-2.0

//! A vCPU's registers at its start.

use kvm_bindings::kvm_fpu;
use kvm_bindings::kvm_msr_entry;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_segment;
use kvm_bindings::kvm_sregs;
use kvm_bindings::Msrs;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

use super::cpuid::LocalApic;
use crate::boot::Entry;
use crate::boot::Selector;
use crate::boot::GDT_SIZE;
use crate::memory::GDT_ADDR;
use crate::memory::PML4_ADDR;
use crate::memory::STACK_TOP;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_FIXED: u64 = 1 << 1;

/// Bit 11 of `apic_base`: there is a local APIC, and it is enabled.
const APIC_BASE_ENABLE: u64 = 1 << 11;

const MSR_MISC_ENABLE: u32 = 0x1a0;
/// Firmware leaves fast string operations on; Linux takes a clear bit for an erratum.
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;

const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, what no range says is write-back.
const MTRR_ON_WRITE_BACK: u64 = (1 << 11) | 6;

/// Real mode's stack, below where a boot sector is loaded.
const REAL_SP: u64 = 0x7c00;

/// What could not be set.
pub enum Error {
    /// This ioctl failed.
    Ioctl(&'static str, errno::Error),
    /// KVM_SET_MSRS refused this register and value.
    Msr(u32, u64),
}

/// Sets the registers of the processor that starts at `entry`.
///
/// # Errors
/// An ioctl fails.
pub fn set_entry(vcpu: &VcpuFd, entry: &Entry, apic: LocalApic) -> Result<(), Error> {
    let failed = |ioctl| move |errno| Error::Ioctl(ioctl, errno);
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    special(&mut sregs, entry, apic);
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    vcpu.set_regs(&general(entry))
        .map_err(failed("KVM_SET_REGS"))?;
    vcpu.set_fpu(&fpu()).map_err(failed("KVM_SET_FPU"))
}

/// Sets what firmware leaves in model-specific registers, on every processor.
///
/// # Errors
/// An ioctl fails.
pub fn set_msrs(vcpu: &VcpuFd, has_mtrr: bool) -> Result<(), Error> {
    if has_mtrr {
        // Firmware would have set them up; without it a guest finds all memory uncached.
        if !set_msr(vcpu, MSR_MTRR_DEF_TYPE, MTRR_ON_WRITE_BACK)? {
            return Err(Error::Msr(MSR_MTRR_DEF_TYPE, MTRR_ON_WRITE_BACK));
        }
    }
    if let Some(value) = get_msr(vcpu, MSR_MISC_ENABLE)? {
        // Not every processor lets it be set, and no guest depends on it.
        set_msr(vcpu, MSR_MISC_ENABLE, value | MISC_ENABLE_FAST_STRING)?;
    }
    Ok(())
}

fn one_msr(index: u32, data: u64) -> Result<Msrs, Error> {
    Msrs::from_entries(&[kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }])
    .map_err(|_| Error::Msr(index, data))
}

/// Reads an MSR; `None` if the device does not have it.
fn get_msr(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, Error> {
    let mut msrs = one_msr(index, 0)?;
    let done = vcpu
        .get_msrs(&mut msrs)
        .map_err(|errno| Error::Ioctl("KVM_GET_MSRS", errno))?;
    Ok((done == 1).then(|| msrs.as_slice()[0].data))
}

/// Writes an MSR; `false` if the device refuses.
fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) -> Result<bool, Error> {
    let done = vcpu
        .set_msrs(&one_msr(index, data)?)
        .map_err(|errno| Error::Ioctl("KVM_SET_MSRS", errno))?;
    Ok(done == 1)
}

fn general(entry: &Entry) -> kvm_regs {
    let (rip, rsp, rsi) = match *entry {
        Entry::Long { rip, rsi } => (rip, STACK_TOP, rsi),
        Entry::Protected { eip, esi, .. } => (eip.into(), STACK_TOP, esi.into()),
        Entry::Real { ip, .. } => (ip.into(), REAL_SP, 0),
    };
    kvm_regs {
        rip,
        rsp,
        rsi,
        rflags: RFLAGS_FIXED,
        ..Default::default()
    }
}

/// As FNINIT and a reset leave it.
fn fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    }
}

/// Changes what differs from the state after reset, which `sregs` holds.
fn special(sregs: &mut kvm_sregs, entry: &Entry, apic: LocalApic) {
    if apic == LocalApic::None {
        // KVM derives CPUID's APIC bit from this, whatever KVM_SET_CPUID2 said.
        sregs.apic_base &= !APIC_BASE_ENABLE;
    }
    match *entry {
        Entry::Real { cs, .. } => {
            for segment in data_segments(sregs) {
                segment.base = 0;
                segment.selector = 0;
            }
            sregs.cs.selector = cs;
            sregs.cs.base = u64::from(cs) << 4;
        }
        Entry::Protected { code, .. } => {
            flat_segments(sregs, code);
            sregs.cr0 = CR0_PE | CR0_ET | CR0_NE;
        }
        Entry::Long { .. } => {
            flat_segments(sregs, Selector::Code64);
            sregs.cr3 = PML4_ADDR;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
        }
    }
}

fn flat_segments(sregs: &mut kvm_sregs, code: Selector) {
    sregs.cs = code.segment();
    for segment in data_segments(sregs) {
        *segment = Selector::Data.segment();
    }
    sregs.gdt.base = GDT_ADDR;
    sregs.gdt.limit = GDT_SIZE - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
}

fn data_segments(sregs: &mut kvm_sregs) -> [&mut kvm_segment; 5] {
    [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after_reset() -> kvm_sregs {
        let mut sregs = kvm_sregs {
            cr0: 0x6000_0010,
            apic_base: 0xfee0_0900,
            ..Default::default()
        };
        sregs.cs.base = 0xffff_0000;
        sregs.cs.selector = 0xf000;
        sregs
    }

    #[test]
    fn long_mode() {
        let entry = Entry::Long {
            rip: 0x10_0200,
            rsi: 0x7000,
        };
        let mut sregs = after_reset();
        special(&mut sregs, &entry, LocalApic::None);
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
        assert_eq!((sregs.ss.selector, sregs.ds.selector), (0x18, 0x18));
        assert_eq!(sregs.efer, 0x500);
        assert_eq!(sregs.apic_base, 0xfee0_0100, "no local APIC");
        assert_eq!(sregs.cr0, 0x8000_0031);
        let regs = general(&entry);
        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x10_0200, 0x7000, 2));
    }

    #[test]
    fn protected_mode() {
        let entry = Entry::Protected {
            code: Selector::BootCode32,
            eip: 0x10_0000,
            esi: 0x7000,
        };
        let mut sregs = after_reset();
        special(&mut sregs, &entry, LocalApic::None);
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 0, 1));
        assert_eq!((sregs.ss.selector, sregs.es.selector), (0x18, 0x18));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x31, 0, 0));
        let regs = general(&entry);
        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x10_0000, 0x7000, 2));
        assert_eq!((regs.rbp, regs.rdi, regs.rbx), (0, 0, 0));
    }

    #[test]
    fn real_mode() {
        let entry = Entry::Real {
            cs: 0x1000,
            ip: 0x12,
        };
        let mut sregs = after_reset();
        special(&mut sregs, &entry, LocalApic::None);
        assert_eq!((sregs.cs.selector, sregs.cs.base), (0x1000, 0x10000));
        assert_eq!(sregs.cr0, 0x6000_0010, "as after reset");
        assert_eq!(general(&entry).rip, 0x12);
    }
}
