// SPDX-License-Identifier: GPL-2.0

//! The state of the floating-point unit: x87, SSE and AVX registers, and XCR0, as userspace gets and sets
//! them and as the guest finds them.

use kvm_bindings as kb;
use selftests::check::expect_errno;
use selftests::guest::{at, usize_of};
use selftests::host::Rng;
use selftests::machine::{cr, Machine, Mode};
use selftests::{ensure_eq, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;

guest_code!(halt, ".code32", "2: hlt", "jmp 2b");

fn machine(env: &Env, mode: Mode) -> Result<Machine, Verdict> {
    Ok(Machine::new(env, mode, halt())?)
}

fn pattern_fpu() -> kb::kvm_fpu {
    let mut f = kb::kvm_fpu {
        fcw: 0x27f,
        ftwx: 0xff,
        ..Default::default()
    };
    let mut rng = Rng::new(5);
    for r in &mut f.fpr {
        // A register has ten bytes; the rest of its slot is reserved.
        rng.fill(&mut r[..10]);
    }
    for x in &mut f.xmm {
        rng.fill(x);
    }
    f
}

fn fpu(env: &Env) -> Outcome {
    let m = machine(env, Mode::Long)?;
    let want = pattern_fpu();
    m.vcpu.set_fpu(&want)?;
    let got = m.vcpu.fpu()?;
    ensure_eq!(
        (got.fcw, got.fsw, got.ftwx),
        (want.fcw, want.fsw, want.ftwx),
        "x87 words"
    );
    ensure_eq!(got.fpr, want.fpr, "x87 registers");
    ensure_eq!(got.xmm, want.xmm, "XMM registers");
    Ok(())
}

/// The guest finds in XMM what was set, and what it leaves there is read back.
///
/// It touches x87 and SSE first: in-tree KVM does not mark as in use what KVM_SET_FPU writes, so that
/// a component that the guest never used stays in its initial state. MXCSR does not travel through
/// these calls at all.
fn fpu_in_guest(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "fld1",
        "fninit",
        "pcmpeqb xmm0, xmm0",
        "hlt",
        "movups [{D}], xmm3",
        "movups [{D} + 16], xmm15",
        "fnstcw [{D} + 32]",
        "movups xmm7, [{D} + 64]",
        "fld1",
        "hlt";
        D = at::DATA,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    m.expect_hlt()?;
    ensure_eq!(
        m.vcpu.fpu()?.xmm[0],
        [0xff; 16],
        "XMM0 that the guest filled"
    );
    let want = kb::kvm_fpu {
        ftwx: 0,
        ..pattern_fpu()
    };
    m.vcpu.set_fpu(&want)?;
    let new: [u8; 16] = *b"from the guest!!";
    m.mem.write(usize_of(at::DATA) + 64, new);
    m.expect_hlt()?;
    let d = usize_of(at::DATA);
    ensure_eq!(m.mem.read::<[u8; 16]>(d), want.xmm[3], "XMM3 in the guest");
    ensure_eq!(
        m.mem.read::<[u8; 16]>(d + 16),
        want.xmm[15],
        "XMM15 in the guest"
    );
    ensure_eq!(
        m.mem.read::<u16>(d + 32),
        want.fcw,
        "control word in the guest"
    );
    let got = m.vcpu.fpu()?;
    ensure_eq!(got.xmm[7], new, "XMM7 after the guest");
    ensure_eq!(
        got.xmm[4],
        want.xmm[4],
        "XMM4, which the guest did not touch"
    );
    // FLD1 decrements the top of the stack to 7, and marks that register as in use.
    ensure_eq!(
        ((got.fsw >> 11) & 7, got.ftwx),
        (7, 0x80),
        "x87 stack after FLD1"
    );
    ensure_eq!(got.fpr[0][8..10], [0xff, 0x3f], "exponent of 1.0");
    Ok(())
}

fn xsave(env: &Env) -> Outcome {
    let m = machine(env, Mode::Long)?;
    let mut x = m.vcpu.xsave()?;
    // XSTATE_BV is at byte 512, XMM0 at 160, MXCSR at 24.
    x.region[128] = 3;
    x.region[129] = 0;
    x.region[6] = 0x1f80;
    for i in 0..64u32 {
        x.region[40 + i as usize] = 0x1000_0000 + i;
    }
    m.vcpu.set_xsave(&x)?;
    let got = m.vcpu.xsave()?;
    ensure_eq!(got.region[40..104], x.region[40..104], "XMM registers");
    ensure_eq!(got.region[128] & 2, 2, "XSTATE_BV says that SSE is in use");
    ensure_eq!(got.region[6], 0x1f80, "MXCSR");
    // The same registers through the older call.
    let f = m.vcpu.fpu()?;
    ensure_eq!(
        f.xmm[0][..4],
        0x1000_0000u32.to_le_bytes(),
        "XMM0 through KVM_GET_FPU"
    );
    Ok(())
}

fn xsave_invalid(env: &Env) -> Outcome {
    let m = machine(env, Mode::Long)?;
    let mut x = m.vcpu.xsave()?;
    x.region[128] |= 2;
    x.region[6] = 0xffff_0000;
    expect_errno(m.vcpu.set_xsave(&x), libc::EINVAL, "reserved bits of MXCSR")?;
    let mut x = m.vcpu.xsave()?;
    x.region[129] = 1 << 30;
    expect_errno(
        m.vcpu.set_xsave(&x),
        libc::EINVAL,
        "unknown component in XSTATE_BV",
    )?;
    let mut x = m.vcpu.xsave()?;
    x.region[131] = 1 << 31;
    expect_errno(m.vcpu.set_xsave(&x), libc::EINVAL, "compacted format")?;
    let mut x = m.vcpu.xsave()?;
    x.region[136] = 1;
    expect_errno(
        m.vcpu.set_xsave(&x),
        libc::EINVAL,
        "reserved bytes of the header",
    )?;
    Ok(())
}

/// The upper halves of YMM travel through KVM_SET_XSAVE into the guest and back.
fn xsave_avx(env: &Env) -> Outcome {
    guest_code!(code, ".code64",
        "vmovups [{D}], ymm2",
        "vmovups ymm9, [{D} + 64]",
        "hlt";
        D = at::DATA,
    );
    let m = Machine::new(env, Mode::Long, code())?;
    let cpuid = m.vcpu.cpuid()?;
    let Some(leaf) = cpuid.find(0xd, 2) else {
        skip!("no AVX")
    };
    let offset = leaf.ebx as usize / 4;
    let mut xcrs = m.vcpu.xcrs()?;
    xcrs.xcrs[0].value = 7;
    m.vcpu.set_xcrs(&xcrs)?;
    m.patch_sregs(|s| s.cr4 |= cr::OSXSAVE)?;
    let mut x = m.vcpu.xsave()?;
    x.region[128] = 7;
    for i in 0..4 {
        x.region[40 + 8 + i] = 0x2222_0000 + i as u32;
        x.region[offset + 8 + i] = 0x3333_0000 + i as u32;
    }
    m.vcpu.set_xsave(&x)?;
    for i in 0..8u32 {
        m.mem
            .write(usize_of(at::DATA) + 64 + i as usize * 4, 0x9999_0000 + i);
    }
    m.expect_hlt()?;
    let want = [
        0x2222_0000u32,
        0x2222_0001,
        0x2222_0002,
        0x2222_0003,
        0x3333_0000,
        0x3333_0001,
        0x3333_0002,
        0x3333_0003,
    ];
    ensure_eq!(
        m.mem.read::<[u32; 8]>(usize_of(at::DATA)),
        want,
        "YMM2 in the guest"
    );
    let got = m.vcpu.xsave()?;
    ensure_eq!(got.region[40 + 36], 0x9999_0000, "YMM9, low half");
    ensure_eq!(
        got.region[offset + 36..offset + 40],
        [0x9999_0004u32, 0x9999_0005, 0x9999_0006, 0x9999_0007],
        "YMM9, high half"
    );
    Ok(())
}

fn xcrs(env: &Env) -> Outcome {
    let m = machine(env, Mode::Long)?;
    let good = m.vcpu.xcrs()?;
    let set = |value: u64| {
        let mut x = good;
        x.nr_xcrs = 1;
        x.xcrs[0].xcr = 0;
        x.xcrs[0].value = value;
        m.vcpu.set_xcrs(&x)
    };
    set(3)?;
    ensure_eq!(m.vcpu.xcrs()?.xcrs[0].value, 3, "XCR0");
    expect_errno(set(0), libc::EINVAL, "XCR0 without x87")?;
    expect_errno(set(5), libc::EINVAL, "AVX without SSE")?;
    expect_errno(set((1 << 63) | 3), libc::EINVAL, "bit 63")?;
    ensure_eq!(m.vcpu.xcrs()?.xcrs[0].value, 3, "XCR0 after refusals");
    expect_errno(
        m.vcpu.set_xcrs(&kb::kvm_xcrs { flags: 1, ..good }),
        libc::EINVAL,
        "flags",
    )?;
    let many = kb::kvm_xcrs {
        nr_xcrs: 17,
        ..good
    };
    expect_errno(m.vcpu.set_xcrs(&many), libc::EINVAL, "17 registers")
}

fn main() -> ExitCode {
    selftests::tap::main(
        "fpu",
        tests![fpu, fpu_in_guest, xsave, xsave_invalid, xsave_avx, xcrs],
    )
}
