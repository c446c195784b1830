//! `pagoda check` as users run it: on the tiny model with the real compiler, on the incident (in `make certify-all`), and on
//! input that cannot work.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use pagoda_engine::certify::Certifier;
use pagoda_engine::topology::Topology;
use pagoda_kernels::chips::Chip;
use serde_json::Value;

/// Exit code, standard output, standard error.
fn check(line: &str, cache: &Path) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagoda"));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).arg("check").args(line.split_whitespace());
    let output = command.arg("--cache").arg(cache).output().unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.code(), stdout, stderr)
}

fn table<'r>(report: &'r Value, section: &str) -> &'r Vec<Value> {
    let sections = report["sections"].as_array().unwrap();
    let section =
        sections.iter().find(|of| of["title"] == section).unwrap_or_else(|| panic!("no {section}: {report:#}"));
    let blocks = section["blocks"].as_array().unwrap();
    blocks.iter().find_map(|block| block["table"]["rows"].as_array()).expect("a table")
}

const TINY: &str = "--model examples/models/tiny-llama-kjv --prompt In --prompt Once --max-new-tokens 8 --max-seqs 2";

/// Every kernel that the plan names is in the compiler's report of the whole program, with the buffers that were planned.
fn assert_kernels_are_as_planned(report: &Value) {
    for row in table(report, "VMEM of each kernel") {
        assert!(row[4]["bytes"].as_u64().is_some(), "planned, and not found in the program: {row}");
    }
}

#[test]
fn the_tiny_model_is_compiled_once() {
    let folder = tempfile::tempdir().unwrap();
    let (cache, out, page) = (folder.path().join("cache"), folder.path().join("out"), folder.path().join("page.html"));
    let line = format!("{TINY} --topology v5p-8 --json --out {} --html {}", out.display(), page.display());
    let (code, stdout, stderr) = check(&line, &cache);
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["verdict"]["status"], "good", "{report:#}");
    assert_kernels_are_as_planned(&report);
    // The plan's arguments are the compiler's: weights and pages, and some kilobytes of the step's rows.
    let part = |at: usize| report["sections"][1]["blocks"][0]["bars"][0]["parts"][at]["bytes"].as_u64().unwrap();
    let arguments = table(&report, "HBM")[1][1]["bytes"].as_u64().unwrap();
    let planned = part(0) + part(1);
    assert!((arguments as f64 / planned as f64 - 1.0).abs() < 0.02, "{arguments} of {planned}");
    let written = std::fs::read_dir(&out)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|extension| extension == "pjrt"));
    assert_eq!(written.count(), 2);
    assert!(std::fs::read_to_string(&page).unwrap().starts_with("<!DOCTYPE html>"));

    let started = Instant::now();
    let (code, again, stderr) = check(&line, &cache);
    assert_eq!((code, &again), (Some(0), &stdout), "{stderr}");
    assert!(started.elapsed() < Duration::from_secs(10), "what was compiled is not compiled again");
}

#[test]
fn what_cannot_work_is_one_clear_error() {
    let cache = tempfile::tempdir().unwrap();
    for (line, words) in [
        (
            "--topology v5p-63",
            "--topology = v5p-63 is not a slice of v5p: the number counts TensorCores, two to a chip; the nearest are",
        ),
        ("--topology v9-8", "--topology = v9-8 names no TPU generation"),
        ("--topology v5p-64 --mesh model=3", "trainer.mesh.axes.model = 3 does not divide 32 devices"),
        ("--topology v5p-64 --mesh model=8", "mesh model = 8 does not divide num_attention_heads = 4"),
        ("--topology v5p-64 --mesh data=64,model=4", "needs 256 devices, but there are 32"),
        ("--topology v5p-64 --max-seq-len 4", "engine.max_seq_len"),
        ("--topology v5p-64 --max-pages 0", "engine.max_pages = 0 is below 1"),
    ] {
        let (code, stdout, stderr) = check(&format!("{TINY} {line}"), cache.path());
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (Some(2), "", 1), "{line}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(words), "{line}: {stderr}");
    }
    let (code, _, stderr) = check("--model /nowhere --prompt a --topology v5p-64", cache.path());
    assert_eq!(code, Some(2), "{stderr}");
}

/// Both versions of the incident die the same in JAX's kernel: by arithmetic, with no compiler.
#[test]
fn jaxs_kernel_dies_the_same_on_both_versions() {
    let cache = tempfile::tempdir().unwrap();
    for version in ["sample_llama8b_multihost_real", "sample_llama8b_multihost_real_reduced"] {
        let line = format!("--config examples/configs/{version}.yaml --topology v5p-64 --layout jax-v2");
        let (code, stdout, stderr) = check(&line, cache.path());
        assert_eq!(code, Some(1), "{stdout}{stderr}");
        assert!(stdout.contains("NO: JAX's kernel does not compile: 37.54M of 16.00M of scoped VMEM."), "{stdout}");
    }
}

/// Every slice below 1024 chips that a number names.
#[test]
#[ignore = "minutes of CPU: make certify-all"]
fn libtpu_knows_every_slice() {
    let certifier = Certifier::find(env!("CARGO_BIN_EXE_pagoda")).expect("libtpu: run `make tpu-tools`");
    let slices = Chip::ALL.into_iter().flat_map(Topology::all).filter(|slice| slice.chips() < 1024);
    for slice in slices.chain(["v5p:4x2x4", "v5p:1x1x1", "v6e:2x6"].map(|name| Topology::parse(name).unwrap())) {
        let version = certifier.compiler(&slice.libtpu_name()).unwrap_or_else(|error| panic!("{slice}: {error}"));
        assert!(!version.is_empty(), "{slice}: libtpu does not know it");
    }
}

/// Minutes of CPU each: the incident's two versions, and larger models.
#[test]
#[ignore = "minutes of CPU: make certify-all"]
fn the_incident_and_larger_models() {
    let cache = tempfile::tempdir().unwrap();
    let incident = "examples/configs/sample_llama8b_multihost_real.yaml";
    let reduced = "examples/configs/sample_llama8b_multihost_real_reduced.yaml";
    for (line, code) in [
        (format!("--config {incident} --topology v5p-64"), 0),
        (format!("--config {reduced} --topology v5p-64"), 0),
        (format!("--config {incident} --model examples/models/llama-3.1-70b --topology v5p-64"), 0),
        (format!("--config {incident} --model examples/models/llama-3.1-405b --topology v5p-256 --mesh model=16"), 0),
        // 756 GiB of weights on four devices of 95.7.
        (format!("--config {incident} --model examples/models/llama-3.1-405b --topology v5p-8"), 1),
    ] {
        let started = Instant::now();
        let (found, stdout, stderr) = check(&format!("{line} --json"), cache.path());
        println!("{line}: {:.0} s", started.elapsed().as_secs_f64());
        assert_eq!(found, Some(code), "{line}: {stdout}{stderr}");
        let report: Value = serde_json::from_str(&stdout).unwrap();
        println!("{}", report["verdict"]["headline"]);
        if code == 0 {
            assert_kernels_are_as_planned(&report);
        }
    }
}
