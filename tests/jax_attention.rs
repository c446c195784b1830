//! JAX's own attention kernel on the tile machine: lowered by Pallas, opened from its wire form, held against our
//! reference. Nothing of it was built by Pagoda, so the machine is checked here, not our kernel.

use pagoda_ir::mosaic::wire;
use pagoda_ir::tile_machine::{DmaOrder, FaultKind, Machine, Program};
use pagoda_ir::{Context, Element, HostTensor};
use pagoda_kernels::Kernel;
use pagoda_kernels::check::{Expected, compare};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::kernel::host_operands;
use pagoda_kernels::random::Lengths;
use pagoda_kernels::rpa::{Kind, Precision, Problem, Rpa, Spec};

/// The problem of `ragged_paged_attention.py`.
fn problem() -> Problem {
    let spec = Spec {
        kind: Kind::Mixed,
        precision: Precision::uniform(Element::Bf16),
        tokens: 24,
        q_heads: 8,
        kv_heads: 2,
        head_dim: 128,
        page_size: 16,
        pages: 16,
        layers: 1,
        max_seqs: 4,
        pages_per_seq: 4,
        scale: 128_f64.powf(-0.5),
        sliding_window: None,
        soft_cap: None,
        ..Spec::default()
    };
    Problem::new(spec).unwrap()
}

#[test]
fn jax_attention_agrees_with_the_reference_under_every_order_of_copies() {
    let problem = problem();
    let context = Context::new();
    let calls = wire::find_custom_calls(include_bytes!("../ir/tests/data/ragged_paged_attention.mlir")).unwrap();
    let [call] = &calls[..] else { panic!("{} calls", calls.len()) };
    let opened = wire::open(&context, &call.backend_config).unwrap();
    let program = Program::decode(&opened.module).unwrap().with_aliases(&call.aliases);
    let (types, results) = call.types.clone().expect("text has the types");
    for lengths in [&[(9, 48), (1, 55), (3, 20)][..], &[(24, 24)], &[(1, 64), (1, 1), (1, 17), (1, 33)]] {
        let lengths: Vec<_> = lengths.iter().map(|&(q_len, kv_len)| Lengths { q_len, kv_len }).collect();
        let inputs = Rpa::draw(&problem, Some(&lengths), 3).unwrap();
        let mut operands = host_operands::<Rpa>(&problem, Chip::V5p, &inputs);
        // Ours takes queries in two dimensions.
        operands[4] = inputs["q"].clone();
        // Its own state: the buffer in use and the sequence that it is at.
        operands.insert(3, HostTensor::new(&[2], &[0_i32, 0]));
        assert!(operands.iter().zip(&types).all(|(array, ty)| array.dims() == ty.dims));
        let Expected { values, magnitude, tolerance, live } = Rpa::reference(&problem, &inputs).remove(0);
        let outputs = [DmaOrder::Early, DmaOrder::Late, DmaOrder::Random(1)].map(|dma| {
            // It loads its accumulators before it has written them, and selects zeros.
            let machine = Machine { dma, allow_unwritten_reads: true, ..Machine::default() };
            let run = program.run(&machine, &operands, &results).unwrap_or_else(|fault| panic!("{fault}"));
            assert!(run.counters.copies > 0);
            run.outputs[0].to_f64()[..live].to_vec()
        });
        assert!(outputs[1] == outputs[0] && outputs[2] == outputs[0], "the order of copies shows");
        let output = HostTensor::from_f64(Element::Bf16, &[live], &outputs[0]);
        let expected = Expected::new(values[..live].to_vec(), magnitude[..live].to_vec(), tolerance);
        compare("JAX's kernel", &output, &expected).unwrap();

        let strict = program.run(&Machine::default(), &operands, &results).unwrap_err();
        assert_eq!(strict.kind, FaultKind::UnwrittenRead, "{strict}");
    }
}
