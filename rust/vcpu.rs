// SPDX-License-Identifier: GPL-2.0

//! A vCPU: its file, its lock, and its ioctls (KVM API, vCPU ioctls).
//!
//! A vCPU is run by whichever thread calls KVM_RUN. One mutex guards all of its state and is held for
//! the whole of every ioctl, KVM_RUN included; what other threads may touch meanwhile is in
//! [`VcpuShared`].

mod cpuid;
pub(crate) mod debug;
mod events;
mod fpu;
mod lapic;
mod mce;
mod msrs;
mod regs;
pub(crate) mod sync;
mod tsc;

use crate::abi;
use crate::abi::ioctl;
use crate::apics::ApicPages;
use crate::apics::Registers;
use crate::apics::SharedApic;
use crate::arch;
use crate::arch::Arch;
use crate::backend::Backend;
use crate::backend::Loaded;
use crate::irq::Mode;
use crate::lapic::LocalApic;
use crate::linux::file;
use crate::linux::file::FileObject;
use crate::linux::file::NewVma;
use crate::linux::fpu::GuestFpu;
use crate::linux::mutex::KillableMutex;
use crate::linux::preempt::Followed;
use crate::linux::task;
use crate::linux::task::SignalMask;
use crate::linux::user;
use crate::mem::ring::DirtyRing;
use crate::mem::shadow::VcpuTables;
use crate::pv::steal::Preemption;
use crate::pv::steal::Watch;
use crate::run::apic::Around;
use crate::run::Run;
use crate::run_page::RunPages;
use crate::stats;
use crate::stats::Description;
use crate::stats::VcpuStats;
use crate::system::no_arg;
use crate::time::VcpuClock;
use crate::tlb::VcpuShared;
use crate::vm::Vm;
use kernel::prelude::*;
use kernel::static_lock_class;
use kernel::str::CString;
use kernel::sync::Arc;
use kernel::sync::ArcBorrow;
use kernel::task::Task;

/// A virtual processor.
#[pin_data(PinnedDrop)]
pub(crate) struct Vcpu<B: Backend> {
    vm: Arc<Vm<B>>,
    shared: Arc<VcpuShared>,
    pages: RunPages,
    id: u32,
    /// What statistics call it.
    stats_id: CString,
    #[pin]
    state: KillableMutex<State<B>>,
}

/// What the mutex guards.
#[pin_data]
struct State<B: Backend> {
    #[pin]
    follows: Followed<B::Follows>,
    #[pin]
    preemption: Followed<Preemption>,
    #[pin]
    fpu: GuestFpu,
    hw: B::Vcpu,
    arch: Arch,
}

impl<B: Backend> State<B> {
    fn new<'a>(
        vm: &'a Vm<B>,
        id: u32,
        shared: &'a Arc<VcpuShared>,
        registers: Option<Arc<Registers>>,
    ) -> impl PinInit<Self, Error> + 'a {
        pin_init::pin_init_scope(move || {
            let backend = &vm.machine.backend;
            let pages = match &registers {
                Some(registers) => Some(ApicPages {
                    registers: registers.clone(),
                    access: vm.apics.access_page()?.phys(),
                }),
                None => None,
            };
            let (hw, follows) =
                backend.new_vcpu(vm.memory.eptp(), pages, vm.free_instructions())?;
            let boots = id == vm.boot_cpu_id();
            let clock = VcpuClock::new(vm.time.get().clone(), id);
            let mut arch = Arch::new(boots, clock)?;
            if vm
                .options
                .has_quirk(crate::bindings::KVM_X86_QUIRK_STUFF_FEATURE_MSRS)
            {
                let arch_capabilities = vm.machine.host.arch_capabilities;
                arch.msrs.set_arch_capabilities(arch_capabilities);
            } else {
                arch.msrs.clear_feature_msrs();
            }
            arch.shadow = VcpuTables::new(&vm.memory)?;
            arch.pv.halts_freely = vm.free_instructions().hlt;
            if let Some(registers) = registers {
                let config = lapic::config(id, boots, &vm.apics, &vm.options);
                let virtualised = backend.virtualises_apics();
                let apic = LocalApic::new(registers, config, shared.clone(), virtualised)?;
                arch.apic = Some(KBox::new(apic, GFP_KERNEL_ACCOUNT)?);
                if !boots {
                    arch.mp_state = crate::bindings::KVM_MP_STATE_UNINITIALIZED;
                }
            }
            Ok(try_pin_init!(Self {
                follows <- Followed::new(follows),
                preemption <- Followed::new(Preemption::new(vm.memory.clone(), shared.clone())),
                fpu <- GuestFpu::new(),
                hw,
                arch,
            }))
        })
    }
}

impl<B: Backend> Vcpu<B> {
    /// Makes a vCPU of `vm`, with the dirty ring that it is to have, and a file for it.
    pub(crate) fn create(vm: Arc<Vm<B>>, id: u32, ring: Option<DirtyRing>) -> Result<isize> {
        let registers = match vm.irqs.mode() {
            Mode::None => None,
            Mode::Split | Mode::Kernel => Some(Registers::new()?),
        };
        let posts = vm.machine.backend.virtualises_apics();
        let apic = registers
            .clone()
            .map(|page| SharedApic::new(page, id, posts));
        let shared = Arc::pin_init(VcpuShared::new(ring, apic), GFP_KERNEL_ACCOUNT)?;
        let (vm, shared) = (&vm, &shared);
        let pid = current!().pid();
        let stats_id = CString::try_from_fmt(kernel::prelude::fmt!("kvm-{pid}/vcpu-{id}"))?;
        let vcpu = Arc::pin_init(
            try_pin_init!(Self {
                pages: RunPages::new()?,
                shared: shared.clone(),
                state <- KillableMutex::new(
                    State::new(vm, id, shared, registers),
                    c"rkvm_vcpu",
                    static_lock_class!(),
                ),
                vm: vm.clone(),
                id,
                stats_id,
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        vm.memory.vcpus().add(shared.clone())?;
        vm.time.add(shared.clone())?;
        if shared.apic().is_some() {
            vm.apics.add(shared.clone())?;
        }
        vcpu.with_loaded(|cpu| {
            arch::reset(cpu.hw);
            cpu.begin_tsc();
            Ok(())
        })?;
        // The name that tools look for among a process's files.
        let name = CString::try_from_fmt(kernel::prelude::fmt!("kvm-vcpu:{id}"))?;
        file::anon_fd(&name, vcpu)
    }

    /// Runs `f` with the vCPU locked and its hardware state at hand: EINTR if killed while waiting.
    fn with_loaded<R>(
        &self,
        f: impl FnOnce(&mut Locked<'_, B::Loaded<'_>>) -> Result<R>,
    ) -> Result<R> {
        let mut guard = self.state.lock_killable()?;
        let state = guard.as_mut().project();
        let follows = state.follows.into_ref().get_ref();
        let mut hw = self
            .vm
            .machine
            .backend
            .load(state.hw, follows, &self.vm.notifiers);
        let mut cpu = Locked {
            hw: &mut hw,
            arch: state.arch,
            fpu: state.fpu.into_ref().get_ref(),
            vm: &self.vm.memory,
            host: &self.vm.machine.host,
            around: self.around(),
        };
        cpu.follow_host_tsc();
        f(&mut cpu)
    }

    fn around(&self) -> Around<'_> {
        Around {
            memory: &self.vm.memory,
            shared: &self.shared,
            apics: &self.vm.apics,
            irqs: &self.vm.irqs,
            options: &self.vm.options,
            host: &self.vm.machine.host,
        }
    }

    /// KVM_SET_SIGNAL_MASK: the signals that are blocked during KVM_RUN, or, without an argument,
    /// those that the thread blocks itself. EINVAL for a mask of another size.
    fn set_signal_mask(&self, arg: usize) -> Result {
        let mask = if arg == 0 {
            None
        } else {
            if user::read::<abi::kvm_signal_mask>(arg)?.len as usize != size_of::<SignalMask>() {
                return Err(EINVAL);
            }
            Some(user::read(
                arg.wrapping_add(size_of::<abi::kvm_signal_mask>()),
            )?)
        };
        self.with_loaded(|cpu| {
            cpu.arch.signal_mask = mask;
            Ok(())
        })
    }

    /// KVM_PRE_FAULT_MEMORY: what is left of the range is written back, also with an error. EINVAL
    /// for flags, what is not whole pages, nothing, and what does not end below 2^64.
    fn pre_fault_memory(&self, arg: usize) -> Result {
        let mut given: abi::kvm_pre_fault_memory = user::read(arg)?;
        let end = given.gpa.checked_add(given.size).ok_or(EINVAL)?;
        if given.flags != 0 || (given.gpa | given.size) & 0xfff != 0 || given.size == 0 {
            return Err(EINVAL);
        }
        let mut range = given.gpa..end;
        let result = {
            let _state = self.state.lock_killable()?;
            self.vm.memory.map_ahead(&mut range, &self.shared)
        };
        given.gpa = range.start;
        given.size = end.wrapping_sub(range.start);
        user::write(arg, &given)?;
        result
    }

    /// KVM_GET_STATS_FD.
    fn stats_fd(this: ArcBorrow<'_, Self>) -> Result<isize> {
        let name = CString::try_from_fmt(kernel::prelude::fmt!("kvm-vcpu-stats:{}", this.id))?;
        stats::new_fd(&name, &this.stats_id, this.into())
    }

    /// KVM_RUN.
    fn run(&self, arg: usize) -> Result<isize> {
        no_arg(arg, 0)?;
        let mut guard = self.state.lock_killable()?;
        let state = guard.as_mut().project();
        let follows = state.follows.into_ref().get_ref();
        let preemption = state.preemption.into_ref().get_ref();
        let fpu = state.fpu.into_ref().get_ref();
        let current = task::current_address();
        if core::mem::replace(&mut state.arch.thread, current) != current {
            let thread: &Task = current!();
            self.shared.set_thread(thread.into());
        }
        self.shared.begin_run();
        self.shared.stats.fpu_reload.bump();
        let _masked = state.arch.signal_mask.as_ref().map(task::mask_signals);
        let (memory, host) = (&self.vm.memory, &self.vm.machine.host);
        let mut hw = self
            .vm
            .machine
            .backend
            .load(state.hw, follows, &self.vm.notifiers);
        if hw.is_restricted() {
            let special = &self.vm.special;
            hw.set_private_pages(special.tss(), special.identity_map());
        }
        let syncs_regs = self.pages.syncs_regs();
        let prepared = if syncs_regs || state.arch.clock.is_behind_host() {
            let mut cpu = Locked {
                hw: &mut hw,
                arch: &mut *state.arch,
                fpu,
                vm: memory,
                host,
                around: self.around(),
            };
            cpu.follow_host_tsc();
            if syncs_regs {
                cpu.take_synced(&self.pages)
            } else {
                Ok(())
            }
        } else {
            Ok(())
        };
        let mut run = Run {
            hw,
            fpu: fpu.swap_in(),
            arch: state.arch,
            memory,
            bus: &self.vm.bus,
            apics: &self.vm.apics,
            irqs: &self.vm.irqs,
            msrs: &self.vm.msrs,
            options: &self.vm.options,
            shared: &self.shared,
            page: &self.pages,
            host,
            watch: Watch::new(preemption, &self.vm.notifiers),
        };
        let result = run.run(prepared);
        self.shared.end_run();
        if self.pages.valid_regs() != 0 {
            Locked {
                hw: &mut run.hw,
                arch: &mut *run.arch,
                fpu,
                vm: memory,
                host,
                around: self.around(),
            }
            .leave_synced(&self.pages);
        }
        result?;
        Ok(0)
    }
}

#[pinned_drop]
impl<B: Backend> PinnedDrop for Vcpu<B> {
    fn drop(self: Pin<&mut Self>) {
        self.vm.memory.vcpus().remove(&self.shared);
        self.vm.time.remove(&self.shared);
        if self.shared.apic().is_some() {
            self.vm.apics.remove(&self.shared);
        }
    }
}

/// A vCPU that is locked and loaded, as the ioctls on its state see it.
pub(crate) struct Locked<'a, L: Loaded> {
    pub(crate) hw: &'a mut L,
    pub(crate) arch: &'a mut Arch,
    pub(crate) fpu: &'a GuestFpu,
    pub(crate) vm: &'a crate::mem::GuestMemory,
    pub(crate) host: &'a crate::system::Host,
    pub(crate) around: Around<'a>,
}

impl<B: Backend> FileObject for Vcpu<B> {
    fn ioctl(this: ArcBorrow<'_, Self>, cmd: u32, arg: usize) -> Result<isize> {
        if !this.vm.memory.is_current() {
            return Err(EIO);
        }
        if (cmd >> 8) & 0xff != crate::bindings::KVMIO {
            return Err(EINVAL);
        }
        match cmd {
            ioctl::RUN => return this.run(arg),
            ioctl::GET_REGS => {
                let regs = this.with_loaded(|cpu| Ok(cpu.get_regs()))?;
                user::write(arg, &regs)?;
            }
            ioctl::SET_REGS => {
                let regs = user::read(arg)?;
                this.with_loaded(|cpu| {
                    cpu.set_regs(&regs);
                    Ok(())
                })?;
            }
            ioctl::GET_SREGS => {
                let sregs = this.with_loaded(|cpu| Ok(cpu.get_sregs()))?;
                user::write(arg, &sregs)?;
            }
            ioctl::SET_SREGS => {
                let sregs = user::read(arg)?;
                this.with_loaded(|cpu| cpu.set_sregs(&sregs))?;
            }
            ioctl::GET_SREGS2 => {
                let sregs = this.with_loaded(|cpu| Ok(cpu.get_sregs2()))?;
                user::write(arg, &sregs)?;
            }
            ioctl::SET_SREGS2 => {
                let sregs = user::read(arg)?;
                this.with_loaded(|cpu| cpu.set_sregs2(&sregs))?;
            }
            ioctl::TRANSLATE => {
                let mut translation = user::read(arg)?;
                this.with_loaded(|cpu| {
                    cpu.translate(&mut translation);
                    Ok(())
                })?;
                user::write(arg, &translation)?;
            }
            ioctl::GET_MP_STATE => {
                let mp_state = this.with_loaded(|cpu| Ok(cpu.get_mp_state()))?;
                user::write(arg, &abi::kvm_mp_state { mp_state })?;
            }
            ioctl::SET_MP_STATE => {
                let new: abi::kvm_mp_state = user::read(arg)?;
                this.with_loaded(|cpu| cpu.set_mp_state(new.mp_state))?;
            }
            ioctl::INTERRUPT => {
                let irq: abi::kvm_interrupt = user::read(arg)?;
                this.with_loaded(|cpu| cpu.interrupt(irq.irq))?;
            }
            ioctl::NMI => this.with_loaded(|cpu| {
                cpu.nmi();
                Ok(())
            })?,
            ioctl::GET_LAPIC => {
                let mut state = KBox::new(abi::kvm_lapic_state::default(), GFP_KERNEL_ACCOUNT)?;
                this.with_loaded(|cpu| cpu.get_lapic(&mut state))?;
                user::write(arg, &*state)?;
            }
            ioctl::SET_LAPIC => {
                let state = KBox::new(user::read(arg)?, GFP_KERNEL_ACCOUNT)?;
                this.with_loaded(|cpu| cpu.set_lapic(&state))?;
            }
            ioctl::TPR_ACCESS_REPORTING => {
                let control: abi::kvm_tpr_access_ctl = user::read(arg)?;
                this.with_loaded(|cpu| cpu.report_tpr_accesses(&control))?;
                user::write(arg, &control)?;
            }
            ioctl::SET_VAPIC_ADDR => {
                let vapic: abi::kvm_vapic_addr = user::read(arg)?;
                this.with_loaded(|cpu| cpu.set_vapic_addr(vapic.vapic_addr))?;
            }
            ioctl::GET_VCPU_EVENTS => {
                let events = this.with_loaded(|cpu| Ok(cpu.get_events()))?;
                user::write(arg, &events)?;
            }
            ioctl::SET_VCPU_EVENTS => {
                let events = user::read(arg)?;
                this.with_loaded(|cpu| cpu.set_events(&events))?;
            }
            ioctl::GET_DEBUGREGS => {
                let regs = this.with_loaded(|cpu| Ok(cpu.get_debugregs()))?;
                user::write(arg, &regs)?;
            }
            ioctl::SET_DEBUGREGS => {
                let regs = user::read(arg)?;
                this.with_loaded(|cpu| cpu.set_debugregs(&regs))?;
            }
            ioctl::SET_GUEST_DEBUG => {
                let given = user::read(arg)?;
                this.with_loaded(|cpu| cpu.set_guest_debug(&given))?;
            }
            ioctl::GET_FPU => {
                let fpu = this.with_loaded(|cpu| Ok(cpu.get_fpu()))?;
                user::write(arg, &fpu)?;
            }
            ioctl::SET_FPU => {
                let fpu = user::read(arg)?;
                this.with_loaded(|cpu| {
                    cpu.set_fpu(&fpu);
                    Ok(())
                })?;
            }
            ioctl::GET_XSAVE => this.with_loaded(|cpu| cpu.get_xsave(arg))?,
            ioctl::GET_XSAVE2 => this.with_loaded(|cpu| cpu.get_xsave2(arg))?,
            ioctl::SET_XSAVE => this.with_loaded(|cpu| cpu.set_xsave(arg))?,
            ioctl::GET_XCRS => {
                let xcrs = this.with_loaded(|cpu| cpu.get_xcrs())?;
                user::write(arg, &xcrs)?;
            }
            ioctl::SET_XCRS => {
                let xcrs = user::read(arg)?;
                this.with_loaded(|cpu| cpu.set_xcrs(&xcrs))?;
            }
            ioctl::ENABLE_CAP => {
                let cap = user::read(arg)?;
                this.with_loaded(|cpu| cpu.enable_cap(&cap))?;
            }
            ioctl::GET_CPUID2 => this.with_loaded(|cpu| cpu.get_cpuid(arg))?,
            ioctl::SET_CPUID2 => this.with_loaded(|cpu| cpu.set_cpuid(arg))?,
            ioctl::GET_MSRS => return this.with_loaded(|cpu| cpu.get_msrs(arg)),
            ioctl::SET_MSRS => return this.with_loaded(|cpu| cpu.set_msrs(arg)),
            ioctl::GET_TSC_KHZ => return this.with_loaded(|cpu| Ok(cpu.arch.clock.khz() as isize)),
            ioctl::X86_SETUP_MCE => {
                let cap = user::read(arg)?;
                this.with_loaded(|cpu| cpu.setup_mce(cap))?;
            }
            ioctl::X86_SET_MCE => {
                let mce = user::read(arg)?;
                this.with_loaded(|cpu| cpu.set_mce(&mce))?;
            }
            ioctl::GET_STATS_FD => return Self::stats_fd(this),
            ioctl::SET_SIGNAL_MASK => this.set_signal_mask(arg)?,
            ioctl::PRE_FAULT_MEMORY => this.pre_fault_memory(arg)?,
            ioctl::HAS_DEVICE_ATTR => tsc::has_attr(&user::read(arg)?)?,
            ioctl::GET_DEVICE_ATTR => {
                let attr = user::read(arg)?;
                this.with_loaded(|cpu| cpu.get_attr(&attr))?;
            }
            ioctl::SET_DEVICE_ATTR => {
                let attr = user::read(arg)?;
                this.with_loaded(|cpu| cpu.set_attr(&attr))?;
            }
            ioctl::SET_TSC_KHZ => this.with_loaded(|cpu| cpu.set_tsc_khz(arg))?,
            ioctl::KVMCLOCK_CTRL => this.with_loaded(|cpu| cpu.set_stopped())?,
            _ => return Err(EINVAL),
        }
        Ok(0)
    }

    fn mmap(this: ArcBorrow<'_, Self>, vma: &NewVma) -> Result {
        match (
            vma.first_page().checked_sub(abi::DIRTY_RING_PAGE),
            this.shared.ring(),
        ) {
            (Some(first), Some(ring)) => ring.mmap(vma, first),
            _ => this.pages.mmap(vma, this.vm.bus.coalesced.ring()),
        }
    }
}

impl<B: Backend> stats::Source for Vcpu<B> {
    const DESCRIPTIONS: &'static [Description] = VcpuStats::DESCRIPTIONS;

    fn values(&self, f: &mut dyn FnMut(u64) -> Result) -> Result {
        self.shared.stats.values(f)
    }
}
