// SPDX-License-Identifier: GPL-2.0

//! The current thread: its signals, and what it must do before a guest runs.

use crate::bindings;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::task::Task;

/// Whether the thread has a signal, or must reschedule, or has other work that comes before a
/// guest's entry: the last look, after which nothing more can come but by an interrupt.
#[inline]
pub(crate) fn guest_entry_work_pending(_irqs: &super::irq::IrqsOff) -> bool {
    // SAFETY: Reads the flags of the current thread; interrupts are off, as the guard says.
    unsafe { bindings::rkvm_guest_entry_work_pending() }
}

/// The same, as a look in between: the answer may be out of date at once.
#[inline]
pub(crate) fn guest_entry_work_seen() -> bool {
    // SAFETY: Reads the flags of the current thread.
    unsafe { bindings::rkvm_guest_entry_work_seen() }
}

/// Does that work: EINTR for a signal.
pub(crate) fn guest_entry_work() -> Result {
    // SAFETY: Called with interrupts on and no lock held but the vCPU's mutex, so it may sleep.
    to_result(unsafe { bindings::rkvm_guest_entry_work() })
}

/// Whether a signal waits for the current thread.
pub(crate) fn signal_pending() -> bool {
    // SAFETY: Reads the flags of the current thread.
    unsafe { bindings::rkvm_signal_pending() }
}

/// From here on the thread's time is its guest's.
#[inline]
pub(crate) fn guest_time_begins(_irqs: &super::irq::IrqsOff) {
    // SAFETY: Interrupts are off.
    unsafe { bindings::rkvm_guest_timing_enter() };
}

/// From here on the thread's time is its own. After the interrupt that ended the guest's run, so
/// that a tick which it may have been finds the guest running.
#[inline]
pub(crate) fn guest_time_ends(_irqs: &super::irq::IrqsOff) {
    // SAFETY: Interrupts are off.
    unsafe { bindings::rkvm_guest_timing_exit() };
}

/// How many CPUs are online.
pub(crate) fn online_cpus() -> u32 {
    // SAFETY: Reads a counter.
    unsafe { bindings::rkvm_num_online_cpus() }
}

/// Whether the host wants #AC for locked accesses that are split between cache lines.
pub(crate) fn host_detects_split_locks() -> bool {
    // SAFETY: Reads a feature bit.
    unsafe { bindings::rkvm_detects_split_locks() }
}

/// The guest made a split locked access at `rip`: whether the host lets it. If not, the thread has a
/// SIGBUS.
pub(crate) fn allow_split_lock(rip: u64) -> bool {
    // SAFETY: May sleep, as its caller may; it changes the thread's own flags.
    unsafe { bindings::rkvm_allow_split_lock(rip) }
}

/// Which thread this is, to be compared with.
#[inline]
pub(crate) fn current_address() -> usize {
    current!().as_ptr() as usize
}

/// Whether a thread that waits without sleeping should not go on: others want the CPU, or it has a
/// signal.
pub(crate) fn should_stop_polling() -> bool {
    // SAFETY: Reads the flags of the current thread and the length of this CPU's queue.
    unsafe { bindings::rkvm_should_stop_polling() }
}

/// How [`yield_to`] went.
pub(crate) enum Yielded {
    /// The other thread runs next.
    Yes,
    /// It runs already, or waits for something else than a CPU.
    No,
    /// Neither CPU has anybody who waits.
    Alone,
}

/// Gives up the CPU in favour of another thread.
pub(crate) fn yield_to(thread: &Task) -> Yielded {
    // SAFETY: The task is alive, as the reference says. May sleep, as its caller may.
    match unsafe { bindings::yield_to(thread.as_ptr().cast(), true) } {
        0 => Yielded::No,
        1.. => Yielded::Yes,
        _ => Yielded::Alone,
    }
}

/// Whether the scheduler counts how long threads wait for a CPU.
pub(crate) fn delays_are_counted() -> bool {
    // SAFETY: Reads a setting.
    unsafe { bindings::rkvm_delays_are_counted() }
}

/// How long the current thread has waited for a CPU so far, in nanoseconds.
pub(crate) fn waited_ns() -> u64 {
    // SAFETY: Reads a count of the current thread's.
    unsafe { bindings::rkvm_waited_ns() }
}

/// Whether the current thread would go on if it had a CPU, rather than sleep. For who is called by the scheduler.
#[inline]
pub(crate) fn current_is_runnable() -> bool {
    // SAFETY: Reads the state of the current thread.
    unsafe { bindings::rkvm_current_is_runnable() }
}

/// A set of signals, as user space has it.
pub(crate) type SignalMask = u64;

/// The thread blocks other signals than its own choice while this lives.
pub(crate) struct SignalsMasked(kernel::types::NotThreadSafe);

/// Blocks the signals of `mask`, and only those, until the guard is dropped.
pub(crate) fn mask_signals(mask: &SignalMask) -> SignalsMasked {
    // SAFETY: The helper copies the mask; `drop` restores what it saved in the task.
    unsafe { bindings::rkvm_sigmask_push(*mask) };
    SignalsMasked(Default::default())
}

impl Drop for SignalsMasked {
    fn drop(&mut self) {
        // SAFETY: Balances `mask_signals`, on the same thread.
        unsafe { bindings::rkvm_sigmask_pop() };
    }
}
