// SPDX-License-Identifier: GPL-2.0

//! The x86 architecture, as a model: pure, without allocation, without `unsafe`, without the kernel.
//!
//! Nothing here can panic on anything that a guest or a VMM controls: registers wrap, tables are searched, arrays are reached through
//! `get` or a mask. Guest memory is reached through [`paging::GuestMemory`], the processor's state through
//! [`emulate::Cpu`]; both are traits that the module implements and the tests do too.
//!
//! | module | what it answers |
//! |---|---|
//! | [`regs`] | general registers ([`Gpr`](regs::Gpr), [`Gprs`](regs::Gprs)), RFLAGS, CR0, CR3, CR4, EFER, XCR0, DR6, DR7 as types |
//! | [`exception`] | vectors, page-fault error codes, [`Fault`](exception::Fault): an exception to inject |
//! | [`segment`] | segment registers in the format of the VMCS, [`CpuMode`](segment::CpuMode), [`linearize`](segment::linearize) |
//! | [`vmentry`] | [`needs_emulation`](vmentry::needs_emulation): segments that a processor without "unrestricted guest" cannot be entered with |
//! | [`paging`] | [`Paging::translate`](paging::Paging::translate): a linear address to a guest-physical one, or a page fault |
//! | [`insn`], [`decode`] | bytes to an [`Insn`](insn::Insn) |
//! | [`emulate`] | [`Emulator::step`](emulate::Emulator::step): one instruction, resumed across device accesses |
//! | [`io`] | [`StringIo::prepare`](io::StringIo::prepare): the memory of INS and OUTS, in chunks |
//! | [`cpuid`] | [`supported`](cpuid::policy::supported), [`CpuidTable`](cpuid::table::CpuidTable), [`GuestFeatures`](cpuid::features::GuestFeatures) |
//! | [`msr`] | [`Msr::class`](msr::Msr::class), [`check_value`](msr::check_value), [`MsrState`](msr::state::MsrState) |
//! | [`cr`] | whether a control register, EFER, XCR0 or a debug register may get a value, and what follows |
//! | [`event`] | [`PendingEvents`](event::PendingEvents): what the next entry injects; double and triple faults |
//! | [`pv`] | what a guest that knows KVM can ask for: CPUID features, structures in its memory, hypercalls |
//! | [`apic`] | [`Apic`](apic::Apic): the local APIC |
//! | [`line`] | interrupt lines with several sources, and what comes of driving one |
//! | [`ioapic`] | [`Ioapic`](ioapic::Ioapic): pins to [`Message`](ioapic::entry::Message)s for the local APICs |
//! | [`pic`] | [`Pic`](pic::Pic): the pair of 8259A controllers |
//! | [`clock`] | the guest's time-stamp counter ([`GuestTsc`](clock::tsc::GuestTsc)), and kvmclock ([`VmClock`](clock::vm::VmClock)) |
//! | [`pit`] | [`Pit`](pit::Pit): the 8254 timer, the speaker's port, ticks that a guest is late for |
//!
//! `apic`, `line`, `ioapic`, `pic` and `pit` are for an interrupt controller in the kernel (KVM_CREATE_IRQCHIP,
//! KVM_CAP_SPLIT_IRQCHIP, KVM_CREATE_PIT2). Without one, the module uses the rules of IA32_APIC_BASE alone
//! ([`ApicBase`](apic::base::ApicBase)).
//!
//! The emulator, from the side of an EPT violation in no memory slot:
//!
//! ```text
//! emulator.set_hint(..);                        // optional: saves a walk of the guest's tables
//! loop {
//!     match emulator.step(&mut cpu, &mut memory) {
//!         Done(c)                    => break,  // c.single_step: raise #DB
//!         MmioRead { gpa, len }      => ..,     // read the device, or leave for userspace and come back;
//!                                               // then emulator.complete_read(data)
//!         MmioWrite { gpa, data, len } => ..,   // write the device, or leave for userspace and come back
//!         Fault(f)                   => break,  // events.raise(f.into())
//!         Unhandled                  => break,  // internal error, with emulator.insn_bytes()
//!         Host(e)                    => break,
//!     }
//! }
//! ```

#![forbid(unsafe_code)]
// Public for the crate that the host tests; in the module, a private tree.
#![allow(unreachable_pub)]
// A model of the architecture is whole; the module asks for less, and the tests for all of it.
#![allow(dead_code)]

pub mod apic;
pub mod bits;
pub mod clock;
pub mod cpuid;
pub mod cr;
pub mod decode;
pub mod emulate;
pub mod event;
pub mod exception;
pub mod insn;
pub mod io;
pub mod ioapic;
pub mod line;
pub mod mce;
pub mod msr;
pub mod paging;
pub mod pic;
pub mod pit;
pub mod pv;
pub mod regs;
pub mod segment;
pub mod vmentry;
