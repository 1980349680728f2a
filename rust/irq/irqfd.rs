// SPDX-License-Identifier: GPL-2.0

//! Eventfds that are interrupts (KVM API, KVM_IRQFD): whoever signals one raises the line with a GSI,
//! at once and in the signaller's context.

use super::resample::Resampler;
use super::Irqs;
use super::Mode;
use crate::bindings::kvm_irqfd;
use crate::bindings::KVM_IRQFD_FLAG_DEASSIGN;
use crate::bindings::KVM_IRQFD_FLAG_RESAMPLE;
use crate::linux::eventfd::EventFd;
use crate::linux::eventfd::Follower;
use crate::linux::eventfd::OnEvent;
use crate::linux::work::OnWork;
use crate::linux::work::Work;
use crate::x86::line::Signal;
use crate::x86::line::Source;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::Ordering;
use kernel::new_mutex;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::sync::Mutex;

/// An eventfd that is an interrupt.
struct IrqFd {
    irqs: Arc<Irqs>,
    gsi: u32,
    /// The line is to stay high until the interrupt has ended.
    resampler: Option<Arc<Resampler>>,
    /// The eventfd's file is gone.
    closed: AtomicBool,
    list: Arc<Work<List>>,
}

impl OnEvent for IrqFd {
    fn signalled(&self) {
        if self.resampler.is_some() {
            self.irqs.set_line(self.gsi, Source::RESAMPLE, Signal::High);
        } else {
            self.irqs.pulse(self.gsi, Source::USER);
        }
    }

    fn closed(&self) {
        self.closed.store(true, Ordering::Relaxed);
        // It cannot be taken off here, inside the eventfd's lock.
        self.list.queue();
    }
}

/// The eventfds of a VM. The work is to drop those whose file is gone.
#[pin_data]
struct List {
    irqs: Arc<Irqs>,
    #[pin]
    fds: Mutex<KVVec<Pin<KBox<Follower<IrqFd>>>>>,
}

impl List {
    /// Removes those that `f` wants to go. None of them raises its line after that.
    fn remove(&self, f: impl Fn(&Follower<IrqFd>) -> bool) {
        let mut resampled = false;
        let mut fds = self.fds.lock();
        fds.retain(|fd| {
            let remove = f(fd);
            if let (true, Some(resampler)) = (remove, &fd.target().resampler) {
                self.irqs.mark_resampler(resampler);
                resampled = true;
            }
            !remove
        });
        if resampled {
            self.irqs.sweep_resamplers();
        }
    }
}

impl OnWork for List {
    fn work(&self) {
        self.remove(|fd| fd.target().closed.load(Ordering::Relaxed));
    }
}

/// The eventfds that are interrupts of one VM.
///
/// Each refers to the list that it is in, for the work that its end makes: [`Self::release`] breaks
/// that circle.
pub(crate) struct IrqFds(Arc<Work<List>>);

impl IrqFds {
    /// None: ENOMEM.
    pub(crate) fn new(irqs: Arc<Irqs>) -> Result<Self> {
        let list = try_pin_init!(List {
            irqs,
            fds <- new_mutex!(KVVec::new(), "rkvm_irqfds"),
        }? Error);
        Ok(Self(Arc::pin_init(Work::new(list), GFP_KERNEL_ACCOUNT)?))
    }

    /// KVM_IRQFD. EINVAL: flags that are not known; no interrupt controller in the kernel, or for a
    /// resampler, not all of them; something that is no eventfd. EBADF. EBUSY if the eventfd is an
    /// interrupt already, of whichever VM. ENOMEM.
    ///
    /// Once it has returned from taking one away, that raises its line no more. There need be none to
    /// take away.
    pub(crate) fn change(&self, args: &kvm_irqfd) -> Result {
        if args.flags & !(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE) != 0 {
            return Err(EINVAL);
        }
        if args.flags & KVM_IRQFD_FLAG_DEASSIGN == 0 {
            return self.assign(args);
        }
        let eventfd = EventFd::from_fd(args.fd as i32)?;
        self.0
            .target()
            .remove(|fd| *fd.eventfd() == eventfd && fd.target().gsi == args.gsi);
        Ok(())
    }

    fn assign(&self, args: &kvm_irqfd) -> Result {
        let list = self.0.target();
        let irqs = &list.irqs;
        let resample = args.flags & KVM_IRQFD_FLAG_RESAMPLE != 0;
        match irqs.mode() {
            Mode::Kernel => {}
            Mode::Split if !resample => {}
            _ => return Err(EINVAL),
        }
        // For the order of the errors.
        drop(EventFd::from_fd(args.fd as i32)?);
        let mut fds = list.fds.lock();
        fds.reserve(1, GFP_KERNEL_ACCOUNT)?;
        let resampler = if resample {
            let eventfd = EventFd::from_fd(args.resamplefd as i32)?;
            Some(irqs.add_resampler(args.gsi, eventfd)?)
        } else {
            None
        };
        let fd = IrqFd {
            irqs: irqs.clone(),
            gsi: args.gsi,
            resampler: resampler.clone(),
            closed: AtomicBool::new(false),
            list: self.0.clone(),
        };
        let follower = KBox::try_pin_init(Follower::new(args.fd as i32, fd), GFP_KERNEL_ACCOUNT);
        match follower {
            Ok(follower) => Ok(fds.push(follower, GFP_KERNEL_ACCOUNT)?),
            Err(error) => {
                if let Some(resampler) = &resampler {
                    irqs.mark_resampler(resampler);
                    irqs.sweep_resamplers();
                }
                Err(error)
            }
        }
    }

    /// Takes all of them away. To be called before the last reference to the VM goes.
    pub(crate) fn release(&self) {
        self.0.target().remove(|_| true);
        self.0.cancel();
    }
}

impl Drop for IrqFds {
    fn drop(&mut self) {
        self.release();
    }
}
