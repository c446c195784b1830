//! Where an op comes from, in one line.
//!
//! JAX's locations nest: a name around a call stack of named source lines, `callsite("kernel"("k.py":7:0) at ...)`.

use melior::ir::{
    BlockLike, Location,
    operation::{OperationLike, OperationRef},
};

use super::signature::{first_block, identifier, op_name};

/// A source line of a call stack.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Frame {
    /// The file as the module names it.
    pub file: String,
    /// The line, counted from 1.
    pub line: usize,
    /// The function that the line is in, where the module says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub function: Option<String>,
}

/// Where an op comes from: source lines, the innermost first, and what it was there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) frames: Vec<Frame>,
    /// JAX's primitive (`get`), or any other names.
    labels: Vec<String>,
}

impl Place {
    pub(crate) fn of(location: Location) -> Self {
        let (mut location, mut labels) = (location, vec![]);
        while location.is_name() {
            labels.push(identifier(location.name_value()));
            location = location.name_child_location();
        }
        // Around the call stack JAX puts `get:` and then `scopes/get`.
        let primitive = labels.first().and_then(|label| label.strip_suffix(':'));
        // JAX lowers equal ops once, and inlines what it made: `scopes/get/get` around the first one's stack, called by this
        // one's.
        let twice = primitive.map(|primitive| format!("{primitive}/{primitive}"));
        if location.is_call_site()
            && twice.is_some_and(|twice| labels.get(1).is_some_and(|label| label.ends_with(&twice)))
        {
            location = location.call_site_caller();
        }
        if location.is_file_line_col_range() {
            // A stack of one line is no call, but the function's name around the line.
            let function =
                primitive.and_then(|primitive| labels[1..].iter().rfind(|label| !label.ends_with(primitive)));
            let function = function.cloned();
            let labels = primitive.map_or_else(|| labels.clone(), |primitive| vec![primitive.to_owned()]);
            return Self { frames: vec![frame(location, function)], labels };
        }
        if location.is_fused() {
            let fused = (0..location.fused_num_locations()).map(|index| Self::of(location.fused_location(index)));
            let known = fused.into_iter().find(|place| !place.frames.is_empty()).unwrap_or_default();
            return Self { labels: labels.into_iter().chain(known.labels).collect(), ..known };
        }
        let mut frames = vec![];
        stack(location, &mut frames);
        let labels = primitive.map_or_else(|| labels.clone(), |primitive| vec![primitive.to_owned()]);
        Self { frames, labels }
    }

    /// That of an op. One that has no source line (JAX's `sync_copy` loses its DMA's) has that of the op around it.
    pub(crate) fn of_op(op: OperationRef) -> Self {
        let own = Self::of(op.location());
        if !own.frames.is_empty() {
            return own;
        }
        let around = std::iter::successors(op.parent_operation(), |op| op.parent_operation());
        let mut around = around.take_while(|op| op_name(*op) != "func.func").map(|op| Self::of(op.location()).frames);
        let frames = around.find(|frames| !frames.is_empty()).unwrap_or_default();
        Self { frames, ..own }
    }

    /// `file:line in function (primitive)`; `None` where nothing is known.
    pub(crate) fn describe(&self) -> Option<String> {
        let Some(Frame { file, line, function }) = self.frames.first() else {
            return (!self.labels.is_empty()).then(|| self.labels.join(" "));
        };
        let function = function.as_ref().map_or(String::new(), |function| format!(" in {function}"));
        let labels: String = self.labels.iter().rev().map(|label| format!(" ({label})")).collect();
        Some(format!("{file}:{line}{function}{labels}"))
    }
}

fn frame(location: Location, function: Option<String>) -> Frame {
    let file = identifier(location.file_line_col_range_filename());
    Frame { file, line: location.file_line_col_range_start_line(), function }
}

/// The lines of a call stack, `callsite("f"("k.py":7:0) at ...)`.
fn stack(location: Location, frames: &mut Vec<Frame>) {
    if location.is_call_site() {
        stack(location.call_site_callee(), frames);
        stack(location.call_site_caller(), frames);
    } else if location.is_file_line_col_range() {
        frames.push(frame(location, None));
    } else if location.is_fused() {
        let fused = (0..location.fused_num_locations()).map(|index| Place::of(location.fused_location(index)).frames);
        frames.extend(fused.into_iter().find(|frames| !frames.is_empty()).unwrap_or_default());
    } else if location.is_name() {
        let child = location.name_child_location();
        match child.is_file_line_col_range() {
            true => frames.push(frame(child, Some(identifier(location.name_value())))),
            false => stack(child, frames),
        }
    }
}

/// The place of a function; of its first op that has one where the function itself has none, as in JAX's modules.
pub(crate) fn place_of_function(function: OperationRef) -> Place {
    let inside = || {
        let first = first_block(function)?.first_operation();
        let places = std::iter::successors(first, |op| op.next_in_block()).map(|op| Place::of(op.location()));
        places.into_iter().find(|place| place.describe().is_some())
    };
    let own = Place::of(function.location());
    if own.describe().is_some() { own } else { inside().unwrap_or_default() }
}

/// [`Place::describe`] of [`place_of_function`], or `unknown`.
pub(crate) fn describe_function(function: OperationRef) -> String {
    place_of_function(function).describe().unwrap_or_else(|| "unknown".into())
}
