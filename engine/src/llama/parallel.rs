//! How a model is split over the devices of a group, and how its step programs exchange what they need of each other.
//!
//! A shard is a narrower Llama ([`Parallel::shard_of`]): its query heads and their KV heads, its part of the MLP's inner
//! width, its rows of the vocabulary. The graph of a step is the same, with two kinds of exchange in it (`Exchange`):
//! partial products are summed after attention's output projection, the MLP's down projection and the lookup of
//! embeddings; the logits' maxima, or all of them, are gathered before a token is chosen. All shards get the same bits, so
//! all choose the same token, and none has to be told.
//!
//! *Sums are f32*, whatever the compute type: a partial product is rounded once, after the sum, the bias and the residual
//! were added, as in one device's kernel. It costs twice the bytes of a sum in bf16, which MPI does not know.
//!
//! *Replicas, not partitions*: a program is emitted as one device runs it. XLA splits nothing.

use std::cell::Cell;
use std::num::NonZeroUsize;

use pagoda_ir::mosaic::tiling::LANES;
use pagoda_ir::stablehlo::{BackendConfig, Builder, CustomCall, Direction, ReplicaGroups, Tensor};
use pagoda_ir::{Element, Result};

use super::lowering::Lowering;
use crate::error::Error;
use crate::mesh::{Mesh, Shard};
use crate::model::ModelSpec;
use crate::model::quantization::Quantization;
use crate::model::spec::{Experts, GatedMlp, Mlp, SharedExpert};
use crate::{mpi, sampler};

/// The most rows of a vocabulary that one shard may hold: their numbers are exchanged as f32.
const MAX_ROWS: usize = 1 << 24;

/// Over how many devices a step program's model is split, and how they exchange sums.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Parallel {
    model: NonZeroUsize,
    reduce: Reduce,
}

/// Who adds up the shards' partial products.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reduce {
    /// Nobody: the model is whole.
    None,
    /// XLA, between the replicas of one program: groups of replicas, each in the order of its shards.
    Replicas(Vec<Vec<usize>>),
    /// MPI, between the processes of one replica, each of them a shard ([`mpi::ALL_REDUCE`]).
    Mpi,
}

impl Parallel {
    /// One device has the whole model.
    pub const ONE: Self = Self { model: NonZeroUsize::MIN, reduce: Reduce::None };

    /// One program on all devices of a mesh.
    pub fn replicas(mesh: Mesh) -> Self {
        match mesh.model.get() {
            1 => Self::ONE,
            _ => Self { model: mesh.model, reduce: Reduce::Replicas(mesh.groups()) },
        }
    }

    /// One program on the `model` devices of a group.
    pub fn group(model: NonZeroUsize) -> Self {
        Self::replicas(Mesh { model, ..Mesh::ONE })
    }

    /// A program per process, each on one device.
    pub fn processes(model: NonZeroUsize) -> Self {
        match model.get() {
            1 => Self::ONE,
            _ => Self { model, reduce: Reduce::Mpi },
        }
    }

    /// Shards of the model.
    pub fn model(&self) -> NonZeroUsize {
        self.model
    }

    /// Who adds up.
    pub fn reduce(&self) -> &Reduce {
        &self.reduce
    }

    /// Replicas that a program is emitted for.
    pub fn replica_count(&self) -> usize {
        match &self.reduce {
            Reduce::None | Reduce::Mpi => 1,
            Reduce::Replicas(groups) => groups.iter().map(Vec::len).sum(),
        }
    }

    /// Whether a model can be split like this: every shard has as many query heads, and whole KV heads or one that it
    /// shares.
    ///
    /// # Errors
    /// Names what `model` does not divide, and the values that would do.
    pub fn check(&self, config: &ModelSpec) -> crate::Result<()> {
        let Some(limit) = refusal(config, self.model.get()) else { return Ok(()) };
        let possible: Vec<_> = (1..=config.q_heads).filter(|&model| refusal(config, model).is_none()).collect();
        let fix = match &possible[..] {
            [] => "use a model with a smaller vocabulary".to_owned(),
            [one] => format!("use model = {one}"),
            [first @ .., last] => {
                let first: Vec<_> = first.iter().map(ToString::to_string).collect();
                format!("use model = {} or {last}", first.join(", "))
            }
        };
        Err(Error::setting("mesh model", self.model, limit, fix))
    }

    /// The sizes of one shard's model. The inner width of its MLP is a multiple of a register's lanes, as the TPU's gated
    /// matmul takes it; the columns that fill it up are zeros. The vocabulary is that of the largest shard.
    pub fn shard_of(&self, config: &ModelSpec) -> ModelSpec {
        let width = |units| Shard::width(units, self.model);
        let mlp = match config.mlp {
            Mlp::Gated(mlp) => Mlp::Gated(GatedMlp { inner: width(mlp.inner).next_multiple_of(LANES), ..mlp }),
            Mlp::Experts(experts) => {
                let of_shard = |inner| width(inner).next_multiple_of(LANES);
                let shared = experts.shared.map(|shared| SharedExpert { inner: of_shard(shared.inner), ..shared });
                Mlp::Experts(Experts { inner: of_shard(experts.inner), shared, ..experts })
            }
        };
        ModelSpec {
            q_heads: width(config.q_heads),
            kv_heads: width(config.kv_heads),
            mlp,
            vocab_size: width(config.vocab_size),
            ..config.clone()
        }
    }
}

/// Why a model cannot be split over `model` devices.
fn refusal(config: &ModelSpec, model: usize) -> Option<String> {
    let ModelSpec { q_heads, kv_heads, vocab_size, .. } = *config;
    let intermediate_size = config.mlp.inner();
    if !q_heads.is_multiple_of(model) {
        return Some(format!("does not divide num_attention_heads = {q_heads}"));
    }
    if !kv_heads.is_multiple_of(model) && !model.is_multiple_of(kv_heads) {
        return Some(format!("neither divides num_key_value_heads = {kv_heads} nor is a multiple of it"));
    }
    let shared = match &config.mlp {
        Mlp::Experts(Experts { shared: Some(shared), .. }) => Some(("shared_expert_intermediate_size", shared.inner)),
        _ => None,
    };
    for (key, size) in [("vocab_size", vocab_size), ("intermediate_size", intermediate_size)].into_iter().chain(shared)
    {
        if size < model {
            return Some(format!("exceeds {key} = {size}"));
        }
    }
    if let Some(group) = config.quantization.and_then(Quantization::group)
        && model > 1
    {
        for (key, width) in [
            ("num_attention_heads * head_dim", q_heads / model * config.head_dim),
            ("intermediate_size", intermediate_size.div_ceil(model)),
        ] {
            if !width.is_multiple_of(group) {
                return Some(format!("cuts a group of {group} features of {key} that share a scale"));
            }
        }
    }
    (model > 1 && vocab_size.div_ceil(model) > MAX_ROWS)
        .then(|| format!("leaves a shard more than {MAX_ROWS} of vocab_size = {vocab_size}"))
}

/// A model group as one process sees it: how its programs exchange sums, and which of its shards are this process's, each
/// on a device of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    parallel: Parallel,
    members: Vec<Member>,
}

/// A shard and the device that holds it, by its number among the client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// What it holds.
    pub shard: Shard,
    /// Who.
    pub device: usize,
}

impl Group {
    /// The whole model on device 0.
    pub fn one() -> Self {
        Self::replica(Mesh::ONE, 0)
    }

    /// Replica `replica` of a mesh over the devices of one client.
    pub fn replica(mesh: Mesh, replica: usize) -> Self {
        let first = replica * mesh.model.get();
        let members = Shard::all(mesh.model).map(|shard| Member { shard, device: first + shard.index });
        Self { parallel: Parallel::group(mesh.model), members: members.collect() }
    }

    /// Process `shard` of as many, with device 0 of its own client.
    pub fn process(shard: Shard) -> Self {
        Self { parallel: Parallel::processes(shard.of), members: vec![Member { shard, device: 0 }] }
    }

    /// How the programs exchange sums.
    pub fn parallel(&self) -> &Parallel {
        &self.parallel
    }

    /// This process's shards.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Their devices.
    pub fn devices(&self) -> Vec<usize> {
        self.members.iter().map(|member| member.device).collect()
    }
}

/// The exchanges of one region of a program, in the order in which they are emitted.
pub(super) struct Exchange<'p, 'c, 'a> {
    parallel: &'p Parallel,
    /// `i32[]`: the shard that runs; where there are several.
    shard: Option<Tensor<'c, 'a>>,
    /// The last result of MPI. Calls without a data dependence run in any order, another one in every process: each takes
    /// the last one's result. From one step of a loop to the next the chosen tokens are that dependence: the first
    /// exchange of a step looks them up.
    last: Cell<Option<Tensor<'c, 'a>>>,
}

impl<'p, 'c, 'a> Exchange<'p, 'c, 'a> {
    pub(super) fn new(parallel: &'p Parallel, shard: Option<Tensor<'c, 'a>>) -> Self {
        Self { parallel, shard, last: Cell::new(None) }
    }

    /// The exchanges of a loop's body, which are ordered by what the loop carries.
    pub(super) fn of_body(&self) -> Self {
        Self::new(self.parallel, self.shard)
    }

    /// Whether there are several shards.
    pub(super) fn is_split(&self) -> bool {
        self.shard.is_some()
    }

    /// The sum of all shards' `x`, an f32 array.
    pub(super) fn sum(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        match &self.parallel.reduce {
            Reduce::None => Ok(x),
            Reduce::Replicas(groups) => b.all_reduce_sum(x, &ReplicaGroups(groups.clone())),
            Reduce::Mpi => {
                let call = CustomCall {
                    backend_config: BackendConfig::Dictionary(Vec::new()),
                    has_side_effect: true,
                    ..CustomCall::default()
                };
                let last = self.last.get().unwrap_or(x);
                let sum = b.custom_call(mpi::ALL_REDUCE, &[x, last], &[x.ty()], call)?[0];
                self.last.set(Some(sum));
                Ok(sum)
            }
        }
    }

    /// All shards' `x`, an f32 array, in their order: `[shards, ..]`. MPI adds up what each has in its place among zeros.
    fn gather(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let mut dims = [vec![1], x.dims()].concat();
        let x = b.reshape(x, &dims)?;
        match (&self.parallel.reduce, self.shard) {
            (Reduce::Replicas(groups), _) => b.all_gather(x, 0, &ReplicaGroups(groups.clone())),
            (_, None) => Ok(x),
            (_, Some(shard)) => {
                let zero = b.scalar(Element::I32, 0.0)?;
                let mut starts = vec![zero; dims.len()];
                starts[0] = shard;
                dims[0] = self.parallel.model.get();
                self.sum(b, b.dynamic_update_slice(b.splat(Element::F32, &dims, 0.0)?, x, &starts)?)
            }
        }
    }

    /// Where this shard's rows of the vocabulary begin, if it has `rows` at most: `i32[]`.
    fn first_row(&self, b: &Builder<'c, 'a>, rows: usize) -> Result<Option<Tensor<'c, 'a>>> {
        self.shard.map(|shard| b.multiply(shard, b.scalar(Element::I32, rows as f64)?)).transpose()
    }

    /// Rows `ids i32[n]` of a table that is split by rows, of which this shard has `table [rows, width]`: `[n, width]`.
    pub(super) fn take(
        &self,
        b: &Builder<'c, 'a>,
        lowering: &dyn Lowering<'c>,
        table: Tensor<'c, 'a>,
        ids: Tensor<'c, 'a>,
    ) -> Result<Tensor<'c, 'a>> {
        let (rows, width) = (table.dims()[0], table.dims()[1]);
        let Some(first) = self.first_row(b, rows)? else { return lowering.take(b, table, ids) };
        let (count, dims) = (ids.dims(), [ids.dims()[0], width]);
        let ints = |value: f64| b.splat(Element::I32, &count, value);
        let ids = b.subtract(ids, b.broadcast_to(first, &count)?)?;
        let from_here = b.compare(ids, Direction::Ge, ints(0.0)?)?;
        let here = b.and(from_here, b.compare(ids, Direction::Lt, ints(rows as f64)?)?)?;
        let taken = b.convert(lowering.take(b, table, b.select(here, ids, ints(0.0)?)?)?, Element::F32)?;
        let mine = b.broadcast_in_dim(here, &dims, &[0])?;
        let taken = b.select(mine, taken, b.splat(Element::F32, &dims, 0.0)?)?;
        b.convert(self.sum(b, taken)?, table.element())
    }

    /// The logits `f32[n, vocab]` of which this shard has `logits f32[n, rows]`.
    pub(super) fn all_logits(
        &self,
        b: &Builder<'c, 'a>,
        logits: Tensor<'c, 'a>,
        vocab: usize,
    ) -> Result<Tensor<'c, 'a>> {
        if !self.is_split() {
            return Ok(logits);
        }
        let n = logits.dims()[0];
        let gathered = b.transpose(self.gather(b, logits)?, &[1, 0, 2])?; // [n, shards, rows]
        let padded = gathered.dims()[1] * gathered.dims()[2];
        b.slice_in_dim(b.reshape(gathered, &[n, padded])?, 0, vocab, 1)
    }

    /// The first index of each row's maximum, over all shards' logits: `i32[n]`. Each sends its own maximum only.
    pub(super) fn argmax(&self, b: &Builder<'c, 'a>, logits: Tensor<'c, 'a>, vocab: usize) -> Result<Tensor<'c, 'a>> {
        let dims = logits.dims(); // [n, rows]
        let (n, rows, shards) = (dims[0], dims[1], self.parallel.model.get());
        let Some(first) = self.first_row(b, rows)? else { return Ok(sampler::largest(b, logits)?.1) };
        let logits = if rows * shards == vocab {
            logits
        } else {
            // The last shard's rows beyond the vocabulary are zeros, whose logits are not to be chosen.
            let ids = b.add(b.iota(Element::I32, &dims, 1)?, b.broadcast_to(first, &dims)?)?;
            let real = b.compare(ids, Direction::Lt, b.splat(Element::I32, &dims, vocab as f64)?)?;
            b.select(real, logits, b.splat(Element::F32, &dims, f64::NEG_INFINITY)?)?
        };
        let (largest, at) = sampler::largest(b, logits)?;
        let column = |x: Tensor<'c, 'a>| b.reshape(b.convert(x, Element::F32)?, &[n, 1]);
        let gathered = self.gather(b, b.concatenate(&[column(largest)?, column(at)?], 1)?)?; // [shards, n, 2]
        let half = |at: usize| b.reshape(b.slice_in_dim(gathered, at, at + 1, 2)?, &[shards, n]);
        let (values, at) = (half(0)?, b.convert(half(1)?, Element::I32)?);
        let firsts =
            b.multiply(b.iota(Element::I32, &[shards, n], 0)?, b.splat(Element::I32, &[shards, n], rows as f64)?)?;
        let largest = b.broadcast_in_dim(b.reduce_max(values, &[0])?, &[shards, n], &[1])?;
        let is_largest = b.compare(values, Direction::Eq, largest)?;
        let none = b.splat(Element::I32, &[shards, n], (vocab - 1) as f64)?;
        b.reduce_min(b.select(is_largest, b.add(at, firsts)?, none)?, &[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(q_heads: usize, kv_heads: usize, vocab_size: usize) -> ModelSpec {
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": vocab_size, "hidden_size": 64, "head_dim": 16,
            "intermediate_size": 100, "num_hidden_layers": 1, "num_attention_heads": q_heads,
            "num_key_value_heads": kv_heads,
        });
        ModelSpec::parse(std::path::Path::new("config.json"), &json).unwrap()
    }

    fn over(model: usize) -> Parallel {
        Parallel::group(NonZeroUsize::new(model).unwrap())
    }

    #[test]
    fn a_model_is_split_where_its_heads_allow_it() {
        for (q, kv, model, message) in [
            (32, 8, 3, "mesh model = 3 does not divide num_attention_heads = 32: use model = 1, 2, 4, 8, 16 or 32"),
            (
                12,
                6,
                4,
                "mesh model = 4 neither divides num_key_value_heads = 6 nor is a multiple of it: use model = 1, 2, 3, 6 or 12",
            ),
            (
                64,
                8,
                128,
                "mesh model = 128 does not divide num_attention_heads = 64: use model = 1, 2, 4, 8, 16, 32 or 64",
            ),
            (1, 1, 2, "mesh model = 2 does not divide num_attention_heads = 1: use model = 1"),
        ] {
            let error = over(model).check(&config(q, kv, 512)).unwrap_err();
            assert_eq!((error.to_string().as_str(), error.exit_code()), (message, 2));
        }
        let error = over(4).check(&config(4, 4, 3)).unwrap_err().to_string();
        assert!(error.contains("mesh model = 4 exceeds vocab_size = 3: use model = 1 or 2"), "{error}");
        let sizes = |model, config: &ModelSpec| {
            over(model).check(config).unwrap();
            let ModelSpec { q_heads, kv_heads, mlp, vocab_size, .. } = over(model).shard_of(config);
            [q_heads, kv_heads, mlp.inner(), vocab_size]
        };
        let config = config(8, 2, 257);
        assert_eq!(
            [1, 2, 4, 8].map(|model| sizes(model, &config)),
            [[8, 2, 128, 257], [4, 1, 128, 129], [2, 1, 128, 65], [1, 1, 128, 33],]
        );
    }

    #[test]
    fn devices_follow_the_mesh() {
        let two = NonZeroUsize::new(2).unwrap();
        let mesh = Mesh { data: two, model: two };
        assert_eq!(Parallel::replicas(mesh).reduce(), &Reduce::Replicas(vec![vec![0, 1], vec![2, 3]]));
        assert_eq!(Parallel::replicas(mesh).replica_count(), 4);
        let group = Group::replica(mesh, 1);
        assert_eq!((group.devices(), group.parallel()), (vec![2, 3], &Parallel::group(two)));
        assert_eq!(Group::one().parallel(), &Parallel::ONE);
        let process = Group::process(Shard { index: 1, of: two });
        assert_eq!((process.devices(), process.parallel().reduce()), (vec![0], &Reduce::Mpi));
    }
}
