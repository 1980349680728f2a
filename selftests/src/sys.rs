// SPDX-License-Identifier: GPL-2.0

//! System calls with nothing between: ioctl numbers, raw calls, errno.
//!
//! The numbers are computed as `<linux/ioctl.h>` does, so that a wrong structure size shows as a
//! wrong number. Calls take a plain `usize`, so that a test can pass an address that is no address.

use kvm_bindings as kb;
use std::fmt;
use std::os::fd::RawFd;

/// A failed system call: which, and `errno`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// The call, by its name.
    pub what: &'static str,
    /// The value of `errno`.
    pub errno: i32,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed: {}", self.what, errno_name(self.errno))
    }
}

impl Error {
    /// The error of the call that failed last in this thread.
    #[must_use]
    pub fn last(what: &'static str) -> Self {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        Error { what, errno }
    }
}

/// The symbol of an errno, as far as these tests meet it.
#[must_use]
pub fn errno_name(errno: i32) -> String {
    let name = match errno {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::EINTR => "EINTR",
        libc::EIO => "EIO",
        libc::ENXIO => "ENXIO",
        libc::E2BIG => "E2BIG",
        libc::ENOSPC => "ENOSPC",
        libc::EBADF => "EBADF",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EFAULT => "EFAULT",
        libc::EBUSY => "EBUSY",
        libc::EEXIST => "EEXIST",
        libc::ENODEV => "ENODEV",
        libc::EINVAL => "EINVAL",
        libc::ENOTTY => "ENOTTY",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        _ => return format!("errno {errno}"),
    };
    name.to_string()
}

const KVMIO: u64 = 0xae;
const WRITE: u64 = 1;
const READ: u64 = 2;

const fn ioc(dir: u64, nr: u64, size: usize) -> u64 {
    (dir << 30) | ((size as u64) << 16) | (KVMIO << 8) | nr
}

/// An ioctl: its number and its name.
#[derive(Debug, Clone, Copy)]
pub struct Ioctl {
    /// The request number.
    pub nr: u64,
    /// The name that failures show.
    pub name: &'static str,
}

macro_rules! ioctls {
    ($($name:ident: $dir:expr, $nr:expr, $size:expr;)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "` of `<linux/kvm.h>`.")]
            pub const $name: Ioctl = Ioctl { nr: ioc($dir, $nr, $size), name: stringify!($name) };
        )*
        /// Every ioctl that these tests know.
        pub const ALL: &[Ioctl] = &[$($name),*];
    };
}

const fn size<T>() -> usize {
    core::mem::size_of::<T>()
}

ioctls! {
    KVM_GET_API_VERSION: 0, 0x00, 0;
    KVM_CREATE_VM: 0, 0x01, 0;
    KVM_GET_MSR_INDEX_LIST: READ | WRITE, 0x02, 4;
    KVM_CHECK_EXTENSION: 0, 0x03, 0;
    KVM_GET_VCPU_MMAP_SIZE: 0, 0x04, 0;
    KVM_GET_SUPPORTED_CPUID: READ | WRITE, 0x05, 8;
    KVM_GET_EMULATED_CPUID: READ | WRITE, 0x09, 8;
    KVM_GET_MSR_FEATURE_INDEX_LIST: READ | WRITE, 0x0a, 4;
    KVM_CREATE_VCPU: 0, 0x41, 0;
    KVM_GET_DIRTY_LOG: WRITE, 0x42, 16;
    KVM_SET_NR_MMU_PAGES: 0, 0x44, 0;
    KVM_SET_USER_MEMORY_REGION: WRITE, 0x46, size::<kb::kvm_userspace_memory_region>();
    KVM_SET_TSS_ADDR: 0, 0x47, 0;
    KVM_SET_IDENTITY_MAP_ADDR: WRITE, 0x48, 8;
    KVM_SET_USER_MEMORY_REGION2: WRITE, 0x49, size::<kb::kvm_userspace_memory_region2>();
    KVM_CREATE_IRQCHIP: 0, 0x60, 0;
    KVM_IRQ_LINE: WRITE, 0x61, 8;
    KVM_SET_BOOT_CPU_ID: 0, 0x78, 0;
    KVM_GET_IRQCHIP: READ | WRITE, 0x62, size::<kb::kvm_irqchip>();
    KVM_SET_IRQCHIP: READ, 0x63, size::<kb::kvm_irqchip>();
    KVM_CREATE_PIT: 0, 0x64, 0;
    KVM_GET_PIT: READ | WRITE, 0x65, size::<kb::kvm_pit_state>();
    KVM_SET_PIT: READ, 0x66, size::<kb::kvm_pit_state>();
    KVM_REGISTER_COALESCED_MMIO: WRITE, 0x67, size::<kb::kvm_coalesced_mmio_zone>();
    KVM_UNREGISTER_COALESCED_MMIO: WRITE, 0x68, size::<kb::kvm_coalesced_mmio_zone>();
    KVM_IRQ_LINE_STATUS: READ | WRITE, 0x67, 8;
    KVM_SET_GSI_ROUTING: WRITE, 0x6a, 8;
    KVM_REINJECT_CONTROL: 0, 0x71, 0;
    KVM_IRQFD: WRITE, 0x76, size::<kb::kvm_irqfd>();
    KVM_CREATE_PIT2: WRITE, 0x77, size::<kb::kvm_pit_config>();
    KVM_IOEVENTFD: WRITE, 0x79, size::<kb::kvm_ioeventfd>();
    KVM_SET_CLOCK: WRITE, 0x7b, size::<kb::kvm_clock_data>();
    KVM_GET_CLOCK: READ, 0x7c, size::<kb::kvm_clock_data>();
    KVM_KVMCLOCK_CTRL: 0, 0xad, 0;
    KVM_RUN: 0, 0x80, 0;
    KVM_GET_REGS: READ, 0x81, size::<kb::kvm_regs>();
    KVM_SET_REGS: WRITE, 0x82, size::<kb::kvm_regs>();
    KVM_GET_SREGS: READ, 0x83, size::<kb::kvm_sregs>();
    KVM_SET_SREGS: WRITE, 0x84, size::<kb::kvm_sregs>();
    KVM_TRANSLATE: READ | WRITE, 0x85, size::<kb::kvm_translation>();
    KVM_INTERRUPT: WRITE, 0x86, 4;
    KVM_GET_MSRS: READ | WRITE, 0x88, 8;
    KVM_SET_MSRS: WRITE, 0x89, 8;
    KVM_SET_SIGNAL_MASK: WRITE, 0x8b, 4;
    KVM_GET_FPU: READ, 0x8c, size::<kb::kvm_fpu>();
    KVM_SET_FPU: WRITE, 0x8d, size::<kb::kvm_fpu>();
    KVM_GET_LAPIC: READ, 0x8e, size::<kb::kvm_lapic_state>();
    KVM_SET_LAPIC: WRITE, 0x8f, size::<kb::kvm_lapic_state>();
    KVM_SET_CPUID2: WRITE, 0x90, 8;
    KVM_GET_CPUID2: READ | WRITE, 0x91, 8;
    KVM_X86_SETUP_MCE: WRITE, 0x9c, 8;
    KVM_X86_GET_MCE_CAP_SUPPORTED: READ, 0x9d, 8;
    KVM_X86_SET_MCE: WRITE, 0x9e, 64;
    KVM_TPR_ACCESS_REPORTING: READ | WRITE, 0x92, size::<kb::kvm_tpr_access_ctl>();
    KVM_SET_VAPIC_ADDR: WRITE, 0x93, size::<kb::kvm_vapic_addr>();
    KVM_GET_MP_STATE: READ, 0x98, size::<kb::kvm_mp_state>();
    KVM_SET_MP_STATE: WRITE, 0x99, size::<kb::kvm_mp_state>();
    KVM_NMI: 0, 0x9a, 0;
    KVM_SET_GUEST_DEBUG: WRITE, 0x9b, size::<kb::kvm_guest_debug>();
    KVM_GET_VCPU_EVENTS: READ, 0x9f, size::<kb::kvm_vcpu_events>();
    KVM_SET_VCPU_EVENTS: WRITE, 0xa0, size::<kb::kvm_vcpu_events>();
    KVM_GET_PIT2: READ, 0x9f, size::<kb::kvm_pit_state2>();
    KVM_SET_PIT2: WRITE, 0xa0, size::<kb::kvm_pit_state2>();
    KVM_GET_DEBUGREGS: READ, 0xa1, size::<kb::kvm_debugregs>();
    KVM_SET_DEBUGREGS: WRITE, 0xa2, size::<kb::kvm_debugregs>();
    KVM_SET_TSC_KHZ: 0, 0xa2, 0;
    KVM_GET_TSC_KHZ: 0, 0xa3, 0;
    KVM_SET_DEVICE_ATTR: WRITE, 0xe1, size::<kb::kvm_device_attr>();
    KVM_GET_DEVICE_ATTR: WRITE, 0xe2, size::<kb::kvm_device_attr>();
    KVM_HAS_DEVICE_ATTR: WRITE, 0xe3, size::<kb::kvm_device_attr>();
    KVM_SIGNAL_MSI: WRITE, 0xa5, size::<kb::kvm_msi>();
    KVM_ENABLE_CAP: WRITE, 0xa3, size::<kb::kvm_enable_cap>();
    KVM_GET_XSAVE: READ, 0xa4, 4096;
    KVM_SET_XSAVE: WRITE, 0xa5, 4096;
    KVM_GET_XCRS: READ, 0xa6, size::<kb::kvm_xcrs>();
    KVM_SET_XCRS: WRITE, 0xa7, size::<kb::kvm_xcrs>();
    KVM_CLEAR_DIRTY_LOG: READ | WRITE, 0xc0, size::<kb::kvm_clear_dirty_log>();
    KVM_X86_SET_MSR_FILTER: WRITE, 0xc6, size::<kb::kvm_msr_filter>();
    KVM_RESET_DIRTY_RINGS: 0, 0xc7, 0;
    KVM_GET_STATS_FD: 0, 0xce, 0;
    KVM_GET_SREGS2: READ, 0xcc, size::<kb::kvm_sregs2>();
    KVM_SET_SREGS2: WRITE, 0xcd, size::<kb::kvm_sregs2>();
    KVM_PRE_FAULT_MEMORY: READ | WRITE, 0xd5, size::<crate::vm::PreFault>();
}

/// Calls `ioctl` on `fd`.
///
/// # Errors
///
/// What the kernel answered, with the ioctl's name.
pub fn ioctl(fd: RawFd, request: Ioctl, arg: usize) -> Result<i32, Error> {
    // SAFETY: The kernel checks the address that it is given; callers pass addresses of objects
    // that are large enough for the request, or addresses that are invalid on purpose.
    let ret = unsafe { libc::ioctl(fd, request.nr as libc::Ioctl, arg) };
    if ret < 0 {
        return Err(Error::last(request.name));
    }
    Ok(ret)
}

/// A request that has no name here: for numbers that no one implements.
#[must_use]
pub fn unnamed(dir_read: bool, dir_write: bool, nr: u8, size: u16) -> Ioctl {
    let dir = if dir_read { READ } else { 0 } | if dir_write { WRITE } else { 0 };
    Ioctl {
        nr: ioc(dir, u64::from(nr), usize::from(size & 0x3fff)),
        name: "unnamed ioctl",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers as strace shows them.
    #[test]
    fn numbers() {
        assert_eq!(KVM_GET_API_VERSION.nr, 0xae00);
        assert_eq!(KVM_CREATE_VCPU.nr, 0xae41);
        assert_eq!(KVM_RUN.nr, 0xae80);
        assert_eq!(KVM_SET_USER_MEMORY_REGION.nr, 0x4020_ae46);
        assert_eq!(KVM_GET_REGS.nr, 0x8090_ae81);
        assert_eq!(KVM_SET_SREGS.nr, 0x4138_ae84);
        assert_eq!(KVM_GET_MSRS.nr, 0xc008_ae88);
        assert_eq!(KVM_GET_FPU.nr, 0x81a0_ae8c);
        assert_eq!(KVM_SET_CPUID2.nr, 0x4008_ae90);
        assert_eq!(KVM_GET_VCPU_EVENTS.nr, 0x8040_ae9f);
        assert_eq!(KVM_GET_DEBUGREGS.nr, 0x8080_aea1);
        assert_eq!(KVM_GET_XSAVE.nr, 0x9000_aea4);
        assert_eq!(KVM_GET_XCRS.nr, 0x8188_aea6);
        assert_eq!(KVM_SET_USER_MEMORY_REGION2.nr, 0x40a0_ae49);
        assert_eq!(KVM_REGISTER_COALESCED_MMIO.nr, 0x4010_ae67);
        assert_eq!(KVM_ENABLE_CAP.nr, 0x4068_aea3);
        assert_eq!(KVM_CLEAR_DIRTY_LOG.nr, 0xc018_aec0);
        assert_eq!(KVM_PRE_FAULT_MEMORY.nr, 0xc040_aed5);
    }
}
