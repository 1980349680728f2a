// SPDX-License-Identifier: GPL-2.0

//! What CPUID announces works, and what it does not announce is not there: CR4 bits, page sizes, the TSC's
//! extras, the listed MSRs.

use kvm_bindings as kb;
use selftests::guest::{at, pte, sel, usize_of};
use selftests::host::{patient, rdtsc, sleep_ms};
use selftests::machine::{Exit, Machine, Mode};
use selftests::msr::{Access, Filter, MsrGuest};
use selftests::{ensure, ensure_eq, fail, guest_code, skip, sys, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

/// A CR4 bit and where CPUID announces it: leaf (subleaf 0), register (0 EAX to 3 EDX), bit.
struct Feature {
    name: &'static str,
    cr4: u64,
    leaf: u32,
    register: usize,
    bit: u32,
}

const fn feature(name: &'static str, cr4: u32, leaf: u32, register: usize, bit: u32) -> Feature {
    Feature {
        name,
        cr4: 1 << cr4,
        leaf,
        register,
        bit,
    }
}

const FEATURES: [Feature; 9] = [
    feature("UMIP", 11, 7, 2, 2),
    feature("LA57", 12, 7, 2, 16),
    feature("VMXE", 13, 1, 2, 5),
    feature("FSGSBASE", 16, 7, 1, 0),
    feature("PCIDE", 17, 1, 2, 17),
    feature("OSXSAVE", 18, 1, 2, 26),
    feature("SMEP", 20, 7, 1, 7),
    feature("SMAP", 21, 7, 1, 20),
    feature("PKE", 22, 7, 2, 3),
];

fn register(e: &mut kb::kvm_cpuid_entry2, n: usize) -> &mut u32 {
    match n {
        0 => &mut e.eax,
        1 => &mut e.ebx,
        2 => &mut e.ecx,
        _ => &mut e.edx,
    }
}

/// A machine in long mode, whose CPUID `change` has changed.
fn machine(
    env: &Env,
    code: &[u8],
    change: impl FnOnce(&mut selftests::vm::Cpuid),
) -> Result<Machine, Verdict> {
    let m = Machine::bare(env, at::SIZE)?;
    let mut c = m.kvm.supported_cpuid()?;
    change(&mut c);
    m.vcpu.set_cpuid(&c)?;
    m.start(Mode::Long, code)?;
    Ok(m)
}

/// Makes all pages the supervisor's: for SMEP and SMAP.
fn supervisor_pages(m: &Machine) {
    for i in 0..512u64 {
        m.mem.write(
            usize_of(at::PD + i * 8),
            (i << 21) | pte::P | pte::W | pte::PS,
        );
    }
}

fn announced(env: &Env, leaf: u32, reg: usize, bit: u32) -> Result<bool, Verdict> {
    let mut c = env.open()?.supported_cpuid()?;
    let e = c
        .list_mut()
        .iter_mut()
        .find(|e| e.function == leaf && e.index == 0);
    Ok(e.is_some_and(|e| (*register(e, reg) >> bit) & 1 == 1))
}

guest_code!(
    set_cr4,
    ".code64",
    "mov rax, cr4",
    "or rax, rbx",
    "mov cr4, rax",
    "mov rcx, cr4",
    "hlt"
);

/// Each bit of CR4 that CPUID announces can be set, by the guest and by the host; without the
/// announcement it is #GP for the one and EINVAL for the other.
fn cr4_bits(env: &Env) -> Outcome {
    let (mut there, mut wrong) = (String::new(), String::new());
    for f in &FEATURES {
        // LA57 cannot change while long mode is on, and VMXE is not a guest's to set without nesting.
        let changeable = f.name != "LA57" && f.name != "VMXE";
        if changeable && announced(env, f.leaf, f.register, f.bit)? {
            there += f.name;
            there += " ";
            let m = machine(env, set_cr4(), |_| ())?;
            supervisor_pages(&m);
            m.patch_regs(|r| r.rbx = f.cr4)?;
            m.expect_hlt()?;
            ensure!(
                m.vcpu.regs()?.rcx & f.cr4 != 0,
                "CR4.{} reads as clear",
                f.name
            );
            ensure!(
                m.vcpu.sregs()?.cr4 & f.cr4 != 0,
                "CR4.{} is clear for the host",
                f.name
            );
            let m = machine(env, set_cr4(), |_| ())?;
            supervisor_pages(&m);
            m.patch_sregs(|s| s.cr4 |= f.cr4)?;
            m.expect_hlt()?;
            ensure!(
                m.vcpu.regs()?.rcx & f.cr4 != 0,
                "CR4.{}, which the host set",
                f.name
            );
        }
        let m = machine(env, set_cr4(), |c| {
            for e in c
                .list_mut()
                .iter_mut()
                .filter(|e| e.function == f.leaf && e.index == 0)
            {
                *register(e, f.register) &= !(1 << f.bit);
            }
        })?;
        m.patch_regs(|r| r.rbx = f.cr4)?;
        let mut s = m.vcpu.sregs()?;
        s.cr4 |= f.cr4;
        match m.vcpu.set_sregs(&s) {
            Err(e) if e.errno == libc::EINVAL => {}
            r => wrong += &format!("CR4.{} unannounced, by the host: {r:?}\n", f.name),
        }
        m.patch_sregs(|s| s.cr4 &= !f.cr4)?;
        if let Err(e) = m.expect_exception(13) {
            wrong += &format!("CR4.{} unannounced, by the guest: {e:?}\n", f.name);
        }
    }
    ensure!(wrong.is_empty(), "{wrong}");
    println!("announced and settable: {there}");
    Ok(())
}

/// SMEP and SMAP are enforced: the supervisor neither executes nor reads a user's page.
fn supervisor_protection(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov ebx, 0x400000",
        "mov al, [rbx]", // offset 5
        "jmp rbx",       // offset 7
    );
    for (name, bit, cpuid_bit) in [("SMEP", 20, 7), ("SMAP", 21, 20)] {
        if !announced(env, 7, 1, cpuid_bit)? {
            println!("no {name}");
            continue;
        }
        let m = machine(env, code(), |_| ())?;
        supervisor_pages(&m);
        m.mem
            .write(usize_of(at::PD) + 2 * 8, 0x30000 | pte::P | pte::W | pte::U);
        m.mem.write(0x30000, 0x40000 | pte::P | pte::W | pte::U);
        m.mem.write(0x40000, 0xf4u8); // hlt
        m.patch_sregs(|s| s.cr4 |= 1 << bit)?;
        let r = m.expect_exception(14)?;
        let want = if name == "SMEP" {
            (0x11, 0x40_0000)
        } else {
            (1, at::CODE + 5)
        };
        ensure_eq!((r.error, r.rip), want, "{name}: error code and RIP");
        ensure_eq!(r.cr2, 0x40_0000, "{name}: CR2");
        // Without the bit, both are allowed.
        let m = machine(env, code(), |_| ())?;
        m.mem
            .write(usize_of(at::PD) + 2 * 8, 0x30000 | pte::P | pte::W | pte::U);
        m.mem.write(0x30000, 0x40000 | pte::P | pte::W | pte::U);
        m.mem.write(0x40000, 0xf4u8);
        m.expect_hlt()?;
    }
    Ok(())
}

/// With UMIP, SGDT at privilege level 3 is #GP.
fn user_mode_instructions(env: &Env) -> Outcome {
    if !announced(env, 7, 2, 2)? {
        skip!("no UMIP");
    }
    guest_code!(code, ".code64", "sgdt [{D}]", "int 0x55"; D = at::DATA);
    for umip in [false, true] {
        let m = machine(env, code(), |_| ())?;
        let gate = usize_of(at::IDT) + 0x550;
        m.mem.write(gate, m.mem.read::<u64>(gate) | (3 << 45));
        m.patch_sregs(|s| {
            s.cs = selftests::guest::segment(sel::USER_CODE64, 11, 0, 1, 3, true);
            s.ss = selftests::guest::segment(sel::USER_DATA, 3, 1, 0, 3, true);
            s.cr4 |= u64::from(umip) << 11;
        })?;
        m.expect_exception(if umip { 13 } else { 0x55 })?;
    }
    Ok(())
}

/// PCIDs: CR3 takes one, and bit 63 of what is loaded asks to keep the TLB and is not kept itself.
fn pcid(env: &Env) -> Outcome {
    if !announced(env, 1, 2, 17)? {
        skip!("no PCID");
    }
    guest_code!(
        code,
        ".code64",
        "mov rax, cr4",
        "or eax, 0x20000",
        "mov cr4, rax",
        "mov rbx, 0x8000000000000005",
        "mov rax, cr3",
        "or rax, rbx",
        "mov cr3, rax",
        "mov rcx, cr3",
        // Another PCID with the same tables, a changed entry, and its invalidation by INVLPG.
        "mov esi, 0x400000",
        "mov r8d, [rsi]",
        "mov edi, 0x30000",
        "mov qword ptr [rdi], 0x41003",
        "invlpg [rsi]",
        "mov r9d, [rsi]",
        "hlt",
    );
    let m = machine(env, code(), |_| ())?;
    m.mem
        .write(usize_of(at::PD) + 2 * 8, 0x30000 | pte::P | pte::W);
    m.mem.write(0x30000, 0x40003u64);
    m.mem.write(0x40000, 0x111u32);
    m.mem.write(0x41000, 0x222u32);
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    ensure_eq!(r.rcx, at::PML4 | 5, "CR3");
    ensure_eq!(
        (r.r8, r.r9),
        (0x111, 0x222),
        "loads before and after INVLPG"
    );
    ensure_eq!(m.vcpu.sregs()?.cr3, at::PML4 | 5, "CR3 for the host");
    Ok(())
}

/// 1 GiB pages.
fn gigabyte_pages(env: &Env) -> Outcome {
    if !announced(env, 0x8000_0001, 3, 26)? {
        skip!("no 1 GiB pages");
    }
    guest_code!(
        code,
        ".code64",
        "mov rbx, 0x40000000",
        "mov rax, [rbx + 0x40000]",
        "mov qword ptr [rbx + 0x40008], 7",
        "hlt",
    );
    let m = machine(env, code(), |_| ())?;
    m.mem
        .write(usize_of(at::PDPT) + 8, pte::P | pte::W | pte::PS);
    m.mem.write(0x40000, 0x1234_5678_9abc_def0u64);
    m.expect_hlt()?;
    ensure_eq!(
        m.vcpu.regs()?.rax,
        0x1234_5678_9abc_def0,
        "load through the page"
    );
    ensure_eq!(m.mem.read::<u64>(0x40008), 7, "store through the page");
    let entry: u64 = m.mem.read(usize_of(at::PDPT) + 8);
    ensure_eq!(entry & 0x60, 0x60, "accessed and dirty");
    Ok(())
}

/// Memory and devices above 4 GiB, up to the last page that CPUID's width of addresses allows.
fn high_addresses(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov ebx, 0x400000",
        "mov rax, [rbx]",
        "mov qword ptr [rbx + 8], 0x55",
        "mov ebx, 0x401000",
        "mov ecx, [rbx + 0x10]",
        "mov [rbx + 0x20], eax",
        "hlt",
    );
    let c = env.open()?.supported_cpuid()?;
    let width = c.find(0x8000_0008, 0).map_or(36, |e| e.eax & 0xff);
    for gpa in [1u64 << 32, 0x12_3456_7000, (1 << width) - 0x2000] {
        if gpa >> width != 0 {
            continue;
        }
        let m = machine(env, code(), |_| ())?;
        let page = selftests::mem::Mapping::new(4096, false)?;
        page.write(0, 0x1122_3344_5566_7788u64);
        m.vm.set_memory(1, 0, gpa, 0x1000, page.addr() as u64)?;
        m.mem
            .write(usize_of(at::PD) + 2 * 8, 0x30000 | pte::P | pte::W);
        m.mem.write(0x30000, gpa | pte::P | pte::W);
        m.mem.write(0x30008, (gpa + 0x1000) | pte::P | pte::W);
        m.expect(&Exit::MmioRead {
            addr: gpa + 0x1010,
            len: 4,
        })?;
        m.mmio_reply(&[1, 2, 3, 4]);
        m.expect(&Exit::MmioWrite {
            addr: gpa + 0x1020,
            data: vec![0x88, 0x77, 0x66, 0x55],
        })?;
        m.expect_hlt()?;
        let r = m.vcpu.regs()?;
        ensure_eq!(
            (r.rax, r.rcx),
            (0x1122_3344_5566_7788, 0x0403_0201),
            "loads at {gpa:#x}"
        );
        ensure_eq!(page.read::<u64>(8), 0x55, "store at {gpa:#x}");
    }
    Ok(())
}

guest_code!(
    do_rdmsr,
    ".code64",
    "rdmsr",
    "shl rdx, 32",
    "or rax, rdx",
    "hlt"
);

/// What a listed MSR gives to the guest is what it gives to the host, unless it is #GP there.
fn listed_msrs(env: &Env) -> Outcome {
    let kvm = env.open()?;
    let mut list = vec![0u32; 1025];
    list[0] = 1024;
    kvm.fd
        .ioctl(sys::KVM_GET_MSR_INDEX_LIST, list.as_mut_ptr() as usize)?;
    let n = list[0] as usize;
    let (mut same, mut refused) = (0, 0);
    for index in &list[1..=n] {
        // Counters.
        if matches!(index, 0x10 | 0xe7 | 0xe8 | 0x309..=0x30b | 0xc1..=0xc8 | 0x4b56_4d00..=0x4b56_4dff
            | 0x4000_0000..=0x4000_ffff)
        {
            continue;
        }
        let m = machine(env, do_rdmsr(), |_| ())?;
        let Some(host) = m.vcpu.msr(*index)? else {
            fail!("MSR {index:#x} is listed and refused")
        };
        m.patch_regs(|r| r.rcx = u64::from(*index))?;
        match m.run()? {
            Exit::Hlt => {
                ensure_eq!(m.vcpu.regs()?.rax, host, "MSR {index:#x} in the guest");
                same += 1;
            }
            Exit::Out { .. } if m.record().vector == 13 => refused += 1,
            other => fail!("MSR {index:#x}: exit {other:x?}\n{}", m.describe()),
        }
    }
    println!("{same} MSRs are the same in the guest, {refused} are #GP there");
    ensure!(same >= 8, "hardly any MSR can be read");
    Ok(())
}

/// KVM_SET_TSC_KHZ: a TSC of half the frequency advances half as fast, in the guest too.
fn tsc_scaling(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "2: rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "hlt",
        "jmp 2b"
    );
    let m = Machine::bare(env, at::SIZE)?;
    if m.kvm.capability(kb::KVM_CAP_TSC_CONTROL) <= 0 {
        skip!("no KVM_CAP_TSC_CONTROL");
    }
    let khz = usize::try_from(m.vcpu.fd.ioctl(sys::KVM_GET_TSC_KHZ, 0)?).unwrap_or(0);
    m.vcpu.fd.ioctl(sys::KVM_SET_TSC_KHZ, khz / 2)?;
    m.vcpu.set_cpuid(&*m.kvm.supported_cpuid()?)?;
    m.start(Mode::Long, code())?;
    m.expect_hlt()?;
    let h0 = rdtsc();
    m.expect_hlt()?;
    let g0 = m.vcpu.regs()?.rax;
    sleep_ms(patient(20));
    let h1 = rdtsc();
    m.expect_hlt()?;
    let g1 = m.vcpu.regs()?.rax;
    let ratio = (g1 - g0) as f64 / (h1 - h0) as f64;
    println!("the guest's TSC advanced {ratio:.3} as far as the host's");
    ensure!((0.45..0.55).contains(&ratio), "ratio {ratio}");
    Ok(())
}

/// IA32_TSC_ADJUST and IA32_TSC: a write to one shows in the other (SDM volume 3, 18.17.3).
fn tsc_adjust(env: &Env) -> Outcome {
    if !announced(env, 7, 1, 1)? {
        skip!("no IA32_TSC_ADJUST");
    }
    guest_code!(
        code,
        ".code64",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "mov r8, rax",
        "mov ecx, 0x3b",
        "rdmsr",
        "mov r10d, eax",
        "add edx, 1", // 2^32 ticks
        "wrmsr",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "mov r9, rax",
        "rdmsr",
        "mov r11d, eax",
        "mov r12d, edx",
        "hlt",
    );
    let m = machine(env, code(), |_| ())?;
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    let gone = r.r9 - r.r8;
    ensure!(
        gone > 1 << 32 && gone < (1 << 32) + (1 << 31),
        "the TSC advanced by {gone:#x} when 2^32 was added to IA32_TSC_ADJUST"
    );
    ensure_eq!(r.r11, r.r10, "low half of IA32_TSC_ADJUST");
    let host = m.vcpu.msr(0x3b)?;
    ensure_eq!(
        host,
        Some((r.r12 << 32) | r.r11),
        "IA32_TSC_ADJUST for the host"
    );
    Ok(())
}

/// RDTSCP and RDPID give TSC_AUX.
fn tsc_aux(env: &Env) -> Outcome {
    if !announced(env, 0x8000_0001, 3, 27)? {
        skip!("no RDTSCP");
    }
    guest_code!(
        code,
        ".code64",
        "mov ecx, 0xc0000103",
        "mov eax, 0x1234",
        "xor edx, edx",
        "wrmsr",
        "xor ecx, ecx",
        "rdtscp",
        "hlt",
        "rdtscp",
        "hlt",
    );
    let m = machine(env, code(), |_| ())?;
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rcx, 0x1234, "ECX after RDTSCP");
    ensure_eq!(
        m.vcpu.msr(0xc000_0103)?,
        Some(0x1234),
        "TSC_AUX for the host"
    );
    ensure!(
        m.vcpu.set_msr(0xc000_0103, 0x5678)?,
        "TSC_AUX set by the host"
    );
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rcx, 0x5678, "ECX after the host set TSC_AUX");
    Ok(())
}

/// The vector units that CPUID and XCR0 announce can be used.
fn vector_units(env: &Env) -> Outcome {
    guest_code!(avx512, ".code64",
        "vpternlogd zmm31, zmm31, zmm31, 255",
        "kxnorw k5, k5, k5",
        "vmovdqu64 [{D}], zmm31",
        "kmovw ebx, k5",
        "hlt";
        D = at::DATA,
    );
    if !announced(env, 7, 1, 16)? {
        skip!("no AVX-512");
    }
    let m = machine(env, avx512(), |_| ())?;
    m.patch_sregs(|s| s.cr4 |= selftests::machine::cr::OSXSAVE)?;
    let mut x = m.vcpu.xcrs()?;
    x.xcrs[0].value = 0xe7;
    m.vcpu.set_xcrs(&x)?;
    m.expect_hlt()?;
    ensure_eq!(
        m.mem.read::<[u64; 8]>(usize_of(at::DATA)),
        [u64::MAX; 8],
        "ZMM31"
    );
    ensure_eq!(m.vcpu.regs()?.rbx, 0xffff, "K5");
    Ok(())
}

/// Protection keys: what PKRU denies is #PF, PKRU is the guest's own, and goes where its other state goes.
fn protection_keys(env: &Env) -> Outcome {
    if !announced(env, 7, 2, 3)? {
        skip!("no PKU");
    }
    guest_code!(
        code,
        ".code64",
        "mov rax, cr4",
        "or eax, 0x440000", // OSXSAVE, PKE
        "mov cr4, rax",
        "xor ecx, ecx",
        "xor edx, edx",
        "mov eax, 0x8",           // no writes to key 1
        ".byte 0x0f, 0x01, 0xef", // WRPKRU
        "mov ebx, 0x200000",
        "mov rax, [rbx]",
        "hlt",
        ".byte 0x0f, 0x01, 0xee", // RDPKRU
        "hlt",
        "mov [rbx], rax",
        "hlt",
    );
    // This thread has one, too.
    let pkru = || -> u32 {
        let value;
        // SAFETY: The host has protection keys if a guest of its has; RDPKRU only reads.
        unsafe {
            std::arch::asm!(".byte 0x0f, 0x01, 0xee", in("ecx") 0, out("eax") value, out("edx") _);
        }
        value
    };
    let before = pkru();
    // Through the page's directory, whose entries have the key in bits 62:59.
    let m = machine(env, code(), |_| ())?;
    let memory = selftests::mem::Mapping::new(1 << 21, false)?;
    m.vm.set_memory(1, 0, 0x20_0000, 1 << 21, memory.addr() as u64)?;
    m.mem.write(
        usize_of(at::PD + 8),
        0x20_0000 | pte::P | pte::W | pte::U | pte::PS | 1 << 59,
    );
    m.expect_hlt()?;
    ensure_eq!(pkru(), before, "PKRU of the host");
    let xsave = m.vcpu.xsave()?;
    let offset = m
        .kvm
        .supported_cpuid()?
        .find(0xd, 9)
        .map_or(0, |e| e.ebx as usize / 4);
    ensure_eq!(xsave.region[offset], 8, "PKRU in KVM_GET_XSAVE");
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rax, 8, "PKRU as the guest reads it");
    // Another value by the host, and back to what denies the write.
    let mut changed = m.vcpu.xsave()?;
    changed.region[offset] = 0x4;
    changed.region[512 / 4] |= 1 << 9;
    m.vcpu.set_xsave(&changed)?;
    m.patch_regs(|r| r.rip -= 4)?;
    m.expect_hlt()?;
    ensure_eq!(m.vcpu.regs()?.rax, 4, "PKRU as the host has set it");
    m.vcpu.set_xsave(&xsave)?;
    let record = m.expect_exception(14)?;
    // By a key, for a write to a page that is there; user pages only have keys, and the supervisor obeys them.
    ensure_eq!(record.error, 0x23, "error code");
    ensure_eq!(record.cr2, 0x20_0000, "CR2");
    ensure_eq!(pkru(), before, "PKRU of the host");
    Ok(())
}

/// IA32_SPEC_CTRL is the guest's own, and commands that have no value are taken.
fn speculation(env: &Env) -> Outcome {
    const SPEC_CTRL: u32 = 0x48;
    const PRED_CMD: u32 = 0x49;
    const FLUSH_CMD: u32 = 0x10b;
    let ibrs = announced(env, 7, 3, 26)?;
    let ssbd = announced(env, 7, 3, 31)?;
    if !ibrs {
        skip!("no IBRS");
    }
    let done = |value| Access::Done(value);
    let g = MsrGuest::new(env)?;
    ensure_eq!(g.read(SPEC_CTRL)?, done(0), "to begin with");
    ensure_eq!(
        g.write(SPEC_CTRL, 1 << 40)?,
        Access::Refused,
        "a reserved bit"
    );
    for value in [0, 1, 3, 0, 2] {
        ensure_eq!(g.write(SPEC_CTRL, value)?, done(value), "WRMSR");
        ensure_eq!(g.read(SPEC_CTRL)?, done(value), "RDMSR");
        ensure_eq!(g.m.vcpu.msr(SPEC_CTRL)?, Some(value), "for the VMM");
    }
    // Two guests of one thread, and a VMM that changes it between runs.
    let other = MsrGuest::new(env)?;
    ensure!(g.m.vcpu.set_msr(SPEC_CTRL, 1)?, "set by the VMM");
    let second = if ssbd { 4 } else { 2 };
    ensure_eq!(other.write(SPEC_CTRL, second)?, done(second), "another");
    ensure_eq!(g.read(SPEC_CTRL)?, done(1), "the first guest's");
    ensure_eq!(other.read(SPEC_CTRL)?, done(second), "the other's");
    ensure!(!g.m.vcpu.set_msr(SPEC_CTRL, 1 << 40)?, "a reserved bit");
    ensure_eq!(
        g.write(SPEC_CTRL, 1 << 40)?,
        Access::Refused,
        "a reserved bit"
    );
    // Denied, it is out of the guest's reach, and stays what it is.
    let f = Filter::allow().without(kb::KVM_MSR_FILTER_WRITE, SPEC_CTRL);
    f.set(&g.m.vm)?;
    ensure_eq!(g.write(SPEC_CTRL, 0)?, Access::Refused, "WRMSR, denied");
    ensure_eq!(g.read(SPEC_CTRL)?, done(1), "RDMSR");

    for (msr, there) in [(PRED_CMD, ibrs), (FLUSH_CMD, announced(env, 7, 3, 28)?)] {
        if !there {
            continue;
        }
        ensure_eq!(g.write(msr, 0)?, done(0), "{msr:#x}: no command");
        ensure_eq!(g.write(msr, 1)?, done(1), "{msr:#x}: the command");
        ensure_eq!(
            g.write(msr, 4)?,
            Access::Refused,
            "{msr:#x}: no such command"
        );
        ensure_eq!(g.read(msr)?, Access::Refused, "{msr:#x}: it has no value");
    }
    // A guest that has none of it.
    let bare = MsrGuest::with_cpuid(env, |c| {
        for e in c.list_mut() {
            match e.function {
                7 if e.index == 0 => e.edx = 0,
                0x8000_0008 => e.ebx = 0,
                _ => {}
            }
        }
    })?;
    for msr in [SPEC_CTRL, PRED_CMD, FLUSH_CMD, 0x10a] {
        ensure_eq!(bare.read(msr)?, Access::Refused, "RDMSR {msr:#x}");
        ensure_eq!(bare.write(msr, 1)?, Access::Refused, "WRMSR {msr:#x}");
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "features",
        tests![
            cr4_bits,
            supervisor_protection,
            user_mode_instructions,
            pcid,
            gigabyte_pages,
            high_addresses,
            listed_msrs,
            tsc_scaling,
            tsc_adjust,
            tsc_aux,
            vector_units,
            protection_keys,
            speculation,
        ],
    )
}
