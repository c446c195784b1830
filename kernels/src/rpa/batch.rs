//! The ragged metadata of one launch, validated on the host before it reaches a device.

use pagoda_ir::HostTensor;

use super::{
    inputs,
    kv_layout::{NO_SLOT, slot},
    problem::{Kind, Problem},
};
use crate::{
    error::{Invalid, ensure},
    named::Arrays,
    random::Lengths,
};

const SUBJECT: &str = "rpa batch";

/// One sequence of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence<'b> {
    /// Its first row of `q` and of the output.
    pub first_row: usize,
    /// Its rows.
    pub q_len: usize,
    /// Its keys, those of the rows included.
    pub kv_len: usize,
    /// The pages that hold its keys, in order: `ceil(kv_len / page_size)` of them.
    pub pages: &'b [i32],
}

impl Sequence<'_> {
    /// Where one of its rows stands; `None` for a row of an idle sequence, which has none of the keys.
    pub fn position(&self, row: usize) -> Option<usize> {
        (self.kv_len + row).checked_sub(self.q_len)
    }
}

/// Validated metadata: lengths fit, live page ids exist, rows lie within the problem.
///
/// A fused kernel may be given *idle* sequences, with rows and without a key: they see nothing and write nothing. (A decode
/// step has a row per slot, whether a sequence is there or not.)
///
/// What does not belong to a live sequence (later entries of the arrays, page ids beyond a sequence's length) is kept
/// as it was given and never looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    kv_lens: Vec<i32>,
    page_indices: Vec<i32>,
    cu_q_lens: Vec<i32>,
    /// One number, as the kernels take it.
    num_seqs: [i32; 1],
    pages_per_seq: usize,
    page_size: usize,
}

impl Batch {
    /// Validates the metadata of one launch of `problem`; see [`Problem::arguments`] for the shapes.
    ///
    /// # Errors
    /// The first entry that breaks a limit: array sizes, `num_seqs`, `cu_q_lens` not from 0 upwards, more rows than
    /// `tokens`, more than one row per sequence in a decode problem, `q_len > kv_len` (unless the sequence is idle), `kv_len`
    /// beyond the page table, a live page id that is not a page.
    pub fn new(
        problem: &Problem,
        kv_lens: &[i32],
        page_indices: &[i32],
        cu_q_lens: &[i32],
        num_seqs: usize,
    ) -> Result<Self, Invalid> {
        let check =
            |holds, key: &str, value: i64, limit: String, fix: &str| ensure(holds, SUBJECT, key, value, || limit, fix);
        for (key, len, expected) in [
            ("kv_lens.len()", kv_lens.len(), problem.max_seqs),
            ("page_indices.len()", page_indices.len(), problem.max_seqs * problem.pages_per_seq),
            ("cu_q_lens.len()", cu_q_lens.len(), problem.max_seqs + 1),
        ] {
            check(
                len == expected,
                key,
                len as i64,
                format!("is not {expected}"),
                "pad the array to the problem's size",
            )?;
        }
        let limit = format!("is beyond max_seqs = {}", problem.max_seqs);
        check(num_seqs <= problem.max_seqs, "num_seqs", num_seqs as i64, limit, "split the batch or raise max_seqs")?;
        check(cu_q_lens[0] == 0, "cu_q_lens[0]", cu_q_lens[0].into(), "is not 0".into(), "rows begin at row 0")?;
        for seq in 0..num_seqs {
            let (first, end, kv_len) = (cu_q_lens[seq], cu_q_lens[seq + 1], kv_lens[seq]);
            let key = format!("cu_q_lens[{}]", seq + 1);
            let fix = "give cumulative row counts";
            check(end >= first, &key, end.into(), format!("is below cu_q_lens[{seq}] = {first}"), fix)?;
            let limit = format!("is beyond tokens = {}", problem.tokens);
            check(end as usize <= problem.tokens, &key, end.into(), limit, "pack fewer rows or raise tokens")?;
            let q_len = end - first;
            let key = format!("q_lens[{seq}]");
            check(
                problem.kind == Kind::Mixed || q_len <= 1,
                &key,
                q_len.into(),
                "is more than the one row of a decode problem".into(),
                "use a mixed problem",
            )?;
            let limit = format!("is beyond kv_lens[{seq}] = {kv_len}");
            let idle = problem.fused.is_some() && kv_len == 0;
            check(idle || q_len <= kv_len, &key, q_len.into(), limit, "kv_lens count the keys of the query rows too")?;
            let capacity = problem.max_kv_len();
            let limit = format!(
                "is beyond pages_per_seq * page_size = {} * {} = {capacity}",
                problem.pages_per_seq, problem.page_size
            );
            let key = format!("kv_lens[{seq}]");
            check(
                kv_len as usize <= capacity,
                &key,
                kv_len.into(),
                limit,
                "shorten the sequence or raise pages_per_seq",
            )?;
            for column in 0..(kv_len as usize).div_ceil(problem.page_size) {
                let page = page_indices[seq * problem.pages_per_seq + column];
                check(
                    (0..problem.pages as i64).contains(&page.into()),
                    &format!("page_indices[{seq}][{column}]"),
                    page.into(),
                    format!("is not within 0..{}", problem.pages),
                    "name a page of the layer",
                )?;
            }
        }
        Ok(Self {
            kv_lens: kv_lens.to_vec(),
            page_indices: page_indices.to_vec(),
            cu_q_lens: cu_q_lens.to_vec(),
            num_seqs: [num_seqs as i32],
            pages_per_seq: problem.pages_per_seq,
            page_size: problem.page_size,
        })
    }

    /// The metadata of sequences of these lengths, their pages one after another.
    ///
    /// # Errors
    /// When `lengths` are not a batch of the problem.
    pub fn of_lengths(problem: &Problem, lengths: &[Lengths]) -> Result<Self, Invalid> {
        inputs::check_lengths(problem, lengths)?;
        let (seqs, count) = (problem.max_seqs, lengths.len());
        let mut kv_lens = vec![0_i32; seqs];
        let mut cu_q_lens = vec![0_i32; seqs + 1];
        for (seq, of) in lengths.iter().enumerate() {
            kv_lens[seq] = of.kv_len as i32;
            cu_q_lens[seq + 1] = cu_q_lens[seq] + of.q_len as i32;
        }
        let rows = cu_q_lens[count];
        cu_q_lens[count + 1..].fill(rows);
        let pages = problem.pages as i32;
        let page_indices: Vec<i32> = (0..(seqs * problem.pages_per_seq) as i32).map(|page| page % pages).collect();
        Self::new(problem, &kv_lens, &page_indices, &cu_q_lens, count)
    }

    /// Validates the metadata among `inputs`.
    ///
    /// # Errors
    /// As [`Batch::new`].
    pub fn of(problem: &Problem, inputs: &Arrays) -> Result<Self, Invalid> {
        let ints = |name: &str| inputs[name].as_slice::<i32>();
        let num_seqs = ints("num_seqs")[0];
        let limit = || "is below 0".into();
        ensure(num_seqs >= 0, SUBJECT, "num_seqs", num_seqs, limit, "give the number of sequences")?;
        Self::new(problem, ints("kv_lens"), ints("page_indices"), ints("cu_q_lens"), num_seqs as usize)
    }

    /// The live sequences, empty ones included.
    pub fn sequences(&self) -> impl Iterator<Item = Sequence<'_>> {
        (0..self.num_seqs[0] as usize).map(|seq| {
            let kv_len = self.kv_lens[seq] as usize;
            let first_row = self.cu_q_lens[seq] as usize;
            let first_page = seq * self.pages_per_seq;
            Sequence {
                first_row,
                q_len: self.cu_q_lens[seq + 1] as usize - first_row,
                kv_len,
                pages: &self.page_indices[first_page..first_page + kv_len.div_ceil(self.page_size)],
            }
        })
    }

    /// The lengths of the live sequences.
    pub fn lengths(&self) -> Vec<Lengths> {
        self.sequences().map(|of| Lengths { q_len: of.q_len, kv_len: of.kv_len }).collect()
    }

    /// Keys of each sequence: `[max_seqs]`.
    pub fn kv_lens(&self) -> &[i32] {
        &self.kv_lens
    }

    /// First row of each sequence, and one past the last: `[max_seqs + 1]`.
    pub fn cu_q_lens(&self) -> &[i32] {
        &self.cu_q_lens
    }

    /// Live sequences: `[1]`.
    pub fn num_seqs(&self) -> &[i32] {
        &self.num_seqs
    }

    /// Rows that belong to a sequence; those after them are padding.
    pub fn rows(&self) -> usize {
        self.cu_q_lens[self.num_seqs[0] as usize] as usize
    }

    /// Where the key and value of each of `tokens` rows go, `page * page_size + offset`; -1 for padding and idle rows.
    pub fn kv_slots(&self, tokens: usize) -> Vec<i32> {
        let mut slots = vec![NO_SLOT; tokens];
        for sequence in self.sequences() {
            for row in 0..sequence.q_len {
                let Some(position) = sequence.position(row) else { continue };
                slots[sequence.first_row + row] =
                    slot(sequence.pages[position / self.page_size], self.page_size, position) as i32;
            }
        }
        slots
    }

    /// The arrays in the order of the kernel's arguments: `kv_lens`, `page_indices`, `cu_q_lens`, `num_seqs`.
    pub fn to_tensors(&self) -> [HostTensor; 4] {
        let max_seqs = self.kv_lens.len();
        [
            HostTensor::new(&[max_seqs], &self.kv_lens),
            HostTensor::new(&[max_seqs, self.pages_per_seq], &self.page_indices),
            HostTensor::new(&[max_seqs + 1], &self.cu_q_lens),
            HostTensor::new(&[1], &self.num_seqs),
        ]
    }
}
