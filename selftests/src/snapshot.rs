// SPDX-License-Identifier: GPL-2.0

//! The whole state of a machine but its memory: taken out of one, put into another.
//!
//! A [`Snapshot`] is plain data, which can lie in memory that processes share.

use crate::host::patient;
use crate::sys::{self, Error};
use crate::vm::{Cpuid, Kvm, Vcpu, Vm};
use crate::{ensure, Outcome, Verdict};
use kvm_bindings as kb;

/// The most vCPUs of a machine.
pub const VCPUS: usize = 2;
/// The most MSRs of a vCPU.
const MSRS: usize = 256;
/// Bytes of `struct kvm_xsave`.
const XSAVE: usize = 4096;

/// IA32_TSC.
const TSC: u32 = 0x10;
/// IA32_APIC_BASE.
const APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
const TSC_DEADLINE: u32 = 0x6e0;

/// The interrupt controllers in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chips {
    /// None.
    None,
    /// Local APICs.
    Split,
    /// All, and the timer.
    Full,
}

/// In which order a vCPU's state is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As QEMU does it.
    Vmm,
    /// As the kernel's selftests do it.
    Tests,
}

/// The state of a vCPU.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct VcpuState {
    /// General registers.
    pub regs: kb::kvm_regs,
    /// System registers.
    pub sregs: kb::kvm_sregs,
    /// Events on their way.
    pub events: kb::kvm_vcpu_events,
    /// KVM_MP_STATE_*.
    pub mp_state: kb::kvm_mp_state,
    debugregs: kb::kvm_debugregs,
    xcrs: kb::kvm_xcrs,
    xsave: [u8; XSAVE],
    lapic: kb::kvm_lapic_state,
    msrs: [(u32, u64); MSRS],
    nmsrs: usize,
}

/// The state of a machine.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Snapshot {
    /// Of each vCPU.
    pub vcpus: [VcpuState; VCPUS],
    irqchips: [kb::kvm_irqchip; 3],
    pit: kb::kvm_pit_state2,
}

/// The numbers of the MSRs that make up a vCPU's state, as a device says.
///
/// # Errors
///
/// What the kernel answered.
pub fn msr_list(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    #[repr(C)]
    struct List {
        n: u32,
        indices: [u32; 1024],
    }
    let mut list = Box::new(List {
        n: 1024,
        indices: [0; 1024],
    });
    kvm.fd.ioctl_mut(sys::KVM_GET_MSR_INDEX_LIST, &mut *list)?;
    Ok(list.indices[..list.n as usize].to_vec())
}

/// Creates the interrupt controllers of a machine that has no vCPU yet.
///
/// # Errors
///
/// What the kernel answered.
pub fn create_chips(vm: &Vm, chips: Chips) -> Result<(), Error> {
    match chips {
        Chips::None => {}
        Chips::Split => vm.enable_cap(kb::KVM_CAP_SPLIT_IRQCHIP, 24)?,
        Chips::Full => {
            vm.fd.ioctl(sys::KVM_CREATE_IRQCHIP, 0)?;
            vm.fd
                .ioctl_ref(sys::KVM_CREATE_PIT2, &kb::kvm_pit_config::default())?;
        }
    }
    Ok(())
}

impl VcpuState {
    /// Takes the state of a vCPU that does not run and has nothing to be completed.
    fn take(&mut self, kvm: &Kvm, vcpu: &Vcpu, chips: Chips) -> Result<(), Error> {
        // A SIPI or INIT that waits shows in this one, and changes registers.
        self.mp_state = vcpu.mp_state()?;
        // An exception that waits may have an effect on CR2 or DR6.
        self.events = vcpu.events()?;
        self.regs = vcpu.regs()?;
        self.sregs = vcpu.sregs()?;
        self.debugregs = vcpu.debugregs()?;
        vcpu.fd.ioctl_mut(sys::KVM_GET_XSAVE, &mut self.xsave)?;
        self.xcrs = vcpu.xcrs()?;
        self.nmsrs = 0;
        for index in msr_list(kvm)? {
            if let (Some(value), Some(place)) = (vcpu.msr(index)?, self.msrs.get_mut(self.nmsrs)) {
                *place = (index, value);
                self.nmsrs += 1;
            }
        }
        if chips != Chips::None {
            vcpu.fd.ioctl_mut(sys::KVM_GET_LAPIC, &mut self.lapic)?;
        }
        Ok(())
    }

    fn list(&self) -> &[(u32, u64)] {
        &self.msrs[..self.nmsrs.min(MSRS)]
    }

    /// The value of an MSR.
    #[must_use]
    pub fn msr(&self, index: u32) -> Option<u64> {
        let found = self.list().iter().find(|(i, _)| *i == index);
        found.map(|(_, value)| *value)
    }

    /// Sets the MSRs for which `which` says so. One that the device lists has to be taken, or to have the
    /// value already.
    fn put_msrs(&self, kvm: &Kvm, vcpu: &Vcpu, which: impl Fn(u32) -> bool) -> Outcome {
        let listed = msr_list(kvm)?;
        for (index, value) in self.list().iter().filter(|(index, _)| which(*index)) {
            if !vcpu.set_msr(*index, *value)? && listed.contains(index) {
                let now = vcpu.msr(*index)?;
                ensure!(
                    now == Some(*value),
                    "MSR {index:#x} is {now:x?}, and {value:#x} is refused"
                );
            }
        }
        Ok(())
    }

    fn put(&self, kvm: &Kvm, vcpu: &Vcpu, chips: Chips, order: Order) -> Outcome {
        if chips != Chips::None {
            // The mode decides how the registers are laid out.
            vcpu.set_msr(APIC_BASE, self.sregs.apic_base)?;
            vcpu.fd.ioctl_ref(sys::KVM_SET_LAPIC, &self.lapic)?;
        }
        let xsave = |vcpu: &Vcpu| vcpu.fd.ioctl_ref(sys::KVM_SET_XSAVE, &self.xsave);
        match order {
            Order::Vmm => {
                vcpu.set_sregs(&self.sregs)?;
                vcpu.set_regs(&self.regs)?;
                xsave(vcpu)?;
                vcpu.set_xcrs(&self.xcrs)?;
                self.put_msrs(kvm, vcpu, |index| index != TSC_DEADLINE)?;
                vcpu.set_events(&self.events)?;
                if chips != Chips::None {
                    vcpu.set_mp_state(&self.mp_state)?;
                }
                // It is one of the counter, which is set by now.
                self.put_msrs(kvm, vcpu, |index| index == TSC_DEADLINE)?;
                vcpu.set_debugregs(&self.debugregs)?;
            }
            Order::Tests => {
                vcpu.set_sregs(&self.sregs)?;
                self.put_msrs(kvm, vcpu, |index| index == TSC)?;
                self.put_msrs(kvm, vcpu, |index| index != TSC)?;
                vcpu.set_xcrs(&self.xcrs)?;
                xsave(vcpu)?;
                vcpu.set_regs(&self.regs)?;
                vcpu.set_events(&self.events)?;
                if chips != Chips::None {
                    vcpu.set_mp_state(&self.mp_state)?;
                }
                vcpu.set_debugregs(&self.debugregs)?;
            }
        }
        Ok(())
    }
}

impl Snapshot {
    /// Takes the state of a machine whose vCPUs do not run and have nothing to be completed.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn take(&mut self, kvm: &Kvm, vm: &Vm, vcpus: &[Vcpu], chips: Chips) -> Result<(), Error> {
        for (state, vcpu) in self.vcpus.iter_mut().zip(vcpus) {
            state.take(kvm, vcpu, chips)?;
        }
        if chips == Chips::Full {
            for (id, chip) in (0..).zip(&mut self.irqchips) {
                chip.chip_id = id;
                vm.fd.ioctl_mut(sys::KVM_GET_IRQCHIP, chip)?;
            }
            vm.fd.ioctl_mut(sys::KVM_GET_PIT2, &mut self.pit)?;
        }
        Ok(())
    }

    /// Puts the state into a new machine.
    ///
    /// # Errors
    ///
    /// What the kernel answered, or what it should not have refused.
    pub fn put(&self, kvm: &Kvm, vm: &Vm, vcpus: &[Vcpu], chips: Chips, order: Order) -> Outcome {
        if chips == Chips::Full {
            for chip in &self.irqchips {
                vm.fd.ioctl_ref(sys::KVM_SET_IRQCHIP, chip)?;
            }
            vm.fd.ioctl_ref(sys::KVM_SET_PIT2, &self.pit)?;
        }
        for (state, vcpu) in self.vcpus.iter().zip(vcpus) {
            state.put(kvm, vcpu, chips, order)?;
        }
        Ok(())
    }
}

/// Creates the vCPUs of a machine, each with its number in its CPUID.
///
/// # Errors
///
/// What the kernel answered.
pub fn create_vcpus(vm: &Vm, cpuid: &Cpuid, n: usize) -> Result<Vec<Vcpu>, Error> {
    (0..n)
        .map(|id| {
            let vcpu = vm.create_vcpu(id)?;
            let mut own = Box::new(cpuid.clone());
            crate::apic::set_apic_id(&mut own, id);
            vcpu.set_cpuid(&own)?;
            Ok(vcpu)
        })
        .collect()
}

/// What both devices can give a guest: the leaves of the first, with the bits of the second.
///
/// # Errors
///
/// What the kernel answered.
pub fn common_cpuid(a: &Kvm, b: &Kvm) -> Result<Box<Cpuid>, Error> {
    let (mut cpuid, other) = (a.supported_cpuid()?, b.supported_cpuid()?);
    for entry in cpuid.list_mut() {
        // Leaves whose registers are sets of features.
        if !matches!(entry.function, 1 | 7 | 0xd | 0x8000_0001) {
            continue;
        }
        let (ebx, ecx, edx, eax) = other
            .find(entry.function, entry.index)
            .map_or((0, 0, 0, 0), |o| (o.ebx, o.ecx, o.edx, o.eax));
        match (entry.function, entry.index) {
            (1 | 0x8000_0001, _) => {
                entry.ecx &= ecx;
                entry.edx &= edx;
            }
            (7, 0) => {
                entry.ebx &= ebx;
                entry.ecx &= ecx;
                entry.edx &= edx;
            }
            (0xd, 0) => entry.eax &= eax,
            _ => {}
        }
    }
    Ok(cpuid)
}

/// Waits for a child process, and says if it was successful.
///
/// # Errors
///
/// A failure, if it was killed or takes too long.
pub fn wait_for(pid: i32, ms: u64) -> Result<bool, Verdict> {
    let end = std::time::Instant::now() + std::time::Duration::from_millis(patient(ms));
    match crate::tap::wait_until(pid, end) {
        Some(status) => Ok(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0),
        None => {
            // SAFETY: Kills and reaps a child of this process.
            unsafe {
                libc::kill(pid, libc::SIGKILL);
                libc::waitpid(pid, std::ptr::null_mut(), 0);
            }
            Err(Verdict::Fail("a process takes too long".to_string()))
        }
    }
}
