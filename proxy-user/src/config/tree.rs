//! YAML as kube-proxy reads it: only the first document counts, a byte order mark before it is skipped, of a
//! repeated key the last value counts, and null means that the field is not set.
//!
//! In: text. Out: a JSON tree, and what was left out of it, for warnings.

use std::{cell::RefCell, fmt};

use serde::de::{Deserialize as _, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// The boolean fields, without their path.
const BOOLEANS: [&str; 9] = [
    "bindAddressHardFail",
    "enableDSR",
    "enableProfiling",
    "forwardHealthCheckVip",
    "localhostNodePorts",
    "masqueradeAll",
    "strictARP",
    "tcpBeLiberal",
    "windowsRunAsService",
];

/// The content of a YAML text.
pub(super) struct Tree {
    /// The first document.
    pub(super) root: Value,
    /// The paths of keys that are given more than once.
    pub(super) twice: Vec<String>,
    /// Whether another document with content follows, valid or not.
    pub(super) more: bool,
}

/// Parses `text`.
pub(super) fn read(text: &str) -> Result<Tree, serde_yaml_ng::Error> {
    let duplicates = RefCell::new(Vec::new());
    let visitor = FieldVisitor { path: String::new(), duplicates: &duplicates };
    // The parser would take a byte order mark, which some editors write, for a character of the first word.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = serde_yaml_ng::Deserializer::from_str(text);
    let root = documents.next().map_or(Ok(Value::Null), |first| first.deserialize_any(visitor))?;
    let has_content =
        |document| serde_yaml_ng::Value::deserialize(document).map_or(true, |value| !value.is_null());
    let more = documents.any(has_content);
    Ok(Tree { root, twice: duplicates.into_inner(), more })
}

#[derive(Clone)]
struct FieldVisitor<'a> {
    path: String,
    duplicates: &'a RefCell<Vec<String>>,
}

impl FieldVisitor<'_> {
    /// The value of a YAML 1.1 boolean word in a boolean field. Later YAML takes such a word as text.
    fn boolean(&self, word: &str) -> Option<bool> {
        let field = self.path.rsplit('.').next().unwrap_or_default();
        if !self.path.starts_with("featureGates.") && !BOOLEANS.contains(&field) {
            return None;
        }
        match word {
            "y" | "Y" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => Some(true),
            "n" | "N" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => Some(false),
            _ => None,
        }
    }

    fn key(&self, key: &str) -> Self {
        let dot = if self.path.is_empty() { "" } else { "." };
        Self { path: format!("{}{dot}{key}", self.path), ..self.clone() }
    }
}

impl<'de> DeserializeSeed<'de> for FieldVisitor<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for FieldVisitor<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("plain YAML without tags")
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| E::custom(format_args!("{}: {value} is not a finite number", self.path)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(self.boolean(value).map_or_else(|| value.into(), Value::Bool))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut sequence = Vec::new();
        loop {
            let visitor = Self { path: format!("{}[{}]", self.path, sequence.len()), ..self.clone() };
            match items.next_element_seed(visitor)? {
                Some(item) => sequence.push(item),
                None => return Ok(Value::Array(sequence)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        let mut seen = std::collections::BTreeSet::new();
        while let Some(key) = entries.next_key::<String>()? {
            let visitor = self.key(&key);
            if !seen.insert(key.clone()) {
                self.duplicates.borrow_mut().push(visitor.path.clone());
            }
            let value = entries.next_value_seed(visitor.clone()).map_err(A::Error::custom)?;
            if value.is_null() {
                map.remove(&key);
            } else {
                map.insert(key, value);
            }
        }
        Ok(Value::Object(map))
    }
}
