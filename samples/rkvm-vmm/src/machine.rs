// SPDX-License-Identifier: GPL-2.0

//! A run of the machine: its threads, from the first to the last, and what is told about its end.

use std::io;
use std::sync::Arc;
use std::thread;

use anyhow::Context;
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemory;
use vm_memory::GuestMemoryRegion;

use crate::board::Board;
use crate::board::Shared;
use crate::board::VcpuState;
use crate::cli::Cli;
use crate::cli::Plan;
use crate::cli::TripleFault;
use crate::cli::Virtio;
use crate::dump;
use crate::events::Events;
use crate::events::Ring;
use crate::events::Timer;
use crate::kvm::Vm;
use crate::memory::Memory;
use crate::memory::HOLE_END;
use crate::outcome::Outcome;
use crate::signals::Incoming;
use crate::stats::Stats;
use crate::terminal::RawMode;
use crate::time;
use crate::time::SECOND;
use crate::vcpu::Vcpu;
use crate::virtio::block::Block;
use crate::virtio::console::Console;
use crate::virtio::console::Input;
use crate::virtio::mmio::Mmio;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::Device;

/// Runs the guest until it has ended, and shows what is to be shown about that.
///
/// # Errors
/// Something could not be set up; the guest has not run.
pub fn run(
    vm: &Vm,
    vcpus: Vec<VcpuFd>,
    memory: &Memory,
    plan: &Plan,
    cli: &Cli,
) -> anyhow::Result<Outcome> {
    let signals = Incoming::new()?;
    let now = time::now();
    let ring = Ring::new()?;
    let mut board = Board::new(
        vm.interrupts(),
        plan.cpus.into(),
        ram(memory),
        io::stdout(),
        cli.timeout.map(|seconds| now + seconds * SECOND),
    );
    plug_virtio(vm, memory, plan, &mut board, &ring)?;
    let shared = Arc::new(Shared::new(board, Timer::new()?, ring));
    let raw_mode = RawMode::enter();
    let events = Events::new(shared.clone(), signals, cli.timeout.unwrap_or_default());
    let events = thread::Builder::new()
        .name("events".into())
        .spawn(move || events.run())
        .context("cannot start the event thread")?;

    let mut vcpus: Vec<_> = vcpus
        .into_iter()
        .enumerate()
        .map(|(id, fd)| Vcpu {
            id,
            fd,
            memory,
            shared: &shared,
            stats: Stats::new(cli.stats, now),
            trace: cli.trace_exits,
            triple_fault_resets: cli.triple_fault == TripleFault::Reset,
        })
        .collect();
    run_all(&mut vcpus);
    // The thread has nothing left to do; had it panicked, its message was printed.
    let _ = events.join();
    drop(raw_mode);
    let outcome = shared.lock().outcome.clone();
    let outcome = outcome.context("the vCPUs have stopped for no reason")?;
    if outcome.wants_dump() {
        for vcpu in &vcpus {
            if vcpus.len() > 1 {
                eprintln!("vCPU {}:", vcpu.id);
            }
            eprint!("{}", dump::registers(&vcpu.fd, memory));
        }
    }
    if cli.stats || outcome.wants_dump() {
        let mut sum = Stats::new(cli.stats, now);
        for vcpu in &vcpus {
            sum.add(&vcpu.stats);
        }
        eprint!("{}", sum.report(time::now()));
    }
    Ok(outcome)
}

/// Makes the virtio devices, and connects them to the guest.
fn plug_virtio(
    vm: &Vm,
    memory: &Memory,
    plan: &Plan,
    board: &mut Board,
    ring: &Ring,
) -> anyhow::Result<()> {
    for (number, device) in plan.virtio.iter().enumerate() {
        let device: Box<dyn Device> = match device {
            Virtio::Disk(disk) => Box::new(Block::open(&disk.file, disk.read_only)?),
            Virtio::Console => {
                let input = Arc::new(Input::new(ring.try_clone()?)?);
                board.set_console(input.clone());
                Box::new(Console::new(input))
            }
            Virtio::Net(tap) => Box::new(Net::open(&tap.name, tap.vhost, memory)?),
            Virtio::Rng => Box::new(Rng::open()?),
        };
        let device = Mmio::new(device, memory.clone()).context("cannot make a virtio device")?;
        vm.attach(number, &device)?;
        board.plug(device);
    }
    Ok(())
}

/// Runs each vCPU in a thread, the first in this one, until all have stopped.
fn run_all(vcpus: &mut [Vcpu<'_>]) {
    let Some((first, others)) = vcpus.split_first_mut() else {
        return;
    };
    let shared = first.shared;
    thread::scope(|scope| {
        for vcpu in others {
            let id = vcpu.id;
            let started = thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn_scoped(scope, move || vcpu.run());
            if let Err(err) = started {
                let mut board = shared.lock();
                board.vcpus[id].state = VcpuState::Stopped;
                board.finish(Outcome::Ioctl(format!(
                    "cannot start the thread of vCPU {id}: {err}"
                )));
            }
        }
        first.run();
    });
}

/// Returns how much RAM there is below and above 4 GiB.
fn ram(memory: &Memory) -> (u64, u64) {
    let sum = |above: bool| {
        memory
            .iter()
            .filter(|region| (region.start_addr().0 >= HOLE_END) == above)
            .map(|region| region.len())
            .sum()
    };
    (sum(false), sum(true))
}
