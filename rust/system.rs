// SPDX-License-Identifier: GPL-2.0

//! `/dev/rkvm`: what can be asked of the whole, and where VMs come from (KVM API, system ioctls).

use crate::abi;
use crate::abi::ioctl;
use crate::abi::kvm_cpuid2;
use crate::abi::kvm_msr_list;
use crate::backend::Backend;
use crate::linux::file;
use crate::linux::file::FileObject;
use crate::linux::file::Opened;
use crate::linux::fpu;
use crate::linux::msr as host_msr;
use crate::linux::page::PAGE_SIZE;
use crate::linux::user;
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

/// What guests can be given on this machine, found out when the module loads.
pub(crate) struct Host {
    /// The host's XCR0; 0 if it does not use XSAVE.
    pub(crate) xcr0: u64,
    /// The host uses protection keys, and switches PKRU.
    pub(crate) has_pku: bool,
    /// Where XSAVE puts what.
    pub(crate) xsave: XsaveLayout,
    /// What KVM_GET_SUPPORTED_CPUID amounts to.
    pub(crate) supported: GuestFeatures,
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
            pku: has_pku,
            umip: backend.cr4_allowed() & crate::x86::regs::Cr4::UMIP.bits() != 0,
            spec_ctrl: false,
            arch_capabilities: false,
            tsc_adjust: true,
            kernel_apic: true,
            paravirtual: crate::pv::supported(),
            mappable_bits: 48,
        };
        let mut host = Self {
            xcr0,
            has_pku,
            xsave: XsaveLayout::from_host(host_cpuid),
            supported: GuestFeatures::default(),
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
            ioctl::CHECK_EXTENSION => Ok(abi::cap::check(arg)),
            ioctl::GET_VCPU_MMAP_SIZE => no_arg(arg, (abi::RUN_PAGES * PAGE_SIZE) as isize),
            ioctl::CREATE_VM => this.create_vm(arg),
            ioctl::GET_SUPPORTED_CPUID => this.get_supported_cpuid(arg),
            ioctl::GET_MSR_INDEX_LIST => this.get_msr_index_list(arg),
            ioctl::GET_MSR_FEATURE_INDEX_LIST => write_msr_list(arg, &FEATURE_MSRS.map(|m| m.0)),
            ioctl::X86_GET_MCE_CAP_SUPPORTED => {
                user::write(arg, &mce::SUPPORTED)?;
                Ok(0)
            }
            ioctl::GET_MSRS => get_feature_msrs(arg),
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

/// MSRs that say what the processor can do: a VMM reads them of `/dev/rkvm` to set them up for a vCPU.
const FEATURE_MSRS: [Msr; 2] = [Msr::UCODE_REV, Msr::PLATFORM_INFO];

/// KVM_GET_MSRS of the device: reads feature MSRs until one is none; returns how many there were.
fn get_feature_msrs(arg: usize) -> Result<isize> {
    let mut entries = abi::read_msr_entries(arg)?;
    // What a vCPU has to begin with is what it can have.
    let fresh = MsrState::new(true);
    let mut done = 0;
    for entry in &mut entries {
        let msr = Msr(entry.index);
        let known = FEATURE_MSRS.contains(&msr);
        match fresh.read(msr, &GuestFeatures::default(), true) {
            Ok(value) if known => entry.data = value,
            _ => break,
        }
        done += 1;
    }
    user::write_array(arg.wrapping_add(size_of::<abi::kvm_msrs>()), &entries)?;
    Ok(done)
}
