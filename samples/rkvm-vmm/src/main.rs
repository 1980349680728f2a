// SPDX-License-Identifier: GPL-2.0

//! `rkvm-vmm`: a sample virtual machine monitor for the KVM API.
//!
//! It boots a Linux kernel, or runs a flat binary, through any device node that speaks the KVM API
//! (`/dev/rkvm`, `/dev/kvm`). Every device of the guest's machine is emulated here, in userspace, but
//! those interrupt controllers that the kernel is asked for.
//!
//! The way through the program: [`cli`] says what to run, [`memory`] makes the guest's RAM, [`boot`]
//! fills it and says how the first vCPU starts, [`kvm`] makes the VM and the vCPUs, [`board`] is the
//! machine around them with its [`interrupts`] and [`virtio`] devices, [`events`] the thread that waits for time and input
//! on their behalf, [`vcpu`] the loop that runs each of them, and [`machine`] has all these threads
//! until there is an [`outcome`].

mod board;
mod boot;
mod bus;
mod cli;
mod devices;
mod dump;
mod events;
mod interrupts;
mod kvm;
mod machine;
mod memory;
mod outcome;
mod signals;
mod stats;
mod terminal;
mod time;
mod vcpu;
mod virtio;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::Parser;

use crate::cli::Cli;
use crate::outcome::Outcome;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(err) => {
            // A failure to print leaves nothing better to do than the status itself.
            let _ = err.print();
            return match err.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(outcome::STATUS_SETUP),
            };
        }
    };
    terminal::restore_on_panic();
    match run(&cli) {
        Ok(outcome) => {
            eprintln!("rkvm-vmm: {outcome}");
            if let Outcome::Signal(signal) = outcome {
                // Whoever waits for us is to see that this signal ended us.
                signals::die_by(signal);
            }
            ExitCode::from(outcome.status())
        }
        Err(err) => {
            eprintln!("rkvm-vmm: {err:#}");
            ExitCode::from(outcome::STATUS_SETUP)
        }
    }
}

/// Builds the machine that the command line describes and runs it to its end.
fn run(cli: &Cli) -> anyhow::Result<Outcome> {
    let plan = cli.plan()?;
    // Read and check the guest's image before the device: a wrong path is told at once, and on a
    // machine with no KVM at all.
    let memory = memory::allocate(plan.memory)?;
    let entry = boot::load(&plan.image, &memory, plan.acpi().as_ref())?;
    let vm = kvm::Vm::new(&cli.device, &memory, plan.irqchip)?;
    let vcpus = vm.create_vcpus(plan.cpus, &entry)?;
    machine::run(&vm, vcpus, &memory, &plan, cli)
}
