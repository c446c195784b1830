//! `pagoda bench decode`: tokens/s of greedy decode, all slots busy, compile and load left out.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use pagoda_ir::Element;
use serde::Serialize;

use crate::error::Result;
use crate::generate::{Engine, EngineOptions, SamplingOptions, Timing};
use crate::llama::{DeviceModel, KvCache, Parallel, Target};
use crate::model::ModelSpec;
use crate::model::weights::Weights;
use crate::pjrt::Client;
use crate::scheduler::{Limits, Request};
use crate::stop::StopRule;
use crate::units::{PageSize, SampleId};

/// One line of the bench.
#[derive(Debug, Serialize)]
pub struct DecodeRate {
    /// Sequences decoded side by side.
    pub slots: usize,
    /// Compute type.
    pub dtype: Element,
    /// Type of the weights' matrices.
    pub weights: Element,
    /// New tokens of one run, over all slots.
    pub new_tokens: usize,
    /// Tokens per second (median of the runs).
    pub tok_s: f64,
    /// Milliseconds of one step on the device.
    pub step_ms: f64,
    /// Share of the run that the host took: planning, packing, uploads, bookkeeping.
    pub host_share: f64,
}

/// Decodes `new` tokens in each of `slots` slots, three times after a warm-up.
///
/// # Errors
/// When the model does not load, compile or run.
pub fn decode_rate(
    client: &Client,
    folder: &Path,
    slots: usize,
    new: usize,
    compute: Element,
    target: Target,
) -> Result<DecodeRate> {
    const RUNS: usize = 3;
    const PAGE: PageSize = PageSize::new(16).expect("not zero");
    let config = ModelSpec::open(folder)?;
    let weights = Weights::open(folder)?;
    let limits = Limits {
        max_seq_len: new + 8,
        max_seqs: slots,
        max_pages: slots * PAGE.pages_for(new + 8),
        page_size: PAGE,
        max_seqs_in_prefill: slots,
        max_prefill_size: 64.max(slots),
        max_rounds: 64,
    };
    let options = EngineOptions {
        limits,
        compute,
        matrices: compute,
        kv_cache: KvCache::of(compute),
        target,
        sampling: SamplingOptions::GREEDY,
        stop: StopRule::default(),
        mixed_steps: false,
        reuse_prefixes: false, // the prompts are alike
    }
    .on(target, &config, &weights);
    let matrices = options.matrices;
    let model = DeviceModel::load(client, &config, &weights, &options.shape(&Parallel::ONE))?;
    let mut engine = Engine::new(client, model, options)?;
    let mut runs: Vec<(f64, Timing)> = Vec::new();
    for _ in 0..=RUNS {
        let requests = (0..slots).map(|index| Request {
            id: SampleId { round: 0, index, generation: 0 },
            prompt: [(300 + index % 1000).min(config.vocab_size - 1) as u32].into(),
            max_new_tokens: new,
        });
        let started = Instant::now();
        let timing = engine.run(requests, &AtomicBool::new(false), |_| Ok(()), |_| ())?;
        runs.push((started.elapsed().as_secs_f64(), timing));
    }
    runs.remove(0);
    runs.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (seconds, timing) = runs[RUNS / 2];
    Ok(DecodeRate {
        slots,
        dtype: compute,
        weights: matrices,
        new_tokens: slots * new,
        tok_s: (slots * new) as f64 / seconds,
        step_ms: 1e3 * timing.decode_device_s / timing.decode_steps.max(1) as f64,
        host_share: timing.host_s / seconds,
    })
}
