/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Option ROM that starts a Linux kernel which is in memory already.
 *
 * The emulator loads the kernel's real-mode part at 0x10000 and the rest at
 * 1 MiB before power-on (see machine.py). The BIOS scans this ROM and calls
 * its entry; that is too early to boot, so the entry only takes over the
 * vector of INT 19h, by which the BIOS asks for the bootstrap loader. There
 * the 16-bit Linux boot protocol begins: all data segments at the real-mode
 * part, a stack at its heap's end, and a jump 0x200 bytes in.
 */
	.code16
	.globl	_start
_start:
	.byte	0x55, 0xaa		/* signature of an option ROM */
	.byte	1			/* size in units of 512 bytes */

	/* ROM entry: hook INT 19h. */
	pushw	%ds
	pushw	%ax
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	$boot, 0x19 * 4
	movw	%cs, 0x19 * 4 + 2
	popw	%ax
	popw	%ds
	lretw

boot:
	cli
	cld
	movw	$0x1000, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %fs
	movw	%ax, %gs
	movw	%ax, %ss
	movw	$0xe000, %sp
	ljmpw	$0x1020, $0

	.org	512			/* byte 511 makes the sum 0: see machine.py */
