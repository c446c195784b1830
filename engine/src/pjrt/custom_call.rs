//! Custom calls written in Rust, through XLA's typed FFI.
//!
//! A plugin with the FFI extension (type 5 in its extension chain; the CPU plugin has it) calls a registered handler
//! in the middle of a program, with typed views of the operands and results: `stablehlo.custom_call @name` with
//! `api_version = 4` and a dictionary as `backend_config`. The call frame's layout is that of XLA's
//! `xla/ffi/api/c_api.h`, FFI API 0.1.
//!
//! Invariants: a handler never unwinds into the plugin (a panic becomes an FFI error with its message); operand and
//! result memory is only borrowed for the duration of the call; the handler may run on any thread of the plugin.

use std::ffi::{CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pagoda_ir::element::{Element, Native};
use pagoda_kernels::threads::Threads;

use super::error::{Error, Result};
use super::plugin::Plugin;

/// A function that programs can call by name.
pub trait CustomCall {
    /// The target name in `stablehlo.custom_call`.
    const TARGET: &'static str;

    /// Runs one call. Operands and results have the shapes of the op.
    ///
    /// # Errors
    /// The message becomes the program's error.
    fn call(frame: &mut Frame<'_>) -> std::result::Result<(), String>;
}

/// The operands, results and attributes of one call.
pub struct Frame<'a> {
    raw: &'a RawFrame,
}

/// A typed view of an operand.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    /// Element type.
    pub element: Element,
    /// Dimensions.
    pub dims: &'a [i64],
    data: *const u8,
}

impl<'a> Operand<'a> {
    /// The number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product::<i64>() as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, row-major.
    pub fn bytes(&self) -> &'a [u8] {
        match self.len() * self.element.bytes() {
            0 => &[],
            // SAFETY: XLA passes a dense row-major array of this shape that lives as long as the call.
            size => unsafe { std::slice::from_raw_parts(self.data, size) },
        }
    }

    /// The elements, row-major.
    ///
    /// # Errors
    /// When the operand has another element type.
    pub fn values<T: Native>(&self) -> std::result::Result<&'a [T], String> {
        self.check::<T>()?;
        match self.len() {
            0 => Ok(&[]),
            // SAFETY: as in `bytes`; type and alignment were checked.
            count => Ok(unsafe { std::slice::from_raw_parts(self.data.cast(), count) }),
        }
    }

    fn check<T: Native>(&self) -> std::result::Result<(), String> {
        let viewed = if self.element == Element::Pred { Element::U8 } else { self.element };
        if viewed == T::ELEMENT && self.data.cast::<T>().is_aligned() {
            return Ok(());
        }
        Err(format!("an array of {} was expected, got {}", T::ELEMENT, self.element))
    }
}

impl<'a> Frame<'a> {
    /// The number of operands.
    pub fn operands(&self) -> usize {
        self.raw.args.size as usize
    }

    /// The number of results.
    pub fn results(&self) -> usize {
        self.raw.rets.size as usize
    }

    /// An operand.
    ///
    /// # Errors
    /// When there is no such operand, or its type is unknown here.
    pub fn operand(&self, index: usize) -> std::result::Result<Operand<'a>, String> {
        Self::view(&self.raw.args, index, "operand")
    }

    /// Shape and type of a result.
    ///
    /// # Errors
    /// As [`operand`](Self::operand).
    pub fn result_type(&self, index: usize) -> std::result::Result<(Element, &'a [i64]), String> {
        Self::view(&self.raw.rets, index, "result").map(|result| (result.element, result.dims))
    }

    /// The bytes of a result, row-major, to be written.
    ///
    /// # Errors
    /// As [`operand`](Self::operand).
    pub fn result(&mut self, index: usize) -> std::result::Result<&mut [u8], String> {
        let result = Self::view(&self.raw.rets, index, "result")?;
        match result.len() * result.element.bytes() {
            0 => Ok(&mut []),
            // SAFETY: XLA passes writable memory of this size for each result; `&mut self` keeps the borrow unique.
            size => Ok(unsafe { std::slice::from_raw_parts_mut(result.data.cast_mut(), size) }),
        }
    }

    /// The elements of all results, row-major, to be written.
    ///
    /// # Errors
    /// When there are not `N` results, or one has another element type.
    pub fn all_results<T: Native, const N: usize>(&mut self) -> std::result::Result<[&mut [T]; N], String> {
        if self.results() != N {
            return Err(format!("{} results, {N} expected", self.results()));
        }
        let mut slices = Vec::with_capacity(N);
        for index in 0..N {
            let result = Self::view(&self.raw.rets, index, "result")?;
            result.check::<T>()?;
            slices.push(match result.len() {
                0 => &mut [][..],
                // SAFETY: XLA passes writable memory of this size for each result, no two of which overlap; type and
                // alignment were checked, and `&mut self` keeps the borrow unique.
                count => unsafe { std::slice::from_raw_parts_mut(result.data.cast_mut().cast(), count) },
            });
        }
        Ok(slices.try_into().unwrap_or_else(|_| unreachable!("there are N of them")))
    }

    /// Whether a result lies in an operand's memory: then that operand's values must not be looked at.
    ///
    /// # Errors
    /// As [`operand`](Self::operand).
    pub fn aliased(&self, result: usize, operand: usize) -> std::result::Result<bool, String> {
        let (result, operand) =
            (Self::view(&self.raw.rets, result, "result")?, Self::view(&self.raw.args, operand, "operand")?);
        Ok(result.data == operand.data)
    }

    /// A string attribute of the call's `backend_config` dictionary.
    pub fn string(&self, name: &str) -> Option<&'a str> {
        let attributes = &self.raw.attrs;
        (0..attributes.size as usize).find_map(|index| {
            // SAFETY: XLA passes `size` attributes; a name is a byte span, a string attribute too.
            unsafe {
                let span = &**attributes.names.add(index);
                if *attributes.types.add(index) != ATTRIBUTE_STRING || span.bytes() != name.as_bytes() {
                    return None;
                }
                std::str::from_utf8((*(*attributes.attrs.add(index)).cast::<RawSpan>()).bytes()).ok()
            }
        })
    }

    /// XLA's own threads for the duration of the call, which saves a second pool that fights the first for the cores.
    /// The caller's thread alone where the plugin lends none.
    pub fn threads(&self) -> Pool<'a> {
        let mut pool = Pool { raw: self.raw, schedule: None, count: 1 };
        let known = std::mem::offset_of!(RawApi, thread_pool_num_threads) + size_of::<usize>();
        // SAFETY: every version of the API table starts with its size.
        if unsafe { (*self.raw.api).struct_size } < known {
            return pool;
        }
        // SAFETY: the table starts like `RawApi`, and is large enough.
        let api = unsafe { &*self.raw.api };
        let (Some(schedule), Some(num_threads)) = (api.thread_pool_schedule, api.thread_pool_num_threads) else {
            return pool;
        };
        let mut count = 0_i64;
        let mut args = RawNumThreads {
            struct_size: size_of::<RawNumThreads>(),
            extension_start: std::ptr::null_mut(),
            context: self.raw.context,
            num_threads: &mut count,
        };
        // SAFETY: the arguments have the API's layout and outlive the call.
        let error = unsafe { num_threads(&mut args) };
        if discard(api, error) && count > 1 {
            pool.schedule = Some(schedule);
            pool.count = count as usize;
        }
        pool
    }

    fn view(list: &'a RawList, index: usize, what: &str) -> std::result::Result<Operand<'a>, String> {
        if index >= list.size as usize {
            return Err(format!("{what} {index} of {}", list.size));
        }
        // SAFETY: the list holds `size` buffers.
        let buffer = unsafe { &*(*list.items.add(index)).cast::<RawBuffer>() };
        let element =
            element(buffer.dtype).ok_or_else(|| format!("{what} {index} has FFI element type {}", buffer.dtype))?;
        let dims = match buffer.rank {
            0 => &[][..],
            // SAFETY: a buffer has `rank` dimensions.
            rank => unsafe { std::slice::from_raw_parts(buffer.dims, rank as usize) },
        };
        Ok(Operand { element, dims, data: buffer.data.cast() })
    }
}

/// XLA's intra-op threads, see [`Frame::threads`].
pub struct Pool<'a> {
    raw: &'a RawFrame,
    schedule: Option<unsafe extern "C" fn(*mut RawSchedule) -> *mut c_void>,
    count: usize,
}

// SAFETY: the frame is only read, and XLA's scheduling function may be called from any thread.
unsafe impl Sync for Pool<'_> {}

/// Pieces of work that threads take one after the other.
struct Pieces {
    /// What runs a piece. Alive while `done < count`: whoever has taken a piece keeps the owner waiting.
    work: *const (dyn Fn(usize) + Sync),
    count: usize,
    next: AtomicUsize,
    done: AtomicUsize,
    panicked: AtomicBool,
}

impl Pieces {
    fn take_all(&self) {
        loop {
            let piece = self.next.fetch_add(1, Ordering::Relaxed);
            if piece >= self.count {
                return;
            }
            // SAFETY: this piece is not done yet, so `Pool::run` has not returned, and what it borrows is alive.
            let work = unsafe { &*self.work };
            if catch_unwind(AssertUnwindSafe(|| work(piece))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.done.fetch_add(1, Ordering::Release);
        }
    }
}

/// # Safety
/// `data` is an `Arc<Pieces>` given away.
unsafe extern "C" fn help(data: *mut c_void) {
    // SAFETY: by contract.
    unsafe { Arc::from_raw(data.cast::<Pieces>()) }.take_all();
}

impl Threads for Pool<'_> {
    fn count(&self) -> usize {
        self.count
    }

    /// The caller takes pieces too: a thread that comes late finds nothing left, and nobody waits for it.
    fn run(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime goes; this function returns after the last use, see `Pieces::work`.
        let work = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(work)
        };
        let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let pieces = Arc::new(Pieces { work, count, next, done, panicked: AtomicBool::new(false) });
        if let Some(schedule) = self.schedule {
            for _ in 1..self.count.min(count) {
                let data = Arc::into_raw(Arc::clone(&pieces));
                let mut args = RawSchedule {
                    struct_size: size_of::<RawSchedule>(),
                    extension_start: std::ptr::null_mut(),
                    context: self.raw.context,
                    task: help,
                    data: data.cast_mut().cast(),
                };
                // SAFETY: the arguments have the API's layout and outlive the call; the task takes `data` over.
                if !unsafe { discard(&*self.raw.api, schedule(&mut args)) } {
                    // SAFETY: the task was refused and will not run.
                    drop(unsafe { Arc::from_raw(data) });
                }
            }
        }
        pieces.take_all();
        let mut spins = 0_u32;
        while pieces.done.load(Ordering::Acquire) < count {
            spins += 1;
            if spins % 1024 == 0 { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        assert!(!pieces.panicked.load(Ordering::Relaxed), "a piece of work panicked");
    }
}

/// Frees an FFI error; whether there was none.
fn discard(api: &RawApi, error: *mut c_void) -> bool {
    if error.is_null() {
        return true;
    }
    let mut args =
        RawErrorDestroy { struct_size: size_of::<RawErrorDestroy>(), extension_start: std::ptr::null_mut(), error };
    // SAFETY: the error came from this API and is not used again.
    unsafe { (api.error_destroy)(&mut args) };
    false
}

/// Registers a custom call with a plugin, before any program that calls it is compiled.
///
/// # Errors
/// When the plugin has no FFI extension, or refuses (e.g. a name registered twice with different handlers).
pub fn register<T: CustomCall>(plugin: &Plugin) -> Result<()> {
    let mut extension = plugin.table().extension_start.cast::<RawExtension>();
    // SAFETY: the chain is a linked list of structs that start like `RawExtension`, ended by null.
    let ffi = unsafe {
        loop {
            if extension.is_null() {
                return Err(Error::Unsupported("custom calls (it has no FFI extension)"));
            }
            if (*extension).kind == EXTENSION_FFI && (*extension).struct_size >= size_of::<RawFfiExtension>() {
                break &*extension.cast::<RawFfiExtension>();
            }
            extension = (*extension).next;
        }
    };
    let Some(register) = ffi.register_handler else { return Err(Error::Unsupported("PJRT_FFI_Register_Handler")) };
    let platform = "Host";
    let target = CString::new(T::TARGET).map_err(|_| Error::Misuse(format!("custom call name {:?}", T::TARGET)))?;
    let mut args = RawRegister {
        struct_size: std::mem::offset_of!(RawRegister, traits) + size_of::<u32>(),
        target_name: target.as_ptr(),
        target_name_size: T::TARGET.len(),
        handler: trampoline::<T> as *const c_void,
        platform_name: platform.as_ptr().cast(),
        platform_name_size: platform.len(),
        traits: 0,
    };
    // SAFETY: the struct has the extension's layout and outlives the call.
    let error = unsafe { register(&mut args) };
    super::client::check(plugin, "PJRT_FFI_Register_Handler", error)
}

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
    let outcome = catch_unwind(AssertUnwindSafe(|| T::call(&mut Frame { raw: frame })));
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
    let mut args = RawErrorCreate {
        struct_size: std::mem::offset_of!(RawErrorCreate, code) + size_of::<c_int>(),
        extension_start: std::ptr::null_mut(),
        message: message.as_ptr(),
        code: CODE_INTERNAL,
    };
    // SAFETY: the frame's API table starts like `RawApi` in every version; XLA copies the message.
    unsafe { ((*frame.api).error_create)(&mut args) }
}

fn element(dtype: c_int) -> Option<Element> {
    Some(match dtype {
        1 => Element::Pred,
        2 => Element::I8,
        3 => Element::I16,
        4 => Element::I32,
        5 => Element::I64,
        6 => Element::U8,
        7 => Element::U16,
        8 => Element::U32,
        9 => Element::U64,
        10 => Element::F16,
        11 => Element::F32,
        12 => Element::F64,
        16 => Element::Bf16,
        _ => return None,
    })
}

const EXTENSION_FFI: c_int = 5;
const FFI_EXTENSION_METADATA: c_int = 1;
const STAGE_EXECUTE: c_int = 3;
const ATTRIBUTE_STRING: c_int = 4;
const CODE_INTERNAL: c_int = 13;

#[repr(C)]
struct RawExtension {
    struct_size: usize,
    kind: c_int,
    next: *mut RawExtension,
}

#[repr(C)]
struct RawFfiExtension {
    base: RawExtension,
    type_id_register: *const c_void,
    user_data_add: *const c_void,
    register_handler: Option<unsafe extern "C" fn(*mut RawRegister) -> *mut pjrt_sys::PJRT_Error>,
}

#[repr(C)]
struct RawRegister {
    struct_size: usize,
    target_name: *const c_char,
    target_name_size: usize,
    handler: *const c_void,
    platform_name: *const c_char,
    platform_name_size: usize,
    traits: u32,
}

#[repr(C)]
struct RawMetadataExtension {
    base: RawExtension,
    metadata: *mut RawMetadata,
}

#[repr(C)]
struct RawMetadata {
    struct_size: usize,
    version_struct_size: usize,
    version_extension: *mut RawExtension,
    major: c_int,
    minor: c_int,
    traits: u32,
}

#[repr(C)]
struct RawFrame {
    struct_size: usize,
    extension_start: *mut RawExtension,
    api: *const RawApi,
    context: *mut c_void,
    stage: c_int,
    args: RawList,
    rets: RawList,
    attrs: RawAttributes,
}

#[repr(C)]
struct RawList {
    struct_size: usize,
    extension_start: *mut RawExtension,
    size: i64,
    types: *const c_int,
    items: *const *mut c_void,
}

#[repr(C)]
struct RawAttributes {
    struct_size: usize,
    extension_start: *mut RawExtension,
    size: i64,
    types: *const c_int,
    names: *const *const RawSpan,
    attrs: *const *const c_void,
}

#[repr(C)]
struct RawSpan {
    data: *const u8,
    size: usize,
}

impl RawSpan {
    /// # Safety
    /// The span points to `size` readable bytes.
    unsafe fn bytes(&self) -> &[u8] {
        match self.size {
            0 => &[],
            // SAFETY: by contract.
            size => unsafe { std::slice::from_raw_parts(self.data, size) },
        }
    }
}

#[repr(C)]
struct RawBuffer {
    struct_size: usize,
    extension_start: *mut RawExtension,
    dtype: c_int,
    data: *mut c_void,
    rank: i64,
    dims: *const i64,
}

#[repr(C)]
struct RawApi {
    struct_size: usize,
    extension_start: *mut RawExtension,
    version_struct_size: usize,
    version_extension: *mut RawExtension,
    major: c_int,
    minor: c_int,
    internal: *const c_void,
    error_create: unsafe extern "C" fn(*mut RawErrorCreate) -> *mut c_void,
    error_get_message: *const c_void,
    error_destroy: unsafe extern "C" fn(*mut RawErrorDestroy),
    /// From `Handler_Register` to `DeviceMemory_Free`.
    others: [*const c_void; 8],
    thread_pool_schedule: Option<unsafe extern "C" fn(*mut RawSchedule) -> *mut c_void>,
    thread_pool_num_threads: Option<unsafe extern "C" fn(*mut RawNumThreads) -> *mut c_void>,
}

#[repr(C)]
struct RawErrorDestroy {
    struct_size: usize,
    extension_start: *mut RawExtension,
    error: *mut c_void,
}

#[repr(C)]
struct RawSchedule {
    struct_size: usize,
    extension_start: *mut RawExtension,
    context: *mut c_void,
    task: unsafe extern "C" fn(*mut c_void),
    data: *mut c_void,
}

#[repr(C)]
struct RawNumThreads {
    struct_size: usize,
    extension_start: *mut RawExtension,
    context: *mut c_void,
    num_threads: *mut i64,
}

#[repr(C)]
struct RawErrorCreate {
    struct_size: usize,
    extension_start: *mut RawExtension,
    message: *const c_char,
    code: c_int,
}
