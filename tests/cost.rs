//! The points that the models of cost are fitted to: recorded from libtpu, fitted, and held against the models.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pagoda_engine::certify::Certifier;
use pagoda_engine::certify::batch::{Launch, cycles_of_launches};
use pagoda_engine::check::compile::{Cached, user_cache};
use pagoda_engine::pjrt::{Kind, PluginChoice};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::cost::{self, Family, FamilyWeights, Point, Ranking, Table, Weights};
use pagoda_kernels::matmul::Matmul;
use pagoda_kernels::random::{Lengths, batch_text};
use pagoda_kernels::rpa::Rpa;
use pagoda_kernels::{Choices, Kernel, Options, Plan, Problem};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Records points for `PAGODA_COST_SECONDS` (default 600): first what the planner would choose today for points on record, then
/// drawn problems, from the seed `PAGODA_COST_SEED` (default 1) on, of the kernel `PAGODA_COST_KERNEL` if it is given, and of
/// those whose specification has all parts of `PAGODA_COST_ONLY` (`"kv_heads":1;"q":"bf16"`). The table is written after every
/// problem; a run that was stopped goes on where it was.
#[test]
#[ignore = "an hour of compilations by libtpu"]
fn record() {
    let started = Instant::now();
    let mut recorder = Recorder::new();
    let is_time = || started.elapsed().as_secs() < number("PAGODA_COST_SECONDS", 600);
    for (chip, kernel, spec) in recorder.table.problems() {
        if is_time() {
            match kernel.as_str() {
                Rpa::NAME => recorder.complete::<Rpa>(chip, &spec),
                _ => recorder.complete::<Matmul>(chip, &spec),
            }
        }
    }
    let mut seed = number("PAGODA_COST_SEED", 1);
    while is_time() {
        for chip in [Chip::V5p, Chip::V6e] {
            recorder.draw::<Rpa>(chip, seed);
            recorder.draw::<Matmul>(chip, seed);
        }
        seed += 1;
    }
}

/// Records all candidates of the points on record anew, after a change of the kernel: those of `PAGODA_COST_KERNEL` and
/// `PAGODA_COST_ONLY`, as [`record`] has them, and of batches with a part `PAGODA_COST_BATCH` (`1/2000`). What the compiler has
/// seen costs nothing.
#[test]
#[ignore = "an hour of compilations by libtpu"]
fn renew() {
    let mut recorder = Recorder::new();
    let batch = std::env::var("PAGODA_COST_BATCH").unwrap_or_default();
    for point in recorder.table.0.clone() {
        let of = point.batch.as_deref().map_or(String::new(), batch_text);
        if !is_wanted(&point.kernel, &point.spec) || !of.contains(&batch) {
            continue;
        }
        match point.kernel.as_str() {
            Rpa::NAME => recorder.renew::<Rpa>(&point),
            _ => recorder.renew::<Matmul>(&point),
        }
    }
}

/// Whether a problem is one of those that the environment asks for.
fn is_wanted(kernel: &str, spec: &serde_json::Value) -> bool {
    let parts = std::env::var("PAGODA_COST_ONLY").unwrap_or_default();
    let spec = spec.to_string();
    std::env::var("PAGODA_COST_KERNEL").map_or(true, |only| only == kernel)
        && parts.split(';').all(|part| spec.contains(part))
}

/// The table of points, in its file.
struct Points(Vec<Point>);

impl Points {
    fn path() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/tuned/cost.json")
    }

    fn read() -> Self {
        Self(serde_json::from_slice(&std::fs::read(Self::path()).unwrap()).unwrap())
    }

    fn write(&self) {
        let lines: Vec<_> = self.0.iter().map(|point| serde_json::to_string(point).unwrap()).collect();
        let partial = Self::path().with_extension("partial");
        std::fs::write(&partial, format!("[\n{}\n]\n", lines.join(",\n"))).unwrap();
        std::fs::rename(partial, Self::path()).unwrap();
    }

    /// The problems on record, each once.
    fn problems(&self) -> Vec<(Chip, String, serde_json::Value)> {
        let mut problems: Vec<(Chip, String, serde_json::Value)> = Vec::new();
        for point in &self.0 {
            let of = (point.chip, point.kernel.clone(), point.spec.clone());
            if !problems.contains(&of) {
                problems.push(of);
            }
        }
        problems
    }
}

struct Recorder {
    table: Points,
    compiler: Cached,
}

/// A batch, and the tiles that are to be compiled for it.
type Asked<K> = (Option<Vec<Lengths>>, Vec<<K as Kernel>::Tiles>);

impl Recorder {
    fn new() -> Self {
        let library = PluginChoice::Named(Kind::Tpu).locate().expect("make tpu-tools").path;
        let patient = Duration::from_secs(1800);
        let certifier =
            Certifier::new(env!("CARGO_BIN_EXE_pagoda"), &library).timeout(patient).profile_timeout(patient);
        let compiler = Cached::new(certifier, &library, &user_cache().unwrap().join("kernels")).unwrap();
        Self { table: Points::read(), compiler }
    }

    /// The candidates of a point, compiled again.
    fn renew<K: Kernel>(&mut self, point: &Point) {
        let plans = point.plans::<K>().expect("legal");
        let Some((plan, _)) = plans.first() else { return };
        let tiles = plans.iter().map(|(plan, _)| plan.tiles()).collect();
        self.compile::<K>(plan.problem(), point.chip, point.limit, vec![(point.batch.clone(), tiles)]);
    }

    /// One problem, two batches of its spread, a few candidates: the planner's, those that the model finds best for each batch,
    /// and one of the others. Of a kernel without batches, those that the model finds best, and ever fewer of the others.
    fn draw<K: Kernel>(&mut self, chip: Chip, seed: u64) {
        const MOST: usize = 4;
        const BATCHES: usize = 2;
        let Some(spec) = K::workload(&mut Choices::of_seed(seed)) else { return };
        let problem = Problem::new(spec).expect("a workload is a problem");
        let spec = serde_json::to_value(problem.spec()).unwrap();
        let is_known = |of: &Point| of.chip == chip && of.kernel == K::NAME && of.spec == spec;
        let Ok(chosen) = Plan::<K>::new(problem.clone(), chip, Options::default()) else { return };
        if !is_wanted(K::NAME, &spec) || self.table.0.iter().any(is_known) {
            return;
        }
        let spread = K::spread(&problem).into_iter().map(|(_, batch)| Some(batch));
        let mut batches: Vec<Option<Vec<Lengths>>> = if spread.len() == 0 { vec![None] } else { spread.collect() };
        let turned = seed as usize % batches.len();
        batches.rotate_left(turned);
        batches.truncate(BATCHES);
        let mut tiles = vec![chosen.tiles()];
        let mut add = |of: K::Tiles| {
            if !tiles.contains(&of) {
                tiles.push(of);
            }
        };
        let all = |batch: &Option<Vec<Lengths>>| {
            let over: Vec<_> = batch.iter().cloned().collect();
            Plan::<K>::all(&problem, chip, None, &over).expect("there are plans")
        };
        let any = all(&None);
        add(any[seed as usize % any.len()].tiles());
        batches.iter().for_each(|batch| add(all(batch)[0].tiles()));
        if batches == [None] {
            [0, 1, 2, 4, 7, 12, 20, 33, 54].iter().filter_map(|&at| any.get(at)).for_each(|plan| add(plan.tiles()));
        } else {
            any.iter().take(MOST).for_each(|plan| add(plan.tiles()));
            tiles.truncate(MOST);
        }
        let asked = batches.iter().map(|batch| (batch.clone(), tiles.clone())).collect();
        self.compile::<K>(&problem, chip, chosen.limit(), asked);
    }

    /// What the model finds best today for each batch of a problem on record.
    fn complete<K: Kernel>(&mut self, chip: Chip, spec: &serde_json::Value) {
        let of_spec: K::Spec = serde_json::from_value(spec.clone()).unwrap();
        let problem = Problem::new(of_spec).expect("a problem on record");
        let points = self.table.0.iter().filter(|of| of.chip == chip && of.kernel == K::NAME && of.spec == *spec);
        let mut limit = None;
        let asked = points.map(|point| {
            limit = Some(point.limit);
            let batches: Vec<_> = point.batch.iter().cloned().collect();
            let options = Options { tiles: None, vmem_limit: limit };
            let chosen = Plan::<K>::over(problem.clone(), chip, options, &batches).expect("a plan").tiles();
            let is_known = point.cycles.contains_key(&chosen.to_string());
            (point.batch.clone(), if is_known { vec![] } else { vec![chosen] })
        });
        let asked = asked.collect();
        self.compile::<K>(&problem, chip, limit.expect("a point"), asked);
    }

    /// Has tiles compiled for batches of a problem, and adds what came of it.
    fn compile<K: Kernel>(
        &mut self,
        problem: &Problem<K::Spec>,
        chip: Chip,
        limit: pagoda_kernels::vmem::Bytes,
        asked: Vec<Asked<K>>,
    ) {
        let plan = |tiles: K::Tiles| -> Plan<K> {
            let options = Options { tiles: Some(tiles), vmem_limit: Some(limit) };
            Plan::<K>::new(problem.clone(), chip, options).expect("a candidate is legal")
        };
        let launches: Vec<Launch<K>> = asked
            .iter()
            .flat_map(|(batch, tiles)| tiles.iter().map(move |&tiles| (plan(tiles), batch.as_deref())))
            .collect();
        if launches.is_empty() {
            return;
        }
        let started = Instant::now();
        let mut cycles = cycles_of_launches(&launches, &self.compiler).expect("the compiler").into_iter();
        let compiler = std::fs::read_to_string(".pagoda/plugins/libtpu.version").unwrap_or_default().trim().to_owned();
        let spec = serde_json::to_value(problem.spec()).unwrap();
        for (batch, tiles) in &asked {
            let new: BTreeMap<String, u64> =
                tiles.iter().filter_map(|tiles| Some((tiles.to_string(), cycles.next()??))).collect();
            let known =
                |of: &&mut Point| of.chip == chip && of.kernel == K::NAME && of.spec == spec && of.batch == *batch;
            match self.table.0.iter_mut().find(known) {
                Some(point) => point.cycles.extend(new),
                None if new.len() > 1 => self.table.0.push(Point {
                    kernel: K::NAME.into(),
                    chip,
                    spec: spec.clone(),
                    limit,
                    batch: batch.clone(),
                    cycles: new,
                    compiler: compiler.clone(),
                }),
                None => {}
            }
        }
        eprintln!(
            "{} {chip}: {} launches in {:.0} s, {} points | {}",
            K::NAME,
            launches.len(),
            started.elapsed().as_secs_f64(),
            self.table.0.len(),
            K::describe(problem)
        );
        self.table.write();
    }
}

/// Fits the weights to all points on record, and writes them.
#[test]
#[ignore = "writes kernels/tuned/cost_weights.json"]
fn fit() {
    let table = fitted(&Points::read().0);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/tuned/cost_weights.json");
    std::fs::write(path, serde_json::to_string_pretty(&table).unwrap() + "\n").unwrap();
}

/// The table of weights that fit some points.
fn fitted(points: &[Point]) -> Table {
    // What no point speaks of stays as it is.
    let mut table = cost::table();
    for (family, chip, weights) in fitted_of::<Rpa>(points).into_iter().chain(fitted_of::<Matmul>(points)) {
        let units: Vec<String> = family.units.iter().map(|&unit| unit.to_owned()).collect();
        let of = table.entry(family.name.to_owned()).or_insert(FamilyWeights { units, chips: BTreeMap::new() });
        // Four digits are more than the estimate has.
        let round = |weight: f64| format!("{weight:.3e}").parse().expect("a number");
        of.chips.insert(chip, weights.of_units(family).into_iter().map(round).collect());
    }
    table
}

fn fitted_of<K: Kernel>(points: &[Point]) -> Vec<(&'static Family, Chip, Weights)> {
    let fit = |((family, chip), of): ((&'static Family, Chip), Vec<_>)| {
        let prior = cost::weights(family, chip).copied().unwrap_or_default();
        (family, chip, Weights::fit(&of, &prior))
    };
    cost::launches::<K>(points).into_iter().map(fit).collect()
}

/// The models rank what is on record: how many first choices cost at most 5% more than the best, and the mean correlation, are
/// held, so that a change of a kernel or of its model that makes them worse shows.
#[test]
fn models_rank_the_points_on_record() {
    for (name, rankings) in [("rpa", rankings::<Rpa>()), ("matmul", rankings::<Matmul>())] {
        let near = rankings.iter().filter(|of| of.ranking.regret <= 1.05).count();
        assert!(near * 10 >= rankings.len() * 9, "{name}: {near} first choices of {} within 5%", rankings.len());
        // The order of candidates that take as long, as where memory decides, says nothing of a model.
        let apart: Vec<_> = rankings.iter().filter(|of| of.spread > 1.02).map(|of| of.ranking.correlation).collect();
        let mean = apart.iter().sum::<f64>() / apart.len() as f64;
        assert!(mean > 0.6, "{name}: mean rank correlation {mean} of {} points", apart.len());
    }
}

struct Ranked {
    ranking: Ranking,
    /// What the slowest candidate takes, by what the fastest does.
    spread: f64,
}

fn rankings<K: Kernel>() -> Vec<Ranked> {
    let of_kernel = cost::points().iter().filter(|point| point.kernel == K::NAME);
    let ranked = of_kernel.filter_map(|point| {
        let plans = point.plans::<K>().expect("kernels/src/cost.rs checks it");
        let modelled = plans
            .iter()
            .filter_map(|(plan, cycles)| Some((K::model(plan, point.batch.as_deref())?, point.counted(plan, *cycles))));
        let modelled: Vec<_> = modelled.collect();
        println!("{} {} {}", point.chip, plans[0].0.name(), point.batch.as_deref().map_or(String::new(), batch_text));
        for ((plan, _), (model, cycles)) in plans.iter().zip(&modelled) {
            println!("    {:>8}  {model:>9.0} modelled, {cycles:>9} cycles", plan.tiles().to_string());
        }
        let ranking = Ranking::of(&modelled)?;
        println!("    correlation {:.2}, regret {:.3}", ranking.correlation, ranking.regret);
        let cycles = modelled.iter().map(|(_, cycles)| *cycles as f64);
        let (least, most) = cycles.fold((f64::MAX, 0.0), |(least, most): (f64, f64), of| (least.min(of), most.max(of)));
        Some(Ranked { ranking, spread: most / least })
    });
    ranked.collect()
}
