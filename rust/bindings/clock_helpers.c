// SPDX-License-Identifier: GPL-2.0
/* C helpers: see clock_helpers.h for what and why. */
#include <linux/clocksource.h>
#include <linux/clocksource_ids.h>
#include <linux/irq_work.h>
#include <linux/pvclock_gtod.h>
#include <linux/timekeeper_internal.h>
#include <linux/timekeeping.h>
#include <linux/workqueue.h>
#include <asm/tsc.h>

#include "clock_helpers.h"

void rkvm_host_time(struct rkvm_host_time *t)
{
	struct system_time_snapshot snap = { };

	ktime_get_snapshot_id(CLOCK_REALTIME, &snap);
	/* The second summand changes while no thread runs. */
	t->ns = ktime_to_ns(ktime_add(snap.monoraw, ktime_mono_to_any(0, TK_OFFS_BOOT)));
	t->real = ktime_to_ns(snap.systime);
	t->by_tsc = true;
	if (snap.cs_id == CSID_X86_TSC) {
		t->tsc = snap.cycles;
	} else if (snap.hw_csid == CSID_X86_TSC && snap.cs_id != CSID_X86_KVM_CLK) {
		t->tsc = snap.hw_cycles;
	} else {
		t->tsc = rdtsc_ordered();
		t->by_tsc = false;
	}
}

bool rkvm_tsc_is_stable(void) { return !check_tsc_unstable(); }

static bool was_by_tsc;
static void (*watcher)(const void *arg);
static const void *watcher_arg;

static void tell(struct work_struct *work) { watcher(watcher_arg); }
static DECLARE_WORK(tell_work, tell);

/* Nothing may be queued while timekeeping is being updated. */
static void tell_later(struct irq_work *work) { schedule_work(&tell_work); }
static DEFINE_IRQ_WORK(tell_irq_work, tell_later);

static int timekeeping_updated(struct notifier_block *nb, unsigned long unused, void *priv)
{
	const struct timekeeper *tk = priv;
	int mode = tk->tkr_mono.clock->vdso_clock_mode;
	bool by_tsc = mode == VDSO_CLOCKMODE_TSC || mode == VDSO_CLOCKMODE_HVCLOCK;

	if (by_tsc != was_by_tsc) {
		was_by_tsc = by_tsc;
		irq_work_queue(&tell_irq_work);
	}
	return NOTIFY_DONE;
}

static struct notifier_block timekeeping_watch = { .notifier_call = timekeeping_updated };

int rkvm_host_time_watch(void (*changed)(const void *arg), const void *arg)
{
	if (cmpxchg(&watcher, NULL, changed))
		return -EBUSY;
	watcher_arg = arg;
	return pvclock_gtod_register_notifier(&timekeeping_watch);
}

void rkvm_host_time_unwatch(void)
{
	pvclock_gtod_unregister_notifier(&timekeeping_watch);
	irq_work_sync(&tell_irq_work);
	cancel_work_sync(&tell_work);
	/* Nobody looks at it any more; pairs with the cmpxchg() of the next watcher. */
	smp_store_release(&watcher, NULL);
}
