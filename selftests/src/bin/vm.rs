// SPDX-License-Identifier: GPL-2.0

//! The VM file: memory slots, creation of vCPUs, the special pages.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::guest::{at, usize_of};
use selftests::machine::{start_vcpu, Exit, Machine, Mode};
use selftests::mem::{Mapping, PAGE};
use selftests::sys;
use selftests::vm::Vm;
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome};
use std::process::ExitCode;

const MIB: u64 = 1 << 20;

fn vm_and_memory(env: &Env) -> Result<(Vm, Mapping), selftests::Verdict> {
    let vm = env.open()?.create_vm()?;
    Ok((vm, Mapping::new(4 << 20, false)?))
}

fn slot_alignment(env: &Env) -> Outcome {
    let (vm, mem) = vm_and_memory(env)?;
    let hva = mem.addr() as u64;
    expect_errno(
        vm.set_memory(0, 0, 0x800, MIB, hva),
        libc::EINVAL,
        "unaligned gpa",
    )?;
    expect_errno(
        vm.set_memory(0, 0, 0, MIB + 1, hva),
        libc::EINVAL,
        "unaligned size",
    )?;
    expect_errno(
        vm.set_memory(0, 0, 0, MIB, hva + 0x10),
        libc::EINVAL,
        "unaligned hva",
    )?;
    vm.set_memory(0, 0, 0x1000, 0x1000, hva + 0x1000)?;
    Ok(())
}

fn slot_flags(env: &Env) -> Outcome {
    let (vm, mem) = vm_and_memory(env)?;
    for flag in [1 << 4, 1 << 15, 1 << 31] {
        let r = vm.set_memory(0, flag, 0, MIB, mem.addr() as u64);
        expect_errno(r, libc::EINVAL, &format!("flag {flag:#x}"))?;
    }
    Ok(())
}

/// Dirty logging has no capability of its own: the flag is refused, or the log can be had.
fn slot_dirty_log(env: &Env) -> Outcome {
    let (vm, mem) = vm_and_memory(env)?;
    let r = vm.set_memory(0, kb::KVM_MEM_LOG_DIRTY_PAGES, 0, MIB, mem.addr() as u64);
    if r.is_err() {
        expect_errno(r, libc::EINVAL, "KVM_MEM_LOG_DIRTY_PAGES")?;
        skip!("no dirty logging");
    }
    let mut bitmap = [0u64; 4];
    let mut log = kb::kvm_dirty_log {
        slot: 0,
        ..Default::default()
    };
    log.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    vm.fd.ioctl_mut(sys::KVM_GET_DIRTY_LOG, &mut log)?;
    ensure_eq!(bitmap, [0; 4], "log of a slot that no one wrote");
    Ok(())
}

/// A read-only slot reads as memory, and a write to it is an MMIO exit; without the capability the
/// flag is refused.
fn slot_readonly(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov edx, 0x1000000",
        "mov eax, [edx + 8]",
        "mov dword ptr [edx + 16], 0x11223344",
        "mov ebx, [edx + 16]",
        "hlt",
    );
    let m = Machine::new(env, Mode::Protected, code())?;
    let rom = Mapping::new(PAGE, false)?;
    rom.write(8, 0xcafe_f00du32);
    rom.write(16, 0x5555_5555u32);
    let r =
        m.vm.set_memory(1, kb::KVM_MEM_READONLY, 16 * MIB, 0x1000, rom.addr() as u64);
    if m.kvm.capability(kb::KVM_CAP_READONLY_MEM) <= 0 {
        expect_errno(r, libc::EINVAL, "KVM_MEM_READONLY without its capability")?;
        skip!("no KVM_CAP_READONLY_MEM");
    }
    r?;
    m.expect(&Exit::MmioWrite {
        addr: 0x100_0010,
        data: vec![0x44, 0x33, 0x22, 0x11],
    })?;
    m.expect_hlt()?;
    let regs = m.vcpu.regs()?;
    ensure_eq!(
        (regs.rax, regs.rbx),
        (0xcafe_f00d, 0x5555_5555),
        "what the guest read"
    );
    ensure_eq!(
        rom.read::<u32>(16),
        0x5555_5555,
        "the host's memory after the guest's write"
    );
    let r = m.vm.set_memory(1, 0, 16 * MIB, 0x1000, rom.addr() as u64);
    expect_errno(r, libc::EINVAL, "read-only to writable")
}

fn slot_addresses(env: &Env) -> Outcome {
    let (vm, mem) = vm_and_memory(env)?;
    let hva = mem.addr() as u64;
    let r = vm.set_memory(0, 0, 0, MIB, 0xffff_8880_0000_0000);
    expect_errno(r, libc::EINVAL, "hva in the kernel's half")?;
    let r = vm.set_memory(0, 0, 0, 2 << 46, hva);
    expect_errno(r, libc::EINVAL, "size beyond the user's half")?;
    let r = vm.set_memory(0, 0, 0u64.wrapping_sub(MIB), 2 * MIB, hva);
    expect_errno(r, libc::EINVAL, "gpa that wraps around")?;
    let r = vm.set_memory(0, 0, 0u64.wrapping_sub(MIB), MIB, hva);
    expect_errno(r, libc::EINVAL, "gpa that ends at 2^64")?;
    let r = vm.set_memory(0, 0, 1 << 60, MIB, hva);
    expect_errno(r, libc::EINVAL, "gpa beyond any physical address")?;
    // 2^31 pages are one too many for a slot, whatever is mapped there.
    let r = vm.set_memory(0, 0, 0, (1 << 31) * 4096, 0x1000);
    expect_errno(r, libc::EINVAL, "2^31 pages")?;
    let r = vm.fd.ioctl(sys::KVM_SET_USER_MEMORY_REGION, 8);
    expect_errno(r, libc::EFAULT, "bad address of the argument")
}

/// A slot of terabytes is only a number until it is touched.
fn slot_huge(env: &Env) -> Outcome {
    let (vm, _mem) = vm_and_memory(env)?;
    vm.set_memory(0, 0, 0, 1 << 37, 0x1000)?;
    vm.set_memory(0, 0, 0, 0, 0x1000)?;
    Ok(())
}

fn slot_numbers(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let vm = kvm.create_vm()?;
    let mem = Mapping::new(4 << 20, false)?;
    let hva = mem.addr() as u64;
    let slots = u32::try_from(kvm.capability(kb::KVM_CAP_NR_MEMSLOTS)).unwrap_or(0);
    vm.set_memory(slots - 1, 0, 0, MIB, hva)?;
    // In-tree KVM has a few slots of its own above those that it announces.
    for slot in [slots + 16, 0xffff] {
        let r = vm.set_memory(slot, 0, MIB, MIB, hva);
        expect_errno(r, libc::EINVAL, &format!("slot {slot} of {slots}"))?;
    }
    let spaces = kvm.capability(kb::KVM_CAP_MULTI_ADDRESS_SPACE).max(1);
    let space = u32::try_from(spaces).unwrap_or(1);
    let r = vm.set_memory(space << 16, 0, MIB, MIB, hva);
    expect_errno(r, libc::EINVAL, "address space that is not there")
}

fn slot_overlap(env: &Env) -> Outcome {
    let (vm, mem) = vm_and_memory(env)?;
    let hva = mem.addr() as u64;
    vm.set_memory(0, 0, MIB, MIB, hva)?;
    for (gpa, size, what) in [
        (MIB, MIB, "the same range"),
        (MIB + 0x1000, 0x1000, "a page within"),
        (0, MIB + 0x1000, "an overlap at the start"),
        (2 * MIB - 0x1000, MIB, "an overlap at the end"),
        (0, 4 * MIB, "a range around it"),
    ] {
        expect_errno(vm.set_memory(1, 0, gpa, size, hva), libc::EEXIST, what)?;
    }
    vm.set_memory(1, 0, 0, MIB, hva)?;
    vm.set_memory(2, 0, 2 * MIB, MIB, hva)?;
    // A move must not hit a neighbour, but may overlap its own old place.
    expect_errno(
        vm.set_memory(0, 0, MIB + 0x1000, MIB, hva),
        libc::EEXIST,
        "move onto slot 2",
    )?;
    vm.set_memory(2, 0, 0, 0, 0)?;
    vm.set_memory(0, 0, MIB + 0x1000, MIB, hva)?;
    Ok(())
}

fn slot_changes(env: &Env) -> Outcome {
    let (vm, mem) = vm_and_memory(env)?;
    let hva = mem.addr() as u64;
    vm.set_memory(3, 0, MIB, MIB, hva)?;
    vm.set_memory(3, 0, MIB, MIB, hva)?; // nothing changes
    expect_errno(
        vm.set_memory(3, 0, MIB, 2 * MIB, hva),
        libc::EINVAL,
        "growth",
    )?;
    expect_errno(
        vm.set_memory(3, 0, MIB, 0x1000, hva),
        libc::EINVAL,
        "shrinking",
    )?;
    expect_errno(
        vm.set_memory(3, 0, MIB, MIB, hva + 0x1000),
        libc::EINVAL,
        "another hva",
    )?;
    vm.set_memory(3, 0, 0, 0, 0)?;
    expect_errno(
        vm.set_memory(3, 0, 0, 0, 0),
        libc::EINVAL,
        "deletion of a deleted slot",
    )?;
    expect_errno(
        vm.set_memory(7, 0, 0, 0, 0),
        libc::EINVAL,
        "deletion of a slot that never was",
    )?;
    vm.set_memory(3, 0, MIB, 2 * MIB, hva + 0x1000)?;
    Ok(())
}

guest_code!(
    read_twice,
    ".code32",
    "2: mov eax, [0x1000000]",
    "hlt",
    "jmp 2b",
);

/// A guest that had a page mapped sees it go, come back elsewhere, and move.
fn slot_delete_and_move(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Protected, read_twice())?;
    let (a, b) = (
        Mapping::new(PAGE * 4, false)?,
        Mapping::new(PAGE * 4, false)?,
    );
    a.write(0, 0xaaaa_0000u32);
    b.write(0, 0xbbbb_0000u32);
    b.write(PAGE, 0xbbbb_1111u32);
    let gpa = 16 * MIB;
    let read = |want: u64, what: &str| -> Outcome {
        m.expect_hlt()?;
        ensure_eq!(m.vcpu.regs()?.rax, want, "{what}");
        Ok(())
    };
    m.vm.set_memory(1, 0, gpa, 0x4000, a.addr() as u64)?;
    read(0xaaaa_0000, "slot over the first mapping")?;
    m.vm.set_memory(1, 0, 0, 0, 0)?;
    m.expect(&Exit::MmioRead { addr: gpa, len: 4 })?;
    m.mmio_reply(&[1, 2, 3, 4]);
    read(0x0403_0201, "no slot")?;
    m.vm.set_memory(1, 0, gpa, 0x4000, b.addr() as u64)?;
    read(0xbbbb_0000, "slot over the second mapping")?;
    m.vm.set_memory(1, 0, gpa - 0x1000, 0x4000, b.addr() as u64)?;
    read(0xbbbb_1111, "slot moved down by a page")?;
    m.vm.set_memory(1, 0, 2 * gpa, 0x4000, b.addr() as u64)?;
    m.expect(&Exit::MmioRead { addr: gpa, len: 4 })?;
    Ok(())
}

/// Many small slots, each its own page, in an order that is not that of their addresses.
fn many_slots(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov edx, 0x1000000",
        "mov ecx, 100",
        "xor eax, eax",
        "2: add eax, [edx]",
        "inc dword ptr [edx]",
        "add edx, 0x2000",
        "dec ecx",
        "jnz 2b",
        "hlt",
    );
    let m = Machine::new(env, Mode::Protected, code())?;
    let mem = Mapping::new(100 * PAGE, false)?;
    let mut sum = 0u32;
    for i in 0..100u32 {
        let j = (i * 37) % 100;
        let offset = j as usize * PAGE;
        mem.write(offset, j * 1000 + 7);
        sum = sum.wrapping_add(j * 1000 + 7);
        let gpa = 16 * MIB + u64::from(j) * 0x2000;
        m.vm.set_memory(1 + i, 0, gpa, 0x1000, (mem.addr() + offset) as u64)?;
    }
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rax, u64::from(sum), "sum over all slots");
    for j in 0..100u32 {
        ensure_eq!(mem.read::<u32>(j as usize * PAGE), j * 1000 + 8, "page {j}");
    }
    Ok(())
}

/// Two slots may show the same host memory.
fn slot_alias(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov dword ptr [0x1000000], 0x12345678",
        "mov eax, [0x1800000]",
        "mov dword ptr [0x1800004], 0x9abcdef0",
        "mov ebx, [0x1000004]",
        "hlt",
    );
    let m = Machine::new(env, Mode::Protected, code())?;
    let mem = Mapping::new(PAGE, false)?;
    m.vm.set_memory(1, 0, 16 * MIB, 0x1000, mem.addr() as u64)?;
    m.vm.set_memory(2, 0, 24 * MIB, 0x1000, mem.addr() as u64)?;
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    ensure_eq!(
        (r.rax, r.rbx),
        (0x1234_5678, 0x9abc_def0),
        "values through the other slot"
    );
    Ok(())
}

fn create_vcpu(env: &Env) -> Outcome {
    let vm = env.open()?.create_vm()?;
    let first = vm.create_vcpu(0)?;
    let second = vm.create_vcpu(1)?;
    expect_errno(vm.create_vcpu(0), libc::EEXIST, "vCPU 0 again")?;
    expect_errno(vm.create_vcpu(1), libc::EEXIST, "vCPU 1 again")?;
    // SAFETY: Reads the flags of a descriptor.
    let flags = unsafe { libc::fcntl(first.fd.0, libc::F_GETFD) };
    ensure!(
        flags & libc::FD_CLOEXEC != 0,
        "the vCPU's descriptor is not close-on-exec"
    );
    let link = std::fs::read_link(format!("/proc/self/fd/{}", second.fd.0)).unwrap_or_default();
    ensure_eq!(
        link.to_string_lossy(),
        "anon_inode:kvm-vcpu:1",
        "name of the vCPU's file"
    );
    Ok(())
}

fn vcpu_id_limits(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let vm = kvm.create_vm()?;
    let ids = usize::try_from(kvm.capability(kb::KVM_CAP_MAX_VCPU_ID)).unwrap_or(0);
    vm.create_vcpu(ids - 1)?;
    for id in [ids, ids + 1, 1 << 31, 1 << 32, usize::MAX] {
        expect_errno(
            vm.create_vcpu(id),
            libc::EINVAL,
            &format!("vCPU {id:#x} of {ids:#x}"),
        )?;
    }
    Ok(())
}

/// 64 vCPUs, each with registers of its own.
fn many_vcpus(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "inc dword ptr [ebx]", "hlt");
    let m = Machine::new(env, Mode::Protected, code())?;
    let max = usize::try_from(m.kvm.capability(kb::KVM_CAP_MAX_VCPUS)).unwrap_or(1);
    let n = max.min(64);
    let vcpus: Result<Vec<_>, _> = (1..n).map(|i| m.vm.create_vcpu(i)).collect();
    let vcpus = vcpus?;
    for round in 1..=2u32 {
        for (i, v) in vcpus.iter().enumerate() {
            start_vcpu(v, Mode::Protected, at::CODE)?;
            let mut r = v.regs()?;
            r.rbx = at::DATA + i as u64 * 4;
            v.set_regs(&r)?;
            ensure_eq!(v.run()?, kb::KVM_EXIT_HLT, "exit of vCPU {i}");
            let got: u32 = m.mem.read(usize_of(at::DATA) + i * 4);
            ensure_eq!(got, round, "count of vCPU {i}");
        }
    }
    Ok(())
}

/// The number stays taken when the vCPU's file is closed: it lives as long as its VM.
fn vcpu_stays(env: &Env) -> Outcome {
    let vm = env.open()?.create_vm()?;
    drop(vm.create_vcpu(0)?);
    expect_errno(
        vm.create_vcpu(0),
        libc::EEXIST,
        "vCPU 0 after its file was closed",
    )
}

fn vcpu_mapping(env: &Env) -> Outcome {
    let vm = env.open()?.create_vm()?;
    let vcpu = vm.create_vcpu(0)?;
    // A second mapping shows the same page.
    // SAFETY: A new mapping at an address that the kernel chooses disturbs nothing.
    let again = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            vcpu.run_size(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            vcpu.fd.0,
            0,
        )
    };
    ensure!(again != libc::MAP_FAILED, "a second mapping of kvm_run");
    vcpu.set_immediate_exit(1);
    let offset = std::mem::offset_of!(kb::kvm_run, immediate_exit);
    // SAFETY: The mapping holds a `kvm_run`.
    let seen = unsafe { (again as *const u8).add(offset).read_volatile() };
    ensure_eq!(seen, 1, "a byte through the second mapping");
    Ok(())
}

/// Behind the pages that the size announces there is nothing: SIGBUS, in a process that can die.
fn vcpu_mapping_end(env: &Env) -> Outcome {
    let vm = env.open()?.create_vm()?;
    let vcpu = vm.create_vcpu(0)?;
    let size = vcpu.run_size();
    // SAFETY: The child only maps, touches and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: As above.
        unsafe {
            let p = libc::mmap(
                std::ptr::null_mut(),
                0x1000,
                libc::PROT_READ,
                libc::MAP_SHARED,
                vcpu.fd.0,
                libc::off_t::try_from(size + 0x10000).unwrap_or(0),
            );
            if p == libc::MAP_FAILED {
                libc::_exit(7);
            }
            p.cast::<u8>().read_volatile();
            libc::_exit(8);
        }
    }
    let mut status = 0;
    // SAFETY: `status` lives through the call.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    let refused = libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7;
    let bus = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS;
    ensure!(
        refused || bus,
        "a page far behind kvm_run: wait status {status:#x}"
    );
    Ok(())
}

fn special_pages(env: &Env) -> Outcome {
    let vm = env.open()?.create_vm()?;
    vm.fd.ioctl(sys::KVM_SET_TSS_ADDR, 0xfffb_d000)?;
    let r = vm.fd.ioctl(sys::KVM_SET_TSS_ADDR, 0xffff_f000);
    expect_errno(r, libc::EINVAL, "three pages that do not fit below 4 GiB")?;
    vm.fd.ioctl(sys::KVM_SET_NR_MMU_PAGES, 64)?;
    let r = vm.fd.ioctl(sys::KVM_SET_NR_MMU_PAGES, 63);
    expect_errno(r, libc::EINVAL, "too few pages for shadow page tables")?;
    let address = 0xfeff_c000u64;
    vm.fd.ioctl_ref(sys::KVM_SET_IDENTITY_MAP_ADDR, &address)?;
    vm.fd.ioctl_ref(sys::KVM_SET_IDENTITY_MAP_ADDR, &0u64)?;
    let r = vm.fd.ioctl(sys::KVM_SET_IDENTITY_MAP_ADDR, 8);
    expect_errno(r, libc::EFAULT, "bad address of the argument")?;
    let _vcpu = vm.create_vcpu(0)?;
    let r = vm.fd.ioctl_ref(sys::KVM_SET_IDENTITY_MAP_ADDR, &address);
    expect_errno(r, libc::EINVAL, "KVM_SET_IDENTITY_MAP_ADDR with a vCPU")
}

/// How much memory the process has mapped, in bytes, that is anonymous and shared.
fn shared_memory() -> Result<u64, selftests::Verdict> {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else {
        fail!("/proc/self/maps cannot be read");
    };
    let mut sum = 0;
    for line in maps.lines().filter(|line| line.contains("/dev/zero")) {
        let range = line.split(' ').next().and_then(|r| r.split_once('-'));
        let Some((start, end)) = range else { continue };
        let number = |s| u64::from_str_radix(s, 16).unwrap_or(0);
        sum += number(end) - number(start);
    }
    Ok(sum)
}

/// Where guests are not unrestricted, the special pages are memslots, of the process's memory, but not of the user's.
fn special_slots(env: &Env) -> Outcome {
    const TSS: u64 = 0xfffb_d000;
    const IDENTITY: u64 = 0xfffb_b000;
    let before = shared_memory()?;
    let (vm, mem) = vm_and_memory(env)?;
    let with_memory = shared_memory()?;
    let hva = mem.addr() as u64;
    vm.fd.ioctl(sys::KVM_SET_TSS_ADDR, TSS as usize)?;
    if vm.fd.ioctl(sys::KVM_SET_TSS_ADDR, TSS as usize).is_ok() {
        skip!("guests are unrestricted");
    }
    let r = vm.fd.ioctl(sys::KVM_SET_TSS_ADDR, TSS as usize - 0x10_0000);
    expect_errno(r, libc::EEXIST, "the TSS at a second place")?;
    ensure!(
        shared_memory()? - with_memory == 0x3000,
        "the TSS takes no three pages of the process's"
    );
    for (gpa, what) in [
        (TSS, "a slot at the TSS"),
        (TSS + 0x2000, "a slot at its last page"),
    ] {
        expect_errno(vm.set_memory(0, 0, gpa, 0x1000, hva), libc::EEXIST, what)?;
    }
    vm.set_memory(0, 0, TSS - 0x1000, 0x1000, hva)?;
    vm.set_memory(1, 0, TSS + 0x3000, 0x1000, hva)?;
    for id in 32764..32767 {
        let what = "a slot of the kernel's";
        expect_errno(vm.set_memory(id, 0, 0, 0, 0), libc::EINVAL, what)?;
    }

    // Without EPT there is no page of this kind, and nothing is in the way of anything.
    vm.fd
        .ioctl_ref(sys::KVM_SET_IDENTITY_MAP_ADDR, &(IDENTITY + 0x1000))?;
    let mut lost = 0;
    if let Err(e) = vm.create_vcpu(0) {
        ensure!(e.errno == libc::EEXIST, "a vCPU whose page is a slot: {e}");
        // KVM leaves the page that it has mapped in vain.
        lost = shared_memory()? - with_memory - 0x3000;
        vm.fd.ioctl_ref(sys::KVM_SET_IDENTITY_MAP_ADDR, &IDENTITY)?;
        let vcpu = vm.create_vcpu(0)?;
        ensure!(
            shared_memory()? - with_memory - lost == 0x4000,
            "the page of the identity map is not the process's"
        );
        let r = vm.set_memory(2, 0, IDENTITY, 0x1000, hva);
        expect_errno(r, libc::EEXIST, "a slot at the identity map")?;
        drop(vcpu);
    }
    drop((vm, mem));
    ensure!(
        shared_memory()? == before + lost,
        "pages of the VM stay in the process"
    );
    Ok(())
}

/// A VM belongs to the address space that made it: another gets EIO.
fn other_mm(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Protected, read_twice())?;
    // SAFETY: The child only calls ioctls and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let mut bad = 0;
        let calls = [
            m.vm.fd.ioctl(sys::KVM_CHECK_EXTENSION, 1),
            m.vm.fd.ioctl(sys::KVM_CREATE_VCPU, 3),
            m.vm.fd.ioctl(sys::KVM_SET_TSS_ADDR, 0xfffb_d000),
            m.vm.fd.ioctl(unknown_call(), 0),
            m.vcpu.fd.ioctl(sys::KVM_RUN, 0),
            m.vcpu.fd.ioctl(sys::KVM_GET_REGS, 8),
            m.vcpu.fd.ioctl(sys::KVM_NMI, 0),
            m.vcpu.fd.ioctl(unknown_call(), 0),
        ];
        for (i, r) in calls.iter().enumerate() {
            if !matches!(r, Err(e) if e.errno == libc::EIO) {
                println!("call {i} from another address space: {r:?}");
                bad = 1;
            }
        }
        // The device itself can be used by anyone who has it.
        if m.kvm.fd.ioctl(sys::KVM_GET_API_VERSION, 0) != Ok(12) {
            println!("the device does not answer in the child");
            bad = 1;
        }
        use std::io::Write;
        let _ = std::io::stdout().flush();
        // SAFETY: Ends the child.
        unsafe { libc::_exit(bad) };
    }
    let mut status = 0;
    // SAFETY: `status` lives through the call.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    ensure_eq!(status, 0, "wait status of the child");
    m.expect(&Exit::MmioRead {
        addr: 16 * MIB,
        len: 4,
    })?;
    Ok(())
}

fn unknown_call() -> sys::Ioctl {
    sys::unnamed(false, false, 0xff, 0)
}

/// KVM_RUN says EFAULT when a slot's host memory is not there, and goes on once it is.
fn slot_without_memory(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Protected, read_twice())?;
    let mem = Mapping::new(PAGE, false)?;
    mem.write(0, 0x600d_600du32);
    mem.protect(0, PAGE, libc::PROT_NONE)?;
    m.vm.set_memory(1, 0, 16 * MIB, 0x1000, mem.addr() as u64)?;
    expect_errno(
        m.vcpu.run(),
        libc::EFAULT,
        "KVM_RUN on a slot over PROT_NONE",
    )?;
    expect_errno(m.vcpu.run(), libc::EFAULT, "the same once more")?;
    mem.protect(0, PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rax, 0x600d_600d, "what the guest read");
    Ok(())
}

/// Memory that the host may only read serves the guest's reads; its writes are EFAULT.
fn slot_over_readonly_memory(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov eax, [0x1000000]",
        "hlt",
        "mov dword ptr [0x1000000], 1",
        "hlt",
    );
    let m = Machine::new(env, Mode::Protected, code())?;
    let mem = Mapping::new(PAGE, false)?;
    mem.write(0, 0x7777_7777u32);
    mem.protect(0, PAGE, libc::PROT_READ)?;
    m.vm.set_memory(1, 0, 16 * MIB, 0x1000, mem.addr() as u64)?;
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rax, 0x7777_7777, "what the guest read");
    expect_errno(
        m.vcpu.run(),
        libc::EFAULT,
        "a write to memory that is read-only",
    )?;
    ensure_eq!(mem.read::<u32>(0), 0x7777_7777, "the memory");
    mem.protect(0, PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
    m.expect_hlt()?;
    ensure_eq!(mem.read::<u32>(0), 1, "the memory after it became writable");
    Ok(())
}

/// A slot may begin and end anywhere within a large page, and lie differently in the host.
fn slot_misaligned_large(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code32",
        "mov edx, 0x1003000",
        "mov ecx, 1024",
        "xor eax, eax",
        "2: add eax, [edx]",
        "mov [edx + 4], ecx",
        "add edx, 4096",
        "dec ecx",
        "jnz 2b",
        "hlt",
    );
    let m = Machine::new(env, Mode::Protected, code())?;
    let mem = Mapping::new(8 << 20, false)?;
    let _ = mem.advise(0, 8 << 20, libc::MADV_HUGEPAGE);
    let start = 5 * PAGE;
    let mut sum = 0u32;
    for i in 0..1024u32 {
        mem.write(start + i as usize * PAGE, i * 3 + 1);
        sum = sum.wrapping_add(i * 3 + 1);
    }
    m.vm.set_memory(1, 0, 0x100_3000, 1024 * 4096, (mem.addr() + start) as u64)?;
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rax, u64::from(sum), "sum over the pages");
    for i in 0..1024u32 {
        let got = mem.read::<u32>(start + i as usize * PAGE + 4);
        ensure_eq!(got, 1024 - i, "what the guest stored in page {i}");
    }
    for i in [0, start - PAGE, start + 1024 * PAGE] {
        if mem.read::<u32>(i + 4) != 0 {
            fail!("the guest wrote outside of its slot, at {i:#x}");
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "vm",
        tests![
            slot_alignment,
            slot_flags,
            slot_dirty_log,
            slot_readonly,
            slot_addresses,
            slot_huge,
            slot_numbers,
            slot_overlap,
            slot_changes,
            slot_delete_and_move,
            many_slots,
            slot_alias,
            slot_without_memory,
            slot_over_readonly_memory,
            slot_misaligned_large,
            create_vcpu,
            vcpu_id_limits,
            many_vcpus,
            vcpu_stays,
            vcpu_mapping,
            vcpu_mapping_end,
            special_pages,
            special_slots,
            other_mm,
        ],
    )
}
