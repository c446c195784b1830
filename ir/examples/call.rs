//! Runs one call of a Mosaic kernel that stands in a folder, for `scripts/jax_suite.py` and
//! `scripts/interpreters.py`:
//!
//! - `config.json`: the call's `backend_config`;
//! - `call.json`: the types of its operands and results, `[["bf16", [8, 128]], ...]`, the pairs that share memory, on how many
//!   devices it runs, how often to run it again for time, if at all (`repeat`: `times` in seconds), and whether it is known to
//!   race (`races`: the fault is reported, and then ignored in the order of DMAs that comes out right);
//! - `operands.bin`: the operands, row-major, one after another; device by device.
//!
//! Writes `results.bin` and prints one line of JSON: how far it got (`opened`, `decoded`, `ran`), the error, and which kinds
//! of faults had to be ignored, and because of which faults. Each kind is ignored only after a run that it ended. Without an
//! argument it does so for every line of its input that names a folder.

use std::{fs, path::Path, process::ExitCode, time::Instant};

use pagoda_ir::{
    Context, Element, HostTensor, TensorType,
    mosaic::wire,
    tile_machine::{DmaOrder, FaultKind, Machine, Program},
};
use serde_json::{Value, json};

/// What a kernel may do on purpose: read and leave what nobody wrote, use an output as scratch memory, and load a scalar from
/// beyond an array to select another.
const IGNORABLE: [FaultKind; 4] =
    [FaultKind::UnwrittenRead, FaultKind::OutputNeverWritten, FaultKind::ParallelOverlap, FaultKind::OutOfBounds];

/// What a kernel with a race that is known is let off with, once it was named.
const RACES: [FaultKind; 3] = [FaultKind::OverwriteInFlight, FaultKind::ReadInFlight, FaultKind::DeviceRace];

fn main() -> ExitCode {
    let folders: Box<dyn Iterator<Item = String>> = match std::env::args().nth(1) {
        Some(folder) => Box::new(std::iter::once(folder)),
        None => Box::new(std::io::stdin().lines().map_while(Result::ok)),
    };
    for folder in folders {
        match run(Path::new(&folder)) {
            Ok(report) => println!("{report}"),
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::from(2);
            }
        }
    }
    ExitCode::SUCCESS
}

fn run(folder: &Path) -> Result<Value, Box<dyn std::error::Error>> {
    let config = fs::read_to_string(folder.join("config.json"))?;
    let call: Value = serde_json::from_str(&fs::read_to_string(folder.join("call.json"))?)?;
    let (operands, results) = (types(&call["operands"])?, types(&call["results"])?);
    let aliases: Vec<(usize, usize)> = serde_json::from_value(call["aliases"].clone())?;

    let context = Context::new();
    let opened = match wire::open(&context, &config) {
        Ok(opened) => opened,
        Err(error) => return Ok(json!({ "got": "nowhere", "error": error.to_string() })),
    };
    let program = match Program::decode(&opened.module) {
        Ok(program) => program.with_aliases(&aliases),
        Err(error) => return Ok(json!({ "got": "opened", "error": error.to_string() })),
    };

    let bytes = fs::read(folder.join("operands.bin"))?;
    let mut rest = bytes.as_slice();
    let devices = call["devices"].as_u64().unwrap_or(1);
    let mut inputs = vec![];
    for _ in 0..devices {
        let mut own = vec![];
        for ty in &operands {
            let (data, after) = rest.split_at_checked(ty.bytes()).ok_or("operands.bin is too short")?;
            own.push(HostTensor::from_bytes(ty.element, &ty.dims, data));
            rest = after;
        }
        inputs.push(own);
    }
    let mut machine = Machine::default();
    machine.vmem_bytes = opened.vmem_limit.unwrap_or(machine.vmem_bytes);
    if let Some(bytes) = call["vmem_bytes"].as_u64() {
        machine.vmem_bytes = machine.vmem_bytes.max(bytes as usize);
    }
    let (mut ignored, mut because, mut outputs) = (vec![], vec![], None::<Vec<HostTensor>>);
    let began = Instant::now();
    let mut seconds = 0.0;
    let races = call["races"].as_bool().unwrap_or(false);
    let mut race = None;
    for dma in [DmaOrder::Late, DmaOrder::Early, DmaOrder::Random(1)] {
        machine.dma = dma;
        let ran = loop {
            let ran = match inputs.as_slice() {
                [inputs] => program.run(&machine, inputs, &results).map(|run| vec![run]),
                inputs => program.run_devices(&machine, inputs, &results),
            };
            match ran {
                Ok(runs) => break runs.into_iter().flat_map(|run| run.outputs).collect::<Vec<_>>(),
                Err(fault) if IGNORABLE.contains(&fault.kind) && !ignored.contains(&fault.kind.name()) => {
                    ignored.push(fault.kind.name());
                    because.push(fault.to_string());
                    machine = machine.ignoring(fault.kind);
                }
                Err(fault) if races && RACES.contains(&fault.kind) && !machine.ignored.contains(fault.kind) => {
                    race.get_or_insert(fault.to_string());
                    machine = machine.ignoring(fault.kind);
                    machine.dma = DmaOrder::Early;
                }
                Err(fault) => {
                    let kind = fault.kind.name();
                    return Ok(
                        json!({ "got": "decoded", "fault": kind, "error": fault.to_string(), "ignored": ignored,
                        "because": because }),
                    );
                }
            }
        };
        match &outputs {
            None => {
                seconds = began.elapsed().as_secs_f64();
                outputs = Some(ran);
            }
            // What is unwritten may differ from order to order; where nothing is, nothing may.
            Some(first) if ignored.is_empty() && *first != ran => {
                return Ok(
                    json!({ "got": "decoded", "fault": "order", "error": "the order of DMAs shows in the results" }),
                );
            }
            Some(_) => {}
        }
        if race.is_some() {
            break;
        }
    }
    machine.dma = DmaOrder::Late;
    let again = (0..call["repeat"].as_u64().unwrap_or(0)).map(|_| {
        let began = Instant::now();
        let ran = match inputs.as_slice() {
            [inputs] => program.run(&machine, inputs, &results).map(drop),
            inputs => program.run_devices(&machine, inputs, &results).map(drop),
        };
        ran.map(|()| began.elapsed().as_secs_f64()).map_err(|fault| fault.to_string())
    });
    let times = again.collect::<Result<Vec<f64>, String>>()?;
    let bytes: Vec<u8> = outputs.iter().flatten().flat_map(|output| output.bytes().iter().copied()).collect();
    fs::write(folder.join("results.bin"), bytes)?;
    Ok(
        json!({ "got": "ran", "ignored": ignored, "because": because, "race": race, "seconds": seconds, "times": times }),
    )
}

fn types(list: &Value) -> Result<Vec<TensorType>, Box<dyn std::error::Error>> {
    let pairs: Vec<(Element, Vec<usize>)> = serde_json::from_value(list.clone())?;
    Ok(pairs.into_iter().map(|(element, dims)| TensorType { element, dims }).collect())
}
