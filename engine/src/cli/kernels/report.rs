//! The report of `pagoda run`: a few lines for people, JSON for machines.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use pagoda_ir::tile_machine::{Counters, Counts, Fault};
use pagoda_ir::{HostTensor, TensorType};
use pagoda_kernels::vmem::Bytes;
use serde::Serialize;

use super::explain::Explanation;
use super::operands::Name;
use super::results::{Expectation, ResultArgs};
use crate::cli::{print, print_json};
use crate::error::Result;

/// What a result is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(super) enum Against {
    /// The kernel's StableHLO form on a PJRT plugin.
    Stablehlo,
    /// The independent reference in f64.
    Reference,
}

impl Against {
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Stablehlo => "its StableHLO form",
            Self::Reference => "the reference in f64",
        }
    }
}

/// The report of one run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// The kernel, or the module's file.
    pub(super) kernel: String,
    /// Where it ran: `tile machine` or a plugin's platform.
    pub(super) on: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) dma: Option<String>,
    /// How the operands came about.
    pub(super) inputs: String,
    /// How often the program around it called it, if not once; counters are of all calls, results of the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) runs: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) counters: Option<Counters>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) counts: Option<Counts>,
    /// The counts for people.
    #[serde(skip)]
    pub(super) page: Option<String>,
    pub(super) outputs: Vec<Output>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) fault: Option<Box<Fault>>,
    /// What the fault comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) explanation: Option<Explanation>,
    /// The result depends on when DMAs land.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) order_dependent: Option<String>,
    /// The module declares other VMEM buffers than its plan.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) unplanned: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) check: Option<Check>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) expectations: Vec<Expectation>,
}

impl Report {
    /// The report of something that has not run.
    pub(super) fn new(kernel: &str, on: &str, inputs: String) -> Self {
        Self {
            kernel: kernel.to_owned(),
            on: on.to_owned(),
            dma: None,
            inputs,
            runs: None,
            counters: None,
            counts: None,
            page: None,
            outputs: vec![],
            fault: None,
            explanation: None,
            order_dependent: None,
            unplanned: None,
            check: None,
            expectations: vec![],
        }
    }

    /// Describes the results, writes them and holds them against what is expected, as far as that is wanted.
    ///
    /// # Errors
    /// Those of [`ResultArgs`].
    pub(super) fn finish(
        &mut self,
        wanted: &ResultArgs,
        prefix: &str,
        names: &[Name],
        results: &[HostTensor],
    ) -> Result<()> {
        self.outputs = names.iter().zip(results).map(|(name, array)| Output::of(&name.name, array)).collect();
        for (output, file) in self.outputs.iter_mut().zip(wanted.write(prefix, names, results)?) {
            output.file = Some(file);
        }
        self.expectations = wanted.compare(names, results)?;
        Ok(())
    }
}

/// One result.
#[derive(Debug, Serialize)]
pub(super) struct Output {
    name: String,
    r#type: String,
    min: f64,
    max: f64,
    mean: f64,
    nan: usize,
    /// FNV-1a of the bytes: equal for equal results.
    checksum: String,
    /// Where it was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
}

/// The outcome of the comparison.
#[derive(Debug, Serialize)]
pub(super) struct Check {
    pub(super) against: Against,
    pub(super) agrees: bool,
    pub(super) message: String,
}

impl Output {
    pub(super) fn of(name: &str, array: &HostTensor) -> Self {
        let values = array.to_f64();
        let numbers = || values.iter().copied().filter(|value| !value.is_nan());
        let count = numbers().count();
        let fnv1a = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        Self {
            name: name.to_owned(),
            r#type: TensorType::new(array.element(), array.dims()).to_string(),
            min: numbers().fold(f64::INFINITY, f64::min),
            max: numbers().fold(f64::NEG_INFINITY, f64::max),
            mean: numbers().sum::<f64>() / count as f64,
            nan: values.len() - count,
            checksum: format!("{:016x}", array.bytes().iter().fold(0xcbf2_9ce4_8422_2325, fnv1a)),
            file: None,
        }
    }
}

/// Prints the reports; succeeds when nothing faulted and everything compared agrees.
pub(super) fn print_reports(reports: &[Report], json: bool) -> Result<ExitCode> {
    if json {
        print_json(reports)?;
    } else {
        print(&reports.iter().map(table).collect::<Vec<_>>().join("\n"))?;
    }
    let mut works = true;
    for report in reports {
        if let Some(fault) = &report.fault {
            eprintln!("error: {fault}");
            report.explanation.iter().for_each(|explanation| eprintln!("{}", explanation.text()));
            works = false;
        }
        for message in report.order_dependent.iter().chain(&report.unplanned) {
            eprintln!("error: {}: {message}", report.kernel);
            works = false;
        }
        if let Some(check) = report.check.as_ref().filter(|check| !check.agrees) {
            eprintln!("error: differs from {}: {}", check.against.describe(), check.message);
            works = false;
        }
        for wrong in report.expectations.iter().filter(|expectation| !expectation.agrees) {
            eprintln!("error: {}: not as expected: {wrong}", report.kernel);
            wrong.explanation.iter().for_each(|explanation| eprintln!("{}", explanation.text()));
            works = false;
        }
    }
    Ok(if works { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn table(report: &Report) -> String {
    let Report { kernel, on, inputs, .. } = report;
    let dma = report.dma.as_ref().map_or(String::new(), |dma| format!(", DMAs {dma}"));
    let runs = report.runs.map_or(String::new(), |runs| format!(", called {runs} times"));
    let mut lines = vec![format!("{kernel} on {on}{dma}{runs}"), format!("  {:<8} {inputs}", "inputs")];
    for Output { name, r#type, min, max, mean, nan, checksum, file } in &report.outputs {
        let nan = if *nan > 0 { format!(", {nan} NaN") } else { String::new() };
        lines.push(format!(
            "  {name:<8} {type}: min {min:.4}, max {max:.4}, mean {mean:.4}{nan}, checksum {checksum}",
            type = r#type
        ));
        lines.extend(file.iter().map(|file| format!("  {:<8} {}", "", file.display())));
    }
    if let Some(counters) = &report.counters {
        let Counters { grid_steps, ops, hbm_bytes_read, hbm_bytes_written, copies, mxu_flops, vmem_bytes } = *counters;
        lines.push(format!(
            "  {:<8} {grid_steps} grid steps, {ops} ops, {copies} DMAs, {} read, {} written, {:.3} Gflop on the matrix \
             unit, {} of VMEM",
            "counted",
            Bytes(hbm_bytes_read),
            Bytes(hbm_bytes_written),
            mxu_flops as f64 / 1e9,
            Bytes(vmem_bytes as u64)
        ));
    }
    if let Some(check) = report.check.as_ref().filter(|check| check.agrees) {
        lines.push(format!("  {:<8} agrees with {}: {}", "check", check.against.describe(), check.message));
    }
    let agreed = report.expectations.iter().filter(|expectation| expectation.agrees);
    lines.extend(agreed.map(|expectation| format!("  {:<8} as expected: {expectation}", "check")));
    lines.extend(report.page.clone());
    lines.join("\n")
}
