//! Custom calls written in Rust, through XLA's typed FFI.
//!
//! A plugin with the FFI extension (type 5 in its extension chain; the CPU plugin has it) calls a registered handler
//! in the middle of a program, with typed views of the operands and results: `stablehlo.custom_call @name` with
//! `api_version = 4` and a dictionary as `backend_config`. `frame` is what a handler sees, `pool` the threads that it is
//! lent, `ffi` what XLA sees.
//!
//! Invariants: a handler never unwinds into the plugin (a panic becomes an FFI error with its message); operand and
//! result memory is only borrowed for the duration of the call; the handler may run on any thread of the plugin.

mod ffi;
mod frame;
mod pool;

use std::ffi::{CString, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

pub use frame::{Frame, Operand, Operands, Options, Results};
pub use pool::Pool;

use self::ffi::{FFI_EXTENSION_METADATA, RawFrame, RawMetadataExtension, STAGE_EXECUTE};
use super::error::Result;
use super::plugin::Plugin;

/// A function that programs can call by name.
pub trait CustomCall {
    /// The target name in `stablehlo.custom_call`.
    const TARGET: &'static str;

    /// Runs one call. Operands and results have the shapes of the op.
    ///
    /// # Errors
    /// The message becomes the program's error.
    fn call(frame: Frame<'_>) -> std::result::Result<(), String>;
}

/// Registers a custom call with a plugin, before any program that calls it is compiled.
///
/// # Errors
/// When the plugin has no FFI extension, or refuses (e.g. a name registered twice with different handlers).
pub fn register<T: CustomCall>(plugin: &Plugin) -> Result<()> {
    ffi::register_handler::<T>(plugin)
}

/// # Safety
/// `frame` is a call frame of XLA's FFI that nobody else looks at during the call.
unsafe extern "C" fn trampoline<T: CustomCall>(frame: *mut RawFrame) -> *mut c_void {
    // SAFETY: XLA passes a call frame that lives as long as the call.
    let frame = unsafe { &*frame };
    // SAFETY: as above; the one extension that XLA defines asks for the handler's metadata.
    unsafe {
        let mut extension = frame.extension_start;
        while !extension.is_null() {
            if (*extension).kind == FFI_EXTENSION_METADATA {
                let metadata = (*extension.cast::<RawMetadataExtension>()).metadata;
                (*metadata).major = 0;
                (*metadata).minor = 1;
                (*metadata).traits = 0;
                return std::ptr::null_mut();
            }
            extension = (*extension).next;
        }
    }
    if frame.stage != STAGE_EXECUTE {
        return std::ptr::null_mut();
    }
    // SAFETY: a frame of the execute stage is as the FFI says, and this is the only look at it.
    let outcome = catch_unwind(AssertUnwindSafe(|| T::call(unsafe { Frame::of(frame) }?)));
    let message = match outcome {
        Ok(Ok(())) => return std::ptr::null_mut(),
        Ok(Err(message)) => message,
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(ToString::to_string);
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            format!("the handler panicked: {}", text.unwrap_or_default())
        }
    };
    let message = CString::new(format!("{}: {message}", T::TARGET).replace('\0', "?")).unwrap_or_default();
    frame.error(&message)
}
