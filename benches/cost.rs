//! How well the planners' models rank candidates that libtpu estimated: `cargo bench --bench cost`. Of the points in
//! `kernels/tuned/cost.json`, by kernel and chip: rank correlation, and the regret of two choices: the model's first, and the
//! planner's own.

use pagoda_kernels::chips::Chip;
use pagoda_kernels::cost::{self, Point, Ranking, Weights};
use pagoda_kernels::matmul::Matmul;
use pagoda_kernels::rpa::Rpa;
use pagoda_kernels::{Kernel, Options, Plan};

fn main() {
    println!(
        "kernel chip   points candidates | correlation: mean least | model's regret: median 95% worst, within 5% | planner's: same"
    );
    for chip in Chip::ALL {
        print::<Rpa>(chip);
        print::<Matmul>(chip);
    }
}

/// A line for a kernel on a chip. Points that the weights were fitted to flatter them: each is ranked by the weights of the
/// others.
fn print<K: Kernel>(chip: Chip) {
    let points: Vec<&Point> = cost::points().iter().filter(|of| of.kernel == K::NAME && of.chip == chip).collect();
    if points.is_empty() {
        return;
    }
    let plans: Vec<Vec<(Plan<K>, u64)>> = points.iter().map(|of| of.plans::<K>().expect("legal")).collect();
    let work = |at: usize| {
        let batch = points[at].batch.as_deref();
        plans[at].iter().filter_map(move |(plan, cycles)| Some((K::work_of_units(plan, batch)?, *cycles as f64)))
    };
    let (mut rankings, mut planned) = (Vec::new(), Vec::new());
    for (at, candidates) in plans.iter().enumerate() {
        let batch = points[at].batch.as_deref();
        let others: Vec<_> = (0..points.len()).filter(|other| *other != at).flat_map(work).collect();
        let weights = (!others.is_empty()).then(|| Weights::fit(&others));
        let modelled = candidates.iter().filter_map(|(plan, cycles)| {
            let by_units = weights.zip(K::work_of_units(plan, batch)).map(|(weights, work)| weights.cycles(&work));
            Some((by_units.or_else(|| K::model(plan, batch))?, *cycles))
        });
        rankings.extend(Ranking::of(&modelled.collect::<Vec<_>>()));
        let best = candidates.iter().map(|(_, cycles)| *cycles).min().unwrap_or(1);
        let problem = candidates[0].0.problem().clone();
        let chosen = Plan::<K>::new(problem, chip, Options { tiles: None, vmem_limit: Some(points[at].limit) });
        let chosen = chosen.ok().and_then(|chosen| candidates.iter().find(|(plan, _)| plan.tiles() == chosen.tiles()));
        planned.extend(chosen.map(|(_, cycles)| *cycles as f64 / best.max(1) as f64));
    }
    let regrets = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        let Some(worst) = values.last() else { return "-".to_owned() };
        let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
        let near = values.iter().filter(|&&value| value <= 1.05).count();
        format!("{:.2} {:.2} {worst:.2}, {near} of {}", at(0.5), at(0.95), values.len())
    };
    let correlations: Vec<f64> = rankings.iter().map(|of| of.correlation).collect();
    let mean = correlations.iter().sum::<f64>() / correlations.len().max(1) as f64;
    let least = correlations.iter().copied().fold(1.0, f64::min);
    let candidates: usize = plans.iter().map(Vec::len).sum();
    println!(
        "{:<6} {:<6} {:>6} {candidates:>10} | {mean:.3} {least:.3} | {} | {}",
        K::NAME,
        chip.name(),
        points.len(),
        regrets(rankings.iter().map(|of| of.regret).collect()),
        regrets(planned)
    );
}
