// SPDX-License-Identifier: GPL-2.0

//! The VM's interrupt controllers.

use crate::apics::Apics;
use crate::x86::apic::message::Identity;
use core::sync::atomic::AtomicU8;
use core::sync::atomic::Ordering;
use kernel::prelude::*;
use kernel::sync::Arc;

/// Which of them are in the kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    None,
    Split,
    Kernel,
}

/// The interrupt controllers of a VM.
pub(crate) struct Irqs {
    mode: AtomicU8,
}

impl Irqs {
    pub(crate) fn new(_apics: &Arc<Apics>) -> Result<Arc<Self>> {
        Ok(Arc::new(
            Self {
                mode: AtomicU8::new(0),
            },
            GFP_KERNEL_ACCOUNT,
        )?)
    }

    pub(crate) fn set_split(&self) {
        self.mode.store(1, Ordering::Relaxed);
    }

    pub(crate) fn mode(&self) -> Mode {
        match self.mode.load(Ordering::Relaxed) {
            0 => Mode::None,
            1 => Mode::Split,
            _ => Mode::Kernel,
        }
    }

    pub(crate) fn eoi_vectors(&self, _who: &Identity, _held: &dyn Fn(u8) -> bool) -> [u64; 4] {
        [0; 4]
    }

    pub(crate) fn eoi(&self, _vector: u8, _level: bool) {}

    pub(crate) fn pic_pending(&self) -> bool {
        false
    }

    pub(crate) fn pic_acknowledge(&self) -> u8 {
        0
    }
}
