//! Plain StableHLO: what any plugin compiles, and what the other lowerings emit around their kernels.

use pagoda_ir::stablehlo::{Builder, Tensor};
use pagoda_ir::{Element, Result};
use pagoda_kernels::matmul::Matmul;
use pagoda_kernels::rpa::{self, Rpa};
use pagoda_kernels::{Named, kernel};

use super::{Batch, Linear, Lowering, OfLayer, Orientation, Rows, matmul};

/// The lowering.
pub(super) struct Stablehlo {
    /// Of each kind of layers, with rotary embedding and KV write.
    attention: Vec<rpa::Problem>,
    /// Of each, which rope it has.
    ropes: Vec<usize>,
    /// Of the KV cache's numbers.
    scale: f32,
    orientation: Orientation,
}

impl Stablehlo {
    pub(super) fn new(attention: Vec<rpa::Problem>, ropes: Vec<usize>, scale: f32, orientation: Orientation) -> Self {
        Self { attention, ropes, scale, orientation }
    }

    /// The attention of each kind of layers, with rotary embedding and KV write.
    pub(super) fn attention(&self) -> &[rpa::Problem] {
        &self.attention
    }

    /// The angles of a kind's rope.
    pub(super) fn angles<'c, 'a>(&self, batch: &Batch<'c, 'a>, kind: usize) -> Tensor<'c, 'a> {
        batch.angles[self.ropes[kind]]
    }

    /// The scales of keys and of values, where the cache has them: the same for each head.
    pub(super) fn scales<'c, 'a>(&self, b: &Builder<'c, 'a>) -> Result<Option<[Tensor<'c, 'a>; 2]>> {
        let of_heads = || b.splat(Element::F32, &[self.attention[0].kv_heads], self.scale.into());
        self.attention[0].precision.is_scaled().then(|| Ok([of_heads()?, of_heads()?])).transpose()
    }

    /// The arguments of the attention kernel of a kind; `qkv` is `[rows, features]`.
    pub(super) fn arguments<'c, 'a>(
        &self,
        b: &Builder<'c, 'a>,
        qkv: Tensor<'c, 'a>,
        batch: &Batch<'c, 'a>,
        (layer, kind): (&OfLayer<'c, 'a>, usize),
        kv: Tensor<'c, 'a>,
    ) -> Result<Named<Tensor<'c, 'a>>> {
        let Rows { kv_lens, page_indices, cu_q_lens, num_seqs, .. } = batch.rows;
        let scales = self.scales(b)?.into_iter().flat_map(|[k, v]| [("k_scale", k), ("v_scale", v)]);
        let metadata =
            [("kv_lens", kv_lens), ("page_indices", page_indices), ("cu_q_lens", cu_q_lens), ("num_seqs", num_seqs)];
        let first_page = (self.attention[kind].layers > 1).then_some(("first_page", layer.first_page));
        let arrays = [("qkv", qkv), ("cos_sin", self.angles(batch, kind))].into_iter();
        let arrays = arrays.chain(layer.sinks.map(|sinks| ("sinks", sinks))).chain(scales);
        Ok(arrays.chain([("kv_pages", kv)]).chain(metadata).chain(first_page).collect())
    }
}

impl<'c> Lowering<'c> for Stablehlo {
    fn orientation(&self) -> Orientation {
        self.orientation
    }

    fn batch<'a>(&self, b: &Builder<'c, 'a>, rows: Rows<'c, 'a>, rotary: &[Tensor<'c, 'a>]) -> Result<Batch<'c, 'a>> {
        let angles = rotary.iter().map(|&table| b.take(table, rows.positions, 0)).collect::<Result<_>>()?;
        Ok(Batch { rows, angles })
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
        layer: OfLayer<'c, 'a>,
        kv: Tensor<'c, 'a>,
    ) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
        let qkv = self.orientation.turn(b, qkv)?;
        let results = layer.kind.select(b, self.attention.len(), |b, kind| {
            let args = self.arguments(b, qkv, batch, (&layer, kind), kv)?;
            kernel::stablehlo::<Rpa>(b, &self.attention[kind], &args)
        })?;
        Ok((self.orientation.turn(b, results[0])?, results[1]))
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
