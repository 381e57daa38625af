//! Which rules and chains are kube-proxy's, and which of them have to stay.
//!
//! In: tables, chains and rules as the kernel lists them. Out: what to delete, and which of kube-proxy's chains stay.
//!
//! A chain stays for one of two reasons. Either a rule of another program jumps to it, as portmap's rules jump to
//! `KUBE-MARK-MASQ`, and deleting that rule would break the program. Or the built-in chain later refuses packets that
//! the chain accepts, as `FORWARD` with policy drop does, and without the chain these packets would be lost.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
};

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

/// Prefixes of chains for one Service or one endpoint.
const PREFIXES: [&str; 6] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-FW-", "KUBE-EXT-", "KUBE-SEP-", "KUBE-XLB-"];

/// The chains to which kube-proxy jumps from built-in chains.
const ENTRIES: [&str; 9] = [
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FORWARD",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
    "KUBE-NODE-PORT",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-PROXY-FIREWALL",
    "KUBE-SERVICES",
];

/// Chains without rules about a Service, so they stay right when Services change.
const LASTING: [&str; 3] = ["KUBE-FORWARD", "KUBE-MARK-MASQ", "KUBE-POSTROUTING"];

/// The table of [`ACCEPTING`].
const FILTER: &str = "filter";
/// Chains that accept packets: of forwarded connections to Services, and of health checks.
const ACCEPTING: [&str; 3] = ["KUBE-FORWARD", "KUBE-NODEPORTS", "KUBE-NODE-PORT"];

/// The names of a table and a chain.
pub(super) type Name = (String, String);

/// A chain, with the fields that decide whether it stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) name: Name,
    /// The policy of a built-in (base) chain; `None` for other chains.
    pub(super) built_in: Option<Policy>,
    /// The kernel's use counter: rules in the chain, and rules or map elements that jump to it. `None` in legacy
    /// tables.
    pub(super) uses: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Policy {
    Accept,
    Drop,
}

/// A rule. Rules of a chain are in the order of evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) chain: Name,
    pub(super) handle: u64,
    pub(super) verdict: Verdict,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Jump or goto this chain of the same table.
    Chain(String),
    /// Drop, reject, or queue to another program.
    Refuse,
    /// Any other end of the rule.
    Other,
}

/// The rules of a family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FamilyRules {
    pub(super) tables: Vec<String>,
    pub(super) chains: Vec<Chain>,
    pub(super) rules: Vec<Rule>,
}

/// The tables, rules and chains to delete, and kube-proxy's chains that stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Removal {
    pub(super) tables: Vec<String>,
    /// Single rules in chains that stay, by chain and handle.
    pub(super) rules: Vec<(Name, u64)>,
    /// Chains to delete, with all their rules.
    pub(super) chains: Vec<Name>,
    /// Chains that stay.
    pub(super) kept: BTreeMap<Name, KeepReason>,
}

impl Removal {
    /// Whether there is nothing to delete.
    pub(super) fn is_empty(&self) -> bool {
        self.tables.is_empty() && self.rules.is_empty() && self.chains.is_empty()
    }
}

/// Why a chain of kube-proxy stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeepReason {
    /// Rules in these chains of other programs jump to it. Empty if only a map element does.
    LedTo(BTreeSet<String>),
    /// This built-in chain would later refuse packets that the chain accepts.
    Refused(String),
}

impl fmt::Display for KeepReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LedTo(chains) if chains.is_empty() => {
                write!(formatter, "a map of another program leads to it")
            }
            Self::LedTo(chains) => {
                let chains: Vec<&str> = chains.iter().map(String::as_str).collect();
                write!(formatter, "rules of other programs lead to it, in {}", chains.join(", "))
            }
            Self::Refused(chain) => {
                write!(formatter, "{chain} drops or rejects packets that it accepts")
            }
        }
    }
}

/// Whether an iptables target drops or rejects packets, or queues them to another program.
pub(super) fn is_refusal(target: &[u8]) -> bool {
    [&b"DROP"[..], b"REJECT", b"NFQUEUE", b"TARPIT"].contains(&target)
}

/// Whether a chain with this name in a table of iptables is kube-proxy's.
fn is_kube_proxys(chain: &str) -> bool {
    CHAINS.contains(&chain) || PREFIXES.iter().any(|start| chain.starts_with(start))
}

/// kube-proxy's part of a family's rules.
pub(super) fn of_kube_proxy(found: &FamilyRules) -> Removal {
    let graph = Graph::of(found);
    let mut removal = Removal {
        tables: found.tables.iter().filter(|table| *table == TABLE).cloned().collect(),
        ..Removal::default()
    };
    for chain in found.chains.iter().filter(|chain| graph.chains.contains(&chain.name)) {
        if let Some(because) = graph.reason_to_keep(chain) {
            removal.kept.insert(chain.name.clone(), because);
        } else {
            removal.chains.push(chain.name.clone());
        }
    }
    removal.chains.sort();
    let goes = |rule: &&Rule| match removal.kept.get(&rule.chain) {
        // Deleting a chain deletes its rules.
        None if graph.chains.contains(&rule.chain) => false,
        Some(KeepReason::LedTo(_)) if !LASTING.contains(&rule.chain.1.as_str()) => true,
        _ => graph.leads_nowhere(rule, &removal.kept),
    };
    removal.rules = found.rules.iter().filter(goes).map(|rule| (rule.chain.clone(), rule.handle)).collect();
    removal
}

/// The jumps between chains.
struct Graph<'a> {
    /// kube-proxy's chains.
    chains: HashSet<&'a Name>,
    /// The built-in chains.
    built_in: HashMap<&'a Name, Policy>,
    rules_in: HashMap<&'a Name, Vec<&'a Rule>>,
    /// By table and chain.
    rules_to: HashMap<&'a str, HashMap<&'a str, Vec<&'a Rule>>>,
}

impl<'a> Graph<'a> {
    fn of(found: &'a FamilyRules) -> Self {
        let is_kube_proxys_chain = |chain: &&Chain| {
            let (table, name) = &chain.name;
            chain.built_in.is_none() && IPTABLES.contains(&table.as_str()) && is_kube_proxys(name)
        };
        let mut graph = Self {
            chains: found.chains.iter().filter(is_kube_proxys_chain).map(|chain| &chain.name).collect(),
            built_in: found.chains.iter().filter_map(|chain| Some((&chain.name, chain.built_in?))).collect(),
            rules_in: HashMap::new(),
            rules_to: HashMap::new(),
        };
        for rule in &found.rules {
            graph.rules_in.entry(&rule.chain).or_default().push(rule);
            if let Verdict::Chain(to) = &rule.verdict {
                graph.rules_to.entry(&rule.chain.0).or_default().entry(to).or_default().push(rule);
            }
        }
        graph
    }

    fn rules_in(&self, chain: &Name) -> &[&'a Rule] {
        self.rules_in.get(chain).map_or(&[], Vec::as_slice)
    }

    fn rules_to(&self, (table, chain): &Name) -> &[&'a Rule] {
        let in_table = self.rules_to.get(table.as_str());
        in_table.and_then(|to| to.get(chain.as_str())).map_or(&[], Vec::as_slice)
    }

    /// Whether a rule is kube-proxy's own jump from a built-in chain.
    fn is_entry(&self, rule: &Rule) -> bool {
        matches!(&rule.verdict, Verdict::Chain(to) if ENTRIES.contains(&to.as_str()))
            && self.built_in.contains_key(&rule.chain)
    }

    fn reason_to_keep(&self, chain: &Chain) -> Option<KeepReason> {
        let (inside, leading) = (self.rules_in(&chain.name), self.rules_to(&chain.name));
        let accepts =
            chain.name.0 == FILTER && ACCEPTING.contains(&chain.name.1.as_str()) && !inside.is_empty();
        if accepts && let Some(entry) = leading.iter().find(|rule| self.refuses_after(rule)) {
            return Some(KeepReason::Refused(entry.chain.1.clone()));
        }
        let foreign =
            leading.iter().filter(|rule| !self.chains.contains(&rule.chain) && !self.is_entry(rule));
        let foreign: BTreeSet<String> = foreign.map(|rule| rule.chain.1.clone()).collect();
        let in_maps = chain.uses.is_some_and(|uses| uses > inside.len() + leading.len());
        (in_maps || !foreign.is_empty()).then_some(KeepReason::LedTo(foreign))
    }

    /// Whether a later rule or the policy of the built-in chain could refuse a packet that this rule accepts.
    fn refuses_after(&self, rule: &Rule) -> bool {
        let Some(policy) = self.built_in.get(&rule.chain) else { return false };
        let behind =
            self.rules_in(&rule.chain).iter().skip_while(|other| other.handle != rule.handle).skip(1);
        let mut seen = HashSet::new();
        *policy == Policy::Drop || behind.copied().any(|rule| self.may_refuse(rule, &mut seen))
    }

    fn may_refuse(&self, rule: &'a Rule, seen: &mut HashSet<Name>) -> bool {
        match &rule.verdict {
            Verdict::Refuse => true,
            Verdict::Other => false,
            Verdict::Chain(to) => {
                let to = (rule.chain.0.clone(), to.clone());
                // kube-proxy's own chains go, and the kubelet's chains drop only packets that misuse loopback
                // addresses.
                !to.1.starts_with("KUBE-")
                    && seen.insert(to.clone())
                    && self.rules_in(&to).iter().any(|rule| self.may_refuse(rule, seen))
            }
        }
    }

    /// Whether a rule in a chain that stays jumps to a chain that goes.
    fn leads_nowhere(&self, rule: &Rule, kept: &BTreeMap<Name, KeepReason>) -> bool {
        let Verdict::Chain(to) = &rule.verdict else { return false };
        let to = (rule.chain.0.clone(), to.clone());
        if !self.chains.contains(&to) {
            return false;
        }
        match kept.get(&to) {
            None => true,
            Some(KeepReason::LedTo(_)) => self.is_entry(rule),
            Some(KeepReason::Refused(_)) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        let (table, chain) = text.split_once(' ').unwrap();
        (table.to_owned(), chain.to_owned())
    }

    /// Parses rules from lines: `table nat`, `nat PREROUTING: accept` (a built-in chain), `nat MINE` (a chain), `nat
    /// MINE > KUBE-SERVICES` (a rule that jumps), and `nat MINE ! refuse` or `nat MINE ! other` (a rule with another
    /// verdict). A rule's handle is the number of its line.
    fn found(text: &str) -> FamilyRules {
        let mut found = FamilyRules::default();
        for (handle, line) in (1..).zip(text.lines().map(str::trim)).filter(|(_, line)| !line.is_empty()) {
            let mut rule = |chain, verdict| found.rules.push(Rule { chain: name(chain), handle, verdict });
            if let Some(table) = line.strip_prefix("table ") {
                found.tables.push(table.to_owned());
            } else if let Some((chain, to)) = line.split_once(" > ") {
                rule(chain, Verdict::Chain(to.to_owned()));
            } else if let Some((chain, what)) = line.split_once(" ! ") {
                rule(chain, if what == "refuse" { Verdict::Refuse } else { Verdict::Other });
            } else {
                let (chain, policy) = line.split_once(": ").unzip();
                let built_in = policy.map(|policy| match policy {
                    "drop" => Policy::Drop,
                    _ => Policy::Accept,
                });
                found.chains.push(Chain { name: name(chain.unwrap_or(line)), built_in, uses: None });
            }
        }
        found
    }

    fn handles(removal: &Removal) -> Vec<u64> {
        removal.rules.iter().map(|(_, handle)| *handle).collect()
    }

    fn chains(removal: &Removal) -> Vec<String> {
        removal.chains.iter().map(|(table, chain)| format!("{table} {chain}")).collect()
    }

    fn kept(removal: &Removal) -> Vec<String> {
        let kept = removal.kept.iter();
        kept.map(|((table, chain), because)| format!("{table} {chain}: {because}")).collect()
    }

    #[test]
    fn only_kube_proxys_own_tables_chains_and_rules_go() {
        let removal = of_kube_proxy(&found(
            "table nat
            table kube-proxy
            table weir
            table kube-proxy-2
            nat PREROUTING: accept
            nat KUBE-SERVICES
            nat KUBE-SVC-ABC
            nat KUBE-KUBELET-CANARY
            filter KUBE-FIREWALL
            filter KUBE-FORWARD
            mangle KUBE-PROXY-CANARY
            mine KUBE-SERVICES
            nat CNI-HOSTPORT-DNAT
            nat KUBE-MY-OWN
            nat PREROUTING > KUBE-SERVICES
            nat KUBE-SERVICES > KUBE-SVC-ABC
            nat PREROUTING > CNI-HOSTPORT-DNAT
            filter INPUT > KUBE-FIREWALL
            mine PREROUTING > KUBE-SERVICES
            filter FORWARD > KUBE-SERVICES",
        ));
        assert_eq!(removal.tables, ["kube-proxy"]);
        assert_eq!(handles(&removal), [15]);
        let expected =
            ["filter KUBE-FORWARD", "mangle KUBE-PROXY-CANARY", "nat KUBE-SERVICES", "nat KUBE-SVC-ABC"];
        assert_eq!(chains(&removal), expected);
        assert_eq!(kept(&removal), [""; 0]);
    }

    #[test]
    fn a_chain_that_foreign_rules_jump_to_stays_with_these_rules() {
        let removal = of_kube_proxy(&found(
            "nat PREROUTING: accept
            nat OUTPUT: accept
            nat CNI-HOSTPORT-SETMARK
            nat KUBE-MARK-MASQ
            nat KUBE-SERVICES
            nat KUBE-SVC-ABC
            nat CNI-HOSTPORT-SETMARK > KUBE-MARK-MASQ
            nat OUTPUT > KUBE-MARK-MASQ
            nat PREROUTING > KUBE-SERVICES
            nat KUBE-SERVICES > KUBE-SVC-ABC
            nat KUBE-SVC-ABC > KUBE-MARK-MASQ
            nat KUBE-MARK-MASQ ! other",
        ));
        assert_eq!(handles(&removal), [9], "only kube-proxy's own rule in a built-in chain");
        assert_eq!(chains(&removal), ["nat KUBE-SERVICES", "nat KUBE-SVC-ABC"]);
        let because = "rules of other programs lead to it, in CNI-HOSTPORT-SETMARK, OUTPUT";
        assert_eq!(kept(&removal), [format!("nat KUBE-MARK-MASQ: {because}")]);
    }

    #[test]
    fn a_chain_of_services_that_foreign_rules_jump_to_stays_empty() {
        let removal = of_kube_proxy(&found(
            "nat PREROUTING: accept
            nat MINE
            nat KUBE-SERVICES
            nat KUBE-SVC-ABC
            nat MINE > KUBE-SERVICES
            nat PREROUTING > KUBE-SERVICES
            nat KUBE-SERVICES > KUBE-SVC-ABC
            nat KUBE-SERVICES ! refuse",
        ));
        assert_eq!(handles(&removal), [6, 7, 8]);
        assert_eq!(chains(&removal), ["nat KUBE-SVC-ABC"]);
        assert_eq!(kept(&removal), ["nat KUBE-SERVICES: rules of other programs lead to it, in MINE"]);
    }

    #[test]
    fn a_chain_that_a_map_jumps_to_stays() {
        let mut found = found(
            "nat PREROUTING: accept
            nat KUBE-MARK-MASQ
            nat KUBE-SVC-ABC
            nat KUBE-SVC-ABC > KUBE-MARK-MASQ
            nat KUBE-MARK-MASQ ! other",
        );
        found.chains[1].uses = Some(2);
        found.chains[2].uses = Some(1);
        assert_eq!(chains(&of_kube_proxy(&found)), ["nat KUBE-MARK-MASQ", "nat KUBE-SVC-ABC"]);
        found.chains[1].uses = Some(3);
        let removal = of_kube_proxy(&found);
        assert_eq!(chains(&removal), ["nat KUBE-SVC-ABC"]);
        assert_eq!(kept(&removal), ["nat KUBE-MARK-MASQ: a map of another program leads to it"]);
    }

    /// kube-proxy's rules in the filter table of a node with the kubelet, and more rules behind them.
    fn filter(policy: &str, behind: &str) -> Removal {
        of_kube_proxy(&found(&format!(
            "filter FORWARD: {policy}
            filter INPUT: {policy}
            filter KUBE-SERVICES
            filter KUBE-FORWARD
            filter KUBE-NODEPORTS
            filter KUBE-FIREWALL
            filter DOCKER
            filter FORWARD > KUBE-FORWARD
            filter FORWARD > KUBE-SERVICES
            filter INPUT > KUBE-NODEPORTS
            filter INPUT > KUBE-FIREWALL
            filter KUBE-SERVICES ! refuse
            filter KUBE-FORWARD ! other
            filter KUBE-NODEPORTS ! other
            filter KUBE-FIREWALL ! refuse
            {behind}"
        )))
    }

    #[test]
    fn chains_that_accept_connections_to_services_stay_if_later_rules_would_refuse_them() {
        let removal = filter("drop", "");
        assert_eq!(handles(&removal), [9]);
        assert_eq!(chains(&removal), ["filter KUBE-SERVICES"]);
        let because = "drops or rejects packets that it accepts";
        let expected = ["KUBE-FORWARD: FORWARD", "KUBE-NODEPORTS: INPUT"];
        assert_eq!(kept(&removal), expected.map(|what| format!("filter {what} {because}")));

        for behind in [
            "filter FORWARD ! refuse",
            "filter FORWARD > DOCKER
            filter DOCKER ! refuse",
        ] {
            let removal = filter("accept", behind);
            assert_eq!(kept(&removal), [format!("filter KUBE-FORWARD: FORWARD {because}")]);
            assert_eq!(chains(&removal), ["filter KUBE-NODEPORTS", "filter KUBE-SERVICES"]);
        }
    }

    #[test]
    fn without_later_refusals_all_chains_go() {
        for behind in [
            "",
            "filter FORWARD ! other",
            "filter FORWARD > DOCKER
            filter DOCKER > DOCKER
            filter DOCKER ! other",
        ] {
            let removal = filter("accept", behind);
            assert_eq!(kept(&removal), [""; 0]);
            assert_eq!(handles(&removal), [8, 9, 10]);
        }
        let before = of_kube_proxy(&found(
            "filter FORWARD: accept
            filter KUBE-FORWARD
            filter FORWARD ! refuse
            filter FORWARD > KUBE-FORWARD
            filter KUBE-FORWARD ! other",
        ));
        assert_eq!(chains(&before), ["filter KUBE-FORWARD"], "the earlier rule refuses in any case");
    }
}
