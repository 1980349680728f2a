// SPDX-License-Identifier: GPL-2.0
/* C helpers of the guest-memory layers: see mem_helpers.h. */
#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/pgtable.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/shrinker.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/spinlock.h>
#include <linux/srcu.h>
#include <linux/swap.h>
#include <linux/uaccess.h>
#include <linux/unaligned.h>
#include <linux/vmstat.h>
#include <asm/e820/api.h>
#include <asm/memtype.h>
#include <trace/events/ipi.h>

#include "mem_helpers.h"

void rkvm_rwlock_init(rwlock_t *lock) { rwlock_init(lock); }
void rkvm_read_lock(rwlock_t *lock) { read_lock(lock); }
void rkvm_read_unlock(rwlock_t *lock) { read_unlock(lock); }
void rkvm_write_lock(rwlock_t *lock) { write_lock(lock); }
void rkvm_write_unlock(rwlock_t *lock) { write_unlock(lock); }

int rkvm_srcu_init(struct srcu_struct *ssp) { return init_srcu_struct(ssp); }
int rkvm_srcu_read_lock(struct srcu_struct *ssp) { return srcu_read_lock(ssp); }
void rkvm_srcu_read_unlock(struct srcu_struct *ssp, int idx) { srcu_read_unlock(ssp, idx); }

void rkvm_cond_resched(void) { cond_resched(); }

bool rkvm_user_range_ok(u64 addr, u64 size)
{
	return addr == untagged_addr(addr) && access_ok((void __user *)addr, size);
}

#define USER_READ(type) ({						\
	type __v;							\
	int __r = get_user(__v, (type __user *)src);			\
									\
	if (!__r)							\
		put_unaligned(__v, (type *)dst);			\
	__r; })

int rkvm_user_read(void *dst, u64 src, u64 len)
{
	switch (len) {
	case 1:
		return USER_READ(u8);
	case 2:
		return USER_READ(u16);
	case 4:
		return USER_READ(u32);
	case 8:
		return USER_READ(u64);
	default:
		return copy_from_user(dst, (void __user *)src, len) ? -EFAULT : 0;
	}
}

#define USER_WRITE(type) \
	put_user(get_unaligned((const type *)(src)), (type __user *)(dst))

int rkvm_user_write(u64 dst, const void *src, u64 len)
{
	switch (len) {
	case 1:
		return USER_WRITE(u8);
	case 2:
		return USER_WRITE(u16);
	case 4:
		return USER_WRITE(u32);
	case 8:
		return USER_WRITE(u64);
	default:
		return copy_to_user((void __user *)dst, src, len) ? -EFAULT : 0;
	}
}

int rkvm_user_write_nofault(u64 dst, const void *src, u64 len)
{
	/* The VMM may be ending, and this be in the middle of a switch to no address space. */
	if (!current->mm)
		return -EFAULT;
	return copy_to_user_nofault((void __user *)dst, src, len);
}

static int user_read_words(void *dst, const u64 __user *src, u64 count)
{
	u64 i;

	if (!user_read_access_begin(src, count * sizeof(*src)))
		return -EFAULT;
	for (i = 0; i < count; i++) {
		u64 word;

		unsafe_get_user(word, src + i, fault);
		put_unaligned(word, (u64 *)dst + i);
	}
	user_read_access_end();
	return 0;
fault:
	user_read_access_end();
	return -EFAULT;
}

int rkvm_user_read_nofault(void *dst, u64 src, u64 len)
{
	int r;

	if (!current->mm)
		return -EFAULT;
	/*
	 * Aligned entries of a page table are read whole, each of them, as the guest may be
	 * writing them; copy_from_user_nofault() does not promise that.
	 */
	pagefault_disable();
	if (len > 8 && !((src | len) & 7))
		r = user_read_words(dst, (const u64 __user *)src, len / 8);
	else
		r = rkvm_user_read(dst, src, len);
	pagefault_enable();
	return r;
}

/* One function for each size: the macro has a label, and a function has each but once. */
#define DEFINE_USER_CMPXCHG(type)					\
static int user_cmpxchg_##type(u64 addr, u64 old, u64 new)		\
{									\
	type o = old;							\
									\
	return __try_cmpxchg_user((type __user *)addr, &o, (type)new, fault); \
}

DEFINE_USER_CMPXCHG(u8)
DEFINE_USER_CMPXCHG(u16)
DEFINE_USER_CMPXCHG(u32)
DEFINE_USER_CMPXCHG(u64)

int rkvm_user_cmpxchg(u64 addr, u8 len, u64 old, u64 new)
{
	if (!access_ok((void __user *)addr, len))
		return -EFAULT;
	switch (len) {
	case 1:
		return user_cmpxchg_u8(addr, old, new);
	case 2:
		return user_cmpxchg_u16(addr, old, new);
	case 4:
		return user_cmpxchg_u32(addr, old, new);
	case 8:
		return user_cmpxchg_u64(addr, old, new);
	default:
		return -EFAULT;
	}
}

long rkvm_user_map(u64 size)
{
	return vm_mmap(NULL, 0, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, 0);
}

void rkvm_user_unmap(u64 addr, u64 size)
{
	vm_munmap(addr, size);
}

u64 rkvm_page_to_pfn(struct page *page) { return page_to_pfn(page); }
void rkvm_page_put(struct page *page) { put_page(page); }

void rkvm_page_put_used(struct page *page, bool dirty)
{
	/* The zero page and its like belong to others: not to be marked. */
	if (!PageReserved(page)) {
		if (dirty)
			SetPageDirty(page);
		mark_page_accessed(page);
	}
	put_page(page);
}

bool rkvm_pfn_is_mmio(u64 pfn)
{
	/*
	 * A pfn with a struct page is a device's if nobody may use the page and
	 * the host does not cache it; reserved pages that it caches are memory
	 * all the same (NVDIMM).
	 */
	if (pfn_valid(pfn))
		return !is_zero_pfn(pfn) && PageReserved(pfn_to_page(pfn)) &&
		       (!pat_enabled() || pat_pfn_immune_to_uc_mtrr(pfn));

	return !e820__mapped_raw_any(PFN_PHYS(pfn), PFN_PHYS(pfn + 1) - 1,
				     E820_TYPE_RAM);
}

/*
 * The host's tables are freed only after an IPI to every CPU that might walk
 * them, so interrupts stay off. Each entry is read once: what it was when the
 * step was decided is what the step is taken with.
 */
static int mapping_level_irqsoff(struct mm_struct *mm, unsigned long hva)
{
	pgd_t pgd = READ_ONCE(*pgd_offset(mm, hva));
	p4d_t p4d;
	pud_t pud;
	pmd_t pmd;

	if (pgd_none(pgd))
		return 1;
	p4d = READ_ONCE(*p4d_offset(&pgd, hva));
	if (p4d_none(p4d) || !p4d_present(p4d))
		return 1;
	pud = READ_ONCE(*pud_offset(&p4d, hva));
	if (pud_none(pud) || !pud_present(pud))
		return 1;
	if (pud_leaf(pud))
		return 3;
	pmd = READ_ONCE(*pmd_offset(&pud, hva));
	if (pmd_none(pmd) || !pmd_present(pmd))
		return 1;
	return pmd_leaf(pmd) ? 2 : 1;
}

int rkvm_host_mapping_level(struct mm_struct *mm, u64 hva)
{
	unsigned long flags;
	int level;

	local_irq_save(flags);
	level = mapping_level_irqsoff(mm, hva);
	local_irq_restore(flags);
	return level;
}

void rkvm_send_hwpoison(u64 hva)
{
	send_sig_mceerr(BUS_MCEERR_AR, (void __user *)hva, PAGE_SHIFT, current);
}

void *rkvm_table_alloc(void)
{
	void *table = (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);

	if (table)
		mod_lruvec_page_state(virt_to_page(table), NR_SECONDARY_PAGETABLE, 1);
	return table;
}

void rkvm_table_free(void *table)
{
	mod_lruvec_page_state(virt_to_page(table), NR_SECONDARY_PAGETABLE, -1);
	set_page_private(virt_to_page(table), 0);
	free_page((unsigned long)table);
}

u64 rkvm_table_phys(const void *table) { return __pa(table); }
void *rkvm_table_virt(u64 phys) { return __va(phys); }

void rkvm_table_set_link(void *table, u64 link)
{
	set_page_private(virt_to_page(table), link);
}

u64 rkvm_table_link(const void *table) { return page_private(virt_to_page(table)); }

struct rkvm_shrinks {
	const void *data;
	u64 (*count)(const void *data);
	u64 (*scan)(const void *data, u64 nr);
};

static unsigned long count_objects(struct shrinker *shrinker, struct shrink_control *sc)
{
	struct rkvm_shrinks *shrinks = shrinker->private_data;

	return shrinks->count(shrinks->data) ?: SHRINK_EMPTY;
}

static unsigned long scan_objects(struct shrinker *shrinker, struct shrink_control *sc)
{
	struct rkvm_shrinks *shrinks = shrinker->private_data;

	return shrinks->scan(shrinks->data, sc->nr_to_scan) ?: SHRINK_STOP;
}

struct shrinker *rkvm_shrinker_register(void *data, u64 (*count)(const void *data),
					u64 (*scan)(const void *data, u64 nr))
{
	struct rkvm_shrinks *shrinks = kmalloc(sizeof(*shrinks), GFP_KERNEL_ACCOUNT);
	struct shrinker *shrinker;

	if (!shrinks)
		return NULL;
	shrinker = shrinker_alloc(0, "rkvm-shadow");
	if (!shrinker) {
		kfree(shrinks);
		return NULL;
	}
	shrinks->data = data;
	shrinks->count = count;
	shrinks->scan = scan;
	shrinker->private_data = shrinks;
	shrinker->count_objects = count_objects;
	shrinker->scan_objects = scan_objects;
	/* Making a shadow page again takes a walk of the guest's tables for each entry. */
	shrinker->seeks = DEFAULT_SEEKS * 10;
	shrinker_register(shrinker);
	return shrinker;
}

void rkvm_shrinker_free(struct shrinker *shrinker)
{
	void *shrinks = shrinker->private_data;

	shrinker_free(shrinker);
	kfree(shrinks);
}

static void acknowledge(void *unused)
{
}

void rkvm_ipi_and_wait(struct cpumask *mask)
{
	preempt_disable();
	smp_call_function_many(mask, acknowledge, NULL, true);
	preempt_enable();
	cpumask_clear(mask);
}
