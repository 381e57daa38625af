//! Which part of a rule set is kube-proxy's.
//!
//! In: tables, chains and jumps as the kernel lists them. Out: what to delete.

use std::collections::BTreeSet;

/// The table of kube-proxy's nftables mode.
const TABLE: &str = "kube-proxy";

/// The tables of iptables that kube-proxy writes to.
pub(super) const IPTABLES: [&str; 3] = ["filter", "mangle", "nat"];

/// The chains of its iptables and ipvs modes. `KUBE-FIREWALL` and `KUBE-KUBELET-CANARY` are the kubelet's.
const CHAINS: [&str; 13] = [
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FORWARD",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
    "KUBE-LOAD-BALANCER",
    "KUBE-MARK-MASQ",
    "KUBE-NODE-PORT",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-PROXY-CANARY",
    "KUBE-PROXY-FIREWALL",
    "KUBE-SERVICES",
    "KUBE-SOURCE-RANGES-FIREWALL",
];

/// How the names of chains for one Service or one endpoint begin.
const PREFIXES: [&str; 6] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-FW-", "KUBE-EXT-", "KUBE-SEP-", "KUBE-XLB-"];

/// A table and a chain of it.
pub(super) type Chain = (String, String);

/// A rule that leads to another chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Jump {
    pub(super) from: Chain,
    pub(super) handle: u64,
    /// The chain in the same table.
    pub(super) to: String,
}

/// The rule set of a family, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) tables: Vec<String>,
    pub(super) chains: Vec<Chain>,
    pub(super) jumps: Vec<Jump>,
}

/// What to delete.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Theirs {
    pub(super) tables: Vec<String>,
    /// Rules of others that lead to the chains.
    pub(super) jumps: Vec<Jump>,
    pub(super) chains: Vec<Chain>,
}

/// Whether kube-proxy gives a chain in a table of iptables this name.
pub(super) fn is_kube_proxys(chain: &str) -> bool {
    CHAINS.contains(&chain) || PREFIXES.iter().any(|start| chain.starts_with(start))
}

/// kube-proxy's part of what was found.
pub(super) fn of_kube_proxy(found: &Found) -> Theirs {
    let is_theirs =
        |(table, chain): &&Chain| IPTABLES.contains(&table.as_str()) && is_kube_proxys(chain.as_str());
    let chains: BTreeSet<Chain> = found.chains.iter().filter(is_theirs).cloned().collect();
    let leads_there = |jump: &&Jump| {
        !chains.contains(&jump.from) && chains.contains(&(jump.from.0.clone(), jump.to.clone()))
    };
    Theirs {
        tables: found.tables.iter().filter(|table| *table == TABLE).cloned().collect(),
        jumps: found.jumps.iter().filter(leads_there).cloned().collect(),
        chains: chains.into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(text: &str) -> Chain {
        let (table, chain) = text.split_once(' ').unwrap();
        (table.to_owned(), chain.to_owned())
    }

    #[test]
    fn only_what_kube_proxy_made_is_its() {
        let jump = |from: &str, handle, to: &str| Jump { from: chain(from), handle, to: to.to_owned() };
        let found = Found {
            tables: ["nat", "kube-proxy", "weir", "kube-proxy-2"].map(str::to_owned).to_vec(),
            chains: [
                "nat PREROUTING",
                "nat KUBE-SERVICES",
                "nat KUBE-SVC-ABC",
                "nat KUBE-KUBELET-CANARY",
                "filter KUBE-FIREWALL",
                "filter KUBE-FORWARD",
                "mangle KUBE-PROXY-CANARY",
                "mine KUBE-SERVICES",
                "nat CNI-HOSTPORT-DNAT",
                "nat KUBE-MY-OWN",
            ]
            .map(chain)
            .to_vec(),
            jumps: vec![
                jump("nat PREROUTING", 7, "KUBE-SERVICES"),
                jump("nat KUBE-SERVICES", 8, "KUBE-SVC-ABC"),
                jump("nat PREROUTING", 9, "CNI-HOSTPORT-DNAT"),
                jump("filter INPUT", 10, "KUBE-FIREWALL"),
                jump("mine PREROUTING", 11, "KUBE-SERVICES"),
                jump("filter FORWARD", 12, "KUBE-SERVICES"),
            ],
        };
        let theirs = of_kube_proxy(&found);
        assert_eq!(theirs.tables, ["kube-proxy"]);
        assert_eq!(theirs.jumps.iter().map(|jump| jump.handle).collect::<Vec<_>>(), [7]);
        let expected =
            ["filter KUBE-FORWARD", "mangle KUBE-PROXY-CANARY", "nat KUBE-SERVICES", "nat KUBE-SVC-ABC"];
        assert_eq!(theirs.chains, expected.map(chain));
    }
}
