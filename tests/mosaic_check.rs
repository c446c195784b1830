//! The Mosaic kernels on the tile machine against the f64 reference: random problems, random legal tiles, random ragged
//! batches, every order of copies; one case in ten goes through the StableHLO form on the CPU plugin too.
//!
//! A failure shrinks and ends in the line that runs it again: `PAGODA_CASE='...' cargo test --test mosaic_check reproduce`.

use std::{env, error::Error};

use pagoda_engine::pjrt::{Client, Plugin, PluginChoice};
use pagoda_ir::{Element, HostTensor, stablehlo::Module};
use pagoda_kernels::{
    CheckError, MosaicCase, Runner, check_mosaic,
    chips::Chip,
    matmul::{self, Activation, Epilogue, Layout},
    random::{self, Lengths},
    rpa::{self, Kind},
    vmem::Bytes,
};
use proptest::{
    prelude::*,
    sample::select,
    test_runner::{Config, RngSeed, TestError, TestRunner},
};
use serde::{Deserialize, Serialize};

/// A case as it is drawn, shrunk and printed.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Case {
    Matmul(Matmul),
    Rpa(Rpa),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
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

#[derive(Clone, Debug, Serialize, Deserialize)]
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
    /// Which layer the kernel reads.
    layer: usize,
    window: Option<usize>,
    soft_cap: Option<f64>,
    tiles: rpa::plan::Tiles,
    /// Query rows and keys of each sequence, cut to what is left.
    lengths: Vec<(usize, usize)>,
    seed: u64,
}

impl Case {
    fn check(&self, runner: Option<&dyn Runner>) -> Result<(), CheckError> {
        match self {
            Self::Matmul(case) => {
                let plan = case.plan();
                let inputs = random::matmul_inputs(plan.problem(), case.seed);
                check_mosaic(MosaicCase::Matmul(&plan, &inputs), case.seed, runner)?;
            }
            Self::Rpa(case) => {
                let plan = case.plan();
                let lengths: Vec<_> = case.lengths.iter().map(|&(q_len, kv_len)| Lengths { q_len, kv_len }).collect();
                let inputs = random::rpa_inputs_of(plan.problem(), &lengths, case.layer, case.seed);
                check_mosaic(MosaicCase::Rpa(&plan, &inputs), case.seed, runner)?;
            }
        }
        Ok(())
    }

    fn seed(&self) -> u64 {
        match self {
            Self::Matmul(case) => case.seed,
            Self::Rpa(case) => case.seed,
        }
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
    let heads = (select(vec![1_usize, 2, 3, 4, 8]), 1_usize..=8, select(vec![64_usize, 80, 128, 192, 256]));
    let pages = (select(vec![1_usize, 7, 8, 16, 32, 64]), 1_usize..=4);
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
                layer: seed as usize % layers,
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

/// Checks `cases` cases.
fn property(cases: u32, rng_seed: RngSeed, strategy: impl Strategy<Value = Case>) {
    let cpu = Cpu::new();
    let config = Config { cases, rng_seed, failure_persistence: None, ..Config::default() };
    let checked = TestRunner::new(config).run(&strategy, |case| {
        let runner = (case.seed() % 10 == 0).then_some(&cpu as &dyn Runner);
        case.check(runner).map_err(|error| {
            let json = serde_json::to_string(&case).expect("a case is plain data");
            let again = format!("PAGODA_CASE='{json}' cargo test --test mosaic_check reproduce");
            TestCaseError::fail(format!("{error}\n{again}"))
        })
    });
    match checked {
        Ok(()) => {}
        Err(TestError::Fail(reason, _)) => panic!("{reason}"),
        Err(TestError::Abort(reason)) => panic!("{reason}"),
    }
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
#[ignore = "half an hour of CPU, other cases every time: `make nightly`"]
fn five_thousand_matmuls_agree_with_the_reference() {
    property(5_000, RngSeed::Random, matmuls());
}

#[test]
#[ignore = "half an hour of CPU, other cases every time: `make nightly`"]
fn five_thousand_attentions_agree_with_the_reference() {
    property(5_000, RngSeed::Random, attentions());
}

/// Runs the case in `PAGODA_CASE`, as a failure prints it.
#[test]
fn reproduce() {
    let Ok(case) = env::var("PAGODA_CASE") else { return };
    let case: Case = serde_json::from_str(&case).expect("PAGODA_CASE as a failure printed it");
    case.check(Some(&Cpu::new())).unwrap_or_else(|error| panic!("{error}"));
}
