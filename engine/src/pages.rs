//! The page allocator of the KV cache: which pages are free, which are in use.
//!
//! Invariants: every page is free or in use, never both; no page is in use twice. Giving back a page that is not in use
//! is a bug of the caller and panics, because going on would let two sequences write one page.
//! It knows no sequence and touches no memory.

use crate::units::PageId;

/// Free and used pages of one KV cache.
#[derive(Clone, Debug)]
pub struct PageAllocator {
    /// A stack: the page freed last is used next, while it is still warm in the cache.
    free: Vec<PageId>,
    used: Vec<bool>,
}

impl PageAllocator {
    /// An allocator of `pages` free pages, handed out from page 0 on.
    ///
    /// # Panics
    /// When `pages` does not fit the page table's `i32`.
    pub fn new(pages: usize) -> Self {
        let count = i32::try_from(pages).expect("page ids are i32 in the page table") as u32;
        Self { free: (0..count).rev().map(PageId).collect(), used: vec![false; pages] }
    }

    /// Takes `count` pages, or none at all when fewer are free.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<PageId>> {
        let kept = self.free.len().checked_sub(count)?;
        let pages: Vec<_> = self.free.drain(kept..).rev().collect();
        for page in &pages {
            self.used[page.0 as usize] = true;
        }
        Some(pages)
    }

    /// Gives pages back.
    ///
    /// # Panics
    /// When one of them is not in use.
    pub fn release(&mut self, pages: Vec<PageId>) {
        for page in pages.into_iter().rev() {
            assert!(std::mem::take(&mut self.used[page.0 as usize]), "page {} is not in use", page.0);
            self.free.push(page);
        }
    }

    /// Pages that can be taken.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages in use.
    pub fn used(&self) -> usize {
        self.total() - self.free()
    }

    /// All pages.
    pub fn total(&self) -> usize {
        self.used.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Any order of takes and returns: no page is held twice, and counts add up.
        #[test]
        fn pages_are_never_shared_or_lost(
            total in 0usize..40,
            steps in prop::collection::vec((any::<bool>(), 0usize..12), 0..80),
        ) {
            let mut allocator = PageAllocator::new(total);
            let mut held: Vec<Vec<PageId>> = Vec::new();
            for (take, number) in steps {
                if take {
                    let fits = number <= allocator.free();
                    let pages = allocator.allocate(number);
                    prop_assert_eq!(pages.as_ref().map(Vec::len), fits.then_some(number));
                    held.extend(pages);
                } else if !held.is_empty() {
                    allocator.release(held.swap_remove(number % held.len()));
                }
                let all: Vec<_> = held.iter().flatten().collect();
                prop_assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
                prop_assert!(all.iter().all(|page| (page.0 as usize) < total));
                prop_assert_eq!((allocator.used(), allocator.free()), (all.len(), total - all.len()));
            }
        }
    }

    #[test]
    #[should_panic(expected = "page 0 is not in use")]
    fn a_page_given_back_twice_is_caught() {
        let mut allocator = PageAllocator::new(1);
        let pages = allocator.allocate(1).unwrap();
        allocator.release(pages.clone());
        allocator.release(pages);
    }
}
