//! Which pages prompts that begin alike share, and how far they are written.
//!
//! The full pages at the beginning of a prompt, but for the page of its last token, are a chain: a page is known by the page
//! before it and by its own tokens, so by all tokens up to its end. A sequence holds the known pages of its chain instead of
//! pages of its own; whichever of the sequences comes first in a step writes on from where the last one got. Pages that are
//! written stay known when nobody runs with them any more, until their room is needed: those that were let go of first go first.
//!
//! The chain itself is a holder of its pages in the [`PageAllocator`]; *idle* is a page that has no other.
//!
//! Invariants: a page that is not idle has no idle page before it, and of idle pages a page goes before the one that it
//! follows, so that no page loses its beginning; an idle page is written to its end; what is `written` grows.

use std::collections::{BTreeMap, HashMap};

use crate::pages::PageAllocator;
use crate::units::PageId;

#[derive(Debug)]
struct Page {
    /// The page before it.
    after: Option<PageId>,
    tokens: Box<[u32]>,
    /// Tokens whose keys and values were written by the steps before.
    written: usize,
    /// Its place among the idle ones.
    idle: Option<u64>,
}

/// The pages of the beginnings of prompts.
#[derive(Debug)]
pub(crate) struct Prefixes {
    page_size: usize,
    /// By the page before, and by their tokens.
    following: HashMap<Option<PageId>, HashMap<Box<[u32]>, PageId>>,
    pages: HashMap<PageId, Page>,
    /// In the order in which they were let go of.
    idle: BTreeMap<u64, PageId>,
    count: u64,
    #[cfg(test)]
    pub(crate) log: Log,
}

/// What the tests want to know: the pages that were forgotten since they asked last, and how many idle ones were used again.
#[cfg(test)]
#[derive(Debug, Default)]
pub(crate) struct Log {
    pub(crate) forgotten: Vec<PageId>,
    pub(crate) reused: usize,
}

impl Prefixes {
    pub(crate) fn new(page_size: usize) -> Self {
        let (following, pages, idle) = Default::default();
        Self {
            page_size,
            following,
            pages,
            idle,
            count: 0,
            #[cfg(test)]
            log: Log::default(),
        }
    }

    /// The pages that are known at the beginning of `tokens`, which are whole pages.
    fn find(&self, tokens: &[u32]) -> Vec<PageId> {
        let mut last = None;
        let mut found = Vec::new();
        for tokens in tokens.chunks_exact(self.page_size) {
            let Some(&page) = self.following.get(&last).and_then(|following| following.get(tokens)) else { break };
            found.push(page);
            last = Some(page);
        }
        found
    }

    /// Takes `count` pages, of which the first are those that begin with `tokens` (whole pages): known ones, or new ones, which
    /// are known from now on. None at all when there is no room.
    pub(crate) fn take(&mut self, tokens: &[u32], count: usize, pages: &mut PageAllocator) -> Option<Vec<PageId>> {
        let known = self.find(tokens);
        pages.share(&known);
        for page in &known {
            self.use_again(*page);
        }
        let needed = count - known.len();
        if pages.free() + self.idle.len() < needed {
            self.release(known, pages);
            return None;
        }
        while pages.free() < needed {
            let (_, page) = self.idle.pop_first().expect("there is room");
            self.forget(page, pages);
        }
        let new = pages.allocate(needed).expect("there is room");
        let beginning = known.len()..tokens.len() / self.page_size;
        let mut last = known.last().copied();
        for (&page, at) in new.iter().zip(beginning) {
            let tokens: Box<[u32]> = tokens[at * self.page_size..][..self.page_size].into();
            pages.share(&[page]);
            self.following.entry(last).or_default().insert(tokens.clone(), page);
            self.pages.insert(page, Page { after: last, tokens, written: 0, idle: None });
            last = Some(page);
        }
        Some([known, new].concat())
    }

    fn use_again(&mut self, page: PageId) {
        if let Some(place) = self.pages.get_mut(&page).and_then(|page| page.idle.take()) {
            self.idle.remove(&place);
            #[cfg(test)]
            {
                self.log.reused += 1;
            }
        }
    }

    /// Lets go of a sequence's pages.
    pub(crate) fn release(&mut self, held: Vec<PageId>, pages: &mut PageAllocator) {
        let last_first = held.iter().rev().copied().collect::<Vec<_>>();
        pages.release(held);
        for id in last_first {
            let alone = pages.holders(id) == 1;
            let Some(page) = self.pages.get_mut(&id).filter(|_| alone) else { continue };
            if page.written < self.page_size {
                self.forget(id, pages);
            } else {
                page.idle = Some(self.count);
                self.idle.insert(self.count, id);
                self.count += 1;
            }
        }
    }

    /// Makes a page free that only its chain holds.
    fn forget(&mut self, id: PageId, pages: &mut PageAllocator) {
        let page = self.pages.remove(&id).expect("it is known");
        debug_assert!(!self.following.contains_key(&Some(id)), "a page goes before the one that it follows");
        if let Some(following) = self.following.get_mut(&page.after) {
            following.remove(&page.tokens);
            if following.is_empty() {
                self.following.remove(&page.after);
            }
        }
        pages.release(vec![id]);
        #[cfg(test)]
        self.log.forgotten.push(id);
    }

    /// Pages that no sequence holds.
    pub(crate) fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Whether a page is kept, though no sequence holds it.
    #[cfg(test)]
    pub(crate) fn is_idle(&self, page: PageId) -> bool {
        self.pages.get(&page).is_some_and(|page| page.idle.is_some())
    }

    /// Tokens at the beginning of `chain` that the steps before have written.
    pub(crate) fn written(&self, chain: &[PageId]) -> usize {
        let written = |page: &PageId| self.pages[page].written;
        let whole = chain.iter().take_while(|page| written(page) == self.page_size).count();
        whole * self.page_size + chain.get(whole).map_or(0, written)
    }

    /// The first `tokens` of `page` are written.
    pub(crate) fn write(&mut self, page: PageId, tokens: usize) {
        let page = self.pages.get_mut(&page).expect("its sequence runs");
        page.written = page.written.max(tokens);
    }
}
