//! Settings of a sampling run: Levanter's sampler YAML, overridden by flags, checked and resolved.
//!
//! [`Settings`] is the one list of keys: the YAML reader, the flags of `pagoda sample`, the list of known keys behind
//! "did you mean", what is printed at the start and the identity of a run all follow from its fields. A new key is a new
//! field; a new section is a struct of its own in a field of its own, as [`EngineSettings`].
//!
//! Keys, meanings and defaults are Levanter's; Pagoda adds `top_k`, `top_p` and `chat`. Two defaults differ on purpose:
//! without a config file there is no stop sequence, and `engine.max_seq_len` may be left out (it becomes what the longest
//! request needs). A key that is not known is an error, never ignored: a misspelt limit must not run with a default.
//!
//! Paths in a config file are relative to the folder of that file, so that a config works from anywhere; paths in
//! flags are relative to the current folder.

use std::fmt;
use std::path::{Path, PathBuf};

use clap::{ArgAction, ArgMatches, Args, FromArgMatches, ValueEnum};
use pagoda_ir::element::Element;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use serde_saphyr::Error as YamlError;

use crate::error::{Error, Result};
use crate::scheduler::Limits;
use crate::units::{PageSize, SampleId};

/// The settings of a run, as the config file spells them; a flag has the name of its key unless stated otherwise.
///
/// After [`Settings::resolve`] every value is in its range. Serialised, it says what took effect: `prompts` is then the
/// number of prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The model's folder: config.json, tokenizer.json, model.safetensors (or its shards and index).
    #[arg(long = "model", value_name = "MODEL")]
    #[serde(serialize_with = "as_text")]
    pub hf_checkpoint: Option<PathBuf>,
    /// The tokenizer's file or folder [default: the model's folder].
    #[arg(long)]
    #[serde(serialize_with = "as_text")]
    pub tokenizer: Option<PathBuf>,
    /// A prompt; give it several times for several prompts.
    #[arg(long = "prompt", value_name = "TEXT")]
    #[serde(deserialize_with = "one_or_several", serialize_with = "as_count")]
    pub prompts: Vec<String>,
    /// End a sample at this text, matched as tokens.
    #[arg(long, value_name = "TEXT")]
    #[serde(default = "levanter_stop_sequence")]
    pub stop_sequence: Option<String>,
    /// New tokens per sample.
    #[arg(long, value_name = "N")]
    pub max_new_tokens: usize,
    /// 0 for greedy.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: f32,
    /// Sample among the K most likely tokens; 0 for all.
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<usize>,
    /// Sample among the most likely tokens that reach probability P together; 1 for all.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: f32,
    /// Samples per prompt and round.
    #[arg(long, value_name = "N")]
    pub n_generations: usize,
    /// Repetitions of the whole list of prompts, each with random numbers of its own.
    #[arg(long, value_name = "N")]
    pub n_rounds: usize,
    /// Treat prompts as user messages of the model's chat template.
    // Not a plain switch: clap gives that a default of `false`, which would override the file.
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub chat: bool,
    /// Sizes of the engine.
    #[command(flatten)]
    pub engine: EngineSettings,
}

/// The section `engine`. `None` means: as much as the requests need, see [`Settings::limits`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, deny_unknown_fields)]
pub struct EngineSettings {
    /// Tokens of one sequence, prompt included.
    #[arg(long, value_name = "N")]
    pub max_seq_len: Option<usize>,
    /// Pages of the KV cache.
    #[arg(long, value_name = "N")]
    pub max_pages: Option<usize>,
    /// Tokens per KV page.
    #[arg(long, value_name = "N")]
    pub page_size: usize,
    /// Sequences that run at once.
    #[arg(long, value_name = "N")]
    pub max_seqs: usize,
    /// Sequences in one prefill step.
    #[arg(long, value_name = "N")]
    pub max_seqs_in_prefill: usize,
    /// Prompt tokens in one prefill step.
    #[arg(long, value_name = "N")]
    pub max_prefill_size: Option<usize>,
    /// Decode steps per host call.
    #[arg(long, value_name = "N")]
    pub max_rounds: usize,
    /// Seed of sampling.
    #[arg(long, value_name = "S")]
    pub seed: u64,
    /// Type of weights, activations and KV.
    #[arg(long = "compute", value_enum, value_name = "TYPE")]
    pub compute_dtype: Compute,
}

/// The compute types on offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
pub enum Compute {
    /// IEEE binary32.
    #[serde(rename = "f32", alias = "float32")]
    #[value(alias = "float32")]
    F32,
    /// bfloat16; sums, normalisation, softmax, logits and sampling stay f32.
    #[serde(rename = "bf16", alias = "bfloat16")]
    #[value(alias = "bfloat16")]
    Bf16,
}

impl Compute {
    /// The element type.
    pub const fn element(self) -> Element {
        match self {
            Self::F32 => Element::F32,
            Self::Bf16 => Element::Bf16,
        }
    }
}

impl Default for Settings {
    /// What holds without a config file.
    fn default() -> Self {
        Self {
            hf_checkpoint: None,
            tokenizer: None,
            prompts: Vec::new(),
            stop_sequence: None,
            max_new_tokens: 192,
            temperature: 0.7,
            top_k: None,
            top_p: 1.0,
            n_generations: 1,
            n_rounds: 1,
            chat: false,
            engine: EngineSettings::default(),
        }
    }
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            max_seq_len: None,
            max_pages: None,
            page_size: 128,
            max_seqs: 256,
            max_seqs_in_prefill: 16,
            max_prefill_size: None,
            max_rounds: 32,
            seed: 0,
            compute_dtype: Compute::Bf16,
        }
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
const NOT_COUNTS: [&str; 1] = ["engine.seed"];

impl Settings {
    /// Reads the config file, if any, lets the flags win, and checks every value.
    ///
    /// # Errors
    /// Names the file and line of an unknown or mistyped key, or the key whose value cannot work.
    pub fn resolve(config: Option<&Path>, flags: &Flags) -> Result<Self> {
        let mut settings = config.map_or_else(|| Ok(Self::default()), Self::read)?;
        settings.update_from_arg_matches(&flags.0).map_err(Error::runtime("reading the flags"))?;
        settings.top_k = settings.top_k.filter(|&k| k != 0);
        settings.tokenizer = settings.tokenizer.take().or_else(|| settings.hf_checkpoint.clone());
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
        let mut settings = from_yaml(&text).map_err(|(problem, fix)| Error::file(path, problem, fix))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        for path in [&mut settings.hf_checkpoint, &mut settings.tokenizer].into_iter().flatten() {
            *path = folder.join(&*path);
        }
        Ok(settings)
    }

    /// The model's folder.
    ///
    /// # Errors
    /// When none was given.
    pub fn model(&self) -> Result<&Path> {
        self.hf_checkpoint.as_deref().ok_or_else(|| {
            Error::setting("hf_checkpoint", "null", "names no model", "give the model's folder here or with --model")
        })
    }

    /// The tokenizer's file or folder; the model's folder by default.
    ///
    /// # Errors
    /// When neither was given.
    pub fn tokenizer(&self) -> Result<&Path> {
        self.tokenizer.as_deref().map_or_else(|| self.model(), Ok)
    }

    fn check(&self) -> Result<()> {
        let (model, tokenizer) = (self.model()?, self.tokenizer()?);
        if self.prompts.is_empty() {
            return Err(Error::setting("prompts", "[]", "holds no prompt", "give at least one, here or with --prompt"));
        }
        if self.stop_sequence.as_deref() == Some("") {
            return Err(Error::setting("stop_sequence", "\"\"", "is empty", "use null to turn it off"));
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
        if !model.is_dir() {
            let fix = "download the checkpoint and give its folder (in a config file relative to that file)";
            return Err(Error::setting("hf_checkpoint", model.display(), "is not a folder", fix));
        }
        if !tokenizer.exists() {
            let fix = "give tokenizer.json or its folder, or leave the key out to use the model's";
            return Err(Error::setting("tokenizer", tokenizer.display(), "does not exist", fix));
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

    /// The engine's sizes for prompts of these lengths in tokens, all of them checked to fit.
    ///
    /// Give the lengths of *all* prompts of the run, not of one host's share: sizes shape the program, and every host
    /// must run the same program for their texts to be those of one host. What was left open becomes what the
    /// requests can use: `max_seq_len` the longest request, `max_pages` the longest request in every slot,
    /// `max_prefill_size` the longest prompts of a full prefill step, at most `max_seq_len`.
    ///
    /// # Errors
    /// When a request can never run, or `max_seq_len` exceeds the model's `max_position_embeddings`.
    pub fn limits(&self, prompt_lengths: &[usize], max_position_embeddings: usize) -> Result<Limits> {
        let engine = &self.engine;
        let longest = prompt_lengths.iter().copied().max().unwrap_or(0);
        let needed = longest + self.max_new_tokens;
        let max_seq_len = engine.max_seq_len.unwrap_or(needed);
        if max_seq_len > max_position_embeddings {
            let limit = format!("exceeds the model's max_position_embeddings = {max_position_embeddings}");
            let fix = format!("lower it to {max_position_embeddings} or less, or shorten prompts and max_new_tokens");
            return Err(Error::setting("engine.max_seq_len", max_seq_len, limit, fix));
        }
        let max_seqs = engine.max_seqs.min(self.samples());
        let page_size = PageSize::new(engine.page_size).expect("sizes were checked in `resolve`");
        let max_seqs_in_prefill = engine.max_seqs_in_prefill.min(max_seqs);
        let mut lengths = prompt_lengths.to_vec();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        // Clones of a prompt are prefilled side by side.
        let packed: usize = lengths
            .iter()
            .flat_map(|&length| (0..self.n_generations).map(move |_| length))
            .take(max_seqs_in_prefill)
            .sum();
        let limits = Limits {
            max_seq_len,
            max_seqs,
            max_pages: engine.max_pages.unwrap_or(max_seqs * page_size.pages_for(needed)),
            page_size,
            max_seqs_in_prefill,
            max_prefill_size: engine.max_prefill_size.unwrap_or(max_seq_len).min(packed).max(1),
            max_rounds: engine.max_rounds,
        };
        for (index, &length) in prompt_lengths.iter().enumerate() {
            limits.check(&format!("prompts[{index}]"), length, self.max_new_tokens)?;
        }
        Ok(limits)
    }

    /// All that decides the texts, besides the model's files: two runs with equal identities make equal samples.
    ///
    /// Sizes of the engine are not part of it: they change speed and memory only.
    pub fn identity(&self) -> String {
        let mut all = self.to_json();
        let engine = all["engine"].take();
        let deciding = all.as_object_mut().expect("settings are a section");
        for elsewhere in ["engine", "hf_checkpoint", "tokenizer"] {
            deciding.remove(elsewhere);
        }
        deciding.insert("prompts".into(), self.prompts.clone().into());
        for key in ["seed", "compute_dtype"] {
            deciding.insert(key.into(), engine[key].clone());
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

fn as_text<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_ref().map(|path| path.display().to_string()).serialize(serializer)
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

/// Reads YAML; else what is wrong with it (line, key, value, limit), and the fix.
fn from_yaml(text: &str) -> Result<Settings, (String, String)> {
    let options = serde_saphyr::options! {
        // Text that looks like a number or a switch must be quoted: `prompts: [1984]` is rather a mistake.
        no_schema: true,
        strict_booleans: true,
        with_snippet: false,
        // The file is the user's own, and a list of prompts may be long.
        budget: None,
    };
    let mut path = String::new();
    let settings = serde_saphyr::with_deserializer_from_str_with_options(text, options, |yaml| {
        serde_path_to_error::deserialize::<_, Option<Settings>>(yaml).map_err(|error| {
            path = error.path().to_string();
            error.into_inner()
        })
    });
    let no_keys = || ("it holds no keys".to_owned(), "write it as `key: value` lines".to_owned());
    match settings {
        Ok(settings) => settings.ok_or_else(no_keys),
        Err(YamlError::Unexpected { .. }) if path == "." => Err(no_keys()),
        Err(error) => {
            let (problem, fix) = explain(text, &path, &error);
            let line = error.location().map_or(String::new(), |location| format!("line {}: ", location.line()));
            Err((format!("{line}{problem}"), fix))
        }
    }
}

/// What is wrong at `path`, and the fix.
fn explain(text: &str, path: &str, error: &YamlError) -> (String, String) {
    let value = error.location().and_then(|location| {
        let start = usize::try_from(location.span().byte_offset()?).ok()?;
        let length = usize::try_from(location.span().byte_len()?).ok()?;
        // Of a list or a section the parser marks the beginning only; of nothing, the colon before it.
        let rest = text.get(start..)?.lines().next().unwrap_or_default();
        let length = if length == 0 || rest.starts_with(['[', '{']) { rest.len() } else { length };
        let value = text.get(start..start + length)?.trim_start_matches(':').trim();
        (!value.is_empty()).then_some(value)
    });
    let (value, path) = (value.unwrap_or("null"), &path.replace('?', "(key)"));
    let limit = |limit: &str, fix: &str| (format!("{path} = {value} {limit}"), fix.to_owned());
    match error {
        YamlError::SerdeUnknownField { field, expected, .. } => {
            (format!("{path} is not a known key"), did_you_mean(path, field, expected))
        }
        YamlError::DuplicateMappingKey { key: Some(key), .. } => {
            (format!("{key} is there twice"), "keep one of the two".to_owned())
        }
        YamlError::QuotingRequired { .. } | YamlError::NullIntoString { .. } => {
            limit("is not text", "put it in quotes")
        }
        YamlError::InvalidScalar { ty: "floating point", .. } => limit("is not a number", "repair it"),
        YamlError::InvalidScalar { ty, .. } if ty.starts_with('u') => {
            limit("is not a whole number of at least 0 and below 2^64", "repair it")
        }
        YamlError::InvalidBooleanStrict { .. } => limit("is not true or false", "write one of them"),
        YamlError::Unexpected { expected: "mapping start", .. } => {
            limit("is not a section of keys", "write its keys indented below it")
        }
        YamlError::Unexpected { expected: "string scalar", .. }
        | YamlError::ExternallyTaggedEnumExpectedScalarOrMapping { .. } => {
            limit("is not a single value", "write one value, in quotes if it is text with `: ` in it")
        }
        YamlError::SerdeUnknownVariant { expected, .. } => {
            limit(&format!("is not one of {}", expected.join(", ")), "choose one of them")
        }
        YamlError::SerdeInvalidType { unexpected, expected, .. } => {
            (format!("{path} is {unexpected}, not {expected}"), "put text in quotes".to_owned())
        }
        other if path == "." => (other.to_string(), "repair the YAML".to_owned()),
        other => (format!("{path}: {other}"), "repair the YAML".to_owned()),
    }
}

/// The known key that is most like the unknown key at `path`: of its own section, or else of another one.
fn did_you_mean(path: &str, unknown: &str, siblings: &[&str]) -> String {
    let likeness =
        |known: &str| strsim::normalized_damerau_levenshtein(unknown, known.rsplit('.').next().unwrap_or(known));
    let section = path.strip_suffix(unknown).unwrap_or_default();
    let siblings: Vec<String> = siblings.iter().map(|key| format!("{section}{key}")).collect();
    let elsewhere = Settings::default().entries().into_iter().map(|(key, _)| key);
    // The last of equal maxima is taken: a key of the same section.
    let nearest = elsewhere.chain(siblings.iter().cloned()).max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match nearest {
        Some(nearest) if likeness(&nearest) >= 0.5 => format!("did you mean {nearest}?"),
        _ => format!("known here are {}", siblings.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(
            (engine.page_size, engine.max_seqs, engine.max_seqs_in_prefill, engine.max_rounds),
            (128, 256, 16, 32)
        );
        assert_eq!((engine.seed, engine.compute_dtype, engine.max_pages), (0, Compute::Bf16, None));

        let model = examples().join(MODEL);
        let line = flags(&["--model", model.to_str().unwrap(), "--prompt", "Hello"]);
        let no_file = Settings::resolve(None, &line).unwrap();
        assert_eq!(no_file, Settings { stop_sequence: None, ..settings });
    }

    #[test]
    fn what_took_effect_is_printed_as_yaml() {
        let demo = examples().join("configs/demo.yaml");
        let settings =
            Settings::resolve(Some(&demo), &flags(&["--temperature", "0.7", "--stop-sequence", "1.0"])).unwrap();
        assert_eq!(settings.hf_checkpoint, Some(examples().join("configs/../models/tiny-llama-kjv")));
        let paths = format!("{}/configs/../models/tiny-llama-kjv", examples().display());
        let printed = settings.to_string().replace(&paths, "MODEL");
        let expected = "hf_checkpoint: MODEL\ntokenizer: MODEL\nprompts: 8\nstop_sequence: \"1.0\"\n\
            max_new_tokens: 48\ntemperature: 0.7\ntop_k: null\ntop_p: 1.0\nn_generations: 1\nn_rounds: 1\n\
            chat: false\nengine:\n  max_seq_len: 256\n  max_pages: 128\n  page_size: 16\n  max_seqs: 8\n  \
            max_seqs_in_prefill: 8\n  max_prefill_size: 64\n  max_rounds: 16\n  seed: 0\n  compute_dtype: f32\n";
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
        let others: [&[&str]; 9] = [
            &["--prompt", "c"],
            &["--stop-sequence", "!"],
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
            engine: EngineSettings { seed: 4, compute_dtype: Compute::F32, ..file.engine.clone() },
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
            ("prompts: a\nseed: 3", "line 2: seed is not a known key: did you mean engine.seed?"),
            ("engine: {temperature: 3}", "line 1: engine.temperature is not a known key: did you mean temperature?"),
            ("# a\n\nzzz: {b: 1}", "line 3: zzz is not a known key: known here are hf_checkpoint, tokenizer, prompts"),
            ("engine: {zzz: 1}", "engine.zzz is not a known key: known here are engine.max_seq_len, engine.max_pages"),
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
            (
                "engine:\n  seed: 99999999999999999999999",
                "line 2: engine.seed = 99999999999999999999999 is not a whole",
            ),
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
            ("prompts: a\ntokenizer: nowhere", "nowhere does not exist: give tokenizer.json"),
        ];
        for (text, message) in cases {
            let error = resolve(text, &[]).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{text}");
            assert!(error.to_string().contains(message), "{text}\n{error}");
        }
    }

    #[test]
    fn bad_files_are_named() {
        let cases: [(&[u8], &str); 4] = [
            (b"prompts: a", "hf_checkpoint = null names no model"),
            (b"prompts: a\nhf_checkpoint: gs://x/y", "gs://x/y is not a folder: download"),
            (b"prompts: a\nmax_new_tokens: \xff", "run.yaml: line 2 is not UTF-8 text: save the file as UTF-8"),
            (b"\xff\xfep\0r\0", "run.yaml: line 1 is not UTF-8 text: save the file as UTF-8"),
        ];
        for (bytes, message) in cases {
            let error = resolve_bytes(bytes, &[]).unwrap_err();
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
}
