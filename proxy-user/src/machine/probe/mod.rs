//! Which features of the socket plane this kernel and this machine have.
//!
//! In: the directories of cgroup v2 and of the bpffs. Out: a [`Probe`] with one [`Finding`] for each feature. Probing
//! changes nothing. Without the necessary privileges a feature is unknown.

use std::{fmt, path::Path};

use aya::{
    maps::MapType,
    programs::{ProgramError, ProgramType},
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};
use serde::Serialize;

use crate::{dataplane::Error, stale::sockets};

mod findings;

/// Whether the machine has a feature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "found", content = "because")]
pub enum Answer {
    /// The feature works.
    Yes,
    /// The feature is missing, with the reason if there is one.
    No(String),
    /// The test failed, with the reason.
    Unknown(String),
}

/// The result for one feature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its name, for users.
    pub feature: String,
    /// The first Linux version with the feature; empty if the version does not matter.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub since: &'static str,
    /// Whether the socket plane cannot run without it.
    pub needed: bool,
    /// A sentence for users: its use, or for an optional feature the effect of its absence.
    pub purpose: &'static str,
    /// Serialized as `found` and `because`.
    #[serde(flatten)]
    pub answer: Answer,
}

impl Finding {
    /// Whether the feature certainly works.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.answer == Answer::Yes
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { feature, since, purpose, answer, .. } = self;
        let mut notes = Vec::new();
        if !since.is_empty() {
            notes.push(format!("since Linux {since}"));
        }
        let word = match answer {
            Answer::Yes => return write!(f, "{feature}: yes"),
            Answer::No(why) => {
                notes.extend((!why.is_empty()).then(|| why.clone()));
                "no"
            }
            Answer::Unknown(why) => {
                notes.push(why.clone());
                "not known"
            }
        };
        let notes = if notes.is_empty() { String::new() } else { format!(" ({})", notes.join("; ")) };
        write!(f, "{feature}: {word}{notes}. {purpose}")
    }
}

/// All findings, and the optional features that the loader uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// As in `uname -r`.
    pub kernel: String,
    /// In the order of the tests.
    pub findings: Vec<Finding>,
    /// Whether programs can set the error of a system call (`bpf_set_retval`).
    #[serde(skip)]
    pub set_retval: bool,
    /// Whether user space can read the cookie of a network namespace (`SO_NETNS_COOKIE`).
    #[serde(skip)]
    pub namespace_cookie: bool,
    /// Whether weir can close sockets of other processes (`SOCK_DESTROY`).
    #[serde(skip)]
    pub socket_destroy: bool,
}

impl Probe {
    /// Tests this kernel, and the directories that the socket plane uses.
    #[must_use]
    pub fn of(cgroup_root: &Path, bpf_root: &Path) -> Self {
        let permission = findings::permission();
        let allowed = permission == Answer::Yes;
        let mut findings = vec![Finding {
            feature: "permission to load programs".to_owned(),
            since: "",
            needed: true,
            purpose: "Loading takes CAP_BPF and CAP_NET_ADMIN; CAP_SYS_ADMIN can replace CAP_BPF.",
            answer: permission,
        }];
        findings.extend(programs(allowed));
        findings.extend(findings::directories(cgroup_root, bpf_root));
        let [set_retval, namespace_cookie, socket_destroy] = optional(allowed);
        let mut there = |finding: Finding| {
            let there = finding.is_there();
            findings.push(finding);
            there
        };
        Self {
            kernel: findings::release(),
            set_retval: there(set_retval),
            namespace_cookie: there(namespace_cookie),
            socket_destroy: there(socket_destroy),
            findings,
        }
    }

    /// Needed features that are missing or unknown.
    pub fn lacking(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.needed && !finding.is_there())
    }

    /// Whether the socket plane can run.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.lacking().next().is_none()
    }

    /// Why the socket plane cannot run: the missing features, or the unknown ones if none is missing.
    #[must_use]
    pub fn reasons(&self) -> Vec<String> {
        let (known, unknown): (Vec<_>, Vec<_>) =
            self.lacking().partition(|finding| matches!(finding.answer, Answer::No(_)));
        let reasons = if known.is_empty() { unknown } else { known };
        reasons.into_iter().map(ToString::to_string).collect()
    }

    /// Logs one line if all features are there, else a warning for each missing optional feature. Missing needed
    /// features are logged by the caller, because the mode decides what they mean.
    pub fn log(&self) {
        let optional = || self.findings.iter().filter(|finding| !finding.needed && !finding.is_there());
        if !self.is_usable() {
            return;
        }
        if optional().next().is_none() {
            tracing::info!(
                kernel = self.kernel,
                "this kernel has every feature that the socket plane can use"
            );
        }
        for finding in optional() {
            tracing::warn!(kernel = self.kernel, "{finding}");
        }
    }

    /// The probe of a test machine without these features.
    #[cfg(test)]
    pub(crate) fn fixture(lacking: &[(&str, bool)]) -> Self {
        let finding = |(feature, needed): &(&str, bool)| Finding {
            feature: (*feature).to_owned(),
            since: "9.9",
            needed: *needed,
            purpose: "A test asks for it.",
            answer: Answer::No(String::new()),
        };
        Self {
            kernel: "9.8.7".to_owned(),
            findings: lacking.iter().map(finding).collect(),
            set_retval: true,
            namespace_cookie: true,
            socket_destroy: true,
        }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.findings.iter().try_for_each(|finding| writeln!(f, "{finding}"))
    }
}

/// Features that the programs need.
fn programs(allowed: bool) -> Vec<Finding> {
    use BpfHelper as Helper;
    let needed = |feature: &str, since, purpose, ask: &dyn Fn() -> Answer| Finding {
        feature: feature.to_owned(),
        since,
        needed: true,
        purpose,
        answer: if allowed { ask() } else { not_allowed() },
    };
    let address = ProgramType::CgroupSockAddr;
    vec![
        needed("cgroup sock_addr programs", "4.17", "They translate Services to backends.", &|| {
            answer_of(is_program_supported(address))
        }),
        needed(
            "cgroup sock programs",
            "4.17",
            "They detect pods that listen on a Service's own address.",
            &|| answer_of(is_program_supported(ProgramType::CgroupSock)),
        ),
        needed(
            "socket storage maps",
            "5.3",
            "They store the Service that an unconnected socket sends to.",
            &|| {
                both(answer_of(is_map_supported(MapType::SkStorage)), || {
                    helpers(address, &[Helper::BPF_FUNC_sk_storage_get])
                })
            },
        ),
        needed(
            "programs at the release of sockets",
            "5.9",
            "They delete the entry of a closed socket.",
            &|| helpers(ProgramType::CgroupSock, &[Helper::BPF_FUNC_get_socket_cookie]),
        ),
        needed(
            "socket look-up from programs",
            "5.0",
            "It finds sockets of this node that listen on the address themselves.",
            &|| {
                let them = [
                    Helper::BPF_FUNC_sk_lookup_tcp,
                    Helper::BPF_FUNC_sk_lookup_udp,
                    Helper::BPF_FUNC_sk_release,
                ];
                helpers(address, &them)
            },
        ),
        needed("network namespaces seen by programs", "5.7", "They distinguish pods from the host.", &|| {
            both(helpers(address, &[Helper::BPF_FUNC_get_netns_cookie]), || {
                helpers(ProgramType::CgroupSock, &[Helper::BPF_FUNC_get_netns_cookie])
            })
        }),
        needed("cgroups seen by programs", "5.7", "They identify pods that opted out.", &|| {
            helpers(address, &[Helper::BPF_FUNC_get_current_ancestor_cgroup_id])
        }),
        needed(
            "links of cgroups",
            "5.7",
            "They keep programs attached while the agent is not running.",
            &findings::links,
        ),
    ]
}

/// Optional features of the socket plane, in the order of the fields of [`Probe`].
fn optional(allowed: bool) -> [Finding; 3] {
    let set_retval = [BpfHelper::BPF_FUNC_set_retval];
    let optional = |feature: &str, since, purpose, answer| Finding {
        feature: feature.to_owned(),
        since,
        needed: false,
        purpose,
        answer,
    };
    let if_allowed = |ask: &dyn Fn() -> Answer| if allowed { ask() } else { not_allowed() };
    [
        optional(
            "errors chosen by programs (bpf_set_retval)",
            "6.1",
            "Without it nftables refuses connections in place of the socket plane.",
            if_allowed(&|| {
                both(helpers(ProgramType::CgroupSockAddr, &set_retval), || {
                    helpers(ProgramType::CgroupSock, &set_retval)
                })
            }),
        ),
        optional(
            "network namespace cookies (SO_NETNS_COOKIE)",
            "5.14",
            "Without it the agent has to run in the initial network namespace.",
            findings::namespace_cookie(),
        ),
        optional(
            "closing of sockets (CONFIG_INET_DIAG_DESTROY)",
            "5.10",
            "Without it TCP sockets of a removed backend stay open, and UDP sockets stay connected to it, until the application closes them.",
            if_allowed(&closing),
        ),
    ]
}

/// Whether weir can close sockets of removed backends.
fn closing() -> Answer {
    match sockets::supported() {
        Ok(()) => Answer::Yes,
        Err(Error::Kernel(missing)) => Answer::No(missing),
        Err(error) => Answer::Unknown(findings::chain(&error)),
    }
}

/// Whether programs of a kind can call all these helpers.
fn helpers(kind: ProgramType, helpers: &[BpfHelper]) -> Answer {
    let missing = helpers.iter().map(|helper| answer_of(is_helper_supported(kind, *helper)));
    missing.fold(Answer::Yes, |answer, next| both(answer, || next))
}

/// The first answer that is not `Yes`.
fn both(first: Answer, second: impl FnOnce() -> Answer) -> Answer {
    if first == Answer::Yes { second() } else { first }
}

fn answer_of(result: Result<bool, impl Into<ProgramError>>) -> Answer {
    match result {
        Ok(true) => Answer::Yes,
        Ok(false) => Answer::No(String::new()),
        Err(error) => Answer::Unknown(findings::chain(&error.into())),
    }
}

fn not_allowed() -> Answer {
    Answer::Unknown("testing for it needs the permission to load programs".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_shows_a_feature_its_answer_and_its_purpose() {
        let finding = |since, answer| Finding {
            feature: "bpf_set_retval".to_owned(),
            since,
            needed: false,
            purpose: "Without it nftables refuses.",
            answer,
        };
        for (finding, line) in [
            (finding("5.18", Answer::Yes), "bpf_set_retval: yes"),
            (
                finding("5.18", Answer::No(String::new())),
                "bpf_set_retval: no (since Linux 5.18). Without it nftables refuses.",
            ),
            (
                finding("", Answer::No("it is a file".to_owned())),
                "bpf_set_retval: no (it is a file). Without it nftables refuses.",
            ),
            (finding("", Answer::No(String::new())), "bpf_set_retval: no. Without it nftables refuses."),
            (
                finding("5.18", Answer::Unknown("EPERM".to_owned())),
                "bpf_set_retval: not known (since Linux 5.18; EPERM). Without it nftables refuses.",
            ),
        ] {
            assert_eq!(finding.to_string(), line);
        }
    }

    #[test]
    fn only_needed_features_are_reasons_and_unknown_ones_only_if_none_is_missing() {
        let mut probe = Probe::fixture(&[("a", true), ("b", false), ("c", true)]);
        assert_eq!(probe.lacking().count(), 2);
        probe.findings[2].answer = Answer::Unknown("EPERM".to_owned());
        assert_eq!(probe.lacking().count(), 2);
        assert_eq!(probe.reasons(), ["a: no (since Linux 9.9). A test asks for it."]);
        probe.findings[0].answer = Answer::Yes;
        assert_eq!(probe.reasons(), ["c: not known (since Linux 9.9; EPERM). A test asks for it."]);
        probe.findings[2].answer = Answer::Yes;
        assert_eq!(probe.reasons(), [""; 0]);
    }

    #[test]
    fn probing_never_fails_whatever_the_directories_are() {
        for directory in ["/nowhere/at/all", "relative", "", "/proc/self/status", "/proc"] {
            let probe = Probe::of(Path::new(directory), Path::new(directory));
            let directories: Vec<_> = probe.lacking().map(|finding| finding.feature.as_str()).collect();
            let last_two = &directories[directories.len() - 2..];
            assert_eq!(last_two, [format!("cgroup v2 at {directory}"), format!("bpffs at {directory}")]);
        }
    }
}
