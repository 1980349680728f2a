// SPDX-License-Identifier: GPL-2.0

//! The machine-check architecture of a vCPU: its MSRs, and errors that a VMM reports there (SDM vol. 3, chapter 17).
//!
//! No error of the host's comes here by itself: the kernel kills the VMM, or tells it with a signal, and the VMM passes it on.

use super::msr::Msr;
use super::msr::MsrError;

/// The most banks there are (KVM_MAX_MCE_BANKS).
pub const MAX_BANKS: usize = 32;

/// MCG_CAP: there is an IA32_MCG_CTL.
const MCG_CTL_P: u64 = 1 << 8;
/// MCG_CAP: corrected errors can interrupt, and banks have an IA32_MCi_CTL2 for it.
const MCG_CMCI_P: u64 = 1 << 10;
/// MCG_CAP: software can recover from some errors.
const MCG_SER_P: u64 = 1 << 24;
/// MCG_CAP: errors can be reported to one processor only, and there is an IA32_MCG_EXT_CTL for it.
const MCG_LMCE_P: u64 = 1 << 27;
/// MCG_CAP: how many banks.
const MCG_BANKS: u64 = 0xff;
/// MCG_CAP: how many extended registers. A VMM may say that there are some, and none can be read.
const MCG_EXTENDED: u64 = 0xff << 16;

/// What KVM_X86_GET_MCE_CAP_SUPPORTED reports.
pub const SUPPORTED: u64 = MCG_CTL_P | MCG_CMCI_P | MCG_SER_P | MCG_LMCE_P;

/// MCG_STATUS: an error is being handled.
const MCG_STATUS_IN_PROGRESS: u64 = 1 << 2;
/// MCG_EXT_CTL: local errors are enabled.
const MCG_EXT_CTL_LMCE: u64 = 1 << 0;

/// MCi_STATUS: there is an error.
const VALID: u64 = 1 << 63;
/// MCi_STATUS: there was another, which has been lost.
const OVERFLOW: u64 = 1 << 62;
/// MCi_STATUS: it was not corrected.
const UNCORRECTED: u64 = 1 << 61;
/// MCi_STATUS: the processor's state is lost, an exception was raised for it, software has to act. Without any of them an
/// uncorrected error needs nobody to do anything (UCNA), and comes with the interrupt for corrected ones.
const NEEDS_ACTION: u64 = (1 << 57) | (1 << 56) | (1 << 55);

/// MCi_CTL2: corrected errors interrupt.
const CTL2_CMCI: u64 = 1 << 30;
/// MCi_CTL2: how many of them at least.
const CTL2_THRESHOLD: u64 = 0x7fff;

/// FEAT_CTL: no further writes.
const FEAT_CTL_LOCKED: u64 = 1 << 0;
/// FEAT_CTL: local errors can be enabled.
const FEAT_CTL_LMCE: u64 = 1 << 20;

/// The registers of one bank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bank {
    ctl: u64,
    status: u64,
    addr: u64,
    misc: u64,
    ctl2: u64,
}

/// An error, as KVM_X86_SET_MCE reports it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// IA32_MCi_STATUS.
    pub status: u64,
    /// IA32_MCi_ADDR.
    pub addr: u64,
    /// IA32_MCi_MISC.
    pub misc: u64,
    /// IA32_MCG_STATUS.
    pub mcg_status: u64,
    /// Which bank.
    pub bank: u8,
}

/// How a guest learns of an error that is now in its registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Signal {
    /// If it looks.
    None,
    /// By the interrupt for corrected errors.
    Interrupt,
    /// By #MC.
    Exception,
    /// Not at all: it was not ready for one, and the processor shuts down.
    Shutdown,
}

/// What a VMM asked for cannot be: EINVAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalid;

/// Which register of which bank an MSR is.
enum Register {
    Bank(usize, BankRegister),
    Cap,
    Status,
    Ctl,
    ExtCtl,
    FeatCtl,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum BankRegister {
    Ctl,
    Status,
    Addr,
    Misc,
    Ctl2,
}

const MC0_CTL2: u32 = 0x280;
const MC0_CTL: u32 = 0x400;

/// The first and the last number of the banks' registers, and of their IA32_MCi_CTL2.
const BANKS: (u32, u32) = (MC0_CTL, MC0_CTL + 4 * MAX_BANKS as u32 - 1);
const CTL2S: (u32, u32) = (MC0_CTL2, MC0_CTL2 + MAX_BANKS as u32 - 1);

/// Whether an MSR is one that [`MachineChecks`] answers for.
#[must_use]
pub const fn is_machine_check(msr: Msr) -> bool {
    let Msr(n) = msr;
    (n >= BANKS.0 && n <= BANKS.1)
        || (n >= CTL2S.0 && n <= CTL2S.1)
        || matches!(
            msr,
            Msr::MCG_CAP | Msr::MCG_STATUS | Msr::MCG_CTL | Msr::MCG_EXT_CTL | Msr::FEAT_CTL
        )
}

impl Register {
    const fn of(msr: Msr) -> Option<Self> {
        let Msr(n) = msr;
        if n >= BANKS.0 && n <= BANKS.1 {
            let offset = n.wrapping_sub(MC0_CTL);
            let register = match offset & 3 {
                0 => BankRegister::Ctl,
                1 => BankRegister::Status,
                2 => BankRegister::Addr,
                _ => BankRegister::Misc,
            };
            return Some(Self::Bank((offset / 4) as usize, register));
        }
        if n >= CTL2S.0 && n <= CTL2S.1 {
            return Some(Self::Bank(
                n.wrapping_sub(MC0_CTL2) as usize,
                BankRegister::Ctl2,
            ));
        }
        match msr {
            Msr::MCG_CAP => Some(Self::Cap),
            Msr::MCG_STATUS => Some(Self::Status),
            Msr::MCG_CTL => Some(Self::Ctl),
            Msr::MCG_EXT_CTL => Some(Self::ExtCtl),
            Msr::FEAT_CTL => Some(Self::FeatCtl),
            _ => None,
        }
    }
}

/// The machine-check registers of one vCPU; and IA32_FEATURE_CONTROL, whose only feature here is theirs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineChecks {
    cap: u64,
    status: u64,
    ctl: u64,
    ext_ctl: u64,
    feat_ctl: u64,
    banks: [Bank; MAX_BANKS],
}

impl Default for MachineChecks {
    fn default() -> Self {
        Self::new()
    }
}

impl MachineChecks {
    /// All banks, and nothing optional.
    #[must_use]
    pub const fn new() -> Self {
        const BANK: Bank = Bank {
            ctl: 0,
            status: 0,
            addr: 0,
            misc: 0,
            ctl2: 0,
        };
        Self {
            cap: MAX_BANKS as u64,
            status: 0,
            ctl: 0,
            ext_ctl: 0,
            feat_ctl: 0,
            banks: [BANK; MAX_BANKS],
        }
    }

    const fn has(&self, cap: u64) -> bool {
        self.cap & cap != 0
    }

    /// Whether there is an interrupt for corrected errors, and the local APIC has an entry for it.
    #[must_use]
    pub const fn has_interrupt(&self) -> bool {
        self.has(MCG_CMCI_P)
    }

    /// Sets IA32_MCG_CAP, and enables all errors.
    ///
    /// # Errors
    ///
    /// [`Invalid`] for no bank, for too many, and for what is not supported. Nothing has changed then.
    pub fn set_up(&mut self, cap: u64) -> Result<(), Invalid> {
        let banks = (cap & MCG_BANKS) as usize;
        if banks > MAX_BANKS || cap & !(SUPPORTED | MCG_BANKS | MCG_EXTENDED) != 0 {
            return Err(Invalid);
        }
        let Some(used) = self.banks.get_mut(..banks).filter(|used| !used.is_empty()) else {
            return Err(Invalid);
        };
        for bank in used {
            bank.ctl = u64::MAX;
            if cap & MCG_CMCI_P != 0 {
                bank.ctl2 = 0;
            }
        }
        self.cap = cap;
        if self.has(MCG_CTL_P) {
            self.ctl = u64::MAX;
        }
        Ok(())
    }

    fn bank(&self, bank: usize) -> Option<&Bank> {
        self.banks
            .get(bank)
            .filter(|_| bank < (self.cap & MCG_BANKS) as usize)
    }

    fn bank_mut(&mut self, bank: usize) -> Option<&mut Bank> {
        let there = (self.cap & MCG_BANKS) as usize;
        self.banks.get_mut(bank).filter(|_| bank < there)
    }

    /// Reads an MSR for which [`is_machine_check`]. `host` is whether a VMM asks.
    ///
    /// # Errors
    ///
    /// [`MsrError::Refused`] if IA32_MCG_CAP has it not.
    pub fn read(&self, msr: Msr, host: bool) -> Result<u64, MsrError> {
        let there = |cap: u64| {
            if host || self.has(cap) {
                Ok(())
            } else {
                Err(MsrError::Refused)
            }
        };
        match Register::of(msr).ok_or(MsrError::Unknown)? {
            Register::Cap => Ok(self.cap),
            Register::Status => Ok(self.status),
            Register::Ctl => there(MCG_CTL_P).map(|()| self.ctl),
            Register::ExtCtl if host || self.feat_ctl & FEAT_CTL_LMCE != 0 => Ok(self.ext_ctl),
            Register::ExtCtl => Err(MsrError::Refused),
            Register::FeatCtl => Ok(self.feat_ctl),
            Register::Bank(bank, register) => {
                let bank = self.bank(bank).ok_or(MsrError::Refused)?;
                match register {
                    BankRegister::Ctl => Ok(bank.ctl),
                    BankRegister::Status => Ok(bank.status),
                    BankRegister::Addr => Ok(bank.addr),
                    BankRegister::Misc => Ok(bank.misc),
                    BankRegister::Ctl2 => there(MCG_CMCI_P).map(|()| bank.ctl2),
                }
            }
        }
    }

    /// Writes an MSR for which [`is_machine_check`]. `host` is whether a VMM asks: it may set what the guest can only clear.
    ///
    /// # Errors
    ///
    /// [`MsrError::Refused`] if IA32_MCG_CAP has it not, it is read-only or does not take the value.
    pub fn write(&mut self, msr: Msr, value: u64, host: bool) -> Result<(), MsrError> {
        // A VMM may restore the zeroes of a register that is not there.
        let there = |has: bool| has || (host && value == 0);
        let has_ctl2 = self.has(MCG_CMCI_P);
        let ok = match Register::of(msr).ok_or(MsrError::Unknown)? {
            Register::Cap => host && value == self.cap,
            // Software can only clear it (SDM vol. 3, 17.3.1.2).
            Register::Status => {
                let ok = host || value == 0;
                if ok {
                    self.status = value;
                }
                ok
            }
            // All errors, or none: single ones are nobody's to choose here.
            Register::Ctl => {
                let ok = there(self.has(MCG_CTL_P)) && (value == 0 || value == u64::MAX);
                if ok {
                    self.ctl = value;
                }
                ok
            }
            Register::ExtCtl => {
                let enabled = host || self.feat_ctl & FEAT_CTL_LMCE != 0;
                let ok = enabled && value & !MCG_EXT_CTL_LMCE == 0;
                if ok {
                    self.ext_ctl = value;
                }
                ok
            }
            Register::FeatCtl => {
                let lmce = host || self.has(MCG_LMCE_P);
                let allowed = FEAT_CTL_LOCKED | if lmce { FEAT_CTL_LMCE } else { 0 };
                let open = host || self.feat_ctl & FEAT_CTL_LOCKED == 0;
                let ok = open && value & !allowed == 0;
                if ok {
                    self.feat_ctl = value;
                }
                ok
            }
            Register::Bank(bank, register) => {
                let bank = self.bank_mut(bank).ok_or(MsrError::Refused)?;
                let (ok, place) = match register {
                    // As above, but some guests leave out bit 10, or bit 0, for errata of processors that never had VMX.
                    BankRegister::Ctl => (
                        value == 0 || value | (1 << 10) | 1 == u64::MAX,
                        &mut bank.ctl,
                    ),
                    BankRegister::Status => (host || value == 0, &mut bank.status),
                    BankRegister::Addr => (true, &mut bank.addr),
                    BankRegister::Misc => (true, &mut bank.misc),
                    BankRegister::Ctl2 => (
                        there(has_ctl2) && value & !(CTL2_CMCI | CTL2_THRESHOLD) == 0,
                        &mut bank.ctl2,
                    ),
                };
                if ok {
                    *place = value;
                }
                ok
            }
        };
        if ok {
            Ok(())
        } else {
            Err(MsrError::Refused)
        }
    }

    /// Puts an error into its bank, as a processor does (SDM vol. 3, 17.6). `enabled`: CR4.MCE.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if it is none, or in a bank that is not there.
    pub fn report(&mut self, report: &Report, enabled: bool) -> Result<Signal, Invalid> {
        let reports_uncorrected = !self.has(MCG_CTL_P) || self.ctl == u64::MAX;
        let in_progress = self.status & MCG_STATUS_IN_PROGRESS != 0;
        let has_interrupt = self.has_interrupt();
        let bank = self.bank_mut(usize::from(report.bank)).ok_or(Invalid)?;
        if report.status & VALID == 0 {
            return Err(Invalid);
        }
        let uncorrected = report.status & UNCORRECTED != 0;
        let overwritten = Bank {
            status: report.status,
            addr: report.addr,
            misc: report.misc,
            ..*bank
        };

        if uncorrected && report.status & NEEDS_ACTION == 0 && report.mcg_status == 0 {
            *bank = overwritten;
            let interrupts = has_interrupt && bank.ctl2 & CTL2_CMCI != 0;
            self.status = 0;
            return Ok(if interrupts {
                Signal::Interrupt
            } else {
                Signal::None
            });
        }

        let lost = if bank.status & VALID != 0 {
            OVERFLOW
        } else {
            0
        };
        if !uncorrected {
            // It does not take the place of a worse one.
            if bank.status & VALID != 0 && bank.status & UNCORRECTED != 0 {
                bank.status |= OVERFLOW;
            } else {
                *bank = overwritten;
                bank.status |= lost;
            }
            return Ok(Signal::None);
        }
        if !reports_uncorrected || bank.ctl != u64::MAX {
            return Ok(Signal::None);
        }
        if in_progress || !enabled {
            return Ok(Signal::Shutdown);
        }
        *bank = overwritten;
        bank.status |= lost;
        self.status = report.mcg_status;
        Ok(Signal::Exception)
    }
}
