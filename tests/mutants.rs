//! Planted faults: our Mosaic kernels with one thing wrong, each caught by name; unmutated, nothing is reported.
//!
//! A mutant is an edit of the emitted module's text, read back as any module is and given to [`check_program`]: what no
//! fault of the tile machine and no dependence on the order of copies gives away, the f64 reference must.

use pagoda_ir::{
    Context, Element,
    mosaic::{Kernel, wire},
    tile_machine::{FaultKind, Program},
};
use pagoda_kernels::{
    CheckError, MosaicCase,
    check::check_program,
    chips::Chip,
    matmul::{self, Activation, Epilogue, Layout},
    random::{self, Lengths},
    rpa::{self, Kind},
};

/// How a mutant is caught.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Caught {
    /// By the tile machine.
    Fault(FaultKind),
    /// Because its result depends on when copies land.
    Order,
    /// By the comparison with the reference.
    Mismatch,
}

/// A kernel's text, line by line.
struct Emitted {
    lines: Vec<String>,
}

impl Emitted {
    fn new(kernel: &Kernel) -> Self {
        Self { lines: kernel.text().lines().map(str::to_owned).collect() }
    }

    /// The `nth` line (from 0) that holds all of `patterns`.
    fn find(&self, nth: usize, patterns: &[&str]) -> usize {
        let mut found = (0..self.lines.len()).filter(|&line| patterns.iter().all(|p| self.lines[line].contains(p)));
        found.nth(nth).unwrap_or_else(|| panic!("no line {nth} with {patterns:?} in\n{}", self.lines.join("\n")))
    }

    /// The last line before `line` that holds `pattern`.
    fn above(&self, line: usize, pattern: &str) -> usize {
        let found = (0..line).rev().find(|&line| self.lines[line].contains(pattern));
        found.unwrap_or_else(|| panic!("no `{pattern}` above line {line} in\n{}", self.lines.join("\n")))
    }

    /// The text with `new` instead of line `line`.
    fn with(&self, line: usize, new: &str) -> String {
        let mut lines = self.lines.clone();
        lines[line] = new.to_owned();
        lines.join("\n")
    }

    fn without(&self, line: usize) -> String {
        self.with(line, "")
    }

    fn twice(&self, line: usize) -> String {
        self.with(line, &format!("{0}\n{0}", self.lines[line]))
    }

    fn replaced(&self, line: usize, from: &str, to: &str) -> String {
        let new = self.lines[line].replace(from, to);
        assert_ne!(new, self.lines[line], "no `{from}`");
        self.with(line, &new)
    }

    /// `from` becomes `to` in every line from `first` to `last`.
    fn replaced_within(&self, first: usize, last: usize, from: &str, to: &str) -> String {
        let lines = self.lines.iter().enumerate();
        let lines =
            lines.map(|(at, line)| if (first..=last).contains(&at) { line.replace(from, to) } else { line.clone() });
        lines.collect::<Vec<_>>().join("\n")
    }

    /// The store in `line`, of `rows` rows of 128 lanes, leaves out the last row.
    fn one_row_short(&self, line: usize, rows: usize) -> String {
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
    fn first_operand_only(&self, line: usize, op: &str) -> String {
        let [result, rest] = [0, 1].map(|part| self.lines[line].split(" = ").nth(part).expect("a result"));
        let operand = rest.split([' ', ',']).find(|word| word.starts_with('%')).expect("an operand");
        let ty = rest.split(" : ").nth(1).expect("a type");
        self.with(line, &format!("{result} = {op} {operand}, {operand} : {ty}"))
    }

    /// `op` of the i32 result of `line` and `by` in its place.
    fn changed(&self, line: usize, op: &str, by: i32) -> String {
        let (result, rest) = self.lines[line].trim().split_once(" = ").expect("a result");
        self.with(line, &format!("%m = {rest}\n%by = arith.constant {by} : i32\n{result} = {op} %m, %by : i32"))
    }

    /// The slice in `line` is of the other one of two buffers.
    fn other_slot(&self, line: usize) -> String {
        let slot = self.lines[line].split([',', ')']).nth(1).expect("an index").trim();
        let new = self.lines[line].replacen(slot, "%other", 1);
        self.with(line, &format!("%o = arith.constant 1 : i32\n%other = arith.subi %o, {slot} : i32\n{new}"))
    }

    /// Every slice of `buffer`, of one dimension, is its first element.
    fn first_of(&self, buffer: &str) -> String {
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
    fn transform(&self, window: usize, ops: &str, results: &str) -> String {
        let header = self.find(0, &[&format!("func.func @transform_{window}(")]);
        let end = (header..).find(|&line| self.lines[line].trim().starts_with("return ")).expect("a return");
        let ty = self.lines[end].split(" : ").nth(1).expect("types");
        self.with(end, &format!("{ops}\nreturn {results} : {ty}"))
    }
}

/// What gives `mutant` away.
fn judge(case: MosaicCase, mutant: &str) -> Result<Option<Caught>, String> {
    let context = Context::new();
    let module = wire::deserialize(&context, mutant.as_bytes()).map_err(|error| error.to_string())?;
    let program = Program::decode(&module).map_err(|error| error.to_string())?;
    match check_program(case, &program, 1) {
        Ok(_) => Ok(None),
        Err(CheckError::Fault { fault, .. }) => Ok(Some(Caught::Fault(fault.kind))),
        Err(CheckError::OrderDependent { .. }) => Ok(Some(Caught::Order)),
        Err(CheckError::Mismatch { .. }) => Ok(Some(Caught::Mismatch)),
        Err(other) => Err(other.to_string()),
    }
}

/// A name, an edit, and what catches it.
type Mutant = (&'static str, fn(&Emitted) -> String, Caught);

fn assert_caught(case: MosaicCase, mutants: &[Mutant]) {
    let context = Context::new();
    let kernel = case.kernel(&context).unwrap();
    assert_eq!(judge(case, &kernel.text()), Ok(None), "without a mutation");
    let emitted = Emitted::new(&kernel);
    let mut wrong = String::new();
    for (name, edit, expected) in mutants {
        let mutant = edit(&emitted);
        assert_ne!(mutant, emitted.lines.join("\n"), "{name}: the edit changes nothing");
        let caught = judge(case, &mutant);
        if caught != Ok(Some(*expected)) {
            wrong += &format!("{name}: {caught:?}, expected {expected:?}\n");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// Rows, columns and depth of three blocks each, the last one of each ragged.
fn matmul_plan() -> matmul::plan::Plan {
    let (input, output, layout) = (Element::Bf16, Element::F32, Layout::RowMajor);
    let epilogue = Epilogue { bias: true, activation: Activation::Identity, residual: true };
    let problem =
        matmul::Problem::new(matmul::Spec { m: 40, k: 600, n: 300, input, output, layout, epilogue }).unwrap();
    let tiles = Some(matmul::plan::Tiles { m: 16, n: 128, k: 256 });
    matmul::plan::Plan::new(problem, Chip::V5p, matmul::plan::Options { tiles, vmem_limit: None }).unwrap()
}

const MATMULS: &[Mutant] = {
    use Caught::{Fault, Mismatch};
    use FaultKind::{OutOfBounds, OutputNeverWritten, ParallelOverlap, UnwrittenRead};
    &[
        ("accumulator not zeroed", |t| t.without(t.find(0, &["vector_store", "%sum,"])), Fault(UnwrittenRead)),
        (
            "accumulator zeroed in every step but the first",
            |t| t.replaced(t.find(0, &["cmpi eq"]), "eq", "ne"),
            Fault(UnwrittenRead),
        ),
        ("accumulator zeroed in every step", |t| t.replaced(t.find(0, &["cmpi eq"]), "eq", "sge"), Mismatch),
        ("partial sum not kept", |t| t.without(t.find(1, &["vector_store", "%sum,"])), Mismatch),
        ("another step taken for the last", |t| t.replaced(t.find(1, &["cmpi eq"]), "eq", "ne"), Mismatch),
        (
            "last step along k missing",
            |t| t.replaced(t.find(0, &["iteration_bounds"]), "i64: 3, 3, 3", "i64: 3, 3, 2"),
            Fault(OutputNeverWritten),
        ),
        (
            "last row of blocks missing",
            |t| t.replaced(t.find(0, &["iteration_bounds"]), "i64: 3, 3, 3", "i64: 2, 3, 3"),
            Fault(OutputNeverWritten),
        ),
        (
            "result's window one row short",
            |t| t.one_row_short(t.find(0, &["vector_store", "%out,"]), 16),
            Fault(OutputNeverWritten),
        ),
        ("result not stored", |t| t.without(t.find(0, &["vector_store", "%out,"])), Fault(OutputNeverWritten)),
        ("mask inverted at the edge of k", |t| t.replaced(t.find(0, &["cmpi slt"]), "slt", "sge"), Mismatch),
        ("x masked one column too late", |t| t.replaced(t.find(0, &["dense<88>"]), "88", "89"), Mismatch),
        ("w masked one row too early", |t| t.replaced(t.find(1, &["dense<88>"]), "88", "87"), Mismatch),
        ("w not masked", |t| t.replaced(t.find(1, &["dense<88>"]), "88", "256"), Mismatch),
        ("residual read from the output", |t| t.replaced(t.find(0, &["load %residual["]), "%residual", "%out"), {
            Fault(UnwrittenRead)
        }),
        ("bias left out", |t| t.first_operand_only(t.find(0, &["addf"]), "arith.maximumf"), Mismatch),
        (
            "k called parallel",
            |t| t.replaced(t.find(0, &["dimension_semantics<arbitrary>"]), "<arbitrary>", "<parallel>"),
            Fault(ParallelOverlap),
        ),
        (
            "all output blocks in one place",
            |t| t.transform(4, "%z = arith.constant 0 : i32", "%z, %z"),
            Fault(ParallelOverlap),
        ),
        (
            "block of x off by one",
            |t| t.transform(0, "%o = arith.constant 1 : i32\n%l = arith.addi %arg2, %o : i32", "%arg0, %l"),
            Fault(OutOfBounds),
        ),
        ("x does not move along k", |t| t.transform(0, "%z = arith.constant 0 : i32", "%arg0, %z"), Mismatch),
        ("rows and columns of the residual swapped", |t| t.transform(3, "", "%arg1, %arg0"), Mismatch),
    ]
};

#[test]
fn mutants_of_matmul_are_caught() {
    let plan = matmul_plan();
    let inputs = random::matmul_inputs(plan.problem(), 1);
    assert_caught(MosaicCase::Matmul(&plan, &inputs), MATMULS);
}

/// Blocks of `queries` rows, padding rows in the last one; two blocks of heads, two layers, two pages to a KV block.
fn rpa_plan(queries: usize, page_size: usize) -> rpa::plan::Plan {
    let problem = rpa::Problem::new(rpa::Spec {
        kind: Kind::Mixed,
        element: Element::Bf16,
        tokens: 35,
        q_heads: 16,
        kv_heads: 8,
        head_dim: 128,
        page_size,
        pages: 25,
        layers: 2,
        max_seqs: 5,
        pages_per_seq: 6,
        scale: 0.088,
        sliding_window: Some(50),
        soft_cap: None,
    });
    let tiles = Some(rpa::plan::Tiles { queries, kv_pages: 2 });
    let options = rpa::plan::Options { tiles, vmem_limit: None };
    rpa::plan::Plan::new(problem.unwrap(), Chip::V5p, options).unwrap()
}

/// Decode rows, an empty sequence, chunks of prompts; one to six pages.
fn rpa_inputs(problem: &rpa::Problem) -> rpa::Inputs {
    let lengths = [(1, 96), (0, 5), (13, 77), (8, 41), (1, 10)];
    random::rpa_inputs_of(problem, &lengths.map(|(q_len, kv_len)| Lengths { q_len, kv_len }), 1, 1)
}

/// The KV copies in the text: those before the loop over KV blocks, those of the next block, and the waits.
const FIRST: usize = 0;
const NEXT: usize = 2;

fn start(t: &Emitted, number: usize) -> usize {
    t.find(number, &["tpu.enqueue_dma"])
}

fn wait(t: &Emitted, number: usize) -> usize {
    t.find(number, &["tpu.wait_dma2"])
}

/// The rows of a KV block behind the end of the sequence, which are cleared.
fn last_page(t: &Emitted) -> usize {
    t.find(0, &["cmpi sge", "128x128xi32"])
}

const ATTENTIONS: &[Mutant] = {
    use Caught::{Fault, Mismatch};
    use FaultKind::{
        BrokenAssumption, Deadlock, OutOfBounds, OverwriteInFlight, ParallelOverlap, ReadInFlight, SemaphoreUnbalanced,
        UnwrittenRead,
    };
    &[
        ("wait dropped", |t| t.without(wait(t, 0)), Fault(ReadInFlight)),
        ("wait for a copy never started", |t| t.twice(wait(t, 1)), Fault(Deadlock)),
        ("copy not started", |t| t.without(start(t, FIRST)), Fault(Deadlock)),
        ("next block's copy not started", |t| t.without(start(t, NEXT)), Fault(Deadlock)),
        (
            "semaphore of the other buffer waited for",
            |t| t.other_slot(t.above(wait(t, 0), "memref_slice\"(%arrived, ")),
            Fault(ReadInFlight),
        ),
        ("both buffers on one semaphore", |t| t.first_of("%arrived"), Fault(ReadInFlight)),
        (
            "double buffers swapped",
            |t| t.other_slot(t.above(t.find(0, &["strided_load", "xi32>"]), "memref_slice\"(%kv, ")),
            Fault(ReadInFlight),
        ),
        (
            "next block into the buffer that is read",
            |t| {
                let slot = t.above(start(t, NEXT), "arith.subi %c1_i32");
                t.changed(slot, "arith.xori", 1)
            },
            Fault(OverwriteInFlight),
        ),
        (
            "copy one row short",
            |t| {
                let first = t.above(start(t, NEXT), "memref_slice\"(%kv_pages, ");
                t.replaced_within(first, start(t, NEXT), "16x8x128xbf16", "15x8x128xbf16")
            },
            Fault(Deadlock),
        ),
        (
            "second page one row further",
            |t| t.replaced(t.above(start(t, NEXT + 1), "arith.constant 16 : i32"), "constant 16", "constant 17"),
            Fault(OutOfBounds),
        ),
        (
            "second page over the first one",
            |t| t.replaced(t.above(start(t, FIRST + 1), "arith.constant 16 : i32"), "constant 16", "constant 0"),
            Fault(OverwriteInFlight),
        ),
        (
            "wrong page fetched ahead",
            |t| {
                let number = t.above(t.above(start(t, NEXT), "load %page_indices["), "arith.muli");
                t.changed(number, "arith.subi", 2)
            },
            Mismatch,
        ),
        (
            "page table read beyond the sequence",
            |t| t.replaced(t.above(start(t, FIRST + 1), "cmpi slt"), "slt", "ne"),
            Fault(OutOfBounds),
        ),
        (
            "last page not fetched",
            |t| t.replaced(t.above(start(t, FIRST + 1), "cmpi slt"), "slt", "sgt"),
            Fault(Deadlock),
        ),
        ("pages of another layer", |t| t.changed(t.find(0, &["load %first_page["]), "arith.subi", 25), Mismatch),
        (
            "a block fetched beyond the last one",
            |t| {
                let condition = t.above(t.above(start(t, NEXT), "scf.if"), "cmpi slt");
                t.replaced(condition, "slt", "sle")
            },
            Fault(OutOfBounds),
        ),
        (
            "last block not attended",
            |t| t.changed(t.find(0, &["arith.divsi"]), "arith.subi", 1),
            Fault(SemaphoreUnbalanced),
        ),
        ("mask inverted at the last page", |t| t.replaced(last_page(t), "sge", "slt"), Mismatch),
        ("mask of the last page one row too long", |t| t.replaced(last_page(t), "sge", "sgt"), Mismatch),
        ("causal mask off by one", |t| t.replaced(t.find(0, &["cmpi sle"]), "sle", "slt"), Mismatch),
        ("no causal mask", |t| t.replaced(t.find(0, &["cmpi sle"]), "sle", "sge"), Mismatch),
        ("window one key short", |t| t.replaced(t.find(0, &["dense<50>"]), "50", "49"), Mismatch),
        ("window one key long", |t| t.replaced(t.find(0, &["dense<50>"]), "50", "51"), Mismatch),
        (
            "rows of the sequence before not masked",
            |t| t.first_operand_only(t.find(0, &["cmpi sge"]), "arith.cmpi sge,"),
            Mismatch,
        ),
        ("kv_len one too long", |t| t.changed(t.find(0, &["load %kv_lens["]), "arith.addi", 1), Fault(OutOfBounds)),
        ("kv_len one too short", |t| t.changed(t.find(0, &["load %kv_lens["]), "arith.subi", 1), Mismatch),
        ("last sequence left out", |t| t.changed(t.find(0, &["load %num_seqs["]), "arith.subi", 1), Mismatch),
        ("accumulator not zeroed", |t| t.without(t.find(0, &["vector_store", "%acc,"])), Fault(UnwrittenRead)),
        ("sum not zeroed", |t| t.without(t.find(0, &["vector_store", "%sum,"])), Fault(UnwrittenRead)),
        ("maximum not kept", |t| t.without(t.find(1, &["vector_store", "%max,"])), Mismatch),
        (
            "accumulator not rescaled",
            |t| {
                let matmul = t.find(1, &["tpu.matmul"]);
                t.first_operand_only(t.above(matmul, "mulf"), "arith.maximumf")
            },
            Mismatch,
        ),
        ("scale left out", |t| t.first_operand_only(t.find(0, &["mulf", "x32xf32"]), "arith.maximumf"), Mismatch),
        ("padding rows divided by their sum", |t| t.replaced(t.find(0, &["cmpf ogt"]), "ogt", "oge"), Mismatch),
        (
            "heads of the first core on both",
            |t| t.replaced(t.above(start(t, FIRST), "arith.constant 8 : i32"), "constant 8", "constant 0"),
            Mismatch,
        ),
        (
            "heads that are no multiple of what is promised",
            |t| t.replaced(t.above(start(t, FIRST), "arith.constant 8 : i32"), "constant 8", "constant 4"),
            Fault(BrokenAssumption),
        ),
        (
            "output of both cores in one place",
            |t| t.transform(2, "", "%arg1, %c0_i32, %c0_i32"),
            Fault(ParallelOverlap),
        ),
    ]
};

#[test]
fn mutants_of_attention_are_caught() {
    let plan = rpa_plan(8, 16);
    let inputs = rpa_inputs(plan.problem());
    assert_caught(MosaicCase::Rpa(&plan, &inputs), ATTENTIONS);
}

/// Every effect and every condition matters: without any one of the stores, copies and waits, and with any one of the
/// comparisons negated, a kernel is caught.
fn assert_nothing_is_superfluous(case: MosaicCase) {
    const EFFECTS: [&str; 4] = ["vector_store", "strided_store", "enqueue_dma", "wait_dma2"];
    const NEGATED: [(&str, &str); 6] = [
        (" eq, ", " ne, "),
        (" slt, ", " sge, "),
        (" sge, ", " slt, "),
        (" sle, ", " sgt, "),
        (" sgt, ", " sle, "),
        (" ogt, ", " ule, "),
    ];
    let context = Context::new();
    let emitted = Emitted::new(&case.kernel(&context).unwrap());
    let (mut mutants, mut uncaught) = (0, Vec::new());
    for (number, line) in emitted.lines.iter().enumerate() {
        let effect = EFFECTS.iter().any(|effect| line.contains(&format!("tpu.{effect}\"")));
        let negation = NEGATED.iter().filter(|_| line.contains("arith.cmp")).find(|(from, _)| line.contains(from));
        let mutant = match negation {
            Some((from, to)) => emitted.replaced(number, from, to),
            None if effect => emitted.without(number),
            None => continue,
        };
        mutants += 1;
        if !matches!(judge(case, &mutant), Ok(Some(_))) {
            uncaught.push(format!("line {number}: {line}"));
        }
    }
    assert!(mutants >= 5 && uncaught.is_empty(), "of {mutants}:\n{}", uncaught.join("\n"));
}

/// Of KV blocks of 256 keys, rows that see no more than 128 work on as many.
#[test]
fn mutants_of_wide_blocks_are_caught() {
    let plan = rpa_plan(8, 128);
    assert_eq!(plan.widths(), [128, 256]);
    let lengths = [(1, 700), (0, 5), (13, 128), (8, 300), (1, 90)];
    let lengths = lengths.map(|(q_len, kv_len)| Lengths { q_len, kv_len });
    let inputs = random::rpa_inputs_of(plan.problem(), &lengths, 1, 1);
    let case = MosaicCase::Rpa(&plan, &inputs);
    assert_caught(
        case,
        &[
            ("many keys taken for few", |t| t.replaced(t.find(0, WIDTH), "sle", "sge"), Caught::Mismatch),
            (
                "half of the keys where one more is seen",
                |t| t.replaced(t.above(t.find(0, WIDTH), "constant 128 : i32"), "constant 128", "constant 200"),
                Caught::Mismatch,
            ),
        ],
    );
}

/// The comparison of what is seen with half of a block.
const WIDTH: &[&str] = &["cmpi sle", " : i32"];

#[test]
fn nothing_of_matmul_is_superfluous() {
    let plan = matmul_plan();
    let inputs = random::matmul_inputs(plan.problem(), 1);
    assert_nothing_is_superfluous(MosaicCase::Matmul(&plan, &inputs));
}

#[test]
fn nothing_of_attention_is_superfluous() {
    // Two ways through a block: of few rows, and of all.
    let plan = rpa_plan(16, 16);
    let inputs = rpa_inputs(plan.problem());
    assert_nothing_is_superfluous(MosaicCase::Rpa(&plan, &inputs));
}
