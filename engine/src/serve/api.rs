//! The bodies of OpenAI's completions and chat completions: what is asked for, checked, and what is answered.
//!
//! A key that is not known, or that would change the text and is not supported, is an error that names it: an answer never
//! silently leaves out what was asked for.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::generate::SamplingOptions;
use crate::model::tokenizer::Message;
use crate::stop::FinishReason;

/// Why a request is refused: the message, and the key that it is about.
#[derive(Debug, PartialEq)]
pub(super) struct Refused {
    pub(super) message: String,
    pub(super) param: Option<&'static str>,
}

impl Refused {
    pub(super) fn new(param: &'static str, message: impl Into<String>) -> Self {
        Self { message: message.into(), param: Some(param) }
    }
}

/// One, or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// What a prompt may be.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a string, a list of strings, a list of tokens, or a list of lists of tokens")]
enum PromptBody {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

/// What both endpoints take.
#[derive(Debug, Deserialize)]
struct Common {
    model: Option<String>,
    max_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    /// Not OpenAI's; 0 or -1 for all.
    top_k: Option<i64>,
    n: Option<usize>,
    seed: Option<i64>,
    stop: Option<OneOrMany<String>>,
    #[serde(default)]
    stream: bool,
    stream_options: Option<StreamOptions>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<serde_json::Map<String, Value>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
    /// Whether chunks are padded against traffic analysis; they are not.
    #[serde(default, rename = "include_obfuscation")]
    _include_obfuscation: bool,
}

#[derive(Debug, Deserialize)]
struct CompletionBody {
    prompt: PromptBody,
    best_of: Option<usize>,
    #[serde(default)]
    echo: bool,
    suffix: Option<String>,
    logprobs: Option<u32>,
    #[serde(flatten)]
    common: Common,
}

#[derive(Debug, Deserialize)]
struct ChatBody {
    messages: Vec<MessageBody>,
    max_completion_tokens: Option<usize>,
    #[serde(default)]
    logprobs: bool,
    top_logprobs: Option<u32>,
    #[serde(flatten)]
    common: Common,
}

#[derive(Debug, Deserialize)]
struct MessageBody {
    role: String,
    content: Content,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a string, or a list of parts of type text")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    text: String,
}

/// Keys that are known, of both endpoints; the last ones say nothing that changes an answer.
const KNOWN: &[&str] = &[
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
];
const KNOWN_OF_COMPLETIONS: &[&str] = &["prompt", "best_of", "echo", "suffix"];
const KNOWN_OF_CHAT: &[&str] = &["messages", "max_completion_tokens", "top_logprobs"];

/// The endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Completion,
    Chat,
}

/// A prompt that is yet to be turned into tokens.
#[derive(Debug, PartialEq)]
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Chat(Vec<(String, String)>),
}

impl Prompt {
    /// The messages of a chat.
    pub(super) fn messages(chat: &[(String, String)]) -> Vec<Message> {
        chat.iter().map(|(role, content)| Message { role: role.clone(), content: content.clone() }).collect()
    }
}

/// What a request asks for.
#[derive(Debug, PartialEq)]
pub(super) struct Ask {
    pub(super) kind: Kind,
    pub(super) model: Option<String>,
    pub(super) prompts: Vec<Prompt>,
    /// Answers to each prompt.
    pub(super) n: usize,
    pub(super) max_tokens: Option<usize>,
    /// The seed is 0 where none is given.
    pub(super) sampling: SamplingOptions,
    pub(super) seeded: bool,
    pub(super) stops: Vec<String>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    /// Whether answers carry the logarithms of their tokens' probabilities.
    pub(super) log_probabilities: bool,
}

impl Ask {
    /// Reads a body.
    ///
    /// # Errors
    /// Says which key cannot be served, and why.
    pub(super) fn parse(kind: Kind, body: &[u8]) -> Result<Self, Refused> {
        let not_json =
            |error: serde_json::Error| Refused { message: format!("the body is not a request: {error}"), param: None };
        let value: Value = serde_json::from_slice(body).map_err(not_json)?;
        let own = if kind == Kind::Chat { KNOWN_OF_CHAT } else { KNOWN_OF_COMPLETIONS };
        let Value::Object(keys) = &value else {
            return Err(Refused { message: "the body is not a JSON object".into(), param: None });
        };
        if let Some(key) = keys.keys().find(|key| !KNOWN.contains(&key.as_str()) && !own.contains(&key.as_str())) {
            return Err(Refused { message: format!("{key:?} is not supported: leave it out"), param: None });
        }
        let (common, prompts, max_tokens, log_probabilities) = match kind {
            Kind::Completion => {
                let body: CompletionBody = read(value)?;
                refuse_if(body.echo, "echo", "is not supported: put the prompt before the answer yourself")?;
                refuse_if(
                    body.suffix.is_some_and(|suffix| !suffix.is_empty()),
                    "suffix",
                    "is not supported: leave it out",
                )?;
                let n = body.common.n.unwrap_or(1);
                refuse_if(
                    body.best_of.is_some_and(|best| best != n),
                    "best_of",
                    "is only supported where it equals n",
                )?;
                let others = body.logprobs.is_some_and(|others| others > 0);
                refuse_if(others, "logprobs", "is only supported as 0: the tokens that were chosen")?;
                let prompts = match body.prompt {
                    PromptBody::Text(text) => vec![Prompt::Text(text)],
                    PromptBody::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
                    PromptBody::Tokens(tokens) => vec![Prompt::Tokens(tokens)],
                    PromptBody::TokenLists(lists) => lists.into_iter().map(Prompt::Tokens).collect(),
                };
                let max_tokens = body.common.max_tokens.or(Some(16)); // OpenAI's default
                (body.common, prompts, max_tokens, body.logprobs.is_some())
            }
            Kind::Chat => {
                let body: ChatBody = read(value)?;
                let others = body.top_logprobs.is_some_and(|others| others > 0);
                refuse_if(others, "top_logprobs", "is only supported as 0: the tokens that were chosen")?;
                refuse_if(body.messages.is_empty(), "messages", "holds no message: give at least one")?;
                let messages = body.messages.into_iter().map(message).collect::<Result<_, _>>()?;
                let max_tokens = body.max_completion_tokens.or(body.common.max_tokens);
                (body.common, vec![Prompt::Chat(messages)], max_tokens, body.logprobs)
            }
        };
        let n = common.n.unwrap_or(1);
        let (temperature, top_p) = (common.temperature.unwrap_or(1.0), common.top_p.unwrap_or(1.0));
        refuse_if(prompts.is_empty(), "prompt", "holds no prompt: give at least one")?;
        refuse_if(n == 0, "n", "is 0, which asks for nothing: use 1 or more")?;
        refuse_if(max_tokens == Some(0), "max_tokens", "is 0, which asks for no token: use 1 or more")?;
        refuse_if(!(0.0..=2.0).contains(&temperature), "temperature", "is not within 0 and 2: use 0 for greedy")?;
        refuse_if(!(top_p > 0.0 && top_p <= 1.0), "top_p", "is not above 0 and at most 1: use 1 for all tokens")?;
        refuse_if(common.top_k.is_some_and(|k| k < -1), "top_k", "is negative: use 0 for all tokens")?;
        for (key, value) in
            [("presence_penalty", common.presence_penalty), ("frequency_penalty", common.frequency_penalty)]
        {
            refuse_if(value.is_some_and(|value| value != 0.0), key, "is only supported as 0: leave it out")?;
        }
        let biased = common.logit_bias.is_some_and(|bias| !bias.is_empty());
        refuse_if(biased, "logit_bias", "is not supported: leave it out")?;
        let include_usage = common.stream_options.is_some_and(|options| options.include_usage);
        refuse_if(include_usage && !common.stream, "stream_options", "is only allowed with stream: true")?;
        Ok(Self {
            kind,
            model: common.model,
            prompts,
            n,
            max_tokens,
            sampling: SamplingOptions {
                temperature,
                top_k: common.top_k.filter(|&k| k > 0).map(|k| u32::try_from(k).unwrap_or(u32::MAX)),
                top_p: Some(top_p),
                seed: common.seed.unwrap_or(0) as u64,
            },
            seeded: common.seed.is_some(),
            stops: common.stop.map(OneOrMany::into_vec).unwrap_or_default(),
            stream: common.stream,
            include_usage,
            log_probabilities,
        })
    }
}

fn read<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, Refused> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let place = if path == "." { String::new() } else { format!("{path}: ") };
        Refused { message: format!("{place}{}", error.into_inner()), param: None }
    })
}

fn refuse_if(refused: bool, key: &'static str, why: &str) -> Result<(), Refused> {
    if refused { Err(Refused::new(key, format!("{key} {why}"))) } else { Ok(()) }
}

fn message(body: MessageBody) -> Result<(String, String), Refused> {
    let content = match body.content {
        Content::Text(text) => text,
        Content::Parts(parts) => {
            if let Some(part) = parts.iter().find(|part| part.kind != "text") {
                return Err(Refused::new(
                    "messages",
                    format!("a part of type {:?} is not supported: use text", part.kind),
                ));
            }
            parts.into_iter().map(|part| part.text).collect()
        }
    };
    Ok((body.role, content))
}

/// What an answer costs.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    pub(super) total_tokens: usize,
}

impl Usage {
    pub(super) fn new(prompt: usize, completion: usize) -> Self {
        Self { prompt_tokens: prompt, completion_tokens: completion, total_tokens: prompt + completion }
    }
}

/// A token that was chosen.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token {
    /// What it adds to the text; nothing while a character is in parts.
    pub(super) text: String,
    /// Characters of the answer before it.
    pub(super) offset: usize,
    /// Where the request asks for it.
    pub(super) log_probability: Option<f32>,
}

/// Why a choice ended, as OpenAI spells it.
pub(super) fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop | FinishReason::Cancelled => "stop",
        FinishReason::Length => "length",
    }
}

/// One choice, whole.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) text: String,
    /// Where they were asked for.
    pub(super) tokens: Option<Vec<Token>>,
    pub(super) reason: &'static str,
}

/// What all parts of an answer begin with.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) id: String,
    pub(super) kind: Kind,
    pub(super) created: u64,
    pub(super) model: String,
}

impl Head {
    fn object(&self, streams: bool) -> &'static str {
        match (self.kind, streams) {
            (Kind::Completion, _) => "text_completion",
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
        }
    }

    fn body(&self, streams: bool, choices: Vec<Value>) -> Value {
        let Self { id, created, model, .. } = self;
        json!({"id": id, "object": self.object(streams), "created": created, "model": model, "choices": choices})
    }

    /// The probabilities of an answer's tokens, where they were asked for.
    fn probabilities(&self, tokens: Option<&[Token]>) -> Value {
        let Some(tokens) = tokens else { return Value::Null };
        match self.kind {
            Kind::Completion => {
                let of = |value: fn(&Token) -> Value| tokens.iter().map(value).collect::<Vec<_>>();
                json!({
                    "tokens": of(|token| token.text.as_str().into()),
                    "token_logprobs": of(|token| token.log_probability.into()),
                    "text_offset": of(|token| token.offset.into()),
                    "top_logprobs": null,
                })
            }
            Kind::Chat => {
                let content = tokens.iter().map(|Token { text, log_probability, .. }| {
                    json!({"token": text, "logprob": log_probability, "bytes": text.as_bytes(), "top_logprobs": []})
                });
                json!({"content": content.collect::<Vec<_>>(), "refusal": null})
            }
        }
    }

    /// A whole answer.
    pub(super) fn answer(&self, choices: &[Answer], usage: Usage) -> Value {
        let choice = |(index, Answer { text, tokens, reason }): (usize, &Answer)| {
            let probabilities = self.probabilities(tokens.as_deref());
            match self.kind {
                Kind::Completion => {
                    json!({"index": index, "text": text, "logprobs": probabilities, "finish_reason": reason})
                }
                Kind::Chat => {
                    json!({"index": index, "message": {"role": "assistant", "content": text, "refusal": null},
                    "logprobs": probabilities, "finish_reason": reason})
                }
            }
        };
        let mut body = self.body(false, choices.iter().enumerate().map(choice).collect());
        body["usage"] = json!(usage);
        body
    }

    /// A piece of one choice's text; the first of a chat says who speaks.
    pub(super) fn piece(
        &self,
        index: usize,
        first: bool,
        text: &str,
        tokens: Option<&[Token]>,
        reason: Option<&'static str>,
    ) -> Value {
        let probabilities = self.probabilities(tokens);
        let choice = match self.kind {
            Kind::Completion => {
                json!({"index": index, "text": text, "logprobs": probabilities, "finish_reason": reason})
            }
            Kind::Chat => {
                let mut delta = json!({});
                if first {
                    delta["role"] = "assistant".into();
                }
                if !text.is_empty() || first {
                    delta["content"] = text.into();
                }
                json!({"index": index, "delta": delta, "logprobs": probabilities, "finish_reason": reason})
            }
        };
        self.body(true, vec![choice])
    }

    /// The last piece of a stream that was asked for it.
    pub(super) fn usage(&self, usage: Usage) -> Value {
        let mut body = self.body(true, Vec::new());
        body["usage"] = json!(usage);
        body
    }
}

/// An error, as OpenAI's clients read it.
pub(super) fn error(kind: &str, message: &str, param: Option<&str>) -> Value {
    json!({"error": {"message": message, "type": kind, "param": param, "code": null}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_read_or_refused_by_key() {
        let completion = |body: &str| Ask::parse(Kind::Completion, body.as_bytes());
        let ask =
            completion(r#"{"model":"m","prompt":[[1,2],[3]],"n":2,"seed":-1,"stop":"x","temperature":0,"user":"u"}"#)
                .unwrap();
        assert_eq!(ask.prompts, [Prompt::Tokens(vec![1, 2]), Prompt::Tokens(vec![3])]);
        assert_eq!((ask.n, ask.max_tokens, ask.sampling.seed, ask.seeded), (2, Some(16), u64::MAX, true));
        assert_eq!((ask.stops, ask.sampling.temperature), (vec!["x".to_owned()], 0.0));
        let chat = r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}],
            "max_completion_tokens":3,"stream":true,"stream_options":{"include_usage":true}}"#;
        let ask = Ask::parse(Kind::Chat, chat.as_bytes()).unwrap();
        assert_eq!(ask.prompts, [Prompt::Chat(vec![("user".into(), "ab".into())])]);
        assert!(ask.stream && ask.include_usage && !ask.seeded && ask.max_tokens == Some(3));

        let cases = [
            ("{", "the body is not a request: EOF while parsing an object at line 1 column 1", None),
            ("[]", "the body is not a JSON object", None),
            (r#"{"prompt":"a","tool":1}"#, "\"tool\" is not supported: leave it out", None),
            (r#"{"max_tokens":1}"#, "missing field `prompt`", None),
            (r#"{"prompt":"a","n":"2"}"#, "invalid type: string \"2\", expected usize", None),
            (
                r#"{"prompt":{}}"#,
                "prompt: a string, a list of strings, a list of tokens, or a list of lists of tokens",
                None,
            ),
            (r#"{"prompt":[]}"#, "prompt holds no prompt: give at least one", Some("prompt")),
            (r#"{"prompt":"a","n":0}"#, "n is 0, which asks for nothing: use 1 or more", Some("n")),
            (
                r#"{"prompt":"a","max_tokens":0}"#,
                "max_tokens is 0, which asks for no token: use 1 or more",
                Some("max_tokens"),
            ),
            (
                r#"{"prompt":"a","temperature":3}"#,
                "temperature is not within 0 and 2: use 0 for greedy",
                Some("temperature"),
            ),
            (r#"{"prompt":"a","top_p":0}"#, "top_p is not above 0 and at most 1: use 1 for all tokens", Some("top_p")),
            (r#"{"prompt":"a","logit_bias":{"1":2}}"#, "logit_bias is not supported: leave it out", Some("logit_bias")),
            (
                r#"{"prompt":"a","presence_penalty":1}"#,
                "presence_penalty is only supported as 0: leave it out",
                Some("presence_penalty"),
            ),
            (
                r#"{"prompt":"a","logprobs":2}"#,
                "logprobs is only supported as 0: the tokens that were chosen",
                Some("logprobs"),
            ),
            (r#"{"prompt":"a","best_of":2}"#, "best_of is only supported where it equals n", Some("best_of")),
        ];
        for (body, message, param) in cases {
            assert_eq!(completion(body).unwrap_err(), Refused { message: message.into(), param }, "{body}");
        }
        let image = r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#;
        let refused = Ask::parse(Kind::Chat, image.as_bytes()).unwrap_err().message;
        assert_eq!(refused, "a part of type \"image_url\" is not supported: use text");
    }
}
