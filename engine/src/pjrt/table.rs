//! The PJRT table: one safe function for each entry that is called beside crate `pjrt`, and the handles that they take.
//!
//! Invariants: this is the only file that calls the table's entries (those of the FFI extension: `custom_call/ffi.rs`; behind
//! them all: `abi`).
//! A handle is a live object of the plugin: it owns the object, and keeps alive what the object belongs to. What an entry
//! demands beyond that (lengths of lists, buffers of one client, memory that must not be freed while it works) its
//! function checks or waits for, so that no safe code can call an entry wrongly.
//!
//! Handles may be used by any thread, by several at the same time: PJRT locks what it changes.
//!
//! It must never hand out a pointer, or take one that it did not make.

use std::ffi::c_void;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use pjrt::{CompileOptions, NamedValue};
use pjrt_sys as sys;
use pjrt_sys::protos::xla::{DeviceAssignmentProto, device_assignment_proto::ComputationDevice};

use super::error::{Error, Result, code_name};

/// A plugin's adapted table: written once, then only read.
#[derive(Clone, Copy)]
pub(super) struct Table(&'static sys::PJRT_Api);

// SAFETY: the table is immutable and PJRT's functions may be called from any thread.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

/// The type of the table's entries.
type Entry<Args> = Option<unsafe extern "C" fn(*mut Args) -> *mut sys::PJRT_Error>;

impl Table {
    /// # Safety
    /// Every entry of `api` is empty or the function that PJRT says it is, for as long as the process lives, and accepts
    /// argument structs of crate `pjrt-sys`; `extension_start` begins a chain of extensions of that plugin.
    pub(super) unsafe fn new(api: &'static sys::PJRT_Api) -> Self {
        Self(api)
    }

    /// The first of the plugin's extensions, or null.
    pub(super) fn extensions(self) -> *const c_void {
        self.0.extension_start.cast_const().cast()
    }

    /// Calls an entry.
    ///
    /// # Safety
    /// `args` is what the entry takes: its handles are live, its pointers are valid for the lengths beside them, and what
    /// the plugin may use after the call stays valid until the plugin says that it is done.
    unsafe fn call<Args>(self, name: &'static str, entry: Entry<Args>, args: &mut Args) -> Result<()> {
        let entry = entry.ok_or(Error::Unsupported(name))?;
        // SAFETY: by contract; an error that is returned is the caller's.
        unsafe { self.check(name, entry(args)) }
    }

    /// Turns a PJRT error into ours and frees it.
    ///
    /// # Safety
    /// `error` is null, or an error of this plugin that nobody else owns.
    pub(super) unsafe fn check(self, call: &'static str, error: *mut sys::PJRT_Error) -> Result<()> {
        if error.is_null() {
            return Ok(());
        }
        let mut text = sys::PJRT_Error_Message_Args::new();
        text.error = error;
        let mut code = sys::PJRT_Error_GetCode_Args::new();
        code.error = error;
        let mut destroy = sys::PJRT_Error_Destroy_Args::new();
        destroy.error = error;
        // SAFETY: `error` is live until it is destroyed, at the end; its message is copied before.
        let message = unsafe {
            if let Some(function) = self.0.PJRT_Error_Message {
                function(&mut text);
            }
            let message = self::text(text.message, text.message_size);
            if let Some(function) = self.0.PJRT_Error_GetCode {
                function(&mut code);
            }
            if let Some(function) = self.0.PJRT_Error_Destroy {
                function(&mut destroy);
            }
            message
        };
        Err(Error::Plugin { call, code: code_name(code.code), message })
    }

    /// `PJRT_Client_Create`, and the client's devices.
    pub(super) fn client_create(self, options: &[NamedValue]) -> Result<Arc<Client>> {
        let name = "PJRT_Client_Create";
        let options: Vec<sys::PJRT_NamedValue> = options.iter().map(Into::into).collect();
        let mut args = sys::PJRT_Client_Create_Args::new();
        args.create_options = options.as_ptr();
        args.num_options = options.len();
        // SAFETY: the options, and the values that they were made of, outlive the call, which copies them.
        unsafe { self.call(name, self.0.PJRT_Client_Create, &mut args)? };
        let raw = non_null(name, args.client)?;
        let mut client = Client { table: self, raw, devices: vec![] };
        client.devices = client.addressable_devices()?;
        Ok(Arc::new(client))
    }
}

/// A plugin's text, copied.
///
/// # Safety
/// `data` is null, or valid for `size` bytes.
unsafe fn text(data: *const std::ffi::c_char, size: usize) -> String {
    // SAFETY: by contract.
    String::from_utf8_lossy(unsafe { slice(data.cast::<u8>(), size) }).into_owned()
}

/// The elements behind a pointer that may be null where there are none.
///
/// # Safety
/// `data` is null, or valid for `count` elements for as long as the result is used.
unsafe fn slice<'a, T>(data: *const T, count: usize) -> &'a [T] {
    // SAFETY: by contract.
    if data.is_null() || count == 0 { &[] } else { unsafe { std::slice::from_raw_parts(data, count) } }
}

/// A handle that an entry returned.
fn non_null<T>(call: &'static str, pointer: *mut T) -> Result<NonNull<T>> {
    let null = || Error::Plugin { call, code: code_name(13), message: "it succeeded and returned nothing".into() };
    NonNull::new(pointer).ok_or_else(null)
}

/// A client and its addressable devices.
pub(super) struct Client {
    table: Table,
    raw: NonNull<sys::PJRT_Client>,
    devices: Vec<NonNull<sys::PJRT_Device>>,
}

// SAFETY: PJRT's functions may be called from any thread, by several at once; the fields are never changed.
unsafe impl Send for Client {}
// SAFETY: as above.
unsafe impl Sync for Client {}

impl Drop for Client {
    /// `PJRT_Client_Destroy`.
    fn drop(&mut self) {
        let mut args = sys::PJRT_Client_Destroy_Args::new();
        args.client = self.raw.as_ptr();
        // SAFETY: the client is live and not used again: what belongs to it keeps it alive.
        if let Err(error) =
            unsafe { self.table.call("PJRT_Client_Destroy", self.table.0.PJRT_Client_Destroy, &mut args) }
        {
            log::warn!("a client was not freed: {error}");
        }
    }
}

impl Client {
    /// `PJRT_Client_PlatformName`.
    pub(super) fn platform_name(&self) -> Result<String> {
        let mut args = sys::PJRT_Client_PlatformName_Args::new();
        args.client = self.raw.as_ptr();
        // SAFETY: the client is live, and owns the text for as long as it lives.
        unsafe {
            self.table.call("PJRT_Client_PlatformName", self.table.0.PJRT_Client_PlatformName, &mut args)?;
            Ok(text(args.platform_name, args.platform_name_size))
        }
    }

    /// `PJRT_Client_PlatformVersion`.
    pub(super) fn platform_version(&self) -> Result<String> {
        let mut args = sys::PJRT_Client_PlatformVersion_Args::new();
        args.client = self.raw.as_ptr();
        // SAFETY: as above.
        unsafe {
            self.table.call("PJRT_Client_PlatformVersion", self.table.0.PJRT_Client_PlatformVersion, &mut args)?;
            Ok(text(args.platform_version, args.platform_version_size))
        }
    }

    /// `PJRT_Device_GetDescription` of the `device`th device.
    fn description(&self, device: usize) -> Result<NonNull<sys::PJRT_DeviceDescription>> {
        let name = "PJRT_Device_GetDescription";
        let Some(device) = self.devices.get(device) else {
            return Err(Error::Misuse(format!("device {device} of {}", self.devices())));
        };
        let mut args = sys::PJRT_Device_GetDescription_Args::new();
        args.device = device.as_ptr();
        // SAFETY: the device is live for as long as its client, and so is its description.
        unsafe { self.table.call(name, self.table.0.PJRT_Device_GetDescription, &mut args)? };
        non_null(name, args.device_description)
    }

    /// `PJRT_DeviceDescription_Id` of the `device`th device: its number among the devices of all processes.
    fn device_id(&self, device: usize) -> Result<i64> {
        let mut args = sys::PJRT_DeviceDescription_Id_Args::new();
        args.device_description = self.description(device)?.as_ptr();
        // SAFETY: the description is live.
        unsafe { self.table.call("PJRT_DeviceDescription_Id", self.table.0.PJRT_DeviceDescription_Id, &mut args)? };
        Ok(args.id.into())
    }

    /// `PJRT_DeviceDescription_Kind` of the `device`th device.
    pub(super) fn device_kind(&self, device: usize) -> Result<String> {
        let name = "PJRT_DeviceDescription_Kind";
        let mut args = sys::PJRT_DeviceDescription_Kind_Args::new();
        args.device_description = self.description(device)?.as_ptr();
        // SAFETY: the description is live, and owns the text for as long as it lives.
        unsafe {
            self.table.call(name, self.table.0.PJRT_DeviceDescription_Kind, &mut args)?;
            Ok(text(args.device_kind, args.device_kind_size))
        }
    }

    /// `PJRT_DeviceDescription_ToString` of the `device`th device.
    pub(super) fn describe_device(&self, device: usize) -> Result<String> {
        let name = "PJRT_DeviceDescription_ToString";
        let mut args = sys::PJRT_DeviceDescription_ToString_Args::new();
        args.device_description = self.description(device)?.as_ptr();
        // SAFETY: the description is live, and owns the text for as long as it lives.
        unsafe {
            self.table.call(name, self.table.0.PJRT_DeviceDescription_ToString, &mut args)?;
            Ok(text(args.to_string, args.to_string_size))
        }
    }

    /// The number of addressable devices.
    pub(super) fn devices(&self) -> usize {
        self.devices.len()
    }

    /// `PJRT_Client_AddressableDevices`.
    fn addressable_devices(&self) -> Result<Vec<NonNull<sys::PJRT_Device>>> {
        let name = "PJRT_Client_AddressableDevices";
        let mut args = sys::PJRT_Client_AddressableDevices_Args::new();
        args.client = self.raw.as_ptr();
        // SAFETY: the client is live; it owns the array, and the devices in it, for as long as it lives.
        let devices = unsafe {
            self.table.call(name, self.table.0.PJRT_Client_AddressableDevices, &mut args)?;
            slice(args.addressable_devices, args.num_addressable_devices)
        };
        devices.iter().map(|&device| non_null(name, device)).collect()
    }

    /// `PJRT_Device_MemoryStats` of the `device`th device.
    pub(super) fn memory_stats(&self, device: usize) -> Result<sys::PJRT_Device_MemoryStats_Args> {
        let name = "PJRT_Device_MemoryStats";
        let Some(device) = self.devices.get(device) else {
            return Err(Error::Misuse(format!("the memory of device {device} of {}", self.devices())));
        };
        let mut args = sys::PJRT_Device_MemoryStats_Args::new();
        args.device = device.as_ptr();
        // SAFETY: the device is live for as long as its client.
        unsafe { self.table.call(name, self.table.0.PJRT_Device_MemoryStats, &mut args)? };
        Ok(args)
    }

    /// `PJRT_Client_Compile` of an MLIR module (text or bytecode), one replica per device, by its number among the client's.
    pub(super) fn compile(self: &Arc<Self>, module: &[u8], devices: &[usize]) -> Result<LoadedExecutable> {
        let name = "PJRT_Client_Compile";
        let (replicas, all) = (devices.len(), self.devices());
        if replicas == 0 || devices.iter().any(|&device| device >= all) {
            return Err(Error::Misuse(format!("a program for the devices {devices:?} of a client of {all}")));
        }
        let ids = devices.iter().map(|&device| self.device_id(device)).collect::<Result<Vec<_>>>()?;
        let mut options = CompileOptions::new();
        if let Some(build) = options.proto_mut().executable_build_options.as_mut() {
            build.num_replicas = replicas as i64;
            build.device_assignment = Some(DeviceAssignmentProto {
                replica_count: replicas as i32,
                computation_count: 1,
                computation_devices: vec![ComputationDevice { replica_device_ids: ids }],
            });
        }
        let options = options.encode();
        let format = b"mlir";
        let mut program = sys::PJRT_Program::new();
        program.code = module.as_ptr().cast_mut().cast();
        program.code_size = module.len();
        program.format = format.as_ptr().cast();
        program.format_size = format.len();
        let mut args = sys::PJRT_Client_Compile_Args::new();
        args.client = self.raw.as_ptr();
        args.program = &program;
        args.compile_options = options.as_ptr().cast();
        args.compile_options_size = options.len();
        // SAFETY: the client is live; program and options outlive the call, which only reads them.
        unsafe { self.table.call(name, self.table.0.PJRT_Client_Compile, &mut args)? };
        let raw = non_null(name, args.executable)?;
        let mut loaded = LoadedExecutable { client: Arc::clone(self), raw, replicas, outputs: 0 };
        loaded.outputs = loaded.executable()?.outputs()?;
        Ok(loaded)
    }

    /// `PJRT_Client_BufferFromHostBuffer` of a row-major array on the `device`th device; returns when `bytes` were read.
    pub(super) fn buffer_from_host_buffer(
        self: &Arc<Self>,
        bytes: &[u8],
        element: HostElement,
        dims: &[usize],
        device: usize,
    ) -> Result<Buffer> {
        let name = "PJRT_Client_BufferFromHostBuffer";
        let expected = dims.iter().try_fold(element.bytes, |product, &dim| product.checked_mul(dim));
        if expected != Some(bytes.len()) {
            return Err(Error::Misuse(format!("{} bytes for an array of {dims:?}", bytes.len())));
        }
        let Some(device) = self.devices.get(device) else {
            return Err(Error::Misuse(format!("upload to device {device} of {}", self.devices())));
        };
        let dims: Vec<i64> = dims.iter().map(|&dim| dim as i64).collect();
        let mut args = sys::PJRT_Client_BufferFromHostBuffer_Args::new();
        args.client = self.raw.as_ptr();
        args.data = bytes.as_ptr().cast();
        args.type_ = element.code;
        args.dims = dims.as_ptr();
        args.num_dims = dims.len();
        args.host_buffer_semantics =
            sys::PJRT_HostBufferSemantics_PJRT_HostBufferSemantics_kImmutableUntilTransferCompletes;
        args.device = device.as_ptr();
        // SAFETY: client and device are live; the bytes are as many as type and dimensions say, and stay borrowed until
        // the event says that they were read.
        unsafe { self.table.call(name, self.table.0.PJRT_Client_BufferFromHostBuffer, &mut args)? };
        let done = Event::of(self, args.done_with_host_buffer);
        let buffer = non_null(name, args.buffer).map(|raw| Buffer { client: Arc::clone(self), raw });
        done.wait()?;
        buffer
    }
}

/// PJRT's number of an element type, and what one takes of host memory.
#[derive(Clone, Copy)]
pub(super) struct HostElement {
    pub(super) code: sys::PJRT_Buffer_Type,
    pub(super) bytes: usize,
}

/// Something that happens later, or nothing to wait for.
struct Event {
    client: Arc<Client>,
    raw: Option<NonNull<sys::PJRT_Event>>,
}

impl Event {
    /// Takes over an event that the plugin returned; null is one that has happened.
    fn of(client: &Arc<Client>, raw: *mut sys::PJRT_Event) -> Self {
        Self { client: Arc::clone(client), raw: NonNull::new(raw) }
    }

    /// `PJRT_Event_Await`: returns when it has happened, with its error if it has one.
    fn wait(self) -> Result<()> {
        let Some(raw) = self.raw else { return Ok(()) };
        let table = self.client.table;
        let mut args = sys::PJRT_Event_Await_Args::new();
        args.event = raw.as_ptr();
        // SAFETY: the event is live.
        unsafe { table.call("PJRT_Event_Await", table.0.PJRT_Event_Await, &mut args) }
    }
}

impl Drop for Event {
    /// `PJRT_Event_Destroy`.
    fn drop(&mut self) {
        let Some(raw) = self.raw else { return };
        let table = self.client.table;
        let mut args = sys::PJRT_Event_Destroy_Args::new();
        args.event = raw.as_ptr();
        // SAFETY: the event is live and not used again.
        if let Err(error) = unsafe { table.call("PJRT_Event_Destroy", table.0.PJRT_Event_Destroy, &mut args) } {
            log::warn!("an event was not freed: {error}");
        }
    }
}

/// An array on a device.
pub(super) struct Buffer {
    client: Arc<Client>,
    raw: NonNull<sys::PJRT_Buffer>,
}

// SAFETY: as for `Client`.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Whether it is on a device of this client.
    pub(super) fn is_of(&self, client: &Arc<Client>) -> bool {
        Arc::ptr_eq(&self.client, client)
    }

    /// `PJRT_Buffer_ElementType`.
    pub(super) fn element_type(&self) -> Result<sys::PJRT_Buffer_Type> {
        let table = self.client.table;
        let mut args = sys::PJRT_Buffer_ElementType_Args::new();
        args.buffer = self.raw.as_ptr();
        // SAFETY: the buffer is live.
        unsafe { table.call("PJRT_Buffer_ElementType", table.0.PJRT_Buffer_ElementType, &mut args)? };
        Ok(args.type_)
    }

    /// `PJRT_Buffer_Dimensions`.
    pub(super) fn dimensions(&self) -> Result<Vec<usize>> {
        let name = "PJRT_Buffer_Dimensions";
        let table = self.client.table;
        let mut args = sys::PJRT_Buffer_Dimensions_Args::new();
        args.buffer = self.raw.as_ptr();
        // SAFETY: the buffer is live, and owns this many dimensions for as long as it lives.
        let dims = unsafe {
            table.call(name, table.0.PJRT_Buffer_Dimensions, &mut args)?;
            slice(args.dims, args.num_dims)
        };
        let size = |&dim: &i64| {
            let negative = || Error::Misuse(format!("{name}: a buffer of {dims:?}"));
            usize::try_from(dim).map_err(|_| negative())
        };
        dims.iter().map(size).collect()
    }

    /// `PJRT_Buffer_ToHostBuffer`, row-major; returns when all of it is there.
    pub(super) fn to_host_buffer(&self, rank: usize, to: &mut [u8]) -> Result<()> {
        let table = self.client.table;
        let minor_to_major: Vec<i64> = (0..rank as i64).rev().collect();
        let mut layout = sys::PJRT_Buffer_MemoryLayout::new();
        layout.type_ = sys::PJRT_Buffer_MemoryLayout_Type_PJRT_Buffer_MemoryLayout_Type_Tiled;
        let mut tiled = sys::PJRT_Buffer_MemoryLayout_Tiled::new();
        tiled.minor_to_major = minor_to_major.as_ptr();
        tiled.minor_to_major_size = minor_to_major.len();
        layout.__bindgen_anon_1.tiled = tiled;
        let mut args = sys::PJRT_Buffer_ToHostBuffer_Args::new();
        args.src = self.raw.as_ptr();
        args.host_layout = &mut layout;
        args.dst = to.as_mut_ptr().cast();
        args.dst_size = to.len();
        // SAFETY: the buffer is live; the layout outlives the call; the plugin refuses a destination that is too small
        // by its size, and `to` stays borrowed until the event says that it was written.
        unsafe { table.call("PJRT_Buffer_ToHostBuffer", table.0.PJRT_Buffer_ToHostBuffer, &mut args)? };
        Event::of(&self.client, args.event).wait()
    }

    /// `PJRT_Buffer_UnsafePointer`: the address, on the host only where the device is.
    pub(super) fn address(&self) -> Result<usize> {
        let (name, table) = ("PJRT_Buffer_UnsafePointer", self.client.table);
        let mut args = sys::PJRT_Buffer_UnsafePointer_Args::new();
        args.buffer = self.raw.as_ptr();
        // SAFETY: the buffer is live.
        unsafe { table.call(name, table.0.PJRT_Buffer_UnsafePointer, &mut args)? };
        Ok(args.buffer_pointer)
    }

    /// `PJRT_Buffer_ReadyEvent`, waited for.
    pub(super) fn ready(&self) -> Result<()> {
        let table = self.client.table;
        let mut args = sys::PJRT_Buffer_ReadyEvent_Args::new();
        args.buffer = self.raw.as_ptr();
        // SAFETY: the buffer is live.
        unsafe { table.call("PJRT_Buffer_ReadyEvent", table.0.PJRT_Buffer_ReadyEvent, &mut args)? };
        Event::of(&self.client, args.event).wait()
    }
}

impl Drop for Buffer {
    /// `PJRT_Buffer_Destroy`.
    fn drop(&mut self) {
        let table = self.client.table;
        let mut args = sys::PJRT_Buffer_Destroy_Args::new();
        args.buffer = self.raw.as_ptr();
        // SAFETY: the buffer is live and not used again.
        if let Err(error) = unsafe { table.call("PJRT_Buffer_Destroy", table.0.PJRT_Buffer_Destroy, &mut args) } {
            log::warn!("a device buffer was not freed: {error}");
        }
    }
}

/// A compiled program on devices of one client.
pub(super) struct LoadedExecutable {
    client: Arc<Client>,
    raw: NonNull<sys::PJRT_LoadedExecutable>,
    replicas: usize,
    outputs: usize,
}

// SAFETY: as for `Client`.
unsafe impl Send for LoadedExecutable {}
// SAFETY: as above.
unsafe impl Sync for LoadedExecutable {}

impl Drop for LoadedExecutable {
    /// `PJRT_LoadedExecutable_Destroy`.
    fn drop(&mut self) {
        let (name, table) = ("PJRT_LoadedExecutable_Destroy", self.client.table);
        let mut args = sys::PJRT_LoadedExecutable_Destroy_Args::new();
        args.executable = self.raw.as_ptr();
        // SAFETY: the program is live and not used again.
        if let Err(error) = unsafe { table.call(name, table.0.PJRT_LoadedExecutable_Destroy, &mut args) } {
            log::warn!("a program was not freed: {error}");
        }
    }
}

impl LoadedExecutable {
    /// The number of results.
    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    /// The number of devices that it runs on.
    pub(super) fn replicas(&self) -> usize {
        self.replicas
    }

    /// `PJRT_LoadedExecutable_Execute`: `arguments[replica][argument]` to `results[replica][result]`. Arguments whose index
    /// is not in `kept` are given away if the program says so: the plugin refuses their buffers from then on.
    pub(super) fn execute(&self, arguments: &[Vec<&Buffer>], kept: &[i64]) -> Result<Vec<Vec<Buffer>>> {
        let name = "PJRT_LoadedExecutable_Execute";
        let count = arguments.first().map_or(0, Vec::len);
        if arguments.len() != self.replicas || arguments.iter().any(|list| list.len() != count) {
            return Err(Error::Misuse(format!("{name}: lists of different lengths, or not one per replica")));
        }
        for (replica, list) in arguments.iter().enumerate() {
            if let Some(index) = list.iter().position(|buffer| !buffer.is_of(&self.client)) {
                return Err(Error::Misuse(format!(
                    "argument {index} of replica {replica} is a buffer of another client: upload it with the client that \
                     compiled the program"
                )));
            }
        }
        let buffers: Vec<Vec<*mut sys::PJRT_Buffer>> =
            arguments.iter().map(|list| list.iter().map(|buffer| buffer.raw.as_ptr()).collect()).collect();
        let argument_lists: Vec<*const *mut sys::PJRT_Buffer> = buffers.iter().map(Vec::as_ptr).collect();
        let mut results = vec![vec![null_mut::<sys::PJRT_Buffer>(); self.outputs]; self.replicas];
        let result_lists: Vec<*mut *mut sys::PJRT_Buffer> = results.iter_mut().map(Vec::as_mut_ptr).collect();
        let mut options = sys::PJRT_ExecuteOptions::new();
        options.non_donatable_input_indices = kept.as_ptr();
        options.num_non_donatable_input_indices = kept.len();
        let mut args = sys::PJRT_LoadedExecutable_Execute_Args::new();
        args.executable = self.raw.as_ptr();
        args.options = &mut options;
        args.argument_lists = argument_lists.as_ptr();
        args.num_devices = self.replicas;
        args.num_args = count;
        args.output_lists = result_lists.as_ptr();
        let table = self.client.table;
        // SAFETY: program and buffers are live and of one client; there is a list per replica, of as many arguments as it
        // says (the plugin compares with the program's) and with room for the program's results; all outlive the call.
        unsafe { table.call(name, table.0.PJRT_LoadedExecutable_Execute, &mut args)? };
        // All are taken over before the first error returns, so that none leaks.
        let buffer = |raw| non_null(name, raw).map(|raw| Buffer { client: Arc::clone(&self.client), raw });
        let results: Vec<Vec<Result<Buffer>>> =
            results.into_iter().map(|list| list.into_iter().map(buffer).collect()).collect();
        results.into_iter().map(|list| list.into_iter().collect()).collect()
    }

    /// `PJRT_LoadedExecutable_GetExecutable`: the program without its devices.
    pub(super) fn executable(&self) -> Result<Executable> {
        let name = "PJRT_LoadedExecutable_GetExecutable";
        let table = self.client.table;
        let mut args = sys::PJRT_LoadedExecutable_GetExecutable_Args::new();
        args.loaded_executable = self.raw.as_ptr();
        // SAFETY: the program is live.
        unsafe { table.call(name, table.0.PJRT_LoadedExecutable_GetExecutable, &mut args)? };
        Ok(Executable { table, raw: non_null(name, args.executable)? })
    }
}

/// A compiled program without devices.
pub(super) struct Executable {
    table: Table,
    raw: NonNull<sys::PJRT_Executable>,
}

impl Drop for Executable {
    /// `PJRT_Executable_Destroy`.
    fn drop(&mut self) {
        let (name, table) = ("PJRT_Executable_Destroy", self.table);
        let mut args = sys::PJRT_Executable_Destroy_Args::new();
        args.executable = self.raw.as_ptr();
        // SAFETY: the program is live and not used again.
        if let Err(error) = unsafe { table.call(name, table.0.PJRT_Executable_Destroy, &mut args) } {
            log::warn!("a program was not freed: {error}");
        }
    }
}

impl Executable {
    /// `PJRT_Executable_NumOutputs`.
    fn outputs(&self) -> Result<usize> {
        let mut args = sys::PJRT_Executable_NumOutputs_Args::new();
        args.executable = self.raw.as_ptr();
        // SAFETY: the program is live.
        unsafe { self.table.call("PJRT_Executable_NumOutputs", self.table.0.PJRT_Executable_NumOutputs, &mut args)? };
        Ok(args.num_outputs)
    }

    /// `PJRT_Executable_Name`.
    pub(super) fn name(&self) -> Result<String> {
        let mut args = sys::PJRT_Executable_Name_Args::new();
        args.executable = self.raw.as_ptr();
        // SAFETY: the program is live, and owns the text for as long as it lives.
        unsafe {
            self.table.call("PJRT_Executable_Name", self.table.0.PJRT_Executable_Name, &mut args)?;
            Ok(text(args.executable_name, args.executable_name_size))
        }
    }

    /// `PJRT_Executable_GetCompiledMemoryStats`.
    pub(super) fn compiled_memory_stats(&self) -> Result<sys::PJRT_Executable_GetCompiledMemoryStats_Args> {
        let name = "PJRT_Executable_GetCompiledMemoryStats";
        let mut args = sys::PJRT_Executable_GetCompiledMemoryStats_Args::new();
        args.executable = self.raw.as_ptr();
        // SAFETY: the program is live.
        unsafe { self.table.call(name, self.table.0.PJRT_Executable_GetCompiledMemoryStats, &mut args)? };
        Ok(args)
    }

    /// `PJRT_Executable_GetCostAnalysis`: the properties that are floats, by name.
    pub(super) fn cost_analysis(&self) -> Result<Vec<(String, f32)>> {
        let name = "PJRT_Executable_GetCostAnalysis";
        let mut args = sys::PJRT_Executable_GetCostAnalysis_Args::new();
        args.executable = self.raw.as_ptr();
        // SAFETY: the program is live, and owns this many properties for as long as it lives.
        let properties = unsafe {
            self.table.call(name, self.table.0.PJRT_Executable_GetCostAnalysis, &mut args)?;
            slice(args.properties, args.num_properties)
        };
        let is_float =
            |property: &&sys::PJRT_NamedValue| property.type_ == sys::PJRT_NamedValue_Type_PJRT_NamedValue_kFloat;
        let floats = properties.iter().filter(is_float).map(|property| {
            // SAFETY: a property has a name of this many bytes, and this one holds a float.
            let (name, value) = unsafe {
                (slice(property.name.cast::<u8>(), property.name_size), property.__bindgen_anon_1.float_value)
            };
            (String::from_utf8_lossy(name).into_owned(), value)
        });
        Ok(floats.collect())
    }
}
