// SPDX-License-Identifier: GPL-2.0

//! A VM: its memory and its vCPUs (KVM API, VM ioctls).
//!
//! A VM lives as long as its file or any of its vCPUs' files are open, and holds the address space of
//! the process that made it. Its ioctls are for that process: others get EIO.

use crate::abi;
use crate::abi::ioctl;
use crate::abi::kvm_userspace_memory_region;
use crate::abi::kvm_userspace_memory_region2;
use crate::backend::Backend;
use crate::bus::Bus;
use crate::linux::file::FileObject;
use crate::linux::preempt::NotifiersOn;
use crate::linux::user;
use crate::mem::GuestMemory;
use crate::system::no_arg;
use crate::system::Machine;
use crate::vcpu::Vcpu;
use kernel::new_mutex;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::sync::ArcBorrow;
use kernel::sync::Mutex;

/// A virtual machine.
#[pin_data]
pub(crate) struct Vm<B: Backend> {
    pub(crate) machine: Arc<Machine<B>>,
    #[pin]
    pub(crate) memory: GuestMemory,
    #[pin]
    pub(crate) bus: Bus,
    /// For the vCPUs' threads.
    pub(crate) notifiers: NotifiersOn,
    /// Which vCPUs exist, a bit each. Held while one is made.
    #[pin]
    vcpus: Mutex<u64>,
}

const _: () = assert!(abi::MAX_VCPUS <= 64);

/// Above it, a gap of three pages for the TSS must fit below 4 GiB.
const MAX_TSS_ADDR: usize = 0xffff_d000;

impl<B: Backend> Vm<B> {
    /// A VM without memory or vCPUs, for the current process.
    pub(crate) fn new(machine: Arc<Machine<B>>) -> Result<Arc<Self>> {
        let caps = machine.backend.ept_caps();
        Arc::pin_init(
            try_pin_init!(Self {
                machine,
                memory <- GuestMemory::new(caps),
                bus <- Bus::new(),
                notifiers: NotifiersOn::new(),
                vcpus <- new_mutex!(0),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// KVM_CREATE_VCPU: EINVAL for an identifier that is too great, EEXIST for one that is taken.
    fn create_vcpu(this: ArcBorrow<'_, Self>, id: usize) -> Result<isize> {
        if id >= abi::MAX_VCPUS {
            return Err(EINVAL);
        }
        let mut vcpus = this.vcpus.lock();
        if *vcpus & 1 << id != 0 {
            return Err(EEXIST);
        }
        let fd = Vcpu::create(this.into(), id as u32)?;
        *vcpus |= 1 << id;
        Ok(fd)
    }

    /// KVM_SET_TSS_ADDR. An unrestricted guest needs no TSS in its memory: the address is checked and
    /// forgotten.
    fn set_tss_addr(addr: usize) -> Result<isize> {
        if addr > MAX_TSS_ADDR {
            return Err(EINVAL);
        }
        Ok(0)
    }

    /// KVM_SET_IDENTITY_MAP_ADDR. As above; it must come before the first vCPU.
    fn set_identity_map_addr(&self, arg: usize) -> Result<isize> {
        user::read::<u64>(arg)?;
        if *self.vcpus.lock() != 0 {
            return Err(EINVAL);
        }
        Ok(0)
    }
}

impl<B: Backend> FileObject for Vm<B> {
    fn ioctl(this: ArcBorrow<'_, Self>, cmd: u32, arg: usize) -> Result<isize> {
        if !this.memory.is_current() {
            return Err(EIO);
        }
        match cmd {
            ioctl::CREATE_VCPU => Self::create_vcpu(this, arg),
            ioctl::SET_USER_MEMORY_REGION => {
                let region = user::read::<kvm_userspace_memory_region>(arg)?;
                this.memory.set_region(&region)?;
                Ok(0)
            }
            ioctl::SET_USER_MEMORY_REGION2 => {
                let region = user::read::<kvm_userspace_memory_region2>(arg)?;
                // What it has beyond the smaller structure is for KVM_MEM_GUEST_MEMFD, which is
                // refused with the other flags that are not known.
                this.memory.set_region(&kvm_userspace_memory_region {
                    slot: region.slot,
                    flags: region.flags,
                    guest_phys_addr: region.guest_phys_addr,
                    memory_size: region.memory_size,
                    userspace_addr: region.userspace_addr,
                })?;
                Ok(0)
            }
            ioctl::REGISTER_COALESCED_MMIO => {
                this.bus.coalesced.register(&user::read(arg)?)?;
                Ok(0)
            }
            ioctl::UNREGISTER_COALESCED_MMIO => {
                this.bus.coalesced.unregister(&user::read(arg)?)?;
                Ok(0)
            }
            ioctl::CHECK_EXTENSION => Ok(abi::cap::check(arg)),
            ioctl::SET_TSS_ADDR => Self::set_tss_addr(arg),
            ioctl::SET_IDENTITY_MAP_ADDR => this.set_identity_map_addr(arg),
            ioctl::GET_TSC_KHZ => no_arg(0, crate::linux::msr::tsc_khz() as isize),
            _ => Err(ENOTTY),
        }
    }
}
