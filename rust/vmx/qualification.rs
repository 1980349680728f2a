// SPDX-License-Identifier: GPL-2.0

//! What an exit qualification says (SDM vol. 3, 28.2.1).

use crate::backend::CrAccess;
use crate::backend::Exit;
use crate::backend::PortAccess;
use crate::x86::emulate::Cause;
use crate::x86::regs::Gpr;

/// The exit qualification of a port access.
#[derive(Clone, Copy)]
pub(super) struct IoQualification(pub(super) u64);

impl IoQualification {
    pub(super) fn decode(self) -> PortAccess {
        PortAccess {
            port: (self.0 >> 16) as u16,
            size: (self.0 & 7) as u8 + 1,
            input: self.0 & 1 << 3 != 0,
            string: self.0 & 1 << 4 != 0,
            rep: self.0 & 1 << 5 != 0,
        }
    }
}

/// The exit qualification of a control-register access.
#[derive(Clone, Copy)]
pub(super) struct CrQualification(pub(super) u64);

impl CrQualification {
    pub(super) fn decode(self) -> CrAccess {
        let cr = (self.0 & 15) as u8;
        let gpr = Gpr::from_number((self.0 >> 8) as u8);
        match (self.0 >> 4) & 3 {
            0 => CrAccess::Write { cr, gpr },
            1 => CrAccess::Read { cr, gpr },
            2 => CrAccess::Clts,
            _ => CrAccess::Lmsw((self.0 >> 16) as u16),
        }
    }
}

/// The exit qualification of a task switch.
#[derive(Clone, Copy)]
pub(super) struct TaskSwitchQualification(pub(super) u64);

impl TaskSwitchQualification {
    pub(super) fn decode(self) -> Exit {
        Exit::TaskSwitch {
            selector: self.0 as u16,
            cause: match (self.0 >> 30) & 3 {
                0 => Cause::Call,
                1 => Cause::Return,
                2 => Cause::Jump,
                _ => Cause::Gate(None),
            },
        }
    }
}
