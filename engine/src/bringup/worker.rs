//! The child process: loads the plugin, goes through its cases, and writes down each as soon as it is done.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use pagoda_ir::tile_machine::Program;
use pagoda_ir::{Context, HostTensor};
use pagoda_kernels::check::{Case, check_kernel, compare_all};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::random::batch_text;
use pagoda_kernels::{Arrays, Choices, Kernel, Options, Plan, kernel};

use super::{ANSWERS, Answer, Check, Form, Outcome, REQUEST, Request, Subject, WORKER_ARGUMENT};
use crate::error::{Error, Result};
use crate::generate::{Engine, EngineOptions, SamplingOptions};
use crate::llama::{DeviceModel, KvCache, Parallel, Target};
use crate::measure::{Cores, Rates, Times, Until, times};
use crate::model::ModelSpec;
use crate::model::weights::Weights;
use crate::pjrt::{Client, Plugin, PluginChoice};
use crate::scheduler::{Limits, Request as Sample};
use crate::stop::StopRule;
use crate::units::{PageSize, SampleId};

/// Hands the registry's kernels to functions that are generic over one.
macro_rules! registered {
    ($($name:ident: $kernel:ty,)*) => {
        /// The kernels' names.
        pub(super) const NAMES: &[&str] = &[$(<$kernel>::NAME,)*];

        /// A case of the kernel of that name.
        fn of_kernel(name: &str, form: Form, case: u64, device: &Device) -> Check {
            $(if name == <$kernel>::NAME {
                return check::<$kernel>(form, case, device);
            })*
            failed(Check::of(name, form, case, Outcome::Failed), "there is no such kernel")
        }
    };
}
pagoda_kernels::for_each_kernel!(registered);

/// Turns this process into a worker if its arguments say so, and ends it. Call this first in `main`.
pub fn run_if_asked() -> Option<ExitCode> {
    let folder = crate::child::asked(WORKER_ARGUMENT)?;
    let ended = work(&folder);
    if let Err(error) = &ended {
        eprintln!("{error}");
    }
    // A plugin's destructors may hang or abort: the answers are there, nothing else counts.
    std::process::exit(i32::from(ended.is_err()))
}

/// Where a case runs.
struct Device {
    client: Client,
    /// What it is planned for: the device, or any.
    chip: Option<Chip>,
}

impl Device {
    fn is(&self, platform: &str) -> bool {
        self.client.platform().eq_ignore_ascii_case(platform)
    }
}

fn work(folder: &Path) -> Result<()> {
    let path = folder.join(REQUEST);
    let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let request: Request = serde_json::from_slice(&text).map_err(Error::runtime("reading a request"))?;
    let path = folder.join(ANSWERS);
    let mut answers = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io("create", &path))?;
    let plugin = Plugin::load(&PluginChoice::parse(&request.plugin)?)?;
    let client = plugin.client_of_any_size()?;
    let chip = client.device_kind(0).ok().and_then(|kind| Chip::of_kind(&kind));
    let device = Device { client, chip };
    if request.subject == Subject::Environment {
        return say(&mut answers, &Answer::Environment(environment(&plugin, &device)));
    }
    for &case in &request.cases {
        say(&mut answers, &Answer::Started(case))?;
        let checks = match &request.subject {
            Subject::Kernel(name, form) => vec![of_kernel(name, *form, case, &device)],
            _ => step(&request.model, case, &device),
        };
        checks.into_iter().try_for_each(|check| say(&mut answers, &Answer::Checked(Box::new(check))))?;
    }
    Ok(())
}

fn say(answers: &mut File, answer: &Answer) -> Result<()> {
    let line = serde_json::to_string(answer).map_err(Error::runtime("writing JSON"))?;
    writeln!(answers, "{line}").and_then(|()| answers.sync_data()).map_err(Error::runtime("writing an answer"))
}

fn environment(plugin: &Plugin, device: &Device) -> BTreeMap<String, serde_json::Value> {
    let (major, minor) = plugin.version();
    let client = &device.client;
    let entries = [
        ("plugin_path", serde_json::json!(plugin.found().path)),
        ("plugin_api", serde_json::json!(format!("{major}.{minor}"))),
        ("platform", serde_json::json!(client.platform())),
        ("platform_version", serde_json::json!(client.platform_version())),
        ("devices", serde_json::json!(client.describe_devices())),
        ("device_kind", serde_json::json!(client.device_kind(0).ok())),
        ("memory_left_bytes", serde_json::json!(client.memory_left(0).ok().flatten().map(|bytes| bytes.0))),
        ("planned_for", serde_json::json!(device.chip.map(Chip::name))),
    ];
    entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn failed(check: Check, message: impl ToString) -> Check {
    Check { outcome: Outcome::Failed, message: Some(message.to_string()), ..check }
}

/// Long enough for a figure, short enough for many cases.
const UNTIL: Until = Until { relative: 0.05, least: 3, budget: Duration::from_millis(200) };

/// One case of a kernel in one form.
fn check<K: Kernel>(form: Form, case: u64, device: &Device) -> Check {
    let mut choices = Choices::of_seed(case);
    let sample = K::sample(&mut choices);
    let mut check = Check::of(K::NAME, form, case, Outcome::Passed);
    let drawn = pagoda_kernels::Problem::new(sample.spec).and_then(|problem| {
        let inputs = K::draw(&problem, sample.batch.as_deref(), case)?;
        Ok((problem, inputs))
    });
    let (problem, inputs) = match drawn {
        Ok(drawn) => drawn,
        Err(invalid) => return failed(check, invalid),
    };
    check.problem = match &sample.batch {
        Some(batch) => format!("{}, rows/tokens {}", K::describe(&problem), batch_text(batch)),
        None => K::describe(&problem),
    };
    let work = K::work(&problem, K::lengths(&problem, &inputs).as_deref());
    check.floor_seconds = device.chip.map(|chip| Rates::of_chip(chip).floor(work.flops, work.bytes));
    let outcome = match form {
        Form::Stablehlo => kernel::stablehlo_module::<K>(&Context::new(), &problem)
            .map_err(Into::into)
            .and_then(|module| on_plugin::<K>(&problem, &inputs, device, &module.bytecode()))
            .map(Some),
        Form::Native => {
            Ok(device.is("cpu")).and_then(|cpu| if cpu { native::<K>(&problem, &inputs) } else { Ok(None) })
        }
        Form::Mosaic => {
            // Of the drawn tiles, with all of the VMEM; where the device cannot take them, of the planner's.
            let chip = device.chip.unwrap_or(Chip::V5p);
            let limit = Some(chip.info().vmem_per_core);
            let plan = Plan::<K>::new(problem.clone(), chip, Options { tiles: Some(sample.tiles), vmem_limit: limit })
                .or_else(|_| Plan::new(problem.clone(), chip, Options { tiles: None, vmem_limit: limit }));
            match plan {
                Err(refused) => Err(Error::setting(refused.key, refused.value, refused.limit, refused.fix)),
                Ok(plan) if device.is("tpu") => plan
                    .module(&Context::new())
                    .map_err(Into::into)
                    .and_then(|module| on_plugin::<K>(&problem, &inputs, device, &module.bytecode()))
                    .map(Some),
                Ok(plan) => on_tile_machine(&plan, &inputs, case),
            }
        }
    };
    match outcome {
        Ok(Some(seconds)) => check.seconds = seconds,
        Ok(None) => check.outcome = Outcome::Skipped,
        Err(error) => check = failed(check, error),
    }
    check
}

/// Compares results with the reference, padding left out.
fn compare<K: Kernel>(problem: &kernel::ProblemOf<K>, inputs: &Arrays, mut results: Vec<HostTensor>) -> Result<()> {
    for (result, live) in results.iter_mut().zip(K::live(problem, inputs)) {
        let live = live * result.element().bytes();
        result.bytes_mut()[live..].fill(0);
    }
    let expected = K::reference(problem, inputs);
    compare_all(K::NAME, &results, &K::results(problem), &expected)
        .map_err(Error::runtime("comparing with the reference"))
}

/// Runs, compares and times a program of the problem's arguments. One that takes an argument over is not timed.
fn on_plugin<K: Kernel>(
    problem: &kernel::ProblemOf<K>,
    inputs: &Arrays,
    device: &Device,
    module: &[u8],
) -> Result<Option<Times>> {
    let program = device.client.compile(module, 1)?;
    let arrays: Vec<HostTensor> = inputs.values().cloned().collect();
    compare::<K>(problem, inputs, program.call(&arrays)?)?;
    let donates = K::arguments(problem)
        .iter()
        .any(|argument| matches!(argument.role, pagoda_kernels::named::Role::Donated { .. }));
    if donates {
        return Ok(None);
    }
    let buffers = arrays.iter().map(|array| Ok(device.client.upload(array, 0)?)).collect::<Result<Vec<_>>>()?;
    let seconds = times(UNTIL, || {
        let started = Instant::now();
        let results = program.run(buffers.iter().map(crate::pjrt::Arg::Keep).collect())?;
        results.iter().try_for_each(crate::pjrt::Buffer::wait)?;
        Ok(started.elapsed())
    })?;
    Ok(Some(seconds))
}

fn native<K: Kernel>(problem: &kernel::ProblemOf<K>, inputs: &Arrays) -> Result<Option<Option<Times>>> {
    let Some(results) = K::native(problem, inputs, &Cores) else { return Ok(None) };
    compare::<K>(problem, inputs, results)?;
    let seconds = times(UNTIL, || {
        let started = Instant::now();
        std::hint::black_box(K::native(problem, inputs, &Cores));
        Ok(started.elapsed())
    })?;
    Ok(Some(Some(seconds)))
}

/// In every order of DMAs, without a fault, to the same bits; not timed, as its speed says nothing.
fn on_tile_machine<K: Kernel>(plan: &Plan<K>, inputs: &Arrays, seed: u64) -> Result<Option<Option<Times>>> {
    let context = Context::new();
    let kernel = plan.kernel(&context)?;
    Program::decode(kernel.module()).map_err(Error::runtime("reading a kernel"))?;
    check_kernel(Case::new(plan, inputs), &kernel, seed).map_err(Error::runtime("the tile machine"))?;
    Ok(Some(None))
}

/// The step programs of the small model in every form that the device takes: greedy text against the golden tokens.
fn step(model: &Path, case: u64, device: &Device) -> Vec<Check> {
    let mut targets = vec![(Form::Stablehlo, Target::Portable)];
    if device.is("cpu") {
        targets.push((Form::Native, Target::Host));
    } else if let Some(chip) = device.chip {
        targets.push((Form::Mosaic, Target::Tpu(chip)));
    }
    let of_target = |(form, target): (Form, Target)| {
        let mut check = Check::of("step", form, case, Outcome::Passed);
        check.problem = format!("greedy text of {}, kernels {target}", model.display());
        match golden_text(model, target, device) {
            Ok(Some(seconds)) => Check { seconds: Some(seconds), ..check },
            Ok(None) => {
                let message = Some(format!("{} holds no golden.json: name the folder with --model", model.display()));
                Check { outcome: Outcome::Skipped, message, ..check }
            }
            Err(error) => failed(check, error),
        }
    };
    targets.into_iter().map(of_target).collect()
}

/// New tokens of each golden text.
const NEW: usize = 48;

/// Seconds of a decode step; `None` where there are no golden tokens.
fn golden_text(folder: &Path, target: Target, device: &Device) -> Result<Option<Times>> {
    let path = folder.join("golden.json");
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(None) };
    let damaged = || Error::file(&path, "it holds no lists of token ids", "take the file of the repository");
    let golden: BTreeMap<String, serde_json::Value> = serde_json::from_str(&text).map_err(|_| damaged())?;
    let ids = |value: &serde_json::Value| -> Option<Vec<u32>> {
        value["ids"].as_array()?.iter().map(|id| id.as_u64()?.try_into().ok()).collect()
    };
    let golden: Vec<Vec<u32>> = golden.values().map(ids).collect::<Option<_>>().ok_or_else(damaged)?;
    if golden.iter().any(|ids| ids.len() <= NEW) {
        return Err(damaged());
    }
    let page_size = PageSize::new(16).expect("not zero");
    let longest = golden.iter().map(Vec::len).max().unwrap_or(1);
    let limits = Limits {
        max_seq_len: longest,
        max_seqs: golden.len(),
        max_pages: golden.len() * page_size.pages_for(longest),
        page_size,
        max_seqs_in_prefill: golden.len(),
        max_prefill_size: 64,
        max_rounds: 16,
    };
    let options = EngineOptions {
        limits,
        compute: pagoda_ir::Element::F32,
        matrices: pagoda_ir::Element::F32,
        kv_cache: KvCache::of(pagoda_ir::Element::F32),
        target,
        sampling: SamplingOptions::GREEDY,
        stop: StopRule::default(),
        mixed_steps: false,
        reuse_prefixes: false, // the prompts are alike
    };
    let (config, weights) = (ModelSpec::open(folder)?, Weights::open(folder)?);
    let options = options.on(target, &config, &weights);
    let model = DeviceModel::load(&device.client, &config, &weights, &options.shape(&Parallel::ONE))?;
    let mut engine = Engine::new(&device.client, model, options)?;
    let mut wrong = Vec::new();
    let mut run = || {
        let requests = golden.iter().enumerate().map(|(index, ids)| Sample {
            id: SampleId { round: 0, index, generation: 0 },
            prompt: ids[..ids.len() - NEW].into(),
            max_new_tokens: NEW,
        });
        let keep = |sample: crate::scheduler::Finished| {
            let expected = &golden[sample.id.index][golden[sample.id.index].len() - NEW..];
            if let Some(at) = sample.tokens.iter().zip(expected).position(|(token, expected)| token != expected) {
                wrong.push(format!("text {} differs from its {}th new token on", sample.id.index, at + 1));
            }
            Ok(())
        };
        let timing = engine.run(requests, &AtomicBool::new(false), keep, |_| ())?;
        Ok(Duration::from_secs_f64(timing.decode_device_s / timing.decode_steps.max(1) as f64))
    };
    let seconds = times(Until { least: 3, ..UNTIL }, &mut run)?;
    wrong.sort();
    wrong.dedup();
    match wrong.is_empty() {
        true => Ok(Some(seconds)),
        false => Err(Error::runtime("comparing with golden tokens")(wrong.join("; "))),
    }
}
