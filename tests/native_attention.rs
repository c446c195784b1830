//! The attention in Rust against the f64 reference, on the batches that the StableHLO form is checked on: ragged, with
//! poison wherever a kernel must not look. (That the CPU plugin calls it rightly is what `tests/llama.rs` shows.)

use half::bf16;
use pagoda_ir::{Element, HostTensor};
use pagoda_kernels::check::{compare, tolerance};
use pagoda_kernels::float::Float;
use pagoda_kernels::rpa::native::{Call, Layer, attend, write};
use pagoda_kernels::rpa::{Inputs, Kind, Problem, Spec, reference};
use pagoda_kernels::strategies::{rpa_inputs, rpa_inputs_of, tensor};
use pagoda_kernels::threads::Scoped;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

fn spec() -> Spec {
    Spec {
        kind: Kind::Mixed,
        element: Element::F32,
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
    }
}

fn run<T: Float>(problem: &Problem, inputs: &Inputs) -> HostTensor {
    let metadata: Vec<HostTensor> = inputs.batch.to_tensors().into();
    let [kv_lens, page_indices, cu_q_lens, num_seqs] = [0, 1, 2, 3].map(|at| metadata[at].as_slice::<i32>());
    let call = Call {
        layer: layer(problem, inputs.layer),
        q_heads: problem.q_heads,
        pages_per_seq: problem.pages_per_seq,
        scale: problem.scale as f32,
        sliding_window: problem.sliding_window,
        soft_cap: problem.soft_cap.map(|cap| cap as f32),
        kv_lens,
        page_indices,
        cu_q_lens,
        num_seqs: num_seqs[0] as usize,
    };
    let mut out =
        HostTensor::from_f64(problem.element, &problem.q_type().dims, &vec![f64::NAN; problem.q_type().len()]);
    attend(&call, inputs.q.as_slice::<T>(), inputs.kv_pages.as_slice(), out.as_mut_slice(), &Scoped(2));
    out
}

fn layer(problem: &Problem, layer: usize) -> Layer {
    Layer {
        first_page: layer * problem.pages,
        pages: problem.pages,
        page_size: problem.page_size,
        kv_heads: problem.kv_heads,
        head_dim: problem.head_dim,
    }
}

fn check(problem: &Problem, inputs: &Inputs) -> Result<(), TestCaseError> {
    let actual = match problem.element {
        Element::F32 => run::<f32>(problem, inputs),
        _ => run::<bf16>(problem, inputs),
    };
    let expected = reference(problem, inputs);
    compare("native", &actual, &expected.output, &expected.magnitude, tolerance(problem.element))
        .map_err(|error| TestCaseError::fail(error.to_string()))
}

#[test]
fn random_ragged_batches_match_the_reference() {
    let mut specs = Vec::new();
    for element in [Element::F32, Element::Bf16] {
        let base = Spec { element, ..spec() };
        specs.extend([64, 80, 128, 256].map(|head_dim| Spec { head_dim, ..base.clone() }));
        specs.extend([1, 2, 4, 8].map(|group| Spec { q_heads: 2 * group, ..base.clone() }));
        specs.push(Spec { sliding_window: Some(5), ..base.clone() });
        specs.push(Spec { soft_cap: Some(3.0), page_size: 3, ..base.clone() });
        specs.push(Spec { kind: Kind::Decode, tokens: 5, page_size: 128, pages: 10, pages_per_seq: 2, ..base });
    }
    for spec in specs {
        let problem = Problem::new(spec).unwrap();
        let mut runner = TestRunner::new(Config { cases: 40, failure_persistence: None, ..Config::default() });
        runner.run(&rpa_inputs(problem.clone()), |inputs| check(&problem, &inputs)).unwrap();
    }
}

#[test]
fn work_for_several_threads_gives_the_same_bits_as_work_for_one() {
    let spec = Spec { tokens: 300, pages: 160, pages_per_seq: 160, q_heads: 16, head_dim: 128, ..spec() };
    let problem = Problem::new(spec.clone()).unwrap();
    let inputs = rpa_inputs_of(&problem, &[(300, 1200)], 7);
    check(&problem, &inputs).unwrap();
    let together = run::<f32>(&problem, &inputs);
    // The last row alone is too little work for a second thread.
    let alone = Problem::new(Spec { tokens: 1, ..spec }).unwrap();
    let width = problem.q_heads * problem.head_dim;
    let last = &inputs.q.as_slice::<f32>()[299 * width..];
    let single = Inputs {
        q: HostTensor::new(&alone.q_type().dims, last),
        batch: pagoda_kernels::rpa::Batch::new(
            &alone,
            &[1200, 0, 0, 0, 0],
            inputs.batch.to_tensors()[1].as_slice::<i32>(),
            &[0, 1, 1, 1, 1, 1],
            1,
        )
        .unwrap(),
        ..inputs
    };
    assert_eq!(run::<f32>(&alone, &single).as_slice::<f32>(), &together.as_slice::<f32>()[299 * width..]);
}

#[test]
fn writes_land_in_their_slots_and_nowhere_else() {
    let problem = Problem::new(spec()).unwrap();
    let strategy = (tensor(problem.kv_pages_type()), tensor(problem.new_kv_type()), tensor(problem.new_kv_type()));
    let size = (problem.pages * problem.page_size) as i32;
    let slots = Just((0..size).collect::<Vec<_>>()).prop_shuffle();
    let mut runner = TestRunner::new(Config { cases: 30, failure_persistence: None, ..Config::default() });
    runner
        .run(&(strategy, slots, 0..problem.layers), |((before, k, v), mut slots, layer)| {
            slots.truncate(problem.tokens);
            // Padding, and slots that no layer has.
            slots[3..6].copy_from_slice(&[-1, size, i32::MAX]);
            let mut after = before.clone();
            let place = self::layer(&problem, layer);
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
