//! Where a model is: a folder, a Hugging Face id, or a URL, as a config or a flag gives it.
//!
//! What exists as a file or folder is that. An id is looked up in the local Hugging Face cache (`HF_HUB_CACHE`, `HF_HOME`), then
//! downloaded into it (`HF_ENDPOINT`, `HF_TOKEN`), unless `HF_HUB_OFFLINE` is set. A URL is refused with the command that copies
//! what is there.

use std::convert::Infallible;
use std::env;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use super::weights::shard_names;
use crate::error::{Error, Result};

/// What is wanted of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    /// What the model is: `config.json`, and `generation_config.json` if there is one.
    Config,
    /// The tokenizer, and its chat template if there is one.
    Tokenizer,
    /// All of it, with the weights.
    Model,
}

impl Files {
    /// Whether this file of a repository is wanted.
    fn wants(self, name: &str) -> bool {
        let config = ["config.json", "generation_config.json"].contains(&name);
        let tokenizer = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"].contains(&name);
        // Not `original/consolidated.safetensors` and the like.
        let weights = name == "model.safetensors.index.json" || (name.ends_with(".safetensors") && !name.contains('/'));
        match self {
            Self::Config => config,
            Self::Tokenizer => tokenizer,
            Self::Model => config || tokenizer || weights,
        }
    }

    /// Whether a folder has all that cannot be done without.
    fn are_in(self, folder: &Path) -> bool {
        let has = |name: &str| folder.join(name).exists();
        match self {
            Self::Config => has("config.json"),
            Self::Tokenizer => has("tokenizer.json"),
            Self::Model => {
                has("config.json") && shard_names(folder).is_ok_and(|names| names.iter().all(|name| has(name)))
            }
        }
    }
}

/// A model, or a tokenizer, as it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    text: String,
    /// What a path in `text` is relative to.
    folder: PathBuf,
}

impl FromStr for Source {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self { text: text.to_owned(), folder: PathBuf::new() })
    }
}

impl<'de> serde::Deserialize<'de> for Source {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self { text, folder: PathBuf::new() })
    }
}

impl fmt::Display for Source {
    /// The path; an id or a URL as it was given.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path();
        match self.url().is_some() || (self.id().is_some() && !path.exists()) {
            true => f.write_str(&self.text),
            false => path.display().fmt(f),
        }
    }
}

impl Source {
    /// Reads a path relative to `folder`.
    pub fn relative_to(&mut self, folder: &Path) {
        folder.clone_into(&mut self.folder);
    }

    fn path(&self) -> PathBuf {
        self.folder.join(&self.text)
    }

    /// The scheme and the text, if this is a URL.
    fn url(&self) -> Option<(&str, &str)> {
        let (scheme, _) = self.text.split_once("://")?;
        let letters = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric());
        (!scheme.is_empty() && letters(scheme)).then_some((scheme, self.text.as_str()))
    }

    /// Owner, name and revision, if this can be a Hugging Face id: `meta-llama/Llama-3.1-8B`, `OWNER/NAME@REVISION`.
    fn id(&self) -> Option<(&str, &str)> {
        let (id, revision) = self.text.split_once('@').unwrap_or((&self.text, "main"));
        let (owner, name) = id.split_once('/')?;
        let word = |text: &str| {
            let mut letters = text.chars();
            letters.next().is_some_and(|first| first.is_ascii_alphanumeric())
                && letters.all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        (word(owner) && word(name) && !revision.is_empty()).then_some((id, revision))
    }

    /// The folder (of a tokenizer, also its file) with the files that are wanted. `key` is named in errors.
    ///
    /// # Errors
    /// When there is none.
    pub fn locate(&self, key: &str, files: Files) -> Result<PathBuf> {
        if let Some((scheme, url)) = self.url() {
            let copy = match scheme {
                "gs" => format!("gcloud storage cp -r {url} FOLDER"),
                "s3" => format!("aws s3 cp --recursive {url} FOLDER"),
                _ => "a tool that reads it".to_owned(),
            };
            let fix = format!("copy it with `{copy}`, and give the folder with --model");
            return Err(Error::setting(key, url, "is not on this machine", fix));
        }
        let path = self.path();
        if path.is_dir() || (files == Files::Tokenizer && path.exists()) {
            return Ok(path);
        }
        if let Some((id, revision)) = self.id() {
            let flag = if revision == "main" { String::new() } else { format!(" --revision {revision}") };
            let by_hand = format!("`hf download {id}{flag}` where there is a network, or give a folder with --model");
            let cache = cache().ok_or_else(|| {
                let limit = "is no folder here, and there is no home folder for the Hugging Face cache";
                Error::setting(key, &self.text, limit, "set HF_HOME, or give a folder with --model")
            })?;
            let repo = Repo::with_revision(id.into(), RepoType::Model, revision.into());
            if let Some(folder) = cached(&cache, &repo, files) {
                return Ok(folder);
            }
            let refuse = |limit: String| Error::setting(key, &self.text, limit, format!("run {by_hand}"));
            if env::var("HF_HUB_OFFLINE").is_ok_and(|set| !["", "0"].contains(&set.as_str())) {
                let place = cache.path().display();
                return Err(refuse(format!("is no folder here and not in {place}, and HF_HUB_OFFLINE is set")));
            }
            log::info!("downloading {id} into {}", cache.path().display());
            let download = download(&cache, &repo, files);
            download.map_err(|error| refuse(format!("is no folder here, and cannot be downloaded ({error})")))?;
            return cached(&cache, &repo, files)
                .ok_or_else(|| refuse("has no file of the kind that is read here".into()));
        }
        let (limit, fix) = match key {
            "tokenizer" => {
                ("does not exist", "give tokenizer.json or its folder, or leave the key out to use the model's")
            }
            _ => ("is not a folder", "give the folder of a checkpoint (in a config file relative to that file)"),
        };
        Err(Error::setting(key, path.display(), limit, fix))
    }
}

/// The local Hugging Face cache, where other tools keep it too.
fn cache() -> Option<Cache> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || env::home_dir().map(|home| home.join(".cache").join("huggingface"));
    set("HF_HUB_CACHE").or_else(|| set("HF_HOME").or_else(home).map(|home| home.join("hub"))).map(Cache::new)
}

/// The folder of a repository in the cache, if it has the files that are wanted.
fn cached(cache: &Cache, repo: &Repo, files: Files) -> Option<PathBuf> {
    let cached = cache.repo(repo.clone());
    // A branch or tag has a file that names its commit; a commit is its own name.
    let reference = cache.path().join(repo.folder_name()).join("refs").join(repo.revision());
    let commit = std::fs::read_to_string(reference).unwrap_or_else(|_| repo.revision().to_owned());
    Some(cached.pointer_path(commit.trim())).filter(|folder| files.are_in(folder))
}

/// Downloads the files of a repository into the cache: those that are not there yet.
fn download(cache: &Cache, repo: &Repo, files: Files) -> Result<(), ApiError> {
    let token = env::var("HF_TOKEN").ok().filter(|token| !token.is_empty()).or_else(|| cache.token());
    let mut api = ApiBuilder::from_cache(cache.clone()).with_token(token).with_retries(3);
    if let Ok(endpoint) = env::var("HF_ENDPOINT") {
        api = api.with_endpoint(endpoint);
    }
    let repo = api.build()?.repo(repo.clone());
    let names = repo.info()?.siblings.into_iter().map(|file| file.rfilename);
    names.filter(|name| files.wants(name)).try_for_each(|name| repo.get(&name).map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_apart() {
        let source = |text: &str| -> Source { text.parse().unwrap() };
        for (text, id) in [
            ("meta-llama/Llama-3.1-8B", Some(("meta-llama/Llama-3.1-8B", "main"))),
            ("a/b@refs/pr/1", Some(("a/b", "refs/pr/1"))),
            ("../models/tiny", None),
            ("/models/tiny", None),
            ("models", None),
            ("a/b/c", None),
            ("gs://bucket/model", None),
        ] {
            assert_eq!(source(text).id(), id, "{text}");
        }
        for (text, message) in [
            (
                "gs://bucket/model",
                "gs://bucket/model is not on this machine: copy it with `gcloud storage cp -r gs://bucket/model",
            ),
            ("s3://bucket/model", "aws s3 cp --recursive s3://bucket/model FOLDER"),
            ("/nowhere", "hf_checkpoint = /nowhere is not a folder: give the folder of a checkpoint"),
        ] {
            let error = source(text).locate("hf_checkpoint", Files::Model).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(message), "{error}");
        }
    }

    /// The cache as other tools leave it: a branch that names a commit, and the commit's files.
    #[test]
    fn the_cache_is_looked_up() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().to_owned());
        let of = |revision: &str, files| {
            cached(&cache, &Repo::with_revision("meta-llama/Tiny".into(), RepoType::Model, revision.into()), files)
        };
        let repo = folder.path().join("models--meta-llama--Tiny");
        let snapshot = repo.join("snapshots/abc");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::write(repo.join("refs/main"), "abc").unwrap();
        assert_eq!(of("main", Files::Config), None);
        let write = |name: &str, text: &str| std::fs::write(snapshot.join(name), text).unwrap();
        write("config.json", "{}");
        for revision in ["main", "abc"] {
            assert_eq!(of(revision, Files::Config), Some(snapshot.clone()), "{revision}");
            assert_eq!(of(revision, Files::Model), None, "{revision}");
        }
        write(
            "model.safetensors.index.json",
            r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#,
        );
        write("model-1.safetensors", "");
        assert_eq!(of("main", Files::Model), None, "a shard is missing");
        write("model-2.safetensors", "");
        assert_eq!(of("main", Files::Model), Some(snapshot.clone()));
        assert_eq!(of("main", Files::Tokenizer), None);
        write("tokenizer.json", "{}");
        assert_eq!(of("main", Files::Tokenizer), Some(snapshot.clone()));
        assert_eq!(of("v2", Files::Config), None);
        let wanted =
            ["config.json", "model-1.safetensors", "original/consolidated.00.safetensors", "pytorch_model.bin"];
        assert_eq!(wanted.map(|name| Files::Model.wants(name)), [true, true, false, false]);
    }
}
