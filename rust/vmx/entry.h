/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The block of registers that the world switch in entry.S loads and stores,
 * seen by the assembly (offsets), by C (the struct) and by Rust (bindgen).
 */
#ifndef RKVM_VMX_ENTRY_H
#define RKVM_VMX_ENTRY_H

/* Byte offsets into struct rkvm_vmx_entry; enter.c asserts that they agree. */
#define RKVM_ENTRY_GPR(n)	((n) * 8)
#define RKVM_ENTRY_HOST_RSP	136

/* Flags of rkvm_vmx_enter(). */
#define RKVM_ENTER_RESUME	1

#ifndef __ASSEMBLER__
#include <linux/types.h>

/**
 * struct rkvm_vmx_entry - what crosses the world switch besides the VMCS
 * @gpr: the guest's general registers in the order of their encoding; RSP's
 *	 place is unused, the VMCS holds it
 * @cr2: the guest's CR2, which no VMCS field holds
 * @host_rsp: the value last written to the VMCS field HOST_RSP
 * @exit_reason: the VM-exit reason field, as read after the exit
 * @intr_info: the VM-exit interruption information, read if the exit was by
 *	       an exception, an NMI or an external interrupt
 */
struct rkvm_vmx_entry {
	u64 gpr[16];
	u64 cr2;
	u64 host_rsp;
	u32 exit_reason;
	u32 intr_info;
};

/*
 * Enters the guest of the current VMCS and returns after the next VM exit, 0
 * then, or 1 if the entry itself failed (VMfail). The caller has interrupts
 * off. An NMI that caused the exit has been handled on return.
 */
int rkvm_vmx_enter(struct rkvm_vmx_entry *e, unsigned int flags);

/* In entry.S. */
int rkvm_vmx_switch(struct rkvm_vmx_entry *e, unsigned int flags);
extern const char rkvm_vmx_exit_point[];
#endif
#endif
