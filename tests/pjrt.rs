//! The PJRT layer on the real CPU plugin: devices, types, donation, replicas, errors, custom calls in Rust.

use half::bf16;
use pagoda_engine::pjrt::custom_call::{CustomCall, Frame, register};
use pagoda_engine::pjrt::{Arg, Client, Error, Plugin, PluginChoice};
use pagoda_ir::element::Element;
use pagoda_ir::tensor::HostTensor;

fn plugin() -> Plugin {
    Plugin::load(&PluginChoice::parse("cpu").unwrap()).expect("the CPU plugin: run `make setup`")
}

fn client(devices: usize) -> Client {
    plugin().client(devices).unwrap()
}

const ADD: &str = "module { func.func @main(%a: tensor<4xbf16>, %b: tensor<4xbf16>) -> tensor<4xbf16> {
  %0 = stablehlo.add %a, %b : tensor<4xbf16>
  return %0 : tensor<4xbf16> } }";

#[test]
fn bf16_and_integers_go_in_and_out_bit_for_bit() {
    let client = client(1);
    let a = [1.0, -2.5, 0.125, 300.0].map(bf16::from_f32);
    let sum = client.compile(ADD, 1).unwrap().call(&[HostTensor::new(&[4], &a), HostTensor::new(&[4], &a)]).unwrap();
    assert_eq!(sum[0].to_f64(), [2.0, -5.0, 0.25, 600.0]);
    for element in Element::ALL {
        let bytes: Vec<u8> = (0..6 * element.bytes()).map(|i| (i % 2) as u8).collect();
        let tensor = HostTensor::from_bytes(element, &[2, 3], &bytes);
        assert_eq!(client.upload(&tensor, 0).unwrap().download().unwrap(), tensor);
    }
    let empty = HostTensor::new::<f32>(&[0, 3], &[]);
    assert_eq!(client.upload(&empty, 0).unwrap().download().unwrap(), empty);
}

#[test]
fn donation_reuses_the_argument_and_keep_protects_it() {
    let client = client(1);
    let text = "module { func.func @main(%a: tensor<1024xf32> {tf.aliasing_output = 0 : i32}) -> tensor<1024xf32> {
      %0 = stablehlo.add %a, %a : tensor<1024xf32>
      return %0 : tensor<1024xf32> } }";
    let program = client.compile(text, 1).unwrap();
    assert_eq!(program.memory_stats().unwrap().aliased, 4096);
    assert!(program.cost_analysis().unwrap().flops.unwrap() >= 1024.0);
    let ones = client.upload(&HostTensor::new(&[1024], &[1f32; 1024]), 0).unwrap();
    let twos = program.run(vec![Arg::Keep(&ones)]).unwrap().pop().unwrap();
    assert_eq!(ones.values::<f32>().unwrap()[0], 1.0, "a kept argument survives a program that may alias it");
    let fours = program.run(vec![Arg::Donate(twos)]).unwrap().pop().unwrap();
    assert_eq!(fours.values::<f32>().unwrap(), [4.0; 1024]);
}

#[test]
fn replicas_take_their_own_arguments_and_reduce() {
    let client = client(4);
    let text = "module @r attributes {mhlo.num_replicas = 4 : i32} {
      func.func @main(%a: tensor<2xi32>) -> (tensor<2xi32>, tensor<2xi32>) {
        %0 = \"stablehlo.all_reduce\"(%a) ({
          ^bb0(%x: tensor<i32>, %y: tensor<i32>):
            %s = stablehlo.add %x, %y : tensor<i32>
            stablehlo.return %s : tensor<i32>
        }) {replica_groups = dense<[[0, 1, 2, 3]]> : tensor<1x4xi64>} : (tensor<2xi32>) -> tensor<2xi32>
        return %a, %0 : tensor<2xi32>, tensor<2xi32> } }";
    let program = client.compile(text, 4).unwrap();
    let inputs: Vec<_> =
        (0..4).map(|i| client.upload(&HostTensor::new(&[2], &[i, 10 * i]), i as usize).unwrap()).collect();
    let outputs = program.run_replicated(inputs.into_iter().map(|b| vec![Arg::Donate(b)]).collect()).unwrap();
    for (i, replica) in outputs.iter().enumerate() {
        assert_eq!(replica[0].values::<i32>().unwrap(), [i as i32, 10 * i as i32]);
        assert_eq!(replica[1].values::<i32>().unwrap(), [6, 60]);
    }
    assert!(matches!(program.run(vec![]), Err(Error::Misuse(_))), "one replica's arguments to a program of four");
}

/// Two programs of two replicas each, on devices of their own, run by two threads of one client at the same time.
#[test]
fn threads_run_programs_on_devices_of_their_own() {
    let client = client(4);
    let text = "module @r attributes {mhlo.num_replicas = 2 : i32} {
      func.func @main(%a: tensor<i32>) -> tensor<i32> {
        %0 = \"stablehlo.all_reduce\"(%a) ({
          ^bb0(%x: tensor<i32>, %y: tensor<i32>):
            %s = stablehlo.add %x, %y : tensor<i32>
            stablehlo.return %s : tensor<i32>
        }) {replica_groups = dense<[[0, 1]]> : tensor<1x2xi64>} : (tensor<i32>) -> tensor<i32>
        return %0 : tensor<i32> } }";
    std::thread::scope(|scope| {
        for devices in [[0, 1], [3, 2]] {
            let client = client.clone();
            scope.spawn(move || {
                let program = client.compile_on(text, &devices).unwrap();
                for round in 0..100 {
                    let inputs = devices.map(|device| {
                        let value = HostTensor::scalar(10 * device as i32 + round);
                        vec![Arg::Donate(client.upload(&value, device).unwrap())]
                    });
                    let outputs = program.run_replicated(inputs.into()).unwrap();
                    let expected = 10 * (devices[0] + devices[1]) as i32 + 2 * round;
                    for output in outputs {
                        assert_eq!(output[0].values::<i32>().unwrap(), [expected]);
                    }
                }
            });
        }
    });
    assert!(matches!(client.compile_on(text, &[3, 4]), Err(Error::Misuse(_))));
}

#[test]
fn errors_carry_call_code_and_message() {
    let client = client(1);
    let Err(Error::Plugin { call, message, .. }) = client.compile("module { nonsense }", 1) else { panic!() };
    assert_eq!(call, "PJRT_Client_Compile");
    assert!(message.contains("nonsense"), "the compiler's own words: {message}");
    assert!(matches!(client.compile(ADD, 2), Err(Error::Misuse(_))));
    assert!(matches!(client.upload(&HostTensor::scalar(1i32), 7), Err(Error::Misuse(_))));
    assert!(matches!(client.upload_bytes(Element::F32, &[3], &[0; 8], 0), Err(Error::Misuse(_))));
    let program = client.compile(ADD, 1).unwrap();
    let Err(Error::Plugin { call, code, message }) = program.call(&[HostTensor::scalar(1i32)]) else { panic!() };
    assert_eq!((call, code), ("PJRT_LoadedExecutable_Execute", "INVALID_ARGUMENT"), "{message}");
}

#[test]
fn a_program_takes_buffers_of_its_own_client_only() {
    let [own, other] = [client(1), client(1)];
    let x = HostTensor::new(&[4], &[bf16::ONE; 4]);
    let [kept, foreign] = [&own, &other].map(|client| client.upload(&x, 0).unwrap());
    let program = own.compile(ADD, 1).unwrap();
    let refused = program.run(vec![Arg::Keep(&kept), Arg::Keep(&foreign)]).unwrap_err();
    assert!(matches!(&refused, Error::Misuse(_)), "{refused}");
    assert!(refused.to_string().starts_with("argument 1 of replica 0 is a buffer of another client: "), "{refused}");
    assert!(program.run(vec![Arg::Keep(&kept), Arg::Donate(foreign)]).is_err());
    assert_eq!(
        program.run(vec![Arg::Keep(&kept), Arg::Keep(&kept)]).unwrap()[0].download().unwrap().to_f64(),
        [2.0; 4]
    );
}

#[test]
fn what_is_no_plugin_is_refused_by_name() {
    let missing = PluginChoice::parse("/nowhere/plugin.so").unwrap_err().to_string();
    assert!(missing.contains("/nowhere/plugin.so"), "{missing}");
    let file = tempfile::NamedTempFile::new().unwrap();
    let choice = PluginChoice::parse(file.path().to_str().unwrap()).unwrap();
    assert!(matches!(Plugin::load(&choice), Err(Error::NoPlugin { .. })));
}

/// `y = x + 1` in place: `x` has no values of its own where it lies in `y`'s memory.
struct Increment;

impl CustomCall for Increment {
    const TARGET: &'static str = "pagoda_test_increment";

    fn call(frame: Frame<'_>) -> Result<(), String> {
        let x = frame.operands.get(0)?;
        match x.aliased() {
            Some(result) => {
                assert_eq!((x.len(), x.dims, result), (4, &[4][..], 0));
                assert!(x.bytes().is_err());
                let refused = x.values::<f32>().unwrap_err();
                assert_eq!(refused, "operand 0 lies in the memory of result 0: look at that result");
                let [y] = frame.results.values::<f32, 1>()?;
                y.iter_mut().for_each(|y| *y += 1.0);
                Ok(())
            }
            None => Err("it was not passed in place".into()),
        }
    }
}

#[test]
fn an_operand_in_a_results_memory_is_seen_through_the_result() {
    register::<Increment>(&plugin()).unwrap();
    let text = |alias: &str| {
        format!(
            "module {{ func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {{
              %0 = stablehlo.custom_call @{}(%a) {{api_version = 4 : i32, backend_config = {{}}{alias}}}
                : (tensor<4xf32>) -> tensor<4xf32>
              return %0 : tensor<4xf32> }} }}",
            Increment::TARGET
        )
    };
    let in_place = ", output_operand_aliases = [#stablehlo.output_operand_alias<output_tuple_indices = [], operand_index \
                    = 0, operand_tuple_indices = []>]";
    let client = client(1);
    let run = |alias| client.compile(text(alias), 1).unwrap().call(&[HostTensor::new(&[4], &[0f32, 1.0, 2.0, 3.0])]);
    assert_eq!(run(in_place).unwrap()[0].to_f64(), [1.0, 2.0, 3.0, 4.0]);
    assert!(run("").unwrap_err().to_string().contains("not passed in place"));
}

/// `y = factor * x`, or a failure, or a panic, as the attribute says.
struct Scale;

impl CustomCall for Scale {
    const TARGET: &'static str = "pagoda_test_scale";

    fn call(frame: Frame<'_>) -> Result<(), String> {
        let Frame { operands, mut results, options } = frame;
        let factor = match options.string("mode") {
            Some("panic") => panic!("as asked"),
            Some("fail") => return Err("as asked".into()),
            Some(text) => text.parse::<f32>().map_err(|error| error.to_string())?,
            None => return Err("no mode".into()),
        };
        let x = operands.get(0)?.values::<f32>()?;
        assert_eq!(results.ty(0)?, (Element::F32, &[2, 3][..]));
        for (y, x) in results.bytes(0)?.chunks_exact_mut(4).zip(x) {
            y.copy_from_slice(&(factor * x).to_le_bytes());
        }
        Ok(())
    }
}

#[test]
fn custom_calls_run_rust_inside_a_program() {
    register::<Scale>(&plugin()).unwrap();
    let client = client(1);
    let run = |mode: &str| {
        let text = format!(
            "module {{ func.func @main(%a: tensor<2x3xf32>) -> tensor<2x3xf32> {{
              %0 = stablehlo.custom_call @{}(%a) {{api_version = 4 : i32, backend_config = {{mode = \"{mode}\"}}}}
                : (tensor<2x3xf32>) -> tensor<2x3xf32>
              return %0 : tensor<2x3xf32> }} }}",
            Scale::TARGET
        );
        let input = HostTensor::new(&[2, 3], &[0f32, 1.0, 2.0, 3.0, 4.0, 5.0]);
        client.compile(text, 1).unwrap().call(&[input])
    };
    assert_eq!(run("2.5").unwrap()[0].to_f64(), [0.0, 2.5, 5.0, 7.5, 10.0, 12.5]);
    for mode in ["fail", "panic"] {
        let error = run(mode).unwrap_err().to_string();
        assert!(error.contains("as asked") && error.contains(Scale::TARGET), "{error}");
    }
}
