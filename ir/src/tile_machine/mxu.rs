//! Matrix units that a kernel drives itself (`tpu.matmul_push_rhs`, `matmul_acc_lhs`, `matmul_pop`): a right side waits in a
//! staging register, is loaded when the first rows are multiplied with it, and sums stay in the unit until they are taken.
//!
//! A sum is known by the address that it was added up at; that two of them may overlap is not modelled. One that is not there is
//! zero: a kernel must leave none, and taking one leaves zeros.
//! Source: JAX's `matmul_push_rhs` and its neighbours, whose docs say what a kernel must not do.

use std::collections::BTreeMap;

use super::{
    exec::{Executor, Step},
    fault::FaultKind,
    observer::{MatmulEvent, Observer},
    program::Use,
    tile::{self, MatmulShape, Scalar, Strides, Tile},
};
use crate::element::Element;

/// A right side `[depth, columns]`, or turned.
#[derive(Clone, Debug)]
struct Right {
    tile: Tile,
    element: Element,
    /// Depth and columns.
    sizes: [usize; 2],
    strides: Strides,
}

/// What a matrix unit holds.
#[derive(Debug, Default)]
pub(super) struct Mxu {
    staged: BTreeMap<usize, Right>,
    loaded: Option<Right>,
    /// By address: sums, and their rows and columns.
    sums: BTreeMap<usize, (Tile, [usize; 2])>,
}

/// What an op does to the matrix unit `unit`.
#[derive(Clone, Copy, Debug)]
pub(super) enum MxuOp {
    /// Operand: a right side of these sizes.
    Push { unit: usize, register: usize, sizes: [usize; 2], element: Element, turned: bool },
    /// Operand: rows of this depth, for the right side that is loaded, from a staging register if one is named.
    Multiply { unit: usize, address: usize, sizes: [usize; 2], element: Element, register: Option<usize> },
    /// The result is the sum of these sizes.
    Pop { unit: usize, address: usize, sizes: [usize; 2], element: Element },
}

fn is_float(sum: &Tile) -> bool {
    matches!(sum, Tile::Float(_))
}

fn zeros(element: Element, [rows, columns]: [usize; 2]) -> Tile {
    let zero = if element.is_float() { Scalar::Float(0.0) } else { Scalar::Int(0) };
    tile::splat(zero, rows * columns)
}

impl<O: Observer> Executor<'_, '_, O> {
    /// Runs an op of a matrix unit; what it gives, if it gives anything. What cannot be done is a fault whatever is ignored.
    pub(super) fn drive_mxu(&mut self, op: MxuOp, operands: &[Use], origin: u32) -> Step<Option<Tile>> {
        let misused = |this: &Self, unit: usize, what: String| {
            Err(this.fault_at(FaultKind::BrokenAssumption, origin, format!("matrix unit {unit}: {what}")))
        };
        match op {
            MxuOp::Push { unit, register, sizes: [rows, columns], element, turned } => {
                let tile = self.tile(&operands[0]);
                let staged = &mut self.mxus.entry(unit).or_default().staged;
                let (sizes, strides) = match turned {
                    false => ([rows, columns], Strides { batch: 0, row: columns, column: 1 }),
                    true => ([columns, rows], Strides { batch: 0, row: 1, column: columns }),
                };
                if staged.insert(register, Right { tile, element, sizes, strides }).is_some() {
                    return misused(self, unit, format!("staging register {register} holds what was not loaded"));
                }
                Ok(None)
            }
            MxuOp::Multiply { unit, address, sizes: [rows, depth], element, register } => {
                let lhs = self.tile(&operands[0]);
                let mxu = self.mxus.entry(unit).or_default();
                if let Some(register) = register {
                    let Some(right) = mxu.staged.remove(&register) else {
                        return misused(self, unit, format!("nothing was pushed to staging register {register}"));
                    };
                    mxu.loaded = Some(right);
                }
                let Some(right) = mxu.loaded.clone() else {
                    return misused(self, unit, "no right side was loaded".into());
                };
                let (of_sum, columns) = (if element.is_float() { Element::F32 } else { Element::I32 }, right.sizes[1]);
                if right.sizes[0] != depth || right.element.is_float() != element.is_float() {
                    let what =
                        format!("[{rows}, {depth}] {element} for a right side {:?} {}", right.sizes, right.element);
                    return misused(self, unit, what);
                }
                let sum = match mxu.sums.remove(&address) {
                    Some((sum, sizes)) if sizes == [rows, columns] && is_float(&sum) == element.is_float() => sum,
                    Some((_, sizes)) => {
                        let what = format!("[{rows}, {columns}] {of_sum} are added to {sizes:?} at address {address}");
                        return misused(self, unit, what);
                    }
                    None => zeros(of_sum, [rows, columns]),
                };
                let lhs_strides = Strides { batch: 0, row: depth, column: 1 };
                let shape = MatmulShape {
                    batch: 1,
                    m: rows,
                    n: columns,
                    k: depth,
                    lhs: lhs_strides,
                    rhs: right.strides,
                    to: of_sum,
                };
                self.counters.mxu_flops += shape.flops();
                let event = MatmulEvent {
                    batch: 1,
                    m: rows,
                    n: columns,
                    k: depth,
                    lhs: element,
                    rhs: right.element,
                    exact: false,
                };
                self.observer.matmul(&event);
                let round = [element, right.element].map(|side| side == Element::F32);
                let sum = tile::matmul(&shape, lhs, right.tile, sum, round, self.reads.is_none());
                self.mxus.entry(unit).or_default().sums.insert(address, (sum, [rows, columns]));
                Ok(None)
            }
            MxuOp::Pop { unit, address, sizes, element } => {
                match self.mxus.entry(unit).or_default().sums.remove(&address) {
                    Some((sum, of)) if of == sizes && is_float(&sum) == element.is_float() => Ok(Some(sum)),
                    Some((_, of)) => {
                        misused(self, unit, format!("{sizes:?} of {element} are taken of {of:?} at address {address}"))
                    }
                    // No kernel leaves one, and taking one leaves zeros.
                    None => Ok(Some(zeros(element, sizes))),
                }
            }
        }
    }

    /// Faults unless the kernel has taken all that it left in the matrix units.
    pub(super) fn check_mxus(&self) -> Step<()> {
        if self.machine.ignored.contains(FaultKind::BrokenAssumption) {
            return Ok(());
        }
        for (unit, mxu) in &self.mxus {
            let left = mxu.staged.keys().next().map(|register| format!("a right side in staging register {register}"));
            let left = left.or_else(|| mxu.sums.keys().next().map(|address| format!("a sum at address {address}")));
            if let Some(left) = left {
                let detail = format!("matrix unit {unit}: {left} is left at the end of the kernel");
                return Err(self.fault(FaultKind::BrokenAssumption, &self.pipeline, detail));
            }
        }
        Ok(())
    }
}
