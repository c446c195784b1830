//! The page allocator of the KV cache: which pages are free, and how many sequences hold each of the others.
//!
//! A page has one holder when it is taken, one more for each [`PageAllocator::share`], one fewer for each
//! [`PageAllocator::release`], and is free again when the last holder lets go. Sequences with equal prompts share the
//! pages that are full of prompt; a page that is still written has one holder, which is the caller's to keep.
//!
//! Invariants: every page is free or has holders, never both; the number of free pages and of held ones adds up to all.
//! Giving back or sharing a page that nobody holds is a bug of the caller and panics, because going on would let two
//! sequences write one page. It knows no sequence and touches no memory.

use crate::units::PageId;

/// Free and held pages of one KV cache.
#[derive(Clone, Debug)]
pub struct PageAllocator {
    /// A stack: the page freed last is used next, while it is still warm in the cache.
    free: Vec<PageId>,
    /// Of each page; 0 for a free one.
    holders: Vec<u32>,
}

impl PageAllocator {
    /// An allocator of `pages` free pages, handed out from page 0 on.
    ///
    /// # Panics
    /// When `pages` does not fit the page table's `i32`.
    pub fn new(pages: usize) -> Self {
        let count = i32::try_from(pages).expect("page ids are i32 in the page table") as u32;
        Self { free: (0..count).rev().map(PageId).collect(), holders: vec![0; pages] }
    }

    /// Takes `count` free pages, each with one holder, or none at all when fewer are free.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<PageId>> {
        let kept = self.free.len().checked_sub(count)?;
        let pages: Vec<_> = self.free.drain(kept..).rev().collect();
        for page in &pages {
            *self.holders_mut(*page) = 1;
        }
        Some(pages)
    }

    /// Adds a holder to each of these pages.
    ///
    /// # Panics
    /// When one of them is free.
    pub fn share(&mut self, pages: &[PageId]) {
        for &page in pages {
            let holders = self.holders_mut(page);
            assert!(*holders > 0, "page {} is not in use", page.0);
            *holders += 1;
        }
    }

    /// Takes a holder from each of these pages; those without one are free again.
    ///
    /// # Panics
    /// When one of them is free already.
    pub fn release(&mut self, pages: Vec<PageId>) {
        for page in pages.into_iter().rev() {
            let holders = self.holders_mut(page);
            assert!(*holders > 0, "page {} is not in use", page.0);
            *holders -= 1;
            if *holders == 0 {
                self.free.push(page);
            }
        }
    }

    fn holders_mut(&mut self, page: PageId) -> &mut u32 {
        &mut self.holders[page.0 as usize]
    }

    /// Holders of a page; 0 for a free one.
    pub fn holders(&self, page: PageId) -> usize {
        self.holders[page.0 as usize] as usize
    }

    /// Pages that can be taken.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages that have holders.
    pub fn used(&self) -> usize {
        self.total() - self.free()
    }

    /// All pages.
    pub fn total(&self) -> usize {
        self.holders.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Any order of takes, shares and returns: holders are those who hold it, a page is taken only when free, and
        /// counts add up.
        #[test]
        fn pages_are_never_lost_or_taken_twice(
            total in 0usize..40,
            steps in prop::collection::vec((0u8..3, 0usize..12), 0..80),
        ) {
            let mut allocator = PageAllocator::new(total);
            let mut held: Vec<Vec<PageId>> = Vec::new();
            for (step, number) in steps {
                match step {
                    0 => {
                        let fits = number <= allocator.free();
                        let pages = allocator.allocate(number);
                        prop_assert_eq!(pages.as_ref().map(Vec::len), fits.then_some(number));
                        for page in pages.iter().flatten() {
                            prop_assert!(held.iter().flatten().all(|other| other != page), "{page:?} was in use");
                        }
                        held.extend(pages);
                    }
                    1 if !held.is_empty() => {
                        let pages = &held[number % held.len()];
                        let shared = pages[..number.min(pages.len())].to_vec();
                        allocator.share(&shared);
                        held.push(shared);
                    }
                    2 if !held.is_empty() => allocator.release(held.swap_remove(number % held.len())),
                    _ => {}
                }
                let mut holders: BTreeMap<PageId, usize> = BTreeMap::new();
                held.iter().flatten().for_each(|&page| *holders.entry(page).or_default() += 1);
                for page in (0..total as u32).map(PageId) {
                    prop_assert_eq!(allocator.holders(page), holders.get(&page).copied().unwrap_or(0));
                }
                prop_assert_eq!((allocator.used(), allocator.free()), (holders.len(), total - holders.len()));
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

    #[test]
    #[should_panic(expected = "page 0 is not in use")]
    fn a_free_page_cannot_be_shared() {
        PageAllocator::new(1).share(&[PageId(0)]);
    }
}
