//! `weir probe`: which features of the socket plane this machine has, as a table or as JSON and YAML.
//!
//! In: a [`Probe`]. Out: the text to print.

use serde::Serialize;

use super::Output;
use crate::{
    dns::TunError,
    machine::probe::{Answer, Finding, Probe},
};

/// The findings to print.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProbeView {
    /// Whether the socket plane can run.
    usable: bool,
    #[serde(flatten)]
    probe: Probe,
}

impl ProbeView {
    /// The view of `probe`.
    #[must_use]
    pub fn new(probe: Probe) -> Self {
        let usable = probe.is_usable();
        Self { usable, probe }
    }

    /// Adds whether weir can answer DNS here. The socket plane does not need that.
    #[must_use]
    pub fn with_names(mut self, device: Result<(), TunError>) -> Self {
        self.probe.findings.push(Finding {
            feature: "TUN devices".to_owned(),
            since: "",
            needed: false,
            purpose: "With `--dns`, weir answers DNS on the node while it has a TUN device. Without one, the cluster's DNS \
                      Service answers.",
            answer: match device {
                Ok(()) => Answer::Yes,
                Err(error) => Answer::No(format!("{:#}", anyhow::Error::from(error))),
            },
        });
        self
    }

    /// The text to print, with a newline at its end. Nothing is truncated to the terminal's width.
    ///
    /// # Errors
    ///
    /// When JSON or YAML cannot be made, which does not happen for this type.
    pub fn render(&self, output: Output) -> anyhow::Result<String> {
        Ok(match output {
            Output::Table => {
                let notes = self.probe.findings.iter().filter_map(note);
                let lines = super::columns(
                    &["FEATURE", "SINCE", "NEEDED", "FOUND"],
                    self.probe.findings.iter().map(cells),
                );
                [lines].into_iter().chain(notes).chain([format!("\n{}\n", self.conclusion())]).collect()
            }
            Output::Json => format!("{}\n", serde_json::to_string_pretty(self)?),
            Output::Yaml => serde_yaml_ng::to_string(self)?,
        })
    }

    fn conclusion(&self) -> String {
        let kernel = &self.probe.kernel;
        match self.probe.lacking().count() {
            0 => format!("Linux {kernel}: the socket plane (eBPF) can be used."),
            1 => {
                format!(
                    "Linux {kernel}: the socket plane (eBPF) cannot be used, because a needed feature is missing."
                )
            }
            count => format!(
                "Linux {kernel}: the socket plane (eBPF) cannot be used, because {count} needed features are missing."
            ),
        }
    }
}

fn cells(finding: &Finding) -> Vec<String> {
    let Finding { feature, since, needed, answer, .. } = finding;
    let since = if since.is_empty() { "<none>" } else { since };
    let needed = if *needed { "yes" } else { "no" };
    let found = match answer {
        Answer::Yes => "yes",
        Answer::No(_) => "no",
        Answer::Unknown(_) => "unknown",
    };
    [feature, since, needed, found].map(str::to_owned).to_vec()
}

/// The paragraph about a feature that was not found: the cause, and the consequence.
fn note(finding: &Finding) -> Option<String> {
    let (Answer::No(why) | Answer::Unknown(why)) = &finding.answer else { return None };
    let why = if why.is_empty() { String::new() } else { format!("{why}. ") };
    Some(format!("\n{}: {why}{}\n", finding.feature, finding.purpose))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_kubectls_form_and_ends_with_the_conclusion() {
        let text =
            |lacking: &[(&str, bool)]| ProbeView::new(Probe::fixture(lacking)).render(Output::Table).unwrap();
        insta::assert_snapshot!(text(&[("bpffs at /b", true), ("bpf_set_retval", false)]), @r"
        FEATURE          SINCE   NEEDED   FOUND
        bpffs at /b      9.9     yes      no
        bpf_set_retval   9.9     no       no

        bpffs at /b: A test asks for it.

        bpf_set_retval: A test asks for it.

        Linux 9.8.7: the socket plane (eBPF) cannot be used, because a needed feature is missing.
        ");
        let last = |lacking: &[(&str, bool)]| text(lacking).lines().last().unwrap().to_owned();
        assert_eq!(last(&[("bpf_set_retval", false)]), "Linux 9.8.7: the socket plane (eBPF) can be used.");
    }

    #[test]
    fn json_has_the_same_findings_as_the_table() {
        let view = ProbeView::new(Probe::fixture(&[("bpffs at /b", true)]));
        insta::assert_snapshot!(view.render(Output::Json).unwrap(), @r#"
        {
          "usable": false,
          "kernel": "9.8.7",
          "findings": [
            {
              "feature": "bpffs at /b",
              "since": "9.9",
              "needed": true,
              "purpose": "A test asks for it.",
              "found": "no",
              "because": ""
            }
          ]
        }
        "#);
    }
}
