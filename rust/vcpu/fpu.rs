// SPDX-License-Identifier: GPL-2.0

//! KVM_GET/SET_FPU, XSAVE and XCRS.

use super::Locked;
use crate::abi::kvm_fpu;
use crate::abi::kvm_xcrs;
use crate::backend::Loaded;
use crate::bindings as b;
use crate::linux::user;
use crate::x86::cr;
use crate::x86::regs::Xcr0;
use kernel::prelude::*;

/// Bytes of `struct kvm_xsave`, without what lies behind it.
const XSAVE_SIZE: usize = 4096;

/// Offsets in the FXSAVE area (SDM vol. 1, table 10-2).
mod fx {
    pub(super) const FCW: usize = 0;
    pub(super) const FSW: usize = 2;
    pub(super) const FTW: usize = 4;
    pub(super) const FOP: usize = 6;
    pub(super) const FIP: usize = 8;
    pub(super) const FDP: usize = 16;
    pub(super) const MXCSR: usize = 24;
    pub(super) const ST: usize = 32;
    pub(super) const XMM: usize = 160;
}

fn get<const N: usize>(area: &[u8; 512], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(from) = area.get(at..at + N) {
        out.copy_from_slice(from);
    }
    out
}

fn put(area: &mut [u8; 512], at: usize, data: &[u8]) {
    if let Some(to) = area.get_mut(at..at + data.len()) {
        to.copy_from_slice(data);
    }
}

impl<L: Loaded> Locked<'_, L> {
    /// KVM_GET_FPU.
    pub(super) fn get_fpu(&mut self) -> kvm_fpu {
        let area = self.fpu.fxsave();
        let mut fpu = kvm_fpu::default();
        for (n, st) in fpu.fpr.iter_mut().enumerate() {
            *st = get(&area, fx::ST + 16 * n);
        }
        for (n, xmm) in fpu.xmm.iter_mut().enumerate() {
            *xmm = get(&area, fx::XMM + 16 * n);
        }
        fpu.fcw = u16::from_le_bytes(get(&area, fx::FCW));
        fpu.fsw = u16::from_le_bytes(get(&area, fx::FSW));
        let [ftw, _] = get(&area, fx::FTW);
        fpu.ftwx = ftw;
        fpu.last_opcode = u16::from_le_bytes(get(&area, fx::FOP));
        fpu.last_ip = u64::from_le_bytes(get(&area, fx::FIP));
        fpu.last_dp = u64::from_le_bytes(get(&area, fx::FDP));
        fpu.mxcsr = u32::from_le_bytes(get(&area, fx::MXCSR));
        fpu
    }

    /// KVM_SET_FPU.
    pub(super) fn set_fpu(&mut self, fpu: &kvm_fpu) {
        let mut area = self.fpu.fxsave();
        for (n, st) in fpu.fpr.iter().enumerate() {
            put(&mut area, fx::ST + 16 * n, st);
        }
        for (n, xmm) in fpu.xmm.iter().enumerate() {
            put(&mut area, fx::XMM + 16 * n, xmm);
        }
        put(&mut area, fx::FCW, &fpu.fcw.to_le_bytes());
        put(&mut area, fx::FSW, &fpu.fsw.to_le_bytes());
        put(&mut area, fx::FTW, &[fpu.ftwx, 0]);
        put(&mut area, fx::FOP, &fpu.last_opcode.to_le_bytes());
        put(&mut area, fx::FIP, &fpu.last_ip.to_le_bytes());
        put(&mut area, fx::FDP, &fpu.last_dp.to_le_bytes());
        put(&mut area, fx::MXCSR, &fpu.mxcsr.to_le_bytes());
        self.fpu.set_fxsave(&area);
    }

    /// KVM_GET_XSAVE: EINVAL if the state does not fit the structure, which then needs
    /// KVM_GET_XSAVE2.
    pub(super) fn get_xsave(&mut self, arg: usize) -> Result {
        if self.fpu.uabi_size() > XSAVE_SIZE {
            return Err(EINVAL);
        }
        self.put_xsave(arg, XSAVE_SIZE)
    }

    /// KVM_GET_XSAVE2: as many bytes as KVM_CAP_XSAVE2 says.
    pub(super) fn get_xsave2(&mut self, arg: usize) -> Result {
        self.put_xsave(arg, self.fpu.uabi_size().max(XSAVE_SIZE))
    }

    fn put_xsave(&mut self, arg: usize, size: usize) -> Result {
        let mut buf = KVVec::from_elem(0u8, size, GFP_KERNEL_ACCOUNT)?;
        // x87 and SSE are part of the state even of a guest without XSAVE.
        let xfeatures = self.arch.features.xcr0 | Xcr0::X87 | Xcr0::SSE;
        self.fpu.copy_to(&mut buf, xfeatures.bits(), self.arch.pkru);
        user::write_bytes(arg, &buf)
    }

    /// KVM_SET_XSAVE: EINVAL for components or header bits that the host does not have.
    pub(super) fn set_xsave(&mut self, arg: usize) -> Result {
        let mut buf = KVVec::from_elem(
            0u8,
            self.fpu.uabi_size().max(XSAVE_SIZE),
            GFP_KERNEL_ACCOUNT,
        )?;
        user::read_bytes(arg, &mut buf)?;
        self.fpu
            .copy_from(&buf, self.host.supported.xcr0.bits(), &mut self.arch.pkru)
    }

    /// KVM_GET_XCRS: EINVAL if the host does not use XSAVE.
    pub(super) fn get_xcrs(&mut self) -> Result<kvm_xcrs> {
        if self.host.xcr0 == 0 {
            return Err(EINVAL);
        }
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = self.arch.xcr0;
        Ok(xcrs)
    }

    /// KVM_SET_XCRS: EINVAL for flags, too many registers, or a value that XSETBV would refuse. Only
    /// XCR0 exists; others are ignored.
    pub(super) fn set_xcrs(&mut self, xcrs: &kvm_xcrs) -> Result {
        if self.host.xcr0 == 0 || xcrs.nr_xcrs > b::KVM_MAX_XCRS || xcrs.flags != 0 {
            return Err(EINVAL);
        }
        let given = xcrs
            .xcrs
            .iter()
            .take(xcrs.nr_xcrs as usize)
            .find(|x| x.xcr == 0);
        if let Some(xcr) = given {
            let features = self.arch.features.limited_to(&self.host.supported);
            let value = cr::check_xsetbv(0, xcr.value, &features).map_err(|_| EINVAL)?;
            self.arch.xcr0 = value.bits();
            let cr4 = self.hw.cr4();
            self.arch.refresh_cpuid(self.host, self.around.options, cr4);
        }
        Ok(())
    }
}
