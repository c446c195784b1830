//! `pagoda bringup` on the CPU plugin: all that can be tried without a TPU passes, and the report says so. (What it does when a
//! check crashes or hangs: the tests of `pagoda_engine::bringup`.)

use std::path::Path;
use std::process::Command;

#[test]
fn everything_passes_on_the_cpu_plugin() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("report.json");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/tiny-llama-kjv");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagoda"));
    command.args(["bringup", "--plugin", "cpu", "--cases", "3", "--seed", "11", "--out"]).arg(&out);
    let output = command.arg("--model").arg(model).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    let text = std::fs::read_to_string(&out).unwrap_or_else(|error| panic!("{error}: {errors}"));
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(output.status.success(), "{errors}\n{text}");
    let summary: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["summary"], summary);
    assert_eq!((report["complete"].as_bool(), report["environment"]["platform"].as_str()), (Some(true), Some("cpu")));
    let checks = report["checks"].as_array().unwrap();
    let of = |kernel: &str, form: &str, outcome: &str| {
        let matching = |check: &&serde_json::Value| {
            check["kernel"] == kernel && check["form"] == form && check["outcome"] == outcome
        };
        checks.iter().filter(matching).count()
    };
    for kernel in ["matmul", "grouped_matmul", "rpa", "rms_norm"] {
        assert_eq!((of(kernel, "stablehlo", "passed"), of(kernel, "mosaic", "passed")), (3, 3), "{kernel}: {text}");
        assert_eq!(of(kernel, "native", "passed") + of(kernel, "native", "skipped"), 3, "{kernel}: {text}");
    }
    assert_eq!((of("step", "stablehlo", "passed"), of("step", "native", "passed")), (1, 1), "{text}");
}
