//! Layers unrolled, or in one `stablehlo.while` over stacked weights: what the step program should do on the CPU.
//! Two matmuls a layer, 8 rows. Compile time and time per step of both, and the ratio, go to stderr.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use pagoda_engine::pjrt::{Arg, Buffer, Client, Plugin, PluginChoice};
use pagoda_ir::stablehlo::{Builder, Direction, DotDims, Module, Tensor};
use pagoda_ir::{Context, Element, HostTensor, Result, TensorType};

const LAYERS: usize = 16;
const HIDDEN: usize = 256;
const INNER: usize = 1024;
const ROWS: usize = 8;

fn ty(dims: &[usize]) -> TensorType {
    TensorType::new(Element::F32, dims)
}

/// `x + down relu(up x)`
fn layer<'c, 'a>(
    b: &Builder<'c, 'a>,
    up: Tensor<'c, 'a>,
    down: Tensor<'c, 'a>,
    x: Tensor<'c, 'a>,
) -> Result<Tensor<'c, 'a>> {
    let dims = DotDims { batch: (&[], &[]), contract: (&[1], &[0]) };
    let inner = b.dot_general(up, x, dims, Element::F32)?;
    let inner = b.maximum(inner, b.splat(Element::F32, &[INNER, ROWS], 0.0)?)?;
    b.add(x, b.dot_general(down, inner, dims, Element::F32)?)
}

fn unrolled(context: &Context) -> Result<Vec<u8>> {
    let module = Module::new(context, "unrolled");
    let mut types = vec![ty(&[HIDDEN, ROWS])];
    for _ in 0..LAYERS {
        types.extend([ty(&[INNER, HIDDEN]), ty(&[HIDDEN, INNER])]);
    }
    module.function("main", &types, |b, args| {
        let mut layers = args[1..].chunks_exact(2);
        Ok(vec![layers.try_fold(args[0], |x, weights| layer(b, weights[0], weights[1], x))?])
    })?;
    Ok(module.bytecode())
}

fn looped(context: &Context) -> Result<Vec<u8>> {
    let module = Module::new(context, "looped");
    let types = [ty(&[HIDDEN, ROWS]), ty(&[LAYERS, INNER, HIDDEN]), ty(&[LAYERS, HIDDEN, INNER])];
    module.function("main", &types, |b, args| {
        let zero = b.scalar(Element::I32, 0.0)?;
        let results = b.while_(
            &[zero, args[0]],
            |b, state| b.compare(state[0], Direction::Lt, b.scalar(Element::I32, LAYERS as f64)?),
            |b, state| {
                let zero = b.scalar(Element::I32, 0.0)?;
                let up = b.dynamic_slice(args[1], &[state[0], zero, zero], &[1, INNER, HIDDEN])?;
                let down = b.dynamic_slice(args[2], &[state[0], zero, zero], &[1, HIDDEN, INNER])?;
                let (up, down) = (b.reshape(up, &[INNER, HIDDEN])?, b.reshape(down, &[HIDDEN, INNER])?);
                Ok(vec![b.add(state[0], b.scalar(Element::I32, 1.0)?)?, layer(b, up, down, state[1])?])
            },
        )?;
        Ok(vec![results[1]])
    })?;
    Ok(module.bytecode())
}

fn measure(criterion: &mut Criterion, client: &Client, name: &str, module: &[u8], weights: &[HostTensor]) -> Duration {
    let started = Instant::now();
    let program = client.compile(module, 1).expect("compiles");
    let compiled = started.elapsed();
    let buffers: Vec<Buffer> = weights.iter().map(|weight| client.upload(weight, 0).expect("uploads")).collect();
    let mut step = Duration::ZERO;
    let mut group = criterion.benchmark_group("layers");
    group.bench_function(BenchmarkId::new(name, LAYERS), |bencher| {
        bencher.iter_custom(|iterations| {
            let started = Instant::now();
            for _ in 0..iterations {
                let results = program.run(buffers.iter().map(Arg::Keep).collect()).expect("runs");
                results[0].wait().expect("runs");
            }
            step = started.elapsed() / iterations as u32;
            started.elapsed()
        });
    });
    eprintln!("{name}: compiled in {compiled:.2?}, {step:.1?} a step");
    step
}

fn main() {
    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    let plugin = Plugin::load(&PluginChoice::parse("cpu").expect("a name")).expect("the CPU plugin: run `make setup`");
    let client = plugin.client(1).expect("a client");
    let context = Context::new();
    let fill = |dims: &[usize]| {
        let count = dims.iter().product();
        HostTensor::new(dims, &(0..count).map(|i| ((i * 31) % 17) as f32 / 1e3).collect::<Vec<f32>>())
    };
    let mut separate = vec![fill(&[HIDDEN, ROWS])];
    for _ in 0..LAYERS {
        separate.extend([fill(&[INNER, HIDDEN]), fill(&[HIDDEN, INNER])]);
    }
    let stacked = [fill(&[HIDDEN, ROWS]), fill(&[LAYERS, INNER, HIDDEN]), fill(&[LAYERS, HIDDEN, INNER])];
    let unrolled = unrolled(&context).expect("a module");
    let looped = looped(&context).expect("a module");
    let one = measure(&mut criterion, &client, "unrolled", &unrolled, &separate);
    let other = measure(&mut criterion, &client, "while", &looped, &stacked);
    eprintln!("a while over stacked weights takes {:.2}x the time", other.as_secs_f64() / one.as_secs_f64());
    criterion.final_summary();
}
