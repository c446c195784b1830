//! Kernels on the host for the CPU plugin: handlers of the custom calls that `pagoda_kernels` emits, in Rust, and of
//! Mosaic kernels, which the tile machine runs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;
use pagoda_ir::mosaic::wire;
use pagoda_ir::tile_machine::{Machine, Program};
use pagoda_ir::{Context, Element, HostTensor, TensorType};
use pagoda_kernels::float::{Float, Times};
use pagoda_kernels::grouped_matmul;
use pagoda_kernels::matmul::native::{Around, Norm};
use pagoda_kernels::matmul::{self, Activation};
use pagoda_kernels::rpa::cached::{self, Cached};
use pagoda_kernels::rpa::native::{self, Call, Layer};
use pagoda_kernels::rpa::{KvLayout, KvRows};

use crate::pjrt::custom_call::{CustomCall, Frame, Options, register};
use crate::pjrt::{Plugin, Result, guard};

type Outcome = std::result::Result<(), String>;

/// Registers every handler with a plugin. To be called before programs that use them are compiled.
///
/// # Errors
/// When the plugin takes no custom calls.
pub fn register_all(plugin: &Plugin) -> Result<()> {
    register::<TileMachine>(plugin)?;
    register::<HostCall>(plugin)?;
    register::<Attention>(plugin)?;
    register::<Take>(plugin)?;
    register::<GroupedMatmul>(plugin)?;
    register::<Matmul>(plugin)
}

/// Calls the handler for the type of operand 0.
fn by_element(frame: Frame<'_>, f32s: fn(Frame<'_>) -> Outcome, bf16s: fn(Frame<'_>) -> Outcome) -> Outcome {
    match frame.operands.get(0)?.element {
        Element::F32 => f32s(frame),
        Element::Bf16 => bf16s(frame),
        other => Err(format!("operands are {other}; f32 and bf16 are supported")),
    }
}

/// Calls the handler for the types of a weight, operand 0, and of activations, operand 1: both f32, both bf16, or bf16 beside f32.
fn by_types(frame: Frame<'_>, handlers: [fn(Frame<'_>) -> Outcome; 3]) -> Outcome {
    let [f32s, bf16s, mixed] = handlers;
    match (frame.operands.get(0)?.element, frame.operands.get(1)?.element) {
        (Element::F32, Element::F32) => f32s(frame),
        (Element::Bf16, Element::Bf16) => bf16s(frame),
        (Element::Bf16, Element::F32) => mixed(frame),
        (w, x) => Err(format!("a weight of {w} and activations of {x} are not supported")),
    }
}

/// An option of the call that is a number, where it is on.
fn number<N: std::str::FromStr>(options: Options<'_>, name: &str) -> std::result::Result<Option<N>, String> {
    let parse = |text: &str| text.parse().map_err(|_| format!("{name} = {text} is not a number"));
    options.string(name).map(parse).transpose()
}

/// `pagoda_matmul`: see [`matmul::native`].
struct Matmul;

impl CustomCall for Matmul {
    const TARGET: &'static str = matmul::native::TARGET;

    fn call(frame: Frame<'_>) -> Outcome {
        by_types(frame, [multiply::<f32, f32>, multiply::<bf16, bf16>, multiply::<bf16, f32>])
    }
}

fn multiply<T: Times<X>, X: Float>(frame: Frame<'_>) -> Outcome {
    let [norm, plus_one, gate, residual] = matmul::native::OPTIONS;
    let Frame { operands, results, options } = frame;
    let mut operands = (0..operands.len()).map(|index| operands.get(index));
    let mut next = || operands.next().unwrap_or_else(|| Err("an operand is missing".into()));
    let (w, x) = (next()?, next()?);
    let &[_, columns] = x.dims else { return Err(format!("activations of rank {}", x.dims.len())) };
    let norm = match number(options, norm)? {
        Some(epsilon) => {
            Some(Norm { weight: next()?.values::<X>()?, epsilon, plus_one: options.string(plus_one).is_some() })
        }
        None => None,
    };
    let residual = if options.string(residual).is_some() { Some(next()?.values::<X>()?) } else { None };
    let gates = [Activation::SiluGate, Activation::GeluGate];
    let activation = match options.string(gate) {
        None => Activation::Identity,
        Some(name) => {
            let known = gates.into_iter().find(|gate| gate.name() == Some(name));
            known.ok_or_else(|| format!("{gate} = {name} is not one that is known"))?
        }
    };
    let around = Around { norm, activation, residual };
    let w = w.values::<T>()?;
    let call = matmul::native::Call { w, x: x.values::<X>()?, columns: columns as usize, around, resident: guard(w) };
    let threads = options.threads();
    if results.ty(0)?.0 == Element::F32 {
        let [y] = results.values::<f32, 1>()?;
        matmul::native::multiply(&call, y, &threads);
    } else {
        let [y] = results.values::<X, 1>()?;
        matmul::native::multiply(&call, y, &threads);
    }
    Ok(())
}

/// `pagoda_grouped_matmul`: see [`grouped_matmul::native`].
struct GroupedMatmul;

impl CustomCall for GroupedMatmul {
    const TARGET: &'static str = grouped_matmul::native::TARGET;

    fn call(frame: Frame<'_>) -> Outcome {
        by_types(frame, [multiply_groups::<f32, f32>, multiply_groups::<bf16, bf16>, multiply_groups::<bf16, f32>])
    }
}

fn multiply_groups<T: Times<X>, X: Float>(Frame { operands, results, options }: Frame<'_>) -> Outcome {
    let (w, x, sizes) = (operands.get(0)?, operands.get(1)?, operands.get(2)?.values::<i32>()?);
    let (&[columns, k], &[m, _]) = (w.dims, x.dims) else { return Err("operands are not matrices".into()) };
    let rows: i64 = sizes.iter().map(|&size| i64::from(size)).sum();
    if rows > m || sizes.iter().any(|&size| size < 0) {
        return Err(format!("groups of {sizes:?} rows, of {m} in all"));
    }
    let gated = options.string(grouped_matmul::native::GATED).is_some();
    let n = columns as usize / sizes.len().max(1) / if gated { 2 } else { 1 };
    let w = w.values::<T>()?;
    let groups =
        grouped_matmul::native::Groups { x: x.values::<X>()?, w, sizes, k: k as usize, n, gated, resident: guard(w) };
    let threads = options.threads();
    if results.ty(0)?.0 == Element::F32 {
        let [y] = results.values::<f32, 1>()?;
        grouped_matmul::native::multiply_groups(&groups, y, &threads);
    } else {
        let [y] = results.values::<X, 1>()?;
        grouped_matmul::native::multiply_groups(&groups, y, &threads);
    }
    Ok(())
}

/// The custom call that takes rows of a table: operands `[rows, width]` of any type and `i32[n]`, result `[n, width]`. A row
/// beyond the table is the nearest one of it, as StableHLO's gather has it.
///
/// XLA's CPU compiler gathers in f32 and, in a loop, widens the whole table ahead of it: of a bf16 embedding twice its bytes,
/// in every call.
pub(crate) const TAKE: &str = "pagoda_take";

struct Take;

impl CustomCall for Take {
    const TARGET: &'static str = TAKE;

    fn call(Frame { operands, mut results, .. }: Frame<'_>) -> Outcome {
        let (table, ids) = (operands.get(0)?, operands.get(1)?);
        let &[rows, _] = table.dims else { return Err(format!("a table of rank {}", table.dims.len())) };
        let (table, taken) = (table.bytes()?, results.bytes(0)?);
        if table.is_empty() {
            return if taken.is_empty() { Ok(()) } else { Err("rows of an empty table".into()) };
        }
        let width = table.len() / rows as usize;
        for (id, row) in ids.values::<i32>()?.iter().zip(taken.chunks_exact_mut(width)) {
            row.copy_from_slice(&table[i64::from(*id).clamp(0, rows - 1) as usize * width..][..width]);
        }
        Ok(())
    }
}

/// `pagoda_rpa`: see [`native`].
struct Attention;

impl CustomCall for Attention {
    const TARGET: &'static str = native::TARGET;

    fn call(frame: Frame<'_>) -> Outcome {
        match frame.operands.get(1)?.element {
            Element::F32 => attend::<f32, f32>(frame),
            Element::Bf16 => by_element(frame, attend::<f32, bf16>, attend::<bf16, bf16>),
            Element::F8E4M3Fn => by_element(frame, attend::<f32, cached::F8E4M3Fn>, attend::<bf16, cached::F8E4M3Fn>),
            Element::F8E5M2 => by_element(frame, attend::<f32, cached::F8E5M2>, attend::<bf16, cached::F8E5M2>),
            Element::I8 => by_element(frame, attend::<f32, i8>, attend::<bf16, i8>),
            other => Err(format!("a KV cache of {other} is not supported")),
        }
    }
}

fn attend<T: Float, C: Cached>(frame: Frame<'_>) -> Outcome {
    let [pages, kv_heads, scale, sliding_window, soft_cap, sinks, scaled] = native::OPTIONS;
    let Frame { operands, results, options } = frame;
    let (qkv, kv, table) = (operands.get(0)?, operands.get(1)?, operands.get(3)?);
    let &[features, _] = qkv.dims else { return Err(format!("projections of rank {}", qkv.dims.len())) };
    let &[_, page_size, rows, width] = kv.dims else {
        return Err(format!("KV pages of rank {}", kv.dims.len()));
    };
    let &[_, pages_per_seq] = table.dims else { return Err(format!("a page table of rank {}", table.dims.len())) };
    let scalar = |index: usize| -> std::result::Result<usize, String> {
        let value = operands.get(index)?.values::<i32>()?.first().copied().unwrap_or(0);
        usize::try_from(value).map_err(|_| format!("operand {index} is {value}"))
    };
    let heads: usize = number(options, kv_heads)?.filter(|&heads| heads > 0).ok_or("KV heads are missing")?;
    let (slots, rotary) = (operands.get(7)?, operands.get(8)?);
    let &[_, head_dim] = rotary.dims else { return Err(format!("angles of rank {}", rotary.dims.len())) };
    let (rows, width, head_dim) = (rows as usize, width as usize, head_dim as usize);
    let kv_rows = match rows == KvLayout::rows_of(heads) && width == head_dim {
        true => KvRows::Interleaved,
        false if rows == heads && width == KvRows::Packed.width(head_dim) => KvRows::Packed,
        false => KvRows::Padded,
    };
    let floats = |index: usize| operands.get(index)?.values::<f32>();
    let has_sinks = options.string(sinks).is_some();
    let sinks = has_sinks.then(|| floats(9)).transpose()?;
    let scales = 9 + usize::from(has_sinks);
    let scales = options.string(scaled).map(|_| Ok::<_, String>([floats(scales)?, floats(scales + 1)?])).transpose()?;
    let call = Call {
        layer: Layer {
            first_page: scalar(6)?,
            kv: KvLayout {
                element: kv.element,
                layers: 1,
                pages: number(options, pages)?.unwrap_or(0),
                page_size: page_size as usize,
                heads,
                head_dim,
                kv_rows,
            },
        },
        q_heads: features as usize / head_dim - KvLayout::rows_of(heads),
        pages_per_seq: pages_per_seq as usize,
        scale: number(options, scale)?.unwrap_or(1.0),
        sliding_window: number(options, sliding_window)?,
        soft_cap: number(options, soft_cap)?,
        sinks,
        scales,
        kv_lens: operands.get(2)?.values()?,
        page_indices: table.values()?,
        cu_q_lens: operands.get(4)?.values()?,
        num_seqs: scalar(5)?,
    };
    if kv.aliased() != Some(1) {
        return Err("the KV buffer was not passed in place".into());
    }
    let threads = options.threads();
    // The buffer is only ever seen through the result: first to write, then to read.
    let (out, kv_pages) = results.pair::<T, C::Code>()?;
    native::step::<T, C>(&call, qkv.values()?, rotary.values()?, slots.values()?, kv_pages, out, &threads);
    Ok(())
}

/// `pagoda_tile_machine`: runs a Mosaic kernel, on a machine with the VMEM that the kernel asks for.
struct TileMachine;

/// A decoded kernel and the machine it runs on.
type Loaded = Arc<(Program, Machine)>;

/// Kernels by their configuration and aliases: a step program calls each many times, and no process needs many at once.
static LOADED: Mutex<Recent<Loaded>> = Mutex::new(Recent::new(64));

/// The values that were asked for last, by two words; at most `most` of them.
struct Recent<V> {
    most: usize,
    /// The last one first.
    entries: Vec<([String; 2], V)>,
}

impl<V: Clone> Recent<V> {
    const fn new(most: usize) -> Self {
        Self { most, entries: Vec::new() }
    }

    /// The value of `key`, which `make` makes where it is not known.
    fn get<E>(
        &mut self,
        key: [&str; 2],
        make: impl FnOnce() -> std::result::Result<V, E>,
    ) -> std::result::Result<V, E> {
        let entry = match self.entries.iter().position(|(known, _)| *known == key) {
            Some(index) => self.entries.remove(index),
            None => (key.map(str::to_owned), make()?),
        };
        let value = entry.1.clone();
        self.entries.truncate(self.most - 1);
        self.entries.insert(0, entry);
        Ok(value)
    }
}

impl TileMachine {
    fn load(options: Options<'_>) -> std::result::Result<Loaded, String> {
        let option = |name| options.string(name).ok_or_else(|| format!("the option `{name}` is missing"));
        let (kernel, aliases) = (option(wire::KERNEL)?, option(wire::ALIASES)?);
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.get([kernel, aliases], || {
            let context = Context::new();
            let opened = wire::open(&context, kernel).map_err(|error| error.to_string())?;
            let program = Program::decode(&opened.module).map_err(|error| error.to_string())?;
            let machine = Machine::default();
            let machine = Machine { vmem_bytes: opened.vmem_limit.unwrap_or(machine.vmem_bytes), ..machine };
            Ok(Arc::new((program.with_aliases(&pairs(aliases)?), machine)))
        })
    }
}

/// `0:1,2:0`: pairs (operand, result).
fn pairs(aliases: &str) -> std::result::Result<Vec<(usize, usize)>, String> {
    let pairs = aliases.split(',').filter(|pair| !pair.is_empty()).map(|pair| {
        let (operand, result) = pair.split_once(':')?;
        Some((operand.parse().ok()?, result.parse().ok()?))
    });
    pairs.collect::<Option<_>>().ok_or_else(|| format!("aliases = {aliases} are not pairs operand:result"))
}

impl CustomCall for TileMachine {
    const TARGET: &'static str = wire::TILE_MACHINE;

    fn call(frame: Frame<'_>) -> Outcome {
        let loaded = Self::load(frame.options)?;
        let (program, machine) = &*loaded;
        with_arrays(frame, |inputs, outputs| {
            let run = program.run(machine, inputs, outputs).map_err(|fault| fault.to_string())?;
            Ok(run.outputs)
        })
    }
}

/// A function of this process that programs call: which call it is, its operands, and the types of its results.
pub type HostFunction =
    dyn Fn(usize, &[HostTensor], &[TensorType]) -> std::result::Result<Vec<HostTensor>, String> + Send + Sync;

/// The functions that programs may call now, by number.
static HOST_FUNCTIONS: Mutex<BTreeMap<u64, Arc<HostFunction>>> = Mutex::new(BTreeMap::new());

/// A function that programs may call for as long as this lives.
#[derive(Debug)]
pub struct HostCalls {
    number: u64,
}

impl HostCalls {
    /// The custom call by which a program calls it.
    pub const TARGET: &'static str = "pagoda_host_call";
    const FUNCTION: &'static str = "function";
    const CALL: &'static str = "call";

    /// Lets programs call `function`, from any thread, several at once.
    pub fn new(function: Arc<HostFunction>) -> Self {
        let mut functions = HOST_FUNCTIONS.lock().unwrap_or_else(PoisonError::into_inner);
        let number = functions.last_key_value().map_or(0, |(last, _)| last + 1);
        functions.insert(number, function);
        Self { number }
    }

    /// The options of call `call`.
    pub fn options(&self, call: usize) -> Vec<(&'static str, String)> {
        vec![(Self::FUNCTION, self.number.to_string()), (Self::CALL, call.to_string())]
    }
}

impl Drop for HostCalls {
    fn drop(&mut self) {
        HOST_FUNCTIONS.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

/// `pagoda_host_call`: calls a function of this process.
struct HostCall;

impl CustomCall for HostCall {
    const TARGET: &'static str = HostCalls::TARGET;

    fn call(frame: Frame<'_>) -> Outcome {
        let missing = |name: &str| format!("the option `{name}` is missing");
        let number = |name| number::<u64>(frame.options, name)?.ok_or_else(|| missing(name));
        let (function, call) = (number(HostCalls::FUNCTION)?, number(HostCalls::CALL)?);
        let function = HOST_FUNCTIONS.lock().unwrap_or_else(PoisonError::into_inner).get(&function).cloned();
        let function = function.ok_or("the function that it calls is gone")?;
        with_arrays(frame, |operands, results| function(call as usize, operands, results))
    }
}

/// Hands the arrays of a call to `function`, and its results back.
fn with_arrays(
    frame: Frame<'_>,
    function: impl FnOnce(&[HostTensor], &[TensorType]) -> std::result::Result<Vec<HostTensor>, String>,
) -> Outcome {
    let Frame { operands, mut results, .. } = frame;
    let sizes = |dims: &[i64]| dims.iter().map(|&dim| dim as usize).collect::<Vec<_>>();
    let inputs = (0..operands.len()).map(|index| {
        let operand = operands.get(index)?;
        Ok(HostTensor::from_bytes(operand.element, &sizes(operand.dims), operand.bytes()?))
    });
    let inputs = inputs.collect::<std::result::Result<Vec<_>, String>>()?;
    let types =
        (0..results.len()).map(|index| results.ty(index).map(|(element, dims)| TensorType::new(element, &sizes(dims))));
    let types = types.collect::<std::result::Result<Vec<_>, String>>()?;
    for (index, output) in function(&inputs, &types)?.iter().enumerate() {
        results.bytes(index)?.copy_from_slice(output.bytes());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_last_is_kept() {
        let mut recent: Recent<usize> = Recent::new(2);
        let mut made = Vec::new();
        // The second word counts: a kernel with other aliases is another program.
        for key in [["a", ""], ["a", "0:0"], ["a", ""], ["b", ""], ["a", ""], ["a", "0:0"]] {
            let value = recent.get(key, || {
                made.push(key);
                Ok::<_, ()>(made.len())
            });
            assert!(value.is_ok());
        }
        assert_eq!(made, [["a", ""], ["a", "0:0"], ["b", ""], ["a", "0:0"]], "[a, 0:0] is the one to go when b comes");
        assert_eq!(recent.get(["c", ""], || Err("as asked")), Err("as asked"));
        assert_eq!(recent.entries, [(["a", "0:0"].map(str::to_owned), 4), (["a", ""].map(str::to_owned), 1)]);
    }

    #[test]
    fn aliases_are_pairs() {
        assert_eq!(pairs(""), Ok(vec![]));
        assert_eq!(pairs("0:1,2:0"), Ok(vec![(0, 1), (2, 0)]));
        assert_eq!(pairs("0:1,x").unwrap_err(), "aliases = 0:1,x are not pairs operand:result");
    }
}
