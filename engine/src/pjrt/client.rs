//! Clients, buffers and executables.

use std::ffi::c_void;
use std::fmt;
use std::rc::Rc;

use pagoda_ir::element::{Element, Native};
use pagoda_ir::tensor::HostTensor;
use pjrt::{CompileOptions, NamedValue, NamedValueMap};
use pjrt_sys as sys;

use super::error::{Error, Result, code_name};
use super::plugin::Plugin;

/// Calls a table entry; an error keeps the plugin's message and code.
macro_rules! call {
    ($plugin:expr, $name:ident, $args:expr) => {{
        let plugin: &Plugin = $plugin;
        match plugin.table().$name {
            // SAFETY: `$args` is the struct that this entry takes, filled in by the caller.
            Some(function) => check(plugin, stringify!($name), unsafe { function(&mut $args) }),
            None => Err(Error::Unsupported(stringify!($name))),
        }
    }};
}

/// Turns a PJRT error into ours and frees it.
pub(super) fn check(plugin: &Plugin, call: &'static str, error: *mut sys::PJRT_Error) -> Result<()> {
    if error.is_null() {
        return Ok(());
    }
    let table = plugin.table();
    let mut text = sys::PJRT_Error_Message_Args::new();
    text.error = error;
    let mut code = sys::PJRT_Error_GetCode_Args::new();
    code.error = error;
    let mut destroy = sys::PJRT_Error_Destroy_Args::new();
    destroy.error = error;
    // SAFETY: `error` is a live error of this plugin; its message is copied before it is destroyed.
    let message = unsafe {
        let message = match table.PJRT_Error_Message {
            Some(function) => {
                function(&mut text);
                std::slice::from_raw_parts(text.message.cast::<u8>(), text.message_size)
            }
            None => b"",
        };
        let message = String::from_utf8_lossy(message).into_owned();
        if let Some(function) = table.PJRT_Error_GetCode {
            function(&mut code);
        }
        if let Some(function) = table.PJRT_Error_Destroy {
            function(&mut destroy);
        }
        message
    };
    Err(Error::Plugin { call, code: code_name(code.code), message })
}

/// Waits for an event, takes its error, and frees it. A null event counts as done.
fn wait(plugin: &Plugin, event: *mut sys::PJRT_Event) -> Result<()> {
    if event.is_null() {
        return Ok(());
    }
    let mut args = sys::PJRT_Event_Await_Args::new();
    args.event = event;
    let outcome = call!(plugin, PJRT_Event_Await, args);
    let mut args = sys::PJRT_Event_Destroy_Args::new();
    args.event = event;
    call!(plugin, PJRT_Event_Destroy, args)?;
    outcome
}

struct Inner {
    plugin: Plugin,
    /// Owns the client: destroys it when the last handle goes.
    wrapped: pjrt::Client,
    raw: *mut sys::PJRT_Client,
    devices: Vec<*mut sys::PJRT_Device>,
}

/// A client of one plugin with its addressable devices. Cheap to clone, bound to one thread.
#[derive(Clone)]
pub struct Client(Rc<Inner>);

impl Plugin {
    /// Creates a client that drives exactly `devices` devices (on the CPU plugin: that many virtual ones).
    ///
    /// # Errors
    /// When the plugin cannot create a client, or has fewer devices.
    pub fn client(&self, devices: usize) -> Result<Client> {
        let mut client = self.client_with(&[])?;
        // Only the CPU plugin makes devices on demand, and its default is not one; others refuse the option.
        if client.devices() != devices && client.platform().eq_ignore_ascii_case("cpu") {
            client = self.client_with(&[NamedValue::i64("cpu_device_count", devices as i64)])?;
        }
        let found = client.devices();
        if found < devices {
            return Err(Error::Misuse(format!("{devices} devices were asked for; {} has {found}", client.platform())));
        }
        Ok(client)
    }

    /// Creates a client with the plugin's own create options.
    ///
    /// # Errors
    /// When the plugin cannot create a client.
    pub fn client_with(&self, options: &[NamedValue]) -> Result<Client> {
        let options: Vec<sys::PJRT_NamedValue> = options.iter().map(Into::into).collect();
        let mut args = sys::PJRT_Client_Create_Args::new();
        args.create_options = options.as_ptr();
        args.num_options = options.len();
        call!(self, PJRT_Client_Create, args)?;
        let raw = args.client;
        let wrapped = pjrt::Client::wrap(self.api(), raw);
        let mut args = sys::PJRT_Client_AddressableDevices_Args::new();
        args.client = raw;
        call!(self, PJRT_Client_AddressableDevices, args)?;
        let devices = match args.num_addressable_devices {
            0 => Vec::new(),
            // SAFETY: the plugin owns an array of this many devices that lives as long as the client.
            count => unsafe { std::slice::from_raw_parts(args.addressable_devices, count) }.to_vec(),
        };
        Ok(Client(Rc::new(Inner { plugin: self.clone(), wrapped, raw, devices })))
    }
}

impl Client {
    /// The plugin behind this client.
    pub fn plugin(&self) -> &Plugin {
        &self.0.plugin
    }

    /// The platform's name, e.g. `cpu`.
    pub fn platform(&self) -> String {
        self.0.wrapped.platform_name().into_owned()
    }

    /// The platform's version string.
    pub fn platform_version(&self) -> String {
        self.0.wrapped.platform_version().into_owned()
    }

    /// The number of addressable devices.
    pub fn devices(&self) -> usize {
        self.0.devices.len()
    }

    /// One line per addressable device.
    pub fn describe_devices(&self) -> Vec<String> {
        let devices = self.0.wrapped.addressable_devices();
        devices.iter().map(|device| device.description().to_string().into_owned()).collect()
    }

    /// Compiles a StableHLO module (text or bytecode) for `replicas` devices, devices `0..replicas`.
    ///
    /// # Errors
    /// What the compiler says; or more replicas than devices.
    pub fn compile(&self, module: impl AsRef<[u8]>, replicas: usize) -> Result<Executable> {
        if replicas == 0 || replicas > self.devices() {
            let devices = self.devices();
            return Err(Error::Misuse(format!("a program of {replicas} replicas on a client of {devices} devices")));
        }
        let mut options = CompileOptions::new();
        if let Some(build) = options.proto_mut().executable_build_options.as_mut() {
            build.num_replicas = replicas as i64;
        }
        let options = options.encode();
        let module = module.as_ref();
        let format = b"mlir";
        let mut program = sys::PJRT_Program::new();
        program.code = module.as_ptr() as *mut _;
        program.code_size = module.len();
        program.format = format.as_ptr().cast();
        program.format_size = format.len();
        let mut args = sys::PJRT_Client_Compile_Args::new();
        args.client = self.0.raw;
        args.program = &program;
        args.compile_options = options.as_ptr().cast();
        args.compile_options_size = options.len();
        call!(self.plugin(), PJRT_Client_Compile, args)?;
        let wrapped = pjrt::LoadedExecutable::wrap(&self.0.wrapped, args.executable);
        let outputs = wrapped.executable().num_outputs();
        Ok(Executable { client: self.clone(), wrapped, raw: args.executable, outputs, replicas })
    }

    /// Copies an array to a device.
    ///
    /// # Errors
    /// When there is no such device, or the transfer fails (e.g. out of memory).
    pub fn upload(&self, tensor: &HostTensor, device: usize) -> Result<Buffer> {
        self.upload_bytes(tensor.element(), tensor.dims(), tensor.bytes(), device)
    }

    /// Copies row-major bytes to a device, with no other copy in host memory.
    ///
    /// # Errors
    /// As [`upload`](Self::upload), and when the bytes do not fit the dimensions.
    pub fn upload_bytes(&self, element: Element, dims: &[usize], bytes: &[u8], device: usize) -> Result<Buffer> {
        let expected = dims.iter().product::<usize>() * element.bytes();
        if bytes.len() != expected {
            let got = bytes.len();
            return Err(Error::Misuse(format!("{got} bytes uploaded as {element}{dims:?}, which takes {expected}")));
        }
        let Some(&device) = self.0.devices.get(device) else {
            return Err(Error::Misuse(format!("upload to device {device} of {}", self.devices())));
        };
        let shape: Vec<i64> = dims.iter().map(|&dim| dim as i64).collect();
        let mut args = sys::PJRT_Client_BufferFromHostBuffer_Args::new();
        args.client = self.0.raw;
        args.data = bytes.as_ptr().cast();
        args.type_ = to_pjrt(element);
        args.dims = shape.as_ptr();
        args.num_dims = shape.len();
        args.host_buffer_semantics =
            sys::PJRT_HostBufferSemantics_PJRT_HostBufferSemantics_kImmutableUntilTransferCompletes;
        args.device = device;
        call!(self.plugin(), PJRT_Client_BufferFromHostBuffer, args)?;
        let buffer = Buffer { client: self.clone(), raw: args.buffer, element, dims: dims.to_vec() };
        // `bytes` is only borrowed: it must not be read after we return.
        wait(self.plugin(), args.done_with_host_buffer)?;
        Ok(buffer)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {} on {:?}", self.devices(), self.platform(), self.plugin())
    }
}

/// An array on a device.
pub struct Buffer {
    client: Client,
    raw: *mut sys::PJRT_Buffer,
    element: Element,
    dims: Vec<usize>,
}

impl Buffer {
    /// Takes over a buffer that the plugin returned.
    fn adopt(client: &Client, raw: *mut sys::PJRT_Buffer) -> Result<Self> {
        // Owned from here on, so that an error below frees it.
        let mut buffer = Self { client: client.clone(), raw, element: Element::U8, dims: Vec::new() };
        let mut args = sys::PJRT_Buffer_ElementType_Args::new();
        args.buffer = raw;
        call!(client.plugin(), PJRT_Buffer_ElementType, args)?;
        buffer.element = from_pjrt(args.type_).ok_or(Error::ElementType(args.type_))?;
        let mut args = sys::PJRT_Buffer_Dimensions_Args::new();
        args.buffer = raw;
        call!(client.plugin(), PJRT_Buffer_Dimensions, args)?;
        if args.num_dims > 0 {
            // SAFETY: the plugin owns this many dimensions for as long as the buffer lives.
            let dims = unsafe { std::slice::from_raw_parts(args.dims, args.num_dims) };
            buffer.dims = dims.iter().map(|&dim| dim as usize).collect();
        }
        Ok(buffer)
    }

    /// The element type.
    pub fn element(&self) -> Element {
        self.element
    }

    /// The size of each dimension.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Copies the array to the host, row-major, waiting for the program that computes it.
    ///
    /// # Errors
    /// What that program or the transfer failed with.
    pub fn download(&self) -> Result<HostTensor> {
        let mut tensor = HostTensor::zeros(self.element, &self.dims);
        let minor_to_major: Vec<i64> = (0..self.dims.len() as i64).rev().collect();
        let mut layout = sys::PJRT_Buffer_MemoryLayout::new();
        layout.type_ = sys::PJRT_Buffer_MemoryLayout_Type_PJRT_Buffer_MemoryLayout_Type_Tiled;
        let mut tiled = sys::PJRT_Buffer_MemoryLayout_Tiled::new();
        tiled.minor_to_major = minor_to_major.as_ptr();
        tiled.minor_to_major_size = minor_to_major.len();
        layout.__bindgen_anon_1.tiled = tiled;
        let mut args = sys::PJRT_Buffer_ToHostBuffer_Args::new();
        args.src = self.raw;
        args.host_layout = &mut layout;
        args.dst = tensor.bytes_mut().as_mut_ptr().cast::<c_void>();
        args.dst_size = tensor.bytes().len();
        call!(self.client.plugin(), PJRT_Buffer_ToHostBuffer, args)?;
        wait(self.client.plugin(), args.event)?;
        Ok(tensor)
    }

    /// [`download`](Self::download) as a vector of values.
    ///
    /// # Errors
    /// As `download`, and when the buffer holds another type.
    pub fn values<T: Native>(&self) -> Result<Vec<T>> {
        if self.element != T::ELEMENT {
            return Err(Error::WrongElement { found: self.element, expected: T::ELEMENT });
        }
        Ok(self.download()?.as_slice::<T>().to_vec())
    }

    /// Waits until the array is there.
    ///
    /// # Errors
    /// What the program that computes it failed with.
    pub fn wait(&self) -> Result<()> {
        let mut args = sys::PJRT_Buffer_ReadyEvent_Args::new();
        args.buffer = self.raw;
        call!(self.client.plugin(), PJRT_Buffer_ReadyEvent, args)?;
        wait(self.client.plugin(), args.event)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut args = sys::PJRT_Buffer_Destroy_Args::new();
        args.buffer = self.raw;
        if let Err(error) = call!(self.client.plugin(), PJRT_Buffer_Destroy, args) {
            log::warn!("a device buffer was not freed: {error}");
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?} on device", self.element, self.dims)
    }
}

/// One argument of an execution.
#[derive(Debug)]
pub enum Arg<'a> {
    /// The buffer is only read, even where the program would take it over.
    Keep(&'a Buffer),
    /// The buffer is given to the program, which may reuse its memory for a result.
    Donate(Buffer),
}

impl Arg<'_> {
    fn raw(&self) -> *mut sys::PJRT_Buffer {
        match self {
            Self::Keep(buffer) => buffer.raw,
            Self::Donate(buffer) => buffer.raw,
        }
    }
}

/// A compiled program on one or more devices.
pub struct Executable {
    client: Client,
    wrapped: pjrt::LoadedExecutable,
    raw: *mut sys::PJRT_LoadedExecutable,
    outputs: usize,
    replicas: usize,
}

impl Executable {
    /// The number of results.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// The number of devices it runs on.
    pub fn replicas(&self) -> usize {
        self.replicas
    }

    /// Runs a program of one replica. Returns as soon as the plugin has taken the work; errors of the program itself
    /// show when a result is waited for or downloaded.
    ///
    /// # Errors
    /// When the plugin refuses the arguments, or the program is replicated.
    pub fn run(&self, args: Vec<Arg<'_>>) -> Result<Vec<Buffer>> {
        let mut results = self.run_replicated(vec![args])?;
        Ok(results.pop().unwrap_or_default())
    }

    /// Runs every replica with its own arguments: `args[replica][argument]` to `results[replica][result]`.
    ///
    /// # Errors
    /// As [`run`](Self::run); and when the replicas differ in number of arguments or in what they donate.
    pub fn run_replicated(&self, args: Vec<Vec<Arg<'_>>>) -> Result<Vec<Vec<Buffer>>> {
        if args.len() != self.replicas {
            let (found, expected) = (args.len(), self.replicas);
            return Err(Error::Misuse(format!("arguments for {found} replicas to a program of {expected}")));
        }
        let kept = |list: &[Arg<'_>]| -> Vec<i64> {
            list.iter().enumerate().filter(|(_, arg)| matches!(arg, Arg::Keep(_))).map(|(i, _)| i as i64).collect()
        };
        let not_donatable = kept(&args[0]);
        if args.iter().any(|list| list.len() != args[0].len() || kept(list) != not_donatable) {
            return Err(Error::Misuse("replicas must take, and donate, the same arguments".into()));
        }

        let lists: Vec<Vec<*mut sys::PJRT_Buffer>> =
            args.iter().map(|list| list.iter().map(Arg::raw).collect()).collect();
        let list_pointers: Vec<*const *mut sys::PJRT_Buffer> = lists.iter().map(|list| list.as_ptr()).collect();
        let mut outputs = vec![vec![std::ptr::null_mut::<sys::PJRT_Buffer>(); self.outputs]; self.replicas];
        let output_pointers: Vec<*mut *mut sys::PJRT_Buffer> =
            outputs.iter_mut().map(|list| list.as_mut_ptr()).collect();

        let mut options = sys::PJRT_ExecuteOptions::new();
        options.non_donatable_input_indices = not_donatable.as_ptr();
        options.num_non_donatable_input_indices = not_donatable.len();
        let mut call = sys::PJRT_LoadedExecutable_Execute_Args::new();
        call.executable = self.raw;
        call.options = &mut options;
        call.argument_lists = list_pointers.as_ptr();
        call.num_devices = self.replicas;
        call.num_args = args[0].len();
        call.output_lists = output_pointers.as_ptr();
        call!(self.client.plugin(), PJRT_LoadedExecutable_Execute, call)?;
        // Adopt every result before the first error returns, so that none leaks.
        let adopted: Vec<Vec<Result<Buffer>>> = outputs
            .into_iter()
            .map(|list| list.into_iter().map(|raw| Buffer::adopt(&self.client, raw)).collect())
            .collect();
        adopted.into_iter().map(|list| list.into_iter().collect()).collect()
    }

    /// Runs a program of one replica on host arrays: uploads, runs, downloads.
    ///
    /// # Errors
    /// Whatever fails on the way.
    pub fn call(&self, inputs: &[HostTensor]) -> Result<Vec<HostTensor>> {
        let inputs: Vec<Buffer> =
            inputs.iter().map(|tensor| self.client.upload(tensor, 0)).collect::<Result<Vec<_>>>()?;
        let outputs = self.run(inputs.into_iter().map(Arg::Donate).collect())?;
        outputs.iter().map(Buffer::download).collect()
    }

    /// What the program takes of device memory.
    ///
    /// # Errors
    /// When the plugin does not tell.
    pub fn memory_stats(&self) -> Result<MemoryStats> {
        let mut args = sys::PJRT_Executable_GetCompiledMemoryStats_Args::new();
        let (executable, _guard) = self.unloaded()?;
        args.executable = executable;
        call!(self.client.plugin(), PJRT_Executable_GetCompiledMemoryStats, args)?;
        Ok(MemoryStats {
            code: args.generated_code_size_in_bytes,
            arguments: args.argument_size_in_bytes,
            outputs: args.output_size_in_bytes,
            aliased: args.alias_size_in_bytes,
            temporaries: args.temp_size_in_bytes,
        })
    }

    /// The compiler's own cost estimate.
    ///
    /// # Errors
    /// When the plugin does not tell.
    pub fn cost_analysis(&self) -> Result<CostAnalysis> {
        let mut args = sys::PJRT_Executable_GetCostAnalysis_Args::new();
        let (executable, _guard) = self.unloaded()?;
        args.executable = executable;
        call!(self.client.plugin(), PJRT_Executable_GetCostAnalysis, args)?;
        let values = match args.num_properties {
            0 => NamedValueMap::new(),
            // SAFETY: the executable, held by the guard, owns this many properties.
            count => NamedValueMap::from(unsafe { std::slice::from_raw_parts(args.properties, count) }),
        };
        // `Value` is not exported by crate `pjrt`: its debug form `F32(x)` is what tells the number.
        let number = |name: &str| {
            let text = format!("{:?}", values.get(name)?);
            text.strip_prefix("F32(")?.strip_suffix(')')?.parse().ok()
        };
        Ok(CostAnalysis { flops: number("flops"), bytes_accessed: number("bytes accessed") })
    }

    /// The program without its devices, and a guard that frees it.
    fn unloaded(&self) -> Result<(*mut sys::PJRT_Executable, pjrt::Executable)> {
        let mut args = sys::PJRT_LoadedExecutable_GetExecutable_Args::new();
        args.loaded_executable = self.raw;
        call!(self.client.plugin(), PJRT_LoadedExecutable_GetExecutable, args)?;
        Ok((args.executable, pjrt::Executable::wrap(self.client.plugin().api(), args.executable)))
    }
}

impl fmt::Debug for Executable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} replicas, {} results)", self.wrapped.executable().name(), self.replicas, self.outputs)
    }
}

/// Device memory of a program, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MemoryStats {
    /// Machine code.
    pub code: i64,
    /// Arguments.
    pub arguments: i64,
    /// Results, aliased ones included.
    pub outputs: i64,
    /// Results that live in a donated argument.
    pub aliased: i64,
    /// Temporaries.
    pub temporaries: i64,
}

/// The compiler's cost estimate; what the plugin does not tell is `None`.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct CostAnalysis {
    /// Floating-point operations of one run.
    pub flops: Option<f64>,
    /// Bytes read and written.
    pub bytes_accessed: Option<f64>,
}

const ELEMENTS: [(Element, sys::PJRT_Buffer_Type); 13] = [
    (Element::Pred, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_PRED),
    (Element::I8, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_S8),
    (Element::I16, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_S16),
    (Element::I32, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_S32),
    (Element::I64, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_S64),
    (Element::U8, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_U8),
    (Element::U16, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_U16),
    (Element::U32, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_U32),
    (Element::U64, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_U64),
    (Element::Bf16, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_BF16),
    (Element::F16, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_F16),
    (Element::F32, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_F32),
    (Element::F64, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_F64),
];

fn to_pjrt(element: Element) -> sys::PJRT_Buffer_Type {
    ELEMENTS[element as usize].1
}

fn from_pjrt(raw: sys::PJRT_Buffer_Type) -> Option<Element> {
    ELEMENTS.iter().find(|(_, code)| *code == raw).map(|(element, _)| *element)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn element_table_is_indexed_by_the_enum() {
        for element in Element::ALL {
            assert_eq!(from_pjrt(to_pjrt(element)), Some(element));
        }
    }
}
