//! Every kernel of the registry on the tile machine against its f64 reference: random problems, random legal tiles, random
//! inputs, every order of DMAs; one case in ten goes through the StableHLO form on the CPU plugin too.
//!
//! A failure shrinks and ends in the line that runs it again: `pagoda run ... --check-against reference`.

use std::{error::Error, process};

use pagoda_engine::pjrt::{Client, Plugin, PluginChoice};
use pagoda_ir::{Context, Element, HostTensor, stablehlo::Module};
use pagoda_kernels::{
    Case, CheckError, Drawn, Kernel, Plan, Problem, Runner,
    check::check_kernel,
    check_mosaic,
    chips::Chip,
    matmul::{self, Activation, Epilogue, Layout, Matmul},
    plan::Options,
    random::{Lengths, batch_text},
    rpa::{self, Kind, Precision, Rotary, Rpa},
    strategies::{self, RngSeed, drawn},
};
use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::{Config, TestRunner},
};

/// What follows `pagoda` to check the case again.
fn command<K: Kernel>(case: &Drawn<K>) -> String {
    let (plan, kernel) = (&case.plan, K::NAME);
    let spec = serde_json::to_string(plan.problem().spec()).expect("a specification is JSON");
    let lengths = case.batch.as_ref().map_or(String::new(), |batch| format!(" --lengths {}", batch_text(batch)));
    let (tiles, chip, limit) = (plan.tiles(), plan.chip(), plan.limit().0);
    let plan = format!("--tiles {tiles} --chip {chip} --vmem-limit {limit}");
    format!("run {kernel} --spec '{spec}' {plan}{lengths} --random {} --check-against reference", case.seed)
}

/// Compiles and runs every module once.
struct Cpu(Client);

impl Cpu {
    fn new() -> Self {
        let plugin = Plugin::load(&PluginChoice::parse("cpu").unwrap()).expect("the CPU plugin: run `make setup`");
        Self(plugin.client(1).unwrap())
    }
}

impl Runner for Cpu {
    fn run(&self, module: &Module, inputs: &[HostTensor]) -> Result<Vec<HostTensor>, Box<dyn Error + Send + Sync>> {
        Ok(self.0.compile(module.text(), 1)?.call(inputs)?)
    }
}

/// Checks `cases` cases.
fn property<K: Kernel>(cases: u32, rng_seed: RngSeed) {
    let cpu = Cpu::new();
    drawn::<K>(cases, rng_seed, |case| {
        let stablehlo = case.seed.is_multiple_of(10).then_some(&cpu as &dyn Runner);
        case.check(stablehlo).map(drop).map_err(|error| {
            let on = if case.check(None).is_ok() { "--plugin cpu" } else { "--dma all" };
            format!("{error}\nagain: pagoda {} {on}", command(case))
        })
    });
}

/// The same cases every time.
const ALWAYS: RngSeed = RngSeed::Fixed(1);

/// The line that a failure ends in runs the same kernel on the same inputs.
fn a_line_runs_a_case_again<K: Kernel>() {
    let mut runner = TestRunner::new(Config { rng_seed: ALWAYS, ..Config::default() });
    for _ in 0..3 {
        let case = Drawn::<K>::new(strategies::choices().new_tree(&mut runner).expect("a case").current());
        let run = case.check(None).unwrap_or_else(|error| panic!("{error}"));
        let output = run.outputs[0].to_f64();
        for (on, counters) in [("--dma all", Some(run.counters)), ("--plugin cpu", None)] {
            let line = format!("{} {on} --json", command(&case));
            let words = shlex::split(&line).expect("quotes are closed");
            let output_of = process::Command::new(env!("CARGO_BIN_EXE_pagoda")).args(words).output().unwrap();
            assert!(output_of.status.success(), "pagoda {line}\n{}", String::from_utf8_lossy(&output_of.stderr));
            let report: serde_json::Value = serde_json::from_slice(&output_of.stdout).unwrap();
            assert_eq!(report[0]["check"]["agrees"], true, "pagoda {line}\n{report}");
            if let Some(counters) = counters {
                let largest = output.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                assert_eq!(report[0]["counters"], serde_json::to_value(counters).unwrap(), "pagoda {line}");
                // Outputs are f32 at most; JSON's readers round the last bit of f64.
                let max = report[0]["outputs"][0]["max"].as_f64().map(|max| max as f32);
                assert_eq!(max, Some(largest as f32), "pagoda {line}");
            }
        }
    }
}

macro_rules! tests {
    ($($name:ident: $kernel:ty,)*) => {
        $(mod $name {
            use super::super::*;

            #[test]
            fn agrees_with_the_reference() {
                property::<$kernel>(250, ALWAYS);
            }

            #[test]
            #[ignore = "minutes of CPU, other cases every time: `make nightly`"]
            fn agrees_with_the_reference_on_5000_other_cases() {
                property::<$kernel>(5_000, RngSeed::Random);
            }

            #[test]
            fn a_line_runs_a_case_again() {
                super::super::a_line_runs_a_case_again::<$kernel>();
            }

            /// Planted faults are caught by name; unmutated, nothing is reported.
            #[test]
            fn mutants_are_caught() {
                let sets = <$kernel>::mutants();
                assert!(sets.iter().any(|set| !set.mutants.is_empty()), "no mutant is listed");
                assert!(sets.iter().any(|set| set.superfluous.is_some()), "no effect is dropped");
                for set in sets {
                    set.check().unwrap_or_else(|wrong| panic!("{wrong}"));
                }
            }
        })*
    };
}
mod each {
    pagoda_kernels::for_each_kernel!(tests);
}

/// Sizes that random cases do not reach, in the tiles that the planner chooses: several chunks to a tile, long contexts.
#[test]
fn planned_tiles_agree_with_the_reference() {
    fn agrees<K: Kernel>(spec: K::Spec, batch: Option<&[Lengths]>, options: Options<K::Tiles>) {
        let problem = Problem::new(spec).unwrap();
        let inputs = K::draw(&problem, batch, 1).unwrap();
        for chip in [Chip::V4, Chip::V6e] {
            let plan = Plan::<K>::new(problem.clone(), chip, options).unwrap();
            check_mosaic(Case::new(&plan, &inputs), 1, None).unwrap_or_else(|error| panic!("{chip}: {error}"));
        }
    }
    use Element::{Bf16, F32};
    let gated = Epilogue { activation: Activation::SiluGate, ..Epilogue::NONE };
    for (sizes, input, output, layout, epilogue) in [
        ([700, 900, 650], Bf16, Bf16, Layout::RowMajor, Epilogue::NONE),
        ([300, 520, 300], F32, F32, Layout::WeightTransposed, Epilogue { residual: true, ..Epilogue::NONE }),
        ([8, 2048, 1024], Bf16, F32, Layout::RowMajor, gated),
        ([16, 1024, 768], Bf16, Bf16, Layout::FeatureMajor, gated),
    ] {
        let [m, k, n] = sizes;
        let spec = matmul::Spec { m, k, n, input, output, layout, epilogue, layers: 1, quantized: None };
        agrees::<Matmul>(spec, None, Options::default());
    }
    let lengths = [(1, 1280), (150, 700), (30, 30), (1, 129)].map(|(q_len, kv_len)| Lengths { q_len, kv_len });
    for (element, head_dim) in [(Bf16, 128), (F32, 64)] {
        let spec = rpa::Spec {
            kind: Kind::Mixed,
            precision: Precision::uniform(element),
            tokens: 200,
            q_heads: 8,
            kv_heads: 2,
            head_dim,
            page_size: 128,
            pages: 40,
            layers: 1,
            max_seqs: 4,
            pages_per_seq: 10,
            scale: (head_dim as f64).powf(-0.5),
            sliding_window: None,
            soft_cap: None,
            ..rpa::Spec::default()
        };
        agrees::<Rpa>(spec.clone(), Some(&lengths), Options::default());
        // New tokens wait in a buffer of KV blocks each, or all in the first one.
        for (kv_heads, kv_pages) in [(2, 1), (8, 10)] {
            let tiles = Some(rpa::plan::Tiles { queries: 64, kv_pages });
            let spec = rpa::Spec { kv_heads, fused: Some(Rotary::HalfSplit), ..spec.clone() };
            agrees::<Rpa>(spec, Some(&lengths), Options { tiles, vmem_limit: None });
        }
    }
}

/// The compiler's cycles are those of kernels of one batch: they must do what the kernel of any batch does.
#[test]
fn a_kernel_of_one_batch_does_the_same() {
    drawn::<Rpa>(60, ALWAYS, |case| {
        let check = || {
            let context = Context::new();
            let batch = rpa::Batch::of(case.plan.problem(), &case.inputs).expect("a batch");
            let kernel = rpa::mosaic::kernel_of_batch(&context, &case.plan, &batch)?;
            check_kernel(case.case(), &kernel, 1)
        };
        let failed = |error: CheckError| format!("{error}\nthe kernel of the batch of pagoda {}", command(case));
        check().map(drop).map_err(failed)
    });
}
