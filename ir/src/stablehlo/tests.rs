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
    let module = Module::replicated(&context, "m", 2);
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
    insta::assert_snapshot!(module, @r#"
    module @m {
      func.func public @main(%arg0: tensor<8x64xbf16>, %arg1: tensor<128x64xbf16>) -> tensor<8x128xbf16> {
        %0 = "stablehlo.dot_general"(%arg0, %arg1) {dot_dimension_numbers = #stablehlo.dot<lhs_batching_dimensions = [], rhs_batching_dimensions = [], lhs_contracting_dimensions = [1], rhs_contracting_dimensions = [1]>} : (tensor<8x64xbf16>, tensor<128x64xbf16>) -> tensor<8x128xf32>
        %1 = "stablehlo.logistic"(%0) : (tensor<8x128xf32>) -> tensor<8x128xf32>
        %2 = "stablehlo.multiply"(%0, %1) : (tensor<8x128xf32>, tensor<8x128xf32>) -> tensor<8x128xf32>
        %3 = "stablehlo.constant"() {value = dense<5.000000e-01> : tensor<f32>} : () -> tensor<f32>
        %4 = "stablehlo.broadcast_in_dim"(%3) {broadcast_dimensions = array<i64>} : (tensor<f32>) -> tensor<8x128xf32>
        %5 = "stablehlo.multiply"(%2, %4) : (tensor<8x128xf32>, tensor<8x128xf32>) -> tensor<8x128xf32>
        %6 = "stablehlo.convert"(%5) : (tensor<8x128xf32>) -> tensor<8x128xbf16>
        return %6 : tensor<8x128xbf16>
      }
    }
    "#);
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
    insta::assert_snapshot!(module, @r#"
    module @m {
      func.func public @main(%arg0: tensor<4xf32>, %arg1: tensor<i32>) -> tensor<f32> {
        %0 = "stablehlo.constant"() {value = dense<0> : tensor<i32>} : () -> tensor<i32>
        %1:2 = "stablehlo.while"(%0, %arg0) ({
        ^bb0(%arg2: tensor<i32>, %arg3: tensor<4xf32>):
          %4 = "stablehlo.compare"(%arg2, %arg1) {compare_type = #stablehlo<comparison_type SIGNED>, comparison_direction = #stablehlo<comparison_direction LT>} : (tensor<i32>, tensor<i32>) -> tensor<i1>
          "stablehlo.return"(%4) : (tensor<i1>) -> ()
        }, {
        ^bb0(%arg2: tensor<i32>, %arg3: tensor<4xf32>):
          %4 = "stablehlo.constant"() {value = dense<1> : tensor<i32>} : () -> tensor<i32>
          %5 = "stablehlo.add"(%arg2, %4) : (tensor<i32>, tensor<i32>) -> tensor<i32>
          %6 = "stablehlo.add"(%arg3, %arg0) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
          "stablehlo.return"(%5, %6) : (tensor<i32>, tensor<4xf32>) -> ()
        }) : (tensor<i32>, tensor<4xf32>) -> (tensor<i32>, tensor<4xf32>)
        %2 = "stablehlo.constant"() {value = dense<0.000000e+00> : tensor<f32>} : () -> tensor<f32>
        %3 = "stablehlo.reduce"(%1#1, %2) ({
        ^bb0(%arg2: tensor<f32>, %arg3: tensor<f32>):
          %4 = "stablehlo.add"(%arg2, %arg3) : (tensor<f32>, tensor<f32>) -> tensor<f32>
          "stablehlo.return"(%4) : (tensor<f32>) -> ()
        }) {dimensions = array<i64: 0>} : (tensor<4xf32>, tensor<f32>) -> tensor<f32>
        return %3 : tensor<f32>
      }
    }
    "#);
}

#[test]
fn functions_donation_and_names() {
    let context = Context::new();
    let module = Module::replicated(&context, "step", 2);
    let cache = ty(Element::F32, &[2, 2]);
    module.private_function("twice", std::slice::from_ref(&cache), |b, x| Ok(vec![b.add(x[0], x[0])?])).unwrap();
    module
        .function("main", &[ty(Element::I32, &[]), cache], |b, x| {
            let sum = b.all_reduce_sum(b.call("twice", &[x[1]])?[0], &ReplicaGroups::all(2))?;
            Ok(vec![x[0], sum])
        })
        .unwrap();
    module.donate("main", 1, 1).unwrap();
    module.name_argument("main", 0, "token").unwrap();
    module.name_argument("main", 1, "cache").unwrap();
    module.name_result("main", 1, "cache").unwrap();
    module.row_major_argument("main", 1).unwrap();
    module.row_major_result("main", 1).unwrap();
    module.verify().unwrap();
    insta::assert_snapshot!(module.text(), @r#"
    module @step attributes {mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 2 : i32} {
      func.func private @twice(%arg0: tensor<2x2xf32>) -> tensor<2x2xf32> {
        %0 = "stablehlo.add"(%arg0, %arg0) : (tensor<2x2xf32>, tensor<2x2xf32>) -> tensor<2x2xf32>
        return %0 : tensor<2x2xf32>
      }
      func.func public @main(%arg0: tensor<i32> {pagoda.name = "token"}, %arg1: tensor<2x2xf32> {mhlo.layout_mode = "{1,0}", pagoda.name = "cache", tf.aliasing_output = 1 : i32}) -> (tensor<i32>, tensor<2x2xf32> {jax.result_info = "cache", mhlo.layout_mode = "{1,0}"}) {
        %0 = call @twice(%arg1) : (tensor<2x2xf32>) -> tensor<2x2xf32>
        %1 = "stablehlo.all_reduce"(%0) ({
        ^bb0(%arg2: tensor<f32>, %arg3: tensor<f32>):
          %2 = "stablehlo.add"(%arg2, %arg3) : (tensor<f32>, tensor<f32>) -> tensor<f32>
          "stablehlo.return"(%2) : (tensor<f32>) -> ()
        }) {replica_groups = dense<[[0, 1]]> : tensor<1x2xi64>} : (tensor<2x2xf32>) -> tensor<2x2xf32>
        return %arg0, %1 : tensor<i32>, tensor<2x2xf32>
      }
    }
    "#);

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
    insta::assert_snapshot!(errors.join("\n"), @r#"
    function `main`: argument 0 is i32[] and cannot become result 1, which is f32[2,2]
    function `main`: argument 2 is not one of its 2
    function `main`: result 2 is not one of its 2
    function `decode`: is not defined (yet) in this module; it has: main, twice
    function `main`: result 2 is not one of its 2
    function `twice`: is defined already
    function `twice`: takes (f32[2,2]) and is called with (f32[3])
    function `thrice`: is not defined (yet) in this module; it has: main, twice
    "#);
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
    insta::assert_snapshot!(module, @r#"
    module @m {
      func.func public @main(%arg0: tensor<10x4xf32>, %arg1: tensor<3x1xi32>, %arg2: tensor<3x4xf32>) -> tensor<3x4xf32> {
        %0 = "stablehlo.scatter"(%arg0, %arg1, %arg2) ({
        ^bb0(%arg3: tensor<f32>, %arg4: tensor<f32>):
          "stablehlo.return"(%arg4) : (tensor<f32>) -> ()
        }) {indices_are_sorted = false, scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [1], inserted_window_dims = [0], input_batching_dims = [], scatter_indices_batching_dims = [], scatter_dims_to_operand_dims = [0], index_vector_dim = 1>, unique_indices = true} : (tensor<10x4xf32>, tensor<3x1xi32>, tensor<3x4xf32>) -> tensor<10x4xf32>
        %1 = "stablehlo.reshape"(%arg1) : (tensor<3x1xi32>) -> tensor<3xi32>
        %2 = "stablehlo.gather"(%0, %1) {dimension_numbers = #stablehlo.gather<offset_dims = [1], collapsed_slice_dims = [0], operand_batching_dims = [], start_indices_batching_dims = [], start_index_map = [0], index_vector_dim = 1>, indices_are_sorted = false, slice_sizes = array<i64: 1, 4>} : (tensor<10x4xf32>, tensor<3xi32>) -> tensor<3x4xf32>
        %3 = "stablehlo.sort"(%2) ({
        ^bb0(%arg3: tensor<f32>, %arg4: tensor<f32>):
          %4 = "stablehlo.compare"(%arg3, %arg4) {compare_type = #stablehlo<comparison_type FLOAT>, comparison_direction = #stablehlo<comparison_direction GT>} : (tensor<f32>, tensor<f32>) -> tensor<i1>
          "stablehlo.return"(%4) : (tensor<i1>) -> ()
        }) {dimension = 1 : i64, is_stable = true} : (tensor<3x4xf32>) -> tensor<3x4xf32>
        return %3 : tensor<3x4xf32>
      }
    }
    "#);
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
    insta::assert_snapshot!(module, @r#"
    module @m {
      func.func public @main(%arg0: tensor<16x128xbf16>, %arg1: tensor<8xf32>) -> (tensor<16x128xbf16>, tensor<8xf32>) {
        %0 = "stablehlo.custom_call"(%arg0, %arg1) {api_version = 1 : i32, backend_config = "{\22custom_call_config\22: {\22body\22: \22TUw=\22}}", call_target_name = "tpu_custom_call", has_side_effect = false, kernel_name = "rpa-p128-bq32-kv4", operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<0> : tensor<1xindex>], output_operand_aliases = [#stablehlo.output_operand_alias<output_tuple_indices = [], operand_index = 0, operand_tuple_indices = []>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<16x128xbf16>, tensor<8xf32>) -> tensor<16x128xbf16>
        %1:2 = "stablehlo.custom_call"(%0) {api_version = 4 : i32, backend_config = {scale = 1.250000e-01 : f32, window = -1 : i64}, call_target_name = "pagoda.rpa", has_side_effect = true} : (tensor<16x128xbf16>) -> (tensor<16x128xbf16>, tensor<8xf32>)
        return %1#0, %1#1 : tensor<16x128xbf16>, tensor<8xf32>
      }
    }
    "#);
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
        |b, _| Ok(vec![b.iota(Element::F32, &[4], 1)?]),
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
        |b, x| Ok(vec![b.all_gather(x[0], 2, &ReplicaGroups::all(2))?]),
        |b, x| Ok(vec![b.all_reduce_sum(x[0], &ReplicaGroups::all(4))?]),
        |b, x| Ok(vec![b.all_reduce_sum(x[0], &ReplicaGroups(vec![vec![1]]))?]),
        |b, x| Ok(vec![b.collective_permute(x[0], &[(0, 1), (1, 1)])?]),
        |b, x| Ok(vec![b.all_to_all(x[0], 0, 1, &ReplicaGroups(vec![vec![0], vec![]]))?]),
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
    insta::assert_snapshot!(errors.join("\n"), @r#"
    stablehlo.add: operands differ: lhs f32[8,128], rhs f32[64,256]
    stablehlo.exponential: needs a float type, got i32[8]
    stablehlo.subtract: needs an integer or a float type, got pred[]
    stablehlo.and: needs an integer type or pred, got f32[8,128]
    stablehlo.select: needs a pred of the same dims or a scalar, and two equal types, got i32[8], f32[8,128], f32[64,256]
    stablehlo.clamp: bounds i32[8], f32[8,128] fit neither f32[8,128] nor its scalar
    stablehlo.compare: operands differ: lhs f32[8,128], rhs i32[8]
    stablehlo.constant: i8 does not hold 128
    stablehlo.constant: u64 does not hold 0.5
    stablehlo.bitcast_convert: f32[8,128] as f64 needs a minor dimension of 2
    stablehlo.dot_general: contracting sizes differ: lhs f32[8,128] dim 1 = 128, rhs f32[64,256] dim 0 = 64
    stablehlo.dot_general: lhs f32[8,128] and rhs i32[8] cannot be multiplied into f32
    stablehlo.dot_general: batch dims do not pair: lhs [0], rhs []
    stablehlo.dot_general: lhs f32[8,128] batch and contract = [0, 0]: dimension 0 is named twice
    stablehlo.broadcast_in_dim: i32[8] dim 0 = 8 does not broadcast to i32[4,16] dim 1 = 16
    stablehlo.broadcast_in_dim: map = [2]: dimension 2 is not below the rank 1
    stablehlo.reshape: f32[8,128] has 1024 elements, f32[8,64] has 512
    stablehlo.transpose: permutation = [0, 0]: dimension 0 is named twice
    stablehlo.slice: dim 1: 100 to 129 by 1 is not a part of f32[8,128]
    stablehlo.pad: i32[8] cannot be padded with pred[]
    stablehlo.concatenate: operands differ beyond dim 0: f32[8,128], f32[64,256]
    stablehlo.iota: dim = [1]: dimension 1 is not below the rank 1
    stablehlo.dynamic_slice: needs one scalar start of the same integer type per dimension of f32[8,128], got i32[]
    stablehlo.dynamic_update_slice: the update f32[64,256] is not a part of f32[8,128]
    stablehlo.gather: indices f32[8,128] must be integers
    stablehlo.gather: index vectors of i32[8] have 8 entries, [] maps 0
    stablehlo.scatter: updates f32[64,256] with update_window_dims [1] fit neither f32[8,128] nor the indices i32[8]
    stablehlo.reduce: inputs (f32[8,128]) start from (pred[]) and must start from (f32[])
    stablehlo.reduce: dims of f32[8,128] = [2]: dimension 2 is not below the rank 2
    stablehlo.reduce: reduce_and needs pred, got f32[8,128]
    stablehlo.sort: needs operands of equal dims, got f32[8,128], f32[64,256]
    stablehlo.sort: the comparator returns f32[] and must return pred[]
    stablehlo.while: the condition returns f32[8,128] and must return pred[]
    stablehlo.while: the body returns (f32[64,256]) and must return (f32[8,128])
    stablehlo.if: the condition is i32[8] and must be pred[]
    stablehlo.if: branches differ: true (f32[8,128]), false (f32[64,256], i32[8])
    stablehlo.case: the index is i32[8] and must be i32[]
    stablehlo.rng_bit_generator: the state is i32[8] and must be u64[2]
    stablehlo.all_gather: dim = [2]: dimension 2 is not below the rank 2
    stablehlo.all_reduce: groups name replica 2, the module has 2: make it with Module::replicated
    stablehlo.all_reduce: groups [[1]] must name each of the module's 2 replicas
    stablehlo.collective_permute: targets name replica 1 twice
    stablehlo.all_to_all: groups [[0], []] must be of one size, and not empty
    stablehlo.custom_call: result 0 (f32[64,256]) cannot take the buffer of operand 0 (f32[8,128])
    stablehlo.custom_call: operand_layouts: [0] does not order the dims of f32[8,128]
    "#);
}

#[test]
fn bodies_that_run_alone_must_not_use_what_is_outside() {
    let arguments = [ty(Element::F32, &[8]), TensorType::scalar(Element::F32)];
    let bodies: &[Body] = &[
        |b, x| b.reduce(&[x[0]], &[x[1]], &[0], |b, acc, _| Ok(vec![b.add(acc[0], x[1])?])),
        |b, x| b.reduce(&[x[0]], &[x[1]], &[0], |_, _, _| Ok(vec![x[1]])),
        |b, x| {
            b.sort(&[x[0]], 0, true, |b, pairs| {
                // Out of the `if` and out of the comparator: the one that forbids it is named.
                let pred = b.compare(pairs[0].0, Direction::Lt, pairs[0].1)?;
                Ok(b.if_(pred, |b| Ok(vec![b.compare(x[1], Direction::Lt, x[1])?]), |_| Ok(vec![pred]))?[0])
            })
        },
    ];
    let errors: Vec<String> = bodies.iter().map(|&body| error(&arguments, body)).collect();
    insta::assert_snapshot!(errors.join("\n"), @r#"
    stablehlo.reduce: its body uses a value of type f32[] from outside in stablehlo.add; this body may only use its own arguments and what it computes: build constants inside it
    stablehlo.reduce: its body uses a value of type f32[] from outside in stablehlo.return; this body may only use its own arguments and what it computes: build constants inside it
    stablehlo.sort: its body uses a value of type f32[] from outside in stablehlo.compare; this body may only use its own arguments and what it computes: build constants inside it
    "#);
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
    insta::assert_snapshot!(escaped, @"stablehlo.negate: uses a value of type f32[] of a body that has ended; return it from that body's op instead");
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
    insta::assert_snapshot!(module.verify().unwrap_err(), @r#"
    module `broken` does not verify:
    error: 'func.return' op expects parent op 'func.func'
      note: see current operation: "func.return"() : () -> ()
    "#);
}

/// Names nest and reach into bodies; bytecode holds them, text only when it is asked to.
#[test]
fn ops_are_named() {
    let body: Body = |b, x| {
        let layer = b.named("layer");
        let doubled = layer.named("double").add(x[0], x[0])?;
        let pred = layer.compare(x[0], Direction::Lt, doubled)?;
        let chosen = layer.named("choose").if_(
            pred,
            |b| Ok(vec![b.named("negate").negate(doubled)?]),
            |b| Ok(vec![b.sqrt(doubled)?]),
        )?;
        Ok(vec![b.tanh(chosen[0])?])
    };
    let context = Context::new();
    let module = Module::new(&context, "m");
    module.function("main", &[TensorType::scalar(Element::F32)], |b, x| body(b, x)).unwrap();
    let named = module.text_with_names();
    let name = |op: &str| {
        let line = named.lines().find(|line| line.contains(&format!("stablehlo.{op}"))).unwrap();
        let alias = line.rsplit("loc(").next().unwrap().trim_end_matches(')');
        let definition = named.lines().find_map(|line| line.strip_prefix(&format!("{alias} = ")));
        definition.unwrap_or(alias).to_owned()
    };
    let names = ["add", "compare", "negate", "sqrt", "tanh"].map(name);
    let expected =
        ["layer.double", "layer", "layer.choose.negate", "layer.choose"].map(|name| format!("loc(\"{name}\")"));
    assert_eq!(names[..4], expected);
    assert_eq!(names[4], "loc(unknown)");
    assert!(!module.text().contains("loc("));
    let bytecode = module.bytecode();
    assert!(bytecode.windows(19).any(|bytes| bytes == b"layer.choose.negate"));
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
