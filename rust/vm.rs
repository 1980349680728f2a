// SPDX-License-Identifier: GPL-2.0

//! A VM: its memory and its vCPUs (KVM API, VM ioctls).
//!
//! A VM lives as long as its file or any of its vCPUs' files are open, and holds the address space of
//! the process that made it. Its ioctls are for that process: others get EIO.

mod clock;
mod devices;
pub(crate) mod special;

pub(crate) use clock::tsc_khz;
pub(crate) use clock::CLOCK_FLAGS;
pub(crate) use devices::disableable_exits;

use crate::abi;
use crate::abi::ioctl;
use crate::abi::kvm_enable_cap;
use crate::abi::kvm_userspace_memory_region;
use crate::abi::kvm_userspace_memory_region2;
use crate::apics::Apics;
use crate::backend::Backend;
use crate::bindings::KVM_CAP_DIRTY_LOG_RING;
use crate::bindings::KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
use crate::bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
use crate::bindings::KVM_CAP_MAX_VCPU_ID;
use crate::bindings::KVM_CAP_X86_APIC_BUS_CYCLES_NS;
use crate::bus::Bus;
use crate::irq::irqfd::IrqFds;
use crate::irq::Irqs;
use crate::linux::file::FileObject;
use crate::linux::preempt::NotifiersOn;
use crate::linux::shrinker::Shrinker;
use crate::linux::user;
use crate::mem::ring::DirtyRing;
use crate::mem::GuestMemory;
use crate::msr_filter::MsrRules;
use crate::options::VmOptions;
use crate::stats;
use crate::stats::Description;
use crate::system::Machine;
use crate::time::Registered;
use crate::vcpu::Vcpu;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering;
use kernel::new_mutex;
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::Arc;
use kernel::sync::ArcBorrow;
use kernel::sync::Mutex;
use special::SpecialPages;

/// A virtual machine.
#[pin_data]
pub(crate) struct Vm<B: Backend> {
    pub(crate) machine: Arc<Machine<B>>,
    pub(crate) memory: Arc<GuestMemory>,
    _shrinker: Option<Shrinker<GuestMemory>>,
    #[pin]
    pub(crate) bus: Bus,
    pub(crate) apics: Arc<Apics>,
    pub(crate) irqs: Arc<Irqs>,
    irqfds: IrqFds,
    pub(crate) time: Registered,
    #[pin]
    pub(crate) msrs: MsrRules,
    pub(crate) options: VmOptions,
    /// What the processor needs in its memory.
    #[pin]
    pub(crate) special: SpecialPages,
    /// For the vCPUs' threads.
    pub(crate) notifiers: NotifiersOn,
    /// Held while a vCPU is made.
    #[pin]
    vcpus: Mutex<Vcpus>,
    /// The identifier of the vCPU that starts the machine. Changed before there are vCPUs only.
    boot_cpu_id: AtomicU32,
    /// What does not make the guest exit (KVM_X86_DISABLE_EXITS_*). Changed before there are vCPUs only.
    pub(crate) disabled_exits: AtomicU32,
    /// What statistics call it.
    stats_id: CString,
}

/// The vCPUs of a VM.
struct Vcpus {
    /// Which identifiers are taken, a bit each.
    ids: [u64; abi::MAX_VCPU_IDS / 64],
    /// How many that is.
    count: usize,
    /// One more than the greatest identifier, if the VMM has set it (KVM_CAP_MAX_VCPU_ID).
    limit: Option<usize>,
    /// How large a dirty ring each has, in bytes; 0 for none.
    ring: u32,
}

impl Vcpus {
    const fn new() -> Self {
        Self {
            ids: [0; abi::MAX_VCPU_IDS / 64],
            count: 0,
            limit: None,
            ring: 0,
        }
    }

    const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// One more than the greatest identifier.
    fn limit(&self) -> usize {
        self.limit.unwrap_or(abi::MAX_VCPU_IDS)
    }

    /// Checks if there can be one more vCPU, with this identifier: EINVAL if there are too many or it is
    /// too great, EEXIST if it is taken.
    fn check(&self, id: usize) -> Result {
        if id >= self.limit() || self.count >= abi::MAX_VCPUS {
            return Err(EINVAL);
        }
        match self.ids.get(id / 64) {
            Some(word) if word & 1 << (id % 64) == 0 => Ok(()),
            _ => Err(EEXIST),
        }
    }

    fn add(&mut self, id: usize) {
        if let Some(word) = self.ids.get_mut(id / 64) {
            *word |= 1 << (id % 64);
            self.count += 1;
        }
    }
}

/// Above it, a gap of three pages for the TSS must fit below 4 GiB.
const MAX_TSS_ADDR: usize = 0xffff_d000;
/// The fewest pages that KVM takes for shadow page tables.
const MIN_MMU_PAGES: usize = crate::mmu::shadow::MIN_PAGES;

impl<B: Backend> Vm<B> {
    /// A VM without memory or vCPUs, for the current process.
    pub(crate) fn new(machine: Arc<Machine<B>>) -> Result<Arc<Self>> {
        let caps = machine.backend.paging();
        let pid = current!().pid();
        let memory = Arc::pin_init(GuestMemory::new(caps), GFP_KERNEL_ACCOUNT)?;
        let shrinker = GuestMemory::shrinker(&memory)?;
        let apics = Apics::new()?;
        let irqs = Irqs::new(&apics)?;
        let special = SpecialPages::new(memory.clone(), machine.backend.private_pages());
        let irqfds = IrqFds::new(irqs.clone())?;
        let time = machine.clocks.new_clock()?;
        Arc::pin_init(
            try_pin_init!(Self {
                machine,
                memory,
                _shrinker: shrinker,
                bus <- Bus::new(irqs.clone()),
                apics,
                irqs,
                irqfds,
                time,
                msrs <- MsrRules::new(),
                options: VmOptions::new(),
                special <- special,
                notifiers: NotifiersOn::new(),
                vcpus <- new_mutex!(Vcpus::new()),
                boot_cpu_id: AtomicU32::new(0),
                disabled_exits: AtomicU32::new(0),
                stats_id: CString::try_from_fmt(kernel::prelude::fmt!("kvm-{pid}"))?,
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// KVM_CREATE_VCPU: EINVAL for an identifier that is too great or one vCPU too many, EEXIST for an
    /// identifier that is taken.
    fn create_vcpu(this: ArcBorrow<'_, Self>, id: usize) -> Result<isize> {
        let mut vcpus = this.vcpus.lock();
        vcpus.check(id)?;
        this.special.make()?;
        let ring = match vcpus.ring {
            0 => None,
            bytes => Some(DirtyRing::new(bytes)?),
        };
        let fd = Vcpu::create(this.into(), id as u32, ring)?;
        vcpus.add(id);
        Ok(fd)
    }

    /// KVM_CAP_MAX_VCPU_ID: EINVAL for a limit beyond all, for one that leaves out the vCPU that boots, and
    /// for another than the one that is set or in use.
    fn limit_vcpu_ids(&self, limit: u64) -> Result {
        let limit = usize::try_from(limit).map_err(|_| EINVAL)?;
        let mut vcpus = self.vcpus.lock();
        // As KVM has it, one that leaves it out by one is taken, and 0 is no limit.
        if limit > abi::MAX_VCPU_IDS || limit < self.boot_cpu_id() as usize {
            return Err(EINVAL);
        }
        let fixed = vcpus.limit.is_some() || !vcpus.is_empty();
        if fixed && limit != vcpus.limit() {
            return Err(EINVAL);
        }
        if limit != 0 {
            vcpus.limit = Some(limit);
        }
        Ok(())
    }

    /// KVM_CHECK_EXTENSION of the VM, which may have changed an answer of the device's.
    fn check_extension(&self, cap: usize) -> isize {
        if cap == KVM_CAP_X86_APIC_BUS_CYCLES_NS as usize {
            return self.apics.bus().ns() as isize;
        }
        self.machine.check_extension(cap)
    }

    /// KVM_ENABLE_CAP: EINVAL for what cannot be enabled, or not so.
    fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<isize> {
        match cap.cap {
            KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 if cap.flags == 0 => {
                self.memory.set_manual_log(cap.args[0])?;
            }
            KVM_CAP_DIRTY_LOG_RING | KVM_CAP_DIRTY_LOG_RING_ACQ_REL => {
                self.set_dirty_ring(cap.args[0] as u32)?;
            }
            KVM_CAP_MAX_VCPU_ID if cap.flags == 0 => self.limit_vcpu_ids(cap.args[0])?,
            _ => self.enable_device_cap(cap)?,
        }
        Ok(0)
    }

    /// Gives each vCPU that is made from now on a dirty ring: EINVAL for a size that does not do, if
    /// there are rings or vCPUs already; E2BIG.
    fn set_dirty_ring(&self, bytes: u32) -> Result {
        DirtyRing::check_size(bytes)?;
        let mut vcpus = self.vcpus.lock();
        if vcpus.ring != 0 || !vcpus.is_empty() {
            return Err(EINVAL);
        }
        vcpus.ring = bytes;
        self.memory.use_rings();
        Ok(())
    }

    /// The vCPU that starts the machine, by its identifier.
    pub(crate) fn boot_cpu_id(&self) -> u32 {
        self.boot_cpu_id.load(Ordering::Relaxed)
    }

    /// KVM_SET_TSS_ADDR. An unrestricted guest needs no TSS in its memory: the address is checked and
    /// forgotten.
    fn set_tss_addr(&self, addr: usize) -> Result<isize> {
        if addr > MAX_TSS_ADDR {
            return Err(EINVAL);
        }
        self.special.set_tss(addr as u64)?;
        Ok(0)
    }

    /// KVM_SET_NR_MMU_PAGES: how many pages shadow page tables may take. With EPT there are none, and the number
    /// is checked and forgotten.
    fn set_nr_mmu_pages(&self, pages: usize) -> Result<isize> {
        if pages < MIN_MMU_PAGES {
            return Err(EINVAL);
        }
        self.memory.set_shadow_limit(pages);
        Ok(0)
    }

    /// KVM_SET_IDENTITY_MAP_ADDR. As KVM_SET_TSS_ADDR; it must come before the first vCPU, which makes the page.
    fn set_identity_map_addr(&self, arg: usize) -> Result<isize> {
        let addr = user::read::<u64>(arg)?;
        let vcpus = self.vcpus.lock();
        if !vcpus.is_empty() {
            return Err(EINVAL);
        }
        self.special.set_identity_map(addr);
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
            ioctl::GET_DIRTY_LOG => {
                this.memory.get_dirty_log(&user::read(arg)?)?;
                Ok(0)
            }
            ioctl::CLEAR_DIRTY_LOG => {
                this.memory.clear_dirty_log(&user::read(arg)?)?;
                Ok(0)
            }
            ioctl::SET_MSR_FILTER => {
                let filter = user::read(arg)?;
                this.msrs.set_filter(&filter, this.memory.vcpus())?;
                Ok(0)
            }
            ioctl::RESET_DIRTY_RINGS => this.memory.reset_dirty_rings(),
            ioctl::ENABLE_CAP => this.enable_cap(&user::read(arg)?),
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
            ioctl::GET_STATS_FD => stats::new_fd(c"kvm-vm-stats", &this.stats_id, this.into()),
            ioctl::CHECK_EXTENSION => Ok(this.check_extension(arg)),
            ioctl::SET_TSS_ADDR => this.set_tss_addr(arg),
            ioctl::SET_NR_MMU_PAGES => this.set_nr_mmu_pages(arg),
            ioctl::SET_IDENTITY_MAP_ADDR => this.set_identity_map_addr(arg),
            ioctl::GET_TSC_KHZ => Ok(this.time.khz() as isize),
            ioctl::SET_TSC_KHZ => this.set_tsc_khz(arg).map(|()| 0),
            ioctl::GET_CLOCK => user::write(arg, &this.get_clock()).map(|()| 0),
            ioctl::SET_CLOCK => this.set_clock(&user::read(arg)?).map(|()| 0),
            _ => this.device_ioctl(cmd, arg),
        }
    }

    fn release(this: ArcBorrow<'_, Self>) {
        // What refers to them refers to each other, too.
        this.irqfds.release();
    }
}

impl<B: Backend> stats::Source for Vm<B> {
    const DESCRIPTIONS: &'static [Description] = &[
        // All vCPUs were to drop their translations, and some had to be interrupted for it.
        Description::cumulative("remote_tlb_flush_requests"),
        Description::cumulative("remote_tlb_flush"),
        // What is mapped for the guest now, by the size of the mapping.
        Description::instant("pages_4k"),
        Description::instant("pages_2m"),
        Description::instant("pages_1g"),
        // Pages of memory that the EPT tables take, or shadow tables.
        Description::instant("page_table_pages"),
        // Shadow tables: pages that were made, that went, and why; writes to the guest's tables that were noticed, and
        // tables that became writable; leaves that were put in unasked.
        Description::cumulative("mmu_cache_miss"),
        Description::cumulative("mmu_shadow_zapped"),
        Description::cumulative("mmu_recycled"),
        Description::cumulative("mmu_flooded"),
        Description::cumulative("mmu_pte_write"),
        Description::cumulative("mmu_unsync"),
        Description::cumulative("mmu_sync"),
        Description::cumulative("mmu_prefetch"),
    ];

    fn values(&self, f: &mut dyn FnMut(u64) -> Result) -> Result {
        let flushes = self.memory.vcpus().flushes();
        f(flushes.requested)?;
        f(flushes.interrupted)?;
        let (leaves, tables) = self.memory.mapped();
        for n in leaves {
            f(n)?;
        }
        f(tables)?;
        let shadow = self.memory.shadow_counts().unwrap_or_default();
        for n in [
            shadow.made,
            shadow.zapped,
            shadow.recycled,
            shadow.flooded,
            shadow.writes,
            shadow.unsynced,
            shadow.synced,
            shadow.prefetched,
        ] {
            f(n)?;
        }
        Ok(())
    }
}
