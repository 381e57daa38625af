//! Objects made on demand and shared: chains that pick a backend, and what remembers the choice.
//!
//! In: what a service port needs. Out: names, rules. Names say everything about an object, so that a dump can be read
//! back by name alone: `service-cluster-3-masquerade`, `node-port-local-2/default/web/http/tcp`.

use std::ops::Range;

use super::{
    drops::NO_LOCAL_ENDPOINTS,
    expr,
    netlink::Expr,
    ruleset::{self, Map},
    sticky::Sticky,
};
use crate::{
    model::{Family, Protocol},
    plan::NodePlan,
};

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
    /// The map client → backend of a sticky port.
    Memory { sticky: Sticky, scope: Scope },
    /// The chain that writes into the memory, with its timeout in seconds.
    Recorder { sticky: Sticky, scope: Scope, seconds: u32 },
    /// The chain that sends a flow to one of `count` backends.
    Picker { space: Space, scope: Scope, count: u32, masquerade: Masquerade, sticky: Option<Sticky> },
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
            Self::Memory { scope, .. } => format!("memory-{}", word_of(&SCOPES, scope)),
            Self::Recorder { scope, seconds, .. } => format!("record-{}-{seconds}", word_of(&SCOPES, scope)),
            Self::Picker { space, scope, count, masquerade, .. } => format!(
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
        if let Some(rest) = words.strip_prefix("memory-") {
            let (scope, rest) = scope_of(rest)?;
            return rest.is_empty().then_some(Self::Memory { sticky: sticky?, scope });
        }
        if let Some(rest) = words.strip_prefix("record-") {
            let (scope, rest) = scope_of(rest)?;
            let seconds = rest.strip_prefix('-')?.parse().ok()?;
            return Some(Self::Recorder { sticky: sticky?, scope, seconds });
        }
        let (space, rest) = SPACES
            .iter()
            .find_map(|(space, word)| Some((*space, words.strip_prefix(word)?.strip_prefix('-')?)))?;
        let (scope, rest) = scope_of(rest)?;
        let rest = rest.strip_prefix('-')?;
        let digits = rest.find(|character: char| !character.is_ascii_digit()).unwrap_or(rest.len());
        let (count, rest) = rest.split_at(digits);
        let masquerade = MASQUERADES.iter().find(|(_, word)| *word == rest)?.0;
        let count = count.parse().ok().filter(|count| *count < Scope::Local.first_slot())?;
        Some(Self::Picker { space, scope, count, masquerade, sticky })
    }

    /// The chains that this one leads to, which must be there as long as it is.
    pub(super) fn parts(&self) -> impl Iterator<Item = &Self> {
        let ends = match self {
            Self::Fork { inside, outside } => [inside.object(), outside.object()],
            _ => [None, None],
        };
        ends.into_iter().flatten()
    }

    /// Everything that must be there as long as it is: its parts, what they remember with, and itself.
    pub(super) fn needed(&self) -> Vec<Self> {
        let chains = || self.parts().chain([self]);
        let memories = chains().filter_map(|object| match object {
            Self::Recorder { sticky, scope, .. } | Self::Picker { sticky: Some(sticky), scope, .. } => {
                Some(Self::Memory { sticky: sticky.clone(), scope: *scope })
            }
            _ => None,
        });
        memories.chain(chains().cloned()).collect()
    }

    /// The slots of a frontend that it and its parts pick from.
    pub(super) fn reach(&self) -> Vec<Range<u32>> {
        let ranges = self.parts().chain([self]).filter_map(|object| match object {
            Self::Picker { scope, count, .. } => Some(scope.first_slot()..scope.first_slot() + count),
            _ => None,
        });
        ranges.collect()
    }

    /// Whether frontends lead to it by a bucket.
    pub(super) fn has_bucket(&self) -> bool {
        match self {
            Self::Memory { .. } | Self::Recorder { .. } => false,
            Self::Picker { .. } => true,
            Self::Fork { .. } => self.parts().all(Self::has_bucket),
        }
    }

    /// The port this object belongs to alone, if it is not shared by all.
    pub(super) fn sticky(&self) -> Option<&Sticky> {
        match self {
            Self::Memory { sticky, .. } | Self::Recorder { sticky, .. } => Some(sticky),
            Self::Picker { sticky, .. } => sticky.as_ref(),
            Self::Fork { .. } => self.parts().find_map(Self::sticky),
        }
    }

    /// The rules of a chain; a map has none.
    pub(super) fn rules(&self, family: Family, node: &NodePlan) -> Vec<Vec<Expr>> {
        match self {
            Self::Memory { .. } => Vec::new(),
            Self::Recorder { sticky, scope, seconds } => {
                let memory = Self::Memory { sticky: sticky.clone(), scope: *scope }.name();
                let words = expr::address_words(family);
                vec![vec![
                    expr::source_address(family, expr::word(0)),
                    expr::destination_address(family, expr::word(words)),
                    expr::destination_port(expr::word(2 * words)),
                    expr::remember(&memory, expr::word(0), expr::word(words), *seconds),
                ]]
            }
            Self::Picker { .. } => self.picker_rules(family, node),
            Self::Fork { inside, outside } => vec![
                [ruleset::from_outside(family, node), vec![outside.verdict()]].concat(),
                vec![inside.verdict()],
            ],
        }
    }

    fn picker_rules(&self, family: Family, node: &NodePlan) -> Vec<Vec<Expr>> {
        let Self::Picker { space, scope, count, masquerade, sticky } = self else { return Vec::new() };
        let mark = ruleset::mark(node.masquerade_mark);
        // The bucket number has done its work: the packet leaves with the default priority.
        let forget = vec![expr::constant(expr::word(0), &[0; 4]), expr::set_priority(expr::word(0))];
        let mut rules = match masquerade {
            Masquerade::Nobody => vec![forget],
            Masquerade::Everybody => vec![[forget, mark].concat()],
            Masquerade::Foreign => vec![forget, [ruleset::not_from_pod(family, node), mark].concat()],
            Masquerade::Host => vec![forget, [expr::source_is_local(true).to_vec(), mark].concat()],
        };
        if let Some(sticky) = sticky {
            let memory = Self::Memory { sticky: sticky.clone(), scope: *scope }.name();
            // `nft` reads a translation to a port back only behind a match on the protocol.
            let protocol = Protocol::ALL.into_iter().find(|protocol| {
                sticky
                    .text()
                    .rsplit('/')
                    .next()
                    .is_some_and(|name| name.eq_ignore_ascii_case(&protocol.to_string()))
            });
            let is_protocol = protocol.map(|protocol| {
                [expr::protocol(expr::word(0)), expr::compare(expr::word(0), true, &[protocol.number()])]
            });
            rules.push(
                is_protocol
                    .into_iter()
                    .flatten()
                    .chain([
                        expr::source_address(family, expr::word(0)),
                        expr::map(expr::word(0), &memory, expr::word(0)),
                        expr::dnat(family),
                    ])
                    .collect(),
            );
        }
        let (key, words, backends) = match space {
            Space::Service => {
                (ruleset::load_frontend(family), expr::address_words(family) + 2, Map::Backends)
            }
            Space::NodePort => (ruleset::load_node_port(), 2, Map::NodePortBackends),
        };
        let pick = vec![
            expr::random(*count, scope.first_slot(), expr::word(words)),
            expr::map(expr::word(0), backends.name(), expr::word(0)),
            expr::dnat(family),
        ];
        rules.push([key, pick].concat());
        rules
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::ObjectName, plan::PortId};

    fn sticky(namespace: &str, service: &str, port: &str) -> Sticky {
        let (service, port) = (ObjectName::new(namespace, service), port.into());
        Sticky::of(&PortId { service, port, protocol: Protocol::Sctp, family: Family::V4 })
    }

    /// Every kind of object for this service port, with so many endpoints, or seconds.
    fn objects(sticky: &Sticky, number: u32) -> Vec<Object> {
        let mut objects = Vec::new();
        for (scope, _) in SCOPES {
            objects.push(Object::Memory { sticky: sticky.clone(), scope });
            objects.push(Object::Recorder { sticky: sticky.clone(), scope, seconds: number });
            for (space, _) in SPACES {
                for (masquerade, _) in MASQUERADES {
                    for sticky in [None, Some(sticky.clone())] {
                        objects.push(Object::Picker { space, scope, count: number, masquerade, sticky });
                    }
                }
            }
        }
        let forks = objects.iter().flat_map(|object| {
            let chain = || End::Chain(Box::new(object.clone()));
            let pairs = [(chain(), chain()), (chain(), End::Drop), (End::Pass, chain())];
            pairs.map(|(inside, outside)| Object::Fork { inside, outside })
        });
        let forks: Vec<_> = forks.collect();
        objects.extend(forks);
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
