//! Planted faults: a kernel with one thing wrong, and what must catch it.
//!
//! A mutant is an edit of the emitted module's text, read back as any module is and given to [`check_program`]: what no fault
//! of the tile machine and no dependence on the order of DMAs gives away, the f64 reference must. Each kernel lists its own
//! mutants ([`Kernel::mutants`]); [`MutantSet::superfluous`] makes more of any kernel, by dropping every effect and
//! negating every comparison in turn.

use pagoda_ir::{
    Context, mosaic,
    mosaic::wire,
    tile_machine::{FaultKind, Program},
};

use crate::{
    check::{Case, CheckError, check_program},
    kernel::{self, Kernel},
    named::Arrays,
    plan::Plan,
};

/// How a mutant is caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caught {
    /// By the tile machine.
    Fault(FaultKind),
    /// Because its result depends on when DMAs land.
    Order,
    /// By the comparison with the reference.
    Mismatch,
}

/// A name, an edit, and what catches it.
pub type Mutant = (&'static str, fn(&Emitted) -> String, Caught);

/// A planned kernel, inputs, and its mutants.
pub struct MutantSet<K: Kernel> {
    /// The plan.
    pub plan: Plan<K>,
    /// Inputs on which every mutant is caught.
    pub inputs: Arrays,
    /// The mutants.
    pub mutants: Vec<Mutant>,
    /// How many effects (stores, DMAs, waits, comparisons) may be dropped or negated unnoticed, each in turn: those that no input
    /// of the problem reaches. `None`: not looked at.
    pub superfluous: Option<usize>,
}

impl<K: Kernel> MutantSet<K> {
    /// Checks that the kernel itself passes, and that each mutant is caught as it should be.
    ///
    /// # Errors
    /// Those that are not, one per line.
    pub fn check(&self) -> Result<(), String> {
        let case = Case::new(&self.plan, &self.inputs);
        let context = Context::new();
        let kernel = self.plan.kernel(&context).map_err(|error| error.to_string())?;
        let unmutated = caught(case, &kernel.text());
        if unmutated != Ok(None) {
            return Err(format!("{} without a mutation: {}", self.plan.name(), words(&unmutated)));
        }
        let emitted = Emitted::new(&kernel);
        let mut wrong = String::new();
        for (name, edit, expected) in &self.mutants {
            let mutant = edit(&emitted);
            let caught =
                if mutant == emitted.text() { Err("the edit changes nothing".into()) } else { caught(case, &mutant) };
            if caught != Ok(Some(*expected)) {
                wrong += &format!("{name}: {}, expected {expected:?}\n", words(&caught));
            }
        }
        if let Some(expected) = self.superfluous {
            let found = superfluous(case, &emitted);
            if found.len() != expected {
                wrong += &format!("{} effects are superfluous, {expected} expected\n{}", found.len(), found.concat());
            }
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }
}

/// Every store, DMA, wait and comparison without which (or with whose negation) the kernel still passes, a line each.
fn superfluous<K: Kernel>(case: Case<K>, emitted: &Emitted) -> Vec<String> {
    const EFFECTS: [&str; 4] = ["vector_store", "strided_store", "enqueue_dma", "wait_dma2"];
    const NEGATED: [(&str, &str); 6] = [
        (" eq, ", " ne, "),
        (" slt, ", " sge, "),
        (" sge, ", " slt, "),
        (" sle, ", " sgt, "),
        (" sgt, ", " sle, "),
        (" ogt, ", " ule, "),
    ];
    let mut uncaught = Vec::new();
    let mut mutants = 0;
    for (number, line) in emitted.lines.iter().enumerate() {
        let effect = EFFECTS.iter().any(|effect| line.contains(&format!("tpu.{effect}\"")));
        let negation = NEGATED.iter().filter(|_| line.contains("arith.cmp")).find(|(from, _)| line.contains(from));
        let mutant = match negation {
            Some((from, to)) => emitted.replaced(number, from, to),
            None if effect => emitted.without(number),
            None => continue,
        };
        mutants += 1;
        if !matches!(caught(case, &mutant), Ok(Some(_))) {
            uncaught.push(format!("superfluous, line {number}: {line}\n"));
        }
    }
    assert!(mutants > 0, "no effect was found in the text");
    uncaught
}

/// What catches `mutant`, a kernel's text; `None` if it passes.
fn caught<K: Kernel>(case: Case<K>, mutant: &str) -> Result<Option<Caught>, String> {
    let context = Context::new();
    let module = wire::deserialize(&context, mutant.as_bytes()).map_err(|error| error.to_string())?;
    let program = Program::decode(&module).map_err(|error| error.to_string())?;
    let program = program.with_aliases(&kernel::aliases::<K>(case.plan.problem(), case.plan.chip()));
    match check_program(case, &program, 1) {
        Ok(_) => Ok(None),
        Err(CheckError::Fault { fault, .. }) => Ok(Some(Caught::Fault(fault.kind))),
        Err(CheckError::OrderDependent { .. }) => Ok(Some(Caught::Order)),
        Err(CheckError::Mismatch { .. }) => Ok(Some(Caught::Mismatch)),
        Err(other) => Err(other.to_string()),
    }
}

/// What became of a mutant.
fn words(caught: &Result<Option<Caught>, String>) -> String {
    match caught {
        Ok(Some(caught)) => format!("{caught:?}"),
        Ok(None) => "passes".to_owned(),
        Err(error) => error.clone(),
    }
}

/// A kernel's text, line by line, and edits of it. An edit panics when the text is not what it expects.
pub struct Emitted {
    lines: Vec<String>,
}

impl Emitted {
    /// The text of `kernel`.
    pub fn new(kernel: &mosaic::Kernel) -> Self {
        Self { lines: kernel.text().lines().map(str::to_owned).collect() }
    }

    /// The whole text.
    pub fn text(&self) -> String {
        self.lines.join("\n")
    }

    /// The `nth` line (from 0) that holds all of `patterns`.
    pub fn find(&self, nth: usize, patterns: &[&str]) -> usize {
        let holds = |&line: &usize| patterns.iter().all(|pattern| self.lines[line].contains(pattern));
        let found: Vec<_> = (0..self.lines.len()).filter(holds).collect();
        let Some(&line) = found.get(nth) else {
            panic!("{}\nno line {nth} (from 0) with {patterns:?} above: there are {}", self.text(), found.len());
        };
        line
    }

    /// Whether there is an `nth` line (from 0) that holds all of `patterns`.
    pub fn has(&self, nth: usize, patterns: &[&str]) -> bool {
        self.lines.iter().filter(|line| patterns.iter().all(|pattern| line.contains(pattern))).nth(nth).is_some()
    }

    /// The last line before `line` that holds `pattern`.
    pub fn above(&self, line: usize, pattern: &str) -> usize {
        let found = (0..line).rev().find(|&line| self.lines[line].contains(pattern));
        found.unwrap_or_else(|| panic!("{}\nno `{pattern}` above line {line}", self.text()))
    }

    /// The first line from `line` on that holds all of `patterns`.
    pub fn below(&self, line: usize, patterns: &[&str]) -> usize {
        let holds = |&line: &usize| patterns.iter().all(|pattern| self.lines[line].contains(pattern));
        let found = (line..self.lines.len()).find(holds);
        found.unwrap_or_else(|| panic!("{}\nno {patterns:?} below line {line}", self.text()))
    }

    /// The text with `new` instead of line `line`.
    pub fn with(&self, line: usize, new: &str) -> String {
        let mut lines = self.lines.clone();
        lines[line] = new.to_owned();
        lines.join("\n")
    }

    /// The text without line `line`.
    pub fn without(&self, line: usize) -> String {
        self.with(line, "")
    }

    /// The text with line `line` twice.
    pub fn twice(&self, line: usize) -> String {
        self.with(line, &format!("{0}\n{0}", self.lines[line]))
    }

    /// `from` becomes `to` in line `line`.
    pub fn replaced(&self, line: usize, from: &str, to: &str) -> String {
        let new = self.lines[line].replace(from, to);
        assert_ne!(new, self.lines[line], "no `{from}` in line {line}");
        self.with(line, &new)
    }

    /// `from` becomes `to` in every line from `first` to `last`.
    pub fn replaced_within(&self, first: usize, last: usize, from: &str, to: &str) -> String {
        let lines = self.lines.iter().enumerate();
        let lines =
            lines.map(|(at, line)| if (first..=last).contains(&at) { line.replace(from, to) } else { line.clone() });
        lines.collect::<Vec<_>>().join("\n")
    }

    /// The store in `line`, of `rows` rows of 128 lanes, leaves out the last row.
    pub fn one_row_short(&self, line: usize, rows: usize) -> String {
        let value = self.lines[line].split(['(', ',']).nth(1).expect("a value").trim();
        let (from, to) = (format!("vector<{rows}x128x"), format!("vector<{}x128x", rows - 1));
        let ty = self.lines[line].split(&from).nth(1).and_then(|rest| rest.split('>').next()).expect("its type");
        let cut = format!(
            "%short = vector.extract_strided_slice {value} {{offsets = [0], sizes = [{}], strides = [1]}} : {from}{ty}> to {to}{ty}>",
            rows - 1
        );
        let store = self.lines[line].replacen(value, "%short", 1).replacen(&from, &to, 1);
        self.with(line, &format!("{cut}\n{store}"))
    }

    /// The binary op in `line` becomes `op` of its first operand with itself.
    pub fn first_operand_only(&self, line: usize, op: &str) -> String {
        let [result, rest] = [0, 1].map(|part| self.lines[line].split(" = ").nth(part).expect("a result"));
        let operand = rest.split([' ', ',']).find(|word| word.starts_with('%')).expect("an operand");
        let ty = rest.split(" : ").nth(1).expect("a type");
        self.with(line, &format!("{result} = {op} {operand}, {operand} : {ty}"))
    }

    /// The f32 tile that `line` makes is rounded to bf16.
    pub fn rounded(&self, line: usize) -> String {
        let (result, rest) = self.lines[line].trim().split_once(" = ").expect("a result");
        let ty = rest.rsplit(" : ").next().expect("a type");
        let narrow = ty.replace("f32", "bf16");
        let narrowed = format!("%narrow = arith.truncf %wide : {ty} to {narrow}");
        self.with(line, &format!("%wide = {rest}\n{narrowed}\n{result} = arith.extf %narrow : {narrow} to {ty}"))
    }

    /// The rows of the tile that `line` loads, each in the place of the next one.
    pub fn one_row_on(&self, line: usize) -> String {
        let (result, rest) = self.lines[line].trim().split_once(" = ").expect("a result");
        let ty = rest.rsplit(", ").next().expect("a type");
        let rows = ty.matches('x').count() - 2;
        let moved = format!("{{dimension = {rows} : si32}} : ({ty}, i32) -> {ty}");
        let by = "%by = arith.constant 1 : i32";
        self.with(line, &format!("%there = {rest}\n{by}\n{result} = \"tpu.dynamic_rotate\"(%there, %by) {moved}"))
    }

    /// `op` of the i32 result of `line` and `by` in its place.
    pub fn changed(&self, line: usize, op: &str, by: i32) -> String {
        let (result, rest) = self.lines[line].trim().split_once(" = ").expect("a result");
        self.with(line, &format!("%m = {rest}\n%by = arith.constant {by} : i32\n{result} = {op} %m, %by : i32"))
    }

    /// The slice in `line` is of the other one of two buffers; of more, of its neighbour.
    pub fn other_slot(&self, line: usize) -> String {
        let slot = self.lines[line].split([',', ')']).nth(1).expect("an index").trim();
        let new = self.lines[line].replacen(slot, "%other", 1);
        self.with(line, &format!("%o = arith.constant 1 : i32\n%other = arith.xori %o, {slot} : i32\n{new}"))
    }

    /// Every slice of `buffer`, of one dimension, is its first element.
    pub fn first_of(&self, buffer: &str) -> String {
        let slice = format!("tpu.memref_slice\"({buffer}, ");
        let lines = self.lines.iter().enumerate().map(|(number, line)| {
            let (before, after) = line.split_once(&slice)?;
            let ty = after.split_once(')')?.1;
            Some(format!("%first{number} = arith.constant 0 : i32\n{before}{slice}%first{number}){ty}"))
        });
        let lines: Vec<_> = lines.zip(&self.lines).map(|(new, old)| new.unwrap_or_else(|| old.clone())).collect();
        lines.join("\n")
    }

    /// The transform of operand `window` (counted without the prefetched ones) returns `results`, after `ops`.
    pub fn transform(&self, window: usize, ops: &str, results: &str) -> String {
        let header = self.find(0, &[&format!("func.func @transform_{window}(")]);
        let end = (header..).find(|&line| self.lines[line].trim().starts_with("return ")).expect("a return");
        let ty = self.lines[end].split(" : ").nth(1).expect("types");
        self.with(end, &format!("{ops}\nreturn {results} : {ty}"))
    }
}
