// SPDX-License-Identifier: GPL-2.0

//! A processor and a memory for the tests.
// Each test program uses a part.
#![allow(dead_code, unreachable_pub)]

pub mod board;
pub mod generate;
pub mod system;

use rkvm_x86::emulate::Completion;
use rkvm_x86::emulate::Cpu;
use rkvm_x86::emulate::Emulator;
use rkvm_x86::emulate::Fpu;
use rkvm_x86::emulate::Outcome;
use rkvm_x86::emulate::TableReg;
use rkvm_x86::event::Shadow;
use rkvm_x86::msr::Msr;
use rkvm_x86::paging::GuestMemory;
use rkvm_x86::paging::MemoryError;
use rkvm_x86::regs::Cr0;
use rkvm_x86::regs::Cr3;
use rkvm_x86::regs::Cr4;
use rkvm_x86::regs::Efer;
use rkvm_x86::regs::Gpr;
use rkvm_x86::regs::Gprs;
use rkvm_x86::regs::Rflags;
use rkvm_x86::segment::SegAttr;
use rkvm_x86::segment::SegReg;
use rkvm_x86::segment::Segment;

/// A processor: everything is a field.
#[derive(Clone, Debug, PartialEq)]
pub struct TestCpu {
    pub gprs: Gprs,
    pub rip: u64,
    pub rflags: Rflags,
    pub segments: [Segment; 8],
    pub cr0: Cr0,
    pub cr3: Cr3,
    pub cr4: Cr4,
    pub efer: Efer,
    pub cpl: u8,
    pub maxphyaddr: u8,
    pub gbpages: bool,
    pub pkru: u32,
    pub gdtr: TableReg,
    pub idtr: TableReg,
    pub msrs: Vec<(Msr, u64)>,
    pub nmi_blocked: bool,
    pub task_switches: u32,
    pub fpu: TestFpu,
}

/// Vector registers and their control.
#[derive(Clone, Debug, PartialEq)]
pub struct TestFpu {
    pub ymm: [[u64; 4]; 16],
    pub mmx: [u64; 8],
    pub mxcsr: u32,
    pub control: u16,
    pub status: u16,
    pub xcr0: u64,
}

impl TestFpu {
    pub const RESET: Self = Self {
        ymm: [[0; 4]; 16],
        mmx: [0; 8],
        mxcsr: 0x1f80,
        control: 0x37f,
        status: 0,
        xcr0: 7,
    };
}

impl Fpu for TestCpu {
    fn xcr0(&mut self) -> u64 {
        self.fpu.xcr0
    }
    fn xmm(&mut self, n: u8) -> [u64; 2] {
        let [a, b, ..] = self.fpu.ymm[n as usize];
        [a, b]
    }
    fn set_xmm(&mut self, n: u8, value: [u64; 2]) {
        self.fpu.ymm[n as usize][..2].copy_from_slice(&value);
    }
    fn ymm(&mut self, n: u8) -> [u64; 4] {
        self.fpu.ymm[n as usize]
    }
    fn set_ymm(&mut self, n: u8, value: [u64; 4]) {
        self.fpu.ymm[n as usize] = value;
    }
    fn mmx(&mut self, n: u8) -> u64 {
        self.fpu.mmx[n as usize]
    }
    fn set_mmx(&mut self, n: u8, value: u64) {
        self.fpu.mmx[n as usize] = value;
    }
    fn mxcsr(&mut self) -> u32 {
        self.fpu.mxcsr
    }
    fn set_mxcsr(&mut self, value: u32) {
        self.fpu.mxcsr = value;
    }
    fn fpu_control(&mut self) -> u16 {
        self.fpu.control
    }
    fn set_fpu_control(&mut self, value: u16) {
        self.fpu.control = value & 0x1f3f | 0x40;
        // What is unmasked and waiting is pending now.
        let pending = self.fpu.status & !value & 0x3f != 0;
        self.fpu.status = self.fpu.status & !0x8080 | if pending { 0x8080 } else { 0 };
    }
    fn fpu_status(&mut self) -> u16 {
        self.fpu.status
    }
    fn fpu_init(&mut self) {
        self.fpu.control = 0x37f;
        self.fpu.status = 0;
    }
}

fn flat(code: bool, long: bool) -> Segment {
    Segment {
        selector: 8,
        base: 0,
        limit: u32::MAX,
        attr: SegAttr::REAL_MODE
            .with_type(if code { 0xb } else { 3 })
            .with_db(!long)
            .with_l(code && long)
            .with_g(true),
    }
}

impl TestCpu {
    /// Real mode, as after a jump to 0:1000h.
    pub fn real() -> Self {
        Self {
            gprs: Gprs::new(),
            rip: 0x1000,
            rflags: Rflags::FIXED,
            segments: [Segment::real_mode(0); 8],
            cr0: Cr0::ET,
            cr3: Cr3::new(0),
            cr4: Cr4::empty(),
            efer: Efer::empty(),
            cpl: 0,
            maxphyaddr: 46,
            gbpages: true,
            pkru: 0,
            gdtr: TableReg::default(),
            idtr: TableReg {
                base: 0,
                limit: 0xffff,
            },
            msrs: Vec::new(),
            nmi_blocked: false,
            task_switches: 0,
            fpu: TestFpu::RESET,
        }
    }

    /// Protected mode with flat 32-bit segments, no paging.
    pub fn protected() -> Self {
        let mut cpu = Self::real();
        cpu.cr0 |= Cr0::PE;
        cpu.segments = [flat(false, false); 8];
        cpu.segments[SegReg::Cs as usize] = flat(true, false);
        cpu
    }

    /// 64-bit mode. There is no paging, which no processor does; the translation is tested elsewhere.
    pub fn long() -> Self {
        let mut cpu = Self::protected();
        cpu.efer = Efer::LME | Efer::LMA;
        cpu.cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::OSXSAVE;
        cpu.segments[SegReg::Cs as usize] = flat(true, true);
        cpu
    }

    pub fn with(mut self, r: Gpr, value: u64) -> Self {
        self.gprs.set(r, value);
        self
    }

    pub fn with_flags(mut self, flags: Rflags) -> Self {
        self.rflags |= flags;
        self
    }

    pub fn get(&self, r: Gpr) -> u64 {
        self.gprs.get(r)
    }

    pub fn seg(&mut self, r: SegReg) -> &mut Segment {
        &mut self.segments[r as usize]
    }
}

impl Cpu for TestCpu {
    fn gpr(&mut self, r: Gpr) -> u64 {
        self.gprs.get(r)
    }
    fn set_gpr(&mut self, r: Gpr, value: u64) {
        self.gprs.set(r, value);
    }
    fn rip(&mut self) -> u64 {
        self.rip
    }
    fn set_rip(&mut self, value: u64) {
        self.rip = value;
    }
    fn rflags(&mut self) -> Rflags {
        self.rflags
    }
    fn set_rflags(&mut self, value: Rflags) {
        self.rflags = value;
    }
    fn segment(&mut self, reg: SegReg) -> Segment {
        self.segments[reg as usize]
    }
    fn cr0(&mut self) -> Cr0 {
        self.cr0
    }
    fn cr3(&mut self) -> Cr3 {
        self.cr3
    }
    fn cr4(&mut self) -> Cr4 {
        self.cr4
    }
    fn efer(&mut self) -> Efer {
        self.efer
    }
    fn cpl(&mut self) -> u8 {
        self.cpl
    }
    fn set_segment(&mut self, reg: SegReg, value: &Segment) {
        self.segments[reg as usize] = *value;
        if reg == SegReg::Ss {
            self.cpl = value.attr.dpl();
        }
    }
    fn set_cr3(&mut self, value: Cr3) {
        self.cr3 = value;
    }
    fn task_switched(&mut self) {
        self.cr0 |= Cr0::TS;
        self.task_switches += 1;
    }
    fn gdtr(&mut self) -> TableReg {
        self.gdtr
    }
    fn set_gdtr(&mut self, value: TableReg) {
        self.gdtr = value;
    }
    fn idtr(&mut self) -> TableReg {
        self.idtr
    }
    fn set_idtr(&mut self, value: TableReg) {
        self.idtr = value;
    }
    fn msr(&mut self, msr: Msr) -> Option<u64> {
        let entry = self.msrs.iter().find(|(number, _)| *number == msr);
        entry.map(|(_, value)| *value)
    }
    fn set_msr(&mut self, msr: Msr, value: u64) {
        self.msrs.retain(|(number, _)| *number != msr);
        self.msrs.push((msr, value));
    }
    fn unblock_nmi(&mut self) {
        self.nmi_blocked = false;
    }
    fn maxphyaddr(&mut self) -> u8 {
        self.maxphyaddr
    }
    fn gbpages(&mut self) -> bool {
        self.gbpages
    }
    fn pkru(&mut self) -> u32 {
        self.pkru
    }
}

/// How much memory there is. Device space begins there.
pub const RAM: u64 = 0x10_0000;
/// Where the device is.
pub const DEVICE: u64 = RAM;

/// What the host says of a page it lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost;

/// Memory: RAM at the bottom, a page of it perhaps read-only, a page perhaps lost, and nothing above.
#[derive(Clone, Debug, PartialEq)]
pub struct TestMemory {
    pub ram: Vec<u8>,
    pub rom_page: Option<u64>,
    pub lost_page: Option<u64>,
    /// Pages below [`RAM`] that are a device's all the same; what `ram` holds for them is the device's own.
    pub device_pages: Vec<u64>,
    /// How many compare-exchanges are still to find somebody else's value.
    pub contention: u32,
    pub writes: u32,
}

impl Default for TestMemory {
    fn default() -> Self {
        Self {
            ram: vec![0; RAM as usize],
            rom_page: None,
            lost_page: None,
            device_pages: Vec::new(),
            contention: 0,
            writes: 0,
        }
    }
}

impl TestMemory {
    fn range(
        &self,
        gpa: u64,
        len: usize,
        write: bool,
    ) -> Result<std::ops::Range<usize>, MemoryError<Lost>> {
        assert!(len > 0 && (gpa & 0xfff) + len as u64 <= 0x1000, "one page");
        let page = Some(gpa >> 12);
        let device = self.device_pages.contains(&(gpa >> 12));
        if gpa >= RAM || device || (write && page == self.rom_page) {
            return Err(MemoryError::Mmio);
        }
        if page == self.lost_page {
            return Err(MemoryError::Host(Lost));
        }
        Ok(gpa as usize..gpa as usize + len)
    }

    pub fn put(&mut self, gpa: u64, data: &[u8]) {
        self.ram[gpa as usize..][..data.len()].copy_from_slice(data);
    }

    pub fn put64(&mut self, gpa: u64, value: u64) {
        self.put(gpa, &value.to_le_bytes());
    }

    pub fn put32(&mut self, gpa: u64, value: u32) {
        self.put(gpa, &value.to_le_bytes());
    }

    pub fn get64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.ram[gpa as usize..][..8].try_into().unwrap())
    }

    pub fn get32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.ram[gpa as usize..][..4].try_into().unwrap())
    }
}

impl GuestMemory for TestMemory {
    type Error = Lost;

    fn read(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError<Lost>> {
        let range = self.range(gpa, buf.len(), false)?;
        buf.copy_from_slice(&self.ram[range]);
        Ok(())
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), MemoryError<Lost>> {
        let range = self.range(gpa, data.len(), true)?;
        self.ram[range].copy_from_slice(data);
        self.writes += 1;
        Ok(())
    }

    fn compare_exchange(
        &mut self,
        gpa: u64,
        len: u8,
        old: u64,
        new: u64,
    ) -> Result<bool, MemoryError<Lost>> {
        assert!(matches!(len, 1 | 2 | 4 | 8) && gpa % u64::from(len) == 0);
        let range = self.range(gpa, len.into(), true)?;
        if self.contention > 0 {
            self.contention -= 1;
            return Ok(false);
        }
        let mut raw = [0; 8];
        raw[..len.into()].copy_from_slice(&self.ram[range.clone()]);
        if u64::from_le_bytes(raw) != old {
            return Ok(false);
        }
        self.ram[range].copy_from_slice(&new.to_le_bytes()[..len.into()]);
        self.writes += 1;
        Ok(true)
    }
}

/// What a device saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    Read { gpa: u64, len: u8 },
    Write { gpa: u64, len: u8, data: u64 },
}

pub const fn rd(gpa: u64, len: u8) -> Bus {
    Bus::Read { gpa, len }
}

pub const fn wr(gpa: u64, len: u8, data: u64) -> Bus {
    Bus::Write { gpa, len, data }
}

/// Steps the instruction at RIP until it ends, answering reads with `answers` in turn (zero when they run out).
pub fn run(
    cpu: &mut TestCpu,
    memory: &mut TestMemory,
    answers: &[u64],
) -> (Outcome<Lost>, Vec<Bus>) {
    let mut emulator = Emulator::new();
    run_with(&mut emulator, cpu, memory, answers)
}

pub fn run_with(
    emulator: &mut Emulator,
    cpu: &mut TestCpu,
    memory: &mut TestMemory,
    answers: &[u64],
) -> (Outcome<Lost>, Vec<Bus>) {
    let mut bus = Vec::new();
    let mut answers = answers.iter();
    loop {
        match emulator.step(cpu, memory) {
            Outcome::MmioRead { gpa, len } => {
                assert!(emulator.in_progress());
                assert!((1..=8).contains(&len) && (gpa & 0xfff) + u64::from(len) <= 0x1000);
                bus.push(rd(gpa, len));
                let answer = answers.next().copied().unwrap_or(0);
                emulator.complete_read(answer.to_le_bytes());
            }
            Outcome::MmioWrite { gpa, data, len } => {
                assert!(emulator.in_progress());
                assert!((1..=8).contains(&len) && (gpa & 0xfff) + u64::from(len) <= 0x1000);
                let data = u64::from_le_bytes(data);
                assert!(len == 8 || data >> (8 * u32::from(len)) == 0);
                bus.push(wr(gpa, len, data));
            }
            other => {
                // What a device has answered is kept for another try.
                let read = bus.iter().any(|b| matches!(b, Bus::Read { .. }));
                assert!(!emulator.in_progress() || read && other == Outcome::Host(Lost));
                return (other, bus);
            }
        }
    }
}

/// The outcome of an instruction that completed.
pub const DONE: Outcome<Lost> = Outcome::Done(Completion {
    retired: true,
    single_step: false,
    shadow: Shadow::None,
});

/// The outcome of one that has more to do.
pub const MORE: Outcome<Lost> = Outcome::Done(Completion {
    retired: false,
    single_step: false,
    shadow: Shadow::None,
});

/// Bytes from hexadecimal digits, with spaces where one likes.
pub fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .chars()
        .filter_map(|c| c.to_digit(16).map(|d| d as u8))
        .collect();
    assert!(digits.len() % 2 == 0, "{text}");
    digits.chunks(2).map(|d| (d[0] << 4) | d[1]).collect()
}

/// Where code goes.
pub const CODE: u64 = 0x1000;

/// Puts code at CODE and runs the one instruction.
pub fn exec(
    cpu: &mut TestCpu,
    memory: &mut TestMemory,
    code: &str,
    answers: &[u64],
) -> (Outcome<Lost>, Vec<Bus>) {
    memory.put(CODE, &hex(code));
    cpu.rip = CODE;
    run(cpu, memory, answers)
}
