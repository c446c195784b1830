//! Kernels on the host for the CPU plugin: handlers of the custom calls that `pagoda_kernels` emits, in Rust, and of
//! Mosaic kernels, which the tile machine runs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;
use pagoda_ir::mosaic::wire;
use pagoda_ir::tile_machine::{Machine, Program};
use pagoda_ir::{Context, Element, HostTensor, TensorType};
use pagoda_kernels::float::Float;
use pagoda_kernels::matmul::native::{Around, Norm};
use pagoda_kernels::matmul::{self, Activation};
use pagoda_kernels::rpa::KvLayout;
use pagoda_kernels::rpa::native::{self, Call, Layer};

use crate::pjrt::custom_call::{CustomCall, Frame, register};
use crate::pjrt::{Plugin, Result};

type Outcome = std::result::Result<(), String>;

/// Registers every handler with a plugin. To be called before programs that use them are compiled.
///
/// # Errors
/// When the plugin takes no custom calls.
pub fn register_all(plugin: &Plugin) -> Result<()> {
    register::<TileMachine>(plugin)?;
    register::<Attention>(plugin)?;
    register::<Matmul>(plugin)
}

/// Calls the handler for the type of operand 0.
fn by_element(
    frame: &mut Frame<'_>,
    f32s: fn(&mut Frame<'_>) -> Outcome,
    bf16s: fn(&mut Frame<'_>) -> Outcome,
) -> Outcome {
    match frame.operand(0)?.element {
        Element::F32 => f32s(frame),
        Element::Bf16 => bf16s(frame),
        other => Err(format!("operands are {other}; f32 and bf16 are supported")),
    }
}

/// An option of the call that is a number, where it is on.
fn number<N: std::str::FromStr>(frame: &Frame<'_>, name: &str) -> std::result::Result<Option<N>, String> {
    let parse = |text: &str| text.parse().map_err(|_| format!("{name} = {text} is no number"));
    frame.string(name).map(parse).transpose()
}

/// `pagoda_matmul`: see [`matmul::native`].
struct Matmul;

impl CustomCall for Matmul {
    const TARGET: &'static str = matmul::native::TARGET;

    fn call(frame: &mut Frame<'_>) -> Outcome {
        by_element(frame, multiply::<f32>, multiply::<bf16>)
    }
}

fn multiply<T: Float>(frame: &mut Frame<'_>) -> Outcome {
    let [norm, gate, residual] = matmul::native::OPTIONS;
    let mut operands = (0..frame.operands()).map(|index| frame.operand(index));
    let mut next = || operands.next().unwrap_or_else(|| Err("an operand is missing".into()));
    let (w, x) = (next()?, next()?);
    let &[_, columns] = x.dims else { return Err(format!("activations of rank {}", x.dims.len())) };
    let norm = match number(frame, norm)? {
        Some(epsilon) => Some(Norm { weight: next()?.values::<T>()?, epsilon }),
        None => None,
    };
    let residual = if frame.string(residual).is_some() { Some(next()?.values::<T>()?) } else { None };
    let activation = if frame.string(gate).is_some() { Activation::SiluGate } else { Activation::Identity };
    let around = Around { norm, activation, residual };
    let call = matmul::native::Call { w: w.values::<T>()?, x: x.values()?, columns: columns as usize, around };
    let threads = frame.threads();
    if frame.result_type(0)?.0 == Element::F32 {
        let [y] = frame.all_results::<f32, 1>()?;
        matmul::native::multiply(&call, y, &threads);
    } else {
        let [y] = frame.all_results::<T, 1>()?;
        matmul::native::multiply(&call, y, &threads);
    }
    Ok(())
}

/// `pagoda_rpa`: see [`native`].
struct Attention;

impl CustomCall for Attention {
    const TARGET: &'static str = native::TARGET;

    fn call(frame: &mut Frame<'_>) -> Outcome {
        by_element(frame, attend::<f32>, attend::<bf16>)
    }
}

fn attend<T: Float>(frame: &mut Frame<'_>) -> Outcome {
    let [pages, scale, sliding_window, soft_cap] = native::OPTIONS;
    let (qkv, kv, table) = (frame.operand(0)?, frame.operand(1)?, frame.operand(3)?);
    let &[features, _] = qkv.dims else { return Err(format!("projections of rank {}", qkv.dims.len())) };
    let &[_, page_size, kv_vectors, head_dim] = kv.dims else {
        return Err(format!("KV pages of rank {}", kv.dims.len()));
    };
    let &[_, pages_per_seq] = table.dims else { return Err(format!("a page table of rank {}", table.dims.len())) };
    let scalar = |index: usize| -> std::result::Result<usize, String> {
        let value = frame.operand(index)?.values::<i32>()?.first().copied().unwrap_or(0);
        usize::try_from(value).map_err(|_| format!("operand {index} is {value}"))
    };
    let call = Call {
        layer: Layer {
            first_page: scalar(6)?,
            kv: KvLayout {
                element: kv.element,
                layers: 1,
                pages: number(frame, pages)?.unwrap_or(0),
                page_size: page_size as usize,
                heads: KvLayout::heads_of(kv_vectors as usize),
                head_dim: head_dim as usize,
            },
        },
        q_heads: (features / head_dim - kv_vectors) as usize,
        pages_per_seq: pages_per_seq as usize,
        scale: number(frame, scale)?.unwrap_or(1.0),
        sliding_window: number(frame, sliding_window)?,
        soft_cap: number(frame, soft_cap)?,
        kv_lens: frame.operand(2)?.values()?,
        page_indices: table.values()?,
        cu_q_lens: frame.operand(4)?.values()?,
        num_seqs: scalar(5)?,
    };
    let (slots, rotary) = (frame.operand(7)?, frame.operand(8)?);
    if !frame.aliased(1, 1)? {
        return Err("the KV buffer was not passed in place".into());
    }
    let threads = frame.threads();
    // The buffer is only ever seen through the result: first to write, then to read.
    let [out, kv_pages] = frame.all_results::<T, 2>()?;
    native::step(&call, qkv.values()?, rotary.values()?, slots.values()?, kv_pages, out, &threads);
    Ok(())
}

/// `pagoda_tile_machine`: runs a Mosaic kernel, on a machine with the VMEM that the kernel asks for.
struct TileMachine;

/// A decoded kernel and the machine it runs on.
type Loaded = Arc<(Program, Machine)>;

/// Kernels by their configuration: a step program calls each many times.
static LOADED: Mutex<Option<HashMap<String, Loaded>>> = Mutex::new(None);

impl TileMachine {
    fn load(frame: &Frame<'_>) -> std::result::Result<Loaded, String> {
        let option = |name| frame.string(name).ok_or_else(|| format!("the option `{name}` is missing"));
        let (kernel, aliases) = (option(wire::KERNEL)?, option(wire::ALIASES)?);
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = loaded.get_or_insert_default();
        if let Some(known) = loaded.get(kernel) {
            return Ok(Arc::clone(known));
        }
        let pairs = aliases.split(',').filter(|pair| !pair.is_empty()).map(|pair| {
            let (operand, result) = pair.split_once(':')?;
            Some((operand.parse().ok()?, result.parse().ok()?))
        });
        let pairs: Vec<(usize, usize)> =
            pairs.collect::<Option<_>>().ok_or_else(|| format!("aliases = {aliases} are no pairs"))?;
        let context = Context::new();
        let opened = wire::open(&context, kernel).map_err(|error| error.to_string())?;
        let program = Program::decode(&opened.module).map_err(|error| error.to_string())?.with_aliases(&pairs);
        let machine = Machine::default();
        let machine = Machine { vmem_bytes: opened.vmem_limit.unwrap_or(machine.vmem_bytes), ..machine };
        let known = Arc::new((program, machine));
        loaded.insert(kernel.to_owned(), Arc::clone(&known));
        Ok(known)
    }
}

impl CustomCall for TileMachine {
    const TARGET: &'static str = wire::TILE_MACHINE;

    fn call(frame: &mut Frame<'_>) -> Outcome {
        let loaded = Self::load(frame)?;
        let (program, machine) = &*loaded;
        let sizes = |dims: &[i64]| dims.iter().map(|&dim| dim as usize).collect::<Vec<_>>();
        let inputs = (0..frame.operands()).map(|index| {
            let operand = frame.operand(index)?;
            Ok(HostTensor::from_bytes(operand.element, &sizes(operand.dims), operand.bytes()))
        });
        let inputs = inputs.collect::<std::result::Result<Vec<_>, String>>()?;
        let outputs = (0..frame.results())
            .map(|index| frame.result_type(index).map(|(element, dims)| TensorType::new(element, &sizes(dims))));
        let outputs = outputs.collect::<std::result::Result<Vec<_>, String>>()?;
        let run = program.run(machine, &inputs, &outputs).map_err(|fault| fault.to_string())?;
        for (index, output) in run.outputs.iter().enumerate() {
            frame.result(index)?.copy_from_slice(output.bytes());
        }
        Ok(())
    }
}
