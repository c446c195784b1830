//! Matmuls beside XLA's own products of the same arrays, both compiled by libtpu: static cycles of everything in the
//! program, copies around the kernel included, or the time that the bytes take, whichever is more.
//!
//! Sizes are drawn from a seed (`SEED`), `N` of them per chip: odd ones, few rows, gated, f32, 8 bits. Of some products of 8 bits
//! XLA's estimate is less than its matrix units take for them: those are printed and do not count.

use std::time::Duration;

use pagoda_engine::certify::kernel::Certified;
use pagoda_engine::certify::{Certifier, Program};
use pagoda_ir::stablehlo::{Builder, DotDims, Module, Precision, Tensor};
use pagoda_ir::{Context, Element, Result};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::matmul::{Activation, Epilogue, Layout, Matmul, Problem, Quantized, Spec};
use pagoda_kernels::plan::{Options, Plan};
use pagoda_kernels::{Choices, Kernel, Named, kernel};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect("a number"))
}

/// The `index`th problem of a seed; every kind comes in turn.
fn draw(seed: u64, index: u64) -> Spec {
    let mut choices = Choices::of_seed((seed << 32) + index);
    let odd = |choices: &mut Choices, from, to| choices.within(from, to);
    let even = |choices: &mut Choices, from: usize, to: usize| 128 * choices.within(from / 128, to / 128);
    let m = choices.one_of(&[8, 1, 3, 16, 32, 77, 128, 300, 512, 867, 1024, 2048]);
    let is_odd = matches!(index % 12, 2 | 3 | 5);
    let size = if is_odd { odd } else { even };
    let (k, n) = (size(&mut choices, 512, 6144), size(&mut choices, 512, 8192));
    let spec = Spec::new([m, k, n], Element::Bf16);
    let transposed = Spec { layout: Layout::WeightTransposed, ..spec };
    let quantized = |group, activations| Spec {
        quantized: Some(Quantized { weight: Element::I8, group, activations }),
        ..transposed
    };
    match index % 12 {
        0..=3 => spec,
        4 | 5 => transposed,
        6 | 7 => Spec { epilogue: Epilogue { activation: Activation::SiluGate, ..Epilogue::NONE }, ..transposed },
        8 => quantized(None, false),
        9 => quantized(Some(128), false),
        10 => quantized(None, true),
        _ => Spec::new([m.min(256), k, n], Element::F32),
    }
}

/// The product as one writes it for XLA: of the operands' own types where it multiplies those, weights of 8 bits beside bf16
/// made bf16, with their scales where these are of groups.
fn product<'c, 'a>(
    b: &Builder<'c, 'a>,
    problem: &Problem,
    args: &Named<Tensor<'c, 'a>>,
) -> Result<Vec<Tensor<'c, 'a>>> {
    let (x, mut w) = (args["x"], args["w"]);
    let depth = if problem.layout == Layout::RowMajor { 0 } else { 1 };
    if problem.quantized.is_some() && !problem.quantized_x() {
        w = b.convert(w, problem.input)?;
        if let Some(group) = problem.group() {
            let (groups, columns) = (problem.groups(), problem.weight_columns());
            let scale = b.transpose(b.convert(args["w_scale"], problem.input)?, &[1, 0])?;
            let spread = b.broadcast_in_dim(scale, &[columns, groups, group], &[0, 1])?;
            w = b.multiply(w, b.reshape(spread, &[columns, groups * group])?)?;
        }
    }
    let dims = DotDims { batch: (&[], &[]), contract: (&[1], &[depth]) };
    let integers = x.element() == Element::I8;
    let (sum, precision) = match (integers, problem.input) {
        (true, _) => (Element::I32, Precision::Default),
        (_, Element::F32) => (Element::F32, Precision::Highest),
        _ => (Element::F32, Precision::Default),
    };
    let mut y = b.convert(b.dot_general_with(x, w, dims, sum, precision)?, Element::F32)?;
    if let (Some(&scale), None) = (args.get("w_scale"), problem.group()) {
        let scale = b.reshape(scale, &[problem.weight_columns()])?;
        y = b.multiply(y, b.broadcast_in_dim(scale, &y.dims(), &[1])?)?;
    }
    if let Some(&scale) = args.get("x_scale") {
        y = b.multiply(y, b.broadcast_in_dim(b.reshape(scale, &[problem.m])?, &y.dims(), &[0])?)?;
    }
    if problem.epilogue.activation == Activation::SiluGate {
        let (gate, up) = (b.slice_in_dim(y, 0, problem.n, 1)?, b.slice_in_dim(y, problem.n, 2 * problem.n, 1)?);
        y = b.multiply(b.multiply(gate, b.logistic(gate)?)?, up)?;
    }
    Ok(vec![b.convert(y, problem.output)?])
}

/// The least cycles that a chip's matrix units take for a product in bf16: each tile of the weight streams its rows, or is
/// loaded at a quarter of a cycle a row at best (v6e's bundles push 256 rows in 64).
fn matrix_cycles(problem: &Problem, chip: Chip) -> f64 {
    let info = chip.info();
    let tiles = (problem.k.div_ceil(info.mxu) * problem.weight_columns().div_ceil(info.mxu)) as f64;
    let units = info.cores as f64 * info.peak_flop_per_cycle_and_core as f64 / (2 * info.mxu * info.mxu) as f64;
    let passes = if problem.quantized_x() { 0.5 } else { 1.0 };
    passes * tiles * (problem.m as f64).max(info.mxu as f64 / 4.0) / units
}

#[test]
#[ignore = "minutes of CPU: make certify-all"]
fn at_or_under_xlas_own_product() {
    let certifier = Certifier::find(env!("CARGO_BIN_EXE_pagoda"))
        .expect("libtpu: run `make tpu-tools`")
        .profile_timeout(Duration::from_secs(900))
        .timeout(Duration::from_secs(1800));
    let (seed, count) = (number("SEED", 1), number("N", 12));
    let mut ratios = Vec::new();
    for chip in [Chip::V5p, Chip::V6e] {
        for index in 0..count {
            let problem = Problem::new(draw(seed, index)).expect("a valid problem");
            let plan = Plan::<Matmul>::new(problem, chip, Options::default()).expect("a plan");
            let context = Context::new();
            let arguments = Matmul::arguments(&problem);
            let module = Module::new(&context, "xla");
            let body = module.function("main", &arguments.types(), |b, args| {
                product(b, &problem, &arguments.name(args.iter().copied()))
            });
            body.expect("a module");
            let xla = certifier
                .certify(chip.info().topology, Program { module: &module.bytecode(), replicas: 1 })
                .expect("XLA's own compiles");
            let ours = Certified::new(&plan, &certifier).expect("the kernel compiles");
            let sum =
                |cycles: &[pagoda_engine::certify::OpCycles]| cycles.iter().map(|op| op.cycles).sum::<u64>() as f64;
            let floor = |bytes: u64| bytes as f64 / chip.info().hbm_bytes_per_cycle();
            let least = floor(kernel::passes_once::<Matmul>(&problem));
            let [of_ours, of_xla] = [sum(&ours.certificate.cycles), sum(&xla.cycles)];
            let moved = floor(plan.estimate().bytes_moved);
            let ratio = of_ours.max(moved) / of_xla.max(least);
            let estimate = plan.estimate().cycles;
            let counts = of_xla >= matrix_cycles(&problem, chip);
            let mark = if counts { ' ' } else { '*' };
            println!(
                "{chip:<5} {ratio:5.2}{mark} | ours {of_ours:>8.0} bytes {moved:>8.0} estimate {estimate:>8.0} | XLA {of_xla:>8.0} \
                 bytes {least:>8.0} | tiles {} | {}",
                plan.tiles(),
                plan.describe()
            );
            ratios.extend(counts.then_some(ratio));
        }
    }
    ratios.sort_by(f64::total_cmp);
    println!("* XLA's estimate is less than its matrix units take");
    println!("median {:.2}, largest {:.2}", ratios[ratios.len() / 2], ratios[ratios.len() - 1]);
    assert!(ratios[ratios.len() / 2] <= 1.0 && ratios[ratios.len() - 1] <= 1.1, "{ratios:?}");
}
