//! Plain StableHLO: what any plugin compiles, and what the other lowerings emit around their kernels.

use pagoda_ir::stablehlo::{Builder, Tensor};
use pagoda_ir::{Element, Result};
use pagoda_kernels::{matmul, rpa};

use super::{Batch, Linear, Lowering, Orientation, Rows, matmul_problem};
use crate::llama::rotary;

/// The lowering.
pub(super) struct Stablehlo {
    attention: rpa::Problem,
    orientation: Orientation,
}

impl Stablehlo {
    pub(super) fn new(attention: rpa::Problem, orientation: Orientation) -> Self {
        Self { attention, orientation }
    }

    /// The program's attention.
    pub(super) fn attention(&self) -> &rpa::Problem {
        &self.attention
    }

    /// `count` heads of the stacked projection from head `first` on: `[rows, count, head_dim]`.
    fn heads<'c, 'a>(
        &self,
        b: &Builder<'c, 'a>,
        qkv: Tensor<'c, 'a>,
        first: usize,
        count: usize,
    ) -> Result<Tensor<'c, 'a>> {
        let dim = self.attention.head_dim;
        let part = b.slice_in_dim(qkv, first * dim, (first + count) * dim, self.orientation.features())?;
        b.reshape(self.orientation.turn(b, part)?, &[self.attention.tokens, count, dim])
    }

    /// Rotates queries and keys and writes keys and values into the layer's pages: what an attention kernel takes.
    pub(super) fn write_kv<'c, 'a>(
        &self,
        b: &Builder<'c, 'a>,
        qkv: Tensor<'c, 'a>,
        batch: &Batch<'c, 'a>,
        layer: usize,
        kv: Tensor<'c, 'a>,
    ) -> Result<rpa::stablehlo::Operands<'c, 'a>> {
        let rpa::Spec { q_heads, kv_heads, pages, .. } = **self.attention();
        let Rows { kv_slots, kv_lens, page_indices, cu_q_lens, num_seqs, .. } = batch.rows;
        let q = rotary::rotate(b, self.heads(b, qkv, 0, q_heads)?, batch.angles)?;
        let k = rotary::rotate(b, self.heads(b, qkv, q_heads, kv_heads)?, batch.angles)?;
        let v = self.heads(b, qkv, q_heads + kv_heads, kv_heads)?;
        let first_page = Some(b.scalar(Element::I32, (layer * pages) as f64)?);
        let kv_pages = rpa::kv_write::emit(b, &self.attention, kv, k, v, kv_slots, first_page)?;
        Ok(rpa::stablehlo::Operands { q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, first_page })
    }

    /// Activations of attention's output `[rows, q_heads, head_dim]`.
    pub(super) fn join_heads<'c, 'a>(&self, b: &Builder<'c, 'a>, attended: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let rpa::Spec { tokens, q_heads, head_dim, .. } = *self.attention;
        self.orientation.turn(b, b.reshape(attended, &[tokens, q_heads * head_dim])?)
    }
}

impl<'c> Lowering<'c> for Stablehlo {
    fn orientation(&self) -> Orientation {
        self.orientation
    }

    fn batch<'a>(&self, b: &Builder<'c, 'a>, rows: Rows<'c, 'a>, rotary: Tensor<'c, 'a>) -> Result<Batch<'c, 'a>> {
        Ok(Batch { rows, angles: b.take(rotary, rows.positions, 0)? })
    }

    fn linear<'a>(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, linear: &Linear<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let x = linear.norm.map_or(Ok(x), |norm| self.norm(b, x, &norm))?;
        product(b, self.orientation, x, linear)
    }

    /// Turns `x` in place of the result. Besides being smaller, it avoids a bug of XLA's CPU compiler: a transpose right
    /// behind a product of bf16 in f32 is merged with it into one that fails when it runs ("Unsupported element type for
    /// DotThunk::Execute").
    fn by_row<'a>(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, linear: &Linear<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let x = linear.norm.map_or(Ok(x), |norm| self.norm(b, x, &norm))?;
        product(b, Orientation::RowMajor, self.orientation.turn(b, x)?, linear)
    }

    fn attend<'a>(
        &self,
        b: &Builder<'c, 'a>,
        qkv: Tensor<'c, 'a>,
        batch: &Batch<'c, 'a>,
        layer: usize,
        kv: Tensor<'c, 'a>,
    ) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
        let operands = self.write_kv(b, qkv, batch, layer, kv)?;
        let attended = rpa::stablehlo::emit(b, &self.attention, &operands)?;
        Ok((self.join_heads(b, attended)?, operands.kv_pages))
    }
}

/// The projection of `x`, in either orientation, norm apart.
fn product<'c, 'a>(
    b: &Builder<'c, 'a>,
    orientation: Orientation,
    x: Tensor<'c, 'a>,
    linear: &Linear<'c, 'a>,
) -> Result<Tensor<'c, 'a>> {
    let problem = matmul_problem(orientation, x, linear)?;
    let Linear { weight: w, bias, residual, .. } = *linear;
    matmul::stablehlo::emit(b, &problem, &matmul::stablehlo::Operands { x, w, bias, residual })
}
