//! Planning and certifying ragged paged attention: what `pagoda plan rpa` and `pagoda certify rpa` answer.

use pagoda_ir::Element;
use pagoda_kernels::rpa::plan::{Plan, Tiles};
use pagoda_kernels::rpa::{Kind, Problem, Spec};

use super::Certifier;
use super::kernel::{invalid, options, refused};
use crate::error::{Error, Result};

/// An attention's plan, told.
pub type Planned = super::kernel::Planned<Plan>;
/// An attention's plan and the compiler's answer to it.
pub type Certified = super::kernel::Certified<Plan>;

/// An attention to plan, as the command line takes it: one device's share, one layer, as many pages as all sequences
/// together can fill.
#[derive(Clone, Debug)]
pub struct Request {
    /// Rows, query heads and head dimension of `q`: `1024x32x128`.
    pub q: String,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Tokens of a page.
    pub page_size: usize,
    /// Layers whose pages share the KV buffer.
    pub layers: usize,
    /// Tokens of the longest sequence, prompt and answer together.
    pub max_seq_len: usize,
    /// Sequences of a batch, at most.
    pub max_seqs: usize,
    /// Type of queries, keys, values and outputs.
    pub element: Element,
    /// Which batches may come.
    pub kind: Kind,
    /// A row sees this many keys at most.
    pub sliding_window: Option<usize>,
    /// Logits are capped softly at this.
    pub soft_cap: Option<f64>,
    /// The chip's name.
    pub chip: String,
    /// Scoped VMEM limit, `16MiB`; the chip's default if absent.
    pub vmem_limit: Option<String>,
    /// Tiles `Q,P`; the planner's choice if absent.
    pub tiles: Option<String>,
}

impl Request {
    /// The attention of Llama-3.1-8B on `chip` as a serving step launches it: q [1024, 32, 128], 8 KV heads, pages of 128
    /// tokens, 8 sequences of up to 4608 tokens, prefill and decode mixed, bf16.
    pub fn new(chip: &str) -> Self {
        Self {
            q: "1024x32x128".into(),
            kv_heads: 8,
            page_size: 128,
            layers: 1,
            max_seq_len: 4608,
            max_seqs: 8,
            element: Element::Bf16,
            kind: Kind::Mixed,
            sliding_window: None,
            soft_cap: None,
            chip: chip.to_owned(),
            vmem_limit: None,
            tiles: None,
        }
    }

    /// Plans it.
    ///
    /// # Errors
    /// A [`Error::Setting`] for the first value that cannot work.
    pub fn plan(&self) -> Result<Plan> {
        let (limit, tiles) = (self.vmem_limit.as_deref(), self.tiles.as_deref());
        let (chip, options) = options(&self.chip, limit, tiles, Tiles::parse)?;
        Plan::new(Problem::new(self.spec()?).map_err(invalid)?, chip, options).map_err(refused)
    }

    fn spec(&self) -> Result<Spec> {
        let sizes: Option<Vec<usize>> = self.q.split('x').map(|size| size.trim().parse().ok()).collect();
        let Some([tokens, q_heads, head_dim]) = sizes.and_then(|sizes| <[usize; 3]>::try_from(sizes).ok()) else {
            let fix = "write rows, query heads and head dimension, e.g. 1024x32x128";
            return Err(Error::setting("q", &self.q, "is not TOKENSxHEADSxHEAD_DIM", fix));
        };
        for (key, value) in [("page-size", self.page_size), ("max-seq-len", self.max_seq_len)] {
            if value == 0 {
                return Err(Error::setting(key, value, "is below 1", "give at least 1"));
            }
        }
        let pages_per_seq = self.max_seq_len.div_ceil(self.page_size);
        let pages = self.max_seqs.checked_mul(pages_per_seq).ok_or_else(|| {
            Error::setting("max-seqs", self.max_seqs, "sequences have too many pages to count", "give fewer")
        })?;
        Ok(Spec {
            kind: self.kind,
            element: self.element,
            tokens,
            q_heads,
            kv_heads: self.kv_heads,
            head_dim,
            page_size: self.page_size,
            pages,
            layers: self.layers,
            max_seqs: self.max_seqs,
            pages_per_seq,
            scale: (head_dim as f64).powf(-0.5),
            sliding_window: self.sliding_window,
            soft_cap: self.soft_cap,
        })
    }
}

/// Plans an attention and judges the plan by the recorded certifications.
///
/// # Errors
/// As [`Request::plan`].
pub fn plan_rpa(request: &Request) -> Result<Planned> {
    Ok(Planned::new(&request.plan()?))
}

/// Plans an attention, has the real compiler compile it for one host of the chip, and compares.
///
/// # Errors
/// As [`Request::plan`]; and when the compiler is missing, crashes, takes too long or refuses the kernel.
pub fn certify_rpa(request: &Request, certifier: &Certifier) -> Result<Certified> {
    Certified::new(&request.plan()?, certifier)
}
