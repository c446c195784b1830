//! Plans against the real TPU compiler: what the planner says a kernel takes, libtpu must confirm to the byte.
//!
//! One compilation costs from 0.4 s to some 10 s of CPU; what runs by default is a spread of small ones. All points run
//! with `make certify-all`, which also renews the tables in `kernels/tuned` when `PAGODA_RECORD=1`.

use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use pagoda_engine::certify::kernel::Certified;
use pagoda_engine::certify::matmul::{Request, certify_matmul};
use pagoda_engine::certify::{Certifier, Error, Profile, Program, Verdict, rpa};
use pagoda_ir::Element;
use pagoda_kernels::chips::Chip;
use pagoda_kernels::matmul::{self, Activation, Epilogue, Layout};
use pagoda_kernels::plan::KernelPlan;
use pagoda_kernels::rpa::Kind;
use pagoda_kernels::tuned::Record;
use pagoda_kernels::vmem::Verdict as Fit;

/// Whether the tables are renewed: then cycles are worth the time that they take.
fn recording() -> bool {
    std::env::var_os("PAGODA_RECORD").is_some_and(|value| value == "1")
}

fn certifier() -> Certifier {
    Certifier::find(env!("CARGO_BIN_EXE_pagoda"))
        .expect("libtpu: run `make tpu-tools`")
        .profile_timeout(Duration::from_secs(if recording() { 900 } else { 60 }))
        .timeout(Duration::from_secs(1800)) // the largest take minutes, and share the machine
}

/// A matmul at given tiles (or, without, at the planner's).
fn request(chip: Chip, sizes: [usize; 3], tiles: Option<&str>) -> Request {
    let [m, k, n] = sizes;
    Request { tiles: tiles.map(str::to_owned), ..Request::new(m, k, n, Element::Bf16, chip.name()) }
}

/// Certifies all of `plans`, as many at a time as there are processors, and returns the answers in order.
fn certify_all<P: KernelPlan + Sync>(plans: &[P]) -> Vec<Result<Certified<P>, String>> {
    let certifier = certifier();
    let next = AtomicUsize::new(0);
    let answers: Vec<OnceLock<Result<Certified<P>, String>>> = plans.iter().map(|_| OnceLock::new()).collect();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from).min(8) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Relaxed);
                    let Some(plan) = plans.get(at) else { break };
                    let tell = |error| format!("{} on {}, {}: {error}", plan.name(), plan.chip(), plan.describe());
                    answers[at].get_or_init(|| Certified::new(plan, &certifier).map_err(tell));
                }
            });
        }
    });
    answers.into_iter().map(|answer| answer.into_inner().expect("every plan was taken")).collect()
}

/// Every one compiles, and takes exactly what was planned. Those that do go into the table of `kernel`, if asked for.
fn assert_exact<P: KernelPlan>(kernel: &str, answers: &[Result<Certified<P>, String>]) {
    let (mut wrong, mut right) = (String::new(), Vec::new());
    for answer in answers {
        let certified = match answer {
            Ok(certified) => certified,
            Err(error) => {
                wrong += error;
                continue;
            }
        };
        let certificate = &certified.certificate;
        let exact = certified.differences.is_empty() && certificate.kernels.len() == 1;
        let total = certificate.kernels.first().map(|kernel| kernel.total);
        let adds_up = total == Some(certified.plan.total + certificate.spills());
        if !certificate.compiles() || !exact || !adds_up {
            wrong += &format!("{certified}\n");
        } else {
            right.extend(certified.record());
        }
    }
    record::<P>(kernel, right);
    assert!(wrong.is_empty(), "plans that the compiler does not confirm:\n{wrong}");
}

/// Layouts, epilogues, types, edges, single blocks and double buffers, each on every chip.
fn spread() -> Vec<matmul::plan::Plan> {
    let (row_major, transposed, feature_major) = (Layout::RowMajor, Layout::WeightTransposed, Layout::FeatureMajor);
    let (bf16, f32) = (Element::Bf16, Element::F32);
    let all = Epilogue { bias: true, activation: Activation::SiluGate, residual: true };
    let bias = Epilogue { bias: true, ..Epilogue::NONE };
    let residual = Epilogue { residual: true, ..bias };
    let gate = Epilogue { activation: Activation::SiluGate, ..Epilogue::NONE };
    let points = [
        ([256, 384, 512], "128,128,128", row_major, bf16, bf16, Epilogue::NONE),
        ([300, 200, 500], "128,256,128", row_major, bf16, bf16, Epilogue::NONE),
        ([300, 200, 500], "300,500,200", row_major, bf16, f32, Epilogue::NONE),
        ([8, 1024, 1024], "8,512,512", row_major, bf16, bf16, Epilogue::NONE),
        ([1, 640, 384], "1,128,640", row_major, bf16, bf16, bias),
        ([256, 384, 512], "128,128,256", row_major, f32, f32, Epilogue::NONE),
        ([100, 333, 200], "56,128,128", row_major, f32, f32, residual),
        ([100, 333, 200], "56,128,256", row_major, bf16, bf16, residual),
        ([256, 384, 512], "64,256,128", row_major, bf16, bf16, all),
        ([72, 512, 384], "72,384,512", transposed, bf16, bf16, gate),
        ([300, 200, 500], "128,128,128", transposed, bf16, bf16, bias),
        ([256, 384, 512], "128,128,384", transposed, f32, f32, all),
        ([40, 256, 512], "40,128,128", feature_major, bf16, bf16, all),
        ([130, 333, 264], "128,88,256", feature_major, bf16, bf16, residual),
    ];
    let mut plans = Vec::new();
    for chip in Chip::ALL {
        for (sizes, tiles, layout, input, output, epilogue) in points {
            let mut request = request(chip, sizes, Some(tiles));
            let [m, k, n] = sizes;
            request.spec = matmul::Spec { m, k, n, input, output, layout, epilogue };
            plans.push(request.plan().unwrap());
        }
    }
    plans
}

/// The eight matmuls of a Llama-3.1-8B layer and head; those of equal sizes (q and o, k and v, gate and up) are one.
const LLAMA_8B: [(&str, usize, usize); 5] = [
    ("q_proj, o_proj", 4096, 4096),
    ("k_proj, v_proj", 4096, 1024),
    ("gate_proj, up_proj", 4096, 14336),
    ("down_proj", 14336, 4096),
    ("lm_head", 4096, 128_256),
];

fn llama(tokens: &[usize]) -> Vec<matmul::plan::Plan> {
    let mut plans = Vec::new();
    for chip in Chip::ALL {
        for &m in tokens {
            plans.extend(LLAMA_8B.map(|(_, k, n)| request(chip, [m, k, n], None).plan().unwrap()));
        }
    }
    plans
}

#[test]
fn plans_are_exact_on_every_chip() {
    let plans = spread();
    assert!(plans.len() >= 60);
    let answers = certify_all(&plans);
    assert_exact("matmul", &answers);
}

#[test]
fn decode_matmuls_of_llama_compile_at_planned_tiles() {
    let answers = certify_all(&llama(&[8]));
    assert_exact("matmul", &answers);
}

#[test]
#[ignore = "20 minutes of CPU: make certify-all"]
fn every_matmul_of_llama_compiles_at_planned_tiles() {
    let answers = certify_all(&llama(&[8, 512, 4096]));
    assert_exact("matmul", &answers);
}

#[test]
#[ignore = "minutes of CPU: make certify-all"]
fn large_gated_kernels_compile_on_every_chip() {
    let gate = Epilogue { activation: Activation::SiluGate, ..Epilogue::NONE };
    let mut plans = Vec::new();
    for (chip, input) in Chip::ALL.iter().flat_map(|&chip| [(chip, Element::Bf16), (chip, Element::F32)]) {
        let mut request = request(chip, [512, 1024, 512], None);
        request.spec.epilogue = gate;
        (request.spec.input, request.spec.output) = (input, input);
        plans.push(request.plan().unwrap());
    }
    let answers = certify_all(&plans);
    assert_exact("matmul", &answers);
}

/// Merges what was certified into the kernel's table, if asked to.
fn record<P: KernelPlan>(kernel: &str, certified: Vec<Record<P::Tiles>>) {
    if !recording() {
        return;
    }
    static TABLES: Mutex<()> = Mutex::new(());
    let _guard = TABLES.lock().unwrap();
    let path = format!("{}/kernels/tuned/{kernel}.json", env!("CARGO_MANIFEST_DIR"));
    let mut records: Vec<Record<P::Tiles>> = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    for mut new in certified {
        let same = |old: &Record<P::Tiles>| (old.chip, &old.problem, old.tiles) == (new.chip, &new.problem, new.tiles);
        // What the profile told of this very kernel is not lost to a run in which it was stopped.
        let told = records.iter().find(|old| same(old) && (&old.compiler, old.vmem) == (&new.compiler, new.vmem));
        let cycles = new.cycles.or(told.and_then(|old| old.cycles));
        records.retain(|old| !same(old));
        new.cycles = cycles;
        records.push(new);
    }
    records.sort_by(|a, b| (a.chip, &a.problem, a.tiles).cmp(&(b.chip, &b.problem, b.tiles)));
    let lines: Vec<String> = records.iter().map(|record| serde_json::to_string(record).unwrap()).collect();
    std::fs::write(format!("{path}.partial"), format!("[\n{}\n]\n", lines.join(",\n"))).unwrap();
    std::fs::rename(format!("{path}.partial"), path).unwrap();
}

/// q [1024, 32, 128], 8 KV heads, pages of 128 tokens, 8 sequences of up to 4608 tokens, bf16: what JAX's kernel asks
/// 37.54 MiB for is planned and certified within every chip's default limit (16 MiB on v5p), whole.
#[test]
fn the_incident_fits_on_every_chip() {
    let plans = Chip::ALL.map(|chip| rpa::Request::new(chip.name()).plan().unwrap());
    let answers = certify_all(&plans);
    assert_exact("rpa", &answers);
    for certified in answers.iter().flatten() {
        let limit = certified.plan.chip.info().default_scoped_limit;
        assert!(certified.certificate.kernels[0].total <= limit, "{certified}");
        assert!(matches!(certified.plan.verdict, Fit::Fits { .. }), "{certified}");
    }
}

/// Attentions of Llama-3.1-8B on 1, 2, 4 and 8 devices; head dimensions, page sizes, groups, types, windows, soft caps and
/// decode-only launches.
fn attentions(chip: Chip) -> Vec<rpa::Request> {
    let llama = rpa::Request::new(chip.name());
    let decode = rpa::Request { kind: Kind::Decode, q: "8x32x128".into(), ..llama.clone() };
    let small = rpa::Request { q: "64x8x128".into(), page_size: 16, max_seq_len: 1024, max_seqs: 4, ..llama.clone() };
    let mut requests = Vec::new();
    for devices in [1, 2, 4, 8] {
        for (of, tokens) in [(&llama, 1024), (&decode, 8)] {
            let q = format!("{tokens}x{}x128", 32 / devices);
            requests.push(rpa::Request { q, kv_heads: 8 / devices, ..of.clone() });
        }
    }
    for (q, kv_heads, page_size, element) in [
        ("64x8x64", 8, 16, Element::Bf16),
        ("64x8x64", 2, 64, Element::F32),
        ("64x8x256", 4, 128, Element::Bf16),
        ("64x4x256", 2, 32, Element::F32),
        ("64x32x128", 8, 256, Element::Bf16),
        ("64x4x128", 4, 64, Element::Bf16),
        ("64x6x128", 2, 32, Element::Bf16),
        ("64x9x64", 3, 16, Element::F32),
        ("64x20x128", 4, 128, Element::Bf16),
        ("64x6x128", 1, 16, Element::F32),
        ("64x14x64", 2, 32, Element::Bf16),
        ("64x8x128", 1, 256, Element::F32),
        ("100x16x128", 8, 16, Element::F32),
    ] {
        requests.push(rpa::Request { q: q.into(), kv_heads, page_size, element, ..small.clone() });
    }
    for (sliding_window, soft_cap, kind) in
        [(Some(100), None, Kind::Mixed), (None, Some(30.0), Kind::Mixed), (Some(200), Some(50.0), Kind::Decode)]
    {
        requests.push(rpa::Request { sliding_window, soft_cap, kind, kv_heads: 2, ..small.clone() });
    }
    requests
}

/// Two of the smaller attentions on each chip, others on every one.
#[test]
fn plans_of_attention_are_exact() {
    let mut plans = Vec::new();
    for (index, chip) in Chip::ALL.into_iter().enumerate() {
        let own = attentions(chip).into_iter().skip(8 + index).step_by(Chip::ALL.len()).take(2);
        plans.extend(own.map(|request| request.plan().unwrap()));
    }
    let answers = certify_all(&plans);
    assert_exact("rpa", &answers);
}

#[test]
#[ignore = "minutes of CPU: make certify-all"]
fn plans_of_attention_are_exact_on_every_chip() {
    let plans =
        Chip::ALL.map(|chip| attentions(chip).iter().map(|request| request.plan().unwrap()).collect::<Vec<_>>());
    assert!(plans.iter().map(Vec::len).sum::<usize>() >= 60);
    for plans in plans {
        assert_exact("rpa", &certify_all(&plans));
    }
}

#[test]
fn a_kernel_too_large_is_a_verdict_with_both_numbers() {
    let mut request = request(Chip::V5p, [256, 1024, 512], Some("128,256,512"));
    request.vmem_limit = Some("512KiB".into());
    let certified = certify_matmul(&request, &certifier()).unwrap();
    let Verdict::OutOfMemory(out) = &certified.certificate.verdict else { panic!("{certified}") };
    assert_eq!((out.memory.as_str(), out.limit.as_mib()), ("vmem", 0.5), "{}", out.message);
    // The compiler rounds to hundredths of a MiB and may stop counting before spills.
    assert!(out.asked.as_mib() >= certified.plan.total.as_mib() - 0.01, "{out} for {}", certified.plan);
    assert!(certified.to_string().contains("--tiles"), "the plan says what to do: {certified}");
    // The remedy works.
    request.vmem_limit = Some("4MiB".into());
    assert_exact("matmul", &[Ok(certify_matmul(&request, &certifier()).unwrap())]);
}

/// `pagoda certify`: exit code, standard output and standard error.
fn pagoda_certify(line: &str) -> (Option<i32>, String, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_pagoda"));
    let output = command.arg("certify").args(line.split_whitespace()).output().unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.code(), stdout, stderr)
}

#[test]
fn the_command_line_tells_verdict_cycles_and_memory() {
    let (code, stdout, stderr) = pagoda_certify("matmul --m 8 --n 256 --k 256 --chip v5e --json");
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    let told: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(told["differences"].as_array().map(Vec::len), Some(0), "{told:#}");
    let certificate = &told["certificate"];
    assert!(certificate["cycles"][0]["cycles"].as_u64() > Some(100), "{told:#}");
    // x and w in bf16, and the result.
    assert_eq!(certificate["memory"]["arguments"], 2 * (8 * 256 + 256 * 256), "{told:#}");
    assert_eq!(certificate["kernels"][0]["total"], told["plan"]["total"], "{told:#}");
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
    let plan = request(Chip::V5p, [8, 256, 256], None).plan().unwrap();
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
