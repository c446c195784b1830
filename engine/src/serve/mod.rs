//! OpenAI's completions and chat completions over HTTP: a door onto [`Engine`], and nothing else.
//!
//! One thread owns the engine (`worker`); handlers send it jobs and get tokens back. A request joins the running batch at the
//! next host call (of up to `max_rounds` decode steps). An answer depends on its prompt, its seed and its place among the `n` of
//! its prompt only: it is the text that `pagoda sample` yields for that prompt and seed.
//!
//! Limits, each of which answers with an error that says so: the body's bytes (413), the tokens of a sequence (400), sequences
//! that run and wait (429, with Retry-After), the time of a request (504, or the end of a stream).
//!
//! Invariants: every answer is whole, or ends in an error; a client that goes away frees its slots and pages before the next host
//! call; nothing that a client sends ends the server.

mod api;
mod metrics;
mod text;
mod worker;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::sse::{Event as Sent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;

use self::api::{Answer, Ask, Head, Kind, Prompt, Refused, Token, Usage, finish_reason};
use self::metrics::Metrics;
use self::text::Stops;
use self::worker::{Event, Job};
use crate::error::{Error, Result};
use crate::generate::{Draw, Engine, SamplingOptions};
use crate::model::tokenizer::{ChatTemplate, Tokenizer};
use crate::scheduler::Limits;
use crate::units::SampleId;

/// What a server does beside sampling.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens.
    pub address: SocketAddr,
    /// The model's name in answers.
    pub model: String,
    /// Sequences that may wait for a slot; more are refused.
    pub max_queue: usize,
    /// Most bytes of a body.
    pub max_body: usize,
    /// Most time of a request.
    pub timeout: Duration,
    /// What clients must send as a bearer token, if any.
    pub api_key: Option<String>,
}

/// What the handlers share.
struct Shared {
    options: Options,
    limits: Limits,
    tokenizer: Tokenizer,
    /// Of a model that has one.
    template: Option<ChatTemplate>,
    /// The choices of a request come together, so that they run side by side.
    jobs: Sender<Vec<Job>>,
    /// One permit per sequence that may run or wait.
    room: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    started: u64,
    count: AtomicU64,
}

/// Serves until SIGINT or SIGTERM: then no request is taken any more, and those that run are answered. `ready` gets the address
/// (its port was chosen by the system, where 0 was asked for).
///
/// # Errors
/// When the address cannot be listened to.
///
/// # Panics
/// When the thread of the engine does.
pub fn serve(
    engine: Engine,
    limits: Limits,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    options: Options,
    ready: impl FnOnce(SocketAddr),
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Error::runtime("starting the server"))?;
    let metrics = Arc::new(Metrics::new(limits.max_seqs, limits.max_pages));
    let (jobs, taken) = std::sync::mpsc::channel();
    let of_worker = Arc::clone(&metrics);
    let worker = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || worker::work(engine, &taken, &of_worker))
        .map_err(Error::runtime("starting the engine's thread"))?;
    let room = Arc::new(Semaphore::new((limits.max_seqs + options.max_queue).min(Semaphore::MAX_PERMITS)));
    let address = options.address;
    let (started, count) = (now(), AtomicU64::new(0));
    let shared = Arc::new(Shared { options, limits, tokenizer, template, jobs, room, metrics, started, count });
    let outcome = runtime.block_on(async move {
        let listener = TcpListener::bind(address).await.map_err(|source| {
            let fix = "choose another with --host and --port";
            Error::setting("--port", address, format!("cannot be listened to: {source}"), fix)
        })?;
        ready(listener.local_addr().map_err(Error::runtime("asking for the address"))?);
        let served = axum::serve(listener, router(shared)).with_graceful_shutdown(interrupted());
        served.await.map_err(Error::runtime("serving"))
    });
    drop(runtime); // Whatever still holds a sender of jobs ends with it.
    worker.join().expect("the engine's thread catches what it can");
    outcome
}

/// Returns at the first SIGINT or SIGTERM; a second one ends the process.
async fn interrupted() {
    let terminated = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = terminated => {}
    }
    eprintln!("# no request is taken any more; those that run are answered (again to quit at once)");
    tokio::spawn(async {
        if tokio::signal::ctrl_c().await.is_ok() {
            std::process::exit(130);
        }
    });
}

fn router(shared: Arc<Shared>) -> Router {
    let guarded = Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(models))
        .route_layer(from_fn_with_state(Arc::clone(&shared), authorize));
    let open = Router::new().route("/healthz", get(|| async { "ok" })).route("/metrics", get(metrics));
    guarded
        .merge(open)
        .fallback(|| async { refuse(StatusCode::NOT_FOUND, "there is no such endpoint") })
        .method_not_allowed_fallback(|| async {
            refuse(StatusCode::METHOD_NOT_ALLOWED, "this endpoint takes another method")
        })
        .layer(DefaultBodyLimit::max(shared.options.max_body))
        .with_state(shared)
}

/// Lets requests pass that have the key.
async fn authorize(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer "));
    // Digests, so that the time of the comparison says nothing of the key.
    let digest = |key: &str| Sha256::digest(key.as_bytes());
    match &shared.options.api_key {
        Some(key) if given.is_none_or(|given| digest(given) != digest(key)) => {
            refuse(StatusCode::UNAUTHORIZED, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`")
        }
        _ => next.run(request).await,
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], shared.metrics.text()).into_response()
}

async fn models(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let model = json!({"id": shared.options.model, "object": "model", "created": shared.started, "owned_by": "pagoda"});
    Json(json!({"object": "list", "data": [model]}))
}

async fn completions(State(shared): State<Arc<Shared>>, body: Result<Bytes, BytesRejection>) -> Response {
    answer(shared, Kind::Completion, body).await.unwrap_or_else(|refused| refused)
}

async fn chat(State(shared): State<Arc<Shared>>, body: Result<Bytes, BytesRejection>) -> Response {
    answer(shared, Kind::Chat, body).await.unwrap_or_else(|refused| refused)
}

fn refuse(status: StatusCode, message: &str) -> Response {
    let kind = if status.is_server_error() { "server_error" } else { "invalid_request_error" };
    (status, Json(api::error(kind, message, None))).into_response()
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let body = api::error("invalid_request_error", &self.message, self.param);
        (StatusCode::BAD_REQUEST, Json(body)).into_response()
    }
}

/// A piece of one choice's text, or its end.
#[derive(Debug)]
enum Piece {
    Text { text: String, tokens: Vec<Token> },
    Ended { text: String, tokens: Vec<Token>, reason: &'static str, sampled: usize },
    Failed(StatusCode, String),
}

/// Answers a request: whole, or as a stream of events.
async fn answer(shared: Arc<Shared>, kind: Kind, body: Result<Bytes, BytesRejection>) -> Result<Response, Response> {
    let body = body.map_err(|rejection| {
        let most = shared.options.max_body;
        match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                refuse(rejection.status(), &format!("the body is longer than {most} bytes"))
            }
            status => refuse(status, &rejection.body_text()),
        }
    })?;
    let ask = Ask::parse(kind, &body).map_err(Refused::into_response)?;
    let choices = shared.choices(&ask).map_err(Refused::into_response)?;
    let prompt_tokens = choices.iter().step_by(ask.n).map(|(prompt, _)| prompt.len()).sum::<usize>();
    let count = choices.len();
    let all = shared.limits.max_seqs + shared.options.max_queue;
    if count > all {
        let message = format!("n and the prompts ask for {count} sequences at once; the server has room for {all}");
        return Err(Refused::new("n", message).into_response());
    }
    let Ok(permit) = Arc::clone(&shared.room).try_acquire_many_owned(count as u32) else {
        shared.metrics.rejected.inc();
        let message = format!("the queue is full: {all} sequences run and wait; try again later");
        let body = api::error("rate_limit_error", &message, None);
        let again = [(HeaderName::from_static("retry-after"), "1")];
        return Err((StatusCode::TOO_MANY_REQUESTS, again, Json(body)).into_response());
    };
    let head = shared.head(kind);
    // A client that reads slowly holds its own sequences up, not the engine.
    let (pieces, received) = mpsc::channel(64);
    let deadline = Instant::now() + shared.options.timeout;
    let (jobs, tokens): (Vec<_>, Vec<_>) = shared
        .draws(&ask, choices)
        .into_iter()
        .map(|(prompt, draw, max_new_tokens)| {
            let (events, tokens) = mpsc::unbounded_channel();
            (Job { prompt, max_new_tokens, draw, events }, tokens)
        })
        .unzip();
    if shared.jobs.send(jobs).is_err() {
        return Err(refuse(StatusCode::INTERNAL_SERVER_ERROR, "the engine has ended"));
    }
    // Decoding token by token takes a core's time from the model: not where only the end of the text is looked at.
    let grows = ask.stream || ask.log_probabilities || !ask.stops.is_empty();
    for (index, tokens) in tokens.into_iter().enumerate() {
        let (shared, stops, pieces) = (Arc::clone(&shared), Stops::new(ask.stops.clone()), pieces.clone());
        tokio::spawn(async move { shared.follow(index, tokens, (stops, grows), deadline, pieces).await });
    }
    drop(pieces);
    let log_probabilities = ask.log_probabilities;
    let request = Answering { head, count, prompt_tokens, log_probabilities, _permit: permit };
    Ok(match ask.stream {
        true => request.stream(received, ask.include_usage),
        false => request.whole(received).await,
    })
}

/// A prompt's tokens, and how many new ones.
type Choice = (Arc<[u32]>, usize);

impl Shared {
    fn head(&self, kind: Kind) -> Head {
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{:x}-{}", self.started, self.count.fetch_add(1, Ordering::Relaxed));
        Head { id, kind, created: now(), model: self.options.model.clone() }
    }

    /// Every choice that is asked for: the `n` of each prompt side by side.
    fn choices(&self, ask: &Ask) -> Result<Vec<Choice>, Refused> {
        let key = if ask.kind == Kind::Chat { "messages" } else { "prompt" };
        if let Some(model) = ask.model.as_ref().filter(|model| **model != self.options.model) {
            let message = format!("the model {model:?} is not served: this is {:?}", self.options.model);
            return Err(Refused::new("model", message));
        }
        let mut choices = Vec::new();
        for prompt in &ask.prompts {
            let tokens: Arc<[u32]> = self.tokens(prompt).map_err(|error| Refused::new(key, error.to_string()))?.into();
            let room = self.limits.max_seq_len.saturating_sub(tokens.len()).max(1);
            let max_new = ask.max_tokens.unwrap_or(room);
            let fits = self.limits.check("the prompt", tokens.len(), max_new);
            fits.map_err(|error| Refused::new(key, error.to_string()))?;
            choices.extend(std::iter::repeat_n((tokens, max_new), ask.n));
        }
        Ok(choices)
    }

    fn tokens(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        match prompt {
            Prompt::Text(text) => self.tokenizer.encode(text),
            Prompt::Tokens(tokens) => {
                let vocab = self.tokenizer.vocab_size();
                match tokens.iter().find(|&&token| token as usize >= vocab) {
                    Some(token) => {
                        let limit = format!("is beyond the vocabulary of {vocab} tokens");
                        Err(Error::setting("prompt", token, limit, "use the model's own tokenizer"))
                    }
                    None => Ok(tokens.clone()),
                }
            }
            Prompt::Chat(messages) => {
                let none = || {
                    let fix = "use /v1/completions, or serve a model that has one";
                    Error::setting("messages", "[...]", "need a chat template, which the model does not have", fix)
                };
                let template = self.template.as_ref().ok_or_else(none)?;
                self.tokenizer.encode_plain(&template.render(&Prompt::messages(messages), true)?)
            }
        }
    }

    /// The choices with how each is drawn: the same seed yields the same answers.
    fn draws(&self, ask: &Ask, choices: Vec<Choice>) -> Vec<(Arc<[u32]>, Draw, usize)> {
        let seed = if ask.seeded { ask.sampling.seed } else { random_seed() };
        let sampling = SamplingOptions { seed, ..ask.sampling };
        let draw = |(at, (prompt, max_new)): (usize, Choice)| {
            let id = SampleId { round: 0, index: at / ask.n, generation: (at % ask.n) as u32 };
            (prompt, Draw { sampling, key: id.key(), log_probabilities: ask.log_probabilities }, max_new)
        };
        choices.into_iter().enumerate().map(draw).collect()
    }

    /// Turns a job's tokens into pieces of text (one, unless it `grows`), to its end, the deadline, or until nobody wants them.
    /// Then the job's events are dropped, which ends it.
    async fn follow(
        &self,
        index: usize,
        mut events: UnboundedReceiver<Event>,
        (mut stops, grows): (Stops, bool),
        deadline: Instant,
        pieces: mpsc::Sender<(usize, Piece)>,
    ) {
        let mut ids: Vec<u32> = Vec::new();
        let mut stream = self.tokenizer.stream();
        // Text that was decoded; it is looked through for stop sequences before it is shown.
        let (mut decoded, mut characters, mut shown) = (String::new(), 0, 0);
        // Those that no piece has carried.
        let mut tokens: Vec<Token> = Vec::new();
        let broken = |error: Error| Piece::Failed(StatusCode::INTERNAL_SERVER_ERROR, error.to_string());
        let end = loop {
            let event = tokio::select! {
                event = events.recv() => event,
                () = pieces.closed() => return,
                () = tokio::time::sleep_until(deadline) => {
                    let seconds = self.options.timeout.as_secs_f64();
                    break Piece::Failed(StatusCode::GATEWAY_TIMEOUT, format!("it took longer than {seconds} s"));
                }
            };
            let (new, ended) = match event {
                Some(Event::Tokens(new)) => (new, None),
                Some(Event::Ended { reason, sampled }) => (Vec::new(), Some((finish_reason(reason), sampled))),
                Some(Event::Failed(message)) => break Piece::Failed(StatusCode::INTERNAL_SERVER_ERROR, message),
                None => break Piece::Failed(StatusCode::INTERNAL_SERVER_ERROR, "the engine has ended".into()),
            };
            let mut text = String::new();
            let pushed = new.into_iter().try_for_each(|(id, log_probability)| {
                ids.push(id);
                if !grows {
                    return Ok(());
                }
                let added = stream.push(id)?;
                text.push_str(&added);
                let offset = characters;
                characters += added.chars().count();
                tokens.push(Token { text: added, offset, log_probability });
                Ok(())
            });
            if let Err(error) = pushed {
                break broken(error);
            }
            if ended.is_some() {
                // What the stream has held back, because more might have come.
                match self.tokenizer.decode(&ids) {
                    Ok(whole) => text.push_str(whole.strip_prefix(decoded.as_str()).unwrap_or_default()),
                    Err(error) => break broken(error),
                }
            }
            decoded.push_str(&text);
            let (mut text, stopped) = stops.push(&text);
            if stopped {
                let end = shown + text.chars().count();
                tokens.retain(|token| token.offset < end);
                break Piece::Ended { text, tokens, reason: "stop", sampled: ids.len() };
            }
            if let Some((reason, sampled)) = ended {
                text.push_str(&stops.finish());
                break Piece::Ended { text, tokens, reason, sampled };
            }
            shown += text.chars().count();
            if !text.is_empty() {
                let tokens = std::mem::take(&mut tokens);
                if pieces.send((index, Piece::Text { text, tokens })).await.is_err() {
                    return;
                }
            }
        };
        let _ = pieces.send((index, end)).await;
    }
}

/// An answer that is being made, and its room in the queue.
struct Answering {
    head: Head,
    count: usize,
    prompt_tokens: usize,
    log_probabilities: bool,
    _permit: OwnedSemaphorePermit,
}

impl Answering {
    async fn whole(self, mut pieces: mpsc::Receiver<(usize, Piece)>) -> Response {
        let tokens = self.log_probabilities.then(Vec::new);
        let mut choices = vec![Answer { text: String::new(), tokens, reason: "" }; self.count];
        let mut completion = 0;
        while let Some((index, piece)) = pieces.recv().await {
            let choice = &mut choices[index];
            let (text, tokens) = match piece {
                Piece::Text { text, tokens } => (text, tokens),
                Piece::Ended { text, tokens, reason, sampled } => {
                    choice.reason = reason;
                    completion += sampled;
                    (text, tokens)
                }
                Piece::Failed(status, message) => return refuse(status, &message),
            };
            choice.text.push_str(&text);
            if let Some(all) = &mut choice.tokens {
                all.extend(tokens);
            }
        }
        Json(self.head.answer(&choices, Usage::new(self.prompt_tokens, completion))).into_response()
    }

    fn stream(self, pieces: mpsc::Receiver<(usize, Piece)>, include_usage: bool) -> Response {
        let (events, sent) = mpsc::channel::<Result<Sent, Infallible>>(64);
        // It ends when all choices have, or when the client is gone: then nobody takes pieces any more.
        tokio::spawn(async move { self.send(pieces, include_usage, &events).await });
        Sse::new(ReceiverStream::new(sent)).keep_alive(KeepAlive::default()).into_response()
    }

    async fn send(
        self,
        mut pieces: mpsc::Receiver<(usize, Piece)>,
        include_usage: bool,
        events: &mpsc::Sender<Result<Sent, Infallible>>,
    ) -> Option<()> {
        let mut first = vec![true; self.count];
        let (mut completion, mut failed) = (0, false);
        let send = async |data: String| events.send(Ok(Sent::default().data(data))).await.ok();
        loop {
            let (index, piece) = tokio::select! {
                piece = pieces.recv() => match piece {
                    Some(piece) => piece,
                    None => break,
                },
                () = events.closed() => return None,
            };
            let is_first = std::mem::replace(&mut first[index], false);
            let body = match piece {
                Piece::Text { text, tokens } => {
                    let tokens = self.log_probabilities.then_some(tokens.as_slice());
                    self.head.piece(index, is_first, &text, tokens, None)
                }
                Piece::Ended { text, tokens, reason, sampled } => {
                    completion += sampled;
                    let tokens = self.log_probabilities.then_some(tokens.as_slice());
                    self.head.piece(index, is_first, &text, tokens, Some(reason))
                }
                Piece::Failed(_, message) => {
                    failed = true;
                    api::error("server_error", &message, None)
                }
            };
            send(body.to_string()).await?;
        }
        if include_usage && !failed {
            send(self.head.usage(Usage::new(self.prompt_tokens, completion)).to_string()).await?;
        }
        send("[DONE]".into()).await
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The seed of a request that has none.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}
