// SPDX-License-Identifier: GPL-2.0

//! Guests that spin: a vCPU that executes PAUSE in a loop waits for another, which may have no CPU. So
//! it gives up its own in that one's favour.

use super::Next;
use super::Run;
use crate::backend::Loaded;
use crate::linux::task::Yielded;
use kernel::prelude::*;

/// How many vCPUs are tried that gain nothing by it.
const MAX_MISSES: u32 = 3;

impl<L: Loaded> Run<'_, L> {
    /// PAUSE, in a loop if the processor can tell.
    pub(super) fn pause(&mut self) -> Result<Next> {
        self.skip();
        self.shared.stats.directed_yield_attempted.bump();
        let vcpus = self.memory.vcpus();
        let count = vcpus.len();
        // After the one that was favoured last, so that each gets its turn.
        let first = vcpus.last_favoured().wrapping_add(1);
        let mut misses = 0;
        for n in 0..count {
            let index = first.wrapping_add(n).checked_rem(count).unwrap_or(0);
            let Some(other) = vcpus.get(index) else {
                continue;
            };
            if core::ptr::eq(&*other, self.shared) || !other.wants_cpu() {
                continue;
            }
            let Some(thread) = other.thread() else {
                continue;
            };
            match crate::linux::task::yield_to(&thread) {
                Yielded::Yes => {
                    vcpus.set_last_favoured(index);
                    self.shared.stats.directed_yield_successful.bump();
                    break;
                }
                Yielded::No => {}
                Yielded::Alone => {
                    misses += 1;
                    if misses == MAX_MISSES {
                        break;
                    }
                }
            }
        }
        Ok(Next::Guest)
    }
}
