//! What a launch over a known batch takes: its work, the part of each core, and the programs around it.

use pagoda_ir::{Context, Element, Result, TensorType, stablehlo::Module};

use super::{
    Kind, Problem, Rotary, Rpa, Spec, kv_write,
    plan::{self, Plan, Tiles},
    stablehlo,
};
use crate::{
    chips::Chip,
    cost,
    kernel::{Kernel, Work},
    named::Named,
    random::Lengths,
    vmem::Bytes,
};

/// Two products of two operations for every row, key that it sees, and element; K and V of every page with a key that is
/// seen, q and the output once.
pub(super) fn work(problem: &Problem, batch: &[Lengths]) -> Work {
    let token = (problem.kv_layout().token_elements() * problem.precision.kv.bytes()) as f64;
    let features = (problem.q_heads * problem.head_dim) as f64;
    let q = problem.precision.q.bytes();
    let row = match problem.fused {
        None => 2.0 * features * q as f64,
        // The projections and the angles come in; the output, and the keys and values of the row, go out.
        Some(_) => {
            let projected = (problem.projected_heads() * q + Element::F32.bytes()) * problem.head_dim;
            projected as f64 + features * q as f64 + token
        }
    };
    let (page, window) = (problem.page_size, problem.sliding_window.unwrap_or(usize::MAX));
    let of = |&Lengths { q_len, kv_len }: &Lengths| {
        // Row i of the last q_len stands at kv_len - q_len + i, and sees the keys up to it.
        let q_len = q_len.min(kv_len);
        let first = kv_len - q_len;
        let all = window.saturating_sub(first).min(q_len); // rows whose window reaches back to the first key
        let seen = all * (first + 1) + all * all.saturating_sub(1) / 2 + (q_len - all) * window.min(kv_len);
        let unseen = (first + 1).saturating_sub(window) / page * page;
        let pages = if q_len > 0 { kv_len.next_multiple_of(page) - unseen } else { 0 };
        Work { flops: 4.0 * seen as f64 * features, bytes: token * pages as f64 + row * q_len as f64 }
    };
    batch
        .iter()
        .map(of)
        .fold(Work::default(), |sum, of| Work { flops: sum.flops + of.flops, bytes: sum.bytes + of.bytes })
}

/// Cycles by the weights that fit the points on record.
pub(super) fn model(plan: &Plan, batch: &[Lengths]) -> Option<f64> {
    cost::cycles::<Rpa>(plan, Some(batch))
}

/// Decode rows over ragged contexts; of a decode problem also over short ones; of a mixed problem also one prompt, several
/// short ones, a chunk behind a long context, and half of the rows beside decode rows.
pub(super) fn spread(problem: &Problem) -> Vec<(&'static str, Vec<Lengths>)> {
    let (most, rows) = (problem.max_kv_len().min(problem.pages * problem.page_size), problem.tokens);
    let pages = problem.pages / problem.max_seqs.min(problem.pages); // of a sequence, if all are as long
    let longest = most.min(pages * problem.page_size).max(1);
    // From an eighth of the longest to all of it, in an order that is not sorted.
    let decode = |count: usize| -> Vec<Lengths> {
        let context = |at: usize| (longest * (1 + 5 * at % 8)).div_ceil(8);
        (0..count).map(|at| Lengths { q_len: 1, kv_len: context(at) }).collect()
    };
    let decoding = ("decode", decode(problem.max_seqs.min(rows).min(problem.pages)));
    if problem.kind == Kind::Decode {
        let short = decoding.1.iter().map(|of| Lengths { kv_len: of.kv_len.div_ceil(6), ..*of }).collect();
        return vec![decoding, ("decode-short", short)];
    }
    let prompt = |q_len: usize| Lengths { q_len: q_len.min(most), kv_len: q_len.min(most) };
    let chunk = Lengths { q_len: rows.min(most), kv_len: most };
    let beside = decode((problem.max_seqs - 1).min(rows / 2).min(problem.pages));
    let pages_left = problem.pages - beside.iter().map(|of| of.kv_len.div_ceil(problem.page_size)).sum::<usize>();
    let half = (rows / 2).min(pages_left * problem.page_size);
    let mixed = beside.into_iter().chain((half > 0).then(|| prompt(half))).collect();
    // Of as many rows each, a number that is not round where there are others.
    let count = problem.max_seqs.min(rows).min(problem.pages).min(8);
    let each = (rows / count).min(longest);
    let short = (0..count).map(|at| prompt((each - at * each / (4 * count)).max(1))).collect();
    vec![("prompt", vec![prompt(rows)]), ("prompts", short), ("chunk", vec![chunk]), ("mixed", mixed), decoding]
}

/// What is worth a compilation: see [`plan::candidates`].
pub(super) fn candidates(problem: &Problem, chip: Chip, limit: Bytes) -> Vec<Tiles> {
    let fits = |tiles: &Tiles| Rpa::layout(problem, chip, *tiles).vmem.total() <= limit;
    plan::candidates(problem, chip).into_iter().filter(fits).collect()
}

/// Of a fused kernel no more than the output's change of layout, where rows are copied one by one. Before another, queries and
/// keys are rotated, keys and values are written. Behind it nothing is computed. A kernel of any batch takes q and gives its
/// output as the projections around it have them, in two dimensions, rows of padding aside; that of decode has heads, in
/// another layout.
pub(super) fn around<'c>(context: &'c Context, plan: &Plan) -> Result<Vec<Module<'c>>> {
    let problem = plan.problem();
    let &Spec { tokens, q_heads, kv_heads, head_dim, .. } = problem.spec();
    if problem.fused.is_some() {
        let is_by_head = plan.output_dims().len() > 2;
        return if is_by_head { Ok(vec![after(context, problem, &plan.output_dims())?]) } else { Ok(vec![]) };
    }
    let types_of = problem.precision;
    let (q, f32) = (types_of.q, Element::F32);
    let heads = q_heads + 2 * kv_heads;
    let (flat, features, padded) = (problem.kind == Kind::Mixed, q_heads * head_dim, plan.padded_rows());
    let before = Module::new(context, "before_attention");
    let write = kv_write::arguments(problem);
    let written = ["kv_pages", "slots", "first_page"];
    let write: Vec<_> = write.iter().filter(|argument| written.contains(&argument.name)).collect();
    let own = [TensorType::new(q, &[tokens, heads * head_dim]), TensorType::new(f32, &[tokens, head_dim])];
    let types: Vec<_> = own.into_iter().chain(write.iter().map(|argument| argument.ty.clone())).collect();
    before.function("main", &types, |b, args| {
        let projected = b.reshape(args[0], &[tokens, heads, head_dim])?;
        let part = |from: usize, count: usize| b.slice_in_dim(projected, from, from + count, 1);
        let rotated = |from, count| stablehlo::rotate(b, Rotary::HalfSplit, part(from, count)?, args[1]);
        let mut q = b.convert(rotated(0, q_heads)?, types_of.q)?;
        if flat {
            q = b.reshape(q, &[tokens, features])?;
            let high = [padded[0] - tokens, padded[1] - features].map(|by| by as i64);
            q = b.pad(q, b.scalar(types_of.q, 0.0)?, &[0, 0], &high, &[0, 0])?;
        }
        let k = b.convert(rotated(q_heads, kv_heads)?, types_of.kv)?;
        let v = b.convert(part(q_heads + kv_heads, kv_heads)?, types_of.kv)?;
        let given = write.iter().map(|argument| argument.name).zip(args[2..].iter().copied());
        let args: Named<_> = given.chain([("k", k), ("v", v)]).collect();
        Ok(vec![q, kv_write::emit(b, problem, &args)?])
    })?;
    before.donate("main", 2, 1)?;
    for (argument, ty) in types.iter().enumerate() {
        if ty.dims.len() > 1 {
            before.row_major_argument("main", argument)?;
        }
    }
    [0, 1].into_iter().try_for_each(|result| before.row_major_result("main", result))?;
    if flat && padded == [tokens, features] {
        return Ok(vec![before]);
    }
    let after = after(context, problem, &plan.output_dims())?;
    Ok(vec![before, after])
}

/// The output, which the kernel gives in sizes `given`, as the next projection takes it.
fn after<'c>(context: &'c Context, problem: &Problem, given: &[usize]) -> Result<Module<'c>> {
    let (tokens, features) = (problem.tokens, problem.q_heads * problem.head_dim);
    let after = Module::new(context, "after_attention");
    after.function("main", &[TensorType::new(problem.precision.output, given)], |b, args| {
        Ok(vec![match given.len() {
            2 => b.slice_in_dim(b.slice_in_dim(args[0], 0, tokens, 0)?, 0, features, 1)?,
            _ => b.reshape(args[0], &[tokens, features])?,
        }])
    })?;
    after.row_major_argument("main", 0)?;
    after.row_major_result("main", 0)?;
    Ok(after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choices::Choices;

    fn of(text: &str) -> Vec<Lengths> {
        crate::random::parse_batch(text).unwrap()
    }

    /// The logits that the reference computes, and the pages that it reads, counted one by one.
    #[test]
    fn work_is_what_the_definition_counts() {
        for seed in 0..50 {
            let spec = Spec { layers: 1, ..Rpa::workload(&mut Choices::of_seed(seed)).unwrap() };
            let problem = Problem::new(spec).unwrap();
            for (_, batch) in spread(&problem) {
                let (mut logits, mut pages, mut rows) = (0, 0, 0);
                for &Lengths { q_len, kv_len } in &batch {
                    let sees =
                        |position: usize| position + 1 - problem.sliding_window.unwrap_or(usize::MAX).min(position + 1);
                    logits += (kv_len - q_len..kv_len).map(|at| at + 1 - sees(at)).sum::<usize>();
                    let first = if q_len > 0 { sees(kv_len - q_len) / problem.page_size } else { 0 };
                    pages += if q_len > 0 { kv_len.div_ceil(problem.page_size) - first } else { 0 };
                    rows += q_len;
                }
                let work = work(&problem, &batch);
                assert_eq!(work.flops, (4 * logits * problem.q_heads * problem.head_dim) as f64, "{seed}");
                let token = problem.kv_layout().token_elements() * problem.precision.kv.bytes();
                let row = 2 * problem.q_heads * problem.head_dim * problem.precision.q.bytes();
                assert_eq!(work.bytes, (pages * problem.page_size * token + rows * row) as f64, "{seed}");
            }
        }
    }

    #[test]
    fn the_spread_is_batches_of_any_problem() {
        for seed in 0..200 {
            let problem = Problem::new(Rpa::workload(&mut Choices::of_seed(seed)).unwrap()).unwrap();
            for (name, batch) in spread(&problem) {
                Rpa::check_batch(&problem, Some(&batch)).unwrap_or_else(|error| panic!("{seed} {name}: {error}"));
            }
            let sample = Rpa::sample(&mut Choices::of_seed(seed));
            let problem = Problem::new(sample.spec).unwrap();
            for (name, batch) in spread(&problem) {
                Rpa::check_batch(&problem, Some(&batch)).unwrap_or_else(|error| panic!("{seed} {name}: {error}"));
            }
        }
    }

    #[test]
    fn shares_do_all_of_the_work() {
        for (q_heads, kv_heads) in [(32, 8), (16, 16), (64, 32), (8, 1)] {
            let spec = Spec { q_heads, kv_heads, ..Rpa::common().remove(0) };
            let plan = Plan::new(Problem::new(spec).unwrap(), Chip::V5p, crate::plan::Options::default()).unwrap();
            let batch = of("1024/1024");
            let whole = work(plan.problem(), &batch).flops;
            let launches = Rpa::core_share(&plan).map_or(whole, |(share, times)| {
                assert!(Rpa::core_share(&share).is_none(), "{q_heads}/{kv_heads}");
                (2 * times) as f64 * work(share.problem(), &batch).flops
            });
            assert_eq!(launches, whole, "{q_heads}/{kv_heads}");
        }
    }
}
