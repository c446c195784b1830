//! The attention's flags: one device's share, one layer, as many pages as all sequences together can fill.

use clap::Args;
use pagoda_ir::Element;

use super::{Kind, Precision, Rpa, Spec};
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
            precision: Precision::uniform(args.dtype),
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
            ..Spec::default()
        })
    }
}
