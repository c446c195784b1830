//! The step programs of a model group on its devices: compiled, with the KV cache and the sampling parameters beside the
//! weights.
//!
//! The members of a group run one program in step, each on its own weights and KV; what the host sends is the same for
//! all. They yield the same tokens, which is checked on every call: members that differed once would write different texts
//! into their caches from then on.

use std::time::{Duration, Instant};

use pagoda_ir::stablehlo::Module;
use pagoda_ir::tensor::HostTensor;
use pagoda_ir::{Context, TensorType};

use super::DeviceModel;
use super::sampling;
use super::step::{self, Output, StepShape};
use crate::error::{Error, Result};
use crate::generate::Draw;
use crate::pjrt::{Arg, Buffer, Client, Executable};
use crate::sampler::Sampling;

/// Compiled step programs and all that stays on the devices between their calls.
pub struct Executor {
    client: Client,
    model: DeviceModel,
    /// Of the group's members, as everything below that is per member.
    devices: Vec<usize>,
    prefill: Executable,
    decode: Executable,
    /// Makes a KV cache of zeros.
    empty_cache: Executable,
    /// Taken while a call has them.
    caches: Option<Vec<Buffer>>,
    /// How each row of the last call was sampled: on the host, and on every member's device. Most calls have the same.
    parameters: Option<([HostTensor; 6], Vec<Vec<Buffer>>)>,
    compile: Duration,
}

/// The arguments of one call behind weights, KV and before the sampling parameters, on every member's device.
pub struct Call(Vec<Vec<Buffer>>);

impl Executor {
    /// Compiles the step programs of `shape`, whose `parallel` is that of the model's group, and allocates the KV caches, on
    /// the devices only.
    ///
    /// # Errors
    /// When the programs do not compile, or a device is out of memory.
    pub fn new(
        client: &Client,
        model: DeviceModel,
        shape: &StepShape,
        sampling: Sampling,
        end_of_text: &[u32],
    ) -> Result<Self> {
        let (config, devices) = (model.config(), model.group().devices());
        if shape.target.needs_handlers() {
            crate::native::register_all(client.plugin())?;
        }
        let started = Instant::now();
        let context = Context::new();
        let end_of_text: Vec<i32> = end_of_text.iter().map(|&id| id as i32).collect();
        let prefill = step::prefill(&context, config, shape, Output::Tokens(sampling))?;
        let decode = step::decode(&context, config, shape, sampling, &end_of_text)?;
        let zeros = zeros(&context, &shape.kv_type(config), devices.len())?;
        zeros.row_major_result("main", 0)?; // As the step programs have it.
        let prefill = client.compile_on(prefill.bytecode(), &devices)?;
        let decode = client.compile_on(decode.bytecode(), &devices)?;
        let empty_cache = client.compile_on(zeros.bytecode(), &devices)?;
        let compile = started.elapsed();

        let caches = Some(allocate(&empty_cache)?);
        let client = client.clone();
        Ok(Self { client, model, devices, prefill, decode, empty_cache, caches, parameters: None, compile })
    }

    /// Time spent emitting and compiling the step programs.
    pub fn compile_time(&self) -> Duration {
        self.compile
    }

    /// The decode program, for its statistics.
    pub fn decode_program(&self) -> &Executable {
        &self.decode
    }

    /// The model.
    pub fn model(&self) -> &DeviceModel {
        &self.model
    }

    /// Sends a call's arguments to every member.
    ///
    /// # Errors
    /// When a transfer fails.
    pub fn upload(&self, tensors: &[HostTensor]) -> Result<Call> {
        Ok(Call(self.on_every_member(tensors)?))
    }

    fn on_every_member(&self, tensors: &[HostTensor]) -> Result<Vec<Vec<Buffer>>> {
        let to = |&device: &usize| tensors.iter().map(|tensor| self.client.upload(tensor, device)).collect();
        Ok(self.devices.iter().map(to).collect::<Result<_, _>>()?)
    }

    /// How each row of the next calls is sampled.
    ///
    /// # Errors
    /// When a transfer fails.
    pub fn sample_like(&mut self, rows: &[Draw]) -> Result<()> {
        let rows = sampling::rows(rows);
        if self.parameters.as_ref().is_none_or(|(known, _)| *known != rows) {
            let buffers = self.on_every_member(&rows)?;
            self.parameters = Some((rows, buffers));
        }
        Ok(())
    }

    /// Runs the prefill program ([`step::prefill`]): one token per sequence.
    ///
    /// # Errors
    /// What the device says; then the KV cache is lost, and the next call begins with an empty one.
    pub fn prefill(&mut self, call: Call) -> Result<Sampled> {
        self.run(|executor| &executor.prefill, call, 0)
    }

    /// Runs the decode program ([`step::decode`]): `[slots, max_rounds]` tokens.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill).
    pub fn decode(&mut self, call: Call) -> Result<Sampled> {
        self.run(|executor| &executor.decode, call, 1)
    }

    /// Runs a program; the last `behind` of the call's arguments come behind the sampling parameters.
    ///
    /// # Panics
    /// When nobody has said how rows are sampled.
    fn run(&mut self, program: impl Fn(&Self) -> &Executable, call: Call, behind: usize) -> Result<Sampled> {
        let caches = self.caches.take().map_or_else(|| allocate(&self.empty_cache), Ok)?;
        let (_, parameters) = self.parameters.as_ref().expect("`sample_like` was called before");
        let members = self.model.weights().iter().zip(caches).zip(parameters).zip(call.0);
        let arguments = members.map(|(((weights, cache), parameters), mut before)| {
            let behind = before.split_off(before.len() - behind);
            let given = |buffers: Vec<Buffer>| buffers.into_iter().map(Arg::Donate);
            let weights = weights.iter().map(Arg::Keep).chain([Arg::Donate(cache)]);
            weights.chain(given(before)).chain(parameters.iter().map(Arg::Keep)).chain(given(behind)).collect()
        });
        let results = program(self).run_replicated(arguments.collect())?;
        let (mut caches, mut tokens, mut likelihoods) = (Vec::new(), Vec::new(), Vec::new());
        for results in results {
            let found = results.len();
            let mut results = results.into_iter();
            let (Some(cache), Some(chosen), likelihood, None) =
                (results.next(), results.next(), results.next(), results.next())
            else {
                let problem = format!("it returned {found} results instead of 2 or 3");
                return Err(Error::runtime("running a step program")(problem));
            };
            caches.push(cache);
            tokens.push(chosen);
            likelihoods.extend(likelihood);
        }
        self.caches = Some(caches);
        let tokens = agreed(tokens.iter().map(Buffer::values).collect::<Result<Vec<Vec<i32>>, _>>()?)?;
        let log_probabilities = likelihoods.first().map(Buffer::values).transpose()?.unwrap_or_default();
        Ok(Sampled { tokens, log_probabilities })
    }
}

/// What a step program has sampled.
#[derive(Debug)]
pub struct Sampled {
    /// Of each row, as the program has them.
    pub tokens: Vec<i32>,
    /// Of each token; empty where the program does not say.
    pub log_probabilities: Vec<f32>,
}

/// The tokens that all members have chosen.
fn agreed(tokens: Vec<Vec<i32>>) -> Result<Vec<i32>> {
    let other = tokens.iter().position(|tokens_of_one| *tokens_of_one != tokens[0]);
    match (other, tokens.into_iter().next()) {
        (None, Some(tokens)) => Ok(tokens),
        (other, _) => {
            let problem = format!("shards 0 and {} chose different tokens", other.unwrap_or(0));
            Err(Error::runtime("running a step program")(problem))
        }
    }
}

/// A program of no arguments that makes an array of zeros wherever it runs: the host never holds it.
pub(super) fn zeros<'c>(context: &'c Context, array: &TensorType, replicas: usize) -> Result<Module<'c>> {
    let module = Module::replicated(context, "zeros", replicas);
    module.function("main", &[], |b, _| Ok(vec![b.broadcast_to(b.scalar(array.element, 0.0)?, &array.dims)?]))?;
    Ok(module)
}

/// Runs the program of [`zeros`] to its end: an array per device.
fn allocate(zeros: &Executable) -> Result<Vec<Buffer>> {
    let none = || Error::runtime("allocating the KV cache")("the program returned nothing");
    let results = zeros.run_replicated((0..zeros.replicas()).map(|_| Vec::new()).collect())?;
    let caches = results.into_iter().map(|mut results| results.pop().ok_or_else(none)).collect::<Result<Vec<_>>>()?;
    caches.iter().try_for_each(Buffer::wait)?;
    Ok(caches)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_must_agree() {
        assert_eq!(agreed(vec![vec![1, 2]; 3]).unwrap(), [1, 2]);
        let error = agreed(vec![vec![1, 2], vec![1, 2], vec![1, 3]]).unwrap_err().to_string();
        assert_eq!(error, "running a step program: shards 0 and 2 chose different tokens");
    }
}
