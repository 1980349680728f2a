// SPDX-License-Identifier: GPL-2.0

//! A guest with one vCPU and its memory, started in any mode, and its exits decoded.

use crate::guest::{self, at, sel, usize_of, Record, PORT_EXCEPTION};
use crate::mem::Mapping;
use crate::sys::{self, Error};
use crate::vm::{Kvm, Vcpu, Vm};
use crate::{Env, Verdict};
use kvm_bindings as kb;

/// Control register bits.
pub mod cr {
    /// CR0: protection.
    pub const PE: u64 = 1;
    /// CR0: monitor coprocessor.
    pub const MP: u64 = 2;
    /// CR0: emulate the FPU.
    pub const EM: u64 = 4;
    /// CR0: task switched.
    pub const TS: u64 = 8;
    /// CR0: extension type, always set.
    pub const ET: u64 = 0x10;
    /// CR0: numeric errors as exceptions.
    pub const NE: u64 = 0x20;
    /// CR0: write protection of read-only pages in supervisor mode.
    pub const WP: u64 = 0x1_0000;
    /// CR0: paging.
    pub const PG: u64 = 0x8000_0000;
    /// CR4: 4 MiB pages.
    pub const PSE: u64 = 0x10;
    /// CR4: physical address extension.
    pub const PAE: u64 = 0x20;
    /// CR4: FXSAVE and SSE.
    pub const OSFXSR: u64 = 0x200;
    /// CR4: SIMD exceptions.
    pub const OSXMMEXCPT: u64 = 0x400;
    /// CR4: XSAVE.
    pub const OSXSAVE: u64 = 0x4_0000;
    /// EFER: SYSCALL.
    pub const SCE: u64 = 1;
    /// EFER: long mode enabled.
    pub const LME: u64 = 0x100;
    /// EFER: long mode active.
    pub const LMA: u64 = 0x400;
    /// EFER: no-execute.
    pub const NXE: u64 = 0x800;
}

/// The mode in which a guest starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// 16 bits, no protection, CS base 0.
    Real,
    /// 32 bits, no paging.
    Protected,
    /// 32 bits, 32-bit paging with 4 MiB pages.
    Paging32,
    /// 32 bits, PAE paging.
    Pae,
    /// 64 bits.
    Long,
}

/// All modes.
pub const MODES: [Mode; 5] = [
    Mode::Real,
    Mode::Protected,
    Mode::Paging32,
    Mode::Pae,
    Mode::Long,
];

/// An exit, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// Port output with its data.
    Out {
        /// The port.
        port: u16,
        /// Bytes an element.
        size: u8,
        /// All elements.
        data: Vec<u8>,
    },
    /// Port input: see [`Machine::io_reply`].
    In {
        /// The port.
        port: u16,
        /// Bytes an element.
        size: u8,
        /// Elements.
        count: u32,
    },
    /// A write to memory that no slot backs.
    MmioWrite {
        /// The guest-physical address.
        addr: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// A read from memory that no slot backs: see [`Machine::mmio_reply`].
    MmioRead {
        /// The guest-physical address.
        addr: u64,
        /// The number of bytes.
        len: u32,
    },
    /// HLT.
    Hlt,
    /// Triple fault.
    Shutdown,
    /// Interrupts can be taken, as was asked for.
    IrqWindow,
    /// A signal.
    Intr,
    /// VM entry failed, with the hardware's reason.
    FailEntry(u64),
    /// The module could not go on.
    Internal {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// Its data.
        data: Vec<u64>,
    },
    /// An exit reason that has no name here.
    Other(u32),
}

/// Decodes the exit that `run` describes.
#[must_use]
pub fn decode(vcpu: &Vcpu) -> Exit {
    let run = vcpu.kvm_run();
    // SAFETY: The exit reason tells which member of the union is valid; all are plain integers.
    unsafe {
        match run.exit_reason {
            kb::KVM_EXIT_IO => {
                let io = run.__bindgen_anon_1.io;
                if u32::from(io.direction) == kb::KVM_EXIT_IO_OUT {
                    let data = vcpu.io_data();
                    Exit::Out {
                        port: io.port,
                        size: io.size,
                        data,
                    }
                } else {
                    Exit::In {
                        port: io.port,
                        size: io.size,
                        count: io.count,
                    }
                }
            }
            kb::KVM_EXIT_MMIO => {
                let m = run.__bindgen_anon_1.mmio;
                if m.is_write != 0 {
                    let data = m.data[..(m.len as usize).min(8)].to_vec();
                    Exit::MmioWrite {
                        addr: m.phys_addr,
                        data,
                    }
                } else {
                    Exit::MmioRead {
                        addr: m.phys_addr,
                        len: m.len,
                    }
                }
            }
            kb::KVM_EXIT_HLT => Exit::Hlt,
            kb::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            kb::KVM_EXIT_IRQ_WINDOW_OPEN => Exit::IrqWindow,
            kb::KVM_EXIT_INTR => Exit::Intr,
            kb::KVM_EXIT_FAIL_ENTRY => Exit::FailEntry(
                run.__bindgen_anon_1
                    .fail_entry
                    .hardware_entry_failure_reason,
            ),
            kb::KVM_EXIT_INTERNAL_ERROR => {
                let i = run.__bindgen_anon_1.internal;
                let n = (i.ndata as usize).min(i.data.len());
                Exit::Internal {
                    suberror: i.suberror,
                    data: i.data[..n].to_vec(),
                }
            }
            other => Exit::Other(other),
        }
    }
}

/// A VM with one vCPU and one slot of memory at guest-physical 0.
///
/// The order of the fields is the order in which they are dropped.
#[derive(Debug)]
pub struct Machine {
    /// The vCPU.
    pub vcpu: Vcpu,
    /// The VM.
    pub vm: Vm,
    /// The device.
    pub kvm: Kvm,
    /// Guest-physical 0 onwards.
    pub mem: Mapping,
}

impl Machine {
    /// A machine with `size` bytes of memory, its vCPU as created (no CPUID set).
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn bare(env: &Env, size: usize) -> Result<Self, Error> {
        Self::with_memory(env, Mapping::new(size, false)?)
    }

    /// As [`Machine::bare`], with memory that the caller made.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn with_memory(env: &Env, mem: Mapping) -> Result<Self, Error> {
        let kvm = env.open()?;
        let vm = kvm.create_vm()?;
        set_special_pages(&vm)?;
        vm.set_memory(0, 0, 0, mem.len() as u64, mem.addr() as u64)?;
        let vcpu = vm.create_vcpu(0)?;
        Ok(Machine { vcpu, vm, kvm, mem })
    }

    /// A machine of the usual size with all supported CPUID leaves, that is about to run `code` in
    /// `mode`. Interrupts are disabled.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn new(env: &Env, mode: Mode, code: &[u8]) -> Result<Self, Error> {
        let m = Self::bare(env, at::SIZE)?;
        m.vcpu.set_cpuid(&*m.kvm.supported_cpuid()?)?;
        m.start(mode, code)?;
        Ok(m)
    }

    /// Writes code and tables and sets the registers for `mode`.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn start(&self, mode: Mode, code: &[u8]) -> Result<(), Error> {
        self.mem.write_bytes(usize_of(at::CODE), code);
        if mode != Mode::Real {
            guest::write_gdt(&self.mem);
            guest::write_idt(&self.mem, mode == Mode::Long);
            guest::write_page_tables(&self.mem);
        }
        start_vcpu(&self.vcpu, mode, at::CODE)
    }

    /// Runs to the next exit.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn run(&self) -> Result<Exit, Error> {
        self.vcpu.run()?;
        Ok(decode(&self.vcpu))
    }

    /// Puts the value that a read from device memory returns.
    pub fn mmio_reply(&self, data: &[u8]) {
        // SAFETY: The last exit was an MMIO read, so `mmio` is the valid member.
        let m = unsafe { &mut self.vcpu.kvm_run_mut().__bindgen_anon_1.mmio };
        m.data[..data.len()].copy_from_slice(data);
    }

    /// Puts the value that a port input returns.
    pub fn io_reply(&self, data: &[u8]) {
        self.vcpu.set_io_data(data);
    }

    /// Runs to the next exit, which has to be `want`.
    ///
    /// # Errors
    ///
    /// A failure that shows the exit and the registers.
    pub fn expect(&self, want: &Exit) -> Result<(), Verdict> {
        let got = self.run()?;
        if got == *want {
            return Ok(());
        }
        Err(Verdict::Fail(format!(
            "exit {got:x?}, expected {want:x?}\n{}",
            self.describe()
        )))
    }

    /// Runs to the next HLT; anything else is a failure.
    ///
    /// # Errors
    ///
    /// A failure that shows the exit and the registers.
    pub fn expect_hlt(&self) -> Result<(), Verdict> {
        self.expect(&Exit::Hlt)
    }

    /// Runs to an output on `port` and returns its value.
    ///
    /// # Errors
    ///
    /// A failure that shows the exit and the registers.
    pub fn expect_out(&self, port: u16) -> Result<u64, Verdict> {
        match self.run()? {
            Exit::Out { port: p, data, .. } if p == port && data.len() <= 8 => {
                let mut bytes = [0; 8];
                bytes[..data.len()].copy_from_slice(&data);
                Ok(u64::from_le_bytes(bytes))
            }
            got => Err(Verdict::Fail(format!(
                "exit {got:x?}, expected an output to port {port:#x}\n{}",
                self.describe()
            ))),
        }
    }

    /// Runs to the report of an exception, which has to be `vector`.
    ///
    /// # Errors
    ///
    /// A failure that shows the exit and the registers.
    pub fn expect_exception(&self, vector: u8) -> Result<Record, Verdict> {
        self.expect_out(PORT_EXCEPTION)?;
        let r: Record = self.record();
        if r.vector != u64::from(vector) {
            return Err(Verdict::Fail(format!(
                "exception {r:x?}, expected vector {vector}"
            )));
        }
        Ok(r)
    }

    /// What the exception handler wrote last.
    #[must_use]
    pub fn record(&self) -> Record {
        self.mem.read(usize_of(at::RECORD))
    }

    /// Where the exception handler is to return to.
    pub fn resume_at(&self, rip: u64) {
        self.mem.write(usize_of(at::RECORD) + 56, rip);
    }

    /// The registers that matter most, for a failure's text.
    #[must_use]
    pub fn describe(&self) -> String {
        let (Ok(r), Ok(s)) = (self.vcpu.regs(), self.vcpu.sregs()) else {
            return "the registers cannot be read".into();
        };
        let record = self.record();
        let exception = if record.count > 0 {
            format!("\nlast exception {record:x?}")
        } else {
            String::new()
        };
        format!(
            "rip {:x} rsp {:x} rflags {:x} rax {:x} rbx {:x} rcx {:x} rdx {:x} rsi {:x} rdi {:x}\n\
             cs {:x}:{:x} cr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x}{exception}",
            r.rip,
            r.rsp,
            r.rflags,
            r.rax,
            r.rbx,
            r.rcx,
            r.rdx,
            r.rsi,
            r.rdi,
            s.cs.selector,
            s.cs.base,
            s.cr0,
            s.cr2,
            s.cr3,
            s.cr4,
            s.efer
        )
    }

    /// Changes the general registers.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn patch_regs(&self, f: impl FnOnce(&mut kb::kvm_regs)) -> Result<(), Error> {
        let mut r = self.vcpu.regs()?;
        f(&mut r);
        self.vcpu.set_regs(&r)
    }

    /// Changes the special registers.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn patch_sregs(&self, f: impl FnOnce(&mut kb::kvm_sregs)) -> Result<(), Error> {
        let mut s = self.vcpu.sregs()?;
        f(&mut s);
        self.vcpu.set_sregs(&s)
    }
}

/// Sets where Intel processors without unrestricted guest need three pages and one, as VMMs do.
///
/// # Errors
///
/// What the kernel answered.
pub fn set_special_pages(vm: &Vm) -> Result<(), Error> {
    vm.fd.ioctl(sys::KVM_SET_TSS_ADDR, 0xfffb_d000)?;
    let identity = 0xfffb_c000u64;
    vm.fd.ioctl_ref(sys::KVM_SET_IDENTITY_MAP_ADDR, &identity)?;
    Ok(())
}

/// Sets the registers of `vcpu` for `mode`, at `rip`.
///
/// # Errors
///
/// What the kernel answered.
pub fn start_vcpu(vcpu: &Vcpu, mode: Mode, rip: u64) -> Result<(), Error> {
    let mut s = vcpu.sregs()?;
    (s.cr3, s.cr4, s.efer) = (0, 0, 0);
    if mode == Mode::Real {
        s.cs.base = 0;
        s.cs.selector = 0;
    } else {
        let data = guest::segment(sel::DATA, 3, 1, 0, 0, true);
        s.cs = match mode {
            Mode::Long => guest::segment(sel::CODE64, 11, 0, 1, 0, true),
            _ => guest::segment(sel::CODE32, 11, 1, 0, 0, true),
        };
        (s.ds, s.es, s.fs, s.gs, s.ss) = (data, data, data, data, data);
        s.tr = guest::tss_segment();
        s.gdt = kb::kvm_dtable {
            base: at::GDT,
            limit: 10 * 8 - 1,
            ..Default::default()
        };
        let idt_limit = if mode == Mode::Long { 0xfff } else { 0x7ff };
        s.idt = kb::kvm_dtable {
            base: at::IDT,
            limit: idt_limit,
            ..Default::default()
        };
        s.cr0 = cr::PE | cr::MP | cr::ET | cr::NE;
    }
    match mode {
        Mode::Real | Mode::Protected => {}
        Mode::Paging32 => {
            s.cr3 = at::PD32;
            s.cr4 = cr::PSE;
            s.cr0 |= cr::PG | cr::WP;
        }
        Mode::Pae => {
            s.cr3 = at::PDPT_PAE;
            s.cr4 = cr::PAE;
            s.cr0 |= cr::PG | cr::WP;
        }
        Mode::Long => {
            s.cr3 = at::PML4;
            s.cr4 = cr::PAE | cr::OSFXSR | cr::OSXMMEXCPT;
            s.cr0 |= cr::PG | cr::WP;
            s.efer = cr::LME | cr::LMA | cr::SCE | cr::NXE;
        }
    }
    vcpu.set_sregs(&s)?;
    vcpu.set_regs(&kb::kvm_regs {
        rip,
        rsp: at::STACK,
        rflags: 2,
        ..Default::default()
    })
}
