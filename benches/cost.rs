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
        "kernel      chip   points candidates | error: mean | correlation: mean least | regret of the model's first: median 95% worst, \
         within 5% | of the planner's choice: same"
    );
    let mut planned = Vec::new();
    for chip in Chip::ALL {
        for kind in ["decode", "mixed"] {
            planned.extend(print::<Rpa>(chip, kind, all));
        }
        planned.extend(print::<Matmul>(chip, "", all));
    }
    let near = planned.iter().filter(|&&regret| regret <= 1.05).count();
    println!("{} of {} choices cost at most 5% more than the best on record", near, planned.len());
}

/// A candidate of a point.
struct Candidate {
    stages: Option<Vec<Stage>>,
    /// By the kernel's own model, where it has no stages.
    own: Option<f64>,
    cycles: u64,
    /// What counts.
    cost: u64,
}

/// A line for a kernel on a chip; the regrets of the planner's choices.
fn print<K: Kernel>(chip: Chip, kind: &str, all: bool) -> Vec<f64> {
    let is_one = |of: &&Point| of.kernel == K::NAME && of.chip == chip && (kind.is_empty() || of.spec["kind"] == kind);
    let points: Vec<&Point> = cost::points().iter().filter(is_one).collect();
    if points.is_empty() {
        return vec![];
    }
    let mut candidates: Vec<Vec<Candidate>> = Vec::new();
    let (mut planned, mut family) = (Vec::new(), None);
    for point in &points {
        let (plans, batch) = (point.plans::<K>().expect("legal"), point.batch.as_deref());
        family = K::family(plans[0].0.problem());
        let of = |(plan, cycles): &(Plan<K>, u64)| Candidate {
            stages: K::stages(plan, batch),
            own: K::model(plan, batch),
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
    let weights: Vec<Option<Weights>> = (0..PARTS)
        .map(|left_out| {
            let others = (0..points.len()).filter(|&at| part(at) != left_out).map(|at| &candidates[at]);
            let launch = |of: &Candidate| Some((of.stages.clone()?, of.cycles as f64));
            let launches: Vec<Vec<_>> = others.map(|of| of.iter().filter_map(launch).collect()).collect();
            let prior = family.and_then(|family| cost::weights(family, chip)).copied().unwrap_or_default();
            launches.iter().any(|of| !of.is_empty()).then(|| Weights::fit(&launches, &prior))
        })
        .collect();
    let (mut rankings, mut errors) = (Vec::new(), Vec::new());
    for (at, candidates) in candidates.iter().enumerate() {
        let modelled = candidates.iter().filter_map(|of| {
            let by_stages = weights[part(at)].zip(of.stages.as_ref()).map(|(weights, stages)| weights.cycles(stages));
            let modelled = by_stages.or(of.own)?;
            Some((modelled, of))
        });
        let modelled: Vec<_> = modelled.collect();
        errors.extend(modelled.iter().map(|(modelled, of)| (modelled / of.cycles as f64 - 1.0).abs()));
        rankings.extend(Ranking::of(&modelled.iter().map(|(modelled, of)| (*modelled, of.cost)).collect::<Vec<_>>()));
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
        "{:<11} {:<6} {:>6} {:>10} | {:.3} | {:.3} {:.2} | {} | {}",
        format!("{} {kind}", K::NAME),
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
