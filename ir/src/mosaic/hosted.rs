//! Programs around kernels, for a host that runs the kernels itself: every `tpu_custom_call` of a StableHLO module becomes a
//! custom call by XLA's typed FFI (`api_version` 4), whose options say which call it is.
//!
//! StableHLO's dialect is not needed for it. In text a call is one op on one line, which is replaced. In bytecode as
//! `jax.export` writes it (VHLO, StableHLO's stable form), attributes are added to the table of attributes, and the calls'
//! properties name these instead of their own; nothing else of the module moves.
//!
//! Sources: "MLIR Bytecode Format" of LLVM's documentation; `VhloBytecode.cpp` and `VhloOps.td` of StableHLO 1.18.

use std::collections::HashMap;

use super::bytecode::{
    DIALECTS, ENTRIES, OFFSETS, PROPERTIES, Reader, STRINGS, Section, Sections, is_bytecode, write_number,
    write_section,
};
use super::wire::{CallSite, TARGET};
use crate::{
    element::Element,
    error::{Error, Result},
    shape::TensorType,
};

/// A program whose kernels the host runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Hosted {
    /// The module: text or bytecode, as it was given.
    pub module: Vec<u8>,
    /// The arguments of `@main`: the names that the module gives them (`arg0`), those of the function's author, and types.
    pub arguments: Vec<(String, Option<String>, TensorType)>,
    /// What the function's author calls the results (`result['a']`), as far as the module says.
    pub results: Vec<Option<String>>,
    /// The calls of kernels, by the number that their options have.
    pub calls: Vec<HostedCall>,
}

/// A call of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostedCall {
    /// Which of the module's kernels, as [`find_custom_calls`](super::wire::find_custom_calls) counts them.
    pub kernel: usize,
    /// Pairs (operand, result) that share memory.
    pub aliases: Vec<(usize, usize)>,
    /// Results that the module does not use, where that is known.
    pub unused: Vec<usize>,
}

/// Replaces every call of a kernel in `module` by a call of `target` with the options that `options` gives the call of that
/// number. `calls` are those that were found in it.
///
/// # Errors
/// When the module is not as JAX or Pagoda writes modules.
pub fn host(
    module: &[u8],
    calls: &[CallSite],
    target: &str,
    options: &dyn Fn(usize) -> Vec<(&'static str, String)>,
) -> Result<Hosted> {
    let hosted = match is_bytecode(module) {
        true => in_bytecode(module, calls, target, options),
        false => in_text(module, calls, target, options),
    };
    hosted.ok_or_else(|| {
        let form = if is_bytecode(module) { "bytecode" } else { "text" };
        Error::mosaic(format!("the module is not {form} as jax.export writes it: @main or its calls cannot be read"))
    })
}

/// Whether all that `@main` does is the one call, with its own arguments and results in their order.
pub fn is_bare_call(module: &[u8], calls: &[CallSite]) -> bool {
    let [CallSite { line: Some(line), .. }] = calls else { return false };
    let Ok(text) = std::str::from_utf8(module) else { return false };
    let bare = || {
        let main = text[..line.start].rfind("@main(")?;
        let (_, before) = text[main..line.start].split_once('\n')?;
        let call = Call::of(&text[line.clone()])?;
        let behind = text[line.end..].lines().map(str::trim).find(|line| !line.is_empty())?;
        let returned = behind.strip_prefix("return ").or_else(|| behind.strip_prefix("func.return "));
        let returned = returned.or_else(|| behind.strip_prefix("\"func.return\"(")?.split(')').next())?;
        let returned = returned.split(" : ").next()?.trim();
        let (value, count) = call
            .results
            .split_once(':')
            .map_or((call.results, 1), |(value, count)| (value, count.parse().unwrap_or(0)));
        let value = value.trim();
        let expected: Vec<String> = match count {
            1 => vec![value.to_owned()],
            count => (0..count).map(|at| format!("{value}#{at}")).collect(),
        };
        let arguments = main_arguments(text)?;
        let operands: Vec<String> = arguments.iter().map(|(name, ..)| format!("%{name}")).collect();
        Some(before.trim().is_empty() && call.operands == operands.join(", ") && returned == expected.join(", "))
    };
    bare().unwrap_or(false)
}

// ---- text ----

/// The parts of an op's line.
struct Call<'l> {
    indent: &'l str,
    /// `%0:2`
    results: &'l str,
    operands: &'l str,
    /// `tensor<...>) -> tensor<...> loc(...)`
    types: &'l str,
    has_side_effect: bool,
}

impl<'l> Call<'l> {
    fn of(line: &'l str) -> Option<Self> {
        let (results, op) = line.split_once(" = ")?;
        let indent = &results[..results.len() - results.trim_start().len()];
        let op = op.strip_prefix('"').unwrap_or(op).strip_prefix("stablehlo.custom_call")?;
        let (_, rest) = op.split_once('(')?;
        let (operands, rest) = rest.split_once(')')?;
        let (attributes, types) = rest.rsplit_once(" : (")?;
        let has_side_effect = attributes.contains("has_side_effect = true");
        Some(Self { indent, results: results.trim(), operands, types, has_side_effect })
    }
}

fn in_text(
    module: &[u8],
    calls: &[CallSite],
    target: &str,
    options: &dyn Fn(usize) -> Vec<(&'static str, String)>,
) -> Option<Hosted> {
    let text = std::str::from_utf8(module).ok()?;
    let mut hosted = String::with_capacity(text.len());
    let mut at = 0;
    for (number, site) in calls.iter().enumerate() {
        let line = site.line.clone()?;
        let call = Call::of(&text[line.clone()])?;
        let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
        let options = options(number).into_iter().map(|(name, value)| format!("{name} = \"{}\"", quoted(&value)));
        let options = options.collect::<Vec<_>>().join(", ");
        let Call { indent, results, operands, types, has_side_effect } = call;
        hosted += &text[at..line.start];
        hosted += &format!(
            "{indent}{results} = \"stablehlo.custom_call\"({operands}) {{call_target_name = \"{target}\", \
             api_version = 4 : i32, has_side_effect = {has_side_effect}, backend_config = {{{options}}}}} : ({types}"
        );
        at = line.end;
    }
    hosted += &text[at..];
    let call = |(kernel, site): (usize, &CallSite)| HostedCall {
        kernel,
        aliases: site.aliases.clone(),
        unused: site.unused.clone(),
    };
    Some(Hosted {
        module: hosted.into_bytes(),
        arguments: main_arguments(text)?,
        results: result_names(text),
        calls: calls.iter().enumerate().map(call).collect(),
    })
}

/// Names and types of the arguments of `@main`; the author's names stand in their locations.
fn main_arguments(text: &str) -> Option<Vec<(String, Option<String>, TensorType)>> {
    let (_, rest) = text.split_once("@main(")?;
    let aliases: HashMap<&str, &str> =
        text.lines().filter_map(|line| line.strip_prefix("#loc")?.split_once(" = loc(\"")).collect();
    let list = rest.split_once(" -> ").or_else(|| rest.split_once('{'))?.0;
    let arguments = list.split('%').skip(1).map(|argument| {
        let (name, ty) = argument.split_once(": tensor<")?;
        let location = argument.rsplit_once(" loc(").map(|(_, location)| location);
        let location = location.and_then(|location| match location.strip_prefix('"') {
            Some(string) => Some(string),
            None => aliases.get(location.strip_prefix("#loc")?.split(')').next()?).copied(),
        });
        // Pagoda's own modules have the name as an attribute.
        let own = argument.split_once("pagoda.name = \"").map(|(_, name)| name);
        let author =
            own.or(location).and_then(|location| location.split('"').next()).filter(|name| !name.contains('/'));
        Some((name.to_owned(), author.map(str::to_owned), super::wire::tensor_type(ty)?))
    });
    arguments.collect()
}

/// `jax.result_info` of each result of `@main`.
fn result_names(text: &str) -> Vec<Option<String>> {
    let results = || {
        let (_, rest) = text.split_once("@main(")?;
        let (_, rest) = rest.split_once(" -> ")?;
        let list = rest.lines().next()?;
        let one = |result: &str| Some(result.split_once("jax.result_info = \"")?.1.split('"').next()?.to_owned());
        Some(list.split("tensor<").skip(1).map(one).collect())
    };
    results().unwrap_or_default()
}

// ---- bytecode ----

/// Codes of VHLO's attributes and types.
mod vhlo {
    pub(super) const ARRAY: u64 = 1;
    pub(super) const API_VERSION: u64 = 5;
    pub(super) const DICTIONARY: u64 = 6;
    pub(super) const OUTPUT_OPERAND_ALIAS: u64 = 10;
    pub(super) const STRING: u64 = 14;
    pub(super) const TYPE: u64 = 17;
    pub(super) const FUNCTION: u64 = 8;
    pub(super) const RANKED_TENSOR: u64 = 20;
    /// `API_VERSION_TYPED_FFI`
    pub(super) const TYPED_FFI: u64 = 4;

    /// What an element type is called in MLIR.
    pub(super) fn element(code: u64) -> Option<&'static str> {
        Some(match code {
            0 => "i1",
            2 => "bf16",
            3 => "f16",
            4 => "f32",
            5 => "f64",
            6 => "f8E4M3FN",
            7 => "f8E5M2",
            10 => "i4",
            11 => "i8",
            12 => "i16",
            13 => "i32",
            14 => "i64",
            15 => "ui4",
            16 => "ui8",
            17 => "ui16",
            18 => "ui32",
            19 => "ui64",
            29 => "f8E4M3B11FNUZ",
            31 => "i2",
            32 => "ui2",
            _ => return None,
        })
    }
}

/// What a custom call is called since version 1.18 of StableHLO, with one property more, and before.
const CALL_SINCE: &[u8] = b"custom_call_v2";
const CALL: &[u8] = b"custom_call_v1";
/// Properties of the older one.
const CALL_PROPERTIES: usize = 8;

impl<'b> Reader<'b> {
    fn index(&mut self) -> Option<usize> {
        usize::try_from(self.number()?).ok()
    }

    fn signed(&mut self) -> Option<i64> {
        let number = self.number()?;
        Some((number >> 1) as i64 ^ -((number & 1) as i64))
    }

    fn list<T>(&mut self, one: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = self.index()?;
        (0..count).map(|_| one(self)).collect()
    }

    fn rest<T>(mut self, one: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let mut found = vec![];
        while self.at < self.bytes.len() {
            found.push(one(&mut self)?);
        }
        Some(found)
    }
}

fn numbers(list: impl IntoIterator<Item = u64>) -> Vec<u8> {
    list.into_iter().fold(vec![], |mut bytes, number| {
        write_number(&mut bytes, number);
        bytes
    })
}

/// An attribute or a type.
#[derive(Clone)]
struct Entry<'b> {
    dialect: usize,
    /// The length and the bit that says whether it is in its dialect's own encoding.
    size: u64,
    bytes: &'b [u8],
}

struct Bytecode<'b> {
    sections: Sections<'b>,
    strings: Vec<&'b [u8]>,
    /// Which dialect is VHLO.
    vhlo: usize,
    attributes: Vec<Entry<'b>>,
    types: Vec<Entry<'b>>,
    /// Of each op that has any: the numbers of its attributes.
    properties: Vec<&'b [u8]>,
}

impl<'b> Bytecode<'b> {
    fn read(bytes: &'b [u8]) -> Option<Self> {
        let sections = Sections::read(bytes)?;
        // Strings: their sizes, the last one first, and then their bytes, each with a zero behind it.
        let mut reader = sections.of(STRINGS)?;
        let sizes = reader.list(Reader::number)?;
        let strings = sizes.iter().rev().map(|&size| reader.take(size)?.strip_suffix(b"\0"));
        let strings = strings.collect::<Option<Vec<_>>>()?;
        // Dialects: the numbers of their names, with a bit that says whether a version follows.
        let mut reader = sections.of(DIALECTS)?;
        let dialects = reader.list(|reader| {
            let name = reader.number()?;
            if name & 1 != 0 {
                let length = reader.number()?;
                reader.take(length)?;
            }
            strings.get(usize::try_from(name >> 1).ok()?).copied()
        })?;
        let vhlo = dialects.iter().position(|name| *name == b"vhlo")?;
        // Attributes and then types, in groups of one dialect.
        let (mut offsets, mut content) = (sections.of(OFFSETS)?, sections.of(ENTRIES)?);
        let counts = [offsets.index()?, offsets.index()?];
        let mut tables = counts.map(|count| {
            let mut entries: Vec<Entry> = vec![];
            while entries.len() < count {
                let dialect = offsets.index()?;
                let sizes = offsets.list(Reader::number)?;
                for size in sizes {
                    entries.push(Entry { dialect, size, bytes: content.take(size >> 1)? });
                }
            }
            Some(entries)
        });
        let [attributes, types] = [tables[0].take()?, tables[1].take()?];
        let properties = sections.of(PROPERTIES)?.list(|reader| {
            let size = reader.number()?;
            reader.take(size)
        })?;
        Some(Self { sections, strings, vhlo, attributes, types, properties })
    }

    /// What follows the code, if the entry is one of VHLO's with that code.
    fn of_code(&self, entry: &Entry<'b>, code: u64) -> Option<Reader<'b>> {
        let mut reader = Reader::new(entry.bytes);
        (entry.dialect == self.vhlo && entry.size & 1 != 0 && reader.number()? == code).then_some(reader)
    }

    fn attribute(&self, index: usize, code: u64) -> Option<Reader<'b>> {
        self.of_code(self.attributes.get(index)?, code)
    }

    fn string(&self, index: usize) -> Option<&'b [u8]> {
        self.strings.get(self.attribute(index, vhlo::STRING)?.index()?).copied()
    }

    fn tensor(&self, index: usize) -> Option<TensorType> {
        let mut reader = self.of_code(self.types.get(index)?, vhlo::RANKED_TENSOR)?;
        let dims = reader.list(|reader| usize::try_from(reader.signed()?).ok())?;
        let element = self.types.get(reader.index()?)?;
        let code = Reader::new(element.bytes).number().filter(|_| element.dialect == self.vhlo)?;
        Some(TensorType { element: Element::from_mlir(vhlo::element(code)?)?, dims })
    }

    /// Types of the arguments of `@main`, and the names of its results.
    fn main(&self) -> Option<(Vec<TensorType>, Vec<Option<String>>)> {
        let properties = self.properties.iter().filter_map(|bytes| Reader::new(bytes).rest(Reader::index));
        // A function's: arg_attrs, function_type, res_attrs, sym_name, sym_visibility.
        let main = properties.into_iter().find(|refs| {
            refs.len() == 5 && self.string(refs[3]) == Some(b"main") && self.attribute(refs[1], vhlo::TYPE).is_some()
        })?;
        let function = self.types.get(self.attribute(main[1], vhlo::TYPE)?.index()?)?;
        let inputs = self.of_code(function, vhlo::FUNCTION)?.list(Reader::index)?;
        let name = |of_result: usize| {
            let pairs =
                self.attribute(of_result, vhlo::DICTIONARY)?.list(|reader| Some((reader.index()?, reader.index()?)))?;
            let (_, value) = pairs.into_iter().find(|&(key, _)| self.string(key) == Some(b"jax.result_info"))?;
            Some(String::from_utf8_lossy(self.string(value)?).into_owned())
        };
        let results = self.attribute(main[2], vhlo::ARRAY)?.list(Reader::index)?;
        let types = inputs.into_iter().map(|index| self.tensor(index)).collect::<Option<_>>()?;
        Some((types, results.into_iter().map(name).collect()))
    }

    /// Properties of a call as they were before [`CALL_SINCE`], which plugins may not know yet: without the last, if that is an
    /// empty list, which says nothing.
    fn of_older_call(&self, properties: &[u8]) -> Option<Vec<u8>> {
        let refs = Reader::new(properties).rest(Reader::index)?;
        let (older, &[last]) = refs.split_at_checked(CALL_PROPERTIES)? else { return None };
        let is_empty = self.attribute(last, vhlo::ARRAY)?.list(Reader::index)?.is_empty();
        let renamed = self.strings.contains(&CALL_SINCE) && is_empty;
        renamed.then(|| numbers(older.iter().map(|&index| index as u64)))
    }

    /// The pairs of an `output_operand_aliases`.
    fn aliases(&self, index: usize) -> Option<Vec<(usize, usize)>> {
        let one = |index: usize| {
            let mut reader = self.attribute(index, vhlo::OUTPUT_OPERAND_ALIAS)?;
            let result = reader.list(Reader::signed)?;
            let operand = reader.signed()?;
            Some((usize::try_from(operand).ok()?, usize::try_from(result.first().copied().unwrap_or(0)).ok()?))
        };
        self.attribute(index, vhlo::ARRAY)?.list(Reader::index)?.into_iter().map(one).collect()
    }
}

/// What is added to a module.
struct Added {
    strings: Vec<String>,
    attributes: Vec<Vec<u8>>,
    known: [usize; 2],
}

impl Added {
    fn attribute(&mut self, content: Vec<u8>) -> u64 {
        self.attributes.push(content);
        (self.known[1] + self.attributes.len() - 1) as u64
    }

    fn string(&mut self, text: &str) -> u64 {
        self.strings.push(text.to_owned());
        let string = self.known[0] + self.strings.len() - 1;
        self.attribute(numbers([vhlo::STRING, string as u64]))
    }
}

fn in_bytecode(
    module: &[u8],
    sites: &[CallSite],
    target: &str,
    options: &dyn Fn(usize) -> Vec<(&'static str, String)>,
) -> Option<Hosted> {
    let code = Bytecode::read(module)?;
    let (types, results) = code.main()?;
    let mut added = Added { strings: vec![], attributes: vec![], known: [code.strings.len(), code.attributes.len()] };
    let (version, name, none) = (
        added.attribute(numbers([vhlo::API_VERSION, vhlo::TYPED_FFI])),
        added.string(target),
        added.attribute(numbers([vhlo::ARRAY, 0])),
    );
    let json = |config: &[u8]| Some(serde_json::from_slice::<serde_json::Value>(config).ok()?.to_string());
    let (mut calls, mut properties) = (vec![], vec![]);
    for bytes in &code.properties {
        // A call's: api_version, backend_config, call_target_name, called_computations, has_side_effect, operand_layouts,
        // output_operand_aliases, result_layouts, and in later versions more.
        let refs = Reader::new(bytes).rest(Reader::index).filter(|refs| {
            refs.len() >= CALL_PROPERTIES
                && code.string(refs[2]) == Some(TARGET.as_bytes())
                && code.attribute(refs[0], vhlo::API_VERSION).is_some()
        });
        let Some(refs) = refs else {
            properties.push(code.of_older_call(bytes).unwrap_or_else(|| bytes.to_vec()));
            continue;
        };
        let config = json(code.string(refs[1])?)?;
        let kernel = sites.iter().position(|site| site.backend_config == config)?;
        let pairs: Vec<(u64, u64)> =
            options(calls.len()).iter().map(|(name, value)| (added.string(name), added.string(value))).collect();
        let list = pairs.iter().flat_map(|&(name, value)| [name, value]);
        let options = added.attribute(numbers([vhlo::DICTIONARY, pairs.len() as u64].into_iter().chain(list)));
        let mut new: Vec<u64> = refs.iter().map(|&index| index as u64).collect();
        (new[0], new[1], new[2], new[6]) = (version, options, name, none);
        let new = numbers(new);
        properties.push(code.of_older_call(&new).unwrap_or(new));
        calls.push(HostedCall { kernel, aliases: code.aliases(refs[6])?, unused: vec![] });
    }
    if calls.is_empty() && !sites.is_empty() {
        return None;
    }
    let arguments = types.into_iter().enumerate().map(|(at, ty)| (format!("arg{at}"), None, ty)).collect();
    Some(Hosted { module: write(&code, &added, &properties)?, arguments, results, calls })
}

/// The module with what is added, and its ops' properties.
fn write(code: &Bytecode, added: &Added, properties: &[Vec<u8>]) -> Option<Vec<u8>> {
    let known = code.strings.iter().map(|&text| if text == CALL_SINCE { CALL } else { text });
    let strings: Vec<&[u8]> = known.chain(added.strings.iter().map(String::as_bytes)).collect();
    let own: Vec<Entry> = (added.attributes.iter())
        .map(|bytes| Entry { dialect: code.vhlo, size: (bytes.len() as u64) << 1 | 1, bytes })
        .collect();
    let attributes: Vec<&Entry> = code.attributes.iter().chain(&own).collect();
    let entries = || attributes.iter().copied().chain(&code.types);
    let mut bytes = code.sections.header.to_vec();
    for Section { id, alignment, bytes: content } in &code.sections.all {
        let content = match *id {
            STRINGS => {
                let sizes = strings.iter().rev().map(|text| text.len() as u64 + 1);
                let mut section = numbers([strings.len() as u64].into_iter().chain(sizes));
                strings.iter().for_each(|text| section.extend(text.iter().chain(b"\0")));
                section
            }
            ENTRIES => entries().flat_map(|entry| entry.bytes).copied().collect(),
            OFFSETS => {
                let types: Vec<&Entry> = code.types.iter().collect();
                let mut section = numbers([attributes.len() as u64, types.len() as u64]);
                for entries in [&attributes, &types] {
                    for group in entries.chunk_by(|a, b| a.dialect == b.dialect) {
                        let sizes = group.iter().map(|entry| entry.size);
                        section.extend(numbers([group[0].dialect as u64, group.len() as u64].into_iter().chain(sizes)));
                    }
                }
                section
            }
            PROPERTIES => {
                let mut section = numbers([properties.len() as u64]);
                for own in properties {
                    write_number(&mut section, own.len() as u64);
                    section.extend(own);
                }
                section
            }
            _ => content.to_vec(),
        };
        write_section(&mut bytes, *id, *alignment, &content)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{mosaic::wire::find_custom_calls, random::SplitMix64};

    #[test]
    fn numbers_are_read_as_they_are_written() {
        for number in (0..64).flat_map(|bit| [(1_u64 << bit) - 1, 1 << bit]).chain([u64::MAX]) {
            let bytes = numbers([number]);
            assert_eq!(Reader::new(&bytes).rest(Reader::number), Some(vec![number]), "{bytes:?}");
        }
    }

    /// `{"a": sum(r), "b": r}` of `r = kernel(2 x + y)`, as jax.export of JAX 0.10.2 writes it, and of 0.12.
    const EXPORTED: [&[u8]; 3] = [
        include_bytes!("../../tests/data/exported.mlir"),
        include_bytes!("../../tests/data/exported.bc"),
        include_bytes!("../../tests/data/exported_0_12.bc"),
    ];

    #[test]
    fn a_program_that_jax_exported_is_hosted() {
        for module in EXPORTED {
            let sites = find_custom_calls(module).unwrap();
            let hosted = host(module, &sites, "host_call", &|call| vec![("call", call.to_string())]).unwrap();
            let types: Vec<String> = hosted.arguments.iter().map(|(_, _, ty)| ty.to_string()).collect();
            assert_eq!(types, ["f32[8,128]", "f32[8,128]"]);
            assert_eq!(hosted.results, [Some("result['a']".to_owned()), Some("result['b']".to_owned())]);
            assert_eq!(hosted.calls, [HostedCall { kernel: 0, aliases: vec![(0, 0)], unused: vec![] }]);
            assert!(!is_bare_call(module, &sites));
            let has = |word: &[u8]| hosted.module.windows(word.len()).any(|window| window == word);
            assert!(has(b"host_call") && has(b"call") && !has(CALL_SINCE));
            // In bytecode nobody reads the old attributes, but they are there.
            if let Some(code) = Bytecode::read(&hosted.module) {
                let again = in_bytecode(&hosted.module, &sites, "x", &|_| vec![]);
                assert!(again.is_none(), "no call of a kernel is left");
                assert_eq!(code.properties.len(), Bytecode::read(module).unwrap().properties.len());
            }
        }
    }

    #[test]
    fn bytecode_that_is_cut_off_is_damaged() {
        let module = EXPORTED.into_iter().find(|module| is_bytecode(module)).unwrap();
        for length in 4..module.len() {
            let error = find_custom_calls(&module[..length]).unwrap_err().to_string();
            assert!(error.contains("the bytecode is damaged"), "{length}: {error}");
        }
    }

    #[test]
    fn damage_is_not_a_panic() {
        let mut random = SplitMix64::new(1);
        for module in EXPORTED {
            let sites = find_custom_calls(module).unwrap();
            for _ in 0..5_000 {
                let mut damaged = module.to_vec();
                for _ in 0..1 + random.below(4) {
                    let at = random.below(damaged.len());
                    damaged[at] = random.below(256) as u8;
                }
                drop(host(&damaged, &sites, "x", &|_| vec![]));
                damaged.truncate(random.below(damaged.len()));
                drop(host(&damaged, &find_custom_calls(&damaged).unwrap_or_default(), "x", &|_| vec![]));
            }
        }
    }
}
