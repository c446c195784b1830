//! The ABI adapter: lets crate `pjrt` 0.2.0 (PJRT API 0.54) drive plugins of a later minor version.
//!
//! Every PJRT call takes one argument struct that begins with its own `struct_size`. A plugin refuses a struct smaller
//! than the one it was built with (`Unexpected PJRT_Client_Create_Args size: expected 88, got 72`) and accepts larger
//! ones. Fields are only ever appended, and a zeroed field means "not given". So each call through the adapted table
//! copies the caller's struct into a zeroed buffer of 512 bytes that claims that size, calls the plugin,
//! and copies the caller's part back. `PJRT_ExecuteOptions`, the one struct nested by pointer that grew, is widened
//! the same way.
//!
//! Invariants: the plugin's own table is never changed; a pointer that the plugin keeps after the call never points
//! into the temporary buffer (PJRT keeps none of its argument structs). A table of another major version, or one
//! shorter than the crate's, is refused: reading it would be undefined.

use std::ffi::c_void;
use std::mem::offset_of;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use pjrt_sys::{PJRT_Api, PJRT_Error, PJRT_ExecuteOptions, PJRT_LoadedExecutable_Execute_Args};

/// Bytes of an adapted argument struct; the largest that any plugin of API 0.117 asks for is below 200.
const ADAPTED_SIZE: usize = 512;
/// Plugins that one process can hold.
const MAX_PLUGINS: usize = 4;
const TABLE_WORDS: usize = size_of::<PJRT_Api>() / size_of::<usize>();

/// The plugins' original functions: `ORIGINAL[plugin][word]` is the table entry at that word offset.
static ORIGINAL: [[AtomicPtr<c_void>; TABLE_WORDS]; MAX_PLUGINS] =
    [const { [const { AtomicPtr::new(std::ptr::null_mut()) }; TABLE_WORDS] }; MAX_PLUGINS];
static PLUGINS: AtomicUsize = AtomicUsize::new(0);

type Call = unsafe extern "C" fn(*mut c_void) -> *mut PJRT_Error;

/// A zeroed argument struct that is large enough for any plugin.
#[repr(C, align(16))]
struct Widened([u8; ADAPTED_SIZE]);

impl Widened {
    /// Copies a PJRT struct, which starts with its size, and claims [`ADAPTED_SIZE`].
    ///
    /// # Safety
    /// `source` points to a PJRT struct whose first word is its size.
    unsafe fn from(source: *const c_void) -> (Self, usize) {
        // SAFETY: by contract the first word is readable and is the number of readable bytes.
        unsafe {
            let size = source.cast::<usize>().read().min(ADAPTED_SIZE);
            let mut wide = Self([0; ADAPTED_SIZE]);
            std::ptr::copy_nonoverlapping(source.cast(), wide.0.as_mut_ptr(), size);
            wide.as_mut_ptr().cast::<usize>().write(ADAPTED_SIZE);
            (wide, size)
        }
    }

    fn as_mut_ptr(&mut self) -> *mut c_void {
        self.0.as_mut_ptr().cast()
    }
}

unsafe extern "C" fn adapted<const PLUGIN: usize, const OFFSET: usize>(args: *mut c_void) -> *mut PJRT_Error {
    let original = ORIGINAL[PLUGIN][OFFSET / size_of::<usize>()].load(Ordering::Acquire);
    // SAFETY: `adapt` stored a non-null function of this type before it handed out this adapter; the caller passes
    // a valid argument struct for it.
    unsafe {
        let call = std::mem::transmute::<*mut c_void, Call>(original);
        let (mut wide, size) = Widened::from(args);
        let error = if OFFSET == offset_of!(PJRT_Api, PJRT_LoadedExecutable_Execute) {
            let caller = args.cast::<PJRT_LoadedExecutable_Execute_Args>().read();
            let execute = wide.as_mut_ptr().cast::<PJRT_LoadedExecutable_Execute_Args>();
            let mut options = (!caller.options.is_null()).then(|| Widened::from(caller.options.cast()).0);
            if let Some(options) = &mut options {
                (*execute).options = options.as_mut_ptr().cast::<PJRT_ExecuteOptions>();
            }
            let error = call(wide.as_mut_ptr());
            (*execute).options = caller.options;
            error
        } else {
            call(wide.as_mut_ptr())
        };
        std::ptr::copy_nonoverlapping(wide.0.as_ptr(), args.cast(), size);
        args.cast::<usize>().write(size);
        error
    }
}

/// Why a plugin's table cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum AbiError {
    /// `GetPjrtApi` gave nothing.
    #[error("GetPjrtApi returned null")]
    Null,
    /// The table is laid out differently.
    #[error(
        "PJRT API {major}.{minor} with a table of {size} bytes; this build needs 0.54 or later (at least {needed} bytes)"
    )]
    Incompatible {
        /// Major version.
        major: i32,
        /// Minor version.
        minor: i32,
        /// Bytes of the plugin's table.
        size: usize,
        /// Bytes of the crate's table.
        needed: usize,
    },
    /// The process is full.
    #[error("{MAX_PLUGINS} plugins are loaded already, the most that one process holds")]
    TooMany,
}

/// A copy of the plugin's table whose entries accept the crate's argument structs.
///
/// # Errors
/// When the table is null, of another major version, older than the crate's, or too many plugins are loaded.
///
/// # Safety
/// `api` is null or was returned by a plugin's `GetPjrtApi`; that plugin stays loaded for the rest of the process.
pub(super) unsafe fn adapt(api: *const PJRT_Api) -> Result<PJRT_Api, AbiError> {
    if api.is_null() {
        return Err(AbiError::Null);
    }
    // SAFETY: a table starts with its size and version in every version of the API.
    let (size, version) = unsafe { ((*api).struct_size, (*api).pjrt_api_version) };
    let needed = size_of::<PJRT_Api>();
    if size < needed || version.major_version != 0 {
        let (major, minor) = (version.major_version, version.minor_version);
        return Err(AbiError::Incompatible { major, minor, size, needed });
    }
    // SAFETY: the table holds at least `size_of::<PJRT_Api>()` bytes, checked above.
    let mut table = unsafe { *api };
    match PLUGINS.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < MAX_PLUGINS).then_some(n + 1)) {
        Ok(0) => patch::<0>(&mut table),
        Ok(1) => patch::<1>(&mut table),
        Ok(2) => patch::<2>(&mut table),
        Ok(_) => patch::<3>(&mut table),
        Err(_) => return Err(AbiError::TooMany),
    }
    Ok(table)
}

/// Replaces the named entries by adapters and remembers the originals.
macro_rules! patch {
    ($plugin:ident, $table:ident: $($name:ident),* $(,)?) => {$(
        if let Some(original) = $table.$name {
            const OFFSET: usize = offset_of!(PJRT_Api, $name);
            ORIGINAL[$plugin][OFFSET / size_of::<usize>()].store(original as *mut c_void, Ordering::Release);
            $table.$name = Some(typed(adapted::<$plugin, OFFSET>));
        }
    )*};
}

/// The adapter under the type of the entry that it replaces.
fn typed<Args>(call: Call) -> unsafe extern "C" fn(*mut Args) -> *mut PJRT_Error {
    // SAFETY: the types differ in what the one pointer points to; the adapter reads the size from the struct itself.
    unsafe { std::mem::transmute::<Call, unsafe extern "C" fn(*mut Args) -> *mut PJRT_Error>(call) }
}

/// Every entry that takes an argument struct and returns an error, but for the hot, never-grown ones on events and
/// buffers' lifetimes, which need no widening.
fn patch<const PLUGIN: usize>(table: &mut PJRT_Api) {
    patch!(PLUGIN, table:
        PJRT_Plugin_Initialize, PJRT_Plugin_Attributes,
        PJRT_Client_Create, PJRT_Client_Destroy, PJRT_Client_PlatformName, PJRT_Client_ProcessIndex,
        PJRT_Client_PlatformVersion, PJRT_Client_Devices, PJRT_Client_AddressableDevices, PJRT_Client_LookupDevice,
        PJRT_Client_LookupAddressableDevice, PJRT_Client_AddressableMemories, PJRT_Client_Compile,
        PJRT_Client_DefaultDeviceAssignment, PJRT_Client_BufferFromHostBuffer, PJRT_Client_TopologyDescription,
        PJRT_DeviceDescription_Id, PJRT_DeviceDescription_ProcessIndex, PJRT_DeviceDescription_Attributes,
        PJRT_DeviceDescription_Kind, PJRT_DeviceDescription_DebugString, PJRT_DeviceDescription_ToString,
        PJRT_Device_GetDescription, PJRT_Device_IsAddressable, PJRT_Device_LocalHardwareId,
        PJRT_Device_AddressableMemories, PJRT_Device_DefaultMemory, PJRT_Device_MemoryStats,
        PJRT_Memory_Id, PJRT_Memory_Kind, PJRT_Memory_DebugString, PJRT_Memory_ToString,
        PJRT_Memory_AddressableByDevices,
        PJRT_Executable_Destroy, PJRT_Executable_Name, PJRT_Executable_NumReplicas, PJRT_Executable_NumPartitions,
        PJRT_Executable_NumOutputs, PJRT_Executable_SizeOfGeneratedCodeInBytes, PJRT_Executable_GetCostAnalysis,
        PJRT_Executable_OutputMemoryKinds, PJRT_Executable_OptimizedProgram, PJRT_Executable_Serialize,
        PJRT_Executable_OutputElementTypes, PJRT_Executable_OutputDimensions, PJRT_Executable_Fingerprint,
        PJRT_Executable_GetCompiledMemoryStats, PJRT_Executable_DeserializeAndLoad,
        PJRT_LoadedExecutable_Destroy, PJRT_LoadedExecutable_GetExecutable,
        PJRT_LoadedExecutable_AddressableDevices, PJRT_LoadedExecutable_Delete, PJRT_LoadedExecutable_IsDeleted,
        PJRT_LoadedExecutable_Execute, PJRT_LoadedExecutable_Fingerprint,
        PJRT_Buffer_GetMemoryLayout, PJRT_Buffer_CopyToDevice, PJRT_Buffer_ToHostBuffer, PJRT_Buffer_CopyToMemory,
        PJRT_TopologyDescription_Create, PJRT_TopologyDescription_Destroy, PJRT_TopologyDescription_PlatformName,
        PJRT_TopologyDescription_PlatformVersion, PJRT_TopologyDescription_GetDeviceDescriptions,
        PJRT_TopologyDescription_Serialize, PJRT_TopologyDescription_Attributes,
        PJRT_Compile,
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use pjrt_sys::{PJRT_Client_Create_Args, PJRT_ExecuteOptions};

    /// A plugin that insists on 88-byte client arguments and 112-byte execute options, as API 0.81 does.
    unsafe extern "C" fn create(args: *mut PJRT_Client_Create_Args) -> *mut PJRT_Error {
        // SAFETY: the adapter passes a struct of ADAPTED_SIZE bytes.
        unsafe {
            assert!((*args).struct_size >= 88);
            assert_eq!((*args).num_options, 3, "the caller's fields arrive");
            assert_eq!(args.cast::<u8>().add(80).cast::<usize>().read(), 0, "what the caller does not know is zero");
            (*args).client = std::ptr::without_provenance_mut(0x10);
        }
        std::ptr::null_mut()
    }

    unsafe extern "C" fn execute(args: *mut PJRT_LoadedExecutable_Execute_Args) -> *mut PJRT_Error {
        // SAFETY: as above.
        unsafe {
            assert!((*(*args).options).struct_size >= 112);
            assert_eq!((*(*args).options).launch_id, 7);
        }
        std::ptr::null_mut()
    }

    #[test]
    fn small_structs_reach_a_newer_plugin_and_results_come_back() {
        // SAFETY: an all-zero table is valid: every entry is `None`.
        let mut plugin: PJRT_Api = unsafe { std::mem::zeroed() };
        plugin.struct_size = size_of::<PJRT_Api>() + 64;
        plugin.PJRT_Client_Create = Some(create);
        plugin.PJRT_LoadedExecutable_Execute = Some(execute);
        // SAFETY: the functions live as long as the process.
        let table = unsafe { adapt(&plugin) }.unwrap();

        let mut args = PJRT_Client_Create_Args::new();
        args.num_options = 3;
        let mut options = PJRT_ExecuteOptions::new();
        options.launch_id = 7;
        let mut run = PJRT_LoadedExecutable_Execute_Args::new();
        run.options = &mut options;
        // SAFETY: both structs are what the entries take.
        unsafe {
            assert!(table.PJRT_Client_Create.unwrap()(&mut args).is_null());
            assert!(table.PJRT_LoadedExecutable_Execute.unwrap()(&mut run).is_null());
        }
        assert_eq!(args.client.addr(), 0x10);
        assert_eq!(args.struct_size, PJRT_Client_Create_Args::STRUCT_SIZE);
        assert_eq!(run.options, &raw mut options, "the caller's pointer is restored");
        assert!(table.PJRT_Client_Destroy.is_none(), "an entry the plugin lacks stays empty");
    }

    #[test]
    fn tables_that_cannot_be_read_are_refused() {
        // SAFETY: null and hand-made tables, none of which is called.
        unsafe {
            assert!(matches!(adapt(std::ptr::null()), Err(AbiError::Null)));
            let mut old: PJRT_Api = std::mem::zeroed();
            old.struct_size = 100;
            assert!(matches!(adapt(&old), Err(AbiError::Incompatible { size: 100, .. })));
            old.struct_size = size_of::<PJRT_Api>();
            old.pjrt_api_version.major_version = 1;
            assert!(matches!(adapt(&old), Err(AbiError::Incompatible { major: 1, .. })));
        }
    }
}
