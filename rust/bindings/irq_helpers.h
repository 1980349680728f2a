/* SPDX-License-Identifier: GPL-2.0 */
/*
 * C helpers of the interrupt controllers: locks that are taken in interrupt
 * handlers, eventfds that are followed, work for later.
 */
#ifndef RKVM_IRQ_HELPERS_H
#define RKVM_IRQ_HELPERS_H

#include <linux/lockdep_types.h>
#include <linux/spinlock_types_raw.h>
#include <linux/types.h>
#include <linux/wait.h>

struct file;
struct work_struct;

void rkvm_raw_spin_init(raw_spinlock_t *lock, const char *name, struct lock_class_key *key);
unsigned long rkvm_raw_spin_lock_irqsave(raw_spinlock_t *lock);
void rkvm_raw_spin_unlock_irqrestore(raw_spinlock_t *lock, unsigned long flags);

/* What a waiter on an eventfd is told: it was signalled; its file is gone. */
enum {
	RKVM_EVENTFD_SIGNALLED	= 1,
	RKVM_EVENTFD_CLOSED	= 2,
};

u32 rkvm_eventfd_news(void *key);

/*
 * Has entry's function called whenever the eventfd is signalled, before and
 * instead of all others who wait for it: 1 if it was signalled before, else 0;
 * -EBUSY if somebody else does so already.
 */
int rkvm_eventfd_follow(struct file *file, wait_queue_entry_t *entry, wait_queue_func_t func);

/* Whether a guest may put a CPU to sleep by itself: MWAIT, and timers that go on. */
bool rkvm_guest_may_mwait(void);

void rkvm_work_init(struct work_struct *work, void (*f)(struct work_struct *));
void rkvm_work_queue(struct work_struct *work);

#endif
