//! `tokenizer.json` and the chat template: text to tokens and back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Environment, ErrorKind, State, Value};
use tokenizers::tokenizer::DecodeStream;
use tokenizers::{
    DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer as Inner,
};

use super::read_json;
use super::spec::ModelSpec;
use crate::error::{Error, Result};

/// A Hugging Face tokenizer that fits the model.
pub struct Tokenizer {
    path: PathBuf,
    inner: Inner,
    vocab_size: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json` (`path` may be the file or its folder) and checks it against the model's vocabulary.
    ///
    /// Truncation and padding that the file asks for are turned off: a prompt is never shortened silently.
    ///
    /// # Errors
    /// When the file cannot be read, or holds a token beyond the model's embedding table.
    pub fn open(path: &Path, config: &ModelSpec) -> Result<Self> {
        let path = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        let mut inner = Inner::from_bytes(bytes).map_err(|error| {
            Error::file(&path, format!("it is not a tokenizer: {error}"), "download the file again")
        })?;
        inner.with_padding(None);
        inner.with_truncation(None).expect("no truncation is always valid");
        let last = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
        match last {
            Some((token, id)) if id as usize >= config.vocab_size => Err(Error::file(
                path,
                format!("token {token:?} has id {id}, but the model's vocab_size is {}", config.vocab_size),
                "use the tokenizer that the model was trained with",
            )),
            _ => Ok(Self { path, inner, vocab_size: config.vocab_size }),
        }
    }

    /// The model's vocabulary: every token is below.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// A prompt's tokens, with the special tokens (BOS) that the tokenizer's post-processor adds.
    ///
    /// # Errors
    /// When the tokenizer cannot encode the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokens(text, true)
    }

    /// The tokens of a piece of text that begins nothing: a stop sequence, or a prompt from a chat template, which
    /// writes its special tokens itself.
    ///
    /// # Errors
    /// When the tokenizer cannot encode the text.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.tokens(text, false)
    }

    fn tokens(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, special);
        let encoding = encoding.map_err(|error| self.refuse(&format!("cannot encode {text:?}: {error}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, without special tokens.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.inner.decode(tokens, true).map_err(|error| self.refuse(&format!("cannot decode: {error}")))
    }

    /// Text as it grows, for printing while tokens arrive.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, stream: self.inner.decode_stream(true) }
    }

    fn refuse(&self, problem: &str) -> Error {
        Error::file(&self.path, problem, "use the tokenizer that the model was trained with")
    }
}

type InnerStream<'a> =
    DecodeStream<'a, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// The text of one growing sequence of tokens.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    stream: InnerStream<'a>,
}

impl TextStream<'_> {
    /// The text that this token completes: empty while a character is still in parts.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn push(&mut self, token: u32) -> Result<String> {
        let text = self.stream.step(token);
        let text = text.map_err(|error| self.tokenizer.refuse(&format!("cannot decode: {error}")))?;
        Ok(text.unwrap_or_default())
    }
}

/// One message of a chat.
#[derive(Clone, Debug)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

/// The chat template of a model folder.
///
/// The template sees `messages`, `add_generation_prompt` and the special tokens. `strftime_now` is left undefined on
/// purpose: templates then use their built-in date, and a prompt yields the same text tomorrow.
pub struct ChatTemplate {
    path: PathBuf,
    environment: Environment<'static>,
    special_tokens: BTreeMap<&'static str, String>,
}

impl ChatTemplate {
    /// Reads the template from `chat_template.jinja` or from `tokenizer_config.json` (the one named `default`, when
    /// there are several).
    ///
    /// # Errors
    /// When there is none, or it does not parse.
    pub fn open(folder: &Path) -> Result<Self> {
        let (config_path, file) = (folder.join("tokenizer_config.json"), folder.join("chat_template.jinja"));
        let config = if config_path.exists() { read_json(&config_path)? } else { serde_json::Value::Null };
        let (path, source) = if file.exists() {
            let source = std::fs::read_to_string(&file).map_err(Error::io("read", &file))?;
            (file, source)
        } else {
            let source = match &config["chat_template"] {
                serde_json::Value::String(source) => Some(source.clone()),
                serde_json::Value::Array(named) => named
                    .iter()
                    .find(|entry| entry["name"] == "default")
                    .and_then(|entry| Some(entry["template"].as_str()?.to_owned())),
                _ => None,
            };
            let fix = "prompt it without the chat template";
            let source = source.ok_or_else(|| Error::file(&config_path, "the model has no chat template", fix))?;
            (config_path, source)
        };
        let special_tokens = ["bos_token", "eos_token", "pad_token", "unk_token"].into_iter().filter_map(|name| {
            let token = &config[name];
            Some((name, token.as_str().or_else(|| token["content"].as_str())?.to_owned()))
        });
        let special_tokens = special_tokens.collect();

        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("these options never conflict"));
        environment.set_unknown_method_callback(python_method);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned("chat", source)
            .map_err(|error| Error::file(&path, format!("the chat template: {error}"), "repair the template"))?;
        Ok(Self { path, environment, special_tokens })
    }

    /// The prompt of a conversation; `add_generation_prompt` ends it where the assistant is to speak.
    ///
    /// # Errors
    /// When the template refuses the messages or fails.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let template = self.environment.get_template("chat").expect("it was added in `open`");
        let special_tokens = Value::from_pairs(self.special_tokens.iter().map(|(&name, token)| (name, token.as_str())));
        let messages: Value =
            messages.iter().map(|m| Value::from_pairs([("role", m.role.as_str()), ("content", &m.content)])).collect();
        let context = minijinja::context! { messages, add_generation_prompt, ..special_tokens };
        template.render(context).map_err(|error| {
            Error::file(&self.path, format!("the chat template: {error}"), "give messages that the template accepts")
        })
    }
}

/// The methods of Python's `str` and `dict` that chat templates call.
fn python_method(_: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, minijinja::Error> {
    let unknown = || minijinja::Error::from(ErrorKind::UnknownMethod);
    if value.kind() == ValueKind::Map {
        return match method {
            "get" => {
                let (key, default): (Value, Option<Value>) = from_args(args)?;
                let found = value.get_item(&key)?;
                Ok(if found.is_undefined() { default.unwrap_or(Value::from(())) } else { found })
            }
            "keys" => Ok(value.try_iter()?.collect()),
            "values" => value.try_iter()?.map(|key| value.get_item(&key)).collect(),
            "items" => value.try_iter()?.map(|key| Ok(Value::from(vec![key.clone(), value.get_item(&key)?]))).collect(),
            _ => Err(unknown()),
        };
    }
    let text = value.as_str().ok_or_else(unknown)?;
    let affix = |args| from_args::<(&str,)>(args).map(|(affix,)| affix);
    let chars = |args| -> Result<_, minijinja::Error> {
        let (chars,): (Option<&str>,) = from_args(args)?;
        Ok(move |c: char| chars.map_or(c.is_whitespace(), |chars| chars.contains(c)))
    };
    Ok(match method {
        "strip" => text.trim_matches(chars(args)?).into(),
        "lstrip" => text.trim_start_matches(chars(args)?).into(),
        "rstrip" => text.trim_end_matches(chars(args)?).into(),
        "startswith" => text.starts_with(affix(args)?).into(),
        "endswith" => text.ends_with(affix(args)?).into(),
        "upper" => text.to_uppercase().into(),
        "lower" => text.to_lowercase().into(),
        "replace" => {
            let (from, to): (&str, &str) = from_args(args)?;
            text.replace(from, to).into()
        }
        "split" => {
            let (separator, _): (Option<&str>, Kwargs) = from_args(args)?;
            match separator {
                Some(separator) => text.split(separator).map(Value::from).collect(),
                None => text.split_whitespace().map(Value::from).collect(),
            }
        }
        _ => return Err(unknown()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> (PathBuf, ModelSpec) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-llama-kjv");
        let config = ModelSpec::open(&folder).unwrap();
        (folder, config)
    }

    #[test]
    fn golden_prompts_and_texts() {
        let (folder, config) = tiny();
        let tokenizer = Tokenizer::open(&folder, &config).unwrap();
        let golden: serde_json::Value =
            serde_json::from_slice(&std::fs::read(folder.join("golden.json")).unwrap()).unwrap();
        for (prompt, golden) in golden.as_object().unwrap() {
            let ids: Vec<u32> = serde_json::from_value(golden["ids"].clone()).unwrap();
            let tokens = tokenizer.encode(prompt).unwrap();
            assert_eq!(tokens, ids[..ids.len() - 48]);
            assert_eq!(tokenizer.encode_plain(prompt).unwrap(), tokens[1..], "BOS is left out");
            assert_eq!(tokenizer.decode(&ids).unwrap(), golden["text"].as_str().unwrap());
        }
    }

    #[test]
    fn streamed_text_is_the_decoded_text() {
        let (folder, config) = tiny();
        let tokenizer = Tokenizer::open(&folder, &config).unwrap();
        let text = "In the — beginning שלום 🐟, and";
        let tokens = tokenizer.encode(text).unwrap();
        let mut stream = tokenizer.stream();
        let pieces: Vec<_> = tokens.iter().map(|&token| stream.push(token).unwrap()).collect();
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
        assert!(pieces.iter().filter(|piece| piece.is_empty()).count() > 5, "characters of several tokens: {pieces:?}");
    }

    #[test]
    fn mismatch_is_refused() {
        let (folder, mut config) = tiny();
        config.vocab_size = 2000;
        let error = Tokenizer::open(&folder, &config).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("has id 2047, but the model's vocab_size is 2000"), "{error}");
        let error = Tokenizer::open(&folder.join("README.md"), &config).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("README.md: it is not a tokenizer"), "{error}");
    }

    #[test]
    fn chat_templates() {
        let folder = tempfile::tempdir().unwrap();
        let open = || ChatTemplate::open(folder.path());
        let error = open().map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("the model has no chat template"), "{error}");
        let source = "{{ bos_token }}{% for message in messages %}\n    \
            {% if message.role not in ['user', 'assistant'] %}{{ raise_exception('no ' + message['role']) }}{% endif %}\n\
            <{{ message['role'].upper() }}>{{ message.content.strip() | tojson }}{{ message.get('x', '!') }}{% endfor %}\n\
            {% if add_generation_prompt %}<ASSISTANT>{% endif %}";
        let config = serde_json::json!({
            "bos_token": {"content": "<s>"},
            "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": source}],
        });
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let message = |role: &str| Message { role: role.into(), content: " Hello ".into() };
        let template = open().unwrap();
        let text = template.render(&[message("user")], true).unwrap();
        assert_eq!(text, "<s><USER>\"Hello\"!<ASSISTANT>");
        let error = template.render(&[message("system")], true).unwrap_err().to_string();
        assert!(error.contains("no system"), "{error}");
        std::fs::write(folder.path().join("chat_template.jinja"), "{{ messages[0].content.split()[0] }}").unwrap();
        assert_eq!(open().unwrap().render(&[message("user")], false).unwrap(), "Hello");
        std::fs::write(folder.path().join("chat_template.jinja"), "{% for %}").unwrap();
        let error = open().map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("chat_template.jinja: the chat template: syntax error"), "{error}");
    }
}
