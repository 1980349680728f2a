// SPDX-License-Identifier: GPL-2.0

//! Level-triggered lines that eventfds drive (KVM_IRQFD_FLAG_RESAMPLE): such a line stays high until
//! the guest ends the interrupt. Then it falls, and the devices are asked by other eventfds whether
//! they still want it high.

use super::Irqs;
use crate::linux::eventfd::EventFd;
use crate::x86::line::Signal;
use crate::x86::line::Source;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::Ordering;
use kernel::prelude::*;
use kernel::sync::Arc;

/// An eventfd that is signalled when the interrupt with a GSI ends.
pub(super) struct Resampler {
    gsi: u32,
    eventfd: EventFd,
    /// It is to go.
    gone: AtomicBool,
}

impl Resampler {
    fn is_here(&self) -> bool {
        !self.gone.load(Ordering::Relaxed)
    }
}

/// Those of a VM at some moment.
///
/// # Invariants
///
/// Sorted by GSI.
pub(super) struct Resamplers(KVVec<Arc<Resampler>>);

impl Resamplers {
    /// None: ENOMEM.
    pub(super) fn none() -> Result<KBox<Self>> {
        Ok(KBox::new(Self(KVVec::new()), GFP_KERNEL_ACCOUNT)?)
    }

    /// A copy without those that are to go, and with another one: ENOMEM.
    fn copy(&self, another: Option<Arc<Resampler>>) -> Result<KBox<Self>> {
        let room = self.0.len().saturating_add(1);
        let mut next = KVVec::with_capacity(room, GFP_KERNEL_ACCOUNT)?;
        for resampler in self.0.iter().filter(|old| old.is_here()) {
            next.push(resampler.clone(), GFP_KERNEL_ACCOUNT)?;
        }
        if let Some(another) = another {
            let at = next.partition_point(|old: &Arc<Resampler>| old.gsi <= another.gsi);
            next.insert_within_capacity(at, another)
                .map_err(|_| ENOMEM)?;
        }
        // INVARIANT: Where it was put keeps the order.
        Ok(KBox::new(Self(next), GFP_KERNEL_ACCOUNT)?)
    }

    /// Those of a GSI.
    fn of(&self, gsi: u32) -> impl Iterator<Item = &Arc<Resampler>> + '_ {
        let begin = self.0.partition_point(|resampler| resampler.gsi < gsi);
        self.0
            .get(begin..)
            .unwrap_or(&[])
            .iter()
            .take_while(move |resampler| resampler.gsi == gsi)
            .filter(|resampler| resampler.is_here())
    }

    /// Whether there is one for a GSI.
    pub(super) fn wait_for(&self, gsi: u32) -> bool {
        self.of(gsi).next().is_some()
    }
}

impl Irqs {
    /// Adds one: ENOMEM.
    pub(super) fn add_resampler(&self, gsi: u32, eventfd: EventFd) -> Result<Arc<Resampler>> {
        let resampler = Arc::new(
            Resampler {
                gsi,
                eventfd,
                gone: AtomicBool::new(false),
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        let _update = self.update.lock();
        let next = self.resamplers.read().copy(Some(resampler.clone()))?;
        drop(self.resamplers.replace(next));
        self.apics.rescan();
        Ok(resampler)
    }

    /// Marks one as to go. Nothing drives its line for it any more. To be followed, once for all of
    /// them, by [`Self::sweep_resamplers`].
    pub(super) fn mark_resampler(&self, resampler: &Resampler) {
        resampler.gone.store(true, Ordering::Relaxed);
    }

    /// Takes out those that are to go, and lowers the lines that nobody is left for.
    pub(super) fn sweep_resamplers(&self) {
        let _update = self.update.lock();
        let next = {
            let resamplers = self.resamplers.read();
            for old in resamplers.0.iter().filter(|old| !old.is_here()) {
                if !resamplers.wait_for(old.gsi) {
                    self.set_line(old.gsi, Source::RESAMPLE, Signal::Low);
                }
            }
            resamplers.copy(None)
        };
        // Without memory for it they stay, and are passed over, until there is another change.
        if let Ok(next) = next {
            drop(self.resamplers.replace(next));
        }
        self.apics.rescan();
    }

    /// The interrupt with a GSI has ended.
    pub(super) fn resample(&self, gsi: u32) {
        let resamplers = self.resamplers.read();
        if resamplers.wait_for(gsi) {
            // Once, and before any of them is signalled: who is may raise it again at once.
            self.set_line(gsi, Source::RESAMPLE, Signal::Low);
            for resampler in resamplers.of(gsi) {
                resampler.eventfd.signal();
            }
        }
    }

    /// Asks those of a GSI, if there are any, to raise the line again; returns if so.
    pub(super) fn ask_resamplers(&self, gsi: u32) -> bool {
        let resamplers = self.resamplers.read();
        let mut any = false;
        for resampler in resamplers.of(gsi) {
            resampler.eventfd.signal();
            any = true;
        }
        any
    }
}
