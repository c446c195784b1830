//! Modules and their functions.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use melior::ir::{
    Attribute, BlockLike, Identifier, Location, OperationRef, Type,
    attribute::{
        ArrayAttribute, DictionaryAttribute, FlatSymbolRefAttribute, IntegerAttribute, StringAttribute, TypeAttribute,
    },
    operation::{OperationBuilder, OperationLike, OperationPrintingFlags},
    r#type::{FunctionType, IntegerType},
};

use super::{Builder, Shared, Signature, Tensor, emit};
use crate::{
    context::{Context, diagnosed},
    error::{Error, Result},
    shape::TensorType,
};

/// What is said about one argument or one result of a function: attribute names and values.
type Annotations<'c> = BTreeMap<String, Attribute<'c>>;

/// The attribute by which PJRT compilers take the layout of an argument or a result.
const LAYOUT: &str = "mhlo.layout_mode";

/// A StableHLO module. Its entry is the function `main`.
pub struct Module<'c> {
    context: &'c melior::Context,
    name: String,
    melior: melior::ir::Module<'c>,
    shared: Rc<Shared>,
    arguments: RefCell<BTreeMap<(String, usize), Annotations<'c>>>,
    results: RefCell<BTreeMap<(String, usize), Annotations<'c>>>,
}

impl<'c> Module<'c> {
    /// An empty module for one device.
    pub fn new(context: &'c Context, name: &str) -> Self {
        Self::replicated(context, name, 1)
    }

    /// A module that runs as `replicas` copies, each with its own arguments; collectives and [`Builder::replica_id`]
    /// distinguish them.
    pub fn replicated(context: &'c Context, name: &str, replicas: usize) -> Self {
        let context = context.melior();
        let module = Self {
            context,
            name: name.to_owned(),
            melior: melior::ir::Module::new(Location::unknown(context)),
            shared: Rc::new(Shared { replicas, signatures: RefCell::default() }),
            arguments: RefCell::default(),
            results: RefCell::default(),
        };
        module.set("sym_name", StringAttribute::new(context, name).into());
        if replicas > 1 {
            for (key, count) in [("mhlo.num_replicas", replicas), ("mhlo.num_partitions", 1)] {
                let i32 = IntegerType::new(context, 32).into();
                module.set(key, IntegerAttribute::new(i32, count as i64).into());
            }
        }
        module
    }

    /// The module's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The MLIR module.
    pub fn melior(&self) -> &melior::ir::Module<'c> {
        &self.melior
    }

    /// Defines a public function; `body` gets its arguments and returns its results.
    pub fn function<F>(&self, name: &str, arguments: &[TensorType], body: F) -> Result<()>
    where
        F: for<'a> FnOnce(&Builder<'c, 'a>, &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>>,
    {
        self.define(name, "public", arguments, body)
    }

    /// Defines a function that only this module's functions call ([`Builder::call`]).
    pub fn private_function<F>(&self, name: &str, arguments: &[TensorType], body: F) -> Result<()>
    where
        F: for<'a> FnOnce(&Builder<'c, 'a>, &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>>,
    {
        self.define(name, "private", arguments, body)
    }

    fn define<F>(&self, name: &str, visibility: &str, arguments: &[TensorType], body: F) -> Result<()>
    where
        F: for<'a> FnOnce(&Builder<'c, 'a>, &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>>,
    {
        let context = self.context;
        if self.shared.signatures.borrow().contains_key(name) {
            return Err(Error::function(name, "is defined already"));
        }
        let body = emit::write_body(context, &self.shared, &[], None, "func.return", arguments, body)?;
        // The body may have defined functions itself, this one among them.
        if self.shared.signatures.borrow().contains_key(name) {
            return Err(Error::function(name, "is defined already"));
        }
        let results = body.results.clone();
        let types = |types: &[TensorType]| types.iter().map(|ty| ty.to_mlir(context)).collect::<Vec<Type>>();
        let function_type = FunctionType::new(context, &types(arguments), &types(&results));
        let operation = OperationBuilder::new("func.func", Location::unknown(context))
            .add_attributes(&[
                (Identifier::new(context, "sym_name"), StringAttribute::new(context, name).into()),
                (Identifier::new(context, "function_type"), TypeAttribute::new(function_type.into()).into()),
                (Identifier::new(context, "sym_visibility"), StringAttribute::new(context, visibility).into()),
            ])
            .add_regions([body.into_region()])
            .build()
            .map_err(|error| Error::function(name, error.to_string()))?;
        self.melior.body().append_operation(operation);
        self.shared
            .signatures
            .borrow_mut()
            .insert(name.to_owned(), Signature { arguments: arguments.to_vec(), results });
        Ok(())
    }

    /// Lets the buffer of argument `argument` of `function` become result `result`: the caller gives the argument
    /// away (`tf.aliasing_output`), and the plugin needs no second buffer.
    pub fn donate(&self, function: &str, argument: usize, result: usize) -> Result<()> {
        let signature = self.signature(function)?;
        let given = self.argument(&signature, function, argument)?;
        let taken = self.result(&signature, function, result)?;
        if given != taken {
            let message = format!("argument {argument} is {given} and cannot become result {result}, which is {taken}");
            return Err(Error::function(function, message));
        }
        let attribute: Attribute =
            IntegerAttribute::new(IntegerType::new(self.context, 32).into(), result as i64).into();
        for ((other, index), annotations) in self.arguments.borrow().iter() {
            if other == function && *index != argument && annotations.get("tf.aliasing_output") == Some(&attribute) {
                let message = format!("result {result} is taken by argument {index} already");
                return Err(Error::function(function, message));
            }
        }
        self.annotate_argument(function, argument, "tf.aliasing_output", attribute);
        Ok(())
    }

    /// Has argument `argument` of `function` lie row-major in a device's memory (`mhlo.layout_mode`). Compilers otherwise
    /// choose an order, such as one that pads least. What made the array must have laid it out likewise.
    pub fn row_major_argument(&self, function: &str, argument: usize) -> Result<()> {
        let signature = self.signature(function)?;
        let layout = self.row_major(self.argument(&signature, function, argument)?);
        self.annotate_argument(function, argument, LAYOUT, layout);
        Ok(())
    }

    /// As [`row_major_argument`](Self::row_major_argument), of a result.
    pub fn row_major_result(&self, function: &str, result: usize) -> Result<()> {
        let signature = self.signature(function)?;
        let layout = self.row_major(self.result(&signature, function, result)?);
        self.annotate_result(function, result, LAYOUT, layout);
        Ok(())
    }

    /// The dimensions from minor to major: `{2,1,0}`.
    fn row_major(&self, ty: &TensorType) -> Attribute<'c> {
        let order: Vec<String> = (0..ty.rank()).rev().map(|dim| dim.to_string()).collect();
        StringAttribute::new(self.context, &format!("{{{}}}", order.join(","))).into()
    }

    /// Names argument `argument` of `function` in the module's text (`pagoda.name`); plugins ignore it.
    pub fn name_argument(&self, function: &str, argument: usize, name: &str) -> Result<()> {
        self.argument(&self.signature(function)?, function, argument)?;
        self.annotate_argument(function, argument, "pagoda.name", StringAttribute::new(self.context, name).into());
        Ok(())
    }

    /// Names result `result` of `function` in the module's text (`jax.result_info`, which profilers know).
    pub fn name_result(&self, function: &str, result: usize, name: &str) -> Result<()> {
        self.result(&self.signature(function)?, function, result)?;
        self.annotate_result(function, result, "jax.result_info", StringAttribute::new(self.context, name).into());
        Ok(())
    }

    /// The types of a function's arguments and results.
    pub fn function_types(&self, function: &str) -> Result<(Vec<TensorType>, Vec<TensorType>)> {
        self.signature(function).map(|signature| (signature.arguments, signature.results))
    }

    /// The module as MLIR text.
    pub fn text(&self) -> String {
        self.melior.as_operation().to_string()
    }

    /// The module as MLIR text, with the names of its ops ([`Builder::named`]).
    pub fn text_with_names(&self) -> String {
        let flags = OperationPrintingFlags::new().enable_debug_info(true, false);
        self.melior.as_operation().to_string_with_flags(flags).expect("MLIR writes UTF-8")
    }

    /// The module as MLIR bytecode.
    pub fn bytecode(&self) -> Vec<u8> {
        self.melior.as_operation().write_bytecode()
    }

    /// Runs MLIR's verifier: structure, terminators, dominance, calls and symbols.
    pub fn verify(&self) -> Result<()> {
        let (valid, diagnostics) = diagnosed(self.context, || self.melior.as_operation().verify());
        if valid { Ok(()) } else { Err(Error::Verify { module: self.name.clone(), diagnostics }) }
    }

    fn set(&self, name: &str, attribute: Attribute<'c>) {
        set_attribute(self.melior.as_operation(), name, attribute);
    }

    fn signature(&self, function: &str) -> Result<Signature> {
        find(&self.shared, function)
    }

    fn argument<'s>(&self, signature: &'s Signature, function: &str, index: usize) -> Result<&'s TensorType> {
        signature.arguments.get(index).ok_or_else(|| {
            Error::function(function, format!("argument {index} is not one of its {}", signature.arguments.len()))
        })
    }

    fn result<'s>(&self, signature: &'s Signature, function: &str, index: usize) -> Result<&'s TensorType> {
        signature.results.get(index).ok_or_else(|| {
            Error::function(function, format!("result {index} is not one of its {}", signature.results.len()))
        })
    }

    fn annotate_result(&self, function: &str, result: usize, key: &str, value: Attribute<'c>) {
        let count = self.shared.signatures.borrow()[function].results.len();
        let mut results = self.results.borrow_mut();
        results.entry((function.to_owned(), result)).or_default().insert(key.to_owned(), value);
        self.write_annotations(function, "res_attrs", count, &results);
    }

    fn annotate_argument(&self, function: &str, argument: usize, key: &str, value: Attribute<'c>) {
        let count = self.shared.signatures.borrow()[function].arguments.len();
        let mut arguments = self.arguments.borrow_mut();
        arguments.entry((function.to_owned(), argument)).or_default().insert(key.to_owned(), value);
        self.write_annotations(function, "arg_attrs", count, &arguments);
    }

    fn write_annotations(
        &self,
        function: &str,
        attribute: &str,
        count: usize,
        annotations: &BTreeMap<(String, usize), Annotations<'c>>,
    ) {
        let dictionaries: Vec<Attribute> = (0..count)
            .map(|index| {
                let entries: Vec<_> = annotations
                    .get(&(function.to_owned(), index))
                    .into_iter()
                    .flatten()
                    .map(|(name, value)| (Identifier::new(self.context, name), *value))
                    .collect();
                DictionaryAttribute::new(self.context, &entries).into()
            })
            .collect();
        let name: Attribute = StringAttribute::new(self.context, function).into();
        let mut operation = self.melior.body().first_operation();
        while let Some(candidate) = operation {
            if candidate.attribute("sym_name") == Ok(name) {
                set_attribute(candidate, attribute, ArrayAttribute::new(self.context, &dictionaries).into());
            }
            operation = candidate.next_in_block();
        }
    }
}

fn find(shared: &Shared, function: &str) -> Result<Signature> {
    let signatures = shared.signatures.borrow();
    signatures.get(function).cloned().ok_or_else(|| {
        let known = signatures.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        Error::function(function, format!("is not defined (yet) in this module; it has: {known}"))
    })
}

fn set_attribute(operation: OperationRef, name: &str, attribute: Attribute) {
    use melior::{StringRef, ir::AttributeLike};
    // SAFETY: the operation lives in a module that the caller holds; no iterator over its attributes is open.
    unsafe {
        mlir_sys::mlirOperationSetAttributeByName(
            operation.to_raw(),
            StringRef::new(name).to_raw(),
            attribute.to_raw(),
        );
    }
}

impl<'c, 'a> Builder<'c, 'a> {
    /// Calls a function that the module defines already, and returns its results.
    pub fn call(&self, function: &str, arguments: &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>> {
        let signature = find(&self.shared, function)?;
        let given: Vec<_> = arguments.iter().map(|argument| argument.ty()).collect();
        if given != signature.arguments {
            let message =
                format!("takes ({}) and is called with ({})", emit::types(&signature.arguments), emit::types(&given));
            return Err(Error::function(function, message));
        }
        let callee = FlatSymbolRefAttribute::new(self.context, function).into();
        self.operation("func.call", arguments, &[("callee", callee)], &signature.results, Vec::new())
    }
}
