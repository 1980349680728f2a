// SPDX-License-Identifier: GPL-2.0
/* C helpers of the guest-memory layers: see mem_helpers.h. */
#include "mem_helpers.h"
