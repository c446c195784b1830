//! What the kernel is asked to do: validated shapes, types and options.

use pagoda_ir::{Element, TensorType};
use serde::{Deserialize, Serialize};

use super::kv_layout::KvLayout;
use crate::{
    error::{Invalid, MAX_ELEMENTS, ensure, ensure_product},
    named::{Argument, Arguments, Named},
    problem::{self, Specification},
};

const SUBJECT: &str = "rpa problem";

/// Element types. Today q, KV and the output are of one type, and the accumulator is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Precision {
    /// Queries: f32 or bf16.
    pub q: Element,
    /// Keys and values in the cache.
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
        for (key, element) in [("precision.kv", kv), ("precision.output", output)] {
            ensure(element == q, SUBJECT, key, element, || format!("is not the type of q, {q}"), "give the same type")?;
        }
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
        let rows = KvLayout::rows_of(spec.kv_heads.min(MAX_ELEMENTS));
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
        }
    }

    /// `[tokens, q_heads, head_dim]`: queries.
    pub fn q_type(&self) -> TensorType {
        TensorType::new(self.precision.q, &[self.tokens, self.q_heads, self.head_dim])
    }

    /// `[tokens, q_heads, head_dim]`: the output.
    pub fn output_type(&self) -> TensorType {
        TensorType::new(self.precision.output, &[self.tokens, self.q_heads, self.head_dim])
    }

    /// `[layers * pages, page_size, 2 * kv_heads, head_dim]`: see [`KvLayout`].
    pub fn kv_pages_type(&self) -> TensorType {
        self.kv_layout().buffer_type()
    }

    /// `[tokens, kv_heads, head_dim]`: keys or values to be written.
    pub fn new_kv_type(&self) -> TensorType {
        TensorType::new(self.precision.kv, &[self.tokens, self.kv_heads, self.head_dim])
    }

    /// Queries, KV pages, `kv_lens [max_seqs]`, `page_indices [max_seqs, pages_per_seq]`, `cu_q_lens [max_seqs + 1]`,
    /// `num_seqs [1]`, and with several layers the scalar `first_page`, where the layer's pages begin in the buffer.
    pub fn arguments(&self) -> Arguments {
        let int = |dims: &[usize]| TensorType::new(Element::I32, dims);
        Arguments::new([
            Argument::input("q", self.q_type()),
            Argument::input("kv_pages", self.kv_pages_type()),
            Argument::prefetch("kv_lens", int(&[self.max_seqs])),
            Argument::prefetch("page_indices", int(&[self.max_seqs, self.pages_per_seq])),
            Argument::prefetch("cu_q_lens", int(&[self.max_seqs + 1])),
            Argument::prefetch("num_seqs", int(&[1])),
            Argument::prefetch("first_page", int(&[])).when(self.layers > 1),
        ])
    }

    /// The output.
    pub fn results(&self) -> Named<TensorType> {
        [("out", self.output_type())].into_iter().collect()
    }
}
