//! Objects made on demand and shared: chains that pick a backend, and what remembers the choice.
//!
//! In: what a service port needs. Out: names, rules. Names say everything about an object, so that a dump can be read
//! back by name alone: `service-cluster-3-masquerade`, `sticky-local-10800/default/web/http/tcp`.

use std::ops::Range;

use super::{
    drops::NO_LOCAL_ENDPOINTS,
    expr,
    netlink::{Element, Expr, SetSpec},
    ruleset::{self, Map},
    sources::Sources,
    sticky::Sticky,
};
use crate::{model::Family, plan::NodePlan};

/// Which table of frontends a chain works for: NodePorts have no address in their key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Space {
    Service,
    NodePort,
}

/// Which of a port's two backend sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Scope {
    Cluster,
    Local,
}

impl Scope {
    /// The first slot of the set: both sets of a frontend live in one map.
    pub(super) const fn first_slot(self) -> u32 {
        match self {
            Self::Cluster => 0,
            Self::Local => 1 << 24,
        }
    }
}

/// Whose source address is hidden.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Masquerade {
    Nobody,
    Everybody,
    /// Everybody but local pods (R7).
    Foreign,
    /// Only this host (R6b).
    Host,
}

/// An object that exists as long as something uses it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Object {
    /// The map client → number of its backend, of one backend set of a sticky port.
    Clients { sticky: Sticky, scope: Scope },
    /// The map slot → number of the backend there.
    Slots { sticky: Sticky, scope: Scope },
    /// The chain that draws one of the slots and remembers it. What it says depends on how many there are.
    Draw { sticky: Sticky, scope: Scope },
    /// The chain that believes what a client remembers, or goes on to draw.
    Choice { sticky: Sticky, scope: Scope },
    /// The chain that leads to a choice, masquerading or not; its name says for how long clients are remembered.
    StickyPicker { sticky: Sticky, scope: Scope, seconds: u32, masquerade: Masquerade },
    /// The set of the only sources that some frontends let in (F7).
    Sources(Sources),
    /// The chain that drops what comes from others.
    Guard { sources: Box<Self> },
    /// The chain that sends a flow to one of `count` backends.
    Picker { space: Space, scope: Scope, count: u32, masquerade: Masquerade },
    /// The chain that leads what comes from outside elsewhere than pods and this host (R6).
    Fork { inside: End, outside: End },
}

/// Where one side of a [`Object::Fork`] leads.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum End {
    /// To another chain.
    Chain(Box<Object>),
    /// Dropped (F3).
    Drop,
    /// Not translated, and not looked up any further.
    Pass,
}

impl End {
    fn words(&self) -> String {
        match self {
            Self::Chain(object) => object.words(),
            Self::Drop => DROP.to_owned(),
            Self::Pass => PASS.to_owned(),
        }
    }

    fn object(&self) -> Option<&Object> {
        match self {
            Self::Chain(object) => Some(object),
            Self::Drop | Self::Pass => None,
        }
    }

    fn parse(words: &str, sticky: Option<&Sticky>) -> Option<Self> {
        Some(match words {
            DROP => Self::Drop,
            PASS => Self::Pass,
            _ => Self::Chain(Box::new(Object::read(words, sticky.cloned())?)),
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
/// Stands between the two sides in the name of a fork.
const OUTSIDE: &str = "-outside-";

const SCOPES: [(Scope, &str); 2] = [(Scope::Cluster, "cluster"), (Scope::Local, "local")];
const SPACES: [(Space, &str); 2] = [(Space::Service, "service"), (Space::NodePort, "node-port")];
const MASQUERADES: [(Masquerade, &str); 4] = [
    (Masquerade::Nobody, ""),
    (Masquerade::Everybody, "-masquerade"),
    (Masquerade::Foreign, "-masquerade-foreign"),
    (Masquerade::Host, "-masquerade-host"),
];

fn word_of<T: PartialEq>(words: &[(T, &'static str)], value: &T) -> &'static str {
    words.iter().find(|(candidate, _)| candidate == value).map_or("", |(_, word)| word)
}

/// What makes an object of one backend set of a sticky port.
type OfSet = fn(Sticky, Scope) -> Object;

impl Object {
    pub(super) fn name(&self) -> String {
        format!("{}{}", self.words(), self.sticky().map(Sticky::text).unwrap_or_default())
    }

    /// What the name leaves out of the service port it is about.
    pub(super) fn comment(&self) -> Option<&str> {
        self.sticky().and_then(Sticky::comment)
    }

    /// The name without the port.
    fn words(&self) -> String {
        match self {
            Self::Clients { scope, .. } => format!("clients-{}", word_of(&SCOPES, scope)),
            Self::Slots { scope, .. } => format!("slots-{}", word_of(&SCOPES, scope)),
            Self::Draw { scope, .. } => format!("draw-{}", word_of(&SCOPES, scope)),
            Self::Choice { scope, .. } => format!("choice-{}", word_of(&SCOPES, scope)),
            Self::StickyPicker { scope, seconds, masquerade, .. } => {
                format!("sticky-{}-{seconds}{}", word_of(&SCOPES, scope), word_of(&MASQUERADES, masquerade))
            }
            Self::Sources(sources) => format!("{SOURCES}{}", sources.hash()),
            Self::Guard { sources } => sources.words().replacen(SOURCES, GUARD, 1),
            Self::Picker { space, scope, count, masquerade } => format!(
                "{}-{}-{count}{}",
                word_of(&SPACES, space),
                word_of(&SCOPES, scope),
                word_of(&MASQUERADES, masquerade),
            ),
            Self::Fork { inside, outside } => format!("{}{OUTSIDE}{}", inside.words(), outside.words()),
        }
    }

    /// The object of this name, if it is one of ours.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let (words, sticky) = name
            .split_once('/')
            .map_or((name, None), |(words, _)| (words, Some(Sticky::read(&name[words.len()..]))));
        match words.split_once(OUTSIDE) {
            Some((inside, outside)) => Some(Self::Fork {
                inside: End::parse(inside, sticky.as_ref())?,
                outside: End::parse(outside, sticky.as_ref())?,
            }),
            None => Self::read(words, sticky),
        }
    }

    /// The object of this name that is no fork.
    fn read(words: &str, sticky: Option<Sticky>) -> Option<Self> {
        let scope_of = |text: &str| {
            SCOPES.iter().find_map(|(scope, word)| Some((*scope, text.strip_prefix(word)?.to_owned())))
        };
        let of_port: [(&str, OfSet); 4] = [
            ("clients-", |sticky, scope| Self::Clients { sticky, scope }),
            ("slots-", |sticky, scope| Self::Slots { sticky, scope }),
            ("draw-", |sticky, scope| Self::Draw { sticky, scope }),
            ("choice-", |sticky, scope| Self::Choice { sticky, scope }),
        ];
        for (prefix, object) in of_port {
            if let Some((scope, rest)) = words.strip_prefix(prefix).and_then(scope_of) {
                return rest.is_empty().then_some(object(sticky?, scope));
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
            let (scope, rest) = scope_of(rest)?;
            let (seconds, masquerade) = number_and_masquerade(&rest)?;
            return Some(Self::StickyPicker { sticky: sticky?, scope, seconds, masquerade });
        }
        let (space, rest) = SPACES
            .iter()
            .find_map(|(space, word)| Some((*space, words.strip_prefix(word)?.strip_prefix('-')?)))?;
        let (scope, rest) = scope_of(rest)?;
        let (count, masquerade) = number_and_masquerade(&rest)?;
        let is_picker = sticky.is_none() && count < Scope::Local.first_slot();
        is_picker.then_some(Self::Picker { space, scope, count, masquerade })
    }

    /// The chains that this one leads to, or the set that it asks: they must be there as long as it is.
    pub(super) fn parts(&self) -> impl Iterator<Item = &Self> {
        let ends = match self {
            Self::Fork { inside, outside } => [inside.object(), outside.object()],
            Self::Guard { sources } => [Some(&**sources), None],
            _ => [None, None],
        };
        ends.into_iter().flatten()
    }

    /// Everything that must be there as long as it is: its parts, what they choose from, and itself.
    pub(super) fn needed(&self) -> Vec<Self> {
        let chains = || self.parts().chain([self]);
        let of_port = chains().flat_map(|object| match object {
            Self::StickyPicker { sticky, scope, .. } => Self::remembering(sticky, *scope).to_vec(),
            _ => Vec::new(),
        });
        of_port.chain(chains().cloned()).collect()
    }

    /// What one backend set of a sticky port remembers its clients with.
    pub(super) fn remembering(sticky: &Sticky, scope: Scope) -> [Self; 4] {
        let sticky = || sticky.clone();
        [
            Self::Clients { sticky: sticky(), scope },
            Self::Slots { sticky: sticky(), scope },
            Self::Draw { sticky: sticky(), scope },
            Self::Choice { sticky: sticky(), scope },
        ]
    }

    /// The slots of a frontend that it and its parts pick from.
    pub(super) fn reach(&self) -> Vec<Range<u32>> {
        let ranges = self.parts().chain([self]).filter_map(|object| match object {
            Self::Picker { scope, count, .. } => Some(scope.first_slot()..scope.first_slot() + count),
            _ => None,
        });
        ranges.collect()
    }

    /// The map of the buckets by which frontends lead to it, if they do.
    pub(super) const fn buckets(&self) -> Option<Map> {
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

    /// The port this object belongs to alone, if it is not shared by all.
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

    /// The map that it is, if it is one.
    pub(super) fn map(&self, family: Family) -> Option<SetSpec> {
        match self {
            Self::Clients { .. } => Some(ruleset::clients_spec(&self.name(), self.comment(), family)),
            Self::Slots { .. } => Some(ruleset::slots_spec(&self.name(), self.comment(), family)),
            Self::Sources(_) => Some(ruleset::sources_spec(&self.name(), family)),
            _ => None,
        }
    }

    /// The elements that its map has for as long as it is there; none where those change.
    pub(super) fn elements(&self) -> Vec<Element> {
        match self {
            Self::Sources(sources) => sources.elements(),
            _ => Vec::new(),
        }
    }

    /// Whether it may be of use again to other service ports than those that it was made for.
    pub(super) fn is_worth_keeping(&self) -> bool {
        matches!(self, Self::Picker { .. } | Self::Fork { .. }) && self.sticky().is_none()
    }

    /// The rules of a chain that the node may change. A map has none, and those of a choice follow its slots.
    pub(super) fn rules(&self, family: Family, node: &NodePlan) -> Vec<Vec<Expr>> {
        match self {
            Self::Clients { .. }
            | Self::Slots { .. }
            | Self::Draw { .. }
            | Self::Choice { .. }
            | Self::Sources(_) => Vec::new(),
            Self::Guard { sources } => ruleset::guard_rules(family, &sources.name()),
            Self::StickyPicker { sticky, scope, masquerade, .. } => {
                let choice = Self::Choice { sticky: sticky.clone(), scope: *scope };
                masquerade.before(family, node, vec![expr::goto(&choice.name())])
            }
            Self::Picker { space, scope, count, masquerade } => {
                masquerade.before(family, node, pick(family, *space, *scope, *count))
            }
            Self::Fork { inside, outside } => vec![
                [ruleset::from_outside(family, node), vec![outside.verdict()]].concat(),
                vec![inside.verdict()],
            ],
        }
    }
}

/// `-` and a number, then what masquerading is called.
fn number_and_masquerade(text: &str) -> Option<(u32, Masquerade)> {
    let rest = text.strip_prefix('-')?;
    let digits = rest.find(|character: char| !character.is_ascii_digit()).unwrap_or(rest.len());
    let (number, rest) = rest.split_at(digits);
    let masquerade = MASQUERADES.iter().find(|(_, word)| *word == rest)?.0;
    Some((number.parse().ok()?, masquerade))
}

impl Masquerade {
    /// The rules of a picker, of which `pick` ends the last. The bucket number has done its work: the packet leaves with the
    /// default priority. What needs no rule of its own has none, because each costs a new flow about 20 ns.
    fn before(self, family: Family, node: &NodePlan, pick: Vec<Expr>) -> Vec<Vec<Expr>> {
        let forget = vec![expr::constant(expr::word(0), &[0; 4]), expr::set_priority(expr::word(0))];
        let mark = ruleset::mark(node.masquerade_mark);
        let (first, every) = match self {
            Self::Nobody => (None, Vec::new()),
            Self::Everybody => (None, mark),
            Self::Foreign => (Some([ruleset::not_from_pod(family, node), mark].concat()), Vec::new()),
            Self::Host => (Some([expr::source_is_local(true).to_vec(), mark].concat()), Vec::new()),
        };
        first.into_iter().chain([[every, forget, pick].concat()]).collect()
    }
}

fn pick(family: Family, space: Space, scope: Scope, count: u32) -> Vec<Expr> {
    let (key, words, backends) = match space {
        Space::Service => (ruleset::load_frontend(family), expr::address_words(family) + 2, Map::Backends),
        Space::NodePort => (ruleset::load_node_port(), 2, Map::NodePortBackends),
    };
    let pick = vec![
        expr::random(count, scope.first_slot(), expr::word(words)),
        expr::map(expr::word(0), backends.name(), expr::word(0)),
        expr::dnat(family),
    ];
    [key, pick].concat()
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
    fn objects(sticky: &Sticky, number: u32) -> Vec<Object> {
        let mut objects = Vec::new();
        for (scope, _) in SCOPES {
            let sticky = || sticky.clone();
            objects.push(Object::Clients { sticky: sticky(), scope });
            objects.push(Object::Slots { sticky: sticky(), scope });
            objects.push(Object::Draw { sticky: sticky(), scope });
            objects.push(Object::Choice { sticky: sticky(), scope });
            for (masquerade, _) in MASQUERADES {
                objects.push(Object::StickyPicker { sticky: sticky(), scope, seconds: number, masquerade });
                for (space, _) in SPACES {
                    objects.push(Object::Picker { space, scope, count: number, masquerade });
                }
            }
        }
        let ranges = ["192.0.2.0/24".parse().unwrap()].into();
        let sources = || Object::Sources(Sources::of(&ranges));
        let of_sources = [sources(), Object::Guard { sources: Box::new(sources()) }];
        let forks = objects.iter().flat_map(|object| {
            let chain = || End::Chain(Box::new(object.clone()));
            let pairs = [(chain(), chain()), (chain(), End::Drop), (End::Pass, chain())];
            pairs.map(|(inside, outside)| Object::Fork { inside, outside })
        });
        let forks: Vec<_> = forks.collect();
        objects.extend(forks);
        objects.extend(of_sources);
        objects
    }

    #[test]
    fn names_can_be_read_back() {
        for object in objects(&sticky("default", "web-1-masquerade", "http"), 31) {
            assert_eq!(Object::parse(&object.name()), Some(object.clone()), "{}", object.name());
            assert_eq!(object.comment(), None, "the name says it all");
        }
        for foreign in ["", "service", "service-cluster", "service-cluster-3x", "nat-output", "remember"] {
            assert_eq!(Object::parse(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn names_of_any_service_port_are_taken_by_the_kernel_read_back_and_told_apart() {
        const MOST_BY_THE_KERNEL: usize = 255;
        let most = Scope::Local.first_slot() - 1;
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
                assert_eq!(Object::parse(&name), Some(object), "{name}");
            }
        }
        assert_eq!(ports[1].comment(), Some(&*format!("{long}/{long}")));
        assert_eq!(ports[3].comment().map(str::len), Some(128));
    }
}
