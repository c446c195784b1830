//! MLIR bytecode with types and attributes that MLIR 22 knows as text only, such as fp8 and affine maps, which JAX's newer
//! MLIR numbers.
//!
//! MLIR's reader refuses such bytecode as a whole, with a number ("unknown attribute code: 24"). [`readable`] writes the
//! text of those types and attributes in the place of their numbers, as MLIR 22 itself would.
//!
//! Source of the format: "MLIR Bytecode Format" of LLVM's documentation; codes from `BuiltinDialectBytecode.td` and, of
//! affine maps, `BuiltinDialectBytecode.cpp`, and from what JAX 0.10.2 (types) and 0.12.0 (affine maps) write.

/// The code of the first builtin type that MLIR 22 has no code for.
const FIRST: u8 = 21;
/// The types of that code and the following ones.
const NAMES: [&str; 12] = [
    "tf32",
    "f8E5M2",
    "f8E4M3",
    "f8E4M3FN",
    "f8E5M2FNUZ",
    "f8E4M3FNUZ",
    "f8E4M3B11FNUZ",
    "f8E3M4",
    "f4E2M1FN",
    "f6E2M3FN",
    "f6E3M2FN",
    "f8E8M0FNU",
];

/// The code of an affine map.
const AFFINE_MAP: u64 = 23;
/// How many expressions one may hold, one inside the other.
const MOST_NESTED: usize = 64;
/// How many dimensions or results a map may have.
const MOST_DIMENSIONS: u64 = 64;

pub(super) const STRINGS: u8 = 0;
pub(super) const DIALECTS: u8 = 1;
/// Attributes and types.
pub(super) const ENTRIES: u8 = 2;
/// Their dialects and sizes.
pub(super) const OFFSETS: u8 = 3;
const IR: u8 = 4;
/// The ops' properties.
pub(super) const PROPERTIES: u8 = 8;
/// The version of the format that has them.
const PROPERTIES_SINCE: u64 = 5;

/// How a module in bytecode begins.
pub const MAGIC: &[u8] = b"ML\xefR";

/// Whether a module is bytecode, not text.
pub fn is_bytecode(module: &[u8]) -> bool {
    module.starts_with(MAGIC)
}

/// A part of a bytecode: its number, its alignment, its bytes.
pub(super) struct Section<'b> {
    pub(super) id: u8,
    pub(super) alignment: Option<u64>,
    pub(super) bytes: &'b [u8],
}

/// A module in bytecode, cut into its sections.
pub(super) struct Sections<'b> {
    /// The version of the format.
    version: u64,
    /// What stands before the first section: magic, version, producer.
    pub(super) header: &'b [u8],
    pub(super) all: Vec<Section<'b>>,
}

impl<'b> Sections<'b> {
    /// `None` where the last section does not end where the bytes do, or one that every module has is missing.
    pub(super) fn read(bytes: &'b [u8]) -> Option<Self> {
        let mut reader = Reader { bytes, at: is_bytecode(bytes).then_some(MAGIC.len())? };
        let version = reader.number()?;
        while reader.byte()? != 0 {} // who wrote it
        let header = &bytes[..reader.at];
        let mut all = vec![];
        while reader.at < bytes.len() {
            let id = reader.byte()?;
            let length = reader.number()?;
            let alignment = if id & 0x80 != 0 { Some(reader.number()?) } else { None };
            if let Some(alignment) = alignment {
                reader.at = reader.at.checked_next_multiple_of(usize::try_from(alignment).ok().filter(|&a| a > 0)?)?;
            }
            all.push(Section { id: id & 0x7f, alignment, bytes: reader.take(length)? });
        }
        let sections = Self { version, header, all };
        // Every module has these; properties since they are apart from other attributes.
        let needed = [STRINGS, DIALECTS, ENTRIES, OFFSETS, IR, PROPERTIES];
        let needed = &needed[..if version < PROPERTIES_SINCE { 5 } else { 6 }];
        needed.iter().all(|&id| sections.of(id).is_some()).then_some(sections)
    }

    /// The content of the section of a number.
    pub(super) fn of(&self, id: u8) -> Option<Reader<'b>> {
        self.all.iter().find(|section| section.id == id).map(|section| Reader::new(section.bytes))
    }
}

/// `body` with text for the types of [`NAMES`] and for affine maps; `None` where there are none, or it is damaged.
pub(super) fn readable(body: &[u8]) -> Option<Vec<u8>> {
    let sections = Sections::read(body)?;
    let mut result = sections.header.to_vec();
    let builtin = builtin(sections.of(STRINGS)?, sections.of(DIALECTS)?, sections.version)?;
    let (entries, offsets) = with_text(sections.of(ENTRIES)?, sections.of(OFFSETS)?, &builtin)?;
    for Section { id, alignment, bytes } in &sections.all {
        let bytes = match *id {
            ENTRIES => &entries,
            OFFSETS => &offsets,
            _ => *bytes,
        };
        write_section(&mut result, *id, *alignment, bytes)?;
    }
    Some(result)
}

/// Adds a section; `None` where its alignment is of no module.
pub(super) fn write_section(to: &mut Vec<u8>, id: u8, alignment: Option<u64>, bytes: &[u8]) -> Option<()> {
    to.push(id | if alignment.is_some() { 0x80 } else { 0 });
    write_number(to, bytes.len() as u64);
    if let Some(alignment) = alignment {
        write_number(to, alignment);
        let padded = to.len().checked_next_multiple_of(usize::try_from(alignment).ok()?)?;
        // No alignment is more than a page; a damaged one may be anything.
        to.resize(Some(padded).filter(|&padded| padded - to.len() <= 1 << 12)?, 0xcb);
    }
    to.extend_from_slice(bytes);
    Some(())
}

/// Which dialects are the builtin one, in bytecode of a version.
fn builtin(mut strings: Reader, mut dialects: Reader, version: u64) -> Option<Vec<bool>> {
    // Strings: their sizes, the last one first, and at the end their bytes, each with a zero behind it.
    let sizes = (0..strings.number()?).map(|_| strings.number()).collect::<Option<Vec<_>>>()?;
    let mut texts = sizes.iter().rev().map(|&size| strings.take(size)).collect::<Option<Vec<_>>>()?;
    texts.iter_mut().for_each(|text| *text = text.strip_suffix(b"\0").unwrap_or(text));
    // Dialects: the numbers of their names, since version 1 with a bit that says whether a version follows.
    let mut builtin = vec![];
    for _ in 0..dialects.number()? {
        let mut name = dialects.number()?;
        if version > 0 {
            if name & 1 != 0 {
                let length = dialects.number()?;
                dialects.take(length)?;
            }
            name >>= 1;
        }
        builtin.push(*texts.get(usize::try_from(name).ok()?)? == b"builtin");
    }
    Some(builtin)
}

/// Attributes and then types, grouped by dialect: their bytes, and their sizes with a bit that says whether they are not
/// text. Both with text for the types that are numbers of [`NAMES`], and for affine maps; `None` where there are none.
fn with_text(mut entries: Reader, mut offsets: Reader, builtin: &[bool]) -> Option<(Vec<u8>, Vec<u8>)> {
    let (mut new_entries, mut new_offsets) = (vec![], vec![]);
    let (attributes, types) = (offsets.number()?, offsets.number()?);
    let all = attributes.checked_add(types)?;
    write_number(&mut new_offsets, attributes);
    write_number(&mut new_offsets, types);
    let mut replaced = false;
    let mut entry = 0;
    while entry < all {
        let (dialect, count) = (offsets.number()?, offsets.number()?);
        write_number(&mut new_offsets, dialect);
        write_number(&mut new_offsets, count);
        let is_builtin = *builtin.get(usize::try_from(dialect).ok()?)?;
        for _ in 0..count {
            let size = offsets.number()?;
            let bytes = entries.take(size >> 1)?;
            let is_number = is_builtin && size & 1 != 0;
            let text =
                is_number.then(|| if entry < attributes { affine_map(bytes) } else { type_name(bytes) }).flatten();
            match text {
                None => {
                    new_entries.extend_from_slice(bytes);
                    write_number(&mut new_offsets, size);
                }
                Some(text) => {
                    replaced = true;
                    new_entries.extend_from_slice(text.as_bytes());
                    new_entries.push(0);
                    write_number(&mut new_offsets, (text.len() as u64 + 1) << 1);
                }
            }
            entry = entry.checked_add(1)?;
        }
    }
    // What may come behind the last entry.
    new_offsets.extend_from_slice(offsets.bytes.get(offsets.at..)?);
    new_entries.extend_from_slice(entries.bytes.get(entries.at..)?);
    replaced.then_some((new_entries, new_offsets))
}

/// The name of a builtin type that is one of [`NAMES`].
fn type_name(bytes: &[u8]) -> Option<String> {
    let mut reader = Reader::new(bytes);
    let code = reader.number()?.checked_sub(u64::from(FIRST))?;
    let name = NAMES.get(usize::try_from(code).ok()?)?;
    (reader.at == bytes.len()).then(|| (*name).to_owned())
}

/// The text of a builtin attribute that is an affine map.
fn affine_map(bytes: &[u8]) -> Option<String> {
    let mut reader = Reader::new(bytes);
    if reader.number()? != AFFINE_MAP {
        return None;
    }
    let header = reader.number()?;
    let (dimensions, kind) = (header >> 2, header & 3);
    let few = |number: u64| Some(number).filter(|&number| number <= MOST_DIMENSIONS);
    let dimension = |at: u64| format!("d{at}");
    few(dimensions)?;
    let mut symbols = 0;
    let results: Vec<String> = match kind {
        // Of the identity nothing follows; of a permutation, its dimensions; of a projection, how many, and which.
        0 => (0..dimensions).map(dimension).collect(),
        1 => (0..dimensions).map(|_| reader.number().map(dimension)).collect::<Option<_>>()?,
        2 => (0..few(reader.number()?)?).map(|_| reader.number().map(dimension)).collect::<Option<_>>()?,
        _ => {
            symbols = few(reader.number()?)?;
            (0..few(reader.number()?)?).map(|_| expression(&mut reader, 0)).collect::<Option<_>>()?
        }
    };
    let list = |names: Vec<String>| names.join(", ");
    let of_symbols = match symbols {
        0 => String::new(),
        _ => format!("[{}]", list((0..symbols).map(|at| format!("s{at}")).collect())),
    };
    let dimensions = list((0..dimensions).map(dimension).collect());
    (reader.at == bytes.len()).then(|| format!("affine_map<({dimensions}){of_symbols} -> ({})>", list(results)))
}

/// An affine expression: its kind, then what it is of.
fn expression(reader: &mut Reader, nested: usize) -> Option<String> {
    let operator = match reader.number()? {
        0 => return reader.number().map(|at| format!("d{at}")),
        1 => return reader.number().map(|at| format!("s{at}")),
        // The lowest bit of a number that may be negative is its sign.
        2 => return reader.number().map(|bits| ((bits >> 1) as i64 ^ -((bits & 1) as i64)).to_string()),
        3 => "+",
        4 => "*",
        5 => "mod",
        6 => "floordiv",
        7 => "ceildiv",
        _ => return None,
    };
    let mut operand = || (nested < MOST_NESTED).then(|| expression(reader, nested + 1)).flatten();
    let (left, right) = (operand()?, operand()?);
    Some(format!("({left} {operator} {right})"))
}

/// Bytecode, read from `at` on; `None` where it ends too soon.
#[derive(Clone, Copy)]
pub(super) struct Reader<'b> {
    pub(super) bytes: &'b [u8],
    pub(super) at: usize,
}

impl<'b> Reader<'b> {
    pub(super) fn new(bytes: &'b [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    pub(super) fn take(&mut self, length: u64) -> Option<&'b [u8]> {
        let end = self.at.checked_add(usize::try_from(length).ok()?)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    /// A number: as many zeros at the low end of the first byte as bytes follow it.
    pub(super) fn number(&mut self) -> Option<u64> {
        let first = *self.bytes.get(self.at)?;
        let more = first.trailing_zeros().min(8) as u64;
        let bytes = self.take(1 + more)?;
        let little_endian =
            |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |number, &byte| number << 8 | u64::from(byte));
        Some(if more == 8 { little_endian(&bytes[1..]) } else { little_endian(bytes) >> (more + 1) })
    }
}

/// Writes what [`Reader::number`] reads.
pub(super) fn write_number(to: &mut Vec<u8>, number: u64) {
    let bits = (64 - number.leading_zeros()).max(1);
    match bits.div_ceil(7) {
        bytes @ 1..=8 => {
            let encoded = number << bytes | 1 << (bytes - 1);
            to.extend_from_slice(&encoded.to_le_bytes()[..bytes as usize]);
        }
        _ => {
            to.push(0);
            to.extend_from_slice(&number.to_le_bytes());
        }
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
    fn numbers_are_read_as_they_are_written() {
        for shift in 0..64 {
            for number in [1_u64 << shift, (1_u64 << shift) - 1, u64::MAX >> shift] {
                let mut bytes = vec![];
                write_number(&mut bytes, number);
                let mut reader = Reader::new(&bytes);
                assert_eq!((reader.number(), reader.at), (Some(number), bytes.len()));
            }
        }
    }

    #[test]
    fn a_type_gets_its_name() {
        let body = fp8();
        let named = readable(&body).unwrap();
        assert_eq!(named.len(), body.len() + b"f8E4M3FN".len());
        assert!(named.windows(9).any(|window| window == b"f8E4M3FN\0"));
        assert!(readable(&named).is_none());
    }

    #[test]
    fn an_affine_map_gets_its_text() {
        let text = |numbers: &[u64]| {
            let mut bytes = vec![];
            numbers.iter().for_each(|&number| write_number(&mut bytes, number));
            affine_map(&bytes)
        };
        let of_dimensions = |count: u64, kind: u64| count << 2 | kind;
        for (numbers, expected) in [
            (vec![23, of_dimensions(2, 0)], Some("(d0, d1) -> (d0, d1)")),
            (vec![23, of_dimensions(0, 0)], Some("() -> ()")),
            (vec![23, of_dimensions(2, 1), 1, 0], Some("(d0, d1) -> (d1, d0)")),
            (vec![23, of_dimensions(3, 2), 1, 2], Some("(d0, d1, d2) -> (d2)")),
            // d0 floordiv 8 + s0 * -3
            (
                vec![23, of_dimensions(1, 3), 1, 1, 3, 6, 0, 0, 2, 16, 4, 1, 0, 2, 5],
                Some("(d0)[s0] -> (((d0 floordiv 8) + (s0 * -3)))"),
            ),
            (vec![23, of_dimensions(2, 1), 1], None),
            (vec![23, of_dimensions(2, 0), 1], None),
            (vec![8, of_dimensions(2, 0)], None),
        ] {
            assert_eq!(text(&numbers), expected.map(|map| format!("affine_map<{map}>")), "{numbers:?}");
        }
        // What MLIR prints is what it reads.
        let context = crate::Context::new();
        let map = text(&[23, of_dimensions(1, 3), 1, 1, 3, 6, 0, 0, 2, 16, 4, 1, 0, 2, 5]).unwrap();
        let parsed = melior::ir::Attribute::parse(context.melior(), &map).unwrap();
        assert_eq!(parsed.to_string(), "affine_map<(d0)[s0] -> (d0 floordiv 8 - s0 * 3)>");
    }

    #[test]
    fn damage_is_not_a_panic() {
        let body = fp8();
        (0..body.len()).for_each(|length| drop(readable(&body[..length])));
        let mut random = SplitMix64::new(1);
        for _ in 0..20_000 {
            let mut damaged = body.clone();
            for _ in 0..1 + random.below(4) {
                let at = random.below(damaged.len());
                damaged[at] = random.below(256) as u8;
            }
            drop(readable(&damaged));
        }
    }
}
