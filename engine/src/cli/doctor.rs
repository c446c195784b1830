//! `pagoda doctor`: what is installed, where, and whether it answers.

use serde::Serialize;

use super::{print, print_json};
use crate::error::Result;
use crate::pjrt::{Kind, Plugin, PluginChoice};

/// What is known of one plugin.
#[derive(Debug, Serialize)]
struct PluginReport {
    plugin: &'static str,
    path: Option<String>,
    found_in: Option<String>,
    api: Option<String>,
    platform: Option<String>,
    devices: Vec<String>,
    /// Why it is not there, or does not work.
    problem: Option<String>,
}

impl PluginReport {
    fn of(kind: Kind) -> Self {
        let mut report = Self {
            plugin: kind.name(),
            path: None,
            found_in: None,
            api: None,
            platform: None,
            devices: Vec::new(),
            problem: None,
        };
        if let Err(error) = report.fill(kind) {
            report.problem = Some(error.to_string());
        }
        report
    }

    fn fill(&mut self, kind: Kind) -> crate::pjrt::Result<()> {
        let found = kind.locate()?;
        self.path = Some(found.path.display().to_string());
        self.found_in = Some(found.source.to_string());
        if kind == Kind::Tpu {
            // Loading libtpu where no TPU is would print, lock and wait: it is for `pagoda certify`, in its own process.
            self.problem = Some("compiler only: not loaded here".into());
            return Ok(());
        }
        let plugin = Plugin::load(&PluginChoice::Named(kind))?;
        let (major, minor) = plugin.version();
        self.api = Some(format!("{major}.{minor}"));
        let client = plugin.client(1)?;
        self.platform = Some(format!("{} {}", client.platform(), client.platform_version()));
        self.devices = client.describe_devices();
        Ok(())
    }
}

/// Prints the report; whether the embedded default, the CPU plugin, works.
///
/// # Errors
/// When standard output cannot be written.
pub fn doctor(json: bool) -> Result<bool> {
    let reports = Kind::ALL.map(PluginReport::of);
    let works = reports.iter().any(|report| report.plugin == "cpu" && report.problem.is_none());
    if json {
        let value = serde_json::json!({ "version": env!("CARGO_PKG_VERSION"), "plugins": reports });
        print_json(&value)?;
        return Ok(works);
    }
    let mut lines = vec![format!("pagoda {}", env!("CARGO_PKG_VERSION"))];
    for report in &reports {
        lines.push(format!("\n{}", report.plugin));
        let mut line = |name: &str, value: &Option<String>| {
            lines.extend(value.iter().map(|value| format!("  {name:<9} {value}")));
        };
        line("library", &report.path);
        line("found in", &report.found_in);
        line("PJRT API", &report.api);
        line("platform", &report.platform);
        line("devices", &(!report.devices.is_empty()).then(|| report.devices.join(", ")));
        line("note", &report.problem);
    }
    print(&lines.join("\n"))?;
    Ok(works)
}
