// SPDX-License-Identifier: GPL-2.0

//! Slots by `KVM_SET_USER_MEMORY_REGION2`, very many slots, and what the kernel says to combinations
//! that make no sense: the same as the in-tree KVM.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::guest::{at, usize_of};
use selftests::host::Rng;
use selftests::machine::{Exit, Machine, Mode};
use selftests::mem::{Mapping, PAGE};
use selftests::sys::{self, errno_name, Error};
use selftests::vm::{Kvm, Vm};
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome};
use std::process::ExitCode;

const GPA: u64 = 0x100_0000;
const P: u64 = PAGE as u64;
/// `KVM_MEM_GUEST_MEMFD`.
const GUEST_MEMFD: u32 = 4;
const LOG: u32 = kb::KVM_MEM_LOG_DIRTY_PAGES;
const READONLY: u32 = kb::KVM_MEM_READONLY;

fn region(
    slot: u32,
    flags: u32,
    gpa: u64,
    size: u64,
    hva: u64,
) -> kb::kvm_userspace_memory_region2 {
    kb::kvm_userspace_memory_region2 {
        slot,
        flags,
        guest_phys_addr: gpa,
        memory_size: size,
        userspace_addr: hva,
        ..Default::default()
    }
}

fn set(vm: &Vm, r: &kb::kvm_userspace_memory_region2) -> Result<(), Error> {
    vm.fd.ioctl_ref(sys::KVM_SET_USER_MEMORY_REGION2, r)?;
    Ok(())
}

fn need_regions2(kvm: &Kvm) -> Outcome {
    if kvm.capability(kb::KVM_CAP_USER_MEMORY2) <= 0 {
        skip!("no KVM_CAP_USER_MEMORY2");
    }
    Ok(())
}

/// What is behind the old structure matters to no one who does not ask for a guest_memfd; but it has
/// to be there.
fn layout(env: &Env) -> Outcome {
    guest_code!(code, ".code32", "mov eax, [{G}]", "mov [{G} + 4], eax", "hlt"; G = GPA);
    let m = Machine::new(env, Mode::Protected, code())?;
    need_regions2(&m.kvm)?;
    let mem = Mapping::new(16 * PAGE, false)?;
    mem.write(0, 0x1234_5678u32);
    let mut r = region(1, 0, GPA, 16 * P, mem.addr() as u64);
    r.guest_memfd = 0x7fff_ffff;
    r.guest_memfd_offset = 0x123;
    r.pad1 = u32::MAX;
    r.pad2 = [u64::MAX; 14];
    set(&m.vm, &r)?;
    m.expect_hlt()?;
    ensure_eq!(mem.read::<u32>(4), 0x1234_5678, "what the guest copied");
    // The same as by the old call: nothing changes, and it can be deleted by either.
    m.vm.set_memory(1, 0, GPA, 16 * P, mem.addr() as u64)?;
    set(&m.vm, &region(1, 0, 0, 0, 0))?;
    expect_errno(
        m.vm.set_memory(1, 0, 0, 0, 0),
        libc::EINVAL,
        "a slot that was deleted",
    )?;
    m.vm.set_memory(1, 0, GPA, 16 * P, mem.addr() as u64)?;
    set(&m.vm, &region(1, 0, 0, 0, 0))?;
    // All 160 bytes are read.
    let page = Mapping::new(2 * PAGE, false)?;
    page.protect(PAGE, PAGE, libc::PROT_NONE)?;
    let size = size_of::<kb::kvm_userspace_memory_region2>();
    ensure_eq!(size, 160, "bytes of the structure");
    for cut in [8, 32, 64, 120, 152, 159] {
        page.write(PAGE - cut, [0u8; 1]);
        let call = sys::KVM_SET_USER_MEMORY_REGION2;
        let r = m.vm.fd.ioctl(call, page.addr() + PAGE - cut);
        expect_errno(
            r,
            libc::EFAULT,
            &format!("a structure of which {cut} bytes are there"),
        )?;
    }
    page.write(PAGE - size, region(1, 0, GPA, P, mem.addr() as u64));
    let call = sys::KVM_SET_USER_MEMORY_REGION2;
    m.vm.fd.ioctl(call, page.addr() + PAGE - size)?;
    // The old structure, of which 32 bytes are enough.
    page.write(
        PAGE - 32,
        kb::kvm_userspace_memory_region {
            slot: 1,
            ..Default::default()
        },
    );
    let call = sys::KVM_SET_USER_MEMORY_REGION;
    m.vm.fd.ioctl(call, page.addr() + PAGE - 32)?;
    Ok(())
}

/// Flags: a guest_memfd is refused where there is none, and to the old call always.
fn flags(env: &Env) -> Outcome {
    let kvm = env.open()?;
    need_regions2(&kvm)?;
    let vm = kvm.create_vm()?;
    let mem = Mapping::new(16 * PAGE, false)?;
    let hva = mem.addr() as u64;
    let mut bad: Vec<u32> = (3..32).map(|b| 1 << b).collect();
    bad.extend([
        GUEST_MEMFD | LOG,
        GUEST_MEMFD | READONLY,
        GUEST_MEMFD | 8,
        u32::MAX,
    ]);
    for f in bad {
        let r = set(&vm, &region(1, f, GPA, 16 * P, hva));
        expect_errno(r, libc::EINVAL, &format!("flags {f:#x}"))?;
    }
    let r = vm.set_memory(1, GUEST_MEMFD, GPA, 16 * P, hva);
    expect_errno(r, libc::EINVAL, "a guest_memfd by the old call")?;
    let r = set(&vm, &region(1, GUEST_MEMFD, GPA, 16 * P, hva));
    ensure!(r.is_err(), "a guest_memfd that is no such file");
    if kvm.capability(kb::KVM_CAP_GUEST_MEMFD) <= 0 {
        expect_errno(r, libc::EINVAL, "a guest_memfd without its capability")?;
    }
    // What a live slot may become.
    let mut there = 0;
    for (f, ok) in [
        (0, true),
        (LOG, true),
        (LOG, true),
        (0, true),
        (READONLY, false),
        (LOG | READONLY, false),
    ] {
        let r = set(&vm, &region(2, f, 2 * GPA, 16 * P, hva));
        if r.is_err() && f & LOG != 0 && ok {
            skip!("no dirty logging");
        }
        if ok {
            r?;
        } else {
            expect_errno(r, libc::EINVAL, &format!("from flags {there:#x} to {f:#x}"))?;
            continue;
        }
        there = f;
    }
    set(&vm, &region(3, READONLY, 3 * GPA, 16 * P, hva))?;
    for f in [0, LOG] {
        let r = set(&vm, &region(3, f, 3 * GPA, 16 * P, hva));
        expect_errno(r, libc::EINVAL, &format!("from read-only to {f:#x}"))?;
    }
    set(&vm, &region(3, READONLY | LOG, 3 * GPA, 16 * P, hva))?;
    set(&vm, &region(3, READONLY, 3 * GPA, 16 * P, hva))?;
    Ok(())
}

/// Physical addresses end where the processor's do.
fn last_address(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let vm = kvm.create_vm()?;
    let mem = Mapping::new(16 * PAGE, false)?;
    let hva = mem.addr() as u64;
    // SAFETY: The leaf is there on all processors with long mode.
    let bits = unsafe { core::arch::x86_64::__cpuid(0x8000_0008) }.eax & 0xff;
    let end = 1u64 << bits;
    println!("{bits} bits");
    vm.set_memory(1, 0, end - P, P, hva)?;
    vm.set_memory(2, 0, end - 16 * P, 15 * P, hva)?;
    for (gpa, pages) in [(end, 1), (end - P, 2), (end - 16 * P, 17), (end * 2, 1)] {
        let r = vm.set_memory(3, 0, gpa, pages * P, hva);
        ensure!(r.is_err(), "{pages} pages at {gpa:#x}");
    }
    let r = vm.set_memory(3, 0, end, P, hva);
    expect_errno(r, libc::EINVAL, "a page behind the last")
}

/// One call of a random sequence.
struct Call {
    two: bool,
    region: kb::kvm_userspace_memory_region2,
}

/// Calls that make sense, and calls that nearly do.
fn random_call(rng: &mut Rng, hva: u64, slots: u32) -> Call {
    let pages = |rng: &mut Rng| rng.below(24);
    let slot = match rng.below(12) {
        0 => slots - 1,
        1 => 0xffff,
        2 => ((rng.number() as u32) << 16) | 1,
        3 => slots + 5000,
        _ => rng.below(6) as u32,
    };
    let flags = match rng.below(8) {
        0 => LOG,
        1 => READONLY,
        2 => LOG | READONLY,
        3 => 1 << rng.below(32),
        _ => 0,
    };
    let gpa = match rng.below(12) {
        0 => rng.number(),
        1 => u64::MAX - 0xfff,
        2 => 0u64.wrapping_sub(pages(rng) * P),
        3 => 1 << rng.below(64),
        4 => GPA + rng.below(P),
        _ => GPA + pages(rng) * P,
    };
    let size = match rng.below(12) {
        0 => rng.number(),
        1 => 1 << rng.below(64),
        2 => 0,
        3 => rng.below(2 * P),
        4 => (1 << 31) * P,
        5 => 0,
        _ => (1 + rng.below(8)) * P,
    };
    let hva = match rng.below(10) {
        0 => rng.number(),
        1 => (1 << 63) | (rng.below(1 << 40) << 12),
        2 => hva + rng.below(P),
        3 => (1 << 47) - 4096 * (1 + rng.below(4)),
        _ => hva + rng.below(4) * P,
    };
    Call {
        two: rng.below(2) == 0,
        region: region(slot, flags & !GUEST_MEMFD, gpa, size, hva),
    }
}

/// The errno of a call, 0 if it succeeded.
fn answer(vm: &Vm, call: &Call, two: bool) -> i32 {
    let r = &call.region;
    let result = if two {
        set(vm, r)
    } else {
        let (gpa, size) = (r.guest_phys_addr, r.memory_size);
        vm.set_memory(r.slot, r.flags, gpa, size, r.userspace_addr)
    };
    result.err().map_or(0, |e| e.errno)
}

/// Two VMs answer a random sequence alike: of the device under test, by the old and the new call; and
/// of the in-tree KVM, where that is there.
fn random_sequence(env: &Env) -> Outcome {
    let kvm = env.open()?;
    need_regions2(&kvm)?;
    selftests::dirty::need_logging(env)?;
    let mem = Mapping::new(64 * PAGE, false)?;
    let slots = u32::try_from(kvm.capability(kb::KVM_CAP_NR_MEMSLOTS)).unwrap_or(0);
    let mut others = vec![("the other call", kvm.create_vm()?)];
    if let Ok(in_tree) = Kvm::open("/dev/kvm") {
        if in_tree.capability(kb::KVM_CAP_NR_MEMSLOTS).unsigned_abs() == slots {
            others.push(("/dev/kvm", in_tree.create_vm()?));
        }
    }
    let vm = kvm.create_vm()?;
    let mut rng = Rng::new(env.seed ^ 0x2e61);
    let mut answers = std::collections::BTreeMap::new();
    for n in 0..env.fewer(3000) {
        let call = random_call(&mut rng, mem.addr() as u64, slots);
        let got = answer(&vm, &call, call.two);
        *answers.entry(errno_name(got)).or_insert(0) += 1;
        for (name, other) in &others {
            let want = answer(other, &call, call.two != (*name == "the other call"));
            ensure!(
                got == want,
                "call {n}, {:x?}: {}, but {} by {name}",
                call.region,
                errno_name(got),
                errno_name(want)
            );
        }
    }
    println!("beside {}: {answers:?}", others.len());
    Ok(())
}

// Adds up the first word of ECX pages from EDI, and adds one to the second. ESI: bytes from one to
// the next.
guest_code!(
    sum,
    ".code64",
    "2: xor eax, eax",
    "3: add eax, [rdi]",
    "inc dword ptr [rdi + 4]",
    "add rdi, rsi",
    "dec ecx",
    "jnz 3b",
    "hlt",
    "jmp 2b",
);

/// Slots of a page each, in an order that is not that of their addresses; the guest visits all, before
/// and after a third of them has gone.
fn visit(env: &Env, n: u64, first: u32) -> Outcome {
    let m = Machine::new(env, Mode::Long, sum())?;
    // All show the same 64 pages.
    let mem = Mapping::new(64 * PAGE, false)?;
    (0..64).for_each(|p| mem.write(p * PAGE, 1 + p as u32));
    // Coprime to any power of two, and to n.
    let step = (n / 3..)
        .find(|s| (2..=*s).all(|d| s % d != 0 || n % d != 0))
        .unwrap_or(1);
    let place = |i: u64| i * step % n;
    let gpa = |j: u64| GPA + j * 2 * P;
    for i in 0..n {
        let j = place(i);
        let hva = (mem.addr() + usize_of(j % 64) * PAGE) as u64;
        m.vm.set_memory(first + i as u32, 0, gpa(j), P, hva)?;
    }
    let expect = (0..n)
        .map(|j| 1 + j as u32 % 64)
        .fold(0u32, u32::wrapping_add);
    m.patch_regs(|r| (r.rdi, r.rsi, r.rcx) = (GPA, 2 * P, n))?;
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rax, expect.into(), "sum over {n} slots");
    let counts: u32 = (0..64).map(|p| mem.read::<u32>(p * PAGE + 4)).sum();
    ensure_eq!(counts, n as u32, "pages that the guest counted");
    // What is between two of them is a device, and so is the place of one that went.
    for i in (0..n).step_by(3) {
        m.vm.set_memory(first + i as u32, 0, 0, 0, 0)?;
    }
    for i in [0, 1, 2, 3, n / 2, n - 1].into_iter().filter(|i| *i < n) {
        m.patch_regs(|r| (r.rip, r.rdi, r.rsi, r.rcx) = (at::CODE, gpa(place(i)), 0, 1))?;
        if i % 3 == 0 {
            m.expect(&Exit::MmioRead {
                addr: gpa(place(i)),
                len: 4,
            })?;
        } else {
            m.expect_hlt()?;
            let want = 1 + place(i) % 64;
            ensure_eq!(m.vcpu.regs()?.rax, want, "slot {i} after others went");
            continue;
        }
        // Its number is free for a slot elsewhere.
        let hva = mem.addr() as u64;
        m.vm.set_memory(first + i as u32, 0, gpa(place(i)), P, hva)?;
        m.mmio_reply(&[0; 4]);
        m.expect_hlt()?;
    }
    Ok(())
}

fn many(env: &Env) -> Outcome {
    // Where all is slow, fewer still: each is made among all that are there.
    visit(env, env.fewer(env.fewer(2000)), 1)
}

/// Still more, up to the last number that a slot can have.
fn up_to_the_last(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let slots = u32::try_from(kvm.capability(kb::KVM_CAP_NR_MEMSLOTS)).unwrap_or(0);
    ensure!(slots >= 509, "{slots} slots");
    // Slot 0 is the machine's.
    let n = env.fewer(env.fewer(5000)).min(u64::from(slots) - 1);
    visit(env, n, slots - n as u32)
}

/// Accesses across the border of two slots, whose memory is not adjacent in the host.
fn adjacent(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov rax, [rdi - 3]",
        "mov rbx, 0x1122334455667788",
        "mov [rdi + 4096 - 5], rbx",
        "lea rsi, [rdi - 100]",
        "lea rdi, [rdi + 2 * 4096 - 50]",
        "mov ecx, 200",
        "rep movsb",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let mem = Mapping::new(16 * PAGE, false)?;
    // Four pages, each a slot, backwards in the host, and the last one is the first but one.
    let host = |i: usize| (12 - 3 * i) * PAGE;
    for i in 0..4 {
        for b in 0..PAGE {
            mem.write(host(i) + b, (i * 7 + b) as u8);
        }
        let hva = (mem.addr() + host(i)) as u64;
        m.vm.set_memory(10 - i as u32, 0, GPA + i as u64 * P, P, hva)?;
    }
    let byte = |gpa: usize| mem.read::<u8>(host(gpa / PAGE) + gpa % PAGE);
    let bytes = |gpa: usize, n: usize| -> Vec<u8> { (gpa..gpa + n).map(byte).collect() };
    let read = bytes(PAGE - 3, 8);
    let source = bytes(PAGE - 100, 200);
    m.patch_regs(|r| r.rdi = GPA + P)?;
    m.expect_hlt()?;
    let got = m.vcpu.regs()?.rax.to_le_bytes();
    ensure_eq!(got[..], read[..], "a read across two slots");
    let want = 0x1122_3344_5566_7788u64.to_le_bytes();
    ensure_eq!(
        bytes(2 * PAGE - 5, 8)[..],
        want[..],
        "a write across two slots"
    );
    ensure_eq!(bytes(3 * PAGE - 50, 200), source, "a copy across two slots");
    Ok(())
}

/// A number is used again and again, for other memory and elsewhere; the guest sees what is there.
fn number_reused(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, sum())?;
    let mem = Mapping::new(64 * PAGE, false)?;
    (0..64).for_each(|p| mem.write(p * PAGE, 1000 + p as u32));
    let mut rng = Rng::new(env.seed);
    for round in 0..env.fewer(60) {
        let (page, pages) = (rng.below(32), 1 + rng.below(32));
        let gpa = GPA + rng.below(1 << 12) * P;
        let flags = if rng.below(3) == 0 { READONLY } else { 0 };
        let hva = mem.addr() as u64 + page * P;
        m.vm.set_memory(5, flags, gpa, pages * P, hva)?;
        let last = page + pages - 1;
        m.patch_regs(|r| (r.rip, r.rdi, r.rsi, r.rcx) = (at::CODE, gpa + (pages - 1) * P, 0, 1))?;
        match m.run()? {
            Exit::Hlt if flags == 0 => {}
            Exit::MmioWrite { addr, .. } if flags != 0 => {
                ensure_eq!(addr, gpa + (pages - 1) * P + 4, "write to a read-only slot");
                m.expect_hlt()?;
            }
            other => fail!("round {round}: exit {other:x?}"),
        }
        ensure_eq!(
            m.vcpu.regs()?.rax,
            1000 + last,
            "round {round}: what the guest read"
        );
        m.vm.set_memory(5, 0, 0, 0, 0)?;
    }
    Ok(())
}

/// Memory above 4 GiB, and far above: slots do not care.
fn far_apart(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, sum())?;
    let mem = Mapping::new(16 * PAGE, false)?;
    // Tables for 512 GiB by pages of 1 GiB, if there are such.
    let c = m.kvm.supported_cpuid()?;
    let gib_pages = c
        .find(0x8000_0001, 0)
        .is_some_and(|e| (e.edx >> 26) & 1 == 1);
    if !gib_pages {
        skip!("no pages of 1 GiB");
    }
    // SAFETY: The leaf is there on all processors with long mode.
    let bits = unsafe { core::arch::x86_64::__cpuid(0x8000_0008) }.eax & 0xff;
    for i in 1..512u64 {
        m.mem.write(usize_of(at::PDPT + i * 8), (i << 30) | 0x87);
    }
    for (i, gpa) in [1u64 << 32, 5 << 32, (1 << bits.min(39)) - P]
        .into_iter()
        .enumerate()
    {
        mem.write(i * PAGE, 77 + i as u32);
        m.vm.set_memory(5 + i as u32, 0, gpa, P, (mem.addr() + i * PAGE) as u64)?;
        m.patch_regs(|r| (r.rip, r.rdi, r.rsi, r.rcx) = (at::CODE, gpa, 0, 1))?;
        m.expect_hlt()?;
        ensure_eq!(m.vcpu.regs()?.rax, 77 + i as u64, "memory at {gpa:#x}");
        ensure_eq!(mem.read::<u32>(i * PAGE + 4), 1, "write at {gpa:#x}");
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "regions",
        tests![
            layout,
            flags,
            last_address,
            random_sequence,
            many,
            up_to_the_last => 40,
            adjacent,
            number_reused,
            far_apart,
        ],
    )
}
