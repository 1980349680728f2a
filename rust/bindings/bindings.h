/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What bindgen reads: kernel interfaces that the kernel crate's own bindings
 * leave out, the KVM ABI, and our C helpers. bindings.params says which of
 * their names become Rust.
 */
#include <linux/anon_inodes.h>
#include <linux/cpuhotplug.h>
#include <linux/fs.h>
#include <linux/kvm.h>
#include <linux/kvm_para.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/preempt.h>
#include <linux/sched.h>
#include <linux/signal.h>
#include <linux/smp.h>
#include <linux/syscore_ops.h>
#include <asm/fpu/api.h>
#include <asm/fpu/types.h>
#include <asm/mmu_context.h>
#include <asm/tlbflush.h>
#include <asm/virt.h>

#include "clock_helpers.h"
#include "helpers.h"
#include "irq_helpers.h"
#include "mem_helpers.h"
#include "../vmx/entry.h"
