// SPDX-License-Identifier: GPL-2.0

//! Guest time: the counters and the clock of a VM, and what becomes of them when the host's change.
//!
//! The arithmetic is in [`crate::x86::clock`]; a vCPU's part is in [`vcpu`], and what its
//! thread does about it in [`crate::run::clock`].
//!
//! # The master copy
//!
//! [`VmClock`](crate::x86::clock::vm) demands that its master copy is replaced while no vCPU runs.
//! [`VmTime::renew`] makes [`Request::ClockHeld`] of all vCPUs, which none takes: whoever is in the guest
//! leaves it, and nobody enters. When the new copy is there, each gets [`Request::Clock`], and then the
//! other is withdrawn: no vCPU enters before it has written the new copy to its guest.

mod vcpu;

use crate::linux::clock;
use crate::linux::clock::OnSourceChange;
use crate::linux::clock::SourceWatch;
use crate::linux::msr as host_msr;
use crate::linux::spinlock::IrqSpinLock;
use crate::tlb::Request;
use crate::tlb::VcpuSet;
use crate::tlb::VcpuShared;
use crate::x86::clock::matching::Counters;
use crate::x86::clock::matching::Member;
use crate::x86::clock::matching::Moment;
use crate::x86::clock::pvclock::VcpuTime;
use crate::x86::clock::tsc::GuestTsc;
use crate::x86::clock::vm::VmClock;
use crate::x86::clock::HostTime;
use core::ops::Deref;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering;
use kernel::new_mutex;
use kernel::prelude::*;
use kernel::static_lock_class;
use kernel::sync::Arc;
use kernel::sync::Mutex;

pub(crate) use vcpu::VcpuClock;

/// How often the clocks of all vCPUs of a VM are brought up to date because one of them changes its CPU, at
/// most: nanoseconds in between.
const REFRESH_INTERVAL: u64 = 100_000_000;

/// The host's counter when the host went to sleep.
static LEFT_AT: AtomicU64 = AtomicU64::new(0);

/// What the host's counter has lost by beginning anew, since the module was loaded.
static LOST: AtomicU64 = AtomicU64::new(0);

/// The host goes to sleep. By the last CPU that does; in any context.
pub(crate) fn suspending() {
    LEFT_AT.store(host_msr::rdtsc(), Ordering::Relaxed);
}

/// The host woke, or did not sleep after all. By the first CPU that does, before vCPUs run; in any context.
///
/// The host's counter may begin at 0 then. Those of guests go on where they were: each vCPU sees to it
/// when it is next loaded.
pub(crate) fn resumed() {
    let left = LEFT_AT.swap(0, Ordering::Relaxed);
    let lost = left.saturating_sub(host_msr::rdtsc());
    if lost != 0 {
        LOST.fetch_add(lost, Ordering::Release);
    }
}

/// What the host's counter has lost so far.
#[inline]
pub(crate) fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// The clocks of all VMs.
#[pin_data]
struct Clocks {
    #[pin]
    all: Mutex<KVVec<Arc<VmTime>>>,
}

impl OnSourceChange for Clocks {
    fn source_changed(&self) {
        for time in self.all.lock().iter() {
            time.renew();
        }
    }
}

/// The clocks of all VMs, which follow the host's.
pub(crate) struct Followers(SourceWatch<Clocks>);

impl Followers {
    /// None: ENOMEM, EBUSY if there are others.
    pub(crate) fn new() -> Result<Self> {
        let clocks = Arc::pin_init(
            pin_init!(Clocks {
                all <- new_mutex!(KVVec::new(), "rkvm_clocks"),
            }),
            GFP_KERNEL,
        )?;
        Ok(Self(SourceWatch::new(clocks)?))
    }

    /// A clock for a VM, which begins now: ENOMEM.
    pub(crate) fn new_clock(&self) -> Result<Registered> {
        let clocks = self.0.target().clone();
        let time = Arc::pin_init(VmTime::new(), GFP_KERNEL_ACCOUNT)?;
        clocks.all.lock().push(time.clone(), GFP_KERNEL_ACCOUNT)?;
        Ok(Registered { time, clocks })
    }
}

/// The clock of a VM, which follows the host's.
pub(crate) struct Registered {
    time: Arc<VmTime>,
    clocks: Arc<Clocks>,
}

impl Registered {
    /// The clock itself.
    pub(crate) fn get(&self) -> &Arc<VmTime> {
        &self.time
    }
}

impl Deref for Registered {
    type Target = VmTime;

    fn deref(&self) -> &VmTime {
        &self.time
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.clocks
            .all
            .lock()
            .retain(|other| !Arc::ptr_eq(other, &self.time));
    }
}

/// The counters and the clock of a VM.
#[pin_data]
pub(crate) struct VmTime {
    /// Held while the master copy is replaced.
    #[pin]
    update: Mutex<()>,
    #[pin]
    state: IrqSpinLock<State>,
    /// The vCPUs that the clock is of.
    #[pin]
    vcpus: VcpuSet,
    /// [`VmClock::has_master`], without the lock.
    has_master: AtomicBool,
    /// When the clocks of all vCPUs were last brought up to date because one changed its CPU.
    refreshed: AtomicU64,
    /// The rate of the counters of vCPUs to come, in kHz.
    khz: AtomicU32,
    /// KVM_WALL_CLOCK, for all vCPUs.
    wall_clock: AtomicU64,
}

struct State {
    counters: Counters,
    clock: VmClock,
    /// The vCPU that boots uses the clock's older registers. Such guests do not expect it to be the same on
    /// all vCPUs.
    old_registers: bool,
    /// [`lost`], as of when this was last looked at.
    lost: u64,
}

impl State {
    /// Whether there can be a master copy.
    fn may_have_master(&self) -> bool {
        self.counters.agree() && !self.old_registers && clock::tsc_is_stable()
    }
}

fn moment(now: &HostTime) -> Moment {
    Moment {
        ns: now.ns,
        host_tsc: now.tsc,
        stable: clock::tsc_is_stable(),
    }
}

impl VmTime {
    fn new() -> impl PinInit<Self, Error> {
        let (khz, now) = (host_msr::tsc_khz(), clock::now());
        try_pin_init!(Self {
            update <- new_mutex!((), "rkvm_clock_update"),
            state <- IrqSpinLock::new(
                State {
                    counters: Counters::new(),
                    clock: VmClock::new(khz, &now),
                    old_registers: false,
                    lost: lost(),
                },
                c"rkvm_clock",
                static_lock_class!(),
            ),
            vcpus <- VcpuSet::new(),
            has_master: AtomicBool::new(false),
            refreshed: AtomicU64::new(0),
            khz: AtomicU32::new(khz),
            wall_clock: AtomicU64::new(0),
        }? Error)
    }

    /// The rate of the counters of vCPUs to come, in kHz.
    pub(crate) fn khz(&self) -> u32 {
        self.khz.load(Ordering::Relaxed)
    }

    /// Sets it, to one that can be. There are no vCPUs.
    pub(crate) fn set_khz(&self, khz: u32) {
        self.khz.store(khz, Ordering::Relaxed);
    }

    /// Adds a vCPU: from now on it is told of the clock. ENOMEM.
    pub(crate) fn add(&self, vcpu: Arc<VcpuShared>) -> Result {
        self.vcpus.add(vcpu)
    }

    /// Takes a vCPU out. What its counter had to do with the others' stays, as in KVM.
    pub(crate) fn remove(&self, vcpu: &Arc<VcpuShared>) {
        self.vcpus.remove(vcpu);
    }

    /// The counter of a vCPU that comes, whose rate is `khz`. Sleeps.
    pub(crate) fn join(&self, khz: u32, tsc: GuestTsc) -> (Member, GuestTsc) {
        self.change_counters(|counters, now| counters.join(khz, tsc, now))
    }

    /// The VMM writes a value to a vCPU's counter, whose rate is `khz`. Sleeps.
    pub(crate) fn write(
        &self,
        member: &mut Member,
        khz: u32,
        tsc: GuestTsc,
        value: u64,
    ) -> GuestTsc {
        self.change_counters(|counters, now| counters.write(member, khz, tsc, value, now))
    }

    /// The VMM sets the offset of a vCPU's counter, whose rate is `khz`. Sleeps.
    pub(crate) fn set_offset(
        &self,
        member: &mut Member,
        khz: u32,
        tsc: GuestTsc,
        offset: u64,
    ) -> GuestTsc {
        self.change_counters(|counters, now| counters.set_offset(member, khz, tsc, offset, now))
    }

    /// Changes the counters, and the master copy if it is not of them any more.
    fn change_counters<R>(&self, f: impl FnOnce(&mut Counters, Moment) -> R) -> R {
        let (result, renew) = {
            let mut state = self.state.lock();
            let now = clock::now();
            let before = state.counters.generation();
            let result = f(&mut state.counters, moment(&now));
            let (has, can_have) = (
                state.clock.has_master(),
                now.by_tsc && state.may_have_master(),
            );
            // What a vCPU's counter should be is reckoned from its generation's beginning, with a master copy
            // that is younger.
            let other = before != state.counters.generation();
            (result, has != can_have || has && other)
        };
        if renew {
            self.renew();
        }
        result
    }

    /// The host's counter has begun anew: a vCPU with this counter was first to see it, or was not. Sleeps.
    pub(crate) fn host_restarted(&self, lost: u64, tsc: GuestTsc) {
        {
            let mut state = self.state.lock();
            if state.lost == lost {
                return;
            }
            let ticks = tsc.scale.guest_ticks(lost.wrapping_sub(state.lost));
            state.counters.host_restarted(ticks);
            state.clock.host_restarted();
            state.lost = lost;
        }
        self.renew();
    }

    /// Takes the master copy anew, if there can be one. Sleeps.
    pub(crate) fn renew(&self) {
        self.renew_with(|_, _| {});
    }

    /// The same, and changes the clock.
    fn renew_with(&self, change: impl FnOnce(&mut VmClock, &HostTime)) {
        let _update = self.update.lock();
        self.vcpus.request_all_and_wait(Request::ClockHeld);
        {
            let mut state = self.state.lock();
            let now = clock::now();
            let may_be = state.may_have_master();
            state.clock.renew(&now, may_be);
            change(&mut state.clock, &now);
            self.has_master
                .store(state.clock.has_master(), Ordering::Relaxed);
        }
        self.vcpus.request_and_kick_all(Request::Clock);
        self.vcpus.withdraw_all(Request::ClockHeld);
    }

    /// The vCPU that boots uses these registers of the clock's. Sleeps.
    pub(crate) fn set_old_registers(&self, old: bool) {
        let before = core::mem::replace(&mut self.state.lock().old_registers, old);
        if before != old {
            self.renew();
        }
    }

    /// All vCPUs are to bring their clocks up to date.
    pub(crate) fn refresh_all(&self) {
        self.vcpus.request_and_kick_all(Request::Clock);
    }

    /// Whether the clocks of all vCPUs are computed from one master copy.
    pub(crate) fn has_master(&self) -> bool {
        self.has_master.load(Ordering::Relaxed)
    }

    /// A vCPU's clock, which is its own, is being brought up to date: so are the others', but not too often.
    /// They would drift apart else.
    pub(crate) fn refresh_others(&self) {
        let now = crate::linux::hrtimer::now();
        let last = self.refreshed.load(Ordering::Relaxed);
        let due = now.wrapping_sub(last) > REFRESH_INTERVAL;
        if due
            && self
                .refreshed
                .compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            self.refresh_all();
        }
    }

    /// The time for a vCPU with this counter, and when that was.
    pub(crate) fn vcpu_time(&self, tsc: GuestTsc) -> VcpuTime {
        let state = self.state.lock();
        state.clock.vcpu_time(tsc, &clock::now())
    }

    /// What the clock says; when that was; and if it is computed from the master copy.
    pub(crate) fn read(&self) -> (u64, HostTime, bool) {
        let state = self.state.lock();
        let now = clock::now();
        (state.clock.read(&now), now, state.clock.has_master())
    }

    /// When the clock began, in nanoseconds since 1970.
    pub(crate) fn epoch(&self) -> u64 {
        let state = self.state.lock();
        state.clock.epoch(&clock::now())
    }

    /// Sets the clock. `real`, if it is known, is what CLOCK_REALTIME said when the clock said so; what has
    /// passed since is added. Sleeps.
    pub(crate) fn set(&self, clock: u64, real: Option<u64>) {
        self.renew_with(|state, now| {
            let passed = real.map_or(0, |real| now.real.saturating_sub(real));
            state.set(clock.wrapping_add(passed), now);
        });
    }
}
