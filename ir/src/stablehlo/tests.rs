//! Snapshots of small modules, and the errors of operands that do not fit.

use super::*;
use crate::{Context, Error, HostTensor, Result};

type Body = for<'c, 'a> fn(&Builder<'c, 'a>, &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>>;

fn ty(element: Element, dims: &[usize]) -> TensorType {
    TensorType::new(element, dims)
}

/// The text of a module of one function, which must verify.
fn text(arguments: &[TensorType], body: Body) -> String {
    let context = Context::new();
    let module = Module::new(&context, "m");
    module.function("main", arguments, |b, x| body(b, x)).unwrap();
    module.verify().unwrap();
    module.text()
}

/// The text of the error that `body` ends with.
fn error(arguments: &[TensorType], body: Body) -> String {
    let context = Context::new();
    let module = Module::replicated(&context, "m", 2, 1);
    module.function("main", arguments, |b, x| body(b, x)).unwrap_err().to_string()
}

#[test]
fn a_layer_of_a_network() {
    let module = text(&[ty(Element::Bf16, &[8, 64]), ty(Element::Bf16, &[128, 64])], |b, x| {
        let dims = DotDims { contract: (&[1], &[1]), ..DotDims::default() };
        let hidden = b.dot_general(x[0], x[1], dims, Element::F32)?; // [tokens, features]
        let gated = b.multiply(hidden, b.logistic(hidden)?)?;
        let scale = b.broadcast_to(b.scalar(Element::F32, 0.5)?, &[8, 128])?;
        Ok(vec![b.convert(b.multiply(gated, scale)?, Element::Bf16)?])
    });
    insta::assert_snapshot!(module, @"");
}

#[test]
fn a_loop_with_captures_and_a_reduction() {
    let module = text(&[ty(Element::F32, &[4]), TensorType::scalar(Element::I32)], |b, x| {
        let start = [b.scalar(Element::I32, 0.0)?, x[0]];
        let state = b.while_(
            &start,
            |b, state| b.compare(state[0], Direction::Lt, x[1]),
            |b, state| Ok(vec![b.add(state[0], b.scalar(Element::I32, 1.0)?)?, b.add(state[1], x[0])?]),
        )?;
        Ok(vec![b.reduce_sum(state[1], &[0])?])
    });
    insta::assert_snapshot!(module, @"");
}

#[test]
fn functions_donation_and_names() {
    let context = Context::new();
    let module = Module::replicated(&context, "step", 2, 1);
    let cache = ty(Element::F32, &[2, 2]);
    module.private_function("twice", std::slice::from_ref(&cache), |b, x| Ok(vec![b.add(x[0], x[0])?])).unwrap();
    module
        .function("main", &[ty(Element::I32, &[]), cache], |b, x| {
            let sum = b.all_reduce_sum(b.call("twice", &[x[1]])?[0], &DeviceGroups::replicas(2))?;
            Ok(vec![x[0], sum])
        })
        .unwrap();
    module.donate("main", 1, 1).unwrap();
    module.name_argument("main", 0, "token").unwrap();
    module.name_argument("main", 1, "cache").unwrap();
    module.name_result("main", 1, "cache").unwrap();
    module.verify().unwrap();
    insta::assert_snapshot!(module.text(), @"");

    let errors = [
        module.donate("main", 0, 1),
        module.donate("main", 2, 1),
        module.donate("main", 1, 2),
        module.donate("decode", 0, 0),
        module.name_result("main", 2, "x"),
        module.function("twice", &[], |_, _| Ok(vec![])),
        module.function("f", &[ty(Element::F32, &[3])], |b, x| b.call("twice", x)),
        module.function("f", &[], |b, x| b.call("thrice", x)),
    ];
    let errors: Vec<String> = errors.into_iter().map(|result| result.unwrap_err().to_string()).collect();
    insta::assert_snapshot!(errors.join("\n"), @"");
}

#[test]
fn gather_scatter_and_sort() {
    let arguments = [ty(Element::F32, &[10, 4]), ty(Element::I32, &[3, 1]), ty(Element::F32, &[3, 4])];
    let module = text(&arguments, |b, x| {
        let dims = ScatterDims {
            update_window_dims: &[1],
            inserted_window_dims: &[0],
            scatter_dims_to_operand_dims: &[0],
            index_vector_dim: 1,
            unique_indices: true,
            ..ScatterDims::default()
        };
        let written = b.scatter(x[0], x[1], x[2], dims, |_, _, new| Ok(new))?;
        let rows = b.take(written, b.reshape(x[1], &[3])?, 0)?;
        b.sort(&[rows], 1, true, |b, pairs| b.compare(pairs[0].0, Direction::Gt, pairs[0].1))
    });
    insta::assert_snapshot!(module, @"");
}

#[test]
fn custom_calls_of_both_kinds() {
    let module = text(&[ty(Element::Bf16, &[16, 128]), ty(Element::F32, &[8])], |b, x| {
        let mosaic = CustomCall {
            backend_config: BackendConfig::Text {
                text: r#"{"custom_call_config": {"body": "TUw="}}"#.to_owned(),
                api_version: 1,
            },
            output_operand_aliases: vec![OutputOperandAlias { result: 0, operand: 0 }],
            operand_layouts: Some(vec![vec![1, 0], vec![0]]),
            result_layouts: Some(vec![vec![1, 0]]),
            kernel_name: Some("rpa-p128-bq32-kv4".to_owned()),
            ..CustomCall::default()
        };
        let out = b.custom_call("tpu_custom_call", x, &[x[0].ty()], mosaic)?;
        let entries = vec![("scale".to_owned(), ConfigValue::F32(0.125)), ("window".to_owned(), ConfigValue::I64(-1))];
        let ffi = CustomCall {
            backend_config: BackendConfig::Dictionary(entries),
            has_side_effect: true,
            ..CustomCall::default()
        };
        b.custom_call("pagoda.rpa", &out, &[x[0].ty(), x[1].ty()], ffi)
    });
    insta::assert_snapshot!(module, @"");
}

#[test]
fn every_misfit_names_the_op_and_the_shapes() {
    let f = ty(Element::F32, &[8, 128]);
    let g = ty(Element::F32, &[64, 256]);
    let (i, p) = (ty(Element::I32, &[8]), TensorType::scalar(Element::Pred));
    let arguments = [f, g, i, p];
    let bodies: &[Body] = &[
        |b, x| Ok(vec![b.add(x[0], x[1])?]),
        |b, x| Ok(vec![b.exponential(x[2])?]),
        |b, x| Ok(vec![b.subtract(x[3], x[3])?]),
        |b, x| Ok(vec![b.and(x[0], x[0])?]),
        |b, x| Ok(vec![b.select(x[2], x[0], x[1])?]),
        |b, x| Ok(vec![b.clamp(x[2], x[0], x[0])?]),
        |b, x| Ok(vec![b.compare(x[0], Direction::Eq, x[2])?]),
        |b, _| Ok(vec![b.scalar(Element::I8, 128.0)?]),
        |b, _| Ok(vec![b.scalar(Element::U64, 0.5)?]),
        |b, x| Ok(vec![b.bitcast_convert(x[0], Element::F64)?]),
        |b, x| {
            Ok(vec![b.dot_general(
                x[0],
                x[1],
                DotDims { contract: (&[1], &[0]), ..DotDims::default() },
                Element::F32,
            )?])
        },
        |b, x| {
            Ok(vec![b.dot_general(
                x[0],
                x[2],
                DotDims { contract: (&[0], &[0]), ..DotDims::default() },
                Element::F32,
            )?])
        },
        |b, x| {
            Ok(vec![b.dot_general(x[0], x[0], DotDims { batch: (&[0], &[]), ..DotDims::default() }, Element::F32)?])
        },
        |b, x| {
            Ok(vec![b.dot_general(
                x[0],
                x[0],
                DotDims { batch: (&[0], &[0]), contract: (&[0], &[1]) },
                Element::F32,
            )?])
        },
        |b, x| Ok(vec![b.broadcast_in_dim(x[2], &[4, 16], &[1])?]),
        |b, x| Ok(vec![b.broadcast_in_dim(x[2], &[8], &[2])?]),
        |b, x| Ok(vec![b.reshape(x[0], &[8, 64])?]),
        |b, x| Ok(vec![b.transpose(x[0], &[0, 0])?]),
        |b, x| Ok(vec![b.slice(x[0], &[0, 100], &[8, 129], &[1, 1])?]),
        |b, x| Ok(vec![b.pad(x[2], x[3], &[0], &[0], &[0])?]),
        |b, x| Ok(vec![b.concatenate(&[x[0], x[1]], 0)?]),
        |b, x| Ok(vec![b.iota(Element::F32, &[4], 1)?]),
        |b, x| Ok(vec![b.dynamic_slice(x[0], &[b.scalar(Element::I32, 0.0)?], &[1, 1])?]),
        |b, x| {
            let zero = b.scalar(Element::I32, 0.0)?;
            Ok(vec![b.dynamic_update_slice(x[0], x[1], &[zero, zero])?])
        },
        |b, x| Ok(vec![b.take(x[0], x[0], 0)?]),
        |b, x| Ok(vec![b.gather(x[0], x[2], GatherDims { index_vector_dim: 0, ..GatherDims::default() }, &[1, 1])?]),
        |b, x| {
            Ok(vec![b.scatter(
                x[0],
                x[2],
                x[1],
                ScatterDims {
                    index_vector_dim: 1,
                    update_window_dims: &[1],
                    inserted_window_dims: &[0],
                    scatter_dims_to_operand_dims: &[0],
                    ..ScatterDims::default()
                },
                |_, _, new| Ok(new),
            )?])
        },
        |b, x| b.reduce(&[x[0]], &[x[3]], &[0], |_, acc, _| Ok(acc.to_vec())),
        |b, x| Ok(vec![b.reduce_sum(x[0], &[2])?]),
        |b, x| Ok(vec![b.reduce_and(x[0], &[0])?]),
        |b, x| b.sort(&[x[0], x[1]], 0, true, |b, pairs| b.compare(pairs[0].0, Direction::Lt, pairs[0].1)),
        |b, x| b.sort(&[x[0]], 0, true, |_, pairs| Ok(pairs[0].0)),
        |b, x| b.while_(&[x[0]], |_, state| Ok(state[0]), |_, state| Ok(state.to_vec())),
        |b, x| b.while_(&[x[0]], |b, _| b.scalar(Element::Pred, 0.0), |_, _| Ok(vec![x[1]])),
        |b, x| b.if_(x[2], |_| Ok(vec![]), |_| Ok(vec![])),
        |b, x| b.if_(x[3], |_| Ok(vec![x[0]]), |_| Ok(vec![x[1], x[2]])),
        |b, x| b.case(x[2], vec![]),
        |b, x| Ok(vec![b.rng_bit_generator(x[2], TensorType::new(Element::U32, &[4]))?.1]),
        |b, x| Ok(vec![b.all_gather(x[0], 2, &DeviceGroups::replicas(2))?]),
        |b, x| Ok(vec![b.all_reduce_sum(x[0], &DeviceGroups::replicas(4))?]),
        |b, x| Ok(vec![b.collective_permute(x[0], &[(0, 1), (1, 1)], Across::Replicas)?]),
        |b, x| Ok(vec![b.all_to_all(x[0], 0, 1, &DeviceGroups::devices(2, 1))?]),
        |b, x| {
            b.custom_call(
                "k",
                &[x[0]],
                &[x[1].ty()],
                CustomCall {
                    output_operand_aliases: vec![OutputOperandAlias { result: 0, operand: 0 }],
                    ..CustomCall::default()
                },
            )
        },
        |b, x| {
            b.custom_call(
                "k",
                &[x[0]],
                &[],
                CustomCall { operand_layouts: Some(vec![vec![0]]), ..CustomCall::default() },
            )
        },
    ];
    let errors: Vec<String> = bodies.iter().map(|&body| error(&arguments, body)).collect();
    insta::assert_snapshot!(errors.join("\n"), @"");
}

#[test]
fn bodies_that_run_alone_must_not_use_what_is_outside() {
    let arguments = [ty(Element::F32, &[8]), TensorType::scalar(Element::F32)];
    let bodies: &[Body] = &[
        |b, x| b.reduce(&[x[0]], &[x[1]], &[0], |b, acc, _| Ok(vec![b.add(acc[0], x[1])?])),
        |b, x| b.reduce(&[x[0]], &[x[1]], &[0], |_, _, _| Ok(vec![x[1]])),
        |b, x| {
            b.sort(&[x[0]], 0, true, |b, pairs| {
                // Out of the `if`, out of the comparator: the outermost body that forbids it is named.
                let pred = b.compare(pairs[0].0, Direction::Lt, pairs[0].1)?;
                Ok(b.if_(pred, |b| Ok(vec![b.compare(x[1], Direction::Lt, x[1])?]), |_| Ok(vec![pred]))?[0])
            })
        },
    ];
    let errors: Vec<String> = bodies.iter().map(|&body| error(&arguments, body)).collect();
    insta::assert_snapshot!(errors.join("\n"), @"");
}

#[test]
fn values_of_a_body_do_not_outlive_it() {
    let escaped = error(&[TensorType::scalar(Element::Pred)], |b, x| {
        let mut inner = None;
        b.if_(
            x[0],
            |b| {
                inner = Some(b.scalar(Element::F32, 1.0)?);
                Ok(vec![])
            },
            |_| Ok(vec![]),
        )?;
        Ok(vec![b.negate(inner.unwrap())?])
    });
    insta::assert_snapshot!(escaped, @"");
    // Also when the body failed: its values stay valid to look at, and are refused as operands.
    let failed = error(&[TensorType::scalar(Element::Pred)], |b, x| {
        let mut inner = None;
        let outcome = b.if_(
            x[0],
            |b| {
                inner = Some(b.scalar(Element::F32, 1.0)?);
                b.add(x[0], inner.unwrap())?;
                Ok(vec![])
            },
            |_| Ok(vec![]),
        );
        assert!(matches!(outcome, Err(Error::Op { .. })));
        assert_eq!(inner.unwrap().ty(), TensorType::scalar(Element::F32));
        Ok(vec![b.negate(inner.unwrap())?])
    });
    assert_eq!(failed, escaped);
}

#[test]
fn the_verifier_tells_what_is_wrong() {
    let context = Context::new();
    let module = Module::new(&context, "broken");
    let operation =
        melior::ir::operation::OperationBuilder::new("func.return", melior::ir::Location::unknown(context.melior()));
    use melior::ir::BlockLike;
    module.melior().body().append_operation(operation.build().unwrap());
    insta::assert_snapshot!(module.verify().unwrap_err(), @"");
}

#[test]
fn bytecode_is_compact_for_large_constants() {
    let context = Context::new();
    let module = Module::new(&context, "m");
    let values: Vec<f32> = (0..1 << 16).map(|value| value as f32).collect();
    module.function("main", &[], |b, _| Ok(vec![b.constant(&HostTensor::new(&[1 << 16], &values))?])).unwrap();
    let bytes = 4 << 16;
    assert!((bytes..bytes + 1000).contains(&module.bytecode().len()), "{} bytes", module.bytecode().len());
}
