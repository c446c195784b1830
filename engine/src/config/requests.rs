//! What the engine is built for, once the prompts are tokens: its limits, and what Levanter would have refused.

use pagoda_ir::{Bytes, TensorType};

use super::Settings;
use crate::error::{Error, Result};
use crate::memory::Room;
use crate::scheduler::Limits;
use crate::units::PageSize;

impl Settings {
    /// The engine's sizes for prompts of these lengths in tokens, all of them checked to fit.
    ///
    /// Give the lengths of *all* prompts of the run, not of one host's share: sizes shape the program, and every host
    /// must run the same program for their texts to be those of one host. What was left open becomes what the
    /// requests can use: `max_seq_len` the longest request, `max_pages` the longest request in every slot,
    /// `max_prefill_size` the longest prompts of a full prefill step, at most `max_seq_len`.
    ///
    /// # Errors
    /// When a request can never run, or `max_seq_len` exceeds the model's `max_position_embeddings`.
    pub fn limits(&self, prompt_lengths: &[usize], max_position_embeddings: usize) -> Result<Limits> {
        let engine = &self.engine;
        let longest = prompt_lengths.iter().copied().max().unwrap_or(0);
        let needed = longest + self.max_new_tokens;
        let max_seq_len = engine.max_seq_len.unwrap_or(needed);
        if max_seq_len > max_position_embeddings {
            let limit = format!("exceeds the model's max_position_embeddings = {max_position_embeddings}");
            let fix = format!("lower it to {max_position_embeddings} or less, or shorten prompts and max_new_tokens");
            return Err(Error::setting("engine.max_seq_len", max_seq_len, limit, fix));
        }
        let batch = self.max_prompts_per_batch.map(|prompts| prompts.saturating_mul(self.n_generations));
        let at_once = [Some(engine.max_seqs), engine.max_tokens_per_round, batch, Some(self.samples())];
        let max_seqs = at_once.into_iter().flatten().min().expect("max_seqs is always there");
        let page_size = PageSize::new(engine.page_size).expect("sizes were checked in `resolve`");
        let max_seqs_in_prefill = engine.max_seqs_in_prefill.min(max_seqs);
        let mut lengths = prompt_lengths.to_vec();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        // Clones of a prompt are prefilled side by side.
        let packed: usize = lengths
            .iter()
            .flat_map(|&length| (0..self.n_generations).map(move |_| length))
            .take(max_seqs_in_prefill)
            .sum();
        let limits = Limits {
            max_seq_len,
            max_seqs,
            max_pages: engine.max_pages.unwrap_or(max_seqs * page_size.pages_for(needed)),
            page_size,
            max_seqs_in_prefill,
            max_prefill_size: engine.max_prefill_size.unwrap_or(max_seq_len).min(packed).max(1),
            max_rounds: engine.max_rounds,
        };
        for (index, &length) in prompt_lengths.iter().enumerate() {
            limits.check(&format!("prompts[{index}]"), length, self.max_new_tokens)?;
        }
        Ok(limits)
    }

    /// The limits of an engine whose requests are not known beforehand: sizes that are not given are those of `engine.max_seqs`
    /// sequences of `engine.max_seq_len` tokens, which is the model's own where it is not given either.
    ///
    /// # Errors
    /// When the model has fewer positions than `engine.max_seq_len`.
    pub fn server_limits(&self, max_position_embeddings: usize) -> Result<Limits> {
        let engine = &self.engine;
        let max_seq_len = engine.max_seq_len.unwrap_or(max_position_embeddings);
        if max_seq_len > max_position_embeddings {
            let limit = format!("exceeds the model's max_position_embeddings = {max_position_embeddings}");
            let fix = format!("lower it to {max_position_embeddings} or less");
            return Err(Error::setting("engine.max_seq_len", max_seq_len, limit, fix));
        }
        let page_size = PageSize::new(engine.page_size).expect("sizes were checked in `resolve`");
        Ok(Limits {
            max_seq_len,
            max_seqs: engine.max_seqs,
            max_pages: engine.max_pages.unwrap_or(engine.max_seqs * page_size.pages_for(max_seq_len)),
            page_size,
            max_seqs_in_prefill: engine.max_seqs_in_prefill.min(engine.max_seqs),
            max_prefill_size: engine.max_prefill_size.unwrap_or(max_seq_len).min(max_seq_len),
            max_rounds: engine.max_rounds,
        })
    }

    /// The pages of a KV cache where `engine.max_pages` is not given: those that the requests can use (`limits` has them), or
    /// fewer if these do not fit into `engine.hbm_utilization` of the room that the weights leave; those of the longest
    /// sequence at least.
    ///
    /// `cache` is the array of `limits.max_pages` pages. Not for a run on several hosts, which must agree without asking.
    pub fn pages(&self, limits: &Limits, room: &Room, weights: Bytes, cache: &TensorType) -> usize {
        let used = cache.dims.iter().fold(cache.element.bytes() as u64, |bytes, &dim| bytes.saturating_mul(dim as u64));
        let page = (used / limits.max_pages.max(1) as u64).max(1);
        let share = (room.left.0.saturating_sub(weights.0) as f64 * self.engine.hbm_utilization) as u64;
        let fitting = usize::try_from(share / page).unwrap_or(usize::MAX);
        fitting.max(limits.pages_per_seq()).min(limits.max_pages)
    }

    /// Whether the stop sequence has as many tokens as the engine keeps.
    ///
    /// # Errors
    /// Names `engine.max_stop_tokens`.
    pub fn check_stop(&self, tokens: usize) -> Result<()> {
        let limit = self.engine.max_stop_tokens;
        if self.stop_sequence.is_none() || tokens <= limit {
            return Ok(());
        }
        let problem = format!("is below the {tokens} tokens of stop_sequence");
        Err(Error::setting("engine.max_stop_tokens", limit, problem, format!("raise it to {tokens}")))
    }

    /// What Levanter's start-up checks refuse, or its loop cuts short, and what happens here instead: one line each.
    ///
    /// Levanter admits all prompts of a batch in one flush, and its decode loop ends after `max_seq_len` steps for the whole
    /// batch. Here a prompt waits until there is room, and every sample gets its tokens.
    pub fn departures(&self, prompt_lengths: &[usize], limits: &Limits) -> Vec<String> {
        let engine = &self.engine;
        let batch = self.max_prompts_per_batch.unwrap_or(usize::MAX).min(prompt_lengths.len());
        let sequences = batch.saturating_mul(self.n_generations);
        let longest = prompt_lengths.iter().copied().max().unwrap_or(0);
        let pages = limits.page_size.pages_for(longest + self.max_new_tokens).saturating_mul(sequences);
        let prompt_tokens =
            prompt_lengths.chunks(batch.max(1)).map(|batch| batch.iter().sum::<usize>()).max().unwrap_or(0);
        let per_step = engine.max_tokens_per_round.unwrap_or(engine.max_seqs).min(engine.max_seqs);
        let max_rounds = engine.max_rounds;
        let budget = (limits.max_seq_len / max_rounds * max_rounds).saturating_mul(per_step);
        let new_tokens = sequences.saturating_mul(self.max_new_tokens);
        let refused = [
            ("engine.max_seqs", engine.max_seqs, sequences, "sequences of a batch", "the rest wait for a slot"),
            ("engine.max_pages", limits.max_pages, pages, "pages of a batch", "sequences wait for pages"),
            (
                "engine.max_seqs_in_prefill",
                engine.max_seqs_in_prefill,
                batch,
                "prompts of a batch",
                "they take several steps",
            ),
            (
                "engine.max_prefill_size",
                engine.max_prefill_size.unwrap_or(usize::MAX),
                prompt_tokens,
                "prompt tokens of a batch",
                "they are prefilled in chunks",
            ),
            (
                "engine.max_queued_tokens",
                engine.max_queued_tokens,
                engine.max_seqs,
                "engine.max_seqs",
                "there is no queue",
            ),
            (
                "engine.max_queued_tokens",
                engine.max_queued_tokens,
                per_step,
                "engine.max_tokens_per_round",
                "there is no queue",
            ),
            (
                "engine.max_queued_tokens",
                engine.max_queued_tokens,
                engine.max_seqs_in_prefill,
                "engine.max_seqs_in_prefill",
                "there is no queue",
            ),
            (
                "engine.max_seq_len",
                limits.max_seq_len,
                max_rounds,
                "engine.max_rounds",
                "a call ends with its last sequence",
            ),
        ];
        let refused =
            refused.into_iter().filter(|&(_, has, needs, ..)| has < needs).map(|(key, has, needs, of, here)| {
                format!("{key} = {has} is below the {needs} {of}, which Levanter refuses: here {here}")
            });
        let cut_short = (budget < new_tokens).then(|| {
            format!("Levanter's decode loop ends after {budget} of the {new_tokens} new tokens of a batch: here none is cut short")
        });
        refused.chain(cut_short).collect()
    }
}
