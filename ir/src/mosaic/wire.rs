//! Kernels on the wire: `stable_mosaic` bytecode in the configuration of a `tpu_custom_call`, and back.
//!
//! The body of a custom call is a module whose ops are called `stable_mosaic.<op>` and which carries the version of
//! that vocabulary ([`VERSION`]); types and attributes keep their names. It is written as MLIR bytecode, in base64,
//! into a JSON object, beside the limit of scoped VMEM. Source: `tpu_custom_call.py` and `serde.cc` of JAX 0.10.2.

use std::cell::LazyCell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use melior::ir::{
    Attribute, AttributeLike, Block, BlockLike, Location, Module, Region, RegionLike, RegionRef, TypeLike, Value,
    ValueLike,
    attribute::{ArrayAttribute, IntegerAttribute},
    block::BlockRef,
    operation::{Operation, OperationBuilder, OperationLike, OperationMutLike, OperationRef},
    r#type::{IntegerType, MemRefType, ShapedTypeLike},
};
use serde_json::{Value as Json, json};

pub use super::bytecode::{MAGIC, is_bytecode};
use super::{
    builder::{Kernel, Role, Semantics},
    bytecode::{Sections, readable},
    debug::Locations,
    location::Frame,
    signature::{Signature, is_for_sparse_core, kernel_functions, op_name},
    text,
};
use crate::{
    context::{Context, diagnosed},
    element::Element,
    error::{Error, Result},
    shape::TensorType,
    stablehlo::{self, BackendConfig, ConfigValue, CustomCall, OutputOperandAlias},
    tensor::HostTensor,
};

/// The version of the `stable_mosaic` vocabulary that Pagoda writes.
pub const VERSION: i64 = 15;
/// The newest that it reads: what JAX 0.12.0 writes beside a libtpu as new (its `jax.export` writes 15).
pub const NEWEST_VERSION: i64 = 18;
/// The oldest that it reads: what `jax.export` of JAX 0.10.2 writes, for older compilers.
pub const OLDEST_VERSION: i64 = 11;
/// The custom call that libtpu compiles as a Mosaic kernel.
pub const TARGET: &str = "tpu_custom_call";
pub(super) const PREFIX: &str = "stable_mosaic.";
const VERSION_ATTRIBUTE: &str = "stable_mosaic.version";
/// XLA's number of VMEM in `scoped_memory_configs`.
const XLA_VMEM: u64 = 1;

/// Bytecode of `module` with its ops renamed for the wire.
///
/// # Panics
/// When `module` does not verify; that of a [`Kernel`] does.
pub fn serialize(module: &Module) -> Vec<u8> {
    let context = module.context();
    // SAFETY: the module keeps its context alive.
    let context = unsafe { context.to_ref() };
    let mut mangled = renamed(context, module, vec![], &|op| (format!("{PREFIX}{}", op_name(op)), None))
        .expect("the module is sound");
    let version = IntegerAttribute::new(IntegerType::new(context, 64).into(), VERSION);
    mangled.as_operation_mut().set_attribute(VERSION_ATTRIBUTE, version.into());
    mangled.as_operation().write_bytecode()
}

/// The module that `body` holds, in readable form. `body` is bytecode or text, mangled or not.
///
/// Damage is an error as far as MLIR's reader notices it; that reader is not hardened against hostile bytecode.
///
/// # Errors
/// When MLIR cannot read it, or its ops are of a version beyond [`OLDEST_VERSION`] to [`NEWEST_VERSION`].
pub fn deserialize<'c>(context: &'c Context, body: &[u8]) -> Result<Module<'c>> {
    located(context, body, vec![])
}

/// As [`deserialize`], with locations that come beside the body: of each op, outermost first, and behind it those of its
/// regions' parameters.
fn located<'c>(context: &'c Context, body: &[u8], locations: Vec<Location<'c>>) -> Result<Module<'c>> {
    let module = match is_bytecode(body) {
        true => read_bytecode(context.melior(), readable(body).as_deref().unwrap_or(body))
            .map_err(|diagnostics| Error::mosaic(format!("the body is not an MLIR module: {diagnostics}")))?,
        false => text::parse(context, &String::from_utf8_lossy(body), "the body")?,
    };
    let context = context.melior();
    let Ok(version) = module.as_operation().attribute(VERSION_ATTRIBUTE) else { return Ok(module) };
    let version = IntegerAttribute::try_from(version).map_or(0, |version| version.value());
    if !(OLDEST_VERSION..=NEWEST_VERSION).contains(&version) {
        let read = format!("only {OLDEST_VERSION} to {NEWEST_VERSION} are read");
        return Err(Error::mosaic(format!(
            "the body is of {VERSION_ATTRIBUTE} {version}, whose ops may mean something else: {read}"
        )));
    }
    let name = |op: OperationRef| {
        let name = op_name(op);
        let name = name.strip_prefix(PREFIX).unwrap_or(&name);
        upgraded(op, name, version).unwrap_or_else(|| (name.to_owned(), None))
    };
    let module = renamed(context, &module, locations, &name)?;
    let (valid, diagnostics) = diagnosed(context, || module.as_operation().verify());
    if valid { Ok(module) } else { Err(Error::Verify { module: "the kernel".to_owned(), diagnostics }) }
}

/// The locations in `tpu.locs` of a module that holds nothing else. Source: what JAX 0.12.0 writes.
fn read_locations<'c>(context: &'c Context, module: &[u8]) -> Result<Vec<Location<'c>>> {
    let module = read_bytecode(context.melior(), readable(module).as_deref().unwrap_or(module))
        .map_err(|diagnostics| Error::mosaic(format!("the list of locations is not an MLIR module: {diagnostics}")))?;
    let Ok(list) = module.as_operation().attribute("tpu.locs") else { return Ok(vec![]) };
    let list = ArrayAttribute::try_from(list).map_err(|error| Error::mosaic(format!("tpu.locs: {error}")))?;
    let elements = (0..list.len()).filter_map(|at| list.element(at).ok());
    let location = |element: Attribute| {
        // SAFETY: the attribute is a location, of the context that outlives the module.
        unsafe {
            let is_location = mlir_sys::mlirAttributeIsALocation(element.to_raw());
            is_location.then(|| Location::from_raw(mlir_sys::mlirLocationFromAttribute(element.to_raw())))
        }
    };
    Ok(elements.map_while(location).collect())
}

/// A StableHLO module that was written without StableHLO's own encoding, as Pagoda writes them, as text.
///
/// # Errors
/// When MLIR cannot read it.
pub fn bytecode_as_text(context: &Context, module: &[u8]) -> Result<String> {
    let module = read_bytecode(context.melior(), module)
        .map_err(|diagnostics| Error::mosaic(format!("the bytecode is not an MLIR module: {diagnostics}")))?;
    Ok(text::print(&module))
}

/// The module, or what MLIR says.
fn read_bytecode<'c>(context: &'c melior::Context, body: &[u8]) -> std::result::Result<Module<'c>, String> {
    // Bytecode is read in place and wants alignment.
    let aligned = HostTensor::from_bytes(Element::U8, &[body.len()], body);
    let (module, diagnostics) = diagnosed(context, || {
        let source = mlir_sys::MlirStringRef { data: aligned.bytes().as_ptr().cast(), length: body.len() };
        // SAFETY: the source outlives the call, and a null module becomes `None`.
        unsafe { Module::from_option_raw(mlir_sys::mlirModuleCreateParse(context.to_raw(), source)) }
    });
    module.ok_or(diagnostics)
}

/// A copy of a module with every op but the module itself renamed.
fn renamed<'c>(
    context: &'c melior::Context,
    module: &Module,
    locations: Vec<Location<'c>>,
    rename: &Rename,
) -> Result<Module<'c>> {
    let copy = Module::new(Location::unknown(context));
    let mut locations = locations.into_iter();
    // That of the module itself.
    locations.next();
    let mut renamer = Renamer { context, rename, locations, values: HashMap::new(), blocks: HashMap::new() };
    for operation in operations(module.body()) {
        copy.body().append_operation(renamer.operation(operation)?);
    }
    Ok(copy)
}

fn operations<'c: 'a, 'a>(block: BlockRef<'c, 'a>) -> impl Iterator<Item = OperationRef<'c, 'a>> {
    std::iter::successors(block.first_operation(), |operation| operation.next_in_block())
}

fn blocks<'c: 'a, 'a>(region: RegionRef<'c, 'a>) -> impl Iterator<Item = BlockRef<'c, 'a>> {
    std::iter::successors(region.first_block(), |block| block.next_in_region())
}

/// The new name of an op, and an attribute that it gets: a number.
type Rename<'r> = dyn Fn(OperationRef) -> (String, Option<(&'static str, i64)>) + 'r;

/// What an op of an older version is called since, if it is not `name`.
///
/// Until version 15, a SparseCore's loads and stores with a mask left no gaps in memory.
fn upgraded(op: OperationRef, name: &str, version: i64) -> Option<(String, Option<(&'static str, i64)>)> {
    const DENSE: i64 = 15;
    let (since, dim, base) = match name {
        "tpu.vector_load" => ("tpu.vector_expand_load", "expand_dim", 0),
        "tpu.vector_store" => ("tpu.vector_compress_store", "compress_dim", 1),
        _ => return None,
    };
    let rank = MemRefType::try_from(op.operand(base).ok()?.r#type()).ok()?.rank();
    let is_masked = op.operand_count() > base + 1 + rank;
    (version <= DENSE && is_masked && is_of_sparse_core(op)).then(|| (since.to_owned(), Some((dim, rank as i64 - 1))))
}

/// Whether an op is in a function for a SparseCore.
fn is_of_sparse_core(op: OperationRef) -> bool {
    std::iter::successors(op.parent_operation(), |op| op.parent_operation()).any(is_for_sparse_core)
}

struct Renamer<'r, 'c> {
    context: &'c melior::Context,
    rename: &'r Rename<'r>,
    /// Instead of the ops' and parameters' own, as far as there are any.
    locations: std::vec::IntoIter<Location<'c>>,
    values: HashMap<*const std::ffi::c_void, mlir_sys::MlirValue>,
    blocks: HashMap<*mut std::ffi::c_void, mlir_sys::MlirBlock>,
}

impl<'c> Renamer<'_, 'c> {
    fn operation(&mut self, source: OperationRef) -> Result<Operation<'c>> {
        // SAFETY: types, attributes and locations belong to the context, which both modules share and which outlives
        // the copy; blocks and values are looked up among those of the copy.
        unsafe {
            let early = || Error::mosaic(format!("{} uses a value or a block before its definition", op_name(source)));
            let operands = (source.operands())
                .map(|operand| self.values.get(&operand.to_raw().ptr).map(|&raw| Value::from_raw(raw)))
                .collect::<Option<Vec<Value>>>()
                .ok_or_else(early)?;
            let results: Vec<_> =
                source.results().map(|result| melior::ir::Type::from_raw(result.r#type().to_raw())).collect();
            let mut attributes: Vec<_> = source
                .attributes()
                .map(|(name, value)| {
                    (melior::ir::Identifier::from_raw(name.to_raw()), melior::ir::Attribute::from_raw(value.to_raw()))
                })
                .collect();
            let location = self.locations.next().unwrap_or(Location::from_raw(source.location().to_raw()));
            // Locations of all parameters come before those of the ops inside.
            let parameters = source.regions().flat_map(blocks).map(|block| block.argument_count()).sum();
            let mut parameters = self.locations.by_ref().take(parameters).collect::<Vec<_>>().into_iter();
            let regions = source.regions().map(|region| self.region(region, &mut parameters)).collect::<Result<_>>()?;
            let successors = (source.successors())
                .map(|block| self.blocks.get(&block.to_raw().ptr).map(|&raw| BlockRef::from_raw(raw)))
                .collect::<Option<Vec<BlockRef>>>()
                .ok_or_else(early)?;
            let successors: Vec<&Block> = successors.iter().map(|block| &**block).collect();
            let (name, added) = (self.rename)(source);
            if let Some((key, value)) = added {
                let value = IntegerAttribute::new(IntegerType::new(self.context, 64).into(), value);
                attributes.push((melior::ir::Identifier::new(self.context, key), value.into()));
            }
            let copy = OperationBuilder::new(&name, location)
                .add_operands(&operands)
                .add_results(&results)
                .add_attributes(&attributes)
                .add_regions_vec(regions)
                .add_successors(&successors)
                .build()
                .map_err(|error| Error::mosaic(format!("{name}: {error}")))?;
            for (from, to) in source.results().zip(copy.results()) {
                self.values.insert(from.to_raw().ptr, to.to_raw());
            }
            Ok(copy)
        }
    }

    fn region(&mut self, source: RegionRef, parameters: &mut std::vec::IntoIter<Location<'c>>) -> Result<Region<'c>> {
        let region = Region::new();
        for from in blocks(source) {
            // SAFETY: as in `operation`.
            let arguments: Vec<_> = (0..from.argument_count())
                .filter_map(|index| from.argument(index).ok())
                .map(|argument| unsafe {
                    let r#type = melior::ir::Type::from_raw(argument.r#type().to_raw());
                    let own = Location::from_raw(argument.location().to_raw());
                    (r#type, parameters.next().unwrap_or(own))
                })
                .collect();
            let to = region.append_block(Block::new(&arguments));
            self.blocks.insert(from.to_raw().ptr, to.to_raw());
            for index in 0..from.argument_count() {
                if let (Ok(from), Ok(to)) = (from.argument(index), to.argument(index)) {
                    self.values.insert(from.to_raw().ptr, to.to_raw());
                }
            }
        }
        for from in blocks(source) {
            // SAFETY: the block was made above and the region owns it.
            let to: BlockRef = unsafe { BlockRef::from_raw(self.blocks[&from.to_raw().ptr]) };
            for operation in operations(from) {
                to.append_operation(self.operation(operation)?);
            }
        }
        Ok(region)
    }
}

/// The `backend_config` of a custom call that runs `kernel`.
pub fn backend_config(kernel: &Kernel) -> String {
    let body = BASE64.encode(serialize(kernel.module()));
    let mut config = json!({
        "custom_call_config": { "body": body, "serialization_format": 1, "needs_layout_passes": true },
    });
    if let Some(bytes) = kernel.vmem_limit() {
        config["scoped_memory_configs"] = json!([{ "memory_space": XLA_VMEM, "offset": 0, "size": bytes }]);
    }
    if let Some(cost) = kernel.cost() {
        config["custom_call_config"]["cost_estimate"] = json!(cost);
    }
    if kernel.has_unchecked_bounds() {
        config["custom_call_config"]["disable_bounds_checks"] = json!(true);
    }
    config.to_string()
}

/// A custom call's configuration, opened.
pub struct Opened<'c> {
    /// The kernel in readable form.
    pub module: Module<'c>,
    /// The limit of scoped VMEM in bytes, if the call sets one.
    pub vmem_limit: Option<usize>,
}

/// The custom call by which a program on the host has the tile machine run a kernel.
pub const TILE_MACHINE: &str = "pagoda_tile_machine";
/// Its option that holds what a `tpu_custom_call` has as its `backend_config`.
pub const KERNEL: &str = "kernel";
/// Its option that lists the outputs that share an input's memory, `operand:result`, separated by commas.
pub const ALIASES: &str = "aliases";

/// Opens the `backend_config` of a `tpu_custom_call`.
///
/// # Errors
/// When it is not such a configuration, or its body is damaged or holds no kernel.
pub fn open<'c>(context: &'c Context, backend_config: &str) -> Result<Opened<'c>> {
    let config: Json = serde_json::from_str(backend_config)
        .map_err(|error| Error::mosaic(format!("the backend_config is not JSON: {error}")))?;
    let body = config["custom_call_config"]["body"]
        .as_str()
        .ok_or_else(|| Error::mosaic("the backend_config has no `custom_call_config.body`"))?;
    let decoded = |what: &str, text: &str| {
        BASE64.decode(text).map_err(|error| Error::mosaic(format!("the {what} is not base64: {error}")))
    };
    let body = decoded("body", body)?;
    // JAX 0.12 writes locations apart, where libtpu is as new.
    let locations = match config["custom_call_config"]["debug_locations"].as_str() {
        Some(locations) => read_locations(context, &decoded("list of locations", locations)?)?,
        None => vec![],
    };
    let scopes = config["scoped_memory_configs"].as_array().map(Vec::as_slice).unwrap_or_default();
    let vmem = scopes.iter().find(|scope| scope["memory_space"].as_u64() == Some(XLA_VMEM));
    let vmem_limit = vmem.and_then(|scope| scope["size"].as_u64()).map(|size| size as usize);
    let module = located(context, &body, locations)?;
    kernel_functions(&module)?;
    Ok(Opened { module, vmem_limit })
}

/// A Mosaic custom call in a StableHLO module.
#[derive(Clone, Debug, PartialEq)]
pub struct CallSite {
    /// Its configuration, for [`open`].
    pub backend_config: String,
    /// The types of its operands and results; `None` in bytecode, where they cannot be read without StableHLO's dialect.
    pub types: Option<(Vec<TensorType>, Vec<TensorType>)>,
    /// Pairs (operand, result) that share memory; empty in bytecode.
    pub aliases: Vec<(usize, usize)>,
    /// Results that the module does not use, for [`Program::with_unused_outputs`]; empty in bytecode.
    ///
    /// [`Program::with_unused_outputs`]: crate::tile_machine::Program::with_unused_outputs
    pub unused: Vec<usize>,
    /// Where its line is in the text; `None` in bytecode.
    pub line: Option<Range<usize>>,
    /// The source line of the call and those that called it, the innermost first, as far as the text has them.
    pub frames: Vec<Frame>,
}

/// Every Mosaic custom call in a StableHLO module, in order of appearance. Takes MLIR text in any form with one op a line, and
/// bytecode (where a configuration that several calls share appears once).
///
/// StableHLO's own dialect is not needed for it: the calls are found by what their configurations look like. Time and
/// memory are proportional to the module, whatever it holds.
///
/// # Errors
/// When a configuration is damaged: none is left out. When one line of text holds two. When bytecode is cut off.
pub fn find_custom_calls(module: &[u8]) -> Result<Vec<CallSite>> {
    if is_bytecode(module) && Sections::read(module).is_none() {
        let bytes = module.len();
        return Err(Error::mosaic(format!(
            "the bytecode is damaged: its sections do not end where it does, after {bytes} bytes"
        )));
    }
    const KEY: &[u8] = b"custom_call_config";
    /// Braces before the key, one of which begins its object: values of other keys may be objects too.
    const MOST_BRACES: usize = 8;
    let mut found = Vec::new();
    let mut line = Line::default();
    let mut in_module = None;
    let locations = LazyCell::new(|| Locations::of(module));
    // What was looked at before: keys, and configurations that were found.
    let mut at = 0;
    while let Some(offset) = position(&module[at..], KEY) {
        let (last, key) = (at, at + offset);
        at = key + KEY.len();
        // In text the quotes inside the string are escaped, in bytecode they are not.
        let in_text = !module[..key].ends_with(b"\"") || module[..key].ends_with(b"\\\"");
        if in_text && key >= line.end {
            line = Line::of(module, line.end, key);
        }
        let from = if in_text { line.start.max(last) } else { last };
        let mut braces = (from..key).rev().filter(|&at| module[at] == b'{').take(MOST_BRACES);
        let config = braces.find_map(|open| {
            let mut source = Source { bytes: module, at: open, in_text };
            let config = serde_json::Deserializer::from_reader(&mut source).into_iter::<Json>().next()?.ok()?;
            config["custom_call_config"]["body"].is_string().then_some((config, source.at))
        });
        let Some((config, end)) = config else {
            // Others may use the word.
            let names = |op: &[u8]| position(op, TARGET.as_bytes()).is_some();
            let of_kernel = match in_text {
                true => *line.of_kernel.get_or_insert_with(|| names(&module[line.start..line.end])),
                false => *in_module.get_or_insert_with(|| names(module)),
            };
            if of_kernel {
                let message = format!("call {} of a Mosaic kernel: its backend_config is damaged", found.len() + 1);
                return Err(Error::mosaic(message));
            }
            continue;
        };
        at = end.max(at);
        let (mut types, mut aliases, mut unused, mut frames) = (None, vec![], vec![], vec![]);
        let span = in_text.then_some(line.start..line.end);
        if in_text {
            if std::mem::replace(&mut line.called, true) {
                let message =
                    format!("calls {} and {} of Mosaic kernels are in one line", found.len(), found.len() + 1);
                return Err(Error::mosaic(message + ": print the module with one op a line"));
            }
            let text = String::from_utf8_lossy(&module[line.start..line.end]);
            types = call_types(&text);
            aliases = if types.is_some() { call_aliases(&text) } else { vec![] };
            let results = types.as_ref().map_or(0, |(_, results)| results.len());
            unused = unused_results(&text, results, &module[line.end..]);
            frames = locations.frames(&text);
        }
        found.push(CallSite { backend_config: config.to_string(), types, aliases, unused, line: span, frames });
    }
    Ok(found)
}

fn position(bytes: &[u8], word: &[u8]) -> Option<usize> {
    bytes.windows(word.len()).position(|window| window == word)
}

/// A line of a module's text: one op.
#[derive(Default)]
struct Line {
    start: usize,
    /// Where its newline is, or the end of the text.
    end: usize,
    /// Whether it names [`TARGET`], where that was asked.
    of_kernel: Option<bool>,
    /// Whether a kernel's configuration was found in it.
    called: bool,
}

impl Line {
    /// The line around `at`; no line begins between `known` and the line's own beginning but after a newline there.
    fn of(module: &[u8], known: usize, at: usize) -> Self {
        let start =
            module[known..at].iter().rposition(|&byte| byte == b'\n').map_or(known, |newline| known + newline + 1);
        let end = module[at..].iter().position(|&byte| byte == b'\n').map_or(module.len(), |newline| at + newline);
        Self { start, end, of_kernel: None, called: false }
    }
}

/// The bytes of a module from `at` on; those of a string literal, up to its closing quote, in text.
struct Source<'m> {
    bytes: &'m [u8],
    at: usize,
    in_text: bool,
}

impl Iterator for Source<'_> {
    type Item = u8;

    fn next(&mut self) -> Option<u8> {
        let rest = &self.bytes[self.at..];
        let hex = |at: usize| (*rest.get(at)? as char).to_digit(16).map(|digit| digit as u8);
        let (byte, length) = match rest {
            [] => return None,
            [b'"', ..] if self.in_text => return None,
            [b'\\', after @ ..] if self.in_text => match (hex(1), hex(2)) {
                (Some(high), Some(low)) => (16 * high + low, 3),
                _ => (*after.first()?, 2),
            },
            &[byte, ..] => (byte, 1),
        };
        self.at += length;
        Some(byte)
    }
}

impl std::io::Read for Source<'_> {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        Ok(to.iter_mut().zip(self).map(|(to, byte)| *to = byte).count())
    }
}

/// The results of an op, `%1:2 = ...`, that the rest of its function, `behind`, does not name.
fn unused_results(op: &str, results: usize, behind: &[u8]) -> Vec<usize> {
    let of_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"_$.-".contains(byte);
    let Some(name) = op.trim_start().strip_prefix('%').and_then(|op| op.split([':', ' ']).next()) else {
        return vec![];
    };
    let mut used = vec![false; results];
    let lines = behind.split(|&byte| byte == b'\n');
    let begins = |line: &[u8]| [&b"func.func"[..], b"\"func.func\""].iter().any(|op| line.starts_with(op));
    for line in lines.take_while(|line| !begins(line.trim_ascii_start())) {
        for value in line.split(|&byte| byte == b'%').skip(1).filter_map(|value| value.strip_prefix(name.as_bytes())) {
            match value.first() {
                Some(b'#') => {
                    let digits = value[1..].iter().take_while(|byte| byte.is_ascii_digit());
                    let number = digits.fold(0_usize, |n, digit| n.saturating_mul(10) + usize::from(digit - b'0'));
                    used.iter_mut().skip(number).take(1).for_each(|used| *used = true);
                }
                Some(byte) if of_name(byte) => {}
                _ => used.fill(true),
            }
        }
    }
    (0..results).filter(|&result| !used[result]).collect()
}

/// Operand and result types at the end of an op's text: `... : (tensor<8xi32>) -> tensor<8xf32>`.
fn call_types(line: &str) -> Option<(Vec<TensorType>, Vec<TensorType>)> {
    let (_, types) = line.rsplit_once(" : (")?;
    let (operands, results) = types.split_once(") -> ")?;
    let list = |text: &str| text.split("tensor<").skip(1).map(tensor_type).collect::<Option<Vec<_>>>();
    Some((list(operands)?, list(results)?))
}

/// `8x128xbf16>...`
pub(super) fn tensor_type(text: &str) -> Option<TensorType> {
    let mut parts: Vec<_> = text.split(['>', ',']).next()?.split('x').collect();
    let element = Element::from_mlir(parts.pop()?.trim())?;
    let dims = parts.into_iter().map(|size| size.trim().parse().ok()).collect::<Option<Vec<usize>>>()?;
    Some(TensorType { element, dims })
}

/// `#stablehlo.output_operand_alias<output_tuple_indices = [0], operand_index = 1, ...>`
fn call_aliases(text: &str) -> Vec<(usize, usize)> {
    let aliases = text.split("output_operand_alias<").skip(1).filter_map(|alias| {
        let field = |name: &str| alias.split_once(name)?.1.split([',', ']', '>']).next();
        let operand = field("operand_index = ")?.trim().parse().ok()?;
        let result = field("output_tuple_indices = [")?.trim();
        Some((operand, if result.is_empty() { 0 } else { result.parse().ok()? }))
    });
    aliases.collect()
}

/// How often each op occurs in a module, nested ones included.
pub fn op_counts(module: &Module) -> BTreeMap<String, usize> {
    fn count(block: BlockRef, counts: &mut BTreeMap<String, usize>) {
        for operation in operations(block) {
            *counts.entry(op_name(operation)).or_default() += 1;
            operation
                .regions()
                .flat_map(|region| blocks(region).collect::<Vec<_>>())
                .for_each(|block| count(block, counts));
        }
    }
    let mut counts = BTreeMap::new();
    count(module.body(), &mut counts);
    counts
}

/// What `pagoda inspect` prints about a kernel.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Summary {
    /// The kernel's name.
    pub name: String,
    /// Grid sizes, with `parallel` or `arbitrary`; no size where the call gives it.
    pub grid: Vec<(Option<usize>, &'static str)>,
    /// Every buffer, in the order of the kernel's arguments.
    pub buffers: Vec<BufferSummary>,
    /// Bytes of VMEM declared: scratch and pipeline windows, tile-padded and double-buffered.
    pub vmem_bytes: usize,
    /// The limit of scoped VMEM in bytes; `None` for the chip's default.
    pub vmem_limit: Option<usize>,
    /// How often each op occurs.
    pub ops: BTreeMap<String, usize>,
}

/// One buffer of a [`Summary`].
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct BufferSummary {
    /// Its name.
    pub name: String,
    /// `prefetch`, `operand` (input or output) or `scratch`.
    pub role: &'static str,
    /// Element type and sizes: `bf16[8,128]`.
    pub shape: String,
    /// The memory that it is in.
    pub memory: &'static str,
    /// Whether the pipeline fills it block by block.
    pub windowed: bool,
    /// Bytes that it takes there (arrays in HBM: 0).
    pub bytes: usize,
}

/// Summarises an opened kernel.
///
/// # Errors
/// When the module holds no kernel.
pub fn summarize(kernel: &Opened) -> Result<Summary> {
    let signature = Signature::read(&kernel.module)?;
    let buffers = signature.arguments.iter().map(|argument| BufferSummary {
        name: argument.name.clone(),
        role: match argument.role {
            Role::Prefetch => "prefetch",
            Role::Input | Role::Output => "operand",
            Role::Scratch => "scratch",
        },
        shape: super::memref::describe(argument.element, &argument.dims),
        memory: argument.space.mnemonic(),
        windowed: argument.window.is_some(),
        bytes: argument.bytes(),
    });
    let semantics = |semantics| if semantics == Semantics::Parallel { "parallel" } else { "arbitrary" };
    Ok(Summary {
        name: signature.name.clone(),
        grid: signature.grid.iter().map(|&(size, how)| (size, semantics(how))).collect(),
        buffers: buffers.collect(),
        vmem_bytes: signature.vmem_bytes(),
        vmem_limit: kernel.vmem_limit,
        ops: op_counts(&kernel.module),
    })
}

impl Kernel<'_> {
    /// Calls the kernel from a StableHLO program: `operands` are the prefetched arrays and the inputs.
    ///
    /// # Errors
    /// When the operands are not what the kernel takes.
    pub fn call<'c, 'a>(
        &self,
        b: &stablehlo::Builder<'c, 'a>,
        operands: &[stablehlo::Tensor<'c, 'a>],
    ) -> Result<Vec<stablehlo::Tensor<'c, 'a>>> {
        let (expected, given) = (self.inputs(), operands.iter().map(|operand| operand.ty()).collect::<Vec<_>>());
        if expected != given {
            let list = |types: &[TensorType]| types.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let message =
                format!("@{TARGET}: kernel `{}` takes ({}), not ({})", self.name(), list(&expected), list(&given));
            return Err(Error::op("stablehlo.custom_call", message));
        }
        let row_major = |types: &[TensorType]| types.iter().map(|ty| (0..ty.rank()).rev().collect()).collect();
        let config = self.wire.get_or_init(|| backend_config(self)).clone();
        if self.is_for_tile_machine() {
            let aliases = self.aliases().iter().map(|(operand, result)| format!("{operand}:{result}"));
            let options = [(KERNEL, config), (ALIASES, aliases.collect::<Vec<_>>().join(","))];
            let options = options.map(|(name, text)| (name.to_owned(), ConfigValue::Text(text)));
            let backend_config = BackendConfig::Dictionary(options.into());
            let call = CustomCall { backend_config, ..CustomCall::default() };
            return b.custom_call(TILE_MACHINE, operands, &self.outputs(), call);
        }
        let aliases = self.aliases().iter().map(|&(operand, result)| OutputOperandAlias { result, operand });
        b.custom_call(
            TARGET,
            operands,
            &self.outputs(),
            CustomCall {
                backend_config: BackendConfig::Text { text: config, api_version: 1 },
                output_operand_aliases: aliases.collect(),
                operand_layouts: Some(row_major(&expected)),
                result_layouts: Some(row_major(&self.outputs())),
                kernel_name: Some(self.name().to_owned()),
                ..CustomCall::default()
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_that_nothing_names_are_unused() {
        let one = "    %0 = stablehlo.custom_call @tpu_custom_call(%arg0)";
        let three = "    %cc:3 = stablehlo.custom_call @tpu_custom_call(%arg0)";
        for (op, results, behind, expected) in [
            (one, 1, "\n    return %0 : tensor<8xf32>\n  }", vec![]),
            (one, 1, "\n    %1 = stablehlo.abs %01 : t\n    return %1 : t\n  }", vec![0]),
            (three, 3, "\n    return %cc#1 : t\n  }", vec![0, 2]),
            (three, 3, "\n    %c = stablehlo.abs %cc_0 : t\n    return %cc#10, %cc#2 : t\n  }", vec![0, 1]),
            (three, 3, "\n    return %cc : t\n  }", vec![]),
            // Another function's value of the same name.
            (three, 3, "\n    return\n  }\n  func.func private @f(%cc: t) {\n    return %cc : t\n  }", vec![0, 1, 2]),
            ("\"tpu_custom_call\"", 1, "", vec![]),
        ] {
            assert_eq!(unused_results(op, results, behind.as_bytes()), expected, "{op} {behind}");
        }
    }
}
