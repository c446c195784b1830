//! The section `model`: Levanter's `LlamaConfig`. The checkpoint's `config.json` says what the model is; what is left for
//! this section is how attention runs on a TPU.

use serde::{Deserialize, Serialize};

use super::key::settings;

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

/// The architectures on offer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// Llama.
    #[default]
    Llama,
}
