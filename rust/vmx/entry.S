/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The world switch: VMLAUNCH or VMRESUME with the guest's general registers
 * loaded, and the way back (SDM vol. 3, 28 and 29: VM entries, VM exits).
 */
#include <linux/linkage.h>
#include <asm/asm.h>
#include <asm/msr-index.h>
#include <asm/nospec-branch.h>
#include <asm/percpu.h>
#include <asm/unwind_hints.h>
#include "entry.h"

	.section .noinstr.text, "ax"

/*
 * int rkvm_vmx_switch(struct rkvm_vmx_entry *e, unsigned int flags)
 *
 * Returns 0 after a VM exit and 1 when the instruction failed. Interrupts are
 * off; a VM exit leaves them so, with RFLAGS cleared but for its fixed bit.
 *
 * The stack while the guest runs, from the top: saved registers, then @e.
 */
SYM_FUNC_START(rkvm_vmx_switch)
	push	%rbp
	mov	%rsp, %rbp
	push	%r15
	push	%r14
	push	%r13
	push	%r12
	push	%rbx
	push	%rdi

	/*
	 * HOST_RSP seldom changes: the same thread enters from the same depth.
	 * 0x6c14 is the field's encoding (SDM vol. 3, appendix B.4.4).
	 */
	cmp	%rsp, RKVM_ENTRY_HOST_RSP(%rdi)
	je	.Lhost_rsp_current
	mov	$0x6c14, %eax
.Lwrite_host_rsp:
	vmwrite	%rsp, %rax
	mov	%rsp, RKVM_ENTRY_HOST_RSP(%rdi)
.Lhost_rsp_current:

	/* The flag must outlive the registers: MOV below leaves ZF alone. */
	test	$RKVM_ENTER_RESUME, %esi

	mov	RKVM_ENTRY_GPR(0)(%rdi), %rax
	mov	RKVM_ENTRY_GPR(1)(%rdi), %rcx
	mov	RKVM_ENTRY_GPR(2)(%rdi), %rdx
	mov	RKVM_ENTRY_GPR(3)(%rdi), %rbx
	mov	RKVM_ENTRY_GPR(5)(%rdi), %rbp
	mov	RKVM_ENTRY_GPR(6)(%rdi), %rsi
	mov	RKVM_ENTRY_GPR(8)(%rdi), %r8
	mov	RKVM_ENTRY_GPR(9)(%rdi), %r9
	mov	RKVM_ENTRY_GPR(10)(%rdi), %r10
	mov	RKVM_ENTRY_GPR(11)(%rdi), %r11
	mov	RKVM_ENTRY_GPR(12)(%rdi), %r12
	mov	RKVM_ENTRY_GPR(13)(%rdi), %r13
	mov	RKVM_ENTRY_GPR(14)(%rdi), %r14
	mov	RKVM_ENTRY_GPR(15)(%rdi), %r15
	mov	RKVM_ENTRY_GPR(7)(%rdi), %rdi

	/*
	 * CPUs with MDS, TAA, MMIO stale data or their kin: nothing of the host
	 * may stay in the buffers, whether or not the guest can reach devices.
	 * VERW changes ZF, so the choice is made first.
	 */
	jz	.Lclear_then_launch
	ALTERNATIVE_2 "", __stringify(VERW), X86_FEATURE_CLEAR_CPU_BUF_VM, \
		      __stringify(VERW), X86_FEATURE_CLEAR_CPU_BUF_VM_MMIO
	jmp	.Lresume
.Lclear_then_launch:
	ALTERNATIVE_2 "", __stringify(VERW), X86_FEATURE_CLEAR_CPU_BUF_VM, \
		      __stringify(VERW), X86_FEATURE_CLEAR_CPU_BUF_VM_MMIO
	jmp	.Llaunch

	/* objtool: the exit point below continues with this frame. */
	UNWIND_HINT_SAVE
.Lresume:
	vmresume
	jmp	.Lvmfail
.Llaunch:
	vmlaunch
	jmp	.Lvmfail

	/*
	 * They fault only if VMX was turned off under us, which happens when
	 * the machine goes down; anything else is a bug worth an oops.
	 */
	_ASM_EXTABLE(.Lwrite_host_rsp, .Lfault)
	_ASM_EXTABLE(.Lresume, .Lfault)
	_ASM_EXTABLE(.Llaunch, .Lfault)

SYM_INNER_LABEL_ALIGN(rkvm_vmx_exit_point, SYM_L_GLOBAL)
	UNWIND_HINT_RESTORE
	ENDBR

	/* RSP is the host's again; RDI is still the guest's. */
	push	%rdi
	mov	8(%rsp), %rdi
	mov	%rax, RKVM_ENTRY_GPR(0)(%rdi)
	mov	%rcx, RKVM_ENTRY_GPR(1)(%rdi)
	mov	%rdx, RKVM_ENTRY_GPR(2)(%rdi)
	mov	%rbx, RKVM_ENTRY_GPR(3)(%rdi)
	mov	%rbp, RKVM_ENTRY_GPR(5)(%rdi)
	mov	%rsi, RKVM_ENTRY_GPR(6)(%rdi)
	pop	RKVM_ENTRY_GPR(7)(%rdi)
	mov	%r8, RKVM_ENTRY_GPR(8)(%rdi)
	mov	%r9, RKVM_ENTRY_GPR(9)(%rdi)
	mov	%r10, RKVM_ENTRY_GPR(10)(%rdi)
	mov	%r11, RKVM_ENTRY_GPR(11)(%rdi)
	mov	%r12, RKVM_ENTRY_GPR(12)(%rdi)
	mov	%r13, RKVM_ENTRY_GPR(13)(%rdi)
	mov	%r14, RKVM_ENTRY_GPR(14)(%rdi)
	mov	%r15, RKVM_ENTRY_GPR(15)(%rdi)

	xor	%ebx, %ebx

.Lscrub:
	/*
	 * No register may carry a guest's value into the host's speculation,
	 * not even one that is about to be popped.
	 */
	xor	%eax, %eax
	xor	%ecx, %ecx
	xor	%edx, %edx
	xor	%ebp, %ebp
	xor	%esi, %esi
	xor	%edi, %edi
	xor	%r8d, %r8d
	xor	%r9d, %r9d
	xor	%r10d, %r10d
	xor	%r11d, %r11d
	xor	%r12d, %r12d
	xor	%r13d, %r13d
	xor	%r14d, %r14d
	xor	%r15d, %r15d

	/* Before the first RET: the return stack may be the guest's making. */
	FILL_RETURN_BUFFER %rcx, RSB_CLEAR_LOOPS, X86_FEATURE_RSB_VMEXIT, \
			   X86_FEATURE_RSB_VMEXIT_LITE

	/*
	 * The guest runs with the host's SPEC_CTRL: it is offered none of its
	 * own. Legacy IBRS must nevertheless be written again after a move to
	 * a more privileged predictor mode.
	 */
	ALTERNATIVE "jmp .Librs_done", "", X86_FEATURE_KERNEL_IBRS
	mov	$MSR_IA32_SPEC_CTRL, %ecx
	mov	PER_CPU_VAR(x86_spec_ctrl_current), %rdx
	mov	%edx, %eax
	shr	$32, %rdx
	wrmsr
.Librs_done:
	CLEAR_BRANCH_HISTORY_VMEXIT

	mov	%ebx, %eax
	pop	%rdi
	pop	%rbx
	pop	%r12
	pop	%r13
	pop	%r14
	pop	%r15
	pop	%rbp
	RET

.Lfault:
	cmpb	$0, virt_rebooting(%rip)
	jne	.Lvmfail
	ud2
.Lvmfail:
	mov	$1, %ebx
	jmp	.Lscrub
SYM_FUNC_END(rkvm_vmx_switch)
