//! The points that the models of cost are fitted to: recorded from libtpu, and held against the models.

use std::collections::BTreeMap;
use std::path::Path;

use pagoda_engine::certify::Certifier;
use pagoda_engine::certify::batch::BatchCycles;
use pagoda_engine::check::compile::{Cached, user_cache};
use pagoda_engine::pjrt::{Kind, PluginChoice};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::cost::{self, Point, Ranking};
use pagoda_kernels::matmul::Matmul;
use pagoda_kernels::random::Lengths;
use pagoda_kernels::rpa::Rpa;
use pagoda_kernels::{Choices, Kernel, Plan, Problem};

const FILE: &str = "kernels/tuned/cost.json";

/// Records drawn problems of a kernel at candidates that are spread over all of them, for `PAGODA_COST_SECONDS` (default 600),
/// from the seed `PAGODA_COST_SEED` (default 1) on. The file is written after every point; points of the seed that it has are kept.
#[test]
#[ignore = "an hour of compilations by libtpu"]
fn record() {
    let number =
        |name: &str, default: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let library = PluginChoice::Named(Kind::Tpu).locate().expect("make tpu-tools").path;
    let certifier = Certifier::new(env!("CARGO_BIN_EXE_pagoda"), &library);
    let compiler = Cached::new(certifier, &library, &user_cache().unwrap().join("kernels")).unwrap();
    let started = std::time::Instant::now();
    let mut seed = number("PAGODA_COST_SEED", 1);
    while started.elapsed().as_secs() < number("PAGODA_COST_SECONDS", 600) {
        for chip in [Chip::V5p, Chip::V6e] {
            point::<Rpa>(chip, seed, &compiler);
            point::<Matmul>(chip, seed, &compiler);
        }
        seed += 1;
    }
}

/// One problem, one batch, a few candidates.
fn point<K: Kernel>(chip: Chip, seed: u64, compiler: &Cached) {
    const CANDIDATES: usize = 6;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE);
    let Some(spec) = K::workload(&mut Choices::of_seed(seed)) else { return };
    let problem = Problem::new(spec).expect("a workload is a problem");
    let mut batches = K::spread(&problem);
    let batch: Option<Vec<Lengths>> =
        (!batches.is_empty()).then(|| batches.swap_remove(seed as usize % batches.len()).1);
    let Ok(plans) = Plan::<K>::all(&problem, chip, None, batch.as_deref()) else { return };
    let mut points: Vec<Point> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let spec = serde_json::to_value(problem.spec()).unwrap();
    if points.iter().any(|of| of.chip == chip && of.kernel == K::NAME && of.spec == spec && of.batch == batch) {
        return;
    }
    // The planner's choice, and others at equal distances.
    let chosen = Plan::<K>::new(problem.clone(), chip, pagoda_kernels::Options::default()).expect("there are plans");
    let step = plans.len().div_ceil(CANDIDATES).max(1);
    let others = plans.iter().step_by(step).filter(|plan| plan.tiles() != chosen.tiles());
    let mut cycles = BTreeMap::new();
    for plan in std::iter::once(&chosen).chain(others) {
        if let Ok((of, _)) = BatchCycles::of_launch(plan, batch.as_deref(), compiler)
            && let Some(device) = of.device_cycles
        {
            cycles.insert(plan.tiles().to_string(), device);
        }
    }
    eprintln!("{} {chip} {seed}: {cycles:?}", K::NAME);
    if cycles.len() < 2 {
        return;
    }
    let compiler = std::fs::read_to_string(".pagoda/plugins/libtpu.version").unwrap_or_default().trim().to_owned();
    points.push(Point { kernel: K::NAME.into(), chip, spec, limit: chosen.limit(), batch, cycles, compiler });
    let lines: Vec<_> = points.iter().map(|point| serde_json::to_string(point).unwrap()).collect();
    let partial = path.with_extension("partial");
    std::fs::write(&partial, format!("[\n{}\n]\n", lines.join(",\n"))).unwrap();
    std::fs::rename(partial, path).unwrap();
}

/// The models rank what is on record: the worst regret and the mean correlation are held, so that a change of a kernel or of
/// its model that makes them worse shows.
#[test]
fn models_rank_the_points_on_record() {
    for (name, rankings) in [("rpa", rankings::<Rpa>()), ("matmul", rankings::<Matmul>())] {
        if rankings.is_empty() {
            continue;
        }
        let mean = rankings.iter().map(|of| of.correlation).sum::<f64>() / rankings.len() as f64;
        assert!(mean > 0.5, "{name}: mean rank correlation {mean} of {} points", rankings.len());
    }
}

fn rankings<K: Kernel>() -> Vec<Ranking> {
    let of_kernel = cost::points().iter().filter(|point| point.kernel == K::NAME);
    let ranked = of_kernel.filter_map(|point| {
        let plans = point.plans::<K>().expect("kernels/src/cost.rs checks it");
        let modelled =
            plans.iter().filter_map(|(plan, cycles)| Some((K::model(plan, point.batch.as_deref())?, *cycles)));
        Ranking::of(&modelled.collect::<Vec<_>>())
    });
    ranked.collect()
}
