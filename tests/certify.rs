//! Plans against the real TPU compiler: what the planner says a kernel takes, libtpu must confirm to the byte.
//!
//! One compilation costs from 0.4 s to some 10 s of CPU; what runs by default is the smallest records of each kernel and
//! chip. `make certify-all` compiles every record and every common problem of every kernel, and renews the tables in
//! `kernels/tuned` when `PAGODA_RECORD=1`. `make certify-sample N=200` compiles problems that no table has.

use std::os::unix::fs::PermissionsExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use pagoda_engine::certify::kernel::Certified;
use pagoda_engine::certify::{Certifier, Error, Profile, Program, Verdict};
use pagoda_ir::Element;
use pagoda_kernels::chips::Chip;
use pagoda_kernels::evidence::{self, Record};
use pagoda_kernels::matmul::{self, Matmul};
use pagoda_kernels::plan::{Options, Plan};
use pagoda_kernels::rpa::Rpa;
use pagoda_kernels::vmem::{Bytes, Spills, Verdict as Fit};
use pagoda_kernels::{Choices, Kernel, Problem};

/// Whether the tables are renewed: then cycles are worth the time that they take.
fn recording() -> bool {
    std::env::var_os("PAGODA_RECORD").is_some_and(|value| value == "1")
}

fn certifier() -> Certifier {
    Certifier::find(env!("CARGO_BIN_EXE_pagoda"))
        .expect("libtpu: run `make tpu-tools`")
        .profile_timeout(Duration::from_secs(number("PAGODA_PROFILE_SECONDS", 60)))
        .timeout(Duration::from_secs(1800)) // the largest take minutes, and share the machine
}

/// A bf16 matmul at given tiles, or at the planner's.
fn matmul_plan(
    chip: Chip,
    sizes: [usize; 3],
    tiles: Option<matmul::plan::Tiles>,
    limit: Option<Bytes>,
) -> Plan<Matmul> {
    let problem = Problem::new(matmul::Spec::new(sizes, Element::Bf16)).unwrap();
    Plan::new(problem, chip, Options { tiles, vmem_limit: limit }).unwrap()
}

/// Certifies all of `plans`, as many at a time as there are processors, and hands each answer to `done` as it comes.
/// Returns the answers in order.
fn certify_all<K: Kernel>(plans: &[Plan<K>], done: impl Fn(&Certified<K>) + Sync) -> Vec<Result<Certified<K>, String>> {
    let certifier = certifier();
    let next = AtomicUsize::new(0);
    let answers: Vec<OnceLock<Result<Certified<K>, String>>> = plans.iter().map(|_| OnceLock::new()).collect();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from).min(8) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Relaxed);
                    let Some(plan) = plans.get(at) else { break };
                    let name = |error| format!("{} on {}, {}: {error}\n", plan.name(), plan.chip(), plan.describe());
                    let answer = answers[at].get_or_init(|| Certified::new(plan, &certifier).map_err(name));
                    answer.iter().for_each(&done);
                }
            });
        }
    });
    answers.into_iter().map(|answer| answer.into_inner().expect("every plan was taken")).collect()
}

/// Whether the compiler confirms the plan to the byte.
fn exact<K: Kernel>(certified: &Certified<K>) -> bool {
    let certificate = &certified.certificate;
    let total = certificate.kernels.first().map(|kernel| kernel.total);
    let adds_up = total == Some(certified.plan.total + certificate.spills());
    certificate.compiles() && certified.differences.is_empty() && certificate.kernels.len() == 1 && adds_up
}

/// Every one compiles, and takes exactly what was planned. Those that do go into the kernel's table as they come, if asked
/// for. One that does not fit although its plan did not claim it would is not wrong.
fn assert_exact<K: Kernel>(plans: &[Plan<K>]) {
    let answers = certify_all(plans, record_exact);
    let mut wrong = String::new();
    for (plan, answer) in plans.iter().zip(&answers) {
        match answer {
            Err(error) => wrong += error,
            Ok(certified) if exact(certified) => {
                // The same body and limit: what is on record must come again, unless it is being renewed.
                let (known, found) = (evidence::spills(plan), certified.certificate.spills());
                if matches!(known, Spills::Certified { bytes } if bytes != found) && !recording() {
                    wrong += &format!("{} on {}: on record {known}, now {found}\n", plan.name(), plan.chip());
                }
            }
            Ok(certified) => {
                let out_of_memory = matches!(certified.certificate.verdict, Verdict::OutOfMemory(_));
                if !out_of_memory || !matches!(plan.verdict(evidence::spills(plan)), Fit::Unknown { .. }) {
                    wrong += &format!("{certified}\n");
                }
            }
        }
    }
    assert!(wrong.is_empty(), "plans that the compiler does not confirm:\n{wrong}");
}

/// Merges a certification into the kernel's table, if asked for and exact.
fn record_exact<K: Kernel>(certified: &Certified<K>) {
    if recording() && exact(certified) {
        certified.record().into_iter().for_each(record);
    }
}

/// Merges a certification into the kernel's table.
fn record<K: Kernel>(mut new: Record<K>) {
    static TABLES: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = TABLES.lock().unwrap();
    let path = format!("{}/kernels/tuned/{}.json", env!("CARGO_MANIFEST_DIR"), K::NAME);
    let mut records: Vec<Record<K>> = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    // What the profile said of this very body is not lost to a run in which it was stopped.
    let known = records.iter().find(|old| old.same_kernel(&new));
    let same_body = known.filter(|old| (&old.compiler, &old.digest) == (&new.compiler, &new.digest));
    new.cycles = new.cycles.or(same_body.and_then(|old| old.cycles));
    records.retain(|old| !old.same_kernel(&new));
    records.push(new);
    let key =
        |record: &Record<K>| (record.chip, serde_json::to_string(&record.spec).unwrap(), record.tiles, record.limit);
    records.sort_by_key(key);
    let lines: Vec<String> = records.iter().map(|record| serde_json::to_string(record).unwrap()).collect();
    std::fs::write(format!("{path}.partial"), format!("[\n{}\n]\n", lines.join(",\n"))).unwrap();
    std::fs::rename(format!("{path}.partial"), path).unwrap();
}

/// The plans on record.
fn recorded<K: Kernel>() -> Vec<Plan<K>> {
    let records = K::records().expect("a table");
    records.all().iter().map(|record| record.plan().expect("a record's plan")).collect()
}

/// The plans on record, and those of the common problems on every chip.
fn every_point<K: Kernel>() -> Vec<Plan<K>> {
    let mut plans = recorded::<K>();
    for chip in Chip::ALL {
        for spec in K::common() {
            let problem = Problem::new(spec).expect("a common problem is valid");
            let plan = Plan::<K>::new(problem, chip, Options::default()).expect("a common problem has a plan");
            let same = |known: &Plan<K>| {
                (known.chip(), known.problem().spec(), known.tiles()) == (chip, plan.problem().spec(), plan.tiles())
            };
            if !plans.iter().any(same) {
                plans.push(plan);
            }
        }
    }
    // PAGODA_CERTIFY_ONLY: a part of a problem's description, as `pagoda plan` prints it.
    if let Ok(only) = std::env::var("PAGODA_CERTIFY_ONLY") {
        plans.retain(|plan| K::describe(plan.problem()).contains(&only));
    }
    // Those that have no digest of today's body first, the small before the large.
    let certified = |plan: &Plan<K>| matches!(plan.verdict(evidence::spills(plan)), Fit::Fits { .. });
    plans.sort_by_cached_key(|plan| (certified(plan), plan.vmem().total()));
    plans
}

/// The smallest records of each chip: seconds of CPU.
fn smallest<K: Kernel>(count: usize) -> Vec<Plan<K>> {
    let mut plans = recorded::<K>();
    plans.sort_by_key(|plan| plan.vmem().total());
    Chip::ALL
        .into_iter()
        .flat_map(|chip| plans.iter().filter(move |plan| plan.chip() == chip).take(count))
        .cloned()
        .collect()
}

/// What a sample of problems that no table has shows of the verdicts.
fn sample<K: Kernel>(count: usize, seed: u64) -> String {
    let mut plans = Vec::new();
    for number in 0.. {
        if plans.len() == count {
            break;
        }
        let mut choices = Choices::of_seed(seed.wrapping_add(number));
        let chip = choices.one_of(&Chip::ALL);
        let Some(spec) = K::workload(&mut choices) else { return format!("{}: no workload is described", K::NAME) };
        let problem = Problem::new(spec).expect("a workload is a valid problem");
        plans.extend(Plan::<K>::new(problem, chip, Options::default()).ok());
    }
    // With `PAGODA_RECORD=1` the sample becomes part of the tables, for the estimate of others.
    let answers = certify_all(&plans, record_exact);
    let mut table = std::collections::BTreeMap::new();
    let mut wrong = String::new();
    for (plan, answer) in plans.iter().zip(&answers) {
        let verdict = plan.verdict(evidence::spills(plan));
        let name = match verdict {
            Fit::Fits { .. } => "Fits",
            Fit::LikelyFits { .. } => "LikelyFits",
            Fit::Unknown { .. } => "Unknown",
            Fit::DoesNotFit { .. } => "DoesNotFit",
        };
        let outcome = match answer {
            Err(_) => "not compiled in time",
            Ok(certified) if certified.certificate.compiles() => "compiles",
            Ok(_) => "does not compile",
        };
        *table.entry((name, outcome)).or_insert(0) += 1;
        let described = || format!("{} on {}, {}: {verdict}", plan.name(), plan.chip(), plan.describe());
        match answer {
            Ok(certified) if !exact(certified) => {
                let claimed = matches!(verdict, Fit::Fits { .. } | Fit::LikelyFits { .. });
                if claimed || certified.certificate.compiles() {
                    wrong += &format!("{}\n{certified}\n", described());
                }
            }
            Ok(_) => {}
            Err(error) => wrong += &format!("{}\n{error}\n", described()),
        }
    }
    let counts = table.iter().map(|((verdict, outcome), count)| format!("  {verdict:<10} {outcome:<20} {count}\n"));
    let counts = counts.collect::<String>();
    assert!(!table.contains_key(&("Fits", "does not compile")), "a false Fits:\n{wrong}");
    format!("{} of seed {seed}:\n{counts}{wrong}", K::NAME)
}

/// A number of the environment.
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect("a number"))
}

macro_rules! tests {
    ($($name:ident: $kernel:ty,)*) => {
        $(mod $name {
            use super::super::*;

            #[test]
            fn the_smallest_plans_are_exact_on_every_chip() {
                assert_exact(&smallest::<$kernel>(8));
            }

            #[test]
            #[ignore = "minutes of CPU: make certify-all"]
            fn every_plan_is_exact() {
                assert_exact(&every_point::<$kernel>());
            }
        })*

        /// `N` problems that no table has, an equal share of each kernel, drawn from `SEED`.
        #[test]
        #[ignore = "minutes of CPU: make certify-sample"]
        fn a_sample_of_problems() {
            let (count, seed) = (super::number("N", 200), super::number("SEED", 1));
            let share = count.div_ceil([$(stringify!($name)),*].len() as u64) as usize;
            $(println!("{}", super::sample::<$kernel>(share, seed << 32));)*
        }
    };
}
mod each {
    pagoda_kernels::for_each_kernel!(tests);
}

/// q [1024, 32, 128], 8 KV heads, pages of 128 tokens, 8 sequences of up to 4608 tokens, bf16: what JAX's kernel asks
/// 37.54 MiB for is planned within every chip's default limit (16 MiB on v5p), whole, and on record as certified.
#[test]
fn the_incident_fits_on_every_chip() {
    for chip in Chip::ALL {
        let problem = Problem::new(Rpa::common().remove(0)).unwrap();
        let words = "1024x32x128 bf16 mixed, 8 kv heads, 8 x 36 pages of 128";
        assert_eq!(Rpa::describe(&problem), words);
        let plan = Plan::<Rpa>::new(problem, chip, Options::default()).unwrap();
        assert_eq!(plan.limit(), chip.info().default_scoped_limit);
        let verdict = plan.verdict(evidence::spills(&plan));
        assert!(matches!(verdict, Fit::Fits { .. }), "{chip}: {verdict}");
    }
}

#[test]
fn a_kernel_too_large_is_a_verdict_with_both_numbers() {
    let tiles = Some(matmul::plan::Tiles { m: 128, n: 256, k: 512 });
    let plan = |limit| matmul_plan(Chip::V5p, [256, 1024, 512], tiles, Some(limit));
    let certified = Certified::new(&plan(Bytes::kib(512)), &certifier()).unwrap();
    let Verdict::OutOfMemory(out) = &certified.certificate.verdict else { panic!("{certified}") };
    assert_eq!((out.memory.as_str(), out.limit.as_mib()), ("vmem", 0.5), "{}", out.message);
    // The compiler rounds to hundredths of a MiB and may stop counting before spills.
    assert!(out.asked.as_mib() >= certified.plan.total.as_mib() - 0.01, "{out} for {}", certified.plan);
    assert!(certified.to_string().contains("--tiles"), "the plan says what to do: {certified}");
    // The remedy works.
    let remedied = Certified::new(&plan(Bytes::mib(4)), &certifier()).unwrap();
    assert!(exact(&remedied), "{remedied}");
}

/// `pagoda certify`: exit code, standard output and standard error.
fn pagoda_certify(line: &str) -> (Option<i32>, String, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_pagoda"));
    let output = command.arg("certify").args(line.split_whitespace()).output().unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.code(), stdout, stderr)
}

#[test]
fn the_command_line_prints_verdict_cycles_and_memory() {
    let (code, stdout, stderr) = pagoda_certify("matmul --m 8 --n 256 --k 256 --chip v5e --json");
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["differences"].as_array().map(Vec::len), Some(0), "{report:#}");
    let certificate = &report["certificate"];
    assert!(certificate["cycles"][0]["cycles"].as_u64() > Some(100), "{report:#}");
    // x and w in bf16, and the result.
    assert_eq!(certificate["memory"]["arguments"], 2 * (8 * 256 + 256 * 256), "{report:#}");
    assert_eq!(certificate["kernels"][0]["total"], report["plan"]["total"], "{report:#}");
    // What does not fit is an answer, with both numbers and what to do.
    let cramped = "matmul --m 256 --n 512 --k 1024 --tiles 128,256,512 --vmem-limit 512KiB";
    let (code, stdout, stderr) = pagoda_certify(cramped);
    assert_eq!(code, Some(1), "{stdout}{stderr}");
    for words in ["does not compile", "vmem asked for, the limit is 512.00 KiB", "--tiles"] {
        assert!(stdout.contains(words), "lacks `{words}`:\n{stdout}");
    }
    let (code, stdout, stderr) = pagoda_certify("matmul --m 4096 --n 128256 --k 4096 --timeout 1");
    assert_eq!((code, stdout.as_str()), (Some(2), ""), "{stderr}");
    assert!(stderr.contains("libtpu did not finish within 1 s: raise the time limit (--timeout)"), "{stderr}");
}

/// Weights of one layer of a stack, whose index is prefetched: blocks that move and blocks that stay, ragged ones, gates,
/// biases; in every layout of the weight.
#[test]
fn stacks_of_weights_are_exact_on_every_chip() {
    use matmul::{Activation, Epilogue, Layout};
    let plans = Chip::ALL.into_iter().flat_map(|chip| {
        [
            (Layout::WeightTransposed, [8, 512, 640], Activation::Identity),
            (Layout::WeightTransposed, [40, 384, 256], Activation::SiluGate),
            (Layout::RowMajor, [16, 300, 384], Activation::SiluGate),
            (Layout::FeatureMajor, [128, 640, 200], Activation::Identity),
        ]
        .map(|(layout, sizes, activation)| {
            let epilogue = Epilogue { bias: true, activation, residual: true };
            let spec = matmul::Spec { layout, epilogue, layers: 3, ..matmul::Spec::new(sizes, Element::Bf16) };
            Plan::<Matmul>::new(Problem::new(spec).unwrap(), chip, Options::default()).unwrap()
        })
    });
    assert_exact(&plans.collect::<Vec<_>>());
}

/// The scale of a group that only the step knows. (On v4 libtpu keeps more for it than is planned.)
#[test]
fn scales_of_groups_are_exact_where_k_takes_steps() {
    use matmul::{Layout, Quantized, plan::Tiles};
    let plans = [Chip::V5e, Chip::V5p, Chip::V6e, Chip::Tpu7x].into_iter().flat_map(|chip| {
        [(Layout::WeightTransposed, 128), (Layout::RowMajor, 512), (Layout::FeatureMajor, 64)].map(|(layout, group)| {
            let quantized = Some(Quantized { weight: Element::I8, group: Some(group), activations: false });
            let spec = matmul::Spec { layout, quantized, ..matmul::Spec::new([128, 1024, 512], Element::Bf16) };
            let options = Options { tiles: Some(Tiles { m: 128, n: 256, k: 256 }), vmem_limit: None };
            Plan::<Matmul>::new(Problem::new(spec).unwrap(), chip, options).unwrap()
        })
    });
    assert_exact(&plans.collect::<Vec<_>>());
}

#[test]
fn what_goes_wrong_is_an_error_here() {
    let program = Program { module: b"module { nonsense }", replicas: 1 };
    let refused = certifier().certify("v5p:2x2x1", program).unwrap_err();
    assert!(matches!(&refused, Error::Refused(message) if message.contains("nonsense")), "{refused}");
    let unknown = certifier().certify("v9:2x2", program).unwrap_err();
    assert!(matches!(unknown, Error::Topology(_)), "{unknown}");
    let refused = certifier().certify("v5p:1x1x77777", program).unwrap_err();
    assert!(matches!(refused, Error::Refused(_) | Error::Crash { .. }), "{refused}");

    // A profile that may take no time costs the cycles, not the verdict.
    let plan = matmul_plan(Chip::V5p, [8, 256, 256], None, None);
    let certified = Certified::new(&plan, &certifier().profile_timeout(Duration::ZERO)).unwrap();
    let unprofiled = &certified.certificate;
    assert!(unprofiled.compiles() && unprofiled.kernel_cycles().is_none(), "{unprofiled}");
    assert!(
        unprofiled.profile == Profile::Stopped && unprofiled.to_string().contains("--profile-timeout"),
        "{unprofiled}"
    );
    assert_eq!(unprofiled.kernels[0].without_spills(), certified.plan.total);

    let late = certifier().timeout(Duration::from_millis(1)).certify("v5p:2x2x1", program).unwrap_err();
    assert!(matches!(late, Error::Timeout { .. }), "{late}");
    // A worker that dies without an answer.
    let crashed = Certifier::new("/bin/false", "libtpu.so").certify("v5p:2x2x1", program).unwrap_err();
    assert!(matches!(&crashed, Error::Crash { status, .. } if status.contains('1')), "{crashed}");
    // One that aborts, as libtpu does on some programs; one that answers, but of whose reports none is to be found.
    let folder = tempfile::tempdir().unwrap();
    let script = |name: &str, body: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        Certifier::new(path, "libtpu.so")
    };
    let aborts =
        script("aborts", "echo 'F1124 23:17:55.755984 1 file.cc:76] Check failed: it is odd' >&2; kill -ABRT $$");
    let crash = aborts.certify("v5p:2x2x1", program).unwrap_err().to_string();
    assert!(crash.contains("signal: 6") && crash.ends_with("Check failed: it is odd"), "{crash}");
    let answer = r#"echo '{"compiler": "another", "error": null, "memory": null}' > answer.json"#;
    let silent = Certified::new(&plan, &script("silent", answer)).unwrap_err().to_string();
    assert!(silent.contains("VMEM report") && silent.contains("names 0 kernels"), "{silent}");
    // A plugin that is none: the worker's own complaint comes through.
    let worker = env!("CARGO_BIN_EXE_pagoda");
    let no_plugin = Certifier::new(worker, worker).certify("v5p:2x2x1", program).unwrap_err();
    assert!(
        no_plugin.to_string().contains("GetPjrtApi") || no_plugin.to_string().contains("PJRT plugin"),
        "{no_plugin}"
    );
}
