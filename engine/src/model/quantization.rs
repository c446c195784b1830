//! `quantization_config` of a `config.json`: the ways to store projections in 8 bits that Pagoda runs.
//!
//! - `compressed-tensors` (formats `int-quantized`, `float-quantized`, `naive-quantized`): every linear layer, symmetric, i8
//!   or e4m3, a scale per tensor, output feature or group of input features. Activations stay as they are, or are quantized
//!   alike, each row when it comes (`strategy: token`, `dynamic: true`).
//! - `fp8` (vLLM, AutoFP8): e4m3, a scale per tensor, `activation_scheme: dynamic`.
//!
//! - `mxfp4`: only the experts of gpt-oss, numbers of 4 bits. They are loaded as the type that is computed in.
//!
//! A tensor `X.weight` of such a layer has its scales beside it in `X.weight_scale`: value = stored * scale. What would
//! compute something else (zero points, activation orders, static activation scales, blocks, 4 bits) is refused by name.

use std::path::Path;

use pagoda_ir::element::Element;
use serde_json::Value;

use crate::error::{Error, Result};

/// How a model's projections are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Quantization {
    /// The type of their elements.
    pub weight: Element,
    /// How many scales a projection has.
    pub scales: Scales,
    /// Whether a projection's input is quantized too, row by row.
    pub activations: bool,
    /// Whether the output projection is, where it is not the embedding.
    pub head: bool,
}

/// What shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scales {
    /// All of a tensor.
    Tensor,
    /// The row of an output feature.
    Channel,
    /// So many consecutive input features of an output feature.
    Group(usize),
}

impl Quantization {
    /// Input features that share a scale, where not all of them do.
    pub fn group(self) -> Option<usize> {
        match self.scales {
            Scales::Group(group) => Some(group),
            Scales::Tensor | Scales::Channel => None,
        }
    }

    /// The largest value that an element holds.
    pub fn most(weight: Element) -> f64 {
        match weight {
            Element::I8 => 127.0,
            Element::F8E5M2 => 57344.0,
            _ => 448.0,
        }
    }

    /// Reads the value of `quantization_config`; `path` is named in errors.
    ///
    /// # Errors
    /// The first key that asks for what is not run.
    pub(super) fn parse(path: &Path, value: &Value) -> Result<Self> {
        let config = Part { path, name: "quantization_config".into(), value };
        let method = config.at("quant_method");
        match method.text() {
            Some("compressed-tensors") => Self::compressed_tensors(&config),
            Some("fp8") => Self::fp8(&config),
            _ => Err(method.refuse("is not supported", "use a model with \"compressed-tensors\" or \"fp8\"")),
        }
    }

    fn compressed_tensors(config: &Part) -> Result<Self> {
        config.at("format").one_of(&["int-quantized", "float-quantized", "naive-quantized"])?;
        config.at("kv_cache_scheme").absent()?;
        let groups = config.at("config_groups");
        let [(name, group)] = &groups.entries()[..] else {
            return Err(groups.refuse("is not one group", "use a model whose linear layers are quantized alike"));
        };
        let group = Part { path: config.path, name: format!("{}.{name}", groups.name), value: group };
        let targets = group.at("targets");
        if *targets.value != serde_json::json!(["Linear"]) {
            return Err(targets.refuse("is not supported", "use a model with targets = [\"Linear\"]"));
        }
        group.at("output_activations").absent()?;
        let weights = group.at("weights");
        let weight = weights.element()?;
        weights.at("dynamic").one_of(&["false"])?;
        let strategy = weights.at("strategy");
        let size = weights.at("group_size");
        let scales = match strategy.text() {
            Some("tensor") => Scales::Tensor,
            Some("channel") => Scales::Channel,
            Some("group") => match size.value.as_u64() {
                Some(group @ (8 | 16 | 32 | 64)) => Scales::Group(group as usize),
                Some(group) if group > 0 && group.is_multiple_of(128) => Scales::Group(group as usize),
                _ => return Err(size.refuse("is not 8, 16, 32, 64 or a multiple of 128", "use another model")),
            },
            _ => {
                return Err(
                    strategy.refuse("is not supported", "use a model with \"tensor\", \"channel\" or \"group\"")
                );
            }
        };
        let inputs = group.at("input_activations");
        let activations = !inputs.value.is_null();
        if activations {
            let element = inputs.element()?;
            if element != weight {
                return Err(inputs.refuse(format!("is not of the weights' type, {weight}"), "use another model"));
            }
            inputs.at("strategy").one_of(&["\"token\""])?;
            inputs.at("dynamic").one_of(&["true"])?;
        }
        Ok(Self { weight, scales, activations, head: !config.at("ignore").leaves_head()? })
    }

    fn fp8(config: &Part) -> Result<Self> {
        config.at("weight_block_size").absent()?;
        config.at("activation_scheme").one_of(&["\"dynamic\""])?;
        for key in ["ignored_layers", "modules_to_not_convert"] {
            config.at(key).leaves_head()?;
        }
        // vLLM quantizes no output projection, whatever is ignored.
        Ok(Self { weight: Element::F8E4M3Fn, scales: Scales::Tensor, activations: true, head: false })
    }
}

/// Whether a `quantization_config` has experts in 4 bits.
pub(super) fn is_mxfp4(value: &Value) -> bool {
    value.get("quant_method").is_some_and(|method| method == "mxfp4")
}

/// Refuses an `mxfp4` config whose experts are not all in 4 bits, or that has any other tensor so.
///
/// # Errors
/// The first key that asks for what is not run.
pub(super) fn check_mxfp4(path: &Path, value: &Value) -> Result<()> {
    let config = Part { path, name: "quantization_config".into(), value };
    let kept = config.at("modules_to_not_convert");
    let names: Vec<_> = kept.value.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    match names.iter().any(|name| name.contains("experts")) {
        true => {
            Err(kept.refuse("names experts", "use a checkpoint all of whose experts are in 4 bits, or one of bf16"))
        }
        false => Ok(()),
    }
}

/// A value that knows its file and its own dotted path, for errors; null where it is absent.
struct Part<'a> {
    path: &'a Path,
    name: String,
    value: &'a Value,
}

impl<'a> Part<'a> {
    fn at(&self, key: &str) -> Self {
        let value = self.value.get(key).unwrap_or(&Value::Null);
        Self { path: self.path, name: format!("{}.{key}", self.name), value }
    }

    fn refuse(&self, limit: impl std::fmt::Display, fix: &str) -> Error {
        Error::file(self.path, format!("{} = {} {limit}", self.name, self.value), fix)
    }

    fn text(&self) -> Option<&'a str> {
        self.value.as_str()
    }

    fn entries(&self) -> Vec<(&'a String, &'a Value)> {
        self.value.as_object().map_or(vec![], |object| object.iter().collect())
    }

    /// The value is one of these, as text or as JSON.
    fn one_of(&self, allowed: &[&str]) -> Result<()> {
        let json = self.value.to_string();
        let is = |allowed: &&str| self.text() == Some(allowed) || json == **allowed;
        match allowed.iter().any(is) {
            true => Ok(()),
            false => Err(self.refuse("is not supported", &format!("use a model with {}", allowed.join(" or ")))),
        }
    }

    fn absent(&self) -> Result<()> {
        if self.value.is_null() { Ok(()) } else { Err(self.refuse("is not supported", "use a model without it")) }
    }

    /// The element type of quantization arguments that are symmetric and keep the order of features.
    fn element(&self) -> Result<Element> {
        let (bits, kind) = (self.at("num_bits"), self.at("type"));
        self.at("symmetric").one_of(&["true"])?;
        for key in ["actorder", "block_structure"] {
            self.at(key).absent()?;
        }
        match (bits.value.as_u64(), kind.text()) {
            (Some(8), Some("int")) => Ok(Element::I8),
            (Some(8), Some("float")) => Ok(Element::F8E4M3Fn),
            (Some(8), _) => Err(kind.refuse("is not supported", "use a model with \"int\" or \"float\"")),
            _ => Err(bits.refuse("is not supported", "use a model with 8 bits")),
        }
    }

    /// Whether a list of layers that are not quantized names the output projection. It may name nothing else.
    fn leaves_head(&self) -> Result<bool> {
        let names = match self.value {
            Value::Null => return Ok(false),
            Value::Array(names) => names,
            _ => return Err(self.refuse("is not a list", "repair the file")),
        };
        let head = |name: &Value| matches!(name.as_str(), Some("lm_head" | "re:.*lm_head" | "re:.*lm_head.*"));
        match names.iter().all(head) {
            true => Ok(!names.is_empty()),
            false => Err(self.refuse("names more than lm_head", "use a model whose layers are all quantized")),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: &Value) -> std::result::Result<Quantization, String> {
        Quantization::parse(Path::new("config.json"), value).map_err(|error| error.to_string())
    }

    fn compressed(weights: &Value, inputs: &Value) -> Value {
        json!({"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
            "quantization_status": "compressed", "kv_cache_scheme": null,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs,
                "output_activations": null}}})
    }

    #[test]
    fn plain_kinds_are_read() {
        let int = json!({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": true, "dynamic": false,
            "group_size": null, "actorder": null});
        let token = json!({"num_bits": 8, "type": "int", "strategy": "token", "symmetric": true, "dynamic": true});
        let float = json!({"num_bits": 8, "type": "float", "strategy": "group", "symmetric": true, "dynamic": false,
            "group_size": 128});
        let scheme = |weight, scales, activations| Quantization { weight, scales, activations, head: false };
        for (value, expected) in [
            (compressed(&int, &Value::Null), scheme(Element::I8, Scales::Channel, false)),
            (compressed(&int, &token), scheme(Element::I8, Scales::Channel, true)),
            (compressed(&float, &Value::Null), scheme(Element::F8E4M3Fn, Scales::Group(128), false)),
            (
                json!({"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}),
                scheme(Element::F8E4M3Fn, Scales::Tensor, true),
            ),
        ] {
            assert_eq!(parse(&value), Ok(expected), "{value}");
        }
        let mut everything = compressed(&int, &Value::Null);
        everything["ignore"] = json!([]);
        assert!(parse(&everything).unwrap().head);
    }

    #[test]
    fn other_kinds_are_named() {
        let int = json!({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": true, "dynamic": false});
        let changed = |pointer: &str, value: Value| {
            let mut config = compressed(&int, &Value::Null);
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            config.pointer_mut(parent).unwrap()[key] = value;
            config
        };
        let weights = "/config_groups/group_0/weights";
        for (value, message) in [
            (
                json!({"quant_method": "gptq", "bits": 4}),
                "quantization_config.quant_method = \"gptq\" is not supported",
            ),
            (json!({"bits": 4}), "quantization_config.quant_method = null is not supported"),
            (
                json!({"quant_method": "fp8", "activation_scheme": "static"}),
                "quantization_config.activation_scheme = \"static\" is not supported",
            ),
            (
                json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
                "quantization_config.weight_block_size = [128,128] is not supported: use a model without it",
            ),
            (changed("/format", json!("pack-quantized")), "quantization_config.format = \"pack-quantized\""),
            (changed(&format!("{weights}/num_bits"), json!(4)), "group_0.weights.num_bits = 4 is not supported"),
            (changed(&format!("{weights}/symmetric"), json!(false)), "weights.symmetric = false is not supported"),
            (changed(&format!("{weights}/actorder"), json!("group")), "weights.actorder = \"group\""),
            (changed(&format!("{weights}/strategy"), json!("block")), "weights.strategy = \"block\""),
            (changed("/ignore", json!(["lm_head", "model.layers.0.mlp.down_proj"])), "names more than lm_head"),
        ] {
            let error = parse(&value).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }
}
