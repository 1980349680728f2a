// SPDX-License-Identifier: GPL-2.0

//! Memory that the guest reached and the hardware could not: what is to be mapped is mapped, and
//! accesses to devices are emulated and taken to user space (KVM API, KVM_EXIT_MMIO).

use super::LinearRip;
use super::Next;
use super::Pending;
use super::Run;
use crate::arch::Arch;
use crate::backend::Loaded;
use crate::bus::Space;
use crate::lapic::LocalApic;
use crate::linux::fpu::Swapped;
use crate::mem::access::MemError;
use crate::mem::devices::DeviceFrames;
use crate::mem::fault::Fault as MemFault;
use crate::mem::GuestMemory;
use crate::mmu::ept::Access;
use crate::tlb::VcpuShared;
use crate::x86;
use crate::x86::apic::base::DEFAULT_ADDRESS;
use crate::x86::cpuid::features::Features;
use crate::x86::emulate::Hint;
use crate::x86::emulate::Outcome;
use crate::x86::emulate::TableReg;
use crate::x86::msr::Msr;
use crate::x86::paging::MemoryError;
use crate::x86::paging::PageAccess;
use crate::x86::paging::Paging;
use crate::x86::regs::Cr0;
use crate::x86::regs::Cr3;
use crate::x86::regs::Cr4;
use crate::x86::regs::Efer;
use crate::x86::regs::Gpr;
use crate::x86::regs::Rflags;
use crate::x86::segment::CpuMode;
use crate::x86::segment::SegReg;
use crate::x86::segment::Segment;
use kernel::prelude::*;

/// A device access that the VMM was asked for. The emulator remembers the rest.
#[derive(Clone, Copy)]
pub(crate) struct PendingMmio {
    /// A read: the VMM has the answer.
    read: bool,
    /// Where the instruction is, or the next one if it is done but for its writes.
    at: LinearRip,
}

/// The vCPU as the emulator sees it.
pub(super) struct EmuCpu<'a, L: Loaded> {
    hw: &'a mut L,
    fpu: &'a Swapped<'a>,
    xcr0: u64,
    maxphyaddr: u8,
    gbpages: bool,
    pkru: u32,
    /// The processor's entries of PAE paging are ours.
    shadowed: bool,
}

impl<'a, L: Loaded> EmuCpu<'a, L> {
    pub(super) fn new(hw: &'a mut L, fpu: &'a Swapped<'a>, arch: &Arch) -> Self {
        Self {
            hw,
            fpu,
            xcr0: arch.xcr0,
            maxphyaddr: arch.features.maxphyaddr,
            gbpages: arch.features.has(Features::GBPAGES),
            pkru: arch.pkru,
            shadowed: arch.shadow.is_some(),
        }
    }
}

impl<L: Loaded> x86::emulate::Fpu for EmuCpu<'_, L> {
    fn xcr0(&mut self) -> u64 {
        self.xcr0
    }

    fn xmm(&mut self, n: u8) -> [u64; 2] {
        self.fpu.xmm(n)
    }

    fn set_xmm(&mut self, n: u8, value: [u64; 2]) {
        self.fpu.set_xmm(n, value);
    }

    fn ymm(&mut self, n: u8) -> [u64; 4] {
        self.fpu.ymm(n)
    }

    fn set_ymm(&mut self, n: u8, value: [u64; 4]) {
        self.fpu.set_ymm(n, value);
    }

    fn mmx(&mut self, n: u8) -> u64 {
        self.fpu.mmx(n)
    }

    fn set_mmx(&mut self, n: u8, value: u64) {
        self.fpu.set_mmx(n, value);
    }

    fn mxcsr(&mut self) -> u32 {
        self.fpu.mxcsr()
    }

    fn set_mxcsr(&mut self, value: u32) {
        self.fpu.set_mxcsr(value);
    }

    fn fpu_control(&mut self) -> u16 {
        self.fpu.control()
    }

    fn set_fpu_control(&mut self, value: u16) {
        self.fpu.set_control(value);
    }

    fn fpu_status(&mut self) -> u16 {
        self.fpu.status()
    }

    fn fpu_init(&mut self) {
        self.fpu.init_x87();
    }
}

impl<L: Loaded> x86::emulate::Cpu for EmuCpu<'_, L> {
    fn gpr(&mut self, r: Gpr) -> u64 {
        self.hw.gpr(r)
    }

    fn set_gpr(&mut self, r: Gpr, value: u64) {
        self.hw.set_gpr(r, value);
    }

    fn rip(&mut self) -> u64 {
        self.hw.rip()
    }

    fn set_rip(&mut self, value: u64) {
        self.hw.set_rip(value);
    }

    fn rflags(&mut self) -> Rflags {
        self.hw.rflags()
    }

    fn set_rflags(&mut self, value: Rflags) {
        self.hw.set_rflags(value);
    }

    fn segment(&mut self, reg: SegReg) -> Segment {
        self.hw.segment(reg)
    }

    fn cr0(&mut self) -> Cr0 {
        self.hw.cr0()
    }

    fn cr3(&mut self) -> Cr3 {
        Cr3::new(self.hw.cr3())
    }

    fn cr4(&mut self) -> Cr4 {
        self.hw.cr4()
    }

    fn efer(&mut self) -> Efer {
        self.hw.efer()
    }

    fn cpl(&mut self) -> u8 {
        crate::arch::cpl(self.hw)
    }

    fn set_segment(&mut self, reg: SegReg, value: &Segment) {
        self.hw.set_segment(reg, value);
    }

    fn set_cr3(&mut self, value: Cr3) {
        self.hw.set_cr3(value.bits());
    }

    fn task_switched(&mut self) {
        let cr0 = self.hw.cr0();
        self.hw.set_cr0(cr0.with(Cr0::TS));
    }

    fn gdtr(&mut self) -> TableReg {
        self.hw.gdtr()
    }

    fn set_gdtr(&mut self, value: TableReg) {
        self.hw.set_gdtr(value);
    }

    fn idtr(&mut self) -> TableReg {
        self.hw.idtr()
    }

    fn set_idtr(&mut self, value: TableReg) {
        self.hw.set_idtr(value);
    }

    fn msr(&mut self, msr: Msr) -> Option<u64> {
        self.hw.read_msr(msr)
    }

    fn set_msr(&mut self, msr: Msr, value: u64) {
        self.hw.write_msr(msr, value);
    }

    fn unblock_nmi(&mut self) {
        self.hw.set_nmi_blocked(false);
    }

    fn maxphyaddr(&mut self) -> u8 {
        self.maxphyaddr
    }

    fn gbpages(&mut self) -> bool {
        self.gbpages
    }

    fn mode(&mut self) -> CpuMode {
        crate::arch::mode(self.hw)
    }

    fn paging(&mut self) -> Paging {
        let mut paging = paging_of(self.hw, self.maxphyaddr, self.gbpages, self.pkru);
        if self.shadowed {
            paging.pdptes = Some(self.hw.pdptes());
        }
        paging
    }
}

/// The state that decides how the guest's addresses are translated.
fn paging_of(hw: &mut impl Loaded, maxphyaddr: u8, gbpages: bool, pkru: u32) -> Paging {
    Paging {
        cr0: hw.cr0(),
        cr3: Cr3::new(hw.cr3()),
        cr4: hw.cr4(),
        efer: hw.efer(),
        rflags: hw.rflags(),
        pkru,
        maxphyaddr,
        gbpages,
        pdptes: None,
    }
}

/// The same for a vCPU.
pub(super) fn paging(hw: &mut impl Loaded, arch: &Arch) -> Paging {
    let gbpages = arch.features.has(Features::GBPAGES);
    paging_of(hw, arch.features.maxphyaddr, gbpages, arch.pkru)
}

/// Guest memory that the VMM has promised and the host cannot reach, by a guest-physical address in
/// it: KVM_RUN returns EFAULT.
#[derive(Clone, Copy)]
pub(super) struct Unbacked(pub(super) u64);

/// Guest memory as the emulator sees it, which never asks for more than one page at once, and the
/// vCPU that it emulates.
pub(super) struct EmuMemory<'a> {
    memory: &'a GuestMemory,
    vcpu: &'a VcpuShared,
    devices: &'a DeviceFrames,
}

impl<'a> EmuMemory<'a> {
    pub(super) fn new(
        memory: &'a GuestMemory,
        vcpu: &'a VcpuShared,
        devices: &'a DeviceFrames,
    ) -> Self {
        Self {
            memory,
            vcpu,
            devices,
        }
    }

    /// An access that is one of a device if that is known, and else what `f` makes of it.
    #[inline]
    fn access<R>(
        &self,
        gpa: u64,
        f: impl FnOnce(&GuestMemory) -> Result<R, MemError>,
    ) -> Result<R, MemoryError<Unbacked>> {
        if self.devices.contain(self.memory, gpa) {
            return Err(MemoryError::Mmio);
        }
        f(self.memory).map_err(|error| match error {
            MemError::NoSlot => MemoryError::Mmio,
            MemError::Fault => MemoryError::Host(Unbacked(gpa)),
        })
    }
}

impl x86::paging::GuestMemory for EmuMemory<'_> {
    type Error = Unbacked;

    fn read(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError<Unbacked>> {
        self.access(gpa, |memory| memory.read(gpa, buf))
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), MemoryError<Unbacked>> {
        self.access(gpa, |memory| memory.write(gpa, data, self.vcpu))
    }

    fn compare_exchange(
        &mut self,
        gpa: u64,
        len: u8,
        old: u64,
        new: u64,
    ) -> Result<bool, MemoryError<Unbacked>> {
        self.access(gpa, |memory| memory.cmpxchg(gpa, len, old, new, self.vcpu))
    }
}

/// Where a linear address leads, whoever might access it; none if nowhere. Changes nothing.
pub(crate) fn probe(
    hw: &mut impl Loaded,
    arch: &Arch,
    memory: &GuestMemory,
    vcpu: &VcpuShared,
    linear: u64,
) -> Option<u64> {
    let mut memory = EmuMemory::new(memory, vcpu, &arch.devices);
    let paging = paging(hw, arch);
    let found = paging.translate(&mut memory, linear, PageAccess::PROBE);
    found.ok().map(|translation| translation.gpa)
}

impl<L: Loaded> Run<'_, L> {
    /// The guest reached what EPT does not map, or not so.
    pub(super) fn page_fault(
        &mut self,
        gpa: u64,
        access: Access,
        linear: Option<u64>,
    ) -> Result<Next> {
        let stats = &self.shared.stats;
        stats.pf_taken.bump();
        let fault = if self.arch.devices.contain(self.memory, gpa) {
            MemFault::Mmio
        } else {
            let fault = self.memory.map(gpa, access, self.shared)?;
            if fault == MemFault::Mmio {
                self.arch.devices.note(self.memory, gpa);
            }
            fault
        };
        match fault {
            MemFault::Mapped(_) => {
                stats.pf_fixed.bump();
                Ok(Next::Guest)
            }
            MemFault::Mmio => {
                if self.maps_apic_page(gpa)? {
                    return Ok(Next::Guest);
                }
                if linear.is_some() && self.took_any_write(gpa, access) {
                    return Ok(Next::Guest);
                }
                let stats = &self.shared.stats;
                stats.pf_emulate.bump();
                let hint = linear.map(|linear| Hint {
                    linear,
                    gpa,
                    write: access.write,
                    table: false,
                });
                self.emulate(gpa, hint)
            }
            // The loop finds the signal.
            MemFault::Interrupted => Ok(Next::Guest),
            MemFault::HwPoison(hva) => {
                crate::linux::mm::send_hwpoison(hva);
                Ok(Next::Guest)
            }
            MemFault::BadHva(_) => Err(self.unbacked(Unbacked(gpa))),
        }
    }

    /// Offers a write to the devices that take any: then the instruction is done, whatever it is, and
    /// need not be looked at. What it wrote to registers besides would be lost: who has a device do so
    /// knows that its driver uses plain stores.
    fn took_any_write(&mut self, gpa: u64, access: Access) -> bool {
        let plain = access.write && !access.read && !access.exec;
        // Most guests have no such device, and the questions to the hardware cost most.
        if !plain || !self.bus.takes_any_write() || self.hw.vectoring().is_some() {
            return false;
        }
        // The manual does not promise a length for this exit. Where there is none, it is emulated.
        let len = self.hw.instruction_len();
        if !(1..=15).contains(&len) || !self.bus.write_any(gpa) {
            return false;
        }
        super::skip(&mut self.hw, len);
        true
    }

    /// Maps the page by which the processor knows accesses to the APIC, if that is what the guest reached;
    /// returns if so.
    fn maps_apic_page(&self, gpa: u64) -> Result<bool> {
        let shown = self.arch.apic.as_deref().is_some_and(LocalApic::shows_page);
        if gpa & !0xfff != DEFAULT_ADDRESS || !shown {
            return Ok(false);
        }
        self.memory.map_own(gpa >> 12, self.apics.access_page()?)
    }

    /// The guest accessed its APIC's page in a way that needs help.
    pub(super) fn apic_access(
        &mut self,
        offset: u16,
        linear: Option<u64>,
        write: bool,
    ) -> Result<Next> {
        let gpa = DEFAULT_ADDRESS | u64::from(offset);
        let hint = linear.map(|linear| Hint {
            linear,
            gpa,
            write,
            table: false,
        });
        self.emulate(gpa, hint)
    }

    /// Tells the VMM which page the host cannot reach; the error is for KVM_RUN to return.
    pub(super) fn unbacked(&mut self, at: Unbacked) -> Error {
        self.page.set_memory_fault(at.0 & !0xfff, 0x1000);
        EFAULT
    }

    /// Emulates the instruction at RIP, which accessed a device at `gpa`.
    pub(super) fn emulate(&mut self, gpa: u64, hint: Option<Hint>) -> Result<Next> {
        // An event whose delivery touches a device cannot be delivered: there is nothing to resume.
        if self.hw.vectoring().is_some() {
            let raw = self.hw.raw_exit();
            let data = [
                raw.vectoring,
                raw.reason,
                raw.qualification,
                gpa,
                self.shared.cpu() as u64,
            ];
            self.page
                .set_internal_error(crate::abi::internal::DELIVERY_EVENT, &data);
            return Ok(Next::User);
        }
        self.shared.stats.insn_emulation.bump();
        self.arch.emulator.abort();
        if let Some(hint) = hint {
            self.arch.emulator.set_hint(hint);
        }
        self.step_emulator()
    }

    /// Goes on with the instruction until the VMM is needed or it is done.
    pub(super) fn step_emulator(&mut self) -> Result<Next> {
        let outcome = loop {
            let mut cpu = EmuCpu::new(&mut self.hw, &self.fpu, self.arch);
            let arch = &mut *self.arch;
            let mut memory = EmuMemory::new(self.memory, self.shared, &arch.devices);
            match arch.emulator.step(&mut cpu, &mut memory) {
                Outcome::MmioWrite { gpa, data, len } => {
                    if !self.apic_write(gpa, &data, len) && !self.device_write(gpa, &data, len) {
                        break Outcome::MmioWrite { gpa, data, len };
                    }
                }
                Outcome::MmioRead { gpa, len } => match self.device_read(gpa, len) {
                    Some(data) => self.arch.emulator.complete_read(data),
                    None => break Outcome::MmioRead { gpa, len },
                },
                outcome => break outcome,
            }
        };

        match outcome {
            Outcome::Done(done) => {
                // Each iteration of a repeated instruction ends with a step.
                if done.retired || done.single_step {
                    super::retire_emulated(&mut self.hw, done.single_step, done.shadow);
                }
                Ok(Next::Guest)
            }
            Outcome::MmioRead { gpa, len } => {
                self.page.set_mmio(gpa, len, None);
                self.leave_for_mmio(true)
            }
            Outcome::MmioWrite { gpa, data, len } => {
                self.page.set_mmio(gpa, len, Some(data));
                self.leave_for_mmio(false)
            }
            Outcome::Fault(fault) => self.raise(fault),
            Outcome::Service { service, len } => self.serve(service, len),
            Outcome::Unhandled => match self.unprotect_table() {
                Some(next) => Ok(next),
                None => self.not_emulated(),
            },
            Outcome::Host(at) => {
                if self.arch.emulator.in_progress() {
                    // If the VMM mends it, the device is not to be read a second time.
                    self.suspend(false);
                }
                Err(self.unbacked(at))
            }
        }
    }

    /// Tells the VMM that the instruction is none that is emulated.
    pub(super) fn not_emulated(&mut self) -> Result<Next> {
        self.shared.stats.insn_emulation_fail.bump();
        let raw = self.hw.raw_exit();
        self.page
            .set_emulation_error(self.arch.emulator.insn_bytes(), &raw);
        Ok(Next::User)
    }

    /// Offers a device write to the devices in the kernel; returns if one took it.
    fn device_write(&self, gpa: u64, data: &[u8; 8], len: u8) -> bool {
        let data = data.get(..usize::from(len)).unwrap_or(data);
        self.bus.write(Space::Memory, gpa, data)
    }

    /// Offers a device read to the devices in the kernel; returns what one answered.
    fn device_read(&mut self, gpa: u64, len: u8) -> Option<[u8; 8]> {
        if let Some(data) = self.apic_read(gpa, len) {
            return Some(data);
        }
        let mut data = [0; 8];
        let part = data.get_mut(..usize::from(len))?;
        self.bus.read(Space::Memory, gpa, part).then_some(data)
    }

    fn leave_for_mmio(&mut self, read: bool) -> Result<Next> {
        self.shared.stats.mmio_exits.bump();
        self.suspend(read);
        Ok(Next::User)
    }

    /// The instruction goes on with the next KVM_RUN.
    fn suspend(&mut self, read: bool) {
        let at = LinearRip::of(&mut self.hw);
        self.arch.pending = Pending::Mmio(PendingMmio { read, at });
    }

    /// The VMM has done what it was asked for.
    pub(super) fn complete_mmio(&mut self, pending: PendingMmio) -> Result<Next> {
        if !pending.at.is_still(&mut self.hw) {
            self.arch.emulator.abort();
            return Ok(Next::Guest);
        }
        if pending.read {
            self.arch.emulator.complete_read(self.page.mmio_data());
        }
        self.step_emulator()
    }
}
