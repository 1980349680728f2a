/* SPDX-License-Identifier: GPL-2.0 */
/*
 * C helpers of guest time: the host's clocks, all of one moment, and word of
 * their having another source.
 */
#ifndef RKVM_CLOCK_HELPERS_H
#define RKVM_CLOCK_HELPERS_H

#include <linux/types.h>

/**
 * struct rkvm_host_time - what the host's clocks say at one moment
 * @ns: nanoseconds since boot, sleep included, by the hardware's own rate
 * @real: CLOCK_REALTIME in nanoseconds
 * @tsc: the time-stamp counter
 * @by_tsc: the other two were computed from it
 */
struct rkvm_host_time {
	u64 ns;
	u64 real;
	u64 tsc;
	bool by_tsc;
};

/* In any context but while timekeeping is suspended. */
void rkvm_host_time(struct rkvm_host_time *t);

/* Whether the counters of all CPUs agree. */
bool rkvm_tsc_is_stable(void);

/*
 * Has changed(arg) called, by a thread that may sleep, after the host has begun
 * or ceased to tell the time by its time-stamp counter. -EBUSY if somebody does
 * so already. No call is under way any more when rkvm_host_time_unwatch()
 * returns.
 */
int rkvm_host_time_watch(void (*changed)(const void *arg), const void *arg);
void rkvm_host_time_unwatch(void);

#endif
