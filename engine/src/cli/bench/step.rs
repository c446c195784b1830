//! `pagoda bench step`: prefill and decode of a model, all slots busy, beside what the device needs for their bytes and
//! operations at least.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::Args;
use pagoda_ir::Element;
use pagoda_kernels::chips::Chip;
use serde::Serialize;

use super::super::{PluginArgs, print_json};
use crate::config::Compute;
use crate::error::{Error, Result};
use crate::generate::{Engine, EngineOptions, SamplingOptions, Timing};
use crate::llama::{DeviceModel, KvCache, Parallel};
use crate::measure::{Rates, Times, Until, budget, times};
use crate::model::ModelSpec;
use crate::model::weights::Weights;
use crate::scheduler::{Limits, Request};
use crate::stop::StopRule;
use crate::units::{PageSize, SampleId};

/// The model, and the step.
#[derive(Debug, Args)]
pub(in crate::cli) struct StepArgs {
    /// The model's folder.
    #[arg(long)]
    model: PathBuf,
    /// Sequences that decode side by side, one report each.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8])]
    slots: Vec<usize>,
    /// Tokens of the prompt that is prefilled, in one call.
    #[arg(long, default_value_t = 256)]
    prompt: usize,
    /// New tokens of each sequence.
    #[arg(long, default_value_t = 64)]
    new: usize,
    /// Type of weights, activations and KV.
    #[arg(long, value_enum, default_value_t = Compute::F32)]
    compute: Compute,
    #[command(flatten)]
    plugin: PluginArgs,
    /// Time to measure for, unless the medians are known to within --within before.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// How narrow a median's interval is to become, of the median.
    #[arg(long, default_value_t = 0.02)]
    within: f64,
}

/// A program's time, and what it did in it.
#[derive(Debug, Serialize)]
struct Measured {
    /// Seconds of a prefill call of one prompt, or of a decode step.
    seconds: Times,
    tok_s: f64,
    /// Reached: of the weights that pass once, and two operations a weight and row (of the head: a row that is sampled).
    byte_s: f64,
    flop_s: f64,
    floor_seconds: Option<f64>,
    times_floor: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    slots: usize,
    prompt: usize,
    new: usize,
    compute: Compute,
    /// Of matrices.
    weights: Element,
    kernels: String,
    platform: String,
    kind: Option<String>,
    prefill: Measured,
    decode: Measured,
    rates: Option<Rates>,
}

/// `pagoda bench step`.
pub(in crate::cli) fn step(args: &StepArgs) -> Result<()> {
    for (key, value) in [("--prompt", args.prompt), ("--new", args.new)] {
        if value < 2 {
            return Err(Error::setting(key, value, "leaves nothing to measure", "ask for at least 2"));
        }
    }
    if args.slots.contains(&0) {
        return Err(Error::setting("--slots", 0, "leaves nothing to measure", "ask for at least 1"));
    }
    let time = budget("--seconds", args.seconds)?;
    let client = args.plugin.client(1)?;
    let (target, kind) = (args.plugin.target(&client)?, client.device_kind(0).ok());
    let (config, weights) = (ModelSpec::open(&args.model)?, Weights::open(&args.model)?);
    let compute = args.compute.element();
    let chip = kind.as_deref().and_then(Chip::of_kind);
    let on_cpu = client.platform().eq_ignore_ascii_case("cpu");
    let rates = chip.map(Rates::of_chip).or_else(|| on_cpu.then(|| Rates::of_this_machine(compute)));
    // What a step multiplies by: every weight but the embedding, which is looked up, where the head is not the same.
    let head = config.vocab_size * config.hidden_size;
    let parameters = crate::model::weights::expected_tensors(&config);
    let parameters: usize = parameters.iter().map(|tensor| tensor.dims.iter().product::<usize>()).sum();
    let parameters = if config.tie_word_embeddings { parameters } else { parameters - head };
    for &slots in &args.slots {
        const PAGE: PageSize = PageSize::new(16).expect("not zero");
        let length = args.prompt + args.new + 8;
        let limits = Limits {
            max_seq_len: length,
            max_seqs: slots,
            max_pages: slots * PAGE.pages_for(length),
            page_size: PAGE,
            max_seqs_in_prefill: 1,
            max_prefill_size: args.prompt,
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
            reuse_prefixes: false, // each run has the prompts of the last one
        }
        .on(target, &config, &weights);
        let matrices = options.matrices;
        let model = DeviceModel::load(&client, &config, &weights, &options.shape(&Parallel::ONE))?;
        let mut engine = Engine::new(&client, model, options)?;
        let token = |at: usize| ((300 + at * 7919) % config.vocab_size) as u32;
        let mut run = |slots: usize, new: usize| -> Result<Timing> {
            let requests = (0..slots).map(|index| Request {
                id: SampleId { round: 0, index, generation: 0 },
                // No two prompts share a page.
                prompt: (0..args.prompt).map(|at| token(at + index * 31 + 1)).collect::<Vec<_>>().into(),
                max_new_tokens: new,
            });
            engine.run(requests, &AtomicBool::new(false), |_| Ok(()), |_| ())
        };
        let until = Until { relative: args.within, least: 3, budget: time };
        let prefill = times(until, || Ok(Duration::from_secs_f64(run(1, 1)?.prefill_device_s)))?;
        let decode = times(until, || {
            let timing = run(slots, args.new)?;
            Ok(Duration::from_secs_f64(timing.decode_device_s / timing.decode_steps.max(1) as f64))
        })?;
        let measured = |seconds: Times, rows: usize, sampled: usize| {
            let products = (parameters - head) * rows + head * sampled;
            let (bytes, flops) = ((parameters * matrices.bytes()) as f64, 2.0 * products as f64);
            let floor_seconds = rates.as_ref().map(|rates| rates.floor(flops, bytes));
            Measured {
                seconds,
                tok_s: rows as f64 / seconds.median,
                byte_s: bytes / seconds.median,
                flop_s: flops / seconds.median,
                floor_seconds,
                times_floor: floor_seconds.map(|floor| seconds.median / floor),
            }
        };
        print_json(&Report {
            model: args.model.display().to_string(),
            slots,
            prompt: args.prompt,
            new: args.new,
            compute: args.compute,
            weights: matrices,
            kernels: target.to_string(),
            platform: client.platform(),
            kind: kind.clone(),
            prefill: measured(prefill, args.prompt, 1),
            decode: measured(decode, slots, slots),
            rates: rates.clone(),
        })?;
    }
    Ok(())
}
