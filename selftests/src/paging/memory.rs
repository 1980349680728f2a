// SPDX-License-Identifier: GPL-2.0

//! The memory of the model: the pages of the pool, and the dispatcher's tables, which nobody may write.

use super::code::own_tables;
use super::layout::{pool_index, POOL};
use rkvm_x86::paging::{GuestMemory, MemoryError};
use std::rc::Rc;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// The memory. Copies of it share the pages that neither has written since.
#[derive(Debug, Clone)]
pub struct Memory {
    pool: Vec<Rc<Vec<u8>>>,
    own: Rc<Vec<(u64, Vec<u8>)>>,
}

impl Memory {
    /// Memory with these pages in the pool.
    #[must_use]
    pub fn new(pool: &[Vec<u8>]) -> Self {
        assert_eq!(pool.len(), POOL.len());
        Memory {
            pool: pool.iter().map(|p| Rc::new(p.clone())).collect(),
            own: Rc::new(own_tables()),
        }
    }

    /// A page of the pool.
    #[must_use]
    pub fn page(&self, index: usize) -> &[u8] {
        &self.pool[index]
    }

    /// Reads bytes of one page; `None` if it is none of the model's.
    #[must_use]
    pub fn bytes(&self, gpa: u64, len: usize) -> Option<&[u8]> {
        let offset = (gpa & 0xfff) as usize;
        let page = match pool_index(gpa) {
            Some(i) => &self.pool[i][..],
            None => {
                let page = gpa & !0xfff;
                &self.own.iter().find(|(at, _)| *at == page)?.1[..]
            }
        };
        page.get(offset..offset + len)
    }

    /// Reads up to 8 bytes of one page as a number.
    #[must_use]
    pub fn number(&self, gpa: u64, len: usize) -> Option<u64> {
        let mut raw = [0; 8];
        raw[..len].copy_from_slice(self.bytes(gpa, len)?);
        Some(u64::from_le_bytes(raw))
    }

    /// Writes bytes of one page of the pool; says whether it is one.
    pub fn write(&mut self, gpa: u64, data: &[u8]) -> bool {
        let Some(i) = pool_index(gpa) else {
            return false;
        };
        let offset = (gpa & 0xfff) as usize;
        Rc::make_mut(&mut self.pool[i])[offset..offset + data.len()].copy_from_slice(data);
        true
    }
}

/// A walk in the memory, of which it keeps a trace.
///
/// With PAE paging, the entry of the topmost table comes from the processor's registers.
#[derive(Debug)]
pub struct Walk<'a> {
    memory: &'a mut Memory,
    pdptes: Option<[u64; 4]>,
    /// The entries that were read, by address and value.
    pub path: [(u64, u64); 4],
    /// How many.
    pub depth: usize,
    /// Whether an accessed or dirty bit was set.
    pub wrote: bool,
    /// Whether it came to memory that is not the model's.
    pub outside: bool,
}

impl<'a> Walk<'a> {
    /// A walk that is about to begin.
    pub fn new(memory: &'a mut Memory, pdptes: Option<[u64; 4]>) -> Self {
        Walk {
            memory,
            pdptes,
            path: [(0, 0); 4],
            depth: 0,
            wrote: false,
            outside: false,
        }
    }
}

impl GuestMemory for Walk<'_> {
    type Error = ();

    fn read(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError<()>> {
        let value = match (self.depth, self.pdptes) {
            (0, Some(p)) => p[(gpa >> 3) as usize & 3],
            _ => match self.memory.number(gpa, buf.len()) {
                Some(v) => v,
                None => {
                    self.outside = true;
                    return Err(MemoryError::Mmio);
                }
            },
        };
        buf.copy_from_slice(&value.to_le_bytes()[..buf.len()]);
        if let Some(slot) = self.path.get_mut(self.depth) {
            *slot = (gpa, value);
            self.depth += 1;
        }
        Ok(())
    }

    fn write(&mut self, _: u64, _: &[u8]) -> Result<(), MemoryError<()>> {
        self.outside = true;
        Err(MemoryError::Mmio)
    }

    fn compare_exchange(
        &mut self,
        gpa: u64,
        len: u8,
        old: u64,
        new: u64,
    ) -> Result<bool, MemoryError<()>> {
        let now = self.memory.number(gpa, len.into());
        if now != Some(old) {
            // The walk begins again.
            self.depth = 0;
            return Ok(false);
        }
        self.wrote = true;
        if !self.memory.write(gpa, &new.to_le_bytes()[..len.into()]) {
            self.outside = true;
        }
        Ok(true)
    }
}
