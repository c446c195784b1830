//! `pagoda serve` as clients meet it: the tiny model behind OpenAI's endpoints, over loopback.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/tiny-llama-kjv")
}

/// The server's process; it ends with the value.
struct Server {
    child: Child,
    address: String,
    agent: ureq::Agent,
}

impl Server {
    fn start(args: &[&str], key: Option<&str>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pagoda"));
        command.args(["serve", "--port", "0", "--model"]).arg(model()).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).env("HF_HUB_OFFLINE", "1");
        if let Some(key) = key {
            command.env("PAGODA_API_KEY", key);
        }
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = Vec::new();
        let address = loop {
            let line = lines.next().unwrap_or_else(|| panic!("the server ended: {said:?}")).unwrap();
            if let Some((_, address)) = line.split_once(" at http://") {
                break address.to_owned();
            }
            said.push(line);
        };
        // Nobody reads what it says later, but somebody must take it.
        std::thread::spawn(move || lines.for_each(drop));
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        Self { child, address, agent }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let mut response = self.agent.post(self.url(path)).send_json(body).unwrap();
        (response.status().as_u16(), response.body_mut().read_json().unwrap())
    }

    fn complete(&self, body: &Value) -> Value {
        let (status, answer) = self.post("/v1/completions", body);
        assert_eq!(status, 200, "{body}: {answer}");
        answer
    }

    /// The events of a stream, without the last one, which says that it is done.
    fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut response = self.agent.post(self.url(path)).send_json(body).unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        let mut events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{text}");
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    fn metric(&self, name: &str) -> f64 {
        let text = self.agent.get(self.url("/metrics")).call().unwrap().body_mut().read_to_string().unwrap();
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).split(' ').nth(1).unwrap().parse().unwrap()
    }

    /// Waits until `name` is `value`.
    fn await_metric(&self, name: &str, value: f64) {
        let started = Instant::now();
        while self.metric(name) != value {
            assert!(started.elapsed() < Duration::from_secs(60), "{name} stays at {}", self.metric(name));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The texts that `pagoda sample` yields for one prompt.
fn sampled(prompt: &str, args: &[&str]) -> Vec<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagoda"));
    command.args(["sample", "--json", "--prompt", prompt, "--model"]).arg(model()).args(args);
    let output = command.env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    let text = |line: &str| serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().to_owned();
    lines.lines().map(text).collect()
}

fn texts(answer: &Value) -> Vec<String> {
    let choices = answer["choices"].as_array().unwrap();
    choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
}

const SMALL: [&str; 6] = ["--max-seqs", "4", "--max-queue", "4", "--max-rounds", "4"];

#[test]
fn answers_are_what_sample_yields() {
    let server = Server::start(&SMALL, None);
    let prompt = "And the LORD said";
    let greedy = sampled(prompt, &["--temperature", "0", "--max-new-tokens", "24"]);
    let ask = json!({"prompt": prompt, "temperature": 0, "max_tokens": 24});
    let answer = server.complete(&ask);
    assert_eq!(texts(&answer), greedy);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 24);
    assert_eq!(answer["object"], "text_completion");

    // Seeds, filters and generations; beside others that are sampled otherwise.
    let flags = ["--temperature", "0.8", "--top-p", "0.9", "--top-k", "50", "--seed", "11", "--n-generations", "3"];
    let random = sampled(prompt, &[&flags[..], &["--max-new-tokens", "24"]].concat());
    let drawn = json!({"prompt": prompt, "temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 11, "n": 3,
        "max_tokens": 24});
    std::thread::scope(|scope| {
        let others = scope.spawn(|| (0..4).map(|_| server.complete(&ask)).collect::<Vec<_>>());
        for _ in 0..3 {
            assert_eq!(texts(&server.complete(&drawn)), random);
        }
        for other in others.join().unwrap() {
            assert_eq!(texts(&other), greedy);
        }
    });

    // A stream is the same text in pieces, of every choice; usage comes last where it is asked for.
    let mut streamed = drawn.clone();
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({"include_usage": true});
    let events = server.stream("/v1/completions", &streamed);
    let (usage, pieces) = events.split_last().unwrap();
    assert_eq!(usage["usage"]["completion_tokens"], 72);
    assert!(pieces.len() > 6, "{} pieces", pieces.len());
    let mut joined = vec![String::new(); 3];
    for piece in pieces {
        let choice = &piece["choices"][0];
        joined[choice["index"].as_u64().unwrap() as usize].push_str(choice["text"].as_str().unwrap());
    }
    assert_eq!(joined, random);

    // A stop sequence ends the text before it, wherever tokens begin and end; it is the text of one that was not stopped.
    let middle: String = greedy[0].chars().skip(20).take(5).collect();
    let before = greedy[0].split(&middle).next().unwrap();
    let mut stopped = ask.clone();
    stopped["stop"] = json!([middle, "no such text"]);
    let answer = server.complete(&stopped);
    assert_eq!((texts(&answer)[0].as_str(), &answer["choices"][0]["finish_reason"]), (before, &json!("stop")));

    // Probabilities of the tokens that were chosen: of greedy ones no less than that of any other, so none is below 1 / vocab.
    let mut likely = ask.clone();
    likely["logprobs"] = 0.into();
    let answer = server.complete(&likely);
    let likely = &answer["choices"][0]["logprobs"];
    let joined: String = likely["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    assert_eq!(joined, greedy[0]);
    let logarithms: Vec<f64> =
        likely["token_logprobs"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect();
    assert!(logarithms.len() == 24 && logarithms.iter().all(|&value| (-(2048f64.ln())..=1e-6).contains(&value)));

    // Prompts as tokens, several at once.
    let several = server.complete(&json!({"prompt": [prompt, prompt], "temperature": 0, "max_tokens": 24}));
    assert_eq!(texts(&several), [greedy.clone(), greedy].concat());
    server.await_metric("pagoda_pages_used", 0.0);
}

#[test]
fn who_goes_away_frees_its_place_and_a_full_queue_says_so() {
    let server = Server::start(&["--max-seqs", "1", "--max-queue", "1", "--max-rounds", "1"], None);
    let body = json!({"prompt": "In the beginning", "max_tokens": 250, "temperature": 0, "stream": true}).to_string();
    // Streams of which only the beginning is read.
    let open = || {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        write!(stream, "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len())
            .unwrap();
        let mut begun = [0; 12];
        stream.read_exact(&mut begun).unwrap();
        assert_eq!(&begun, b"HTTP/1.1 200");
        stream
    };
    let streams = [open(), open()];
    let mut refused = server.agent.post(server.url("/v1/completions")).send_json(json!({"prompt": "a"})).unwrap();
    let error: Value = refused.body_mut().read_json().unwrap();
    assert_eq!((refused.status().as_u16(), refused.headers()["retry-after"].to_str().unwrap()), (429, "1"), "{error}");
    assert!(error["error"]["message"].as_str().unwrap().starts_with("the queue is full: 2 sequences run and wait"));
    drop(streams);
    server.await_metric("pagoda_sequences_cancelled_total", 2.0);
    server.await_metric("pagoda_pages_used", 0.0);
    server.complete(&json!({"prompt": "a", "max_tokens": 1}));
}

#[test]
fn bad_requests_get_one_clear_error() {
    let server = Server::start(&[&SMALL[..], &["--max-body", "2000"]].concat(), Some("secret"));
    let open = server.agent.get(server.url("/healthz")).call().unwrap().status().as_u16();
    let (locked, error) = server.post("/v1/completions", &json!({"prompt": "a"}));
    assert_eq!((open, locked), (200, 401));
    assert!(error["error"]["message"].as_str().unwrap().starts_with("the API key is missing or wrong"));
    let post = |path: &str, body: &str| {
        let request = server.agent.post(server.url(path)).header("authorization", "Bearer secret");
        let mut response = request.send(body).unwrap();
        let error: Value = response.body_mut().read_json().unwrap();
        (response.status().as_u16(), error["error"]["message"].as_str().unwrap_or_default().to_owned())
    };
    let long = json!({"prompt": "a".repeat(3000)}).to_string();
    let cases = [
        ("/v1/completions", "", 400, "the body is not a request: EOF while parsing a value"),
        ("/v1/completions", r#"{"prompt":"a","logprobs":2}"#, 400, "logprobs is only supported as 0"),
        (
            "/v1/completions",
            r#"{"prompt":"a","max_tokens":5000}"#,
            400,
            "max_new_tokens = 5000 and the 2 tokens of the prompt",
        ),
        ("/v1/completions", r#"{"prompt":[1,99999]}"#, 400, "prompt = 99999 is beyond the vocabulary"),
        ("/v1/completions", r#"{"prompt":"a","model":"gpt-4"}"#, 400, "the model \"gpt-4\" is not served"),
        ("/v1/completions", r#"{"prompt":"a","n":9}"#, 400, "n and the prompts ask for 9 sequences at once"),
        ("/v1/completions", &long, 413, "the body is longer than 2000 bytes"),
        (
            "/v1/chat/completions",
            r#"{"messages":[{"role":"user","content":"a"}]}"#,
            400,
            "messages = [...] need a chat template",
        ),
        ("/v1/embeddings", "{}", 404, "there is no such endpoint"),
    ];
    for (path, body, status, message) in cases {
        let (found, said) = post(path, body);
        assert!(found == status && said.starts_with(message), "{path} {body}: {found} {said}");
    }
    let models = server.agent.get(server.url("/v1/models")).header("authorization", "Bearer secret").call().unwrap();
    let models: Value = models.into_body().read_json().unwrap();
    assert_eq!(models["data"][0]["id"], "tiny-llama-kjv");
}
