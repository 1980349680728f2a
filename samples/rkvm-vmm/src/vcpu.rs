// SPDX-License-Identifier: GPL-2.0

//! A vCPU's thread: enter the guest, look at why it came out, do what it wants, again.
//!
//! Where the kernel has local APICs, interrupts are none of its business. Where the controllers are on
//! the board, they are given by KVM_INTERRUPT, one at a time and only when KVM said at the last exit that
//! the guest can take one; otherwise KVM is asked to exit when it can (`request_interrupt_window`).

use std::sync::atomic::compiler_fence;
use std::sync::atomic::Ordering;

use kvm_bindings::kvm_interrupt;
use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuExit;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::board::Board;
use crate::board::Shared;
use crate::board::VcpuState;
use crate::bus;
use crate::dump;
use crate::kvm::counters;
use crate::memory::Memory;
use crate::outcome::Outcome;
use crate::signals::Kickable;
use crate::stats;
use crate::stats::Stats;
use crate::time;
use crate::time::Nanos;

// kvm-ioctls wraps every ioctl that is used here but this one.
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);

const RFLAGS_IF: u64 = 1 << 9;

/// Why KVM_RUN returned, free of borrows.
enum Exit {
    /// Port access: `data` is in the vCPU's mapping, to be read or filled before the next KVM_RUN.
    Io {
        port: u16,
        write: bool,
        data: *mut [u8],
    },
    /// Access to an address without memory: `data` as before.
    Mmio {
        address: u64,
        write: bool,
        data: *mut [u8],
    },
    /// A local APIC ended an interrupt of this vector, which the I/O APIC is to know.
    EndOfInterrupt(u8),
    /// Handled; nothing is left to do.
    Done,
    Hlt,
    /// A signal.
    Interrupted,
    Shutdown,
    InternalError,
    End(Outcome),
}

/// A vCPU, and what its thread needs.
pub struct Vcpu<'a> {
    /// Its number.
    pub id: usize,
    /// The kernel's side of it.
    pub fd: VcpuFd,
    /// The guest's memory, to show code from.
    pub memory: &'a Memory,
    /// What it has in common with the others.
    pub shared: &'a Shared,
    /// What it counts.
    pub stats: Stats,
    /// Write a line for every exit.
    pub trace: bool,
    /// A triple fault is how this guest resets.
    pub triple_fault_resets: bool,
}

impl Vcpu<'_> {
    /// Runs the guest to its end, of which the board then has the outcome.
    pub fn run(&mut self) {
        let shared = self.shared;
        let immediate_exit = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: the pointer is into the vCPU's mapping, which `fd` keeps for longer than this
        // function runs; this thread is the one to run it.
        let kickable = unsafe { Kickable::new(immediate_exit) };
        let mut board = shared.lock();
        match &kickable {
            Ok(kickable) => board.vcpus[self.id].kicker = Some(kickable.kicker()),
            Err(err) => board.finish(Outcome::Ioctl(format!("{err:#}"))),
        }
        loop {
            // Before the board is looked at: a kick that comes after that look sets it again.
            self.fd.set_kvm_immediate_exit(0);
            compiler_fence(Ordering::SeqCst);
            if std::mem::take(&mut board.vcpus[self.id].dump_requested) {
                self.show();
            }
            if let Err(outcome) = self.deliver_interrupt(&mut board) {
                board.finish(outcome);
            }
            if board.outcome.is_some() {
                break;
            }
            drop(board);
            let exit = self.enter();
            board = shared.lock();
            board.vcpus[self.id].state = VcpuState::Running;
            match exit {
                Exit::Mmio {
                    address,
                    write,
                    data,
                } => self.mmio(&mut board, address, write, data),
                Exit::EndOfInterrupt(vector) => board.end_of_interrupt(vector),
                Exit::Io { port, write, data } => self.io(&mut board, port, write, data),
                Exit::Done | Exit::Interrupted => {}
                Exit::Hlt if !board.gives_interrupts() => {
                    board.finish(Outcome::UnexpectedExit(
                        "KVM_EXIT_HLT, where the kernel has the local APICs".into(),
                    ));
                }
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
        }
        board.flush();
        // Behind this nobody kicks this thread, which may end.
        board.vcpus[self.id].kicker = None;
        board.vcpus[self.id].state = VcpuState::Stopped;
        shared.ring.ring();
    }

    /// Gives the guest a pending interrupt, or asks to be told when it can take one.
    fn deliver_interrupt(&mut self, board: &mut Board) -> Result<(), Outcome> {
        let run = self.fd.get_kvm_run();
        let ready = run.ready_for_interrupt_injection != 0 && run.if_flag != 0;
        let vector = (ready && board.intr()).then(|| board.acknowledge());
        if let Some(vector) = vector.flatten() {
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
        board.vcpus[self.id].state = if more {
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
            Ok(VcpuExit::MmioRead(address, data)) => Exit::Mmio {
                address,
                write: false,
                data,
            },
            Ok(VcpuExit::MmioWrite(address, data)) => Exit::Mmio {
                address,
                write: true,
                data: std::ptr::from_ref(data).cast_mut(),
            },
            Ok(VcpuExit::IoapicEoi(vector)) => Exit::EndOfInterrupt(vector),
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
                Exit::Io { .. } | Exit::Mmio { .. } => {}
                _ => eprintln!("{} ({reason})", stats::exit_name(reason)),
            }
        }
        exit
    }

    /// Does a load or store where there is no memory.
    fn mmio(&mut self, board: &mut Board, address: u64, write: bool, data: *mut [u8]) {
        // SAFETY: `data` lies in the vCPU's `kvm_run`, and KVM does not touch it before the next
        // KVM_RUN, which only this thread starts. Nothing else refers to it now.
        let data = unsafe { &mut *data };
        self.stats.mmio(address, write);
        if write {
            board.write_address(address, data);
        } else {
            board.read_address(address, data);
        }
        if self.trace {
            let direction = if write { "write" } else { "read" };
            let name = bus::address_name(address);
            eprintln!("{direction} at {address:#x} ({name}) data {data:02x?}");
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
        if write && port == bus::MARK_PORT {
            if let Some(number) = data.first() {
                self.mark(*number);
            }
        }
        // Ticks and flushes that this access may have scheduled.
        board.arm(&self.shared.timer);
        if board.input_blocked && board.input_room() > 0 {
            board.input_blocked = false;
            self.shared.ring.ring();
        }
    }

    /// Tells what the kernel has counted of this vCPU up to here.
    fn mark(&self, number: u8) {
        match counters::read(&self.fd) {
            Ok(counts) => eprintln!("mark {number}: {}", counts.join(" ")),
            Err(err) => eprintln!("mark {number}: no counts: {err}"),
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
        board.vcpus[self.id].state = VcpuState::Halted;
        let since: Nanos = time::now();
        while !board.wants_attention(self.id) {
            board = self
                .shared
                .wake
                .wait(board)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        board.vcpus[self.id].state = VcpuState::Running;
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
            "vCPU {}:\n{}{}",
            self.id,
            dump::registers(&self.fd, self.memory),
            self.stats.report(time::now())
        );
    }
}
