// SPDX-License-Identifier: GPL-2.0

//! The Intel backend: VMX, with EPT and unrestricted guests if the processor has them.
//!
//! VMX itself belongs to the kernel: it is turned on for a CPU while somebody holds a reference to
//! it there, and rkvm holds one on every CPU that is online, as kvm-intel does when it is loaded:
//! see [`power`].

mod apic;
mod caps;
mod exit;
mod fields;
mod load;
mod msr_bitmap;
mod power;
mod qualification;
mod reason;
mod restricted;
mod spec_ctrl;
mod vcpu;
mod vmcs;
mod write_log;

use crate::apics::ApicPages;
use crate::backend::Backend;
use crate::backend::Features;
use crate::backend::FreeInstructions;
use crate::backend::PrivatePages;
use crate::bindings;
use crate::linux::cpu::HotplugState;
use crate::linux::msr;
use crate::linux::power::PowerState;
use crate::linux::preempt::Followed;
use crate::linux::preempt::NotifiersOn;
use crate::linux::spinlock::StaticIrqLock;
use crate::linux::unsupported;
use crate::mmu::caps::PagingCaps;
use crate::mmu::caps::ShadowCaps;
use crate::mmu::ept::EptCaps;
use crate::system::Machine;
use crate::x86::msr::Msr;
use caps::VmxCaps;
use fields::SecondaryControls;
use kernel::prelude::*;
use kernel::static_lock_class;
use kernel::sync::Arc;
use load::Loadable;
use load::SwitchedMsrs;
use power::VmxHold;
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

// The VMCSs that exist, by VPID counted from the top: kvm-intel, which may be loaded too, counts from
// the bottom. (With EPT no harm would come of a number that both use, but it costs nothing.) A CPU
// that goes down or to sleep looks into it with interrupts off, and at the end of the machine in an
// interrupt, so they are off for all who do.
//
// SAFETY: Initialised by `new`, in the module's initialiser, before the device can be opened.
static VMCSS: StaticIrqLock<KVVec<Option<Arc<Vmcs>>>> = unsafe { StaticIrqLock::new() };

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
        let mut bigger = KVVec::new();
        loop {
            // What was there is dropped after the lock.
            let mut list = VMCSS.lock();
            let free = list.iter().position(Option::is_none);
            let index = free.unwrap_or(list.len());
            // Number 0 means that VPIDs are off.
            if index >= usize::from(u16::MAX) {
                return Err(ENOSPC);
            }
            if index == list.len() && index == list.capacity() {
                // Room is made where the allocator may sleep, and things may have changed meanwhile.
                if bigger.capacity() <= index {
                    drop(list);
                    let room = (index * 2).max(64);
                    bigger = KVVec::with_capacity(room, GFP_KERNEL_ACCOUNT)?;
                    continue;
                }
                for old in list.drain_all() {
                    // There is room.
                    let _ = bigger.push_within_capacity(old);
                }
                core::mem::swap(&mut *list, &mut bigger);
            }
            match list.get_mut(index) {
                Some(place) => *place = Some(vmcs.clone()),
                None => list
                    .push_within_capacity(Some(vmcs.clone()))
                    .map_err(|_| ENOMEM)?,
            }
            // INVARIANT: The place has just been taken.
            return Ok(Self(u16::MAX - index as u16));
        }
    }

    /// The number, not 0.
    #[inline]
    pub(crate) fn id(&self) -> u16 {
        self.0
    }
}

impl Drop for Vpid {
    fn drop(&mut self) {
        // Who drops the last reference may wait for another CPU, so that is not done in here.
        let _vmcs = {
            let mut list = VMCSS.lock();
            list.get_mut(usize::from(u16::MAX - self.0))
                .and_then(Option::take)
        };
    }
}

/// The backend.
pub(crate) struct Vmx {
    caps: VmxCaps,
    host: HostState,
    /// Last: VMX goes off after everything that needs it is gone.
    _awake: Pin<KBox<PowerState<VmxHold>>>,
    _on: HotplugState<VmxHold>,
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
        let caps = VmxCaps::probe()?;
        // SAFETY: The helpers read feature bits and flip a branch that only our entry takes.
        unsafe {
            // With shadow tables, the guest has no entries of its own that the processor would look at.
            if caps.ept && bindings::rkvm_cpu_has_l1tf() {
                if !bindings::rkvm_cpu_flushes_l1d() {
                    pr_err!("this CPU is open to L1TF and its microcode cannot flush the L1D\n");
                    return Err(unsupported());
                }
                bindings::rkvm_enable_l1d_flush();
            }
        }
        // SAFETY: The module's initialiser calls this once, and nothing uses the locks before.
        unsafe {
            VMCSS.init(KVVec::new(), c"rkvm_vmcss", static_lock_class!());
            MACHINE.init();
        }
        let host = HostState::read()?;
        let on = HotplugState::register()
            .inspect_err(|_| pr_err!("VMX could not be turned on on every CPU\n"))?;
        Ok(Self {
            caps,
            host,
            _awake: KBox::pin_init(PowerState::register(), GFP_KERNEL)?,
            _on: on,
        })
    }
}

impl Drop for Vmx {
    fn drop(&mut self) {
        // Nobody drops a static. The list is empty by now, but its room is not given back.
        let _room = core::mem::replace(&mut *VMCSS.lock(), KVVec::new());
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

    fn paging(&self) -> PagingCaps {
        if !self.caps.ept {
            return PagingCaps::Shadow(ShadowCaps {
                phys_bits: self.host.phys_bits,
                nx_huge: self.host.multihit,
            });
        }
        PagingCaps::Ept(EptCaps {
            ad_bits: self.caps.ept_ad,
            page_2m: self.caps.ept_2m,
            page_1g: self.caps.ept_1g,
            five_level: false,
            walk_wb: true,
            phys_bits: self.host.phys_bits,
            pml: self.caps.pml,
            nx_huge: self.host.multihit,
        })
    }

    fn private_pages(&self) -> PrivatePages {
        PrivatePages {
            tss: !self.caps.unrestricted,
            identity_map: self.caps.ept && !self.caps.unrestricted,
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
        eptp: Option<u64>,
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
