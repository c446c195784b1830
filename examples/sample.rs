//! The generation loop as a library: load a model, compile the step programs, sample two prompts, print them as they
//! finish.
//!
//! ```text
//! cargo run --release --example sample -- [MODEL_DIR]
//! ```

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use pagoda_engine::generate::{Engine, EngineOptions, SamplingOptions};
use pagoda_engine::llama::{DeviceModel, KvCache, Parallel, Target};
use pagoda_engine::model::ModelSpec;
use pagoda_engine::model::tokenizer::Tokenizer;
use pagoda_engine::model::weights::Weights;
use pagoda_engine::pjrt::{Plugin, PluginChoice};
use pagoda_engine::scheduler::{Limits, Request};
use pagoda_engine::stop::StopRule;
use pagoda_engine::units::{PageSize, SampleId};
use pagoda_ir::Element;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/tiny-llama-kjv");
    let folder = std::env::args_os().nth(1).map_or_else(|| PathBuf::from(tiny), PathBuf::from);
    let prompts = ["In the beginning", "The LORD is my shepherd"];

    let config = ModelSpec::open(&folder)?;
    let tokenizer = Tokenizer::open(&folder, &config)?;
    let weights = Weights::open(&folder)?;
    weights.check(&config)?;

    // Two slots, pages for two sequences of 128 tokens.
    let page_size = PageSize::new(16).expect("not zero");
    let limits = Limits {
        max_seq_len: 128,
        max_seqs: 2,
        max_pages: 2 * page_size.pages_for(128),
        page_size,
        max_seqs_in_prefill: 2,
        max_prefill_size: 64,
        max_rounds: 16,
    };
    let client = Plugin::load(&PluginChoice::parse("cpu")?)?.client(1)?;
    let options = EngineOptions {
        limits,
        compute: Element::F32,
        matrices: Element::F32,
        kv_cache: KvCache::of(Element::F32),
        target: Target::Portable,
        sampling: SamplingOptions { temperature: 0.8, top_k: None, top_p: Some(0.95), seed: 1 },
        stop: StopRule::new(config.eos_token_ids.clone(), vec![]),
        mixed_steps: false,
        reuse_prefixes: true,
    };
    let model = DeviceModel::load(&client, &config, &weights, &options.shape(&Parallel::ONE))?;
    let mut engine = Engine::new(&client, model, options)?;

    let requests = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| {
            let id = SampleId { round: 0, index, generation: 0 };
            Ok(Request { id, prompt: tokenizer.encode(prompt)?.into(), max_new_tokens: 48 })
        })
        .collect::<pagoda_engine::Result<Vec<_>>>()?;
    let show = |sample: pagoda_engine::scheduler::Finished| {
        let text = tokenizer.decode(&sample.tokens[..sample.text_tokens])?;
        println!("{}{text}\n", prompts[sample.id.index]);
        Ok(())
    };
    let timing = engine.run(requests, &AtomicBool::new(false), show, |_| ())?;
    eprintln!("{} decode steps in {:.2} s", timing.decode_steps, timing.decode_device_s);
    Ok(())
}
