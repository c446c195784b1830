//! The Mosaic builder and the wire format.

use pagoda_ir::{
    Context, Element, Error, HostTensor, TensorType,
    mosaic::{self, Builder, DotDims, Kernel, MemorySpace, Precision, Semantics, Signature, Window, text, wire},
    stablehlo,
    tile_machine::{DmaOrder, Machine, Program},
};

/// `C[256, 128] = A[256, 256] B[256, 128]`, 128 x 128 x 128 at a time.
fn matmul(context: &Context) -> Kernel<'_> {
    let kernel = mosaic::kernel(context, "matmul", |k| {
        k.vmem_limit(8 << 20);
        let [_, _, step] = k.grid([(2, Semantics::Parallel), (1, Semantics::Parallel), (2, Semantics::Arbitrary)]);
        let a = k.input("a", Element::Bf16, &[256, 256], Window::blocks(&[128, 128], |t| [t.grid(0), t.grid(2)]));
        let b = k.input("b", Element::Bf16, &[256, 128], Window::blocks(&[128, 128], |t| [t.grid(2), t.grid(1)]));
        let c = k.output("c", Element::F32, &[256, 128], Window::blocks(&[128, 128], |t| [t.grid(0), t.grid(1)]));
        let sum = k.scratch("sum", MemorySpace::Vmem, Element::F32, &[128, 128]);
        k.when(step.equals(0), || sum.store(0.0));
        sum.store(k.matmul(a.load(), b.load(), sum.load()));
        k.when(step.equals(1), || c.store(sum.load()));
    });
    kernel.expect("the kernel fits")
}

#[test]
fn matmul_is_emitted_as_mosaic() {
    insta::assert_snapshot!(matmul(&Context::new()).text());
}

#[test]
fn a_kernel_becomes_a_custom_call_and_comes_back() {
    let context = Context::new();
    let kernel = matmul(&context);
    let module = stablehlo::Module::new(&context, "main");
    module.function("main", &kernel.inputs(), |b, operands| kernel.call(b, operands)).expect("the operands fit");
    module.verify().expect("the module is sound");
    let written = [("text", module.text().into_bytes()), ("bytecode", module.bytecode())];
    for (form, module) in written {
        let calls = wire::find_custom_calls(&module).unwrap();
        assert_eq!(calls.len(), 1, "{form}");
        if form == "text" {
            assert_eq!(calls[0].types, Some((kernel.inputs(), kernel.outputs())));
        }
        let opened = wire::open(&context, &calls[0].backend_config).expect("the body is readable");
        assert_eq!(opened.vmem_limit, Some(8 << 20), "{form}");
        assert_eq!(text::print(&opened.module), kernel.text(), "{form}");
        assert_eq!(Signature::read(&opened.module), Signature::read(kernel.module()), "{form}");
    }
    // Readable text, which libtpu takes as a body too, is read back as well (with memory spaces as strings).
    let reread = text::parse(&context, &kernel.text(), "kernel.mlir").expect("the text is readable");
    assert_eq!(Signature::read(&reread), Signature::read(kernel.module()), "names included");
    assert_eq!(wire::op_counts(&reread), wire::op_counts(kernel.module()));
    Program::decode(&reread).expect("and runs");
}

#[test]
fn the_summary_lists_buffers_and_ops() {
    let context = Context::new();
    let kernel = matmul(&context);
    let opened = wire::open(&context, &wire::backend_config(&kernel)).expect("the body is readable");
    let summary = wire::summarize(&opened).expect("it is a kernel");
    let buffers: Vec<_> =
        summary.buffers.iter().map(|b| (b.name.as_str(), b.role, b.shape.as_str(), b.memory, b.bytes)).collect();
    assert_eq!(
        buffers,
        [
            ("a", "operand", "bf16[128,128]", "vmem", 2 * 128 * 128 * 2),
            ("b", "operand", "bf16[128,128]", "vmem", 2 * 128 * 128 * 2),
            ("c", "operand", "f32[128,128]", "vmem", 2 * 128 * 128 * 4),
            ("sum", "scratch", "f32[128,128]", "vmem", 128 * 128 * 4),
        ]
    );
    assert_eq!(summary.vmem_bytes, 5 * 65536);
    assert_eq!(summary.grid, [(Some(2), "parallel"), (Some(1), "parallel"), (Some(2), "arbitrary")]);
    assert_eq!((summary.ops["tpu.matmul"], summary.ops["tpu.vector_store"], summary.ops["scf.if"]), (1, 3, 2));
}

/// A cache that the kernel updates in place: the call says so, and a reader of the module sees it.
#[test]
fn aliases_are_written_and_found() {
    let context = Context::new();
    let kernel = mosaic::kernel(&context, "update", |k| {
        k.grid([(1, Semantics::Arbitrary)]);
        let rows = k.input("rows", Element::F32, &[8, 128], Window::whole(&[8, 128]));
        k.hbm_input("cache", Element::F32, &[64, 128]);
        let cache = k.hbm_output("updated", Element::F32, &[64, 128]);
        let semaphore = k.dma_semaphores("semaphore", &[]);
        k.alias(1, 0);
        k.async_copy(rows, cache.slice(0, 16, 8), semaphore).wait();
    });
    let kernel = kernel.expect("the kernel fits");
    let module = stablehlo::Module::new(&context, "main");
    module.function("main", &kernel.inputs(), |b, operands| kernel.call(b, operands)).expect("the operands fit");
    let calls = wire::find_custom_calls(module.text().as_bytes()).unwrap();
    assert_eq!((calls[0].aliases.as_slice(), kernel.aliases()), ([(1, 0)].as_slice(), [(1, 0)].as_slice()));
}

/// `scaled_sums.mlir` and `scaled_sums_0_12.mlir` are what JAX 0.10.2 and 0.12.0 made of the Pallas kernel in `scaled_sums.py`.
#[test]
fn a_kernel_lowered_by_jax_opens_and_runs() {
    opens_and_runs(include_bytes!("../data/scaled_sums.mlir"));
    opens_and_runs(include_bytes!("../data/scaled_sums_0_12.mlir"));
}

fn opens_and_runs(lowered: &[u8]) {
    let context = Context::new();
    let calls = wire::find_custom_calls(lowered).unwrap();
    assert_eq!(calls.len(), 1);
    let opened = wire::open(&context, &calls[0].backend_config).expect("the body is readable");
    assert_eq!(opened.vmem_limit, Some(8 << 20));
    let (operands, outputs) = calls[0].types.clone().expect("text has the types");
    assert_eq!(operands, [TensorType::new(Element::I32, &[2]), TensorType::new(Element::F32, &[64, 128])]);
    let text = opened.module.as_operation().to_string();
    for part in
        ["func.func @scaled_sums", "scf.for", "\"tpu.enqueue_dma\"", "memref<64x128xf32, #tpu.memory_space<hbm>>"]
    {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let x: Vec<f32> = (0..64 * 128).map(|i| (i as f32 * 0.37).sin()).collect();
    let inputs = [HostTensor::new(&[2], &[5i32, 3]), HostTensor::new(&[64, 128], &x)];
    let leaky = |x: f32| f64::from(if x > 0.0 { x } else { 0.5 * x });
    let expected: Vec<f64> =
        (0..8 * 128).map(|at| 3.0 * (0..5).map(|tile| leaky(x[tile * 8 * 128 + at])).sum::<f64>()).collect();
    let program = Program::decode(&opened.module).expect("every op is known");
    // Locations stand in the body, or apart from it: here of a copy from behind the array.
    let outside = [HostTensor::new(&[2], &[9i32, 3]), inputs[1].clone()];
    let fault = program.run(&Machine::default(), &outside, &outputs).expect_err("there are eight tiles");
    assert!(fault.location.contains("scaled_sums.py:24 in"), "{}", fault.location);
    for dma in [DmaOrder::Early, DmaOrder::Late, DmaOrder::Random(1)] {
        let machine = Machine { dma, ..Machine::default() };
        let run = program.run(&machine, &inputs, &outputs);
        let run = run.unwrap_or_else(|fault| panic!("{fault}"));
        // f32 sums of five terms of size 1.
        let close = |(got, want): (f64, &f64)| (got - want).abs() < 1e-5;
        assert!(run.outputs[0].to_f64().into_iter().zip(&expected).all(close));
        // Five tiles, and the two prefetched rows.
        assert_eq!((run.counters.copies, run.counters.hbm_bytes_read), (5, 5 * 8 * 128 * 4 + 8));
    }
    // The readable text, semaphores and all, is the same kernel.
    let reread = wire::deserialize(&context, text.as_bytes()).expect("the text is readable");
    assert_eq!(Signature::read(&reread).map(|s| s.arguments.len()), Ok(5));
    let run = Program::decode(&reread).expect("known ops").run(&Machine::default(), &inputs, &outputs);
    assert!(run.is_ok_and(|run| run.counters.copies == 5));
}

#[test]
fn damaged_bodies_are_errors() {
    let context = Context::new();
    let config = wire::backend_config(&matmul(&context));
    let body = |text: &str| format!("{{\"custom_call_config\": {{\"body\": \"{text}\"}}}}");
    let cases = [
        ("not json".to_owned(), "is not JSON"),
        ("{\"custom_call_config\": {}}".into(), "no `custom_call_config.body`"),
        (body("%%%"), "is not base64"),
        (body("AAAA"), "the module has 0 functions"),
        (config.replacen("TUzvUg", "TUzvUgAAAAAAAA", 1), "is not an MLIR module"),
    ];
    let body = wire::serialize(matmul(&context).module());
    for length in (4..2000).step_by(101) {
        assert!(
            wire::deserialize(&context, &body[..length.min(body.len() - 1)]).is_err(),
            "{length} bytes of {}",
            body.len()
        );
    }
    for version in [wire::OLDEST_VERSION - 1, wire::NEWEST_VERSION + 1] {
        let text = format!("module attributes {{stable_mosaic.version = {version} : i64}} {{}}");
        let error = wire::deserialize(&context, text.as_bytes()).expect_err("another version").to_string();
        assert!(error.contains(&format!("stable_mosaic.version {version}")) && error.contains("11 to 18"), "{error}");
    }
    // The scanner: a key with nothing before it, and so many that none may be looked at more than a few times.
    assert_eq!(wire::find_custom_calls(b"custom_call_config"), Ok(vec![]));
    let many =
        ["{", "{\\22", "{\"", "custom_call_config{"].map(|start| [start, "custom_call_config"].concat().repeat(20_000));
    for module in many {
        assert_eq!(wire::find_custom_calls(module.as_bytes()), Ok(vec![]));
        assert!(wire::find_custom_calls((module + wire::TARGET).as_bytes()).is_err());
    }
    for (config, expected) in cases {
        let error = wire::open(&context, &config).err().expect("damaged").to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// What the pipeline keeps twice, as the compiler's own report has it (libtpu 0.0.52, v5p).
#[test]
fn windows_that_move_have_two_buffers() {
    let context = Context::new();
    let kernel = mosaic::kernel(&context, "windows", |k| {
        k.grid([(1, Semantics::Parallel), (4, Semantics::Arbitrary)]);
        k.prefetch("order", Element::I32, &[4]);
        let dims = [64, 128];
        k.input("moving", Element::F32, &dims, Window::blocks(&[16, 128], |t| (t.grid(1), 0)));
        k.input(
            "ordered",
            Element::F32,
            &dims,
            Window::blocks(&[16, 128], |t| (t.prefetch(0).at(t.grid(1)).load(), 0)),
        );
        k.input("asked for one", Element::F32, &dims, Window::blocks(&[16, 128], |t| (t.grid(1), 0)).single_buffered());
        k.input("whole", Element::F32, &dims, Window::whole(&dims));
        k.input("fixed", Element::F32, &dims, Window::blocks(&[16, 128], |t| (t.prefetch(0).at(0).load(), 0)));
        k.input("along one step", Element::F32, &dims, Window::blocks(&[16, 128], |t| (t.grid(0) + 1, 0)));
    });
    let kernel = kernel.expect("the kernel fits");
    let doubled: Vec<_> = kernel.operands().iter().filter(|o| o.double_buffered).map(|o| o.name.as_str()).collect();
    assert_eq!(doubled, ["moving", "ordered"]);
    let bytes = (2 + 2 + 1 + 4 + 1 + 1) * 16 * 128 * 4;
    assert_eq!(Signature::read(kernel.module()).expect("it is a kernel").vmem_bytes(), bytes);
}

/// Sizes that libtpu 0.0.52 reported for scratch buffers on v5p.
#[test]
fn buffers_are_padded_as_the_compiler_pads_them() {
    let reported: &[(Element, &[usize], usize)] = &[
        (Element::F32, &[1, 128], 512),
        (Element::F32, &[3, 128], 2048),
        (Element::F32, &[5, 130], 8192),
        (Element::F32, &[12, 128], 8192),
        (Element::F32, &[4, 3, 128], 8192),
        (Element::F32, &[100], 512),
        (Element::Bf16, &[1, 128], 512),
        (Element::Bf16, &[3, 128], 1024),
        (Element::Bf16, &[7, 128], 2048),
        (Element::Bf16, &[12, 128], 4096),
        (Element::Bf16, &[2, 128, 4, 128], 262_144),
        (Element::Bf16, &[5, 16, 64], 20_480),
        (Element::Bf16, &[1000], 2048),
        (Element::Bf16, &[3000], 6144),
        (Element::I8, &[4, 128], 512),
        (Element::I8, &[32, 128], 4096),
        (Element::I8, &[64, 64], 8192),
    ];
    for &(element, dims, bytes) in reported {
        assert_eq!(mosaic::tile_padded_bytes(element, dims), bytes, "{element}{dims:?}");
    }
}

/// Every check of the builder names its op and prints the shapes.
#[test]
fn mistakes_name_the_op() {
    type Body = for<'a> fn(&'a Builder<'a>);
    let cases: &[(&str, &str, Body)] = &[
        ("arith.addf", "f32[8,128] and f32[8,64] do not broadcast", |k| {
            let _ = k.zeros(Element::F32, &[8, 128]) + k.zeros(Element::F32, &[8, 64]);
        }),
        ("arith.mulf", "f32[8,128] and bf16[8,128]: cast one side", |k| {
            let _ = k.zeros(Element::F32, &[8, 128]) * k.zeros(Element::Bf16, &[8, 128]);
        }),
        ("tpu.matmul", "contracting dimensions 1 of size 128 and 0 of size 64", |k| {
            let (lhs, rhs) = (k.zeros(Element::Bf16, &[8, 128]), k.zeros(Element::Bf16, &[64, 128]));
            k.matmul(lhs, rhs, k.zeros(Element::F32, &[8, 128]));
        }),
        ("tpu.matmul", "the accumulator must be f32[8,128]", |k| {
            let (lhs, rhs) = (k.zeros(Element::Bf16, &[8, 64]), k.zeros(Element::Bf16, &[64, 128]));
            k.dot_general(lhs, rhs, k.zeros(Element::Bf16, &[8, 128]), &DotDims::nn(), Precision::Default);
        }),
        ("vector.load", "only VMEM holds tiles to load", |k| {
            k.hbm_input("x", Element::F32, &[8, 128]).load();
        }),
        ("memref.load", "one scalar at a time", |k| {
            k.prefetch("x", Element::I32, &[8]).load();
        }),
        ("tpu.vector_store", "a value f32[8,64] into f32[8,128] in vmem", |k| {
            k.scratch("x", MemorySpace::Vmem, Element::F32, &[8, 128]).store(k.zeros(Element::F32, &[8, 64]));
        }),
        ("tpu.memref_slice", "4 elements from 6 with stride 1 of dimension 0 of size 8", |k| {
            k.scratch("x", MemorySpace::Vmem, Element::F32, &[8, 128]).slice(0, 6, 4).load();
        }),
        ("tpu.enqueue_dma", "from f32[8,128] in hbm to f32[16,128] in vmem", |k| {
            let x = k.hbm_input("x", Element::F32, &[8, 128]);
            let y = k.scratch("y", MemorySpace::Vmem, Element::F32, &[16, 128]);
            k.async_copy(x, y, k.dma_semaphores("s", &[]));
        }),
        ("tpu.enqueue_dma", "give one dma_semaphore", |k| {
            let x = k.hbm_input("x", Element::F32, &[8, 128]);
            let y = k.scratch("y", MemorySpace::Vmem, Element::F32, &[8, 128]);
            k.async_copy(x, y, k.dma_semaphores("s", &[2]));
        }),
        ("tpu.enqueue_dma", "whole tiles of 128 lanes", |k| {
            let x = k.hbm_input("x", Element::F32, &[8, 256]).slice(1, 64, 128);
            let y = k.scratch("y", MemorySpace::Vmem, Element::F32, &[8, 128]);
            k.async_copy(x, y, k.dma_semaphores("s", &[]));
        }),
        ("func.func", "block [100, 128]: the size of dimension 0", |k| {
            k.grid([(2, Semantics::Arbitrary)]);
            k.input("x", Element::F32, &[200, 128], Window::blocks(&[100, 128], |t| (t.grid(0), 0)));
        }),
        ("func.func", "the order is prefetch, input, output, scratch", |k| {
            k.scratch("y", MemorySpace::Vmem, Element::F32, &[8, 128]);
            k.hbm_input("x", Element::F32, &[8, 128]);
        }),
        ("func.func", "every size must be from 1", |k| {
            k.hbm_input("x", Element::F32, &[0, 128]);
        }),
        ("scf.if", "the condition must be a scalar pred, not i32[]", |k| k.when(k.int(1), || ())),
        ("scf.for", "the body yields f32 as value 0, which is i32", |k| {
            k.fold_range(0, 4, k.int(0), |_, n| n.cast(Element::F32));
        }),
        ("vector.multi_reduction", "Sum over dimensions [2]", |k| {
            k.zeros(Element::F32, &[8, 128]).sum(2);
        }),
        ("tpu.bitcast", "bf16[3,128] to i32", |k| {
            k.zeros(Element::Bf16, &[3, 128]).bitcast(Element::I32);
        }),
    ];
    let context = Context::new();
    for (op, message, body) in cases {
        match mosaic::kernel(&context, "mistake", body) {
            Err(Error::Op { op: named, message: printed }) => {
                assert_eq!(&named, op, "{printed}");
                assert!(printed.contains(message), "{op}: {printed}");
                assert!(printed.contains("kernel `mistake`, ir/tests/all/mosaic.rs:"), "{printed}");
            }
            Err(other) => panic!("{op}: {other}"),
            Ok(_) => panic!("{op}: {message} went unnoticed"),
        }
    }
}

#[test]
fn values_of_an_inner_block_do_not_leave_it() {
    let context = Context::new();
    let result = mosaic::kernel(&context, "leak", |k| {
        let x = k.scratch("x", MemorySpace::Vmem, Element::F32, &[8, 128]);
        let leaked = std::cell::Cell::new(None);
        k.when(k.int(1).equals(1), || leaked.set(Some(k.zeros(Element::F32, &[8, 128]) + 1.0)));
        x.store(leaked.get().expect("the branch was built"));
    });
    let error = result.err().expect("MLIR's verifier notices").to_string();
    assert!(error.contains("does not dominate"), "{error}");
}

#[test]
fn a_kernel_whose_region_panicked_is_not_to_be_had() {
    let context = Context::new();
    let result = mosaic::kernel(&context, "panic", |k| {
        let leaked = std::cell::Cell::new(None);
        let region = || {
            k.when(k.int(1).equals(1), || {
                leaked.set(Some(k.int(2)));
                panic!("as asked")
            });
        };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(region));
        assert!(outcome.is_err());
        // What the region left behind is still there, and ops go where they went before.
        let leaked = leaked.get().expect("it was built");
        k.when((leaked + 1).equals(3), || ());
    });
    let error = result.err().expect("the panic is remembered").to_string();
    assert!(error.contains("the body of a region panicked (kernel `panic`)"), "{error}");
}

#[test]
fn two_calls_in_one_line_are_refused() {
    let context = Context::new();
    let config = wire::backend_config(&matmul(&context));
    let call = format!("stablehlo.custom_call @tpu_custom_call() {{backend_config = {config:?}}} : () -> () ");
    assert_eq!(wire::find_custom_calls(call.as_bytes()).expect("one call").len(), 1);
    let error = wire::find_custom_calls(call.repeat(2).as_bytes()).expect_err("which types are whose?").to_string();
    assert!(error.contains("calls 1 and 2 of Mosaic kernels are in one line: "), "{error}");
}

/// Until version 15 a SparseCore's loads and stores with a mask left no gaps in memory; since then other ops do that.
#[test]
fn ops_of_older_versions_are_called_what_they_are_since() {
    let opened = |version: usize, core: &str| {
        let text = format!(
            r#"module attributes {{stable_mosaic.version = {version} : i64}} {{
  "stable_mosaic.func.func"() ({{
  ^bb0(%x: memref<8xi32, #tpu.memory_space<vmem>>):
    %c = "stable_mosaic.arith.constant"() {{value = 0 : index}} : () -> index
    %m = "stable_mosaic.arith.constant"() {{value = dense<true> : vector<8xi1>}} : () -> vector<8xi1>
    %v = "stable_mosaic.tpu.vector_load"(%x, %c, %m) {{operandSegmentSizes = array<i32: 1, 1, 1>, strides = array<i32>}} : (memref<8xi32, #tpu.memory_space<vmem>>, index, vector<8xi1>) -> vector<8xi32>
    "stable_mosaic.tpu.vector_store"(%v, %x, %c, %m) {{operandSegmentSizes = array<i32: 1, 1, 1, 1>, strides = array<i32>, add = false}} : (vector<8xi32>, memref<8xi32, #tpu.memory_space<vmem>>, index, vector<8xi1>) -> ()
    "stable_mosaic.func.return"() : () -> ()
  }}) {{function_type = (memref<8xi32, #tpu.memory_space<vmem>>) -> (), sym_name = "k", tpu.core_type = #tpu.core_type<{core}>}} : () -> ()
}}"#
        );
        let context = Context::new();
        let module = wire::deserialize(&context, text.as_bytes()).unwrap_or_else(|error| panic!("{error}"));
        Program::decode(&module).expect("known ops");
        let text = module.as_operation().to_string();
        let of = ["vector_expand_load", "vector_compress_store", "vector_load", "vector_store"];
        of.map(|op| text.contains(&format!("\"tpu.{op}\"")))
    };
    assert_eq!(opened(15, "sc_vector_subcore"), [true, true, false, false]);
    assert_eq!(opened(16, "sc_vector_subcore"), [false, false, true, true]);
    assert_eq!(opened(15, "tc"), [false, false, true, true]);
}

/// A kernel of JAX's, damaged by `tests/fuzz.rs`: an attribute of an addition that MLIR dies of printing. Nothing prints it.
#[test]
fn what_mlir_cannot_print_is_decoded() {
    let context = Context::new();
    let opened = wire::open(&context, include_str!("../data/unprintable.json")).expect("it is read");
    Program::decode(&opened.module).expect("its ops are known");
}

#[test]
fn a_value_that_no_memory_holds_is_refused() {
    let context = Context::new();
    let text = matmul(&context).text().replace("vector<128x128xf32>", "vector<4611686018427387904x128xf32>");
    let module = text::parse(&context, &text, "large").expect("MLIR takes any size");
    let error = Program::decode(&module).map(drop).expect_err("no machine does").to_string();
    assert!(error.contains("vector<4611686018427387904x128xf32> has more than 2^40 elements"), "{error}");
}
