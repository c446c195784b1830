//! The report: findings in the order in which a reader wants them. Pure.

use pagoda_kernels::rpa;
use pagoda_kernels::vmem::{BufferKind, Bytes, Spills};

use super::estimate::{self, ALL_REDUCE, Costs, Cycles, Exchange, GATHER, Source, StepTime};
use super::jax_v2;
use super::launches::{Planned, Time, launches};
use super::plan::{Chosen, Plan, Program};
use super::suggest::{self, Alternative};
use super::{Counted, Findings, Question, compiled_kernel};
use crate::certify::Verdict as Compiled;
use crate::certify::report::{AllocationKind, KernelVmem};
use crate::check::compile::Answer;
use crate::llama::Parallel;
use crate::llama::step::StepShape;
use crate::report::{
    Bar, Block, Figure, Lane, MeshDrawing, Part, Report, Roofline, RooflinePoint, Section, Span, Status, Suggestion,
    Table, Timeline, Value, Verdict,
};
use crate::topology::plural;

/// The whole report.
pub(super) fn report(findings: &Findings, question: &Question) -> Report {
    let plan = &findings.plan;
    let one_engine = one_engine(findings);
    Report {
        title: title(plan, question),
        subtitle: subtitle(plan, &findings.compiler),
        verdict: verdict(findings, question, one_engine.as_ref()),
        figures: figures(findings),
        suggestions: suggestions(findings, question, one_engine.as_ref()),
        sections: sections(findings, question, one_engine.as_ref()),
        notes: notes(findings, question),
    }
}

fn title(plan: &Plan, question: &Question) -> String {
    format!("{} on {}", question.model_name, plan.job.topology.name())
}

fn subtitle(plan: &Plan, compiler: &str) -> String {
    let job = &plan.job;
    let chosen = match plan.chosen {
        Chosen::Given => "as given",
        Chosen::Proposed => "proposed",
    };
    let samples = Value::Count(job.samples.len() as u64);
    let new = Value::Count(job.max_new_tokens as u64);
    let compiler = if compiler.is_empty() { String::new() } else { format!(" by {}", short(compiler)) };
    format!(
        "{}; {samples} sample{} of {new} new tokens; mesh {} ({chosen}); compiled for {}{compiler}",
        job.topology,
        if job.samples.len() == 1 { "" } else { "s" },
        plan.mesh,
        plan.group.libtpu_name()
    )
}

/// libtpu as its build names it: its own words have a date and the change that it was built at.
fn short(compiler: &str) -> String {
    match compiler.split_whitespace().find(|word| word.starts_with("cl/")) {
        Some(change) => format!("libtpu {change}"),
        None => compiler.to_owned(),
    }
}

// The answer.

fn verdict(findings: &Findings, question: &Question, one_engine: Option<&OneEngine>) -> Verdict {
    let plan = &findings.plan;
    let topology = plan.job.topology.name();
    let (status, headline) = match findings.refused() {
        Some((program, Answer::Certified(certificate))) => {
            let what = match &certificate.verdict {
                Compiled::OutOfMemory(out) => format!(
                    "the {} program asks for {} of {}, and there are {}",
                    program.name(),
                    out.asked,
                    out.memory.to_uppercase(),
                    out.limit
                ),
                Compiled::Compiles => "it compiles".to_owned(),
            };
            (Status::Bad, format!("Does not fit {topology}: {what}."))
        }
        Some((program, Answer::Failed(why))) => {
            (Status::Caution, format!("Not known: libtpu gave no answer about the {} program: {why}", program.name()))
        }
        None if !findings.fits() => {
            let taken = hbm_taken(findings);
            (Status::Bad, format!("Does not fit {topology}: a device needs {taken} of HBM, and has {}.", plan.job.hbm))
        }
        None => {
            let time = findings.time;
            let at_most = if question.may_stop { "at most about" } else { "about" };
            let headline = format!(
                "Fits {topology}: both step programs compile, and the job takes {at_most} {} at {} new tokens/s.",
                Value::Seconds(time.seconds),
                Value::PerSecond(time.rate())
            );
            (Status::Good, headline)
        }
    };
    let mut reasons = vec![hbm_reason(findings)];
    reasons.extend(vmem_reason(findings));
    reasons.push(jax_reason(plan, question));
    reasons.extend(pagoda_words(plan));
    reasons.extend(one_engine.map(|one| one.words(findings)));
    Verdict { status, headline, reasons }
}

fn hbm_taken(findings: &Findings) -> Bytes {
    let [temporaries, code] = findings.beside().unwrap_or_default();
    findings.plan.memory.total() + temporaries + code
}

fn hbm_reason(findings: &Findings) -> String {
    let plan = &findings.plan;
    let (taken, hbm) = (hbm_taken(findings), plan.job.hbm);
    let beside = findings.beside();
    let known = if beside.is_some() { "" } else { " without temporaries and code" };
    let most = plan.most_pages(beside.unwrap_or_default().into_iter().sum());
    let asked = plan.job.limits.max_pages;
    format!(
        "HBM: {taken} of {hbm} a device{known}; {asked} pages are asked for, {} would fit.",
        Value::Count(most as u64)
    )
}

/// The kernel that comes closest to its limit.
fn vmem_reason(findings: &Findings) -> Option<String> {
    let kernels = compiled(findings);
    let tightest = kernels.iter().max_by(|a, b| {
        let share = |kernel: &CompiledKernel| kernel.total.0 as f64 / kernel.limit.0.max(1) as f64;
        share(a).total_cmp(&share(b))
    })?;
    Some(format!(
        "VMEM: all {} kernels compile; the tightest, {} of {}, takes {} of {}, spills included.",
        kernels.len(),
        tightest.role,
        tightest.program.name(),
        tightest.total,
        tightest.limit
    ))
}

// JAX's kernel on the same job.

fn jax_launch(plan: &Plan) -> jax_v2::Launch {
    let limits = &plan.job.limits;
    jax_v2::Launch::of(
        &plan.job.config,
        limits.page_size.tokens(),
        limits.pages_per_seq(),
        plan.job.prefill_asked,
        plan.job.compute,
    )
}

fn jax_tiles(launch: &jax_v2::Launch, plan: &Plan, question: &Question) -> jax_v2::Tiles {
    let default = launch.default_tiles(plan.job.topology.chip());
    question.jax_tiles.map_or(default, |tiles| jax_v2::Tiles {
        queries: tiles.queries.min(launch.rows),
        kv_pages: tiles.kv_pages.min(launch.pages_per_seq),
    })
}

/// What the compiler would say of JAX's kernel, as far as arithmetic goes.
fn jax_reason(plan: &Plan, question: &Question) -> String {
    let launch = jax_launch(plan);
    let limit = plan.job.topology.chip().info().default_scoped_limit;
    let named = if question.jax_tiles.is_some() { "the config's tiles" } else { "its default tiles" };
    let tiles = jax_tiles(&launch, plan, question);
    let (scratch, all) = (launch.scratch(tiles), launch.vmem(tiles).total());
    let which = format!("{} query rows x {} KV pages", tiles.queries, tiles.kv_pages);
    let half = jax_v2::Launch { rows: launch.rows.div_ceil(2), ..launch.clone() };
    let same = half.scratch(jax_tiles(&half, plan, question)) == scratch;
    let halved = if same {
        ", and the same with half of max_seqs, max_pages and max_prefill_size: none of them enters"
    } else {
        ""
    };
    if scratch > limit {
        return format!(
            "JAX's attention kernel (v2) with {named} ({which}) dies on all heads: {} of {}{halved}.",
            megabytes(scratch),
            megabytes(limit)
        );
    }
    if all > limit {
        return format!(
            "JAX's attention kernel (v2) with {named} ({which}) dies on all heads once its windows are counted: {} of \
             {}{halved}.",
            megabytes(all),
            megabytes(limit)
        );
    }
    format!(
        "JAX's attention kernel (v2) with {named} ({which}) takes {} of {} before register spills, which only the compiler \
         knows{halved}.",
        megabytes(all),
        megabytes(limit)
    )
}

/// As libtpu writes it in its messages.
fn megabytes(bytes: Bytes) -> String {
    format!("{:.2}M", bytes.as_mib())
}

// One engine over the slice beside one per replica.

/// What the job takes as one engine: one batch of `max_seqs` sequences over all replicas, one program over the slice.
struct OneEngine {
    seconds: f64,
    calls: usize,
    waves: usize,
    reduce: Option<[f64; 2]>,
}

fn one_engine(findings: &Findings) -> Option<OneEngine> {
    let plan = &findings.plan;
    // Where one engine takes all prompts at once there is nothing to compare.
    if plan.mesh.data.get() == 1 || plan.job.samples.len() <= plan.job.limits.max_seqs {
        return None;
    }
    let clock = plan.job.topology.chip().info().clock.0;
    let wide = findings.wide_reduce;
    let mut costs = findings.costs.clone();
    let reduce = costs.exchange.as_mut().zip(wide).map(|(exchange, wide)| {
        let near = std::mem::replace(&mut exchange.decode_sum, wide);
        [near.fixed / clock, wide.fixed / clock]
    });
    let all = estimate::simulate(plan, &costs, &plan.job.samples).ok()?;
    let waves = plan.job.samples.len().div_ceil(plan.job.limits.max_seqs.max(1));
    Some(OneEngine { seconds: all.seconds, calls: all.prefill_calls + all.decode_calls, waves, reduce })
}

impl OneEngine {
    fn factor(&self, findings: &Findings) -> f64 {
        self.seconds / findings.time.seconds.max(f64::MIN_POSITIVE)
    }

    fn words(&self, findings: &Findings) -> String {
        let plan = &findings.plan;
        let slots = plan.job.limits.max_seqs;
        let (data, factor) = (plan.mesh.data.get(), self.factor(findings));
        let of_slots = plural(slots, "slot");
        let own = findings.plan.shares().iter().map(Vec::len).max().unwrap_or(0).div_ceil(slots.max(1));
        let mut words = format!(
            "Data parallelism: {data} engines with {of_slots} each are {} as fast as one engine with {of_slots} over the \
             slice ({}), because {} run at once and the prompts take {own} {} instead of {}",
            Value::Times(factor),
            Value::Seconds(self.seconds),
            plural((data * slots).min(plan.job.samples.len()), "sequence"),
            if own == 1 { "wave" } else { "waves" },
            self.waves
        );
        if let Some([near, wide]) = self.reduce {
            words += &format!(
                "; and because a sum over the shards stays within a host, {} instead of {}, {} a step",
                Value::Seconds(near),
                Value::Seconds(wide),
                estimate::sums(plan)
            );
        }
        words + "."
    }
}

// The numbers.

fn figures(findings: &Findings) -> Vec<Figure> {
    let plan = &findings.plan;
    let time = findings.time;
    let [decode, prefill] =
        [Program::Decode, Program::Prefill].map(|program| full_step(plan, &findings.costs, program));
    let bound = |time: &StepTime| {
        let other = time.compute().min(time.memory);
        let (by, beside) = if time.memory > time.compute() { ("HBM", "kernels") } else { ("kernels", "HBM") };
        format!("bound by {by}; {beside} {}", Value::Seconds(other))
    };
    let beside = findings.beside();
    let figure = |key, label: &str, value, note: String| Figure { key, label: label.into(), value, note };
    let mut figures = vec![
        figure("job_seconds", "The job", Value::Seconds(time.seconds), plural(time.busy, "engine")),
        figure(
            "tokens_per_second",
            "New tokens per second",
            Value::PerSecond(time.rate()),
            format!("{} new tokens", Value::Count(time.tokens as u64)),
        ),
        figure("decode_step_seconds", "A decode step", Value::Seconds(decode.seconds()), bound(&decode)),
        figure("prefill_step_seconds", "A prefill step", Value::Seconds(prefill.seconds()), bound(&prefill)),
        figure(
            "hbm_bytes",
            "HBM of a device",
            Value::Bytes(hbm_taken(findings)),
            format!("of {}{}", plan.job.hbm, if beside.is_none() { ", temporaries and code not known" } else { "" }),
        ),
        figure(
            "max_pages_that_fit",
            "KV pages that fit",
            plan.most_pages(beside.unwrap_or_default().into_iter().sum()).into(),
            format!("{} are asked for", Value::Count(plan.job.limits.max_pages as u64)),
        ),
    ];
    if findings.refused().is_some() {
        figures.retain(|figure| matches!(figure.key, "hbm_bytes" | "max_pages_that_fit"));
    }
    figures
}

/// The most that a step of this job has to do: all slots at their longest, or a prefill step as full as prompts make it.
fn full_step(plan: &Plan, costs: &Costs, program: Program) -> StepTime {
    let [_, full] = estimate::profiled_batches(plan, program);
    estimate::step_time(plan, costs, program, &full)
}

// What to change.

fn suggestions(findings: &Findings, question: &Question, one_engine: Option<&OneEngine>) -> Vec<Suggestion> {
    let plan = &findings.plan;
    let mut suggestions = Vec::new();
    if let Some(one) = one_engine.filter(|one| question.one_engine && one.factor(findings) > 1.0) {
        suggestions.push(Suggestion {
            kind: "data parallelism",
            change: "inference_mode: host_data_parallel (the default here, and what is estimated; Levanter's is global_mesh)".into(),
            effect: format!(
                "{} instead of {} ({}): {} calls of one engine become {} side by side",
                Value::Seconds(findings.time.seconds),
                Value::Seconds(one.seconds),
                Value::Times(one.factor(findings)),
                Value::Count(one.calls as u64),
                plural(findings.time.busy, "engine")
            ),
        });
    }
    suggestions.extend(suggest::larger_slice(plan, &findings.calibration).map(|(slice, larger, time)| Suggestion {
        kind: "slice",
        change: format!("--topology {}", slice.name()),
        effect: format!(
            "the smallest slice that holds the job, with mesh {}: {} of {} a device; {} by the planner's model",
            larger.mesh,
            larger.memory.total(),
            larger.job.hbm,
            Value::Seconds(time.seconds)
        ),
    }));
    let alternatives = suggest::alternatives(plan, &findings.calibration);
    suggestions.extend(alternatives.into_iter().map(|alternative| words(alternative, findings)));
    suggestions
}

fn words(alternative: Alternative, findings: &Findings) -> Suggestion {
    let Alternative { kind, change, time, why, .. } = alternative;
    let before = findings.time.seconds;
    let effect = if suggest::fits(&findings.plan) {
        let by = if findings.calibration.is_of_the_compiler() {
            "by the model, scaled to the compiler's figures"
        } else {
            "by the planner's model"
        };
        format!(
            "{} instead of {} ({}), {by}: {why}",
            Value::Seconds(time.seconds),
            Value::Seconds(before),
            Value::Times(before / time.seconds)
        )
    } else {
        format!("fits, and takes {} by the planner's model: {why}", Value::Seconds(time.seconds))
    };
    Suggestion { kind, change, effect }
}

// The sections.

fn sections(findings: &Findings, question: &Question, one_engine: Option<&OneEngine>) -> Vec<Section> {
    let plan = &findings.plan;
    let mut sections = vec![mesh(findings), hbm(findings), vmem(findings)];
    if findings.refused().is_none() {
        sections.push(steps(findings));
        sections.push(roofline(findings));
        sections.push(simulated(findings, one_engine));
    }
    sections.push(jax(plan, question));
    sections.push(executables(findings));
    sections
}

fn mesh(findings: &Findings) -> Section {
    let plan = &findings.plan;
    let (topology, shard) = (&plan.job.topology, &plan.shard);
    let model = plan.mesh.model.get();
    let text = format!(
        "{} of {}: each device holds {} query and {} KV heads of {}, {} of {} MLP columns and {} of {} rows of the vocabulary.",
        if plan.mesh.data.get() == 1 { "1 replica".to_owned() } else { format!("{} replicas", plan.mesh.data) },
        if model == 1 { "1 device".to_owned() } else { format!("{model} devices") },
        shard.q_heads,
        shard.kv_heads,
        shard.head_dim,
        shard.mlp.inner(),
        plan.job.config.mlp.inner(),
        shard.vocab_size,
        plan.job.config.vocab_size
    );
    let drawing = MeshDrawing { hosts: topology.hosts(), devices_per_host: topology.devices_per_host(), model };
    let mut blocks = vec![Block::Text(text), Block::Mesh(drawing)];
    if model > plan.job.config.kv_heads {
        blocks.push(Block::Text(format!(
            "The model axis is larger than the {} KV heads: each is repeated on {} devices, with its pages.",
            plan.job.config.kv_heads,
            model / plan.job.config.kv_heads
        )));
    }
    if !plan.within_a_host() {
        blocks.push(Block::Text(format!(
            "A replica spans {} hosts: every sum over its shards leaves the host.",
            model.div_ceil(topology.devices_per_host())
        )));
    }
    blocks.push(Block::Table(links(findings)));
    Section::new("Mesh", blocks)
}

/// What a step sends, by link.
fn links(findings: &Findings) -> Table {
    let plan = &findings.plan;
    let links = plan.job.topology.links();
    let model = plan.mesh.model.get() as f64;
    let mut table = Table::new(&["link", "what", "bytes a decode step", "at link speed", "of the step"]);
    let rows = Program::Decode.rows(&plan.shape);
    let sums = (estimate::sums(plan) * rows * plan.shard.hidden_size * 4) as f64;
    let ici = if plan.mesh.model.get() > 1 { sums * 2.0 * (model - 1.0) / model } else { 0.0 };
    let step = full_step(plan, &findings.costs, Program::Decode).seconds();
    let seconds = ici / links.ici.0;
    let within = if plan.within_a_host() { "ICI, within a host" } else { "ICI, between hosts" };
    table.row(vec![
        within.into(),
        if model > 1.0 { "2 sums a layer over the shards" } else { "nothing: a replica is one device" }.into(),
        Bytes(ici as u64).into(),
        Value::Seconds(seconds),
        Value::Share(seconds / step),
    ]);
    table.row(vec![
        "DCN, between hosts".into(),
        "nothing: every host reads the prompts and writes its samples".into(),
        Bytes(0).into(),
        Value::Seconds(0.0),
        Value::Share(0.0),
    ]);
    table
}

fn hbm(findings: &Findings) -> Section {
    let plan = &findings.plan;
    let memory = &plan.memory;
    let part = |label: &str, bytes| Part { label: label.into(), bytes };
    let mut parts = vec![
        part("weights", memory.weights),
        part(&format!("KV cache, {} pages", plan.job.limits.max_pages), memory.kv),
    ];
    if let Some([temporaries, code]) = findings.beside() {
        parts.extend([part("temporaries", temporaries), part("code of both programs", code)]);
    }
    let mut table =
        Table::new(&["program", "arguments", "results beside the cache", "temporaries", "code", "compiled in"]);
    for step in &findings.steps {
        let Some(certificate) = step.answer.certificate() else { continue };
        let Some(stats) = certificate.memory else { continue };
        let bytes = |value: i64| Value::Bytes(Bytes(value.max(0) as u64));
        table.row(vec![
            step.program.name().into(),
            bytes(stats.arguments),
            bytes(stats.outputs - stats.aliased),
            bytes(stats.temporaries),
            bytes(stats.code),
            Value::Seconds(certificate.seconds),
        ]);
    }
    let mut blocks = vec![Block::Bars(vec![Bar { label: "a device".into(), limit: plan.job.hbm, parts }])];
    if !table.rows.is_empty() {
        blocks.push(Block::Text("By the compiler:".into()));
        blocks.push(Block::Table(table));
    }
    Section::new("HBM", blocks)
}

/// A kernel of a compiled program beside its plan.
struct CompiledKernel<'f> {
    program: Program,
    role: &'static str,
    limit: Bytes,
    total: Bytes,
    report: &'f KernelVmem,
}

fn compiled(findings: &Findings) -> Vec<CompiledKernel<'_>> {
    let answered = findings.steps.iter().filter_map(|step| Some((step.program, step.answer.certificate()?)));
    let kernels = answered.flat_map(|(program, certificate)| {
        findings.plan.launches(program).iter().filter_map(move |launch| {
            let report = compiled_kernel(launch, &certificate.kernels)?;
            // Not the report's own total: in a whole program that begins where XLA's operands in VMEM end.
            let total = report.without_spills() + report.spills();
            let (role, limit) = (launch.role, launch.plan.limit());
            Some(CompiledKernel { program, role, limit, total, report })
        })
    });
    kernels.collect()
}

fn vmem(findings: &Findings) -> Section {
    let plan = &findings.plan;
    let kernels = compiled(findings);
    let mut table = Table::new(&["program", "kernel", "tiles", "planned", "compiled", "spills", "limit", "known as"]);
    let mut bars = Vec::new();
    for program in Program::ALL {
        for launch in plan.launches(program) {
            let planned = launch.plan.vmem().total();
            let compiled = kernels.iter().find(|kernel| (kernel.program, kernel.role) == (program, launch.role));
            let [without, spills] = compiled.map_or([Value::Missing, Value::Missing], |kernel| {
                [kernel.report.without_spills().into(), kernel.report.spills().into()]
            });
            let known = match compiled {
                Some(kernel) if kernel.report.without_spills() == planned => "compiled, to the byte as planned",
                Some(_) => "compiled; XLA keeps an operand in VMEM for it",
                None => "planned only",
            };
            table.row(vec![
                program.name().into(),
                launch.role.into(),
                launch.plan.name().into(),
                planned.into(),
                without,
                spills,
                launch.plan.limit().into(),
                known.into(),
            ]);
            let label = format!("{} {}", program.name(), launch.role);
            let parts = match compiled {
                Some(kernel) => by_kind(kernel.report),
                None => launch
                    .plan
                    .vmem()
                    .buffers
                    .iter()
                    .map(|buffer| Part { label: buffer.name.clone(), bytes: buffer.bytes })
                    .collect(),
            };
            bars.push(Bar { label, limit: launch.plan.limit(), parts });
        }
    }
    Section::new("VMEM of each kernel", vec![Block::Table(table), Block::Bars(bars)])
}

fn by_kind(report: &KernelVmem) -> Vec<Part> {
    use BufferKind::{InputWindow, InternalScratch, OutputWindow, Scratch};
    let kinds = [InputWindow, OutputWindow, Scratch, InternalScratch];
    let buffers = kinds.map(|kind| Part { label: kind.to_string(), bytes: report.of_kind(kind) });
    let spilled = report.allocations.iter().filter(|allocation| matches!(allocation.kind, AllocationKind::Spill(_)));
    let spills = Part { label: "register spills".into(), bytes: spilled.map(|allocation| allocation.bytes).sum() };
    buffers.into_iter().chain([spills]).collect()
}

fn steps(findings: &Findings) -> Section {
    let plan = &findings.plan;
    let clock = plan.job.topology.chip().info().clock.0;
    let mut table = Table::new(&["program", "what", "launches", "cycles each", "together", "by"]);
    let mut lanes = Vec::new();
    for program in Program::ALL {
        let [_, full] = estimate::profiled_batches(plan, program);
        let step = estimate::step_time(plan, &findings.costs, program, &full);
        let costs = match program {
            Program::Prefill => &findings.costs.prefill,
            Program::Decode => &findings.costs.decode,
        };
        for (at, (what, seconds)) in step.parts.iter().enumerate() {
            let (count, source) = match plan.launches(program).get(at) {
                Some(launch) => (launch.count, costs[at].source.words()),
                None => {
                    let exchange = findings.costs.exchange;
                    let source = |of: &dyn Fn(Exchange) -> Cycles| exchange.map_or(Source::Model, |all| of(all).source);
                    match *what {
                        ALL_REDUCE => (estimate::sums(plan), source(&|all| all.sum(program)).words()),
                        GATHER => (1, source(&|all| all.gather).words()),
                        _ => (plan.shard.layers.len(), "profiled once, scaled"),
                    }
                }
            };
            table.row(vec![
                program.name().into(),
                (*what).into(),
                count.into(),
                Value::Cycles((seconds * clock / count.max(1) as f64).round() as u64),
                Value::Seconds(*seconds),
                source.into(),
            ]);
        }
        let label = format!("{}: {}", program.name(), describe(&full));
        let spans = step.parts.iter().map(|&(label, seconds)| Span { label: label.into(), seconds });
        lanes.push(Lane { label, spans: spans.collect() });
        let memory = Span {
            label: format!("{} at {}", Bytes(step.bytes as u64), plan.job.topology.chip().info().hbm_bandwidth),
            seconds: step.memory,
        };
        lanes.push(Lane { label: format!("{}: HBM beside it", program.name()), spans: vec![memory] });
    }
    let text = "Kernels one after another, and what HBM needs for the same step; the longer of both counts.";
    Section::new("A step", vec![Block::Text(text.into()), Block::Timeline(Timeline { lanes }), Block::Table(table)])
}

/// A batch of equal sequences in words.
fn describe(batch: &[pagoda_kernels::random::Lengths]) -> String {
    match batch {
        [] => "no sequence".into(),
        [first, ..] if first.q_len == 1 => format!("{} rows at {} tokens each", batch.len(), first.kv_len),
        [first, ..] => format!("{} prompts of {}", batch.len(), first.q_len),
    }
}

fn roofline(findings: &Findings) -> Section {
    let plan = &findings.plan;
    let info = plan.job.topology.chip().info();
    let mut points = Vec::new();
    for program in Program::ALL {
        let [_, full] = estimate::profiled_batches(plan, program);
        let step = estimate::step_time(plan, &findings.costs, program, &full);
        for (launch, (_, seconds)) in plan.launches(program).iter().zip(&step.parts) {
            let work = launch.work(&full);
            // A kernel is no faster than its bytes allow, whatever its static cycles say.
            let seconds = (seconds / launch.count.max(1) as f64).max(work.bytes / info.hbm_bandwidth.0);
            let (group, label) = (program.name().to_owned(), launch.role.to_owned());
            points.push(RooflinePoint { group, label, flops: work.flops, bytes: work.bytes, seconds });
        }
    }
    let roofline = Roofline { peak_flops: info.peak_flops(), bandwidth: info.hbm_bandwidth.0, points };
    Section::new("Kernels below the roofline", vec![Block::Roofline(roofline)])
}

fn simulated(findings: &Findings, one_engine: Option<&OneEngine>) -> Section {
    let (plan, time) = (&findings.plan, findings.time);
    let slowest = time.slowest;
    let mut table = Table::new(&["", "engine that ends last"]);
    let mut row = |what: &str, value: Value| table.row(vec![what.into(), Value::Text(value.to_string())]);
    row("samples", plan.shares().iter().map(Vec::len).max().unwrap_or(0).into());
    row("prefill calls", slowest.prefill_calls.into());
    row("decode calls", slowest.decode_calls.into());
    row("decode steps", slowest.decode_steps.into());
    let mean = slowest.decode_rows as f64 / slowest.decode_steps.max(1) as f64;
    row("sequences in a decode step, mean", format!("{mean:.1} of {}", plan.job.limits.max_seqs).into());
    row("time in prefill", Value::Seconds(slowest.prefill_seconds));
    row("time in all", Value::Seconds(slowest.seconds));
    let mut blocks = vec![
        Block::Text("The scheduler itself, run on this prompt list with the times above.".into()),
        Block::Table(table),
    ];
    blocks.extend(one_engine.map(|one| Block::Text(one.words(findings))));
    Section::new("The job", blocks)
}

fn jax(plan: &Plan, question: &Question) -> Section {
    let launch = jax_launch(plan);
    let limit = plan.job.topology.chip().info().default_scoped_limit;
    let tiles = jax_tiles(&launch, plan, question);
    let bar = |label: String, launch: &jax_v2::Launch, tiles| {
        let parts = launch.vmem(tiles).buffers.into_iter();
        let parts =
            parts.map(|buffer| Part { label: format!("{} {}", buffer.name, buffer.shape()), bytes: buffer.bytes });
        Bar { label, limit, parts: parts.collect() }
    };
    let which = |tiles: jax_v2::Tiles| format!("{} rows x {} pages", tiles.queries, tiles.kv_pages);
    let mut bars = vec![bar(format!("all heads, {}", which(tiles)), &launch, tiles)];
    let model = plan.mesh.model.get();
    if model > 1 {
        let sharded = jax_v2::Launch { q_heads: plan.shard.q_heads, kv_heads: plan.shard.kv_heads, ..launch.clone() };
        let tiles = jax_tiles(&sharded, plan, question);
        bars.push(bar(format!("heads split {model} ways, {}", which(tiles)), &sharded, tiles));
    }
    let mut blocks = vec![Block::Text(jax_reason(plan, question)), Block::Bars(bars)];
    blocks.extend(pagoda_words(plan).map(Block::Text));
    Section::new("JAX's attention kernel on the same values", blocks)
}

/// Pagoda's attention kernel for what JAX's is asked for: all heads, as many rows as the config names, a buffer per layer.
fn pagoda_kernel(plan: &Plan) -> Option<impl Planned> {
    let job = &plan.job;
    let shape = StepShape { prefill_rows: job.prefill_asked, parallel: Parallel::ONE, ..plan.shape.clone() };
    let launches = launches(&job.config, &shape, job.topology.chip(), Program::Prefill).ok()?;
    let attention = launches.into_iter().find_map(|launch| match launch.time {
        Time::Keys(attention) => Some(attention),
        _ => None,
    })?;
    let spec = rpa::Spec { layers: 1, ..attention.problem().spec().clone() };
    let problem = pagoda_kernels::Problem::new(spec).ok()?;
    rpa::plan::Plan::new(problem, attention.chip(), rpa::plan::Options::default()).ok()
}

fn pagoda_words(plan: &Plan) -> Option<String> {
    let kernel = pagoda_kernel(plan)?;
    let known = match kernel.spills() {
        Spills::Certified { bytes } => format!("{bytes} of spills, certified"),
        Spills::Estimated { bytes } => format!("up to {bytes} of spills, estimated"),
        Spills::Unknown => "spills not known".to_owned(),
    };
    Some(format!(
        "Pagoda's {} takes {} of {} for the same heads and {} rows, and {known}: {}.",
        kernel.name(),
        kernel.vmem().total(),
        kernel.limit(),
        plan.job.prefill_asked,
        kernel.verdict()
    ))
}

fn executables(findings: &Findings) -> Section {
    let mut table = Table::new(&["program", "for", "replicas", "compiled in"]);
    for step in &findings.steps {
        let seconds =
            step.answer.certificate().map_or(Value::Missing, |certificate| Value::Seconds(certificate.seconds));
        table.row(vec![
            step.program.name().into(),
            step.unit.topology.as_str().into(),
            step.unit.replicas.into(),
            seconds,
        ]);
    }
    Section::new("Executables", vec![Block::Table(table)])
}

fn notes(findings: &Findings, question: &Question) -> Vec<String> {
    let mut notes = vec![
        format!("Compiler: {}. Nothing of this was run on a TPU.", findings.compiler),
        "Times are static estimates: the compiler's cycles leave out contention of DMAs, and no launch gaps or host \
         work are in them. The HBM floor takes the data sheet's bandwidth as reached."
            .to_owned(),
    ];
    let (counted, sheet) = (findings.plan.job.hbm, findings.plan.job.topology.chip().info().hbm);
    notes.push(format!("A device has {counted} of HBM as libtpu counts; its data sheet says {sheet}."));
    notes.push(match question.counted {
        Counted::Tokenizer => "Prompts were counted by the model's tokenizer.".to_owned(),
        Counted::Characters => {
            "There is no tokenizer: prompts were counted as a token for every 4 characters, and one in front."
                .to_owned()
        }
    });
    if question.may_stop {
        notes.push("Samples may end before max_new_tokens; the job is estimated as if none did.".to_owned());
    }
    notes
}

// JAX's kernel alone.

/// The report of `--layout jax-v2`.
pub(super) fn jax_report(plan: &Plan, question: &Question) -> Report {
    let launch = jax_launch(plan);
    let chip = plan.job.topology.chip().info();
    let limit = chip.default_scoped_limit;
    let tiles = jax_tiles(&launch, plan, question);
    let (scratch, all) = (launch.scratch(tiles), launch.vmem(tiles).total());
    let fits = all <= limit;
    let (status, headline) = if fits {
        (
            Status::Caution,
            format!("JAX's kernel takes {all} of {limit} before register spills, which only the compiler knows."),
        )
    } else {
        let counted = if scratch > limit { scratch } else { all };
        (
            Status::Bad,
            format!("JAX's kernel does not compile: {} of {} of scoped VMEM.", megabytes(counted), megabytes(limit)),
        )
    };
    let mut suggestions = Vec::new();
    if !fits {
        if let Some(smaller) = [16, 8].into_iter().find_map(|queries| launch.smaller(queries, limit)) {
            suggestions.push(Suggestion {
                kind: "tiles",
                change: format!(
                    "model.ragged_paged_q_block_size: {}, model.ragged_paged_kv_block_pages: {}",
                    smaller.queries, smaller.kv_pages
                ),
                effect: format!("{} before spills instead of {all}", launch.vmem(smaller).total()),
            });
        }
        if all * 3 <= chip.vmem_per_core * 2 {
            suggestions.push(Suggestion {
                kind: "limit",
                change: format!("vmem_limit_bytes: {}", (chip.vmem_per_core - Bytes::mib(4)).0),
                effect: format!(
                    "{all} and its spills have {} instead of {limit}; a core has {}",
                    chip.vmem_per_core - Bytes::mib(4),
                    chip.vmem_per_core
                ),
            });
        }
        let sharded = super::plan::model_axes(&plan.job.config, plan.job.topology.devices_per_host()).into_iter();
        let sharded = sharded.filter(|&model| plan.job.config.kv_heads.is_multiple_of(model)).map(|model| {
            let (q_heads, kv_heads) = (launch.q_heads / model, launch.kv_heads / model);
            (model, jax_v2::Launch { q_heads, kv_heads, ..launch.clone() })
        });
        let taken = |launch: &jax_v2::Launch| launch.vmem(jax_tiles(launch, plan, question)).total();
        if let Some((model, shard)) = sharded.into_iter().find(|(_, shard)| taken(shard) <= limit) {
            suggestions.push(Suggestion {
                kind: "mesh",
                change: format!("trainer.mesh.axes.model: {model}, if the heads are split over it"),
                effect: format!("{} before spills instead of {all}", taken(&shard)),
            });
        }
        if let Some((kernel, effect)) = pagoda_kernel(plan).zip(pagoda_words(plan)) {
            suggestions.push(Suggestion {
                kind: "kernel",
                change: format!("Pagoda's {}, at the same values", kernel.name()),
                effect,
            });
        }
    }
    Report {
        title: format!("{}, JAX's ragged paged attention (v2)", title(plan, question)),
        subtitle: subtitle(plan, ""),
        verdict: Verdict { status, headline, reasons: vec![jax_reason(plan, question)] },
        figures: vec![],
        suggestions,
        sections: vec![jax(plan, question)],
        notes: vec!["By arithmetic, checked against libtpu 0.0.52; nothing was compiled.".to_owned()],
    }
}
