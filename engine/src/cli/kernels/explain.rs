//! What a fault or a wrong value comes from, for whoever wrote the kernel: the source line, the buffer and its past, and the
//! command that shows it again.

use std::fmt::Write as _;

use pagoda_ir::mosaic::{Argument, Frame, Role, Signature};
use pagoda_ir::tile_machine::{DmaOrder, Fault, FaultKind, Past};
use serde::Serialize;

use super::sources::Sources;

/// Lines of a call stack that are shown.
const FRAMES: usize = 4;
/// Events of an element that are shown.
const EVENTS: usize = 8;

/// A source line, with its text where it could be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Line {
    #[serde(flatten)]
    pub(super) frame: Frame,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) text: Option<String>,
}

/// More about a fault, or about a value that is not as expected.
#[derive(Debug, Default, Serialize)]
pub(super) struct Explanation {
    /// The lines that led to it, the innermost first, as far as the kernel function.
    pub(super) lines: Vec<Line>,
    /// Where the kernel is called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) call: Option<Line>,
    /// What the buffer is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) buffer: Option<String>,
    /// What happened to the element before, the last first.
    pub(super) history: Vec<Past>,
    /// The command that shows it again.
    pub(super) again: String,
}

/// What is known of a kernel beside its program.
pub(super) struct Known<'k> {
    /// With outputs marked, and the arguments under the names that are shown.
    pub(super) signature: &'k Signature,
    /// The kernel function's first line that is known, and those that called it.
    pub(super) frames: &'k [Frame],
    /// The call of the kernel, as far as the module around it says.
    pub(super) call: &'k [Frame],
}

impl Explanation {
    /// Explains a fault whose element has this past.
    pub(super) fn of_fault(fault: &Fault, known: &Known, history: Vec<Past>, again: String) -> Self {
        let mut sources = Sources::default();
        let mut frames = fault.frames.clone();
        if fault.op == "pipeline" && fault.frames == known.frames && !known.call.is_empty() {
            // Not even the window's transform is known.
            frames = known.call[..1].to_vec();
        }
        if fault.op == "pipeline" && matches!(fault.kind, FaultKind::OutputNeverWritten | FaultKind::MemoryExceeded) {
            // No op is at fault, and no window: the kernel is.
            frames = known.kernel(&mut sources).into_iter().collect();
        }
        let buffer = fault.buffer.as_ref().map(|name| known.describe(name));
        Self::new(sources, known, &frames, buffer, history, again)
    }

    /// Explains a value of output `name` whose element has this past: who wrote it last.
    pub(super) fn of_value(name: &str, known: &Known, history: Vec<Past>, again: String) -> Self {
        let writer = history.iter().find(|past| !past.frames.is_empty());
        let frames = writer.map(|past| past.frames.clone()).unwrap_or_default();
        Self::new(Sources::default(), known, &frames, Some(known.describe(name)), history, again)
    }

    fn new(
        mut sources: Sources,
        known: &Known,
        frames: &[Frame],
        buffer: Option<String>,
        history: Vec<Past>,
        again: String,
    ) -> Self {
        let count = known.signature.arguments.len();
        // What called the kernel is shown once, as the call.
        let kernel = sources.kernel(frames, count).map(|(at, _)| at);
        let kernel = kernel.or_else(|| frames.iter().position(|frame| is_named(frame, &known.signature.name)));
        let shown = kernel.map_or(frames.len(), |at| at + 1).min(FRAMES);
        let mut line = |frame: &Frame| Line { frame: frame.clone(), text: sources.line(frame) };
        let lines = frames[..shown].iter().map(&mut line).collect();
        let call = known.call.first().filter(|call| frames.first() != Some(call)).map(&mut line);
        Self { lines, call, buffer, history, again }
    }

    /// The lines under the error.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        let mut source = |lead: &str, Line { frame: Frame { file, line, function }, text: source }: &Line| {
            let function = function.as_ref().map_or(String::new(), |function| format!(" in {function}"));
            let _ = writeln!(text, "  {lead:<9} {file}:{line}{function}");
            if let Some(source) = source {
                let _ = writeln!(text, "  {line:>9} | {}", source.trim_end());
            }
        };
        for (at, line) in self.lines.iter().enumerate() {
            source(if at == 0 { "-->" } else { "called by" }, line);
        }
        if let Some(call) = &self.call {
            source(if self.lines.is_empty() { "-->" } else { "kernel of" }, call);
        }
        if let Some(buffer) = &self.buffer {
            let _ = writeln!(text, "  {:<9} {buffer}", "buffer");
        }
        if self.buffer.is_some() && self.history.is_empty() {
            let _ = writeln!(text, "  {:<9} nothing wrote it", "before");
        }
        for (at, past) in self.history.iter().take(EVENTS).enumerate() {
            let _ = writeln!(text, "  {:<9} {past}", if at == 0 { "before" } else { "" });
        }
        let _ = writeln!(text, "  {:<9} {}", "again", self.again);
        text.truncate(text.trim_end().len());
        text
    }
}

fn is_named(frame: &Frame, name: &str) -> bool {
    frame.function.as_deref().is_some_and(|function| function.rsplit('.').next() == Some(name))
}

impl Known<'_> {
    /// The line where the kernel function is defined, or the first of it that is known.
    fn kernel(&self, sources: &mut Sources) -> Option<Frame> {
        let at = sources.kernel(self.frames, self.signature.arguments.len()).map(|(at, _)| at);
        let at = at.or_else(|| self.frames.iter().position(|frame| is_named(frame, &self.signature.name)));
        let frame = self.frames.get(at.unwrap_or(0))?;
        Some(sources.definition_of(frame).unwrap_or_else(|| frame.clone()))
    }

    /// `x_ref: f32[8,128] in vmem, block of input 0`.
    fn describe(&self, name: &str) -> String {
        let mut counts = [0_usize; 3];
        for argument in &self.signature.arguments {
            let Argument { role, element, dims, space, window, .. } = argument;
            let (kind, counted) = match role {
                Role::Prefetch | Role::Input => ("input", 0),
                Role::Output => ("output", 1),
                Role::Scratch => ("scratch", 2),
            };
            let number = counts[counted];
            counts[counted] += 1;
            if argument.name == name {
                let block = if window.is_some() { "block of " } else { "" };
                return format!("`{name}`: {element}{dims:?} in {}, {block}{kind} {number}", space.mnemonic());
            }
        }
        format!("`{name}`")
    }
}

/// The command of this process with the one order of DMAs.
pub(super) fn again(order: DmaOrder) -> String {
    let order = match order {
        DmaOrder::Early => "early".to_owned(),
        DmaOrder::Late => "late".to_owned(),
        DmaOrder::Random(seed) => format!("random:{seed}"),
    };
    let mut words = vec!["pagoda".to_owned()];
    let mut arguments = std::env::args().skip(1);
    while let Some(word) = arguments.next() {
        match word.as_str() {
            "--dma" => drop(arguments.next()),
            "--json" => {}
            _ if word.starts_with("--dma=") => {}
            _ => words.push(word),
        }
    }
    words.extend(["--dma".to_owned(), order]);
    shlex::try_join(words.iter().map(String::as_str)).unwrap_or_else(|_| words.join(" "))
}
