/* SPDX-License-Identifier: GPL-2.0 */
/* C helpers of the guest-memory layers. */
#ifndef RKVM_MEM_HELPERS_H
#define RKVM_MEM_HELPERS_H
#endif
