//! The attention in Rust, alone and as a step that rotates and writes, against the f64 reference, on the batches that the
//! StableHLO form is checked on: ragged, with poison wherever a kernel must not look. (That the CPU plugin calls it rightly
//! is what `tests/llama` shows.)

use half::bf16;
use pagoda_ir::{Element, HostTensor, TensorType};
use pagoda_kernels::check::compare_all;
use pagoda_kernels::float::Float;
use pagoda_kernels::random::Lengths;
use pagoda_kernels::rpa::cached::{self, Cached};
use pagoda_kernels::rpa::native::{Call, Layer, call, step, write};
use pagoda_kernels::rpa::reference::reference;
use pagoda_kernels::rpa::{Batch, Kind, KvRows, Precision, Problem, Rotary, Rpa, Spec};
use pagoda_kernels::strategies::{inputs, tensor};
use pagoda_kernels::threads::Scoped;
use pagoda_kernels::{Arrays, Kernel};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};

fn spec() -> Spec {
    Spec {
        kind: Kind::Mixed,
        precision: Precision::uniform(Element::F32),
        tokens: 24,
        q_heads: 4,
        kv_heads: 2,
        head_dim: 64,
        page_size: 8,
        pages: 20,
        layers: 2,
        max_seqs: 5,
        pages_per_seq: 9,
        scale: 0.125,
        sliding_window: None,
        soft_cap: None,
        ..Spec::default()
    }
}

/// An array of NaN.
fn unwritten(ty: &TensorType) -> HostTensor {
    HostTensor::from_f64(ty.element, &ty.dims, &vec![f64::NAN; ty.len()])
}

/// The results of a fused problem. Projections and output are feature-major; angles are those of positions.
fn run_step<T: Float, C: Cached>(problem: &Problem, inputs: &Arrays) -> Vec<HostTensor> {
    let results = problem.results();
    let turned = |rows: &HostTensor| {
        let (values, width) = (rows.as_slice::<T>(), rows.len() / problem.tokens);
        let at = |feature: usize, token: usize| values[token * width + feature];
        (0..width).flat_map(|feature| (0..problem.tokens).map(move |token| at(feature, token))).collect::<Vec<_>>()
    };
    let slots = Batch::of(problem, inputs).unwrap().kv_slots(problem.tokens);
    let (qkv, rotary) = (turned(&inputs["qkv"]), rotary(problem));
    let (mut kv_pages, mut out) = (inputs["kv_pages"].clone(), unwritten(&results["out"]));
    let (pages, attended) = (kv_pages.as_mut_slice(), out.as_mut_slice());
    step::<T, C>(&call(problem, inputs), &qkv, &rotary, &slots, pages, attended, &Scoped(2));
    let width = problem.q_heads * problem.head_dim;
    let by_row: Vec<T> = (0..out.len()).map(|at| out.as_slice()[at % width * problem.tokens + at / width]).collect();
    vec![HostTensor::new(&results["out"].dims, &by_row), kv_pages]
}

/// Cosines and sines of every position.
fn rotary(problem: &Problem) -> Vec<f32> {
    let angles = |position: usize| (0..problem.head_dim / 2).map(move |at| (position * (at + 1)) as f64 / 40.0);
    let row = |position| angles(position).map(f64::cos).chain(angles(position).map(f64::sin)).map(|x| x as f32);
    (0..problem.max_kv_len()).flat_map(row).collect()
}

/// `inputs` of a fused problem with the angles of the rows' positions.
fn by_position(problem: &Problem, inputs: Arrays) -> Arrays {
    let (table, mut cos_sin) = (rotary(problem), inputs["cos_sin"].clone());
    for sequence in Batch::of(problem, &inputs).unwrap().sequences() {
        for (row, position) in (0..sequence.q_len).filter_map(|row| Some((row, sequence.position(row)?))) {
            let [to, from] = [sequence.first_row + row, position].map(|at| at * problem.head_dim);
            let from = &table[from..from + problem.head_dim];
            cos_sin.as_mut_slice::<f32>()[to..to + problem.head_dim].copy_from_slice(from);
        }
    }
    inputs.with("cos_sin", cos_sin)
}

fn layer(problem: &Problem, first_page: usize) -> Layer {
    Layer { first_page, kv: problem.kv_layout() }
}

/// The results of a problem that is not fused.
fn run(problem: &Problem, inputs: &Arrays) -> Vec<HostTensor> {
    Rpa::native(problem, inputs, &Scoped(2)).expect("a form in Rust")
}

fn check(problem: &Problem, inputs: &Arrays) -> Result<(), TestCaseError> {
    let inputs = if problem.fused.is_some() { &by_position(problem, inputs.clone()) } else { inputs };
    let actual = match (problem.precision.q, problem.precision.kv) {
        _ if problem.fused.is_none() => run(problem, inputs),
        (Element::F32, Element::F32) => run_step::<f32, f32>(problem, inputs),
        (Element::F32, Element::Bf16) => run_step::<f32, bf16>(problem, inputs),
        (Element::F32, Element::F8E4M3Fn) => run_step::<f32, cached::F8E4M3Fn>(problem, inputs),
        (Element::F32, Element::F8E5M2) => run_step::<f32, cached::F8E5M2>(problem, inputs),
        (Element::F32, Element::I8) => run_step::<f32, i8>(problem, inputs),
        (Element::Bf16, Element::Bf16) => run_step::<bf16, bf16>(problem, inputs),
        (Element::Bf16, Element::F8E4M3Fn) => run_step::<bf16, cached::F8E4M3Fn>(problem, inputs),
        (Element::Bf16, Element::F8E5M2) => run_step::<bf16, cached::F8E5M2>(problem, inputs),
        (Element::Bf16, Element::I8) => run_step::<bf16, i8>(problem, inputs),
        (q, kv) => panic!("queries of {q}, a cache of {kv}"),
    };
    compare_all("native", &actual, &problem.results(), &reference(problem, inputs))
        .map_err(|error| TestCaseError::fail(error.to_string()))
}

/// Draws that are the same in every run.
const ALWAYS: RngSeed = RngSeed::Fixed(1);

fn runner(cases: u32, rng_seed: RngSeed) -> TestRunner {
    TestRunner::new(Config { cases, rng_seed, failure_persistence: None, ..Config::default() })
}

#[test]
fn random_ragged_batches_match_the_reference() {
    check_ragged_batches(40, ALWAYS);
}

#[test]
#[ignore = "many batches, others in every run: make nightly"]
fn many_fresh_ragged_batches_match_the_reference() {
    check_ragged_batches(500, RngSeed::Random);
}

fn check_ragged_batches(cases: u32, rng_seed: RngSeed) {
    let mut specs = Vec::new();
    for element in [Element::F32, Element::Bf16] {
        let base = Spec { precision: Precision::uniform(element), ..spec() };
        specs.extend([64, 80, 128, 256].map(|head_dim| Spec { head_dim, ..base.clone() }));
        specs.extend([1, 2, 4, 8].map(|group| Spec { q_heads: 2 * group, ..base.clone() }));
        specs.push(Spec { sliding_window: Some(5), ..base.clone() });
        specs.push(Spec { soft_cap: Some(3.0), page_size: 3, ..base.clone() });
        specs.push(Spec { kind: Kind::Decode, tokens: 5, page_size: 128, pages: 10, pages_per_seq: 2, ..base.clone() });
        specs.push(Spec { sinks: true, log_sum_exp: true, soft_cap: Some(4.0), ..base.clone() });
        specs.push(Spec { kv_rows: KvRows::Packed, log_sum_exp: true, ..base.clone() });
        let fused = Spec { fused: Some(Rotary::HalfSplit), ..base };
        for kv in [element, Element::Bf16, Element::F8E4M3Fn, Element::F8E5M2, Element::I8] {
            let base = Spec { precision: Precision { kv, ..fused.precision }, ..fused.clone() };
            specs.extend([80, 128].map(|head_dim| Spec { head_dim, ..base.clone() }));
            specs.push(Spec { sinks: true, sliding_window: Some(9), q_heads: 6, ..base.clone() });
            specs.push(Spec { kind: Kind::Decode, tokens: 5, kv_rows: KvRows::Packed, q_heads: 2, ..base.clone() });
            specs.push(Spec { kv_rows: KvRows::Padded, q_heads: 3, kv_heads: 3, ..base.clone() });
            specs.push(Spec { kv_rows: KvRows::Padded, q_heads: 2, kv_heads: 1, head_dim: 192, ..base.clone() });
            specs.push(Spec { fused: None, log_sum_exp: true, sinks: true, ..base });
        }
    }
    for spec in specs {
        let problem = Problem::new(spec).unwrap();
        runner(cases, rng_seed).run(&inputs::<Rpa>(problem.clone()), |inputs| check(&problem, &inputs)).unwrap();
    }
}

#[test]
fn a_row_among_many_has_the_bits_that_it_has_alone() {
    let spec = Spec { tokens: 300, pages: 160, pages_per_seq: 160, q_heads: 8, head_dim: 128, ..spec() };
    let problem = Problem::new(spec.clone()).unwrap();
    let inputs = Rpa::draw(&problem, Some(&[Lengths { q_len: 300, kv_len: 1200 }]), 7).unwrap();
    check(&problem, &inputs).unwrap();
    let together = run(&problem, &inputs).remove(0);
    // The last row alone is too little work for a second thread, and too few queries to turn keys for.
    let alone = Problem::new(Spec { tokens: 1, ..spec }).unwrap();
    let width = problem.q_heads * problem.head_dim;
    let last = &inputs["q"].as_slice::<f32>()[299 * width..];
    let q = HostTensor::new(&alone.q_type().dims, last);
    let single = inputs.with("q", q).with("cu_q_lens", HostTensor::new(&[6], &[0, 1, 1, 1, 1, 1]));
    Rpa::check_inputs(&alone, &single).unwrap();
    assert_eq!(run(&alone, &single)[0].as_slice::<f32>(), &together.as_slice::<f32>()[299 * width..]);
}

/// One thread takes many queries at a time, and turns keys for them; each of many threads takes a few.
#[test]
fn turned_keys_give_the_bits_of_keys_as_they_lie() {
    let base = Spec { tokens: 230, pages: 100, pages_per_seq: 60, ..spec() };
    let odd = Spec { q_heads: 10, head_dim: 40, sliding_window: Some(70), ..base.clone() };
    let wide = Spec { q_heads: 6, page_size: 128, pages: 8, pages_per_seq: 4, ..base.clone() };
    let capped = Spec { q_heads: 14, sinks: true, log_sum_exp: true, soft_cap: Some(4.0), ..base.clone() };
    let of = |q, kv| Precision { kv, ..Precision::uniform(q) };
    let specs = [
        odd.clone(),
        Spec { precision: of(Element::Bf16, Element::Bf16), ..odd },
        wide.clone(),
        Spec { precision: of(Element::F32, Element::Bf16), sliding_window: Some(100), ..wide },
        capped.clone(),
        Spec { precision: of(Element::Bf16, Element::I8), head_dim: 96, ..capped },
    ];
    let batch = [(150, 390), (1, 77), (64, 64), (15, 200)].map(|(q_len, kv_len)| Lengths { q_len, kv_len });
    for spec in specs {
        let problem = Problem::new(spec).unwrap();
        let inputs = Rpa::draw(&problem, Some(&batch), 3).unwrap();
        check(&problem, &inputs).unwrap();
        let [turned, plain] = [1, 64].map(|threads| Rpa::native(&problem, &inputs, &Scoped(threads)).unwrap());
        assert!(turned == plain, "{}", Rpa::describe(&problem));
    }
}

#[test]
fn writes_land_in_their_slots_and_nowhere_else() {
    let problem = Problem::new(spec()).unwrap();
    let strategy = (tensor(problem.kv_pages_type()), tensor(problem.new_kv_type()), tensor(problem.new_kv_type()));
    let size = (problem.pages * problem.page_size) as i32;
    let some = Rpa::draw(&problem, Some(&[]), 1).unwrap();
    let slots = Just((0..size).collect::<Vec<_>>()).prop_shuffle();
    runner(30, ALWAYS)
        .run(&(strategy, slots, 0..problem.layers), |((before, k, v), mut slots, layer)| {
            slots.truncate(problem.tokens);
            // Padding, and slots that no layer has.
            slots[3..6].copy_from_slice(&[-1, size, i32::MAX]);
            let mut after = before.clone();
            let call = Call { layer: self::layer(&problem, layer * problem.pages), ..call(&problem, &some) };
            let width = problem.kv_heads * problem.head_dim;
            let [k_rows, v_rows] = [&k, &v].map(|new| new.as_slice::<f32>().chunks_exact(width));
            for ((k, v), &slot) in k_rows.zip(v_rows).zip(&slots) {
                write::<f32>(&call, after.as_mut_slice(), k, v, slot);
            }
            let vector = |tensor: &HostTensor, at: usize| tensor.as_slice::<f32>()[at * 64..][..64].to_vec();
            let heads = problem.kv_heads;
            let mut expected = before.clone();
            for (token, &slot) in slots.iter().enumerate().filter(|(_, slot)| (0..size).contains(slot)) {
                for head in 0..heads {
                    let at = ((layer as i32 * size + slot) as usize * heads + head) * 2;
                    for (offset, from) in [&k, &v].into_iter().enumerate() {
                        let value = vector(from, token * heads + head);
                        expected.as_mut_slice::<f32>()[(at + offset) * 64..][..64].copy_from_slice(&value);
                    }
                }
            }
            prop_assert!(after == expected);
            Ok(())
        })
        .unwrap();
}
