//! What the kernel is asked to do: validated shapes, types and options.

use pagoda_ir::{Element, TensorType};
use serde::{Deserialize, Serialize};

use super::kv_layout::{KvLayout, KvRows};
use crate::{
    error::{Invalid, MAX_ELEMENTS, ensure, ensure_product},
    named::{Argument, Arguments, Named},
    problem::{self, Specification},
};

const SUBJECT: &str = "rpa problem";

/// What the cache may hold where that is not the type of the queries.
pub(super) const NARROW_KV: [Element; 4] = [Element::Bf16, Element::F8E4M3Fn, Element::F8E5M2, Element::I8];

/// Element types. Queries and the output are of one type, and the accumulator is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Precision {
    /// Queries: f32 or bf16.
    pub q: Element,
    /// Keys and values in the cache: the type of q, bf16, or one of 8 bits with a scale per head.
    pub kv: Element,
    /// Running maximum, sum and weighted values.
    pub accumulator: Element,
    /// The output.
    pub output: Element,
}

impl Precision {
    /// Queries, KV and output of one type.
    pub const fn uniform(element: Element) -> Self {
        Self { q: element, kv: element, accumulator: Element::F32, output: element }
    }

    /// The least and the largest finite number of a cache of 8 bits: what is beyond becomes one of them. All numbers for
    /// others.
    pub fn bounds(&self) -> [f64; 2] {
        match (self.kv, self.kv.minifloat()) {
            (Element::I8, _) => [i8::MIN.into(), i8::MAX.into()],
            (_, Some(format)) => [-format.most(), format.most()].map(f64::from),
            _ => [f64::NEG_INFINITY, f64::INFINITY],
        }
    }

    /// Whether the cache holds numbers that are multiplied by a scale of their head: key or value = stored * scale.
    pub const fn is_scaled(&self) -> bool {
        self.kv.bytes() == 1
    }
}

/// What the sequences of a batch may look like. Programs are specialised for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// At most one query row per sequence.
    Decode,
    /// Any number of query rows per sequence: prefill chunks and decode rows side by side.
    Mixed,
}

/// How a fused kernel turns queries and keys by their positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rotary {
    /// The form of Hugging Face's Llama: element `i` of the first half of a head is paired with element `i` of the second,
    /// `(low * cos - high * sin, high * cos + low * sin)`, in f32.
    HalfSplit,
}

/// The description of a problem. Sizes are of one device's share of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Which batches may come.
    pub kind: Kind,
    /// Element types.
    pub precision: Precision,
    /// Rows of `q` and of the output, padding included.
    pub tokens: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Tokens of one KV page.
    pub page_size: usize,
    /// KV pages of one layer.
    pub pages: usize,
    /// Layers whose pages share the KV buffer, one after another; 1 for a buffer per layer.
    pub layers: usize,
    /// Sequences in a batch, at most.
    pub max_seqs: usize,
    /// Pages of one sequence, at most: a row of the page table.
    pub pages_per_seq: usize,
    /// Factor of the logits, usually `head_dim^-0.5`.
    pub scale: f64,
    /// A row sees this many keys at most, its own included.
    pub sliding_window: Option<usize>,
    /// Logits `x` become `c * tanh(x / c)` (after scaling, before masking).
    pub soft_cap: Option<f64>,
    /// The kernel takes the projections as they are: it turns queries and keys by their positions, writes the keys and
    /// values into the pages, in place, and attends. Without it, q is turned and the pages are written before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fused: Option<Rotary>,
    /// Each query head has a logit of its own in the softmax's sum, without a value (an attention sink, as in gpt-oss).
    #[serde(default, skip_serializing_if = "is_default")]
    pub sinks: bool,
    /// The logarithm of the softmax's sum is a result too: attention over parts of a context can be merged by it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub log_sum_exp: bool,
    /// The rows of a token in the cache.
    #[serde(default, skip_serializing_if = "is_default")]
    pub kv_rows: KvRows,
}

impl Spec {
    /// Rows of a token in the cache.
    pub fn token_rows(&self) -> usize {
        self.kv_rows.of_token(self.precision.kv, self.kv_heads)
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Default for Spec {
    /// The smallest problem: what a literal need not say.
    fn default() -> Self {
        Self {
            kind: Kind::Mixed,
            precision: Precision::uniform(Element::F32),
            tokens: 1,
            q_heads: 1,
            kv_heads: 1,
            head_dim: 128,
            page_size: 1,
            pages: 1,
            layers: 1,
            max_seqs: 1,
            pages_per_seq: 1,
            scale: 1.0,
            sliding_window: None,
            soft_cap: None,
            fused: None,
            sinks: false,
            log_sum_exp: false,
            kv_rows: KvRows::Interleaved,
        }
    }
}

/// A valid attention problem.
pub type Problem = problem::Problem<Spec>;

impl Specification for Spec {
    fn validate(&self) -> Result<(), Invalid> {
        let spec = self;
        let positive = [
            ("tokens", spec.tokens),
            ("q_heads", spec.q_heads),
            ("kv_heads", spec.kv_heads),
            ("head_dim", spec.head_dim),
            ("page_size", spec.page_size),
            ("pages", spec.pages),
            ("layers", spec.layers),
            ("max_seqs", spec.max_seqs),
            ("pages_per_seq", spec.pages_per_seq),
            ("sliding_window", spec.sliding_window.unwrap_or(1)),
        ];
        for (key, value) in positive {
            ensure(value > 0, SUBJECT, key, value, || "is below 1".into(), "give at least 1")?;
        }
        let Precision { q, kv, accumulator, output } = spec.precision;
        let (float, fix) = (matches!(q, Element::F32 | Element::Bf16), "convert the operands to one of them");
        ensure(float, SUBJECT, "precision.q", q, || "is neither f32 nor bf16".into(), fix)?;
        let limit = || format!("is not the type of q, {q}");
        ensure(output == q, SUBJECT, "precision.output", output, limit, "give the same type")?;
        let limit = || format!("is neither the type of q, {q}, nor bf16 or a type of 8 bits");
        let narrow = NARROW_KV.contains(&kv);
        ensure(kv == q || narrow, SUBJECT, "precision.kv", kv, limit, "give one of them")?;
        let limit = || "is not f32".into();
        ensure(accumulator == Element::F32, SUBJECT, "precision.accumulator", accumulator, limit, "accumulate in f32")?;
        ensure(
            spec.q_heads.is_multiple_of(spec.kv_heads),
            SUBJECT,
            "q_heads",
            spec.q_heads,
            || format!("is not a multiple of kv_heads = {}", spec.kv_heads),
            "every KV head must serve the same number of query heads",
        )?;
        for (key, value) in [("scale", Some(spec.scale)), ("soft_cap", spec.soft_cap)] {
            let value = value.unwrap_or(1.0);
            let fix = "give a positive finite number";
            ensure(value.is_finite() && value > 0.0, SUBJECT, key, value, || "is not positive and finite".into(), fix)?;
        }
        let fix = "give an even one, or leave rotary out";
        let pairs = spec.fused.is_none() || spec.head_dim.is_multiple_of(2);
        ensure(pairs, SUBJECT, "head_dim", spec.head_dim, || "has no two halves to rotate".into(), fix)?;
        let fits = spec.kv_rows != KvRows::Packed || KvRows::packs(spec.head_dim);
        let limit = || "is not 64 or 192, or 64 more than another multiple of 128, as packed rows have it".into();
        ensure(fits, SUBJECT, "head_dim", spec.head_dim, limit, "give kv_rows = interleaved")?;
        let rows = 2 * spec.kv_heads.min(MAX_ELEMENTS);
        // Positions, page ids and KV slots are i32 on the device, and a block may end one block past the context.
        let index = i32::MAX as usize;
        for (key, factors, most) in [
            ("layers * pages * page_size", &[spec.layers, spec.pages, spec.page_size][..], index),
            ("2 * pages_per_seq * page_size", &[2, spec.pages_per_seq, spec.page_size], index),
            ("2 * tokens", &[2, spec.tokens], index),
            ("max_seqs * pages_per_seq", &[spec.max_seqs, spec.pages_per_seq], index),
            ("tokens * q_heads * head_dim", &[spec.tokens, spec.q_heads, spec.head_dim], MAX_ELEMENTS),
            (
                "layers * pages * page_size * 2 * kv_heads * head_dim",
                &[spec.layers, spec.pages, spec.page_size, rows, spec.head_dim],
                MAX_ELEMENTS,
            ),
            (
                "pages_per_seq * page_size * 2 * kv_heads * head_dim",
                &[spec.pages_per_seq, spec.page_size, rows, spec.head_dim],
                MAX_ELEMENTS,
            ),
        ] {
            ensure_product(SUBJECT, key, factors, most)?;
        }
        Ok(())
    }
}

impl Problem {
    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    /// Keys that a row of the page table can name.
    pub fn max_kv_len(&self) -> usize {
        self.pages_per_seq * self.page_size
    }

    /// How keys and values lie in the cache.
    pub fn kv_layout(&self) -> KvLayout {
        KvLayout {
            element: self.precision.kv,
            layers: self.layers,
            pages: self.pages,
            page_size: self.page_size,
            heads: self.kv_heads,
            head_dim: self.head_dim,
            kv_rows: self.kv_rows,
        }
    }

    /// Heads of a fused kernel's projections: queries, keys and values.
    pub fn projected_heads(&self) -> usize {
        self.q_heads + 2 * self.kv_heads
    }

    /// Queries: `[tokens, q_heads, head_dim]`. Of a fused kernel the projections as they are, row-major: `[tokens, (q_heads +
    /// 2 * kv_heads) * head_dim]`, the heads of the queries, then those of the keys, then those of the values.
    pub fn q_type(&self) -> TensorType {
        let dims: &[usize] = match self.fused {
            None => &[self.tokens, self.q_heads, self.head_dim],
            Some(_) => &[self.tokens, self.projected_heads() * self.head_dim],
        };
        TensorType::new(self.precision.q, dims)
    }

    /// The output: `[tokens, q_heads, head_dim]`, of a fused kernel `[tokens, q_heads * head_dim]`.
    pub fn output_type(&self) -> TensorType {
        let dims: &[usize] = match self.fused {
            None => &[self.tokens, self.q_heads, self.head_dim],
            Some(_) => &[self.tokens, self.q_heads * self.head_dim],
        };
        TensorType::new(self.precision.output, dims)
    }

    /// See [`KvLayout::buffer_type`].
    pub fn kv_pages_type(&self) -> TensorType {
        self.kv_layout().buffer_type()
    }

    /// `[tokens, kv_heads, head_dim]`: keys or values to be written, in the cache's type.
    pub fn new_kv_type(&self) -> TensorType {
        TensorType::new(self.precision.kv, &[self.tokens, self.kv_heads, self.head_dim])
    }

    /// In this order:
    ///
    /// | argument | type | |
    /// |---|---|---|
    /// | `q` | [`Problem::q_type`] | `qkv` of a fused kernel |
    /// | `cos_sin` | `f32[tokens, head_dim]` | fused: the cosines of each row's angles, then their sines |
    /// | `sinks` | `f32[q_heads]` | if there are |
    /// | `k_scale`, `v_scale` | `f32[kv_heads]` | of a cache of 8 bits |
    /// | `kv_pages` | [`Problem::kv_pages_type`] | fused: becomes the result of that name |
    /// | `kv_lens` | `i32[max_seqs]` | |
    /// | `page_indices` | `i32[max_seqs, pages_per_seq]` | |
    /// | `cu_q_lens` | `i32[max_seqs + 1]` | |
    /// | `num_seqs` | `i32[1]` | |
    /// | `first_page` | `i32[]` | with several layers: where the layer's pages begin in the buffer |
    pub fn arguments(&self) -> Arguments {
        let int = |dims: &[usize]| TensorType::new(Element::I32, dims);
        let float = |dims: &[usize]| TensorType::new(Element::F32, dims);
        let (fused, scaled, kv_pages) = (self.fused.is_some(), self.precision.is_scaled(), self.kv_pages_type());
        Arguments::new([
            Argument::input(if fused { "qkv" } else { "q" }, self.q_type()),
            Argument::input("cos_sin", float(&[self.tokens, self.head_dim])).when(fused),
            Argument::input("sinks", float(&[self.q_heads])).when(self.sinks),
            Argument::input("k_scale", float(&[self.kv_heads])).when(scaled),
            Argument::input("v_scale", float(&[self.kv_heads])).when(scaled),
            if fused { Argument::donated("kv_pages", kv_pages, 1) } else { Argument::input("kv_pages", kv_pages) },
            Argument::prefetch("kv_lens", int(&[self.max_seqs])),
            Argument::prefetch("page_indices", int(&[self.max_seqs, self.pages_per_seq])),
            Argument::prefetch("cu_q_lens", int(&[self.max_seqs + 1])),
            Argument::prefetch("num_seqs", int(&[1])),
            Argument::prefetch("first_page", int(&[])).when(self.layers > 1),
        ])
    }

    /// The output; of a fused kernel `kv_pages`; where it is asked for, `lse`, `f32[tokens, q_heads]`.
    pub fn results(&self) -> Named<TensorType> {
        let kv_pages = self.fused.map(|_| ("kv_pages", self.kv_pages_type()));
        let lse = TensorType::new(Element::F32, &[self.tokens, self.q_heads]);
        let lse = self.log_sum_exp.then_some(("lse", lse));
        [("out", self.output_type())].into_iter().chain(kv_pages).chain(lse).collect()
    }
}
