//! Every family against transformers: two tiny checkpoints of each that it wrote (`scripts/families.py`), with its tokens and
//! logits, against the f64 reference and every form of the kernels.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use pagoda_engine::llama::{Parallel, Target};
use pagoda_engine::mesh::Mesh;
use pagoda_engine::model::spec::Mlp;
use pagoda_engine::scheduler::Limits;
use pagoda_engine::units::PageSize;
use pagoda_ir::Element;
use pagoda_kernels::chips::Chip;
use safetensors::SafeTensors;

use super::support::*;

/// A margin between the best logits below which f32 may choose the other.
const TIE: f32 = 1e-5;

/// A checkpoint, and what transformers makes of it.
struct Checkpoint {
    name: String,
    model: Model,
    prompt: Vec<u32>,
    /// The most likely ones, and how far each is ahead of the next best.
    tokens: Vec<u32>,
    margins: Vec<f32>,
    /// After every eighth token, `[_][vocab]`, computed in f32.
    logits: Vec<Vec<f32>>,
    /// The same, computed in bf16.
    logits_bf16: Vec<Vec<f32>>,
}

/// From one position whose logits are kept to the next.
const EVERY: usize = 8;

impl Checkpoint {
    fn open(folder: &Path) -> Self {
        let bytes = fs::read(folder.join("golden.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| -> Vec<[u8; 4]> { golden.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec() };
        let ids = |name| words(name).into_iter().map(u32::from_le_bytes).collect();
        let floats = |name| words(name).into_iter().map(f32::from_le_bytes).collect::<Vec<_>>();
        let model = Model::open(folder);
        let rows = |name| floats(name).chunks(model.config.vocab_size).map(<[f32]>::to_vec).collect();
        let (logits, logits_bf16) = (rows("logits"), rows("logits_bf16"));
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        Self {
            name,
            model,
            prompt: ids("prompt"),
            tokens: ids("tokens"),
            margins: floats("margins"),
            logits,
            logits_bf16,
        }
    }

    /// Prompt and tokens.
    fn text(&self) -> Vec<u32> {
        [&self.prompt[..], &self.tokens].concat()
    }

    /// Checks a greedy text against transformers': equal, or other from a tie on.
    fn check(&self, tokens: &[u32], context: &str) {
        let Some(at) = tokens.iter().zip(&self.tokens).position(|(found, expected)| found != expected) else { return };
        let (found, expected, margin) = (tokens[at], self.tokens[at], self.margins[at]);
        assert!(margin < TIE, "{}, {context}: token {at} is {found}, and {expected} leads by {margin:e}", self.name);
        eprintln!("{}, {context}: token {at} is {found} for {expected}, a tie of {margin:e}", self.name);
    }

    /// Greedy texts of the first tokens, on a mesh, beside another sequence that is one token shorter.
    fn greedy(&self, target: Target, mesh: Mesh, tokens: usize) {
        let limits = Limits {
            max_seq_len: 96,
            max_seqs: 3,
            max_pages: 18,
            page_size: PageSize::new(16).unwrap(),
            max_seqs_in_prefill: 3,
            max_prefill_size: 24,
            max_rounds: 16,
        };
        let options = greedy_options(limits, target);
        let mut engines = self.model.replicas(mesh, &options);
        let requests = vec![request(0, &self.prompt, tokens), request(1, &self.prompt, tokens - 1)];
        let finished = run_replicas(&mut engines, requests);
        let context = format!("{target}, mesh {mesh}");
        assert_eq!(finished[&0].tokens.len(), tokens);
        self.check(&finished[&0].tokens, &context);
        self.check(&finished[&1].tokens, &context);
    }

    /// More than one device that the model can be split over.
    fn split(&self) -> Mesh {
        let model = (2..=8).find(|&model| Parallel::group(mesh(1, model).model).check(&self.model.config).is_ok());
        mesh(1, model.expect("heads that can be shared out"))
    }
}

fn checkpoints() -> Vec<Checkpoint> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families");
    let mut folders: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.retain(|folder| folder.is_dir());
    folders.sort();
    let checkpoints: Vec<_> = folders.iter().map(|folder| Checkpoint::open(folder)).collect();
    let mut families: BTreeMap<&str, usize> = BTreeMap::new();
    for checkpoint in &checkpoints {
        *families.entry(checkpoint.name.split('-').next().unwrap()).or_default() += 1;
    }
    assert!(families.len() >= 10 && families.values().all(|&count| count >= 2), "two of each: {families:?}");
    checkpoints
}

/// In f32 transformers' own logits are some 10^-6 from exact ones.
#[test]
fn the_reference_computes_what_transformers_do() {
    for checkpoint in checkpoints() {
        let text = checkpoint.text();
        let reference = checkpoint.model.reference().within(96);
        let exact = reference.logits(&text);
        let kept: Vec<_> = exact.iter().skip(EVERY - 1).step_by(EVERY).cloned().collect();
        let worst = largest_relative_error(&checkpoint.logits, &kept);
        eprintln!("{}: transformers' logits are within {worst:.1e} of the reference's", checkpoint.name);
        assert!(worst <= 2e-5, "{}: {worst:e}", checkpoint.name);
        let chosen = exact[checkpoint.prompt.len() - 1..text.len() - 1].iter().map(|logits| {
            (0..logits.len()).reduce(|best, id| if logits[id] > logits[best] { id } else { best }).unwrap() as u32
        });
        checkpoint.check(&chosen.collect::<Vec<_>>(), "f64 reference");
    }
}

/// One form each, the second of a family split over several devices.
#[test]
fn every_family_yields_the_tokens_of_transformers() {
    for (at, checkpoint) in checkpoints().iter().enumerate() {
        let (mesh, target) = match at % 4 {
            0 => (Mesh::ONE, Target::Host),
            1 => (checkpoint.split(), Target::Host),
            2 => (Mesh::ONE, Target::Portable),
            _ => (checkpoint.split(), Target::Portable),
        };
        checkpoint.greedy(target, mesh, checkpoint.tokens.len());
    }
}

#[test]
#[ignore = "takes a quarter of an hour: make nightly"]
fn every_family_yields_the_tokens_of_transformers_in_fresh_forms() {
    let meshes = |checkpoint: &Checkpoint| [Mesh::ONE, mesh(2, 1), checkpoint.split()];
    for checkpoint in checkpoints() {
        for (target, mesh) in TARGETS.into_iter().flat_map(|target| meshes(&checkpoint).map(|mesh| (target, mesh))) {
            checkpoint.greedy(target, mesh, checkpoint.tokens.len());
        }
        checkpoint.greedy(Target::TileMachine(Chip::V6e), Mesh::ONE, 8);
    }
}

/// The largest error of one position's logits. In bf16 a rounding may decide between two experts, and the token, and those
/// that see it, then have other logits (where an expert leads the next one by 0.001 to 0.005 of its router's largest logit,
/// say; transformers' own logits have such positions, of errors up to 0.86): of models with experts the median position
/// counts. In f32 all do.
fn relative_error(model: &Model, compute: Element, logits: &[Vec<f32>], exact: &[Vec<f64>]) -> f64 {
    let of = |(logits, exact)| largest_relative_error(std::slice::from_ref(logits), std::slice::from_ref(exact));
    let mut errors: Vec<f64> = logits.iter().zip(exact).map(of).collect();
    assert!(errors.iter().all(|error| error.is_finite()), "{errors:?}");
    errors.sort_by(f64::total_cmp);
    match (&model.config.mlp, compute) {
        (Mlp::Experts(_), Element::Bf16) => errors[errors.len() / 2],
        _ => errors[errors.len() - 1],
    }
}

/// At the positions where transformers' are known, in both compute types. How far a rounding in an early layer carries differs
/// from model to model: transformers' own errors show it, and ours are at most twice as large, or what [`bf16_error`] allows
/// models that amplify nothing. In f32 roundings are 2^16 times finer, and those of the sums count too: they are less than 8
/// times as many.
fn check_logits(pairs: impl Fn(usize) -> Vec<(Target, Element)>) {
    let client = client();
    pagoda_engine::native::register_all(client.plugin()).unwrap();
    for (at, checkpoint) in checkpoints().iter().enumerate() {
        let (text, model) = (checkpoint.text(), &checkpoint.model);
        let exact = model.reference().within(text.len()).logits(&text);
        let kept: Vec<_> = exact.iter().skip(EVERY - 1).step_by(EVERY).cloned().collect();
        for (target, compute) in pairs(at) {
            let (finer, theirs) = match compute {
                Element::F32 => (8192.0, &checkpoint.logits),
                _ => (1.0, &checkpoint.logits_bf16),
            };
            let logits = logits_in_chunks(&client, model, (compute, target), &[&text], 48);
            let ours: Vec<_> = logits[0].iter().skip(EVERY - 1).step_by(EVERY).cloned().collect();
            let error = |logits: &[Vec<f32>]| relative_error(model, compute, logits, &kept);
            let (worst, bound) = (error(&ours), (2.0 * error(theirs)).max(bf16_error(&model.config) / finer));
            let all = largest_relative_error(&ours, &kept);
            eprintln!("{}, {target}, {compute}: {worst:.1e} ({all:.1e}), {bound:.1e} is allowed", checkpoint.name);
            assert!(worst <= bound, "{}, {target}, {compute}: {worst:e}, {bound:e} is allowed", checkpoint.name);
        }
    }
}

/// Of a family's two checkpoints one in the StableHLO form and the other in Rust, one in f32 and the other in bf16, and one of
/// them on the tile machine too; nightly all.
#[test]
fn logits_of_every_family_stay_within_the_error_of_their_roundings() {
    check_logits(|at| {
        let (family, second) = (at / 2, at % 2);
        let types = [Element::F32, Element::Bf16];
        let of = |form: usize, ty: usize| (TARGETS[form], types[ty % 2]);
        let host = of((family + second) % 2, family / 2 + second);
        let machine = (second == family % 2).then(|| of(2, family / 2 + second + 1));
        [host].into_iter().chain(machine).collect()
    });
}

#[test]
#[ignore = "takes minutes: make nightly"]
fn logits_of_every_family_stay_within_the_error_of_their_roundings_in_fresh_forms() {
    check_logits(|_| {
        TARGETS.into_iter().flat_map(|target| [Element::F32, Element::Bf16].map(|ty| (target, ty))).collect()
    });
}
