//! A kernel's problem on the command line, and what follows from it: requests, plans, emissions, inputs.
//!
//! Everything that an emission depends on can be written as words of the command line ([`Kernel::words`]); `pagoda emit`
//! puts them into the first line of what it writes, and `pagoda run` finds them there ([`Kernel::of_text`]).

use std::path::Path;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pagoda_ir::{Context, HostTensor, mosaic, stablehlo};
use pagoda_kernels::plan::KernelPlan;
use pagoda_kernels::random::Lengths;
use pagoda_kernels::vmem::Bytes;
use pagoda_kernels::{MosaicCase, matmul, random, rpa};

use super::super::Compute;
use crate::certify;
use crate::error::{Error, Result};

/// What the first line of an emitted text begins with.
const HEADER: &str = "// pagoda emit ";

/// The kernels that can be asked for.
#[derive(Clone, Debug, Subcommand)]
pub(in crate::cli) enum Kernel {
    /// out[m,n] = x[m,k] w[k,n] (row-major; see --layout), with f32 accumulation.
    Matmul(Matmul),
    /// Ragged paged attention: prefill and decode rows of many sequences over a paged KV cache.
    Rpa(Rpa),
}

#[derive(Clone, Debug, Args)]
pub(in crate::cli) struct Matmul {
    /// Rows of x and out.
    #[arg(long)]
    m: usize,
    /// Columns of w and out.
    #[arg(long)]
    n: usize,
    /// What is summed over: columns of x, rows of w.
    #[arg(long)]
    k: usize,
    /// Type of x and w.
    #[arg(long, value_enum, default_value_t = Compute::Bf16)]
    dtype: Compute,
    /// Type of out [default: that of x and w].
    #[arg(long, value_enum)]
    out_dtype: Option<Compute>,
    /// How x, w and out lie in memory.
    #[arg(long, value_enum, default_value_t = Layout::RowMajor)]
    layout: Layout,
    /// Add a bias per column.
    #[arg(long)]
    bias: bool,
    /// w has 2n columns, gates before ups: out = silu(gate) * up. n is a multiple of 128 (row-major) or 8.
    #[arg(long)]
    silu_gate: bool,
    /// Add a residual of out's shape.
    #[arg(long)]
    residual: bool,
    /// Tile sizes [default: the planner's choice].
    #[arg(long, value_name = "M,N,K")]
    tiles: Option<String>,
    #[command(flatten)]
    target: Target,
}

#[derive(Clone, Debug, Args)]
pub(in crate::cli) struct Rpa {
    /// Rows, query heads and head dimension of q, such as 1024x32x128.
    #[arg(long, value_name = "TOKENSxHEADSxDIM")]
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
    #[arg(long, value_enum, default_value_t = Compute::Bf16)]
    dtype: Compute,
    /// Layers whose pages share the KV buffer, one after another.
    #[arg(long, default_value_t = 1)]
    layers: usize,
    /// A row sees this many keys at most, its own included.
    #[arg(long, value_name = "KEYS")]
    sliding_window: Option<usize>,
    /// Logits x become c * tanh(x / c).
    #[arg(long, value_name = "C")]
    soft_cap: Option<f64>,
    /// Batches of decode rows only: at most one row per sequence.
    #[arg(long)]
    decode: bool,
    /// Query rows and KV pages of a block [default: the planner's choice].
    #[arg(long, value_name = "Q,P")]
    tiles: Option<String>,
    #[command(flatten)]
    target: Target,
}

#[derive(Clone, Debug, Args)]
struct Target {
    /// The chip: v4, v5e, v5p, v6e or tpu7x.
    #[arg(long, default_value = "v5p")]
    chip: String,
    /// Scoped VMEM that the kernel may take, such as 16MiB [default: the chip's].
    #[arg(long, value_name = "SIZE")]
    vmem_limit: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Layout {
    /// A [m,k], B [k,n], C [m,n].
    RowMajor,
    /// A [m,k], B [n,k], C [m,n].
    WeightTransposed,
    /// A [k,m], B [n,k], C [n,m].
    FeatureMajor,
}

/// The words of a header, for clap.
#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
struct Header {
    #[command(subcommand)]
    kernel: Kernel,
}

impl Matmul {
    fn request(&self) -> certify::matmul::Request {
        let input = self.dtype.element();
        certify::matmul::Request {
            spec: matmul::Spec {
                m: self.m,
                k: self.k,
                n: self.n,
                input,
                output: self.out_dtype.map_or(input, Compute::element),
                layout: match self.layout {
                    Layout::RowMajor => matmul::Layout::RowMajor,
                    Layout::WeightTransposed => matmul::Layout::WeightTransposed,
                    Layout::FeatureMajor => matmul::Layout::FeatureMajor,
                },
                epilogue: matmul::Epilogue {
                    bias: self.bias,
                    activation: match self.silu_gate {
                        true => matmul::Activation::SiluGate,
                        false => matmul::Activation::Identity,
                    },
                    residual: self.residual,
                },
            },
            chip: self.target.chip.clone(),
            vmem_limit: self.target.vmem_limit.clone(),
            tiles: self.tiles.clone(),
        }
    }

    fn words(&self) -> Vec<String> {
        let mut words = vec!["matmul".to_owned()];
        for (key, size) in [("--m", self.m), ("--n", self.n), ("--k", self.k)] {
            words.extend([key.to_owned(), size.to_string()]);
        }
        words.extend(["--dtype".to_owned(), value_name(self.dtype)]);
        words.extend(self.out_dtype.map(|dtype| ["--out-dtype".to_owned(), value_name(dtype)]).into_iter().flatten());
        if self.layout != Layout::RowMajor {
            words.extend(["--layout".to_owned(), value_name(self.layout)]);
        }
        let flags = [("--bias", self.bias), ("--silu-gate", self.silu_gate), ("--residual", self.residual)];
        words.extend(flags.into_iter().filter(|(_, set)| *set).map(|(flag, _)| flag.to_owned()));
        words
    }
}

impl Rpa {
    fn request(&self) -> certify::rpa::Request {
        certify::rpa::Request {
            q: self.q.clone(),
            kv_heads: self.kv_heads,
            page_size: self.page_size,
            max_seq_len: self.max_seq_len,
            max_seqs: self.max_seqs,
            layers: self.layers,
            element: self.dtype.element(),
            kind: if self.decode { rpa::Kind::Decode } else { rpa::Kind::Mixed },
            sliding_window: self.sliding_window,
            soft_cap: self.soft_cap,
            chip: self.target.chip.clone(),
            vmem_limit: self.target.vmem_limit.clone(),
            tiles: self.tiles.clone(),
        }
    }

    fn words(&self) -> Vec<String> {
        let mut words = vec!["rpa".to_owned(), "--q".to_owned(), self.q.replace(' ', "")];
        for (key, size) in [
            ("--kv-heads", Some(self.kv_heads)),
            ("--page-size", Some(self.page_size)),
            ("--max-seq-len", Some(self.max_seq_len)),
            ("--max-seqs", Some(self.max_seqs)),
            ("--layers", Some(self.layers).filter(|&layers| layers != 1)),
            ("--sliding-window", self.sliding_window),
        ] {
            words.extend(size.map(|size| [key.to_owned(), size.to_string()]).into_iter().flatten());
        }
        words.extend(["--dtype".to_owned(), value_name(self.dtype)]);
        words.extend(self.soft_cap.map(|cap| ["--soft-cap".to_owned(), cap.to_string()]).into_iter().flatten());
        words.extend(self.decode.then(|| "--decode".to_owned()));
        words
    }
}

/// A value as clap reads it.
fn value_name(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

impl Kernel {
    /// Plans it.
    ///
    /// # Errors
    /// The first value that cannot work.
    pub(super) fn plan(&self) -> Result<Plan> {
        Ok(match self {
            Self::Matmul(args) => Plan::Matmul(args.request().plan()?),
            Self::Rpa(args) => Plan::Rpa(args.request().plan()?),
        })
    }

    /// The words that ask for exactly `plan`: tiles, chip and limit written out.
    fn words(&self, plan: &Plan) -> String {
        let mut words = match self {
            Self::Matmul(args) => args.words(),
            Self::Rpa(args) => args.words(),
        };
        let (tiles, chip, limit) = match plan {
            Plan::Matmul(plan) => (plan.tiles().to_string(), plan.chip(), plan.limit()),
            Plan::Rpa(plan) => (plan.tiles().to_string(), plan.chip(), plan.limit()),
        };
        let mib = Bytes::mib(1).0;
        let limit = if limit.0.is_multiple_of(mib) { format!("{}MiB", limit.0 / mib) } else { limit.0.to_string() };
        words.extend(["--tiles".to_owned(), tiles, "--chip".to_owned(), chip.name().to_owned()]);
        words.extend(["--vmem-limit".to_owned(), limit]);
        words.join(" ")
    }

    /// The first line of an emission of `plan`.
    pub(super) fn header(&self, plan: &Plan) -> String {
        format!("{HEADER}{}\n", self.words(plan))
    }

    /// The kernel that the first line of an emitted text names; `None` if it names none.
    ///
    /// # Errors
    /// When the line is damaged.
    pub(super) fn of_text(text: &[u8], path: &Path) -> Result<Option<Self>> {
        let line = text.split(|&byte| byte == b'\n').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        let Some(words) = line.strip_prefix(HEADER) else { return Ok(None) };
        let header = Header::try_parse_from(words.split_whitespace()).map_err(|error| {
            let message = error.to_string();
            let problem = message.lines().next().unwrap_or_default().trim_start_matches("error: ");
            Error::file(path, format!("line 1 names no kernel: {problem}"), "emit the kernel again, or delete the line")
        })?;
        Ok(Some(header.kernel))
    }

    /// `pagoda plan`: the plan, told.
    pub(super) fn planned(&self) -> Result<Box<dyn super::Answer>> {
        Ok(match self {
            Self::Matmul(args) => Box::new(certify::matmul::plan_matmul(&args.request())?),
            Self::Rpa(args) => Box::new(certify::rpa::plan_rpa(&args.request())?),
        })
    }

    /// `pagoda certify`: the plan and the compiler's answer, and whether the kernel compiles.
    pub(super) fn certified(&self, certifier: &certify::Certifier) -> Result<(Box<dyn super::Answer>, bool)> {
        Ok(match self {
            Self::Matmul(args) => {
                let certified = certify::matmul::certify_matmul(&args.request(), certifier)?;
                let compiles = certified.certificate.compiles();
                (Box::new(certified), compiles)
            }
            Self::Rpa(args) => {
                let certified = certify::rpa::certify_rpa(&args.request(), certifier)?;
                let compiles = certified.certificate.compiles();
                (Box::new(certified), compiles)
            }
        })
    }
}

/// A planned kernel.
#[derive(Clone, Debug)]
pub(super) enum Plan {
    Matmul(matmul::plan::Plan),
    Rpa(rpa::plan::Plan),
}

impl Plan {
    /// The Mosaic kernel.
    pub(super) fn kernel<'c>(&self, context: &'c Context) -> pagoda_ir::Result<mosaic::Kernel<'c>> {
        match self {
            Self::Matmul(plan) => matmul::mosaic::kernel(context, plan),
            Self::Rpa(plan) => rpa::mosaic::kernel(context, plan),
        }
    }

    /// The StableHLO module that carries the Mosaic kernel in wire form.
    pub(super) fn wire<'c>(&self, context: &'c Context) -> pagoda_ir::Result<stablehlo::Module<'c>> {
        match self {
            Self::Matmul(plan) => plan.module(context),
            Self::Rpa(plan) => plan.module(context),
        }
    }

    /// The same function as plain StableHLO.
    pub(super) fn stablehlo<'c>(&self, context: &'c Context) -> pagoda_ir::Result<stablehlo::Module<'c>> {
        match self {
            Self::Matmul(plan) => matmul::stablehlo::module(context, plan.problem()),
            Self::Rpa(plan) => rpa::stablehlo::module(context, plan.problem()),
        }
    }

    /// Names and types of the problem's arguments, in the order of the StableHLO forms.
    pub(super) fn arguments(&self) -> Vec<(&'static str, pagoda_ir::TensorType)> {
        match self {
            Self::Matmul(plan) => {
                let epilogue = plan.problem().epilogue;
                let optional = [epilogue.bias.then_some("bias"), epilogue.residual.then_some("residual")];
                let names = ["x", "w"].into_iter().chain(optional.into_iter().flatten());
                names.zip(plan.problem().argument_types()).collect()
            }
            Self::Rpa(plan) => {
                let names = ["q", "kv_pages", "kv_lens", "page_indices", "cu_q_lens", "num_seqs", "first_page"];
                names.into_iter().zip(plan.problem().argument_types()).collect()
            }
        }
    }

    /// Inputs drawn from `seed`, over sequences of these `lengths` if there are any, except those that are `given` by name.
    ///
    /// # Errors
    /// When the lengths or the given ragged metadata are no batch of the problem.
    pub(super) fn inputs(
        self,
        seed: u64,
        lengths: Option<&str>,
        mut given: impl FnMut(&str) -> Option<HostTensor>,
    ) -> Result<Case> {
        Ok(match self {
            Self::Matmul(_) if lengths.is_some() => {
                let value = lengths.unwrap_or_default();
                return Err(Error::setting("lengths", value, "are of no use to a matmul", "leave them out"));
            }
            Self::Matmul(plan) => {
                let mut inputs = random::matmul_inputs(plan.problem(), seed);
                let mut replace = |name, array: &mut HostTensor| *array = given(name).unwrap_or_else(|| array.clone());
                replace("x", &mut inputs.x);
                replace("w", &mut inputs.w);
                inputs.bias.iter_mut().for_each(|bias| replace("bias", bias));
                inputs.residual.iter_mut().for_each(|residual| replace("residual", residual));
                Case::Matmul(plan, inputs)
            }
            Self::Rpa(plan) => {
                let problem = plan.problem();
                let mut inputs = match lengths {
                    None => random::rpa_inputs(problem, seed),
                    Some(text) => {
                        let layer = random::layer_of(problem, seed);
                        random::rpa_inputs_of(problem, &batch_lengths(problem, text)?, layer, seed)
                    }
                };
                if let Some(first_page) = given("first_page") {
                    let first = first_page.as_slice::<i32>()[0];
                    let layer = usize::try_from(first).ok().filter(|page| page.is_multiple_of(problem.pages));
                    let layer = layer.map(|page| page / problem.pages).filter(|&layer| layer < problem.layers);
                    inputs.layer = layer.ok_or_else(|| {
                        let limit = format!("is not the first page of a layer of {} pages", problem.pages);
                        Error::setting("first_page", first, limit, "give a multiple of them, below layers * pages")
                    })?;
                }
                inputs.q = given("q").unwrap_or(inputs.q);
                inputs.kv_pages = given("kv_pages").unwrap_or(inputs.kv_pages);
                let drawn = inputs.batch.to_tensors();
                let names = ["kv_lens", "page_indices", "cu_q_lens", "num_seqs"];
                let arrays: [Option<HostTensor>; 4] = names.map(&mut given);
                if arrays.iter().any(Option::is_some) {
                    let mut arrays = arrays.into_iter().zip(drawn).map(|(array, drawn)| array.unwrap_or(drawn));
                    let mut next = || arrays.next().map(|array| array.as_slice::<i32>().to_vec()).unwrap_or_default();
                    let [kv_lens, page_indices, cu_q_lens, num_seqs] = [next(), next(), next(), next()];
                    let num_seqs = usize::try_from(num_seqs[0]).map_err(|_| {
                        Error::setting("num_seqs", num_seqs[0], "is below 0", "give the number of sequences")
                    })?;
                    let batch = rpa::Batch::new(plan.problem(), &kv_lens, &page_indices, &cu_q_lens, num_seqs);
                    inputs.batch = batch
                        .map_err(|invalid| Error::setting(invalid.key, invalid.value, invalid.limit, invalid.fix))?;
                }
                Case::Rpa(plan, inputs)
            }
        })
    }
}

/// Reads `ROWS/KEYS,...`, the lengths of each sequence of a batch.
fn batch_lengths(problem: &rpa::Problem, text: &str) -> Result<Vec<Lengths>> {
    let refuse = |limit: String, fix: &str| Error::setting("lengths", text, limit, fix);
    let sequence = |part: &str| {
        let (q_len, kv_len) = part.trim().split_once('/')?;
        Some(Lengths { q_len: q_len.parse().ok()?, kv_len: kv_len.parse().ok()? })
    };
    let lengths: Option<Vec<_>> = match text {
        "none" => Some(vec![]),
        text => text.split(',').map(sequence).collect(),
    };
    let lengths = lengths.ok_or_else(|| refuse("are not ROWS/KEYS,...".into(), "write e.g. 1/60,13/13, or none"))?;
    if lengths.len() > problem.max_seqs {
        return Err(refuse(format!("are more than max-seqs = {}", problem.max_seqs), "give fewer sequences"));
    }
    let mut rows = 0_usize;
    for (seq, &Lengths { q_len, kv_len }) in lengths.iter().enumerate() {
        let decode = problem.kind == rpa::Kind::Decode;
        if kv_len > problem.max_kv_len() || q_len > kv_len || (decode && q_len > 1) {
            let most = if decode { ", and at most 1 row" } else { "" };
            let limit = format!("sequence {seq}: more rows than keys, or than {} keys{most}", problem.max_kv_len());
            return Err(refuse(limit, "keys count those of the sequence's rows"));
        }
        rows += q_len;
    }
    if rows > problem.tokens {
        return Err(refuse(format!("have {rows} rows; q has {}", problem.tokens), "give fewer rows"));
    }
    Ok(lengths)
}

/// A planned kernel with inputs of its problem.
#[derive(Debug)]
pub(super) enum Case {
    Matmul(matmul::plan::Plan, matmul::Inputs),
    Rpa(rpa::plan::Plan, rpa::Inputs),
}

impl Case {
    pub(super) fn mosaic(&self) -> MosaicCase<'_> {
        match self {
            Self::Matmul(plan, inputs) => MosaicCase::Matmul(plan, inputs),
            Self::Rpa(plan, inputs) => MosaicCase::Rpa(plan, inputs),
        }
    }

    pub(super) fn plan(&self) -> Plan {
        match self {
            Self::Matmul(plan, _) => Plan::Matmul(plan.clone()),
            Self::Rpa(plan, _) => Plan::Rpa(plan.clone()),
        }
    }

    /// The arguments of the StableHLO form.
    pub(super) fn arguments(&self) -> Vec<HostTensor> {
        match self {
            Self::Matmul(_, inputs) => inputs.to_tensors(),
            Self::Rpa(plan, inputs) => inputs.to_tensors(plan.problem()),
        }
    }

    /// Leading elements of the output that are results; what follows is padding, which only the Mosaic form promises to
    /// be zero.
    pub(super) fn live(&self) -> usize {
        match self {
            Self::Matmul(plan, _) => plan.problem().output_type().len(),
            Self::Rpa(plan, inputs) => inputs.batch.rows() * plan.problem().q_heads * plan.problem().head_dim,
        }
    }

    /// The batch in a line, for attention.
    pub(super) fn describe(&self) -> Option<String> {
        let Self::Rpa(_, inputs) = self else { return None };
        let lengths: Vec<_> =
            inputs.batch.sequences().map(|sequence| format!("{}/{}", sequence.q_len, sequence.kv_len)).collect();
        Some(format!("{} sequences (rows/keys): {}", lengths.len(), lengths.join(",")))
    }
}
