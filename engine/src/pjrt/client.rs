//! Clients, buffers and executables.

use std::fmt;
use std::sync::Arc;

use pagoda_ir::Bytes;
use pagoda_ir::element::{Element, Native};
use pagoda_ir::tensor::HostTensor;
use pjrt::NamedValue;
use pjrt_sys as sys;

use super::error::{Error, Result};
use super::plugin::Plugin;
use super::resident::Resident;
use super::table::{self, HostElement};

/// A client of one plugin with its addressable devices. Cheap to clone; threads may share it.
#[derive(Clone)]
pub struct Client {
    plugin: Plugin,
    raw: Arc<table::Client>,
}

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

    /// Creates a client of as many devices as the plugin has, of itself.
    ///
    /// # Errors
    /// When the plugin cannot create a client.
    pub fn client_of_any_size(&self) -> Result<Client> {
        self.client_with(&[])
    }

    fn client_with(&self, options: &[NamedValue]) -> Result<Client> {
        let raw = self.table().client_create(options)?;
        Ok(Client { plugin: self.clone(), raw })
    }
}

impl Client {
    /// The plugin behind this client.
    pub fn plugin(&self) -> &Plugin {
        &self.plugin
    }

    /// The platform's name, e.g. `cpu`.
    pub fn platform(&self) -> String {
        self.raw.platform_name().unwrap_or_default()
    }

    /// The platform's version string.
    pub fn platform_version(&self) -> String {
        self.raw.platform_version().unwrap_or_default()
    }

    /// The number of addressable devices.
    pub fn devices(&self) -> usize {
        self.raw.devices()
    }

    /// One line per addressable device.
    pub fn describe_devices(&self) -> Vec<String> {
        let describe = |device| self.raw.describe_device(device).unwrap_or_else(|error| error.to_string());
        (0..self.devices()).map(describe).collect()
    }

    /// What the plugin calls the sort of a device, e.g. `TPU v5 lite`.
    ///
    /// # Errors
    /// When there is no such device, or the plugin does not say.
    pub fn device_kind(&self, device: usize) -> Result<String> {
        self.raw.device_kind(device)
    }

    /// What buffers can still take of a device's memory; `None` where the plugin does not report it.
    ///
    /// # Errors
    /// When there is no such device, or the plugin fails.
    pub fn memory_left(&self, device: usize) -> Result<Option<Bytes>> {
        match self.raw.memory_stats(device) {
            Ok(stats) => {
                let known = stats.bytes_limit_is_set && stats.bytes_limit > 0;
                Ok(known.then(|| Bytes((stats.bytes_limit - stats.bytes_in_use).max(0) as u64)))
            }
            Err(Error::Unsupported(_) | Error::Plugin { code: "UNIMPLEMENTED", .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Compiles a StableHLO module (text or bytecode) for `replicas` devices, devices `0..replicas`.
    ///
    /// # Errors
    /// What the compiler says; or more replicas than devices.
    pub fn compile(&self, module: impl AsRef<[u8]>, replicas: usize) -> Result<Executable> {
        self.compile_on(module, &Vec::from_iter(0..replicas))
    }

    /// As [`compile`](Self::compile), for these devices, by their numbers among the client's: replica `i` runs on
    /// `devices[i]`.
    ///
    /// # Errors
    /// What the compiler says; or a device that there is not.
    pub fn compile_on(&self, module: impl AsRef<[u8]>, devices: &[usize]) -> Result<Executable> {
        let raw = self.raw.compile(module.as_ref(), devices)?;
        Ok(Executable { client: self.clone(), raw })
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
        let expected = dims.iter().try_fold(element.bytes(), |bytes, &dim| bytes.checked_mul(dim));
        if expected != Some(bytes.len()) {
            let takes = expected.map_or("more than there is".to_owned(), |bytes| bytes.to_string());
            let got = bytes.len();
            return Err(Error::Misuse(format!("{got} bytes uploaded as {element}{dims:?}, which takes {takes}")));
        }
        let raw = self.raw.buffer_from_host_buffer(bytes, to_pjrt(element), dims, device)?;
        Ok(Buffer { resident: None, raw, element, dims: dims.to_vec() })
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {} on {:?}", self.devices(), self.platform(), self.plugin())
    }
}

/// An array on a device.
pub struct Buffer {
    /// Before the array itself: it goes first.
    resident: Option<Resident>,
    raw: table::Buffer,
    element: Element,
    dims: Vec<usize>,
}

impl Buffer {
    /// Takes over a buffer that the plugin returned.
    fn adopt(raw: table::Buffer) -> Result<Self> {
        let code = raw.element_type()?;
        let element = from_pjrt(code).ok_or(Error::ElementType(code))?;
        let dims = raw.dimensions()?;
        Ok(Self { resident: None, raw, element, dims })
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
        self.raw.to_host_buffer(self.dims.len(), tensor.bytes_mut())?;
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

    /// Keeps an array of the CPU plugin where it is, unwritten: from now on it cannot be donated, and custom calls may go on
    /// reading it after they returned ([`guard`](super::guard)).
    ///
    /// # Errors
    /// When the plugin does not say where it is, or the program that computes it failed.
    pub fn stay(&mut self) -> Result<()> {
        self.wait()?;
        let bytes = self.dims.iter().product::<usize>() * self.element.bytes();
        let start = self.raw.address()?;
        // SAFETY: the array lives as long as this buffer, and nothing writes it that is not donated.
        self.resident = (bytes > 0).then(|| unsafe { Resident::new(start, bytes) });
        Ok(())
    }

    /// Waits until the array is there.
    ///
    /// # Errors
    /// What the program that computes it failed with.
    pub fn wait(&self) -> Result<()> {
        self.raw.ready()
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
    fn raw(&self) -> &table::Buffer {
        match self {
            Self::Keep(buffer) => &buffer.raw,
            Self::Donate(buffer) => &buffer.raw,
        }
    }
}

/// A compiled program on one or more devices.
pub struct Executable {
    client: Client,
    raw: table::LoadedExecutable,
}

impl Executable {
    /// The number of results.
    pub fn outputs(&self) -> usize {
        self.raw.outputs()
    }

    /// The number of devices it runs on.
    pub fn replicas(&self) -> usize {
        self.raw.replicas()
    }

    /// Runs a program of one replica. Returns as soon as the plugin has taken the work; errors of the program itself
    /// show when a result is waited for or downloaded.
    ///
    /// # Errors
    /// When an argument is a buffer of another client, the plugin refuses the arguments, or the program is replicated.
    pub fn run(&self, args: Vec<Arg<'_>>) -> Result<Vec<Buffer>> {
        let mut results = self.run_replicated(vec![args])?;
        Ok(results.pop().unwrap_or_default())
    }

    /// Runs every replica with its own arguments: `args[replica][argument]` to `results[replica][result]`.
    ///
    /// # Errors
    /// As [`run`](Self::run); and when the replicas differ in number of arguments or in what they donate.
    pub fn run_replicated(&self, args: Vec<Vec<Arg<'_>>>) -> Result<Vec<Vec<Buffer>>> {
        if args.len() != self.replicas() {
            let (found, expected) = (args.len(), self.replicas());
            return Err(Error::Misuse(format!("arguments for {found} replicas to a program of {expected}")));
        }
        let kept = |list: &[Arg<'_>]| -> Vec<i64> {
            list.iter().enumerate().filter(|(_, arg)| matches!(arg, Arg::Keep(_))).map(|(i, _)| i as i64).collect()
        };
        if args.iter().flatten().any(|arg| matches!(arg, Arg::Donate(buffer) if buffer.resident.is_some())) {
            return Err(Error::Misuse("an array that stays where it is was donated".into()));
        }
        let not_donatable = kept(&args[0]);
        if args.iter().any(|list| list.len() != args[0].len() || kept(list) != not_donatable) {
            return Err(Error::Misuse("replicas must take, and donate, the same arguments".into()));
        }
        let arguments: Vec<Vec<&table::Buffer>> = args.iter().map(|list| list.iter().map(Arg::raw).collect()).collect();
        let results = self.raw.execute(&arguments, &not_donatable)?;
        results.into_iter().map(|list| list.into_iter().map(Buffer::adopt).collect()).collect()
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
    /// When the plugin does not report it.
    pub fn memory_stats(&self) -> Result<MemoryStats> {
        let stats = self.raw.executable()?.compiled_memory_stats()?;
        Ok(MemoryStats {
            code: stats.generated_code_size_in_bytes,
            arguments: stats.argument_size_in_bytes,
            outputs: stats.output_size_in_bytes,
            aliased: stats.alias_size_in_bytes,
            temporaries: stats.temp_size_in_bytes,
        })
    }

    /// The compiler's own cost estimate.
    ///
    /// # Errors
    /// When the plugin does not report it.
    pub fn cost_analysis(&self) -> Result<CostAnalysis> {
        let properties = self.raw.executable()?.cost_analysis()?;
        let number = |name: &str| properties.iter().find(|(key, _)| key == name).map(|&(_, value)| f64::from(value));
        Ok(CostAnalysis { flops: number("flops"), bytes_accessed: number("bytes accessed") })
    }
}

impl fmt::Debug for Executable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.raw.executable().and_then(|program| program.name()).unwrap_or_default();
        write!(f, "{name} ({} replicas, {} results)", self.replicas(), self.outputs())
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

/// The compiler's cost estimate; what the plugin does not report is `None`.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct CostAnalysis {
    /// Floating-point operations of one run.
    pub flops: Option<f64>,
    /// Bytes read and written.
    pub bytes_accessed: Option<f64>,
}

/// `PJRT_Buffer_Type_F8E8M0FNU`, which the bindings' header is too old for.
const F8E8M0FNU: sys::PJRT_Buffer_Type = 28;

const ELEMENTS: [(Element, sys::PJRT_Buffer_Type); Element::ALL.len()] = [
    (Element::Pred, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_PRED),
    (Element::I2, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_S2),
    (Element::I4, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_S4),
    (Element::I8, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_S8),
    (Element::I16, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_S16),
    (Element::I32, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_S32),
    (Element::I64, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_S64),
    (Element::U2, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_U2),
    (Element::U4, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_U4),
    (Element::U8, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_U8),
    (Element::U16, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_U16),
    (Element::U32, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_U32),
    (Element::U64, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_U64),
    (Element::F8E4M3Fn, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_F8E4M3FN),
    (Element::F8E4M3B11Fnuz, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_F8E4M3B11FNUZ),
    (Element::F8E5M2, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_F8E5M2),
    (Element::F8E8M0Fnu, F8E8M0FNU),
    (Element::Bf16, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_BF16),
    (Element::F16, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_F16),
    (Element::F32, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_F32),
    (Element::F64, sys::PJRT_Buffer_Type_PJRT_Buffer_Type_F64),
];

fn to_pjrt(element: Element) -> HostElement {
    HostElement { code: ELEMENTS[element as usize].1, bytes: element.bytes() }
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
            assert_eq!(from_pjrt(to_pjrt(element).code), Some(element));
        }
    }
}
