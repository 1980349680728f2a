// SPDX-License-Identifier: GPL-2.0

//! What the host tells us of the user mappings that back guest memory.

use super::Inner;
use crate::linux::mmu_notifier::HvaRange;
use crate::linux::mmu_notifier::MmuNotifier;
use core::sync::atomic::fence;
use core::sync::atomic::Ordering;

impl MmuNotifier for Inner {
    fn invalidate_start(&self, range: HvaRange, may_block: bool) {
        self.mmu.changes().start(&range);
        // The change is active before the memslots are looked at. A memslot that is published after
        // that look is only used by faults that see the change; pairs with the publication and the
        // fault's acquire of it.
        fence(Ordering::SeqCst);
        let slots = self.slots.read();
        // The user's address space has other uses: those leave the MMU lock alone.
        if slots.maps_any(&range) {
            self.mmu.zap(slots.gfns_of(&range), may_block);
        }
    }

    fn invalidate_end(&self, range: HvaRange) {
        // The host's mappings have changed before the memslots are looked at. A memslot that is
        // published after that look is only used by look-ups that find the new mappings.
        fence(Ordering::SeqCst);
        let mapped = self.slots.read().maps_any(&range);
        self.mmu.changes().end(mapped);
    }

    fn clear_young(&self, range: HvaRange, flush: bool) -> bool {
        self.mmu
            .clear_young(self.slots.read().gfns_of(&range), flush)
    }

    fn test_young(&self, range: HvaRange) -> bool {
        self.mmu.test_young(self.slots.read().gfns_of(&range))
    }

    fn release(&self) {
        self.mmu.zap_all(true);
    }
}
