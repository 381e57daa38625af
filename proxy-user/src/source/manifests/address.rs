//! The address families and ClusterIPs that a Service requests.
//!
//! In: a Service's spec and the configured ranges. Out: its families, primary first, and the addresses in its
//! spec. The rules are those by which the API server completes spec.ipFamilies and spec.ipFamilyPolicy.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::ServiceSpec;

use crate::model::Family;

/// The ranges that ClusterIPs are allocated from.
#[derive(Clone, Debug)]
pub(super) struct Ranges(Vec<IpNet>);

impl Ranges {
    pub(super) fn new(ranges: &[IpNet]) -> Self {
        Self(ranges.iter().map(IpNet::trunc).collect())
    }

    /// The ranges of one family.
    pub(super) fn of(&self, family: Family) -> impl Iterator<Item = IpNet> {
        self.0.iter().copied().filter(move |range| Family::of(range.addr()) == family)
    }

    fn has(&self, family: Family) -> bool {
        self.of(family).next().is_some()
    }

    /// The family of Services that do not name one: IPv4 if it has a range.
    fn default_family(&self) -> Family {
        if self.has(Family::V6) && !self.has(Family::V4) { Family::V6 } else { Family::V4 }
    }
}

/// A field and the problem with it.
pub(super) type Problem = (String, String);

/// Whether the Service has ClusterIPs: it is neither headless nor an ExternalName (W4).
pub(super) fn has_cluster_ips(spec: &ServiceSpec) -> bool {
    spec.type_.as_deref() != Some("ExternalName") && !is_headless(spec)
}

/// Whether the Service's clusterIP is None.
pub(super) fn is_headless(spec: &ServiceSpec) -> bool {
    let first = spec.cluster_ips.iter().flatten().next().or(spec.cluster_ip.as_ref());
    first.is_some_and(|ip| ip == "None")
}

/// The ClusterIPs in the spec, in order.
pub(super) fn explicit_ips(spec: &ServiceSpec) -> Vec<IpAddr> {
    let listed = spec.cluster_ips.iter().flatten();
    let single = spec.cluster_ip.iter().filter(|_| spec.cluster_ips.as_ref().is_none_or(Vec::is_empty));
    listed.chain(single).filter_map(|ip| ip.parse().ok()).collect()
}

/// The families of the Service, primary first.
///
/// # Errors
///
/// When its fields contradict each other, or a requested family has neither an address nor a range.
pub(super) fn families(spec: &ServiceSpec, ranges: &Ranges) -> Result<Vec<Family>, Problem> {
    let explicit: Vec<_> = explicit_ips(spec).into_iter().map(Family::of).collect();
    let listed: Vec<_> = spec.ip_families.iter().flatten().filter_map(|name| family_of(name)).collect();
    let policy = spec.ip_family_policy.as_deref();
    let two_named = explicit.len().max(listed.len()) > 1;
    if two_named && policy == Some("SingleStack") {
        let reason = "is SingleStack, but two families or two ClusterIPs are listed";
        return Err(("spec.ipFamilyPolicy".to_owned(), reason.to_owned()));
    }
    for (index, (listed, explicit)) in listed.iter().zip(&explicit).enumerate() {
        if listed != explicit {
            let reason = format!("is {listed}, but the ClusterIP with this index is {explicit}");
            return Err((format!("spec.ipFamilies[{index}]"), reason));
        }
    }
    let named = if explicit.len() > listed.len() { &explicit } else { &listed };
    let first = named.first().copied().unwrap_or_else(|| ranges.default_family());
    let second = if first == Family::V4 { Family::V6 } else { Family::V4 };
    let mut families = vec![first];
    if two_named
        || policy == Some("RequireDualStack")
        || policy == Some("PreferDualStack") && ranges.has(second)
    {
        families.push(second);
    }
    for (index, family) in families.iter().enumerate().skip(explicit.len()) {
        if !ranges.has(*family) {
            let field = match index {
                0 => "spec.clusterIP",
                _ if listed.len() > 1 => "spec.ipFamilies",
                _ => "spec.ipFamilyPolicy",
            };
            return Err((
                field.to_owned(),
                format!("asks for {family}, but no {family} range is configured"),
            ));
        }
    }
    Ok(families)
}

/// The family with this name in the API.
pub(super) fn family_of(name: &str) -> Option<Family> {
    Family::ALL.into_iter().find(|family| family.to_string() == name)
}
