// SPDX-License-Identifier: GPL-2.0

//! The device file: its ioctls, their results and their errors.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::sys::{self, unnamed};
use selftests::vm::{Cpuid, Fd, Kvm, Vm, CPUID_MAX};
use selftests::{ensure, ensure_eq, fail, skip, tests, Env, Outcome};
use std::collections::HashSet;
use std::process::ExitCode;

/// No mapping is at this address, in any process.
const BAD_ADDRESS: usize = 8;

fn api_version(env: &Env) -> Outcome {
    let kvm = env.open()?;
    ensure_eq!(
        kvm.fd.ioctl(sys::KVM_GET_API_VERSION, 0)?,
        12,
        "KVM_GET_API_VERSION"
    );
    expect_errno(
        kvm.fd.ioctl(sys::KVM_GET_API_VERSION, 1),
        libc::EINVAL,
        "argument 1",
    )
}

/// What the calls that the module implements stand on must be announced.
fn capabilities_present(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let vm = kvm.create_vm()?;
    let needed = [
        ("USER_MEMORY", kb::KVM_CAP_USER_MEMORY),
        ("SET_TSS_ADDR", kb::KVM_CAP_SET_TSS_ADDR),
        ("EXT_CPUID", kb::KVM_CAP_EXT_CPUID),
        ("NR_VCPUS", kb::KVM_CAP_NR_VCPUS),
        ("NR_MEMSLOTS", kb::KVM_CAP_NR_MEMSLOTS),
        ("MP_STATE", kb::KVM_CAP_MP_STATE),
        ("SYNC_MMU", kb::KVM_CAP_SYNC_MMU),
        (
            "DESTROY_MEMORY_REGION_WORKS",
            kb::KVM_CAP_DESTROY_MEMORY_REGION_WORKS,
        ),
        ("USER_NMI", kb::KVM_CAP_USER_NMI),
        (
            "JOIN_MEMORY_REGIONS_WORKS",
            kb::KVM_CAP_JOIN_MEMORY_REGIONS_WORKS,
        ),
        ("SET_IDENTITY_MAP_ADDR", kb::KVM_CAP_SET_IDENTITY_MAP_ADDR),
        ("VCPU_EVENTS", kb::KVM_CAP_VCPU_EVENTS),
        ("DEBUGREGS", kb::KVM_CAP_DEBUGREGS),
        ("XSAVE", kb::KVM_CAP_XSAVE),
        ("XCRS", kb::KVM_CAP_XCRS),
        ("GET_TSC_KHZ", kb::KVM_CAP_GET_TSC_KHZ),
        ("MAX_VCPUS", kb::KVM_CAP_MAX_VCPUS),
        ("MAX_VCPU_ID", kb::KVM_CAP_MAX_VCPU_ID),
        ("CHECK_EXTENSION_VM", kb::KVM_CAP_CHECK_EXTENSION_VM),
        ("IMMEDIATE_EXIT", kb::KVM_CAP_IMMEDIATE_EXIT),
    ];
    let mut missing = String::new();
    for (name, cap) in needed {
        if kvm.capability(cap) <= 0 {
            missing += &format!(" {name}");
        }
        let on_vm = vm.fd.ioctl(sys::KVM_CHECK_EXTENSION, cap as usize);
        if !matches!(on_vm, Ok(v) if v > 0) {
            missing += &format!(" {name} (on the VM)");
        }
    }
    ensure!(
        missing.is_empty(),
        "capabilities that are missing:{missing}"
    );
    Ok(())
}

fn capability_values(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let soft = kvm.capability(kb::KVM_CAP_NR_VCPUS);
    let max = kvm.capability(kb::KVM_CAP_MAX_VCPUS);
    let ids = kvm.capability(kb::KVM_CAP_MAX_VCPU_ID);
    let slots = kvm.capability(kb::KVM_CAP_NR_MEMSLOTS);
    ensure!(soft >= 1 && soft <= max, "NR_VCPUS {soft}, MAX_VCPUS {max}");
    ensure!(ids >= max, "MAX_VCPU_ID {ids} is below MAX_VCPUS {max}");
    ensure!(slots >= 32, "NR_MEMSLOTS is {slots}");
    Ok(())
}

fn unknown_capabilities(env: &Env) -> Outcome {
    let kvm = env.open()?;
    for cap in [0x7fff_ffff_usize, 0xffff_ffff, 100_000, usize::MAX] {
        let r = kvm.fd.ioctl(sys::KVM_CHECK_EXTENSION, cap)?;
        ensure_eq!(r, 0, "KVM_CHECK_EXTENSION({cap:#x})");
    }
    Ok(())
}

/// A capability that is announced has its ioctl, and one that is not, has not.
fn capabilities_are_true(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let vm = kvm.create_vm()?;
    let vcpu = vm.create_vcpu(0)?;
    // Each call has an argument with which an implementation fails with something else than "no
    // such ioctl", or succeeds.
    let table: [(&str, u32, sys::Ioctl, &Fd); 8] = [
        (
            "MP_STATE",
            kb::KVM_CAP_MP_STATE,
            sys::KVM_GET_MP_STATE,
            &vcpu.fd,
        ),
        (
            "VCPU_EVENTS",
            kb::KVM_CAP_VCPU_EVENTS,
            sys::KVM_GET_VCPU_EVENTS,
            &vcpu.fd,
        ),
        (
            "DEBUGREGS",
            kb::KVM_CAP_DEBUGREGS,
            sys::KVM_GET_DEBUGREGS,
            &vcpu.fd,
        ),
        ("XSAVE", kb::KVM_CAP_XSAVE, sys::KVM_GET_XSAVE, &vcpu.fd),
        ("XCRS", kb::KVM_CAP_XCRS, sys::KVM_GET_XCRS, &vcpu.fd),
        (
            "EXT_EMUL_CPUID",
            kb::KVM_CAP_EXT_EMUL_CPUID,
            sys::KVM_GET_EMULATED_CPUID,
            &kvm.fd,
        ),
        (
            "GET_MSR_FEATURES",
            kb::KVM_CAP_GET_MSR_FEATURES,
            sys::KVM_GET_MSR_FEATURE_INDEX_LIST,
            &kvm.fd,
        ),
        (
            "EXT_CPUID",
            kb::KVM_CAP_EXT_CPUID,
            sys::KVM_GET_SUPPORTED_CPUID,
            &kvm.fd,
        ),
    ];
    for (name, cap, call, fd) in table {
        let there = kvm.capability(cap) > 0;
        let r = fd.ioctl(call, BAD_ADDRESS);
        let errno = r.as_ref().err().map_or(0, |e| e.errno);
        let refused = matches!(errno, libc::ENOTTY | libc::EINVAL);
        ensure!(
            there != refused,
            "KVM_CAP_{name} is {there}, but {} gave {r:?}",
            call.name
        );
    }
    // The in-kernel interrupt controllers: creation is the test.
    let there = kvm.capability(kb::KVM_CAP_IRQCHIP) > 0;
    let other = kvm.create_vm()?;
    let r = other.fd.ioctl(sys::KVM_CREATE_IRQCHIP, 0);
    ensure!(
        there == r.is_ok(),
        "KVM_CAP_IRQCHIP is {there}, but KVM_CREATE_IRQCHIP gave {r:?}"
    );
    Ok(())
}

fn create_vm(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let fd = Fd(kvm.fd.ioctl(sys::KVM_CREATE_VM, 0)?);
    // SAFETY: Reads the flags of a descriptor.
    let flags = unsafe { libc::fcntl(fd.0, libc::F_GETFD) };
    ensure!(
        flags & libc::FD_CLOEXEC != 0,
        "the VM's descriptor is not close-on-exec"
    );
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.0)).unwrap_or_default();
    ensure_eq!(
        link.to_string_lossy(),
        "anon_inode:kvm-vm",
        "name of the VM's file"
    );
    for ty in [0x100usize, 0xffff, 0x1_0000_0000] {
        expect_errno(
            kvm.fd.ioctl(sys::KVM_CREATE_VM, ty),
            libc::EINVAL,
            &format!("KVM_CREATE_VM of type {ty:#x}"),
        )?;
    }
    Ok(())
}

/// A VM lives on when the device is closed.
fn vm_outlives_device(env: &Env) -> Outcome {
    let vm: Vm = {
        let kvm: Kvm = env.open()?;
        kvm.create_vm()?
    };
    vm.create_vcpu(0)?.regs()?;
    Ok(())
}

fn create_vm_without_descriptors(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: Sets a limit of this process, which ends with the test.
    let r = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
    ensure_eq!(r, 0, "setrlimit");
    expect_errno(
        kvm.fd.ioctl(sys::KVM_CREATE_VM, 0),
        libc::EMFILE,
        "KVM_CREATE_VM",
    )
}

fn vcpu_mmap_size(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let size = kvm.fd.ioctl(sys::KVM_GET_VCPU_MMAP_SIZE, 0)?;
    let size = usize::try_from(size).unwrap_or(0);
    ensure!(
        size >= size_of::<kb::kvm_run>(),
        "{size} bytes do not hold struct kvm_run"
    );
    ensure_eq!(size % 4096, 0, "size in part of a page");
    expect_errno(
        kvm.fd.ioctl(sys::KVM_GET_VCPU_MMAP_SIZE, 1),
        libc::EINVAL,
        "argument 1",
    )
}

fn supported_cpuid(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let c = kvm.supported_cpuid()?;
    ensure!(
        c.nent > 4 && c.nent as usize <= CPUID_MAX,
        "{} entries",
        c.nent
    );
    let mut seen = HashSet::new();
    for e in c.list() {
        ensure!(
            seen.insert((e.function, e.index)),
            "leaf {:#x}.{} twice",
            e.function,
            e.index
        );
    }
    let (Some(zero), Some(one)) = (c.find(0, 0), c.find(1, 0)) else {
        fail!("leaf 0 or leaf 1 is missing")
    };
    ensure!(
        c.find(0x8000_0000, 0).is_some(),
        "leaf 0x80000000 is missing"
    );
    ensure!(
        c.find(0x8000_0001, 0).is_some(),
        "leaf 0x80000001 is missing"
    );
    // SAFETY: Every processor with VMX has CPUID.
    let host = unsafe { core::arch::x86_64::__cpuid(0) };
    ensure_eq!(
        (zero.ebx, zero.ecx, zero.edx),
        (host.ebx, host.ecx, host.edx),
        "vendor"
    );
    ensure!(zero.eax >= 0xd, "highest leaf is {:#x}", zero.eax);
    // FPU, PSE, TSC, MSR, PAE, CX8, SEP, PGE, CMOV, FXSR, SSE, SSE2: what a 64-bit kernel demands.
    let demanded = 1
        | (1 << 3)
        | (1 << 4)
        | (1 << 5)
        | (1 << 6)
        | (1 << 8)
        | (1 << 11)
        | (1 << 13)
        | (1 << 15);
    let demanded = demanded | (1 << 24) | (1 << 25) | (1 << 26);
    ensure_eq!(one.edx & demanded, demanded, "leaf 1 EDX");
    let Some(ext) = c.find(0x8000_0001, 0) else {
        fail!("no leaf 0x80000001")
    };
    ensure!(ext.edx & (1 << 29) != 0, "long mode is not announced");
    Ok(())
}

fn supported_cpuid_errors(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let full = kvm.supported_cpuid()?.nent as usize;
    for n in [0, 1, full - 1] {
        let mut c = Cpuid::empty(n);
        let r = kvm.fd.ioctl_mut(sys::KVM_GET_SUPPORTED_CPUID, &mut *c);
        expect_errno(r, libc::E2BIG, &format!("room for {n} of {full} entries"))?;
    }
    let mut c = Cpuid::empty(full);
    kvm.fd.ioctl_mut(sys::KVM_GET_SUPPORTED_CPUID, &mut *c)?;
    ensure_eq!(
        c.nent as usize,
        full,
        "entries, with exactly that much room"
    );
    let r = kvm.fd.ioctl(sys::KVM_GET_SUPPORTED_CPUID, BAD_ADDRESS);
    expect_errno(r, libc::EFAULT, "bad address")?;
    expect_errno(
        kvm.fd.ioctl(sys::KVM_GET_SUPPORTED_CPUID, usize::MAX - 7),
        libc::EFAULT,
        "kernel",
    )
}

fn msr_list(kvm: &Kvm, call: sys::Ioctl, what: &str) -> Result<Vec<u32>, selftests::Verdict> {
    let mut list = vec![0u32; 1025];
    list[0] = 0;
    let r = kvm.fd.ioctl(call, list.as_mut_ptr() as usize);
    let n = list[0];
    if n == 0 {
        r?;
        return Ok(vec![]);
    }
    expect_errno(r, libc::E2BIG, &format!("{what} with room for none"))?;
    ensure!(n <= 1024, "{what} says that there are {n}");
    list[0] = n - 1;
    let r = kvm.fd.ioctl(call, list.as_mut_ptr() as usize);
    expect_errno(r, libc::E2BIG, &format!("{what} with room for one too few"))?;
    ensure_eq!(list[0], n, "{what}: number after the error");
    list[0] = 1024;
    kvm.fd.ioctl(call, list.as_mut_ptr() as usize)?;
    ensure_eq!(list[0], n, "{what}: number");
    expect_errno(
        kvm.fd.ioctl(call, BAD_ADDRESS),
        libc::EFAULT,
        &format!("{what}, bad address"),
    )?;
    list.truncate(n as usize + 1);
    list.remove(0);
    let distinct: HashSet<u32> = list.iter().copied().collect();
    ensure_eq!(distinct.len(), list.len(), "{what}: distinct numbers");
    Ok(list)
}

/// The MSRs that a 64-bit guest cannot be saved without are in the list, and all in it can be read.
fn msr_index_list(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let list = msr_list(&kvm, sys::KVM_GET_MSR_INDEX_LIST, "KVM_GET_MSR_INDEX_LIST")?;
    // TSC, SYSENTER_CS/ESP/EIP, STAR, LSTAR, CSTAR, FMASK, KERNEL_GS_BASE
    let needed: [u32; 9] = [
        0x10,
        0x174,
        0x175,
        0x176,
        0xc000_0081,
        0xc000_0082,
        0xc000_0083,
        0xc000_0084,
        0xc000_0102,
    ];
    for index in needed {
        ensure!(list.contains(&index), "MSR {index:#x} is not in the list");
    }
    let vm = kvm.create_vm()?;
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid(&*kvm.supported_cpuid()?)?;
    let mut refused = String::new();
    for index in list {
        match vcpu.msr(index)? {
            None => refused += &format!(" {index:#x} (read)"),
            Some(v) => {
                // The paravirtual ones depend on more than themselves (a local APIC, for one).
                let paravirtual = index >> 8 == 0x004b_564d;
                if !paravirtual && !vcpu.set_msr(index, v)? {
                    refused += &format!(" {index:#x} (write {v:#x})");
                }
            }
        }
    }
    ensure!(
        refused.is_empty(),
        "MSRs that are listed but refused:{refused}"
    );
    Ok(())
}

fn msr_feature_list(env: &Env) -> Outcome {
    let kvm = env.open()?;
    if kvm.capability(kb::KVM_CAP_GET_MSR_FEATURES) <= 0 {
        skip!("no KVM_CAP_GET_MSR_FEATURES");
    }
    let call = sys::KVM_GET_MSR_FEATURE_INDEX_LIST;
    let list = msr_list(&kvm, call, "KVM_GET_MSR_FEATURE_INDEX_LIST")?;
    for index in list {
        let mut m = selftests::vm::Msrs::new(&[(index, 0)]);
        let n = kvm.fd.ioctl_mut(sys::KVM_GET_MSRS, &mut *m)?;
        ensure_eq!(n, 1, "read of feature MSR {index:#x}");
    }
    Ok(())
}

/// No number without a meaning succeeds. (In-tree KVM answers EINVAL on two of the three files and
/// ENOTTY on the third; either says that there is no such call.)
fn unknown_ioctls(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let vm = kvm.create_vm()?;
    let vcpu = vm.create_vcpu(0)?;
    let calls = [
        unnamed(false, false, 0xff, 0),
        unnamed(true, true, 0xfe, 64),
        unnamed(false, true, 0x81, 16), // KVM_GET_REGS with another size and direction
        unnamed(true, false, 0x83, 8),  // KVM_GET_SREGS with another size
    ];
    for (name, fd) in [("device", &kvm.fd), ("VM", &vm.fd), ("vCPU", &vcpu.fd)] {
        for call in calls {
            let r = fd.ioctl(call, 0);
            let errno = r.as_ref().err().map_or(0, |e| e.errno);
            ensure!(
                matches!(errno, libc::ENOTTY | libc::EINVAL),
                "ioctl {:#x} on the {name}: {r:?}",
                call.nr
            );
        }
    }
    Ok(())
}

/// Each kind of file answers its own calls only.
fn ioctls_of_other_files(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let vm = kvm.create_vm()?;
    let vcpu = vm.create_vcpu(0)?;
    let wrong: [(&str, &Fd, sys::Ioctl); 8] = [
        ("device", &kvm.fd, sys::KVM_CREATE_VCPU),
        ("device", &kvm.fd, sys::KVM_RUN),
        ("device", &kvm.fd, sys::KVM_GET_REGS),
        ("VM", &vm.fd, sys::KVM_CREATE_VM),
        ("VM", &vm.fd, sys::KVM_RUN),
        ("VM", &vm.fd, sys::KVM_GET_VCPU_MMAP_SIZE),
        ("vCPU", &vcpu.fd, sys::KVM_CREATE_VCPU),
        ("vCPU", &vcpu.fd, sys::KVM_GET_API_VERSION),
    ];
    for (name, fd, call) in wrong {
        let r = fd.ioctl(call, 0);
        let errno = r.as_ref().err().map_or(0, |e| e.errno);
        ensure!(
            matches!(errno, libc::ENOTTY | libc::EINVAL),
            "{} on the {name}: {r:?}",
            call.name
        );
    }
    Ok(())
}

/// The three files are no files to read, write or (but for the vCPU) map.
fn other_operations(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let vm = kvm.create_vm()?;
    let vcpu = vm.create_vcpu(0)?;
    for (name, fd) in [("device", kvm.fd.0), ("VM", vm.fd.0), ("vCPU", vcpu.fd.0)] {
        let mut byte = 0u8;
        // SAFETY: One byte, which lives through the calls.
        let (r, w) = unsafe {
            let p: *mut u8 = &mut byte;
            (libc::read(fd, p.cast(), 1), libc::write(fd, p.cast(), 1))
        };
        ensure!(r < 0 && w < 0, "{name}: read gave {r}, write {w}");
        if name != "vCPU" {
            // SAFETY: A new mapping, if it were made, would disturb nothing.
            let p = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ,
                    libc::MAP_SHARED,
                    fd,
                    0,
                )
            };
            ensure!(p == libc::MAP_FAILED, "{name} can be mapped");
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "system",
        tests![
            api_version,
            capabilities_present,
            capability_values,
            unknown_capabilities,
            capabilities_are_true,
            create_vm,
            vm_outlives_device,
            create_vm_without_descriptors,
            vcpu_mmap_size,
            supported_cpuid,
            supported_cpuid_errors,
            msr_index_list,
            msr_feature_list,
            unknown_ioctls,
            ioctls_of_other_files,
            other_operations,
        ],
    )
}
