// SPDX-License-Identifier: GPL-2.0

//! The x86 architecture, as a model: pure, without allocation, without `unsafe`.
#![forbid(unsafe_code)]

pub mod bits;
pub mod cpuid;
pub mod decode;
pub mod emulate;
pub mod exception;
pub mod insn;
pub mod msr;
pub mod paging;
pub mod regs;
pub mod segment;
