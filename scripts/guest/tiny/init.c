// SPDX-License-Identifier: GPL-2.0
/*
 * First process of a small guest: uses processes and memory on every processor,
 * checks that all is as it should be, says so in words that carry the run's
 * nonce from the command line, and powers off. With rkvm.rows it does not check
 * but measure.
 */
#include <linux/reboot.h>
#include "tiny.h"

static char cmdline[1024];
static char nonce[64];

const char *after(const char *text, const char *name)
{
	unsigned long length = strlen(name);

	for (; *text; text++)
		if (!strncmp(text, name, length))
			return text + length;
	return NULL;
}

void say(const char *format, ...)
{
	char line[256];
	va_list args;
	int length;

	length = snprintf(line, sizeof(line), "guest %s: ", nonce);
	va_start(args, format);
	length += vsnprintf(line + length, sizeof(line) - length - 1, format, args);
	va_end(args);
	if (length > (int)sizeof(line) - 2)
		length = sizeof(line) - 2;
	line[length++] = '\n';
	write(1, line, length);
}

void fail(const char *what)
{
	say("bad: %s (errno %d)", what, errno);
	_exit(1);
}

int protect(void *start, unsigned long length, int prot)
{
	return __nolibc_syscall3(__NR_mprotect, start, length, prot);
}

char *map(unsigned long pages, int prot, int flags)
{
	char *start = mmap(NULL, pages * PAGE, prot, flags | MAP_ANONYMOUS, -1, 0);

	if (start == MAP_FAILED)
		fail("no memory");
	return start;
}

void unmap(char *start, unsigned long pages)
{
	if (munmap(start, pages * PAGE))
		fail("cannot unmap");
}

void run_on(int cpu)
{
	unsigned long mask = 1UL << cpu;

	if (__nolibc_syscall3(__NR_sched_setaffinity, 0, sizeof(mask), &mask) < 0)
		fail("cannot choose a processor");
}

pid_t child(int (*body)(void))
{
	pid_t pid = fork();

	if (pid < 0)
		fail("cannot fork");
	if (pid == 0)
		_exit(body());
	return pid;
}

void expect(pid_t child, int status)
{
	int got;

	if (waitpid(child, &got, 0) != child)
		fail("cannot wait for a child");
	got = WIFSIGNALED(got) ? -WTERMSIG(got) : WEXITSTATUS(got);
	if (got != status) {
		say("bad: a child ended with %d, not with %d", got, status);
		_exit(1);
	}
}

int exec_with(int status)
{
	char number[16], *argv[4];

	snprintf(number, sizeof(number), "%d", status);
	argv[0] = "init";
	argv[1] = "--exit";
	argv[2] = number;
	argv[3] = NULL;
	execve("/proc/self/exe", argv, environ);
	return 255;
}

static int read_file(const char *path, char *text, int size)
{
	int fd = open(path, O_RDONLY), length = 0, got;

	if (fd < 0)
		fail(path);
	while ((got = read(fd, text + length, size - 1 - length)) > 0)
		length += got;
	close(fd);
	text[length] = 0;
	return length;
}

static int count_processors(void)
{
	static char text[32768];
	const char *rest = text;
	int count = 0;

	read_file("/proc/cpuinfo", text, sizeof(text));
	while ((rest = after(rest, "processor\t")))
		count++;
	return count;
}

static int checks(int cpus)
{
	int cpu, status, good = 0;

	for (cpu = 0; cpu < cpus; cpu++)
		if (fork() == 0) {
			run_on(cpu);
			_exit(check_processor(cpu));
		}
	while (waitpid(-1, &status, 0) > 0)
		good += WIFEXITED(status) && WEXITSTATUS(status) == 0;
	if (good != cpus) {
		say("bad: %d of %d processors pass", good, cpus);
		return 0;
	}
	check_together(cpus);
	return 1;
}

int main(int argc, char **argv)
{
	struct utsname name;
	const char *word;
	unsigned int i;
	int cpus;

	if (argc == 3 && !strcmp(argv[1], "--exit"))
		return atoi(argv[2]);
	mkdir("/proc", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	read_file("/proc/cmdline", cmdline, sizeof(cmdline));
	word = after(cmdline, "rkvm.nonce=");
	for (i = 0; word && word[i] > ' ' && i < sizeof(nonce) - 1; i++)
		nonce[i] = word[i];
	uname(&name);
	cpus = count_processors();
	say("processors %d", cpus);
	if (after(cmdline, "rkvm.rows"))
		rows();
	/* In a child, so that what fails there does not take init with it. */
	else if (fork() == 0)
		_exit(checks(cpus) ? 0 : 1);
	else if (waitpid(-1, &cpus, 0) > 0 && cpus == 0)
		say("init is up on Linux %s, %d-bit", name.release, (int)sizeof(long) * 8);
	reboot(LINUX_REBOOT_CMD_POWER_OFF);
	fail("still here");
}
