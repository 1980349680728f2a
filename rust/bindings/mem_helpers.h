/* SPDX-License-Identifier: GPL-2.0 */
/*
 * C helpers of the guest-memory layers: locks, user access, host pages and
 * page-table pages. One line of C each where it can be; the Rust side wraps
 * them in linux/, mmu/ and tlb.rs.
 */
#ifndef RKVM_MEM_HELPERS_H
#define RKVM_MEM_HELPERS_H

#include <linux/types.h>
#include <linux/rwlock_types.h>
#include <linux/srcu.h>

struct cpumask;
struct mm_struct;
struct page;

/* Every rwlock_t made here has one lockdep class, that of a VM's MMU lock. */
void rkvm_rwlock_init(rwlock_t *lock);
void rkvm_read_lock(rwlock_t *lock);
void rkvm_read_unlock(rwlock_t *lock);
void rkvm_write_lock(rwlock_t *lock);
void rkvm_write_unlock(rwlock_t *lock);

/* Every srcu_struct made here has one lockdep class, that of a VM's memslots. */
int rkvm_srcu_init(struct srcu_struct *ssp);
int rkvm_srcu_read_lock(struct srcu_struct *ssp);
void rkvm_srcu_read_unlock(struct srcu_struct *ssp, int idx);

void rkvm_cond_resched(void);

/*
 * User memory. Accesses of 1, 2, 4 and 8 bytes are single instructions, so that
 * what is naturally aligned is read and written whole. 0 or -EFAULT.
 */
bool rkvm_user_range_ok(u64 addr, u64 size);
int rkvm_user_read(void *dst, u64 src, u64 len);
int rkvm_user_write(u64 dst, const void *src, u64 len);
/* Without faults: -EFAULT too if the page is not there. In any context. */
int rkvm_user_write_nofault(u64 dst, const void *src, u64 len);
int rkvm_user_read_nofault(void *dst, u64 src, u64 len);
/* 1, 2, 4 or 8 bytes. 0: exchanged; 1: they were not @old; or -EFAULT. */
int rkvm_user_cmpxchg(u64 addr, u8 len, u64 old, u64 new);

/* Anonymous shared memory of the current task: its address, or an error. */
long rkvm_user_map(u64 size);
void rkvm_user_unmap(u64 addr, u64 size);

/* Host pages. */
u64 rkvm_page_to_pfn(struct page *page);
void rkvm_page_put(struct page *page);
void rkvm_page_put_used(struct page *page, bool dirty);
bool rkvm_pfn_is_mmio(u64 pfn);
/* 1, 2 or 3: how @hva is mapped in @mm now; 1 too if it is not mapped. */
int rkvm_host_mapping_level(struct mm_struct *mm, u64 hva);
void rkvm_send_hwpoison(u64 hva);

/* Page-table pages: zeroed, charged to the task, counted as SecPageTables. */
void *rkvm_table_alloc(void);
void rkvm_table_free(void *table);
u64 rkvm_table_phys(const void *table);
void *rkvm_table_virt(u64 phys);
void rkvm_table_set_link(void *table, u64 link);
u64 rkvm_table_link(const void *table);

/* A shrinker of objects that @data has: @count says how many, @scan frees up to so many of them. */
struct shrinker;
struct shrinker *rkvm_shrinker_register(void *data, u64 (*count)(const void *data),
					u64 (*scan)(const void *data, u64 nr));
/* Waits until neither runs. */
void rkvm_shrinker_free(struct shrinker *shrinker);

/* Sends an IPI to each CPU of @mask, waits until it has taken it, and clears @mask. */
void rkvm_ipi_and_wait(struct cpumask *mask);

#endif
