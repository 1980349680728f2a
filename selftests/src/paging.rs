// SPDX-License-Identifier: GPL-2.0

//! Random guest paging programs, and the model that says what must come of each.
//!
//! A program is a [`Setup`](op::Setup), which is tables and registers, and a list of [`Op`](op::Op)s: accesses,
//! writes to tables, invalidations, loads of control registers. The host compiles it to records in guest
//! memory which a small dispatcher in the guest executes without leaving the guest ([`code`]); each
//! leaves a record of what it saw. [`model`] walks the same tables by the walk of the `x86` crate and says what
//! each record and each byte of memory must be in the end.
//!
//! A processor may keep translations. So the model also keeps, for each page that programs use, the walks
//! whose results a processor could still have ([`tlb`]), and refuses an access on which these do not
//! agree: software has to invalidate first. [`generate`] makes programs without such accesses, so that
//! every observation has one right value.

mod begin;
pub mod code;
pub mod exec;
pub mod generate;

pub mod layout;
pub mod memory;
pub mod model;
pub mod op;
pub mod report;
pub mod shrink;
#[cfg(test)]
mod stubborn;

pub mod tlb;
