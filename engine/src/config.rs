//! Settings of a sampling run: Levanter's sampler YAML, overridden by flags, checked and resolved.
//!
//! Keys, meanings and defaults are Levanter's; Pagoda adds `top_k` and `top_p`. Two defaults differ on purpose: without
//! a config file there is no stop sequence, and `engine.max_seq_len` may be left out (it becomes what the longest
//! request needs). A key that is not known is an error, never ignored: a misspelt limit must not run with a default.
//!
//! Paths in a config file are relative to the folder of that file, so that a config works from anywhere; paths in
//! flags are relative to the current folder.

use std::fmt;
use std::path::{Path, PathBuf};

use pagoda_ir::element::Element;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_yaml_ng::{Mapping, Value};

use crate::error::{Error, Result};
use crate::scheduler::Limits;
use crate::units::PageSize;

/// Every key that a config file may hold.
const KEYS: [&str; 19] = [
    "hf_checkpoint",
    "tokenizer",
    "prompts",
    "stop_sequence",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "n_generations",
    "n_rounds",
    "engine.max_seq_len",
    "engine.max_pages",
    "engine.page_size",
    "engine.max_seqs",
    "engine.max_seqs_in_prefill",
    "engine.max_prefill_size",
    "engine.max_rounds",
    "engine.seed",
    "engine.compute_dtype",
];

/// What took effect: every value is in its range.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The model's folder (`hf_checkpoint`).
    pub model: PathBuf,
    /// The tokenizer's file or folder; the model's folder by default.
    pub tokenizer: PathBuf,
    /// The prompts, at least one.
    pub prompts: Vec<String>,
    /// The text that ends a sample, if any.
    pub stop_sequence: Option<String>,
    /// New tokens per sample.
    pub max_new_tokens: usize,
    /// 0 means greedy.
    pub temperature: f32,
    /// Sample among this many most likely tokens.
    pub top_k: Option<usize>,
    /// Sample among the most likely tokens that reach this probability together; 1 means all.
    pub top_p: f32,
    /// Samples per prompt and round.
    pub n_generations: usize,
    /// Repetitions of the whole list.
    pub n_rounds: usize,
    /// Whether prompts are user messages for the model's chat template.
    pub chat: bool,
    /// Sizes of the engine.
    pub engine: EngineSettings,
}

/// The section `engine`. `None` means: as much as the requests need, see [`Settings::limits`].
#[derive(Clone, Debug, PartialEq)]
pub struct EngineSettings {
    /// Tokens of one sequence, prompt included.
    pub max_seq_len: Option<usize>,
    /// Pages of the KV cache.
    pub max_pages: Option<usize>,
    /// Tokens per page.
    pub page_size: usize,
    /// Sequences that run at once.
    pub max_seqs: usize,
    /// Sequences in one prefill step.
    pub max_seqs_in_prefill: usize,
    /// Prompt tokens in one prefill step.
    pub max_prefill_size: Option<usize>,
    /// Decode steps per host call.
    pub max_rounds: usize,
    /// Seed of sampling.
    pub seed: u64,
    /// Type of activations and KV cache: `F32` or `Bf16`.
    pub compute_dtype: Element,
}

/// Values given as flags, which win over the config file.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)] // each is the setting of the same name
pub struct Overrides {
    pub model: Option<PathBuf>,
    pub tokenizer: Option<PathBuf>,
    /// Replaces the file's prompts when not empty.
    pub prompts: Vec<String>,
    pub stop_sequence: Option<String>,
    pub max_new_tokens: Option<usize>,
    pub temperature: Option<f32>,
    /// 0 turns it off.
    pub top_k: Option<usize>,
    pub top_p: Option<f32>,
    pub n_generations: Option<usize>,
    pub n_rounds: Option<usize>,
    pub chat: bool,
    pub max_seq_len: Option<usize>,
    pub max_pages: Option<usize>,
    pub page_size: Option<usize>,
    pub max_seqs: Option<usize>,
    pub max_seqs_in_prefill: Option<usize>,
    pub max_prefill_size: Option<usize>,
    pub max_rounds: Option<usize>,
    pub seed: Option<u64>,
    pub compute_dtype: Option<Element>,
}

impl Settings {
    /// Reads the config file, if any, lets the flags win, and checks every value.
    ///
    /// # Errors
    /// Names the file and line of an unknown or mistyped key, or the key whose value cannot work.
    pub fn resolve(config: Option<&Path>, flags: Overrides) -> Result<Self> {
        let file = config.map(ConfigFile::read).transpose()?;
        let settings = Self::merge(file.as_ref(), flags)?;
        settings.check()?;
        Ok(settings)
    }

    fn merge(file: Option<&ConfigFile>, flags: Overrides) -> Result<Self> {
        let size = |flag: Option<usize>, key| match (flag, file) {
            (None, Some(file)) => file.get(key, "a whole number", |value| usize::try_from(value.as_u64()?).ok()),
            (flag, _) => Ok(flag),
        };
        let number = |flag: Option<f32>, key| match (flag, file) {
            (None, Some(file)) => file.get(key, "a number", |value| Some(value.as_f64()? as f32)),
            (flag, _) => Ok(flag),
        };
        let path = |flag: Option<PathBuf>, key| match (flag, file) {
            (None, Some(file)) => file.get(key, "a path", |value| Some(file.folder().join(value.as_str()?))),
            (flag, _) => Ok(flag),
        };
        let (top_k, seed, dtype) = match file {
            Some(file) => (
                file.get("top_k", "a whole number", |value| usize::try_from(value.as_u64()?).ok())?,
                file.get("engine.seed", "a whole number of at most 64 bits", Value::as_u64)?,
                file.get("engine.compute_dtype", "float32 or bfloat16", |value| parse_dtype(value.as_str()?))?,
            ),
            None => (None, None, None),
        };
        let prompts = match file {
            Some(file) if flags.prompts.is_empty() => file.prompts()?,
            _ => flags.prompts,
        };
        let stop_sequence = match (flags.stop_sequence, file) {
            (Some(stop), _) => Some(stop),
            (None, None) => None,
            (None, Some(file)) if file.is_null("stop_sequence") => None,
            (None, Some(file)) => {
                let stop = file.get("stop_sequence", "text or null", |value| Some(value.as_str()?.to_owned()))?;
                Some(stop.unwrap_or_else(|| ".".into()))
            }
        };
        let model = path(flags.model, "hf_checkpoint")?.ok_or_else(|| {
            Error::setting("hf_checkpoint", "null", "names no model", "give the model's folder here or with --model")
        })?;
        Ok(Self {
            tokenizer: path(flags.tokenizer, "tokenizer")?.unwrap_or_else(|| model.clone()),
            model,
            prompts,
            stop_sequence,
            max_new_tokens: size(flags.max_new_tokens, "max_new_tokens")?.unwrap_or(192),
            temperature: number(flags.temperature, "temperature")?.unwrap_or(0.7),
            top_k: flags.top_k.or(top_k).filter(|&k| k != 0),
            top_p: number(flags.top_p, "top_p")?.unwrap_or(1.0),
            n_generations: size(flags.n_generations, "n_generations")?.unwrap_or(1),
            n_rounds: size(flags.n_rounds, "n_rounds")?.unwrap_or(1),
            chat: flags.chat,
            engine: EngineSettings {
                max_seq_len: size(flags.max_seq_len, "engine.max_seq_len")?,
                max_pages: size(flags.max_pages, "engine.max_pages")?,
                page_size: size(flags.page_size, "engine.page_size")?.unwrap_or(128),
                max_seqs: size(flags.max_seqs, "engine.max_seqs")?.unwrap_or(256),
                max_seqs_in_prefill: size(flags.max_seqs_in_prefill, "engine.max_seqs_in_prefill")?.unwrap_or(16),
                max_prefill_size: size(flags.max_prefill_size, "engine.max_prefill_size")?,
                max_rounds: size(flags.max_rounds, "engine.max_rounds")?.unwrap_or(32),
                seed: flags.seed.or(seed).unwrap_or(0),
                compute_dtype: flags.compute_dtype.or(dtype).unwrap_or(Element::Bf16),
            },
        })
    }

    fn check(&self) -> Result<()> {
        let engine = &self.engine;
        if self.prompts.is_empty() {
            return Err(Error::setting("prompts", "[]", "holds no prompt", "give at least one, here or with --prompt"));
        }
        if self.stop_sequence.as_deref() == Some("") {
            return Err(Error::setting("stop_sequence", "\"\"", "is empty", "use null to turn it off"));
        }
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            let limit = "is no finite number of at least 0";
            return Err(Error::setting(
                "temperature",
                self.temperature,
                limit,
                "use 0 for greedy, 1 for the model's own",
            ));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let limit = "is not above 0 and at most 1";
            return Err(Error::setting("top_p", self.top_p, limit, "use 1 to sample among all tokens"));
        }
        let sizes = [
            ("max_new_tokens", Some(self.max_new_tokens)),
            ("top_k", self.top_k),
            ("n_generations", Some(self.n_generations)),
            ("n_rounds", Some(self.n_rounds)),
            ("engine.max_seq_len", engine.max_seq_len),
            ("engine.max_pages", engine.max_pages),
            ("engine.page_size", Some(engine.page_size)),
            ("engine.max_seqs", Some(engine.max_seqs)),
            ("engine.max_seqs_in_prefill", Some(engine.max_seqs_in_prefill)),
            ("engine.max_prefill_size", engine.max_prefill_size),
            ("engine.max_rounds", Some(engine.max_rounds)),
        ];
        for (key, size) in sizes {
            match size {
                Some(0) => return Err(Error::setting(key, 0, "is below 1", "use 1 or more")),
                // Positions, page ids and row offsets are i32 on the device.
                Some(size) if i32::try_from(size).is_err() => {
                    return Err(Error::setting(key, size, format!("exceeds {}", i32::MAX), "use less"));
                }
                _ => {}
            }
        }
        if !self.model.is_dir() {
            let fix = "download the checkpoint and give its folder (in a config file relative to that file)";
            return Err(Error::setting("hf_checkpoint", self.model.display(), "is no folder", fix));
        }
        if !self.tokenizer.exists() {
            let fix = "give tokenizer.json or its folder, or leave the key out to use the model's";
            return Err(Error::setting("tokenizer", self.tokenizer.display(), "does not exist", fix));
        }
        Ok(())
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
        serde_json::json!({
            "prompts": self.prompts,
            "stop_sequence": self.stop_sequence,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "n_generations": self.n_generations,
            "n_rounds": self.n_rounds,
            "chat": self.chat,
            "seed": self.engine.seed,
            "compute_dtype": self.engine.compute_dtype,
        })
        .to_string()
    }
}

impl fmt::Display for Settings {
    /// One `key: value` a line, as a config file would spell it; prompts are counted, not printed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let null = |size: Option<usize>| size.map_or("null".to_owned(), |size| size.to_string());
        let engine = &self.engine;
        writeln!(f, "hf_checkpoint: {}", self.model.display())?;
        writeln!(f, "tokenizer: {}", self.tokenizer.display())?;
        writeln!(f, "prompts: {}", self.prompts.len())?;
        match &self.stop_sequence {
            Some(stop) => writeln!(f, "stop_sequence: {stop:?}")?,
            None => writeln!(f, "stop_sequence: null")?,
        }
        writeln!(f, "max_new_tokens: {}", self.max_new_tokens)?;
        writeln!(f, "temperature: {}", self.temperature)?;
        writeln!(f, "top_k: {}", null(self.top_k))?;
        writeln!(f, "top_p: {}", self.top_p)?;
        writeln!(f, "n_generations: {}", self.n_generations)?;
        writeln!(f, "n_rounds: {}", self.n_rounds)?;
        writeln!(f, "engine:")?;
        writeln!(f, "  max_seq_len: {}", null(engine.max_seq_len))?;
        writeln!(f, "  max_pages: {}", null(engine.max_pages))?;
        writeln!(f, "  page_size: {}", engine.page_size)?;
        writeln!(f, "  max_seqs: {}", engine.max_seqs)?;
        writeln!(f, "  max_seqs_in_prefill: {}", engine.max_seqs_in_prefill)?;
        writeln!(f, "  max_prefill_size: {}", null(engine.max_prefill_size))?;
        writeln!(f, "  max_rounds: {}", engine.max_rounds)?;
        writeln!(f, "  seed: {}", engine.seed)?;
        writeln!(f, "  compute_dtype: {}", engine.compute_dtype)
    }
}

/// The element type that a config or flag calls `f32`, `float32`, `bf16` or `bfloat16`.
pub fn parse_dtype(name: &str) -> Option<Element> {
    match name {
        "f32" | "float32" => Some(Element::F32),
        "bf16" | "bfloat16" => Some(Element::Bf16),
        _ => None,
    }
}

/// A config file whose keys are all known.
struct ConfigFile {
    path: PathBuf,
    text: String,
    root: Mapping,
}

impl ConfigFile {
    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let root = match serde_yaml_ng::from_str(&text) {
            Ok(Value::Mapping(root)) => root,
            Ok(_) => return Err(Error::file(path, "it holds no keys", "write it as `key: value` lines")),
            Err(error) => return Err(Error::file(path, error, "repair the YAML")),
        };
        let file = Self { path: path.into(), text, root };
        file.check_keys(&file.root, "")?;
        Ok(file)
    }

    /// Refuses the first unknown key.
    fn check_keys(&self, mapping: &Mapping, prefix: &str) -> Result<()> {
        for (key, value) in mapping {
            let Some(name) = key.as_str() else {
                return Err(self.refuse(
                    &format!("{prefix}{}", show(key)),
                    "is a key that is no text".into(),
                    "quote it",
                ));
            };
            let dotted = format!("{prefix}{name}");
            if KEYS.contains(&dotted.as_str()) {
                continue;
            }
            let section = format!("{dotted}.");
            if KEYS.iter().any(|known| known.starts_with(&section)) {
                match value {
                    Value::Mapping(inner) => self.check_keys(inner, &section)?,
                    other => {
                        let problem = format!("= {} is no section of keys", show(other));
                        return Err(self.refuse(&dotted, problem, "write its keys indented below it"));
                    }
                }
                continue;
            }
            let fix = format!("did you mean {}?", nearest_key(&dotted));
            return Err(self.refuse(&dotted, "is no known key".into(), &fix));
        }
        Ok(())
    }

    fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new(""))
    }

    fn find(&self, key: &str) -> Option<&Value> {
        let mut parts = key.split('.');
        let first = self.root.get(parts.next()?)?;
        parts.try_fold(first, |value, part| value.get(part))
    }

    fn is_null(&self, key: &str) -> bool {
        self.find(key).is_some_and(Value::is_null)
    }

    /// A key's value; absent and null are `None`.
    fn get<T>(&self, key: &str, what: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.find(key).filter(|value| !value.is_null()) else { return Ok(None) };
        let mistyped = || {
            let quoted = if what.starts_with("text") { "put it in quotes" } else { "repair it" };
            self.refuse(key, format!("= {} is not {what}", show(value)), quoted)
        };
        read(value).map(Some).ok_or_else(mistyped)
    }

    fn prompts(&self) -> Result<Vec<String>> {
        let prompts = match self.find("prompts") {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Sequence(prompts)) => prompts.as_slice(),
            Some(one) => std::slice::from_ref(one),
        };
        let read = |(index, prompt): (usize, &Value)| {
            let mistyped = || {
                let problem = format!("holds {} at place {index}, which YAML reads as no text", show(prompt));
                self.refuse("prompts", problem, "put it in quotes")
            };
            prompt.as_str().map(str::to_owned).ok_or_else(mistyped)
        };
        prompts.iter().enumerate().map(read).collect()
    }

    fn refuse(&self, key: &str, problem: String, fix: &str) -> Error {
        let line = self.line(key).map_or(String::new(), |line| format!("line {line}: "));
        Error::file(&self.path, format!("{line}{key} {problem}"), fix)
    }

    /// The line of a dotted key. The parser tells positions only in errors: so one is provoked there.
    fn line(&self, key: &str) -> Option<usize> {
        let parts: Vec<_> = key.split('.').collect();
        let found = LineProbe(&parts).deserialize(serde_yaml_ng::Deserializer::from_str(&self.text));
        Some(found.err()?.location()?.line())
    }
}

/// A value as the user might have written it, on one line.
fn show(value: &Value) -> String {
    serde_yaml_ng::to_string(value).map_or_else(|_| format!("{value:?}"), |text| text.trim_end().replace('\n', " "))
}

/// The known key that is most like an unknown one: by its last part too, for a key in the wrong section.
fn nearest_key(unknown: &str) -> &'static str {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let likeness = |known: &&str| {
        let parts = strsim::normalized_damerau_levenshtein(&last(unknown), &last(known));
        parts.max(strsim::normalized_damerau_levenshtein(unknown, known))
    };
    KEYS.into_iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b))).expect("there are known keys")
}

/// Follows a dotted key through a document and fails at the key.
struct LineProbe<'a>(&'a [&'a str]);

impl<'de> DeserializeSeed<'de> for LineProbe<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for LineProbe<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (&target, rest) = self.0.split_first().expect("a dotted key has parts");
        while let Some(matches) = map.next_key_seed(KeyProbe { target, is_last: rest.is_empty() })? {
            if matches && !rest.is_empty() {
                map.next_value_seed(LineProbe(rest))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

struct KeyProbe<'a> {
    target: &'a str,
    is_last: bool,
}

impl<'de> DeserializeSeed<'de> for KeyProbe<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeyProbe<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<bool, E> {
        let matches = key == self.target;
        if matches && self.is_last { Err(E::custom("here")) } else { Ok(matches) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = "models/tiny-llama-kjv";

    fn examples() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")
    }

    fn resolve(text: &str, flags: Overrides) -> Result<Settings> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.yaml");
        std::fs::write(&path, text).unwrap();
        Settings::resolve(Some(&path), flags)
    }

    fn model() -> Overrides {
        Overrides { model: Some(examples().join(MODEL)), ..Overrides::default() }
    }

    #[test]
    fn levanter_defaults() {
        let settings = resolve("prompts: Hello", model()).unwrap();
        assert_eq!(settings.prompts, ["Hello"]);
        assert_eq!(settings.stop_sequence.as_deref(), Some("."));
        assert_eq!((settings.max_new_tokens, settings.temperature), (192, 0.7));
        let engine = &settings.engine;
        assert_eq!(
            (engine.page_size, engine.max_seqs, engine.max_seqs_in_prefill, engine.max_rounds),
            (128, 256, 16, 32)
        );
        assert_eq!((engine.seed, engine.compute_dtype, engine.max_pages), (0, Element::Bf16, None));

        let flags = Settings::resolve(None, Overrides { prompts: vec!["Hello".into()], ..model() }).unwrap();
        assert_eq!(flags, Settings { stop_sequence: None, ..settings });
    }

    #[test]
    fn the_demo_config() {
        let settings = Settings::resolve(Some(&examples().join("configs/demo.yaml")), Overrides::default()).unwrap();
        assert_eq!((settings.prompts.len(), settings.temperature), (8, 0.0));
        let again: Value = serde_yaml_ng::from_str(&settings.to_string()).unwrap();
        assert_eq!(again["engine"]["page_size"].as_u64(), Some(settings.engine.page_size as u64));
    }

    #[test]
    fn flags_win() {
        let text = "prompts: [a, b]\nstop_sequence: null\ntemperature: 1\ntop_k: 5\nengine: {seed: 3, max_pages: 7}\n";
        let file = resolve(text, model()).unwrap();
        assert_eq!((file.prompts.len(), file.stop_sequence, file.top_k), (2, None, Some(5)));
        assert_eq!((file.temperature, file.engine.seed, file.engine.max_pages), (1.0, 3, Some(7)));
        let flags = Overrides {
            prompts: vec!["c".into()],
            temperature: Some(0.0),
            top_k: Some(0),
            seed: Some(4),
            compute_dtype: parse_dtype("f32"),
            ..model()
        };
        let both = resolve(text, flags).unwrap();
        assert_eq!((both.prompts, both.temperature, both.top_k), (vec!["c".to_owned()], 0.0, None));
        let engine = both.engine;
        assert_eq!((engine.seed, engine.max_pages, engine.compute_dtype), (4, Some(7), Element::F32));
    }

    #[test]
    fn bad_input_is_named() {
        let cases = [
            (
                "prompts: a\nengine:\n  max_page: 3",
                "line 3: engine.max_page is no known key: did you mean engine.max_pages?",
            ),
            ("prompts: a\ntemprature: 3", "line 2: temprature is no known key: did you mean temperature?"),
            ("prompts: a\nseed: 3", "line 2: seed is no known key: did you mean engine.seed?"),
            ("a: {b: 1}", "line 1: a is no known key"),
            ("1: 2", "1 is a key that is no text: quote it"),
            ("engine: 3", "line 1: engine = 3 is no section of keys"),
            (
                "prompts:\n- a\n- 1984",
                "line 1: prompts holds 1984 at place 1, which YAML reads as no text: put it in quotes",
            ),
            (
                "prompts: yes it is\nstop_sequence: 1.0",
                "line 2: stop_sequence = 1.0 is not text or null: put it in quotes",
            ),
            ("prompts: a\nmax_new_tokens: -1", "line 2: max_new_tokens = -1 is not a whole number"),
            (
                "prompts: a\nengine: {compute_dtype: int8}",
                "line 2: engine.compute_dtype = int8 is not float32 or bfloat16",
            ),
            ("prompts: a\nprompts: b", "duplicate entry with key \"prompts\""),
            ("- a", "it holds no keys"),
            ("", "it holds no keys"),
            ("prompts: [a", "repair the YAML"),
            ("prompts: []", "prompts = [] holds no prompt: give at least one"),
            ("temperature: 0", "prompts = [] holds no prompt: give at least one"),
            ("prompts: a\nstop_sequence: ''", "stop_sequence = \"\" is empty: use null to turn it off"),
            ("prompts: a\ntemperature: .nan", "temperature = NaN is no finite number of at least 0"),
            ("prompts: a\ntemperature: -0.5", "temperature = -0.5 is no finite number"),
            ("prompts: a\ntop_p: 0", "top_p = 0 is not above 0 and at most 1"),
            ("prompts: a\nmax_new_tokens: 0", "max_new_tokens = 0 is below 1: use 1 or more"),
            ("prompts: a\nengine: {page_size: 0}", "engine.page_size = 0 is below 1"),
            ("prompts: a\nengine: {max_pages: 3000000000}", "engine.max_pages = 3000000000 exceeds 2147483647"),
            ("prompts: a\ntokenizer: nowhere", "nowhere does not exist: give tokenizer.json"),
        ];
        for (text, message) in cases {
            let error = resolve(text, model()).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{text}");
            assert!(error.to_string().contains(message), "{text}\n{error}");
        }
        let error = resolve("prompts: a\nhf_checkpoint: gs://x/y", Overrides::default()).unwrap_err().to_string();
        assert!(error.contains("gs://x/y is no folder: download"), "{error}");
        let error = resolve("prompts: a", Overrides::default()).unwrap_err().to_string();
        assert!(error.contains("hf_checkpoint = null names no model"), "{error}");
        let error = Settings::resolve(Some(Path::new("nowhere.yaml")), Overrides::default()).unwrap_err();
        assert_eq!((error.exit_code(), error.to_string().contains("cannot read nowhere.yaml")), (2, true));
    }

    #[test]
    fn limits_follow_the_requests() {
        let text = "prompts: [a, b, c]\nmax_new_tokens: 10\nengine: {page_size: 8}";
        let settings = resolve(text, model()).unwrap();
        let limits = settings.limits(&[3, 9, 5], 4608).unwrap();
        assert_eq!((limits.max_seq_len, limits.max_seqs, limits.max_pages), (19, 3, 9));
        assert_eq!((limits.max_seqs_in_prefill, limits.max_prefill_size, limits.pages_per_seq()), (3, 17, 3));

        let text = "prompts: [a, b, c]\nmax_new_tokens: 10\nengine: {page_size: 8, max_seq_len: 32, max_pages: 2}";
        let settings = resolve(text, model()).unwrap();
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
