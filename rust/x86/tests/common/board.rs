// SPDX-License-Identifier: GPL-2.0

//! A machine whose processor is the emulator alone: it runs whole programs, instruction by instruction.
//!
//! What the emulator asks for with a `Service` is done here as simply as can be. Ports are the test's.

use super::TestCpu;
use rkvm_x86::emulate::Cpu;
use rkvm_x86::emulate::Emulator;
use rkvm_x86::emulate::Event;
use rkvm_x86::emulate::Outcome;
use rkvm_x86::emulate::Service;
use rkvm_x86::event::Shadow;
use rkvm_x86::exception::Fault;
use rkvm_x86::exception::Vector;
use rkvm_x86::insn::Size;
use rkvm_x86::msr::Msr;
use rkvm_x86::paging::GuestMemory;
use rkvm_x86::paging::MemoryError;
use rkvm_x86::regs::Cr0;
use rkvm_x86::regs::Cr3;
use rkvm_x86::regs::Cr4;
use rkvm_x86::regs::Efer;
use rkvm_x86::regs::Gpr;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::CpuMode;
use rkvm_x86::segment::SegReg;
use rkvm_x86::segment::Segment;
use rkvm_x86::vmentry::needs_emulation;
use std::collections::BTreeMap;

/// Memory from zero on, and another piece, for a BIOS at the top of the first 4 GiB. Nothing is anywhere else: it reads as ones.
#[derive(Default)]
pub struct Memory {
    pub ram: Vec<u8>,
    pub rom_at: u64,
    pub rom: Vec<u8>,
}

impl Memory {
    pub fn put(&mut self, gpa: u64, data: &[u8]) {
        self.ram[gpa as usize..][..data.len()].copy_from_slice(data);
    }

    pub fn put64(&mut self, gpa: u64, value: u64) {
        self.put(gpa, &value.to_le_bytes());
    }

    pub fn get(&self, gpa: u64, len: usize) -> &[u8] {
        &self.ram[gpa as usize..][..len]
    }

    pub fn get16(&self, gpa: u64) -> u16 {
        u16::from_le_bytes(self.get(gpa, 2).try_into().unwrap())
    }

    pub fn get32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.get(gpa, 4).try_into().unwrap())
    }
}

impl GuestMemory for Memory {
    type Error = ();

    fn read(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError<()>> {
        if let Some(from) = self.ram.get(gpa as usize..) {
            if from.len() >= buf.len() {
                buf.copy_from_slice(&from[..buf.len()]);
                return Ok(());
            }
        }
        let at = gpa.wrapping_sub(self.rom_at) as usize;
        let Some(from) = self.rom.get(at..).filter(|from| from.len() >= buf.len()) else {
            return Err(MemoryError::Mmio);
        };
        buf.copy_from_slice(&from[..buf.len()]);
        Ok(())
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), MemoryError<()>> {
        match self.ram.get_mut(gpa as usize..) {
            Some(to) if to.len() >= data.len() => to[..data.len()].copy_from_slice(data),
            _ => return Err(MemoryError::Mmio),
        }
        Ok(())
    }

    fn compare_exchange(
        &mut self,
        gpa: u64,
        len: u8,
        old: u64,
        new: u64,
    ) -> Result<bool, MemoryError<()>> {
        let mut raw = [0; 8];
        self.read(gpa, &mut raw[..len.into()])?;
        if u64::from_le_bytes(raw) != old {
            return Ok(false);
        }
        self.write(gpa, &new.to_le_bytes()[..len.into()])?;
        Ok(true)
    }
}

/// What is at the other end of ports.
pub trait Ports {
    fn input(&mut self, port: u16, size: Size) -> u32;
    fn output(&mut self, port: u16, size: Size, value: u32);
    /// The vector of an interrupt that is due.
    fn interrupt(&mut self, _steps: u64) -> Option<u8> {
        None
    }
}

/// Why the machine stopped.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// HLT with interrupts off.
    Halted,
    /// As many steps as were wanted.
    Steps,
    /// A fault in the delivery of a fault in the delivery of a fault.
    TripleFault,
    /// What the emulator does not know.
    Unhandled,
}

pub struct Board<P> {
    pub cpu: TestCpu,
    pub memory: Memory,
    pub ports: P,
    pub emulator: Emulator,
    pub steps: u64,
    /// In how many steps of each mode a processor without unrestricted guest could have run the guest (first) or not.
    pub modes: BTreeMap<String, [u64; 2]>,
    /// The faults that were delivered.
    pub faults: Vec<Fault>,
    /// The last instructions.
    pub trail: Vec<(u16, u64)>,
    shadow: Shadow,
    halted: bool,
    tsc: u64,
}

impl<P: Ports> Board<P> {
    pub fn new(ram: usize, ports: P) -> Self {
        let mut cpu = TestCpu::real();
        cpu.cr0 = Cr0::ET;
        cpu.idtr.limit = 0x3ff;
        for reg in [SegReg::Ldtr, SegReg::Tr] {
            *cpu.seg(reg) = Segment::reset(reg);
        }
        Self {
            cpu,
            memory: Memory {
                ram: vec![0; ram],
                ..Memory::default()
            },
            ports,
            emulator: Emulator::new(),
            steps: 0,
            modes: BTreeMap::new(),
            faults: Vec::new(),
            trail: Vec::new(),
            shadow: Shadow::None,
            halted: false,
            tsc: 0,
        }
    }

    /// What a processor would say of itself if it stopped here.
    pub fn place(&self) -> String {
        let cs = self.cpu.segments[SegReg::Cs as usize];
        let trail: Vec<_> = self.trail.iter().rev().take(12).collect();
        format!(
            "{:?} {:x}:{:x} (linear {:x}), bytes {:02x?}\n{:x?}\nlast {trail:x?}, faults {:?}",
            self.cpu.clone().mode(),
            cs.selector,
            self.cpu.rip,
            cs.base.wrapping_add(self.cpu.rip),
            self.emulator.insn_bytes(),
            self.cpu,
            &self.faults[self.faults.len().saturating_sub(8)..],
        )
    }

    pub fn run(&mut self, steps: u64) -> End {
        let end = self.steps + steps;
        while self.steps < end {
            if let Err(end) = self.step() {
                return end;
            }
        }
        End::Steps
    }

    fn note(&mut self) {
        let cpu = &self.cpu;
        let bad = needs_emulation(cpu.cr0, cpu.rflags, cpu.efer, |reg| {
            cpu.segments[usize::from(reg.number())]
        });
        let place = (cpu.segments[SegReg::Cs as usize].selector, cpu.rip);
        let mode = format!("{:?}", self.cpu.mode());
        self.modes.entry(mode).or_default()[usize::from(bad)] += 1;
        if self.trail.len() >= 64 {
            self.trail.remove(0);
        }
        self.trail.push(place);
    }

    fn step(&mut self) -> Result<(), End> {
        self.steps += 1;
        self.tsc += 64;
        if self.cpu.rflags.has(Rflags::IF) && self.shadow == Shadow::None {
            if let Some(vector) = self.ports.interrupt(self.steps) {
                self.halted = false;
                let event = Event {
                    vector,
                    error: None,
                    by_program: false,
                };
                self.deliver(event)?;
            }
        }
        if self.halted {
            return Ok(());
        }
        self.note();
        loop {
            match self.emulator.step(&mut self.cpu, &mut self.memory) {
                Outcome::Done(done) => {
                    self.shadow = done.shadow;
                    if done.single_step {
                        self.raise(DB)?;
                    }
                    return Ok(());
                }
                Outcome::MmioRead { .. } => self.emulator.complete_read([0xff; 8]),
                Outcome::MmioWrite { .. } => {}
                Outcome::Fault(fault) => return self.raise(fault),
                Outcome::Service { service, len } => {
                    self.shadow = Shadow::None;
                    return self.serve(service, len);
                }
                Outcome::Unhandled | Outcome::Host(()) => return Err(End::Unhandled),
            }
        }
    }

    fn deliver(&mut self, event: Event) -> Result<(), End> {
        match self
            .emulator
            .deliver(&mut self.cpu, &mut self.memory, event)
        {
            Outcome::Done(_) => Ok(()),
            Outcome::Fault(_) => Err(End::TripleFault),
            _ => Err(End::Unhandled),
        }
    }

    fn raise(&mut self, fault: Fault) -> Result<(), End> {
        self.faults.push(fault);
        if let Some(cr2) = fault.cr2 {
            self.cpu.msrs.retain(|(msr, _)| *msr != CR2);
            self.cpu.msrs.push((CR2, cr2));
        }
        self.deliver(Event {
            vector: fault.vector.0,
            error: fault.error,
            by_program: false,
        })
    }

    fn set32(&mut self, r: Gpr, value: u32) {
        self.cpu.gprs.set(r, value.into());
    }

    fn serve(&mut self, service: Service, len: u8) -> Result<(), End> {
        let wide = self.cpu.mode().is_64bit();
        let mask = if wide { u64::MAX } else { 0xffff_ffff };
        match service {
            Service::WriteControl { number, from } => {
                let value = self.cpu.get(from) & mask;
                match number {
                    0 => self.set_cr0(Cr0::new(value)),
                    3 => self.cpu.cr3 = Cr3::new(value),
                    4 => self.cpu.cr4 = Cr4::new(value),
                    _ => {}
                }
            }
            Service::ReadControl { number, to } => {
                let value = match number {
                    0 => self.cpu.cr0.bits(),
                    2 => self.cpu.msr(CR2).unwrap_or(0),
                    3 => self.cpu.cr3.bits(),
                    4 => self.cpu.cr4.bits(),
                    _ => 0,
                };
                self.cpu.gprs.set(to, value & mask);
            }
            Service::ClearTaskSwitched => self.cpu.cr0 = self.cpu.cr0.without(Cr0::TS),
            Service::LoadMsw(word) => {
                let old = self.cpu.cr0.bits();
                // PE is not cleared so.
                self.set_cr0(Cr0::new(old & !14 | u64::from(word) & 15));
            }
            Service::WriteDebug { .. }
            | Service::InvalidatePage(_)
            | Service::InvalidatePcid { .. }
            | Service::InvalidateCaches
            | Service::WriteBackCaches
            | Service::WriteXcr => {}
            Service::ReadDebug { to, .. } => self.cpu.gprs.set(to, 0),
            Service::Halt => {
                if !self.cpu.rflags.has(Rflags::IF) {
                    return Err(End::Halted);
                }
                self.halted = true;
            }
            Service::ReadMsr => {
                let value = self.read_msr();
                self.set32(Gpr::Rax, value as u32);
                self.set32(Gpr::Rdx, (value >> 32) as u32);
            }
            Service::WriteMsr => {
                let value = self.cpu.get(Gpr::Rax) & 0xffff_ffff | (self.cpu.get(Gpr::Rdx) << 32);
                let number = self.cpu.get(Gpr::Rcx) as u32;
                if number == EFER {
                    self.cpu.efer =
                        Efer::new(value) & Efer::LME.with(Efer::SCE) | self.cpu.efer & Efer::LMA;
                } else {
                    self.cpu.set_msr(Msr(number), value);
                }
            }
            Service::ReadTsc | Service::ReadTscAux | Service::ReadCounter => {
                let tsc = self.tsc;
                self.set32(Gpr::Rax, tsc as u32);
                self.set32(Gpr::Rdx, (tsc >> 32) as u32);
                if service == Service::ReadTscAux {
                    self.set32(Gpr::Rcx, 0);
                }
            }
            Service::Identify => self.identify(),
            Service::ReadXcr | Service::Hypercall => return self.raise(Fault::UD),
            Service::Port { port, size, input } => {
                if input {
                    let value = self.ports.input(port, size);
                    let old = self.cpu.get(Gpr::Rax);
                    let kept = if size == Size::Dword { 0 } else { !size.mask() };
                    let new = old & kept | u64::from(value) & size.mask();
                    self.cpu.gprs.set(Gpr::Rax, new);
                } else {
                    let value = self.cpu.get(Gpr::Rax) & size.mask();
                    self.ports.output(port, size, value as u32);
                }
            }
            Service::PortString { port, io } => {
                return self.port_string(port, io, len);
            }
        }
        self.pass(len);
        Ok(())
    }

    fn pass(&mut self, len: u8) {
        let mask = if self.cpu.mode().is_64bit() {
            u64::MAX
        } else {
            0xffff_ffff
        };
        self.cpu.rip = self.cpu.rip.wrapping_add(len.into()) & mask;
        self.cpu.rflags = self.cpu.rflags.without(Rflags::RF);
    }

    /// One iteration, through the segment's base and nothing else.
    fn port_string(&mut self, port: u16, io: rkvm_x86::io::StringIo, len: u8) -> Result<(), End> {
        let mask = match io.address_size {
            2 => 0xffff,
            4 => 0xffff_ffff,
            _ => u64::MAX,
        };
        let count = self.cpu.get(Gpr::Rcx);
        if io.rep && count & mask == 0 {
            self.pass(len);
            return Ok(());
        }
        let index = if io.input { Gpr::Rdi } else { Gpr::Rsi };
        let at = self.cpu.get(index);
        let gpa = self.cpu.seg(io.seg).base + (at & mask);
        let bytes = usize::from(io.size.bytes());
        if io.input {
            let value = self.ports.input(port, io.size).to_le_bytes();
            self.memory.put(gpa, &value[..bytes]);
        } else {
            let mut value = [0; 4];
            value[..bytes].copy_from_slice(self.memory.get(gpa, bytes));
            self.ports.output(port, io.size, u32::from_le_bytes(value));
        }
        let step = if self.cpu.rflags.has(Rflags::DF) {
            (bytes as u64).wrapping_neg()
        } else {
            bytes as u64
        };
        let next = at & !mask | at.wrapping_add(step) & mask;
        self.cpu.gprs.set(index, next);
        if !io.rep {
            self.pass(len);
            return Ok(());
        }
        let left = count & !mask | count.wrapping_sub(1) & mask;
        self.cpu.gprs.set(Gpr::Rcx, left);
        Ok(())
    }

    fn set_cr0(&mut self, new: Cr0) {
        if new.has(Cr0::PG) && self.cpu.efer.has(Efer::LME) {
            self.cpu.efer |= Efer::LMA;
        } else {
            self.cpu.efer = self.cpu.efer.without(Efer::LMA);
        }
        self.cpu.cr0 = new.with(Cr0::ET);
        if !new.has(Cr0::PE) {
            self.cpu.cpl = 0;
        }
    }

    fn read_msr(&mut self) -> u64 {
        match self.cpu.get(Gpr::Rcx) as u32 {
            EFER => self.cpu.efer.bits(),
            number => self.cpu.msr(Msr(number)).unwrap_or(0),
        }
    }

    /// A processor with long mode and little else.
    fn identify(&mut self) {
        let [a, b, c, d] = match self.cpu.get(Gpr::Rax) as u32 {
            0 => [1, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
            // TSC, MSR, PAE, CX8, CMOV, FXSR, SSE, SSE2.
            1 => [0x6f2, 0, 0, 0x0700_8171],
            0x8000_0000 => [0x8000_0001, 0, 0, 0],
            // Long mode, SYSCALL.
            0x8000_0001 => [0, 0, 0, (1 << 29) | (1 << 11)],
            _ => [0; 4],
        };
        self.set32(Gpr::Rax, a);
        self.set32(Gpr::Rbx, b);
        self.set32(Gpr::Rcx, c);
        self.set32(Gpr::Rdx, d);
    }

    pub fn mode(&mut self) -> CpuMode {
        self.cpu.mode()
    }
}

const DB: Fault = Fault {
    vector: Vector::DB,
    error: None,
    cr2: None,
};
const EFER: u32 = 0xc000_0080;
/// Kept among the MSRs, with a number that none has.
const CR2: Msr = Msr(0xffff_0002);
