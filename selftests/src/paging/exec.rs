// SPDX-License-Identifier: GPL-2.0

//! Programs on a device: each in a VM of its own, as the host may not write to tables behind a guest's back.

use super::code::{self, own_tables, Record};
use super::layout::{self as at, HIGH, LOW, POOL};
use super::memory::PAGE;
use super::op::{Avoid, Features, Program};
use crate::guest::usize_of;
use crate::host::{interrupting_handler, interval_alarm, patient};
use crate::machine::{decode, set_special_pages, Exit};
use crate::mem::Mapping;
use crate::vm::{Cpuid, Kvm, Vcpu, Vm};
use crate::{Env, Verdict};
use kvm_bindings as kb;
use std::time::{Duration, Instant};

/// What came of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// How the guest left; `None` if it did not.
    pub exit: Option<Exit>,
    /// How many operations it began.
    pub begun: usize,
    /// What each saw.
    pub records: Vec<Record>,
    /// The pool in the end.
    pub pool: Vec<Vec<u8>>,
    /// A page of the dispatcher's tables that changed.
    pub broken: Option<u64>,
    /// What the host found wrong meanwhile.
    pub complaint: Option<String>,
    /// The registers that matter, for a failure's text.
    pub registers: String,
}

/// A device, and memory for its guests.
pub struct Rig {
    /// The device.
    pub kvm: Kvm,
    /// Its path.
    pub path: String,
    /// CPUID of the guests.
    pub cpuid: Box<Cpuid>,
    /// The first slot.
    pub low: Mapping,
    /// The slot above 4 GiB.
    pub high: Mapping,
}

/// A guest that is about to run a program.
///
/// The order of the fields is the order in which they are dropped.
#[derive(Debug)]
pub struct Guest {
    /// The vCPU.
    pub vcpu: Vcpu,
    /// The VM.
    pub vm: Vm,
}

/// What paging of a guest with this CPUID has.
#[must_use]
pub fn features(c: &Cpuid) -> Features {
    let reg = |function, f: fn(&kb::kvm_cpuid_entry2) -> u32| c.find(function, 0).map_or(0, f);
    let (d1, c1) = (reg(1, |e| e.edx), reg(1, |e| e.ecx));
    let (b7, c7) = (reg(7, |e| e.ebx), reg(7, |e| e.ecx));
    let d81 = reg(0x8000_0001, |e| e.edx);
    let width = reg(0x8000_0008, |e| e.eax) & 0xff;
    Features {
        maxphyaddr: u8::try_from(width).unwrap_or(36).max(36),
        nx: d81 & (1 << 20) != 0,
        gbpages: d81 & (1 << 26) != 0,
        smep: b7 & (1 << 7) != 0,
        smap: b7 & (1 << 20) != 0,
        pku: c7 & (1 << 3) != 0,
        pcid: c1 & (1 << 17) != 0,
        invpcid: b7 & (1 << 10) != 0,
        pse36: d1 & (1 << 3) != 0 && d1 & (1 << 17) != 0,
    }
}

/// Whether the device is kvm-intel without EPT.
#[must_use]
pub fn is_kvm_without_ept(path: &str) -> bool {
    let ept = std::fs::read_to_string("/sys/module/kvm_intel/parameters/ept");
    path == "/dev/kvm" && ept.is_ok_and(|s| s.trim() == "N")
}

impl Rig {
    /// A device by its path.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn new(path: &str) -> Result<Self, Verdict> {
        interrupting_handler(libc::SIGALRM)?;
        let kvm = Kvm::open(path)?;
        let cpuid = kvm.supported_cpuid()?;
        Ok(Rig {
            kvm,
            path: path.into(),
            cpuid,
            low: Mapping::new(LOW, false)?,
            high: Mapping::new(LOW, false)?,
        })
    }

    /// The device of the command line.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn of(env: &Env) -> Result<Self, Verdict> {
        Self::new(&env.device)
    }

    /// What its guests have.
    #[must_use]
    pub fn features(&self) -> Features {
        features(&self.cpuid)
    }

    /// Where it is known to be wrong.
    #[must_use]
    pub fn avoid(&self) -> Avoid {
        let known = is_kvm_without_ept(&self.path);
        Avoid {
            smap_without_wp: known,
            reserved: false,
            torn_writes: known,
            frames_on_tables: known,
            smep_across_paging: known,
        }
    }

    /// The memory of a page of the pool: its mapping and the offset in it.
    #[must_use]
    pub fn place(&self, page: usize) -> (&Mapping, usize) {
        let gpa = POOL[page];
        if gpa < HIGH {
            (&self.low, usize_of(gpa))
        } else {
            (&self.high, usize_of(gpa - HIGH))
        }
    }

    /// Writes a program and its memory.
    pub fn load(&self, program: &Program) {
        code::install(&self.low, program.setup.format);
        code::compile(&self.low, &program.ops);
        for (i, page) in program.setup.pool.iter().enumerate() {
            let (mem, offset) = self.place(i);
            write_page(mem, offset, page);
        }
    }

    /// Makes the VM for a program that has been loaded.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn guest(&self, program: &Program) -> Result<Guest, Verdict> {
        let vm = self.kvm.create_vm()?;
        set_special_pages(&vm)?;
        vm.set_memory(0, 0, 0, LOW as u64, self.low.addr() as u64)?;
        vm.set_memory(1, 0, HIGH, LOW as u64, self.high.addr() as u64)?;
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid(&self.cpuid)?;
        start(&vcpu, program)?;
        Ok(Guest { vcpu, vm })
    }

    /// Runs a program from begin to end.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn run(&self, program: &Program) -> Result<Ran, Verdict> {
        self.run_with(program, |_| Ok(None))
    }

    /// Runs a program; `host` does something each time that the guest leaves, and may complain.
    ///
    /// # Errors
    ///
    /// What the kernel answered, or what `host` failed of.
    pub fn run_with(
        &self,
        program: &Program,
        mut host: impl FnMut(&Guest) -> Result<Option<String>, Verdict>,
    ) -> Result<Ran, Verdict> {
        self.load(program);
        let guest = self.guest(program)?;
        let mut complaint = None;
        loop {
            let exit = finish(&guest.vcpu)?;
            let ended = exit != Some(Exit::Hlt) || code::begun(&self.low) > program.ops.len();
            complaint = complaint.or(host(&guest)?);
            if ended {
                let mut ran = self.look(&guest.vcpu, program, exit);
                ran.complaint = complaint;
                return Ok(ran);
            }
        }
    }

    /// What came of a program that ended so.
    #[must_use]
    pub fn look(&self, vcpu: &Vcpu, program: &Program, exit: Option<Exit>) -> Ran {
        let n = program.ops.len();
        let broken = own_tables()
            .iter()
            .find(|(gpa, bytes)| read_page(&self.low, usize_of(*gpa)) != *bytes)
            .map(|(gpa, _)| *gpa);
        Ran {
            exit,
            begun: code::begun(&self.low),
            records: (0..n).map(|i| code::record(&self.low, i)).collect(),
            pool: (0..POOL.len())
                .map(|i| {
                    let (mem, offset) = self.place(i);
                    read_page(mem, offset)
                })
                .collect(),
            broken,
            complaint: None,
            registers: describe(vcpu),
        }
    }
}

fn write_page(mem: &Mapping, offset: usize, page: &[u8]) {
    for (i, word) in page.chunks_exact(8).enumerate() {
        let mut raw = [0; 8];
        raw.copy_from_slice(word);
        mem.write(offset + 8 * i, u64::from_le_bytes(raw));
    }
}

fn read_page(mem: &Mapping, offset: usize) -> Vec<u8> {
    (0..PAGE / 8)
        .flat_map(|i| mem.read::<u64>(offset + 8 * i).to_le_bytes())
        .collect()
}

fn start(vcpu: &Vcpu, program: &Program) -> Result<(), Verdict> {
    let setup = &program.setup;
    let mut s = vcpu.sregs()?;
    code::set_segments(&mut s, setup.format.is_long(), setup.ldt);
    (s.cr0, s.cr3, s.cr4, s.efer) = (setup.cr0, setup.cr3, setup.cr4, setup.efer);
    vcpu.set_sregs(&s)?;
    vcpu.set_regs(&kb::kvm_regs {
        rip: at::CODE,
        rsp: at::STACK,
        rflags: 2,
        ..Default::default()
    })?;
    Ok(())
}

/// Runs a vCPU to its exit; `None` if there is none for seconds.
///
/// # Errors
///
/// What the kernel answered.
pub fn finish(vcpu: &Vcpu) -> Result<Option<Exit>, Verdict> {
    let deadline = Instant::now() + Duration::from_millis(patient(3000));
    interval_alarm(500);
    let r = loop {
        match vcpu.run() {
            Ok(_) => break Ok(Some(decode(vcpu))),
            Err(e) if e.errno == libc::EINTR => {
                if Instant::now() > deadline {
                    break Ok(None);
                }
            }
            Err(e) => break Err(e.into()),
        }
    };
    interval_alarm(0);
    r
}

fn describe(vcpu: &Vcpu) -> String {
    let (Ok(r), Ok(s)) = (vcpu.regs(), vcpu.sregs()) else {
        return "the registers cannot be read".into();
    };
    format!(
        "rip {:x} rsp {:x} rflags {:x} rdi {:x} cs {:x} cr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x}",
        r.rip, r.rsp, r.rflags, r.rdi, s.cs.selector, s.cr0, s.cr2, s.cr3, s.cr4, s.efer
    )
}
