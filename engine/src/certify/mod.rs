//! Certification: what libtpu, the TPU's real compiler, says about a program, with no TPU present.
//!
//! libtpu is a PJRT plugin that compiles for a *named* topology. It also prints, takes locks in the temp folder, writes
//! gigabytes of logs when it crashes, and aborts the process on some programs. So it is never loaded into this process:
//! [`Certifier::certify`] runs a worker (this executable with a hidden argument, [`WORKER_ARGUMENT`]) in a temp folder of
//! its own, within limits of time and memory, and reads its answer from a file. A crash, a timeout and a refusal are values here.
//!
//! What comes back ([`Certificate`]): VMEM by kernel and buffer, parsed from the compiler's own report, with register
//! spills apart; static cycles by kernel; device memory of the whole program; all stamped with the compiler's version.
//! Parsing is in [`report`], what runs in the worker in [`worker`].
//!
//! Invariants: nothing of a worker outlives the call (process and folder are gone); a program that does not compile is
//! never reported as certified; what the compiler did not report is absent, not zero.

pub mod batch;
pub mod kernel;
pub mod report;
pub mod worker;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pagoda_kernels::chips::Chip;
use pagoda_kernels::vmem::Bytes;
use serde::{Deserialize, Serialize};

use crate::child::{self, Ended, Limits};
use crate::pjrt::{Kind, MemoryStats, PluginChoice};
use report::{Bundles, KernelVmem, OutOfMemory};

pub use worker::{WORKER_ARGUMENT, run_if_asked};

/// What to compile.
#[derive(Clone, Copy, Debug)]
pub struct Program<'a> {
    /// A StableHLO module: text or bytecode.
    pub module: &'a [u8],
    /// Devices that it runs on, as replicas.
    pub replicas: usize,
}

/// Runs the compiler.
#[derive(Clone, Debug)]
pub struct Certifier {
    worker: PathBuf,
    plugin: PathBuf,
    timeout: Duration,
    profile_timeout: Duration,
    in_program: bool,
    profiled: bool,
}

/// Why nothing could be said about a program.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// libtpu is not there.
    #[error(transparent)]
    Plugin(#[from] crate::pjrt::Error),
    /// The topology's chip is unknown.
    #[error("topology = {0} names no chip known here: use e.g. v5p:2x2x1, v5e:2x2, v6e:2x2, v4:2x2x1 or tpu7x:2x2x1")]
    Topology(String),
    /// The compiler took too long.
    #[error("libtpu did not finish within {} s", limit.as_secs())]
    Timeout {
        /// The time limit.
        limit: Duration,
    },
    /// The compiler took too much memory.
    #[error("libtpu took more than {limit} of memory")]
    Memory {
        /// The limit.
        limit: Bytes,
    },
    /// The worker died.
    #[error("libtpu crashed ({status}): {message}")]
    Crash {
        /// How the worker ended.
        status: String,
        /// The last of what it said.
        message: String,
    },
    /// The compiler refused the program for another reason than memory.
    #[error("libtpu refused the program: {0}")]
    Refused(String),
    /// The worker could not be run, or its files not be read.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A report of the compiler is not what it is known to look like.
    #[error("libtpu's {report} cannot be read ({message}): is this libtpu of a version that Pagoda knows?")]
    Report {
        /// Which report.
        report: &'static str,
        /// What is wrong with it.
        message: String,
    },
}

/// The compiler's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// libtpu's version, as it names itself.
    pub compiler: String,
    /// The topology.
    pub topology: String,
    /// Whether it compiled, or what it ran out of.
    pub verdict: Verdict,
    /// VMEM of each Mosaic kernel, in order of appearance.
    pub kernels: Vec<KernelVmem>,
    /// Where the cycles come from.
    pub profile: Profile,
    /// Static cycles of each op that takes any, kernels among them.
    pub cycles: Vec<OpCycles>,
    /// What each kernel's code uses of the core's units.
    #[serde(default)]
    pub bundles: Vec<Bundles>,
    /// Where there is a profile: ops that it has no estimate of.
    #[serde(default)]
    pub unestimated: Vec<OpBytes>,
    /// Device memory of the program.
    pub memory: Option<MemoryStats>,
    /// Seconds that the compiler took, start of the worker included.
    pub seconds: f64,
}

/// Whether a program compiles.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum Verdict {
    /// It compiles.
    Compiles,
    /// A memory is too small.
    OutOfMemory(OutOfMemory),
}

/// The compiler's static profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// It wrote one.
    Complete,
    /// It wrote one and then aborted on a check of its own; the program compiles without it.
    Aborted,
    /// It took more time or memory than it may: it unrolls the grid. The program compiles without it.
    Stopped,
    /// It has no model of this chip, or failed before it wrote anything.
    None,
}

/// The compiler's static estimate for one op of the compiled program, or for several equal ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpCycles {
    /// The name of one of them in the compiled program.
    pub op: String,
    /// Cycles of all.
    pub cycles: u64,
    /// How many they are.
    #[serde(default = "one")]
    pub equal: u64,
}

fn one() -> u64 {
    1
}

/// An op that the compiler has no estimate of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpBytes {
    /// Its name in the compiled program.
    pub op: String,
    /// What it takes and gives.
    pub bytes: Bytes,
}

impl Certificate {
    /// Whether the program compiles.
    pub fn compiles(&self) -> bool {
        self.verdict == Verdict::Compiles
    }

    /// Static cycles of all Mosaic kernels together.
    pub fn kernel_cycles(&self) -> Option<u64> {
        let kernels = self.cycles.iter().filter(|op| self.kernels.iter().any(|kernel| kernel.name == op.op));
        let cycles: u64 = kernels.map(|op| op.cycles).sum();
        (cycles > 0).then_some(cycles)
    }

    /// Cycles of what is not a Mosaic kernel, and of these the ones that no estimate stands behind: what takes bytes at the
    /// rate of the chip's memory. `None` without a profile.
    pub fn other_cycles(&self) -> Option<(u64, u64)> {
        let rate = Chip::of_topology(&self.topology)?.info().hbm_bytes_per_cycle();
        let kernel = |name: &str| self.kernels.iter().any(|kernel| kernel.name == name);
        let estimated: u64 = self.cycles.iter().filter(|op| !kernel(&op.op)).map(|op| op.cycles).sum();
        let bytes = self.unestimated.iter().filter(|op| !kernel(&op.op)).map(|op| op.bytes.0);
        let without = bytes.map(|bytes| (bytes as f64 / rate).ceil() as u64).sum::<u64>();
        (self.profile != Profile::None && self.profile != Profile::Stopped || estimated + without > 0)
            .then_some((estimated + without, without))
    }

    /// Spills of all Mosaic kernels: the largest.
    pub fn spills(&self) -> Bytes {
        self.kernels.iter().map(KernelVmem::spills).max().unwrap_or_default()
    }
}

impl fmt::Display for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.verdict {
            Verdict::Compiles => writeln!(f, "compiles for {} ({})", self.topology, self.compiler)?,
            Verdict::OutOfMemory(out) => {
                writeln!(f, "does not compile for {} ({}): {out}", self.topology, self.compiler)?
            }
        }
        self.kernels.iter().try_for_each(|kernel| write!(f, "{kernel}"))?;
        for op in &self.cycles {
            writeln!(f, "  {:<53} {:>12} cycles", op.op, op.cycles)?;
        }
        if let Some(memory) = self.memory.filter(|_| self.compiles()) {
            let [code, arguments, outputs, temporaries] =
                [memory.code, memory.arguments, memory.outputs, memory.temporaries]
                    .map(|bytes| Bytes(bytes.max(0) as u64));
            writeln!(f, "  HBM: {arguments} arguments, {outputs} results, {temporaries} temporaries, {code} code")?;
        }
        if let Some((_, without)) = self.other_cycles().filter(|&(_, without)| without > 0) {
            let count = self.unestimated.len();
            writeln!(f, "  {:<53} {without:>12} cycles by the bytes of {count} ops", "without an estimate")?;
        }
        if self.compiles() && self.kernel_cycles().is_none() {
            let why = match self.profile {
                Profile::Stopped => "the compiler's profile took more memory, or time (--profile-timeout), than it may",
                _ => "the compiler has no estimate of this chip, or of the kernel's DMAs",
            };
            writeln!(f, "  no static cycles: {why}")?;
        }
        Ok(())
    }
}

impl Certifier {
    /// A certifier that runs `worker` (an executable whose `main` calls [`run_if_asked`] first) on the given libtpu.
    pub fn new(worker: impl Into<PathBuf>, plugin: impl Into<PathBuf>) -> Self {
        Self {
            worker: worker.into(),
            plugin: plugin.into(),
            timeout: Duration::from_secs(180),
            profile_timeout: Duration::from_secs(60),
            in_program: false,
            profiled: true,
        }
    }

    /// A certifier that runs `worker`, with the libtpu that is found as any plugin is.
    ///
    /// # Errors
    /// When libtpu is not found.
    pub fn find(worker: impl Into<PathBuf>) -> Result<Self, Error> {
        let found = PluginChoice::Named(Kind::Tpu).locate()?;
        Ok(Self::new(worker, found.path))
    }

    /// A certifier whose worker is this very executable.
    ///
    /// # Errors
    /// When libtpu is not found, or the executable's path is unknown.
    pub fn of_this_executable() -> Result<Self, Error> {
        let path = Path::new("this executable");
        Self::find(std::env::current_exe().map_err(io("find", path))?)
    }

    /// Sets the time limit of one compilation (default: 180 s).
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Sets the time limit of a compilation with its static profile (default: 60 s, and never more than the time limit
    /// of a compilation). When it is over, the program is compiled without, for as long as a compilation may take: a
    /// verdict, but no cycles.
    #[must_use]
    pub fn profile_timeout(self, profile_timeout: Duration) -> Self {
        Self { profile_timeout, ..self }
    }

    /// Lets XLA move operands of kernels into VMEM beforehand, as it does when it compiles a whole program for real.
    /// Otherwise they stay in HBM, and what a kernel takes depends on the kernel alone.
    #[must_use]
    pub fn in_program(self) -> Self {
        Self { in_program: true, ..self }
    }

    /// Asks for no static profile: the compiler has none of a whole step, and dies of the attempt.
    #[must_use]
    pub fn without_profile(self) -> Self {
        Self { profiled: false, ..self }
    }

    /// Which libtpu answers, as it names itself.
    ///
    /// # Errors
    /// As [`certify`](Self::certify).
    pub fn compiler(&self, topology: &str) -> Result<String, Error> {
        let nothing = Program { module: &[], replicas: 1 };
        Ok(self.attempt(topology, nothing, false, None)?.0?.compiler)
    }

    /// Compiles `program` for `topology` (`v5p:2x2x1`).
    ///
    /// # Errors
    /// When the compiler is missing, crashes, takes too long, or refuses the program for another reason than memory;
    /// running out of memory is a [`Verdict`].
    pub fn certify(&self, topology: &str, program: Program) -> Result<Certificate, Error> {
        self.certify_into(topology, program, None)
    }

    /// As [`certify`](Self::certify), and leaves the executable in the file `executable`, serialised as the plugin does it,
    /// if the program compiles. A host with a TPU loads it with the same libtpu.
    ///
    /// # Errors
    /// As [`certify`](Self::certify), and when the file cannot be written.
    pub fn certify_into(
        &self,
        topology: &str,
        program: Program,
        executable: Option<&Path>,
    ) -> Result<Certificate, Error> {
        let chip = Chip::of_topology(topology).ok_or_else(|| Error::Topology(topology.to_owned()))?;
        let start = Instant::now();
        let profiled = self.profiled && chip.has_static_profile();
        let (answer, dumps, profile) = match self.attempt(topology, program, profiled, executable)? {
            (Ok(answer), dumps) => {
                let profile = if dumps.cycles.is_empty() { Profile::None } else { Profile::Complete };
                (answer, dumps, profile)
            }

            // The profiler checks types more strictly than the compiler and aborts on some packed stores, after it has
            // written its estimate; and it may take far more memory and time, as it unrolls the grid. The verdict is the
            // one of a second run without it.
            (Err(failure), first) if profiled => match self.attempt(topology, program, false, executable)? {
                (Ok(answer), second) => {
                    let profile = match failure {
                        _ if !first.cycles.is_empty() => Profile::Aborted,
                        Error::Timeout { .. } | Error::Memory { .. } => Profile::Stopped,
                        _ => Profile::None,
                    };
                    (answer, Dumps { cycles: first.cycles, ..second }, profile)
                }
                (Err(crash), _) => return Err(crash),
            },
            (Err(crash), _) => return Err(crash),
        };
        let verdict = match answer.error {
            None => Verdict::Compiles,
            Some(message) => match report::out_of_memory(&message) {
                Some(out) => Verdict::OutOfMemory(out),
                None => return Err(Error::Refused(message)),
            },
        };
        let compiles = verdict == Verdict::Compiles;
        let Dumps { kernels, cycles, program, mut bundles } = dumps;
        bundles.retain(|of| kernels.iter().any(|kernel| kernel.name == of.name));
        let unestimated = if profiled && compiles { report::unestimated(&program, &cycles) } else { vec![] };
        Ok(Certificate {
            compiler: answer.compiler,
            topology: topology.to_owned(),
            verdict,
            kernels,
            profile,
            cycles: if compiles { cycles } else { vec![] },
            bundles,
            unestimated,
            memory: answer.memory,
            // Whole milliseconds: a number of few digits is the same after it was written and read.
            seconds: start.elapsed().as_millis() as f64 / 1e3,
        })
    }

    /// Runs one worker. The inner result is its answer, if it lived to give one; the dumps are there in either case.
    fn attempt(
        &self,
        topology: &str,
        program: Program,
        profiled: bool,
        executable: Option<&Path>,
    ) -> Result<(Result<worker::Answer, Error>, Dumps), Error> {
        let folder = tempfile::Builder::new().prefix("pagoda-certify-").tempdir();
        let folder = folder.map_err(io("create", &std::env::temp_dir()))?;
        let folder = folder.path();
        let dumps = folder.join(DUMPS);
        for path in [&dumps, &folder.join("tmp")] {
            std::fs::create_dir_all(path).map_err(io("create", path))?;
        }
        let request = worker::Request {
            plugin: self.plugin.canonicalize().unwrap_or_else(|_| self.plugin.clone()),
            topology: topology.to_owned(),
            replicas: program.replicas,
            serialise: executable.is_some(),
        };
        write(&folder.join(worker::MODULE), program.module)?;
        write(&folder.join(worker::REQUEST), &serde_json::to_vec(&request).unwrap_or_default())?;
        let [stdout, stderr] = ["stdout", "stderr"].map(|name| folder.join(name));
        let create = |path: &PathBuf| std::fs::File::create(path).map_err(io("create", path));
        let time = if profiled { self.timeout.min(self.profile_timeout) } else { self.timeout };
        let mut command = Command::new(&self.worker);
        command
            .arg(WORKER_ARGUMENT)
            .arg(folder)
            .current_dir(folder)
            .envs(environment(folder))
            .env("LIBTPU_INIT_ARGS", self.flags(profiled))
            .stdin(Stdio::null())
            .stdout(create(&stdout)?)
            .stderr(create(&stderr)?);
        let limits = Limits { time, memory: MEMORY_LIMIT.0 };
        let status = match child::run(&mut command, limits).map_err(io("run", &self.worker))? {
            Ended::Exited(status) => status,
            // What a stopped compiler has written may end anywhere.
            Ended::OutOfTime => return Ok((Err(Error::Timeout { limit: time }), Dumps::default())),
            Ended::OutOfMemory => return Ok((Err(Error::Memory { limit: MEMORY_LIMIT }), Dumps::default())),
        };
        let answer = std::fs::read(folder.join(worker::ANSWER)).ok();
        let answer =
            answer.and_then(|answer| serde_json::from_slice::<worker::Answer>(&answer).ok()).ok_or_else(|| {
                let message = complaint(&stderr).or_else(|| complaint(&stdout));
                Error::Crash {
                    status: status.to_string(),
                    message: message.unwrap_or_else(|| "it said nothing".into()),
                }
            });
        match answer {
            Ok(answer) => {
                if let Some(to) = executable.filter(|_| answer.error.is_none()) {
                    // The folder goes with this call, and may be on another file system.
                    let from = folder.join(worker::EXECUTABLE);
                    std::fs::copy(&from, to).map_err(io("write", to))?;
                }
                Ok((Ok(answer), Dumps::read(&dumps)?))
            }
            // Of a crashed one only what is whole counts.
            Err(crash) => Ok((Err(crash), Dumps::read(&dumps).unwrap_or_default())),
        }
    }

    /// libtpu's flags: only the reports that are read here. Paths are relative to the worker's own folder: libtpu splits
    /// its flags at spaces.
    fn flags(&self, profiled: bool) -> String {
        let mut flags = format!("--xla_jf_dump_to={DUMPS} --xla_jf_dump_llo_text=true");
        flags += " --xla_jf_dump_llo_pass_label_regex=vmem_report|final_hlo-static-per-bundle-utilization";
        if !self.in_program {
            // v5 and before; v6 and after.
            flags += " --xla_vf_vmem_memory_space_assignment=false --xla_gf_vmem_memory_space_assignment=false";
        }
        if profiled {
            flags += &format!(" --xla_jf_dump_static_llo_profile_to={DUMPS}");
        }
        flags
    }
}

/// How the file of a kernel's use of units ends.
const BUNDLES: &str = "-final_hlo-static-per-bundle-utilization.txt";

/// Where libtpu writes its reports, in the worker's folder.
const DUMPS: &str = "dumps";

/// What a compilation may take of the machine's memory. Kernels take below 2 GiB; the profiler takes as much as it gets
/// for grids of some thousand steps, which it unrolls.
const MEMORY_LIMIT: Bytes = Bytes::gib(6);

/// What keeps libtpu quiet, off the network, and inside its folder.
fn environment(folder: &Path) -> [(&'static str, std::ffi::OsString); 7] {
    [
        ("TMPDIR", folder.join("tmp").into()),
        ("TPU_MIN_LOG_LEVEL", "3".into()),
        ("TPU_SKIP_MDS_QUERY", "1".into()),
        ("TPU_WORKER_HOSTNAMES", "localhost".into()),
        ("TPU_WORKER_ID", "0".into()),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1".into()),
        ("TPU_ACCELERATOR_TYPE", "v5p-8".into()),
    ]
}

/// What the compiler left behind.
#[derive(Default)]
struct Dumps {
    kernels: Vec<KernelVmem>,
    cycles: Vec<OpCycles>,
    /// The program's text, as it is scheduled.
    program: String,
    bundles: Vec<Bundles>,
}

impl Dumps {
    fn read(folder: &Path) -> Result<Self, Error> {
        let entries = std::fs::read_dir(folder).map_err(io("read", folder))?;
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        let mut dumps = Self::default();
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let read = || std::fs::read_to_string(&path).map_err(io("read", &path));
            if name.ends_with("-vmem_report.html") {
                // The report is written once per stage; the last one counts.
                for kernel in report::vmem(&read()?)? {
                    dumps.kernels.retain(|known| known.name != kernel.name);
                    dumps.kernels.push(kernel);
                }
            } else if let Some(op) = name.strip_suffix(BUNDLES) {
                // `1795890013677727112-name.1-70-final_...`
                let op = op.split_once('-').and_then(|(_, op)| op.rsplit_once('-')).map_or("", |(op, _)| op);
                dumps.bundles.extend(report::bundles(op, &read()?));
            } else if name.ends_with("-TLP-hlo.txt") {
                dumps.program = read()?;
            } else if name.ends_with("_static_llo_profile.textproto") {
                for op in report::static_cycles(&read()?)? {
                    dumps.cycles.retain(|known| known.op != op.op);
                    dumps.cycles.push(op);
                }
            }
        }
        Ok(dumps)
    }
}

/// What a crashed process had to say: its fatal line, or the end of its log, without stack traces.
fn complaint(log: &Path) -> Option<String> {
    const MOST: usize = 1000;
    let text = String::from_utf8_lossy(&std::fs::read(log).ok()?).into_owned();
    let noise =
        |line: &&str| !line.trim_start().starts_with("@ ") && !line.starts_with("http") && !line.starts_with("PC:");
    let lines: Vec<&str> = text.lines().filter(noise).collect();
    // glog: `F1124 23:17:55.755984 29721 file.cc:76] message`.
    let fatal = |line: &&&str| line.starts_with('F') && line.chars().nth(1).is_some_and(|c| c.is_ascii_digit());
    let said = match lines.iter().find(fatal) {
        Some(&line) => line.split_once("] ").map_or(line, |(_, message)| message).to_owned(),
        None => lines.join("\n").trim().to_owned(),
    };
    let start = said.len().saturating_sub(MOST);
    let start = (start..=said.len()).find(|&at| said.is_char_boundary(at))?;
    (!said.is_empty()).then(|| said[start..].to_owned())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    std::fs::write(path, bytes).map_err(io("write", path))
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Plugin(error) => Self::Pjrt(error),
            Error::Topology(topology) => {
                Self::setting("topology", topology, "names no known chip", "use e.g. v5p:2x2x1, v5e:2x2 or tpu7x:2x2x1")
            }
            Error::Io { action, path, source } => Self::Io { action, path, source },
            // The program is as planned: what failed is this libtpu.
            error => Self::Plugin {
                plugin: "tpu".into(),
                fix: match error {
                    Error::Timeout { .. } => "raise the time limit (--timeout), or use smaller tiles",
                    Error::Memory { .. } => "use smaller tiles",
                    _ => "see `pagoda doctor` for the libtpu in use",
                }
                .into(),
                problem: error.to_string(),
            },
        }
    }
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Io { action, path: path.into(), source }
}
