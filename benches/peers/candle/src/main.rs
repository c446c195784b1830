//! Greedy decode and prefill of a Llama checkpoint by candle's own model, as `jax_decode.py` measures plain JAX: all slots at the
//! same position, a dense KV cache, a token chosen on the host.
//!
//! Prints one JSON line per slot count, `{"slots", "dtype", "new_tokens", "tok_s", "first"}` (the median of the runs, and the
//! first slot's first tokens), and with `--prefill N` one of `{"prompt": N, "prefill": {"tok_s"}}`.

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaConfig};
use clap::Parser;
use serde_json::json;

#[derive(Parser)]
struct Args {
    /// A folder with config.json and model.safetensors.
    model: PathBuf,
    #[arg(long, num_args = 1.., default_values_t = [1, 8])]
    slots: Vec<usize>,
    #[arg(long, default_value_t = 256)]
    new: usize,
    #[arg(long, value_parser = ["f32", "bf16"], default_value = "f32")]
    dtype: String,
    #[arg(long, default_value_t = 3)]
    runs: usize,
    #[arg(long, default_value_t = 0)]
    prefill: usize,
}

struct Model {
    llama: Llama,
    config: Config,
    dtype: DType,
}

impl Model {
    /// The tokens that come next, behind `tokens`, `[slots, tokens]`, at position `position`.
    fn next(&self, tokens: &Tensor, position: usize, cache: &mut Cache) -> candle_core::Result<Tensor> {
        self.llama.forward(tokens, position, cache)?.argmax(D::Minus1)
    }

    fn cache(&self) -> candle_core::Result<Cache> {
        Cache::new(true, self.dtype, &self.config, &Device::Cpu)
    }

    /// The first slot's new tokens.
    fn decode(&self, slots: usize, new: usize) -> candle_core::Result<Vec<u32>> {
        let (mut cache, mut first) = (self.cache()?, Vec::new());
        let mut tokens = Tensor::arange(300, 300 + slots as u32, &Device::Cpu)?;
        for position in 0..new {
            tokens = self.next(&tokens.unsqueeze(1)?, position, &mut cache)?;
            first.push(tokens.to_vec1::<u32>()?[0]);
        }
        Ok(first)
    }
}

/// Median seconds of some runs, after one that does not count.
fn seconds(runs: usize, mut run: impl FnMut() -> candle_core::Result<()>) -> candle_core::Result<f64> {
    run()?;
    let mut times = Vec::new();
    for _ in 0..runs {
        let start = Instant::now();
        run()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let dtype = if args.dtype == "bf16" { DType::BF16 } else { DType::F32 };
    let config: LlamaConfig = serde_json::from_slice(&std::fs::read(args.model.join("config.json"))?)?;
    let config = config.into_config(false);
    // SAFETY: nobody writes the file while this process runs.
    let weights =
        unsafe { VarBuilder::from_mmaped_safetensors(&[args.model.join("model.safetensors")], dtype, &Device::Cpu)? };
    let model = Model { llama: Llama::load(weights, &config)?, config, dtype };
    if args.prefill > 0 {
        let prompt = (0..args.prefill).map(|at| ((at * 7919 + 300) % model.config.vocab_size) as u32);
        let prompt = Tensor::from_iter(prompt, &Device::Cpu)?.unsqueeze(0)?;
        let seconds = seconds(args.runs, || model.next(&prompt, 0, &mut model.cache()?).map(drop))?;
        println!("{}", json!({"prompt": args.prefill, "prefill": {"tok_s": args.prefill as f64 / seconds}}));
    }
    for slots in args.slots {
        let mut first = Vec::new();
        let seconds = seconds(args.runs, || {
            first = model.decode(slots, args.new)?;
            Ok(())
        })?;
        let tokens = slots * args.new;
        let rate = tokens as f64 / seconds;
        first.truncate(8);
        println!(
            "{}",
            json!({"slots": slots, "dtype": args.dtype, "new_tokens": tokens, "tok_s": rate, "first": first})
        );
    }
    Ok(())
}
