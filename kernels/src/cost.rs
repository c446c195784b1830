//! What a launch costs, by a model: the work that it gives each unit of a core, weighed so that recorded launches cost what
//! the compiler's static estimate says.
//!
//! A kernel counts the work ([`Kernel::work_of_units`]): pure arithmetic over tiles and batch. How much of it a cycle does
//! is not known beforehand: parts overlap, and the compiler spills. So the weights are fitted, for each chip, to points on
//! record (`tuned/cost.json`: problem, tiles, batch, cycles), in relative terms: a short launch counts as much as a long
//! one. Weights are never negative: more work never costs less.
//!
//! The points are data, compiled in, so that planning stays pure; `cargo test --test cost -- --ignored` makes them anew, and
//! `cargo bench --bench cost` prints how well the model ranks them.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use crate::{
    chips::Chip,
    kernel::Kernel,
    plan::{Options, Plan, PlanError},
    problem::Problem,
    random::Lengths,
    vmem::Bytes,
};

/// Units whose work is counted.
pub const UNITS: usize = 7;

/// Work of the busiest core in a launch. The scale of a unit does not matter, as its weight is fitted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct UnitWork {
    /// Cycles of the matrix units, padding counted.
    pub matrix: f64,
    /// Elements that the vector units go through.
    pub vector: f64,
    /// Elements that are stored.
    pub stores: f64,
    /// Elements that are loaded.
    pub loads: f64,
    /// Copies that are started.
    pub copies: f64,
    /// Bytes that are copied.
    pub bytes: f64,
    /// Steps of loops that do not overlap with anything.
    pub steps: f64,
}

impl UnitWork {
    /// The units in order.
    pub fn units(&self) -> [f64; UNITS] {
        let &Self { matrix, vector, stores, loads, copies, bytes, steps } = self;
        [matrix, vector, stores, loads, copies, bytes, steps]
    }
}

/// Cycles for a unit of work of each kind, and of a launch that does nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Weights {
    launch: f64,
    units: [f64; UNITS],
}

impl Weights {
    /// The weights that fit launches best: `(work, cycles)`. Least squares of relative errors, none below zero, by going
    /// through the weights one by one.
    pub fn fit(points: &[(UnitWork, f64)]) -> Self {
        const ROUNDS: usize = 400;
        let rows: Vec<[f64; UNITS + 1]> = points
            .iter()
            .map(|(work, cycles)| {
                let mut row = [1.0 / cycles; UNITS + 1];
                row[1..].iter_mut().zip(work.units()).for_each(|(cell, unit)| *cell = unit / cycles);
                row
            })
            .collect();
        let mut weights = [0.0; UNITS + 1];
        // What every row lacks to 1.
        let mut missing = vec![1.0; rows.len()];
        for _ in 0..ROUNDS {
            for unit in 0..=UNITS {
                let squares: f64 = rows.iter().map(|row| row[unit] * row[unit]).sum();
                if squares == 0.0 {
                    continue;
                }
                let step: f64 =
                    rows.iter().zip(&missing).map(|(row, missing)| row[unit] * missing).sum::<f64>() / squares;
                let weight = (weights[unit] + step).max(0.0);
                let change = weight - weights[unit];
                weights[unit] = weight;
                rows.iter().zip(&mut missing).for_each(|(row, missing)| *missing -= change * row[unit]);
            }
        }
        let mut units = [0.0; UNITS];
        units.copy_from_slice(&weights[1..]);
        Self { launch: weights[0], units }
    }

    /// Cycles of a launch.
    pub fn cycles(&self, work: &UnitWork) -> f64 {
        self.launch + self.units.iter().zip(work.units()).map(|(weight, unit)| weight * unit).sum::<f64>()
    }
}

/// A launch that was compiled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// The kernel's name.
    pub kernel: String,
    /// The chip.
    pub chip: Chip,
    /// The problem, as `--spec` takes it.
    pub spec: serde_json::Value,
    /// The scoped VMEM limit.
    pub limit: Bytes,
    /// The batch; `None` for a kernel without batches.
    pub batch: Option<Vec<Lengths>>,
    /// Candidates, as `--tiles` takes them, each with its static cycles.
    pub cycles: BTreeMap<String, u64>,
    /// The compiler's version.
    pub compiler: String,
}

impl Point {
    /// The plans of a point of `K`, each with its cycles.
    ///
    /// # Errors
    /// When the problem or tiles are not legal any more.
    pub fn plans<K: Kernel>(&self) -> Result<Vec<(Plan<K>, u64)>, PlanError> {
        let spec: K::Spec = serde_json::from_value(self.spec.clone()).map_err(|error| PlanError {
            key: "spec",
            value: self.spec.to_string(),
            limit: format!("does not describe a {} problem: {error}", K::NAME),
            fix: "record the points anew".into(),
        })?;
        let problem = Problem::new(spec)?;
        let plan = |(tiles, &cycles): (&String, &u64)| {
            let tiles = <K::Tiles as crate::kernel::TileSizes>::parse(tiles)?;
            let options = Options { tiles: Some(tiles), vmem_limit: Some(self.limit) };
            Ok((Plan::new(problem.clone(), self.chip, options)?, cycles))
        };
        self.cycles.iter().map(plan).collect()
    }
}

/// All points on record.
pub fn points() -> &'static [Point] {
    static POINTS: LazyLock<Vec<Point>> =
        LazyLock::new(|| serde_json::from_str(include_str!("../tuned/cost.json")).expect("the table is valid"));
    &POINTS
}

/// The weights of a kernel by chip, fitted to `points`.
pub fn weights<K: Kernel>(points: &[Point]) -> BTreeMap<Chip, Weights> {
    let mut by_chip: BTreeMap<Chip, Vec<(UnitWork, f64)>> = BTreeMap::new();
    for point in points.iter().filter(|point| point.kernel == K::NAME) {
        for (plan, cycles) in point.plans::<K>().unwrap_or_default() {
            if let Some(work) = K::work_of_units(&plan, point.batch.as_deref()) {
                by_chip.entry(point.chip).or_default().push((work, cycles as f64));
            }
        }
    }
    by_chip.into_iter().map(|(chip, points)| (chip, Weights::fit(&points))).collect()
}

/// How well a model ranks the candidates of one point.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ranking {
    /// Spearman's correlation of modelled and real cycles; 1 for equal orders.
    pub correlation: f64,
    /// Cycles of the candidate that the model ranks first, over those of the best.
    pub regret: f64,
}

impl Ranking {
    /// Of `(modelled, real)` cycles; `None` for fewer than two candidates.
    pub fn of(candidates: &[(f64, u64)]) -> Option<Self> {
        let best = candidates.iter().map(|(_, real)| *real).min().filter(|_| candidates.len() > 1)?;
        let (_, chosen) = candidates.iter().min_by(|(one, _), (other, _)| one.total_cmp(other))?;
        let ranks = |value: &dyn Fn(&(f64, u64)) -> f64| -> Vec<f64> {
            let rank = |of: &(f64, u64)| {
                let less = candidates.iter().filter(|other| value(other) < value(of)).count();
                let equal = candidates.iter().filter(|other| value(other) == value(of)).count();
                less as f64 + (equal as f64 - 1.0) / 2.0
            };
            candidates.iter().map(rank).collect()
        };
        let (modelled, real) = (ranks(&|of| of.0), ranks(&|of| of.1 as f64));
        let mean = (candidates.len() as f64 - 1.0) / 2.0;
        let product = |one: &[f64], other: &[f64]| -> f64 {
            one.iter().zip(other).map(|(one, other)| (one - mean) * (other - mean)).sum()
        };
        let spread = (product(&modelled, &modelled) * product(&real, &real)).sqrt();
        let correlation = if spread > 0.0 { product(&modelled, &real) / spread } else { 1.0 };
        Some(Self { correlation, regret: *chosen as f64 / best.max(1) as f64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn a_fit_finds_the_weights_that_made_the_points() {
        let mut random = Random::new(3);
        let mut drawn = |most| random.within(0, most) as f64;
        let weights = Weights { launch: 800.0, units: [1.1, 0.4, 0.0, 0.2, 30.0, 0.001, 250.0] };
        let points: Vec<_> = (0..200)
            .map(|_| {
                let work = UnitWork {
                    matrix: drawn(90_000),
                    vector: drawn(50_000),
                    stores: drawn(20_000),
                    loads: drawn(70_000),
                    copies: drawn(900),
                    bytes: drawn(9_000_000),
                    steps: drawn(200),
                };
                (work, weights.cycles(&work))
            })
            .collect();
        let fitted = Weights::fit(&points);
        for (work, cycles) in &points {
            assert!((fitted.cycles(work) / cycles - 1.0).abs() < 0.02, "{fitted:?}");
        }
        // What is noise in one unit never makes a weight negative.
        let noisy: Vec<_> = points.iter().map(|(work, cycles)| (*work, cycles + 9.0 * (1e5 - work.stores))).collect();
        assert!(Weights::fit(&noisy).units.iter().all(|&weight| weight >= 0.0));
    }

    #[test]
    fn rankings_count_orders_and_regret() {
        let ranking = |pairs: &[(f64, u64)]| Ranking::of(pairs).map(|of| (of.correlation, of.regret));
        assert_eq!(ranking(&[(1.0, 10), (2.0, 20), (3.0, 30)]), Some((1.0, 1.0)));
        assert_eq!(ranking(&[(3.0, 10), (2.0, 20), (1.0, 30)]), Some((-1.0, 3.0)));
        assert_eq!(ranking(&[(1.0, 11), (2.0, 10)]), Some((-1.0, 1.1)));
        assert_eq!(ranking(&[(1.0, 11)]), None);
    }

    /// A point that cannot be planned any more would silently be left out of the fit.
    #[test]
    fn every_point_on_record_is_still_legal() {
        for point in points() {
            let plans = match point.kernel.as_str() {
                "rpa" => point.plans::<crate::rpa::Rpa>().map(|plans| plans.len()),
                "matmul" => point.plans::<crate::matmul::Matmul>().map(|plans| plans.len()),
                other => panic!("{other} is not modelled"),
            };
            assert_eq!(plans.unwrap_or_else(|error| panic!("{point:?}: {error}")), point.cycles.len());
        }
    }
}
