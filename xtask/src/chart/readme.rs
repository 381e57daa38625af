//! The chart's README: its values, with the comments beside them.
//!
//! In: `README.md.in` and `values.yaml`. Out: `README.md`.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::rendered::CHART;
use crate::machine::Machine;

/// The generated file.
pub(crate) const README: &str = "charts/weir/README.md";

/// The README, from `Chart.yaml` and the comments in `values.yaml`.
///
/// # Errors
///
/// When a value has no comment, or a file is no YAML.
pub(crate) fn readme(machine: &Machine) -> Result<String> {
    let read = |name: &str| {
        let file = machine.workspace.join(CHART).join(name);
        fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
    };
    let values = described(&read("values.yaml")?)?;
    let mut text = read("README.md.in")?;
    text.push_str("\n| value | default | meaning |\n| --- | --- | --- |\n");
    for Described { path, default, comment } in values {
        text.push_str(&format!("| `{path}` | `{default}` | {comment} |\n"));
    }
    Ok(text)
}

/// A value of the chart.
#[derive(Debug, PartialEq, Eq)]
struct Described {
    path: String,
    default: String,
    comment: String,
}

/// The values that have a comment beginning with `# --`, in the order of the file.
fn described(text: &str) -> Result<Vec<Described>> {
    let values: Value = serde_yaml_ng::from_str(text).context("values.yaml")?;
    let mut found = Vec::new();
    let mut comment: Option<String> = None;
    // The keys above the line, each with its indentation.
    let mut above: Vec<(usize, &str)> = Vec::new();
    // Lists and maps below a value with a comment are its default, not values of their own.
    let mut inside: Option<usize> = None;
    for line in text.lines() {
        let indentation = line.len() - line.trim_start().len();
        if let Some(words) = line.trim_start().strip_prefix('#') {
            let words = words.trim();
            comment = match (comment, words.strip_prefix("--")) {
                (_, Some(first)) => Some(first.trim().to_owned()),
                (Some(before), None) => Some(format!("{before} {words}")),
                (None, None) => None,
            };
            continue;
        }
        let Some((key, _)) = line.trim_start().split_once(':').filter(|(key, _)| !key.starts_with('-'))
        else {
            continue;
        };
        if inside.is_some_and(|outer| indentation > outer) {
            continue;
        }
        inside = None;
        above.retain(|(outer, _)| *outer < indentation);
        above.push((indentation, key));
        let path = above.iter().map(|(_, key)| *key).collect::<Vec<_>>();
        let value = path.iter().fold(&values, |value, key| &value[*key]);
        match comment.take() {
            Some(comment) => {
                inside = Some(indentation);
                found.push(Described { path: path.join("."), default: value.to_string(), comment });
            }
            None => ensure!(value.is_object(), "values.yaml: {} has no comment", path.join(".")),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_described_with_its_path_and_default() {
        let text = "image:\n  # -- Where it\n  # is.\n  name: weir\n# -- All of it.\nresources:\n  requests:\n    cpu: 1\n\
                    # -- Taints.\ntaints:\n  - operator: Exists\n";
        let one = |path: &str, default: &str, comment: &str| Described {
            path: path.to_owned(),
            default: default.to_owned(),
            comment: comment.to_owned(),
        };
        assert_eq!(
            described(text).unwrap(),
            [
                one("image.name", r#""weir""#, "Where it is."),
                one("resources", r#"{"requests":{"cpu":1}}"#, "All of it."),
                one("taints", r#"[{"operator":"Exists"}]"#, "Taints."),
            ]
        );
    }

    #[test]
    fn a_value_without_a_description_is_named() {
        let error = described("a:\n  b: 1\n").unwrap_err().to_string();
        assert_eq!(error, "values.yaml: a.b has no comment");
    }
}
