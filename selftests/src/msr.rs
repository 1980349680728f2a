// SPDX-License-Identifier: GPL-2.0

//! A guest that accesses MSRs as it is told, and filters that say which it may.

use crate::check::expect_errno;
use crate::guest::{at, usize_of};
use crate::machine::{set_special_pages, Exit, Machine, Mode};
use crate::mem::Mapping;
use crate::sys::{self, Error};
use crate::vm::{Cpuid, Vm};
use crate::{fail, guest_code, Env, Verdict};
use kvm_bindings as kb;
use std::cell::Cell;

guest_code!(
    do_rdmsr,
    ".code64",
    "rdmsr",
    "shl rdx, 32",
    "or rax, rdx",
    "hlt"
);
guest_code!(do_wrmsr, ".code64", "wrmsr", "hlt");

/// Where the code that writes is.
const WRITER: u64 = at::CODE + 0x100;

/// How an access of the guest's ended.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum Access {
    /// It was done; this is what was read, or written.
    Done(u64),
    /// #GP(0).
    Refused,
    /// The VMM is asked: `KVM_MSR_EXIT_REASON_*`.
    Asked(u32),
}

/// A guest in long mode that accesses one MSR at a time.
#[derive(Debug)]
pub struct MsrGuest {
    /// The machine.
    pub m: Machine,
    /// The VMM was asked, and has not let the guest go on.
    asked: Cell<bool>,
}

impl MsrGuest {
    /// With all supported CPUID leaves.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn new(env: &Env) -> Result<Self, Error> {
        Self::prepared(env, |_| Ok(()))
    }

    /// As [`MsrGuest::new`]; `change` changes the CPUID.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn with_cpuid(env: &Env, change: impl FnOnce(&mut Cpuid)) -> Result<Self, Error> {
        Self::made(env, |_| Ok(()), change)
    }

    /// As [`MsrGuest::new`]; `prepare` gets the VM before it has vCPUs.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn prepared(
        env: &Env,
        prepare: impl FnOnce(&Vm) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        Self::made(env, prepare, |_| ())
    }

    fn made(
        env: &Env,
        prepare: impl FnOnce(&Vm) -> Result<(), Error>,
        change: impl FnOnce(&mut Cpuid),
    ) -> Result<Self, Error> {
        let mem = Mapping::new(at::SIZE, false)?;
        let kvm = env.open()?;
        let vm = kvm.create_vm()?;
        set_special_pages(&vm)?;
        vm.set_memory(0, 0, 0, mem.len() as u64, mem.addr() as u64)?;
        prepare(&vm)?;
        let vcpu = vm.create_vcpu(0)?;
        let mut cpuid = kvm.supported_cpuid()?;
        change(&mut cpuid);
        vcpu.set_cpuid(&cpuid)?;
        let m = Machine { vcpu, vm, kvm, mem };
        m.start(Mode::Long, do_rdmsr())?;
        m.mem.write_bytes(usize_of(WRITER), do_wrmsr());
        let asked = Cell::new(false);
        Ok(MsrGuest { m, asked })
    }

    /// Has the guest read an MSR.
    ///
    /// # Errors
    ///
    /// A failure if it ends otherwise than an access can.
    pub fn read(&self, msr: u32) -> Result<Access, Verdict> {
        self.begin()?;
        self.m.patch_regs(|r| {
            (r.rip, r.rsp, r.rflags) = (at::CODE, at::STACK, 2);
            r.rax = u64::MAX;
            r.rcx = 0xffff_ffff_0000_0000 | u64::from(msr);
            r.rdx = u64::MAX;
        })?;
        self.go_on(kb::KVM_EXIT_X86_RDMSR)
    }

    /// Has the guest write an MSR.
    ///
    /// # Errors
    ///
    /// A failure if it ends otherwise than an access can.
    pub fn write(&self, msr: u32, value: u64) -> Result<Access, Verdict> {
        self.begin()?;
        self.m.patch_regs(|r| {
            (r.rip, r.rsp, r.rflags) = (WRITER, at::STACK, 2);
            r.rax = value & 0xffff_ffff;
            r.rcx = u64::from(msr);
            r.rdx = value >> 32;
        })?;
        match self.go_on(kb::KVM_EXIT_X86_WRMSR)? {
            Access::Done(_) => Ok(Access::Done(value)),
            other => Ok(other),
        }
    }

    /// What the VMM was asked last is completed before anything else is run.
    fn begin(&self) -> Result<(), Verdict> {
        if self.asked.take() {
            self.m.vcpu.set_immediate_exit(1);
            expect_errno(self.m.vcpu.run(), libc::EINTR, "KVM_RUN")?;
            self.m.vcpu.set_immediate_exit(0);
        }
        Ok(())
    }

    /// Lets the guest go on with an access that the VMM was asked for.
    ///
    /// # Errors
    ///
    /// A failure if it ends otherwise than an access can.
    pub fn go_on(&self, asks: u32) -> Result<Access, Verdict> {
        self.asked.set(false);
        match self.m.run()? {
            Exit::Hlt => Ok(Access::Done(self.m.vcpu.regs()?.rax)),
            Exit::Out { .. } if self.m.record().vector == 13 && self.m.record().error == 0 => {
                Ok(Access::Refused)
            }
            Exit::Other(reason) if reason == asks => {
                self.asked.set(true);
                Ok(Access::Asked(self.exit().reason))
            }
            other => fail!("exit {other:x?}\n{}", self.m.describe()),
        }
    }

    /// What the VMM is asked.
    #[must_use]
    pub fn exit(&self) -> kb::kvm_run__bindgen_ty_1__bindgen_ty_23 {
        // SAFETY: The last exit was for an MSR, so `msr` is the valid member; any bytes are one.
        unsafe { self.m.vcpu.kvm_run().__bindgen_anon_1.msr }
    }

    /// Answers with a value, or with an error.
    pub fn answer(&self, answer: Result<u64, u8>) {
        // SAFETY: As in `exit`.
        let msr = unsafe { &mut self.m.vcpu.kvm_run_mut().__bindgen_anon_1.msr };
        match answer {
            Ok(data) => msr.data = data,
            Err(error) => msr.error = error,
        }
    }
}

/// A filter of MSRs, in the making.
#[derive(Debug, Default)]
pub struct Filter {
    flags: u32,
    ranges: Vec<(u32, u32, u32, Vec<u64>)>,
}

impl Filter {
    /// Everything is allowed that no range denies.
    #[must_use]
    pub fn allow() -> Self {
        Self::default()
    }

    /// Everything is denied that no range allows.
    #[must_use]
    pub fn deny() -> Self {
        Filter {
            flags: kb::KVM_MSR_FILTER_DEFAULT_DENY,
            ranges: Vec::new(),
        }
    }

    /// Adds a range of `count` MSRs from `base`, of accesses `flags`, with these bits.
    #[must_use]
    pub fn range(mut self, flags: u32, base: u32, count: u32, bits: &[u64]) -> Self {
        self.ranges.push((flags, base, count, bits.to_vec()));
        self
    }

    /// Denies some accesses to one MSR.
    #[must_use]
    pub fn without(self, flags: u32, msr: u32) -> Self {
        self.range(flags, msr, 1, &[0])
    }

    /// Sets it.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn set(&self, vm: &Vm) -> Result<(), Error> {
        let mut filter = kb::kvm_msr_filter {
            flags: self.flags,
            ..Default::default()
        };
        for (to, (flags, base, nmsrs, bits)) in filter.ranges.iter_mut().zip(&self.ranges) {
            *to = kb::kvm_msr_filter_range {
                flags: *flags,
                base: *base,
                nmsrs: *nmsrs,
                bitmap: bits.as_ptr() as *mut u8,
            };
        }
        vm.fd.ioctl_ref(sys::KVM_X86_SET_MSR_FILTER, &filter)?;
        Ok(())
    }
}
