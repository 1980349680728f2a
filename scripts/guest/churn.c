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
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define WORDS (4096 / sizeof(uint64_t))

static volatile sig_atomic_t over;

static void end(int signal)
{
	(void)signal;
	over = 1;
}

static uint64_t pattern(size_t word, uint64_t round)
{
	return (word + 1) * 0x9e3779b97f4a7c15ull ^ round << 32;
}

/* Nine words of each page, at places that differ from page to page. */
static void page(volatile uint64_t *memory, size_t number, uint64_t round)
{
	for (size_t i = number % 61; i < WORDS; i += 61) {
		size_t word = number * WORDS + i;

		if (round > 0 && memory[word] != pattern(word, round - 1)) {
			printf("churn: round %llu, word %zu is %#llx, not %#llx\n",
			       (unsigned long long)round, word, (unsigned long long)memory[word],
			       (unsigned long long)pattern(word, round - 1));
			exit(1);
		}
		memory[word] = pattern(word, round);
	}
}

int main(int argc, char **argv)
{
	size_t size = (argc > 1 ? strtoul(argv[1], NULL, 0) : 1) << 20;
	uint64_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t round = 0;

	if (memory == MAP_FAILED)
		return 2;
	setlinebuf(stdout);
	signal(SIGTERM, end);
	do {
		for (size_t number = 0; number < size / 4096; number++)
			page(memory, number, round);
		printf("churn: round %llu\n", (unsigned long long)round++);
	} while (!over);
	for (size_t number = 0; number < size / 4096; number++)
		page(memory, number, round);
	printf("churn: %llu rounds, all right\n", (unsigned long long)round);
	return 0;
}
