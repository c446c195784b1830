//! Source lines that a module's text has beside its ops: `loc(#loc7)`, and what `#loc7` is, further down.
//!
//! StableHLO's ops cannot be read without its dialect, so neither can their locations; their text can.

use std::collections::HashMap;

use super::location::Frame;

/// How deep locations nest: a damaged module may have one that contains itself.
const DEEPEST: usize = 64;

/// The aliases of locations in a module's text.
pub(super) struct Locations<'t>(HashMap<&'t str, &'t str>);

impl<'t> Locations<'t> {
    /// Finds them: `#loc7 = loc(...)`, a line each.
    pub(super) fn of(module: &'t [u8]) -> Self {
        let lines = module.split(|&byte| byte == b'\n').filter(|line| line.starts_with(b"#loc"));
        let lines = lines.filter_map(|line| std::str::from_utf8(line).ok()?.split_once(" = loc("));
        Self(lines.filter_map(|(name, location)| Some((name, location.strip_suffix(')')?))).collect())
    }

    /// The source lines of an op's text, the innermost first.
    pub(super) fn frames(&self, op: &str) -> Vec<Frame> {
        let mut frames = vec![];
        if let Some((_, location)) = op.trim_end().rsplit_once(" loc(") {
            self.collect(&mut location.strip_suffix(')').unwrap_or(location), None, DEEPEST, &mut frames);
        }
        frames
    }

    /// Takes a location off the front of `text`; `name` is what stands directly around it.
    fn collect(&self, text: &mut &str, name: Option<&str>, depth: usize, frames: &mut Vec<Frame>) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        let eat = |text: &mut &str, word: &str| text.strip_prefix(word).map(|rest| *text = rest);
        if text.starts_with('#') {
            let end =
                text[1..].find(|c: char| !c.is_ascii_alphanumeric() && c != '_').map_or(text.len(), |end| end + 1);
            let (alias, rest) = text.split_at(end);
            *text = rest;
            let mut aliased = *self.0.get(alias)?;
            return self.collect(&mut aliased, name, depth, frames);
        }
        if eat(text, "callsite(").is_some() {
            self.collect(text, None, depth, frames)?;
            eat(text, " at ")?;
            self.collect(text, None, depth, frames)?;
            return eat(text, ")");
        }
        if eat(text, "fused").is_some() {
            *text = &text[text.find('[')? + 1..];
            return self.collect(text, name, depth, frames);
        }
        eat(text, "\"")?;
        let end = text.find('"')?;
        let (string, rest) = (&text[..end], &text[end + 1..]);
        *text = rest;
        if eat(text, "(").is_some() {
            self.collect(text, Some(string), depth, frames)?;
            return eat(text, ")");
        }
        if eat(text, ":").is_some() {
            let number = |text: &mut &str| {
                let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
                let (digits, rest) = text.split_at(end);
                *text = rest;
                digits.parse::<usize>().ok()
            };
            let line = number(text)?;
            frames.push(Frame { file: string.to_owned(), line, function: name.map(str::to_owned) });
            // The column, and where the range ends.
            let end = text.find([')', ' ', ',', ']']).unwrap_or(text.len());
            *text = &text[end..];
            if eat(text, " to ").is_some() {
                let end = text.find([')', ' ', ',', ']']).unwrap_or(text.len());
                *text = &text[end..];
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_stack_is_read() {
        let module = b"  %3 = stablehlo.custom_call @tpu_custom_call(%2) {} : (t) -> t loc(#loc21)
#loc5 = loc(\"/a/k.py\":10:8 to :13)
#loc7 = loc(\"/a/k.py\":11:8 to 12:3)
#loc9 = loc(\"<module>\"(#loc5))
#loc12 = loc(\"f\"(#loc7))
#loc17 = loc(callsite(#loc12 at #loc9))
#loc21 = loc(\"jit(f)/pallas_call\"(#loc17))
#loc22 = loc(\"x\"(#loc22))";
        let locations = Locations::of(module);
        let frame = |line, function: &str| Frame { file: "/a/k.py".into(), line, function: Some(function.into()) };
        let text = std::str::from_utf8(module).unwrap();
        assert_eq!(locations.frames(text.lines().next().unwrap()), [frame(11, "f"), frame(10, "<module>")]);
        assert_eq!(
            locations.frames("op loc(callsite(\"g\"(\"/a/k.py\":3:1) at #loc12))"),
            [frame(3, "g"), frame(11, "f")]
        );
        assert_eq!(locations.frames("op loc(#loc22)"), []);
        assert_eq!(locations.frames("op loc(unknown)"), []);
        assert_eq!(locations.frames("op loc(\"cut"), []);
    }
}
