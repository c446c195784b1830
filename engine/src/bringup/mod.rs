//! `pagoda bringup`: everything that Pagoda does on a device, checked and timed on one that nobody has tried yet, and written
//! into one file.
//!
//! Every check runs in a child process, this executable again, which appends what it finds to a file: what was found stays
//! when a kernel crashes or hangs, the case that it was at is reported as such, and a new child goes on behind it.
//!
//! Invariants: the report is written whole after every child; a case is reported once; only children load the plugin, one
//! at a time, as a TPU belongs to one process.

mod worker;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use worker::run_if_asked;

use crate::child::{self, Ended, Limits};
use crate::error::{Error, Result};
use crate::measure::Times;
use crate::output::write_atomically;

/// The hidden argument that makes an executable a worker.
pub const WORKER_ARGUMENT: &str = "--bringup-worker";

const REQUEST: &str = "request.json";
const ANSWERS: &str = "answers.jsonl";

/// What is checked.
#[derive(Clone, Debug)]
pub struct Job {
    /// The plugin, as the command line takes it.
    pub plugin: String,
    /// The model of the step program.
    pub model: PathBuf,
    /// Cases of each kernel and form.
    pub cases: u64,
    /// What they are drawn from.
    pub seed: u64,
    /// What a child may take to load the plugin, and for each case.
    pub time: Duration,
}

/// What a child is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Request {
    plugin: String,
    model: PathBuf,
    subject: Subject,
    /// The seeds of the cases, in order.
    cases: Vec<u64>,
}

/// What is looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Subject {
    /// Plugin, devices, versions.
    Environment,
    /// A kernel in one form.
    Kernel(String, Form),
    /// The step programs.
    Step,
}

/// A form of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Plain StableHLO on the plugin.
    Stablehlo,
    /// In Rust, on a CPU plugin's machine.
    Native,
    /// The TPU's: on a TPU, or on the tile machine in every order of DMAs.
    Mosaic,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The results are what they should be.
    Passed,
    /// They are not, or there are none: the message says why.
    Failed,
    /// There is no such form.
    Skipped,
    /// Its process ended.
    Crashed,
    /// Its process was stopped.
    OutOfTime,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// The kernel, or `step`.
    pub kernel: String,
    /// Its form, or that of the step program.
    pub form: Form,
    /// The seed that the case is drawn from.
    pub case: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// The problem in words, and the lengths of its batch.
    #[serde(default)]
    pub problem: String,
    /// What went wrong.
    #[serde(default)]
    pub message: Option<String>,
    /// Seconds of a run, where it was timed.
    #[serde(default)]
    pub seconds: Option<Times>,
    /// Seconds that the device needs at least, by its vendor's rates, where it is known.
    #[serde(default)]
    pub floor_seconds: Option<f64>,
}

impl Check {
    fn of(kernel: &str, form: Form, case: u64, outcome: Outcome) -> Self {
        let kernel = kernel.to_owned();
        Self { kernel, form, case, outcome, problem: String::new(), message: None, seconds: None, floor_seconds: None }
    }
}

/// A line of a child's file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    /// It is at this case.
    Started(u64),
    Checked(Box<Check>),
    Environment(BTreeMap<String, serde_json::Value>),
}

/// What is sent back.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Pagoda's version.
    pub pagoda: &'static str,
    /// The job.
    pub plugin: String,
    /// The seed of all cases.
    pub seed: u64,
    /// Whether everything was tried.
    pub complete: bool,
    /// How many checks ended how.
    pub summary: BTreeMap<Outcome, usize>,
    /// Plugin, devices, machine, variables.
    pub environment: BTreeMap<String, serde_json::Value>,
    /// Every check.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether something was checked, and all that was checked passed.
    pub fn passed(&self) -> bool {
        let count = |outcome| self.summary.get(&outcome).copied().unwrap_or(0);
        let bad = [Outcome::Failed, Outcome::Crashed, Outcome::OutOfTime];
        self.complete && count(Outcome::Passed) > 0 && bad.into_iter().all(|outcome| count(outcome) == 0)
    }

    fn write(&mut self, out: &Path) -> Result<()> {
        self.summary = BTreeMap::new();
        self.checks.iter().for_each(|check| *self.summary.entry(check.outcome).or_default() += 1);
        let text = serde_json::to_string_pretty(self).map_err(Error::runtime("writing JSON"))?;
        write_atomically(out, format!("{text}\n").as_bytes())
    }
}

/// Runs a job; the report, which `out` holds too, after every child. `progress` hears of each.
///
/// # Errors
/// When a child cannot be started, or the report not be written.
pub fn run(job: &Job, executable: &Path, out: &Path, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    run_with(job, out, progress, &|folder| {
        let mut command = Command::new(executable);
        command.arg(WORKER_ARGUMENT).arg(folder);
        command
    })
}

fn run_with(
    job: &Job,
    out: &Path,
    progress: &mut dyn FnMut(&str),
    worker: &dyn Fn(&Path) -> Command,
) -> Result<Report> {
    let (pagoda, plugin) = (env!("CARGO_PKG_VERSION"), job.plugin.clone());
    let (summary, environment) = (BTreeMap::new(), machine());
    let mut report =
        Report { pagoda, plugin, seed: job.seed, complete: false, summary, environment, checks: Vec::new() };
    let kernels = worker::NAMES.iter().flat_map(|name| {
        let forms = [Form::Stablehlo, Form::Native, Form::Mosaic];
        forms.map(|form| Subject::Kernel((*name).to_owned(), form))
    });
    for subject in std::iter::once(Subject::Environment).chain(kernels).chain([Subject::Step]) {
        let (name, form) = match &subject {
            Subject::Environment => ("environment", Form::Stablehlo),
            Subject::Kernel(name, form) => (name.as_str(), *form),
            Subject::Step => ("step", Form::Stablehlo),
        };
        let mut cases: Vec<u64> = match subject {
            Subject::Kernel(..) => (0..job.cases).map(|case| job.seed.wrapping_add(case)).collect(),
            _ => vec![job.seed],
        };
        while !cases.is_empty() {
            let request = Request {
                plugin: job.plugin.clone(),
                model: job.model.clone(),
                subject: subject.clone(),
                cases: cases.clone(),
            };
            let (answers, ended) = ask(&request, job.time, worker)?;
            let mut at = None;
            let before = report.checks.len();
            for answer in answers {
                match answer {
                    Answer::Environment(of_plugin) => report.environment.extend(of_plugin),
                    Answer::Started(case) => at = Some(case),
                    Answer::Checked(check) => report.checks.push(*check),
                }
            }
            let done = |case: &u64| report.checks[before..].iter().any(|check| check.case == *case);
            let well = matches!(ended, Ended::Exited(status) if status.success());
            if well {
                cases.clear();
            } else {
                // The case that it was at; without one it never came to the first.
                let lost = at.filter(|case| !done(case)).or_else(|| cases.iter().copied().find(|case| !done(case)));
                let outcome = if ended == Ended::OutOfTime { Outcome::OutOfTime } else { Outcome::Crashed };
                cases.retain(|case| !done(case) && Some(*case) != lost);
                if let Some(case) = lost {
                    let message = Some(format!("its process: {ended:?}"));
                    report.checks.push(Check { message, ..Check::of(name, form, case, outcome) });
                }
                if at.is_none() {
                    cases.clear(); // It would not come further the next time.
                }
            }
            report.write(out)?;
            let of_subject = &report.checks[before..];
            let bad =
                of_subject.iter().filter(|check| check.outcome > Outcome::Passed && check.outcome != Outcome::Skipped);
            progress(&format!("{name} {form:?}: {} checks, {} bad", of_subject.len(), bad.count()).to_lowercase());
        }
    }
    report.complete = true;
    report.write(out)?;
    Ok(report)
}

/// Runs a child to its end: what it wrote, and how it ended.
fn ask(request: &Request, time: Duration, worker: &dyn Fn(&Path) -> Command) -> Result<(Vec<Answer>, Ended)> {
    /// More than any check takes; a child that goes beyond it would take the machine along.
    const MEMORY: u64 = 64 << 30;
    let folder = tempfile::tempdir().map_err(Error::io("create a folder in", &std::env::temp_dir()))?;
    let text = serde_json::to_vec(request).map_err(Error::runtime("writing JSON"))?;
    let path = folder.path().join(REQUEST);
    std::fs::write(&path, text).map_err(Error::io("write", &path))?;
    // What children print is of no use on this process's output.
    let mut command = worker(folder.path());
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
    let limits = Limits { time: time * (request.cases.len() as u32 + 1), memory: MEMORY };
    let ended = child::run(&mut command, limits).map_err(Error::runtime("starting a check"))?;
    let text = std::fs::read_to_string(folder.path().join(ANSWERS)).unwrap_or_default();
    // A last line that is not whole was being written when the child ended.
    Ok((text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect(), ended))
}

/// This machine, and the variables that plugins look at.
fn machine() -> BTreeMap<String, serde_json::Value> {
    let system = sysinfo::System::new_all().ok();
    let system = system.as_ref();
    let variables = std::env::vars().filter(|(name, _)| {
        ["TPU_", "LIBTPU_", "XLA_", "JAX_", "PJRT_", "TF_"].iter().any(|prefix| name.starts_with(prefix))
    });
    let variables: BTreeMap<String, String> = variables.collect();
    let processor = system.and_then(|system| Some(system.cpus().first()?.brand().to_owned()));
    let entries = [
        ("architecture", serde_json::json!(std::env::consts::ARCH)),
        ("system", serde_json::json!(sysinfo::System::long_os_version().ok())),
        ("kernel", serde_json::json!(sysinfo::System::kernel_version().ok())),
        ("processor", serde_json::json!(processor)),
        ("cores", serde_json::json!(std::thread::available_parallelism().ok().map(std::num::NonZero::get))),
        ("memory_bytes", serde_json::json!(system.map(sysinfo::System::total_memory))),
        ("variables", serde_json::json!(variables)),
    ];
    entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A worker that passes its cases in order, but crashes at the second and hangs at the third of one kernel's forms.
    #[test]
    fn what_was_found_stays_when_a_child_crashes_or_hangs() {
        let script = r#"
            request=$(cat "$0/request.json")
            cases=$(echo "$request" | sed 's/.*"cases":\[\([^]]*\)\].*/\1/; s/,/ /g')
            for case in $cases; do
              echo "{\"started\":$case}" >> "$0/answers.jsonl"
              case "$request" in *\"matmul\"*native*)
                [ "$case" = 8 ] && kill -SEGV $$
                [ "$case" = 9 ] && sleep 600;;
              esac
              echo "{\"checked\":{\"kernel\":\"k\",\"form\":\"native\",\"case\":$case,\"outcome\":\"passed\"}}" >> "$0/answers.jsonl"
            done
        "#;
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("report.json");
        let time = Duration::from_secs(2);
        let job = Job { plugin: "cpu".into(), model: "none".into(), cases: 4, seed: 7, time };
        let worker = |folder: &Path| {
            let mut command = Command::new("sh");
            command.arg("-c").arg(script).arg(folder);
            command
        };
        let report = run_with(&job, &out, &mut |_| (), &worker).unwrap();
        let bad: Vec<_> = report.checks.iter().filter(|check| check.outcome != Outcome::Passed).collect();
        let ended: Vec<_> = bad.iter().map(|check| (check.kernel.as_str(), check.case, check.outcome)).collect();
        assert_eq!(ended, [("matmul", 8, Outcome::Crashed), ("matmul", 9, Outcome::OutOfTime)]);
        let cases = worker::NAMES.len() * 3 * 4 + 2; // with the environment and the step
        assert_eq!((report.checks.len(), report.complete, report.passed()), (cases, true, false));
        let written: serde_json::Value = serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap();
        assert_eq!(written["summary"]["passed"], cases - 2);
        assert_eq!(written["checks"].as_array().unwrap().len(), cases);
    }

    #[test]
    fn a_child_that_never_comes_to_a_case_is_not_asked_again() {
        let folder = tempfile::tempdir().unwrap();
        let job = Job { plugin: "cpu".into(), model: "none".into(), cases: 3, seed: 0, time: Duration::from_secs(60) };
        let out = folder.path().join("report.json");
        let report = run_with(&job, &out, &mut |_| (), &|_| Command::new("false")).unwrap();
        assert_eq!(report.summary, BTreeMap::from([(Outcome::Crashed, worker::NAMES.len() * 3 + 2)]));
    }
}
