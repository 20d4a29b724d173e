//! `tokenizer.json` and `tokenizer_config.json` of a model's directory.

use super::contain::contain;
use super::{Tokenizer, failed};
use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::models::{parse_json, read};
use serde::de::IgnoredAny;
use serde_json::{Map, Value};
use std::path::Path;
use tokenizers::{PostProcessor as _, Tokenizer as HfTokenizer};

/// Classes of transformers that begin a text with the start token unless told otherwise.
const START_BY_DEFAULT: [&str; 3] = ["LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"];

impl Tokenizer {
    /// Reads the files of a directory; `start` is the start token according to the model's configuration.
    pub(super) fn load(dir: &Path, start: Option<u32>) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = read(&path)?;
        // The crate below panics at what is no JSON.
        serde_json::from_slice::<IgnoredAny>(&bytes).map_err(|e| failed(&path, format!("no JSON: {e}")))?;
        let mut inner = contain(|| HfTokenizer::from_bytes(bytes))
            .map_err(|message| failed(&path, format!("the tokenizers crate panics: {message}")))?
            .map_err(|e| failed(&path, e.to_string()))?;
        // Some files say how training cut and filled up its texts. As in transformers, that is no part of the vocabulary.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| failed(&path, e.to_string()))?;
        let mut tokenizer = Self::new(inner, &path)?;

        let config = dir.join("tokenizer_config.json");
        let json = if config.exists() { parse_json(&read(&config)?, &config)? } else { Value::Object(Map::new()) };
        Fields::new(&config, &json)?;
        // Where `tokenizer.json` says itself what stands around a text, that holds.
        if tokenizer.inner.get_post_processor().map_or(0, |p| p.added_tokens(false)) == 0 {
            tokenizer.start = tokenizer.marker(&json, "add_bos_token", "bos_token", start)?;
            tokenizer.end = tokenizer.marker(&json, "add_eos_token", "eos_token", None)?;
        }
        for name in ["bos_token", "eos_token", "unk_token", "pad_token"] {
            if let Some(content) = json.get(name).and_then(content) {
                tokenizer.names.insert(name, content.to_owned());
            }
        }
        let template = dir.join("chat_template.jinja");
        tokenizer.chat_template = match template.exists() {
            true => Some(String::from_utf8_lossy(&read(&template)?).into_owned()),
            false => json.get("chat_template").and_then(usual_template).map(str::to_owned),
        };
        Ok(tokenizer)
    }

    /// The token that `tokenizer_config.json` puts at an end of a text, if any; `usual` where it does not say which.
    fn marker(&self, json: &Value, add: &'static str, name: &'static str, usual: Option<u32>) -> Result<Option<u32>> {
        let class = json.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
        let by_default = add == "add_bos_token" && START_BY_DEFAULT.contains(&class.trim_end_matches("Fast"));
        match json.get(add).unwrap_or(&Value::Null) {
            Value::Null if !by_default => return Ok(None),
            Value::Bool(false) => return Ok(None),
            Value::Null | Value::Bool(true) => {}
            other => return Err(value(add, other.to_string(), "true or false")),
        }
        let token = json.get(name).filter(|token| !token.is_null());
        let Some(token) = token else {
            return usual.map(Some).ok_or_else(|| value(name, "missing".into(), "a token, as it is to be added"));
        };
        let id = content(token).and_then(|content| self.inner.token_to_id(content));
        id.map(Some).ok_or_else(|| value(name, token.to_string(), "a token of the vocabulary"))
    }
}

/// A token's string, which may stand in an object.
fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// Of several templates with names the one called "default".
fn usual_template(templates: &Value) -> Option<&str> {
    let named = || templates.as_array()?.iter().find(|t| t["name"] == "default")?["template"].as_str();
    templates.as_str().or_else(named)
}

fn value(field: &'static str, got: String, expected: &str) -> Error {
    Error::ConfigValue { field: field.into(), got, expected: expected.into() }
}
