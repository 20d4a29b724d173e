//! The fields of a `config.json`, which may stand at several levels of it.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// A field with its full name, such as `rope_scaling.factor`, and its value.
pub(crate) type Found<'a> = (String, &'a Value);

/// Objects of one file that are looked through together. A null counts as absent everywhere.
pub(crate) struct Fields<'a> {
    path: &'a Path,
    /// Each object after its name with a dot, outer ones first.
    levels: Vec<(String, &'a Map<String, Value>)>,
}

impl<'a> Fields<'a> {
    /// The top level of a file, which must be an object.
    pub fn new(path: &'a Path, json: &'a Value) -> Result<Self> {
        match json {
            Value::Object(map) => Ok(Self { path, levels: vec![(String::new(), map)] }),
            other => Err(wrong_type(path, &("the whole file".into(), other), "an object")),
        }
    }

    /// The objects of these names in any of the levels, as levels of their own.
    pub fn within(&self, names: &[&str]) -> Result<Self> {
        let mut levels = vec![];
        for name in names {
            for (full, value) in self.all(name) {
                let Value::Object(map) = value else {
                    return Err(wrong_type(self.path, &(full, value), "an object"));
                };
                levels.push((full + ".", map));
            }
        }
        Ok(Self { path: self.path, levels })
    }

    /// These levels and those, which are further in.
    pub fn and(&self, inner: &Self) -> Self {
        Self { path: self.path, levels: [&self.levels[..], &inner.levels].concat() }
    }

    /// Objects within the levels, which would be levels of a kind of their own.
    pub fn objects(&self) -> impl Iterator<Item = Found<'a>> {
        let inner =
            self.levels.iter().flat_map(|(level, map)| map.iter().map(move |(k, v)| (format!("{level}{k}"), v)));
        inner.filter(|(_, value)| value.is_object())
    }

    /// The texts of the only level, by name.
    pub fn texts(&self) -> Result<BTreeMap<String, String>> {
        let all = self.levels.iter().flat_map(|(level, map)| map.iter().map(move |(k, v)| (level, k, v)));
        let text = |(level, name, value): (&String, &String, &Value)| match value.as_str() {
            Some(text) => Ok((name.clone(), text.into())),
            None => Err(wrong_type(self.path, &(format!("{level}{name}"), value), "a text")),
        };
        all.map(text).collect()
    }

    /// The field at every level that has it.
    pub fn all(&self, name: &str) -> impl Iterator<Item = Found<'a>> {
        let found = self.levels.iter().filter_map(move |(level, map)| Some((format!("{level}{name}"), map.get(name)?)));
        found.filter(|(_, value)| !value.is_null())
    }

    /// The field, which must be the same at every level that has it.
    pub fn find(&self, name: &str) -> Result<Option<Found<'a>>> {
        let mut all = self.all(name);
        let Some((field, value)) = all.next() else { return Ok(None) };
        match all.find(|(_, other)| *other != value && (other.as_f64().is_none() || other.as_f64() != value.as_f64())) {
            None => Ok(Some((field, value))),
            Some((other, expected)) => {
                Err(Error::FieldConflict { field, got: shorten(value), other, expected: shorten(expected) })
            }
        }
    }

    fn get<T>(&self, name: &str, expected: &'static str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(found) = self.find(name)? else { return Ok(None) };
        read(found.1).map(Some).ok_or_else(|| wrong_type(self.path, &found, expected))
    }

    /// A whole number. Files written by other languages may say 2.0 for 2.
    pub fn count(&self, name: &str) -> Result<Option<usize>> {
        self.get(name, "a whole number of at least 0", |value| {
            let whole = value.as_f64().filter(|f| f.fract() == 0.0 && (0.0..9e15).contains(f)).map(|f| f as u64);
            usize::try_from(value.as_u64().or(whole)?).ok()
        })
    }

    /// A number that an f32 can hold.
    pub fn number(&self, name: &str) -> Result<Option<f32>> {
        self.get(name, "a number", |value| value.as_f64().map(|f| f as f32))
    }

    /// True or false.
    pub fn flag(&self, name: &str) -> Result<Option<bool>> {
        self.get(name, "true or false", Value::as_bool)
    }

    /// A text.
    pub fn text(&self, name: &str) -> Result<Option<&'a str>> {
        self.get(name, "a text", Value::as_str)
    }

    /// A token or a list of them, at the outermost level that has the field. What has none says null, or -1.
    pub fn tokens(&self, name: &str) -> Result<Option<Vec<u32>>> {
        let Some((field, value)) = self.all(name).next() else { return Ok(None) };
        let one = std::slice::from_ref(value);
        let list = value.as_array().map_or(one, Vec::as_slice).iter().filter(|v| v.as_i64() != Some(-1));
        let tokens: Option<Vec<u32>> = list.map(|v| v.as_u64().and_then(|t| u32::try_from(t).ok())).collect();
        tokens
            .map(Some)
            .ok_or_else(|| wrong_type(self.path, &(field, value), "a token, a list of tokens, or -1 for none"))
    }

    /// A list of numbers.
    pub fn numbers(&self, name: &str) -> Result<Option<Vec<f32>>> {
        self.get(name, "a list of numbers", |value| {
            value.as_array()?.iter().map(|v| v.as_f64().map(|f| f as f32)).collect()
        })
    }

    /// Whether the field is there, be it null.
    pub fn says(&self, name: &str) -> bool {
        self.levels.iter().any(|(_, map)| map.contains_key(name))
    }

    /// What [`Fields::count`] and its like found, of a field that must be there.
    pub fn required<T>(&self, name: &str, found: Option<T>) -> Result<T> {
        found.ok_or_else(|| Error::MissingField { path: self.path.into(), field: self.name(name) })
    }

    /// The field's full name where it stands.
    pub fn located(&self, name: &str) -> String {
        self.all(name).next().map_or(name.into(), |(field, _)| field)
    }

    /// How the innermost level calls the field.
    pub fn name(&self, name: &str) -> String {
        let level = self.levels.last().map_or("", |(level, _)| level);
        format!("{level}{name}")
    }
}

fn wrong_type(path: &Path, (field, got): &Found, expected: &'static str) -> Error {
    Error::FieldType { path: path.into(), field: field.clone(), got: shorten(got), expected }
}

/// A value for a message.
pub(crate) fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
