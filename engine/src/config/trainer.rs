//! The section `trainer`: Levanter's `TrainerConfig`, which every program of Levanter's has. Of some fifty keys two mean
//! something to a sampler: the types of computation, and the mesh.

use serde::{Deserialize, Serialize};

use super::engine::Compute;
use super::key::settings;
use crate::mesh::{Axis, MeshRequest};

settings! {
    /// The section `trainer`.
    pub struct TrainerSettings {
        /// Types of parameters and computation, `p=bfloat16,c=bfloat16`. Parameters have the type of the computation here.
        #[arg(skip)]
        pub mp: Option<Policy> = None,
        /// The section `trainer.mesh`.
        #[command(flatten)]
        pub mesh: MeshSettings = MeshSettings::default(),
    }
    older {
        /// Today's `mesh.axes.model`.
        model_axis_size: Axis,
        /// Today's `mesh.tensor_parallel_axes`.
        tensor_parallel_axes: Vec<String>,
    }
    ignored {
        // Runs, logs and trackers.
        id, seed, tracker, wandb, watch, profiler, profiler_start_step, profiler_num_steps, profiler_perfetto_link, log_dir,
        log_jaxprs, log_xla_hlo, crash_on_nan, crash_on_inf,
        // Batches, steps and checkpoints of training.
        train_batch_size, per_device_parallelism, per_device_eval_parallelism, allow_nondivisible_batch_size,
        num_train_steps, steps_per_eval, max_eval_batches, checkpointer, elastic, load_checkpoint, load_checkpoint_path,
        initialize_from, allow_partial_checkpoint, model_averaging, quantization, fp8,
        // Sharding of training.
        use_explicit_mesh_axes, batch_axis, fsdp_axis, axis_resources, parameter_axis_resources, replica_ici_axis_size,
        replica_dcn_axis_size,
        // The machines.
        jax_config, jax_compilation_cache_dir, distributed, ray, require_accelerator, shutdown_at_exit,
    }
}

settings! {
    /// The section `trainer.mesh`.
    pub struct MeshSettings {
        /// Devices: replicas (data) times the devices that share one copy of the model (model), data=2,model=4.
        #[arg(long = "mesh", value_name = "AXES")]
        pub axes: Option<MeshRequest> = None,
    }
    ignored { dcn_axes, batch_axis_name, tensor_parallel_axes, shared_mapping, compute_mapping, param_mapping }
}

impl TrainerSettings {
    /// Reads older spellings into today's keys.
    pub(super) fn modernise(&mut self, notes: &mut Vec<String>) {
        let today = "trainer.mesh.axes.model";
        if let Some(model) = self.model_axis_size.take("trainer.model_axis_size", today, notes) {
            self.mesh.axes.get_or_insert(MeshRequest::of_model(model));
        }
        let today = "trainer.mesh.tensor_parallel_axes, and ignored: heads, MLP and vocabulary are sharded";
        self.tensor_parallel_axes.take("trainer.tensor_parallel_axes", today, notes);
    }
}

/// A mixed-precision policy as crate `jmp` spells it: `p=bfloat16,c=bfloat16,o=float32`, in long or short names, or one type
/// for all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Policy {
    text: String,
    compute: Compute,
}

impl Policy {
    /// The type of the computation.
    pub fn compute(&self) -> Compute {
        self.compute
    }
}

impl TryFrom<String> for Policy {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let element = |name: &str| match name.trim() {
            "float32" | "f32" | "full" => Ok(Some(Compute::F32)),
            "bfloat16" | "bf16" => Ok(Some(Compute::Bf16)),
            "float16" | "f16" | "half" | "float64" | "f64" => Ok(None),
            _ => Err("is not a policy such as p=bfloat16,c=bfloat16".to_owned()),
        };
        let mut compute = Err("names no type of computation, c=TYPE");
        for part in text.split(',') {
            let (role, name) = part.split_once('=').unwrap_or(("c", part));
            match role.trim() {
                "c" | "compute" => compute = Ok(element(name)?),
                "p" | "params" | "o" | "output" => drop(element(name)?),
                _ => return Err("is not a policy such as p=bfloat16,c=bfloat16".to_owned()),
            }
        }
        match compute? {
            Some(compute) => Ok(Self { text, compute }),
            None => Err("computes in a type that Pagoda does not offer: use float32 or bfloat16".to_owned()),
        }
    }
}

impl From<Policy> for String {
    fn from(policy: Policy) -> Self {
        policy.text
    }
}
