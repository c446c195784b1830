//! What libtpu is asked, and what it said the last time: programs compiled ahead of time, in child processes, as many at a
//! time as there are processors, and kept in a folder under a key of everything that decides the answer.
//!
//! The key is the SHA-256 of the module's bytes, the topology, the replicas, the options and libtpu's version. An entry is
//! two files, `KEY.json` (the compiler's answer) and for a step program `KEY.pjrt` (the executable as the plugin serialises
//! it, for hosts to load); both appear whole or not at all. A failed compilation is not kept: it may have been for want of
//! time.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use pagoda_ir::stablehlo::{Module, ReplicaGroups};
use pagoda_ir::{Context, Element, TensorType};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::certify::batch::Compile;
use crate::certify::{Certificate, Certifier, Program, Verdict};
use crate::error::{Error, Result};
use crate::mesh::Mesh;

/// One program for one topology.
#[derive(Clone, Debug)]
pub struct Unit {
    /// What it is, for progress and errors.
    pub name: String,
    /// A StableHLO module.
    pub module: Vec<u8>,
    /// The topology, as libtpu names it.
    pub topology: String,
    /// Devices that it runs on, as replicas.
    pub replicas: usize,
    /// How it is compiled.
    pub how: How,
}

/// How a program is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum How {
    /// One kernel or collective, with the compiler's static profile.
    Profiled,
    /// A step program, as it will run; the executable is kept.
    Whole,
    /// For what the compiler says of it.
    Plain,
}

/// The answer to a unit.
#[derive(Clone, Debug)]
pub enum Answer {
    /// It compiles, or a memory is too small.
    Certified(Box<Certificate>),
    /// Nothing could be said: a crash, a time limit, a refusal.
    Failed(String),
}

impl Answer {
    /// The certificate.
    pub fn certificate(&self) -> Option<&Certificate> {
        match self {
            Self::Certified(certificate) => Some(certificate),
            Self::Failed(_) => None,
        }
    }

    /// Cycles of everything that the profile has, if it is one.
    pub fn cycles(&self) -> Option<u64> {
        let certificate = self.certificate().filter(|certificate| certificate.compiles())?;
        certificate.kernel_cycles()
    }
}

/// Who answers.
pub trait Compiler: Sync {
    /// The compiler's version, as it names itself.
    ///
    /// # Errors
    /// When it is not there.
    fn version(&self, topology: &str) -> Result<String>;

    /// Compiles `unit`, or knows what came of it.
    ///
    /// # Errors
    /// When the compiler is not there, or a file cannot be read or written. What the compiler fails at is an answer.
    fn compile(&self, unit: &Unit) -> Result<Answer>;

    /// Where the executable of a unit that compiled is; `None` if none is kept.
    fn executable(&self, unit: &Unit) -> Option<PathBuf>;
}

/// Compiles `units`, as many at a time as there are processors; answers in their order. `done` hears of each.
///
/// # Errors
/// The first one that [`Compiler::compile`] has.
pub fn compile_all(
    compiler: &dyn Compiler,
    units: &[Unit],
    done: &(dyn Fn(&Unit, &Answer) + Sync),
) -> Result<Vec<Answer>> {
    let (next, answers) = (AtomicUsize::new(0), Mutex::new(vec![None; units.len()]));
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(units.len());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((at, unit)) = Some(next.fetch_add(1, Relaxed)).and_then(|at| Some((at, units.get(at)?)))
                {
                    let answer = compiler.compile(unit);
                    if let Ok(answer) = &answer {
                        done(unit, answer);
                    }
                    answers.lock().expect("no holder panics")[at] = Some(answer.map_err(std::sync::Arc::new));
                }
            });
        }
    });
    let answers = answers.into_inner().expect("no holder panics").into_iter();
    let taken = answers.map(|answer| answer.expect("every unit was taken"));
    taken.collect::<Result<_, _>>().map_err(|error| std::sync::Arc::into_inner(error).expect("held once"))
}

/// libtpu, and a folder of what it said before.
#[derive(Debug)]
pub struct Cached {
    certifier: Certifier,
    library: PathBuf,
    folder: PathBuf,
}

/// An entry of the cache.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    /// What it is of, for people who look into the folder.
    name: String,
    certificate: Certificate,
}

impl Cached {
    /// libtpu at `library`, run by `certifier`; answers are kept in `folder`, which is made where it is missing.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn new(certifier: Certifier, library: &Path, folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        Ok(Self { certifier, library: library.to_owned(), folder: folder.to_owned() })
    }

    /// The key of a unit.
    fn key(&self, unit: &Unit) -> Result<String> {
        let version = self.version(&unit.topology)?;
        // An entry of another form is another entry.
        let options = format!("3\n{}\n{}\n{:?}\n{version}\n", unit.topology, unit.replicas, unit.how);
        let hash = Sha256::new().chain_update(&options).chain_update(&unit.module).finalize();
        Ok(hash.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    fn file(&self, key: &str, extension: &str) -> PathBuf {
        self.folder.join(format!("{key}.{extension}"))
    }

    /// Writes a file whole or not at all; other processes may be at it.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let partial = self.partial(path);
        std::fs::write(&partial, bytes).map_err(Error::io("write", &partial))?;
        std::fs::rename(&partial, path).map_err(Error::io("write", path))
    }

    fn partial(&self, path: &Path) -> PathBuf {
        path.with_extension(format!("{}.partial", std::process::id()))
    }
}

impl Compiler for Cached {
    /// Asked once for each library: its size and time of change say which it is.
    fn version(&self, topology: &str) -> Result<String> {
        let library = self.library.canonicalize().map_err(Error::io("find", &self.library))?;
        let data = library.metadata().map_err(Error::io("read", &library))?;
        let changed = data.modified().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        let identity = format!("{} {} {:?}", library.display(), data.len(), changed.unwrap_or_default());
        let key: String = Sha256::digest(identity).iter().take(12).map(|byte| format!("{byte:02x}")).collect();
        let known = self.file(&key, "version");
        if let Ok(version) = std::fs::read_to_string(&known) {
            return Ok(version);
        }
        let version = self.certifier.compiler(topology)?;
        self.write(&known, version.as_bytes())?;
        Ok(version)
    }

    fn compile(&self, unit: &Unit) -> Result<Answer> {
        let key = self.key(unit)?;
        let (known, executable) = (self.file(&key, "json"), self.file(&key, "pjrt"));
        let entry = std::fs::read(&known).ok().and_then(|bytes| serde_json::from_slice::<Entry>(&bytes).ok());
        // A damaged entry, or one whose executable was deleted, is made anew.
        let usable = |entry: &Entry| unit.how != How::Whole || !entry.certificate.compiles() || executable.is_file();
        if let Some(entry) = entry.filter(usable) {
            return Ok(Answer::Certified(Box::new(entry.certificate)));
        }
        let certifier = match unit.how {
            How::Profiled => self.certifier.clone(),
            How::Whole => self.certifier.clone().without_profile().in_program(),
            How::Plain => self.certifier.clone().without_profile(),
        };
        let partial = self.partial(&executable);
        let keep = (unit.how == How::Whole).then_some(partial.as_path());
        let program = Program { module: &unit.module, replicas: unit.replicas };
        let certificate = match certifier.certify_into(&unit.topology, program, keep) {
            Ok(certificate) => certificate,
            Err(error @ (crate::certify::Error::Plugin(_) | crate::certify::Error::Io { .. })) => {
                return Err(error.into());
            }
            Err(error) => return Ok(Answer::Failed(error.to_string())),
        };
        if keep.is_some() && certificate.verdict == Verdict::Compiles {
            std::fs::rename(&partial, &executable).map_err(Error::io("write", &executable))?;
        }
        let entry = Entry { name: unit.name.clone(), certificate: certificate.clone() };
        self.write(&known, &serde_json::to_vec_pretty(&entry).map_err(Error::runtime("writing JSON"))?)?;
        Ok(Answer::Certified(Box::new(certificate)))
    }

    fn executable(&self, unit: &Unit) -> Option<PathBuf> {
        let path = self.file(&self.key(unit).ok()?, "pjrt");
        path.is_file().then_some(path)
    }
}

impl Compile for Cached {
    fn certificate(&self, topology: &str, name: &str, module: Vec<u8>) -> Result<Certificate> {
        let unit = Unit { name: name.into(), module, topology: topology.into(), replicas: 1, how: How::Profiled };
        match Compiler::compile(self, &unit)? {
            Answer::Certified(certificate) => Ok(*certificate),
            Answer::Failed(problem) => {
                let fix = "raise the time limit (--timeout), or use smaller tiles".into();
                Err(Error::Plugin { plugin: "tpu".into(), problem, fix })
            }
        }
    }
}

/// The cache of this user: `$XDG_CACHE_HOME/pagoda`, or `~/.cache/pagoda`.
///
/// # Errors
/// When neither is known.
pub fn user_cache() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let absolute = set("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    let folder = absolute.or_else(|| Some(set("HOME")?.join(".cache"))).map(|cache| cache.join("pagoda"));
    folder.ok_or_else(|| Error::setting("--cache", "none", "and there is no HOME to keep it in", "name a folder"))
}

/// A program that no device has the memory for: what the compiler says of it is how much there is.
///
/// # Errors
/// None, unless MLIR fails.
pub fn memory_probe(topology: &str) -> Result<Unit> {
    let context = Context::new();
    let module = Module::new(&context, "memory");
    // 1 TiB each.
    let array = TensorType::new(Element::F32, &[1 << 19, 1 << 19]);
    module.function("main", std::slice::from_ref(&array), |b, args| {
        Ok(vec![b.add(args[0], b.splat(Element::F32, &array.dims, 1.0)?)?])
    })?;
    let module = module.bytecode().to_vec();
    Ok(Unit { name: "memory of a device".into(), module, topology: topology.into(), replicas: 1, how: How::Plain })
}

/// A sum of `f32[rows, hidden]` over each replica of a mesh, in one program over all of its devices.
///
/// # Errors
/// None, unless MLIR fails.
pub fn all_reduce(topology: &str, mesh: Mesh, rows: usize, hidden: usize) -> Result<Unit> {
    let context = Context::new();
    let module = Module::replicated(&context, "all_reduce", mesh.devices());
    let array = TensorType::new(Element::F32, &[rows, hidden]);
    module.function("main", &[array], |b, args| Ok(vec![b.all_reduce_sum(args[0], &ReplicaGroups(mesh.groups()))?]))?;
    let name = format!("all-reduce of {rows} x {hidden}, {mesh}");
    let module = module.bytecode().to_vec();
    Ok(Unit { name, module, topology: topology.into(), replicas: mesh.devices(), how: How::Profiled })
}

/// What a step gathers over a mesh's shards to choose tokens, alone: of `rows` rows `columns` f32 each, joined in the order of
/// the shards.
///
/// # Errors
/// None, unless MLIR fails.
pub fn gather(topology: &str, shards: usize, rows: usize, columns: usize) -> Result<Unit> {
    let context = Context::new();
    let module = Module::replicated(&context, "gather", shards);
    let array = TensorType::new(Element::F32, &[rows, columns]);
    module.function("main", &[array], |b, args| {
        let part = b.reshape(args[0], &[1, rows, columns])?;
        let all = b.transpose(b.all_gather(part, 0, &ReplicaGroups::all(shards))?, &[1, 0, 2])?;
        Ok(vec![b.reshape(all, &[rows, shards * columns])?])
    })?;
    let name = format!("gather of {rows} x {columns} over {shards}");
    let module = module.bytecode().to_vec();
    Ok(Unit { name, module, topology: topology.into(), replicas: shards, how: How::Profiled })
}

/// What hosts need to know of a folder of executables.
#[derive(Debug, Serialize)]
pub struct Manifest {
    /// The compiler that wrote them; the host's must be the same.
    pub compiler: String,
    /// The programs.
    pub programs: Vec<ManifestEntry>,
}

/// An executable of a [`Manifest`].
#[derive(Debug, Serialize)]
pub struct ManifestEntry {
    /// `prefill` or `decode`.
    pub program: &'static str,
    /// Its file.
    pub file: String,
    /// What it is compiled for.
    pub topology: String,
    /// Devices of one replica.
    pub replicas: usize,
}
