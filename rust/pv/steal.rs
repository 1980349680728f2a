// SPDX-License-Identifier: GPL-2.0

//! Steal time: how long a vCPU would have run and did not, because its thread had no CPU; and whether that is so now,
//! for other vCPUs that would wait for this one.
//!
//! [`StealTime`] is the vCPU's own. [`Preemption`] follows its thread: the scheduler takes a CPU away with interrupts
//! off, where guest memory can be written only if the host has it at hand.

use crate::linux::irq::PreemptOff;
use crate::linux::mm;
use crate::linux::preempt::Followed;
use crate::linux::preempt::Following;
use crate::linux::preempt::FollowsThread;
use crate::linux::preempt::NotifiersOn;
use crate::linux::task;
use crate::mem::cached::GuestStruct;
use crate::mem::cached::Place;
use crate::mem::GuestMemory;
use crate::tlb::Request;
use crate::tlb::VcpuShared;
use crate::x86::pv::steal;
use crate::x86::pv::ENABLED;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering;
use kernel::sync::Arc;

/// MSR_KVM_STEAL_TIME and what was counted.
pub(crate) struct StealTime {
    msr: u64,
    structure: Option<GuestStruct>,
    /// Of the thread that ran the vCPU last, how long it had waited for a CPU by then, in nanoseconds.
    waited: u64,
    /// Which thread that was.
    thread: usize,
}

impl StealTime {
    pub(super) const fn new() -> Self {
        Self {
            msr: 0,
            structure: None,
            waited: 0,
            thread: 0,
        }
    }

    /// The MSR.
    pub(crate) fn msr(&self) -> u64 {
        self.msr
    }

    /// Sets the MSR, whose reserved bits are 0.
    pub(crate) fn set(&mut self, msr: u64) {
        self.msr = msr;
        self.structure =
            (msr & ENABLED != 0).then(|| GuestStruct::new(msr & !ENABLED, steal::SIZE));
    }

    /// Where the guest wants it, if it does.
    #[inline]
    pub(crate) fn structure(&mut self) -> Option<&mut GuestStruct> {
        self.structure.as_mut()
    }

    /// How long the current thread has waited for a CPU since this was last asked, in nanoseconds. What another thread
    /// waited has nothing to do with it.
    pub(crate) fn waited(&mut self) -> u64 {
        let (thread, waited) = (task::current_address(), task::waited_ns());
        let before = core::mem::replace(&mut self.waited, waited);
        if core::mem::replace(&mut self.thread, thread) == thread {
            waited.wrapping_sub(before)
        } else {
            0
        }
    }
}

/// What the scheduler calls.
pub(crate) struct Preemption {
    memory: Arc<GuestMemory>,
    shared: Arc<VcpuShared>,
    /// The [`Place`] of the byte that says so.
    hva: AtomicU64,
    version: AtomicU64,
    /// The vCPU is between two instructions, and whatever the guest does to its TLB meanwhile can be made up for.
    between: AtomicBool,
    /// The guest has been told, and not yet that it is over.
    told: AtomicBool,
}

impl Preemption {
    /// For a vCPU and its VM's memory.
    pub(crate) fn new(memory: Arc<GuestMemory>, shared: Arc<VcpuShared>) -> Self {
        Self {
            memory,
            shared,
            hva: AtomicU64::new(Place::NONE.hva),
            version: AtomicU64::new(Place::NONE.version),
            between: AtomicBool::new(false),
            told: AtomicBool::new(false),
        }
    }

    // What follows is only touched by the vCPU's thread, or in its place: an order among the accesses is all that
    // the scheduler must see.

    fn set_place(&self, place: Place) {
        self.version.store(Place::NONE.version, Ordering::Release);
        self.hva.store(place.hva, Ordering::Release);
        self.version.store(place.version, Ordering::Release);
    }
}

impl FollowsThread for Preemption {
    fn switched_in(&self, _preempt: &PreemptOff) {
        self.shared.request(Request::Structures);
    }

    fn switched_out(&self, _preempt: &PreemptOff) {
        let ready = self.between.load(Ordering::Relaxed)
            && !self.told.load(Ordering::Relaxed)
            && task::current_is_runnable();
        if !ready {
            return;
        }
        let hva = self.hva.load(Ordering::Acquire);
        let version = self.version.load(Ordering::Acquire);
        let write = || mm::write_user_atomically(hva, &[steal::IS_PREEMPTED]);
        if let Some(Ok(())) = self.memory.at(version, write) {
            self.told.store(true, Ordering::Relaxed);
        }
    }
}

/// A vCPU's thread is followed while it runs the guest, if the guest wants to know.
pub(crate) struct Watch<'a> {
    followed: &'a Followed<Preemption>,
    notifiers: &'a NotifiersOn,
    following: Option<Following<'a, Preemption>>,
}

impl<'a> Watch<'a> {
    /// Nothing is followed yet.
    pub(crate) fn new(followed: &'a Followed<Preemption>, notifiers: &'a NotifiersOn) -> Self {
        Self {
            followed,
            notifiers,
            following: None,
        }
    }

    /// Follows from now on.
    pub(crate) fn start(&mut self) {
        if self.following.is_none() {
            self.following = Some(self.followed.follow(self.notifiers));
        }
    }

    /// Does not follow any more. The guest is told nothing as long as it does not go on.
    pub(crate) fn stop(&mut self) {
        if let Some(following) = &self.following {
            following.get().between.store(false, Ordering::Relaxed);
            following.get().set_place(Place::NONE);
        }
        self.following = None;
    }

    /// The guest has exited: `between` two instructions, nothing of which is left to do.
    #[inline]
    pub(crate) fn set_between(&self, between: bool) {
        if let Some(following) = &self.following {
            following.get().between.store(between, Ordering::Relaxed);
        }
    }

    /// Says that it is not between instructions for now, and what it was.
    pub(crate) fn hold(&self) -> bool {
        self.following
            .as_ref()
            .is_some_and(|following| following.get().between.swap(false, Ordering::Relaxed))
    }

    /// The vCPU has a CPU, and the guest's byte, which is at `place`, says so.
    pub(crate) fn set_running(&self, place: Place) {
        if let Some(following) = &self.following {
            following.get().set_place(place);
            following.get().told.store(false, Ordering::Relaxed);
        }
    }

    /// The guest cannot be told: where it wants to be, there is no memory now.
    pub(crate) fn forget_place(&self) {
        self.set_running(Place::NONE);
    }

    /// Whether the guest has been told that the vCPU has no CPU.
    pub(crate) fn has_told(&self) -> bool {
        self.following
            .as_ref()
            .is_some_and(|following| following.get().told.load(Ordering::Relaxed))
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        // The thread goes on, without its vCPU.
        self.set_between(false);
    }
}
