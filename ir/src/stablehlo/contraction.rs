//! `dot_general`.

use super::{
    Builder, Tensor,
    emit::{ensure, ensure_dims, list},
};
use crate::{element::Element, error::Result, shape::TensorType};

/// The dimensions of the left and of the right operand that a [`Builder::dot_general`] pairs.
#[derive(Clone, Copy, Debug, Default)]
pub struct DotDims<'d> {
    /// Dimensions that both operands and the result have.
    pub batch: (&'d [usize], &'d [usize]),
    /// Dimensions that are multiplied and summed over.
    pub contract: (&'d [usize], &'d [usize]),
}

/// How exactly a plugin computes products of f32 operands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// As fast as it can: one bf16 pass on a TPU.
    #[default]
    Default,
    /// Three bf16 passes on a TPU.
    High,
    /// True f32 products.
    Highest,
}

impl<'c, 'a> Builder<'c, 'a> {
    /// Multiplies and sums over the contracted dimensions. The result has the batch dimensions, then the free ones of
    /// `lhs`, then the free ones of `rhs`; its type `element` is also the accumulator's.
    pub fn dot_general(
        &self,
        lhs: Tensor<'c, 'a>,
        rhs: Tensor<'c, 'a>,
        dims: DotDims,
        element: Element,
    ) -> Result<Tensor<'c, 'a>> {
        self.dot_general_with(lhs, rhs, dims, element, Precision::Default)
    }

    /// [`dot_general`](Self::dot_general) with a chosen [`Precision`].
    pub fn dot_general_with(
        &self,
        lhs: Tensor<'c, 'a>,
        rhs: Tensor<'c, 'a>,
        dims: DotDims,
        element: Element,
        precision: Precision,
    ) -> Result<Tensor<'c, 'a>> {
        let op = "dot_general";
        let (left, right) = (lhs.ty(), rhs.ty());
        let same_kind = |a: Element, b: Element| (a.is_float() && b.is_float()) || (a.is_integer() && b.is_integer());
        ensure(left.element == right.element && same_kind(left.element, element), op, || {
            format!("lhs {left} and rhs {right} cannot be multiplied into {element}")
        })?;
        for (operand, ty, batch, contract) in
            [("lhs", &left, dims.batch.0, dims.contract.0), ("rhs", &right, dims.batch.1, dims.contract.1)]
        {
            let used = [batch, contract].concat();
            ensure_dims(op, &format!("{operand} {ty} batch and contract"), &used, ty.rank())?;
        }
        for (what, (of_left, of_right)) in [("batch", dims.batch), ("contracting", dims.contract)] {
            ensure(of_left.len() == of_right.len(), op, || {
                format!("{what} dims do not pair: lhs {of_left:?}, rhs {of_right:?}")
            })?;
            for (&l, &r) in of_left.iter().zip(of_right) {
                let (size, other) = (left.dims[l], right.dims[r]);
                ensure(size == other, op, || {
                    format!("{what} sizes differ: lhs {left} dim {l} = {size}, rhs {right} dim {r} = {other}")
                })?;
            }
        }
        let free = |ty: &TensorType, batch: &[usize], contract: &[usize]| {
            let free = (0..ty.rank()).filter(|dim| !batch.contains(dim) && !contract.contains(dim));
            free.map(|dim| ty.dims[dim]).collect::<Vec<_>>()
        };
        let result: Vec<usize> = (dims.batch.0.iter().map(|&dim| left.dims[dim]))
            .chain(free(&left, dims.batch.0, dims.contract.0))
            .chain(free(&right, dims.batch.1, dims.contract.1))
            .collect();
        let numbers = format!(
            "#stablehlo.dot<lhs_batching_dimensions = {}, rhs_batching_dimensions = {}, \
             lhs_contracting_dimensions = {}, rhs_contracting_dimensions = {}>",
            list(dims.batch.0),
            list(dims.batch.1),
            list(dims.contract.0),
            list(dims.contract.1)
        );
        let mut attributes = vec![("dot_dimension_numbers", self.parse(&numbers)?)];
        let name = match precision {
            Precision::Default => None,
            Precision::High => Some("HIGH"),
            Precision::Highest => Some("HIGHEST"),
        };
        if let Some(name) = name {
            let precision = format!("[#stablehlo<precision {name}>, #stablehlo<precision {name}>]");
            attributes.push(("precision_config", self.parse(&precision)?));
        }
        self.emit(op, &[lhs, rhs], &attributes, TensorType::new(element, &result))
    }
}
