// SPDX-License-Identifier: GPL-2.0

//! Statistics of VMs and vCPUs, and the files that KVM_GET_STATS_FD makes to read them (KVM API,
//! 4.133).
//!
//! Names are KVM's where what is counted is the same. What cannot happen here has no entry.

use crate::abi;
use crate::bindings as b;
use crate::linux::file;
use crate::linux::file::FileObject;
use crate::linux::user;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering;
use kernel::prelude::*;
use kernel::str::CStr;
use kernel::str::CString;
use kernel::sync::Arc;
use kernel::sync::ArcBorrow;
use kernel::transmute::AsBytes;

/// Bytes of a name, the zero at its end included.
const NAME_SIZE: usize = 48;

const _: () = assert!(size_of::<abi::kvm_stats_desc>() == 16 + NAME_SIZE);

/// A count that one thread at a time makes, and any may read.
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Counts one more. By who holds the vCPU's mutex; it is one instruction, without a lock prefix.
    #[inline(always)]
    pub(crate) fn bump(&self) {
        let next = self.0.load(Ordering::Relaxed).wrapping_add(1);
        self.0.store(next, Ordering::Relaxed);
    }
}

macro_rules! vcpu_stats {
    ($($(#[$doc:meta])* $field:ident,)*) => {
        /// What a vCPU counts.
        pub(crate) struct VcpuStats {
            $($(#[$doc])* pub(crate) $field: Counter,)*
        }

        impl VcpuStats {
            /// All zero.
            pub(crate) const fn new() -> Self {
                Self { $($field: Counter(AtomicU64::new(0)),)* }
            }

            /// What each is, in the order of [`values`](Self::values).
            pub(crate) const DESCRIPTIONS: &'static [Description] =
                &[$(Description::cumulative(stringify!($field)),)*];

            /// Calls `f` with each value.
            pub(crate) fn values(&self, f: &mut dyn FnMut(u64) -> Result) -> Result {
                $(f(self.$field.0.load(Ordering::Relaxed))?;)*
                Ok(())
            }
        }
    };
}

vcpu_stats! {
    /// The processor left the guest.
    exits,
    /// EPT violations, or page faults where the guest's tables are shadowed.
    pf_taken,
    /// Page faults that were the guest's own.
    pf_guest,
    /// The guest executed INVLPG, which exits where its tables are shadowed.
    invlpg,
    /// Those that were resolved by mapping what was missing.
    pf_fixed,
    /// Those that were accesses to devices.
    pf_emulate,
    /// Translations of guest addresses were dropped: another CPU asked for it, or the vCPU came to
    /// another CPU, or the guest wrote CR0 or CR4.
    tlb_flush,
    /// The guest accessed a port.
    io_exits,
    /// The VMM was asked to access a device for the guest.
    mmio_exits,
    /// KVM_RUN ended because of a signal.
    signal_exits,
    /// KVM_RUN ended because the guest could take an interrupt, for which the VMM had asked.
    request_irq_exits,
    /// The guest could take an interrupt that was waiting.
    irq_window_exits,
    /// The same for an NMI.
    nmi_window_exits,
    /// The guest executed HLT.
    halt_exits,
    /// A halted vCPU waited for an interrupt without giving up its CPU.
    halt_attempted_poll,
    /// One came meanwhile.
    halt_successful_poll,
    /// A halted vCPU was woken.
    halt_wakeup,
    /// The guest executed PAUSE in a loop.
    directed_yield_attempted,
    /// Another vCPU got the CPU then.
    directed_yield_successful,
    /// An interrupt of the host's came while the guest ran.
    irq_exits,
    /// The guest's FPU state was exchanged for the thread's: once for each KVM_RUN.
    fpu_reload,
    /// The emulator was given an instruction.
    insn_emulation,
    /// It could not do with it.
    insn_emulation_fail,
    /// The guest executed VMCALL.
    hypercalls,
    /// Interrupts that an entry was to deliver, again if it could not the first time.
    irq_injections,
    /// The same for NMIs.
    nmi_injections,
}

/// What a statistic is: counts, of no unit.
pub(crate) struct Description {
    name: &'static str,
    kind: u32,
}

impl Description {
    /// It only grows.
    pub(crate) const fn cumulative(name: &'static str) -> Self {
        let kind = b::KVM_STATS_TYPE_CUMULATIVE;
        Self { name, kind }
    }

    /// It says how things are now.
    pub(crate) const fn instant(name: &'static str) -> Self {
        let kind = b::KVM_STATS_TYPE_INSTANT;
        Self { name, kind }
    }

    /// As user space sees it; `index` says which it is in the data.
    fn as_abi(&self, index: u32) -> abi::kvm_stats_desc {
        abi::kvm_stats_desc {
            flags: self.kind | b::KVM_STATS_UNIT_NONE | b::KVM_STATS_BASE_POW10,
            exponent: 0,
            size: 1,
            offset: index.wrapping_mul(size_of::<u64>() as u32),
            bucket_size: 0,
            name: padded(self.name.as_bytes()),
        }
    }
}

/// `name`, cut if need be, and zeros, one at least.
fn padded(name: &[u8]) -> [u8; NAME_SIZE] {
    let mut out = [0; NAME_SIZE];
    for (to, from) in out.iter_mut().take(NAME_SIZE - 1).zip(name) {
        *to = *from;
    }
    out
}

/// What has statistics.
pub(crate) trait Source: Send + Sync + 'static {
    /// What each is, in the order of [`values`](Self::values).
    const DESCRIPTIONS: &'static [Description];

    /// Calls `f` with each value. May sleep, and so may `f`.
    fn values(&self, f: &mut dyn FnMut(u64) -> Result) -> Result;
}

/// A file of statistics. It keeps what it tells of.
struct StatsFile<S: Source> {
    source: Arc<S>,
    id: [u8; NAME_SIZE],
}

/// KVM_GET_STATS_FD: a file for the statistics of `source`: EMFILE, ENOMEM. `name` is what tools see
/// among a process's files, `id` what the file says of itself.
pub(crate) fn new_fd<S: Source>(name: &CStr, id: &CString, source: Arc<S>) -> Result<isize> {
    let id = padded(id.to_bytes());
    file::readable_fd(
        name,
        Arc::new(StatsFile { source, id }, GFP_KERNEL_ACCOUNT)?,
    )
}

impl<S: Source> FileObject for StatsFile<S> {
    const READABLE: bool = true;

    fn ioctl(_this: ArcBorrow<'_, Self>, _cmd: u32, _arg: usize) -> Result<isize> {
        Err(ENOTTY)
    }

    /// The file is the header, the id, the descriptions and the data, in this order.
    fn read(this: ArcBorrow<'_, Self>, to: usize, len: usize, from: u64) -> Result<usize> {
        let count = S::DESCRIPTIONS.len() as u32;
        let id_offset = size_of::<abi::kvm_stats_header>() as u32;
        let desc_offset = id_offset.wrapping_add(NAME_SIZE as u32);
        let desc_size = count.wrapping_mul(size_of::<abi::kvm_stats_desc>() as u32);
        let header = abi::kvm_stats_header {
            flags: 0,
            name_size: NAME_SIZE as u32,
            num_desc: count,
            id_offset,
            desc_offset,
            data_offset: desc_offset.wrapping_add(desc_size),
        };
        let mut out = Window::new(to, len, from);
        out.put(&header)?;
        out.put(&this.id)?;
        for (index, description) in (0..).zip(S::DESCRIPTIONS) {
            out.put(&description.as_abi(index))?;
        }
        this.source.values(&mut |value| out.put(&value))?;
        Ok(out.done)
    }
}

/// The part of a file that is being read.
struct Window {
    /// Where the next byte goes, in user space.
    to: usize,
    /// Bytes of the file that come before the part, from here on.
    skip: u64,
    /// Bytes that there is room for.
    room: usize,
    /// Bytes that were written.
    done: usize,
}

impl Window {
    fn new(to: usize, len: usize, from: u64) -> Self {
        Self {
            to,
            skip: from,
            room: len,
            done: 0,
        }
    }

    /// The next part of the file: EFAULT.
    fn put<T: AsBytes>(&mut self, part: &T) -> Result {
        let bytes = part.as_bytes();
        let skip = usize::try_from(self.skip)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        self.skip = self.skip.wrapping_sub(skip as u64);
        let n = bytes.len().wrapping_sub(skip).min(self.room);
        let wanted = bytes.get(skip..skip.wrapping_add(n)).unwrap_or(&[]);
        if !wanted.is_empty() {
            user::write_bytes(self.to, wanted)?;
        }
        self.to = self.to.wrapping_add(n);
        self.room = self.room.wrapping_sub(n);
        self.done = self.done.wrapping_add(n);
        Ok(())
    }
}
