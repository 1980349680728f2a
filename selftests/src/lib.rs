// SPDX-License-Identifier: GPL-2.0

//! Tests of the KVM API as `rkvm` implements it.
//!
//! Each binary of this package is a subject: it opens the device that `--device` names (by default
//! `/dev/rkvm`), runs its tests one by one, each in a process of its own, and writes TAP version 13.
//! The expectations are those of `Documentation/virt/kvm/api.rst` and of the in-tree KVM: every test
//! that is not about the module's own name passes on `/dev/kvm` as well.

pub mod apic;
pub mod backing;
pub mod check;
pub mod dirty;
pub mod eventfd;
pub mod gdb;
pub mod guest;
#[cfg(test)]
mod harness_tests;
pub mod host;
pub mod irq;
pub mod machine;
pub mod mem;
pub mod msr;
pub mod ops;
pub mod paging;
pub mod power;
pub mod pressure;
pub mod probe;
pub mod qemu;
pub mod ring;
pub mod smp;
pub mod snapshot;
pub mod stats;
pub mod sys;
pub mod tap;
pub mod trial;
pub mod uffd;
pub mod verifier;
pub mod vm;

pub use check::{Outcome, Verdict};
pub use tap::{Env, Test};
