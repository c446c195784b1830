//! How well the planners' models rank candidates that libtpu estimated: `cargo bench --bench cost`. Of the points in
//! `kernels/tuned/cost.json`, by kernel and chip: rank correlation, and the regret of two choices: the first on record by the
//! model, and the planner's own. What counts is the larger of static cycles and the time that the bytes take.

use pagoda_kernels::chips::Chip;
use pagoda_kernels::cost::{self, Point, Ranking, Stage, Weights};
use pagoda_kernels::matmul::Matmul;
use pagoda_kernels::random::batch_text;
use pagoda_kernels::rpa::Rpa;
use pagoda_kernels::{Kernel, Options, Plan};

/// Points are ranked by weights that were fitted to all but a part of them.
const PARTS: usize = 5;

fn main() {
    let all = std::env::args().any(|argument| argument == "--all");
    println!(
        "kernel               chip   points candidates | error: mean | correlation: mean least | regret of the model's first: median 95% worst, \
         within 5% | of the planner's choice: same"
    );
    let mut planned = Vec::new();
    for chip in Chip::ALL {
        for family in ["rpa decode", "rpa mixed"] {
            planned.extend(print::<Rpa>(chip, family, |_| 0.0, all));
        }
        // The planner of products knows what their bytes take.
        let bytes = |plan: &Plan<Matmul>| Matmul::bytes_moved(plan, None) / chip.info().hbm_bytes_per_cycle();
        for family in ["matmul bf16", "matmul f32", "matmul 8-bit weight", "matmul 8-bit"] {
            planned.extend(print::<Matmul>(chip, family, bytes, all));
        }
    }
    let near = planned.iter().filter(|&&regret| regret <= 1.05).count();
    println!("{} of {} choices cost at most 5% more than the best on record", near, planned.len());
}

/// A candidate of a point.
struct Candidate {
    stages: Vec<Stage>,
    /// The least that the model says, whatever the steps take.
    floor: f64,
    cycles: u64,
    /// What counts.
    cost: u64,
}

/// A line for a family of launches on a chip; the regrets of the planner's choices.
fn print<K: Kernel>(chip: Chip, family: &str, floor: impl Fn(&Plan<K>) -> f64, all: bool) -> Vec<f64> {
    let of_family = |point: &'static Point| {
        let plans = (point.kernel == K::NAME && point.chip == chip).then(|| point.plans::<K>().expect("legal"))?;
        let of = K::family(plans[0].0.problem()).expect("a kernel with stages");
        (of.name == family).then_some((point, of, plans))
    };
    let of_family: Vec<_> = cost::points().iter().filter_map(of_family).collect();
    let Some((_, of, _)) = of_family.first() else { return vec![] };
    let prior = cost::weights(of, chip).copied().unwrap_or_default();
    let points: Vec<&Point> = of_family.iter().map(|(point, ..)| *point).collect();
    let mut candidates: Vec<Vec<Candidate>> = Vec::new();
    let mut planned = Vec::new();
    for (point, _, plans) in &of_family {
        let batch = point.batch.as_deref();
        let of = |(plan, cycles): &(Plan<K>, u64)| Candidate {
            stages: K::stages(plan, batch).expect("a kernel with stages"),
            floor: floor(plan),
            cycles: *cycles,
            cost: point.counted(plan, *cycles),
        };
        candidates.push(plans.iter().map(of).collect());
        let best = plans.iter().map(|(plan, cycles)| point.counted(plan, *cycles)).min().unwrap_or(1);
        let options = Options { tiles: None, vmem_limit: Some(point.limit) };
        let batches: Vec<_> = point.batch.iter().cloned().collect();
        let chosen = Plan::<K>::over(plans[0].0.problem().clone(), chip, options, &batches).expect("a plan").tiles();
        let known = plans.iter().find(|(plan, _)| plan.tiles() == chosen);
        let regret = known.map(|(plan, cycles)| point.counted(plan, *cycles) as f64 / best.max(1) as f64);
        planned.extend(regret);
        if all && regret.is_none_or(|regret| regret > 1.05) {
            println!(
                "  {regret:?} {chosen} of {:?} | {} | {}",
                point.cycles,
                plans[0].0.describe(),
                point.batch.as_deref().map_or(String::new(), batch_text)
            );
        }
    }
    // Points of one problem are of one part.
    let part = |at: usize| points.iter().position(|of| of.spec == points[at].spec).unwrap_or(at) % PARTS;
    let weights: Vec<Weights> = (0..PARTS)
        .map(|left_out| {
            let others = (0..points.len()).filter(|&at| part(at) != left_out).map(|at| &candidates[at]);
            let launch = |of: &Candidate| (of.stages.clone(), of.cycles as f64);
            let launches: Vec<Vec<_>> = others.map(|of| of.iter().map(launch).collect()).collect();
            Weights::fit(&launches, &prior)
        })
        .collect();
    let (mut rankings, mut errors) = (Vec::new(), Vec::new());
    for (at, candidates) in candidates.iter().enumerate() {
        let modelled: Vec<_> = candidates.iter().map(|of| (weights[part(at)].cycles(&of.stages), of)).collect();
        errors.extend(modelled.iter().map(|(modelled, of)| (modelled / of.cycles as f64 - 1.0).abs()));
        // Where the bytes decide, what the steps take still ranks.
        let rank = |(modelled, of): &(f64, &Candidate)| (modelled.max(of.floor) + modelled * 1e-3, of.cost);
        rankings.extend(Ranking::of(&modelled.iter().map(rank).collect::<Vec<_>>()));
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let regrets = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        let Some(worst) = values.last() else { return "-".to_owned() };
        let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
        let near = values.iter().filter(|&&value| value <= 1.05).count();
        format!("{:.2} {:.2} {worst:.2}, {near} of {}", at(0.5), at(0.95), values.len())
    };
    let correlations: Vec<f64> = rankings.iter().map(|of| of.correlation).collect();
    println!(
        "{family:<20} {:<6} {:>6} {:>10} | {:.3} | {:.3} {:.2} | {} | {}",
        chip.name(),
        points.len(),
        candidates.iter().map(Vec::len).sum::<usize>(),
        mean(&errors),
        mean(&correlations),
        correlations.iter().copied().fold(1.0, f64::min),
        regrets(rankings.iter().map(|of| of.regret).collect()),
        regrets(planned.clone())
    );
    planned
}
