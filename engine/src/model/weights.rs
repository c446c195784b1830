//! Safetensors weights, memory-mapped: one file, or shards named by `model.safetensors.index.json`.
//!
//! Nothing is copied on opening: a tensor's bytes are read by the system when they are used, and can be dropped again
//! after upload ([`Weights::release`]), so loading holds at most one tensor in memory beyond what the device holds.
//! The files must not be changed while they are mapped (a truncated mapping faults on access).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::{Mmap, UncheckedAdvice};
use pagoda_ir::Bytes;
use pagoda_ir::element::Element;
use pagoda_ir::mosaic::tiling::LANES;
use pagoda_ir::tensor::HostTensor;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};

use super::spec::{ExpertProjections, Experts, Mlp, ModelSpec, Parts, QkNorm, SharedExpert};
use super::{mxfp4, read_json};
use crate::error::{Error, Result};
use crate::mesh;
use crate::output::fingerprint;

/// A tensor that a model needs: one of its files, or some rows of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the safetensors files.
    pub name: String,
    /// Its shape, row-major. Projections are `[out, in]`.
    pub dims: Vec<usize>,
    /// What its values are.
    pub holds: Holds,
    /// The dimension along which it is split over shards, and into what; without one, every shard has all of it.
    split: Option<(usize, Units)>,
    /// Where it is some rows of the tensor in the file: the first of them, and how many the file's has.
    fused: Option<(usize, usize)>,
    /// How its rows are turned on loading.
    heads: Option<Heads>,
    /// Where it is an expert's part of a tensor of all experts.
    of_expert: Option<OfExpert>,
}

/// Features of one expert of a tensor `[experts, in, features]`, of `[experts, features]`, or in 4 bits of `[experts,
/// features, in]`: each `step`th from `first` on. They are loaded as rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OfExpert {
    expert: usize,
    experts: usize,
    first: usize,
    step: usize,
    features: usize,
    is_mxfp4: bool,
}

impl OfExpert {
    /// The rows, `dims` of them, of what the file has of the expert: of numbers of 4 bits, their blocks and `scales`.
    fn rows(self, stored: &TensorView<'_>, scales: Option<&[u8]>, dims: &[usize]) -> HostTensor {
        let (rows, columns) = (dims[0], dims[1..].iter().product::<usize>());
        if let Some(scales) = scales {
            let blocks = stored.bytes.as_chunks().0;
            let of_row = |row: usize| {
                let (feature, blocks_of) = (self.first + row * self.step, columns / mxfp4::BLOCK);
                let of_feature = feature * blocks_of..(feature + 1) * blocks_of;
                of_feature.flat_map(|at| mxfp4::decoded(&blocks[at], scales[at]))
            };
            return HostTensor::new(dims, &(0..rows).flat_map(of_row).collect::<Vec<_>>());
        }
        let values = stored.to_f64();
        let of_row = |row: usize| {
            let feature = self.first + row * self.step;
            let values = &values;
            (0..columns).map(move |column| values[column * self.features + feature])
        };
        HostTensor::from_f64(Element::F32, dims, &(0..rows).flat_map(of_row).collect::<Vec<_>>())
    }
}

/// Rows that are heads, of which only the first `rotated` features turn, in pairs `(i, i + rotated / 2)`. Attention turns the
/// pairs `(i, i + width / 2)`, so rows are loaded in another order: those that turn come first in either half. A dot product of
/// a query and a key is the same in any order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Heads {
    width: usize,
    rotated: usize,
}

impl Heads {
    /// Where the feature at `place` of a head is in the file.
    fn stored(self, place: usize) -> usize {
        let Self { width, rotated } = self;
        let (half, turning) = (width / 2, rotated / 2);
        match (place / half, place % half) {
            (side, at) if at < turning => side * turning + at,
            (side, at) => rotated + side * (half - turning) + at - turning,
        }
    }
}

/// What the values of a tensor are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// Numbers of some float type, converted to the one that is computed in.
    Numbers,
    /// Elements of 8 bits, each standing for itself times a scale: loaded as they are.
    Quantized(Element),
    /// The scales of another tensor, `[out, groups of in]`: loaded as f32. A file may leave out a last dimension of 1, or
    /// give one scale for all.
    Scales,
}

/// What a dimension is split into: equal units that stay whole (heads, rows of the vocabulary, values between the MLP's
/// projections).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Units {
    count: usize,
    /// A shard's units are filled up to a multiple of this many with zeros.
    multiple: usize,
}

/// A dimension of a tensor.
#[derive(Clone, Copy)]
struct Axis {
    size: usize,
    units: Option<Units>,
}

impl Axis {
    const fn whole(size: usize) -> Self {
        Self { size, units: None }
    }

    /// `count` units of `width` values.
    const fn split(count: usize, width: usize, multiple: usize) -> Self {
        Self { size: count * width, units: Some(Units { count, multiple }) }
    }

    /// The groups of features that have scales of their own. Units are smaller than a group, or whole groups: where shards
    /// would cut one, [`Parallel::check`](crate::llama::Parallel::check) refuses the model.
    fn groups(self, group: Option<usize>) -> Self {
        let Some(group) = group else { return Self::whole(1) };
        let Some(Units { count, multiple }) = self.units else { return Self::whole(self.size / group) };
        match self.size / count {
            width if width.is_multiple_of(group) => Self::split(count, width / group, multiple),
            _ => Self::split(self.size / group, 1, multiple.div_ceil(group)),
        }
    }
}

impl TensorSpec {
    fn new(name: String, axes: impl IntoIterator<Item = Axis>) -> Self {
        let axes = Vec::from_iter(axes);
        let split = axes.iter().enumerate().find_map(|(at, axis)| Some((at, axis.units?)));
        let dims = axes.iter().map(|axis| axis.size).collect();
        Self { name, dims, holds: Holds::Numbers, split, fused: None, heads: None, of_expert: None }
    }

    /// The shape of the tensor in the file, of which it may be some rows.
    pub fn stored_dims(&self) -> Vec<usize> {
        let mut dims = self.dims.clone();
        match self.of_expert {
            Some(OfExpert { experts, features, is_mxfp4: false, .. }) => {
                return [&[experts], &dims[1..], &[features]].concat();
            }
            Some(OfExpert { experts, features, .. }) => {
                return vec![experts, features, dims[1] / mxfp4::BLOCK, mxfp4::BYTES];
            }
            None => {}
        }
        if let Some((_, rows)) = self.fused {
            dims[0] = rows;
        }
        dims
    }

    fn is_mxfp4(&self) -> bool {
        self.of_expert.is_some_and(|of| of.is_mxfp4)
    }

    /// The tensor of the scales of blocks.
    fn scales_name(&self) -> Option<String> {
        self.is_mxfp4().then(|| format!("{}_scales", self.name.trim_end_matches("_blocks")))
    }

    fn holding(self, holds: Holds) -> Self {
        Self { holds, ..self }
    }

    /// The type that it is loaded as, where numbers are computed in `compute`, and matrices of them kept in `matrices`.
    pub fn element(&self, compute: Element, matrices: Element) -> Element {
        match self.holds {
            Holds::Numbers if self.is_matrix() => matrices,
            Holds::Numbers => compute,
            Holds::Quantized(element) => element,
            Holds::Scales => Element::F32,
        }
    }

    fn is_matrix(&self) -> bool {
        self.dims.len() == 2
    }

    /// A tensor that every shard has all of.
    pub fn whole(name: &str, dims: &[usize]) -> Self {
        Self::new(name.into(), dims.iter().map(|&dim| Axis::whole(dim)))
    }

    /// The shape of a shard's part: of the largest, to which the others are filled up with zeros.
    pub fn dims_of(&self, shard: mesh::Shard) -> Vec<usize> {
        self.part(shard).dims
    }

    fn part(&self, shard: mesh::Shard) -> Part {
        let whole = Part { dims: self.dims.clone(), axis: 0, range: 0..self.dims[0] };
        let Some((axis, units)) = self.split else { return whole };
        let width = self.dims[axis] / units.count;
        let mut dims = self.dims.clone();
        dims[axis] = mesh::Shard::width(units.count, shard.of).next_multiple_of(units.multiple) * width;
        let range = shard.range(units.count);
        // Not by the size alone: a part that is filled up may be as large as the whole.
        if dims == self.dims && range.len() == units.count {
            return whole;
        }
        Part { dims, axis, range: range.start * width..range.end * width }
    }
}

/// What a shard has of a tensor: `range` of dimension `axis`, and zeros behind it up to the size in `dims`.
struct Part {
    dims: Vec<usize>,
    axis: usize,
    range: Range<usize>,
}

/// Every tensor of a model, in the order of the forward pass.
pub fn expected_tensors(config: &ModelSpec) -> Vec<TensorSpec> {
    let TensorGroups { embedding, layers, last } = tensor_groups(config);
    std::iter::once(embedding).chain(layers.into_iter().flatten()).chain(last).flatten().collect()
}

/// Tensors of one width (or vectors) that are applied together, and can be stacked along their rows.
pub type Tensors = Vec<TensorSpec>;

/// The tensors of a model in groups, in the order of the forward pass.
pub struct TensorGroups {
    /// The embedding.
    pub embedding: Tensors,
    /// Those of each layer, as many of the same sizes in every one.
    pub layers: Vec<Vec<Tensors>>,
    /// The final norm, and the head (and its scales) if it is not the embedding.
    pub last: Vec<Tensors>,
}

/// Rows of a tensor of a layer.
#[derive(Clone, Copy)]
struct Rows {
    /// Its name within the layer.
    name: &'static str,
    axis: Axis,
    fused: Option<(usize, usize)>,
    heads: Option<Heads>,
}

impl Rows {
    fn new(name: &'static str, axis: Axis) -> Self {
        Self { name, axis, fused: None, heads: None }
    }

    /// Of tensors that are applied together, each its own or all in one.
    fn of<const N: usize>(parts: Parts<N>, axes: [Axis; N]) -> [Self; N] {
        let rows: usize = axes.iter().map(|axis| axis.size).sum();
        std::array::from_fn(|at| match parts {
            Parts::Apart(names) => Self::new(names[at], axes[at]),
            Parts::Fused(name) => {
                let first = axes[..at].iter().map(|axis| axis.size).sum();
                Self { fused: Some((first, rows)), ..Self::new(name, axes[at]) }
            }
        })
    }
}

/// The groups of one layer, one after another.
struct LayerGroups<'m> {
    config: &'m ModelSpec,
    layer: usize,
    groups: Vec<Tensors>,
}

impl LayerGroups<'_> {
    fn group(&mut self, rows: &[Rows], kind: &str, columns: Option<Axis>, holds: Holds) {
        let specs = rows.iter().map(|&Rows { name, axis, fused, heads }| {
            let name = format!("model.layers.{}.{name}{kind}", self.layer);
            let spec = TensorSpec::new(name, [axis].into_iter().chain(columns)).holding(holds);
            TensorSpec { fused, heads, ..spec }
        });
        self.groups.push(specs.collect());
    }

    fn vector(&mut self, rows: Rows, kind: &str) {
        self.group(&[rows], kind, None, Holds::Numbers);
    }

    /// A norm of the residual stream, where there is one.
    fn norm(&mut self, at: usize, there: bool) {
        if there {
            self.vector(Rows::new(self.config.names.norms[at], Axis::whole(self.config.hidden_size)), ".weight");
        }
    }

    fn projection(&mut self, rows: &[Rows], columns: Axis, bias: bool) {
        match self.config.quantization {
            None => self.group(rows, ".weight", Some(columns), Holds::Numbers),
            Some(quantization) => {
                self.group(rows, ".weight", Some(columns), Holds::Quantized(quantization.weight));
                self.group(rows, ".weight_scale", Some(columns.groups(quantization.group())), Holds::Scales);
            }
        }
        if bias {
            self.group(rows, ".bias", None, Holds::Numbers);
        }
    }
}

impl LayerGroups<'_> {
    /// The router; gates and ups of all experts, one expert after another; their down projections; of the expert that all
    /// tokens share its gate, its gates and ups, and its down projection.
    fn experts(&mut self, experts: &Experts) {
        let Experts { count, inner, bias, shared, names, .. } = *experts;
        let (hidden, inner) = (Axis::whole(self.config.hidden_size), Axis::split(inner, 1, LANES));
        let router = Rows::new(names.router, Axis::whole(count));
        self.group(&[router], ".weight", Some(hidden), Holds::Numbers);
        if bias {
            self.vector(router, ".bias");
        }
        let prefix = format!("model.layers.{}.{}", self.layer, names.experts);
        let mut group = |of_expert: &dyn Fn(usize) -> Vec<TensorSpec>| {
            self.groups.push((0..count).flat_map(of_expert).collect());
        };
        match names.projections {
            ExpertProjections::Apart([gate, up, down]) => {
                let spec = |expert, name, axes| TensorSpec::new(format!("{prefix}.{expert}.{name}.weight"), axes);
                group(&|expert| [gate, up].map(|name| spec(expert, name, [inner, hidden])).to_vec());
                group(&|expert| vec![spec(expert, down, [hidden, inner])]);
            }
            ExpertProjections::Together([gate_up, down]) | ExpertProjections::Mxfp4([gate_up, down]) => {
                let in_4_bits = matches!(names.projections, ExpertProjections::Mxfp4(_));
                let spec = |expert, name: String, axes: &[Axis], [first, step, features]: [usize; 3]| {
                    let is_mxfp4 = in_4_bits && axes.len() > 1;
                    let of_expert = Some(OfExpert { expert, experts: count, first, step, features, is_mxfp4 });
                    TensorSpec { of_expert, ..TensorSpec::new(name, axes.iter().copied()) }
                };
                let (gates, downs) = (2 * inner.size, hidden.size);
                let blocks = if in_4_bits { "_blocks" } else { "" };
                let of = |name: &str| [format!("{prefix}.{name}{blocks}"), format!("{prefix}.{name}_bias")];
                let ([gate_up, gate_up_bias], [down, down_bias]) = (of(gate_up), of(down));
                let both = |expert, name: &str, axes: &[Axis]| {
                    [0, 1].map(|first| spec(expert, name.to_owned(), axes, [first, 2, gates])).to_vec()
                };
                group(&|expert| both(expert, &gate_up, &[inner, hidden]));
                if bias {
                    group(&|expert| both(expert, &gate_up_bias, &[inner]));
                }
                group(&|expert| vec![spec(expert, down.clone(), &[hidden, inner], [0, 1, downs])]);
                if bias {
                    group(&|expert| vec![spec(expert, down_bias.clone(), &[hidden], [0, 1, downs])]);
                }
            }
        }
        if let Some(SharedExpert { inner, names: (gate_up, down, gate) }) = shared {
            let inner = Axis::split(inner, 1, LANES);
            self.projection(&[Rows::new(gate, Axis::whole(1))], hidden, false);
            self.projection(&gate_up.map(|name| Rows::new(name, inner)), hidden, false);
            self.projection(&[Rows::new(down, hidden)], inner, false);
        }
    }
}

/// As [`expected_tensors`], in groups. Query, key and value projections are a group, their scales and their biases are,
/// gate and up; all others stand alone. A shard's part of a group is its part of each tensor.
pub fn tensor_groups(config: &ModelSpec) -> TensorGroups {
    let hidden = Axis::whole(config.hidden_size);
    let vocab = Axis::split(config.vocab_size, 1, 1);
    let [q, kv] = [config.q_heads, config.kv_heads].map(|heads| Axis::split(heads, config.head_dim, 1));
    let partial = Heads { width: config.head_dim, rotated: config.rotated() };
    let turned = (1..config.head_dim).contains(&partial.rotated).then_some(partial);
    let alone = |name: &str, axes: &[Axis]| vec![TensorSpec::new(name.into(), axes.iter().copied())];
    let of_layer = |layer: usize| {
        let (names, norms) = (&config.names, config.norms);
        let mut groups = LayerGroups { config, layer, groups: Vec::new() };
        groups.norm(0, norms.before());
        let [of_q, of_k, of_v] = Rows::of(names.qkv, [q, kv, kv]);
        let qkv = [Rows { heads: turned, ..of_q }, Rows { heads: turned, ..of_k }, of_v];
        groups.projection(&qkv, hidden, config.attention_bias);
        if let Some(over) = config.qk_norm {
            for (name, heads) in names.qk_norms.into_iter().zip([q, kv]) {
                let axis = if over == QkNorm::Head { Axis::whole(config.head_dim) } else { heads };
                groups.vector(Rows { heads: turned, ..Rows::new(name, axis) }, ".weight");
            }
        }
        if config.sinks {
            groups.vector(Rows::new(names.sinks, Axis::split(config.q_heads, 1, 1)), "");
        }
        groups.projection(&[Rows::new(names.output, hidden)], q, config.output_bias);
        groups.norm(1, norms.after());
        groups.norm(2, norms.before());
        match &config.mlp {
            Mlp::Gated(mlp) => {
                let inner = Axis::split(mlp.inner, 1, LANES);
                groups.projection(&Rows::of(names.gate_up, [inner, inner]), hidden, mlp.bias);
                groups.projection(&[Rows::new(names.down, hidden)], inner, mlp.bias);
            }
            Mlp::Experts(experts) => groups.experts(experts),
        }
        groups.norm(3, norms.after());
        groups.groups
    };
    let mut last = vec![alone("model.norm.weight", &[hidden])];
    if !config.tie_word_embeddings {
        let head = TensorSpec::new("lm_head.weight".into(), [vocab, hidden]);
        match config.quantization.filter(|quantization| quantization.head) {
            None => last.push(vec![head]),
            Some(quantization) => {
                let scales = [vocab, hidden.groups(quantization.group())];
                last.push(vec![head.holding(Holds::Quantized(quantization.weight))]);
                last.push(vec![TensorSpec::new("lm_head.weight_scale".into(), scales).holding(Holds::Scales)]);
            }
        }
    }
    TensorGroups {
        embedding: alone("model.embed_tokens.weight", &[vocab, hidden]),
        layers: (0..config.layers.len()).map(of_layer).collect(),
        last,
    }
}

struct Shard {
    path: PathBuf,
    map: Mmap,
    header: Metadata,
    /// Where the tensors' bytes begin.
    data: usize,
}

/// The mapped weights of a model folder.
pub struct Weights {
    folder: PathBuf,
    shards: Vec<Shard>,
    /// Which shard holds each tensor.
    homes: BTreeMap<String, usize>,
}

/// A tensor in a mapped file.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    /// Element type: BF16, F16 or F32, or of quantized elements.
    pub element: Element,
    /// Shape, row-major.
    pub dims: Vec<usize>,
    /// Little-endian bytes, of no particular alignment.
    pub bytes: &'a [u8],
}

/// A tensor's bytes in the type that was asked for.
pub enum TensorData<'a> {
    /// The file's own bytes: nothing was copied.
    Mapped(&'a [u8]),
    /// A converted copy.
    Converted(HostTensor),
}

impl TensorData<'_> {
    /// The bytes, row-major, little-endian.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(bytes) => bytes,
            Self::Converted(tensor) => tensor.bytes(),
        }
    }
}

impl<'a> TensorView<'a> {
    /// The tensor as `element` (BF16, F16 or F32; rounded to nearest even), borrowed when it already is.
    ///
    /// # Panics
    /// When `element` is not a float type of at most 32 bits.
    pub fn to_element(&self, element: Element) -> TensorData<'a> {
        self.part(&Part { dims: self.dims.to_vec(), axis: 0, range: 0..self.dims[0] }, element)
    }

    /// As [`to_element`](Self::to_element), of a part: borrowed when it is one piece of the file, else only the part is
    /// copied.
    fn part(&self, part: &Part, element: Element) -> TensorData<'a> {
        let inner: usize = self.dims[part.axis + 1..].iter().product();
        let [from, to] = [self.dims[part.axis], part.dims[part.axis]].map(|size| size * inner);
        let runs = Runs {
            count: self.dims[..part.axis].iter().product(),
            length: part.range.len() * inner,
            first: part.range.start * inner,
            from,
            to,
        };
        let size = self.element.bytes();
        if element == self.element && runs.count == 1 && runs.length == runs.to {
            return TensorData::Mapped(&self.bytes[runs.first * size..][..runs.length * size]);
        }
        let mut tensor = HostTensor::zeros(element, &part.dims);
        match element {
            same if same == self.element => {
                let bytes = tensor.bytes_mut();
                runs.each(|from, to| bytes[to.start * size..to.end * size].copy_from_slice(self.run(from).bytes));
            }
            Element::F32 => self.fill_runs(&runs, tensor.as_mut_slice::<f32>(), |value| value),
            Element::Bf16 => self.fill_runs(&runs, tensor.as_mut_slice::<bf16>(), bf16::from_f32),
            Element::F16 => self.fill_runs(&runs, tensor.as_mut_slice::<f16>(), f16::from_f32),
            Element::F64 => self.fill_runs(&runs, tensor.as_mut_slice::<f64>(), f64::from),
            other => panic!("weights cannot be converted to {other}"),
        }
        TensorData::Converted(tensor)
    }

    fn fill_runs<T>(&self, runs: &Runs, out: &mut [T], convert: impl Fn(f32) -> T) {
        runs.each(|from, to| self.run(from).fill(&mut out[to], &convert));
    }

    /// Some of its rows.
    fn rows(self, rows: Range<usize>) -> Self {
        let size = self.bytes.len() / self.dims[0].max(1);
        let dims = [&[rows.len()], &self.dims[1..]].concat();
        Self { element: self.element, dims, bytes: &self.bytes[rows.start * size..rows.end * size] }
    }

    /// Consecutive values, by their places in row-major order.
    fn run(&self, places: Range<usize>) -> Run<'a> {
        let size = self.element.bytes();
        Run { element: self.element, bytes: &self.bytes[places.start * size..places.end * size] }
    }

    /// One value, by its place in row-major order.
    fn value(&self, at: usize) -> f32 {
        let mut value = [0.0];
        self.run(at..at + 1).fill(&mut value, |value| value);
        value[0]
    }

    /// Every value as f64, exactly; of quantized elements without their scales.
    pub fn to_f64(&self) -> Vec<f64> {
        if self.element.bytes() == 1 {
            return HostTensor::from_bytes(self.element, &self.dims, self.bytes).to_f64();
        }
        let mut values = vec![0.0; self.dims.iter().product()];
        self.run(0..values.len()).fill(&mut values, f64::from);
        values
    }

    /// The scales of each row and group, of which a file may have but one.
    fn scales(&self, spec: &TensorSpec) -> Vec<f64> {
        let values = self.to_f64();
        if is_one(&self.dims) { vec![values[0]; spec.dims.iter().product()] } else { values }
    }
}

/// Consecutive values of a tensor.
struct Run<'a> {
    element: Element,
    bytes: &'a [u8],
}

impl Run<'_> {
    fn fill<T>(&self, out: &mut [T], convert: impl Fn(f32) -> T) {
        let pairs = || self.bytes.as_chunks::<2>().0.iter();
        match self.element {
            Element::Bf16 => {
                out.iter_mut().zip(pairs()).for_each(|(o, &b)| *o = convert(bf16::from_le_bytes(b).into()))
            }
            Element::F16 => out.iter_mut().zip(pairs()).for_each(|(o, &b)| *o = convert(f16::from_le_bytes(b).into())),
            Element::F32 => {
                let quads = self.bytes.as_chunks::<4>().0.iter();
                out.iter_mut().zip(quads).for_each(|(o, &b)| *o = convert(f32::from_le_bytes(b)));
            }
            other => unreachable!("a view is never made of {other}"),
        }
    }
}

/// Whether an array has one element.
fn is_one(dims: &[usize]) -> bool {
    dims.iter().product::<usize>() == 1
}

/// Equally long runs of values, at equal distances in a tensor and in a part of it.
struct Runs {
    count: usize,
    length: usize,
    /// Where the first begins in the tensor.
    first: usize,
    /// From the beginning of one to that of the next, in the tensor and in the part.
    from: usize,
    to: usize,
}

impl Runs {
    fn each(&self, mut copy: impl FnMut(Range<usize>, Range<usize>)) {
        for run in 0..self.count {
            let (from, to) = (self.first + run * self.from, run * self.to);
            copy(from..from + self.length, to..to + self.length);
        }
    }
}

impl Weights {
    /// Maps the safetensors files of a model folder and checks their headers, sizes and the index.
    ///
    /// # Errors
    /// When a file is missing, truncated or malformed, or the index and the shards disagree.
    pub fn open(folder: &Path) -> Result<Self> {
        let index = folder.join("model.safetensors.index.json");
        let single = folder.join("model.safetensors");
        let (paths, named) = if index.exists() {
            let named = read_index(&index)?;
            (named.values().cloned().collect::<BTreeSet<_>>(), Some(named))
        } else if single.exists() {
            (BTreeSet::from(["model.safetensors".to_owned()]), None)
        } else {
            let problem = "it holds neither model.safetensors nor model.safetensors.index.json";
            return Err(Error::file(folder, problem, "download the model's weights into it"));
        };
        let shards = paths.iter().map(|name| Shard::open(folder.join(name))).collect::<Result<Vec<_>>>()?;
        let mut homes = BTreeMap::new();
        for (at, shard) in shards.iter().enumerate() {
            for name in shard.header.offset_keys() {
                if let Some(first) = homes.insert(name.clone(), at) {
                    let problem = format!("tensor {name} is also in {}", shards[first].path.display());
                    return Err(Error::file(&shard.path, problem, "download the model again"));
                }
            }
        }
        for (tensor, file) in named.iter().flatten() {
            let home = homes.get(tensor).map(|&at| &shards[at].path);
            if home != Some(&folder.join(file)) {
                let problem = format!("tensor {tensor} is not in {file}, where the index says it is");
                return Err(Error::file(&index, problem, "download the model again"));
            }
        }
        Ok(Self { folder: folder.into(), shards, homes })
    }

    /// Checks that every tensor of the model is there, in its shape and in a supported type.
    ///
    /// Answers the names of tensors that the model does not use (older checkpoints store `rotary_emb.inv_freq`), for
    /// the caller to warn about.
    ///
    /// # Errors
    /// Names all missing tensors, or the first with a wrong shape or type.
    pub fn check(&self, config: &ModelSpec) -> Result<Vec<&str>> {
        let specs = expected_tensors(config);
        // Of a tensor that is several, once.
        let scales = specs.iter().filter_map(TensorSpec::scales_name);
        let mut names: Vec<_> = specs.iter().map(|spec| spec.name.clone()).chain(scales).collect();
        names.dedup();
        let missing: Vec<_> = names.iter().filter(|name| self.stored_name(name).is_none()).collect();
        if let [first, ..] = missing.as_slice() {
            let problem = match missing.len() {
                1 => format!("tensor {first} of {} is missing", names.len()),
                count => format!("tensor {first} and {} more of {} are missing", count - 1, names.len()),
            };
            return Err(Error::file(&self.folder, problem, "use weights and config.json of one model"));
        }
        for spec in &specs {
            self.tensor(spec)?;
            self.block_scales(spec)?;
        }
        let known: BTreeSet<_> = names.iter().filter_map(|name| self.stored_name(name)).collect();
        // With tied embeddings some checkpoints store the output projection all the same.
        Ok(self.homes.keys().map(String::as_str).filter(|name| !known.contains(name)).collect())
    }

    /// Whether `element` holds the values of all matrices: they are of this type in the files, or of 4 bits times a power of two.
    pub fn matrices_fit(&self, config: &ModelSpec, element: Element) -> bool {
        let is = |spec: &TensorSpec| self.tensor(spec).is_ok_and(|view| view.element == element);
        expected_tensors(config).iter().filter(|spec| spec.is_matrix()).all(|spec| spec.is_mxfp4() || is(spec))
    }

    /// A tensor, which must have the shape of `spec`.
    ///
    /// # Errors
    /// When it is missing, has another shape, or is not BF16, F16 or F32 (quantized elements: not of their type).
    pub fn tensor(&self, spec: &TensorSpec) -> Result<TensorView<'_>> {
        let (shard, info) = self.found(&spec.name)?;
        let mismatch = |expected: String, found: String| Error::Tensor {
            path: shard.path.clone(),
            tensor: spec.name.clone(),
            expected,
            found,
        };
        let element = match (info.dtype, spec.holds) {
            (Dtype::I8, Holds::Quantized(Element::I8)) => Element::I8,
            (Dtype::F8_E4M3, Holds::Quantized(Element::F8E4M3Fn)) => Element::F8E4M3Fn,
            (Dtype::F8_E5M2, Holds::Quantized(Element::F8E5M2)) => Element::F8E5M2,
            (Dtype::U8, Holds::Numbers) if spec.is_mxfp4() => Element::U8,
            (other, Holds::Numbers) if spec.is_mxfp4() => return Err(mismatch("U8".into(), format!("{other:?}"))),
            (other, Holds::Quantized(element)) => return Err(mismatch(element.to_string(), format!("{other:?}"))),
            (Dtype::BF16, _) => Element::Bf16,
            (Dtype::F16, _) => Element::F16,
            (Dtype::F32, _) => Element::F32,
            (other, _) => return Err(mismatch("BF16, F16 or F32".into(), format!("{other:?}"))),
        };
        let dims = spec.stored_dims();
        let rows = match (spec.of_expert, spec.fused) {
            (Some(of), _) => of.expert..of.expert + 1,
            (None, Some((first, _))) => first..first + spec.dims[0],
            // A single number has no rows.
            (None, None) => 0..spec.dims.first().copied().unwrap_or(1),
        };
        let one_per_row = spec.holds == Holds::Scales && dims[1] == 1;
        let fits = info.shape == dims || one_per_row && (info.shape == [dims[0]] || is_one(&info.shape));
        if !fits {
            return Err(mismatch(format!("{dims:?}"), format!("{:?}", info.shape)));
        }
        let whole = TensorView { element, dims: info.shape.clone(), bytes: shard.bytes(info) };
        Ok(if is_one(&whole.dims) { whole } else { whole.rows(rows) })
    }

    /// Of an expert's numbers of 4 bits, the scales of their blocks: `[features, in / 32]`.
    fn block_scales(&self, spec: &TensorSpec) -> Result<Option<&[u8]>> {
        let (Some(name), Some(of)) = (spec.scales_name(), spec.of_expert) else { return Ok(None) };
        let (shard, info) = self.found(&name)?;
        let dims = &spec.stored_dims()[..3];
        if info.dtype != Dtype::U8 || info.shape != dims {
            return Err(Error::Tensor {
                path: shard.path.clone(),
                tensor: name,
                expected: format!("U8 {dims:?}"),
                found: format!("{:?} {:?}", info.dtype, info.shape),
            });
        }
        let size = dims[1] * dims[2];
        Ok(Some(&shard.bytes(info)[of.expert * size..][..size]))
    }

    /// A shard's part of a tensor as `element`, each value of it finite: one NaN or infinity would make all logits NaN, and
    /// text of them. Only the part is read and held.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor), and for the first value that is not finite, in the file or in `element`.
    ///
    /// # Panics
    /// As [`TensorView::to_element`].
    pub fn load(&self, spec: &TensorSpec, shard: mesh::Shard, element: Element) -> Result<TensorData<'_>> {
        let (view, part) = (self.tensor(spec)?, spec.part(shard));
        if let Some(of) = spec.of_expert {
            let rows = of.rows(&view, self.block_scales(spec)?, &spec.dims);
            let rows = TensorView { element: Element::F32, dims: spec.dims.clone(), bytes: rows.bytes() };
            let data = HostTensor::from_bytes(element, &part.dims, rows.part(&part, element).bytes());
            let Some(at) = first_not_finite(element, data.bytes()) else { return Ok(TensorData::Converted(data)) };
            let mut index = index_of(at, &part.dims);
            index[part.axis] += part.range.start;
            let value = rows.value(index.iter().zip(&spec.dims).fold(0, |at, (index, dim)| at * dim + index));
            let place = format!("tensor {} of expert {}, {index:?} = {value:e}", spec.name, of.expert);
            return Err(self.not_finite(spec, &place, value, element));
        }
        let data = match spec.holds {
            Holds::Numbers | Holds::Quantized(_) => view.part(&part, element),
            Holds::Scales => {
                let all = HostTensor::from_f64(Element::F32, &spec.dims, &view.scales(spec));
                let whole = TensorView { element: Element::F32, dims: spec.dims.clone(), bytes: all.bytes() };
                let data = whole.part(&part, element);
                TensorData::Converted(HostTensor::from_bytes(element, &part.dims, data.bytes()))
            }
        };
        let Some(at) = first_not_finite(element, data.bytes()) else {
            return Ok(match spec.heads {
                None => data,
                Some(heads) => TensorData::Converted(turned(heads, element, &part.dims, data.bytes())),
            });
        };
        let mut index = index_of(at, &part.dims);
        index[part.axis] += part.range.start;
        if spec.holds != Holds::Numbers && view.dims.len() != index.len() {
            index.fill(0);
        }
        let value = view.value(index.iter().zip(&view.dims).fold(0, |at, (index, dim)| at * dim + index));
        index[0] += spec.fused.map_or(0, |(first, _)| first);
        let place = format!("tensor {}{index:?} = {value:e}", spec.name);
        Err(self.not_finite(spec, &place, value, element))
    }

    /// Says that a value of the file is not finite, or not as `element`.
    fn not_finite(&self, spec: &TensorSpec, place: &str, value: f32, element: Element) -> Error {
        if value.is_finite() {
            let limit = format!("cannot hold {place}");
            return Error::setting("engine.compute_dtype", element, limit, "use f32");
        }
        let path = self.find(&spec.name).map_or(&self.folder, |(shard, _)| &shard.path);
        Error::file(path, format!("{place} is not finite"), "download the file again, or repair the training")
    }

    /// The values of a tensor of the file, whole, in f64, exactly: of quantized elements what they stand for.
    ///
    /// # Errors
    /// When it is missing, or of a type that is not read.
    pub fn values(&self, name: &str) -> Result<Vec<f64>> {
        let mut values = self.stored(name)?.to_f64();
        if let Some(scale) = self.stored_name(&format!("{name}_scale")) {
            let scales = self.stored(scale)?.to_f64();
            // As many values in order have a scale, whether it is a tensor's, a row's or a group's.
            let group = values.len() / scales.len();
            values.iter_mut().enumerate().for_each(|(at, value)| *value *= scales[at / group]);
        }
        Ok(values)
    }

    /// The bytes of a tensor of the file, whatever they stand for.
    ///
    /// # Errors
    /// When it is missing.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        self.found(name).map(|(shard, info)| shard.bytes(info))
    }

    /// A tensor as the file has it.
    fn stored(&self, name: &str) -> Result<TensorView<'_>> {
        let (_, info) = self.found(name)?;
        let holds = match info.dtype {
            Dtype::I8 => Holds::Quantized(Element::I8),
            Dtype::F8_E4M3 => Holds::Quantized(Element::F8E4M3Fn),
            Dtype::F8_E5M2 => Holds::Quantized(Element::F8E5M2),
            _ => Holds::Numbers,
        };
        self.tensor(&TensorSpec::whole(name, &info.shape).holding(holds))
    }

    /// Lets the system drop a tensor's file pages from this process's memory: for after it was uploaded.
    pub fn release(&self, spec: &TensorSpec) {
        let Some((shard, info)) = self.find(&spec.name) else { return };
        let (start, end) = info.data_offsets;
        // SAFETY: the mapping is read-only and backed by the file, so dropped pages read the same bytes again. A
        // failure only means that memory is given back later.
        let _ = unsafe { shard.map.unchecked_advise_range(UncheckedAdvice::DontNeed, shard.data + start, end - start) };
    }

    /// The bytes of all tensors.
    pub fn size(&self) -> Bytes {
        Bytes(self.shards.iter().map(|shard| shard.header.data_len() as u64).sum())
    }

    /// Identifies the weights: a [`fingerprint`] of all names, types, shapes and sizes, and of the values: all of a model of up
    /// to `IDENTITY_WHOLE`, both ends of each tensor of a larger one, so that it need not be read
    /// twice.
    pub fn identity(&self) -> String {
        let whole = self.size() <= Self::IDENTITY_WHOLE;
        let pieces = self.shards.iter().flat_map(|shard| {
            let spans = shard.header.tensors().into_values().map(|info| info.data_offsets).collect::<BTreeSet<_>>();
            let ends = spans.into_iter().flat_map(move |(start, end)| {
                let edge = if whole { end - start } else { Self::IDENTITY_BYTES.min(end - start) };
                [start..start + edge, end - edge.min(end - start - edge)..end]
            });
            let ends = ends.map(|span| &shard.map[shard.data + span.start..shard.data + span.end]);
            std::iter::once(&shard.map[..shard.data]).chain(ends)
        });
        fingerprint(pieces)
    }

    /// The largest model that [`identity`](Self::identity) reads whole.
    const IDENTITY_WHOLE: Bytes = Bytes::mib(256);

    /// How much of each end of a larger model's tensors [`identity`](Self::identity) reads.
    const IDENTITY_BYTES: usize = 4096;

    /// As [`find`](Self::find), of a tensor that cannot be done without.
    fn found(&self, name: &str) -> Result<(&Shard, &TensorInfo)> {
        self.find(name).ok_or_else(|| {
            let problem = format!("tensor {name} is missing");
            Error::file(&self.folder, problem, "use weights and config.json of one model")
        })
    }

    fn find(&self, name: &str) -> Option<(&Shard, &TensorInfo)> {
        let name = self.stored_name(name)?;
        let shard = &self.shards[*self.homes.get(name)?];
        Some((shard, shard.header.info(name)?))
    }

    /// What the files call a tensor: those of a model that has others beside its text have a prefix, before or within the
    /// name (as transformers had it before release 4.52, and has it since).
    fn stored_name(&self, name: &str) -> Option<&str> {
        let own = |name: &str| self.homes.get_key_value(name).map(|(name, _)| name.as_str());
        own(name)
            .or_else(|| own(&format!("language_model.{name}")))
            .or_else(|| own(&format!("model.language_model.{}", name.strip_prefix("model.")?)))
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).map_err(Error::io("read", &path))?;
        // SAFETY: the module's documentation asks that the files stay as they are while mapped.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", &path))?;
        let (header_bytes, header) = SafeTensors::read_metadata(&map).map_err(|error| {
            let problem = match declared_length(&map) {
                Some(declared) if declared > map.len() as u64 => {
                    format!("it is truncated: its header declares {declared} bytes, but it has {}", map.len())
                }
                _ => format!("it is not a safetensors file ({error})"),
            };
            Error::file(&path, problem, "download the file again")
        })?;
        Ok(Self { path, map, header, data: 8 + header_bytes })
    }

    /// A tensor's bytes.
    fn bytes(&self, info: &TensorInfo) -> &[u8] {
        let (start, end) = info.data_offsets;
        &self.map[self.data + start..self.data + end]
    }
}

/// Rows of heads in the order in which attention turns them.
fn turned(heads: Heads, element: Element, dims: &[usize], bytes: &[u8]) -> HostTensor {
    let size = bytes.len() / dims[0];
    let rows = (0..dims[0]).map(|row| row - row % heads.width + heads.stored(row % heads.width));
    let bytes: Vec<u8> = rows.flat_map(|row| &bytes[row * size..][..size]).copied().collect();
    HostTensor::from_bytes(element, dims, &bytes)
}

/// The place of the first NaN or infinity among little-endian floats.
fn first_not_finite(element: Element, bytes: &[u8]) -> Option<usize> {
    /// In blocks, without a branch inside: the compiler makes vector instructions of it.
    fn first<const SIZE: usize>(bytes: &[u8], not_finite: impl Fn(&[u8; SIZE]) -> bool) -> Option<usize> {
        const BLOCK: usize = 1024;
        let values = bytes.as_chunks::<SIZE>().0;
        let any = |block: &[[u8; SIZE]]| block.iter().fold(false, |any, value| any | not_finite(value));
        let block = values.chunks(BLOCK).position(any)? * BLOCK;
        Some(block + values[block..].iter().position(&not_finite)?)
    }
    // All bits of the exponent are set.
    let half = |mask: u16| first(bytes, move |&value| u16::from_le_bytes(value) & mask == mask);
    match element {
        Element::I8 => None,
        Element::F8E4M3Fn => first(bytes, |&[value]: &[u8; 1]| value & 0x7f == 0x7f),
        Element::F8E5M2 => first(bytes, |&[value]: &[u8; 1]| value & 0x7c == 0x7c),
        Element::Bf16 => half(0x7f80),
        Element::F16 => half(0x7c00),
        _ => first(bytes, |&value| u32::from_le_bytes(value) & 0x7f80_0000 == 0x7f80_0000),
    }
}

/// The index of the `at`th value of an array, row-major.
fn index_of(mut at: usize, dims: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = dims
        .iter()
        .rev()
        .map(|&dim| {
            let along = at % dim;
            at /= dim;
            along
        })
        .collect();
    index.reverse();
    index
}

/// How long a safetensors file says it is: the header's own length, and the largest data offset if it can be read.
fn declared_length(bytes: &[u8]) -> Option<u64> {
    let length = u64::from_le_bytes(*bytes.first_chunk::<8>()?);
    let end = length.checked_add(8)?;
    if end > 100_000_000 {
        return None; // The format's limit on headers: this is some other kind of file.
    }
    let Some(header) = bytes.get(8..end as usize) else { return Some(end) };
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
    let data = header.values().filter_map(|info| info.get("data_offsets")?.get(1)?.as_u64()).max().unwrap_or(0);
    end.checked_add(data)
}

/// The files that a folder's weights are in, whether or not they are there.
pub(super) fn shard_names(folder: &Path) -> Result<BTreeSet<String>> {
    let index = folder.join("model.safetensors.index.json");
    match index.exists() {
        true => Ok(read_index(&index)?.into_values().collect()),
        false => Ok(BTreeSet::from(["model.safetensors".to_owned()])),
    }
}

/// The index's map from tensor name to file name.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let value = read_json(path)?;
    let entries = value.get("weight_map").and_then(serde_json::Value::as_object);
    let map: Option<BTreeMap<_, _>> = entries.and_then(|entries| {
        entries.iter().map(|(tensor, file)| Some((tensor.clone(), file.as_str()?.to_owned()))).collect()
    });
    // A file name, not a path: an index must not reach outside its folder.
    let plain = |file: &String| Path::new(file).file_name().is_some_and(|name| name == file.as_str());
    match map {
        Some(map) if !map.is_empty() && map.values().all(plain) => Ok(map),
        _ => Err(Error::file(path, "weight_map is not a map from tensor to file name", "download the file again")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use safetensors::tensor::TensorView as Source;

    use super::*;
    use crate::model::spec::GatedMlp;

    fn tiny() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-llama-kjv")
    }

    fn write(path: &Path, tensors: &[(&str, Dtype, &[usize], &[u8])]) {
        let views = tensors
            .iter()
            .map(|(name, dtype, dims, bytes)| (name.to_string(), Source::new(*dtype, dims.to_vec(), bytes).unwrap()));
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn spec(name: &str, dims: &[usize]) -> TensorSpec {
        TensorSpec::whole(name, dims)
    }

    #[test]
    fn the_tiny_model_is_complete() {
        let config = ModelSpec::open(&tiny()).unwrap();
        let weights = Weights::open(&tiny()).unwrap();
        assert!(weights.check(&config).unwrap().is_empty());
        let specs = expected_tensors(&config);
        let parameters: usize = specs.iter().map(|spec| spec.dims.iter().product::<usize>()).sum();
        assert_eq!(weights.size(), Bytes(2 * parameters as u64));
        // Released pages are read again from the file.
        let before = weights.tensor(&specs[0]).unwrap().to_f64();
        weights.release(&specs[0]);
        assert_eq!(weights.tensor(&specs[0]).unwrap().to_f64(), before);

        // Another training of the same shapes is another model.
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = fs::read(tiny().join("model.safetensors")).unwrap();
        let copy = |bytes: &[u8]| {
            fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
            Weights::open(folder.path()).unwrap().identity()
        };
        assert_eq!(copy(&bytes), weights.identity());
        let last = bytes.len() - 512; // the start of the last tensor in the file, a norm
        bytes[last] ^= 1;
        assert_ne!(copy(&bytes), weights.identity());

        let untied = ModelSpec { tie_word_embeddings: false, ..config.clone() };
        let error = weights.check(&untied).unwrap_err().to_string();
        assert!(error.contains("tensor lm_head.weight of 39 is missing"), "{error}");
        let Mlp::Gated(mlp) = config.mlp else { panic!("a Llama") };
        let wider = ModelSpec { mlp: Mlp::Gated(GatedMlp { inner: 1024, ..mlp }), ..config };
        let error = weights.check(&wider).unwrap_err().to_string();
        let expected = "model.safetensors: tensor model.layers.0.mlp.gate_proj.weight is [768, 256], \
                        but config.json asks for [1024, 256]";
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn types_are_converted() {
        let folder = tempfile::tempdir().unwrap();
        let values = [1.0f32, -0.5, 3.0, 1.0 + 1.0 / 256.0];
        let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let f16s: Vec<u8> = values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
        let bf16s: Vec<u8> = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
        write(
            &folder.path().join("model.safetensors"),
            &[
                ("a", Dtype::F32, &[2, 2], &f32s),
                ("b", Dtype::F16, &[4], &f16s),
                ("c", Dtype::BF16, &[4], &bf16s),
                ("d", Dtype::I32, &[4], &f32s),
            ],
        );
        let weights = Weights::open(folder.path()).unwrap();
        // 1 + 1/256 lies half way between two bf16 numbers: to even, which is 1.
        let rounded = [1.0, -0.5, 3.0, 1.0];
        let exact = values.map(f64::from);
        for (name, dims, exact) in [("a", &[2, 2][..], exact), ("b", &[4], exact), ("c", &[4], rounded)] {
            let view = weights.tensor(&spec(name, dims)).unwrap();
            assert_eq!(view.to_f64(), exact, "{name}");
            for (element, expected) in [(Element::F32, exact), (Element::Bf16, rounded)] {
                let data = view.to_element(element);
                let back = HostTensor::from_bytes(element, dims, data.bytes()).to_f64();
                assert_eq!(back, expected, "{name} as {element}");
                assert_eq!(matches!(data, TensorData::Mapped(_)), element == view.element);
            }
        }
        let error = weights.tensor(&spec("d", &[4])).unwrap_err().to_string();
        assert!(error.contains("tensor d is I32, but config.json asks for BF16, F16 or F32"), "{error}");
    }

    /// Parts of rows and of columns, cut where units end, repeated where there are too few, and filled up with zeros: each
    /// against the definition, value by value.
    #[test]
    fn shards_read_their_parts() {
        let folder = tempfile::tempdir().unwrap();
        let (rows, columns) = (12, 10);
        let values: Vec<f32> = (0..rows * columns).map(|at| at as f32 + 0.5).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        write(&folder.path().join("model.safetensors"), &[("w", Dtype::F32, &[rows, columns], &bytes)]);
        let weights = Weights::open(folder.path()).unwrap();
        // Axis, units, multiple of, shards: the units of each.
        let cases: [(usize, usize, usize, &[&[usize]]); 8] = [
            (1, 10, 10, &[&[0, 1, 2, 3, 4], &[5, 6, 7, 8, 9]]),
            (0, 6, 1, &[&[0, 1, 2], &[3, 4, 5]]),
            (0, 2, 1, &[&[0], &[0], &[1], &[1]]),
            (0, 12, 4, &[&[0, 1, 2, 3, 4, 5], &[6, 7, 8, 9, 10, 11]]),
            (1, 5, 1, &[&[0, 1], &[2, 3], &[4]]),
            (1, 10, 8, &[&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]),
            (1, 10, 4, &[&[0, 1, 2], &[3, 4, 5], &[6, 7, 8], &[9]]),
            (0, 12, 1, &[&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]),
        ];
        for (axis, units, multiple, shards) in cases {
            let mut axes = [Axis::whole(rows), Axis::whole(columns)];
            axes[axis] = Axis::split(units, axes[axis].size / units, multiple);
            let spec = TensorSpec::new("w".into(), axes);
            let width = spec.dims[axis] / units;
            let of = std::num::NonZeroUsize::new(shards.len()).unwrap();
            for (shard, held) in mesh::Shard::all(of).zip(shards) {
                let size = shards[0].len().next_multiple_of(multiple) * width;
                let mut dims = [rows, columns];
                dims[axis] = size;
                assert_eq!(spec.dims_of(shard), dims);
                let expected: Vec<f64> = (0..dims[0] * dims[1])
                    .map(|at| {
                        let mut index = [at / dims[1], at % dims[1]];
                        let Some(unit) = held.get(index[axis] / width) else { return 0.0 };
                        index[axis] = unit * width + index[axis] % width;
                        f64::from(values[index[0] * columns + index[1]])
                    })
                    .collect();
                for element in [Element::F32, Element::Bf16] {
                    let data = weights.load(&spec, shard, element).unwrap();
                    let read = HostTensor::from_bytes(element, &dims, data.bytes()).to_f64();
                    assert_eq!(read, expected, "axis {axis} of {units}, {shard:?}, {element}");
                    let one_piece = size == held.len() * width && (axis == 0 || size == columns);
                    assert_eq!(matches!(data, TensorData::Mapped(_)), element == Element::F32 && one_piece);
                }
            }
        }
    }

    #[test]
    fn values_that_are_not_finite_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let dims = [3, 1000];
        let cases: [(Dtype, f32, Element, Option<&str>); 10] = [
            (Dtype::F32, f32::MAX, Element::F32, None),
            (Dtype::F32, f32::NAN, Element::F32, Some("model.safetensors: tensor w[2, 345] = NaN is not finite")),
            (Dtype::F32, f32::INFINITY, Element::F32, Some("tensor w[2, 345] = inf is not finite: download")),
            (Dtype::F32, f32::NEG_INFINITY, Element::Bf16, Some("tensor w[2, 345] = -inf is not finite")),
            (
                Dtype::F32,
                f32::MAX,
                Element::Bf16,
                Some("engine.compute_dtype = bf16 cannot hold tensor w[2, 345] = 3.4028235e38: use f32"),
            ),
            (Dtype::BF16, -3e38, Element::Bf16, None),
            (Dtype::BF16, f32::NAN, Element::Bf16, Some("tensor w[2, 345] = NaN is not finite")),
            (Dtype::BF16, f32::INFINITY, Element::F32, Some("tensor w[2, 345] = inf is not finite")),
            (Dtype::F16, 65504.0, Element::F32, None),
            (Dtype::F16, f32::NEG_INFINITY, Element::Bf16, Some("tensor w[2, 345] = -inf is not finite")),
        ];
        for (dtype, value, element, message) in cases {
            let mut values = vec![1.0f32; 3000];
            values[2345] = value;
            let bytes: Vec<u8> = match dtype {
                Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
                _ => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            };
            write(&path, &[("w", dtype, &dims, &bytes)]);
            let weights = Weights::open(folder.path()).unwrap();
            // Whole, and as the second of three parts of its columns.
            let columns = TensorSpec::new("w".into(), [Axis::whole(dims[0]), Axis::split(dims[1], 1, 1)]);
            let second = mesh::Shard { index: 1, of: std::num::NonZeroUsize::new(3).unwrap() };
            for (spec, shard) in [(&spec("w", &dims), mesh::Shard::WHOLE), (&columns, second)] {
                let loaded = weights.load(spec, shard, element).map(|_| ());
                match message {
                    None => loaded.unwrap(),
                    Some(message) => {
                        let error = loaded.unwrap_err();
                        assert_eq!(error.exit_code(), 2);
                        assert!(error.to_string().contains(message), "{dtype:?} {value} as {element}: {error}");
                    }
                }
            }
        }
    }

    #[test]
    fn shards_and_their_index() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let one = 1.0f32.to_le_bytes();
        write(&path("x-1.safetensors"), &[("a", Dtype::F32, &[1], &one)]);
        write(&path("x-2.safetensors"), &[("b", Dtype::F32, &[1], &one)]);
        let index = |map: &str| fs::write(path("model.safetensors.index.json"), map).unwrap();
        let error = || Weights::open(folder.path()).map(|_| ()).unwrap_err().to_string();

        index(r#"{"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}"#);
        let weights = Weights::open(folder.path()).unwrap();
        assert_eq!(weights.tensor(&spec("b", &[1])).unwrap().to_f64(), [1.0]);
        index(r#"{"weight_map": {"a": "x-1.safetensors", "b": "x-1.safetensors"}}"#);
        assert!(error().contains("tensor b is not in x-1.safetensors, where the index says it is"), "{}", error());
        index(r#"{"weight_map": {"a": "x-3.safetensors"}}"#);
        assert!(error().contains("cannot read") && error().contains("x-3.safetensors"), "{}", error());
        index(r#"{"weight_map": {"a": "../x-1.safetensors"}}"#);
        assert!(error().contains("weight_map is not a map"), "{}", error());
    }

    #[test]
    fn damaged_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let error = || {
            let error = Weights::open(folder.path()).map(|_| ()).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        };
        assert!(error().contains("it holds neither model.safetensors nor"), "{}", error());
        write(&path, &[("a", Dtype::F32, &[64], &[0; 256])]);
        let whole = fs::read(&path).unwrap();
        for length in [whole.len() - 1, whole.len() - 256, 20] {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(error().contains("it is truncated: its header declares"), "{length}: {}", error());
            assert!(error().contains(&format!("but it has {length}")), "{length}: {}", error());
        }
        for (bytes, message) in
            [(&b""[..], "not a safetensors file"), (b"<html>not found</html>", "not a safetensors file")]
        {
            fs::write(&path, bytes).unwrap();
            assert!(error().contains(message), "{}", error());
        }
    }
}
