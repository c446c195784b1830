//! The attention's flags: one device's share, one layer, as many pages as all sequences together can fill.

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use pagoda_ir::{Element, mosaic::tiling::LANES};

use super::{Kind, KvRows, Precision, Rotary, Rpa, Spec};
use crate::{
    cli::KernelArgs,
    error::{Invalid, ensure},
};

/// Flags of an RPA problem.
#[derive(Clone, Debug, Args)]
pub struct RpaArgs {
    /// Query rows, query heads and head dimension of q, such as 1024x32x128.
    #[arg(long, value_name = "ROWSxHEADSxDIM")]
    q: String,
    /// Key and value heads; must divide the query heads.
    #[arg(long)]
    kv_heads: usize,
    /// Tokens of a KV page.
    #[arg(long)]
    page_size: usize,
    /// Tokens of the longest sequence, prompt and answer together.
    #[arg(long)]
    max_seq_len: usize,
    /// Sequences of a batch, at most.
    #[arg(long)]
    max_seqs: usize,
    /// Type of queries, keys, values and outputs.
    #[arg(long, value_parser = crate::cli::float(), default_value = "bf16")]
    dtype: Element,
    /// Type of the cache's numbers, where it is not that of the queries; those of 8 bits have a scale per head.
    #[arg(long, value_parser = cache(), value_name = "TYPE")]
    kv_dtype: Option<Element>,
    /// The kernel takes the projections as they are, rotates queries and keys, and writes keys and values.
    #[arg(long)]
    fused: bool,
    /// A head's key and value share a row of the cache (heads of 64; those of 192 always do).
    #[arg(long)]
    packed: bool,
    /// Every query head has a logit of its own in the softmax's sum.
    #[arg(long)]
    sinks: bool,
    /// The logarithm of the softmax's sum is a result too.
    #[arg(long)]
    log_sum_exp: bool,
    /// Layers whose pages share the KV buffer, one after another.
    #[arg(long, default_value_t = 1)]
    layers: usize,
    /// A row sees this many KV tokens at most, its own included.
    #[arg(long, value_name = "TOKENS")]
    sliding_window: Option<usize>,
    /// Logits x become c * tanh(x / c).
    #[arg(long, value_name = "C")]
    soft_cap: Option<f64>,
    /// Batches of decode rows only: at most one row per sequence.
    #[arg(long)]
    decode: bool,
}

/// Reads the type of a cache.
fn cache() -> impl TypedValueParser<Value = Element> {
    const TYPES: [(&str, Element); 5] = [
        ("f32", Element::F32),
        ("bf16", Element::Bf16),
        ("f8e4m3fn", Element::F8E4M3Fn),
        ("f8e5m2", Element::F8E5M2),
        ("i8", Element::I8),
    ];
    let of = |name: String| TYPES.into_iter().find_map(|(known, element)| (known == name).then_some(element));
    PossibleValuesParser::new(TYPES.map(|(name, _)| name)).try_map(move |name| of(name).ok_or("is not one of them"))
}

impl KernelArgs for Rpa {
    type Args = RpaArgs;

    fn spec(args: RpaArgs) -> Result<Spec, Invalid> {
        let sizes: Option<Vec<usize>> = args.q.split('x').map(|size| size.trim().parse().ok()).collect();
        let sizes = sizes.and_then(|sizes| <[usize; 3]>::try_from(sizes).ok());
        let fix = "write rows, query heads and head dimension, e.g. 1024x32x128";
        ensure(sizes.is_some(), "rpa problem", "q", &args.q, || "is not ROWSxHEADSxDIM".into(), fix)?;
        let [tokens, q_heads, head_dim] = sizes.unwrap_or_default();
        for (key, value) in [("page-size", args.page_size), ("max-seq-len", args.max_seq_len)] {
            ensure(value > 0, "rpa problem", key, value, || "is below 1".into(), "give at least 1")?;
        }
        let pages_per_seq = args.max_seq_len.div_ceil(args.page_size);
        let pages = args.max_seqs.checked_mul(pages_per_seq);
        let limit = || "sequences have too many pages to count".into();
        ensure(pages.is_some(), "rpa problem", "max-seqs", args.max_seqs, limit, "give fewer")?;
        Ok(Spec {
            kind: if args.decode { Kind::Decode } else { Kind::Mixed },
            precision: Precision { kv: args.kv_dtype.unwrap_or(args.dtype), ..Precision::uniform(args.dtype) },
            tokens,
            q_heads,
            kv_heads: args.kv_heads,
            head_dim,
            page_size: args.page_size,
            pages: pages.unwrap_or_default(),
            layers: args.layers,
            max_seqs: args.max_seqs,
            pages_per_seq,
            scale: (head_dim as f64).powf(-0.5),
            sliding_window: args.sliding_window,
            soft_cap: args.soft_cap,
            fused: args.fused.then_some(Rotary::HalfSplit),
            sinks: args.sinks,
            log_sum_exp: args.log_sum_exp,
            // No TPU's copies take rows of a tile and a half of lanes.
            kv_rows: match args.packed {
                false if head_dim < LANES => {
                    KvRows::unpacked(args.kv_dtype.unwrap_or(args.dtype), args.kv_heads, head_dim)
                }
                false => KvRows::for_lanes(args.kv_dtype.unwrap_or(args.dtype), args.kv_heads, head_dim),
                true => KvRows::Packed,
            },
        })
    }
}
