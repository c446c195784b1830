//! The section `model`: Levanter's `LlamaConfig`. The checkpoint's `config.json` says what the model is; what is left for
//! this section is how attention runs on a TPU.

use serde::{Deserialize, Serialize};

use super::key::settings;
use crate::llama::Target;

settings! {
    /// The section `model`.
    pub struct ModelSettings {
        /// The architecture.
        #[arg(skip)]
        #[serde(rename = "type")]
        pub architecture: Architecture = Architecture::Llama,
        /// Whether attention on a TPU is the paged kernel (Mosaic), or plain operations.
        #[arg(skip)]
        pub use_tpu_ragged_paged_attention: Option<bool> = None,
        /// Query rows per block of that kernel.
        #[arg(skip)]
        pub ragged_paged_q_block_size: Option<usize> = None,
        /// KV pages per block of that kernel; at most those of one sequence.
        #[arg(skip)]
        pub ragged_paged_kv_block_pages: Option<usize> = None,
    }
    ignored {
        // Shapes and functions, which the checkpoint's config.json has.
        max_seq_len, seq_len, hidden_dim, intermediate_dim, num_layers, num_heads, num_kv_heads, head_dim, activation_function,
        initializer_range, layer_norm_epsilon, tie_word_embeddings, hybrid_norm, use_qk_norm, input_embedding_norm, use_bias,
        use_layer_norm_weight, rope, rope_scaling, rope_theta, reference_checkpoint, tokenizer,
        // How Levanter runs it.
        upcast_attn, attn_backend, use_flash_attention, flash_attention_block_size, gradient_checkpointing, scan_layers,
    }
}

impl ModelSettings {
    /// What of the section is not applied to programs that are emitted for `target`, and why: one line each.
    pub fn not_applied(&self, target: Target) -> Vec<String> {
        let mosaic = matches!(target, Target::TileMachine(_) | Target::Tpu(_));
        let kernel = match self.use_tpu_ragged_paged_attention {
            Some(true) if !mosaic => Some("true, attention is Mosaic's: add --kernels mosaic"),
            Some(false) if mosaic => Some("false, attention is plain operations: add --kernels stablehlo"),
            _ => None,
        };
        let kernel = kernel.map(|asked| {
            format!("model.use_tpu_ragged_paged_attention is not applied, kernels are {target}. With {asked}")
        });
        let blocks = [
            ("ragged_paged_q_block_size", self.ragged_paged_q_block_size),
            ("ragged_paged_kv_block_pages", self.ragged_paged_kv_block_pages),
        ];
        let blocks = blocks.into_iter().filter_map(|(key, size)| {
            size.map(|size| format!("model.{key} = {size} is not applied: tiles are planned, see `pagoda check`"))
        });
        kernel.into_iter().chain(blocks).collect()
    }
}

/// The architectures on offer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// Llama.
    #[default]
    Llama,
}
