//! Random bits.

use super::{Builder, Tensor, emit::ensure};
use crate::{element::Element, error::Result, shape::TensorType};

impl<'c, 'a> Builder<'c, 'a> {
    /// Random bits of an integer type from a `u64[2]` key and counter, by Threefry 2x32 (20 rounds): the new state,
    /// and the bits. Equal states give equal bits.
    pub fn rng_bit_generator(
        &self,
        state: Tensor<'c, 'a>,
        bits: TensorType,
    ) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
        let op = "rng_bit_generator";
        let ty = state.ty();
        ensure(ty == TensorType::new(Element::U64, &[2]), op, || format!("the state is {ty} and must be u64[2]"))?;
        ensure(bits.element.is_integer(), op, || format!("draws integers, not {bits}"))?;
        let attributes = [("rng_algorithm", self.parse("#stablehlo<rng_algorithm THREE_FRY>")?)];
        let results = self.emit_all(op, &[state], &attributes, &[ty, bits], Vec::new())?;
        Ok((results[0], results[1]))
    }
}
