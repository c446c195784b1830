//! Elementwise ops in groups give what they give one by one: random kernels run unobserved, which groups them, and observed,
//! which does not. Results and counters must be the same.

use std::fmt::Write as _;

use pagoda_ir::{
    Context, Element, HostTensor, TensorType,
    mosaic::text,
    random::SplitMix64,
    tile_machine::{DmaOrder, Machine, Observer, Program},
};

/// Watches, and so sees ops one by one.
struct Watching;

impl Observer for Watching {}

/// Sizes of tiles: whole ones of more than one strip, what is spread to them, and smaller ones.
const SHAPES: [&str; 5] = ["24x128", "24x1", "1x128", "1x1", "8x128"];
const WHOLE: usize = 0;

/// A register: its name, which of `SHAPES` it has, and its element type.
#[derive(Clone, Debug)]
struct Register {
    name: String,
    shape: usize,
    element: &'static str,
}

impl Register {
    fn ty(&self) -> String {
        format!("vector<{}x{}>", SHAPES[self.shape], self.element)
    }
}

struct Kernel {
    random: SplitMix64,
    text: String,
    registers: Vec<Register>,
    next: usize,
}

impl Kernel {
    fn pick<'t>(&mut self, list: &[&'t str]) -> &'t str {
        list[self.random.below(list.len())]
    }

    fn name(&mut self) -> String {
        self.next += 1;
        format!("%r{}", self.next)
    }

    /// A register of the element type and shape, made if there is none.
    fn any(&mut self, element: &'static str, shape: usize) -> Register {
        let found = self.registers.iter().filter(|register| register.element == element && register.shape == shape);
        let found: Vec<Register> = found.cloned().collect();
        match found.len() {
            n if n > 0 && self.random.below(8) > 0 => {
                // Rather a recent one.
                let back = self.random.below(n.min(4));
                found[n - 1 - back].clone()
            }
            _ => self.leaf(element, shape),
        }
    }

    fn make(&mut self, element: &'static str, shape: usize, op: impl FnOnce(&str) -> String) -> Register {
        let register = Register { name: self.name(), shape, element };
        let line = op(&register.ty());
        let _ = writeln!(self.text, "  {} = {line}", register.name);
        self.registers.push(register.clone());
        register
    }

    /// A constant, a number in every element, or a tile that is spread.
    fn leaf(&mut self, element: &'static str, shape: usize) -> Register {
        let number = match element {
            "f32" | "bf16" => self.pick(&["0.0", "1.0", "-2.5", "0.33"]),
            "i1" => self.pick(&["true", "false"]),
            _ => self.pick(&["0", "1", "-7", "5", "33"]),
        };
        match self.random.below(4) {
            0 if element != "i1" => {
                let scalar = self.name();
                let _ = writeln!(self.text, "  {scalar} = arith.constant {number} : {element}");
                self.make(element, shape, |ty| format!("vector.broadcast {scalar} : {element} to {ty}"))
            }
            1 | 2 if shape == WHOLE && element != "i1" => {
                let from = 1 + self.random.below(3);
                let small = self.any(element, from);
                let small_type = small.ty();
                self.make(element, shape, |ty| format!("vector.broadcast {} : {small_type} to {ty}", small.name))
            }
            _ => self.make(element, shape, |ty| format!("arith.constant dense<{number}> : {ty}")),
        }
    }

    fn load(&mut self) {
        let (element, memory) = [("f32", "x"), ("i32", "n"), ("bf16", "h")][self.random.below(3)];
        let shape = self.random.below(SHAPES.len());
        self.make(element, shape, |ty| {
            format!("vector.load %{memory}[%c, %c] : memref<24x128x{element}, \"vmem\">, {ty}")
        });
    }

    fn store(&mut self) {
        let (element, memory) = [("f32", "fo"), ("i32", "io"), ("bf16", "ho")][self.random.below(3)];
        let value = self.any(element, WHOLE);
        let ty = value.ty();
        let _ = writeln!(
            self.text,
            "  vector.store {}, %{memory}[%c, %c] : memref<24x128x{element}, \"vmem\">, {ty}",
            value.name
        );
    }

    fn op(&mut self) {
        let shape = if self.random.below(4) > 0 { WHOLE } else { self.random.below(SHAPES.len()) };
        let float = self.pick(&["f32", "f32", "bf16"]);
        let float = if float == "f32" { "f32" } else { "bf16" };
        match self.random.below(16) {
            0..=3 => {
                let op = self.pick(&["addf", "subf", "mulf", "divf", "maximumf", "minimumf", "maxnumf"]);
                let (x, y) = (self.any(float, shape), self.any(float, shape));
                self.make(float, shape, |ty| format!("arith.{op} {}, {} : {ty}", x.name, y.name));
            }
            4 | 5 => {
                let op = self.pick(&["arith.negf", "math.exp", "math.absf", "math.tanh", "math.sqrt", "math.floor"]);
                let x = self.any(float, shape);
                self.make(float, shape, |ty| format!("{op} {} : {ty}", x.name));
            }
            6..=8 => {
                let ops = ["addi", "subi", "muli", "andi", "ori", "xori", "shli", "shrsi", "shrui", "maxsi", "minui"];
                let (op, x, y) = (self.pick(&ops), self.any("i32", shape), self.any("i32", shape));
                self.make("i32", shape, |ty| format!("arith.{op} {}, {} : {ty}", x.name, y.name));
            }
            9 => {
                let predicate = self.pick(&["olt", "oge", "oeq", "une", "uno"]);
                let (x, y) = (self.any(float, shape), self.any(float, shape));
                let of = x.ty();
                self.make("i1", shape, |_| format!("arith.cmpf {predicate}, {}, {} : {of}", x.name, y.name));
            }
            10 => {
                let predicate = self.pick(&["slt", "uge", "eq", "ne"]);
                let (x, y) = (self.any("i32", shape), self.any("i32", shape));
                let of = x.ty();
                self.make("i1", shape, |_| format!("arith.cmpi {predicate}, {}, {} : {of}", x.name, y.name));
            }
            11 => {
                let element = ["f32", "i32", "bf16", "i1"][self.random.below(4)];
                let (c, x, y) = (self.any("i1", shape), self.any(element, shape), self.any(element, shape));
                let of = c.ty();
                self.make(element, shape, |ty| format!("arith.select {}, {}, {} : {of}, {ty}", c.name, x.name, y.name));
            }
            12 => {
                let op = self.pick(&["andi", "ori", "xori"]);
                let (x, y) = (self.any("i1", shape), self.any("i1", shape));
                self.make("i1", shape, |ty| format!("arith.{op} {}, {} : {ty}", x.name, y.name));
            }
            13 => {
                let conversions = [
                    ("arith.sitofp", "i32", "f32"),
                    ("arith.fptosi", "f32", "i32"),
                    ("arith.extf", "bf16", "f32"),
                    ("arith.truncf", "f32", "bf16"),
                    ("arith.extui", "i1", "i32"),
                    ("arith.extsi", "i1", "i32"),
                    ("arith.bitcast", "f32", "i32"),
                    ("arith.bitcast", "i32", "f32"),
                ];
                let (op, from, to) = conversions[self.random.below(conversions.len())];
                let x = self.any(from, shape);
                let of = x.ty();
                self.make(to, shape, |ty| format!("{op} {} : {of} to {ty}", x.name));
            }
            14 if shape == WHOLE => {
                // Sums of rows, as a column, and back under another name.
                let (x, zeros, sums) = (self.any("f32", WHOLE), self.name(), self.name());
                let of = x.ty();
                let _ = writeln!(self.text, "  {zeros} = arith.constant dense<0.0> : vector<24xf32>");
                let _ = writeln!(
                    self.text,
                    "  {sums} = vector.multi_reduction <add>, {}, {zeros} [1] : {of} to vector<24xf32>",
                    x.name
                );
                self.make("f32", 1, |ty| format!("vector.shape_cast {sums} : vector<24xf32> to {ty}"));
            }
            14 => self.load(),
            _ => {
                let x = self.any("f32", WHOLE);
                let (of, other) = (x.ty(), self.name());
                let _ = writeln!(self.text, "  {other} = vector.shape_cast {} : {of} to vector<3072xf32>", x.name);
                self.make("f32", WHOLE, |ty| format!("vector.shape_cast {other} : vector<3072xf32> to {ty}"));
            }
        }
    }

    fn ops(&mut self, count: usize) {
        for _ in 0..count {
            match self.random.below(10) {
                0 => self.load(),
                1 => self.store(),
                _ => self.op(),
            }
        }
    }

    /// A loop that carries a tile, or a branch.
    fn nested(&mut self) {
        let outside = self.registers.clone();
        let carried = self.any("f32", WHOLE);
        let (result, ty) = (self.name(), carried.ty());
        let loops = self.random.below(2) == 0;
        let inner = self.name();
        match loops {
            true => {
                let _ = writeln!(
                    self.text,
                    "  {result} = scf.for %i{result_} = %zero to %three step %one iter_args({inner} = {}) -> ({ty}) : i32 {{",
                    carried.name,
                    result_ = &result[1..]
                );
                self.registers.push(Register { name: inner, ..carried.clone() });
            }
            false => {
                let _ = writeln!(self.text, "  {result} = scf.if %yes -> ({ty}) {{");
            }
        }
        let count = 1 + self.random.below(8);
        self.ops(count);
        let last = self.any("f32", WHOLE);
        let _ = writeln!(self.text, "  scf.yield {} : {ty}", last.name);
        self.registers = outside;
        self.registers.push(carried.clone());
        if !loops {
            let _ = writeln!(self.text, "  }} else {{\n  scf.yield {} : {ty}", carried.name);
        }
        let _ = writeln!(self.text, "  }}");
        self.registers.push(Register { name: result, ..carried });
    }
}

fn kernel(seed: u64) -> String {
    let arrays = ["x: f32", "n: i32", "h: bf16", "fo: f32", "io: i32", "ho: bf16"].map(|argument| {
        let (name, element) = argument.split_once(": ").expect("a name");
        format!("%{name}: memref<24x128x{element}, \"vmem\">")
    });
    let mut kernel = Kernel { random: SplitMix64::new(seed), text: String::new(), registers: vec![], next: 0 };
    let _ = writeln!(kernel.text, "func.func @k({}) {{", arrays.join(", "));
    kernel.text +=
        "  %c = arith.constant 0 : index\n  %zero = arith.constant 0 : i32\n  %one = arith.constant 1 : i32\n";
    kernel.text += "  %three = arith.constant 3 : i32\n  %yes = arith.cmpi slt, %zero, %one : i32\n";
    // All of the outputs is written.
    for (element, memory) in [("f32", "fo"), ("i32", "io"), ("bf16", "ho")] {
        let zero = kernel.leaf(element, WHOLE);
        let ty = zero.ty();
        let _ = writeln!(
            kernel.text,
            "  vector.store {}, %{memory}[%c, %c] : memref<24x128x{element}, \"vmem\">, {ty}",
            zero.name
        );
    }
    for _ in 0..2 {
        let count = kernel.random.below(16);
        kernel.ops(count);
        kernel.nested();
    }
    (0..4).for_each(|_| kernel.store());
    kernel.text + "  return\n}\n"
}

#[test]
fn groups_give_what_their_ops_give() {
    let context = Context::new();
    let mut random = SplitMix64::new(7);
    let mut draw = |element, scale: f64| {
        let values: Vec<f64> = (0..24 * 128).map(|_| scale * (random.below(2001) as f64 / 1000.0 - 1.0)).collect();
        HostTensor::from_f64(element, &[24, 128], &values)
    };
    let inputs = [draw(Element::F32, 3.0), draw(Element::I32, 1e6), draw(Element::Bf16, 3.0)];
    let outputs = [Element::F32, Element::I32, Element::Bf16].map(|element| TensorType::new(element, &[24, 128]));
    let machine = Machine { dma: DmaOrder::Late, ..Machine::default() };
    for seed in 0..200 {
        let text = kernel(seed);
        let module = text::parse(&context, &text, "k").unwrap_or_else(|error| panic!("{error}\n{text}"));
        let program = Program::decode(&module).unwrap_or_else(|error| panic!("{error}\n{text}"));
        let grouped = program.run(&machine, &inputs, &outputs).unwrap_or_else(|fault| panic!("{fault}\n{text}"));
        let alone = program.run_observed(&machine, &inputs, &outputs, &mut Watching).expect("no fault");
        assert!(grouped.outputs == alone.outputs, "seed {seed}\n{text}");
        assert_eq!(grouped.counters, alone.counters, "seed {seed}\n{text}");
    }
}
