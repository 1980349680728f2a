// SPDX-License-Identifier: GPL-2.0

//! CPUID as the guest executes it: what userspace set, and the bits that follow the guest's own state.

use kvm_bindings as kb;
use selftests::guest::at;
use selftests::machine::{Machine, Mode};
use selftests::{ensure, ensure_eq, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

guest_code!(do_cpuid, ".code64", "2: cpuid", "hlt", "jmp 2b");

/// Executes CPUID in the guest.
fn guest_cpuid(m: &Machine, leaf: u32, subleaf: u32) -> Result<[u32; 4], Verdict> {
    m.patch_regs(|r| {
        r.rax = 0xffff_ffff_0000_0000 | u64::from(leaf);
        r.rbx = u64::MAX;
        r.rcx = u64::from(subleaf);
        r.rdx = u64::MAX;
    })?;
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    let all = [r.rax, r.rbx, r.rcx, r.rdx];
    ensure!(
        all.iter().all(|v| *v >> 32 == 0),
        "CPUID {leaf:#x} left upper halves: {all:x?}"
    );
    Ok(all.map(|v| v as u32))
}

fn entry(c: &selftests::vm::Cpuid, leaf: u32, sub: u32) -> Result<[u32; 4], Verdict> {
    match c.find(leaf, sub) {
        Some(e) => Ok([e.eax, e.ebx, e.ecx, e.edx]),
        None => Err(Verdict::Fail(format!("no entry {leaf:#x}.{sub}"))),
    }
}

/// All that was set is what the guest sees, entry by entry.
fn cpuid_entries(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, do_cpuid())?;
    let c = m.vcpu.cpuid()?;
    for e in c.list() {
        let got = guest_cpuid(&m, e.function, e.index)?;
        let want = [e.eax, e.ebx, e.ecx, e.edx];
        ensure_eq!(got, want, "CPUID {:#x}.{}", e.function, e.index);
    }
    Ok(())
}

/// A VMM's own leaves and changes are obeyed.
fn cpuid_custom(env: &Env) -> Outcome {
    let m = Machine::bare(env, at::SIZE)?;
    let mut c = m.kvm.supported_cpuid()?;
    for e in c.list_mut() {
        if e.function == 0 {
            (e.ebx, e.ecx, e.edx) = (0x7566_6f72, 0x2e2e_2e2e, 0x7465_7374);
        }
    }
    // In-tree KVM announces its own leaves; ours take their place.
    let keep: Vec<_> = c
        .list()
        .iter()
        .filter(|e| e.function >> 8 != 0x40_0000)
        .copied()
        .collect();
    c.nent = 0;
    for e in keep {
        c.push(e);
    }
    for (function, base) in [(0x4000_0000u32, 0x100u32), (0x4000_0001, 0x200)] {
        c.push(kb::kvm_cpuid_entry2 {
            function,
            eax: base,
            ebx: base + 1,
            ecx: base + 2,
            edx: base + 3,
            ..Default::default()
        });
    }
    m.vcpu.set_cpuid(&c)?;
    m.start(Mode::Long, do_cpuid())?;
    let max = entry(&c, 0, 0)?[0];
    ensure_eq!(
        guest_cpuid(&m, 0, 0)?,
        [max, 0x7566_6f72, 0x2e2e_2e2e, 0x7465_7374],
        "leaf 0"
    );
    ensure_eq!(
        guest_cpuid(&m, 0x4000_0000, 0)?,
        [0x100, 0x101, 0x102, 0x103],
        "leaf 0x40000000"
    );
    ensure_eq!(
        guest_cpuid(&m, 0x4000_0001, 7)?,
        [0x200, 0x201, 0x202, 0x203],
        "leaf 0x40000001, which has no subleaves"
    );
    Ok(())
}

/// Leaves beyond the last: an Intel processor answers with its highest basic leaf.
fn cpuid_out_of_range(env: &Env) -> Outcome {
    let m = Machine::new(env, Mode::Long, do_cpuid())?;
    let c = m.vcpu.cpuid()?;
    let max = entry(&c, 0, 0)?[0];
    let name = entry(&c, 0, 0)?;
    if name[1..] != [0x756e_6547, 0x6c65_746e, 0x4965_6e69] {
        skip!("not an Intel processor");
    }
    let highest = c
        .find(max, 0)
        .map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx]);
    for leaf in [max + 1, 0x3fff_ffff] {
        ensure_eq!(
            guest_cpuid(&m, leaf, 0)?,
            highest,
            "CPUID {leaf:#x} beyond leaf {max:#x}"
        );
    }
    Ok(())
}

fn cpuid_without(env: &Env) -> Outcome {
    let m = Machine::bare(env, at::SIZE)?;
    m.start(Mode::Protected, do_cpuid())?;
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    ensure_eq!(
        [r.rax, r.rbx, r.rcx, r.rdx],
        [0; 4],
        "CPUID of a vCPU that has none"
    );
    Ok(())
}

/// CPUID's OSXSAVE bit follows CR4, and the size of the XSAVE area follows XCR0.
fn cpuid_dynamic(env: &Env) -> Outcome {
    guest_code!(
        code,
        ".code64",
        "mov eax, 1",
        "cpuid",
        "mov r8d, ecx",
        "mov rax, cr4",
        "or eax, 0x40000",
        "mov cr4, rax",
        "mov eax, 1",
        "cpuid",
        "mov r9d, ecx",
        "mov eax, 0xd",
        "xor ecx, ecx",
        "cpuid",
        "mov r10d, ebx",
        "xor ecx, ecx",
        "xor edx, edx",
        "mov eax, 7",
        "xsetbv",
        "mov eax, 0xd",
        "xor ecx, ecx",
        "cpuid",
        "mov r11d, ebx",
        "hlt",
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let c = m.vcpu.cpuid()?;
    let Some(avx) = c.find(0xd, 2) else {
        skip!("no AVX")
    };
    let avx_end = avx.ebx + avx.eax;
    m.expect_hlt()?;
    let r = m.vcpu.regs()?;
    ensure_eq!((r.r8 >> 27) & 1, 0, "OSXSAVE before CR4.OSXSAVE");
    ensure_eq!((r.r9 >> 27) & 1, 1, "OSXSAVE after CR4.OSXSAVE");
    ensure_eq!(r.r10, 576, "bytes of XSAVE for x87");
    ensure_eq!(
        r.r11,
        u64::from(avx_end),
        "bytes of XSAVE for x87, SSE and AVX"
    );
    Ok(())
}

/// What a device supports is what another in this machine does, leaf by leaf. The differences are listed; a bit that no other
/// has is a failure, as guests are promised something there that nobody knows to work.
fn supported_compared(env: &Env) -> Outcome {
    const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];
    // Sizes, counts and identifiers, rather than features.
    const FEATURES: [(u32, u32, usize); 13] = [
        (1, 0, 2),
        (1, 0, 3),
        (6, 0, 0),
        (7, 0, 1),
        (7, 0, 2),
        (7, 0, 3),
        (7, 1, 0),
        (7, 1, 3),
        (0xd, 0, 0),
        (0xd, 1, 0),
        (0x8000_0001, 0, 2),
        (0x8000_0001, 0, 3),
        (0x8000_0007, 0, 3),
    ];
    let Ok(kvm) = selftests::vm::Kvm::open("/dev/kvm") else {
        skip!("no /dev/kvm to compare with")
    };
    let (ours, theirs) = (env.open()?.supported_cpuid()?, kvm.supported_cpuid()?);
    let mut wrong = String::new();
    let words = |c: &selftests::vm::Cpuid, e: &kb::kvm_cpuid_entry2| {
        c.find(e.function, e.index)
            .map(|e| [e.eax, e.ebx, e.ecx, e.edx])
    };
    for e in theirs.list() {
        let want = [e.eax, e.ebx, e.ecx, e.edx];
        let Some(got) = words(&ours, e) else {
            println!("{:#x}.{}: only there: {want:08x?}", e.function, e.index);
            continue;
        };
        for (n, (got, want)) in got.into_iter().zip(want).enumerate() {
            if got == want {
                continue;
            }
            let name = REGISTERS[n];
            println!(
                "{:#x}.{} {name}: {got:08x}, there {want:08x}: {:08x} only here, {:08x} only there",
                e.function,
                e.index,
                got & !want,
                want & !got
            );
            if FEATURES.contains(&(e.function, e.index, n)) && got & !want != 0 {
                wrong += &format!("{:#x}.{} {name} {:#x}; ", e.function, e.index, got & !want);
            }
        }
    }
    for e in ours.list() {
        if words(&theirs, e).is_none() {
            println!("{:#x}.{}: only here: {e:08x?}", e.function, e.index);
        }
    }
    ensure!(wrong.is_empty(), "features that /dev/kvm has not: {wrong}");
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "cpuid",
        tests![
            cpuid_entries,
            cpuid_custom,
            cpuid_out_of_range,
            cpuid_without,
            cpuid_dynamic,
            supported_compared,
        ],
    )
}
