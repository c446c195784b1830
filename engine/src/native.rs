//! Kernels in Rust for the CPU plugin: handlers of the custom calls that `pagoda_kernels` emits.

use half::bf16;
use pagoda_ir::Element;
use pagoda_kernels::float::Float;
use pagoda_kernels::matmul;
use pagoda_kernels::rpa::native::{self, Call, Layer};

use crate::pjrt::custom_call::{CustomCall, Frame, register};
use crate::pjrt::{Plugin, Result};

/// Registers every handler with a plugin. To be called before programs that use them are compiled.
///
/// # Errors
/// When the plugin takes no custom calls.
pub fn register_all(plugin: &Plugin) -> Result<()> {
    register::<Attention>(plugin)?;
    register::<Matmul>(plugin)
}

/// `pagoda_matmul`: see [`matmul::native`].
struct Matmul;

impl CustomCall for Matmul {
    const TARGET: &'static str = matmul::native::TARGET;

    fn call(frame: &mut Frame<'_>) -> std::result::Result<(), String> {
        match frame.operand(0)?.element {
            Element::F32 => multiply::<f32>(frame),
            Element::Bf16 => multiply::<bf16>(frame),
            other => Err(format!("weights are {other}; f32 and bf16 are supported")),
        }
    }
}

fn multiply<T: Float>(frame: &mut Frame<'_>) -> std::result::Result<(), String> {
    let (w, x) = (frame.operand(0)?, frame.operand(1)?);
    let &[k, m] = x.dims else { return Err(format!("activations of rank {}", x.dims.len())) };
    let [y] = frame.all_results::<f32, 1>()?;
    matmul::native::multiply(w.values::<T>()?, x.values::<T>()?, y, k as usize, m as usize);
    Ok(())
}

/// `pagoda_rpa`: see [`native`].
struct Attention;

impl CustomCall for Attention {
    const TARGET: &'static str = native::TARGET;

    fn call(frame: &mut Frame<'_>) -> std::result::Result<(), String> {
        match frame.operand(0)?.element {
            Element::F32 => attend::<f32>(frame),
            Element::Bf16 => attend::<bf16>(frame),
            other => Err(format!("queries are {other}; f32 and bf16 are supported")),
        }
    }
}

fn attend<T: Float>(frame: &mut Frame<'_>) -> std::result::Result<(), String> {
    let option = |name: &str| frame.string(name).map(|text| text.parse::<f64>().map_err(|e| format!("{name}: {e}")));
    let (q, kv) = (frame.operand(0)?, frame.operand(1)?);
    let &[_, q_heads, head_dim] = q.dims else { return Err(format!("queries of rank {}", q.dims.len())) };
    let &[_, page_size, kv_vectors, _] = kv.dims else { return Err(format!("KV pages of rank {}", kv.dims.len())) };
    let table = frame.operand(3)?;
    let &[_, pages_per_seq] = table.dims else { return Err(format!("a page table of rank {}", table.dims.len())) };
    let scalar = |index: usize| -> std::result::Result<usize, String> {
        let value = frame.operand(index)?.values::<i32>()?.first().copied().unwrap_or(0);
        usize::try_from(value).map_err(|_| format!("operand {index} is {value}"))
    };
    let first_page = scalar(6)?;
    let layer = Layer {
        first_page,
        pages: option("pages").unwrap_or(Ok(0.0))? as usize,
        page_size: page_size as usize,
        kv_heads: kv_vectors as usize / 2,
        head_dim: head_dim as usize,
    };
    let (k, v, slots) = (frame.operand(7)?, frame.operand(8)?, frame.operand(9)?);
    if !frame.aliased(1, 1)? {
        return Err("the KV buffer was not passed in place".into());
    }
    let (kv_lens, cu_q_lens) = (frame.operand(2)?.values::<i32>()?, frame.operand(4)?.values::<i32>()?);
    let (scale, num_seqs) = (option("scale").unwrap_or(Ok(1.0))?, scalar(5)?);
    let (window, soft_cap) = (option("sliding_window").transpose()?, option("soft_cap").transpose()?);
    // The buffer is only ever seen through the result: first to write, then to read.
    let [out, kv_pages] = frame.all_results::<T, 2>()?;
    native::write(kv_pages, k.values::<T>()?, v.values::<T>()?, slots.values::<i32>()?, &layer);
    let call = Call {
        q_heads: q_heads as usize,
        kv_heads: kv_vectors as usize / 2,
        head_dim: head_dim as usize,
        page_size: page_size as usize,
        pages_per_seq: pages_per_seq as usize,
        scale: scale as f32,
        sliding_window: window.map(|window| window as usize),
        soft_cap: soft_cap.map(|cap| cap as f32),
        q: q.values::<T>()?,
        kv_pages,
        kv_lens,
        page_indices: table.values::<i32>()?,
        cu_q_lens,
        num_seqs,
        first_page,
    };
    native::attend(&call, out);
    Ok(())
}
