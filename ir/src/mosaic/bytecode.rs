//! MLIR bytecode with types that MLIR 22 knows by name only, such as fp8, which JAX's newer MLIR numbers.
//!
//! MLIR's reader refuses such bytecode as a whole, with a number ("unknown attribute code: 24"). [`readable`] writes the
//! names of those types in the place of their numbers, as MLIR 22 itself would.
//!
//! Source of the format: "MLIR Bytecode Format" of LLVM's documentation; codes from `BuiltinDialectBytecode.td`, and from
//! what JAX 0.10.2 writes.

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

const STRINGS: u8 = 0;
const DIALECTS: u8 = 1;
const ENTRIES: u8 = 2;
const OFFSETS: u8 = 3;

/// A part of a bytecode: its number, its alignment, its bytes.
struct Section<'b> {
    id: u8,
    alignment: Option<u64>,
    bytes: &'b [u8],
}

/// `body` with names for the types of [`NAMES`]; `None` where there are none, or it is damaged.
pub(super) fn readable(body: &[u8]) -> Option<Vec<u8>> {
    let mut reader = Reader { bytes: body, at: b"ML\xefR".len() };
    reader.number()?; // the version
    while reader.byte()? != 0 {} // who wrote it
    let mut result = body[..reader.at].to_vec();
    let sections = sections(&mut reader)?;
    let section = |id: u8| sections.iter().find(|section| section.id == id).map(|section| section.bytes);
    let (entries, offsets) = with_names(
        Reader::new(section(ENTRIES)?),
        Reader::new(section(OFFSETS)?),
        &builtin(section(STRINGS)?, section(DIALECTS)?)?,
    )?;
    for Section { id, alignment, bytes } in &sections {
        let bytes = match *id {
            ENTRIES => &entries,
            OFFSETS => &offsets,
            _ => *bytes,
        };
        result.push(id | if alignment.is_some() { 0x80 } else { 0 });
        write_number(&mut result, bytes.len() as u64);
        if let Some(alignment) = *alignment {
            write_number(&mut result, alignment);
            let padded = result.len().checked_next_multiple_of(usize::try_from(alignment).ok()?)?;
            // No alignment is more than a page; a damaged one may be anything.
            result.resize(Some(padded).filter(|&padded| padded - result.len() <= 1 << 12)?, 0xcb);
        }
        result.extend_from_slice(bytes);
    }
    Some(result)
}

fn sections<'b>(reader: &mut Reader<'b>) -> Option<Vec<Section<'b>>> {
    let mut sections = vec![];
    while reader.at < reader.bytes.len() {
        let id = reader.byte()?;
        let length = reader.number()?;
        let alignment = if id & 0x80 != 0 { Some(reader.number()?) } else { None };
        if let Some(alignment) = alignment {
            reader.at = reader.at.checked_next_multiple_of(usize::try_from(alignment).ok().filter(|&a| a > 0)?)?;
        }
        sections.push(Section { id: id & 0x7f, alignment, bytes: reader.take(length)? });
    }
    Some(sections)
}

/// Which dialects are the builtin one.
fn builtin(strings: &[u8], dialects: &[u8]) -> Option<Vec<bool>> {
    // Strings: their sizes, the last one first, and at the end their bytes, each with a zero behind it.
    let mut strings = Reader::new(strings);
    let sizes = (0..strings.number()?).map(|_| strings.number()).collect::<Option<Vec<_>>>()?;
    let mut texts = sizes.iter().rev().map(|&size| strings.take(size)).collect::<Option<Vec<_>>>()?;
    texts.iter_mut().for_each(|text| *text = text.strip_suffix(b"\0").unwrap_or(text));
    // Dialects: the numbers of their names, with a bit that says whether a version follows.
    let mut dialects = Reader::new(dialects);
    let mut builtin = vec![];
    for _ in 0..dialects.number()? {
        let name = dialects.number()?;
        if name & 1 != 0 {
            let length = dialects.number()?;
            dialects.take(length)?;
        }
        builtin.push(*texts.get(usize::try_from(name >> 1).ok()?)? == b"builtin");
    }
    Some(builtin)
}

/// Attributes and then types, grouped by dialect: their bytes, and their sizes with a bit that says whether they are not
/// text. Both with names for the types that are numbers of [`NAMES`]; `None` where there are none.
fn with_names(mut entries: Reader, mut offsets: Reader, builtin: &[bool]) -> Option<(Vec<u8>, Vec<u8>)> {
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
            // One byte with its lowest bit set is a number below 128.
            let name = match *bytes {
                [byte] if entry >= attributes && size & 1 != 0 && is_builtin && byte & 1 != 0 => {
                    (byte >> 1).checked_sub(FIRST).and_then(|code| NAMES.get(usize::from(code)))
                }
                _ => None,
            };
            match name {
                None => {
                    new_entries.extend_from_slice(bytes);
                    write_number(&mut new_offsets, size);
                }
                Some(name) => {
                    replaced = true;
                    new_entries.extend_from_slice(name.as_bytes());
                    new_entries.push(0);
                    write_number(&mut new_offsets, (name.len() as u64 + 1) << 1);
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
