//! MLIR bytecode with types that MLIR 22 does not know, such as fp8, which JAX's newer MLIR numbers.
//!
//! MLIR's reader refuses such bytecode as a whole, with a number ("unknown attribute code: 24"). Here those types are
//! replaced by stand-ins, so that the module can be read far enough to say which op uses which type, and where. Such a
//! module must never be run: [`StandIns::first_use`] is the error.
//!
//! Source of the format: "MLIR Bytecode Format" of LLVM's documentation; codes from `BuiltinDialectBytecode.td`.

use melior::ir::{
    BlockLike, Module, RegionLike, ValueLike,
    operation::{OperationLike, OperationRef},
};

use super::{
    location::{describe, describe_function},
    signature::{op_name, symbol},
};
use crate::context::printed;

/// The codes of the builtin types that MLIR 22 knows are below this.
const UNKNOWN: u64 = 21;
/// Types that no kernel for a TPU has: their codes, and what they print as.
const STAND_INS: [(u8, &str); 2] = [(7, "f80"), (8, "f128")];

/// Bytecode that MLIR can read, and what its stand-ins stand for.
pub(super) struct StandIns {
    pub(super) body: Vec<u8>,
    /// The code of the type that each of [`STAND_INS`] stands for.
    codes: Vec<u64>,
}

/// The type that a newer MLIR writes as `code`.
fn name(code: u64) -> String {
    match code {
        24 => "f8E4M3FN".to_owned(), // as JAX 0.10.2 writes it
        code => {
            format!("a type that is newer than MLIR 22 (builtin type code {code}; fp8 and fp4 types have such codes)")
        }
    }
}

impl StandIns {
    /// `None` where `body` is damaged, or has no unknown types, or more than there are stand-ins.
    pub(super) fn new(body: &[u8]) -> Option<Self> {
        let mut body = body.to_vec();
        let mut codes = vec![];
        for at in unknown_types(&body)? {
            let code = u64::from(body[at] >> 1);
            let known = codes.iter().position(|&known| known == code);
            let stand_in = known.unwrap_or_else(|| {
                codes.push(code);
                codes.len() - 1
            });
            body[at] = STAND_INS.get(stand_in)?.0 << 1 | 1;
        }
        (!codes.is_empty()).then_some(Self { body, codes })
    }

    /// What the module that was read from [`body`](Self::body) wants that cannot be: the first function or op that has such
    /// a type, and its source line.
    pub(super) fn first_use(&self, module: &Module) -> Option<String> {
        let first = module.body().first_operation();
        std::iter::successors(first, |operation| operation.next_in_block()).find_map(|operation| self.use_in(operation))
    }

    fn use_in(&self, operation: OperationRef) -> Option<String> {
        let results = operation.results().map(|value| value.r#type());
        let types: Vec<String> =
            operation.operands().map(|value| value.r#type()).chain(results).map(|ty| printed(&ty)).collect();
        if let Some(code) = self.code_in(&types) {
            let name_of_op = op_name(operation);
            let name_of_op = name_of_op.strip_prefix(super::wire::PREFIX).unwrap_or(&name_of_op);
            let at = describe(operation.location());
            return Some(format!("{name_of_op} has a value of {}, which is not supported (at {at})", name(code)));
        }
        let nested = operation.regions().find_map(|region| {
            let blocks = std::iter::successors(region.first_block(), |block| block.next_in_region());
            blocks.into_iter().find_map(|block| {
                let first = block.first_operation();
                std::iter::successors(first, |operation| operation.next_in_block()).find_map(|inner| self.use_in(inner))
            })
        });
        let of_function = || {
            let entry = operation.region(0).ok()?.first_block()?;
            let arguments = (0..entry.argument_count()).filter_map(|index| Some(entry.argument(index).ok()?.r#type()));
            let code = self.code_in(&arguments.map(|ty| printed(&ty)).collect::<Vec<_>>())?;
            let function = symbol(operation).unwrap_or_default();
            let at = describe_function(operation);
            Some(format!("@{function} has an argument of {}, which is not supported (at {at})", name(code)))
        };
        nested.or_else(of_function)
    }

    /// What stands in one of these types.
    fn code_in(&self, types: &[String]) -> Option<u64> {
        let is_in = |stand_in: &str| {
            types.iter().any(|ty| {
                ty.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| {
                    // An element follows its sizes, `8x128xf80`.
                    word == stand_in || word.strip_suffix(stand_in).is_some_and(|sizes| sizes.ends_with('x'))
                })
            })
        };
        self.codes.iter().zip(STAND_INS).find(|(_, (_, stand_in))| is_in(stand_in)).map(|(&code, _)| code)
    }
}

/// Where in a bytecode the types are of one byte and of a code that MLIR 22 does not know.
fn unknown_types(body: &[u8]) -> Option<Vec<usize>> {
    const STRINGS: u8 = 0;
    const DIALECTS: u8 = 1;
    const TYPES: u8 = 2;
    const OFFSETS: u8 = 3;
    let mut reader = Reader { bytes: body, at: b"ML\xefR".len() };
    reader.number()?; // the version
    while reader.byte()? != 0 {} // who wrote it
    let mut sections = [const { None::<(usize, usize)> }; 4];
    while reader.at < body.len() {
        let id = reader.byte()?;
        let length = usize::try_from(reader.number()?).ok()?;
        if id & 0x80 != 0 {
            let alignment = usize::try_from(reader.number()?).ok()?;
            reader.at = reader.at.checked_next_multiple_of(alignment)?;
        }
        let end = reader.at.checked_add(length).filter(|&end| end <= body.len())?;
        if let Some(section) = sections.get_mut(usize::from(id & 0x7f)) {
            *section = Some((reader.at, end));
        }
        reader.at = end;
    }
    let section = |id: u8| {
        let (start, end) = sections[usize::from(id)]?;
        Some(Reader { bytes: &body[..end], at: start })
    };
    // Strings: their sizes, the last one first, and at the end their bytes, each with a zero behind it.
    let mut strings = section(STRINGS)?;
    let sizes = (0..strings.number()?).map(|_| strings.number()).collect::<Option<Vec<_>>>()?;
    let mut texts = sizes.iter().rev().map(|&size| strings.take(size)).collect::<Option<Vec<_>>>()?;
    texts.iter_mut().for_each(|text| *text = text.strip_suffix(b"\0").unwrap_or(text));
    // Dialects: the numbers of their names, with a bit that says whether a version follows.
    let mut dialects = section(DIALECTS)?;
    let mut builtin = vec![];
    for _ in 0..dialects.number()? {
        let name = dialects.number()?;
        if name & 1 != 0 {
            let length = dialects.number()?;
            dialects.take(length)?;
        }
        builtin.push(*texts.get(usize::try_from(name >> 1).ok()?)? == b"builtin");
    }
    // Attributes and then types, grouped by dialect: sizes, with a bit that says whether they are not text.
    let mut offsets = section(OFFSETS)?;
    let (attributes, types) = (offsets.number()?, offsets.number()?);
    let all = attributes.checked_add(types)?;
    let mut entries = section(TYPES)?;
    let mut found = vec![];
    let mut entry = 0;
    while entry < all {
        let dialect = usize::try_from(offsets.number()?).ok()?;
        for _ in 0..offsets.number()? {
            let size = offsets.number()?;
            let at = entries.at;
            let bytes = entries.take(size >> 1)?;
            // One byte with its lowest bit set is a number below 128.
            if let (true, true, &[byte]) = (entry >= attributes, size & 1 != 0 && *builtin.get(dialect)?, bytes)
                && byte & 1 != 0
                && u64::from(byte >> 1) >= UNKNOWN
            {
                found.push(at);
            }
            entry += 1;
        }
    }
    Some(found)
}

struct Reader<'b> {
    bytes: &'b [u8],
    at: usize,
}

impl<'b> Reader<'b> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn take(&mut self, length: u64) -> Option<&'b [u8]> {
        let end = self.at.checked_add(usize::try_from(length).ok()?)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    /// A number: as many zeros at the low end of the first byte as bytes follow it.
    fn number(&mut self) -> Option<u64> {
        let first = *self.bytes.get(self.at)?;
        let more = first.trailing_zeros().min(8) as u64;
        let bytes = self.take(1 + more)?;
        let little_endian =
            |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |number, &byte| number << 8 | u64::from(byte));
        Some(if more == 8 { little_endian(&bytes[1..]) } else { little_endian(bytes) >> (more + 1) })
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};

    use super::*;
    use crate::{mosaic::wire, random::SplitMix64};

    /// The body of the first kernel of the file: one with fp8 that JAX 0.10.2 wrote.
    fn fp8() -> Vec<u8> {
        let calls = wire::find_custom_calls(include_bytes!("../../tests/cases/jax.mlir")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&calls[0].backend_config).unwrap();
        BASE64.decode(config["custom_call_config"]["body"].as_str().unwrap()).unwrap()
    }

    #[test]
    fn one_type_is_replaced() {
        let body = fp8();
        let found = StandIns::new(&body).unwrap();
        assert_eq!(found.codes, [24]);
        assert_eq!(body.iter().zip(&found.body).filter(|(a, b)| a != b).count(), 1);
        assert!(StandIns::new(&found.body).is_none());
    }

    #[test]
    fn damage_is_not_a_panic() {
        let body = fp8();
        (0..body.len()).for_each(|length| drop(StandIns::new(&body[..length])));
        let mut random = SplitMix64::new(1);
        for _ in 0..20_000 {
            let mut damaged = body.clone();
            for _ in 0..1 + random.below(4) {
                let at = random.below(damaged.len());
                damaged[at] = random.below(256) as u8;
            }
            drop(StandIns::new(&damaged));
        }
    }
}
