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

	/*
	 * A guest with an IA32_SPEC_CTRL of its own gets it as late as this:
	 * no RET and no indirect branch of the host's comes after it.
	 */
	cmpl	$0, RKVM_ENTRY_SWITCH_SPEC_CTRL(%rdi)
	je	.Lspec_ctrl_loaded
	mov	RKVM_ENTRY_SPEC_CTRL(%rdi), %rax
	mov	PER_CPU_VAR(x86_spec_ctrl_current), %rdx
	cmp	%rax, %rdx
	je	.Lspec_ctrl_loaded
	mov	$MSR_IA32_SPEC_CTRL, %ecx
	mov	%rax, %rdx
	shr	$32, %rdx
	wrmsr
.Lspec_ctrl_loaded:

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

	/* It writes the MSR without an exit, so what is there now is its own. */
	cmpl	$0, RKVM_ENTRY_SWITCH_SPEC_CTRL(%rdi)
	je	.Lspec_ctrl_saved
	mov	$MSR_IA32_SPEC_CTRL, %ecx
	rdmsr
	mov	%eax, RKVM_ENTRY_SPEC_CTRL(%rdi)
	mov	%edx, RKVM_ENTRY_SPEC_CTRL + 4(%rdi)
.Lspec_ctrl_saved:
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
	 * A guest that has never written IA32_SPEC_CTRL runs with the host's.
	 * Legacy IBRS must nevertheless be written again after a move to a
	 * more privileged predictor mode.
	 */
	mov	PER_CPU_VAR(x86_spec_ctrl_current), %rdx
	ALTERNATIVE "", "jmp .Lspec_ctrl_write", X86_FEATURE_KERNEL_IBRS
	mov	(%rsp), %rdi
	cmpl	$0, RKVM_ENTRY_SWITCH_SPEC_CTRL(%rdi)
	je	.Lspec_ctrl_hosts
	cmp	RKVM_ENTRY_SPEC_CTRL(%rdi), %rdx
	je	.Lspec_ctrl_hosts
.Lspec_ctrl_write:
	mov	$MSR_IA32_SPEC_CTRL, %ecx
	mov	%edx, %eax
	shr	$32, %rdx
	wrmsr
.Lspec_ctrl_hosts:
	/* No speculation past the write on the strength of those branches. */
	ALTERNATIVE "", "lfence", X86_FEATURE_MSR_SPEC_CTRL
	xor	%edi, %edi
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
