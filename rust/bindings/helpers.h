/* SPDX-License-Identifier: GPL-2.0 */
/*
 * C helpers: kernel services that are inline functions, macros or per-CPU
 * variables, and so out of bindgen's sight. One line of C each where it can
 * be; the Rust side wraps them in linux/ and vmx/.
 */
#ifndef RKVM_HELPERS_H
#define RKVM_HELPERS_H

#include <linux/hrtimer.h>
#include <linux/jump_label.h>
#include <linux/rcuwait.h>
#include <linux/types.h>

struct fpu_guest;
struct page;
struct preempt_notifier;
struct preempt_ops;

/**
 * struct rkvm_host_segments - the thread's segment state, saved over guest runs
 * @fs_base: user FS base
 * @gs_base: the kernel's own GS base on this CPU
 * @kernel_gs_base: user GS base, in MSR_KERNEL_GS_BASE while in the kernel
 * @ds: user selectors; those of FS and GS only matter if not null
 * @es: ditto
 * @fs: ditto
 * @gs: ditto
 * @ldt: LDT selector
 */
struct rkvm_host_segments {
	u64 fs_base;
	u64 gs_base;
	u64 kernel_gs_base;
	u16 ds;
	u16 es;
	u16 fs;
	u16 gs;
	u16 ldt;
};

/**
 * struct rkvm_host_tables - this CPU's descriptor tables
 */
struct rkvm_host_tables {
	u64 gdt;
	u64 idt;
	u64 tss;
	u64 sysenter_esp;
};

/* Both with preemption off; restore undoes what VM exits did to the segments. */
void rkvm_host_segments_save(struct rkvm_host_segments *s);
void rkvm_host_segments_restore(const struct rkvm_host_segments *s);
void rkvm_host_tables(struct rkvm_host_tables *t);

/* Selectors and the rest of the host state that never changes. */
u16 rkvm_kernel_cs(void);
u16 rkvm_kernel_ds(void);
u16 rkvm_kernel_tr(void);

void rkvm_local_irq_disable(void);
void rkvm_local_irq_enable(void);
void rkvm_preempt_disable(void);
void rkvm_preempt_enable(void);
int rkvm_smp_processor_id(void);
void rkvm_interrupt_self(void);

/*
 * Work that must be done before a guest is entered: signals, reschedule. The
 * first is for the last look, with interrupts off.
 */
bool rkvm_guest_entry_work_pending(void);
bool rkvm_guest_entry_work_seen(void);
int rkvm_guest_entry_work(void);
void rkvm_guest_timing_enter(void);
void rkvm_guest_timing_exit(void);
bool rkvm_signal_pending(void);
bool rkvm_detects_split_locks(void);
bool rkvm_allow_split_lock(u64 rip);
u32 rkvm_num_online_cpus(void);
bool rkvm_should_stop_polling(void);
/* Another signal mask, and back: they do not nest. */
void rkvm_sigmask_push(u64 mask);
void rkvm_sigmask_pop(void);

/* Restores the guest's FPU registers if the kernel used the FPU meanwhile. */
void rkvm_fpu_load(void);
/* The thread's guest FPU image, where a task's own would be. */
u64 rkvm_fpu_user_xfeatures(void);
u32 rkvm_fpu_uabi_size(struct fpu_guest *fpu);
u32 rkvm_fpu_uabi_max_size(void);
void *rkvm_fpu_fxsave(struct fpu_guest *fpu);
void rkvm_fpu_set_fxsave(struct fpu_guest *fpu, const void *area);

struct hrtimer;
/*
 * Timers of CLOCK_MONOTONIC that call back from the interrupt, by absolute
 * times in nanoseconds.
 */
void rkvm_hrtimer_setup(struct hrtimer *timer,
			enum hrtimer_restart (*function)(struct hrtimer *));
void rkvm_hrtimer_start(struct hrtimer *timer, s64 expires);
/* In the callback that restarts it. */
void rkvm_hrtimer_set_expires(struct hrtimer *timer, s64 expires);

struct rcuwait;
void rkvm_rcuwait_init(struct rcuwait *w);
/* Sleep until a bit of mask is set in the word, or a signal is pending. */
void rkvm_rcuwait_sleep(struct rcuwait *w, const u32 *word, u32 mask);

/* Has a CPU leave what it does, or sends it the posted-interrupt vector. */
void rkvm_interrupt_cpu(int cpu);
void rkvm_post_interrupt(int cpu);
#define RKVM_POSTED_INTR_VECTOR 0xf2

struct mutex;
/* 0, or -EINTR if the thread is being killed. */
int rkvm_mutex_lock_killable(struct mutex *lock);

/* An external interrupt or a machine check that ended a guest's run. */
void rkvm_handle_interrupt(u32 vector);
void rkvm_handle_machine_check(void);

void rkvm_preempt_notifier_init(struct preempt_notifier *n, struct preempt_ops *ops);

bool rkvm_cpu_has_vmx(void);
int rkvm_vmx_get_ref(void);
void rkvm_vmx_put_ref(void);
bool rkvm_cpu_has_l1tf(void);
bool rkvm_cpu_flushes_l1d(void);
bool rkvm_cpu_has_itlb_multihit(void);
void rkvm_enable_l1d_flush(void);
DECLARE_STATIC_KEY_FALSE(rkvm_l1d_flush);
/* Between two vCPUs on one CPU, where the kernel wants it. */
void rkvm_vcpu_switch_barrier(void);
/* After a guest ran, before user code may. */
void rkvm_mark_guest_ran(void);

bool rkvm_hw_breakpoint_active(void);
void rkvm_hw_breakpoint_restore(void);
void rkvm_set_debugregs(const u64 *dr);
void rkvm_clear_dr7(void);

u64 rkvm_get_debugctl(void);
void rkvm_set_debugctl(u64 value);
/* What IA32_SPEC_CTRL is for this thread, preemption off. */
u64 rkvm_host_spec_ctrl(void);
/* Of a CPU whose CR4.PKE is set. */
u32 rkvm_rdpkru(void);
void rkvm_wrpkru(u32 value);
u64 rkvm_xgetbv(void);
void rkvm_xsetbv(u64 value);
bool rkvm_host_osxsave(void);
u64 rkvm_host_xss(void);
int rkvm_rdmsr_safe(u32 msr, u64 *value);
int rkvm_wrmsr_safe(u32 msr, u64 value);
u32 rkvm_tsc_khz(void);
void rkvm_cpuid(u32 leaf, u32 subleaf, u32 *regs);

/* Whether VMX is on, on this CPU, for rkvm. */
bool rkvm_vmx_held(void);
void rkvm_set_vmx_held(bool held);

/* The VMCS that rkvm left current on this CPU, or all ones. */
u64 rkvm_current_vmcs(void);
void rkvm_set_current_vmcs(u64 phys);

/* CPUs, and what runs on each. */
int rkvm_cpuhp_setup(int (*online)(unsigned int), int (*offline)(unsigned int));
void rkvm_cpuhp_remove(int state);
int rkvm_on_cpu(int cpu, void (*f)(void *), void *arg);

/* The machine shuts down, restarts or starts another kernel, or is about to. */
bool rkvm_machine_goes_down(void);
/* Calls f on all CPUs; instructions of VMX may fault from now on. */
void rkvm_shut_down_cpus(void (*f)(void *));

void *rkvm_alloc_page(void);
void *rkvm_alloc_low_page(void);
void rkvm_free_page(void *va);
u64 rkvm_virt_to_phys(const void *va);
int rkvm_vma_insert_page(struct vm_area_struct *vma, u64 offset, void *va);
unsigned long rkvm_vma_pages(struct vm_area_struct *vma);
unsigned long rkvm_vma_pgoff(struct vm_area_struct *vma);
u64 rkvm_vma_flags(struct vm_area_struct *vma);

struct file;
struct file_operations;
/* A new file to be read only, at any position; or an error pointer. */
struct file *rkvm_readable_file(const char *name, const struct file_operations *ops, void *priv);

struct mm_struct *rkvm_current_mm(void);

/* What the scheduler knows of the current thread. */
bool rkvm_delays_are_counted(void);
u64 rkvm_waited_ns(void);
bool rkvm_current_is_runnable(void);

#endif
