//! `pagoda serve`: a model behind OpenAI's endpoints.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::PluginArgs;
use super::place::Place;
use super::sample::{fit_pages, warn_of_unused};
use crate::config::{Flags, Settings};
use crate::error::{Error, Result};
use crate::generate::{Engine, EngineOptions, SamplingOptions};
use crate::hosts::Share;
use crate::llama::DeviceModel;
use crate::model::ModelSpec;
use crate::model::source::Files;
use crate::model::tokenizer::{ChatTemplate, Tokenizer};
use crate::model::weights::Weights;
use crate::sampler::Sampling;
use crate::serve;
use crate::stop::StopRule;

/// What clients must send, if it is set.
const KEY: &str = "PAGODA_API_KEY";

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("served").required(true).multiple(true).args(["config", "hf_checkpoint"]))]
pub(super) struct ServeArgs {
    /// A Levanter sampler YAML: model, engine and mesh; its prompts, and how it samples them, are left out.
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Flags,
    #[command(flatten)]
    plugin: PluginArgs,
    /// The address to listen on.
    #[arg(long, default_value = "127.0.0.1", value_name = "IP")]
    host: IpAddr,
    /// The port to listen on; 0: any.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// The model's name in requests and answers [default: the model's folder or id].
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Sequences that may wait for a slot; more are answered with 429.
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_queue: usize,
    /// Most bytes of a request's body.
    #[arg(long, default_value_t = 1 << 20, value_name = "BYTES")]
    max_body: usize,
    /// Most seconds of a request.
    #[arg(long, default_value_t = 600.0, value_name = "S")]
    timeout: f64,
}

/// Runs the command.
pub(super) fn serve(args: &ServeArgs) -> Result<ExitCode> {
    let timeout = Duration::try_from_secs_f64(args.timeout).ok().filter(|timeout| !timeout.is_zero());
    let timeout = timeout.ok_or_else(|| {
        Error::setting("--timeout", args.timeout, "leaves no time to answer", "give a positive number of seconds")
    })?;
    let api_key = match std::env::var(KEY) {
        Ok(key) if key.is_empty() => {
            return Err(Error::setting(KEY, "\"\"", "is empty", "give it a value or unset it"));
        }
        Ok(key) => Some(key),
        Err(_) => None,
    };
    let settings = Settings::resolve_for_server(args.config.as_deref(), &args.settings)?;
    let folder = &settings.model(Files::Model)?;
    let config = ModelSpec::open(folder)?;
    let tokenizer = Tokenizer::open(&settings.tokenizer()?, &config)?;
    let template = ChatTemplate::open(folder).map_err(|error| error.to_string());
    let weights = Weights::open(folder)?;
    warn_of_unused(&weights.check(&config)?, folder);
    let limits = settings.server_limits(config.max_position_embeddings)?;
    let place = Place::take(&args.plugin, &settings, Share::new(0, 1)?, &mut None)?;
    let groups = place.placement.groups();
    let [group] = groups else {
        let limit = "makes several replicas; a server runs one";
        let fix = "use data=1, and a server per replica behind a balancer";
        return Err(Error::setting("data of the mesh", groups.len(), limit, fix));
    };
    group.parallel().check(&config)?;
    let target = args.plugin.target(&place.client)?;
    // A file without a stop sequence asks for samples of full length; requests bring stop sequences of their own.
    let endless = args.config.is_none() && settings.ignore_eos == Some(true);
    let eos = if endless { Vec::new() } else { config.eos_token_ids.clone() };
    let compute = settings.compute().element();
    let mut options = EngineOptions {
        limits,
        compute,
        matrices: compute,
        kv_cache: settings.kv_cache(),
        target,
        sampling: SamplingOptions::GREEDY, // of rows that no request has
        stop: StopRule::new(eos, Vec::new()),
        mixed_steps: settings.engine.mixed_steps,
        reuse_prefixes: settings.engine.reuse_prefixes,
    }
    .on(target, &config, &weights);
    fit_pages(&settings, &config, &place, &mut options)?;
    let limits = options.limits;
    config.notes(limits.max_seq_len).iter().for_each(|note| eprintln!("# {note}"));
    let name = args.served_model_name.clone().unwrap_or_else(|| {
        folder.file_name().map_or_else(|| folder.display().to_string(), |name| name.to_string_lossy().into_owned())
    });
    let (kernels, platform) = (options.kernels(), place.client.platform());
    eprintln!("# {}; kernels {kernels}; {} of weights; {platform}", place.placement, weights.size());
    eprintln!(
        "# {} slots of up to {} tokens, {} KV pages of {} tokens, {} prompt tokens per prefill, {} decode steps per call; up to {} \
         more wait",
        limits.max_seqs,
        limits.max_seq_len,
        limits.max_pages,
        limits.page_size.tokens(),
        limits.max_prefill_size,
        limits.max_rounds,
        args.max_queue,
    );
    if let Err(problem) = &template {
        eprintln!("# no /v1/chat/completions: {problem}");
    }
    let address = SocketAddr::new(args.host, args.port);
    if !args.host.is_loopback() && api_key.is_none() {
        log::warn!("{address} is open to other machines, and no key is asked for: set {KEY}");
    }
    let model =
        DeviceModel::load_group(&place.client, &config, &weights, &options.shape(group.parallel()), group.clone())?;
    // Whatever a request may ask for.
    let sampling = Sampling::Random { top_k: true, top_p: true, log_probabilities: true };
    let engine = Engine::with_sampling(&place.client, model, options, sampling)?;
    let options = serve::Options {
        address,
        model: name.clone(),
        max_queue: args.max_queue,
        max_body: args.max_body,
        timeout,
        api_key,
    };
    serve::serve(engine, limits, tokenizer, template.ok(), options, |address| {
        eprintln!("# serving {name} at http://{address}");
    })?;
    Ok(ExitCode::SUCCESS)
}
