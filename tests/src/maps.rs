//! The maps of a sockets' plane as they are in the kernel, numbers and all.
//!
//! In: where they are pinned. Out: [`Maps`], which can be compared byte by byte, or, as [`Group`]s, whatever the numbers
//! and slots that ports happen to have. Written out they are
//!
//! ```text
//! frontend 10.96.0.10 cluster-ip                                             an address by itself
//! frontend 10.96.0.10:80/TCP port=3 pod,host=slots:4..6(3.cluster) affinity=60 members
//! slot 4 10.244.0.2:8080                                                     of those that frontends lead to
//! member 3.cluster 10.244.0.2:8080                                           3 is the number of the port
//! ```

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::Path};

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapError},
};
use proxy_ebpf::{Choice, Endpoint, FrontendKey, FrontendValue, MemberKey, flag, set, verdict};
use weir::{dataplane::ebpf::Place, model::Protocol};

/// What leads to backends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Maps {
    /// `frontends`.
    pub frontends: BTreeMap<FrontendKey, FrontendValue>,
    /// `slots`, those that frontends lead to.
    pub slots: BTreeMap<u32, Endpoint>,
    /// `members`, with the time each joined.
    pub members: BTreeMap<MemberKey, u64>,
}

/// What one number holds together, without the number and without the slots.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    /// Each frontend with its flags, its affinity, and what pods and the host get.
    pub frontends: Vec<(FrontendKey, u32, u32, [Outcome; 2])>,
    /// Each member with the kind of its set.
    pub members: Vec<(u32, Endpoint)>,
}

/// A verdict, which of the port's sets, and the backends, sorted.
type Outcome = (u32, u32, Vec<Endpoint>);

impl Maps {
    /// Reads them.
    ///
    /// # Errors
    ///
    /// When they are not there, or are not what they should be.
    pub fn read(place: &Place) -> Result<Self> {
        let directory = place.maps();
        let mut maps = Self {
            frontends: whole(&directory, "frontends")?,
            members: whole(&directory, "members")?,
            slots: BTreeMap::new(),
        };
        let slots: Array<_, Endpoint> = Map::Array(pinned(&directory, "slots")?).try_into()?;
        for choice in maps.frontends.values().flat_map(|value| [value.pod, value.host]) {
            for slot in choice.first..choice.first + choice.count {
                maps.slots.insert(slot, slots.get(&slot, 0)?);
            }
        }
        Ok(maps)
    }

    /// The same by number, in an order that does not depend on it. Addresses by themselves are a group each.
    #[must_use]
    pub fn groups(&self) -> Vec<Group> {
        let mut groups: BTreeMap<u32, Group> = BTreeMap::new();
        let mut sorted = Vec::new();
        for (key, value) in &self.frontends {
            let outcomes = [value.pod, value.host].map(|choice| self.outcome(&choice));
            let frontend = (*key, value.flags, value.affinity, outcomes);
            if key.port == 0 {
                sorted.push(Group { frontends: vec![frontend], members: Vec::new() });
            } else {
                groups.entry(value.port).or_default().frontends.push(frontend);
            }
        }
        for member in self.members.keys() {
            groups.entry(set::port(member.set)).or_default().members.push((member.set & 3, member.backend));
        }
        sorted.extend(groups.into_values());
        sorted.sort_unstable();
        sorted
    }

    fn outcome(&self, choice: &Choice) -> Outcome {
        let slots = choice.first..choice.first + choice.count;
        let mut backends: Vec<Endpoint> = slots.filter_map(|slot| self.slots.get(&slot).copied()).collect();
        backends.sort_unstable();
        (choice.verdict, choice.set & 3, backends)
    }
}

impl fmt::Display for Maps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut frontends: Vec<_> = self.frontends.iter().collect();
        frontends.sort_unstable_by_key(|(key, _)| (endpoint(key).ip(), endpoint(key).port(), key.protocol));
        for (key, value) in frontends {
            let flags = [
                (flag::CLUSTER_IP, "cluster-ip"),
                (flag::NODE, "node"),
                (flag::LOOPBACK, "loopback"),
                (flag::MEMBERS, "members"),
            ];
            let flags = flags.into_iter().filter(|(flag, _)| value.flags & flag != 0).map(|(_, name)| name);
            let flags: String = flags.flat_map(|name| [" ", name]).collect();
            let at = endpoint(key);
            if key.port == 0 {
                writeln!(f, "frontend {}{flags}", at.ip())?;
                continue;
            }
            let protocol = Protocol::ALL.into_iter().find(|known| known.number() == key.protocol);
            let protocol = protocol.map_or_else(|| "?".to_owned(), |protocol| protocol.to_string());
            write!(f, "frontend {}/{protocol} port={}", address(&at), value.port)?;
            if value.pod == value.host {
                write!(f, " pod,host={}", choice(&value.pod))?;
            } else {
                write!(f, " pod={} host={}", choice(&value.pod), choice(&value.host))?;
            }
            if value.affinity != 0 {
                write!(f, " affinity={}", value.affinity)?;
            }
            writeln!(f, "{flags}")?;
        }
        for (slot, backend) in &self.slots {
            writeln!(f, "slot {slot} {}", address(backend))?;
        }
        for member in self.members.keys() {
            writeln!(f, "member {} {}", set_name(member.set), address(&member.backend))?;
        }
        Ok(())
    }
}

fn endpoint(key: &FrontendKey) -> Endpoint {
    Endpoint { address: key.address, port: key.port, zero: 0 }
}

fn address(endpoint: &Endpoint) -> SocketAddr {
    SocketAddr::new(endpoint.ip(), endpoint.port())
}

fn choice(choice: &Choice) -> String {
    match choice.verdict {
        verdict::SERVE => {
            format!("slots:{}..{}({})", choice.first, choice.first + choice.count, set_name(choice.set))
        }
        verdict::REFUSE => "refuse".to_owned(),
        _ => "pass".to_owned(),
    }
}

fn set_name(number: u32) -> String {
    let port = set::port(number);
    let kinds = [(set::CLUSTER, "cluster"), (set::LOCAL, "local"), (set::SERVING, "serving")];
    let kind = kinds.into_iter().find(|(kind, _)| set::number(port, *kind) == number);
    format!("{port}.{}", kind.map_or("?", |(_, name)| name))
}

fn pinned(directory: &Path, name: &str) -> Result<MapData> {
    MapData::from_pin(directory.join(name)).with_context(|| format!("opening the map {name}"))
}

fn whole<K: Pod + Ord, V: Pod>(directory: &Path, name: &str) -> Result<BTreeMap<K, V>> {
    let map: HashMap<_, K, V> = Map::HashMap(pinned(directory, name)?).try_into()?;
    let entries: Result<_, MapError> = map.iter().collect();
    entries.with_context(|| format!("reading the map {name}"))
}
