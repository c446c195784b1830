//! Kernels as text, with what running them must give: every file of `ir/tests/cases/`.
//!
//! A file holds kernels separated by `// -----`. In front of each stand comments and directives:
//!
//! ```text
//! // in f32[8,128] = 1 nan -2     values, repeated until the array is full; or `wave SEED`
//! // out f32[8,128]
//! // alias 0:0                    input 0 and output 0 share memory
//! // unused 1                     nobody reads output 1
//! // devices 4                    run on four devices; a `wave SEED` of device d is that of SEED + d
//! // run vmem_bytes=8191          fields of `Machine`
//! // fault: ...                   what follows a `run` is what came of it, with early, late and random DMAs
//! ```
//!
//! What stands before the first `// -----` is in front of every kernel of the file, when it is aliases alone.
//!
//! `PAGODA_BLESS=1 cargo test -p pagoda-ir cases` writes what came of each run in place: read the difference. A
//! kernel in a StableHLO module (a `tpu_custom_call`) brings its outputs, aliases and unused results along.

use std::{fmt::Write as _, fs, path::Path};

use pagoda_ir::{
    Context, Element, HostTensor, TensorType,
    mosaic::{text, wire},
    tile_machine::{DmaOrder, Fault, FaultKind, Machine, Observer, Program, Run},
};

const ORDERS: [(&str, DmaOrder); 4] = [
    ("early", DmaOrder::Early),
    ("late", DmaOrder::Late),
    ("random 0", DmaOrder::Random(0)),
    ("random 1", DmaOrder::Random(1)),
];

/// One kernel and how it is called.
#[derive(Default)]
struct Call {
    inputs: Vec<HostTensor>,
    outputs: Vec<TensorType>,
    aliases: Vec<(usize, usize)>,
    unused: Vec<usize>,
    /// Of the devices after the first, if there are any.
    others: Vec<Vec<HostTensor>>,
    devices: usize,
}

fn number<T: std::str::FromStr>(text: &str) -> T {
    text.trim().parse().unwrap_or_else(|_| panic!("`{text}` is not a number"))
}

/// `f32[8,128]`, unsigned types as `ui32[8]`.
fn array_type(text: &str) -> TensorType {
    let (element, dims) = text.trim().trim_end_matches(']').split_once('[').expect("an array type");
    let dims: Vec<usize> = dims.split(',').filter(|size| !size.is_empty()).map(number).collect();
    TensorType::new(Element::from_mlir(element).unwrap_or_else(|| panic!("element type `{element}`")), &dims)
}

/// `f32[8,128] = 1 nan -2`, on device `device`.
fn array(text: &str, device: usize) -> HostTensor {
    let (ty, values) = text.split_once('=').expect("an input has values");
    let ty = array_type(ty);
    let values: Vec<f64> = match values.trim().strip_prefix("wave") {
        // Values without pattern in (-2, 2), away from 0.
        Some(seed) => {
            let seed = number::<f64>(seed) + device as f64;
            (0..ty.len()).map(|i| 2.0 * ((i as f64 + 1.0) * (12.9898 + seed)).sin()).collect()
        }
        None => {
            let values: Vec<f64> = values.split_whitespace().map(number).collect();
            values.iter().copied().cycle().take(ty.len()).collect()
        }
    };
    HostTensor::from_f64(ty.element, &ty.dims, &values)
}

fn machine(settings: &str) -> Machine {
    let mut machine = Machine { max_ops: 10_000, ..Machine::default() };
    for setting in settings.split_whitespace() {
        match setting.split_once('=').unwrap_or((setting, "true")) {
            ("vmem_bytes", value) => machine.vmem_bytes = number(value),
            ("smem_bytes", value) => machine.smem_bytes = number(value),
            ("hbm_bytes", value) => machine.hbm_bytes = number(value),
            ("semaphore_bytes", value) => machine.semaphore_bytes = number(value),
            ("max_ops", value) => machine.max_ops = number(value),
            ("allow_unwritten_outputs", "true") => machine.allow_unwritten_outputs = true,
            ("allow_unwritten_reads", "true") => machine.allow_unwritten_reads = true,
            ("allow_parallel_overlaps", "true") => machine.allow_parallel_overlaps = true,
            ("ignore", kind) => {
                let kind = FaultKind::ALL.into_iter().find(|known| known.name() == kind);
                machine = machine.ignoring(kind.expect("a kind of fault"));
            }
            _ => panic!("`{setting}` is not a setting of the machine"),
        }
    }
    machine
}

/// An output in one line: its first elements, and sums that see every element and where it is.
fn summary(array: &HostTensor) -> String {
    let values = array.to_f64();
    let shown: Vec<String> = values.iter().take(8).map(|&x| format!("{}", x as f32)).collect();
    let dots = if values.len() > 8 { " ..." } else { "" };
    let finite = || values.iter().enumerate().filter(|(_, x)| x.is_finite());
    let sum = finite().fold(0.0, |sum, (_, x)| sum + x);
    let placed = finite().fold(0.0, |sum, (at, x)| sum + x * (at % 1009) as f64);
    let nans = values.iter().filter(|x| x.is_nan()).count();
    let mut line = format!("{}{:?}: {}{dots}, sum {sum:.5}", array.element(), array.dims(), shown.join(" "));
    let _ = write!(line, ", by place {placed:.3}");
    if nans > 0 {
        let _ = write!(line, ", {nans} nan");
    }
    line
}

/// Watches, and so sees ops one by one.
struct Watching;

impl Observer for Watching {}

/// Whoever watches, and however many threads there are, the same happens.
fn alike(ran: &Result<Run, Box<Fault>>, other: &Result<Run, Box<Fault>>) {
    match (ran, other) {
        (Ok(ran), Ok(other)) => {
            assert!(ran.outputs == other.outputs);
            assert_eq!(ran.counters, other.counters);
        }
        (Err(ran), Err(other)) if ran.kind == FaultKind::Runaway => assert_eq!(other.kind, ran.kind),
        (Err(ran), Err(other)) => assert_eq!(ran.to_string(), other.to_string()),
        (ran, other) => panic!("{ran:?}, but elsewhere {other:?}"),
    }
}

/// What a call gives under every order of DMAs: lines of expectations.
fn outcome(program: &Program, machine: Machine, call: &Call) -> Vec<String> {
    let mut seen: Vec<(Vec<&str>, Vec<String>)> = vec![];
    for (name, dma) in ORDERS {
        let machine = Machine { dma, ..machine };
        let runs = match call.devices {
            0 => {
                let ran = program.run(&machine, &call.inputs, &call.outputs);
                alike(&ran, &program.run_observed(&machine, &call.inputs, &call.outputs, &mut Watching));
                let eager = Machine { least_work_of_a_thread: 0, ..machine };
                alike(&ran, &program.run(&eager, &call.inputs, &call.outputs));
                ran.map(|run| vec![run])
            }
            _ => {
                let inputs: Vec<_> = std::iter::once(call.inputs.clone()).chain(call.others.iter().cloned()).collect();
                program.run_devices(&machine, &inputs, &call.outputs)
            }
        };
        let lines = match runs {
            Err(fault) => vec![format!("fault{{}}: {}: {fault}", kebab(&format!("{:?}", fault.kind)))],
            Ok(runs) => (runs.iter().enumerate())
                .flat_map(|(device, run)| {
                    let of = if call.devices > 0 { format!(" of device {device}") } else { String::new() };
                    let results = run.outputs.iter().enumerate();
                    results.map(move |(at, output)| format!("result {at}{of}{{}}: {}", summary(output)))
                })
                .chain((call.outputs.is_empty()).then(|| "ok{}".to_owned()))
                .collect(),
        };
        match seen.iter_mut().find(|(_, known)| *known == lines) {
            Some((names, _)) => names.push(name),
            None => seen.push((vec![name], lines)),
        }
    }
    let all = seen.len() == 1;
    let named = |names: &[&str]| if all { String::new() } else { format!(" ({})", names.join(", ")) };
    let lines = seen.iter().flat_map(|(names, lines)| lines.iter().map(|line| line.replacen("{}", &named(names), 1)));
    lines.collect()
}

fn kebab(name: &str) -> String {
    let split = name.chars().flat_map(|c| [c.is_uppercase().then_some('-'), Some(c.to_ascii_lowercase())]).flatten();
    split.collect::<String>().trim_start_matches('-').to_owned()
}

/// Opens a kernel, in readable form or in a custom call.
fn open(context: &Context, source: &str, file: &str, call: &mut Call) -> pagoda_ir::Result<Program> {
    let program = if source.contains("custom_call_config") {
        let site = wire::find_custom_calls(source.as_bytes())?.remove(0);
        call.outputs = site.types.map(|(_, results)| results).unwrap_or_default();
        (call.aliases, call.unused) = (site.aliases, site.unused);
        Program::decode(&wire::open(context, &site.backend_config)?.module)?
    } else {
        Program::decode(&text::parse(context, source, file)?)?
    };
    Ok(program.with_aliases(&call.aliases).with_unused_outputs(&call.unused))
}

/// The file with what came of its runs.
fn regenerated(source: &str, file: &str) -> String {
    const RESULTS: [&str; 4] = ["// result", "// fault", "// error", "// ok"];
    let is_result = |line: &str| RESULTS.iter().any(|result| line.starts_with(result));
    let kept: Vec<&str> = source.lines().filter(|line| !is_result(line)).collect();
    // What a fault says depends on the lines of the file, and they depend on how many results there are: two rounds.
    let mut results: Vec<Vec<String>> = vec![];
    let write = |results: &[Vec<String>]| {
        let mut results = results.iter();
        let mut lines = vec![];
        for line in &kept {
            lines.push((*line).to_owned());
            if line.starts_with("// run") {
                lines.extend(results.next().into_iter().flatten().map(|result| format!("// {result}")));
            }
        }
        lines.join("\n") + "\n"
    };
    for _ in 0..2 {
        let current = write(&results);
        results.clear();
        let mut line = 0;
        let aliases = current.split("// -----\n").next().filter(|first| !first.contains("@")).unwrap_or_default();
        for part in current.split("// -----\n") {
            let context = Context::new();
            let mut call = Call::default();
            // Each part keeps its line numbers.
            let in_front = if line == 0 { "" } else { aliases };
            let padded = in_front.to_owned() + &"\n".repeat(line - in_front.matches('\n').count()) + part;
            line += part.matches('\n').count() + 1;
            for directive in part.lines().filter_map(|line| line.strip_prefix("// ")) {
                let (word, rest) = directive.split_once(' ').unwrap_or((directive, ""));
                let pair = |text: &str| text.split_once(':').map(|(a, b)| (number(a), number(b))).expect("a pair");
                match word {
                    "devices" => {
                        call.devices = number(rest);
                        call.others = vec![vec![]; call.devices - 1];
                    }
                    "in" => {
                        call.inputs.push(array(rest, 0));
                        let others = call.others.iter_mut().enumerate();
                        others.for_each(|(at, inputs)| inputs.push(array(rest, at + 1)));
                    }
                    "out" => call.outputs.push(array_type(rest)),
                    "alias" => call.aliases.push(pair(rest)),
                    "unused" => call.unused.push(number(rest)),
                    "run" => results.push(match open(&context, &padded, file, &mut call) {
                        Ok(program) => outcome(&program, machine(rest), &call),
                        Err(error) => error.to_string().lines().map(|line| format!("error: {line}")).collect(),
                    }),
                    _ => {}
                }
            }
        }
    }
    write(&results)
}

#[test]
fn cases() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut files: Vec<_> = fs::read_dir(&folder).expect("a folder").map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "no cases in {}", folder.display());
    let mut stale = vec![];
    for path in &files {
        let (source, file) = (fs::read_to_string(path).unwrap(), path.file_name().unwrap().to_string_lossy());
        let new = regenerated(&source, &file);
        if new == source {
            continue;
        }
        if std::env::var_os("PAGODA_BLESS").is_some() {
            fs::write(path, &new).unwrap();
        } else {
            let differing = new.lines().zip(source.lines()).find(|(new, old)| new != old);
            let (new, old) = differing.unwrap_or(("another number of lines", ""));
            stale.push(format!("{file}\n  expected {old}\n  came     {new}"));
        }
    }
    assert!(stale.is_empty(), "PAGODA_BLESS=1 writes what came:\n{}", stale.join("\n"));
}
