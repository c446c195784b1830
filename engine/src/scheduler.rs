//! Continuous batching over paged KV: which sequences run in which slot, and what the next step computes.
//!
//! Pure: no device, no clock, no randomness, so the order of steps depends on the requests alone. Each sequence is
//! admitted in order, when a slot and *all* the pages it can ever need (prompt and new tokens) are free. Reserving up
//! front means that an admitted sequence always finishes: nothing is preempted, recomputed or dead-locked. The price is
//! that a sequence which stops early has held pages that it did not fill.
//!
//! Invariants: a page belongs to one running sequence at most; every request that [`Scheduler::push`] accepted ends in
//! exactly one [`Finished`], with at most its budget of tokens; limits of [`Limits`] hold in every step; a decode step
//! runs no sequence beyond its budget, so the device needs no mask for length.
//!
//! Use: `push` all requests, then repeat [`Scheduler::next`], run the step, and [`Scheduler::record`] the sampled tokens
//! of every row that samples, until `next` answers [`Step::Done`].

use std::collections::VecDeque;

use crate::error::{Error, Result};
use crate::pages::PageAllocator;
use crate::stop::{FinishReason, StopRule};
use crate::units::{PageId, PageSize, SampleId, Slot};

/// What one engine can hold and one step may do. All sizes are at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of one sequence, prompt included.
    pub max_seq_len: usize,
    /// Sequences that run at once (slots).
    pub max_seqs: usize,
    /// Pages of the KV cache.
    pub max_pages: usize,
    /// Tokens per page.
    pub page_size: PageSize,
    /// Sequences in one prefill step.
    pub max_seqs_in_prefill: usize,
    /// Prompt tokens in one prefill step, over all its sequences.
    pub max_prefill_size: usize,
    /// Decode steps per host call.
    pub max_rounds: usize,
}

impl Limits {
    /// The width of the page table: pages that a sequence of `max_seq_len` tokens needs.
    pub fn pages_per_seq(&self) -> usize {
        self.page_size.pages_for(self.max_seq_len)
    }

    /// Whether a sequence of `prompt` tokens and `max_new` new ones can ever run.
    ///
    /// # Errors
    /// Names the limit that it breaks and the value that would do. `what` names the sequence (`prompts[3]`).
    pub fn check(&self, what: &str, prompt: usize, max_new: usize) -> Result<()> {
        let (limit, tokens) = (self.max_seq_len, prompt + max_new);
        if prompt == 0 {
            return Err(Error::setting(
                what,
                "\"\"",
                "is empty, and the tokenizer puts no token before it",
                "give it at least one token",
            ));
        }
        if prompt >= limit {
            return Err(Error::setting(
                what,
                format!("{prompt} tokens"),
                format!("leaves no room for a new token within engine.max_seq_len = {limit}"),
                format!("shorten it or raise engine.max_seq_len to {tokens}"),
            ));
        }
        if tokens > limit {
            return Err(Error::setting(
                "max_new_tokens",
                max_new,
                format!("and the {prompt} tokens of {what} exceed engine.max_seq_len = {limit}"),
                format!("raise engine.max_seq_len to {tokens} or lower max_new_tokens to {}", limit - prompt),
            ));
        }
        let (pages, page_size) = (self.page_size.pages_for(tokens), self.page_size.tokens());
        if pages > self.max_pages {
            return Err(Error::setting(
                "engine.max_pages",
                self.max_pages,
                format!("holds {} tokens, but {what} alone needs {tokens}", self.max_pages * page_size),
                format!("raise it to {pages} or more"),
            ));
        }
        Ok(())
    }
}

/// A sample to be made.
#[derive(Clone, Debug)]
pub struct Request {
    /// Which sample of the run.
    pub id: SampleId,
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    /// The budget of new tokens, at least one.
    pub max_new_tokens: usize,
}

/// A sample that is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Which sample of the run.
    pub id: SampleId,
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    /// The new tokens, the stopping one included.
    pub tokens: Vec<u32>,
    /// How many of `tokens` belong to the text (see [`crate::stop`]).
    pub text_tokens: usize,
    /// Why it ended.
    pub reason: FinishReason,
}

/// A row of a prefill step: consecutive prompt tokens of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefillRow {
    /// Where the sequence runs.
    pub slot: Slot,
    /// Which sample it is.
    pub id: SampleId,
    /// The chunk's tokens, at least one.
    pub tokens: Vec<u32>,
    /// Position of the first of them; `position + tokens.len()` is the KV length after the step.
    pub position: usize,
    /// Whether the chunk ends the prompt, so that the step samples this row's first new token.
    pub samples: bool,
}

impl PrefillRow {
    /// Tokens in the sequence's KV after the step.
    pub fn kv_len(&self) -> usize {
        self.position + self.tokens.len()
    }
}

/// A row of a decode step: one sequence whose last token is fed back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeRow {
    /// Where the sequence runs.
    pub slot: Slot,
    /// Which sample it is.
    pub id: SampleId,
    /// The last sampled token; its KV is not in the cache yet.
    pub token: u32,
    /// Its position; `position + 1` is the KV length after the first round.
    pub position: usize,
}

/// What to run next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write the rows' chunks to the cache; sample one token for each row that `samples`, and `record` it.
    Prefill(Vec<PrefillRow>),
    /// Run `rounds` decode steps on the device, then `record` each row's sampled tokens (fewer when it met EOS).
    Decode {
        /// All running sequences, by slot.
        rows: Vec<DecodeRow>,
        /// Decode steps: no row has fewer left in its budget.
        rounds: usize,
    },
    /// Every request has finished.
    Done,
}

#[derive(Debug)]
struct Running {
    request: Request,
    pages: Vec<PageId>,
    /// Prompt tokens given to the device.
    prefilled: usize,
    sampled: Vec<u32>,
    /// A planned step samples this row, and `record` was not called yet.
    awaiting: bool,
}

impl Running {
    fn remaining(&self) -> usize {
        self.request.max_new_tokens - self.sampled.len()
    }
}

/// The scheduler of one engine.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    stop: StopRule,
    queue: VecDeque<Request>,
    /// Slot of each sequence in the order of admission, in which prompts are prefilled.
    order: Vec<Slot>,
    slots: Vec<Option<Running>>,
    pages: PageAllocator,
}

impl Scheduler {
    /// A scheduler with no requests.
    pub fn new(limits: Limits, stop: StopRule) -> Self {
        let slots = (0..limits.max_seqs).map(|_| None).collect();
        let pages = PageAllocator::new(limits.max_pages);
        Self { limits, stop, queue: VecDeque::new(), order: Vec::new(), slots, pages }
    }

    /// Queues a request behind all others.
    ///
    /// # Errors
    /// When it could never run under the limits.
    pub fn push(&mut self, request: Request) -> Result<()> {
        self.limits.check(&format!("prompts[{}]", request.id.index), request.prompt.len(), request.max_new_tokens)?;
        if request.max_new_tokens == 0 {
            return Err(Error::setting("max_new_tokens", 0, "asks for no token", "ask for at least 1"));
        }
        self.queue.push_back(request);
        Ok(())
    }

    /// Gives queued requests a slot and their pages, strictly in order, while both are free.
    ///
    /// In order means that a large request is not overtaken for ever by small ones behind it.
    fn admit(&mut self) {
        while let Some(request) = self.queue.front()
            && let Some(slot) = self.slots.iter().position(Option::is_none)
            && let tokens = request.prompt.len() + request.max_new_tokens
            && let Some(pages) = self.pages.allocate(self.limits.page_size.pages_for(tokens))
        {
            let request = self.queue.pop_front().expect("its front was just seen");
            self.slots[slot] = Some(Running { request, pages, prefilled: 0, sampled: Vec::new(), awaiting: false });
            self.order.push(Slot(slot));
        }
    }

    /// Admits what fits and plans the next step: prefill while any admitted prompt is incomplete, else decode.
    ///
    /// # Panics
    /// When tokens of the step before were not recorded.
    // Not an `Iterator`: each step depends on what `record` heard of the one before.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Step {
        let unrecorded = self.running().find(|(_, running)| running.awaiting).map(|(slot, _)| slot);
        assert!(unrecorded.is_none(), "{unrecorded:?} has sampled tokens that were not recorded");
        self.admit();
        if self.order.is_empty() {
            debug_assert!(self.queue.is_empty(), "an empty engine holds any request that `push` accepted");
            return Step::Done;
        }
        let prefill = self.plan_prefill();
        if prefill.is_empty() { self.plan_decode() } else { Step::Prefill(prefill) }
    }

    fn plan_prefill(&mut self) -> Vec<PrefillRow> {
        let mut room = self.limits.max_prefill_size;
        let mut rows = Vec::new();
        for &slot in &self.order {
            if room == 0 || rows.len() == self.limits.max_seqs_in_prefill {
                break;
            }
            let running = self.slots[slot.0].as_mut().expect("`order` lists running slots");
            let prompt = &running.request.prompt;
            let position = running.prefilled;
            let end = prompt.len().min(position + room);
            if position == end {
                continue;
            }
            room -= end - position;
            running.prefilled = end;
            running.awaiting = end == prompt.len();
            let (tokens, samples) = (prompt[position..end].to_vec(), running.awaiting);
            rows.push(PrefillRow { slot, id: running.request.id, tokens, position, samples });
        }
        rows
    }

    fn plan_decode(&mut self) -> Step {
        let mut rounds = self.limits.max_rounds;
        let mut rows = Vec::with_capacity(self.order.len());
        for (slot, running) in self.slots.iter_mut().enumerate() {
            let Some(running) = running else { continue };
            running.awaiting = true;
            rounds = rounds.min(running.remaining());
            let token = *running.sampled.last().expect("a complete prefill has sampled a token");
            let position = running.request.prompt.len() + running.sampled.len() - 1;
            rows.push(DecodeRow { slot: Slot(slot), id: running.request.id, token, position });
        }
        Step::Decode { rows, rounds }
    }

    /// Takes the tokens that a step sampled for `slot`; frees the slot and answers the sample when it has ended.
    ///
    /// # Panics
    /// When the last step did not sample this slot, or `tokens` is empty.
    pub fn record(&mut self, slot: Slot, tokens: &[u32]) -> Option<Finished> {
        let running = self.slots[slot.0].as_mut().filter(|running| running.awaiting);
        let running = running.unwrap_or_else(|| panic!("{slot:?} was not sampled by the last step"));
        assert!(!tokens.is_empty(), "{slot:?} sampled no token");
        running.awaiting = false;
        let from = running.sampled.len();
        running.sampled.extend_from_slice(tokens);
        let end = self.stop.end(&running.sampled, from, running.request.max_new_tokens)?;

        let mut running = self.slots[slot.0].take().expect("it was just seen");
        self.order.retain(|&other| other != slot);
        self.pages.release(running.pages);
        running.sampled.truncate(end.tokens);
        let Request { id, prompt, .. } = running.request;
        Some(Finished { id, prompt, tokens: running.sampled, text_tokens: end.text_tokens, reason: end.reason })
    }

    fn running(&self) -> impl Iterator<Item = (Slot, &Running)> {
        self.slots.iter().enumerate().filter_map(|(slot, running)| Some((Slot(slot), running.as_ref()?)))
    }

    /// The pages of the sequence in `slot`, in token order; empty for a free slot.
    pub fn pages(&self, slot: Slot) -> &[PageId] {
        self.slots[slot.0].as_ref().map_or(&[], |running| &running.pages)
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Requests that wait for a slot.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Sequences in slots.
    pub fn active(&self) -> usize {
        self.order.len()
    }

    /// Pages reserved by running sequences.
    pub fn pages_used(&self) -> usize {
        self.pages.used()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn limits(max_seqs: usize, max_pages: usize, page_size: usize) -> Limits {
        Limits {
            max_seq_len: 64,
            max_seqs,
            max_pages,
            page_size: PageSize::new(page_size).unwrap(),
            max_seqs_in_prefill: 2,
            max_prefill_size: 5,
            max_rounds: 4,
        }
    }

    fn request(index: usize, prompt: usize, max_new_tokens: usize) -> Request {
        let id = SampleId { round: 0, index, generation: 0 };
        Request { id, prompt: (0..prompt).map(|at| (index * 100 + at) as u32).collect(), max_new_tokens }
    }

    /// The fake model: the token after `position` of sample `index`; 1 (EOS) ends some samples early.
    fn model(index: usize, position: usize) -> u32 {
        if (index * 31 + position * 17).is_multiple_of(23) { 1 } else { (1000 + index * 64 + position) as u32 }
    }

    /// Runs all requests on a fake device that holds a KV cache page by page and checks every read and write.
    fn simulate(limits: Limits, requests: &[Request]) -> Result<BTreeMap<usize, Finished>, TestCaseError> {
        let mut scheduler = Scheduler::new(limits, StopRule::new([1], vec![]));
        for request in requests {
            scheduler.push(request.clone()).unwrap();
        }
        let mut cache: BTreeMap<(PageId, usize), u32> = BTreeMap::new();
        let mut finished = BTreeMap::new();
        loop {
            let step = scheduler.next();
            let mut owned = BTreeSet::new();
            for slot in 0..limits.max_seqs {
                for &page in scheduler.pages(Slot(slot)) {
                    prop_assert!(owned.insert(page), "a page is shared");
                }
                prop_assert!(scheduler.pages(Slot(slot)).len() <= limits.pages_per_seq());
            }
            prop_assert_eq!(owned.len(), scheduler.pages_used());
            prop_assert!(owned.len() <= limits.max_pages && scheduler.active() <= limits.max_seqs);
            let address = |scheduler: &Scheduler, slot, at: usize| {
                (scheduler.pages(slot)[at / limits.page_size.tokens()], at % limits.page_size.tokens())
            };
            let mut results: Vec<(Slot, SampleId, Vec<u32>)> = Vec::new();
            match step {
                Step::Done => break,
                Step::Prefill(rows) => {
                    prop_assert!(!rows.is_empty() && rows.len() <= limits.max_seqs_in_prefill);
                    let tokens: usize = rows.iter().map(|row| row.tokens.len()).sum();
                    prop_assert!(tokens <= limits.max_prefill_size);
                    for row in rows {
                        let prompt = &requests[row.id.index].prompt;
                        for (offset, &token) in row.tokens.iter().enumerate() {
                            cache.insert(address(&scheduler, row.slot, row.position + offset), token);
                        }
                        // Every prompt token up to here is in this sequence's own pages.
                        for (at, token) in prompt[..row.kv_len()].iter().enumerate() {
                            prop_assert_eq!(cache.get(&address(&scheduler, row.slot, at)), Some(token));
                        }
                        prop_assert_eq!(row.samples, row.kv_len() == prompt.len());
                        if row.samples {
                            results.push((row.slot, row.id, vec![model(row.id.index, prompt.len())]));
                        }
                    }
                }
                Step::Decode { rows, rounds } => {
                    prop_assert_eq!(rows.len(), scheduler.active());
                    prop_assert!(rounds >= 1 && rounds <= limits.max_rounds);
                    for row in rows {
                        let mut token = row.token;
                        let mut sampled = Vec::new();
                        for round in 0..rounds {
                            let position = row.position + round;
                            prop_assert_eq!(token, model(row.id.index, position), "the fed-back token");
                            cache.insert(address(&scheduler, row.slot, position), token);
                            token = model(row.id.index, position + 1);
                            sampled.push(token);
                        }
                        results.push((row.slot, row.id, sampled));
                    }
                }
            }
            for (slot, id, tokens) in results {
                if let Some(done) = scheduler.record(slot, &tokens) {
                    prop_assert_eq!(done.id, id);
                    prop_assert!(finished.insert(id.index, done).is_none(), "finished twice");
                }
            }
        }
        prop_assert_eq!((scheduler.pages_used(), scheduler.active(), scheduler.waiting()), (0, 0, 0));
        Ok(finished)
    }

    proptest! {
        /// Whatever the limits and requests, each request finishes with exactly the tokens that it yields alone.
        #[test]
        fn every_request_finishes_with_its_own_tokens(
            (max_seqs, extra_pages, page_size) in (1usize..5, 0usize..20, 1usize..9),
            (max_seqs_in_prefill, max_prefill_size, max_rounds) in (1usize..4, 1usize..20, 1usize..9),
            sizes in prop::collection::vec((1usize..30, 1usize..30), 0..20),
        ) {
            let page_size = PageSize::new(page_size).unwrap();
            let most = sizes.iter().map(|(prompt, new)| page_size.pages_for(prompt + new)).max().unwrap_or(1);
            let max_pages = most + extra_pages;
            let limits = Limits {
                max_seq_len: 64, max_seqs, max_pages, page_size, max_seqs_in_prefill, max_prefill_size, max_rounds,
            };
            let requests: Vec<_> =
                sizes.iter().enumerate().map(|(index, &(prompt, new))| request(index, prompt, new)).collect();
            let finished = simulate(limits, &requests)?;
            prop_assert_eq!(finished.len(), requests.len());
            for (request, done) in requests.iter().zip(finished.values()) {
                let mut alone: Vec<u32> = (0..request.max_new_tokens)
                    .map(|at| model(request.id.index, request.prompt.len() + at)).collect();
                let eos = alone.iter().position(|&token| token == 1);
                alone.truncate(eos.map_or(alone.len(), |at| at + 1));
                prop_assert_eq!(&done.tokens, &alone);
                prop_assert_eq!(done.text_tokens, eos.unwrap_or(alone.len()));
                prop_assert_eq!(done.reason == FinishReason::Stop, eos.is_some());
            }
        }
    }

    #[test]
    fn a_small_schedule() {
        // Two slots, and pages for one long and one short sequence: the third waits for the second's pages.
        let mut scheduler = Scheduler::new(limits(2, 5, 4), StopRule::default());
        for request in [request(0, 7, 3), request(1, 2, 6), request(2, 1, 1)] {
            scheduler.push(request).unwrap();
        }
        let row = |step: &Step| match step {
            Step::Prefill(rows) => rows.iter().map(|r| (r.slot.0, r.position, r.tokens.len(), r.samples)).collect(),
            other => panic!("{other:?}"),
        };
        let step: Vec<_> = row(&scheduler.next());
        assert_eq!(step, [(0, 0, 5, false)]);
        assert_eq!(scheduler.pages_used(), 5);
        let step: Vec<_> = row(&scheduler.next());
        assert_eq!(step, [(0, 5, 2, true), (1, 0, 2, true)]);
        assert_eq!(scheduler.record(Slot(0), &[50]), None);
        assert_eq!(scheduler.record(Slot(1), &[60]), None);
        let Step::Decode { rows, rounds } = scheduler.next() else { panic!() };
        assert_eq!(rounds, 2, "slot 0 has two tokens left");
        assert_eq!(rows.iter().map(|row| (row.token, row.position)).collect::<Vec<_>>(), [(50, 7), (60, 2)]);
        assert_eq!(scheduler.record(Slot(0), &[51, 52]).unwrap().tokens, [50, 51, 52]);
        assert_eq!(scheduler.record(Slot(1), &[61, 62]), None);
        let step: Vec<_> = row(&scheduler.next());
        assert_eq!(step, [(0, 0, 1, true)], "request 2 takes the freed slot");
    }

    #[test]
    fn what_can_never_run_is_refused() {
        let mut scheduler = Scheduler::new(limits(2, 5, 4), StopRule::default());
        let cases = [
            (0, 3, "prompts[0] = \"\" is empty, and the tokenizer puts no token before it: give it at least one token"),
            (
                64,
                3,
                "prompts[0] = 64 tokens leaves no room for a new token within engine.max_seq_len = 64: \
                 shorten it or raise engine.max_seq_len to 67",
            ),
            (
                60,
                5,
                "max_new_tokens = 5 and the 60 tokens of prompts[0] exceed engine.max_seq_len = 64: \
                 raise engine.max_seq_len to 65 or lower max_new_tokens to 4",
            ),
            (18, 3, "engine.max_pages = 5 holds 20 tokens, but prompts[0] alone needs 21: raise it to 6 or more"),
            (3, 0, "max_new_tokens = 0 asks for no token: ask for at least 1"),
        ];
        for (prompt, new, message) in cases {
            assert_eq!(scheduler.push(request(0, prompt, new)).unwrap_err().to_string(), message);
        }
        assert_eq!(scheduler.next(), Step::Done);
    }
}
