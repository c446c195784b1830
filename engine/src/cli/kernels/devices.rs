//! `pagoda run --devices N`: kernels that send to each other, on several simulated devices in this process.
//!
//! Operands and results of all devices are one array whose leading dimension runs over the devices, as a `shard_map` over it has
//! them; an operand may also be the same for all, or be given device by device. The module around a kernel is not run.

use pagoda_ir::mosaic::Role;
use pagoda_ir::tile_machine::{Cell, Machine, Program};
use pagoda_ir::{Context, HostTensor, TensorType};

use super::arrays;
use super::explain::{Explanation, Known, again};
use super::file::File;
use super::operands::{Given, Name, ensure_fits, operands};
use super::report::Report;
use super::run::{RunArgs, Running, inputs_line, order_name, unknown_op, with_authors_names};
use crate::error::{Error, Result};

/// The most devices: each has a thread and memories of its own.
const MOST: usize = 256;

/// `8`, or a mesh of them such as `2x4`, whose device ids are row-major.
pub(super) fn parse(text: &str) -> std::result::Result<usize, String> {
    let sizes = text.split('x').map(|size| size.parse::<usize>().ok().filter(|&size| size > 0));
    let count = sizes.collect::<Option<Vec<_>>>().and_then(|sizes| {
        sizes.into_iter().try_fold(1_usize, |count, size| count.checked_mul(size)).filter(|&count| count <= MOST)
    });
    count.ok_or_else(|| format!("give 1 to {MOST} devices, or a mesh of them such as 2x4"))
}

/// How many devices a StableHLO module is for, as far as it says so.
pub(super) fn of_module(module: &[u8]) -> Option<usize> {
    let text = std::str::from_utf8(module).ok()?;
    let number = |key: &str| {
        let (_, rest) = text.split_once(key)?;
        let digits = rest.trim_start().chars().take_while(char::is_ascii_digit).collect::<String>();
        digits.parse::<usize>().ok()
    };
    let count = number("mhlo.num_partitions =")?.checked_mul(number("mhlo.num_replicas =").unwrap_or(1))?;
    (1..=MOST).contains(&count).then_some(count)
}

/// The array that has those of all devices one after another.
fn of_all(ty: &TensorType, devices: usize) -> TensorType {
    match ty.dims.split_first() {
        Some((leading, rest)) => {
            let leading = leading.saturating_mul(devices);
            TensorType { element: ty.element, dims: std::iter::once(leading).chain(rest.iter().copied()).collect() }
        }
        None => TensorType::new(ty.element, &[devices]),
    }
}

fn split(all: &HostTensor, ty: &TensorType) -> Vec<HostTensor> {
    let parts = all.bytes().chunks_exact(ty.len() * ty.element.bytes());
    parts.map(|bytes| HostTensor::from_bytes(ty.element, &ty.dims, bytes)).collect()
}

/// The operands of every device.
fn all_operands(
    args: &RunArgs,
    given: &Given,
    names: &[Name],
    types: &[TensorType],
    devices: usize,
) -> Result<Vec<Vec<HostTensor>>> {
    // `x` is of all devices, or the same for each, as its file says; `x@2` is of one.
    let of_file = |(name, ty): (&Name, &TensorType)| match given.file(names, name).map(arrays::sizes) {
        Some(sizes) if sizes.as_ref().is_some_and(|sizes| *sizes == ty.dims) => ty.clone(),
        _ => of_all(ty, devices),
    };
    let mut all_types: Vec<TensorType> = names.iter().zip(types).map(of_file).collect();
    let mut all_names = names.to_vec();
    for device in 0..devices {
        let of_device = |name: &Name| Name {
            name: format!("{}@{device}", name.name),
            alias: name.alias.as_ref().map(|alias| format!("{alias}@{device}")),
        };
        all_names.extend(names.iter().map(of_device));
        all_types.extend_from_slice(types);
    }
    ensure_fits(&all_types[..names.len()])?;
    let mut given = given.arrays(&all_names, &all_types, args.random)?;
    let of_devices = given.split_off(names.len());
    let mut found: Vec<Vec<HostTensor>> = vec![vec![]; devices];
    for (at, shared) in given.into_iter().enumerate() {
        let shared = match shared {
            Some(array) if array.dims() == types[at].dims && all_types[at] == types[at] => Some(vec![array; devices]),
            Some(array) => Some(split(&array, &types[at])),
            None => None,
        };
        for (device, found) in found.iter_mut().enumerate() {
            let own = of_devices[device * names.len() + at].clone();
            let array = match own.or_else(|| shared.as_ref().map(|shared| shared[device].clone())) {
                Some(array) => array,
                None => {
                    // A sequence of its own for each operand of each device.
                    let seed = args.random.wrapping_add(1 + (device * names.len() + at) as u64);
                    let drawn = operands(&Given::nothing(), &names[at..=at], &types[at..=at], seed)?;
                    drawn.into_iter().next().expect("one operand")
                }
            };
            found.push(array);
        }
    }
    Ok(found)
}

/// The kernels of `file`, each on operands of its own.
pub(super) fn run(
    args: &RunArgs,
    running: &Running,
    given: &Given,
    file: &File,
    devices: usize,
) -> Result<Vec<Report>> {
    running.unwatched()?;
    let context = Context::new();
    let mut reports = vec![];
    for (at, (opened, call)) in file.chosen_kernels(&context, args.only)? {
        let program = Program::decode(&opened.module).map_err(|error| unknown_op(&file.path, error))?;
        let Some((call, (types, results))) = call.and_then(|call| Some((call, call.types.as_ref()?))) else {
            let problem = "the sizes of its arrays do not stand in it";
            return Err(Error::file(&file.path, problem, "give the StableHLO module around it, as text"));
        };
        let (program, names) = with_authors_names(args, at, program, results.len())?;
        let program = program.with_aliases(&call.aliases).with_unused_outputs(&call.unused);
        let of_all_results: Vec<TensorType> = results.iter().map(|ty| of_all(ty, devices)).collect();
        ensure_fits(&of_all_results)?;
        let operands = all_operands(args, given, &names, types, devices)?;
        let signature = program.signature().clone().with_outputs(results.len());
        let inputs = format!("{}; {devices} devices", inputs_line(args, given, None));
        let mut report = Report::new(&signature.name, "tile machine", inputs);
        let default = Machine::default();
        let machine = Machine { vmem_bytes: opened.vmem_limit.unwrap_or(default.vmem_bytes), ..default };
        let mut done: Vec<String> = vec![];
        let mut first: Option<Vec<HostTensor>> = None;
        for &dma in running.orders() {
            let machine = running.machine(machine, dma);
            done.push(order_name(dma));
            match program.run_devices(&machine, &operands, results) {
                Err(fault) => {
                    let known = Known { signature: &signature, frames: program.frames(), call: &call.frames };
                    let cell = fault.cell.map(|(buffer, offset)| Cell::Buffer { buffer, offset });
                    let history = cell.map_or_else(Vec::new, |cell| {
                        let of = [fault.device.unwrap_or(0), fault.core];
                        program.history_of_device(&machine, &operands, results, of, cell)
                    });
                    report.explanation = Some(Explanation::of_fault(&fault, &known, history, again(dma)));
                    (report.dma, report.fault) = (done.pop(), Some(fault));
                    break;
                }
                Ok(runs) => {
                    let all = (0..results.len()).map(|result| {
                        let ty = &of_all_results[result];
                        let bytes = runs.iter().flat_map(|run| run.outputs[result].bytes().iter().copied());
                        HostTensor::from_bytes(ty.element, &ty.dims, &bytes.collect::<Vec<u8>>())
                    });
                    let all: Vec<HostTensor> = all.collect();
                    report.counters.get_or_insert(runs[0].counters);
                    if first.as_ref().is_some_and(|first| *first != all) {
                        let order = order_name(dma);
                        let message = format!("the results differ between {} and {order} DMAs", done[0]);
                        report.order_dependent = Some(message);
                        break;
                    }
                    first = Some(all);
                }
            }
        }
        if report.fault.is_none() {
            report.dma = Some(done.join(", "));
        }
        if let Some(all) = first.filter(|_| report.fault.is_none()) {
            let outputs = signature.arguments.iter().filter(|argument| argument.role == Role::Output);
            let names: Vec<Name> = outputs.map(|argument| Name::new(&argument.name)).collect();
            let prefix = if file.calls().len() > 1 && args.only.is_none() { format!("{at}.") } else { String::new() };
            report.finish(&args.results, &prefix, &names, &all)?;
        }
        reports.push(report);
    }
    Ok(reports)
}

#[cfg(test)]
mod tests {
    use pagoda_ir::Element;

    use super::*;

    #[test]
    fn devices_are_a_number_or_a_mesh() {
        assert_eq!(parse("8"), Ok(8));
        assert_eq!(parse("2x2x4"), Ok(16));
        for wrong in ["0", "x", "2x0", "-1", "257", "2x", "99999999999x99999999999"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        let module = b"module @m attributes {mhlo.num_partitions = 4 : i32, mhlo.num_replicas = 2 : i32} {";
        assert_eq!(of_module(module), Some(8));
        assert_eq!(of_module(b"module @m {"), None);
    }

    #[test]
    fn arrays_of_all_devices_are_one_after_another() {
        let ty = TensorType::new(Element::F32, &[2, 3]);
        assert_eq!(of_all(&ty, 4), TensorType::new(Element::F32, &[8, 3]));
        assert_eq!(of_all(&TensorType::new(Element::I32, &[]), 4), TensorType::new(Element::I32, &[4]));
        let all = HostTensor::new(&[4, 3], &[0.0_f32, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]);
        assert_eq!(split(&all, &ty)[1].as_slice::<f32>(), [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]);
    }
}
