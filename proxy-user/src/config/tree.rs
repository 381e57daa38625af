//! YAML as kube-proxy reads it: the first document alone counts, with or without a byte order mark before it; a key given
//! twice counts the last time; null is the same as nothing.
//!
//! In: text. Out: a JSON tree, and what was left out of it, for warnings.

use std::{cell::RefCell, fmt};

use serde::de::{Deserialize as _, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// The fields that are true or false, wherever they stand.
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

/// What a text says.
pub(super) struct Tree {
    /// The first document.
    pub(super) root: Value,
    /// The paths of keys that are given more than once.
    pub(super) twice: Vec<String>,
    /// Whether another document follows that says something, right or wrong.
    pub(super) more: bool,
}

/// Reads `text`.
pub(super) fn read(text: &str) -> Result<Tree, serde_yaml_ng::Error> {
    let duplicates = RefCell::new(Vec::new());
    let place = Place { path: String::new(), duplicates: &duplicates };
    // A byte order mark, as some editors put it, is for the parser a character of the first word.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = serde_yaml_ng::Deserializer::from_str(text);
    let root = documents.next().map_or(Ok(Value::Null), |first| first.deserialize_any(place))?;
    let says_something =
        |document| serde_yaml_ng::Value::deserialize(document).map_or(true, |value| !value.is_null());
    let more = documents.any(says_something);
    Ok(Tree { root, twice: duplicates.into_inner(), more })
}

#[derive(Clone)]
struct Place<'a> {
    path: String,
    duplicates: &'a RefCell<Vec<String>>,
}

impl Place<'_> {
    /// What a word of YAML 1.1 says where a field is true or false; later YAML takes it for text.
    fn truth(&self, word: &str) -> Option<bool> {
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

impl<'de> DeserializeSeed<'de> for Place<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Place<'_> {
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
        Ok(self.truth(value).map_or_else(|| value.into(), Value::Bool))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut sequence = Vec::new();
        loop {
            let place = Self { path: format!("{}[{}]", self.path, sequence.len()), ..self.clone() };
            match items.next_element_seed(place)? {
                Some(item) => sequence.push(item),
                None => return Ok(Value::Array(sequence)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        let mut seen = std::collections::BTreeSet::new();
        while let Some(key) = entries.next_key::<String>()? {
            let place = self.key(&key);
            if !seen.insert(key.clone()) {
                self.duplicates.borrow_mut().push(place.path.clone());
            }
            let value = entries.next_value_seed(place.clone()).map_err(A::Error::custom)?;
            if value.is_null() {
                map.remove(&key);
            } else {
                map.insert(key, value);
            }
        }
        Ok(Value::Object(map))
    }
}
