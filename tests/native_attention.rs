//! The attention in Rust against the f64 reference, on the batches that the StableHLO form is checked on: ragged, with
//! poison wherever a kernel must not look. (That the CPU plugin calls it rightly is what `tests/llama` shows.)

use half::bf16;
use pagoda_ir::{Element, HostTensor};
use pagoda_kernels::check::compare;
use pagoda_kernels::float::Float;
use pagoda_kernels::random::Lengths;
use pagoda_kernels::rpa::native::{Call, Layer, attend, step, write};
use pagoda_kernels::rpa::reference::{reference, written};
use pagoda_kernels::rpa::{Batch, Kind, Precision, Problem, Rpa, Spec};
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

/// The call on the metadata among `inputs`.
fn call<'m>(problem: &Problem, inputs: &'m Arrays) -> Call<'m> {
    Call {
        layer: layer(problem, inputs.get("first_page").map_or(0, |page| page.as_slice::<i32>()[0] as usize)),
        q_heads: problem.q_heads,
        pages_per_seq: problem.pages_per_seq,
        scale: problem.scale as f32,
        sliding_window: problem.sliding_window,
        soft_cap: problem.soft_cap.map(|cap| cap as f32),
        kv_lens: inputs["kv_lens"].as_slice(),
        page_indices: inputs["page_indices"].as_slice(),
        cu_q_lens: inputs["cu_q_lens"].as_slice(),
        num_seqs: inputs["num_seqs"].as_slice::<i32>()[0] as usize,
    }
}

fn run<T: Float>(problem: &Problem, inputs: &Arrays) -> HostTensor {
    let ty = problem.output_type();
    let mut out = HostTensor::from_f64(ty.element, &ty.dims, &vec![f64::NAN; ty.len()]);
    let (q, kv_pages) = (inputs["q"].as_slice::<T>(), inputs["kv_pages"].as_slice());
    attend(&call(problem, inputs), q, kv_pages, out.as_mut_slice(), &Scoped(2));
    out
}

fn layer(problem: &Problem, first_page: usize) -> Layer {
    Layer { first_page, kv: problem.kv_layout() }
}

fn check(problem: &Problem, inputs: &Arrays) -> Result<(), TestCaseError> {
    let actual = match problem.precision.q {
        Element::F32 => run::<f32>(problem, inputs),
        _ => run::<bf16>(problem, inputs),
    };
    compare("native", &actual, &reference(problem, inputs)[0]).map_err(|error| TestCaseError::fail(error.to_string()))
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
        specs.push(Spec { kind: Kind::Decode, tokens: 5, page_size: 128, pages: 10, pages_per_seq: 2, ..base });
    }
    for spec in specs {
        let problem = Problem::new(spec).unwrap();
        runner(cases, rng_seed).run(&inputs::<Rpa>(problem.clone()), |inputs| check(&problem, &inputs)).unwrap();
    }
}

#[test]
fn work_for_several_threads_gives_the_same_bits_as_work_for_one() {
    let spec = Spec { tokens: 300, pages: 160, pages_per_seq: 160, q_heads: 16, head_dim: 128, ..spec() };
    let problem = Problem::new(spec.clone()).unwrap();
    let inputs = Rpa::draw(&problem, Some(&[Lengths { q_len: 300, kv_len: 1200 }]), 7).unwrap();
    check(&problem, &inputs).unwrap();
    let together = run::<f32>(&problem, &inputs);
    // The last row alone is too little work for a second thread.
    let alone = Problem::new(Spec { tokens: 1, ..spec }).unwrap();
    let width = problem.q_heads * problem.head_dim;
    let last = &inputs["q"].as_slice::<f32>()[299 * width..];
    let q = HostTensor::new(&alone.q_type().dims, last);
    let single = inputs.with("q", q).with("cu_q_lens", HostTensor::new(&[6], &[0, 1, 1, 1, 1, 1]));
    Rpa::check_inputs(&alone, &single).unwrap();
    assert_eq!(run::<f32>(&alone, &single).as_slice::<f32>(), &together.as_slice::<f32>()[299 * width..]);
}

#[test]
fn writes_land_in_their_slots_and_nowhere_else() {
    let problem = Problem::new(spec()).unwrap();
    let strategy = (tensor(problem.kv_pages_type()), tensor(problem.new_kv_type()), tensor(problem.new_kv_type()));
    let size = (problem.pages * problem.page_size) as i32;
    let slots = Just((0..size).collect::<Vec<_>>()).prop_shuffle();
    runner(30, ALWAYS)
        .run(&(strategy, slots, 0..problem.layers), |((before, k, v), mut slots, layer)| {
            slots.truncate(problem.tokens);
            // Padding, and slots that no layer has.
            slots[3..6].copy_from_slice(&[-1, size, i32::MAX]);
            let mut after = before.clone();
            let place = self::layer(&problem, layer * problem.pages);
            write(after.as_mut_slice::<f32>(), k.as_slice(), v.as_slice(), &slots, &place);
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

#[test]
fn a_step_rotates_writes_and_attends() {
    let problem = Problem::new(spec()).unwrap();
    let (tokens, dim, half) = (problem.tokens, problem.head_dim, problem.head_dim / 2);
    let positions = problem.max_kv_len();
    let strategy = (inputs::<Rpa>(problem.clone()), tensor(problem.new_kv_type()), tensor(problem.new_kv_type()));
    let angle = |position: usize, at: usize| (position * (at + 1)) as f64 / 40.0;
    let rotary: Vec<f32> = (0..positions)
        .flat_map(|position| {
            let angles = (0..half).map(move |at| angle(position, at));
            angles.clone().map(f64::cos).chain(angles.map(f64::sin)).map(|x| x as f32)
        })
        .collect();
    runner(30, ALWAYS)
        .run(&strategy, |(inputs, k, v)| {
            let batch = Batch::of(&problem, &inputs).unwrap();
            let slots = batch.kv_slots(tokens);
            // [heads of q, k, v * head_dim, tokens], as a projection gives them.
            let stacked = [&inputs["q"], &k, &v].map(|rows| {
                let (rows, width) = (rows.as_slice::<f32>(), rows.len() / tokens);
                (0..width).flat_map(|feature| (0..tokens).map(move |token| rows[token * width + feature])).collect()
            });
            let qkv: Vec<f32> = stacked.into_iter().flat_map(|rows: Vec<f32>| rows).collect();
            let mut pages = inputs["kv_pages"].clone();
            let mut out = vec![f32::NAN; problem.q_type().len()];
            step(&call(&problem, &inputs), &qkv, &rotary, &slots, pages.as_mut_slice(), &mut out, &Scoped(2));

            // Position of each row, from the definition of the batch.
            let mut position = vec![None; tokens];
            for sequence in batch.sequences() {
                for index in 0..sequence.q_len {
                    position[sequence.first_row + index] = Some(sequence.kv_len - sequence.q_len + index);
                }
            }
            let rotated = |x: &HostTensor| {
                let mut values = x.to_f64();
                let width = values.len() / tokens;
                for (head, vector) in values.chunks_exact_mut(dim).enumerate() {
                    let Some(position) = position[head * dim / width] else { continue };
                    for at in 0..half {
                        let (low, high, angle) = (vector[at], vector[at + half], angle(position, at));
                        vector[at] = low * angle.cos() - high * angle.sin();
                        vector[at + half] = high * angle.cos() + low * angle.sin();
                    }
                }
                HostTensor::from_f64(Element::F32, x.dims(), &values)
            };
            let (q, k) = (rotated(&inputs["q"]), rotated(&k));
            let written = written(&problem, &inputs, &k, &v).values;
            let kv_pages = HostTensor::from_f64(Element::F32, inputs["kv_pages"].dims(), &written);
            let expected = reference(&problem, &inputs.clone().with("q", q).with("kv_pages", kv_pages)).remove(0);
            let width = problem.q_heads * dim;
            let by_row: Vec<f32> = (0..out.len()).map(|at| out[at % width * tokens + at / width]).collect();
            let actual = HostTensor::new(&problem.q_type().dims, &by_row);
            compare("step", &actual, &expected).map_err(|error| TestCaseError::fail(error.to_string()))?;
            // The pages: rotations differ in their rounding, everything else is the same bits.
            for (actual, expected) in pages.to_f64().iter().zip(&written) {
                prop_assert!((actual - expected).abs() <= 1e-6 || (actual.is_nan() && expected.is_nan()));
            }
            Ok(())
        })
        .unwrap();
}
