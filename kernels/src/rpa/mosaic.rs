//! Ragged paged attention as a Mosaic kernel.
//!
//! Grid: blocks of KV heads (`parallel`) by blocks of query rows. A step goes through the sequences that have rows in its
//! block, and through the KV blocks that those rows see; pages come in by copies of the kernel's own, double-buffered.
//! Rows of other sequences are masked: they add nothing to their running sums.
//!
//! Online softmax (Milakov and Gimelshein, 2018) with maximum, sum and accumulator in f32. The query heads of a group are
//! one matrix product with their KV head. In bf16 a 32-bit word of a page holds an element of K (low half) and of V (high
//! half) of the same head, so one strided load brings both.
//!
//! Poison: logits are selected by position *after* the product, values *before* it (zero times NaN is NaN). Rows that
//! belong to no sequence are written as zeros.

use pagoda_ir::{
    Context, Element, HostTensor, Result,
    mosaic::{self, Builder, DotDims, Kernel, MemorySpace, Precision, Ref, Semantics, Value, Window},
    stablehlo::{self, Module, Tensor},
};

use super::{Inputs, Problem, batch::Batch, plan::Plan};

const LANES: usize = 128;
/// Stands for minus infinity where two of them may be subtracted.
const MASKED: f64 = -1e30;

/// The Mosaic kernel that `plan` describes. Inputs: `kv_lens`, `page_indices`, `cu_q_lens`, `num_seqs`, with several
/// layers `first_page [1]`, then `q` and `kv_pages`.
///
/// # Errors
/// None for a legal plan, unless MLIR fails.
pub fn kernel<'c>(context: &'c Context, plan: &Plan) -> Result<Kernel<'c>> {
    mosaic::kernel(context, &plan.name(), |k| Body::declare(k, plan, None).write())
}

/// As [`kernel`], with the lengths of one batch as constants: the compiler then knows how often each loop turns, and its
/// static estimate speaks for this batch. The operands are the same; of the metadata, only `page_indices` are read.
///
/// # Errors
/// As [`kernel`].
pub fn kernel_of_batch<'c>(context: &'c Context, plan: &Plan, batch: &Batch) -> Result<Kernel<'c>> {
    mosaic::kernel(context, &plan.name(), |k| Body::declare(k, plan, Some(batch)).write())
}

/// Calls the kernel on the problem's arguments, in the order of
/// [`Problem::argument_types`](super::Problem::argument_types).
///
/// # Errors
/// When the operands are not those of the problem.
pub fn call<'c, 'a>(
    b: &stablehlo::Builder<'c, 'a>,
    kernel: &Kernel,
    args: &[Tensor<'c, 'a>],
) -> Result<Tensor<'c, 'a>> {
    let mut operands = args[2..6].to_vec();
    if let Some(&first_page) = args.get(6) {
        operands.push(b.reshape(first_page, &[1])?);
    }
    operands.extend(&args[..2]);
    Ok(kernel.call(b, &operands)?[0])
}

/// The arrays that [`call`] gives the kernel, made on the host.
pub fn operands(problem: &Problem, inputs: &Inputs) -> Vec<HostTensor> {
    let mut operands = inputs.batch.to_tensors().to_vec();
    if problem.layers > 1 {
        operands.push(HostTensor::new(&[1], &[(inputs.layer * problem.pages) as i32]));
    }
    operands.extend([inputs.q.clone(), inputs.kv_pages.clone()]);
    operands
}

/// A StableHLO module whose `main` takes the problem's arguments and runs the kernel on them.
///
/// # Errors
/// As [`kernel`].
pub fn module<'c>(context: &'c Context, plan: &Plan) -> Result<Module<'c>> {
    module_of(context, plan, &kernel(context, plan)?)
}

/// A StableHLO module whose `main` takes the problem's arguments and runs `kernel`, made of `plan`, on them.
///
/// # Errors
/// None, unless MLIR fails.
pub fn module_of<'c>(context: &'c Context, plan: &Plan, kernel: &Kernel) -> Result<Module<'c>> {
    let module = Module::new(context, "rpa");
    module.function("main", &plan.problem().argument_types(), |b, args| Ok(vec![call(b, kernel, args)?]))?;
    Ok(module)
}

struct Body<'a, 'p> {
    k: &'a Builder<'a>,
    plan: &'p Plan,
    /// The batch, if the kernel is for one only.
    batch: Option<&'p Batch>,
    head_step: Value<'a>,
    query_step: Value<'a>,
    kv_lens: Ref<'a>,
    page_indices: Ref<'a>,
    cu_q_lens: Ref<'a>,
    num_seqs: Ref<'a>,
    first_page: Option<Ref<'a>>,
    q: Ref<'a>,
    kv_pages: Ref<'a>,
    out: Ref<'a>,
    /// Two KV blocks, one after the other.
    kv: Ref<'a>,
    /// The block's queries by head.
    queries: Ref<'a>,
    /// A block of q or of the output as f32: rows of one group start anywhere in a packed tile.
    staging: Ref<'a>,
    max: Ref<'a>,
    sum: Ref<'a>,
    acc: Ref<'a>,
    arrived: Ref<'a>,
}

/// The rows of one sequence in a block.
#[derive(Clone, Copy)]
struct Rows<'a> {
    sequence: Value<'a>,
    kv_len: Value<'a>,
    /// First and one past the last row, counted in the block.
    first: Value<'a>,
    end: Value<'a>,
    /// Position of the block's row 0, if it belonged to the sequence.
    origin: Value<'a>,
}

impl<'a, 'p> Body<'a, 'p> {
    fn declare(k: &'a Builder<'a>, plan: &'p Plan, batch: Option<&'p Batch>) -> Self {
        let problem = plan.problem();
        let (element, dim, heads) = (problem.element, problem.head_dim, plan.head_block());
        let [head_steps, query_steps] = plan.grid();
        let [head_step, query_step] = k.grid([(head_steps, Semantics::Parallel), (query_steps, Semantics::Arbitrary)]);
        let scalars = |name, dims: &[usize]| k.prefetch(name, Element::I32, dims);
        let kv_lens = scalars("kv_lens", &[problem.max_seqs]);
        let page_indices = scalars("page_indices", &[problem.max_seqs, problem.pages_per_seq]);
        let cu_q_lens = scalars("cu_q_lens", &[problem.max_seqs + 1]);
        let num_seqs = scalars("num_seqs", &[1]);
        let first_page = (problem.layers > 1).then(|| scalars("first_page", &[1]));
        let block = [plan.tiles().queries, heads * problem.group(), dim];
        let window = || Window::blocks(&block, |t| (t.grid(1), t.grid(0), 0));
        let q = k.input("q", element, &problem.q_type().dims, window());
        let kv_pages = k.hbm_input("kv_pages", element, &problem.kv_pages_type().dims);
        let out = k.output("out", element, &problem.q_type().dims, window());
        let scratch = |name, element, dims: &[usize]| k.scratch(name, MemorySpace::Vmem, element, dims);
        let rows = plan.rows();
        let kv = scratch("kv", element, &[2 * plan.keys(), 2 * heads, dim]);
        let queries = scratch("queries", element, &[heads, rows, dim]);
        let staging = scratch("staging", Element::F32, &block);
        let max = scratch("max", Element::F32, &[heads, rows, LANES]);
        let sum = scratch("sum", Element::F32, &[heads, rows, LANES]);
        let acc = scratch("acc", Element::F32, &[heads, rows, dim]);
        let arrived = k.dma_semaphores("arrived", &[2]);
        k.vmem_limit(plan.limit().0 as usize);
        Self {
            k,
            plan,
            batch,
            head_step,
            query_step,
            kv_lens,
            page_indices,
            cu_q_lens,
            num_seqs,
            first_page,
            q,
            kv_pages,
            out,
            kv,
            queries,
            staging,
            max,
            sum,
            acc,
            arrived,
        }
    }

    fn write(&self) {
        let (k, block) = (self.k, self.plan.tiles().queries);
        self.begin();
        let block_start = self.query_step * block;
        let [kv_lens, cu_q_lens, num_seqs] = [Batch::kv_lens, Batch::cu_q_lens, Batch::num_seqs];
        k.for_range(0, self.scalar(&self.num_seqs, num_seqs, k.int(0)), |sequence| {
            let start = self.scalar(&self.cu_q_lens, cu_q_lens, sequence);
            let stop = self.scalar(&self.cu_q_lens, cu_q_lens, sequence + 1);
            let first = (start - block_start).maximum(0);
            let end = (stop - block_start).minimum(block);
            k.when(first.less(end), || {
                let kv_len = self.scalar(&self.kv_lens, kv_lens, sequence);
                let origin = kv_len - stop + block_start;
                self.attend(Rows { sequence, kv_len, first, end, origin });
            });
        });
        self.finish();
    }

    /// A number of the metadata: read, or the batch's own.
    fn scalar(&self, array: &Ref<'a>, of: fn(&Batch) -> &[i32], index: Value<'a>) -> Value<'a> {
        let Some(batch) = self.batch else { return array.at(index).load() };
        let numbers = of(batch);
        let changes = (1..numbers.len()).filter(|&at| numbers[at] != numbers[at - 1]);
        changes.fold(self.k.int(numbers[0].into()), |number, at| {
            index.greater_equal(at).select(self.k.int(numbers[at].into()), number)
        })
    }

    /// Queries by head; nothing seen yet.
    fn begin(&self) {
        let (group, rows, dim) = (self.plan.problem().group(), self.plan.rows(), self.plan.problem().head_dim);
        self.staging.store(self.q.load().cast(Element::F32));
        for head in 0..self.plan.head_block() {
            let queries = self.staging.slice(1, head * group, group).load().reshape(&[rows, dim]);
            self.queries.at(head).store(queries.cast(self.plan.problem().element));
            self.max.at(head).store(MASKED);
            self.sum.at(head).store(0.0);
            self.acc.at(head).store(0.0);
        }
    }

    /// Divides, and stores the block. Rows that saw no key are zeros.
    fn finish(&self) {
        let problem = self.plan.problem();
        let group = problem.group();
        let block = [self.plan.tiles().queries, group, problem.head_dim];
        for head in 0..self.plan.head_block() {
            let sum = column(self.sum.at(head).load());
            let result = sum.greater(0.0).select(self.acc.at(head).load() / sum, 0.0);
            self.staging.slice(1, head * group, group).store(result.reshape(&block));
        }
        self.out.store(self.staging.load().cast(problem.element));
    }

    /// Lets the rows of one sequence see their keys.
    fn attend(&self, rows: Rows<'a>) {
        let (k, keys) = (self.k, self.plan.keys());
        let end = (rows.origin + rows.end).div_ceil(keys);
        let begin = match self.plan.problem().sliding_window {
            None => k.int(0),
            Some(window) => (rows.origin + rows.first - (window as i64 - 1)).maximum(0) / keys,
        };
        self.pages(&rows, begin, k.int(0), |copy| copy.start());
        k.for_range(begin, end, |block| {
            let slot = (block - begin) % 2;
            k.when((block + 1).less(end), || self.pages(&rows, block + 1, 1 - slot, |copy| copy.start()));
            self.pages(&rows, block, slot, |copy| copy.wait());
            let seen = self.seen(&rows, block);
            for head in 0..self.plan.head_block() {
                self.update(head, &rows, block, slot, seen);
            }
        });
    }

    /// The copies of KV block `block` into buffer `slot`. Beyond the sequence's last page they repeat it, so that every
    /// wait has its copy and all of the buffer is written.
    fn pages(&self, rows: &Rows<'a>, block: Value<'a>, slot: Value<'a>, act: impl Fn(mosaic::Copy<'a>)) {
        let (problem, pages, heads) = (self.plan.problem(), self.plan.tiles().kv_pages, self.plan.head_block());
        let last = (rows.kv_len - 1) / problem.page_size;
        for page in 0..pages {
            let index = self.page_indices.at((rows.sequence, (block * pages + page).minimum(last))).load();
            let index = match &self.first_page {
                Some(first) => index + first.at(0).load(),
                None => index,
            };
            let mut source = self.kv_pages.at(index);
            if heads < problem.kv_heads {
                source = source.slice(1, (self.head_step * (2 * heads)).multiple_of(2 * heads), 2 * heads);
            }
            let start = slot * self.plan.keys() + page * problem.page_size;
            let destination = self.kv.slice(0, start, problem.page_size);
            act(self.k.make_async_copy(source, destination, self.arrived.at(slot)));
        }
    }

    /// Which of a block's keys each row sees: `[rows, keys]`.
    fn seen(&self, rows: &Rows<'a>, block: Value<'a>) -> Value<'a> {
        let k = self.k;
        let dims = [self.plan.rows(), self.plan.keys()];
        let row = quotient(k.iota(&dims, 0), self.plan.problem().group());
        let key = k.iota(&dims, 1) + block * self.plan.keys();
        let position = row + rows.origin;
        let mut seen = row.greater_equal(rows.first) & row.less(rows.end) & key.less_equal(position);
        if let Some(window) = self.plan.problem().sliding_window {
            seen = seen & key.greater(position - window);
        }
        seen
    }

    /// K and V of one head of the block in `slot`: `[keys, head_dim]` each, V zero beyond the sequence.
    fn keys_and_values(&self, head: usize, rows: &Rows<'a>, block: Value<'a>, slot: Value<'a>) -> [Value<'a>; 2] {
        let (k, problem, keys) = (self.k, self.plan.problem(), self.plan.keys());
        let (heads, dim) = (self.plan.head_block(), problem.head_dim);
        // `of` has `per_key` rows per key, of which one is wanted. Strided loads are of one tile's lanes.
        let strided = |of: &Ref<'a>, per_key: usize, offset: usize| {
            let load = |slot: usize| match dim > LANES {
                true => of.slice(0, slot * keys, keys).slice(1, offset, 1).load().reshape(&[keys, dim]),
                false => {
                    let flat = if of.dims().len() == 2 { of.clone() } else { of.reshape(&[2 * keys * per_key, dim]) };
                    flat.strided(0, slot * keys * per_key + offset, keys, per_key).load()
                }
            };
            k.if_else(slot.equals(0), || load(0), || load(1))
        };
        let [key, value] = match problem.element {
            Element::F32 => [0, 1].map(|half| strided(&self.kv, 2 * heads, 2 * head + half)),
            _ => {
                let words = match dim > LANES {
                    true => self.kv.bitcast(Element::I32),
                    false => self.kv.reshape(&[4 * keys * heads, dim]).bitcast(Element::I32),
                };
                let words = strided(&words, heads, head);
                [words << 16, words & -65536].map(|half| half.bitcast(Element::F32))
            }
        };
        let live = (k.iota(&[keys, dim], 0) + block * keys).less(rows.kv_len);
        [key, live.select(value, 0.0)].map(|half| half.cast(problem.element))
    }

    /// One head's step of the online softmax.
    fn update(&self, head: usize, rows: &Rows<'a>, block: Value<'a>, slot: Value<'a>, seen: Value<'a>) {
        let (k, problem) = (self.k, self.plan.problem());
        let precision = match problem.element {
            Element::F32 => Precision::Fp32,
            _ => Precision::Default,
        };
        let [key, value] = self.keys_and_values(head, rows, block, slot);
        let dims = [self.plan.rows(), self.plan.keys()];
        let zeros = k.zeros(Element::F32, &dims);
        let mut logits =
            k.dot_general(self.queries.at(head).load(), key, zeros, &DotDims::nt(), precision) * problem.scale;
        if let Some(cap) = problem.soft_cap {
            logits = (logits * (1.0 / cap)).tanh() * cap;
        }
        let logits = seen.select(logits, MASKED);

        let [max, sum, acc] = [&self.max, &self.sum, &self.acc].map(|of| of.at(head));
        let old = column(max.load());
        let new = old.maximum(logits.max(1));
        let fade = (old - new).exp();
        let weights = seen.select((logits - new).exp(), 0.0);
        let lanes = [self.plan.rows(), LANES];
        max.store(new.broadcast_to(&lanes));
        sum.store((fade * column(sum.load()) + weights.sum(1)).broadcast_to(&lanes));
        let faded = acc.load() * fade;
        acc.store(k.dot_general(weights.cast(problem.element), value, faded, &DotDims::nn(), precision));
    }
}

/// The first column of a tile whose columns are all the same.
fn column(tile: Value<'_>) -> Value<'_> {
    let rows = tile.dims()[0];
    tile.slice(&[0, 0], &[rows, 1])
}

/// `index / divisor`, elementwise, for small non-negative indices: vectors have no integer division.
fn quotient(index: Value<'_>, divisor: usize) -> Value<'_> {
    match divisor {
        1 => index,
        _ if divisor.is_power_of_two() => index >> divisor.trailing_zeros(),
        // Half a step from every edge: exact for indices below 2^20.
        _ => ((index.cast(Element::F32) + 0.5) * (1.0 / divisor as f64)).floor().cast(Element::I32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        MosaicCase, check_mosaic,
        chips::Chip,
        rpa::{
            Kind, Problem, Spec,
            plan::{Options, Tiles},
        },
        strategies::rpa_inputs_of,
    };

    fn problem(element: Element, heads: [usize; 3], sliding_window: Option<usize>, soft_cap: Option<f64>) -> Problem {
        let [q_heads, kv_heads, head_dim] = heads;
        let scale = (head_dim as f64).powf(-0.5);
        Problem::new(Spec {
            kind: Kind::Mixed,
            element,
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
        })
        .unwrap()
    }

    /// Decode rows, a whole prompt and a chunk in one launch, under every order of copies.
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
            let problem = problem(element, heads, window, cap);
            let tiles = Some(Tiles { queries: 8, kv_pages: 2 });
            let plan = Plan::new(problem.clone(), Chip::V5p, Options { tiles, vmem_limit: None }).unwrap();
            let inputs = rpa_inputs_of(&problem, &[(1, 60), (0, 5), (13, 13), (9, 41)], 5);
            check_mosaic(MosaicCase::Rpa(&plan, &inputs), 7, None).unwrap_or_else(|error| panic!("{heads:?}: {error}"));
        }
    }
}
