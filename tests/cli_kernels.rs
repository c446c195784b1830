//! The kernels' command line as users meet it: plan, emit, inspect and run, what they print, and bad input.
//!
//! Certification is in `certify.rs`: it takes seconds a kernel.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use pagoda_engine::pjrt::Kind;
use pagoda_ir::mosaic::{self, Semantics, Window};
use pagoda_ir::{Context, Element, stablehlo::Module};
use serde_json::Value;
use tempfile::TempDir;

/// A small attention whose plan has one KV page per block and several blocks.
const RPA: &str = "--q 24x8x128 --kv-heads 2 --page-size 16 --max-seq-len 64 --max-seqs 4";
const TILES: &str = "--tiles 8,2 --lengths 9/48,1/55,0/0,3/20 --random 7";
const MATMUL: &str = "--m 40 --n 200 --k 300 --dtype bf16";

/// `pagoda` with the words of `line`.
fn pagoda_in(folder: &Path, line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagoda"));
    command
        .args(shlex::split(line).expect("quotes are closed"))
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Standard output of a run that must succeed.
fn done(folder: &Path, line: &str) -> String {
    let output = pagoda_in(folder, line);
    assert_eq!(output.status.code(), Some(0), "pagoda {line}\n{}{}", stdout(&output), stderr(&output));
    stdout(&output)
}

/// A run that must end with `code` and say all of `words` on standard error, in one line.
fn refused(folder: &Path, line: &str, code: i32, words: &[&str]) {
    let output = pagoda_in(folder, line);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "pagoda {line}\n{}{said}", stdout(&output));
    for word in words {
        assert!(said.contains(word), "pagoda {line}\nlacks `{word}`: {said}");
    }
    assert!(!said.contains("panicked"), "pagoda {line}\n{said}");
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn the_incident_is_planned_in_full() {
    let incident = "rpa --q 1024x32x128 --kv-heads 8 --page-size 128 --max-seq-len 4608 --max-seqs 8 --chip v5p";
    let plan = json(&done(Path::new("."), &format!("plan {incident} --json")));
    let buffers = plan["vmem"]["buffers"].as_array().unwrap();
    let sum: u64 = buffers.iter().map(|buffer| buffer["bytes"].as_u64().unwrap()).sum();
    assert_eq!((plan["total"].as_u64(), plan["limit"].as_u64()), (Some(sum), Some(16 << 20)), "{plan}");
    assert!(sum < 16 << 20 && buffers.iter().any(|buffer| buffer["name"] == "kv"), "{plan}");
    assert!(plan["verdict"] == "fits" && plan["spills"]["from"] == "certified", "{plan}");
    let table = done(Path::new("."), &format!("plan {incident}"));
    for words in ["rpa-p128-", "8 x 36 pages of 128", "grid 2", "sum without spills", "16.00 MiB"] {
        assert!(table.contains(words), "lacks `{words}`:\n{table}");
    }
    // Too large, and what to do: never a smaller batch or shorter sequences.
    let table = done(Path::new("."), &format!("plan {incident} --tiles 32,30"));
    for words in ["does not fit", "try --tiles ", "try --vmem-limit "] {
        assert!(table.contains(words), "lacks `{words}`:\n{table}");
    }
}

#[test]
fn every_form_that_is_emitted_runs_and_agrees() {
    let dir = TempDir::new().unwrap();
    // Compiling the StableHLO form for a plugin takes a second: for one of each kernel.
    for (kernel, options) in [
        (format!("rpa {RPA}"), TILES),
        (format!("rpa {RPA} --dtype f32 --sliding-window 20 --soft-cap 5 --layers 2"), TILES),
        (format!("rpa {RPA} --decode"), "--lengths 1/48,1/55,0/0,1/1 --random 7"),
        (format!("matmul {MATMUL}"), "--tiles 16,128,128 --random 3"),
        (format!("matmul {MATMUL} --layout weight-transposed --bias --residual --out-dtype f32"), ""),
        ("matmul --m 40 --n 256 --k 300 --layout feature-major --silu-gate --chip v6e".into(), "--random 5"),
    ] {
        let (tiles, inputs) = match options.split_once(" --") {
            Some((tiles, rest)) if tiles.starts_with("--tiles") => (tiles, format!("--{rest}")),
            _ => ("", options.to_owned()),
        };
        for (form, file) in [("", "readable.mlir"), ("--wire", "wire.mlir"), ("--stablehlo", "plain.mlir")] {
            done(dir.path(), &format!("emit {kernel} {tiles} {form} --out {file}"));
        }
        let report = |line: &str| json(&done(dir.path(), &format!("run {line} {inputs} --json"))).take();
        let on_plugin = kernel == format!("rpa {RPA}") || kernel.contains("--silu-gate");
        let against = if on_plugin { "stablehlo" } else { "reference" };
        let emitted_here = report(&format!("{kernel} {tiles} --check-against {against} --dma all"));
        assert_eq!(emitted_here[0]["check"]["agrees"], true, "{emitted_here}");
        for line in ["readable.mlir --dma early", "wire.mlir --tile-machine --dma random:9"] {
            let from_file = report(&format!("{line} --check-against reference"));
            assert_eq!(from_file[0]["outputs"], emitted_here[0]["outputs"], "{line} of {kernel}");
            assert_eq!(from_file[0]["counters"], emitted_here[0]["counters"], "{line} of {kernel}");
        }
        if on_plugin {
            let on_cpu = report("plain.mlir --plugin cpu --check-against reference");
            assert_eq!((on_cpu[0]["on"].as_str(), &on_cpu[0]["check"]["agrees"]), (Some("cpu"), &Value::Bool(true)));
        }
    }
}

#[test]
fn a_line_of_the_readable_form_is_the_way_back_to_it() {
    let text = done(Path::new("."), &format!("emit rpa {RPA}"));
    let line = text.lines().next().unwrap().strip_prefix("// pagoda ").expect("the first line is the command");
    assert_eq!(done(Path::new("."), line), text);
    assert!(line.contains("--tiles") && line.contains("--chip v5p") && line.contains("--vmem-limit 16MiB"), "{line}");
    assert!(text.contains("%kv_pages: memref<") && text.contains("tpu.wait_dma2"), "{text}");
}

#[test]
fn planted_faults_are_told_in_full() {
    let dir = TempDir::new().unwrap();
    let text = done(dir.path(), &format!("emit rpa {RPA} --tiles 8,2"));
    let lines: Vec<&str> = text.lines().collect();
    let without = |at: usize| [&lines[..at], &lines[at + 1..]].concat().join("\n");
    // The first waits are for an earlier entry's results, then for this one's queries.
    let of_queries = (0..lines.len()).filter(|&at| lines[at].contains("tpu.wait_dma2")).nth(1).unwrap();
    // Of the output's rows.
    let last_copy = lines.iter().rposition(|line| line.contains("tpu.enqueue_dma")).unwrap();
    let inputs = "--lengths 9/48,1/55 --random 7";
    fs::write(dir.path().join("race.mlir"), without(of_queries)).unwrap();
    let kernel = "kernel `rpa-p16-bq8-kv2`: ";
    let race = ["read of a buffer whose DMA is in flight", "vector.load at race.mlir:", "buffer `queries` at ["];
    let dma = ["grid step [0]", "DMA from `q` to `queries` started at race.mlir:"];
    refused(dir.path(), &format!("run race.mlir {inputs}"), 1, &[&[kernel][..], &race, &dma].concat());
    let output = pagoda_in(dir.path(), &format!("run race.mlir {inputs} --dma all --json"));
    let report = json(&stdout(&output));
    assert_eq!((output.status.code(), &report[0]["fault"]["kind"]), (Some(1), &"read-in-flight".into()), "{report}");
    assert_eq!(report[0]["dma"], "early", "the order that found it");

    fs::write(dir.path().join("hang.mlir"), without(last_copy)).unwrap();
    refused(dir.path(), &format!("run hang.mlir {inputs}"), 1, &[kernel, "grid step [0]"]);
    // A wrong result of a kernel that does nothing wrong: the masks of causal rows, turned round.
    let turned = |line: &&str| match line.contains("vector<") {
        true => line.replace("arith.cmpi sle", "arith.cmpi sge"),
        false => (*line).to_owned(),
    };
    let wrong = lines.iter().map(turned).collect::<Vec<_>>().join("\n");
    assert_ne!(wrong, text.trim_end());
    fs::write(dir.path().join("wrong.mlir"), wrong).unwrap();
    done(dir.path(), &format!("run wrong.mlir {inputs}"));
    // Results are the problem's, without the kernel's padding.
    let report = json(&done(
        dir.path(),
        "run rpa --q 37x21x80 --kv-heads 3 --page-size 16 --max-seq-len 160 --max-seqs 2 --random 3 --lengths 20/150 --json",
    ));
    assert_eq!(report[0]["outputs"][0]["type"], "bf16[37,21,80]", "{report}");
    let words = ["differs from the reference in f64: rpa-p16-bq8-kv2[", "expected", "values are wrong"];
    refused(dir.path(), &format!("run wrong.mlir {inputs} --check-against reference"), 1, &words);
    refused(dir.path(), &format!("run wrong.mlir {inputs} --check-against stablehlo"), 1, &["its StableHLO form"]);
}

/// An `.npy` file, format version 1.
fn npy(path: &Path, descr: &str, shape: &str, data: &[u8]) {
    let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    let header = format!("{header:<117}\n"); // with the ten bytes before it a multiple of 64
    let length = (header.len() as u16).to_le_bytes();
    fs::write(path, [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), data].concat()).unwrap();
}

fn floats(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values.flat_map(f32::to_le_bytes).collect()
}

#[test]
fn arrays_come_from_numpy() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    npy(&path("x.npy"), "<f4", "(8, 16)", &floats((0..128).map(|value| value as f32)));
    npy(&path("one.npy"), "<f4", "(16, 24)", &floats((0..384).map(|_| 1.0)));
    let matmul = "--m 8 --n 24 --k 16 --input x=x.npy --input w=one.npy";
    let report = json(&done(dir.path(), &format!("run matmul {matmul} --check-against reference --json")));
    // Sums of the rows 0..16, 16..32, ...
    let output = &report[0]["outputs"][0];
    assert_eq!(
        (&output["min"], &output["max"], &output["type"]),
        (&120.0.into(), &1912.0.into(), &"bf16[8,24]".into())
    );

    // Ragged metadata, by name: one sequence, two rows, 20 keys on pages 3 and 0.
    for (name, shape, values) in [
        ("kv_lens", "(4,)", vec![20, 9, 9, 9]),
        ("page_indices", "(4, 4)", [vec![3, 0], vec![-1; 14]].concat()),
        ("cu_q_lens", "(5,)", vec![0, 2, -1, -1, -1]),
        ("num_seqs", "(1,)", vec![1_i32]),
    ] {
        let bytes: Vec<u8> = values.iter().flat_map(|value: &i32| value.to_le_bytes()).collect();
        npy(&path(&format!("{name}.npy")), "<i4", shape, &bytes);
    }
    npy(&path("kv_pages.npy"), "<f4", "(16, 16, 4, 128)", &floats((0..16 * 16 * 4 * 128).map(|_| 1.0)));
    npy(&path("q.npy"), "<f4", "(24, 8, 128)", &floats((0..24 * 8 * 128).map(|_| 0.5)));
    let names = ["q", "kv_pages", "kv_lens", "page_indices", "cu_q_lens", "num_seqs"];
    let inputs: String = names.iter().map(|name| format!(" --input {name}={name}.npy")).collect();
    let report = json(&done(dir.path(), &format!("run rpa {RPA} {inputs} --check-against reference --json")));
    let output = &report[0]["outputs"][0];
    assert_eq!((&output["min"], &output["max"]), (&0.0.into(), &1.0.into()), "ones where there are rows: {report}");
    assert_eq!(report[0]["check"]["agrees"], true, "{report}");

    npy(&path("long.npy"), "<i8", "(4,)", &[0; 32]);
    npy(&path("short.npy"), "<f4", "(8, 16)", &[0; 100]);
    fs::write(path("text.npy"), "1 2 3").unwrap();
    let kv_lens: Vec<u8> = [99, 0, 0, 0].iter().flat_map(|value: &i32| value.to_le_bytes()).collect();
    npy(&path("far.npy"), "<i4", "(4,)", &kv_lens);
    for (line, words) in [
        ("matmul --m 8 --n 24 --k 16 --input x=none.npy", &["cannot read none.npy"][..]),
        ("matmul --m 8 --n 24 --k 16 --input x=text.npy", &["text.npy", "no .npy file"]),
        ("matmul --m 8 --n 24 --k 16 --input x=short.npy", &["100 bytes of the 512"]),
        ("matmul --m 8 --n 24 --k 16 --input x=one.npy", &["f32[16, 24], not bf16[8,16]", "numpy dtype float32"]),
        (
            "matmul --m 8 --n 24 --k 16 --input y=x.npy",
            &["input = y names no operand", "x (or 0) bf16[8,16], w (or 1) bf16[16,24]"],
        ),
        ("matmul --m 8 --n 24 --k 16 --input x", &["input = x is not NAME=FILE.npy"]),
        ("matmul --m 8 --n 24 --k 16 --input x=x.npy --input x=x.npy", &["input = x is given twice"]),
        (&format!("rpa {RPA} --input kv_lens=long.npy"), &["i64[4], not i32[4]", "numpy dtype int32"]),
        (
            &format!("rpa {RPA} {inputs} --input kv_lens=far.npy").replace("--input kv_lens=kv_lens.npy", ""),
            &["kv_lens[0] = 99 is beyond pages_per_seq * page_size = 4 * 16 = 64"],
        ),
    ] {
        refused(dir.path(), &format!("run {line}"), 2, words);
    }
}

#[test]
fn kernels_of_others_are_inspected_and_run() {
    let dir = TempDir::new().unwrap();
    let jax = concat!(env!("CARGO_MANIFEST_DIR"), "/ir/tests/data/scaled_sums.mlir");
    let kernels = json(&done(dir.path(), &format!("inspect {jax} --json")));
    let kernel = &kernels[0];
    assert_eq!((&kernel["name"], &kernel["vmem_bytes"]), (&"scaled_sums".into(), &12288.into()), "{kernel}");
    assert_eq!((&kernel["grid"][0][1], &kernel["ops"]["tpu.enqueue_dma"]), (&"arbitrary".into(), &3.into()));
    let table = done(dir.path(), &format!("inspect {jax}"));
    for words in ["scaled_sums: grid 1 arbitrary", "f32[64,128]", "VMEM declared: 12.00 KiB (12288 bytes)", "8.00 MiB"]
    {
        assert!(table.contains(words), "lacks `{words}`:\n{table}");
    }
    npy(&dir.path().join("rows.npy"), "<i4", "(2,)", &[1, 0, 0, 0, 3, 0, 0, 0]);
    let report = json(&done(dir.path(), &format!("run {jax} --input arg1=rows.npy --json")));
    assert_eq!(report[0]["outputs"][0]["type"], "f32[8,128]", "{report}");
    refused(dir.path(), &format!("run {jax}"), 2, &["arg1 = i32[2] cannot be drawn at random", "--input arg1="]);
    let checked = format!("run {jax} --check-against reference");
    refused(dir.path(), &checked, 2, &["does not say which problem it solves", "pagoda emit"]);
    // RPA without the line that names it: recognised by its operands, a batch is drawn.
    let wire = done(dir.path(), &format!("emit rpa {RPA} --wire"));
    fs::write(dir.path().join("rpa.mlir"), wire.split_once('\n').unwrap().1).unwrap();
    let report = json(&done(dir.path(), "run rpa.mlir --random 1 --json"));
    assert!(report[0]["counters"]["mxu_flops"].as_u64() > Some(0), "{report}");
    // Bytecode, as `jax.export` writes it: the kernels are found, the types of the calls are not.
    let context = Context::new();
    let kernel = mosaic::kernel(&context, "twice", |k| {
        k.grid([(1, Semantics::Arbitrary)]);
        let x = k.input("x", Element::F32, &[8, 128], Window::whole(&[8, 128]));
        let y = k.output("y", Element::F32, &[8, 128], Window::whole(&[8, 128]));
        y.store(x.load() * 2.0);
    });
    let kernel = kernel.unwrap();
    let module = Module::new(&context, "main");
    module.function("main", &kernel.inputs(), |b, operands| kernel.call(b, operands)).unwrap();
    fs::write(dir.path().join("twice.bc"), module.bytecode()).unwrap();
    let kernels = json(&done(dir.path(), "inspect twice.bc --json"));
    assert_eq!((&kernels[0]["name"], &kernels[0]["buffers"][1]["name"]), (&"twice".into(), &"y".into()), "{kernels}");
    let from_bytecode = json(&done(dir.path(), "run twice.bc --dma all --json"));
    fs::write(dir.path().join("twice.mlir"), module.text()).unwrap();
    assert_eq!(json(&done(dir.path(), "run twice.mlir --dma all --json")), from_bytecode);
    // A plain module.
    let plain = "module { func.func @main(%a: tensor<2x2xf32>) -> tensor<2x2xf32> {
        %0 = stablehlo.add %a, %a : tensor<2x2xf32> return %0 : tensor<2x2xf32> } }";
    fs::write(dir.path().join("plain.mlir"), plain).unwrap();
    assert_eq!(json(&done(dir.path(), "inspect plain.mlir --json")), Value::Array(vec![]));
    npy(&dir.path().join("a.npy"), "<f4", "(2, 2)", &floats([1.0, 2.0, 3.0, 4.0].into_iter()));
    let report = json(&done(dir.path(), "run plain.mlir --plugin cpu --input a=a.npy --json"));
    assert_eq!((&report[0]["outputs"][0]["min"], &report[0]["outputs"][0]["max"]), (&2.0.into(), &8.0.into()));
    refused(dir.path(), "run plain.mlir", 2, &["no Mosaic kernel", "--plugin cpu"]);
    refused(dir.path(), &format!("run {jax} --plugin cpu"), 2, &["Mosaic kernel", "cpu", "--tile-machine"]);
}

#[test]
fn bad_problems_are_one_clear_error() {
    let rpa = |change: &str, to: &str| format!("rpa {}", RPA.replace(change, to));
    let huge = usize::MAX.to_string();
    let cases: &[(&str, &[&str])] = &[
        ("matmul --m 0 --n 8 --k 8", &["m = 0 is below 1"]),
        (&format!("matmul --m {huge} --n 8 --k 8"), &["m = ", "is beyond"]),
        ("matmul --m 1000000000 --n 8 --k 1000000000", &["m * k = 1000000000000000000 is beyond 1099511627776"]),
        ("matmul --m 8 --n 8 --k -1", &["--k"]),
        ("matmul --m 8 --n 8", &["--k"]),
        (
            "matmul --m 8 --n 200 --k 8 --silu-gate --tiles 8,200,8",
            &["tiles.n = 200 is not a multiple of 128", "give 256"],
        ),
        ("matmul --m 8 --n 8 --k 8 --dtype fp8", &["fp8", "bf16"]),
        ("matmul --m 256 --n 256 --k 256 --tiles 100,100,100", &["tiles", "100"]),
        ("matmul --m 256 --n 256 --k 256 --tiles 8,128", &["tiles = 8,128 is not three positive numbers"]),
        ("matmul --m 8 --n 8 --k 8 --chip v9", &["chip = v9 is not known", "v4, v5e, v5p, v6e or tpu7x"]),
        ("matmul --m 8 --n 8 --k 8 --vmem-limit 65MiB", &["vmem-limit = 65.00 MiB", "64.00 MiB", "v5p"]),
        ("matmul --m 8 --n 8 --k 8 --vmem-limit much", &["--vmem-limit", "`much` is not a size"]),
        ("matmul --m 8 --n 8 --k 8 --vmem-limit 0", &["vmem-limit = 0 B"]),
        (&rpa("24x8x128", "24x8"), &["q = 24x8 is not ROWSxHEADSxDIM"]),
        (&rpa("24x8x128", "0x8x128"), &["tokens = 0 is below 1"]),
        (&rpa("24x8x128", "99999999999x8x128"), &["tokens", "is beyond"]),
        (&rpa("24x8x128", &format!("24x8x{huge}")), &["tokens * q_heads * head_dim = [24, 8, ", "is beyond"]),
        (&rpa("--kv-heads 2", "--kv-heads 3"), &["q_heads = 8 is not a multiple of kv_heads = 3"]),
        (&rpa("--kv-heads 2", "--kv-heads 0"), &["kv_heads = 0 is below 1"]),
        (&rpa("--page-size 16", "--page-size 0"), &["page-size = 0 is below 1"]),
        (&rpa("--max-seqs 4", &format!("--max-seqs {huge}")), &["max-seqs"]),
        (
            &rpa("--max-seqs 4", "--max-seqs 4096 --max-seq-len 8192").replace("--max-seq-len 64 ", ""),
            &[
                "max_seqs * pages_per_seq = 4096 * 512",
                "8.03 MiB of lengths and page indices in SMEM",
                "raise page-size",
            ],
        ),
        (&rpa("--max-seqs 4", "--max-seqs 4 --tiles 7,2"), &["tiles.queries = 7", "multiple of 8"]),
        (&rpa("--max-seqs 4", "--max-seqs 4 --tiles 8,5"), &["tiles.kv_pages = 5", "1 to 4"]),
        (&rpa("--max-seqs 4", "--max-seqs 4 --sliding-window 0"), &["sliding_window = 0 is below 1"]),
        (&rpa("--max-seqs 4", "--max-seqs 4 --soft-cap=-1"), &["soft_cap = -1 is not positive"]),
    ];
    for command in ["plan", "emit", "certify", "run"] {
        // The same values are wrong everywhere; once each is enough for the slower ones.
        for (index, (kernel, words)) in cases.iter().enumerate() {
            if command == "plan" || index % 7 == 0 {
                refused(Path::new("."), &format!("{command} {kernel}"), 2, words);
            }
        }
    }
    let large = "--m 1000000 --n 1000000 --k 1000000";
    done(Path::new("."), &format!("plan matmul {large}"));
    for (line, words) in [
        ("certify matmul --m 8 --n 8 --k 8 --timeout 0", &["timeout = 0"][..]),
        ("run", &["<FILE>"]),
        (&format!("run none.mlir matmul {MATMUL}"), &["FILE = none.mlir is a second thing to run"]),
        (&format!("run matmul {large}"), &["operands and results = ", "8.00 GiB", "smaller problem"]),
        (&format!("run matmul {MATMUL} --dma sometimes"), &["dma = sometimes", "random:SEED"]),
        (&format!("run matmul {MATMUL} --check-against jax"), &["jax", "reference"]),
        (&format!("run matmul {MATMUL} --lengths 1/1"), &["lengths = 1/1"]),
        (&format!("run rpa {RPA} --lengths 1:1"), &["lengths = 1:1 is not Q/KV[xN]"]),
        (&format!("run rpa {RPA} --lengths 3/2"), &["in sequence 0 more rows than KV tokens"]),
        (&format!("run rpa {RPA} --lengths 20/20,20/20"), &["has 40 rows; q has 24"]),
        (&format!("run rpa {RPA} --lengths 1/1x5"), &["lengths = 1/1x5 is more than max-seqs = 4"]),
        (&format!("certify matmul {MATMUL} --lengths 1/1"), &["matmul", "has no ragged batch"]),
        (&format!("certify rpa {RPA} --lengths 1/65"), &["more than 64 KV tokens"]),
        (&format!("tune rpa {RPA} --batch 1/1"), &["batch = 1/1 is not NAME=Q/KV[xN]"]),
        (&format!("tune rpa {RPA} --batch a=1/1 --batch a=1/2"), &["batch = a is given twice"]),
        (&format!("tune rpa {RPA} --batch a=1/99"), &["more than 64 KV tokens"]),
        (&format!("tune rpa {RPA} --candidates 0"), &["candidates = 0"]),
        (&format!("run matmul {MATMUL} --plugin none"), &["plugin `none` is neither cpu, cuda or tpu nor a file"]),
        (&format!("run matmul {MATMUL} --plugin cpu --check-against stablehlo"), &["with itself"]),
        (&format!("run matmul {MATMUL} --plugin cpu --dma early"), &["--dma = early", "--tile-machine"]),
        (
            &format!("run matmul {MATMUL} --plugin cpu --allow-unwritten-reads"),
            &["--allow-unwritten-reads", "tile machine"],
        ),
        (&format!("emit matmul {MATMUL} --wire --stablehlo"), &["--stablehlo"]),
    ] {
        refused(Path::new("."), line, 2, words);
    }
}

#[test]
fn bad_files_are_one_clear_error() {
    let dir = TempDir::new().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
    let wire = done(dir.path(), &format!("emit matmul {MATMUL} --wire"));
    let readable = done(dir.path(), &format!("emit matmul {MATMUL}"));
    write("no_body.mlir", wire.replace("custom_call_config", "other_config").as_bytes());
    let body = wire.find("TUzvUg").expect("bytecode in base64");
    write("base64.mlir", wire.replacen("TUzvUg", "%%%%%%", 1).as_bytes());
    write("magic.mlir", wire.replacen("TUzvUg", "AAAAAA", 1).as_bytes());
    write("unknown_op.mlir", readable.replacen("tpu.matmul", "tpu.matmul_and_more", 1).as_bytes());
    write("broken.mlir", readable.replacen("arith.constant", "arith.konstant 1 +", 1).as_bytes());
    write("cut.mlir", &readable.as_bytes()[..readable.len() / 2]);
    write("header.mlir", readable.replacen("\"m\":40", "\"m\":\"forty\"", 1).as_bytes());
    write("other.mlir", readable.replacen("\"m\":40", "\"m\":4096", 1).as_bytes());
    write("headless.mlir", readable.split_once('\n').unwrap().1.as_bytes());
    let plain = done(dir.path(), &format!("emit matmul {MATMUL} --stablehlo"));
    write("plain.mlir", plain.as_bytes());
    let smaller = "func.func @main(%x: tensor<40x300xbf16>, %w: tensor<300x200xbf16>) -> tensor<40x100xbf16> {
        %0 = stablehlo.constant dense<0.0> : tensor<40x100xbf16> return %0 : tensor<40x100xbf16> }";
    write("smaller.mlir", format!("{}\n{smaller}", plain.lines().next().unwrap()).as_bytes());
    write("ill.mlir", b"func.func @main(%a: tensor<2xf32>) -> tensor<2xf32> { %0 = stablehlo.addd %a return %0 }");
    // Two calls of kernels, the second damaged.
    let call = wire.lines().find(|line| line.contains("custom_call_config")).expect("a call");
    write(
        "second.mlir",
        wire.replacen(call, &format!("{call}\n{}", call.replacen("TUzvUg", "\\22,,", 1)), 1).as_bytes(),
    );
    // The word alone is not a kernel; nor is a kernel's configuration one for what it holds beside.
    write("word.mlir", format!("// custom_call_config\n{plain}").as_bytes());
    write("beside.mlir", wire.replacen("{\\22custom", "{\\22a\\22:{},\\22custom", 1).as_bytes());
    assert_eq!(json(&done(dir.path(), "inspect word.mlir --json")), Value::Array(vec![]));
    assert_eq!(json(&done(dir.path(), "inspect beside.mlir --json"))[0]["name"], "matmul-m40-n128-k300");
    write("prose.mlir", b"Once upon a time");
    write("empty.mlir", b"");
    write("binary.mlir", &[0xff; 1000]);
    let unknown_op = ["tpu.matmul_and_more", "the tile machine does not know this op", "unknown_op.mlir:"];
    for (line, words) in [
        ("inspect none.mlir", &["cannot read none.mlir"][..]),
        ("run none.mlir", &["cannot read none.mlir"]),
        ("inspect no_body.mlir", &["no_body.mlir: it calls @tpu_custom_call, but no kernel"]),
        ("inspect base64.mlir", &["base64.mlir: ", "is not base64", "write the module again"]),
        ("run magic.mlir", &["magic.mlir: ", "is not an MLIR module"]),
        ("run unknown_op.mlir", &unknown_op),
        ("run broken.mlir", &["broken.mlir", "arith.konstant"]),
        ("run cut.mlir", &["cut.mlir", "is not an MLIR module"]),
        ("run header.mlir", &["header.mlir: line 1 names no kernel", "forty"]),
        ("run headless.mlir", &["headless.mlir: the sizes of its arrays"]),
        ("run headless.mlir --lengths 1/1", &["lengths = 1/1 is of no use"]),
        ("run plain.mlir", &["plain.mlir: it has no Mosaic kernel", "--plugin cpu"]),
        ("run smaller.mlir --plugin cpu", &["results of smaller.mlir = bf16[40,100]", "bf16[40,200]"]),
        ("run ill.mlir --plugin cpu", &["ill.mlir: the plugin for cpu does not take it", "stablehlo.addd"]),
        ("inspect second.mlir", &["second.mlir: ", "call 2 of a Mosaic kernel: its backend_config is damaged"]),
        ("inspect prose.mlir", &["prose.mlir: it is neither a StableHLO module nor a Mosaic kernel"]),
        ("inspect empty.mlir", &["empty.mlir: it is neither"]),
        ("run binary.mlir", &["binary.mlir: it is neither"]),
        ("inspect .", &["cannot read ."]),
    ] {
        let code = if line == "inspect ." { 1 } else { 2 };
        refused(dir.path(), line, code, words);
    }
    // A kernel that does not do what its first line says is caught by the machine or by its result.
    assert_eq!(pagoda_in(dir.path(), "run other.mlir --check-against reference").status.code(), Some(1));
    // Wherever a body is damaged: an error of the file, or nothing that shows; no crash, and no other code.
    let mut codes = std::collections::BTreeSet::new();
    let end = body + wire[body..].find('\\').expect("the end of the string");
    for at in (body + 20..end - 4).step_by((end - body) / 10) {
        let mut bytes = wire.clone().into_bytes();
        bytes[at..at + 4].copy_from_slice(b"////");
        write("damaged.mlir", &bytes);
        let output = pagoda_in(dir.path(), "run damaged.mlir --check-against reference");
        let code = output.status.code();
        assert!(code.is_some_and(|code| code <= 2), "{at}: {code:?} {}", stderr(&output));
        assert!(!stderr(&output).contains("panicked"), "{at}: {}", stderr(&output));
        codes.extend(code);
    }
    assert!(codes.contains(&2), "{codes:?}");
    // What cannot be written leaves nothing behind.
    refused(dir.path(), &format!("emit matmul {MATMUL} --out none/kernel.mlir"), 2, &["none/kernel.mlir"]);
    done(dir.path(), &format!("emit matmul {MATMUL} --out kernel.mlir"));
    assert_eq!(fs::read_to_string(dir.path().join("kernel.mlir")).unwrap(), readable);
    assert!(
        fs::read_dir(dir.path())
            .unwrap()
            .flatten()
            .all(|entry| !entry.file_name().to_string_lossy().contains("pagoda"))
    );
}

#[test]
fn results_are_written_and_held_against_what_is_expected() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    npy(&path("x.npy"), "<f4", "(8, 16)", &floats((0..128).map(|value| value as f32)));
    npy(&path("one.npy"), "<f4", "(16, 24)", &floats((0..384).map(|_| 1.0)));
    let matmul = "matmul --m 8 --n 24 --k 16 --input 0=x.npy --input w=one.npy";
    let report = json(&done(dir.path(), &format!("run {matmul} --output out/deep --json")));
    let (name, file) = (&report[0]["outputs"][0]["name"], &report[0]["outputs"][0]["file"]);
    let (name, file) = (name.as_str().unwrap(), file.as_str().unwrap());
    assert_eq!(file, format!("out/deep/{name}.npy"));
    // Sums of the rows 0..16, 16..32, ... in bf16, which come as f32 and can be read again.
    let bytes = fs::read(path(file)).unwrap();
    assert!(bytes.len() == 128 + 4 * 8 * 24 && bytes.ends_with(&1912_f32.to_le_bytes()));
    let agreed = json(&done(dir.path(), &format!("run {matmul} --expect 0={file} --json")));
    assert_eq!(agreed[0]["expectations"][0]["agrees"], true, "{agreed}");
    let mut off = floats((0..8 * 24).map(|at| [120.0, 376.0, 632.0, 888.0, 1144.0, 1400.0, 1656.0, 1912.0][at / 24]));
    off[4 * 29..4 * 30].copy_from_slice(&377_f32.to_le_bytes());
    off[4 * 190..4 * 191].copy_from_slice(&f32::NAN.to_le_bytes());
    npy(&path("off.npy"), "<f4", "(8, 24)", &off);
    let expect = format!("run {matmul} --expect {name}=off.npy");
    let words = [
        "not as expected: ",
        &format!("{name}[1, 5] is 376, expected 377 (rtol 0, atol 0); 2 of 192"),
        "[7, 22]: 1912",
    ];
    refused(dir.path(), &expect, 1, &words);
    refused(dir.path(), &format!("{expect} --atol 1"), 1, &["[7, 22] is 1912, expected NaN", "1 of 192"]);
    for (line, words) in [
        ("--expect 0=x.npy", &["x.npy", "f32[8, 16], not bf16[8,24]"][..]),
        ("--expect 1=off.npy", &["expect = 1 names no result", "use one of: "]),
        ("--expect off.npy", &["expect = off.npy is not NAME=FILE.npy"]),
        ("--rtol -1", &["rtol"]),
        ("--ignore deadlock", &["deadlock", "a run goes on after: out-of-bounds, unwritten-read, "]),
        ("--expect 0=off.npy --rtol nan", &["rtol = NaN is not a tolerance"]),
        ("--random-int x=3..3", &["random-int = x=3..3 is not NAME=LOW..HIGH"]),
        ("--random-int 0=0..3", &["input = 0 is given twice"]),
        ("--random-int x=0..3", &["input = x is given twice: x is operand 0 too"]),
        ("--kernel 0", &["kernel"]),
    ] {
        let line = if line.starts_with("--kernel") {
            format!("run readable.mlir {line}")
        } else {
            format!("run {matmul} {line}")
        };
        if line.contains("readable") {
            done(dir.path(), &format!("emit matmul {MATMUL} --out readable.mlir"));
        }
        refused(dir.path(), &line, 2, words);
    }
    let jax = concat!(env!("CARGO_MANIFEST_DIR"), "/ir/tests/data/scaled_sums.mlir");
    let drawn = |key: &str| {
        json(&done(dir.path(), &format!("run {jax} --random-int {key}=1..4 --dma all --json")))[0]["outputs"].take()
    };
    assert_eq!(drawn("0"), drawn("arg1"));
    refused(
        dir.path(),
        &format!("run {jax} --random-int 0=0..3000000000"),
        2,
        &["is not within -2147483648 to 2147483647"],
    );
    refused(dir.path(), &format!("run {jax} --random-int 0=1..4 --kernel 1"), 2, &["kernel = 1 is not one of the 1"]);
}

#[test]
fn a_program_runs_whole_with_its_kernels_in_their_places() {
    let dir = TempDir::new().unwrap();
    let exported = |form: &str| format!("{}/ir/tests/data/exported.{form}", env!("CARGO_MANIFEST_DIR"));
    npy(&dir.path().join("x.npy"), "<f4", "(8, 128)", &floats((0..1024).map(|at| at as f32 / 1024.0)));
    npy(&dir.path().join("y.npy"), "<f4", "(8, 128)", &floats((0..1024).map(|_| 1.0)));
    // The square of 2 x + y, and the sum of it.
    let square: Vec<f32> = (0..1024).map(|at| (2.0 * (at as f32 / 1024.0) + 1.0).powi(2)).collect();
    npy(&dir.path().join("b.npy"), "<f4", "(8, 128)", &floats(square.iter().copied()));
    npy(&dir.path().join("a.npy"), "<f4", "()", &floats([square.iter().sum::<f32>()].into_iter()));
    let expect = "--expect 0=a.npy --expect result1=b.npy --rtol 1e-5 --dma all --json";
    let run = |form: &str, inputs: &str| {
        json(&done(dir.path(), &format!("run {} {inputs} {expect} --output {form}", exported(form))))
    };
    let text = run("mlir", "--input x=x.npy --input arg1=y.npy");
    let bytecode = run("bc", "--input arg0=x.npy --input 1=y.npy");
    for reports in [&text, &bytecode] {
        let [kernel, program] = &reports.as_array().unwrap()[..] else { panic!("{reports}") };
        assert_eq!((&kernel["kernel"], &kernel["on"]), (&"kernel".into(), &"tile machine".into()));
        assert_eq!(program["on"], "cpu, its kernels on the tile machine");
        assert!(program["expectations"].as_array().unwrap().iter().all(|one| one["agrees"] == true), "{program}");
    }
    let checksums = |reports: &Value| {
        reports[1]["outputs"].as_array().unwrap().iter().map(|output| output["checksum"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(checksums(&text), checksums(&bytecode));
    // The module within what `jax.export` serialises.
    let module = fs::read(exported("bc")).unwrap();
    let length = (module.len() as u32).to_le_bytes();
    fs::write(dir.path().join("program.bin"), [&[8, 0, 0, 0][..], &length, &module, &[0; 11]].concat()).unwrap();
    let serialised = json(&done(dir.path(), "run program.bin --input 0=x.npy --input 1=y.npy --json"));
    assert_eq!(checksums(&serialised), checksums(&text));
    for cut in [module.len() / 2, module.len() + 4] {
        let whole = fs::read(dir.path().join("program.bin")).unwrap();
        fs::write(dir.path().join("cut.bin"), &whole[..cut]).unwrap();
        refused(dir.path(), "inspect cut.bin", 2, &["cut.bin: ", "the bytecode is damaged"]);
    }
    // The kernel alone.
    let alone = json(&done(dir.path(), &format!("run {} --kernel 0 --input 0=x.npy --json", exported("mlir"))));
    assert_eq!(
        (alone.as_array().unwrap().len(), &alone[0]["outputs"][0]["type"]),
        (1, &"f32[8,128]".into()),
        "{alone}"
    );
    refused(
        dir.path(),
        &format!("run {} --expect 'result2=b.npy'", exported("mlir")),
        2,
        &["names no result", "result['a']"],
    );
    for (option, words) in [
        ("--names 5=a,b", &["names = 5=a,b is of none of the 1 kernels", "count the kernels from 0"][..]),
        ("--names a", &["are 1 names for the 2 arguments of `kernel`"]),
        ("--rtol 0.1", &["--expect <NAME=FILE.npy>"]),
    ] {
        refused(dir.path(), &format!("run {} {option}", exported("mlir")), 2, words);
    }
    // A fault of a kernel within a program, with its source line; the file is not here to be read.
    let text = fs::read_to_string(exported("mlir")).unwrap();
    let jax = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/ir/tests/cases/jax.mlir")).unwrap();
    let config = |text: &str, kernel: &str| {
        let line = text.lines().find(|line| line.contains(&format!("kernel_name = \"{kernel}\""))).expect("a call");
        line.split_once("backend_config = ").unwrap().1.split_once(", kernel_name").unwrap().0.to_owned()
    };
    let faulty = text.replacen(&config(&text, "kernel"), &config(&jax, "kn"), 1);
    fs::write(dir.path().join("faulty.mlir"), faulty).unwrap();
    let words = [
        "kernel `kn`: read of unwritten memory",
        "kernels/written/with/pallas/minimal.py:33 in kn",
        "exported.py:",
        "again",
    ];
    refused(dir.path(), "run faulty.mlir", 1, &words);
}

#[test]
fn a_profile_counts_and_draws() {
    let dir = TempDir::new().unwrap();
    let line = format!("run matmul {MATMUL} --tiles 16,128,128 --counts --timeline t.json --html p.html");
    let report = json(&done(dir.path(), &format!("{line} --json")));
    let (counts, counters) = (&report[0]["counts"], &report[0]["counters"]);
    let moved = |from: &str, to: &str| -> u64 {
        let all = counts["total"]["moved"].as_array().unwrap().iter();
        all.filter(|one| one["from"] == from && one["to"] == to && one["by"] != "load" && one["by"] != "store")
            .map(|one| one["bytes"].as_u64().unwrap())
            .sum()
    };
    assert_eq!(Some(moved("hbm", "vmem")), counters["hbm_bytes_read"].as_u64(), "{report}");
    assert_eq!(Some(moved("vmem", "hbm")), counters["hbm_bytes_written"].as_u64(), "{report}");
    let multiplied = &counts["total"]["multiplied"];
    assert_eq!(multiplied["flops"], counters["mxu_flops"]);
    // 16 rows, 128 columns and 128 of the inner dimension fill the MXU of a v5p.
    assert_eq!((&multiplied["utilisation"], &multiplied["passes"]), (&1.0.into(), &multiplied["products"]));
    assert_eq!(counts["steps"].as_array().unwrap().len() as u64, counters["grid_steps"].as_u64().unwrap());
    let timeline = json(&fs::read_to_string(dir.path().join("t.json")).unwrap());
    let events = timeline["traceEvents"].as_array().unwrap();
    let of = |category: &str| events.iter().filter(|event| event["cat"] == category).count() as u64;
    assert_eq!(
        (of("grid steps"), of("MXU")),
        (counters["grid_steps"].as_u64().unwrap(), multiplied["products"].as_u64().unwrap())
    );
    assert!(of("windows in") > 0 && of("windows out") > 0 && of("waits") > 0);
    let page = fs::read_to_string(dir.path().join("p.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("grid steps") && !page.contains("http"), "{page}");
    let text = done(dir.path(), &line);
    for words in ["on the model's clock", "Grid steps", "not padding", "A model's clock, measured on no TPU"] {
        assert!(text.contains(words), "lacks `{words}`:\n{text}");
    }
    refused(dir.path(), &format!("{line} --rates-of v4"), 2, &["rates-of = v4", "use v5e, v5p or v6e"]);
    refused(dir.path(), "run x.mlir --plugin cpu --counts", 2, &["--counts = true is of use on the tile machine only"]);
}

#[test]
fn a_missing_libtpu_is_named_with_the_remedy() {
    for line in ["certify matmul --m 8 --n 8 --k 8", &format!("certify rpa {RPA}")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pagoda"));
        let output = command
            .args(shlex::split(line).expect("quotes are closed"))
            .env("PAGODA_PLUGIN_TPU", "none.so")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        let said = stderr(&output);
        assert!(
            said.contains("PAGODA_PLUGIN_TPU = none.so: no such file") && said.contains("make tpu-tools"),
            "{said}"
        );
        // A library that is not libtpu: the worker's complaint, not a crash of ours.
        let plugin = env!("CARGO_BIN_EXE_pagoda");
        let mut command = Command::new(plugin);
        let output = command
            .args(shlex::split(line).expect("quotes are closed"))
            .env("PAGODA_PLUGIN_TPU", plugin)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains("plugin tpu: ") && stderr(&output).contains("pagoda doctor"));
    }
    // A plugin that compiles for no TPU.
    let cpu = Kind::Cpu.locate().expect("the CPU plugin: run `make setup`").path;
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagoda"));
    let output = command.args(["certify", "matmul", "--m", "8", "--n", "8", "--k", "8"]).env("PAGODA_PLUGIN_TPU", cpu);
    let output = output.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("plugin tpu: libtpu refused the program"), "{}", stderr(&output));
}

#[test]
fn help_names_every_command() {
    let help = done(Path::new("."), "--help");
    for command in ["plan", "certify", "emit", "inspect", "run"] {
        assert!(help.contains(command), "{help}");
    }
    let help = done(Path::new("."), "run --help");
    for option in ["--input <NAME=FILE.npy>", "--random <SEED>", "--check-against", "--dma", "f32 files also give bf16"]
    {
        assert!(help.contains(option), "lacks {option}: {help}");
    }
}
