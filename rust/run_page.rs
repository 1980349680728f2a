// SPDX-License-Identifier: GPL-2.0

//! `struct kvm_run` and the data of port accesses: the pages that a vCPU shares with its VMM.
//!
//! User space may write to them at any moment. So every field is read once, and nothing that was
//! written here is believed when it is read back.

use crate::abi;
use crate::backend::RawExit;
use crate::bindings::kvm_run;
use crate::linux::file::NewVma;
use crate::linux::page::KernelPage;
use crate::linux::page::PAGE_SIZE;
use crate::x86::msr::Msr;
use core::mem::offset_of;
use kernel::prelude::*;

/// The two pages.
pub(crate) struct RunPages {
    run: KernelPage,
    port_data: KernelPage,
}

impl RunPages {
    /// Allocates them, zeroed.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            run: KernelPage::new()?,
            port_data: KernelPage::new()?,
        })
    }

    /// Maps as many of them, and of `ring` after them, as the mapping spans: EINVAL if it goes beyond.
    pub(crate) fn mmap(&self, vma: &NewVma, ring: &KernelPage) -> Result {
        let pages: [_; abi::RUN_PAGES] = [&self.run, &self.port_data, ring];
        let first = vma.first_page();
        for index in 0..vma.pages() {
            let page = first
                .checked_add(index)
                .and_then(|n| pages.get(n))
                .ok_or(EINVAL)?;
            vma.insert(index, page)?;
        }
        Ok(())
    }

    /// `immediate_exit`.
    pub(crate) fn immediate_exit(&self) -> bool {
        self.run
            .read::<u8>(offset_of!(kvm_run, immediate_exit__unsafe))
            != 0
    }

    /// `request_interrupt_window`.
    pub(crate) fn request_interrupt_window(&self) -> bool {
        self.run
            .read::<u8>(offset_of!(kvm_run, request_interrupt_window))
            != 0
    }

    /// `cr8`, which the VMM's local APIC may have changed.
    pub(crate) fn cr8(&self) -> u64 {
        self.run.read(offset_of!(kvm_run, cr8))
    }

    /// Registers are to be taken from here, or left here, or such as there are not were named.
    #[inline]
    pub(crate) fn syncs_regs(&self) -> bool {
        self.valid_regs() | self.dirty_regs() != 0
    }

    /// `kvm_valid_regs`: the sets of registers that the VMM wants to find here.
    #[inline]
    pub(crate) fn valid_regs(&self) -> u64 {
        self.run.read(offset_of!(kvm_run, kvm_valid_regs))
    }

    /// `kvm_dirty_regs`: those that it has changed here.
    #[inline]
    pub(crate) fn dirty_regs(&self) -> u64 {
        self.run.read(offset_of!(kvm_run, kvm_dirty_regs))
    }

    /// Strikes a set off `kvm_dirty_regs`.
    pub(crate) fn strike_dirty_regs(&self, set: u32) {
        let left = self.dirty_regs() & !u64::from(set);
        self.run.write(offset_of!(kvm_run, kvm_dirty_regs), left);
    }

    /// The general registers that the VMM left.
    pub(crate) fn synced_regs(&self) -> abi::kvm_regs {
        self.run.read(offset_of!(kvm_run, s.regs.regs))
    }

    /// The system registers that the VMM left.
    pub(crate) fn synced_sregs(&self) -> abi::kvm_sregs {
        self.run.read(offset_of!(kvm_run, s.regs.sregs))
    }

    /// The events that the VMM left.
    pub(crate) fn synced_events(&self) -> abi::kvm_vcpu_events {
        self.run.read(offset_of!(kvm_run, s.regs.events))
    }

    /// Leaves general registers for the VMM.
    pub(crate) fn set_synced_regs(&self, regs: abi::kvm_regs) {
        self.run.write(offset_of!(kvm_run, s.regs.regs), regs);
    }

    /// Leaves system registers for the VMM.
    pub(crate) fn set_synced_sregs(&self, sregs: abi::kvm_sregs) {
        self.run.write(offset_of!(kvm_run, s.regs.sregs), sregs);
    }

    /// Leaves events for the VMM.
    pub(crate) fn set_synced_events(&self, events: abi::kvm_vcpu_events) {
        self.run.write(offset_of!(kvm_run, s.regs.events), events);
    }

    /// Why KVM_RUN returns.
    pub(crate) fn set_exit_reason(&self, reason: u32) {
        self.run.write(offset_of!(kvm_run, exit_reason), reason);
    }

    /// What every return tells.
    pub(crate) fn set_outputs(&self, ready: bool, interrupts_on: bool, cr8: u64, apic_base: u64) {
        let run = &self.run;
        run.write(
            offset_of!(kvm_run, ready_for_interrupt_injection),
            u8::from(ready),
        );
        run.write(offset_of!(kvm_run, if_flag), u8::from(interrupts_on));
        run.write(offset_of!(kvm_run, flags), 0u16);
        run.write(offset_of!(kvm_run, cr8), cr8);
        run.write(offset_of!(kvm_run, apic_base), apic_base);
    }

    /// KVM_EXIT_IO; the data is in the second page, `count` units of `size` bytes.
    pub(crate) fn set_io(&self, input: bool, size: u8, port: u16, count: u32) {
        self.set_exit_reason(abi::exit::IO);
        let run = &self.run;
        run.write(
            offset_of!(kvm_run, __bindgen_anon_1.io.direction),
            u8::from(!input),
        );
        run.write(offset_of!(kvm_run, __bindgen_anon_1.io.size), size);
        run.write(offset_of!(kvm_run, __bindgen_anon_1.io.port), port);
        run.write(offset_of!(kvm_run, __bindgen_anon_1.io.count), count);
        run.write(
            offset_of!(kvm_run, __bindgen_anon_1.io.data_offset),
            PAGE_SIZE as u64,
        );
    }

    /// Puts the data of an output where the VMM looks for it.
    pub(crate) fn set_port_data(&self, data: &[u8]) {
        self.port_data.write_bytes(0, data);
    }

    /// Takes the data of an input.
    pub(crate) fn port_data(&self, out: &mut [u8]) {
        self.port_data.read_bytes(0, out);
    }

    /// KVM_EXIT_MMIO of 1 to 8 bytes; `data` for a write.
    pub(crate) fn set_mmio(&self, gpa: u64, len: u8, data: Option<[u8; 8]>) {
        self.set_exit_reason(abi::exit::MMIO);
        let run = &self.run;
        run.write(offset_of!(kvm_run, __bindgen_anon_1.mmio.phys_addr), gpa);
        run.write(
            offset_of!(kvm_run, __bindgen_anon_1.mmio.data),
            u64::from_le_bytes(data.unwrap_or_default()),
        );
        run.write(
            offset_of!(kvm_run, __bindgen_anon_1.mmio.len),
            u32::from(len),
        );
        run.write(
            offset_of!(kvm_run, __bindgen_anon_1.mmio.is_write),
            u8::from(data.is_some()),
        );
    }

    /// What the VMM answered to a read.
    pub(crate) fn mmio_data(&self) -> [u8; 8] {
        self.run
            .read::<u64>(offset_of!(kvm_run, __bindgen_anon_1.mmio.data))
            .to_le_bytes()
    }

    /// KVM_EXIT_MEMORY_FAULT, which comes with EFAULT: a guest-physical address and a size in bytes.
    pub(crate) fn set_memory_fault(&self, gpa: u64, size: u64) {
        self.set_exit_reason(abi::exit::MEMORY_FAULT);
        let run = &self.run;
        // There is no private memory, and how the guest accessed it has no flag.
        run.write(
            offset_of!(kvm_run, __bindgen_anon_1.memory_fault.flags),
            0u64,
        );
        run.write(offset_of!(kvm_run, __bindgen_anon_1.memory_fault.gpa), gpa);
        run.write(
            offset_of!(kvm_run, __bindgen_anon_1.memory_fault.size),
            size,
        );
    }

    /// KVM_EXIT_INTERNAL_ERROR with up to 16 words.
    pub(crate) fn set_internal_error(&self, suberror: u32, data: &[u64]) {
        self.set_exit_reason(abi::exit::INTERNAL_ERROR);
        let data = data.get(..16).unwrap_or(data);
        let run = &self.run;
        run.write(
            offset_of!(kvm_run, __bindgen_anon_1.internal.suberror),
            suberror,
        );
        run.write(
            offset_of!(kvm_run, __bindgen_anon_1.internal.ndata),
            data.len() as u32,
        );
        let mut at = offset_of!(kvm_run, __bindgen_anon_1.internal.data);
        for word in data {
            run.write(at, *word);
            at += 8;
        }
    }

    /// KVM_INTERNAL_ERROR_EMULATION with the bytes of the instruction, as the API lays them out.
    pub(crate) fn set_emulation_error(&self, insn: &[u8], exit: &RawExit) {
        // data[0] of the generic layout: the flags word, then the count and 15 bytes.
        let mut words = [0u64; 7];
        let mut bytes = [0u8; 16];
        let len = insn.len().min(15);
        if let (Some(to), Some(from)) = (bytes.get_mut(1..=len), insn.get(..len)) {
            to.copy_from_slice(from);
        }
        bytes[0] = len as u8;
        if len != 0 {
            // KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES.
            words[0] = 1;
        }
        words[1] = u64::from_le_bytes([
            bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7],
        ]);
        words[2] = u64::from_le_bytes([
            bytes[8], bytes[9], bytes[10], bytes[11], bytes[12], bytes[13], bytes[14], bytes[15],
        ]);
        words[3] = exit.reason;
        words[4] = exit.qualification;
        words[5] = exit.vectoring;
        words[6] = exit.interruption;
        self.set_internal_error(abi::internal::EMULATION, &words);
    }

    /// KVM_EXIT_HYPERCALL; `wide` is whether the guest executes 64-bit code.
    pub(crate) fn set_hypercall(&self, number: u64, args: [u64; 3], wide: bool) {
        self.set_exit_reason(abi::exit::HYPERCALL);
        let run = &self.run;
        run.write(offset_of!(kvm_run, __bindgen_anon_1.hypercall.nr), number);
        let mut at = offset_of!(kvm_run, __bindgen_anon_1.hypercall.args);
        for arg in args {
            run.write(at, arg);
            at += 8;
        }
        // A VMM that says nothing has done it.
        run.write(offset_of!(kvm_run, __bindgen_anon_1.hypercall.ret), 0u64);
        // KVM_EXIT_HYPERCALL_LONG_MODE.
        run.write(
            offset_of!(kvm_run, __bindgen_anon_1.hypercall.__bindgen_anon_1.flags),
            u64::from(wide),
        );
    }

    /// What the VMM's hypercall came to.
    pub(crate) fn hypercall_result(&self) -> u64 {
        self.run
            .read(offset_of!(kvm_run, __bindgen_anon_1.hypercall.ret))
    }

    /// KVM_EXIT_IOAPIC_EOI.
    pub(crate) fn set_ioapic_eoi(&self, vector: u8) {
        self.set_exit_reason(abi::exit::IOAPIC_EOI);
        self.run
            .write(offset_of!(kvm_run, __bindgen_anon_1.eoi.vector), vector);
    }

    /// KVM_EXIT_X86_RDMSR, or KVM_EXIT_X86_WRMSR of a value.
    pub(crate) fn set_msr(&self, msr: Msr, value: Option<u64>, reason: u32) {
        let exit = match value {
            None => abi::exit::RDMSR,
            Some(_) => abi::exit::WRMSR,
        };
        self.set_exit_reason(exit);
        let run = &self.run;
        // The answer, and what pads it.
        run.write(offset_of!(kvm_run, __bindgen_anon_1.msr.error), 0u64);
        run.write(offset_of!(kvm_run, __bindgen_anon_1.msr.reason), reason);
        run.write(offset_of!(kvm_run, __bindgen_anon_1.msr.index), msr.0);
        run.write(
            offset_of!(kvm_run, __bindgen_anon_1.msr.data),
            value.unwrap_or(0),
        );
    }

    /// Whether the VMM refused the access.
    pub(crate) fn msr_refused(&self) -> bool {
        self.run
            .read::<u8>(offset_of!(kvm_run, __bindgen_anon_1.msr.error))
            != 0
    }

    /// What the VMM answered to a read.
    pub(crate) fn msr_data(&self) -> u64 {
        self.run
            .read(offset_of!(kvm_run, __bindgen_anon_1.msr.data))
    }

    /// KVM_EXIT_EXCEPTION.
    pub(crate) fn set_exception(&self, vector: u32, error_code: u32) {
        self.set_exit_reason(abi::exit::EXCEPTION);
        let run = &self.run;
        run.write(offset_of!(kvm_run, __bindgen_anon_1.ex.exception), vector);
        run.write(
            offset_of!(kvm_run, __bindgen_anon_1.ex.error_code),
            error_code,
        );
    }

    /// KVM_EXIT_DEBUG: an exception of the debugger's, and the linear address of the instruction.
    pub(crate) fn set_debug(&self, vector: u32, pc: u64) {
        self.set_exit_reason(abi::exit::DEBUG);
        let run = &self.run;
        run.write(
            offset_of!(kvm_run, __bindgen_anon_1.debug.arch.exception),
            vector,
        );
        run.write(offset_of!(kvm_run, __bindgen_anon_1.debug.arch.pc), pc);
    }

    /// And what DR6 and DR7 would be for it.
    pub(crate) fn set_debug_registers(&self, dr6: u64, dr7: u64) {
        let run = &self.run;
        run.write(offset_of!(kvm_run, __bindgen_anon_1.debug.arch.dr6), dr6);
        run.write(offset_of!(kvm_run, __bindgen_anon_1.debug.arch.dr7), dr7);
    }

    /// KVM_EXIT_FAIL_ENTRY.
    pub(crate) fn set_entry_failure(&self, reason: u64, cpu: i32) {
        self.set_exit_reason(abi::exit::FAIL_ENTRY);
        self.run.write(
            offset_of!(
                kvm_run,
                __bindgen_anon_1.fail_entry.hardware_entry_failure_reason
            ),
            reason,
        );
        self.run.write(
            offset_of!(kvm_run, __bindgen_anon_1.fail_entry.cpu),
            cpu as u32,
        );
    }
}
