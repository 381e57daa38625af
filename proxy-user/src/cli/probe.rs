//! `weir probe`: what this machine has for the eBPF data plane, for people and for programs.
//!
//! In: a [`Probe`]. Out: a table, JSON or YAML.

use serde::Serialize;

use super::Output;
use crate::{
    dns::TunError,
    machine::probe::{Answer, Finding, Probe},
};

/// What is printed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProbeView {
    /// Whether there can be an eBPF plane.
    usable: bool,
    #[serde(flatten)]
    probe: Probe,
}

impl ProbeView {
    /// The view of a probe.
    #[must_use]
    pub fn new(probe: Probe) -> Self {
        let usable = probe.is_usable();
        Self { usable, probe }
    }

    /// Adds whether names can be answered, which is no question of the eBPF plane.
    #[must_use]
    pub fn with_names(mut self, device: Result<(), TunError>) -> Self {
        self.probe.findings.push(Finding {
            feature: "TUN devices".to_owned(),
            since: "",
            needed: false,
            purpose: "With `--dns` names are answered on the node as long as weir has one; without it they are left to the cluster's \
                      DNS Service.",
            answer: match device {
                Ok(()) => Answer::Yes,
                Err(error) => Answer::No(format!("{:#}", anyhow::Error::from(error))),
            },
        });
        self
    }

    /// The text to print, with a newline at its end. Nothing in it is cut, whatever the terminal's width.
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
            0 => format!("Linux {kernel}: the eBPF data plane can be used."),
            1 => {
                format!(
                    "Linux {kernel}: the eBPF data plane cannot be used, because a needed feature is missing."
                )
            }
            count => format!(
                "Linux {kernel}: the eBPF data plane cannot be used, because {count} needed features are missing."
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

/// What follows where a feature was not found.
fn note(finding: &Finding) -> Option<String> {
    let (Answer::No(why) | Answer::Unknown(why)) = &finding.answer else { return None };
    let why = if why.is_empty() { String::new() } else { format!("{why}. ") };
    Some(format!("\n{}: {why}{}\n", finding.feature, finding.purpose))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_as_kubectls_and_ends_with_what_follows_from_it() {
        let text =
            |lacking: &[(&str, bool)]| ProbeView::new(Probe::fixture(lacking)).render(Output::Table).unwrap();
        insta::assert_snapshot!(text(&[("bpffs at /b", true), ("bpf_set_retval", false)]), @r"
        FEATURE          SINCE   NEEDED   FOUND
        bpffs at /b      9.9     yes      no
        bpf_set_retval   9.9     no       no

        bpffs at /b: A test asks for it.

        bpf_set_retval: A test asks for it.

        Linux 9.8.7: the eBPF data plane cannot be used, because a needed feature is missing.
        ");
        let last = |lacking: &[(&str, bool)]| text(lacking).lines().last().unwrap().to_owned();
        assert_eq!(last(&[("bpf_set_retval", false)]), "Linux 9.8.7: the eBPF data plane can be used.");
    }

    #[test]
    fn programs_get_the_same_in_json() {
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
