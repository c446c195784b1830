//! `custom_call`: code that the plugin finds by name.

use melior::ir::{
    Attribute, Identifier,
    attribute::{
        ArrayAttribute, BoolAttribute, DenseI64ArrayAttribute, DictionaryAttribute, FloatAttribute, IntegerAttribute,
        StringAttribute,
    },
    r#type::IntegerType,
};

use super::{
    Builder, Tensor,
    emit::{ensure, ensure_dims, list},
};
use crate::{
    element::Element,
    error::Result,
    shape::{TensorType, element_type},
};

/// What a custom call says besides its operands.
#[derive(Clone, Debug, Default)]
pub struct CustomCall {
    /// What the called code gets as its configuration; also settles the version of the calling convention.
    pub backend_config: BackendConfig,
    /// Whether the call does something besides computing its results: it is then never removed or merged.
    pub has_side_effect: bool,
    /// Results that are written into an operand's buffer.
    pub output_operand_aliases: Vec<OutputOperandAlias>,
    /// The memory order of each operand, minor to major dimension; row-major by default.
    pub operand_layouts: Option<Vec<Vec<usize>>>,
    /// The memory order of each result, minor to major dimension; row-major by default.
    pub result_layouts: Option<Vec<Vec<usize>>>,
    /// The kernel's name, for profilers (Mosaic calls).
    pub kernel_name: Option<String>,
}

/// Result `result` takes the buffer of operand `operand`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutputOperandAlias {
    /// The result's number.
    pub result: usize,
    /// The operand's number.
    pub operand: usize,
}

/// The configuration of a custom call.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum BackendConfig {
    /// None, under the calling convention with a status (API version 2).
    #[default]
    None,
    /// A string, under the calling convention with a status (API version 2); Mosaic calls use it under version 1.
    Text {
        /// The string.
        text: String,
        /// The version of the calling convention: 1 or 2.
        api_version: u8,
    },
    /// Attributes by name, under the typed FFI (API version 4).
    Dictionary(Vec<(String, ConfigValue)>),
}

/// A value in a [`BackendConfig::Dictionary`].
#[derive(Clone, Debug, PartialEq)]
pub enum ConfigValue {
    /// A string.
    Text(String),
    /// A boolean.
    Bool(bool),
    /// A 32-bit integer.
    I32(i32),
    /// A 64-bit integer.
    I64(i64),
    /// A 32-bit float.
    F32(f32),
    /// A 64-bit float.
    F64(f64),
    /// An array of 64-bit integers.
    I64s(Vec<i64>),
    /// Attributes by name.
    Dictionary(Vec<(String, ConfigValue)>),
}

impl<'c, 'a> Builder<'c, 'a> {
    /// Calls `target` with `operands`; it writes results of the types `results`.
    pub fn custom_call(
        &self,
        target: &str,
        operands: &[Tensor<'c, 'a>],
        results: &[TensorType],
        call: CustomCall,
    ) -> Result<Vec<Tensor<'c, 'a>>> {
        let op = "custom_call";
        let given: Vec<_> = operands.iter().map(|operand| operand.ty()).collect();
        let context = self.context;
        let (version, config) = match &call.backend_config {
            BackendConfig::None => (2, None),
            BackendConfig::Text { text, api_version } => {
                ensure((1..=2).contains(api_version), op, || {
                    format!("@{target}: a string backend_config goes with API version 1 or 2, not {api_version}")
                })?;
                (*api_version, Some(StringAttribute::new(context, text).into()))
            }
            BackendConfig::Dictionary(entries) => (4, Some(self.dictionary(entries))),
        };
        let mut attributes = vec![
            ("call_target_name", StringAttribute::new(context, target).into()),
            ("has_side_effect", self.bool(call.has_side_effect)),
            ("api_version", self.i32(usize::from(version))),
        ];
        attributes.extend(config.map(|config| ("backend_config", config)));
        if let Some(name) = &call.kernel_name {
            attributes.push(("kernel_name", StringAttribute::new(context, name).into()));
        }
        // StableHLO wants both layouts or none.
        if call.operand_layouts.is_some() || call.result_layouts.is_some() {
            let sides = [
                ("operand_layouts", &given[..], &call.operand_layouts),
                ("result_layouts", results, &call.result_layouts),
            ];
            for (name, types, layouts) in sides {
                let layouts = match layouts {
                    Some(layouts) => layouts.clone(),
                    None => types.iter().map(|ty| (0..ty.rank()).rev().collect()).collect(),
                };
                attributes.push((name, self.layouts(name, types, &layouts)?));
            }
        }
        if !call.output_operand_aliases.is_empty() {
            let aliases = (call.output_operand_aliases.iter())
                .map(|alias| self.alias(alias, &given, results))
                .collect::<Result<Vec<_>>>()?;
            attributes.push(("output_operand_aliases", ArrayAttribute::new(context, &aliases).into()));
        }
        self.emit_all(op, operands, &attributes, results, Vec::new())
    }

    fn layouts(&self, name: &str, types: &[TensorType], layouts: &[Vec<usize>]) -> Result<Attribute<'c>> {
        let op = "custom_call";
        ensure(types.len() == layouts.len(), op, || {
            format!("{name} has {} entries for {} arrays", layouts.len(), types.len())
        })?;
        let mut attributes = Vec::with_capacity(layouts.len());
        for (ty, layout) in types.iter().zip(layouts) {
            ensure(layout.len() == ty.rank(), op, || format!("{name}: {layout:?} does not order the dims of {ty}"))?;
            ensure_dims(op, name, layout, ty.rank())?;
            attributes.push(self.parse(&format!("dense<{}> : tensor<{}xindex>", list(layout), layout.len()))?);
        }
        Ok(ArrayAttribute::new(self.context, &attributes).into())
    }

    fn alias(&self, alias: &OutputOperandAlias, given: &[TensorType], results: &[TensorType]) -> Result<Attribute<'c>> {
        let (operand, result) = (given.get(alias.operand), results.get(alias.result));
        ensure(operand.is_some() && operand == result, "custom_call", || {
            let describe = |ty: Option<&TensorType>| ty.map_or("none".to_owned(), ToString::to_string);
            format!(
                "result {} ({}) cannot take the buffer of operand {} ({})",
                alias.result,
                describe(result),
                alias.operand,
                describe(operand)
            )
        })?;
        let tuple_index = if results.len() == 1 { String::new() } else { alias.result.to_string() };
        self.parse(&format!(
            "#stablehlo.output_operand_alias<output_tuple_indices = [{tuple_index}], operand_index = {}, \
             operand_tuple_indices = []>",
            alias.operand
        ))
    }

    fn dictionary(&self, entries: &[(String, ConfigValue)]) -> Attribute<'c> {
        let entries: Vec<_> =
            entries.iter().map(|(key, value)| (Identifier::new(self.context, key), self.config_value(value))).collect();
        DictionaryAttribute::new(self.context, &entries).into()
    }

    fn config_value(&self, value: &ConfigValue) -> Attribute<'c> {
        let context = self.context;
        let float = |element, value| FloatAttribute::new(context, element_type(context, element), value).into();
        match value {
            ConfigValue::Text(text) => StringAttribute::new(context, text).into(),
            ConfigValue::Bool(value) => BoolAttribute::new(context, *value).into(),
            ConfigValue::I32(value) => {
                IntegerAttribute::new(IntegerType::new(context, 32).into(), i64::from(*value)).into()
            }
            ConfigValue::I64(value) => IntegerAttribute::new(IntegerType::new(context, 64).into(), *value).into(),
            ConfigValue::F32(value) => float(Element::F32, f64::from(*value)),
            ConfigValue::F64(value) => float(Element::F64, *value),
            ConfigValue::I64s(values) => DenseI64ArrayAttribute::new(context, values).into(),
            ConfigValue::Dictionary(entries) => self.dictionary(entries),
        }
    }
}
