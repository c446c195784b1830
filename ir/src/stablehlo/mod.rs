//! StableHLO modules, built op by op with shape inference, for any PJRT plugin.
//!
//! A [`Module`] holds functions; a function's body is written through a [`Builder`], whose methods are the StableHLO ops
//! (<https://openxla.org/stablehlo/spec>). Each infers its result's type from its operands and refuses operands that
//! do not fit, with an error that names the op and the shapes. The dialect is not part of LLVM, so its ops are
//! *unregistered* MLIR operations here: MLIR checks structure and dominance, this module checks everything else.
//!
//! Invariants:
//! - No implicit broadcasting: binary ops want equal types ([`Builder::broadcast_to`] is explicit).
//! - An op may use values of its own region and of the regions around it. Bodies of `while`, `if` and `case` may use
//!   what is outside them; bodies of `reduce`, `reduce_window`, `sort`, `scatter` and of the collectives must not.
//! - A [`Tensor`] cannot leave the function that it belongs to: every function has its own lifetime `'a`.
//!
//! Modules are never put together from text.
//!
//! ```
//! use pagoda_ir::stablehlo::{DotDims, Module};
//! use pagoda_ir::{Context, Element, TensorType};
//!
//! let context = Context::new();
//! let module = Module::new(&context, "dense");
//! let arguments = [TensorType::new(Element::Bf16, &[8, 64]), TensorType::new(Element::Bf16, &[128, 64])];
//! module.function("main", &arguments, |b, args| {
//!     let contract: (&[usize], &[usize]) = (&[1], &[1]);
//!     let out = b.dot_general(args[0], args[1], DotDims { contract, ..DotDims::default() }, Element::F32)?;
//!     Ok(vec![b.tanh(out)?]) // [tokens, features]
//! })?;
//! module.verify()?;
//! assert!(module.text().contains("-> tensor<8x128xf32>"));
//! # Ok::<(), pagoda_ir::Error>(())
//! ```
//!
//! What belongs to a function stays in it:
//!
//! ```compile_fail,E0521
//! # use pagoda_ir::{Context, stablehlo::Module};
//! let context = Context::new();
//! let module = Module::new(&context, "m");
//! let mut escaped = None;
//! module.function("main", &[], |b, _| {
//!     escaped = Some(b.replica_id()?);
//!     Ok(vec![])
//! });
//! ```

mod collectives;
mod contraction;
mod control_flow;
mod custom_call;
mod elementwise;
mod emit;
mod indexing;
mod module;
mod random;
mod reductions;
mod shape_ops;
#[cfg(test)]
mod tests;

use std::{cell::RefCell, collections::BTreeMap, fmt, marker::PhantomData, rc::Rc};

use melior::ir::{BlockRef, Location, Value, ValueLike};
use mlir_sys::MlirBlock;

pub use self::{
    collectives::ReplicaGroups,
    contraction::{DotDims, Precision},
    control_flow::Branch,
    custom_call::{BackendConfig, ConfigValue, CustomCall, OutputOperandAlias},
    elementwise::Direction,
    emit::OPS,
    indexing::{GatherDims, ScatterDims},
    module::Module,
    reductions::Window,
};
use crate::{element::Element, shape::TensorType};

/// What the builders of a module's functions know about the module.
#[derive(Debug)]
struct Shared {
    replicas: usize,
    /// The functions that the module holds already, by name.
    signatures: RefCell<BTreeMap<String, Signature>>,
}

/// The types of a function.
#[derive(Clone, Debug)]
struct Signature {
    arguments: Vec<TensorType>,
    results: Vec<TensorType>,
}

/// A value of a function that is being built: a copyable handle.
#[derive(Clone, Copy)]
pub struct Tensor<'c, 'a> {
    value: Value<'c, 'a>,
    /// Invariant in `'a`, so that the lifetimes of two functions never unify.
    function: PhantomData<fn(&'a ()) -> &'a ()>,
}

impl<'c, 'a> Tensor<'c, 'a> {
    fn new(value: Value<'c, 'a>) -> Self {
        Self { value, function: PhantomData }
    }

    /// The element type and the size of each dimension.
    pub fn ty(self) -> TensorType {
        TensorType::from_mlir(self.value.r#type()).expect("the builder makes static tensors of known elements only")
    }

    /// The element type.
    pub fn element(self) -> Element {
        self.ty().element
    }

    /// The size of each dimension, major to minor.
    pub fn dims(self) -> Vec<usize> {
        self.ty().dims
    }

    /// The number of dimensions.
    pub fn rank(self) -> usize {
        self.ty().rank()
    }

    /// The MLIR value.
    pub fn value(self) -> Value<'c, 'a> {
        self.value
    }
}

impl fmt::Debug for Tensor<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({})", self.ty())
    }
}

/// Writes ops at the end of one block: a function's body, or the body of an op's region.
pub struct Builder<'c, 'a> {
    context: &'c melior::Context,
    block: BlockRef<'c, 'a>,
    /// The open blocks around and including `block`, outermost first.
    scopes: Vec<Scope>,
    /// What the ops that it writes are called: see [`named`](Self::named).
    location: Location<'c>,
    shared: Rc<Shared>,
    function: PhantomData<fn(&'a ()) -> &'a ()>,
}

impl<'c, 'a> Builder<'c, 'a> {
    /// The same builder, whose ops carry `name` as their location: compilers name their instructions by it, so that
    /// profiles and reports of memory speak of `layer.qkv`. Names nest, with a dot between them. A module's
    /// [bytecode](Module::bytecode) holds them, its [text](Module::text) does not.
    ///
    /// ```
    /// # use pagoda_ir::{Context, Element, TensorType, stablehlo::Module};
    /// # let context = Context::new();
    /// # let module = Module::new(&context, "m");
    /// # module.function("main", &[TensorType::new(Element::F32, &[8])], |b, args| {
    /// let b = b.named("layer");
    /// let x = b.named("qkv").tanh(args[0])?; // layer.qkv
    /// # Ok(vec![x])
    /// # })?;
    /// # assert!(module.text_with_names().contains("loc(\"layer.qkv\")"));
    /// # Ok::<(), pagoda_ir::Error>(())
    /// ```
    #[must_use]
    pub fn named(&self, name: &str) -> Self {
        let outer = self.location.is_name().then(|| self.location.name_value());
        let name = match outer.as_ref().map(|outer| outer.as_string_ref().as_str()) {
            Some(outer) => format!("{}.{name}", outer.expect("a name that was given as UTF-8")),
            None => name.to_owned(),
        };
        self.at(Location::name(self.context, &name, Location::unknown(self.context)))
    }

    fn at(&self, location: Location<'c>) -> Self {
        let (scopes, shared) = (self.scopes.clone(), Rc::clone(&self.shared));
        Self { context: self.context, block: self.block, scopes, location, shared, function: PhantomData }
    }
}

/// A block that is being written.
#[derive(Clone, Copy)]
struct Scope {
    block: MlirBlock,
    /// The op whose body this is and must not use values from outside.
    isolated: Option<&'static str>,
}
