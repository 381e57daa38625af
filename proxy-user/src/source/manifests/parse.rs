//! Parses a file into checked objects.
//!
//! In: the text of a YAML or JSON file. Out: its [`Object`]s with the API server's defaults, or all errors by
//! document and field.

use std::{fmt, sync::Arc};

use serde::{Deserialize, de::DeserializeOwned};
use serde_ignored::Path;
use serde_yaml_ng::Value;

use super::{address::Ranges, check};
use crate::model::Object;

/// An error in a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestError {
    /// The name of the file.
    pub file: Arc<str>,
    /// The document of the file, counted from 1; 0 means the whole file.
    pub document: usize,
    /// The object as `Kind namespace/name`, as far as known.
    pub object: Option<String>,
    /// The path of the field; empty for the whole document.
    pub field: String,
    /// The problem with the field.
    pub reason: String,
}

impl ManifestError {
    pub(super) fn of_file(file: &Arc<str>, reason: impl Into<String>) -> Self {
        let (file, reason) = (Arc::clone(file), reason.into());
        Self { file, document: 0, object: None, field: String::new(), reason }
    }

    /// The message without the name of the file.
    pub(super) fn in_file(&self) -> impl fmt::Display {
        fmt::from_fn(move |f| {
            match (self.document, &self.object) {
                (0, _) => {}
                (document, None) => write!(f, "document {document}: ")?,
                (document, Some(object)) => write!(f, "document {document} ({object}): ")?,
            }
            if !self.field.is_empty() {
                write!(f, "`{}` ", self.field)?;
            }
            f.write_str(&self.reason)
        })
    }
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file, self.in_file())
    }
}

impl std::error::Error for ManifestError {}

/// An object and its position.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) object: Arc<Object>,
    pub(super) document: usize,
}

/// The content of a file.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    pub(super) items: Vec<Item>,
    pub(super) errors: Vec<ManifestError>,
    pub(super) warnings: Vec<String>,
}

/// The treatment of fields that the kind does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unknown {
    /// They are errors, as for `kubectl apply`, because most are typing errors and the intended field would
    /// be missing.
    Refused,
    /// They are ignored.
    Ignored,
}

/// Parses a file.
pub(super) fn parse(file: &Arc<str>, text: &str, ranges: &Ranges, unknown: Unknown) -> Parsed {
    let mut reader = Reader { file, ranges, unknown, parsed: Parsed::default(), document: 0 };
    // The parser would take a byte order mark, which some editors write, for a character of the first word.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let json = file.ends_with(".json");
    let syntax = if json { reader.documents_of_json(text) } else { reader.documents_of_yaml(text) };
    if let Err(reason) = syntax {
        reader.fail(None, "", reason);
    }
    reader.parsed
}

struct Reader<'a> {
    file: &'a Arc<str>,
    ranges: &'a Ranges,
    unknown: Unknown,
    parsed: Parsed,
    document: usize,
}

/// The most brackets that may be open in a document, far more than any object has. The YAML parser's time
/// grows with the square of this number before it reports an error.
const DEEPEST: usize = 1000;

/// The line in which too many brackets are open. Brackets inside of strings count too.
fn too_deep(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    for (number, line) in (1..).zip(text.lines()) {
        if line.starts_with("---") {
            depth = 0;
        }
        for byte in line.bytes() {
            match byte {
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth > DEEPEST {
                return Some(number);
            }
        }
    }
    None
}

impl Reader<'_> {
    fn documents_of_yaml(&mut self, text: &str) -> Result<(), String> {
        if let Some(line) = too_deep(text) {
            return Err(format!("more than {DEEPEST} brackets are open at line {line}"));
        }
        for document in serde_yaml_ng::Deserializer::from_str(text) {
            self.document += 1;
            let mut value = Value::deserialize(document).map_err(|error| error.to_string())?;
            value.apply_merge().map_err(|error| error.to_string())?;
            self.document(value);
        }
        Ok(())
    }

    fn documents_of_json(&mut self, text: &str) -> Result<(), String> {
        for value in serde_json::Deserializer::from_str(text).into_iter::<Value>() {
            self.document += 1;
            self.document(value.map_err(|error| error.to_string())?);
        }
        Ok(())
    }

    fn document(&mut self, value: Value) {
        if !value.is_null() {
            self.object(value, "", None);
        }
    }

    /// Parses an object. `at` is its path in the document, and `expected` is the kind if the list has one.
    fn object(&mut self, value: Value, at: &str, expected: Option<&str>) {
        if !value.is_mapping() {
            self.fail(None, at, "is not an object".to_owned());
            return;
        }
        let text = |key: &str| value.get(key).and_then(Value::as_str).map(ToOwned::to_owned);
        let Some(kind) = text("kind").or_else(|| expected.map(ToOwned::to_owned)) else {
            self.fail(None, &join(at, "kind"), "is missing".to_owned());
            return;
        };
        match kind.as_str() {
            "Service" => self.typed(value, at, &kind, |object| Object::Service(Box::new(object))),
            "EndpointSlice" => self.typed(value, at, &kind, |object| Object::EndpointSlice(Box::new(object))),
            "Node" => self.typed(value, at, &kind, |object| Object::Node(Box::new(object))),
            "ServiceCIDR" => self.typed(value, at, &kind, |object| Object::ServiceCidr(Box::new(object))),
            _ => match kind.strip_suffix("List") {
                Some(member) => self.list(value, at, Some(member).filter(|member| !member.is_empty())),
                None => {
                    let Self { file, document, .. } = self;
                    let warning = format!(
                        "{file}: document {document}: kind `{kind}` is ignored, because weir does not use it"
                    );
                    self.parsed.warnings.push(warning);
                }
            },
        }
    }

    fn list(&mut self, mut value: Value, at: &str, member: Option<&str>) {
        let names = value.as_mapping().into_iter().flat_map(|fields| fields.keys());
        let names = names.filter_map(Value::as_str).filter(|name| !LIST_FIELDS.contains(name));
        let unknown: Vec<String> = names.map(ToOwned::to_owned).collect();
        self.refuse_unknown(None, at, &unknown);
        match value.get_mut("items").map(std::mem::take) {
            Some(Value::Sequence(items)) => {
                for (index, item) in items.into_iter().enumerate() {
                    self.object(item, &join(at, &format!("items[{index}]")), member);
                }
            }
            None | Some(Value::Null) => {}
            Some(_) => self.fail(None, &join(at, "items"), "is not a list".to_owned()),
        }
    }

    fn typed<T>(&mut self, value: Value, at: &str, kind: &str, wrap: fn(T) -> Object)
    where
        T: DeserializeOwned + k8s_openapi::Resource,
    {
        let title = title(kind, &value);
        let version = value.get("apiVersion").and_then(Value::as_str).unwrap_or(T::API_VERSION);
        if version != T::API_VERSION {
            let reason = format!("is `{version}`, but this kind is read as `{}`", T::API_VERSION);
            self.fail(Some(title), &join(at, "apiVersion"), reason);
            return;
        }
        let (mut unknown, mut track) = (Vec::new(), serde_path_to_error::Track::new());
        let mut note = |path: Path<'_>| unknown.push(formatted(&path));
        let reader = serde_ignored::Deserializer::new(value, &mut note);
        let read = T::deserialize(serde_path_to_error::Deserializer::new(reader, &mut track));
        let refused = self.refuse_unknown(Some(&title), at, &unknown);
        let mut object = match read {
            Ok(object) => wrap(object),
            Err(error) => {
                let path = track.path().to_string();
                let path = if path == "." { "" } else { &path };
                self.fail(Some(title), &join(at, path), format!("is wrong: {error}"));
                return;
            }
        };
        // A missing field may be the intended name of an unknown field.
        if refused {
            return;
        }
        check::fill_in(&mut object);
        let problems = check::check(&object, self.ranges);
        if problems.is_empty() {
            self.parsed.items.push(Item { object: Arc::new(object), document: self.document });
        }
        for (field, reason) in problems {
            self.fail(Some(title.clone()), &join(at, &field), reason);
        }
    }

    /// Reports unknown fields, unless they are ignored. Returns whether it reported any.
    fn refuse_unknown(&mut self, object: Option<&str>, at: &str, fields: &[String]) -> bool {
        if self.unknown == Unknown::Ignored {
            return false;
        }
        for field in fields {
            let reason = "is not a field of this kind".to_owned();
            self.fail(object.map(ToOwned::to_owned), &join(at, field), reason);
        }
        !fields.is_empty()
    }

    fn fail(&mut self, object: Option<String>, field: &str, reason: String) {
        let (file, document) = (Arc::clone(self.file), self.document);
        self.parsed.errors.push(ManifestError { file, document, object, field: field.to_owned(), reason });
    }
}

/// The fields of a list of objects.
const LIST_FIELDS: [&str; 4] = ["apiVersion", "kind", "metadata", "items"];

/// A path in the form of all messages.
fn formatted(path: &Path<'_>) -> String {
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", formatted(parent)),
        Path::Map { parent, key } => join(&formatted(parent), key),
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => {
            formatted(parent)
        }
    }
}

fn join(at: &str, field: &str) -> String {
    match (at, field) {
        ("", one) | (one, "") => one.to_owned(),
        (at, field) => format!("{at}.{field}"),
    }
}

/// `Kind namespace/name`, as far as the metadata has them.
fn title(kind: &str, value: &Value) -> String {
    let text =
        |key: &str| value.get("metadata").and_then(|metadata| metadata.get(key)).and_then(Value::as_str);
    let Some(name) = text("name") else { return kind.to_owned() };
    match kind {
        "Service" | "EndpointSlice" => format!("{kind} {}/{name}", text("namespace").unwrap_or("default")),
        _ => format!("{kind} {name}"),
    }
}
