//! The Python sources of a kernel, where its module says which they are and they can be read: the line of a fault, and the names
//! that its author gave the arguments.
//!
//! Nothing here is needed to run a kernel: what cannot be read or understood is left out.

use std::collections::HashMap;
use std::path::Path;

use pagoda_ir::mosaic::Frame;

/// No source file of a kernel is larger.
const MOST_BYTES: u64 = 16 << 20;

/// Source files, each read once.
#[derive(Default)]
pub(super) struct Sources {
    files: HashMap<String, Option<Vec<String>>>,
}

impl Sources {
    fn lines(&mut self, file: &str) -> Option<&[String]> {
        let read = || {
            let small = std::fs::metadata(file).ok().is_some_and(|data| data.is_file() && data.len() <= MOST_BYTES);
            let text = std::fs::read_to_string(Path::new(file)).ok().filter(|_| small)?;
            Some(text.lines().map(str::to_owned).collect())
        };
        self.files.entry(file.to_owned()).or_insert_with(read).as_deref()
    }

    /// The text of a line.
    pub(super) fn line(&mut self, frame: &Frame) -> Option<String> {
        self.lines(&frame.file)?.get(frame.line.checked_sub(1)?).cloned()
    }

    /// Where the function of a line is defined, and its parameters.
    fn definition(&mut self, frame: &Frame) -> Option<(usize, Vec<Parameter>)> {
        let function = frame.function.as_deref()?.rsplit('.').next()?.to_owned();
        let lines = self.lines(&frame.file)?;
        let before = lines.get(..frame.line.min(lines.len()))?;
        let begins = |line: &&String| {
            let line = line.trim_start();
            let line = line.strip_prefix("async ").unwrap_or(line);
            line.strip_prefix("def ")
                .and_then(|rest| rest.strip_prefix(&function))
                .is_some_and(|rest| rest.starts_with(['(', '[']))
        };
        let at = before.len() - 1 - before.iter().rev().position(|line| begins(&line))?;
        Some((at + 1, parameters(&lines[at..].join("\n"))?))
    }

    /// The line where the function of `frame` is defined.
    pub(super) fn definition_of(&mut self, frame: &Frame) -> Option<Frame> {
        let (line, _) = self.definition(frame)?;
        Some(Frame { line, ..frame.clone() })
    }

    /// Which of a call stack's frames, the innermost first, is in the kernel function, and the names of its `count` array
    /// arguments: the first frame whose function has that many.
    pub(super) fn kernel(&mut self, frames: &[Frame], count: usize) -> Option<(usize, Vec<String>)> {
        let mut kernel = |(at, frame)| {
            let (_, parameters) = self.definition(frame)?;
            names(&parameters, count).map(|names| (at, names))
        };
        frames.iter().enumerate().find_map(&mut kernel)
    }
}

/// A parameter that may be given by position.
#[derive(Debug, PartialEq, Eq)]
enum Parameter {
    One(String),
    /// `*name`
    Rest(String),
}

/// The names of `count` arguments.
fn names(parameters: &[Parameter], count: usize) -> Option<Vec<String>> {
    let single = |parameter: &Parameter| match parameter {
        Parameter::One(name) => Some(name.clone()),
        Parameter::Rest(_) => None,
    };
    let all: Vec<String> = parameters.iter().filter_map(single).collect();
    let rest = parameters.iter().find_map(|parameter| match parameter {
        Parameter::Rest(name) => Some(name),
        Parameter::One(_) => None,
    });
    if all.len() == count && count > 0 {
        return Some(all);
    }
    if let Some(rest) = rest.filter(|_| all.len() < count) {
        let more = (0..count - all.len()).map(|at| format!("{rest}[{at}]"));
        return Some(all.into_iter().chain(more).collect());
    }
    // Others may be bound beforehand, with functools.partial.
    let of_memory: Vec<String> = (all.iter())
        .filter(|name| ["ref", "refs", "sem", "sems"].contains(&name.rsplit('_').next().unwrap_or(name)))
        .cloned()
        .collect();
    (of_memory.len() == count && count > 0).then_some(of_memory)
}

/// The parameters of the function that `text` begins with, but those that can be given by name alone.
fn parameters(text: &str) -> Option<Vec<Parameter>> {
    let text = text.split_once("def ")?.1;
    let list = &text[text.find('(')? + 1..];
    let (mut depth, mut quote, mut comment) = (0_usize, None, false);
    let (mut parts, mut part) = (vec![], String::new());
    for c in list.chars() {
        match (c, quote) {
            ('\n', _) if comment => comment = false,
            _ if comment => {}
            (c, Some(open)) => {
                if c == open {
                    quote = None;
                }
            }
            ('#', None) => comment = true,
            ('"' | '\'', None) => quote = Some(c),
            (',', None) if depth == 0 => parts.push(std::mem::take(&mut part)),
            (')', None) if depth == 0 => {
                parts.push(part);
                let mut found = vec![];
                for part in parts.iter().map(|part| part.split([':', '=']).next().unwrap_or_default().trim()) {
                    match part {
                        "" | "/" => {}
                        "*" => break,
                        _ if part.starts_with("**") => break,
                        _ => match part.strip_prefix('*') {
                            Some(rest) => {
                                found.push(Parameter::Rest(rest.trim().to_owned()));
                                break;
                            }
                            None => found.push(Parameter::One(part.to_owned())),
                        },
                    }
                }
                return Some(found);
            }
            (c, None) => {
                depth = match c {
                    '(' | '[' | '{' => depth + 1,
                    ')' | ']' | '}' => depth.saturating_sub(1),
                    _ => depth,
                };
                part.push(c);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_named_as_in_the_source() {
        let named = |text: &str, count| names(&parameters(text).unwrap(), count).map(|names| names.join(" "));
        let long = "def kernel(  # a comment, with (brackets\n    x_ref: Ref[int, 'a, b'],  # [m, k]\n    o_ref=None,\n    *, n):\n  pass";
        for (text, count, expected) in [
            ("def k(x_ref, o_ref): pass", 2, Some("x_ref o_ref")),
            ("def k(x_ref, o_ref): pass", 3, None),
            ("def k(x_ref, *refs, n=1): pass", 3, Some("x_ref refs[0] refs[1]")),
            (long, 2, Some("x_ref o_ref")),
            ("def k(n, x_ref, sem, o_ref, block=(8, 128)): pass", 3, Some("x_ref sem o_ref")),
            ("def k(): pass", 0, None),
        ] {
            assert_eq!(named(text, count).as_deref(), expected, "{text}");
        }
        assert_eq!(parameters("def k(x"), None);
    }

    #[test]
    fn the_kernel_is_the_frame_whose_function_takes_its_arguments() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("k.py");
        std::fs::write(
            &file,
            "def helper(ref):\n    return ref[...]\n\ndef kn(x_ref, o_ref):\n    o_ref[...] = helper(x_ref)\n",
        )
        .unwrap();
        let frame =
            |line, function: &str| Frame { file: file.display().to_string(), line, function: Some(function.into()) };
        let frames = [frame(2, "helper"), frame(5, "f.<locals>.kn"), frame(99, "f")];
        let mut sources = Sources::default();
        assert_eq!(sources.kernel(&frames, 2), Some((1, vec!["x_ref".into(), "o_ref".into()])));
        assert_eq!(sources.kernel(&frames, 3), None);
        assert_eq!(sources.definition_of(&frames[1]), Some(frame(4, "f.<locals>.kn")));
        assert_eq!(sources.line(&frames[0]).as_deref(), Some("    return ref[...]"));
        assert_eq!(sources.line(&frames[2]), None);
    }
}
