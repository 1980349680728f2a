// SPDX-License-Identifier: GPL-2.0

//! Programs: what a guest is told to do, and from which state.

use super::code::Insn;
use std::fmt;

/// The formats of a guest's tables. 32-bit programs can also switch paging off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Two levels of 4-byte entries, with and without 4 MiB pages.
    Bits32,
    /// A table of four, and two levels of 8-byte entries.
    Pae,
    /// Four levels.
    Long,
}

impl Format {
    /// Bytes of an entry.
    #[must_use]
    pub fn entry(self) -> u64 {
        if self == Format::Bits32 {
            4
        } else {
            8
        }
    }

    /// Levels of tables.
    #[must_use]
    pub fn levels(self) -> usize {
        match self {
            Format::Bits32 => 2,
            Format::Pae => 3,
            Format::Long => 4,
        }
    }

    /// Bits of an address that select an entry.
    #[must_use]
    pub fn index_bits(self) -> u32 {
        if self == Format::Bits32 {
            10
        } else {
            9
        }
    }

    /// Whether the guest is in 64-bit mode.
    #[must_use]
    pub fn is_long(self) -> bool {
        self == Format::Long
    }
}

/// What the guest's processor has, as far as paging goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)]
pub struct Features {
    /// Bits of a guest-physical address.
    pub maxphyaddr: u8,
    /// EFER.NXE.
    pub nx: bool,
    /// Pages of 1 GiB.
    pub gbpages: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR4.PKE.
    pub pku: bool,
    /// CR4.PCIDE.
    pub pcid: bool,
    /// INVPCID.
    pub invpcid: bool,
    /// CR4.PSE and pages of 4 MiB with addresses above 4 GiB.
    pub pse36: bool,
}

impl Features {
    /// What both have.
    #[must_use]
    pub fn common(self, o: Self) -> Self {
        Features {
            maxphyaddr: self.maxphyaddr.min(o.maxphyaddr),
            nx: self.nx && o.nx,
            gbpages: self.gbpages && o.gbpages,
            smep: self.smep && o.smep,
            smap: self.smap && o.smap,
            pku: self.pku && o.pku,
            pcid: self.pcid && o.pcid,
            invpcid: self.invpcid && o.invpcid,
            pse36: self.pse36 && o.pse36,
        }
    }
}

/// Where a device is known to differ from the architecture: programs keep away from that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Avoid {
    /// CR4.SMAP while CR0.WP is clear.
    pub smap_without_wp: bool,
    /// Reserved bits.
    pub reserved: bool,
    /// Writes across the end of a page of which the second half faults.
    pub torn_writes: bool,
    /// Frames of interrupts on pages that are or were tables: the delivery cannot be emulated.
    pub frames_on_tables: bool,
    /// CR4.SMEP or SMAP when CR0.PG changes: they stay in force without paging.
    pub smep_across_paging: bool,
}

impl Avoid {
    /// What either is to keep away from.
    #[must_use]
    pub fn either(self, o: Self) -> Self {
        Avoid {
            smap_without_wp: self.smap_without_wp || o.smap_without_wp,
            reserved: self.reserved || o.reserved,
            torn_writes: self.torn_writes || o.torn_writes,
            frames_on_tables: self.frames_on_tables || o.frames_on_tables,
            smep_across_paging: self.smep_across_paging || o.smep_across_paging,
        }
    }
}

/// The operands of an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Regs {
    /// RAX.
    pub a: u64,
    /// RBX.
    pub b: u64,
    /// RCX.
    pub c: u64,
    /// RDX.
    pub d: u64,
    /// RSI, for what has a source in memory.
    pub si: u64,
}

/// One thing that the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// An instruction on memory.
    Mem {
        /// Which.
        insn: Insn,
        /// Where.
        addr: u64,
        /// Its other operands.
        regs: Regs,
        /// In user mode.
        user: bool,
        /// With RFLAGS.AC.
        ac: bool,
    },
    /// A jump to an address, at which there is code.
    Fetch {
        /// The address.
        addr: u64,
        /// In user mode.
        user: bool,
    },
    /// LAR: the processor reads a descriptor on the page that is the LDT. RFLAGS.AC is clear: emulators take it
    /// for a permission here too, under SMAP.
    Lar {
        /// The offset in the LDT.
        offset: u16,
        /// In user mode.
        user: bool,
    },
    /// An interrupt whose frame goes to the stack that ends here.
    Interrupt {
        /// The end of the stack.
        stack: u64,
        /// From user mode.
        user: bool,
        /// Another address of RFLAGS in the frame. RF is cleared there afterwards: emulators push it set when the
        /// delivery had to wait for the host's memory.
        flags: u64,
    },
    /// INVLPG.
    Invlpg(u64),
    /// INVPCID.
    Invpcid {
        /// The type.
        kind: u64,
        /// The context.
        pcid: u64,
        /// The address.
        addr: u64,
    },
    /// MOV to CR0.
    Cr0(u64),
    /// MOV to CR3.
    Cr3(u64),
    /// MOV to CR4.
    Cr4(u64),
    /// WRMSR to EFER.
    Efer(u64),
    /// WRPKRU.
    Pkru(u32),
    /// The guest leaves, and comes back when the host has done something.
    Leave,
}

fn who(user: bool, ac: bool) -> String {
    format!(
        "{}{}",
        if user { "user" } else { "sup " },
        if ac { "+AC" } else { "" }
    )
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Mem {
                insn,
                addr,
                regs,
                user,
                ac,
            } => {
                write!(f, "{} {insn:?} [{addr:#x}]", who(*user, *ac))?;
                for (name, value) in [
                    ("a", regs.a),
                    ("b", regs.b),
                    ("c", regs.c),
                    ("d", regs.d),
                    ("si", regs.si),
                ] {
                    if value != 0 {
                        write!(f, " {name}={value:#x}")?;
                    }
                }
                Ok(())
            }
            Op::Fetch { addr, user } => write!(f, "{} jump to {addr:#x}", who(*user, false)),
            Op::Lar { offset, user } => write!(f, "{} LAR LDT:{offset:#x}", who(*user, false)),
            Op::Interrupt { stack, user, .. } => {
                write!(f, "{} INT with stack {stack:#x}", who(*user, false))
            }
            Op::Invlpg(a) => write!(f, "INVLPG {a:#x}"),
            Op::Invpcid { kind, pcid, addr } => {
                write!(f, "INVPCID type {kind} pcid {pcid:#x} {addr:#x}")
            }
            Op::Cr0(v) => write!(f, "CR0 = {v:#x}"),
            Op::Cr3(v) => write!(f, "CR3 = {v:#x}"),
            Op::Cr4(v) => write!(f, "CR4 = {v:#x}"),
            Op::Efer(v) => write!(f, "EFER = {v:#x}"),
            Op::Pkru(v) => write!(f, "PKRU = {v:#x}"),
            Op::Leave => write!(f, "leave to the host"),
        }
    }
}

/// The state from which a program begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup {
    /// The format of the tables.
    pub format: Format,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// The linear page at which the LDT is.
    pub ldt: u64,
    /// What the pages of the pool hold.
    pub pool: Vec<Vec<u8>>,
    /// What the processor has.
    pub features: Features,
    /// What the program keeps away from.
    pub avoid: Avoid,
}

/// A program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// What it was made from.
    pub seed: u64,
    /// How it begins.
    pub setup: Setup,
    /// What it does.
    pub ops: Vec<Op>,
}
