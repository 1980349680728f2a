// SPDX-License-Identifier: GPL-2.0

//! A vCPU's part in its VM's time: its counter's rate, and where its guest wants to be told the time.

use super::VmTime;
use crate::backend::Loaded;
use crate::linux::msr as host_msr;
use crate::mem::access::MemError;
use crate::mem::cached::GuestStruct;
use crate::mem::GuestMemory;
use crate::tlb::VcpuShared;
use crate::x86::clock::matching::Member;
use crate::x86::clock::pvclock::versions;
use crate::x86::clock::pvclock::VcpuTime;
use crate::x86::clock::pvclock::WallClock;
use crate::x86::clock::pvclock::GUEST_STOPPED;
use crate::x86::clock::tsc::GuestTsc;
use crate::x86::clock::tsc::Pace;
use core::sync::atomic::Ordering;
use kernel::prelude::*;
use kernel::sync::Arc;

/// A vCPU's time.
pub(crate) struct VcpuClock {
    vm: Arc<VmTime>,
    id: u32,
    /// The rate of the counter in kHz, as the VMM has it.
    khz: u32,
    /// The processor cannot make it run so fast: it is set forward again and again.
    catches_up: bool,
    member: Member,
    /// [`lost`](super::lost), as of when the counter was last made good for it.
    lost: u64,
    /// The vCPU has come to another CPU.
    moved: bool,
    /// KVM_SYSTEM_TIME.
    system_time: u64,
    /// Where the guest wants to be told the time.
    area: Option<GuestStruct>,
    /// The guest is to be told that it was stopped.
    stopped: bool,
}

impl VcpuClock {
    /// That of the vCPU with this identifier, of a VM.
    pub(crate) fn new(vm: Arc<VmTime>, id: u32) -> Self {
        Self {
            khz: vm.khz(),
            vm,
            id,
            catches_up: false,
            member: Member::default(),
            lost: super::lost(),
            moved: false,
            system_time: 0,
            area: None,
            stopped: false,
        }
    }

    /// The rate of the counter, in kHz.
    pub(crate) fn khz(&self) -> u32 {
        self.khz
    }

    /// The vCPU begins: its counter has the rate that those of the VM have, if it can, and agrees with them.
    /// Sleeps.
    pub(crate) fn begin(&mut self, hw: &mut impl Loaded, can_scale: bool) {
        hw.set_tsc(GuestTsc::host(host_msr::tsc_khz()));
        // As in KVM, one that cannot be is told of all the same.
        let _ = self.set_khz(hw, self.khz, can_scale);
        let tsc = hw.tsc();
        self.vm.host_restarted(self.lost, tsc);
        let (member, tsc) = self.vm.join(self.khz, tsc);
        self.member = member;
        hw.set_tsc(tsc);
    }

    /// Sets the counter's rate: EINVAL for one that cannot be. What the counter says leaps, as in KVM: a VMM
    /// sets it afterwards.
    pub(crate) fn set_khz(&mut self, hw: &mut impl Loaded, khz: u32, can_scale: bool) -> Result {
        let host_khz = host_msr::tsc_khz();
        let pace = Pace::new(khz, host_khz, can_scale).ok_or(EINVAL)?;
        self.khz = khz;
        let tsc = match pace {
            Pace::Scaled(scale) => GuestTsc { scale, ..hw.tsc() },
            Pace::CatchUp => GuestTsc {
                scale: GuestTsc::host(host_khz).scale,
                ..hw.tsc()
            },
        };
        self.catches_up = pace == Pace::CatchUp;
        hw.set_tsc(tsc);
        Ok(())
    }

    /// The VMM writes to the counter. Sleeps.
    pub(crate) fn write(&mut self, hw: &mut impl Loaded, value: u64) {
        let tsc = self.vm.write(&mut self.member, self.khz, hw.tsc(), value);
        hw.set_tsc(tsc);
    }

    /// The VMM sets what the counter has more than the host's. Sleeps.
    pub(crate) fn set_offset(&mut self, hw: &mut impl Loaded, offset: u64) {
        let tsc = self
            .vm
            .set_offset(&mut self.member, self.khz, hw.tsc(), offset);
        hw.set_tsc(tsc);
    }

    /// Whether the host's counter has begun anew since this vCPU's was made good for it.
    #[inline]
    pub(crate) fn is_behind_host(&self) -> bool {
        self.lost != super::lost()
    }

    /// Makes it good: the guest's counter goes on where it was. Sleeps.
    #[cold]
    pub(crate) fn follow_host(&mut self, hw: &mut impl Loaded) {
        let lost = super::lost();
        let tsc = hw.tsc();
        let ticks = tsc.scale.guest_ticks(lost.wrapping_sub(self.lost));
        hw.set_tsc(tsc.moved(ticks));
        self.lost = lost;
        self.vm.host_restarted(lost, tsc);
    }

    /// Whether the guest's time has to be looked at again after each exit.
    #[inline]
    pub(crate) fn catches_up(&self) -> bool {
        self.catches_up
    }

    /// The vCPU has come to another CPU: returns if the guest's time has to be looked at.
    pub(crate) fn moved(&mut self) -> bool {
        self.moved = self.area.is_some() && !self.vm.has_master();
        self.moved
    }

    /// KVM_SYSTEM_TIME.
    pub(crate) fn system_time(&self) -> u64 {
        self.system_time
    }

    /// Writes KVM_SYSTEM_TIME, the older register of that name or the newer, by the guest or the VMM. Sleeps.
    pub(crate) fn set_system_time(&mut self, value: u64, old: bool, by_host: bool) {
        if self.id == 0 && !by_host {
            self.vm.set_old_registers(old);
        }
        self.system_time = value;
        let gpa = value & !1;
        let len = VcpuTime::SIZE as u64;
        // One that goes over two pages is not written to, as in KVM.
        let usable = value & 1 != 0 && (gpa & 0xfff) + len <= 0x1000;
        self.area = usable.then(|| GuestStruct::new(gpa, len));
        self.vm.refresh_all();
    }

    /// The guest that comes has asked for nothing.
    pub(crate) fn reset(&mut self) {
        self.system_time = 0;
        self.area = None;
    }

    /// KVM_KVMCLOCK_CTRL: the guest is to be told that it was stopped. EINVAL if it has no clock.
    pub(crate) fn set_stopped(&mut self) -> Result {
        if self.area.is_none() {
            return Err(EINVAL);
        }
        self.stopped = true;
        Ok(())
    }

    /// The vCPU has come to another CPU, whose counter has nothing to do with the last one's: the guest's goes
    /// by the time, and not back. (Counters that stop while a CPU is idle, which KVM reckons with on one and
    /// the same CPU, are not those of processors that have what VMX must have here.)
    pub(crate) fn cross_cpus(&self, hw: &mut impl Loaded) {
        let (left_at, tsc) = (hw.left_at(), hw.tsc());
        let now = crate::linux::clock::now();
        let ideal = self.member.ideal(now.ns, self.khz);
        let value = match left_at.map(|left_at| tsc.at(left_at)) {
            // Its rate was higher than it says.
            Some(said) if said.wrapping_sub(ideal) as i64 > 0 => said,
            _ => ideal,
        };
        hw.set_tsc(tsc.saying(value, now.tsc));
    }

    /// Sets the counter forward to where it should be, if that is how it goes: returns if it has moved.
    pub(crate) fn catch_up(&mut self, hw: &mut impl Loaded) -> bool {
        if !self.catches_up {
            return false;
        }
        let now = crate::linux::clock::now();
        let tsc = hw.tsc();
        let ideal = self.member.ideal(now.ns, self.khz);
        let behind = ideal.wrapping_sub(tsc.at(now.tsc));
        if behind as i64 <= 0 {
            return false;
        }
        hw.set_tsc(tsc.moved(behind));
        true
    }

    /// Tells the guest the time. Sleeps.
    pub(crate) fn tell(&mut self, tsc: GuestTsc, memory: &GuestMemory, shared: &VcpuShared) {
        if core::mem::take(&mut self.moved) {
            self.vm.refresh_others();
        }
        let Some(area) = &mut self.area else {
            return;
        };
        let mut time = self.vm.vcpu_time(tsc);
        if core::mem::take(&mut self.stopped) {
            time.flags |= GUEST_STOPPED;
        }
        // A guest that has its structure where there is no memory is not told.
        let _ = write_time(area, time, memory, shared);
    }

    /// Writes KVM_WALL_CLOCK, and when the clock began to where that is. Sleeps.
    pub(crate) fn set_wall_clock(&self, gpa: u64, memory: &GuestMemory, shared: &VcpuShared) {
        self.vm.wall_clock.store(gpa, Ordering::Relaxed);
        if gpa != 0 {
            let epoch = WallClock(self.vm.epoch());
            // As above.
            let _ = write_wall_clock(gpa, epoch, memory, shared);
        }
    }

    /// KVM_WALL_CLOCK.
    pub(crate) fn wall_clock(&self) -> u64 {
        self.vm.wall_clock.load(Ordering::Relaxed)
    }
}

fn write_time(
    area: &mut GuestStruct,
    mut time: VcpuTime,
    memory: &GuestMemory,
    shared: &VcpuShared,
) -> Result<(), MemError> {
    let (mut old, mut flags) = ([0; 4], [0]);
    area.read(memory, 0, &mut old)?;
    area.read(memory, VcpuTime::FLAGS as u64, &mut flags)?;
    // That one is the guest's to take back.
    time.flags |= flags[0] & GUEST_STOPPED;
    let (odd, even) = versions(u32::from_le_bytes(old));
    // Other vCPUs may be reading. What one CPU stores, others see in that order.
    area.write(memory, 0, &odd.to_le_bytes(), shared)?;
    area.write(memory, 4, &time.bytes(odd)[4..], shared)?;
    area.write(memory, 0, &even.to_le_bytes(), shared)
}

fn write_wall_clock(
    gpa: u64,
    epoch: WallClock,
    memory: &GuestMemory,
    shared: &VcpuShared,
) -> Result<(), MemError> {
    let mut old = [0; 4];
    memory.read(gpa, &mut old)?;
    let (odd, even) = versions(u32::from_le_bytes(old));
    memory.write(gpa, &odd.to_le_bytes(), shared)?;
    memory.write(gpa, &epoch.bytes(odd), shared)?;
    memory.write(gpa, &even.to_le_bytes(), shared)
}
