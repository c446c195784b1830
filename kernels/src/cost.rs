//! What a launch costs, by a model: the steps of its busiest core, each with the work that it gives the core's units and the
//! copies that run beside it, weighed so that recorded launches cost what the compiler's static estimate says.
//!
//! A kernel says what its steps are ([`Kernel::stages`]): pure arithmetic over tiles and batch. How many cycles a unit of
//! work takes is not known beforehand: parts overlap, and the compiler spills. So the weights are fitted, for each
//! [`Family`] and chip, to points on record (`tuned/cost.json`: problem, batch, tiles, cycles), in relative terms: a short
//! launch counts as much as a long one. Weights are never negative: more work never costs less.
//!
//! The weights are data (`tuned/cost_weights.json`), compiled in, so that planning stays pure and fast. `make cost-points`
//! records points and fits; `cargo bench --bench cost` prints how well the model ranks them, each point by weights that were
//! fitted to others.

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

/// Kinds of work that a family tells apart, at most.
pub const UNITS: usize = 17;

/// Launches whose steps are of one sort: they share their weights.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    /// What it is called in the table of weights.
    pub name: &'static str,
    /// The kinds of work that its steps count, in order; [`UNITS`] at most.
    pub units: &'static [&'static str],
}

/// Work by kind, in the order of [`Family::units`]. The scale of a unit does not matter, as its weight is fitted.
pub type Work = [f64; UNITS];

/// Equal steps of a core, one after another.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stage {
    /// How many steps.
    pub times: f64,
    /// What one of them does.
    pub work: Work,
    /// What runs beside it.
    pub copies: Copies,
}

/// Copies for a step that run ahead, while earlier steps work.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Copies {
    /// Cycles from start to end.
    pub cycles: f64,
    /// Steps that work meanwhile.
    pub beside: f64,
    /// Steps that share what the work does not hide: as many copies are under way at a time.
    pub among: f64,
}

impl Stage {
    /// Steps without copies of their own.
    pub fn of(times: f64, work: Work) -> Self {
        Self { times, work, copies: Copies::default() }
    }

    /// What part of a step's work counts, and the cycles beside it, where the work takes `cycles`: a step takes as long as
    /// its work, and longer where its copies do.
    fn exposed(&self, cycles: f64) -> (f64, f64) {
        let Copies { cycles: copy, beside, among } = self.copies;
        match copy > beside * cycles && among > 0.0 {
            true => (1.0 - beside / among, copy / among),
            false => (1.0, 0.0),
        }
    }
}

/// Cycles for a unit of work of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Weights(Work);

impl Weights {
    /// The weights that fit launches best, which come as the candidates of a point: `(stages, cycles)`. Least squares of relative
    /// errors, none below zero; what the launches say nothing of stays near `prior`. Candidates are to be ranked: what the model
    /// misses of all of a point's alike counts less, and what it misses of slow ones. Which steps wait for copies depends on the
    /// weights, so they are fitted again and again; the best fit is kept.
    pub fn fit(points: &[Vec<(Vec<Stage>, f64)>], prior: &Self) -> Self {
        const ROUNDS: usize = 12;
        /// A weight that is twice its prior counts as much as a launch that is missed by this part of its cycles.
        const HELD: f64 = 0.03;
        /// What remains of an error that all candidates of a point have.
        const ALIKE: f64 = 0.4;
        let mut best = (f64::INFINITY, Self::default());
        // Work so slow that no copy is waited for.
        let mut weights = Self([1e12; UNITS]);
        for _ in 0..ROUNDS {
            let rows = points.iter().flat_map(|candidates| {
                let least = candidates.iter().map(|of| of.1).fold(f64::INFINITY, f64::min);
                let counts: Vec<f64> = candidates.iter().map(|of| least / of.1).collect();
                let rows = candidates.iter().map(|(stages, cycles)| weights.row(stages, *cycles));
                let rows: Vec<[f64; UNITS + 1]> = rows.collect();
                let mean = |at: usize| {
                    let sum: f64 = rows.iter().zip(&counts).map(|(row, count)| row[at] * count * count).sum();
                    sum / counts.iter().map(|count| count * count).sum::<f64>()
                };
                let mean: [f64; UNITS + 1] = std::array::from_fn(mean);
                let of = move |(row, count): ([f64; UNITS + 1], f64)| -> [f64; UNITS + 1] {
                    std::array::from_fn(|at| count * (row[at] - (1.0 - ALIKE) * mean[at]))
                };
                rows.into_iter().zip(counts).map(of)
            });
            let held = prior.0.iter().enumerate().filter(|(_, weight)| **weight > 0.0).map(|(unit, weight)| {
                let mut row = [0.0; UNITS + 1];
                (row[unit], row[UNITS]) = (HELD / weight, HELD);
                row
            });
            let rows: Vec<_> = rows.chain(held).collect();
            let error = |of: &Self| rows.iter().map(|row| (of.of(&row[..UNITS]) - row[UNITS]).powi(2)).sum::<f64>();
            // Of the weights by which these rows were made: they say what is waited for.
            let missed = error(&weights);
            if missed < best.0 {
                best = (missed, weights);
            }
            weights = Self(least_squares(&rows));
        }
        best.1
    }

    /// A launch as an equation: what is counted of each unit, in parts of its cycles, and of these what is not waited for.
    fn row(&self, stages: &[Stage], cycles: f64) -> [f64; UNITS + 1] {
        let mut row = [0.0; UNITS + 1];
        row[UNITS] = 1.0;
        for stage in stages {
            let (share, beside) = stage.exposed(self.of(&stage.work));
            let times = stage.times / cycles;
            row.iter_mut().zip(stage.work).for_each(|(cell, unit)| *cell += times * share * unit);
            row[UNITS] -= times * beside;
        }
        row
    }

    /// Cycles of a step's work.
    fn of(&self, work: &[f64]) -> f64 {
        self.0.iter().zip(work).map(|(weight, unit)| weight * unit).sum()
    }

    /// Cycles of a launch.
    pub fn cycles(&self, stages: &[Stage]) -> f64 {
        let of = |stage: &Stage| {
            let work = self.of(&stage.work);
            let (share, beside) = stage.exposed(work);
            stage.times * (share * work + beside)
        };
        stages.iter().map(of).sum()
    }

    /// The weights of a family's units.
    pub fn of_units(&self, family: &Family) -> Vec<f64> {
        self.0[..family.units.len()].to_vec()
    }
}

/// The weights, none below zero, with which the equations of `rows` are missed least, going through them one by one. The right
/// side stands behind the units.
fn least_squares(rows: &[[f64; UNITS + 1]]) -> Work {
    const ROUNDS: usize = 300;
    let mut weights = [0.0; UNITS];
    let mut missing: Vec<f64> = rows.iter().map(|row| row[UNITS]).collect();
    for _ in 0..ROUNDS {
        for unit in 0..UNITS {
            let squares: f64 = rows.iter().map(|row| row[unit] * row[unit]).sum();
            if squares == 0.0 {
                continue;
            }
            let step = rows.iter().zip(&missing).map(|(row, missing)| row[unit] * missing).sum::<f64>() / squares;
            let weight = (weights[unit] + step).max(0.0);
            let change = weight - weights[unit];
            weights[unit] = weight;
            rows.iter().zip(&mut missing).for_each(|(row, missing)| *missing -= change * row[unit]);
        }
    }
    weights
}

/// The table of weights: by family, then by chip.
pub type Table = BTreeMap<String, FamilyWeights>;

/// A family's part of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FamilyWeights {
    /// The units, in order.
    pub units: Vec<String>,
    /// Cycles of each.
    pub chips: BTreeMap<Chip, Vec<f64>>,
}

/// The weights of a family on a chip. Chips without points take those of the chip with the same matrix units.
pub fn weights(family: &Family, chip: Chip) -> Option<&'static Weights> {
    static WEIGHTS: LazyLock<BTreeMap<String, BTreeMap<Chip, Weights>>> = LazyLock::new(|| {
        let of_chip = |weights: Vec<f64>| {
            let mut work = [0.0; UNITS];
            work.iter_mut().zip(weights).for_each(|(cell, weight)| *cell = weight);
            Weights(work)
        };
        let of_family = |of: FamilyWeights| of.chips.into_iter().map(|(chip, of)| (chip, of_chip(of))).collect();
        table().into_iter().map(|(name, of)| (name, of_family(of))).collect()
    });
    let of_family = WEIGHTS.get(family.name)?;
    let alike = match chip {
        Chip::V4 | Chip::V5e | Chip::V5p => Chip::V5p,
        Chip::V6e | Chip::Tpu7x => Chip::V6e,
    };
    of_family.get(&chip).or_else(|| of_family.get(&alike))
}

/// The table of weights on record.
///
/// # Panics
/// When it is damaged; a test sees to it that it is not.
pub fn table() -> Table {
    serde_json::from_str(include_str!("../tuned/cost_weights.json")).expect("the table is valid")
}

/// Cycles of a launch of `plan` over `batch` by the weights on record; `None` for a kernel without stages.
pub fn cycles<K: Kernel>(plan: &Plan<K>, batch: Option<&[Lengths]>) -> Option<f64> {
    let weights = weights(K::family(plan.problem())?, plan.chip())?;
    Some(weights.cycles(&K::stages(plan, batch)?))
}

/// What candidates cost over some batches, from the cycles of each: the mean, over batches, of its cycles over the least that
/// any takes, so that a short batch counts as much as a long one.
pub fn scores(cycles: &[Vec<f64>]) -> Vec<f64> {
    let batches = cycles.iter().map(Vec::len).min().unwrap_or(0);
    let least: Vec<f64> =
        (0..batches).map(|batch| cycles.iter().map(|of| of[batch]).fold(f64::INFINITY, f64::min)).collect();
    let score = |of: &Vec<f64>| of.iter().zip(&least).map(|(of, least)| of / least).sum::<f64>() / batches as f64;
    cycles.iter().map(score).collect()
}

/// Cycles of one copy between HBM and VMEM, by the compiler's static estimate: latency and rate, fitted to kernels that
/// do nothing else (libtpu 0.0.52; v4, of which it has no estimate, as v5p). On v5p it leaves out the bytes of copies of parts
/// of rows, which the model does not.
pub(crate) fn copy_cycles(chip: Chip, bytes: f64) -> f64 {
    let (latency, rate) = match chip {
        Chip::V5e => (1143.0, 489.0),
        Chip::V4 | Chip::V5p => (678.0, 1236.0),
        Chip::V6e => (557.0, 772.0),
        Chip::Tpu7x => (600.0, 1580.0),
    };
    latency + bytes / rate
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
    /// What counts of a candidate's static cycles: they, or the time that its bytes take, whichever is more.
    pub fn counted<K: Kernel>(&self, plan: &Plan<K>, cycles: u64) -> u64 {
        let bytes = K::bytes_moved(plan, self.batch.as_deref()) / self.chip.info().hbm_bytes_per_cycle();
        cycles.max(bytes as u64)
    }

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

/// Points of a family on a chip, as the fit takes them: of each candidate its stages and cycles.
pub type Launches = ((&'static Family, Chip), Vec<Vec<(Vec<Stage>, f64)>>);

/// Launches of a kernel on record, by family and chip.
pub fn launches<K: Kernel>(points: &[Point]) -> Vec<Launches> {
    let mut launches: Vec<Launches> = Vec::new();
    for point in points.iter().filter(|point| point.kernel == K::NAME) {
        let plans = point.plans::<K>().unwrap_or_default();
        let Some(family) = plans.first().and_then(|(plan, _)| K::family(plan.problem())) else { continue };
        let stages = |(plan, cycles)| Some((K::stages(&plan, point.batch.as_deref())?, cycles as f64));
        let key = (family, point.chip);
        let at = launches.iter().position(|(of, _)| *of == key).unwrap_or_else(|| {
            launches.push((key, vec![]));
            launches.len() - 1
        });
        launches[at].1.push(plans.into_iter().filter_map(stages).collect());
    }
    launches
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

    /// Launches of three sorts of steps: without copies, with copies that work hides, and with copies that it does not.
    #[test]
    fn a_fit_finds_the_weights_that_made_the_points() {
        let mut random = Random::new(3);
        let mut drawn = |most| random.within(1, most) as f64;
        let mut weights = Weights::default();
        weights.0[..5].copy_from_slice(&[800.0, 1.1, 0.4, 0.0, 30.0]);
        let points: Vec<_> = (0..200)
            .map(|_| {
                let mut work = || {
                    let mut work = [0.0; UNITS];
                    work[1..5].copy_from_slice(&[drawn(900), drawn(500), drawn(200), drawn(9)]);
                    work
                };
                let (first, second) = (work(), work());
                let mut launch = [0.0; UNITS];
                launch[0] = 1.0;
                let copies = |cycles| Copies { cycles, beside: 2.0, among: 3.0 };
                let (times, copy) = ([drawn(20), drawn(20)], [drawn(300), 6000.0]);
                let of = |(work, (times, copy))| Stage { times, work, copies: copies(copy) };
                let steps = [first, second].into_iter().zip(times.into_iter().zip(copy)).map(of);
                let stages: Vec<_> = steps.chain([Stage::of(1.0, launch)]).collect();
                let cycles = weights.cycles(&stages);
                (stages, cycles)
            })
            .collect();
        let points: Vec<_> = points.chunks(4).map(<[_]>::to_vec).collect();
        let fitted = Weights::fit(&points, &Weights::default());
        for (stages, cycles) in points.iter().flatten() {
            assert!((fitted.cycles(stages) / cycles - 1.0).abs() < 0.02, "{fitted:?}");
        }
        // Of units that no launch has, the prior says all.
        let mut prior = weights;
        prior.0[9] = 7.0;
        assert!((Weights::fit(&points, &prior).0[9] - 7.0).abs() < 1e-6);
        // What is noise in one unit never makes a weight negative.
        let noise = |(stages, of): &(Vec<Stage>, f64)| (stages.clone(), of + 9e3 / stages[0].work[3]);
        let noisy: Vec<Vec<_>> = points.iter().map(|of| of.iter().map(noise).collect()).collect();
        assert!(Weights::fit(&noisy, &weights).0.iter().all(|&weight| weight >= 0.0));
    }

    #[test]
    fn a_step_takes_as_long_as_its_work_or_its_copies() {
        let mut weights = Weights::default();
        weights.0[0] = 1.0;
        let of = |work: f64, copies| {
            let mut units = [0.0; UNITS];
            units[0] = work;
            weights.cycles(&[Stage { times: 10.0, work: units, copies }])
        };
        let copies = |cycles, beside, among| Copies { cycles, beside, among };
        assert_eq!(of(100.0, Copies::default()), 1000.0);
        // Two copies under way beside the work of two steps: none is waited for, or each step takes a half.
        assert_eq!(of(100.0, copies(200.0, 2.0, 2.0)), 1000.0);
        assert_eq!(of(100.0, copies(300.0, 2.0, 2.0)), 1500.0);
        // A copy is started behind a step's work: two steps take a copy and the work of one.
        assert_eq!(of(100.0, copies(300.0, 1.0, 2.0)), 2000.0);
    }

    #[test]
    fn a_short_batch_counts_as_much_as_a_long_one() {
        let of = |[one, other]: [[f64; 2]; 2]| scores(&[one.to_vec(), other.to_vec()]);
        assert_eq!(of([[100.0, 10_000.0], [150.0, 10_000.0]]), [1.0, 1.25]);
        let scores = of([[100.0, 10_000.0], [105.0, 8_000.0]]);
        assert!(scores[1] < scores[0], "{scores:?}");
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
        fn plans<K: Kernel>(point: &Point) -> Option<Result<usize, PlanError>> {
            (point.kernel == K::NAME).then(|| point.plans::<K>().map(|plans| plans.len()))
        }
        macro_rules! of_any {
            ($($name:ident: $kernel:ty,)*) => { |point: &Point| None$(.or_else(|| plans::<$kernel>(point)))* };
        }
        let plans = crate::for_each_kernel!(of_any);
        for point in points() {
            let found = plans(point).unwrap_or_else(|| panic!("{} is a kernel", point.kernel));
            assert_eq!(found.unwrap_or_else(|error| panic!("{point:?}: {error}")), point.cycles.len());
        }
    }
}
