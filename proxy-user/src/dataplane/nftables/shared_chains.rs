//! Chains, maps and sets that exist while some service port uses them: chains that pick a backend, session affinity's
//! chains and maps, and source ranges.
//!
//! In: the needs of a service port. Out: names and rules. A name has everything about an object, so a dump is read back
//! by names alone: `service-cluster-3-masquerade`, `sticky-local-10800/default/web/http/tcp`.

use std::ops::Range;

use super::{
    drop_reasons::{DropReason, NO_LOCAL_ENDPOINTS},
    expr,
    matches::{clear_priority, from_outside, load_frontend, load_node_port, mark, not_from_pod},
    schema::{self, Map, first_slot},
    sources::Sources,
    sticky::Sticky,
};
use crate::sys::libnftnl::{Element, Expr, SetSpec};
use crate::{
    model::Family,
    plan::{BackendSet, NodePlan},
};

/// The kind of frontend that a chain serves: a NodePort has no address in its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum FrontendKind {
    Service,
    NodePort,
}

/// The sources that a chain masquerades.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Masquerade {
    Never,
    Always,
    /// Every source except local pods (R7).
    Foreign,
    /// Only this host (R6b).
    Host,
}

/// An object that exists while a service port or another object uses it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum SharedObject {
    /// The map client → number of its backend, of one backend set of a sticky port.
    Clients { sticky: Sticky, set: BackendSet },
    /// The map slot → number of the backend there.
    Slots { sticky: Sticky, set: BackendSet },
    /// The chain that draws a slot and remembers its number. Its rules depend on the number of slots.
    Draw { sticky: Sticky, set: BackendSet },
    /// The chain that uses the number that the kernel remembers for a client, or goes on to draw one.
    Choice { sticky: Sticky, set: BackendSet },
    /// The chain that leads to a choice, with or without masquerading. Its name has the timeout of session affinity.
    StickyPicker { sticky: Sticky, set: BackendSet, seconds: u32, masquerade: Masquerade },
    /// The set of the only sources that some frontends allow (F7).
    Sources(Sources),
    /// The chain that drops all other sources.
    Guard { sources: Box<Self> },
    /// The chain that sends a flow to one of `count` backends.
    Picker { kind: FrontendKind, set: BackendSet, count: u32, masquerade: Masquerade },
    /// The chain that treats flows from outside differently from those of pods and this host (R6).
    Fork { inside: Branch, outside: Branch },
}

/// One side of a [`SharedObject::Fork`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Branch {
    /// Goes to another chain.
    Chain(Box<SharedObject>),
    /// Drops (F3).
    Drop,
    /// Does not translate, and ends all look-ups.
    Pass,
}

impl Branch {
    fn stem(&self) -> String {
        match self {
            Self::Chain(object) => object.stem(),
            Self::Drop => DROP.to_owned(),
            Self::Pass => PASS.to_owned(),
        }
    }

    fn object(&self) -> Option<&SharedObject> {
        match self {
            Self::Chain(object) => Some(object),
            Self::Drop | Self::Pass => None,
        }
    }

    fn parse(words: &str, sticky: Option<&Sticky>) -> Option<Self> {
        Some(match words {
            DROP => Self::Drop,
            PASS => Self::Pass,
            _ => Self::Chain(Box::new(SharedObject::parse_unforked(words, sticky.cloned())?)),
        })
    }

    fn verdict(&self) -> Expr {
        match self {
            Self::Chain(object) => expr::goto(&object.name()),
            Self::Drop => expr::goto(NO_LOCAL_ENDPOINTS),
            Self::Pass => expr::accept(),
        }
    }
}

const DROP: &str = "drop";
const PASS: &str = "pass";
const SOURCES: &str = "sources-";
const GUARD: &str = "guard-";
/// Separates the two sides in the name of a fork.
const OUTSIDE: &str = "-outside-";

const SETS: [(BackendSet, &str); 2] = [(BackendSet::Cluster, "cluster"), (BackendSet::Local, "local")];
const KINDS: [(FrontendKind, &str); 2] =
    [(FrontendKind::Service, "service"), (FrontendKind::NodePort, "node-port")];
const MASQUERADES: [(Masquerade, &str); 4] = [
    (Masquerade::Never, ""),
    (Masquerade::Always, "-masquerade"),
    (Masquerade::Foreign, "-masquerade-foreign"),
    (Masquerade::Host, "-masquerade-host"),
];

fn word_of<T: PartialEq>(words: &[(T, &'static str)], value: &T) -> &'static str {
    words.iter().find(|(candidate, _)| candidate == value).map_or("", |(_, word)| word)
}

/// Makes an object of one backend set of a sticky port.
type OfSet = fn(Sticky, BackendSet) -> SharedObject;

impl SharedObject {
    pub(super) fn name(&self) -> String {
        format!("{}{}", self.stem(), self.sticky().map(Sticky::text).unwrap_or_default())
    }

    /// The part of the service port's name that the object's name leaves out.
    pub(super) fn comment(&self) -> Option<&str> {
        self.sticky().and_then(Sticky::comment)
    }

    /// The name without the service port.
    fn stem(&self) -> String {
        match self {
            Self::Clients { set, .. } => format!("clients-{}", word_of(&SETS, set)),
            Self::Slots { set, .. } => format!("slots-{}", word_of(&SETS, set)),
            Self::Draw { set, .. } => format!("draw-{}", word_of(&SETS, set)),
            Self::Choice { set, .. } => format!("choice-{}", word_of(&SETS, set)),
            Self::StickyPicker { set, seconds, masquerade, .. } => {
                format!("sticky-{}-{seconds}{}", word_of(&SETS, set), word_of(&MASQUERADES, masquerade))
            }
            Self::Sources(sources) => format!("{SOURCES}{}", sources.hash()),
            Self::Guard { sources } => sources.stem().replacen(SOURCES, GUARD, 1),
            Self::Picker { kind, set, count, masquerade } => format!(
                "{}-{}-{count}{}",
                word_of(&KINDS, kind),
                word_of(&SETS, set),
                word_of(&MASQUERADES, masquerade),
            ),
            Self::Fork { inside, outside } => format!("{}{OUTSIDE}{}", inside.stem(), outside.stem()),
        }
    }

    /// The object with this name, if it is a name that weir gives.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let (words, sticky) = name
            .split_once('/')
            .map_or((name, None), |(words, _)| (words, Some(Sticky::read(&name[words.len()..]))));
        match words.split_once(OUTSIDE) {
            Some((inside, outside)) => Some(Self::Fork {
                inside: Branch::parse(inside, sticky.as_ref())?,
                outside: Branch::parse(outside, sticky.as_ref())?,
            }),
            None => Self::parse_unforked(words, sticky),
        }
    }

    /// The object with this name, which is no fork.
    fn parse_unforked(words: &str, sticky: Option<Sticky>) -> Option<Self> {
        let set_and_rest = |text: &str| {
            SETS.iter().find_map(|(set, word)| Some((*set, text.strip_prefix(word)?.to_owned())))
        };
        let of_port: [(&str, OfSet); 4] = [
            ("clients-", |sticky, set| Self::Clients { sticky, set }),
            ("slots-", |sticky, set| Self::Slots { sticky, set }),
            ("draw-", |sticky, set| Self::Draw { sticky, set }),
            ("choice-", |sticky, set| Self::Choice { sticky, set }),
        ];
        for (prefix, object) in of_port {
            if let Some((set, rest)) = words.strip_prefix(prefix).and_then(set_and_rest) {
                return rest.is_empty().then_some(object(sticky?, set));
            }
        }
        let set_of = |words: &str, prefix| Sources::read(words.strip_prefix(prefix)?).map(Self::Sources);
        if let Some(sources) = set_of(words, SOURCES) {
            return Some(sources);
        }
        if let Some(sources) = set_of(words, GUARD) {
            return Some(Self::Guard { sources: Box::new(sources) });
        }
        if let Some(rest) = words.strip_prefix("sticky-") {
            let (set, rest) = set_and_rest(rest)?;
            let (seconds, masquerade) = number_and_masquerade(&rest)?;
            return Some(Self::StickyPicker { sticky: sticky?, set, seconds, masquerade });
        }
        let (kind, rest) = KINDS
            .iter()
            .find_map(|(kind, word)| Some((*kind, words.strip_prefix(word)?.strip_prefix('-')?)))?;
        let (set, rest) = set_and_rest(rest)?;
        let (count, masquerade) = number_and_masquerade(&rest)?;
        let is_picker = sticky.is_none() && count < first_slot(BackendSet::Local);
        is_picker.then_some(Self::Picker { kind, set, count, masquerade })
    }

    /// The chains that this one leads to, or the set that it looks up. They must exist as long as the chain.
    pub(super) fn parts(&self) -> impl Iterator<Item = &Self> {
        let parts = match self {
            Self::Fork { inside, outside } => [inside.object(), outside.object()],
            Self::Guard { sources } => [Some(&**sources), None],
            _ => [None, None],
        };
        parts.into_iter().flatten()
    }

    /// The object with everything that must exist as long as it: its parts, and the objects that remember clients.
    pub(super) fn with_needed(&self) -> Vec<Self> {
        let chains = || self.parts().chain([self]);
        let of_port = chains().flat_map(|object| match object {
            Self::StickyPicker { sticky, set, .. } => Self::affinity(sticky, *set).to_vec(),
            _ => Vec::new(),
        });
        of_port.chain(chains().cloned()).collect()
    }

    /// The objects that remember the clients of one backend set of a sticky port.
    pub(super) fn affinity(sticky: &Sticky, set: BackendSet) -> [Self; 4] {
        let sticky = || sticky.clone();
        [
            Self::Clients { sticky: sticky(), set },
            Self::Slots { sticky: sticky(), set },
            Self::Draw { sticky: sticky(), set },
            Self::Choice { sticky: sticky(), set },
        ]
    }

    /// The slots of a frontend from which the chain and its parts pick.
    pub(super) fn reach(&self) -> Vec<Range<u32>> {
        let ranges = self.parts().chain([self]).filter_map(|object| match object {
            Self::Picker { set, count, .. } => Some(first_slot(*set)..first_slot(*set) + count),
            _ => None,
        });
        ranges.collect()
    }

    /// The map from buckets to this chain; `None` if no frontend leads to the object.
    pub(super) const fn bucket_map(&self) -> Option<Map> {
        match self {
            Self::Clients { .. }
            | Self::Slots { .. }
            | Self::Draw { .. }
            | Self::Choice { .. }
            | Self::Sources(_) => None,
            Self::Guard { .. } => Some(Map::Guards),
            Self::StickyPicker { .. } | Self::Picker { .. } | Self::Fork { .. } => Some(Map::Buckets),
        }
    }

    /// The only service port that uses this object; `None` if any port may.
    pub(super) fn sticky(&self) -> Option<&Sticky> {
        match self {
            Self::Clients { sticky, .. }
            | Self::Slots { sticky, .. }
            | Self::Draw { sticky, .. }
            | Self::Choice { sticky, .. }
            | Self::StickyPicker { sticky, .. } => Some(sticky),
            Self::Sources(_) | Self::Guard { .. } | Self::Picker { .. } => None,
            Self::Fork { .. } => self.parts().find_map(Self::sticky),
        }
    }

    /// Whether it is a map or set, and no chain.
    pub(super) const fn is_set(&self) -> bool {
        matches!(self, Self::Clients { .. } | Self::Slots { .. } | Self::Sources(_))
    }

    /// Its specification, if the object is a map or set.
    pub(super) fn set_spec(&self, family: Family) -> Option<SetSpec> {
        match self {
            Self::Clients { .. } => Some(schema::clients_spec(&self.name(), self.comment(), family)),
            Self::Slots { .. } => Some(schema::slots_spec(&self.name(), self.comment(), family)),
            Self::Sources(_) => Some(schema::sources_spec(&self.name(), family)),
            _ => None,
        }
    }

    /// The elements of a set that never changes; none for all other objects.
    pub(super) fn fixed_elements(&self) -> Vec<Element> {
        match self {
            Self::Sources(sources) => sources.elements(),
            _ => Vec::new(),
        }
    }

    /// Whether a later service port may need the same object again.
    pub(super) fn is_reusable(&self) -> bool {
        matches!(self, Self::Picker { .. } | Self::Fork { .. }) && self.sticky().is_none()
    }

    /// The rules of a chain, which depend on the node. A map has none, and those of a choice depend on its slots.
    pub(super) fn rules(&self, family: Family, node: &NodePlan) -> Vec<Vec<Expr>> {
        match self {
            Self::Clients { .. }
            | Self::Slots { .. }
            | Self::Draw { .. }
            | Self::Choice { .. }
            | Self::Sources(_) => Vec::new(),
            Self::Guard { sources } => guard_rules(family, &sources.name()),
            Self::StickyPicker { sticky, set, masquerade, .. } => {
                let choice = Self::Choice { sticky: sticky.clone(), set: *set };
                masquerade.before(family, node, vec![expr::goto(&choice.name())])
            }
            Self::Picker { kind, set, count, masquerade } => {
                masquerade.before(family, node, pick(family, *kind, *set, *count))
            }
            Self::Fork { inside, outside } => {
                vec![[from_outside(family, node), vec![outside.verdict()]].concat(), vec![inside.verdict()]]
            }
        }
    }
}

/// Reads `-`, a number and the suffix for masquerading.
fn number_and_masquerade(text: &str) -> Option<(u32, Masquerade)> {
    let rest = text.strip_prefix('-')?;
    let digits = rest.find(|character: char| !character.is_ascii_digit()).unwrap_or(rest.len());
    let (number, rest) = rest.split_at(digits);
    let masquerade = MASQUERADES.iter().find(|(_, word)| *word == rest)?.0;
    Some((number.parse().ok()?, masquerade))
}

impl Masquerade {
    /// The rules of a picker, with `pick` at the end of the last. They clear the priority, which held the bucket. No
    /// case has a rule that it does not need, because each rule costs a new flow about 20 ns.
    fn before(self, family: Family, node: &NodePlan, pick: Vec<Expr>) -> Vec<Vec<Expr>> {
        let mark = mark(node.masquerade_mark);
        let (first, every) = match self {
            Self::Never => (None, Vec::new()),
            Self::Always => (None, mark),
            Self::Foreign => (Some([not_from_pod(family, node), mark].concat()), Vec::new()),
            Self::Host => (Some([expr::source_is_local(true).to_vec(), mark].concat()), Vec::new()),
        };
        first.into_iter().chain([[every, clear_priority(), pick].concat()]).collect()
    }
}

fn pick(family: Family, kind: FrontendKind, set: BackendSet, count: u32) -> Vec<Expr> {
    let (key, words, backends) = match kind {
        FrontendKind::Service => (load_frontend(family), expr::address_words(family) + 2, Map::Backends),
        FrontendKind::NodePort => (load_node_port(), 2, Map::NodePortBackends),
    };
    let pick = vec![
        expr::random(count, first_slot(set), expr::word(words)),
        expr::map(expr::word(0), backends.name(), expr::word(0)),
        expr::dnat(family),
    ];
    [key, pick].concat()
}

/// Drops sources that are not in the set.
fn guard_rules(family: Family, sources: &str) -> Vec<Vec<Expr>> {
    let source = vec![
        expr::source_address(family, expr::word(0)),
        expr::destination_port(expr::word(expr::address_words(family))),
        expr::not_in_set(expr::word(0), sources),
    ];
    vec![clear_priority(), [source, DropReason::SourceNotAllowed.drop()].concat()]
}

/// The specification that this version writes for a set or map of this name, if it writes one.
pub(super) fn set_of(name: &str, family: Family) -> Option<SetSpec> {
    let map = Map::ALL.into_iter().find(|map| map.name() == name);
    map.map(|map| map.spec(family)).or_else(|| SharedObject::parse(name)?.set_spec(family))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{ObjectName, Protocol},
        plan::PortId,
    };

    fn sticky(namespace: &str, service: &str, port: &str) -> Sticky {
        let (service, port) = (ObjectName::new(namespace, service), port.into());
        Sticky::of(&PortId { service, port, protocol: Protocol::Sctp, family: Family::V4 })
    }

    /// Every kind of object for this service port, with so many endpoints, or seconds.
    fn objects(sticky: &Sticky, number: u32) -> Vec<SharedObject> {
        let mut objects = Vec::new();
        for (set, _) in SETS {
            let sticky = || sticky.clone();
            objects.push(SharedObject::Clients { sticky: sticky(), set });
            objects.push(SharedObject::Slots { sticky: sticky(), set });
            objects.push(SharedObject::Draw { sticky: sticky(), set });
            objects.push(SharedObject::Choice { sticky: sticky(), set });
            for (masquerade, _) in MASQUERADES {
                objects.push(SharedObject::StickyPicker {
                    sticky: sticky(),
                    set,
                    seconds: number,
                    masquerade,
                });
                for (kind, _) in KINDS {
                    objects.push(SharedObject::Picker { kind, set, count: number, masquerade });
                }
            }
        }
        let ranges = ["192.0.2.0/24".parse().unwrap()].into();
        let sources = || SharedObject::Sources(Sources::of(&ranges));
        let of_sources = [sources(), SharedObject::Guard { sources: Box::new(sources()) }];
        let forks = objects.iter().flat_map(|object| {
            let chain = || Branch::Chain(Box::new(object.clone()));
            let pairs = [(chain(), chain()), (chain(), Branch::Drop), (Branch::Pass, chain())];
            pairs.map(|(inside, outside)| SharedObject::Fork { inside, outside })
        });
        let forks: Vec<_> = forks.collect();
        objects.extend(forks);
        objects.extend(of_sources);
        objects
    }

    #[test]
    fn names_can_be_read_back() {
        for object in objects(&sticky("default", "web-1-masquerade", "http"), 31) {
            assert_eq!(SharedObject::parse(&object.name()), Some(object.clone()), "{}", object.name());
            assert_eq!(object.comment(), None, "the name is complete");
        }
        for foreign in ["", "service", "service-cluster", "service-cluster-3x", "nat-output", "remember"] {
            assert_eq!(SharedObject::parse(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn names_of_any_service_port_are_taken_by_the_kernel_read_back_and_told_apart() {
        const MOST_BY_THE_KERNEL: usize = 255;
        let most = first_slot(BackendSet::Local) - 1;
        let (long, longest) = ("n".repeat(63), "s".repeat(253));
        let ports = [
            sticky(&long, &long, "tls"),
            sticky(&long, &long, &long),
            sticky(&long, &format!("{}t", &long[1..]), &long),
            sticky(&longest, &longest, &longest),
        ];
        for (index, port) in ports.iter().enumerate() {
            assert!(ports[..index].iter().all(|other| other != port), "{port:?} is two ports");
            for object in objects(port, most) {
                let name = object.name();
                assert!(name.len() <= MOST_BY_THE_KERNEL, "{} bytes: {name}", name.len());
                assert_eq!(SharedObject::parse(&name), Some(object), "{name}");
            }
        }
        assert_eq!(ports[1].comment(), Some(&*format!("{long}/{long}")));
        assert_eq!(ports[3].comment().map(str::len), Some(128));
    }
}
