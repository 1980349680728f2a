// SPDX-License-Identifier: GPL-2.0

//! The instructions that work on segments, tables, privilege and the machine.

use super::super::segment::SegReg;

/// What a system instruction does. Operands are those of the [`Insn`](super::Insn), if it is not said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemOp {
    /// `dst = src`, a segment register.
    LoadSegment,
    /// `dst` and this segment register are loaded from a far pointer in memory: LDS and its siblings.
    LoadFar(SegReg),
    /// Pop this segment register.
    PopSegment(SegReg),
    /// JMP to another segment: `dst` is the selector and `src` the offset, or `src` the far pointer in memory.
    FarJump,
    /// CALL likewise.
    FarCall,
    /// RET from it, dropping as many bytes as `src` says.
    FarReturn,
    /// IRET.
    InterruptReturn,
    /// INT n; the vector is `src`.
    Interrupt,
    /// INT3.
    Breakpoint,
    /// INTO.
    Overflow,
    /// INT1.
    DebugTrap,
    /// `dst = GDTR`.
    StoreGdt,
    /// `dst = IDTR`.
    StoreIdt,
    /// `GDTR = src`.
    LoadGdt,
    /// `IDTR = src`.
    LoadIdt,
    /// `dst = LDTR`.
    StoreLdt,
    /// `dst = TR`.
    StoreTask,
    /// `LDTR = src`.
    LoadLdt,
    /// `TR = src`.
    LoadTask,
    /// `dst` = access rights of the segment that `src` selects.
    AccessRights,
    /// `dst` = limit of the segment that `src` selects.
    SegmentLimit,
    /// ZF = whether the segment that `src` selects can be read.
    VerifyRead,
    /// ZF = whether it can be written.
    VerifyWrite,
    /// Raise the RPL of `dst` to that of `src`.
    AdjustRpl,
    /// `dst` = machine status word.
    StoreMsw,
    /// Machine status word = `src`.
    LoadMsw,
    /// CLTS.
    ClearTaskSwitched,
    /// `CRn = src`; the number is `dst`.
    WriteControl,
    /// `dst = CRn`; the number is `src`.
    ReadControl,
    /// `DRn = src`; the number is `dst`.
    WriteDebug,
    /// `dst = DRn`; the number is `src`.
    ReadDebug,
    /// INVLPG at the address of `src`.
    InvalidatePage,
    /// INVPCID: the type is `dst`, the descriptor `src`.
    InvalidatePcid,
    /// HLT.
    Halt,
    /// INVD.
    InvalidateCaches,
    /// WBINVD.
    WriteBackCaches,
    /// RDMSR.
    ReadMsr,
    /// WRMSR.
    WriteMsr,
    /// RDTSC.
    ReadTsc,
    /// RDTSCP.
    ReadTscAux,
    /// RDPMC.
    ReadCounter,
    /// CPUID.
    Identify,
    /// XSETBV.
    WriteXcr,
    /// XGETBV.
    ReadXcr,
    /// VMCALL.
    Hypercall,
    /// CLAC.
    AccessCheckOn,
    /// STAC.
    AccessCheckOff,
    /// SWAPGS.
    SwapGs,
    /// CLI.
    InterruptsOff,
    /// STI.
    InterruptsOn,
    /// IN; the port is `src`.
    In,
    /// OUT; the port is `src`.
    Out,
    /// INS.
    InString,
    /// OUTS.
    OutString,
    /// SYSCALL.
    Syscall,
    /// SYSRET.
    Sysret,
    /// SYSENTER.
    Sysenter,
    /// SYSEXIT.
    Sysexit,
}
