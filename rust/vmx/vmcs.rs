// SPDX-License-Identifier: GPL-2.0

//! A VMCS as an object, and the instructions that work on the current one.
//!
//! A VMCS is *active* on one CPU at a time, which may cache it: before another CPU may load it, and
//! before its page is freed, it must be cleared there (SDM vol. 3, 25.11.1). A VMCS is *current* on
//! a CPU after VMPTRLD. rkvm's are current only while a vCPU is loaded; see [`super::load`].

use super::fields::Field;
use super::fields::Width;
use crate::linux::cpu;
use crate::linux::page::KernelPage;
use core::arch::asm;
use kernel::prelude::*;
use kernel::sync::atomic::ordering::Acquire;
use kernel::sync::atomic::ordering::Relaxed;
use kernel::sync::atomic::ordering::Release;
use kernel::sync::atomic::Atomic;

/// No CPU.
pub(crate) const NO_CPU: i32 = -1;

/// The region of a virtual-machine control structure.
///
/// # Invariants
///
/// The VMCS is active on no CPU but `cpu`.
pub(crate) struct Vmcs {
    page: KernelPage,
    cpu: Atomic<i32>,
    launched: Atomic<bool>,
}

impl Vmcs {
    /// Allocates a VMCS; it is active nowhere.
    pub(crate) fn new(revision: u32) -> Result<Self> {
        let page = KernelPage::new()?;
        page.write(0, revision);
        // INVARIANT: No CPU has seen it.
        Ok(Self {
            page,
            cpu: Atomic::new(NO_CPU),
            launched: Atomic::new(false),
        })
    }

    /// The physical address.
    #[inline]
    pub(crate) fn phys(&self) -> u64 {
        self.page.phys()
    }

    /// The CPU that may cache it. If it is none, what clearing it changed is seen.
    #[inline]
    pub(crate) fn cpu(&self) -> i32 {
        self.cpu.load(Acquire)
    }

    /// Whether the next entry is a VMRESUME.
    #[inline]
    pub(crate) fn launched(&self) -> bool {
        self.launched.load(Relaxed)
    }

    /// Notes that a VMLAUNCH succeeded.
    #[inline]
    pub(crate) fn set_launched(&self) {
        self.launched.store(true, Relaxed);
    }

    /// Makes the VMCS active nowhere, by an IPI if need be. Interrupts are on.
    pub(crate) fn clear(&self) {
        let cpu = self.cpu();
        if cpu != NO_CPU {
            // SAFETY: `clear_here` takes a `Vmcs`, which lives during the call as that is waited
            // for. If the CPU is offline, its going down cleared the VMCS.
            unsafe {
                cpu::call_on(
                    cpu,
                    Self::clear_ipi,
                    core::ptr::from_ref(self).cast_mut().cast(),
                )
            };
        }
    }

    /// # Safety
    ///
    /// `this` points to a `Vmcs`.
    unsafe extern "C" fn clear_ipi(this: *mut core::ffi::c_void) {
        // SAFETY: By the above.
        unsafe { &*this.cast::<Self>() }.clear_here();
    }

    /// Clears the VMCS if it is active on this CPU, which the caller cannot leave.
    pub(crate) fn clear_here(&self) {
        // SAFETY: Reads the number of the current CPU.
        if self.cpu() != unsafe { crate::bindings::rkvm_smp_processor_id() } {
            return;
        }
        let phys = self.phys();
        // SAFETY: The region is ours and VMX is on: it is turned off on a CPU only after all that
        // is active there was cleared.
        if unsafe { vmclear(phys) }.is_err() {
            pr_err!("VMCLEAR of {:#x} failed\n", phys);
        }
        super::load::forget_current(phys);
        self.launched.store(false, Relaxed);
        // INVARIANT: It was active here only, and is no more.
        self.cpu.store(NO_CPU, Release);
    }

    /// Makes the VMCS current on `cpu`, which this is, with preemption off.
    pub(crate) fn make_current(&self, cpu: i32) {
        if self.cpu() != cpu {
            self.clear();
            // INVARIANT: It is active nowhere, and will be here.
            self.cpu.store(cpu, Relaxed);
            // SAFETY: The region is ours and active nowhere. The first VMCLEAR initialises it.
            if unsafe { vmclear(self.phys()) }.is_err() {
                pr_err!("VMCLEAR of {:#x} failed\n", self.phys());
            }
        }
        // SAFETY: The region is ours, initialised, and active on no other CPU.
        if unsafe { vmptrld(self.phys()) }.is_err() {
            pr_err!("VMPTRLD of {:#x} failed\n", self.phys());
        }
    }
}

impl Drop for Vmcs {
    fn drop(&mut self) {
        self.clear();
    }
}

/// An instruction of VMX failed: bits 0 and 6 of RFLAGS told so.
pub(crate) struct VmFail;

/// An instruction of VMX that `ends` in the text after it. When the machine goes down, VMX is turned
/// off under threads that go on (see [`super::power`]), and each such instruction is #UD: then
/// `instead` is done, and the thread goes on after the text. At any other time a fault is a bug of
/// ours, and oopses.
///
/// The fault's way is out of line, so that the other costs nothing.
macro_rules! vmx_asm {
    ($op:expr, $ends:literal, $instead:literal, $($operands:tt)*) => {
        asm!(
            "2:",
            $op,
            $ends,
            "3:",
            ".pushsection .text.unlikely, \"ax\"",
            "4: cmp byte ptr [rip + virt_rebooting], 0",
            "jne 5f",
            "ud2",
            "5:",
            $instead,
            "jmp 3b",
            ".popsection",
            // A struct exception_table_entry, of EX_TYPE_DEFAULT.
            ".pushsection __ex_table, \"a\"",
            ".balign 4",
            ".long 2b - .",
            ".long 4b - .",
            ".long 1",
            ".popsection",
            $($operands)*
        )
    };
}

macro_rules! vmx_memory_op {
    ($(#[$doc:meta])* $name:ident, $op:literal) => {
        $(#[$doc])*
        #[inline]
        pub(crate) unsafe fn $name(phys: u64) -> Result<(), VmFail> {
            let fail: u8;
            // SAFETY: As the caller promises.
            unsafe {
                vmx_asm!(concat!($op, " qword ptr [{}]"), "setna {1}", "mov {1}, 0",
                         in(reg) &phys, lateout(reg_byte) fail, options(nostack));
            }
            if fail == 0 { Ok(()) } else { Err(VmFail) }
        }
    };
}

vmx_memory_op! {
    /// VMCLEAR.
    ///
    /// # Safety
    ///
    /// `phys` is a VMCS region that is active on no other CPU; VMX is on.
    vmclear, "vmclear"
}
vmx_memory_op! {
    /// VMPTRLD.
    ///
    /// # Safety
    ///
    /// `phys` is a VMCS region, initialised and active on no other CPU; VMX is on.
    vmptrld, "vmptrld"
}

/// The physical address of the current VMCS, or all ones.
///
/// # Safety
///
/// VMX is on.
#[inline]
pub(crate) unsafe fn vmptrst() -> u64 {
    let mut phys = u64::MAX;
    // SAFETY: VMX is on, by the caller; the operand is eight bytes of ours.
    unsafe { vmx_asm!("vmptrst qword ptr [{}]", "", "", in(reg) &mut phys, options(nostack)) };
    phys
}

/// Reads a field of the current VMCS.
///
/// # Safety
///
/// The caller's VMCS is current: the vCPU is loaded, and stays so by preempt notifiers. The
/// field exists on this processor.
#[inline]
pub(crate) unsafe fn vmread<T: Width>(field: Field<T>) -> T {
    let value: u64;
    // SAFETY: As the caller promises; VMREAD writes a register and flags only. What is read after a
    // fault is nothing that this code writes.
    unsafe {
        vmx_asm!("vmread {}, {}", "", "mov {0:e}, 0",
                 out(reg) value, in(reg) field.encoding(), options(nomem, nostack));
    }
    T::from_raw(value)
}

/// Writes a field of the current VMCS.
///
/// # Safety
///
/// As [`vmread`]; and the value, should it be host state or a control, is one that leaves the host
/// in order after the next exit.
#[inline]
pub(crate) unsafe fn vmwrite<T: Width>(field: Field<T>, value: T) {
    // SAFETY: As the caller promises.
    unsafe {
        vmx_asm!("vmwrite {}, {}", "", "",
                 in(reg) field.encoding(), in(reg) value.to_raw(), options(nostack));
    }
}

/// The descriptor of INVEPT and INVVPID.
#[repr(C)]
struct InvDescriptor([u64; 2]);

/// Invalidates what the TLB of this CPU caches of an EPT.
///
/// # Safety
///
/// VMX is on, and INVEPT has the type: 1, a single context, or 2, all.
pub(crate) unsafe fn invept(kind: u64, eptp: u64) {
    let desc = InvDescriptor([eptp, 0]);
    // SAFETY: As the caller promises; flushing too much is only slow.
    unsafe {
        vmx_asm!("invept {}, xmmword ptr [{}]", "", "",
                 in(reg) kind, in(reg) &desc, options(nostack));
    }
}

/// Invalidates the linear mappings of a VPID on this CPU.
///
/// # Safety
///
/// VMX is on, and INVVPID has the type: 1, a single context, or 2, all.
pub(crate) unsafe fn invvpid(kind: u64, vpid: u16) {
    let desc = InvDescriptor([u64::from(vpid), 0]);
    // SAFETY: As the caller promises.
    unsafe {
        vmx_asm!("invvpid {}, xmmword ptr [{}]", "", "",
                 in(reg) kind, in(reg) &desc, options(nostack));
    }
}
