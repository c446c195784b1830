//! The arithmetic of attention: query rows of one sequence that share a KV head meet its keys and values block by block.
//!
//! Keys, values and queries are f32 in registers, whatever is stored. Blocks of keys begin at multiples of [`KEY_BLOCK`], and
//! every sum has one order, so that a row's bits depend neither on the rows that it is taken with nor on the threads. A key
//! that none of these rows sees is not read.
//!
//! A few queries meet keys as they lie. For many, a block's keys are turned, so that sixteen of them are the lanes of a
//! register ([`chains`]): a logit is a sum of few products, and without that its lanes' sum would cost more than they do.

use super::{Call, Layer, Row};
use crate::{
    float::{Float, exp},
    rpa::{
        cached::Cached,
        kv_layout::{Half, KvLayout},
    },
    simd::{
        self, Isa, LANES, Product, Register, Task,
        chains::{self, chain},
    },
    threads::{self, Threads},
};

/// Keys of one step of the online softmax.
const KEY_BLOCK: usize = 64;
/// Queries that meet a block of keys together, where a group of heads is not more already: as many as leave enough jobs, from
/// the first number to the second.
const QUERIES: [usize; 2] = [12, 48];
/// Jobs for each thread that are enough, and pieces in which they are handed out.
const JOBS: usize = 8;
/// Queries from which on it pays to turn a block's keys.
const TURNED: usize = 24;
/// Multiply-adds that are worth a second thread.
const THREADED_WORK: usize = 1 << 17;
/// Registers of an accumulator that are summed into at a time.
const TOGETHER: usize = 4;
/// Queries that meet registers of turned keys together are a divisor of this, and registers this at most.
const ROWS: usize = 6;
const MOST_TURNED: usize = 2;

/// Attends; `q` and `out` are `[tokens, q_heads, head_dim]`, `lse` is `[tokens, q_heads]`; 0 in rows of padding and in rows
/// that see nothing.
///
/// # Panics
/// When slices do not have the sizes that the shapes give, or metadata points outside of them.
pub fn attend<T: Float, C: Cached>(
    call: &Call<'_>,
    q: &[T],
    kv_pages: &[C::Code],
    out: &mut [T],
    lse: Option<&mut [f32]>,
    threads: &dyn Threads,
) {
    let KvLayout { heads: kv_heads, head_dim, .. } = call.layer.kv;
    let width = call.group() * head_dim;
    assert!(width > 0 && call.q_heads.is_multiple_of(kv_heads) && out.len() == q.len());
    out.fill(T::narrow(0.0));
    let rows = call.rows();
    let work: usize = rows.iter().map(|row| 2 * kv_heads * width * (row.position + 1)).sum();
    // Every row and KV head owns its part of the output, so they can go to whichever thread is free.
    let mut parts: Vec<Option<&mut [T]>> = out.chunks_exact_mut(width).map(Some).collect();
    let mut sums: Vec<Option<&mut [f32]>> = Vec::new();
    if let Some(lse) = lse {
        lse.fill(0.0);
        sums.extend(lse.chunks_exact_mut(call.group()).map(Some));
    }
    let workers = if work < THREADED_WORK { 1 } else { threads.count() };
    let most = match workers {
        1 => QUERIES[1],
        _ => rows.len() * call.q_heads / (JOBS * workers),
    };
    let most = (most.clamp(QUERIES[0], QUERIES[1]) / call.group()).max(1);
    let blocks = rows.chunk_by(|one, next| one.sequence == next.sequence);
    let blocks = blocks.flat_map(|rows| rows.chunks(most));
    let jobs = blocks.flat_map(|rows| (0..kv_heads).map(move |head| (rows, head)));
    let mut jobs: Vec<Job<'_, T, C>> = jobs
        .map(|(rows, head)| {
            let members = rows.iter().map(|&row| {
                let part = row.token * kv_heads + head;
                let out = parts[part].take().expect("rows of sequences do not overlap");
                let lse = sums.get_mut(part).and_then(Option::take).unwrap_or_default();
                Member { row, q: &q[part * width..][..width], out, lse }
            });
            Job { call, kv_pages, head, members: members.collect() }
        })
        .collect();
    if workers == 1 {
        return attend_all(&mut jobs);
    }
    // Rows of one sequence grow with their position: many small pieces even out.
    let pieces = jobs.len().min(JOBS * workers);
    let (mut jobs, mut lists) = (jobs.into_iter(), Vec::with_capacity(pieces));
    for piece in (1..=pieces).rev() {
        let count = jobs.len().div_ceil(piece);
        lists.push(jobs.by_ref().take(count).collect::<Vec<_>>());
    }
    threads::for_each(threads, lists, |mut jobs| attend_all(&mut jobs));
}

/// Rows of one sequence, one after the other, and a KV head with its group of query heads.
struct Job<'j, T, C: Cached> {
    call: &'j Call<'j>,
    kv_pages: &'j [C::Code],
    head: usize,
    members: Vec<Member<'j, T>>,
}

/// One of the rows.
struct Member<'j, T> {
    row: Row,
    /// `[group, head_dim]`
    q: &'j [T],
    /// `[group, head_dim]`
    out: &'j mut [T],
    /// `[group]`, or empty.
    lse: &'j mut [f32],
}

/// Buffers of one thread, each `[queries, ...]`.
struct Scratch {
    /// Scaled queries, `[queries, steps]`.
    plain: Vec<Register>,
    /// The same, packed: by groups of columns, each `[steps, columns]`, or for turned keys by groups of rows, as
    /// [`chains::multiply`] takes them.
    q: Vec<Register>,
    /// `[queries, steps]`
    acc: Vec<Register>,
    /// Logits of one block, then weights.
    logits: Vec<[f32; KEY_BLOCK]>,
    /// The keys that each sees: the first, and the one behind the last.
    seen: Vec<[usize; 2]>,
    max: Vec<f32>,
    sum: Vec<f32>,
    /// What the accumulators so far are multiplied by.
    rescale: Vec<f32>,
    /// Keys, then values of a block in f32, where they are not read as they lie: `[2, KEY_BLOCK, steps]`.
    wide: Vec<Register>,
    /// The keys that are multiplied together, in the lanes: `[chains, steps, registers]`.
    turned: Vec<Register>,
}

/// Jobs, one after the other.
fn attend_all<T: Float, C: Cached>(jobs: &mut [Job<'_, T, C>]) {
    let Some(call) = jobs.first().map(|job| job.call) else { return };
    let group = call.group();
    // Whole groups of rows, where keys are turned.
    let most = jobs.iter().map(|job| job.members.len() * group).max().unwrap_or(0).next_multiple_of(ROWS);
    let steps = call.layer.kv.head_dim.div_ceil(LANES);
    let registers = |count: usize| vec![Register::ZERO; count];
    let mut scratch = Scratch {
        plain: registers(most * steps),
        q: registers(most * steps),
        acc: registers(most * steps),
        logits: vec![[0.0; KEY_BLOCK]; most],
        seen: vec![[0; 2]; most],
        max: vec![0.0; most],
        sum: vec![0.0; most],
        rescale: vec![0.0; most],
        wide: registers(2 * KEY_BLOCK * steps),
        turned: registers(MOST_TURNED * LANES * steps),
    };
    jobs.iter_mut().for_each(|job| job.run(&mut scratch));
}

/// Where the vectors of a block's keys begin: of whole registers, and whoever has them keeps what they point to alive.
type Vectors = [*const f32; KEY_BLOCK];

/// The keys and values of the block that begins at the first number, from the second to the third.
type Fetch<'f> = dyn FnMut(usize, usize, usize, &mut [Register]) -> [Vectors; 2] + 'f;

/// The arithmetic of a job, the same for all types.
struct Work<'w, 'f> {
    scratch: &'w mut Scratch,
    queries: usize,
    steps: usize,
    /// Whether keys are turned.
    turned: bool,
    soft_cap: Option<f32>,
    /// Yields vectors of `steps` registers that stay readable.
    fetch: &'w mut Fetch<'f>,
}

impl Work<'_, '_> {
    /// Not generic, so that it is compiled once.
    fn run(self) {
        simd::with_f32(self);
    }
}

impl Task<f32> for Work<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<P: Product<Element = f32>>(self, p: P) {
        let Self { scratch, queries, steps, turned, soft_cap, fetch } = self;
        match (turned, P::Isa::FEW) {
            (true, 1) => pack_rows::<3>(scratch, queries, steps),
            (true, _) => pack_rows::<6>(scratch, queries, steps),
            (false, _) => pack_columns::<P>(scratch, queries, steps),
        }
        scratch.acc[..queries * steps].fill(Register::ZERO);
        scratch.max[..queries].fill(f32::NEG_INFINITY);
        scratch.sum[..queries].fill(0.0);
        let (start, end) = (scratch.seen[0][0], scratch.seen[queries - 1][1]);
        for block in (start / KEY_BLOCK * KEY_BLOCK..end).step_by(KEY_BLOCK) {
            let (from, to) = (start.max(block), end.min(block + KEY_BLOCK));
            let [keys, values] = fetch(block, from, to, &mut scratch.wide);
            let live = [from - block, to - block];
            // SAFETY: the vectors of live keys are readable, `steps` registers each.
            unsafe {
                match (turned, P::Isa::FEW) {
                    (true, 1) => turned_logits::<P, 3, 1>(p, scratch, queries, steps, &keys, live),
                    (true, _) => turned_logits::<P, 6, 2>(p, scratch, queries, steps, &keys, live),
                    (false, 1) => logits::<P, 2>(p, scratch, queries, steps, &keys, live),
                    (false, _) => logits::<P, 4>(p, scratch, queries, steps, &keys, live),
                }
            }
            for query in 0..queries {
                let seen = scratch.seen[query];
                let [start, end] = [seen[0].clamp(block, block + KEY_BLOCK), seen[1].clamp(block, block + KEY_BLOCK)];
                weights(p.isa(), scratch, query, [start - block, end - block], soft_cap);
            }
            // SAFETY: as above.
            unsafe {
                match (turned, P::Isa::FEW) {
                    (true, 1) => accumulate::<P, 6, 1>(p, scratch, queries, steps, &values, live),
                    (false, 1) => accumulate::<P, 2, 2>(p, scratch, queries, steps, &values, live),
                    _ => accumulate::<P, 4, TOGETHER>(p, scratch, queries, steps, &values, live),
                }
            }
        }
    }
}

impl<T: Float, C: Cached> Job<'_, T, C> {
    /// The keys that a row sees: up to itself, within the window.
    fn seen(&self, row: &Row) -> [usize; 2] {
        let end = row.position + 1;
        [self.call.sliding_window.map_or(0, |window| end.saturating_sub(window)), end]
    }

    fn run(&mut self, scratch: &mut Scratch) {
        let call = self.call;
        let (group, dim) = (call.group(), call.layer.kv.head_dim);
        let (queries, steps) = (self.members.len() * group, dim.div_ceil(LANES));
        let scale = call.scale * call.factor(Half::Key, self.head);
        for query in 0..queries {
            let member = &self.members[query / group];
            scratch.seen[query] = self.seen(&member.row);
            let vector = &member.q[query % group * dim..][..dim];
            for (register, part) in scratch.plain[query * steps..].iter_mut().zip(vector.chunks(LANES)) {
                *register = Register::ZERO;
                register.0.iter_mut().zip(part).for_each(|(wide, q)| *wide = q.widen() * scale);
            }
        }
        let (job, turned) = (&*self, queries >= TURNED);
        let mut fetch = |block, from, to, wide: &mut [Register]| {
            simd::with_f32(Block { job, block, from, to, steps, turned, wide })
        };
        Work { scratch, queries, steps, turned, soft_cap: call.soft_cap, fetch: &mut fetch }.run();
        self.finish(scratch, steps);
    }

    /// Divides by the sums.
    fn finish(&mut self, scratch: &Scratch, steps: usize) {
        let (call, group, dim) = (self.call, self.call.group(), self.call.layer.kv.head_dim);
        let factor = call.factor(Half::Value, self.head);
        for (index, member) in self.members.iter_mut().enumerate() {
            for (at, out) in member.out.chunks_exact_mut(dim).enumerate() {
                let query = index * group + at;
                let (mut max, mut sum, mut factor) = (scratch.max[query], scratch.sum[query], factor);
                if let Some(sinks) = call.sinks {
                    let sink = sinks[self.head * group + at];
                    let rescale = exp(max - max.max(sink));
                    max = max.max(sink);
                    sum = sum * rescale + exp(sink - max);
                    factor *= rescale;
                }
                let acc = &scratch.acc[query * steps..][..steps];
                for (out, acc) in out.chunks_mut(LANES).zip(acc) {
                    for (out, acc) in out.iter_mut().zip(acc.0) {
                        *out = T::narrow(factor * acc / sum);
                    }
                }
                if let Some(lse) = member.lse.get_mut(at) {
                    *lse = max + sum.ln();
                }
            }
        }
    }
}

/// The keys and values of the block that begins at `block`, from key `from` to key `to`, as whole registers of f32: as they lie,
/// or in `wide`.
struct Block<'b, 'j, T, C: Cached> {
    job: &'b Job<'j, T, C>,
    block: usize,
    from: usize,
    to: usize,
    steps: usize,
    /// Whether keys are turned, as many queries meet them.
    turned: bool,
    wide: &'b mut [Register],
}

impl<T: Float, C: Cached> Task<f32> for Block<'_, '_, T, C> {
    type Output = [Vectors; 2];

    #[inline(always)]
    fn run<P: Product<Element = f32>>(self, _: P) -> [Vectors; 2] {
        let Self { job, block, from, to, steps, turned, wide } = self;
        let Layer { first_page, kv } = job.call.layer;
        let (page_size, dim, filled) = (kv.page_size, kv.head_dim, steps * LANES);
        let table = &job.call.page_indices[job.members[0].row.sequence * job.call.pages_per_seq..];
        let table = &table[..job.call.pages_per_seq];
        let offsets = [Half::Key, Half::Value].map(|half| kv.offset(job.head, half));
        let mut vectors = [[std::ptr::null(); KEY_BLOCK]; 2];
        assert!(wide.len() >= 2 * KEY_BLOCK * steps);
        let wide = wide.as_mut_ptr().cast::<f32>();
        let mut key = from;
        while key < to {
            let (page, first) = (first_page + table[key / page_size] as usize, key % page_size);
            for slot in first..page_size.min(first + to - key) {
                let token = &job.kv_pages[kv.token(page, slot)];
                let at = key - block;
                for (half, offset) in offsets.into_iter().enumerate() {
                    // SAFETY: there is room for `filled` floats of each key and value.
                    let place = unsafe { wide.add((half * KEY_BLOCK + at) * filled) };
                    // SAFETY: as above, and `dim` of them are within `filled`.
                    let floats = unsafe { std::slice::from_raw_parts_mut(place, dim) };
                    let vector = C::vector(&token[offset..][..dim], floats).as_ptr();
                    let stays = dim == filled && (!turned || half == Half::Key as usize);
                    vectors[half][at] = if stays || std::ptr::eq(vector, place) {
                        vector
                    } else {
                        // As it lies, but not of whole registers, or of values that many queries meet: tokens that lie a power
                        // of two apart would share few places of the cache.
                        // SAFETY: the vector is not in the buffer.
                        unsafe { std::ptr::copy_nonoverlapping(vector, place, dim) };
                        place.cast_const()
                    };
                }
                key += 1;
            }
        }
        vectors
    }
}

/// Queries, packed for keys as they lie.
#[inline(always)]
fn pack_columns<P: Product>(scratch: &mut Scratch, queries: usize, steps: usize) {
    for query in 0..queries {
        // Its group of columns, and its place there.
        let first = query / P::Isa::COLUMNS * P::Isa::COLUMNS;
        let columns = P::Isa::COLUMNS.min(queries - first);
        for step in 0..steps {
            scratch.q[first * steps + step * columns + query - first] = scratch.plain[query * steps + step];
        }
    }
}

/// Queries, packed for turned keys: by groups of `R`, each `[chains, steps, R]`. What is behind the last one stays as it is, and
/// yields logits that nobody reads.
#[inline(always)]
fn pack_rows<const R: usize>(scratch: &mut Scratch, queries: usize, steps: usize) {
    let of_group = R * steps;
    for query in 0..queries {
        let packed = &mut scratch.q[query / R * of_group..][..of_group];
        for (step, register) in scratch.plain[query * steps..][..steps].iter().enumerate() {
            for (lane, &q) in register.0.iter().enumerate() {
                let at = (chain(lane) * steps + step) * R + query % R;
                packed[at / LANES].0[at % LANES] = q;
            }
        }
    }
}

/// Of the logits of a block, the weights of the keys that a query sees, and zeros.
#[inline(always)]
fn weights<I: Isa>(isa: I, scratch: &mut Scratch, query: usize, [start, end]: [usize; 2], soft_cap: Option<f32>) {
    let logits = &mut scratch.logits[query];
    if start >= end {
        logits.fill(0.0);
        scratch.rescale[query] = 1.0;
        return;
    }
    if let Some(cap) = soft_cap {
        for x in &mut logits[start..end] {
            *x = cap * (*x / cap).tanh();
        }
    }
    logits[..start].fill(f32::NEG_INFINITY);
    logits[end..].fill(f32::NEG_INFINITY);
    let mut largest = isa.splat(scratch.max[query]);
    for logits in logits.as_chunks().0 {
        largest = isa.max(isa.load(logits), largest);
    }
    let max = isa.most(largest);
    for logits in logits.as_chunks_mut::<LANES>().0 {
        for x in logits {
            *x = exp(*x - max);
        }
    }
    logits[..start].fill(0.0);
    logits[end..].fill(0.0);
    let mut total = isa.splat(0.0);
    for weights in logits.as_chunks().0 {
        total = isa.add(total, isa.load(weights));
    }
    let [total, ..] = isa.sums([total; 4]);
    let rescale = exp(scratch.max[query] - max);
    let sum = scratch.sum[query] * rescale + total;
    (scratch.max[query], scratch.sum[query], scratch.rescale[query]) = (max, sum, rescale);
}

/// The logits of all queries and of the keys `live`, `R` keys at a time.
///
/// # Safety
/// The vectors of these keys are of `steps` registers.
#[inline(always)]
unsafe fn logits<P: Product<Element = f32>, const R: usize>(
    p: P,
    scratch: &mut Scratch,
    queries: usize,
    steps: usize,
    keys: &Vectors,
    live: [usize; 2],
) {
    for first in (0..queries).step_by(P::Isa::COLUMNS) {
        let columns = &scratch.q[first * steps..];
        let logits = &mut scratch.logits[first..];
        for key in (live[0]..live[1]).step_by(R) {
            let mut rows = [keys[key]; R];
            for row in 1..R {
                rows[row] = keys[(key + row).min(live[1] - 1)];
            }
            // SAFETY: by contract; the queries are packed by as many columns as are left.
            unsafe {
                match P::Isa::COLUMNS.min(queries - first) {
                    1 => products::<P, R, 1>(p, rows, columns, steps, logits, key),
                    2 => products::<P, R, 2>(p, rows, columns, steps, logits, key),
                    3 => products::<P, R, 3>(p, rows, columns, steps, logits, key),
                    4 => products::<P, R, 4>(p, rows, columns, steps, logits, key),
                    5 => products::<P, R, 5>(p, rows, columns, steps, logits, key),
                    _ => products::<P, R, 6>(p, rows, columns, steps, logits, key),
                }
            }
        }
    }
}

/// As [`logits`], of keys that are turned first: `R` queries by `C` registers of keys at a time.
///
/// # Safety
/// As there.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "indices of registers, each loop unrolled")]
unsafe fn turned_logits<P: Product<Element = f32>, const R: usize, const C: usize>(
    p: P,
    scratch: &mut Scratch,
    queries: usize,
    steps: usize,
    keys: &Vectors,
    live: [usize; 2],
) {
    let isa = p.isa();
    let (keys_together, of_group) = (C * LANES, R * steps);
    for first in (live[0] / keys_together * keys_together..live[1]).step_by(keys_together) {
        for column in 0..C {
            let first = first + column * LANES;
            // Keys that nobody sees lie anywhere: one that somebody sees stands for them.
            let keys: [*const f32; LANES] = std::array::from_fn(|at| keys[(first + at).clamp(live[0], live[1] - 1)]);
            for step in 0..steps {
                let to = &mut scratch.turned[step * C + column..];
                assert!(to.len() > (LANES - 1) * steps * C);
                // SAFETY: by contract, and as was just seen.
                unsafe { isa.turn(&keys.map(|key| key.add(step * LANES)), to.as_mut_ptr(), steps * C) };
            }
        }
        for group in 0..queries.div_ceil(R) {
            let rows = scratch.q[group * of_group..][..of_group].as_ptr().cast();
            let operands = chains::Operands { rows, columns: scratch.turned.as_ptr(), length: steps };
            // SAFETY: rows and keys were packed for it.
            let sums: chains::Sums<P::Isa, R, C> =
                unsafe { chains::multiply::<_, R, C, true>(isa, operands, std::ptr::null()) };
            for row in 0..R {
                let logits = &mut scratch.logits[group * R + row][first..];
                for column in 0..C {
                    isa.store(sums[row][column], &mut logits.as_chunks_mut().0[column]);
                }
            }
        }
    }
}

/// `R` keys, the first of which is `key`, times `C` queries.
///
/// # Safety
/// Keys and queries are of `steps` registers.
#[inline(always)]
unsafe fn products<P: Product<Element = f32>, const R: usize, const C: usize>(
    p: P,
    keys: [*const f32; R],
    queries: &[Register],
    steps: usize,
    logits: &mut [[f32; KEY_BLOCK]],
    key: usize,
) {
    let queries = &queries[..steps * C];
    let sums = [[p.isa().splat(0.0); C]; R];
    // SAFETY: by contract.
    let sums = unsafe {
        simd::multiply::<P, R, C, false>(p, keys, queries.as_ptr(), steps, sums, &simd::Ahead::nothing(keys))
    };
    let sums = simd::sums(p, &sums);
    for (column, logits) in logits[..C].iter_mut().enumerate() {
        for row in 0..R {
            // The last key, repeated, may lie beyond the block.
            if key + row < KEY_BLOCK {
                logits[key + row] = sums[row][column];
            }
        }
    }
}

/// Adds the values of the keys `live`, times their weights, to the accumulators: `Q` queries and `D` registers at a time.
///
/// # Safety
/// The vectors of these keys are of `steps` registers.
#[inline(always)]
unsafe fn accumulate<P: Product<Element = f32>, const Q: usize, const D: usize>(
    p: P,
    scratch: &mut Scratch,
    queries: usize,
    steps: usize,
    values: &Vectors,
    live: [usize; 2],
) {
    for first in (0..queries).step_by(Q) {
        let count = Q.min(queries - first);
        let mut step = 0;
        while step < steps {
            let wide = step + D <= steps;
            // SAFETY: by contract.
            unsafe {
                match (count, wide) {
                    (1, true) => weigh::<P, 1, D>(p, scratch, first, steps, step, values, live),
                    (2, true) => weigh::<P, 2, D>(p, scratch, first, steps, step, values, live),
                    (3, true) => weigh::<P, 3, D>(p, scratch, first, steps, step, values, live),
                    (4, true) => weigh::<P, 4, D>(p, scratch, first, steps, step, values, live),
                    (5, true) => weigh::<P, 5, D>(p, scratch, first, steps, step, values, live),
                    (_, true) => weigh::<P, Q, D>(p, scratch, first, steps, step, values, live),
                    (1, false) => weigh::<P, 1, 1>(p, scratch, first, steps, step, values, live),
                    (2, false) => weigh::<P, 2, 1>(p, scratch, first, steps, step, values, live),
                    (3, false) => weigh::<P, 3, 1>(p, scratch, first, steps, step, values, live),
                    (4, false) => weigh::<P, 4, 1>(p, scratch, first, steps, step, values, live),
                    (5, false) => weigh::<P, 5, 1>(p, scratch, first, steps, step, values, live),
                    (_, false) => weigh::<P, Q, 1>(p, scratch, first, steps, step, values, live),
                }
            }
            step += if wide { D } else { 1 };
        }
    }
}

/// `Q` queries and `D` registers of their accumulators.
///
/// # Safety
/// The vectors of live keys are of `steps` registers.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "indices of registers, each loop unrolled")]
unsafe fn weigh<P: Product<Element = f32>, const Q: usize, const D: usize>(
    p: P,
    scratch: &mut Scratch,
    first: usize,
    steps: usize,
    step: usize,
    values: &Vectors,
    live: [usize; 2],
) {
    let isa = p.isa();
    let mut acc = [[isa.splat(0.0); D]; Q];
    for query in 0..Q {
        let rescale = isa.splat(scratch.rescale[first + query]);
        for register in 0..D {
            let so_far = isa.load(&scratch.acc[(first + query) * steps + step + register].0);
            acc[query][register] = isa.mul(so_far, rescale);
        }
    }
    let weights = &scratch.logits[first..][..Q];
    for key in live[0]..live[1] {
        let mut value = [isa.splat(0.0); D];
        for register in 0..D {
            // SAFETY: by contract.
            value[register] = isa.load(unsafe { &*values[key].add((step + register) * LANES).cast() });
        }
        for query in 0..Q {
            let weight = isa.splat(weights[query][key]);
            for register in 0..D {
                acc[query][register] = isa.fma(weight, value[register], acc[query][register]);
            }
        }
    }
    for query in 0..Q {
        for register in 0..D {
            isa.store(acc[query][register], &mut scratch.acc[(first + query) * steps + step + register].0);
        }
    }
}
