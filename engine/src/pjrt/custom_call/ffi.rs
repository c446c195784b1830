//! XLA's typed FFI as C sees it: the structs of `xla/ffi/api/c_api.h`, FFI API 0.1, and the calls of its table.
//!
//! Invariants: every struct is laid out as in that header, up to the last field that is used here; tables of a later minor
//! version are longer, never different. What is behind a [`RawFrame`] lives for one call of a handler.

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use super::{CustomCall, trampoline};
use crate::pjrt::error::{Error, Result};
use crate::pjrt::plugin::Plugin;

/// `PJRT_FFI_Register_Handler`: from then on programs of the plugin's host platform can call `T` by its name.
///
/// # Errors
/// When the plugin has no FFI extension, or refuses.
pub(super) fn register_handler<T: CustomCall>(plugin: &Plugin) -> Result<()> {
    let name = "PJRT_FFI_Register_Handler";
    let table = plugin.table();
    let mut extension = table.extensions().cast::<RawExtension>();
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
    let register = ffi.register_handler.ok_or(Error::Unsupported(name))?;
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
    // SAFETY: the struct has the extension's layout and outlives the call, which copies the names; the handler is a
    // function of this process with the FFI's signature; the error is ours.
    unsafe { table.check(name, register(&mut args)) }
}

impl RawFrame {
    /// `XLA_FFI_Error_Create`: an error for XLA to take over. It copies the message.
    pub(super) fn error(&self, message: &CStr) -> *mut c_void {
        let mut args = RawErrorCreate {
            struct_size: std::mem::offset_of!(RawErrorCreate, code) + size_of::<c_int>(),
            extension_start: std::ptr::null_mut(),
            message: message.as_ptr(),
            code: CODE_INTERNAL,
        };
        // SAFETY: the frame's table starts like `RawApi` in every version; the arguments outlive the call.
        unsafe { ((*self.api).error_create)(&mut args) }
    }

    /// `XLA_FFI_Error_Destroy`; whether there was no error.
    fn discard(&self, error: *mut c_void) -> bool {
        if error.is_null() {
            return true;
        }
        let mut args =
            RawErrorDestroy { struct_size: size_of::<RawErrorDestroy>(), extension_start: std::ptr::null_mut(), error };
        // SAFETY: as above; the error came from this table and is not used again.
        unsafe { ((*self.api).error_destroy)(&mut args) };
        false
    }

    /// The whole table, where it is long enough to lend threads.
    fn thread_api(&self) -> Option<&RawApi> {
        let known = std::mem::offset_of!(RawApi, thread_pool_num_threads) + size_of::<usize>();
        // SAFETY: every version of the table starts with its size, and like `RawApi`.
        unsafe { ((*self.api).struct_size >= known).then(|| &*self.api) }
    }

    /// `XLA_FFI_ThreadPool_NumThreads`: XLA's intra-op threads, 0 where it lends none.
    pub(super) fn thread_count(&self) -> usize {
        let Some(RawApi { thread_pool_schedule: Some(_), thread_pool_num_threads: Some(num_threads), .. }) =
            self.thread_api()
        else {
            return 0;
        };
        let mut count = 0_i64;
        let mut args = RawNumThreads {
            struct_size: size_of::<RawNumThreads>(),
            extension_start: std::ptr::null_mut(),
            context: self.context,
            num_threads: &mut count,
        };
        // SAFETY: the arguments have the API's layout and outlive the call.
        let error = unsafe { num_threads(&mut args) };
        if self.discard(error) { usize::try_from(count).unwrap_or(0) } else { 0 }
    }

    /// `XLA_FFI_ThreadPool_Schedule`: has one of XLA's threads run `task(data)`; whether it took it.
    ///
    /// # Safety
    /// `task(data)` may be called once, at any later time and from any thread, if this returns true.
    pub(super) unsafe fn schedule(&self, task: unsafe extern "C" fn(*mut c_void), data: *mut c_void) -> bool {
        let Some(schedule) = self.thread_api().and_then(|api| api.thread_pool_schedule) else { return false };
        let mut args = RawSchedule {
            struct_size: size_of::<RawSchedule>(),
            extension_start: std::ptr::null_mut(),
            context: self.context,
            task,
            data,
        };
        // SAFETY: the arguments have the API's layout and outlive the call; the rest by contract.
        self.discard(unsafe { schedule(&mut args) })
    }
}

pub(super) const EXTENSION_FFI: c_int = 5;
pub(super) const FFI_EXTENSION_METADATA: c_int = 1;
pub(super) const STAGE_EXECUTE: c_int = 3;
pub(super) const ATTRIBUTE_STRING: c_int = 4;
pub(super) const CODE_INTERNAL: c_int = 13;

#[repr(C)]
pub(super) struct RawExtension {
    pub(super) struct_size: usize,
    pub(super) kind: c_int,
    pub(super) next: *mut RawExtension,
}

#[repr(C)]
pub(super) struct RawFfiExtension {
    pub(super) base: RawExtension,
    pub(super) type_id_register: *const c_void,
    pub(super) user_data_add: *const c_void,
    pub(super) register_handler: Option<unsafe extern "C" fn(*mut RawRegister) -> *mut pjrt_sys::PJRT_Error>,
}

#[repr(C)]
pub(super) struct RawRegister {
    pub(super) struct_size: usize,
    pub(super) target_name: *const c_char,
    pub(super) target_name_size: usize,
    pub(super) handler: *const c_void,
    pub(super) platform_name: *const c_char,
    pub(super) platform_name_size: usize,
    pub(super) traits: u32,
}

#[repr(C)]
pub(super) struct RawMetadataExtension {
    pub(super) base: RawExtension,
    pub(super) metadata: *mut RawMetadata,
}

#[repr(C)]
pub(super) struct RawMetadata {
    pub(super) struct_size: usize,
    pub(super) version_struct_size: usize,
    pub(super) version_extension: *mut RawExtension,
    pub(super) major: c_int,
    pub(super) minor: c_int,
    pub(super) traits: u32,
}

#[repr(C)]
pub(super) struct RawFrame {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut RawExtension,
    pub(super) api: *const RawApi,
    pub(super) context: *mut c_void,
    pub(super) stage: c_int,
    pub(super) args: RawList,
    pub(super) rets: RawList,
    pub(super) attrs: RawAttributes,
}

#[repr(C)]
pub(super) struct RawList {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut RawExtension,
    pub(super) size: i64,
    pub(super) types: *const c_int,
    pub(super) items: *const *mut c_void,
}

#[repr(C)]
pub(super) struct RawAttributes {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut RawExtension,
    pub(super) size: i64,
    pub(super) types: *const c_int,
    pub(super) names: *const *const RawSpan,
    pub(super) attrs: *const *const c_void,
}

#[repr(C)]
pub(super) struct RawSpan {
    pub(super) data: *const u8,
    pub(super) size: usize,
}

impl RawSpan {
    /// # Safety
    /// The span points to `size` readable bytes.
    pub(super) unsafe fn bytes(&self) -> &[u8] {
        match self.size {
            0 => &[],
            // SAFETY: by contract.
            size => unsafe { std::slice::from_raw_parts(self.data, size) },
        }
    }
}

#[repr(C)]
pub(super) struct RawBuffer {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut RawExtension,
    pub(super) dtype: c_int,
    pub(super) data: *mut c_void,
    pub(super) rank: i64,
    pub(super) dims: *const i64,
}

#[repr(C)]
pub(super) struct RawApi {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut RawExtension,
    pub(super) version_struct_size: usize,
    pub(super) version_extension: *mut RawExtension,
    pub(super) major: c_int,
    pub(super) minor: c_int,
    pub(super) internal: *const c_void,
    pub(super) error_create: unsafe extern "C" fn(*mut RawErrorCreate) -> *mut c_void,
    pub(super) error_get_message: *const c_void,
    pub(super) error_destroy: unsafe extern "C" fn(*mut RawErrorDestroy),
    /// From `Handler_Register` to `DeviceMemory_Free`.
    pub(super) others: [*const c_void; 8],
    pub(super) thread_pool_schedule: Option<unsafe extern "C" fn(*mut RawSchedule) -> *mut c_void>,
    pub(super) thread_pool_num_threads: Option<unsafe extern "C" fn(*mut RawNumThreads) -> *mut c_void>,
}

#[repr(C)]
pub(super) struct RawErrorDestroy {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut RawExtension,
    pub(super) error: *mut c_void,
}

#[repr(C)]
pub(super) struct RawSchedule {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut RawExtension,
    pub(super) context: *mut c_void,
    pub(super) task: unsafe extern "C" fn(*mut c_void),
    pub(super) data: *mut c_void,
}

#[repr(C)]
pub(super) struct RawNumThreads {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut RawExtension,
    pub(super) context: *mut c_void,
    pub(super) num_threads: *mut i64,
}

#[repr(C)]
pub(super) struct RawErrorCreate {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut RawExtension,
    pub(super) message: *const c_char,
    pub(super) code: c_int,
}
