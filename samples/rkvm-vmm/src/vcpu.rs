// SPDX-License-Identifier: GPL-2.0

//! The vCPU's thread: enter the guest, look at why it came out, do what it wants, again.
//!
//! Interrupts are given by KVM_INTERRUPT, one at a time and only when KVM said at the last exit that
//! the guest can take one; otherwise KVM is asked to exit when it can (`request_interrupt_window`).

use std::io;
use std::sync::atomic::compiler_fence;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::thread;

use anyhow::Context;
use kvm_bindings::kvm_interrupt;
use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuExit;
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemory;
use vm_memory::GuestMemoryRegion;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::board::Board;
use crate::board::Shared;
use crate::board::VcpuState;
use crate::cli::Cli;
use crate::cli::TripleFault;
use crate::dump;
use crate::events::Events;
use crate::events::Ring;
use crate::events::Timer;
use crate::memory::Memory;
use crate::memory::HOLE_END;
use crate::outcome::Outcome;
use crate::signals::Incoming;
use crate::signals::Kicker;
use crate::stats;
use crate::stats::Stats;
use crate::terminal::RawMode;
use crate::time;
use crate::time::Nanos;
use crate::time::SECOND;

// kvm-ioctls wraps every ioctl that is used here but this one.
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);

const RFLAGS_IF: u64 = 1 << 9;

/// Runs the guest in this thread until it has ended, and shows what is to be shown about that.
///
/// # Errors
/// Something could not be set up; the guest has not run.
pub fn run(mut fd: VcpuFd, memory: &Memory, cli: &Cli) -> anyhow::Result<Outcome> {
    let signals = Incoming::new()?;
    let immediate_exit = &raw mut fd.get_kvm_run().immediate_exit;
    // SAFETY: the pointer is into the vCPU's mapping, which `fd` keeps until after `forget` below;
    // this thread is the one to run it.
    let kicker = unsafe { Kicker::new(immediate_exit)? };
    let now = time::now();
    let ram = |above: bool| -> u64 {
        memory
            .iter()
            .filter(|region| (region.start_addr().0 >= HOLE_END) == above)
            .map(|region| region.len())
            .sum()
    };
    let board = Board::new(
        ram(false),
        ram(true),
        io::stdout(),
        cli.timeout.map(|seconds| now + seconds * SECOND),
    );
    let shared = Arc::new(Shared::new(board, Timer::new()?, Ring::new()?));
    let raw_mode = RawMode::enter();
    let events = Events::new(
        shared.clone(),
        kicker,
        signals,
        cli.timeout.unwrap_or_default(),
    );
    let events = thread::Builder::new()
        .name("events".into())
        .spawn(move || events.run())
        .context("cannot start the event thread")?;

    let mut vcpu = Vcpu {
        fd,
        memory,
        shared: &shared,
        stats: Stats::new(cli.stats, now),
        trace: cli.trace_exits,
        triple_fault_resets: cli.triple_fault == TripleFault::Reset,
    };
    let outcome = vcpu.run();
    // The thread has nothing left to do; had it panicked, its message was printed.
    let _ = events.join();
    kicker.forget();
    drop(raw_mode);
    if outcome.wants_dump() {
        eprint!("{}", dump::registers(&vcpu.fd, memory));
    }
    if cli.stats || outcome.wants_dump() {
        eprint!("{}", vcpu.stats.report(time::now()));
    }
    Ok(outcome)
}

/// Why KVM_RUN returned, free of borrows.
enum Exit {
    /// Port access: `data` is in the vCPU's mapping, to be read or filled before the next KVM_RUN.
    Io {
        port: u16,
        write: bool,
        data: *mut [u8],
    },
    /// Handled; nothing is left to do.
    Done,
    Hlt,
    /// A signal.
    Interrupted,
    Shutdown,
    InternalError,
    End(Outcome),
}

struct Vcpu<'a> {
    fd: VcpuFd,
    memory: &'a Memory,
    shared: &'a Shared,
    stats: Stats,
    trace: bool,
    triple_fault_resets: bool,
}

impl Vcpu<'_> {
    /// Runs the guest to its end.
    fn run(&mut self) -> Outcome {
        let shared = self.shared;
        let mut board = shared.lock();
        let outcome = loop {
            // Before the board is looked at: a kick that comes after that look sets it again.
            self.fd.set_kvm_immediate_exit(0);
            compiler_fence(Ordering::SeqCst);
            if std::mem::take(&mut board.dump_requested) {
                self.show();
            }
            if let Err(outcome) = self.deliver_interrupt(&mut board) {
                board.finish(outcome);
            }
            if let Some(outcome) = &board.outcome {
                break outcome.clone();
            }
            drop(board);
            let exit = self.enter();
            board = shared.lock();
            board.vcpu = VcpuState::Running;
            match exit {
                Exit::Io { port, write, data } => self.io(&mut board, port, write, data),
                Exit::Done | Exit::Interrupted => {}
                Exit::Hlt => board = self.halt(board),
                Exit::Shutdown => board.finish(Outcome::TripleFault {
                    expected: self.triple_fault_resets,
                }),
                Exit::InternalError => {
                    let outcome = self.internal_error();
                    board.finish(outcome);
                }
                Exit::End(outcome) => board.finish(outcome),
            }
        };
        board.flush();
        board.vcpu = VcpuState::Stopped;
        shared.ring.ring();
        outcome
    }

    /// Gives the guest a pending interrupt, or asks to be told when it can take one.
    fn deliver_interrupt(&mut self, board: &mut Board) -> Result<(), Outcome> {
        let run = self.fd.get_kvm_run();
        let ready = run.ready_for_interrupt_injection != 0 && run.if_flag != 0;
        if ready && board.intr() {
            let vector = board.acknowledge();
            let interrupt = kvm_interrupt { irq: vector.into() };
            // SAFETY: the descriptor is a vCPU's, the structure is the one that the ioctl takes.
            if unsafe { ioctl_with_ref(&self.fd, KVM_INTERRUPT(), &interrupt) } < 0 {
                return Err(Outcome::Ioctl(format!(
                    "KVM_INTERRUPT with vector {vector:#x} failed: {}; KVM had said that the guest \
                     was ready for an interrupt",
                    errno::Error::last()
                )));
            }
            self.stats.interrupt(vector);
            if self.trace {
                eprintln!("KVM_INTERRUPT vector {vector:#x}");
            }
        }
        let more = board.intr();
        self.fd.get_kvm_run().request_interrupt_window = more.into();
        board.vcpu = if more {
            VcpuState::AwaitingWindow
        } else {
            VcpuState::Running
        };
        Ok(())
    }

    /// One KVM_RUN.
    fn enter(&mut self) -> Exit {
        let exit = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => Exit::Io {
                port,
                write: false,
                data,
            },
            Ok(VcpuExit::IoOut(port, data)) => Exit::Io {
                port,
                write: true,
                data: std::ptr::from_ref(data).cast_mut(),
            },
            Ok(VcpuExit::MmioRead(address, data)) => {
                // Where there is no memory there is nothing: the bus floats high.
                data.fill(0xff);
                self.stats.mmio(address, false);
                self.trace_mmio("read", address);
                Exit::Done
            }
            Ok(VcpuExit::MmioWrite(address, _)) => {
                self.stats.mmio(address, true);
                self.trace_mmio("write", address);
                Exit::Done
            }
            // A lower task priority than before matters only to a local APIC.
            Ok(VcpuExit::IrqWindowOpen | VcpuExit::SetTpr) => Exit::Done,
            Ok(VcpuExit::Hlt) => Exit::Hlt,
            Ok(VcpuExit::Intr) => Exit::Interrupted,
            Ok(VcpuExit::Shutdown) => Exit::Shutdown,
            Ok(VcpuExit::InternalError) => Exit::InternalError,
            Ok(VcpuExit::FailEntry(reason, cpu)) => Exit::End(Outcome::FailEntry { reason, cpu }),
            Ok(VcpuExit::Unknown) => Exit::End(Outcome::UnknownExit(0)),
            Ok(other) => Exit::End(Outcome::UnexpectedExit(format!("{other:?}"))),
            Err(err) if matches!(err.errno(), libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
            Err(err) => Exit::End(Outcome::Ioctl(format!(
                "KVM_RUN failed: {err}; the state it was called in is the registers above"
            ))),
        };
        let run = self.fd.get_kvm_run();
        let reason = run.exit_reason;
        match exit {
            Exit::Interrupted => self.stats.signal(),
            Exit::End(Outcome::Ioctl(_)) => {}
            Exit::End(Outcome::UnknownExit(_)) => {
                self.stats.exit(reason);
                // SAFETY: this is the member of the union that belongs to KVM_EXIT_UNKNOWN, and any
                // bytes are a number.
                let hardware = unsafe { run.__bindgen_anon_1.hw.hardware_exit_reason };
                return Exit::End(Outcome::UnknownExit(hardware));
            }
            _ => self.stats.exit(reason),
        }
        if self.trace {
            match &exit {
                Exit::Interrupted => eprintln!("out by a signal"),
                // Traced with their data.
                Exit::Io { .. } => {}
                _ => eprintln!("{} ({reason})", stats::exit_name(reason)),
            }
        }
        exit
    }

    fn trace_mmio(&self, what: &str, address: u64) {
        if self.trace {
            eprintln!("MMIO {what} at {address:#x}, where there is no memory");
        }
    }

    /// Does an IN, OUT, INS or OUTS.
    fn io(&mut self, board: &mut Board, port: u16, write: bool, data: *mut [u8]) {
        let run = self.fd.get_kvm_run();
        // SAFETY: the caller has just seen KVM_EXIT_IO, to which this member of the union belongs.
        let size = usize::from(unsafe { run.__bindgen_anon_1.io.size }).max(1);
        // SAFETY: `data` lies in the vCPU's mapping, behind `kvm_run`, and KVM does not touch it
        // before the next KVM_RUN, which only this thread starts. Nothing else refers to it now.
        let data = unsafe { &mut *data };
        let now = time::now();
        self.stats.port(port, write, (data.len() / size) as u64);
        for turn in data.chunks_mut(size) {
            if write {
                board.write_port(port, turn, now);
            } else {
                board.read_port(port, turn, now);
            }
        }
        if self.trace {
            let direction = if write { "out" } else { "in " };
            eprintln!("{direction} {port:#06x} size {size} data {data:02x?}");
        }
        // Ticks and flushes that this access may have scheduled.
        board.arm(&self.shared.timer);
        if board.input_blocked && board.input_room() > 0 {
            board.input_blocked = false;
            self.shared.ring.ring();
        }
    }

    /// HLT: waits for an interrupt, or ends the guest if it cannot take one.
    fn halt<'b>(
        &mut self,
        mut board: std::sync::MutexGuard<'b, Board>,
    ) -> std::sync::MutexGuard<'b, Board> {
        if self.fd.get_kvm_run().if_flag == 0 {
            let outcome = match self.fd.get_regs() {
                Ok(regs) if regs.rflags & RFLAGS_IF == 0 => Outcome::Halted,
                Ok(_) => Outcome::Ioctl(
                    "KVM_EXIT_HLT with if_flag 0 in kvm_run, but RFLAGS has IF set: the kernel \
                     module contradicts itself"
                        .into(),
                ),
                Err(err) => Outcome::Ioctl(format!("KVM_GET_REGS failed: {err}")),
            };
            board.finish(outcome);
            return board;
        }
        board.flush();
        board.vcpu = VcpuState::Halted;
        let since: Nanos = time::now();
        while !board.wants_attention() {
            board = self
                .shared
                .wake
                .wait(board)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        board.vcpu = VcpuState::Running;
        self.stats.halted(time::now() - since);
        board
    }

    fn internal_error(&mut self) -> Outcome {
        let run = self.fd.get_kvm_run();
        // SAFETY: the caller has just seen KVM_EXIT_INTERNAL_ERROR, to which this member of the union
        // belongs; it is plain numbers.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let count = (internal.ndata as usize).min(internal.data.len());
        Outcome::InternalError {
            suberror: internal.suberror,
            data: internal.data[..count].to_vec(),
        }
    }

    /// Registers and counts, for the person who asked.
    fn show(&self) {
        eprint!(
            "{}{}",
            dump::registers(&self.fd, self.memory),
            self.stats.report(time::now())
        );
    }
}
