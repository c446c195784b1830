//! A kernel outside Pagoda's workspace, on its public API alone: GELU of a matrix, in the tanh form that GPT-2 and Gemma use.
//!
//! The program checks the kernel on 300 drawn cases (every order of DMAs, no undefined access, close to the f64 reference),
//! prints a plan for v5p, and writes the kernel's Mosaic to stdout. `kernels/GUIDE.md` explains each method.

use std::{error::Error, f64::consts::PI, fmt};

use pagoda_ir::{
    Context, Element, TensorType,
    mosaic::{Builder, IntoOperand, Ref, Semantics, Window},
    stablehlo::{self, Tensor},
};
use pagoda_kernels::{
    Argument, Arguments, Arrays, Choices, Drawn, Invalid, Kernel, Named, Options, PlanError, Planned,
    check::{Expected, Tolerance},
    chips::Chip,
    error::{MAX_ELEMENTS, ensure, ensure_product},
    kernel::{Sample, TileSizes},
    plan::{self, Layout, Spilling},
    problem::Specification,
    random::Lengths,
    vmem::{Buffer, BufferKind, Bytes, VmemReport},
};
use serde::{Deserialize, Serialize};

/// `out = gelu(x)`, element by element.
#[derive(Clone, Copy, Debug)]
struct Gelu;

type Problem = pagoda_kernels::Problem<Spec>;
type Plan = pagoda_kernels::Plan<Gelu>;

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Spec {
    rows: usize,
    columns: usize,
    element: Element,
}

impl Specification for Spec {
    fn validate(&self) -> Result<(), Invalid> {
        let Self { rows, columns, element } = *self;
        for (key, size) in [("rows", rows), ("columns", columns)] {
            ensure(size > 0, "gelu problem", key, size, || "is below 1".into(), "give at least 1")?;
        }
        ensure_product("gelu problem", "rows * columns", &[rows, columns], MAX_ELEMENTS)?;
        let float = matches!(element, Element::F32 | Element::Bf16);
        ensure(float, "gelu problem", "element", element, || "is neither f32 nor bf16".into(), "convert x")
    }
}

/// Rows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Tiles {
    rows: usize,
}

impl TileSizes for Tiles {
    const FORM: &'static str = "ROWS";

    fn parse(text: &str) -> Result<Self, PlanError> {
        let [rows] = plan::positive_numbers(text, "a positive number of rows", "128")?;
        Ok(Self { rows })
    }
}

impl fmt::Display for Tiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.rows)
    }
}

/// Bytes between HBM and VMEM.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Details {
    moved: Bytes,
}

impl fmt::Display for Details {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<24} {}", "moved", self.moved)
    }
}

/// Rows and lanes that the body works on at a time: few enough for the registers.
const GROUP: [usize; 2] = [16, 512];
const CUBE: f64 = 0.044715;

impl Kernel for Gelu {
    const NAME: &'static str = "gelu";
    const ABOUT: &'static str = "0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))";

    type Spec = Spec;
    type Tiles = Tiles;
    type Details = Details;

    fn describe(problem: &Problem) -> String {
        format!("{}x{} {}", problem.rows, problem.columns, problem.element)
    }

    fn arguments(problem: &Problem) -> Arguments {
        Arguments::new([Argument::input("x", matrix(problem))])
    }

    fn results(problem: &Problem) -> Named<TensorType> {
        [("out", matrix(problem))].into_iter().collect()
    }

    fn reference(_: &Problem, inputs: &Arrays) -> Vec<Expected> {
        let x = inputs["x"].to_f64();
        let gelu = |x: &f64| 0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + CUBE * x.powi(3))).tanh());
        let magnitude = x.iter().map(|x| x.abs()).collect();
        // One rounding of the result; before it, a few of f32, each relative to x at most.
        let tolerance = Tolerance::of_sum(inputs["x"].element(), 1);
        vec![Expected::new(x.iter().map(gelu).collect(), magnitude, tolerance)]
    }

    fn stablehlo<'c, 'a>(
        b: &stablehlo::Builder<'c, 'a>,
        problem: &Problem,
        args: &Named<Tensor<'c, 'a>>,
    ) -> pagoda_ir::Result<Vec<Tensor<'c, 'a>>> {
        let x = b.convert(args["x"], Element::F32)?;
        let number = |value| b.splat(Element::F32, &[problem.rows, problem.columns], value);
        let cube = b.multiply(b.multiply(b.multiply(x, x)?, x)?, number(CUBE)?)?;
        let tanh = b.tanh(b.multiply(b.add(x, cube)?, number((2.0 / PI).sqrt())?)?)?;
        let out = b.multiply(b.multiply(x, number(0.5)?)?, b.add(tanh, number(1.0)?)?)?;
        Ok(vec![b.convert(out, problem.element)?])
    }

    fn mosaic<'a>(k: &'a Builder<'a>, plan: &Plan) {
        let (problem, rows) = (plan.problem(), plan.tiles().rows);
        let (dims, group) = ([problem.rows, problem.columns], GROUP[0].min(rows));
        k.grid([(plan.grid()[0], Semantics::Parallel)]);
        let window = || Window::blocks(&[rows, problem.columns], |t| (t.grid(0), 0));
        let window = || if one_block_per_core(plan) { window().single_buffered() } else { window() };
        let x = k.input("x", problem.element, &dims, window());
        let out = k.output("out", problem.element, &dims, window());
        let block = Block { x, out, plan };
        k.for_range(0, rows / group, |index| block.write((index * group).multiple_of(group), group));
        if rows % group > 0 {
            block.write(rows - rows % group, rows % group);
        }
    }

    fn legal(problem: &Problem, _: Chip, tiles: Tiles) -> Result<(), PlanError> {
        let part = tiles.rows > 0 && tiles.rows < problem.rows && tiles.rows.is_multiple_of(8);
        if part || tiles.rows == problem.rows {
            return Ok(());
        }
        let limit = format!("is neither the whole {} nor a multiple of 8 below it", problem.rows);
        let fix = format!("give {}", problem.rows);
        Err(PlanError { key: "tiles.rows", value: tiles.rows.to_string(), limit, fix })
    }

    /// The largest block that leaves a mebibyte for spills.
    fn choose(problem: &Problem, chip: Chip, limit: Bytes, _: &[Vec<Lengths>]) -> Option<Tiles> {
        let powers = (3..12).map(|power| 1 << power).filter(|&rows| rows < problem.rows);
        let candidates = powers.chain([problem.rows]).map(|rows| Tiles { rows });
        candidates.filter(|&tiles| report(problem, chip, tiles).total() + Bytes::mib(1) <= limit).max()
    }

    fn layout(problem: &Problem, chip: Chip, tiles: Tiles) -> Layout<Details> {
        let [rows, lanes] = GROUP;
        Layout {
            name: format!("gelu-r{tiles}"),
            grid: vec![problem.rows.div_ceil(tiles.rows)],
            vmem: report(problem, chip, tiles),
            smem: Bytes(0),
            spilling: Spilling { family: problem.element.to_string(), live: Bytes((2 * rows * lanes * 4) as u64) },
            details: Details { moved: Bytes(2 * matrix(problem).bytes() as u64) },
        }
    }

    fn sample(choices: &mut Choices) -> Sample<Self> {
        let element = choices.one_of(&[Element::F32, Element::Bf16]);
        let (rows, columns) = (choices.within(1, 100), choices.within(1, 1200));
        let tiles = Some(8 * choices.within(0, rows / 8)).filter(|&tile| tile > 0 && tile < rows).unwrap_or(rows);
        Sample { spec: Spec { rows, columns, element }, tiles: Tiles { rows: tiles }, batch: None }
    }
}

/// The windows of one grid step.
struct Block<'a, 'p> {
    x: Ref<'a>,
    out: Ref<'a>,
    plan: &'p Plan,
}

impl<'a> Block<'a, '_> {
    /// Writes `count` rows from row `first` on, some lanes at a time.
    fn write(&self, first: impl IntoOperand<'a>, count: usize) {
        let (problem, [_, lanes]) = (self.plan.problem(), GROUP);
        for lane in (0..problem.columns).step_by(lanes) {
            let part = |of: &Ref<'a>| of.slice(0, first, count).slice(1, lane, lanes.min(problem.columns - lane));
            let x = part(&self.x).load().cast(Element::F32);
            let tanh = ((x + x * x * x * CUBE) * (2.0 / PI).sqrt()).tanh();
            part(&self.out).store((x * 0.5 * (tanh + 1.0)).cast(problem.element));
        }
    }
}

fn matrix(problem: &Problem) -> TensorType {
    TensorType::new(problem.element, &[problem.rows, problem.columns])
}

fn one_block_per_core(plan: &Plan) -> bool {
    plan.grid()[0] <= plan.chip().info().cores
}

/// The windows of x and of the result: two buffers each, unless no core moves them.
fn report(problem: &Problem, chip: Chip, tiles: Tiles) -> VmemReport {
    let copies = if problem.rows.div_ceil(tiles.rows) <= chip.info().cores { 1 } else { 2 };
    let window = |name, kind| Buffer::new(name, kind, problem.element, &[tiles.rows, problem.columns], copies);
    VmemReport { buffers: vec![window("x", BufferKind::InputWindow), window("out", BufferKind::OutputWindow)] }
}

fn main() -> Result<(), Box<dyn Error>> {
    for seed in 0..300 {
        let case = Drawn::<Gelu>::new(Choices::of_seed(seed));
        let name = |error| {
            format!("case {seed}, {} on {}, {}: {error}", case.plan.name(), case.plan.chip(), case.plan.describe())
        };
        case.check(None).map_err(name)?;
    }
    let problem = Problem::new(Spec { rows: 1000, columns: 14336, element: Element::Bf16 })?;
    let plan = Plan::new(problem, Chip::V5p, Options::default())?;
    eprintln!("{}", Planned::new(&plan));
    println!("{}", plan.kernel(&Context::new())?.text());
    Ok(())
}
