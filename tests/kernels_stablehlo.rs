//! The kernels' StableHLO forms on the real CPU plugin, held against the f64 references over random ragged batches.

use std::{cell::RefCell, collections::HashMap, error::Error};

use pagoda_engine::pjrt::{Client, Executable, Plugin, PluginChoice};
use pagoda_ir::{Element, HostTensor, stablehlo::Module};
use pagoda_kernels::{
    Arrays, Kernel, Runner, check,
    check::{Expected, compare},
    kernel::stablehlo_module,
    matmul::{self, Activation, Epilogue, Layout, Matmul},
    random::Lengths,
    rpa::{self, Kind, KvRows, Precision, Rotary, Rpa, kv_write},
    strategies,
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};

/// Runs modules on the CPU plugin and compiles each text once.
struct Cpu {
    client: Client,
    compiled: RefCell<HashMap<String, Executable>>,
}

impl Cpu {
    fn new() -> Self {
        let plugin = Plugin::load(&PluginChoice::parse("cpu").unwrap()).expect("the CPU plugin: run `make setup`");
        Self { client: plugin.client(1).unwrap(), compiled: RefCell::default() }
    }
}

impl Runner for Cpu {
    fn run(&self, module: &Module, inputs: &[HostTensor]) -> Result<Vec<HostTensor>, Box<dyn Error + Send + Sync>> {
        module.verify()?;
        let text = module.text();
        let mut compiled = self.compiled.borrow_mut();
        if !compiled.contains_key(&text) {
            let executable = self.client.compile(&text, 1).map_err(|error| error.to_string())?;
            compiled.insert(text.clone(), executable);
        }
        compiled[&text].call(inputs).map_err(|error| error.to_string().into())
    }
}

/// Runs `test` on `cases` values of `strategy`, the same ones every time, and shrinks the one that fails.
fn property<S: Strategy>(cases: u32, strategy: S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 64, ..Config::default() };
    let seed = proptest::test_runner::TestRng::deterministic_rng(config.rng_algorithm);
    if let Err(error) = TestRunner::new_with_rng(config, seed).run(&strategy, test) {
        panic!("{error}");
    }
}

fn failed(error: impl std::fmt::Display) -> TestCaseError {
    TestCaseError::fail(error.to_string())
}

fn spec(kind: Kind, element: Element, q_heads: usize, kv_heads: usize, head_dim: usize) -> rpa::Spec {
    rpa::Spec {
        kind,
        precision: Precision::uniform(element),
        tokens: if kind == Kind::Decode { 6 } else { 77 },
        q_heads,
        kv_heads,
        head_dim,
        page_size: 16,
        pages: 40,
        layers: 1,
        max_seqs: 6,
        pages_per_seq: 11,
        scale: (head_dim as f64).powf(-0.5),
        sliding_window: None,
        soft_cap: None,
        ..rpa::Spec::default()
    }
}

/// Inputs over sequences of (query rows, KV tokens).
fn batch_of(problem: &rpa::Problem, lengths: &[(usize, usize)], seed: u64) -> Arrays {
    let lengths: Vec<_> = lengths.iter().map(|&(q_len, kv_len)| Lengths { q_len, kv_len }).collect();
    Rpa::draw(problem, Some(&lengths), seed).unwrap()
}

/// Problems with every option: fused and not, in each type of the cache, packed heads, sinks, log-sum-exp.
fn options() -> Vec<rpa::Problem> {
    use Element::{Bf16, F8E4M3Fn, F8E5M2, F32, I8};
    use Kind::{Decode, Mixed};
    let fused = Some(Rotary::HalfSplit);
    let kv = |kv, spec: rpa::Spec| rpa::Spec { precision: Precision { kv, ..spec.precision }, ..spec };
    let specs = [
        rpa::Spec { fused, ..spec(Decode, F32, 4, 2, 128) },
        rpa::Spec { fused, layers: 3, ..spec(Mixed, F32, 6, 3, 64) },
        rpa::Spec { fused, sliding_window: Some(9), ..spec(Mixed, Bf16, 8, 2, 128) },
        rpa::Spec { fused, kv_rows: KvRows::Packed, layers: 2, ..spec(Mixed, F32, 8, 2, 64) },
        rpa::Spec { kv_rows: KvRows::Packed, soft_cap: Some(5.0), ..spec(Decode, Bf16, 8, 4, 64) },
        rpa::Spec { sinks: true, ..spec(Mixed, F32, 6, 2, 96) },
        rpa::Spec { sinks: true, log_sum_exp: true, fused, ..spec(Decode, F32, 5, 1, 112) },
        rpa::Spec { log_sum_exp: true, sliding_window: Some(20), layers: 2, ..spec(Mixed, Bf16, 4, 2, 192) },
        rpa::Spec { log_sum_exp: true, sinks: true, soft_cap: Some(3.0), fused, ..spec(Mixed, Bf16, 14, 2, 64) },
        kv(Bf16, spec(Mixed, F32, 4, 2, 128)),
        kv(Bf16, rpa::Spec { fused, ..spec(Decode, F32, 4, 4, 80) }),
        kv(I8, spec(Mixed, Bf16, 8, 2, 128)),
        kv(I8, rpa::Spec { fused, layers: 2, kv_rows: KvRows::Packed, ..spec(Mixed, Bf16, 8, 2, 64) }),
        kv(I8, rpa::Spec { fused, sinks: true, log_sum_exp: true, ..spec(Mixed, F32, 3, 1, 256) }),
        kv(F8E4M3Fn, rpa::Spec { fused, ..spec(Mixed, Bf16, 8, 2, 128) }),
        kv(F8E4M3Fn, rpa::Spec { fused, layers: 2, ..spec(Decode, F32, 8, 4, 96) }),
        kv(F8E4M3Fn, rpa::Spec { kv_rows: KvRows::Packed, sinks: true, ..spec(Mixed, Bf16, 8, 2, 64) }),
        kv(F8E5M2, rpa::Spec { fused, sliding_window: Some(30), ..spec(Mixed, F32, 4, 1, 128) }),
        kv(F8E5M2, rpa::Spec { fused, kv_rows: KvRows::Packed, ..spec(Decode, Bf16, 8, 1, 64) }),
        kv(I8, rpa::Spec { fused, page_size: 7, ..spec(Decode, Bf16, 16, 2, 128) }),
        kv(F8E4M3Fn, rpa::Spec { kv_rows: KvRows::Padded, layers: 2, ..spec(Mixed, Bf16, 4, 1, 128) }),
        kv(I8, rpa::Spec { fused, kv_rows: KvRows::Padded, ..spec(Decode, Bf16, 15, 5, 64) }),
        rpa::Spec { fused, kv_rows: KvRows::Padded, ..spec(Decode, Bf16, 4, 1, 192) },
        kv(F8E5M2, rpa::Spec { kv_rows: KvRows::Padded, layers: 2, ..spec(Mixed, Bf16, 2, 2, 192) }),
    ];
    specs.map(|spec| rpa::Problem::new(spec).unwrap()).to_vec()
}

/// Head dimensions 64, 80, 128, 256, groups of 1 to 8, page sizes below and above a KV block, windows within and across
/// blocks, soft caps, several layers in one buffer.
fn problems() -> Vec<rpa::Problem> {
    use Element::{Bf16, F32};
    use Kind::{Decode, Mixed};
    let specs = [
        spec(Decode, F32, 4, 2, 64),
        spec(Mixed, F32, 4, 2, 64),
        rpa::Spec { sliding_window: Some(37), ..spec(Decode, F32, 3, 3, 80) },
        rpa::Spec { sliding_window: Some(5), layers: 3, ..spec(Mixed, F32, 6, 2, 80) },
        rpa::Spec { soft_cap: Some(2.5), layers: 2, ..spec(Decode, Bf16, 8, 1, 128) },
        rpa::Spec { soft_cap: Some(30.0), sliding_window: Some(130), ..spec(Mixed, Bf16, 8, 2, 128) },
        rpa::Spec { page_size: 200, pages_per_seq: 2, pages: 9, ..spec(Mixed, F32, 2, 1, 256) },
        rpa::Spec { page_size: 1, pages_per_seq: 150, pages: 300, ..spec(Mixed, Bf16, 5, 1, 64) },
        rpa::Spec { page_size: 7, pages_per_seq: 25, max_seqs: 3, ..spec(Decode, F32, 16, 1, 64) },
    ];
    specs.map(|spec| rpa::Problem::new(spec).unwrap()).to_vec()
}

#[test]
fn attention_over_random_batches() {
    let cpu = Cpu::new();
    let few = options().into_iter().map(|problem| (8, problem));
    for (cases, problem) in problems().into_iter().map(|problem| (24, problem)).chain(few) {
        property(cases, strategies::inputs::<Rpa>(problem.clone()), |inputs| {
            check::<Rpa>(&problem, &inputs, &cpu)
                .map_err(|error| failed(format!("{}: {error}", Rpa::describe(&problem))))
        });
    }
}

#[test]
fn kv_write_over_random_batches() {
    let cpu = Cpu::new();
    let single = rpa::Problem::new(rpa::Spec { tokens: 1, ..spec(Kind::Decode, Element::F32, 4, 2, 64) }).unwrap();
    for problem in [&problems()[1], &problems()[3], &problems()[4], &single] {
        let new = || strategies::tensor(problem.new_kv_type());
        property(24, (strategies::inputs::<Rpa>(problem.clone()), new(), new()), |(inputs, k, v)| {
            kv_write::check(problem, &inputs, [&k, &v], &cpu).map_err(failed)
        });
    }
}

/// One long prompt at once, in chunks of 7, and row by row: the same rows, the same results.
#[test]
fn a_row_does_not_depend_on_its_chunk() {
    let cpu = Cpu::new();
    let problem = rpa::Problem::new(spec(Kind::Mixed, Element::F32, 4, 2, 64)).unwrap();
    let whole = batch_of(&problem, &[(60, 60)], 1);
    let width = problem.q_heads * problem.head_dim;
    let expected = Rpa::reference(&problem, &whole).remove(0);
    for chunk in [7, 1] {
        for end in (chunk..=60).step_by(chunk) {
            let mut kv_lens = vec![0; problem.max_seqs];
            kv_lens[0] = end as i32;
            let mut cu_q_lens = vec![chunk as i32; problem.max_seqs + 1];
            cu_q_lens[0] = 0;
            let ints = |values: &[i32]| HostTensor::new(&[values.len()], values);
            let rows = (end - chunk) * width..end * width;
            let mut q = whole["q"].clone();
            q.as_mut_slice::<f32>()[..chunk * width].copy_from_slice(&whole["q"].as_slice::<f32>()[rows.clone()]);
            let inputs = whole.clone().with("q", q).with("kv_lens", ints(&kv_lens)).with("cu_q_lens", ints(&cu_q_lens));
            let inputs = inputs.with("num_seqs", ints(&[1]));
            Rpa::check_inputs(&problem, &inputs).unwrap();
            let module_context = pagoda_ir::Context::new();
            let module = stablehlo_module::<Rpa>(&module_context, &problem).unwrap();
            let result = cpu.run(&module, &inputs.values().cloned().collect::<Vec<_>>()).unwrap().remove(0);
            let chunk_rows = HostTensor::new(&[chunk, width], &result.as_slice::<f32>()[..chunk * width]);
            let (values, magnitude) = (expected.values[rows.clone()].to_vec(), expected.magnitude[rows].to_vec());
            compare("chunk", &chunk_rows, &Expected::new(values, magnitude, expected.tolerance)).unwrap();
        }
    }
}

#[test]
fn matmul_at_sizes_that_no_tile_divides() {
    let cpu = Cpu::new();
    let gated = Epilogue { bias: true, activation: Activation::SiluGate, residual: true };
    let biased = Epilogue { bias: true, ..Epilogue::NONE };
    let mut problems = Vec::new();
    for layout in [Layout::RowMajor, Layout::WeightTransposed, Layout::FeatureMajor] {
        for (index, (m, k, n)) in [(1, 1, 1), (3, 257, 129), (13, 500, 31), (130, 67, 259)].into_iter().enumerate() {
            for (input, output) in
                [(Element::F32, Element::F32), (Element::Bf16, Element::F32), (Element::Bf16, Element::Bf16)]
            {
                let epilogue = [Epilogue::NONE, gated, biased, gated][index];
                problems.push(matmul::Spec { m, k, n, input, output, layout, epilogue, layers: 1, quantized: None });
            }
        }
    }
    for spec in problems {
        let problem = matmul::Problem::new(spec).unwrap();
        property(2, strategies::inputs::<Matmul>(problem), |inputs| {
            check::<Matmul>(&problem, &inputs, &cpu).map_err(failed)
        });
    }
}

/// A check that cannot fail checks nothing.
#[test]
fn a_wrong_kernel_is_caught() {
    struct Wrong(Cpu, usize);
    impl Runner for Wrong {
        fn run(&self, module: &Module, inputs: &[HostTensor]) -> Result<Vec<HostTensor>, Box<dyn Error + Send + Sync>> {
            let mut results = self.0.run(module, inputs)?;
            results[0].as_mut_slice::<f32>()[self.1] += 1e-3;
            Ok(results)
        }
    }
    let problem = &problems()[1];
    let inputs = batch_of(problem, &[(1, 30), (20, 50)], 7);
    let cpu = Cpu::new();
    check::<Rpa>(problem, &inputs, &cpu).unwrap();
    let padding = (problem.tokens - 1) * problem.q_heads * problem.head_dim;
    for index in [0, 700, padding] {
        let error = check::<Rpa>(problem, &inputs, &Wrong(Cpu::new(), index)).unwrap_err();
        assert!(error.to_string().contains("1 of"), "{error}");
    }
}

#[test]
fn bad_problems_and_batches_are_refused_by_name() {
    let good = spec(Kind::Mixed, Element::F32, 4, 2, 64);
    let refusals = [
        (rpa::Spec { q_heads: 3, ..good.clone() }, "q_heads = 3 is not a multiple of kv_heads = 2"),
        (
            rpa::Spec { precision: Precision::uniform(Element::F16), ..good.clone() },
            "precision.q = f16 is neither f32 nor bf16",
        ),
        (
            rpa::Spec { precision: Precision { kv: Element::F16, ..good.precision }, ..good.clone() },
            "precision.kv = f16 is neither the type of q, f32, nor bf16 or a type of 8 bits",
        ),
        (rpa::Spec { head_dim: 0, ..good.clone() }, "head_dim = 0 is below 1"),
        (
            rpa::Spec { head_dim: 63, fused: Some(Rotary::HalfSplit), ..good.clone() },
            "head_dim = 63 has no two halves to rotate",
        ),
        (
            rpa::Spec { head_dim: 80, kv_rows: KvRows::Packed, ..good.clone() },
            "head_dim = 80 is not 64 or 192, or 64 more than another multiple of 128, as packed rows have it: give kv_rows = interleaved",
        ),
        (rpa::Spec { scale: f64::NAN, ..good.clone() }, "scale = NaN is not positive and finite"),
        (rpa::Spec { pages: usize::MAX, ..good.clone() }, "layers * pages * page_size"),
    ];
    for (spec, message) in refusals {
        let error = rpa::Problem::new(spec).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let problem = rpa::Problem::new(rpa::Spec { max_seqs: 2, pages_per_seq: 2, ..good.clone() }).unwrap();
    let decode = rpa::Problem::new(rpa::Spec { kind: Kind::Decode, max_seqs: 2, pages_per_seq: 2, ..good }).unwrap();
    let batch = |problem, kv_lens: [i32; 2], pages: [i32; 4], cu_q_lens: [i32; 3], num_seqs| {
        rpa::Batch::new(problem, &kv_lens, &pages, &cu_q_lens, num_seqs).map_err(|error| error.to_string())
    };
    assert!(batch(&problem, [20, 0], [0, 1, -1, -1], [0, 3, 3], 2).is_ok());
    for (result, message) in [
        (batch(&problem, [2, 0], [0; 4], [0, 3, 3], 2), "q_lens[0] = 3 is beyond kv_lens[0] = 2"),
        (batch(&problem, [20, 0], [0, 40, 0, 0], [0, 3, 3], 2), "page_indices[0][1] = 40 is not within 0..40"),
        (
            batch(&problem, [33, 0], [0; 4], [0, 3, 3], 2),
            "kv_lens[0] = 33 is beyond pages_per_seq * page_size = 2 * 16 = 32",
        ),
        (batch(&problem, [20, 20], [0; 4], [0, 3, 2], 2), "cu_q_lens[2] = 2 is below cu_q_lens[1] = 3"),
        (batch(&problem, [20, 20], [0; 4], [1, 3, 3], 2), "cu_q_lens[0] = 1 is not 0"),
        (batch(&problem, [20, 20], [0; 4], [0, 3, 99], 2), "cu_q_lens[2] = 99 is beyond tokens = 77"),
        (batch(&problem, [20, 20], [0; 4], [0, 3, 3], 3), "num_seqs = 3 is beyond max_seqs = 2"),
        (batch(&problem, [-1, 20], [0; 4], [0, 0, 0], 2), "q_lens[0] = 0 is beyond kv_lens[0] = -1"),
        (batch(&decode, [20, 20], [0; 4], [0, 2, 3], 2), "q_lens[0] = 2 is more than the one row of a decode problem"),
    ] {
        let error = result.unwrap_err();
        assert!(error.contains(message), "{error}");
    }
    let zero = matmul::Spec {
        m: 0,
        k: 1,
        n: 1,
        input: Element::F32,
        output: Element::F32,
        layout: Layout::RowMajor,
        epilogue: Epilogue::NONE,
        layers: 1,
        quantized: None,
    };
    assert!(matmul::Problem::new(zero).unwrap_err().to_string().contains("m = 0 is below 1"));
}
