//! Which object of the cluster a name stands for.
//!
//! In: a name in lower case and the cluster's domain. Out: a [`Question`]. Pure: it parses the name and looks nothing
//! up.

use std::net::IpAddr;

use hickory_proto::rr::{Name, RecordType};
use ipnet::IpNet;
use smallvec::SmallVec;

use crate::model::Protocol;

/// The most labels of a known name below the domain, as in `_port._protocol.service.namespace.svc`.
const MOST_LABELS: usize = 5;

/// A query, with the limits of its answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Query<'a> {
    /// The name, in the case in which the client sent it.
    pub(crate) name: &'a Name,
    /// The name in lower case.
    pub(crate) lower: &'a Name,
    pub(crate) kind: RecordType,
    /// A running number, by which each endpoint is the first in turn.
    pub(crate) rotation: u32,
    /// The most records that the reply can hold.
    pub(crate) most: usize,
}

/// The object that a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Question<'a> {
    /// The cluster's domain itself.
    Domain,
    /// `dns-version`, which has the version of the DNS specification.
    Version,
    /// `ns.dns`, the target of the domain's NS record.
    Server,
    /// `svc`, `pod` or `dns`, which have no records, but names below them.
    Branch,
    /// `namespace.svc` or `namespace.pod`.
    Namespace(&'a str),
    /// A Service, or a part of it.
    Service {
        namespace: &'a str,
        name: &'a str,
        /// Which records of the Service.
        part: Part<'a>,
    },
    /// A pod by its address.
    Pod(IpAddr),
    /// A name of the domain that no object can have.
    Nothing,
    /// The address in a name below `in-addr.arpa` or `ip6.arpa`.
    Reverse(IpAddr),
    /// A name outside the cluster's domain.
    Elsewhere,
}

/// The part of a Service that a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part<'a> {
    Whole,
    /// The endpoint with this label.
    Endpoint(&'a str),
    /// The branch with the ports of this protocol, in lower case.
    Protocol(&'a str),
    Port {
        name: &'a str,
        /// In lower case.
        protocol: &'a str,
    },
}

impl Part<'_> {
    /// Whether a port with this name and protocol belongs to the part.
    pub(super) fn selects(self, name: &str, protocol: Protocol) -> bool {
        match self {
            Self::Port { name: wanted, protocol: of } => {
                name.eq_ignore_ascii_case(wanted) && protocol.to_string().eq_ignore_ascii_case(of)
            }
            // A port without a name has no record below its protocol.
            Self::Protocol(of) => !name.is_empty() && protocol.to_string().eq_ignore_ascii_case(of),
            Self::Whole | Self::Endpoint(_) => true,
        }
    }
}

impl<'a> Question<'a> {
    /// Parses a name. `domain` and `name` are in lower case.
    #[must_use]
    pub(crate) fn read(name: &'a Name, domain: &Name) -> Self {
        let Some(below) = below(name, domain) else {
            return reverse(name).map_or(Self::Elsewhere, Self::Reverse);
        };
        if below > MOST_LABELS {
            return Self::Nothing;
        }
        let labels = name.iter().take(below).map(std::str::from_utf8);
        let Ok(labels) = labels.collect::<Result<SmallVec<[&str; MOST_LABELS]>, _>>() else {
            return Self::Nothing;
        };
        let service = |namespace, name, part| Self::Service { namespace, name, part };
        match *labels.as_slice() {
            [] => Self::Domain,
            ["dns-version"] => Self::Version,
            ["svc" | "pod" | "dns"] => Self::Branch,
            ["ns", "dns"] => Self::Server,
            [namespace, "svc" | "pod"] => Self::Namespace(namespace),
            [name, namespace, "svc"] => service(namespace, name, Part::Whole),
            [label, name, namespace, "svc"] => {
                let part = label.strip_prefix('_').map_or(Part::Endpoint(label), Part::Protocol);
                service(namespace, name, part)
            }
            [port, protocol, name, namespace, "svc"] => {
                let port = port.strip_prefix('_').zip(protocol.strip_prefix('_'));
                port.map_or(Self::Nothing, |(port, protocol)| {
                    service(namespace, name, Part::Port { name: port, protocol })
                })
            }
            [address, _, "pod"] => pod(address).map_or(Self::Nothing, Self::Pod),
            _ => Self::Nothing,
        }
    }
}

/// How many labels a name has below the domain; `None` if it is outside the domain.
pub(super) fn below(name: &Name, domain: &Name) -> Option<usize> {
    let below = usize::from(name.num_labels()).checked_sub(usize::from(domain.num_labels()))?;
    name.iter().skip(below).eq(domain.iter()).then_some(below)
}

/// The address in a label such as `10-0-0-1` or `fd00--1`.
fn pod(label: &str) -> Option<IpAddr> {
    let v4 = label.matches('-').count() == 3 && !label.contains("--");
    label.replace('-', if v4 { "." } else { ":" }).parse().ok()
}

fn reverse(name: &Name) -> Option<IpAddr> {
    // A quick check for most names, because `parse_arpa_name` allocates.
    if name.iter().next_back().is_none_or(|label| label != b"arpa") {
        return None;
    }
    match name.parse_arpa_name().ok()? {
        IpNet::V4(net) if net.prefix_len() == 32 => Some(net.addr().into()),
        IpNet::V6(net) if net.prefix_len() == 128 => Some(net.addr().into()),
        IpNet::V4(_) | IpNet::V6(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain() -> Name {
        Name::from_ascii("cluster.local.").unwrap()
    }

    fn with<T>(name: &str, then: impl FnOnce(Question<'_>) -> T) -> T {
        then(Question::read(&Name::from_ascii(name).unwrap(), &domain()))
    }

    fn service<'a>(part: Part<'a>) -> Question<'a> {
        Question::Service { namespace: "ns", name: "web", part }
    }

    #[test]
    fn names_of_the_specification() {
        let cases = [
            ("cluster.local.", Question::Domain),
            ("dns-version.cluster.local.", Question::Version),
            ("ns.dns.cluster.local.", Question::Server),
            ("svc.cluster.local.", Question::Branch),
            ("ns.svc.cluster.local.", Question::Namespace("ns")),
            ("web.ns.svc.cluster.local.", service(Part::Whole)),
            ("db-0.web.ns.svc.cluster.local.", service(Part::Endpoint("db-0"))),
            ("_tcp.web.ns.svc.cluster.local.", service(Part::Protocol("tcp"))),
            ("_h._tcp.web.ns.svc.cluster.local.", service(Part::Port { name: "h", protocol: "tcp" })),
            ("10-0-0-1.ns.pod.cluster.local.", Question::Pod("10.0.0.1".parse().unwrap())),
            ("fd00--1.ns.pod.cluster.local.", Question::Pod("fd00::1".parse().unwrap())),
            ("4.3.2.1.in-addr.arpa.", Question::Reverse("1.2.3.4".parse().unwrap())),
            (
                "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.",
                Question::Reverse("fd00::1".parse().unwrap()),
            ),
        ];
        for (name, wanted) in cases {
            with(name, |question| assert_eq!(question, wanted, "{name}"));
        }
    }

    #[test]
    fn names_of_the_domain_that_no_object_can_have() {
        for name in [
            "web.cluster.local.",
            "h.tcp.web.ns.svc.cluster.local.",
            "_h.tcp.web.ns.svc.cluster.local.",
            "a._h._tcp.web.ns.svc.cluster.local.",
            "web.ns.pod.cluster.local.",
            "10-0-0.ns.pod.cluster.local.",
            "x.10-0-0-1.ns.pod.cluster.local.",
            "1.dns-version.cluster.local.",
        ] {
            with(name, |question| assert_eq!(question, Question::Nothing, "{name}"));
        }
    }

    #[test]
    fn labels_that_are_not_utf8() {
        let labels: [&[u8]; 5] = [b"\xff", b"ns", b"svc", b"cluster", b"local"];
        let name = Name::from_labels(labels).unwrap();
        assert_eq!(Question::read(&name, &domain()), Question::Nothing);
    }

    #[test]
    fn names_outside_the_domain() {
        for name in [
            ".",
            "local.",
            "example.com.",
            "xcluster.local.",
            "cluster.local.example.com.",
            "2.1.in-addr.arpa.",
            "x.3.2.1.in-addr.arpa.",
            "5.4.3.2.1.in-addr.arpa.",
        ] {
            with(name, |question| assert_eq!(question, Question::Elsewhere, "{name}"));
        }
    }
}
