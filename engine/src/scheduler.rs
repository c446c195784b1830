//! Continuous batching over paged KV: which sequences run in which slot, and what the next step computes.
//!
//! Pure: no device, no clock, no randomness, so the order of steps depends on the requests alone. Each sequence is
//! admitted in order, when a slot and *all* the pages it can ever need (prompt and new tokens) are free. Reserving up
//! front means that an admitted sequence always finishes: nothing is preempted, recomputed or dead-locked. The price is
//! that a sequence which stops early has held pages that it did not fill.
//!
//! **Prefill, decode, and both in one step.** While an admitted prompt is incomplete, the next step is a prefill step:
//! chunks of prompts, in the order of admission, up to `max_prefill_size` rows. It is a program of so many rows whether
//! they are used or not, and streams all weights, as a decode step does. So with [`Scheduler::with_mixed_steps`] it
//! carries the decoding sequences along, one row each, all of them or none: all when they fit in half of the rows (then
//! prompts have the rest) or in the rows that prompts leave. A row that was padding costs nothing; a row that a prompt
//! would have had costs its share of a prefill step, and saves as much of a decode step, which is more. Each prefill step
//! then saves one decode step: much where prompts keep coming and samples are short, next to nothing where each prompt
//! yields thousands of tokens. It is off unless asked for, because the two programs round differently: a text would
//! depend on what ran beside it.
//!
//! With or without, nothing that decodes stalls behind an endless stream of prompts: when `max_seqs` sequences were
//! admitted since it had a step, no more is admitted until it has one.
//!
//! **Shared pages.** Sequences whose prompts begin with the same full pages hold these pages together (see `prefix`); the page
//! of a prompt's last token is its own. So the samples of one prompt compute it once, and prompts that begin alike compute
//! their beginning once, also one after another, while there is room: pages that nobody holds are kept until others need them.
//!
//! Invariants:
//! - a page that is written belongs to one running sequence, and pages that are shared hold what each of their
//!   sequences would have written there, before any of them reads it: one of them writes, and the others start in a
//!   later step, because within a step a lowering may write the KV of a sequence when it attends;
//! - every request that [`Scheduler::push`] accepted ends in exactly one [`Finished`], with at most its budget of tokens,
//!   and one that is refused has a reason; no page outlives its sequences;
//! - limits of [`Limits`] hold in every step; a decode step runs no sequence beyond its budget, so the device needs no
//!   mask for length;
//! - a step takes time in proportion to the sequences that run and their rows, whatever is queued.
//!
//! Use: `push` requests at any time, repeat [`Scheduler::next`], run the step, and [`Scheduler::record`] the sampled
//! tokens of every row that samples; `next` answers [`Step::Done`] when nothing is left. [`Scheduler::cancel`] between
//! steps.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::pages::PageAllocator;
use crate::prefix::Prefixes;
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
    /// Which sample of the run; no two that are queued or run have the same.
    pub id: SampleId,
    /// The prompt's tokens.
    pub prompt: Arc<[u32]>,
    /// The budget of new tokens, at least one.
    pub max_new_tokens: usize,
}

/// A sample that is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Which sample of the run.
    pub id: SampleId,
    /// The prompt's tokens.
    pub prompt: Arc<[u32]>,
    /// The new tokens, the stopping one included.
    pub tokens: Vec<u32>,
    /// How many of `tokens` belong to the text (see [`crate::stop`]).
    pub text_tokens: usize,
    /// Why it ended.
    pub reason: FinishReason,
}

/// A row of a prefill step: consecutive tokens of one sequence, of its prompt, or the last one that it sampled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefillRow {
    /// Where the sequence runs.
    pub slot: Slot,
    /// Which sample it is.
    pub id: SampleId,
    /// The tokens, at least one.
    pub tokens: Vec<u32>,
    /// Position of the first of them; `position + tokens.len()` is the KV length after the step.
    pub position: usize,
    /// Whether the step samples this row's next token: the chunk ends the prompt, or the sequence decodes.
    pub samples: bool,
    /// Whether the sequence decodes, carried along by a step of other sequences' prompts.
    pub decodes: bool,
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
    /// Write the rows' tokens to the cache; sample one token for each row that `samples`, and `record` it.
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

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefill(rows) => {
                let tokens: usize = rows.iter().map(|row| row.tokens.len()).sum();
                write!(f, "prefill of {tokens} tokens of {} sequences", rows.len())
            }
            Self::Decode { rows, rounds } => write!(f, "decode of {} sequences, {rounds} steps", rows.len()),
            Self::Done => f.write_str("nothing"),
        }
    }
}

#[derive(Debug)]
struct Running {
    request: Request,
    pages: Vec<PageId>,
    /// Tokens at the beginning of the prompt that lie in pages which equal prompts share.
    shared: usize,
    /// Prompt tokens that this sequence itself has got as far as. Of the shared ones, others may have written more.
    prefilled: usize,
    sampled: Vec<u32>,
    /// A planned step samples this row, and `record` was not called yet.
    awaiting: bool,
}

impl Running {
    fn remaining(&self) -> usize {
        self.request.max_new_tokens - self.sampled.len()
    }

    fn decodes(&self) -> bool {
        self.prefilled == self.request.prompt.len()
    }

    /// The last sampled token of a sequence that decodes, as the row of a step that samples the next one.
    fn decode_row(&mut self, slot: Slot) -> DecodeRow {
        self.awaiting = true;
        let token = *self.sampled.last().expect("a complete prefill has sampled a token");
        let position = self.request.prompt.len() + self.sampled.len() - 1;
        DecodeRow { slot, id: self.request.id, token, position }
    }

    fn finished(self, text_tokens: usize, reason: FinishReason) -> Finished {
        let Request { id, prompt, .. } = self.request;
        Finished { id, prompt, tokens: self.sampled, text_tokens, reason }
    }
}

/// Where a request is that has not ended.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// In the queue, under this number.
    Queued(u64),
    Running(Slot),
}

/// The scheduler of one engine.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    mixed: bool,
    stop: StopRule,
    /// By a number that grows: the order of arrival, from which any can be taken.
    queue: BTreeMap<u64, Request>,
    arrivals: u64,
    places: HashMap<SampleId, Place>,
    slots: Vec<Option<Running>>,
    /// The lowest first.
    free_slots: BinaryHeap<Reverse<usize>>,
    /// Sequences whose prompts are incomplete, in the order of admission.
    prefilling: Vec<Slot>,
    /// Sequences admitted since those that decode had a step.
    admitted: usize,
    /// Unless prompts share nothing.
    prefixes: Option<Prefixes>,
    pages: PageAllocator,
}

impl Scheduler {
    /// A scheduler with no requests, whose steps are prefill or decode.
    pub fn new(limits: Limits, stop: StopRule) -> Self {
        Self {
            limits,
            mixed: false,
            stop,
            queue: BTreeMap::new(),
            arrivals: 0,
            places: HashMap::new(),
            slots: (0..limits.max_seqs).map(|_| None).collect(),
            free_slots: (0..limits.max_seqs).map(Reverse).collect(),
            prefilling: Vec::new(),
            admitted: 0,
            prefixes: Some(Prefixes::new(limits.page_size.tokens())),
            pages: PageAllocator::new(limits.max_pages),
        }
    }

    /// Whether prefill steps carry decoding sequences along, where they fit.
    #[must_use]
    pub fn with_mixed_steps(self, mixed: bool) -> Self {
        Self { mixed, ..self }
    }

    /// Whether prompts that begin alike share pages.
    #[must_use]
    pub fn with_shared_prefixes(self, shared: bool) -> Self {
        Self { prefixes: shared.then(|| Prefixes::new(self.limits.page_size.tokens())), ..self }
    }

    /// Queues a request behind all others.
    ///
    /// # Errors
    /// When it could never run under the limits, or one with its id has not ended.
    pub fn push(&mut self, request: Request) -> Result<()> {
        self.check(&request)?;
        self.places.insert(request.id, Place::Queued(self.arrivals));
        self.queue.insert(self.arrivals, request);
        self.arrivals += 1;
        Ok(())
    }

    /// What [`push`](Self::push) would say to a request.
    ///
    /// # Errors
    /// As there.
    pub fn check(&self, request: &Request) -> Result<()> {
        let prompt = format!("prompts[{}]", request.id.index);
        self.limits.check(&prompt, request.prompt.len(), request.max_new_tokens)?;
        if request.max_new_tokens == 0 {
            return Err(Error::setting("max_new_tokens", 0, "asks for no token", "ask for at least 1"));
        }
        if self.places.contains_key(&request.id) {
            let SampleId { round, generation, .. } = request.id;
            let sample = format!("round {round}, generation {generation}");
            let fix = "wait for it, cancel it, or use another id";
            return Err(Error::setting(prompt, sample, "was submitted before and has not ended", fix));
        }
        Ok(())
    }

    /// The requests that have a slot, with what they have sampled so far.
    pub fn sampled(&self) -> impl Iterator<Item = (SampleId, &[u32])> {
        self.running().map(|(_, running)| (running.request.id, running.sampled.as_slice()))
    }

    /// Ends a request, queued or running, with the tokens that it has: `None` when there is none of this id, because it
    /// has ended or was never pushed.
    ///
    /// # Panics
    /// When tokens of the last step were not recorded.
    pub fn cancel(&mut self, id: SampleId) -> Option<Finished> {
        self.assert_recorded();
        match self.places.remove(&id)? {
            Place::Queued(number) => {
                let Request { id, prompt, .. } = self.queue.remove(&number).expect("`places` says where it is");
                Some(Finished { id, prompt, tokens: Vec::new(), text_tokens: 0, reason: FinishReason::Cancelled })
            }
            Place::Running(slot) => {
                let running = self.vacate(slot);
                let text_tokens = running.sampled.len();
                Some(running.finished(text_tokens, FinishReason::Cancelled))
            }
        }
    }

    /// Frees the slot of a running sequence and lets go of its pages.
    fn vacate(&mut self, slot: Slot) -> Running {
        let mut running = self.slots[slot.0].take().expect("only running sequences are vacated");
        self.free_slots.push(Reverse(slot.0));
        self.prefilling.retain(|&other| other != slot);
        self.places.remove(&running.request.id);
        let pages = std::mem::take(&mut running.pages);
        match &mut self.prefixes {
            Some(prefixes) => prefixes.release(pages, &mut self.pages),
            None => self.pages.release(pages),
        }
        running
    }

    /// Gives queued requests a slot and their pages, strictly in order, while both are free.
    ///
    /// In order means that a large request is not overtaken for ever by small ones behind it.
    fn admit(&mut self) {
        let page_size = self.limits.page_size;
        while let Some((_, Request { prompt, max_new_tokens, .. })) = self.queue.first_key_value()
            && let Some(&Reverse(slot)) = self.free_slots.peek()
            && (self.admitted < self.limits.max_seqs || self.active() == self.prefilling.len())
        {
            // The last token of a prompt is computed by every sequence: what comes after it is sampled from its row.
            let shared = match self.prefixes {
                Some(_) => (prompt.len() - 1) / page_size.tokens() * page_size.tokens(),
                None => 0,
            };
            let needed = page_size.pages_for(prompt.len() + max_new_tokens);
            let pages = match &mut self.prefixes {
                Some(prefixes) => prefixes.take(&prompt[..shared], needed, &mut self.pages),
                None => self.pages.allocate(needed),
            };
            let Some(pages) = pages else { break };
            let (_, request) = self.queue.pop_first().expect("its front was just seen");
            self.free_slots.pop();
            self.places.insert(request.id, Place::Running(Slot(slot)));
            self.slots[slot] =
                Some(Running { request, pages, shared, prefilled: 0, sampled: Vec::new(), awaiting: false });
            self.prefilling.push(Slot(slot));
            self.admitted += 1;
        }
    }

    fn assert_recorded(&self) {
        let unrecorded = self.running().find(|(_, running)| running.awaiting).map(|(slot, _)| slot);
        assert!(unrecorded.is_none(), "{unrecorded:?} has sampled tokens that were not recorded");
    }

    /// Admits what fits and plans the next step: prefill while any admitted prompt is incomplete, else decode.
    ///
    /// # Panics
    /// When tokens of the step before were not recorded.
    // Not an `Iterator`: each step depends on what `record` heard of the one before.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Step {
        self.assert_recorded();
        self.admit();
        if self.active() == 0 {
            debug_assert!(self.queue.is_empty(), "an empty engine holds any request that `push` accepted");
            return Step::Done;
        }
        if self.prefilling.is_empty() { self.plan_decode() } else { Step::Prefill(self.plan_prefill()) }
    }

    fn plan_prefill(&mut self) -> Vec<PrefillRow> {
        let size = self.limits.max_prefill_size;
        let decoding = if self.mixed { self.active() - self.prefilling.len() } else { 0 };
        let reserved = if decoding <= size / 2 { decoding } else { 0 };
        let (mut rows, left) = self.plan_prompts(size - reserved);
        if decoding > 0 && decoding <= left + reserved {
            self.admitted = 0;
            let decoding =
                self.slots.iter_mut().enumerate().filter_map(|(slot, running)| Some((slot, running.as_mut()?)));
            // A prompt that this step completes has no token to feed back yet.
            let decoding = decoding.filter(|(_, running)| !running.sampled.is_empty());
            rows.extend(decoding.map(|(slot, running)| {
                let DecodeRow { slot, id, token, position } = running.decode_row(Slot(slot));
                PrefillRow { slot, id, tokens: vec![token], position, samples: true, decodes: true }
            }));
        }
        rows
    }

    /// Chunks of incomplete prompts, of `room` tokens together, and the room that they leave.
    fn plan_prompts(&mut self, mut room: usize) -> (Vec<PrefillRow>, usize) {
        let mut rows = Vec::new();
        // What this step writes of shared pages: others see it from the next step on.
        let mut written: HashMap<PageId, usize> = HashMap::new();
        let page_size = self.limits.page_size.tokens();
        for &slot in &self.prefilling {
            if room == 0 || rows.len() == self.limits.max_seqs_in_prefill {
                break;
            }
            let running = self.slots[slot.0].as_mut().expect("`prefilling` lists running slots");
            let (prompt, shared, pages) = (&running.request.prompt, running.shared, &running.pages);
            let position = match &self.prefixes {
                Some(prefixes) if running.prefilled < shared => prefixes.written(&pages[..shared / page_size]),
                _ => running.prefilled,
            };
            // Whoever writes of this chain begins here, too.
            if position < shared && written.contains_key(&pages[position / page_size]) {
                continue;
            }
            let end = prompt.len().min(position + room);
            // Begun by the first of these tokens, or before it.
            let from = position / page_size * page_size;
            for (page, begin) in pages[position / page_size..].iter().zip((from..end.min(shared)).step_by(page_size)) {
                written.insert(*page, (end - begin).min(page_size));
            }
            room -= end - position;
            let samples = end == prompt.len();
            let (id, tokens) = (running.request.id, prompt[position..end].to_vec());
            (running.prefilled, running.awaiting) = (end, samples);
            rows.push(PrefillRow { slot, id, tokens, position, samples, decodes: false });
        }
        if let Some(prefixes) = &mut self.prefixes {
            written.into_iter().for_each(|(page, tokens)| prefixes.write(page, tokens));
        }
        self.prefilling.retain(|slot| self.slots[slot.0].as_ref().is_some_and(|running| !running.decodes()));
        (rows, room)
    }

    fn plan_decode(&mut self) -> Step {
        self.admitted = 0;
        let running = self.slots.iter_mut().enumerate().filter_map(|(slot, running)| Some((slot, running.as_mut()?)));
        let (rows, left): (Vec<_>, Vec<_>) =
            running.map(|(slot, running)| (running.decode_row(Slot(slot)), running.remaining())).unzip();
        let rounds = left.into_iter().fold(self.limits.max_rounds, usize::min);
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
        let mut running = self.vacate(slot);
        running.sampled.truncate(end.tokens);
        Some(running.finished(end.text_tokens, end.reason))
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
        self.slots.len() - self.free_slots.len()
    }

    /// Pages reserved by running sequences; a page that several share counts once.
    pub fn pages_used(&self) -> usize {
        self.pages.used() - self.prefixes.as_ref().map_or(0, Prefixes::idle)
    }
}

/// Splits the samples of a run, in their order, into batches of at most `prompts` prompts of one round with all their
/// samples, as Levanter's `max_prompts_per_batch` does; one batch of all when it is not set.
///
/// # Panics
/// When `prompts` is 0.
pub fn batches(ids: &[SampleId], prompts: Option<usize>) -> impl Iterator<Item = &[SampleId]> {
    let mut rest = ids;
    std::iter::from_fn(move || {
        let first = rest.first()?;
        let end = match prompts {
            None => rest.len(),
            Some(prompts) => {
                let in_round = rest.partition_point(|id| id.round == first.round);
                rest[..in_round].chunk_by(|a, b| a.index == b.index).take(prompts).map(<[SampleId]>::len).sum()
            }
        };
        assert!(end > 0, "a batch holds a prompt");
        let (batch, after) = rest.split_at(end);
        rest = after;
        Some(batch)
    })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::{BTreeMap, BTreeSet, VecDeque};

    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    use super::*;

    const EOS: u32 = 1;

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

    fn id(index: usize) -> SampleId {
        SampleId { round: 0, index, generation: 0 }
    }

    fn request(index: usize, prompt: usize, max_new_tokens: usize) -> Request {
        Request { id: id(index), prompt: (0..prompt).map(|at| (index * 100 + at) as u32).collect(), max_new_tokens }
    }

    /// The fake model: the token at `position` of a sample; [`EOS`] ends some samples early.
    fn model(id: SampleId, position: usize) -> u32 {
        let number = (id.index * 31 + id.generation as usize * 7 + id.round as usize * 3 + position) * 2_654_435_761;
        let number = (number >> 7) as u32;
        if number.is_multiple_of(29) { EOS } else { 2 + number % 1000 }
    }

    /// What a request yields when it runs alone.
    fn alone(request: &Request, stop: &StopRule) -> Finished {
        let Request { id, prompt, max_new_tokens } = request.clone();
        let mut tokens: Vec<u32> = (0..max_new_tokens).map(|at| model(id, prompt.len() + at)).collect();
        let end = stop.end(&tokens, 0, max_new_tokens).expect("the budget ends it");
        tokens.truncate(end.tokens);
        Finished { id, prompt, tokens, text_tokens: end.text_tokens, reason: end.reason }
    }

    /// A token's key and value in the cache: they depend on all tokens up to here, as in a model.
    #[derive(Clone, Copy, Debug)]
    struct Entry {
        history: u64,
        step: usize,
        writer: SampleId,
    }

    /// The history of a text of one more token.
    fn extend(history: u64, token: u32) -> u64 {
        (history ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
    }

    /// A fake device, which holds a KV cache page by page and checks every read and write.
    struct Device {
        limits: Limits,
        stop: StopRule,
        mixed: bool,
        scheduler: Scheduler,
        cache: BTreeMap<(PageId, usize), Entry>,
        /// Prompt and sampled tokens of what runs.
        texts: BTreeMap<SampleId, Vec<u32>>,
        /// Steps since each sequence that decodes had one.
        stalled: BTreeMap<SampleId, usize>,
        /// Longest of these.
        longest_stall: usize,
        step: usize,
        seen: Seen,
    }

    /// How much of what is tested came up.
    #[derive(Clone, Copy, Debug, Default)]
    struct Seen {
        /// Pages that running sequences did not have to take, at most.
        shared: usize,
        /// Pages that were used again after nobody had held them.
        reused: usize,
        /// Rows of sequences that decode, in prefill steps.
        carried: usize,
        cancelled_running: usize,
        refused: usize,
        stopped: usize,
    }

    impl Device {
        fn new(limits: Limits, stop: StopRule, mixed: bool, shares: bool) -> Self {
            let scheduler = Scheduler::new(limits, stop.clone()).with_mixed_steps(mixed).with_shared_prefixes(shares);
            Self {
                limits,
                stop,
                mixed,
                scheduler,
                cache: BTreeMap::new(),
                texts: BTreeMap::new(),
                stalled: BTreeMap::new(),
                longest_stall: 0,
                step: 0,
                seen: Seen::default(),
            }
        }

        /// Pages have the holders that they should have, and the scheduler's counts are right.
        fn check_pages(&mut self) -> Result<(), TestCaseError> {
            let page_size = self.limits.page_size.tokens();
            let running: Vec<(Vec<u32>, Vec<PageId>)> = self
                .scheduler
                .running()
                .map(|(slot, running)| (running.request.prompt.to_vec(), self.scheduler.pages(slot).to_vec()))
                .collect();
            prop_assert_eq!(running.len(), self.scheduler.active());
            prop_assert!(running.len() <= self.limits.max_seqs);
            let mut holders: BTreeMap<PageId, usize> = BTreeMap::new();
            for (_, pages) in &running {
                prop_assert!(pages.len() <= self.limits.pages_per_seq());
                prop_assert_eq!(pages.iter().collect::<BTreeSet<_>>().len(), pages.len());
                pages.iter().for_each(|page| *holders.entry(*page).or_default() += 1);
            }
            prop_assert_eq!(holders.len(), self.scheduler.pages_used());
            let idle = self.scheduler.prefixes.as_ref().map_or(0, Prefixes::idle);
            prop_assert!(holders.len() + idle <= self.limits.max_pages);
            // The pages that a sequence writes alone begin with that of its prompt's last token.
            let shareable = |prompt: &[u32]| (prompt.len() - 1) / page_size;
            for (prompt, pages) in &running {
                prop_assert!(pages[shareable(prompt)..].iter().all(|page| holders[page] == 1), "two write one page");
                for (other, others_pages) in &running {
                    let full = shareable(prompt).min(shareable(other));
                    let is_alike = |page: &usize| prompt[..page * page_size] == other[..page * page_size];
                    let alike = (0..=full).rev().find(is_alike).unwrap_or(0);
                    if self.scheduler.prefixes.is_some() {
                        prop_assert_eq!(&pages[..alike], &others_pages[..alike], "what begins alike is shared");
                    }
                }
            }
            // What nobody holds, and is not kept for prompts to come, is lost.
            let kept = |page: &PageId| self.scheduler.prefixes.as_ref().is_some_and(|prefixes| prefixes.is_idle(*page));
            let mut cache = std::mem::take(&mut self.cache);
            cache.retain(|(page, _), _| holders.contains_key(page) || kept(page));
            self.cache = cache;
            self.seen.shared = self.seen.shared.max(holders.values().sum::<usize>() - holders.len());
            Ok(())
        }

        /// The device's work for one row: writes a token at `position`, and reads all that the row sees.
        fn write(&mut self, slot: Slot, id: SampleId, position: usize, token: u32) -> Result<(), TestCaseError> {
            let page_size = self.limits.page_size.tokens();
            let pages = self.scheduler.pages(slot).to_vec();
            let address = |at: usize| (pages[at / page_size], at % page_size);
            let text = &self.texts[&id];
            prop_assert_eq!(text[position], token, "the token fed at {}", position);
            let mut history = 0;
            for (at, &token) in text[..position].iter().enumerate() {
                history = extend(history, token);
                let entry = self.cache.get(&address(at));
                prop_assert!(
                    entry.is_some_and(|entry| entry.history == history
                        && (entry.step < self.step || entry.writer == id)),
                    "{id:?} at {position} reads {entry:?} at {at} in step {}",
                    self.step
                );
            }
            let entry = Entry { history: extend(history, token), step: self.step, writer: id };
            prop_assert!(self.cache.insert(address(position), entry).is_none(), "written twice");
            Ok(())
        }

        /// Runs one step: what finished, or `None` when nothing is left.
        fn poll(&mut self) -> Result<Option<Vec<Finished>>, TestCaseError> {
            let step = self.scheduler.next();
            self.step += 1;
            if let Some(prefixes) = &mut self.scheduler.prefixes {
                let forgotten = std::mem::take(&mut prefixes.log.forgotten);
                self.cache.retain(|(page, _), _| !forgotten.contains(page));
                self.seen.reused = prefixes.log.reused;
            }
            self.check_pages()?;
            let complete = |device: &Self, id: &SampleId, prompt: usize| device.texts[id].len() > prompt;
            let mut decoding: BTreeMap<SampleId, usize> = BTreeMap::new();
            for (_, running) in self.scheduler.running() {
                let Request { id, prompt, .. } = &running.request;
                self.texts.entry(*id).or_insert_with(|| prompt.to_vec());
                if complete(self, id, prompt.len()) {
                    decoding.insert(*id, self.stalled.get(id).copied().unwrap_or(0) + 1);
                }
            }
            let mut results: Vec<(Slot, SampleId, Vec<u32>)> = Vec::new();
            match step {
                Step::Done => {
                    prop_assert_eq!((self.scheduler.waiting(), self.scheduler.active()), (0, 0));
                    return Ok(None);
                }
                Step::Prefill(rows) => {
                    let prompts = rows.iter().filter(|row| !row.decodes).count();
                    prop_assert!(prompts > 0 && prompts <= self.limits.max_seqs_in_prefill);
                    prop_assert!(rows.len() == prompts || self.mixed);
                    prop_assert!(rows.len() == prompts || rows.len() - prompts == decoding.len(), "all or none");
                    prop_assert_eq!(rows.iter().map(|row| row.slot).collect::<BTreeSet<_>>().len(), rows.len());
                    let tokens: usize = rows.iter().map(|row| row.tokens.len()).sum();
                    prop_assert!(tokens <= self.limits.max_prefill_size);
                    let spare = self.limits.max_prefill_size - tokens;
                    let rides = rows.len() > prompts || decoding.is_empty() || !self.mixed;
                    prop_assert!(rides || decoding.len() > spare, "padding that a token could have had");
                    for row in rows {
                        let known = self.texts[&row.id].len();
                        for (offset, &token) in row.tokens.iter().enumerate() {
                            self.write(row.slot, row.id, row.position + offset, token)?;
                        }
                        prop_assert_eq!(row.samples, row.kv_len() == known);
                        prop_assert_eq!(row.decodes, decoding.contains_key(&row.id));
                        if row.decodes {
                            self.seen.carried += 1;
                            decoding.insert(row.id, 0);
                        }
                        if row.samples {
                            results.push((row.slot, row.id, vec![model(row.id, known)]));
                        }
                    }
                }
                Step::Decode { rows, rounds } => {
                    prop_assert_eq!(rows.len(), self.scheduler.active());
                    prop_assert!(rounds >= 1 && rounds <= self.limits.max_rounds);
                    for row in rows {
                        let mut sampled = Vec::new();
                        // The device stops at EOS by itself, and the host at a stop sequence.
                        for position in row.position..row.position + rounds {
                            let token = self.texts[&row.id][position];
                            prop_assert!(position > row.position || token == row.token);
                            self.write(row.slot, row.id, position, token)?;
                            let next = model(row.id, position + 1);
                            sampled.push(next);
                            self.texts.get_mut(&row.id).expect("it runs").push(next);
                            if self.stop.eos().contains(&next) {
                                break;
                            }
                        }
                        let known = self.texts[&row.id].len() - sampled.len();
                        self.texts.get_mut(&row.id).expect("it runs").truncate(known);
                        decoding.insert(row.id, 0);
                        results.push((row.slot, row.id, sampled));
                    }
                }
            }
            self.longest_stall = decoding.values().copied().fold(self.longest_stall, usize::max);
            self.stalled = decoding;
            let mut finished = Vec::new();
            for (slot, id, tokens) in results {
                self.texts.get_mut(&id).expect("it runs").extend(&tokens);
                if let Some(done) = self.scheduler.record(slot, &tokens) {
                    prop_assert_eq!(done.id, id);
                    self.forget(id);
                    finished.push(done);
                }
            }
            self.check_pages()?;
            Ok(Some(finished))
        }

        fn forget(&mut self, id: SampleId) {
            self.texts.remove(&id);
            self.stalled.remove(&id);
        }
    }

    /// A run as a user may make one.
    #[derive(Clone, Debug)]
    struct Case {
        limits: Limits,
        mixed: bool,
        stop: bool,
        /// Whether prompts that begin alike share pages.
        shares: bool,
        /// What each prompt is made of (prompts of one kind begin alike), its tokens, and its budget.
        prompts: Vec<(u32, usize, usize)>,
        generations: u32,
        rounds: u32,
        /// Prompts of a batch.
        batch: Option<usize>,
        /// After how many steps of its batch each request arrives, in turn.
        arrivals: Vec<usize>,
        /// In which steps which of the requests is cancelled.
        cancels: Vec<(usize, usize)>,
    }

    fn cases() -> impl Strategy<Value = Case> {
        let limits = (1usize..6, 8usize..80, 1usize..9, 1usize..5, 1usize..24, 1usize..9).prop_map(
            |(max_seqs, max_pages, page_size, max_seqs_in_prefill, max_prefill_size, max_rounds)| Limits {
                max_seqs_in_prefill,
                max_prefill_size,
                max_rounds,
                ..limits(max_seqs, max_pages, page_size)
            },
        );
        // Some have no prompt, no budget, or are too long.
        let prompts = prop::collection::vec((0u32..3, 0usize..36, 0usize..36), 0..8);
        let samples = (1u32..5, 1u32..3, prop::option::of(1usize..4));
        let events = (prop::collection::vec(0usize..20, 1..9), prop::collection::vec((1usize..60, 0usize..40), 0..8));
        let switches = (any::<bool>(), any::<bool>(), prop::bool::weighted(0.8));
        (limits, switches, prompts, samples, events).prop_map(
            |(limits, (mixed, stop, shares), prompts, (generations, rounds, batch), (arrivals, cancels))| Case {
                limits,
                mixed,
                stop,
                shares,
                prompts,
                generations,
                rounds,
                batch,
                arrivals,
                cancels,
            },
        )
    }

    impl Case {
        fn requests(&self) -> Vec<Request> {
            let of_round = |round| {
                self.prompts.iter().enumerate().flat_map(move |(index, &(kind, length, max_new_tokens))| {
                    (0..self.generations).map(move |generation| Request {
                        id: SampleId { round, index, generation },
                        prompt: (0..length as u32).map(|at| 10_000 * (kind + 1) + at).collect(),
                        max_new_tokens,
                    })
                })
            };
            (0..self.rounds).flat_map(of_round).collect()
        }

        fn can_run(&self, request: &Request) -> bool {
            let (prompt, tokens) = (request.prompt.len(), request.prompt.len() + request.max_new_tokens);
            let pages = tokens.div_ceil(self.limits.page_size.tokens());
            prompt > 0 && request.max_new_tokens > 0 && tokens <= 64 && pages <= self.limits.max_pages
        }

        /// Runs the case on the fake device: every request ends once, with its own tokens, or is refused.
        fn check(&self) -> Result<Seen, TestCaseError> {
            let stop = match self.stop {
                true => StopRule::new([EOS], vec![vec![model(id(0), 12), model(id(0), 13)]]),
                false => StopRule::default(),
            };
            let mut device = Device::new(self.limits, stop.clone(), self.mixed, self.shares);
            let requests = self.requests();
            let mut ended: BTreeMap<SampleId, Finished> = BTreeMap::new();
            let mut refused = BTreeSet::new();
            let mut cancelled = BTreeSet::new();
            let ids: Vec<SampleId> = requests.iter().map(|request| request.id).collect();
            let batches = batches(&ids, self.batch).map(<[SampleId]>::len).collect::<Vec<_>>();
            prop_assert_eq!(batches.iter().sum::<usize>(), ids.len());
            let mut rest = requests.iter();
            for batch in batches {
                let waits = |number: usize| self.arrivals[number % self.arrivals.len()];
                let mut coming: VecDeque<(usize, &Request)> =
                    rest.by_ref().take(batch).enumerate().map(|(number, request)| (waits(number), request)).collect();
                loop {
                    // A request that is late holds up those behind it.
                    while let Some((wait, request)) = coming.front_mut() {
                        if *wait > 0 {
                            *wait -= 1;
                            break;
                        }
                        let outcome = device.scheduler.push(request.clone());
                        prop_assert_eq!(outcome.is_ok(), self.can_run(request), "{:?}", outcome);
                        match outcome {
                            Err(_) => _ = refused.insert(request.id),
                            Ok(()) => {
                                let again = device.scheduler.push(request.clone()).unwrap_err().to_string();
                                prop_assert!(again.contains("was submitted before and has not ended"), "{again}");
                            }
                        }
                        coming.pop_front();
                    }
                    let now = device.step;
                    for &(_, which) in self.cancels.iter().filter(|(step, _)| *step == now) {
                        let Some(&id) = ids.get(which % ids.len().max(1)) else { continue };
                        let running = device.texts.get(&id).cloned();
                        if let Some(done) = device.scheduler.cancel(id) {
                            prop_assert_eq!(done.reason, FinishReason::Cancelled);
                            device.seen.cancelled_running += usize::from(running.is_some());
                            let text = running.unwrap_or(done.prompt.to_vec());
                            prop_assert_eq!([&done.prompt[..], &done.tokens].concat(), text, "what it had");
                            prop_assert!(ended.insert(id, done).is_none() && cancelled.insert(id), "ended twice");
                            device.forget(id);
                            device.check_pages()?;
                        }
                        prop_assert!(device.scheduler.cancel(id).is_none());
                    }
                    match device.poll()? {
                        None if coming.is_empty() => break,
                        None => {}
                        Some(finished) => {
                            for done in finished {
                                prop_assert!(ended.insert(done.id, done).is_none(), "ended twice");
                            }
                        }
                    }
                }
                // A batch begins when all of the last one has ended.
                prop_assert_eq!((device.scheduler.pages_used(), device.scheduler.active()), (0, 0));
            }
            for request in &requests {
                let Some(done) = ended.get(&request.id) else {
                    prop_assert!(refused.contains(&request.id), "{:?} was skipped", request.id);
                    continue;
                };
                let alone = alone(request, &stop);
                if cancelled.contains(&request.id) {
                    prop_assert!(alone.tokens.starts_with(&done.tokens));
                } else {
                    prop_assert_eq!(done, &alone);
                }
            }
            prop_assert_eq!(ended.len() + refused.len(), requests.len());
            device.seen.refused = refused.len();
            device.seen.stopped = ended.values().filter(|done| done.reason == FinishReason::Stop).count();
            // Prompts admitted while one waits: twice the slots, as those that were being prefilled count too.
            prop_assert!(device.longest_stall <= 2 * self.limits.max_seqs * 36, "{}", device.longest_stall);
            Ok(device.seen)
        }
    }

    /// Whatever the limits, requests and their arrivals: each request finishes with exactly the tokens that it yields
    /// alone, is cancelled with what it had, or is refused; every read and write of the cache is right.
    #[test]
    fn every_request_ends_once_with_its_own_tokens() {
        let seen = RefCell::new(Vec::new());
        let mut runner =
            TestRunner::new(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() });
        let outcome = runner.run(&cases(), |case| case.check().map(|of_case| seen.borrow_mut().push(of_case)));
        outcome.unwrap_or_else(|failure| panic!("{failure}"));
        let seen = seen.take();
        let cases = |came_up: fn(&Seen) -> usize| seen.iter().filter(|seen| came_up(seen) > 0).count();
        let counts = [
            cases(|seen| seen.shared),
            cases(|seen| seen.reused),
            cases(|seen| seen.carried),
            cases(|seen| seen.cancelled_running),
            cases(|seen| seen.refused),
            cases(|seen| seen.stopped),
        ];
        assert!(
            counts.iter().all(|&count| count > 50),
            "cases that share, reuse, carry, cancel, refuse, stop: {counts:?}"
        );
    }

    #[test]
    fn a_small_schedule() {
        // Two slots, and pages for one long and one short sequence: the third waits for the second's pages.
        let mut scheduler = Scheduler::new(limits(2, 5, 4), StopRule::default());
        for request in [request(0, 7, 3), request(1, 2, 6), request(2, 1, 1)] {
            scheduler.push(request).unwrap();
        }
        assert_eq!(prefill(&scheduler.next()), [(0, 0, 5, false)]);
        assert_eq!(scheduler.pages_used(), 5);
        assert_eq!(prefill(&scheduler.next()), [(0, 5, 2, true), (1, 0, 2, true)]);
        assert_eq!(scheduler.record(Slot(0), &[50]), None);
        assert_eq!(scheduler.record(Slot(1), &[60]), None);
        let Step::Decode { rows, rounds } = scheduler.next() else { panic!() };
        assert_eq!(rounds, 2, "slot 0 has two tokens left");
        assert_eq!(rows.iter().map(|row| (row.token, row.position)).collect::<Vec<_>>(), [(50, 7), (60, 2)]);
        assert_eq!(scheduler.record(Slot(0), &[51, 52]).unwrap().tokens, [50, 51, 52]);
        assert_eq!(scheduler.record(Slot(1), &[61, 62]), None);
        assert_eq!(prefill(&scheduler.next()), [(0, 0, 1, true)], "request 2 takes the freed slot");
    }

    /// Slot, position, tokens, and whether it samples, of each row.
    fn prefill(step: &Step) -> Vec<(usize, usize, usize, bool)> {
        let Step::Prefill(rows) = step else { panic!("{step:?}") };
        rows.iter().map(|row| (row.slot.0, row.position, row.tokens.len(), row.samples)).collect()
    }

    #[test]
    fn samples_of_one_prompt_compute_its_full_pages_once() {
        let mut scheduler = Scheduler::new(limits(3, 20, 4), StopRule::default());
        let prompt = request(0, 11, 2);
        for generation in 0..3 {
            scheduler.push(Request { id: SampleId { generation, ..id(0) }, ..prompt.clone() }).unwrap();
        }
        assert_eq!(prefill(&scheduler.next()), [(0, 0, 5, false)], "the others wait for the two full pages");
        assert_eq!(scheduler.pages_used(), 2 + 3 * 2);
        // The first is cancelled: the second goes on where it was.
        assert_eq!(scheduler.cancel(id(0)).unwrap().reason, FinishReason::Cancelled);
        assert_eq!(prefill(&scheduler.next()), [(1, 5, 5, false)]);
        assert_eq!(prefill(&scheduler.next()), [(1, 10, 1, true), (2, 8, 3, true)], "each has its own last page");
        assert_eq!(scheduler.pages(Slot(1))[..2], scheduler.pages(Slot(2))[..2]);
        assert!(scheduler.record(Slot(1), &[7]).is_none() && scheduler.record(Slot(2), &[8]).is_none());
        assert_eq!(scheduler.pages_used(), 2 + 2 * 2);
    }

    #[test]
    fn what_begins_alike_is_computed_once_while_there_is_room() {
        let mut scheduler = Scheduler::new(limits(2, 8, 4), StopRule::default());
        let of = |index: usize, prompt: usize| Request { id: id(index), ..request(0, prompt, 1) };
        let run = |scheduler: &mut Scheduler, request: Request| -> Vec<usize> {
            scheduler.push(request).unwrap();
            let mut positions = Vec::new();
            while let Step::Prefill(rows) = scheduler.next() {
                positions.push(rows[0].position);
                rows.iter().filter(|row| row.samples).for_each(|row| _ = scheduler.record(row.slot, &[40]));
            }
            assert_eq!(scheduler.pages_used(), 0);
            positions
        };
        assert_eq!(run(&mut scheduler, of(0, 10)), [0, 5]);
        // Two full pages of it are kept; a longer prompt goes on behind them, and keeps a third.
        assert_eq!(run(&mut scheduler, of(1, 14)), [8, 13]);
        assert_eq!(run(&mut scheduler, of(2, 14)), [12]);
        assert_eq!(run(&mut scheduler, of(3, 6)), [4], "a shorter one has the first");
        // Another text needs seven of the eight pages: the ends of the chain go first.
        assert_eq!(run(&mut scheduler, request(4, 27, 1)), [0, 5, 10, 15, 20, 25]);
        assert_eq!(run(&mut scheduler, of(5, 10)), [4, 9], "its first page was left");
    }

    #[test]
    fn a_mixed_step_carries_those_that_decode() {
        let mixed = |max_prefill_size| {
            let limits = Limits { max_prefill_size, ..limits(3, 30, 4) };
            let mut scheduler = Scheduler::new(limits, StopRule::default()).with_mixed_steps(true);
            scheduler.push(request(0, 2, 9)).unwrap();
            scheduler.push(request(1, 2, 9)).unwrap();
            while let Step::Prefill(rows) = scheduler.next() {
                rows.iter().filter(|row| row.samples).for_each(|row| _ = scheduler.record(row.slot, &[40]));
            }
            scheduler.record(Slot(0), &[41]);
            scheduler.record(Slot(1), &[41]);
            scheduler.push(request(2, 7, 1)).unwrap();
            scheduler
        };
        // Two of five rows; the prompt has the rest.
        assert_eq!(prefill(&mixed(5).next()), [(2, 0, 3, false), (0, 3, 1, true), (1, 3, 1, true)]);
        // Of three rows two would be more than half, and the prompt leaves none but in its last chunk.
        let mut scheduler = mixed(3);
        assert_eq!(prefill(&scheduler.next()), [(2, 0, 3, false)]);
        assert_eq!(prefill(&scheduler.next()), [(2, 3, 3, false)]);
        assert_eq!(prefill(&scheduler.next()), [(2, 6, 1, true), (0, 4, 1, true), (1, 3, 1, true)]);
    }

    #[test]
    fn a_stream_of_prompts_does_not_stall_what_decodes() {
        for (mixed, max_prefill_size) in [(false, 8), (true, 8), (true, 1)] {
            let limits = Limits { max_prefill_size, ..limits(2, 30, 4) };
            let mut device = Device::new(limits, StopRule::default(), mixed, true);
            device.scheduler.push(request(0, 1, 40)).unwrap();
            (1..500).for_each(|index| device.scheduler.push(request(index, 3, 1)).unwrap());
            let mut before = 0;
            while let Some(finished) = device.poll().unwrap() {
                if finished.iter().any(|done| done.id == id(0)) {
                    break;
                }
                before += finished.len();
            }
            // Two prompts for each of at most 39 steps.
            assert!((1..=80).contains(&before), "mixed {mixed}, {max_prefill_size}: after {before} others");
        }
    }

    #[test]
    fn batches_hold_whole_prompts_of_one_round() {
        let id = |round, index, generation| SampleId { round, index, generation };
        let ids: Vec<_> = (0..2)
            .flat_map(|round| (4..7).flat_map(move |index| (0..2).map(move |generation| id(round, index, generation))))
            .collect();
        let sizes = |prompts| batches(&ids, prompts).map(<[SampleId]>::len).collect::<Vec<_>>();
        assert_eq!(sizes(None), [12], "nothing asks for a barrier");
        assert_eq!(sizes(Some(2)), [4, 2, 4, 2]);
        assert_eq!(sizes(Some(9)), [6, 6]);
        assert_eq!(batches(&ids, Some(1)).count(), 6);
        assert_eq!(batches(&[], Some(1)).count(), 0);
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
        scheduler.push(request(0, 1, 1)).unwrap();
        assert_eq!(
            scheduler.push(request(0, 1, 1)).unwrap_err().to_string(),
            "prompts[0] = round 0, generation 0 was submitted before and has not ended: \
             wait for it, cancel it, or use another id"
        );
        assert!(scheduler.cancel(id(0)).is_some());
        assert_eq!(scheduler.next(), Step::Done);
    }

    /// Runs `count` requests, of which every other comes while others run: steps, and seconds.
    fn many(count: usize) -> (usize, f64) {
        let limits = Limits { max_seqs_in_prefill: 16, max_prefill_size: 64, ..limits(64, 1024, 4) };
        let started = std::time::Instant::now();
        let mut scheduler = Scheduler::new(limits, StopRule::new([EOS], vec![])).with_mixed_steps(true);
        // Four samples of each prompt.
        let make = |number: usize| Request {
            id: SampleId { generation: number as u32 % 4, ..id(number / 4) },
            ..request(number / 4, 1 + number / 4 % 11, 1 + number % 13)
        };
        (0..count / 2).for_each(|number| scheduler.push(make(number)).unwrap());
        let (mut next, mut finished, mut steps) = (count / 2, 0, 0);
        loop {
            let sampled: Vec<(Slot, Vec<u32>)> = match scheduler.next() {
                Step::Done => break,
                Step::Prefill(rows) => rows
                    .iter()
                    .filter(|row| row.samples)
                    .map(|row| (row.slot, vec![model(row.id, row.kv_len())]))
                    .collect(),
                Step::Decode { rows, rounds } => {
                    let line =
                        |row: &DecodeRow| (1..=rounds).map(|round| model(row.id, row.position + round)).collect();
                    rows.iter().map(|row| (row.slot, line(row))).collect()
                }
            };
            for (slot, tokens) in sampled {
                if scheduler.record(slot, &tokens).is_some() {
                    finished += 1;
                    if next < count {
                        scheduler.push(make(next)).unwrap();
                        next += 1;
                    }
                }
            }
            steps += 1;
        }
        assert_eq!((finished, scheduler.pages_used()), (count, 0));
        (steps, started.elapsed().as_secs_f64())
    }

    #[test]
    fn twenty_thousand_requests() {
        many(20_000);
    }

    #[test]
    #[ignore = "ten seconds: make nightly"]
    fn a_million_requests() {
        let (steps, seconds) = many(1_000_000);
        eprintln!("1,000,000 requests in {steps} steps: {seconds:.1} s");
    }
}
