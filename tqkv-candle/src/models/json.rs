//! A Hugging Face `config.json` as a model's configuration.

use super::architecture::{ARCHITECTURES, Architecture, Bias, Windows};
use super::config::{ModelConfig, expect_count, expect_layers, value};
use super::refused::{refuse, unsupported};
use super::rope::{Rope, RopeScaling, longrope_attention_factor, yarn_attention_factor};
use crate::error::Result;
use crate::fields::Fields;
use std::path::Path;

impl ModelConfig {
    /// Reads `config.json`, and the end tokens of `generation_config.json` where there is one, from a model's directory.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let mut config = Self::parse(&super::read(&path)?, &path)?;
        let path = dir.join("generation_config.json");
        if path.exists() {
            let json = super::parse_json(&super::read(&path)?, &path)?;
            if let Some(tokens) = Fields::new(&path, &json)?.tokens("eos_token_id")? {
                config.eos_tokens = tokens;
                config.check_tokens()?;
            }
        }
        Ok(config)
    }

    /// Parses the text of a `config.json`; `path` is for the error message.
    ///
    /// A field counts at any level: the top, `text_config`, and for rotary embeddings `rope_scaling` and
    /// `rope_parameters`.
    pub fn parse(json: &[u8], path: &Path) -> Result<Self> {
        let json = super::parse_json(json, path)?;
        let top = Fields::new(path, &json)?;
        let architecture = architecture(&top)?;
        let model = top.and(&top.within(&["text_config"])?);
        let rope = model.within(&["rope_scaling", "rope_parameters"])?;
        let kinds = rope.within(&["full_attention", "sliding_attention"])?;
        let everywhere = model.and(&rope).and(&kinds);
        refuse(architecture, &everywhere)?;

        let count = |name: &str| expect_count(name, model.required(name, model.count(name)?)?);
        let defaults = &architecture.defaults;
        let (heads, hidden_size) = (count("num_attention_heads")?, count("hidden_size")?);
        let layers = expect_layers("num_hidden_layers", count("num_hidden_layers")?)?;
        let head_dim = head_dim(&model, architecture, hidden_size, heads)?;
        let context = count("max_position_embeddings")?;
        let rope = Ropes::read(&model, &rope, architecture, head_dim, context)?;
        let bias = |bias: Bias| -> Result<bool> {
            match bias {
                Bias::Never => Ok(false),
                Bias::Always => Ok(true),
                Bias::Field(name) => Ok(model.flag(name)?.unwrap_or(false)),
            }
        };
        let config = Self {
            architecture,
            vocab_size: count("vocab_size")?,
            hidden_size,
            intermediate_size: count("intermediate_size")?,
            layers,
            heads,
            kv_heads: model.count("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            activation: architecture.activation,
            rms_norm_eps: model.number("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps),
            max_position_embeddings: rope.context,
            rope: rope.global,
            local_rope: rope.local,
            windows: windows(&model, architecture, layers, context)?,
            attention_scale: attention_scale(&model, architecture, head_dim)?,
            attention_softcap: softcap(&model, architecture, "attn_logit_softcapping", defaults.attention_softcap)?,
            logits_softcap: softcap(&model, architecture, "final_logit_softcapping", defaults.logits_softcap)?,
            embedding_scale: if architecture.scaled_embeddings { (hidden_size as f32).sqrt() } else { 1.0 },
            tie_word_embeddings: model.flag("tie_word_embeddings")?.unwrap_or(defaults.tie_word_embeddings),
            qkv_bias: bias(architecture.qkv_bias)?,
            output_bias: bias(architecture.output_bias)?,
            mlp_bias: bias(architecture.mlp_bias)?,
            bos_token: model.tokens("bos_token_id")?.and_then(|tokens| tokens.first().copied()),
            eos_tokens: model.tokens("eos_token_id")?.unwrap_or_default(),
        };
        config.check(&|name| everywhere.located(name))?;
        Ok(config)
    }
}

/// The architecture that a file is of.
fn architecture(top: &Fields) -> Result<&'static Architecture> {
    let kinds = |a: &'static Architecture| [(a.model_type, a.class)].into_iter().chain(a.wrapper);
    let all = || ARCHITECTURES.into_iter().flat_map(move |a| kinds(a).map(move |(kind, class)| (a, kind, class)));
    let listed = |names: Vec<&str>| format!("one of {}", names.join(", "));

    let class = top.find("architectures")?;
    if let Some((field, got)) = &class {
        let known = |got: &str| all().any(|(.., class)| class == got);
        if !got.as_array().is_some_and(|list| list.len() == 1 && list[0].as_str().is_some_and(known)) {
            return Err(unsupported(field, got, &listed(all().map(|(.., class)| class).collect())));
        }
    }
    let class = class.and_then(|(_, got)| got[0].as_str());
    match top.text("model_type")? {
        Some(got) => {
            let found = all().find(|&(_, kind, named)| kind == got && class.is_none_or(|class| class == named));
            if let Some((architecture, ..)) = found {
                return Ok(architecture);
            }
            let fitting = all().filter(|&(.., named)| class.is_none_or(|class| class == named));
            Err(unsupported("model_type", &got.into(), &listed(fitting.map(|(_, kind, _)| kind).collect())))
        }
        // What says nothing is a Llama.
        None => Ok(all().find(|&(.., named)| Some(named) == class).map_or(ARCHITECTURES[0], |(a, ..)| a)),
    }
}

fn head_dim(model: &Fields, architecture: &Architecture, hidden_size: usize, heads: usize) -> Result<usize> {
    match model.count("head_dim")?.or(architecture.defaults.head_dim) {
        Some(head_dim) => Ok(head_dim),
        None if hidden_size.is_multiple_of(heads) => Ok(hidden_size / heads),
        None => {
            let expected = format!("a multiple of num_attention_heads ({heads}), as there is no head_dim");
            Err(value("hidden_size", hidden_size, expected))
        }
    }
}

fn attention_scale(model: &Fields, architecture: &Architecture, head_dim: usize) -> Result<f32> {
    let name = "query_pre_attn_scalar";
    let own = architecture.own_fields.contains(&name);
    let scalar = if own { model.number(name)?.or(architecture.defaults.query_scalar) } else { None };
    match scalar {
        None => Ok(1.0 / (head_dim as f32).sqrt()),
        Some(scalar) if scalar.is_finite() && scalar > 0.0 => Ok(1.0 / scalar.sqrt()),
        Some(scalar) => Err(value(name, scalar, "a finite number above 0")),
    }
}

/// The softcap, where the architecture has one. A null says that there is none, and differs from no field.
fn softcap(model: &Fields, architecture: &Architecture, name: &str, default: Option<f32>) -> Result<Option<f32>> {
    match architecture.own_fields.contains(&name) {
        true if model.says(name) => model.number(name),
        true => Ok(default),
        false => Ok(None),
    }
}

/// How many positions each layer sees, where that is less than the whole context.
fn windows(model: &Fields, architecture: &Architecture, layers: usize, context: usize) -> Result<Vec<Option<usize>>> {
    let own = |name: &str| architecture.own_fields.contains(&name);
    let mut window = match model.says("sliding_window") {
        true => model.count("sliding_window")?,
        false => architecture.defaults.sliding_window,
    };
    if own("use_sliding_window") && !model.flag("use_sliding_window")?.unwrap_or(false) || !own("sliding_window") {
        window = None;
    }
    let windowed: Box<dyn Fn(usize) -> bool> = match (model.find("layer_types")?, architecture.windows) {
        (Some((field, types)), _) if own("layer_types") => {
            let types = types
                .as_array()
                .filter(|list| list.len() == layers)
                .ok_or_else(|| unsupported(&field, types, &format!("a list of {layers} (num_hidden_layers)")))?;
            for (i, got) in types.iter().enumerate() {
                if got != "full_attention" && got != "sliding_attention" {
                    let expected = "\"full_attention\" or \"sliding_attention\"";
                    return Err(unsupported(&format!("{field}[{i}]"), got, expected));
                }
            }
            if types.iter().any(|got| got == "sliding_attention") {
                model.required("sliding_window", window)?;
            }
            Box::new(|layer| types[layer] == "sliding_attention")
        }
        (_, Windows::Never) => Box::new(|_| false),
        (_, Windows::All) => Box::new(|_| true),
        (_, Windows::Late) => {
            let first = model.count("max_window_layers")?.unwrap_or(28);
            Box::new(move |layer| layer >= first)
        }
        (_, Windows::AllBut(every)) => {
            let said = if own("sliding_window_pattern") { model.count("sliding_window_pattern")? } else { None };
            let every = said.unwrap_or(every);
            if every == 0 {
                return Err(value("sliding_window_pattern", 0, "at least 1"));
            }
            Box::new(move |layer| !(layer + 1).is_multiple_of(every))
        }
    };
    // A window that covers the whole context hides nothing.
    Ok((0..layers).map(|layer| window.filter(|&window| windowed(layer) && window < context)).collect())
}

/// The rotary embeddings of a model.
struct Ropes {
    global: Rope,
    local: Option<Rope>,
    /// The longest context that they are made for.
    context: usize,
}

impl Ropes {
    fn read(
        model: &Fields,
        rope: &Fields,
        architecture: &Architecture,
        head_dim: usize,
        context: usize,
    ) -> Result<Self> {
        let kinds = ["full_attention", "sliding_attention"];
        let nested = |(field, _): &(String, _)| kinds.iter().any(|kind| field.ends_with(&format!(".{kind}")));
        if let Some((field, got)) = rope.objects().find(|o| architecture.local_rope_theta.is_none() || !nested(o)) {
            return Err(unsupported(&field, got, "one rotary embedding for all layers"));
        }
        let full = rope.within(&kinds[..1])?;
        let own = rope.and(&full);
        let theta = model.and(&own).number("rope_theta")?.unwrap_or(architecture.defaults.rope_theta);
        let mut global = Rope::new(rotated(&model.and(&own), architecture, head_dim)?, theta);
        global.scaling = scaling(&own, model, global.dim, context)?;
        let local = match architecture.local_rope_theta {
            None => None,
            Some(default) => {
                let own = rope.within(&kinds[1..])?;
                let theta = own.number("rope_theta")?.or(model.number("rope_local_base_freq")?).unwrap_or(default);
                let mut local = Rope::new(head_dim, theta);
                local.scaling = scaling(&own, model, local.dim, context)?;
                Some(local)
            }
        };
        let context = match global.scaling {
            RopeScaling::Divisors { .. } => original_context(&own, model, context)?.min(context),
            _ => context,
        };
        Ok(Self { global, local, context })
    }
}

/// How many elements of a head are rotated.
fn rotated(fields: &Fields, architecture: &Architecture, head_dim: usize) -> Result<usize> {
    let name = "partial_rotary_factor";
    if !architecture.own_fields.contains(&name) {
        return Ok(head_dim);
    }
    match fields.number(name)? {
        None => Ok(head_dim),
        Some(part) if part > 0.0 && part <= 1.0 => Ok((head_dim as f64 * f64::from(part)) as usize),
        Some(part) => Err(value(name, part, "a number above 0 and up to 1")),
    }
}

/// The context that a model was first trained at.
fn original_context(rope: &Fields, model: &Fields, context: usize) -> Result<usize> {
    Ok(model.and(rope).count("original_max_position_embeddings")?.unwrap_or(context))
}

/// What the objects about rotary embeddings say of their scaling.
fn scaling(rope: &Fields, model: &Fields, dim: usize, context: usize) -> Result<RopeScaling> {
    // Older files call it "type".
    let (kind, old) = (rope.find("rope_type")?, rope.find("type")?);
    let Some((field, kind)) = kind.or(old) else {
        return match rope.find("factor")? {
            Some((field, got)) => Err(unsupported(&field, got, "null, as there is no rope_type,")),
            None => Ok(RopeScaling::None),
        };
    };
    let original_context = original_context(rope, model, context)?;
    let required = |name: &str| rope.required(name, rope.number(name)?);
    match kind.as_str() {
        Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: required("factor")? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: required("factor")?,
            low_freq_factor: required("low_freq_factor")?,
            high_freq_factor: required("high_freq_factor")?,
            original_context,
        }),
        // Phi 3's first files say "su" or "yarn".
        Some("longrope" | "su" | "yarn") if rope.says("short_factor") => {
            let factor = rope.number("factor")?.unwrap_or(context as f32 / original_context as f32);
            let divisors = rope.required("short_factor", rope.numbers("short_factor")?)?;
            if divisors.len() != dim / 2 {
                let expected = format!("{} (half the rotated elements)", dim / 2);
                return Err(value(&rope.name("short_factor"), format!("a list of {}", divisors.len()), expected));
            }
            let own = rope.number("attention_factor")?;
            let attention_factor = own.unwrap_or_else(|| longrope_attention_factor(factor, original_context));
            Ok(RopeScaling::Divisors { divisors, attention_factor })
        }
        Some("yarn") => {
            let factor = rope.number("factor")?.unwrap_or(context as f32 / original_context as f32);
            let beta = |name: &str, default: f32| -> Result<f32> {
                Ok(rope.number(name)?.filter(|&beta| beta != 0.0).unwrap_or(default))
            };
            let (mscale, all) = (rope.number("mscale")?, rope.number("mscale_all_dim")?);
            Ok(RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast: beta("beta_fast", 32.0)?,
                beta_slow: beta("beta_slow", 1.0)?,
                truncate: rope.flag("truncate")?.unwrap_or(true),
                attention_factor: rope
                    .number("attention_factor")?
                    .unwrap_or_else(|| yarn_attention_factor(factor, mscale, all)),
            })
        }
        _ => Err(unsupported(&field, kind, "\"default\", \"linear\", \"llama3\", \"yarn\" or \"longrope\"")),
    }
}
