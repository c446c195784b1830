//! The process in which libtpu runs: compiles one module and writes down what came of it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pjrt::{CompileOptions, Program, ProgramFormat};
use serde::{Deserialize, Serialize};

use crate::pjrt::{MemoryStats, Plugin, PluginChoice};

/// The hidden argument that makes an executable a worker.
pub const WORKER_ARGUMENT: &str = "--certify-worker";
pub(super) const REQUEST: &str = "request.json";
pub(super) const MODULE: &str = "module.mlir";
pub(super) const ANSWER: &str = "answer.json";
pub(super) const EXECUTABLE: &str = "executable.pjrt";

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub plugin: PathBuf,
    pub topology: String,
    pub replicas: usize,
    /// Whether the executable is written down too.
    pub serialise: bool,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Answer {
    /// The compiler's name and version.
    pub compiler: String,
    /// Why it refused.
    pub error: Option<String>,
    pub memory: Option<MemoryStats>,
}

/// Turns this process into a worker if its arguments say so, and ends it. Call this first in `main`.
pub fn run_if_asked() -> Option<ExitCode> {
    let folder = crate::child::asked(WORKER_ARGUMENT)?;
    match work(&folder) {
        Ok(()) => Some(ExitCode::SUCCESS),
        Err(error) => {
            eprintln!("{error}");
            Some(ExitCode::FAILURE)
        }
    }
}

fn work(folder: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let request: Request = serde_json::from_slice(&std::fs::read(folder.join(REQUEST))?)?;
    let module = std::fs::read(folder.join(MODULE))?;
    let plugin = Plugin::load(&PluginChoice::Path(request.plugin.clone()))?;
    let mut answer = Answer::default();
    if let Err(error) = compile(&plugin, &request, module, &mut answer, &folder.join(EXECUTABLE)) {
        answer.error = Some(match error {
            // Without the crate's own prefix and backtrace.
            pjrt::Error::PjrtError { msg, .. } => msg,
            other => other.to_string(),
        });
    }
    // Atomic: a worker that dies while it writes has not answered.
    let (partial, answered) = (folder.join("answer.partial"), folder.join(ANSWER));
    std::fs::write(&partial, serde_json::to_vec(&answer)?)?;
    std::fs::rename(partial, answered)?;
    // libtpu's destructors may hang or abort: the answer is there, nothing else counts.
    std::process::exit(0);
}

fn compile(
    plugin: &Plugin,
    request: &Request,
    module: Vec<u8>,
    answer: &mut Answer,
    executable_file: &Path,
) -> pjrt::Result<()> {
    let topology = plugin.api().create_topology(&request.topology, vec![])?;
    answer.compiler = topology.platform_version().lines().map(str::trim).collect::<Vec<_>>().join(" ");
    let mut options = CompileOptions::new();
    if let Some(build) = options.proto_mut().executable_build_options.as_mut() {
        build.num_replicas = request.replicas as i64;
    }
    let program = Program::new(ProgramFormat::MLIR, module);
    let executable = plugin.api().compile(&program, &topology, options, None)?;
    let stats = executable.compiled_memory_stats();
    answer.memory = Some(MemoryStats {
        code: stats.generated_code_size_in_bytes,
        arguments: stats.argument_size_in_bytes,
        outputs: stats.output_size_in_bytes,
        aliased: stats.alias_size_in_bytes,
        temporaries: stats.temp_size_in_bytes,
    });
    if request.serialise {
        std::fs::write(executable_file, executable.serialize().bytes()).map_err(pjrt::Error::IoError)?;
    }
    Ok(())
}
