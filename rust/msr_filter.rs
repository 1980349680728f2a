// SPDX-License-Identifier: GPL-2.0

//! What a VMM wants to know of its guests' MSRs: which they may not access, and of which failed accesses it wants to be asked
//! instead (KVM API, KVM_X86_SET_MSR_FILTER and KVM_CAP_X86_USER_SPACE_MSR).
//!
//! Each vCPU has a reference to the filter, which never changes: a new one takes its place, and
//! [`Request::MsrFilter`] has the vCPUs fetch it and let through what it allows. So no lock is taken for an access.

use crate::abi::kvm_msr_filter;
use crate::bindings::KVM_MSR_EXIT_REASON_FILTER;
use crate::bindings::KVM_MSR_EXIT_REASON_INVAL;
use crate::bindings::KVM_MSR_EXIT_REASON_UNKNOWN;
use crate::bindings::KVM_MSR_FILTER_DEFAULT_DENY;
use crate::linux::user;
use crate::tlb::Request;
use crate::tlb::VcpuSet;
use crate::x86::msr::filter;
use crate::x86::msr::filter::Access;
use crate::x86::msr::filter::Range;
use crate::x86::msr::Msr;
use crate::x86::msr::MsrError;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering;
use kernel::new_mutex;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::sync::Mutex;

/// The reasons that KVM_CAP_X86_USER_SPACE_MSR knows.
const REASONS: u32 =
    KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER;

/// What a failed access is called in `kvm_run`.
pub(crate) fn reason(error: MsrError) -> u32 {
    match error {
        MsrError::Unknown => KVM_MSR_EXIT_REASON_UNKNOWN,
        MsrError::Refused => KVM_MSR_EXIT_REASON_INVAL,
        MsrError::Filtered => KVM_MSR_EXIT_REASON_FILTER,
    }
}

/// A filter.
pub(crate) struct MsrFilter {
    default_allow: bool,
    ranges: KVec<Range<KVVec<u64>>>,
}

impl MsrFilter {
    /// The filter that the user describes, or none if it lets everything through. EINVAL for unknown flags, a range without flags
    /// or with too many MSRs, and if it denies everything, as a VMM that means this has forgotten its ranges; EFAULT, ENOMEM.
    fn from_user(given: &kvm_msr_filter) -> Result<Option<Arc<Self>>> {
        if given.flags & !KVM_MSR_FILTER_DEFAULT_DENY != 0 {
            return Err(EINVAL);
        }
        let default_allow = given.flags & KVM_MSR_FILTER_DEFAULT_DENY == 0;
        let used = || given.ranges.iter().filter(|range| range.nmsrs != 0);
        if used().next().is_none() {
            return if default_allow { Ok(None) } else { Err(EINVAL) };
        }
        let mut ranges = KVec::with_capacity(used().count(), GFP_KERNEL_ACCOUNT)?;
        for range in used() {
            let words = filter::words(range.flags, range.nmsrs).ok_or(EINVAL)?;
            let bits = user::read_array(range.bitmap as usize, words)?;
            let range = Range::new(range.flags, range.base, range.nmsrs, bits);
            ranges.push(range, GFP_KERNEL_ACCOUNT)?;
        }
        let filter = Self {
            default_allow,
            ranges,
        };
        Ok(Some(Arc::new(filter, GFP_KERNEL_ACCOUNT)?))
    }

    /// Whether the guest may access an MSR.
    pub(crate) fn allows(&self, msr: Msr, access: Access) -> bool {
        filter::allows(&self.ranges, self.default_allow, msr, access)
    }
}

/// What is the same for the MSRs of all vCPUs of a VM.
#[pin_data]
pub(crate) struct MsrRules {
    /// The filter, for vCPUs to fetch.
    #[pin]
    filter: Mutex<Option<Arc<MsrFilter>>>,
    /// KVM_MSR_EXIT_REASON_*: the VMM is asked instead of a #GP.
    exits: AtomicU32,
    /// The guest has no MSR_PLATFORM_INFO to read.
    hides_platform_info: AtomicBool,
}

impl MsrRules {
    /// Everything is allowed, and failed accesses are the guest's to handle.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            filter <- new_mutex!(None, "rkvm_msr_filter"),
            exits: AtomicU32::new(0),
            hides_platform_info: AtomicBool::new(false),
        }? Error)
    }

    /// KVM_X86_SET_MSR_FILTER. When it returns, no vCPU runs the guest by the old filter.
    pub(crate) fn set_filter(&self, given: &kvm_msr_filter, vcpus: &VcpuSet) -> Result {
        let filter = MsrFilter::from_user(given)?;
        // The old one goes without the lock.
        let _old = core::mem::replace(&mut *self.filter.lock(), filter);
        vcpus.request_all_and_wait(Request::MsrFilter);
        Ok(())
    }

    /// The filter; none if it lets everything through.
    pub(crate) fn filter(&self) -> Option<Arc<MsrFilter>> {
        self.filter.lock().clone()
    }

    /// KVM_CAP_X86_USER_SPACE_MSR: EINVAL for reasons that there are not.
    pub(crate) fn set_exits(&self, reasons: u64) -> Result {
        if reasons & !u64::from(REASONS) != 0 {
            return Err(EINVAL);
        }
        self.exits.store(reasons as u32, Ordering::Relaxed);
        Ok(())
    }

    /// Whether the VMM wants to be asked of accesses that fail so.
    pub(crate) fn asks_vmm(&self, error: MsrError) -> bool {
        self.exits.load(Ordering::Relaxed) & reason(error) != 0
    }

    /// KVM_CAP_MSR_PLATFORM_INFO.
    pub(crate) fn show_platform_info(&self, show: bool) {
        self.hides_platform_info.store(!show, Ordering::Relaxed);
    }

    /// Whether the guest can read MSR_PLATFORM_INFO.
    pub(crate) fn shows_platform_info(&self) -> bool {
        !self.hides_platform_info.load(Ordering::Relaxed)
    }
}
