//! What an attention kernel is asked to do: validated shapes, types and options.

use std::ops::Deref;

use pagoda_ir::{Element, TensorType};

use crate::error::{Invalid, MAX_ELEMENTS, ensure, ensure_product};

const SUBJECT: &str = "rpa problem";

/// What the sequences of a batch may look like. Programs are specialised for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// At most one query row per sequence.
    Decode,
    /// Any number of query rows per sequence: prefill chunks and decode rows side by side.
    Mixed,
}

/// The description of a problem, not validated yet: [`Problem::new`] does that.
///
/// Sizes are of one device's share of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Which batches may come.
    pub kind: Kind,
    /// Type of queries, keys, values and outputs: f32 or bf16. Sums are f32 in any case.
    pub element: Element,
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

/// A valid attention problem. Read its fields through [`Spec`], to which it dereferences.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem(Spec);

impl Deref for Problem {
    type Target = Spec;

    fn deref(&self) -> &Spec {
        &self.0
    }
}

impl Problem {
    /// Validates `spec`.
    ///
    /// # Errors
    /// The first field that breaks a limit.
    pub fn new(spec: Spec) -> Result<Self, Invalid> {
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
        let element = spec.element;
        ensure(
            matches!(element, Element::F32 | Element::Bf16),
            SUBJECT,
            "element",
            element,
            || "is neither f32 nor bf16".into(),
            "convert the operands to one of them",
        )?;
        ensure(
            spec.q_heads.is_multiple_of(spec.kv_heads),
            SUBJECT,
            "q_heads",
            spec.q_heads,
            || format!("is no multiple of kv_heads = {}", spec.kv_heads),
            "every KV head must serve the same number of query heads",
        )?;
        for (key, value) in [("scale", Some(spec.scale)), ("soft_cap", spec.soft_cap)] {
            let value = value.unwrap_or(1.0);
            let fix = "give a positive finite number";
            ensure(value.is_finite() && value > 0.0, SUBJECT, key, value, || "is not positive and finite".into(), fix)?;
        }
        let halves = spec.kv_heads.saturating_mul(2);
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
                &[spec.layers, spec.pages, spec.page_size, halves, spec.head_dim],
                MAX_ELEMENTS,
            ),
            (
                "pages_per_seq * page_size * 2 * kv_heads * head_dim",
                &[spec.pages_per_seq, spec.page_size, halves, spec.head_dim],
                MAX_ELEMENTS,
            ),
        ] {
            ensure_product(SUBJECT, key, factors, most)?;
        }
        Ok(Self(spec))
    }

    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    /// Keys that a row of the page table can name.
    pub fn max_kv_len(&self) -> usize {
        self.pages_per_seq * self.page_size
    }

    /// `[tokens, q_heads, head_dim]`: queries and output.
    pub fn q_type(&self) -> TensorType {
        TensorType::new(self.element, &[self.tokens, self.q_heads, self.head_dim])
    }

    /// `[layers * pages, page_size, 2 * kv_heads, head_dim]`: K of head `h` at `2h`, V at `2h + 1`.
    pub fn kv_pages_type(&self) -> TensorType {
        TensorType::new(self.element, &[self.layers * self.pages, self.page_size, 2 * self.kv_heads, self.head_dim])
    }

    /// `[tokens, kv_heads, head_dim]`: keys or values to be written.
    pub fn new_kv_type(&self) -> TensorType {
        TensorType::new(self.element, &[self.tokens, self.kv_heads, self.head_dim])
    }

    /// The types of the kernel's arguments: q, KV pages, `kv_lens [max_seqs]`, `page_indices [max_seqs,
    /// pages_per_seq]`, `cu_q_lens [max_seqs + 1]`, `num_seqs [1]`, and with several layers the scalar `first_page`.
    pub fn argument_types(&self) -> Vec<TensorType> {
        let int = |dims: &[usize]| TensorType::new(Element::I32, dims);
        let mut types = vec![
            self.q_type(),
            self.kv_pages_type(),
            int(&[self.max_seqs]),
            int(&[self.max_seqs, self.pages_per_seq]),
            int(&[self.max_seqs + 1]),
            int(&[1]),
        ];
        if self.layers > 1 {
            types.push(int(&[]));
        }
        types
    }
}
