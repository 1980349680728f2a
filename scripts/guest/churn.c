// SPDX-License-Identifier: GPL-2.0
/*
 * Writes to all of its memory, again and again, and looks each time whether it
 * still has what was written the time before: for guests that are saved, restored
 * and migrated meanwhile. Each round is reported; SIGTERM ends it, after a last
 * look. Exits 0 only if nothing was ever wrong.
 *
 *	churn MEBIBYTES
 */
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define WORDS (4096 / sizeof(unsigned long))

static atomic_int over;

static void end(int signal)
{
	(void)signal;
	over = 1;
}

static unsigned long pattern(size_t word, unsigned long round)
{
	return (word + 1) * 0x9e3779b97f4a7c15ul ^ round << 32;
}

/* Nine words of each page, at places that differ from page to page. */
static void page(unsigned long *memory, size_t number, unsigned long round)
{
	for (size_t i = number % 61; i < WORDS; i += 61) {
		size_t word = number * WORDS + i;

		if (round > 0 && memory[word] != pattern(word, round - 1)) {
			printf("churn: round %lu, word %zu is %#lx, not %#lx\n", round, word,
			       memory[word], pattern(word, round - 1));
			exit(1);
		}
		memory[word] = pattern(word, round);
	}
}

int main(int argc, char **argv)
{
	size_t size = (argc > 1 ? strtoul(argv[1], NULL, 0) : 1) << 20;
	unsigned long *memory, round = 0;

	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 2;
	setlinebuf(stdout);
	signal(SIGTERM, end);
	do {
		for (size_t number = 0; number < size / 4096; number++)
			page(memory, number, round);
		printf("churn: round %lu\n", round++);
	} while (!over);
	for (size_t number = 0; number < size / 4096; number++)
		page(memory, number, round);
	printf("churn: %lu rounds, all right\n", round);
	return 0;
}
