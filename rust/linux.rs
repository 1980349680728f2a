// SPDX-License-Identifier: GPL-2.0

//! Safe wrappers over kernel services that the `kernel` crate lacks.
//!
//! One service a file. Each makes its misuse not compile where it can, by a guard or a type, and
//! says in a `# Safety` section what is left to the caller where it cannot.

pub(crate) mod clock;
pub(crate) mod cpu;
pub(crate) mod debug;
pub(crate) mod eventfd;
pub(crate) mod file;
pub(crate) mod fpu;
pub(crate) mod hrtimer;
pub(crate) mod ipi;
pub(crate) mod irq;
pub(crate) mod mm;
pub(crate) mod mmu_notifier;
pub(crate) mod msr;
pub(crate) mod mutex;
pub(crate) mod page;
pub(crate) mod power;
pub(crate) mod preempt;
pub(crate) mod rwlock;
pub(crate) mod shrinker;
pub(crate) mod spinlock;
pub(crate) mod srcu;
pub(crate) mod task;
pub(crate) mod user;
pub(crate) mod wait;
pub(crate) mod work;

/// ENOSPC, which the kernel crate does not name.
pub(crate) fn no_space() -> kernel::error::Error {
    kernel::error::Error::from_errno(-(kernel::bindings::ENOSPC as i32))
}

/// EOPNOTSUPP, which the kernel crate does not name.
pub(crate) fn unsupported() -> kernel::error::Error {
    kernel::error::Error::from_errno(-(kernel::bindings::EOPNOTSUPP as i32))
}
