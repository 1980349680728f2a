// SPDX-License-Identifier: GPL-2.0

//! The three kinds of file of the API, with typed calls.
//!
//! A typed call is only a convenience: each type gives its descriptor for raw ioctls too.

use crate::sys::{self, Error, Ioctl};
use kvm_bindings as kb;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU8, Ordering};

/// A file descriptor that is closed when dropped.
#[derive(Debug)]
pub struct Fd(pub RawFd);

impl Fd {
    /// Calls an ioctl with a plain argument.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn ioctl(&self, request: Ioctl, arg: usize) -> Result<i32, Error> {
        sys::ioctl(self.0, request, arg)
    }

    /// Calls an ioctl with the address of `arg`, which the kernel may write.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn ioctl_mut<T>(&self, request: Ioctl, arg: &mut T) -> Result<i32, Error> {
        sys::ioctl(self.0, request, std::ptr::from_mut(arg) as usize)
    }

    /// Calls an ioctl with the address of `arg`, which the kernel only reads.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn ioctl_ref<T>(&self, request: Ioctl, arg: &T) -> Result<i32, Error> {
        sys::ioctl(self.0, request, std::ptr::from_ref(arg) as usize)
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: The descriptor is owned by `self`.
        unsafe { libc::close(self.0) };
    }
}

/// The device.
#[derive(Debug)]
pub struct Kvm {
    /// Its descriptor.
    pub fd: Fd,
}

/// A virtual machine.
#[derive(Debug)]
pub struct Vm {
    /// Its descriptor.
    pub fd: Fd,
    /// The size of a vCPU's mapping in bytes.
    pub run_size: usize,
}

/// A virtual CPU, with its `kvm_run` mapped.
#[derive(Debug)]
pub struct Vcpu {
    /// Its descriptor.
    pub fd: Fd,
    run: usize,
    run_size: usize,
}

fn as_usize(v: i32) -> usize {
    usize::try_from(v).unwrap_or(0)
}

impl Kvm {
    /// Opens the device at `path`.
    ///
    /// # Errors
    ///
    /// The failure of `open`.
    pub fn open(path: &str) -> Result<Self, Error> {
        let path = std::ffi::CString::new(path).unwrap_or_default();
        // SAFETY: `path` is a string with its terminator.
        let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(Error::last("open of the device"));
        }
        Ok(Kvm { fd: Fd(fd) })
    }

    /// The value of a capability: 0 if absent.
    #[must_use]
    pub fn capability(&self, cap: u32) -> i32 {
        self.fd
            .ioctl(sys::KVM_CHECK_EXTENSION, cap as usize)
            .unwrap_or(0)
    }

    /// Creates a VM of type 0.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn create_vm(&self) -> Result<Vm, Error> {
        let run_size = as_usize(self.fd.ioctl(sys::KVM_GET_VCPU_MMAP_SIZE, 0)?);
        let fd = Fd(self.fd.ioctl(sys::KVM_CREATE_VM, 0)?);
        Ok(Vm { fd, run_size })
    }

    /// The CPUID leaves that the device supports.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn supported_cpuid(&self) -> Result<Box<Cpuid>, Error> {
        let mut c = Cpuid::empty(CPUID_MAX);
        self.fd.ioctl_mut(sys::KVM_GET_SUPPORTED_CPUID, &mut *c)?;
        Ok(c)
    }
}

/// The most CPUID entries that these tests pass.
pub const CPUID_MAX: usize = 256;

/// `struct kvm_cpuid2` with room for its entries.
#[repr(C)]
#[derive(Clone)]
pub struct Cpuid {
    /// The number of valid entries.
    pub nent: u32,
    /// Unused by the API.
    pub padding: u32,
    /// The entries.
    pub entries: [kb::kvm_cpuid_entry2; CPUID_MAX],
}

impl Cpuid {
    /// A list that says it has room for `nent` entries.
    #[must_use]
    pub fn empty(nent: usize) -> Box<Self> {
        Box::new(Cpuid {
            nent: u32::try_from(nent).unwrap_or(u32::MAX),
            padding: 0,
            entries: [kb::kvm_cpuid_entry2::default(); CPUID_MAX],
        })
    }

    /// The valid entries.
    #[must_use]
    pub fn list(&self) -> &[kb::kvm_cpuid_entry2] {
        &self.entries[..(self.nent as usize).min(CPUID_MAX)]
    }

    /// The valid entries, to change.
    pub fn list_mut(&mut self) -> &mut [kb::kvm_cpuid_entry2] {
        &mut self.entries[..(self.nent as usize).min(CPUID_MAX)]
    }

    /// The entry of a leaf and subleaf.
    #[must_use]
    pub fn find(&self, function: u32, index: u32) -> Option<&kb::kvm_cpuid_entry2> {
        self.list()
            .iter()
            .find(|e| e.function == function && e.index == index)
    }

    /// Appends an entry.
    pub fn push(&mut self, e: kb::kvm_cpuid_entry2) {
        self.entries[self.nent as usize] = e;
        self.nent += 1;
    }
}

/// The most MSRs that these tests pass at once.
pub const MSRS_MAX: usize = 300;

/// `struct kvm_msrs` with room for its entries.
#[repr(C)]
#[derive(Clone)]
pub struct Msrs {
    /// The number of entries.
    pub nmsrs: u32,
    /// Unused by the API.
    pub pad: u32,
    /// The entries.
    pub entries: [kb::kvm_msr_entry; MSRS_MAX],
}

impl Msrs {
    /// A list of indices and values.
    #[must_use]
    pub fn new(list: &[(u32, u64)]) -> Box<Self> {
        let mut m = Box::new(Msrs {
            nmsrs: u32::try_from(list.len()).unwrap_or(0),
            pad: 0,
            entries: [kb::kvm_msr_entry::default(); MSRS_MAX],
        });
        for (e, (index, data)) in m.entries.iter_mut().zip(list) {
            e.index = *index;
            e.data = *data;
        }
        m
    }
}

/// `struct kvm_pre_fault_memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct PreFault {
    /// Where the range begins; after the call, where what is left of it begins.
    pub gpa: u64,
    /// Its bytes; after the call, those that are left.
    pub size: u64,
    /// None are defined.
    pub flags: u64,
    /// Unused by the API.
    pub padding: [u64; 5],
}

impl Vm {
    /// Sets a memory slot.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn set_memory(
        &self,
        slot: u32,
        flags: u32,
        gpa: u64,
        size: u64,
        hva: u64,
    ) -> Result<(), Error> {
        let r = kb::kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: hva,
        };
        self.fd.ioctl_ref(sys::KVM_SET_USER_MEMORY_REGION, &r)?;
        Ok(())
    }

    /// `KVM_ENABLE_CAP` with one argument.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn enable_cap(&self, cap: u32, argument: u64) -> Result<(), Error> {
        let c = kb::kvm_enable_cap {
            cap,
            args: [argument, 0, 0, 0],
            ..Default::default()
        };
        self.fd.ioctl_ref(sys::KVM_ENABLE_CAP, &c)?;
        Ok(())
    }

    /// Creates the vCPU with number `id` and maps its `kvm_run`.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn create_vcpu(&self, id: usize) -> Result<Vcpu, Error> {
        let fd = Fd(self.fd.ioctl(sys::KVM_CREATE_VCPU, id)?);
        // SAFETY: A new mapping at an address that the kernel chooses disturbs nothing.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                self.run_size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.0,
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(Error::last("mmap of kvm_run"));
        }
        Ok(Vcpu {
            fd,
            run: p as usize,
            run_size: self.run_size,
        })
    }
}

macro_rules! state {
    ($($get:ident, $set:ident, $ty:ty, $g:ident, $s:ident;)*) => { $(
        #[doc = concat!("`", stringify!($g), "`.")]
        ///
        /// # Errors
        ///
        /// What the kernel answered.
        pub fn $get(&self) -> Result<$ty, Error> {
            let mut v = <$ty>::default();
            self.fd.ioctl_mut(sys::$g, &mut v)?;
            Ok(v)
        }
        #[doc = concat!("`", stringify!($s), "`.")]
        ///
        /// # Errors
        ///
        /// What the kernel answered.
        pub fn $set(&self, v: &$ty) -> Result<(), Error> {
            self.fd.ioctl_ref(sys::$s, v)?;
            Ok(())
        }
    )* };
}

impl Vcpu {
    state! {
        regs, set_regs, kb::kvm_regs, KVM_GET_REGS, KVM_SET_REGS;
        sregs, set_sregs, kb::kvm_sregs, KVM_GET_SREGS, KVM_SET_SREGS;
        fpu, set_fpu, kb::kvm_fpu, KVM_GET_FPU, KVM_SET_FPU;
        xsave, set_xsave, kb::kvm_xsave, KVM_GET_XSAVE, KVM_SET_XSAVE;
        xcrs, set_xcrs, kb::kvm_xcrs, KVM_GET_XCRS, KVM_SET_XCRS;
        mp_state, set_mp_state, kb::kvm_mp_state, KVM_GET_MP_STATE, KVM_SET_MP_STATE;
        events, set_events, kb::kvm_vcpu_events, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS;
        debugregs, set_debugregs, kb::kvm_debugregs, KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS;
    }

    /// `KVM_SET_CPUID2`.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn set_cpuid(&self, c: &Cpuid) -> Result<(), Error> {
        self.fd.ioctl_ref(sys::KVM_SET_CPUID2, c)?;
        Ok(())
    }

    /// `KVM_GET_CPUID2`.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn cpuid(&self) -> Result<Box<Cpuid>, Error> {
        let mut c = Cpuid::empty(CPUID_MAX);
        self.fd.ioctl_mut(sys::KVM_GET_CPUID2, &mut *c)?;
        Ok(c)
    }

    /// Reads one MSR; `None` if the device refuses it.
    ///
    /// # Errors
    ///
    /// What the kernel answered to the call itself.
    pub fn msr(&self, index: u32) -> Result<Option<u64>, Error> {
        let mut m = Msrs::new(&[(index, 0)]);
        let n = self.fd.ioctl_mut(sys::KVM_GET_MSRS, &mut *m)?;
        Ok((n == 1).then_some(m.entries[0].data))
    }

    /// Writes one MSR; `false` if the device refuses it.
    ///
    /// # Errors
    ///
    /// What the kernel answered to the call itself.
    pub fn set_msr(&self, index: u32, data: u64) -> Result<bool, Error> {
        let m = Msrs::new(&[(index, data)]);
        Ok(self.fd.ioctl_ref(sys::KVM_SET_MSRS, &*m)? == 1)
    }

    /// `KVM_RUN`, once; the exit reason.
    ///
    /// # Errors
    ///
    /// What the kernel answered: `EINTR` for a signal.
    pub fn run(&self) -> Result<u32, Error> {
        self.fd.ioctl(sys::KVM_RUN, 0)?;
        Ok(self.kvm_run().exit_reason)
    }

    /// `KVM_PRE_FAULT_MEMORY`.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn pre_fault(&self, range: &mut PreFault) -> Result<(), Error> {
        self.fd.ioctl_mut(sys::KVM_PRE_FAULT_MEMORY, range)?;
        Ok(())
    }

    /// `KVM_INTERRUPT`.
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn interrupt(&self, irq: u32) -> Result<(), Error> {
        let i = kb::kvm_interrupt { irq };
        self.fd.ioctl_ref(sys::KVM_INTERRUPT, &i)?;
        Ok(())
    }

    /// A copy of the shared page's structure.
    #[must_use]
    pub fn kvm_run(&self) -> kb::kvm_run {
        // SAFETY: The mapping is at least as large as the structure and lives as long as `self`.
        unsafe { (self.run as *const kb::kvm_run).read_volatile() }
    }

    /// The shared page's structure, to change.
    ///
    /// Only the thread that calls `KVM_RUN` may hold it, and not across the call.
    #[allow(clippy::mut_from_ref)]
    #[must_use]
    pub fn kvm_run_mut(&self) -> &mut kb::kvm_run {
        // SAFETY: As above; the caller keeps to the rule for exclusivity.
        unsafe { &mut *(self.run as *mut kb::kvm_run) }
    }

    /// The address of the mapping.
    #[must_use]
    pub fn run_addr(&self) -> usize {
        self.run
    }

    /// The size of the mapping.
    #[must_use]
    pub fn run_size(&self) -> usize {
        self.run_size
    }

    /// Sets `immediate_exit`; allowed from any thread at any time, and from signal handlers.
    pub fn set_immediate_exit(&self, value: u8) {
        let offset = std::mem::offset_of!(kb::kvm_run, immediate_exit);
        // SAFETY: The byte is within the mapping; the kernel and other threads access it as a byte.
        let a = unsafe { AtomicU8::from_ptr((self.run + offset) as *mut u8) };
        a.store(value, Ordering::SeqCst);
    }

    /// Where the bytes of a port I/O exit lie: address and length.
    fn io_range(&self) -> (usize, usize) {
        let run = self.kvm_run();
        // SAFETY: The members of the union are plain integers, and are bounded just below.
        let io = unsafe { run.__bindgen_anon_1.io };
        let len = usize::from(io.size) * io.count as usize;
        let start = usize::try_from(io.data_offset).unwrap_or(usize::MAX);
        assert!(
            start.checked_add(len).is_some_and(|end| end <= self.run_size),
            "the data of a port I/O exit lie outside of the mapping: offset {start:#x}, {len} bytes"
        );
        (self.run + start, len)
    }

    /// The bytes of a port I/O exit: `size * count` of them.
    #[must_use]
    pub fn io_data(&self) -> Vec<u8> {
        let (address, len) = self.io_range();
        let mut data = vec![0; len];
        // SAFETY: The range is within the mapping, and `data` has its length.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, data.as_mut_ptr(), len) };
        data
    }

    /// Gives the bytes that a port input asks for, all of them.
    pub fn set_io_data(&self, data: &[u8]) {
        let (address, len) = self.io_range();
        assert_eq!(data.len(), len, "bytes for a port input");
        // SAFETY: The range is within the mapping, and `data` has its length.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), address as *mut u8, len) };
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // SAFETY: Mapped by `create_vcpu`; no reference into it outlives `self`.
        unsafe { libc::munmap(self.run as *mut _, self.run_size) };
    }
}
