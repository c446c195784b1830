//! Kernels in Rust, as custom calls of the CPU plugin: four matmuls and one attention a layer, and nothing between them.
//!
//! Weights are of the activations' type, or in bf16 beside activations in f32.
//!
//! Experts are two grouped matmuls in the place of two. The matmuls that the call does not know are XLA's own: of quantised
//! weights, and the gated one of a model with biases in its MLP or experts.

use pagoda_ir::stablehlo::{BackendConfig, Builder, CustomCall, Tensor};
use pagoda_ir::{Result, TensorType};
use pagoda_kernels::matmul::native::{Around, Norm};
use pagoda_kernels::{grouped_matmul, matmul, rpa};

use super::stablehlo::Stablehlo;
use super::{Batch, Grouped, Linear, Lowering, OfLayer, Orientation, Rows};
use crate::llama::step::expert_activation;
use crate::model::ModelSpec;
use crate::model::spec::Mlp;
use crate::native::TAKE;

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
    let gated = linear.activation.is_gated();
    // Biases are added as a residual is, which has the type of `x`.
    let adds = linear.bias.is_none() || !gated && linear.result == x.element();
    linear.layer.is_none() && linear.scale.is_none() && adds
}

/// Whether every product of the model is one of the calls.
pub(super) fn takes_all(config: &ModelSpec) -> bool {
    let of_mlp = match &config.mlp {
        Mlp::Gated(mlp) => !mlp.bias,
        Mlp::Experts(experts) => grouped_matmul::native::takes(expert_activation(experts.gate), experts.bias),
    };
    config.quantization.is_none() && of_mlp
}

impl<'c> Lowering<'c> for Native {
    fn orientation(&self) -> Orientation {
        Orientation::FeatureMajor
    }

    /// The call looks the angles up itself.
    fn batch<'a>(&self, _: &Builder<'c, 'a>, rows: Rows<'c, 'a>, rotary: &[Tensor<'c, 'a>]) -> Result<Batch<'c, 'a>> {
        Ok(Batch { rows, angles: rotary.to_vec() })
    }

    fn take<'a>(&self, b: &Builder<'c, 'a>, table: Tensor<'c, 'a>, ids: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let result = TensorType::new(table.element(), &[ids.dims()[0], table.dims()[1]]);
        let call = CustomCall { backend_config: BackendConfig::Dictionary(Vec::new()), ..CustomCall::default() };
        Ok(b.custom_call(TAKE, &[table, ids], &[result], call)?[0])
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
        let norm = linear.norm.map(|norm| Norm {
            weight: norm.weight,
            epsilon: norm.how.epsilon,
            plus_one: norm.how.plus_one,
        });
        let around = Around { norm, activation: linear.activation, residual };
        matmul::native::emit(b, linear.weight, x, &around, linear.result)
    }

    fn by_row<'a>(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, linear: &Linear<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        match takes(x, linear) {
            true => self.orientation().turn(b, self.linear(b, x, linear)?),
            false => self.plain.by_row(b, x, linear),
        }
    }

    fn grouped<'a>(
        &self,
        b: &Builder<'c, 'a>,
        x: Tensor<'c, 'a>,
        sizes: Tensor<'c, 'a>,
        grouped: &Grouped<'c, 'a>,
    ) -> Result<Tensor<'c, 'a>> {
        let takes = grouped_matmul::native::takes(grouped.activation, grouped.bias.is_some());
        match takes && grouped.layer.is_none() {
            true => grouped_matmul::native::emit(b, grouped.weight, x, sizes, grouped.activation, grouped.result),
            false => self.plain.grouped(b, x, sizes, grouped),
        }
    }

    fn attend<'a>(
        &self,
        b: &Builder<'c, 'a>,
        qkv: Tensor<'c, 'a>,
        batch: &Batch<'c, 'a>,
        layer: OfLayer<'c, 'a>,
        kv: Tensor<'c, 'a>,
    ) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
        let problems = self.plain.attention();
        let Rows { kv_slots, kv_lens, page_indices, cu_q_lens, num_seqs, .. } = batch.rows;
        let results = layer.kind.select(b, problems.len(), |b, kind| {
            let operands = rpa::native::Operands {
                qkv,
                kv_pages: kv,
                kv_lens,
                page_indices,
                cu_q_lens,
                num_seqs,
                first_page: layer.first_page,
                slots: kv_slots,
                rotary: self.plain.angles(batch, kind),
                sinks: layer.sinks,
                scales: self.plain.scales(b)?,
            };
            let (attended, kv) = rpa::native::emit(b, &problems[kind], &operands)?;
            Ok(vec![attended, kv])
        })?;
        Ok((results[0], results[1]))
    }
}
