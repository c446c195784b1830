//! The grouped matmul as a Mosaic kernel.
//!
//! Each core lists its *chunks* in SMEM first: up to [`Tiles::m`](super::plan::Tiles) rows of one expert, from a band of 16 rows
//! on, which copies begin at. Experts without rows have none, so that nothing of their weights is read. Then it walks all
//! chunks as one stream of steps, a tile of columns and a tile of the depth each:
//!
//! ```text
//! copies    w 0 | w 1 | w 2 | ...        two steps ahead, whatever chunk comes next
//!           x 0 |     | x 1 | ...        a chunk ahead, where a chunk's rows are there in all their depth
//! compute         0 |  1  |  2 | ...     blocks of rows, as many as the chunk has
//! copies                out 0 | out 1    waited for two tiles later
//! ```
//!
//! Cores share the columns: whatever the groups are, each has the same to do.
//!
//! *Bands that groups share.* A chunk writes the bands that it completes. What it has of one that goes on with the next group
//! is kept (`band`), and that group's first chunk puts its rows behind it: each band of the output is written once.
//!
//! *Rows behind a chunk's own* in its buffer are what earlier chunks left there, and yield what nobody looks at. The buffers
//! are zeroed once, so that nothing that is multiplied was never written. Rows behind the last group are written as zeros.
//!
//! Where `n` is not a whole number of tiles, the last one has fewer features than its buffer; lanes of the output behind `n`
//! are padding.

use std::iter::zip;

use pagoda_ir::{
    Element,
    mosaic::{
        Builder, Dma, DotDims, IntoOperand, MemorySpace, Precision, Ref, Semantics, Value, Window, tiling::LANES,
    },
};

use super::{
    plan::{Plan, W_BUFFERS},
    problem::{Activation, BAND, Layout, Problem},
};
use crate::kernel::Operand;

/// The sizes of the groups, with several layers the index of one; `x` in whole bands, the weights of all layers' experts, the
/// biases as f32, gates and ups apart, 128 to a row.
pub(super) fn operands(problem: &Problem) -> Vec<Operand> {
    let (layers, experts) = (problem.layers, problem.experts);
    let w = match problem.layout {
        Layout::RowMajor => [layers * experts, problem.k, problem.weight_columns()],
        Layout::WeightTransposed => [layers * experts, problem.weight_columns(), problem.k],
    };
    let layer = (layers > 1).then(|| Operand::of("layer").reshape(&[1]));
    let x = Operand::of("x").padded(&[problem.m.next_multiple_of(BAND), problem.k]);
    let features = if layers > 1 { 2 } else { 1 };
    // As f32: spreading a packed row over the rows of a block takes scratch on v4, and biases are small.
    let bias = (0..problem.products()).map(|product| {
        let half = Operand::of("bias").slice(features, product * problem.n, problem.n).cast(Element::F32);
        let lanes = problem.n.next_multiple_of(LANES);
        let whole = half.reshape(&[layers, experts, problem.n]).padded(&[layers, experts, lanes]);
        whole.reshape(&[layers, experts, lanes / LANES, LANES])
    });
    let bias = bias.filter(|_| problem.bias);
    let prefetched = [Operand::of("group_sizes")].into_iter().chain(layer);
    prefetched.chain([x, Operand::of("w").reshape(&w)]).chain(bias).collect()
}

/// The kernel of `plan`; with `sizes`, for groups of these sizes alone.
pub(super) fn write<'a>(k: &'a Builder<'a>, plan: &Plan, sizes: Option<&[i32]>) {
    Body::declare(k, plan, sizes).write();
}

struct Body<'a, 'p> {
    k: &'a Builder<'a>,
    plan: &'p Plan,
    core: Value<'a>,
    sizes: Ref<'a>,
    layer: Option<Ref<'a>>,
    /// In HBM: `[rows, k]`, `[layers * experts, k, columns]` or `[layers * experts, columns, k]`, `[rows, columns]`.
    x: Ref<'a>,
    w: Ref<'a>,
    out: Ref<'a>,
    /// One for each product: `[1, experts, columns / 128, 128]`.
    bias: Vec<Ref<'a>>,
    /// Rows of this chunk and of the next: `[2, rows, depth]`.
    x_tiles: Ref<'a>,
    /// One for each product: `[W_BUFFERS, depth, columns]` or `[W_BUFFERS, columns, depth]`.
    w_tiles: Vec<Ref<'a>>,
    /// One for each product, if the depth is walked through: `[rows, columns]`.
    sums: Vec<Ref<'a>>,
    /// `[2, rows, columns]`.
    results: Ref<'a>,
    /// The band that the next group begins in, of each of the core's tiles of columns: `[tiles, 16, columns]`.
    band: Ref<'a>,
    chunks: Chunks<'a>,
    /// Bands that the copies from `results` took.
    pending: Ref<'a>,
    x_arrived: Ref<'a>,
    w_arrived: Ref<'a>,
    sent: Ref<'a>,
}

/// The list of chunks, an array in SMEM for each number.
struct Chunks<'a> {
    expert: Ref<'a>,
    /// The first row, and one past the last.
    first: Ref<'a>,
    end: Ref<'a>,
    /// How many experts before this one have rows.
    turn: Ref<'a>,
}

/// A chunk, read.
#[derive(Clone, Copy)]
struct Chunk<'a> {
    expert: Value<'a>,
    first: Value<'a>,
    end: Value<'a>,
}

impl<'a> Chunk<'a> {
    /// The band that it begins in.
    fn band(self) -> Value<'a> {
        bands(self.first)
    }

    /// Rows from that band on to its last.
    fn rows(self) -> Value<'a> {
        self.end - self.band() * BAND
    }
}

/// Where a core is: chunk, tile of columns, tile of the depth.
type At<'a> = [Value<'a>; 3];

/// What a product is added to.
#[derive(Clone, Copy)]
enum Sum {
    /// Nothing: the first tile of the depth.
    Zero,
    /// What the tiles before made.
    Loaded,
}

impl<'a, 'p> Body<'a, 'p> {
    fn declare(k: &'a Builder<'a>, plan: &'p Plan, sizes: Option<&[i32]>) -> Self {
        let (problem, tiles) = (plan.problem(), plan.tiles());
        let shape = plan.shape();
        let [core] = k.grid([(plan.grid()[0], Semantics::Parallel)]);
        let group_sizes = k.prefetch("group_sizes", Element::I32, &[problem.experts]);
        let layer = (problem.layers > 1).then(|| k.prefetch("layer", Element::I32, &[1]));
        let (rows, columns) = (problem.m.next_multiple_of(BAND), problem.weight_columns());
        let all = problem.layers * problem.experts;
        let x = k.hbm_input("x", problem.input, &[rows, problem.k]);
        let (w, tile) = match problem.layout {
            Layout::RowMajor => ([all, problem.k, columns], [W_BUFFERS, tiles.k, tiles.n]),
            Layout::WeightTransposed => ([all, columns, problem.k], [W_BUFFERS, tiles.n, tiles.k]),
        };
        let w = k.hbm_input("w", problem.input, &w);
        let rows_of_bias = problem.n.div_ceil(LANES);
        let bias = names(problem, ["bias", "bias_gate", "bias_up"]).into_iter().filter(|_| problem.bias).map(|name| {
            let window = Window::blocks(&[1, problem.experts, rows_of_bias, LANES], move |t| {
                let layer = if problem.layers > 1 { t.prefetch(1).at(0).load().literal() } else { 0.literal() };
                [layer, 0.literal(), 0.literal(), 0.literal()]
            });
            let dims = [problem.layers, problem.experts, rows_of_bias, LANES];
            k.input(name, Element::F32, &dims, window.single_buffered())
        });
        let bias = bias.collect();
        let out = k.hbm_output("out", problem.output, &plan.output_dims());
        let scratch = |name, element, dims: &[usize]| k.scratch(name, MemorySpace::Vmem, element, dims);
        let x_tiles = scratch("x_tiles", problem.input, &[2, tiles.m, tiles.k]);
        let w_tiles = names(problem, ["w_tiles", "gate_tiles", "up_tiles"]).into_iter();
        let w_tiles = w_tiles.map(|name| scratch(name, problem.input, &tile)).collect();
        let sums = names(problem, ["sum", "sum_gate", "sum_up"]).into_iter().filter(|_| shape.depths > 1);
        let sums = sums.map(|name| scratch(name, Element::F32, &[tiles.m, tiles.n])).collect();
        let results = scratch("results", problem.output, &[2, tiles.m, tiles.n]);
        let band = scratch("band", problem.output, &[shape.columns, BAND, tiles.n]);
        let in_smem = |name, len| k.scratch(name, MemorySpace::Smem, Element::I32, &[len]);
        let [expert, first, end, turn] = ["chunk_expert", "chunk_first", "chunk_end", "chunk_turn"];
        let [expert, first, end, turn] = [expert, first, end, turn].map(|name| in_smem(name, plan.most_chunks()));
        let pending = in_smem("pending", 2);
        // Of known groups the sizes are constants, so that the compiler knows how often each loop turns.
        let sizes = sizes.map_or(group_sizes, |sizes| {
            let constants = in_smem("sizes_of_batch", sizes.len());
            sizes.iter().enumerate().for_each(|(at, &size)| constants.at(at).store(i64::from(size)));
            constants
        });
        let semaphores = |name| k.dma_semaphores(name, &[2]);
        Self {
            k,
            plan,
            core,
            sizes,
            layer,
            x,
            w,
            out,
            bias,
            x_tiles,
            w_tiles,
            sums,
            results,
            band,
            chunks: Chunks { expert, first, end, turn },
            pending,
            x_arrived: semaphores("x_arrived"),
            // Copies of one semaphore come one after another.
            w_arrived: k.dma_semaphores("w_arrived", &[problem.products(), W_BUFFERS]),
            sent: semaphores("sent"),
        }
    }

    fn write(&self) {
        let (k, shape) = (self.k, self.plan.shape());
        let [chunks, rows] = self.list();
        let start: At = [k.int(0), k.int(0), k.int(0)];
        self.zero_weights();
        let second = self.second();
        k.when(chunks.greater(0), || self.copy_w(start, k.int(0), |dma| dma.start()));
        k.when(second[0].less(chunks), || self.start_w(k.int(1), start, second));
        self.zero_x();
        [0, 1].into_iter().for_each(|slot| self.pending.at(slot).store(0));
        k.when(chunks.greater(0), || self.copy_x(start, k.int(0), |dma| dma.start()));
        k.fold_range(0, chunks * (shape.columns * shape.depths), start, |step, at| {
            let next = self.after(at);
            let later = self.after(next);
            k.when(later[0].less(chunks), || self.start_w(step + (W_BUFFERS - 1), next, later));
            self.fetch(step, at, next, chunks);
            self.compute(step, at, chunks);
            next
        });
        [0, 1].into_iter().for_each(|slot| self.reclaim(k.int(slot)));
        self.zero_rows(bands(rows + (BAND - 1)));
    }

    /// Lists the core's chunks: how many there are, and how many rows all groups have.
    fn list(&self) -> [Value<'a>; 2] {
        let (k, most) = (self.k, self.plan.tiles().m);
        let state = [k.int(0), k.int(0), k.int(0)];
        let [chunks, row, _] = k.fold_range(0, self.plan.problem().experts, state, |expert, [chunk, row, turn]| {
            let size = self.sizes.at(expert).load();
            let end = row + size;
            let [chunk, _] = k.while_loop(
                [chunk, row],
                |[_, first]| first.less(end),
                |[chunk, first]| {
                    let stop = (bands(first) * BAND + most).minimum(end);
                    self.chunks.expert.at(chunk).store(expert);
                    self.chunks.first.at(chunk).store(first);
                    self.chunks.end.at(chunk).store(stop);
                    self.chunks.turn.at(chunk).store(turn);
                    [chunk + 1, stop]
                },
            );
            [chunk, end, turn + size.minimum(1)]
        });
        [chunks, row]
    }

    fn chunk(&self, index: Value<'a>) -> Chunk<'a> {
        let Chunks { expert, first, end, .. } = &self.chunks;
        let [expert, first, end] = [expert, first, end].map(|array| array.at(index).load());
        Chunk { expert, first, end }
    }

    /// What comes after the first tile of the first chunk.
    fn second(&self) -> At<'a> {
        let shape = self.plan.shape();
        let at = match (shape.depths, shape.columns) {
            (1, 1) => [1, 0, 0],
            (1, _) => [0, 1, 0],
            _ => [0, 0, 1],
        };
        at.map(|index| self.k.int(index))
    }

    /// What comes after `at`: the next tile of the depth, of columns, or the next chunk.
    fn after(&self, [chunk, column, depth]: At<'a>) -> At<'a> {
        let shape = self.plan.shape();
        let is_deepest = depth.equals(shape.depths - 1);
        let is_last = is_deepest & column.equals(shape.columns - 1);
        [
            is_last.select(chunk + 1, chunk),
            is_deepest.select(is_last.select(0, column + 1), column),
            is_deepest.select(0, depth + 1),
        ]
    }

    /// Starts the copies of the weights of a step, which comes behind `before`: where an expert's weights stay for all its
    /// chunks, with its first.
    fn start_w(&self, step: Value<'a>, before: At<'a>, at: At<'a>) {
        let copy = || self.copy_w(at, self.slot_of_w(step, at), |dma| dma.start());
        match self.plan.shape().keeps_weights() {
            true => self.k.when(self.turn(before[0]).differs(self.turn(at[0])), copy),
            false => copy(),
        }
    }

    /// Starts the copy of the next step's rows, and waits for what this one needs.
    fn fetch(&self, step: Value<'a>, at: At<'a>, next: At<'a>, chunks: Value<'a>) {
        let (k, shape) = (self.k, self.plan.shape());
        let [[chunk, column, _], [next_chunk, ..]] = [at, next];
        let is_new = next_chunk.differs(chunk);
        k.when(next_chunk.less(chunks), || {
            let of_x = || self.copy_x(next, self.slot_of_x(step + 1, next), |dma| dma.start());
            if shape.depths == 1 { k.when(is_new, of_x) } else { of_x() }
        });
        let of_x = || self.copy_x(at, self.slot_of_x(step, at), |dma| dma.wait());
        if shape.depths == 1 {
            k.when(column.equals(0), of_x)
        } else {
            of_x()
        }
        let of_w = || self.copy_w(at, self.slot_of_w(step, at), |dma| dma.wait());
        match shape.keeps_weights() {
            true => {
                let before = (chunk - 1).maximum(0);
                k.when(chunk.equals(0) | self.turn(before).differs(self.turn(chunk)), of_w);
            }
            false => of_w(),
        }
    }

    fn turn(&self, chunk: Value<'a>) -> Value<'a> {
        self.chunks.turn.at(chunk).load()
    }

    /// The buffer of a step's rows.
    fn slot_of_x(&self, step: Value<'a>, [chunk, ..]: At<'a>) -> Value<'a> {
        if self.plan.shape().depths == 1 { chunk & 1 } else { step & 1 }
    }

    /// The buffer of a step's weights: where an expert's stay for all its chunks, one after another of the experts'.
    fn slot_of_w(&self, step: Value<'a>, [chunk, ..]: At<'a>) -> Value<'a> {
        let number = if self.plan.shape().keeps_weights() { self.turn(chunk) } else { step };
        number % W_BUFFERS
    }

    /// The copy of a chunk's rows.
    fn copy_x(&self, [chunk, _, depth]: At<'a>, slot: Value<'a>, act: impl Fn(Dma<'a>)) {
        let (problem, tiles) = (self.plan.problem(), self.plan.tiles());
        let chunk = self.chunk(chunk);
        let count = bands(chunk.end + (BAND - 1)) - chunk.band();
        let rows = by_band(&self.x, 0).slice(0, chunk.band(), tiles.m / BAND);
        let from = self.depth_of(&rows, 2, depth, problem.k);
        let to = by_band(&self.x_tiles, 1).at(slot);
        act(self.k.make_async_copy(from, to, self.x_arrived.at(slot)).first(count));
    }

    /// The copies of a step's weights.
    fn copy_w(&self, [chunk, column, depth]: At<'a>, slot: Value<'a>, act: impl Fn(Dma<'a>)) {
        let (k, problem, tiles) = (self.k, self.plan.problem(), self.plan.tiles());
        let shape = self.plan.shape();
        let expert = self.chunks.expert.at(chunk).load();
        let expert = match &self.layer {
            Some(layer) => layer.at(0).load() * problem.experts + expert,
            None => expert,
        };
        let w = self.w.at(expert);
        let column = self.column_of_device(column);
        for (product, tiles_of) in self.w_tiles.iter().enumerate() {
            let (start, to) = (product * problem.n, tiles_of.at(slot));
            let arrived = self.w_arrived.at((product, slot));
            let copy = match (problem.layout, shape.is_ragged) {
                (_, _) if shape.all_columns == 1 && problem.products() == 1 => {
                    let features = if problem.layout == Layout::RowMajor { 0 } else { 1 };
                    k.make_async_copy(self.depth_of(&w, features, depth, problem.k), to, arrived)
                }
                (Layout::RowMajor, _) => {
                    let from = w.slice(1, (column * tiles.n + start).multiple_of(LANES), tiles.n);
                    k.make_async_copy(self.depth_of(&from, 0, depth, problem.k), to, arrived)
                }
                (Layout::WeightTransposed, false) => {
                    let from = w.slice(0, (column * tiles.n + start).multiple_of(BAND), tiles.n);
                    k.make_async_copy(self.depth_of(&from, 1, depth, problem.k), to, arrived)
                }
                (Layout::WeightTransposed, true) => {
                    let first = column * (tiles.n / BAND);
                    let count = (problem.n / BAND - first).minimum(tiles.n / BAND);
                    let from = by_band(&self.w, 1).at(expert).slice(0, first + start / BAND, tiles.n / BAND);
                    let from = self.depth_of(&from, 2, depth, problem.k);
                    k.make_async_copy(from, by_band(tiles_of, 1).at(slot), arrived).first(count)
                }
            };
            act(copy);
        }
    }

    /// The step's part of the depth, dimension `dim`.
    fn depth_of(&self, of: &Ref<'a>, dim: usize, depth: Value<'a>, all: usize) -> Ref<'a> {
        let size = self.plan.tiles().k;
        if size == all { of.clone() } else { of.slice(dim, (depth * size).multiple_of(LANES), size) }
    }

    /// A core's tile of columns, counted among those of all cores.
    fn column_of_device(&self, column: Value<'a>) -> Value<'a> {
        if self.plan.grid()[0] > 1 { self.core * self.plan.shape().columns + column } else { column }
    }

    /// Zeros where the copy of the last tile of weights brings less than a buffer holds.
    fn zero_weights(&self) {
        let (tiles, shape) = (self.plan.tiles(), self.plan.shape());
        if shape.is_ragged {
            let there = self.plan.problem().n - (shape.all_columns - 1) * tiles.n;
            self.w_tiles.iter().for_each(|w_tiles| w_tiles.slice(1, there, tiles.n - there).store(0.0));
        }
    }

    /// Zeros where copies of rows bring less than a buffer holds.
    fn zero_x(&self) {
        let rows = self.plan.tiles().m;
        let zero = |band: Value<'a>| {
            let rows = (band * BAND).multiple_of(BAND);
            [0, 1].into_iter().for_each(|slot| self.x_tiles.at(slot).slice(0, rows, BAND).store(0.0));
        };
        // Blocks of one band have nothing in them but what was copied.
        if self.plan.block().rows > BAND {
            self.k.for_range(0, rows / BAND, zero);
        }
    }

    /// One step: its product, and with the last tile of the depth what follows.
    fn compute(&self, step: Value<'a>, at: At<'a>, chunks: Value<'a>) {
        let (k, depths) = (self.k, self.plan.shape().depths);
        let [index, column, depth] = at;
        let chunk = self.chunk(index);
        let slots = [self.slot_of_x(step, at), self.slot_of_w(step, at)];
        let out = match depths {
            1 => step & 1,
            _ => (index * self.plan.shape().columns + column) & 1,
        };
        let multiply = |start, finish| self.multiply(chunk, column, slots, out, start, finish);
        let finish = |start| {
            self.reclaim(out);
            multiply(start, true);
            self.send(index, chunk, column, out, chunks);
        };
        if depths == 1 {
            return finish(Sum::Zero);
        }
        k.if_else(
            depth.equals(0),
            || multiply(Sum::Zero, false),
            || match depths {
                2 => finish(Sum::Loaded),
                _ => k.if_else(depth.equals(depths - 1), || finish(Sum::Loaded), || multiply(Sum::Loaded, false)),
            },
        );
    }

    /// Adds the products of a chunk's rows, a block after another, to what `start` names, and keeps them or, with `finish`, goes
    /// on to the results.
    fn multiply(
        &self,
        chunk: Chunk<'a>,
        column: Value<'a>,
        [x, w]: [Value<'a>; 2],
        out: Value<'a>,
        start: Sum,
        finish: bool,
    ) {
        let (k, size) = (self.k, self.plan.block());
        k.for_range(0, chunk.rows().div_ceil(size.rows), |block| {
            let row = (block * size.rows).multiple_of(size.rows);
            for (lane, width) in ranges(self.plan.tiles().n, size.columns) {
                let part = |of: &Ref<'a>| of.slice(0, row, size.rows).slice(1, lane, width);
                let starts = (0..self.w_tiles.len()).map(|product| match start {
                    Sum::Zero => k.zeros(Element::F32, &[size.rows, width]),
                    Sum::Loaded => part(&self.sums[product]).load(),
                });
                let products = self.products([x, w], row, (lane, width), starts.collect());
                match finish {
                    true => {
                        let result = self.finished(chunk, column, (lane, width), products);
                        part(&self.results.at(out)).store(result);
                    }
                    false => zip(&self.sums, products).for_each(|(sum, product)| part(sum).store(product)),
                }
            }
        });
    }

    /// Each of `sums` plus the product of a block of rows with some of its tile's columns. Piece by piece of the depth, all
    /// products: what is loaded of `x` for one is held for the other, and would spill if it were all of the depth.
    fn products(
        &self,
        [x, w]: [Value<'a>; 2],
        row: Value<'a>,
        (lane, width): (usize, usize),
        sums: Vec<Value<'a>>,
    ) -> Vec<Value<'a>> {
        let (problem, block) = (self.plan.problem(), self.plan.block());
        let (features, dims) = match problem.layout {
            Layout::RowMajor => (1, DotDims::nn()),
            Layout::WeightTransposed => (0, DotDims::nt()),
        };
        let precision = if problem.input == Element::F32 { Precision::Fp32 } else { Precision::Default };
        let x = self.x_tiles.at(x).slice(0, row, block.rows);
        let sides: Vec<_> = self.w_tiles.iter().map(|tiles| tiles.at(w).slice(features, lane, width)).collect();
        ranges(self.plan.tiles().k, block.depth).fold(sums, |sums, (from, size)| {
            let added = zip(&sides, sums).map(|(side, sum)| {
                let [x, w] = [x.slice(1, from, size), side.slice(1 - features, from, size)].map(|part| part.load());
                self.k.dot_general(x, w, sum, &dims, precision)
            });
            added.collect()
        })
    }

    /// What follows the product, rounded.
    fn finished(
        &self,
        chunk: Chunk<'a>,
        column: Value<'a>,
        (lane, width): (usize, usize),
        mut products: Vec<Value<'a>>,
    ) -> Value<'a> {
        let problem = self.plan.problem();
        for (product, bias) in zip(&mut products, &self.bias) {
            *product = *product + self.bias_of(&bias.at((0, chunk.expert)), column, lane, width);
        }
        let result = match (problem.activation, &products[..]) {
            (Activation::SiluGate, &[gate, up]) => gate * gate.logistic() * up,
            (Activation::ClampedSwiglu, &[gate, up]) => {
                let gate = gate.minimum(Activation::LIMIT);
                let up = up.maximum(-Activation::LIMIT).minimum(Activation::LIMIT);
                gate * (gate * Activation::ALPHA).logistic() * (up + 1.0)
            }
            (_, products) => products[0],
        };
        result.cast(problem.output)
    }

    /// The biases of some of a tile's columns, `[1, width]`. Behind the last of them are columns that nobody looks at, and any
    /// biases do.
    fn bias_of(&self, of: &Ref<'a>, column: Value<'a>, lane: usize, width: usize) -> Value<'a> {
        let shape = self.plan.shape();
        let parts: Vec<_> = ranges(width, LANES)
            .map(|(from, width)| {
                let row = (lane + from) / LANES;
                let row = match shape.all_columns {
                    1 => row.literal(),
                    _ => {
                        let row = self.column_of_device(column) * (self.plan.tiles().n / LANES) + row;
                        if shape.is_ragged { row.minimum(of.dims()[0] - 1) } else { row }.literal()
                    }
                };
                of.slice(0, row, 1).slice(1, 0, width).load()
            })
            .collect();
        if let [all] = parts[..] { all } else { self.k.concatenate(&parts, 1) }
    }

    /// Puts what the chunk shares with its neighbours right, and sends the bands that it completes.
    fn send(&self, index: Value<'a>, chunk: Chunk<'a>, column: Value<'a>, slot: Value<'a>, chunks: Value<'a>) {
        let k = self.k;
        let (results, kept) = (self.results.at(slot), self.band.at(column));
        let before = chunk.first & (BAND - 1);
        k.when(before.greater(0), || {
            self.merge(&results.slice(0, 0, BAND), &kept, before);
        });
        let after = chunk.end & (BAND - 1);
        k.when(after.greater(0), || {
            let last = (bands(chunk.end) - chunk.band()) * BAND;
            let last = results.slice(0, last.multiple_of(BAND), BAND);
            self.cut(&last, &kept, after);
        });
        let is_last = (index + 1).equals(chunks);
        let complete = is_last.select(bands(chunk.end + (BAND - 1)), bands(chunk.end)) - chunk.band();
        self.pending.at(slot).store(complete);
        self.copy_out(chunk.band(), self.column_of_device(column), slot, complete, |dma| dma.start());
    }

    /// Rows of `of` before `row` become those of `kept`.
    fn merge(&self, of: &Ref<'a>, kept: &Ref<'a>, row: Value<'a>) {
        self.by_lanes(of, kept, |of, kept, index| of.store(selected(index.less(row), kept.load(), of.load())));
    }

    /// Rows of `of` from `row` on become zero, and all of them are kept.
    fn cut(&self, of: &Ref<'a>, kept: &Ref<'a>, row: Value<'a>) {
        self.by_lanes(of, kept, |of, kept, index| {
            let value = of.load();
            let value = selected(index.less(row), value, self.k.zeros(value.element(), &value.dims()));
            of.store(value);
            kept.store(value);
        });
    }

    /// Calls `act` with a few lanes of two bands at a time, and the index of each row.
    fn by_lanes(&self, of: &Ref<'a>, kept: &Ref<'a>, act: impl Fn(&Ref<'a>, &Ref<'a>, Value<'a>)) {
        for (lane, width) in ranges(self.plan.tiles().n, 4 * LANES) {
            let index = self.k.iota(&[BAND, width], 0);
            act(&of.slice(1, lane, width), &kept.slice(1, lane, width), index);
        }
    }

    /// The copy of the first `count` bands of a buffer of results to where they belong, from `band` on.
    fn copy_out(&self, band: Value<'a>, column: Value<'a>, slot: Value<'a>, count: Value<'a>, act: impl Fn(Dma<'a>)) {
        let tiles = self.plan.tiles();
        let to = by_band(&self.out, 0).slice(0, band, tiles.m / BAND);
        let to = match self.plan.shape().all_columns {
            1 => to,
            _ => to.slice(2, (column * tiles.n).multiple_of(LANES), tiles.n),
        };
        act(self.k.make_async_copy(by_band(&self.results, 1).at(slot), to, self.sent.at(slot)).first(count));
    }

    /// Waits for what was sent from a buffer of results.
    fn reclaim(&self, slot: Value<'a>) {
        let k = self.k;
        let pending = self.pending.at(slot).load();
        k.when(pending.greater(0), || self.copy_out(k.int(0), k.int(0), slot, pending, |dma| dma.wait()));
    }

    /// Writes zeros from `band` on.
    fn zero_rows(&self, band: Value<'a>) {
        let (k, shape, most) = (self.k, self.plan.shape(), self.plan.tiles().m / BAND);
        let all = self.plan.problem().m.div_ceil(BAND);
        k.when(band.less(all), || {
            k.for_range(0, most, |band| {
                self.results.at(0).slice(0, (band * BAND).multiple_of(BAND), BAND).store(0.0);
            });
            k.for_range(0, (k.int(all as i64) - band).div_ceil(most), |part| {
                let first = band + part * most;
                let count = (k.int(all as i64) - first).minimum(most);
                k.for_range(0, shape.columns, |column| {
                    let column = self.column_of_device(column);
                    self.copy_out(first, column, k.int(0), count, |dma| {
                        dma.start();
                        dma.wait();
                    });
                });
            });
        });
    }
}

/// One name, or two for what has gates and ups.
fn names(problem: &Problem, [one, gate, up]: [&'static str; 3]) -> Vec<&'static str> {
    if problem.activation.is_gated() { vec![gate, up] } else { vec![one] }
}

/// Whole bands before a row.
fn bands(row: Value<'_>) -> Value<'_> {
    row.shift_right_logical(BAND.ilog2() as usize)
}

/// Dimension `dim`, the one before the last, as bands of rows.
fn by_band<'a>(of: &Ref<'a>, dim: usize) -> Ref<'a> {
    let mut dims = of.dims();
    dims[dim] /= BAND;
    dims.insert(dim + 1, BAND);
    of.reshape(&dims)
}

/// One or the other of two tiles; narrow elements have no selects of their own on older chips.
fn selected<'a>(condition: Value<'a>, then: Value<'a>, otherwise: Value<'a>) -> Value<'a> {
    let element = then.element();
    condition.select(then.cast(Element::F32), otherwise.cast(Element::F32)).cast(element)
}

/// (start, size) of the parts of at most `step` that make up `size`.
fn ranges(size: usize, step: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..size).step_by(step).map(move |start| (start, step.min(size - start)))
}
