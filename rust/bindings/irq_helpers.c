// SPDX-License-Identifier: GPL-2.0
/* C helpers of the interrupt controllers: see irq_helpers.h. */
#include <linux/eventfd.h>
#include <linux/poll.h>
#include <linux/spinlock.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <asm/cpufeature.h>

#include "irq_helpers.h"

void rkvm_raw_spin_init(raw_spinlock_t *lock, const char *name, struct lock_class_key *key)
{
#ifdef CONFIG_DEBUG_SPINLOCK
	__raw_spin_lock_init(lock, name, key, LD_WAIT_SPIN);
#else
	*lock = __RAW_SPIN_LOCK_UNLOCKED(lock);
#endif
}

unsigned long rkvm_raw_spin_lock_irqsave(raw_spinlock_t *lock)
{
	unsigned long flags;

	raw_spin_lock_irqsave(lock, flags);
	return flags;
}

void rkvm_raw_spin_unlock_irqrestore(raw_spinlock_t *lock, unsigned long flags)
{
	raw_spin_unlock_irqrestore(lock, flags);
}

u32 rkvm_eventfd_news(void *key)
{
	__poll_t events = key_to_poll(key);

	return (events & EPOLLIN ? RKVM_EVENTFD_SIGNALLED : 0) |
	       (events & EPOLLHUP ? RKVM_EVENTFD_CLOSED : 0);
}

struct follow {
	poll_table table;
	wait_queue_entry_t *entry;
	int error;
};

static void follow_queue(struct file *file, wait_queue_head_t *queue, poll_table *table)
{
	struct follow *follow = container_of(table, struct follow, table);

	follow->error = add_wait_queue_priority_exclusive(queue, follow->entry);
}

int rkvm_eventfd_follow(struct file *file, wait_queue_entry_t *entry, wait_queue_func_t func)
{
	struct follow follow = { .entry = entry, .error = -EINVAL };
	__poll_t events;

	init_waitqueue_func_entry(entry, func);
	init_poll_funcptr(&follow.table, follow_queue);
	events = vfs_poll(file, &follow.table);
	if (follow.error)
		return follow.error;
	return events & EPOLLIN ? 1 : 0;
}

bool rkvm_guest_may_mwait(void)
{
	return boot_cpu_has(X86_FEATURE_MWAIT) && boot_cpu_has(X86_FEATURE_ARAT) &&
	       !boot_cpu_has_bug(X86_BUG_MONITOR);
}

void rkvm_work_init(struct work_struct *work, void (*f)(struct work_struct *))
{
	INIT_WORK(work, f);
}

void rkvm_work_queue(struct work_struct *work) { schedule_work(work); }
