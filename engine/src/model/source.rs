//! Where a model is: a folder, a Hugging Face id, or a URL, as a config or a flag gives it.
//!
//! What exists as a file or folder is that. A URL is refused with the command that downloads it.

use std::convert::Infallible;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

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
            let limit = "is neither a folder here nor in the local Hugging Face cache";
            let revision = if revision == "main" { String::new() } else { format!(" --revision {revision}") };
            let fix = format!("download it with `hf download {id}{revision}`, or give a folder with --model");
            return Err(Error::setting(key, &self.text, limit, fix));
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
}
