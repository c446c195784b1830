//! The command line as users meet it: several hosts, JSON, interruption, and bad input.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/tiny-llama-kjv")
}

fn pagoda(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagoda"));
    // No test asks the network for a model.
    command.args(args).stdin(Stdio::null()).env("HF_HUB_OFFLINE", "1");
    command
}

fn run(args: &[&str]) -> Output {
    pagoda(args).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A config of `prompts` prompts over eight slots with pages for eight sequences.
fn config(dir: &Path, prompts: usize, max_new_tokens: usize, temperature: f64) -> String {
    let words = ["And the LORD said", "Blessed are", "In the beginning", "Hear, O Israel", "Then answered", "The king"];
    let list: String =
        (0..prompts).map(|i| format!("  - \"{} {}\"\n", words[i % words.len()], words[(i / 6) % 6])).collect();
    let text = format!(
        "hf_checkpoint: {}\nprompts:\n{list}stop_sequence: null\nmax_new_tokens: {max_new_tokens}\n\
         temperature: {temperature}\ntop_p: 0.95\nengine:\n  max_seq_len: 288\n  max_pages: 144\n  page_size: 16\n  \
         max_seqs: 8\n  max_seqs_in_prefill: 8\n  max_prefill_size: 64\n  seed: 3\n  compute_dtype: float32\n",
        model().display()
    );
    let path = dir.join("config.yaml");
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[test]
fn one_two_and_four_hosts_write_the_same_bytes() {
    for (temperature, prompts, tokens) in [(0.0, 24, 64), (0.8, 100, 128)] {
        let dir = TempDir::new().unwrap();
        let config = config(dir.path(), prompts, tokens, temperature);
        let mut merged = Vec::new();
        for hosts in [1, 2, 4] {
            let out = dir.path().join(format!("out{hosts}"));
            for host in 0..hosts {
                let (hosts, host) = (hosts.to_string(), host.to_string());
                let args = ["sample", "--config", &config, "--json", "--hosts", &hosts, "--host-id", &host, "--out"];
                let output = pagoda(&args).arg(&out).output().unwrap();
                assert!(output.status.success(), "{}", stderr(&output));
            }
            let output = run(&["merge", out.to_str().unwrap()]);
            assert!(output.status.success(), "{}", stderr(&output));
            let path = String::from_utf8(output.stdout).unwrap();
            merged.push(fs::read_to_string(path.trim()).unwrap());
        }
        assert_eq!(merged[0].lines().count(), prompts);
        let texts = merged[0].lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].to_string());
        assert!(texts.collect::<BTreeSet<_>>().len() > prompts * 3 / 10, "samples differ from each other");
        assert!(merged.iter().all(|text| text == &merged[0]), "temperature {temperature}: hosts change the text");
    }
}

#[test]
fn json_is_one_object_per_sample_in_prompt_order_and_nothing_else() {
    let model = model();
    let base = ["sample", "--model", model.to_str().unwrap(), "--json", "--temperature", "0", "--compute", "f32"];
    let more = ["--prompt", "In the beginning", "--prompt", "Blessed are", "--max-new-tokens", "12", "--max-seqs", "1"];
    let output = run(&[&base[..], &more[..]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let lines: Vec<Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    for (index, (line, prompt)) in lines.iter().zip(["In the beginning", "Blessed are"]).enumerate() {
        let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["finish_reason", "index", "prompt", "prompt_tokens", "text", "tokens"]);
        assert_eq!((line["index"].as_u64(), line["prompt"].as_str()), (Some(index as u64), Some(prompt)));
        assert_eq!((line["tokens"].as_array().unwrap().len(), line["finish_reason"].as_str()), (12, Some("length")));
    }
    assert_eq!(lines[0]["text"], " of the LORD, and the spirit of the LORD is the");
    let [stablehlo, native, mosaic] = ["stablehlo", "native", "mosaic"].map(|kernels| {
        let output = run(&[&base[..], &more[..], &["--kernels", kernels]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    });
    assert_eq!(stablehlo, native, "all forms of the kernels yield the same greedy text");
    assert_eq!(stablehlo, mosaic, "all forms of the kernels yield the same greedy text");
}

/// A byte-order mark is read, flags win over the file, and a round differs from the next in its random numbers only.
#[test]
fn rounds_have_random_numbers_of_their_own() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("config.yaml");
    let rounds = |temperature: &str, rounds: &str| -> Vec<Value> {
        let args = ["sample", "--config", path.to_str().unwrap(), "--json", "--temperature", temperature];
        let output = run(&[&args[..], &["--n-rounds", rounds]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(stderr(&output).contains(&format!("temperature: {temperature}\n")), "{}", stderr(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["tokens"].clone()).collect()
    };
    let text = format!(
        "\u{feff}hf_checkpoint: {}\nprompts: [In the beginning, Blessed are]\nn_generations: 2\nmax_new_tokens: 16\n\
         temperature: 0.5\nengine: {{compute_dtype: float32}}\n",
        model().display()
    );
    fs::write(&path, text).unwrap();
    let (once, twice) = (rounds("1.0", "1"), rounds("1.0", "2"));
    assert_eq!(once[..], twice[..4], "further rounds change nothing in the first");
    let different: std::collections::BTreeSet<_> = twice.iter().map(Value::to_string).collect();
    assert_eq!(different.len(), 8, "every sample is drawn by itself");
    let greedy = rounds("0.0", "2");
    assert_eq!(greedy[..4], greedy[4..]);
}

#[test]
fn an_interrupted_run_keeps_what_is_finished_and_goes_on() {
    let dir = TempDir::new().unwrap();
    let config = config(dir.path(), 40, 128, 0.8);
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    assert!(pagoda(&["sample", "--config", &config, "--json", "--out"]).arg(&whole).output().unwrap().status.success());

    let child = pagoda(&["sample", "--config", &config, "--json", "--out"])
        .arg(&cut)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let partial = cut.join("host_0000_of_0001.jsonl.partial");
    let started = Instant::now();
    while fs::read_to_string(&partial).map_or(0, |text| text.lines().count()) < 3 {
        assert!(started.elapsed() < Duration::from_secs(120), "no sample was finished");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    let kept = fs::read_to_string(&partial).unwrap().lines().count();
    assert!((3..40).contains(&kept), "{kept} samples were kept");
    let merge = run(&["merge", cut.to_str().unwrap()]);
    assert_eq!(merge.status.code(), Some(2), "an unfinished share does not merge");

    let output = pagoda(&["sample", "--config", &config, "--json", "--out"]).arg(&cut).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains(&format!("{kept} of 40 samples were finished")), "{}", stderr(&output));
    let file = "host_0000_of_0001.jsonl";
    assert_eq!(fs::read(whole.join(file)).unwrap(), fs::read(cut.join(file)).unwrap());
}

/// A copy of the tiny model in `dir`, to be damaged.
fn damaged(dir: &Path, damage: impl Fn(&Path)) -> String {
    for entry in fs::read_dir(model()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
    }
    damage(dir);
    dir.display().to_string()
}

fn edit(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from} is not in {}", path.display());
    fs::write(path, text.replacen(from, to, 1)).unwrap();
}

/// Rewrites the safetensors header with text of the same length.
fn edit_header(path: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).expect(from);
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn bad_input_gets_one_clear_error_and_exit_code_2() {
    let dir = TempDir::new().unwrap();
    let folder = |name: &str| {
        let path = dir.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let weights = "model.safetensors";
    let no_weights = damaged(&folder("a"), |m| fs::remove_file(m.join(weights)).unwrap());
    let truncated = damaged(&folder("b"), |m| {
        let bytes = fs::read(m.join(weights)).unwrap();
        fs::write(m.join(weights), &bytes[..bytes.len() / 2]).unwrap();
    });
    let norm = "model.norm.weight";
    let renamed = damaged(&folder("c"), |m| edit_header(&m.join(weights), norm, "model.norm.weighs"));
    let shape = damaged(&folder("d"), |m| {
        edit(&m.join("config.json"), "\"intermediate_size\": 768", "\"intermediate_size\": 512")
    });
    let activation = damaged(&folder("e"), |m| edit(&m.join("config.json"), "\"silu\"", "\"gelu\""));
    let vocabulary =
        damaged(&folder("f"), |m| edit(&m.join("config.json"), "\"vocab_size\": 2048", "\"vocab_size\": 1024"));
    let nan_weight = damaged(&folder("h"), |m| {
        let mut bytes = fs::read(m.join(weights)).unwrap();
        let last = bytes.len() - 2; // the last value of the file, bf16
        bytes[last..].copy_from_slice(&0x7fc0u16.to_le_bytes());
        fs::write(m.join(weights), bytes).unwrap();
    });
    let dtype = damaged(&folder("g"), |m| edit_header(&m.join(weights), "\"BF16\"", "\"I16\" "));
    let yaml = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, format!("hf_checkpoint: {}\n{text}", model().display())).unwrap();
        path.display().to_string()
    };
    let unknown = yaml("unknown.yaml", "prompts: [a]\nmax_new_token: 4\n");
    let empty = yaml("empty.yaml", "prompts: []\n");
    let not_utf8 = dir.path().join("latin1.yaml");
    fs::write(&not_utf8, b"prompts: caf\xe9\n").unwrap();
    let not_utf8 = not_utf8.display().to_string();
    let a_folder = folder("folder.yaml").display().to_string();
    let nan = yaml("nan.yaml", "prompts: [a]\ntemperature: .nan\n");
    let not_a_plugin = dir.path().join("plugin.so");
    fs::write(&not_a_plugin, "no library").unwrap();
    let not_a_plugin = not_a_plugin.display().to_string();
    let out = dir.path().join("out").display().to_string();
    let model = model().display().to_string();
    let shares = folder("shares");
    fs::write(shares.join("host_0001_of_0002.jsonl"), "").unwrap();
    let shares = shares.display().to_string();

    let sample = |model: &str, rest: &[&str]| -> Vec<String> {
        let args = ["sample", "--model", model, "--prompt", "In the beginning", "--max-new-tokens", "8", "--out", &out];
        args.iter().chain(rest).map(ToString::to_string).collect()
    };
    let config = |file: &str| ["sample", "--config", file, "--out", &out].map(String::from).to_vec();
    let cases: Vec<(Vec<String>, &[&str])> = vec![
        (sample(&no_weights, &[]), &["model.safetensors"]),
        (sample(&truncated, &[]), &["model.safetensors"]),
        (sample(&renamed, &[]), &["model.norm.weight", "missing"]),
        (sample(&shape, &[]), &["mlp", "512", "768"]),
        (sample(&activation, &[]), &["hidden_act", "gelu"]),
        (sample(&vocabulary, &[]), &["vocab", "1024"]),
        (sample(&dtype, &[]), &["BF16"]),
        (sample("/nowhere", &[]), &["/nowhere"]),
        (config(&unknown), &["max_new_token", "max_new_tokens"]),
        (config(&empty), &["prompts"]),
        (config(&nan), &["temperature", "NaN"]),
        (config(&not_utf8), &["latin1.yaml", "line 1", "save the file as UTF-8"]),
        (config(&a_folder), &["folder.yaml", "it is a folder", "give the YAML file itself"]),
        (sample(&nan_weight, &[]), &["model.safetensors", "tensor model.norm.weight[", "NaN is not finite"]),
        (
            sample(&model, &["--max-pages", "500000000", "--page-size", "4"]),
            &["engine.max_pages = 500000000 takes", "KV cache", "left: lower it to"],
        ),
        (sample(&model, &["--n-rounds", "5000"]), &["n_rounds = 5000 exceeds 4096"]),
        (sample(&model, &["--temperature", "nan"]), &["temperature"]),
        (sample(&model, &["--temperature", "-1"]), &["temperature", "-1"]),
        (sample(&model, &["--top-p", "0"]), &["top_p"]),
        (sample(&model, &["--max-seq-len", "3"]), &["max_seq_len", "3"]),
        (sample(&model, &["--max-seq-len", "9999"]), &["max_position_embeddings", "4608"]),
        (sample(&model, &["--page-size", "4", "--max-pages", "1"]), &["max_pages = 1"]),
        (sample(&model, &["--page-size", "0"]), &["page_size"]),
        (sample(&model, &["--max-seqs", "0"]), &["max_seqs"]),
        (sample(&model, &["--plugin", "/nowhere.so"]), &["/nowhere.so"]),
        (sample(&model, &["--plugin", &not_a_plugin]), &["plugin.so"]),
        (sample(&model, &["--hosts", "2", "--host-id", "2"]), &["--host-id", "2"]),
        (sample(&model, &["--mesh", "model=3"]), &["mesh model = 3", "num_attention_heads"]),
        (sample(&model, &["--mesh", "2x2"]), &["--mesh", "data=2,model=4"]),
        (sample(&model, &["--mesh", "data=5000"]), &["devices of the mesh = 5000", "256"]),
        (sample(&model, &["--step-timeout", "0"]), &["--step-timeout", "seconds above 0"]),
        (sample("gs://bucket/llama", &[]), &["gs://bucket/llama", "gcloud storage cp"]),
        (sample("nobody/nothing", &[]), &["nobody/nothing", "hf download nobody/nothing"]),
        (sample(&model, &["--chat"]), &["chat"]),
        (sample(&model, &["--compute", "f8"]), &["f8"]),
        (sample(&model, &["--kernels", "mosaic", "--chip", "v9"]), &["chip = v9", "tpu7x"]),
        (sample(&model, &["--chip", "v4"]), &["--chip = v4", "add --kernels mosaic"]),
        (vec!["merge".into(), shares], &["host_0000_of_0002"]),
        (vec!["merge".into(), "/nowhere".into()], &["/nowhere"]),
        (
            vec!["bench".into(), "decode".into(), "--model".into(), model.clone(), "--slots".into(), "0".into()],
            &["--slots"],
        ),
        (vec!["sample".into()], &["--model"]),
    ];
    for (args, words) in cases {
        let output = pagoda(&args.iter().map(String::as_str).collect::<Vec<_>>()).output().unwrap();
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
        assert!(output.stdout.is_empty(), "{args:?} wrote to stdout");
        assert!(!text.contains("panicked"), "{args:?}: {text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("error:")).count(), 1, "{args:?}: {text}");
        let missing: Vec<_> = words.iter().filter(|word| !text.contains(**word)).collect();
        assert!(missing.is_empty(), "{args:?} does not name {missing:?}: {text}");
        let written = fs::read_dir(&out).map_or(0, |files| {
            files.filter(|f| f.as_ref().unwrap().path().extension().is_some_and(|e| e == "jsonl")).count()
        });
        assert_eq!(written, 0, "{args:?} left a file");
        let _ = fs::remove_dir_all(&out); // with the manifest of a run that came as far as the weights
    }
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The incident's config as it is, but for the model, and fewer new tokens each: both versions, all prompts, none short.
#[test]
fn the_incident_runs_on_the_tiny_model() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/configs");
    let model = model().display().to_string();
    let dir = TempDir::new().unwrap();
    let (summary, trace) = (dir.path().join("summary.json"), dir.path().join("trace.json"));
    for (name, slots) in [("sample_llama8b_multihost_real.yaml", 8), ("sample_llama8b_multihost_real_reduced.yaml", 4)]
    {
        let mut command = pagoda(&["sample", "--model", &model, "--max-new-tokens", "12", "--json", "--config"]);
        let files = [Path::new("--summary"), &summary, Path::new("--trace"), &trace];
        let output = command.arg(configs.join(name)).args(files).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let lines = String::from_utf8(output.stdout.clone()).unwrap();
        let tokens: Vec<usize> = lines
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["tokens"].as_array().unwrap().len())
            .collect();
        assert_eq!(tokens.len(), 100);
        // The tiny model may end a text; nothing else does.
        assert!(tokens.iter().filter(|&&tokens| tokens == 12).count() > 60, "{tokens:?}");
        let text = stderr(&output);
        for expected in [
            "ignored, as they change nothing here: trainer.tracker, trainer.ray".to_owned(),
            format!("{slots} slots, {} KV pages of 128 tokens", 36 * slots),
            "model=4".into(),
            "Decode perf summary: decode_iters=".into(),
        ] {
            assert!(text.contains(&expected), "{expected} is missing: {text}");
        }
        let (summary, trace) = (json_file(&summary), json_file(&trace));
        assert_eq!(summary["round_total_generated"].as_u64(), Some(tokens.iter().sum::<usize>() as u64));
        let events = trace["traceEvents"].as_array().unwrap();
        let calls = events.iter().filter(|event| event["cat"] == "call").count() as u64;
        let iters = ["decode_iters", "prefill_iters"].map(|key| summary[key].as_u64().unwrap());
        assert_eq!(calls, iters.iter().sum::<u64>());
    }
}

/// What decides the texts may not change between two runs into one folder, nor what the first wrote.
#[test]
fn a_run_goes_on_only_with_what_it_wrote() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("out").display().to_string();
    let copy = dir.path().join("model");
    fs::create_dir(&copy).unwrap();
    let copy = damaged(&copy, |_| ());
    let config_json = Path::new(&copy).join("config.json");
    let sample = |more: &[&str]| {
        let base =
            ["sample", "--model", &copy, "--prompt", "In the beginning", "--prompt", "And", "--max-new-tokens", "40"];
        run(&[&base[..], &["--max-seqs", "1", "--max-rounds", "1", "--compute", "f32", "--out", &out], more].concat())
    };
    // A step that takes longer than it may ends the run, by name; the journal stays whole.
    let output = sample(&["--step-timeout", "0.000001"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    // Which of the calls is seen to be late, is up to the system.
    for words in ["error: call ", " sequences", "not done within --step-timeout 0.000001 s"] {
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }

    assert!(sample(&[]).status.success());
    let (whole, partial) = ("host_0000_of_0001.jsonl", "host_0000_of_0001.jsonl.partial");
    let [whole, partial] = [whole, partial].map(|name| Path::new(&out).join(name));
    assert!(json_file(&Path::new(&out).join("host_0000_of_0001.summary.json"))["decode_iters"].as_u64() > Some(0));
    let written = fs::read_to_string(&whole).unwrap();
    fs::write(&whole, written.replacen("\"tokens\":[", "\"tokens\":[9,", 1)).unwrap();
    let output = sample(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("its content is not what its host wrote"), "{}", stderr(&output));
    // Lines of an earlier time, without their checksums, are no journal.
    fs::rename(&whole, &partial).unwrap();
    let output = sample(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("line 1 carries no checksum"), "{}", stderr(&output));
    fs::remove_file(&partial).unwrap();
    edit(&config_json, "\"rope_theta\": 500000.0", "\"rope_theta\": 400000.0");
    let output = sample(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("samples of another run"), "{}", stderr(&output));
    edit(&config_json, "\"rope_theta\": 400000.0", "\"rope_theta\": 500000.0");
    assert!(sample(&[]).status.success());
    assert_eq!(fs::read_to_string(&whole).unwrap(), written);
}

#[test]
fn doctor_lists_what_is_there() {
    let output = run(&["doctor", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let cpu = report["plugins"].as_array().unwrap().iter().find(|plugin| plugin["plugin"] == "cpu").unwrap();
    assert!(cpu["path"].as_str().unwrap().ends_with(".so"));
    assert!(cpu["problem"].is_null(), "{cpu}");
}
