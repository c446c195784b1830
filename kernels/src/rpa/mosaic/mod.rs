//! Ragged paged attention as Mosaic kernels: what they share.
//!
//! `mixed` takes any batch, `decode` those of at most one row per sequence; `few_rows` is the step of both where few rows share
//! a key. `block` loads keys and values from what their copies brought, `heads` has what each head has of its own. The metadata
//! of a launch (`Metadata`) and the arithmetic of registers are here.

pub(super) mod block;
mod decode;
pub(super) mod few_rows;
mod fused;
mod heads;
mod mixed;

use pagoda_ir::{
    Context, Element, Result, TensorType,
    mosaic::{Builder, Kernel, MemorySpace, Ref, Value, tiling::LANES},
};

use super::{
    batch::Batch,
    plan::{self, Plan},
    problem::{Kind, Problem},
    schedule,
};
use crate::{chips::Chip, kernel::Operand};

/// The maximum of no logits: stands for minus infinity where two of them may be subtracted.
const NONE: f64 = -1e30;
/// A logit that must not count: so far below [`NONE`] that its weight is zero even where nothing else was seen.
const MASKED: f64 = 2.0 * NONE;

/// Which cores a kernel is written for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cores {
    /// All of the device: a `parallel` grid dimension.
    All,
    /// One of them, which does its share and no more.
    One(usize),
}

/// Writes the kernel that `plan` describes. Its operands are those of [`operands`].
pub(super) fn write<'a>(k: &'a Builder<'a>, plan: &Plan) {
    match plan.problem().kind {
        Kind::Mixed => mixed::write(k, plan, None, Cores::All),
        Kind::Decode => decode::write(k, plan, None),
    }
}

/// The kernel of `plan` with the lengths of one batch as constants: the compiler then knows how often each loop turns, and
/// its static estimate is of this batch. The operands are the same; of the metadata, only `page_indices` are read.
///
/// # Errors
/// None, unless MLIR fails.
pub fn kernel_of_batch<'c>(context: &'c Context, plan: &Plan, batch: &Batch) -> Result<Kernel<'c>> {
    plan.kernel_by(context, |k| match plan.problem().kind {
        Kind::Mixed => mixed::write(k, plan, Some(batch), Cores::All),
        Kind::Decode => decode::write(k, plan, Some((batch, None))),
    })
}

/// As [`kernel_of_batch`], of one core, where cores share the sequences: the estimate is what it is for. Where they share heads,
/// it takes the plan of a core alone ([`Kernel::core_share`](crate::Kernel::core_share)). The core is the one with the most to
/// do, as the kernel counts it.
///
/// # Errors
/// None, unless MLIR fails.
pub(super) fn kernel_of_busiest<'c>(context: &'c Context, plan: &Plan, batch: &Batch) -> Result<Kernel<'c>> {
    kernel_of_core(context, plan, batch, schedule::busiest(plan, &batch.lengths()))
}

/// As [`kernel_of_batch`], of one core of those that share the sequences: only its rows of the output are written.
///
/// # Errors
/// None, unless MLIR fails.
pub fn kernel_of_core<'c>(context: &'c Context, plan: &Plan, batch: &Batch, core: usize) -> Result<Kernel<'c>> {
    let cores = if plan.shares() > 1 { Cores::One(core) } else { Cores::All };
    plan.kernel_by(context, |k| match plan.problem().kind {
        Kind::Mixed => mixed::write(k, plan, Some(batch), cores),
        Kind::Decode => decode::write(k, plan, Some((batch, Some(core)))),
    })
}

/// What the kernels take: the metadata and the numbers of heads, then q and the pages. Of any batch, q is in two dimensions,
/// whole bands of rows and tiles of lanes. A fused kernel has the projections and the rows' angles in the place of q.
pub(super) fn operands(problem: &Problem, chip: Chip) -> Vec<Operand> {
    let metadata = ["kv_lens", "page_indices", "cu_q_lens", "num_seqs"].map(Operand::of);
    let first_page = (problem.layers > 1).then(|| Operand::of("first_page").reshape(&[1]));
    let q = match (problem.fused, problem.kind) {
        (Some(_), _) => {
            let projected = plan::fused::projected(problem, chip);
            let cos_sin = Operand::of("cos_sin").padded(&[projected[0], problem.head_dim]);
            vec![Operand::of("qkv").padded(&projected), cos_sin]
        }
        (None, Kind::Decode) => vec![Operand::of("q")],
        (None, Kind::Mixed) => {
            let dims = [problem.tokens, problem.q_heads * problem.head_dim];
            vec![Operand::of("q").reshape(&dims).padded(&plan::padded_rows(problem, chip))]
        }
    };
    let prefetched = metadata.into_iter().chain(first_page).chain(heads::operands(problem));
    prefetched.chain(q).chain([Operand::of("kv_pages")]).collect()
}

/// What they return: the output, of any batch in two dimensions, whole bands of rows and tiles of lanes; of a fused kernel the
/// pages; the log-sum-exps, of decode rows that are copied one by one; what of a fused kernel is of no use to anybody else.
pub(super) fn returned(plan: &Plan) -> Vec<TensorType> {
    let problem = plan.problem();
    let out = TensorType::new(problem.precision.output, &plan.output_dims());
    let kv_pages = problem.fused.map(|_| problem.kv_pages_type());
    let lanes = plan::log_sum_exp_lanes(problem);
    let lse = problem.log_sum_exp.then(|| match problem.kind {
        Kind::Decode => TensorType::new(Element::F32, &[problem.tokens, 1, lanes]),
        Kind::Mixed => TensorType::new(Element::F32, &[plan.padded_rows()[0], lanes]),
    });
    [Some(out), kv_pages, lse, plan.fresh_tokens()].into_iter().flatten().collect()
}

/// The ragged metadata of a launch: read from SMEM, or one batch's own, put there as constants.
struct Metadata<'a> {
    kv_lens: Ref<'a>,
    page_indices: Ref<'a>,
    cu_q_lens: Ref<'a>,
    num_seqs: Ref<'a>,
    first_page: Option<Ref<'a>>,
}

impl<'a> Metadata<'a> {
    /// Declares the prefetched arrays.
    fn declare(k: &'a Builder<'a>, problem: &Problem) -> Self {
        let scalars = |name, dims: &[usize]| k.prefetch(name, Element::I32, dims);
        Self {
            kv_lens: scalars("kv_lens", &[problem.max_seqs]),
            page_indices: scalars("page_indices", &[problem.max_seqs, problem.pages_per_seq]),
            cu_q_lens: scalars("cu_q_lens", &[problem.max_seqs + 1]),
            num_seqs: scalars("num_seqs", &[1]),
            first_page: (problem.layers > 1).then(|| scalars("first_page", &[1])),
        }
    }

    /// With a batch, the metadata of that batch, whatever the arguments are, page indices aside.
    fn of_batch(self, k: &'a Builder<'a>, batch: Option<&Batch>) -> Self {
        let Some(batch) = batch else { return self };
        let constants = |name, numbers: &[i32]| {
            let array = k.scratch(name, MemorySpace::Smem, Element::I32, &[numbers.len()]);
            numbers.iter().enumerate().for_each(|(at, &number)| array.at(at).store(number));
            array
        };
        Self {
            kv_lens: constants("kv_lens_of_batch", batch.kv_lens()),
            cu_q_lens: constants("cu_q_lens_of_batch", batch.cu_q_lens()),
            num_seqs: constants("num_seqs_of_batch", batch.num_seqs()),
            ..self
        }
    }

    /// Sequences of the batch.
    fn sequences(&self) -> Value<'a> {
        self.num_seqs.at(0).load()
    }

    /// The first row of a sequence; one past the last row of the one before.
    fn first_row(&self, sequence: Value<'a>) -> Value<'a> {
        self.cu_q_lens.at(sequence).load()
    }

    /// Keys of a sequence.
    fn kv_len(&self, sequence: Value<'a>) -> Value<'a> {
        self.kv_lens.at(sequence).load()
    }

    /// Where page `number` of a sequence is in the buffer of all layers.
    fn page(&self, sequence: Value<'a>, number: Value<'a>) -> Value<'a> {
        let index = self.page_indices.at((sequence, number)).load();
        match &self.first_page {
            Some(first) => index + first.at(0).load(),
            None => index,
        }
    }
}

/// Every `stride`th row of rows that lie in pieces: strided accesses are of one tile's lanes.
struct Strided<'a> {
    pieces: Vec<Ref<'a>>,
    start: usize,
    count: usize,
    stride: usize,
}

impl<'a> Strided<'a> {
    fn views(&self) -> impl Iterator<Item = Ref<'a>> {
        self.pieces.iter().map(|piece| piece.strided(0, self.start, self.count, self.stride))
    }

    fn load(&self, k: &'a Builder<'a>) -> Value<'a> {
        joined(k, &self.views().map(|view| view.load()).collect::<Vec<_>>(), 1)
    }

    fn store(&self, value: Value<'a>) {
        for (index, view) in self.views().enumerate() {
            view.store(value.slice(&[0, index * LANES], &view.dims()));
        }
    }
}

/// Tiles one after another along `dim`.
fn joined<'a>(k: &'a Builder<'a>, tiles: &[Value<'a>], dim: usize) -> Value<'a> {
    if let [all] = tiles { *all } else { k.concatenate(tiles, dim) }
}

/// A tile of equal columns, made `width` columns wide.
fn broadcast_lanes<'a>(k: &'a Builder<'a>, tile: Value<'a>, width: usize) -> Value<'a> {
    let rows = tile.dims()[0];
    let pieces = (0..width).step_by(LANES).map(|lane| LANES.min(width - lane));
    let pieces: Vec<_> =
        pieces.map(|lanes| if lanes == LANES { tile } else { tile.slice(&[0, 0], &[rows, lanes]) }).collect();
    joined(k, &pieces, 1)
}

/// `[rows, LANES]` whose sums over lanes are those of `tile`'s columns.
fn by_lane(tile: Value<'_>) -> Value<'_> {
    let (rows, columns) = (tile.dims()[0], tile.dims()[1]);
    if !columns.is_multiple_of(LANES) {
        // The same part of it in each lane: exact, the number of lanes is a power of two.
        return (tile.sum(1) * (1.0 / LANES as f64)).broadcast_to(&[rows, LANES]);
    }
    let piece = |lane| tile.slice(&[0, lane], &[rows, LANES]);
    (LANES..columns).step_by(LANES).fold(piece(0), |sum, lane| sum + piece(lane))
}

/// What a kernel of one step makes of `x` on the tile machine: `body(x, result)`.
#[cfg(test)]
fn computed(
    x: &pagoda_ir::HostTensor,
    result: pagoda_ir::TensorType,
    body: impl for<'a> Fn(&'a Builder<'a>, Ref<'a>, Ref<'a>),
) -> pagoda_ir::HostTensor {
    use pagoda_ir::{
        mosaic::{self, Semantics, Window},
        tile_machine::{Machine, Program},
    };
    let context = pagoda_ir::Context::new();
    let kernel = mosaic::kernel(&context, "computed", |k| {
        k.grid([(1, Semantics::Arbitrary)]);
        let input = k.input("x", x.element(), x.dims(), Window::whole(x.dims()));
        let output = k.output("result", result.element, &result.dims, Window::whole(&result.dims));
        body(k, input, output);
    });
    let program = Program::decode(kernel.expect("a kernel").module()).expect("a program");
    let run =
        program.run(&Machine::default(), std::slice::from_ref(x), std::slice::from_ref(&result)).expect("no fault");
    run.outputs.into_iter().next().expect("a result")
}

#[cfg(test)]
mod tests {
    use pagoda_ir::Element;

    use crate::{
        Case, Kernel, check_mosaic,
        chips::Chip,
        random::Lengths,
        rpa::{
            Kind, KvRows, Precision, Problem, Rotary, Rpa, Spec,
            plan::{Options, Plan, Tiles},
        },
    };

    fn problem(element: Element, heads: [usize; 3], sliding_window: Option<usize>, soft_cap: Option<f64>) -> Problem {
        let [q_heads, kv_heads, head_dim] = heads;
        let scale = (head_dim as f64).powf(-0.5);
        Problem::new(Spec {
            kind: Kind::Mixed,
            kv_rows: if head_dim == 192 { KvRows::Packed } else { KvRows::Interleaved },
            precision: Precision::uniform(element),
            tokens: 24,
            q_heads,
            kv_heads,
            head_dim,
            page_size: 16,
            pages: 16,
            layers: 1,
            max_seqs: 4,
            pages_per_seq: 4,
            scale,
            sliding_window,
            soft_cap,
            ..Spec::default()
        })
        .unwrap()
    }

    /// Decode rows, a whole prompt and a chunk in one launch, under every order of DMAs.
    #[test]
    fn a_ragged_batch_agrees_with_the_reference() {
        for (element, heads, window, cap) in [
            (Element::F32, [6, 2, 128], None, None),
            (Element::Bf16, [8, 2, 128], Some(20), Some(5.0)),
            (Element::Bf16, [16, 8, 128], None, None),
            (Element::Bf16, [4, 4, 64], None, None),
            (Element::F32, [2, 1, 256], Some(7), None),
            (Element::Bf16, [4, 2, 256], None, None),
        ] {
            agrees(problem(element, heads, window, cap).spec().clone());
        }
    }

    fn agrees(spec: Spec) {
        let decode = spec.kind == Kind::Decode;
        let problem = Problem::new(spec).unwrap();
        let tiles = Some(Tiles { queries: 8, kv_pages: 2 });
        let plan = Plan::new(problem.clone(), Chip::V5p, Options { tiles, vmem_limit: None }).unwrap();
        let lengths = match decode {
            false => [(1, 60), (0, 5), (13, 13), (9, 41)],
            true => [(1, 60), (0, 5), (1, 1), (1, 33)],
        };
        let lengths = lengths.map(|(q_len, kv_len)| Lengths { q_len, kv_len });
        let inputs = Rpa::draw(&problem, Some(&lengths), 5).unwrap();
        let name = Rpa::describe(&problem);
        check_mosaic(Case::new(&plan, &inputs), 7, None).unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    /// Every option beside the plain form, alone and together: each type of the cache, one to sixteen heads, rows of one to three
    /// tiles of lanes.
    #[test]
    fn options_agree_with_the_reference() {
        use Element::{Bf16, F8E4M3Fn, F8E5M2, F32, I8};
        for (q, kv, heads, packed, ends) in [
            (Bf16, F8E4M3Fn, [8, 2, 128], false, false),
            (Bf16, F8E5M2, [4, 4, 80], false, false),
            (Bf16, I8, [4, 2, 256], false, false),
            (F32, F8E4M3Fn, [4, 4, 128], false, true),
            (F32, Bf16, [6, 2, 128], false, false),
            (Bf16, Bf16, [8, 4, 64], true, false),
            (F32, F32, [2, 1, 64], true, false),
            (Bf16, Bf16, [4, 2, 192], true, true),
            (Bf16, I8, [8, 4, 64], true, true),
            (Bf16, F8E4M3Fn, [32, 16, 64], true, false),
            (Bf16, Bf16, [130, 2, 96], false, true),
            (F32, F32, [16, 8, 128], false, true),
        ] {
            let window = (heads[1] % 2 == 0).then_some(20);
            let plain = problem(q, heads, window, window.map(|_| 5.0)).spec().clone();
            // Blocks that are short are worked on in part where they are large: what comes behind all keys needs the whole of it.
            let page_sizes = if ends { &[16, 128][..] } else { &[16] };
            let kinds = page_sizes.iter().flat_map(|&size| [(size, Kind::Mixed), (size, Kind::Decode)]);
            for (page_size, kind) in kinds {
                agrees(Spec {
                    kind,
                    page_size,
                    precision: Precision { kv, ..plain.precision },
                    kv_rows: if packed { KvRows::Packed } else { KvRows::Interleaved },
                    sinks: ends,
                    log_sum_exp: ends,
                    ..plain.clone()
                });
            }
        }
    }

    /// Fused: what each way of sharing the work, each way of laying heads out, and sizes that are no whole tiles come to.
    #[test]
    fn fused_kernels_agree_with_the_reference() {
        use Element::{Bf16, F8E4M3Fn, F8E5M2, F32, I8};
        use Kind::{Decode, Mixed};
        use KvRows::{Interleaved, Packed};
        let prompts = &[(1, 60), (0, 5), (3, 0), (13, 13), (40, 41), (9, 64), (2, 17)][..];
        let rows = &[(1, 60), (0, 5), (1, 0), (1, 1), (1, 64), (1, 33), (0, 0), (1, 17)][..];
        let plain = [
            (Chip::V5e, Decode, Bf16, [8, 2, 128], 7, rows),
            (Chip::V5p, Decode, Bf16, [8, 2, 128], 8, rows),
            (Chip::V5p, Decode, Bf16, [16, 8, 128], 8, rows),
            (Chip::V5p, Decode, F32, [6, 3, 64], 8, rows),
            (Chip::V6e, Decode, Bf16, [10, 5, 80], 90, rows),
            (Chip::V6e, Decode, F32, [2, 1, 384], 7, rows),
            (Chip::V6e, Decode, Bf16, [4, 4, 256], 7, rows),
            (Chip::V5e, Mixed, Bf16, [8, 2, 128], 75, prompts),
            (Chip::V5p, Mixed, Bf16, [8, 2, 128], 150, prompts),
            (Chip::V5p, Mixed, Bf16, [16, 8, 128], 150, prompts),
            (Chip::V5p, Mixed, F32, [6, 3, 64], 75, prompts),
            (Chip::V6e, Mixed, Bf16, [10, 5, 80], 77, prompts),
            (Chip::V6e, Mixed, F32, [2, 1, 384], 75, prompts),
            (Chip::Tpu7x, Mixed, Bf16, [4, 2, 256], 75, prompts),
        ];
        let optional = [
            (Chip::V5e, Decode, F8E4M3Fn, Interleaved, false, [8, 2, 128], 7, rows),
            (Chip::V5p, Decode, I8, Interleaved, true, [16, 8, 128], 8, rows),
            (Chip::V6e, Decode, F8E5M2, Interleaved, true, [8, 4, 64], 90, rows),
            (Chip::V5p, Decode, Bf16, Interleaved, true, [4, 1, 128], 8, rows),
            (Chip::V5p, Mixed, I8, Interleaved, false, [8, 2, 128], 150, prompts),
            (Chip::V5p, Mixed, F8E4M3Fn, Interleaved, true, [16, 8, 128], 150, prompts),
            (Chip::V6e, Mixed, F8E5M2, Interleaved, true, [12, 4, 80], 77, prompts),
            (Chip::V5p, Mixed, Bf16, Interleaved, true, [10, 5, 64], 75, prompts),
            (Chip::V5p, Decode, Bf16, Packed, true, [8, 4, 64], 8, rows),
            (Chip::V6e, Decode, I8, Packed, false, [16, 4, 64], 90, rows),
            (Chip::V5p, Decode, Bf16, Packed, false, [32, 16, 64], 8, rows),
            (Chip::V5p, Mixed, Bf16, Packed, false, [32, 16, 64], 150, prompts),
            (Chip::V5p, Mixed, Bf16, Packed, true, [8, 4, 64], 75, prompts),
            (Chip::V6e, Mixed, F8E4M3Fn, Packed, false, [8, 4, 64], 77, prompts),
        ];
        let plain = plain.map(|(chip, kind, element, heads, tokens, batch)| {
            (chip, kind, Precision::uniform(element), Interleaved, false, heads, tokens, batch)
        });
        let optional = optional.map(|(chip, kind, kv, kv_rows, ends, heads, tokens, batch)| {
            (chip, kind, Precision { kv, ..Precision::uniform(Bf16) }, kv_rows, ends, heads, tokens, batch)
        });
        for (chip, kind, precision, kv_rows, ends, heads, tokens, batch) in plain.into_iter().chain(optional) {
            let spec = (*problem(precision.q, heads, ends.then_some(20), None)).clone();
            let spec = Spec { kind, tokens, pages: 40, max_seqs: 8, layers: 2, ..spec };
            let spec = Spec { fused: Some(Rotary::HalfSplit), precision, kv_rows, ..spec };
            let options = Spec { sinks: ends, log_sum_exp: ends, ..spec };
            let problem = Problem::new(options).unwrap();
            let tiles = Some(Tiles { queries: if kind == Mixed { 16 } else { 8 }, kv_pages: 2 });
            let plan = Plan::new(problem.clone(), chip, Options { tiles, vmem_limit: None }).unwrap();
            let lengths: Vec<_> = batch.iter().map(|&(q_len, kv_len)| Lengths { q_len, kv_len }).collect();
            let inputs = Rpa::draw(&problem, Some(&lengths), 5).unwrap();
            let checked = check_mosaic(Case::new(&plan, &inputs), 7, None);
            checked.unwrap_or_else(|error| panic!("{chip} {}: {error}", plan.describe()));
        }
    }
}
