// SPDX-License-Identifier: GPL-2.0

//! `/dev/rkvm`: what can be asked of the whole, and where VMs come from (KVM API, system ioctls).

use crate::abi;
use crate::abi::ioctl;
use crate::abi::kvm_cpuid2;
use crate::abi::kvm_device_attr;
use crate::abi::kvm_msr_list;
use crate::backend::Backend;
use crate::bindings::KVM_CAP_PRE_FAULT_MEMORY;
use crate::bindings::KVM_CAP_TSC_CONTROL;
use crate::bindings::KVM_CAP_VM_TSC_CONTROL;
use crate::linux::file;
use crate::linux::file::FileObject;
use crate::linux::file::Opened;
use crate::linux::fpu;
use crate::linux::msr as host_msr;
use crate::linux::page::PAGE_SIZE;
use crate::linux::user;
use crate::mmu::caps::PagingCaps;
use crate::time::Followers;
use crate::vm::Vm;
use crate::x86::cpuid::features::GuestFeatures;
use crate::x86::cpuid::policy;
use crate::x86::cpuid::policy::Policy;
use crate::x86::cpuid::CpuidEntry;
use crate::x86::cpuid::CpuidRegs;
use crate::x86::cpuid::XsaveLayout;
use crate::x86::cpuid::MAX_ENTRIES;
use crate::x86::mce;
use crate::x86::msr::state::MsrState;
use crate::x86::msr::Msr;
use crate::x86::msr::SAVED;
use crate::x86::regs::Xcr0;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::sync::ArcBorrow;

/// KVM_X86_XCOMP_GUEST_SUPP.
const XCOMP_GUEST_SUPP: u64 = crate::bindings::KVM_X86_XCOMP_GUEST_SUPP as u64;

/// What guests can be given on this machine, found out when the module loads.
pub(crate) struct Host {
    /// The host's XCR0; 0 if it does not use XSAVE.
    pub(crate) xcr0: u64,
    /// The host uses protection keys, and switches PKRU.
    pub(crate) has_pku: bool,
    /// What of IA32_ARCH_CAPABILITIES is true for guests as well.
    pub(crate) arch_capabilities: u64,
    /// Where XSAVE puts what.
    pub(crate) xsave: XsaveLayout,
    /// What KVM_GET_SUPPORTED_CPUID amounts to.
    pub(crate) supported: GuestFeatures,
    /// Guests' time-stamp counters can have rates of their own.
    pub(crate) tsc_scaling: bool,
    policy: Policy,
}

fn host_cpuid(function: u32, index: u32) -> CpuidRegs {
    let [eax, ebx, ecx, edx] = host_msr::cpuid(function, index);
    CpuidRegs { eax, ebx, ecx, edx }
}

impl Host {
    /// Asks the processor, the kernel and the backend.
    pub(crate) fn new(backend: &impl Backend) -> Result<Self> {
        let features = backend.features();
        let xcr0 = host_msr::host_xcr0();
        let has_pku = host_msr::host_has_pku() && Xcr0::new(xcr0).has(Xcr0::PKRU);
        let policy = Policy {
            // AMX needs a permission for each process.
            xcr0: Xcr0::new(xcr0 & fpu::permitted_xfeatures()).without(Xcr0::AMX),
            invpcid: features.invpcid,
            rdtscp: features.rdtscp,
            xsaves: features.xsaves && host_msr::host_xss() == 0,
            fast_strings: host_msr::read_safe(Msr::MISC_ENABLE.0).is_ok_and(|v| v & 1 != 0),
            pku: has_pku,
            umip: backend.cr4_allowed() & crate::x86::regs::Cr4::UMIP.bits() != 0,
            spec_ctrl: true,
            arch_capabilities: true,
            tsc_adjust: true,
            kernel_apic: true,
            paravirtual: crate::pv::supported(),
            mappable_bits: 48,
        };
        let mut host = Self {
            xcr0,
            has_pku,
            arch_capabilities: arch_capabilities(),
            xsave: XsaveLayout::from_host(host_cpuid),
            supported: GuestFeatures::default(),
            tsc_scaling: features.tsc_scaling,
            policy,
        };
        let entries = host.supported_cpuid()?;
        host.supported = GuestFeatures::derive(|function, index| {
            entries
                .iter()
                .find(|e| e.function == function && (e.index == index || e.flags == 0))
                .map(CpuidEntry::regs)
        });
        Ok(host)
    }

    /// The entries of KVM_GET_SUPPORTED_CPUID: E2BIG if there are more than a vCPU can have.
    fn supported_cpuid(&self) -> Result<KVVec<CpuidEntry>> {
        let mut entries = KVVec::from_elem(CpuidEntry::default(), MAX_ENTRIES, GFP_KERNEL_ACCOUNT)?;
        let len = policy::supported(&self.policy, host_cpuid, &mut entries).map_err(|_| E2BIG)?;
        entries.truncate(len);
        Ok(entries)
    }
}

/// The backend and what it can offer.
pub(crate) struct Machine<B: Backend> {
    pub(crate) backend: B,
    pub(crate) host: Host,
    /// The clocks of VMs.
    pub(crate) clocks: Followers,
}

impl<B: Backend> Machine<B> {
    /// The machine, with a backend for it.
    pub(crate) fn new(backend: B) -> Result<Self> {
        let host = Host::new(&backend)?;
        Ok(Self {
            backend,
            host,
            clocks: Followers::new()?,
        })
    }

    /// KVM_CHECK_EXTENSION: 0 for what is not there.
    pub(crate) fn check_extension(&self, cap: usize) -> isize {
        match u32::try_from(cap) {
            Ok(KVM_CAP_TSC_CONTROL | KVM_CAP_VM_TSC_CONTROL) => self.host.tsc_scaling.into(),
            // A guest-physical address alone says nothing of what is to be put into shadow tables.
            Ok(KVM_CAP_PRE_FAULT_MEMORY) => {
                matches!(self.backend.paging(), PagingCaps::Ept(_)).into()
            }
            _ => abi::cap::check(cap),
        }
    }
}

/// An open `/dev/rkvm`.
pub(crate) struct System<B: Backend> {
    machine: Arc<Machine<B>>,
}

impl<B: Backend> Opened for System<B> {
    fn open() -> Result<Arc<Self>> {
        let machine = B::machine().ok_or(ENODEV)?;
        Ok(Arc::new(Self { machine }, GFP_KERNEL_ACCOUNT)?)
    }
}

impl<B: Backend> FileObject for System<B> {
    fn ioctl(this: ArcBorrow<'_, Self>, cmd: u32, arg: usize) -> Result<isize> {
        match cmd {
            ioctl::GET_API_VERSION => no_arg(arg, abi::API_VERSION),
            ioctl::CHECK_EXTENSION => Ok(this.machine.check_extension(arg)),
            ioctl::GET_VCPU_MMAP_SIZE => no_arg(arg, (abi::RUN_PAGES * PAGE_SIZE) as isize),
            ioctl::CREATE_VM => this.create_vm(arg),
            ioctl::GET_SUPPORTED_CPUID => this.get_supported_cpuid(arg),
            ioctl::GET_MSR_INDEX_LIST => this.get_msr_index_list(arg),
            ioctl::GET_MSR_FEATURE_INDEX_LIST => write_msr_list(arg, &FEATURE_MSRS.map(|m| m.0)),
            ioctl::X86_GET_MCE_CAP_SUPPORTED => {
                user::write(arg, &mce::SUPPORTED)?;
                Ok(0)
            }
            ioctl::GET_MSRS => this.get_feature_msrs(arg),
            ioctl::HAS_DEVICE_ATTR => {
                this.attribute(&user::read(arg)?)?;
                Ok(0)
            }
            ioctl::GET_DEVICE_ATTR => {
                let attr = user::read(arg)?;
                let value = this.attribute(&attr)?;
                user::write(attr.addr as usize, &value)?;
                Ok(0)
            }
            // As in KVM, where a VM's file has ENOTTY for it.
            _ => Err(EINVAL),
        }
    }
}

/// The result of an ioctl that takes no argument: EINVAL if it got one.
pub(crate) fn no_arg(arg: usize, result: isize) -> Result<isize> {
    if arg != 0 {
        return Err(EINVAL);
    }
    Ok(result)
}

impl<B: Backend> System<B> {
    /// KVM_CREATE_VM: the argument is the type, of which there is one.
    fn create_vm(&self, kind: usize) -> Result<isize> {
        no_arg(kind, 0)?;
        let vm = Vm::new(self.machine.clone())?;
        file::anon_fd(c"kvm-vm", vm)
    }

    /// An attribute of the whole (KVM_CAP_SYS_ATTRIBUTES): which components of the FPU state a guest can
    /// have; ENXIO for another.
    fn attribute(&self, attr: &kvm_device_attr) -> Result<u64> {
        match (attr.group, attr.attr) {
            (0, XCOMP_GUEST_SUPP) => Ok(self.machine.host.supported.xcr0.bits()),
            _ => Err(ENXIO),
        }
    }

    fn get_supported_cpuid(&self, arg: usize) -> Result<isize> {
        let room = user::read::<kvm_cpuid2>(arg)?.nent as usize;
        let entries = self.machine.host.supported_cpuid()?;
        // KVM takes a count of zero for too little room as well, and leaves the count alone.
        if room < entries.len() {
            return Err(E2BIG);
        }
        user::write_array(
            arg.wrapping_add(size_of::<kvm_cpuid2>()),
            as_abi(&entries)?.as_slice(),
        )?;
        user::write(arg, &(entries.len() as u32))?;
        Ok(0)
    }

    fn get_msr_index_list(&self, arg: usize) -> Result<isize> {
        let mut list = KVVec::with_capacity(SAVED.len(), GFP_KERNEL_ACCOUNT)?;
        for msr in SAVED {
            if msr.is_listed(&self.machine.host.supported) {
                list.push(msr.0, GFP_KERNEL_ACCOUNT)?;
            }
        }
        write_msr_list(arg, &list)
    }

    /// A feature MSR: none if it is not one, or the host has not got it.
    fn feature_msr(&self, msr: Msr) -> Option<u64> {
        match msr {
            _ if !FEATURE_MSRS.contains(&msr) => None,
            Msr::UCODE_REV => host_msr::read_safe(msr.0).ok(),
            Msr::ARCH_CAPABILITIES => Some(self.machine.host.arch_capabilities),
            // What a vCPU has to begin with is what it can have.
            _ => MsrState::new(true)
                .read(msr, &GuestFeatures::default(), true)
                .ok(),
        }
    }

    /// KVM_GET_MSRS of the device: reads feature MSRs until one is none; returns how many there were.
    fn get_feature_msrs(&self, arg: usize) -> Result<isize> {
        let mut entries = abi::read_msr_entries(arg)?;
        let mut done = 0;
        for entry in &mut entries {
            let Some(value) = self.feature_msr(Msr(entry.index)) else {
                break;
            };
            entry.data = value;
            done += 1;
        }
        user::write_array(arg.wrapping_add(size_of::<abi::kvm_msrs>()), &entries)?;
        Ok(done)
    }
}

/// Entries in the ABI's type.
pub(crate) fn as_abi(entries: &[CpuidEntry]) -> Result<KVVec<abi::kvm_cpuid_entry2>> {
    let mut out = KVVec::with_capacity(entries.len(), GFP_KERNEL_ACCOUNT)?;
    for e in entries {
        let entry = abi::kvm_cpuid_entry2 {
            function: e.function,
            index: e.index,
            flags: e.flags,
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            padding: [0; 3],
        };
        out.push(entry, GFP_KERNEL_ACCOUNT)?;
    }
    Ok(out)
}

/// The count is written always; E2BIG if there is no room for the numbers.
fn write_msr_list(arg: usize, list: &[u32]) -> Result<isize> {
    let room = user::read::<kvm_msr_list>(arg)?.nmsrs as usize;
    user::write(arg, &(list.len() as u32))?;
    if room < list.len() {
        return Err(E2BIG);
    }
    user::write_array(arg.wrapping_add(size_of::<kvm_msr_list>()), list)?;
    Ok(0)
}

/// What the host's IA32_ARCH_CAPABILITIES says and is true for guests: to which attacks the processor is not open, which of them
/// VERW or microcode ends, and what they need not do for themselves. Not TSX_CTRL and the like, which are MSRs of their own.
fn arch_capabilities() -> u64 {
    const PSCHANGE_MC_NO: u64 = 1 << 6;
    const TRUE_FOR_GUESTS: u64 = 0x3f // RDCL_NO, IBRS_ALL, RSBA, SKIP_L1DFL, SSB_NO, MDS_NO
        | 1 << 8 // TAA_NO
        | 7 << 13 // SBDR_SSDP_NO, FBSDP_NO, PSDP_NO
        | 1 << 17 // FB_CLEAR
        | 3 << 19 // RRSBA, BHI_NO
        | 1 << 24 // PBRSB_NO
        | 7 << 26 // GDS_NO, RFDS_NO, RFDS_CLEAR
        | 1 << 62; // ITS_NO
    let host = host_msr::read_safe(Msr::ARCH_CAPABILITIES.0).unwrap_or(0);
    // Where a change of a page's size could be a machine check, guests have no large executable pages.
    host & TRUE_FOR_GUESTS | PSCHANGE_MC_NO
}

/// MSRs that say what the processor can do: a VMM reads them of `/dev/rkvm` to set them up for a vCPU.
const FEATURE_MSRS: [Msr; 3] = [Msr::UCODE_REV, Msr::PLATFORM_INFO, Msr::ARCH_CAPABILITIES];
