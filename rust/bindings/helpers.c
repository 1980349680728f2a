// SPDX-License-Identifier: GPL-2.0
/* C helpers: see helpers.h for what and why. */
#include <linux/anon_inodes.h>
#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/entry-common.h>
#include <linux/entry-virt.h>
#include <linux/fs.h>
#include <linux/hrtimer.h>
#include <linux/kvm_host.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/preempt.h>
#include <linux/rcuwait.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/stat.h>
#include <linux/smp.h>
#include <asm/apic.h>
#include <asm/cpu.h>
#include <asm/cpu_entry_area.h>
#include <asm/cpufeature.h>
#include <asm/cpuid/api.h>
#include <asm/debugreg.h>
#include <asm/desc.h>
#include <asm/fpu/api.h>
#include <asm/fpu/xcr.h>
#include <asm/fred.h>
#include <asm/irq_vectors.h>
#include <asm/mce.h>
#include <asm/mmu_context.h>
#include <asm/msr.h>
#include <asm/nospec-branch.h>
#include <asm/processor.h>
#include <asm/spec-ctrl.h>
#include <asm/tsc.h>
#include <asm/virt.h>
#include <asm/vmx.h>

#include <trace/events/ipi.h>

#include "helpers.h"

DEFINE_STATIC_KEY_FALSE(rkvm_l1d_flush);

void rkvm_host_segments_save(struct rkvm_host_segments *s)
{
	savesegment(ds, s->ds);
	savesegment(es, s->es);
	store_ldt(s->ldt);
	current_save_fsgs();
	s->fs = current->thread.fsindex;
	s->gs = current->thread.gsindex;
	s->fs_base = current->thread.fsbase;
	s->kernel_gs_base = current->thread.gsbase;
	s->gs_base = cpu_kernelmode_gs_base(raw_smp_processor_id());
}

void rkvm_host_segments_restore(const struct rkvm_host_segments *s)
{
	if (unlikely(s->ldt || (s->gs & 7))) {
		if (s->ldt)
			asm volatile("lldt %0" : : "m" (s->ldt));
		load_gs_index(s->gs);
	}
	if (unlikely(s->fs & 7))
		loadsegment(fs, s->fs);
	if (unlikely(s->ds | s->es)) {
		loadsegment(ds, s->ds);
		loadsegment(es, s->es);
	}
	/* A VM exit sets the limits of GDT and TSS to their greatest. */
	invalidate_tss_limit();
	wrmsrq(MSR_KERNEL_GS_BASE, s->kernel_gs_base);
	load_fixmap_gdt(raw_smp_processor_id());
}

void rkvm_host_tables(struct rkvm_host_tables *t)
{
	int cpu = raw_smp_processor_id();
	struct desc_ptr idt;

	store_idt(&idt);
	t->gdt = (u64)get_current_gdt_ro();
	t->idt = idt.address;
	t->tss = (u64)&get_cpu_entry_area(cpu)->tss.x86_tss;
	t->sysenter_esp = IS_ENABLED(CONFIG_IA32_EMULATION) ?
			  (u64)(cpu_entry_stack(cpu) + 1) : 0;
}

u16 rkvm_kernel_cs(void) { return __KERNEL_CS; }
u16 rkvm_kernel_ds(void) { return __KERNEL_DS; }
u16 rkvm_kernel_tr(void) { return GDT_ENTRY_TSS * 8; }

void rkvm_local_irq_disable(void) { local_irq_disable(); }
void rkvm_local_irq_enable(void) { local_irq_enable(); }
void rkvm_preempt_disable(void) { preempt_disable(); }
void rkvm_preempt_enable(void) { preempt_enable(); }
int rkvm_smp_processor_id(void) { return raw_smp_processor_id(); }
void rkvm_interrupt_self(void) { smp_send_reschedule(raw_smp_processor_id()); }

bool rkvm_guest_entry_work_pending(void)
{
	return xfer_to_guest_mode_work_pending();
}

bool rkvm_guest_entry_work_seen(void)
{
	return __xfer_to_guest_mode_work_pending();
}

int rkvm_guest_entry_work(void)
{
	return xfer_to_guest_mode_handle_work();
}

void rkvm_guest_timing_enter(void) { guest_timing_enter_irqoff(); }
void rkvm_guest_timing_exit(void) { guest_timing_exit_irqoff(); }
bool rkvm_signal_pending(void) { return signal_pending(current); }

bool rkvm_detects_split_locks(void)
{
	return boot_cpu_has(X86_FEATURE_SPLIT_LOCK_DETECT);
}

bool rkvm_allow_split_lock(u64 rip) { return handle_guest_split_lock(rip); }
u32 rkvm_num_online_cpus(void) { return num_online_cpus(); }

void rkvm_sigmask_push(u64 mask)
{
	sigset_t set = { .sig = { mask } };

	static_assert(sizeof(set) == sizeof(mask));
	/* As pselect() does: signals are told by what is blocked for good. */
	sigprocmask(SIG_SETMASK, &set, &current->real_blocked);
}

void rkvm_sigmask_pop(void)
{
	sigprocmask(SIG_SETMASK, &current->real_blocked, NULL);
	sigemptyset(&current->real_blocked);
}

void rkvm_fpu_load(void)
{
	fpregs_assert_state_consistent();
	if (test_thread_flag(TIF_NEED_FPU_LOAD))
		switch_fpu_return();
}

u64 rkvm_fpu_user_xfeatures(void)
{
	return xstate_get_guest_group_perm();
}

u32 rkvm_fpu_uabi_size(struct fpu_guest *fpu) { return fpu->uabi_size; }
/* The kernel's own image has the same layout, and no component that guests may not have. */
u32 rkvm_fpu_uabi_max_size(void)
{
	u64 permitted = xstate_get_guest_group_perm();
	u32 size = sizeof(struct kvm_xsave), eax, ebx, ecx, edx, i;

	for (i = 2; i < 63 && boot_cpu_has(X86_FEATURE_XSAVE); i++) {
		if (!(permitted & BIT_ULL(i)))
			continue;
		cpuid_count(0xd, i, &eax, &ebx, &ecx, &edx);
		/* Components of XSS have no place in the standard format. */
		if (!(ecx & 1))
			size = max(size, ebx + eax);
	}
	return size;
}

void *rkvm_fpu_fxsave(struct fpu_guest *fpu) { return &fpu->fpstate->regs.fxsave; }

void rkvm_fpu_set_fxsave(struct fpu_guest *fpu, const void *area)
{
	union fpregs_state *regs = &fpu->fpstate->regs;

	/* The part that user space owns; the rest says what the kernel saved. */
	memcpy(&regs->fxsave, area, offsetof(struct fxregs_state, padding));
	regs->fxsave.mxcsr &= 0xffff;
	if (cpu_feature_enabled(X86_FEATURE_XSAVE))
		regs->xsave.header.xfeatures |= XFEATURE_MASK_FPSSE;
}

int rkvm_mutex_lock_killable(struct mutex *lock) { return mutex_lock_killable(lock); }

void rkvm_handle_interrupt(u32 vector)
{
	x86_entry_from_kvm(EVENT_TYPE_EXTINT, vector);
}

void rkvm_handle_machine_check(void)
{
#ifdef CONFIG_X86_MCE
	struct pt_regs regs = {
		.cs = 3,		/* As if from user mode: it was a guest. */
		.flags = X86_EFLAGS_IF,
	};

	do_machine_check(&regs);
#endif
}

void rkvm_preempt_notifier_init(struct preempt_notifier *n, struct preempt_ops *ops)
{
	preempt_notifier_init(n, ops);
}

bool rkvm_cpu_has_vmx(void) { return cpu_feature_enabled(X86_FEATURE_VMX); }
int rkvm_vmx_get_ref(void) { return x86_virt_get_ref(X86_FEATURE_VMX); }
void rkvm_vmx_put_ref(void) { x86_virt_put_ref(X86_FEATURE_VMX); }

bool rkvm_cpu_has_l1tf(void)
{
	return boot_cpu_has_bug(X86_BUG_L1TF) &&
	       l1tf_vmx_mitigation != VMENTER_L1D_FLUSH_NEVER &&
	       l1tf_vmx_mitigation != VMENTER_L1D_FLUSH_NOT_REQUIRED;
}

bool rkvm_cpu_has_itlb_multihit(void) { return boot_cpu_has_bug(X86_BUG_ITLB_MULTIHIT); }
bool rkvm_cpu_flushes_l1d(void) { return boot_cpu_has(X86_FEATURE_FLUSH_L1D); }
void rkvm_enable_l1d_flush(void) { static_branch_enable(&rkvm_l1d_flush); }

void rkvm_vcpu_switch_barrier(void)
{
	if (static_branch_likely(&switch_vcpu_ibpb))
		indirect_branch_prediction_barrier();
}

void rkvm_mark_guest_ran(void)
{
	if (cpu_feature_enabled(X86_FEATURE_IBPB_EXIT_TO_USER))
		this_cpu_write(x86_ibpb_exit_to_user, true);
}

bool rkvm_hw_breakpoint_active(void) { return hw_breakpoint_active(); }
void rkvm_hw_breakpoint_restore(void) { hw_breakpoint_restore(); }

void rkvm_set_debugregs(const u64 *dr)
{
	set_debugreg(dr[0], 0);
	set_debugreg(dr[1], 1);
	set_debugreg(dr[2], 2);
	set_debugreg(dr[3], 3);
}

void rkvm_clear_dr7(void) { set_debugreg(DR7_FIXED_1, 7); }

u64 rkvm_get_debugctl(void) { return get_debugctlmsr(); }
void rkvm_set_debugctl(u64 value) { update_debugctlmsr(value); }
u64 rkvm_xgetbv(void) { return xgetbv(XCR_XFEATURE_ENABLED_MASK); }
void rkvm_xsetbv(u64 value) { xsetbv(XCR_XFEATURE_ENABLED_MASK, value); }
u64 rkvm_host_spec_ctrl(void) { return spec_ctrl_current(); }
u32 rkvm_rdpkru(void) { return rdpkru(); }
void rkvm_wrpkru(u32 value) { wrpkru(value); }
bool rkvm_host_osxsave(void) { return boot_cpu_has(X86_FEATURE_OSXSAVE); }

u64 rkvm_host_xss(void)
{
	u64 xss = 0;

	if (boot_cpu_has(X86_FEATURE_XSAVES))
		rdmsrq(MSR_IA32_XSS, xss);
	return xss;
}

int rkvm_rdmsr_safe(u32 msr, u64 *value) { return rdmsrq_safe(msr, value); }
int rkvm_wrmsr_safe(u32 msr, u64 value) { return wrmsrq_safe(msr, value); }
u32 rkvm_tsc_khz(void) { return tsc_khz; }

void rkvm_cpuid(u32 leaf, u32 subleaf, u32 *regs)
{
	cpuid_count(leaf, subleaf, &regs[0], &regs[1], &regs[2], &regs[3]);
}

int rkvm_cpuhp_setup(int (*online)(unsigned int), int (*offline)(unsigned int))
{
	return cpuhp_setup_state(CPUHP_AP_ONLINE_DYN, "virt/rkvm:online", online, offline);
}

void rkvm_cpuhp_remove(int state) { cpuhp_remove_state(state); }

int rkvm_on_cpu(int cpu, void (*f)(void *), void *arg)
{
	return smp_call_function_single(cpu, f, arg, 1);
}

bool rkvm_machine_goes_down(void)
{
	return system_state > SYSTEM_RUNNING && system_state <= SYSTEM_RESTART;
}

void rkvm_shut_down_cpus(void (*f)(void *))
{
	virt_rebooting = true;
	/* Before VMX goes off: who faults then looks. */
	smp_wmb();
	on_each_cpu(f, NULL, 1);
}

void *rkvm_alloc_page(void) { return (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT); }

void *rkvm_alloc_low_page(void)
{
	return (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT | __GFP_DMA32);
}

void rkvm_free_page(void *va) { free_page((unsigned long)va); }
u64 rkvm_virt_to_phys(const void *va) { return virt_to_phys((void *)va); }

int rkvm_vma_insert_page(struct vm_area_struct *vma, u64 offset, void *va)
{
	return vm_insert_page(vma, vma->vm_start + offset, virt_to_page(va));
}

unsigned long rkvm_vma_pages(struct vm_area_struct *vma) { return vma_pages(vma); }
unsigned long rkvm_vma_pgoff(struct vm_area_struct *vma) { return vma->vm_pgoff; }
u64 rkvm_vma_flags(struct vm_area_struct *vma) { return vma->vm_flags; }

struct file *rkvm_readable_file(const char *name, const struct file_operations *ops, void *priv)
{
	return anon_inode_getfile_fmode(name, ops, priv, O_RDONLY, FMODE_PREAD);
}

struct mm_struct *rkvm_current_mm(void) { return current->mm; }

static DEFINE_PER_CPU(bool, vmx_held);

bool rkvm_vmx_held(void) { return this_cpu_read(vmx_held); }
void rkvm_set_vmx_held(bool held) { this_cpu_write(vmx_held, held); }

/*
 * The VMCS that rkvm left current on a CPU, or all ones: a physical address.
 * What is current and not this belongs to somebody else.
 */
static DEFINE_PER_CPU(u64, current_vmcs) = U64_MAX;

u64 rkvm_current_vmcs(void) { return this_cpu_read(current_vmcs); }
void rkvm_set_current_vmcs(u64 phys) { this_cpu_write(current_vmcs, phys); }

void rkvm_hrtimer_setup(struct hrtimer *timer,
			enum hrtimer_restart (*function)(struct hrtimer *))
{
	hrtimer_setup(timer, function, CLOCK_MONOTONIC, HRTIMER_MODE_ABS_HARD);
}

void rkvm_hrtimer_start(struct hrtimer *timer, s64 expires)
{
	hrtimer_start(timer, ns_to_ktime(expires), HRTIMER_MODE_ABS_HARD);
}

void rkvm_hrtimer_set_expires(struct hrtimer *timer, s64 expires)
{
	hrtimer_set_expires(timer, ns_to_ktime(expires));
}

void rkvm_rcuwait_init(struct rcuwait *w)
{
	rcuwait_init(w);
}

void rkvm_rcuwait_sleep(struct rcuwait *w, const u32 *word, u32 mask)
{
	rcuwait_wait_event(w, READ_ONCE(*word) & mask, TASK_INTERRUPTIBLE);
}

void rkvm_interrupt_cpu(int cpu)
{
	smp_send_reschedule(cpu);
}

void rkvm_post_interrupt(int cpu)
{
	BUILD_BUG_ON(RKVM_POSTED_INTR_VECTOR != POSTED_INTR_VECTOR);

	__apic_send_IPI_mask(cpumask_of(cpu), POSTED_INTR_VECTOR);
}

bool rkvm_should_stop_polling(void)
{
	return need_resched() || signal_pending(current) || !single_task_running();
}

bool rkvm_delays_are_counted(void) { return sched_info_on(); }

u64 rkvm_waited_ns(void)
{
#ifdef CONFIG_SCHED_INFO
	return current->sched_info.run_delay;
#else
	return 0;
#endif
}

bool rkvm_current_is_runnable(void) { return task_is_runnable(current); }
