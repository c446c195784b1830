//! Tests of the config: texts of files and flags in, settings or one clear error out.

use pagoda_ir::{Bytes, Element, TensorType};
use pagoda_kernels::chips::Chip;
use proptest::prelude::*;

use super::*;
use crate::llama::{KvCache, Target};
use crate::memory::Room;

const MODEL: &str = "models/tiny-llama-kjv";

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")
}

/// The flags of a command line.
fn flags(line: &[&str]) -> Flags {
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        flags: Flags,
    }
    <Line as clap::Parser>::try_parse_from([&["pagoda"], line].concat()).unwrap().flags
}

fn resolve_bytes(bytes: &[u8], line: &[&str]) -> Result<Settings> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.yaml");
    std::fs::write(&path, bytes).unwrap();
    Settings::resolve(Some(&path), &flags(line))
}

/// The settings of a file with this text and of these flags, for the tiny model.
fn resolve(text: &str, line: &[&str]) -> Result<Settings> {
    let model = examples().join(MODEL);
    resolve_bytes(text.as_bytes(), &[&["--model", model.to_str().unwrap()], line].concat())
}

#[test]
fn levanter_defaults() {
    let settings = resolve("prompts: Hello", &[]).unwrap();
    assert_eq!(settings.prompts, ["Hello"]);
    assert_eq!(settings.stop_sequence.as_deref(), Some("."));
    assert_eq!((settings.max_new_tokens, settings.temperature), (192, 0.7));
    let engine = &settings.engine;
    assert_eq!((engine.page_size, engine.max_seqs, engine.max_seqs_in_prefill, engine.max_rounds), (128, 256, 16, 32));
    assert_eq!((engine.seed, engine.compute_dtype, engine.max_pages), (0, Some(Compute::Bf16), None));

    let model = examples().join(MODEL);
    let line = flags(&["--model", model.to_str().unwrap(), "--prompt", "Hello"]);
    let no_file = Settings::resolve(None, &line).unwrap();
    assert_eq!(no_file, Settings { stop_sequence: None, ..settings });
    assert_eq!(no_file.ignore_eos, Some(false));
}

#[test]
fn what_took_effect_is_printed_as_yaml() {
    let demo = examples().join("configs/demo.yaml");
    let settings = Settings::resolve(Some(&demo), &flags(&["--temperature", "0.7", "--stop-sequence", "1.0"])).unwrap();
    assert_eq!(settings.model(Files::Model).unwrap(), examples().join("configs/../models/tiny-llama-kjv"));
    let paths = format!("{}/configs/../models/tiny-llama-kjv", examples().display());
    let printed = settings.to_string().replace(&paths, "MODEL");
    let expected = "hf_checkpoint: MODEL\ncheckpoint_path: null\ntokenizer: MODEL\nprompts: 8\nstop_sequence: \"1.0\"\n\
        ignore_eos: false\nmax_new_tokens: 48\ntemperature: 0.7\ntop_k: null\ntop_p: 1.0\nn_generations: 1\nn_rounds: 1\n\
        max_prompts_per_batch: null\ninference_mode: null\nhost_data_parallel_output_dir: null\nchat: false\nengine:\n  \
        max_seq_len: 256\n  max_pages: 128\n  hbm_utilization: 0.9\n  page_size: 16\n  max_seqs: 8\n  \
        max_seqs_in_prefill: 8\n  max_prefill_size: 64\n  max_tokens_per_round: null\n  max_rounds: 16\n  \
        mixed_steps: false\n  reuse_prefixes: true\n  max_queued_tokens: 512\n  max_stop_seqs: 4\n  max_stop_tokens: 16\n  seed: 0\n  compute_dtype: f32\n  \
        kv_cache_dtype: auto\n  kv_cache_scale: null\n  debug_stats_every_n: 10\n  log_decode_perf_summary: true\n  reset_mode: physical\n  cleanup_mode: end\nmodel:\n  \
        type: llama\n  use_tpu_ragged_paged_attention: null\n  ragged_paged_q_block_size: null\n  \
        ragged_paged_kv_block_pages: null\ntrainer:\n  mp: null\n  mesh:\n    axes: null\n";
    assert_eq!(printed, expected);
    // Read again, it is the same run, but for the prompts, which are only counted.
    let again = resolve(&settings.to_string().replace("prompts: 8", "prompts: a"), &[]).unwrap();
    assert_eq!(again.engine, settings.engine);
}

/// The identity is what journals of earlier releases hold: it must not change for runs that do not.
#[test]
fn the_identity_holds_what_decides_the_texts() {
    let text = "prompts: [a, \"b\"]\nmax_new_tokens: 4\nengine: {seed: 3, compute_dtype: float32}";
    let identity = |line: &[&str]| resolve(text, line).unwrap().identity();
    let expected = "{\"chat\":false,\"compute_dtype\":\"f32\",\"max_new_tokens\":4,\"n_generations\":1,\
        \"n_rounds\":1,\"prompts\":[\"a\",\"b\"],\"seed\":3,\"stop_sequence\":\".\",\
        \"temperature\":0.699999988079071,\"top_k\":null,\"top_p\":1.0}";
    assert_eq!(identity(&[]), expected);
    for same in [&["--max-pages", "7"], &["--max-seqs", "3"], &["--page-size", "8"], &["--max-rounds", "2"]] {
        assert_eq!(identity(same), expected, "{same:?}");
    }
    let others: [&[&str]; 10] = [
        &["--prompt", "c"],
        &["--stop-sequence", "!"],
        &["--ignore-eos"],
        &["--max-new-tokens", "5"],
        &["--temperature", "0"],
        &["--top-k", "9"],
        &["--n-rounds", "2"],
        &["--chat"],
        &["--seed", "4"],
        &["--compute", "bf16"],
    ];
    for other in others {
        assert_ne!(identity(other), expected, "{other:?}");
    }
}

#[test]
fn a_file_that_turns_stops_off_means_all_of_them() {
    let ignores =
        |text: &str, line: &[&str]| resolve(&format!("prompts: a\n{text}"), line).unwrap().ignore_eos.unwrap();
    assert!(!ignores("", &[]) && !ignores("stop_sequence: a", &[]));
    assert!(ignores("stop_sequence: null", &[]));
    assert!(!ignores("stop_sequence: null", &["--stop-sequence", "b"]));
    assert!(!ignores("stop_sequence: null\nignore_eos: false", &[]));
    assert!(!ignores("stop_sequence: null", &["--ignore-eos=false"]));
    assert!(ignores("ignore_eos: true", &[]));
}

#[test]
fn flags_win() {
    let text = "prompts: [a, b]\nstop_sequence: null\ntemperature: 1\ntop_k: 5\nchat: true\n\
                engine: {seed: 3, max_pages: 7}\n";
    let file = resolve(text, &[]).unwrap();
    assert_eq!((file.prompts.len(), &file.stop_sequence, file.top_k, file.chat), (2, &None, Some(5), true));
    assert_eq!((file.temperature, file.engine.seed, file.engine.max_pages), (1.0, 3, Some(7)));
    let line = "--prompt c --temperature 0 --top-k 0 --seed 4 --compute f32 --chat=false --n-rounds 2";
    let both = resolve(text, &line.split(' ').collect::<Vec<_>>()).unwrap();
    let expected = Settings {
        prompts: vec!["c".into()],
        temperature: 0.0,
        top_k: None,
        chat: false,
        n_rounds: 2,
        engine: EngineSettings { seed: 4, compute_dtype: Some(Compute::F32), ..file.engine.clone() },
        ..file
    };
    assert_eq!(both, expected);
}

#[test]
fn a_byte_order_mark_and_windows_line_ends_are_read() {
    let settings = resolve("\u{feff}prompts: a\r\nmax_new_tokens: 3\r\n", &[]).unwrap();
    assert_eq!((settings.prompts, settings.max_new_tokens), (vec!["a".to_owned()], 3));
}

#[test]
fn bad_input_is_named() {
    let cases = [
        (
            "prompts: a\nengine:\n  max_page: 3",
            "line 3: engine.max_page is not a known key: did you mean engine.max_pages?",
        ),
        ("prompts: a\ntemprature: 3", "line 2: temprature is not a known key: did you mean temperature?"),
        ("engine: {top_q: 3}", "line 1: engine.top_q is not a known key: did you mean top_p, of another section?"),
        (
            "engine: {temperature: 3}",
            "engine.temperature is not a known key: did you mean temperature, of another section?",
        ),
        ("trainer: {trackers: 3}", "line 1: trainer.trackers is not a known key: did you mean trainer.tracker?"),
        (
            "trainer:\n  mesh:\n    axes: {modle: 4}",
            "line 3: trainer.mesh.axes.modle is not a known key: did you mean trainer.mesh.axes.model?",
        ),
        (
            "model: {ragged_paged_q_block: 4}",
            "model.ragged_paged_q_block is not a known key: did you mean model.ragged_paged_q_block_size?",
        ),
        ("trainer: {mesh: {axes: {model: 0}}}", "trainer.mesh.axes.model = 0 is neither 1 or more, nor -1"),
        ("trainer: {mesh: {axes: {model: -1, data: -1}}}", "takes the rest (-1) on two axes"),
        ("trainer: {mp: 'p=int8'}", "line 1: trainer.mp = 'p=int8' is not a policy such as p=bfloat16,c=bfloat16"),
        (
            "trainer: {mp: float16}",
            "trainer.mp = float16 computes in a type that Pagoda does not offer: use float32 or bfloat16",
        ),
        ("trainer: {mp: 'p=f32'}", "names no type of computation, c=TYPE"),
        ("model: {type: mistral}", "line 1: model.type = mistral is not one of llama"),
        ("inference_mode: leader", "line 1: inference_mode = leader is not one of global_mesh, host_data_parallel"),
        ("engine: {reset_mode: soft}", "engine.reset_mode = soft is not one of physical, logical"),
        ("engine: {cleanup_mode: late}", "engine.cleanup_mode = late is not one of none, end, incremental"),
        ("prompts: a\nengine: {hbm_utilization: 1.5}", "engine.hbm_utilization = 1.5 is not above 0 and at most 1"),
        ("prompts: a\nengine: {kv_cache_dtype: int8}", "engine.kv_cache_dtype = int8 needs engine.kv_cache_scale"),
        (
            "prompts: a\nengine: {kv_cache_scale: 0.1}",
            "engine.kv_cache_scale = 0.1 is of a KV cache of 8 bits, which engine.kv_cache_dtype does not ask for",
        ),
        (
            "prompts: a\nengine: {kv_cache_dtype: fp8, kv_cache_scale: 0.0}",
            "engine.kv_cache_scale = 0 is not a positive number of single precision",
        ),
        ("prompts: a\nengine: {max_stop_seqs: 0}", "engine.max_stop_seqs = 0 turns stop sequences off, but there is"),
        ("prompts: a\nmax_prompts_per_batch: 0", "max_prompts_per_batch = 0 is below 1"),
        ("# a\n\nzzz: {b: 1}", "line 3: zzz is not a known key: known here are chat, checkpoint_path, engine, "),
        ("engine: {zzz: 1}", "engine.zzz is not a known key: known here are engine.cleanup_mode, engine.compute_dtype"),
        ("1: 2", "line 1: (key) = 1 is not text: put it in quotes"),
        ("engine: 3", "line 1: engine = 3 is not a section of keys: write its keys indented below it"),
        ("prompts: a\nengine:", "line 2: engine = null is not a section of keys"),
        ("prompts:\n- a\n- 1984", "line 3: prompts[1] = 1984 is not text: put it in quotes"),
        ("prompts: [null]", "line 1: prompts[0] = null is not text: put it in quotes"),
        ("prompts: 1984", "line 1: prompts is integer `1984`, not text or a list of texts: put text in quotes"),
        ("prompts: yes it is\nstop_sequence: 1.0", "line 2: stop_sequence = 1.0 is not text: put it in quotes"),
        ("prompts: a\nmax_new_tokens: -1", "line 2: max_new_tokens = -1 is not a whole number of at least 0"),
        ("prompts: a\nmax_new_tokens: 1.5", "line 2: max_new_tokens = 1.5 is not a whole number"),
        (
            "prompts: a\nmax_new_tokens: [1, 2]",
            "line 2: max_new_tokens = [1, 2] is not a single value: write one value",
        ),
        ("prompts:\n- a: b", "line 2: prompts[0] = a: b is not a single value: write one value, in quotes if"),
        ("engine:\n  compute_dtype: [f32]", "line 2: engine.compute_dtype = [f32] is not a single value"),
        ("prompts: a\nmax_new_tokens: null", "line 2: max_new_tokens = null is not a whole number"),
        ("engine:\n  seed: 99999999999999999999999", "line 2: engine.seed = 99999999999999999999999 is not a whole"),
        ("prompts: a\ntemperature: hot # very", "line 2: temperature = hot is not a number: repair it"),
        ("chat: maybe", "line 1: chat = maybe is not true or false"),
        (
            "prompts: a\nengine: {compute_dtype: int8}",
            "line 2: engine.compute_dtype = int8 is not one of f32, float32, bf16, bfloat16: choose one of them",
        ),
        ("prompts: a\nprompts: b", "line 2: prompts is there twice: keep one of the two"),
        ("- a", "it holds no keys: write it as `key: value` lines"),
        ("", "it holds no keys"),
        ("# a comment", "it holds no keys"),
        ("prompts: [a", "line 1: prompts: unclosed bracket '['"),
        ("prompts: []", "prompts = [] holds no prompt: give at least one"),
        ("temperature: 0", "prompts = [] holds no prompt: give at least one"),
        ("prompts: a\nstop_sequence: ''", "stop_sequence = \"\" is empty: use null to turn it off"),
        ("prompts: a\ntemperature: .nan", "temperature = NaN is not a finite number of at least 0"),
        ("prompts: a\ntemperature: -0.5", "temperature = -0.5 is not a finite number"),
        ("prompts: a\ntop_p: 0", "top_p = 0 is not above 0 and at most 1"),
        ("prompts: a\nmax_new_tokens: 0", "max_new_tokens = 0 is below 1: use 1 or more"),
        ("prompts: a\nn_rounds: 5000", "n_rounds = 5000 exceeds 4096, the most that random keys can distinguish"),
        ("prompts: a\nengine: {page_size: 0}", "engine.page_size = 0 is below 1"),
        ("prompts: a\nengine: {max_pages: 3000000000}", "engine.max_pages = 3000000000 exceeds 2147483647"),
    ];
    for (text, message) in cases {
        let error = resolve(text, &[]).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{text}");
        assert!(error.to_string().contains(message), "{text}\n{error}");
    }
}

#[test]
fn bad_files_are_named() {
    let cases: [(&[u8], &str); 5] = [
        (b"prompts: a", "hf_checkpoint = null names no model"),
        (b"prompts: a\nhf_checkpoint: gs://x/y", "gs://x/y is not on this machine: copy it with `gcloud storage cp"),
        (b"prompts: a\ncheckpoint_path: gs://x/y", "checkpoint_path = gs://x/y is a checkpoint of Levanter's own"),
        (b"prompts: a\nmax_new_tokens: \xff", "run.yaml: line 2 is not UTF-8 text: save the file as UTF-8"),
        (b"\xff\xfep\0r\0", "run.yaml: line 1 is not UTF-8 text: save the file as UTF-8"),
    ];
    for (bytes, message) in cases {
        let error = resolve_bytes(bytes, &[]).and_then(|settings| settings.model(Files::Model)).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{message}");
        assert!(error.to_string().contains(message), "{message}\n{error}");
    }
    for (path, message) in [
        (Path::new("nowhere.yaml"), "cannot read nowhere.yaml"),
        (&examples(), "examples: it is a folder: give the YAML file itself"),
    ] {
        let error = Settings::resolve(Some(path), &flags(&[])).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{message}");
        assert!(error.to_string().contains(message), "{message}\n{error}");
    }
    let settings = resolve("prompts: a\ntokenizer: nowhere", &[]).unwrap();
    assert_eq!(settings.tokenizer().unwrap(), examples().join(MODEL), "--model replaces the tokenizer of the file");
    let settings = resolve("prompts: a", &["--tokenizer", "nowhere"]).unwrap();
    assert!(settings.tokenizer().unwrap_err().to_string().contains("nowhere does not exist: give tokenizer.json"));
}

#[test]
fn limits_follow_the_requests() {
    let text = "prompts: [a, b, c]\nmax_new_tokens: 10\nengine: {page_size: 8}";
    let settings = resolve(text, &[]).unwrap();
    let limits = settings.limits(&[3, 9, 5], 4608).unwrap();
    assert_eq!((limits.max_seq_len, limits.max_seqs, limits.max_pages), (19, 3, 9));
    assert_eq!((limits.max_seqs_in_prefill, limits.max_prefill_size, limits.pages_per_seq()), (3, 17, 3));

    let text = "prompts: [a, b, c]\nmax_new_tokens: 10\nengine: {page_size: 8, max_seq_len: 32, max_pages: 2}";
    let settings = resolve(text, &[]).unwrap();
    let cases = [
        ([3, 40, 5], 64, "prompts[1] = 40 tokens leaves no room for a new token within engine.max_seq_len = 32"),
        ([3, 30, 5], 64, "max_new_tokens = 10 and the 30 tokens of prompts[1] exceed engine.max_seq_len = 32"),
        ([3, 9, 5], 64, "engine.max_pages = 2 holds 16 tokens, but prompts[1] alone needs 19: raise it to 3"),
        ([3, 4, 5], 16, "engine.max_seq_len = 32 exceeds the model's max_position_embeddings = 16"),
    ];
    for (lengths, positions, message) in cases {
        let error = settings.limits(&lengths, positions).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn what_the_target_has_no_use_for_is_said() {
    let text = "prompts: a\nmodel: {use_tpu_ragged_paged_attention: true, ragged_paged_q_block_size: 32}";
    let model = resolve(text, &[]).unwrap().model;
    let tiles = "model.ragged_paged_q_block_size = 32 is not applied: tiles are planned, see `pagoda check`";
    assert_eq!(model.not_applied(Target::Tpu(Chip::V5p)), [tiles]);
    let kernels = "model.use_tpu_ragged_paged_attention is not applied, kernels are native. With true, attention is Mosaic's: \
                   add --kernels mosaic";
    assert_eq!(model.not_applied(Target::Host), [kernels, tiles]);
    assert_eq!(ModelSettings::default().not_applied(Target::Portable), [""; 0]);
}

#[test]
fn pages_follow_the_memory_that_is_left() {
    let settings =
        resolve("prompts: [a, b, c]\nmax_new_tokens: 10\nengine: {page_size: 8, hbm_utilization: 0.5}", &[]).unwrap();
    let limits = settings.limits(&[3, 9, 5], 4608).unwrap();
    assert_eq!((limits.max_pages, limits.pages_per_seq()), (9, 3));
    // Nine pages of 1 KiB.
    let cache = TensorType::new(Element::F32, &[9, 256]);
    let pages = |left: u64, weights: u64| {
        let room = Room { left: Bytes(left), owner: "the device".into() };
        settings.pages(&limits, &room, Bytes(weights), &cache)
    };
    assert_eq!(pages(1 << 20, 0), 9, "no more than the requests use");
    assert_eq!(pages(24 << 10, 10 << 10), 7, "half of what the weights leave");
    assert_eq!(pages(10 << 10, 10 << 10), 3, "one sequence, which is then refused by its size");
}

/// Older spellings, keys that change nothing, and what flags replaced, each said once.
#[test]
fn what_is_not_taken_as_it_is_written_is_noted() {
    let text = "checkpoint_path: gs://a/b\ntokenizer: a/b\nseed: 2\nprompts: a\ntrainer:\n  tracker: {type: wandb, tags: [a]}\n  \
        mp: f32\n  model_axis_size: 4\n  tensor_parallel_axes: [mlp]\n  ray: {auto_start_cluster: false}\nservice:\n  \
        max_pages_per_seq: 3\n  page_size: 8\n  use_logical_reset: true\n  incremental_cleanup: true\n  \
        compute_dtype: bfloat16\n  enable_logprobs: false\n";
    let settings = resolve(text, &[]).unwrap();
    let expected = [
        "service is an older spelling: it is read as engine",
        "engine.max_pages_per_seq is an older spelling: it is read as engine.max_seq_len",
        "engine.use_logical_reset is an older spelling: it is read as engine.reset_mode",
        "engine.incremental_cleanup is an older spelling: it is read as engine.cleanup_mode",
        "trainer.model_axis_size is an older spelling: it is read as trainer.mesh.axes.model",
        "trainer.tensor_parallel_axes is an older spelling: it is read as trainer.mesh.tensor_parallel_axes, and ignored: \
         heads, MLP and vocabulary are sharded",
        "ignored, as they change nothing here: seed, trainer.tracker, trainer.ray, service.enable_logprobs",
        "--model replaces the file's checkpoint_path, gs://a/b",
        "--model replaces the file's tokenizer, a/b",
        "trainer.mp computes in f32, engine.compute_dtype is bf16: there is one type here, and the latter counts",
    ];
    assert_eq!(settings.notes(), expected);
    assert_eq!((settings.engine.max_seq_len, settings.compute()), (Some(24), Compute::Bf16));
    assert_eq!(settings.mesh().to_string(), "data=-1,model=4");
    let modes = (settings.engine.reset_mode, settings.engine.cleanup_mode);
    assert_eq!(modes, (ResetMode::Logical, CleanupMode::Incremental));
    let settings = resolve(text, &["--mesh", "model=2,data=3"]).unwrap();
    assert_eq!(settings.mesh().to_string(), "data=3,model=2");
    assert_eq!(resolve("prompts: a\ntrainer: {mp: 'p=f32,c=f32'}", &[]).unwrap().compute(), Compute::F32);
}

#[test]
fn the_cache_has_the_type_that_is_asked_for() {
    for (keys, flags, expected) in [
        ("{}", &[][..], KvCache::of(Element::Bf16)),
        ("{compute_dtype: f32}", &[], KvCache::of(Element::F32)),
        ("{compute_dtype: f32, kv_cache_dtype: bfloat16}", &[], KvCache::of(Element::Bf16)),
        ("{kv_cache_dtype: fp8}", &[], KvCache::of(Element::F8E4M3Fn)),
        ("{kv_cache_dtype: fp8_e4m3, kv_cache_scale: 0.5}", &[], KvCache::scaled(Element::F8E4M3Fn, 0.5)),
        ("{}", &["--kv-cache-dtype", "fp8_e5m2"], KvCache::of(Element::F8E5M2)),
        ("{kv_cache_dtype: auto}", &["--kv-cache-dtype=int8", "--kv-cache-scale=0.125"], {
            KvCache::scaled(Element::I8, 0.125)
        }),
    ] {
        let settings = resolve(&format!("prompts: a\nengine: {keys}"), flags).unwrap();
        assert_eq!(settings.kv_cache(), expected, "{keys} {flags:?}");
    }
    // It decides the texts, where it is not the compute type.
    let identity = |keys: &str| resolve(&format!("prompts: a\nengine: {keys}"), &[]).unwrap().identity();
    assert_eq!(identity("{kv_cache_dtype: bf16}"), identity("{}"));
    assert_ne!(identity("{kv_cache_dtype: fp8}"), identity("{}"));
}

/// The shapes of sampler files in Levanter's and Marin's repositories (2025-06 to 2026-02): all keys that they use, with
/// prompts of our own.
const REAL: [&str; 5] = [
    // sample_nano.yaml
    "hf_checkpoint: \"meta-llama/Llama-3.2-1B\"\ntokenizer: \"meta-llama/Llama-3.2-1B\"\ntrainer:\n  ray:\n    \
     auto_start_cluster: false\n  mp: p=bfloat16,c=bfloat16\n  tensor_parallel_axes: [\"mlp\", \"heads\", \"kv_head\", \"vocab\"]\n  \
     model_axis_size: 1\n\nprompts:\n  - \"A prompt\"\n  # - \"Another\",\n  - \"One more, with a comma\"\n\nservice:\n  \
     max_pages: 256\n  max_seqs: 8\n  page_size: 8\n  max_pages_per_seq: 16\n  max_queued_tokens: 16\n  max_seqs_in_prefill: 8\n  \
     max_prefill_size: 128\n  max_tokens_per_round: 8\n  max_rounds: 16\n",
    // sample_llama8b.yaml, without prompts: they are given on the command line
    "hf_checkpoint: \"meta-llama/Llama-3.1-8B-Instruct\"\ntokenizer: \"meta-llama/Llama-3.1-8B-Instruct\"\nn_rounds: 1\n\
     profile: true\ntrainer:\n  tracker:\n    type: wandb\n    project: a-project\n  ray:\n    auto_start_cluster: false\n  \
     mp: p=bfloat16,c=bfloat16\n  tensor_parallel_axes: [\"mlp\", \"heads\", \"kv_head\", \"vocab\"]\n  model_axis_size: 4\n\nengine:\n  \
     max_pages: 16384\n  max_seqs: 256\n  page_size: 8\n  max_pages_per_seq: 512\n  max_queued_tokens: 256\n  \
     max_seqs_in_prefill: 16\n  max_prefill_size: 4096\n  max_rounds: 32\n",
    // sample_llama8b.yaml, later
    "hf_checkpoint: gs://bucket/models/llama\nn_rounds: 1\nprofile: true\ntrainer:\n  tracker:\n    type: wandb\n    \
     project: a-project\n  ray:\n    auto_start_cluster: false\n  mp: p=bfloat16,c=bfloat16\n  mesh:\n    axes:\n      model: 4\n\
     engine:\n  max_pages: null\n  max_seqs: 256\n  page_size: 128\n  max_seq_len: 4096\n  max_rounds: 32\n  \
     debug_stats_every_n: 10\n",
    // sample_llama8b_multihost.yaml
    "hf_checkpoint: gs://bucket/models/llama\nprompts:\n  - \"A question?\"\n  - \"An order.\"\nmax_new_tokens: 128\n\
     temperature: 0.7\nn_rounds: 1\nn_generations: 1\ntrainer:\n  tracker:\n    type: wandb\n    project: a-project\n    \
     tags: [\"multihost\", \"sampling\"]\n  ray:\n    auto_start_cluster: false\n  mp: p=bfloat16,c=bfloat16\n  mesh:\n    axes:\n      \
     model: 4\nengine:\n  max_seq_len: 512\n  max_pages: 128\n  page_size: 128\n  max_seqs: 32\n  max_seqs_in_prefill: 32\n  \
     max_prefill_size: 1024\n  max_queued_tokens: 64\n  max_rounds: 16\n  debug_stats_every_n: 10\n  reset_mode: physical\n  \
     max_stop_seqs: 1\n  max_stop_tokens: 8\n  seed: 0\n",
    // sample_llama8b_multihost_real_*_hostdp.yaml and benchmark_grpo_*.yaml
    "hf_checkpoint: gs://bucket/models/llama\nstop_sequence: null\nmax_new_tokens: 2048\ntemperature: 1.0\nn_rounds: 1\n\
     n_generations: 16\nmax_prompts_per_batch: 1\ndefer_tracker_logs_until_end: true\nskip_samples_table: true\ntrainer:\n  \
     tracker:\n    type: noop\n  ray:\n    auto_start_cluster: false\n  mp: p=bfloat16,c=bfloat16\n  mesh:\n    axes:\n      \
     model: 4\nmodel:\n  type: llama\n  use_tpu_ragged_paged_attention: true\n  ragged_paged_q_block_size: 16\n  \
     ragged_paged_kv_block_pages: 8\nengine:\n  max_seq_len: 2560\n  max_pages: 2304\n  page_size: 128\n  max_seqs: 128\n  \
     max_seqs_in_prefill: 128\n  max_prefill_size: 2048\n  max_queued_tokens: 128\n  max_tokens_per_round: 128\n  max_rounds: 64\n  \
     debug_stats_every_n: 10\n  reset_mode: physical\n  cleanup_mode: none\n  max_stop_seqs: 1\n  max_stop_tokens: 8\n  seed: 42\n\
     prompts:\n  - \"Prompt 001: a formula, $\\\\\\\\sqrt{2}$, and\\na line.\"\n\ninference_mode: host_data_parallel\n\
     host_data_parallel_output_dir: /tmp/outputs\nenable_host_rows_gather: true\nskip_round_barrier: false\n\
     leader_postprocess_sleep_sec: 0\nlog_kernel_jaxprs_path: null\nemit_minimal_tracker_probe_all_hosts: false\n",
];

#[test]
fn real_files_are_accepted() {
    for text in REAL {
        let settings = resolve(text, &["--prompt", "a"]).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(settings.compute(), Compute::Bf16);
        assert!(!settings.notes().is_empty());
        let printed = settings.to_string().replace("prompts: 1", "prompts: a");
        let again = resolve(&printed, &[]).unwrap_or_else(|error| panic!("{error}\n{printed}"));
        assert_eq!(
            (&again.engine, &again.trainer.mesh, &again.model),
            (&settings.engine, &settings.trainer.mesh, &settings.model)
        );
    }
}

#[test]
fn what_levanter_refuses_is_said_and_run() {
    let text = "prompts: [a, b, c]\nmax_new_tokens: 10\nn_generations: 2\nengine: {page_size: 8, max_seqs: 2, max_pages: 8, \
        max_prefill_size: 4, max_seqs_in_prefill: 1, max_seq_len: 24, max_rounds: 32, max_queued_tokens: 1}";
    let settings = resolve(text, &[]).unwrap();
    let lengths = [3, 9, 5];
    let limits = settings.limits(&lengths, 4608).unwrap();
    let departures = settings.departures(&lengths, &limits).join("\n");
    let expected = "engine.max_seqs = 2 is below the 6 sequences of a batch, which Levanter refuses: here the rest wait for a slot\n\
        engine.max_pages = 8 is below the 18 pages of a batch, which Levanter refuses: here sequences wait for pages\n\
        engine.max_seqs_in_prefill = 1 is below the 3 prompts of a batch, which Levanter refuses: here they take several steps\n\
        engine.max_prefill_size = 4 is below the 17 prompt tokens of a batch, which Levanter refuses: here they are prefilled in \
        chunks\n\
        engine.max_queued_tokens = 1 is below the 2 engine.max_seqs, which Levanter refuses: here there is no queue\n\
        engine.max_queued_tokens = 1 is below the 2 engine.max_tokens_per_round, which Levanter refuses: here there is no queue\n\
        engine.max_seq_len = 24 is below the 32 engine.max_rounds, which Levanter refuses: here a call ends with its last sequence\n\
        Levanter's decode loop ends after 0 of the 60 new tokens of a batch: here none is cut short";
    assert_eq!(departures, expected);
    let roomy =
        resolve("prompts: [a, b, c]\nmax_prompts_per_batch: 2\nengine: {max_tokens_per_round: 1}", &[]).unwrap();
    let limits = roomy.limits(&lengths, 4608).unwrap();
    assert_eq!((limits.max_seqs, roomy.departures(&lengths, &limits).len()), (1, 2));
    assert!(
        roomy.check_stop(17).unwrap_err().to_string().contains("engine.max_stop_tokens = 16 is below the 17 tokens")
    );
}

/// One line of a drawn file: the key's path, and its value as YAML.
fn drawn_key() -> impl Strategy<Value = (&'static [&'static str], String)> {
    let count = || (1usize..5000).prop_map(|size| size.to_string()).boxed();
    let flag = || any::<bool>().prop_map(|flag| flag.to_string()).boxed();
    let one_of = |values: &'static [&'static str]| prop::sample::select(values).prop_map(str::to_owned).boxed();
    let share = || (1u32..1000).prop_map(|share| format!("{}", f64::from(share) / 1000.0)).boxed();
    let keys: Vec<(&'static [&'static str], BoxedStrategy<String>)> = vec![
        (&["max_new_tokens"], count()),
        (&["temperature"], share()),
        (&["top_k"], count()),
        (&["top_p"], share()),
        (&["n_generations"], count()),
        (&["n_rounds"], (1usize..4096).prop_map(|size| size.to_string()).boxed()),
        (&["max_prompts_per_batch"], count()),
        (&["stop_sequence"], one_of(&["null", "'.'", "\"\\n\\n\"", "'1984'", "'yes'", "'# no comment'"])),
        (&["ignore_eos"], flag()),
        (&["inference_mode"], one_of(&["global_mesh", "host_data_parallel"])),
        (&["chat"], flag()),
        (&["engine", "max_seq_len"], count()),
        (&["engine", "max_pages"], one_of(&["null", "1", "288", "4096"])),
        (&["engine", "hbm_utilization"], share()),
        (&["engine", "page_size"], count()),
        (&["engine", "max_seqs"], count()),
        (&["engine", "max_seqs_in_prefill"], count()),
        (&["engine", "max_prefill_size"], count()),
        (&["engine", "max_tokens_per_round"], count()),
        (&["engine", "max_rounds"], count()),
        (&["engine", "mixed_steps"], flag()),
        (&["engine", "reuse_prefixes"], flag()),
        (&["engine", "max_queued_tokens"], count()),
        (&["engine", "max_stop_seqs"], count()),
        (&["engine", "max_stop_tokens"], count()),
        (&["engine", "seed"], any::<u64>().prop_map(|seed| seed.to_string()).boxed()),
        (&["engine", "compute_dtype"], one_of(&["f32", "bf16"])),
        (&["engine", "kv_cache_dtype"], one_of(&["auto", "bf16", "fp8_e4m3", "fp8_e5m2"])),
        (&["engine", "debug_stats_every_n"], count()),
        (&["engine", "log_decode_perf_summary"], flag()),
        (&["engine", "reset_mode"], one_of(&["physical", "logical"])),
        (&["engine", "cleanup_mode"], one_of(&["none", "end", "incremental"])),
        (&["model", "type"], one_of(&["llama"])),
        (&["model", "use_tpu_ragged_paged_attention"], flag()),
        (&["model", "ragged_paged_q_block_size"], count()),
        (&["model", "ragged_paged_kv_block_pages"], count()),
        (
            &["trainer", "mp"],
            one_of(&["p=bfloat16,c=bfloat16", "f32", "'params=float32,compute=bfloat16,output=float32'"]),
        ),
        (
            &["trainer", "mesh"],
            one_of(&["{axes: {data: -1, model: 4}}", "{axes: {data: 2, model: 2}}", "{axes: {data: 1, model: -1}}"]),
        ),
    ];
    prop::sample::select(keys).prop_flat_map(|(key, value)| (Just(key), value))
}

proptest! {
    /// Every value of a drawn file takes effect, as what is printed shows; and what is printed, read again, is the same run.
    #[test]
    fn files_are_read_and_printed_alike(drawn in prop::collection::vec(drawn_key(), 0..20)) {
        let mut file = serde_json::Map::new();
        for (path, value) in drawn {
            let value: Value = serde_saphyr::from_str(&value).unwrap();
            let mut section = &mut file;
            for name in &path[..path.len() - 1] {
                section = section.entry(*name).or_insert_with(|| Value::Object(Default::default())).as_object_mut().unwrap();
            }
            section.insert(path[path.len() - 1].to_string(), value);
        }
        let text = format!("prompts: a\n{}", if file.is_empty() { String::new() } else { serde_saphyr::to_string(&file).unwrap() });
        let settings = resolve(&text, &[]).map_err(|error| TestCaseError::fail(format!("{error}\n{text}")))?;
        let printed = settings.to_json();
        fn holds(all: &Value, some: &Value) -> bool {
            match (all, some) {
                (Value::Object(all), Value::Object(some)) => some.iter().all(|(key, some)| all.get(key).is_some_and(|all| holds(all, some))),
                (Value::Number(a), Value::Number(b)) => (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-6 * b.as_f64().unwrap().abs().max(1.0),
                (all, some) => all == some,
            }
        }
        prop_assert!(holds(&printed, &Value::Object(file)), "{text}\nis read as\n{settings}");
        let again = resolve(&settings.to_string().replace("prompts: 1\n", "prompts: a\n"), &[]).unwrap();
        prop_assert_eq!(again.to_json(), printed);
        prop_assert!(again.notes().iter().all(|note| note.starts_with("--model") || note.starts_with("trainer.mp")));
    }
}
