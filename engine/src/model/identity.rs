//! Which model a run uses: what its files hold, not where they are.

use std::path::Path;

use super::read_json;
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::output::fingerprint;

/// Identifies a model by all that decides its texts: configuration, tokenizer, chat template if `chat`, and weights.
///
/// Another `rope_theta` in `config.json`, another end-of-text token in `generation_config.json`, another tokenizer, another
/// weight (see [`Weights::identity`]) is another model. Another layout of `config.json` is not.
///
/// # Errors
/// When a file cannot be read.
pub fn identity(folder: &Path, tokenizer: &Path, weights: &Weights, chat: bool) -> Result<String> {
    let json = |name: &str| {
        let path = folder.join(name);
        path.exists()
            .then(|| read_json(&path))
            .transpose()
            .map(|value| value.unwrap_or_default().to_string().into_bytes())
    };
    let bytes = |path: &Path| match path.exists() {
        true => std::fs::read(path).map_err(Error::io("read", path)),
        false => Ok(Vec::new()),
    };
    let tokenizer = if tokenizer.is_dir() { tokenizer.join("tokenizer.json") } else { tokenizer.to_owned() };
    let mut parts = vec![json("config.json")?, json("generation_config.json")?, bytes(&tokenizer)?];
    if chat {
        parts.extend([json("tokenizer_config.json")?, bytes(&folder.join("chat_template.jinja"))?]);
    }
    parts.push(weights.identity().into_bytes());
    Ok(fingerprint(parts.iter().map(Vec::as_slice)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// What is changed in a copy of the tiny model, and whether it is another model then.
    #[test]
    fn a_model_is_what_its_files_hold() {
        type Change = fn(&Path);
        fn edit(path: &Path, from: &str, to: &str) {
            let text = fs::read_to_string(path).unwrap();
            assert!(text.contains(from), "{from}");
            fs::write(path, text.replacen(from, to, 1)).unwrap();
        }
        let changes: [(&str, bool, bool, Change); 8] = [
            ("nothing", false, false, |_| ()),
            ("layout", false, false, |m| edit(&m.join("config.json"), "{\n", "{\n\n")),
            ("rope_theta", true, false, |m| edit(&m.join("config.json"), "\"rope_theta\": ", "\"rope_theta\": 1")),
            ("eos", true, false, |m| fs::write(m.join("generation_config.json"), "{\"eos_token_id\": 7}").unwrap()),
            ("tokenizer", true, false, |m| edit(&m.join("tokenizer.json"), "\"vocab\"", "\"vocab\" ")),
            ("template", false, false, |m| fs::write(m.join("chat_template.jinja"), "a").unwrap()),
            ("template in use", true, true, |m| fs::write(m.join("chat_template.jinja"), "a").unwrap()),
            ("a weight", true, false, |m| {
                let path = m.join("model.safetensors");
                let mut bytes = fs::read(&path).unwrap();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                fs::write(&path, bytes).unwrap();
            }),
        ];
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-llama-kjv");
        for (what, differs, chat, change) in changes {
            let copy = tempfile::tempdir().unwrap();
            for entry in fs::read_dir(&tiny).unwrap() {
                let entry = entry.unwrap();
                fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
            }
            let of = |folder: &Path| identity(folder, folder, &Weights::open(folder).unwrap(), chat).unwrap();
            let before = of(copy.path());
            change(copy.path());
            assert_eq!(of(copy.path()) != before, differs, "{what}");
        }
    }
}
