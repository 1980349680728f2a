// SPDX-License-Identifier: GPL-2.0

//! What other CPUs must know of a vCPU, and how they reach it.
//!
//! A [`VcpuShared`] is the only state of a vCPU that is touched without the vCPU's mutex. There is
//! one for each vCPU, shared by the vCPU and its VM's [`VcpuSet`].
//!
//! # Requests
//!
//! A request is a bit in one word. Whoever wants something of a vCPU sets the bit and then looks if
//! the vCPU is in the guest; the vCPU says that it is, and then looks for bits. Both do so with a
//! full barrier in between, so one of them sees the other: either the vCPU does not enter, or the
//! requester sends an IPI, which ends the guest's run.
//!
//! # TLB
//!
//! A CPU caches what it finds in EPT tables under the root's address (EPTP) and does not notice
//! changes. Entries that are taken away or lose a permission are therefore followed by
//! [`Request::TlbFlush`] to all vCPUs, before anybody relies on the change
//! ([`VcpuSet::request_all_and_wait`]). A vCPU that takes the request executes INVEPT for its EPTP
//! before it enters the guest again.
//!
//! A request reaches the CPU that a vCPU runs on. What the vCPU left behind on a CPU where it ran
//! before is stale by the time it comes back: **a vCPU that is loaded on another CPU than before, or
//! for the first time, must request [`Request::TlbFlush`] of itself.** That also covers a root page
//! freed by one VM and allocated by another.

use crate::apics::SharedApic;
use crate::linux::ipi;
use crate::linux::irq::PreemptOff;
use crate::linux::wait::Sleeper;
use crate::mem::ring::DirtyRing;
use crate::stats::VcpuStats;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::AtomicI32;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering;
use kernel::cpu::CpuId;
use kernel::cpumask::CpumaskVar;
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::new_spinlock;
use kernel::sync::Arc;
use kernel::sync::SpinLock;
use kernel::task::Task;

// The atomics are `core`'s: this is x86 code, the words are tested on every VM entry, and the
// kernel crate's atomics are calls of C functions without `or` and `and`. `SeqCst` is meant where
// the kernel would write `smp_mb()`.

/// What can be asked of a vCPU.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Request {
    /// Drop cached translations of guest-physical addresses (INVEPT) before the next entry.
    TlbFlush = 1 << 0,
    /// Look again if writes are logged. Also made to have a vCPU leave the guest, which empties its
    /// processor's log.
    WriteLogging = 1 << 1,
    /// An interrupt may have come: in the APIC's request register, or from the interrupt controller
    /// outside.
    Interrupts = 1 << 2,
    /// Something else came to the APIC.
    ApicEvents = 1 << 3,
    /// The APIC's timer may have gone off.
    Timer = 1 << 4,
    /// Ask again which vectors' ends the I/O APICs want to know of.
    EoiVectors = 1 << 5,
    /// The PIT has ticked, for an APIC that makes an NMI of it.
    Watchdog = 1 << 6,
    /// Structures of the guest's that the kernel keeps up to date may have to be: see
    /// [`PvState`](crate::pv::PvState).
    Structures = 1 << 7,
    /// Another vCPU has woken this one from HLT, by a hypercall.
    Unhalt = 1 << 8,
    /// The guest's clock has to be brought up to date.
    Clock = 1 << 10,
    /// The guest's clock is being changed: do not enter until this is withdrawn.
    ClockHeld = 1 << 11,
    /// The VMM has changed which MSRs the guest may access.
    MsrFilter = 1 << 9,
    /// A debugger steps through the guest: the next step begins with no interrupt shadow.
    DebugStep = 1 << 12,
}

impl Request {
    /// Those that wake a vCPU that is halted. Its clock is among them: other vCPUs may read the time by it.
    pub(crate) const WAKE: u32 = Self::Interrupts as u32
        | Self::ApicEvents as u32
        | Self::Timer as u32
        | Self::Watchdog as u32
        | Self::Unhalt as u32
        | Self::Clock as u32;
}

/// The vCPU executes host code, or is not loaded at all.
const OUTSIDE_GUEST: u32 = 0;
/// The vCPU is past its last check for requests, or in the guest.
const IN_GUEST: u32 = 1;
/// The same, and it has been interrupted, so that it will leave.
const LEAVING_GUEST: u32 = 2;

/// What other CPUs must know of a vCPU.
#[pin_data]
pub(crate) struct VcpuShared {
    requests: AtomicU32,
    mode: AtomicU32,
    /// Where the vCPU is or was last loaded; -1 if it never was.
    cpu: AtomicI32,
    /// The dirty ring, if the VM has them.
    ring: Option<DirtyRing>,
    /// The APIC, if it is in the kernel.
    apic: Option<SharedApic>,
    /// Where the vCPU's thread waits while the vCPU is halted.
    #[pin]
    sleeper: Sleeper,
    /// The thread waits there.
    sleeps: AtomicBool,
    /// The thread that runs the vCPU, or did last.
    #[pin]
    thread: SpinLock<Option<ARef<Task>>>,
    /// Counted by who holds the vCPU's mutex, read by anyone.
    pub(crate) stats: VcpuStats,
}

impl VcpuShared {
    /// That of a vCPU which never ran.
    pub(crate) fn new(
        ring: Option<DirtyRing>,
        apic: Option<SharedApic>,
    ) -> impl PinInit<Self, Error> {
        // Nobody takes requests of an APIC where there is none.
        let requests = match apic {
            Some(_) => Request::EoiVectors as u32,
            None => 0,
        };
        let requests = requests | Request::WriteLogging as u32 | Request::MsrFilter as u32;
        try_pin_init!(Self {
            requests: AtomicU32::new(requests),
            mode: AtomicU32::new(OUTSIDE_GUEST),
            cpu: AtomicI32::new(-1),
            ring,
            apic,
            sleeper <- Sleeper::new(),
            sleeps: AtomicBool::new(true),
            thread <- new_spinlock!(None, "rkvm_vcpu_thread"),
            stats: VcpuStats::new(),
        }? Error)
    }

    /// The APIC, if it is in the kernel.
    #[inline]
    pub(crate) fn apic(&self) -> Option<&SharedApic> {
        self.apic.as_ref()
    }

    /// Makes a request and has it noticed: the thread is woken if it waits, and made to leave the guest
    /// if it is there. In any context.
    pub(crate) fn request_and_kick(&self, request: Request) {
        self.request(request);
        if self.sleeper.wake() || self.mode.load(Ordering::SeqCst) != IN_GUEST {
            return;
        }
        // The CPU that is to be interrupted cannot go offline while others do not give up theirs.
        let preempt = PreemptOff::new();
        // One interrupt is enough.
        let left =
            self.mode
                .compare_exchange(IN_GUEST, LEAVING_GUEST, Ordering::SeqCst, Ordering::SeqCst);
        if left.is_ok() {
            if let Some(cpu) = CpuId::from_i32(self.cpu()) {
                ipi::interrupt(cpu, &preempt);
            }
        }
    }

    /// Interrupts have been posted: a processor that runs the guest is told, and takes them without an
    /// exit; else the vCPU is. In any context.
    pub(crate) fn notify_posted(&self) {
        let preempt = PreemptOff::new();
        // The poster's barrier between what it posted and this look; pairs with the vCPU's between its
        // mode and its look for posted interrupts.
        if self.mode.load(Ordering::SeqCst) == IN_GUEST {
            if let Some(cpu) = CpuId::from_i32(self.cpu()) {
                ipi::post_interrupt(cpu, &preempt);
            }
        } else {
            self.request_and_kick(Request::Interrupts);
        }
    }

    /// The barrier between what the vCPU has said of its mode and what it looks for next.
    #[inline]
    pub(crate) fn order_after_exit(&self) {
        core::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Waits until there is a request that wakes the vCPU, or the thread has a signal. By who holds the
    /// vCPU's mutex.
    pub(crate) fn sleep(&self) {
        self.sleeps.store(true, Ordering::Relaxed);
        self.sleeper.sleep_until(&self.requests, Request::WAKE);
        self.sleeps.store(false, Ordering::Relaxed);
    }

    /// KVM_RUN begins, in the current thread.
    #[inline]
    pub(crate) fn begin_run(&self) {
        self.sleeps.store(false, Ordering::Relaxed);
    }

    /// KVM_RUN ends.
    #[inline]
    pub(crate) fn end_run(&self) {
        self.sleeps.store(true, Ordering::Relaxed);
    }

    /// The vCPU is run by this thread from now on.
    pub(crate) fn set_thread(&self, thread: ARef<Task>) {
        let mut thread = Some(thread);
        // The reference that was there goes without the lock.
        core::mem::swap(&mut *self.thread.lock(), &mut thread);
    }

    /// The thread that runs the vCPU, or did last.
    pub(crate) fn thread(&self) -> Option<ARef<Task>> {
        self.thread.lock().clone()
    }

    /// Whether the vCPU would run, and does not.
    pub(crate) fn wants_cpu(&self) -> bool {
        !self.sleeps.load(Ordering::Relaxed) && self.mode.load(Ordering::Relaxed) == OUTSIDE_GUEST
    }

    /// Returns if there is a request that wakes the vCPU.
    #[inline]
    pub(crate) fn has_reason_to_wake(&self) -> bool {
        self.requests.load(Ordering::SeqCst) & Request::WAKE != 0
    }

    /// The dirty ring, if the VM has them.
    #[inline]
    pub(crate) fn ring(&self) -> Option<&DirtyRing> {
        self.ring.as_ref()
    }

    /// Asks for `request` at the vCPU's next entry. Does not make it leave the guest: see
    /// [`VcpuSet::request_all_and_wait`].
    #[inline]
    pub(crate) fn request(&self, request: Request) {
        self.requests.fetch_or(request as u32, Ordering::SeqCst);
    }

    /// Takes a request back or up: returns if it was there. What was done before it was made is
    /// seen after it is taken.
    #[inline]
    pub(crate) fn take(&self, request: Request) -> bool {
        let bit = request as u32;
        self.requests.load(Ordering::Relaxed) & bit != 0
            && self.requests.fetch_and(!bit, Ordering::SeqCst) & bit != 0
    }

    /// Returns if there is any request.
    #[inline(always)]
    pub(crate) fn pending(&self) -> bool {
        self.requests.load(Ordering::SeqCst) != 0
    }

    /// Where the vCPU is or was last loaded; -1 if it never was.
    #[inline]
    pub(crate) fn cpu(&self) -> i32 {
        self.cpu.load(Ordering::Relaxed)
    }

    /// Records where the vCPU is loaded: preemption is off, and it is not in the guest. Returns if
    /// it was elsewhere before, and then requests the TLB flush that this needs.
    #[inline]
    pub(crate) fn set_cpu(&self, cpu: i32) -> bool {
        let moved = self.cpu.load(Ordering::Relaxed) != cpu;
        if moved {
            self.cpu.store(cpu, Ordering::Relaxed);
            self.request(Request::TlbFlush);
        }
        moved
    }

    /// To be called with interrupts off before the last check of [`pending`](Self::pending) before
    /// VM entry: from here on, requesters that wait send an IPI.
    #[inline(always)]
    pub(crate) fn enter_guest_mode(&self) {
        // The barrier between "in the guest" and the look for requests; pairs with the requester's
        // between bit and mode.
        self.mode.store(IN_GUEST, Ordering::SeqCst);
    }

    /// To be called after a VM exit, or when the entry is called off, with interrupts still off: the
    /// guest's translations are not used any more.
    #[inline(always)]
    pub(crate) fn leave_guest_mode(&self) {
        self.mode.store(OUTSIDE_GUEST, Ordering::Release);
    }

    /// The CPU that must be interrupted so that the vCPU notices a request that has been made.
    #[inline]
    fn cpu_to_interrupt(&self) -> Option<CpuId> {
        if self.mode.load(Ordering::SeqCst) == OUTSIDE_GUEST {
            return None;
        }
        // If the vCPU has moved since, it has passed a check for requests since.
        CpuId::from_i32(self.cpu())
    }
}

/// The vCPUs of a VM.
#[pin_data]
pub(crate) struct VcpuSet {
    #[pin]
    inner: SpinLock<Members>,
    last_favoured: AtomicUsize,
}

struct Members {
    vcpus: KVec<Arc<VcpuShared>>,
    /// Whom to interrupt: used while the lock is held, here because it may be large.
    targets: KBox<CpumaskVar>,
    flushes: Flushes,
}

/// How often all vCPUs were to drop their translations.
#[derive(Clone, Copy, Default)]
pub(crate) struct Flushes {
    /// It was asked for.
    pub(crate) requested: u64,
    /// A vCPU was in the guest and had to be interrupted.
    pub(crate) interrupted: u64,
}

impl VcpuSet {
    /// An empty set: ENOMEM.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            inner <- new_spinlock!(
                Members {
                    vcpus: KVec::new(),
                    targets: KBox::new(
                        CpumaskVar::new_zero(GFP_KERNEL_ACCOUNT)?,
                        GFP_KERNEL_ACCOUNT
                    )?,
                    flushes: Flushes::default(),
                },
                "rkvm_vcpu_set"
            ),
            last_favoured: AtomicUsize::new(0),
        }? Error)
    }

    /// Adds a vCPU: from now on it gets what is requested of all. ENOMEM.
    pub(crate) fn add(&self, vcpu: Arc<VcpuShared>) -> Result {
        // Room is made outside the lock, where the allocator may sleep.
        loop {
            let len = self.inner.lock().vcpus.len();
            let room = len.checked_add(1).ok_or(ENOMEM)?;
            let mut bigger = KVec::with_capacity(room, GFP_KERNEL_ACCOUNT)?;
            let mut members = self.inner.lock();
            if members.vcpus.len() != len {
                continue;
            }
            for old in members.vcpus.iter() {
                // There is room, so neither of these can fail.
                bigger
                    .push_within_capacity(old.clone())
                    .map_err(|_| ENOMEM)?;
            }
            bigger.push_within_capacity(vcpu).map_err(|_| ENOMEM)?;
            core::mem::swap(&mut members.vcpus, &mut bigger);
            // First the lock goes, then the old vector.
            drop(members);
            return Ok(());
        }
    }

    /// Takes a vCPU out.
    pub(crate) fn remove(&self, vcpu: &Arc<VcpuShared>) {
        let mut members = self.inner.lock();
        members.vcpus.retain(|other| !Arc::ptr_eq(other, vcpu));
    }

    /// The vCPU at `index`, in an order that changes only as vCPUs come and go.
    pub(crate) fn get(&self, index: usize) -> Option<Arc<VcpuShared>> {
        self.inner.lock().vcpus.get(index).cloned()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.inner.lock().vcpus.len()
    }

    /// The one that another gave up its CPU for, last.
    pub(crate) fn last_favoured(&self) -> usize {
        self.last_favoured.load(Ordering::Relaxed)
    }

    /// Remembers that.
    pub(crate) fn set_last_favoured(&self, index: usize) {
        self.last_favoured.store(index, Ordering::Relaxed);
    }

    /// How often [`Request::TlbFlush`] was made of all.
    pub(crate) fn flushes(&self) -> Flushes {
        self.inner.lock().flushes
    }

    /// Makes `request` of every vCPU, and has it noticed. Does not wait.
    pub(crate) fn request_and_kick_all(&self, request: Request) {
        for vcpu in self.inner.lock().vcpus.iter() {
            vcpu.request_and_kick(request);
        }
    }

    /// Takes `request` back from every vCPU.
    pub(crate) fn withdraw_all(&self, request: Request) {
        for vcpu in self.inner.lock().vcpus.iter() {
            vcpu.take(request);
        }
    }

    /// Makes `request` of every vCPU and waits until those that were in the guest have left it.
    ///
    /// When it returns, no vCPU runs the guest without having seen the request. Does not sleep, but
    /// wants interrupts on.
    pub(crate) fn request_all_and_wait(&self, request: Request) {
        let mut members = self.inner.lock();
        let Members {
            vcpus,
            targets,
            flushes,
        } = &mut *members;
        let mut any = false;
        for vcpu in vcpus.iter() {
            vcpu.request(request);
            if let Some(cpu) = vcpu.cpu_to_interrupt() {
                targets.set(cpu);
                any = true;
            }
        }
        if request == Request::TlbFlush {
            flushes.requested = flushes.requested.wrapping_add(1);
            flushes.interrupted = flushes.interrupted.wrapping_add(any.into());
        }
        if !any {
            return;
        }
        // Interrupts are on: the lock is never taken with interrupts off. The answer comes once the
        // CPU has left the guest and lets interrupts in.
        ipi::interrupt_and_wait(targets);
    }
}
