// SPDX-License-Identifier: GPL-2.0
/*
 * What processes and memory cost in a guest: ticks of the time-stamp counter
 * for so many turns of each. A byte to the VMM's mark port before and after has
 * the VMM tell what KVM counted meanwhile: row N is between the marks 2N and
 * 2N + 1.
 */
#include "tiny.h"

#define MARK_PORT 0xf5
#define MAP_PAGES 16UL

static int ports;
static char *touched;

static unsigned long long ticks(void)
{
	unsigned int low, high;

	__asm__ volatile ("lfence\nrdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (unsigned long long)high << 32 | low;
}

static void mark(char number)
{
	if (lseek(ports, MARK_PORT, SEEK_SET) != MARK_PORT || write(ports, &number, 1) != 1)
		fail("no mark");
}

static void syscalls(int turns)
{
	while (turns--)
		__nolibc_syscall0(__NR_getppid);
}

static int nothing(void)
{
	return 0;
}

static void forks(int turns)
{
	while (turns--)
		expect(child(nothing), 0);
}

static int exec_nothing(void)
{
	return exec_with(0);
}

static void execs(int turns)
{
	while (turns--)
		expect(child(exec_nothing), 0);
}

static int there[2], back[2];

static int echo(void)
{
	char byte;

	while (read(there[0], &byte, 1) == 1 && byte)
		write(back[1], &byte, 1);
	return 0;
}

/* Two switches a turn. */
static void switches(int turns)
{
	char byte = 1;

	while (turns--)
		if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
			fail("no answer");
}

static void maps(int turns)
{
	unsigned long i;
	char *memory;

	while (turns--) {
		memory = map(MAP_PAGES, PROT_READ | PROT_WRITE, MAP_PRIVATE);
		for (i = 0; i < MAP_PAGES; i++)
			memory[i * PAGE] = 1;
		unmap(memory, MAP_PAGES);
	}
}

static void touches(int turns)
{
	while (turns--)
		touched[turns * PAGE] = 1;
}

static void protects(int turns)
{
	while (turns--) {
		if (protect(touched, PAGE, PROT_READ) ||
		    protect(touched, PAGE, PROT_READ | PROT_WRITE))
			fail("cannot protect a page");
		*touched = 1;
	}
}

static const struct {
	const char *name;
	int turns;
	void (*body)(int turns);
} table[] = {
	{ "syscall", 2000, syscalls },
	{ "switch", 500, switches },
	{ "fork", 100, forks },
	{ "fork-exec", 100, execs },
	{ "map-touch-16", 200, maps },
	{ "touch", 2048, touches },
	{ "protect", 500, protects },
	{ NULL, 0, NULL },
};

void rows(void)
{
	unsigned long long begin, end;
	unsigned int i;
	pid_t other;

	ports = open("/dev/port", O_RDWR);
	if (ports < 0 || pipe(there) || pipe(back))
		fail("cannot open what is needed");
	other = child(echo);
	touched = map(4096, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	for (i = 0; table[i].name; i++) {
		/* What is new is not what is to be measured, but where it is. */
		if (table[i].body != touches)
			table[i].body(table[i].turns / 10);
		mark(2 * i);
		begin = ticks();
		table[i].body(table[i].turns);
		end = ticks();
		mark(2 * i + 1);
		say("row %u %s %d %llu", i, table[i].name, table[i].turns, end - begin);
	}
	write(there[1], "", 1);
	expect(other, 0);
	say("rows done");
}
