//! Ragged paged attention: every sequence of a batch attends, causally, over its own pages of a shared KV cache.
//!
//! Row `i` of a sequence stands at position `kv_len - q_len + i`. It sees the keys `j <= position` and, with a window
//! of `w`, `j > position - w`. Logits are scaled, then soft-capped, then masked; softmax over the keys; weighted sum of
//! the values. Query heads share KV heads in groups (GQA). Rows from `cu_q_lens[num_seqs]` on are padding, and their
//! results must not be used.
//!
//! *Fused* ([`Spec::fused`]), a kernel takes the projections of queries, keys and values as a matmul leaves them, rotates
//! queries and keys, and writes the keys and values of its rows, the last `q_len` of a sequence, into their pages, in place,
//! before it attends over them. A key is rounded once, to the cache's type; attention reads what is stored. A query may be
//! rounded once to its own type, before or after it is scaled. Whatever else the pages hold stays, bit for bit. Sequences
//! without a key may have rows ([`Batch`]): these are 0 in the results.
//!
//! A *sink* is a logit of a query head, neither scaled nor capped, that adds to the softmax's sum alone. The log-sum-exp is the
//! natural logarithm of that sum, the sink included. A cache of 8 bits holds `round(x / scale)`, saturated; what is read is
//! `stored * scale`.
//!
//! Invariant of every form: memory outside the live sequences (other pages, the tail of a partial page, padding rows) may
//! hold anything, NaN included, and never reaches the result of a live row.
#[cfg(feature = "cli")]
mod args;
pub mod batch;
pub mod cached;
mod estimate;
mod inputs;
pub mod kv_layout;
pub mod kv_write;
pub mod mosaic;
mod mutants;
pub mod native;
pub mod plan;
pub mod problem;
pub mod reference;
mod schedule;
pub mod stablehlo;

use std::sync::LazyLock;

use pagoda_ir::{
    Context, Element, HostTensor, Result, TensorType,
    mosaic::{Builder, Cost},
    stablehlo as hlo,
};

pub use self::{
    batch::{Batch, Sequence},
    kv_layout::{Half, KvLayout, KvRows},
    problem::{Kind, Precision, Problem, Rotary, Spec},
};
use crate::{
    check::Expected,
    chips::Chip,
    choices::Choices,
    cost::{Family, Stage},
    error::{Invalid, ensure},
    evidence::Records,
    kernel::{Kernel, Operand, Sample, Work},
    mutants::MutantSet,
    named::{Arguments, Arrays, Named},
    plan::PlanError,
    random::Lengths,
    threads::Threads,
    vmem::Bytes,
};

/// The ragged paged attention kernel.
#[derive(Clone, Copy, Debug)]
pub struct Rpa;

impl Kernel for Rpa {
    const NAME: &'static str = "rpa";
    const ABOUT: &'static str =
        "Ragged paged attention: prefill and decode rows of many sequences over a paged KV cache";

    type Spec = Spec;
    type Tiles = plan::Tiles;
    type Details = plan::Details;

    fn describe(problem: &Problem) -> String {
        let Spec { kind, precision, tokens, q_heads, kv_heads, head_dim, page_size, .. } = &**problem;
        let kind = match kind {
            Kind::Mixed => "mixed",
            Kind::Decode => "decode",
        };
        let mut text = format!("{tokens}x{q_heads}x{head_dim} {} {kind}, {kv_heads} kv heads, ", precision.q);
        text += &format!("{} x {} pages of {page_size}", problem.max_seqs, problem.pages_per_seq);
        if problem.layers > 1 {
            text += &format!(", {} layers", problem.layers);
        }
        if problem.precision.kv != problem.precision.q {
            text += &format!(", {} in the cache", problem.precision.kv);
        }
        let words = [
            (problem.kv_rows == KvRows::Packed, "packed"),
            (problem.kv_rows == KvRows::Padded, "padded"),
            (problem.sinks, "sinks"),
            (problem.log_sum_exp, "log-sum-exp"),
            (problem.fused.is_some(), "fused with rotary and KV write"),
        ];
        words.iter().filter(|(on, _)| *on).for_each(|(_, word)| text += &format!(", {word}"));
        text + &plan::options(problem)
    }

    fn arguments(problem: &Problem) -> Arguments {
        problem.arguments()
    }

    fn results(problem: &Problem) -> Named<TensorType> {
        problem.results()
    }

    /// Heads that fill a tile and heads that do not, one to four pages of one to 128 tokens, and up to five sequences:
    /// empty ones, decode rows, chunks at the end of a longer context, whole prompts; full and partial pages. Options as far
    /// as a Mosaic form is written for them.
    fn sample(choices: &mut Choices) -> Sample<Self> {
        let element = choices.one_of(&[Element::F32, Element::Bf16]);
        let kind = choices.one_of(&[Kind::Mixed, Kind::Decode]);
        let (tokens, kv_heads) = (choices.within(1, 40), choices.one_of(&[1, 2, 3, 4, 8]));
        let (group, head_dim) = (choices.within(1, 8), choices.one_of(&[64, 80, 128, 256, 96, 112, 192]));
        // Wide heads of many are slow and show nothing that fewer do not.
        let group = if kv_heads * group * head_dim > 4096 { 1 } else { group };
        let (page_size, pages_per_seq) = (choices.one_of(&[1, 7, 8, 16, 32, 64, 128]), choices.within(1, 4));
        let layers = choices.within(1, 3);
        let sliding_window = choices.maybe(|choices| choices.within(1, 99));
        let soft_cap = choices.maybe(|choices| choices.within(1, 29) as f64);
        let (blocks, most) = (tokens.div_ceil(8), page_size * pages_per_seq);
        let blocks = if kind == Kind::Decode { 1 } else { blocks };
        let tiles = plan::Tiles { queries: 8 * choices.within(1, blocks), kv_pages: choices.within(1, pages_per_seq) };
        let sequences = choices.within(0, 5);
        let max_seqs = sequences.max(1);
        let spec = Spec {
            kind,
            precision: Precision::uniform(element),
            tokens,
            q_heads: kv_heads * group,
            kv_heads,
            head_dim,
            page_size,
            pages: max_seqs * pages_per_seq,
            layers,
            max_seqs,
            pages_per_seq,
            scale: (head_dim as f64).powf(-0.5),
            sliding_window,
            soft_cap,
            kv_rows: KvRows::unpacked(element, kv_heads, head_dim),
            ..Spec::default()
        };
        let spec = with_options(choices, spec);
        let mut rows = tokens;
        let batch = (0..sequences).map(|_| {
            let kv_len = match choices.within(0, 7) {
                0 => 0,
                1..=4 => choices.within(1, most),
                5 => page_size * choices.within(1, pages_per_seq),
                6 => page_size * choices.within(0, pages_per_seq - 1) + 1,
                _ => most,
            };
            let q_len = match choices.within(0, 8) {
                0 => 0,
                1..=3 => 1,
                4..=7 => choices.within(2, 40),
                _ => tokens,
            };
            let idle = spec.fused.is_some() && kv_len == 0;
            let q_len = q_len.min(if kind == Kind::Decode { 1 } else { rows }).min(rows);
            let q_len = if idle { q_len } else { q_len.min(kv_len) };
            rows -= q_len;
            Lengths { q_len, kv_len }
        });
        let batch: Vec<_> = batch.collect();
        Sample { spec, tiles, batch: Some(batch) }
    }

    /// Of the largest batch: every sequence as long as its row of the page table, the query rows shared out among them.
    /// Keys and values pass once, and those that are written once more.
    fn cost(problem: &Problem) -> Cost {
        let (seqs, rows) = (problem.max_seqs.min(problem.tokens), problem.tokens.div_ceil(problem.max_seqs));
        let rows = if problem.kind == Kind::Decode { 1 } else { rows };
        let seen = problem.sliding_window.unwrap_or(usize::MAX);
        let keys = problem.max_kv_len();
        let seen = |row: usize| (keys - row.min(keys - 1)).min(seen); // by the row before the last, and so on
        let logits = (seqs * problem.q_heads) as u64 * (0..rows).map(|row| seen(row) as u64).sum::<u64>();
        let fetched = seqs * (seen(0) + rows - 1).min(keys) * problem.kv_layout().token_elements();
        let written = if problem.fused.is_some() { seqs * rows * problem.kv_layout().token_elements() } else { 0 };
        let moved = problem.q_type().bytes() + problem.output_type().bytes();
        let moved = moved + (fetched + written) * problem.precision.kv.bytes();
        Cost { flops: 4 * problem.head_dim as u64 * logits, transcendentals: logits, bytes_accessed: moved as u64 }
    }

    fn lengths(problem: &Problem, inputs: &Arrays) -> Option<Vec<Lengths>> {
        let batch = Batch::of(problem, inputs).ok()?;
        Some(batch.sequences().map(|Sequence { q_len, kv_len, .. }| Lengths { q_len, kv_len }).collect())
    }

    fn draw(problem: &Problem, batch: Option<&[Lengths]>, seed: u64) -> std::result::Result<Arrays, Invalid> {
        inputs::draw(problem, batch, seed)
    }

    fn check_inputs(problem: &Problem, inputs: &Arrays) -> std::result::Result<(), Invalid> {
        Batch::of(problem, inputs)?;
        let first = inputs.get("first_page").map_or(0, |page| page.as_slice::<i32>()[0]);
        let layers = (0..problem.layers).map(|layer| problem.kv_layout().first_page(layer));
        let limit = || format!("is not the first page of a layer of {} pages", problem.pages);
        let fix = "give a multiple of them, below layers * pages";
        ensure(layers.into_iter().any(|page| page as i32 == first), "rpa inputs", "first_page", first, limit, fix)
    }

    fn batch(problem: &Problem, inputs: &Arrays) -> Option<Vec<Lengths>> {
        let batch = Batch::of(problem, inputs).ok()?;
        Some(batch.sequences().map(|Sequence { q_len, kv_len, .. }| Lengths { q_len, kv_len }).collect())
    }

    fn live(problem: &Problem, inputs: &Arrays) -> Vec<usize> {
        reference::live(problem, &Batch::of(problem, inputs).expect("a batch of the problem"))
    }

    fn recognise(operands: &[(String, TensorType)]) -> Option<Problem> {
        let ty = |name: &str| operands.iter().find(|(known, _)| known == name).map(|(_, ty)| ty);
        let [table, q, kv] = [ty("page_indices")?, ty("q")?, ty("kv_pages")?];
        let &[max_seqs, pages_per_seq] = &table.dims[..] else { return None };
        let &[tokens, q_heads, head_dim] = &q.dims[..] else { return None };
        let &[pages, page_size, rows, _] = &kv.dims[..] else { return None };
        let problem = Problem::new(Spec {
            kind: Kind::Mixed,
            precision: Precision::uniform(q.element),
            tokens,
            q_heads,
            kv_heads: KvLayout::heads_of(rows),
            head_dim,
            page_size,
            pages,
            layers: 1,
            max_seqs,
            pages_per_seq,
            scale: 1.0,
            sliding_window: None,
            soft_cap: None,
            ..Spec::default()
        });
        let problem = problem.ok()?;
        let named = problem.arguments().iter().all(|argument| ty(argument.name) == Some(&argument.ty));
        named.then_some(problem)
    }

    fn reference(problem: &Problem, inputs: &Arrays) -> Vec<Expected> {
        reference::reference(problem, inputs)
    }

    fn native(problem: &Problem, inputs: &Arrays, threads: &dyn Threads) -> Option<Vec<HostTensor>> {
        native::run(problem, inputs, threads)
    }

    fn stablehlo<'c, 'a>(
        b: &hlo::Builder<'c, 'a>,
        problem: &Problem,
        args: &Named<hlo::Tensor<'c, 'a>>,
    ) -> Result<Vec<hlo::Tensor<'c, 'a>>> {
        stablehlo::emit(b, problem, args)
    }

    fn operands(problem: &Problem, chip: Chip) -> Vec<Operand> {
        mosaic::operands(problem, chip)
    }

    fn returned(plan: &plan::Plan) -> Vec<TensorType> {
        mosaic::returned(plan)
    }

    fn mosaic<'a>(k: &'a Builder<'a>, plan: &plan::Plan) {
        mosaic::write(k, plan);
    }

    fn mutants() -> Vec<MutantSet<Self>> {
        mutants::sets()
    }

    fn check_batch(problem: &Problem, batch: Option<&[Lengths]>) -> std::result::Result<(), Invalid> {
        batch.map_or(Ok(()), |batch| inputs::check_lengths(problem, batch))
    }

    fn spread(problem: &Problem) -> Vec<(&'static str, Vec<Lengths>)> {
        estimate::spread(problem)
    }

    fn work(problem: &Problem, batch: Option<&[Lengths]>) -> Work {
        match batch {
            Some(batch) => estimate::work(problem, batch),
            None => {
                let Cost { flops, bytes_accessed, .. } = Self::cost(problem);
                Work { flops: flops as f64, bytes: bytes_accessed as f64 }
            }
        }
    }

    fn kernel_of_batch<'c>(
        context: &'c Context,
        plan: &plan::Plan,
        batch: Option<&[Lengths]>,
    ) -> Result<pagoda_ir::mosaic::Kernel<'c>> {
        let Some(lengths) = batch else { return plan.kernel(context) };
        let batch = Batch::of_lengths(plan.problem(), lengths);
        mosaic::kernel_of_busiest(
            context,
            plan,
            &batch.map_err(|invalid| pagoda_ir::Error::op(Self::NAME, invalid.to_string()))?,
        )
    }

    fn core_share(plan: &plan::Plan) -> Option<(plan::Plan, usize)> {
        plan::alone(plan).map(|alone| (alone, 1))
    }

    fn around<'c>(context: &'c Context, plan: &plan::Plan) -> Result<Vec<hlo::Module<'c>>> {
        estimate::around(context, plan)
    }

    fn plannable(problem: &Problem, chip: Chip) -> std::result::Result<(), PlanError> {
        plan::plannable(problem, chip)
    }

    fn legal(problem: &Problem, _: Chip, tiles: plan::Tiles) -> std::result::Result<(), PlanError> {
        plan::legal(problem, tiles)
    }

    fn choose(problem: &Problem, chip: Chip, limit: Bytes, batches: &[Vec<Lengths>]) -> Option<plan::Tiles> {
        plan::choose(problem, chip, limit, batches)
    }

    fn family(problem: &Problem) -> Option<&'static Family> {
        Some(match problem.kind {
            Kind::Mixed => &schedule::MIXED,
            Kind::Decode => &schedule::DECODE,
        })
    }

    fn stages(plan: &plan::Plan, batch: Option<&[Lengths]>) -> Option<Vec<Stage>> {
        Some(schedule::stages(plan, batch?))
    }

    /// Over a batch; or the sum over those that serving meets.
    fn model(plan: &plan::Plan, batch: Option<&[Lengths]>) -> Option<f64> {
        match batch {
            Some(batch) => estimate::model(plan, batch),
            None => estimate::spread(plan.problem()).iter().map(|(_, batch)| estimate::model(plan, batch)).sum(),
        }
    }

    fn candidates(problem: &Problem, chip: Chip, limit: Bytes) -> Vec<plan::Tiles> {
        estimate::candidates(problem, chip, limit)
    }

    fn layout(problem: &Problem, chip: Chip, tiles: plan::Tiles) -> crate::plan::Layout<plan::Details> {
        plan::layout(problem, chip, tiles)
    }

    /// The incident that started the project first (Llama 3.1 8B, prompts of 1024 rows, 8 sequences of up to 4608 tokens).
    /// Then query heads, KV heads and head dimension of Llama 3 (8B and 70B on 1 to 8 devices), Qwen 2.5 and 3, Gemma and
    /// gpt-oss, each for prefill and for decode; some over a cache of 8 bits.
    fn common() -> Vec<Spec> {
        let heads = [
            (32, 8, 128),
            (16, 4, 128),
            (8, 2, 128),
            (4, 1, 128),
            (64, 8, 128),
            (8, 1, 128),
            (40, 8, 128),
            (28, 4, 128),
            (24, 8, 128),
            (16, 8, 128),
            (16, 2, 128),
            (32, 8, 64),
            (64, 8, 64),
            (16, 4, 64),
            (8, 4, 256),
            (16, 8, 256),
        ];
        let of = |(q_heads, kv_heads, head_dim): (usize, usize, usize)| {
            let kinds = [(Kind::Mixed, 1024, 8, 36), (Kind::Decode, 8, 8, 36), (Kind::Decode, 64, 64, 16)];
            kinds.map(|(kind, tokens, max_seqs, pages_per_seq)| Spec {
                kind,
                precision: Precision::uniform(Element::Bf16),
                tokens,
                q_heads,
                kv_heads,
                head_dim,
                page_size: 128,
                pages: max_seqs * pages_per_seq,
                layers: 1,
                max_seqs,
                pages_per_seq,
                scale: (head_dim as f64).powf(-0.5),
                sliding_window: None,
                soft_cap: None,
                kv_rows: KvRows::for_lanes(Element::Bf16, kv_heads, head_dim),
                ..Spec::default()
            })
        };
        let narrow = |spec: Spec| Spec { precision: Precision { kv: Element::F8E4M3Fn, ..spec.precision }, ..spec };
        let plain = heads.into_iter().flat_map(of);
        let narrow = [(32, 8, 128), (16, 4, 128)].into_iter().flat_map(of).map(narrow);
        // gpt-oss: every other layer sees a window.
        let sinks = of((64, 8, 64)).map(|spec| Spec { sinks: true, sliding_window: Some(128), ..spec });
        // What a step program asks for.
        let fused = heads.into_iter().flat_map(|heads| of(heads).into_iter().take(2));
        let fused = fused.map(|spec| Spec { fused: Some(Rotary::HalfSplit), ..spec });
        // The incident's second try: half of everything.
        let halved = |spec: Spec| Spec { tokens: 512, max_seqs: 4, pages: 4 * 36, ..spec };
        let halved = fused.clone().take(1).map(halved);
        plain.chain(narrow).chain(sinks).chain(fused).chain(halved).collect()
    }

    /// Attention layers of decoders, of one device or a part of one; pages of 16 to 256 tokens, up to 128 sequences.
    fn workload(choices: &mut Choices) -> Option<Spec> {
        let kv_heads = choices.one_of(&[1, 2, 4, 8]);
        let (group, head_dim) = (choices.within(1, 8), choices.one_of(&[128, 128, 128, 64, 256]));
        let kind = choices.one_of(&[Kind::Mixed, Kind::Decode]);
        let (page_size, max_seqs) = (choices.one_of(&[16, 32, 64, 128, 256]), choices.one_of(&[1, 4, 8, 32, 64, 128]));
        let tokens = match kind {
            Kind::Decode => max_seqs,
            Kind::Mixed => choices.one_of(&[64, 128, 256, 512, 1024, 2048]),
        };
        let pages_per_seq = (512 * choices.within(1, 16)) / page_size;
        let element = choices.one_of(&[Element::Bf16, Element::Bf16, Element::Bf16, Element::F32]);
        let options = choices.within(0, 5);
        Some(Spec {
            kind,
            precision: Precision::uniform(element),
            tokens,
            q_heads: kv_heads * group,
            kv_heads,
            head_dim,
            page_size,
            pages: max_seqs * pages_per_seq,
            layers: 1,
            max_seqs,
            pages_per_seq,
            scale: (head_dim as f64).powf(-0.5),
            sliding_window: (options == 5).then_some(1024),
            soft_cap: (options == 4).then_some(30.0),
            kv_rows: KvRows::for_lanes(element, kv_heads, head_dim),
            ..Spec::default()
        })
    }

    fn records() -> Option<&'static Records<Self>> {
        static RECORDS: LazyLock<Records<Rpa>> = LazyLock::new(|| Records::parse(include_str!("../../tuned/rpa.json")));
        Some(&RECORDS)
    }
}

/// `spec` with some of the options that a Mosaic form is written for.
fn with_options(choices: &mut Choices, spec: Spec) -> Spec {
    let narrow = choices.one_of(&problem::NARROW_KV);
    let options: [&dyn Fn(Spec) -> Spec; 5] = [
        &|spec| Spec { fused: Some(Rotary::HalfSplit), ..spec },
        &|spec| Spec { kv_rows: KvRows::for_lanes(spec.precision.kv, spec.kv_heads, spec.head_dim), ..spec },
        &|spec| Spec { sinks: true, ..spec },
        &|spec| Spec { log_sum_exp: true, ..spec },
        &|spec| Spec {
            precision: Precision { kv: narrow, ..spec.precision },
            kv_rows: match spec.kv_rows {
                KvRows::Packed => KvRows::Packed,
                KvRows::Interleaved | KvRows::Padded => KvRows::unpacked(narrow, spec.kv_heads, spec.head_dim),
            },
            ..spec
        },
    ];
    options.into_iter().fold(spec, |spec, option| match choices.coin().then(|| option(spec.clone())) {
        Some(with) if plan::emitted(&with) => with,
        _ => spec,
    })
}

/// The layer whose pages a launch with these inputs reads.
pub(crate) fn layer_of(problem: &Problem, inputs: &Arrays) -> usize {
    inputs.get("first_page").map_or(0, |page| page.as_slice::<i32>()[0] as usize / problem.pages)
}
