//! Several processes as one mesh, over MPI, and as independent shares: one text, whoever runs it, whatever is killed.
//!
//! `make multihost` installs Open MPI and runs this. The binary of these tests has cargo feature `mpi`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use pagoda_ir::random::SplitMix64;
use tempfile::TempDir;

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/tiny-llama-kjv")
}

/// A config of 12 prompts, greedy or seeded. With seed 3 the random number of a token is 5e-8 from where the next token of the
/// vocabulary begins: roundings of f32 decide there, and they differ from form to form.
fn config(dir: &Path, temperature: f64, mode: &str) -> PathBuf {
    let prompts: String =
        (0..12).map(|at| format!("  - \"{} of prompt {at}\"\n", ["In the beginning", "Blessed are"][at % 2])).collect();
    let text = format!(
        "hf_checkpoint: {}\nprompts:\n{prompts}stop_sequence: null\nmax_new_tokens: 40\ntemperature: {temperature}\n\
         inference_mode: {mode}\nengine: {{max_seq_len: 128, page_size: 16, max_seqs: 4, max_prefill_size: 48, seed: 5, \
         compute_dtype: float32}}\n",
        model().display()
    );
    let path = dir.join(format!("{mode}-{temperature}.yaml"));
    fs::write(&path, text).unwrap();
    path
}

/// `pagoda sample` on `processes` processes; 1 is without a launcher.
fn sample(processes: usize, config: &Path, out: &Path, more: &[&str]) -> Command {
    let pagoda = env!("CARGO_BIN_EXE_pagoda");
    let mut command = Command::new(if processes == 1 { pagoda } else { "mpirun" });
    if processes > 1 {
        // Busy-polling ranks on shared cores stall each other.
        command.args(["--allow-run-as-root", "--oversubscribe", "--mca", "mpi_yield_when_idle", "1"]);
        command.args(["-n", &processes.to_string(), pagoda]);
    }
    command.args(["sample", "--config"]).arg(config).arg("--out").arg(out).args(more).stdin(Stdio::null());
    command
}

fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    output
}

/// The joined samples of a run.
fn merged(out: &Path) -> String {
    let output = succeed(Command::new(env!("CARGO_BIN_EXE_pagoda")).arg("merge").arg(out));
    fs::read_to_string(String::from_utf8(output.stdout).unwrap().trim()).unwrap()
}

#[test]
fn every_mesh_of_processes_writes_the_text_of_one() {
    let dir = TempDir::new().unwrap();
    for temperature in [0.0, 0.8] {
        let alone = dir.path().join(format!("alone-{temperature}"));
        succeed(&mut sample(1, &config(dir.path(), temperature, "host_data_parallel"), &alone, &[]));
        let expected = merged(&alone);
        assert_eq!(expected.lines().count(), 12);
        let cases: [(usize, &str, &[&str]); 9] = [
            (2, "host_data_parallel", &[]),
            (4, "host_data_parallel", &[]),
            (2, "host_data_parallel", &["--mesh", "data=1,model=2"]),
            (2, "global_mesh", &["--mesh", "data=1,model=2"]),
            (2, "global_mesh", &["--mesh", "data=2,model=1"]),
            (4, "global_mesh", &["--mesh", "data=1,model=4"]),
            (4, "global_mesh", &["--mesh", "data=2,model=2"]),
            (2, "global_mesh", &["--mesh", "data=1,model=2", "--kernels", "stablehlo", "--max-rounds", "1"]),
            (2, "global_mesh", &["--mesh", "data=1,model=2", "--kernels", "mosaic", "--max-seqs", "8"]),
        ];
        for (at, (processes, mode, more)) in cases.into_iter().enumerate() {
            let out = dir.path().join(format!("{temperature}-{at}"));
            succeed(&mut sample(processes, &config(dir.path(), temperature, mode), &out, more));
            assert_eq!(merged(&out), expected, "{processes} processes, {mode}, {more:?}");
        }
    }
}

/// Whatever process is killed, and when: the same command, given again, ends with the same bytes.
#[test]
fn a_killed_process_loses_nothing_that_was_finished() {
    let dir = TempDir::new().unwrap();
    let config = config(dir.path(), 0.8, "global_mesh");
    let mesh = ["--mesh", "data=1,model=2", "--max-rounds", "2"];
    let whole = dir.path().join("whole");
    succeed(&mut sample(2, &config, &whole, &mesh));
    let expected = merged(&whole);
    let mut random = SplitMix64::new(7);
    let mut killed = 0;
    for run in 0..20 {
        let out = dir.path().join(format!("killed-{run}"));
        let mut job = sample(2, &config, &out, &mesh).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(500 + random.below(1500) as u64));
        if let Some(process) = ranks(job.id()).get(random.below(2)) {
            killed += usize::from(Command::new("kill").args(["-9", process]).status().unwrap().success());
        }
        job.wait().unwrap();
        succeed(&mut sample(2, &config, &out, &mesh));
        assert_eq!(merged(&out), expected, "run {run}");
    }
    assert!(killed >= 10, "{killed} of 20 processes were still there to be killed");
}

/// The processes that a launcher started.
fn ranks(launcher: u32) -> Vec<String> {
    let output = Command::new("ps").args(["-o", "pid=", "--ppid", &launcher.to_string()]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().map(str::to_owned).collect()
}

#[test]
fn processes_and_mesh_must_agree() {
    let dir = TempDir::new().unwrap();
    let config = config(dir.path(), 0.0, "global_mesh");
    for (processes, mesh, message) in [
        (2, "data=1,model=4", "trainer.mesh.axes = data=1,model=4 puts a replica across processes of 2 devices each"),
        (1, "data=1,model=3", "mesh model = 3 does not divide num_attention_heads"),
        (2, "data=1,model=1", "does not spread evenly over 2 processes"),
    ] {
        let output = sample(processes, &config, &dir.path().join("none"), &["--mesh", mesh]).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains(message), "{stderr}");
        assert_eq!(output.status.code(), Some(2), "{stderr}");
    }
}
