// SPDX-License-Identifier: GPL-2.0

//! The Intel backend: VMX with EPT and unrestricted guests.
//!
//! VMX itself belongs to the kernel: it is turned on for a CPU while somebody holds a reference to
//! it there, and rkvm holds one on every CPU that is online, as kvm-intel does when it is loaded.

mod apic;
mod caps;
mod exit;
mod fields;
mod load;
mod vcpu;
mod vmcs;
mod write_log;

use crate::apics::ApicPages;
use crate::backend::Backend;
use crate::backend::Features;
use crate::backend::FreeInstructions;
use crate::bindings;
use crate::linux::cpu::HotplugState;
use crate::linux::cpu::PerCpuHold;
use crate::linux::irq::IrqsOff;
use crate::linux::msr;
use crate::linux::page::KernelPage;
use crate::linux::preempt::Followed;
use crate::linux::preempt::NotifiersOn;
use crate::linux::unsupported;
use crate::mmu::ept::EptCaps;
use crate::system::Machine;
use crate::x86::msr::Msr;
use caps::VmxCaps;
use fields::SecondaryControls;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::sync::Arc;
use load::Loadable;
use load::SwitchedMsrs;
use vcpu::LoadedVcpu;
use vcpu::VmxVcpu;
use vmcs::Vmcs;

/// The host's registers that are the same on every CPU and never change.
struct HostState {
    cr0: u64,
    cs: u16,
    ss: u16,
    tr: u16,
    sysenter_cs: u32,
    sysenter_eip: u64,
    pat: u64,
    efer: u64,
    msrs: SwitchedMsrs,
    /// Width of physical addresses, in bits.
    phys_bits: u8,
    /// An executable large page can be a machine check (the iTLB-multihit erratum).
    multihit: bool,
}

impl HostState {
    fn read() -> Result<Self> {
        let cr0: u64;
        // SAFETY: Reading CR0 has no effect.
        unsafe { core::arch::asm!("mov {}, cr0", out(reg) cr0, options(nomem, nostack)) };
        // SAFETY: The helpers return constants.
        let (cs, ss, tr) = unsafe {
            (
                bindings::rkvm_kernel_cs(),
                bindings::rkvm_kernel_ds(),
                bindings::rkvm_kernel_tr(),
            )
        };
        Ok(Self {
            cr0,
            cs,
            ss,
            tr,
            sysenter_cs: msr::read_safe(Msr::SYSENTER_CS.0)? as u32,
            sysenter_eip: msr::read_safe(Msr::SYSENTER_EIP.0)?,
            pat: msr::read_safe(Msr::PAT.0)?,
            efer: msr::read_safe(Msr::EFER.0)?,
            msrs: SwitchedMsrs::host(),
            phys_bits: msr::cpuid(0x8000_0008, 0)[0] as u8,
            // SAFETY: Reads a bug bit.
            multihit: unsafe { bindings::rkvm_cpu_has_itlb_multihit() },
        })
    }
}

/// Which accesses to an MSR do not exit.
#[derive(Clone, Copy)]
enum Pass {
    Reads,
    Writes,
    Both,
}

/// The bitmap of the MSRs that a guest reads and writes without an exit (SDM vol. 3, 25.6.9). It is
/// the same for all.
struct MsrBitmap(KernelPage);

impl MsrBitmap {
    const READ_LOW: usize = 0;
    const READ_HIGH: usize = 1024;
    const WRITE: usize = 2048;

    fn new() -> Result<Self> {
        let page = KernelPage::new()?;
        for offset in (0..4096).step_by(8) {
            page.write(offset, u64::MAX);
        }
        let bitmap = Self(page);
        for msr in [
            Msr::FS_BASE,
            Msr::GS_BASE,
            Msr::KERNEL_GS_BASE,
            Msr::SYSENTER_CS,
            Msr::SYSENTER_ESP,
            Msr::SYSENTER_EIP,
        ] {
            bitmap.pass(msr, Pass::Both);
        }
        for msr in [Msr::TSC, Msr::STAR, Msr::LSTAR, Msr::SYSCALL_MASK] {
            bitmap.pass(msr, Pass::Reads);
        }
        Ok(bitmap)
    }

    /// The same for a guest whose x2APIC registers the processor has: reads of all but the current count,
    /// and writes of those that change nothing outside.
    fn with_x2apic() -> Result<Self> {
        const READ: [core::ops::RangeInclusive<u32>; 8] = [
            0x802..=0x803,
            0x808..=0x808,
            0x80a..=0x80a,
            0x80d..=0x80d,
            0x80f..=0x828,
            0x830..=0x830,
            0x832..=0x838,
            0x83e..=0x83e,
        ];
        let bitmap = Self::new()?;
        for msr in READ.into_iter().flatten() {
            bitmap.pass(Msr(msr), Pass::Reads);
        }
        for msr in [Msr::X2APIC_TPR, Msr::X2APIC_EOI, Msr::X2APIC_SELF_IPI] {
            bitmap.pass(msr, Pass::Writes);
        }
        Ok(bitmap)
    }

    fn pass(&self, msr: Msr, what: Pass) {
        let Msr(msr) = msr;
        let base = if msr < 0x2000 {
            Self::READ_LOW
        } else {
            Self::READ_HIGH
        };
        let byte = base + (msr & 0x1fff) as usize / 8;
        let bit = 1u8 << (msr & 7);
        if !matches!(what, Pass::Writes) {
            self.0.write(byte, self.0.read::<u8>(byte) & !bit);
        }
        if !matches!(what, Pass::Reads) {
            let byte = byte + Self::WRITE;
            self.0.write(byte, self.0.read::<u8>(byte) & !bit);
        }
    }

    fn phys(&self) -> u64 {
        self.0.phys()
    }
}

// The VMCSs that exist, by VPID counted from the top: kvm-intel, which may be loaded too, counts from
// the bottom. (With EPT no harm would come of a number that both use, but it costs nothing.)
kernel::sync::global_lock! {
    // SAFETY: Initialised by `probe`, in the module's initialiser, before the device can be opened.
    unsafe(uninit) static VMCSS: Mutex<KVVec<Option<Arc<Vmcs>>>> = KVVec::new();
}

kernel::sync::global_lock! {
    // SAFETY: Initialised by `new`, in the module's initialiser, before anything asks for it.
    unsafe(uninit) static MACHINE: Mutex<Option<Arc<Machine<Vmx>>>> = None;
}

/// A VMCS's place in [`VMCSS`], which is its virtual-processor identifier.
///
/// # Invariants
///
/// The place is taken, by the VMCS of one vCPU.
pub(crate) struct Vpid(u16);

impl Vpid {
    /// Enters a VMCS into the list: ENOSPC if there are 65,535 vCPUs already.
    fn register(vmcs: &Arc<Vmcs>) -> Result<Self> {
        let mut list = VMCSS.lock();
        let free = list.iter().position(Option::is_none);
        let index = free.unwrap_or(list.len());
        // Number 0 means that VPIDs are off.
        if index >= usize::from(u16::MAX) {
            return Err(ENOSPC);
        }
        match list.get_mut(index) {
            Some(place) => *place = Some(vmcs.clone()),
            None => list.push(Some(vmcs.clone()), GFP_KERNEL_ACCOUNT)?,
        }
        // INVARIANT: The place has just been taken.
        Ok(Self(u16::MAX - index as u16))
    }

    /// The number, not 0.
    #[inline]
    pub(crate) fn id(&self) -> u16 {
        self.0
    }
}

impl Drop for Vpid {
    fn drop(&mut self) {
        let mut list = VMCSS.lock();
        if let Some(place) = list.get_mut(usize::from(u16::MAX - self.0)) {
            *place = None;
        }
    }
}

/// The backend.
pub(crate) struct Vmx {
    caps: VmxCaps,
    host: HostState,
    msr_bitmap: MsrBitmap,
    x2apic_msr_bitmap: MsrBitmap,
    /// Last: VMX goes off after everything that needs it is gone.
    _on: HotplugState<VmxHold>,
}

/// A reference to VMX on each CPU.
struct VmxHold;

impl PerCpuHold for VmxHold {
    fn acquire() -> Result {
        // SAFETY: Called on the CPU that is to hold the reference.
        to_result(unsafe { bindings::rkvm_vmx_get_ref() })
    }

    fn release(_cpu: u32) {
        // What this CPU caches of a VMCS must be in memory before VMX goes off here.
        for vmcs in VMCSS.lock().iter().flatten() {
            // The vCPU's thread, on another CPU by now, may ask for the same by an IPI.
            let _irqs = IrqsOff::new();
            vmcs.clear_here();
        }
        // SAFETY: `acquire` took a reference on this CPU.
        unsafe { bindings::rkvm_vmx_put_ref() };
    }
}

impl Vmx {
    /// Takes VMX on every CPU: EOPNOTSUPP, with a message that says what is missing, if rkvm cannot
    /// work here.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: The helper reads feature bits.
        if !unsafe { bindings::rkvm_cpu_has_vmx() } {
            pr_err!("this CPU has no VMX, or the firmware or the command line turned it off\n");
            return Err(unsupported());
        }
        // SAFETY: The helpers read feature bits and flip a branch that only our entry takes.
        unsafe {
            if bindings::rkvm_cpu_has_l1tf() {
                if !bindings::rkvm_cpu_flushes_l1d() {
                    pr_err!("this CPU is open to L1TF and its microcode cannot flush the L1D\n");
                    return Err(unsupported());
                }
                bindings::rkvm_enable_l1d_flush();
            }
        }
        // SAFETY: The module's initialiser calls this once, and nothing uses the locks before.
        unsafe {
            VMCSS.init();
            MACHINE.init();
        }
        Ok(Self {
            caps: VmxCaps::probe()?,
            host: HostState::read()?,
            msr_bitmap: MsrBitmap::new()?,
            x2apic_msr_bitmap: MsrBitmap::with_x2apic()?,
            _on: HotplugState::register()
                .inspect_err(|_| pr_err!("VMX could not be turned on on every CPU\n"))?,
        })
    }
}

impl Drop for Vmx {
    fn drop(&mut self) {
        // Nobody drops a static. The list is empty by now, but its room is not given back.
        *VMCSS.lock() = KVVec::new();
    }
}

impl Backend for Vmx {
    type Vcpu = VmxVcpu;
    type Follows = Loadable;
    type Loaded<'a> = LoadedVcpu<'a>;

    fn machine() -> Option<Arc<Machine<Self>>> {
        MACHINE.lock().clone()
    }

    fn install(machine: Option<Arc<Machine<Self>>>) {
        // What was there is dropped without the lock: it may be the last reference.
        let _old = core::mem::replace(&mut *MACHINE.lock(), machine);
    }

    fn ept_caps(&self) -> EptCaps {
        EptCaps {
            ad_bits: self.caps.ept_ad,
            page_2m: self.caps.ept_2m,
            page_1g: self.caps.ept_1g,
            five_level: false,
            walk_wb: true,
            phys_bits: self.host.phys_bits,
            pml: self.caps.pml,
            nx_huge: self.host.multihit,
        }
    }

    fn cr4_allowed(&self) -> u64 {
        self.caps.cr4_allowed
    }

    fn features(&self) -> Features {
        Features {
            rdtscp: self.caps.secondary.has(SecondaryControls::RDTSCP),
            invpcid: self.caps.secondary.has(SecondaryControls::INVPCID),
            xsaves: self.caps.secondary.has(SecondaryControls::XSAVES),
            tsc_scaling: self.caps.tsc_scaling,
        }
    }

    fn virtualises_apics(&self) -> bool {
        self.caps.apicv
    }

    fn new_vcpu(
        &self,
        eptp: u64,
        apic: Option<ApicPages>,
        free: FreeInstructions,
    ) -> Result<(VmxVcpu, Loadable)> {
        let vmcs = Arc::new(Vmcs::new(self.caps.revision)?, GFP_KERNEL_ACCOUNT)?;
        let vpid = Vpid::register(&vmcs)?;
        let rdtscp = self.caps.secondary.has(SecondaryControls::RDTSCP);
        Ok((
            VmxVcpu::new(self, eptp, vpid, apic, free)?,
            Loadable::new(vmcs, self.host.msrs, rdtscp),
        ))
    }

    fn load<'a>(
        &'a self,
        vcpu: &'a mut VmxVcpu,
        follows: &'a Followed<Loadable>,
        on: &NotifiersOn,
    ) -> LoadedVcpu<'a> {
        LoadedVcpu::new(self, vcpu, follows.follow(on))
    }
}
