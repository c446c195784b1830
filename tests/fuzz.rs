//! Fuzzing of everything that reads foreign bytes: no panic, no hang and no unbounded memory on damaged input.
//!
//! Each target takes real modules (JAX's, and what `pagoda emit` writes), damages them, and reads them. `cargo test` runs
//! a few hundred cases of a fixed seed; `make nightly` a minute of a fresh one for each target; `PAGODA_FUZZ_SECONDS` says
//! for how long. A case is a function of target, seed and number: `PAGODA_FUZZ_SEED=S PAGODA_FUZZ_CASE=N cargo test --test
//! fuzz -- TARGET` runs one again.
//!
//! Cases run in batches in a child process, within limits of time and memory. MLIR's own readers are not hardened and may
//! die of a damaged module, which is why the command line opens files in a child too: a case that kills the worker is a
//! finding unless MLIR alone dies of reading, verifying or printing it.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant, SystemTime};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use melior::ir::Module;
use melior::ir::operation::OperationLike;
use pagoda_engine::child::{self, Ended, Limits};
use pagoda_ir::mosaic::{self, MemorySpace, Semantics, Window, hosted, text, wire};
use pagoda_ir::random::SplitMix64;
use pagoda_ir::tile_machine::Program;
use pagoda_ir::{Context, Element, HostTensor, stablehlo};
use serde::{Deserialize, Serialize};

/// Cases of a target in an ordinary test run.
const CASES: u64 = 400;
/// Cases of one worker: they share a context, which keeps every type and attribute that it has seen.
const BATCH: u64 = 200;
/// What a worker may take of memory: its cases take some hundred MiB together.
const MEMORY: u64 = 2 << 30;
/// What a batch, or one case, may take of time: cases take milliseconds, and the machine may be busy otherwise.
const SLOW: Duration = Duration::from_secs(10);
/// The largest damaged input in bytes.
const LARGEST: usize = 1 << 18;
/// How often MLIR alone reads a case before it is acquitted of it.
const MLIR_TRIES: u32 = 8;
/// Findings after which a target stops.
const MOST_FINDINGS: usize = 10;
const WORKER: &str = "--fuzz-worker";

/// What reads the damaged input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Target {
    /// `wire::find_custom_calls` and `hosted::host`, on StableHLO modules as text and as bytecode.
    Scanner,
    /// `wire::open` on configurations of custom calls, then what `pagoda inspect` does with the kernel.
    Open,
    /// `text::parse` on kernels in readable form, damaged anywhere.
    Text,
    /// `Program::decode` on kernels that MLIR accepts, with other ops, types and numbers.
    Decode,
}

impl Target {
    const ALL: [Self; 4] = [Self::Scanner, Self::Open, Self::Text, Self::Decode];

    fn name(self) -> &'static str {
        match self {
            Self::Scanner => "scanner",
            Self::Open => "open",
            Self::Text => "text",
            Self::Decode => "decode",
        }
    }

    /// Reads the input as users of the library do; whether it was accepted.
    fn read(self, context: &Context, input: &[u8]) -> bool {
        let used = |opened: &wire::Opened| wire::summarize(opened).is_ok() && Program::decode(&opened.module).is_ok();
        match self {
            Self::Scanner => {
                let hosted =
                    |calls: &[_]| hosted::host(input, calls, "host", &|_| vec![("call", String::new())]).is_ok();
                wire::find_custom_calls(input).is_ok_and(|calls| !calls.is_empty() | hosted(&calls))
            }
            Self::Open => wire::open(context, &String::from_utf8_lossy(input)).is_ok_and(|opened| used(&opened)),
            Self::Text | Self::Decode => text::parse(context, &String::from_utf8_lossy(input), "fuzz")
                .is_ok_and(|module| used(&wire::Opened { module, vmem_limit: None })),
        }
    }

    /// Has MLIR alone read, verify and print what the target would give it: ours is only what comes before (of a text), none of
    /// which is unsafe, nor recursive.
    fn read_by_mlir(self, context: &Context, input: &[u8]) {
        match self {
            Self::Scanner => {}
            Self::Text | Self::Decode => drop(text::parse(context, &String::from_utf8_lossy(input), "fuzz")),
            Self::Open => {
                let body = body_of(input).unwrap_or_default();
                let aligned = HostTensor::from_bytes(Element::U8, &[body.len()], &body);
                let source = mlir_sys::MlirStringRef { data: aligned.bytes().as_ptr().cast(), length: body.len() };
                // SAFETY: the source outlives the call, and a null module becomes `None`.
                let read = || unsafe {
                    Module::from_option_raw(mlir_sys::mlirModuleCreateParse(context.melior().to_raw(), source))
                };
                let verified = |module: &Module| module.as_operation().verify();
                let (module, _) = context.diagnosed(|| read().filter(verified));
                let _ = module.map(|module| text::print(&module));
            }
        }
    }

    /// The `case`th damaged input of a seed.
    fn case(self, seeds: &Seeds, seed: u64, case: u64) -> Vec<u8> {
        let mut mixed = SplitMix64::new(seed ^ (case << 8 | self as u64).wrapping_mul(0x2545_f491_4f6c_dd1d));
        let mut draw = Draw(SplitMix64::new(mixed.bits()));
        let seeds = match self {
            Self::Scanner => &seeds.modules,
            Self::Open => &seeds.configs,
            Self::Text | Self::Decode => &seeds.texts,
        };
        let input = draw.of(seeds);
        // Half of the configurations are damaged inside of the body.
        let inside = self == Self::Open && draw.one_in(2);
        let body = inside.then(|| body_of(input)).flatten();
        let mut damaged = body.clone().unwrap_or_else(|| input.clone());
        for _ in 0..1 + draw.below(if self == Self::Decode { 2 } else { 4 }) {
            let is_text = !inside && !wire::is_bytecode(&damaged);
            match self == Self::Decode || is_text && draw.one_in(2) {
                true => draw.damage_text(&mut damaged),
                false => draw.damage_bytes(&mut damaged, seeds),
            }
            damaged.truncate(LARGEST);
        }
        let Some(body) = body else { return damaged };
        let config = String::from_utf8_lossy(input);
        config.replace(&BASE64.encode(&body), &BASE64.encode(&damaged)).into_bytes()
    }
}

fn body_of(config: &[u8]) -> Option<Vec<u8>> {
    let config: serde_json::Value = serde_json::from_slice(config).ok()?;
    BASE64.decode(config["custom_call_config"]["body"].as_str()?).ok()
}

/// What is damaged.
struct Seeds {
    /// StableHLO modules.
    modules: Vec<Vec<u8>>,
    /// Configurations of their custom calls.
    configs: Vec<Vec<u8>>,
    /// Kernels in readable form.
    texts: Vec<Vec<u8>>,
}

impl Seeds {
    /// JAX's modules, one with every way to move data, and those in `folder`.
    fn read(folder: &Path) -> Self {
        let context = Context::new();
        let kernel = moving(&context);
        let module = stablehlo::Module::new(&context, "main");
        module.function("main", &kernel.inputs(), |b, operands| kernel.call(b, operands)).expect("the operands fit");
        let mut modules = vec![
            include_bytes!("../ir/tests/data/scaled_sums.mlir").to_vec(),
            include_bytes!("../ir/tests/data/ragged_paged_attention.mlir").to_vec(),
            module.text().into_bytes(),
            module.bytecode(),
        ];
        let mut paths: Vec<_> =
            fs::read_dir(folder).expect("it was made").flatten().map(|entry| entry.path()).collect();
        paths.sort();
        modules.extend(paths.iter().map(|path| fs::read(path).expect("it was written")));
        let calls = modules.iter().flat_map(|module| wire::find_custom_calls(module).expect("the modules are sound"));
        let configs: Vec<_> = calls.map(|call| call.backend_config).collect();
        let texts = configs.iter().map(|config| text::print(&wire::open(&context, config).expect("it opens").module));
        let texts = texts.map(String::into_bytes).collect();
        Self { modules, configs: configs.into_iter().map(String::into_bytes).collect(), texts }
    }
}

/// A kernel with prefetched scalars, DMAs, semaphores, and every kind of control flow.
fn moving(context: &Context) -> mosaic::Kernel<'_> {
    let kernel = mosaic::kernel(context, "moving", |k| {
        let [step] = k.grid([(4, Semantics::Arbitrary)]);
        let order = k.prefetch("order", Element::I32, &[4]);
        let x = k.input(
            "x",
            Element::F32,
            &[32, 256],
            Window::blocks(&[8, 128], |t| (t.grid(0), t.prefetch(0).at(0).load())),
        );
        let rows = k.hbm_input("rows", Element::Bf16, &[64, 128]);
        let y = k.output("y", Element::F32, &[32, 128], Window::blocks(&[8, 128], |t| (t.grid(0), 0)));
        let buffer = k.scratch("buffer", MemorySpace::Vmem, Element::Bf16, &[16, 128]);
        let arrived = k.dma_semaphores("arrived", &[2]);
        let turn = k.semaphores("turn", &[1]);
        let copy = k.make_async_copy(rows.slice(0, order.at(step).load(), 16), buffer.clone(), arrived.at(0));
        copy.start();
        k.semaphore_signal(&turn.at(0), 1);
        let sum = k.fold_range(0, 3, k.zeros(Element::F32, &[8, 128]), |i, sum| {
            sum + (x.load() * i.cast(Element::F32)).exp().max(1).reshape(&[8, 1]).broadcast_to(&[8, 128])
        });
        let last = k.while_loop(step, |i| i.less(7), |i| i * 2 + 1);
        copy.wait();
        k.semaphore_wait(&turn.at(0), 1);
        let loaded = buffer.slice(0, 0, 8).load().cast(Element::F32);
        let chosen = k.if_else(last.equals(7), || sum, || loaded);
        y.store(chosen.greater(loaded).select(chosen, sum.rotate(1, 1)));
    });
    kernel.expect("the kernel is sound")
}

/// Damage.
struct Draw(SplitMix64);

impl Draw {
    fn below(&mut self, bound: usize) -> usize {
        self.0.below(bound.max(1))
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn of<'s, T>(&mut self, of: &'s [T]) -> &'s T {
        &of[self.below(of.len())]
    }

    /// A piece of something of this length, seldom a long one.
    fn range(&mut self, length: usize) -> Range<usize> {
        let start = self.below(length + 1);
        let most = if self.one_in(4) { length } else { 16 };
        start..start + self.below(most.min(length - start) + 1)
    }

    fn damage_bytes(&mut self, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        /// Words that the readers look for.
        const WORDS: [&[u8]; 12] = [
            b"custom_call_config",
            b"tpu_custom_call",
            b"{",
            b"{\\22",
            b"\"",
            b"\\",
            b"func.func ",
            b"(%",
            b"#tpu.memory_space<",
            b"\n",
            b"@main(",
            b"output_operand_alias<",
        ];
        let at = if self.one_in(4) { 0 } else { self.below(bytes.len()) };
        match self.below(10) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
            1 if !bytes.is_empty() => {
                bytes[at] = *self.of(&[0, 1, 0x7f, 0x80, 0xfe, 0xff, b'"', b'{', b'\n', b'%', b'<'])
            }
            2 => bytes.truncate(at),
            7 => drop(bytes.drain(..at)),
            8 => {
                let words: Vec<&[u8]> = (0..1 + self.below(3)).map(|_| *self.of::<&[u8]>(&WORDS)).collect();
                let piece = words.concat();
                let most = if self.one_in(4) { LARGEST / piece.len() } else { 1 };
                bytes.splice(at..at, piece.repeat(1 + self.below(most)));
            }
            3 => drop(bytes.drain(self.range(bytes.len()))),
            4 => {
                let piece = bytes[self.range(bytes.len())].to_vec();
                let most = if self.one_in(8) { LARGEST / piece.len().max(1) } else { 4 };
                let piece = piece.repeat(1 + self.below(most));
                bytes.splice(at..at, piece);
            }
            5 => {
                let other = self.of(seeds);
                let piece = other[self.range(other.len())].to_vec();
                let over = self.range(bytes.len());
                bytes.splice(over, piece);
            }
            6 => {
                let piece: Vec<u8> = (0..self.below(9)).map(|_| self.0.bits() as u8).collect();
                bytes.splice(at..at, piece);
            }
            _ if !bytes.is_empty() => {
                let other = self.below(bytes.len());
                bytes.swap(at, other);
            }
            _ => {}
        }
    }

    /// Replaces a word or a number by another, or moves lines.
    fn damage_text(&mut self, bytes: &mut Vec<u8>) {
        const NUMBERS: [&str; 14] = [
            "0",
            "1",
            "-1",
            "2",
            "7",
            "8",
            "127",
            "128",
            "2147483647",
            "2147483648",
            "-2147483649",
            "1099511627776",
            "9223372036854775807",
            "99999999999999999999",
        ];
        const TYPES: [&str; 9] = ["i1", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "index"];
        let text = String::from_utf8_lossy(bytes).into_owned();
        // Sizes and numbers, but not what ends a name or a type: in `8x128xf32` the first two.
        let mut numbers = runs(&text, |c| c.is_ascii_digit());
        numbers.retain(|run| !text[..run.start].ends_with(|c: char| c != 'x' && (c == '_' || c.is_ascii_alphabetic())));
        let mut names = runs(&text, |c| c.is_ascii_alphanumeric() || "_.".contains(c));
        names.retain(|run| !text[run.clone()].starts_with(|c: char| c.is_ascii_digit()));
        let with = |range: Range<usize>, word: &str| [&text[..range.start], word, &text[range.end..]].concat();
        let result = match self.below(6) {
            0 | 1 if !numbers.is_empty() => with(self.of(&numbers).clone(), self.of::<&str>(&NUMBERS)),
            2 if !names.is_empty() => with(self.of(&names).clone(), &text[self.of(&names).clone()]),
            3 => {
                // A type for a type, with the sizes before it: `8x128xf32`.
                let from = self.of::<&str>(&TYPES);
                let found: Vec<_> = text.match_indices(from).map(|(at, word)| at..at + word.len()).collect();
                if found.is_empty() { text } else { with(self.of(&found).clone(), self.of::<&str>(&TYPES)) }
            }
            4 if !numbers.is_empty() => with(self.of(&numbers).clone(), &text[self.of(&numbers).clone()]),
            _ => {
                let mut lines: Vec<&str> = text.lines().collect();
                let (from, to) = (self.below(lines.len()), self.below(lines.len()));
                match self.below(3) {
                    0 if !lines.is_empty() => drop(lines.remove(from)),
                    1 if !lines.is_empty() => lines.swap(from, to),
                    _ if !lines.is_empty() => lines.insert(to, lines[from]),
                    _ => {}
                }
                lines.join("\n")
            }
        };
        *bytes = result.into_bytes();
    }
}

/// Where a text has such characters in a row.
fn runs(text: &str, is: impl Fn(char) -> bool) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, c) in text.char_indices().filter(|&(_, c)| is(c)) {
        let end = at + c.len_utf8();
        match runs.last_mut() {
            Some(run) if run.end == at => run.end = end,
            _ => runs.push(at..end),
        }
    }
    runs
}

/// What a worker is to do, in `job.json` of its folder; the seeds' files are in `seeds`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Job {
    target: Target,
    seed: u64,
    first: u64,
    count: u64,
    /// MLIR alone.
    by_mlir: bool,
}

/// Runs a job: the file `progress` names the case that runs, `accepted` says at the end how many were.
fn work(folder: &Path) {
    child::limit_memory(2 * MEMORY).expect("a limit can be lowered");
    let job: Job = serde_json::from_slice(&fs::read(folder.join("job.json")).expect("a job")).expect("a job");
    let seeds = Seeds::read(&folder.join("seeds"));
    let progress = fs::File::create(folder.join("progress")).expect("the folder is writable");
    let context = Context::new();
    let mut accepted = 0_u64;
    for case in job.first..job.first + job.count {
        progress.write_all_at(&case.to_le_bytes(), 0).expect("the folder is writable");
        let input = job.target.case(&seeds, job.seed, case);
        match job.by_mlir {
            true => job.target.read_by_mlir(&context, &input),
            false => accepted += u64::from(job.target.read(&context, &input)),
        }
    }
    fs::write(folder.join("accepted"), accepted.to_le_bytes()).expect("the folder is writable");
}

/// How a worker fared.
enum Outcome {
    /// Its cases are done, of which so many were accepted.
    Done(u64),
    /// It died, or was stopped, at a case: how, and what it said.
    Died { case: u64, ended: Ended, why: String },
}

fn run(folder: &Path, job: &Job) -> Outcome {
    let number = |name: &str| {
        let bytes = fs::read(folder.join(name)).ok().and_then(|bytes| bytes.try_into().ok());
        bytes.map(u64::from_le_bytes)
    };
    for name in ["accepted", "progress"] {
        let _ = fs::remove_file(folder.join(name));
    }
    fs::write(folder.join("job.json"), serde_json::to_vec(job).expect("a job")).expect("the folder is writable");
    let stderr = fs::File::create(folder.join("stderr")).expect("the folder is writable");
    let mut command = Command::new(std::env::current_exe().expect("this program has a path"));
    command.arg(WORKER).arg(folder).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    let limits = Limits { time: SLOW, memory: MEMORY };
    let ended = child::run(&mut command, limits).expect("a worker can be started");
    if let (Ended::Exited(status), Some(accepted)) = (ended, number("accepted"))
        && status.success()
    {
        return Outcome::Done(accepted);
    }
    let said = fs::read(folder.join("stderr")).unwrap_or_default();
    let said = String::from_utf8_lossy(&said).lines().take(6).collect::<Vec<_>>().join(" | ");
    let why = format!("{ended:?}: {said}");
    let case = number("progress").unwrap_or_else(|| panic!("a worker ended before its first case: {why}"));
    Outcome::Died { case, ended, why }
}

/// What came of a target.
#[derive(Default)]
struct Report {
    cases: u64,
    accepted: u64,
    /// Cases of which MLIR alone dies.
    of_mlir: u64,
    /// What is to be mended, and the case that shows it.
    findings: BTreeMap<String, u64>,
}

fn fuzz(target: Target, seed: u64, plan: &Plan, folder: &Path) -> Report {
    let mut report = Report::default();
    let started = Instant::now();
    let (mut next, end) = plan.case.map_or((0, None), |case| (case, Some(case + 1)));
    let end = end.or(plan.seconds.is_none().then_some(CASES));
    while report.findings.len() < MOST_FINDINGS
        && end.is_none_or(|end| next < end)
        && plan.seconds.is_none_or(|limit| started.elapsed() < limit)
    {
        let count = end.map_or(BATCH, |end| BATCH.min(end - next));
        let job = Job { target, seed, first: next, count, by_mlir: false };
        match run(folder, &job) {
            Outcome::Done(accepted) => {
                report.accepted += accepted;
                report.cases += count;
                next += count;
            }
            Outcome::Died { case, ended, why } => {
                report.cases += case + 1 - next;
                next = case + 1;
                match blame(folder, &job, case, ended, &why) {
                    Blame::Nobody => {}
                    Blame::Mlir => report.of_mlir += 1,
                    Blame::Ours => report.find(&job, folder, case, &why),
                }
            }
        }
    }
    report
}

/// Whose death it was.
enum Blame {
    Ours,
    Mlir,
    /// The batch, not the case, took too long.
    Nobody,
}

fn blame(folder: &Path, job: &Job, case: u64, ended: Ended, why: &str) -> Blame {
    // A panic is ours, and so is an allocation that fails.
    if ["panicked at", "memory allocation of"].iter().any(|words| why.contains(words)) {
        return Blame::Ours;
    }
    let dies = |job: &Job| matches!(run(folder, job), Outcome::Died { .. });
    let alone = Job { first: case, count: 1, ..job.clone() };
    // A case before it may have had MLIR write where it must not, which shows late, and not every time.
    let batch = Job { count: case + 1 - job.first, by_mlir: true, ..job.clone() };
    // What a write where it must not be does depends on where things lie, which is another place in every process.
    let dies_of_mlir = |job: &Job| (0..MLIR_TRIES).any(|_| dies(job));
    if dies_of_mlir(&Job { by_mlir: true, ..alone.clone() }) {
        Blame::Mlir
    } else if dies(&alone) {
        Blame::Ours
    } else if ended == Ended::OutOfTime {
        Blame::Nobody
    } else if dies_of_mlir(&batch) {
        Blame::Mlir
    } else {
        Blame::Ours
    }
}

impl Report {
    /// Keeps the input of a case that shows something, and says how to run it again.
    fn find(&mut self, job: &Job, folder: &Path, case: u64, why: &str) {
        let (target, seed) = (job.target, job.seed);
        let input = target.case(&Seeds::read(&folder.join("seeds")), seed, case);
        let path = findings().join(format!("{}-{seed}-{case}", target.name()));
        fs::write(&path, input).expect("the build folder is writable");
        // Without what differs from case to case.
        let kind: String = why.chars().filter(|c| !c.is_ascii_digit()).take(300).collect();
        self.findings.entry(kind).or_insert_with(|| {
            let again = format!("PAGODA_FUZZ_SEED={seed} PAGODA_FUZZ_CASE={case}");
            println!("fuzz {}: {why}\n  {}\n  {again}", target.name(), path.display());
            case
        });
    }
}

/// Where damaged inputs are kept that show something.
fn findings() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    fs::create_dir_all(&folder).expect("the build folder is writable");
    folder
}

/// What was asked for.
struct Plan {
    /// For each target; a fixed number of cases otherwise.
    seconds: Option<Duration>,
    seed: u64,
    case: Option<u64>,
}

impl Plan {
    fn from_environment() -> Self {
        let number = |name: &str| {
            let text = std::env::var(name).ok()?;
            Some(text.parse::<u64>().unwrap_or_else(|_| panic!("{name} = {text} is not a whole number")))
        };
        let seconds = number("PAGODA_FUZZ_SECONDS").map(Duration::from_secs);
        let fresh = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |time| time.as_secs());
        let seed = number("PAGODA_FUZZ_SEED").unwrap_or_else(|| if seconds.is_some() { fresh() } else { 1 });
        Self { seconds, seed, case: number("PAGODA_FUZZ_CASE") }
    }
}

fn main() -> ExitCode {
    if let Some(folder) = child::asked(WORKER) {
        work(&folder);
        return ExitCode::SUCCESS;
    }
    // As the test harness does: words are parts of names, options are for it.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let targets = Target::ALL.into_iter();
    let targets: Vec<_> = targets
        .filter(|target| words.is_empty() || words.iter().any(|word| target.name().contains(word.as_str())))
        .collect();
    if targets.is_empty() {
        return ExitCode::SUCCESS;
    }
    let plan = Plan::from_environment();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let seeds = folder.path().join("seeds");
    fs::create_dir(&seeds).expect("a temporary folder is writable");
    for (name, problem) in [
        ("matmul.mlir", "matmul --m 24 --n 200 --k 300 --dtype bf16"),
        ("rpa.mlir", "rpa --q 24x8x128 --kv-heads 2 --page-size 16 --max-seq-len 64 --max-seqs 4 --tiles 8,2"),
    ] {
        let mut emit = Command::new(env!("CARGO_BIN_EXE_pagoda"));
        emit.arg("emit").args(problem.split(' ')).arg("--wire").arg("--out").arg(seeds.join(name));
        assert!(emit.status().expect("the binary was built").success(), "pagoda emit {problem}");
    }
    let mut failed = false;
    for target in targets {
        let started = Instant::now();
        let report = fuzz(target, plan.seed, &plan, folder.path());
        println!(
            "fuzz {}: {} cases of seed {} in {:.0} s, {} accepted, {} that MLIR alone dies of, {} findings",
            target.name(),
            report.cases,
            plan.seed,
            started.elapsed().as_secs_f64(),
            report.accepted,
            report.of_mlir,
            report.findings.len()
        );
        failed |= !report.findings.is_empty();
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
