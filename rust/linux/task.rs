// SPDX-License-Identifier: GPL-2.0

//! The current thread: its signals, and what it must do before a guest runs.

use crate::bindings;
use kernel::error::to_result;
use kernel::prelude::*;

/// Whether the thread has a signal, or must reschedule, or has other work that comes before a
/// guest's entry. Meaningful with interrupts off; until then it may change at once.
#[inline]
pub(crate) fn guest_entry_work_pending() -> bool {
    // SAFETY: Reads the flags of the current thread.
    unsafe { bindings::rkvm_guest_entry_work_pending() }
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
