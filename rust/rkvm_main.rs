// SPDX-License-Identifier: GPL-2.0

//! rkvm: the KVM core.
//!
//! `/dev/rkvm` speaks the KVM API. The tree is the table of contents:
//!
//! | module | what |
//! |---|---|
//! | [`abi`] | the numbers and structures that user space sees |
//! | [`system`], [`vm`], [`vcpu`] | the three kinds of file and their ioctls |
//! | [`run`] | KVM_RUN: enter, exit, dispatch |
//! | [`bus`], [`coalesced`], [`ioeventfd`] | what of a guest's I/O stays in the kernel |
//! | [`irq`] | interrupts, from devices to the local APICs |
//! | [`apics`], [`lapic`] | the local APICs, as others and as their vCPUs see them |
//! | [`backend`], [`vmx`] | the seam to the processor, and Intel's side of it |
//! | [`pv`] | what a guest that knows KVM has asked for |
//! | [`x86`] | the architecture as a model, without the kernel |
//! | [`mem`], [`mmu`], [`tlb`] | memslots, the tables that map them, and who must flush |
//! | [`time`] | guest time: counters, and the clock that is computed from them |
//! | [`stats`] | what is counted, and the files to read it |
//! | [`linux`] | kernel services that the `kernel` crate lacks |

#![crate_name = "rkvm"]

use backend::Backend;
use kernel::prelude::*;
use kernel::sync::Arc;
use linux::file::Chrdev;
use system::Machine;
use system::System;
use vmx::Vmx;

mod abi;
mod apics;
mod arch;
mod backend;
mod bindings;
mod bus;
mod coalesced;
mod events;
mod ioeventfd;
mod irq;
mod lapic;
mod linux;
mod mem;
mod mmu;
mod msr_filter;
mod options;
mod pv;
mod run;
mod run_page;
mod stats;
mod system;
mod time;
mod tlb;
mod vcpu;
mod vm;
mod vmx;
mod x86;

module! {
    type: RkvmModule,
    name: "rkvm",
    authors: ["The rkvm developers"],
    description: "Kernel-based virtual machines, in Rust",
    license: "GPL v2",
    params: {
        pml: u8 {
            default: 1,
            description: "Let the processor log the guest's writes, if it can (default 1)",
        },
        apicv: u8 {
            default: 1,
            description: "Let the processor deliver the guest's interrupts, if it can (default 1)",
        },
        halt_poll_ns: u32 {
            default: 200000,
            description: "How long a halted vCPU waits without giving up its CPU, at most (default 200000)",
        },
        preemption_timer: u8 {
            default: 1,
            description: "Use the VMX-preemption timer for the guest's, if there is one (default 1)",
        },
        ept: u8 {
            default: 1,
            description: "Have the processor translate guest-physical addresses, if it can (default 1)",
        },
        unrestricted_guest: u8 {
            default: 1,
            description: "Let guests run without paging and in real mode, if the processor can (default 1)",
        },
        mmu_audit: u32 {
            default: 0,
            description: "Check all shadow page tables at each so many page faults of a vCPU (default 0: never)",
        },
        tsc_scaling: u8 {
            default: 1,
            description: "Have the processor scale the guest's time-stamp counter, if it can (default 1)",
        },
    },
}

/// What the module was told when it was loaded.
mod parameters {
    /// Page-modification logging may be used.
    pub(crate) fn pml() -> bool {
        *crate::module_parameters::pml.value() != 0
    }

    /// Interrupts may be delivered by the processor.
    pub(crate) fn apicv() -> bool {
        *crate::module_parameters::apicv.value() != 0
    }

    /// How long a halted vCPU waits without giving up its CPU, at most, in nanoseconds.
    pub(crate) fn halt_poll_ns() -> u32 {
        *crate::module_parameters::halt_poll_ns.value()
    }

    /// The VMX-preemption timer may be used.
    pub(crate) fn preemption_timer() -> bool {
        *crate::module_parameters::preemption_timer.value() != 0
    }

    /// Extended page tables may be used.
    pub(crate) fn ept() -> bool {
        *crate::module_parameters::ept.value() != 0
    }

    /// Guests may run without paging and in real mode.
    pub(crate) fn unrestricted_guest() -> bool {
        *crate::module_parameters::unrestricted_guest.value() != 0
    }

    /// At each so many page faults of a vCPU all shadow tables are checked; 0: never.
    pub(crate) fn mmu_audit() -> u32 {
        *crate::module_parameters::mmu_audit.value()
    }

    /// The processor may scale guests' time-stamp counters.
    pub(crate) fn tsc_scaling() -> bool {
        *crate::module_parameters::tsc_scaling.value() != 0
    }
}

/// The module, while it is loaded.
struct RkvmModule {
    /// First to go, so that nobody opens what is about to end.
    _device: Pin<KBox<Chrdev<System<Vmx>>>>,
    _installed: Installed,
}

impl kernel::Module for RkvmModule {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let backend = Vmx::new()?;
        let installed = Installed::new(Arc::new(Machine::new(backend)?, GFP_KERNEL)?);
        let device = KBox::pin_init(Chrdev::register(c"rkvm"), GFP_KERNEL)?;
        pr_info!("ready at /dev/rkvm\n");
        Ok(Self {
            _device: device,
            _installed: installed,
        })
    }
}

/// The machine can be asked for while this lives.
struct Installed;

impl Installed {
    fn new(machine: Arc<Machine<Vmx>>) -> Self {
        Vmx::install(Some(machine));
        Self
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        // Every file holds the module, so none is left, and with them went the VMs.
        Vmx::install(None);
    }
}
