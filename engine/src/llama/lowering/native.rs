//! Kernels in Rust, as custom calls of the CPU plugin: four matmuls and one attention a layer, and nothing between them.
//!
//! A matmul of more rows than the call takes (prefill) is XLA's own, and so is the gated one of a model with biases in
//! its MLP, which the call does not know.

use pagoda_ir::Result;
use pagoda_ir::stablehlo::{Builder, Tensor};
use pagoda_kernels::matmul::native::{Around, MAX_COLUMNS, Norm};
use pagoda_kernels::{matmul, rpa};

use super::stablehlo::Stablehlo;
use super::{Activation, Batch, Linear, Lowering, Orientation, Rows};

/// The lowering. Activations are feature-major, as the calls take them.
pub(super) struct Native {
    plain: Stablehlo,
}

impl Native {
    pub(super) fn new(plain: Stablehlo) -> Self {
        Self { plain }
    }
}

/// Whether the call takes a projection of `x`.
fn takes(x: Tensor<'_, '_>, linear: &Linear<'_, '_>) -> bool {
    let gated = linear.activation == Activation::SiluGate;
    x.dims()[1] <= MAX_COLUMNS && linear.layer.is_none() && !(gated && linear.bias.is_some())
}

impl<'c> Lowering<'c> for Native {
    fn orientation(&self) -> Orientation {
        Orientation::FeatureMajor
    }

    /// The call looks the angles up itself.
    fn batch<'a>(&self, _: &Builder<'c, 'a>, rows: Rows<'c, 'a>, rotary: Tensor<'c, 'a>) -> Result<Batch<'c, 'a>> {
        Ok(Batch { rows, angles: rotary })
    }

    fn linear<'a>(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, linear: &Linear<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        if !takes(x, linear) {
            return self.plain.linear(b, x, linear);
        }
        let rows = x.dims()[1];
        // Biases go in as a residual, or with the one that there is.
        let residual = match (linear.bias, linear.residual) {
            (None, residual) => residual,
            (Some(bias), residual) => {
                let bias = b.convert(bias, linear.result)?;
                let bias = b.broadcast_in_dim(bias, &[linear.weight.dims()[0], rows], &[0])?;
                Some(residual.map_or(Ok(bias), |residual| b.add(residual, bias))?)
            }
        };
        let norm = linear.norm.map(|norm| Norm { weight: norm.weight, epsilon: norm.epsilon });
        let around = Around { norm, activation: linear.activation, residual };
        matmul::native::emit(b, linear.weight, x, &around, linear.result)
    }

    fn by_row<'a>(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, linear: &Linear<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        match takes(x, linear) {
            true => self.orientation().turn(b, self.linear(b, x, linear)?),
            false => self.plain.by_row(b, x, linear),
        }
    }

    fn attend<'a>(
        &self,
        b: &Builder<'c, 'a>,
        qkv: Tensor<'c, 'a>,
        batch: &Batch<'c, 'a>,
        first_page: Tensor<'c, 'a>,
        kv: Tensor<'c, 'a>,
    ) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
        let problem = self.plain.attention();
        let Rows { kv_slots, kv_lens, page_indices, cu_q_lens, num_seqs, .. } = batch.rows;
        let operands = rpa::native::Operands {
            qkv,
            kv_pages: kv,
            kv_lens,
            page_indices,
            cu_q_lens,
            num_seqs,
            first_page,
            slots: kv_slots,
            rotary: batch.angles,
            sinks: None,
            scales: None,
        };
        rpa::native::emit(b, problem, &operands)
    }
}
