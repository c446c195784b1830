//! Settings of a sampling run: Levanter's sampler YAML, overridden by flags, checked and resolved.
//!
//! [`Settings`] is the one list of keys: the YAML reader, the flags of `pagoda sample`, the list of known keys behind
//! "did you mean", what is printed at the start and the identity of a run all follow from its fields. A new key is a new
//! field; a new section is a struct of its own in a field of its own, as [`EngineSettings`]. What a key is, one that means
//! something here, an older spelling, or one that is accepted and ignored, is stated where it is declared (see `key`).
//!
//! Keys, meanings and defaults are Levanter's; Pagoda adds `top_k`, `top_p`, `chat`, `ignore_eos` and `engine.mixed_steps`.
//! In Levanter no end-of-text token ends a sample; here it does, but for a file that says `stop_sequence: null`, which asks
//! for samples of full length (`ignore_eos` says it outright). Some defaults differ on purpose:
//! without a config file there is no stop sequence; `prompts` has no default; `engine.max_seq_len` may be left out (it
//! becomes what the longest request needs). A key that is not known is an error, never ignored: a misspelt limit must not
//! run with a default. What Levanter refuses because one flush cannot hold it waits for its turn here: a note says so.
//!
//! Paths in a config file are relative to the folder of that file, so that a config works from anywhere; paths in
//! flags are relative to the current folder.

mod engine;
mod key;
mod model;
mod requests;
#[cfg(test)]
mod tests;
mod trainer;
mod yaml;

use std::fmt;
use std::path::{Path, PathBuf};

use clap::{ArgAction, ArgMatches, Args, FromArgMatches, ValueEnum};
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

pub use engine::{CleanupMode, Compute, EngineSettings, ResetMode};
use key::settings;
pub use model::{Architecture, ModelSettings};
pub use trainer::{MeshSettings, Policy, TrainerSettings};

use crate::error::{Error, Result};
use crate::llama::KvCache;
use crate::mesh::MeshRequest;
use crate::model::source::{Files, Source};
use crate::units::SampleId;

settings! {
    /// The settings of a run, as the config file spells them; a flag has the name of its key unless stated otherwise.
    ///
    /// After [`Settings::resolve`] every value is in its range. Serialised, it says what took effect: `prompts` is then the
    /// number of prompts.
    pub struct Settings {
        /// The model: a folder (config.json, tokenizer.json, model.safetensors or its shards and index), or a Hugging Face id.
        #[arg(long = "model", value_name = "MODEL")]
        #[serde(serialize_with = "as_text")]
        pub hf_checkpoint: Option<Source> = None,
        /// Levanter's own checkpoints, which are not read here.
        #[arg(skip)]
        pub checkpoint_path: Option<String> = None,
        /// The tokenizer's file, folder or Hugging Face id [default: the model's].
        #[arg(long)]
        #[serde(serialize_with = "as_text")]
        pub tokenizer: Option<Source> = None,
        /// A prompt; give it several times for several prompts.
        #[arg(long = "prompt", value_name = "TEXT")]
        #[serde(deserialize_with = "one_or_several", serialize_with = "as_count")]
        pub prompts: Vec<String> = Vec::new(),
        /// End a sample at this text, matched as tokens.
        #[arg(long, value_name = "TEXT")]
        #[serde(default = "levanter_stop_sequence")]
        pub stop_sequence: Option<String> = None,
        /// Go on behind an end-of-text token, to the end of the budget [default: true where a config file turns stops off].
        #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
        pub ignore_eos: Option<bool> = None,
        /// New tokens per sample.
        #[arg(long, value_name = "N")]
        pub max_new_tokens: usize = 192,
        /// 0 for greedy.
        #[arg(long, value_name = "T", allow_negative_numbers = true)]
        pub temperature: f32 = 0.7,
        /// Sample among the K most likely tokens; 0 for all.
        #[arg(long, value_name = "K", allow_negative_numbers = true)]
        pub top_k: Option<usize> = None,
        /// Sample among the most likely tokens that reach probability P together; 1 for all.
        #[arg(long, value_name = "P", allow_negative_numbers = true)]
        pub top_p: f32 = 1.0,
        /// Samples per prompt and round.
        #[arg(long, value_name = "N")]
        pub n_generations: usize = 1,
        /// Repetitions of the whole list of prompts, each with random numbers of its own.
        #[arg(long, value_name = "N")]
        pub n_rounds: usize = 1,
        /// Prompts that run at once, with all their generations [default: as many as there are slots for].
        #[arg(long, value_name = "N")]
        pub max_prompts_per_batch: Option<usize> = None,
        /// How several hosts share the work [default: host_data_parallel].
        #[arg(long, value_enum, value_name = "MODE")]
        pub inference_mode: Option<InferenceMode> = None,
        /// Where host_data_parallel writes, if --out is not given [default: host_data_parallel_outputs].
        #[arg(skip)]
        pub host_data_parallel_output_dir: Option<PathBuf> = None,
        /// Treat prompts as user messages of the model's chat template.
        // Not a plain switch: clap gives that a default of `false`, which would override the file.
        #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
        pub chat: bool = false,
        /// Sizes of the engine.
        #[command(flatten)]
        pub engine: EngineSettings = EngineSettings::default(),
        /// The model.
        #[command(flatten)]
        pub model: ModelSettings = ModelSettings::default(),
        /// Types of computation, and the mesh.
        #[command(flatten)]
        pub trainer: TrainerSettings = TrainerSettings::default(),
        /// What the user should know of the file: older spellings, keys that were ignored, what flags replaced.
        #[arg(skip)]
        #[serde(skip)]
        notes: Vec<String> = Vec::new(),
    }
    older {
        /// Today's `engine`.
        service: EngineSettings,
    }
    ignored {
        // Seeds the weights, which a checkpoint has.
        seed,
        // Rounds, rows and logs of several hosts.
        enable_host_rows_gather, defer_tracker_logs_until_end, skip_round_barrier, skip_samples_table,
        skip_leader_postprocess, skip_metrics_log, leader_postprocess_sleep_sec, force_post_generate_block_until_ready,
        force_post_generate_barrier, barrier_before_leader_postprocess, force_samples_rows_log,
        emit_minimal_tracker_probe, emit_minimal_tracker_probe_all_hosts,
        // Profiles and dumps: see --trace, and `pagoda emit`.
        profile, log_kernel_jaxprs_path,
    }
}

/// How several hosts share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum InferenceMode {
    /// One mesh over all hosts, which run every step together.
    GlobalMesh,
    /// Each host runs a share of the prompts by itself.
    HostDataParallel,
}

impl fmt::Display for InferenceMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GlobalMesh => "global_mesh",
            Self::HostDataParallel => "host_data_parallel",
        })
    }
}

/// The flags that are [`Settings`] too, as they were given: those that were not given override nothing.
#[derive(Clone, Debug, Default)]
pub struct Flags(ArgMatches);

impl Args for Flags {
    fn augment_args(command: clap::Command) -> clap::Command {
        Settings::augment_args_for_update(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Settings::augment_args_for_update(command)
    }
}

impl FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self(matches.clone()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0 = matches.clone();
        Ok(())
    }
}

/// The values of all keys but these count something: at least 1, and positions, page ids and row offsets are `i32` on the
/// device.
const NOT_COUNTS: [&str; 5] =
    ["prompts", "engine.seed", "engine.max_stop_seqs", "engine.max_stop_tokens", "engine.debug_stats_every_n"];

impl Settings {
    /// Reads the config file, if any, lets the flags win, and checks every value.
    ///
    /// # Errors
    /// Names the file and line of an unknown or mistyped key, or the key whose value cannot work.
    pub fn resolve(config: Option<&Path>, flags: &Flags) -> Result<Self> {
        let settings = Self::resolve_for_server(config, flags)?;
        if settings.prompts.is_empty() {
            return Err(Error::setting("prompts", "[]", "holds no prompt", "give at least one, here or with --prompt"));
        }
        Ok(settings)
    }

    /// As [`resolve`](Self::resolve), of a process whose prompts come from elsewhere.
    ///
    /// # Errors
    /// As there.
    pub fn resolve_for_server(config: Option<&Path>, flags: &Flags) -> Result<Self> {
        let mut settings = config.map_or_else(|| Ok(Self::default()), Self::read)?;
        settings.apply(flags)?;
        let stops_are_off = config.is_some() && settings.stop_sequence.is_none();
        settings.ignore_eos.get_or_insert(stops_are_off);
        settings.top_k = settings.top_k.filter(|&k| k != 0);
        settings.tokenizer = settings.tokenizer.take().or_else(|| settings.hf_checkpoint.clone());
        settings.settle_compute();
        settings.check()?;
        Ok(settings)
    }

    /// Reads a config file; its paths are made relative to the current folder. Values are not checked.
    ///
    /// # Errors
    /// Names the file and line of an unknown or mistyped key.
    pub fn read(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Err(Error::file(path, "it is a folder", "give the YAML file itself"));
        }
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = 1 + valid.iter().filter(|&&byte| byte == b'\n').count();
            Error::file(path, format!("line {line} is not UTF-8 text"), "save the file as UTF-8")
        })?;
        let file = |(problem, fix): (String, String)| Error::file(path, problem, fix);
        let (mut settings, ignored) = yaml::from_yaml(&text).map_err(file)?;
        settings.modernise();
        if !ignored.is_empty() {
            settings.notes.push(format!("ignored, as they change nothing here: {}", ignored.join(", ")));
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        for source in [&mut settings.hf_checkpoint, &mut settings.tokenizer].into_iter().flatten() {
            source.relative_to(folder);
        }
        if let Some(path) = &mut settings.host_data_parallel_output_dir {
            *path = folder.join(&*path);
        }
        Ok(settings)
    }

    /// Reads older spellings into today's keys.
    fn modernise(&mut self) {
        if let Some(service) = self.service.take("service", "engine", &mut self.notes) {
            self.engine = service;
        }
        self.engine.modernise(&mut self.notes);
        self.trainer.modernise(&mut self.notes);
    }

    /// Lets the flags win. A model on the command line is another model: what the file says of its own goes.
    fn apply(&mut self, flags: &Flags) -> Result<()> {
        let given = |key: &str| flags.0.try_contains_id(key).is_ok_and(|known| known) && flags.0.contains_id(key);
        if given("hf_checkpoint") {
            for (key, of_the_file) in [
                ("checkpoint_path", self.checkpoint_path.take()),
                ("tokenizer", self.tokenizer.take().map(|source| source.to_string())),
            ] {
                let note = |value| format!("--model replaces the file's {key}, {value}");
                self.notes.extend(of_the_file.map(note));
            }
        }
        self.update_from_arg_matches(&flags.0).map_err(Error::runtime("reading the flags"))
    }

    /// The type of weights and activations: `engine.compute_dtype`, else that of `trainer.mp`, else bf16.
    pub fn compute(&self) -> Compute {
        let of_trainer = self.trainer.mp.as_ref().map(Policy::compute);
        self.engine.compute_dtype.or(of_trainer).unwrap_or(Compute::Bf16)
    }

    /// What the KV cache holds.
    pub fn kv_cache(&self) -> KvCache {
        let (compute, engine) = (self.compute().element(), &self.engine);
        let element = engine.kv_cache_dtype.element(compute);
        KvCache::scaled(element, engine.kv_cache_scale.unwrap_or(1.0) as f32)
    }

    fn settle_compute(&mut self) {
        let compute = self.compute();
        if let Some(mp) = self.trainer.mp.as_ref().filter(|mp| mp.compute() != compute) {
            let note = format!(
                "trainer.mp computes in {}, engine.compute_dtype is {}: there is one type here, and the latter counts",
                mp.compute().element(),
                compute.element()
            );
            self.notes.push(note);
        }
        self.engine.compute_dtype = Some(compute);
    }

    /// How several hosts share the work: by default without traffic between them.
    pub fn mode(&self) -> InferenceMode {
        self.inference_mode.unwrap_or(InferenceMode::HostDataParallel)
    }

    /// The mesh that was asked for.
    pub fn mesh(&self) -> MeshRequest {
        self.trainer.mesh.axes.unwrap_or_default()
    }

    /// The folder that the config asks samples to be written into: under `host_data_parallel`, if it is asked for.
    pub fn output_folder(&self) -> Option<PathBuf> {
        let asked = self.inference_mode == Some(InferenceMode::HostDataParallel);
        asked.then(|| self.host_data_parallel_output_dir.clone().unwrap_or("host_data_parallel_outputs".into()))
    }

    /// What the user should know of the file: older spellings, keys that were ignored, what flags replaced.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The model's folder, with the files that are wanted: where a Hugging Face id was given, that of the local cache, into
    /// which they are downloaded if need be.
    ///
    /// # Errors
    /// When no model was given, or it is not there and cannot be had.
    pub fn model(&self, files: Files) -> Result<PathBuf> {
        self.source()?.locate("hf_checkpoint", files)
    }

    /// The tokenizer's file or folder; the model's folder by default.
    ///
    /// # Errors
    /// As [`Settings::model`].
    pub fn tokenizer(&self) -> Result<PathBuf> {
        match &self.tokenizer {
            Some(source) => source.locate("tokenizer", Files::Tokenizer),
            None => self.model(Files::Tokenizer),
        }
    }

    fn source(&self) -> Result<&Source> {
        self.hf_checkpoint.as_ref().ok_or_else(|| {
            Error::setting("hf_checkpoint", "null", "names no model", "give the model's folder here or with --model")
        })
    }

    fn check(&self) -> Result<()> {
        if let Some(path) = &self.checkpoint_path {
            let limit = "is a checkpoint of Levanter's own, which is not read here";
            let fix = "export it to Hugging Face files (levanter.main.export_lm_to_hf) and give their folder as hf_checkpoint";
            return Err(Error::setting("checkpoint_path", path, limit, fix));
        }
        self.source()?;
        if self.stop_sequence.as_deref() == Some("") {
            return Err(Error::setting("stop_sequence", "\"\"", "is empty", "use null to turn it off"));
        }
        if self.stop_sequence.is_some() && self.engine.max_stop_seqs == 0 {
            let limit = "turns stop sequences off, but there is a stop_sequence";
            let fix = "raise it to 1, or set stop_sequence to null";
            return Err(Error::setting("engine.max_stop_seqs", 0, limit, fix));
        }
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            let limit = "is not a finite number of at least 0";
            let fix = "use 0 for greedy, 1 for the model's own";
            return Err(Error::setting("temperature", self.temperature, limit, fix));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let limit = "is not above 0 and at most 1";
            return Err(Error::setting("top_p", self.top_p, limit, "use 1 to sample among all tokens"));
        }
        self.engine.check()?;
        for (key, value) in self.entries() {
            match value.as_u64() {
                _ if NOT_COUNTS.contains(&key.as_str()) => {}
                Some(0) => return Err(Error::setting(key, 0, "is below 1", "use 1 or more")),
                Some(size) if i32::try_from(size).is_err() => {
                    return Err(Error::setting(key, size, format!("exceeds {}", i32::MAX), "use less"));
                }
                _ => {}
            }
        }
        for (key, size, limit) in [
            ("n_generations", self.n_generations, SampleId::GENERATIONS),
            ("n_rounds", self.n_rounds, SampleId::ROUNDS),
        ] {
            if size > limit {
                let limit = format!("exceeds {limit}, the most that random keys can distinguish");
                return Err(Error::setting(key, size, limit, "use less, or several runs with seeds of their own"));
            }
        }
        Ok(())
    }

    /// Every key with its value as it is printed, in no particular order; keys of sections are dotted.
    fn entries(&self) -> Vec<(String, Value)> {
        fn flatten(prefix: &str, value: Value, entries: &mut Vec<(String, Value)>) {
            match value {
                Value::Object(section) => section.into_iter().for_each(|(key, value)| {
                    let dotted = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
                    flatten(&dotted, value, entries);
                }),
                value => entries.push((prefix.to_owned(), value)),
            }
        }
        let mut entries = Vec::new();
        flatten("", self.to_json(), &mut entries);
        entries
    }

    fn to_json(&self) -> Value {
        serde_json::to_value(self).expect("text, numbers and sections are always JSON")
    }

    /// Samples of the whole run.
    pub fn samples(&self) -> usize {
        self.prompts.len() * self.n_generations * self.n_rounds
    }

    /// All that decides the texts, besides the model's files: two runs with equal identities make equal samples.
    ///
    /// Sizes of the engine are not part of it: they change speed and memory only.
    pub fn identity(&self) -> String {
        const ELSEWHERE: [&str; 9] = [
            "engine",
            "model",
            "trainer",
            "hf_checkpoint",
            "checkpoint_path",
            "tokenizer",
            "max_prompts_per_batch",
            "inference_mode",
            "host_data_parallel_output_dir",
        ];
        let mut all = self.to_json();
        let deciding = all.as_object_mut().expect("settings are a section");
        deciding.retain(|key, _| !ELSEWHERE.contains(&key.as_str()));
        // As before there was this key, which must not make old journals another run's.
        deciding.retain(|key, value| key != "ignore_eos" || *value == true);
        deciding.insert("prompts".into(), self.prompts.clone().into());
        deciding.insert("seed".into(), self.engine.seed.into());
        deciding.insert("compute_dtype".into(), self.compute().element().to_string().into());
        // As before there was this key: a cache of the compute type is not mentioned.
        let kv_cache = self.kv_cache();
        if kv_cache != KvCache::of(self.compute().element()) {
            deciding.insert("kv_cache".into(), kv_cache.to_string().into());
        }
        all.to_string()
    }
}

impl fmt::Display for Settings {
    /// As YAML, as a config file would spell it; prompts are counted, not printed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(serde_saphyr::to_string(self).map_err(|_| fmt::Error)?.as_str())
    }
}

/// Levanter's default, which holds where a config file does not name the key.
fn levanter_stop_sequence() -> Option<String> {
    Some(".".to_owned())
}

fn as_text<S: Serializer>(source: &Option<Source>, serializer: S) -> Result<S::Ok, S::Error> {
    source.as_ref().map(Source::to_string).serialize(serializer)
}

fn as_count<S: Serializer>(prompts: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    prompts.len().serialize(serializer)
}

/// Reads one text, or a list of texts.
fn one_or_several<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Texts;

    impl<'de> Visitor<'de> for Texts {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("text or a list of texts")
        }

        fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
            Ok(vec![text.to_owned()])
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(Vec::new())
        }

        fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
            Deserialize::deserialize(de::value::SeqAccessDeserializer::new(list))
        }
    }

    deserializer.deserialize_any(Texts)
}
