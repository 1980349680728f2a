// SPDX-License-Identifier: GPL-2.0
/*
 * Processes and memory, used in the ways that change page tables, with all that
 * is found there checked against what must be. What is wrong is said, and ends
 * the process.
 */
#include <linux/signal.h>
#include <asm/siginfo.h>
#include <stdatomic.h>
#include "tiny.h"

#define ROUNDS 20

/* The kernel's struct, and the way back from a handler, which nolibc lacks. */
struct action {
	void (*handler)(int signal, siginfo_t *info, void *context);
	unsigned long flags;
	void (*restorer)(void);
	unsigned long mask[8 / sizeof(long)];
};

__asm__(".text\n"
	".globl back_from_handler\n"
	"back_from_handler:\n"
#if __SIZEOF_LONG__ == 4
	"	movl $173, %eax\n"
	"	int $0x80\n"
#else
	"	movq $15, %rax\n"
	"	syscall\n"
#endif
);

/* Faults that were taken; a page is made writable by one, or one waits until it is. */
static atomic_long faults;
static int waits;

static void on_fault(int signal, siginfo_t *info, void *context)
{
	unsigned long page = (unsigned long)info->si_addr & ~(PAGE - 1);

	(void)signal;
	(void)context;
	faults++;
	if (waits)
		sched_yield();
	else if (protect((void *)page, PAGE, PROT_READ | PROT_WRITE))
		_exit(3);
}

static void catch_faults(void)
{
	struct action action = {
		.handler = on_fault,
		.flags = SA_SIGINFO | SA_NODEFER | 0x04000000 /* SA_RESTORER */,
		.restorer = back_from_handler,
	};

	if (__nolibc_syscall4(__NR_rt_sigaction, SIGSEGV, &action, NULL, 8))
		fail("cannot catch a signal");
}

static int seed;

static unsigned long word(unsigned long at)
{
	return (at * 2654435761UL) ^ (seed * 40503UL + 1);
}

static void fill(char *start, unsigned long pages)
{
	unsigned long *words = (unsigned long *)start, i;

	for (i = 0; i < pages * PAGE / sizeof(long); i += 61)
		words[i] = word(i);
}

static void verify(const char *start, unsigned long pages, const char *what)
{
	const unsigned long *words = (const unsigned long *)start;
	unsigned long i;

	for (i = 0; i < pages * PAGE / sizeof(long); i += 61)
		if (words[i] != word(i))
			fail(what);
}

static int exec_with_status(void)
{
	return exec_with(seed % 100);
}

/* A process's pages are its own once it has written them, whoever was first. */

#define COW_PAGES 40UL

static char *common;
static int down[2], up[2];

static int cow_child(void)
{
	char byte = 0;

	verify(common, COW_PAGES, "a child does not find its parent's memory");
	seed += 1000;
	fill(common, COW_PAGES / 2);
	verify(common, COW_PAGES / 2, "a child's writes are not there");
	write(up[1], &byte, 1);
	read(down[0], &byte, 1);
	verify(common, COW_PAGES / 2, "a child finds its parent's writes");
	seed -= 1000;
	return 7;
}

static void cow(void)
{
	char byte = 0;
	pid_t pid;

	common = map(COW_PAGES, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	fill(common, COW_PAGES);
	if (pipe(down) || pipe(up))
		fail("no pipes");
	pid = child(cow_child);
	if (read(up[0], &byte, 1) != 1)
		fail("a child does not report");
	verify(common, COW_PAGES, "a parent finds its child's writes");
	seed += 2000;
	fill(common, COW_PAGES);
	write(down[1], &byte, 1);
	expect(pid, 7);
	verify(common, COW_PAGES, "a parent's writes are not there");
	seed -= 2000;
	unmap(common, COW_PAGES);
	close(down[0]);
	close(down[1]);
	close(up[0]);
	close(up[1]);
}

/* Memory that comes is zero, stays, and is gone when it went. */

static char *gone;

static int touch_gone(void)
{
	return LOAD(gone) + 1;
}

static int write_gone(void)
{
	STORE(gone, 1);
	return 1;
}

static void maps(void)
{
	unsigned long pages = 1 + (seed * 7 + 3) % 40, i;
	char *start = map(pages, PROT_READ | PROT_WRITE, MAP_PRIVATE);

	for (i = 0; i < pages * PAGE / sizeof(long); i += 61)
		if (((unsigned long *)start)[i])
			fail("new memory is not zero");
	fill(start, pages);
	verify(start, pages, "memory lost what was written");
	start = mremap(start, pages * PAGE, 4 * pages * PAGE, MREMAP_MAYMOVE, NULL);
	if (start == MAP_FAILED)
		fail("cannot move memory");
	verify(start, pages, "memory lost in a move what was written");
	if (start[2 * pages * PAGE])
		fail("grown memory is not zero");
	gone = start + (2 * pages - 1) * PAGE;
	STORE(gone, 1);
	unmap(start + pages * PAGE, pages);
	if (LOAD(start + 2 * pages * PAGE))
		fail("memory beside a hole changed");
	expect(child(touch_gone), -SIGSEGV);
	expect(child(write_gone), -SIGSEGV);
	unmap(start, 4 * pages);
}

/* Rights that are taken are taken at once, and so are those that are given. */
static void protects(void)
{
	unsigned long *words;
	char *start = map(8, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	int turn, was;

	catch_faults();
	for (turn = 0; turn < 8; turn++) {
		words = (unsigned long *)(start + turn * PAGE);
		was = faults;
		STORE(&words[0], word(turn));
		protect(start, 8 * PAGE, PROT_READ);
		if (LOAD(&words[0]) != word(turn))
			fail("a read-only page changed");
		if (faults != was)
			fail("a read of a read-only page faults");
		STORE(&words[1], turn);
		if (faults != was + 1)
			fail("a write to a read-only page does not fault once");
		if (LOAD(&words[1]) != (unsigned long)turn)
			fail("a write after a fault is lost");
		protect(start, 8 * PAGE, PROT_NONE);
		if (LOAD(&words[1]) != (unsigned long)turn)
			fail("a page without rights lost what it had");
		if (faults != was + 2)
			fail("a read of a page without rights does not fault once");
		protect(start, 8 * PAGE, PROT_READ | PROT_WRITE);
		STORE(&words[1], turn);
		if (faults != was + 2)
			fail("a write to a writable page faults");
	}
	unmap(start, 8);
}

/* Code that is data a moment before; and data that is no code where there is NX. */

static char *code;

static int run_code(void)
{
	return ((int (*)(void))code)();
}

static void put_code(int number)
{
	/* mov $NUMBER, %eax; ret */
	code[0] = 0xb8;
	memcpy(code + 1, &number, 4);
	code[5] = 0xc3;
}

static void codes(int has_nx)
{
	int number;

	code = map(1, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	put_code(5);
	expect(child(run_code), has_nx ? -SIGSEGV : 5);
	protect(code, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC);
	for (number = 0; number < 10; number++) {
		put_code(number);
		if (run_code() != number)
			fail("code that was written does not run");
	}
	unmap(code, 1);
}

/* So much that the kernel may back it with huge pages. */
static void much(void)
{
	unsigned long pages = 3072, i;
	char *start = map(pages, PROT_READ | PROT_WRITE, MAP_PRIVATE);

	__nolibc_syscall3(__NR_madvise, start, pages * PAGE, 14 /* MADV_HUGEPAGE */);
	fill(start, pages);
	verify(start, pages, "a lot of memory lost what was written");
	if (__nolibc_syscall3(__NR_madvise, start + 100 * PAGE, 700 * PAGE, 4 /* MADV_DONTNEED */))
		fail("cannot drop memory");
	for (i = 100; i < 800; i++)
		if (LOAD((unsigned long *)(start + i * PAGE)))
			fail("memory that was dropped is not zero");
	unmap(start, pages);
}

/*
 * A 32-bit kernel knows NX, if it has PAE, but vm_get_page_prot() of Linux 7.2 puts
 * programs' rights through an unsigned long, in which there is no room for it.
 */
static int can_nx(void)
{
	static char text[4096];
	int fd = open("/proc/cpuinfo", O_RDONLY);
	int length = read(fd, text, sizeof(text) - 1);

	close(fd);
	return sizeof(long) == 8 && length > 0 && after(text, " nx ");
}

int check_processor(int number)
{
	int round, has_nx = can_nx();

	for (round = 0; round < ROUNDS; round++) {
		seed = number * 100 + round;
		expect(child(exec_with_status), seed % 100);
		cow();
		maps();
		protects();
		/* The handler would stand in the way of the signals that are to kill. */
		__nolibc_syscall4(__NR_rt_sigaction, SIGSEGV, &(struct action){}, NULL, 8);
		codes(has_nx);
	}
	much();
	return 0;
}

/*
 * All processors in one address space: a page becomes read-only while the others
 * write to it, or goes away. Once mprotect() has returned no processor may have
 * an old translation: what changes then was written by way of one.
 */

static unsigned long *target;
static atomic_long finished, started;
static int writers;

static void write_target(void)
{
	long me = started++;

	run_on(1 + me % writers);
	while (!finished)
		STORE(&target[me], LOAD(&target[me]) + 1);
	_exit(0);
}

/* A thread of this process on a stack of its own, which never returns. */
static pid_t thread(void (*body)(void), char *stack)
{
	/* When BODY begins, the stack is as a call would leave it. */
	void **top = (void **)(stack + 4 * PAGE) - 2;
	long pid;

	top[0] = body;
#if __SIZEOF_LONG__ == 4
	__asm__ volatile ("int $0x80\n"
			  "test %%eax, %%eax\n"
			  "jnz 1f\n"
			  "ret\n"
			  "1:\n"
			  : "=a"(pid)
			  : "0"(__NR_clone), "b"(CLONE_VM | CLONE_FS | CLONE_FILES | SIGCHLD),
			    "c"(top), "d"(0), "S"(0), "D"(0)
			  : "memory");
#else
	register long r10 __asm__("r10") = 0;
	register long r8 __asm__("r8") = 0;

	__asm__ volatile ("syscall\n"
			  "test %%rax, %%rax\n"
			  "jnz 1f\n"
			  "ret\n"
			  "1:\n"
			  : "=a"(pid)
			  : "0"((long)__NR_clone),
			    "D"((long)(CLONE_VM | CLONE_FS | CLONE_FILES | SIGCHLD)),
			    "S"(top), "d"(0L), "r"(r10), "r"(r8)
			  : "memory", "rcx", "r11");
#endif
	if (pid < 0)
		fail("cannot make a thread");
	return pid;
}

void check_together(int cpus)
{
	static unsigned long before[64];
	int round, turn, i;
	pid_t pids[64];

	if (cpus < 2 || cpus > 64)
		return;
	run_on(0);
	writers = cpus - 1;
	waits = 1;
	catch_faults();
	target = (void *)map(1, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	for (i = 0; i < writers; i++)
		pids[i] = thread(write_target, map(4, PROT_READ | PROT_WRITE, MAP_PRIVATE));
	while (started < writers)
		sched_yield();
	for (round = 0; round < 200; round++) {
		if (protect(target, PAGE, PROT_READ))
			fail("cannot protect a page");
		for (i = 0; i < writers; i++)
			before[i] = LOAD(&target[i]);
		for (turn = 0; turn < 50; turn++)
			for (i = 0; i < writers; i++)
				if (LOAD(&target[i]) != before[i])
					fail("a read-only page was written");
		if (round % 4 == 3) {
			if (mmap(target, PAGE, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != target)
				fail("cannot map a page");
		} else if (protect(target, PAGE, PROT_READ | PROT_WRITE)) {
			fail("cannot unprotect a page");
		}
		sched_yield();
	}
	finished = 1;
	for (i = 0; i < writers; i++)
		expect(pids[i], 0);
	say("processors wrote together, %ld faults", (long)faults);
}
