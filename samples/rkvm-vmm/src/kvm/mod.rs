// SPDX-License-Identifier: GPL-2.0

//! The KVM device: opening it, asking what it can do, making the VM, its interrupt controllers and
//! its vCPUs.

pub mod counters;
mod cpuid;
mod state;

use std::ffi::CString;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_bindings::kvm_enable_cap;
use kvm_bindings::kvm_ioeventfd;
use kvm_bindings::kvm_mp_state;
use kvm_bindings::kvm_pit_config;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_bindings::CpuId;
use kvm_bindings::KVMIO;
use kvm_bindings::KVM_API_VERSION;
use kvm_bindings::KVM_CAP_SPLIT_IRQCHIP;
use kvm_bindings::KVM_MEM_READONLY;
use kvm_bindings::KVM_MP_STATE_RUNNABLE;
use kvm_bindings::KVM_MP_STATE_UNINITIALIZED;
use kvm_bindings::KVM_PIT_SPEAKER_DUMMY;
use kvm_ioctls::Cap;
use kvm_ioctls::IoEventAddress;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuFd;
use kvm_ioctls::VmFd;
use thiserror::Error;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INTERRUPT_ACK;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;
use vm_memory::Address;
use vm_memory::GuestMemory;
use vm_memory::GuestMemoryRegion;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use self::cpuid::LocalApic;
use self::cpuid::Processor;
use crate::boot::Entry;
use crate::bus;
use crate::cli::Irqchip;
use crate::devices::ioapic;
use crate::interrupts::Interrupts;
use crate::memory::Memory;
use crate::memory::IDENTITY_MAP_ADDR;
use crate::memory::TSS_ADDR;
use crate::virtio::mmio::Mmio;

/// Why there is no VM.
#[derive(Debug, Error)]
pub enum Error {
    /// The device node cannot be opened.
    #[error("cannot open {}: {errno}{}", path.display(), open_hint(errno))]
    Open {
        /// The device node.
        path: PathBuf,
        /// What open(2) said.
        errno: errno::Error,
    },
    /// The file is no KVM device, or not one of this API.
    #[error(
        "{} does not speak KVM's API version 12: KVM_GET_API_VERSION returned {got}{}",
        path.display(),
        if *got < 0 { " (it is not a KVM device)" } else { "" }
    )]
    ApiVersion {
        /// The device node.
        path: PathBuf,
        /// What it returned.
        got: i32,
    },
    /// The device lacks what this VMM cannot do without.
    #[error("{} lacks the capability {name}, needed {why}", path.display())]
    Capability {
        /// The device node.
        path: PathBuf,
        /// `KVM_CAP_*`.
        name: &'static str,
        /// What it is needed for.
        why: &'static str,
    },
    /// More vCPUs than the device makes.
    #[error("{} makes {max} vCPUs at most (KVM_CAP_MAX_VCPUS), not {asked}", path.display())]
    TooManyCpus {
        /// The device node.
        path: PathBuf,
        /// How many were asked for.
        asked: u8,
        /// How many it can make.
        max: usize,
    },
    /// An ioctl failed.
    #[error("{ioctl} on {} failed: {errno}{}", path.display(), ioctl_hint(ioctl, errno))]
    Ioctl {
        /// The device node whose descendant it was.
        path: PathBuf,
        /// `KVM_*`.
        ioctl: &'static str,
        /// What ioctl(2) said.
        errno: errno::Error,
    },
    /// KVM_SET_MSRS stopped at a register.
    #[error("KVM_SET_MSRS on {} refused MSR {index:#x} = {value:#x}", path.display())]
    Msr {
        /// The device node.
        path: PathBuf,
        /// The register.
        index: u32,
        /// The value that was to be set.
        value: u64,
    },
}

fn open_hint(errno: &errno::Error) -> &'static str {
    match errno.errno() {
        libc::ENOENT => {
            ". Is the module loaded (insmod rkvm.ko; for the kernel's own KVM: modprobe \
                         kvm-intel and --device /dev/kvm), and is /dev a devtmpfs?"
        }
        libc::EACCES | libc::EPERM => ". Run as root, or get access to the device node",
        libc::ENODEV | libc::ENXIO => ". The node is there, its driver is not: load the module",
        libc::EBUSY => ". Another hypervisor may have taken the processor's virtualisation",
        _ => "",
    }
}

fn ioctl_hint(ioctl: &str, errno: &errno::Error) -> &'static str {
    match (ioctl, errno.errno()) {
        ("KVM_CREATE_VM", libc::EBUSY) => {
            ". Another hypervisor may hold the processor's VMX or SVM"
        }
        (_, libc::ENOTTY) => ". The device does not know this ioctl",
        (_, libc::ENOMEM) => ". The host is out of memory",
        ("KVM_CREATE_IRQCHIP" | "KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)", _) => {
            ". --irqchip none needs no interrupt controller of the device"
        }
        ("KVM_SET_SREGS" | "KVM_SET_CPUID2", libc::EINVAL) => {
            ". The device finds the state invalid"
        }
        _ => "",
    }
}

/// A capability that is checked first, so that its lack is told by name.
const REQUIRED: [(Cap, &str, &str); 4] = [
    (
        Cap::UserMemory,
        "KVM_CAP_USER_MEMORY",
        "to give the guest memory",
    ),
    (
        Cap::ExtCpuid,
        "KVM_CAP_EXT_CPUID",
        "to tell the guest what its processor is",
    ),
    (
        Cap::ImmediateExit,
        "KVM_CAP_IMMEDIATE_EXIT",
        "to get the vCPU out of the guest for an interrupt",
    ),
    (
        Cap::SetTssAddr,
        "KVM_CAP_SET_TSS_ADDR",
        "for real mode on processors that cannot virtualise it",
    ),
];

/// What local APICs need beyond that, wherever the I/O APIC is.
const REQUIRED_FOR_APICS: [(Cap, &str, &str); 4] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP", WITHOUT_APICS),
    (Cap::MpState, "KVM_CAP_MP_STATE", WITHOUT_APICS),
    (Cap::Irqfd, "KVM_CAP_IRQFD", WITHOUT_APICS),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING", WITHOUT_APICS),
];
/// What an I/O APIC in userspace needs.
const REQUIRED_FOR_SPLIT: [(Cap, &str, &str); 2] = [
    (
        Cap::SplitIrqchip,
        "KVM_CAP_SPLIT_IRQCHIP",
        "for local APICs without the rest of the controllers; --irqchip kernel or none do without",
    ),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI", WITHOUT_APICS),
];
/// What controllers in the kernel need.
const REQUIRED_FOR_KERNEL: [(Cap, &str, &str); 1] = [(
    Cap::Pit2,
    "KVM_CAP_PIT2",
    "for the timer of a PC in the kernel; --irqchip split or none do without",
)];
const WITHOUT_APICS: &str = "for interrupts through local APICs; --irqchip none does without";

// kvm-ioctls wraps it for files that get a certain value, or a write of any width.
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

/// The first memory slot of the virtio devices' pages, behind those of RAM.
const FIRST_PAGE_SLOT: u32 = 8;

/// A VM with its memory and what interrupt controllers the kernel makes.
pub struct Vm {
    path: PathBuf,
    kvm: Kvm,
    vm: Arc<VmFd>,
    irqchip: Irqchip,
}

impl Vm {
    /// Makes a VM of the device at `path` with `memory` as its RAM and controllers as `irqchip` says.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(path: &Path, memory: &Memory, irqchip: Irqchip) -> Result<Self, Error> {
        let open_error = |errno| Error::Open {
            path: path.into(),
            errno,
        };
        let c_path = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| open_error(errno::Error::new(libc::EINVAL)))?;
        let kvm = Kvm::new_with_path(c_path).map_err(open_error)?;
        let got = kvm.get_api_version();
        if got != KVM_API_VERSION as i32 {
            return Err(Error::ApiVersion {
                path: path.into(),
                got,
            });
        }
        let (apics, split, kernel) = match irqchip {
            Irqchip::None => (&[][..], &[][..], &[][..]),
            Irqchip::Split => (&REQUIRED_FOR_APICS[..], &REQUIRED_FOR_SPLIT[..], &[][..]),
            Irqchip::Kernel => (&REQUIRED_FOR_APICS[..], &[][..], &REQUIRED_FOR_KERNEL[..]),
        };
        for &(cap, name, why) in REQUIRED.iter().chain(apics).chain(split).chain(kernel) {
            if !kvm.check_extension(cap) {
                return Err(Error::Capability {
                    path: path.into(),
                    name,
                    why,
                });
            }
        }
        let failed = |ioctl| {
            move |errno| Error::Ioctl {
                path: path.into(),
                ioctl,
                errno,
            }
        };
        let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        vm.set_tss_address(TSS_ADDR as usize)
            .map_err(failed("KVM_SET_TSS_ADDR"))?;
        if kvm.check_extension(Cap::SetIdentityMapAddr) {
            vm.set_identity_map_address(IDENTITY_MAP_ADDR)
                .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        }
        for (slot, region) in memory.iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is a mapping of that size. `main` drops the memory after the VM.
            unsafe { vm.set_user_memory_region(slot) }
                .map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let vm = Self {
            path: path.into(),
            kvm,
            vm: Arc::new(vm),
            irqchip,
        };
        vm.create_irqchip()?;
        Ok(vm)
    }

    /// Makes the controllers that are the kernel's, which must come before the vCPUs.
    fn create_irqchip(&self) -> Result<(), Error> {
        match self.irqchip {
            Irqchip::None => Ok(()),
            Irqchip::Split => {
                let mut cap = kvm_enable_cap {
                    cap: KVM_CAP_SPLIT_IRQCHIP,
                    ..Default::default()
                };
                // The routes that are the I/O APIC's pins: of their vectors its EOIs are told.
                cap.args[0] = ioapic::PINS as u64;
                self.vm
                    .enable_cap(&cap)
                    .map_err(|errno| self.failed("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)", errno))
            }
            Irqchip::Kernel => {
                self.vm
                    .create_irq_chip()
                    .map_err(|errno| self.failed("KVM_CREATE_IRQCHIP", errno))?;
                let pit = kvm_pit_config {
                    // With port 0x61, which gates the timer.
                    flags: KVM_PIT_SPEAKER_DUMMY,
                    ..Default::default()
                };
                self.vm
                    .create_pit2(pit)
                    .map_err(|errno| self.failed("KVM_CREATE_PIT2", errno))
            }
        }
    }

    /// Connects virtio device `number`: its page of registers, to be read without an exit, its
    /// notifications, and its interrupt.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn attach(&self, number: usize, device: &Mmio) -> Result<(), Error> {
        let base = bus::VIRTIO_BASE + number as u64 * bus::VIRTIO_SIZE;
        let at = |register: u32| IoEventAddress::Mmio(base + u64::from(register));
        for (queue, file) in device.notify_files().into_iter().flatten().enumerate() {
            self.vm
                .register_ioevent(file, &at(VIRTIO_MMIO_QUEUE_NOTIFY), queue as u32)
                .map_err(|errno| self.failed("KVM_IOEVENTFD", errno))?;
        }
        if let Some(file) = device.acknowledge_file() {
            // Whatever is written, in the one width that there is.
            let ioeventfd = kvm_ioeventfd {
                addr: base + u64::from(VIRTIO_MMIO_INTERRUPT_ACK),
                len: 4,
                fd: file.as_raw_fd(),
                ..Default::default()
            };
            // SAFETY: the descriptor is a VM's, the structure is the one that the ioctl takes.
            if unsafe { ioctl_with_ref(&*self.vm, KVM_IOEVENTFD(), &ioeventfd) } < 0 {
                return Err(self.failed("KVM_IOEVENTFD", errno::Error::last()));
            }
        }
        if let Some(file) = device.interrupt_file() {
            self.vm
                .register_irqfd(file, bus::VIRTIO_GSI + number as u32)
                .map_err(|errno| self.failed("KVM_IRQFD", errno))?;
        }
        if self.kvm.check_extension(Cap::ReadonlyMem) {
            let slot = kvm_userspace_memory_region {
                slot: FIRST_PAGE_SLOT + number as u32,
                flags: KVM_MEM_READONLY,
                guest_phys_addr: base,
                memory_size: device.page().size() as u64,
                userspace_addr: device.page().as_ptr() as u64,
            };
            // SAFETY: the page is a mapping of that size. Once it is gone, with the board that has the
            // device, no vCPU runs any more.
            unsafe { self.vm.set_user_memory_region(slot) }
                .map_err(|errno| self.failed("KVM_SET_USER_MEMORY_REGION", errno))?;
        }
        Ok(())
    }

    /// Returns the machine's interrupt controllers, as this program sees them.
    pub fn interrupts(&self) -> Interrupts {
        match self.irqchip {
            Irqchip::None => Interrupts::pics(),
            Irqchip::Split => Interrupts::split(self.vm.clone()),
            Irqchip::Kernel => Interrupts::kernel(self.vm.clone()),
        }
    }

    /// Makes `count` vCPUs: the first is at `entry`, the others wait for it to start them.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn create_vcpus(&self, count: u8, entry: &Entry) -> Result<Vec<VcpuFd>, Error> {
        let max = self.kvm.get_max_vcpus();
        if usize::from(count) > max {
            return Err(Error::TooManyCpus {
                path: self.path.clone(),
                asked: count,
                max,
            });
        }
        (0..count)
            .map(|id| self.create_vcpu(id, count, entry))
            .collect()
    }

    fn create_vcpu(&self, id: u8, count: u8, entry: &Entry) -> Result<VcpuFd, Error> {
        let vcpu = self
            .vm
            .create_vcpu(id.into())
            .map_err(|errno| self.failed("KVM_CREATE_VCPU", errno))?;
        let processor = Processor {
            id: id.into(),
            of: count.into(),
            apic: match self.irqchip {
                Irqchip::None => LocalApic::None,
                Irqchip::Split | Irqchip::Kernel => LocalApic::Kernel {
                    tsc_deadline: self.kvm.check_extension(Cap::TscDeadlineTimer),
                },
            },
        };
        let entries = self.cpuid(&vcpu, &processor)?;
        let cpuid = CpuId::from_entries(&entries)
            .map_err(|_| self.failed("KVM_SET_CPUID2", errno::Error::new(libc::E2BIG)))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(|errno| self.failed("KVM_SET_CPUID2", errno))?;
        let state = || {
            if id == 0 {
                state::set_entry(&vcpu, entry, processor.apic)?;
            }
            state::set_msrs(&vcpu, cpuid::has_mtrr(&entries))
        };
        state().map_err(|err| match err {
            state::Error::Ioctl(ioctl, errno) => self.failed(ioctl, errno),
            state::Error::Msr(index, value) => Error::Msr {
                path: self.path.clone(),
                index,
                value,
            },
        })?;
        if processor.apic != LocalApic::None {
            // A processor that is not the first waits for INIT and for where to start.
            let mp_state = kvm_mp_state {
                mp_state: if id == 0 {
                    KVM_MP_STATE_RUNNABLE
                } else {
                    KVM_MP_STATE_UNINITIALIZED
                },
            };
            vcpu.set_mp_state(mp_state)
                .map_err(|errno| self.failed("KVM_SET_MP_STATE", errno))?;
        }
        Ok(vcpu)
    }

    /// Returns what `processor` finds by CPUID.
    fn cpuid(&self, vcpu: &VcpuFd, processor: &Processor) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        let supported = self
            .kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(|errno| self.failed("KVM_GET_SUPPORTED_CPUID", errno))?;
        let mut entries = supported.as_slice().to_vec();
        if self.kvm.check_extension(Cap::GetTscKhz) {
            let tsc_khz = vcpu
                .get_tsc_khz()
                .map_err(|errno| self.failed("KVM_GET_TSC_KHZ", errno))?;
            cpuid::add_tsc_frequency(&mut entries, tsc_khz);
        }
        cpuid::describe_machine(&mut entries, processor);
        Ok(entries)
    }

    fn failed(&self, ioctl: &'static str, errno: errno::Error) -> Error {
        Error::Ioctl {
            path: self.path.clone(),
            ioctl,
            errno,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn error(path: &str) -> String {
        let memory = memory::allocate(1 << 20).unwrap();
        match Vm::new(Path::new(path), &memory, Irqchip::Split) {
            Ok(_) => panic!("{path} made a VM"),
            Err(err) => err.to_string(),
        }
    }

    #[test]
    fn a_missing_device_is_explained() {
        assert!(error("/nonexistent/kvm").contains("insmod rkvm.ko"));
    }

    #[test]
    fn a_wrong_device_is_explained() {
        assert!(error("/dev/null").contains("not a KVM device"));
    }
}
