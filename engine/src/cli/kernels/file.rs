//! Files with kernels: StableHLO modules (text or bytecode) that call Mosaic kernels, and Mosaic kernels in readable form.
//!
//! MLIR's bytecode reader trusts its input: a damaged body may crash it. So a child process ([`WORKER_ARGUMENT`]) opens
//! every file first; if it dies or hangs, that is an error of the file here.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use pagoda_ir::Context;
use pagoda_ir::mosaic::wire::{self, CallSite, Opened};
use pagoda_ir::mosaic::{hosted, text};
use pagoda_ir::tile_machine::Program;

use crate::child::{self, Ended, Limits};
use crate::error::{Error, Result};

/// The hidden argument that makes this program open a file and end.
const WORKER_ARGUMENT: &str = "--open-worker";
/// Kernels open within milliseconds and take some MiB; some damage makes the reader loop, or allocate.
const LIMITS: Limits = Limits { time: Duration::from_secs(20), memory: 4 << 30 };
const EMIT_AGAIN: &str = "write the module again";

/// A file and what it holds.
#[derive(Debug)]
pub(super) struct File {
    pub(super) path: PathBuf,
    pub(super) bytes: Vec<u8>,
    content: Content,
}

/// A kernel, and where it is called.
pub(super) type Kernel<'c, 'f> = (Opened<'c>, Option<&'f CallSite>);

#[derive(Debug)]
enum Content {
    /// One Mosaic kernel: readable text, or the bytecode of a custom call's body.
    Kernel,
    /// A StableHLO module and its calls of Mosaic kernels; none for a plain one.
    Module(Vec<CallSite>),
}

impl File {
    /// Reads the file, and sees to it that MLIR survives it.
    ///
    /// # Errors
    /// When it cannot be read, is neither a StableHLO module nor a Mosaic kernel, or crashes MLIR's reader.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let mut file = Self::classify(path)?;
        if file.is_plain() {
            return Ok(file); // MLIR is not asked about it
        }
        let program = std::env::current_exe().map_err(Error::io("find", Path::new("this executable")))?;
        let mut worker = Command::new(&program);
        worker.arg(WORKER_ARGUMENT).arg(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let outcome = match child::run(&mut worker, LIMITS).map_err(Error::io("run", &program))? {
            Ended::Exited(status) if status.success() => {
                file.read_as_text();
                return Ok(file);
            }
            Ended::Exited(status) => format!("crashes on it ({status})"),
            Ended::OutOfTime => format!("does not come to an end of it within {} s", LIMITS.time.as_secs()),
            Ended::OutOfMemory => format!("takes more than {} GiB of memory for it", LIMITS.memory >> 30),
        };
        Err(Error::file(path, format!("it is damaged: MLIR {outcome}"), EMIT_AGAIN))
    }

    fn classify(path: &Path) -> Result<Self> {
        let mut bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        if let Some(module) = exported(&bytes).map(<[u8]>::to_vec) {
            bytes = module;
        }
        let calls = wire::find_custom_calls(&bytes).map_err(|error| Error::file(path, error, EMIT_AGAIN))?;
        let has = |word: &str| bytes.windows(word.len()).any(|window| window == word.as_bytes());
        let content = if !calls.is_empty() {
            Content::Module(calls)
        } else if has(wire::TARGET) {
            let problem = format!("it calls @{}, but no kernel can be found in the call", wire::TARGET);
            return Err(Error::file(path, problem, EMIT_AGAIN));
        } else if has("iteration_bounds") || has("#tpu.") || has("\"tpu.") || has("stable_mosaic.") {
            Content::Kernel
        } else if wire::is_bytecode(&bytes) || has("stablehlo.") || has("mhlo.") || has("func.func") {
            Content::Module(vec![])
        } else {
            let fix = "give a StableHLO module as text or bytecode, or a kernel that `pagoda emit` wrote";
            return Err(Error::file(path, "it is neither a StableHLO module nor a Mosaic kernel", fix));
        };
        Ok(Self { path: path.to_owned(), bytes, content })
    }

    /// Turns a program in bytecode that is not StableHLO's own, as Pagoda writes it, into text.
    fn read_as_text(&mut self) {
        let Content::Module(calls) = &self.content else { return };
        if self.is_bytecode()
            && hosted::host(&self.bytes, calls, "", &|_| vec![]).is_err()
            && let Ok(text) = wire::bytecode_as_text(&Context::new(), &self.bytes)
            && let Ok(calls) = wire::find_custom_calls(text.as_bytes())
        {
            (self.bytes, self.content) = (text.into_bytes(), Content::Module(calls));
        }
    }

    /// Whether there is more in the program than the call of a kernel.
    pub(super) fn is_program(&self) -> bool {
        let Content::Module(calls) = &self.content else { return false };
        !hosted::is_bare_call(&self.bytes, calls)
    }

    /// The calls of kernels.
    pub(super) fn calls(&self) -> &[CallSite] {
        match &self.content {
            Content::Module(calls) => calls,
            Content::Kernel => &[],
        }
    }

    /// Whether it is a StableHLO module without Mosaic kernels.
    pub(super) fn is_plain(&self) -> bool {
        matches!(&self.content, Content::Module(calls) if calls.is_empty())
    }

    /// Whether it is bytecode.
    pub(super) fn is_bytecode(&self) -> bool {
        wire::is_bytecode(&self.bytes)
    }

    /// Whether a kernel of it sends to other devices, as its call says.
    pub(super) fn communicates(&self) -> bool {
        self.calls().iter().any(|call| call.backend_config.contains("\"has_communication\": true"))
    }

    /// The kernels with their numbers: all of them, or number `only`.
    ///
    /// # Errors
    /// When one is damaged, or there are not so many.
    pub(super) fn chosen_kernels<'c>(
        &self,
        context: &'c Context,
        only: Option<usize>,
    ) -> Result<Vec<(usize, Kernel<'c, '_>)>> {
        let kernels = self.kernels(context)?;
        let count = kernels.len();
        if let Some(only) = only.filter(|&only| only >= count) {
            let limit = format!("is not one of the {count} of {}, which are counted from 0", self.path.display());
            return Err(Error::setting("kernel", only, limit, "see `pagoda inspect`"));
        }
        Ok(kernels.into_iter().enumerate().filter(|(at, _)| only.is_none_or(|only| only == *at)).collect())
    }

    /// Every Mosaic kernel in it, in order of appearance, and where it is called.
    ///
    /// # Errors
    /// When one is damaged.
    pub(super) fn kernels<'c>(&self, context: &'c Context) -> Result<Vec<Kernel<'c, '_>>> {
        let damaged = |error| Error::file(&self.path, error, EMIT_AGAIN);
        match &self.content {
            Content::Kernel => {
                let module = match self.is_bytecode() {
                    true => wire::deserialize(context, &self.bytes),
                    false => {
                        text::parse(context, &String::from_utf8_lossy(&self.bytes), &self.path.display().to_string())
                    }
                };
                Ok(vec![(Opened { module: module.map_err(damaged)?, vmem_limit: None }, None)])
            }
            Content::Module(calls) => {
                let open = |call: &'_ CallSite| wire::open(context, &call.backend_config).map_err(damaged);
                calls.iter().map(|call| Ok((open(call)?, Some(call)))).collect()
            }
        }
    }
}

/// The module in what `jax.export` serialises: a FlatBuffer, which has the module's length in front of it. Of a file that is cut
/// off, what there is of it: that is found to be damaged.
fn exported(file: &[u8]) -> Option<&[u8]> {
    let at = file.windows(wire::MAGIC.len()).position(wire::is_bytecode).filter(|&at| at >= 4)?;
    // The version of the bytecode, and who wrote it.
    file.get(at + wire::MAGIC.len() + 1..)?.strip_prefix(b"StableHLO_v")?;
    let length = u32::from_le_bytes(file[at - 4..at].try_into().ok()?);
    Some(&file[at..at.saturating_add(length as usize).min(file.len())])
}

/// Opens a file and ends, if the arguments of this process say so.
pub(in crate::cli) fn run_if_asked() -> Option<ExitCode> {
    let path = child::asked(WORKER_ARGUMENT)?;
    if let Err(error) = child::limit_memory(LIMITS.memory) {
        log::warn!("no hard limit of memory: {error}");
    }
    let context = Context::new();
    // An error is not a crash: whoever started this finds it again, and reports it.
    if let Ok(mut file) = File::classify(&path)
        && let Ok(kernels) = file.kernels(&context)
    {
        for (kernel, _) in &kernels {
            let _ = wire::summarize(kernel).map(|_| Program::decode(&kernel.module));
        }
        drop(kernels);
        file.read_as_text();
    }
    Some(ExitCode::SUCCESS)
}
