//! Where an op comes from, in one line.
//!
//! JAX's locations nest: a name around a call stack of named source lines, `callsite("kernel"("k.py":7:0) at ...)`.

use melior::ir::{
    BlockLike, Location, RegionLike,
    operation::{OperationLike, OperationRef},
};

use super::signature::identifier;

/// `file:line (name)`: the innermost source line, with the names around it; `unknown` where there is neither.
pub(crate) fn describe(location: Location) -> String {
    known(location).unwrap_or_else(|| "unknown".into())
}

/// [`describe`] of a function; of its first op that has a place where the function itself has none, as in JAX's modules.
pub(crate) fn describe_function(function: OperationRef) -> String {
    let inside = || {
        let first = function.region(0).ok()?.first_block()?.first_operation();
        std::iter::successors(first, |op| op.next_in_block()).find_map(|op| known(op.location()))
    };
    known(function.location()).or_else(inside).unwrap_or_else(|| "unknown".into())
}

fn known(location: Location) -> Option<String> {
    if location.is_file_line_col_range() {
        let file = identifier(location.file_line_col_range_filename());
        return Some(format!("{file}:{}", location.file_line_col_range_start_line()));
    }
    if location.is_name() {
        let name = identifier(location.name_value());
        return Some(match known(location.name_child_location()) {
            Some(child) => format!("{child} ({name})"),
            None => name,
        });
    }
    if location.is_call_site() {
        return known(location.call_site_callee()).or_else(|| known(location.call_site_caller()));
    }
    if location.is_fused() {
        return (0..location.fused_num_locations()).find_map(|index| known(location.fused_location(index)));
    }
    None
}
