//! Which pages equal prompts share, and how far they are written.
//!
//! A prefix is the full pages at the beginning of a prompt but for the page of its last token. While a sequence runs,
//! another whose prompt has the same prefix holds the same pages; whichever of them comes first in a step writes on from
//! where the last one got. A prefix is known by its tokens, and by its first page, which no other one can have.
//!
//! Invariants: a prefix lives while its pages have holders, which the [`PageAllocator`](crate::pages::PageAllocator)
//! counts; `written` grows. Prefixes of different lengths share nothing.

use std::collections::HashMap;
use std::sync::Arc;

use crate::units::PageId;

#[derive(Debug)]
struct Prefix {
    tokens: Arc<[u32]>,
    pages: Vec<PageId>,
    /// Tokens whose keys and values were written by the steps before.
    written: usize,
}

/// The prefixes of the sequences that run.
#[derive(Debug, Default)]
pub(crate) struct Prefixes {
    first_pages: HashMap<Arc<[u32]>, PageId>,
    by_page: HashMap<PageId, Prefix>,
}

impl Prefixes {
    /// The pages of a prefix; none when no sequence with it runs.
    pub(crate) fn pages(&self, tokens: &[u32]) -> &[PageId] {
        self.first_pages.get(tokens).map_or(&[], |first| &self.by_page[first].pages)
    }

    /// Adds a prefix that is in `pages`, of which nothing is written yet.
    pub(crate) fn insert(&mut self, tokens: &[u32], pages: &[PageId]) {
        let tokens: Arc<[u32]> = tokens.into();
        self.first_pages.insert(Arc::clone(&tokens), pages[0]);
        self.by_page.insert(pages[0], Prefix { tokens, pages: pages.to_vec(), written: 0 });
    }

    /// Forgets the prefix whose first page was `first`, now that nobody holds it.
    pub(crate) fn remove(&mut self, first: PageId) {
        if let Some(prefix) = self.by_page.remove(&first) {
            self.first_pages.remove(&prefix.tokens);
        }
    }

    /// Tokens of the prefix in `first` that the steps before have written.
    pub(crate) fn written(&self, first: PageId) -> usize {
        self.by_page[&first].written
    }

    /// The first `tokens` of the prefix in `first` are written.
    pub(crate) fn write(&mut self, first: PageId, tokens: usize) {
        let prefix = self.by_page.get_mut(&first).expect("its sequence runs");
        prefix.written = prefix.written.max(tokens);
    }
}
