//! scratch
use pagoda_ir::{Context, Element, mosaic::{self, MemorySpace, Semantics, Window}};

#[test]
fn matmul() {
    let context = Context::new();
    let matmul = mosaic::kernel(&context, "matmul", |k| {
        let [_, _, step] = k.grid([(4, Semantics::Parallel), (4, Semantics::Parallel), (2, Semantics::Arbitrary)]);
        let a = k.input("a", Element::Bf16, &[512, 512], Window::blocks(&[128, 256], |t| [t.grid(0), t.grid(2)]));
        let b = k.input("b", Element::Bf16, &[512, 512], Window::blocks(&[256, 128], |t| [t.grid(2), t.grid(1)]));
        let c = k.output("c", Element::F32, &[512, 512], Window::blocks(&[128, 128], |t| [t.grid(0), t.grid(1)]));
        let sum = k.scratch("sum", MemorySpace::Vmem, Element::F32, &[128, 128]);
        k.when(step.equals(0), || sum.store(0.0));
        sum.store(k.matmul(a.load(), b.load(), sum.load()));
        k.when(step.equals(1), || c.store(sum.load()));
    }).unwrap();
    println!("{}", matmul.text());
}
