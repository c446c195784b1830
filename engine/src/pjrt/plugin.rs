//! Finding and loading PJRT plugins.
//!
//! A plugin is named `cpu`, `cuda` or `tpu`, or given as a path. A named one is looked for, in this order:
//! the environment (`PAGODA_PLUGIN_CPU`, ... and, for the TPU, `TPU_LIBRARY_PATH`), the project's plugin folder
//! (`.pagoda/plugins` in the working folder, the executable's folder, or any folder above either), and the
//! site-packages of the active virtual environment. What was found where is reported, never guessed at twice.
//!
//! Plugins are loaded once per path and stay loaded for the life of the process: none of them supports unloading.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use pjrt::Api;
use pjrt_sys::PJRT_Api;

use super::abi;
use super::error::{Error, Result};
use super::table::Table;

/// Which plugin to use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PluginChoice {
    /// A known kind, to be searched for.
    Named(Kind),
    /// A shared library.
    Path(PathBuf),
}

/// The known kinds of plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// XLA's CPU plugin (wheel `xla-cpu-pjrt`): the embedded default.
    Cpu,
    /// XLA's CUDA plugin (wheels `jax-cuda12-pjrt`, `jax-cuda13-pjrt`).
    Cuda,
    /// The TPU compiler and runtime (wheel `libtpu`).
    Tpu,
}

impl Kind {
    /// Every known kind.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Cuda, Self::Tpu];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Tpu => "tpu",
        }
    }

    /// Environment variables that name the library, the first set one wins.
    pub const fn variables(self) -> &'static [&'static str] {
        match self {
            Self::Cpu => &["PAGODA_PLUGIN_CPU"],
            Self::Cuda => &["PAGODA_PLUGIN_CUDA"],
            Self::Tpu => &["PAGODA_PLUGIN_TPU", "TPU_LIBRARY_PATH"],
        }
    }

    /// Where the wheels put the library, below site-packages.
    const fn in_site_packages(self) -> &'static [&'static str] {
        match self {
            Self::Cpu => &["xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so"],
            Self::Cuda => &["jax_plugins/xla_cuda13/xla_cuda_plugin.so", "jax_plugins/xla_cuda12/xla_cuda_plugin.so"],
            Self::Tpu => &["libtpu/libtpu.so"],
        }
    }

    const fn remedy(self) -> &'static str {
        match self {
            Self::Cpu => "run `make setup`, or point PAGODA_PLUGIN_CPU at xla_cpu_pjrt.so (wheel xla-cpu-pjrt)",
            Self::Cuda => {
                "install jax-cuda13-pjrt into the active venv, or point PAGODA_PLUGIN_CUDA at xla_cuda_plugin.so"
            }
            Self::Tpu => "run `make tpu-tools`, or point PAGODA_PLUGIN_TPU at libtpu.so (wheel libtpu)",
        }
    }

    /// Where this kind's library is, if it can be found.
    ///
    /// # Errors
    /// When an environment variable names a file that does not exist, or nothing was found; both name the remedy.
    pub fn locate(self) -> Result<Found> {
        for &variable in self.variables() {
            if let Some(value) = std::env::var_os(variable).filter(|value| !value.is_empty()) {
                let path = PathBuf::from(value);
                return if path.is_file() {
                    Ok(Found { path, source: Source::Environment(variable) })
                } else {
                    Err(Error::Missing {
                        what: format!("{variable} = {}: no such file", path.display()),
                        remedy: self.remedy(),
                    })
                };
            }
        }
        let mut tried = Vec::new();
        for (folder, source) in folders() {
            for below in self.in_site_packages() {
                let path = folder.join(below);
                if path.is_file() {
                    return Ok(Found { path, source });
                }
                tried.push(path);
            }
        }
        let searched = tried.len();
        Err(Error::Missing {
            what: format!(
                "plugin `{}` was not found in {searched} places (environment, .pagoda/plugins, site-packages)",
                self.name()
            ),
            remedy: self.remedy(),
        })
    }
}

impl PluginChoice {
    /// Reads a name (`cpu`, `cuda`, `tpu`) or a path.
    ///
    /// # Errors
    /// When `text` is neither a known name nor an existing file.
    pub fn parse(text: &str) -> Result<Self> {
        if let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.name() == text) {
            return Ok(Self::Named(kind));
        }
        let path = PathBuf::from(text);
        if path.is_file() {
            Ok(Self::Path(path))
        } else {
            Err(Error::Missing {
                what: format!("plugin `{text}` is neither cpu, cuda or tpu nor a file"),
                remedy: "name one of these, or give the path of a PJRT plugin's shared library",
            })
        }
    }

    /// The library's path and how it was found.
    ///
    /// # Errors
    /// As [`Kind::locate`].
    pub fn locate(&self) -> Result<Found> {
        match self {
            Self::Named(kind) => kind.locate(),
            Self::Path(path) => Ok(Found { path: path.clone(), source: Source::Given }),
        }
    }
}

/// A plugin's library on disk.
#[derive(Clone, Debug)]
pub struct Found {
    /// The shared library.
    pub path: PathBuf,
    /// How it was found.
    pub source: Source,
}

/// How a plugin was found.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// Its path was given.
    Given,
    /// In this environment variable.
    Environment(&'static str),
    /// In the project's plugin folder.
    Project,
    /// In the active virtual environment.
    Venv,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Given => f.write_str("given path"),
            Self::Environment(variable) => f.write_str(variable),
            Self::Project => f.write_str(".pagoda/plugins"),
            Self::Venv => f.write_str("active venv"),
        }
    }
}

/// The folders laid out like site-packages, in search order.
fn folders() -> Vec<(PathBuf, Source)> {
    let executable = std::env::current_exe().ok().and_then(|path| path.parent().map(Path::to_path_buf));
    let starts = [std::env::current_dir().ok(), executable];
    let mut folders: Vec<(PathBuf, Source)> = starts
        .iter()
        .flatten()
        .flat_map(|start| start.ancestors())
        .map(|folder| (folder.join(".pagoda/plugins"), Source::Project))
        .filter(|(folder, _)| folder.is_dir())
        .collect();
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        let Some(root) = std::env::var_os(variable) else { continue };
        let Ok(entries) = std::fs::read_dir(Path::new(&root).join("lib")) else { continue };
        let mut pythons: Vec<PathBuf> = entries.flatten().map(|entry| entry.path().join("site-packages")).collect();
        pythons.sort();
        folders.extend(pythons.into_iter().filter(|folder| folder.is_dir()).map(|folder| (folder, Source::Venv)));
    }
    folders
}

/// A loaded plugin. Cheap to clone.
#[derive(Clone)]
pub struct Plugin {
    found: Found,
    api: Api,
    table: Table,
    version: (i32, i32),
}

impl Plugin {
    /// Finds and loads a plugin; a second load of the same file gives the same plugin.
    ///
    /// # Errors
    /// When it is not found, is not a shared library, exports no `GetPjrtApi`, or speaks an incompatible version.
    pub fn load(choice: &PluginChoice) -> Result<Self> {
        static LOADED: OnceLock<Mutex<HashMap<PathBuf, Plugin>>> = OnceLock::new();
        let found = choice.locate()?;
        let key = found.path.canonicalize().unwrap_or_else(|_| found.path.clone());
        let mut loaded = LOADED.get_or_init(Mutex::default).lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(plugin) = loaded.get(&key) {
            return Ok(plugin.clone());
        }
        let plugin = Self::open(found)?;
        loaded.insert(key, plugin.clone());
        Ok(plugin)
    }

    fn open(found: Found) -> Result<Self> {
        let refuse = |why: String| Error::NoPlugin { path: found.path.clone(), why };
        // SAFETY: loading a library runs its initialisers; that is what the user asked for by naming a plugin.
        let library = unsafe { libloading::Library::new(&found.path) }.map_err(|error| refuse(error.to_string()))?;
        // A plugin's threads and static state outlive any handle: it is never unloaded.
        let library = Box::leak(Box::new(library));
        // SAFETY: `GetPjrtApi` has this signature in every version of the API.
        let table = unsafe {
            let get = library
                .get::<unsafe extern "C" fn() -> *const PJRT_Api>(b"GetPjrtApi\0")
                .map_err(|_| refuse("it exports no GetPjrtApi".into()))?;
            abi::adapt(get()).map_err(|error| refuse(error.to_string()))?
        };
        let version = (table.pjrt_api_version.major_version, table.pjrt_api_version.minor_version);
        let table: &'static PJRT_Api = Box::leak(Box::new(table));
        let api = Api::wrap(table);
        // SAFETY: the table is the plugin's own, which is never unloaded, adapted to the structs of `pjrt-sys`.
        Ok(Self { found, api, table: unsafe { Table::new(table) }, version })
    }

    /// Where the library is and how it was found.
    pub fn found(&self) -> &Found {
        &self.found
    }

    /// The plugin's own PJRT API version, (major, minor).
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Crate `pjrt`'s view of the plugin, through the adapted table.
    pub(crate) fn api(&self) -> &Api {
        &self.api
    }

    pub(super) fn table(&self) -> Table {
        self.table
    }
}

impl fmt::Debug for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.version;
        let here = std::env::current_dir().unwrap_or_default();
        let path = self.found.path.strip_prefix(here).unwrap_or(&self.found.path);
        write!(f, "{} (PJRT {major}.{minor})", path.display())
    }
}
