//! The Mosaic kernels on the tile machine against the f64 reference: random problems, random legal tiles, random ragged
//! batches, every order of copies; one case in ten goes through the StableHLO form on the CPU plugin too.
//!
//! A failure shrinks and ends in the line that runs it again: `pagoda run ... --check-against reference`.

use std::{error::Error, process};

use pagoda_engine::pjrt::{Client, Plugin, PluginChoice};
use pagoda_ir::{
    Context, Element, HostTensor,
    stablehlo::Module,
    tile_machine::{Program, Run},
};
use pagoda_kernels::{
    CheckError, MosaicCase, Runner,
    check::check_program,
    check_mosaic,
    chips::Chip,
    matmul::{self, Activation, Epilogue, Layout},
    random::{self, Lengths},
    rpa::{self, Kind},
    vmem::Bytes,
};
use proptest::{
    prelude::*,
    sample::select,
    strategy::ValueTree,
    test_runner::{Config, RngSeed, TestError, TestRunner},
};

/// A case as it is drawn, shrunk and printed.
#[derive(Clone, Debug)]
enum Case {
    Matmul(Matmul),
    Rpa(Rpa),
}

#[derive(Clone, Debug)]
struct Matmul {
    chip: Chip,
    /// m, k, n.
    sizes: [usize; 3],
    tiles: matmul::plan::Tiles,
    layout: usize,
    bf16_in: bool,
    bf16_out: bool,
    bias: bool,
    gate: bool,
    residual: bool,
    seed: u64,
}

#[derive(Clone, Debug)]
struct Rpa {
    chip: Chip,
    bf16: bool,
    decode: bool,
    tokens: usize,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    page_size: usize,
    pages_per_seq: usize,
    layers: usize,
    window: Option<usize>,
    soft_cap: Option<f64>,
    tiles: rpa::plan::Tiles,
    /// Query rows and keys of each sequence, cut to what is left.
    lengths: Vec<(usize, usize)>,
    seed: u64,
}

impl Case {
    /// Gives the case with its plan and inputs to `see`.
    fn with<R>(&self, see: impl FnOnce(MosaicCase) -> R) -> R {
        match self {
            Self::Matmul(case) => {
                let plan = case.plan();
                see(MosaicCase::Matmul(&plan, &random::matmul_inputs(plan.problem(), case.seed)))
            }
            Self::Rpa(case) => {
                let plan = case.plan();
                let lengths: Vec<_> = case.lengths.iter().map(|&(q_len, kv_len)| Lengths { q_len, kv_len }).collect();
                let layer = random::layer_of(plan.problem(), case.seed);
                see(MosaicCase::Rpa(&plan, &random::rpa_inputs_of(plan.problem(), &lengths, layer, case.seed)))
            }
        }
    }

    fn check(&self, stablehlo: Option<&dyn Runner>) -> Result<Run, CheckError> {
        self.with(|case| check_mosaic(case, self.seed(), stablehlo))
    }

    fn seed(&self) -> u64 {
        match self {
            Self::Matmul(case) => case.seed,
            Self::Rpa(case) => case.seed,
        }
    }

    /// What follows `pagoda` to check the case again.
    fn command(&self) -> String {
        let dtype = |bf16| if bf16 { "bf16" } else { "f32" };
        let optional =
            |words: &str, value: Option<String>| value.map_or(String::new(), |value| format!(" {words} {value}"));
        let (kernel, tiles, chip) = match self {
            Self::Matmul(case) => {
                let &Matmul { sizes: [m, k, n], bf16_in, bf16_out, .. } = case;
                let layout = ["row-major", "weight-transposed", "feature-major"][case.layout];
                let flags = [(" --bias", case.bias), (" --silu-gate", case.gate), (" --residual", case.residual)];
                let flags: String = flags.into_iter().filter(|(_, set)| *set).map(|(flag, _)| flag).collect();
                let types = format!("--dtype {} --out-dtype {}", dtype(bf16_in), dtype(bf16_out));
                let kernel = format!("matmul --m {m} --n {n} --k {k} {types} --layout {layout}{flags}");
                (kernel, case.tiles.to_string(), case.chip)
            }
            Self::Rpa(case) => {
                let &Rpa { tokens, kv_heads, group, head_dim, page_size, pages_per_seq, layers, .. } = case;
                let q = format!("--q {tokens}x{}x{head_dim} --kv-heads {kv_heads}", kv_heads * group);
                let max_seqs = case.lengths.len().max(1);
                let pages = format!("--page-size {page_size} --max-seq-len {}", page_size * pages_per_seq);
                let window = optional("--sliding-window", case.window.map(|window| window.to_string()));
                let cap = optional("--soft-cap", case.soft_cap.map(|cap| cap.to_string()));
                let decode = if case.decode { " --decode" } else { "" };
                // As they are once they are cut to what there is.
                let lengths = self.with(|case| match case {
                    MosaicCase::Rpa(_, inputs) => {
                        let of = |sequence: rpa::Sequence| format!("{}/{}", sequence.q_len, sequence.kv_len);
                        inputs.batch.sequences().map(of).collect::<Vec<_>>().join(",")
                    }
                    MosaicCase::Matmul(..) => String::new(),
                });
                let lengths = if lengths.is_empty() { "none" } else { &lengths };
                let options = format!("--dtype {}{window}{cap}{decode} --lengths {lengths}", dtype(case.bf16));
                let kernel = format!("rpa {q} {pages} --layers {layers} --max-seqs {max_seqs} {options}");
                (kernel, case.tiles.to_string(), case.chip)
            }
        };
        let limit = chip.info().vmem_per_core.as_mib();
        let plan = format!("--tiles {tiles} --chip {chip} --vmem-limit {limit}MiB");
        format!("run {kernel} {plan} --random {} --check-against reference", self.seed())
    }
}

/// All of the chip's VMEM: whether tiles fit the default limit is not the question here.
fn whole_vmem(chip: Chip) -> Option<Bytes> {
    Some(chip.info().vmem_per_core)
}

fn element(bf16: bool) -> Element {
    if bf16 { Element::Bf16 } else { Element::F32 }
}

impl Matmul {
    fn plan(&self) -> matmul::plan::Plan {
        let &Self { sizes: [m, k, n], bias, residual, .. } = self;
        let layout = [Layout::RowMajor, Layout::WeightTransposed, Layout::FeatureMajor][self.layout];
        let activation = if self.gate { Activation::SiluGate } else { Activation::Identity };
        let (input, output) = (element(self.bf16_in), element(self.bf16_out));
        let epilogue = Epilogue { bias, activation, residual };
        let problem = matmul::Problem::new(matmul::Spec { m, k, n, input, output, layout, epilogue });
        let options = matmul::plan::Options { tiles: Some(self.tiles), vmem_limit: whole_vmem(self.chip) };
        matmul::plan::Plan::new(problem.expect("a valid problem"), self.chip, options).expect("legal tiles")
    }
}

impl Rpa {
    fn plan(&self) -> rpa::plan::Plan {
        let problem = rpa::Problem::new(rpa::Spec {
            kind: if self.decode { Kind::Decode } else { Kind::Mixed },
            element: element(self.bf16),
            tokens: self.tokens,
            q_heads: self.kv_heads * self.group,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            page_size: self.page_size,
            pages: self.lengths.len().max(1) * self.pages_per_seq,
            layers: self.layers,
            max_seqs: self.lengths.len().max(1),
            pages_per_seq: self.pages_per_seq,
            scale: (self.head_dim as f64).powf(-0.5),
            sliding_window: self.window,
            soft_cap: self.soft_cap,
        });
        let options = rpa::plan::Options { tiles: Some(self.tiles), vmem_limit: whole_vmem(self.chip) };
        rpa::plan::Plan::new(problem.expect("a valid problem"), self.chip, options).expect("legal tiles")
    }
}

/// Edges along every dimension, whole dimensions, blocks that divide.
fn matmuls() -> impl Strategy<Value = Case> {
    let sizes = (1_usize..=72, 1_usize..=400, 1_usize..=300);
    let units = (0_usize..=4, 0_usize..=3, 0_usize..=3);
    let types = (0_usize..3, any::<bool>(), any::<bool>());
    let fused = (any::<bool>(), any::<bool>(), any::<bool>());
    (select(Chip::ALL.to_vec()), sizes, units, types, fused, any::<u64>()).prop_map(
        |(chip, (m, k, n), units, (layout, bf16_in, bf16_out), (bias, gate, residual), seed)| {
            let feature_major = layout == 2;
            let (unit_m, unit_n) = if feature_major { (128, 8) } else { (8, 128) };
            // A gated weight is cut where the ups begin: its blocks divide n.
            let n = if gate { n.next_multiple_of(unit_n) } else { n };
            // A few units of a dimension, or all of it.
            let tile = |size: usize, unit: usize, units: usize| match units * unit {
                tile if tile > 0 && tile < size => tile,
                _ => size,
            };
            let mut tiles = matmul::plan::Tiles {
                m: tile(m, unit_m, units.0),
                n: tile(n, unit_n, units.1),
                k: tile(k, 128, units.2),
            };
            if gate && !n.is_multiple_of(tiles.n) {
                tiles.n = unit_n;
            }
            let sizes = [m, k, n];
            Case::Matmul(Matmul { chip, sizes, tiles, layout, bf16_in, bf16_out, bias, gate, residual, seed })
        },
    )
}

/// Empty sequences, decode rows, chunks at the end of a longer context, whole prompts; full and partial pages.
fn lengths() -> impl Strategy<Value = (usize, usize)> {
    let most = 10_000; // cut to what the case has
    let q_len = prop_oneof![1 => Just(0), 3 => Just(1), 4 => 2_usize..=40, 1 => Just(most)];
    let kv_len = prop_oneof![1 => Just(0), 6 => 1_usize..=200, 1 => Just(most)];
    // Keys beyond the whole pages.
    (q_len, kv_len, prop_oneof![Just(None), Just(Some(0)), Just(Some(1))])
        .prop_map(|(q_len, kv_len, beyond)| (q_len, kv_len * 4 + beyond.map_or(3, |beyond| 4 * beyond)))
}

fn attentions() -> impl Strategy<Value = Case> {
    let heads = (select(vec![1_usize, 2, 3, 4, 8]), 1_usize..=8, select(vec![64_usize, 80, 128, 256]));
    let pages = (select(vec![1_usize, 7, 8, 16, 32, 64, 128]), 1_usize..=4);
    let options =
        (any::<bool>(), any::<bool>(), 1_usize..=3, prop::option::of(1_usize..100), prop::option::of(1_u8..30));
    let tiles = (0_usize..8, 0_usize..4);
    let batch = (prop::collection::vec(lengths(), 0..=5), 1_usize..=40);
    (select(Chip::ALL.to_vec()), heads, pages, options, tiles, batch, any::<u64>()).prop_map(
        |(chip, (kv_heads, group, head_dim), (page_size, pages_per_seq), options, tiles, (lengths, tokens), seed)| {
            let (bf16, decode, layers, window, soft_cap) = options;
            // Wide heads of many are slow and show nothing that fewer do not.
            let group = if kv_heads * group * head_dim > 4096 { 1 } else { group };
            let most = page_size * pages_per_seq;
            let lengths =
                lengths.iter().map(|&(q_len, kv_len)| (q_len.min(if decode { 1 } else { tokens }), kv_len.min(most)));
            let tiles = rpa::plan::Tiles {
                queries: 8 * (1 + tiles.0 % tokens.div_ceil(8)),
                kv_pages: 1 + tiles.1 % pages_per_seq,
            };
            Case::Rpa(Rpa {
                chip,
                bf16,
                decode,
                tokens,
                kv_heads,
                group,
                head_dim,
                page_size,
                pages_per_seq,
                layers,
                window,
                soft_cap: soft_cap.map(f64::from),
                tiles,
                lengths: lengths.collect(),
                seed,
            })
        },
    )
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

/// Tests `cases` cases, and shrinks the one that fails.
fn drawn(
    cases: u32,
    rng_seed: RngSeed,
    strategy: impl Strategy<Value = Case>,
    test: impl Fn(Case) -> Result<(), TestCaseError>,
) {
    let config = Config { cases, rng_seed, failure_persistence: None, ..Config::default() };
    match TestRunner::new(config).run(&strategy, test) {
        Ok(()) => {}
        Err(TestError::Fail(reason, _)) => panic!("{reason}"),
        Err(TestError::Abort(reason)) => panic!("{reason}"),
    }
}

/// Checks `cases` cases.
fn property(cases: u32, rng_seed: RngSeed, strategy: impl Strategy<Value = Case>) {
    let cpu = Cpu::new();
    drawn(cases, rng_seed, strategy, |case| {
        let stablehlo = (case.seed() % 10 == 0).then_some(&cpu as &dyn Runner);
        case.check(stablehlo).map(drop).map_err(|error| {
            let on = if case.check(None).is_ok() { "--plugin cpu" } else { "--dma all" };
            TestCaseError::fail(format!("{error}\nagain: pagoda {} {on}", case.command()))
        })
    });
}

/// The same cases every time.
const ALWAYS: RngSeed = RngSeed::Fixed(1);

#[test]
fn matmuls_agree_with_the_reference() {
    property(250, ALWAYS, matmuls());
}

#[test]
fn attentions_agree_with_the_reference() {
    property(250, ALWAYS, attentions());
}

#[test]
#[ignore = "ten minutes of CPU, other cases every time: `make nightly`"]
fn five_thousand_matmuls_agree_with_the_reference() {
    property(5_000, RngSeed::Random, matmuls());
}

#[test]
#[ignore = "ten minutes of CPU, other cases every time: `make nightly`"]
fn five_thousand_attentions_agree_with_the_reference() {
    property(5_000, RngSeed::Random, attentions());
}

/// Sizes that random cases do not reach, in the tiles that the planner chooses: several chunks to a tile, long contexts.
#[test]
fn planned_tiles_agree_with_the_reference() {
    use Element::{Bf16, F32};
    let agrees = |case: MosaicCase, chip: Chip| {
        check_mosaic(case, 1, None).unwrap_or_else(|error| panic!("{chip}: {error}"));
    };
    let gated = Epilogue { activation: Activation::SiluGate, ..Epilogue::NONE };
    for (sizes, input, output, layout, epilogue) in [
        ([700, 900, 650], Bf16, Bf16, Layout::RowMajor, Epilogue::NONE),
        ([300, 520, 300], F32, F32, Layout::WeightTransposed, Epilogue { residual: true, ..Epilogue::NONE }),
        ([8, 2048, 1024], Bf16, F32, Layout::RowMajor, gated),
        ([16, 1024, 768], Bf16, Bf16, Layout::FeatureMajor, gated),
    ] {
        let [m, k, n] = sizes;
        let problem = matmul::Problem::new(matmul::Spec { m, k, n, input, output, layout, epilogue }).unwrap();
        let inputs = random::matmul_inputs(&problem, 1);
        for chip in [Chip::V4, Chip::V6e] {
            let plan = matmul::plan::Plan::new(problem, chip, matmul::plan::Options::default()).unwrap();
            agrees(MosaicCase::Matmul(&plan, &inputs), chip);
        }
    }
    for (element, head_dim) in [(Bf16, 128), (F32, 64)] {
        let problem = rpa::Problem::new(rpa::Spec {
            kind: Kind::Mixed,
            element,
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
        });
        let problem = problem.unwrap();
        let lengths = [(1, 1280), (150, 700), (30, 30), (1, 129)].map(|(q_len, kv_len)| Lengths { q_len, kv_len });
        let inputs = random::rpa_inputs_of(&problem, &lengths, 0, 1);
        for chip in [Chip::V4, Chip::V6e] {
            let plan = rpa::plan::Plan::new(problem.clone(), chip, rpa::plan::Options::default()).unwrap();
            agrees(MosaicCase::Rpa(&plan, &inputs), chip);
        }
    }
}

/// The compiler's cycles are those of kernels of one batch: they must do what the kernel of any batch does.
#[test]
fn a_kernel_of_one_batch_does_the_same() {
    drawn(60, ALWAYS, attentions(), |case| {
        let checked = case.with(|case| {
            let MosaicCase::Rpa(plan, inputs) = case else { unreachable!("attentions are drawn") };
            let context = Context::new();
            let kernel = rpa::mosaic::kernel_of_batch(&context, plan, &inputs.batch)?;
            check_program(case, &Program::decode(kernel.module())?, 1)
        });
        let failed =
            |error| TestCaseError::fail(format!("{error}\nthe kernel of the batch of pagoda {}", case.command()));
        checked.map(|_| ()).map_err(failed)
    });
}

/// The line that a failure ends in runs the same kernel on the same inputs.
#[test]
fn a_line_runs_a_case_again() {
    let mut runner = TestRunner::new(Config { rng_seed: ALWAYS, ..Config::default() });
    for strategy in [matmuls().boxed(), attentions().boxed()] {
        for _ in 0..4 {
            let case = strategy.new_tree(&mut runner).expect("a case").current();
            let run = case.check(None).unwrap_or_else(|error| panic!("{error}"));
            let output = run.outputs[0].to_f64();
            for (on, counters) in [("--dma all", Some(run.counters)), ("--plugin cpu", None)] {
                let line = format!("{} {on} --json", case.command());
                let words = line.split_whitespace();
                let told = process::Command::new(env!("CARGO_BIN_EXE_pagoda")).args(words).output().unwrap();
                assert!(told.status.success(), "pagoda {line}\n{}", String::from_utf8_lossy(&told.stderr));
                let told: serde_json::Value = serde_json::from_slice(&told.stdout).unwrap();
                assert_eq!(told[0]["check"]["agrees"], true, "pagoda {line}\n{told}");
                if let Some(counters) = counters {
                    let largest = output.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    assert_eq!(told[0]["counters"], serde_json::to_value(counters).unwrap(), "pagoda {line}");
                    // Outputs are f32 at most; JSON's readers round the last bit of f64.
                    let max = told[0]["outputs"][0]["max"].as_f64().map(|max| max as f32);
                    assert_eq!(max, Some(largest as f32), "pagoda {line}");
                }
            }
        }
    }
}
