//! What sets the architectures apart from each other, as data. The decoder, the configuration and the weights are read
//! through it: a further architecture is one more [`Architecture`] here.

/// One architecture.
#[derive(Debug, PartialEq)]
pub(crate) struct Architecture {
    /// `model_type` of a config.json.
    pub model_type: &'static str,
    /// Its class in `architectures`.
    pub class: &'static str,
    /// `model_type` and class of a model of text and images whose text half this is (`text_config`).
    pub wrapper: Option<(&'static str, &'static str)>,
    /// `general.architecture` of a GGUF file.
    pub gguf: &'static str,
    pub activation: Activation,
    /// What config.json calls the activation.
    pub activation_names: &'static [&'static str],
    /// Biases of the query, key and value projections.
    pub qkv_bias: Bias,
    /// The bias of the attention's output projection.
    pub output_bias: Bias,
    /// Biases of the feed-forward layer.
    pub mlp_bias: Bias,
    /// Whether the heads of queries and keys are normalized before they are rotated.
    pub qk_norms: bool,
    /// Whether what attention and feed-forward layer give is normalized before it is added to the residual stream.
    pub post_norms: bool,
    /// Whether config.json's norm weights are kept less 1 in safetensors. In GGUF they are whole.
    pub norms_less_one: bool,
    /// Whether embeddings are multiplied by √hidden_size.
    pub scaled_embeddings: bool,
    /// Whether safetensors and GGUF hold the projections q, k, v in one matrix, and gate, up in another.
    pub fused: bool,
    /// Whether GGUF files have the rows of q and k in the order of interleaved pairs.
    pub interleaved_in_gguf: bool,
    pub windows: Windows,
    /// In GGUF, a model with so many layers scales scores by hidden_size/heads instead of head_dim: no key says so.
    pub wide_scale_layers: Option<usize>,
    /// What the layers with a window rotate by, if not as the others do; without scaling.
    pub local_rope_theta: Option<f32>,
    /// Fields of config.json that are read here and not in the others.
    pub own_fields: &'static [&'static str],
    pub defaults: Defaults,
    pub tensors: TensorNames,
}

/// What safetensors and GGUF call a tensor, without the layer and without `.weight` or `.bias`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Name {
    pub safetensors: &'static str,
    pub gguf: &'static str,
}

/// The tensors of a layer.
#[derive(Debug, PartialEq)]
pub(crate) struct TensorNames {
    pub attention_norm: Name,
    pub q: Name,
    pub k: Name,
    pub v: Name,
    pub qkv: Name,
    pub q_norm: Name,
    pub k_norm: Name,
    pub output: Name,
    pub post_attention_norm: Name,
    pub mlp_norm: Name,
    pub gate: Name,
    pub up: Name,
    pub gate_up: Name,
    pub down: Name,
    pub post_mlp_norm: Name,
}

/// The function within the gated feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// x · sigmoid(x).
    Silu,
    /// GELU by its approximation with tanh.
    GeluTanh,
}

/// Whether projections have biases.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Bias {
    Never,
    Always,
    /// If this field of config.json says so. In GGUF: if the tensor is there.
    Field(&'static str),
}

/// Which layers see no more than a window, where config.json has no `layer_types`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Windows {
    Never,
    /// All, if there is a `sliding_window`.
    All,
    /// Those from `max_window_layers` on, if `use_sliding_window`.
    Late,
    /// All but every so-many-th, or what `sliding_window_pattern` says.
    AllBut(usize),
}

/// What holds where config.json has no such field, as in transformers.
#[derive(Debug, PartialEq)]
pub(crate) struct Defaults {
    pub head_dim: Option<usize>,
    pub rms_norm_eps: f32,
    pub rope_theta: f32,
    pub tie_word_embeddings: bool,
    pub sliding_window: Option<usize>,
    pub attention_softcap: Option<f32>,
    pub logits_softcap: Option<f32>,
    /// The score's scale is one over its root; head_dim if there is none.
    pub query_scalar: Option<f32>,
}

const fn name(safetensors: &'static str, gguf: &'static str) -> Name {
    Name { safetensors, gguf }
}

const LLAMA: Architecture = Architecture {
    model_type: "llama",
    class: "LlamaForCausalLM",
    wrapper: None,
    gguf: "llama",
    activation: Activation::Silu,
    activation_names: &["silu", "swish"],
    qkv_bias: Bias::Field("attention_bias"),
    output_bias: Bias::Field("attention_bias"),
    mlp_bias: Bias::Field("mlp_bias"),
    qk_norms: false,
    post_norms: false,
    norms_less_one: false,
    scaled_embeddings: false,
    fused: false,
    interleaved_in_gguf: true,
    windows: Windows::Never,
    wide_scale_layers: None,
    local_rope_theta: None,
    own_fields: &[],
    defaults: Defaults {
        head_dim: None,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        tie_word_embeddings: false,
        sliding_window: None,
        attention_softcap: None,
        logits_softcap: None,
        query_scalar: None,
    },
    tensors: TensorNames {
        attention_norm: name("input_layernorm", "attn_norm"),
        q: name("self_attn.q_proj", "attn_q"),
        k: name("self_attn.k_proj", "attn_k"),
        v: name("self_attn.v_proj", "attn_v"),
        qkv: name("self_attn.qkv_proj", "attn_qkv"),
        q_norm: name("self_attn.q_norm", "attn_q_norm"),
        k_norm: name("self_attn.k_norm", "attn_k_norm"),
        output: name("self_attn.o_proj", "attn_output"),
        post_attention_norm: name("post_attention_layernorm", "post_attention_norm"),
        // Only here do the files disagree: where there is a norm after attention, it has this name.
        mlp_norm: name("post_attention_layernorm", "ffn_norm"),
        gate: name("mlp.gate_proj", "ffn_gate"),
        up: name("mlp.up_proj", "ffn_up"),
        gate_up: name("mlp.gate_up_proj", "ffn_up"),
        down: name("mlp.down_proj", "ffn_down"),
        post_mlp_norm: name("post_feedforward_layernorm", "post_ffw_norm"),
    },
};

const MISTRAL: Architecture = Architecture {
    model_type: "mistral",
    class: "MistralForCausalLM",
    qkv_bias: Bias::Never,
    output_bias: Bias::Never,
    mlp_bias: Bias::Never,
    windows: Windows::All,
    own_fields: &["sliding_window"],
    defaults: Defaults { sliding_window: Some(4096), ..LLAMA.defaults },
    ..LLAMA
};

const QWEN2: Architecture = Architecture {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    gguf: "qwen2",
    qkv_bias: Bias::Always,
    output_bias: Bias::Never,
    mlp_bias: Bias::Never,
    interleaved_in_gguf: false,
    windows: Windows::Late,
    own_fields: &["sliding_window", "use_sliding_window", "layer_types"],
    defaults: Defaults { sliding_window: Some(4096), ..LLAMA.defaults },
    ..LLAMA
};

const QWEN3: Architecture = Architecture {
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    gguf: "qwen3",
    qkv_bias: Bias::Field("attention_bias"),
    output_bias: Bias::Field("attention_bias"),
    qk_norms: true,
    defaults: Defaults { head_dim: Some(128), ..QWEN2.defaults },
    ..QWEN2
};

const GEMMA2: Architecture = Architecture {
    model_type: "gemma2",
    class: "Gemma2ForCausalLM",
    gguf: "gemma2",
    activation: Activation::GeluTanh,
    activation_names: &["gelu_pytorch_tanh"],
    mlp_bias: Bias::Never,
    post_norms: true,
    norms_less_one: true,
    scaled_embeddings: true,
    interleaved_in_gguf: false,
    windows: Windows::AllBut(2),
    wide_scale_layers: Some(46),
    own_fields: &[
        "sliding_window",
        "layer_types",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ],
    defaults: Defaults {
        head_dim: Some(256),
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        tie_word_embeddings: true,
        sliding_window: Some(4096),
        attention_softcap: Some(50.0),
        logits_softcap: Some(30.0),
        query_scalar: Some(256.0),
    },
    tensors: TensorNames { mlp_norm: name("pre_feedforward_layernorm", "ffn_norm"), ..LLAMA.tensors },
    ..LLAMA
};

const GEMMA3: Architecture = Architecture {
    model_type: "gemma3_text",
    class: "Gemma3ForCausalLM",
    wrapper: Some(("gemma3", "Gemma3ForConditionalGeneration")),
    gguf: "gemma3",
    qk_norms: true,
    windows: Windows::AllBut(6),
    wide_scale_layers: Some(62),
    local_rope_theta: Some(10_000.0),
    own_fields: &[
        "sliding_window",
        "sliding_window_pattern",
        "layer_types",
        "query_pre_attn_scalar",
        "final_logit_softcapping",
    ],
    defaults: Defaults { rope_theta: 1_000_000.0, attention_softcap: None, logits_softcap: None, ..GEMMA2.defaults },
    ..GEMMA2
};

const PHI3: Architecture = Architecture {
    model_type: "phi3",
    class: "Phi3ForCausalLM",
    gguf: "phi3",
    qkv_bias: Bias::Never,
    output_bias: Bias::Never,
    mlp_bias: Bias::Never,
    fused: true,
    interleaved_in_gguf: false,
    windows: Windows::All,
    own_fields: &["sliding_window", "partial_rotary_factor"],
    defaults: Defaults { rms_norm_eps: 1e-5, ..LLAMA.defaults },
    ..LLAMA
};

/// All of them.
pub(crate) const ARCHITECTURES: [&Architecture; 7] = [&LLAMA, &MISTRAL, &QWEN2, &QWEN3, &GEMMA2, &GEMMA3, &PHI3];
