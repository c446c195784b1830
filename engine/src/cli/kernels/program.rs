//! A program around kernels: what XLA does runs on a plugin of the host, each call of a kernel on the tile machine in its place.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pagoda_ir::mosaic::hosted::{self, Hosted};
use pagoda_ir::tile_machine::{Machine, Program};
use pagoda_ir::{Context, HostTensor, TensorType};

use super::super::client;
use super::file::File;
use super::operands::{Given, Name, operands};
use super::report::Report;
use super::run::{Call, RunArgs, Running, compiled, execute, file_name, inputs_line, unknown_op, with_authors_names};
use crate::error::{Error, Result};
use crate::native::{HostCalls, register_all};

/// A call of a kernel in the program.
struct Loaded {
    program: Program,
    machine: Machine,
    frames: Vec<pagoda_ir::mosaic::Frame>,
}

/// What the calls of kernels share with this thread.
struct Kernels {
    running: Running,
    calls: OnceLock<Vec<Loaded>>,
    /// Of each call that ran: how often, and what came of it, the first fault or failure foremost.
    reports: Mutex<BTreeMap<usize, (u64, Report)>>,
}

impl Kernels {
    fn call(
        &self,
        number: usize,
        operands: &[HostTensor],
        results: &[TensorType],
    ) -> std::result::Result<Vec<HostTensor>, String> {
        let loaded = self.calls.get().and_then(|calls| calls.get(number)).ok_or("there is no such call")?;
        let Loaded { program, machine, frames } = loaded;
        let call =
            Call { operands, results, launch: None, inputs: "from the program".into(), prefix: String::new(), frames };
        let executed = execute(&self.running, None, program, *machine, call).map_err(|error| error.to_string())?;
        let failure = executed.report.fault.as_ref().map(ToString::to_string);
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        match reports.get_mut(&number) {
            None => drop(reports.insert(number, (1, executed.report))),
            Some((runs, report)) => {
                *runs += 1;
                let before = report.counters.unwrap_or_default();
                let counters = executed.report.counters.map(|counters| before + counters);
                if report.fault.is_none() && report.order_dependent.is_none() {
                    *report = Report { counters, ..executed.report };
                }
            }
        }
        executed.results.ok_or_else(|| failure.unwrap_or_else(|| "the kernel has no result".to_owned()))
    }
}

/// Runs the program of `file`. The reports of its kernels, in the order of the calls, and then its own.
///
/// # Errors
/// When it cannot be read, or the plugin does not take it or fails.
pub(super) fn run(args: &RunArgs, running: &Running, given: &Given, file: &File) -> Result<Vec<Report>> {
    let context = Context::new();
    let kernels = Arc::new(Kernels { running: running.clone(), calls: OnceLock::new(), reports: Mutex::default() });
    let shared = Arc::clone(&kernels);
    let host = HostCalls::new(Arc::new(move |call, operands, results| shared.call(call, operands, results)));
    let damaged = |error| Error::file(&file.path, error, "give it as text, as jax.export's mlir_module() prints it");
    let Hosted { module, arguments, results, calls } =
        hosted::host(&file.bytes, file.calls(), HostCalls::TARGET, &|call| host.options(call)).map_err(damaged)?;
    let mut loaded = vec![];
    for call in calls {
        // A program may call one kernel several times.
        let mut opened = file.kernels(&context)?;
        let (opened, site) = opened.swap_remove(call.kernel);
        let program = Program::decode(&opened.module).map_err(|error| unknown_op(&file.path, error))?;
        // Names do not depend on how many of the arguments are results, which bytecode does not say here.
        let results = site.and_then(|site| site.types.as_ref()).map_or(0, |(_, results)| results.len());
        let (program, _) = with_authors_names(args, call.kernel, program, results)?;
        let default = Machine::default();
        loaded.push(Loaded {
            program: program.with_aliases(&call.aliases).with_unused_outputs(&call.unused),
            machine: Machine { vmem_bytes: opened.vmem_limit.unwrap_or(default.vmem_bytes), ..default },
            frames: site.map(|site| site.frames.clone()).unwrap_or_default(),
        });
    }
    let _ = kernels.calls.set(loaded);
    let client = client(args.plugin.as_deref().unwrap_or("cpu"), 1)?;
    register_all(client.plugin())?;
    let (names, types): (Vec<_>, Vec<_>) =
        arguments.into_iter().map(|(name, alias, ty)| (Name { name, alias }, ty)).unzip();
    let arrays = operands(given, &names, &types, args.random)?;
    let program = compiled(&client, file, &module)?;
    let outcome = program.call(&arrays);
    let mut reports: Vec<Report> = {
        let mut reports = kernels.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = std::mem::take(&mut *reports).into_values();
        taken.map(|(runs, report)| Report { runs: (runs > 1).then_some(runs), ..report }).collect()
    };
    if reports.iter().any(|report| report.fault.is_some()) {
        reports.retain(|report| report.fault.is_some());
        return Ok(reports);
    }
    let outputs = outcome?;
    let mut report = Report {
        dma: Some(running.orders_text()),
        ..Report::new(
            &file_name(&file.path),
            &format!("{}, its kernels on the tile machine", client.platform()),
            inputs_line(args, given, None),
        )
    };
    let name = |at: usize| Name { name: format!("result{at}"), alias: results.get(at).cloned().flatten() };
    let names: Vec<_> = (0..outputs.len()).map(name).collect();
    report.finish(&args.results, "", &names, &outputs)?;
    reports.push(report);
    Ok(reports)
}
