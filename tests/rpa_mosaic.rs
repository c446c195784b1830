//! The Mosaic form of ragged paged attention before both of its judges: the tile machine, which runs it against the f64
//! reference, and libtpu, which compiles it.

use pagoda_engine::certify::{Certifier, Program as Compiled, matmul::differences};
use pagoda_ir::{
    Context, Element,
    tile_machine::{DmaOrder, Machine, Program},
};
use pagoda_kernels::{
    check::{compare, tolerance},
    chips::Chip,
    rpa::{
        Inputs, Kind, Problem, Spec, mosaic,
        plan::{Options, Plan, Tiles},
        reference,
    },
    strategies::rpa_inputs,
};
use proptest::prelude::*;

fn spec(element: Element, tokens: usize, heads: [usize; 3], pages: [usize; 3], max_seqs: usize) -> Spec {
    let [q_heads, kv_heads, head_dim] = heads;
    let [page_size, pages_per_seq, pages] = pages;
    Spec {
        kind: Kind::Mixed,
        element,
        tokens,
        q_heads,
        kv_heads,
        head_dim,
        page_size,
        pages,
        layers: 1,
        max_seqs,
        pages_per_seq,
        scale: (head_dim as f64).powf(-0.5),
        sliding_window: None,
        soft_cap: None,
    }
}

/// Runs the plan's kernel under every order of copies: the same bits each time, close to the reference.
fn assert_right(plan: &Plan, inputs: &Inputs) {
    let problem = plan.problem();
    let context = Context::new();
    let kernel = mosaic::kernel(&context, plan).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(
        Program::decode(kernel.module()).unwrap().signature().vmem_bytes() as u64,
        plan.vmem().buffers.iter().map(|buffer| buffer.bytes.0).sum::<u64>(),
        "the module declares what is planned: {}",
        plan.vmem()
    );
    let mut arguments = inputs.to_tensors(problem);
    if problem.layers > 1 {
        let first_page = pagoda_ir::HostTensor::new(&[1], &[(inputs.layer * problem.pages) as i32]);
        *arguments.last_mut().unwrap() = first_page;
    }
    arguments.rotate_left(2);
    let program = Program::decode(kernel.module()).unwrap();
    let outputs = [DmaOrder::Early, DmaOrder::Late, DmaOrder::Random(7)].map(|dma| {
        let machine = Machine { dma, vmem_bytes: plan.limit().0 as usize, ..Machine::default() };
        let run = program.run(&machine, &arguments, &kernel.outputs());
        run.unwrap_or_else(|fault| panic!("{}: {fault}", plan.name())).outputs.remove(0)
    });
    let live = inputs.batch.rows() * problem.q_heads * problem.head_dim;
    let expected = reference(problem, inputs);
    let bits = |output: &pagoda_ir::HostTensor| output.to_f64()[..live].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(outputs.iter().all(|output| bits(output) == bits(&outputs[0])), "the order of copies shows");
    // Padding within a block of live rows holds whatever q held there.
    let mut values = outputs[0].to_f64();
    values[live..].fill(0.0);
    let output = pagoda_ir::HostTensor::from_f64(problem.element, outputs[0].dims(), &values);
    compare(&plan.name(), &output, &expected.output, &expected.magnitude, tolerance(problem.element))
        .unwrap_or_else(|error| panic!("{error}"));
}

fn certify(certifier: &Certifier, plan: &Plan) -> Result<u64, String> {
    let context = Context::new();
    let module = mosaic::module(&context, plan).map_err(|error| error.to_string())?.bytecode();
    let program = Compiled { module: &module, replicas: 1 };
    let answer = certifier.certify(plan.chip().info().topology, program).map_err(|error| error.to_string())?;
    let kernel = answer.kernels.first().ok_or("no kernel")?;
    let differences = differences(plan.vmem(), kernel);
    if !answer.compiles() || !differences.is_empty() {
        return Err(format!("{}\n{answer}{}\n{differences:?}", plan.name(), plan.vmem()));
    }
    Ok(kernel.spills().0)
}

fn certifier() -> Certifier {
    Certifier::find(env!("CARGO_BIN_EXE_pagoda")).expect("libtpu: run `make tpu-tools`")
}

/// q [1024, 32, 128], 8 KV heads, page size 128, 8 sequences of up to 4608 tokens.
fn incident() -> Problem {
    Problem::new(spec(Element::Bf16, 1024, [32, 8, 128], [128, 36, 288], 8)).unwrap()
}

#[test]
fn the_incident_is_certified_within_the_default_limit() {
    let plan = Plan::new(incident(), Chip::V5p, Options::default()).unwrap();
    let spills = certify(&certifier(), &plan).unwrap_or_else(|error| panic!("{error}"));
    assert!(plan.vmem().total().0 + spills <= 16 << 20);
}

#[test]
#[ignore = "minutes of CPU"]
fn shapes_are_certified_on_every_chip() {
    let shapes = [
        (Element::Bf16, [32, 8, 128], 128),
        (Element::Bf16, [16, 4, 128], 128),
        (Element::Bf16, [8, 2, 128], 128),
        (Element::Bf16, [4, 1, 128], 128),
        (Element::Bf16, [8, 8, 128], 16),
        (Element::Bf16, [8, 8, 64], 64),
        (Element::Bf16, [16, 4, 256], 256),
        (Element::F32, [8, 4, 128], 32),
    ];
    let certifier = certifier();
    let mut wrong = String::new();
    for chip in Chip::ALL {
        for (element, heads, page_size) in shapes {
            let problem = Problem::new(spec(element, 256, heads, [page_size, 2048 / page_size, 256], 8)).unwrap();
            let plan = Plan::new(problem, chip, Options::default()).unwrap();
            match certify(&certifier, &plan) {
                Ok(spills) => eprintln!("{chip} {element} {heads:?} {}: spills {spills}", plan.name()),
                Err(error) => wrong += &format!("{chip} {element} {heads:?}: {error}\n"),
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

fn problems() -> impl Strategy<Value = (Problem, Tiles)> {
    let shapes = (1_usize..=40, 1_usize..=5, 1_usize..=4, prop::sample::select(vec![64_usize, 128, 256]));
    let pages = (prop::sample::select(vec![8_usize, 16, 32]), 1_usize..=5);
    let options = (any::<bool>(), prop::option::of(1_usize..60), prop::option::of(1.0..20.0), 1_usize..=2);
    (shapes, pages, options, 1_usize..=5, 0_usize..64, 0_usize..64).prop_map(
        |(shapes, (page_size, per_seq), (bf16, window, cap, layers), seqs, queries, kv)| {
            let (tokens, group, kv_heads, head_dim) = shapes;
            let element = if bf16 { Element::Bf16 } else { Element::F32 };
            let heads = [group * kv_heads, kv_heads, head_dim];
            let mut spec = spec(element, tokens, heads, [page_size, per_seq, seqs * per_seq], seqs);
            (spec.sliding_window, spec.soft_cap, spec.layers) = (window, cap, layers);
            let queries = 8 * (1 + queries % tokens.div_ceil(8));
            let tiles = Tiles { queries, kv_pages: 1 + kv % per_seq };
            (Problem::new(spec).unwrap(), tiles)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ragged_batches_agree_with_the_reference(
        (plan, inputs) in problems().prop_flat_map(|(problem, tiles)| {
            let options = Options { tiles: Some(tiles), vmem_limit: None };
            let plan = Plan::new(problem.clone(), Chip::V5p, options).unwrap();
            (Just(plan), rpa_inputs(problem))
        })
    ) {
        assert_right(&plan, &inputs);
    }
}

#[test]
fn blocks_of_heads_agree_with_the_reference() {
    let problem = Problem::new(spec(Element::Bf16, 24, [16, 8, 128], [16, 4, 16], 3)).unwrap();
    let plan = Plan::new(problem.clone(), Chip::V5p, Options::default()).unwrap();
    assert_eq!(plan.grid()[0], 2);
    let inputs = pagoda_kernels::strategies::rpa_inputs_of(&problem, &[(1, 60), (13, 13), (9, 41)], 5);
    assert_right(&plan, &inputs);
}
