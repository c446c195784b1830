//! Plain StableHLO: what any plugin compiles, and what the other lowerings emit around their kernels.

use pagoda_ir::Result;
use pagoda_ir::stablehlo::{Builder, Tensor};
use pagoda_kernels::matmul::Matmul;
use pagoda_kernels::rpa::{self, Rpa};
use pagoda_kernels::{Named, kernel};

use super::{Batch, Linear, Lowering, Orientation, Rows, matmul};
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

    /// Rotates queries and keys and writes keys and values into the layer's pages: the arguments of an attention kernel.
    pub(super) fn write_kv<'c, 'a>(
        &self,
        b: &Builder<'c, 'a>,
        qkv: Tensor<'c, 'a>,
        batch: &Batch<'c, 'a>,
        first_page: Tensor<'c, 'a>,
        kv: Tensor<'c, 'a>,
    ) -> Result<Named<Tensor<'c, 'a>>> {
        let rpa::Spec { q_heads, kv_heads, layers, .. } = **self.attention();
        let Rows { kv_slots, kv_lens, page_indices, cu_q_lens, num_seqs, .. } = batch.rows;
        let q = rotary::rotate(b, self.heads(b, qkv, 0, q_heads)?, batch.angles)?;
        let k = rotary::rotate(b, self.heads(b, qkv, q_heads, kv_heads)?, batch.angles)?;
        let v = self.heads(b, qkv, q_heads + kv_heads, kv_heads)?;
        let first_page = (layers > 1).then_some(("first_page", first_page));
        let write = [("kv_pages", kv), ("k", k), ("v", v), ("slots", kv_slots)].into_iter().chain(first_page);
        let kv_pages = rpa::kv_write::emit(b, &self.attention, &write.collect())?;
        let metadata =
            [("kv_lens", kv_lens), ("page_indices", page_indices), ("cu_q_lens", cu_q_lens), ("num_seqs", num_seqs)];
        Ok([("q", q), ("kv_pages", kv_pages)].into_iter().chain(metadata).chain(first_page).collect())
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
    /// DotThunk::Execute"). So is one right before it, of some sizes: the barrier keeps them apart.
    fn by_row<'a>(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, linear: &Linear<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let x = linear.norm.map_or(Ok(x), |norm| self.norm(b, x, &norm))?;
        let x = b.optimization_barrier(&[self.orientation.turn(b, x)?])?[0];
        let scale = linear.scale.map(|scale| self.orientation.turn(b, scale)).transpose()?;
        product(b, Orientation::RowMajor, x, &Linear { scale, ..*linear })
    }

    fn attend<'a>(
        &self,
        b: &Builder<'c, 'a>,
        qkv: Tensor<'c, 'a>,
        batch: &Batch<'c, 'a>,
        first_page: Tensor<'c, 'a>,
        kv: Tensor<'c, 'a>,
    ) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
        let args = self.write_kv(b, qkv, batch, first_page, kv)?;
        let attended = kernel::stablehlo::<Rpa>(b, &self.attention, &args)?[0];
        Ok((self.join_heads(b, attended)?, args["kv_pages"]))
    }
}

/// The projection of `x`, in either orientation, norm apart.
fn product<'c, 'a>(
    b: &Builder<'c, 'a>,
    orientation: Orientation,
    x: Tensor<'c, 'a>,
    linear: &Linear<'c, 'a>,
) -> Result<Tensor<'c, 'a>> {
    let (problem, arguments) = matmul(b, orientation, x, linear)?;
    Ok(kernel::stablehlo::<Matmul>(b, &problem, &arguments)?[0])
}
