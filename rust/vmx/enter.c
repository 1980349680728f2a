// SPDX-License-Identifier: GPL-2.0
/*
 * The part of a VM entry that must not be instrumented: between
 * guest_state_enter_irqoff() and guest_state_exit_irqoff() RCU does not watch
 * and lockdep believes interrupts to be on. Rust has no noinstr, so this is C.
 */
#include <linux/context_tracking.h>
#include <linux/entry-common.h>
#include <linux/kvm_host.h>
#include <asm/fred.h>
#include <asm/irq_vectors.h>
#include <asm/msr.h>
#include <asm/nospec-branch.h>
#include <asm/trapnr.h>
#include <asm/vmx.h>

#include "entry.h"
#include "../bindings/helpers.h"

static_assert(offsetof(struct rkvm_vmx_entry, gpr) == RKVM_ENTRY_GPR(0));
static_assert(offsetof(struct rkvm_vmx_entry, host_rsp) == RKVM_ENTRY_HOST_RSP);

static __always_inline unsigned long vmread(unsigned long field)
{
	unsigned long value;

	asm volatile("vmread %1, %0" : "=r" (value) : "r" (field) : "cc");
	return value;
}

noinstr int rkvm_vmx_enter(struct rkvm_vmx_entry *e, unsigned int flags)
{
	int fail;

	guest_state_enter_irqoff();

	if (static_branch_unlikely(&rkvm_l1d_flush))
		native_wrmsrq(MSR_IA32_FLUSH_CMD, L1D_FLUSH);

	if (e->cr2 != native_read_cr2())
		native_write_cr2(e->cr2);

	fail = rkvm_vmx_switch(e, flags);

	e->cr2 = native_read_cr2();

	if (likely(!fail)) {
		u32 reason = vmread(VM_EXIT_REASON);

		e->exit_reason = reason;
		if (reason == EXIT_REASON_EXCEPTION_NMI ||
		    reason == EXIT_REASON_EXTERNAL_INTERRUPT) {
			e->intr_info = vmread(VM_EXIT_INTR_INFO);
			/*
			 * Further NMIs are blocked since the exit: hand this
			 * one on before anything can fault and IRET.
			 */
			if ((e->intr_info & INTR_INFO_INTR_TYPE_MASK) ==
			    INTR_TYPE_NMI_INTR)
				x86_entry_from_kvm(EVENT_TYPE_NMI, NMI_VECTOR);
		}
	}

	guest_state_exit_irqoff();
	return fail;
}
