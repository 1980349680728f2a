// SPDX-License-Identifier: GPL-2.0

//! A guest that accesses memory as it is told, one access at a time.

use crate::guest::at;
use crate::machine::{Exit, Machine, Mode};
use crate::mem::Mapping;
use crate::{ensure_eq, fail, guest_code, Env, Outcome, Verdict};

/// Where the memory is.
pub const GPA: u64 = 0x4000_0000;

// RDI the address; ECX not 0: RAX is written there, else it is read.
guest_code!(
    access,
    ".code64",
    "2: mov rdx, cr3",
    "mov cr3, rdx",
    "test ecx, ecx",
    "jnz 3f",
    "mov rax, [rdi]",
    "hlt",
    "jmp 2b",
    "3: mov [rdi], rax",
    "hlt",
    "jmp 2b",
);

/// What an access came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Access {
    /// It was done; this is what was read or written.
    Done(u64),
    /// KVM_RUN failed with this errno.
    Failed(i32),
    /// It left as an exit.
    Left(Exit),
}

/// A guest with a second slot of memory, that accesses it as it is told.
#[derive(Debug)]
pub struct Probe {
    /// The machine.
    pub m: Machine,
}

impl Probe {
    /// A guest with `memory` at [`GPA`], in a slot with `flags`.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn new(env: &Env, memory: &Mapping, flags: u32) -> Result<Self, Verdict> {
        let m = Machine::new(env, Mode::Long, access())?;
        m.vm.set_memory(1, flags, GPA, memory.len() as u64, memory.addr() as u64)?;
        Ok(Probe { m })
    }

    /// One access.
    ///
    /// # Errors
    ///
    /// What the kernel answered to other calls.
    pub fn access(&self, offset: usize, write: bool, value: u64) -> Result<Access, Verdict> {
        self.m.patch_regs(|r| {
            r.rip = at::CODE;
            r.rdi = GPA + offset as u64;
            r.rcx = write.into();
            r.rax = value;
        })?;
        Ok(match self.m.run() {
            Ok(Exit::Hlt) => Access::Done(self.m.vcpu.regs()?.rax),
            Ok(exit) => Access::Left(exit),
            Err(e) => Access::Failed(e.errno),
        })
    }

    /// A read gives `value`.
    ///
    /// # Errors
    ///
    /// That it does not.
    pub fn reads(&self, offset: usize, value: u64, what: &str) -> Outcome {
        ensure_eq!(
            self.access(offset, false, 0)?,
            Access::Done(value),
            "read: {what}"
        );
        Ok(())
    }

    /// A write of `value` is done.
    ///
    /// # Errors
    ///
    /// That it is not.
    pub fn writes(&self, offset: usize, value: u64, what: &str) -> Outcome {
        ensure_eq!(
            self.access(offset, true, value)?,
            Access::Done(value),
            "write: {what}"
        );
        Ok(())
    }

    /// An access fails with EFAULT.
    ///
    /// # Errors
    ///
    /// That it does not.
    pub fn fails(&self, offset: usize, write: bool, what: &str) -> Outcome {
        let got = self.access(offset, write, 1)?;
        ensure_eq!(got, Access::Failed(libc::EFAULT), "{what}");
        Ok(())
    }
}

impl Probe {
    /// A write to physical memory that is mapped read-only fails: with EFAULT, or, as kvm-intel has it,
    /// as a device's.
    ///
    /// # Errors
    ///
    /// That it comes to something else.
    pub fn cannot_write(&self, offset: usize, what: &str) -> Outcome {
        match self.access(offset, true, 1)? {
            Access::Failed(libc::EFAULT) => Ok(()),
            Access::Left(Exit::MmioWrite { addr, .. }) if addr == GPA + offset as u64 => {
                self.m.expect_hlt()
            }
            other => fail!("a write to {what}: {other:x?}"),
        }
    }
}
