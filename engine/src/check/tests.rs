//! The pure parts on drawn jobs, and the report on canned answers of the compiler.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use pagoda_ir::Element;
use pagoda_kernels::chips::Chip;
use pagoda_kernels::vmem::BufferKind;
use proptest::prelude::*;
use serde_json::json;

use super::compile::{Answer, Compiler, How, Unit};
use super::estimate::{Calibration, Costs, job_time, profiled_batches, step_time};
use super::plan::{Job, Plan, Program, Sample};
use super::*;
use crate::certify::report::{Allocation, AllocationKind, KernelVmem, OutOfMemory, SpillTag};
use crate::certify::{Certificate, OpCycles, Profile};
use crate::llama::KvCache;
use crate::model::ModelSpec;
use crate::pjrt::MemoryStats;
use crate::report::Status;
use crate::scheduler::Limits;
use crate::topology::Topology;
use crate::units::{PageSize, SampleId};

fn llama(q_heads: usize, kv_heads: usize, head_dim: usize, inner: usize, layers: usize, vocab: usize) -> ModelSpec {
    let value = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": q_heads * head_dim,
        "head_dim": head_dim, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": q_heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 131_072,
    });
    ModelSpec::parse(Path::new("config.json"), &value).unwrap()
}

fn on(job: &Job, model: usize) -> Result<Plan> {
    Plan::with_model_axis(job, NonZeroUsize::new(model).unwrap())
}

fn samples(lengths: &[usize]) -> Vec<Sample> {
    let sample = |(index, &prompt)| Sample { id: SampleId { round: 0, index, generation: 0 }, prompt };
    lengths.iter().enumerate().map(sample).collect()
}

/// Llama 3.1 8B, 100 prompts of 4096 new tokens, and the engine's sizes that the incident began with.
fn incident(topology: &str) -> Job {
    Job {
        config: llama(32, 8, 128, 14_336, 32, 128_256),
        limits: Limits {
            max_seq_len: 4608,
            max_seqs: 8,
            max_pages: 288,
            page_size: PageSize::new(128).unwrap(),
            max_seqs_in_prefill: 8,
            max_prefill_size: 1024,
            max_rounds: 64,
        },
        compute: Element::Bf16,
        kv_cache: KvCache::of(Element::Bf16),
        max_new_tokens: 4096,
        samples: samples(&[25; 100]),
        sampling: Sampling::Greedy,
        prefill_asked: 1024,
        prompts_per_batch: Some(8),
        mixed_steps: false,
        topology: Topology::parse(topology).unwrap(),
        hbm: Bytes(102_789_304_484),
    }
}

fn question() -> Question {
    Question {
        model_name: "llama-3.1-8b".into(),
        counted: Counted::Characters,
        may_stop: false,
        jax_tiles: None,
        one_engine: true,
    }
}

/// Answers as planned: every kernel takes what its plan says and a few spills, every profile is the planner's model.
struct Canned {
    plan: Plan,
    hbm_asked: Option<Bytes>,
}

impl Canned {
    fn kernels(&self, program: Program) -> Vec<KernelVmem> {
        let launches = self.plan.launches(program).iter();
        let kernels = launches.map(|launch| {
            let buffers = launch.plan.vmem().buffers.iter().map(|buffer| Allocation {
                kind: AllocationKind::Buffer(buffer.kind),
                bytes: buffer.bytes,
                levels: buffer.copies,
                tag: buffer.name.clone(),
            });
            let spill = Allocation {
                kind: AllocationKind::Spill(SpillTag::Spill),
                bytes: Bytes::kib(4),
                levels: 1,
                tag: "SPILL".into(),
            };
            let allocations: Vec<_> = buffers.chain([spill]).collect();
            let total = allocations.iter().map(|allocation| allocation.bytes).sum();
            KernelVmem { name: format!("layer.{}.7", launch.role), allocations, total }
        });
        kernels.collect()
    }
}

impl Compiler for Canned {
    fn version(&self, _: &str) -> Result<String> {
        Ok("libtpu 0.0.52".into())
    }

    fn compile(&self, unit: &Unit) -> Result<Answer> {
        let program = Program::ALL.into_iter().find(|program| unit.name.contains(program.name()));
        let whole = program.filter(|_| unit.how == How::Whole);
        let hbm = self.plan.memory.total();
        let verdict = match self.hbm_asked.filter(|_| whole.is_some()) {
            Some(asked) => Verdict::OutOfMemory(OutOfMemory {
                memory: "hbm".into(),
                asked,
                limit: self.plan.job.hbm,
                message: "E1000".into(),
            }),
            None => Verdict::Compiles,
        };
        let kernel = KernelVmem { name: "kernel".into(), allocations: vec![], total: Bytes(0) };
        Ok(Answer::Certified(Box::new(Certificate {
            compiler: "libtpu 0.0.52".into(),
            topology: unit.topology.clone(),
            verdict,
            kernels: whole.map_or_else(|| vec![kernel], |program| self.kernels(program)),
            profile: Profile::Complete,
            // A sum within a host, and over the slice, as measured.
            cycles: vec![OpCycles {
                op: "kernel".into(),
                cycles: if unit.replicas <= 4 { 6_394 } else { 19_658 },
                equal: 1,
            }],
            bundles: vec![],
            unestimated: vec![],
            memory: whole.map(|_| MemoryStats {
                code: 4 << 20,
                arguments: hbm.0 as i64,
                outputs: self.plan.memory.kv.0 as i64 + 4096,
                aliased: self.plan.memory.kv.0 as i64,
                temporaries: 30 << 20,
            }),
            seconds: 12.5,
        })))
    }

    fn executable(&self, _: &Unit) -> Option<PathBuf> {
        None
    }
}

fn found(job: &Job, model: usize, hbm_asked: Option<Bytes>) -> Findings {
    let plan = on(job, model).unwrap();
    let canned = Canned { plan: plan.clone(), hbm_asked };
    find_out(plan, &canned, &|_, _| {}).unwrap()
}

#[test]
fn the_incident_answered() {
    // Whole steps are emitted: few layers are as good as 32.
    let mut job = incident("v5p-64");
    job.config = llama(32, 8, 128, 14_336, 2, 128_256);
    let findings = found(&job, 4, None);
    assert!(findings.fits());
    let report = report(&findings, &question());
    assert_eq!(report.verdict.status, Status::Good);
    insta::assert_snapshot!(report.text());
    // One page, nothing loaded, nothing unescaped.
    let html = report.html();
    assert!(html.starts_with("<!DOCTYPE html>") && html.ends_with("</html>"));
    for foreign in ["http", "src=", "@import", "url("] {
        assert!(!html.contains(foreign), "{foreign}");
    }
    assert_eq!(serde_json::to_value(&report).unwrap()["figures"][0]["key"], "job_seconds");
}

#[test]
fn what_is_too_large_is_said_with_both_numbers() {
    let mut job = incident("v5p-8");
    job.config = llama(64, 8, 128, 28_672, 2, 128_256);
    let findings = found(&job, 1, Some(Bytes::gib(144)));
    assert!(!findings.fits());
    let report = report(&findings, &question());
    assert_eq!(report.verdict.status, Status::Bad);
    let headline = "Does not fit v5p-8: the prefill program asks for 144.00 GiB of HBM, and there are 95.73 GiB.";
    assert_eq!(report.verdict.headline, headline);
    assert!(!report.figures.iter().any(|figure| figure.key == "job_seconds"), "there is no job");
    // 405B: 756 GiB of weights are too much for four devices; for eight with all the rest as well.
    let mut job = incident("v5p-8");
    job.config = llama(128, 8, 128, 53_248, 126, 128_256);
    let (slice, plan, _) = suggest::larger_slice(&on(&job, 4).unwrap(), &Calibration::default()).unwrap();
    assert_eq!((slice.name().as_str(), plan.mesh.model.get()), ("v5p-32", 16));
    assert!(suggest::larger_slice(&on(&incident("v5p-8"), 4).unwrap(), &Calibration::default()).is_none());
}

#[test]
fn jaxs_kernel_is_refused_with_ways_out() {
    let plan = on(&incident("v5p-64"), 4).unwrap();
    insta::assert_snapshot!(jax_report(&plan, &question()).text());
}

#[test]
fn meshes_that_do_not_divide_are_refused() {
    let job = incident("v5p-64");
    for (model, words) in [(3, "mesh model = 3 does not divide 32 devices"), (64, "mesh model = 64 does not divide")] {
        let error = on(&job, model).unwrap_err();
        assert!(error.to_string().contains(words) && error.exit_code() == 2, "{error}");
    }
}

/// The smallest model axis that fits is proposed: figures by hand, weights / axis + pages below 97% of 95.73 GiB.
#[test]
fn meshes_are_proposed_by_memory() {
    let of = |config: ModelSpec, topology| {
        let job = Job { config, ..incident(topology) };
        let plan = Plan::new(&job, None).unwrap();
        (plan.mesh.model.get(), suggest::fits(&plan), plan.within_a_host())
    };
    assert_eq!(of(llama(32, 8, 128, 14_336, 32, 128_256), "v5p-64"), (1, true, true));
    // 70B: 131.5 GiB of weights, two ways 65.7.
    assert_eq!(of(llama(64, 8, 128, 28_672, 80, 128_256), "v5p-64"), (2, true, true));
    // 405B: 756 GiB of weights; eight ways 94.5 and pages do not fit, sixteen do: more than one host.
    assert_eq!(of(llama(128, 8, 128, 53_248, 126, 128_256), "v5p-256"), (16, true, false));
    assert!(!of(llama(128, 8, 128, 53_248, 126, 128_256), "v5p-8").1);
}

#[test]
fn samples_are_shared_out_as_hosts_share_prompts() {
    let mut job = incident("v5p-64");
    job.samples = samples(&[9; 13]);
    let plan = on(&job, 4).unwrap();
    let shares: Vec<_> =
        plan.shares().iter().map(|share| share.first().unwrap().id.index..share.last().unwrap().id.index + 1).collect();
    let hosts = (0..8).map(|host| crate::hosts::Share::new(host, 8).unwrap().prompts(13));
    assert_eq!(shares, hosts.collect::<Vec<_>>());
}

fn any_job() -> impl Strategy<Value = (Job, Option<usize>)> {
    let chip = prop::sample::select(Chip::ALL.to_vec());
    let heads = prop::sample::select(vec![(8, 8), (16, 2), (32, 8), (64, 8), (28, 4), (14, 2), (128, 8)]);
    let sizes = (prop::sample::select(vec![64, 128, 256]), 1usize..40, 1usize..130, 1usize..200);
    let limits = (1usize..5000, 1usize..70, 1usize..9000, prop::sample::select(vec![16, 32, 128, 256]), 1usize..70);
    let rest = (
        1usize..3000,
        prop::collection::vec(1usize..400, 1..30),
        1usize..300,
        0usize..40,
        any::<prop::sample::Index>(),
    );
    (chip, heads, sizes, limits, rest).prop_map(
        |(chip, (q, kv), (head_dim, inner, layers, vocab), (seq, seqs, pages, page, in_prefill), rest)| {
            let (prefill, prompts, new, model, at) = rest;
            let slices = Topology::all(chip);
            let longest = prompts.iter().max().unwrap() + new;
            let page_size = PageSize::new(page).unwrap();
            let limits = Limits {
                max_seq_len: seq.max(longest),
                max_seqs: seqs,
                max_pages: pages.max(page_size.pages_for(longest)),
                page_size,
                max_seqs_in_prefill: in_prefill.min(seqs),
                max_prefill_size: prefill,
                max_rounds: 1 + seqs % 64,
            };
            let job = Job {
                config: llama(q, kv, head_dim, 128 * inner, layers, 128 * vocab),
                limits,
                compute: Element::Bf16,
                kv_cache: KvCache::of(Element::Bf16),
                max_new_tokens: new,
                samples: samples(&prompts),
                sampling: if seqs % 2 == 0 {
                    Sampling::Greedy
                } else {
                    Sampling::Random { top_k: true, top_p: true, log_probabilities: false }
                },
                prefill_asked: prefill,
                prompts_per_batch: (seqs % 3 == 0).then_some(seqs),
                mixed_steps: seqs % 2 == 0,
                topology: at.get(&slices[..slices.len().min(20)]).clone(),
                hbm: chip.info().hbm,
            };
            (job, (model > 0).then_some(model))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    /// Whatever is asked: no panic; what is planned adds up; time is positive and covers every token; each suggestion fits,
    /// leaves prompts and lengths alone, and is what planning and simulating it anew gives.
    #[test]
    fn plans_add_up_and_suggestions_do_what_they_say((job, model) in any_job()) {
        let plan = match model.map_or_else(|| Plan::new(&job, None), |model| on(&job, model)) {
            Ok(plan) => plan,
            Err(error) => {
                prop_assert_eq!(error.exit_code(), 2, "{}", error);
                return Ok(());
            }
        };
        prop_assert_eq!(plan.mesh.devices(), job.topology.devices());
        prop_assert!(plan.group.devices() >= plan.mesh.model.get());
        prop_assert_eq!(plan.memory.page.0 * job.limits.max_pages as u64, plan.memory.kv.0);
        let most = plan.most_pages(Bytes(0));
        prop_assert!(plan.memory.weights + plan.memory.page * most as u64 <= job.hbm.max(plan.memory.weights));
        prop_assert_eq!(plan.shares().concat(), job.samples.clone());
        let costs = Costs::modelled(&plan);
        for program in Program::ALL {
            let [low, high] = profiled_batches(&plan, program).map(|batch| step_time(&plan, &costs, program, &batch));
            prop_assert!(low.seconds() > 0.0 && low.seconds() <= high.seconds());
            prop_assert!(high.seconds() >= high.compute() && high.seconds() >= high.memory);
        }
        let time = job_time(&plan, &costs).unwrap();
        prop_assert_eq!(time.tokens, job.samples.len() * job.max_new_tokens);
        prop_assert!(time.seconds.is_finite() && time.seconds > 0.0);
        // What takes its own costs as the compiler's takes the same time again.
        let mut slower = costs.clone();
        slower.decode.iter_mut().for_each(|cycles| (cycles.fixed, cycles.per_key) = (2.0 * cycles.fixed, 4.0 * cycles.per_key));
        let calibration = Calibration::new(&plan, &slower);
        prop_assert_eq!(calibration.costs(&plan), slower);
        let time = suggest::time_of(&plan, &calibration).unwrap();
        for alternative in suggest::alternatives(&plan, &calibration) {
            let changed = &alternative.plan.job;
            prop_assert!(suggest::fits(&alternative.plan));
            prop_assert_eq!((&changed.samples, changed.max_new_tokens), (&job.samples, job.max_new_tokens));
            prop_assert_eq!(changed.limits.max_seq_len, job.limits.max_seq_len);
            let again = Plan::new(changed, Some(alternative.plan.mesh)).unwrap();
            prop_assert_eq!(suggest::time_of(&again, &calibration), Some(alternative.time));
            prop_assert!(!suggest::fits(&plan) || alternative.time.seconds < time.seconds);
        }
    }
}

#[test]
fn a_kernel_is_found_by_its_name_or_its_buffers() {
    let plan = Plan::new(&incident("v5p-64"), None).unwrap();
    let canned = Canned { plan: plan.clone(), hbm_asked: None };
    let mut kernels = canned.kernels(Program::Decode);
    for launch in &plan.decode {
        assert!(compiled_kernel(launch, &kernels).unwrap().name.contains(launch.role));
    }
    kernels.iter_mut().for_each(|kernel| kernel.name = "name.3".into());
    for launch in &plan.decode {
        let kernel = compiled_kernel(launch, &kernels).unwrap();
        assert_eq!(kernel.of_kind(BufferKind::Scratch), {
            let scratch = launch.plan.vmem().buffers.iter().filter(|buffer| buffer.kind == BufferKind::Scratch);
            scratch.map(|buffer| buffer.bytes).sum()
        });
    }
}
