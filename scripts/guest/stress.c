// SPDX-License-Identifier: GPL-2.0
/*
 * What keeps the processors of a guest busy with each other, for as many
 * seconds as the argument says: forks and execs, threads that wake each other,
 * and memory that is taken away from threads which use it on other processors.
 * Each part checks its results. Prints how much was done; exits 0 only if all
 * of it was right.
 *
 *	stress SECONDS [THREADS]
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define MAX_THREADS 256

static struct timespec deadline;

static int over(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec > deadline.tv_sec ||
	       (now.tv_sec == deadline.tv_sec && now.tv_nsec >= deadline.tv_nsec);
}

static void start(double seconds)
{
	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_sec += (time_t)seconds;
}

static void fail(const char *what)
{
	printf("stress: %s (errno %d)\n", what, errno);
	exit(1);
}

static void run(int threads, void *(*body)(void *))
{
	pthread_t ids[MAX_THREADS];

	for (long i = 0; i < threads; i++)
		if (pthread_create(&ids[i], NULL, body, (void *)i))
			fail("cannot make a thread");
	for (int i = 0; i < threads; i++)
		pthread_join(ids[i], NULL);
}

/* Forks, execs and waits: the child's status is a number that it was told. */

static atomic_long forks;

static void *fork_body(void *arg)
{
	char number[16];

	for (int i = (long)arg; !over(); i++) {
		int status, expected = i % 100;
		pid_t pid;

		snprintf(number, sizeof(number), "%d", expected);
		pid = fork();
		if (pid < 0)
			fail("cannot fork");
		if (pid == 0) {
			execl("/proc/self/exe", "stress", "--exit", number, NULL);
			_exit(255);
		}
		if (waitpid(pid, &status, 0) != pid)
			fail("cannot wait for a child");
		if (!WIFEXITED(status) || WEXITSTATUS(status) != expected)
			fail("a child ended otherwise than it was told to");
		forks++;
	}
	return NULL;
}

/* A mutex that all want, and pairs of threads that take turns. */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long locked;
static atomic_long taken;
static atomic_long wakes;

static struct pair {
	pthread_mutex_t lock;
	pthread_cond_t wake;
	long turn;
	int done;
} pairs[MAX_THREADS / 2];

static void *futex_body(void *arg)
{
	struct pair *pair = &pairs[(long)arg / 2];
	long mine = (long)arg % 2;

	while (!over()) {
		for (int i = 0; i < 100; i++) {
			pthread_mutex_lock(&lock);
			locked++;
			pthread_mutex_unlock(&lock);
		}
		taken += 100;
		pthread_mutex_lock(&pair->lock);
		while (pair->turn % 2 != mine && !pair->done)
			pthread_cond_wait(&pair->wake, &pair->lock);
		pair->turn++;
		pthread_cond_signal(&pair->wake);
		pthread_mutex_unlock(&pair->lock);
		wakes++;
	}
	pthread_mutex_lock(&pair->lock);
	pair->done = 1;
	pthread_cond_signal(&pair->wake);
	pthread_mutex_unlock(&pair->lock);
	return NULL;
}

/*
 * One thread makes a page read-only while the others write to it, each its own
 * word, and takes it away altogether now and then. Once mprotect() has returned
 * no processor may have an old translation: what changes then was written by
 * way of one.
 */

static atomic_long *page;
static atomic_long shootdowns;
static atomic_long faults;
static atomic_int finished;
static __thread sigjmp_buf resume;

static void on_fault(int signal)
{
	(void)signal;
	faults++;
	siglongjmp(resume, 1);
}

static void *writer_body(void *arg)
{
	long word = (long)arg % (PAGE / sizeof(long));

	/* Behind a fault: the page may be gone for a moment. */
	if (sigsetjmp(resume, 1))
		sched_yield();
	while (!finished)
		page[word]++;
	return NULL;
}

static void protect_pages(void)
{
	static long before[PAGE / sizeof(long)];

	for (long round = 0; !over(); round++) {
		if (mprotect(page, PAGE, PROT_READ))
			fail("cannot protect a page");
		memcpy(before, page, PAGE);
		for (int i = 0; i < 50; i++)
			if (memcmp(before, page, PAGE))
				fail("a read-only page was written");
		if (round % 4 == 3) {
			if (mmap(page, PAGE, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != page)
				fail("cannot map a page");
		} else if (mprotect(page, PAGE, PROT_READ | PROT_WRITE)) {
			fail("cannot unprotect a page");
		}
		shootdowns += 2;
		sched_yield();
	}
	finished = 1;
}

static void *tlb_body(void *arg)
{
	if (!arg)
		protect_pages();
	else
		writer_body(arg);
	return NULL;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };
	double seconds;
	int threads;

	if (argc == 3 && !strcmp(argv[1], "--exit"))
		return atoi(argv[2]);
	if (argc < 2)
		fail("usage: stress SECONDS [THREADS]");
	seconds = atof(argv[1]) / 3;
	threads = argc > 2 ? atoi(argv[2]) : 2 * sysconf(_SC_NPROCESSORS_ONLN);
	if (threads < 2 || threads > MAX_THREADS)
		fail("that is no number of threads");
	threads &= ~1;

	start(seconds + 1);
	run(threads, fork_body);

	for (int i = 0; i < threads / 2; i++) {
		pthread_mutex_init(&pairs[i].lock, NULL);
		pthread_cond_init(&pairs[i].wake, NULL);
	}
	start(seconds + 1);
	run(threads, futex_body);
	if (locked != taken)
		fail("a count under a lock is wrong");

	page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (page == MAP_FAILED)
		fail("no memory");
	sigaction(SIGSEGV, &action, NULL);
	start(seconds + 1);
	run(threads, tlb_body);

	printf("stress: %ld forks, %ld locks, %ld wakes, %ld protections, %ld faults\n",
	       (long)forks, (long)taken, (long)wakes, (long)shootdowns, (long)faults);
	return forks && taken && wakes && shootdowns ? 0 : 1;
}
