//! `weir probe`: what this machine has for the eBPF data plane, for people and for programs.
//!
//! In: a [`Probe`]. Out: a table, JSON or YAML.

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use super::Output;
use crate::{
    dataplane::probe::{Answer, Finding, Probe},
    dns::TunError,
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

    /// The text to print, with a newline at its end. A table is at most `width` columns wide, or as wide as the
    /// terminal it goes to.
    ///
    /// # Errors
    ///
    /// When JSON or YAML cannot be made, which does not happen for this type.
    pub fn render(&self, output: Output, width: Option<u16>) -> anyhow::Result<String> {
        Ok(match output {
            Output::Table => {
                let table = self.table(width);
                let lines = table.lines().map(|line| format!("{}\n", line.trim_end()));
                lines.chain([format!("{}\n", self.conclusion())]).collect()
            }
            Output::Json => format!("{}\n", serde_json::to_string_pretty(self)?),
            Output::Yaml => serde_yaml_ng::to_string(self)?,
        })
    }

    fn conclusion(&self) -> String {
        let kernel = &self.probe.kernel;
        match self.probe.lacking().count() {
            0 => format!("Linux {kernel}: the eBPF data plane can be used."),
            1 => format!("Linux {kernel}: the eBPF data plane cannot be used, for want of a needed feature."),
            count => {
                format!(
                    "Linux {kernel}: the eBPF data plane cannot be used, for want of {count} needed features."
                )
            }
        }
    }

    fn table(&self, width: Option<u16>) -> Table {
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
        super::fit(&mut table, width);
        table.set_header(["Feature", "Since", "Needed", "Found", "Purpose"]);
        for finding in &self.probe.findings {
            table.add_row(cells(finding));
        }
        table
    }
}

fn cells(finding: &Finding) -> [String; 5] {
    let Finding { feature, since, needed, purpose, answer } = finding;
    let found = match answer {
        Answer::Yes => "yes".to_owned(),
        Answer::No(why) if why.is_empty() => "no".to_owned(),
        Answer::No(why) => format!("no: {why}"),
        Answer::Unknown(why) => format!("not known: {why}"),
    };
    let needed = if *needed { "yes" } else { "no" };
    [feature.clone(), (*since).to_owned(), needed.to_owned(), found, (*purpose).to_owned()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_ends_with_what_follows_from_it() {
        let text = |lacking: &[(&str, bool)]| {
            ProbeView::new(Probe::fixture(lacking)).render(Output::Table, Some(80)).unwrap()
        };
        insta::assert_snapshot!(text(&[("bpffs at /b", true), ("bpf_set_retval", false)]), @r"
        ───────────────────────────────────────────────────────────────
         Feature          Since   Needed   Found   Purpose
        ═══════════════════════════════════════════════════════════════
         bpffs at /b      9.9     yes      no      A test asks for it.
        ───────────────────────────────────────────────────────────────
         bpf_set_retval   9.9     no       no      A test asks for it.
        ───────────────────────────────────────────────────────────────
        Linux 9.8.7: the eBPF data plane cannot be used, for want of a needed feature.
        ");
        let last = |lacking: &[(&str, bool)]| text(lacking).lines().last().unwrap().to_owned();
        assert_eq!(last(&[("bpf_set_retval", false)]), "Linux 9.8.7: the eBPF data plane can be used.");
    }

    #[test]
    fn programs_get_the_same_in_json() {
        let view = ProbeView::new(Probe::fixture(&[("bpffs at /b", true)]));
        insta::assert_snapshot!(view.render(Output::Json, None).unwrap(), @r#"
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
