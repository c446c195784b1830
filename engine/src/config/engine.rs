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
        /// Let prompts that begin alike share the pages of their beginning, also one after another: it is computed once. No text
        /// depends on it.
        #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
        pub reuse_prefixes: bool = true,
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
        /// Type of weights and activations [default: that of trainer.mp, else bf16].
        #[arg(long = "compute", value_enum, value_name = "TYPE")]
        pub compute_dtype: Option<Compute> = None,
        /// Type of the KV cache's numbers. Those of 8 bits halve its memory; each stands for its value times kv_cache_scale.
        #[arg(long, value_enum, value_name = "TYPE")]
        pub kv_cache_dtype: CacheType = CacheType::Auto,
        /// What numbers of 8 bits in the KV cache are multiplied by: keys and values beyond the type's largest times this are
        /// cut off [default: 1 for fp8].
        #[arg(long, value_name = "FACTOR")]
        pub kv_cache_scale: Option<f64> = None,
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
        self.check_cache()
    }

    fn check_cache(&self) -> Result<()> {
        let Some(scale) = self.kv_cache_scale else {
            // Keys are of order 10: integers of 8 bits with a scale of 1 would hold none of their digits.
            let (limit, fix) =
                ("needs engine.kv_cache_scale", "give the largest key or value of the model, divided by 127");
            return match self.kv_cache_dtype {
                CacheType::Int8 => Err(Error::setting("engine.kv_cache_dtype", "int8", limit, fix)),
                _ => Ok(()),
            };
        };
        let written = scale as f32;
        if !(written.is_normal() && written > 0.0) {
            let limit = "is not a positive number of single precision";
            return Err(Error::setting("engine.kv_cache_scale", scale, limit, "give e.g. 0.05, or leave it out"));
        }
        if !matches!(self.kv_cache_dtype, CacheType::Fp8E4m3 | CacheType::Fp8E5m2 | CacheType::Int8) {
            let limit = "is of a KV cache of 8 bits, which engine.kv_cache_dtype does not ask for";
            return Err(Error::setting("engine.kv_cache_scale", scale, limit, "leave it out"));
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

/// What the KV cache may hold, as vLLM calls it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum CacheType {
    /// The type that is computed in.
    #[default]
    Auto,
    /// bfloat16.
    #[serde(alias = "bfloat16")]
    #[value(alias = "bfloat16")]
    Bf16,
    /// Floats of 8 bits with 4 exponent bits.
    #[serde(rename = "fp8_e4m3", alias = "fp8")]
    #[value(name = "fp8_e4m3", alias = "fp8")]
    Fp8E4m3,
    /// Floats of 8 bits with 5 exponent bits.
    #[serde(rename = "fp8_e5m2")]
    #[value(name = "fp8_e5m2")]
    Fp8E5m2,
    /// Integers of 8 bits.
    Int8,
}

impl CacheType {
    /// The element type, where weights and activations are of `compute`.
    pub const fn element(self, compute: Element) -> Element {
        match self {
            Self::Auto => compute,
            Self::Bf16 => Element::Bf16,
            Self::Fp8E4m3 => Element::F8E4M3Fn,
            Self::Fp8E5m2 => Element::F8E5M2,
            Self::Int8 => Element::I8,
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
