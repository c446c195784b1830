//! Planted faults of the attention kernel.

use pagoda_ir::{Element, tile_machine::FaultKind};

use super::{
    Kind, KvRows, Precision, Problem, Rotary, Rpa, Spec,
    plan::{Span, Tiles},
};
use crate::{
    chips::Chip,
    kernel::Kernel,
    mutants::{Caught, Emitted, Mutant, MutantSet},
    plan::{Options, Plan},
    random::Lengths,
};

/// Bands of 8 rows, and blocks of 16 rows, which are a way of their own; and KV blocks of 256 keys, of which rows that see no
/// more than 128 work on as many.
pub(super) fn sets() -> Vec<MutantSet<Rpa>> {
    // Decode rows, an empty sequence, chunks of prompts; one to six pages.
    let pages_of_16 = [(1, 96), (0, 5), (13, 77), (8, 41), (1, 10)];
    let pages_of_128 = [(1, 700), (0, 5), (13, 128), (8, 300), (1, 90)];
    let wide = set(8, 128, pages_of_128, WIDTHS);
    assert_eq!(wide.plan.widths(), [128, 256]);
    // Blocks of one KV block, of two, and of more.
    let with_blocks = [(1, 96), (0, 5), (33, 77), (20, 41), (25, 30)];
    // Fused, with rows that have no key, and rows of more than one run.
    let rows = [(1, 20), (1, 60), (0, 5), (1, 33), (1, 64), (1, 0), (1, 1)];
    let prompts = [(1, 60), (0, 5), (3, 0), (13, 13), (110, 120), (9, 60), (2, 17)];
    let fused_decode = fused(Kind::Decode, Chip::V6e, [7, 6], &rows, FUSED_DECODE);
    let fused = fused(Kind::Mixed, Chip::V5p, [150, 4], &prompts, FUSED);
    let plain = [set(8, 16, pages_of_16, MUTANTS), set(16, 16, with_blocks, BLOCKS), wide, spans(), decode()];
    let narrow =
        [narrow(Chip::V4, 32, NARROW), narrow(Chip::V6e, 8, NARROW_IN_FOURS), narrow(Chip::V5p, 32, NARROW_IN_TWOS)];
    plain.into_iter().chain([fused_decode, fused]).chain(narrow).chain([packed()]).collect()
}

/// Two KV heads, two layers, two pages to a KV block, padding rows.
fn fused(
    kind: Kind,
    chip: Chip,
    [tokens, q_heads]: [usize; 2],
    lengths: &[(usize, usize)],
    mutants: &[Mutant],
) -> MutantSet<Rpa> {
    let spec = Spec {
        kind,
        precision: Precision::uniform(Element::Bf16),
        tokens,
        q_heads,
        kv_heads: 2,
        head_dim: 128,
        page_size: 16,
        pages: 40,
        layers: 2,
        max_seqs: 8,
        pages_per_seq: 10,
        scale: 0.088,
        fused: Some(Rotary::HalfSplit),
        ..Spec::default()
    };
    let queries = if kind == Kind::Decode { 8 } else { 16 };
    of_plan(spec, chip, [queries, 2], lengths, mutants)
}

/// What writes the rows of idle sequences, which only fused attention may be given.
const IDLE: usize = 2;

/// Rows of two KV heads, which the cores share by sequence; blocks of two pages, full and short ones, more than there are
/// buffers; an empty sequence, two layers, padding rows.
fn decode() -> MutantSet<Rpa> {
    let spec = Spec {
        kind: Kind::Decode,
        precision: Precision::uniform(Element::Bf16),
        tokens: 7,
        q_heads: 6,
        kv_heads: 2,
        head_dim: 128,
        page_size: 64,
        pages: 40,
        layers: 2,
        max_seqs: 8,
        pages_per_seq: 10,
        scale: 0.088,
        sliding_window: Some(520),
        soft_cap: None,
        ..Spec::default()
    };
    // One of whole blocks stands between others, behind as many blocks as there are buffers.
    let lengths = [(1, 640), (0, 5), (1, 256), (1, 20), (1, 129), (1, 64), (1, 300)];
    MutantSet { superfluous: Some(IDLE), ..of_plan(spec, Chip::V5p, [8, 4], &lengths, DECODE) }
}

/// Decode over a cache of floats of 8 bits, those of one head most of them subnormal; sinks, log-sum-exps.
fn narrow(chip: Chip, page_size: usize, mutants: &[Mutant]) -> MutantSet<Rpa> {
    let spec = Spec {
        kind: Kind::Decode,
        precision: Precision { kv: Element::F8E4M3Fn, ..Precision::uniform(Element::Bf16) },
        tokens: 5,
        q_heads: 6,
        kv_heads: 2,
        head_dim: 128,
        page_size,
        pages: 512 / page_size,
        max_seqs: 5,
        pages_per_seq: 128 / page_size,
        scale: 0.088,
        sinks: true,
        log_sum_exp: true,
        ..Spec::default()
    };
    of_plan(spec, chip, [8, 64 / page_size], &[(1, 20), (1, 64), (0, 5), (1, 97), (1, 41)], mutants)
}

/// Packed heads of 64; sinks, log-sum-exps, a row of padding.
fn packed() -> MutantSet<Rpa> {
    let spec = Spec {
        kind: Kind::Mixed,
        precision: Precision::uniform(Element::Bf16),
        tokens: 24,
        q_heads: 4,
        kv_heads: 2,
        head_dim: 64,
        page_size: 32,
        pages: 16,
        max_seqs: 4,
        pages_per_seq: 4,
        scale: 0.125,
        kv_rows: KvRows::Packed,
        sinks: true,
        log_sum_exp: true,
        ..Spec::default()
    };
    small(spec, &[(1, 60), (0, 5), (13, 13), (9, 41)], PACKED)
}

/// Blocks of 256 rows in two parts, of which the first sees less of a KV block of 256 keys, or nothing.
fn spans() -> MutantSet<Rpa> {
    let spec = Spec {
        kind: Kind::Mixed,
        precision: Precision::uniform(Element::Bf16),
        tokens: 630,
        q_heads: 4,
        kv_heads: 1,
        head_dim: 128,
        page_size: 128,
        pages: 10,
        max_seqs: 4,
        pages_per_seq: 4,
        scale: 0.088,
        ..Spec::default()
    };
    let set = of_plan(spec, Chip::V5p, [256, 2], &[(144, 420), (112, 112), (112, 180), (256, 280)], SPANS);
    let keys = |span: &Span| span.parts.iter().map(|&(_, keys)| keys).collect::<Vec<_>>();
    assert_eq!(set.plan.spans().iter().map(keys).collect::<Vec<_>>(), [[0, 128], [128, 256], [256, 256]]);
    set
}

/// KV blocks of two pages.
fn small(spec: Spec, lengths: &[(usize, usize)], mutants: &[Mutant]) -> MutantSet<Rpa> {
    of_plan(spec, Chip::V5p, [8, 2], lengths, mutants)
}

/// A problem in tiles of so many query rows and pages, and a batch of (query rows, KV tokens).
fn of_plan(
    spec: Spec,
    chip: Chip,
    [queries, kv_pages]: [usize; 2],
    lengths: &[(usize, usize)],
    mutants: &[Mutant],
) -> MutantSet<Rpa> {
    let problem = Problem::new(spec).expect("a problem");
    let options = Options { tiles: Some(Tiles { queries, kv_pages }), vmem_limit: None };
    let plan = Plan::new(problem.clone(), chip, options).expect("legal tiles");
    let lengths: Vec<_> = lengths.iter().map(|&(q_len, kv_len)| Lengths { q_len, kv_len }).collect();
    let inputs = Rpa::draw(&problem, Some(&lengths), 1).expect("a batch");
    MutantSet { plan, inputs, mutants: mutants.to_vec(), superfluous: None }
}

/// Blocks of `queries` rows, padding rows in the last one; two blocks of heads, two layers, two pages to a KV block.
fn set(queries: usize, page_size: usize, lengths: [(usize, usize); 5], mutants: &[Mutant]) -> MutantSet<Rpa> {
    let spec = Spec {
        kind: Kind::Mixed,
        precision: Precision::uniform(Element::Bf16),
        // Behind the batch, rows that no sequence has.
        tokens: (lengths.iter().map(|(q_len, _)| q_len).sum::<usize>() + 12).next_multiple_of(16),
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
        ..Spec::default()
    };
    of_plan(spec, Chip::V5p, [queries, 2], &lengths, mutants)
}

/// The copies of whole KV blocks of two pages and of a page of short ones, in the order of the text: of the blocks that
/// are fetched before the loop, then of the next one in it.
const FIRST: usize = 0;
const SECOND: usize = 3;
const NEXT: usize = 9;

fn kv_start(t: &Emitted, number: usize) -> usize {
    t.find(number, &["tpu.enqueue_dma", "16x8x128xbf16"])
}

fn kv_wait(t: &Emitted, number: usize) -> usize {
    t.find(number, &["tpu.wait_dma2", "16x8x128xbf16"])
}

/// The copies of a band of queries, or of the output.
const QUERIES: &str = "memref<8x1024xbf16, #tpu.memory_space<hbm>>, memref<8x1024xbf16, #tpu.memory_space<vmem>>";
const RESULTS: &str = "memref<8x1024xbf16, #tpu.memory_space<vmem>>, memref<8x1024xbf16, #tpu.memory_space<hbm>>";

/// The rows of a KV block behind the end of the sequence, which are cleared.
fn last_page(t: &Emitted) -> usize {
    t.find(0, &["cmpi sge", "128x128xi32"])
}

const MUTANTS: &[Mutant] = {
    use Caught::{Fault, Mismatch};
    use FaultKind::{
        BrokenAssumption, Deadlock, OutOfBounds, OverwriteInFlight, ParallelOverlap, ReadInFlight, SemaphoreUnbalanced,
        UnwrittenRead,
    };
    &[
        ("wait dropped", |t| t.without(kv_wait(t, 0)), Fault(ReadInFlight)),
        ("wait for a copy never started", |t| t.twice(kv_wait(t, 1)), Fault(Deadlock)),
        ("copy not started", |t| t.without(kv_start(t, FIRST + 2)), Fault(Deadlock)),
        ("next block's copy not started", |t| t.without(kv_start(t, NEXT)), Fault(Deadlock)),
        (
            "semaphore of another buffer waited for",
            |t| t.other_slot(t.above(kv_wait(t, 0), "memref_slice\"(%arrived, ")),
            Fault(ReadInFlight),
        ),
        ("all buffers on one semaphore", |t| t.first_of("%arrived"), Fault(OverwriteInFlight)),
        (
            "another buffer read",
            |t| t.other_slot(t.above(t.find(0, &["strided_load", "xi32>"]), "memref_slice\"(%kv, ")),
            Fault(OverwriteInFlight),
        ),
        (
            "next block into a buffer in use",
            |t| t.other_slot(t.above(kv_start(t, NEXT), "memref_slice\"(%kv, ")),
            Fault(OverwriteInFlight),
        ),
        (
            "copy one row short",
            |t| {
                let first = t.above(kv_start(t, NEXT), "memref_slice\"(%kv_pages, ");
                t.replaced_within(first, kv_start(t, NEXT), "16x8x128xbf16", "15x8x128xbf16")
            },
            Fault(Deadlock),
        ),
        (
            "second page one row further",
            |t| t.replaced(t.above(kv_start(t, NEXT + 1), "arith.constant 16 : i32"), "constant 16", "constant 17"),
            Fault(OutOfBounds),
        ),
        (
            "second page over the first one",
            |t| t.replaced(t.above(kv_start(t, NEXT + 1), "arith.constant 16 : i32"), "constant 16", "constant 0"),
            Fault(OverwriteInFlight),
        ),
        (
            "wrong page fetched ahead",
            |t| t.changed(t.above(kv_start(t, NEXT), "load %page_indices["), "arith.addi", 1),
            Mismatch,
        ),
        (
            "page table read beyond the sequence",
            |t| t.replaced(t.above(kv_start(t, NEXT), "cmpi slt"), "slt", "ne"),
            Fault(OutOfBounds),
        ),
        (
            "last page not fetched",
            |t| t.replaced(t.above(kv_start(t, NEXT + 2), "constant 15 : i32"), "constant 15", "constant 0"),
            Fault(Deadlock),
        ),
        (
            "pages of another layer",
            |t| t.changed(t.above(kv_start(t, NEXT), "load %first_page["), "arith.subi", 25),
            Mismatch,
        ),
        (
            "a block fetched beyond the last one",
            |t| t.replaced(t.above(kv_start(t, SECOND), "cmpi sge"), "sge", "sgt"),
            Fault(Deadlock),
        ),
        ("last block not attended", |t| t.changed(t.find(0, &["arith.divsi"]), "arith.subi", 1), Mismatch),
        ("mask inverted at the last page", |t| t.replaced(last_page(t), "sge", "slt"), Fault(UnwrittenRead)),
        ("mask of the last page one row too long", |t| t.replaced(last_page(t), "sge", "sgt"), Mismatch),
        ("causal mask off by one", |t| t.replaced(t.find(0, &["cmpi sle"]), "sle", "slt"), Mismatch),
        ("no causal mask", |t| t.replaced(t.find(0, &["cmpi sle"]), "sle", "sge"), Mismatch),
        ("window one key short", |t| t.replaced(t.find(0, &["dense<50>"]), "50", "49"), Mismatch),
        ("window one key long", |t| t.replaced(t.find(0, &["dense<50>"]), "50", "51"), Mismatch),
        (
            "rows of the sequence before not masked",
            |t| t.first_operand_only(t.find(0, &["cmpi sge", "8x128xi32"]), "arith.cmpi sge,"),
            Mismatch,
        ),
        (
            "rows of the sequence behind not masked",
            |t| t.replaced(t.find(0, &["cmpi slt", "8x128xi32"]), "slt", "sge"),
            Mismatch,
        ),
        ("positions too far", |t| t.changed(t.find(0, &["load %kv_lens["]), "arith.addi", 32), Mismatch),
        ("last sequence left out", |t| t.changed(t.find(0, &["load %num_seqs["]), "arith.subi", 1), Mismatch),
        ("accumulator not zeroed", |t| t.without(t.find(0, &["vector_store", "%acc,"])), Fault(UnwrittenRead)),
        ("sum not zeroed", |t| t.without(t.find(0, &["vector_store", "%sum,"])), Fault(UnwrittenRead)),
        ("maximum not set", |t| t.without(t.find(0, &["vector_store", "%max,"])), Fault(UnwrittenRead)),
        ("maximum not kept", |t| t.without(t.find(4, &["vector_store", "%max,"])), Mismatch),
        (
            "accumulator not rescaled",
            |t| {
                let matmul = t.find(1, &["tpu.matmul"]);
                t.first_operand_only(t.above(matmul, "mulf"), "arith.maximumf")
            },
            Mismatch,
        ),
        ("scale left out", |t| t.first_operand_only(t.find(0, &["mulf", "x32xf32"]), "arith.maximumf"), Mismatch),
        (
            "rows without a key divided by nothing",
            |t| t.first_operand_only(t.find(0, &["maximumf", "vector<8x1xf32>"]), "arith.maximumf"),
            Mismatch,
        ),
        (
            "heads of the first core on both",
            |t| t.replaced(t.above(kv_start(t, NEXT), "arith.constant 8 : i32"), "constant 8", "constant 0"),
            Mismatch,
        ),
        (
            "heads that are not a multiple of what is promised",
            |t| t.replaced(t.above(kv_start(t, NEXT), "arith.constant 8 : i32"), "constant 8", "constant 4"),
            Fault(BrokenAssumption),
        ),
        ("queries not waited for", |t| t.without(t.find(0, &["tpu.wait_dma2", QUERIES])), Fault(ReadInFlight)),
        (
            "next queries into the buffer in use",
            |t| {
                let next = t.find(1, &["tpu.enqueue_dma", QUERIES]);
                t.other_slot(t.above(next, "memref_slice\"(%queries, "))
            },
            Fault(OverwriteInFlight),
        ),
        ("results not copied", |t| t.without(t.find(0, &["tpu.enqueue_dma", RESULTS])), Fault(Deadlock)),
        ("results written over", |t| t.without(t.find(0, &["tpu.wait_dma2", RESULTS])), Fault(OverwriteInFlight)),
        (
            "last results not waited for",
            |t| {
                let waits = (0..).take_while(|&number| t.has(number, &["tpu.wait_dma2", RESULTS])).count();
                t.without(t.find(waits - 1, &["tpu.wait_dma2", RESULTS]))
            },
            Fault(SemaphoreUnbalanced),
        ),
        (
            "output of both cores in one place",
            |t| {
                let copy = t.find(0, &["tpu.enqueue_dma", RESULTS]);
                t.replaced(t.above(copy, "arith.constant 1024 : i32"), "constant 1024", "constant 0")
            },
            Fault(ParallelOverlap),
        ),
    ]
};

/// Of a kernel with blocks of 16 rows.
const BLOCKS: &[Mutant] = {
    use Caught::{Fault, Mismatch};
    use FaultKind::{Deadlock, OutOfBounds, OverwriteInFlight, UnwrittenRead};
    &[
        (
            "accumulator of a block not written by its only step",
            |t| t.without(t.find(ONLY, ACCUMULATOR)),
            Fault(UnwrittenRead),
        ),
        (
            "accumulator of a block not written by its first step",
            |t| t.without(t.find(FIRST_STEP, ACCUMULATOR)),
            Mismatch,
        ),
        (
            "accumulator of a block not written by its last step",
            |t| t.without(t.find(LAST_STEP, ACCUMULATOR)),
            Mismatch,
        ),
        (
            "results in place of queries that are still to be multiplied",
            |t| {
                let second_head = t.below(t.find(LAST_STEP, ACCUMULATOR), &["constant 128 : index"]);
                t.replaced(second_head, "constant 128", "constant 512")
            },
            Mismatch,
        ),
        (
            "first step of a block without its own maximum",
            |t| t.first_operand_only(t.find(0, &["maximumf", "vector<32x128xf32>"]), "arith.maximumf"),
            Mismatch,
        ),
        (
            "rows of a whole block not copied",
            |t| t.without(t.find(0, &["tpu.enqueue_dma", "memref<16x1024xbf16, #tpu.memory_space<hbm>>, memref<!tpu"])),
            Fault(Deadlock),
        ),
        ("rows of a block out of place", |t| t.changed(t.find(3, &["load %entry_start["]), "arith.addi", 8), Mismatch),
        (
            "a shared band sent beside the block's",
            |t| t.without(t.below(join(t), &["tpu.wait_dma2"])),
            Fault(OverwriteInFlight),
        ),
        (
            "a shared band's rows of the entry before",
            |t| t.changed(t.above(join(t), "subi"), "arith.addi", 1),
            Mismatch,
        ),
        ("a shared band's own rows alone", |t| t.replaced(join(t), "slt", "ne"), Mismatch),
        (
            "a band joined that is not shared",
            |t| t.replaced(t.above(join(t), "cmpi sgt"), "sgt", "sge"),
            Fault(OutOfBounds),
        ),
    ]
};

/// The stores of a block's accumulators, of four heads each: of an only step, of a first one, of those in between, of a last one.
const ACCUMULATOR: &[&str] = &["vector_store", "vector<1x32x128xf32>", "%acc,"];
const ONLY: usize = 0;
const FIRST_STEP: usize = 4;
const LAST_STEP: usize = 12;

/// Which rows of a shared band are an entry's own.
fn join(t: &Emitted) -> usize {
    t.find(1, &["cmpi slt", "vector<8x128xi32>"])
}

const FULL_BLOCK: usize = 1;
const SHORT_BLOCK: usize = 5;
/// Of a decode kernel: the copies of the first blocks, of the blocks ahead and of the output in the text, and the waits.
const FIRST_BLOCKS: usize = 3;
const AHEAD: usize = 8;
const ROW: usize = 13;

fn start(t: &Emitted, number: usize) -> usize {
    t.find(number, &["tpu.enqueue_dma"])
}

fn wait(t: &Emitted, number: usize) -> usize {
    t.find(number, &["tpu.wait_dma2"])
}

const DECODE: &[Mutant] = {
    use Caught::{Fault, Mismatch};
    use FaultKind::{Deadlock, ReadInFlight, SemaphoreUnbalanced, UnwrittenRead};
    &[
        ("queries not waited for", |t| t.without(wait(t, 0)), Fault(ReadInFlight)),
        ("a page of a full block not waited for", |t| t.without(wait(t, FULL_BLOCK)), Fault(ReadInFlight)),
        ("a page of a short block not waited for", |t| t.without(wait(t, SHORT_BLOCK)), Fault(ReadInFlight)),
        ("a first block not fetched", |t| t.without(start(t, FIRST_BLOCKS)), Fault(Deadlock)),
        ("a block ahead not fetched", |t| t.without(start(t, AHEAD)), Fault(Deadlock)),
        ("a row not sent", |t| t.without(start(t, ROW)), Fault(Deadlock)),
        ("a buffer for ever", |t| t.replaced(t.above(start(t, ROW), "arith.cmpi eq"), " eq", " ne"), Fault(Deadlock)),
        (
            "a block beyond the last one",
            |t| t.replaced(t.above(t.above(start(t, ROW), "arith.cmpi eq"), "arith.cmpi slt"), "slt", "sle"),
            Fault(Deadlock),
        ),
        ("pages of another layer", |t| t.changed(t.find(0, &["load %first_page["]), "arith.subi", 40), Mismatch),
        ("buffers not cleared", |t| t.without(t.find(0, &["vector_store", "%kv,"])), Fault(UnwrittenRead)),
        ("a key too many", |t| t.replaced(t.find(0, LIVE), "slt", "sle"), Mismatch),
        ("values behind the end", |t| t.replaced(t.find(0, LIVE_VALUES), "slt", "ne"), Mismatch),
        (
            "window one key long",
            |t| t.changed(t.above(t.find(2, &["cmpi sge", "vector<8x"]), "arith.subi"), "arith.subi", 1),
            Mismatch,
        ),
        ("sum of the row before", |t| t.without(t.find(0, &["vector_store", "%sum,"])), Fault(UnwrittenRead)),
        ("accumulator of the row before", |t| t.without(t.find(0, &["vector_store", "%acc,"])), Fault(UnwrittenRead)),
        ("maximum not kept", |t| t.without(t.find(1, &["vector_store", "%max,"])), Mismatch),
        (
            "accumulator not rescaled",
            |t| {
                let store = t.find(1, &["vector_store", "%acc,"]);
                t.first_operand_only(t.above(store, "mulf"), "arith.maximumf")
            },
            Mismatch,
        ),
        ("scale left out", |t| t.first_operand_only(t.find(0, &["mulf", "8x128xf32"]), "arith.maximumf"), Mismatch),
        (
            "a row one key short",
            |t| t.changed(t.find(3, &["load %kv_lens["]), "arith.subi", 1),
            Fault(SemaphoreUnbalanced),
        ),
    ]
};

/// Where vector units unpack floats of 8 bits: two heads to a product.
const NARROW_IN_TWOS: &[Mutant] = &[
    (
        "zeros with a sign",
        |t| t.first_operand_only(t.above(t.find(0, &["tpu.bitcast", "B11"]), "arith.andi"), "arith.andi"),
        Caught::Mismatch,
    ),
    (
        "numbers of another bias",
        |t| t.replaced(t.find(0, &["constant 1.600000e+01"]), "1.600000e+01", "1.000000e+00"),
        Caught::Mismatch,
    ),
    (
        "the keys of both heads",
        |t| t.replaced(t.find(0, &["cmpi eq", "vector<8x128xi32>"]), "eq", "sge"),
        Caught::Mismatch,
    ),
    (
        "the even token twice",
        |t| t.replaced(t.find(0, &["constant dense<8>"]), "dense<8>", "dense<0>"),
        Caught::Mismatch,
    ),
    ("keys for values", |t| t.replaced(t.find(1, &["constant dense<8>"]), "dense<8>", "dense<0>"), Caught::Mismatch),
    (
        "the second head's scale for both",
        |t| t.replaced(t.find(0, &["cmpi slt", "vector<8x128xi32>"]), "slt", "sgt"),
        Caught::Mismatch,
    ),
    (
        "every second token of a pair for the first",
        |t| t.first_operand_only(t.below(t.find(0, &["constant dense<-4>"]), &["arith.addi"]), "arith.maxsi"),
        Caught::Mismatch,
    ),
];

/// A word has one head's numbers of four tokens.
const NARROW_IN_FOURS: &[Mutant] = &[
    (
        "the first two tokens twice",
        |t| t.replaced(t.find(0, &["constant dense<16>"]), "dense<16>", "dense<0>"),
        Caught::Mismatch,
    ),
    (
        "the even tokens twice",
        |t| t.replaced(t.find(0, &["constant dense<8>"]), "dense<8>", "dense<0>"),
        Caught::Mismatch,
    ),
    (
        "the other head's numbers",
        |t| t.replaced(t.find(0, &["constant dense<65535>"]), "dense<65535>", "dense<0>"),
        Caught::Mismatch,
    ),
    // Of the second head, whose numbers are small.
    (
        "zeros with a sign",
        |t| t.first_operand_only(t.above(t.find(2, &["tpu.bitcast", "B11"]), "arith.andi"), "arith.andi"),
        Caught::Mismatch,
    ),
    (
        "numbers of another bias",
        |t| t.replaced(t.find(0, &["constant 1.600000e+01"]), "1.600000e+01", "8.000000e+00"),
        Caught::Mismatch,
    ),
];

const NARROW: &[Mutant] = {
    use Caught::{Fault, Mismatch};
    use FaultKind::{Deadlock, UnwrittenRead};
    &[
        ("scale of values for keys", |t| t.replaced(t.find(0, &["load %k_scale["]), "%k_scale", "%v_scale"), Mismatch),
        ("scale of keys for values", |t| t.replaced(t.find(0, &["load %v_scale["]), "%v_scale", "%k_scale"), Mismatch),
        ("numbers without a sign", |t| t.first_operand_only(t.find(0, &["arith.ori"]), "arith.andi"), Mismatch),
        (
            "subnormal numbers with a leading bit",
            |t| t.first_operand_only(t.find(1, &["arith.minimumf"]) + 1, "arith.maximumf"),
            Mismatch,
        ),
        ("a row without its sink", |t| t.without(t.find(1, &["vector_store", "%sink_rows"])), Mismatch),
        (
            "a sink that is not a power of two",
            |t| t.first_operand_only(t.find(0, &["arith.mulf", " : f32"]), "arith.maximumf"),
            Mismatch,
        ),
        (
            "a sink that is not in the sum",
            |t| t.first_operand_only(t.above(t.find(0, &["math.log"]), "arith.addf"), "arith.maximumf"),
            Mismatch,
        ),
        (
            "log-sum-exp without the sum",
            |t| t.first_operand_only(t.find(0, &["math.log"]) + 1, "arith.maximumf"),
            Mismatch,
        ),
        (
            "log-sum-exps of a row not written",
            |t| t.without(t.find(2, &["vector_store", "%lse_rows"])),
            Fault(UnwrittenRead),
        ),
        (
            "log-sum-exps of a row not sent",
            |t| t.without(t.find(2, &["tpu.enqueue_dma", "memref<1x128xf32"])),
            Fault(Deadlock),
        ),
    ]
};

/// The turns of queries into the order of heads come before those of results into columns.
const TURN_OF_RESULTS: usize = 2;

const PACKED: &[Mutant] = &[
    (
        "queries that see values",
        |t| t.replaced(t.find(0, &["cmpi slt", "vector<8x128xi32>"]), "slt", "sge"),
        Caught::Mismatch,
    ),
    (
        "keys for results",
        |t| {
            let turn = t.find(TURN_OF_RESULTS, &["dynamic_rotate"]);
            t.replaced(t.above(turn, "arith.constant 64 : i32"), "constant 64", "constant 0")
        },
        Caught::Mismatch,
    ),
    ("log-sum-exp of a row without a key", |t| t.replaced(t.find(0, &["cmpf ogt"]), "ogt", "oge"), Caught::Mismatch),
];

/// The comparisons of keys, and of values, with what is live of a block.
const LIVE: &[&str] = &["cmpi slt", "vector<8x"];
const LIVE_VALUES: &[&str] = &["cmpi slt", "x128xi32>"];

const WIDTHS: &[Mutant] = &[
    ("many keys taken for few", |t| t.replaced(is_wide(t, 0), "sgt", "sle"), Caught::Mismatch),
    (
        "half of the keys where one more is seen",
        |t| t.replaced(t.above(is_wide(t, 0), "constant 128 : i32"), "constant 128", "constant 200"),
        Caught::Mismatch,
    ),
];

/// Of a kernel whose blocks have two parts.
const SPANS: &[Mutant] = &[
    (
        "part of the rows with a tile of keys too few",
        |t| t.replaced(t.above(is_wide(t, LAST_PRODUCTS), "constant 256 : i32"), "constant 256", "constant 300"),
        Caught::Mismatch,
    ),
    (
        "no keys for rows that see some",
        |t| t.replaced(t.above(is_narrow(t), "constant 128 : i32"), "constant 128", "constant 250"),
        Caught::Mismatch,
    ),
];

/// The first products of a block's last step, behind 10 of an only one, 4 of a first one, and 4 of those in between.
const LAST_PRODUCTS: usize = 18;

/// The comparison of what is seen with what the narrower forms of a step have.
fn is_wide(t: &Emitted, products: usize) -> usize {
    t.above(t.find(products, &["tpu.matmul"]), "cmpi sgt")
}

/// The next one, with what the narrowest form has.
fn is_narrow(t: &Emitted) -> usize {
    t.below(is_wide(t, 0), &["cmpi sle", " : i32"])
}

/// Of the fused decode kernel.
const FUSED_DECODE: &[Mutant] = {
    use Caught::{Fault, Mismatch};
    use FaultKind::{Deadlock, OutOfBounds, ReadInFlight, SemaphoreUnbalanced};
    &[
        ("projections not waited for", |t| t.without(t.find(0, &["wait_dma2", "%qkv"])), Fault(ReadInFlight)),
        ("angles not waited for", |t| t.without(t.find(0, &["wait_dma2", "%cos_sin"])), Fault(ReadInFlight)),
        (
            "sines of the wrong half",
            |t| t.replaced(t.find(1, &["cmpi slt", "vector<7x128xi32>"]), "slt", "sge"),
            Mismatch,
        ),
        (
            "sines of the wrong sign",
            |t| t.first_operand_only(t.find(0, &["negf", "vector<7x128xf32>"]), "arith.maximumf"),
            Mismatch,
        ),
        ("angles of the row before", |t| t.one_row_on(t.find(0, &["vector.load %angles"])), Mismatch),
        ("a token in its neighbour's place", |t| t.changed(t.find(0, &["remsi"]), "arith.xori", 1), Mismatch),
        (
            "a token in the page before",
            |t| t.changed(t.above(t.find(0, TOKEN), "arith.divsi"), "arith.subi", 1),
            Fault(OutOfBounds),
        ),
        (
            "a token in another layer",
            |t| t.changed(t.above(t.find(0, TOKEN), "load %first_page["), "arith.subi", 40),
            Mismatch,
        ),
        ("a token not written", |t| t.without(t.find(0, TOKEN)), Fault(Deadlock)),
        (
            "a token not waited for",
            |t| t.without(t.find(0, &["wait_dma2", "memref<1x4x128xbf16"])),
            Fault(SemaphoreUnbalanced),
        ),
        (
            "the page's token in place of the new one",
            |t| t.without(t.above(t.find(0, TOKEN), "vector_store")),
            Mismatch,
        ),
        ("rows without a key not blank", |t| t.replaced(t.find(0, &["arith.cmpi eq"]), " eq", " ne"), Mismatch),
    ]
};

/// The copy of a new token to its page.
const TOKEN: &[&str] = &["enqueue_dma", "memref<1x4x128xbf16"];

/// Of the fused kernel of any batch, whose cores share the work.
const FUSED: &[Mutant] = {
    use Caught::{Fault, Mismatch};
    use FaultKind::{OutOfBounds, OverwriteInFlight, ParallelOverlap, ReadInFlight};
    &[
        ("projections not waited for", |t| t.without(t.find(0, &["wait_dma2", "128x512xbf16"])), Fault(ReadInFlight)),
        ("angles of keys not waited for", |t| t.without(t.find(0, &["wait_dma2", "128x128xf32"])), Fault(ReadInFlight)),
        (
            "angles of queries not waited for",
            |t| t.without(t.find(0, &["wait_dma2", "<8x128xf32"])),
            Fault(ReadInFlight),
        ),
        // The first two are of the loop, two are of each buffer.
        ("tokens read before they are there", |t| t.without(t.find(4, TOKENS_SENT)), Fault(ReadInFlight)),
        (
            "keys with sines of the wrong half",
            |t| t.replaced(t.find(1, &["cmpi slt", "vector<128x128xi32>"]), "slt", "sge"),
            Mismatch,
        ),
        (
            "queries with sines of the wrong sign",
            |t| t.first_operand_only(t.find(0, &["negf", "vector<8x128xf32>"]), "arith.maximumf"),
            Mismatch,
        ),
        ("keys by the angles of the row before", |t| t.one_row_on(t.find(0, &["vector.load %new_angles"])), Mismatch),
        ("queries by the angles of the row before", |t| t.one_row_on(t.find(0, &["vector.load %angles"])), Mismatch),
        (
            "tokens one place further",
            |t| t.changed(t.above(t.find(0, &["remsi"]), "arith.addi"), "arith.addi", 1),
            Mismatch,
        ),
        (
            "tokens of a page in its neighbours' places",
            |t| t.changed(t.find(0, &["remsi"]), "arith.xori", 1),
            Fault(OverwriteInFlight),
        ),
        (
            "tokens written by both cores",
            |t| t.first_operand_only(t.find(1, &["cmpi eq", "%grid0"]), "arith.cmpi eq,"),
            Fault(ParallelOverlap),
        ),
        (
            "new tokens read from the page",
            |t| t.replaced(t.above(t.find(0, TOKENS_READ), "cmpi sge"), "sge", "sle"),
            Fault(OutOfBounds),
        ),
    ]
};

/// The waits for tokens that leave a buffer, and the copies of some of a page's tokens.
const TOKENS_SENT: &[&str] =
    &["wait_dma2", "memref<?x4x128xbf16, #tpu.memory_space<vmem>>, memref<?x4x128xbf16, #tpu.memory_space<vmem>>"];
const TOKENS_READ: &[&str] =
    &["enqueue_dma", "memref<?x4x128xbf16, #tpu.memory_space<hbm>>, memref<?x4x128xbf16, #tpu.memory_space<vmem>>"];
