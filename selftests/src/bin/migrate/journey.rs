// SPDX-License-Identifier: GPL-2.0

//! A guest on its way from process to process.

use super::code::*;
use super::vmm::*;
use kvm_bindings as kb;
use selftests::guest::{at, sel, set_gate, usize_of};
use selftests::host::{gettid, interrupting_handler, kick, Rng};
use selftests::machine::{cr, set_special_pages, start_vcpu, Mode};
use selftests::mem::Mapping;
use selftests::snapshot::{self, Chips, Order, Snapshot};
use selftests::vm::{Cpuid, Kvm, Vcpu, Vm};
use selftests::{ensure, ensure_eq, fail, guest, sys};
use selftests::{Outcome, Verdict};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

/// A guest on its way.
pub(crate) struct Journey {
    pub(crate) chips: Chips,
    pub(crate) vcpus: usize,
    pub(crate) flags: u64,
    pub(crate) turns: u64,
    /// The guest's memory, then [`Luggage`]: shared with the processes that run it.
    pub(crate) memory: Mapping,
    pub(crate) cpuid: Box<Cpuid>,
}

/// What else goes from process to process.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Luggage {
    pub(crate) snapshot: Snapshot,
    pub(crate) devices: Devices,
    pub(crate) message: [u8; 1024],
}

/// When a process stops.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stop {
    /// After so many microseconds.
    After(u64),
    /// When the first vCPU has left so often.
    Exits(u64),
    /// When it is done, or somebody else says so.
    Never,
}

impl Journey {
    pub(crate) fn new(
        chips: Chips,
        vcpus: usize,
        flags: u64,
        turns: u64,
        cpuid: Box<Cpuid>,
    ) -> Result<Self, Verdict> {
        let memory = Mapping::new(
            at::SIZE + size_of::<Luggage>().next_multiple_of(0x1000),
            true,
        )?;
        let flags = flags
            | match chips {
                Chips::None => flag::LINE,
                Chips::Split => flag::APIC,
                Chips::Full => flag::APIC | flag::LINE | flag::IOAPIC,
            }
            | if vcpus > 1 { flag::SMP } else { 0 };
        Ok(Journey {
            chips,
            vcpus,
            flags,
            turns,
            memory,
            cpuid,
        })
    }

    /// What goes along. Nobody holds it while another process, or this one, is in a function that has it.
    #[allow(clippy::mut_from_ref)]
    pub(crate) fn luggage(&self) -> &mut Luggage {
        // SAFETY: The mapping has room for it, any bytes make one, and one process at a time has it.
        unsafe { &mut *((self.memory.addr() + at::SIZE) as *mut Luggage) }
    }

    pub(crate) fn machine(&self, kvm: &Kvm) -> Result<(Vm, Vec<Vcpu>), Verdict> {
        self.machine_with(kvm, |_| Ok(()))
    }

    /// A machine whose VM is prepared by `prepare`.
    pub(crate) fn machine_with(
        &self,
        kvm: &Kvm,
        prepare: impl FnOnce(&Vm) -> Outcome,
    ) -> Result<(Vm, Vec<Vcpu>), Verdict> {
        let vm = kvm.create_vm()?;
        set_special_pages(&vm)?;
        prepare(&vm)?;
        snapshot::create_chips(&vm, self.chips)?;
        vm.set_memory(0, 0, 0, at::SIZE as u64, self.memory.addr() as u64)?;
        let vcpus = snapshot::create_vcpus(&vm, &self.cpuid, self.vcpus)?;
        Ok((vm, vcpus))
    }

    pub(crate) fn put(&self, offset: usize, value: u64) {
        self.memory.write(usize_of(place::DATA) + offset, value);
    }

    pub(crate) fn get(&self, offset: usize) -> u64 {
        self.memory.read(usize_of(place::DATA) + offset)
    }

    /// Code, tables and registers for the beginning; the first snapshot.
    pub(crate) fn begin(&self, kvm: &Kvm) -> Outcome {
        let mem = &self.memory;
        for (place, code) in image() {
            ensure!(code.len() < 0x1000, "the code is too long");
            mem.write_bytes(usize_of(place), code);
        }
        guest::write_gdt(mem);
        guest::write_idt(mem, true);
        guest::write_page_tables(mem);
        for (vector, handler) in [(1, place::STEP), (6, place::UNDEFINED), (14, place::FAULT)] {
            set_gate(mem, vector, handler, sel::CODE64, true);
        }
        for (n, (vector, counter)) in (0u64..).zip([
            (TICK, data::TICKS),
            (DEADLINE, data::DEADLINES),
            (PING, data::PINGS),
            (PONG, data::PONGS),
            (LINE, data::LINES),
            (PIT, data::PIT),
        ]) {
            let stub = place::STUBS + 16 * n;
            let mut code = vec![0x68];
            code.extend_from_slice(&u32::try_from(counter).unwrap_or(0).to_le_bytes());
            code.push(0xe9);
            let distance = place::INTERRUPT - (stub + 10);
            code.extend_from_slice(&u32::try_from(distance).unwrap_or(0).to_le_bytes());
            mem.write_bytes(usize_of(stub), &code);
            set_gate(mem, vector, stub, sel::CODE64, true);
        }
        let table = guest::pte::P | guest::pte::W;
        mem.write(usize_of(at::PML4) + 16, place::PDPT | table);
        mem.write(usize_of(place::PDPT), place::PD | table);
        mem.write(usize_of(place::PD), place::PT | table);
        mem.write(usize_of(place::PAGES), answer(5, 0));
        mem.write(usize_of(place::PAGES) + 0x1000, answer(5, 1));

        let (vm, vcpus) = self.machine(kvm)?;
        let khz = u64::try_from(vcpus[0].fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?).unwrap_or(0);
        self.put(data::TURNS, self.turns);
        self.put(data::FLAGS, self.flags);
        self.put(data::PERIOD, 400_000);
        self.put(data::LATER, khz * 300 / 1000);
        self.put(data::WRITE_REGISTER, place::WRITE_REGISTER);
        for n in 0..4 {
            self.put(data::ONES + 8 * n, 1f64.to_bits());
            self.put(data::ONES + 32 + 8 * n, 1 + n as u64);
        }
        for (vcpu, (rip, rsp)) in vcpus
            .iter()
            .zip([(place::MAIN, at::STACK), (place::OTHER, place::OTHER_STACK)])
        {
            start_vcpu(vcpu, Mode::Long, rip)?;
            let mut regs = vcpu.regs()?;
            (regs.r8, regs.r9, regs.r10, regs.r11) = (1, FACTOR, ADDEND, 0);
            (regs.r12, regs.r13, regs.rbp, regs.rsp) =
                (place::NOWHERE, at::MMIO, place::ALIAS, rsp);
            vcpu.set_regs(&regs)?;
            if self.flags & flag::AVX != 0 {
                let mut sregs = vcpu.sregs()?;
                sregs.cr4 |= cr::OSXSAVE;
                vcpu.set_sregs(&sregs)?;
                let mut xcrs = vcpu.xcrs()?;
                xcrs.xcrs[0].value = 7;
                vcpu.set_xcrs(&xcrs)?;
            }
            for (index, value) in UNUSED_MSRS {
                ensure!(vcpu.set_msr(index, value)?, "write of MSR {index:#x}");
            }
            vcpu.set_debugregs(&kb::kvm_debugregs {
                db: UNUSED_DR,
                dr6: 0xffff_0ff0,
                dr7: 0x400,
                ..Default::default()
            })?;
            if self.chips != Chips::None {
                vcpu.set_mp_state(&kb::kvm_mp_state { mp_state: 0 })?;
            }
        }
        let luggage = self.luggage();
        luggage.devices = Devices::default();
        luggage.snapshot.take(kvm, &vm, &vcpus, self.chips)?;
        Ok(())
    }

    /// Lets the guest run in a new machine for a while; everything is in the luggage before and after.
    pub(crate) fn hop(&self, device: &str, stop: Stop, order: Order) -> Outcome {
        let kvm = Kvm::open(device)?;
        let (vm, vcpus) = self.machine(&kvm)?;
        let luggage = self.luggage();
        luggage.snapshot.put(&kvm, &vm, &vcpus, self.chips, order)?;
        self.stay(&vm, &vcpus, stop, || Ok(false))?;
        luggage.snapshot.take(&kvm, &vm, &vcpus, self.chips)?;
        Ok(())
    }

    /// Runs a machine until it is to stop, or `during`, which is called all the time, says so. Nothing
    /// is left to be completed then.
    pub(crate) fn stay(
        &self,
        vm: &Vm,
        vcpus: &[Vcpu],
        stop: Stop,
        mut during: impl FnMut() -> Result<bool, Verdict>,
    ) -> Outcome {
        interrupting_handler(libc::SIGUSR1)?;
        let stopping = &AtomicBool::new(false);
        let tids: &Vec<AtomicI32> = &vcpus.iter().map(|_| AtomicI32::new(0)).collect();
        let mut devices = self.luggage().devices;
        let mut watched = Ok(());
        let devices = std::thread::scope(|scope| {
            let first = scope.spawn(move || {
                tids[0].store(gettid(), Ordering::SeqCst);
                let result = self.run_first(vm, &vcpus[0], &mut devices, stop, stopping);
                stopping.store(true, Ordering::SeqCst);
                result.map(|()| devices)
            });
            for (vcpu, tid) in vcpus.iter().zip(tids).skip(1) {
                scope.spawn(move || {
                    tid.store(gettid(), Ordering::SeqCst);
                    // Nothing makes it leave but a signal, and a full ring.
                    while !stopping.load(Ordering::SeqCst) {
                        let _ = vcpu.run();
                    }
                });
            }
            let begin = Instant::now();
            loop {
                let over = first.is_finished();
                if !stopping.load(Ordering::SeqCst) {
                    let time = match stop {
                        Stop::After(us) => begin.elapsed() >= Duration::from_micros(us),
                        Stop::Exits(_) | Stop::Never => false,
                    };
                    let enough = during().unwrap_or_else(|verdict| {
                        watched = Err(verdict);
                        true
                    });
                    stopping.fetch_or(time || enough, Ordering::SeqCst);
                }
                if stopping.load(Ordering::SeqCst) {
                    for (vcpu, tid) in vcpus.iter().zip(tids) {
                        vcpu.set_immediate_exit(1);
                        kick(tid.load(Ordering::SeqCst), libc::SIGUSR1);
                    }
                }
                if over {
                    break;
                }
                std::thread::sleep(Duration::from_micros(100));
            }
            first
                .join()
                .unwrap_or_else(|_| Err(Verdict::Fail("a thread panicked".to_string())))
        })?;
        watched?;
        // A kick may have met a vCPU on its way out.
        for vcpu in vcpus {
            vcpu.set_immediate_exit(1);
            match vcpu.run() {
                Err(_) | Ok(kb::KVM_EXIT_DIRTY_RING_FULL) => {}
                Ok(reason) => fail!("exit {reason} with immediate_exit"),
            }
        }
        self.luggage().devices = devices;
        Ok(())
    }

    pub(crate) fn run_first(
        &self,
        vm: &Vm,
        vcpu: &Vcpu,
        devices: &mut Devices,
        stop: Stop,
        stopping: &AtomicBool,
    ) -> Outcome {
        let mut left = match stop {
            Stop::After(_) | Stop::Never => u64::MAX,
            Stop::Exits(n) => n,
        };
        loop {
            if left == 0 || devices.done {
                stopping.store(true, Ordering::SeqCst);
            }
            if stopping.load(Ordering::SeqCst) {
                vcpu.set_immediate_exit(1);
            }
            vcpu.kvm_run_mut().request_interrupt_window = u8::from(devices.wanted);
            match vcpu.run() {
                // What was asked for is completed, with immediate_exit.
                Err(e) if e.errno == libc::EINTR => {
                    if stopping.load(Ordering::SeqCst) {
                        return Ok(());
                    }
                }
                Err(e) => return Err(e.into()),
                Ok(_) => {
                    devices.handle(vm, vcpu, self.chips)?;
                    left = left.saturating_sub(1);
                }
            }
        }
    }

    /// The same in a process of its own.
    pub(crate) fn hop_away(&self, device: &str, stop: Stop, order: Order) -> Outcome {
        // SAFETY: This process has one thread.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let code = match self.hop(device, stop, order) {
                Ok(()) => 0,
                Err(Verdict::Fail(text) | Verdict::Skip(text)) => {
                    let message = &mut self.luggage().message;
                    message.fill(0);
                    for (to, from) in message.iter_mut().zip(text.bytes()) {
                        *to = from;
                    }
                    1
                }
            };
            // SAFETY: Ends the child at once.
            unsafe { libc::_exit(code) };
        }
        let luggage = self.luggage();
        let over = snapshot::wait_for(pid, 20_000);
        if !matches!(over, Ok(true)) {
            let text = luggage.message;
            let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
            fail!(
                "on {device}, {stop:?}, {order:?}: {over:?} {}; {:?}; turn {:x}, ticks {}, pings {}, \
                 pongs {}, deadlines {}, lines {}, pit {}",
                String::from_utf8_lossy(&text[..end]),
                luggage.devices,
                luggage.snapshot.vcpus[0].regs.r14,
                self.get(data::TICKS),
                self.get(data::PINGS),
                self.get(data::PONGS),
                self.get(data::DEADLINES),
                self.get(data::LINES),
                self.get(data::PIT)
            );
        }
        Ok(())
    }

    /// What must have come of it.
    pub(crate) fn check(&self) -> Outcome {
        let (mut state, mut sum) = (1u64, 0u64);
        for turn in 0..self.turns {
            state = state.wrapping_mul(FACTOR).wrapping_add(ADDEND);
            for read in [
                answer(1, turn) & 0xffff_ffff,
                answer(2, turn),
                word(&bytes(3, 9 * turn, 8)),
                word(&bytes(4, 8 * turn, 8)),
                answer(5, turn & 1),
            ] {
                sum = sum.rotate_left(7).wrapping_add(read);
            }
        }
        let n = self.turns;
        ensure_eq!(self.get(data::STATE), state, "what was computed");
        ensure_eq!(self.get(data::SUM), sum, "what was read");
        ensure_eq!(self.get(data::X87), n, "x87");
        ensure_eq!(
            [self.get(data::SSE), self.get(data::SSE + 8)],
            [n, 2 * n],
            "SSE"
        );
        if self.flags & flag::AVX != 0 {
            for part in 0..4 {
                let got = f64::from_bits(self.get(data::AVX + 8 * part));
                ensure!((got - n as f64).abs() < 0.5, "AVX, part {part}: {got}");
            }
        }
        ensure_eq!(self.get(data::UNDEFINED), n, "#UD");
        ensure_eq!(self.get(data::FAULTS), n, "page faults");
        ensure_eq!(
            self.get(data::ADDRESSES),
            place::NOWHERE.wrapping_mul(n),
            "their addresses"
        );
        ensure_eq!(self.get(data::STEPS), n, "single steps");
        ensure_eq!(self.get(data::BACK), 0, "a counter that went back");
        if self.flags & flag::APIC != 0 {
            ensure_eq!(self.get(data::PINGS), n, "IPIs");
        }
        if self.flags & flag::SMP != 0 {
            ensure_eq!(self.get(data::PONGS), n, "IPIs back");
        }
        let luggage = self.luggage();
        if self.flags & flag::LINE != 0 {
            let devices = luggage.devices;
            ensure_eq!(
                (self.get(data::LINES), devices.requests, devices.acks),
                (n, n, n),
                "interrupts of the device"
            );
        }
        for state in &luggage.snapshot.vcpus[..self.vcpus] {
            for (index, value) in UNUSED_MSRS {
                ensure_eq!(state.msr(index), Some(value), "MSR {index:#x}");
            }
        }
        Ok(())
    }

    /// From process to process until the guest is done, on the devices in turns.
    pub(crate) fn travel(&self, devices: &[&str], rng: &mut Rng) -> Outcome {
        self.begin(&Kvm::open(devices[0])?)?;
        let mut hops = 0;
        while !self.luggage().devices.done {
            let stop = if rng.below(2) == 0 {
                Stop::After(rng.below(4000))
            } else {
                Stop::Exits(1 + rng.below(40))
            };
            let order = if rng.below(2) == 0 {
                Order::Vmm
            } else {
                Order::Tests
            };
            let device = devices[hops % devices.len()];
            self.hop_away(device, stop, order)
                .map_err(|verdict| match verdict {
                    Verdict::Fail(text) => Verdict::Fail(format!("hop {hops}: {text}")),
                    skip => skip,
                })?;
            hops += 1;
        }
        println!("# {hops} hops");
        self.check()
    }
}
