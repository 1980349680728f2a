/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The init of small guests: all that there is in their initramfs, of 32 or 64
 * bits, on the kernel's own nolibc.
 */
#ifndef TINY_H
#define TINY_H

#include "nolibc.h"

#define PAGE 4096UL

/* A line on the console, which carries the run's nonce, in one write. */
void say(const char *format, ...);
/* Says what is wrong and ends the process with 1. */
void fail(const char *what);
/* Where NAME ends in TEXT, or NULL. */
const char *after(const char *text, const char *name);

int protect(void *start, unsigned long length, int prot);
char *map(unsigned long pages, int prot, int flags);
void unmap(char *start, unsigned long pages);
void run_on(int cpu);
/* Forks; the child's status is what BODY returns. */
pid_t child(int (*body)(void));
/* Waits for CHILD, which is to end with STATUS, or by a signal if that is negative. */
void expect(pid_t child, int status);
/* Executes this program anew, to end with STATUS. */
int exec_with(int status);
/* A word of memory, read and written when and as often as it says here. */
#define LOAD(at) __atomic_load_n((at), __ATOMIC_RELAXED)
#define STORE(at, value) __atomic_store_n((at), (value), __ATOMIC_RELAXED)

/* Where a signal's handler returns to. */
void back_from_handler(void);

/* checks.c: programs that use memory, and find in it what they put there. */
int check_processor(int seed);
void check_together(int cpus);

/* rows.c: what some things cost. */
void rows(void);

#endif
