//! The section `engine`: sizes of the engine. Levanter's `InferenceEngineConfig`.

use clap::{ArgAction, ValueEnum};
use pagoda_ir::element::Element;
use serde::{Deserialize, Serialize};

use super::key::settings;
use crate::error::{Error, Result};

settings! {
    /// The section `engine`. `None` means: as much as the requests need, see [`Settings::limits`](super::Settings::limits).
    pub struct EngineSettings {
        /// Tokens of one sequence, prompt included.
        #[arg(long, value_name = "N")]
        pub max_seq_len: Option<usize> = None,
        /// Pages of the KV cache.
        #[arg(long, value_name = "N")]
        pub max_pages: Option<usize> = None,
        /// Share of the device's free memory that pages may take where max_pages is not given.
        #[arg(long, value_name = "SHARE")]
        pub hbm_utilization: f64 = 0.9,
        /// Tokens per KV page.
        #[arg(long, value_name = "N")]
        pub page_size: usize = 128,
        /// Sequences that run at once.
        #[arg(long, value_name = "N")]
        pub max_seqs: usize = 256,
        /// Sequences in one prefill step.
        #[arg(long, value_name = "N")]
        pub max_seqs_in_prefill: usize = 16,
        /// Prompt tokens in one prefill step.
        #[arg(long, value_name = "N")]
        pub max_prefill_size: Option<usize> = None,
        /// Sequences in one decode step [default: max_seqs].
        #[arg(long, value_name = "N")]
        pub max_tokens_per_round: Option<usize> = None,
        /// Decode steps per host call.
        #[arg(long, value_name = "N")]
        pub max_rounds: usize = 32,
        /// Let prefill steps carry the sequences that decode, one row each. Faster where prompts keep coming, but a text then
        /// depends, where two tokens are equally likely to within rounding, on what ran beside it.
        #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
        pub mixed_steps: bool = false,
        /// Levanter's queue between sampling and packing; there is none here, and no limit.
        #[arg(skip)]
        pub max_queued_tokens: usize = 512,
        /// Stop sequences that may be given; 0 for none.
        #[arg(skip)]
        pub max_stop_seqs: usize = 4,
        /// Tokens that a stop sequence may have.
        #[arg(skip)]
        pub max_stop_tokens: usize = 16,
        /// Seed of sampling.
        #[arg(long, value_name = "S")]
        pub seed: u64 = 0,
        /// Type of weights, activations and KV [default: that of trainer.mp, else bf16].
        #[arg(long = "compute", value_enum, value_name = "TYPE")]
        pub compute_dtype: Option<Compute> = None,
        /// Decode calls between two lines of progress, where stderr is no terminal; 0 for none.
        #[arg(long, value_name = "N")]
        pub debug_stats_every_n: usize = 10,
        /// Print where the time went, at the end of the run.
        #[arg(skip)]
        pub log_decode_perf_summary: bool = true,
        /// What happens to the KV cache between rounds. Nothing here: no page is read before it was written.
        #[arg(skip)]
        pub reset_mode: ResetMode = ResetMode::Physical,
        /// When pages of finished sequences are freed. At once, here.
        #[arg(skip)]
        pub cleanup_mode: CleanupMode = CleanupMode::End,
    }
    older {
        /// Today's `max_seq_len`, in pages.
        max_pages_per_seq: usize,
        /// Today's `reset_mode: logical`.
        use_logical_reset: bool,
        /// Today's `cleanup_mode: incremental`.
        incremental_cleanup: bool,
    }
    ignored { devices, enable_logprobs }
}

impl EngineSettings {
    /// Reads older spellings into today's keys.
    pub(super) fn modernise(&mut self, notes: &mut Vec<String>) {
        if let Some(pages) = self.max_pages_per_seq.take("engine.max_pages_per_seq", "engine.max_seq_len", notes) {
            self.max_seq_len.get_or_insert(pages.saturating_mul(self.page_size));
        }
        if let Some(logical) = self.use_logical_reset.take("engine.use_logical_reset", "engine.reset_mode", notes) {
            self.reset_mode = if logical { ResetMode::Logical } else { ResetMode::Physical };
        }
        if let Some(early) = self.incremental_cleanup.take("engine.incremental_cleanup", "engine.cleanup_mode", notes) {
            self.cleanup_mode = if early { CleanupMode::Incremental } else { CleanupMode::End };
        }
    }

    /// Checks what the section can be asked by itself.
    pub(super) fn check(&self) -> Result<()> {
        if !(self.hbm_utilization > 0.0 && self.hbm_utilization <= 1.0) {
            let limit = "is not above 0 and at most 1";
            return Err(Error::setting("engine.hbm_utilization", self.hbm_utilization, limit, "use 0.9"));
        }
        Ok(())
    }
}

/// The compute types on offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
pub enum Compute {
    /// IEEE binary32.
    #[serde(rename = "f32", alias = "float32")]
    #[value(alias = "float32")]
    F32,
    /// bfloat16; sums, normalisation, softmax, logits and sampling stay f32.
    #[serde(rename = "bf16", alias = "bfloat16")]
    #[value(alias = "bfloat16")]
    Bf16,
}

impl Compute {
    /// The element type.
    pub const fn element(self) -> Element {
        match self {
            Self::F32 => Element::F32,
            Self::Bf16 => Element::Bf16,
        }
    }
}

/// Levanter's ways to reset its engine between rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResetMode {
    /// The KV cache is overwritten with zeros.
    #[default]
    Physical,
    /// Pages are given back, and keep what they hold.
    Logical,
}

/// Levanter's times to free the pages of finished sequences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CleanupMode {
    /// Never within a run.
    None,
    /// When all have finished.
    #[default]
    End,
    /// After every decode call.
    Incremental,
}
